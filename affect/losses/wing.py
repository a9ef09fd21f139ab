# SPDX-License-Identifier: Apache-2.0
"""Wing loss for landmarks (Feng et al., CVPR 2018, arXiv 1711.06753): logarithmic near zero, linear far away."""

from __future__ import annotations

import math

import torch
from torch import Tensor

from affect.errors import ConfigError
from affect.losses.base import Loss, Terms, cellwise, reduce


def wing(output: Tensor, target: Tensor, mask: Tensor, width: float = 0.04, curvature: float = 0.008) -> Tensor:
    r"""Return the wing loss of each cell, 0 where masked.

    .. math:: w \ln(1 + |d| / \epsilon) \text{ if } |d| < w, \text{ else } |d| - w + w \ln(1 + w / \epsilon)

    Args:
        output: Predictions ``(B, K)``, or points ``(B, P, 2)``.
        target: Labels, same shape.
        mask: True where labelled, bool ``(B, K)`` or ``(B, P)``.
        width: Error w at which the logarithm turns into a line, in units of the labels (for landmarks: fractions of
            the crop's width and height).
        curvature: Scale epsilon of the logarithm, same units.

    Returns:
        ``(B, K)``, or for points the mean over both coordinates ``(B, P)``; in units of the labels.

    Example:
        >>> d = torch.tensor([[0.02, 0.1]])
        >>> wing(d, torch.zeros(1, 2), torch.ones(1, 2, dtype=torch.bool))
        tensor([[0.0501, 0.1317]])
    """
    offset = width - width * math.log1p(width / curvature)

    def loss(x: Tensor, y: Tensor) -> Tensor:
        distance = (x - y).abs()
        return torch.where(distance < width, width * (distance / curvature).log1p(), distance - offset)

    return cellwise(loss, output, target, mask)


class Wing(Loss):
    """Wing loss; the count is the number of labelled points.

    Landmarks are represented as fractions of the crop, so both lengths are fractions: the defaults are the paper's 10
    and 2 pixels in a crop of 256 (rounded).

    Args:
        width: Error at which the logarithm turns into a line, as a fraction of the crop.
        curvature: Scale of the logarithm, as a fraction of the crop.
    """

    def __init__(self, width: float = 0.04, curvature: float = 0.008) -> None:
        super().__init__()
        if not (width > 0 and curvature > 0):
            raise ConfigError(f"width={width}, curvature={curvature}: both must be more than 0")
        self.width, self.curvature = float(width), float(curvature)

    def forward(self, output: Tensor, target: Tensor, mask: Tensor) -> Terms:
        return reduce(wing(output, target, mask, self.width, self.curvature), mask)
