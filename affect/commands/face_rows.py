# SPDX-License-Identifier: Apache-2.0
"""Rows of the tables that ``affect predict`` writes: one for each face of a frame, and one for a frame without any.

``Columns`` gives them the names that Py-Feat's and OpenFace's users know (``affect.report.predictions``),
``FaceTableParts`` those of labels, so that ``affect train`` can learn from predictions.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa

from affect.commands import decisions
from affect.commands.predictor import FaceValues, Predictor
from affect.data.table import FaceTable
from affect.data.video import Frame
from affect.errors import ConfigError
from affect.geometry import FaceObservation
from affect.geometry.tracking import TrackedFace
from affect.report.predictions import POSE, decision_name, point_names, published_names, scattered, table_schema
from affect.tasks import Task
from affect.tasks.base import require_own_columns


@dataclass
class Rows:
    """Faces of some frames, and what was read in them.

    Attributes:
        frames: The frames.
        frame: Index into ``frames`` of each row ``(R,)``; a frame without a face has one row.
        face: Number of the face within its frame ``(R,)``, -1 in a row without a face.
        track: Number of the face within its video ``(R,)``, -1 where there is none.
        observations: What the finder says of each row with a face, in their order.
        values: Values by task, one row for each observation.
    """

    frames: Sequence[Frame]
    frame: np.ndarray
    face: np.ndarray
    track: np.ndarray
    observations: list[FaceObservation]
    values: dict[str, np.ndarray]

    @property
    def seen(self) -> np.ndarray:
        """Rows with a face ``(F,)``."""
        return np.flatnonzero(self.face >= 0)


def make_rows(frames: Sequence[Frame], faces: Sequence[Sequence[TrackedFace]], read: FaceValues) -> Rows:
    """Return rows of frames and their faces; a face that cannot be cropped counts as not found."""
    frame, face, track, observations = [], [], [], []
    usable = iter(read.usable.tolist())
    for k, found in enumerate(faces):
        kept = [tracked for tracked in found if next(usable)]
        frame += [k] * max(len(kept), 1)
        face += list(range(len(kept))) or [-1]
        track += [tracked.track for tracked in kept] or [-1]
        observations += [tracked.observation for tracked in kept]
    return Rows(frames, np.array(frame), np.array(face), np.array(track), observations, read.values)


class Columns:
    """The columns of the table that a predictor and a finder give.

    Args:
        predictor: Says which tasks and thresholds there are.
        scheme: Scheme of the finder's points.
        metadata: What the file says of itself.
    """

    def __init__(self, predictor: Predictor, scheme: str, metadata: Mapping[str, Any]) -> None:
        self.tasks, self.scheme = predictor.tasks, scheme
        self.thresholds = {} if predictor.thresholds is None else predictor.thresholds["values"]
        require_own_columns(self.tasks)
        self.by_task: dict[str, list[str]] = {}
        outputs: dict[str, pa.DataType] = {}
        for name, task in self.tasks.items():
            one = self._published(name, task, _blank(task))
            doubled = sorted(set(one) & set(outputs))
            if doubled:
                raise ConfigError(f"two tasks of the checkpoint give a column {doubled[0]}; remove one of them")
            outputs |= {column: pa.array(cells).type for column, cells in one.items()}
            self.by_task[name] = list(one)
        self.schema = table_schema(scheme, outputs, {**metadata, "columns": self.by_task})

    def table(self, rows: Rows, name: str | None = None) -> pa.Table:
        """Return rows under published names.

        Args:
            rows: Rows.
            name: What ``input`` holds; None takes the name of each frame.
        """
        size, seen = len(rows.frame), rows.seen
        index = np.array([frame.index for frame in rows.frames], np.int32)
        times = np.array([np.nan if f.timestamp is None else f.timestamp for f in rows.frames], np.float64)
        every = np.arange(size)
        columns: dict[str, pa.Array] = {
            "frame": pa.array(index[rows.frame]),
            "timestamp": scattered(times[rows.frame], every, size),
            "face": scattered(rows.face[seen].astype(np.int32), seen, size),
            "success": pa.array((rows.face >= 0).astype(np.int8)),
            "input": pa.array([name or rows.frames[k].name for k in rows.frame], pa.string()),
        }
        tracked = np.flatnonzero(rows.track >= 0)
        columns["track"] = scattered(rows.track[tracked].astype(np.int32), tracked, size)
        if len(seen):
            given = self._observed(rows.observations)
            for task_name, task in self.tasks.items():
                given |= self._published(task_name, task, rows.values[task_name])
            columns |= {column: scattered(cells, seen, size) for column, cells in given.items()}
        return pa.table(columns)

    def _observed(self, observations: Sequence[FaceObservation]) -> dict[str, np.ndarray]:
        boxes = np.array([face.box for face in observations], np.float32)
        given = {
            "FaceRectX": boxes[:, 0],
            "FaceRectY": boxes[:, 1],
            "FaceRectWidth": boxes[:, 2] - boxes[:, 0],
            "FaceRectHeight": boxes[:, 3] - boxes[:, 1],
            "FaceScore": np.array([np.nan if f.score is None else f.score for f in observations], np.float32),
        }
        points = np.array([face.points for face in observations], np.float32)
        given |= _spread(point_names(self.scheme), points)
        poses = [(np.nan,) * 3 if f.pose is None else (f.pose.pitch, f.pose.roll, f.pose.yaw) for f in observations]
        return given | dict(zip(POSE, np.array(poses, np.float32).T, strict=True))

    def _published(self, name: str, task: Task, values: np.ndarray) -> dict[str, np.ndarray]:
        """Return the columns of a task, with decisions behind probabilities of a yes or no."""
        decoded = task.decode(values)
        given: dict[str, np.ndarray] = {}
        for column, cells in decoded.items():
            names = published_names(column, self.scheme)
            given |= (
                {names[0]: cells} if np.ndim(cells) == 1 else _spread(names, np.reshape(cells, (len(values), -1, 2)))
            )
        if task.flags and len(task.wanted()) == task.num_outputs and set(task.wanted()) <= set(decoded):
            decided = decisions.decide(task, values, self.thresholds.get(name))
            for k, column in enumerate(task.wanted()):
                given[decision_name(published_names(column, self.scheme)[0])] = decided[:, k].astype(np.int8)
        return given


def _blank(task: Task) -> np.ndarray:
    if task.landmark_scheme is not None:
        return np.zeros((1, task.num_outputs // 2, 2), np.float32)
    return np.zeros((1, task.num_outputs), np.float32)


def _spread(names: Sequence[str], points: np.ndarray) -> dict[str, np.ndarray]:
    """Return a column for each x, then each y, of points ``(N, P, 2)``."""
    return dict(zip(names, points.transpose(2, 1, 0).reshape(-1, len(points)), strict=True))


class FaceTableParts:
    """The same rows as a face table, under the names of labels, which ``affect train`` and ``submit`` read.

    Args:
        tasks: Tasks by name.
    """

    def __init__(self, tasks: Mapping[str, Task]) -> None:
        self.tasks = tasks
        self._parts: list[dict[str, pa.Array]] = []

    def __bool__(self) -> bool:
        return bool(self._parts)

    def add(self, rows: Rows) -> None:
        """Keep rows."""
        size, seen = len(rows.frame), rows.seen
        part: dict[str, pa.Array] = {
            "image": pa.array([rows.frames[k].name for k in rows.frame], pa.string()),
            "face": scattered(rows.face[seen].astype(np.int32), seen, size),
            "success": pa.array((rows.face >= 0).astype(np.float32)),
        }
        if len(seen):
            faces = rows.observations
            scheme = faces[0].scheme
            given: dict[str, np.ndarray] = {
                "box": np.array([face.box for face in faces], np.float32),
                f"landmarks_{scheme}": np.array([face.points for face in faces], np.float32).reshape(len(faces), -1),
                "score": np.array([np.nan if face.score is None else face.score for face in faces], np.float32),
            }
            for name, task in self.tasks.items():
                given |= task.decode(rows.values[name])
            part |= {name: _placed(cells, seen, size) for name, cells in given.items()}
        self._parts.append(part)

    def table(self, root: Path, name: str) -> FaceTable:
        """Return all rows as one table."""
        parts = [pa.table(part) for part in self._parts]
        whole = pa.concat_tables(parts, promote_options="default")
        metadata = {"dataset": name, "label_source": "predictions"}
        return FaceTable.from_arrow(whole, root, metadata)


def _placed(cells: np.ndarray, where: np.ndarray, size: int) -> pa.Array:
    """Return a column with ``cells`` ``(N,)`` or ``(N, width)`` in the rows ``where``, null elsewhere."""
    cells = np.asarray(cells)
    if cells.ndim == 1:
        return scattered(cells, where, size)
    full = np.zeros((size, cells.shape[1]), cells.dtype)
    full[where] = cells
    missing = np.ones(size, bool)
    missing[where] = False
    flat = pa.array(full.reshape(-1))
    return pa.FixedSizeListArray.from_arrays(flat, cells.shape[1], mask=pa.array(missing))
