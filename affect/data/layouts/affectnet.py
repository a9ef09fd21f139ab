# SPDX-License-Identifier: Apache-2.0
"""AffectNet as delivered, both releases: expressions, valence and arousal of photographs from the web.

Mollahosseini, Hasani and Mahoor, "AffectNet: a database for facial expression, valence, and arousal computing in the
wild", IEEE Transactions on Affective Computing 2019. For research, on request to the University of Denver. Two releases
circulate, and models that were trained on one lose about two points on the other, so results say which it was. Layout
on disk (facts counted in public readers unless they are marked)::

    <root>/                                                 new release
    ├── train_set/images/<id>.jpg                           224 x 224 crops; ids without padding and with gaps
    ├── train_set/annotations/<id>_exp.npy                  0 to 7
    ├── train_set/annotations/<id>_val.npy, <id>_aro.npy    -1 to 1, -2 where missing
    ├── train_set/annotations/<id>_lnd.npy                  136 numbers, x and y alternating
    └── val_set/…                                           same; the test set of every paper

    <root>/                                                 old release
    ├── Manually_Annotated/Manually_Annotated_Images/<dir>/<hash>.<ext>     photographs, not cropped
    ├── Manually_Annotated_file_lists/training.csv, validation.csv
    ├── Automatically_Annotated/Automatically_Annotated_Images/…            labelled by a network, optional
    └── Automatically_Annotated_file_lists/automatically_annotated.csv

The lists of the old release have the columns ``subDirectory_filePath, face_x, face_y, face_width, face_height,
facial_landmarks, expression, valence, arousal``. Points are ``x1;y1;x2;y2;…`` in pixels of the photograph. Copies in
which the outer folder ``Manually_Annotated`` is missing, or holds the lists too, are read as well.

    expression   0 neutral, 1 happiness, 2 sadness, 3 surprise, 4 fear, 5 disgust, 6 anger, 7 contempt,
                 8 none, 9 uncertain, 10 no face

Traps that are handled, each with a test:

- Numbers in ``.npy`` files are arrays of rank 0, some of them *strings*. Nothing is unpickled.
- Images without label files and label files without an image are counted.
- Some copies of ``validation.csv`` have no header, which shows in a second field that is a number. In some, the 136
  numbers of the points are columns of their own: the last three columns count from the end.
- One row of ``training.csv`` is malformed. As many as ``malformed`` are left out and counted; more are an error, and so
  is one that ends the file without a line end: the file is cut short.
- Extensions mix (jpg, jpeg, png, bmp, tif, upper case) and lie about what is inside. They only name the file.
- A box of negative width (recalled) is missing, and noted; points may lie outside of the photograph.
- A photograph that is listed twice (recalled) counts once; one that is in both lists is in ``validation`` only.
- Roots that hold both releases are an error unless ``release`` says which.
"""

from __future__ import annotations

import csv
import hashlib
import io
import os
import re
from collections.abc import Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from types import MappingProxyType
from typing import NamedTuple

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
import pyarrow.csv as pa_csv
from tqdm import tqdm

from affect import labels
from affect.data.expected import Expected
from affect.data.images import FileImages, ImageReader
from affect.data.layouts.common import EXAMPLES, Dressed, Reading, write_images, write_lines
from affect.data.table import ColumnLike, FaceTable
from affect.errors import ConfigError, DataError, near
from affect.files import replacing

__all__ = ["COLUMNS", "RELEASES", "dress", "expected", "read", "write"]

DATASET = "affectnet"

RELEASES = ("new", "old")

COLUMNS = (
    "subDirectory_filePath",
    "face_x",
    "face_y",
    "face_width",
    "face_height",
    "facial_landmarks",
    "expression",
    "valence",
    "arousal",
)
"""Columns of the old release's lists."""

_CLASSES = labels.EXPRESSION_ORDERS["affectnet8"]
_UNUSED = MappingProxyType({8: "expression is None (8)", 9: "expression is Uncertain (9)", 10: "no face (10)"})
_SETS = MappingProxyType({"train": "train_set", "validation": "val_set"})
_LISTS = MappingProxyType({"train": "training.csv", "validation": "validation.csv"})
_MANUAL, _AUTOMATIC = "Manually_Annotated", "Automatically_Annotated"
_FARTHEST = 1e5
"""Coordinates beyond this many pixels are damage."""
_POINTS = labels.SCHEMES["68"].points * 2
_LANDMARKS = labels.SCHEMES["68"].column
_FILE = re.compile(r"(\d+)_(exp|val|aro|lnd)\.npy")
_NUMBER = r"^\s*[-+]?(\d+\.?\d*|\.\d+)([eE][-+]?\d+)?\s*$"
_THREADS, _CHUNK = 16, 2000


def read(
    root: str | Path,
    release: str = "auto",
    uncertain: str = "drop",
    automatic: bool = False,
    malformed: int = 1,
) -> FaceTable:
    """Return the face table of AffectNet.

    Args:
        root: Folder that holds ``train_set`` and ``val_set``, or ``Manually_Annotated``.
        release: ``new``, ``old``, or ``auto`` for the one that is there.
        uncertain: What becomes of expressions 8 (none) and 9 (uncertain): ``drop`` leaves them out; ``keep`` keeps
            those with valence and arousal, without an expression. Rows without a face (10) are always left out.
        automatic: Old release: add the photographs that a network labelled to part ``train``. Column ``annotation``
            tells them apart (``manual``, ``automatic``).
        malformed: Old release: rows per list that may be unreadable.

    Returns:
        Rows of part ``train``, then ``validation``: by id in the new release, in the order of the lists in the old one
        (automatically annotated rows last), with ``image``, ``part``, ``expression``, ``valence``, ``arousal``,
        ``landmarks_68`` and, in the old release, ``box``.

    Raises:
        ConfigError: If an option is unknown.
        DataError: If the tree is none of AffectNet or holds both releases, or a file is malformed.
    """
    for name, value, options in (
        ("release", release, ("auto", *RELEASES)),
        ("uncertain", uncertain, ("drop", "keep")),
    ):
        if value not in options:
            raise ConfigError(f"dataset.{name}={value}: {near(str(value), options)}")
    reading = Reading(root, DATASET, holds=(*_SETS.values(), *_list_choices(_MANUAL, _LISTS["train"])))
    inside = reading.listing(".")
    new = [name for name in _SETS.values() if name in inside]
    old = [name for name in inside if name.startswith((_MANUAL, _AUTOMATIC)) or name == _LISTS["train"]]
    if release == "auto" and new and old:
        raise DataError(
            f"{reading.root}: mixed AffectNet releases: {' and '.join(new)} are the new one, {' and '.join(old)} the "
            "old one; choose by dataset.release=new or dataset.release=old"
        )
    for asked, there, other, config in (("new", new, old, "affectnet_old"), ("old", old, new, "affectnet")):
        if release == asked and not there:
            raise DataError(
                f"{reading.root} holds the other release of AffectNet ({', '.join(other)}), not the {asked} one; use "
                f"dataset={config}, or dataset.release=auto"
            )
    if new and old:
        reading.note(f"the root holds both releases of AffectNet; this is the {release} one")
    if release == "new" or (release == "auto" and new):
        if automatic:
            raise ConfigError("dataset.automatic=true: only the old release has photographs that a network labelled")
        return _read_new(reading, uncertain)
    return _read_old(reading, uncertain, automatic, malformed)


class _Rows(NamedTuple):
    """Rows of one list or part.

    Attributes:
        names: Image of each row, relative to the root ``(N,)``.
        numbers: Expression, valence, arousal, each NaN where there is no file ``(N, 3)`` float64.
        points: ``(N, 136)`` float32.
        drawn: Whether a row has points ``(N,)``.
        boxes: x1 y1 x2 y2 ``(N, 4)`` float32; empty in the new release.
    """

    names: pa.Array
    numbers: np.ndarray
    points: np.ndarray
    drawn: np.ndarray
    boxes: np.ndarray

    def take(self, rows: np.ndarray) -> _Rows:
        boxes = self.boxes[rows] if len(self.boxes) else self.boxes
        names = self.names.take(pa.array(rows))
        return _Rows(names, self.numbers[rows], self.points[rows], self.drawn[rows], boxes)


def _labelled(reading: Reading, rows: _Rows, uncertain: str) -> np.ndarray:
    """Return which rows have a label that is used ``(N,)``, and count the others."""
    expression, values = rows.numbers[:, 0], rows.numbers[:, 1:]
    known = (np.abs(values) <= 1).any(1)
    keep = expression < len(_CLASSES)
    for number, reason in _UNUSED.items():
        chosen = expression == number
        if uncertain == "keep" and number != 10:
            keep |= chosen & known
            chosen &= ~known
            reason += " and neither valence nor arousal"
        _skip(reading, reason, rows.names, chosen)
    return keep


def _skip(reading: Reading, reason: str, names: pa.Array, left_out: np.ndarray) -> None:
    at = np.flatnonzero(left_out)
    reading.skip(reason, names.take(pa.array(at[:EXAMPLES])).to_pylist(), count=len(at))


def _columns(parts: Sequence[tuple[str, _Rows]]) -> dict[str, ColumnLike]:
    """Return the columns that both releases have."""
    numbers = np.concatenate([rows.numbers for _, rows in parts])
    names = pa.concat_arrays([rows.names for _, rows in parts])
    counts = [len(rows.names) for _, rows in parts]
    known = numbers[:, 0] < len(_CLASSES)
    index = np.where(known, numbers[:, 0], 0).astype(np.int64)
    columns: dict[str, ColumnLike] = {
        "image": names,
        "part": pa.array([part for part, _ in parts], pa.string()).take(
            pa.array(np.repeat(np.arange(len(parts)), counts))
        ),
        "expression": pa.array(_CLASSES, pa.string()).take(pa.array(index, mask=~known)),
        _LANDMARKS: (np.concatenate([rows.points for _, rows in parts]), np.concatenate([r.drawn for _, r in parts])),
    }
    for k, axis in enumerate(labels.AFFECT_AXES, 1):
        values = numbers[:, k]
        columns[axis] = (values.astype(np.float32), np.abs(values) <= 1)
    return columns


# -------------------------------------------------------------------------------------------------- new release


def _read_new(reading: Reading, uncertain: str) -> FaceTable:
    """Return the table of the new release."""
    parts = [(part, _read_set(reading, folder, uncertain)) for part, folder in _SETS.items()]
    return reading.table(
        _columns(parts), label_source="annotators of AffectNet", release="new", expressions=list(_CLASSES)
    )


def _read_set(reading: Reading, folder: str, uncertain: str) -> _Rows:
    """Return the rows of one part: its images that have an expression."""
    images = reading.numbered(f"{folder}/images")
    files: dict[str, dict[int, str]] = {kind: {} for kind in ("exp", "val", "aro", "lnd")}
    reading.touch_files(f"{folder}/annotations")
    for name in reading.listing(f"{folder}/annotations"):
        match = _FILE.fullmatch(name)
        if match is not None:
            files[match[2]][int(match[1])] = name
    if not images or not files["exp"]:
        raise DataError(
            f"{reading.root / folder}: expected images/<id>.jpg and annotations/<id>_exp.npy, "
            f"found {len(images)} images and {len(files['exp'])} expressions"
        )
    orphans = sorted(set().union(*files.values()) - set(images))
    reading.skip("label files without an image", [f"{folder}/annotations/{k}" for k in orphans])
    ids = sorted(set(images) & set(files["exp"]))
    bare = sorted(set(images) - set(files["exp"]))
    reading.skip("image without an expression file", [f"{folder}/images/{images[k]}" for k in bare])
    place = {number: row for row, number in enumerate(ids)}
    numbers, points = np.full((len(ids), 3), np.nan), np.zeros((len(ids), _POINTS), np.float32)
    drawn = np.zeros(len(ids), bool)
    directory = reading.root / folder / "annotations"
    wanted = {kind: [number for number in held if number in place] for kind, held in files.items()}
    with tqdm(
        total=sum(map(len, wanted.values())), desc=f"{DATASET} {folder}", unit="file", leave=False, disable=None
    ) as bar:
        for k, (kind, held) in enumerate(files.items()):
            rows = np.fromiter((place[number] for number in wanted[kind]), np.int64, len(wanted[kind]))
            names = [held[number] for number in wanted[kind]]
            width = _POINTS if kind == "lnd" else 1
            for start, values in _arrays(directory, names, width):
                at = rows[start : start + len(values)]
                if kind == "lnd":
                    far = np.abs(values).max(1) > _FARTHEST
                    if far.any():
                        damaged = directory / names[start + int(np.argmax(far))]
                        raise DataError(f"{damaged}: expected coordinates in pixels, found {np.abs(values).max():g}")
                    points[at], drawn[at] = values, True
                else:
                    _require_range(directory, names[start : start + len(values)], kind, values[:, 0])
                    numbers[at, k] = values[:, 0]
                bar.update(len(values))
            absent = len(ids) - len(names)
            if absent:
                reading.note(f"{folder}: {absent} images have no file _{kind}.npy")
    listed = pa.array([f"{folder}/images/{images[number]}" for number in ids], pa.string())
    found = _Rows(listed, numbers, points, drawn, np.empty((0, 4), np.float32))
    return found.take(np.flatnonzero(_labelled(reading, found, uncertain)))


def _require_range(folder: Path, names: Sequence[str], kind: str, values: np.ndarray) -> None:
    if kind == "exp":
        good, expected = np.isin(values, np.arange(11)), "a class from 0 to 7"
    else:
        good, expected = (np.abs(values) <= 1) | (values == -2), "a number from -1 to 1, or -2"
    if not good.all():
        first = int(np.argmin(good))
        raise DataError(f"{folder / names[first]}: expected {expected}, found {values[first]:g}")


def _arrays(folder: Path, names: Sequence[str], width: int) -> Iterator[tuple[int, np.ndarray]]:
    """Yield the numbers of ``.npy`` files in blocks: index of the first, float64 ``(n, width)``.

    The files are tiny and many: threads wait for the disk together, and files of one type are decoded at once.
    """
    starts = range(0, len(names), _CHUNK)
    with ThreadPoolExecutor(_THREADS) as pool:
        blocks = pool.map(lambda start: _block(folder, names[start : start + _CHUNK], width), starts)
        yield from zip(starts, blocks, strict=True)


def _block(folder: Path, names: Sequence[str], width: int) -> np.ndarray:
    """Return the numbers of ``.npy`` files, float64 ``(n, width)``.

    Raises:
        DataError: With the first file that holds no such array.
    """
    prefix = f"{folder}/"
    by_header: dict[bytes, tuple[list[int], list[bytes]]] = {}
    for k, name in enumerate(names):
        try:
            with open(prefix + name, "rb", buffering=0) as stream:  # noqa: PTH123 - a Path each costs as much as the rest
                data = stream.readall()
        except OSError as error:
            raise DataError(f"{folder / name}: cannot be read ({error.strerror})") from error
        end = 10 + int.from_bytes(data[8:10], "little")
        rows, bodies = by_header.setdefault(data[:end], ([], []))
        rows.append(k)
        bodies.append(data[end:])
    values = np.empty((len(names), width))
    for header, (rows, bodies) in by_header.items():
        try:
            values[rows] = _decode(header, bodies, width)
        except ValueError:
            for k, body in zip(rows, bodies, strict=True):
                try:
                    _decode(header, [body], width)
                except ValueError as error:
                    raise DataError(f"{folder / names[k]}: {error}") from error
    return values


def _decode(header: bytes, bodies: Sequence[bytes], width: int) -> np.ndarray:
    """Return the numbers of arrays that share a header, float64 ``(n, width)``.

    Raises:
        ValueError: If they are no such arrays.
    """
    stream = io.BytesIO(header)
    try:
        version = np.lib.format.read_magic(stream)
        if version != (1, 0):
            raise ValueError(f"version {version}")
        shape, _, kind = np.lib.format.read_array_header_1_0(stream)
    except Exception as error:  # a damaged header fails anywhere inside Python's own parser
        raise ValueError(f"expected a NumPy array of version 1, found {header[:8]!r}") from error
    if kind.hasobject or kind.kind not in "iufSU" or not kind.itemsize or int(np.prod(shape)) != width:
        raise ValueError(f"expected {'a number' if width == 1 else f'{width} numbers'}, found {kind} of shape {shape}")
    data = b"".join(bodies)
    if len(data) != len(bodies) * width * kind.itemsize or any(len(b) != width * kind.itemsize for b in bodies):
        raise ValueError(f"cut short: expected {width * kind.itemsize} bytes of numbers, found {len(bodies[0])}")
    try:
        values = np.frombuffer(data, kind).reshape(len(bodies), width).astype(np.float64)
    except ValueError:
        raise ValueError(f"expected a number, found {str(np.frombuffer(data, kind)[0])[:40]!r}") from None
    if not np.isfinite(values).all():
        raise ValueError("expected finite numbers, found NaN or infinity")
    return values


# -------------------------------------------------------------------------------------------------- old release


def _read_old(reading: Reading, uncertain: str, automatic: bool, malformed: int) -> FaceTable:
    """Return the table of the old release."""
    validation = _read_list(reading, _MANUAL, _LISTS["validation"], malformed)
    training = _read_list(reading, _MANUAL, _LISTS["train"], malformed)
    shared = pc.is_in(training.names, value_set=validation.names).to_numpy(zero_copy_only=False)
    _skip(reading, "training photograph that is in the validation list", training.names, shared)
    parts = [("train", training.take(np.flatnonzero(~shared))), ("validation", validation)]
    kinds = ["manual", "manual"]
    if automatic:
        parts.append(("train", _read_list(reading, _AUTOMATIC, "automatically_annotated.csv", malformed)))
        kinds.append("automatic")
    parts = [(part, _used(reading, rows, uncertain)) for part, rows in parts]
    columns = _columns(parts)
    boxes = np.concatenate([rows.boxes for _, rows in parts if len(rows.boxes)] or [np.empty((0, 4), np.float32)])
    sized = (boxes[:, 2:] > boxes[:, :2]).all(1)
    columns["box"] = (boxes, sized)
    if not sized.all():
        reading.note(f"{int((~sized).sum())} faces have a box without width or height; it is missing")
    if automatic:
        counts = [len(rows.names) for _, rows in parts]
        columns["annotation"] = pa.array(kinds, pa.string()).take(pa.array(np.repeat(np.arange(len(parts)), counts)))
    return reading.table(
        columns,
        label_source="annotators of AffectNet" + (" and a network (automatically annotated)" if automatic else ""),
        release="old",
        expressions=list(_CLASSES),
    )


def _used(reading: Reading, rows: _Rows, uncertain: str) -> _Rows:
    """Return the rows that have a label and an image, and count the others."""
    rows = rows.take(np.flatnonzero(_labelled(reading, rows, uncertain)))
    folders = pc.replace_substring_regex(rows.names, r"/[^/]*$", "")
    there = [f"{folder}/{name}" for folder in pc.unique(folders).to_pylist() for name in reading.listing(folder)]
    found = pc.is_in(rows.names, value_set=pa.array(there, pa.string())).to_numpy(zero_copy_only=False)
    _skip(reading, "image is missing", rows.names, ~found)
    return rows.take(np.flatnonzero(found))


def _list_choices(kind: str, name: str) -> tuple[str, ...]:
    """Return where copies of the old release have a list, relative to the root."""
    lists = f"{kind}_file_lists"
    return f"{lists}/{name}", f"{kind}/{lists}/{name}", f"{kind}/{name}", name


def _one_of(reading: Reading, choices: Sequence[str]) -> str:
    for choice in choices:
        if reading.touch(reading.root / choice).exists():
            return choice
    raise DataError(f"{reading.root}: expected {' or '.join(choices)}, found none of them")


def _read_list(reading: Reading, kind: str, name: str, malformed: int) -> _Rows:
    """Return the rows of a list of the old release, each photograph once."""
    images = _one_of(reading, (f"{kind}/{kind}_Images", f"{kind}_Images"))
    rows = _List(reading, _one_of(reading, _list_choices(kind, name)), f"{images}/", malformed).rows()
    codes = rows.names.dictionary_encode().indices.to_numpy(zero_copy_only=False)
    first = np.zeros(len(codes), bool)
    first[np.unique(codes, return_index=True)[1]] = True
    _skip(reading, "photograph that is listed twice", rows.names, ~first)
    return rows if first.all() else rows.take(np.flatnonzero(first))


class _List:
    """One CSV file of the old release, read in blocks so that its text never lies in memory as a whole.

    Args:
        reading: Reading that the file belongs to.
        path: The file, relative to the root.
        prefix: Folder of the photographs with a slash.
        malformed: Rows that may be unreadable.
    """

    def __init__(self, reading: Reading, path: str, prefix: str, malformed: int) -> None:
        self.reading, self.path, self.prefix, self.malformed = reading, path, prefix, malformed
        self.full = reading.touch(reading.root / path)
        self.bad: dict[int, str] = {}
        """What is wrong with malformed rows, by their number among the lines that are not empty, from 1."""
        self.left_out: set[int] = set()
        """Numbers of the rows that the parser does not give, because they have another number of fields."""
        first, second = self._beginning()
        self.header = not _is_number(first[1] if len(first) > 1 else "")
        spread = len(COLUMNS) - 1 + _POINTS
        # The second line tells what is below a header of fewer names, unless it is the one that is malformed.
        self.fields = len(second if len(second) in (len(COLUMNS), spread) else first)
        names = [name.strip().lower() for name in first]
        wanted = [name.lower() for name in COLUMNS]
        self.named = self.header and len(first) == self.fields
        """Whether there is a header with a name for each field."""
        if self.named:
            self.at = self._by_name(names, wanted)
        else:
            self.at = [0, 1, 2, 3, 4, self.fields - 3, self.fields - 2, self.fields - 1]
        self.points = list(range(self.at[4] + 1, self.at[5]))
        if self.named and len(self.points) != _POINTS and wanted[5] in names:
            self.points = [names.index(wanted[5])]
        if len(self.points) not in (1, _POINTS):
            raise DataError(
                f"{self.full}, line {self._line(1)}: {self.fields} fields, expected {len(COLUMNS)} "
                f"(or {spread} with a column for each number of the points)"
            )

    def _beginning(self) -> tuple[list[str], list[str]]:
        """Return the cells of the first two lines that are not empty."""
        found = []
        try:
            with self.full.open(encoding="utf-8-sig", newline="") as stream:
                for line in stream:
                    if line.strip("\r\n"):
                        found.append(next(csv.reader([line.strip()]), []))
                    if len(found) == 2:
                        break
        except OSError as error:
            raise DataError(f"{self.full}: cannot be read ({error.strerror})") from error
        except (UnicodeDecodeError, csv.Error) as error:
            raise DataError(f"{self.full}: not a CSV file ({error})") from error
        if not found:
            raise DataError(f"{self.full}: the file is empty")
        return found[0], found[1] if len(found) > 1 else []

    def _by_name(self, names: Sequence[str], wanted: Sequence[str]) -> list[int]:
        points = wanted[5]
        for name in wanted:
            if name not in names and name != points:
                raise DataError(f"{self.full}, line 1: no column {name}; expected {','.join(COLUMNS)}")
        return [names.index(name) for name in wanted if name != points]

    def _line(self, row: int) -> int:
        """Return the line of the row-th line that is not empty, counted from 1."""
        count = 0
        with self.full.open("rb") as stream:
            for number, line in enumerate(stream, 1):
                count += bool(line.strip(b"\r\n"))
                if count == row:
                    return number
        return count

    def rows(self) -> _Rows:
        """Return all rows that are not malformed.

        Raises:
            DataError: If too many are, or a label is outside its range.
        """
        blocks, read, size = [], 0, self.full.stat().st_size
        try:
            with (
                pa.OSFile(str(self.full)) as source,
                tqdm(total=size, desc=self.full.name, unit="B", unit_scale=True, leave=False, disable=None) as bar,
            ):
                for batch in self._batches(source):
                    # Malformed rows that the parser left out come before, among or behind the rows of a batch.
                    blocks.append(self._block(batch, read))
                    read += batch.num_rows
                    bar.update(source.tell() - bar.n)
                    if len(self.bad) > self.malformed:
                        break
                else:
                    self._require_whole(read + len(self.left_out))
        except pa.ArrowInvalid as error:
            self._explain(error)
        self._count()
        if not blocks:
            blocks = [
                self._block(
                    pa.RecordBatch.from_pydict({str(k): pa.array([], pa.string()) for k in range(self.fields)}), 0
                )
            ]
        numbers = np.concatenate([block.numbers for block in blocks])
        return _Rows(
            pa.concat_arrays([block.names for block in blocks]),
            numbers,
            np.concatenate([block.points for block in blocks]),
            np.concatenate([block.drawn for block in blocks]),
            np.concatenate([block.boxes for block in blocks]),
        )

    def _batches(self, source: pa.NativeFile) -> Iterator[pa.RecordBatch]:
        names = [str(k) for k in range(self.fields)]

        def leave_out(row: pa_csv.InvalidRow) -> str:
            self.left_out.add(row.number)
            if row.number > self.header:
                self.bad[row.number] = f"{row.actual_columns} fields, expected {row.expected_columns}"
            return "skip"

        if self.header and self._only_header():
            return
        yield from pa_csv.open_csv(
            source,
            # Rows are only numbered by a parser of one thread.
            read_options=pa_csv.ReadOptions(column_names=names, use_threads=False, block_size=1 << 23),
            parse_options=pa_csv.ParseOptions(invalid_row_handler=leave_out),
            convert_options=pa_csv.ConvertOptions(
                column_types=dict.fromkeys(names, pa.string()), null_values=[], strings_can_be_null=False
            ),
        )

    def _only_header(self) -> bool:
        return not self._beginning()[1]

    def _block(self, batch: pa.RecordBatch, before: int) -> _Rows:
        """Return the rows of a batch that are not malformed; ``before`` rows came earlier."""
        if self.named and not before and batch.num_rows:
            batch, before = batch.slice(1), 1
        good = np.ones(batch.num_rows, bool)
        wrong: dict[int, str] = {}

        def check(verdict: np.ndarray, expected: str, column: pa.Array) -> None:
            for row in np.flatnonzero(good & ~verdict):
                wrong[int(row)] = f"expected {expected}, found {column[int(row)].as_py()[:40]!r}"
            good[~verdict] = False

        names = pc.utf8_trim_whitespace(batch.column(self.at[0]))
        named = pc.match_substring_regex(names, r"^[^\x00/][^\x00]*/[^\x00/]+$")
        check(named.to_numpy(zero_copy_only=False), "<folder>/<file> first", names)
        cells = np.zeros((batch.num_rows, 7))
        for k, (at, name) in enumerate(zip(self.at[1:], (*COLUMNS[1:5], *COLUMNS[6:]), strict=True)):
            column = batch.column(at)
            cells[:, k], numeric = _numbers(column)
            if name == "expression":
                numeric &= cells[:, k] == np.round(cells[:, k])
            check(numeric, f"a number as {name}", column)
        points, drawn = np.zeros((batch.num_rows, _POINTS), np.float32), np.zeros(batch.num_rows, bool)
        if len(self.points) == 1:
            column = batch.column(self.points[0])
            points, drawn, readable = _split_points(column)
            check(readable, f"{_POINTS} numbers x1;y1;…", column)
        else:
            for k, at in enumerate(self.points):
                points[:, k], numeric = _numbers(batch.column(at))
                check(numeric, "a number as point", batch.column(at))
            drawn[:] = True
        ordinals = self._ordinals(before, batch.num_rows)
        for row, reason in wrong.items():
            self.bad[int(ordinals[row])] = reason
        self._require(ordinals, good, np.isin(cells[:, 4], np.arange(11)), "an expression from 0 to 10", cells[:, 4])
        for k, axis in enumerate(labels.AFFECT_AXES, 5):
            fine = (np.abs(cells[:, k]) <= 1) | (cells[:, k] == -2)
            self._require(ordinals, good, fine, f"{axis} from -1 to 1, or -2", cells[:, k])
        boxes = np.concatenate([cells[:, :2], cells[:, :2] + cells[:, 2:4]], 1).astype(np.float32)
        listed = pc.binary_join_element_wise(self.prefix, names, "")
        found = _Rows(listed, cells[:, 4:], points, drawn, boxes)
        return found if good.all() else found.take(np.flatnonzero(good))

    def _ordinals(self, before: int, count: int) -> np.ndarray:
        """Return the numbers, among the lines that are not empty, of rows that the parser gave ``(count,)``."""
        ordinals = before + 1 + np.arange(count)
        for number in sorted(self.left_out):
            ordinals[ordinals >= number] += 1
        return ordinals

    def _require(
        self, ordinals: np.ndarray, good: np.ndarray, fine: np.ndarray, expected: str, cells: np.ndarray
    ) -> None:
        odd = np.flatnonzero(good & ~fine)
        if len(odd):
            line = self._line(int(ordinals[odd[0]]))
            raise DataError(f"{self.full}, line {line}: expected {expected}, found {cells[odd[0]]:g}")

    def _require_whole(self, last: int) -> None:
        """Raise ``DataError`` if the file ends inside a row, which is then not one of those that are tolerated.

        Args:
            last: Number of the last line that was read, among those that are not empty.
        """
        if last not in self.bad:
            return
        with self.full.open("rb") as stream:
            stream.seek(-1, os.SEEK_END)
            ended = stream.read(1) in b"\r\n"
        if not ended:
            where = f"{self.full}, line {self._line(last)}"
            raise DataError(f"{where}: {self.bad[last]}; the file is cut short; copy it again")

    def _count(self) -> None:
        """Count malformed rows.

        Raises:
            DataError: If there are more than are tolerated.
        """
        for number in sorted(self.bad):
            where = f"line {self._line(number)}"
            if len(self.bad) > self.malformed:
                raise DataError(
                    f"{self.full}, {where}: {self.bad[number]}; {len(self.bad)} or more rows are malformed, and "
                    f"dataset.malformed={self.malformed} are tolerated"
                )
            self.reading.skip("malformed row", [f"{self.path}, {where}: {self.bad[number]}"])

    def _explain(self, error: pa.ArrowInvalid) -> None:
        """Raise a ``DataError`` that says which line the parser stumbled on."""
        with self.full.open("rb") as stream:
            for number, line in enumerate(stream, 1):
                if line.count(b'"') % 2:
                    raise DataError(f"{self.full}, line {number}: a quote that is not closed") from error
                try:
                    line.decode()
                except UnicodeDecodeError:
                    raise DataError(f"{self.full}, line {number}: not text (no UTF-8)") from error
        raise DataError(f"{self.full}: not a CSV file ({str(error).splitlines()[0]})") from error


def _is_number(cell: str) -> bool:
    return re.fullmatch(_NUMBER, cell) is not None


def _numbers(column: pa.Array) -> tuple[np.ndarray, np.ndarray]:
    """Return the numbers in cells, float64 ``(N,)`` and 0 where there is none, and where there is one ``(N,)``."""
    try:
        values = column.cast(pa.float64()).to_numpy()
    except pa.ArrowInvalid:
        numeric = pc.match_substring_regex(column, _NUMBER)
        chosen = pc.if_else(numeric, pc.utf8_trim_whitespace(column), "0")
        values, known = chosen.cast(pa.float64()).to_numpy(), numeric.to_numpy(zero_copy_only=False)
        return values, known & np.isfinite(values)
    finite = np.isfinite(values)
    return np.where(finite, values, 0), finite


def _split_points(column: pa.Array) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Return points ``(N, 136)`` float32, which rows have them, and which cells are readable ``(N,)``.

    An empty cell is readable and holds no points.
    """
    column = pc.utf8_trim(column, characters="; \t")
    parts = pc.split_pattern(column, ";")
    empty = pc.equal(column, "").to_numpy(zero_copy_only=False)
    complete = (pc.list_value_length(parts).to_numpy(zero_copy_only=False) == _POINTS) & ~empty
    points = np.zeros((len(column), _POINTS), np.float32)
    chosen = parts if complete.all() else parts.filter(pa.array(complete))
    values, numeric = _numbers(chosen.flatten())
    points[complete] = values.reshape(-1, _POINTS)
    drawn = complete.copy()
    drawn[complete] = numeric.reshape(-1, _POINTS).all(1)
    return points, drawn, drawn | empty


# ------------------------------------------------------------------------------------------------------ writing


def write(table: FaceTable, root: str | Path, images: ImageReader | None = None, release: str | None = None) -> None:
    """Write images and labels as they are delivered.

    A missing expression is written as 8 where there is valence or arousal, else as 9. In the new release, numbers of
    odd ids are written as strings, as in some of the delivered files, and missing points have no file.

    Args:
        table: Table with the columns that ``read`` gives.
        root: Folder to write to.
        images: Reader of the rows' pictures; None takes the table's own files.
        release: ``new`` or ``old``; None is old if there is a column ``box``.
    """
    root = Path(root)
    write_images(table, root, FileImages(table) if images is None else images)
    if (release or ("old" if "box" in table.names else "new")) == "old":
        _write_old(table, root)
    else:
        _write_new(table, root)


def _codes(table: FaceTable) -> np.ndarray:
    """Return the number of each row's expression ``(N,)``."""
    names, known = table.strings("expression")
    index = {name: number for number, name in enumerate(_CLASSES)}
    some = table.numbers("valence")[1] | table.numbers("arousal")[1]
    absent = np.where(some, 8, 9)
    return np.array(
        [index[name] if there else n for name, there, n in zip(names, known, absent, strict=True)], np.int64
    )


def _write_new(table: FaceTable, root: Path) -> None:
    codes = _codes(table)
    axes = {name: table.numbers(name) for name in labels.AFFECT_AXES}
    points, drawn = table.numbers(_LANDMARKS)
    for row, image in enumerate(table.strings("image")[0]):
        path = root / image
        number = path.stem
        folder = path.parent.parent / "annotations"
        texts = int(number) % 2 == 1
        values: dict[str, float | int] = {"exp": int(codes[row])}
        for kind, (column, known) in zip(("val", "aro"), axes.values(), strict=True):
            values[kind] = round(float(column[row]), 6) if known[row] else -2.0
        for kind, value in values.items():
            _write_array(folder / f"{number}_{kind}.npy", np.array(str(value) if texts else value))
        if drawn[row]:
            _write_array(folder / f"{number}_lnd.npy", points[row].astype(np.float64))


def _write_array(path: Path, array: np.ndarray) -> None:
    with replacing(path) as part:
        np.save(part, array, allow_pickle=False)


def _write_old(table: FaceTable, root: Path) -> None:
    codes = _codes(table)
    images, parts = table.strings("image")[0], table.strings("part")[0]
    kinds = table.strings("annotation")[0] if "annotation" in table.names else np.full(len(table), "manual", object)
    boxes, sized = table.numbers("box")
    points, drawn = table.numbers(_LANDMARKS)
    axes = [table.numbers(name) for name in labels.AFFECT_AXES]
    lines: dict[str, list[str]] = {f"{_MANUAL}_file_lists/{name}": [] for name in _LISTS.values()}
    for row, image in enumerate(images):
        kind = _MANUAL if kinds[row] == "manual" else _AUTOMATIC
        name = _LISTS[parts[row]] if kind == _MANUAL else "automatically_annotated.csv"
        x1, y1, x2, y2 = boxes[row].tolist() if sized[row] else (0.0, 0.0, -1.0, 0.0)
        cells = [
            image.removeprefix(f"{kind}/{kind}_Images/"),
            *(f"{value:.7g}" for value in (x1, y1, x2 - x1, y2 - y1)),
            ";".join(f"{value:.7g}" for value in points[row]) if drawn[row] else "",
            str(codes[row]),
            *(f"{values[row]:.6g}" if known[row] else "-2" for values, known in axes),
        ]
        lines.setdefault(f"{kind}_file_lists/{name}", []).append(",".join(cells))
    for name, rows in lines.items():
        write_lines(root / name, [",".join(COLUMNS), *rows])


# ------------------------------------------------------------------------------------------------ built-in faces


def dress(faces: FaceTable, release: str = "new", automatic: bool = False) -> Dressed:
    """Return built-in faces as images of AffectNet; every fourth is in ``validation``.

    Args:
        faces: Built-in faces. Those without an expression are left out.
        release: ``new`` or ``old``.
        automatic: Old release: every fifth of the training images is automatically annotated.
    """
    names, known = faces.strings("expression")
    index = np.arange(len(faces))
    validating = index % 4 == 3
    networked = ~validating & (index % 5 == 1) & automatic
    part = np.where(validating, "validation", "train")
    if release == "new":
        # Ids have gaps, no padding, and begin anew in each part.
        paths = [f"{_SETS[p]}/images/{3 * k + k % 2}.jpg" for k, p in zip(index.tolist(), part, strict=True)]
    else:
        endings = ("jpg", "JPG", "jpeg", "png", "bmp", "tif")
        paths = []
        for k, automatically in zip(index.tolist(), networked, strict=True):
            kind = _AUTOMATIC if automatically else _MANUAL
            stem = hashlib.sha256(f"face {k}".encode()).hexdigest()[:56]
            paths.append(f"{kind}/{kind}_Images/{k % 7 + 1}/{stem}.{endings[k % len(endings)]}")
    columns: dict[str, ColumnLike] = {
        "image": np.array(paths, object),
        "part": part.astype(object),
        "expression": pa.array(names, pa.string(), mask=~known),
    }
    for axis in labels.AFFECT_AXES:
        values, there = faces.numbers(axis)
        columns[axis] = (np.round(values, 6), there)
    points, drawn = faces.numbers(_LANDMARKS)
    columns[_LANDMARKS] = (np.round(points, 2), drawn)
    if release == "old":
        boxes, boxed = faces.numbers("box")
        columns["box"] = (np.round(boxes), boxed)
        if automatic:
            columns["annotation"] = np.where(networked, "automatic", "manual").astype(object)
    metadata = {
        "dataset": DATASET,
        "release": release,
        "expressions": list(_CLASSES),
        "label_source": "parameters of drawn faces; never a result on people",
    }
    rows = np.lexsort((index, validating, networked))
    rows = rows[known[rows]]
    return Dressed(FaceTable.from_columns(columns, ".", metadata).take(rows), rows)


# ------------------------------------------------------------------------------------------------- published counts

_TRAINING = (74_874, 134_415, 25_459, 14_090, 6_378, 3_803, 24_882, 3_750)
"""Training images of each class, in the dataset's order."""


def expected(release: str = "new", uncertain: str = "drop", automatic: bool = False) -> tuple[Expected, ...]:
    """Return what AffectNet should contain.

    Args:
        release: As in ``read``; of ``auto`` the size of images is not known.
        uncertain: As in ``read``.
        automatic: As in ``read``.
    """
    source = "counts in public readers of AffectNet"
    manual = "/annotation=manual" if automatic else ""
    found: list[Expected] = []
    if release == "new":
        found.append(Expected("size", (224, 224), source))
    if uncertain == "drop":
        found.append(Expected(f"rows/part=train{manual}", sum(_TRAINING), source))
        found.append(_validation(f"rows/part=validation{manual}", 500 * len(_CLASSES), release, source))
    for name, count in zip(_CLASSES, _TRAINING, strict=True):
        found.append(Expected(f"rows/part=train/expression={name}{manual}", count, source))
        key = f"rows/part=validation/expression={name}{manual}"
        found.append(_validation(key, 500, release, source) if name == labels.CONTEMPT else Expected(key, 500, source))
    return tuple(found)


def _validation(key: str, count: int, release: str, source: str) -> Expected:
    """Return a count that is one less in the new release, where a contempt image is missing."""
    new, old = "AffectNet, new release", "AffectNet, old release"
    if release == "new":
        return Expected(key, count - 1, source, variants={count: old})
    return Expected(key, count, source, variants={count - 1: new})
