# SPDX-License-Identifier: Apache-2.0
from __future__ import annotations

import copy
import functools
import json
from collections.abc import Callable

import pytest
import timm
import torch
from torch import Tensor, nn

from affect.compression.base import Data, run_chain
from affect.compression.layers import CompressedConv2d
from affect.compression.pruning import (
    CRITERIA,
    PruningGraph,
    SInGE,
    ablations,
    gated,
    integrated_gradients,
    path_nodes,
    relevance,
    select_units,
)
from affect.compression.structure import apply_structure, structure
from affect.errors import ConfigError
from tests.compression.digits import Task, kept_by_budget

pytest.importorskip("torch_pruning")


@functools.cache
def trained() -> Task:
    return Task()


def task() -> Task:
    return copy.deepcopy(trained())


# ------------------------------------------------------------------------------------------------------ relevance


@pytest.mark.parametrize("group", ["conv1", "fc"])
def test_integrated_gradients_add_up_to_what_removal_changes(group: str) -> None:
    one = task()
    chosen = one.graph().groups[group]
    truth = ablations(one.network, chosen, one.losses, batches=1)
    found = integrated_gradients(one.network, chosen, one.losses, "exact", steps=16, batches=1).mean(0)
    torch.testing.assert_close(found, truth, rtol=0.01, atol=0.01 * float(truth.abs().mean()))
    # One point on the way is not enough, and the geometric path leaves its last piece out.
    coarse = integrated_gradients(one.network, chosen, one.losses, "exact", steps=1, batches=1).mean(0)
    assert float((coarse - truth).abs().mean()) > 10 * float((found - truth).abs().mean())
    geometric = integrated_gradients(
        one.network, chosen, one.losses, "exact", steps=16, path="geometric", batches=1
    ).mean(0)
    torch.testing.assert_close(geometric, truth, rtol=0.05, atol=0.02 * float(truth.abs().mean()))


def test_paths_cover_what_they_say() -> None:
    assert sum(width for _, width in path_nodes(7)) == pytest.approx(1)
    assert sum(width for _, width in path_nodes(5, "geometric", 0.7)) == pytest.approx(1 - 0.7**5)
    assert all(0 < position < 1 for position, _ in path_nodes(5, "geometric", 0.7) + path_nodes(3))


def test_gates_at_zero_are_the_network_without_the_units() -> None:
    one = task()
    graph = one.graph()
    removed = {"conv1": torch.tensor([0, 5]), "conv2": torch.tensor([3]), "fc": torch.tensor([1, 2, 20])}
    gates = {n: torch.ones(len(g)).index_fill(0, removed[n], 0) for n, g in graph.groups.items()}
    with torch.no_grad(), gated(one.network, graph.groups.values(), gates):
        expected = one.network(one.images[:9])
    graph.prune(removed)
    torch.testing.assert_close(one.network(one.images[:9]), expected)
    assert (one.network.conv1.out_channels, one.network.conv2.in_channels) == (6, 6)
    assert one.network.fc.in_features == 16 * 7


@pytest.mark.parametrize("mode", ["exact", "layer"])
def test_units_that_nobody_reads_and_twins(mode: str) -> None:
    one = task()
    with torch.no_grad():
        one.network.conv2.weight[:, 3] = 0
        for tensor in (one.network.conv1.weight, one.network.conv1.bias):
            tensor[6] = tensor[1]
        one.network.conv2.weight[:, 6] = one.network.conv2.weight[:, 1]
    graph = one.graph()
    for criterion in ("singe", "taylor"):
        found = relevance(graph, one.losses, criterion, mode, batches=2)["conv1"]
        assert float(found[3]) == 0
        assert float(found[6]) == pytest.approx(float(found[1]), rel=1e-4)
        assert float(found[[0, 1, 2, 4, 5, 7]].min()) > 0


def ranks(x: Tensor) -> Tensor:
    return x.argsort().argsort().double()


def correlation(x: Tensor, y: Tensor) -> float:
    return float(torch.corrcoef(torch.stack([ranks(x), ranks(y)]))[0, 1])


def test_complete_relevance_ranks_as_removal_does_and_the_layer_path_comes_close() -> None:
    one = task()
    graph = one.graph()
    truth = ablations(one.network, graph.groups["fc"], one.losses, batches=1).abs()

    def found(criterion: str, mode: str = "exact") -> float:
        return correlation(relevance(graph, one.losses, criterion, mode, absolute="mean", batches=1)["fc"], truth)

    assert found("singe") > 0.99
    assert found("singe", "layer") > 0.3
    assert found("singe") > max(found("taylor"), found("l2"))


# ------------------------------------------------------------------------------------------------------ selection


@functools.cache
def seeded(seed: int) -> Task:
    return Task(seed, steps=120)


@pytest.mark.slow
def test_relevance_compares_channels_of_all_layers_and_magnitude_does_not() -> None:
    """What holds of the claim that relevance beats magnitude; README.md has the numbers of more networks."""
    found: dict[tuple[str, str], list[float]] = {}
    for one in map(seeded, (1, 2, 3)):
        graph = one.graph()
        for criterion in ("singe", "l2"):
            scores = relevance(graph, one.losses, criterion, "exact", steps=4)
            for normalise in ("none", "cost", "mean"):
                found.setdefault((criterion, normalise), []).append(kept_by_budget(one, graph, scores, normalise))
    for relevant, magnitude in zip(found["singe", "none"], found["l2", "none"], strict=True):
        assert relevant > magnitude + 0.2
    mean = {key: sum(values) / 3 for key, values in found.items()}
    assert mean["singe", "cost"] > mean["l2", "cost"] - 0.05  # a tie where both are divided by what a channel saves
    assert mean["singe", "cost"] > mean["singe", "mean"]
    assert mean["l2", "cost"] > mean["l2", "mean"]


@pytest.mark.slow
def test_pruning_in_small_steps_is_no_worse_than_at_once() -> None:
    def pruned(rounds: int, tune: int, final: int, seed: int) -> float:
        one = copy.deepcopy(seeded(seed))
        SInGE(0.7, rounds=rounds, tune_steps=tune, final_steps=final)(one.network, one.data())
        return one.accuracy()

    entwined = sum(pruned(5, 16, 40, seed) for seed in (1, 2, 3))
    assert entwined >= sum(pruned(1, 0, 120, seed) for seed in (1, 2, 3)) - 0.01 * 3


@pytest.mark.parametrize("budget", ["macs", "parameters", "channels"])
@pytest.mark.parametrize("normalise", ["mean", "cost", "none"])
def test_budgets_are_met_with_as_few_units_as_need_be(budget: str, normalise: str) -> None:
    one = task()
    graph = one.graph()
    costs = graph.layer_costs(budget)
    target = 0.6 * sum(costs.values())
    scores = relevance(graph, one.losses, "taylor")
    removed = select_units(graph, scores, target, budget, normalise)
    counts = {name: len(units) for name, units in removed.items()}
    promised = graph.cost_after(costs, counts, budget != "channels")
    assert promised <= target
    graph.prune(removed)
    assert sum(one.graph().layer_costs(budget).values()) == pytest.approx(promised)
    assert promised > target - 0.12 * sum(costs.values())


def test_sizes_are_rounded_and_no_layer_goes() -> None:
    one = task()
    graph = one.graph()
    scores = {name: torch.arange(len(group)).float() for name, group in graph.groups.items()}
    removed = select_units(graph, scores, 0.5 * sum(graph.layer_costs("macs").values()), round_to=4)
    assert {len(group) - len(removed.get(n, ())) for n, group in graph.groups.items()} <= {4, 8, 12, 16, 20, 24}
    for name, units in removed.items():
        assert sorted(units.tolist()) == list(range(len(units))), f"{name}: not the least relevant ones"
    everything = select_units(graph, scores, 0, most=0.75)
    assert {n: len(group) - len(everything[n]) for n, group in graph.groups.items()} == {
        "conv1": 2,
        "conv2": 2,
        "fc": 6,
    }


@pytest.mark.parametrize("criterion", CRITERIA)
def test_every_criterion_scores_every_unit(criterion: str) -> None:
    one = task()
    graph = one.graph()
    before = copy.deepcopy(one.network.state_dict())
    scores = relevance(graph, one.losses, criterion, batches=1, steps=2)
    assert {n: len(s) for n, s in scores.items()} == {"conv1": 8, "conv2": 8, "fc": 24}
    assert all(bool((s >= 0).all()) and float(s.sum()) > 0 for s in scores.values())
    assert all(torch.equal(value, before[key]) for key, value in one.network.state_dict().items())
    assert all(p.grad is None or not p.grad.any() for p in copy.deepcopy(one.network).parameters())


# ------------------------------------------------------------------------------------------------------- networks


def pruned_and_rebuilt(network: nn.Module, image: Tensor, heads: str = "dims") -> tuple[nn.Module, nn.Module]:
    original = copy.deepcopy(network)
    ratio = 0.3 if heads == "none" else 0.5
    method = SInGE(ratio, "parameters", "l2", rounds=2, tune_steps=0, final_steps=0, heads=heads)
    report = run_chain(network, [method], Data(), image).reports[0]
    assert ratio <= report.totals["removed"] < ratio + 0.06
    fresh = copy.deepcopy(original)
    apply_structure(fresh, json.loads(json.dumps(structure(original, network))), network.state_dict(), "config.yaml")
    fresh.load_state_dict(network.state_dict())
    assert torch.equal(fresh.eval()(image), network(image))
    for one in fresh.modules():
        if hasattr(one, "fused_attn"):
            one.fused_attn = not one.fused_attn
    torch.testing.assert_close(fresh(image), network(image), rtol=1e-4, atol=1e-5)
    assert network(image).shape == original(image).shape
    return original, network


def vit(**settings: object) -> nn.Module:
    return timm.models.VisionTransformer(
        img_size=32, patch_size=8, embed_dim=24, depth=2, num_heads=3, num_classes=0, **settings
    ).eval()


@pytest.mark.parametrize(
    "name",
    [
        "resnet18",
        "mobilenetv3_small_050",
        "efficientnet_lite0",
        "regnetx_002",
        pytest.param("densenet121", marks=pytest.mark.slow),
        pytest.param("convnext_atto", marks=pytest.mark.slow),
        pytest.param("vit_tiny_patch16_224", marks=pytest.mark.slow),
        pytest.param("swin_tiny_patch4_window7_224", marks=pytest.mark.slow),
    ],
)
def test_networks_of_timm_shrink_and_are_rebuilt_from_plain_data(name: str) -> None:
    torch.manual_seed(0)
    size = {"img_size": 64} if "224" in name else {}
    network = timm.create_model(name, pretrained=False, num_classes=0, **size).eval().requires_grad_(False)
    _, small = pruned_and_rebuilt(network, torch.randn(1, 3, 64, 64))
    assert not any(p.requires_grad for p in small.parameters() if p.is_leaf and p.grad is not None)


@pytest.mark.parametrize(("heads", "expected"), [("dims", 3), ("whole", None), ("none", 3)])
def test_transformers_lose_dimensions_of_heads_or_heads(heads: str, expected: int | None) -> None:
    torch.manual_seed(0)
    network = vit(qkv_bias=True)
    _, small = pruned_and_rebuilt(network, torch.randn(2, 3, 32, 32), heads)
    attention = [block.attn for block in small.blocks]
    assert all(a.qkv.out_features == 3 * a.num_heads * a.head_dim for a in attention)
    assert all(a.fused_attn is vit().blocks[0].attn.fused_attn for a in attention)
    if expected:
        assert [a.num_heads for a in attention] == [expected, expected]
    else:
        assert {a.head_dim for a in attention} == {8}
        assert min(a.num_heads for a in attention) < 3
    assert (attention[0].qkv.out_features == 72) == (heads == "none")


@pytest.mark.parametrize("heads", ["dims", "whole"])
def test_gates_of_attention_are_its_removal(heads: str) -> None:
    torch.manual_seed(0)
    network, image = vit(), torch.randn(2, 3, 32, 32)
    graph = PruningGraph(network, image, heads=heads)
    name = "blocks.1.attn.qkv"
    gate = torch.ones(len(graph.groups[name])).index_fill(0, torch.tensor([1]), 0)
    with torch.no_grad(), gated(network, [graph.groups[name]], {name: gate}):
        expected = network(image)
    graph.prune({name: torch.tensor([1])})
    torch.testing.assert_close(network(image), expected, rtol=1e-4, atol=1e-5)
    for block in network.blocks:
        block.attn.fused_attn = not block.attn.fused_attn
    torch.testing.assert_close(network(image), expected, rtol=1e-4, atol=1e-5)


def test_protected_layers_and_the_output_stay() -> None:
    one = task()
    graph = PruningGraph(one.network, one.images[:1], protect=["conv2"])
    assert set(graph.groups) == {"fc"}
    assert graph.left == {
        "conv1": "conv2 is protected",
        "conv2": "conv2 is protected",
        "out": "makes the output of the network",
    }


class Ghost(nn.Module):
    """Concatenates what a layer makes with what another makes of that, and adds the input."""

    def __init__(self, made: int = 3, kept: int = 6) -> None:
        super().__init__()
        self.first, self.made = nn.Conv2d(3, kept, 1), nn.Conv2d(kept, made, 1)
        self.cheap, self.last = nn.Conv2d(made, made, 3, padding=1, groups=made), nn.Conv2d(kept, 2, 1)

    def forward(self, x: Tensor) -> Tensor:
        x = self.first(x)
        made = self.made(x).relu()
        return self.last((x + torch.cat([made, self.cheap(made)], 1)[:, : x.shape[1]]).relu())


def test_channels_of_one_layer_that_go_together_are_one_unit() -> None:
    network, images = Ghost().eval(), torch.rand(2, 3, 5, 5)
    graph = PruningGraph(network, images)
    (group,) = graph.groups.values()
    assert group.units.tolist() == [[0, 3], [1, 4], [2, 5]]
    assert group.outputs == {"first": 2, "made": 1, "cheap": 1}
    with torch.no_grad(), gated(network, [group], {group.name: torch.tensor([1.0, 0.0, 1.0])}):
        expected = network(images)
    graph.prune({group.name: torch.tensor([1])})
    torch.testing.assert_close(network(images), expected)


def test_channels_that_go_in_sets_of_different_sizes_stay() -> None:
    graph = PruningGraph(Ghost(3, 5).eval(), torch.rand(1, 3, 5, 5))
    assert not graph.groups
    assert "first stays" in graph.notes[0].replace(" and what goes with it", "")


class Partial(nn.Module):
    """Convolves a part of the channels and leaves the others, as FasterNet does."""

    def __init__(self) -> None:
        super().__init__()
        self.first, self.part = nn.Conv2d(3, 8, 1), nn.Conv2d(2, 2, 3, padding=1)
        self.wide, self.narrow, self.last = nn.Conv2d(8, 12, 1), nn.Conv2d(12, 8, 1), nn.Conv2d(8, 2, 1)

    def forward(self, x: Tensor) -> Tensor:
        x = self.first(x)
        part, rest = torch.split(x, [2, 6], 1)
        x = x + self.narrow(self.wide(torch.cat([self.part(part), rest], 1)).relu())
        return self.last(x)


@pytest.mark.parametrize("criterion", ["singe", "l2"])
def test_groups_that_torch_pruning_misreads_stay_and_are_told(criterion: str) -> None:
    network, images = Partial().eval(), torch.rand(2, 3, 5, 5)
    data = Data(example=images, losses=lambda: iter([network(images).square().mean()]))
    report = SInGE(0.2, criterion=criterion, rounds=1, tune_steps=0, final_steps=0)(network, data)
    assert (network.wide.out_channels, network.first.out_channels) != (12, 8)
    assert network.wide.out_channels < 12
    assert network.first.out_channels == 8
    assert any("part channels beyond the 2 that it has" in note for note in report.notes)


# --------------------------------------------------------------------------------------------------------- errors


def test_what_cannot_be_pruned_is_told() -> None:
    one = task()
    report = SInGE(0.999, criterion="l1", rounds=1, tune_steps=0, final_steps=0)(one.network, one.data())
    assert "cannot be removed" in report.notes[0]
    with pytest.raises(ConfigError, match=r"no channels can be removed .*: 0 "):
        SInGE(criterion="l1", rounds=1)(nn.Sequential(nn.Conv2d(1, 4, 3)), one.data())
    one.network.conv1 = CompressedConv2d.of(one.network.conv1)
    with pytest.raises(ConfigError, match="conv1: is compressed already"):
        one.graph()


class Ragged(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.first, self.last = nn.Conv2d(1, 8, 1), nn.Conv2d(8, 2, 1)
        self.scale: Callable[[], Tensor] = lambda: torch.ones(8, 1, 1)

    def forward(self, x: Tensor) -> Tensor:
        return self.last(self.first(x) * self.scale())


def test_a_network_that_torch_pruning_misreads_names_a_layer() -> None:
    network = Ragged().eval()
    with pytest.raises(ConfigError, match=r"first is the first of 2 layers that changed.*protect="):
        SInGE(criterion="l2", rounds=1, tune_steps=0, final_steps=0)(network, Data(example=torch.zeros(1, 1, 4, 4)))


class Odd(nn.Module):
    def forward(self, x: Tensor) -> Tensor:
        return x + torch.from_numpy(x.detach().numpy() > x.numpy())  # what needs a gradient has no array


@pytest.mark.parametrize("fails", ["Graph", "Removal"])
def test_a_network_that_cannot_be_followed_names_the_place(fails: str, monkeypatch: pytest.MonkeyPatch) -> None:
    import torch_pruning

    odd = nn.Sequential(nn.Identity(), Odd()) if fails == "Graph" else nn.Sequential(nn.Identity())
    network = nn.Sequential(nn.Conv2d(3, 8, 3), nn.ReLU(), odd, nn.Conv2d(8, 4, 3)).eval()
    if fails == "Graph":
        with pytest.raises(ConfigError, match=r"^2\.1: torch-pruning cannot follow this network: .*numpy"):
            PruningGraph(network, torch.zeros(1, 3, 12, 12))
    else:
        graph = PruningGraph(network, torch.zeros(1, 3, 12, 12))

        def broken(*_: object) -> None:
            raise IndexError("7 is out of range")

        monkeypatch.setattr(torch_pruning.DependencyGraph, "get_pruning_group", broken)
        with pytest.raises(ConfigError, match=r"^0: torch-pruning cannot remove its channels \(7 is out.*protect="):
            graph.prune({"0": torch.tensor([1])})
    assert not any(module._forward_pre_hooks for module in network.modules())


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"ratio": 1.5}, r"singe\.ratio=1\.5: a part"),
        ({"criterion": "singer"}, "criterion=singer.*singe"),
        ({"rounds": 0}, "rounds=0: at least 1"),
        ({"heads": "all"}, "heads=all"),
    ],
)
def test_settings_are_checked(settings: dict, message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        SInGE(**settings)


def test_needs_follow_from_settings() -> None:
    assert SInGE().needs == ("losses", "train")
    assert SInGE(criterion="l2", tune_steps=0, final_steps=0).needs == ()
