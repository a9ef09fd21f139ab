# SPDX-License-Identifier: Apache-2.0
"""Measures of controlled experiments that read a run's predictions: functions of its results and its folder."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np
import torch

from affect.commands.inference import encode_truth
from affect.data.table import FaceTable
from affect.metrics import best_thresholds
from affect.metrics.counts import binary_counts
from affect.metrics.f1 import f1_scores
from affect.release import build_tasks, read_release


def _answers(results: Mapping[str, Any], task: str, part: str) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    folder = Path(results["folder"])
    table = FaceTable.read_parquet(folder / "predictions" / f"{part}.parquet")
    built = build_tasks(read_release(folder))[task]
    encoded = encode_truth(table, built)
    values = np.asarray(built.read_values(table))
    return torch.from_numpy(values), torch.from_numpy(encoded.target), torch.from_numpy(encoded.mask)


def f1_at_best_threshold(results: Mapping[str, Any], task: str, part: str = "test") -> float:
    """Return the mean F1 at the threshold of each output that is best on these very rows: what ranking alone allows."""
    values, target, mask = _answers(results, task, part)
    best = tuple(best_thresholds(values, target, mask).tolist())
    return float(f1_scores(binary_counts(values, target, mask, best).sum(0))["f1/mean"])


def mean_on_positives(results: Mapping[str, Any], task: str, part: str = "test") -> float:
    """Return the mean probability that true positives are given, over all labelled cells."""
    values, target, mask = _answers(results, task, part)
    chosen = mask & (target >= 0.5)
    return float(values[chosen].double().mean())
