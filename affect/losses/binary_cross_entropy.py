# SPDX-License-Identifier: Apache-2.0
"""Binary cross-entropy of logits, with weights of outputs and of positives: the usual loss of action units."""

from __future__ import annotations

from collections.abc import Sequence
from functools import partial

import torch.nn.functional as F
from torch import Tensor

from affect.errors import ConfigError
from affect.losses.base import Encoded, Loss, Terms, cellwise, reduce
from affect.losses.weights import Weights, inverse_rates, negatives_per_positive


def binary_cross_entropy(
    output: Tensor,
    target: Tensor,
    mask: Tensor,
    weights: Tensor | None = None,
    positive_weights: Tensor | None = None,
) -> Tensor:
    r"""Return the binary cross-entropy of each cell, ``(B, K)``, 0 where masked.

    .. math:: -w_k \left(v_k y \log p + (1 - y) \log(1 - p)\right), \qquad p = \sigma(z)

    Args:
        output: Logits z ``(B, K)``.
        target: Labels y in [0, 1], soft ones included, ``(B, K)``.
        mask: True where labelled, bool ``(B, K)``.
        weights: Weight w of each output ``(K,)``; None is 1.
        positive_weights: Weight v of each output's positive part ``(K,)``; None is 1.

    Example:
        >>> import torch
        >>> binary_cross_entropy(torch.zeros(1, 2), torch.ones(1, 2), torch.tensor([[True, False]]))
        tensor([[0.6931, 0.0000]])
    """

    def loss(logit: Tensor, label: Tensor) -> Tensor:
        return F.binary_cross_entropy_with_logits(
            logit, label, weight=weights, pos_weight=positive_weights, reduction="none"
        )

    return cellwise(loss, output, target, mask)


class BinaryCrossEntropy(Loss):
    """Binary cross-entropy of logits; the count is the number of labelled cells.

    Args:
        weights: Weight of each output: None, ``"inverse_frequency"`` (1 / positive rate of the coded training cells,
            scaled to sum to K), or a list in output order.
        positive_weights: Weight of positives against negatives: None, ``"balanced"`` (negatives / positives of the
            coded training cells), or a list in output order.
        positive_limit: ``"balanced"`` weights are clipped to [1 / positive_limit, positive_limit].
    """

    def __init__(
        self,
        weights: str | Sequence[float] | None = None,
        positive_weights: str | Sequence[float] | None = None,
        positive_limit: float = 20.0,
    ) -> None:
        super().__init__()
        if not positive_limit >= 1:
            raise ConfigError(f"positive_limit={positive_limit}: must be at least 1")
        balanced = partial(negatives_per_positive, limit=positive_limit)
        self.weights = Weights(weights, {"inverse_frequency": inverse_rates})
        self.positive_weights = Weights(positive_weights, {"balanced": balanced}, "positive_weights")

    def fit(self, encoded: Sequence[Encoded]) -> None:
        self.weights.fit(encoded)
        self.positive_weights.fit(encoded)

    def cells(self, output: Tensor, target: Tensor, mask: Tensor) -> Tensor:
        weights, positive = self.weights(output), self.positive_weights(output)
        return binary_cross_entropy(output, target, mask, weights, positive)

    def forward(self, output: Tensor, target: Tensor, mask: Tensor) -> Terms:
        return reduce(self.cells(output, target, mask), mask)
