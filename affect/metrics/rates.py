# SPDX-License-Identifier: Apache-2.0
"""Precision, recall, accuracy and balanced accuracy of binary outputs."""

from __future__ import annotations

from collections.abc import Sequence
from typing import ClassVar

import torch
from torch import Tensor

from affect.metrics.base import AdditiveMetric, mean, ratio, where_labelled
from affect.metrics.counts import binary_counts, checked_threshold

QUANTITIES = ("precision", "recall", "accuracy", "balanced_accuracy")


def rate_scores(total: Tensor) -> dict[str, Tensor]:
    """Return the four rates per output ``(…, K)`` and their means ``(…)``.

    Precision without predictions and recall without positives are 0. Balanced accuracy is the mean recall of the
    classes (present, absent) that occur, as in scikit-learn.

    Args:
        total: Sums of ``binary_counts`` ``(…, K, 4)``.

    Example:
        >>> rate_scores(torch.tensor([[3.0, 1.0, 1.0, 5.0]]))["balanced_accuracy"]  # (3 / 4 + 5 / 6) / 2
        tensor([0.7917])
    """
    hit, false_alarm, missed, rejected = total.unbind(-1)
    recalls = torch.stack([ratio(hit, hit + missed, torch.nan), ratio(rejected, rejected + false_alarm, torch.nan)], -1)
    each = {
        "precision": ratio(hit, hit + false_alarm, 0.0),
        "recall": ratio(hit, hit + missed, 0.0),
        "accuracy": ratio(hit + rejected, total.sum(-1), 0.0),
        "balanced_accuracy": recalls.nanmean(-1),
    }
    return _with_means(each, total.sum(-1))


def rate_best_constant(total: Tensor) -> dict[str, Tensor]:
    """Return ``rate_scores`` of the better of predicting always and never, chosen for each number."""
    count = total.sum(-1)
    positive = total[..., 0] + total[..., 2]
    negative = count - positive
    each = {
        "precision": ratio(positive, count, 0.0),
        "recall": (positive > 0).to(total.dtype),
        "accuracy": ratio(torch.maximum(positive, negative), count, 0.0),
        "balanced_accuracy": 1 - 0.5 * ((positive > 0) & (negative > 0)).to(total.dtype),
    }
    return _with_means(each, count)


def _with_means(each: dict[str, Tensor], count: Tensor) -> dict[str, Tensor]:
    labelled = {name: where_labelled(numbers, count) for name, numbers in each.items()}
    return labelled | {f"{name}/mean": mean(numbers) for name, numbers in labelled.items()}


class BinaryRates(AdditiveMetric):
    """Precision, recall, accuracy and balanced accuracy, each per output and as the mean over outputs.

    Args:
        threshold: Probability from which an output counts as predicted (``p >= threshold``); one number, or one per
            output.
    """

    per_output: ClassVar[tuple[str, ...]] = QUANTITIES

    def __init__(self, threshold: float | Sequence[float] = 0.5) -> None:
        super().__init__()
        self.threshold = checked_threshold(threshold)

    def shape(self, outputs: int) -> tuple[int, ...]:
        return (outputs, 4)

    def statistics(self, values: Tensor, target: Tensor, mask: Tensor) -> Tensor:
        return binary_counts(values, target, mask, self.threshold)

    def scores(self, total: Tensor) -> dict[str, Tensor]:
        return rate_scores(total)

    def best_constant(self, total: Tensor) -> dict[str, Tensor]:
        return rate_best_constant(total)
