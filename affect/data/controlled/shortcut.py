# SPDX-License-Identifier: Apache-2.0
"""Glyphs beside a texture that gives the class away in training alone, for PAL: where does evidence come from?

A glyph at a random place is the class, and its five points are known. Elsewhere lies a texture that agrees with the
class in training and validation and says nothing in the test part. Who reads the texture is right until the test.
"""

from __future__ import annotations

import numpy as np

from affect.data.controlled.vectors import divide
from affect.data.table import FaceTable
from affect.errors import ConfigError

__all__ = ["images", "planted_shortcut"]

GLYPHS = ("plus", "cross", "box")
TEXTURES = ("rows", "columns", "checks")

SIDE = 7
"""Pixels of a glyph's and of a texture's side."""


def planted_shortcut(
    train: int = 400,
    validation: int = 100,
    test: int = 1000,
    image_size: int = 24,
    contrast: float = 0.6,
    noise: float = 0.35,
    agreement: float = 1.0,
    seed: int = 0,
) -> FaceTable:
    """Return glyphs of three classes, each beside a texture.

    Columns: ``glyph`` (the class), ``texture``, ``x``, ``y``, ``texture_x``, ``texture_y`` (pixels of the left upper
    corners), and ``landmarks_5``: the glyph's corners, and its centre as the third point, where faces have the nose.

    Args:
        train: Training rows.
        validation: Rows that select.
        test: Test rows; here the texture is drawn by itself.
        image_size: Side of the images in pixels.
        contrast: How much brighter glyph and texture are than the ground, where 1 is the range of the pixels.
        noise: Standard deviation of a pixel's noise in the same units.
        agreement: Probability that the texture is the class's own, outside of the test part; else it is any.
        seed: Seed of every draw.

    Raises:
        ConfigError: If glyph and texture do not fit beside each other, or ``agreement`` is no probability.
    """
    if image_size < 3 * SIDE:
        raise ConfigError(f"dataset.image_size={image_size}: glyph and texture need at least {3 * SIDE} px")
    if not 0 <= agreement <= 1:
        raise ConfigError(f"dataset.agreement={agreement}: must lie in [0, 1]")
    random = np.random.default_rng((seed, 6))
    parts = divide(train, validation, test)
    count = len(parts)
    glyph = random.integers(0, len(GLYPHS), count)
    tied = (random.random(count) < agreement) & (parts != "test")
    texture = np.where(tied, glyph, random.integers(0, len(TEXTURES), count))
    places = image_size - SIDE + 1
    own = random.integers(0, places, (count, 2))
    other = _beside(own, random.random(count), places)
    corners = np.array([[0, 0], [1, 0], [0.5, 0.5], [0, 1], [1, 1]]) * (SIDE - 1)
    columns = {
        "image": [f"shortcut/{k}" for k in range(count)],
        "part": parts.tolist(),
        "glyph": [GLYPHS[k] for k in glyph],
        "texture": [TEXTURES[k] for k in texture],
        "x": own[:, 0].astype(np.int32),
        "y": own[:, 1].astype(np.int32),
        "texture_x": other[:, 0].astype(np.int32),
        "texture_y": other[:, 1].astype(np.int32),
        "landmarks_5": (own[:, None] + corners).astype(np.float32).reshape(count, -1),
    }
    told: dict = {
        "dataset": "planted_shortcut",
        "label_source": "arithmetic",
        "image_size": image_size,
        "contrast": contrast,
        "noise": noise,
        "seed": seed,
    }
    return FaceTable.from_columns(columns, ".", told)


def _beside(own: np.ndarray, draw: np.ndarray, places: int) -> np.ndarray:
    """Return for each corner ``(N, 2)`` one of the corners whose square does not touch its square, by ``draw``."""
    grid = np.stack(np.meshgrid(np.arange(places), np.arange(places), indexing="xy"), -1).reshape(-1, 2)
    free = (abs(grid[None] - own[:, None]) > SIDE).any(2)
    nth = (draw * free.sum(1)).astype(np.int64)
    return grid[(np.cumsum(free, 1) > nth[:, None]).argmax(1)]


def patterns() -> tuple[np.ndarray, np.ndarray]:
    """Return which pixels the glyphs and the textures cover, bool ``(3, 7, 7)`` each."""
    row, column = np.indices((SIDE, SIDE))
    middle, last = SIDE // 2, SIDE - 1
    edge = (row == 0) | (row == last) | (column == 0) | (column == last)
    glyphs = np.stack([(row == middle) | (column == middle), (row == column) | (row + column == last), edge])
    return glyphs, np.stack([row % 2 == 0, column % 2 == 0, (row + column) % 2 == 0])


def images(table: FaceTable) -> ShortcutImages:
    """Return the reader of the images."""
    return ShortcutImages(table)


class ShortcutImages:
    """Images of a table of glyphs beside textures, drawn once.

    Args:
        table: The table; its metadata have ``image_size``, ``contrast``, ``noise`` and ``seed``.
    """

    def __init__(self, table: FaceTable) -> None:
        told: dict = {key: table.metadata[key] for key in ("image_size", "contrast", "noise", "seed")}
        random = np.random.default_rng((int(told["seed"]), 7))
        side, count = int(told["image_size"]), len(table)
        canvas = float(told["noise"]) * random.standard_normal((count, side, side))
        rows = np.arange(count)[:, None, None]
        step = np.arange(SIDE)
        for names, column, drawn, prefix in zip(
            (GLYPHS, TEXTURES), ("glyph", "texture"), patterns(), ("", "texture_"), strict=True
        ):
            chosen = np.array([names.index(name) for name in table.strings(column)[0]], np.int64)
            x, y = (table.numbers(f"{prefix}{axis}")[0].astype(np.int64) for axis in ("x", "y"))
            vertical, horizontal = y[:, None, None] + step[:, None], x[:, None, None] + step
            canvas[rows, vertical, horizontal] += float(told["contrast"]) * drawn[chosen]
        # Room for noise on either side of ground and contrast.
        self.images = np.round((0.35 + 0.4 * canvas).clip(0, 1) * 255).astype(np.uint8)

    def read(self, rows: np.ndarray) -> list[np.ndarray]:
        """Return the images of ``rows``, each RGB uint8 ``(S, S, 3)``."""
        return [np.repeat(self.images[int(row)][..., None], 3, 2) for row in rows]
