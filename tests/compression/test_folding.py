# SPDX-License-Identifier: Apache-2.0
from __future__ import annotations

import copy
import json
from collections.abc import Callable

import pytest
import timm
import torch
from torch import Tensor, nn

from affect.compression.base import Data, relative_error, run_chain
from affect.compression.folding import BatchNormFolding, fold_batch_norms
from affect.compression.layers import CompressedConv2d, WithoutNorm
from affect.compression.structure import apply_structure, structure
from affect.errors import ConfigError
from tests.compression.networks import FaceNet, RandomNet, shake_norms

COUNTS = {  # network: batch norms, those of adjacent folding, those of the full search, image size
    "resnet18": (20, 20, 20, 32),
    "mobilenetv3_small_100": (34, 34, 34, 32),
    "resnet50": (53, 53, 53, 32),
    "densenet121": (121, 59, 59, 32),
    "efficientnet_b0": (49, 49, 49, 32),
    "mobilenetv2_100": (52, 52, 52, 32),
    "inception_v3": (94, 94, 94, 75),
    "xception41p": (40, 28, 32, 32),
    "dpn68": (72, 45, 45, 32),
    "repvgg_a0": (61, 44, 44, 32),
    "mobileone_s0": (226, 191, 191, 32),
}
QUICK = ("resnet18", "mobilenetv3_small_100")


def images(size: int = 16, dtype: torch.dtype = torch.float64) -> Tensor:
    return torch.randn(2, 3, size, size, generator=torch.Generator().manual_seed(1), dtype=dtype)


@pytest.mark.parametrize(
    "name", [name if name in QUICK else pytest.param(name, marks=pytest.mark.slow) for name in COUNTS]
)
def test_as_many_norms_are_folded_as_in_the_table(name: str) -> None:
    norms, adjacent, full, size = COUNTS[name]
    torch.manual_seed(0)
    network = shake_norms(timm.create_model(name, pretrained=False).double())
    x = images(size)
    with torch.no_grad():
        expected = network(x)
        found = fold_batch_norms(network, x, through_norms=False)
        assert relative_error(expected, network(x)) < 1e-10
    assert (len(found.folds), found.adjacent, found.count("backward") + found.count("forward")) == (
        norms,
        adjacent,
        full,
    )
    assert not found.padded
    left = [m for m in network.modules() if isinstance(m, nn.BatchNorm2d)]
    assert len(left) == norms - full


@pytest.mark.slow
def test_other_batch_norms_may_take_a_fold_back() -> None:
    """In each dense block but the first one, what the first batch norm needs is undone by the others."""
    torch.manual_seed(0)
    network = shake_norms(timm.create_model("densenet121", pretrained=False).double())
    x = images(32)
    with torch.no_grad():
        expected = network(x)
        found = fold_batch_norms(network, x)
        assert relative_error(expected, network(x)) < 1e-10
    assert found.count(None) == 59


@pytest.mark.parametrize(
    ("blocks", "norms", "adjacent", "backward", "forward", "strict"),
    [((2, 2, 2, 2), 31, 22, 22, 9, 24), pytest.param((3, 4, 14, 3), 79, 54, 54, 25, 55, marks=pytest.mark.slow)],
)
def test_networks_for_faces_fold_completely(
    blocks: tuple[int, ...], norms: int, adjacent: int, backward: int, forward: int, strict: int
) -> None:
    torch.manual_seed(0)
    network = shake_norms(FaceNet(blocks).double())
    cautious = copy.deepcopy(network)
    x = images(32)
    with torch.no_grad():
        expected = network(x)
        found = fold_batch_norms(network, x)
        assert relative_error(expected, network(x)) < 1e-10
        refusing = fold_batch_norms(cautious, x, strict=True, through_norms=False)
        assert relative_error(expected, cautious(x)) < 1e-10
    assert (len(found.folds), found.adjacent) == (norms, adjacent)
    assert (found.count("backward"), found.count("forward"), found.count(None)) == (backward, forward, 0)
    assert len(found.padded) == forward - 1  # the last one is in front of a linear layer
    assert norms - refusing.count(None) == strict
    assert not refusing.padded
    assert "the padding of" in next(fold.reason for fold in refusing.folds if fold.direction is None)


def test_single_precision_keeps_the_output() -> None:
    torch.manual_seed(0)
    network = shake_norms(FaceNet())
    x = images(32, torch.float32)
    chain = run_chain(network, [BatchNormFolding()], Data(), x)
    assert chain.errors[0] < 1e-5
    assert chain.reports[0].totals == {
        "norms": 31, "folded": 31, "forward": 9, "left": 0, "adjacent": 22, "padded": 8,
    }  # fmt: skip


def test_zero_padding_would_be_wrong_at_the_border() -> None:
    """A forward fold with zero padding changes the border and nothing else: what the padding with values is for."""
    torch.manual_seed(0)
    network = shake_norms(Toy(lambda n, x: n.conv2(n.norm(x.relu()))).double())
    x = images()
    with torch.no_grad():
        expected = network(x)
        found = fold_batch_norms(network, x)
        assert found.padded == ["conv2"]
        torch.testing.assert_close(network(x), expected)
        network.conv2.padding_value.zero_()
        wrong = (network(x) - expected).abs().amax((0, 1))
    assert float(wrong[1:-1, 1:-1].max()) < 1e-9
    assert float(wrong[0].min()) > 1e-3


class Toy(nn.Module):
    """A few layers, and a rule of what is done with them; maps of 4 channels but for the input."""

    def __init__(self, rule: Callable[[Toy, Tensor], Tensor]) -> None:
        super().__init__()
        self.stem = nn.Conv2d(3, 4, 3, padding=1)
        self.conv = nn.Conv2d(4, 4, 3, padding=1, bias=False)
        self.conv2 = nn.Conv2d(4, 4, 3, padding=1)
        self.conv3 = nn.Conv2d(4, 4, 1)
        self.norm = nn.BatchNorm2d(4)
        self.norm2 = nn.BatchNorm2d(4)
        self.wide = nn.BatchNorm2d(8)
        self.pool = nn.AvgPool2d(2)
        self.linear = nn.Linear(4, 3)
        self.rule = rule

    def forward(self, x: Tensor) -> Tensor:
        return self.rule(self, self.stem(x))


FOLDABLE: dict[str, tuple[str, Callable[[Toy, Tensor], Tensor]]] = {
    "sum of two": ("backward", lambda n, x: n.norm(n.conv(x.relu()) + n.conv2(x.relu())).relu()),
    "a value added to itself": ("backward", lambda n, x: (lambda y: n.norm(y + y))(n.conv(x.relu())).relu()),
    "a skip that is added twice": (
        "backward",
        lambda n, x: (lambda y: n.norm(n.conv3(y) + y + y).relu())(n.conv(x.relu())),
    ),
    "concatenation": ("backward", lambda n, x: n.wide(torch.cat([n.conv(x.relu()), n.conv2(x.relu())], 1)).relu()),
    "another reader": (
        "backward",
        lambda n, x: (lambda y: torch.cat([n.norm(y).relu(), n.conv2(y).relu()], 1))(n.conv(x.relu())),
    ),
    "pooling behind": ("forward", lambda n, x: n.conv3(n.pool(n.norm(x.relu()))).relu()),
    "padded behind": ("forward", lambda n, x: n.conv(n.norm(x.relu())).relu()),
    "another producer behind": ("forward", lambda n, x: n.conv2(n.norm(x.relu()) + n.conv(x.relu())).relu()),
    "two readers": (
        "forward",
        lambda n, x: (lambda y: n.conv(y).relu() + n.conv2(y).relu())(n.norm(x.relu())),
    ),
    "mean and linear": ("forward", lambda n, x: n.linear(n.norm(x.relu()).mean((2, 3)))),
    "flattened": ("forward", lambda n, x: n.linear(nn.functional.adaptive_avg_pool2d(n.norm(x.relu()), 1).flatten(1))),
    "an activation in place": (
        "backward",
        lambda n, x: (lambda y: torch.cat([n.norm(y).relu_(), n.conv2(y).relu()], 1))(n.conv(x.relu())),
    ),
    "a sum in place": ("backward", lambda n, x: n.norm(n.conv(x.relu()).add_(n.conv2(x.relu()))).relu_()),
}


@pytest.mark.parametrize("case", FOLDABLE)
def test_what_folding_of_neighbours_does_not_find(case: str) -> None:
    direction, rule = FOLDABLE[case]
    torch.manual_seed(0)
    network = shake_norms(Toy(rule).double())
    x = images()
    with torch.no_grad():
        expected = network(x)
        found = fold_batch_norms(network, x)
        assert relative_error(expected, network(x)) < 1e-12
    assert [fold.direction for fold in found.folds] == [direction]


LEFT: dict[str, tuple[str, Callable[[Toy, Tensor], Tensor]]] = {
    "between activations": ("relu", lambda n, x: n.norm(x.relu()).relu()),
    "the input goes on into an activation": (
        "relu",
        lambda n, x: (lambda y: n.norm(y).relu() + y.relu())(n.conv(x)),
    ),
    "the output of the network": ("output", lambda n, x: n.norm(x.relu())),
    "around itself": ("a path around it", lambda n, x: (lambda y: (y + n.norm(y)).relu())(n.conv(x.relu()))),
    "written into by others": ("relu", lambda n, x: (lambda y: (y.relu_(), n.norm(y).relu())[1])(n.conv(x))),
    "multiplied": ("mul", lambda n, x: n.conv2(n.norm(x.relu()) * 2).relu()),
    "a constant is added": ("add", lambda n, x: n.conv2(n.norm(x.relu()) + torch.ones(1, 4, 1, 1).to(x)).relu()),
    "padded with zeros by hand": ("pad", lambda n, x: n.conv3(nn.functional.pad(n.norm(x.relu()), [1] * 4)).relu()),
    "zeros count in the mean": (
        "avg_pool2d",
        lambda n, x: n.conv3(nn.functional.avg_pool2d(n.norm(x.relu()), 3, 1, 1)).relu(),
    ),
    "a layer that runs twice": ("Conv2d in conv", lambda n, x: n.norm(n.conv(n.conv(x).relu())).relu()),
    "a weight that others use": (
        "Conv2d in conv",
        lambda n, x: n.norm(n.conv(x.relu())).relu() * n.conv.weight.sum(),
    ),
}


@pytest.mark.parametrize("case", LEFT)
def test_what_cannot_be_folded_is_left_and_told(case: str) -> None:
    told, rule = LEFT[case]
    torch.manual_seed(0)
    network = shake_norms(Toy(rule).double())
    x = images()
    before = copy.deepcopy(network.state_dict())
    with torch.no_grad():
        expected = network(x)
        found = fold_batch_norms(network, x)
        assert torch.equal(expected, network(x))
    assert [fold.direction for fold in found.folds] == [None]
    assert told in found.folds[0].reason
    assert all(torch.equal(value, before[name]) for name, value in network.state_dict().items())


def test_maxima_commute_with_positive_scales_only() -> None:
    def rule(n: Toy, x: Tensor) -> Tensor:
        return n.conv3(nn.functional.max_pool2d(n.norm(x.relu()), 2)).relu()

    for negative in (False, True):
        network = Toy(rule).double().eval()
        network.norm.bias.data.uniform_()
        network.norm.weight.data[1] = -1 if negative else 2
        expected = network(images())
        found = fold_batch_norms(network, images())
        assert found.count("forward") == (not negative)
        torch.testing.assert_close(network(images()), expected)


def test_a_scale_of_zero_is_folded_where_nothing_takes_it_back() -> None:
    alone = Toy(lambda n, x: n.norm(n.conv(x.relu())).relu()).double()
    shared = Toy(FOLDABLE["another reader"][1]).double()
    for network, direction in ((alone, "backward"), (shared, None)):
        shake_norms(network).norm.weight.data[2] = 0
        expected = network(images())
        found = fold_batch_norms(network, images())
        assert [fold.direction for fold in found.folds] == [direction]
        torch.testing.assert_close(network(images()), expected)
    assert "conv2" in found.folds[0].reason


def test_scales_that_rounding_would_not_survive_are_not_taken_back() -> None:
    network = shake_norms(Toy(FOLDABLE["another reader"][1]))
    network.norm.weight.data[2] = 1e-6
    expected = network(images(dtype=torch.float32))
    found = fold_batch_norms(network, images(dtype=torch.float32))
    assert "so small" in found.folds[0].reason
    assert torch.equal(network(images(dtype=torch.float32)), expected)
    assert fold_batch_norms(network, images(dtype=torch.float32), inverse_limit=1e9).count("backward") == 1


def test_random_networks_stay_the_same() -> None:
    """Equal outputs for every fold that the search accepts, and no fewer than neighbours."""
    folded = {"forward": 0, "backward": 0, "adjacent": 0, "padded": 0}
    for seed in range(40):
        torch.manual_seed(seed)
        network = shake_norms(RandomNet(seed).double(), seed)
        x = images(7)
        with torch.no_grad():
            expected = network(x)
            found = fold_batch_norms(network, x, through_norms=bool(seed % 2), inverse_limit=1e6)
            for one, other in zip(expected, network(x), strict=True):
                assert relative_error(one, other) < 1e-9, seed
        assert found.count("forward") + found.count("backward") >= found.adjacent
        assert sum(isinstance(m, nn.BatchNorm2d) for m in network.modules()) >= found.count(None)
        for key in ("forward", "backward"):
            folded[key] += found.count(key)
        folded["adjacent"] += found.adjacent
        folded["padded"] += len(found.padded)
    assert folded["forward"] > 4
    assert folded["padded"] > 2
    assert folded["backward"] > folded["adjacent"]


def rebuilt(original: nn.Module, changed: nn.Module) -> nn.Module:
    node = json.loads(json.dumps(structure(original, changed)))
    fresh = copy.deepcopy(original)
    apply_structure(fresh, node, changed.state_dict(), "config.yaml")
    fresh.load_state_dict(changed.state_dict())
    return fresh.eval()


@pytest.mark.parametrize("kind", ["face", "timm", "in place"])
def test_a_folded_network_is_rebuilt_from_plain_data(kind: str) -> None:
    torch.manual_seed(0)
    made = {
        "face": lambda: FaceNet(),
        "timm": lambda: timm.create_model("mobilenetv3_small_050", pretrained=False),
        "in place": lambda: Toy(FOLDABLE["an activation in place"][1]),
    }[kind]()
    network = shake_norms(made)
    changed = copy.deepcopy(network)
    x = images(32, torch.float32)
    fold_batch_norms(changed, x)
    assert torch.equal(rebuilt(network, changed)(x), changed(x))
    norms = [m for m in changed.modules() if isinstance(m, WithoutNorm)]
    assert any(m.copies for m in norms) == (kind == "in place")
    if kind == "timm":
        assert not any(isinstance(m, CompressedConv2d) for m in changed.modules())  # plain layers, as fast as before


def test_names_can_be_protected() -> None:
    network = shake_norms(FaceNet())
    found = fold_batch_norms(network, images(32, torch.float32), protect=["stages.0"])
    left = {fold.name for fold in found.folds if fold.direction is None}
    assert {"stages.0.bn1", "stages.0.bn2", "stages.0.bn3"} <= left
    assert "stages.3.bn2" not in left


def test_networks_that_decide_by_values_are_refused() -> None:
    network = Toy(lambda n, x: n.norm(n.conv(x)).relu() if float(x.mean()) > 0 else x).eval()
    with pytest.raises(ConfigError, match="decides by values"):
        fold_batch_norms(network, images(dtype=torch.float32))


def test_mistakes_are_told() -> None:
    network = shake_norms(FaceNet())
    with pytest.raises(ConfigError, match="evaluation mode"):
        fold_batch_norms(network.train(), images(32, torch.float32))
    network.eval()
    with pytest.raises(ConfigError, match="search=ful"):
        BatchNormFolding(search="ful")
    with pytest.raises(ConfigError, match="inverse_limit"):
        BatchNormFolding(inverse_limit=0)
    with pytest.raises(ConfigError, match="images of the size"):
        BatchNormFolding()(network, Data())
    with pytest.raises(ConfigError, match="does not run on images"):
        fold_batch_norms(network, torch.zeros(2, 4, 32, 32))
    report = BatchNormFolding()(nn.Sequential(nn.Conv2d(3, 2, 1)).eval(), Data(example=images(dtype=torch.float32)))
    assert report.notes == ["the network has no batch norms"]


def test_shapes_that_a_network_computes_need_no_symbols() -> None:
    """Hybrids compute sizes with Python numbers, which symbolic tracing cannot follow."""
    torch.manual_seed(0)
    network = shake_norms(timm.create_model("mobilevit_xxs", pretrained=False))
    x = images(64, torch.float32)
    with torch.no_grad():
        expected = network(x)
        found = fold_batch_norms(network, x)
        assert relative_error(expected, network(x)) < 1e-4
    assert found.count(None) == 0
