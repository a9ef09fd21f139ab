# SPDX-License-Identifier: Apache-2.0
"""Scores with their intervals beside the best constant predictor's: per output, per arm of a comparison, per class."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence

import numpy as np
from matplotlib import colormaps
from matplotlib.artist import Artist
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.lines import Line2D
from matplotlib.patches import Patch

from affect.errors import DataError
from affect.report.figures import style
from affect.report.records import (
    Record,
    Score,
    facs_name,
    number_text,
    overall,
    read_arms,
    read_scores,
    readable_metric,
    select_names,
)

_BAR = 0.62
_ROW = 0.25
_LABEL_WIDTH = 2.6
_PERCENT, _COUNTS = 0.3, 0.55
"""Smallest cells of a confusion matrix, in inches, that hold a percentage, and a count below it."""


def au_bars(
    records: Sequence[Record],
    metric: str = "f1",
    *,
    task: str | None = None,
    title: str | None = None,
) -> Figure:
    """Return one bar per output with its interval and the best constant predictor's mark; summaries stand below.

    Made for action units (``AU12`` is written with its FACS name) and right for any metric with one number per output.
    A bar that does not beat the best constant predictor has another colour.

    Args:
        records: Records of one evaluation; those of subgroups and of other metrics are left out.
        metric: Metric to draw, the part of a record's name before ``/<output>``.
        task: Task to draw; None takes every task that has the metric.
        title: Heading; None names the metric.
    """
    scores = [
        score
        for score in overall(read_scores(records))
        if score.metric == metric and score.output and (task is None or score.task == task)
    ]
    name = readable_metric(metric)
    heading = f"{name} per output" if title is None else title
    if not scores:
        return style.empty_figure(heading, f"no record of {name}")
    # Outputs first; a summary that is set apart reads as one.
    single = [score for score in scores if not score.is_summary]
    summaries = [score for score in scores if score.is_summary]
    ordered = [*single, *summaries]
    positions = np.array([i + (0.5 if i >= len(single) and single else 0.0) for i in range(len(ordered))])

    figure = style.new_figure(style.WIDTH, 1.1 + _ROW * (positions[-1] + 1))
    axes = style.tidy(figure.add_subplot(), grid="x")
    _draw_bars(axes, ordered, positions, figure.get_figwidth())
    axes.set_yticks(
        positions, [_label(score.output, len({s.task for s in scores}) > 1, score.task) for score in ordered]
    )
    for tick, score in zip(axes.get_yticklabels(), ordered, strict=True):
        tick.set_parse_math(False)
        tick.set_fontweight("bold" if score.is_summary else "normal")
    axes.set_xlabel(name, fontsize=style.TEXT_SIZE, color=style.INK)
    style.heading(figure, heading, handles=_bar_legend(ordered))
    return figure


def ladder_bars(
    arms: Mapping[str, Sequence[Record]],
    names: Sequence[str] | None = None,
    *,
    title: str | None = "Comparison",
) -> Figure:
    """Return one row per arm and one panel per metric: bar, interval, and the best constant predictor's mark.

    Args:
        arms: Records by arm, drawn from top to bottom in this order.
        names: Record names to draw; None takes the summaries (``f1/mean``, ``accuracy`` …), or everything if there
            are no summaries.
        title: Heading.

    Raises:
        DataError: If an arm holds a number twice, or if no arm holds a name that was asked for.
    """
    read = read_arms(arms)
    keys = select_names(read, names)
    if not read or not keys:
        return style.empty_figure(title, "nothing to compare")
    several = len({task for task, _ in keys}) > 1
    across = min(3, len(keys))
    down = math.ceil(len(keys) / across)
    figure = style.new_figure(style.WIDTH, 1.0 + down * (0.75 + 0.3 * len(read)))
    grid = figure.subplots(down, across, sharey=True, squeeze=False)
    positions = np.arange(len(read), dtype=float)
    label_width = min(_LABEL_WIDTH, max(style.text_width(arm, style.TEXT_SIZE) for arm in read))
    panel_width = (figure.get_figwidth() - label_width) / across
    for index, axes in enumerate(grid.ravel()):
        axes.set_visible(index < len(keys))
        if index >= len(keys):
            continue
        task, name = keys[index]
        row = [scores.get(keys[index]) for scores in read.values()]
        missing = Score(task=task, metric=name, output="", value=math.nan)
        style.tidy(axes, grid="x")
        _draw_bars(axes, [missing if score is None else score for score in row], positions, panel_width, left=0.1)
        direction = next((score.higher_is_better for score in row if score is not None), True)
        label = " · ".join([*([task] if several and task else []), readable_metric(name)])
        axes.set_title(
            style.fit(f"{label} {'↑' if direction else '↓'}", panel_width - 0.2, style.TEXT_SIZE, bold=True),
            fontsize=style.TEXT_SIZE,
            fontweight="bold",
            color=style.INK,
            loc="left",
            parse_math=False,
        )
        axes.set_yticks(positions, [style.fit(arm, _LABEL_WIDTH, style.TEXT_SIZE) for arm in read])
        for tick in axes.get_yticklabels():
            tick.set_parse_math(False)
    drawn = [score for scores in read.values() for key, score in scores.items() if key in keys]
    style.heading(figure, title, "↑ higher is better, ↓ lower is better.", handles=_bar_legend(drawn))
    return figure


def confusion_matrix(matrix: np.ndarray, classes: Sequence[str], *, title: str | None = "Confusion matrix") -> Figure:
    """Return a confusion matrix, each row in per cent of its true class, with counts.

    Args:
        matrix: Counts ``(C, C)``, rows are true classes, columns predicted ones. A row without samples stays blank.
        classes: Names of the C classes.
        title: Heading.

    Raises:
        DataError: If the matrix is not ``(C, C)``, or if a count is negative.
    """
    counts = np.nan_to_num(np.asarray(matrix, float), nan=0.0)
    size = len(classes)
    if counts.shape != (size, size):
        if size or counts.size:
            raise DataError(f"confusion matrix of shape {counts.shape} for {size} classes; expected ({size}, {size})")
        return style.empty_figure(title, "no classes")
    if size == 0:
        return style.empty_figure(title, "no classes")
    if counts.min() < 0:
        raise DataError("confusion matrix: a count is negative; give counts, rows true and columns predicted")
    total = counts.sum(1, keepdims=True)
    share = np.divide(counts, total, out=np.full_like(counts, np.nan), where=total > 0)

    # Cells shrink with the number of classes until only the percentage fits, then nothing but the colour does.
    cell = float(np.clip(5.6 / size, 0.24, 0.8))
    width = max(cell * size + 2.6, 4.2)
    figure = style.new_figure(min(width, style.WIDTH + 2), cell * size + 2.2)
    axes = figure.add_subplot()
    axes.imshow(share, cmap=style.DENSITY, vmin=0, vmax=1, gid="confusion")
    axes.set_facecolor("#f4f4f4")
    axes.set_xticks(range(size), [style.fit(name, 1.8, style.TEXT_SIZE) for name in classes])
    axes.set_yticks(
        range(size),
        [f"{style.fit(name, 1.8, style.TEXT_SIZE)}  ({n:,.0f})" for name, n in zip(classes, total[:, 0], strict=True)],
    )
    longest = max(style.text_width(name, style.TEXT_SIZE) for name in classes)
    axes.tick_params(length=0, labelsize=style.TEXT_SIZE, labelcolor=style.INK)
    for tick in axes.get_xticklabels():
        tick.set(parse_math=False)
        if longest > cell * 0.95:
            tick.set(rotation=40, ha="right", rotation_mode="anchor")
    for tick in axes.get_yticklabels():
        tick.set(parse_math=False)
    axes.set_xticks(np.arange(size + 1) - 0.5, minor=True)
    axes.set_yticks(np.arange(size + 1) - 0.5, minor=True)
    axes.grid(which="minor", color="white", linewidth=1.5)
    axes.tick_params(which="minor", length=0)
    axes.spines[:].set_visible(False)
    axes.set_xlabel("predicted", fontsize=style.TEXT_SIZE, color=style.INK)
    axes.set_ylabel("true (number of samples)", fontsize=style.TEXT_SIZE, color=style.INK)
    _write_cells(axes, share, counts, cell)
    known = total.sum()
    accuracy = f"Accuracy {np.trace(counts) / known * 100:.1f} % of {known:,.0f}; " if known > 0 else ""
    recalls = np.diagonal(share)[total[:, 0] > 0]
    mean = f"mean class accuracy {recalls.mean() * 100:.1f} %" if recalls.size else "no samples"
    cells = (
        "Cells in % of the true class" + (" and in counts. " if cell >= _COUNTS else ". ") if cell >= _PERCENT else ""
    )
    style.heading(figure, title, f"{cells}{accuracy}{mean}.")
    return figure


def _write_cells(axes: Axes, share: np.ndarray, counts: np.ndarray, cell: float) -> None:
    if cell < _PERCENT:
        return
    with_counts = cell >= _COUNTS
    size = style.TEXT_SIZE if cell >= 0.5 else style.SMALL_SIZE - 0.5
    colours = colormaps[style.DENSITY]
    for (i, j), value in np.ndenumerate(share):
        if math.isnan(value):
            if j == 0 and share.shape[1] > 1:
                axes.text(-0.35, i, "no samples", va="center", fontsize=size, color=style.MUTED)
            continue
        # Zeros everywhere would hide the confusions that matter.
        if counts[i, j] == 0:
            continue
        red, green, blue, _ = colours(value)
        ink = "white" if 0.299 * red + 0.587 * green + 0.114 * blue < 0.55 else style.INK
        percent = f"{value * 100:.0f}" if value >= 0.005 else "<1"
        text = f"{percent} %" if with_counts else percent
        axes.text(
            j,
            i - (0.14 if with_counts else 0),
            text,
            ha="center",
            va="center",
            fontsize=size,
            color=ink,
            gid=f"{i},{j}",
        )
        if with_counts:
            number = f"{counts[i, j]:,.0f}" if counts[i, j] < 100_000 else f"{counts[i, j]:.2g}"
            axes.text(j, i + 0.22, number, ha="center", va="center", fontsize=style.SMALL_SIZE, color=ink, alpha=0.8)


def _draw_bars(
    axes: Axes, scores: Sequence[Score], positions: np.ndarray, width: float, *, left: float = _LABEL_WIDTH
) -> None:
    """Draw horizontal bars from zero, intervals, constants, and the values in a column right of the axes."""
    values = np.array([score.value for score in scores])
    ends = np.array([[score.low, score.high, score.value, score.constant, 0.0] for score in scores])
    low, high = np.nanmin(ends), np.nanmax(ends)
    # Ratios end at 1, so that a bar's length means the same in every figure; other metrics end at their largest.
    bounded = high <= 1.0 and any(s.metric.split("/")[-1].split("_")[-1] in _RATIOS for s in scores)
    top = 1.0 if bounded else (high + 0.05 * (high - low) or 1.0)
    bottom = 0.0 if low >= 0 else low - 0.05 * (top - low)
    known = np.isfinite(values)
    colours = [style.POOR_SCORE if score.beats_constant is False else style.SCORE for score in scores]
    axes.barh(positions[known], values[known], height=_BAR, color=[c for c, k in zip(colours, known, strict=True) if k])
    axes.set_xlim(bottom, top)
    axes.set_ylim(positions[-1] + 0.6, positions[0] - 0.6)
    if bottom < 0:
        axes.axvline(0, color=style.MUTED, linewidth=0.8)
    for score, position in zip(scores, positions, strict=True):
        if score.has_interval:
            axes.plot(
                [score.low, score.high],
                [position, position],
                color=style.INK,
                linewidth=1.3,
                gid=f"interval {score.name}",
            )
        if math.isfinite(score.constant):
            axes.plot(
                [score.constant] * 2,
                [position - 0.42, position + 0.42],
                color=style.CONSTANT,
                linewidth=2.0,
                clip_on=False,
                solid_capstyle="butt",
                gid=f"constant {score.name}",
            )
        axes.annotate(
            number_text(score.value, 2 if abs(score.value) < 10 else 1),
            (1.0, position),
            xycoords=("axes fraction", "data"),
            xytext=(4, 0),
            textcoords="offset points",
            va="center",
            fontsize=style.SMALL_SIZE,
            color=style.INK if math.isfinite(score.value) else style.MUTED,
            gid=f"value {score.name}",
        )
    axes.tick_params(axis="y", length=0, labelsize=style.TEXT_SIZE)
    axes.spines["left"].set_visible(False)
    axes.locator_params(axis="x", nbins=max(3, min(8, int((width - left) / 0.5))))


_RATIOS = {"f1", "precision", "recall", "accuracy", "auc", "ccc", "pcc", "sagr", "icc"}


def _bar_legend(scores: Sequence[Score]) -> list[Artist]:
    handles: list[Artist] = [Patch(color=style.SCORE, label="value")]
    if any(score.beats_constant is False for score in scores):
        handles.append(Patch(color=style.POOR_SCORE, label="value, not better than the constant"))
    if any(score.has_interval for score in scores):
        handles.append(Line2D([], [], color=style.INK, linewidth=1.3, label="95 % interval"))
    if any(math.isfinite(score.constant) for score in scores):
        mark = {"marker": "|", "markersize": 9, "markeredgewidth": 2, "linestyle": ""}
        handles.append(Line2D([], [], color=style.CONSTANT, label="best constant predictor", **mark))  # type: ignore[arg-type]
    return handles


def _label(output: str, several: bool, task: str) -> str:
    name = facs_name(output)
    text = output if name is None else f"{name}  {output}"
    return style.fit(f"{task} · {text}" if several and task else text, _LABEL_WIDTH, style.TEXT_SIZE)
