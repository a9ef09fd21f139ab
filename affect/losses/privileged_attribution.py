# SPDX-License-Identifier: Apache-2.0
"""Privileged attribution: where a layer's evidence lies is pulled to where the landmarks are.

Bonnard, Dapogny, Dhombres and Bailly, "Privileged Attribution Constrained Deep Networks for Facial Expression
Recognition", arXiv 2203.12905.
"""

from __future__ import annotations

from typing import Literal

import torch
import torch.nn.functional as F
from torch import Tensor

Kind = Literal["grad_input", "grad"]
Channels = Literal["mean", "half_mean", "all"]
Scale = Literal["norm", "std"]

_ROUNDING = 8
"""Channels are the same everywhere if they vary by less than so many units of rounding, relative to their size."""


def landmark_prior(
    points: Tensor, mask: Tensor, image: tuple[int, int], size: tuple[int, int], sigma: float = 3.0
) -> tuple[Tensor, Tensor]:
    """Return the prior map of each image, the sum of a Gaussian per landmark, and which images have one.

    Gaussians are drawn in the resolution of the image and averaged over the area of each cell of the map, because a
    narrow one can fall between the cells. The map is divided by its maximum.

    Args:
        points: Landmarks ``(B, P, 2)`` in pixels of the image; they may lie outside.
        mask: Which are known, bool ``(B, P)``.
        image: Height and width of the image.
        size: Height and width of the map.
        sigma: Standard deviation of a Gaussian in pixels of the image.

    Returns:
        Maps ``(B, h, w)`` in [0, 1], zero where an image has none, and bool ``(B,)``.
    """
    points = torch.where(mask[..., None], points, 0).float()

    # A Gaussian is a product of one in x and one in y, and so is its mean over a cell.
    def along(axis: int, pixels: int, cells: int) -> Tensor:
        grid = torch.arange(pixels, device=points.device, dtype=points.dtype)
        line = (-((grid - points[..., axis, None]) ** 2) / (2 * sigma**2)).exp() * mask[..., None]
        return F.adaptive_avg_pool1d(line, cells)

    maps = torch.einsum("bph,bpw->bhw", along(1, image[0], size[0]), along(0, image[1], size[1]))
    peak = maps.amax((1, 2), keepdim=True)
    some = peak > 1e-6  # no landmark, or all far outside the image
    return torch.where(some, maps / peak.clamp(min=1e-6), 0), some.flatten()


def attribution(score: Tensor, activation: Tensor, kind: Kind = "grad_input") -> Tensor:
    r"""Return the attribution of a score to a layer's activation, float32 ``(B, C, h, w)``, with a graph.

    .. math:: \text{grad: } |\partial S / \partial f|, \qquad \text{grad\_input: } \partial S / \partial f \cdot f

    The graph is kept (``create_graph``), so that a loss on the attribution trains the network.

    Args:
        score: Sum over the batch of each image's score; logits, never probabilities: those of a softmax add up to 1
            whatever the image, and their attribution is 0.
        activation: What the layer gave ``(B, C, h, w)``, part of the graph of ``score``.
        kind: ``grad_input`` (total contribution of a feature) or ``grad`` (effect of a small change).
    """
    (gradient,) = torch.autograd.grad(score, activation, create_graph=True)
    if kind == "grad":
        return gradient.float().abs()
    return gradient.float() * activation.float()


def privileged_attribution(
    attribution: Tensor, prior: Tensor, channels: Channels = "mean", scale: Scale = "norm"
) -> Tensor:
    r"""Return minus the correlation of an attribution with a prior map, per image ``(B,)``.

    .. math:: -\sum_{ij} \frac{a_{ij} - \mu(a)}{\sigma(a)}\, a^*_{ij}

    It does not change when the attribution is scaled by a positive number or shifted, nor when the prior is shifted;
    its least value is :math:`-\lVert a^* - \overline{a^*} \rVert` (``norm``), reached where both agree.

    Args:
        attribution: ``(B, C, h, w)``.
        prior: ``(B, h, w)``.
        channels: ``mean`` standardises the mean over channels, ``half_mean`` that over the first half of them and
            leaves the others free, ``all`` standardises each channel and takes the mean of the results, so that every
            channel is pulled. (Standardised after summing over channels, ``all`` would be the same as ``mean``.)
        scale: :math:`\sigma` as the root of the sum of squares (``norm``) or of their mean (``std``), which is
            larger by the root of the number of positions.
    """
    if channels == "mean":
        maps = attribution.mean(1, keepdim=True)
    elif channels == "half_mean":
        maps = attribution[:, : max(1, attribution.shape[1] // 2)].mean(1, keepdim=True)
    else:
        maps = attribution
    flat = maps.flatten(2)
    centred = flat - flat.mean(-1, keepdim=True)
    # Relative to the largest entry, squares neither vanish nor overflow.
    size = centred.detach().abs().amax(-1, keepdim=True)
    rounding = _ROUNDING * torch.finfo(flat.dtype).eps
    alive = size > rounding * flat.detach().abs().amax(-1, keepdim=True).clamp(min=1e-30)
    unit = centred / torch.where(alive, size, 1)
    spread = unit.pow(2).sum(-1, keepdim=True) if scale == "norm" else unit.pow(2).mean(-1, keepdim=True)
    standard = unit / torch.where(alive, spread, 1).sqrt()
    match = (standard * prior.flatten(1)[:, None]).sum(-1)
    alive = alive[..., 0]
    # A dead channel has no attribution that could be pulled anywhere.
    return -torch.where(alive, match, 0).sum(1) / alive.sum(1).clamp(min=1)


def spread_of(attribution: Tensor) -> Tensor:
    """Return how much an attribution varies over positions, relative to its size, per image ``(B,)``."""
    mean = attribution.detach().flatten(2)
    size = mean.abs().amax((1, 2)).clamp(min=1e-30)
    return (mean - mean.mean(-1, keepdim=True)).abs().amax((1, 2)) / size


def correlation(attribution: Tensor, prior: Tensor) -> Tensor:
    """Return Pearson's correlation of the mean attribution over channels with the prior, per image ``(B,)``.

    NaN where one of them is constant.
    """
    a = attribution.detach().mean(1).flatten(1)
    b = prior.flatten(1)
    a, b = a - a.mean(1, keepdim=True), b - b.mean(1, keepdim=True)
    return (a * b).sum(1) / (a.norm(dim=1) * b.norm(dim=1))
