# SPDX-License-Identifier: Apache-2.0
"""RAF-DB, the Real-world Affective Faces Database: basic (7 classes) and compound (11 classes) expressions.

S. Li, W. Deng and J. Du, "Reliable crowdsourcing and deep locality-preserving learning for expression recognition in
the wild", CVPR 2017. For non-commercial research; ask the authors at Beijing University of Posts and
Telecommunications (http://www.whdeld.cn/RAF/model1.html). Layout on disk::

    <root>/
    ├── basic/                                           (compound/ is alike)
    │   ├── EmoLabel/list_patition_label.txt             the misspelling is real
    │   ├── Image/aligned/train_00001_aligned.jpg        100 x 100, train ids have 5 digits …
    │   │                 test_0001_aligned.jpg           … and test ids 4
    │   ├── Image/original/train_00001.jpg               any size
    │   └── Annotation/
    │       ├── manual/train_00001_manu_attri.txt        five points, then gender, race, age group
    │       ├── boundingbox/train_00001_boundingbox.txt  x1 y1 x2 y2
    │       └── auto/train_00001_auto_attri.txt          37 points; not read, see below
    └── compound/

What is known of it, and how surely:

- ``list_patition_label.txt`` has lines ``train_00001.jpg 5``: one space, no header, no newline at its end. Labels are 1
  to 7, surprise, fear, disgust, happiness, sadness, anger, neutral; 12,271 training and 3,068 test rows (counted in
  public copies of the list). Compound labels are 1 to 11 in the order of ``labels.RAFDB_COMPOUND`` (read in public
  readers), 3,162 and 792 rows (recalled).
- Points and boxes are in pixels of the **original** images. There are none for the aligned images, so a table of
  aligned images has neither: giving them the originals' points is the classic mistake.
- A ``manual`` file has five lines of two numbers, separated by a tab or a blank (two eyes, nose, two corners of the
  mouth), then gender (0 male, 1 female, 2 unsure), race (0 Caucasian, 1 African-American, 2 Asian) and age group (0 to
  4) in a line each (read in public readers). Five equal points are no points. Which eye comes first is not documented:
  the order in which most first eyes lie on the image's left is taken, with a note if that is not the file's.
- Whether pixels are counted from 0 or from 1 is not documented; coordinates are taken as they are, which is this
  package's convention if they count from the first pixel's centre at 0, and half a pixel to one pixel off if not.
- The order of a box's numbers is recalled and agrees with a public reader.
- The 37 automatic points of a commercial detector are not kept: nobody published what each of them is, so they fit no
  scheme of ``labels.SCHEMES`` and could not be mirrored.
- There is no validation part and nobody knows who is in two images; groups are images, near-duplicates kept together.

Columns: ``image``, ``part`` (train, test), ``expression``; where there is a folder ``manual`` also ``attribute_male``
(null where unsure; CelebA's name, so that both train one output), ``race`` and ``age_group`` (names, for
``group_by``); with ``pictures=original`` also ``landmarks_5`` and ``box``, as far as the annotations are there.
"""

from __future__ import annotations

import re
from collections.abc import Callable
from pathlib import Path
from typing import Literal

import numpy as np
import pyarrow as pa

from affect import labels
from affect.data.expected import Expected
from affect.data.images import FileImages, ImageReader
from affect.data.layouts.common import Dressed, Reading, number_of, write_images, write_lines
from affect.data.table import ColumnLike, FaceTable
from affect.errors import ConfigError, DataError, near

__all__ = ["AGE_GROUPS", "CLASSES", "LIMIT", "RACES", "dress", "expected", "read", "write"]

Subset = Literal["basic", "compound"]
Pictures = Literal["aligned", "original"]

CLASSES = {"basic": labels.EXPRESSION_ORDERS["rafdb"], "compound": labels.RAFDB_COMPOUND}
"""Expression classes by subset in file order; the first is file value 1."""

RACES = ("caucasian", "african-american", "asian")
"""Names of the file values 0 to 2."""

AGE_GROUPS = ("0-3", "4-19", "20-39", "40-69", "70+")
"""Names of the file values 0 to 4, in years."""

LIMIT = 1e5
"""Coordinates beyond this are no pixels of an image."""

_LIST = "EmoLabel/list_patition_label.txt"
_LINE = re.compile(r"(train|test)_(\d{1,9})(?:_aligned)?\.\w+\s+(\d{1,9})")
_PICTURE = r"(?:_aligned)?\.(?:jpe?g|png|bmp)"
_MANUAL = r"_manu_attri\.txt"
_BOX = r"_boundingbox\.txt"

_Key = tuple[str, int]
"""Part and number of an image, which padding does not change."""

_Parser = Callable[[list[tuple[int, str]], str], list[float]]
"""From the numbered lines of a small file and its path to the numbers in it."""


# ------------------------------------------------------------------------------------------------------ reading


def read(root: str | Path, subset: Subset = "basic", pictures: Pictures = "aligned") -> FaceTable:
    """Return the face table of RAF-DB, rows in the order of its list.

    Args:
        root: Folder that holds ``basic/`` or ``compound/``.
        subset: ``basic`` (7 classes) or ``compound`` (11 classes).
        pictures: ``aligned`` (100 x 100, without points) or ``original`` (with five points and a box).

    Raises:
        ConfigError: If an option is unknown.
        DataError: If the root is another folder, or a file holds what it should not (file and line are named).
    """
    _check(subset, pictures)
    reading = Reading(root, "rafdb" if subset == "basic" else "rafdb_compound", holds=(subset,))
    keys, codes = _read_list(reading, f"{subset}/{_LIST}", len(CLASSES[subset]))
    folder = f"{subset}/Image/{pictures}"
    files = _by_number(reading, folder, _PICTURE)
    if not files:
        raise DataError(f"{reading.root / folder}: no image there; unpack {pictures}.zip into this folder")
    there = np.array([key in files for key in keys], bool)
    reading.skip("image is missing", [_name(key) for key, found in zip(keys, there, strict=True) if not found])
    unlisted = len(files) - int(there.sum())
    if unlisted:
        reading.note(f"{unlisted} images of {folder} are not in {_LIST} and are not used")
    keys = [keys[row] for row in np.flatnonzero(there)]
    columns: dict[str, ColumnLike] = {
        "image": pa.array([f"{folder}/{files[key]}" for key in keys], pa.string()),
        "part": pa.array([part for part, _ in keys], pa.string()),
        "expression": pa.array(CLASSES[subset], pa.string()).take(pa.array(codes[there] - 1)),
    }
    columns |= _annotations(reading, f"{subset}/Annotation", keys, pictures)
    return reading.table(
        columns,
        expressions=list(CLASSES[subset]),
        label_source=f"RAF-DB {subset}: majority of about 40 crowd workers",
    )


def _check(subset: str, pictures: str) -> None:
    if subset not in CLASSES:
        raise ConfigError(f"subset={subset}: {near(subset, CLASSES)}")
    if pictures not in ("aligned", "original"):
        raise ConfigError(f"pictures={pictures}: {near(pictures, ('aligned', 'original'))}")


def _read_list(reading: Reading, path: str, classes: int) -> tuple[list[_Key], np.ndarray]:
    """Return part and number of each listed image, and its file value int64 ``(N,)``."""
    keys: list[_Key] = []
    codes: list[int] = []
    lines: dict[_Key, int] = {}
    for number, line in reading.lines(path):
        where = f"{reading.root / path}, line {number}"
        match = _LINE.fullmatch(line)
        if match is None:
            raise DataError(f"{where}: expected a name and a label like 'train_00001.jpg 5', found {line[:80]!r}")
        key, code = (match[1], int(match[2])), int(match[3])
        if not 1 <= code <= classes:
            raise DataError(f"{where}: expected a label from 1 to {classes}, found {code}")
        if key in lines:
            raise DataError(f"{where}: {_name(key)} is in line {lines[key]} too; remove one of the two")
        lines[key] = number
        keys.append(key)
        codes.append(code)
    return keys, np.array(codes, np.int64)


def _by_number(reading: Reading, folder: str, ending: str) -> dict[_Key, str]:
    """Return the files of a folder by part and number, because copies differ in zero padding."""
    pattern = re.compile(rf"(train|test)_(\d{{1,9}}){ending}", re.IGNORECASE)
    found: dict[_Key, str] = {}
    for name in reading.listing(folder):
        match = pattern.fullmatch(name)
        if match is None:
            continue
        key = (match[1].lower(), int(match[2]))
        if key in found:
            raise DataError(f"{reading.root / folder}: {found[key]} and {name} are the same number; remove one")
        found[key] = name
    return found


def _name(key: _Key) -> str:
    """Return the official name of an image without its ending."""
    part, number = key
    return f"{part}_{number:0{5 if part == 'train' else 4}d}"


def _annotations(reading: Reading, folder: str, keys: list[_Key], pictures: Pictures) -> dict[str, ColumnLike]:
    """Return the columns that the annotation folders hold; cells of rows without a file are null."""
    columns: dict[str, ColumnLike] = {}
    values, known = _read_files(reading, f"{folder}/manual", _MANUAL, keys, 13, _manual)
    if known.any():
        gender, race, age = (np.where(known, values[:, k], 0).astype(np.int64) for k in (10, 11, 12))
        columns["attribute_male"] = ((gender == 0).astype(np.float32), known & (gender < 2))
        columns["race"] = pa.array(RACES, pa.string()).take(pa.array(race, mask=~known))
        columns["age_group"] = pa.array(AGE_GROUPS, pa.string()).take(pa.array(age, mask=~known))
    if pictures == "aligned":
        return columns
    if known.any():
        points = values[:, :10].reshape(-1, 5, 2)
        apart = known & (np.ptp(points, axis=1).max(1) > 0)
        if apart.any() and np.median((points[:, 1, 0] - points[:, 0, 0])[apart]) < 0:
            points = points[:, [1, 0, 2, 4, 3]]
            reading.note("the five points begin with the eye on the image's right in most files; they were exchanged")
        columns["landmarks_5"] = (points.reshape(-1, 10).astype(np.float32), apart)
    box, known = _read_files(reading, f"{folder}/boundingbox", _BOX, keys, 4, _box)
    if known.any():
        empty = known & (box[:, :2] >= box[:, 2:]).any(1)
        if empty.any():
            reading.note(
                f"{int(empty.sum())} boxes are empty and missing (first: {_name(keys[int(np.argmax(empty))])})"
            )
        columns["box"] = (box.astype(np.float32), known & ~empty)
    return columns


def _read_files(
    reading: Reading, folder: str, ending: str, keys: list[_Key], width: int, parse: _Parser
) -> tuple[np.ndarray, np.ndarray]:
    """Return the numbers of one small file per row, float64 ``(N, width)``, and which rows have one, bool ``(N,)``."""
    files = _by_number(reading, folder, ending)
    values, known = np.zeros((len(keys), width)), np.zeros(len(keys), bool)
    for row, key in enumerate(keys):
        if key in files:
            path = f"{folder}/{files[key]}"
            values[row] = parse(reading.lines(path), str(reading.root / path))
            known[row] = True
    if not files:
        reading.note(f"there is no {folder}: what it annotates is missing")
    elif not known.all():
        missing = [_name(keys[row]) for row in np.flatnonzero(~known)]
        reading.note(f"{len(missing)} images have no file in {folder} (first: {missing[0]}): its labels are missing")
    return values, known


def _manual(lines: list[tuple[int, str]], path: str) -> list[float]:
    """Return the 13 numbers of a manual annotation: five points, gender, race, age group."""
    if len(lines) != 8:
        raise DataError(
            f"{path}, line {lines[-1][0] if lines else 1}: expected 8 lines (five points, gender, race, age group), "
            f"found {len(lines)}"
        )
    numbers: list[float] = []
    for number, line in lines[:5]:
        cells = line.split()
        where = f"{path}, line {number}"
        if len(cells) != 2:
            raise DataError(f"{where}: expected x and y of a point, found {line[:80]!r}")
        numbers += [_pixel(cell, where) for cell in cells]
    for (number, line), (what, most) in zip(
        lines[5:], (("gender", 2), ("race", 2), ("age group", len(AGE_GROUPS) - 1)), strict=True
    ):
        where = f"{path}, line {number}"
        code = number_of(line, where, integer=True)
        if not 0 <= code <= most:
            raise DataError(f"{where}: expected {what} from 0 to {most}, found {line[:80]!r}")
        numbers.append(code)
    return numbers


def _pixel(cell: str, where: str) -> float:
    value = number_of(cell, where)
    if abs(value) >= LIMIT:
        raise DataError(f"{where}: expected coordinates in pixels, found {cell[:40]!r}")
    return value


def _box(lines: list[tuple[int, str]], path: str) -> list[float]:
    """Return the first four numbers of a box annotation as x1, y1, x2, y2."""
    cells = [(number, cell) for number, line in lines for cell in line.split()][:4]
    if len(cells) < 4:
        where = f"{path}, line {lines[-1][0] if lines else 1}"
        raise DataError(f"{where}: expected x1 y1 x2 y2, found {len(cells)} numbers")
    return [_pixel(cell, f"{path}, line {number}") for number, cell in cells]


# ------------------------------------------------------------------------------------------------------ writing


def write(table: FaceTable, root: str | Path, images: ImageReader | None = None) -> None:
    """Write RAF-DB's layout from a table with the columns that ``read`` gives; image paths say which subset it is.

    A table of aligned images holds no points; the annotation files then get five equal ones, which are none.

    Args:
        table: One subset.
        root: Folder to write to.
        images: Pixels by row of the table; None reads the files of the table's own root.

    Raises:
        DataError: If a label is missing or unknown, or cannot be written in this layout.
    """
    root = Path(root)
    reader = FileImages(table) if images is None else images
    names = table.strings("image")[0]
    subset = str(names[0]).split("/")[0]
    if subset not in CLASSES:
        raise DataError(f"image {names[0]}: expected a path that begins with {' or '.join(CLASSES)}")
    stems = [Path(name).stem.removesuffix("_aligned") for name in names]
    codes = _file_values(table, "expression", CLASSES[subset], 1)
    if (codes < 0).any():
        raise DataError(f"image {names[int(np.argmax(codes < 0))]}: RAF-DB cannot leave out an expression")
    lines = [f"{stem}.jpg {code}" for stem, code in zip(stems, codes, strict=True)]
    write_lines(root / subset / _LIST, lines, final=False)
    _write_manual(table, root / subset / "Annotation" / "manual", stems)
    if "box" in table.names:
        boxes, known = table.numbers("box")
        for row in np.flatnonzero(known):
            path = root / subset / "Annotation" / "boundingbox" / f"{stems[row]}_boundingbox.txt"
            write_lines(path, [" ".join(f"{value:.4f}" for value in boxes[row])])
    write_images(table, root, reader)


def _write_manual(table: FaceTable, folder: Path, stems: list[str]) -> None:
    """Write the manual annotations of the rows that have a race and an age group."""
    if not {"race", "age_group"} <= table.names:
        if "landmarks_5" in table.names:
            raise DataError("RAF-DB writes points, race and age group in one file; add the columns race and age_group")
        return
    race, age = _file_values(table, "race", RACES, 0), _file_values(table, "age_group", AGE_GROUPS, 0)
    male, sure = table.numbers("attribute_male")
    gender = np.where(sure, 1 - male, 2).astype(int)
    points, drawn = np.zeros((len(table), 10), np.float32), np.zeros(len(table), bool)
    if "landmarks_5" in table.names:
        points, drawn = table.numbers("landmarks_5")
    written = (race >= 0) & (age >= 0)
    lost = ~written & (sure | drawn | (race >= 0) | (age >= 0))
    if lost.any():
        raise DataError(f"{stems[int(np.argmax(lost))]}: RAF-DB cannot leave out the race or age group alone")
    for row in np.flatnonzero(written):
        lines = [f"{x:.4f}\t{y:.4f}" for x, y in points[row].reshape(5, 2)]
        lines += [str(gender[row]), str(race[row]), str(age[row])]
        write_lines(folder / f"{stems[row]}_manu_attri.txt", lines)


def _file_values(table: FaceTable, column: str, names: tuple[str, ...], first: int) -> np.ndarray:
    """Return the file value of each cell of a text column, -1 where null, int64 ``(N,)``."""
    codes, found = table.codes(column)
    unknown = [name for name in found if name not in names]
    if unknown:
        raise DataError(f"column {column}: RAF-DB has no {unknown[0]!r}; {near(unknown[0], names)}")
    return np.array([*(names.index(name) + first for name in found), -1], np.int64)[codes]


def dress(faces: FaceTable, subset: Subset = "basic", pictures: Pictures = "aligned") -> Dressed:
    """Return built-in faces under RAF-DB's names; every fourth of them is a test image.

    Faces whose expression the subset lacks are left out. A compound class is one that begins (surprise: ends) with the
    face's expression; the other half of its name is not drawn. Drawn people have no sex and no race either: the number
    of the person and the skin's group stand in for them, so that ``group_by`` can be tried.

    Args:
        faces: Labels of built-in faces.
        subset: As in ``read``.
        pictures: As in ``read``.
    """
    _check(subset, pictures)
    named, given = faces.strings("expression")
    chosen: list[str | None] = []
    for row, (name, known) in enumerate(zip(named, given, strict=True)):
        options = _options(name, subset) if known else ()
        chosen.append(options[row % len(options)] if options else None)
    usable = np.flatnonzero([name is not None for name in chosen])
    # Training images come first in the official list.
    test = np.arange(len(usable)) % 4 == 3
    rows = np.concatenate([usable[~test], usable[test]])
    parts = ["train"] * int((~test).sum()) + ["test"] * int(test.sum())
    numbers = [*range(1, int((~test).sum()) + 1), *range(1, int(test.sum()) + 1)]
    stems = [_name(key) for key in zip(parts, numbers, strict=True)]
    ending = "_aligned.jpg" if pictures == "aligned" else ".jpg"
    person = faces.codes("subject")[0][rows]
    skin = faces.strings("skin_group", rows)[0]
    older = faces.numbers("attribute_older", rows)[0]
    columns: dict[str, ColumnLike] = {
        "image": [f"{subset}/Image/{pictures}/{stem}{ending}" for stem in stems],
        "part": parts,
        "expression": [chosen[row] for row in rows],
        "attribute_male": ((person % 2).astype(np.float32), np.arange(len(rows)) % 7 != 6),
        "race": [{"light": RACES[0], "dark": RACES[1]}.get(group, RACES[2]) for group in skin],
        "age_group": [AGE_GROUPS[3 if old > 0.5 else 2] for old in older],
    }
    if pictures == "original":
        columns["landmarks_5"] = faces.numbers("landmarks_5", rows)
        columns["box"] = faces.numbers("box", rows)
    metadata = {
        "dataset": "rafdb" if subset == "basic" else "rafdb_compound",
        "expressions": list(CLASSES[subset]),
        "label_source": "drawn faces under RAF-DB's names; never a result on people",
    }
    return Dressed(FaceTable.from_columns(columns, ".", metadata), rows)


_ADVERBS = {
    "happily": labels.HAPPINESS,
    "sadly": labels.SADNESS,
    "fearfully": labels.FEAR,
    "angrily": labels.ANGER,
    "disgustedly": labels.DISGUST,
}


def _options(expression: str, subset: Subset) -> tuple[str, ...]:
    """Return the classes of a subset that a drawn expression may stand for."""
    if subset == "basic":
        return (expression,) if expression in CLASSES["basic"] else ()
    if expression == labels.SURPRISE:
        return tuple(name for name in labels.RAFDB_COMPOUND if name.endswith(" surprised"))
    return tuple(name for name in labels.RAFDB_COMPOUND if _ADVERBS[name.split()[0]] == expression)


# ----------------------------------------------------------------------------------------------------- expected

_COUNTED = "counted in public copies of list_patition_label.txt"
_COUNTS = {"train": (1290, 281, 717, 4772, 1982, 705, 2524), "test": (329, 74, 160, 1185, 478, 162, 680)}


def expected(subset: Subset = "basic", pictures: Pictures = "aligned") -> tuple[Expected, ...]:
    """Return what the official RAF-DB holds."""
    _check(subset, pictures)
    size = Expected("size", (100, 100), "the aligned images' size in public readers")
    sizes = (size,) if pictures == "aligned" else ()
    if subset == "compound":
        recalled = {"rows": 3162 + 792, "rows/part=train": 3162, "rows/part=test": 792}
        return (*(Expected(key, value, "recalled", found=False) for key, value in recalled.items()), *sizes)
    found = [Expected("rows", 15339, _COUNTED)]
    for part, counts in _COUNTS.items():
        found.append(Expected(f"rows/part={part}", sum(counts), _COUNTED))
        found += [
            Expected(f"rows/part={part}/expression={name}", count, _COUNTED)
            for name, count in zip(CLASSES["basic"], counts, strict=True)
        ]
    return (*found, *sizes)
