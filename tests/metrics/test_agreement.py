# SPDX-License-Identifier: Apache-2.0
from __future__ import annotations

import numpy as np
import pytest
import torch
from scipy import stats

from affect.metrics import CCC, ICC, PCC, SAGR
from affect.metrics.agreement import ccc, icc, moment_statistics, pcc
from tests.metrics.contract import RegressionContract


class TestCCC(RegressionContract):
    mean_of = ("ccc",)

    def make(self):
        return CCC()

    def reference(self, values, target):
        covariance = np.cov(values, target, bias=True)
        spread = covariance[0, 0] + covariance[1, 1] + (values.mean() - target.mean()) ** 2
        return {"ccc": 2 * covariance[0, 1] / spread}


class TestPCC(RegressionContract):
    mean_of = ("pcc",)

    def make(self):
        return PCC()

    def reference(self, values, target):
        return {"pcc": stats.pearsonr(values, target).statistic}


class TestICC(RegressionContract):
    mean_of = ("icc",)

    def make(self):
        return ICC()

    def reference(self, values, target):
        """Shrout and Fleiss' two-way analysis of variance, written out."""
        table = np.stack([values, target], 1)
        n, k = table.shape
        grand, rows, columns = table.mean(), table.mean(1), table.mean(0)
        between = k * ((rows - grand) ** 2).sum() / (n - 1)
        rest = ((table - rows[:, None] - columns[None] + grand) ** 2).sum() / ((n - 1) * (k - 1))
        return {"icc": (between - rest) / (between + (k - 1) * rest)}


class TestSAGR(RegressionContract):
    mean_of = ("sagr",)

    def make(self):
        return SAGR()

    def reference(self, values, target):
        return {"sagr": (np.sign(values) == np.sign(target)).mean()}


def coefficients(x: list[float], y: list[float], dtype: torch.dtype = torch.float64) -> list[float]:
    columns = [torch.tensor(side, dtype=dtype).unsqueeze(1) for side in (x, y)]
    total = moment_statistics(*columns, torch.ones(len(x), 1) > 0).sum(0)
    return [function(total).item() for function in (ccc, pcc, icc)]


def test_shrout_and_fleiss_definition_ignores_an_offset_and_ccc_does_not():
    x = [1.0, 2.0, 4.0, 8.0]
    shifted = [value + 3 for value in x]
    found = coefficients(x, shifted)
    assert found[1:] == pytest.approx([1, 1])
    assert found[0] < 0.8
    assert coefficients(x, [-value for value in x])[1:] == pytest.approx([-1, -1])


@pytest.mark.parametrize("number", [0.0, 0.1, 1e-3, 123.456, -7.7])
@pytest.mark.parametrize("count", [1, 2, 1000])
def test_constants_give_zero_and_not_rounding_noise(number, count):
    """0.1 squared and summed does not cancel exactly; a variance of 1e-18 must not become a correlation."""
    ramp = list(np.linspace(-1, 1, count))
    for dtype in (torch.float64, torch.float32):
        assert coefficients([number] * count, [number] * count, dtype) == [0, 0, 0]
        assert coefficients([number] * count, [number + 1] * count, dtype) == [0, 0, 0]
        assert coefficients(ramp, [number] * count, dtype) == [0, 0, 0]
        assert coefficients([number] * count, ramp, dtype) == [0, 0, 0]


def test_small_variation_on_a_large_offset_is_kept():
    rng = np.random.default_rng(0)
    x = 1000 + 0.01 * rng.standard_normal(500)
    y = x + 0.01 * rng.standard_normal(500)
    assert coefficients(list(x), list(y))[1] == pytest.approx(stats.pearsonr(x, y).statistic, rel=1e-5)


def test_zero_is_a_sign_of_its_own():
    metric = SAGR()
    metric.bind(["a"])
    x, y = torch.tensor([[0.0], [0.0], [0.1], [-1.0]]), torch.tensor([[0.0], [0.2], [0.0], [-0.1]])
    assert metric.score(x, y, torch.ones(4, 1) > 0)["sagr/a"] == 0.5
    assert metric.constants(y, torch.ones(4, 1) > 0)["sagr/a"] == 0.5  # always zero
