# SPDX-License-Identifier: Apache-2.0
from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F

from affect.errors import ConfigError
from affect.losses import MAE, MSE, SmoothL1
from affect.losses.base import reduce
from affect.losses.regression import absolute_error, smooth_absolute_error, squared_error
from tests.losses.contract import LossContract, PointContract


class TestMSE(LossContract):
    def make(self):
        return MSE()

    def draw(self, generator):
        return tuple(torch.randn(2, *self.shape, generator=generator, dtype=torch.float64))

    def by_function(self, output, target, mask):
        return reduce(squared_error(output, target, mask), mask)

    def plain(self, output, target):
        return F.mse_loss(output, target)


class TestMSEOfPoints(PointContract, TestMSE):
    pass


class TestMAE(TestMSE):
    def make(self):
        return MAE()

    def by_function(self, output, target, mask):
        return reduce(absolute_error(output, target, mask), mask)

    def plain(self, output, target):
        return F.l1_loss(output, target)


class TestMAEOfPoints(PointContract, TestMAE):
    pass


class TestSmoothL1(TestMSE):
    def make(self):
        return SmoothL1(beta=0.7)

    def by_function(self, output, target, mask):
        return reduce(smooth_absolute_error(output, target, mask, 0.7), mask)

    def plain(self, output, target):
        return F.smooth_l1_loss(output, target, beta=0.7)


class TestSmoothL1OfPoints(PointContract, TestSmoothL1):
    pass


def test_beta_must_be_positive():
    with pytest.raises(ConfigError, match="use MAE"):
        SmoothL1(0)
