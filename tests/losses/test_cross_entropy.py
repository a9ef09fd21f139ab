# SPDX-License-Identifier: Apache-2.0
from __future__ import annotations

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from sklearn.utils.class_weight import compute_class_weight

from affect.errors import ConfigError
from affect.losses import CrossEntropy, Terms
from affect.losses.cross_entropy import cross_entropy
from affect.losses.weights import inverse_frequencies
from tests.losses.contract import Coded, LossContract, mean_of


class TestCrossEntropy(LossContract):
    terms_shape = (1,)
    smoothing = 0.0
    weights = None

    def make(self):
        return CrossEntropy(self.smoothing, self.weights)

    def draw(self, generator):
        logit = 2 * torch.randn(self.shape, generator=generator, dtype=torch.float64)
        return logit, torch.rand(self.shape, generator=generator, dtype=torch.float64).softmax(1)

    def by_function(self, output, target, mask):
        weights = None if self.weights is None else output.new_tensor(self.weights)
        values = cross_entropy(output, target, mask, self.smoothing, weights)
        return Terms(values.sum(0, keepdim=True), mask.any(1).sum(0, keepdim=True).to(values.dtype))

    def plain(self, output, target):
        weights = None if self.weights is None else output.new_tensor(self.weights)
        return F.cross_entropy(output, target, weight=weights, label_smoothing=self.smoothing)

    def test_a_masked_cell_is_as_if_it_were_not_there(self, data):
        """Each row with its possible classes only gives the same number."""
        output, target, mask = data
        weights = torch.ones(4) if self.weights is None else torch.tensor(self.weights)
        total = 0.0
        for logit, label, possible in zip(*data, strict=True):
            if possible.any():
                smoothed = (1 - self.smoothing) * label[possible] + self.smoothing / possible.sum()
                total -= (weights[possible] * smoothed * logit[possible].log_softmax(0)).sum()
        terms = self.make()(output, target, mask)
        torch.testing.assert_close(terms.sum[0], total)
        assert terms.count[0] == mask.any(1).sum()


class TestSmoothedCrossEntropy(TestCrossEntropy):
    smoothing = 0.2


class TestWeightedCrossEntropy(TestCrossEntropy):
    smoothing = 0.1
    weights = (0.5, 1.0, 2.0, 4.0)


def test_hard_labels_agree_with_torch():
    logit, classes = torch.randn(20, 5), torch.randint(5, (20,))
    labelled = torch.rand(20) < 0.7
    target = F.one_hot(classes, 5).float()
    terms = CrossEntropy()(logit, target, labelled.unsqueeze(1).expand(20, 5))
    torch.testing.assert_close(mean_of(terms), F.cross_entropy(logit[labelled], classes[labelled]))


def test_an_impossible_class_has_no_gradient_and_the_others_are_a_softmax():
    logit = torch.randn(1, 3, requires_grad=True)
    mask = torch.tensor([[True, False, True]])
    CrossEntropy()(logit, torch.tensor([[1.0, 0.0, 0.0]]), mask).sum.sum().backward()
    two = logit.detach()[0, [0, 2]].softmax(0)
    torch.testing.assert_close(logit.grad, torch.tensor([[two[0] - 1, 0.0, two[1]]]))


def test_a_single_possible_class_costs_nothing():
    logit = torch.randn(1, 3, requires_grad=True)
    terms = CrossEntropy(0.1)(logit, torch.tensor([[0.0, 1.0, 0.0]]), torch.tensor([[False, True, False]]))
    assert terms.sum.item() == 0
    terms.sum.sum().backward()
    assert (logit.grad == 0).all()


def test_inverse_frequencies_are_scikit_learns_balanced_weights():
    rng = np.random.default_rng(0)
    classes = rng.choice(4, 200, p=[0.6, 0.2, 0.15, 0.05])
    target = np.eye(5, dtype=np.float32)[classes]  # class 4 never occurs
    mask = np.ones((200, 5), bool)
    unlabelled = Coded(np.full((7, 5), 9, np.float32), np.zeros((7, 5), bool))
    weights = inverse_frequencies([Coded(target[:50], mask[:50]), Coded(target[50:], mask[50:]), unlabelled])
    expected = compute_class_weight("balanced", classes=np.arange(4), y=classes)
    np.testing.assert_allclose(weights, [*expected, 1.0])
    assert weights[classes].mean() == pytest.approx(1)
    loss = CrossEntropy(weights="inverse_frequency")
    loss.fit([Coded(target, mask)])
    logit = torch.randn(200, 5)
    found = loss(logit, torch.from_numpy(target), torch.from_numpy(mask))
    torch.testing.assert_close(
        found.sum[0],
        F.cross_entropy(
            logit, torch.from_numpy(classes), weight=torch.tensor(weights, dtype=torch.float32), reduction="sum"
        ),
    )


@pytest.mark.parametrize("smoothing", [-0.1, 1.0])
def test_smoothing_must_be_a_share(smoothing):
    with pytest.raises(ConfigError, match="smoothing"):
        CrossEntropy(smoothing)
