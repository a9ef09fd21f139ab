# SPDX-License-Identifier: Apache-2.0
"""One place for the look of all figures: sizes, colours, text that fits, and saving.

Figures are built with matplotlib's object-oriented interface on the Agg canvas: no pyplot, so no global list of open
figures, no back end to choose and nothing to close. They are sized for the width of a README page or of a paper's
text block, about 8 inches, at which the smallest text is readable.
"""

from __future__ import annotations

import functools
import os
from collections.abc import Sequence
from pathlib import Path

import matplotlib as mpl
import numpy as np
from matplotlib.artist import Artist
from matplotlib.axes import Axes
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.figure import Figure
from PIL import Image, ImageFont

from affect.errors import ConfigError, DataError
from affect.files import replacing

WIDTH = 8.0
"""Width of a figure in inches."""

DPI = 160
"""Pixels per inch of a saved raster image: 1280 pixels over the full width."""

TITLE_SIZE, TEXT_SIZE, SMALL_SIZE = 12.0, 9.0, 7.5
"""Font sizes in points."""

INK, MUTED, GRID, PAPER = "#222222", "#6b6b6b", "#e4e4e4", "#ffffff"
"""Text and axes; secondary text; grid lines; background."""

BLUE, ORANGE, GREEN, VERMILLION = "#0072b2", "#e69f00", "#009e73", "#d55e00"
PURPLE, SKY, YELLOW, BLACK = "#cc79a7", "#56b4e9", "#f0e442", "#000000"

PALETTE = (BLUE, ORANGE, GREEN, PURPLE, VERMILLION, SKY, YELLOW, BLACK)
"""Colours that stay apart under every common colour-vision deficiency (Okabe and Ito, 2008)."""

PREDICTED, TRUE, WRONG, CONSTANT = BLUE, ORANGE, VERMILLION, VERMILLION
"""What the colours mean, the same in every figure."""

SCORE, POOR_SCORE = SKY, "#bdbdbd"
"""Bars, light enough for an interval on top: a score, and one that does not beat the best constant predictor."""

DENSITY = "Blues"
"""Colour map of counts and proportions: one hue, light to dark, so that it also prints in grey."""

_FORMATS = (".png", ".pdf", ".svg")
_INCH_TO_POINTS = 72.0
_EDGE = 0.08
_SPACING = 1.25
_MEASURE = 100


def new_figure(width: float = WIDTH, height: float = 4.0, *, layout: str | None = "constrained") -> Figure:
    """Return an empty white figure on its own Agg canvas.

    Args:
        width: Inches.
        height: Inches.
        layout: ``constrained`` lets matplotlib keep labels apart, None leaves all placing to the caller.
    """
    figure = Figure(figsize=(width, height), dpi=DPI, facecolor=PAPER, layout=layout)  # type: ignore[arg-type]
    FigureCanvasAgg(figure)
    engine = figure.get_layout_engine()
    if engine is not None:
        engine.set(w_pad=0.08, h_pad=0.05)  # type: ignore[call-arg]
    return figure


def tidy(axes: Axes, *, grid: str | None = "both", size: float = SMALL_SIZE) -> Axes:
    """Return the axes with our look: two thin spines, quiet ticks, a faint grid behind the data.

    Args:
        axes: Axes to change.
        grid: ``x``, ``y``, ``both`` or None.
        size: Font size of the tick labels in points.
    """
    axes.spines[["top", "right"]].set_visible(False)
    axes.spines[["left", "bottom"]].set_color(MUTED)
    axes.spines[["left", "bottom"]].set_linewidth(0.8)
    axes.tick_params(colors=MUTED, labelcolor=INK, labelsize=size, length=2.5, width=0.8)
    axes.set_axisbelow(True)
    if grid is not None:
        axes.grid(visible=True, axis=grid, color=GRID, linewidth=0.7)  # type: ignore[arg-type]
    return axes


def heading(
    figure: Figure, title: str | None, note: str | None = None, handles: Sequence[Artist] | None = None
) -> None:
    """Write a title above and a note below a figure with constrained layout, both flush left and wrapped to its width.

    Args:
        figure: Figure to write on.
        title: What the figure shows.
        note: What a reader has to know to read it.
        handles: Labelled artists of a legend, which stands in one line between title and data.
    """
    width, height = figure.get_figwidth(), figure.get_figheight()
    lines = wrap(title, width - 2 * _EDGE, TITLE_SIZE, bold=True) if title else []
    notes = wrap(note, width - 2 * _EDGE, SMALL_SIZE) if note else []
    top = _EDGE if lines or handles else 0.0
    if lines:
        _write(figure, lines, height - top, size=TITLE_SIZE, weight="bold", va="top")
        top += len(lines) * TITLE_SIZE * _SPACING / _INCH_TO_POINTS
    if handles:
        legend = figure.legend(
            handles=list(handles),
            loc="upper left",
            bbox_to_anchor=((_EDGE - 0.03) / width, 1 - top / height),
            ncols=len(handles),
            frameon=False,
            fontsize=SMALL_SIZE,
            borderaxespad=0.0,
            borderpad=0.3,
            columnspacing=1.4,
            handlelength=1.6,
        )
        for label in legend.get_texts():
            label.set_parse_math(False)
        top += SMALL_SIZE * 2.0 / _INCH_TO_POINTS
    bottom = 0.0
    if notes:
        _write(figure, notes, _EDGE, size=SMALL_SIZE, colour=MUTED, va="bottom")
        bottom = _EDGE + len(notes) * SMALL_SIZE * _SPACING / _INCH_TO_POINTS
    engine = figure.get_layout_engine()
    if engine is not None:
        # The layout has the rest: it would put a legend that it places itself over the title.
        engine.set(rect=(0, bottom / height, 1, 1 - (top + bottom) / height))  # type: ignore[call-arg]


def empty_figure(title: str | None, message: str) -> Figure:
    """Return a small figure that says why there is nothing to draw."""
    figure = new_figure(WIDTH, 1.4)
    heading(figure, title)
    axes = figure.add_subplot()
    axes.set_axis_off()
    axes.text(0.5, 0.5, message, ha="center", va="center", fontsize=TEXT_SIZE, color=MUTED, parse_math=False)
    return figure


def _write(figure: Figure, lines: Sequence[str], y: float, *, size: float, va: str, **more: str) -> None:
    figure.text(
        _EDGE / figure.get_figwidth(),
        y / figure.get_figheight(),
        "\n".join(lines),
        ha="left",
        va=va,
        fontsize=size,
        linespacing=_SPACING,
        color=more.get("colour", INK),
        fontweight=more.get("weight", "normal"),
        parse_math=False,
    )


def save(figure: Figure, path: str | os.PathLike[str], *, dpi: int = DPI) -> Path:
    """Write a figure atomically and return its path. The same figure gives the same bytes.

    Args:
        figure: Figure to write.
        path: File ending in ``.png``, ``.pdf`` or ``.svg``; its folder is made if it is missing.
        dpi: Pixels per inch of raster images.

    Raises:
        ConfigError: If the file's ending is another.
    """
    path = Path(path)
    if path.suffix.lower() not in _FORMATS:
        raise ConfigError(f"{path}: cannot save a figure as {path.suffix or 'a file without ending'}; use .png or .pdf")
    # Dates and versions would make equal figures differ.
    stamp: dict[str, dict[str, str | None]] = {
        ".png": {"Software": None},
        ".pdf": {"CreationDate": None, "Producer": None, "Creator": None},
        ".svg": {"Date": None, "Creator": None},
    }
    suffix = path.suffix.lower()
    with replacing(path) as part:
        figure.savefig(part, dpi=dpi, format=suffix[1:], metadata=stamp[suffix], facecolor=PAPER)  # type: ignore[arg-type]
    return path


def save_image(image: np.ndarray, path: str | os.PathLike[str]) -> Path:
    """Write an RGB image ``(H, W, 3)`` uint8 atomically as PNG or JPEG, by the file's ending, and return its path.

    Raises:
        ConfigError: If the file's ending is neither.
        DataError: If the array is not an image.
    """
    path = Path(path)
    if path.suffix.lower() not in {".png", ".jpg", ".jpeg"}:
        raise ConfigError(f"{path}: cannot save an image as {path.suffix or 'a file without ending'}; use .png or .jpg")
    picture = Image.fromarray(as_rgb(image))
    with replacing(path) as part:
        if path.suffix.lower() == ".png":
            picture.save(part, format="PNG", compress_level=4)
        else:
            picture.save(part, format="JPEG", quality=92, subsampling=0)
    return path


def as_rgb(image: np.ndarray) -> np.ndarray:
    """Return an image as contiguous RGB uint8 ``(H, W, 3)``; grey images ``(H, W)`` and ``(H, W, 1)`` are repeated.

    Raises:
        DataError: If the array is not an 8-bit image with at least one pixel.
    """
    image = np.asarray(image)
    if image.ndim == 2:
        image = image[..., None]
    if image.dtype != np.uint8 or image.ndim != 3 or image.shape[2] not in {1, 3} or image.size == 0:
        raise DataError(
            f"image of shape {image.shape} and type {image.dtype}: expected uint8 (height, width, 3) in RGB"
        )
    return np.ascontiguousarray(np.repeat(image, 3, axis=2) if image.shape[2] == 1 else image)


def same_length(what: str, **lists: Sequence[object] | np.ndarray | None) -> int:
    """Return the common length of what a figure gets, leaving out None.

    Raises:
        DataError: If the lengths differ; the message names each.
    """
    lengths = {name: len(value) for name, value in lists.items() if value is not None}
    if len(set(lengths.values())) > 1:
        raise DataError(
            f"{what}: {', '.join(f'{size} {name}' for name, size in lengths.items())}; give as many of each"
        )
    return next(iter(lengths.values()), 0)


@functools.cache
def font(size: int, *, bold: bool = False) -> ImageFont.FreeTypeFont:
    """Return DejaVu Sans at a size in pixels; it comes with matplotlib, so every machine draws the same letters."""
    name = "DejaVuSans-Bold.ttf" if bold else "DejaVuSans.ttf"
    return ImageFont.truetype(str(Path(mpl.get_data_path()) / "fonts" / "ttf" / name), size)


def text_width(text: str, size: float, *, bold: bool = False) -> float:
    """Return the width in inches of one line of text at ``size`` points."""
    # Measured at a large size, where hinting does not matter, and scaled.
    return font(_MEASURE, bold=bold).getlength(text) / _MEASURE * size / _INCH_TO_POINTS


def fit(text: str, width: float, size: float, *, bold: bool = False) -> str:
    """Return the text, shortened with an ellipsis if it is wider than ``width`` inches at ``size`` points."""
    return fit_pixels(text, width * _INCH_TO_POINTS / size * _MEASURE, font(_MEASURE, bold=bold))


def fit_pixels(text: str, width: float, letters: ImageFont.FreeTypeFont) -> str:
    """Return the text, shortened with an ellipsis if it is wider than ``width`` pixels; empty if nothing fits."""
    if letters.getlength(text) <= width:
        return text
    low, high = -1, len(text)
    while low < high:
        middle = (low + high + 1) // 2
        if letters.getlength(text[:middle].rstrip() + "…") <= width:
            low = middle
        else:
            high = middle - 1
    return text[:low].rstrip() + "…" if low >= 0 else ""


def wrap(text: str, width: float, size: float, *, lines: int | None = None, bold: bool = False) -> list[str]:
    """Return the text in lines no wider than ``width`` inches at ``size`` points.

    Args:
        text: Text; its own line breaks are kept.
        width: Inches.
        size: Points.
        lines: Most lines to return; the last ends in an ellipsis if text is left over. None keeps all.
        bold: Whether the text is bold.
    """
    found: list[str] = []
    for paragraph in text.splitlines() or [""]:
        line = ""
        for word in paragraph.split():
            longer = f"{line} {word}" if line else word
            if not line or text_width(longer, size, bold=bold) <= width:
                line = longer
            else:
                found.append(line)
                line = word
        found.append(line)
    if lines is not None and len(found) > lines:
        found = [*found[: lines - 1], found[lines - 1] + " …"]
    return [fit(line, width, size, bold=bold) for line in found]
