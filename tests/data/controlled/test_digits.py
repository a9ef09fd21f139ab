# SPDX-License-Identifier: Apache-2.0
"""Rotated digits: each drawing in one part, angles that turn the pixels, the same table for the same seed."""

from __future__ import annotations

import sys

import numpy as np
import pytest

from affect.data.controlled.digits import SIDE, images, rotated_digits, turned
from affect.errors import ConfigError, DataError

sklearn = pytest.importorskip("sklearn.datasets")


def test_parts_hold_whole_drawings_with_their_digits():
    table = rotated_digits()
    parts, drawing = table.strings("part")[0], table.numbers("drawing")[0].astype(int)
    assert {p: int((parts == p).sum()) for p in ("train", "validation", "test")} == {
        "train": 1800, "validation": 800, "test": 1594,
    }  # fmt: skip
    of = {part: set(drawing[parts == part]) for part in np.unique(parts)}
    assert [len(of[p]) for p in ("train", "validation", "test")] == [600, 400, 797]
    assert not of["train"] & of["test"]
    assert not of["train"] & of["validation"]
    assert table.strings("digit")[0].tolist() == [str(k) for k in sklearn.load_digits().target[drawing]]
    angles = table.numbers("rotation")[0]
    assert 0 <= angles.min() < 5
    assert 355 < angles.max() < 360
    assert len(set(table.strings("image")[0])) == len(table)


def test_a_seed_decides():
    small = {"train": 5, "validation": 2, "test": 3}
    one, same, other = (rotated_digits(**small, seed=s) for s in (1, 1, 2))
    assert one.fingerprint == same.fingerprint != other.fingerprint
    assert len(one) == 5 * 3 + 5 * 2


def test_pixels_are_turned_counter_clockwise_about_the_middle():
    drawing = np.zeros((8, 8))
    drawing[3:5, 6:8] = 16  # on the right
    upright = turned(drawing, 0)
    assert upright.shape == (SIDE, SIDE)
    for quarter in range(4):
        found = turned(drawing, 90.0 * quarter).astype(int)
        assert abs(found - np.rot90(upright, quarter)).max() <= 1
    assert turned(drawing, 0)[5:7, 9:11].mean() > 200
    assert turned(drawing, 90)[1:3, 5:7].mean() > 200
    assert turned(np.full((8, 8), 16), 0).max() == 255


def test_images_are_those_of_the_rows():
    table = rotated_digits(train=4, validation=1, test=1)
    reader = images(table)
    found = reader.read(np.array([5, 0]))
    assert [image.shape for image in found] == [(SIDE, SIDE, 3)] * 2
    drawing, angle = int(table.numbers("drawing")[0][5]), float(table.numbers("rotation")[0][5])
    assert np.array_equal(found[0][..., 1], turned(sklearn.load_digits().images[drawing], angle))
    assert np.array_equal(images(table.take(np.array([5]))).read(np.array([0]))[0], found[0])


def test_errors(monkeypatch):
    with pytest.raises(DataError, match="there are 1797"):
        rotated_digits(train=1700)
    monkeypatch.setitem(sys.modules, "sklearn.datasets", None)
    with pytest.raises(ConfigError, match="pip install scikit-learn"):
        rotated_digits()
