# SPDX-License-Identifier: Apache-2.0
"""Heat maps of points and their inverse, the soft-argmax, in one pixel-centre convention.

Points are in pixels of the map with the first pixel centre at 0. A map of another resolution than the image covers the
same extent from edge to edge, so a point moves by ``rescale_points``: ``x' = (x + 0.5) * W' / W - 0.5``. Mixing this up
with ``x * W' / W`` shifts points by 1.5 image pixels in a stride-4 map, an error that no training removes.
"""

from __future__ import annotations

import torch
from torch import Tensor


def pixel_grid(height: int, width: int, like: Tensor) -> Tensor:
    """Return the pixel centres ``(height, width, 2)`` as x, y, with the type and device of ``like``."""
    y = torch.arange(height, dtype=like.dtype, device=like.device)
    x = torch.arange(width, dtype=like.dtype, device=like.device)
    return torch.stack(torch.meshgrid(x, y, indexing="xy"), -1)


def rescale_points(points: Tensor, source: tuple[int, int], target: tuple[int, int]) -> Tensor:
    """Return points ``(…, 2)`` of an image of size ``source`` in a map of size ``target`` that covers the same extent.

    Args:
        points: Pixels, first pixel centre at 0.
        source: (height, width) that the points refer to.
        target: (height, width) that the result refers to.
    """
    scale = points.new_tensor([target[1] / source[1], target[0] / source[0]])
    return (points + 0.5) * scale - 0.5


def gaussian_heatmaps(points: Tensor, size: tuple[int, int], sigma: float = 1.5, unit: str = "peak") -> Tensor:
    """Return one Gaussian map per point.

    Args:
        points: ``(…, P, 2)`` in pixels of the map; they may lie outside.
        size: (height, width) of the map.
        sigma: Standard deviation in pixels of the map.
        unit: ``peak`` for a height of 1 at the point itself, ``sum`` for maps that sum to 1 over the pixels (a point
            outside gives the distribution over the nearest pixels).

    Returns:
        ``(…, P, height, width)``.

    Example:
        >>> gaussian_heatmaps(torch.tensor([[1.0, 0.0]]), (1, 3), sigma=1.0).round(decimals=3).tolist()
        [[[0.6069999933242798, 1.0, 0.6069999933242798]]]
    """
    if sigma <= 0:
        raise ValueError(f"sigma={sigma} must be positive (pixels of the map)")
    height, width = size
    x = torch.arange(width, dtype=points.dtype, device=points.device)
    y = torch.arange(height, dtype=points.dtype, device=points.device)
    # The Gaussian is a product of one in x and one in y: two small exponentials instead of height * width.
    log_x = -((x - points[..., 0:1]) ** 2) / (2 * sigma**2)
    log_y = -((y - points[..., 1:2]) ** 2) / (2 * sigma**2)
    if unit == "sum":
        along_x, along_y = log_x.softmax(-1), log_y.softmax(-1)
    elif unit == "peak":
        along_x, along_y = log_x.exp(), log_y.exp()
    else:
        raise ValueError(f"unit={unit!r} must be peak or sum")
    return along_y[..., :, None] * along_x[..., None, :]


def spatial_softmax(logits: Tensor, temperature: float = 1.0) -> Tensor:
    """Return maps ``(…, H, W)`` that are positive and sum to 1 over the pixels."""
    scaled = logits if temperature == 1 else logits / temperature
    return scaled.flatten(-2).softmax(-1).unflatten(-1, logits.shape[-2:])


def expected_points(maps: Tensor) -> Tensor:
    """Return the mean position ``(…, 2)`` in pixels of maps ``(…, H, W)`` that sum to 1."""
    height, width = maps.shape[-2:]
    x = torch.arange(width, dtype=maps.dtype, device=maps.device)
    y = torch.arange(height, dtype=maps.dtype, device=maps.device)
    # Sums, not a matrix product: graphics cards may shorten its factors to 11 bits, a tenth of a pixel in 256.
    return torch.stack([(maps.sum(-2) * x).sum(-1), (maps.sum(-1) * y).sum(-1)], -1)


def soft_argmax(logits: Tensor, temperature: float = 1.0) -> Tensor:
    """Return the point ``(…, 2)`` in pixels of each map of logits ``(…, H, W)``: a differentiable argmax.

    It is the mean position under the spatial softmax. Half precision is computed in float32, where the sum over
    thousands of pixels would lose whole pixels.
    """
    if logits.dtype in (torch.float16, torch.bfloat16):
        logits = logits.float()
    return expected_points(spatial_softmax(logits, temperature))
