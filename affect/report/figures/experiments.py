# SPDX-License-Identifier: Apache-2.0
"""The figure of a controlled experiment: every seed a point, every arm a mean with its interval."""

from __future__ import annotations

from collections.abc import Mapping

import numpy as np
from matplotlib.figure import Figure

from affect.report.experiments import Cells, estimate


def experiment_figure(measures: Mapping[str, Cells], title: str = "", level: float = 0.95) -> Figure:
    """Return a panel per measure with a row per arm: a point per seed, the mean, and its interval.

    Args:
        measures: Cells by measure; every measure has the same arms.
        title: Heading.
        level: Level of the intervals.
    """
    arms = list(next(iter(measures.values())))
    widest = max(len(arm) for arm in arms)
    figure = Figure(figsize=(1.2 + 0.075 * widest + 3.4 * len(measures), 1.3 + 0.42 * len(arms)), layout="constrained")
    panels = figure.subplots(1, len(measures), sharey=True, squeeze=False)[0]
    for panel, (name, cells) in zip(panels, measures.items(), strict=True):
        for row, arm in enumerate(arms):
            values = np.array([value for value in cells[arm].values() if value is not None], float)
            values = values[np.isfinite(values)]
            # Seeds lie beside each other in a fixed order, so that equal values do not hide.
            offset = np.linspace(-0.18, 0.18, len(values)) if len(values) > 1 else np.zeros(len(values))
            panel.plot(values, row + offset, "o", color="0.65", markersize=3.5, zorder=1)
            found = estimate(list(cells[arm].values()), level)
            if np.isfinite(found.low):
                panel.plot([found.low, found.high], [row, row], "-", color="tab:blue", linewidth=2, zorder=2)
            if np.isfinite(found.mean):
                panel.plot(found.mean, row, "D", color="tab:blue", markersize=6, zorder=3)
        panel.set_xlabel(name)
        panel.grid(axis="x", alpha=0.3)
        panel.spines[["top", "right"]].set_visible(False)
    panels[0].set_yticks(range(len(arms)), arms)
    panels[0].invert_yaxis()
    if title:
        figure.suptitle(title)
    return figure
