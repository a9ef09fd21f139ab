# SPDX-License-Identifier: Apache-2.0
"""Predictions against targets for continuous labels: valence and arousal, and coefficients of a teacher."""

from __future__ import annotations

import math
from collections.abc import Sequence

import numpy as np
from matplotlib.axes import Axes
from matplotlib.collections import LineCollection
from matplotlib.colors import LogNorm
from matplotlib.figure import Figure
from matplotlib.patches import Circle
from matplotlib.patheffects import withStroke

from affect.errors import DataError
from affect.report.figures import style
from affect.report.records import Record, number_text, overall, read_scores, readable_metric

EMOTION_ANGLES = {
    "happy": 8,
    "delighted": 25,
    "excited": 49,
    "aroused": 74,
    "angry": 99,
    "afraid": 116,
    "frustrated": 141,
    "miserable": 189,
    "sad": 207,
    "bored": 242,
    "tired": 268,
    "calm": 316,
    "serene": 329,
    "glad": 349,
}
"""Direction of emotion words in the valence-arousal plane, in degrees counter-clockwise from positive valence.

Rounded from the circular scaling of Russell, J. A. (1980): A circumplex model of affect, Journal of Personality and
Social Psychology 39(6). They orient a reader and take no part in any number.
"""

_DENSE = 1500
_CONNECTED = 60
_ACROSS, _UP = (-1.4, 1.4), (-1.16, 1.16)
_HALO = [withStroke(linewidth=2.0, foreground=style.PAPER)]


def circumplex(
    values: np.ndarray,
    targets: np.ndarray,
    mask: np.ndarray | None = None,
    *,
    records: Sequence[Record] = (),
    title: str | None = "Valence and arousal",
) -> Figure:
    """Return true and predicted valence-arousal side by side in the unit circle with named emotions.

    Up to 60 samples, each prediction is joined with its target; above 1,500, hexagons show the density.

    Args:
        values: Predicted valence and arousal ``(N, 2)``, in [-1, 1].
        targets: True ones ``(N, 2)``.
        mask: Bool ``(N, 2)`` or ``(N,)``; rows without both labels are left out, as are values that are not finite.
        records: Records of the evaluation; those of the outputs ``valence`` and ``arousal`` are written below.
        title: Heading.

    Raises:
        DataError: If shapes differ.
    """
    predicted, true = np.asarray(values, float).reshape(-1, 2), np.asarray(targets, float).reshape(-1, 2)
    valid: np.ndarray = np.ones((len(predicted), 1), bool) if mask is None else np.asarray(mask, bool)
    valid = valid.reshape(len(valid), math.prod(valid.shape[1:]))
    if len({len(predicted), len(true), len(valid)}) > 1:
        raise DataError(f"circumplex: {len(predicted)} predictions, {len(true)} targets and {len(valid)} masks")
    labelled = np.concatenate([valid, np.isfinite(predicted), np.isfinite(true)], 1).all(1)
    predicted, true = predicted[labelled], true[labelled]
    if len(true) == 0:
        return style.empty_figure(title, "no sample has valence and arousal")

    figure = style.new_figure(style.WIDTH, 4.15)
    left, right = figure.subplots(1, 2)
    for axes, name in ((left, "true"), (right, "predicted")):
        _draw_circle(axes, name)
    if len(true) > _DENSE:
        _draw_density(figure, (left, right), (true, predicted))
    else:
        alpha = float(np.clip(60 / len(true), 0.25, 0.9))
        for axes, points, colour in ((left, true, style.TRUE), (right, predicted, style.PREDICTED)):
            axes.scatter(*points.T, s=16, color=colour, alpha=alpha, linewidths=0, zorder=4, gid="points")
        if len(true) <= _CONNECTED:
            joined = np.stack([true, predicted], 1)
            right.add_collection(
                LineCollection(list(joined), colors=style.MUTED, linewidths=0.6, zorder=3, gid="joined")
            )
            right.scatter(*true.T, s=9, facecolors="white", edgecolors=style.TRUE, linewidths=0.9, zorder=4, gid="true")
    numbers = [f"{axis} {', '.join(found)}" for axis in ("valence", "arousal") if (found := _numbers(records, axis))]
    note = "; ".join([f"n = {len(true):,}", *numbers])
    if len(true) <= _CONNECTED:
        note += ". Lines join each prediction with its true value."
    style.heading(figure, title, note)
    return figure


def coefficient_scatter(
    predicted: np.ndarray,
    target: np.ndarray,
    names: Sequence[str],
    mask: np.ndarray | None = None,
    *,
    records: Sequence[Record] = (),
    limit: int = 25,
    target_name: str = "teacher",
    title: str | None = "Prediction against teacher",
) -> Figure:
    """Return one small scatter per coefficient, prediction over target, with the identity line.

    Args:
        predicted: ``(N, K)``.
        target: ``(N, K)``.
        names: Names of the K outputs.
        mask: Bool ``(N, K)``, True where labelled; cells that are not finite are left out too.
        records: Records of the evaluation: CCC and PCC of each output (``ccc/<name>``, ``pcc/<name>``) are written in
            its panel. The figure computes no metric itself, so it cannot disagree with the result file.
        limit: Most panels; if there are more coefficients, those whose targets vary most are drawn.
        target_name: Who gave the targets, for the axis.
        title: Heading.

    Raises:
        DataError: If shapes and names do not fit together.
    """
    p, t = np.asarray(predicted, float), np.asarray(target, float)
    valid = np.ones(p.shape, bool) if mask is None else np.asarray(mask, bool)
    if p.shape != t.shape or p.shape != valid.shape or p.ndim != 2 or p.shape[1] != len(names):
        raise DataError(
            f"coefficient scatter: predictions {p.shape}, targets {t.shape}, mask {valid.shape} and {len(names)} "
            "names; expected (samples, names) for all"
        )
    valid = valid & np.isfinite(p) & np.isfinite(t)
    labelled = np.flatnonzero(valid.any(0))
    if labelled.size == 0:
        return style.empty_figure(title, "no labelled coefficient")
    spread = np.array([np.std(t[valid[:, k], k]) for k in labelled])
    # The order of the task is kept among those that are drawn.
    shown = np.sort(labelled[np.argsort(-spread, kind="stable")[:limit]])
    low = min(0.0, *(float(a[valid[:, k], k].min()) for k in shown for a in (p, t)))
    high = max(float(a[valid[:, k], k].max()) for k in shown for a in (p, t))
    high = 1.0 if 0.5 < high <= 1.0 else high if high > low else low + 1.0
    margin = 0.04 * (high - low)

    scores = {score.name: score.value for score in overall(read_scores(records))}
    across = len(shown) if len(shown) <= 3 else min(5, math.ceil(math.sqrt(len(shown) * 1.6)))
    down = math.ceil(len(shown) / across)
    width = style.WIDTH if across > 2 else 0.3 + 3.2 * across
    panel = (width - 0.45) / across
    # Panels are square: what the axis labels take in width is roughly what the titles take in height.
    figure = style.new_figure(width, (0.85 if title else 0.6) + (panel + (0.05 if across > 3 else -0.05)) * down)
    grid = figure.subplots(down, across, sharex=True, sharey=True, squeeze=False)
    for index, axes in enumerate(grid.ravel()):
        axes.set_visible(index < len(shown))
        if index >= len(shown):
            continue
        k = int(shown[index])
        style.tidy(axes, size=style.SMALL_SIZE - 0.5)
        x, y = t[valid[:, k], k], p[valid[:, k], k]
        axes.plot([low, high], [low, high], color=style.MUTED, linewidth=0.8, linestyle=(0, (4, 3)))
        axes.scatter(
            x,
            y,
            s=float(np.clip(900 / len(x), 2.0, 12.0)),
            color=style.PREDICTED,
            alpha=float(np.clip(120 / len(x), 0.08, 0.7)),
            linewidths=0,
            # A vector file with a point per sample would not open.
            rasterized=len(x) > 2000,
            gid=names[k],
        )
        axes.set(xlim=(low - margin, high + margin), ylim=(low - margin, high + margin), aspect="equal")
        axes.locator_params(nbins=3)
        axes.set_title(
            style.fit(names[k], panel - 0.05, style.SMALL_SIZE),
            fontsize=style.SMALL_SIZE,
            color=style.INK,
            pad=3,
            parse_math=False,
        )
        lines = [
            f"{readable_metric(metric)} {number_text(scores[f'{metric}/{names[k]}'], 2)}"
            for metric in ("ccc", "pcc")
            if f"{metric}/{names[k]}" in scores
        ]
        axes.text(
            0.04,
            0.97,
            "\n".join(lines),
            transform=axes.transAxes,
            va="top",
            fontsize=style.SMALL_SIZE - 1,
            color=style.INK,
        )
        if index + across >= len(shown):
            axes.tick_params(labelbottom=True)
    figure.supylabel("predicted", fontsize=style.TEXT_SIZE, color=style.INK)
    style.heading(figure, title)
    hidden = labelled.size - len(shown)
    note = f"\nThe {len(shown)} of {labelled.size} coefficients whose values vary most." if hidden else ""
    figure.supxlabel(target_name + note, fontsize=style.TEXT_SIZE, color=style.INK).set_parse_math(False)
    return figure


def _numbers(records: Sequence[Record], axis: str) -> list[str]:
    found = [score for score in overall(read_scores(records)) if score.output == axis and math.isfinite(score.value)]
    return [f"{readable_metric(score.metric)} {number_text(score.value)}" for score in found]


def _draw_circle(axes: Axes, name: str) -> None:
    axes.set(xlim=_ACROSS, ylim=_UP, aspect="equal")
    axes.set_axis_off()
    axes.add_patch(Circle((0, 0), 1.0, facecolor="none", edgecolor=style.MUTED, linewidth=1.0, zorder=2))
    axes.add_patch(Circle((0, 0), 0.5, facecolor="none", edgecolor=style.GRID, linewidth=0.8, zorder=1))
    # Labels reach beyond the circle: an annotator may call a face both fully pleased and fully aroused.
    axes.plot([-1, 1, 1, -1, -1], [-1, -1, 1, 1, -1], color=style.GRID, linewidth=0.7, zorder=1)
    for end in ([[-1, 1], [0, 0]], [[0, 0], [-1, 1]]):
        axes.plot(*end, color=style.GRID, linewidth=0.9, zorder=1)
    for word, degrees in EMOTION_ANGLES.items():
        x, y = math.cos(math.radians(degrees)), math.sin(math.radians(degrees))
        axes.plot([x * 0.97, x * 1.03], [y * 0.97, y * 1.03], color=style.MUTED, linewidth=0.8, zorder=2)
        axes.text(
            x * 1.06,
            y * 1.06,
            word,
            ha="left" if x > 0.2 else "right" if x < -0.2 else "center",
            va="bottom" if y > 0.5 else "top" if y < -0.5 else "center",
            fontsize=style.SMALL_SIZE,
            color=style.MUTED,
            path_effects=_HALO,
            zorder=5,
        )
    axes.text(
        0.98,
        0.03,
        "valence",
        ha="right",
        va="bottom",
        fontsize=style.SMALL_SIZE,
        color=style.INK,
        zorder=6,
        path_effects=_HALO,
    )
    axes.text(
        -0.03,
        0.97,
        "arousal",
        ha="right",
        va="top",
        rotation=90,
        fontsize=style.SMALL_SIZE,
        color=style.INK,
        zorder=6,
        path_effects=_HALO,
    )
    axes.set_title(name, fontsize=style.TEXT_SIZE + 1, fontweight="bold", color=style.INK)


def _draw_density(figure: Figure, panels: Sequence[Axes], clouds: Sequence[np.ndarray]) -> None:
    drawn = [
        axes.hexbin(
            *np.clip(points, -1, 1).T,
            gridsize=(32, 18),
            extent=(-1, 1, -1, 1),
            mincnt=1,
            cmap=style.DENSITY,
            linewidths=0.2,
            zorder=0.5,
        )
        for axes, points in zip(panels, clouds, strict=True)
    ]
    # One scale for both, else a prediction that never leaves the middle would look as wide as the truth.
    top = max(float(np.max(cells.get_array())) for cells in drawn)  # type: ignore[arg-type]
    norm = LogNorm(1, max(top, 2.0))
    for cells, axes in zip(drawn, panels, strict=True):
        cells.set_norm(norm)
        axes.set(xlim=_ACROSS, ylim=_UP)
    bar = figure.colorbar(drawn[0], ax=list(panels), fraction=0.02, pad=0.01, shrink=0.6)
    bar.outline.set_visible(False)  # type: ignore[operator]
    bar.ax.tick_params(labelsize=style.SMALL_SIZE, color=style.MUTED, labelcolor=style.INK)
    bar.set_label("samples", fontsize=style.SMALL_SIZE, color=style.INK)
