# SPDX-License-Identifier: Apache-2.0
"""Planted shortcuts: what gives the class away does so in training alone, and points lie on the glyph."""

from __future__ import annotations

import numpy as np
import pytest

from affect.data.controlled.shortcut import GLYPHS, SIDE, TEXTURES, images, patterns, planted_shortcut
from affect.errors import ConfigError


def codes(table, column, names):
    return np.array([names.index(name) for name in table.strings(column)[0]])


def test_the_texture_says_the_class_in_training_and_nothing_in_the_test():
    table = planted_shortcut(train=600, validation=100, test=3000)
    same = codes(table, "glyph", GLYPHS) == codes(table, "texture", TEXTURES)
    part = table.strings("part")[0]
    assert same[part != "test"].all()
    assert same[part == "test"].mean() == pytest.approx(1 / 3, abs=0.03)
    loose = planted_shortcut(train=3000, validation=0, test=0, agreement=0.4)
    share = (codes(loose, "glyph", GLYPHS) == codes(loose, "texture", TEXTURES)).mean()
    assert share == pytest.approx(0.4 + 0.6 / 3, abs=0.03)


def test_glyph_and_texture_never_touch_and_lie_within_the_image():
    table = planted_shortcut(train=2000, validation=0, test=0)
    own, other = (
        np.stack([table.numbers(f"{prefix}{axis}")[0] for axis in "xy"], 1).astype(int) for prefix in ("", "texture_")
    )
    for corner in (own, other):
        assert corner.min() == 0
        assert corner.max() == 24 - SIDE
    assert (abs(own - other).max(1) > SIDE).all()


def test_pixels_are_where_the_table_says():
    table = planted_shortcut(train=40, validation=0, test=0, noise=0.0)
    drawn = images(table).read(np.arange(40))
    ground, bright = round(0.35 * 255), round((0.35 + 0.4 * 0.6) * 255)
    for row, image in enumerate(drawn):
        assert image.shape == (24, 24, 3)
        expected = np.full((24, 24), ground)
        for column, names, pattern, prefix in zip(
            ("glyph", "texture"), (GLYPHS, TEXTURES), patterns(), ("", "texture_"), strict=True
        ):
            x, y = (int(table.numbers(f"{prefix}{axis}")[0][row]) for axis in "xy")
            covered = pattern[names.index(table.strings(column)[0][row])]
            expected[y : y + SIDE, x : x + SIDE][covered] = bright
        assert np.array_equal(image[..., 0], expected)


def test_points_are_the_glyphs_corners_and_its_centre():
    table = planted_shortcut(train=20, validation=0, test=0)
    points = np.stack(table.column("landmarks_5").to_pylist()).reshape(20, 5, 2)
    corner = np.stack([table.numbers(axis)[0] for axis in "xy"], 1)
    np.testing.assert_array_equal(points[:, 0], corner)
    np.testing.assert_array_equal(points[:, 2], corner + 3)
    np.testing.assert_array_equal(points[:, 4], corner + 6)
    np.testing.assert_array_equal(points[:, 1], corner + np.array([6, 0]))


def test_draws_are_a_function_of_the_seed():
    a, b, c = (planted_shortcut(train=30, validation=0, test=0, seed=seed) for seed in (1, 1, 2))
    assert a.fingerprint == b.fingerprint != c.fingerprint
    rows = np.arange(30)
    assert np.array_equal(images(a).read(rows), images(b).read(rows))
    assert not np.array_equal(images(a).read(rows), images(c).read(rows))


def test_settings_that_do_not_fit_are_refused():
    with pytest.raises(ConfigError, match="at least 21 px"):
        planted_shortcut(image_size=20)
    with pytest.raises(ConfigError, match=r"agreement=1\.5"):
        planted_shortcut(agreement=1.5)
