# SPDX-License-Identifier: Apache-2.0
from __future__ import annotations

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from hydra.utils import instantiate
from sklearn.metrics import log_loss

from affect.errors import ConfigError
from affect.losses import BinaryCrossEntropy
from affect.losses.base import reduce
from affect.losses.binary_cross_entropy import binary_cross_entropy
from affect.losses.weights import inverse_rates, negatives_per_positive
from tests.losses.contract import Coded, LossContract, mean_of


class TestBinaryCrossEntropy(LossContract):
    def make(self):
        return BinaryCrossEntropy()

    def draw(self, generator):
        logit = 3 * torch.randn(self.shape, generator=generator, dtype=torch.float64)
        return logit, torch.rand(self.shape, generator=generator, dtype=torch.float64)  # soft labels

    def by_function(self, output, target, mask):
        return reduce(binary_cross_entropy(output, target, mask), mask)

    def plain(self, output, target):
        return F.binary_cross_entropy_with_logits(output, target)


class TestWeightedBinaryCrossEntropy(TestBinaryCrossEntropy):
    weights = (0.5, 1.0, 2.0, 3.0)
    positive_weights = (4.0, 1.0, 0.25, 2.0)

    def make(self):
        return BinaryCrossEntropy(self.weights, self.positive_weights)

    def by_function(self, output, target, mask):
        weights, positive = (output.new_tensor(each) for each in (self.weights, self.positive_weights))
        return reduce(binary_cross_entropy(output, target, mask, weights, positive), mask)

    def plain(self, output, target):
        p = output.sigmoid()
        weights, positive = (output.new_tensor(each) for each in (self.weights, self.positive_weights))
        return (-weights * (positive * target * p.log() + (1 - target) * (1 - p).log())).mean()

    def test_a_masked_cell_is_as_if_it_were_not_there(self, data):
        output, target, mask = data
        terms = self.make()(output, target, mask)
        for k in range(4):
            rows = mask[:, k]
            alone = BinaryCrossEntropy([self.weights[k]], [self.positive_weights[k]])(
                output[rows, k : k + 1], target[rows, k : k + 1], mask[rows, k : k + 1]
            )
            torch.testing.assert_close(alone.sum[0], terms.sum[k])


def test_agrees_with_scikit_learn():
    generator = torch.Generator().manual_seed(0)
    logit = torch.randn(50, 1, generator=generator, dtype=torch.float64)
    label = (torch.rand(50, 1, generator=generator) < 0.3).double()
    mask = torch.rand(50, 1, generator=generator) < 0.8
    expected = log_loss(label[mask].numpy(), logit[mask].sigmoid().numpy())
    assert mean_of(BinaryCrossEntropy()(logit, label, mask)).item() == pytest.approx(expected)


def coded() -> list[Coded]:
    """Two tables; output 0 has rate 1/4, output 1 rate 1/2, output 2 no positive in 4, output 3 is nowhere coded."""
    first = Coded(
        np.array([[1, 1, 0, 9], [0, 0, 0, 9], [0, 9, 9, 9]], np.float32),
        np.array([[1, 1, 1, 0], [1, 1, 1, 0], [1, 0, 0, 0]], bool),
    )
    second = Coded(np.array([[0, 9, 0, 9], [9, 9, 0, 9]], np.float32), np.array([[1, 0, 1, 0], [0, 0, 1, 0]], bool))
    return [first, second]


def test_inverse_rates_use_coded_cells_only():
    weights = inverse_rates(coded())
    # 1 / rate: 4, 2, and 4 for the output without positives (as if it had one); scaled to sum to 3; 1 where not coded.
    np.testing.assert_allclose(weights, [1.2, 0.6, 1.2, 1.0])
    assert weights.sum() == pytest.approx(4)


def test_inverse_rates_reproduce_the_published_weights():
    """The usual weights of BP4D as published in a log of ME-GraphAU: 1 / rate scaled to sum to 12."""
    rates = np.array([0.211, 0.170, 0.203, 0.461, 0.549, 0.594, 0.562, 0.466, 0.169, 0.344, 0.165, 0.152])
    labels = (np.arange(1000)[:, None] < 1000 * rates).astype(np.float32)
    expected = (1 / rates) / (1 / rates).sum() * 12
    np.testing.assert_allclose(inverse_rates([Coded(labels, np.ones_like(labels, bool))]), expected, rtol=1e-6)


def test_balanced_positive_weights_are_clipped():
    np.testing.assert_allclose(negatives_per_positive(coded(), limit=20), [3, 1, 20, 1])
    np.testing.assert_allclose(negatives_per_positive(coded(), limit=2), [2, 1, 2, 1])
    many = Coded(np.array([[1.0], [1.0], [1.0], [0.0]]), np.ones((4, 1), bool))
    np.testing.assert_allclose(negatives_per_positive([many], limit=2), [0.5])


def test_fitted_weights_are_used():
    loss = BinaryCrossEntropy("inverse_frequency", "balanced")
    output, target = torch.randn(6, 4), torch.ones(6, 4)
    mask = torch.ones(6, 4, dtype=torch.bool)
    with pytest.raises(ConfigError, match=r"inverse_frequency.*fit\(\)"):
        loss(output, target, mask)
    loss.fit(coded())
    given = BinaryCrossEntropy([1.2, 0.6, 1.2, 1.0], [3, 1, 20, 1])
    torch.testing.assert_close(loss(output, target, mask).sum, given(output, target, mask).sum)
    loss.fit(coded()[:1])  # a second fit replaces the first
    assert not torch.allclose(loss(output, target, mask).sum, given(output, target, mask).sum)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"weights": "inverse_frequenzy"}, "did you mean inverse_frequency"),
        ({"positive_weights": "inverse_frequency"}, "known: balanced|did you mean"),
        ({"weights": [1.0, -1.0]}, "not negative"),
        ({"positive_limit": 0.5}, "positive_limit"),
    ],
)
def test_bad_settings_are_named(arguments, message):
    with pytest.raises(ConfigError, match=message):
        BinaryCrossEntropy(**arguments)


def test_a_list_of_the_wrong_length_is_named():
    with pytest.raises(ConfigError, match="3 numbers but the task has 2 outputs"):
        BinaryCrossEntropy([1, 2, 3])(torch.zeros(1, 2), torch.zeros(1, 2), torch.ones(1, 2, dtype=torch.bool))


def test_is_made_from_a_config():
    loss = instantiate(
        {"_target_": "affect.losses.BinaryCrossEntropy", "weights": [1.0, 2.0], "positive_weights": None}
    )
    terms = loss(torch.zeros(1, 2), torch.zeros(1, 2), torch.ones(1, 2, dtype=torch.bool))
    torch.testing.assert_close(terms.sum, torch.tensor([1.0, 2.0]) * np.log(2).astype(np.float32))


def test_extreme_logits_stay_finite():
    logit = torch.tensor([[1e4, -1e4]], requires_grad=True)
    terms = BinaryCrossEntropy()(logit, torch.tensor([[0.0, 1.0]]), torch.ones(1, 2, dtype=torch.bool))
    torch.testing.assert_close(terms.sum, torch.tensor([1e4, 1e4]))
    terms.sum.sum().backward()
    torch.testing.assert_close(logit.grad, torch.tensor([[1.0, -1.0]]))
