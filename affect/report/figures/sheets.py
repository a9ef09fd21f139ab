# SPDX-License-Identifier: Apache-2.0
"""Sheets of faces: what a data set holds, what a model says about faces it has not seen, where its points lie."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import numpy as np
from matplotlib.axes import Axes
from matplotlib.collections import LineCollection
from matplotlib.figure import Figure
from matplotlib.patches import Rectangle

from affect.errors import DataError
from affect.report.figures import style

Images = Sequence[np.ndarray] | np.ndarray
"""RGB uint8 faces ``(H, W, 3)``, all of one size or each of its own."""

Answer = str | float | bool | None
"""A class name, a number, whether something occurs, or None where it is not labelled."""

_MARGIN, _GAP = 0.1, 0.12
_LINE = style.SMALL_SIZE * 1.32 / 72


@dataclass(frozen=True)
class _Text:
    """One line under a face: a left and a right part, each with a colour."""

    left: str
    right: str = ""
    left_colour: str = style.INK
    right_colour: str = style.MUTED
    middle: str = ""


@dataclass(frozen=True)
class _Cell:
    """Where a face was drawn, in inches, and how many inches its pixels take."""

    x: float
    y: float
    width: float
    height: float
    scale: float

    def place(self, points: np.ndarray) -> np.ndarray:
        """Return pixel coordinates (first pixel centre at 0) in inches."""
        return (np.asarray(points, float) + 0.5) * self.scale + [self.x, self.y]


def sample_sheet(
    images: Images,
    captions: Sequence[str],
    points: Sequence[np.ndarray | None] | np.ndarray | None = None,
    title: str | None = None,
    *,
    columns: int | None = None,
    lines: int = 4,
) -> Figure:
    """Return a grid of faces with their captions below and, if given, their points drawn.

    Args:
        images: RGB uint8 faces.
        captions: One text per face; it is wrapped to the face's width.
        points: Per face ``(P, 2)`` in pixels of its image (first pixel centre at 0) or None; NaN points are left out.
        title: Heading.
        columns: Faces per row; None chooses by their number.
        lines: Most lines of a caption.

    Raises:
        DataError: If there are not as many captions (and points) as images, or if an array is not an image.
    """
    count = style.same_length("sample sheet", images=images, captions=captions, points=points)
    if count == 0:
        return style.empty_figure(title, "no faces to show")
    across = columns or _columns(count)
    width = _cell_width(across)
    texts = [
        [_Text(line) for line in style.wrap(caption, width, style.SMALL_SIZE, lines=lines)] for caption in captions
    ]
    figure, axes, cells = _lay_out(images, texts, across, title)
    for cell, each in zip(cells, points if points is not None else [None] * count, strict=True):
        if each is not None:
            _draw_points(axes, cell, each, style.SKY, gid="points")
    return figure


def prediction_sheet(
    images: Images,
    predicted: Sequence[str | Mapping[str, Answer]],
    target: Sequence[str | Mapping[str, Answer]],
    *,
    tolerance: float | None = None,
    title: str | None = "Predictions on held-out faces",
    columns: int | None = None,
) -> Figure:
    """Return held-out faces with what the model says and what is true side by side, errors marked.

    Below a face stands one line per label: for a class the predicted and the true name; for a number the name, the
    predicted and the true number; all labels that only occur or not (booleans, e.g. action units) share three lines:
    found, false alarm, missed. A cross and colour mark errors, and a frame a face with a wrong class.

    Args:
        images: RGB uint8 faces.
        predicted: Per face the name of its class, or answers by label name.
        target: The same for what is true; a label that is absent or None is not labelled and never an error.
        tolerance: Largest difference of numbers that is no error; None marks no number.
        title: Heading.
        columns: Faces per row; None chooses by what stands below them.

    Raises:
        DataError: If there are not as many predictions and targets as images, or if an array is not an image.
    """
    count = style.same_length("prediction sheet", images=images, predictions=predicted, targets=target)
    if count == 0:
        return style.empty_figure(title, "no faces to show")
    pairs = [(_answers(p), _answers(t)) for p, t in zip(predicted, target, strict=True)]
    numbers = any(_is_number(value) for p, _ in pairs for value in p.values())
    across = columns or min(_columns(count), 4 if numbers else 6)
    width = _cell_width(across)
    texts = [_compare(p, t, tolerance, width) for p, t in pairs]
    note = "Below each face: predicted, then true in grey. ✗ marks an error."
    figure, axes, cells = _lay_out(images, texts, across, title, note)
    for cell, (p, t) in zip(cells, pairs, strict=True):
        if any(isinstance(p[k], str) and t.get(k) is not None and t[k] != p[k] for k in p):
            axes.add_patch(
                Rectangle(
                    (cell.x, cell.y),
                    cell.width,
                    cell.height,
                    fill=False,
                    edgecolor=style.WRONG,
                    linewidth=2.5,
                    gid="wrong",
                )
            )
    return figure


def landmark_sheet(
    images: Images,
    points: Sequence[np.ndarray] | np.ndarray,
    target: Sequence[np.ndarray | None] | np.ndarray | None = None,
    *,
    errors: Sequence[float] | np.ndarray | None = None,
    unit: str = "%",
    title: str | None = "Landmarks",
    columns: int | None = None,
    note: str = "Blue: predicted. White: true.",
) -> Figure:
    """Return faces with predicted points, true points and the lines between them.

    Args:
        images: RGB uint8 faces.
        points: Predicted ``(P, 2)`` per face in pixels of its image (first pixel centre at 0).
        target: True points, likewise; NaN where a point is not labelled, None where a face is not.
        errors: Normalised mean error of each face, written below it; NaN where it has none.
        unit: Unit of the errors.
        title: Heading.
        columns: Faces per row; None chooses by their number.
        note: What the colours mean, written where there are true points.

    Raises:
        DataError: If there are not as many of each as images, if numbers of points differ, or if an array is not an
            image.
    """
    count = style.same_length("landmark sheet", images=images, predictions=points, targets=target, errors=errors)
    if count == 0:
        return style.empty_figure(title, "no faces to show")
    across = columns or min(_columns(count), 5)
    texts: list[list[_Text]] = [[] for _ in range(count)]
    if errors is not None:
        shown = [f"{value:.2f} {unit}" if math.isfinite(value) else "no error" for value in np.asarray(errors, float)]
        texts = [[_Text(line)] for line in shown]
    figure, axes, cells = _lay_out(images, texts, across, title, note if target is not None else None)
    true = target if target is not None else [None] * count
    for cell, each, known in zip(cells, points, true, strict=True):
        if known is not None:
            if np.shape(known) != np.shape(each):
                raise DataError(f"landmark sheet: predicted points {np.shape(each)}, true points {np.shape(known)}")
            _draw_points(axes, cell, known, style.PAPER, gid="true")
            ends = np.stack([cell.place(known), cell.place(each)], 1)
            ends = ends[np.isfinite(ends).all((1, 2))]
            axes.add_collection(LineCollection(list(ends), colors=style.YELLOW, linewidths=0.8, zorder=4, gid="joined"))
        _draw_points(axes, cell, each, style.SKY, gid="predicted")
    return figure


def _columns(count: int) -> int:
    return count if count <= 5 else int(np.clip(math.ceil(math.sqrt(count * 1.7)), 5, 8))


def _cell_width(across: int) -> float:
    return min((style.WIDTH - 2 * _MARGIN + _GAP) / across - _GAP, 2.2)


def _lay_out(
    images: Images, texts: Sequence[Sequence[_Text]], across: int, title: str | None, note: str | None = None
) -> tuple[Figure, Axes, list[_Cell]]:
    """Return a figure with faces and lines, the one axes in inches that holds them, and each face's place.

    One axes for everything: a sheet with an axes per face takes seconds where this takes a blink.
    """
    faces = [style.as_rgb(image) for image in images]
    width = _cell_width(across)
    heights = [min(width * face.shape[0] / face.shape[1], 1.6 * width) for face in faces]
    rows = [range(start, min(start + across, len(faces))) for start in range(0, len(faces), across)]
    full = max(2 * _MARGIN + across * (width + _GAP) - _GAP, 3.2)
    titles = style.wrap(title, full - 2 * _MARGIN, style.TITLE_SIZE, bold=True) if title else []
    notes = style.wrap(note, full - 2 * _MARGIN, style.SMALL_SIZE) if note else []
    title_line = style.TITLE_SIZE * 1.3 / 72
    top = _MARGIN + len(titles) * title_line + (0.06 if titles else 0)
    spans = [max(heights[i] for i in row) + max(len(texts[i]) for i in row) * _LINE + 0.05 for row in rows]
    height = top + sum(spans) + _GAP * (len(rows) - 1) + len(notes) * _LINE + (0.1 if notes else 0) + _MARGIN

    figure = style.new_figure(full, height, layout=None)
    axes = figure.add_axes((0.0, 0.0, 1.0, 1.0))
    axes.set_axis_off()
    axes.set(xlim=(0, full), ylim=(height, 0))
    axes.set_autoscale_on(False)
    for index, line in enumerate(titles):
        _write(axes, _MARGIN, _MARGIN + index * title_line, line, size=style.TITLE_SIZE, weight="bold")
    cells = []
    y = top
    for row, span in zip(rows, spans, strict=True):
        tallest = max(heights[i] for i in row)
        for place, i in enumerate(row):
            scale = min(width / faces[i].shape[1], heights[i] / faces[i].shape[0])
            drawn = (faces[i].shape[1] * scale, faces[i].shape[0] * scale)
            left = _MARGIN + place * (width + _GAP)
            # Faces of a row share their lower edge, so that captions stand on one line.
            cell = _Cell(left + (width - drawn[0]) / 2, y + tallest - drawn[1], *drawn, scale)
            cells.append(cell)
            enlarged = scale * style.DPI > 1
            axes.imshow(
                faces[i],
                extent=(cell.x, cell.x + cell.width, cell.y + cell.height, cell.y),
                interpolation="bicubic" if enlarged else "antialiased",
                aspect="auto",
                gid=f"face {i}",
            )
            for index, text in enumerate(texts[i]):
                baseline = y + tallest + 0.05 + index * _LINE
                _write(axes, left, baseline, text.left, colour=text.left_colour)
                _write(axes, left + width * 0.8, baseline, text.middle, colour=text.left_colour, align="right")
                _write(axes, left + width, baseline, text.right, colour=text.right_colour, align="right")
        y += span + _GAP
    # Drawing an image resets the limits to its own extent.
    axes.set(xlim=(0, full), ylim=(height, 0))
    for index, line in enumerate(notes):
        _write(axes, _MARGIN, height - _MARGIN - (len(notes) - index) * _LINE, line, colour=style.MUTED)
    return figure, axes, cells


def _write(
    axes: Axes,
    x: float,
    y: float,
    text: str,
    *,
    size: float = style.SMALL_SIZE,
    colour: str = style.INK,
    weight: str = "normal",
    align: str = "left",
) -> None:
    if text:
        axes.text(x, y, text, fontsize=size, color=colour, fontweight=weight, ha=align, va="top", parse_math=False)


def _draw_points(axes: Axes, cell: _Cell, points: np.ndarray, colour: str, gid: str) -> None:
    placed = cell.place(points)
    placed = placed[np.isfinite(placed).all(1)]
    # Points outside the crop would lie on a neighbour.
    inside = (placed >= [cell.x, cell.y]).all(1) & (placed <= [cell.x + cell.width, cell.y + cell.height]).all(1)
    placed = placed[inside]
    diameter = float(np.clip(cell.width * 72 * 0.16 / math.sqrt(max(len(placed), 1)), 1.3, 4.5))
    axes.scatter(
        placed[:, 0],
        placed[:, 1],
        s=diameter**2,
        color=colour,
        edgecolors="#101010",
        linewidths=0.3,
        zorder=5,
        clip_on=True,
        gid=gid,
    )


def _answers(given: str | Mapping[str, Answer]) -> dict[str, Answer]:
    return {"": given} if isinstance(given, str) else dict(given)


def _is_number(value: Answer) -> bool:
    return isinstance(value, (int, float, np.integer, np.floating)) and not isinstance(value, bool)


def _is_flag(value: Answer) -> bool:
    return isinstance(value, (bool, np.bool_))


def _compare(
    predicted: Mapping[str, Answer], target: Mapping[str, Answer], tolerance: float | None, width: float
) -> list[_Text]:
    lines = []
    flags = [name for name, value in predicted.items() if _is_flag(value)]
    for name, said in predicted.items():
        true = target.get(name)
        if isinstance(said, str):
            lines += _compare_names(said, true, width)
        elif _is_number(said):
            lines.append(_compare_numbers(name, float(said), true, tolerance, width))  # type: ignore[arg-type]
    if flags:
        lines += _compare_flags(flags, predicted, target, width)
    return lines


def _compare_names(said: str, true: Answer, width: float) -> list[_Text]:
    if true is None:
        return [_Text(style.fit(said, width * 0.8, style.SMALL_SIZE), "–")]
    wrong = said != str(true)
    colour = style.WRONG if wrong else style.INK
    left, right = f"{'✗' if wrong else '✓'} {said}", str(true)
    if style.text_width(left, style.SMALL_SIZE) + style.text_width(right, style.SMALL_SIZE) + 0.06 <= width:
        return [_Text(left, right, colour)]
    # Names too long for one line stand on two, rather than both cut short.
    left, right = (style.fit(name, width, style.SMALL_SIZE) for name in (left, right))
    return [_Text(left, left_colour=colour), _Text("", right)]


def _compare_numbers(name: str, said: float, true: Answer, tolerance: float | None, width: float) -> _Text:
    known = true is not None and _is_number(true) and math.isfinite(float(true))
    wrong = bool(known and tolerance is not None and not abs(said - float(true)) <= tolerance)  # type: ignore[arg-type]
    middle = f"{'✗ ' if wrong else ''}{said:.2f}" if math.isfinite(said) else "–"
    right = f"{float(true):.2f}" if known else "–"  # type: ignore[arg-type]
    room = width * 0.8 - style.text_width(middle, style.SMALL_SIZE) - 0.05
    return _Text(style.fit(name, room, style.SMALL_SIZE), right, style.WRONG if wrong else style.INK, middle=middle)


def _compare_flags(
    names: Sequence[str], predicted: Mapping[str, Answer], target: Mapping[str, Answer], width: float
) -> list[_Text]:
    known = [name for name in names if target.get(name) is not None]
    unknown = [name for name in names if name not in known and predicted[name]]
    groups = (
        ("✓ ", [n for n in known if predicted[n] and target[n]], style.INK),
        ("✗ false ", [n for n in known if predicted[n] and not target[n]], style.WRONG),
        ("✗ missed ", [n for n in known if not predicted[n] and target[n]], style.WRONG),
        ("not labelled ", unknown, style.MUTED),
    )
    lines = [
        _Text(line, left_colour=colour)
        for mark, group, colour in groups
        if group
        for line in style.wrap(mark + " ".join(_shorten(group)), width, style.SMALL_SIZE, lines=3)
    ]
    return lines or [_Text("✓ none" if known else "none", left_colour=style.INK)]


def _shorten(names: Sequence[str]) -> list[str]:
    """Action units in FACS notation: ``AU6 AU12`` reads ``AU 6+12``."""
    if len(names) > 1 and all(name.startswith("AU") and name[2:].isdigit() for name in names):
        return ["AU", "+".join(name[2:] for name in names)]
    return list(names)
