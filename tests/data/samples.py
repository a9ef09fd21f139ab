# SPDX-License-Identifier: Apache-2.0
"""Small faces on disk and in memory for the tests of the data layer."""

from __future__ import annotations

from pathlib import Path

import cv2
import numpy as np

from affect import labels
from affect.data.table import FaceTable

CLASSES = ("neutral", "happiness", "sadness")


def smooth_image(seed: int, height: int = 48, width: int = 48) -> np.ndarray:
    """Return an RGB image without hard edges, so that decoders and interpolation agree on it."""
    small = np.random.default_rng(seed).integers(30, 226, (6, 6, 3)).astype(np.uint8)
    return cv2.resize(small, (width, height), interpolation=cv2.INTER_CUBIC)


def write_image(path: Path, image: np.ndarray) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    assert cv2.imwrite(str(path), image[..., ::-1])


def points_68(seed: int, count: int, size: float = 48) -> np.ndarray:
    """Return ``(count, 68, 2)`` plausible, distinct points inside an image of ``size``."""
    from affect.geometry.templates import FACE_68

    random = np.random.default_rng(seed)
    noise = random.normal(0, 0.004, (count, 68, 2))
    return ((FACE_68[None] + noise) * 0.6 + 0.2).astype(np.float32) * size


def columns(count: int, subjects: int = 6, seed: int = 0, landmarks: bool = True) -> dict:
    """Return the columns of a table with every kind of label and some missing cells."""
    random = np.random.default_rng(seed)
    valid = random.random(count) > 0.2
    names = [f"s{k % subjects:02d}/{k:04d}.png" for k in range(count)]
    made = {
        "image": names,
        "subject": [f"s{k % subjects:02d}" for k in range(count)],
        "frame": np.arange(count, dtype=np.int32),
        "au01_occurrence": ((np.arange(count) % 3 == 0).astype(np.float32), valid),
        "au12_occurrence": (np.arange(count) % 2).astype(np.float32),
        "expression": [CLASSES[k % 3] if k % 7 else None for k in range(count)],
        "valence": random.uniform(-1, 1, count).astype(np.float32),
        "arousal": random.uniform(-1, 1, count).astype(np.float32),
        "pose_pitch": random.uniform(-20, 20, count).astype(np.float32),
        "pose_yaw": random.uniform(-20, 20, count).astype(np.float32),
        "pose_roll": random.uniform(-20, 20, count).astype(np.float32),
        "camera": np.arange(count, dtype=np.int64) % 2,
    }
    if landmarks:
        made["landmarks_68"] = points_68(seed, count).reshape(count, 136)
    return made


def table(count: int = 24, root: Path | str = ".", **options) -> FaceTable:
    metadata = {"dataset": "sample", "expressions": [*CLASSES, labels.OTHER]}
    return FaceTable.from_columns(columns(count, **options), root, metadata)


class DrawnImages:
    """Images made from the row alone; counts how many were read."""

    def __init__(self, size: int = 48) -> None:
        self.size, self.reads = size, 0

    def read(self, rows: np.ndarray) -> list[np.ndarray]:
        self.reads += len(rows)
        return [smooth_image(int(row), self.size, self.size) for row in rows]
