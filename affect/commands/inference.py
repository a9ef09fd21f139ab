# SPDX-License-Identifier: Apache-2.0
"""Predictions of a model on a part of the data, as a table, and every number that follows from that table alone."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
import torch
from tqdm import tqdm

from affect.data.datamodule import FaceDataModule
from affect.data.images import Source
from affect.data.table import TARGET_PREFIX, FaceTable
from affect.errors import ConfigError, near
from affect.geometry import invert, transform_points
from affect.metrics import evaluate
from affect.models.base import AffectModule
from affect.tasks import Task

CARRIED = ("subject", "sequence", "frame", "image")


def predict_values(
    module: AffectModule, loader: torch.utils.data.DataLoader, device: torch.device, title: str
) -> tuple[dict[str, np.ndarray], np.ndarray, np.ndarray]:
    """Return values by task, source index and row of each sample, in loader order, with a progress bar.

    Landmarks are in pixels of the stored image, after undoing crop and resize.
    """
    module.eval().to(device)
    values: dict[str, list[np.ndarray]] = {name: [] for name in module.tasks}
    sources, rows = [], []
    with torch.inference_mode():
        for batch in tqdm(loader, desc=title, leave=False, unit="batch"):
            predicted = module.predict_step(batch.to(device))
            inverse = invert(batch.matrix.numpy().astype(np.float64))
            height, width = batch.image.shape[-2:]
            for name, value in predicted.items():
                array = value.cpu().numpy()
                if module.tasks[name].landmark_scheme is not None:
                    pixels = array.astype(np.float64) * [width, height] - 0.5
                    array = transform_points(inverse, pixels).astype(np.float32)
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
    group: str | None = None,
    group_by: Sequence[str] = (),
) -> FaceTable:
    """Return a face table of predicted columns, with true labels under ``target_``, group and origin of each row.

    ``group`` replaces the sources' own group, as ``protocol.group`` does.
    """
    columns: dict[str, Any] = {}
    for name, task in tasks.items():
        columns.update(task.decode(values[name]))
    first = sources[int(source_index[0])] if len(source_index) else sources[0]
    parts: dict[str, list[tuple[np.ndarray, np.ndarray]]] = {}
    position = []
    for index, source in enumerate(sources):
        where = np.flatnonzero(source_index == index)
        if not len(where):
            continue
        position.append(where)
        picked = rows[where]
        wanted = [c for c in CARRIED if c in source.table.names]
        labels = sorted({c for task in tasks.values() for c in task.columns(source.table.names)})
        for column in group_by:
            if column not in source.table.names:
                raise ConfigError(f"group_by: no column {column!r} in the table; {near(column, source.table.names)}")
        taken = source.table.take(picked)
        for column in {*wanted, *group_by}:
            parts.setdefault(column, []).append((where, np.array(taken.arrow[column].to_pylist(), dtype=object)))
        for column in labels:
            stored = np.empty(len(where), dtype=object)
            stored[:] = taken.arrow[column].to_pylist()
            parts.setdefault(TARGET_PREFIX + column, []).append((where, stored))
        groups, _ = source.table.strings(group or source.group, picked)
        parts.setdefault("group", []).append((where, groups))
        parts.setdefault("source", []).append((where, np.full(len(where), source.name, dtype=object)))
    for column, pieces in parts.items():
        merged = np.full(len(rows), None, dtype=object)
        for where, piece in pieces:
            merged[where] = piece
        columns[column] = merged.tolist()
    columns["row"] = rows
    expressions = next((list(t.outputs) for t in tasks.values() if t.softmax), list(first.table.expressions))
    metadata = {"dataset": first.name, "expressions": expressions, "label_source": "predictions of a model"}
    return FaceTable.from_columns(columns, first.table.root, metadata)


def table_metrics(
    table: FaceTable,
    tasks: Mapping[str, Task],
    resamples: int = 1000,
    level: float = 0.95,
    seed: int = 0,
    group_by: Sequence[str] = (),
) -> list[dict[str, Any]]:
    """Return the metric records of a predictions table; a pure function of the table.

    Each record has ``task``, ``name``, ``value``, ``low``, ``high`` (bootstrap over groups), ``constant`` (the best
    constant prediction on these rows), ``n`` and, for subgroups, ``subgroup``.
    """
    truth = table.truth()
    groups = table.strings("group")[0] if "group" in table.names else None
    records: list[dict[str, Any]] = []
    for name, task in tasks.items():
        if not task.metrics or not task.columns(truth.names):
            continue
        values = task.read_values(table)
        encoded = task.encode(truth)
        subgroups = {column: table.strings(column)[0] for column in group_by}
        found = evaluate(
            task.metrics,
            torch.from_numpy(np.asarray(values)),
            torch.from_numpy(encoded.target),
            torch.from_numpy(encoded.mask),
            groups=groups,
            subgroups=subgroups or None,
            resamples=resamples,
            level=level,
            seed=seed,
        )
        records += [{"task": name, **record} for record in found]
    return records


def part_loader(datamodule: FaceDataModule, part: str) -> torch.utils.data.DataLoader:
    """Return the loader of ``train``, ``validation``, ``test`` or ``all`` in row order, without augmentation."""
    return datamodule.part_dataloader(part)
