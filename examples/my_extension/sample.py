# SPDX-License-Identifier: Apache-2.0
"""Draws a small dataset in the layout from affect's built-in faces, so that every command of the README can be tried.

Pain is the Prkachin and Solomon index of the drawn action units, so it is exact: AU4 + max(AU6, AU7) + max(AU9, AU10),
and 1 for closed eyes. Never a result on people.
"""

from __future__ import annotations

import argparse
from pathlib import Path

import numpy as np

from affect.data.faces import FaceDials
from affect.data.layouts import faces
from affect.data.table import FaceTable
from my_extension import layout


def pain_index(table: FaceTable) -> np.ndarray:
    """Return the pain of each row from its action units, 0 to 16, ``(N,)``."""
    au = {number: table.numbers(f"au{number:02d}_intensity")[0] for number in (4, 6, 7, 9, 10, 43)}
    return np.round(au[4] + np.maximum(au[6], au[7]) + np.maximum(au[9], au[10]) + (au[43] >= 1))


def draw(dials: FaceDials, count: int, seed: int = 0, missing: float = 0.05) -> FaceTable:
    """Return the labels of drawn faces as the layout's columns; some pain is not coded, some faces are not tracked."""
    table = faces.read(dials, seed, count)
    kept, tracked = np.random.default_rng(seed).random((2, count)) >= missing
    subject = table.strings("subject")[0]
    trial = np.array([f"t{1 + k % 3}" for k in range(count)], dtype=object)
    return FaceTable.from_columns(
        {
            "image": table.strings("image")[0],
            "subject": subject,
            "sequence": trial,
            "frame": np.arange(count, dtype=np.int32),
            "pain": (pain_index(table).astype(np.float32), kept),
            "landmarks_5": (table.numbers("landmarks_5")[0].round(2), tracked),
        }
    )


def make(root: str | Path, count: int = 1200, image_size: int = 128, subjects: int = 60, seed: int = 0) -> None:
    """Write ``count`` drawn faces of ``subjects`` people as the dataset in ``root``."""
    dials = FaceDials(image_size=image_size, subjects=subjects)
    layout.write(draw(dials, count, seed), root, faces.images(dials, seed, count))


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description="Draw a small dataset in the layout of my_extension.layout.")
    parser.add_argument("root", help="folder of the dataset")
    parser.add_argument("--count", type=int, default=1200, help="number of faces")
    arguments = parser.parse_args()
    make(arguments.root, arguments.count)
    print(f"{arguments.root}: {arguments.count} faces")
