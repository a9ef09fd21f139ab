# SPDX-License-Identifier: Apache-2.0
from __future__ import annotations

import pytest
import torch

from affect.errors import ConfigError
from affect.losses import Asymmetric, BinaryCrossEntropy
from affect.losses.asymmetric import asymmetric
from affect.losses.base import reduce
from tests.losses.contract import LossContract


class TestAsymmetric(LossContract):
    gamma_negative, gamma_positive, clip = 4.0, 1.0, 0.05

    def make(self):
        return Asymmetric(self.gamma_negative, self.gamma_positive, self.clip)

    def draw(self, generator):
        logit = 2 * torch.randn(self.shape, generator=generator, dtype=torch.float64)
        return logit, (torch.rand(self.shape, generator=generator) < 0.4).double()

    def by_function(self, output, target, mask):
        values = asymmetric(output, target, mask, self.gamma_negative, self.gamma_positive, self.clip)
        return reduce(values, mask)

    def plain(self, output, target):
        p = output.sigmoid()
        shifted = (p - self.clip).clamp(min=0)
        positive = (1 - p) ** self.gamma_positive * p.log()
        negative = shifted**self.gamma_negative * (1 - shifted).log()
        return -(target * positive + (1 - target) * negative).mean()


class TestAsymmetricWithoutClip(TestAsymmetric):
    gamma_negative, gamma_positive, clip = 2.0, 0.5, 0.0


class TestSymmetricWithClip(TestAsymmetric):
    gamma_negative, gamma_positive, clip = 0.5, 0.0, 0.2


def test_without_focusing_it_is_the_binary_cross_entropy():
    output, target = torch.randn(8, 3, dtype=torch.float64), torch.rand(8, 3, dtype=torch.float64)
    mask = torch.rand(8, 3) < 0.7
    found, expected = Asymmetric(0, 0, 0)(output, target, mask), BinaryCrossEntropy()(output, target, mask)
    torch.testing.assert_close(found.sum, expected.sum)


def test_easy_negatives_cost_nothing():
    logit = torch.logit(torch.tensor([[0.049, 0.051]]))
    values = asymmetric(logit, torch.zeros(1, 2), torch.ones(1, 2, dtype=torch.bool), gamma_negative=0.0)
    assert values[0, 0] == 0
    assert values[0, 1] > 0


@pytest.mark.parametrize("clip", [0.0, 0.05])
@pytest.mark.parametrize("gamma", [0.0, 0.5, 1.0, 4.0])
def test_extreme_logits_stay_finite(gamma, clip):
    logit = torch.tensor([[200.0, -200.0, 200.0, -200.0]], requires_grad=True)
    label = torch.tensor([[0.0, 0.0, 1.0, 1.0]])
    terms = Asymmetric(gamma, gamma, clip)(logit, label, torch.ones(1, 4, dtype=torch.bool))
    terms.sum.sum().backward()
    assert torch.isfinite(terms.sum).all()
    assert torch.isfinite(logit.grad).all()


@pytest.mark.parametrize("arguments", [{"gamma_negative": -1}, {"gamma_positive": -1}, {"clip": 1.0}, {"clip": -0.1}])
def test_bad_settings_are_named(arguments):
    with pytest.raises(ConfigError, match=next(iter(arguments))):
        Asymmetric(**arguments)
