# SPDX-License-Identifier: Apache-2.0
"""Real handwritten digits under any rotation, for THIN: what class is it, whatever the angle?

The digits are those that come with scikit-learn, a copy of the test part of the "Optical recognition of handwritten
digits" data of Alpaydin and Kaynak (UCI, 1998): 1,797 images of 8x8 pixels with 17 grey levels.
"""

from __future__ import annotations

import cv2
import numpy as np

from affect.data.controlled.vectors import divide
from affect.data.table import FaceTable
from affect.errors import ConfigError, DataError

__all__ = ["images", "rotated_digits"]

SIDE = 12
"""Side of the images in pixels: 8 pixels enlarged to 10, and room to turn."""

_ENLARGED = 1.25


def rotated_digits(
    train: int = 600, validation: int = 400, test: int = 797, rotations: int = 3, others: int = 2, seed: int = 0
) -> FaceTable:
    """Return digits in random rotations; all rotations of one drawing lie in one part.

    Columns: ``digit`` (0 to 9, as text), ``rotation`` (degrees counter-clockwise, uniform in [0, 360)), ``drawing``
    (number of the image among the 1,797).

    Args:
        train: Drawings for training.
        validation: Drawings that select.
        test: Drawings for the test.
        rotations: Rotations of each training drawing.
        others: Rotations of each other drawing.
        seed: Seed of the division and of the angles.

    Raises:
        ConfigError: If scikit-learn is not installed.
        DataError: If there are not so many drawings.
    """
    drawings, digits = handwritten_digits()
    parts = divide(train, validation, test)
    if len(parts) > len(drawings):
        raise DataError(f"digits: {len(parts)} drawings were asked for, and there are {len(drawings)}")
    random = np.random.default_rng((seed, 3))
    chosen = random.permutation(len(drawings))[: len(parts)]
    times = np.where(parts == "train", rotations, others)
    drawing, part = np.repeat(chosen, times), np.repeat(parts, times)
    turn = np.concatenate([np.arange(count) for count in times]) if len(times) else np.zeros(0, int)
    columns = {
        "image": [f"digits/{d:04d}/{k}" for d, k in zip(drawing, turn, strict=True)],
        "part": part.tolist(),
        "drawing": drawing.astype(np.int64),
        "digit": [str(digit) for digit in digits[drawing]],
        "rotation": random.uniform(0, 360, len(drawing)).astype(np.float32),
    }
    return FaceTable.from_columns(columns, ".", {"dataset": "rotated_digits", "label_source": "handwriting"})


def images(table: FaceTable) -> RotatedDigits:
    """Return the reader of the rotated digits' images."""
    return RotatedDigits(table)


class RotatedDigits:
    """Images of a table of rotated digits.

    Args:
        table: The table.
    """

    def __init__(self, table: FaceTable) -> None:
        drawings, _ = handwritten_digits()
        chosen = table.numbers("drawing")[0].astype(np.int64)
        angles = table.numbers("rotation")[0]
        self.images = np.stack([turned(drawings[d], float(a)) for d, a in zip(chosen, angles, strict=True)])

    def read(self, rows: np.ndarray) -> list[np.ndarray]:
        """Return the images of ``rows``, each RGB uint8 ``(12, 12, 3)``."""
        return [np.repeat(self.images[int(row)][..., None], 3, 2) for row in rows]


def turned(drawing: np.ndarray, degrees: float) -> np.ndarray:
    """Return a drawing ``(8, 8)`` with values 0 to 16, enlarged and turned counter-clockwise, uint8 ``(12, 12)``."""
    middle = (drawing.shape[0] - 1) / 2
    matrix = cv2.getRotationMatrix2D((middle, middle), degrees, _ENLARGED)
    matrix[:, 2] += (SIDE - 1) / 2 - middle
    grey = cv2.warpAffine(drawing.astype(np.float32), matrix, (SIDE, SIDE), flags=cv2.INTER_LINEAR)
    return np.round(grey.clip(0, 16) * 255 / 16).astype(np.uint8)


def handwritten_digits(dataset: str = "rotated_digits") -> tuple[np.ndarray, np.ndarray]:
    """Return the drawings, grey levels 0 to 16 ``(1797, 8, 8)``, and their digits ``(1797,)``.

    Args:
        dataset: Who asks, for messages.

    Raises:
        ConfigError: If scikit-learn is not installed.
    """
    try:
        from sklearn.datasets import load_digits
    except ImportError as error:
        raise ConfigError(f"dataset={dataset} needs the digits of scikit-learn: pip install scikit-learn") from error
    found = load_digits()
    return found.images, found.target
