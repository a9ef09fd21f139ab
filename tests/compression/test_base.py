# SPDX-License-Identifier: Apache-2.0
"""Networks with layers that codes cannot take the place of: they are left out and named, or refused by their name."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor, nn

from affect.compression.base import Data, quantizable, run_chain
from affect.compression.codebooks import JLCM
from affect.compression.power import PowerQuantization
from affect.compression.red import RED
from affect.compression.rounding import AdaRound
from affect.compression.safer import SAfER
from affect.compression.spiq import SPIQ
from affect.compression.uniform import UniformQuantization
from affect.errors import ConfigError

IMAGES = torch.randn(4, 3, 8, 8, generator=torch.Generator().manual_seed(0))


class Reading(nn.Module):
    """A module that asks a layer for its weight, as EdgeNeXt does for the device."""

    def __init__(self) -> None:
        super().__init__()
        self.first = nn.Conv2d(3, 4, 3)
        self.projection = nn.Conv2d(4, 4, 1)

    def forward(self, x: Tensor) -> Tensor:
        return self.projection(self.first(x).to(self.projection.weight.dtype)).mean((2, 3))


def run(network: nn.Module, *methods: Any) -> Any:
    torch.manual_seed(0)
    return run_chain(network.eval(), methods, Data(images=[IMAGES]), IMAGES).reports[-1]


def test_a_layer_whose_weight_another_module_reads_is_named_with_the_line_that_leaves_it_out() -> None:
    with pytest.raises(ConfigError, match=r"^projection: .*compression\.uniform\.protect=\[projection\]"):
        run(Reading(), UniformQuantization(bits=4))
    report = run(Reading(), UniformQuantization(bits=4, protect=["projection"]))
    assert [record.name for record in report.layers] == ["first"]


METHODS = [
    UniformQuantization(bits=4),
    PowerQuantization(bits=4),
    JLCM(bits=2, steps=1),
    SAfER(bits=4),
    AdaRound(bits=4, steps=1),
    SPIQ(8),
]


@pytest.mark.parametrize("method", [*METHODS, RED()], ids=lambda method: type(method).__name__)
def test_convolutions_that_pad_with_values_of_the_image_keep_their_floats(method: Any) -> None:
    convolutions = [nn.Conv2d(3, 4, 3, padding=1, padding_mode="reflect"), nn.Conv2d(4, 4, 3), nn.Conv2d(4, 4, 3)]
    network = nn.Sequential(convolutions[0], nn.BatchNorm2d(4), nn.ReLU(), *convolutions[1:], nn.AdaptiveAvgPool2d(1))
    report = run(network, method)
    assert type(network[0]) is nn.Conv2d
    assert not any(record.name == "0" for record in report.layers)
    if method.stage == "weights":
        assert "1 layers of other kinds keep their floats: 0 (Conv2d, padding_mode=reflect)" in report.notes


def test_layers_of_pytorchs_transformer_are_no_plain_ones() -> None:
    class Tokens(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.embed = nn.Conv2d(3, 8, 4, 4)
            self.block = nn.TransformerEncoderLayer(8, 2, 16, batch_first=True)

        def forward(self, x: Tensor) -> Tensor:
            return self.block(self.embed(x).flatten(2).transpose(1, 2)).mean(1)

    network = Tokens()
    assert list(quantizable(network)) == ["embed"]
    report = run(network, UniformQuantization(bits=4, input_bits=8))
    assert [record.name for record in report.layers] == ["embed"]
    assert "block.linear1 (Linear)" in report.notes[-1]


@pytest.mark.parametrize("method", METHODS, ids=lambda method: type(method).__name__)
def test_a_network_without_a_layer_for_codes_is_refused(method: Any) -> None:
    network = nn.Sequential(nn.ConvTranspose2d(3, 4, 3), nn.ReLU(), nn.AdaptiveAvgPool2d(1))
    with pytest.raises(ConfigError, match=r"no layer that it could act on.*; there are 0 \(ConvTranspose2d\)"):
        run(network, method)
