# SPDX-License-Identifier: Apache-2.0
from __future__ import annotations

import copy

import numpy as np
import pytest
import torch
from torch import Tensor, nn

from affect.compression.base import Chain, Data, run_chain
from affect.compression.nupes import Nupes, exponent_gradient, learn_exponent
from affect.compression.power import PowerQuantization, power_grid, reconstruction_error, search_exponent
from affect.compression.rounding import AdaRound
from affect.compression.uniform import UniformQuantization
from affect.errors import ConfigError


def drawn(kind: str = "normal", count: int = 20_000) -> Tensor:
    return torch.from_numpy(getattr(np.random.default_rng(0), kind)(size=(1, count)))


def slope(weight: Tensor, exponent: float, step: float = 0.02) -> float:
    """Return the derivative of the loss itself, by differences."""
    above, below = (reconstruction_error(weight, 4, exponent + d, False) ** 2 for d in (step, -step))
    return (above - below) / (2 * step)


@pytest.mark.parametrize("exponent", [0.4, 0.5, 0.7, 0.8, 1.0])
def test_the_gradient_through_both_directions_has_the_sign_of_the_loss(exponent: float) -> None:
    weight = drawn(count=100_000)
    expected, found = slope(weight, exponent), exponent_gradient(weight, exponent, 4, False)
    assert np.sign(found) == np.sign(expected)
    assert 0.3 < found / expected < 3


def test_it_is_about_zero_at_the_optimum() -> None:
    weight = drawn(count=100_000)
    assert abs(exponent_gradient(weight, 0.61, 4, False)) < 0.15 * abs(exponent_gradient(weight, 0.4, 4, False))


@pytest.mark.parametrize("exponent", [0.4, 0.5, 0.6, 0.7, 0.8])
def test_the_gradient_of_frozen_codes_is_another_one(exponent: float) -> None:
    """It always pulls down; left of the optimum that is the wrong sign: the classic mistake."""
    weight = drawn(count=100_000)
    frozen = exponent_gradient(weight, exponent, 4, False, frozen=True)
    assert frozen > 0
    assert frozen > 1.5 * exponent_gradient(weight, exponent, 4, False)
    if exponent < 0.6:
        assert slope(weight, exponent) < 0


@pytest.mark.parametrize("kind", ["normal", "laplace"])
@pytest.mark.parametrize("start", [0.3, 1.0])
def test_gradients_find_the_exponent_of_the_search(kind: str, start: float) -> None:
    weight = drawn(kind)
    expected = search_exponent([weight], 4, False)
    assert learn_exponent(weight, 4, False, start, steps=150, rate=0.1) == pytest.approx(expected, abs=0.05)


class Net(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.first = nn.Conv2d(3, 8, 3, padding=1)
        self.second = nn.Conv2d(8, 8, 3, padding=1)
        self.head = nn.Linear(8, 5)

    def forward(self, x: Tensor) -> Tensor:
        return self.head(self.second(self.first(x).relu()).relu().mean((2, 3)))


@pytest.fixture
def network() -> Net:
    torch.manual_seed(0)
    made = Net().eval()
    with torch.no_grad():  # trained weights are bell-shaped, drawn ones uniform
        for layer in (made.first, made.second, made.head):
            layer.weight.copy_(drawn("laplace", layer.weight.numel()).view(layer.weight.shape) * 0.15)
    return made


@pytest.fixture
def images() -> Tensor:
    noise = torch.randn(48, 3, 10, 10, generator=torch.Generator().manual_seed(0))
    return nn.functional.avg_pool2d(noise, 3, 1, 1) * 2 + 0.5


QUICK = {"bits": 3, "edge_bits": None, "steps": 250, "batch_size": 16, "rate": 3e-2}


def run(network: nn.Module, transforms: list, images: Tensor) -> tuple[nn.Module, Chain]:
    changed = copy.deepcopy(network)
    return changed, run_chain(changed, transforms, Data(images=images.split(16)), images)


def test_learned_codes_beat_searched_exponents_beat_the_uniform_grid(network: Net, images: Tensor) -> None:
    transforms = (UniformQuantization(3, edge_bits=None), PowerQuantization(3, edge_bits=None), Nupes(**QUICK))
    errors = [run(network, [transform], images)[1].errors[0] for transform in transforms]
    assert errors[2] < 0.7 * errors[1]
    assert errors[1] < errors[0]


def test_the_whole_grid_is_searched(network: Net, images: Tensor) -> None:
    """Some codes move by two levels or more, which rounding up or down cannot."""
    settings = {**QUICK, "bits": 4, "learn_exponent": False, "rate": 0.1}
    learned, chain = run(network, [Nupes(**settings)], images)
    stored = learned.second.stored
    start = power_grid(network.second.weight, 4, float(stored.exponent))
    moved = (stored.integers() - start.integers()).abs()
    assert int(moved.max()) >= 2
    assert chain.reports[0].totals["moved"] > 0


@pytest.mark.parametrize("start", [0.25, 0.5, 1.0])
def test_losses_are_finite_from_every_start(start: float, network: Net, images: Tensor) -> None:
    settings = {**QUICK, "steps": 60, "exponent": start, "exponent_rate": 5e-2}
    learned, chain = run(network, [Nupes(**settings)], images)
    assert np.isfinite(chain.errors[0])
    assert bool(learned(images).isfinite().all())
    found = [float(layer.stored.exponent) for layer in (learned.first, learned.second)]
    assert all(0.2 <= exponent <= 1.5 for exponent in found)
    assert any(abs(exponent - start) > 1e-3 for exponent in found)
    assert chain.reports[0].layers[0].note.startswith("exponent ")


def test_scales_are_learned_where_asked_for(network: Net, images: Tensor) -> None:
    settings = {**QUICK, "steps": 60, "learn_scale": True, "scale_rate": 1e-2}
    learned, _ = run(network, [Nupes(**settings)], images)
    assert not torch.allclose(learned.second.stored.largest, network.second.weight.abs().flatten(1).amax(1))


def test_one_half_stays_one_half(network: Net, images: Tensor) -> None:
    settings = {**QUICK, "steps": 10, "exponent": 0.5, "learn_exponent": False}
    learned, _ = run(network, [Nupes(**settings)], images)
    assert float(learned.second.stored.exponent) == 0.5


def test_it_starts_from_the_codes_of_powerquant(network: Net, images: Tensor) -> None:
    first = PowerQuantization(3, exponent=0.7, edge_bits=None)
    _, chain = run(network, [first, Nupes(**{**QUICK, "steps": 150})], images)
    assert chain.errors[1] < chain.errors[0]
    # Four bits are those of powerquant's layers, not of nupes.
    learned, _ = run(network, [PowerQuantization(5, exponent=0.7), Nupes(**{**QUICK, "steps": 2})], images)
    assert learned.second.stored.bits == 5


def test_exponents_are_learned_without_data(network: Net, images: Tensor) -> None:
    transform = Nupes(bits=4, exponent=1.0, edge_bits=None, data_free=True)
    assert transform.needs == ()
    changed = copy.deepcopy(network)
    report = run_chain(changed, [transform], Data(), images).reports[0]
    uniform, _ = run(network, [UniformQuantization(4, edge_bits=None)], images)
    for name, record in zip(("first", "second", "head"), report.layers, strict=True):
        weight = network.get_submodule(name).weight
        before = (uniform.get_submodule(name).stored() - weight).norm()
        assert (changed.get_submodule(name).stored() - weight).norm() <= before
        assert "learned without data" in record.note
    assert float(changed.second.stored.exponent) < 0.95


def test_it_needs_images_and_names_bad_settings(network: Net) -> None:
    with pytest.raises(ConfigError, match="nupes needs images"):
        run_chain(network, [Nupes()], Data(), torch.zeros(1, 3, 10, 10))
    with pytest.raises(ConfigError, match=r"compression\.nupes\.exponent=0\.1"):
        Nupes(exponent=0.1)
    assert AdaRound.stage == Nupes.stage == "rounding"
