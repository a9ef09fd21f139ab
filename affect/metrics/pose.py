# SPDX-License-Identifier: Apache-2.0
"""Mean absolute error of head pose per angle, in degrees, around the circle."""

from __future__ import annotations

import torch
from torch import Tensor

from affect.metrics.base import prepare
from affect.metrics.regression import AbsoluteErrorMetric


def angle_between(a: Tensor, b: Tensor) -> Tensor:
    """Return the smaller angle between two directions in degrees, in [0, 180]; any shape.

    Example:
        >>> angle_between(torch.tensor([179.0, 10.0]), torch.tensor([-179.0, 30.0]))
        tensor([ 2., 20.])
    """
    return ((a - b + 180).remainder(360) - 180).abs()


def angle_statistics(values: Tensor, target: Tensor, mask: Tensor) -> Tensor:
    """Return the angle between prediction and label, and 1, for each labelled cell, float64 ``(N, K, 2)``.

    Args:
        values: Predicted angles in degrees ``(N, K)``.
        target: Angles in degrees ``(N, K)``.
        mask: True where labelled, bool ``(N, K)``.
    """
    x, y = prepare(values, target, mask)
    return torch.stack([torch.where(mask, angle_between(x, y), 0), mask.double()], -1)


def circular_median(angles: Tensor) -> Tensor:
    """Return the angle (one of those given) with the least mean distance around the circle, in degrees.

    The mean distance is piecewise linear with its convex bends at the given angles, so one of them is the minimum. All
    are tried at once by running sums over the sorted circle.

    Args:
        angles: Degrees ``(n,)``, n > 0.
    """
    angle = angles.double().remainder(360).sort().values
    count = len(angle)
    position = torch.arange(count, device=angle.device)
    # For each candidate, the others that follow it within half a turn, on the circle unrolled twice.
    unrolled = torch.cat([angle, angle + 360])
    sums = torch.nn.functional.pad(unrolled.cumsum(0), (1, 0))
    end = torch.searchsorted(unrolled, angle + 180, right=True)
    ahead = sums[end] - sums[position] - (end - position) * angle
    behind = (count - (end - position)) * (angle + 360) - (sums[position + count] - sums[end])
    return angle[(ahead + behind).argmin()]


class PoseMAE(AbsoluteErrorMetric):
    """Mean absolute error in degrees: ``mae/<angle>`` and ``mae/mean``. The best constant is the circular median."""

    def statistics(self, values: Tensor, target: Tensor, mask: Tensor) -> Tensor:
        return angle_statistics(values, target, mask)

    def centre(self, target: Tensor, mask: Tensor) -> Tensor:
        columns = [target[mask[:, k], k] for k in range(mask.shape[1])]
        nothing = torch.tensor(torch.nan, dtype=torch.float64, device=target.device)
        return torch.stack([circular_median(column) if len(column) else nothing for column in columns])
