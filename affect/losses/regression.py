# SPDX-License-Identifier: Apache-2.0
"""Squared, absolute and smooth absolute error, per cell or per landmark point."""

from __future__ import annotations

import torch.nn.functional as F
from torch import Tensor

from affect.errors import ConfigError
from affect.losses.base import Loss, Terms, cellwise, reduce


def squared_error(output: Tensor, target: Tensor, mask: Tensor) -> Tensor:
    """Return the squared error of each cell, 0 where masked.

    Args:
        output: Predictions ``(B, K)``, or points ``(B, P, 2)``.
        target: Labels, same shape.
        mask: True where labelled, bool ``(B, K)`` or ``(B, P)``.

    Returns:
        ``(B, K)``, or for points the mean over both coordinates ``(B, P)``; in squared units of the labels.

    Example:
        >>> import torch
        >>> squared_error(torch.zeros(1, 2), torch.tensor([[3.0, 5.0]]), torch.tensor([[True, False]]))
        tensor([[9., 0.]])
    """
    return cellwise(lambda x, y: F.mse_loss(x, y, reduction="none"), output, target, mask)


def absolute_error(output: Tensor, target: Tensor, mask: Tensor) -> Tensor:
    """Return the absolute error of each cell, 0 where masked; shapes as in ``squared_error``.

    Example:
        >>> import torch
        >>> absolute_error(torch.zeros(1, 2), torch.tensor([[3.0, 5.0]]), torch.tensor([[True, False]]))
        tensor([[3., 0.]])
    """
    return cellwise(lambda x, y: F.l1_loss(x, y, reduction="none"), output, target, mask)


def smooth_absolute_error(output: Tensor, target: Tensor, mask: Tensor, beta: float = 1.0) -> Tensor:
    r"""Return the smooth L1 error of each cell, 0 where masked; shapes as in ``squared_error``.

    .. math:: \tfrac{1}{2} d^2 / \beta \text{ if } |d| < \beta, \text{ else } |d| - \tfrac{1}{2} \beta

    Args:
        output: Predictions ``(B, K)``, or points ``(B, P, 2)``.
        target: Labels, same shape.
        mask: True where labelled, bool ``(B, K)`` or ``(B, P)``.
        beta: Error at which the square turns into a line, in units of the labels, more than 0.

    Example:
        >>> import torch
        >>> smooth_absolute_error(torch.zeros(1, 2), torch.tensor([[3.0, 0.5]]), torch.ones(1, 2, dtype=torch.bool))
        tensor([[2.5000, 0.1250]])
    """
    return cellwise(lambda x, y: F.smooth_l1_loss(x, y, beta=beta, reduction="none"), output, target, mask)


class MSE(Loss):
    """Mean squared error; the count is the number of labelled cells (points, for landmarks)."""

    def forward(self, output: Tensor, target: Tensor, mask: Tensor) -> Terms:
        return reduce(squared_error(output, target, mask), mask)


class MAE(Loss):
    """Mean absolute error; the count is the number of labelled cells (points, for landmarks)."""

    def forward(self, output: Tensor, target: Tensor, mask: Tensor) -> Terms:
        return reduce(absolute_error(output, target, mask), mask)


class SmoothL1(Loss):
    """Smooth absolute error; the count is the number of labelled cells (points, for landmarks).

    Args:
        beta: Error at which the square turns into a line, in units of the labels, more than 0.
    """

    def __init__(self, beta: float = 1.0) -> None:
        super().__init__()
        if not beta > 0:
            raise ConfigError(f"beta={beta}: must be more than 0; use MAE for 0")
        self.beta = float(beta)

    def forward(self, output: Tensor, target: Tensor, mask: Tensor) -> Terms:
        return reduce(smooth_absolute_error(output, target, mask, self.beta), mask)
