# SPDX-License-Identifier: Apache-2.0
from __future__ import annotations

import numpy as np
import pytest
import torch

from affect.metrics import PoseMAE
from affect.metrics.pose import angle_between, circular_median
from tests.metrics.contract import MetricContract


class TestPoseMAE(MetricContract):
    outputs = ("pitch", "yaw", "roll")
    mean_of = ("mae",)

    def make(self):
        return PoseMAE()

    def draw(self, generator):
        target = 120 * torch.randn(self.samples, 3, generator=generator, dtype=torch.float64)
        target = (target + 180).remainder(360) - 180
        values = target + 40 * torch.randn(self.samples, 3, generator=generator, dtype=torch.float64)
        return values, target, self.draw_mask(generator, self.samples, 3)

    def reference(self, values, target):
        turned = np.exp(1j * np.deg2rad(values - target))
        return {"mae": np.abs(np.rad2deg(np.angle(turned))).mean()}

    def constant_candidates(self, target):
        grid = torch.cat([torch.arange(-180.0, 180.0, 5.0).double(), target.flatten()])
        return [torch.full((3,), float(c), dtype=torch.float64) for c in grid]


def test_angles_wrap_around():
    a = torch.tensor([170.0, -170.0, 180.0, 90.0, 0.0])
    b = torch.tensor([-170.0, 170.0, -180.0, -90.0, 725.0])
    assert angle_between(a, b).tolist() == [20, 20, 0, 180, 5]


@pytest.mark.parametrize("count", [1, 2, 3, 10, 101])
def test_circular_median_is_the_best_of_all_angles(count):
    angles = torch.rand(count, generator=torch.Generator().manual_seed(count), dtype=torch.float64) * 720 - 360
    angles[0] = angles[-1]  # a tie

    def cost(candidates: torch.Tensor) -> torch.Tensor:
        return angle_between(candidates[:, None], angles).mean(1)

    best = cost(torch.arange(0, 360, 0.25, dtype=torch.float64)).min()
    assert cost(circular_median(angles)[None])[0] <= best + 1e-9
    assert cost(circular_median(angles)[None])[0] == pytest.approx(cost(angles).min())
