# SPDX-License-Identifier: Apache-2.0
"""The built-in faces as a source: labels without drawing, images drawn when they are first needed."""

from __future__ import annotations

import hashlib
import json
from dataclasses import asdict
from pathlib import Path

from affect.data import faces
from affect.data.cache import CachedImages
from affect.data.faces import FaceDials, FaceImages
from affect.data.images import ImageReader
from affect.data.table import FaceTable
from affect.labels import EXPRESSION_ORDERS

__all__ = ["images", "read"]


def read(dials: FaceDials, seed: int = 0, count: int = 6000, clean: bool = False) -> FaceTable:
    """Return the labels of ``count`` built-in faces; column ``image`` is ``face/<index>``.

    Args:
        dials: What is drawn and how labels are disturbed.
        seed: Seed of the set.
        count: Number of faces.
        clean: True labels: no noise, nothing missing.
    """
    metadata = {
        "dataset": "faces",
        "identities": f"faces-{seed}",  # a person is a function of seed and number, whatever the dials
        "expressions": list(EXPRESSION_ORDERS["faces"]),
        "label_source": "parameters of drawn faces; never a result on people",
    }
    return FaceTable.from_arrow(faces.labels_table(dials, seed, count, clean=clean), ".", metadata)


def images(dials: FaceDials, seed: int = 0, count: int = 6000, cache: str | Path | None = None) -> ImageReader:
    """Return the reader of the images.

    Args:
        dials: What is drawn.
        seed: Seed of the set.
        count: Number of faces.
        cache: Folder that keeps drawn images for later epochs and runs; None draws them each time.
    """
    reader = FaceImages(dials, seed)
    if cache is None:
        return reader
    key = hashlib.sha256(json.dumps([asdict(dials), seed, _drawing_code()], default=str).encode()).hexdigest()[:16]
    size = (dials.image_size, dials.image_size)
    return CachedImages(reader, Path(cache) / f"faces-{key}-{count}.rgb", count, size)


def _drawing_code() -> str:
    """Return a hash of the code that draws, so that a cache never outlives a change of it."""
    folder = Path(faces.__file__).parent
    parts = [path.read_bytes() for path in sorted(folder.iterdir()) if path.suffix in (".py", ".npz")]
    return hashlib.sha256(b"".join(parts)).hexdigest()
