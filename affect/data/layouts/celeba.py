# SPDX-License-Identifier: Apache-2.0
"""CelebA: 202,599 photographs of 10,177 celebrities with 40 attributes, five points and a box each.

Z. Liu, P. Luo, X. Wang and X. Tang, "Deep learning face attributes in the wild", ICCV 2015. For non-commercial research
(https://mmlab.ie.cuhk.edu.hk/projects/CelebA.html); identities are given on request. Layout on disk::

    <root>/
    ├── Img/img_align_celeba/000001.jpg        178 x 218, aligned and cropped
    ├── Img/img_celeba/000001.jpg              in the wild, any size
    ├── Anno/list_attr_celeba.txt              40 attributes, -1 or 1
    ├── Anno/list_landmarks_align_celeba.txt   five points in pixels of the aligned images
    ├── Anno/list_landmarks_celeba.txt         five points in pixels of the images in the wild
    ├── Anno/list_bbox_celeba.txt              x_1 y_1 width height in pixels of the images in the wild
    ├── Anno/identity_CelebA.txt               name identity, no header
    └── Eval/list_eval_partition.txt           name 0|1|2 (train, validation, test), no header

What is known of it, and how surely:

- The files ``list_…`` of ``Anno`` begin with the number of images and a line of column names; cells are separated by
  **one or more** blanks. The header of attributes and points has one cell fewer than the rows, because the name's
  column has none; that of boxes calls it ``image_id`` (read in a public reader). A file whose rows are not as many as
  its first line says is cut short, and refused.
- Aligned images go with the points of the aligned file, images in the wild with the plain file and the boxes. Mixing
  the two is the classic mistake, so ``pictures`` selects folder and annotations together.
- "Left" is left in the image: ``lefteye``, ``righteye``, ``nose``, ``leftmouth``, ``rightmouth`` are points 0 to 4 of
  scheme 5; 0 and 1, and 3 and 4, swap in a mirrored image.
- Coordinates are whole pixels. Whether these are counted from 0 or from 1 is not documented; they are taken as they
  are, which is this package's convention if they count from 0. A box becomes x1 = x_1, y1 = y_1, x2 = x_1 + width,
  y2 = y_1 + height; one of no size is missing.
- 162,770 training, 19,867 validation and 19,962 test images of disjoint people (recalled).

Columns: ``image``, ``subject`` (identity), ``part`` (train, validation, test), ``attribute_<name>`` (0 or 1, names in
lower case, e.g. ``attribute_5_o_clock_shadow``), ``landmarks_5`` and, in the wild, ``box``.
"""

from __future__ import annotations

import io
from collections.abc import Sequence
from pathlib import Path
from typing import Literal, NamedTuple

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
import pyarrow.csv as pa_csv

from affect import labels
from affect.data.expected import Expected
from affect.data.images import FileImages, ImageReader
from affect.data.layouts.common import Dressed, Reading, number_of, write_images, write_lines
from affect.data.table import ColumnLike, FaceTable
from affect.errors import ConfigError, DataError, near

__all__ = ["ATTRIBUTES", "LIMIT", "POINTS", "dress", "expected", "read", "write"]

Pictures = Literal["aligned", "wild"]

ATTRIBUTES = (
    *("5_o_Clock_Shadow", "Arched_Eyebrows", "Attractive", "Bags_Under_Eyes", "Bald", "Bangs", "Big_Lips", "Big_Nose"),
    *("Black_Hair", "Blond_Hair", "Blurry", "Brown_Hair", "Bushy_Eyebrows", "Chubby", "Double_Chin", "Eyeglasses"),
    *("Goatee", "Gray_Hair", "Heavy_Makeup", "High_Cheekbones", "Male", "Mouth_Slightly_Open", "Mustache"),
    *("Narrow_Eyes", "No_Beard", "Oval_Face", "Pale_Skin", "Pointy_Nose", "Receding_Hairline", "Rosy_Cheeks"),
    *("Sideburns", "Smiling", "Straight_Hair", "Wavy_Hair", "Wearing_Earrings", "Wearing_Hat", "Wearing_Lipstick"),
    *("Wearing_Necklace", "Wearing_Necktie", "Young"),
)
"""The 40 attributes as the file names them, in its order."""

POINTS = tuple(f"{name}_{axis}" for name in ("lefteye", "righteye", "nose", "leftmouth", "rightmouth") for axis in "xy")
"""Columns of the files of points, in the order of scheme 5."""

LIMIT = 1e5
"""Coordinates beyond this are no pixels of an image."""

_IDENTITY_LIMIT = 2**24
"""From here on whole numbers are not told apart in the precision that files are read in."""

PARTS = ("train", "validation", "test")
"""Parts by their number in the partition file."""

_FOLDERS = {"aligned": "Img/img_align_celeba", "wild": "Img/img_celeba"}
_LANDMARKS = {"aligned": "Anno/list_landmarks_align_celeba.txt", "wild": "Anno/list_landmarks_celeba.txt"}
_ATTRIBUTES = "Anno/list_attr_celeba.txt"
_BOXES = "Anno/list_bbox_celeba.txt"
_IDENTITIES = "Anno/identity_CelebA.txt"
_PARTITION = "Eval/list_eval_partition.txt"
_BOX = ("x_1", "y_1", "width", "height")


# ------------------------------------------------------------------------------------------------------ reading


def read(root: str | Path, pictures: Pictures = "aligned", identities: bool = True) -> FaceTable:
    """Return the face table of CelebA, rows in the order of the partition file.

    Args:
        root: Folder that holds ``Anno/``, ``Eval/`` and ``Img/``.
        pictures: ``aligned`` (178 x 218, with its own points) or ``wild`` (with points and boxes there).
        identities: Whether to read who is shown; False where the owner gave no identities, and then parts are held out
            by image.

    Raises:
        ConfigError: If an option is unknown.
        DataError: If the root is another folder, or a file holds what it should not (file and line are named).
    """
    _check(pictures)
    reading = Reading(root, "celeba", holds=("Anno", "Eval", "Img"))
    partition = _read_list(reading, _PARTITION, ("partition",))
    _require(reading, _PARTITION, partition, np.isin(partition.values[:, 0], (0, 1, 2)), "0, 1 or 2")
    attributes = _read_counted(reading, _ATTRIBUTES)
    _require(reading, _ATTRIBUTES, attributes, (np.abs(attributes.values) == 1).all(1), "attributes -1 or 1")
    _require_parts(reading, partition, attributes)
    points = _read_pixels(reading, _LANDMARKS[pictures], POINTS)

    folder = _FOLDERS[pictures]
    there = pc.is_in(partition.images, value_set=pa.array(reading.listing(folder), pa.string()))
    there = there.to_numpy(zero_copy_only=False)
    if len(there) and not there.any():
        raise DataError(f"{reading.root / folder}: none of the {len(there)} images is there; unpack them into it")
    reading.skip("image is missing", partition.images.filter(pa.array(~there)).to_pylist())
    kept = np.flatnonzero(there)
    names = partition.images.take(pa.array(kept))
    columns: dict[str, ColumnLike] = {
        "image": pc.binary_join_element_wise(pa.scalar(folder), names, "/"),
        "part": pa.array(PARTS, pa.string()).take(pa.array(partition.values[kept, 0].astype(np.int64))),
    }
    if identities:
        found = _read_list(reading, _IDENTITIES, ("identity",))
        whole = found.values[:, 0]
        named = (whole == np.round(whole)) & (whole > 0) & (whole < _IDENTITY_LIMIT)
        _require(reading, _IDENTITIES, found, named, "an identity, a whole number from 1")
        values, known = _aligned(reading, _IDENTITIES, found, names)
        columns["subject"] = pa.array(values[:, 0].astype(np.int64), mask=~known).cast(pa.string())
    values, known = _aligned(reading, _ATTRIBUTES, attributes, names)
    for k, name in enumerate(attributes.columns):
        columns[f"attribute_{name.lower()}"] = (np.ascontiguousarray((values[:, k] + 1) / 2), known)
    columns["landmarks_5"] = _aligned(reading, _LANDMARKS[pictures], points, names)
    if pictures == "wild":
        boxes, known = _aligned(reading, _BOXES, _read_pixels(reading, _BOXES, _BOX), names)
        sized = (boxes[:, 2:] > 0).all(1)
        if (known & ~sized).any():
            reading.note(f"{int((known & ~sized).sum())} boxes have no size and are missing")
        columns["box"] = (np.concatenate([boxes[:, :2], boxes[:, :2] + boxes[:, 2:]], 1), known & sized)
    people = {"people": "celeba"} if identities else {}
    return reading.table(columns, label_source="CelebA: annotators of a professional company", **people)


def _check(pictures: str) -> None:
    if pictures not in _FOLDERS:
        raise ConfigError(f"pictures={pictures}: {near(pictures, _FOLDERS)}")


def _require_parts(reading: Reading, partition: _List, attributes: _List) -> None:
    """Raise ``DataError`` if an image with attributes is in no part: the partition file has no count of its own."""
    without = attributes.images.filter(pc.invert(pc.is_in(attributes.images, value_set=partition.images)))
    if len(without):
        raise DataError(
            f"{reading.root / _PARTITION}: {len(without):,} images of {_ATTRIBUTES} are in no part "
            f"(first: {without[0]}), expected a line of each; the file may be cut short, copy it again"
        )


class _List(NamedTuple):
    """An annotation file: image names ``(N,)``, columns' names, values float32 ``(N, C)`` and lines before the rows."""

    images: pa.Array
    columns: tuple[str, ...]
    values: np.ndarray
    skip: int


def _read_counted(reading: Reading, path: str, wanted: Sequence[str] | None = None) -> _List:
    """Return a file that begins with the number of its rows and a header.

    Args:
        reading: The pass.
        path: File, relative to the root.
        wanted: Columns to return, in this order; None for all.
    """
    full = reading.root / path
    text = reading.text(path)
    head = [(number, line.split()) for number, line in enumerate(text[:10000].split("\n"), 1) if line.strip()][:2]
    if len(head) < 2:
        raise DataError(f"{full}: expected the number of images, column names and rows; the file is cut short")
    (first, count), (second, header) = head
    stated = number_of(" ".join(count), f"{full}, line {first}", integer=True)
    # The name's column may have no name of its own.
    names = tuple(header[1:] if header[0].lower() == "image_id" else header)
    where = f"{full}, line {second}"
    doubled = sorted({name for name in names if names.count(name) > 1})
    if doubled:
        raise DataError(f"{where}: column {doubled[0]} occurs more than once")
    for name in wanted or ():
        if name not in names:
            raise DataError(
                f"{where}: no column {name}; expected {' '.join(wanted or ())}, found {' '.join(names)[:120]}"
            )
    found = _read_list(reading, path, names, skip=2, text=text)
    if stated != len(found.images):
        raise DataError(
            f"{full}, line {first}: expected {stated:.0f} rows as this line says, found {len(found.images)}; "
            "the file may be cut short"
        )
    if wanted is None:
        return found
    return found._replace(columns=tuple(wanted), values=found.values[:, [names.index(name) for name in wanted]])


def _read_pixels(reading: Reading, path: str, columns: Sequence[str]) -> _List:
    """Return a counted file of coordinates."""
    found = _read_counted(reading, path, columns)
    _require(reading, path, found, (np.abs(found.values) < LIMIT).all(1), "coordinates in pixels")
    return found


def _read_list(reading: Reading, path: str, columns: Sequence[str], skip: int = 0, text: str | None = None) -> _List:
    """Return a file of lines with an image name and numbers, separated by one or more blanks.

    Raises:
        DataError: With the line that has another number of fields, holds no number or names an image again.
    """
    content = reading.text(path) if text is None else text
    found = _fast(content, columns, skip)
    if found is None:
        names, rows = [], []
        for number, line in reading.lines(path)[skip:]:
            name, *cells = line.split()
            where = f"{reading.root / path}, line {number}"
            if len(cells) != len(columns):
                raise DataError(f"{where}: {len(cells) + 1} fields, expected {len(columns) + 1} (a name and numbers)")
            names.append(name)
            rows.append([number_of(cell, where) for cell in cells])
        found = pa.array(names, pa.string()), np.array(rows, np.float32).reshape(-1, len(columns))
    images, values = found
    if not len(images):
        what = "no line below its header" if skip else "an empty file"
        raise DataError(f"{reading.root / path}: expected lines with an image and numbers, found {what}; copy it again")
    if len(images) != len(images.unique()):
        codes = images.dictionary_encode().indices.to_numpy()
        again = np.ones(len(codes), bool)
        again[np.unique(codes, return_index=True)[1]] = False
        number, line = reading.lines(path)[skip + int(np.argmax(again))]
        raise DataError(
            f"{reading.root / path}, line {number}: {line.split()[0]} is in an earlier line too; remove one"
        )
    return _List(images, tuple(columns), values, skip)


def _fast(text: str, columns: Sequence[str], skip: int) -> tuple[pa.Array, np.ndarray] | None:
    """Return names and numbers of a well-formed text, None if a line has to be looked at one by one."""
    # Blanks of one kind, one at a time, none at the ends of lines. A regular expression would take ten times as long.
    body = text.replace("\t", " ")
    while "  " in body:
        body = body.replace("  ", " ")
    body = body.replace(" \n", "\n").replace("\n ", "\n").lstrip()
    for _ in range(skip):
        body = body.partition("\n")[2].lstrip()
    if not body:
        return pa.array([], pa.string()), np.empty((0, len(columns)), np.float32)
    names = [str(k) for k in range(len(columns) + 1)]
    kinds = {name: pa.float32() for name in names[1:]}
    try:
        table = pa_csv.read_csv(
            io.BytesIO(body.encode()),
            read_options=pa_csv.ReadOptions(column_names=names),
            parse_options=pa_csv.ParseOptions(delimiter=" ", quote_char=False),
            convert_options=pa_csv.ConvertOptions(
                column_types={**kinds, "0": pa.string()}, null_values=[], strings_can_be_null=False
            ),
        )
    except pa.ArrowInvalid:
        return None
    values = np.stack([table[name].to_numpy() for name in names[1:]], 1)
    return (table["0"].combine_chunks(), values) if np.isfinite(values).all() else None


def _require(reading: Reading, path: str, found: _List, good: np.ndarray, expected: str) -> None:
    if not good.all():
        reading.require(path, good, expected, found.skip)


def _aligned(reading: Reading, path: str, found: _List, names: pa.Array) -> tuple[np.ndarray, np.ndarray]:
    """Return the values of images by name, 0 where the file has none, and which it has, ``(N, C)`` and ``(N,)``."""
    if found.images.equals(names):
        return found.values, np.ones(len(names), bool)
    place = pc.index_in(names, value_set=found.images)
    known = place.is_valid().to_numpy(zero_copy_only=False)
    place = place.fill_null(0).to_numpy(zero_copy_only=False).astype(np.int64)
    if not known.all():
        missing = names[int(np.argmin(known))]
        reading.note(f"{int((~known).sum())} images are not in {path} (first: {missing}): its labels are missing")
    if not len(found.images):
        return np.zeros((len(names), len(found.columns)), np.float32), known
    return np.where(known[:, None], found.values[place], 0).astype(np.float32), known


# ------------------------------------------------------------------------------------------------------ writing


def write(table: FaceTable, root: str | Path, images: ImageReader | None = None) -> None:
    """Write CelebA's layout from a table with the columns that ``read`` gives; image paths say which images it has.

    Args:
        table: Aligned images or images in the wild.
        root: Folder to write to.
        images: Pixels by row of the table; None reads the files of the table's own root.

    Raises:
        DataError: If a part, an identity, an attribute or the points of an image are missing, which CelebA cannot say.
    """
    root = Path(root)
    reader = FileImages(table) if images is None else images
    paths = table.strings("image")[0]
    kind = next((kind for kind, folder in _FOLDERS.items() if str(paths[0]).startswith(folder + "/")), None)
    if kind is None:
        raise DataError(f"image {paths[0]}: expected a path that begins with {' or '.join(_FOLDERS.values())}")
    names = [path.rpartition("/")[2] for path in paths]
    parts = [_number(part, names[row]) for row, part in enumerate(table.strings("part")[0])]
    write_lines(root / _PARTITION, [f"{name} {part}" for name, part in zip(names, parts, strict=True)])
    if "subject" in table.names:
        subjects, known = table.strings("subject")
        _complete(known, names, "subject")
        write_lines(root / _IDENTITIES, [f"{name} {who}" for name, who in zip(names, subjects, strict=True)])
    official = {f"attribute_{name.lower()}": name for name in ATTRIBUTES}
    stored = [name for name in table.arrow.column_names if name.startswith("attribute_")]
    signs = []
    for name in stored:
        values, known = table.numbers(name)
        _complete(known, names, name)
        signs.append(np.where(values > 0.5, 1, -1))
    header = " ".join(official.get(name, name.removeprefix("attribute_")) for name in stored)
    _write_counted(root / _ATTRIBUTES, names, header, np.stack(signs, 1))
    points, known = table.numbers("landmarks_5")
    _complete(known, names, "landmarks_5")
    _write_counted(root / _LANDMARKS[kind], names, " ".join(POINTS), points)
    if kind == "wild":
        boxes, known = table.numbers("box")
        boxes = np.concatenate([boxes[:, :2], boxes[:, 2:] - boxes[:, :2]], 1)
        _write_counted(root / _BOXES, names, "image_id " + " ".join(_BOX), np.where(known[:, None], boxes, 0))
    write_images(table, root, reader)


def _number(part: str, name: str) -> int:
    if part not in PARTS:
        raise DataError(f"image {name}: CelebA has no part {part!r}; {near(part, PARTS)}")
    return PARTS.index(part)


def _complete(known: np.ndarray, names: Sequence[str], column: str) -> None:
    if not known.all():
        raise DataError(f"image {names[int(np.argmin(known))]}: CelebA cannot leave out {column}")


def _write_counted(path: Path, names: Sequence[str], header: str, values: np.ndarray) -> None:
    """Write a file with its count, its header and rows in columns of one width, as the official files have them."""
    rows = [
        f"{name} " + " ".join(f"{np.format_float_positional(value, 4, trim='-'):>3}" for value in row)
        for name, row in zip(names, values.tolist(), strict=True)
    ]
    write_lines(path, [str(len(names)), header + " ", *rows])


def dress(faces: FaceTable, pictures: Pictures = "aligned") -> Dressed:
    """Return built-in faces under CelebA's names; of four people two train, one selects and one tests.

    Attributes that the drawing shows are true (smile, open mouth, glasses, beard, youth, baldness, pale skin); those
    that it never shows, e.g. a hat, are 0. Points and boxes are rounded to whole pixels, as in CelebA.

    Args:
        faces: Labels of built-in faces with points.
        pictures: As in ``read``.
    """
    _check(pictures)
    usable = np.flatnonzero(faces.numbers("landmarks_5")[1] & faces.numbers("box")[1])
    person = faces.codes("subject")[0][usable]
    # People are numbered as they occur, so that every part has some however few there are.
    distinct, first, place = np.unique(person, return_index=True, return_inverse=True)
    identity = np.empty(len(distinct), np.int64)
    identity[np.argsort(first)] = np.arange(len(distinct))
    identity = identity[place]
    part = np.array([0, 2, 1, 0])[identity % 4]
    order = np.argsort(part, kind="stable")
    rows, identity, part = usable[order], identity[order], part[order]

    def shown(name: str) -> np.ndarray:
        values, known = faces.numbers(name, rows)
        return known & (values > 0.5)

    expression = faces.strings("expression", rows)[0]
    true = {
        "Smiling": shown(labels.occurrence_column(12)) | (expression == labels.HAPPINESS),
        "Mouth_Slightly_Open": shown(labels.occurrence_column(25)) | shown(labels.occurrence_column(26)),
        "Eyeglasses": shown("attribute_glasses"),
        "No_Beard": ~shown("attribute_beard"),
        "Young": ~shown("attribute_older"),
        "Bald": shown("attribute_bald"),
        "Pale_Skin": faces.strings("skin_group", rows)[0] == "light",
    }
    nowhere = np.zeros(len(rows), bool)
    columns: dict[str, ColumnLike] = {
        "image": [f"{_FOLDERS[pictures]}/{k:06d}.jpg" for k in range(1, len(rows) + 1)],
        "part": [PARTS[k] for k in part],
        "subject": [str(k + 1) for k in identity],
    }
    for name in ATTRIBUTES:
        columns[f"attribute_{name.lower()}"] = true.get(name, nowhere).astype(np.float32)
    columns["landmarks_5"] = np.rint(faces.numbers("landmarks_5", rows)[0])
    if pictures == "wild":
        columns["box"] = np.rint(faces.numbers("box", rows)[0])
    metadata = {
        "dataset": "celeba",
        "people": "celeba",
        "label_source": "drawn faces under CelebA's names; never a result on people",
    }
    return Dressed(FaceTable.from_columns(columns, ".", metadata), rows)


# ----------------------------------------------------------------------------------------------------- expected


def expected(pictures: Pictures = "aligned", identities: bool = True) -> tuple[Expected, ...]:
    """Return what the official CelebA holds; nothing of it was counted in a public list."""
    _check(pictures)
    recalled: dict[str, float] = {
        "rows": 202599,
        "rows/part=train": 162770,
        "rows/part=validation": 19867,
        "rows/part=test": 19962,
        "rate/attribute_male": 0.417,
        "rate/attribute_smiling": 0.482,
        "rate/attribute_young": 0.774,
    }
    if identities:
        recalled["distinct/subject"] = 10177
    found = [Expected(key, value, "recalled", found=False) for key, value in recalled.items()]
    if pictures == "aligned":
        found.append(Expected("size", (178, 218), "recalled", found=False))
    return tuple(found)
