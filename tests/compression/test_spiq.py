# SPDX-License-Identifier: Apache-2.0
from __future__ import annotations

import copy
from collections.abc import Callable

import pytest
import timm
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from affect.compression.base import Data, relative_error, run_chain
from affect.compression.folding import BatchNormFolding
from affect.compression.report import signal_to_noise
from affect.compression.spiq import SPIQ, Statistics, channel_scales, norm_statistics
from affect.compression.uniform import UniformQuantization
from affect.errors import ConfigError
from tests.compression.networks import FaceNet, shake_norms


def draws(seed: int = 0) -> torch.Generator:
    return torch.Generator().manual_seed(seed)


def layer_and_inputs(channels: int = 64, samples: int = 4000) -> tuple[Tensor, nn.BatchNorm1d, Tensor]:
    """Give a linear weight behind a batch norm whose channels differ much, the norm, and inputs after ReLU."""
    norm = nn.BatchNorm1d(channels).eval()
    norm.weight.data.copy_(torch.randn(channels, generator=draws(1)).exp())
    norm.bias.data.copy_(norm.weight.data * torch.randn(channels, generator=draws(2)) / 2)
    weight = torch.randn(32, channels, generator=draws(3)) / channels**0.5
    with torch.no_grad():
        return weight, norm, norm(torch.randn(samples, channels, generator=draws(4))).relu()


def with_statistics(network: nn.Module, x: Tensor) -> None:
    """Give batch norms the statistics of their inputs."""
    for module in network.modules():
        if isinstance(module, nn.BatchNorm1d | nn.BatchNorm2d):
            module.momentum = 1.0
    network.train()
    with torch.no_grad():
        network(x)
    network.eval()


def on_grid(x: Tensor, largest: Tensor, bits: int) -> Tensor:
    step = largest / (2**bits - 1)
    return (x / step).round().clamp(0, 2**bits - 1) * step


@pytest.mark.parametrize("alpha", [0.0, 0.5, 1.0])
def test_scales_move_into_the_weight_exactly(alpha: float) -> None:
    weight, _, x = layer_and_inputs()
    scale = channel_scales(x.amin(0).double(), x.amax(0).double(), weight, 4, alpha)
    moved = F.linear(x.double() / scale, weight.double() * scale)
    assert relative_error(F.linear(x.double(), weight.double()), moved) < 1e-12
    assert float((x / scale).max()) <= 15 * (1 + 1e-6)


def test_static_ranges_of_channels_are_nearly_as_good_as_dynamic_ones() -> None:
    weight, norm, x = layer_and_inputs()
    expected = F.linear(x, weight)
    found = norm_statistics(norm, 3.0).mapped(torch.relu)
    scale = channel_scales(found.low, found.high, weight, 4, 1.0).float()
    per_channel = F.linear((x / scale).round().clamp(0, 15) * scale, weight)
    per_tensor = F.linear(on_grid(x, x.max(), 4), weight)
    dynamic = F.linear(on_grid(x, x.amax(1, keepdim=True), 4), weight)
    levels = [signal_to_noise(expected, y) for y in (per_channel, per_tensor, dynamic)]
    assert levels[0] > levels[1] + 5
    assert levels[0] > levels[2] - 3


def test_ranges_are_those_that_gaussian_inputs_have() -> None:
    _, norm, _ = layer_and_inputs()
    for reach, samples in ((3.0, 740), (4.0, 31_000)):  # as many as have one of them beyond it
        with torch.no_grad():
            largest = torch.stack([norm(torch.randn(samples, 64, generator=draws(s))).amax(0) for s in range(5)]).mean(
                0
            )
        ratio = (norm_statistics(norm, reach).high / largest - 1).abs()
        assert float(ratio.median()) < 0.15


def test_statistics_of_functions_are_those_of_draws() -> None:
    given = Statistics.gaussian(torch.tensor([-1.0, 0.5]).double(), torch.tensor([0.5, 2.0]).double(), 3.0)
    x = given.mean + given.std * torch.randn(200_000, 2, generator=draws(), dtype=torch.float64)
    for function in (torch.relu, F.silu, F.hardswish):
        found = given.mapped(function)
        torch.testing.assert_close(found.mean, function(x).mean(0), atol=0.02, rtol=0.02)
        torch.testing.assert_close(found.std, function(x).std(0), atol=0.02, rtol=0.02)
    assert given.mapped(torch.relu).low.tolist() == [0, 0]
    assert given.mapped(torch.relu).high.tolist() == pytest.approx([0.5, 6.5])


@pytest.mark.parametrize("make", [FaceNet, lambda: timm.create_model("mobilenetv3_small_050", pretrained=False)])
def test_folding_in_between_changes_nothing(make: Callable[[], nn.Module]) -> None:
    """Ranges are read before batch norms are folded, and fit the inputs of the layers afterwards."""
    torch.manual_seed(0)
    network = make().eval()
    x = torch.randn(8, 3, 64, 64, generator=draws())
    with_statistics(network, x)
    plain, folded = copy.deepcopy(network).eval(), copy.deepcopy(network).eval()
    spiq = SPIQ(8, edge_bits=None)
    alone = run_chain(plain, [spiq], Data(), x)
    both = run_chain(folded, [BatchNormFolding(), SPIQ(8, edge_bits=None), UniformQuantization(8)], Data(), x)
    assert alone.reports[0].totals["static"] > 0
    assert both.reports[1].totals == alone.reports[0].totals
    assert both.errors[1] == pytest.approx(alone.errors[0], rel=0.5)
    assert both.errors[0] < 1e-4 < both.errors[1] < 0.5


def test_more_bits_are_closer() -> None:
    torch.manual_seed(0)
    network = FaceNet()
    x = torch.randn(4, 3, 32, 32, generator=draws())
    with_statistics(network, x)
    errors = [
        run_chain(copy.deepcopy(network).eval(), [SPIQ(bits, reach=4.0)], Data(), x).errors[0] for bits in (3, 5, 8)
    ]
    assert errors == sorted(errors, reverse=True)


def test_what_is_not_known_stays_a_float_and_is_told() -> None:
    class Net(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.one, self.norm, self.two = nn.Conv2d(3, 4, 1), nn.BatchNorm2d(4), nn.Conv2d(4, 2, 1)

        def forward(self, x: Tensor) -> Tensor:
            return self.two(self.norm(self.one(x)).exp())

    network = shake_norms(Net())
    x = torch.randn(2, 3, 8, 8)
    chain = run_chain(network, [SPIQ()], Data(), x)
    assert chain.reports[0].totals == {"static": 1, "floats": 1}
    assert "two: inputs stay floats: unknown beyond exp" in chain.reports[0].notes[0]


def test_mistakes_are_told() -> None:
    for key, value in (("input_bits", 9), ("alpha", 2), ("reach", 0), ("edge_bits", 1)):
        with pytest.raises(ConfigError, match=key):
            SPIQ(**{key: value})
    with pytest.raises(ConfigError, match="inputs, weights"):
        run_chain(FaceNet(), [UniformQuantization(), SPIQ()], Data(), torch.randn(2, 3, 32, 32))
