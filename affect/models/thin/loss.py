# SPDX-License-Identifier: Apache-2.0
"""The exogenous dispelling loss of THIN (Arnaud, Dapogny and Bailly, arXiv 2010.07614)."""

from __future__ import annotations

import torch
from torch import Tensor

from affect.losses.base import Terms
from affect.models.base import Batch, Objective

ENDOGENOUS, EXOGENOUS = "endogenous_code", "exogenous_code"
"""Layers of the model whose outputs are phi of either stream."""


def absolute_cosine(a: Tensor, b: Tensor, epsilon: float = 0.0) -> Tensor:
    r"""Return :math:`\sqrt{\cos^2(a, b) + \epsilon}` of rows ``(B, K)``, float32 ``(B,)``.

    With :math:`\epsilon > 0` it has a gradient at right angles, where :math:`|\cos|` has a kink. A row of zeros is at
    right angles to everything.
    """
    kind = torch.promote_types(a.dtype, torch.float32)
    a, b = a.to(kind), b.to(kind)
    scale = (a.square().sum(1) * b.square().sum(1)).clamp(min=1e-20).rsqrt()
    return (((a * b).sum(1) * scale).square() + epsilon).sqrt()


class Dispelling(Objective):
    """Pushes what phi reads of the endogenous features to right angles with what it reads of the exogenous ones.

    Args:
        weight: Factor lambda in the total loss.
        epsilon: See ``absolute_cosine``.
    """

    layers = (ENDOGENOUS, EXOGENOUS)

    def __init__(self, weight: float = 1.0, epsilon: float = 1e-8) -> None:
        super().__init__()
        self.weight, self.epsilon = float(weight), float(epsilon)

    def forward(self, batch: Batch, outputs: dict[str, Tensor], taps: dict[str, Tensor]) -> Terms:
        """Return the sum over the batch and its size."""
        values = absolute_cosine(taps[ENDOGENOUS], taps[EXOGENOUS].detach(), self.epsilon)
        return Terms(values.sum()[None], values.new_tensor([float(len(values))]))
