# SPDX-License-Identifier: Apache-2.0
"""Cached images are made once, and no process empties the file that another one has begun to fill."""

from __future__ import annotations

import fcntl
import threading
from pathlib import Path

import numpy as np

from affect.data.cache import CachedImages
from tests.data import samples


def cached(path: Path) -> CachedImages:
    return CachedImages(samples.DrawnImages(16), path, 4, (16, 16))


def test_images_are_made_once(tmp_path: Path) -> None:
    first = cached(tmp_path / "pixels")
    expected = first.read(np.array([2, 0]))
    again = cached(tmp_path / "pixels")
    np.testing.assert_array_equal(again.read(np.array([2, 0])), expected)
    assert again.reader.reads == 0


def test_the_file_is_sized_by_one_process_at_a_time(tmp_path: Path) -> None:
    path = tmp_path / "pixels"
    path.write_bytes(b"")
    other = threading.Thread(target=lambda: cached(path).read(np.array([1])))
    with path.open("r+b") as held:
        fcntl.flock(held, fcntl.LOCK_EX)
        other.start()
        other.join(0.3)
        assert other.is_alive(), "it waits while another one sizes the file"
        assert path.stat().st_size == 0
    other.join(10)
    assert not other.is_alive()
    assert path.stat().st_size == 4 * 16 * 16 * 3
