# SPDX-License-Identifier: Apache-2.0
from __future__ import annotations

import math

import pytest
import torch
from sklearn.metrics import roc_auc_score

from affect.metrics import AUC
from affect.metrics import auc as auc_module
from affect.metrics.auc import roc_auc
from tests.metrics.contract import BinaryContract


class TestAUC(BinaryContract):
    mean_of = ("auc",)

    def make(self):
        return AUC()

    def reference(self, values, target):
        return {"auc": roc_auc_score(target, values)}


class TestAUCOfManyGroups(TestAUC):
    """The way that is taken when groups are too many to compare all pairs of them."""

    @pytest.fixture(autouse=True)
    def _no_pairs_of_groups(self, monkeypatch):
        monkeypatch.setattr(auc_module, "_PAIRED_GROUPS", 0)
        monkeypatch.setattr(auc_module, "_CELLS", 500)  # and in small chunks


def test_is_the_share_of_ordered_pairs():
    generator = torch.Generator().manual_seed(0)
    values = torch.randint(6, (40, 1), generator=generator).float()
    present = torch.rand(40, generator=generator) < 0.4
    high, low = values[present], values[~present].T
    expected = ((high > low).double() + 0.5 * (high == low).double()).mean()
    found = roc_auc(values, present.float().unsqueeze(1), torch.ones(40, 1) > 0)
    torch.testing.assert_close(found[0], expected)


@pytest.mark.parametrize("largest", [3, 5000])
def test_large_weights_are_summed_without_rounding(largest):
    """Products of weights beyond 2^24 would lose their last digits in single precision."""
    generator = torch.Generator().manual_seed(0)
    values = torch.randint(30, (300,), generator=generator).float()
    pairs = auc_module._Pairs(values, torch.rand(300, generator=generator) < 0.5, torch.arange(300) % 50)
    weights = torch.randint(largest + 1, (20, 50), generator=generator).double()
    expected = ((weights @ pairs.between_groups(50)) * weights).sum(1)
    assert torch.equal(pairs.in_order(weights), expected)


def test_one_class_only_has_no_curve_and_is_left_out():
    values, target = torch.rand(10, 3), torch.zeros(10, 3)
    target[:5, 0], target[:, 2] = 1, 1
    metric = AUC()
    metric.bind(["both", "absent", "present"])
    found = metric.score(values, target, torch.ones(10, 3) > 0)
    assert math.isnan(found["auc/absent"])
    assert math.isnan(found["auc/present"])
    assert found["auc/mean"] == found["auc/both"]
    assert metric.constants(target, torch.ones(10, 3) > 0)["auc/mean"] == 0.5
