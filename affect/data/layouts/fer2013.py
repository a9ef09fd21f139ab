# SPDX-License-Identifier: Apache-2.0
"""FER2013 and FER+: 35,887 grey faces of 48 x 48 pixels inside a text file, with one label or ten votes each.

I. J. Goodfellow et al., "Challenges in representation learning: a report on three machine learning contests", ICONIP
2013 (Kaggle, "Challenges in Representation Learning: Facial Expression Recognition Challenge"); E. Barsoum et al.,
"Training deep networks for facial expression recognition with crowd-sourced label distribution", ICMI 2016
(https://github.com/microsoft/FERPlus). Layout on disk, any of the four sources of pixels::

    <root>/
    ├── fer2013.csv            emotion,pixels,Usage
    ├── icml_face_data.csv     the same under other names of columns: "emotion, Usage, pixels", with blanks
    ├── train.csv, test.csv    the competition's pair: emotion,pixels and pixels
    ├── FER2013Train/          what FER+'s own program makes: fer0000000.png … and label.csv
    ├── FER2013Valid/
    ├── FER2013Test/
    └── fer2013new.csv         FER+: the votes, beside a CSV file of pixels

What is known of it, and how surely:

- ``pixels`` are 2,304 numbers from 0 to 255, row by row; ``Usage`` is Training (28,709 rows), PublicTest or PrivateTest
  (3,589 each); labels are 0 to 6, anger, disgust, fear, happiness, sadness, surprise, neutral (recalled). PublicTest is
  our validation part, PrivateTest the test part. ``test.csv`` has neither labels nor Usage: 7,178 unlabelled rows.
- Cells of the header are stripped, columns are found by name.
- ``fer2013new.csv`` has ``Usage,Image name,neutral,happiness,surprise,sadness,anger,disgust,fear,contempt,unknown,NF``
  and the rows of ``fer2013.csv`` in their **order**. Names do not help: from row 60 on their numbers drift away from
  the rows, four occur twice, and 148 + 10 + 15 rows that are no face have none (counted in the file). So files are
  joined by row; both need as many rows, and the same Usage in each.
- ``label.csv`` of the generated folders has no header: name, then, in the delivered files, a quoted box
  ``"(0, 0, 48, 48)"``, then ten votes in the order above. Files made by a newer version of the program lack the box and
  keep both rows of a name that occurs twice, of which the image file shows the later one: the earlier is skipped.

From votes to labels (the recipe of FERPlus ``src/ferplus.py``, read there): a class with a single vote gets none. Then

``majority``
    the class with more than half of the votes that are left
``probability``, ``crossentropy``
    the classes with most votes, up to three, until they have 75 % of the votes, as a distribution. The two differ in
    training alone: the former draws one class by the distribution each time that an image is seen.
``multi_target``
    every class with at least 30 % of the votes, all alike

and a row without such a class, or with *unknown* or *not a face* on top, is skipped and counted by reason. The
reference uses the recipe for training and majority for validation and test in each mode, and so does this module:
25,045 / 3,191 / 3,137 rows are left by majority in the delivered label files (counted). Three rows in training and one
in test, whose names occur twice, are only in the CSV files.

Columns: ``image`` (``fer2013.csv!12``: row 12, counted from 0 without the header), ``part`` and ``expression``. FER+
adds ``votes_<class>``, ``votes_unknown`` and ``votes_not_a_face`` as delivered and, where pixels are in a CSV file,
``label_fer2013``, the label of FER2013. Soft modes label training rows by ``expression_<class>`` instead of
``expression``. Nobody knows who is shown: groups are images.
"""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Literal, NamedTuple

import cv2
import numpy as np
import pyarrow as pa

from affect import labels as vocabulary
from affect.data.archives import split_member
from affect.data.expected import Expected
from affect.data.images import FileImages, ImageReader
from affect.data.layouts.common import Dressed, Reading, number_of, write_image, write_lines
from affect.data.table import ColumnLike, FaceTable
from affect.errors import ConfigError, DataError, near

__all__ = ["FACES", "FERPLUS", "SIDE", "VOTES", "CsvImages", "dress", "expected", "images", "read", "shares", "write"]

Labels = Literal["fer2013", "ferplus"]
Mode = Literal["majority", "probability", "crossentropy", "multi_target"]
Source = Literal["auto", "csv", "competition", "folders"]

FACES = vocabulary.EXPRESSION_ORDERS["fer2013"]
"""Classes of FER2013 in the order of their numbers."""

FERPLUS = vocabulary.EXPRESSION_ORDERS["ferplus"]
"""Classes of FER+ in the order of its columns."""

VOTES = (*FERPLUS, "unknown", "not_a_face")
"""What voters of FER+ could say, in the order of its columns."""

SIDE = 48
"""Side of an image in pixels."""

PARTS = {"Training": "train", "PublicTest": "validation", "PrivateTest": "test"}
"""Part by Usage."""

FOLDERS = {"FER2013Train": "train", "FER2013Valid": "validation", "FER2013Test": "test"}
"""Part by folder of FER+'s own program."""

_CSV = ("fer2013.csv", "icml_face_data.csv")
_COMPETITION = ("train.csv", "test.csv")
_VOTES_FILE = "fer2013new.csv"
_VOTES_HEADER = ("Usage", "Image name", *FERPLUS, "unknown", "NF")
_MODES = ("majority", "probability", "crossentropy", "multi_target")
_SOURCES = ("auto", "csv", "competition", "folders")
_SKIPPED = (
    "not a face (most votes)",
    "unknown expression (most votes)",
    "no expression has enough votes",
)
"""Reasons of ``shares`` 1, 2 and 3."""

_PIXELS = SIDE * SIDE
_CHUNK = 1 << 24
_WIDTH = 24
"""Longest short cell in bytes; the longest valid one is PrivateTest."""

_SPACE, _MARK = 1, 2
_KIND = np.full(256, _MARK, np.uint8)
_KIND[ord("0") : ord("9") + 1] = 0
_KIND[ord(" ")] = _SPACE


# ------------------------------------------------------------------------------------------------- pixel files


class _Cells(NamedTuple):
    """Where the cells of a CSV file lie: its mapped bytes, column names, and per row line number, starts and ends."""

    path: Path
    data: np.ndarray
    names: list[str]
    lines: np.ndarray
    starts: np.ndarray
    stops: np.ndarray

    def text(self, column: str) -> np.ndarray:
        """Return the cells of a column of short texts as bytes, blanks stripped, ``(N,)``."""
        k = self.names.index(column)
        place = self.starts[:, k, None] + np.arange(_WIDTH + 1)
        inside = place < self.stops[:, k, None]
        cells = np.where(inside, self.data[np.minimum(place, len(self.data) - 1)], 0).astype(np.uint8)
        return np.char.strip(np.ascontiguousarray(cells).view(f"S{_WIDTH + 1}").ravel())

    def where(self, row: int) -> str:
        return f"{self.path}, line {self.lines[row]}"


def _map(path: Path) -> np.ndarray:
    try:
        return np.memmap(path, np.uint8, "r")
    except ValueError as error:
        raise DataError(f"{path}: the file is empty") from error
    except OSError as error:
        raise DataError(f"{path}: cannot be read ({error.strerror}); FER2013 needs it") from error


def _cells(path: Path, needed: Sequence[str]) -> _Cells:
    """Return where the cells of a CSV file are, without a Python object per row.

    Raises:
        DataError: If a column is missing or a line has another number of fields than the header.
    """
    data = _map(path)
    marks = []
    for start in range(0, len(data), _CHUNK):
        chunk = np.asarray(data[start : start + _CHUNK])
        found = np.flatnonzero(_KIND[chunk] == _MARK)
        marks.append(found[(chunk[found] == ord(",")) | (chunk[found] == ord("\n"))] + start)
    places = np.concatenate(marks) if marks else np.empty(0, np.int64)
    is_end = data[places] == ord("\n")
    ends, commas = places[is_end], places[~is_end]
    first = 3 if data[:3].tobytes() == b"\xef\xbb\xbf" else 0
    starts = np.concatenate([[first], ends + 1])
    stops = np.concatenate([ends, [len(data)]])
    stops = stops - ((stops > starts) & (data[np.maximum(stops, 1) - 1] == ord("\r")))
    numbers = np.arange(1, len(starts) + 1)
    filled = stops > starts
    starts, stops, numbers = starts[filled], stops[filled], numbers[filled]
    if not len(starts):
        raise DataError(f"{path}: the file is empty")
    names = [cell.strip().strip('"') for cell in data[starts[0] : stops[0]].tobytes().decode("latin-1").split(",")]
    for name in needed:
        if name not in names:
            raise DataError(f"{path}, line 1: no column {name}; expected {','.join(needed)}, found {names[:6]}")
    before, after = np.searchsorted(commas, starts), np.searchsorted(commas, stops)
    wrong = after - before != len(names) - 1
    if wrong.any():
        row = int(np.argmax(wrong))
        fields = int(after[row] - before[row]) + 1
        raise DataError(f"{path}, line {numbers[row]}: {fields} fields, expected {len(names)} ({','.join(names)})")
    inner = commas[before[1:, None] + np.arange(len(names) - 1)]
    cell_starts = np.concatenate([starts[1:, None], inner + 1], 1)
    cell_stops = np.concatenate([inner, stops[1:, None]], 1)
    _strip(data, cell_starts, cell_stops)
    return _Cells(path, data, names, numbers[1:], cell_starts, cell_stops)


def _strip(data: np.ndarray, starts: np.ndarray, stops: np.ndarray) -> None:
    """Move the ends of cells inward over blanks and quotes, in place."""
    last = len(data) - 1
    while True:
        left = (starts < stops) & np.isin(data[np.minimum(starts, last)], (ord(" "), ord('"')))
        right = (starts + left < stops) & np.isin(data[stops - 1], (ord(" "), ord('"')))
        if not (left.any() or right.any()):
            return
        starts += left
        stops -= right


def _require_pixels(cells: _Cells) -> None:
    """Raise ``DataError`` with the line of the first row that does not hold 2,304 numbers from 0 to 255."""
    k = cells.names.index("pixels")
    starts, stops = cells.starts[:, k], cells.stops[:, k]
    rows_per_block = max(1, _CHUNK // (4 * _PIXELS))
    for first in range(0, len(starts), rows_per_block):
        a, b = starts[first : first + rows_per_block], stops[first : first + rows_per_block]
        text = np.asarray(cells.data[a[0] : b[-1]])
        kinds = _KIND[text]
        # Pairs of (start, end): every second sum is that of a cell, the others of what lies between cells.
        edges = np.stack([a, b], 1).ravel() - a[0]
        counted = np.add.reduceat(np.append(kinds, _KIND[ord("0")]), edges, dtype=np.int32)[::2]
        # A blank counts 1 and anything but digits 2; an empty cell would sum up its first neighbour.
        suspect = (counted != _PIXELS - 1) | (a >= b)
        places = _odd_numbers(text, kinds) + a[0]
        rows = np.searchsorted(a, places, "right") - 1
        suspect[rows[places < b[rows]]] = True
        for row in np.flatnonzero(suspect) + first:
            _pixels(cells.data[starts[row] : stops[row]], cells.where(int(row)))


def _odd_numbers(text: np.ndarray, kinds: np.ndarray) -> np.ndarray:
    """Return where numbers above 255 or of more than three digits begin, and where one lacks between two blanks.

    Args:
        text: Bytes ``(N,)``.
        kinds: ``_KIND`` of each.
    """
    digit, blank = kinds == 0, kinds == _SPACE
    three = digit[:-2] & digit[1:-1] & digit[2:]
    place = np.flatnonzero(three)
    # Digits are compared as bytes, which have their order: numbers would take several times the memory.
    hundreds, tens, ones = text[place], text[place + 1], text[place + 2]
    two, five = ord("2"), ord("5")
    above = (hundreds > two) | ((hundreds == two) & ((tens > five) | ((tens == five) & (ones > five))))
    return np.concatenate(
        [place[above], np.flatnonzero(three[:-1] & three[1:]), np.flatnonzero(blank[:-1] & blank[1:])]
    )


def _pixels(cell: np.ndarray, where: str) -> np.ndarray:
    """Return the grey image ``(48, 48)`` of a cell's bytes.

    Raises:
        DataError: If it does not hold 2,304 whole numbers from 0 to 255.
    """
    blanks = np.flatnonzero(cell == ord(" "))
    ends = np.append(blanks, len(cell))
    lengths = np.diff(ends, prepend=-1) - 1
    if len(ends) == _PIXELS and lengths.min() >= 1 and lengths.max() <= 3:
        digits = cell.astype(np.int32) - ord("0")
        digits[blanks] = 0
        if digits.min() >= 0 and digits.max() <= 9:
            # Digits of a number from its end; what is read beyond its start counts nothing.
            values = digits[ends - 1] + (lengths > 1) * 10 * digits[ends - 2] + (lengths > 2) * 100 * digits[ends - 3]
            if values.max() <= 255:
                return values.astype(np.uint8).reshape(SIDE, SIDE)
    tokens = cell.tobytes().decode("ascii", "backslashreplace").split()
    if len(tokens) != _PIXELS:
        raise DataError(f"{where}: expected {_PIXELS} pixels, found {len(tokens)}; the file may be cut short")
    numbers = np.array([number_of(token, where, integer=True) for token in tokens])
    if numbers.min() < 0 or numbers.max() > 255:
        bad = tokens[int(np.argmax((numbers < 0) | (numbers > 255)))]
        raise DataError(f"{where}: expected pixels from 0 to 255, found {bad}")
    return numbers.astype(np.uint8).reshape(SIDE, SIDE)


class CsvImages:
    """Grey faces in the cells of CSV files as RGB images; the files are mapped, never loaded.

    Args:
        table: Table whose images are ``<file>!<row>``, rows counted from 0 without the header.

    Raises:
        DataError: If an image path is none of these, or a file has not that many rows.
    """

    def __init__(self, table: FaceTable) -> None:
        self.root = table.root
        names = table.strings("image")[0]
        parts = [split_member(name) for name in names]
        self.files = sorted({file for file, _ in parts})
        self.file = np.array([self.files.index(file) for file, _ in parts], np.int64)
        self.starts, self.stops, self.lines = (np.zeros(len(parts), np.int64) for _ in range(3))
        bad = next((name for name, (_, row) in zip(names, parts, strict=True) if not (row or "").isdecimal()), None)
        if bad is not None:
            raise DataError(f"image {bad}: expected <file>.csv!<row>")
        rows = np.array([int(row or 0) for _, row in parts], np.int64)
        self._maps: dict[int, np.ndarray] = {}
        for k, file in enumerate(self.files):
            cells = _cells(self.root / file, ["pixels"])
            chosen = np.flatnonzero(self.file == k)
            if (rows[chosen] >= len(cells.lines)).any():
                raise DataError(f"{cells.path}: {len(cells.lines)} rows, expected at least {rows[chosen].max() + 1}")
            column = cells.names.index("pixels")
            self.starts[chosen] = cells.starts[rows[chosen], column]
            self.stops[chosen] = cells.stops[rows[chosen], column]
            self.lines[chosen] = cells.lines[rows[chosen]]

    def __getstate__(self) -> dict[str, object]:
        return {**self.__dict__, "_maps": {}}  # a map of a file does not travel; each process opens its own

    def read(self, rows: np.ndarray) -> list[np.ndarray]:
        found = []
        for row in np.asarray(rows, np.int64).tolist():
            k = int(self.file[row])
            if k not in self._maps:
                self._maps[k] = _map(self.root / self.files[k])
            cell = np.asarray(self._maps[k][self.starts[row] : self.stops[row]])
            grey = _pixels(cell, f"{self.root / self.files[k]}, line {self.lines[row]}")
            found.append(np.repeat(grey[:, :, None], 3, 2))
        return found


def images(table: FaceTable) -> ImageReader:
    """Return the reader of the table's images: cells of CSV files, or the image files of the generated folders."""
    inside = len(table) and split_member(table.strings("image", np.array([0]))[0][0])[1] is not None
    return CsvImages(table) if inside else FileImages(table)


# ------------------------------------------------------------------------------------------------------- votes


def shares(votes: np.ndarray, mode: Mode = "majority") -> tuple[np.ndarray, np.ndarray]:
    """Return the classes of FER+ that votes stand for, by the reference recipe.

    Args:
        votes: Number of votes by the order of ``VOTES``, ``(N, 10)``.
        mode: See the module.

    Returns:
        Shares of the classes ``(N, 8)`` float32, which sum to 1 or are all 0, and why a row has none ``(N,)`` int64:
        0 it has, 1 not a face, 2 unknown, 3 not enough votes for any.

    Example:
        >>> shares(np.array([[6, 3, 1, 0, 0, 0, 0, 0, 0, 0]]), "majority")[0].tolist()
        [[1.0, 0.0, 0.0, 0.0, 0.0, 0.0, 0.0, 0.0]]
    """
    left = np.where(np.asarray(votes) > 1, votes, 0).astype(np.float64)
    total = left.sum(1)
    if mode == "majority":
        chosen = np.where((left.argmax(1)[:, None] == np.arange(10)), left, 0)
        clear = left.max(1) > 0.5 * total
    elif mode == "multi_target":
        chosen = np.where(left >= 0.3 * total[:, None], left, 0)
        clear = chosen.sum(1) > 0.5 * total
    else:
        chosen, count = _largest(left, total)
        clear = (chosen.sum(1) > 0.5 * total) & (count <= 3)
    top = chosen.argmax(1)
    reason = np.where(~clear, 3, np.where(top == 9, 1, np.where(top == 8, 2, 0)))
    kept = np.where((reason == 0)[:, None], chosen[:, :8], 0)
    if mode == "multi_target":
        kept = (kept > 0).astype(np.float64)  # the reference treats all of them alike
    sums = kept.sum(1, keepdims=True)
    return np.divide(kept, sums, out=np.zeros_like(kept), where=sums > 0).astype(np.float32), reason


def _largest(left: np.ndarray, total: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Return the votes of the classes that the soft modes of the reference keep ``(N, 10)``, and how many these are.

    Classes with equal votes are taken together. *Unknown* or *not a face* ends the search, and counts only if it is the
    first that is found.
    """
    left, chosen = left.copy(), np.zeros_like(left)
    covered, count = np.zeros(len(left)), np.zeros(len(left), np.int64)
    ended = np.zeros(len(left), bool)
    for _ in range(3):
        active = (covered < 0.75 * total) & (count < 3) & ~ended
        most = left.max(1)
        for k in range(10):
            hit = active & (left[:, k] == most) & (most > 0)
            chosen[hit, k] = most[hit]
            left[hit, k] = 0
            covered[hit] += most[hit]
            count[hit] += 1
            if k >= 8:
                ended |= hit
                later = hit & (chosen.sum(1) > most)
                chosen[later, k] = 0
                count[later] -= 1
                active &= ~hit
    return chosen, count


def _label_columns(votes: np.ndarray, parts: np.ndarray, mode: Mode) -> tuple[dict[str, ColumnLike], np.ndarray]:
    """Return the columns of FER+ of all rows, and why each row is skipped ``(N,)``, 0 where it is not."""
    named, reason = shares(votes, "majority")
    columns: dict[str, ColumnLike] = {
        f"votes_{name}": np.ascontiguousarray(votes[:, k], np.int32) for k, name in enumerate(VOTES)
    }
    code = pa.array(named.argmax(1), mask=reason > 0)
    if mode != "majority":
        soft, soft_reason = shares(votes, mode)
        training = np.asarray(parts) == "train"
        reason = np.where(training, soft_reason, reason)
        for k, name in enumerate(FERPLUS):
            columns[vocabulary.expression_column(name)] = (soft[:, k], training)
        code = pa.array(named.argmax(1), mask=training | (reason > 0))
    columns["expression"] = pa.array(FERPLUS, pa.string()).take(code)
    return columns, reason


# ------------------------------------------------------------------------------------------------------ reading


def read(root: str | Path, labels: Labels = "fer2013", votes: Mode = "majority", source: Source = "auto") -> FaceTable:
    """Return the face table of FER2013 or FER+, rows in the order of the files.

    Args:
        root: Folder that holds ``fer2013.csv`` or one of the other sources of pixels.
        labels: ``fer2013`` (7 classes) or ``ferplus`` (8 classes, from votes).
        votes: How votes become labels, for ``ferplus``: ``majority``, ``probability``, ``crossentropy`` or
            ``multi_target`` (see the module).
        source: Where pixels are: ``csv`` (``fer2013.csv``, else ``icml_face_data.csv``), ``competition`` (``train.csv``
            and ``test.csv``), ``folders`` (``FER2013Train`` …), or ``auto``, the first of these that is there.

    Raises:
        ConfigError: If an option is unknown or the options do not go together.
        DataError: If the root is another folder, or a file holds what it should not (file and line are named).
    """
    _check(labels, votes, source)
    reading = Reading(root, labels, holds=(*_CSV, "train.csv", *FOLDERS))
    found = _source(reading, labels, source)
    if found == "folders":
        columns = _read_folders(reading, votes)
    elif found == "competition":
        columns = _read_competition(reading)
    else:
        columns = _read_csv(reading, next(name for name in _CSV if (reading.root / name).exists()), labels, votes)
    about = "one annotator" if labels == "fer2013" else f"votes of ten crowd workers, {votes}"
    classes = FACES if labels == "fer2013" else FERPLUS
    return reading.table(columns, expressions=list(classes), label_source=f"{labels}: {about}")


def _check(labels: str, votes: str, source: str) -> None:
    for key, value, options in (
        ("labels", labels, ("fer2013", "ferplus")),
        ("votes", votes, _MODES),
        ("source", source, _SOURCES),
    ):
        if value not in options:
            raise ConfigError(f"{key}={value}: {near(value, options)}")
    if labels == "ferplus" and source == "competition":
        raise ConfigError(
            "source=competition: FER+ is joined with fer2013.csv by row, the competition's pair has others"
        )
    if labels == "fer2013" and source == "folders":
        raise ConfigError("source=folders: these hold the votes of FER+ alone; take labels=ferplus")


def _source(reading: Reading, labels: Labels, source: Source) -> Source:
    there: dict[Source, bool] = {
        "csv": any(reading.touch(reading.root / name).exists() for name in _CSV),
        "competition": labels == "fer2013" and (reading.root / _COMPETITION[0]).exists(),
        "folders": labels == "ferplus" and any((reading.root / name).exists() for name in FOLDERS),
    }
    if source != "auto":
        return source if there[source] else _nothing(reading, labels, source)
    return next((name for name, found in there.items() if found), None) or _nothing(reading, labels, source)


def _nothing(reading: Reading, labels: Labels, source: Source) -> Source:
    needed = {
        "csv": " or ".join(_CSV),
        "competition": _COMPETITION[0],
        "folders": ", ".join(FOLDERS),
        "auto": f"{_CSV[0]} or {_COMPETITION[0] if labels == 'fer2013' else ', '.join(FOLDERS)}",
    }[source]
    raise DataError(f"{reading.root}: labels={labels}, source={source} needs {needed} there")


def _read_csv(reading: Reading, file: str, labels: Labels, votes: Mode) -> dict[str, ColumnLike]:
    cells = _cells(reading.touch(reading.root / file), ["emotion", "pixels", "Usage"])
    _require_pixels(cells)
    parts = _named(cells, "Usage", {usage.encode(): part for usage, part in PARTS.items()})
    original = _named(cells, "emotion", _emotions())
    every = np.arange(len(cells.lines))
    columns: dict[str, ColumnLike] = {
        "image": np.array([f"{file}!{row}" for row in every], object),
        "part": parts,
    }
    if labels == "fer2013":
        return columns | {"expression": original}
    counted, faces = _read_votes(reading, cells, parts)
    more, reason = _label_columns(counted, parts, votes)
    columns |= {"label_fer2013": original, **more}
    reading.skip("not a face (no image name)", [f"{file}!{row}" for row in np.flatnonzero(~faces)])
    for code, sentence in enumerate(_SKIPPED, 1):
        reading.skip(sentence, [f"{file}!{row}" for row in np.flatnonzero(faces & (reason == code))])
    return _taken(columns, np.flatnonzero(faces & (reason == 0)))


def _taken(columns: Mapping[str, ColumnLike], rows: np.ndarray) -> dict[str, ColumnLike]:
    """Return some rows of columns."""
    table = FaceTable.from_columns(columns).take(rows)
    return {name: table.column(name) for name in table.arrow.column_names}


def _emotions() -> dict[bytes, str]:
    return {str(k).encode(): name for k, name in enumerate(FACES)}


def _named(cells: _Cells, column: str, names: Mapping[bytes, str]) -> np.ndarray:
    """Return the name of each cell of a column, object ``(N,)``."""
    found, place = np.unique(cells.text(column), return_inverse=True)
    bad = np.array([value not in names for value in found.tolist()], bool)
    if bad.any():
        row = int(np.argmax(bad[place]))
        shown = found[place[row]].decode("latin-1")
        options = ", ".join(name.decode() for name in names)
        raise DataError(f"{cells.where(row)}: column {column}: expected one of {options}, found {shown!r}")
    return np.array([names[value] for value in found.tolist()], object)[place]


def _read_competition(reading: Reading) -> dict[str, ColumnLike]:
    """Return the columns of the competition's pair of files; its test rows have no label."""
    names: list[str] = []
    parts: list[str] = []
    expressions: list[str | None] = []
    for file, part in zip(_COMPETITION, ("train", "test"), strict=True):
        path = reading.touch(reading.root / file)
        if part == "test" and not path.exists():
            reading.note("there is no test.csv: the table has training rows alone")
            continue
        cells = _cells(path, ["emotion", "pixels"] if part == "train" else ["pixels"])
        _require_pixels(cells)
        count = len(cells.lines)
        labelled = "emotion" in cells.names
        names += [f"{file}!{row}" for row in range(count)]
        parts += [part] * count
        expressions += _named(cells, "emotion", _emotions()).tolist() if labelled else [None] * count
        if not labelled:
            reading.note(f"the {count} rows of {file} have no labels: the competition kept them to itself")
    return {"image": pa.array(names, pa.string()), "part": parts, "expression": pa.array(expressions, pa.string())}


def _read_votes(reading: Reading, cells: _Cells, parts: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Return the votes ``(N, 10)`` of each row of the pixels' file, and which rows are faces ``(N,)``."""
    path = reading.root / _VOTES_FILE
    lines = reading.lines(_VOTES_FILE)
    header = [cell.strip() for cell in lines[0][1].split(",")] if lines else []
    for name in _VOTES_HEADER:
        if name not in header:
            raise DataError(f"{path}, line 1: no column {name!r}; expected {','.join(_VOTES_HEADER)}")
    at = {name: header.index(name) for name in _VOTES_HEADER}
    if len(lines) - 1 != len(parts):
        raise DataError(
            f"{path}: {len(lines) - 1} rows, expected {len(parts)} as in {cells.path.name}: the two are joined by row"
        )
    votes, faces = np.zeros((len(parts), 10), np.int32), np.zeros(len(parts), bool)
    wanted = [at[name] for name in _VOTES_HEADER[2:]]
    for row, (number, line) in enumerate(lines[1:]):
        fields = [cell.strip() for cell in line.split(",")]
        where = f"{path}, line {number}"
        if len(fields) != len(header):
            raise DataError(f"{where}: {len(fields)} fields, expected {len(header)}")
        usage = fields[at["Usage"]]
        if PARTS.get(usage) != parts[row]:
            known = next(name for name, part in PARTS.items() if part == parts[row])
            raise DataError(
                f"{where}: expected Usage {known} as in line {cells.lines[row]} of {cells.path.name}, found {usage!r}: "
                "the two files are joined by row and must have the same order"
            )
        votes[row] = _votes([fields[k] for k in wanted], where)
        faces[row] = bool(fields[at["Image name"]])
    return votes, faces


def _votes(fields: Sequence[str], where: str) -> list[int]:
    """Return the votes in ten cells."""
    if all(field.isdecimal() and len(field) < 5 for field in fields):
        return [int(field) for field in fields]
    numbers = [number_of(field, where, integer=True) for field in fields]
    bad = next((field for field, number in zip(fields, numbers, strict=True) if not 0 <= number < 10000), None)
    if bad is not None:
        raise DataError(f"{where}: expected a number of votes, found {bad!r}")
    return [int(number) for number in numbers]


_LABEL_LINE = re.compile(r'\s*([^,"]+?)\s*,\s*(?:"\(([^"]*)\)"\s*,\s*)?(.*)')


def _read_folders(reading: Reading, mode: Mode) -> dict[str, ColumnLike]:
    """Return the columns of the folders that FER+'s own program makes."""
    names: list[str] = []
    parts: list[str] = []
    votes: list[list[int]] = []
    for folder, part in FOLDERS.items():
        if not reading.touch(reading.root / folder).is_dir():
            reading.note(f"there is no {folder}: the part {part} is missing")
            continue
        listed = _read_label_csv(reading, folder)
        files = {Path(name).stem: name for name in reading.listing(folder) if not name.endswith(".csv")}
        last = {name: row for row, (name, _) in enumerate(listed)}
        earlier = [f"{folder}/{name}" for row, (name, _) in enumerate(listed) if last[name] != row]
        reading.skip("image name occurs again: its file shows the later row", earlier)
        kept = [(name, counted) for row, (name, counted) in enumerate(listed) if last[name] == row]
        reading.skip("image is missing", [f"{folder}/{name}" for name, _ in kept if Path(name).stem not in files])
        for name, counted in kept:
            if Path(name).stem in files:
                names.append(f"{folder}/{files[Path(name).stem]}")
                parts.append(part)
                votes.append(counted)
    counted_votes = np.array(votes, np.int32).reshape(-1, 10)
    more, reason = _label_columns(counted_votes, np.array(parts, object), mode)
    for code, sentence in enumerate(_SKIPPED, 1):
        reading.skip(sentence, [names[row] for row in np.flatnonzero(reason == code)])
    columns = {"image": pa.array(names, pa.string()), "part": pa.array(parts, pa.string()), **more}
    return _taken(columns, np.flatnonzero(reason == 0))


def _read_label_csv(reading: Reading, folder: str) -> list[tuple[str, list[int]]]:
    """Return image name and votes of each line of a generated folder's ``label.csv``."""
    path = f"{folder}/label.csv"
    rows = []
    for number, line in reading.lines(path):
        where = f"{reading.root / path}, line {number}"
        match = _LABEL_LINE.fullmatch(line)
        fields = [] if match is None else [cell.strip() for cell in match[3].split(",")]
        if match is None or len(fields) != 10:
            raise DataError(
                f'{where}: expected a name, maybe a box like "(0, 0, 48, 48)", and 10 votes, found {line[:80]!r}'
            )
        if match[2] is not None and re.findall(r"-?\d+", match[2]) != ["0", "0", str(SIDE), str(SIDE)]:
            raise DataError(
                f"{where}: expected the box (0, 0, {SIDE}, {SIDE}) of the whole image, found ({match[2][:40]})"
            )
        rows.append((match[1], _votes(fields, where)))
    return rows


# ------------------------------------------------------------------------------------------------------ writing

_HEADERS = {
    "fer2013.csv": ("emotion", "pixels", "Usage"),
    "icml_face_data.csv": ("emotion", " Usage", " pixels"),
    "train.csv": ("emotion", "pixels"),
    "test.csv": ("pixels",),
}


def write(table: FaceTable, root: str | Path, images: ImageReader | None = None) -> None:
    """Write the layout of FER2013 or FER+ from a table with the columns that ``read`` gives.

    Image paths say which of the four sources of pixels it is. Images become grey and 48 x 48. Rows of a CSV file that
    the table lacks are written as black pictures that FER+'s votes call no face; without votes there must be none.

    Args:
        table: Rows in the order of the files.
        root: Folder to write to.
        images: Pixels by row of the table; None reads those of the table itself.

    Raises:
        DataError: If a label is missing or unknown, or rows cannot be written in this layout.
    """
    root = Path(root)
    pictures = globals()["images"](table) if images is None else images
    members = [split_member(name) for name in table.strings("image")[0]]
    for place in sorted({file if row is not None else file.split("/")[0] for file, row in members}):
        if place in FOLDERS:
            rows = np.array(
                [k for k, (file, row) in enumerate(members) if row is None and file.startswith(place + "/")]
            )
            _write_folder(table, rows, root, place, pictures)
        elif place in _HEADERS:
            rows = np.array([k for k, (file, _) in enumerate(members) if file == place])
            numbers = np.array([int(members[k][1] or 0) for k in rows])
            _write_csv(table, rows, numbers, root / place, pictures)
        else:
            raise DataError(f"{place}: FER2013 has no such file; {near(place, (*_HEADERS, *FOLDERS))}")


def _vote_rows(table: FaceTable, rows: np.ndarray) -> np.ndarray:
    return np.stack([table.numbers(f"votes_{name}", rows)[0] for name in VOTES], 1).astype(np.int64)


def _grey(image: np.ndarray) -> np.ndarray:
    """Return RGB ``(H, W, 3)`` as grey ``(48, 48)``."""
    if image.shape[:2] != (SIDE, SIDE):
        image = cv2.resize(image, (SIDE, SIDE), interpolation=cv2.INTER_AREA)
    return np.rint(image.astype(np.float32).mean(2)).astype(np.uint8)


def _write_csv(table: FaceTable, rows: np.ndarray, numbers: np.ndarray, path: Path, pictures: ImageReader) -> None:
    plus = "votes_unknown" in table.names
    if (np.diff(numbers) <= 0).any() or (not plus and len(numbers) <= numbers[-1]):
        raise DataError(f"{path.name}: rows must be 0, 1, 2, … in their order, found {numbers[:5].tolist()} …")
    usage = {part: name for name, part in PARTS.items()}
    parts = table.strings("part", rows)[0]
    original, given = table.strings("label_fer2013" if plus else "expression", rows)
    header = _HEADERS[path.name]
    at = dict(zip(numbers.tolist(), range(len(rows)), strict=True))
    votes = _vote_rows(table, rows) if plus else None
    lines, voted = [",".join(header)], [",".join(_VOTES_HEADER)]
    for number in range(int(numbers[-1]) + 1):
        k = at.get(number)
        if k is None:
            cells = {"emotion": str(len(FACES) - 1), "pixels": " ".join(["0"] * _PIXELS), "Usage": "Training"}
            voted.append("Training,," + ",".join(["0"] * 9) + ",10")
        else:
            if "emotion" in header and not (given[k] and original[k] in FACES):
                raise DataError(f"{path.name}, row {number}: FER2013 cannot write the expression {original[k]!r}")
            grey = _grey(pictures.read(rows[k : k + 1])[0])
            cells = {
                "emotion": str(FACES.index(original[k])) if "emotion" in header else "",
                "pixels": " ".join(map(str, grey.ravel().tolist())),
                "Usage": usage.get(str(parts[k]), ""),
            }
            if votes is not None:
                voted.append(f"{cells['Usage']},fer{number:07d}.png," + ",".join(map(str, votes[k])))
        lines.append(",".join(cells[name.strip()] for name in header))
    write_lines(path, lines)
    if plus:
        write_lines(path.parent / _VOTES_FILE, voted)


def _write_folder(table: FaceTable, rows: np.ndarray, root: Path, folder: str, pictures: ImageReader) -> None:
    votes = _vote_rows(table, rows)
    names = [name.partition("/")[2] for name in table.strings("image", rows)[0]]
    whole = f'"(0, 0, {SIDE}, {SIDE})"'
    lines = [f"{name},{whole}," + ",".join(map(str, counted)) for name, counted in zip(names, votes, strict=True)]
    write_lines(root / folder / "label.csv", lines, ending="\r\n")
    for row, name in zip(rows, names, strict=True):
        grey = _grey(pictures.read(np.array([row]))[0])
        write_image(root / folder / name, np.repeat(grey[:, :, None], 3, 2))


def dress(faces: FaceTable, labels: Labels = "fer2013", votes: Mode = "majority", source: Source = "auto") -> Dressed:
    """Return built-in faces under the names of FER2013 or FER+; of six faces one selects and one tests.

    Faces whose expression the set lacks are left out. Votes for a face's expression are 8 and 2, or 6, 3 and 1, the
    rest for other classes, and in the CSV source of FER+ every ninth row is missing, as if it were no face.

    Args:
        faces: Labels of built-in faces.
        labels: As in ``read``.
        votes: As in ``read``.
        source: As in ``read``; ``auto`` is ``csv``.
    """
    _check(labels, votes, source)
    classes = FACES if labels == "fer2013" else FERPLUS
    named, given = faces.strings("expression")
    usable = np.flatnonzero(given & np.isin(named.astype(str), classes))
    turn = np.arange(len(usable)) % 6
    part = np.where(turn == 4, 1, np.where(turn == 5, 2, 0))
    if source == "competition":
        part = np.where(part == 1, 0, part)
    order = np.argsort(part, kind="stable")  # the official files hold one part after the other
    rows, part = usable[order], part[order]
    place = np.arange(len(rows))
    parts = np.array(["train", "validation", "test"], object)[part]
    expressions = named[rows]
    columns: dict[str, ColumnLike] = {"part": parts}
    if source == "folders":
        folders = list(FOLDERS)
        columns["image"] = [f"{folders[p]}/fer{k:07d}.png" for k, p in zip(place, part, strict=True)]
    elif source == "competition":
        first = int((part == 0).sum())
        columns["image"] = [f"train.csv!{k}" if k < first else f"test.csv!{k - first}" for k in place]
    else:
        numbers = place + place // 8 if labels == "ferplus" else place
        columns["image"] = [f"fer2013.csv!{number}" for number in numbers]
    if labels == "fer2013":
        hidden = (parts == "test") & (source == "competition")
        columns["expression"] = pa.array(expressions, pa.string(), mask=hidden)
    else:
        codes = np.array([FERPLUS.index(name) for name in expressions], np.int64)
        counted = np.zeros((len(rows), 10), np.int64)
        for shift, alone, shared in ((0, 8, 6), (1, 2, 3), (2, 0, 1)):
            counted[place, (codes + shift) % 8] = np.where(place % 2 == 0, alone, shared)
        more, _ = _label_columns(counted, parts, votes)
        columns |= more
        if source != "folders":
            # FER2013 has no contempt; whoever labelled it said something else.
            known = [name if name in FACES else vocabulary.NEUTRAL for name in expressions]
            columns["label_fer2013"] = pa.array(known, pa.string())
    metadata = {
        "dataset": labels,
        "expressions": list(classes),
        "label_source": f"drawn faces under the names of {labels}; never a result on people",
    }
    return Dressed(FaceTable.from_columns(columns, ".", metadata), rows)


# ----------------------------------------------------------------------------------------------------- expected

_COUNTED = "FERPlus label files, counted with its recipe"
_TWICE = "with rows whose image name occurs twice, which the delivered label files lack"


def expected(labels: Labels = "fer2013", votes: Mode = "majority", source: Source = "auto") -> tuple[Expected, ...]:
    """Return what FER2013 or FER+ hold."""
    _check(labels, votes, source)
    size = Expected("size", (SIDE, SIDE), "2,304 pixels in each row", found=True)
    if labels == "fer2013":
        counts = {"train": 28709, "validation": 3589, "test": 3589}
        if source == "competition":
            counts = {"train": 28709, "test": 7178}
        recalled = {"rows": sum(counts.values())} | {f"rows/part={part}": count for part, count in counts.items()}
        return (*(Expected(key, count, "recalled", found=False) for key, count in recalled.items()), size)
    found = [
        Expected("rows/part=validation", 3191, _COUNTED),
        Expected("rows/part=test", 3137, _COUNTED, variants={3138: _TWICE}),
    ]
    if votes == "majority":
        train = {25045 + more: _TWICE for more in (1, 2, 3)}
        total = {25045 + 3191 + 3137 + more: _TWICE for more in (1, 2, 3, 4)}
        found = [
            Expected("rows", 25045 + 3191 + 3137, _COUNTED, variants=total),
            Expected("rows/part=train", 25045, _COUNTED, variants=train),
            *found,
        ]
    return (*found, size)
