# SPDX-License-Identifier: Apache-2.0
"""The networks that MONET is compared with are what they claim to be."""

from __future__ import annotations

import numpy as np
import pytest
import torch

from affect.encoders import TimmEncoder
from affect.models.monet import SoftLayerOrdering, TaskCells, VMNCommon, VMNSeparate
from affect.models.monet.baselines import CommonTrunk, SeparateBranches, SoftLayerOrder
from tests.models.monet.test_module import make, make_batch, make_task

VECTOR = torch.randn(6, 5, generator=torch.Generator().manual_seed(0))


def test_branches_do_not_share_anything():
    torch.manual_seed(0)
    network = SeparateBranches(5, 3, 4)
    plain = network(VECTOR)
    for parameter in (network.layers[0].weight, network.layers[3].weight, network.layers[6].weight):
        width = len(parameter) // 3
        with torch.no_grad():
            parameter[width : 2 * width] += 1.0  # the second branch
    changed = (network(VECTOR) != plain).any(0)
    assert changed.tolist() == [False, True, False]


def test_a_branch_is_the_common_trunk_of_one_output():
    torch.manual_seed(0)
    branches, trunk = SeparateBranches(5, 2, 4), CommonTrunk(5, 1, 4)
    with torch.no_grad():
        for own, one in zip(branches.layers, trunk.layers, strict=True):
            for (name, wanted), found in zip(one.named_parameters(), own.parameters(), strict=True):
                size = len(wanted)
                found[size:] = wanted.view(found[size:].shape)
                assert name in ("weight", "bias")
    torch.testing.assert_close(branches(VECTOR)[:, 1:], trunk(VECTOR))


def test_soft_layer_ordering_can_order_layers():
    torch.manual_seed(0)
    network = SoftLayerOrder(5, 2, 4, layers=2, depth=2)
    with torch.no_grad():
        network.scales[:] = torch.tensor([[[50.0, -50.0], [-50.0, 50.0]], [[-50.0, 50.0], [50.0, -50.0]]])
    x, (a, b) = network.enter(VECTOR), network.kernels
    first, second = ((x @ a).relu() @ b).relu(), ((x @ b).relu() @ a).relu()
    wanted = torch.stack(
        [(h * w).sum(-1) + c for h, w, c in zip((first, second), network.head_weight, network.head_bias, strict=True)],
        1,
    )
    torch.testing.assert_close(network(VECTOR), wanted)


def test_tied_cells_treat_tasks_alike():
    cells = TaskCells(3, 4, 2, tied=True)
    torch.nn.init.constant_(cells.label_weight, 0.3)  # no task is told from another by its label either
    state, labels = torch.randn(2, 4), torch.ones(2, 3)
    orders = torch.tensor([[0, 1, 2], [2, 0, 1]])
    logits = cells(state, orders, labels)
    torch.testing.assert_close(logits[:, 0, [0, 1, 2]], logits[:, 1, [2, 0, 1]])  # by step
    assert sum(p.numel() for p in cells.parameters()) == (2 + 4) * 12 + 12 + 4 + 1 + 3 * 2 + 2


def test_mrnn_trains_and_predicts():
    model = make(orders=1, with_identity=True, kept=None, train_orders=False, tied=True, samples=3)
    assert model.orders.orders.tolist() == [[0, 1, 2, 3]]
    model.training_step(make_batch(), 0).backward()
    assert model.orders.cells.head_weight.grad is not None
    assert model(make_batch())["au"].shape == (6, 4)


@pytest.mark.parametrize("kind", [VMNCommon, VMNSeparate, SoftLayerOrdering])
def test_they_train_and_start_at_the_rates(kind):
    task = make_task()
    task.rates = np.array([0.1, 0.2, 0.3, np.nan])
    model = kind({"au": task}, TimmEncoder("test_resnet", image_size=32), width=6, log_odds_bias=True)
    torch.testing.assert_close(model.network.last_bias().sigmoid(), torch.tensor([0.1, 0.2, 0.3, 0.5]))
    model.training_step(make_batch(), 0).backward()
    assert all(p.grad is not None for p in model.network.parameters())
