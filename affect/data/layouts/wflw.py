# SPDX-License-Identifier: Apache-2.0
"""WFLW: 98 points on faces in the wild, with six attributes whose test faces are benchmarks of their own.

W. Wu, C. Qian, S. Yang, Q. Wang, Y. Cai and Q. Zhou, "Look at Boundary: A Boundary-Aware Face Alignment Algorithm",
CVPR 2018. Research use; https://wywu.github.io/projects/LAB/WFLW.html. The layout as delivered::

    <root>/
    ├── WFLW_images/<event>/<file>.jpg
    └── WFLW_annotations/
        ├── list_98pt_rect_attr_train_test/
        │   ├── list_98pt_rect_attr_train.txt    7,500 faces, 207 fields a line
        │   └── list_98pt_rect_attr_test.txt     2,500 faces
        └── list_98pt_test/
            ├── list_98pt_test.txt               the test faces again, 197 fields a line
            └── list_98pt_test_{largepose,expression,illumination,makeup,occlusion,blur}.txt

A line of 207 fields holds 196 coordinates (x0 y0 … x97 y97), the detection rectangle (x_min y_min x_max y_max), six
flags (pose, expression, illumination, make-up, occlusion, blur) and the image's path below ``WFLW_images``; a line of
197 fields the coordinates and the path. Both were found in public readers. Where the test list with 207 fields is
missing, the one with 197 serves, and the flags come from the subset lists.

The first pixel centre is 0. Points may lie outside of the image and stay there. One photograph can hold several faces:
a face is known by its path *and* its first coordinates, and parts are held out by ``photograph``.

Columns: ``image``, ``part`` (``train``, ``test``), ``photograph`` (the image's path), ``landmarks_98``, ``box``,
``attribute_large_pose``, ``attribute_expression``, ``attribute_illumination``, ``attribute_make_up``,
``attribute_occlusion``, ``attribute_blur``.
"""

from __future__ import annotations

from pathlib import Path
from typing import NamedTuple

import numpy as np

from affect import labels
from affect.data.expected import Expected
from affect.data.images import FileImages, ImageReader
from affect.data.layouts.common import (
    Dressed,
    Reading,
    box_around,
    number_of,
    require_box,
    write_images,
    write_lines,
)
from affect.data.table import FaceTable
from affect.errors import DataError

__all__ = ["dress", "expected", "read", "write"]

FLAGS = {
    "large_pose": ("largepose", 326),
    "expression": ("expression", 314),
    "illumination": ("illumination", 698),
    "make_up": ("makeup", 206),
    "occlusion": ("occlusion", 736),
    "blur": ("blur", 773),
}
"""Attributes in the order of the lists: ending of the subset's file, and its number of test faces."""

POINTS = 98
LIMIT = 1e5
"""Coordinates beyond this many pixels are damage."""

_IMAGES, _LISTS, _SUBSETS = (
    "WFLW_images",
    "WFLW_annotations/list_98pt_rect_attr_train_test",
    "WFLW_annotations/list_98pt_test",
)
_LONG, _SHORT = 2 * POINTS + 4 + len(FLAGS) + 1, 2 * POINTS + 1
_SOURCE = "WFLW: 98 points and six attributes, placed by hand"


class _List(NamedTuple):
    """What one list file says, without repeated lines."""

    points: np.ndarray
    """``(N, 196)``"""
    boxes: np.ndarray | None
    """``(N, 4)``"""
    flags: np.ndarray | None
    """``(N, 6)``"""
    images: np.ndarray
    """Paths below the folder of images ``(N,)``."""


def read(root: str | Path, box: str = "points", enlarge: float = 0.0) -> FaceTable:
    """Return the faces of WFLW, training list first, in the order of the lists.

    Args:
        root: Folder as delivered.
        box: Where column ``box`` comes from: ``points`` (tight around the true points) or ``detector`` (the rectangle
            of the lists).
        enlarge: Width and height added to the box on each side, as a fraction of it.

    Raises:
        DataError: If a list is missing or damaged, with its line.
        ConfigError: If ``box`` is unknown.
    """
    require_box(box)
    reading = Reading(root, "wflw", ("WFLW_annotations", "WFLW_images"))
    train = _read_list(reading, f"{_LISTS}/list_98pt_rect_attr_train.txt")
    test = _read_test(reading)
    both = (train, test)
    parts = np.repeat(np.array(["train", "test"], object), [len(part.images) for part in both])
    images = np.concatenate([part.images for part in both])
    points = np.concatenate([part.points for part in both])
    squares, boxed = _boxes(reading, both, points, box, enlarge)
    flags = [np.zeros((len(part.images), len(FLAGS))) if part.flags is None else part.flags for part in both]
    flagged = np.repeat([part.flags is not None for part in both], [len(part.images) for part in both])
    kept = _existing(reading, images)
    photographs = np.array([f"{_IMAGES}/{name}" for name in images], object)[kept]
    return reading.table(
        {
            "image": photographs,
            "part": parts[kept],
            "photograph": photographs,
            "landmarks_98": points[kept].astype(np.float32),
            "box": (squares[kept].astype(np.float32), boxed[kept]),
            **{
                f"attribute_{name}": (values.astype(np.float32), flagged[kept])
                for name, values in zip(FLAGS, np.concatenate(flags)[kept].T, strict=True)
            },
        },
        label_source=_SOURCE,
    )


def _read_test(reading: Reading) -> _List:
    """Return the test list; from the lists with fewer fields where the one with all is missing."""
    name, plain = f"{_LISTS}/list_98pt_rect_attr_test.txt", f"{_SUBSETS}/list_98pt_test.txt"
    full = reading.touch(reading.root / name)
    if full.is_file() or not reading.touch(reading.root / plain).is_file():
        return _read_list(reading, name)
    found = _read_list(reading, plain)
    reading.note(f"{name} is not there: test faces come from {plain}, their attributes from the subset lists")
    keys = _keys(found)
    lists = (f"{_SUBSETS}/list_98pt_test_{ending}.txt" for ending, _ in FLAGS.values())
    flags = [np.isin(keys, _keys(_read_list(reading, path, subset=True))) for path in lists]
    return found._replace(flags=np.stack(flags, 1).astype(np.float64))


def _keys(found: _List) -> np.ndarray:
    """Return what tells faces apart ``(N,)``: path and first coordinates."""
    return np.array([f"{x:.3f} {y:.3f} {name}" for (x, y), name in zip(found.points[:, :2], found.images, strict=True)])


def _read_list(reading: Reading, path: str, subset: bool = False) -> _List:
    """Return the faces of a list; a ``subset`` may be empty, and says nothing of rows that are left out."""
    lines = reading.lines(path)
    full = reading.root / path
    if not lines:
        if subset:
            return _List(np.empty((0, 2 * POINTS)), None, None, np.empty(0, object))
        raise DataError(f"{full}: the file is empty")
    cells = [line.split() for _, line in lines]
    fields = len(cells[0])
    if fields not in (_LONG, _SHORT):
        fields = _LONG if "rect_attr" in path else _SHORT
    for (number, _), row in zip(lines, cells, strict=True):
        if len(row) != fields:
            raise DataError(f"{full}, line {number}: {len(row)} fields, expected {fields}")
    try:
        values = np.array([row[:-1] for row in cells], np.float64)
        fine = bool((np.abs(values) <= LIMIT).all()) and not any("_" in cell for row in cells for cell in row[:-1])
    except ValueError:
        fine = False
    if not fine:
        for (number, _), row in zip(lines, cells, strict=True):
            for cell in row[:-1]:
                if abs(number_of(cell, f"{full}, line {number}")) > LIMIT:
                    raise DataError(f"{full}, line {number}: expected coordinates in pixels, found {cell[:40]!r}")
    boxes = flags = None
    if fields == _LONG:
        boxes, flags = values[:, 2 * POINTS : 2 * POINTS + 4], values[:, 2 * POINTS + 4 :]
        reading.require(path, np.all(boxes[:, 2:] >= boxes[:, :2], axis=1), "x_max >= x_min and y_max >= y_min")
        reading.require(path, np.all(np.isin(flags, (0, 1)), axis=1), f"{len(FLAGS)} flags of 0 or 1 before the path")
    found = _List(values[:, : 2 * POINTS], boxes, flags, np.array([row[-1] for row in cells], object))
    _, first = np.unique(np.array([" ".join(row) for row in cells]), return_index=True)
    if len(first) == len(cells):
        return found
    if not subset:
        again = np.setdiff1d(np.arange(len(cells)), first)
        reading.skip("the same line again", (f"{path}, line {lines[k][0]}" for k in again))
    kept = np.sort(first)
    return _List(*(None if part is None else part[kept] for part in found))  # type: ignore[arg-type]


def _boxes(
    reading: Reading, both: tuple[_List, _List], points: np.ndarray, box: str, enlarge: float
) -> tuple[np.ndarray, np.ndarray]:
    """Return the boxes ``(N, 4)`` and which of them are known ``(N,)``."""
    if box == "points":
        reading.note(f"box: tight around the true points, enlarged by {enlarge:g} on each side")
        return box_around(points.reshape(-1, POINTS, 2), enlarge), np.ones(len(points), bool)
    reading.note(f"box: the detection rectangle of the lists, enlarged by {enlarge:g} on each side")
    given = [np.zeros((len(part.images), 4)) if part.boxes is None else part.boxes for part in both]
    known = np.repeat([part.boxes is not None for part in both], [len(part.images) for part in both])
    if not known.all():
        reading.note(f"{int((~known).sum())} faces have no rectangle: their list has {_SHORT} fields")
    return box_around(np.concatenate(given).reshape(-1, 2, 2), enlarge), known


def _existing(reading: Reading, images: np.ndarray) -> np.ndarray:
    """Return the rows whose image is there ``(N,)``; the others are counted."""
    folders = {name.rpartition("/")[0] for name in images}
    there = {f"{folder}/{name}" for folder in folders for name in reading.listing(f"{_IMAGES}/{folder}")}
    exists = np.array([(name if "/" in name else f"/{name}") in there for name in images], bool)
    reading.skip("image missing", (f"{_IMAGES}/{name}" for name in images[~exists]))
    return np.flatnonzero(exists)


# ------------------------------------------------------------------------------------------------------ writing


def write(table: FaceTable, root: str | Path, images: ImageReader | None = None) -> None:
    """Write images and every list; a photograph with several faces is written once.

    Args:
        table: Table as ``read`` returns it.
        root: Folder to write.
        images: Pixels by row of ``table``; None reads its files.

    Raises:
        DataError: If a row lacks points, box or a flag: the lists cannot say so.
    """
    root = Path(root)
    images = FileImages(table) if images is None else images
    names, parts = table.strings("image")[0], table.strings("part")[0]
    columns = ["landmarks_98", "box", *(f"attribute_{name}" for name in FLAGS)]
    for name in columns:
        known = table.numbers(name)[1]
        if not known.all():
            raise DataError(f"row {int(np.argmin(known))} has no {name}; the lists cannot leave it out")
    points, boxes, *flags = (table.numbers(name)[0].astype(np.float64) for name in columns)
    long, short = [], []
    for row, name in enumerate(names):
        path = name.removeprefix(f"{_IMAGES}/")
        coordinates = " ".join(f"{value:.6f}" for value in points[row])
        rectangle = " ".join(f"{value:.6f}".rstrip("0").rstrip(".") for value in boxes[row])
        marks = " ".join(str(int(values[row])) for values in flags)
        long.append(f"{coordinates} {rectangle} {marks} {path}")
        short.append(f"{coordinates} {path}")
    for part in ("train", "test"):
        lines = [long[row] for row in np.flatnonzero(parts == part)]
        write_lines(root / _LISTS / f"list_98pt_rect_attr_{part}.txt", lines)
    tested = np.flatnonzero(parts == "test")
    write_lines(root / _SUBSETS / "list_98pt_test.txt", [short[row] for row in tested])
    for (ending, _), values in zip(FLAGS.values(), flags, strict=True):
        lines = [short[row] for row in tested if values[row]]
        write_lines(root / _SUBSETS / f"list_98pt_test_{ending}.txt", lines)
    write_images(table, root, images, np.sort(np.unique(names.astype(str), return_index=True)[1]))


_EVENTS = ("0--Parade", "11--Meeting", "37--Soccer", "50--Celebration_Or_Party")


def dress(faces: FaceTable) -> Dressed:
    """Return built-in faces under the names of WFLW, one face per photograph; faces without points are left out.

    Every fourth person is in the test part. Pose (the quarter of the faces that turns most), expression (any but
    neutral) and occlusion are those of the drawn face; nothing is known of illumination, make-up and blur, which are
    set on every third, fourth and fifth face, so that each of the six subsets has faces.

    Args:
        faces: Built-in faces.
    """
    usable = np.flatnonzero(faces.numbers("landmarks_98")[1])
    people = faces.codes("subject")[0][usable] if "subject" in faces.names else np.arange(len(usable))
    _, first, place = np.unique(people, return_index=True, return_inverse=True)
    rank = np.argsort(np.argsort(first))[place] if len(first) >= 8 else np.arange(len(usable))
    tested = rank % 4 == 1
    order = np.concatenate([usable[~tested], usable[tested]])
    points = faces.numbers("landmarks_98", order)[0]
    count = np.arange(len(order))
    events = [_EVENTS[k % len(_EVENTS)] for k in count]
    names = [f"{_IMAGES}/{event}/{event.replace('--', '_')}_face_{k}_{k + 1}.jpg" for k, event in enumerate(events)]
    yaw = faces.numbers("pose_yaw", order)[0] if "pose_yaw" in faces.names else np.zeros(len(order))
    shown, known = faces.strings("expression", order)
    hidden = "attribute_occluded"
    occluded = faces.numbers(hidden, order)[0] if hidden in faces.names else count % 6 == 0
    flags = (
        np.abs(yaw) >= np.quantile(np.abs(yaw), 0.75),
        known & (shown != labels.NEUTRAL),
        count % 3 == 0,
        count % 4 == 0,
        np.asarray(occluded, bool) | (count % 11 == 0),
        count % 5 == 0,
    )
    columns = {f"attribute_{name}": values.astype(np.float32) for name, values in zip(FLAGS, flags, strict=True)}
    table = FaceTable.from_columns(
        {
            "image": np.array(names, object),
            "part": np.repeat(np.array(["train", "test"], object), [(~tested).sum(), tested.sum()]),
            "photograph": np.array(names, object),
            "landmarks_98": points,
            "box": box_around(points.reshape(-1, POINTS, 2)).astype(np.float32),
            **columns,
        },
        ".",
        {"dataset": "wflw", "label_source": _SOURCE},
    )
    return Dressed(table, order)


def expected() -> tuple[Expected, ...]:
    """Return the published numbers of faces."""
    lists = "WFLW's lists, as public readers describe them"
    subsets = "subset sizes of WFLW (recalled)"
    return (
        Expected("rows", 10000, lists),
        Expected("rows/part=train", 7500, lists),
        Expected("rows/part=test", 2500, lists),
        *(
            Expected(f"rows/part=test/attribute_{name}=1", count, subsets, found=False)
            for name, (_, count) in FLAGS.items()
        ),
    )
