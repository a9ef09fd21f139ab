# SPDX-License-Identifier: Apache-2.0
from __future__ import annotations

import copy
import json
import math

import numpy as np
import pytest
import timm
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from affect.compression.base import Data, relative_error, run_chain
from affect.compression.channels import Channels
from affect.compression.folding import BatchNormFolding
from affect.compression.layers import CompressedConv2d, baked
from affect.compression.nupes import Nupes
from affect.compression.power import PowerQuantization
from affect.compression.red import (
    RED,
    average_near,
    bandwidth_of,
    channel_shares,
    hash_values,
    hash_within,
    merge_same,
    smallest,
    split_convolution,
    split_kernels,
    split_weight,
)
from affect.compression.report import count_macs, stored_size
from affect.compression.residual import ResidualExpansion
from affect.compression.rounding import AdaRound
from affect.compression.spiq import SPIQ
from affect.compression.stored import CodebookWeight, SplitWeight, build_weight, weight_node
from affect.compression.structure import apply_structure, structure
from affect.compression.uniform import UniformQuantization
from affect.errors import ConfigError
from tests.compression.networks import FaceNet, shake_norms


def drawn(count: int, seed: int = 0) -> np.ndarray:
    return np.random.default_rng(seed).normal(size=count)


# ----------------------------------------------------------------------------------------------------- hashing


@pytest.mark.parametrize("bandwidth", [0.3, 0.1, 0.03])
def test_weights_go_to_a_mode_of_their_density_and_never_across_a_minimum(bandwidth: float) -> None:
    """The density is computed here at every point, from all numbers, with its exact derivative."""
    numbers = drawn(200)
    found = hash_values(numbers, bandwidth)
    line = np.arange(numbers.min() - 4 * bandwidth, numbers.max() + 4 * bandwidth, bandwidth / 100)
    distance = (line[:, None] - numbers) / bandwidth
    slope = np.sign((-distance * np.exp(-(distance**2) / 2)).sum(1))
    slope[0] = 1
    slope = slope[np.maximum.accumulate(np.where(slope != 0, np.arange(len(slope)), 0))]
    turns = np.flatnonzero(slope[1:] != slope[:-1])
    peaks, valleys = line[turns[slope[turns] > 0]], line[turns[slope[turns] < 0]]
    assert len(found.values) == len(peaks)
    np.testing.assert_allclose(found.values, peaks, atol=0.05 * bandwidth, rtol=0)
    moved = found.values[found.codes]
    crossed = (numbers[:, None] - valleys) * (moved[:, None] - valleys) < 0
    closest = np.minimum(np.abs(numbers[:, None] - valleys), np.abs(moved[:, None] - valleys))
    assert not (crossed & (closest > 0.05 * bandwidth)).any()


def test_fewer_values_are_left_the_larger_the_bandwidth() -> None:
    numbers = drawn(3000)
    ladder = [0.0, 1e-9, 1e-6, 1e-5, 1e-4, 1e-3, 3e-3, 1e-2, 3e-2, 0.1, 0.3, 1.0, 3.0]
    counts = [len(hash_values(numbers, one).values) for one in ladder]
    assert counts == sorted(counts, reverse=True)
    assert (counts[0], counts[-1]) == (3000, 1)
    assert 20 < counts[7] < 500
    assert abs(float(hash_values(numbers, 3.0).values[0])) < 0.1


@pytest.mark.parametrize("bandwidth", [0.0, 1e-12])
def test_no_bandwidth_changes_nothing(bandwidth: float) -> None:
    numbers = drawn(1000).astype(np.float32).astype(np.float64)
    found = hash_values(numbers, bandwidth)
    assert (found.values[found.codes] == numbers).all()


def test_numbers_around_a_few_values_become_these() -> None:
    values = np.array([-1.0, -0.2, 0.0, 0.3, 0.9])
    chosen = np.random.default_rng(1).integers(0, 5, 4000)
    found = hash_values(values[chosen] + 1e-3 * drawn(4000), 5e-3)
    np.testing.assert_allclose(found.values, values, atol=2e-4)
    assert (found.codes == chosen).all()
    repeated = hash_values(np.array([0.5, 0.5, -1.0]), 0.1)
    assert repeated.codes.tolist() == [1, 1, 0]


def test_bandwidths_follow_the_spread_or_the_gaps_and_are_halved_until_little_moves() -> None:
    numbers = drawn(5000)
    assert bandwidth_of(3 * numbers, 0.1) == pytest.approx(0.3, rel=0.05)
    assert bandwidth_of(np.array([0.0, 0.0, 1.0, 4.0, 6.0]), 0.5, "gap") == 1.0
    assert bandwidth_of(np.ones(4), 1.0, "gap") == 0
    free, same = hash_within(numbers, 0.5, None)
    assert same == 0.5
    assert len(free.values) < 10
    found, smaller = hash_within(numbers, 0.5, 0.02)
    assert smaller in [0.5 / 2**k for k in range(1, 12)]
    assert np.sqrt(np.square(found.values[found.codes] - numbers).mean()) <= 0.02 * np.sqrt(np.square(numbers).mean())


# ----------------------------------------------------------------------------------------------------- merging


def dense(activation: nn.Module, width: int = 8) -> nn.Sequential:
    torch.manual_seed(0)
    return nn.Sequential(nn.Linear(5, width), activation, nn.Linear(width, 3)).double().eval()


VECTORS = torch.randn(20, 5, generator=torch.Generator().manual_seed(1), dtype=torch.float64)


def change(network: nn.Module, expected: Tensor, x: Tensor) -> float:
    with torch.no_grad():
        return relative_error(expected, network(x))


@torch.no_grad()
def copy_rows(layer: nn.Module, source: int, targets: list[int], factor: float = 1.0) -> None:
    for target in targets:
        layer.weight[target] = factor * layer.weight[source]
        if layer.bias is not None:
            layer.bias[target] = factor * layer.bias[source]


@pytest.mark.parametrize("activation", [nn.ReLU(), nn.GELU(), nn.SiLU(), nn.Tanh(), nn.Hardswish(), nn.PReLU()])
def test_equal_neurons_are_merged_before_any_activation(activation: nn.Module) -> None:
    """Of 8 neurons, 3 of which are the same, 6 are left."""
    network = dense(activation)
    copy_rows(network[0], 1, [4, 6])
    with torch.no_grad():
        expected = network(VECTORS)
    assert merge_same(network, VECTORS) == 2
    assert (network[0].out_features, network[2].in_features) == (6, 6)
    assert change(network, expected, VECTORS) < 1e-14


def test_a_neuron_without_bias_has_one_of_zero_and_one_is_left() -> None:
    network = dense(nn.ReLU())
    network[0].bias = None
    copy_rows(network[0], 0, list(range(1, 8)))
    with torch.no_grad():
        expected = network(VECTORS)
    assert merge_same(network, VECTORS) == 7
    assert network[0].weight.shape == (1, 5)
    assert change(network, expected, VECTORS) < 1e-14
    assert merge_same(network, VECTORS) == 0


def test_multiples_are_merged_where_activations_pass_factors_on() -> None:
    for activation, found in ((nn.ReLU(), 2), (nn.LeakyReLU(), 2), (nn.PReLU(8), 2), (nn.GELU(), 0)):
        network = dense(activation)
        copy_rows(network[0], 2, [5], 2.5)
        copy_rows(network[0], 2, [7], 0.3)
        copy_rows(network[0], 2, [0], -1.0)
        with torch.no_grad():
            expected = network(VECTORS)
        assert merge_same(network, VECTORS) == 0
        assert merge_same(network, VECTORS, proportional=True) == found
        assert change(network, expected, VECTORS) < 1e-14


def test_what_reads_merged_neurons_is_the_same_if_its_sums_are() -> None:
    torch.manual_seed(0)
    network = nn.Sequential(nn.Linear(5, 4), nn.ReLU(), nn.Linear(4, 4), nn.ReLU(), nn.Linear(4, 2)).double()
    copy_rows(network[0], 0, [3])
    with torch.no_grad():
        network[2].weight.copy_((network[2].weight * 64).round() / 64)  # so that sums are exact
        network[2].weight[2] = network[2].weight[1]
        network[2].weight[2, [0, 3]] = network[2].weight[1, [3, 0]]
        network[2].bias[2] = network[2].bias[1]
        expected = network(VECTORS)
    assert merge_same(network, VECTORS) == 2
    assert (network[0].out_features, network[2].out_features) == (3, 3)
    assert change(network, expected, VECTORS) < 1e-14


class Residual(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.stem = nn.Conv2d(3, 6, 3, padding=1)
        self.branch = nn.Conv2d(6, 6, 3, padding=1, bias=False)
        self.head = nn.Conv2d(6, 2, 1)

    def forward(self, x: Tensor) -> Tensor:
        x = self.stem(x).relu()
        return self.head(x + self.branch(x).relu())


IMAGES = torch.randn(2, 3, 32, 32, generator=torch.Generator().manual_seed(2), dtype=torch.float64)


def test_branches_that_are_added_must_agree() -> None:
    torch.manual_seed(0)
    network = Residual().double().eval()
    copy_rows(network.stem, 0, [1])
    again = copy.deepcopy(network)
    assert merge_same(again, IMAGES) == 0
    copy_rows(network.branch, 0, [1])
    with torch.no_grad():
        expected = network(IMAGES)
    assert merge_same(network, IMAGES) == 1
    assert (network.stem.out_channels, network.branch.weight.shape[:2], network.head.in_channels) == (5, (5, 5), 5)
    assert change(network, expected, IMAGES) < 1e-13
    protected = copy.deepcopy(again)
    copy_rows(protected.branch, 0, [1])
    assert merge_same(protected, IMAGES, protect=["head"]) == 0


class Blocked(nn.Module):
    """Channels on whose number or neighbours something depends."""

    def __init__(self, kind: str) -> None:
        super().__init__()
        self.kind = kind
        self.first = nn.Conv2d(3, 4, 3)
        self.norm = nn.GroupNorm(2, 4) if kind == "norm" else nn.Identity()
        self.second = nn.Conv2d(4, 4, 1, groups=2 if kind == "grouped" else 1)

    def forward(self, x: Tensor) -> Tensor:
        x = self.norm(self.first(x).relu())
        if self.kind == "softmax":
            x = x.softmax(1)
        if self.kind == "twice":
            x = self.second(x).relu()
        if self.kind == "sum":
            x = x * x.sum(1, keepdim=True)
        return self.second(x) + (x if self.kind == "output" else 0)


@pytest.mark.parametrize("kind", ["norm", "grouped", "softmax", "twice", "sum", "output"])
def test_what_looks_at_several_channels_blocks(kind: str) -> None:
    torch.manual_seed(0)
    network = Blocked(kind).double().eval()
    copy_rows(network.first, 0, [1])
    assert merge_same(network, IMAGES) == 0
    plain = Blocked("").double().eval()
    copy_rows(plain.first, 0, [1])
    assert merge_same(plain, IMAGES) == 1


@torch.no_grad()
def plant(network: nn.Module, x: Tensor, factor: float = 1.0) -> int:
    """Make the second channel of every family of channels a copy of the first one; return how many there are."""
    channels = Channels(network, x)
    families = [family for family in channels.families if channels.described_by(family) and len(family.nodes) > 1]
    for family in families:
        for name, key, rows in channels.described_by(family):
            tensor = getattr(channels.modules[name], key)
            tensor.data[int(rows[1])] = tensor.data[int(rows[0])]
    return len(families)


NETWORKS = ("test_resnet", "test_efficientnet", "test_vit", "test_convnext")
LONG = ("mobilenetv3_small_050", "densenet121", "repvgg_a0", "inception_v3", "regnety_002", "convnext_atto")


@pytest.mark.parametrize("name", [*NETWORKS, *(pytest.param(name, marks=pytest.mark.slow) for name in LONG)])
def test_planted_duplicates_are_all_found_and_nothing_changes(name: str) -> None:
    torch.manual_seed(0)
    network = shake_norms(timm.create_model(name, pretrained=False, num_classes=7).double())
    x = F.interpolate(IMAGES, 75 if name == "inception_v3" else 160 if name == "test_vit" else 32)
    planted = plant(network, x)
    assert planted > 3
    original = copy.deepcopy(network)
    with torch.no_grad():
        expected = network(x)
    assert merge_same(network, x) == planted
    assert change(network, expected, x) < 1e-10
    fresh, state = original, network.state_dict()
    apply_structure(fresh, json.loads(json.dumps(structure(original, network))), state, "config.yaml")
    fresh.load_state_dict(state)
    assert change(fresh, expected, x) < 1e-10


def test_all_channels_of_a_residual_network_can_be_merged() -> None:
    network = timm.create_model("resnet18", pretrained=False, num_classes=7).eval()
    channels = Channels(network, torch.randn(2, 3, 32, 32))
    sizes = sorted(len(family.nodes) for family in channels.families)
    assert sizes == sorted([64] * 3 + [128] * 3 + [256] * 3 + [512] * 3)


def test_reordered_channels_change_nothing() -> None:
    torch.manual_seed(0)
    network = shake_norms(timm.create_model("test_efficientnet", pretrained=False).double())
    with torch.no_grad():
        expected = network(IMAGES)
    channels = Channels(network, IMAGES)
    before = {name: tensor.clone() for name, tensor in network.state_dict().items()}
    for seed, family in enumerate(channels.families):
        channels.reorder(family, np.random.default_rng(seed).permutation(len(family.nodes)))
    assert sum(not torch.equal(tensor, before[name]) for name, tensor in network.state_dict().items()) > 20
    assert change(network, expected, IMAGES) < 1e-12


def test_face_networks_merge_after_folding_though_they_pad_with_values() -> None:
    torch.manual_seed(0)
    network = shake_norms(FaceNet((1, 1)).double())
    original = copy.deepcopy(network)
    BatchNormFolding()(network, Data(example=IMAGES))
    assert any(getattr(layer, "padded", False) for layer in network.modules())
    planted = plant(network, IMAGES)
    with torch.no_grad():
        expected = network(IMAGES)
    assert planted == merge_same(network, IMAGES) == 3  # within both blocks, and behind the last
    assert change(network, expected, IMAGES) < 1e-10
    state = network.state_dict()
    apply_structure(original, structure(original, network), state, "config.yaml")
    original.double().load_state_dict(state)  # biases that it had not were made in float32
    assert change(original, expected, IMAGES) < 1e-10


def test_near_channels_are_averaged_up_to_a_share_and_more_loses_more() -> None:
    torch.manual_seed(0)
    network = timm.create_model("test_resnet", pretrained=False, num_classes=7).eval()
    x = IMAGES.float()
    with torch.no_grad():
        expected = network(x)
    widths = [len(family.nodes) for family in Channels(network, x).families]
    errors = []
    for share in (0.125, 0.25, 0.5):
        changed = copy.deepcopy(network)
        average_near(changed, x, share)
        assert merge_same(changed, x) == sum(math.floor(share * width) for width in widths)
        errors.append(change(changed, expected, x))
    assert 0 < errors[0] < errors[1] < errors[2]
    twin = dense(nn.ReLU())
    copy_rows(twin[0], 3, [6])
    with torch.no_grad():
        twin[0].weight[6, 0] += 1e-6
    average_near(twin, VECTORS, 1 / 8)
    assert torch.equal(twin[0].weight[3], twin[0].weight[6])
    assert len(torch.unique(twin[0].weight, dim=0)) == 7


@pytest.mark.parametrize("share", [0.0, 0.2, 0.5, 0.7])
def test_schedules_over_depth_have_the_same_mean(share: float) -> None:
    for schedule in ("constant", "increasing", "decreasing", "block"):
        for count in (1, 2, 5, 8):
            found = channel_shares(count, share, schedule)
            assert np.mean(found) == pytest.approx(share)
            assert all(-1e-12 <= one <= 1 + 1e-12 for one in found)
    assert channel_shares(4, 0.25, "block") == [0, 0, 0.5, 0.5]
    rising = channel_shares(5, 0.3, "increasing")
    assert rising == sorted(rising)
    assert channel_shares(5, 0.3, "decreasing") == rising[::-1]


# --------------------------------------------------------------------------------------------------- splitting


def few_kernels(outputs: int, inputs: int, kernel: int, count: int, seed: int = 0) -> Tensor:
    draws = torch.Generator().manual_seed(seed)
    kernels = torch.randn(count, kernel, kernel, generator=draws, dtype=torch.float64)
    chosen = torch.stack([torch.randperm(outputs, generator=draws) % count for _ in range(inputs)], 1)
    return kernels[chosen]  # each is found at every input


def test_distinct_kernels_run_once_for_each_input_channel() -> None:
    """Of 32 × 16 kernels 6 differ: 96 instead of 512 convolutions of a channel."""
    weight = few_kernels(32, 16, 3, 6)
    split = split_kernels(weight)
    assert int(split.counts.sum()) == 96
    assert split.products == 96 / 512
    x = torch.randn(2, 16, 9, 9, generator=torch.Generator().manual_seed(1), dtype=torch.float64)
    torch.testing.assert_close(split_convolution(x, split, (3, 3)), F.conv2d(x, weight), rtol=0, atol=3e-13)


@pytest.mark.parametrize(("groups", "stride", "dilation"), [(1, 2, 1), (4, 1, 2), (16, (2, 1), 1)])
def test_splitting_is_exact_for_every_kind_of_convolution(groups: int, stride: object, dilation: int) -> None:
    weight = few_kernels(32, 16 // groups, 3, 3)
    split = split_kernels(weight, groups)
    x = torch.randn(2, 16, 9, 9, dtype=torch.float64)
    pair = stride if isinstance(stride, tuple) else (stride, stride)
    found = split_convolution(x, split, (3, 3), pair, (dilation, dilation), groups)
    expected = F.conv2d(x, weight, None, pair, 0, dilation, groups)
    torch.testing.assert_close(found, expected, rtol=0, atol=1e-12)
    for coded in (True, False):
        stored = split_weight(weight.float(), split_kernels(weight.float(), groups), groups, coded)
        assert torch.equal(stored(), weight.float())
        empty = build_weight(json.loads(json.dumps(weight_node(stored))))
        empty.load_state_dict(stored.state_dict())
        assert torch.equal(empty(), weight.float())


def test_linear_layers_have_kernels_of_one_number() -> None:
    weight = few_kernels(50, 20, 1, 4)[:, :, 0, 0]
    split = split_kernels(weight)
    x = torch.randn(7, 20, dtype=torch.float64)
    found = split_convolution(x[:, :, None, None], split, (1, 1)).flatten(1)
    torch.testing.assert_close(found, F.linear(x, weight), rtol=0, atol=1e-12)
    assert split.products == 80 / 1000


def test_the_smallest_form_is_stored() -> None:
    kernels = few_kernels(64, 32, 3, 4).float()
    chosen = smallest(kernels)
    assert isinstance(chosen, SplitWeight)
    assert chosen.stored_bytes == min(one.stored_bytes for one in (chosen, smallest(kernels, store="codebook")))
    assert chosen.stored_bytes == 32 * 4 + 64 * 32 * 2 // 8 + 36 * 4 + math.ceil(128 * 9 * 6 / 8)
    values = torch.tensor([-1.0, 0.3, 1.0])[torch.randint(3, (64, 32, 3, 3))]
    assert isinstance(smallest(values), CodebookWeight)
    floats = torch.randn(16, 16)
    assert smallest(floats) is None
    assert smallest(values, store="floats") is None
    for store in ("codebook", "split"):
        for weight in (kernels, values, floats):
            made = smallest(weight, store=store)
            assert made is not None
            assert torch.equal(made(), weight)


# --------------------------------------------------------------------------------------------------- transform


class Digits(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.first = nn.Conv2d(1, 12, 3, padding=1)
        self.second = nn.Conv2d(12, 16, 3, stride=2, padding=1)
        self.head = nn.Linear(16 * 16, 10)

    def forward(self, x: Tensor) -> Tensor:
        return self.head(F.gelu(self.second(self.first(x).relu())).flatten(1))


@pytest.fixture(scope="module")
def trained() -> tuple[Digits, Tensor]:
    """Return a network of which 4 and 6 channels were copies of others before it was trained, and images."""
    from sklearn.datasets import load_digits

    digits = load_digits()
    images = torch.tensor(digits.images, dtype=torch.float32)[:, None] / 8 - 1
    labels = torch.tensor(digits.target)
    torch.manual_seed(0)
    network = Digits()
    with torch.no_grad():  # copies whose readers weigh them alike too get the same gradients for ever
        for layer, reader, count in ((network.first, network.second, 4), (network.second, network.head, 6)):
            size = reader.weight.shape[1] // len(layer.weight)
            columns = reader.weight.view(len(reader.weight), len(layer.weight), size, -1)
            for index in range(count):
                copy_rows(layer, index, [len(layer.weight) - 1 - index])
                columns[:, -1 - index] = columns[:, index]
    optimizer = torch.optim.SGD(network.parameters(), lr=0.05, momentum=0.9)
    for step in range(60):
        chosen = torch.randint(len(images), (64,), generator=torch.Generator().manual_seed(step))
        optimizer.zero_grad()
        F.cross_entropy(network(images[chosen]), labels[chosen]).backward()
        optimizer.step()
    with torch.no_grad():
        assert float((network(images).argmax(1) == labels).float().mean()) > 0.8
    return network.eval(), images[:200]


def test_a_network_that_was_trained_with_copies_loses_them_and_nothing_else(trained: tuple[Digits, Tensor]) -> None:
    network, images = copy.deepcopy(trained[0]), trained[1]
    chain = run_chain(network, [RED(bandwidth=1e-6, edges=True)], Data(), images)
    assert chain.reports[0].totals["merged"] == 10
    assert (network.first.out_channels, network.head.in_features) == (8, 10 * 16)
    assert chain.errors[0] < 1e-6


def test_hashing_makes_copies_equal_that_noise_has_parted(trained: tuple[Digits, Tensor]) -> None:
    network, images = copy.deepcopy(trained[0]), trained[1]
    with torch.no_grad():
        for layer in (network.first, network.second):
            for tensor in (layer.weight, layer.bias):
                tensor += 1e-6 * torch.randn(tensor.shape, generator=torch.Generator().manual_seed(0))
    original = copy.deepcopy(network)
    assert RED(bandwidth=0)(network, Data(example=images)).totals["merged"] == 0
    chain = run_chain(original, [RED(bandwidth=3e-5, edges=True)], Data(), images)
    assert chain.reports[0].totals["merged"] == 10
    assert chain.errors[0] < 1e-4


def test_reports_tell_what_became_of_layers(trained: tuple[Digits, Tensor]) -> None:
    network, images = copy.deepcopy(trained[0]), trained[1]
    size = stored_size(network)
    before = sum(count_macs(network, lambda: network(images[:1])).values())
    chain = run_chain(network, [RED(bandwidth=0.05, edges=True, measure=True)], Data(), images)
    report = chain.reports[0]
    first = report.layers[1]
    assert first.name == "second"
    assert "12 → 16 channels became" in first.note
    assert "kernels differ" in first.note
    assert "times as long" in first.note
    assert first.signal_to_noise is not None
    assert first.signal_to_noise > 20
    assert stored_size(network) < 0.5 * size
    layers = {name: layer for name, layer in network.named_modules() if hasattr(layer, "current_weight")}
    held = {n: sum(t.numel() * t.element_size() for t in m.state_dict().values()) for n, m in layers.items()}
    assert {record.name: record.bytes_after for record in report.layers if record.name in held} == held
    after = sum(count_macs(network, lambda: network(images[:1])).values())
    assert report.totals["multiplications"] == after / before < 1
    assert report.totals["split"] < report.totals["multiplications"]
    assert report.totals["moved"] > 0
    assert any("batch norms" in note for note in report.notes) is False


def test_larger_bandwidths_lose_more_and_take_fewer_bytes(trained: tuple[Digits, Tensor]) -> None:
    errors, sizes = [], []
    for bandwidth in (1e-3, 1e-2, 5e-2):
        network = copy.deepcopy(trained[0])
        chain = run_chain(network, [RED(bandwidth=bandwidth, limit=None, edges=True)], Data(), trained[1])
        errors.append(chain.errors[0])
        sizes.append(stored_size(network))
    assert errors == sorted(errors)
    assert sizes == sorted(sizes, reverse=True)
    network = copy.deepcopy(trained[0])
    kept = run_chain(network, [RED(bandwidth=10.0, limit=0.02, edges=True)], Data(), trained[1])
    assert all(record.signal_to_noise > 20 * math.log10(1 / 0.02) - 0.1 for record in kept.reports[0].layers)


def test_results_are_rebuilt_from_plain_data_and_quantized_further() -> None:
    torch.manual_seed(0)
    network = shake_norms(timm.create_model("test_resnet", pretrained=False, num_classes=7))
    original, x = copy.deepcopy(network), IMAGES.float()
    chain = run_chain(network, [BatchNormFolding(), RED(share=0.2), UniformQuantization(bits=8)], Data(), x)
    assert chain.reports[1].totals["merged"] > 0
    state = network.state_dict()
    apply_structure(original, json.loads(json.dumps(structure(original, network))), state, "config.yaml")
    original.load_state_dict(state)
    assert torch.equal(original.eval()(x), network(x))
    torch.testing.assert_close(baked(network)(x), network(x))
    with pytest.raises(ConfigError, match="has codes already"):
        RED()(network, Data(example=x))


def test_what_may_follow(trained: tuple[Digits, Tensor]) -> None:
    network, images = copy.deepcopy(trained[0]), trained[1]
    data = Data(images=[images[:32]])
    chain = run_chain(network, [RED(), UniformQuantization(bits=4), AdaRound(steps=3)], data, images)
    assert chain.errors[-1] < 0.5
    chain = run_chain(copy.deepcopy(trained[0]), [RED(store="floats"), AdaRound(steps=3)], data, images)
    assert chain.errors[-1] < 0.5
    for method in (AdaRound(steps=3), Nupes(steps=3), Nupes(data_free=True)):
        with pytest.raises(ConfigError, match=r"codes on no grid \(CodebookWeight\).*compression\.red\.store=floats"):
            run_chain(copy.deepcopy(trained[0]), [RED(store="codebook"), method], data, images)
    torch.manual_seed(0)
    faces = shake_norms(FaceNet((1, 1)))
    plant(faces, IMAGES.float())
    transforms = [BatchNormFolding(), RED(bandwidth=0, store="floats"), SPIQ(8), UniformQuantization(bits=8)]
    chain = run_chain(faces, transforms, Data(), IMAGES.float())
    assert chain.reports[1].totals["merged"] > 0
    assert chain.reports[2].totals["static"] > 0
    assert chain.reports[2].totals["floats"] > 0  # those whose channels are not those that SPIQ read
    assert chain.errors[-1] < 0.1


@pytest.mark.parametrize("between", [True, False])
def test_codes_and_exponents_are_learned_of_what_merging_left(trained: tuple[Digits, Tensor], between: bool) -> None:
    """NUPES refines the weights that RED hashed and merged: from PowerQuant's codes of them, or from its own."""
    network, images = copy.deepcopy(trained[0]), trained[1]
    data = Data(images=[images[:64], images[64:128]])
    settings = {"bits": 3, "exponent": 0.7, "edge_bits": None}
    nearest = PowerQuantization(**settings)
    learned = Nupes(**settings, steps=80, batch_size=32, rate=3e-2)
    merging = RED(bandwidth=1e-6, edges=True, store="smallest" if between else "floats")
    chain = run_chain(network, [merging, nearest, learned] if between else [merging, learned], data, images)
    plain = run_chain(copy.deepcopy(trained[0]), [merging, nearest], data, images)
    assert chain.reports[0].totals["merged"] == 10
    assert (len(network.first.stored()), network.head.in_features) == (8, 10 * 16)
    assert chain.errors[-1] < 0.9 * plain.errors[-1]
    assert chain.reports[-1].totals["moved"] > 0
    original = copy.deepcopy(trained[0])
    apply_structure(original, json.loads(json.dumps(structure(original, network))), network.state_dict(), "config.yaml")
    original.load_state_dict(network.state_dict())
    assert torch.equal(original(images), network(images))


def test_nothing_is_expanded_where_codebooks_hold_all(trained: tuple[Digits, Tensor]) -> None:
    network, images = copy.deepcopy(trained[0]), trained[1]
    chain = run_chain(network, [RED(bandwidth=0.05, store="codebook"), ResidualExpansion(bits=4)], Data(), images)
    held = [{one.name: one.bytes_after for one in report.layers} for report in chain.reports]
    assert held[0] == held[1]
    assert chain.errors[0] == chain.errors[1]


def test_norms_that_are_not_folded_are_told() -> None:
    network = shake_norms(timm.create_model("test_resnet", pretrained=False))
    report = RED(bandwidth=0)(network, Data(example=IMAGES.float()))
    assert any("batch norms are not folded" in note and "put bn_folding before red" in note for note in report.notes)
    assert isinstance(network.get_submodule("conv1.0"), nn.Conv2d | CompressedConv2d)


class Fixed(nn.Module):
    """Asks for a fixed number of channels."""

    def __init__(self) -> None:
        super().__init__()
        self.first, self.second = nn.Conv2d(3, 4, 1), nn.Conv2d(4, 2, 1)

    def forward(self, x: Tensor) -> Tensor:
        return self.second(self.first(x).relu().mean((2, 3)).view(-1, 4, 1, 1))


def test_a_network_that_asks_for_a_number_of_channels_is_an_error() -> None:
    network = Fixed().eval()
    copy_rows(network.first, 0, [1])
    with pytest.raises(ConfigError, match=r"does not run without channels that equal others, as of first.*protect"):
        RED()(network, Data(example=IMAGES.float()))


def test_settings_that_make_no_sense_are_refused() -> None:
    for settings in (
        {"bandwidth": -1}, {"rule": "width"}, {"limit": 0}, {"share": 1.0}, {"schedule": "steep"}, {"store": "zip"}
    ):  # fmt: skip
        with pytest.raises(ConfigError, match=f"compression.red.{next(iter(settings))}="):
            RED(**settings)
