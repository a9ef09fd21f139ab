# SPDX-License-Identifier: Apache-2.0
from __future__ import annotations

import copy
from collections.abc import Callable

import numpy as np
import pytest
import torch
from torch import Tensor, nn

from affect.compression.base import Data, check_order, run_chain
from affect.compression.structure import apply_structure, structure
from affect.compression.ternary import (
    MassQuantization,
    SupportQuantization,
    TernaryLearner,
    mass_bins,
    straight_through,
    support_bins,
    ternary_grid,
)
from affect.compression.uniform import round_to_grid
from affect.errors import ConfigError

OPERATORS: dict[str, Callable[..., Tensor]] = {
    "naive": lambda w: round_to_grid(w, 2, False)(),
    "tquant": lambda w: ternary_grid(w, *support_bins(w, False))(),
    "mquant": lambda w: ternary_grid(w, *mass_bins(w, False))(),
    "step": lambda w: ternary_grid(w, *mass_bins(w, False, level="step"))(),
}


def gaussian(count: int = 1_000_000) -> Tensor:
    return torch.from_numpy(np.random.default_rng(0).normal(size=(1, count)))


def measured(operator: str, weight: Tensor) -> tuple[float, float, float]:
    """Return the squared error over the variance, the largest error over λ, and the share of zeros."""
    found = OPERATORS[operator](weight).double()
    error = (weight - found).abs()
    zeros = float((found == 0).double().mean())
    return float(error.square().mean() / weight.var()), float(error.max() / weight.abs().max()), zeros


def test_mass_equalization_has_the_error_of_its_closed_form() -> None:
    error, _, zeros = measured("mquant", gaussian())
    assert error == pytest.approx(0.2065, abs=0.003)
    assert zeros == pytest.approx(1 / 3, abs=0.005)
    threshold, level = mass_bins(gaussian())
    assert float(threshold) == pytest.approx(0.4307, abs=0.002)
    assert float(level) == pytest.approx(1.091, abs=0.004)
    assert measured("step", gaussian())[0] == pytest.approx(0.242, abs=0.003)


def test_mass_of_a_laplace_distribution_is_split_in_three() -> None:
    weight = torch.from_numpy(np.random.default_rng(0).laplace(size=(1, 500_000)))
    threshold, level = mass_bins(weight, reference="laplace")
    beyond = weight[weight.abs() > threshold]
    assert len(beyond) / weight.numel() == pytest.approx(2 / 3, abs=0.005)
    assert float(level) == pytest.approx(float(beyond.abs().mean()), rel=0.005)


@pytest.mark.parametrize("per_channel", [True, False])
def test_support_equalization_bounds_the_error_by_a_third(per_channel: bool) -> None:
    weight = gaussian(4000).view(8, 500) * torch.logspace(-1, 1, 8)[:, None]
    error = (weight - ternary_grid(weight, *support_bins(weight, per_channel))()).abs()
    if per_channel:
        torch.testing.assert_close(error.amax(1), weight.abs().amax(1) / 3, rtol=1e-2, atol=0)
        assert bool((error.amax(1) <= weight.abs().amax(1) / 3 * (1 + 1e-6)).all())
    assert float(error.max()) == pytest.approx(float(weight.abs().max()) / 3, rel=1e-5)


def test_support_equalization_is_the_best_for_uniform_weights() -> None:
    weight = torch.linspace(-1, 1, 30_001, dtype=torch.float64)[None]
    assert measured("tquant", weight)[0] == pytest.approx(1 / 9, abs=1e-3)
    for threshold, level in [(0.3, 2 / 3), (0.36, 2 / 3), (1 / 3, 0.6), (1 / 3, 0.72)]:
        other = ternary_grid(weight, torch.tensor([threshold]), torch.tensor([level]))().double()
        assert float((weight - other).square().mean() / weight.var()) > 1 / 9


def test_operators_are_ordered_on_bell_shaped_weights() -> None:
    naive, support, mass = (measured(name, gaussian(200_000)) for name in ("naive", "tquant", "mquant"))
    assert naive[0] > support[0] > mass[0]
    assert support[1] < naive[1] < mass[1]
    assert naive[2] > support[2] > mass[2]


@pytest.mark.parametrize("bins", [support_bins, mass_bins])
def test_the_gradient_passes_unchanged_inside_the_clip(bins: Callable[..., tuple[Tensor, Tensor]]) -> None:
    weight = gaussian(600).view(3, 200).requires_grad_()
    threshold, level = (one[:, None].detach() for one in bins(weight))
    level.requires_grad_()
    upstream = torch.linspace(-1, 1, 600, dtype=torch.float64).view(3, 200)
    out = straight_through(weight, threshold, level)
    out.backward(upstream)
    inside = weight.detach().abs() <= threshold + level.detach()
    assert torch.equal(weight.grad, upstream * inside)
    assert bool(inside.all()) is (bins is support_bins)
    torch.testing.assert_close(level.grad, (upstream * (out / level).detach()).sum(1, keepdim=True))
    assert len((out / level).detach().round(decimals=9).unique()) == 3


class Net(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.first = nn.Conv2d(3, 8, 3, padding=1)
        self.second = nn.Conv2d(8, 8, 3, padding=1)
        self.last = nn.Linear(8, 3)

    def forward(self, x: Tensor) -> Tensor:
        return self.last(self.second(self.first(x).relu()).relu().mean((2, 3)))


@pytest.fixture
def images() -> Tensor:
    return torch.randn(8, 3, 8, 8, generator=torch.Generator().manual_seed(0))


@pytest.mark.parametrize("kind", [SupportQuantization, MassQuantization])
def test_a_ternary_network_is_described(kind: type, images: Tensor) -> None:
    torch.manual_seed(0)
    network = Net().eval()
    changed = copy.deepcopy(network)
    report = run_chain(changed, [kind(input_bits=8)], Data(images=[images]), images).reports[0]
    assert [(r.name, r.bits, r.input_bits) for r in report.layers] == [
        ("first", 8, 8), ("second", 2, 8), ("last", 8, 8)
    ]  # fmt: skip
    assert "zeros" in report.layers[1].note
    assert all(len(row.unique()) <= 3 for row in changed.second.current_weight())
    fresh, state = copy.deepcopy(network), changed.state_dict()
    apply_structure(fresh, structure(network, changed), state, "config.yaml")
    fresh.load_state_dict(state)
    assert torch.equal(fresh.eval()(images), changed(images))


def test_channels_that_lose_all_weights_are_told() -> None:
    network = nn.Sequential(nn.Linear(4, 3))
    with torch.no_grad():
        network[0].weight[0] *= 1e-3
    report = SupportQuantization(per_channel=False, edge_bits=None)(network, Data())
    assert any(note.startswith("0: 1 of 3 channels") for note in report.notes)
    assert not SupportQuantization(edge_bits=None)(nn.Sequential(nn.Linear(4, 3)), Data()).notes


@pytest.mark.parametrize("scale", ["recomputed", "learned"])
@pytest.mark.parametrize("kind", [SupportQuantization, MassQuantization])
def test_training_lowers_the_loss_and_ends_in_three_values(kind: type, scale: str, images: Tensor) -> None:
    torch.manual_seed(0)
    network = Net().eval()
    target = copy.deepcopy(network)(images).detach()

    def loss(net: nn.Module) -> Tensor:
        return (net(images) - target).square().mean()

    def train(net: nn.Module, steps: int) -> None:
        optimizer = torch.optim.Adam(net.parameters(), 3e-3)
        for _ in range(steps):
            optimizer.zero_grad()
            loss(net).backward()
            optimizer.step()

    losses = []
    for steps in (0, 60):
        changed = copy.deepcopy(network)
        data = Data(train=lambda count, changed=changed: train(changed, count))
        transform = kind(steps=steps, scale=scale)
        assert transform.needs == (("train",) if steps else ())
        transform(changed, data)
        losses.append(float(loss(changed).detach()))
        assert not isinstance(changed.second.stored, TernaryLearner)
        assert all(len(row.unique()) <= 3 for row in changed.second.current_weight())
    assert losses[1] < 0.7 * losses[0]


def test_training_without_labels_and_settings_without_sense_are_refused() -> None:
    with pytest.raises(ConfigError, match="compression=tquant needs a way to train"):
        check_order([SupportQuantization(steps=5)], Data())
    for settings in ({"input_bits": 9}, {"steps": -1}, {"scale": "fixed"}, {"reference": "cauchy"}, {"level": "max"}):
        with pytest.raises(ConfigError, match=f"compression.mquant.{next(iter(settings))}="):
            MassQuantization(**settings)
