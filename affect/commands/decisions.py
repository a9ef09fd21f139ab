# SPDX-License-Identifier: Apache-2.0
"""From probabilities to decisions: thresholds that are tuned on the validation part, smoothing over a video's frames.

Neither is on by default. Both are stored with a release and stand beside every number, since a number at tuned
thresholds says something else than one at 0.5.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from typing import Any

import numpy as np
import torch

from affect.commands.inference import encode_truth
from affect.data.images import Source
from affect.data.protocol import faceless_rows
from affect.data.table import FaceTable
from affect.errors import CheckpointError, ConfigError, near
from affect.metrics import F1, BinaryRates, best_thresholds
from affect.tasks import Task

FIXED, TUNED = "fixed", "tuned"
RULES = (FIXED, TUNED)

Thresholds = Mapping[str, Mapping[str, float]]
"""Threshold by task and output."""


# ------------------------------------------------------------------------------------------------- thresholds


def check_rule(thresholds: Any, selection: str | None = None) -> None:  # noqa: ANN401
    """Refuse an unknown rule, and one that would tune on the part that is reported.

    Raises:
        ConfigError: If ``thresholds`` is no rule, or ``selection`` leaves no part to tune on.
    """
    if thresholds not in RULES:
        raise ConfigError(f"thresholds={thresholds}: {near(str(thresholds), RULES)}")
    if thresholds == TUNED and selection == "best_on_test":
        raise ConfigError("thresholds=tuned with selection=best_on_test would tune on the test part; use best_val")


def decided(tasks: Mapping[str, Task]) -> Iterator[tuple[str, Task, list[F1 | BinaryRates]]]:
    """Yield name, task and metrics with thresholds of every task that has such metrics."""
    for name, task in tasks.items():
        metrics = [metric for metric in task.metrics if isinstance(metric, F1 | BinaryRates)]
        if metrics:
            yield name, task, metrics


def tune(table: FaceTable, tasks: Mapping[str, Task]) -> dict[str, dict[str, float]]:
    """Return for each output of each task with thresholds the one of the highest F1 on a predictions table.

    An output without positives keeps that of its metric.

    Args:
        table: Predictions on the validation part.
        tasks: Bound tasks.
    """
    found: dict[str, dict[str, float]] = {}
    names = table.truth().names
    for name, task, metrics in decided(tasks):
        if not task.columns(names):
            continue
        values, encoded = task.read_values(table), encode_truth(table, task)
        predicted, target, mask = map(torch.from_numpy, (np.asarray(values), encoded.target, encoded.mask))
        best = best_thresholds(predicted, target, mask, default=float("nan")).numpy()
        kept = np.broadcast_to(np.asarray(metrics[0].threshold, np.float64), best.shape)
        best = np.where(np.isnan(best), kept, best)
        found[name] = dict(zip(task.outputs, best.tolist(), strict=True))
    return found


def apply(tasks: Mapping[str, Task], thresholds: Thresholds) -> None:
    """Let the metrics of tasks decide at the given thresholds; a task that is not named keeps its own.

    Raises:
        CheckpointError: If a task is named without a threshold for each of its outputs.
    """
    for name, task, metrics in decided(tasks):
        if name in thresholds:
            missing = [output for output in task.outputs if output not in thresholds[name]]
            if missing:
                raise CheckpointError(f"thresholds of task {name}: none for {missing[0]}")
            for metric in metrics:
                metric.threshold = tuple(float(thresholds[name][output]) for output in task.outputs)


def describe(tasks: Mapping[str, Task], rule: str, rows: int | None = None, note: str | None = None) -> dict[str, Any]:
    """Return what results and releases say of the thresholds at which their numbers were decided, ready for JSON.

    Args:
        tasks: Bound tasks, whose metrics decide.
        rule: ``fixed`` or ``tuned``.
        rows: Rows that tuned them.
        note: Where they were tuned, if not on this run's validation part.
    """
    values = {}
    for name, task, metrics in decided(tasks):
        each = np.broadcast_to(np.asarray(metrics[0].threshold, np.float64), (task.num_outputs,))
        values[name] = dict(zip(task.outputs, each.tolist(), strict=True))
    said: dict[str, Any] = {"rule": rule, "values": values}
    return said if rule == FIXED else said | {"part": "validation", "rows": rows} | ({"note": note} if note else {})


def read_thresholds(preprocess: Mapping[str, Any], where: str) -> dict[str, Any] | None:
    """Return the thresholds that a release holds, None if it holds none.

    Raises:
        CheckpointError: If they are damaged.
    """
    found = preprocess.get("thresholds")
    if found is None:
        return None
    values = found.get("values") if isinstance(found, Mapping) else None
    tables = list(values.values()) if isinstance(values, Mapping) else [None]
    whole = all(
        isinstance(table, Mapping)
        and all(isinstance(x, int | float) and not isinstance(x, bool) and 0 <= x <= 1 for x in table.values())
        for table in tables
    )
    if not whole or found.get("rule") not in RULES:
        raise CheckpointError(f"{where}: thresholds must hold a rule and a number in [0, 1] for each output")
    return dict(found)


def decide(task: Task, values: np.ndarray, thresholds: Mapping[str, float] | None = None) -> np.ndarray:
    """Return which values reach their threshold, bool ``(N, K)``.

    Args:
        task: Whose values they are.
        values: Probabilities ``(N, K)``.
        thresholds: Threshold by output; None decides at 0.5.

    Raises:
        CheckpointError: If an output has no threshold.
    """
    missing = [output for output in task.outputs if thresholds is not None and output not in thresholds]
    if missing:
        raise CheckpointError(f"thresholds: none for {missing[0]}")
    limits = [0.5 if thresholds is None else thresholds[output] for output in task.outputs]
    return np.asarray(values, np.float32) >= np.array(limits, np.float32)


# -------------------------------------------------------------------------------------------------- smoothing


def check_window(window: Any) -> int:  # noqa: ANN401
    """Return a window in frames; none and 0 mean no smoothing.

    Raises:
        ConfigError: If it is no number of frames.
    """
    if window is None:
        return 0
    if not isinstance(window, int) or isinstance(window, bool) or window < 0:
        raise ConfigError(f"smoothing={window}: give the window in frames, e.g. 15, or 0 for none")
    return window


def moving_average(
    values: np.ndarray, sequence: np.ndarray, frame: np.ndarray, counts: np.ndarray, window: int
) -> np.ndarray:
    """Return values averaged over the frames of a video that are near in time.

    The mean is over ``window`` frame numbers around a row's own (one more after it than before, if even): frames that
    are not there leave the mean to those that are, and nothing reaches over a gap or into another video. A row without
    any frame that counts keeps its value.

    Args:
        values: ``(N, K)``.
        sequence: Number of the video of each row ``(N,)``; negative for a row that belongs to none, which stays.
        frame: Number of the frame in its video ``(N,)``.
        counts: Whether a row contributes ``(N,)``: not where no face was found.
        window: Frames.
    """
    inside = np.flatnonzero(sequence >= 0)
    if window < 2 or not len(inside):
        return values
    sequence, frame = sequence[inside].astype(np.int64), frame[inside].astype(np.int64)
    frame = frame - frame.min()
    stride = int(frame.max()) + 2 * window  # so far apart that no window reaches another video
    key = sequence * stride + frame
    order = np.argsort(key, kind="stable")
    key, rows = key[order], inside[order]
    first = np.searchsorted(key, key - (window - 1) // 2, "left")
    last = np.searchsorted(key, key + window // 2, "right")
    number = np.concatenate([[0], np.cumsum(counts[rows])])
    held = number[last] - number[first]
    smooth = np.array(values, copy=True)
    for column in range(values.shape[1]):  # one column at a time, so that memory stays small for millions of rows
        given = np.where(counts[rows], values[rows, column], 0).astype(np.float64)
        total = np.concatenate([[0.0], np.cumsum(given)])
        mean = (total[last] - total[first]) / np.maximum(held, 1)
        smooth[rows, column] = np.where(held > 0, mean, values[rows, column])
    return smooth


def smooth_values(
    values: dict[str, np.ndarray],
    sources: Sequence[Source],
    tasks: Mapping[str, Task],
    source_index: np.ndarray,
    rows: np.ndarray,
    window: int,
) -> list[str]:
    """Smooth predictions in place over the frames of each ``sequence``; points stay, which are pixels of each image.

    Args:
        values: Values by task.
        sources: Sources that the rows come from.
        tasks: Tasks by name.
        source_index: Index of the source of each row ``(N,)``.
        rows: Row in its source ``(N,)``.
        window: Frames; fewer than two change nothing.

    Returns:
        Sentences on what was not smoothed.

    Raises:
        ConfigError: If no source has videos with frame numbers.
    """
    if window < 2:
        return []
    sequence, frame = np.full(len(rows), -1, np.int64), np.zeros(len(rows), np.int64)
    counts = np.ones(len(rows), bool)
    used, notes, known = 0, [], 0
    for index, source in enumerate(sources):
        where = np.flatnonzero(source_index == index)
        if not len(where):
            continue
        own = rows[where]
        counts[where] = ~np.isin(own, faceless_rows(source.table))
        if not {"sequence", "frame"} <= source.table.names:
            notes.append(f"{source.name}: no columns sequence and frame, so its predictions are not smoothed")
            continue
        codes, names = source.table.codes("sequence")
        numbers, valid = source.table.numbers("frame", own)
        valid &= codes[own] >= 0
        sequence[where[valid]] = codes[own][valid] + used
        frame[where[valid]] = numbers[valid].astype(np.int64)
        used, known = used + len(names), known + int(valid.sum())
    if not known:
        raise ConfigError(
            f"smoothing={window}: no row belongs to a video (columns sequence and frame); use smoothing=0"
        )
    for name in values:
        if tasks[name].landmark_scheme is None:
            values[name] = moving_average(values[name], sequence, frame, counts, window).astype(values[name].dtype)
    return notes
