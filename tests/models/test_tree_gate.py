# SPDX-License-Identifier: Apache-2.0
"""The gate's leaf weights against explicit products along paths."""

from __future__ import annotations

import doctest

import pytest
import torch

from affect.errors import ConfigError
from affect.models import tree_gate as module
from affect.models.tree_gate import TreeGate, tree_gate


def path_product(row: torch.Tensor, leaf: int, depth: int) -> torch.Tensor:
    """The weight of a leaf from its binary digits: 0 goes to the first child, 1 to the second."""
    node, weight = 1, row.new_ones(())
    for level in reversed(range(depth)):
        second = leaf >> level & 1
        weight = weight * (1 - row[node] if second else row[node])
        node = 2 * node + second
    return weight


@pytest.mark.parametrize("depth", [0, 1, 2, 3, 5])
def test_leaves_are_products_along_their_paths(depth):
    torch.manual_seed(depth)
    decisions = torch.rand(6, 2**depth)
    found = tree_gate(decisions)
    wanted = torch.stack(
        [torch.stack([path_product(row, leaf, depth) for leaf in range(2**depth)]) for row in decisions]
    )
    assert torch.equal(found, wanted)
    torch.testing.assert_close(found.sum(1), torch.ones(6), atol=2e-7, rtol=0)


@pytest.mark.parametrize("depth", [1, 3, 5])
def test_undecided_nodes_share_evenly(depth):
    assert torch.equal(tree_gate(torch.full((2, 2**depth), 0.5)), torch.full((2, 2**depth), 2.0**-depth))


def test_a_leaf_depends_on_the_nodes_of_its_path_alone():
    decisions = torch.rand(1, 8).requires_grad_()
    tree_gate(decisions)[0, 3].backward()
    assert decisions.grad.nonzero()[:, 1].tolist() == [1, 2, 5]


def test_saturated_nodes_choose_one_leaf():
    decisions = torch.tensor([[0.0, 1, 0, 1, 1, 0, 1, 1], [1.0, 0, 1, 0, 1, 1, 1, 1]])
    assert tree_gate(decisions).argmax(1).tolist() == [3, 6]
    assert tree_gate(decisions).sort(1).values[:, -2:].tolist() == [[0, 1], [0, 1]]


def test_gradients_match_finite_differences():
    decisions = torch.rand(2, 8, dtype=torch.float64, requires_grad=True)
    assert torch.autograd.gradcheck(tree_gate, decisions)


@pytest.mark.parametrize("leaves", [0, 3, 6, 12])
def test_other_numbers_of_leaves_are_refused(leaves):
    with pytest.raises(ConfigError, match=f"and {leaves} were asked for"):
        TreeGate(4, leaves)


@pytest.mark.parametrize("norm", [True, False])
def test_the_unused_entry_is_not_trained(norm):
    torch.manual_seed(0)
    gate = TreeGate(4, 8, norm)
    out = gate(torch.randn(5, 4))
    (out * torch.randn(5, 8)).sum().backward()
    assert (gate.linear.weight.grad[0] == 0).all()
    assert (gate.linear.weight.grad[1:] != 0).any(1).all()


def test_examples():
    assert doctest.testmod(module).failed == 0
