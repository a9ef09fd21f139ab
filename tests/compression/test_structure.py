# SPDX-License-Identifier: Apache-2.0
from __future__ import annotations

import copy
import json

import pytest
import timm
import torch
from torch import nn

from affect.compression.layers import CompressedConv2d, CompressedLinear, InputGrid, WithoutNorm, baked
from affect.compression.report import count_macs, signal_to_noise, stored_size
from affect.compression.stored import GridWeight
from affect.compression.structure import apply_structure, replace_layer, structure
from affect.errors import CheckpointError


class Net(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.conv = nn.Conv2d(3, 4, 3, stride=2, padding=1, bias=False)
        self.norm = nn.BatchNorm2d(4)
        self.depthwise = nn.Conv2d(4, 4, 3, padding=1, groups=4)
        self.linear = nn.Linear(4, 5)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.linear(self.depthwise(self.norm(self.conv(x)).relu()).mean((2, 3)))


def grid(weight: torch.Tensor, bits: int = 4) -> GridWeight:
    largest = weight.detach().abs().flatten(1).amax(1)
    n = 2 ** (bits - 1) - 1
    codes = (weight.detach() / largest.view(-1, *[1] * (weight.ndim - 1)) * n).round().long()
    return GridWeight.of(codes, largest, bits)


@pytest.fixture
def net() -> Net:
    torch.manual_seed(0)
    return Net().eval()


@pytest.fixture
def image() -> torch.Tensor:
    return torch.randn(2, 3, 9, 10, generator=torch.Generator().manual_seed(1))


def test_compressed_layers_compute_what_they_replace(net: Net, image: torch.Tensor) -> None:
    expected = net(image)
    for name in ("conv", "depthwise"):
        replace_layer(net, name, CompressedConv2d.of(net.get_submodule(name)))
    net.linear = CompressedLinear.of(net.linear)
    torch.testing.assert_close(net(image), expected)


@pytest.mark.parametrize("size", [8, 9, 15])
def test_padding_as_in_tensorflow_is_kept(size: int) -> None:
    network = timm.create_model("tf_efficientnet_lite0", pretrained=False).eval()
    image = torch.randn(1, 3, size * 4, size * 4 + 3)
    for layer in (network.conv_stem, network.blocks[1][0].conv_dw):
        assert type(layer).__name__ == "Conv2dSame"
        x = torch.randn(1, layer.in_channels, *image.shape[2:])
        torch.testing.assert_close(CompressedConv2d.of(layer)(x), layer(x))


def test_padding_may_have_a_value_for_each_channel(net: Net, image: torch.Tensor) -> None:
    """A shift of the input, and padding by that shift, is the same as subtracting it everywhere."""
    value = torch.tensor([0.5, -1.0, 2.0])
    layer = CompressedConv2d.of(net.conv, padded=True)
    layer.padding_value.copy_(value)
    inside = nn.functional.conv2d(
        nn.functional.pad(image - value.view(-1, 1, 1), (1, 1, 1, 1)) + value.view(-1, 1, 1), net.conv.weight, stride=2
    )
    torch.testing.assert_close(layer(image), inside)
    assert not torch.allclose(layer(image), net.conv(image))


@pytest.mark.parametrize("layer", [nn.Conv1d(3, 3, 1), nn.ReLU(), nn.ConvTranspose2d(3, 3, 1)])
def test_other_layers_cannot_be_replaced(layer: nn.Module) -> None:
    with pytest.raises(ValueError, match="cannot take the place"):
        CompressedConv2d.of(layer)
    with pytest.raises(ValueError, match="cannot take the place"):
        CompressedLinear.of(layer)


def test_inputs_are_rounded_to_their_grid() -> None:
    inputs = InputGrid(1, 2, signed=True)
    inputs.scale.fill_(0.5)
    x = torch.tensor([-9.0, -0.3, -0.2, 0.0, 0.26, 9.0])
    assert inputs(x).tolist() == [-0.5, -0.5, 0, 0, 0.5, 0.5]
    per_channel = InputGrid(2, 8, signed=False)
    per_channel.scale.copy_(torch.tensor([1.0, 100.0]))
    x = torch.full((1, 2, 1, 1), 130.4)
    assert per_channel(x).flatten().tolist() == [130, 100]
    unsigned = InputGrid(1, 8, signed=False)
    unsigned.shift.fill_(-0.5)
    assert float(unsigned(torch.tensor([-3.0]))) == -0.5
    power = InputGrid(1, 4, signed=False, power=True)
    power.scale.fill_(1 / 15)
    power.exponent.fill_(0.5)
    levels = torch.arange(16.0) ** 2 / 225
    torch.testing.assert_close(power(torch.linspace(0, 1, 1001)).unique(), levels, atol=1e-6, rtol=0)


def compressed(net: Net) -> Net:
    changed = copy.deepcopy(net)
    changed.conv = CompressedConv2d.of(changed.conv, bias=True, padded=True, inputs=InputGrid(3, 8, True).settings())
    changed.conv.padding_value.copy_(torch.tensor([0.1, 0.2, 0.3]))
    changed.conv.inputs.scale.copy_(torch.tensor([0.01, 0.02, 0.03]))
    with torch.no_grad():
        changed.conv.bias.copy_(torch.arange(4.0))
    changed.conv.store(grid(changed.conv.current_weight()))
    changed.norm = WithoutNorm.of(changed.norm)
    changed.linear = CompressedLinear.of(changed.linear)
    changed.linear.store(grid(changed.linear.current_weight(), 8))
    return changed


def rebuilt(original: nn.Module, changed: nn.Module) -> nn.Module:
    node = json.loads(json.dumps(structure(original, changed)))
    fresh = copy.deepcopy(original)
    state = changed.state_dict()
    apply_structure(fresh, node, state, "config.yaml")
    fresh.load_state_dict(state)
    return fresh.eval()


def test_a_compressed_network_is_rebuilt_from_plain_data(net: Net, image: torch.Tensor) -> None:
    changed = compressed(net)
    assert not torch.allclose(changed(image), net(image))
    assert torch.equal(rebuilt(net, changed)(image), changed(image))
    assert stored_size(changed) < stored_size(net)
    torch.testing.assert_close(baked(changed)(image), changed(image))
    assert baked(changed).conv.stored is None
    assert changed.conv.stored is not None


def test_a_layer_that_is_compressed_twice_keeps_what_it_had(net: Net, image: torch.Tensor) -> None:
    changed = compressed(net)
    again = copy.deepcopy(changed)
    again.conv = CompressedConv2d.of(again.conv)
    again.linear = CompressedLinear.of(again.linear)
    assert torch.equal(again(image), changed(image))


def test_pruned_layers_are_rebuilt_with_their_groups(net: Net, image: torch.Tensor) -> None:
    changed = copy.deepcopy(net)
    changed.conv = nn.Conv2d(3, 2, 3, stride=2, padding=1, bias=False)
    changed.norm = nn.BatchNorm2d(2)
    changed.depthwise = nn.Conv2d(2, 2, 3, padding=1, groups=2)
    changed.linear = nn.Linear(2, 5)
    changed.eval()
    fresh = rebuilt(net, changed)
    assert torch.equal(fresh(image), changed(image))
    assert (fresh.depthwise.groups, fresh.depthwise.in_channels, fresh.norm.num_features) == (2, 2, 2)
    assert fresh.linear.in_features == 2


def test_pruned_layers_whose_weights_became_codes_are_rebuilt(net: Net, image: torch.Tensor) -> None:
    changed = copy.deepcopy(net)
    changed.conv = CompressedConv2d.of(nn.Conv2d(3, 2, 3, stride=2, padding=1))
    changed.norm = WithoutNorm.of(changed.norm)
    changed.depthwise = CompressedConv2d.of(nn.Conv2d(2, 2, 3, padding=1, groups=2), padded=True)
    changed.linear = CompressedLinear.of(nn.Linear(2, 5))
    for layer in (changed.conv, changed.depthwise, changed.linear):
        layer.store(grid(layer.current_weight()))
    changed.eval()
    fresh = rebuilt(net, changed)
    assert torch.equal(fresh(image), changed(image))
    assert fresh.depthwise.groups == 2


def test_what_cannot_be_stored_is_an_error(net: Net) -> None:
    changed = copy.deepcopy(net)
    changed.norm = nn.GroupNorm(2, 4)
    with pytest.raises(ValueError, match="norm: a GroupNorm"):
        structure(net, changed)


@pytest.mark.parametrize(
    ("node", "message"),
    [
        ([], "must hold replaced"),
        ({"code": 1}, "must hold replaced"),
        ({"replaced": []}, "by the name of a layer"),
        ({"replaced": {"conv": {"layer": "torch.nn.Conv2d"}}}, "layer must be one of"),
        ({"replaced": {"nothing": {"layer": "without_norm"}}}, "which the model has not"),
        ({"replaced": {"conv": {"layer": "linear", "bias": True}}}, "cannot take the place"),
        ({"replaced": {"conv": {"layer": "convolution", "bias": True, "original": 1}}}, "multiple values"),
        (
            {
                "replaced": {
                    "conv": {"layer": "convolution", "bias": True, "stored": {"kind": "grid", "shape": [9] * 12}}
                }
            },
            "too large",
        ),
        (
            {
                "replaced": {
                    "conv": {
                        "layer": "convolution",
                        "bias": True,
                        "stored": {"kind": "grid", "shape": [4, 3, 1, 1], "bits": 4},
                    }
                }
            },
            "replaces one of",
        ),
        ({"resized": {"conv": {"groups": -1}}}, "positive whole number"),
        ({"resized": {"conv": {"groups": 1, "shape": [9] * 12}}}, "too large"),
        ({"resized": {"conv": {"groups": 1, "shape": [2, 3]}}}, "no fitting tensor"),
        ({"resized": {"linear.weight": {"groups": 1}}}, "which the model has not"),
        ({"attributes": {"conv": {"forward": 3}}}, "is not allowed"),
    ],
)
def test_damaged_descriptions_are_refused(net: Net, node: object, message: str) -> None:
    with pytest.raises(CheckpointError, match=message):
        apply_structure(net, node, net.state_dict(), "config.yaml")


def test_macs_and_noise(net: Net, image: torch.Tensor) -> None:
    macs = count_macs(net, lambda: net(image[:1]))
    assert macs == {"conv": 5 * 5 * 4 * 27, "depthwise": 5 * 5 * 4 * 9, "linear": 20}
    changed = compressed(net)
    assert count_macs(changed, lambda: changed(image[:1])) == macs
    x = torch.ones(10)
    assert signal_to_noise(x, x * 1.1) == pytest.approx(20, abs=1e-3)
    assert signal_to_noise(x, x) == float("inf")
