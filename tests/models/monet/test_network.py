# SPDX-License-Identifier: Apache-2.0
"""What defines MONET: causality, equivariance, exact counts, and inference that agrees with enumeration."""

from __future__ import annotations

import itertools

import pytest
import torch
import torch.nn.functional as F
from torch import nn

from affect.errors import ConfigError
from affect.models.monet.network import MultiOrder, TaskCells, kept_orders, mean_logit
from affect.models.monet.orders import draw_orders


def make(tasks=4, orders=7, features=6, hidden=5, labels=3, **keywords) -> MultiOrder:
    torch.manual_seed(1)
    network = MultiOrder(features, torch.as_tensor(draw_orders(tasks, orders, 2)), hidden, labels, **keywords).double()
    for parameter in network.parameters():
        nn.init.normal_(parameter, std=0.7)
    return network


def data(tasks=4, batch=9, features=6):
    torch.manual_seed(5)
    return torch.randn(batch, features).double(), torch.randint(0, 2, (batch, tasks)).double()


@pytest.mark.parametrize(
    ("tasks", "hidden", "features", "orders", "total"),
    [
        (5, 64, 512, 120, 161_101),
        (4, 32, 256, 3, 45_987),
        (4, 32, 256, 6, 46_050),
        (4, 32, 256, 12, 46_176),
        (4, 32, 256, 24, 46_428),
    ],
)
def test_parameter_counts_are_those_of_the_authors_runs(tasks, hidden, features, orders, total):
    network = MultiOrder(features, torch.as_tensor(draw_orders(tasks, orders)), hidden, 64)
    trained = sum(p.numel() for name, p in network.named_parameters() if name != "order_logits")
    # Their totals count constant order matrices and orders as well.
    assert trained + orders * tasks**2 + orders * tasks + orders == total


def test_parameter_counts_of_bp4d_and_disfa():
    for tasks, wanted in ((12, 429_964), (8, 330_376)):
        network = MultiOrder(2048, torch.as_tensor(draw_orders(tasks, 512)))
        assert sum(p.numel() for p in network.parameters()) == wanted + 512


def explicit(network: MultiOrder, vector, labels, order) -> torch.Tensor:
    """One example along one order, written out as in the paper, with torch's own layers."""
    cells, hidden = network.cells, network.cells.hidden
    h = network.state(vector[None])[0]
    v = torch.zeros(cells.tasks).double()
    logits = torch.zeros(cells.tasks).double()
    for task in order.tolist():
        i = F.linear(v, cells.label_weight.T, cells.label_bias)
        w, u, b = cells.input_kernel[task], cells.state_kernel[task], cells.bias[task]
        from_label = (i @ w + b).split(hidden)
        z = (from_label[0] + h @ u[:, :hidden]).sigmoid()
        r = (from_label[1] + h @ u[:, hidden : 2 * hidden]).sigmoid()
        seen = h if cells.candidate == "tanh" else h.sigmoid()
        c = from_label[2] + (r * seen) @ u[:, 2 * hidden :]
        c = c.tanh() if cells.candidate == "tanh" else c.sigmoid()
        h = z * h + (1 - z) * c
        logits[task] = h @ cells.head_weight[task] + cells.head_bias[task]
        v = torch.zeros(cells.tasks).double()
        v[task] = 2 * labels[task] - 1
    return logits


@pytest.mark.parametrize("candidate", ["tanh", "sigmoid"])
def test_it_is_the_loop_over_examples_orders_and_steps(candidate):
    network = make(candidate=candidate)
    vector, labels = data()
    found = network.forced(vector, labels)
    for b, m in itertools.product(range(len(vector)), range(len(network.orders))):
        torch.testing.assert_close(found[b, m], explicit(network, vector[b], labels[b], network.orders[m]))


def test_a_logit_depends_on_earlier_labels_only():
    network = make()
    vector, labels = data()
    plain = network.forced(vector, labels)
    for task in range(4):
        other = labels.clone()
        other[:, task] = 1 - other[:, task]
        changed = (network.forced(vector, other) != plain).any(0)  # (orders, tasks)
        for m, order in enumerate(network.orders.tolist()):
            step = order.index(task)
            assert not changed[m, order[: step + 1]].any()
            assert changed[m, order[step + 1 :]].all()


def test_renaming_tasks_changes_nothing():
    network, renamed = make(), make()
    vector, labels = data()
    name = torch.tensor([2, 0, 3, 1])  # new task k is old task name[k]
    for key in ("input_kernel", "state_kernel", "bias", "head_weight", "head_bias", "label_weight"):
        getattr(renamed.cells, key).data.copy_(getattr(network.cells, key).data[name])
    back = torch.argsort(name)
    renamed.orders = back[network.orders]
    torch.testing.assert_close(renamed.forced(vector, labels[:, name]), network.forced(vector, labels)[:, :, name])


def test_relisting_orders_changes_nothing():
    network, relisted = make(), make()
    vector, labels = data()
    shuffle = torch.tensor([3, 1, 0, 6, 5, 2, 4])
    relisted.orders = network.orders[shuffle]
    torch.testing.assert_close(relisted.forced(vector, labels), network.forced(vector, labels)[:, shuffle])


def test_one_order_is_the_single_order_network():
    network = make(orders=1)
    vector, labels = data()
    found = network.forced(vector, labels)[:, 0]
    wanted = torch.stack([explicit(network, x, y, network.orders[0]) for x, y in zip(vector, labels, strict=True)])
    torch.testing.assert_close(found, wanted)


class TestOrderDropout:
    def test_gathered_masked_and_per_batch_forms_agree(self):
        network = make()
        vector, labels = data()
        every = network.forced(vector, labels)
        each = kept_orders(7, 3, len(vector))
        torch.testing.assert_close(
            network.forced(vector, labels, chosen=each), every.gather(1, each[..., None].expand(-1, -1, 4))
        )
        torch.testing.assert_close(network.forced(vector, labels, chosen=each[0]), every[:, each[0]])

    def test_gradients_of_the_forms_agree(self):
        network = make()
        vector, labels = data()
        each = kept_orders(7, 3, len(vector))
        weights = torch.randn(9, 3, 4).double()
        gathered = (network.forced(vector, labels, chosen=each) * weights).sum()
        masked = (network.forced(vector, labels).gather(1, each[..., None].expand(-1, -1, 4)) * weights).sum()
        parameters = [p for name, p in network.named_parameters() if name != "order_logits"]
        for a, b in zip(
            torch.autograd.grad(gathered, parameters), torch.autograd.grad(masked, parameters), strict=True
        ):
            torch.testing.assert_close(a, b)

    def test_every_order_is_kept_equally_often(self):
        torch.manual_seed(0)
        kept = kept_orders(10, 4, 20_000)
        assert (kept.diff(dim=1) > 0).all()  # distinct
        frequency = torch.bincount(kept.reshape(-1), minlength=10) / 20_000
        assert (frequency - 0.4).abs().max() < 4 * (0.4 * 0.6 / 20_000) ** 0.5

    def test_keeping_all_is_no_dropout(self):
        assert kept_orders(6, 6).tolist() == list(range(6))
        with pytest.raises(ConfigError, match="between 1 and the number of orders"):
            kept_orders(6, 7)


class TestMissingLabels:
    def test_a_missing_label_is_not_read(self):
        network = make()
        vector, labels = data()
        known = torch.rand(9, 4) > 0.4
        for unknown in ("draw", "zero"):
            found = []
            for filler in (0.0, 1.0):
                torch.manual_seed(3)
                filled = torch.where(known, labels, filler)
                found.append(network.forced(vector, filled, known, unknown=unknown))
            torch.testing.assert_close(found[0], found[1])

    def test_zero_stands_for_no_label(self):
        network = make()
        vector, labels = data()
        found = network.forced(vector, labels, torch.zeros(9, 4, dtype=torch.bool), unknown="zero")
        silent = make()
        silent.cells.label_weight.data.zero_()
        torch.testing.assert_close(found, silent.forced(vector, labels))

    def test_a_draw_carries_no_gradient_and_follows_the_model(self):
        network = make(tasks=2, orders=2)
        vector, labels = data(tasks=2, batch=1)
        known = torch.zeros(1, 2, dtype=torch.bool)
        with torch.no_grad():
            positive = network.forced(vector, labels.fill_(1.0))
            negative = network.forced(vector, labels.fill_(0.0))
            drawn = network.forced(vector.expand(4000, -1), labels.expand(4000, -1), known.expand(4000, -1))
        for m, order in enumerate(network.orders.tolist()):
            first, second = order
            is_positive = (drawn[:, m, second] - positive[0, m, second]).abs() < 1e-9
            is_negative = (drawn[:, m, second] - negative[0, m, second]).abs() < 1e-9
            assert (is_positive ^ is_negative).all()
            chance = float(positive[0, m, first].sigmoid())
            assert abs(float(is_positive.double().mean()) - chance) < 4 * (chance * (1 - chance) / 4000) ** 0.5 + 1e-9


class TestInference:
    def test_sampling_agrees_with_enumeration(self):
        network = make(tasks=3, orders=6, samples=20_000)
        network.order_logits.data.copy_(torch.randn(6).double())
        vector, _ = data(tasks=3, batch=2)
        with torch.no_grad():
            exact = torch.zeros(2, 3).double()
            pi = network.order_logits.softmax(0)
            for string in itertools.product((0.0, 1.0), repeat=3):
                labels = torch.tensor(string).double().expand(2, 3)
                logits = network.forced(vector, labels)
                chance = torch.where(labels[:, None] > 0, logits.sigmoid(), 1 - logits.sigmoid()).prod(-1)
                exact += (pi * chance)[..., None].mul(labels[:, None]).sum(1)
            found = network(vector).sigmoid()
            fresh = network(vector, fresh=True).sigmoid()
        error = 4 * 0.5 / 20_000**0.5
        assert (found - exact).abs().max() < error
        assert (fresh - exact).abs().max() < error

    def test_an_image_has_the_same_probabilities_in_any_batch(self):
        network = make()
        vector, _ = data()
        together = network(vector)
        alone = torch.cat([network(one[None]) for one in vector])
        torch.testing.assert_close(together, alone)
        assert torch.equal(network(vector), together)
        assert not torch.equal(network(vector, fresh=True), network(vector, fresh=True))

    def test_saturated_cells_follow_their_own_labels(self):
        network = make()
        network.cells.head_bias.data.copy_(torch.tensor([40.0, -40.0, 40.0, -40.0]).double())
        network.cells.head_weight.data.mul_(0.1)
        vector, _ = data()
        own = torch.tensor([1.0, 0.0, 1.0, 0.0]).double().expand(9, 4)
        uniforms = network.label_uniforms
        drawn = network.cells(network.state(vector), network.orders, uniforms=uniforms[:7])
        torch.testing.assert_close(drawn, network.forced(vector, own))

    def test_it_does_not_depend_on_hidden_random_state(self):
        network = make()
        vector, _ = data()
        first = network(vector)
        torch.rand(100)
        assert torch.equal(first, network(vector))

    def test_the_mean_logit_is_exact_near_the_ends(self):
        logits = torch.tensor([[-60.0, -62.0], [55.0, 57.0], [0.3, -2.0]]).double()
        torch.testing.assert_close(mean_logit(logits, 1)[2], torch.logit(logits[2].sigmoid().mean()))
        assert -61 < mean_logit(logits, 1)[0] < -60
        assert 55 < mean_logit(logits, 1)[1] < 57


def test_a_cell_of_another_kind_is_refused():
    with pytest.raises(ConfigError, match="candidate"):
        TaskCells(3, candidate="relu")  # type: ignore[arg-type]
