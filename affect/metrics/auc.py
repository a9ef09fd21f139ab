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


class _Ranked:
    """The labelled samples of one output in ascending order of value, with ties resolved once.

    Attributes:
        group: Group of each sample, ``(n,)``.
        present: Whether each sample is a positive, bool ``(n,)``.
        first: For each positive the number of samples below its value, ``(P,)``.
        last: For each positive the number of samples up to its value, ties included, ``(P,)``.
    """

    def __init__(self, value: Tensor, present: Tensor, group: Tensor) -> None:
        value, order = value.sort()
        self.group, self.present = group[order], present[order]
        positive = value[self.present].contiguous()
        self.first = torch.searchsorted(value, positive)
        self.last = torch.searchsorted(value, positive, right=True)

    def below(self, weights: Tensor) -> Tensor:
        """Return for each positive the weight of negatives below it, ties by half, ``(R, P)``.

        Args:
            weights: Weight of each group, float64 ``(R, G)``.
        """
        negatives = weights[:, self.group].masked_fill_(self.present, 0).cumsum(1)
        negatives = torch.nn.functional.pad(negatives, (1, 0))
        return (negatives[:, self.first] + negatives[:, self.last]) / 2

    def in_order(self, weights: Tensor) -> Tensor:
        """Return the weight of pairs in the right order, ``(R,)``; weights of groups ``(R, G)``."""
        parts = [
            (self.below(part) * part[:, self.group[self.present]]).sum(1)
            for part in weights.split(max(1, _CELLS // max(1, len(self.group))))
        ]
        return torch.cat(parts)

    def between_groups(self, groups: int) -> Tensor:
        """Return the number of pairs in the right order by groups of negative and positive, ``(G, G)``."""
        single = torch.eye(groups, dtype=torch.float64, device=self.group.device)
        parts = [
            torch.zeros(len(part), groups, dtype=torch.float64, device=part.device).index_add_(
                1, self.group[self.present], self.below(part)
            )
            for part in single.split(max(1, _CELLS // max(1, len(self.group))))
        ]
        return torch.cat(parts)


def _area(value: Tensor, present: Tensor, group: Tensor, groups: int) -> Callable[[Tensor], Tensor]:
    """Return the area under the curve of one output as a function of group weights, ``(R, G) -> (R,)``."""
    ranked = _Ranked(value, present, group)
    zero = torch.zeros(groups, dtype=torch.float64, device=value.device)
    positives = zero.index_add(0, group, present.double())
    negatives = zero.index_add(0, group, (~present).double())
    pairs = ranked.between_groups(groups) if groups <= _PAIRED_GROUPS else None

    def area(weights: Tensor) -> Tensor:
        ordered = ranked.in_order(weights) if pairs is None else ((weights @ pairs) * weights).sum(1)
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
        values, target, mask = (dim_zero_cat(state) for state in (self.values, self.target, self.mask))
        return self.score(values, target, mask.bool())

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
