# SPDX-License-Identifier: Apache-2.0
"""Panels of a controlled experiment: all measures and arms are there, and many take lines that a page can hold."""

from __future__ import annotations

import pytest

from affect.report.figures.experiments import PANELS, experiment_figure
from tests.report.figures.artists import overlaps, texts

ARMS = ("plain", "with_a_rather_long_name", "shuffled")


@pytest.mark.parametrize(("count", "lines"), [(1, 1), (PANELS, 1), (PANELS + 1, 2), (9, 3)])
def test_every_measure_has_a_panel_and_none_is_empty(count: int, lines: int) -> None:
    cells = {
        f"measure {m}": {arm: {seed: m + row + 0.1 * seed for seed in range(3)} for row, arm in enumerate(ARMS)}
        for m in range(count)
    }
    figure = experiment_figure(cells, "an experiment")
    assert [panel.get_xlabel() for panel in figure.axes] == list(cells)
    assert len({round(panel.get_position().y0, 3) for panel in figure.axes}) == lines
    assert figure.get_figwidth() < 20
    for m, panel in enumerate(figure.axes):
        means = [line.get_xdata()[0] for line in panel.lines if line.get_marker() == "D"]
        assert means == pytest.approx([m + row + 0.1 for row in range(len(ARMS))])
    shown = texts(figure)
    assert shown.count(ARMS[1]) == lines  # names stand at the first panel of each line
    assert "an experiment" in shown
    assert not overlaps(figure)
