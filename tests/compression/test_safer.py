# SPDX-License-Identifier: Apache-2.0
from __future__ import annotations

import copy
import functools
import itertools
import json
import math
from collections.abc import Iterator

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from affect.compression.base import Data, quantizable, relative_error, run_chain
from affect.compression.folding import BatchNormFolding
from affect.compression.layers import CompressedConv2d, CompressedLinear
from affect.compression.rounding import AdaRound
from affect.compression.safer import (
    CRITERIA,
    FAMILIES,
    SAfER,
    allocate,
    changed,
    correlations,
    criterion_scores,
    integrated_gradients,
    mean_loss,
    measured_sensitivity,
    perturbed,
)
from affect.compression.spiq import SPIQ
from affect.compression.structure import apply_structure, structure
from affect.compression.uniform import UniformQuantization, round_to_grid
from affect.errors import ConfigError
from tests.compression.digits import Task, digits
from tests.compression.networks import FaceNet

FUNCTION = ("loss", "output", "gradient_weight", "integrated_gradients", "fisher", "hessian")
"""Criteria that are the same for networks that compute the same."""


class Planted(nn.Module):
    """A network with a layer that hardly matters: it is added after a factor of almost 0."""

    def __init__(self) -> None:
        super().__init__()
        self.one, self.dead, self.two, self.three = (
            nn.Linear(*sizes) for sizes in ((64, 32), (32, 32), (32, 32), (32, 16))
        )

    def forward(self, x: Tensor) -> Tensor:
        x = F.relu(self.one(x.flatten(1)))
        x = x + 1e-4 * F.relu(self.dead(x))
        return F.relu(self.three(F.relu(self.two(x))))


class PlantedTask(Task):
    """The planted network on the digits."""

    def __init__(self, seed: int = 0, steps: int = 150) -> None:
        torch.manual_seed(seed)
        self.network, self.head = Planted(), nn.Linear(16, 10)
        self.images, self.labels = digits()
        self.generator = torch.Generator().manual_seed(seed)
        self.train(steps, 3e-3)

    def data(self) -> Data:
        return Data([self.images[:128], self.images[128:256]], losses=self.losses, example=self.images[:1])


@functools.cache
def trained() -> PlantedTask:
    return PlantedTask()


@functools.cache
def of_digits(seed: int) -> Task:
    return Task(seed, steps=150)


def data_of(task: Task) -> Data:
    return Data([task.images[:128], task.images[128:256]], losses=task.losses, example=task.images[:1])


def draws(seed: int = 0) -> torch.Generator:
    return torch.Generator().manual_seed(seed)


# ----------------------------------------------------------------------------------------------------- perturbations


def test_changes_are_what_they_say() -> None:
    weight = torch.randn(40, 5, 3, 3, generator=draws())
    before = weight.clone()
    assert relative_error(weight, perturbed(weight, "noise", 0.1, draws())) == pytest.approx(0.1, rel=0.05)
    assert torch.equal(perturbed(weight, "grid", 3), round_to_grid(weight, 3)())
    gone = perturbed(weight, "channels", 0.2, draws())
    kept = gone.flatten(1).abs().amax(1) > 0
    assert int(kept.sum()) == 32
    assert torch.equal(gone[kept], weight[kept])
    for family in ("noise", "channels", "flips", "float_flips"):
        found = [perturbed(weight, family, 0.01, draws(seed)).view(torch.int32) for seed in (1, 1, 2)]
        assert torch.equal(found[0], found[1])
        assert not torch.equal(found[0], found[2])
    assert torch.equal(weight, before)


def bits_of(numbers: Tensor, bits: int) -> Tensor:
    return (numbers.to(torch.int64)[..., None] >> torch.arange(bits)) & 1


@pytest.mark.parametrize(("family", "bits"), [("flips", 8), ("float_flips", 32)])
def test_flips_invert_single_bits(family: str, bits: int) -> None:
    weight = torch.randn(20, 30, generator=draws())
    for rate in (0.0, 1e-3, 0.02):
        moved = perturbed(weight, family, rate, draws(3))
        if family == "flips":
            step = weight.abs().amax(1, keepdim=True) / 127
            codes = [(one / step).round() for one in (weight, moved)]
            torch.testing.assert_close(moved, codes[1] * step)
            assert -128 <= float(codes[1].min()) <= float(codes[1].max()) <= 127
        else:
            codes = [one.contiguous().view(torch.int32) for one in (weight, moved)]
        count = int((bits_of(codes[0], bits) != bits_of(codes[1], bits)).sum())
        wanted = max(1, round(rate * bits * 600))
        assert 0.95 * wanted - 1 <= count <= wanted  # a bit that is drawn twice counts once


def test_a_float_that_becomes_infinite_is_the_worst_case_and_not_the_median() -> None:
    one = trained()
    layers = quantizable(one.network)
    found = measured_sensitivity(layers, lambda: -mean_loss(one.losses), "float_flips", 1e-4, draws=5)
    assert all(s.worst >= s.median for s in found.values())
    assert max(s.worst for s in found.values()) > 10 * max(s.median for s in found.values())
    codes = measured_sensitivity(layers, lambda: -mean_loss(one.losses), "flips", 1e-4, draws=5)
    assert all(math.isfinite(s.worst) for s in codes.values())
    empty = measured_sensitivity({"one": one.network.one}, lambda: float("nan"), "noise", draws=1)
    assert empty["one"].median == math.inf


# ---------------------------------------------------------------------------------------------------------- criteria


def test_attribution_of_a_layer_adds_up_to_what_its_removal_changes() -> None:
    one = of_digits(0)
    layer = one.network.fc
    found = integrated_gradients(layer, one.losses, steps=32, batches=1)
    whole = mean_loss(one.losses, 1)
    with changed(layer, torch.zeros_like(layer.weight)):
        truth = whole - mean_loss(one.losses, 1)
    assert float(found.sum()) == pytest.approx(truth, rel=0.01)


def test_local_criteria_are_their_closed_forms() -> None:
    torch.manual_seed(0)
    layer = nn.Linear(6, 1, bias=False)
    curvature = torch.tensor([3.0, 0.5, 2.0, 1.0, 0.0, 4.0])

    def losses() -> Iterator[Tensor]:
        for scale in (1.0, 2.0):
            yield scale / 2 * (curvature * layer.weight[0].square()).sum()

    w = layer.weight.detach()[0]
    network = nn.Sequential(layer)
    mean = float(w.square().mean())
    expected = {
        "gradient": 1.5 * float((curvature * w).abs().mean()),
        "gradient_weight": 1.5 * float((curvature * w * w).abs().sum()),
        "integrated_gradients": 0.75 * float((curvature * w * w).abs().sum()),
        "fisher": 2.5 * float((curvature * w).square().sum()) * mean,
        "hessian": 1.5 * float(curvature.sum()) * mean,  # exact for every draw: the Hessian is diagonal
        "magnitude": float(w.norm()),
        "size": 1 / 6,
        "depth": 1.0,
    }
    for name, value in expected.items():
        found = criterion_scores(network, {"0": layer}, name, Data(losses=losses), samples=2)
        assert found["0"] == pytest.approx(value, rel=1e-5), name
    assert layer.weight.grad is None


@pytest.mark.parametrize("criterion", FUNCTION)
def test_a_layer_that_hardly_matters_has_the_lowest_score(criterion: str) -> None:
    one = trained()
    # Rounding to many bits can lower a loss by chance; rounding to 2 does not.
    scores = criterion_scores(one.network, quantizable(one.network), criterion, one.data(), batches=2, bits=2)
    others = [score for name, score in scores.items() if name != "dead"]
    assert abs(scores["dead"]) < 0.1 * min(others)


def scaled(network: Planted, factor: float = 10.0) -> Planted:
    """Return a network that computes the same with the weights of one layer larger and those of the next smaller."""
    other = copy.deepcopy(network)
    with torch.no_grad():
        other.two.weight.mul_(factor)
        other.two.bias.mul_(factor)
        other.three.weight.div_(factor)
    return other


def test_scaling_that_cancels_moves_norms_and_no_criterion_of_the_function() -> None:
    one = trained()
    before = one.network
    found: dict[str, list[dict[str, float]]] = {}
    for network in (before, scaled(before)):
        one.network = network
        try:
            for criterion in (*FUNCTION, "magnitude", "gradient"):
                scores = criterion_scores(network, quantizable(network), criterion, one.data(), batches=2)
                found.setdefault(criterion, []).append(scores)
        finally:
            one.network = before
    for criterion in FUNCTION:
        first, second = found[criterion]
        # Small changes of the loss or the output are differences of large numbers.
        assert second == pytest.approx(first, rel=2e-3, abs=1e-4 if criterion == "loss" else 1e-6), criterion
        order = [sorted(one, key=lambda name: one[name]) for one in (first, second)]
        assert order[0] == order[1]
    for criterion in ("magnitude", "gradient"):
        orders = [sorted(one, key=lambda name: one[name]) for one in found[criterion]]
        assert orders[0] != orders[1], criterion


def test_the_oracle_agrees_with_itself() -> None:
    one = trained()
    layers = quantizable(one.network)
    oracle = criterion_scores(one.network, layers, "loss", one.data(), batches=2)
    measured = measured_sensitivity(layers, lambda: -mean_loss(one.losses, 2), "grid")
    truth = {name: s.median for name, s in measured.items()}
    rows = correlations(
        {"loss": oracle, "opposite": {n: -s for n, s in oracle.items()}, "same": dict.fromkeys(oracle, 1.0)},
        {"grid": truth},
    )
    assert [row.spearman for row in rows] == [pytest.approx(1), pytest.approx(-1), None]
    assert [row.kendall for row in rows] == [pytest.approx(1), pytest.approx(-1), None]


# ------------------------------------------------------------------------------------------------------------ budget


def test_budgets_are_met_by_the_best_allocation() -> None:
    generator = draws(5)
    choices = (2, 4, 8)
    for _ in range(30):
        sizes = torch.randint(10, 200, (4,), generator=generator).tolist()
        frail = torch.rand(4, generator=generator).pow(3).tolist()
        costs = {f"l{k}": {b: float(b * n) for b in choices} for k, n in enumerate(sizes)}
        harms = {f"l{k}": {b: s * 4.0**-b for b in choices} for k, s in enumerate(frail)}
        budget = 4.0 * sum(sizes)
        chosen = allocate(costs, harms, budget)
        assert sum(costs[n][b] for n, b in chosen.items()) <= budget
        harm = sum(harms[n][b] for n, b in chosen.items())
        assert harm <= sum(own[4] for own in harms.values()) + 1e-12
        best = min(
            sum(harms[n][b] for n, b in zip(costs, bits, strict=True))
            for bits in itertools.product(choices, repeat=4)
            if sum(costs[n][b] for n, b in zip(costs, bits, strict=True)) <= budget
        )
        assert harm <= 1.01 * best


def test_options_may_be_anything_and_noise_is_no_reason_to_save() -> None:
    costs = {"a": {"whole": 10.0, "half": 5.0}, "b": {"whole": 10.0, "third": 3.3}}
    harms = {"a": {"whole": 0.0, "half": 1.0}, "b": {"whole": 0.0, "third": 5.0}}
    assert allocate(costs, harms, 15) == {"a": "half", "b": "whole"}
    assert allocate(costs, harms, 20) == {"a": "whole", "b": "whole"}
    lucky = {"a": {8: 0.0, 4: 0.3, 2: -1.0}, "b": {8: 0.0, 4: 0.1, 2: 0.2}}  # 2 bits cannot be better than 4
    prices = {name: {8: 8.0, 4: 4.0, 2: 2.0} for name in lucky}
    assert allocate(prices, lucky, 10) == {"a": 8, "b": 2}
    with pytest.raises(ConfigError, match="a budget of 3 cannot be met: the cheapest options cost 4"):
        allocate(prices, lucky, 3)


@pytest.mark.parametrize("bits", [3, 4.5])
def test_the_method_meets_its_budget_in_stored_bytes(bits: float) -> None:
    one = trained()
    network = copy.deepcopy(one.network)
    report = run_chain(network, [SAfER(bits, edge_bits=None)], one.data(), one.images[:4]).reports[0]
    held = sum(layer.stored.stored_bytes for layer in quantizable(network).values())
    assert held == report.totals["bytes"] <= report.totals["budget"]
    weights = sum(math.prod(layer.stored.shape) for layer in quantizable(network).values())
    scales = sum(4 * layer.stored.shape[0] + 4 for layer in quantizable(network).values())
    assert report.totals["budget"] == pytest.approx(weights * bits / 8 + scales, abs=4)
    assert report.totals["bytes"] > 0.9 * report.totals["budget"]
    given = {record.name: record.bits for record in report.layers}
    assert given["dead"] == min(given.values()) < max(given.values())
    fresh = copy.deepcopy(one.network)
    apply_structure(fresh, json.loads(json.dumps(structure(fresh, network))), network.state_dict(), "config.yaml")
    fresh.load_state_dict(network.state_dict())
    assert torch.equal(fresh(one.images[:4]), network(one.images[:4]))


def quantized_loss(seed: int, method: object) -> float:
    one = copy.deepcopy(of_digits(seed))
    run_chain(one.network, [method], data_of(one), one.images[:4])
    with torch.no_grad():
        return float(one.loss(torch.arange(1200, len(one.images))))


@pytest.mark.parametrize("criterion", ["output", "loss"])
def test_bits_by_sensitivity_beat_the_same_bits_for_all(criterion: str) -> None:
    """Held-out loss of networks without a planted layer, at no more bytes."""
    even = [quantized_loss(seed, UniformQuantization(3, edge_bits=None)) for seed in range(3)]
    chosen = [quantized_loss(seed, SAfER(3, criterion=criterion, edge_bits=None)) for seed in range(3)]
    print(criterion, even, chosen)
    assert sum(chosen) < sum(even)


def test_edges_and_a_budget_of_the_whole() -> None:
    one = trained()
    network = copy.deepcopy(one.network)
    report = run_chain(network, [SAfER(kilobytes=4, input_bits=8)], one.data(), one.images[:4]).reports[0]
    given = {record.name: record.bits for record in report.layers}
    assert given["one"] == given["three"] == 8
    assert {record.input_bits for record in report.layers} == {8}
    held = sum(layer.stored.stored_bytes for layer in quantizable(network).values())
    assert 3600 < held <= 4000
    assert set(report.details["sensitivity"]["output"]) == {"dead", "two"}
    with pytest.raises(ConfigError, match=r"kilobytes=3: weights take 3\.\d+ at least"):
        run_chain(copy.deepcopy(one.network), [SAfER(kilobytes=3)], one.data(), one.images[:4])


def test_layers_that_never_run_get_no_grids_for_inputs() -> None:
    one = copy.deepcopy(trained())
    one.network.unused = nn.Linear(3, 3)
    report = run_chain(one.network, [SAfER(4, input_bits=8, edge_bits=None)], one.data(), one.images[:4]).reports[0]
    given = {record.name: record.input_bits for record in report.layers}
    assert given == {"one": 8, "dead": 8, "two": 8, "three": 8, "unused": None}


def test_rounding_can_be_learned_on_the_grids_of_each_layer() -> None:
    one = trained()
    network = copy.deepcopy(one.network)
    reports = run_chain(network, [SAfER(3.5), AdaRound(steps=2)], one.data(), one.images[:4]).reports
    given, kept = ({record.name: record.bits for record in report.layers} for report in reports)
    assert given == kept
    assert len(set(given.values())) > 1


def test_all_criteria_are_compared_with_the_measured_truth() -> None:
    one = copy.deepcopy(trained())
    method = SAfER(4, compare=FAMILIES, draws=2, batches=1, steps=2, samples=1, edge_bits=None)
    assert method.needs == ("images", "losses")
    report = run_chain(one.network, [method], one.data(), one.images[:4]).reports[0]
    assert len(report.notes) == len(FAMILIES)
    for family in FAMILIES:
        assert set(report.details[f"truth {family}"]["median"]) == {"one", "dead", "two", "three"}
        assert set(report.details[f"correlation {family}"]["spearman"]) == set(CRITERIA)
    assert report.details["correlation grid"]["spearman"]["depth"] is not None
    assert all(len(scores) == 4 for scores in report.details["criteria"].values())
    json.dumps(report.plain())


# ------------------------------------------------------------------------------------------------------------ errors


def test_what_cannot_be_measured_is_told() -> None:
    one = trained()
    with pytest.raises(ConfigError, match="one: its weight is codes already"):
        run_chain(copy.deepcopy(one.network), [UniformQuantization(), SAfER()], one.data(), one.images[:4])
    network = nn.Sequential(nn.Conv2d(1, 4, 3), nn.BatchNorm2d(4), nn.ReLU(), nn.Conv2d(4, 4, 3)).eval()
    images = torch.randn(4, 1, 8, 8)
    data = Data([images], losses=lambda: iter([network(images).square().mean()]))
    with pytest.raises(ConfigError, match="0: gradients do not pass its rounded inputs"):
        run_chain(network, [SPIQ(8), SAfER(criterion="fisher")], data, images)


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"criterion": "fischer"}, r"criterion=fischer: did you mean fisher"),
        ({"compare": ["noises"]}, "did you mean noise"),
        ({"choices": [4]}, "at least two"),
        ({"choices": [1, 4]}, "choices=1: from 2 to 8"),
        ({"bits": 9}, r"bits=9: within choices=\[2, 3, 4, 5, 6, 8\]"),
        ({"kilobytes": 0}, "kilobytes=0: above 0"),
        ({"draws": 0}, "draws=0: at least 1"),
    ],
)
def test_settings_are_checked(settings: dict, message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        SAfER(**settings)


def test_needs_follow_from_settings() -> None:
    assert SAfER().needs == ("images",)
    assert SAfER(criterion="fisher").needs == ("losses",)
    assert SAfER(criterion="magnitude").needs == ()
    assert SAfER(criterion="magnitude", input_bits=8).needs == ("images",)


@pytest.mark.parametrize("before", ["spiq", "padded"])
def test_it_takes_layers_that_another_method_has_put_in_place(before: str) -> None:
    """Behind SPIQ, or where a forward fold pads with values, a layer is one of ours and loses its floats to codes."""
    torch.manual_seed(0)
    network = FaceNet().eval()
    with torch.no_grad():
        for module in network.modules():
            if isinstance(module, nn.modules.batchnorm._BatchNorm):
                module.running_mean.normal_(0, 0.2)  # type: ignore[union-attr]
                module.running_var.uniform_(0.5, 1.5)  # type: ignore[union-attr]
    images = torch.randn(4, 3, 32, 32)
    chain: list = [BatchNormFolding(), *([SPIQ(8)] if before == "spiq" else []), SAfER(bits=4)]
    report = run_chain(network, chain, Data(images=[images]), images).reports[-1]
    assert report.totals["bytes"] <= report.totals["budget"]
    layers = [layer for layer in network.modules() if isinstance(layer, CompressedConv2d | CompressedLinear)]
    assert layers
    assert all(layer.stored is not None for layer in layers)
