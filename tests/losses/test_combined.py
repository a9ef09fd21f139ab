# SPDX-License-Identifier: Apache-2.0
from __future__ import annotations

import math

import numpy as np
import pytest
import torch
from hydra.utils import instantiate

from affect.errors import ConfigError
from affect.losses import MAE, MSE, BinaryCrossEntropy, Combined, Concordance, CrossEntropy, Dice, Terms
from affect.losses.combined import combine
from tests.losses.contract import Coded, LossContract, mean_of


class TestCombined(LossContract):
    """Binary cross-entropy plus half a Dice loss over the batch."""

    def make(self):
        return Combined({"bce": BinaryCrossEntropy(), "dice": Dice()}, {"dice": 0.5})

    def draw(self, generator):
        logit = 2 * torch.randn(self.shape, generator=generator, dtype=torch.float64)
        return logit, torch.rand(self.shape, generator=generator, dtype=torch.float64)

    def by_function(self, output, target, mask):
        return combine([BinaryCrossEntropy()(output, target, mask), Dice()(output, target, mask)], [1.0, 0.5])

    def plain(self, output, target):
        mask = torch.ones_like(output, dtype=torch.bool)
        bce, dice = BinaryCrossEntropy()(output, target, mask), Dice()(output, target, mask)
        return mean_of(bce) + 0.5 * mean_of(dice)

    def test_a_masked_cell_is_as_if_it_were_not_there(self, data):
        """The mean is the weighted sum of the masked means."""
        bce, dice = BinaryCrossEntropy()(*data), Dice()(*data)
        torch.testing.assert_close(mean_of(self.make()(*data)), mean_of(bce) + 0.5 * mean_of(dice))


def test_the_loss_of_the_au_transformer_by_hand():
    """Two faces, three action units, weights by frequency, half a Dice loss of each cell (arXiv 2203.12531)."""
    factors = {"bce": 1.0, "dice": 0.5}
    weights = [0.5, 1.0, 1.5]
    loss = Combined({"bce": BinaryCrossEntropy(weights), "dice": Dice(weights=weights, per_sample=True)}, factors)
    output = torch.tensor([[0.0, 0.0, math.log(3)], [math.log(3), 0.0, 0.0]], dtype=torch.float64)  # p: 1/2 or 3/4
    target = torch.tensor([[1.0, 0.0, 1.0], [0.0, 1.0, 0.5]], dtype=torch.float64)
    cross_entropy = [[math.log(2), math.log(2), math.log(4 / 3)], [math.log(4), math.log(2), math.log(2)]]
    # 1 - (2 y p + 1) / (y² + p² + 1); the square of a label of one half is a quarter.
    dice = [[1 - 2 / 2.25, 1 - 1 / 1.25, 1 - 2.5 / 2.5625], [1 - 1 / 1.5625, 1 - 2 / 2.25, 1 - 1.5 / 1.5]]
    cells = torch.tensor(weights, dtype=torch.float64) * (torch.tensor(cross_entropy) + 0.5 * torch.tensor(dice))
    every = torch.ones(2, 3, dtype=torch.bool)
    torch.testing.assert_close(mean_of(loss(output, target, every)), cells.mean(), atol=1e-6, rtol=0)
    torch.testing.assert_close(loss.cells(output, target, every), cells, atol=1e-6, rtol=0)
    some = torch.tensor([[True, False, True], [True, True, False]])
    hidden = torch.where(some, target, torch.nan)
    torch.testing.assert_close(mean_of(loss(output, hidden, some)), cells[some].mean(), atol=1e-6, rtol=0)


class TestCombinedOfEqualCounts(TestCombined):
    def make(self):
        return Combined({"mse": MSE(), "mae": MAE()}, {"mse": 2.0, "mae": 1.0})

    def by_function(self, output, target, mask):
        mse, mae = MSE()(output, target, mask), MAE()(output, target, mask)
        return Terms(2 * mse.sum + mae.sum, mse.count)

    def plain(self, output, target):
        return (2 * (output - target) ** 2 + (output - target).abs()).mean()

    def test_a_masked_cell_is_as_if_it_were_not_there(self, data):
        LossContract.test_a_masked_cell_is_as_if_it_were_not_there(self, data)


def test_losses_that_count_outputs_weigh_the_same_in_any_order():
    generator = torch.Generator().manual_seed(0)
    x, y = torch.randn(2, 9, 2, generator=generator)
    mask = torch.rand(9, 2, generator=generator) < 0.8
    one = Combined({"ccc": Concordance(), "mse": MSE()})(x, y, mask)
    other = Combined({"mse": MSE(), "ccc": Concordance()})(x, y, mask)
    torch.testing.assert_close(mean_of(one), mean_of(other))
    torch.testing.assert_close(mean_of(one), mean_of(Concordance()(x, y, mask)) + mean_of(MSE()(x, y, mask)))


def test_a_loss_without_terms_leaves_the_other():
    """One labelled cell: no concordance, but a squared error."""
    x, y, mask = torch.ones(3, 2), torch.zeros(3, 2), torch.tensor([[True, False], [False, False], [False, False]])
    terms = Combined({"ccc": Concordance(), "mse": MSE()})(x, y, mask)
    assert mean_of(terms).item() == 1


def test_shapes_that_differ_become_one_term():
    generator = torch.Generator().manual_seed(0)
    output = torch.randn(5, 3, generator=generator)
    target = torch.nn.functional.one_hot(torch.tensor([0, 1, 2, 0, 1]), 3).float()
    mask = torch.ones(5, 3, dtype=torch.bool)
    terms = Combined({"ce": CrossEntropy(), "bce": BinaryCrossEntropy()})(output, target, mask)
    assert terms.sum.shape == (1,)
    expected = mean_of(CrossEntropy()(output, target, mask)) + mean_of(BinaryCrossEntropy()(output, target, mask))
    torch.testing.assert_close(mean_of(terms), expected)


def test_fit_reaches_every_loss():
    loss = Combined({"bce": BinaryCrossEntropy("inverse_frequency"), "dice": Dice(weights="inverse_frequency")})
    labels = np.array([[1, 0], [0, 1]], np.float32)
    loss.fit([Coded(labels, np.ones_like(labels, bool))])
    assert torch.isfinite(loss(torch.zeros(1, 2), torch.ones(1, 2), torch.ones(1, 2, dtype=torch.bool)).sum).all()


def test_is_made_from_a_config():
    loss = instantiate(
        {
            "_target_": "affect.losses.Combined",
            "losses": {
                "bce": {"_target_": "affect.losses.BinaryCrossEntropy"},
                "dice": {"_target_": "affect.losses.Dice", "epsilon": 1.0},
                "off": None,
            },
            "factors": {"bce": 1.0, "dice": 0.5, "off": 1.0},
        }
    )
    assert loss.factors == {"bce": 1.0, "dice": 0.5}


def test_bad_settings_are_named():
    with pytest.raises(ConfigError, match="did you mean dice"):
        Combined({"dice": Dice()}, {"dise": 1.0})
    with pytest.raises(ConfigError, match="at least one"):
        Combined({})
