# SPDX-License-Identifier: Apache-2.0
"""What a figure draws, read from its artists, for the tests of figures."""

from __future__ import annotations

import numpy as np
from matplotlib.figure import Figure
from matplotlib.text import Text


def by_gid(figure: Figure, gid: str) -> list:
    return figure.findobj(lambda artist: artist.get_gid() == gid)


def drawn_texts(figure: Figure) -> list[Text]:
    """Texts that a reader sees: matplotlib also keeps labels of hidden axes and of ticks beyond the axes' limits."""
    if not getattr(figure, "laid_out", False):
        # Everything but the pixels, once: the layout is what counts here, and it takes most of the time.
        figure.draw_without_rendering()
        figure.laid_out = True
    hidden = set()
    for axes in figure.axes:
        if not axes.get_visible():
            hidden |= set(axes.findobj(Text))
        for axis in (axes.xaxis, axes.yaxis):
            low, high = sorted(axis.get_view_interval())
            slack = 1e-6 * (high - low)
            for tick in axis.get_major_ticks() + axis.get_minor_ticks():
                if not low - slack <= tick.get_loc() <= high + slack or not axis.get_visible() or not axes.axison:
                    hidden |= {tick.label1, tick.label2}
    return [t for t in figure.findobj(Text) if t.get_text().strip() and t.get_visible() and t not in hidden]


def texts(figure: Figure) -> list[str]:
    return [text.get_text() for text in drawn_texts(figure)]


def all_text(figure: Figure) -> str:
    """All text on one line: notes are wrapped to the figure's width."""
    return " ".join(" ".join(texts(figure)).split())


def overlaps(figure: Figure) -> list[tuple[str, str]]:
    """Pairs of visible texts whose boxes overlap by more than a pixel in both directions."""
    shown = drawn_texts(figure)
    boxes = np.array([text.get_window_extent().extents for text in shown]).reshape(-1, 4)
    low = np.maximum(boxes[:, None, :2], boxes[None, :, :2])
    high = np.minimum(boxes[:, None, 2:], boxes[None, :, 2:])
    pairs = np.argwhere(np.triu((high - low > 1).all(2), 1))
    return [(shown[i].get_text(), shown[j].get_text()) for i, j in pairs]


def outside(figure: Figure) -> list[str]:
    """Visible texts that leave the figure."""
    shown = drawn_texts(figure)
    width, height = figure.canvas.get_width_height()
    found = []
    for text in shown:
        box = text.get_window_extent()
        if box.x0 < -1 or box.y0 < -1 or box.x1 > width + 1 or box.y1 > height + 1:
            found.append(text.get_text())
    return found


def pixels(figure: Figure) -> np.ndarray:
    figure.canvas.draw()
    return np.asarray(figure.canvas.buffer_rgba())[..., :3]
