# SPDX-License-Identifier: Apache-2.0
"""Closed forms of the two ways to mix the losses of orders."""

from __future__ import annotations

import pytest
import torch

from affect.models.monet.loss import bound, mixture


@pytest.fixture
def given():
    torch.manual_seed(0)
    losses = (torch.rand(5, 8, dtype=torch.float64) * 6).requires_grad_()
    logits = torch.randn(8, dtype=torch.float64).requires_grad_()
    return losses, logits


def test_the_bound_is_above_the_mixture(given):
    losses, logits = given
    assert (bound(losses, logits) >= mixture(losses, logits) - 1e-12).all()
    same = losses.detach()[:, :1].expand(-1, 8)
    torch.testing.assert_close(bound(same, logits), mixture(same, logits))
    certain = torch.full((8,), -1e3, dtype=torch.float64)
    certain[3] = 1e3
    torch.testing.assert_close(bound(losses, certain), losses[:, 3])
    torch.testing.assert_close(mixture(losses, certain), losses[:, 3])


def test_mixture_is_a_likelihood(given):
    losses, logits = given
    wanted = -(logits.softmax(0) * (-losses).exp()).sum(1).log()
    torch.testing.assert_close(mixture(losses, logits), wanted)
    far = mixture(losses.detach() + 500, logits.detach())  # exp(-500) is 0 in floating point
    torch.testing.assert_close(far, mixture(losses.detach(), logits.detach()) + 500)


@pytest.mark.parametrize("kind", ["bound", "mixture"])
def test_gradients_have_their_closed_forms(given, kind):
    losses, logits = given
    pi = logits.detach().softmax(0)
    rho = (pi * (-losses.detach()).exp()) / (pi * (-losses.detach()).exp()).sum(1, keepdim=True)
    value = (bound if kind == "bound" else mixture)(losses, logits).sum()
    by_loss, by_logit = torch.autograd.grad(value, [losses, logits])
    if kind == "bound":
        torch.testing.assert_close(by_loss, pi.expand(5, 8))
        mean = (pi * losses.detach()).sum(1, keepdim=True)
        torch.testing.assert_close(by_logit, (pi * (losses.detach() - mean)).sum(0))
    else:
        torch.testing.assert_close(by_loss, rho)
        torch.testing.assert_close(by_logit, (pi - rho).sum(0))


def test_orders_that_are_left_out_do_not_count(given):
    losses, logits = given
    mask = torch.zeros(5, 8, dtype=torch.float64)
    mask[:, 4:] = -torch.inf
    spoiled = losses.detach().clone()
    spoiled[:, 4:] = torch.inf
    for mix in (bound, mixture):
        masked = mix(spoiled, logits.detach() + mask)
        torch.testing.assert_close(masked, mix(losses.detach()[:, :4], logits.detach()[:4]))


def test_per_task_bound_adds_up_to_the_bound(given):
    _, logits = given
    cells = torch.rand(5, 8, 3, dtype=torch.float64)
    torch.testing.assert_close(bound(cells, logits).sum(1), bound(cells.sum(2), logits))


def test_descent_on_the_logits_finds_the_best_order():
    losses = torch.tensor([[2.0, 1.0, 0.4, 1.5]])
    logits = torch.zeros(4, requires_grad=True)
    optimizer = torch.optim.Adam([logits], 0.1)
    for _ in range(300):
        optimizer.zero_grad()
        bound(losses, logits).sum().backward()
        optimizer.step()
    assert logits.softmax(0)[2] > 0.99
