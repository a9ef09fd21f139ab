# SPDX-License-Identifier: Apache-2.0
"""Curves are drawn with the numbers they were given, gaps stay gaps, and single points are seen."""

from __future__ import annotations

import math

import numpy as np
import pytest

from affect.errors import DataError
from affect.report.figures import cumulative_error_curve, reliability_diagram, training_curves
from affect.report.records import number_text
from tests.report.figures.artists import all_text, by_gid, outside, overlaps


def history(epochs: int) -> dict[str, list[tuple[int, float]]]:
    rng = np.random.default_rng(0)
    names = ["train/loss", "validation/loss", "validation/au/f1/mean", "validation/expression/accuracy"]
    names += [f"validation/au/f1/AU{k}" for k in range(1, 13)]
    return {name: [(k + 1, float(v)) for k, v in enumerate(rng.random(epochs))] for name in names}


@pytest.mark.parametrize("epochs", [1, 2, 30, 200])
def test_curves_hold_their_values(epochs):
    given = history(epochs)
    figure = training_curves(given, best=epochs, monitor="validation/au/f1/mean")
    for name, gid in {
        "train/loss": "train/loss",
        "validation/loss": "validation/loss",
        "validation/au/f1/mean": "validation/au/f1/mean",
        "validation/au/f1/AU7": "validation/au/f1/AU7",
    }.items():
        (line,) = by_gid(figure, gid)
        assert line.get_xydata().tolist() == [list(pair) for pair in given[name]]
    # One panel per quantity: loss (both parts together), F1 with its outputs, accuracy.
    assert sum(axes.get_visible() for axes in figure.axes) == 3
    assert figure.axes[0].get_title("left") == "loss"
    assert not outside(figure)
    assert not overlaps(figure)


def test_best_step_is_marked_in_every_panel_and_its_value_written():
    given = history(30)
    figure = training_curves(given, best=17, monitor="validation/au/f1/mean")
    assert [line.get_xdata()[0] for line in by_gid(figure, "best")] == [17, 17, 17]
    (point,) = by_gid(figure, "best value")
    assert point.get_xydata().tolist() == [list(given["validation/au/f1/mean"][16])]
    text = all_text(figure)
    assert "kept: epoch 17" in text
    assert number_text(given["validation/au/f1/mean"][16][1]) in text


def test_gaps_stay_gaps_and_lonely_points_get_a_marker():
    given = {"train/loss": [(1, 1.0), (2, math.nan), (3, 0.5)], "validation/loss": [(1, 1.0), (2, 0.9), (3, math.inf)]}
    figure = training_curves(given)
    (train,), (validation,) = by_gid(figure, "train/loss"), by_gid(figure, "validation/loss")
    assert np.isnan(train.get_ydata()[1])
    assert train.get_marker() == "o"
    assert validation.get_marker() in {"", "None", None}
    assert np.isnan(validation.get_ydata()[2])


def test_unsorted_steps_are_drawn_in_order():
    (line,) = by_gid(training_curves({"train/loss": [(3, 0.1), (1, 0.9), (2, 0.5)]}), "train/loss")
    assert line.get_xdata().tolist() == [1, 2, 3]


def test_outputs_without_a_mean_have_panels_of_their_own():
    figure = training_curves({"validation/rmse/valence": [(1, 0.5)], "validation/rmse/arousal": [(1, 0.4)]})
    assert sum(axes.get_visible() for axes in figure.axes) == 2


@pytest.mark.parametrize("given", [{}, {"train/loss": []}])
def test_nothing_to_draw_is_said(given):
    assert "no epoch has ended yet" in all_text(training_curves(given))


def test_only_nan_is_said():
    assert "no finite value" in all_text(training_curves({"train/loss": [(1, math.nan)]}, best=1, monitor="train/loss"))


def test_too_many_panels_are_counted():
    figure = training_curves({f"train/{k}/loss": [(1, 1.0), (2, 0.5)] for k in range(25)})
    assert sum(axes.get_visible() for axes in figure.axes) == 18
    assert "7 more panels" in all_text(figure)


def test_bad_curves_are_refused():
    with pytest.raises(DataError, match=r"monitor 'x' is not among"):
        training_curves({"train/loss": [(1, 1.0)]}, monitor="x")
    with pytest.raises(DataError, match=r"train/loss is not a list of \(step, value\) pairs"):
        training_curves({"train/loss": [1.0, 2.0]})


def test_reliability_against_the_written_out_definition():
    rng = np.random.default_rng(0)
    p = rng.random((400, 5))
    t = (rng.random(p.shape) < p**2).astype(float)
    mask = rng.random(p.shape) < 0.8
    p[0, 0], t[1, 1], p[2, 2], mask[:3, :3] = np.nan, np.nan, 1.0, True
    cells = [(a, b) for a, b, m in zip(p.ravel(), t.ravel(), mask.ravel(), strict=True) if m and a == a and b == b]
    means, error = [], 0.0
    for k in range(10):
        inside = [(a, b) for a, b in cells if k / 10 <= a < (k + 1) / 10 or (k == 9 and a == 1)]
        means.append([np.mean([a for a, _ in inside]), np.mean([b for _, b in inside])])
        error += abs(means[-1][0] - means[-1][1]) * len(inside) / len(cells)
    figure = reliability_diagram(p, t, mask)
    (line,) = by_gid(figure, "reliability")
    assert np.allclose(line.get_xydata(), means)
    assert f"Expected calibration error {number_text(error)}, n = {len(cells):,}." in all_text(figure)


def test_perfect_calibration_has_no_error():
    p = np.repeat([0.25, 0.75], 4)
    t = np.array([1, 0, 0, 0, 1, 1, 1, 0])
    assert "error 0.000" in all_text(reliability_diagram(p, t))


def test_reliability_of_little_or_nothing():
    assert "no labelled predictions" in all_text(reliability_diagram(np.zeros((0, 3)), np.zeros((0, 3))))
    assert "no labelled" in all_text(reliability_diagram(np.full(3, np.nan), np.ones(3)))
    assert "n = 1." in all_text(reliability_diagram(np.array([1.0]), np.array([1.0])))
    with pytest.raises(DataError, match=r"expected \[0, 1\]"):
        reliability_diagram(np.array([1.5]), np.array([1.0]))
    with pytest.raises(DataError, match="differ in shape"):
        reliability_diagram(np.zeros(3), np.zeros(4))


def test_cumulative_curve_rises_at_every_error():
    errors = np.array([4.0, 2.0, 12.0, np.nan, 8.0])
    figure = cumulative_error_curve({"ours": errors})
    (line,) = by_gid(figure, "ours")
    assert line.get_xydata().tolist() == [[0, 0], [2, 25], [4, 50], [8, 75], [10, 75]]
    assert line.get_drawstyle() == "steps-post"
    assert "ours: 75.0 % within 10 % (1 skipped)" in all_text(figure)


def test_cumulative_curve_of_nothing():
    assert "no image has a landmark error" in all_text(cumulative_error_curve({}))
    assert "no image has a landmark error" in all_text(cumulative_error_curve({"a": np.array([np.nan])}))
    with pytest.raises(DataError, match="positive"):
        cumulative_error_curve({"a": np.ones(2)}, threshold=0)
