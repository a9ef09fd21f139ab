# SPDX-License-Identifier: Apache-2.0
"""Predictions of a model on a part of the data, as a table, and every number that follows from that table alone."""

from __future__ import annotations

import fnmatch
from collections.abc import Collection, Mapping, Sequence
from typing import Any

import numpy as np
import torch
from tqdm import tqdm

from affect.data.dataset import turned
from affect.data.images import Source
from affect.data.protocol import FACE, Protocol, faceless_rows, group_codes
from affect.data.table import TARGET_PREFIX, FaceTable
from affect.errors import ConfigError, DataError, near
from affect.foreign import Predictor
from affect.geometry import invert, transform_points
from affect.metrics import AlignmentError, Answers, evaluate, evaluate_sums
from affect.tasks import AUIntensity, AUOccurrence, Encoded, Expression, Task
from affect.tasks.base import require_own_columns

CROP = "crop_matrix"
"""Column of prepared tables: six numbers from pixels of the photograph to pixels of the stored crop."""

CARRIED = ("subject", "sequence", "frame", "image", FACE)
BY_PREFIX = "by_"
"""Prefix of the columns that subgroups are made of, so that none of them takes the place of a prediction."""

SUBSET_PREFIX = "subset_"
"""Prefix of the columns that say which rows belong to a subset of the protocol."""

CLASSES_BY_SOURCE = "expressions_by_source"
"""Key of the metadata that says which classes each source can label."""


def predict_values(
    module: Predictor,
    loader: torch.utils.data.DataLoader,
    device: torch.device,
    title: str,
    tasks: Collection[str] | None = None,
) -> tuple[dict[str, np.ndarray], np.ndarray, np.ndarray]:
    """Return values by task, source index and row of each sample, in loader order, with a progress bar.

    Landmarks are in pixels of the stored image, and the roll of a head is that in it, after undoing the crop.
    ``tasks`` names those whose values are wanted; None wants all of the module's.
    """
    module.eval().to(device)
    values: dict[str, list[np.ndarray]] = {name: [] for name in module.tasks if tasks is None or name in tasks}
    sources, rows = [], []
    with torch.inference_mode():
        for batch in tqdm(loader, desc=title, leave=False, unit="batch"):
            predicted = module.predict_step(batch.to(device))
            matrices = batch.matrix.numpy().astype(np.float64)
            inverse, degrees, flipped = invert(matrices), turned(matrices), batch.flipped.numpy()
            height, width = batch.image.shape[-2:]
            for name in values:
                array = predicted[name].cpu().numpy()
                if module.tasks[name].landmark_scheme is not None:
                    pixels = array.astype(np.float64) * [width, height] - 0.5
                    array = transform_points(inverse, pixels).astype(np.float32)
                else:
                    array = module.tasks[name].unturn(array, degrees, flipped)
                values[name].append(array)
            sources.append(batch.source.numpy())
            rows.append(batch.row.numpy())
    return {n: np.concatenate(v) for n, v in values.items()}, np.concatenate(sources), np.concatenate(rows)


def predictions_table(
    sources: Sequence[Source],
    tasks: Mapping[str, Task],
    values: Mapping[str, np.ndarray],
    source_index: np.ndarray,
    rows: np.ndarray,
    group: str | Sequence[str | None] | None = None,
    group_by: Sequence[str] = (),
    subsets: Mapping[str, str] | None = None,
) -> FaceTable:
    """Return a face table of predicted columns, with true labels under ``target_``, group and origin of each row.

    Groups are those of the split: a row whose group is not known is one of its own, and with several sources a group
    carries its source's name. Columns of ``group_by`` are stored under ``by_``, subsets under ``subset_``. The metadata
    has the classes that each source can label and the folder that its image paths are relative to.

    Args:
        sources: Sources that the rows come from.
        tasks: Tasks by name.
        values: Predicted values by task.
        source_index: Index of the source of each row ``(N,)``.
        rows: Row in its source ``(N,)``.
        group: Replaces the sources' own group, as ``protocol.group`` does; one for all, or one for each.
        group_by: Columns to make subgroups of.
        subsets: Columns, or ``column=value``, by the name of a subset of rows.

    Raises:
        ConfigError: If a column of ``group_by`` does not exist, or two things would be written to one column.
    """
    require_own_columns(tasks)
    require_subset_columns(sources, subsets or {})
    own_groups = [group] * len(sources) if group is None or isinstance(group, str) else list(group)
    columns: dict[str, Any] = {}
    for name, task in tasks.items():
        columns.update(task.decode(values[name]))
    merged: dict[str, np.ndarray] = {}
    for index, source in enumerate(sources):
        where = np.flatnonzero(source_index == index)
        if len(where):
            own = rows[where]
            found = _row_columns(source, tasks, own, own_groups[index], group_by, len(sources) > 1)
            for name, spec in (subsets or {}).items():
                found[SUBSET_PREFIX + name] = subset_rows(source.table, spec, own).astype(object)
            for column, cells in found.items():
                merged.setdefault(column, np.full(len(rows), None, dtype=object))[where] = cells
    for column in sorted({*merged, "row"} & columns.keys()):
        raise ConfigError(f"a task predicts column {column}, which a predictions table keeps for itself; rename it")
    columns.update({column: cells.tolist() for column, cells in merged.items()})
    columns["row"] = rows
    first = sources[int(source_index[0])] if len(source_index) else sources[0]
    expressions = next(
        (list(t.outputs) for t in tasks.values() if isinstance(t, Expression)), list(first.table.expressions)
    )
    metadata: dict[str, Any] = {
        "dataset": first.name,
        "expressions": expressions,
        CLASSES_BY_SOURCE: {source.name: list(source.table.expressions) for source in sources},
        "roots": {source.name: str(source.table.root.absolute()) for source in sources},
        "label_source": "predictions of a model",
    }
    return FaceTable.from_columns(columns, first.table.root, metadata)


def subset_rows(table: FaceTable, spec: str, rows: np.ndarray) -> np.ndarray:
    """Return whether each of ``rows`` belongs to a subset, bool ``(M,)``; not where the column is missing or null.

    Args:
        table: The table.
        spec: A column that is 1 in the subset, or ``column=value``.
        rows: Rows ``(M,)``.
    """
    column, _, value = spec.partition("=")
    if column not in table.names:
        return np.zeros(len(rows), bool)
    if value:
        texts, valid = table.strings(column, rows)
        return valid & (texts == value)
    numbers, valid = table.numbers(column, rows)
    return valid & (numbers == 1)


def require_subset_columns(sources: Sequence[Source], subsets: Mapping[str, str]) -> None:
    """Raise ``ConfigError`` if no source has the column of a subset."""
    names = frozenset().union(*(source.table.names for source in sources))
    for name, spec in subsets.items():
        column = str(spec).partition("=")[0]
        if column not in names:
            raise ConfigError(f"protocol.subsets.{name}: no column {column!r} in the table; {near(column, names)}")


def require_absent_values(
    sources: Sequence[Source], tasks: Mapping[str, Task], protocols: Sequence[Protocol], rows: Sequence[np.ndarray]
) -> None:
    """Refuse ``missing_faces=negative`` where rows without a found face have labels that know no absence.

    Args:
        sources: Sources that are evaluated.
        tasks: Tasks by name.
        protocols: The protocol of each source.
        rows: Evaluated rows of each source.

    Raises:
        DataError: With the first task that is no task of action units and has labels there.
    """
    for source, protocol, chosen in zip(sources, protocols, rows, strict=True):
        missing = np.intersect1d(faceless_rows(source.table), chosen)
        if protocol.missing_faces != "negative" or not len(missing):
            continue
        for name, task in tasks.items():
            if isinstance(task, AUOccurrence | AUIntensity) or not task.columns(source.table.names):
                continue
            labelled = int(task.encode(source.table, missing).mask.any(1).sum())
            if labelled:
                raise DataError(
                    f"{source.name}: protocol.missing_faces=negative counts action units as absent where no face was "
                    f"found, but task {name} has labels in {labelled} such rows and no absent value; use "
                    "protocol.missing_faces=fallback or drop"
                )


def count_as_absent(
    values: Mapping[str, np.ndarray],
    sources: Sequence[Source],
    tasks: Mapping[str, Task],
    protocols: Sequence[Protocol],
    source_index: np.ndarray,
    rows: np.ndarray,
) -> None:
    """Set predictions of action units to 0 in place in rows without a found face where the protocol says so."""
    for index, (source, protocol) in enumerate(zip(sources, protocols, strict=True)):
        if protocol.missing_faces == "negative":
            absent = (source_index == index) & np.isin(rows, faceless_rows(source.table))
            for name, task in tasks.items():
                if isinstance(task, AUOccurrence | AUIntensity) and name in values:
                    values[name][absent] = 0


def _row_columns(
    source: Source,
    tasks: Mapping[str, Task],
    rows: np.ndarray,
    group: str | None,
    group_by: Sequence[str],
    several: bool,
) -> dict[str, np.ndarray]:
    """Return what a predictions table says of ``rows`` of a source beside the predictions, object ``(N,)`` each."""
    table = source.table
    for column in group_by:
        if column not in table.names:
            raise ConfigError(f"group_by: no column {column!r} in the table; {near(column, table.names)}")
    placed = (CROP,) if any(task.landmark_scheme is not None for task in tasks.values()) else ()
    stored = {name: name for name in (*CARRIED, *placed) if name in table.names}
    stored |= {BY_PREFIX + name: name for name in group_by}
    stored |= {TARGET_PREFIX + name: name for task in tasks.values() for name in task.columns(table.names)}
    taken = table.take(rows)
    found: dict[str, np.ndarray] = {}
    for column, name in stored.items():
        found[column] = np.empty(len(rows), dtype=object)
        found[column][:] = taken.arrow[name].to_pylist()
    codes, names = group_codes(table, group or source.group)
    groups = names[codes[rows]]
    found["group"] = np.array([f"{source.name}/{name}" for name in groups] if several else groups, dtype=object)
    found["source"] = np.full(len(rows), source.name, dtype=object)
    return found


def encode_truth(table: FaceTable, task: Task) -> Encoded:
    """Return targets and masks of a predictions table's true labels, as training saw them.

    A class that a row's source can never label takes no part in it, whatever the other sources can label.
    """
    truth = table.truth()
    by_source = table.metadata.get(CLASSES_BY_SOURCE)
    if not isinstance(by_source, Mapping) or "source" not in table.names:
        return task.encode(truth)
    encoded = task.encode(truth)
    target, mask = encoded.target.copy(), encoded.mask.copy()
    names = table.strings("source")[0]
    for name, classes in by_source.items():
        rows = np.flatnonzero(names == name)
        if len(rows) and classes:
            target[rows], mask[rows] = task.encode(truth.with_metadata(expressions=classes), rows)
    return Encoded(target, mask)


def measured(table: FaceTable, task: Task) -> tuple[np.ndarray, Encoded]:
    """Return the values of a predictions table, and its targets and masks, as metrics compare them.

    Landmarks of prepared crops, predicted and true ones, are turned back into pixels of the photograph: a crop may be
    rotated, and the box around points is not the same in it.

    Args:
        table: Predictions with true labels.
        task: One of its tasks.
    """
    values, encoded = np.asarray(task.read_values(table)), encode_truth(table, task)
    if task.landmark_scheme is None or CROP not in table.names:
        return values, encoded
    numbers, known = table.numbers(CROP)
    whole = np.array([1.0, 0.0, 0.0, 0.0, 1.0, 0.0])
    back = invert(np.where(known[:, None], numbers, whole).reshape(-1, 2, 3))
    target = np.where(encoded.mask[..., None], transform_points(back, encoded.target), 0)
    return transform_points(back, values), Encoded(target, encoded.mask)


def error_lengths(tasks: Mapping[str, Task]) -> dict[str, str]:
    """Return by landmark task the length that its errors are in per cent of, e.g. ``inter_ocular``."""
    found = {}
    for name, task in tasks.items():
        metric = next((each for each in task.metrics if isinstance(each, AlignmentError)), None)
        if metric is not None:
            found[name] = metric.normaliser
    return found


def table_metrics(
    table: FaceTable,
    tasks: Mapping[str, Task],
    resamples: int = 1000,
    level: float = 0.95,
    seed: int = 0,
    group_by: Sequence[str] = (),
) -> list[dict[str, Any]]:
    """Return the metric records of a predictions table; a pure function of the table.

    Subsets are those that the table has columns of. Each record has ``task``, ``name``, ``value``, ``low``, ``high``
    (bootstrap over groups), ``constant`` (the best constant prediction on these rows), ``n`` and, for subgroups,
    ``subgroup``.
    """
    truth = table.truth()
    groups = table.strings("group")[0] if "group" in table.names else None
    subsets = {
        column.removeprefix(SUBSET_PREFIX): table.numbers(column)[0] > 0
        for column in table.arrow.column_names
        if column.startswith(SUBSET_PREFIX)
    }
    records: list[dict[str, Any]] = []
    for name, task in tasks.items():
        if not task.metrics or not task.columns(truth.names):
            continue
        values, encoded = measured(table, task)
        subgroups = {column: table.strings(BY_PREFIX + column)[0] for column in group_by}
        found = evaluate(
            task.metrics,
            torch.from_numpy(values),
            torch.from_numpy(encoded.target),
            torch.from_numpy(encoded.mask),
            groups=groups,
            subgroups=subgroups or None,
            resamples=resamples,
            level=level,
            seed=seed,
            subsets=subsets,
        )
        records += [{"task": name, **record} for record in found]
    return records


# ------------------------------------------------------------------------------------------------ headline


def resolve_headline(
    headline: Mapping[str, Sequence[str]] | None, tasks: Mapping[str, Task]
) -> tuple[dict[str, list[tuple[str, str]]], list[str]]:
    """Return the terms (task, number) of each sum of a protocol's headline, and notes on sums that are left out.

    Args:
        headline: Terms ``<task>/<number>`` by name; ``*`` stands for the parameter of a number, as in ``fr/*``, and for
            how a task's name goes on, as in ``landmarks*``: where several tasks fit, each has a sum of its own.
        tasks: Bound tasks; a sum with a term of another task is left out.

    Raises:
        ConfigError: If a task has no such number, or several fit, or more is better for one term and less for another.
    """
    resolved: dict[str, list[tuple[str, str]]] = {}
    notes = []
    for name, terms in _named_sums(headline or {}, tasks).items():
        found, directions = [], set()
        absent = sorted({term.partition("/")[0] for term in terms} - tasks.keys())
        if absent:
            notes.append(f"headline {name} is left out: task {absent[0]} is not selected")
            continue
        for term in terms:
            task, _, wanted = term.partition("/")
            known = {number: metric for metric in tasks[task].metrics for number in metric.names}
            fitting = [number for number in known if number == wanted] or fnmatch.filter(known, wanted)
            if len(fitting) != 1:
                several = f"fits {', '.join(fitting)}" if fitting else f"no such number; {near(wanted, known)}"
                raise ConfigError(f"protocol.headline.{name}: {term}: {several}")
            found.append((task, fitting[0]))
            directions.add(known[fitting[0]].higher(fitting[0]))
        if len(directions) > 1:
            raise ConfigError(f"protocol.headline.{name}: more is better for one term and less for another")
        resolved[name] = found
    return resolved, notes


def _named_sums(headline: Mapping[str, Sequence[str]], tasks: Mapping[str, Task]) -> dict[str, Sequence[str]]:
    """Return the sums of a headline with the names of tasks instead of patterns; patterns that fit none stay."""
    sums: dict[str, Sequence[str]] = {}
    for name, terms in headline.items():
        patterns = sorted({task for task in (term.partition("/")[0] for term in terms) if "*" in task})
        if len(patterns) > 1:
            raise ConfigError(f"protocol.headline.{name}: {' and '.join(patterns)}: one pattern of tasks at most")
        fitting = [task for pattern in patterns for task in fnmatch.filter(tasks, pattern)]
        if not fitting:
            sums[name] = terms
        for task in fitting:
            label = name if len(fitting) == 1 else f"{name} of {task}"
            sums[label] = [term.replace(f"{patterns[0]}/", f"{task}/", 1) for term in terms]
    return sums


def headline_records(
    table: FaceTable,
    tasks: Mapping[str, Task],
    headline: Mapping[str, Sequence[tuple[str, str]]],
    resamples: int = 1000,
    level: float = 0.95,
    seed: int = 0,
) -> list[dict[str, Any]]:
    """Return the records of the sums of a headline; a pure function of the predictions table.

    Args:
        table: Predictions with true labels.
        tasks: Bound tasks.
        headline: Terms as ``resolve_headline`` gives them; sums of tasks without labels here are left out.
        resamples: Resamples of the bootstrap over groups, drawn once for all terms.
        level: Share of resamples inside the interval.
        seed: Seed of the bootstrap.
    """
    names = table.truth().names
    wanted = {name: terms for name, terms in headline.items() if all(tasks[task].columns(names) for task, _ in terms)}
    answers = {}
    for name in dict.fromkeys(task for terms in wanted.values() for task, _ in terms):
        values, encoded = measured(table, tasks[name])
        arrays = (values, encoded.target, encoded.mask)
        answers[name] = Answers(tasks[name].metrics, *map(torch.from_numpy, arrays))
    groups = table.strings("group")[0] if "group" in table.names else None
    return evaluate_sums(wanted, answers, groups, resamples, seed, level)
