# SPDX-License-Identifier: Apache-2.0
"""Aff-Wild2 as delivered: cropped faces of videos with valence and arousal, expressions and action units per frame.

Kollias and Zafeiriou, "Expression, affect, action unit recognition: Aff-Wild2, multi-task learning and ArcFace", BMVC
2019, and the overview papers of the ABAW challenges. For research, on request to its authors at Imperial College London
and Queen Mary University of London. Layout on disk (facts counted in public readers unless they are marked)::

    <root>/
    ├── cropped_aligned/<video>/00001.jpg             112 x 112, numbered by video frame from 1
    ├── cropped_aligned_new_50_vids/<video>/…         further archive, from ABAW 5 on
    ├── cropped/<video>/00001.jpg                     detected boxes, not aligned
    ├── 6th ABAW Annotations/                         any name, or none; up to two folders deep
    │   ├── VA_Estimation_Challenge/Train_Set/<video>.txt, Validation_Set/<video>.txt
    │   ├── EXPR_Recognition_Challenge/…              ABAW 3 and 5: EXPR_Classification_Challenge
    │   └── AU_Detection_Challenge/…
    ├── annotations/VA_Set/Training_Set/<video>.txt   ABAW 1 and 2: VA_Set, EXPR_Set (or Expression_Set), AU_Set
    ├── training_set_annotations.txt                  MTL of ABAW 4 and 7, with validation_set_annotations.txt;
    └── MTL_Challenge/train_set.txt                   of ABAW 3, with validation_set.txt

``<video>.txt`` has a header and one line per video frame: line k after the header belongs to ``{k:05d}.jpg``.

    track  header                                     line               missing
    va     valence,arousal                            -0.124,0.310       -5 in either masks both
    expr   Neutral,Anger,Disgust,…,Surprise[,Other]   4                  -1; the header lists classes, not columns
    au     AU1,AU2,AU4,AU6,AU7,AU10,AU12,AU15,…       0,0,1,… (12 or 8)  -1 per action unit

MTL files have the header ``image,valence,arousal,expression,aus`` of five names above lines of sixteen fields.

Traps that are handled, each with a test:

- Frames without a detected face have no image, so numbers have gaps, and there are more lines than images. Lines and
  images that have no counterpart are counted.
- Folders hold ``.DS_Store`` and ``._*`` files, which are left out.
- Two people in a video are two folders and two label files, ``<video>_left`` and ``<video>_right`` (sometimes one of
  them has no ending). Column ``video``, the group that parts keep together, has no such ending. The official crops swap
  the two people in places; nothing can be done about that here.
- Videos of crops without a label file, as those of the test set, are counted.
- A line that is doubled moves all labels behind it by a frame, and nothing in the file tells. Videos whose tracks
  differ in length, or that have an image of every frame and one line more, are named.
- A blank line between labels would move all labels behind it by a frame and is an error.
- Valence or arousal outside [-1, 1] that is not -5 is masked and noted.
- **A video may train in one track and validate in another.** Columns ``part_va``, ``part_expr`` and ``part_au`` are the
  official part in each track (null: not in the track). Column ``part`` is ``validation`` for a video, with both its
  people, that validates any of the *selected* tracks, and its training labels of the other tracks are masked and
  counted, so that no face that is tested on was trained on. With one selected track, ``part`` is the official part.
"""

from __future__ import annotations

import io
import os
import re
from collections.abc import Mapping, Sequence
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
from affect.data.layouts.common import EXAMPLES, Dressed, Reading, number_of, write_images, write_lines
from affect.data.table import ColumnLike, FaceTable
from affect.errors import ConfigError, DataError, near

__all__ = ["CROPS", "FOLDERS", "TRACKS", "dress", "expected", "read", "write"]

DATASET = "affwild2"

TRACKS = ("va", "expr", "au")
"""Tracks with a file per video; ``mtl`` stands for the files of the multi-task challenges."""

CROPS = ("cropped_aligned", "cropped_aligned_new_50_vids")
"""Folders of crops that are read by default; either may be absent."""

FOLDERS = MappingProxyType(
    {
        "va": ("VA_Estimation_Challenge", "VA_Set"),
        "expr": ("EXPR_Recognition_Challenge", "EXPR_Classification_Challenge", "EXPR_Set", "Expression_Set"),
        "au": ("AU_Detection_Challenge", "AU_Set"),
    }
)
"""Names that the label folder of a track had over the years."""

MTL_FILES = (
    ("training_set_annotations.txt", "validation_set_annotations.txt"),
    ("train_set.txt", "validation_set.txt"),
)
"""Names that the two files of the multi-task challenges had over the years."""

_PARTS = MappingProxyType({"train": ("Train_Set", "Training_Set"), "validation": ("Validation_Set",)})
_ABAW, _ABAW7 = labels.EXPRESSION_ORDERS["abaw"], labels.EXPRESSION_ORDERS["abaw7"]
_AUS = labels.AU_SETS["affwild2"]
_IDENTITY = {"people": DATASET, "identity": "video"}
"""Metadata by which readings of several tracks know their common videos; nobody knows who is shown."""
_PERSON = re.compile(r"_(?:left|right)$")
_DEPTH, _MANY = 2, 100
_MTL_HEADER = "image,valence,arousal,expression,aus"


class _Labels(NamedTuple):
    """Labels of one file: a cell per line and output.

    Attributes:
        names: Names of the outputs: columns of the table, or ``expression``.
        values: ``(L, K)`` float32; expressions are indices of the order of ABAW 3 and later.
        valid: ``(L, K)`` bool.
        classes: Classes that the file's header lists.
    """

    names: tuple[str, ...]
    values: np.ndarray
    valid: np.ndarray
    classes: tuple[str, ...] = ()


class _Found(NamedTuple):
    """Frames of one video that become rows."""

    numbers: np.ndarray
    names: list[str]
    labels: dict[str, _Labels]


# ------------------------------------------------------------------------------------------------------ reading


def read(
    root: str | Path,
    tracks: str | Sequence[str] = TRACKS,
    crops: str | Sequence[str] = CROPS,
    va: str | None = None,
    expr: str | None = None,
    au: str | None = None,
    mtl: str | Sequence[str] | None = None,
    complete_aus: bool = False,
) -> FaceTable:
    """Return the face table of Aff-Wild2: a row for each cropped frame that has a label in any of the tracks.

    Args:
        root: Folder that holds the folders of crops.
        tracks: Any of ``va``, ``expr``, ``au``, or ``mtl`` alone.
        crops: Folders of crops, relative to ``root``. A video is taken from the first that has it.
        va: Folder with ``Train_Set`` and ``Validation_Set`` of the track, relative to ``root``; None looks for the
            names of all years, up to two folders deep.
        expr: The same of expressions.
        au: The same of action units.
        mtl: Folder of the two files of a multi-task challenge, or the training and the validation file; None looks for
            the names of all years.
        complete_aus: Mask all action units of a frame where one of them is missing, as many public readers do.

    Returns:
        Rows in the order of sequence and frame (``mtl``: in the order of the files, training first), with ``image``,
        ``sequence`` (folder of the crops), ``video`` (without ``_left`` and ``_right``), ``frame``, ``part`` and the
        labels and, unless ``mtl``, ``part_<track>``.

    Raises:
        ConfigError: If a track is unknown or ``mtl`` is not alone.
        DataError: If the tree is none of Aff-Wild2, labels of several years are found, or a file is malformed.
    """
    chosen, folders = _chosen(tracks), (crops,) if isinstance(crops, str) else tuple(crops)
    reading = Reading(root, DATASET, holds=folders)
    if chosen == ("mtl",):
        return _read_mtl(reading, folders, mtl, complete_aus)
    given = {"va": va, "expr": expr, "au": au}
    places = {track: _label_folder(reading, track, given[track], folders) for track in chosen}
    if len({os.path.split(place)[0] for place in places.values()}) > 1:
        reading.note(f"labels come from several folders: {', '.join(places.values())}")
    files = {track: _label_files(reading, track, place) for track, place in places.items()}
    held_out = {
        _video(sequence) for track in files for sequence, (part, _) in files[track].items() if part == "validation"
    }
    return _join(reading, folders, files, held_out, complete_aus)


def _chosen(tracks: str | Sequence[str]) -> tuple[str, ...]:
    asked = (tracks,) if isinstance(tracks, str) else tuple(tracks)
    for track in asked:
        if track not in (*TRACKS, "mtl"):
            raise ConfigError(f"affwild2: no track {track}; {near(str(track), (*TRACKS, 'mtl'))}")
    if not asked or ("mtl" in asked and len(asked) > 1):
        raise ConfigError(f"affwild2: tracks={list(asked)}: choose some of {', '.join(TRACKS)}, or mtl alone")
    return ("mtl",) if asked == ("mtl",) else tuple(track for track in TRACKS if track in asked)


def _video(sequence: str) -> str:
    """Return the video that a folder of crops is of: both people of a video belong to one."""
    return _PERSON.sub("", sequence)


# ------------------------------------------------------------------------------------------- finding the labels


def _places(reading: Reading, images: Sequence[str]) -> list[tuple[str, list[str]]]:
    """Return folders that may hold labels, relative to the root, with the names in them; crops are not walked."""
    known = {name for names in FOLDERS.values() for name in names}
    crops = {os.path.normpath(folder) for folder in images}
    found: list[tuple[str, list[str]]] = []
    level = ["."]
    for depth in range(_DEPTH + 1):
        below: list[str] = []
        for folder in level:
            names = reading.listing(folder)
            found.append((folder, names))
            inner = [
                path
                for name in names
                if name not in known and not name.startswith(("cropped", "batch"))
                for path in [os.path.normpath(f"{folder}/{name}")]
                if path not in crops and (reading.root / path).is_dir()
            ]
            # A folder of many folders holds videos, and looking into each would take long.
            below += inner if depth < _DEPTH and len(inner) <= _MANY else []
        level = below
    return found


def _label_folder(reading: Reading, track: str, given: str | None, images: Sequence[str]) -> str:
    """Return the label folder of a track, relative to the root."""
    if given is not None:
        if not (reading.root / given).is_dir():
            raise DataError(f"dataset.{track}={given}: no such folder in {reading.root}")
        return str(given)
    found = [
        os.path.normpath(f"{folder}/{name}")
        for folder, names in _places(reading, images)
        for name in FOLDERS[track]
        if name in names
    ]
    if len(found) > 1:
        raise DataError(
            f"{reading.root} holds labels of track {track} of several years: {', '.join(sorted(found))}; "
            f"choose one by dataset.{track}=<folder>"
        )
    if not found:
        raise DataError(
            f"{reading.root}: no labels of track {track}; expected a folder {' or '.join(FOLDERS[track])} up to "
            f"two folders deep, or name it by dataset.{track}=<folder>"
        )
    return found[0]


def _label_files(reading: Reading, track: str, folder: str) -> dict[str, tuple[str, str]]:
    """Return part and path of the label file of each sequence.

    Raises:
        DataError: If a part has no folder or no file, or a sequence is in both.
    """
    inside = reading.listing(folder)
    files: dict[str, tuple[str, str]] = {}
    for part, names in _PARTS.items():
        here = [name for name in names if name in inside]
        if len(here) != 1:
            raise DataError(
                f"{reading.root / folder}: expected a folder {' or '.join(names)} with the labels of track {track}, "
                f"found {', '.join(here or inside[:8]) or 'an empty folder'}"
            )
        found = [name for name in reading.listing(f"{folder}/{here[0]}") if name.lower().endswith(".txt")]
        if not found:
            raise DataError(f"{reading.root / folder / here[0]}: no label files; expected <video>.txt")
        for name in found:
            sequence = name[: -len(".txt")]
            if sequence in files:
                raise DataError(
                    f"{reading.root / folder}: {sequence} is in {files[sequence][0]} and {part}; remove one of the two"
                )
            files[sequence] = (part, f"{folder}/{here[0]}/{name}")
    return files


# ---------------------------------------------------------------------------------------------- files per video


def _frames(reading: Reading, path: str, fields: int, integer: bool) -> np.ndarray:
    """Return the numbers of a file whose line k after the header belongs to frame k, float64 ``(L, fields)``.

    Raises:
        DataError: If a line is malformed or blank; the frames behind a blank one would all get a wrong label.
    """
    values = reading.numbers(path, fields, skip=1, integer=integer)
    text = reading.text(path)
    if len(values) != text.strip().count("\n"):
        lines = text.rstrip().split("\n")
        first = next(k for k, line in enumerate(lines) if line.strip())
        number = next(k + 1 for k, line in enumerate(lines) if k > first and not line.strip())
        raise DataError(
            f"{reading.root / path}, line {number}: blank, expected the labels of a frame; a removed line would move "
            "the labels of all frames behind it"
        )
    return values


def _valence_arousal(reading: Reading, path: str, outside: list[str]) -> _Labels:
    header = [cell.lower() for cell in reading.header(path)]
    if sorted(header) != sorted(labels.AFFECT_AXES):
        raise DataError(f"{reading.root / path}, line 1: expected valence,arousal, found {','.join(header)[:60]!r}")
    values = _frames(reading, path, 2, integer=False)[:, [header.index(axis) for axis in labels.AFFECT_AXES]]
    valid, odd = _inside(values)
    outside += [f"{path}, line {k + 2}" for k in np.flatnonzero(odd)]
    return _Labels(labels.AFFECT_AXES, values.astype(np.float32), np.repeat(valid[:, None], 2, 1))


def _inside(values: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Return for valence and arousal ``(N, 2)`` which rows are labels, and which are neither labels nor missing."""
    valid = (np.abs(values) <= 1).all(1)
    return valid, ~valid & ~(values == -5).any(1)


def _note_outside(reading: Reading, outside: Sequence[str]) -> None:
    if outside:
        reading.note(
            f"{len(outside)} frames have valence or arousal outside [-1, 1] that is not -5; they are masked "
            f"(first: {outside[0]})"
        )


def _expressions(reading: Reading, path: str) -> _Labels:
    classes = [labels.canonical_expression(cell) for cell in reading.header(path)]
    if len(set(classes)) != len(classes) or set(classes) not in (set(_ABAW), set(_ABAW7)):
        raise DataError(
            f"{reading.root / path}, line 1: expected the class list {','.join(name.title() for name in _ABAW)} "
            f"(or without Other), found {','.join(reading.header(path))[:100]!r}"
        )
    found = _frames(reading, path, 1, integer=True)
    inside = (found[:, 0] >= -1) & (found[:, 0] < len(classes))
    reading.require(path, inside, f"a class from 0 to {len(classes) - 1}, or -1", skip=1)
    order = np.array([*labels.permutation(_ABAW, classes), -1], np.float32)
    values = order[found.astype(np.int64)]
    return _Labels(("expression",), values, values >= 0, tuple(classes))


def _action_units(reading: Reading, path: str, complete: bool) -> _Labels:
    header = reading.header(path)
    numbers = [int(cell[2:]) if re.fullmatch(r"AU\d\d?", cell, re.IGNORECASE) else -1 for cell in header]
    known = [number in labels.AU_NAMES for number in numbers]
    if not all(known) or len(set(numbers)) != len(numbers):
        raise DataError(
            f"{reading.root / path}, line 1: expected names like AU1,AU2,…, found {','.join(header)[:80]!r}"
        )
    values = _frames(reading, path, len(header), integer=True)
    reading.require(path, _coded(values), "0, 1 or -1 for each action unit", skip=1)
    valid = values >= 0
    if complete:
        valid &= valid.all(1, keepdims=True)
    return _Labels(tuple(labels.occurrence_column(n) for n in numbers), values.astype(np.float32), valid)


def _coded(values: np.ndarray) -> np.ndarray:
    """Return whether all action units of a row are absent, present or missing ``(N,)``."""
    return np.asarray(np.isin(values, (-1, 0, 1)).all(1))


def _join(
    reading: Reading,
    folders: Sequence[str],
    files: Mapping[str, Mapping[str, tuple[str, str]]],
    held_out: set[str],
    complete_aus: bool,
) -> FaceTable:
    """Return the table of the tracks in ``files``, joined by sequence and frame."""
    holding = _Crops(reading, folders)
    outside: list[str] = []
    declared = _ABAW7
    names: dict[str, tuple[str, ...]] = {}
    rows: dict[str, _Found] = {}
    sequences = sorted({sequence for track in files.values() for sequence in track})
    for sequence in tqdm(sequences, desc=DATASET, unit="video", leave=False, disable=None):
        read_labels = {}
        for track, of_track in files.items():
            if sequence in of_track:
                path = of_track[sequence][1]
                if track == "va":
                    read_labels[track] = _valence_arousal(reading, path, outside)
                elif track == "expr":
                    read_labels[track] = _expressions(reading, path)
                    declared = max(declared, _ABAW if labels.OTHER in read_labels[track].classes else _ABAW7, key=len)
                else:
                    read_labels[track] = _action_units(reading, path, complete_aus)
                    if names.setdefault(track, read_labels[track].names) != read_labels[track].names:
                        raise DataError(
                            f"{reading.root / path}, line 1: other action units than in the files before; "
                            "labels of several years cannot be mixed"
                        )
        masked = tuple(track for track in read_labels if _video(sequence) in held_out)
        masked = tuple(track for track in masked if files[track][sequence][0] == "train")
        found = _frames_of(reading, holding, sequence, read_labels, masked)
        if found is not None and len(found.numbers):
            rows[sequence] = found
    _note_outside(reading, outside)
    _skip_unlabelled(reading, holding, set(sequences))
    return _table(reading, holding, files, held_out, rows, names, declared)


class _Crops:
    """Folders of crops, listed once each."""

    def __init__(self, reading: Reading, folders: Sequence[str]) -> None:
        self.reading = reading
        self.folders = {folder: set(reading.listing(folder)) for folder in folders}

    def folder(self, sequence: str) -> str | None:
        """Return the folder of a sequence, relative to the root; None if there is none."""
        return next((f"{folder}/{sequence}" for folder, held in self.folders.items() if sequence in held), None)

    def images(self, sequence: str) -> tuple[np.ndarray, list[str]]:
        """Return the numbers of a sequence's images, sorted, and their file names."""
        folder = self.folder(sequence)
        found = {} if folder is None else self.reading.numbered(folder)
        numbers = np.fromiter(found, np.int64, len(found))
        order = np.argsort(numbers)
        names = list(found.values())
        if (numbers[1:] < numbers[:-1]).any():
            names = [names[k] for k in order]
        return numbers[order], names


def _skip_unlabelled(reading: Reading, crops: _Crops, labelled: set[str]) -> None:
    """Count the images of videos that no selected track has a label file of; those of the test set are among them."""
    for sequence in sorted(set().union(*crops.folders.values()) - labelled):
        numbers, _ = crops.images(sequence)
        reason = "image of a video without a label file in the selected tracks (the test set's have none)"
        reading.skip(reason, [sequence] * min(len(numbers), 1), count=len(numbers))


def _name_shifted(reading: Reading, sequence: str, numbers: np.ndarray, lines: Mapping[str, int]) -> None:
    """Note a video whose lines cannot all be those of its frames: a doubled or lost line moves all labels behind it.

    Args:
        reading: The pass.
        sequence: Folder of crops.
        numbers: Numbers of its images, sorted ``(N,)``.
        lines: Number of label lines by track.
    """
    most = max(lines.values())
    if len(set(lines.values())) > 1:
        counts = ", ".join(f"{track} {count}" for track, count in lines.items())
        reading.name(
            "videos whose tracks have label files of different lengths; each line is a frame, so that one which is "
            "doubled or lost moves all labels behind it",
            f"{sequence}: {counts}",
        )
    elif len(numbers) and numbers[0] == 1 and len(numbers) == numbers[-1] == most - 1:
        reading.name(
            "videos with an image of every frame and one label line more; if a line is doubled, all labels behind it "
            "are those of other frames",
            f"{sequence}: {most} lines, {len(numbers)} images",
        )


def _frames_of(
    reading: Reading, crops: _Crops, sequence: str, found: Mapping[str, _Labels], masked: Sequence[str]
) -> _Found | None:
    """Return the frames of a sequence that have an image and a label, and count the others."""
    lines = max(len(track.values) for track in found.values())
    if crops.folder(sequence) is None:
        reading.skip("label lines of a video without a folder of images", [sequence] * min(lines, 1), count=lines)
        return None
    numbers, names = crops.images(sequence)
    _name_shifted(reading, sequence, numbers, {track: len(of_track.values) for track, of_track in found.items()})
    last = int(numbers[-1]) if len(numbers) else 0
    _skip_frames(
        reading, "label line without an image (no face was detected)", sequence,
        np.setdiff1d(np.arange(1, min(lines, last) + 1), numbers, assume_unique=True),
    )  # fmt: skip
    _skip_frames(reading, "label line behind the last image of its video", sequence, np.arange(last + 1, lines + 1))
    labelled = (numbers >= 1) & (numbers <= lines)
    _skip_frames(reading, "image without a label line", sequence, numbers[~labelled])
    numbers = numbers[labelled]
    at: dict[str, _Labels] = {}
    keep, lost = np.zeros(len(numbers), bool), np.zeros(len(numbers), bool)
    for track, of_track in found.items():
        values = np.zeros((len(numbers), len(of_track.names)), np.float32)
        valid = np.zeros(values.shape, bool)
        inside = numbers <= len(of_track.values)
        values[inside] = of_track.values[numbers[inside] - 1]
        valid[inside] = of_track.valid[numbers[inside] - 1]
        some = valid.any(1)
        if track in masked:
            _skip_frames(
                reading, f"training label of track {track} of a video that validates another", sequence, numbers[some]
            )
            lost |= some
            valid[:] = False
        else:
            keep |= some
        at[track] = _Labels(of_track.names, values, valid)
    _skip_frames(reading, "no label in the selected tracks (-5 or -1)", sequence, numbers[~keep & ~lost])
    chosen = labelled.copy()
    chosen[labelled] = keep
    return _Found(
        numbers[keep],
        names if chosen.all() else [names[k] for k in np.flatnonzero(chosen)],
        {track: _Labels(a.names, a.values[keep], a.valid[keep]) for track, a in at.items()},
    )


def _skip_frames(reading: Reading, reason: str, sequence: str, numbers: np.ndarray) -> None:
    reading.skip(reason, [f"{sequence}/{number:05d}" for number in numbers[:EXAMPLES]], count=len(numbers))


def _table(
    reading: Reading,
    crops: _Crops,
    files: Mapping[str, Mapping[str, tuple[str, str]]],
    held_out: set[str],
    rows: Mapping[str, _Found],
    names: Mapping[str, tuple[str, ...]],
    classes: Sequence[str],
) -> FaceTable:
    """Return the table of all videos' frames; what is the same for a whole video is written out column by column."""
    if not rows:
        reading.table({"image": pa.array([], pa.string())})
    sequences, found = list(rows), list(rows.values())
    counts = np.array([len(each.numbers) for each in found])
    codes = np.repeat(np.arange(len(sequences)), counts)
    columns: dict[str, ColumnLike] = {
        "image": pa.concat_arrays(
            [
                pc.binary_join_element_wise(f"{crops.folder(sequence)}/", pa.array(each.names, pa.string()), "")
                for sequence, each in rows.items()
            ]
        ),
        "sequence": _spread(sequences, codes),
        "video": _spread([_video(sequence) for sequence in sequences], codes),
        "frame": np.concatenate([each.numbers for each in found]).astype(np.int32),
        "part": _spread(["validation" if _video(s) in held_out else "train" for s in sequences], codes),
    }
    for track, of_track in files.items():
        columns[f"part_{track}"] = _spread([of_track.get(sequence, (None,))[0] for sequence in sequences], codes)
    known = {"va": labels.AFFECT_AXES, "expr": ("expression",), "au": names.get("au", ())}
    for track in files:
        width = len(known[track])
        empty = _Labels(known[track], np.zeros((0, width), np.float32), np.zeros((0, width), bool))
        blocks = [each.labels.get(track, empty) for each in found]
        values = np.zeros((len(codes), width), np.float32)
        valid = np.zeros((len(codes), width), bool)
        for block, end, count in zip(blocks, np.cumsum(counts), counts, strict=True):
            if block is not empty:
                values[end - count : end], valid[end - count : end] = block.values, block.valid
        for k, name in enumerate(known[track]):
            if track == "expr":
                columns[name] = _classes(values[:, k], valid[:, k])
            else:
                columns[name] = (np.ascontiguousarray(values[:, k]), valid[:, k])
    places = sorted({path.rsplit("/", 2)[0] for of_track in files.values() for _, path in of_track.values()})
    return reading.table(
        columns,
        label_source=f"annotators of Aff-Wild2 ({', '.join(places)})",
        **_IDENTITY,
        tracks=list(files),
        **({"expressions": list(classes)} if "expr" in files else {}),
    )


def _spread(values: Sequence[str | None], codes: np.ndarray) -> pa.Array:
    return pa.array(values, pa.string()).take(pa.array(codes))


def _classes(index: np.ndarray, valid: np.ndarray) -> pa.Array:
    return pa.array(_ABAW, pa.string()).take(pa.array(index.astype(np.int64), mask=~valid))


# -------------------------------------------------------------------------------------------- multi-task challenges


def _mtl_files(reading: Reading, given: str | Sequence[str] | None, images: Sequence[str]) -> tuple[str, str]:
    """Return the training and the validation file, relative to the root."""
    if given is not None and not isinstance(given, str):
        if len(given) != 2:
            raise ConfigError(f"dataset.mtl={list(given)}: expected two files, for training and validation")
        return str(given[0]), str(given[1])
    places = _places(reading, images) if given is None else [(given, reading.listing(given))]
    found = [
        (os.path.normpath(f"{folder}/{pair[0]}"), os.path.normpath(f"{folder}/{pair[1]}"))
        for folder, names in [*places, *_challenges(reading, places)]
        for pair in MTL_FILES
        if pair[0] in names or pair[1] in names
    ]
    if len(found) > 1:
        raise DataError(
            f"{reading.root} holds labels of several multi-task challenges: {', '.join(a for a, _ in sorted(found))}; "
            "choose one by dataset.mtl=<folder>"
        )
    if not found:
        wanted = " or ".join(f"{train} and {validation}" for train, validation in MTL_FILES)
        where = f" in {given}" if given is not None else ""
        raise DataError(f"{reading.root}: no labels of a multi-task challenge{where}; expected {wanted}")
    return found[0]


def _challenges(reading: Reading, places: Sequence[tuple[str, list[str]]]) -> list[tuple[str, list[str]]]:
    """Return the folders ``MTL_Challenge`` that lie below the deepest folders that were looked into."""
    listed = {folder for folder, _ in places}
    deeper = [os.path.normpath(f"{folder}/MTL_Challenge") for folder, names in places if "MTL_Challenge" in names]
    return [(folder, reading.listing(folder)) for folder in deeper if folder not in listed]


def _mtl_lines(reading: Reading, path: str) -> tuple[pa.Array, np.ndarray]:
    """Return image names ``(N,)`` and the fifteen numbers behind them, float64 ``(N, 15)``.

    Raises:
        DataError: If the header is another or a line has not sixteen fields with numbers behind the first.
    """
    header = reading.header(path)
    if ",".join(header).lower() != _MTL_HEADER:
        raise DataError(f"{reading.root / path}, line 1: expected {_MTL_HEADER}, found {','.join(header)[:80]!r}")
    text = reading.text(path).lstrip("\n ").partition("\n")[2]
    fields = 4 + len(_AUS)
    names = ["image", *(str(k) for k in range(1, fields))]
    kinds = {name: pa.string() if name == "image" else pa.float64() for name in names}
    try:
        # The header names five columns of sixteen: it is not for the parser.
        found = pa_csv.read_csv(
            io.BytesIO(text.encode()),
            read_options=pa_csv.ReadOptions(column_names=names, use_threads=False),
            parse_options=pa_csv.ParseOptions(quote_char=False),
            convert_options=pa_csv.ConvertOptions(column_types=kinds, null_values=[], strings_can_be_null=False),
        )
        images = pc.utf8_trim_whitespace(found["image"]).combine_chunks()
        numbers = np.stack([found[name].to_numpy() for name in names[1:]], 1)
        if np.isfinite(numbers).all():
            return images, numbers
    except pa.ArrowInvalid:
        pass  # Some line is malformed, or there is none: find it.
    rows = []
    for number, line in reading.lines(path)[1:]:
        cells, where = line.split(","), f"{reading.root / path}, line {number}"
        if len(cells) != fields:
            raise DataError(
                f"{where}: {len(cells)} fields, expected {fields} (image, valence, arousal, expression, AUs)"
            )
        rows.append((cells[0].strip(), [number_of(cell, where) for cell in cells[1:]]))
    numbers = np.array([values for _, values in rows], np.float64).reshape(-1, fields - 1)
    return pa.array([image for image, _ in rows], pa.string()), numbers


def _read_mtl(
    reading: Reading, folders: Sequence[str], given: str | Sequence[str] | None, complete_aus: bool
) -> FaceTable:
    """Return the table of the files of a multi-task challenge."""
    crops = _Crops(reading, folders)
    outside: list[str] = []
    files = _mtl_files(reading, given, folders)
    listed = [_listed(reading, path, outside) for path in files]
    tested = {_video(sequence) for sequence in listed[1][1].cast(pa.string()).unique().to_pylist()}
    pieces = []
    for (frames, sequences, values, valid), part in zip(listed, ("train", "validation"), strict=True):
        keep = np.ones(len(frames), bool)
        encoded = sequences.dictionary_encode()
        folder_names = encoded.dictionary.to_pylist()
        codes = encoded.indices.to_numpy()
        if part == "train":
            leaking = np.array([_video(name) in tested for name in folder_names], bool)[codes]
            _skip_rows(reading, "training frame of a video that validates", folder_names, codes, frames, leaking)
            keep &= ~leaking
        names = np.full(len(frames), None, object)
        order = np.argsort(codes, kind="stable")
        for code, rows in enumerate(np.split(order, np.cumsum(np.bincount(codes, minlength=len(folder_names)))[:-1])):
            numbers, stored = crops.images(folder_names[code])
            at = np.searchsorted(numbers, frames[rows])
            there = at < len(numbers)
            there[there] = numbers[at[there]] == frames[rows][there]
            prefix = crops.folder(folder_names[code])
            names[rows[there]] = [f"{prefix}/{stored[k]}" for k in at[there]]
        missing = pa.array(names, pa.string()).is_null().to_numpy(zero_copy_only=False)
        _skip_rows(reading, "image is missing", folder_names, codes, frames, missing & keep)
        keep &= ~missing
        if complete_aus:
            valid[:, 3:] &= valid[:, 3:].all(1, keepdims=True)
        empty = ~valid.any(1)
        _skip_rows(reading, "no label (-5 or -1)", folder_names, codes, frames, empty & keep)
        keep &= ~empty
        pieces.append((part, names[keep], np.array(folder_names, object)[codes[keep]], frames[keep],
                       values[keep], valid[keep]))  # fmt: skip
    _note_outside(reading, outside)
    values, valid = np.concatenate([p[4] for p in pieces]), np.concatenate([p[5] for p in pieces])
    sequences = pa.array(np.concatenate([p[2] for p in pieces]), pa.string())
    columns: dict[str, ColumnLike] = {
        "image": pa.array(np.concatenate([p[1] for p in pieces]), pa.string()),
        "sequence": sequences,
        "video": pc.replace_substring_regex(sequences, _PERSON.pattern, ""),
        "frame": np.concatenate([p[3] for p in pieces]).astype(np.int32),
        "part": pa.array(["train", "validation"]).take(pa.array(np.repeat([0, 1], [len(p[1]) for p in pieces]))),
        "expression": _classes(values[:, 2], valid[:, 2]),
    }
    for k, axis in enumerate(labels.AFFECT_AXES):
        columns[axis] = (np.ascontiguousarray(values[:, k]), valid[:, k])
    for k, number in enumerate(_AUS):
        columns[labels.occurrence_column(number)] = (np.ascontiguousarray(values[:, 3 + k]), valid[:, 3 + k])
    return reading.table(
        columns,
        label_source=f"annotators of Aff-Wild2 ({' and '.join(files)})",
        **_IDENTITY,
        tracks=["mtl"],
        expressions=list(_ABAW),
    )


def _listed(reading: Reading, path: str, outside: list[str]) -> tuple[np.ndarray, pa.Array, np.ndarray, np.ndarray]:
    """Return frames ``(N,)``, sequences ``(N,)``, values and validity ``(N, 15)`` of a multi-task file.

    Raises:
        DataError: With the first line whose image or label is none, or whose image was listed before.
    """
    images, numbers = _mtl_lines(reading, path)
    pattern = r"^(?P<sequence>[^/]+)/(?P<number>\d{1,9})\.(?:jpe?g|png)$"
    split = pc.extract_regex(images, pattern)
    named = split.is_valid().to_numpy(zero_copy_only=False)
    reading.require(path, named, "an image like 46-30-484x360/00112.jpg first", skip=1)
    sequences, frames = split.field("sequence"), split.field("number").cast(pa.int64()).to_numpy()
    codes = sequences.dictionary_encode().indices.to_numpy(zero_copy_only=False).astype(np.int64)
    first = np.zeros(len(frames), bool)
    first[np.unique(np.stack([codes, frames], 1), axis=0, return_index=True)[1]] = True
    reading.require(path, first, "each image once", skip=1)
    expression, aus = numbers[:, 2], numbers[:, 3:]
    reading.require(
        path,
        np.isin(expression, np.arange(-1, len(_ABAW))),
        f"a class from 0 to {len(_ABAW) - 1}, or -1, as fourth",
        skip=1,
    )
    reading.require(path, _coded(aus), "0, 1 or -1 for each action unit", skip=1)
    known, odd = _inside(numbers[:, :2])
    if odd.any():
        lines = reading.lines(path)[1:]
        outside += [f"{path}, line {lines[k][0]}" for k in np.flatnonzero(odd)]
    valid = np.concatenate([np.repeat(known[:, None], 2, 1), numbers[:, 2:] >= 0], 1)
    return frames, sequences, numbers.astype(np.float32), valid


def _skip_rows(
    reading: Reading, reason: str, sequences: Sequence[str], codes: np.ndarray, frames: np.ndarray, left_out: np.ndarray
) -> None:
    at = np.flatnonzero(left_out)
    examples = [f"{sequences[codes[k]]}/{frames[k]:05d}" for k in at[:EXAMPLES]]
    reading.skip(reason, examples, count=len(at))


# ------------------------------------------------------------------------------------------------------ writing


def write(table: FaceTable, root: str | Path, images: ImageReader | None = None, challenge: int | None = None) -> None:
    """Write crops and labels as they are delivered.

    Args:
        table: Table with the columns that ``read`` gives; without a column ``part_<track>`` multi-task files are
            written.
        root: Folder to write to.
        images: Reader of the rows' pictures; None takes the table's own files.
        challenge: Number of the ABAW challenge whose names of folders and files are taken; None is 6, and 7 for
            multi-task files.

    Raises:
        ConfigError: If the challenge had no such labels.
    """
    root = Path(root)
    write_images(table, root, FileImages(table) if images is None else images)
    tracks = [track for track in TRACKS if f"part_{track}" in table.names]
    if not tracks:
        _write_mtl(table, root, 7 if challenge is None else challenge)
        return
    challenge = 6 if challenge is None else challenge
    if challenge in (4, 7):
        raise ConfigError(f"affwild2: challenge {challenge} had the track mtl only")
    old = challenge <= 2
    expr = "EXPR_Set" if old else FOLDERS["expr"][1 if challenge <= 5 else 0]
    folders = {"va": FOLDERS["va"][old], "expr": expr, "au": FOLDERS["au"][old]}
    codes, sequences = table.codes("sequence")
    frames = table.numbers("frame")[0].astype(np.int64)
    for track in tracks:
        header, cells = _cells(table, track)
        parts, known = table.strings(f"part_{track}")
        for code, sequence in enumerate(sequences):
            rows = np.flatnonzero((codes == code) & known)
            if not len(rows):
                continue
            name = {"train": _PARTS["train"][old], "validation": "Validation_Set"}[parts[rows[0]]]
            blank = {"va": "-5,-5", "expr": "-1", "au": ",".join(["-1"] * (header.count(",") + 1))}[track]
            lines = [blank] * int(frames[codes == code].max())  # a line per frame of the video in every track
            for row in rows:
                lines[frames[row] - 1] = cells[row]
            folder = root / _parent(challenge) / folders[track] / name
            write_lines(folder / f"{sequence}.txt", [header, *lines])


def _parent(challenge: int) -> str:
    if challenge <= 2:
        return "annotations"
    return "Third ABAW Annotations" if challenge == 3 else f"{challenge}th ABAW Annotations"


def _cells(table: FaceTable, track: str) -> tuple[str, list[str]]:
    """Return the header of a track's files and each row's line."""
    if track == "va":
        pairs = [table.numbers(axis) for axis in labels.AFFECT_AXES]
        columns = [[f"{v:.6g}" if known else "-5" for v, known in zip(*pair, strict=True)] for pair in pairs]
        return "valence,arousal", [",".join(cells) for cells in zip(*columns, strict=True)]
    if track == "expr":
        classes = table.expressions
        index = {name: str(k) for k, name in enumerate(classes)}
        names, known = table.strings("expression")
        header = ",".join(name.title() for name in classes)
        return header, [index[name] if there else "-1" for name, there in zip(names, known, strict=True)]
    numbers = sorted(int(name[2:4]) for name in table.names if re.fullmatch(r"au\d\d_occurrence", name))
    pairs = [table.numbers(labels.occurrence_column(number)) for number in numbers]
    columns = [[f"{v:.0f}" if known else "-1" for v, known in zip(*pair, strict=True)] for pair in pairs]
    header = ",".join(labels.au_output(number) for number in numbers)
    return header, [",".join(cells) for cells in zip(*columns, strict=True)]


def _write_mtl(table: FaceTable, root: Path, challenge: int) -> None:
    if challenge not in (3, 4, 7):
        raise ConfigError(f"affwild2: challenge {challenge} had no track mtl; 3, 4 and 7 had")
    old = challenge == 3
    folder = root / _parent(3) / "MTL_Challenge" if old else root
    parts = table.strings("part")[0]
    cells = [_cells(table, track)[1] for track in TRACKS]
    sequences, frames = table.strings("sequence")[0], table.numbers("frame")[0].astype(np.int64)
    for part, name in zip(("train", "validation"), MTL_FILES[old], strict=True):
        lines = [
            ",".join([f"{sequences[row]}/{frames[row]:05d}.jpg", *(column[row] for column in cells)])
            for row in np.flatnonzero(parts == part)
        ]
        write_lines(folder / name, [_MTL_HEADER, *lines])


# ------------------------------------------------------------------------------------------- built-in faces


def dress(
    faces: FaceTable, tracks: str | Sequence[str] = TRACKS, aus: str = "affwild2", expressions: str = "abaw"
) -> Dressed:
    """Return built-in faces as frames of Aff-Wild2.

    Each drawn person is a video of their own, but the first two, who share one as ``_left`` and ``_right``. Of several
    tracks, some videos have no file in one. Frames have gaps. Contempt, which Aff-Wild2 does not have, is ``other``.

    Args:
        faces: Built-in faces.
        tracks: As in ``read``.
        aus: Action units, a set of ``labels.AU_SETS``: ``affwild2``, or ``affwild2_abaw1``.
        expressions: Classes, one of ``labels.EXPRESSION_ORDERS``: ``abaw``, or ``abaw7`` for ABAW 1 and 2.
    """
    chosen = _chosen(tracks)
    person = faces.codes("subject")[0]
    group = np.maximum(person - 1, 0)
    ending = np.where(person == 0, "_left", np.where(person == 1, "_right", ""))
    video = np.array([f"{g + 1}-{30 - g % 2 * 6}-{1280 - 320 * (g % 3)}x720" for g in group.tolist()])
    sequence = np.char.add(video, ending)
    order = np.argsort(sequence, kind="stable")
    starts = np.searchsorted(sequence[order], sequence[order])
    place = np.empty(len(faces), np.int64)
    place[order] = np.arange(len(faces)) - starts
    frame = 1 + place + place // 3
    part = np.where(group % 3 == 2, "validation", "train")
    several = len(chosen) > 1
    member = {
        "va": ~((group % 5 == 3) & several),
        "expr": ~((group % 5 == 4) & several),
        "au": np.ones(len(faces), bool),
        "mtl": np.ones(len(faces), bool),
    }
    columns: dict[str, ColumnLike] = {}
    some = np.zeros(len(faces), bool)
    everything = chosen == ("mtl",)
    if everything or "va" in chosen:
        pairs = [faces.numbers(axis) for axis in labels.AFFECT_AXES]
        known = pairs[0][1] & pairs[1][1] & member["va"]
        for axis, (values, _) in zip(labels.AFFECT_AXES, pairs, strict=True):
            columns[axis] = (np.round(values, 3), known)
        some |= known
    if everything or "expr" in chosen:
        classes = labels.EXPRESSION_ORDERS[expressions]
        names, known = faces.strings("expression")
        names = np.where(names == labels.CONTEMPT, labels.OTHER, names)
        known = known & member["expr"] & np.isin(names.astype(str), classes)
        columns["expression"] = pa.array(names, pa.string(), mask=~known)
        some |= known
    if everything or "au" in chosen:
        for number in labels.AU_SETS[aus]:
            values, known = faces.numbers(labels.occurrence_column(number))
            columns[labels.occurrence_column(number)] = (np.round(values), known)
            some |= known
    columns.update({
        "image": np.array([f"{CROPS[0]}/{s}/{k:05d}.jpg" for s, k in zip(sequence, frame, strict=True)], object),
        "sequence": sequence.astype(object),
        "video": video.astype(object),
        "frame": frame.astype(np.int32),
        "part": part.astype(object),
    })  # fmt: skip
    if not everything:
        for track in chosen:
            columns[f"part_{track}"] = pa.array(part.astype(object), pa.string(), mask=~member[track])
    metadata = {"dataset": DATASET, "label_source": "parameters of drawn faces; never a result on people", **_IDENTITY}
    table = FaceTable.from_columns(columns, ".", metadata)
    if "expression" in columns:
        table = table.with_metadata(expressions=list(labels.EXPRESSION_ORDERS[expressions]))
    keys = (frame, sequence, part) if everything else (frame, sequence)
    rows = np.lexsort(keys)
    rows = rows[some[rows]]
    return Dressed(table.take(rows), rows)


# ------------------------------------------------------------------------------------------------- published counts


def expected(
    tracks: str | Sequence[str] = TRACKS,
    crops: str | Sequence[str] = CROPS,
    challenge: int | None = None,
) -> tuple[Expected, ...]:
    """Return what Aff-Wild2 should contain.

    Args:
        tracks: As in ``read``. Of several tracks, only counts of validation labels hold, because a video that
            validates in one does not train in another.
        crops: As in ``read``.
        challenge: Number of the ABAW challenge that the labels are of; None is any from 3 on. Of the first two no
            counts are known.
    """
    chosen = _chosen(tracks)
    folders = (crops,) if isinstance(crops, str) else tuple(crops)
    found: list[Expected] = []
    if all(Path(folder).name.startswith("cropped_aligned") for folder in folders):
        found.append(Expected("size", (112, 112), "public readers of cropped_aligned"))
    if challenge in (1, 2):
        return tuple(found)
    alone = len(chosen) == 1
    notebooks = "notebooks of EmotiEffLib"
    if chosen == ("mtl",):
        # What they count as usable is not known: a frame with some label, or with all.
        usable = f"usable frames of ABAW 7, {notebooks}; ABAW 3 has about 142,300 and 26,880"
        found.append(Expected("rows/part=train", 142_333, usable, found=False))
        found.append(Expected("rows/part=validation", 26_876, usable, found=False))
    if "expr" in chosen:
        source = f"valid frames with an image, {notebooks}"
        if alone:
            found.append(Expected("labelled/expression/part_expr=train", 585_317, source))
        found.append(Expected("labelled/expression/part_expr=validation", 280_532, source))
    if "au" in chosen:
        # Whether frames with a part of the action units count is not known.
        source = f"valid frames with an image, {notebooks}; whether with all or with some action units is not known"
        if alone:
            found.append(Expected("labelled/au01_occurrence/part_au=train", 1_356_694, source, found=False))
        found.append(Expected("labelled/au01_occurrence/part_au=validation", 445_836, source, found=False))
    videos = {"va": {"train": 356, "validation": 76}, "expr": {"train": 248, "validation": 70},
              "au": {"train": 295, "validation": 105}}  # fmt: skip
    earlier = {"va": {"train": 341, "validation": 74}}
    for track, counts in videos.items():
        for part, count in counts.items():
            if track not in chosen or (part == "train" and not alone):
                continue
            before = earlier.get(track, {}).get(part, count)
            third = challenge == 3
            variants = {} if before == count or challenge is not None else {before: "ABAW 3"}
            source = f"videos of track {track}, recalled from the overview papers of ABAW {'3' if third else '5 to 8'}"
            key = f"distinct/sequence/part_{track}={part}"
            found.append(Expected(key, before if third else count, source, found=False, variants=variants))
    return tuple(found)
