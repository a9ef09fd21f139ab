# SPDX-License-Identifier: Apache-2.0
"""Planted patterns lie where their labels say, and what is there says nothing; missed positives are missed."""

from __future__ import annotations

import numpy as np
import pytest
import torch

from affect.data.controlled.noisy_labels import images as vector_images
from affect.data.controlled.noisy_labels import missed_positives
from affect.data.controlled.planted import images, planted_patterns, regions
from affect.encoders import PixelGrid, PixelVector
from affect.errors import ConfigError
from affect.models.au_transformer.reading import FACE_68, REGIONS, lift_on_landmarks, mass_on_own_block


def test_regions_tile_the_grid():
    found = regions(4, 8)
    assert (found.sum(0) == 1).all()
    assert found[0, :4, :4].all()
    assert found[3, 4:, 4:].all()
    assert (regions(5, 9).sum((1, 2)) == 9).all()
    with pytest.raises(ConfigError, match="do not fit"):
        regions(5, 2)


def test_labels_say_whether_the_pattern_lies_in_its_region_and_nothing_else_does():
    table = planted_patterns(tasks=4, cells=6, train=400, validation=0, test=0)
    inside = regions(4, 6).reshape(4, -1)
    place = np.stack([table.numbers(f"cell_{t}")[0].astype(int) for t in range(4)], 1)
    label = np.stack([table.numbers(f"attribute_inside_{t}")[0] for t in range(4)], 1)
    np.testing.assert_array_equal(inside[np.arange(4), place], label == 1)
    assert all(len(set(row)) == 4 for row in place.tolist())
    assert (abs(label.mean(0) - 0.5) < 0.1).all()


def test_patterns_are_found_in_their_cells_through_pixels():
    table = planted_patterns(tasks=3, cells=5, train=60, validation=0, test=0, seed=1)
    pictures = np.stack(images(table, cells=5, noise=10.0).read(np.arange(60)))
    grid = PixelGrid(10)(torch.from_numpy(pictures).permute(0, 3, 1, 2)).flatten(2)
    assert grid.shape == (60, 12, 25)
    for task in range(3):
        place = torch.from_numpy(table.numbers(f"cell_{task}")[0].astype(int))
        pattern = grid[torch.arange(60), :, place].mean(0)
        score = torch.einsum("c,bcn->bn", pattern, grid)
        assert (score.argmax(1) == place).all()
    with pytest.raises(ConfigError, match="no multiple"):
        PixelGrid(9, 2)


def test_a_share_of_the_positives_is_missed_but_in_the_test_part():
    table = missed_positives(train=20_000, validation=1, test=20_000, seed=2)
    label, parts = table.numbers("attribute_rare")[0], table.strings("part")[0]
    assert abs(label[parts == "test"].mean() - 0.125) < 0.01
    assert abs(label[parts == "train"].mean() - 0.7 * 0.125) < 0.01
    clean = missed_positives(missed=0.0, train=20_000, validation=1, test=20_000, seed=2)
    assert (clean.numbers("attribute_rare")[0] >= label).all()
    stored = np.stack(vector_images(table).read(np.arange(50)))
    found = PixelVector(10, 3, -6, 6)(torch.from_numpy(stored).permute(0, 3, 1, 2)).numpy()
    wanted = np.stack([table.numbers(f"x{k}")[0][:50] for k in range(10)], 1)
    np.testing.assert_allclose(found, wanted, atol=12 / 65_535)


def test_attention_on_the_own_block_is_counted():
    own = regions(4, 8) / 16
    findings = {"attention": {"attributes": {f"inside_{t}": own[t].tolist() for t in range(4)}}}
    assert mass_on_own_block({"findings": findings}) == pytest.approx(1)
    even = {"attention": {"attributes": {f"inside_{t}": np.full((8, 8), 1 / 64).tolist() for t in range(4)}}}
    assert mass_on_own_block({"findings": even}) == pytest.approx(0.25)
    assert mass_on_own_block({"findings": {}}) is None


def test_attention_on_landmarks_is_compared_with_even_attention():
    recipe = {"recipe": {"kind": "similarity", "margin": 0.2}}
    even = {"attention": {"au": {"AU1": np.full((6, 6), 1 / 36).tolist(), "AU12": np.full((6, 6), 1 / 36).tolist()}}}
    assert lift_on_landmarks({"findings": even, "preprocess": recipe}) == pytest.approx(1)
    corner = np.zeros((12, 12))
    x, y = (FACE_68[48] + 0.2) / 1.4 * 12
    corner[int(y), int(x)] = 1
    lifted = {"attention": {"au": {"AU12": corner.tolist()}}}
    assert lift_on_landmarks({"findings": lifted, "preprocess": recipe}) > 10
    assert lift_on_landmarks({"findings": lifted, "preprocess": {"recipe": {"kind": "box"}}}) is None
    assert lift_on_landmarks({"findings": lifted, "preprocess": recipe}, others=True) is None
    # Both tokens look at a corner of the mouth: AU12 at its own, AU1 at the other's. AU15 shares AU12's landmarks.
    both = {"attention": {"au": dict.fromkeys(("AU1", "AU12", "AU15"), corner.tolist())}}
    own = lift_on_landmarks({"findings": both, "preprocess": recipe})
    others = lift_on_landmarks({"findings": both, "preprocess": recipe}, others=True)
    mouth = lift_on_landmarks({"findings": lifted, "preprocess": recipe})
    assert own == pytest.approx(2 / 3 * mouth)  # AU1 looks at no landmark of its own
    assert others == pytest.approx(1 / 2 * mouth)  # AU1 at AU12's and AU15's, these not at AU1's
    assert all(0 <= point < 68 for points in REGIONS.values() for point in points)
