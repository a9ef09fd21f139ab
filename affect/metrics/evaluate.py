# SPDX-License-Identifier: Apache-2.0
"""The records of a result file: every number of every metric with interval, constant predictor and subgroups.

They are a pure function of values, targets and masks, that is of a predictions table.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping, Sequence

import numpy as np
import torch
from torch import Tensor

from affect.errors import ConfigError, DataError
from affect.metrics.base import Metric
from affect.metrics.bootstrap import group_index, percentile_intervals, resample

Record = dict[str, str | float | int | bool | None]
"""One number of a result file, ready for JSON."""

MOST_SUBGROUPS = 100
"""Values that a column may have to be a sensible division into subgroups."""

FEWEST_GROUPS = 5
"""Groups that an interval needs: resamples of fewer repeat a handful of combinations and look far too certain."""


def evaluate(
    metrics: Sequence[Metric],
    values: Tensor | np.ndarray,
    target: Tensor | np.ndarray,
    mask: Tensor | np.ndarray,
    groups: Sequence | np.ndarray | None = None,
    subgroups: Mapping[str, Sequence | np.ndarray] | None = None,
    resamples: int = 1000,
    seed: int = 0,
    level: float = 0.95,
    subsets: Mapping[str, np.ndarray] | None = None,
) -> list[Record]:
    """Return the records of all metrics on all samples, then those of each subgroup and of each subset.

    Args:
        metrics: Bound metrics.
        values: ``(N, K)``, for landmarks ``(N, P, 2)`` in pixels.
        target: Same shape; the original labels, not smoothed ones.
        mask: bool ``(N, K)`` or ``(N, P)``, True where labelled.
        groups: Name or number of each sample's group ``(N,)``: subject, video or image. None gives no intervals.
        subgroups: Columns ``(N,)`` by name. Each of a column's values is a subgroup; rows where it is missing (None,
            empty or NaN) belong to none.
        resamples: Resamples of the bootstrap over groups; 0 gives no intervals.
        seed: Seed of the bootstrap.
        level: Share of resamples inside the interval.
        subsets: Samples of named subsets, bool ``(N,)``; they may overlap, and one without labels gives no records.

    Returns:
        Records ``{name, value, low, high, constant, n, groups, higher_is_better, subgroup, reason}``. ``n`` is the
        number of labelled samples and ``groups`` that of the groups they come from, ``constant`` the best constant
        prediction's number on the same samples, ``subgroup`` is ``column=value``, the name of a subset, or None for all
        samples, ``reason`` says why there is no interval. What does not exist is None.

    Raises:
        DataError: If a labelled cell holds a value that is not finite, or lengths differ.
        ConfigError: If a column has more values than a table of subgroups should have.

    Example:
        >>> from affect.metrics import MAE
        >>> metric = MAE()
        >>> metric.bind(["AU12"])
        >>> every = torch.ones(3, 1, dtype=torch.bool)
        >>> record = evaluate([metric], torch.zeros(3, 1), torch.tensor([[1.0], [2.0], [6.0]]), every)[1]
        >>> record["name"], record["value"], round(record["constant"], 4), record["n"], record["reason"]
        ('mae/AU12', 3.0, 1.6667, 3, 'no groups')
    """
    values, target, mask = (torch.as_tensor(array).detach().cpu() for array in (values, target, mask))
    for name, column in {"groups": groups, **(subgroups or {}), **(subsets or {})}.items():
        if column is not None and len(column) != len(values):
            raise DataError(f"evaluate: {name} has {len(column)} entries for {len(values)} samples; give one each")
    _require_finite("prediction", values, mask)
    _require_finite("label", target, mask)
    labelled = mask.any(1).numpy()
    names = None if groups is None else np.asarray(groups)
    records = []
    named = [(name, np.asarray(chosen, bool)) for name, chosen in (subsets or {}).items()]
    present = [(name, chosen) for name, chosen in named if (labelled & chosen).any()]
    for subgroup, chosen in (*_subgroups(subgroups or {}, len(values)), *present):
        rows = np.flatnonzero(labelled & chosen)
        part = (values[rows], target[rows], mask[rows])
        records += _records(metrics, *part, None if names is None else names[rows], subgroup, resamples, seed, level)
    return records


def _records(
    metrics: Sequence[Metric],
    values: Tensor,
    target: Tensor,
    mask: Tensor,
    groups: np.ndarray | None,
    subgroup: str | None,
    resamples: int,
    seed: int,
    level: float,
) -> list[Record]:
    if groups is None:
        index, number = torch.zeros(len(values), dtype=torch.int64), 1
        reason = "no groups"
    else:
        index, number = group_index(groups)
        reason = "no resamples" if resamples < 1 else _too_few(number) or "no such number"
    records: list[Record] = []
    once = torch.ones(1, number, dtype=torch.float64)
    for metric in metrics:
        # One metric after the other: different metrics may give numbers of the same name.
        resampler = metric.resampler(values, target, mask, index, number)
        score, constants, sizes = resampler(once), metric.constants(target, mask), metric.sizes(target, mask)
        resampled = resample([resampler], number, resamples, seed) if number >= FEWEST_GROUPS else {}
        intervals = percentile_intervals(resampled, level)
        for name in metric.names:
            counted = name in metric.counts
            ends = None if counted else intervals.get(name)
            records.append(
                {
                    "name": name,
                    "value": _number(score[name]),
                    "low": None if ends is None else ends[0],
                    "high": None if ends is None else ends[1],
                    "constant": None if counted else _number(constants[name]),
                    "n": sizes[name],
                    "groups": None if groups is None else number,
                    "higher_is_better": metric.higher(name),
                    "subgroup": subgroup,
                    "reason": None if ends is not None else "a count" if counted else reason,
                }
            )
    return records


def _too_few(groups: int) -> str:
    """Return why so few groups give no interval; empty if they do, or if there is no group at all."""
    if not 0 < groups < FEWEST_GROUPS:
        return ""
    return "only one group" if groups == 1 else f"only {groups} groups"


def _number(tensor: Tensor) -> float | None:
    number = float(tensor)
    return number if math.isfinite(number) else None


def _require_finite(what: str, numbers: Tensor, mask: Tensor) -> None:
    cells = mask if mask.ndim == numbers.ndim else mask.unsqueeze(-1)
    bad = (cells & ~numbers.isfinite()).flatten(1).any(1)
    if bad.any():
        raise DataError(
            f"row {int(bad.nonzero()[0])}: the {what} of a labelled cell is not a finite number "
            f"({int(bad.sum())} of {len(numbers)} rows); the model may have diverged, or the table is damaged"
        )


def _subgroups(columns: Mapping[str, Sequence | np.ndarray], size: int) -> Iterator[tuple[str | None, np.ndarray]]:
    """Yield the name and rows, bool ``(N,)``, of all samples and of each value of each column."""
    yield None, np.ones(size, bool)
    for column, cells in columns.items():
        texts = np.array([_text(cell) for cell in np.asarray(cells, dtype=object)], dtype=str)
        found, index = np.unique(texts, return_inverse=True)
        if len(found) > MOST_SUBGROUPS:
            raise ConfigError(
                f"group_by={column}: the column has {len(found)} different values, more than {MOST_SUBGROUPS}; "
                "put them into a few bins first"
            )
        for k, text in enumerate(found):
            if text:
                yield f"{column}={text}", index == k


def _text(cell: object) -> str:
    if cell is None or (isinstance(cell, float | np.floating) and math.isnan(cell)):
        return ""
    return f"{cell:g}" if isinstance(cell, float | np.floating) else str(cell)
