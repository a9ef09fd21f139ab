# SPDX-License-Identifier: Apache-2.0
"""Photographs whose face is a red square, and finders that see it, or are killed while they look."""

from __future__ import annotations

import os
import signal
from pathlib import Path

import numpy as np

from affect.geometry.providers import FaceObservation, Pose
from affect.geometry.templates import FACE_68


def photograph(k, face=(30, 24, 40), size=(96, 128)):
    """A photograph with a face at (x, y, side), or several faces, or none; its background tells k."""
    y, x = np.mgrid[: size[0], : size[1]]
    image = np.stack([(x + 5 * k) % 120, (y * 2 + k) % 256, np.full_like(x, 7 * k % 256)], -1).astype(np.uint8)
    faces = [] if face is None else face if isinstance(face, list) else [face]
    for left, top, side in faces:
        image[top : top + side, left : left + side] = (250, 0, 0)
        image[top : top + side // 4, left : left + side // 4] = (250, 0, 200)
    return image


class RedSquares:
    """Finds red squares; the mean face lies in each."""

    pose = None

    def find(self, image):
        red = (image[..., 0].astype(int) > 200) & (image[..., 1] < 60)
        columns = np.flatnonzero(red.any(0))
        found = []
        for run in np.split(columns, np.flatnonzero(np.diff(columns) > 1) + 1):
            if len(run) >= 6:
                rows = np.flatnonzero(red[:, run[len(run) // 2]])
                box = np.array([run[0] - 0.5, rows[0] - 0.5, run[-1] + 0.5, rows[-1] + 0.5])
                found.append(FaceObservation(box, 1.0, box[:2] + FACE_68 * (box[2:] - box[:2]), pose=self.pose))
        return sorted(found, key=lambda face: -(face.box[2] - face.box[0]))


class Posed(RedSquares):
    """Tells a pose too."""

    pose = Pose(1.0, -2.0, 10.0)


class Killed(RedSquares):
    """Kills its process at the ``at``-th image, if ``once`` (a file) is not there yet."""

    def __init__(self, at: int, once: str) -> None:
        self.at, self.once, self.seen = at, Path(once), 0

    def find(self, image):
        self.seen += 1
        if self.seen == self.at and not self.once.exists():
            self.once.touch()
            os.kill(os.getpid(), signal.SIGKILL)
        return super().find(image)
