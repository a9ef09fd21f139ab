# SPDX-License-Identifier: Apache-2.0
"""BP4D+: 140 people in ten tasks, four of which are coded in action units frame by frame.

Z. Zhang, J. Girard, Y. Wu, X. Zhang, P. Liu, U. Ciftci, S. Canavan, M. Reale, A. Horowitz, H. Yang, J. Cohn, Q. Ji,
L. Yin: Multimodal spontaneous emotion corpus for human behavior analysis. CVPR 2016. Binghamton University gives the
data to researchers under a licence: http://www.cs.binghamton.edu/~lijun/Research/3DFE/3DFE_Analysis.html

Layout on disk::

    BP4D+/
    ├── 2D+3D/F001.zip                          holds F001/T1/1.jpg; read without unpacking
    │   or F001/T1/1.jpg                        unpacked, also beside zips of other people
    ├── AUCoding/AU_OCC/F001_T1.csv             occurrence, a header and 34 action units
    ├── AUCoding/AU_INT/AU06/F001_T1_AU06.csv   intensity of AU 6 10 12 14 17, lines frame,intensity, no header
    └── 2DFeatures/F001_T1.mat                  49 tracked points, struct array `fit` with `pred` (recalled)

The files are those of BP4D (``affect.data.layouts.bp4d``) with fewer columns. Read in a public loader (rPPG-Toolbox):
folders, columns, tasks and the two bad items below; in FMAE-IAT: folds and the code 999. What is easy to get wrong:

- Only T1, T6, T7 and T8 are coded. Label files of other tasks are left out and counted.
- 9 and 999 are cells that nobody coded; frames outside the coded segment are no rows.
- F041/T7 has another number of frames than of labels: left out and counted. F082 lacks data: what is there is read,
  labels without an image are counted.
- F001 of BP4D is another person than F001 here.

Columns: ``image`` (``2D+3D/F001.zip!F001/T1/1.jpg`` inside a zip), ``subject``, ``sequence`` (F001_T1), ``part``
(fold1 … fold4), ``frame``, ``auNN_occurrence``, ``auNN_intensity``, ``landmarks_49``.
"""

from __future__ import annotations

import zipfile
from collections.abc import Mapping
from pathlib import Path, PurePosixPath
from types import MappingProxyType
from typing import NamedTuple

import numpy as np

from affect import labels
from affect.data.archives import SEPARATOR, ZipImages, split_member
from affect.data.expected import Expected
from affect.data.images import ImageReader
from affect.data.layouts import bp4d, facs
from affect.data.layouts.common import Dressed, Reading, by_number, pictures, write_images
from affect.data.table import FaceTable
from affect.errors import DataError

__all__ = ["FOLDS", "dress", "expected", "images", "read", "write"]

FOLDS = MappingProxyType(
    {
        "fold1": facs.people(
            "M040 F072 M015 M029 M003 F076 F053 F026 F044 F066 F057 F061 F071 M050 M033 F079 F020 M025 F014 F004 F013 "
            "M017 F033 M042 M004 F038 F019 M036 M026 M048 F039 F046 M051 F047 M020"
        ),
        "fold2": facs.people(
            "F074 F012 F034 M001 F056 F075 M009 M038 F024 M047 F016 M045 M034 M022 F060 M011 M044 M046 M005 M028 F077 "
            "F028 M055 M019 F032 F030 M037 M043 F031 F022 M023 M018 M016 F065 M052"
        ),
        "fold3": facs.people(
            "F029 F054 F064 F045 F009 F040 F008 M041 F063 M056 M024 F001 F080 M010 F062 F035 M054 F052 F027 F043 F042 "
            "F050 M057 F078 F058 F017 M035 M030 M027 F021 M031 F069 F002 M008 F068"
        ),
        "fold4": facs.people(
            "M058 F037 F010 F023 M007 M002 F025 F073 F048 F041 F051 F011 M032 F005 M021 F018 M013 M049 M014 F070 F006 "
            "F067 M039 M006 F059 F003 F007 F049 M053 F081 F055 M012 F082 F015 F036"
        ),
    }
)
"""People of the four folds of FMAE, which are disjoint and hold everybody."""

SUBJECTS = tuple(sorted(facs.part_of(FOLDS)))
TASKS = (1, 6, 7, 8)
"""Tasks that are coded."""

UNITS = (
    *(1, 2, 4, 5, 6, 7, 9, 10, 11, 12, 13, 14, 15, 16, 17, 18, 19, 20, 22, 23, 24),
    *(27, 28, 29, 30, 31, 32, 33, 34, 35, 36, 37, 38, 39),
)
"""Action units of the occurrence files, in their order."""

MISSING = (facs.NOT_CODED, 999)
BAD = MappingProxyType({"F041_T7": "F041/T7 is known to have another number of frames than of labels"})
"""Sequences that are left out, and why."""

_FOLDER = "2D+3D"
_TASK_NAMES = {**{f"T{task}": task for task in TASKS}, **{f"T{task:02d}": task for task in TASKS}}


def read(root: str | Path, points: bool = True, complete_frames: bool = False) -> FaceTable:
    """Return the coded frames of BP4D+.

    Args:
        root: Folder that holds ``AUCoding``.
        points: Read the tracked points where ``2DFeatures`` is there.
        complete_frames: Leave out frames in which an action unit of BP4D's benchmark is not coded.

    Raises:
        DataError: If the root is not that of BP4D+, or a file is not as described above.
    """
    reading = Reading(root, "bp4dplus", holds=("AUCoding",))
    folder, files = bp4d.occurrence_files(reading)
    intensities = bp4d.intensity_files(reading)
    part_of = facs.part_of(FOLDS)
    sequences = facs.Sequences()
    places: dict[int, _Place] = {}
    held = ""
    for subject, task, name in files:
        sequence = f"{subject}_T{task}"
        if subject not in part_of:
            raise DataError(
                f"{reading.root / folder / name}: {subject} is nobody of BP4D+ (F001 to F082, M001 to M058)"
            )
        if task not in TASKS:
            reading.skip("label files of a task that is not coded (T1, T6, T7 and T8 are)", [f"{folder}/{name}"])
            continue
        frames, cells = facs.read_occurrence(reading, f"{folder}/{name}", MISSING)
        if sequence in BAD:
            reading.skip(BAD[sequence], (f"{sequence} frame {frame}" for frame in frames.tolist()))
            continue
        cells |= bp4d.read_intensities(reading, intensities, sequence, frames, MISSING)
        if subject != held:
            places, held = _images_of(reading, subject), subject
        place = places.get(task, _Place(f"{_FOLDER}/{subject}/T{task}/", {}))
        tracked = bp4d.tracked_file(reading, sequence) if points else None
        if tracked is not None:
            cells[facs.POINTS] = facs.read_tracked(reading, tracked, frames, place.names)
        keep = bp4d.coded_frames(reading, sequence, frames, cells, False, complete_frames)
        frames, cells = frames[keep], facs.chosen(cells, keep)
        there, names = facs.pick_images(reading, frames, place.names, place.prefix.rstrip("/"))
        sequences.add(
            frames[there],
            [place.prefix + image for image in names],
            facs.chosen(cells, there),
            {"subject": subject, "sequence": sequence, "part": part_of[subject]},
        )
    have = {(subject, task) for subject, task, _ in files}
    lacking = {s: [t for t in TASKS if (s, t) not in have and f"{s}_T{t}" not in BAD] for s in SUBJECTS}
    found = ((s, tasks, _images_of(reading, s)) for s, tasks in lacking.items() if tasks)
    bp4d.name_uncoded(reading, intensities, ((f"{s}_T{t}", t in images) for s, tasks, images in found for t in tasks))
    return reading.table(
        sequences.columns(map(labels.occurrence_column, bp4d.BENCHMARK)),
        label_source=facs.LABEL_SOURCE,
        people="bp4dplus",
    )


class _Place(NamedTuple):
    """Images of a task: what stands before their names in a path, and names by number."""

    prefix: str
    names: dict[int, str]


def _images_of(reading: Reading, subject: str) -> dict[int, _Place]:
    """Return the images of a person by task: unpacked where there is a folder, else in the person's zip."""
    places = {}
    for task in TASKS:
        folder = f"{_FOLDER}/{subject}/T{task}"
        names = reading.numbered(folder)
        if names:
            places[task] = _Place(f"{folder}/", names)
    packed = reading.touch(reading.root / _FOLDER / f"{subject}.zip")
    if len(places) < len(TASKS) and packed.is_file():
        places = {**_members(packed, f"{_FOLDER}/{subject}.zip"), **places}
    return places


def _members(packed: Path, archive: str) -> dict[int, _Place]:
    """Return the images in a zip by task; a path's last folder is the task, whatever stands above it."""
    try:
        with zipfile.ZipFile(packed) as opened:
            members = [PurePosixPath(name) for name in opened.namelist()]
    except (zipfile.BadZipFile, OSError, NotImplementedError, ValueError) as error:
        raise DataError(f"{packed}: not a readable ZIP file ({error}); copy it again") from error
    by_task: dict[int, dict[PurePosixPath, list[str]]] = {}
    for member in members:
        number = _TASK_NAMES.get(member.parent.name.upper())
        if number is not None and not member.name.startswith("."):
            by_task.setdefault(number, {}).setdefault(member.parent, []).append(member.name)
    places = {}
    for task, folders in by_task.items():
        numbered = {folder: by_number(sorted(names), packed / folder) for folder, names in folders.items()}
        with_images = {folder: names for folder, names in numbered.items() if names}
        if len(with_images) > 1:
            both = " and ".join(sorted(map(str, with_images)))
            raise DataError(f"{packed}: images of T{task} lie in {both}; remove one of them")
        for folder, names in with_images.items():
            places[task] = _Place(f"{archive}{SEPARATOR}{folder}/", names)
    return places


def images(table: FaceTable) -> ImageReader:
    """Return the reader of images in zips and unpacked folders."""
    return ZipImages(table)


# ------------------------------------------------------------------------------------------------------ writing


def write(table: FaceTable, root: str | Path, images: ImageReader | None = None) -> None:
    """Write a table as BP4D+ is delivered.

    Args:
        table: With the columns that ``read`` gives.
        root: Folder of the new tree.
        images: Reader of the rows' pixels; None reads those that the table names.
    """
    root = Path(root)
    facs.write_coding(table, root, UNITS)
    reader = images or ZipImages(table)
    names = [split_member(name) for name in table.strings("image")[0]]
    packed: dict[str, list[int]] = {}
    plain = []
    for row, (archive, member) in enumerate(names):
        if member is None:
            plain.append(row)
        else:
            packed.setdefault(archive, []).append(row)
    write_images(table, root, reader, np.array(plain, np.int64))
    for archive, rows in packed.items():
        members = pictures(table, reader, np.array(rows, np.int64))
        facs.write_zip(root / archive, {name.partition(SEPARATOR)[2]: image for name, image in members})


def dress(faces: FaceTable) -> Dressed:
    """Return built-in faces under the names of BP4D+, in zips, with the labels that it has."""
    people = [name for name in facs.interleaved(FOLDS) if name not in {bad.partition("_")[0] for bad in BAD}]
    person, scene, place = facs.cast(faces, people, len(TASKS), length=6)
    task = np.array(TASKS)[scene]
    frame = place + np.where(scene % 2 == 0, 37, 1)
    subject = np.array(people, object)[person]
    rows = np.lexsort((frame, task, subject.astype(str)))
    part_of = facs.part_of(FOLDS)
    names = [(subject[row], int(task[row]), int(frame[row])) for row in rows]
    columns = {
        "image": [f"{_FOLDER}/{s}.zip{SEPARATOR}{s}/T{t}/{f}.jpg" for s, t, f in names],
        "subject": [s for s, _, _ in names],
        "sequence": [f"{s}_T{t}" for s, t, _ in names],
        "part": [part_of[s] for s, _, _ in names],
        "frame": frame[rows].astype(np.int32),
        **bp4d.dressed_labels(faces.take(rows)),
    }
    del columns[facs.OCCLUDED]
    metadata = {"dataset": "bp4dplus", "label_source": facs.LABEL_SOURCE}
    return Dressed(FaceTable.from_columns(columns, ".", metadata), rows)


def expected() -> tuple[Expected, ...]:
    """Return what BP4D+ should contain; how many frames are coded was not found in a public list."""
    fmae = "the folds of FMAE-IAT (github.com/forever208/FMAE-IAT)"
    counts: Mapping[str, int] = {f"distinct/subject/part={fold}": len(people) for fold, people in FOLDS.items()}
    return (
        Expected("distinct/subject", len(SUBJECTS), fmae),
        *(Expected(key, value, fmae) for key, value in counts.items()),
        Expected(
            "distinct/sequence", len(SUBJECTS) * len(TASKS) - len(BAD), "recalled: four tasks of everybody", found=False
        ),
        Expected("size", (1040, 1392), "recalled from BP4D", found=False),
    )
