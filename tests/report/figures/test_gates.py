# SPDX-License-Identifier: Apache-2.0
"""Cells are the mean weights of the gate, and any number of leaves and classes is readable."""

from __future__ import annotations

import numpy as np
import pytest

from affect.errors import DataError
from affect.report.figures import gate_usage
from tests.report.figures.artists import all_text, by_gid, outside, overlaps


def test_cells_are_mean_weights_in_the_order_of_the_tree():
    usage = [[0.1, 0.2, 0.3, 0.4], [0.97, 0.01, 0.02, 0.0]]
    figure = gate_usage(usage, ["left", "right"], [1200, 3], by="true class", information=0.456)
    (drawn,) = by_gid(figure, "usage")
    np.testing.assert_allclose(drawn.get_array(), usage)
    assert [by_gid(figure, f"1,{k}")[0].get_text() for k in range(4)] == ["97", "1", "2", "0"]
    assert [tick.get_text() for tick in figure.axes[0].get_yticklabels()] == ["left  (1,200)", "right  (3)"]
    assert "by true class" in all_text(figure)
    assert "share 0.46 nats" in all_text(figure)


@pytest.mark.parametrize(("classes", "leaves"), [(1, 1), (2, 8), (8, 8), (12, 32), (40, 32), (3, 64)])
def test_any_number_is_readable(classes, leaves):
    names = [f"$identity_{k} of a long name" for k in range(classes)]
    figure = gate_usage(np.full((classes, leaves), 1 / leaves), names, [10**k for k in range(classes)][:1] * classes)
    assert not overlaps(figure)
    assert not outside(figure)


def test_no_class_says_so():
    assert "no class is known" in all_text(gate_usage(np.zeros((0, 4)), [], []))


@pytest.mark.parametrize(
    ("usage", "rows"), [([[0.5, 0.6]], [1]), ([[np.nan, 1.0]], [1]), ([[0.5, 0.5]], [1, 2]), ([0.5, 0.5], [1])]
)
def test_what_is_no_use_of_a_gate_is_refused(usage, rows):
    with pytest.raises(DataError, match="use of a gate"):
        gate_usage(usage, ["a"], rows)
