# SPDX-License-Identifier: Apache-2.0
from __future__ import annotations

import copy
import math

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from affect.compression.base import Data, relative_error, run_chain
from affect.compression.layers import InputGrid
from affect.compression.power import PowerQuantization
from affect.compression.residual import (
    ResidualExpansion,
    ensemble,
    expand,
    expand_stored,
    kept_rows,
    layer_shares,
    stacked,
)
from affect.compression.stored import GridWeight, ResidualWeight, signed_levels
from affect.compression.structure import apply_structure, structure
from affect.compression.ternary import MassQuantization
from affect.compression.uniform import round_to_grid
from affect.errors import ConfigError


@pytest.fixture
def weight() -> Tensor:
    return torch.randn(64, 256, generator=torch.Generator().manual_seed(0), dtype=torch.float64)


def total(weight: Tensor, **settings: float) -> Tensor:
    return sum(order.decoded(weight.shape) for order in expand(weight, **settings))  # type: ignore[arg-type, return-value]


@pytest.mark.parametrize("bits", [2, 3, 4, 8])
def test_the_largest_error_shrinks_by_2n_with_every_order_and_never_exceeds_its_bound(
    weight: Tensor, bits: int
) -> None:
    largest, orders = [], range(1, 5)
    for count in orders:
        error = (weight - total(weight, bits=bits, orders=count)).abs()
        steps = expand(weight, bits, count)[-1].scale
        assert bool((error.amax(1) <= steps / 2 * (1 + 1e-4) + 1e-15).all())
        largest.append(float(error.max()))
    slope = float(np.polyfit(list(orders), np.log(largest), 1)[0])
    assert slope == pytest.approx(-math.log(2 * signed_levels(bits)), rel=0.05)


@pytest.mark.parametrize(("bits", "orders"), [(2, 40), (4, 12), (8, 6)])
def test_enough_orders_are_the_floats(weight: Tensor, bits: int, orders: int) -> None:
    assert float((weight - total(weight, bits=bits, orders=orders)).abs().max()) < 1e-10


def test_a_share_of_one_is_dense_and_of_none_is_an_order_less(weight: Tensor) -> None:
    assert len(expand(weight, 4, 3, 0.0)) == 1
    assert torch.equal(total(weight, bits=4, orders=2, share=0.0), total(weight, bits=4, orders=1))
    assert all(order.rows is None for order in expand(weight, 4, 3, 1.0))
    errors = [relative_error(weight, total(weight, bits=3, orders=2, share=s)) for s in (0, 0.25, 0.5, 0.75, 1)]
    assert errors == sorted(errors, reverse=True)
    assert errors[-1] < 0.3 * errors[0]


def test_rows_with_most_left_over_are_kept() -> None:
    left = torch.diag(torch.tensor([1.0, 5.0, 2.0, 4.0]))
    assert kept_rows(left, 0.5).tolist() == [1, 3]
    assert kept_rows(left, 1.0) is None
    assert kept_rows(left, 0.1).tolist() == []


def test_budgets_have_the_mean_that_was_asked_for() -> None:
    for share in (0.0, 0.3, 0.5, 0.8, 1.0):
        found = layer_shares(7, share, "linear")
        assert np.mean(found) == pytest.approx(share)
        assert found == sorted(found)
        assert 0 <= found[0] <= found[-1] <= 1
        assert layer_shares(7, share, "equal") == [share] * 7


@pytest.mark.parametrize("share", [1.0, 0.5])
def test_one_stacked_product_is_the_sum_of_all(weight: Tensor, share: float) -> None:
    x = torch.randn(5, 256, generator=torch.Generator().manual_seed(1), dtype=torch.float64)
    orders = expand(weight, 3, 3, share)
    rows = stacked(orders)
    assert len(rows.codes) == 64 * (1 + 2 * share)
    expected = sum(x @ order.decoded(weight.shape).T for order in orders)
    torch.testing.assert_close(rows.linear(x), expected)
    kernels = weight.view(64, 16, 4, 4)
    image = torch.randn(2, 16, 8, 8, dtype=torch.float64)
    orders = expand(kernels, 3, 2, share)
    expected = sum(F.conv2d(image, order.decoded(kernels.shape), padding=1) for order in orders)
    torch.testing.assert_close(stacked(orders).convolution(image, padding=1), expected)


@pytest.mark.parametrize("share", [1.0, 0.5])
def test_stored_orders_are_those_of_the_formula(weight: Tensor, share: float) -> None:
    stored, bits = expand_stored(weight, round_to_grid(weight, 4), 4, 2, share)
    assert isinstance(stored, ResidualWeight)
    assert bits == 4 + 4 * share
    torch.testing.assert_close(stored().double(), total(weight, bits=4, orders=2, share=share), rtol=0, atol=2e-6)
    alone, bits = expand_stored(weight, round_to_grid(weight, 4), 4, 1)
    assert isinstance(alone, GridWeight)
    assert bits == 4


@pytest.mark.parametrize("signed", [True, False])
def test_orders_of_an_input_shrink_its_error_too(signed: bool) -> None:
    x = torch.linspace(-1 if signed else 0, 1, 4001, dtype=torch.float64)
    errors = []
    for orders in (1, 2, 3):
        grid = InputGrid(1, 4, signed, orders=orders)
        grid.scale.fill_(1 / grid.high)
        grid.scale = grid.scale.double()
        errors.append(float((grid(x) - x).abs().max()))
        fresh = InputGrid(**grid.settings())
        assert fresh.orders == orders
    assert errors[1] == pytest.approx(errors[0] / 14, rel=0.05)
    assert errors[2] == pytest.approx(errors[1] / 14, rel=0.1)


class Net(nn.Module):
    def __init__(self, depth: int = 4, width: int = 64) -> None:
        super().__init__()
        self.layers = nn.ModuleList(nn.Linear(width, width) for _ in range(depth))
        for layer in self.layers:
            nn.init.normal_(layer.weight, std=math.sqrt(2 / width))

    def forward(self, x: Tensor) -> Tensor:
        for layer in self.layers[:-1]:
            x = layer(x).relu()
        return self.layers[-1](x)


@pytest.fixture
def network() -> Net:
    torch.manual_seed(0)
    return Net().eval()


@pytest.fixture
def inputs() -> Tensor:
    return torch.randn(200, 64, generator=torch.Generator().manual_seed(2))


def expanded(network: nn.Module, inputs: Tensor, **settings: object) -> tuple[nn.Module, float]:
    changed = copy.deepcopy(network)
    transform = ResidualExpansion(edge_bits=None, **settings)  # type: ignore[arg-type]
    chain = run_chain(changed, [transform], Data(images=[inputs]), inputs)
    return changed, chain.errors[0]


def test_a_network_loses_less_with_every_order_and_share(network: Net, inputs: Tensor) -> None:
    by_order = [expanded(network, inputs, bits=3, orders=k)[1] for k in (1, 2, 3)]
    assert by_order[1] < by_order[0] / 4
    assert by_order[2] < by_order[1] / 4
    by_share = [expanded(network, inputs, bits=3, orders=2, share=s)[1] for s in (0.25, 0.5, 0.75)]
    assert by_order[0] > by_share[0] > by_share[1] > by_share[2] > by_order[1]


def test_input_orders_need_few_bits(network: Net, inputs: Tensor) -> None:
    one, two = (expanded(network, inputs, bits=8, input_bits=3, input_orders=k)[1] for k in (1, 2))
    assert two < one / 3


@pytest.mark.parametrize("first", [PowerQuantization(bits=3, edge_bits=None), MassQuantization(edge_bits=None)])
def test_orders_sit_on_any_quantizer(first: PowerQuantization | MassQuantization, network: Net, inputs: Tensor) -> None:
    changed = copy.deepcopy(network)
    chain = run_chain(changed, [first, ResidualExpansion(bits=4, edge_bits=None)], Data(), inputs)
    assert chain.errors[1] < 0.3 * chain.errors[0]
    before, after = (report.layers[1].signal_to_noise for report in chain.reports)
    assert after > before + 10
    fresh, state = copy.deepcopy(network), changed.state_dict()
    apply_structure(fresh, structure(network, changed), state, "config.yaml")
    fresh.load_state_dict(state)
    assert torch.equal(fresh(inputs), changed(inputs))
    with pytest.raises(ConfigError, match=r"layers\.0 are codes and what they were before is not known"):
        ResidualExpansion(edge_bits=None)(fresh, Data())


def test_edges_have_their_bits_and_one_order(network: Net) -> None:
    report = ResidualExpansion(bits=2, orders=3)(network, Data())
    assert [record.bits for record in report.layers] == [8, 2, 2, 8]
    assert isinstance(network.layers[0].stored, GridWeight)
    assert len(network.layers[1].stored.orders) == 3
    assert report.layers[1].note == "6.0 bits a weight in all orders"


def test_an_ensemble_that_is_no_better_is_refused(network: Net, inputs: Tensor) -> None:
    changed, _ = expanded(network, inputs, bits=3, orders=2)
    with pytest.raises(ConfigError, match="ensemble: refused"):
        ensemble(network, changed, 1, [inputs])
    with pytest.raises(ConfigError, match="more than 2 orders"):
        ensemble(network, changed, 2, [inputs])


def test_an_ensemble_of_one_layer_is_exact_and_accepted(inputs: Tensor) -> None:
    """With a single layer the sum of networks is the sum of orders."""
    torch.manual_seed(0)
    network = Net(depth=1)
    changed, error = expanded(network, inputs, bits=3, orders=2)
    made = ensemble(network, changed, 1, [inputs])
    assert relative_error(network(inputs), made(inputs)) == pytest.approx(error, rel=1e-3)


def test_settings_that_make_no_sense_are_refused() -> None:
    for settings in ({"bits": 1}, {"orders": 0}, {"share": 1.5}, {"budget": "steep"}, {"input_orders": 2}):
        with pytest.raises(ConfigError, match=f"compression.rex.{next(iter(settings))}="):
            ResidualExpansion(**settings)
