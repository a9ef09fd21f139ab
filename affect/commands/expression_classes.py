# SPDX-License-Identifier: Apache-2.0
"""Expression scores of a checkpoint whose classes are not those of the dataset: over common and over all classes."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import numpy as np
import torch

from affect.commands import inference
from affect.data.table import FaceTable
from affect.metrics import Classification, evaluate
from affect.tasks import Expression, Task


def class_records(
    table: FaceTable, tasks: Mapping[str, Task], resamples: int = 1000, level: float = 0.95, seed: int = 0
) -> dict[str, dict[str, Any]]:
    """Return scores over all classes of checkpoint and dataset, for expression tasks whose classes are others.

    The numbers of the table of metrics are those over common classes: a row of a class that the checkpoint does not
    know is left out, and a class that the dataset does not have cannot be named. Here every labelled row counts, and
    every class can be named.

    Args:
        table: Predictions with true labels.
        tasks: Bound tasks.
        resamples: Resamples of the bootstrap over groups.
        level: Share of resamples inside the interval.
        seed: Seed of the bootstrap.

    Returns:
        By task: ``records``, the classes ``common`` and ``all``, those ``only_checkpoint`` and ``only_dataset``, and
        ``rows_only_dataset``, how many rows have one of the latter.
    """
    found: dict[str, dict[str, Any]] = {}
    truth = table.truth()
    for name, task in tasks.items():
        if not isinstance(task, Expression) or "expression" not in truth.names:
            continue
        named, valid = truth.strings("expression")
        listed: Any = table.metadata.get(inference.CLASSES_BY_SOURCE) or {}
        dataset: list[str] = [str(one) for classes in listed.values() for one in classes]
        dataset = list(dict.fromkeys([*dataset, *sorted(set(named[valid]))]))
        if set(dataset) == set(task.outputs):
            continue
        every = [*task.outputs, *(one for one in dataset if one not in task.outputs)]
        whole = Expression(classes=every, metrics=[Classification()])
        whole.metrics[0].bind(whole.outputs)
        encoded = whole.encode(truth.with_metadata(expressions=every))
        values = np.zeros((len(table), len(every)), np.float32)
        values[:, : len(task.outputs)] = task.read_values(table)
        records = evaluate(
            whole.metrics,
            torch.from_numpy(values),
            torch.from_numpy(encoded.target),
            torch.from_numpy(encoded.mask),
            groups=table.strings("group")[0] if "group" in table.names else None,
            resamples=resamples,
            level=level,
            seed=seed,
        )
        foreign = [one for one in dataset if one not in task.outputs]
        found[name] = {
            "records": [{"task": name, **record} for record in records],
            "common": [one for one in task.outputs if one in dataset],
            "all": every,
            "only_checkpoint": [one for one in task.outputs if one not in dataset],
            "only_dataset": foreign,
            "rows_only_dataset": int((valid & np.isin(named, foreign)).sum()),
        }
    return found


def class_note(name: str, found: Mapping[str, Any]) -> str:
    """Return one sentence on the classes that checkpoint and dataset share."""
    text = f"{name}: the metrics are over the {len(found['common'])} common classes"
    if found["only_checkpoint"]:
        text += f"; only the checkpoint knows {', '.join(found['only_checkpoint'])}"
    if found["only_dataset"]:
        rows = found["rows_only_dataset"]
        text += f"; only the dataset has {', '.join(found['only_dataset'])} ({rows} rows that the metrics leave out)"
    return text
