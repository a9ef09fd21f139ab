# SPDX-License-Identifier: Apache-2.0
from __future__ import annotations

import itertools
import math

import numpy as np
import pytest
import torch
from hydra.utils import instantiate
from sklearn.metrics import f1_score

from affect.errors import ConfigError
from affect.metrics import F1
from affect.metrics.counts import binary_counts
from affect.metrics.f1 import f1_best_constant, f1_scores
from tests.metrics.contract import BinaryContract


class TestF1(BinaryContract):
    mean_of = ("f1",)

    def make(self):
        return F1()

    def reference(self, values, target):
        return {"f1": f1_score(target, values >= 0.5, zero_division=0)}


class TestF1WithThresholds(BinaryContract):
    mean_of = ("f1",)
    thresholds = (0.3, 0.5, 0.75)

    def make(self):
        return F1(threshold=list(self.thresholds), empty=1.0)

    def reference(self, values, target):
        return {}

    def test_agrees_with_scikit_learn_per_output(self, data):
        values, target, mask = data
        found = self.bound().score(*data)
        for k, name in enumerate(self.outputs):
            rows = mask[:, k]
            expected = f1_score(target[rows, k], values[rows, k] >= torch.tensor(self.thresholds[k]))
            assert float(found[f"f1/{name}"]) == pytest.approx(expected)


def test_micro_f1_is_scikit_learns():
    rng = np.random.default_rng(0)
    target, predicted = rng.random((2, 80, 4)) < 0.3
    total = binary_counts(torch.tensor(predicted).float(), torch.tensor(target).float(), torch.ones(80, 4) > 0).sum(0)
    assert f1_scores(total)["f1/micro"].item() == pytest.approx(f1_score(target, predicted, average="micro"))
    assert f1_scores(total)["f1/mean"].item() == pytest.approx(f1_score(target, predicted, average="macro"))


def test_threshold_is_inclusive_in_single_precision():
    values = torch.tensor([[0.7, 0.7, 0.7]])  # the float32 nearest to 0.7 is below the float64 0.7
    counts = binary_counts(values, torch.ones(1, 3), torch.ones(1, 3) > 0, [0.7, 0.5, 0.7000001])
    assert counts[0, :, 0].tolist() == [1, 1, 0]
    doubled = torch.full((1, 1), 0.3, dtype=torch.float64)  # below the float32 nearest to 0.3
    assert binary_counts(doubled, torch.ones(1, 1), torch.ones(1, 1) > 0, 0.3)[0, 0, 0] == 1


def test_soft_labels_count_from_one_half():
    counts = binary_counts(torch.ones(1, 3), torch.tensor([[0.5, 0.49, 1.0]]), torch.ones(1, 3) > 0)
    assert counts[0, :, 0].tolist() == [1, 0, 1]


@pytest.mark.parametrize("empty", [0.0, 1.0])
def test_neither_positives_nor_predictions(empty):
    metric = F1(empty=empty)
    metric.bind(["a", "b"])
    values, target = torch.zeros(4, 2), torch.tensor([[0.0, 1.0]]).expand(4, 2)
    found = metric.score(values, target, torch.ones(4, 2) > 0)
    assert [float(found[name]) for name in ("f1/a", "f1/b", "f1/mean")] == [empty, 0, empty / 2]
    constant = metric.constants(target, torch.ones(4, 2) > 0)
    assert [float(constant[name]) for name in ("f1/a", "f1/b", "f1/micro")] == [empty, 1, 1]
    nothing = metric.constants(torch.zeros(4, 2), torch.ones(4, 2) > 0)
    assert [float(nothing[name]) for name in ("f1/mean", "f1/micro")] == [empty, empty]


@pytest.mark.parametrize("seed", range(5))
def test_best_constant_of_micro_f1_is_found_among_all_subsets(seed):
    rng = np.random.default_rng(seed)
    positive, negative = rng.integers(0, 30, (2, 6))
    negative[0] = positive[0] = 0  # an output without labels
    total = torch.zeros(6, 4)
    total[:, 2], total[:, 3] = torch.tensor(positive), torch.tensor(negative)
    best = 0.0
    for chosen in itertools.product([False, True], repeat=6):
        hits, said = positive[list(chosen)].sum(), (positive + negative)[list(chosen)].sum()
        best = max(best, 2 * hits / (said + positive.sum()))
    found = f1_best_constant(total.double())
    assert found["f1/micro"].item() == pytest.approx(best)
    assert math.isnan(found["f1"][0])


def test_thresholds_of_a_config():
    metric = instantiate({"_target_": "affect.metrics.F1", "threshold": [0.2, 0.8], "empty": 1})
    assert metric.threshold == (0.2, 0.8)
    metric.bind(["a", "b", "c"])
    with pytest.raises(ConfigError, match="2 numbers but there are 3 outputs"):
        metric.update(torch.zeros(1, 3), torch.zeros(1, 3), torch.ones(1, 3) > 0)
    with pytest.raises(ConfigError, match="give a number"):
        F1("half")
