# SPDX-License-Identifier: Apache-2.0
"""Sums of numbers of several tasks, e.g. the multi-task score of a challenge, with an interval of the sum.

The terms are resampled together: each resample draws groups once, for all tasks, so that what a group gains in one term
and loses in another is in the interval.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import NamedTuple

import numpy as np
import torch
from torch import Tensor

from affect.errors import ConfigError, DataError
from affect.metrics.base import Metric, Resampler
from affect.metrics.bootstrap import group_index, percentile_intervals, resample
from affect.metrics.evaluate import FEWEST_GROUPS, _number, _too_few

Terms = Sequence[tuple[str, str]]
"""Task and name of the number of each term, e.g. ``("au", "f1/mean")``."""


class Answers(NamedTuple):
    """What a model said of one task in the rows of an evaluation, and what was right.

    Attributes:
        metrics: Bound metrics.
        values: ``(N, K)``, for landmarks ``(N, P, 2)`` in pixels.
        target: Same shape.
        mask: bool ``(N, K)`` or ``(N, P)``.
    """

    metrics: Sequence[Metric]
    values: Tensor
    target: Tensor
    mask: Tensor

    def metric(self, name: str) -> Metric | None:
        """Return the metric that gives the number ``name``."""
        return next((metric for metric in self.metrics if name in metric.names), None)


def evaluate_sums(
    sums: Mapping[str, Terms],
    answers: Mapping[str, Answers],
    groups: Sequence | np.ndarray | None = None,
    resamples: int = 1000,
    seed: int = 0,
    level: float = 0.95,
) -> list[dict[str, object]]:
    """Return a record for each sum of numbers, like those of ``evaluate``, with its ``terms``.

    Args:
        sums: Terms by the name of their sum.
        answers: Answers by task, all of the same N rows.
        groups: Name or number of each row's group ``(N,)``; None gives no intervals.
        resamples: Resamples of the bootstrap over groups; 0 gives no intervals.
        seed: Seed of the bootstrap.
        level: Share of resamples inside the interval.

    Returns:
        Records ``{name, value, low, high, constant, n, groups, higher_is_better, subgroup, reason, terms}``. ``n`` is
        the number of rows that are labelled for a term, ``constant`` the sum of the best constants of the terms.

    Raises:
        ConfigError: If no metric gives a number, or more is better for one term and less for another.
    """
    records: list[dict[str, object]] = []
    for name, terms in sums.items():
        used = {task: answers[task] for task, _ in terms}
        labelled = torch.stack([each.mask.any(1) for each in used.values()]).any(0).numpy()
        if groups is not None and len(groups) != len(labelled):
            raise DataError(f"{name}: {len(groups)} groups for {len(labelled)} rows; give one each")
        rows = np.flatnonzero(labelled)
        if groups is None:
            index, number, reason = torch.zeros(len(rows), dtype=torch.int64), 1, "no groups"
        else:
            index, number = group_index(np.asarray(groups)[rows])
            reason = "no resamples" if resamples < 1 else _too_few(number) or "no such number"
        metrics = [_metric(used, name, term) for term in terms]
        directions = {metric.higher(key) for metric, (_, key) in zip(metrics, terms, strict=True)}
        if len(directions) > 1:
            raise ConfigError(f"headline {name}: more is better for one term and less for another")

        parts, constant = [], torch.zeros((), dtype=torch.float64)
        for metric, (task, key) in zip(metrics, terms, strict=True):
            values, target, mask = (array[rows] for array in used[task][1:])
            own = mask.any(1)
            parts.append((metric.resampler(values[own], target[own], mask[own], index[own], number), key))
            constant = constant + metric.constants(target[own], mask[own])[key]
        resampler = _Sum(name, parts)
        value = resampler(torch.ones(1, number, dtype=torch.float64))[name][0]
        resampled = resample([resampler], number, resamples, seed) if number >= FEWEST_GROUPS else {}
        ends = percentile_intervals(resampled, level).get(name)
        records.append(
            {
                "name": name,
                "value": _number(value),
                "low": None if ends is None else ends[0],
                "high": None if ends is None else ends[1],
                "constant": _number(constant),
                "n": len(rows),
                "groups": None if groups is None else number,
                "higher_is_better": directions.pop(),
                "subgroup": None,
                "reason": None if ends is not None else reason,
                "terms": [f"{task}/{key}" for task, key in terms],
            }
        )
    return records


class _Sum:
    """A resampler of the sum of numbers of several resamplers."""

    def __init__(self, name: str, parts: Sequence[tuple[Resampler, str]]) -> None:
        self.name, self.parts = name, parts

    def __call__(self, drawn: Tensor) -> dict[str, Tensor]:
        return {self.name: torch.stack([part(drawn)[key] for part, key in self.parts]).sum(0)}


def _metric(answers: Mapping[str, Answers], name: str, term: tuple[str, str]) -> Metric:
    metric = answers[term[0]].metric(term[1])
    if metric is None:
        raise ConfigError(f"headline {name}: task {term[0]} has no number {term[1]}")
    return metric
