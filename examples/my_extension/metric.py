# SPDX-License-Identifier: Apache-2.0
"""Agreement of ordered levels: weighted kappa and the mean error in levels."""

from __future__ import annotations

from typing import ClassVar

import torch
from torch import Tensor

from affect.metrics import AdditiveMetric
from affect.metrics.base import prepare, ratio


def level_counts(values: Tensor, target: Tensor, mask: Tensor) -> Tensor:
    """Return for each row a 1 at (true level, predicted level), float64 ``(N, K + 1, K + 1)``; 0 for unlabelled rows.

    A level is the number of thresholds that are reached, those with at least 0.5.
    """
    values, target = prepare(values, target, mask)
    levels = torch.arange(mask.shape[1] + 1, device=mask.device)
    true, said = ((numbers >= 0.5).sum(1, keepdim=True) == levels for numbers in (target, values))
    return (true[:, :, None] & said[:, None, :] & mask.all(1)[:, None, None]).double()


def distance(levels: int, power: int) -> Tensor:
    """Return ``|i - j| ** power`` for each pair of levels, float64 ``(levels, levels)``."""
    index = torch.arange(levels, dtype=torch.float64)
    return (index[:, None] - index).abs() ** power


def kappa(total: Tensor) -> Tensor:
    """Return Cohen's kappa with quadratic weights ``(…)``: 1 for agreement, 0 for chance; NaN if only one level occurs.

    Source: Cohen, Weighted kappa, Psychological Bulletin 70 (1968).

    Args:
        total: How often each true level (row) was called each level (column), ``(…, L, L)``.

    Example:
        >>> kappa(torch.tensor([[2.0, 0.0, 0.0], [0.0, 1.0, 1.0], [0.0, 0.0, 2.0]]).double())
        tensor(0.8846, dtype=torch.float64)
    """
    weights = distance(total.shape[-1], 2).to(total)
    chance = total.sum(-1).unsqueeze(-1) * total.sum(-2).unsqueeze(-2)
    observed, expected = (total * weights).sum((-2, -1)), (chance * weights).sum((-2, -1))
    return 1 - ratio(observed * total.sum((-2, -1)), expected, torch.nan)


def level_error(total: Tensor) -> Tensor:
    """Return the mean absolute difference in levels ``(…)`` of counts ``(…, L, L)``."""
    weights = distance(total.shape[-1], 1).to(total)
    return ratio((total * weights).sum((-2, -1)), total.sum((-2, -1)), torch.nan)


class LevelAgreement(AdditiveMetric):
    """``kappa`` (quadratic weights) and ``level_error`` of an ordinal task."""

    higher_is_better: ClassVar[dict[str, bool]] = {"kappa": True, "level_error": False}

    @property
    def summaries(self) -> tuple[str, ...]:
        return ("kappa", "level_error")

    def shape(self, outputs: int) -> tuple[int, ...]:
        return (outputs + 1, outputs + 1)

    def statistics(self, values: Tensor, target: Tensor, mask: Tensor) -> Tensor:
        return level_counts(values, target, mask)

    def scores(self, total: Tensor) -> dict[str, Tensor]:
        return {"kappa": kappa(total), "level_error": level_error(total)}

    def best_constant(self, total: Tensor) -> dict[str, Tensor]:
        """Return kappa 0, which any constant has, and the error of the level with the least."""
        true = total.sum(-1)
        errors = ratio(true @ distance(true.shape[-1], 1).to(true), true.sum(-1, keepdim=True), torch.nan)
        several = (true > 0).sum(-1) > 1
        return {"kappa": torch.where(several, 0.0, torch.nan).to(true), "level_error": errors.amin(-1)}
