# SPDX-License-Identifier: Apache-2.0
"""Drawn shapes at many scales, for THIN: which shape is it, whatever its size? After dSprites (Matthey et al., 2017).

Unlike there the range of scales is wider and images are small and noisy, because clean ones are solved by anything.
"""

from __future__ import annotations

import numpy as np

from affect.data.controlled.vectors import divide
from affect.data.table import FaceTable
from affect.errors import DataError

__all__ = ["images", "shapes"]

SHAPES = ("square", "ellipse", "heart")
SIZES = 6

_RADIUS = 0.3
"""Radius of a shape of scale 1 as a fraction of the image's side."""

_FINE = 3
"""Sub-pixels along a pixel's side, over which a drawing is averaged."""

_BLOCK = 256


def shapes(
    train: int = 1500,
    validation: int = 500,
    test: int = 2000,
    image_size: int = 32,
    smallest: float = 0.3,
    noise: float = 0.12,
    seed: int = 0,
) -> FaceTable:
    """Return squares, ellipses and hearts in six sizes, at any place and angle.

    Columns: ``shape``, ``size`` (1 to 6 as text, the exogenous class), ``scale`` (evenly spaced from ``smallest`` to
    1), ``angle`` (degrees), ``x`` and ``y`` (centre in pixels, first pixel centre at 0).

    Args:
        train: Training rows.
        validation: Rows that select.
        test: Test rows.
        image_size: Side of the images in pixels.
        smallest: Scale of the smallest size.
        noise: Standard deviation of each pixel's noise, where 1 is the contrast of a shape.
        seed: Seed of every draw, the noise included.

    Raises:
        DataError: If a number is out of range.
    """
    if not 0 < smallest < 1 or noise < 0 or image_size < 8:
        raise DataError(f"shapes: smallest={smallest}, noise={noise}, image_size={image_size} out of range")
    parts = divide(train, validation, test)
    count = len(parts)
    random = np.random.default_rng((seed, 4))
    shape, size = random.integers(0, len(SHAPES), count), random.integers(0, SIZES, count)
    scale = np.linspace(smallest, 1, SIZES)[size]
    margin = 1.3 * _RADIUS * scale * image_size
    centre = margin[:, None] + random.random((count, 2)) * (image_size - 2 * margin)[:, None] - 0.5
    columns = {
        "image": [f"shapes/{k}" for k in range(count)],
        "part": parts.tolist(),
        "shape": [SHAPES[k] for k in shape],
        "size": [str(k + 1) for k in size],
        "scale": scale.astype(np.float32),
        "angle": random.uniform(0, 360, count).astype(np.float32),
        "x": centre[:, 0].astype(np.float32),
        "y": centre[:, 1].astype(np.float32),
    }
    told: dict = {
        "dataset": "shapes",
        "label_source": "arithmetic",
        "image_size": image_size,
        "noise": noise,
        "seed": seed,
    }
    return FaceTable.from_columns(columns, ".", told)


def images(table: FaceTable) -> ShapeImages:
    """Return the reader of the shapes' images."""
    return ShapeImages(table)


class ShapeImages:
    """Images of a table of shapes, drawn once.

    Args:
        table: The table; its metadata have ``image_size``, ``noise`` and ``seed``.
    """

    def __init__(self, table: FaceTable) -> None:
        side, noise, seed = (table.metadata[key] for key in ("image_size", "noise", "seed"))
        random = np.random.default_rng((int(seed), 5))  # type: ignore[arg-type]
        names = table.strings("shape")[0]
        numbers = np.stack([table.numbers(key)[0] for key in ("scale", "angle", "x", "y")], 1)
        blocks = []
        for start in range(0, len(table), _BLOCK):
            part = slice(start, start + _BLOCK)
            clean = drawn(names[part], numbers[part], int(side))  # type: ignore[arg-type]
            noisy = clean + float(noise) * random.standard_normal(clean.shape)  # type: ignore[arg-type]
            blocks.append(np.round((0.15 + 0.7 * noisy).clip(0, 1) * 255).astype(np.uint8))
        self.images = np.concatenate(blocks) if blocks else np.zeros((0, int(side), int(side)), np.uint8)  # type: ignore[arg-type]

    def read(self, rows: np.ndarray) -> list[np.ndarray]:
        """Return the images of ``rows``, each RGB uint8 ``(S, S, 3)``."""
        return [np.repeat(self.images[int(row)][..., None], 3, 2) for row in rows]


def drawn(names: np.ndarray, numbers: np.ndarray, side: int) -> np.ndarray:
    """Return how much of each pixel a shape covers, in [0, 1], ``(N, S, S)``.

    Args:
        names: Shapes ``(N,)``.
        numbers: Scale, angle in degrees, and centre x and y in pixels ``(N, 4)``.
        side: Side S of the images.
    """
    axis = (np.arange(side * _FINE) + 0.5) / _FINE - 0.5
    scale, angle, x, y = (column[:, None, None] for column in numbers.astype(np.float64).T)
    dx, dy = axis[None, None, :] - x, axis[None, :, None] - y
    radius, turn = _RADIUS * scale * side, np.deg2rad(angle)
    u = (np.cos(turn) * dx + np.sin(turn) * dy) / radius
    v = (np.cos(turn) * dy - np.sin(turn) * dx) / radius
    inside = np.where(
        (names == "square")[:, None, None],
        np.maximum(abs(u), abs(v)) <= 0.85,
        np.where(
            (names == "ellipse")[:, None, None],
            (u / 1.2) ** 2 + (v / 0.7) ** 2 <= 1,
            (u**2 + v**2 - 0.8) ** 3 + u**2 * v**3 <= 0,  # a heart whose tip is below, as y points down
        ),
    )
    return inside.reshape(len(names), side, _FINE, side, _FINE).mean((2, 4))
