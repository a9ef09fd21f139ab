# SPDX-License-Identifier: Apache-2.0
"""Scatter plots hold exactly the labelled pairs, and their numbers come from the records."""

from __future__ import annotations

import numpy as np
import pytest

from affect.errors import DataError
from affect.report.figures import circumplex, coefficient_scatter
from tests.report.figures.artists import all_text, by_gid, outside
from tests.report.sample_records import record


def cloud(count: int) -> tuple[np.ndarray, np.ndarray]:
    rng = np.random.default_rng(count)
    target = np.clip(rng.normal(size=(count, 2)) * 0.4, -1, 1)
    return np.clip(target * 0.6 + rng.normal(size=(count, 2)) * 0.1, -1, 1), target


@pytest.mark.parametrize("count", [1, 60, 61, 1500])
def test_points_are_the_labelled_ones(count):
    predicted, target = cloud(count + 2)
    mask = np.ones((count + 2, 2), bool)
    mask[0, 1] = False
    predicted[1, 0] = np.nan
    figure = circumplex(predicted, target, mask)
    left, right = by_gid(figure, "points")
    assert np.allclose(left.get_offsets(), target[2:])
    assert np.allclose(right.get_offsets(), predicted[2:])
    joined = by_gid(figure, "joined")
    assert bool(joined) == (count <= 60)
    if joined:
        assert np.allclose(joined[0].get_segments(), np.stack([target[2:], predicted[2:]], 1))
    assert f"n = {count:,}" in all_text(figure)
    assert not outside(figure)


def test_many_points_become_a_density_on_one_scale():
    predicted, target = cloud(5000)
    figure = circumplex(predicted, target)
    left, right = (axes.collections[0] for axes in figure.axes[:2])
    assert left.get_array().sum() == right.get_array().sum() == 5000
    assert left.norm is right.norm
    assert not outside(figure)


def test_named_emotions_stand_in_their_quadrant():
    figure = circumplex(*cloud(3))
    places = {text.get_text(): text.get_position() for text in figure.axes[0].texts}
    assert places["happy"][0] > 0
    assert places["sad"] < (0, 0)
    assert places["angry"][1] > 0 > places["angry"][0]
    assert places["calm"][1] < 0 < places["calm"][0]


def test_numbers_come_from_the_records():
    records = [record("ccc/valence", 0.61), record("ccc/arousal", None), record("ccc/valence", 0.1, subgroup="s=1")]
    assert "valence CCC 0.610" in all_text(circumplex(*cloud(5), records=records))
    assert "0.100" not in all_text(circumplex(*cloud(5), records=records))


def test_circumplex_of_nothing_and_of_unequal_lengths():
    assert "no sample has" in all_text(circumplex(np.zeros((0, 2)), np.zeros((0, 2))))
    assert "no sample has" in all_text(circumplex(np.full((3, 2), np.nan), np.zeros((3, 2))))
    assert "no sample has" in all_text(circumplex(*cloud(3), np.zeros(3, bool)))
    with pytest.raises(DataError, match="3 predictions, 4 targets"):
        circumplex(np.zeros((3, 2)), np.zeros((4, 2)))


def test_coefficients_hold_their_pairs_and_numbers():
    rng = np.random.default_rng(0)
    target, predicted = rng.random((40, 3)), rng.random((40, 3))
    mask = rng.random((40, 3)) < 0.7
    target[0, 0] = np.nan
    records = [record("ccc/bs_b", 0.42), record("pcc/bs_b", -0.1)]
    figure = coefficient_scatter(predicted, target, ["bs_a", "bs_b", "bs_c"], mask, records=records)
    for k, name in enumerate(("bs_a", "bs_b", "bs_c")):
        valid = mask[:, k] & np.isfinite(target[:, k])
        (points,) = by_gid(figure, name)
        assert np.allclose(points.get_offsets(), np.stack([target[valid, k], predicted[valid, k]], 1))
    assert "CCC 0.42 PCC −0.10" in all_text(figure)
    assert not outside(figure)


@pytest.mark.parametrize("count", [1, 3, 4, 52])
def test_any_number_of_coefficients(count):
    rng = np.random.default_rng(0)
    target = rng.random((30, count)) * np.linspace(1, 0.1, count)[::-1]
    names = [f"bs_mouthLowerDownRight{k}" for k in range(count)]
    figure = coefficient_scatter(target * 0.5, target, names)
    visible = [axes for axes in figure.axes if axes.get_visible()]
    assert len(visible) == min(count, 25)
    assert not outside(figure)
    if count > 25:
        # Those that vary most, in the order of the task.
        kept = sorted(np.argsort(-target.std(0))[:25])
        assert [axes.collections[0].get_gid() for axes in visible] == [names[k] for k in kept]
        assert f"25 of {count}" in all_text(figure)


def test_unlabelled_constant_and_empty_coefficients():
    target = np.ones((5, 2)) * [0.5, np.nan]
    figure = coefficient_scatter(target, target, ["a", "b"])
    assert len([axes for axes in figure.axes if axes.get_visible()]) == 1
    coefficient_scatter(np.zeros((1, 1)), np.zeros((1, 1)), ["a"])
    assert "no labelled coefficient" in all_text(coefficient_scatter(np.zeros((0, 2)), np.zeros((0, 2)), ["a", "b"]))
    assert "no labelled coefficient" in all_text(coefficient_scatter(np.zeros((0, 0)), np.zeros((0, 0)), []))
    with pytest.raises(DataError, match="and 1 names"):
        coefficient_scatter(np.zeros((3, 2)), np.zeros((3, 2)), ["a"])
