# SPDX-License-Identifier: Apache-2.0
"""What the stages of a cascade tell: how wide their attention is, and what each adds, as numbers for experiments."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

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


def stage_number(
    results: Mapping[str, Any], task: str = "landmarks", name: str = "nme", stage: int = -1
) -> float | None:
    """Return a number of one stage on the held-out faces of ``results.json``; None where it is not there.

    Args:
        results: Results of a run with ``model=decafa``.
        task: Landmark task.
        name: Number by name, e.g. ``nme`` (in per cent) or ``spread`` (share of the crop's width).
        stage: Index of the stage; negative ones count from the last.
    """
    listed = ((results["findings"].get("stages") or {}).get(task) or {}).get(name)
    if not isinstance(listed, list) or not -len(listed) <= stage < len(listed):
        return None
    return float(listed[stage])


def stage_gain(results: Mapping[str, Any], task: str = "landmarks", name: str = "nme") -> float | None:
    """Return by how much the last stage's number lies below the first one's; None where either is not there.

    Arguments as for ``stage_number``. For errors more than 0 says that later stages help.
    """
    first, last = (stage_number(results, task, name, stage) for stage in (0, -1))
    return None if first is None or last is None else first - last
