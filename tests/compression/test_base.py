# SPDX-License-Identifier: Apache-2.0
"""What transforms are given, the checks of their arguments, and layers that codes cannot take the place of."""

from __future__ import annotations

import copy
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from affect.compression.arguments import check_bits, check_choices, check_counts, check_parts, check_range
from affect.compression.base import Data, Transform, backbone, quantizable, run_chain
from affect.compression.codebooks import JLCM
from affect.compression.power import PowerQuantization
from affect.compression.red import RED
from affect.compression.report import Report, table
from affect.compression.residual import ResidualExpansion
from affect.compression.rounding import AdaRound
from affect.compression.safer import SAfER
from affect.compression.spiq import SPIQ
from affect.compression.ternary import MassQuantization, SupportQuantization
from affect.compression.uniform import UniformQuantization
from affect.encoders import TimmEncoder
from affect.errors import ConfigError


@pytest.mark.parametrize("name", ["test_resnet", "test_vit"])
def test_transforms_get_what_the_encoder_computes_with_its_own_layers(name: str) -> None:
    torch.manual_seed(0)
    image = torch.randint(0, 256, (2, 3, 160, 160), dtype=torch.uint8)
    encoder = TimmEncoder(name, image_size=160).eval()
    with torch.no_grad():
        expected = encoder(image)
        network = backbone(encoder)
        assert torch.equal(network(encoder.normalise(image)), expected)
        encoder.output = "map"
        assert torch.equal(
            backbone(encoder)(encoder.normalise(image)), encoder.model.forward_features(encoder.normalise(image))
        )
        UniformQuantization(bits=2, edge_bits=None)(network, Data())
        encoder.output = "vector"
        assert not torch.equal(encoder(image), expected)


def test_encoders_without_layers_are_refused() -> None:
    with pytest.raises(ConfigError, match="a ReLU has no network that could be compressed"):
        backbone(nn.ReLU())


@pytest.mark.parametrize(
    "method",
    [
        lambda protect: UniformQuantization(4, protect=protect), lambda protect: PowerQuantization(4, protect=protect),
        lambda protect: AdaRound(4, steps=1, protect=protect), lambda protect: SupportQuantization(protect=protect),
        lambda protect: ResidualExpansion(4, protect=protect), lambda protect: JLCM(4, steps=0, protect=protect),
    ],
)  # fmt: skip
def test_a_protected_layer_stays_the_first_and_does_not_pass_its_bits_on(method: Any) -> None:
    torch.manual_seed(0)
    network, images = nn.Sequential(*(nn.Linear(4, 4) for _ in range(4))).eval(), [torch.randn(8, 4)]
    (report,) = run_chain(network, [method(["0"])], Data(images, example=images[0]), images[0]).reports
    bits = {record.name: record.bits for record in report.layers}
    assert list(bits) == ["1", "2", "3"]
    assert bits["1"] == bits["2"] != 8
    assert bits["3"] == 8


class Weighted(nn.Linear):
    """Multiplies by something else than its weight."""

    def forward(self, x: Tensor) -> Tensor:
        return nn.functional.linear(x, 2 * self.weight)


def test_layers_with_a_pass_of_their_own_and_protected_ones_are_no_plain_ones() -> None:
    network = nn.Sequential(
        nn.Linear(4, 4), Weighted(4, 4), nn.Sequential(nn.Conv2d(4, 4, 1)), nn.MultiheadAttention(4, 2)
    )
    assert list(quantizable(network)) == ["0", "2.0"]
    assert list(quantizable(network, ["2"])) == ["0"]
    assert list(quantizable(network, ["2.0", "0"])) == []
    assert list(quantizable(nn.ModuleDict({"ab": nn.Linear(1, 1), "abc": nn.Linear(1, 1)}), ["ab"])) == ["abc"]


def test_methods_look_at_the_network_before_others_change_it_and_after_channels_are_gone() -> None:
    seen = []

    class Method:
        needs: tuple[str, ...] = ()

        def __init__(self, name: str, stage: str) -> None:
            self.name, self.stage = name, stage

        def prepare(self, network: nn.Module, data: Data) -> None:
            seen.append(f"prepare {self.name} at {network.weight.item():g}")

        def __call__(self, network: nn.Module, data: Data) -> Report:
            seen.append(self.name)
            network.weight.data.mul_(2)
            return Report(self.name)

    network = nn.Linear(1, 1, bias=False)
    network.weight.data.fill_(1)
    methods = [Method("p", "prune"), Method("q", "prune"), Method("f", "fold"), Method("w", "weights")]
    chain = run_chain(network, methods, Data(), torch.ones(2, 1))
    assert seen == ["prepare p at 1", "p", "prepare q at 2", "q", "prepare f at 4", "prepare w at 4", "f", "w"]
    assert chain.errors == pytest.approx([1, 3, 7, 15])
    assert chain.floats is not None
    assert chain.floats.weight.item() == 8
    with pytest.raises(ConfigError, match=r"write \[p,f\]"):
        run_chain(network, [methods[2], methods[0]], Data(), torch.ones(2, 1))


@pytest.mark.parametrize(
    "method", [UniformQuantization(4), PowerQuantization(4), MassQuantization(), SupportQuantization()]
)
def test_codes_are_not_rounded_once_more(method: Transform) -> None:
    """In a chain, or of a release; what RED stores are its weights to the last bit, and may be rounded."""
    x = torch.randn(2, 3)
    for first in ([UniformQuantization(8)], [ResidualExpansion(4, edge_bits=None)]):
        network = nn.Sequential(nn.Linear(3, 4), nn.ReLU(), nn.Linear(4, 4), nn.ReLU(), nn.Linear(4, 2))
        run_chain(network, first, Data(), x)
        with pytest.raises(ConfigError, match=rf"compression\.{method.name}: 0 has codes already.*take one quantizer"):
            run_chain(network, [method], Data(), x)


def test_arguments_that_make_no_sense_are_refused_by_key() -> None:
    check_bits("m", a=None, b=2, c=8.0)
    check_range("m", 0, 1, {"a": None, "b": 0, "c": 1})
    check_choices("m", a=("x", ("x", "y")))
    check_parts("m", a=0.5)
    check_counts("m", a=1)
    for check, message in (
        (lambda: check_bits("m", a=4, b=9), r"compression\.m\.b=9: from 2 to 8"),
        (lambda: check_bits("m", b=2.5), r"b=2\.5: from 2 to 8"),
        (lambda: check_range("m", 0, 1, {"b": 1.5}), r"b=1\.5: from 0 to 1"),
        (lambda: check_range("m", 0, 1, {"b": float("nan")}), r"b=nan: from 0 to 1"),
        (lambda: check_choices("m", b=("laier", ("layer", "block"))), r"b=laier: did you mean layer"),
        (lambda: check_parts("m", b=1.0), r"b=1\.0: a part, above 0 and below 1"),
        (lambda: check_counts("m", b=0), r"b=0: at least 1"),
    ):
        with pytest.raises(ConfigError, match=message):
            check()


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


def test_records_say_what_a_layer_is_afterwards() -> None:
    network = nn.Sequential(
        *(nn.Conv2d(3, 4, 3, padding=1), nn.ReLU(), nn.Conv2d(4, 6, 3, 2, bias=False)), nn.Flatten(), nn.Linear(54, 5)
    )
    for method, scales in (
        (UniformQuantization(bits=4), [[4], [6], [5]]),
        (UniformQuantization(bits=4, per_channel=False), [[1], [1], [1]]),
        (ResidualExpansion(bits=4, orders=2), [[4], [6], [5]]),
    ):
        report = run(copy.deepcopy(network), method)
        assert [record.scales for record in report.layers] == scales
        assert [record.parameters for record in report.layers] == [3 * 4 * 9 + 4, 4 * 6 * 9, 54 * 5 + 5]
        assert [record.macs for record in report.layers] == [3 * 4 * 9 * 64, 4 * 6 * 9 * 9, 54 * 5]
        rows = [line.split(" | ") for line in table([report]).splitlines()]
        assert rows[2][4] == " x ".join(map(str, scales[0]))
        assert rows[2][7:9] == ["112", "6912"]
