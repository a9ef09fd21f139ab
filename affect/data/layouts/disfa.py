# SPDX-License-Identifier: Apache-2.0
"""DISFA: 27 people who watch a video of four minutes, 12 action units with their intensity in every frame.

S. M. Mavadati, M. H. Mahoor, K. Bartlett, P. Trinh, J. F. Cohn: DISFA: a spontaneous facial action intensity database.
IEEE Transactions on Affective Computing 4 (2013). The authors give the data to researchers under a licence:
http://mohammadmahoor.com/disfa/

Layout on disk::

    DISFA/
    ├── ActionUnit_Labels/SN001/SN001_au1.txt           lines frame,intensity; frames from 1; also SN001/au1.txt
    ├── Videos_LeftCamera/LeftVideoSN001_comp.avi       the videos that are used (also Video_LeftCamera)
    ├── Videos_RightCamera/RightVideoSN001_comp.avi     not used
    └── Landmark_Points/SN001/tmp_frame_lm/             66 points, variable `pts` of a MATLAB file per frame:
        ├── SN001_0000_lm.mat                               frame 1 (counted from 0), or
        └── l00001_lm.mat                                   frame 1 (counted from 1)

Counted in public lists: rows, parts, rates; names of the point files were read in three public readers. Recalled: the
size of the videos and that the 66 points are those of the 68-point scheme without the inner corners of the mouth. What
is easy to get wrong:

- An action unit occurs at an intensity of 2 or more. This is the literature's threshold, an option here.
- Extracted frames are counted from 0 in some copies (ME-GraphAU, JAA-Net) and from 1 in others (FG-Net): one off, and
  every label belongs to the neighbouring frame. ``offset`` has to be stated and is checked.
- A file that is missing is null for this person and action unit. A public reader takes it for zeros.
- SN010 has 4,844 frames, everybody else 4,845.
- Everybody in DISFA+ is in DISFA, too.

Columns: ``image`` (``Videos_LeftCamera/LeftVideoSN001_comp.avi!57`` for a frame of a video), ``subject``, ``sequence``
(SN001), ``part``, ``frame`` (from 1), ``auNN_occurrence``, ``auNN_intensity``, ``landmarks_49``.
"""

from __future__ import annotations

import os
import re
from collections.abc import Mapping, Sequence
from pathlib import Path
from types import MappingProxyType

import cv2
import numpy as np

from affect import labels
from affect.data.archives import SEPARATOR, VideoImages, split_member
from affect.data.expected import Expected
from affect.data.images import ImageReader
from affect.data.layouts import facs
from affect.data.layouts.common import (
    Dressed,
    Reading,
    encode_matrices,
    pictures,
    write_bytes,
    write_images,
    write_lines,
)
from affect.data.table import FaceTable
from affect.errors import ConfigError, DataError, near
from affect.files import replacing

__all__ = ["DIVISIONS", "dress", "expected", "images", "read", "write"]


def _sn(numbers: str) -> tuple[str, ...]:
    """Return people by their numbers, e.g. ``1 2`` gives SN001 and SN002."""
    return tuple(f"SN{int(number):03d}" for number in numbers.split())


DIVISIONS: Mapping[str, Mapping[str, tuple[str, ...]]] = MappingProxyType(
    {
        "literature": {
            "P1": _sn("1 2 9 10 16 26 27 30 32"),
            "P2": _sn("6 11 12 13 18 21 24 28 31"),
            "P3": _sn("3 4 5 7 8 17 23 25 29"),
        },
        "classic": {
            "P1": _sn("1 2 3 4 5 6 7 8 9"),
            "P2": _sn("10 11 12 13 16 17 18 21 23"),
            "P3": _sn("24 25 26 27 28 29 30 31 32"),
        },
        "intensity": {
            "P1": _sn("1 6 7 8 9 26 27 28 29"),
            "P2": _sn("2 5 10 11 12 16 17 21 25"),
            "P3": _sn("3 4 13 18 23 24 30 31 32"),
        },
        "tuning": {
            "train": _sn("1 2 6 9 10 11 12 13 16 18 21 24"),
            "validation": _sn("26 27 28 30 31 32"),
            "test": _sn("3 4 5 7 8 17 23 25 29"),
        },
    }
)
"""People by division and part: of ME-GraphAU, JAA-Net and FG-Net; of sorted thirds; of Sanchez-Lozano's heat maps, who
pool the predictions of all three parts; and a published division of the two parts that train when P3 tests."""

SUBJECTS = tuple(sorted(facs.part_of(DIVISIONS["literature"])))
UNITS = labels.AU_SETS["disfa12"]
THRESHOLD = 2
"""Intensity from which an action unit occurs in the literature."""

VIDEO = "video"
OFFSETS = (0, 1)

_CODED = re.compile(r"(?:SN\d+_)?AU0*(\d+)\.txt", re.IGNORECASE)
_LABELS = "ActionUnit_Labels"
_CAMERAS = ("Videos_LeftCamera", "Video_LeftCamera")
_LEFT = re.compile(r"LeftVideo(SN\d{3})_comp\.(?:avi|mp4|mov|mkv)", re.IGNORECASE)
_POINTS_FROM_0 = re.compile(r"SN\d{3}_(\d+)_lm\.mat", re.IGNORECASE)
_POINTS_FROM_1 = re.compile(r"l(\d+)_lm\.mat", re.IGNORECASE)
_RATE = 20.0
"""Frames per second."""


def read(
    root: str | Path,
    frames: str = VIDEO,
    offset: int | None = None,
    folds: str = "literature",
    threshold: int = THRESHOLD,
    points: bool = True,
    lost_first: Sequence[str] = (),
) -> FaceTable:
    """Return the frames of DISFA.

    Args:
        root: Folder that holds ``ActionUnit_Labels``.
        frames: ``video`` (left camera), or the folder of extracted frames ``<folder>/SN001/<number>.png``, relative to
            the root or absolute.
        offset: For extracted frames: image ``i`` shows frame ``i + offset`` of the labels, which count from 1; 1 if the
            first image is 0, otherwise 0.
        folds: Which people are P1, P2 and P3: ``literature``, ``classic`` or ``intensity``; ``tuning`` gives train,
            validation and test.
        threshold: Intensity from which an action unit occurs, 1 to 5.
        points: Read the tracked points where ``Landmark_Points`` is there, one small file per frame.
        lost_first: With ``offset=1``: people whose images count from 0 though their image 0 is lost.

    Raises:
        DataError: If the root is not that of DISFA, a file is not as described above, or ``offset`` does not fit.
        ConfigError: If an option is unknown.
    """
    _check_options(folds, threshold, lost_first)
    part_of = facs.part_of(DIVISIONS[folds])
    reading = Reading(root, "disfa", holds=(_LABELS,))
    subjects = _subjects(reading)
    labelled = {subject: _labels(reading, subject, threshold) for subject in subjects}
    last = {subject: int(numbers[-1]) for subject, (numbers, _) in labelled.items() if len(numbers)}
    found = (
        _video_frames(reading, last)
        if frames == VIDEO
        else _extracted_frames(reading, frames, offset, last, lost_first)
    )
    sequences = facs.Sequences()
    for subject, (numbers, cells) in labelled.items():
        if points and subject in found:
            tracked = _points(reading, subject, numbers)
            cells |= {} if tracked is None else {facs.POINTS: tracked}
        there, names = _pick(reading, subject, numbers, found.get(subject), frames)
        sequences.add(
            numbers[there],
            names,
            facs.chosen(cells, there),
            {"subject": subject, "sequence": subject, "part": part_of[subject]},
        )
    always = [make(au) for au in UNITS for make in (labels.occurrence_column, labels.intensity_column)]
    return reading.table(sequences.columns(always), label_source=facs.LABEL_SOURCE, people="disfa", division=folds)


def _check_options(folds: str, threshold: int, lost_first: Sequence[str]) -> None:
    if folds not in DIVISIONS:
        raise ConfigError(f"folds={folds}: {near(folds, DIVISIONS)}")
    for subject in lost_first:
        if subject not in SUBJECTS:
            raise ConfigError(f"lost_first={subject}: {near(subject, SUBJECTS)}")
    check_threshold(threshold)


def check_threshold(threshold: int) -> None:
    """Raise ``ConfigError`` if a threshold is none."""
    if threshold not in range(1, 6):
        raise ConfigError(f"threshold={threshold}: expected an intensity from 1 to 5; the literature takes 2")


def _subjects(reading: Reading) -> list[str]:
    found = [name for name in reading.listing(_LABELS) if re.fullmatch(r"SN\d{3}", name)]
    unknown = [name for name in found if name not in SUBJECTS]
    if unknown:
        raise DataError(
            f"{reading.root / _LABELS / unknown[0]}: nobody of DISFA has this number (SN001 to SN032 without 014 015 "
            "019 020 022); remove the folder"
        )
    if not found:
        raise DataError(f"{reading.root / _LABELS}: no folders of people; expected {_LABELS}/SN001/SN001_au1.txt")
    return found


def _labels(reading: Reading, subject: str, threshold: int) -> tuple[np.ndarray, dict[str, facs.Cells]]:
    """Return the frames of a person that any file labels ``(N,)``, and the labels by column."""
    folder = f"{_LABELS}/{subject}"
    matches = [_CODED.fullmatch(name) for name in reading.listing(folder)]
    files: dict[int, str] = {}
    for match in matches:
        if match and int(match[1]) in labels.AU_NAMES:
            if int(match[1]) in files:
                other = files[int(match[1])]
                raise DataError(f"{reading.root / folder}: {other} and {match[0]} are the same action unit; remove one")
            files[int(match[1])] = match[0]
    coded = {au: facs.read_intensity(reading, f"{folder}/{name}", missing=()) for au, name in sorted(files.items())}
    lacking = [au for au in UNITS if au not in coded]
    if lacking:
        named = ", ".join(map(str, lacking))
        reading.note(f"{subject} has no label file of AU {named}: these labels are missing (null), not zero")
    return facs.coded_intensities(reading, coded, threshold, "person")


# ------------------------------------------------------------------------------------------------------- pixels


def _video_frames(reading: Reading, last: Mapping[str, int]) -> dict[str, dict[int, str]]:
    """Return image paths by person and frame, of the left camera's videos."""
    found: dict[str, dict[int, str]] = {}
    for camera in _CAMERAS:
        for name in reading.listing(camera):
            match = _LEFT.fullmatch(name)
            if match is None or match[1].upper() not in last or match[1].upper() in found:
                continue
            subject, path = match[1].upper(), f"{camera}/{name}"
            count = _count(reading.touch(reading.root / path))
            if 0 < count != last[subject]:
                reading.note(f"{path} says that it has {count} frames, labels are of {last[subject]}")
            end = min(count, last[subject]) if count > 0 else last[subject]
            found[subject] = {frame: f"{path}{SEPARATOR}{frame}" for frame in range(1, end + 1)}
    if not found:
        raise DataError(
            f"{reading.root}: no videos; expected {_CAMERAS[0]}/LeftVideoSN001_comp.avi and so on. Where frames were "
            "extracted, name their folder: dataset.frames=<folder> dataset.offset=0 or 1"
        )
    return found


def _count(path: Path) -> int:
    """Return the frames that a video's header announces, 0 if it does not tell."""
    video = cv2.VideoCapture(str(path))
    if not video.isOpened():
        raise DataError(f"{path}: not a readable video ({path.stat().st_size} bytes); copy it again")
    count = video.get(cv2.CAP_PROP_FRAME_COUNT)
    video.release()
    return int(count) if np.isfinite(count) else 0


def _extracted_frames(
    reading: Reading, folder: str, offset: int | None, last: Mapping[str, int], lost_first: Sequence[str]
) -> dict[str, dict[int, str]]:
    """Return image paths by person and frame, of extracted frames whose numbers fit ``offset``."""
    base = os.path.relpath(reading.root / Path(folder).expanduser(), reading.root)
    if not (reading.root / base).is_dir():
        raise DataError(f"{reading.root / base}: no such folder of extracted frames (dataset.frames={folder})")
    found = {subject: reading.numbered(f"{base}/{subject}") for subject in last}
    found = {subject: names for subject, names in found.items() if names}
    if not found:
        raise DataError(f"{reading.root / base}: no frames; expected {folder}/SN001/<number>.png and so on")
    _check_offset(reading.root / base, found, offset, lost_first)
    assert offset is not None
    return {
        subject: {number + offset: f"{base}/{subject}/{name}" for number, name in names.items()}
        for subject, names in found.items()
    }


def _check_offset(
    folder: Path, found: Mapping[str, Mapping[int, str]], offset: int | None, lost_first: Sequence[str]
) -> None:
    """Raise if a person's images are not numbered as ``offset`` says: with an image 0 if and only if it is 1.

    No other number tells: the last images may be lost, and a video may be longer than its labels. So whose image 0 is
    lost has to be said.
    """
    zero = [subject for subject, names in found.items() if 0 in names]
    if offset is None:
        fits = 1 if zero else 0
        example = found[zero[0]][0] if zero else min(next(iter(found.values())).values())
        raise ConfigError(
            f"dataset.offset is not set: image i shows frame i + offset of the labels, which count from 1. {folder} "
            f"begins with {example}, so that it should be dataset.offset={fits}"
        )
    if offset not in OFFSETS:
        raise ConfigError(f"offset={offset}: expected 0 (images count from 1) or 1 (images count from 0)")
    if offset == 0 and zero:
        raise DataError(
            f"{folder / zero[0]} holds {found[zero[0]][0]}, so its images count from 0: set dataset.offset=1, "
            "otherwise every image has the label of the frame before"
        )
    others = [subject for subject in found if subject not in zero and subject not in lost_first]
    if offset == 1 and others:
        subject = others[0]
        lost = f", or if only its image 0 is lost, dataset.lost_first=[{subject}]" if zero else ""
        raise DataError(
            f"{folder / subject} holds no image 0, its images count from 1 ({found[subject][min(found[subject])]} …): "
            f"set dataset.offset=0, otherwise every image has the label of the next frame{lost}"
        )


def _pick(
    reading: Reading, subject: str, numbers: np.ndarray, found: Mapping[int, str] | None, frames: str
) -> tuple[np.ndarray, list[str]]:
    """Return which frames ``(N,)`` have an image, and the paths; the others are counted."""
    if found is None:
        what = "no video of the left camera" if frames == VIDEO else "no folder of extracted frames"
        reading.skip(f"{what} of this person", [f"{subject} ({len(numbers)} frames)"], len(numbers))
        return np.zeros(len(numbers), bool), []
    paths = [found.get(number) for number in numbers.tolist()]
    there = np.array([path is not None for path in paths], bool)
    reason = "the video ends before this labelled frame" if frames == VIDEO else "no image of a labelled frame"
    reading.skip(reason, (f"{subject} frame {number}" for number in numbers[~there].tolist()))
    return there, [path for path in paths if path is not None]


def images(table: FaceTable) -> ImageReader:
    """Return the reader of frames in videos and in files; from videos, rows in the order of frames are cheap."""
    return VideoImages(table)


# ------------------------------------------------------------------------------------------------ tracked points


def _points(reading: Reading, subject: str, frames: np.ndarray) -> facs.Cells | None:
    """Return the 49 inner points ``(N, 98)`` of frames; None without files."""
    folder = f"Landmark_Points/{subject}/tmp_frame_lm"
    if not reading.touch(reading.root / "Landmark_Points").is_dir():
        return None
    files: dict[int, str] = {}
    for pattern, first in ((_POINTS_FROM_0, 0), (_POINTS_FROM_1, 1)):
        for match in filter(None, map(pattern.fullmatch, reading.listing(folder))):
            files.setdefault(int(match[1]) + 1 - first, match[0])
    reading.touch_files(folder)
    values, valid = np.zeros((len(frames), 98), np.float32), np.zeros(len(frames), bool)
    for row, frame in enumerate(frames.tolist()):
        if frame not in files:
            continue
        found = facs.load_mat(reading, f"{folder}/{files[frame]}", "pts", touch=False)
        if found is None or found.shape != (66, 2) or found.dtype.kind not in "fiu":
            reading.note("some files of Landmark_Points hold no 66 points `pts`: those points are missing")
            continue
        values[row] = found[17:].reshape(-1)
        valid[row] = np.isfinite(found[17:]).all()
    if not valid.all():
        reading.note("Landmark_Points has no points of some frames: those are missing")
    return np.where(valid[:, None], values, 0), valid


# ------------------------------------------------------------------------------------------------------ writing


def write(table: FaceTable, root: str | Path, images: ImageReader | None = None) -> None:
    """Write a table as DISFA is delivered, with videos or extracted frames, as its image paths say.

    A cell that is null is a line that the label file lacks; without any line there is no file.

    Args:
        table: With the columns that ``read`` gives.
        root: Folder of the new tree.
        images: Reader of the rows' pixels; None reads those that the table names.
    """
    root = Path(root)
    numbers = table.numbers("frame")[0].astype(np.int64)
    for subject, rows in facs.sequence_rows(table):
        for au in facs.action_units(table, "intensity"):
            values, valid = table.numbers(labels.intensity_column(au), rows)
            cells = zip(numbers[rows][valid].tolist(), np.rint(values[valid]).astype(np.int64).tolist(), strict=True)
            if valid.any():
                path = root / _LABELS / subject / f"{subject}_au{au}.txt"
                write_lines(path, [f"{number},{value}" for number, value in cells])
        if facs.POINTS in table.names:
            _write_points(root / "Landmark_Points" / subject / "tmp_frame_lm", subject, numbers[rows], table, rows)
    reader = images or VideoImages(table)
    videos: dict[str, list[int]] = {}
    plain = []
    for row, name in enumerate(table.strings("image")[0]):
        archive, member = split_member(name)
        if member is None:
            plain.append(row)
        else:
            videos.setdefault(archive, []).append(row)
    write_images(table, root, reader, np.array(plain, np.int64))
    for archive, shown in videos.items():
        ordered = np.array(shown, np.int64)[np.argsort(numbers[shown], kind="stable")]
        write_video(root / archive, numbers[ordered], table, reader, ordered)


def _write_points(folder: Path, subject: str, frames: np.ndarray, table: FaceTable, rows: np.ndarray) -> None:
    for frame, points, valid in zip(frames.tolist(), *table.numbers(facs.POINTS, rows), strict=True):
        if valid:
            whole = np.full((66, 2), np.nan)  # the jaw, which scheme 49 does not have
            whole[17:] = points.reshape(49, 2)
            write_bytes(folder / f"{subject}_{frame - 1:04d}_lm.mat", encode_matrices({"pts": whole}))


def write_video(path: Path, frames: np.ndarray, table: FaceTable, images: ImageReader, rows: np.ndarray) -> None:
    """Write the images of rows as frames of a video of JPEG images, atomically; frames between them are black.

    Args:
        path: File that ends in ``.avi``.
        frames: Frame number of each row from 1, increasing ``(N,)``.
        table: The table.
        images: Reader of its pixels.
        rows: Rows of the table ``(N,)``.

    Raises:
        DataError: If images differ in size, or OpenCV cannot write this file.
    """
    with replacing(path) as part:
        writer: cv2.VideoWriter | None = None
        size, written = (0, 0), 0
        try:
            for frame, (_, image) in zip(frames.tolist(), pictures(table, images, rows), strict=True):
                if writer is None:
                    size = image.shape[1], image.shape[0]
                    code = cv2.VideoWriter.fourcc(*"MJPG")
                    # OpenCV's own writer of this format: frame by frame, the same on every system.
                    quality = [cv2.VIDEOWRITER_PROP_QUALITY, 95]
                    writer = cv2.VideoWriter(str(part), cv2.CAP_OPENCV_MJPEG, code, _RATE, size, quality)
                    if not writer.isOpened():
                        raise DataError(f"{path}: OpenCV cannot write this video; its name should end in .avi")
                if (image.shape[1], image.shape[0]) != size:
                    raise DataError(f"{path}: images of a video have one size, found {size} and {image.shape[1::-1]}")
                while written < frame - 1:
                    writer.write(np.zeros_like(image))
                    written += 1
                writer.write(cv2.cvtColor(image, cv2.COLOR_RGB2BGR))
                written += 1
        finally:
            if writer is not None:
                writer.release()


def dress(faces: FaceTable, frames: str = VIDEO, offset: int = 0) -> Dressed:
    """Return built-in faces under the names of DISFA, with the labels that it has; unlabelled faces are left out.

    Args:
        faces: The built-in faces.
        frames: ``video``, or the folder of extracted frames.
        offset: For extracted frames, as in ``read``.
    """
    kept = facs.coded_rows(faces, UNITS)
    faces = faces.take(kept)
    people = facs.interleaved(DIVISIONS["literature"])
    person, _, place = facs.cast(faces, people, 1, length=1)
    subject = np.array(people, object)[person]
    rows = np.lexsort((place, subject.astype(str)))
    names = [(subject[row], int(place[row]) + 1) for row in rows]
    if frames == VIDEO:
        paths = [f"{_CAMERAS[0]}/LeftVideo{s}_comp.avi{SEPARATOR}{f}" for s, f in names]
    else:
        paths = [f"{frames}/{s}/{f - offset}.png" for s, f in names]
    part_of = facs.part_of(DIVISIONS["literature"])
    drawn = faces.take(rows)
    columns = {
        "image": paths,
        "subject": [s for s, _ in names],
        "sequence": [s for s, _ in names],
        "part": [part_of[s] for s, _ in names],
        "frame": np.array([f for _, f in names], np.int32),
        **dressed_labels(drawn, UNITS),
        facs.POINTS: facs.points_49(drawn),
    }
    metadata = {"dataset": "disfa", "label_source": facs.LABEL_SOURCE}
    return Dressed(FaceTable.from_columns(columns, ".", metadata), kept[rows])


def dressed_labels(drawn: FaceTable, units: Sequence[int], threshold: int = THRESHOLD) -> dict[str, facs.Cells]:
    """Return intensities of built-in faces as people code them, and the occurrence that follows, by column."""
    columns = {}
    for au in units:
        intensity = facs.whole_intensity(drawn, au)
        columns[labels.intensity_column(au)] = intensity
        columns[labels.occurrence_column(au)] = facs.occurrence(intensity, threshold)
    return columns


# ----------------------------------------------------------------------------------------------------- expected

_ROWS = {name: 4844 if name == "SN010" else 4845 for name in SUBJECTS}
_WITH_POINTS = {"SN021": 1793, "SN029": 4391, "SN023": 4423}
"""Rows of those whom JAA-Net's lists lose most of."""

_RATES = {1: 0.050, 2: 0.040, 4: 0.150, 6: 0.079, 9: 0.042, 12: 0.129, 25: 0.278, 26: 0.089}
_GRAPHAU = "counted in the lists of ME-GraphAU (github.com/CVI-SZU/ME-GraphAU)"
_JAANET = "JAA-Net's lists, which leave out frames without tracked points"


def expected(folds: str = "literature", threshold: int = THRESHOLD) -> tuple[Expected, ...]:
    """Return what DISFA should contain under the options of ``read``."""
    found = [
        Expected("rows", sum(_ROWS.values()), _GRAPHAU, variants={126144: _JAANET}),
        Expected("distinct/subject", len(SUBJECTS), _GRAPHAU),
    ]
    for part, people in DIVISIONS[folds].items():
        found.append(Expected(f"rows/part={part}", sum(_ROWS[name] for name in people), _GRAPHAU))
    for name, count in _ROWS.items():
        variants = {_WITH_POINTS[name]: _JAANET} if name in _WITH_POINTS else {}
        found.append(Expected(f"rows/subject={name}", count, _GRAPHAU, variants=variants))
    if threshold == THRESHOLD:
        found += [Expected(f"rate/{labels.occurrence_column(au)}", rate, _GRAPHAU) for au, rate in _RATES.items()]
    found.append(Expected("size", (1024, 768), "recalled from the paper", found=False))
    return tuple(found)
