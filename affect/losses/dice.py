# SPDX-License-Identifier: Apache-2.0
"""Soft Dice loss per output: one minus a differentiable F1, usually added to a binary cross-entropy.

Squares in the denominator as in V-Net (Milletari et al., arXiv 1606.04797) and JAA-Net (Shao et al., arXiv 2003.08834).
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from affect.errors import ConfigError
from affect.losses.base import Encoded, Loss, Terms, cellwise, prepare, reduce
from affect.losses.weights import Weights, inverse_rates


def dice(output: Tensor, target: Tensor, mask: Tensor, epsilon: float = 1.0) -> Tensor:
    r"""Return the Dice loss of each output over the labelled cells of the batch, ``(K,)``; 0 where there are none.

    .. math:: 1 - \frac{2 \sum_b p_b y_b + \epsilon}{\sum_b p_b^2 + \sum_b y_b^2 + \epsilon}, \qquad p = \sigma(z)

    Args:
        output: Logits z ``(B, K)``.
        target: Labels y in [0, 1], soft ones included, ``(B, K)``.
        mask: True where labelled, bool ``(B, K)``.
        epsilon: Smoothing, more than 0; it makes an output without positives and predictions cost nothing.

    Example:
        >>> import torch
        >>> label = torch.tensor([[1.0], [0.0]])
        >>> dice(200 * label - 100, label, torch.ones(2, 1, dtype=torch.bool))
        tensor([0.])
    """
    logit, label = prepare(output, target, mask)
    probability = torch.where(mask, logit.sigmoid(), 0)
    overlap = (probability * label).sum(0)
    size = (probability**2 + label**2).sum(0)
    return torch.where(mask.any(0), 1 - (2 * overlap + epsilon) / (size + epsilon), 0)


def dice_per_sample(output: Tensor, target: Tensor, mask: Tensor, epsilon: float = 1.0) -> Tensor:
    """Return the Dice loss of each cell by itself, ``(B, K)``, 0 where masked: the sums of ``dice`` over one sample."""

    def loss(logit: Tensor, label: Tensor) -> Tensor:
        probability = logit.sigmoid()
        return 1 - (2 * probability * label + epsilon) / (probability**2 + label**2 + epsilon)

    return cellwise(loss, output, target, mask)


class Dice(Loss):
    """Soft Dice loss per output.

    Over the batch the count is 1 for each output with a labelled cell, so ``sum / count`` is the mean over outputs; on
    several devices it is the mean of the devices' own losses, as each sees its part of the batch. Per sample the count
    is the number of labelled cells.

    Args:
        epsilon: Smoothing, more than 0.
        weights: Weight of each output: None, ``"inverse_frequency"`` (1 / positive rate of the coded training cells,
            scaled to sum to K), or a list in output order.
        per_sample: Take the loss of each cell by itself instead of sums over the batch.
    """

    def __init__(
        self, epsilon: float = 1.0, weights: str | Sequence[float] | None = None, per_sample: bool = False
    ) -> None:
        super().__init__()
        if not epsilon > 0:
            raise ConfigError(f"epsilon={epsilon}: must be more than 0, or an output without positives divides by 0")
        self.epsilon, self.per_sample = float(epsilon), bool(per_sample)
        self.weights = Weights(weights, {"inverse_frequency": inverse_rates})

    def fit(self, encoded: Sequence[Encoded]) -> None:
        self.weights.fit(encoded)

    def cells(self, output: Tensor, target: Tensor, mask: Tensor) -> Tensor:
        if not self.per_sample:
            raise ConfigError("loss Dice is taken over the batch; per_sample=true takes it cell by cell")
        values = dice_per_sample(output, target, mask, self.epsilon)
        weights = self.weights(values)
        return values if weights is None else values * weights

    def forward(self, output: Tensor, target: Tensor, mask: Tensor) -> Terms:
        if self.per_sample:
            terms = reduce(dice_per_sample(output, target, mask, self.epsilon), mask)
        else:
            total = dice(output, target, mask, self.epsilon)
            terms = Terms(total, mask.any(0).to(total.dtype))
        weights = self.weights(terms.sum)
        return terms if weights is None else Terms(terms.sum * weights, terms.count)
