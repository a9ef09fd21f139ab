# SPDX-License-Identifier: Apache-2.0
"""DISFA+: nine people who pose action units, 12 of them with their intensity in every frame.

M. Mavadati, P. Sanger, M. H. Mahoor: Extended DISFA dataset: investigating posed and spontaneous facial expressions.
CVPR workshops 2016. The authors give the data to researchers under a licence: http://mohammadmahoor.com/disfa/

Layout on disk::

    DISFA+/
    ├── Labels/SN001/<trial>/AU1.txt    lines that begin with #, then `000.jpg 3` for each frame; a copy repeats SN001/
    ├── Images/SN001/<trial>/000.jpg    photographs
    └── Aligned/SN001/<trial>/000.jpg   crops, where somebody made them (``aligned``)

Read in public loaders (py-feat and FERGI's): folders, lines and people. Trials are taken from the folders, by any name.
What is easy to get wrong:

- All nine people are also in DISFA: the metadata ``people`` is the same, so that a run which trains on DISFA and tests
  here stops.
- There is no official split; folds are over people.
- A file that is missing is null, and 9 would be, too; a frame that one file lacks is null there.

Columns: ``image``, ``subject``, ``sequence`` (SN001/<trial>), ``frame`` (the number in the image's name),
``auNN_occurrence``, ``auNN_intensity``.
"""

from __future__ import annotations

import re
from collections.abc import Mapping
from pathlib import Path

import numpy as np

from affect import labels
from affect.data.expected import Expected
from affect.data.images import FileImages, ImageReader
from affect.data.layouts import disfa, facs
from affect.data.layouts.common import EXAMPLES, Dressed, Reading, write_images, write_lines
from affect.data.table import FaceTable
from affect.errors import DataError

__all__ = ["SUBJECTS", "dress", "expected", "images_folder", "read", "write"]

SUBJECTS = facs.people("SN001 SN003 SN004 SN007 SN009 SN010 SN013 SN025 SN027")
UNITS = labels.AU_SETS["disfa12"]

_CODED = re.compile(r"AU0*(\d+)\.txt", re.IGNORECASE)
_LINE = re.compile(
    r"^(\d{1,9})\.(?:jpe?g|png|bmp|tiff?)[ \t]+([0-59])(?:\.0+)?$", re.IGNORECASE | re.MULTILINE | re.ASCII
)
_LABELS = "Labels"
_TRIALS = ("A1_AU1_TrailNo_1", "A2_AU2_TrailNo_1")
"""Trials of dressed trees; the delivered ones have such names."""


def images_folder(aligned: bool) -> str:
    """Return the folder of the images."""
    return "Aligned" if aligned else "Images"


def read(root: str | Path, aligned: bool = False, threshold: int = disfa.THRESHOLD) -> FaceTable:
    """Return the frames of DISFA+.

    Args:
        root: Folder that holds ``Labels``.
        aligned: Take the crops in ``Aligned`` instead of the photographs in ``Images``.
        threshold: Intensity from which an action unit occurs, 1 to 5.

    Raises:
        DataError: If the root is not that of DISFA+, or a file is not as described above.
        ConfigError: If the threshold is none.
    """
    disfa.check_threshold(threshold)
    reading = Reading(root, "disfaplus", holds=(_LABELS,))
    subjects = [name for name in reading.listing(_LABELS) if re.fullmatch(r"SN\d{3}", name)]
    unknown = [name for name in subjects if name not in SUBJECTS]
    if unknown:
        raise DataError(
            f"{reading.root / _LABELS / unknown[0]}: nobody of DISFA+ has this number ({' '.join(SUBJECTS)})"
        )
    if not subjects:
        raise DataError(f"{reading.root / _LABELS}: no folders of people; expected {_LABELS}/SN001/<trial>/AU1.txt")
    sequences = facs.Sequences()
    lacking: dict[int, list[str]] = {}
    for subject in subjects:
        coded = _own_folder(reading, f"{_LABELS}/{subject}", subject)
        shown = _own_folder(reading, f"{images_folder(aligned)}/{subject}", subject)
        for trial in reading.listing(coded):
            files = _files(reading, f"{coded}/{trial}")
            if not files:
                continue
            frames, cells = _labels(reading, files, threshold)
            for au in set(UNITS) - set(files):
                lacking.setdefault(au, []).append(f"{subject}/{trial}")
            folder = f"{shown}/{trial}"
            there, names = facs.pick_images(reading, frames, reading.numbered(folder), folder)
            sequences.add(
                frames[there],
                [f"{folder}/{name}" for name in names],
                facs.chosen(cells, there),
                {"subject": subject, "sequence": f"{subject}/{trial}"},
            )
    for au, trials in sorted(lacking.items()):
        named = ", ".join(trials[:EXAMPLES]) + (", …" if len(trials) > EXAMPLES else "")
        reading.note(f"no label file of AU{au} in {len(trials)} trials ({named}): missing (null) there, not zero")
    always = [make(au) for au in UNITS for make in (labels.occurrence_column, labels.intensity_column)]
    # The people are those of DISFA, under the same names.
    return reading.table(sequences.columns(always), label_source=facs.LABEL_SOURCE, people="disfa")


def _own_folder(reading: Reading, folder: str, subject: str) -> str:
    """Return the folder that holds a person's trials, which some copies repeat inside itself."""
    return f"{folder}/{subject}" if subject in reading.listing(folder) else folder


def _files(reading: Reading, folder: str) -> dict[int, str]:
    matches = filter(None, map(_CODED.fullmatch, reading.listing(folder)))
    return {int(match[1]): f"{folder}/{match[0]}" for match in matches if int(match[1]) in labels.AU_NAMES}


def _labels(reading: Reading, files: Mapping[int, str], threshold: int) -> tuple[np.ndarray, dict[str, facs.Cells]]:
    """Return the frames of a trial that any file labels ``(N,)``, and the labels by column."""
    coded = {au: _intensity(reading, path) for au, path in sorted(files.items())}
    return facs.coded_intensities(reading, coded, threshold, "trial")


def _intensity(reading: Reading, path: str) -> tuple[np.ndarray, facs.Cells]:
    """Return frames and intensities of a file, by frame."""
    lines = [(number, line) for number, line in reading.lines(path) if not line.startswith("#")]
    if not lines:
        raise DataError(f"{reading.root / path}: no label, expected lines like `000.jpg 3`; copy it again")
    found = _LINE.findall("\n".join(line for _, line in lines))
    if len(found) != len(lines):
        number, line = next(entry for entry in lines if not _LINE.fullmatch(entry[1]))
        raise DataError(
            f"{reading.root / path}, line {number}: expected an image and an intensity from 0 to 5 (9: not coded) like "
            f"`000.jpg 3`, found {line[:80]!r}"
        )
    frames, values = np.array(found, np.int64).T
    order = np.argsort(frames, kind="stable")
    twice = np.flatnonzero(np.diff(frames[order]) == 0)
    if len(twice):
        number, line = lines[int(order[twice[0] + 1])]
        raise DataError(f"{reading.root / path}, line {number}: expected each image once, found {line[:80]!r} again")
    return frames[order], (values[order].astype(np.float32), values[order] <= 5)


# ------------------------------------------------------------------------------------------------------ writing


def write(table: FaceTable, root: str | Path, images: ImageReader | None = None) -> None:
    """Write a table as DISFA+ is delivered; a cell that is null is a line that the label file lacks.

    Args:
        table: With the columns that ``read`` gives.
        root: Folder of the new tree.
        images: Reader of the rows' pixels; None reads the files that the table names.
    """
    root = Path(root)
    for sequence, rows in facs.sequence_rows(table):
        files = [name.rpartition("/")[2] for name in table.strings("image", rows)[0]]
        for au in facs.action_units(table, "intensity"):
            values, valid = table.numbers(labels.intensity_column(au), rows)
            lines = [f"{name}     {round(v)}" for name, v, known in zip(files, values, valid, strict=True) if known]
            if lines:
                comments = [f"# intensity of AU{au}, 0 to 5", "# image     intensity"]
                write_lines(root / _LABELS / sequence / f"AU{au}.txt", [*comments, *lines])
    write_images(table, root, images or FileImages(table))


def dress(faces: FaceTable, aligned: bool = False) -> Dressed:
    """Return built-in faces under the names of DISFA+, with the labels that it has; unlabelled faces are left out.

    Args:
        faces: The built-in faces.
        aligned: Put images into ``Aligned`` instead of ``Images``.
    """
    kept = facs.coded_rows(faces, UNITS)
    faces = faces.take(kept)
    person, trial, place = facs.cast(faces, SUBJECTS, len(_TRIALS), length=6)
    rows = np.lexsort((place, trial, person))
    names = [(SUBJECTS[person[row]], _TRIALS[trial[row]], int(place[row])) for row in rows]
    columns = {
        "image": [f"{images_folder(aligned)}/{s}/{t}/{f:03d}.jpg" for s, t, f in names],
        "subject": [s for s, _, _ in names],
        "sequence": [f"{s}/{t}" for s, t, _ in names],
        "frame": np.array([f for _, _, f in names], np.int32),
        **disfa.dressed_labels(faces.take(rows), UNITS),
    }
    metadata = {"dataset": "disfaplus", "label_source": facs.LABEL_SOURCE}
    return Dressed(FaceTable.from_columns(columns, ".", metadata), kept[rows])


def expected() -> tuple[Expected, ...]:
    """Return what DISFA+ should contain; how many frames it has was not found in a public list."""
    pyfeat = "py-feat's benchmark (github.com/cosanlab/py-feat), whose people all are in DISFA"
    return (Expected("distinct/subject", len(SUBJECTS), pyfeat),)
