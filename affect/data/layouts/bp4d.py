# SPDX-License-Identifier: Apache-2.0
"""BP4D-Spontaneous: 41 people in eight tasks, action units coded frame by frame.

X. Zhang, L. Yin, J. Cohn, S. Canavan, M. Reale, A. Horowitz, P. Liu, J. Girard: BP4D-Spontaneous: a high-resolution
spontaneous 3D dynamic facial expression database. Image and Vision Computing 32 (2014). Binghamton University gives
the data to researchers under a licence: http://www.cs.binghamton.edu/~lijun/Research/3DFE/3DFE_Analysis.html

Layout on disk::

    BP4D/
    ├── 2D+3D/F001/T1/2440.jpg                  images; also BP4D-training/F001/T1/… or F001/T1/… without this level
    ├── AUCoding/AU_OCC/F001_T1.csv             occurrence; in the release of FERA 2015 directly in AUCoding/
    ├── AUCoding/AU_INT/AU06/F001_T1_AU06.csv   intensity of AU 6 10 12 14 17, lines frame,intensity, no header;
    │                                           of FERA 2015 in AU Intensity Codes3.0/AU06/
    └── 2DFeatures/F001_T1.mat                  49 tracked points, struct array `fit` with `pred` (recalled)

An occurrence file has one line per coded frame behind a header of column numbers, ``0,1,2,…,99``: 0 is the frame, 99
tells whether the face is occluded, the others are action units. Cells are 0, 1, or 9 where nobody coded.

Counted in public lists (the lists of ME-GraphAU, JAA-Net and FG-Net agree): files, frames, parts. What is easy to get
wrong:

- The zero padding of image names differs between copies (``0643.jpg``, ``643.jpg``): images are found by number.
- About 20 s of each task are coded. The other images have no label; they are no rows, and no negatives.
- All eight tasks of everybody are coded: one with images but without an occurrence file is named, and so are files of
  intensities that lack frames.
- A missing label is null in its own cell. ``complete_frames`` drops whole frames as many public readers do.
- The third fold of one code base is the first of another: parts are named P1, P2, P3 and folds by the part that tests.
- There is no validation part: groups of the training parts select.

Columns: ``image``, ``subject`` (F001), ``sequence`` (F001_T1), ``part``, ``frame``, ``auNN_occurrence`` (the 12 of the
benchmark and all others that are coded), ``auNN_intensity``, ``attribute_occluded``, ``landmarks_49``.
"""

from __future__ import annotations

import re
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from types import MappingProxyType

import numpy as np

from affect import labels
from affect.data.expected import Expected
from affect.data.images import FileImages, ImageReader
from affect.data.layouts import facs
from affect.data.layouts.common import Dressed, Reading, write_images
from affect.data.table import FaceTable
from affect.errors import ConfigError, DataError, near

__all__ = ["PARTS", "dress", "expected", "read", "write"]

PARTS = MappingProxyType(
    {
        "P1": facs.people("F001 F002 F008 F009 F010 F016 F018 F023 M001 M004 M007 M008 M012 M014"),
        "P2": facs.people("F003 F005 F011 F013 F020 F022 M002 M005 M010 M011 M013 M016 M017 M018"),
        "P3": facs.people("F004 F006 F007 F012 F014 F015 F017 F019 F021 M003 M006 M009 M015"),
    }
)
"""People of the three parts of the literature, the same in ME-GraphAU, JAA-Net, FG-Net and FMAE."""

SUBJECTS = tuple(sorted(facs.part_of(PARTS)))
FERA2015 = MappingProxyType(
    {
        "train": tuple(name for name in SUBJECTS if int(name[1:]) % 2 == 1),
        "dev": tuple(name for name in SUBJECTS if int(name[1:]) % 2 == 0),
    }
)
"""People of the challenge FERA 2015: odd numbers train, even numbers are its development part."""

DIVISIONS: Mapping[str, Mapping[str, tuple[str, ...]]] = MappingProxyType({"literature": PARTS, "fera2015": FERA2015})
BENCHMARK = labels.AU_SETS["bp4d"]
TASKS = 8

_IMAGE_FOLDERS = ("2D+3D/", "BP4D-training/", "")
_INTENSITY_FOLDERS = ("AUCoding/AU_INT", "AU Intensity Codes3.0")
_INTENSITY = re.compile(r"([FM]\d{3})_T0*(\d+)(?:_.*)?\.csv", re.IGNORECASE)
_CODED = re.compile(r"([FM]\d{3})_T0*(\d+)\.csv", re.IGNORECASE)
_ALSO_CODED = (5, 9, 20)
"""Action units beyond the benchmark that the built-in faces and the occurrence files both have."""

_FIRST_FRAMES = (37, 1)
"""First coded frames of dressed sequences, in turn."""


def read(
    root: str | Path,
    parts: str = "literature",
    points: bool = True,
    drop_occluded: bool = False,
    complete_frames: bool = False,
) -> FaceTable:
    """Return the coded frames of BP4D.

    Args:
        root: Folder that holds ``AUCoding``.
        parts: ``literature`` (P1, P2, P3) or ``fera2015`` (train, dev).
        points: Read the tracked points where ``2DFeatures`` is there.
        drop_occluded: Leave out frames that are marked as occluded.
        complete_frames: Leave out frames in which an action unit of the benchmark is not coded.

    Raises:
        DataError: If the root is not that of BP4D, or a file is not as described above.
        ConfigError: If ``parts`` is unknown.
    """
    if parts not in DIVISIONS:
        raise ConfigError(f"parts={parts}: {near(parts, DIVISIONS)}")
    part_of = facs.part_of(DIVISIONS[parts])
    reading = Reading(root, "bp4d", holds=("AUCoding",))
    folder, files = occurrence_files(reading)
    intensities = intensity_files(reading)
    base = _image_folder(reading)
    sequences = facs.Sequences()
    for subject, task, name in files:
        if subject not in part_of:
            raise DataError(
                f"{reading.root / folder / name}: {subject} is nobody of BP4D (F001 to F023, M001 to M018); "
                "people beyond that are in BP4D+ (dataset=bp4dplus)"
            )
        sequence = f"{subject}_T{task}"
        frames, cells = facs.read_occurrence(reading, f"{folder}/{name}")
        cells |= read_intensities(reading, intensities, sequence, frames)
        images = f"{base}{subject}/T{task}"
        numbered = reading.numbered(images)
        tracked = tracked_file(reading, sequence) if points else None
        if tracked is not None:
            cells[facs.POINTS] = facs.read_tracked(reading, tracked, frames, numbered)
        keep = coded_frames(reading, sequence, frames, cells, drop_occluded, complete_frames)
        frames, cells = frames[keep], facs.chosen(cells, keep)
        there, names = facs.pick_images(reading, frames, numbered, images)
        sequences.add(
            frames[there],
            [f"{images}/{image}" for image in names],
            facs.chosen(cells, there),
            {"subject": subject, "sequence": sequence, "part": part_of[subject]},
        )
    have = {(subject, task) for subject, task, _ in files}
    others = [(s, t) for s in SUBJECTS for t in range(1, TASKS + 1) if (s, t) not in have]
    name_uncoded(reading, intensities, ((f"{s}_T{t}", bool(reading.numbered(f"{base}{s}/T{t}"))) for s, t in others))
    return reading.table(
        sequences.columns(map(labels.occurrence_column, BENCHMARK)), label_source=facs.LABEL_SOURCE, people="bp4d"
    )


def occurrence_files(reading: Reading) -> tuple[str, list[tuple[str, int, str]]]:
    """Return their folder and (subject, task, file name), sorted."""
    for folder in ("AUCoding/AU_OCC", "AUCoding"):
        matches = [_CODED.fullmatch(name) for name in reading.listing(folder)]
        found = sorted((match[1].upper(), int(match[2]), match[0]) for match in matches if match)
        if found:
            return folder, found
    raise DataError(f"{reading.root}: no occurrence files; expected AUCoding/AU_OCC/F001_T1.csv and so on")


def _image_folder(reading: Reading) -> str:
    """Return the first folder that holds a person: an empty one may be left over from unpacking."""
    held = (name for name in _IMAGE_FOLDERS if not set(SUBJECTS).isdisjoint(reading.listing(name)))
    return next(held, _IMAGE_FOLDERS[0])


def intensity_files(reading: Reading) -> dict[int, dict[str, str]]:
    """Return the intensity files by action unit and sequence."""
    found: dict[int, dict[str, str]] = {}
    for above in _INTENSITY_FOLDERS:
        for folder in reading.listing(above):
            unit = re.fullmatch(r"AU0*(\d+)", folder, re.IGNORECASE)
            if unit is None or int(unit[1]) not in labels.AU_NAMES:
                continue
            matches = [_INTENSITY.fullmatch(name) for name in reading.listing(f"{above}/{folder}")]
            files = {f"{m[1].upper()}_T{int(m[2])}": f"{above}/{folder}/{m[0]}" for m in matches if m}
            if files:
                found.setdefault(int(unit[1]), files)
    return found


def read_intensities(
    reading: Reading,
    files: Mapping[int, Mapping[str, str]],
    sequence: str,
    frames: np.ndarray,
    missing: Sequence[int] = (facs.NOT_CODED,),
) -> dict[str, facs.Cells]:
    """Return the intensities of a sequence by column; what has no file is noted."""
    cells = {}
    for au, paths in files.items():
        if sequence in paths:
            cells[labels.intensity_column(au)] = facs.read_intensity(reading, paths[sequence], frames, missing)[1]
        else:
            reading.name(f"sequences have no file of AU{au}'s intensity, which is missing there", sequence)
    return cells


def name_uncoded(
    reading: Reading,
    intensities: Mapping[int, Mapping[str, str]],
    uncoded: Iterable[tuple[str, bool]],
) -> None:
    """Note the sequences that lack an occurrence file although other files say that they were coded.

    Args:
        reading: The pass.
        intensities: Intensity files by action unit and sequence.
        uncoded: Sequences without an occurrence file, and whether images of it are there.
    """
    coded = set().union(*intensities.values())
    for sequence, images in uncoded:
        if images or sequence in coded:
            reading.name("coded tasks with images or intensities have no occurrence file, and no rows", sequence)


def tracked_file(reading: Reading, sequence: str) -> str | None:
    """Return the file of tracked points of a sequence; None, with a note, if only others have one."""
    if not reading.touch(reading.root / "2DFeatures").is_dir():
        return None
    path = f"2DFeatures/{sequence}.mat"
    if reading.touch(reading.root / path).is_file():
        return path
    reading.note("2DFeatures lacks files of some sequences, whose points are missing")
    return None


def coded_frames(
    reading: Reading,
    sequence: str,
    frames: np.ndarray,
    cells: Mapping[str, facs.Cells],
    drop_occluded: bool,
    complete_frames: bool,
) -> np.ndarray:
    """Return which frames stay, bool ``(N,)``; the others are counted."""
    keep = np.ones(len(frames), bool)
    if drop_occluded and facs.OCCLUDED in cells:
        values, valid = cells[facs.OCCLUDED]
        keep &= ~(valid & (values == 1))
        reading.skip("occluded (drop_occluded)", (f"{sequence} frame {frame}" for frame in frames[~keep].tolist()))
    if complete_frames:
        nowhere = np.zeros(len(frames), bool)
        columns = [cells.get(labels.occurrence_column(au), (nowhere, nowhere)) for au in BENCHMARK]
        complete = np.stack([valid for _, valid in columns]).all(0)
        gone = frames[keep & ~complete].tolist()
        reading.skip("not all 12 action units coded (complete_frames)", (f"{sequence} frame {f}" for f in gone))
        keep &= complete
    return keep


# ------------------------------------------------------------------------------------------------------ writing


def write(table: FaceTable, root: str | Path, images: ImageReader | None = None) -> None:
    """Write a table as BP4D is delivered.

    Args:
        table: With the columns that ``read`` gives.
        root: Folder of the new tree.
        images: Reader of the rows' pixels; None reads the files that the table names.
    """
    root = Path(root)
    facs.write_coding(table, root, range(1, 100))
    write_images(table, root, images or FileImages(table))


def dress(faces: FaceTable) -> Dressed:
    """Return built-in faces under the names of BP4D, with the labels that it has."""
    people = facs.interleaved(PARTS)
    person, scene, place = facs.cast(faces, people, TASKS, length=6)
    task = scene + 1
    frame = place + np.array(_FIRST_FRAMES)[scene % 2]
    subject = np.array(people, object)[person]
    rows = np.lexsort((frame, task, subject.astype(str)))
    part_of = facs.part_of(PARTS)
    names = [(subject[row], int(task[row]), int(frame[row])) for row in rows]
    drawn = faces.take(rows)
    columns = {
        # Copies of the set pad numbers differently, so one task of a dressed tree does too.
        "image": [f"2D+3D/{s}/T{t}/{f:0{4 if t == 1 else 1}d}.jpg" for s, t, f in names],
        "subject": [s for s, _, _ in names],
        "sequence": [f"{s}_T{t}" for s, t, _ in names],
        "part": [part_of[s] for s, _, _ in names],
        "frame": frame[rows].astype(np.int32),
        **dressed_labels(drawn),
    }
    return Dressed(FaceTable.from_columns(columns, ".", {"dataset": "bp4d", "label_source": facs.LABEL_SOURCE}), rows)


def dressed_labels(drawn: FaceTable) -> dict[str, facs.Cells]:
    """Return the labels of built-in faces that BP4D and BP4D+ have, by column."""
    columns = {}
    for au in sorted((*BENCHMARK, *_ALSO_CODED)):
        values, valid = drawn.numbers(labels.occurrence_column(au))
        columns[labels.occurrence_column(au)] = np.rint(values), valid
    for au in labels.AU_SETS["bp4d_intensity"]:
        columns[labels.intensity_column(au)] = facs.whole_intensity(drawn, au)
    columns[facs.OCCLUDED] = drawn.numbers(facs.OCCLUDED)
    columns[facs.POINTS] = facs.points_49(drawn)
    return columns


# ----------------------------------------------------------------------------------------------------- expected

_COUNTS = {
    **{"F001": 3934, "F002": 3937, "F003": 3700, "F004": 3737, "F005": 3915, "F006": 3576, "F007": 3573, "F008": 3695},
    **{"F009": 3297, "F010": 3266, "F011": 3732, "F012": 3543, "F013": 3434, "F014": 3490, "F015": 3451, "F016": 3510},
    **{"F017": 3823, "F018": 3525, "F019": 3489, "F020": 3646, "F021": 3447, "F022": 3593, "F023": 3726, "M001": 4153},
    **{"M002": 3833, "M003": 3379, "M004": 3521, "M005": 3271, "M006": 3572, "M007": 3684, "M008": 3291, "M009": 3290},
    **{"M010": 3298, "M011": 3469, "M012": 3609, "M013": 3613, "M014": 3483, "M015": 3664, "M016": 3648, "M017": 3542},
    "M018": 3488,
}
"""Coded frames per person, counted in the lists of ME-GraphAU."""

_WITHOUT_POINTS = {"F017": 131, "M003": 78, "F023": 30, "M010": 16, "M009": 11, "F021": 5}
"""Frames per person that JAA-Net leaves out because nothing was tracked in them."""

_RATES = (0.211, 0.170, 0.203, 0.461, 0.549, 0.594, 0.562, 0.466, 0.169, 0.344, 0.165, 0.152)
_GRAPHAU = "counted in the lists of ME-GraphAU (github.com/CVI-SZU/ME-GraphAU)"
_JAANET = "JAA-Net's lists, which leave out frames without tracked points"
_FGNET = "FG-Net's lists"


def expected(
    parts: str = "literature", drop_occluded: bool = False, complete_frames: bool = False
) -> tuple[Expected, ...]:
    """Return what BP4D should contain under the options of ``read``."""
    division = DIVISIONS[parts]
    found = [
        Expected("distinct/subject", 41, _GRAPHAU),
        Expected("distinct/sequence", 328, _GRAPHAU),
        Expected("size", (1040, 1392), "recalled from the paper", found=False),
    ]
    # Every coded frame is complete over the benchmark's action units: leaving out incomplete ones changes no count.
    if not drop_occluded:
        found.append(_counted("rows", SUBJECTS, {146423: _FGNET}))
        found += [_counted(f"rows/part={part}", people) for part, people in division.items()]
        found += [_counted(f"rows/subject={subject}", (subject,)) for subject in SUBJECTS]
    source = "counted in the lists of FG-Net (github.com/ihp-lab/FG-Net), rounded"
    columns = map(labels.occurrence_column, BENCHMARK)
    found += [Expected(f"rate/{column}", rate, source) for column, rate in zip(columns, _RATES, strict=True)]
    return tuple(found)


def _counted(key: str, people: tuple[str, ...], also: Mapping[int, str] | None = None) -> Expected:
    whole = sum(_COUNTS[name] for name in people)
    lost = sum(_WITHOUT_POINTS.get(name, 0) for name in people)
    variants = {whole - lost: _JAANET} if lost else {}
    return Expected(key, whole, _GRAPHAU, variants={**variants, **(also or {})})
