# SPDX-License-Identifier: Apache-2.0
"""The ranked probability score: a loss of ordered levels that costs more, the further the prediction is off."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from affect.losses import Loss, Terms
from affect.losses.base import Encoded, cellwise, reduce


def ranked_probability_score(output: Tensor, target: Tensor, mask: Tensor, scale: Tensor | None = None) -> Tensor:
    r"""Return the score of each threshold, ``(B, K)``, 0 where masked; summed over thresholds it is the paper's.

    .. math:: s_k \left(\sigma(z_k) - y_k\right)^2

    Source: Epstein, A scoring system for probability forecasts of ranked categories, J. Appl. Meteorology 8 (1969).

    Args:
        output: Logit z of each threshold ``(B, K)``.
        target: 1 where the threshold is reached, else 0, ``(B, K)``.
        mask: True where labelled, bool ``(B, K)``.
        scale: Factor s of each threshold ``(K,)``; None is 1.

    Example:
        >>> ranked_probability_score(torch.zeros(1, 2), torch.ones(1, 2), torch.tensor([[True, False]]))
        tensor([[0.2500, 0.0000]])
    """
    factor = 1.0 if scale is None else scale.to(output)
    return cellwise(lambda logit, label: factor * (logit.sigmoid() - label) ** 2, output, target, mask)


class RankedProbability(Loss):
    """Mean of the ranked probability score over labelled cells.

    Args:
        balanced: Divide each threshold's score by the variance of its training labels, so that rare high levels count
            as much as common low ones.
    """

    scale: Tensor | None

    def __init__(self, balanced: bool = True) -> None:
        super().__init__()
        self.balanced = balanced
        self.register_buffer("scale", None, persistent=False)  # follows from the training labels: not in checkpoints

    def fit(self, encoded: Sequence[Encoded]) -> None:
        if self.balanced:
            reached = sum(part.target.sum(0) for part in encoded)
            rate = torch.as_tensor(reached / sum(part.mask.sum(0) for part in encoded).clip(1))
            self.scale = (1 / (rate * (1 - rate)).clamp(min=0.01)).float()

    def forward(self, output: Tensor, target: Tensor, mask: Tensor) -> Terms:
        return reduce(ranked_probability_score(output, target, mask, self.scale), mask)
