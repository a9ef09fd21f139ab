# SPDX-License-Identifier: Apache-2.0
"""A photograph with what a model reads in its faces: drawn on and beside the picture, crisp at any size.

Boxes and points lie on the picture; all text stands in a panel at its right, so that it never covers a face and never
leaves the image. Small pictures are enlarged by a whole factor first, as text of a readable size would not fit them.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field

import cv2
import numpy as np
from PIL import Image, ImageDraw

from affect.errors import DataError
from affect.report.figures import style
from affect.report.records import facs_name

_PANEL, _TRACK, _RULE = (250, 250, 250), (224, 224, 224), (200, 200, 200)
_SHIFT = 4
_SMALLEST_SIDE = 384
_LONGEST_SIDE = 4096
"""Up to which a long, narrow picture is enlarged: a line of 60,000 pixels would need 26 GB."""
_SMALLEST_TEXT = 11
_PANEL_WIDTH = 17.0
"""Width of a panel's column in units of its text size."""


def _rgb(colour: str) -> tuple[int, int, int]:
    return int(colour[1:3], 16), int(colour[3:5], 16), int(colour[5:7], 16)


_INK, _MUTED, _BAR, _DOT = _rgb(style.INK), _rgb(style.MUTED), _rgb(style.BLUE), _rgb(style.VERMILLION)
_BOX, _POINT = (255, 255, 255), _rgb(style.SKY)
_POINT_NAME = "blue"
_FURTHER = (("orange", _rgb(style.ORANGE)), ("green", _rgb(style.GREEN)), ("pink", _rgb(style.PURPLE)))
"""Colours of further sets of points, in turn."""


@dataclass(frozen=True, eq=False)
class FaceNote:
    """What is known about one face of a picture.

    Attributes:
        box: ``x1 y1 x2 y2`` in pixels of the picture, first pixel centre at 0.
        points: ``(P, 2)`` in pixels of the picture; NaN points are left out.
        further: Further sets of points by name, each ``(P, 2)``: drawn in colours of their own, which a line names.
        points_name: What ``points`` are, named beside their colour where there are further sets.
        expression: Name of the most probable class and its probability; a probability of NaN is not written.
        bars: Values by name, e.g. action units; the largest are drawn as bars.
        bar_limit: Value of a full bar: 1 for probabilities and coefficients, 5 for intensities.
        affect: Valence and arousal, each in [-1, 1].
        lines: Further lines of text.
        bar_limits: Value of a full bar of single names, where it is not ``bar_limit``.
        number: What the face is called at its box and above its values; None counts the faces of a picture from 1.
    """

    box: Sequence[float] | np.ndarray | None = None
    points: np.ndarray | None = None
    expression: tuple[str, float] | None = None
    bars: Mapping[str, float] = field(default_factory=dict)
    bar_limit: float = 1.0
    affect: tuple[float, float] | None = None
    lines: Sequence[str] = ()
    bar_limits: Mapping[str, float] = field(default_factory=dict)
    number: int | None = None
    further: Mapping[str, np.ndarray] = field(default_factory=dict)
    points_name: str = "points"


def annotate_face(
    image: np.ndarray,
    box: Sequence[float] | np.ndarray | None = None,
    points: np.ndarray | None = None,
    lines: Sequence[str] = (),
    *,
    expression: tuple[str, float] | None = None,
    bars: Mapping[str, float] | None = None,
    bar_limit: float = 1.0,
    affect: tuple[float, float] | None = None,
    top: int = 6,
) -> np.ndarray:
    """Return a picture with one annotated face; ``FaceNote`` tells what the arguments mean.

    Args:
        image: RGB uint8 ``(H, W, 3)``; it is not changed.
        box: ``x1 y1 x2 y2`` in pixels.
        points: ``(P, 2)`` in pixels.
        lines: Further lines of text.
        expression: Class and its probability.
        bars: Values by name.
        bar_limit: Value of a full bar.
        affect: Valence and arousal.
        top: Most bars to draw.

    Returns:
        RGB uint8: the picture, enlarged by a whole factor if it is small, with a panel at its right.
    """
    note = FaceNote(box, points, expression, bars or {}, bar_limit, affect, lines)
    return annotate_faces(image, [note], top=top)


def annotate_faces(image: np.ndarray, faces: Sequence[FaceNote], *, top: int = 6) -> np.ndarray:
    """Return a picture with all its faces annotated, numbered if there are several; without any, it says so.

    Args:
        image: RGB uint8 ``(H, W, 3)``; it is not changed.
        faces: What is known about each face.
        top: Most bars to draw per face.

    Returns:
        RGB uint8: the picture, enlarged by a whole factor if it is small, with a panel at its right.

    Raises:
        DataError: If the image is not one, or if a box or points have the wrong shape.
    """
    image = style.as_rgb(image)
    factor = enlargement(image.shape[0], image.shape[1])
    height, width = image.shape[0] * factor, image.shape[1] * factor
    picture = cv2.resize(image, (width, height), interpolation=cv2.INTER_CUBIC) if factor > 1 else image.copy()
    for face in faces:
        _draw_face(picture, face, factor)

    cards = [_card_rows(face, top) for face in faces] or [[_Line("no face found")]]
    size = _text_size(height, width, cards)
    panel_width = min(round(_PANEL_WIDTH * size), max(width * 3, _PANEL_WIDTH * _SMALLEST_TEXT))
    numbered = len(faces) > 1
    columns = _flow([_card_height(rows, size, numbered) for rows in cards], height)
    full = (max([height, *(column[-1][2] for column in columns)]), width + panel_width * len(columns))
    canvas = np.full((*full, 3), _PANEL, np.uint8)
    canvas[:height, :width] = picture
    texts: list[_Placed] = []
    for index, column in enumerate(columns):
        left = width + index * panel_width
        for card, upper, _ in column:
            label = _number(faces[card], card) if numbered else None
            texts += _draw_card(canvas, cards[card], left, upper, panel_width, size, label)
    if numbered:
        for index, face in enumerate(faces):
            texts += _draw_tag(canvas, face, factor, (height, width), size, str(_number(face, index)))
    return _write(canvas, texts)


def annotate_frame(image: np.ndarray, faces: Sequence[FaceNote], *, top: int = 4) -> np.ndarray:
    """Return a frame of a video with its faces annotated; frames of one size give pictures of one size.

    The panel at the right has room for some faces; for further ones it says how many they are, and they are drawn and
    numbered in the picture all the same.

    Args:
        image: RGB uint8 ``(H, W, 3)``; it is not changed.
        faces: What is known about each face; ``FaceNote.number`` keeps a face's number through the video.
        top: Most bars to draw per face.

    Returns:
        RGB uint8, as ``annotate_faces``.
    """
    image = style.as_rgb(image)
    factor = enlargement(image.shape[0], image.shape[1])
    height, width = image.shape[0] * factor, image.shape[1] * factor
    picture = cv2.resize(image, (width, height), interpolation=cv2.INTER_CUBIC) if factor > 1 else image.copy()
    for face in faces:
        _draw_face(picture, face, factor)
    size = max(_SMALLEST_TEXT, min(round(math.sqrt(height * width) / 34), round(0.6 * width / _PANEL_WIDTH)))
    panel_width = round(_PANEL_WIDTH * size)
    canvas = np.full((height, width + panel_width, 3), _PANEL, np.uint8)
    canvas[:, :width] = picture
    texts: list[_Placed] = []
    upper = 0
    cards = [_card_rows(face, top) for face in faces]
    for index, rows in enumerate(cards):
        left_over = len(cards) - index
        room = height - upper - (0 if left_over == 1 else 2 * size)
        needed = _card_height(rows, size, numbered=True)
        while needed > room and len(rows) > 1:  # a shorter card says more than none
            rows = rows[:-1]
            needed = _card_height(rows, size, numbered=True)
        if needed > room:
            further = f"{left_over} more face{'s' if left_over > 1 else ''}"
            texts.append(
                _Placed(further, width + 0.9 * size, upper + 1.4 * size, panel_width - 1.8 * size, size, _MUTED)
            )
            break
        texts += _draw_card(canvas, rows, width, upper, panel_width, size, _number(faces[index], index))
        upper += needed
    if not faces:
        texts.append(_Placed("no face found", width + 0.9 * size, 1.8 * size, panel_width - 1.8 * size, size, _MUTED))
    for index, face in enumerate(faces):
        texts += _draw_tag(canvas, face, factor, (height, width), size, str(_number(face, index)))
    return _write(canvas, texts)


def _number(face: FaceNote, index: int) -> int:
    return index + 1 if face.number is None else face.number


def enlargement(height: int, width: int) -> int:
    """Return the whole factor by which ``annotate_faces`` enlarges a picture of this size."""
    if min(height, width) >= _SMALLEST_SIDE * 0.75:
        return 1
    return max(1, min(math.ceil(_SMALLEST_SIDE / min(height, width)), _LONGEST_SIDE // max(height, width)))


@dataclass(frozen=True)
class _Line:
    """A line of text; the right part stands flush right."""

    left: str
    right: str = ""
    bold: bool = False
    height: float = 1.45


@dataclass(frozen=True)
class _Bar:
    """A named bar with its number."""

    name: str
    value: float
    share: float
    height: float = 1.95


@dataclass(frozen=True)
class _Circle:
    """A small circumplex with a dot."""

    valence: float
    arousal: float
    height: float = 6.6


_Row = _Line | _Bar | _Circle


@dataclass(frozen=True)
class _Placed:
    """Text at its place on the canvas: the anchor is a PIL anchor, the width what it must fit into, all in pixels."""

    text: str
    x: float
    y: float
    width: float
    size: int
    colour: tuple[int, int, int] = _INK
    anchor: str = "ls"
    bold: bool = False


def _card_rows(face: FaceNote, top: int) -> list[_Row]:
    rows: list[_Row] = []
    if face.expression is not None:
        name, probability = face.expression
        right = f"{probability * 100:.0f} %" if math.isfinite(probability) else ""
        rows.append(_Line(name, right, bold=True, height=1.8))
    known = {name: float(value) for name, value in face.bars.items() if math.isfinite(value)}
    limits = {name: float(face.bar_limits.get(name, face.bar_limit)) for name in known}
    for limit in (face.bar_limit, *limits.values()):
        if not limit > 0:
            raise DataError(f"annotation: bar_limit {limit}; give the value of a full bar, e.g. 1 or 5")
    for name in sorted(known, key=lambda name: -known[name] / limits[name])[:top]:
        meaning = facs_name(name)
        share = float(np.clip(known[name] / limits[name], 0, 1))
        rows.append(_Bar(name if meaning is None else f"{name} {meaning}", known[name], share))
    if face.affect is not None and all(math.isfinite(value) for value in face.affect):
        rows.append(_Circle(float(face.affect[0]), float(face.affect[1])))
    rows += [_Line(part) for line in face.lines for part in str(line).splitlines() or [""]]
    if face.further and face.points is not None:
        rows.append(_Line(face.points_name, _POINT_NAME))
    rows += [_Line(name, _FURTHER[k % len(_FURTHER)][0]) for k, name in enumerate(face.further)]
    return rows or [_Line("nothing to show")]


def _card_height(rows: Sequence[_Row], size: int, numbered: bool) -> int:
    return math.ceil(size * (sum(row.height for row in rows) + (1.6 if numbered else 0) + 1.4))


def _text_size(height: int, width: int, cards: Sequence[Sequence[_Row]]) -> int:
    """Text grows with the picture; it shrinks until the cards fit beside it in as many columns as there is room for."""
    size = max(_SMALLEST_TEXT, round(math.sqrt(height * width) / 34))
    numbered = len(cards) > 1
    while size > _SMALLEST_TEXT:
        columns = _flow([_card_height(rows, size, numbered) for rows in cards], height)
        lowest = max(column[-1][2] for column in columns)
        if lowest <= height and len(columns) * _PANEL_WIDTH * size <= max(0.75 * width, 0.6 * height):
            break
        size -= 1
    return size


def _flow(heights: Sequence[int], limit: int) -> list[list[tuple[int, int, int]]]:
    """Return columns of (card, upper edge, lower edge): cards below each other while they fit into ``limit``."""
    columns: list[list[tuple[int, int, int]]] = []
    for card, height in enumerate(heights):
        upper = columns[-1][-1][2] if columns else 0
        if columns and upper + height <= limit:
            columns[-1].append((card, upper, upper + height))
        else:
            columns.append([(card, 0, height)])
    return columns


def _draw_face(picture: np.ndarray, face: FaceNote, factor: int) -> None:
    height, width = picture.shape[:2]
    box, points = _scaled_box(face, factor), _scaled_points(face, factor)
    points = points[((points > -8) & (points < [width + 8, height + 8])).all(1)]
    # Strokes are relative to the face, so that a small face in a large picture is not buried under them.
    corners = points if box is None else box.reshape(2, 2)
    extent = float(np.ptp(corners, axis=0).max()) if len(corners) > 1 else 0.35 * min(height, width)
    extent = min(extent, max(height, width))
    if box is not None:
        stroke = max(2, round(extent / 130))
        corners = np.clip(corners, 0, [width - 1, height - 1])
        for colour, thickness in (((30, 30, 30), stroke + max(2, stroke // 2)), (_BOX, stroke)):
            cv2.rectangle(picture, _fixed(corners[0]), _fixed(corners[1]), colour, thickness, cv2.LINE_AA, _SHIFT)
    dense = len(points) > 150
    radius = max(extent / 95 * (0.6 if dense else 1.0), 0.8 if dense else 1.3)
    sets = [(points, _POINT)]
    for index, given in enumerate(face.further.values()):
        sets.append((_scaled(given, factor), _FURTHER[index % len(_FURTHER)][1]))
    for placed, colour in sets:
        inside = placed[((placed > -8) & (placed < [width + 8, height + 8])).all(1)]
        for point in inside:
            _draw_dot(picture, point, radius + max(0.7, radius * 0.35), (20, 20, 20))
            _draw_dot(picture, point, radius, colour)


def _draw_dot(picture: np.ndarray, point: np.ndarray, radius: float, colour: tuple[int, int, int]) -> None:
    """Blend a disc into the picture by its coverage of each pixel: OpenCV's smallest circles are diamonds."""
    height, width = picture.shape[:2]
    x0, y0 = np.clip(np.floor(point - radius - 1).astype(int), 0, [width, height])
    x1, y1 = np.clip(np.ceil(point + radius + 2).astype(int), 0, [width, height])
    distance = np.hypot(np.arange(x0, x1)[None] - point[0], np.arange(y0, y1)[:, None] - point[1])
    cover = np.clip(radius + 0.5 - distance, 0, 1)[..., None]
    patch = picture[y0:y1, x0:x1]
    patch[...] = np.rint(patch * (1 - cover) + np.array(colour) * cover)


def _scaled_box(face: FaceNote, factor: int) -> np.ndarray | None:
    if face.box is None:
        return None
    box = np.asarray(face.box, float)
    if box.shape != (4,):
        raise DataError(f"annotation: box of shape {box.shape}; expected x1 y1 x2 y2")
    return (box + 0.5) * factor - 0.5 if np.isfinite(box).all() else None


def _scaled_points(face: FaceNote, factor: int) -> np.ndarray:
    if face.points is None:
        return np.zeros((0, 2))
    return _scaled(face.points, factor)


def _scaled(given: np.ndarray, factor: int) -> np.ndarray:
    points = np.asarray(given, float)
    if points.ndim != 2 or points.shape[1] != 2:
        raise DataError(f"annotation: points of shape {points.shape}; expected (points, 2) in pixels")
    return (points[np.isfinite(points).all(1)] + 0.5) * factor - 0.5


def _draw_card(
    canvas: np.ndarray, rows: Sequence[_Row], left: int, upper: int, width: int, size: int, number: int | None
) -> list[_Placed]:
    margin = round(0.9 * size)
    inner = width - 2 * margin
    x = left + margin
    y = upper + 0.7 * size
    texts = []
    if upper > 0:
        cv2.line(canvas, (x, upper), (x + inner, upper), _RULE, max(1, size // 14), cv2.LINE_AA)
    if number is not None:
        texts.append(_Placed(f"face {number}", x, y + 1.1 * size, inner, size, _MUTED))
        y += 1.6 * size
    for row in rows:
        if isinstance(row, _Line):
            letters = round(size * 1.15) if row.bold else size
            room = style.font(letters, bold=row.bold).getlength(row.right) + 1
            texts.append(_Placed(row.left, x, y + 1.1 * size, inner - room, letters, bold=row.bold))
            if row.right:
                texts.append(_Placed(row.right, x + inner, y + 1.1 * size, room, letters, anchor="rs", bold=row.bold))
        elif isinstance(row, _Bar):
            texts += _draw_bar(canvas, row, x, y, inner, size)
        else:
            texts += _draw_circle(canvas, row, x, y, inner, size)
        y += row.height * size
    return texts


def _draw_bar(canvas: np.ndarray, bar: _Bar, x: float, y: float, width: float, size: int) -> list[_Placed]:
    upper, lower = y + 1.25 * size, y + 1.62 * size
    for share, colour in ((1.0, _TRACK), (bar.share, _BAR)):
        # Edges are rounded to pixels: a bar's end is sharp, and its length true to half a pixel.
        first, last = (round(x), round(upper)), (round(x + width * share) - 1, round(lower) - 1)
        if last[0] >= first[0]:
            cv2.rectangle(canvas, first, last, colour, -1)
    small = max(round(size * 0.9), _SMALLEST_TEXT - 1)
    number = f"{bar.value:.2f}"
    return [
        _Placed(bar.name, x, y + 1.0 * size, width - 3.0 * size, small),
        _Placed(number, x + width, y + 1.0 * size, 2.8 * size, small, anchor="rs"),
    ]


def _draw_circle(canvas: np.ndarray, row: _Circle, x: float, y: float, width: float, size: int) -> list[_Placed]:
    radius = 2.6 * size
    cx, cy = x + radius, y + 0.5 * size + radius
    thin = max(1, round(size / 16))
    for start, end in (((cx - radius, cy), (cx + radius, cy)), ((cx, cy - radius), (cx, cy + radius))):
        cv2.line(canvas, _fixed(start), _fixed(end), _RULE, thin, cv2.LINE_AA, _SHIFT)
    cv2.circle(canvas, _fixed((cx, cy)), round(radius * 2**_SHIFT), _MUTED, thin, cv2.LINE_AA, _SHIFT)
    # Labels may lie in the square's corners; the dot stays within it.
    dot = (cx + radius * np.clip(row.valence, -1, 1), cy - radius * np.clip(row.arousal, -1, 1))
    reach = max(0.36 * size, 2.5)
    _draw_dot(canvas, np.array(dot), reach, _DOT)
    small = max(round(size * 0.9), _SMALLEST_TEXT - 1)
    beside = x + 2 * radius + 0.9 * size
    room = x + width - beside
    texts = []
    for index, (name, value) in enumerate((("valence", row.valence), ("arousal", row.arousal))):
        base = cy - 1.4 * size + index * 2.7 * size
        number = f"{value:+.2f}".replace("-", "−")
        texts.append(_Placed(name, beside, base, room, small, _MUTED))
        texts.append(_Placed(number, beside, base + 1.2 * size, room, size))
    return texts


def _draw_tag(
    canvas: np.ndarray, face: FaceNote, factor: int, picture: tuple[int, int], size: int, text: str
) -> list[_Placed]:
    """Draw a face's number at its box (or points), inside the picture wherever the face lies."""
    box = _scaled_box(face, factor)
    if box is None:
        points = _scaled_points(face, factor)
        if not len(points):
            return []
        box = np.concatenate([points.min(0), points.max(0)])
    height, width = picture
    tag_width, tag_height = (0.6 + 0.65 * len(text)) * size, 1.3 * size
    x = float(np.clip(box[0], 0, max(width - tag_width, 0)))
    y = float(np.clip(box[1] - tag_height, 0, max(height - tag_height, 0)))
    cv2.rectangle(canvas, (round(x), round(y)), (round(x + tag_width) - 1, round(y + tag_height) - 1), _BAR, -1)
    white = (255, 255, 255)
    return [_Placed(text, x + tag_width / 2, y + tag_height / 2, tag_width, size, white, anchor="mm", bold=True)]


def _write(canvas: np.ndarray, texts: Sequence[_Placed]) -> np.ndarray:
    picture = Image.fromarray(canvas)
    pen = ImageDraw.Draw(picture)
    for placed in texts:
        letters = style.font(placed.size, bold=placed.bold)
        text = style.fit_pixels(placed.text, placed.width, letters)
        pen.text((round(placed.x), round(placed.y)), text, fill=placed.colour, font=letters, anchor=placed.anchor)
    return np.asarray(picture).copy()


def _fixed(point: Sequence[float] | np.ndarray) -> tuple[int, int]:
    """Pixel coordinates as OpenCV's fixed-point numbers, so that shapes lie between pixels."""
    return round(float(point[0]) * 2**_SHIFT), round(float(point[1]) * 2**_SHIFT)
