# SPDX-License-Identifier: Apache-2.0
"""What the maps of a cascade tell: how wide their attention is."""

from __future__ import annotations

from torch import Tensor

from affect.geometry.heatmaps import expected_points, pixel_grid


def spread(maps: Tensor) -> Tensor:
    """Return the root of the variance of position under maps ``(…, H, W)`` that sum to 1, in pixels ``(…,)``.

    It is 0 for a single pixel and ``sqrt((H² + W² - 2) / 12)`` for an even map.
    """
    wide = maps.double()
    height, width = maps.shape[-2:]
    grid = pixel_grid(height, width, wide)
    square = (wide * grid.square().sum(-1)).sum((-2, -1))
    return (square - expected_points(wide).square().sum(-1)).clamp(min=0).sqrt()
