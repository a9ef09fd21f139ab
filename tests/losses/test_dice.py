# SPDX-License-Identifier: Apache-2.0
from __future__ import annotations

import numpy as np
import pytest
import torch
from sklearn.metrics import f1_score

from affect.errors import ConfigError
from affect.losses import Dice, Terms
from affect.losses.base import reduce
from affect.losses.dice import dice, dice_per_sample
from tests.losses.contract import Coded, LossContract


class TestDice(LossContract):
    def make(self):
        return Dice(epsilon=0.5)

    def draw(self, generator):
        logit = 2 * torch.randn(self.shape, generator=generator, dtype=torch.float64)
        return logit, torch.rand(self.shape, generator=generator, dtype=torch.float64)

    def by_function(self, output, target, mask):
        values = dice(output, target, mask, 0.5)
        return Terms(values, mask.any(0).to(values.dtype))

    def plain(self, output, target):
        p = output.sigmoid()
        each = []
        for k in range(output.shape[1]):
            overlap = sum(p[b, k] * target[b, k] for b in range(len(p)))
            size = sum(p[b, k] ** 2 + target[b, k] ** 2 for b in range(len(p)))
            each.append(1 - (2 * overlap + 0.5) / (size + 0.5))
        return torch.stack(each).mean()


class TestDicePerSample(TestDice):
    def make(self):
        return Dice(epsilon=0.5, per_sample=True)

    def by_function(self, output, target, mask):
        return reduce(dice_per_sample(output, target, mask, 0.5), mask)

    def plain(self, output, target):
        p = output.sigmoid()
        return (1 - (2 * target * p + 0.5) / (target**2 + p**2 + 0.5)).mean()


def test_with_hard_predictions_it_is_one_minus_f1():
    rng = np.random.default_rng(0)
    label, predicted = rng.random((2, 60, 3)) < 0.4
    logit = torch.where(torch.from_numpy(predicted), 100.0, -100.0).double()
    values = dice(logit, torch.from_numpy(label).double(), torch.ones(60, 3, dtype=torch.bool), epsilon=1e-9)
    expected = 1 - f1_score(label, predicted, average=None)
    np.testing.assert_allclose(values.numpy(), expected, atol=1e-8)


def test_per_sample_is_the_batch_loss_of_one_sample():
    output, target = torch.randn(1, 5), torch.rand(1, 5)
    mask = torch.ones(1, 5, dtype=torch.bool)
    torch.testing.assert_close(dice_per_sample(output, target, mask)[0], dice(output, target, mask))


def test_weights_of_outputs():
    output, target = torch.randn(6, 2), (torch.rand(6, 2) < 0.5).float()
    mask = torch.ones(6, 2, dtype=torch.bool)
    plain, weighted = Dice()(output, target, mask), Dice(weights=[0.5, 1.5])(output, target, mask)
    torch.testing.assert_close(weighted.sum, plain.sum * torch.tensor([0.5, 1.5]))
    torch.testing.assert_close(weighted.count, plain.count)
    counted = Dice(weights="inverse_frequency", per_sample=True)
    labels = np.array([[1, 0], [1, 0], [1, 1], [0, 0]], np.float32)
    counted.fit([Coded(labels, np.ones_like(labels, bool))])  # rates 3/4 and 1/4: weights 0.5 and 1.5
    expected = Dice(per_sample=True)(output, target, mask).sum * torch.tensor([0.5, 1.5])
    torch.testing.assert_close(counted(output, target, mask).sum, expected)


def test_an_output_without_positives_and_predictions_costs_nothing():
    values = dice(torch.full((4, 1), -50.0), torch.zeros(4, 1), torch.ones(4, 1, dtype=torch.bool))
    assert values.item() == pytest.approx(0, abs=1e-6)


def test_epsilon_must_be_positive():
    with pytest.raises(ConfigError, match="epsilon"):
        Dice(epsilon=0)
