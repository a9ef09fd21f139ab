# SPDX-License-Identifier: Apache-2.0
"""Pictures of predictions: annotated copies of photographs and videos, and what a face does over time."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from contextlib import ExitStack
from pathlib import Path
from types import TracebackType
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
from matplotlib.figure import Figure

from affect.commands.face_rows import Rows
from affect.data.video import FrameSource, VideoWriter, writable_codec
from affect.geometry import FaceObservation
from affect.report.figures import FaceNote, Panel, Timeline, annotate_faces, annotate_frame, save_image, timeline
from affect.report.predictions import read_batches
from affect.tasks import (
    Attributes,
    AUIntensity,
    AUOccurrence,
    Coefficients,
    Expression,
    HeadPose,
    Task,
    ValenceArousal,
)

MOST_BARS, MOST_BARS_IN_VIDEO = 8, 4
MOST_TIMELINES = 3
"""Faces of a video that get a timeline: those of the most frames."""
MOST_ROWS = 24
"""Rows of a heat map of a timeline: the signals that vary most."""
_PLAYED = 25.0
"""Frames per second of an annotated copy whose source tells no rate."""


def note(
    observation: FaceObservation, row: Mapping[str, Any], tasks: Mapping[str, Task], number: int | None = None
) -> FaceNote:
    """Return what is drawn for one face: its box, points, largest values, expression and place in the circumplex.

    Args:
        observation: Box and points.
        row: Decoded columns of the face.
        tasks: Tasks by name.
        number: Number of the face.
    """
    sets: dict[str, np.ndarray] = {}
    bars: dict[str, float] = {}
    limits: dict[str, float] = {}
    expression = affect = None
    for task_name, task in tasks.items():
        shown, full = task.bars(row)
        for name, value in shown.items():
            # Presence and intensity of an action unit have one name: the second one says whose it is.
            name = f"{name} ({task_name})" if name in bars else name
            bars[name], limits[name] = value, full
        if isinstance(task, Expression):
            best = str(row["expression"])
            expression = (best, float(row[f"expression_{best.replace(' ', '_')}"]))
        elif isinstance(task, ValenceArousal):
            affect = (float(row["valence"]), float(row["arousal"]))
        elif task.landmark_scheme is not None:
            scheme = task.landmark_scheme
            sets[f"{scheme} points"] = np.asarray(row[f"landmarks_{scheme}"]).reshape(-1, 2)
    # The finest scheme lies below the others; without any, the finder's own points are shown.
    finest, *further = sorted(sets, key=lambda name: -len(sets[name])) or [""]
    return FaceNote(
        observation.box,
        sets.get(finest, observation.points),
        expression,
        bars,
        1.0,
        affect,
        bar_limits=limits,
        number=number,
        further={name: sets[name] for name in further},
        points_name=finest,
    )


def frame_notes(rows: Rows, tasks: Mapping[str, Task], *, numbered: bool = False) -> dict[int, list[FaceNote]]:
    """Return what is drawn for the faces of frames, by the frame's index into ``rows.frames``.

    Args:
        rows: Faces and what was read in them.
        tasks: Tasks by name.
        numbered: Faces carry the number of their track.
    """
    notes: dict[int, list[FaceNote]] = {}
    decoded: dict[str, np.ndarray] = {}
    for name, values in rows.values.items():
        decoded |= tasks[name].decode(values)
    for k, (row, observation) in enumerate(zip(rows.seen.tolist(), rows.observations, strict=True)):
        cells = {column: column_values[k] for column, column_values in decoded.items()}
        number = int(rows.track[row]) if numbered else None
        notes.setdefault(int(rows.frame[row]), []).append(note(observation, cells, tasks, number))
    return notes


class Pictures:
    """Writes annotated copies: a picture of each photograph with a face, a video of each video.

    Args:
        folder: Where they are written.
        tasks: Tasks by name.
    """

    def __init__(self, folder: Path, tasks: Mapping[str, Task]) -> None:
        self.folder, self.tasks = folder, tasks
        self._open = ExitStack()
        self._video: VideoWriter | None = None
        self._source: FrameSource | None = None
        self._codec: tuple[str, str] | None = None

    def start(self, source: FrameSource) -> None:
        """Begin with a source; the video of the one before is complete with that."""
        self._open.close()
        self._video, self._source = None, source
        if source.moving:
            self._codec = self._codec or writable_codec(self.folder)

    def _writer(self) -> VideoWriter | None:
        """Return the writer of the video at hand: a camera tells its rate with its first frame only."""
        source = self._source
        if self._video is None and source is not None and source.moving:
            assert self._codec is not None
            codec, suffix = self._codec
            video = VideoWriter(self.folder / f"{source.name}{suffix}", source.rate or _PLAYED, codec)
            self._video = self._open.enter_context(video)
        return self._video

    def __enter__(self) -> Pictures:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._open.__exit__(kind, error, trace)

    def add(self, rows: Rows) -> None:
        """Draw frames."""
        video = self._writer()
        notes = frame_notes(rows, self.tasks, numbered=video is not None)
        for k, frame in enumerate(rows.frames):
            if frame.image is None:
                continue
            if video is not None:
                video.write(annotate_frame(frame.image, notes.get(k, []), top=MOST_BARS_IN_VIDEO))
            elif k in notes:
                name = frame.name if frame.name.endswith(".png") else f"{frame.name}.png"
                save_image(annotate_faces(frame.image, notes[k], top=MOST_BARS), self.folder / name)


# -------------------------------------------------------------------------------------------------- timelines


def timeline_panels(tasks: Mapping[str, Task], columns: Mapping[str, Sequence[str]]) -> list[Panel]:
    """Return what timelines show of tasks.

    Args:
        tasks: Tasks by name.
        columns: Columns of the predictions table by task.
    """
    panels = []
    for name, task in tasks.items():
        names = tuple(column for column in columns[name] if not column.endswith("_c"))
        if isinstance(task, Expression):
            classes = tuple(column for column in names if column != "expression")
            panels.append(Panel("expression, probability", classes, lines=True))
        elif isinstance(task, ValenceArousal):
            panels.append(Panel("valence and arousal", names, -1.0, 1.0, lines=True))
        elif isinstance(task, HeadPose):
            panels.append(Panel("head pose, degrees", names, -90.0, 90.0, lines=True))
        elif isinstance(task, AUOccurrence):
            panels.append(Panel("action units, probability", names))
        elif isinstance(task, AUIntensity):
            panels.append(Panel("action units, intensity", names, 0.0, 5.0))
        elif isinstance(task, Attributes):
            panels.append(Panel("attributes, probability", names))
        elif isinstance(task, Coefficients):
            low, high = (bound if np.isfinite(bound) else default for bound, default in ((task.low, 0), (task.high, 1)))
            panels.append(Panel(name, names, low, high))
    return panels


def timelines(path: Path, name: str, panels: Sequence[Panel]) -> list[tuple[int, Figure]]:
    """Return a timeline for each of the faces of a video that are in the most frames.

    The table is read twice in parts, so that memory does not grow with the video.

    Args:
        path: Parquet table of predictions.
        name: What ``input`` holds in the rows of the video.
        panels: What is shown.

    Returns:
        Number of the track and figure, the longest track first.
    """
    names = list(dict.fromkeys(column for panel in panels for column in panel.names))
    if not names:
        return []
    seen = np.zeros(0, np.int64)
    ends = {"timestamp": (np.inf, -np.inf), "frame": (np.inf, -np.inf)}
    timed = True
    for batch in read_batches(path, ["input", "track", "timestamp", "frame"]):
        mine = _rows_of(batch, name)
        tracks = mine["track"].drop_null().to_numpy()
        seen = _added(seen, np.bincount(tracks) if len(tracks) else np.zeros(0, np.int64))
        timed &= mine["timestamp"].null_count == 0
        for column, (first, last) in ends.items():
            values = mine[column].drop_null().to_numpy()
            if len(values):
                ends[column] = (min(first, float(values.min())), max(last, float(values.max())))
    clock = "timestamp" if timed else "frame"
    chosen = [int(track) for track in np.argsort(-seen, kind="stable")[:MOST_TIMELINES] if seen[track]]
    first, last = ends[clock]
    frames = int(ends["frame"][1] - ends["frame"][0]) + 1 if chosen else 0
    signals = {track: Timeline(names, first, last, min(960, max(frames, 1))) for track in chosen}
    for batch in read_batches(path, ["input", "track", clock, *names]) if chosen else ():
        mine = _rows_of(batch, name)
        track = pc.fill_null(mine["track"], -1).to_numpy(zero_copy_only=False)
        times = mine[clock].to_numpy(zero_copy_only=False)
        values = np.stack([mine[n].cast(pa.float64()).to_numpy(zero_copy_only=False) for n in names], 1)
        for number, signal in signals.items():
            signal.add(times[track == number], values[track == number])
    figures = []
    for number, signal in signals.items():
        title = f"{name}: face {number}" if len(seen) > 1 else name
        note = f"Face {number} is in {seen[number]:,} of {frames:,} frames; grey: it was not seen."
        shown = [_most_varying(panel, signal) for panel in panels]
        unit = "s" if timed else "frame"
        figures.append((number, timeline(signal, shown, title=title, unit=unit, note=note)))
    return figures


def _rows_of(batch: dict[str, pa.Array], name: str) -> dict[str, pa.Array]:
    mask = pc.equal(batch["input"], name)
    return {column: values.filter(mask) for column, values in batch.items()}


def _added(a: np.ndarray, b: np.ndarray) -> np.ndarray:
    """Return the sum of two counts of different length."""
    whole = np.zeros(max(len(a), len(b)), np.int64)
    whole[: len(a)] += a
    whole[: len(b)] += b
    return whole


def _most_varying(panel: Panel, signals: Timeline) -> Panel:
    if panel.lines or len(panel.names) <= MOST_ROWS:
        return panel
    means = signals.means()[:, [signals.names.index(name) for name in panel.names]]
    spread = np.nan_to_num(np.nanstd(means, axis=0))
    kept = sorted(np.argsort(-spread, kind="stable")[:MOST_ROWS].tolist())
    title = f"{panel.title} (the {MOST_ROWS} of {len(panel.names)} that vary most)"
    return Panel(title, tuple(panel.names[k] for k in kept), panel.low, panel.high)
