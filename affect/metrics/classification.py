# SPDX-License-Identifier: Apache-2.0
"""Accuracy, mean class accuracy and macro F1 over a fixed list of classes: the numbers of expression recognition."""

from __future__ import annotations

from typing import ClassVar

import torch
from torch import Tensor

from affect.metrics.base import AdditiveMetric, mean, prepare, ratio, where_labelled


def decide(values: Tensor, target: Tensor, mask: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """Return predicted class, true class (int64 ``(N,)`` each) and whether each row is labelled (bool ``(N,)``).

    Both classes are the largest among those that the row's source can label (True in the mask), the first of ties. So a
    model that also knows contempt is not blamed on a set without contempt.

    Args:
        values: Probabilities ``(N, C)``.
        target: Distribution over classes ``(N, C)``; one-hot for hard labels.
        mask: True for the classes that the row's source can label, bool ``(N, C)``; a row without any is unlabelled.
    """
    values, target = prepare(values, target, mask)
    predicted, actual = (torch.where(mask, numbers, -torch.inf).argmax(1) for numbers in (values, target))
    return predicted, actual, mask.any(1)


def class_counts(values: Tensor, target: Tensor, mask: Tensor) -> Tensor:
    """Return hit, predicted, actual and possible per class, float64 ``(N, C, 4)``; arguments as for ``decide``."""
    predicted, actual, labelled = decide(values, target, mask)
    classes = torch.arange(mask.shape[1], device=mask.device)
    said, true = predicted.unsqueeze(1) == classes, actual.unsqueeze(1) == classes
    return (torch.stack([said & true, said, true, mask], -1) & labelled[:, None, None]).double()


def confusion_matrix(values: Tensor, target: Tensor, mask: Tensor) -> Tensor:
    """Return how often each true class (row) was called each class (column), int64 ``(C, C)``.

    Arguments as for ``decide``.

    Example:
        >>> values, target = torch.tensor([[0.7, 0.3], [0.6, 0.4]]), torch.tensor([[1.0, 0.0], [0.0, 1.0]])
        >>> confusion_matrix(values, target, torch.ones(2, 2, dtype=torch.bool))
        tensor([[1, 0],
                [1, 0]])
    """
    predicted, actual, labelled = decide(values, target, mask)
    size = mask.shape[1]
    return torch.bincount((actual * size + predicted)[labelled], minlength=size * size).reshape(size, size)


def classification_scores(total: Tensor) -> dict[str, Tensor]:
    """Return ``accuracy``, ``mean_class_accuracy``, ``macro_f1`` ``(…)`` and ``f1`` per class ``(…, C)``.

    Mean class accuracy is the mean recall of the classes that occur among the labels. Macro F1 is the mean over the
    whole list: a class that occurs on neither side counts 0. Only a class that no row's source can label is left out.

    Args:
        total: Sums of ``class_counts`` ``(…, C, 4)``.

    Example:
        >>> total = torch.tensor([[1.0, 2.0, 1.0, 2.0], [0.0, 0.0, 1.0, 2.0]])
        >>> {name: round(float(number), 3) for name, number in classification_scores(total).items() if name != "f1"}
        {'accuracy': 0.5, 'mean_class_accuracy': 0.5, 'macro_f1': 0.333}
    """
    hit, predicted, actual, possible = total.unbind(-1)
    each = where_labelled(ratio(2 * hit, predicted + actual, 0.0), possible)
    return {
        "accuracy": ratio(hit.sum(-1), actual.sum(-1), torch.nan),
        "mean_class_accuracy": mean(ratio(hit, actual, torch.nan)),
        "macro_f1": mean(each),
        "f1": each,
    }


def classification_best_constant(total: Tensor) -> dict[str, Tensor]:
    """Return ``classification_scores`` of always naming one class, the best one for each number."""
    _, _, actual, possible = total.unbind(-1)
    each = where_labelled(ratio(2 * actual, possible + actual, 0.0), possible)
    rows = actual.sum(-1)
    return {
        "accuracy": ratio(actual.amax(-1), rows, torch.nan),
        "mean_class_accuracy": ratio(torch.ones_like(rows), (actual > 0).sum(-1), torch.nan),
        "macro_f1": ratio(each.nan_to_num(0).amax(-1), (possible > 0).sum(-1), torch.nan),
        "f1": each,
    }


class Classification(AdditiveMetric):
    """``accuracy``, ``mean_class_accuracy`` (classes among the labels), ``macro_f1`` (fixed list), ``f1/<class>``."""

    per_output: ClassVar[tuple[str, ...]] = ("f1",)

    @property
    def summaries(self) -> tuple[str, ...]:
        return ("accuracy", "mean_class_accuracy", "macro_f1")

    def shape(self, outputs: int) -> tuple[int, ...]:
        return (outputs, 4)

    def statistics(self, values: Tensor, target: Tensor, mask: Tensor) -> Tensor:
        return class_counts(values, target, mask)

    def scores(self, total: Tensor) -> dict[str, Tensor]:
        return classification_scores(total)

    def best_constant(self, total: Tensor) -> dict[str, Tensor]:
        return classification_best_constant(total)
