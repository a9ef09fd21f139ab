# SPDX-License-Identifier: Apache-2.0
"""Matrices hold the numbers of the soft order, attention lies where it is, curves are those of the history."""

from __future__ import annotations

import numpy as np
import pytest

from affect.errors import DataError
from affect.report.figures import attention_sheet, soft_order_matrix, weight_curves
from affect.report.figures.findings import overlay
from tests.report.figures.artists import all_text, by_gid, outside, overlaps


def test_cells_are_the_shares_of_steps_and_columns_follow_the_mean_step():
    matrix = np.array([[0.0, 0.25, 0.75], [0.1, 0.65, 0.25], [0.9, 0.1, 0.0]])
    figure = soft_order_matrix(matrix, ["late", "middle", "early"])
    axes = figure.axes[0]
    assert [tick.get_text() for tick in axes.get_xticklabels()] == ["early", "middle", "late"]
    shown = [[by_gid(figure, f"{k},{t}")[0].get_text() for t in range(3)] for k in range(3)]
    assert shown == [["75", "25", "0"], ["25", "65", "10"], ["0", "10", "90"]]
    (drawn,) = by_gid(figure, "soft order")
    np.testing.assert_allclose(drawn.get_array(), matrix[:, ::-1])
    assert "early 1.2" in all_text(figure)


@pytest.mark.parametrize("count", [1, 4, 12, 18])
def test_any_number_of_tasks_is_readable(count):
    names = [f"AU{k + 1}" for k in range(count)]
    figure = soft_order_matrix(np.full((count, count), 1 / count), names)
    assert not overlaps(figure)
    assert not outside(figure)


@pytest.mark.parametrize("matrix", [np.eye(3), np.ones((2, 2)), np.array([[np.nan, 1], [1, 0]])])
def test_what_is_no_soft_order_is_refused(matrix):
    with pytest.raises(DataError, match="soft order"):
        soft_order_matrix(matrix, ["a", "b"])


def test_attention_lies_where_it_is():
    image, weights = np.full((40, 40, 3), 100, np.uint8), np.zeros((4, 4))
    weights[0, 3] = 1.0
    drawn = overlay(image, weights).astype(int)
    changed = np.abs(drawn - 100).sum(-1)
    assert changed[:10, 30:].mean() > 50
    assert changed[20:, :20].max() == 0


def test_a_sheet_has_the_mean_and_the_first_faces_of_each_token():
    images = np.zeros((5, 32, 32, 3), np.uint8)
    maps = np.full((5, 8, 2, 2), 0.25)
    figure = attention_sheet(images, maps, [f"AU{k}" for k in range(8)])
    assert all(by_gid(figure, f"token {token}, row {row}") for token in range(8) for row in range(4))
    assert all_text(figure).count("peak 0.25") == 8
    assert not outside(figure)


def test_maps_that_do_not_fit_are_refused():
    with pytest.raises(DataError, match=r"expected \(B, K, h, w\)"):
        attention_sheet(np.zeros((2, 8, 8, 3), np.uint8), np.ones((2, 3, 2, 2)), ["a", "b"])


def test_curves_are_those_of_the_history():
    curves = {"au/AU1": [(1, 1.0), (2, 0.5)], "au/AU2": [(1, 0.9), (2, 0.8)], "expression/expression": [(1, 1.0)]}
    figure = weight_curves(curves, best=2)
    (line,) = by_gid(figure, "au/AU1")
    assert list(line.get_ydata()) == [1.0, 0.5]
    assert "AU1 0.50" in all_text(figure)
    assert len([axes for axes in figure.axes if axes.get_visible()]) == 2
    assert not outside(figure)
    assert "no epoch has ended yet" in all_text(weight_curves({}))
