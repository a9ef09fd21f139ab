# SPDX-License-Identifier: Apache-2.0
from __future__ import annotations

import numpy as np
import pytest
import torch
from sklearn.metrics import mean_absolute_error, root_mean_squared_error

from affect.metrics import MAE, RMSE
from tests.metrics.contract import RegressionContract


class TestRMSE(RegressionContract):
    mean_of = ("rmse",)

    def make(self):
        return RMSE()

    def reference(self, values, target):
        return {"rmse": root_mean_squared_error(target, values)}

    def constant_candidates(self, target):
        """The contract asks for equality, so the mean of the labelled cells itself must be among them."""
        _, _, mask = self.draw(torch.Generator().manual_seed(5))
        means = [float(target[mask[:, k], k].mean()) for k in range(3)]
        return [*super().constant_candidates(target), *(torch.full((3,), m, dtype=torch.float64) for m in means)]


class TestMAE(RegressionContract):
    mean_of = ("mae",)

    def make(self):
        return MAE()

    def reference(self, values, target):
        return {"mae": mean_absolute_error(target, values)}

    def constant_candidates(self, target):
        return [torch.full((3,), float(c), dtype=torch.float64) for c in target.unique()]


def test_constants_are_the_spread_around_mean_and_median():
    target = torch.tensor([[0.0], [1.0], [5.0], [50.0]])
    mask = torch.tensor([[True], [True], [True], [False]])
    rmse, mae = RMSE(), MAE()
    for metric in (rmse, mae):
        metric.bind(["a"])
    assert rmse.constants(target, mask)["rmse/a"].item() == pytest.approx(np.std([0, 1, 5]))
    assert mae.constants(target, mask)["mae/a"].item() == pytest.approx((1 + 0 + 4) / 3)
    assert not rmse.higher("rmse/a")
    assert not mae.higher("mae/a")
