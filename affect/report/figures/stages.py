# SPDX-License-Identifier: Apache-2.0
"""Where each stage of a cascade looks, and how its points move from the first stage to the last."""

from __future__ import annotations

import math
from collections.abc import Sequence

import numpy as np
from matplotlib.axes import Axes
from matplotlib.collections import LineCollection
from matplotlib.figure import Figure

from affect.errors import DataError
from affect.report.figures import style
from affect.report.figures.findings import overlay

_FACES = 4


def stage_sheet(
    images: np.ndarray,
    attention: np.ndarray,
    first: np.ndarray,
    last: np.ndarray,
    target: np.ndarray | None = None,
    *,
    errors: Sequence[float] | None = None,
    unit: str = "%",
    title: str | None = "Where each stage looks",
) -> Figure:
    """Return a row per face: its points at the first and the last stage, then the attention of every stage over it.

    Args:
        images: RGB uint8 faces ``(B, H, W, 3)``; the first few are shown.
        attention: Attention of S stages ``(S, B, h, w)``, each map scaled to its own largest value.
        first: Points of the first stage ``(B, P, 2)`` in pixels of the face, first pixel centre at 0.
        last: Points of the last stage, likewise.
        target: True points, likewise; NaN where a point is not labelled.
        errors: Mean error of each stage over all held-out faces, written above its column; NaN where it has none.
        unit: Unit of the errors.
        title: Heading.

    Raises:
        DataError: If there is not one finite map per stage and face, or points or errors are not as many.
    """
    maps = np.asarray(attention, float)
    if maps.ndim != 4 or maps.shape[1] != len(images):
        raise DataError(f"attention of shape {maps.shape} for {len(images)} faces; expected (S, B, h, w)")
    if not np.isfinite(maps).all():
        raise DataError("attention holds values that are not finite")
    for name, points in (("first", first), ("last", last), ("true", target)):
        if points is not None and np.shape(points) != np.shape(first):
            raise DataError(f"points of the first stage {np.shape(first)}, {name} points {np.shape(points)}")
    if np.ndim(first) != 3 or len(first) != len(images):
        raise DataError(f"points of shape {np.shape(first)} for {len(images)} faces; expected (B, P, 2)")
    if errors is not None and len(errors) != len(maps):
        raise DataError(f"{len(errors)} errors for {len(maps)} stages")
    if not len(images) or not len(maps):
        return style.empty_figure(title, "no faces to show")
    faces = [style.as_rgb(image) for image in images[:_FACES]]
    across = 1 + len(maps)
    width = style.WIDTH / across
    figure = style.new_figure(style.WIDTH, len(faces) * width + 1.15)
    figure.get_layout_engine().set(w_pad=0.02, h_pad=0.02, wspace=0.0, hspace=0.0)  # type: ignore[union-attr,call-arg]
    grid = figure.subplots(len(faces), across, squeeze=False)
    for row, face in enumerate(faces):
        axes = grid[row, 0]
        axes.imshow(face, gid=f"face {row}")
        true = None if target is None else target[row]
        _draw(axes, np.asarray(first[row], float), np.asarray(last[row], float), true, width)
        for stage in range(len(maps)):
            grid[row, 1 + stage].imshow(overlay(face, maps[stage, row]), gid=f"stage {stage}, face {row}")
        for axes in grid[row]:
            axes.set_axis_off()
            axes.set(xlim=(-0.5, face.shape[1] - 0.5), ylim=(face.shape[0] - 0.5, -0.5))
    names = ["points"]
    for stage in range(len(maps)):
        error = math.nan if errors is None else float(errors[stage])
        names.append(f"stage {stage + 1}" + (f", {error:.2f} {unit}" if math.isfinite(error) else ""))
    for axes, name in zip(grid[0], names, strict=True):
        label = style.fit(name, width - 0.05, style.SMALL_SIZE)
        axes.set_title(label, fontsize=style.SMALL_SIZE, color=style.INK, pad=2, parse_math=False)
    said = "Orange: points of the first stage. Blue: of the last." + (" White: true." if target is not None else "")
    told = "" if errors is None else " Numbers: mean error of a stage over all held-out faces."
    note = f"{said} Brighter is more attention; each map is scaled to its own largest value.{told}"
    style.heading(figure, title, note)
    return figure


def _draw(axes: Axes, first: np.ndarray, last: np.ndarray, true: np.ndarray | None, width: float) -> None:
    """Draw the points of a face that lie in it, and the way of each from the first stage to the last."""
    size = float(np.clip(width * 72 * 0.13 / math.sqrt(max(len(first), 1)), 1.0, 4.0)) ** 2
    ways = np.stack([first, last], 1)
    ways = ways[np.isfinite(ways).all((1, 2))]
    axes.add_collection(LineCollection(list(ways), colors=style.ORANGE, linewidths=0.6, zorder=3, gid="ways"))
    for points, colour, name in (
        (true, style.PAPER, "true"),
        (first, style.ORANGE, "first"),
        (last, style.SKY, "last"),
    ):
        if points is not None:
            shown = np.asarray(points, float)
            shown = shown[np.isfinite(shown).all(1)]
            axes.scatter(shown[:, 0], shown[:, 1], s=size, color=colour, linewidths=0, zorder=4, clip_on=True, gid=name)
