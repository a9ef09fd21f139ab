# SPDX-License-Identifier: Apache-2.0
"""300-W: 68 points on faces in the wild, in the official parts train, common, challenge and private.

C. Sagonas, E. Antonakos, G. Tzimiropoulos, S. Zafeiriou and M. Pantic, "300 Faces In-The-Wild Challenge: Database and
Results", Image and Vision Computing 47, 2016. Research use; https://ibug.doc.ic.ac.uk/resources/300-W/. The layout as
its archives unpack::

    <root>/
    ├── afw/                 train      134212_1.jpg  134212_1.pts            337 images
    ├── helen/trainset/      train      100032540_1.jpg …                   2,000
    ├── helen/testset/       common                                           330
    ├── lfpw/trainset/       train      image_0001.png …                      811
    ├── lfpw/testset/        common                                           224
    ├── ibug/                challenge  image_008_1.jpg, "image_010 _1.jpg"   135
    ├── 300W/01_Indoor/      private    indoor_001.png …                      300
    ├── 300W/02_Outdoor/     private    outdoor_001.png …                     300
    └── Bounding Boxes/      optional   bounding_boxes_helen_trainset.mat …

The composition was found in public readers; the counts, the MATLAB convention of the points and the ``.mat`` files are
recalled. "Full" of the literature is common and challenge together, a fixed set and not the mean of the two.

A ``.pts`` file holds a head (``version: 1``, ``n_points:  68``) and the points between braces. Its first pixel centre
is (1, 1), as in MATLAB: 1 is subtracted, nothing is rounded. Line ends, outer blanks and blank lines vary between
copies, and so does the case of names. ``ibug`` has names with spaces; some archives hold ``_mirror`` copies, which are
left out.

The box decides how hard the benchmark is. ``box="points"`` takes the tight box of the true points, as most of the
literature does; ``box="detector"`` the official detector's, which is harder. What was taken stands in the notes.

Columns: ``image``, ``part``, ``collection`` (the folder, as ``helen_trainset``), ``landmarks_68``, ``box``.
"""

from __future__ import annotations

import os
from collections.abc import Iterable, Mapping
from pathlib import Path

import numpy as np
from scipy.io import loadmat

from affect.data.expected import Expected
from affect.data.images import FileImages, ImageReader
from affect.data.layouts.common import (
    Dressed,
    Reading,
    box_around,
    encode_matrices,
    number_of,
    require_box,
    write_bytes,
    write_images,
    write_lines,
)
from affect.data.table import FaceTable
from affect.errors import DataError

__all__ = ["dress", "expected", "read", "write"]

COLLECTIONS = {
    "afw": ("train", 337),
    "helen/trainset": ("train", 2000),
    "lfpw/trainset": ("train", 811),
    "helen/testset": ("common", 330),
    "lfpw/testset": ("common", 224),
    "ibug": ("challenge", 135),
    "300W/01_Indoor": ("private", 300),
    "300W/02_Outdoor": ("private", 300),
}
"""Part and number of images of each folder, in the order of rows."""

POINTS = 68
LIMIT = 1e5
"""Coordinates beyond this many pixels are damage."""

_HOLDS = ("afw", "helen", "lfpw", "ibug", "300W")
_BOX_FOLDER = "Bounding Boxes"
_IMAGES = (".jpg", ".jpeg", ".png", ".bmp")
_SOURCE = "iBUG: 68 points, placed semi-automatically"


def read(root: str | Path, box: str = "points", enlarge: float = 0.0) -> FaceTable:
    """Return the faces of 300-W, by folder in the order of ``COLLECTIONS`` and then by name.

    Args:
        root: Folder as delivered.
        box: Where column ``box`` comes from: ``points`` (tight around the true points) or ``detector`` (the official
            ``.mat`` files, where they are; the private part has none).
        enlarge: Width and height added to the box on each side, as a fraction of it.

    Raises:
        DataError: If a file is damaged, with its line.
        ConfigError: If ``box`` is unknown.
    """
    require_box(box)
    reading = Reading(root, "300w", _as_spelled(Path(root).expanduser()))
    rows: list[tuple[str, str, str]] = []
    points: list[np.ndarray] = []
    boxes: list[np.ndarray | None] = []
    for collection, (part, count) in COLLECTIONS.items():
        folder = _spelled(reading, collection)
        if folder is None:
            reading.note(f"{collection} is not there: its {count} images of the part {part} are missing")
            continue
        detected = _detector_boxes(reading, collection) if box == "detector" else {}
        for image, annotation in _pairs(reading, folder):
            rows.append((f"{folder}/{image}", part, _plain(collection)))
            points.append(_read_points(reading, f"{folder}/{annotation}"))
            boxes.append(detected.get(image.casefold()))
    found = np.stack(points) if points else np.empty((0, POINTS, 2))
    if box == "points":
        reading.note(f"box: tight around the true points, enlarged by {enlarge:g} on each side")
        squares, known = box_around(found, enlarge), np.ones(len(found), bool)
    else:
        known = np.array([square is not None for square in boxes], bool)
        drawn = np.array([np.zeros(4) if square is None else square for square in boxes]).reshape(-1, 2, 2)
        squares = box_around(drawn, enlarge) if len(drawn) else np.empty((0, 4))
        reading.note(f"box: the official face detector's, enlarged by {enlarge:g} on each side")
        if not known.all():
            reading.note(f"{int((~known).sum())} images have no box of the official detector")
    return reading.table(
        {
            "image": np.array([row[0] for row in rows], object),
            "part": np.array([row[1] for row in rows], object),
            "collection": np.array([row[2] for row in rows], object),
            "landmarks_68": found.reshape(-1, 2 * POINTS).astype(np.float32),
            "box": (squares.astype(np.float32), known),
        },
        label_source=_SOURCE,
    )


def _plain(collection: str) -> str:
    """Return a folder's name as column ``collection`` has it, e.g. ``helen_trainset``."""
    return collection.replace("/", "_")


def _as_spelled(root: Path) -> list[str]:
    """Return the names of which one has to lie in the root, as they are spelled there."""
    there = {entry.name.casefold(): entry.name for entry in os.scandir(root)} if root.is_dir() else {}
    return [there.get(name.casefold(), name) for name in _HOLDS]


def _spelled(reading: Reading, folder: str) -> str | None:
    """Return a folder's path as it is spelled on disk, None if there is none."""
    path = ""
    for name in folder.split("/"):
        there = {entry.casefold(): entry for entry in reading.listing(path or ".")}
        if name.casefold() not in there:
            return None
        path = f"{path}/{there[name.casefold()]}".lstrip("/")
    return path


def _pairs(reading: Reading, folder: str) -> list[tuple[str, str]]:
    """Return the names of images with points beside them; what has no partner is counted."""
    images: dict[str, str] = {}
    annotations: dict[str, str] = {}
    for name in reading.listing(folder):
        stem, suffix = Path(name).stem, Path(name).suffix.lower()
        kind = images if suffix in _IMAGES else annotations if suffix == ".pts" else None
        if kind is None:
            continue
        if "_mirror" in stem:
            reading.skip("mirrored copy of another image", [f"{folder}/{name}"] if kind is images else [])
            continue
        if stem in kind:
            raise DataError(f"{reading.root / folder}: {kind[stem]} and {name} have one name; remove one")
        kind[stem] = name
    reading.skip(
        "image without points beside it", (f"{folder}/{images[s]}" for s in images.keys() - annotations.keys())
    )
    reading.skip("image missing", (f"{folder}/{annotations[s]}" for s in annotations.keys() - images.keys()))
    return [(images[stem], annotations[stem]) for stem in sorted(images.keys() & annotations.keys())]


def _read_points(reading: Reading, path: str) -> np.ndarray:
    """Return the points of a ``.pts`` file ``(68, 2)``, first pixel centre at 0."""
    full = reading.root / path
    lines = reading.lines(path)
    opening = next((k for k, (_, line) in enumerate(lines) if line == "{"), None)
    if opening is None:
        raise DataError(f"{full}: no line with {{; expected a head, then {POINTS} points between braces")
    for number, line in lines[:opening]:
        key, _, value = line.partition(":")
        if key.strip() == "n_points" and number_of(value, f"{full}, line {number}") != POINTS:
            raise DataError(f"{full}, line {number}: {value.strip()[:40]} points, expected {POINTS}")
    found = []
    for number, line in lines[opening + 1 :]:
        if line == "}":
            break
        cells, where = line.split(), f"{full}, line {number}"
        if len(cells) != 2:
            raise DataError(f"{where}: expected two coordinates, found {line[:80]!r}")
        pair = [number_of(cell, where) - 1 for cell in cells]
        if max(map(abs, pair)) > LIMIT:
            raise DataError(f"{where}: expected coordinates in pixels, found {line[:80]!r}")
        found.append(pair)
    else:
        raise DataError(f"{full}: the closing brace is missing behind {len(found)} points; the file is cut short")
    if len(found) != POINTS:
        raise DataError(f"{full}: {len(found)} points between the braces, expected {POINTS}")
    return np.array(found)


def _detector_boxes(reading: Reading, collection: str) -> dict[str, np.ndarray]:
    """Return the detector's boxes ``(4,)`` by the image's name in lower case; empty for the private part."""
    if collection.startswith("300W"):
        return {}
    folder = _spelled(reading, _BOX_FOLDER) or _BOX_FOLDER
    name = f"bounding_boxes_{_plain(collection)}.mat"
    path = reading.touch(reading.root / folder / name)
    if not path.is_file():
        raise DataError(f"{path}: no such file; dataset.box=detector needs it, dataset.box=points does not")
    try:
        entries = loadmat(path, simplify_cells=True)["bounding_boxes"]
        listed = [entries] if isinstance(entries, Mapping) else list(entries)
        boxes = {
            str(entry["imgName"]).strip().casefold(): np.asarray(entry["bb_detector"], np.float64).reshape(4) - 1
            for entry in listed
        }
    except Exception as error:  # a damaged file fails anywhere inside scipy's reader
        raise DataError(
            f"{path}: expected MATLAB structures bounding_boxes with imgName and bb_detector ({error})"
        ) from error
    for image, square in boxes.items():
        if not (np.abs(square) <= LIMIT).all() or (square[2:] < square[:2]).any():
            raise DataError(f"{path}, {image}: expected a box x1 y1 x2 y2, found {(square + 1).tolist()}")
    return boxes


# ------------------------------------------------------------------------------------------------------ writing


def write(table: FaceTable, root: str | Path, images: ImageReader | None = None, box: str = "points") -> None:
    """Write images, ``.pts`` files and, for ``box="detector"``, the ``.mat`` files of the boxes.

    Args:
        table: Table as ``read`` returns it.
        root: Folder to write.
        images: Pixels by row of ``table``; None reads its files.
        box: Whose boxes column ``box`` holds.

    Raises:
        DataError: If a row has no points: the format cannot say so.
    """
    require_box(box)
    root = Path(root)
    images = FileImages(table) if images is None else images
    names, collections = table.strings("image")[0], table.strings("collection")[0]
    points, known = table.numbers("landmarks_68")
    if not known.all():
        raise DataError(f"row {int(np.argmin(known))} has no points; .pts files cannot leave them out")
    write_images(table, root, images)
    for row, name in enumerate(names):
        pairs = (f"{x + 1:.6f} {y + 1:.6f}" for x, y in points[row].astype(np.float64).reshape(-1, 2))
        write_lines((root / name).with_suffix(".pts"), ["version: 1", f"n_points:  {POINTS}", "{", *pairs, "}"])
    if box == "detector":
        _write_boxes(table, root, names, collections, box_around(points.reshape(-1, POINTS, 2)))


def _write_boxes(table: FaceTable, root: Path, names: np.ndarray, collections: np.ndarray, tight: np.ndarray) -> None:
    squares, known = table.numbers("box")
    for collection in COLLECTIONS:
        if collection.startswith("300W"):
            continue
        rows = np.flatnonzero((collections == _plain(collection)) & known)
        cells = np.empty((1, len(rows)), object)
        for k, row in enumerate(rows):
            cells[0, k] = {
                "imgName": names[row].rpartition("/")[2],
                "bb_detector": squares[row].astype(np.float64)[None] + 1,
                "bb_ground_truth": tight[row].astype(np.float64)[None] + 1,
            }
        name = f"bounding_boxes_{_plain(collection)}.mat"
        write_bytes(root / _BOX_FOLDER / name, encode_matrices({"bounding_boxes": cells}))


_PATTERN = (
    *("helen/trainset", "afw", "helen/testset", "ibug", "300W/01_Indoor", "lfpw/trainset"),
    *("helen/trainset", "lfpw/testset", "300W/02_Outdoor", "helen/trainset", "lfpw/trainset", "helen/trainset"),
)
"""Folders that people are spread over, about as the images are."""

_NAMES = {
    "afw": "{}_1.jpg",
    "helen/trainset": "{}_1.jpg",
    "helen/testset": "{}_1.jpg",
    "lfpw/trainset": "image_{:04d}.png",
    "lfpw/testset": "image_{:04d}.png",
    "ibug": "image_{:03d} _1.jpg",  # with a space, as some of its files
    "300W/01_Indoor": "indoor_{:03d}.png",
    "300W/02_Outdoor": "outdoor_{:03d}.png",
}


def dress(faces: FaceTable, box: str = "points") -> Dressed:
    """Return built-in faces under the names of 300-W; faces without points are left out.

    Whoever is drawn stays in one folder, where there are at least as many people as folders to fill.

    Args:
        faces: Built-in faces.
        box: ``points`` or ``detector``, as for ``read``; the box of the drawn face stands for a detector's.
    """
    require_box(box)
    points, known = faces.numbers("landmarks_68")
    usable = np.flatnonzero(known)
    people = faces.codes("subject")[0][usable] if "subject" in faces.names else np.arange(len(usable))
    place = _ranks(people) if len(np.unique(people)) >= len(_PATTERN) else np.arange(len(usable))
    collections = np.array(_PATTERN, object)[place % len(_PATTERN)]
    rows, names = [], []
    for collection in COLLECTIONS:
        chosen = usable[collections == collection]
        first = 100001 if "{}" in _NAMES[collection] else 1
        named = sorted((_NAMES[collection].format(first + k), row) for k, row in enumerate(chosen))
        names += [f"{collection}/{name}" for name, _ in named]
        rows += [row for _, row in named]
    order = np.array(rows, np.int64)
    folders = np.array([name.rpartition("/")[0] for name in names], object)
    chosen_points = points[order]
    private = np.array([folder.startswith("300W") for folder in folders], bool)
    if box == "points":
        squares, boxed = box_around(chosen_points.reshape(-1, POINTS, 2)), np.ones(len(order), bool)
    else:
        squares, boxed = faces.numbers("box", order)
        squares, boxed = np.where(private[:, None], 0, squares), boxed & ~private
    table = FaceTable.from_columns(
        {
            "image": np.array(names, object),
            "part": np.array([COLLECTIONS[folder][0] for folder in folders], object),
            "collection": np.array([_plain(folder) for folder in folders], object),
            "landmarks_68": chosen_points,
            "box": (squares.astype(np.float32), boxed),
        },
        ".",
        {"dataset": "300w", "label_source": _SOURCE},
    )
    return Dressed(table, order)


def _ranks(people: np.ndarray) -> np.ndarray:
    """Return for each row the rank of its person by first appearance ``(N,)``."""
    _, first, place = np.unique(people, return_index=True, return_inverse=True)
    return np.argsort(np.argsort(first))[place]


def expected() -> tuple[Expected, ...]:
    """Return the published numbers of images."""
    source = "composition of the 300-W archives (counts recalled)"
    parts: dict[str, int] = {}
    for part, count in COLLECTIONS.values():
        parts[part] = parts.get(part, 0) + count
    return tuple(
        Expected(key, count, source, found=False)
        for key, count in _counts(parts, {_plain(name): count for name, (_, count) in COLLECTIONS.items()})
    )


def _counts(parts: Mapping[str, int], collections: Mapping[str, int]) -> Iterable[tuple[str, int]]:
    yield "rows", sum(parts.values())
    yield from ((f"rows/part={part}", count) for part, count in parts.items())
    yield from ((f"rows/collection={name}", count) for name, count in collections.items())
