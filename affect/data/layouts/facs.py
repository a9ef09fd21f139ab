# SPDX-License-Identifier: Apache-2.0
"""What the layouts of BP4D, BP4D+, DISFA and DISFA+ share: coded action units by frame, tracked points, and people.

The two sets of Binghamton University have the same files (``AUCoding/AU_OCC``, ``AUCoding/AU_INT``, ``2DFeatures``), so
these are read and written here; the two DISFA sets share how occurrence follows from intensity.
"""

from __future__ import annotations

import re
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import TypeAlias

import numpy as np
import pyarrow as pa

from affect import labels
from affect.data.layouts.common import Reading, encode_image, encode_matrices, write_bytes, write_lines
from affect.data.table import ColumnLike, FaceTable
from affect.errors import DataError

Cells: TypeAlias = tuple[np.ndarray, np.ndarray]
"""Values and validity of a column, each with the rows first."""

INNER_49 = tuple(point for point in labels.INNER_51 if point not in (60, 64))
"""The points of scheme 68 that scheme 49 has: no jaw line, no inner corners of the mouth."""

POINTS = labels.SCHEMES["49"].column
OCCLUDED = "attribute_occluded"
NOT_CODED = 9
"""Code of an action unit that nobody coded."""

OCCLUSION = 99
"""Number of the last column of BP4D's occurrence files, which tells whether the face is occluded."""

LABEL_SOURCE = "FACS coding by people"

_NUMBER = re.compile(r"(?:AU)?0*(\d+)", re.IGNORECASE)


class Sequences:
    """Rows of many sequences, put together column by column; a label that a sequence lacks is null there."""

    def __init__(self) -> None:
        self._names: dict[str, list[np.ndarray]] = {}
        self._frames: list[np.ndarray] = []
        self._images: list[str] = []
        self._cells: dict[str, dict[int, Cells]] = {}

    def add(
        self, frames: np.ndarray, images: Sequence[str], cells: Mapping[str, Cells], names: Mapping[str, str | None]
    ) -> None:
        """Append the rows of a sequence.

        Args:
            frames: Frame numbers ``(N,)``.
            images: Image paths.
            cells: Labels by column, rows as in ``frames``.
            names: What all rows share, by column: subject, sequence, part.
        """
        self._frames.append(frames)
        self._images.extend(images)
        for name, value in names.items():
            self._names.setdefault(name, []).append(np.full(len(frames), value, object))
        for name, (values, valid) in cells.items():
            self._cells.setdefault(name, {})[len(self._frames) - 1] = values, valid

    def columns(self, always: Iterable[str] = ()) -> dict[str, ColumnLike]:
        """Return all columns: first what identifies a row, then labels by name.

        Args:
            always: Columns that are there even if no cell of them is labelled; others without a label are left out.
        """
        if not self._frames:
            return {"image": pa.array([], pa.string())}
        columns: dict[str, ColumnLike] = {"image": pa.array(self._images, pa.string())}
        columns |= {name: pa.array(np.concatenate(parts), pa.string()) for name, parts in self._names.items()}
        columns["frame"] = pa.array(np.concatenate(self._frames), pa.int32())
        kept = set(always)
        for name in sorted(kept | set(self._cells)):
            values, valid = self._together(name)
            if name in kept or valid.any():
                columns[name] = (values, valid)
        return columns

    def _together(self, name: str) -> Cells:
        parts = self._cells.get(name, {})
        shape = next((values.shape[1:] for values, _ in parts.values()), ())
        size = sum(map(len, self._frames))
        values, valid, start = np.zeros((size, *shape), np.float32), np.zeros(size, bool), 0
        for index, frames in enumerate(self._frames):
            if index in parts:
                end = start + len(frames)
                values[start:end], valid[start:end] = parts[index]
            start += len(frames)
        return values, valid


def chosen(cells: Mapping[str, Cells], rows: np.ndarray) -> dict[str, Cells]:
    """Return the labels of some rows, a mask or indices."""
    return {name: (values[rows], valid[rows]) for name, (values, valid) in cells.items()}


def pick_images(reading: Reading, frames: np.ndarray, found: Mapping[int, str], folder: str) -> tuple[np.ndarray, list]:
    """Return which frames ``(N,)`` have an image and their names; the others are counted as left out.

    Args:
        reading: Where they are counted.
        frames: Labelled frames.
        found: Image names of the folder by number.
        folder: For messages.
    """
    names = [found.get(frame) for frame in frames.tolist()]
    there = np.array([name is not None for name in names], bool)
    reading.skip("no image of a labelled frame", (f"{folder}/{frame}.jpg" for frame in frames[~there].tolist()))
    return there, [name for name in names if name is not None]


# -------------------------------------------------------------------------------------- occurrence and intensity


def read_occurrence(reading: Reading, path: str, missing: Sequence[int] = (NOT_CODED,)) -> tuple[np.ndarray, dict]:
    """Return the frames ``(N,)`` and the labels by column of an occurrence file.

    The first line numbers the columns; its first cell stands for the frame. Action units are found by their number,
    never by position. Numbers without an action unit of that name are left out, with a note if they are coded.

    Args:
        reading: The pass over the dataset.
        path: File, relative to the root.
        missing: Codes of cells without a label, besides 0 (absent) and 1 (present).

    Raises:
        DataError: With the line, if the header is none, a cell is no label or frames do not increase.
    """
    numbers = _numbers_of_header(reading, path)
    rows = reading.numbers(path, len(numbers), skip=1, integer=True)
    if not len(rows):
        reading.skip("label files without a coded frame", [path])
    frames = _increasing_frames(reading, path, rows[:, 0], skip=1)
    cells: dict[str, Cells] = {}
    unnamed = []
    for place, number in enumerate(numbers):
        values = rows[:, place]
        present = np.isin(values, (0, 1))
        if place == 0:
            continue
        if number in labels.AU_NAMES:
            good = present | np.isin(values, missing)
            allowed = ", ".join(map(str, (0, 1, *missing)))
            reading.require(path, good, f"AU{number} to be one of {allowed} (column {place + 1})", skip=1)
            cells[labels.occurrence_column(number)] = values.astype(np.float32), present
        elif number == OCCLUSION:
            good = present | np.isin(values, missing)
            allowed = ", ".join(map(str, (0, 1, *missing)))
            reading.require(path, good, f"occlusion to be one of {allowed} (column {place + 1})", skip=1)
            cells[OCCLUDED] = values.astype(np.float32), present
        elif present.any():
            unnamed.append(number)
    if unnamed:
        listed = ", ".join(map(str, unnamed))
        reading.note(f"coded but left out, because the package has no action unit of this number: {listed}")
    return frames, cells


def _numbers_of_header(reading: Reading, path: str) -> list[int]:
    cells = reading.header(path)
    matches = [_NUMBER.fullmatch(cell) for cell in cells]
    numbers = [0, *(int(match[1]) if match else -1 for match in matches[1:])]
    first_is_frame = matches[0] is None or int(matches[0][1]) == 0
    whole = all(match is not None for match in matches[1:])
    if not (first_is_frame and whole and len(cells) > 1 and len(set(numbers[1:])) == len(numbers) - 1):
        raise DataError(
            f"{reading.root / path}, line {reading.lines(path)[0][0]}: expected a header with each action unit's "
            f"number once behind a 0 for the frame (0,1,2,4,…), found {','.join(cells)[:80]!r}"
        )
    if not set(numbers[1:]) & set(labels.AU_NAMES):
        raise DataError(f"{reading.root / path}: the header names no action unit, found {','.join(cells)[:80]!r}")
    return numbers


def _increasing_frames(reading: Reading, path: str, numbers: np.ndarray, skip: int = 0) -> np.ndarray:
    good = np.ones(len(numbers), bool)
    good[1:] = numbers[1:] > numbers[:-1]
    reading.require(path, good, "a frame number above that of the line before (no frame twice)", skip)
    reading.require(path, (numbers >= 0) & (numbers < 2**31), "a frame number of at least 0", skip)
    return numbers.astype(np.int64)


def read_intensity(
    reading: Reading, path: str, frames: np.ndarray | None = None, missing: Sequence[int] = (NOT_CODED,)
) -> tuple[np.ndarray, Cells]:
    """Return frames and labels of an intensity file, lines ``frame,intensity`` without a header.

    Args:
        reading: The pass over the dataset.
        path: File, relative to the root.
        frames: Frames ``(N,)`` that the labels are wanted for, increasing; a frame that the file lacks is null, and
            labels of other frames are noted. None: the file's own.
        missing: Codes of cells without a label, besides 0 to 5.

    Raises:
        DataError: With the line, if a cell is no label or frames do not increase.
    """
    rows = reading.numbers(path, 2, integer=True)
    if not len(rows):
        raise DataError(f"{reading.root / path}: the file is empty, expected lines frame,intensity; copy it again")
    own = _increasing_frames(reading, path, rows[:, 0])
    valid = (rows[:, 1] >= 0) & (rows[:, 1] <= 5)
    allowed = "".join(f" or {code} (not coded)" for code in missing)
    reading.require(path, valid | np.isin(rows[:, 1], missing), f"an intensity from 0 to 5{allowed}")
    values = rows[:, 1].astype(np.float32)
    if frames is None:
        return own, (values, valid)
    if np.setdiff1d(own, frames).size:
        reading.note("some files of intensities have frames without occurrence labels; these are left out")
    if np.setdiff1d(frames, own).size:
        reading.name("files of intensities lack frames that are coded in occurrence, and are missing there", path)
    return frames, spread(frames, own, (values, valid))


def spread(frames: np.ndarray, own: np.ndarray, cells: Cells) -> Cells:
    """Return the cells of ``own`` frames at ``frames``, both increasing; null where ``own`` lacks one."""
    values, valid = cells
    if not len(own):
        return np.zeros((len(frames), *values.shape[1:]), np.float32), np.zeros(len(frames), bool)
    place = np.minimum(np.searchsorted(own, frames), len(own) - 1)
    there = own[place] == frames
    return np.where(there.reshape(-1, *[1] * (values.ndim - 1)), values[place], 0), there & valid[place]


def occurrence(intensity: Cells, threshold: int) -> Cells:
    """Return occurrence: an intensity of at least ``threshold``."""
    values, valid = intensity
    return (values >= threshold).astype(np.float32), valid


def coded_intensities(
    reading: Reading, coded: Mapping[int, tuple[np.ndarray, Cells]], threshold: int, whole: str
) -> tuple[np.ndarray, dict[str, Cells]]:
    """Return the frames that any label file has ``(N,)``, and intensity and occurrence by column.

    Args:
        reading: Where files that lack frames are noted.
        coded: Frames and intensities of the files, by action unit.
        threshold: Intensity from which an action unit occurs.
        whole: What the files are of, for the note.
    """
    frames = np.unique(np.concatenate([np.empty(0, np.int64), *(own for own, _ in coded.values())]))
    cells: dict[str, Cells] = {}
    for au, (own, values) in coded.items():
        intensity = spread(frames, own, values)
        cells[labels.intensity_column(au)] = intensity
        cells[labels.occurrence_column(au)] = occurrence(intensity, threshold)
    if any(len(own) != len(frames) for own, _ in coded.values()):
        reading.note(f"some label files lack frames that others of the same {whole} have: missing (null) there")
    return frames, cells


def action_units(table: FaceTable, kind: str) -> list[int]:
    """Return the action units that a table has columns of, sorted; ``kind`` is ``occurrence`` or ``intensity``."""
    found = (re.fullmatch(rf"au(\d\d)_{kind}", name) for name in table.names)
    return sorted(int(match[1]) for match in found if match)


def sequence_rows(table: FaceTable) -> list[tuple[str, np.ndarray]]:
    """Return each sequence with its rows, in the order of frames."""
    codes, names = table.codes("sequence")
    order = np.lexsort((table.numbers("frame")[0], codes))
    starts = np.searchsorted(codes[order], np.arange(len(names) + 1))
    return [(str(name), order[a:b]) for name, a, b in zip(names, starts[:-1], starts[1:], strict=True)]


def codes_of(table: FaceTable, column: str, rows: np.ndarray, missing: int = NOT_CODED) -> list[str]:
    """Return the cells of a column as they are written: whole numbers, ``missing`` where null."""
    if column not in table.names:
        return [str(missing)] * len(rows)
    values, valid = table.numbers(column, rows)
    return np.where(valid, np.rint(values), missing).astype(np.int64).astype(str).tolist()


def write_coding(table: FaceTable, root: Path, header: Sequence[int], occurrences: str = "AUCoding/AU_OCC") -> None:
    """Write the occurrence and intensity files of a table, and its points where it has the column.

    Args:
        table: With the columns that the layout's ``read`` gives.
        root: Folder of the tree.
        header: Numbers of the columns behind that of the frame.
        occurrences: Folder of the occurrence files.
    """
    frames = table.numbers("frame")[0].astype(np.int64)
    for name, rows in sequence_rows(table):
        first = frames[rows].astype(str).tolist()
        columns = [codes_of(table, _column(number), rows) for number in header]
        lines = [",".join(row) for row in zip(first, *columns, strict=True)]
        write_lines(root / occurrences / f"{name}.csv", [",".join(map(str, (0, *header))), *lines])
        for au in action_units(table, "intensity"):
            cells = codes_of(table, labels.intensity_column(au), rows)
            path = root / f"AUCoding/AU_INT/AU{au:02d}/{name}_AU{au:02d}.csv"
            write_lines(path, [f"{frame},{cell}" for frame, cell in zip(first, cells, strict=True)])
        if POINTS in table.names:
            _write_tracked(root / f"2DFeatures/{name}.mat", frames[rows], table.numbers(POINTS, rows))


def _column(number: int) -> str:
    return OCCLUDED if number == OCCLUSION else labels.occurrence_column(number)


# ------------------------------------------------------------------------------------------------ tracked points


def load_mat(reading: Reading, path: str, variable: str, touch: bool = True) -> np.ndarray | None:
    """Return a variable of a MATLAB file, None if it has none of this name. Nothing in the file is executed.

    Raises:
        DataError: If the file cannot be read.
    """
    from scipy.io import loadmat

    full = reading.touch(reading.root / path) if touch else reading.root / path
    try:
        return loadmat(str(full), variable_names=[variable]).get(variable)
    except NotImplementedError as error:
        raise DataError(f"{full}: a file of MATLAB 7.3; save it with -v7, or set dataset.points=false") from error
    except Exception as error:  # scipy raises whatever its parser stumbles over
        reason = str(error).splitlines()[0] if str(error) else type(error).__name__
        raise DataError(
            f"{full}: not a readable MATLAB file ({reason}); copy it again, or set dataset.points=false"
        ) from error


def read_tracked(reading: Reading, path: str, frames: np.ndarray, images: Iterable[int]) -> Cells:
    """Return the 49 tracked points ``(N, 98)`` of frames from a file of ``2DFeatures``.

    The file holds a struct array ``fit`` with a field ``pred`` (49 x 2, x and y in pixels, empty where nothing was
    tracked). Its entries are the images of the folder, in order, if they are as many; otherwise entry n is frame n,
    counted from 1. This structure is recalled, not checked: a file of another one gives no points and a note.

    Args:
        reading: The pass over the dataset.
        path: File, relative to the root.
        frames: Labelled frames ``(N,)``, increasing.
        images: Numbers of all images in the folder.
    """
    none = np.zeros((len(frames), 98), np.float32), np.zeros(len(frames), bool)
    fit = load_mat(reading, path, "fit")
    if fit is None or fit.dtype.names is None or "pred" not in fit.dtype.names:
        reading.note("2DFeatures is not as expected (no struct `fit` with a field `pred`): those points are missing")
        return none
    entries = fit["pred"].ravel()
    tracked = np.array([getattr(entry, "shape", ()) == (49, 2) for entry in entries], bool)
    empty = np.array([getattr(entry, "size", 1) == 0 for entry in entries], bool)
    if not (tracked | empty).all() or not tracked.any():
        if not empty.all():
            reading.note("2DFeatures is not as expected (`pred` is not 49 x 2): those points are missing")
        return none
    numbers = np.array(sorted(images), np.int64)
    if len(numbers) != len(entries):
        if len(frames) and frames[-1] > len(entries):
            reading.note("some files of 2DFeatures have fewer entries than their videos have frames: points missing")
            return none
        numbers = np.arange(1, len(entries) + 1)
    try:
        points = np.stack(list(entries[tracked])).astype(np.float32).reshape(-1, 98)
    except (TypeError, ValueError):
        reading.note("2DFeatures is not as expected (`pred` holds no numbers): those points are missing")
        return none
    return spread(frames, numbers[tracked], (points, np.asarray(np.isfinite(points).all(1))))


def _write_tracked(path: Path, frames: np.ndarray, cells: Cells) -> None:
    """Write a struct array with an entry for each frame from 1 to the last of ``frames`` (increasing)."""
    entries = np.zeros((1, int(frames[-1])), [("pred", object), ("pose", object)])
    entries["pred"].fill(np.zeros((0, 0)))
    entries["pose"].fill(np.zeros((0, 0)))
    for frame, points, valid in zip(frames.tolist(), *cells, strict=True):
        if valid:
            entries["pred"][0, frame - 1] = points.reshape(49, 2).astype(np.float64)
    write_bytes(path, encode_matrices({"fit": entries}))


# ------------------------------------------------------------------------------------ people and built-in faces


def people(names: str) -> tuple[str, ...]:
    """Return the names in a text, separated by blanks."""
    return tuple(names.split())


def interleaved(parts: Mapping[str, Sequence[str]]) -> list[str]:
    """Return the people of all parts, one of each in turn, so that any first few are spread over the parts."""
    longest = max(map(len, parts.values()))
    return [people[k] for k in range(longest) for people in parts.values() if k < len(people)]


def part_of(parts: Mapping[str, Sequence[str]]) -> dict[str, str]:
    """Return the part of each person.

    Example:
        >>> part_of({"P1": ["F001"], "P2": ["F003", "M002"]})
        {'F001': 'P1', 'F003': 'P2', 'M002': 'P2'}
    """
    return {person: part for part, people in parts.items() for person in people}


def cast(faces: FaceTable, people: Sequence[str], scenes: int, length: int) -> tuple[np.ndarray, ...]:
    """Give built-in faces to the people of a dataset; one drawn person is one of them.

    Args:
        faces: The built-in faces.
        people: Names in the order in which they are given away; from the beginning again if there are too few.
        scenes: Number of sequences that a person has at most.
        length: Faces in a sequence, more where a person has too many of them.

    Returns:
        Index into ``people``, index of the sequence, and place in the sequence of each face, ``(N,)`` each.
    """
    drawn = faces.codes("subject")[0] if "subject" in faces.names else np.arange(len(faces))
    person = np.unique(drawn, return_inverse=True)[1] % len(people)
    order = np.argsort(person, kind="stable")
    counts = np.bincount(person)
    place = np.empty(len(faces), np.int64)
    place[order] = np.arange(len(faces)) - np.repeat(np.cumsum(counts) - counts, counts)
    lengths = np.maximum(length, -(-counts // scenes))[person]
    return person, place // lengths, place % lengths


def whole_intensity(faces: FaceTable, au: int) -> Cells:
    """Return the intensity of drawn faces as people code it: a whole number from 0 to 5."""
    values, valid = faces.numbers(labels.intensity_column(au))
    return np.clip(np.rint(values), 0, 5).astype(np.float32), valid


def coded_rows(faces: FaceTable, units: Sequence[int]) -> np.ndarray:
    """Return the drawn faces with a label of any of ``units``, for sets that have no code of missing labels."""
    coded = np.zeros(len(faces), bool)
    for au in units:
        coded |= whole_intensity(faces, au)[1]
    return np.flatnonzero(coded)


def points_49(faces: FaceTable) -> Cells:
    """Return the 49 points ``(N, 98)`` of faces with 68."""
    values, valid = faces.numbers(labels.SCHEMES["68"].column)
    return values.reshape(-1, 68, 2)[:, list(INNER_49)].reshape(-1, 98), valid


# ------------------------------------------------------------------------------------------------------ writing


def write_zip(path: Path, members: Mapping[str, np.ndarray]) -> None:
    """Write images as a ZIP file, atomically; its bytes are a function of the images alone."""
    import io
    import zipfile

    stream = io.BytesIO()
    with zipfile.ZipFile(stream, "w", zipfile.ZIP_STORED) as archive:
        for name, image in members.items():
            archive.writestr(zipfile.ZipInfo(name), encode_image(image, Path(name).suffix))
    write_bytes(path, stream.getvalue())
