# SPDX-License-Identifier: Apache-2.0
"""Files of predictions as the ABAW challenges on Aff-Wild2 take them: one line per listed frame, none left out.

==========  =================================================================================  ====================
track       header                                                                             a line
==========  =================================================================================  ====================
``va``      ``image_location,valence,arousal``                                                 ``v/00001.jpg,.1,.2``
``expr``    ``image_location,Neutral,Anger,Disgust,Fear,Happiness,Sadness,Surprise,Other``     ``v/00001.jpg,4``
``au``      ``image_location,AU1,AU2,AU4,AU6,AU7,AU10,AU12,AU15,AU23,AU24,AU25,AU26``          twelve times 0 or 1
``mtl``     ``image,valence,arousal,expression,aus``                                           all 15 in this order
==========  =================================================================================  ====================

The header of ``expr`` lists classes, not columns: a line has one class number. Since ABAW 5 a sample file names the
test frames; all must be answered, also those in which no face was detected and of which there is no crop. Those take
what was predicted for the nearest frame of their video, of two equally near ones the earlier. (Headers and lines as in
public readers of the sample files of ABAW 4 to 8.)
"""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from types import MappingProxyType
from typing import NamedTuple

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
import pyarrow.csv as pa_csv

from affect import labels
from affect.errors import ConfigError, DataError, near
from affect.files import replacing

__all__ = [
    "FALLBACK",
    "TRACKS",
    "Filling",
    "Frames",
    "Track",
    "columns_of",
    "decide",
    "every_frame",
    "fill",
    "frames_of",
    "read_sample",
    "write_submission",
]

_AUS = labels.AU_SETS["affwild2"]
_CLASSES = labels.EXPRESSION_ORDERS["abaw"]


class Track(NamedTuple):
    """What a track of the challenges asks for.

    Attributes:
        header: First line of the file.
        fields: Kinds of values of a line in their order, of ``va``, ``expr`` and ``au``.
    """

    header: str
    fields: tuple[str, ...]


_TITLES = ",".join(name.title() for name in _CLASSES)
_AU_TITLES = ",".join(labels.au_output(number) for number in _AUS)
TRACKS = MappingProxyType(
    {
        "va": Track("image_location,valence,arousal", ("va",)),
        "expr": Track(f"image_location,{_TITLES}", ("expr",)),
        "au": Track(f"image_location,{_AU_TITLES}", ("au",)),
        "mtl": Track("image,valence,arousal,expression,aus", ("va", "expr", "au")),
    }
)
"""Tracks by name."""

FALLBACK = "valence and arousal 0, expression neutral, no action unit"
"""What stands in the lines of a video of which nothing was predicted."""

_WIDTH = MappingProxyType({"va": 2, "expr": 1, "au": len(_AUS)})
_COLUMNS = MappingProxyType(
    {
        "va": labels.AFFECT_AXES,
        "expr": tuple(labels.expression_column(name) for name in _CLASSES),
        "au": tuple(labels.occurrence_column(number) for number in _AUS),
    }
)
_LOCATION = r"^(?:.*/)?(?P<video>[^/,]+)/(?P<number>[0-9]{1,9})\.[A-Za-z]+$"
_LINE = r"^(?P<image>[^,]+),?\s*$"


class Frames(NamedTuple):
    """Frames of videos.

    Attributes:
        videos: Name of each video ``(V,)``.
        codes: Index into ``videos`` of each frame ``(N,)``.
        numbers: Number of each frame in its video, from 1, ``(N,)``.
    """

    videos: np.ndarray
    codes: np.ndarray
    numbers: np.ndarray


class Filling(NamedTuple):
    """Which prediction stands in each line.

    Attributes:
        row: Row of the predictions ``(N,)``; -1 where nothing was predicted of the video.
        distance: Frames between the line's frame and that of the prediction ``(N,)``, 0 where it is the same.
        unlisted: Predicted frames that no line asks for.
    """

    row: np.ndarray
    distance: np.ndarray
    unlisted: int


# ------------------------------------------------------------------------------------------------------- frames


def frames_of(images: pa.Array | pa.ChunkedArray, what: str, first: int = 0) -> Frames:
    """Return the frames that image locations name by their last two parts, ``<video>/<number>.jpg``.

    Args:
        images: Paths or locations ``(N,)``.
        what: Where they come from, for messages.
        first: Number of the first one, for messages.

    Raises:
        DataError: If one is no such location.
    """
    found = pc.extract_regex(images, _LOCATION)
    if isinstance(found, pa.ChunkedArray):
        found = found.combine_chunks()
    if found.null_count:
        place = int(np.flatnonzero(found.is_null().to_numpy(zero_copy_only=False))[0])
        raise DataError(
            f"{what} {place + first}: {str(images[place].as_py())[:80]!r} names no frame; expected <video>/00001.jpg"
        )
    encoded = found.field("video").dictionary_encode()
    numbers = found.field("number").cast(pa.int64()).to_numpy(zero_copy_only=False)
    videos = np.array(encoded.dictionary.to_pylist(), object)
    return Frames(videos, encoded.indices.to_numpy(zero_copy_only=False).astype(np.int64), numbers)


def read_sample(path: str | Path, track: str) -> tuple[pa.Array, Frames]:
    """Return the locations of a sample file in their order, and their frames.

    Args:
        path: The file: the header of the track, then one ``<video>/<number>.jpg,`` per line.
        track: Key of ``TRACKS``.

    Raises:
        ConfigError: If there is no such track.
        DataError: If the file is missing or of another track, or a line names no frame, or one that was named before.
    """
    path, header = Path(path).expanduser(), _track(track).header
    try:
        lines = path.read_text(encoding="utf-8-sig").split("\n")
    except (OSError, UnicodeDecodeError) as error:
        raise DataError(f"sample={path}: {error}") from error
    found = lines[0].strip()
    if found.replace(" ", "").lower() != header.lower():
        others = [name for name, other in TRACKS.items() if other.header.lower() == found.replace(" ", "").lower()]
        hint = f"; that is the header of track={others[0]}" if others else ""
        raise DataError(f"{path}, line 1: expected {header}, found {found[:120]!r}{hint}")
    while lines and not lines[-1].strip():
        lines.pop()
    given = pa.array(lines[1:], pa.string())
    images = pc.extract_regex(given, _LINE)
    if images.null_count:
        place = int(np.flatnonzero(images.is_null().to_numpy(zero_copy_only=False))[0])
        raise DataError(f"{path}, line {place + 2}: expected <video>/00001.jpg, and found {lines[place + 1][:80]!r}")
    images = images.field("image")
    if not len(images):
        raise DataError(f"{path}: lists no frame")
    frames = frames_of(images, f"{path}, line", 2)
    _require_once(frames, f"{path}, line", 2)
    return images, frames


def every_frame(frames: Frames) -> tuple[pa.Array, Frames]:
    """Return the locations of frame 1 to the last predicted one of each video, by name of the video, and their frames.

    A video may go on behind it; only a sample file knows.
    """
    last = np.zeros(len(frames.videos), np.int64)
    np.maximum.at(last, frames.codes, frames.numbers)
    order = np.argsort(frames.videos.astype(str), kind="stable")
    codes = np.repeat(order, last[order])
    starts = np.repeat(np.cumsum(last[order]) - last[order], last[order])
    numbers = np.arange(len(codes)) - starts + 1
    files = pc.binary_join_element_wise(
        pa.array(frames.videos, pa.string()).take(pa.array(codes)),
        pc.binary_join_element_wise(pc.utf8_lpad(pa.array(numbers).cast(pa.string()), 5, "0"), ".jpg", ""),
        "/",
    )
    return files, Frames(frames.videos, codes, numbers)


def fill(listed: Frames, predicted: Frames, what: str = "predictions, row") -> Filling:
    """Return which prediction stands in each line: that of the frame, or else of the nearest one of its video.

    Raises:
        DataError: If a frame was predicted twice.
    """
    _require_once(predicted, what, 0)
    place = {name: code for code, name in enumerate(listed.videos.tolist())}
    renamed = np.array([place.get(name, -1) for name in predicted.videos.tolist()], np.int64)
    code = renamed[predicted.codes]
    width = int(max(listed.numbers.max(initial=0), predicted.numbers.max(initial=0))) + 1
    rows = np.flatnonzero(code >= 0)
    key = code[rows] * width + predicted.numbers[rows]
    order = np.argsort(key, kind="stable")
    rows, key = rows[order], key[order]
    wanted = listed.codes * width + listed.numbers
    if not len(rows):
        return Filling(np.full(len(wanted), -1), np.zeros(len(wanted), np.int64), len(predicted.codes))
    behind = np.searchsorted(key, wanted)

    def at(position: np.ndarray) -> np.ndarray:
        """Return the distance to the prediction at a position, or a huge one if that is of another video."""
        inside = (position >= 0) & (position < len(key))
        near_key = key[np.clip(position, 0, len(key) - 1)]
        return np.where(inside & (near_key // width == listed.codes), np.abs(near_key - wanted), np.iinfo(np.int64).max)

    before, after = at(behind - 1), at(behind)
    chosen = np.where(before <= after, behind - 1, behind)
    distance = np.minimum(before, after)
    known = distance < np.iinfo(np.int64).max
    row = np.where(known, rows[np.clip(chosen, 0, len(rows) - 1)], -1)
    asked = np.unique(wanted[known & (distance == 0)])
    return Filling(row, np.where(known, distance, 0), len(predicted.codes) - len(asked))


def _require_once(frames: Frames, what: str, first: int) -> None:
    width = int(frames.numbers.max(initial=0)) + 1
    key = frames.codes * width + frames.numbers
    _, places = np.unique(key, return_index=True)
    if len(places) == len(key):
        return
    again = int(np.setdiff1d(np.arange(len(key)), places)[0])
    name = f"{frames.videos[frames.codes[again]]}/{frames.numbers[again]:05d}"
    raise DataError(f"{what} {again + first}: frame {name} is there a second time; each frame is answered once")


# ------------------------------------------------------------------------------------------------------ answers


def columns_of(track: str) -> tuple[str, ...]:
    """Return the columns of a predictions table that the answers of a track are made from."""
    return tuple(name for field in _track(track).fields for name in _COLUMNS[field])


def decide(
    track: str, columns: Mapping[str, np.ndarray], thresholds: float | Mapping[str, float] = 0.5
) -> dict[str, np.ndarray]:
    """Return the answers of a track for each predicted row, by field.

    Args:
        track: Key of ``TRACKS``.
        columns: Predicted numbers by column of a predictions table ``(N,)``: ``valence``, ``arousal``, probabilities
            ``expression_<class>`` and ``au<number>_occurrence``.
        thresholds: From which probability an action unit is present: one for all, or by name (``AU1``).

    Returns:
        ``va`` float64 ``(N, 2)``, ``expr`` int64 ``(N, 1)``, ``au`` int64 ``(N, 12)``.

    Raises:
        ConfigError: If there is no such track, or a threshold is no probability.
        DataError: If a column is missing, or a number is not finite or not in its range.
    """
    found = {}
    for field in _track(track).fields:
        names = _COLUMNS[field]
        if field == "expr":  # a model need not know all eight classes
            names = tuple(name for name in names if name in columns)
        missing = [name for name in names if name not in columns]
        if missing or not names:
            raise DataError(
                f"the predictions have no column {(missing or _COLUMNS[field])[0]}, which track={track} needs; "
                "predict with a model of that task"
            )
        values = np.stack([np.asarray(columns[name], np.float64) for name in names], 1)
        low = -1.0 if field == "va" else 0.0
        bad = ~((values >= low - 1e-6) & (values <= 1 + 1e-6))
        if bad.any():
            row, column = np.argwhere(bad)[0]
            raise DataError(
                f"predictions, row {row}: {names[column]}={values[row, column]:g} must lie between {low:g} and 1"
            )
        if field == "va":
            found[field] = values.clip(-1, 1)
        elif field == "expr":
            known = np.array([_COLUMNS[field].index(name) for name in names])
            found[field] = known[values.argmax(1)][:, None]
        else:
            found[field] = (values.astype(np.float32) >= _thresholds(thresholds)).astype(np.int64)
    return found


def _thresholds(given: float | Mapping[str, float]) -> np.ndarray:
    names = [labels.au_output(number) for number in _AUS]
    by_name = dict.fromkeys(names, given) if not isinstance(given, Mapping) else dict(given)
    for name in by_name:
        if name not in names:
            raise ConfigError(f"thresholds: no action unit {name}; {near(str(name), names)}")
    for name in names:
        value = by_name.get(name)
        if isinstance(value, bool) or not isinstance(value, int | float) or not 0 <= value <= 1:
            raise ConfigError(f"thresholds: {name}={value}; a probability between 0 and 1 is needed for each AU")
    return np.array([by_name[name] for name in names], np.float32)


def write_submission(
    path: str | Path, track: str, images: pa.Array, filling: Filling, answers: Mapping[str, np.ndarray]
) -> None:
    """Write the file of a track.

    Args:
        path: File to write.
        track: Key of ``TRACKS``.
        images: Location of each line ``(N,)``, as the sample file has it.
        filling: What ``fill`` returned for the lines.
        answers: What ``decide`` returned for the predictions.
    """
    columns: list[pa.Array] = [images]
    unknown = filling.row < 0
    for field in _track(track).fields:
        values = answers[field][filling.row] if len(answers[field]) else np.zeros((len(images), _WIDTH[field]))
        values = np.where(unknown[:, None], 0, values)
        # Six digits are finer than annotators and shorter than what a float32 prints; + 0 makes -0 a 0.
        values = np.round(values, 6) + 0.0 if field == "va" else values.astype(np.int64)
        columns += [pa.array(np.ascontiguousarray(column)) for column in values.T]
    table = pa.table(columns, names=[str(k) for k in range(len(columns))])
    with replacing(Path(path)) as part, part.open("wb") as file:
        file.write(f"{_track(track).header}\n".encode())
        options = pa_csv.WriteOptions(include_header=False, quoting_style="none")
        pa_csv.write_csv(table, file, options)


def _track(name: str) -> Track:
    if name not in TRACKS:
        raise ConfigError(f"track={name}: {near(str(name), TRACKS)}")
    return TRACKS[name]
