# SPDX-License-Identifier: Apache-2.0
"""What a trained model tells of itself: the order of its tasks, where its tokens look, how it weighs its losses."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from typing import Any

import cv2
import numpy as np
from matplotlib import colormaps
from matplotlib.figure import Figure
from matplotlib.lines import Line2D

from affect.errors import DataError
from affect.report.figures import style

_READABLE = 0.36
"""Smallest cell, in inches, that holds a percentage."""

_FACES = 3
_HEAT = "inferno"


def soft_order_matrix(
    matrix: np.ndarray | Sequence[Sequence[float]], names: Sequence[str], *, title: str | None = "Soft order"
) -> Figure:
    """Return a soft order as an annotated matrix: rows are steps, columns are tasks, entries per cent.

    Tasks stand in the order of their mean step, so that a clear order is a diagonal.

    Args:
        matrix: Doubly stochastic ``(T, T)``; entry [k, t] is the probability that step k treats task t.
        names: Names of the T tasks.
        title: Heading.

    Raises:
        DataError: If the matrix is not ``(T, T)`` or no probabilities.
    """
    shares = np.asarray(matrix, float)
    count = len(names)
    if shares.shape != (count, count):
        raise DataError(f"soft order of shape {shares.shape} for {count} tasks; expected ({count}, {count})")
    if not np.isfinite(shares).all() or shares.min() < -1e-6 or abs(shares.sum(0) - 1).max() > 1e-3:
        raise DataError("soft order: columns must hold probabilities that sum to 1")
    mean = np.arange(1, count + 1) @ shares
    order = np.argsort(mean, kind="stable")
    shares = shares[:, order]
    cell = float(np.clip(6.2 / count, 0.3, 0.7))
    figure = style.new_figure(max(cell * count + 1.6, 4.6), cell * count + 2.0)
    axes = figure.add_subplot()
    top = float(shares.max())
    axes.imshow(shares, cmap=style.DENSITY, vmin=0, vmax=max(top, 2 / count), gid="soft order")
    axes.set_xticks(range(count), [style.fit(names[t], 1.4, style.TEXT_SIZE) for t in order])
    axes.set_yticks(range(count), [str(k + 1) for k in range(count)])
    axes.tick_params(length=0, labelsize=style.TEXT_SIZE, labelcolor=style.INK)
    crowded = max((style.text_width(name, style.TEXT_SIZE) for name in names), default=0) > 0.95 * cell
    for tick in axes.get_xticklabels():
        tick.set(parse_math=False)
        if crowded:
            tick.set(rotation=40, ha="right", rotation_mode="anchor")
    axes.spines[:].set_visible(False)
    axes.set_ylabel("step", fontsize=style.TEXT_SIZE, color=style.INK)
    colours, scale = colormaps[style.DENSITY], max(top, 2 / count)
    if cell >= _READABLE:
        for (k, t), share in np.ndenumerate(shares):
            red, green, blue, _ = colours(share / scale)
            ink = "white" if 0.299 * red + 0.587 * green + 0.114 * blue < 0.55 else style.INK
            text = f"{share * 100:.0f}" if share >= 0.005 else ("<1" if share > 0 else "0")
            axes.text(t, k, text, ha="center", va="center", fontsize=style.SMALL_SIZE, color=ink, gid=f"{k},{t}")
    steps = ", ".join(f"{names[t]} {mean[t]:.1f}" for t in order)
    note = f"Per cent of the mixture in which a step (row) treats a task (column). Mean step: {steps}."
    style.heading(figure, title, note)
    return figure


def attention_sheet(
    images: np.ndarray,
    maps: np.ndarray,
    names: Sequence[str],
    *,
    title: str | None = "Where each token looks",
    across: int = 6,
) -> Figure:
    """Return the attention of each token drawn over faces: the mean over all faces, then the first few one by one.

    Args:
        images: RGB uint8 faces ``(B, H, W, 3)``.
        maps: Attention ``(B, K, h, w)``, each map summing to 1.
        names: Names of the K tokens.
        title: Heading.
        across: Tokens side by side.

    Raises:
        DataError: If there is not one map per face and name.
    """
    maps = np.asarray(maps, float)
    if maps.ndim != 4 or len(maps) != len(images) or maps.shape[1] != len(names):
        raise DataError(
            f"attention of shape {maps.shape} for {len(images)} faces and {len(names)} tokens; expected (B, K, h, w)"
        )
    if not len(images) or not names:
        return style.empty_figure(title, "no faces to show")
    average = np.stack([style.as_rgb(image) for image in images]).mean(0).astype(np.uint8)
    faces = [average, *(style.as_rgb(image) for image in images[:_FACES])]
    shown = [maps.mean(0), *maps[:_FACES]]
    bands = math.ceil(len(names) / across)
    width = style.WIDTH / across
    figure = style.new_figure(style.WIDTH, bands * (len(faces) * width + 0.25) + 0.75)
    figure.get_layout_engine().set(w_pad=0.02, h_pad=0.02, wspace=0.0, hspace=0.0)  # type: ignore[union-attr,call-arg]
    grid = figure.subplots(bands * len(faces), across, squeeze=False)
    for axes in grid.ravel():
        axes.set_axis_off()
    for token, name in enumerate(names):
        band, column = divmod(token, across)
        for row, (face, attention) in enumerate(zip(faces, shown, strict=True)):
            axes = grid[band * len(faces) + row, column]
            axes.imshow(overlay(face, attention[token]), gid=f"token {token}, row {row}")
            if row == 0:
                label = style.fit(f"{name}, peak {attention[token].max():.2f}", width - 0.1, style.SMALL_SIZE)
                axes.set_title(label, fontsize=style.SMALL_SIZE, color=style.INK, pad=2, parse_math=False)
    note = (
        f"First row: mean attention over {len(images)} faces, on the mean face, and its largest share at one position; "
        "below: single faces. Brighter is more; each map is scaled to its own largest value."
    )
    style.heading(figure, title, note)
    return figure


def overlay(image: np.ndarray, weights: np.ndarray) -> np.ndarray:
    """Return an RGB image ``(H, W, 3)`` darkened and coloured by weights ``(h, w)``, scaled to their largest one."""
    height, width = image.shape[:2]
    top = float(weights.max())
    scaled = cv2.resize((weights / top if top > 0 else weights).astype(np.float32), (width, height))
    strength = np.clip(scaled, 0, 1)[..., None]
    heat = colormaps[_HEAT](strength[..., 0])[..., :3] * 255
    grey = image.mean(-1, keepdims=True)
    return np.clip(grey * (1 - 0.65 * strength) + heat * 0.65 * strength, 0, 255).astype(np.uint8)


def weight_curves(
    curves: Mapping[str, Sequence[tuple[float, float]]],
    *,
    best: float | None = None,
    title: str | None = "Learned uncertainties",
) -> Figure:
    """Return learned standard deviations over training, a panel per task.

    Args:
        curves: Pairs of epoch and sigma by ``<task>/<output>``.
        best: Epoch whose weights were kept; a line in every panel.
        title: Heading.
    """
    panels: dict[str, dict[str, np.ndarray]] = {}
    for name, pairs in curves.items():
        task, _, output = name.partition("/")
        panels.setdefault(task, {})[output or task] = np.asarray(list(pairs), float).reshape(-1, 2)
    if not panels:
        return style.empty_figure(title, "no epoch has ended yet")
    across = min(3, len(panels))
    down = math.ceil(len(panels) / across)
    most = max(len(outputs) for outputs in panels.values())
    figure = style.new_figure(style.WIDTH if across > 1 else 5.4, 0.9 + down * (2.3 + 0.15 * math.ceil(most / 2)))
    grid = figure.subplots(down, across, squeeze=False, sharey=True).ravel()
    for axes in grid[len(panels) :]:
        axes.set_visible(False)
    for axes, (task, outputs) in zip(grid, panels.items(), strict=False):
        style.tidy(axes)
        handles = []
        for index, (output, points) in enumerate(outputs.items()):
            colour = style.PALETTE[index % len(style.PALETTE)]
            dashes = ("-", "--", ":")[index // len(style.PALETTE) % 3]
            look: dict[str, Any] = {"color": colour, "linestyle": dashes, "linewidth": 1.4}
            lonely = len(points) == 1
            axes.plot(points[:, 0], points[:, 1], **look, marker="o" if lonely else "", gid=f"{task}/{output}")
            handles.append(Line2D([], [], **look, label=f"{output} {points[-1, 1]:.2f}"))
        if best is not None:
            axes.axvline(best, color=style.MUTED, linewidth=0.9, linestyle=(0, (4, 3)), gid="best")
        epochs = np.concatenate([points[:, 0] for points in outputs.values()])
        if epochs.min() == epochs.max():
            axes.set_xlim(epochs[0] - 1, epochs[0] + 1)
        axes.xaxis.get_major_locator().set_params(integer=True)  # type: ignore[call-arg]
        axes.set_xlabel("epoch", fontsize=style.SMALL_SIZE, color=style.INK)
        axes.set_title(task, fontsize=style.TEXT_SIZE, color=style.INK, loc="left", parse_math=False)
        # Below the panel: a dozen lines leave no free corner.
        legend = axes.legend(
            handles=handles,
            fontsize=style.SMALL_SIZE,
            ncols=2,
            frameon=False,
            loc="upper center",
            bbox_to_anchor=(0.5, -0.2),
            handlelength=1.4,
            columnspacing=1.0,
        )
        for text in legend.get_texts():
            text.set_parse_math(False)
    note = "Standard deviation σ of each term, whose loss weighs 1 / σ² (half of that for squared errors)"
    style.heading(figure, title, f"{note}; last epoch's in numbers.")
    return figure
