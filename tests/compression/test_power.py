# SPDX-License-Identifier: Apache-2.0
from __future__ import annotations

import copy

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from affect.compression.base import Data, run_chain
from affect.compression.layers import InputGrid
from affect.compression.power import (
    PowerQuantization,
    _Sums,
    decode,
    encode,
    integer_inputs,
    integer_weight,
    power_grid,
    put_measured_inputs,
    reconstruction_error,
    requantize,
    search_exponent,
    thresholds,
)
from affect.compression.stored import signed_levels
from affect.compression.structure import apply_structure, structure
from affect.compression.uniform import put_inputs, round_to_grid
from affect.errors import ConfigError


def drawn(kind: str, shape: tuple[int, ...] = (200, 500), seed: int = 0) -> Tensor:
    draws = np.random.default_rng(seed)
    values = {"gaussian": draws.normal, "laplace": draws.laplace, "uniform": lambda size: draws.uniform(-1, 1, size)}
    return torch.from_numpy(values[kind](size=shape))


class Net(nn.Module):
    def __init__(self, activation: type[nn.Module] = nn.ReLU) -> None:
        super().__init__()
        self.first = nn.Conv2d(3, 8, 3, padding=1)
        self.second = nn.Conv2d(8, 8, 3, padding=1)
        self.last = nn.Linear(8, 5)
        self.act = activation()

    def forward(self, x: Tensor) -> Tensor:
        return self.last(self.act(self.second(self.act(self.first(x)))).mean((2, 3)))


@pytest.fixture
def images() -> Tensor:
    return torch.randn(8, 3, 8, 8, generator=torch.Generator().manual_seed(0))


@pytest.mark.parametrize("bits", [2, 3, 4, 8])
@pytest.mark.parametrize("per_channel", [True, False])
def test_exponent_one_is_the_uniform_grid_bit_for_bit(bits: int, per_channel: bool) -> None:
    weight = drawn("gaussian", (16, 3, 3, 3)).float()
    power, uniform = power_grid(weight, bits, 1.0, per_channel), round_to_grid(weight, bits, per_channel)
    assert torch.equal(power.codes, uniform.codes)
    assert torch.equal(power(), uniform())


@pytest.mark.parametrize(("kind", "expected", "margin"), [("gaussian", 0.62, 0.04), ("laplace", 0.50, 0.04)])
def test_the_best_exponent_of_known_distributions_at_4_bits(kind: str, expected: float, margin: float) -> None:
    assert search_exponent([drawn(kind)], 4, per_channel=False) == pytest.approx(expected, abs=margin)


@pytest.mark.parametrize("bits", [3, 4, 8])
def test_uniform_weights_want_a_uniform_grid(bits: int) -> None:
    assert search_exponent([drawn("uniform")], bits, per_channel=False) == pytest.approx(1, abs=0.02)


@pytest.mark.parametrize("kind", ["gaussian", "laplace", "uniform"])
@pytest.mark.parametrize("bits", [2, 4, 8])
@pytest.mark.parametrize("per_channel", [True, False])
def test_the_error_is_never_above_that_of_the_uniform_grid(kind: str, bits: int, per_channel: bool) -> None:
    weight = drawn(kind, (30, 100), 1)
    found = search_exponent([weight], bits, per_channel)
    error = reconstruction_error(weight, bits, found, per_channel)
    assert error <= reconstruction_error(weight, bits, 1.0, per_channel)


def test_the_gain_over_the_uniform_grid_is_the_measured_one() -> None:
    """Error at the best exponent over that at 1, specification of the method: 0.80 and 0.61 at 4 bits."""
    for kind, expected in (("gaussian", 0.80), ("laplace", 0.61)):
        weight = drawn(kind, (1, 200_000))
        found = search_exponent([weight], 4, per_channel=False)
        ratio = reconstruction_error(weight, 4, found, False) / reconstruction_error(weight, 4, 1.0, False)
        assert ratio == pytest.approx(expected, abs=0.06)  # the largest of a sample varies


def test_the_error_has_one_minimum_up_to_rounding() -> None:
    sums = _Sums(drawn("gaussian"), 4, False)
    tried = np.arange(0.2, 1.2, 0.01)
    curve = np.array([sums.error(a) for a in tried])
    best = int(curve.argmin())
    minima = [k for k in range(1, len(curve) - 1) if curve[k] < min(curve[k - 1], curve[k + 1])]
    assert all(curve[k] <= 1.02 * curve[best] for k in minima)
    smooth = np.convolve(curve, np.ones(7) / 7, "valid")
    assert (np.diff(np.sign(np.diff(smooth))) != 0).sum() == 1
    assert curve[best - 5] + curve[best + 5] - 2 * curve[best] > 0


@pytest.mark.parametrize("bits", [2, 3, 4, 8])
@pytest.mark.parametrize("exponent", [0.25, 0.5, 0.62, 1.0, 1.2])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_codes_of_decoded_codes_are_the_codes(bits: int, exponent: float, dtype: torch.dtype) -> None:
    n = signed_levels(bits)
    codes = torch.arange(-n, n + 1, dtype=dtype)
    largest = torch.tensor(0.37, dtype=dtype)
    assert torch.equal(encode(decode(codes, largest, n, exponent), largest, n, exponent), codes)


@pytest.mark.parametrize("kind", ["gaussian", "laplace"])
def test_solvers_and_starts_agree(kind: str) -> None:
    weights = [drawn(kind, (64, 300), seed) for seed in range(2)]
    found = [search_exponent(weights, 4, False, solver=solver) for solver in ("grid", "bounded")]
    found += [search_exponent(weights, 4, False, start=start) for start in (0.2, 0.4, 0.6, 0.9, 1.2)]
    assert max(found) - min(found) < 0.05


def test_scaled_weights_have_the_same_exponent() -> None:
    weight = drawn("laplace", (32, 200))
    for per_channel in (True, False):
        found = [search_exponent([weight * scale], 4, per_channel, solver="grid") for scale in (1e-6, 1, 8, 1e4)]
        assert max(found) - min(found) < 1e-9


@pytest.mark.parametrize("per_channel", [True, False])
@pytest.mark.parametrize("exponent", [0.3, 0.62, 1.0])
def test_running_sums_give_the_error_itself(per_channel: bool, exponent: float) -> None:
    weight = drawn("gaussian", (20, 100)) * torch.logspace(-2, 1, 20)[:, None]
    for bits in (2, 4, 8):
        direct = reconstruction_error(weight, bits, exponent, per_channel)
        assert _Sums(weight, bits, per_channel).error(exponent) == pytest.approx(direct, rel=1e-6)
    large = drawn("laplace", (10, 30_000))  # more weights than places that are kept
    direct = reconstruction_error(large, 4, exponent, per_channel)
    assert _Sums(large, 4, per_channel).error(exponent) == pytest.approx(direct, rel=1e-3)


def test_another_norm_is_minimised_when_asked_for() -> None:
    weight = drawn("gaussian", (10, 300))
    found = {p: search_exponent([weight], 4, False, p=p, solver="grid") for p in (1.0, 2.0, 4.0)}
    for p, exponent in found.items():
        errors = [reconstruction_error(weight, 4, other, False, p) for other in found.values()]
        assert reconstruction_error(weight, 4, exponent, False, p) == min(errors)
    assert found[1.0] < found[4.0]


def test_integers_compute_what_floats_simulate_at_one_half() -> None:
    """W4A4 in integers: squares in ±49 and 0 … 225, accumulated exactly, and the next codes by thresholds."""
    weight = power_grid(drawn("gaussian", (8, 32)).float(), 4, 0.5)
    grid = InputGrid(1, 4, signed=False, power=True)
    grid.scale.fill_(3 / 15)
    grid.exponent.fill_(0.5)
    x = drawn("gaussian", (50, 32), 1).abs()
    whole, scale = integer_weight(weight)
    inputs, step = integer_inputs(grid, x)
    assert whole.abs().max() == 49
    assert (int(inputs.min()), int(inputs.max())) == (0, 225)
    accumulators = inputs @ whole.T
    simulated = (inputs.double() * step) @ (whole.double() * scale[:, None]).T
    torch.testing.assert_close(accumulators * (scale * step), simulated, rtol=1e-14, atol=1e-14)
    # The layer that a release holds computes it in float32.
    torch.testing.assert_close(F.linear(grid(x.float()), weight()).double(), simulated, rtol=1e-5, atol=1e-5)
    # Scale, ReLU, power and rounding are a step function of the accumulator.
    reach, m, a = torch.tensor(9.0, dtype=torch.float64), 15, 0.5
    expected = encode(simulated.relu(), reach, m, a)
    found = requantize(accumulators, thresholds(reach / (scale * step), m, a))
    ties = (m * (simulated.relu() / reach).pow(a) - 0.5).frac().abs() < 1e-9
    assert torch.equal(found[~ties], expected.long()[~ties])
    assert len(found.unique()) > 8


def test_integers_of_a_convolution() -> None:
    weight = power_grid(drawn("laplace", (4, 3, 3, 3)).float(), 4, 0.5)
    whole, scale = integer_weight(weight)
    x = torch.randint(0, 226, (2, 3, 6, 6), generator=torch.Generator().manual_seed(0)).double()
    in_integers = F.conv2d(x, whole.double(), padding=1) * scale.view(-1, 1, 1)
    decoded = decode(weight.integers().double(), weight.largest.double().view(-1, 1, 1, 1), 7, 0.5)
    torch.testing.assert_close(in_integers, F.conv2d(x, decoded, padding=1), rtol=1e-13, atol=1e-12)


def test_what_has_no_integers_is_refused() -> None:
    with pytest.raises(ConfigError, match=r"exponent=0\.5"):
        integer_weight(power_grid(torch.randn(2, 3), 4, 0.62))
    grid = InputGrid(1, 4, signed=False)
    grid.shift.fill_(-0.1)
    with pytest.raises(ConfigError, match="starts at 0"):
        integer_inputs(grid, torch.ones(1))


@pytest.mark.parametrize("exponent", [None, 0.5, 0.62])
def test_a_shifted_grid_covers_its_range_and_keeps_zero(exponent: float | None) -> None:
    network = nn.Sequential(nn.Conv2d(1, 1, 3, padding=1))
    low, high = torch.tensor([-0.2785]), torch.tensor([5.0])
    grid = put_inputs(network, "0", low, high, 4, exponent=exponent, shifted=True)
    assert not grid.signed
    levels = grid(torch.linspace(-1, 6, 5000)).unique()
    assert len(levels) == 16
    assert float(levels[0]) <= -0.2785
    assert float(levels[-1]) == pytest.approx(5, abs=1e-5)
    assert float(grid(torch.zeros(1)).abs()) < 1e-6


@pytest.mark.parametrize(
    ("activation", "signed"), [(nn.ReLU, False), (nn.SiLU, False), (nn.GELU, False), (nn.Identity, True)]
)
def test_inputs_after_bounded_activations_are_unsigned(activation: type[nn.Module], signed: bool) -> None:
    torch.manual_seed(0)
    network = Net(activation).eval()
    with torch.no_grad():
        network.first.weight *= 4
    images = [torch.randn(4, 3, 8, 8)]
    put_measured_inputs(network, ["first", "second"], images, {"first": 4, "second": 4}, 0.5)
    assert network.first.inputs.signed  # images
    assert network.second.inputs.signed is signed
    assert (float(network.second.inputs.shift) < 0) is (activation in (nn.SiLU, nn.GELU))


@pytest.mark.parametrize("search", ["network", "layer"])
def test_a_network_on_grids_of_powers_is_described_and_better_than_uniform(search: str, images: Tensor) -> None:
    torch.manual_seed(0)
    network = Net().eval()
    with torch.no_grad():
        network.second.weight.copy_(drawn("laplace", (8, 8, 3, 3)))
    changed = copy.deepcopy(network)
    transform = PowerQuantization(bits=4, input_bits=8, search=search)
    report = run_chain(changed, [transform], Data(images=[images]), images).reports[0]
    assert [(r.name, r.bits, r.input_bits) for r in report.layers] == [
        ("first", 8, 8), ("second", 4, 8), ("last", 8, 8)
    ]  # fmt: skip
    uniform = copy.deepcopy(network)
    chain = run_chain(uniform, [PowerQuantization(bits=4, input_bits=8, exponent=1)], Data(images=[images]), images)
    by_uniform = {record.name: record.signal_to_noise for record in chain.reports[0].layers}
    assert report.layers[1].signal_to_noise > by_uniform["second"] + 0.5
    fresh, state = copy.deepcopy(network), changed.state_dict()
    apply_structure(fresh, structure(network, changed), state, "config.yaml")
    fresh.load_state_dict(state)
    assert torch.equal(fresh.eval()(images), changed(images))


def test_more_bits_lose_less(images: Tensor) -> None:
    torch.manual_seed(0)
    network, errors, noises = Net().eval(), [], []
    for bits in (2, 4, 6, 8):
        transform = PowerQuantization(bits=bits, edge_bits=None)
        chain = run_chain(copy.deepcopy(network), [transform], Data(), images)
        errors.append(chain.errors[0])
        noises.append([record.signal_to_noise for record in chain.reports[0].layers])
    assert errors == sorted(errors, reverse=True)
    assert all(list(layer) == sorted(layer) for layer in zip(*noises, strict=True))


def test_protected_layers_stay_floats(images: Tensor) -> None:
    network = Net().eval()
    report = PowerQuantization(protect=["last"])(network, Data())
    assert isinstance(network.last, nn.Linear)
    assert [record.name for record in report.layers] == ["first", "second"]


@pytest.mark.parametrize(
    "settings", [{"bits": 1}, {"exponent": 0}, {"search": "block"}, {"solver": "newton"}, {"start": 3}, {"norm": -1}]
)
def test_settings_that_make_no_sense_are_refused(settings: dict) -> None:
    with pytest.raises(ConfigError, match=f"compression.powerquant.{next(iter(settings))}="):
        PowerQuantization(**settings)
    with pytest.raises(ConfigError, match="solver=newton"):
        search_exponent([torch.ones(1, 1)], 4, solver="newton")
