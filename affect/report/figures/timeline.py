# SPDX-License-Identifier: Apache-2.0
"""What a model reads in one face through a video: expressions and affect as curves, action units as a heat map."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.lines import Line2D
from numpy.typing import ArrayLike

from affect.errors import DataError
from affect.report.figures import style

_MOST_LINES = 8
_ABSENT = "#cfcfcf"
_ROW, _LINES = 0.17, 1.35
"""Inches of a row of a heat map, and of a panel of curves."""


class Timeline:
    """Means of signals over equal steps of time, of as many rows as there may be, in memory that does not grow.

    Args:
        names: Signals.
        start: Time of the first row.
        end: Time of the last row.
        steps: Number of steps.

    Attributes:
        edges: Their limits ``(steps + 1,)``.
    """

    def __init__(self, names: Sequence[str], start: float, end: float, steps: int = 960) -> None:
        if not (np.isfinite([start, end]).all() and end >= start and steps >= 1):
            raise DataError(f"timeline: {steps} steps from {start} to {end}; give a start, a later end and a step")
        self.names = tuple(names)
        self.edges = np.linspace(start, end if end > start else start + 1, steps + 1)
        self._sums = np.zeros((steps, len(self.names)))
        self._counts = np.zeros((steps, len(self.names)))

    def add(self, times: ArrayLike, values: ArrayLike) -> None:
        """Add rows.

        Args:
            times: ``(N,)``.
            values: ``(N, K)`` in the order of ``names``; NaN where there is none.
        """
        given, cells = np.asarray(times, np.float64), np.asarray(values, np.float64).reshape(-1, len(self.names))
        steps = len(self.edges) - 1
        step = np.clip(((given - self.edges[0]) / (self.edges[-1] - self.edges[0]) * steps).astype(int), 0, steps - 1)
        known = np.isfinite(cells)
        np.add.at(self._sums, step, np.where(known, cells, 0))
        np.add.at(self._counts, step, known)

    def means(self) -> np.ndarray:
        """Return the mean of each signal in each step ``(steps, K)``, NaN where nothing was added."""
        out = np.full_like(self._sums, np.nan)
        return np.divide(self._sums, self._counts, out=out, where=self._counts > 0)


@dataclass(frozen=True)
class Panel:
    """A part of a timeline.

    Attributes:
        title: What it shows.
        names: Signals, from top to bottom.
        low: Lower end of the scale.
        high: Upper end.
        lines: Curves instead of rows of a heat map.
    """

    title: str
    names: tuple[str, ...]
    low: float = 0.0
    high: float = 1.0
    lines: bool = False


def timeline(
    signals: Timeline, panels: Sequence[Panel], *, title: str | None = None, unit: str = "s", note: str | None = None
) -> Figure:
    """Return the signals of one face over time; grey, or without a curve, where there is no face.

    Args:
        signals: Means over steps of time.
        panels: What is shown where; panels without signals are left out.
        title: Heading.
        unit: Unit of time, for the horizontal axis.
        note: What a reader has to know.

    Raises:
        DataError: If a panel names a signal that is not there.
    """
    shown = [panel for panel in panels if panel.names]
    unknown = [name for panel in shown for name in panel.names if name not in signals.names]
    if unknown:
        raise DataError(f"timeline: no signal {unknown[0]}; there are {', '.join(signals.names[:12])}")
    means = signals.means()
    if not shown or not np.isfinite(means).any():
        return style.empty_figure(title, "no face was followed")
    index = {name: k for k, name in enumerate(signals.names)}
    heights = [_LINES if panel.lines else max(0.5, _ROW * len(panel.names)) + 0.1 for panel in shown]
    figure = style.new_figure(style.WIDTH, 0.9 + sum(heights) + 0.32 * len(shown))
    style.heading(figure, title, note)
    grid = figure.subplots(len(shown), 1, sharex=True, squeeze=False, height_ratios=heights)
    centres = (signals.edges[:-1] + signals.edges[1:]) / 2
    for axes, panel in zip(grid[:, 0], shown, strict=True):
        values = means[:, [index[name] for name in panel.names]]
        axes.set_title(panel.title, loc="left", fontsize=style.SMALL_SIZE, color=style.MUTED, pad=2, parse_math=False)
        if panel.lines:
            _curves(axes, centres, values, panel)
        else:
            _rows(figure, axes, signals.edges, values, panel)
        axes.set_xlim(signals.edges[0], signals.edges[-1])
    grid[-1, 0].set_xlabel(f"time ({unit})" if unit == "s" else unit, fontsize=style.SMALL_SIZE, color=style.INK)
    return figure


def _curves(axes: Axes, centres: np.ndarray, values: np.ndarray, panel: Panel) -> None:
    style.tidy(axes, grid="y")
    # The largest ones keep the colours apart; further ones would only hide them.
    order = np.argsort(-np.nan_to_num(np.abs(values)).mean(0), kind="stable")[:_MOST_LINES]
    handles = []
    for colour, k in zip(style.PALETTE, sorted(order.tolist()), strict=False):
        known = np.isfinite(values[:, k])
        axes.plot(centres, _bridged(values[:, k]), color=colour, linewidth=1.1)
        # A value between two gaps has no line to either side.
        alone = known & ~np.roll(known, 1) & ~np.roll(known, -1)
        axes.plot(centres[alone], values[alone, k], ".", color=colour, markersize=2)
        handles.append(Line2D([], [], color=colour, linewidth=1.6, label=panel.names[k]))
    margin = 0.03 * (panel.high - panel.low)
    axes.set_ylim(panel.low - margin, panel.high + margin)
    legend = axes.legend(
        handles=handles, loc="center left", bbox_to_anchor=(1.0, 0.5), frameon=False, fontsize=style.SMALL_SIZE
    )
    for label in legend.get_texts():
        label.set_parse_math(False)


def _bridged(values: np.ndarray) -> np.ndarray:
    """Return values with steps that lie between two rows filled in, where a video has fewer frames than steps."""
    known = np.flatnonzero(np.isfinite(values))
    if len(known) < 2:
        return values
    reach = int(np.ceil(1.5 * np.median(np.diff(known))))
    filled = values.copy()
    between = np.arange(known[0], known[-1] + 1)
    last = np.searchsorted(known, between, side="right") - 1
    following = np.minimum(last + 1, len(known) - 1)
    near = known[following] - known[last] <= reach  # a longer gap is one without the face
    filled[between[near]] = np.interp(between[near], known, values[known])
    return filled


def _rows(figure: Figure, axes: Axes, edges: np.ndarray, values: np.ndarray, panel: Panel) -> None:
    style.tidy(axes, grid=None)
    axes.set_facecolor(_ABSENT)
    filled = np.stack([_bridged(values[:, k]) for k in range(values.shape[1])])
    image = axes.imshow(
        np.ma.masked_invalid(filled),
        cmap=style.DENSITY,
        vmin=panel.low,
        vmax=panel.high,
        aspect="auto",
        interpolation="nearest",
        extent=(edges[0], edges[-1], len(panel.names) - 0.5, -0.5),
    )
    axes.set_yticks(range(len(panel.names)), [str(name) for name in panel.names])
    for label in axes.get_yticklabels():
        label.set_parse_math(False)
    bar = figure.colorbar(image, ax=axes, fraction=0.02, pad=0.01, aspect=max(5, len(panel.names)))
    bar.ax.tick_params(labelsize=style.SMALL_SIZE, length=2)
    bar.outline.set_visible(False)
