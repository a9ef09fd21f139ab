# SPDX-License-Identifier: Apache-2.0
"""Closed forms and invariances of the privileged attribution loss."""

from __future__ import annotations

import pytest
import torch
from torch import nn

from affect.losses.privileged_attribution import (
    attribution,
    correlation,
    landmark_prior,
    privileged_attribution,
    spread_of,
)

STRATEGIES = ["mean", "half_mean", "all"]


@pytest.fixture
def given():
    torch.manual_seed(0)
    return torch.randn(3, 6, 5, 4, dtype=torch.float64), torch.rand(3, 5, 4, dtype=torch.float64)


@pytest.mark.parametrize("channels", STRATEGIES)
@pytest.mark.parametrize("scale", ["norm", "std"])
class TestInvariances:
    def test_of_the_attribution(self, given, channels, scale):
        found, prior = given
        wanted = privileged_attribution(found, prior, channels, scale)
        torch.testing.assert_close(privileged_attribution(7.3 * found - 2.1, prior, channels, scale), wanted)
        torch.testing.assert_close(privileged_attribution(1e-9 * found, prior, channels, scale), wanted)
        torch.testing.assert_close(privileged_attribution(-found, prior, channels, scale), -wanted)

    def test_of_the_prior(self, given, channels, scale):
        found, prior = given
        wanted = privileged_attribution(found, prior, channels, scale)
        torch.testing.assert_close(privileged_attribution(found, prior + 5, channels, scale), wanted)
        torch.testing.assert_close(privileged_attribution(found, 3 * prior, channels, scale), 3 * wanted)

    def test_a_constant_prior_costs_nothing(self, given, channels, scale):
        found, prior = given
        zero = privileged_attribution(found, torch.ones_like(prior), channels, scale)
        torch.testing.assert_close(zero, torch.zeros(3, dtype=torch.float64), atol=1e-12, rtol=0)

    def test_the_least_value_is_reached_by_the_prior_itself(self, given, channels, scale):
        found, prior = given
        least = -(prior - prior.mean((1, 2), keepdim=True)).flatten(1).norm(dim=1)
        factor = 20**0.5 if scale == "std" else 1.0
        same = (2 * prior + 3)[:, None].expand(-1, 6, -1, -1)
        torch.testing.assert_close(privileged_attribution(same, prior, channels, scale), factor * least)
        assert (privileged_attribution(found, prior, channels, scale) > factor * least).all()


def test_strategies_differ(given):
    found, prior = given
    values = torch.stack([privileged_attribution(found, prior, channels) for channels in STRATEGIES])
    assert (values.diff(dim=0).abs() > 1e-3).all()


def test_half_mean_leaves_the_other_half_free(given):
    found, prior = given
    found.requires_grad_()
    (gradient,) = torch.autograd.grad(privileged_attribution(found, prior, "half_mean").sum(), found)
    assert (gradient[:, 3:] == 0).all()
    assert (gradient[:, :3] != 0).any()


def test_dead_channels_are_left_out(given):
    found, prior = given
    wanted = privileged_attribution(found[:, :4], prior, "all")
    dead = torch.cat([found[:, :4], torch.zeros(3, 1, 5, 4), torch.full((3, 1, 5, 4), 2.0)], 1).requires_grad_()
    value = privileged_attribution(dead, prior, "all")
    torch.testing.assert_close(value, wanted)
    (gradient,) = torch.autograd.grad(value.sum(), dead)
    assert gradient.isfinite().all()
    assert (privileged_attribution(torch.zeros(3, 2, 5, 4), prior, "mean") == 0).all()


@pytest.mark.parametrize("value", [0.1, -3.3, 1e-6, 7e5])
def test_a_channel_that_varies_by_rounding_alone_is_dead(given, value):
    """The mean of equal numbers is another number in their last digit; that is no direction to be pulled in."""
    found, prior = (part.float() for part in given)
    same = torch.full((3, 1, 5, 4), value)
    wanted = privileged_attribution(found, prior, "all")
    both = torch.cat([found, same], 1).requires_grad_()
    value = privileged_attribution(both, prior, "all")
    torch.testing.assert_close(value, wanted)
    (gradient,) = torch.autograd.grad(value.sum(), both)
    assert (gradient[:, -1] == 0).all()
    assert (privileged_attribution(same, prior, "mean") == 0).all()


def test_correlation_is_pearsons(given):
    found, prior = given
    for k in range(3):
        pair = torch.stack([found[k].mean(0).flatten(), prior[k].flatten()])
        torch.testing.assert_close(correlation(found, prior)[k], torch.corrcoef(pair)[0, 1])


class TestPrior:
    def test_it_is_the_sum_of_gaussians_over_the_maximum(self):
        points = torch.tensor([[[3.0, 2.0], [6.5, 4.0]]])
        maps, some = landmark_prior(points, torch.ones(1, 2, dtype=torch.bool), (8, 10), (8, 10), 1.5)
        y, x = torch.meshgrid(torch.arange(8.0), torch.arange(10.0), indexing="ij")
        wanted = sum((-((x - px) ** 2 + (y - py) ** 2) / (2 * 1.5**2)).exp() for px, py in points[0])
        torch.testing.assert_close(maps[0], wanted / wanted.max())
        assert some.all()

    def test_a_coarse_map_is_the_mean_over_its_cells(self):
        points, mask = torch.rand(2, 5, 2) * 32, torch.ones(2, 5, dtype=torch.bool)
        fine = landmark_prior(points, mask, (32, 32), (32, 32), 1.0)[0]
        coarse = landmark_prior(points, mask, (32, 32), (4, 4), 1.0)[0]
        wanted = nn.functional.avg_pool2d(fine[:, None], 8)[:, 0]
        torch.testing.assert_close(coarse, wanted / wanted.amax((1, 2), keepdim=True))

    def test_unknown_points_draw_nothing(self):
        points = torch.tensor([[[3.0, 2.0], [torch.nan, 7.0]], [[1.0, 1.0], [2.0, 2.0]]])
        mask = torch.tensor([[True, False], [False, False]])
        maps, some = landmark_prior(points, mask, (8, 8), (8, 8), 1.0)
        only = landmark_prior(points[:1, :1], mask[:1, :1], (8, 8), (8, 8), 1.0)[0]
        torch.testing.assert_close(maps[:1], only)
        assert some.tolist() == [True, False]
        assert (maps[1] == 0).all()

    def test_x_is_across(self):
        maps, _ = landmark_prior(torch.tensor([[[6.0, 1.0]]]), torch.ones(1, 1, dtype=torch.bool), (8, 8), (8, 8), 0.5)
        assert divmod(int(maps[0].argmax()), 8) == (1, 6)


class TestAttribution:
    @pytest.fixture
    def network(self):
        torch.manual_seed(1)
        below = nn.Sequential(nn.Conv2d(1, 4, 3, padding=1), nn.ReLU()).double()
        head = nn.Sequential(nn.Flatten(), nn.Linear(4 * 36, 8), nn.ReLU(), nn.Linear(8, 3)).double()
        return below, head, torch.randn(2, 1, 6, 6, dtype=torch.float64), torch.rand(2, 6, 6, dtype=torch.float64)

    def loss(self, network, kind="grad_input"):
        below, head, image, prior = network
        activation = below(image)
        found = attribution(head(activation).sum(), activation, kind).double()
        return privileged_attribution(found, prior).sum()

    def test_its_gradient_is_that_of_finite_differences(self, network):
        below, head, image, prior = network

        def loss(weight):
            activation = nn.functional.conv2d(image, weight, below[0].bias, padding=1).tanh()
            (gradient,) = torch.autograd.grad(head(activation).tanh().sum(), activation, create_graph=True)
            return privileged_attribution(gradient * activation, prior)

        weight = below[0].weight.detach().clone().requires_grad_()
        assert torch.autograd.gradcheck(loss, weight, eps=1e-6, atol=1e-5)

    def test_gradient_times_input_trains_below_and_above(self, network):
        below, head, _, _ = network
        self.loss(network).backward()
        assert below[0].weight.grad.abs().max() > 1e-6
        assert head[1].weight.grad.abs().max() > 1e-6

    def test_the_gradient_alone_trains_nothing_below_in_a_network_of_relus(self, network):
        below, head, _, _ = network
        self.loss(network, "grad").backward()
        assert below[0].weight.grad is None or (below[0].weight.grad == 0).all()
        assert head[1].weight.grad.abs().max() > 1e-6

    def test_probabilities_have_no_attribution(self, network):
        below, head, image, _ = network
        activation = below(image)
        found = attribution(head(activation).softmax(1).sum(), activation)
        assert found.abs().max() < 1e-12

    def test_behind_an_average_the_gradient_is_constant(self):
        activation = torch.rand(2, 4, 6, 6, requires_grad=True)
        score = nn.Linear(4, 3)(activation.mean((2, 3))).sum()
        assert (spread_of(attribution(score, activation, "grad")) < 1e-6).all()
        assert (spread_of(attribution(nn.Linear(4, 3)(activation.mean((2, 3))).sum(), activation)) > 0.1).all()
