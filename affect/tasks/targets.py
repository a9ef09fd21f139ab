# SPDX-License-Identifier: Apache-2.0
"""Target transforms: what losses see instead of the raw labels. Metrics and models keep the raw ones."""

from __future__ import annotations

import torch
from torch import Tensor

from affect.errors import ConfigError
from affect.tasks.base import TargetTransform


def smooth_binary(target: Tensor, mask: Tensor, amount: float) -> Tensor:
    """Return binary targets ``(B, K)`` drawn towards one half: ``(1 - a) y + a / 2``. Masked cells stay as they are."""
    return torch.where(mask, target * (1 - amount) + amount / 2, target)


class UniformSmoothing(TargetTransform):
    """Uniform label smoothing of binary targets.

    Args:
        amount: Smoothing in [0, 1); 0 leaves targets as they are.
    """

    def __init__(self, amount: float = 0.1) -> None:
        super().__init__()
        if not 0 <= amount < 1:
            raise ConfigError(f"target.amount={amount} must lie in [0, 1)")
        self.amount = amount

    def forward(self, target: Tensor, mask: Tensor) -> Tensor:
        """Return smoothed targets ``(B, K)``."""
        return smooth_binary(target, mask, self.amount)
