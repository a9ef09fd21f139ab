# SPDX-License-Identifier: Apache-2.0
"""An auxiliary objective: attention belongs near the face's points, not on the background."""

from __future__ import annotations

import math

import torch
from torch import Tensor

from affect.losses import Terms
from affect.models.base import Batch, Objective
from affect.tasks import to_fractions


def attention_far_from(points: Tensor, attention: Tensor, radius: float) -> Tensor:
    """Return the share of attention on positions that are further than ``radius`` from every point, ``(B,)``.

    Args:
        points: ``(B, P, 2)`` as fractions of the image's side.
        attention: Weights ``(B, T, N)`` of T tasks on a square map of N positions.
        radius: Fraction of the image's side.
    """
    side = math.isqrt(attention.shape[-1])
    axis = (torch.arange(side, device=points.device) + 0.5) / side
    centres = torch.stack(torch.meshgrid(axis, axis, indexing="xy"), -1).reshape(1, -1, 2)
    far = torch.cdist(centres.expand(len(points), -1, -1), points).amin(-1) > radius
    return (attention * far.unsqueeze(1)).sum(-1).mean(-1)


class AttentionNearPoints(Objective):
    """Share of attention far from the points of a scheme, over the samples with all points.

    Args:
        scheme: Landmark scheme whose points the data module provides.
        radius: Fraction of the image's side that counts as near.
        weight: Factor in the total loss.
        layer: Layer whose output is the attention ``(B, T, N)``.
    """

    def __init__(
        self, scheme: str = "5", radius: float = 0.3, weight: float = 0.1, layer: str = "pool.attention"
    ) -> None:
        super().__init__()
        self.schemes, self.layers = (scheme,), (layer,)
        self.radius, self.weight = radius, weight

    def forward(self, batch: Batch, outputs: dict[str, Tensor], taps: dict[str, Tensor]) -> Terms:
        """Return sum and count ``(1,)`` over samples."""
        points, labelled = batch.points[self.schemes[0]], batch.point_masks[self.schemes[0]].all(1)
        fractions = to_fractions(points, *batch.image.shape[-2:])
        far = attention_far_from(fractions, taps[self.layers[0]].float(), self.radius)
        return Terms((far * labelled).sum().reshape(1), labelled.sum().float().reshape(1))
