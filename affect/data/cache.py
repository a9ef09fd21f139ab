# SPDX-License-Identifier: Apache-2.0
"""Images that are costly to make, kept in one memory-mapped file that all workers and later runs share."""

from __future__ import annotations

import fcntl
import os
from pathlib import Path

import numpy as np

from affect.data.images import ImageReader


class CachedImages:
    """A reader that asks another one once per row and keeps the pixels.

    The file is sparse: rows take disk space when they are first read. Pixels are written before the row is marked, so a
    process that dies in between costs one image; two workers that make the same row write the same bytes.

    Args:
        reader: Makes the images; a pure function of the row.
        path: File of the pixels; ``<path>.done`` marks the rows. Its name must say what the pixels depend on.
        count: Number of rows.
        size: Height and width of every image.
    """

    def __init__(self, reader: ImageReader, path: str | Path, count: int, size: tuple[int, int]) -> None:
        self.reader, self.path, self.count, self.size = reader, Path(path), count, size
        self._pixels: np.ndarray | None = None
        self._done: np.ndarray | None = None

    def _open(self) -> tuple[np.ndarray, np.ndarray]:
        if self._pixels is None or self._done is None:
            self.path.parent.mkdir(parents=True, exist_ok=True)
            shape = (self.count, *self.size, 3)
            self._pixels = _shared(self.path, shape)
            self._done = _shared(self.path.with_name(self.path.name + ".done"), (self.count,))
        return self._pixels, self._done

    def read(self, rows: np.ndarray) -> list[np.ndarray]:
        """Return the images of ``rows`` ``(N,)``, each RGB uint8 ``(H, W, 3)``."""
        pixels, done = self._open()
        rows = np.asarray(rows, np.int64).reshape(-1)
        absent = np.unique(rows[done[rows] == 0])
        if len(absent):
            for row, image in zip(absent, self.reader.read(absent), strict=True):
                pixels[row] = image
                done[row] = 1
        return [np.array(pixels[row]) for row in rows]

    def __getstate__(self) -> dict:
        """Return the state without the open file: every worker maps it itself."""
        return {**self.__dict__, "_pixels": None, "_done": None}


def _shared(path: Path, shape: tuple[int, ...]) -> np.ndarray:
    """Return a writable map of ``path``, made with zeros if it is not there or has another size.

    One process at a time looks and makes: otherwise a second one could empty the file that the first has written to.
    """
    size = int(np.prod(shape, dtype=np.int64))
    handle = os.open(path, os.O_RDWR | os.O_CREAT, 0o666)
    try:
        fcntl.flock(handle, fcntl.LOCK_EX)  # Released when the handle is closed.
        if os.fstat(handle).st_size != size:
            os.ftruncate(handle, 0)
            os.ftruncate(handle, size)
    finally:
        os.close(handle)
    return np.memmap(path, np.uint8, "r+", shape=shape)
