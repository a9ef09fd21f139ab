# SPDX-License-Identifier: Apache-2.0
"""How a gate spreads the classes of a variable over its experts."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
from matplotlib import colormaps
from matplotlib.figure import Figure

from affect.errors import DataError
from affect.report.figures import style

_READABLE = 0.36
"""Smallest cell, in inches, that holds a percentage."""


def gate_usage(
    usage: np.ndarray | Sequence[Sequence[float]],
    classes: Sequence[str],
    rows: Sequence[int],
    *,
    by: str = "class",
    information: float | None = None,
    title: str | None = "Use of the gate's leaves",
) -> Figure:
    """Return the mean weight of each leaf (column) for the images of each class (row), in per cent.

    Leaves keep their order in the tree, so that neighbours share decisions.

    Args:
        usage: Mean weights ``(C, L)``; rows sum to 1.
        classes: Names of the C classes.
        rows: Number of images of each class.
        by: What a class is, for the note.
        information: Mutual information of class and largest leaf in nats; None leaves it out.
        title: Heading.

    Raises:
        DataError: If shapes do not fit, or rows are no weights.
    """
    shares = np.asarray(usage, float)
    if shares.ndim != 2 or len(shares) != len(classes) or len(classes) != len(rows):
        raise DataError(f"use of a gate: shape {shares.shape} for {len(classes)} classes and {len(rows)} counts")
    if not len(classes):
        return style.empty_figure(title, "no class is known")
    if not np.isfinite(shares).all() or shares.min() < -1e-6 or abs(shares.sum(1) - 1).max() > 1e-3:
        raise DataError("use of a gate: rows must hold weights that sum to 1")
    count, leaves = shares.shape
    width = float(np.clip(6.6 / leaves, 0.2, 0.7))
    height = float(np.clip(6.2 / count, 0.24, 0.5))
    names = [f"{style.fit(name, 2.0, style.TEXT_SIZE)}  ({n:,})" for name, n in zip(classes, rows, strict=True)]
    side = max(style.text_width(name, style.TEXT_SIZE) for name in names)
    figure = style.new_figure(max(width * leaves + side + 0.9, 4.8), height * count + 2.0)
    axes = figure.add_subplot()
    top = max(float(shares.max()), 2 / leaves)
    axes.imshow(shares, cmap=style.DENSITY, vmin=0, vmax=top, aspect="auto", gid="usage")
    step = 1 if leaves <= 16 else 4
    axes.set_xticks(range(0, leaves, step), [str(k + 1) for k in range(0, leaves, step)])
    axes.set_yticks(range(count), names)
    axes.tick_params(length=0, labelsize=style.TEXT_SIZE, labelcolor=style.INK)
    for tick in axes.get_yticklabels():
        tick.set(parse_math=False)
    axes.spines[:].set_visible(False)
    axes.set_xlabel("leaf", fontsize=style.TEXT_SIZE, color=style.INK)
    if width >= _READABLE:
        colours = colormaps[style.DENSITY]
        for (c, leaf), share in np.ndenumerate(shares):
            red, green, blue, _ = colours(share / top)
            ink = "white" if 0.299 * red + 0.587 * green + 0.114 * blue < 0.55 else style.INK
            place = {"ha": "center", "va": "center", "fontsize": style.SMALL_SIZE, "color": ink}
            axes.text(leaf, c, f"{share * 100:.0f}", gid=f"{c},{leaf}", **place)  # type: ignore[arg-type]
    told = "" if information is None else f" Class and largest leaf share {information:.2f} nats."
    style.heading(figure, title, f"Mean weight of a leaf in per cent by {by} (number of images).{told}")
    return figure
