# SPDX-License-Identifier: Apache-2.0
"""Weighted sum of losses on the same outputs, e.g. binary cross-entropy plus half a Dice loss."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import torch
from torch import Tensor, nn

from affect.errors import ConfigError, near
from affect.losses.base import Encoded, Loss, Terms


def combine(terms: Sequence[Terms], factors: Sequence[float]) -> Terms:
    r"""Return terms whose mean is the weighted sum of means, :math:`\sum_i f_i S_i / C_i`.

    Losses count different things (cells, or one per output and batch). The common count is the largest of each output;
    every loss is rescaled from its own total count to the common one. For losses with equal counts this is exact on
    any number of devices; a batch-level loss among cell-level ones is averaged over devices by their number of cells.

    Args:
        terms: Terms of each loss, ``(K,)`` or ``(1,)``; if shapes differ the result is ``(1,)``.
        factors: Weight of each loss.

    Example:
        >>> cells = Terms(torch.tensor([6.0, 2.0]), torch.tensor([4.0, 4.0]))
        >>> batch = Terms(torch.tensor([0.5, 0.3]), torch.tensor([1.0, 1.0]))
        >>> total = combine([cells, batch], [1.0, 0.5])
        >>> round(float(total.sum.sum() / total.count.sum()), 4)  # 8 / 8 + 0.5 * 0.8 / 2
        1.2
    """
    if len({one.sum.shape for one in terms}) > 1:
        terms = [Terms(one.sum.sum(0, keepdim=True), one.count.sum(0, keepdim=True)) for one in terms]
    count = torch.stack([one.count for one in terms]).amax(0)
    scales = [factor * count.sum() / one.count.sum().clamp(min=1) for one, factor in zip(terms, factors, strict=True)]
    total = torch.stack([one.sum * scale for one, scale in zip(terms, scales, strict=True)]).sum(0)
    return Terms(total, count)


class Combined(Loss):
    """Weighted sum of losses on the same outputs.

    Args:
        losses: Losses by name; None leaves one out.
        factors: Weight of each loss by the same names; a name that is not listed has weight 1.
    """

    def __init__(self, losses: Mapping[str, Loss | None], factors: Mapping[str, float] | None = None) -> None:
        super().__init__()
        self.losses = nn.ModuleDict({name: loss for name, loss in losses.items() if loss is not None})
        if not self.losses:
            raise ConfigError("a combined loss needs at least one loss")
        for name in factors or {}:
            if name not in losses:
                raise ConfigError(f"factors names an unknown loss {name!r}: {near(name, losses)}")
        self.factors = {name: float((factors or {}).get(name, 1.0)) for name in self.losses}

    def fit(self, encoded: Sequence[Encoded]) -> None:
        for loss in self.losses.values():
            loss.fit(encoded)  # type: ignore[operator]

    def cells(self, output: Tensor, target: Tensor, mask: Tensor) -> Tensor:
        parts = [self.factors[name] * loss.cells(output, target, mask) for name, loss in self.losses.items()]  # type: ignore[operator]
        return torch.stack(parts).sum(0)

    def forward(self, output: Tensor, target: Tensor, mask: Tensor) -> Terms:
        terms = [loss(output, target, mask) for loss in self.losses.values()]
        return combine(terms, list(self.factors.values()))
