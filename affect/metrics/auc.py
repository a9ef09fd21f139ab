# SPDX-License-Identifier: Apache-2.0
"""Area under the ROC curve of binary outputs: the share of (positive, negative) pairs in the right order."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, ClassVar

import torch
from torch import Tensor
from torchmetrics.utilities import dim_zero_cat

from affect.metrics.base import Metric, Resampler, mean, prepare, ratio
from affect.metrics.counts import PRESENT

_CELLS = 1 << 22  # numbers of a weight matrix held at once
_PAIRED_GROUPS = 512  # up to here all pairs of groups are compared once, instead of all samples for every resample


class _Pairs:
    """The labelled samples of one output: negatives in ascending order, and where each positive falls among them.

    Attributes:
        negative: Group of each negative, ``(M,)``.
        positive: Group of each positive, ``(P,)``.
        below: For each positive the number of negatives below its value, ``(P,)``.
        upto: The same, ties included, ``(P,)``.
    """

    def __init__(self, value: Tensor, present: Tensor, group: Tensor) -> None:
        negatives, order = value[~present].sort()
        positives = value[present]
        self.negative, self.positive = group[~present][order], group[present]
        self.below = torch.searchsorted(negatives, positives)
        self.upto = torch.searchsorted(negatives, positives, right=True)

    def rank(self, weights: Tensor) -> Tensor:
        """Return twice the weight of negatives below each positive, ties by half, ``(R, P)``; weights ``(R, G)``."""
        drawn = weights.index_select(1, self.negative)
        running = torch.nn.functional.pad(drawn.cumsum(1, dtype=drawn.dtype), (1, 0))
        return running.index_select(1, self.below).add_(running.index_select(1, self.upto))

    def chunks(self, weights: Tensor) -> tuple[Tensor, ...]:
        """Return weights in parts whose matrices fit in memory."""
        return weights.split(max(1, _CELLS // max(1, len(self.negative) + len(self.positive))))

    def in_order(self, weights: Tensor) -> Tensor:
        """Return the weight of pairs in the right order, float64 ``(R,)``; integer weights of groups ``(R, G)``."""
        # Single precision moves half the bytes, and is exact while every product is a whole number below 2^24.
        most = float(weights.max()) if weights.numel() else 0.0
        negatives = torch.bincount(self.negative, minlength=weights.shape[1]).double()
        total = float((weights @ negatives).max()) if weights.numel() else 0.0
        narrow = weights.float() if 2 * total * most < 1 << 24 else weights
        parts = [
            self.rank(part).mul_(part.index_select(1, self.positive)).sum(1, dtype=torch.float64)
            for part in self.chunks(narrow)
        ]
        return torch.cat(parts) / 2

    def between_groups(self, groups: int) -> Tensor:
        """Return the number of pairs in the right order by groups of negative and positive, float64 ``(G, G)``."""
        single = torch.eye(groups, dtype=torch.float64, device=self.positive.device)
        parts = [
            torch.zeros(len(part), groups, dtype=part.dtype, device=part.device).index_add_(
                1, self.positive, self.rank(part)
            )
            for part in self.chunks(single)
        ]
        return torch.cat(parts) / 2


def _area(value: Tensor, present: Tensor, group: Tensor, groups: int) -> Callable[[Tensor], Tensor]:
    """Return the area under the curve of one output as a function of group weights, ``(R, G) -> (R,)``."""
    pairs = _Pairs(value, present, group)
    positives = torch.bincount(pairs.positive, minlength=groups).double()
    negatives = torch.bincount(pairs.negative, minlength=groups).double()
    between = pairs.between_groups(groups) if groups <= _PAIRED_GROUPS else None

    def area(weights: Tensor) -> Tensor:
        ordered = pairs.in_order(weights) if between is None else ((weights @ between) * weights).sum(1)
        return ratio(ordered, (weights @ positives) * (weights @ negatives), torch.nan)

    return area


def roc_auc(values: Tensor, target: Tensor, mask: Tensor) -> Tensor:
    """Return the area under the ROC curve of each output, float64 ``(K,)``; NaN without both classes.

    It is the probability that a random positive has a higher value than a random negative, ties counting half.

    Args:
        values: Probabilities or any other ranking ``(N, K)``, compared in float32.
        target: Labels in [0, 1] ``(N, K)``, present from 0.5.
        mask: True where labelled, bool ``(N, K)``.

    Example:
        >>> values, target = torch.tensor([[0.1], [0.4], [0.35], [0.8]]), torch.tensor([[0.0], [0.0], [1.0], [1.0]])
        >>> roc_auc(values, target, torch.ones(4, 1, dtype=torch.bool))
        tensor([0.7500], dtype=torch.float64)
    """
    group = torch.zeros(len(values), dtype=torch.int64, device=values.device)
    one = torch.ones(1, 1, dtype=torch.float64, device=values.device)
    return torch.cat([area(one) for area in _areas(values, target, mask, group, 1)])


def _areas(
    values: Tensor, target: Tensor, mask: Tensor, group: Tensor, groups: int
) -> list[Callable[[Tensor], Tensor]]:
    values, target = prepare(values, target, mask)
    values, present = values.float(), target >= PRESENT
    return [
        _area(values[rows, k], present[rows, k], group[rows], groups)
        for k, rows in ((k, mask[:, k].nonzero().squeeze(1)) for k in range(mask.shape[1]))
    ]


class AUC(Metric):
    """Area under the ROC curve: ``auc/<output>`` and ``auc/mean``.

    An output whose labels are all present or all absent has no curve: it is NaN and left out of the mean. The metric
    keeps all values until ``reset``.
    """

    per_output: ClassVar[tuple[str, ...]] = ("auc",)

    values: list[Tensor]
    target: list[Tensor]
    mask: list[Tensor]

    def __init__(self) -> None:
        super().__init__()
        for state in ("values", "target", "mask"):
            self.add_state(state, [], dist_reduce_fx="cat")

    def update(self, values: Tensor, target: Tensor, mask: Tensor) -> None:
        """Keep a batch of values, targets and masks."""
        self.require_bound()
        values, target = prepare(values.detach(), target, mask)
        self.values.append(values.float())
        self.target.append((target >= PRESENT).to(torch.uint8))
        self.mask.append(mask.to(torch.uint8))

    def compute(self) -> dict[str, Tensor]:
        """Return all numbers by name, float64 scalars."""
        self.require_bound()
        self._fill_empty()
        # Ranked on the processor: running sums on an accelerator are not deterministic, and torch can forbid them.
        values, target, mask = (dim_zero_cat(state).cpu() for state in (self.values, self.target, self.mask))
        return {name: number.to(self.device) for name, number in self.score(values, target, mask.bool()).items()}

    def _fill_empty(self) -> None:
        """Give a state without samples its shape and type, which other devices expect when they gather."""
        for state, kind in (("values", torch.float32), ("target", torch.uint8), ("mask", torch.uint8)):
            if isinstance(getattr(self, state), list) and not getattr(self, state):
                setattr(self, state, [torch.zeros(0, len(self.outputs), dtype=kind, device=self.device)])

    def _sync_dist(self, *args: Any, **kwargs: Any) -> None:  # noqa: ANN401 (the library's own signature)
        self._fill_empty()
        super()._sync_dist(*args, **kwargs)

    def constants(self, target: Tensor, mask: Tensor) -> dict[str, Tensor]:
        # A constant ranks nothing: all pairs are ties.
        return self.score(torch.zeros_like(target), target, mask)

    def resampler(self, values: Tensor, target: Tensor, mask: Tensor, group: Tensor, groups: int) -> Resampler:
        self.require_bound()
        areas = _areas(values, target, mask, group, groups)

        def resampled(drawn: Tensor) -> dict[str, Tensor]:
            each = torch.stack([area(drawn) for area in areas], -1)
            return self.label({"auc": each, "auc/mean": mean(each)})

        return resampled
