# SPDX-License-Identifier: Apache-2.0
"""Figures of a sweep: settings by class, and differences with their intervals."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
from matplotlib.figure import Figure

from affect.report.collect import Comparison, ScoreTable


def class_figure(table: ScoreTable) -> Figure:
    """Return a group of bars per class with a bar per setting: mean over seeds with its standard deviation.

    References are dashes, because their spread is not known.
    """
    rows = [row for row in table.rows if row.seeds is not None]
    columns = list(table.columns)
    width = 0.8 / max(1, len(rows))
    figure = Figure(figsize=(max(4.0, 1.2 + 0.16 * len(columns) * (len(rows) + 1.5)), 3.4), layout="constrained")
    panel = figure.subplots()
    place = np.arange(len(columns))
    for index, row in enumerate(rows):
        cells = [row.cells.get(column) for column in columns]
        means = np.array([np.nan if cell is None else cell.mean for cell in cells])
        deviations = np.array([np.nan if cell is None else cell.std for cell in cells])
        x = place + (index - (len(rows) - 1) / 2) * width
        panel.bar(x, means, width, label=f"{row.name} (n = {row.seeds})")
        known = np.isfinite(deviations)
        panel.errorbar(x[known], means[known], deviations[known], fmt="none", color="0.2", linewidth=1, capsize=2)
    for row in table.rows:
        if row.seeds is None:
            known_columns = [k for k, column in enumerate(columns) if column in row.cells]
            values = [row.cells[columns[k]].mean for k in known_columns]
            panel.plot(known_columns, values, "_", color="black", markersize=14, label=row.name)
    panel.set_xticks(place, columns, rotation=45 if len(columns) > 6 else 0)
    panel.set_ylabel(table.quantity)
    panel.set_title(table.title)
    panel.spines[["top", "right"]].set_visible(False)
    panel.legend(fontsize="small", loc="upper left", bbox_to_anchor=(1.0, 1.0), frameon=False)
    return figure


def difference_figure(comparisons: Sequence[Comparison], level: float = 0.95) -> Figure:
    """Return a row per comparison: the difference with its interval, grey where that contains 0."""
    labels = [f"{c.task} {c.name}: {c.first} − {c.second}" for c in comparisons]
    widest = max(map(len, labels), default=1)
    figure = Figure(figsize=(4.5 + 0.07 * widest, 1.2 + 0.36 * len(comparisons)), layout="constrained")
    panel = figure.subplots()
    for row, c in enumerate(comparisons):
        color = "0.6" if c.verdict == "not resolved" else "tab:blue"
        panel.plot([c.low, c.high], [row, row], "-", color=color, linewidth=2)
        panel.plot(c.difference, row, "D", color=color, markersize=6)
    panel.axvline(0, color="0.3", linewidth=1)
    panel.set_yticks(range(len(labels)), labels)
    panel.invert_yaxis()
    panel.set_xlabel(f"difference of the pooled score, {level:.0%} interval (bootstrap over test groups)")
    panel.spines[["top", "right"]].set_visible(False)
    return figure
