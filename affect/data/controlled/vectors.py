# SPDX-License-Identifier: Apache-2.0
"""Vectors as small images, so that experiments on numbers run through the same pipeline as faces.

A number in [low, high] is two bytes, high byte first; ``affect.encoders.PixelVector`` reads them back.
"""

from __future__ import annotations

import math

import numpy as np

from affect.data.table import FaceTable
from affect.errors import DataError

PREFIX = "x"
"""Columns ``x0``, ``x1`` … of a table hold its vectors."""

STEPS = 65_535


def image_side(features: int) -> int:
    """Return the side of the square image that holds vectors of ``features`` numbers."""
    return math.ceil(math.sqrt(2 * features / 3))


def vectors_to_images(vectors: np.ndarray, low: float, high: float) -> np.ndarray:
    """Return vectors ``(N, D)`` as RGB uint8 images ``(N, S, S, 3)``.

    Raises:
        DataError: If a number lies outside [low, high].
    """
    if not np.isfinite(vectors).all() or vectors.min(initial=low) < low or vectors.max(initial=high) > high:
        raise DataError(f"vectors must lie in [{low:g}, {high:g}], found [{vectors.min():g}, {vectors.max():g}]")
    side = image_side(vectors.shape[1])
    steps = np.round((vectors.astype(np.float64) - low) / (high - low) * STEPS).astype(np.uint16)
    flat = np.zeros((len(vectors), side * side * 3), np.uint8)
    flat[:, 0 : 2 * vectors.shape[1] : 2] = steps >> 8
    flat[:, 1 : 2 * vectors.shape[1] : 2] = steps & 255
    return flat.reshape(-1, side, side, 3)


class VectorImages:
    """Images of the vectors in a table's columns ``x0``, ``x1`` and so on.

    Args:
        table: The table.
        low: Least number that can be stored.
        high: Largest number that can be stored.
    """

    def __init__(self, table: FaceTable, low: float, high: float) -> None:
        count = sum(1 for name in table.names if name.startswith(PREFIX) and name[1:].isdigit())
        vectors = np.stack([table.numbers(f"{PREFIX}{k}")[0] for k in range(count)], 1)
        self.images = vectors_to_images(vectors, low, high)

    def read(self, rows: np.ndarray) -> list[np.ndarray]:
        """Return the images of ``rows``, each RGB uint8 ``(S, S, 3)``."""
        return list(self.images[np.asarray(rows, np.int64)])


def vector_table(
    vectors: np.ndarray, labels: np.ndarray, parts: np.ndarray, names: list[str], dataset: str, source: str
) -> FaceTable:
    """Return the table of vectors ``(N, D)`` with yes-or-no labels ``(N, T)``.

    Args:
        vectors: Numbers.
        labels: Labels in {0, 1}.
        parts: Part of each row ``(N,)``.
        names: Names of the labels; the columns are ``attribute_<name>``.
        dataset: Name in the metadata.
        source: Where labels come from.
    """
    columns: dict = {"image": [f"vector/{k}" for k in range(len(vectors))], "part": parts.tolist()}
    columns |= {f"{PREFIX}{k}": vectors[:, k].astype(np.float32) for k in range(vectors.shape[1])}
    columns |= {f"attribute_{name}": labels[:, t].astype(np.float32) for t, name in enumerate(names)}
    return FaceTable.from_columns(columns, ".", {"dataset": dataset, "label_source": source})


def divide(train: int, validation: int, test: int) -> np.ndarray:
    """Return the part of each row: first training, then validation, then test rows."""
    return np.repeat(["train", "validation", "test"], [train, validation, test])
