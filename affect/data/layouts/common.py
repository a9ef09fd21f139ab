# SPDX-License-Identifier: Apache-2.0
"""What readers of delivered datasets share: text with line numbers, folder listings, counted skips, clear errors.

A ``Reading`` is one pass over a dataset's tree. It remembers every file and folder that it looked at, so that a stored
table can tell whether the tree is still the one that it was read from, and every row that was left out, with the reason
and the first ten names.
"""

from __future__ import annotations

import hashlib
import io
import os
import re
from collections.abc import Iterable, Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import NamedTuple

import cv2
import numpy as np
import pyarrow as pa
import pyarrow.csv as pa_csv

from affect.data.images import ImageReader
from affect.data.table import JSON, ColumnLike, FaceTable
from affect.errors import ConfigError, DataError, near
from affect.files import replacing

_TOGETHER = 64
_THREADS, _STATS = 16, 2000
_EVERY_FILE = "/*"

EXAMPLES = 10
"""How many names are kept of what was left out, per reason."""

BOXES = ("points", "detector")
"""Where the boxes of sets with points come from: tight around the true points, or delivered as a detector's."""

NUMBERED = re.compile(r"(\d+)\.(?:jpe?g|png|bmp|tiff?)", re.IGNORECASE)
"""File name of a numbered image; its number is group 1."""


class Dressed(NamedTuple):
    """Built-in faces under the names of a dataset.

    Attributes:
        table: Face table as the layout's ``read`` would return it, with official image paths.
        rows: For each row the row of the built-in faces whose picture it shows ``(N,)``.
    """

    table: FaceTable
    rows: np.ndarray


class Reading:
    """One pass over the files of a dataset.

    Args:
        root: Folder as delivered.
        dataset: Name for messages.
        holds: What lies directly below the root; one of these names is enough.

    Raises:
        DataError: If the root is no folder or holds none of ``holds``; a level above or below that does is named.
    """

    def __init__(self, root: str | Path, dataset: str, holds: Sequence[str] = ()) -> None:
        self.root = Path(root).expanduser()
        self.dataset = dataset
        self.skipped: dict[str, int] = {}
        self.examples: dict[str, list[str]] = {}
        self.notes: list[str] = []
        self.named: dict[str, list[str]] = {}
        self.touched: dict[str, list[int] | None] = {}
        if not self.root.is_dir():
            raise DataError(f"dataset.root={root}: no such folder; it must hold {' or '.join(holds) or 'the dataset'}")
        if holds and not any((self.root / name).exists() for name in holds):
            raise DataError(
                f"{self.root} is not the root of {dataset}: expected {' or '.join(holds)} there{self._hint(holds)}"
            )

    def _hint(self, holds: Sequence[str]) -> str:
        found = sorted(entry.name for entry in os.scandir(self.root))
        below = [name for name in found if any((self.root / name / held).exists() for held in holds)]
        above = [folder for folder in self.root.absolute().parents[:2] if any((folder / h).exists() for h in holds)]
        if below:
            return f"; it is one level too high, use dataset.root={self.root / below[0]}"
        if above:
            return f"; it is too low, use dataset.root={above[0]}"
        return f", found {', '.join(found[:8]) + (', …' if len(found) > 8 else '') or 'an empty folder'}"

    # ------------------------------------------------------------------------------------------------- looking

    def touch(self, path: Path) -> Path:
        """Remember the state of a file or folder that the table depends on, also if it does not exist."""
        key = os.path.relpath(path, self.root)
        if key not in self.touched:
            self.touched[key] = state(path)
        return path

    def touch_files(self, folder: str | Path) -> None:
        """Remember the state of all files of a folder as one: naming a million would outgrow the table itself."""
        key = f"{os.path.relpath(self.root / folder, self.root)}{_EVERY_FILE}"
        if key not in self.touched:
            self.touched[key] = _state_of_files(self.root / folder)

    def listing(self, folder: str | Path) -> list[str]:
        """Return the names in a folder, sorted; empty if there is none. Hidden files (``.DS_Store``) are left out."""
        path = self.touch(self.root / folder)
        try:
            return sorted(entry.name for entry in os.scandir(path) if not entry.name.startswith("."))
        except (FileNotFoundError, NotADirectoryError):
            return []
        except OSError as error:
            raise DataError(f"{path}: cannot be listed ({error.strerror})") from error

    def numbered(self, folder: str | Path) -> dict[int, str]:
        """Return the images of a folder by their number, whatever their zero padding; other files are left out.

        Raises:
            DataError: If two files have the same number.
        """
        return by_number(self.listing(folder), self.root / folder)

    # ------------------------------------------------------------------------------------------------- reading

    def text(self, path: str | Path) -> str:
        """Return a text file's content, without byte order mark, every line end a newline.

        Raises:
            DataError: If it is missing or no text.
        """
        full = self.touch(self.root / path)
        try:
            content = full.read_bytes().decode("utf-8-sig")
        except FileNotFoundError as error:
            raise DataError(f"{full}: no such file; {self.dataset} needs it") from error
        except OSError as error:
            raise DataError(f"{full}: cannot be read ({error.strerror})") from error
        except UnicodeDecodeError as error:
            raise DataError(f"{full}: not a text file (byte {error.start} is not UTF-8)") from error
        if "\0" in content:
            raise DataError(f"{full}: not a text file (it holds zero bytes)")
        return content.replace("\r\n", "\n").replace("\r", "\n")

    def lines(self, path: str | Path) -> list[tuple[int, str]]:
        """Return the lines that are not blank, stripped, with their numbers from 1."""
        numbered = enumerate(self.text(path).split("\n"), 1)
        return [(number, line.strip()) for number, line in numbered if line.strip()]

    def header(self, path: str | Path, separator: str | None = ",") -> list[str]:
        """Return the stripped cells of the first line.

        Raises:
            DataError: If the file is empty.
        """
        first = next((line for line in self.text(path).split("\n") if line.strip()), None)
        if first is None:
            raise DataError(f"{self.root / path}: the file is empty")
        return [cell.strip() for cell in first.strip().split(separator)]

    def numbers(
        self, path: str | Path, fields: int, skip: int = 0, separator: str | None = ",", integer: bool = False
    ) -> np.ndarray:
        """Return the numbers of a file with ``fields`` in each line, float64 ``(N, fields)``.

        Args:
            path: File, relative to the root.
            fields: Numbers per line.
            skip: Header lines (blank lines do not count).
            separator: Between numbers; None for any blanks.
            integer: Whether every number has to be a whole one.

        Raises:
            DataError: With file and line of the first line that has another number of fields or holds no number.
        """
        text = self.text(path)
        if separator is not None:
            found = _fast_numbers(text, fields, skip, separator)
            if found is not None and (not integer or (found == np.round(found)).all()):
                return found
        rows = []
        for number, line in self.lines(path)[skip:]:
            cells = line.split(separator)
            where = f"{self.root / path}, line {number}"
            if len(cells) != fields:
                raise DataError(f"{where}: {len(cells)} fields, expected {fields}")
            rows.append([number_of(cell, where, integer) for cell in cells])
        return np.array(rows, np.float64).reshape(-1, fields)

    def require(self, path: str | Path, good: np.ndarray, expected: str, skip: int = 0) -> None:
        """Raise ``DataError`` with the line of the first row of a file for which ``good`` ``(N,)`` is False.

        Args:
            path: File, relative to the root.
            good: Verdict on each line that is neither blank nor header.
            expected: What was expected of it.
            skip: Header lines.
        """
        if not good.all():
            number, line = self.lines(path)[skip + int(np.argmin(good))]
            raise DataError(f"{self.root / path}, line {number}: expected {expected}, found {line[:80]!r}")

    # ------------------------------------------------------------------------------------------------ counting

    def skip(self, reason: str, examples: Iterable[str] = (), count: int | None = None) -> None:
        """Count rows that are left out.

        Args:
            reason: Why, as a user would say it.
            examples: Names of the rows.
            count: How many; None counts the examples.
        """
        names = list(examples)
        count = len(names) if count is None else count
        if count:
            self.skipped[reason] = self.skipped.get(reason, 0) + count
            kept = self.examples.setdefault(reason, [])
            kept.extend(names[: EXAMPLES - len(kept)])

    def note(self, sentence: str) -> None:
        """Add a sentence that a reader of results has to know."""
        if sentence not in self.notes:
            self.notes.append(sentence)

    def name(self, sentence: str, example: str) -> None:
        """Count one more file or sequence that ``sentence`` is noted of; the first few are named behind it."""
        self.named.setdefault(sentence, []).append(example)

    def _noted(self) -> list[str]:
        """Return all notes."""
        named = []
        for sentence, names in self.named.items():
            listed = ", ".join(names[:EXAMPLES]) + (", …" if len(names) > EXAMPLES else "")
            named.append(f"{sentence} ({len(names):,}: {listed})")
        return [*self.notes, *named]

    def table(self, columns: Mapping[str, ColumnLike], **metadata: JSON) -> FaceTable:
        """Return the face table with what was skipped, noted and looked at in its metadata.

        Raises:
            DataError: If it has no row.
        """
        table = FaceTable.from_columns(
            columns,
            self.root,
            {
                "dataset": self.dataset,
                **metadata,
                "skipped": self.skipped,
                "skipped_examples": self.examples,
                "notes": self._noted(),
                "touched": self.touched,
            },
        )
        if not len(table):
            reasons = "; ".join(
                [
                    *(f"{count} rows: {reason}" for reason, count in self.skipped.items()),
                    *(f"{name} is empty" for name, seen in self.touched.items() if seen and self._is_empty(name, seen)),
                ]
            )
            raise DataError(f"{self.root}: no face of {self.dataset} found ({reasons or 'no label files'})")
        return table

    def _is_empty(self, name: str, seen: Sequence[int]) -> bool:
        return seen[0] == 0 and (self.root / name).is_file()


def by_number(names: Iterable[str], folder: Path) -> dict[int, str]:
    """Return image names by their number, whatever their zero padding; other names are left out.

    Args:
        names: File names, without a folder.
        folder: For messages.

    Raises:
        DataError: If two names have the same number.
    """
    found: dict[int, str] = {}
    for name in names:
        match = NUMBERED.fullmatch(name)
        if match is None:
            continue
        number = int(match[1])
        if number in found:
            raise DataError(f"{folder}: {found[number]} and {name} are the same number; remove one")
        found[number] = name
    return found


def state(path: Path) -> list[int] | None:
    """Return size and time of change of a file, 0 and time of change of a folder, None if it does not exist."""
    try:
        found = path.stat()
    except (OSError, ValueError):  # a name from a damaged list may be too long for a file, or hold what none may
        return None
    return [0 if path.is_dir() else found.st_size, found.st_mtime_ns]


def _state_of_files(folder: Path) -> list[int] | None:
    """Return how many files a folder holds, and a digest of their names, sizes and times of change."""

    def block(start: int) -> str:
        found = ((name, os.stat(f"{folder}/{name}")) for name in names[start : start + _STATS])  # noqa: PTH116 - fast
        return "\n".join(f"{name}\0{one.st_size}\0{one.st_mtime_ns}" for name, one in found)

    try:
        names = sorted(os.listdir(folder))  # noqa: PTH208 - a Path each takes longer than the file's state
        with ThreadPoolExecutor(_THREADS) as pool:  # they wait together for a file system on another machine
            text = "\n".join(pool.map(block, range(0, len(names), _STATS)))
    except OSError:
        return None
    return [len(names), int.from_bytes(hashlib.sha256(text.encode(errors="surrogateescape")).digest()[:7], "big")]


def unchanged(table: FaceTable, root: Path) -> bool:
    """Return whether everything that the reading of ``table`` looked at is as it was."""
    touched = table.metadata.get("touched")
    if not isinstance(touched, Mapping) or not touched:
        return False
    return all(seen_now(root, name) == seen for name, seen in touched.items())


def seen_now(root: Path, name: str) -> list[int] | None:
    """Return the state of what a reading below ``root`` remembers as ``name``: a file, a folder or all of its files."""
    if name.endswith(_EVERY_FILE):
        return _state_of_files(root / name.removesuffix(_EVERY_FILE))
    return state(root / name)


def number_of(cell: str, where: str, integer: bool = False) -> float:
    """Return the finite number in a cell.

    Raises:
        DataError: If it is none; ``where`` says in which file and line.
    """
    try:
        value = float(cell) if "_" not in cell else np.nan  # Python reads 1_0 as ten
    except ValueError:
        value = np.nan
    if not np.isfinite(value) or (integer and value != round(value)):
        raise DataError(f"{where}: expected a {'whole ' if integer else ''}number, found {cell.strip()[:40]!r}")
    return value


def _fast_numbers(text: str, fields: int, skip: int, separator: str) -> np.ndarray | None:
    """Return the numbers of a well-formed text, None if a line has to be looked at one by one."""
    body = text.lstrip("\n")
    for _ in range(skip):
        body = body.partition("\n")[2].lstrip("\n")
    if not body.strip():
        return np.empty((0, fields))
    names = [str(k) for k in range(fields)]
    try:
        table = pa_csv.read_csv(
            io.BytesIO(body.encode()),
            read_options=pa_csv.ReadOptions(column_names=names, use_threads=False),
            parse_options=pa_csv.ParseOptions(delimiter=separator, quote_char=False),
            convert_options=pa_csv.ConvertOptions(
                column_types=dict.fromkeys(names, pa.float64()), null_values=[], strings_can_be_null=False
            ),
        )
    except pa.ArrowInvalid:
        return None
    values = np.stack([table[name].to_numpy() for name in names], 1)
    return values if np.isfinite(values).all() else None


def require_box(box: str) -> None:
    """Raise ``ConfigError`` if nobody draws boxes like that."""
    if box not in BOXES:
        raise ConfigError(f"dataset.box={box}: unknown; {near(str(box), BOXES)}")


def box_around(points: np.ndarray, enlarge: float = 0.0) -> np.ndarray:
    """Return the boxes x1 y1 x2 y2 ``(N, 4)`` around points, as annotators and detectors draw them.

    Args:
        points: ``(N, P, 2)`` in pixels.
        enlarge: Width and height added on each side, as a fraction of the tight box.
    """
    low, high = points.min(1), points.max(1)
    grown = enlarge * (high - low)
    return np.concatenate([low - grown, high + grown], 1)


# ------------------------------------------------------------------------------------------------------ writing


def write_lines(path: Path, lines: Iterable[str], ending: str = "\n", final: bool = True) -> None:
    """Write a text file, atomically.

    Args:
        path: File; its folder is made.
        lines: Its lines without line ends.
        ending: Line end.
        final: Whether the last line has one.
    """
    text = ending.join([*lines, *([""] if final else [])])
    with replacing(path) as part:
        part.write_bytes(text.encode())


def write_bytes(path: Path, content: bytes) -> None:
    """Write a file, atomically; its folder is made."""
    with replacing(path) as part:
        part.write_bytes(content)


def encode_matrices(variables: Mapping[str, np.ndarray]) -> bytes:
    """Return a MATLAB file of variables, the same bytes each time: its header would otherwise tell the hour."""
    from scipy.io import savemat

    stream = io.BytesIO()
    savemat(stream, dict(variables), do_compression=True)
    title = b"MATLAB 5.0 MAT-file"
    return title.ljust(116) + stream.getvalue()[116:]


def encode_image(image: np.ndarray, suffix: str) -> bytes:
    """Return RGB uint8 ``(H, W, 3)`` in the format of a name's ending, e.g. ``.jpg`` (JPEG at quality 95).

    Raises:
        DataError: If OpenCV does not write this format.
    """
    bgr = cv2.cvtColor(image, cv2.COLOR_RGB2BGR)
    options = [cv2.IMWRITE_JPEG_QUALITY, 95] if suffix.lower() in (".jpg", ".jpeg") else []
    try:
        worked, data = cv2.imencode(suffix, bgr, options)
    except cv2.error:
        worked = False
    if not worked:
        raise DataError(f"images cannot be written as {suffix!r}; use .jpg or .png")
    return data.tobytes()


def write_image(path: Path, image: np.ndarray) -> None:
    """Write RGB uint8 ``(H, W, 3)`` in the format that the name ends in (JPEG at quality 95), atomically."""
    write_bytes(path, encode_image(image, path.suffix))


def pictures(table: FaceTable, images: ImageReader, rows: np.ndarray | None = None) -> Iterator[tuple[str, np.ndarray]]:
    """Yield name and picture of each of ``rows`` (None: all), in their order, read a few at a time."""
    rows = np.arange(len(table)) if rows is None else rows
    for start in range(0, len(rows), _TOGETHER):
        block = rows[start : start + _TOGETHER]
        yield from zip(table.strings("image", block)[0], images.read(block), strict=True)


def write_images(table: FaceTable, root: Path, images: ImageReader, rows: np.ndarray | None = None) -> None:
    """Write the pictures of ``rows`` (None: all) under the names in the column ``image``.

    Args:
        table: Table whose rows are written.
        root: Folder that the names are relative to.
        images: Reader of the rows' pictures.
        rows: Rows of the table ``(N,)``.
    """
    for name, image in pictures(table, images, rows):
        write_image(root / name, image)
