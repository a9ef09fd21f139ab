# SPDX-License-Identifier: Apache-2.0
"""Asymmetric loss for multi-label targets with few positives (Ben-Baruch et al., ICCV 2021, arXiv 2009.14119)."""

from __future__ import annotations

import torch.nn.functional as F
from torch import Tensor

from affect.errors import ConfigError
from affect.losses.base import Loss, Terms, cellwise, reduce

_SMALLEST = 1e-8  # keeps the derivative of a power finite at probability 0


def asymmetric(
    output: Tensor,
    target: Tensor,
    mask: Tensor,
    gamma_negative: float = 4.0,
    gamma_positive: float = 1.0,
    clip: float = 0.05,
) -> Tensor:
    r"""Return the asymmetric loss of each cell, ``(B, K)``, 0 where masked.

    .. math:: -y (1 - p)^{\gamma_+} \log p - (1 - y) q^{\gamma_-} \log(1 - q), \qquad q = \max(p - m, 0)

    with p the sigmoid of the logit and m the clip. As in the paper's formula, the gradient flows through the focusing
    factors too. With both exponents and the clip at 0 it is the binary cross-entropy.

    Args:
        output: Logits ``(B, K)``.
        target: Labels y in [0, 1], soft ones included, ``(B, K)``.
        mask: True where labelled, bool ``(B, K)``.
        gamma_negative: Focusing exponent of negatives.
        gamma_positive: Focusing exponent of positives.
        clip: Probability m in [0, 1) up to which a negative costs nothing.

    Example:
        >>> import torch
        >>> logit, label = torch.tensor([[-4.0, 0.0]]), torch.zeros(1, 2)
        >>> asymmetric(logit, label, torch.ones(1, 2, dtype=torch.bool))
        tensor([[0.0000, 0.0245]])
    """

    def loss(logit: Tensor, label: Tensor) -> Tensor:
        # Powers of (1 - p) by way of its logarithm: exact also where p is 1 in floating point.
        positive = F.logsigmoid(logit) * (gamma_positive * F.logsigmoid(-logit)).exp()
        if clip > 0:
            shifted = logit.sigmoid() - clip
            negative = (-shifted.clamp(min=0)).log1p() * shifted.clamp(min=_SMALLEST) ** gamma_negative
        else:
            negative = F.logsigmoid(-logit) * (gamma_negative * F.logsigmoid(logit)).exp()
        return -(label * positive + (1 - label) * negative)

    return cellwise(loss, output, target, mask)


class Asymmetric(Loss):
    """Asymmetric loss; the count is the number of labelled cells.

    Args:
        gamma_negative: Focusing exponent of negatives, at least 0.
        gamma_positive: Focusing exponent of positives, at least 0.
        clip: Probability in [0, 1) up to which a negative costs nothing.
    """

    def __init__(self, gamma_negative: float = 4.0, gamma_positive: float = 1.0, clip: float = 0.05) -> None:
        super().__init__()
        if gamma_negative < 0 or gamma_positive < 0:
            raise ConfigError(f"gamma_negative={gamma_negative}, gamma_positive={gamma_positive}: must not be negative")
        if not 0 <= clip < 1:
            raise ConfigError(f"clip={clip}: must lie in [0, 1)")
        self.gamma_negative, self.gamma_positive, self.clip = float(gamma_negative), float(gamma_positive), float(clip)

    def cells(self, output: Tensor, target: Tensor, mask: Tensor) -> Tensor:
        return asymmetric(output, target, mask, self.gamma_negative, self.gamma_positive, self.clip)

    def forward(self, output: Tensor, target: Tensor, mask: Tensor) -> Terms:
        return reduce(self.cells(output, target, mask), mask)
