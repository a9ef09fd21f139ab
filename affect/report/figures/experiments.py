# SPDX-License-Identifier: Apache-2.0
"""Figures of a controlled experiment: arms with their seeds, and what one measure costs in another."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence

import numpy as np
from matplotlib import colormaps
from matplotlib.figure import Figure
from matplotlib.ticker import FuncFormatter, LogLocator, NullFormatter

from affect.report.experiments import Cells, estimate

PANELS = 4
"""Panels beside each other in a figure; more take further lines."""


def experiment_figure(measures: Mapping[str, Cells], title: str = "", level: float = 0.95) -> Figure:
    """Return a panel per measure with a row per arm: a point per seed, the mean, and its interval.

    Args:
        measures: Cells by measure; every measure has the same arms.
        title: Heading.
        level: Level of the intervals.
    """
    arms = list(next(iter(measures.values())))
    widest = max(len(arm) for arm in arms)
    lines = math.ceil(len(measures) / PANELS)
    columns = math.ceil(len(measures) / lines)
    size = (1.2 + 0.075 * widest + 3.4 * columns, 0.3 + (1.0 + 0.42 * len(arms)) * lines)
    figure = Figure(figsize=size, layout="constrained")
    grid = figure.subplots(lines, columns, sharey=True, squeeze=False)
    panels = list(grid.flat)
    for empty in panels[len(measures) :]:
        empty.remove()
    for panel, (name, cells) in zip(panels[: len(measures)], measures.items(), strict=True):
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


def tradeoff_figure(
    measures: Mapping[str, Cells], against: str, of: Sequence[str], title: str = "", level: float = 0.95
) -> Figure:
    """Return a panel per measure over another one on a logarithmic axis, e.g. scores over bytes: a mean for each arm.

    Arms whose names begin alike, up to the last underscore, are a line with one colour: a method at several sizes. An
    arm without an underscore (what all are compared with) is also drawn as a horizontal line.

    Args:
        measures: Cells by measure; every measure has the same arms.
        against: Measure of the horizontal axis, positive.
        of: Measures of the vertical axes.
        title: Heading.
        level: Level of the intervals.
    """
    families: dict[str, list[str]] = {}
    for arm in measures[against]:
        families.setdefault(arm.rpartition("_")[0] or arm, []).append(arm)
    figure = Figure(figsize=(1.8 + 4.2 * len(of), 3.4 + 0.11 * len(families)), layout="constrained")
    panels = figure.subplots(1, len(of), squeeze=False)[0]
    colours = colormaps["tab20"](np.linspace(0, 1, 20))
    markers = "osD^v<>Phd*X"
    for panel, name in zip(panels, of, strict=True):
        for index, (family, arms) in enumerate(families.items()):
            sizes = [estimate(list(measures[against][arm].values()), level).mean for arm in arms]
            found = [estimate(list(measures[name][arm].values()), level) for arm in arms]
            order = [k for k in np.argsort(sizes) if np.isfinite(sizes[k]) and np.isfinite(found[k].mean)]
            style = {"color": colours[index % 20], "marker": markers[index % len(markers)], "markersize": 5.0}
            means = [found[k].mean for k in order]
            panel.plot([sizes[k] for k in order], means, linewidth=1, alpha=0.85, label=family, **style)
            for k in order:
                if np.isfinite(found[k].low):
                    panel.plot([sizes[k]] * 2, [found[k].low, found[k].high], color=style["color"], linewidth=0.8)
            if arms == [family] and means:
                panel.axhline(means[0], color="0.6", linewidth=0.8, linestyle=":", zorder=0)
        panel.set_xscale("log")
        # Plain numbers at 1, 2 and 5: those of the default, 4 × 10², run into each other.
        panel.xaxis.set_major_locator(LogLocator(subs=(1.0, 2.0, 5.0)))
        panel.xaxis.set_major_formatter(FuncFormatter(lambda size, _: f"{size:g}"))
        panel.xaxis.set_minor_formatter(NullFormatter())
        panel.set_xlabel(against)
        panel.set_ylabel(name)
        panel.grid(alpha=0.3)
        panel.spines[["top", "right"]].set_visible(False)
    handles, labels = panels[0].get_legend_handles_labels()
    figure.legend(handles, labels, loc="outside right center", fontsize="small", frameon=False)
    if title:
        figure.suptitle(title)
    return figure
