# SPDX-License-Identifier: Apache-2.0
"""Intervals by bootstrap over groups: whole subjects (or videos, or images) are drawn with replacement.

Frames of one subject resemble each other, so an interval from resampled frames would be far too narrow.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence

import numpy as np
import torch
from torch import Tensor

from affect.errors import ConfigError, DataError
from affect.metrics.base import Metric, Resampler

_CELLS = 1 << 22  # numbers of the matrix of draws held at once


def group_index(groups: Sequence | np.ndarray) -> tuple[Tensor, int]:
    """Return the index of each sample's group, int64 ``(N,)``, and the number of groups.

    Args:
        groups: Name or number of each sample's group ``(N,)``.
    """
    names = np.asarray(groups)
    if names.dtype == object:
        names = names.astype(str)
    found, index = np.unique(names, return_inverse=True)
    return torch.from_numpy(index.astype(np.int64).reshape(-1)), len(found)


def draws(groups: int, resamples: int, seed: int) -> Iterator[Tensor]:
    """Yield how often each group is drawn, float64 ``(r, G)`` at a time, ``resamples`` rows in all.

    Args:
        groups: Number of groups G; each row sums to it.
        resamples: Number of rows.
        seed: Seed of the draw; the rows are a function of the three arguments.
    """
    generator = np.random.default_rng(seed)
    step = max(1, _CELLS // max(1, groups))
    for start in range(0, resamples, step):
        rows = min(step, resamples - start)
        drawn = generator.integers(0, groups, (rows, groups)) + groups * np.arange(rows)[:, None]
        counts = np.bincount(drawn.ravel(), minlength=rows * groups).reshape(rows, groups)
        yield torch.from_numpy(counts.astype(np.float64))


def resample(resamplers: Sequence[Resampler], groups: int, resamples: int, seed: int) -> dict[str, Tensor]:
    """Return each named number for every resample, ``(R,)``; all metrics see the same draws."""
    parts: dict[str, list[Tensor]] = {}
    for drawn in draws(groups, resamples, seed):
        for resampler in resamplers:
            for name, numbers in resampler(drawn).items():
                parts.setdefault(name, []).append(numbers)
    return {name: torch.cat(numbers) for name, numbers in parts.items()}


def percentile_intervals(resampled: Mapping[str, Tensor], level: float) -> dict[str, tuple[float, float] | None]:
    """Return the central interval of each number's resamples; None where none of them exists.

    Resamples in which a number does not exist (an output without labels in the groups drawn) are left out.

    Args:
        resampled: Numbers ``(R,)`` by name.
        level: Share of resamples inside, in (0, 1).
    """
    if not 0 < level < 1:
        raise ConfigError(f"level={level}: must lie between 0 and 1")
    if not resampled:
        return {}
    tails = torch.tensor([(1 - level) / 2, (1 + level) / 2], dtype=torch.float64)
    low, high = torch.nanquantile(torch.stack(list(resampled.values()), 1).double(), tails, dim=0).tolist()
    ends = zip(resampled, low, high, strict=True)
    return {name: None if first != first else (first, last) for name, first, last in ends}


def bootstrap(
    metric: Metric,
    values: Tensor,
    target: Tensor,
    mask: Tensor,
    groups: Sequence | np.ndarray,
    resamples: int = 1000,
    seed: int = 0,
    level: float = 0.95,
) -> dict[str, tuple[float, float] | None]:
    """Return the percentile interval of each number of a metric, resampling groups with replacement.

    Exact for every metric: additive ones are recomputed from resampled sums, AUC from resampled pairs.

    Args:
        metric: A bound metric.
        values: ``(N, K)``, for landmarks ``(N, P, 2)`` in pixels.
        target: Same shape.
        mask: bool ``(N, K)`` or ``(N, P)``.
        groups: Name or number of each sample's group ``(N,)``.
        resamples: Number of resamples R.
        seed: Seed of the draw.
        level: Share of resamples inside the interval.

    Returns:
        ``(low, high)`` by name. None for counts, for numbers that do not exist, and for all numbers if there is only
        one group: one group says nothing about others.

    Example:
        >>> from affect.metrics import MAE
        >>> metric = MAE()
        >>> metric.bind(["AU12"])
        >>> values, target = torch.tensor([[0.0], [0.0], [4.0]]), torch.zeros(3, 1)
        >>> bootstrap(metric, values, target, torch.ones(3, 1, dtype=torch.bool), ["a", "a", "b"])["mae/AU12"]
        (0.0, 4.0)
    """
    if len(groups) != len(values):
        raise DataError(f"bootstrap: {len(groups)} groups for {len(values)} samples; give one per sample")
    labelled = mask.any(1)
    index, number = group_index(np.asarray(groups)[labelled.cpu().numpy()])
    if number < 2 or resamples < 1:
        return dict.fromkeys(metric.names)
    resampler = metric.resampler(values[labelled].cpu(), target[labelled].cpu(), mask[labelled].cpu(), index, number)
    found = percentile_intervals(resample([resampler], number, resamples, seed), level)
    return {name: None if name in metric.counts else found[name] for name in metric.names}
