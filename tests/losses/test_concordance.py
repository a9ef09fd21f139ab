# SPDX-License-Identifier: Apache-2.0
from __future__ import annotations

import numpy as np
import pytest
import torch

from affect.errors import ConfigError, DataError
from affect.losses import Concordance, Terms
from affect.losses.concordance import concordance
from tests.losses.contract import LossContract


class TestConcordance(LossContract):
    def make(self):
        return Concordance()

    def draw(self, generator):
        x = torch.randn(self.shape, generator=generator, dtype=torch.float64).tanh()
        noise = torch.randn(self.shape, generator=generator, dtype=torch.float64)
        return x, (x + noise).tanh()

    def by_function(self, output, target, mask):
        values = concordance(output, target, mask)
        return Terms(values, (mask.sum(0) >= 2).to(values.dtype))

    def plain(self, output, target):
        x, y = output.numpy(), target.numpy()
        each = [
            2
            * np.cov(x[:, k], y[:, k], bias=True)[0, 1]
            / (x[:, k].var() + y[:, k].var() + (x[:, k].mean() - y[:, k].mean()) ** 2 + 1e-4)
            for k in range(x.shape[1])
        ]
        return torch.tensor(1 - np.mean(each))


@pytest.mark.parametrize(
    ("predict", "expected"),
    [(lambda y: y, 0.0), (lambda y: -y, 2.0), (lambda y: torch.zeros_like(y) + 0.3, 1.0)],
    ids=["identical", "opposite", "constant"],
)
def test_known_cases(predict, expected):
    label = torch.linspace(-1, 1, 9, dtype=torch.float64).unsqueeze(1)
    value = concordance(predict(label), label, torch.ones(9, 1, dtype=torch.bool), epsilon=1e-12)
    assert value.item() == pytest.approx(expected, abs=1e-9)


def test_one_cell_has_no_concordance():
    mask = torch.tensor([[True, True], [False, True]])
    output = torch.tensor([[0.1, 0.2], [0.3, 0.4]], requires_grad=True)
    terms = Concordance()(output, torch.tensor([[1.0, 0.5], [1.0, -0.5]]), mask)
    assert terms.count.tolist() == [0, 1]
    assert terms.sum[0] == 0
    terms.sum.sum().backward()
    assert (output.grad[:, 0] == 0).all()
    assert (output.grad[:, 1] != 0).all()


def test_is_exact_far_from_zero():
    """Moments are centred before they are squared, so an offset costs no digits."""
    label = torch.linspace(-1, 1, 50).unsqueeze(1)
    mask = torch.ones(50, 1, dtype=torch.bool)
    near, far = concordance(0.5 * label, label, mask), concordance(0.5 * label + 1000, label + 1000, mask)
    torch.testing.assert_close(near, far, rtol=1e-3, atol=1e-3)


def test_constant_batches_have_a_finite_gradient():
    output = torch.zeros(4, 1, requires_grad=True)
    terms = Concordance()(output, torch.zeros(4, 1), torch.ones(4, 1, dtype=torch.bool))
    assert terms.sum.item() == 1
    terms.sum.sum().backward()
    assert torch.isfinite(output.grad).all()


def test_points_are_refused():
    with pytest.raises(DataError, match="Wing"):
        Concordance()(torch.zeros(3, 4, 2), torch.zeros(3, 4, 2), torch.ones(3, 4, dtype=torch.bool))


def test_epsilon_must_be_positive():
    with pytest.raises(ConfigError, match="epsilon"):
        Concordance(0)
