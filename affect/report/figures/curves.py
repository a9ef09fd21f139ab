# SPDX-License-Identifier: Apache-2.0
"""Curves: how a run trained, how far its probabilities can be trusted, and how its landmark errors are distributed."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import numpy as np
from matplotlib.artist import Artist
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.lines import Line2D
from matplotlib.patheffects import withStroke

from affect.errors import DataError
from affect.report.figures import style
from affect.report.records import SUMMARIES, number_text, readable_metric

History = Mapping[str, Sequence[tuple[float, float]]]
"""By curve name: pairs of step (or epoch) and value."""

_PARTS = {"train": "train", "validation": "validation", "val": "validation", "valid": "validation", "test": "test"}
_PART_COLOURS = {"train": style.ORANGE, "validation": style.BLUE, "test": style.GREEN, "": style.INK}
_MOST_PANELS = 18


@dataclass(frozen=True)
class _Curve:
    part: str
    panel: str
    output: str
    steps: np.ndarray
    values: np.ndarray

    @property
    def is_output(self) -> bool:
        return bool(self.output) and self.output not in SUMMARIES


def training_curves(
    history: History,
    *,
    best: float | None = None,
    monitor: str | None = None,
    unit: str = "epoch",
    title: str | None = "Training",
) -> Figure:
    """Return small multiples of every loss and metric over training, losses first, the best step marked.

    A name is ``<part>/<rest>`` with the part ``train``, ``validation`` (``val``) or ``test``: equal rests share a
    panel. Curves of single outputs beside their mean (``f1/AU1`` … ``f1/mean``) share one panel, the outputs faint.
    Values that are not finite leave gaps.

    Args:
        history: Curves by name; steps need not be the same for all and need not be sorted.
        best: Step whose weights were kept; a line in every panel.
        monitor: Name of the curve that chose it; its value at ``best`` is marked and written.
        unit: What a step is, for the horizontal axis.
        title: Heading.

    Raises:
        DataError: If ``monitor`` is not a name of ``history``, or if a curve does not hold pairs of numbers.
    """
    if monitor is not None and monitor not in history:
        raise DataError(f"training curves: monitor {monitor!r} is not among the curves {sorted(history)[:12]}")
    curves = _read_history(history)
    if not any(len(curve.steps) for curve in curves.values()):
        return style.empty_figure(title, f"no {unit} has ended yet")
    panels: dict[str, list[_Curve]] = {}
    for curve in curves.values():
        panels.setdefault(curve.panel, []).append(curve)
    order = sorted(panels, key=lambda name: "loss" not in name.lower().split("/"))
    shown = order[:_MOST_PANELS]

    across = min(3, len(shown))
    down = math.ceil(len(shown) / across)
    width = style.WIDTH if across > 1 else 0.6 * style.WIDTH
    figure = style.new_figure(width, 0.9 + (1.75 if across > 1 else 2.4) * down)
    axes_grid = figure.subplots(down, across, sharex=True, squeeze=False)
    axes_list: list[Axes] = list(axes_grid.ravel())
    for axes, panel in zip(axes_list, shown, strict=False):
        _draw_panel(axes, panel, panels[panel], width / across - 0.5)
        if best is not None:
            axes.axvline(best, color=style.MUTED, linewidth=0.9, linestyle=(0, (4, 3)), zorder=1, gid="best")
    for index, axes in enumerate(axes_list):
        axes.set_visible(index < len(shown))
        if index + across >= len(shown):
            # The lowest panel of each column names the axis, also where the last row is not full.
            axes.set_xlabel(unit, fontsize=style.SMALL_SIZE, color=style.INK)
            axes.tick_params(labelbottom=True)
    if monitor is not None and best is not None and curves[monitor].panel in shown:
        _mark_best(axes_list[shown.index(curves[monitor].panel)], curves[monitor], best)
    steps = np.concatenate([curve.steps for curve in curves.values()])
    if steps.min() == steps.max():
        # The default around a single step is a fraction of it, with meaningless ticks.
        axes_list[0].set_xlim(steps[0] - 1, steps[0] + 1)
    axes_list[0].xaxis.get_major_locator().set_params(integer=True)  # type: ignore[call-arg]

    handles: list[Artist] = [
        Line2D([], [], color=_PART_COLOURS[part], linewidth=1.6, label=part)
        for part in _PART_COLOURS
        if part and any(curve.part == part for curve in curves.values())
    ]
    if any(curve.is_output for curve in curves.values()):
        handles.append(Line2D([], [], color=style.MUTED, linewidth=0.6, alpha=0.6, label="single outputs"))
    if best is not None:
        handles.append(
            Line2D([], [], color=style.MUTED, linewidth=0.9, linestyle=(0, (4, 3)), label=f"kept: {unit} {best:g}")
        )
    left_out = len(order) - len(shown)
    style.heading(figure, title, f"{left_out} more panels are left out." if left_out else None, handles)
    return figure


def reliability_diagram(
    probability: np.ndarray,
    target: np.ndarray,
    mask: np.ndarray | None = None,
    *,
    bins: int = 10,
    title: str | None = "Reliability",
) -> Figure:
    """Return observed frequency against predicted probability, with the expected calibration error.

    Probabilities fall into ``bins`` intervals of equal width, ``[low, high)``, the last closed. Points stand at the
    mean probability of their bin, with Wilson's 95 % interval; the panel below shows where predictions lie. The
    expected calibration error is the mean over cells of |observed frequency − mean probability| of the cell's bin
    (Naeini et al., 2015, AAAI). For a class task pass the largest probability and whether its class is right.

    Args:
        probability: Any shape, in [0, 1].
        target: Same shape; 1 where the event is true, 0 where not (soft labels in between are averaged).
        mask: Same shape, bool; True where the cell is labelled. Cells that are not finite are left out too.
        bins: Number of intervals.
        title: Heading.

    Raises:
        DataError: If shapes differ or a probability lies outside [0, 1].
    """
    p, t = _valid_pairs("reliability diagram", probability, target, mask)
    if p.size == 0:
        return style.empty_figure(title, "no labelled predictions")
    if p.min() < 0 or p.max() > 1:
        raise DataError(f"reliability diagram: probabilities from {p.min():.3g} to {p.max():.3g}; expected [0, 1]")
    which = np.minimum((p * bins).astype(int), bins - 1)
    count = np.bincount(which, minlength=bins).astype(float)
    filled = count > 0
    predicted = np.bincount(which, p, bins)[filled] / count[filled]
    observed = np.bincount(which, t, bins)[filled] / count[filled]
    error = float((count[filled] * np.abs(observed - predicted)).sum() / count.sum())
    low, high = _wilson(observed, count[filled])

    figure = style.new_figure(4.6, 4.9)
    upper, lower = figure.subplots(2, 1, sharex=True, height_ratios=(4, 1))
    style.tidy(upper)
    style.tidy(lower, grid="y")
    upper.plot([0, 1], [0, 1], color=style.MUTED, linewidth=0.9, linestyle=(0, (4, 3)), gid="ideal")
    upper.vlines(predicted, low, high, color=style.PREDICTED, linewidth=1.2, alpha=0.6)
    upper.plot(
        predicted,
        observed,
        color=style.PREDICTED,
        linewidth=1.4,
        marker="o",
        markersize=4.5,
        clip_on=False,
        gid="reliability",
    )
    upper.set(xlim=(0, 1), ylim=(0, 1))
    upper.set_ylabel("observed frequency", fontsize=style.TEXT_SIZE, color=style.INK)
    edges = np.linspace(0, 1, bins + 1)
    lower.bar(edges[:-1], count / count.sum() * 100, width=1 / bins, align="edge", color=style.SKY, edgecolor="white")
    lower.set_ylabel("cells, %", fontsize=style.TEXT_SIZE, color=style.INK)
    lower.set_xlabel("predicted probability", fontsize=style.TEXT_SIZE, color=style.INK)
    figure.align_ylabels([upper, lower])
    style.heading(figure, title, f"Expected calibration error {number_text(error)}, n = {p.size:,}.")
    return figure


def cumulative_error_curve(
    errors: Mapping[str, np.ndarray],
    *,
    threshold: float = 10.0,
    unit: str = "%",
    title: str | None = "Cumulative landmark error",
) -> Figure:
    """Return the share of images whose error is at most x, per method, up to the failure threshold.

    Args:
        errors: By method, one normalised mean error per image ``(N,)``; NaN where an image has none. Such images take
            no part and are counted in the legend.
        threshold: Error above which an image counts as a failure; the right end of the axis.
        unit: Unit of the errors.
        title: Heading.

    Raises:
        DataError: If the threshold is not positive.
    """
    if not threshold > 0:
        raise DataError(f"cumulative error curve: threshold {threshold}; give a positive error in {unit}")
    if not any(np.isfinite(values).any() for values in errors.values()):
        return style.empty_figure(title, "no image has a landmark error")
    figure = style.new_figure(5.6, 3.8)
    axes = style.tidy(figure.add_subplot())
    for index, (name, given) in enumerate(errors.items()):
        values = np.asarray(given, float).ravel()
        known = np.sort(values[~np.isnan(values)])
        skipped = values.size - known.size
        inside = known[known <= threshold]
        steps = np.concatenate([[0.0], inside, [threshold]])
        share = np.concatenate([[0.0], np.arange(1, inside.size + 1), [inside.size]]) / max(known.size, 1) * 100
        label = f"{name}: {share[-1]:.1f} % within {threshold:g} {unit}" + (f" ({skipped} skipped)" if skipped else "")
        colour, dashes = style.PALETTE[index % len(style.PALETTE)], ("-", "--", ":")[index // len(style.PALETTE) % 3]
        axes.step(steps, share, where="post", color=colour, linestyle=dashes, linewidth=1.6, label=label, gid=name)
    axes.set(xlim=(0, threshold), ylim=(0, 101))
    axes.set_xlabel(f"normalised mean error, {unit}", fontsize=style.TEXT_SIZE, color=style.INK)
    axes.set_ylabel("images, %", fontsize=style.TEXT_SIZE, color=style.INK)
    legend = axes.legend(frameon=True, framealpha=0.9, edgecolor="none", fontsize=style.SMALL_SIZE, loc="best")
    for text in legend.get_texts():
        text.set_parse_math(False)
    style.heading(figure, title)
    return figure


def _read_history(history: History) -> dict[str, _Curve]:
    split = {name: _split(name) for name in history}
    rests = {rest for _, rest in split.values()}
    curves = {}
    for name, points in history.items():
        pairs = np.asarray(list(points), float)
        if pairs.size and (pairs.ndim != 2 or pairs.shape[1] != 2):
            raise DataError(f"training curves: {name} is not a list of (step, value) pairs")
        pairs = pairs.reshape(-1, 2)
        pairs = pairs[np.argsort(pairs[:, 0], kind="stable")]
        part, rest = split[name]
        parent, _, output = rest.rpartition("/")
        # Outputs share a panel only where a summary of them is there to stand out.
        together = bool(parent) and any(f"{parent}/{summary}" in rests for summary in SUMMARIES)
        values = np.where(np.isfinite(pairs[:, 1]), pairs[:, 1], np.nan)
        curves[name] = _Curve(part, parent if together else rest, output if together else "", pairs[:, 0], values)
    return curves


def _split(name: str) -> tuple[str, str]:
    first, _, rest = name.partition("/")
    return (_PARTS[first.lower()], rest) if rest and first.lower() in _PARTS else ("", name)


def _draw_panel(axes: Axes, panel: str, curves: Sequence[_Curve], width: float) -> None:
    style.tidy(axes)
    words = panel.split("/")
    name = " · ".join([*words[:-1], readable_metric(words[-1])])
    name = f"{name}, {next(iter(_summaries(curves)))}" if _summaries(curves) else name
    axes.set_title(
        style.fit(name, width, style.TEXT_SIZE),
        fontsize=style.TEXT_SIZE,
        color=style.INK,
        loc="left",
        pad=4,
        parse_math=False,
    )
    # Without a summary in a part, every curve of the part is drawn faint; the order keeps summaries on top.
    for curve in sorted(curves, key=lambda curve: not curve.is_output):
        lonely = np.isfinite(curve.values).sum() <= 1 or _has_lonely_points(curve.values)
        axes.plot(
            curve.steps,
            curve.values,
            color=_PART_COLOURS[curve.part],
            linewidth=0.6 if curve.is_output else 1.6,
            alpha=0.35 if curve.is_output else 1.0,
            # A point between gaps is no line: without a marker it would vanish.
            marker="o" if lonely else "",
            markersize=2.0 if curve.is_output else 3.5,
            gid=f"{curve.part}/{panel}" + (f"/{curve.output}" if curve.output else ""),
            zorder=2 if curve.is_output else 3,
        )
    if not any(np.isfinite(curve.values).any() for curve in curves):
        axes.text(0.5, 0.5, "no finite value", transform=axes.transAxes, ha="center", va="center", color=style.MUTED)
    axes.margins(x=0.03)


def _summaries(curves: Sequence[_Curve]) -> list[str]:
    return list(dict.fromkeys(curve.output for curve in curves if curve.output and not curve.is_output))


def _has_lonely_points(values: np.ndarray) -> bool:
    known = np.isfinite(values)
    beside = np.concatenate([[False], known[:-1]]) | np.concatenate([known[1:], [False]])
    return bool((known & ~beside).any())


def _mark_best(axes: Axes, curve: _Curve, best: float) -> None:
    hit = np.flatnonzero((curve.steps == best) & np.isfinite(curve.values))
    if hit.size == 0:
        return
    value = float(curve.values[hit[-1]])
    axes.plot([best], [value], marker="o", markersize=6, color=style.VERMILLION, zorder=5, gid="best value")
    # The text goes to the side of the point that has room, and away from the nearer border.
    early = best <= (curve.steps.min() + curve.steps.max()) / 2
    low, high = axes.get_ylim()
    upper = value > (low + high) / 2
    axes.annotate(
        number_text(value),
        (best, value),
        xytext=(7 if early else -7, -11 if upper else 6),
        textcoords="offset points",
        ha="left" if early else "right",
        fontsize=style.SMALL_SIZE,
        fontweight="bold",
        color=style.VERMILLION,
        path_effects=[withStroke(linewidth=2.5, foreground=style.PAPER)],
        zorder=6,
    )


def _valid_pairs(
    what: str, predicted: np.ndarray, target: np.ndarray, mask: np.ndarray | None
) -> tuple[np.ndarray, np.ndarray]:
    p, t = np.asarray(predicted, float), np.asarray(target, float)
    valid = np.ones(p.shape, bool) if mask is None else np.asarray(mask, bool)
    if p.shape != t.shape or p.shape != valid.shape:
        raise DataError(f"{what}: predictions {p.shape}, targets {t.shape} and mask {valid.shape} differ in shape")
    valid = valid & np.isfinite(p) & np.isfinite(t)
    return p[valid], t[valid]


def _wilson(share: np.ndarray, count: np.ndarray, z: float = 1.959964) -> tuple[np.ndarray, np.ndarray]:
    """Wilson's score interval of a proportion (Wilson, 1927)."""
    centre = (share + z**2 / (2 * count)) / (1 + z**2 / count)
    half = z / (1 + z**2 / count) * np.sqrt(share * (1 - share) / count + z**2 / (4 * count**2))
    return centre - half, centre + half
