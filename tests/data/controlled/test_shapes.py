# SPDX-License-Identifier: Apache-2.0
"""Shapes: areas, places and angles are those of the table; sizes are the classes that they are named."""

from __future__ import annotations

import numpy as np
import pytest

from affect.data.controlled.shapes import SHAPES, drawn, images, shapes
from affect.errors import DataError

SIDE = 32


def one(name: str, scale: float = 1.0, angle: float = 0.0, x: float = 15.5, y: float = 15.5) -> np.ndarray:
    return drawn(np.array([name], dtype=object), np.array([[scale, angle, x, y]]), SIDE)[0]


def test_sizes_are_evenly_spaced_scales():
    table = shapes(train=300, validation=0, test=0)
    size, scale = table.strings("size")[0].astype(int), table.numbers("scale")[0]
    np.testing.assert_allclose(scale, np.linspace(0.3, 1, 6)[size - 1], rtol=1e-6)
    assert set(size) == set(range(1, 7))
    assert set(table.strings("shape")[0]) == set(SHAPES)


@pytest.mark.parametrize("name", SHAPES)
def test_area_goes_with_the_square_of_the_scale(name):
    full = one(name).sum()
    for scale in (0.3, 0.58, 0.86):
        assert one(name, scale).sum() == pytest.approx(scale**2 * full, rel=0.06)


@pytest.mark.parametrize("name", SHAPES)
def test_shapes_are_where_they_are_said_to_be_and_turn(name):
    moved = one(name, 0.5, 0, 12.5, 18.5)
    np.testing.assert_allclose(moved, np.roll(one(name, 0.5), (3, -3), (0, 1)), atol=1e-12)
    for quarter in range(4):
        np.testing.assert_allclose(one(name, 0.5, 90 * quarter), np.rot90(one(name, 0.5), -quarter), atol=1 / 9 + 1e-9)


def test_shapes_differ():
    square, ellipse, heart = (one(name) for name in SHAPES)
    assert abs(square - ellipse).mean() > 0.02
    assert abs(heart - ellipse).mean() > 0.02
    assert heart[: SIDE // 2].sum() > heart[SIDE // 2 :].sum()  # the tip is below
    assert heart[6, 15] < heart[6, 11]  # and the notch above
    assert square.sum() == pytest.approx((2 * 0.85 * 0.3 * SIDE) ** 2, rel=0.05)


def test_every_shape_lies_within_the_image():
    table = shapes(train=400, validation=0, test=0)
    names, numbers = table.strings("shape")[0], np.stack([table.numbers(k)[0] for k in ("scale", "angle", "x", "y")], 1)
    area = drawn(names, numbers, SIDE).sum((1, 2))
    middle = numbers.copy()
    middle[:, 2:] = SIDE / 2 - 0.5
    np.testing.assert_allclose(area, drawn(names, middle, SIDE).sum((1, 2)), rtol=0.2)
    clean = np.stack(images(shapes(train=400, validation=0, test=0, noise=0.0)).read(np.arange(400)))
    assert (clean.reshape(400, -1).min(1) == round(0.15 * 255)).all()
    assert (clean.reshape(400, -1).max(1) == round(0.85 * 255)).all()


def test_noise_has_its_size_and_comes_from_the_seed():
    clean, noisy = (images(shapes(train=50, validation=0, test=0, noise=n)) for n in (0.0, 0.12))
    difference = (noisy.images.astype(float) - clean.images) / (0.7 * 255)
    inner = difference[clean.images < 60]
    assert inner.std() == pytest.approx(0.12, rel=0.1)
    again = images(shapes(train=50, validation=0, test=0, noise=0.12))
    assert np.array_equal(again.images, noisy.images)
    assert not np.array_equal(images(shapes(train=50, validation=0, test=0, seed=1)).images, noisy.images)


def test_numbers_out_of_range():
    with pytest.raises(DataError, match="out of range"):
        shapes(smallest=1.5)
