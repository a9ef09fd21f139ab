# SPDX-License-Identifier: Apache-2.0
"""One minus the concordance correlation coefficient of the batch, the usual loss of valence and arousal."""

from __future__ import annotations

import torch
from torch import Tensor

from affect.errors import ConfigError, DataError
from affect.losses.base import Loss, Terms, prepare


def concordance(output: Tensor, target: Tensor, mask: Tensor, epsilon: float = 1e-4) -> Tensor:
    r"""Return 1 - CCC of each output over the labelled cells of the batch, ``(K,)``; 0 with fewer than two of them.

    .. math:: 1 - \frac{2 \operatorname{cov}(x, y)}{\sigma_x^2 + \sigma_y^2 + (\mu_x - \mu_y)^2 + \epsilon}

    with population moments (division by N), as in the ABAW protocol (Lin, Biometrics 1989; Kollias, arXiv 2202.10659).
    The metric has no epsilon; here it keeps the gradient bounded when predictions and labels are nearly constant.

    Args:
        output: Predictions x ``(B, K)``.
        target: Labels y ``(B, K)``.
        mask: True where labelled, bool ``(B, K)``.
        epsilon: Added to the denominator, in squared units of the labels, more than 0.

    Example:
        >>> label = torch.tensor([[-1.0], [1.0]])
        >>> concordance(-label, label, torch.ones(2, 1, dtype=torch.bool), epsilon=1e-12)
        tensor([2.])
    """
    x, y = prepare(output, target, mask)
    if x.ndim != 2:
        raise DataError(f"concordance: output has shape {tuple(x.shape)}; it takes (B, K), for points use Wing")
    number = mask.sum(0)
    divisor = number.clamp(min=1)
    mean_x, mean_y = x.sum(0) / divisor, y.sum(0) / divisor
    # Centred before squaring: E[x²] - E[x]² loses all digits in single precision.
    x, y = torch.where(mask, x - mean_x, 0), torch.where(mask, y - mean_y, 0)
    covariance = (x * y).sum(0) / divisor
    spread = (x**2 + y**2).sum(0) / divisor
    value = 1 - 2 * covariance / (spread + (mean_x - mean_y) ** 2 + epsilon)
    return torch.where(number >= 2, value, 0)


class Concordance(Loss):
    """1 - CCC per output over the batch; the count is 1 for each output with at least two labelled cells.

    The coefficient is no mean over cells, so the batch size matters: choose it large enough (32 or more) for moments to
    mean something. In distributed runs each device takes the coefficient of its own part of the batch and the
    coefficients are averaged: the loss of 2 devices with 32 faces each is not that of one device with 64. The same
    holds for accumulated batches. The metric ``CCC`` is exact in both cases.

    Args:
        epsilon: Added to the denominator, in squared units of the labels, more than 0.
    """

    def __init__(self, epsilon: float = 1e-4) -> None:
        super().__init__()
        if not epsilon > 0:
            raise ConfigError(f"epsilon={epsilon}: must be more than 0, or constant predictions and labels divide by 0")
        self.epsilon = float(epsilon)

    def forward(self, output: Tensor, target: Tensor, mask: Tensor) -> Terms:
        values = concordance(output, target, mask, self.epsilon)
        return Terms(values, (mask.sum(0) >= 2).to(values.dtype))
