# SPDX-License-Identifier: Apache-2.0
from __future__ import annotations

import math

import pytest
import torch

from affect.errors import ConfigError
from affect.losses import Wing
from affect.losses.base import reduce
from affect.losses.wing import wing
from tests.losses.contract import LossContract, PointContract


class TestWing(LossContract):
    def make(self):
        return Wing()

    def draw(self, generator):
        target = torch.rand(self.shape, generator=generator, dtype=torch.float64)
        return target + 0.05 * torch.randn(self.shape, generator=generator, dtype=torch.float64), target

    def by_function(self, output, target, mask):
        return reduce(wing(output, target, mask), mask)

    def plain(self, output, target):
        def one(d: float) -> float:
            if d < 0.04:
                return 0.04 * math.log(1 + d / 0.008)
            return d - (0.04 - 0.04 * math.log(1 + 0.04 / 0.008))

        each = [one(d) for d in (output - target).abs().flatten().tolist()]
        return torch.tensor(sum(each) / len(each), dtype=torch.float64)


class TestWingOfPoints(PointContract, TestWing):
    pass


def test_is_continuous_at_its_width():
    d = torch.tensor([[0.04 - 1e-7, 0.04 + 1e-7]], dtype=torch.float64)
    inside, outside = wing(d, torch.zeros_like(d), torch.ones(1, 2, dtype=torch.bool))[0]
    assert inside.item() == pytest.approx(outside.item(), abs=1e-6)


def test_is_the_papers_loss_in_other_units():
    """In pixels (w = 10, epsilon = 2) it is 256 times the loss of fractions of a crop of 256."""
    pixels = torch.linspace(-40, 40, 33, dtype=torch.float64).reshape(11, 3)
    mask = torch.ones(11, 3, dtype=torch.bool)
    in_pixels = wing(pixels, torch.zeros_like(pixels), mask, 10, 2)
    in_fractions = wing(pixels / 256, torch.zeros_like(pixels), mask, 10 / 256, 2 / 256)
    torch.testing.assert_close(in_pixels, 256 * in_fractions)


@pytest.mark.parametrize("arguments", [{"width": 0.0}, {"curvature": 0.0}])
def test_lengths_must_be_positive(arguments):
    with pytest.raises(ConfigError, match="more than 0"):
        Wing(**arguments)
