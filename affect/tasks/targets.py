# SPDX-License-Identifier: Apache-2.0
"""Target transforms: what losses see instead of the raw labels. Metrics and models keep the raw ones."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import torch
from torch import Tensor

from affect.errors import ConfigError
from affect.tasks.base import Encoded, TargetTransform


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


def rob(target: Tensor, mask: Tensor, amount: float, rates: Tensor) -> Tensor:
    r"""Return binary targets ``(B, K)`` whose majority side alone is smoothed (Robin Hood label smoothing).

    .. math::
        \tilde y = y + \epsilon (1 - y) \ (f < 1/2), \qquad \tilde y = (1 - \epsilon) y \ (f > 1/2)

    The minority side keeps its label. At a rate of exactly one half there is no majority and nothing changes. Masked
    cells stay as they are. Tallec et al., "Fighting noise and imbalance in Action Unit detection problems", arXiv
    2303.02994.

    Args:
        target: Labels y in [0, 1] ``(B, K)``.
        mask: True where labelled ``(B, K)``.
        amount: What a majority label gives away, :math:`\epsilon`.
        rates: Rate of positives f of each output in the training part ``(K,)``; NaN where unknown.
    """
    taken = torch.where(rates < 0.5, amount * (1 - target), torch.where(rates > 0.5, -amount * target, 0.0))
    return torch.where(mask, target + taken, target)


class RobinHood(TargetTransform):
    """Robin Hood label smoothing: takes confidence from the majority side of each output, per its training rate.

    Args:
        amount: What a majority label gives away, in [0, 1/2): the label 0 of a rare action unit becomes ``amount``, the
            label 1 of a frequent one ``1 - amount``. Uniform smoothing by ``a`` moves labels by ``a / 2``, so compare
            ``amount = a / 2``. The paper may call the same number twice as large.
        wrong_side: Smooth the minority side instead; a negative control.
    """

    rates: Tensor | None

    def __init__(self, amount: float = 0.05, wrong_side: bool = False) -> None:
        super().__init__()
        if not 0 <= amount < 0.5:
            raise ConfigError(f"target.amount={amount} must lie in [0, 0.5)")
        self.amount, self.wrong_side = float(amount), bool(wrong_side)
        self.register_buffer("rates", None, persistent=False)

    def fit(self, encoded: Sequence[Encoded]) -> None:
        """Count the rate of positives among the coded training cells of each output."""
        coded = sum((part.mask.sum(0, dtype=np.float64) for part in encoded), np.zeros(()))
        positives = sum(
            (np.where(part.mask, part.target, 0).sum(0, dtype=np.float64) for part in encoded), np.zeros(())
        )
        with np.errstate(invalid="ignore"):
            rates = torch.as_tensor(np.asarray(positives / coded))
        self.rates = rates if self.rates is None else rates.to(self.rates.device)

    def forward(self, target: Tensor, mask: Tensor) -> Tensor:
        """Return smoothed targets ``(B, K)``.

        Raises:
            ConfigError: If the rates were not counted.
        """
        if self.rates is None:
            raise ConfigError("target=robin_hood counts rates on training labels: call fit() first")
        rates = self.rates.to(target)
        return rob(target, mask, self.amount, 1 - rates if self.wrong_side else rates)
