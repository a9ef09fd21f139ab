# SPDX-License-Identifier: Apache-2.0
"""Binary F1 per output, their mean, and micro F1: the numbers by which action units are compared."""

from __future__ import annotations

from collections.abc import Sequence
from typing import ClassVar

import torch
from torch import Tensor

from affect.metrics.base import AdditiveMetric, mean, ratio, where_labelled
from affect.metrics.counts import binary_counts, checked_threshold


def f1_scores(total: Tensor, empty: float = 0.0) -> dict[str, Tensor]:
    r"""Return ``f1`` per output ``(…, K)``, ``f1/mean`` and ``f1/micro`` ``(…)``.

    .. math:: F_1 = \frac{2 TP}{2 TP + FP + FN}

    Args:
        total: Sums of ``binary_counts`` ``(…, K, 4)``.
        empty: F1 of an output with neither positives nor predictions.

    Example:
        >>> f1_scores(torch.tensor([[3.0, 1.0, 1.0, 5.0]]))["f1"]
        tensor([0.7500])
    """
    each = where_labelled(_f1(total, empty), total.sum(-1))
    pooled = total.sum(-2)
    return {"f1": each, "f1/mean": mean(each), "f1/micro": where_labelled(_f1(pooled, empty), pooled.sum(-1))}


def f1_best_constant(total: Tensor, empty: float = 0.0) -> dict[str, Tensor]:
    """Return ``f1_scores`` of the better of predicting always and never, chosen for each number.

    For micro F1 the choice is made per output, jointly: outputs are predicted in order of their positive rate for as
    long as that helps, which is optimal for a ratio of sums.
    """
    count = total.sum(-1)
    positive = total[..., 0] + total[..., 2]
    each = where_labelled(torch.maximum(ratio(2 * positive, count + positive, 0.0), _never(positive, empty)), count)
    order = ratio(positive, count, -1.0).argsort(-1, descending=True)
    hits, predicted = positive.gather(-1, order).cumsum(-1), count.gather(-1, order).cumsum(-1)
    always = ratio(2 * hits, predicted + positive.sum(-1, keepdim=True), 0.0).amax(-1)
    micro = torch.maximum(always, _never(positive.sum(-1), empty))
    return {"f1": each, "f1/mean": mean(each), "f1/micro": where_labelled(micro, count.sum(-1))}


def _f1(total: Tensor, empty: float) -> Tensor:
    hit, false_alarm, missed, _ = total.unbind(-1)
    return ratio(2 * hit, 2 * hit + false_alarm + missed, empty)


def _never(positive: Tensor, empty: float) -> Tensor:
    return torch.where(positive > 0, torch.zeros_like(positive), empty)


class F1(AdditiveMetric):
    """Binary F1: ``f1/<output>``, ``f1/mean`` over outputs, ``f1/micro`` of counts pooled over outputs.

    Args:
        threshold: Probability from which an output counts as predicted (``p >= threshold``); one number, or one per
            output.
        empty: F1 of an output with neither positives nor predictions.
    """

    per_output: ClassVar[tuple[str, ...]] = ("f1",)

    def __init__(self, threshold: float | Sequence[float] = 0.5, empty: float = 0.0) -> None:
        super().__init__()
        self.threshold = checked_threshold(threshold)
        self.empty = float(empty)

    @property
    def summaries(self) -> tuple[str, ...]:
        return ("f1/mean", "f1/micro")

    def shape(self, outputs: int) -> tuple[int, ...]:
        return (outputs, 4)

    def statistics(self, values: Tensor, target: Tensor, mask: Tensor) -> Tensor:
        return binary_counts(values, target, mask, self.threshold)

    def scores(self, total: Tensor) -> dict[str, Tensor]:
        return f1_scores(total, self.empty)

    def best_constant(self, total: Tensor) -> dict[str, Tensor]:
        return f1_best_constant(total, self.empty)
