# SPDX-License-Identifier: Apache-2.0
from __future__ import annotations

import copy

import pytest
import torch
from sklearn.datasets import load_digits
from torch import Tensor, nn

from affect.compression.base import Chain, Data, check_order, run_chain
from affect.compression.power import PowerQuantization, power_grid
from affect.compression.residual import ResidualExpansion
from affect.compression.rounding import (
    AdaRound,
    LearnedCodes,
    LearnedRounding,
    block_of,
    continuous_codes,
    distance,
    float_copy,
    order_of_use,
    output_weights,
    power_decode,
    units,
)
from affect.compression.stored import GridWeight
from affect.compression.structure import apply_structure, structure
from affect.compression.ternary import MassQuantization
from affect.compression.uniform import UniformQuantization, round_to_grid
from affect.errors import ConfigError


class Block(nn.Module):
    def __init__(self, width: int) -> None:
        super().__init__()
        self.second = nn.Conv2d(width, width, 3, padding=1)
        self.first = nn.Conv2d(width, width, 3, padding=1)

    def forward(self, x: Tensor) -> Tensor:
        return x + self.second(self.first(x).relu()).relu()


class Net(nn.Module):
    def __init__(self, classes: int = 6, width: int = 8) -> None:
        super().__init__()
        self.stem = nn.Conv2d(3, width, 3, padding=1)
        self.blocks = nn.Sequential(Block(width), nn.Sequential(Block(width)))
        self.head = nn.Linear(width, classes)
        self.unused = nn.Linear(2, 2)

    def forward(self, x: Tensor) -> Tensor:
        return self.head(self.blocks(self.stem(x).relu()).mean((2, 3)))


@pytest.fixture
def network() -> Net:
    torch.manual_seed(0)
    return Net().eval()


def drawn(seed: int, count: int = 48) -> Tensor:
    """Smooth images: neighbouring inputs go together, as in photographs, so that errors of weights can cancel."""
    noise = torch.randn(count, 3, 12, 12, generator=torch.Generator().manual_seed(seed))
    return nn.functional.avg_pool2d(noise, 3, 1, 1) * 2 + 0.5


def run(network: nn.Module, transforms: list, images: Tensor, **data: object) -> tuple[nn.Module, Chain]:
    changed = copy.deepcopy(network)
    return changed, run_chain(changed, transforms, Data(images=images.split(16), **data), images)  # type: ignore[arg-type]


def mean_error(network: nn.Module, other: nn.Module, images: Tensor) -> float:
    with torch.no_grad():
        return float((network(images) - other(images)).square().mean())


QUICK = {"bits": 3, "steps": 250, "batch_size": 16, "rate": 3e-2, "edge_bits": None}


def test_learned_rounding_beats_nearest_on_calibration_and_other_images(network: Net) -> None:
    learned, chain = run(network, [AdaRound(**QUICK)], drawn(0))
    nearest, _ = run(network, [UniformQuantization(bits=3, edge_bits=None)], drawn(0))
    for images in (drawn(0), drawn(1)):
        assert mean_error(network, learned, images) < 0.7 * mean_error(network, nearest, images)
    report = chain.reports[0]
    assert [record.name for record in report.layers][-1] == "unused"
    assert "never runs" in report.layers[-1].note
    assert report.totals["moved"] > 0.01
    assert torch.equal(learned.unused.stored(), nearest.unused.stored())


@pytest.mark.slow
def test_all_offsets_settle_and_stay_soft_without_the_pull(network: Net) -> None:
    undecided = []
    for strength in (1e-2, 0.0):
        settings = {**QUICK, "strength": strength, "steps": 700}
        small = nn.Sequential(copy.deepcopy(network.stem), nn.ReLU(), copy.deepcopy(network.blocks[0].first)).eval()
        undecided.append(run(small, [AdaRound(**settings)], drawn(0))[1].reports[0].totals["undecided"])
    assert undecided[0] < 0.01
    assert undecided[1] > 0.3


def test_codes_are_the_floor_or_one_more(network: Net) -> None:
    learned, _ = run(network, [AdaRound(**QUICK)], drawn(0))
    weight = network.blocks[0].first.weight.detach()
    stored = learned.blocks[0].first.stored
    exact = weight / stored.largest.view(-1, 1, 1, 1) * 3
    steps = stored.integers() - exact.floor()
    assert set(steps.clamp(0, 1).flatten().tolist()) == {0, 1}
    assert bool(((steps == 0) | (steps == 1) | (exact.abs() > 3 - 1e-5)).all())


def test_rounding_begins_at_the_floats() -> None:
    weight = torch.randn(4, 5, generator=torch.Generator().manual_seed(0))
    for exponent in (1.0, 0.5):
        grid = power_grid(weight, 4, exponent)
        for kind in (LearnedRounding, LearnedCodes):
            learner = kind(weight, grid)
            assert torch.equal(learner.hard_codes().long(), grid.integers().long())
            torch.testing.assert_close(learner.frozen()(), grid())
        torch.testing.assert_close(LearnedRounding(weight, grid)(), weight, rtol=1e-4, atol=1e-5)


def test_decoding_has_the_derivatives_of_its_formula() -> None:
    codes = torch.tensor([[-7.0, -3.0, 1.0], [2.0, 5.0, 7.0]], dtype=torch.float64, requires_grad=True)
    exponent = torch.tensor(0.6, dtype=torch.float64, requires_grad=True)
    largest = torch.tensor([[0.3], [2.0]], dtype=torch.float64, requires_grad=True)
    assert torch.autograd.gradcheck(lambda q, a, m: power_decode(q, a, m, 7), (codes, exponent, largest))
    for a in (0.3, 1.0, 1.5):
        zero = torch.zeros(1, requires_grad=True)
        exponent = torch.tensor(a, requires_grad=True)
        power_decode(zero, exponent, torch.ones(1), 7).sum().backward()
        assert 0 < float(zero.grad) < 10
        assert float(exponent.grad) == 0
        weight = torch.tensor([0.0, 0.5])
        codes = continuous_codes(weight, exponent, torch.ones(1), 7)
        assert bool(torch.autograd.grad(codes.sum(), exponent)[0].isfinite())


@pytest.mark.parametrize(
    "choice",
    [
        {"variable": "codes"},
        {"variable": "all"},
        {"grid": "power"},
        {"loss": "cosine"},
        {"loss": "gradient"},
        pytest.param({"loss": "kl"}, marks=pytest.mark.slow),
        {"unit": "block"},
        {"inputs": "float"},
        {"inputs": "mix"},
        pytest.param({"optimizer": "adamw"}, marks=pytest.mark.slow),
        {"optimizer": "sgd", "rate": 1.0},
    ],
    ids=lambda choice: "-".join(map(str, next(iter(choice.items())))),
)
def test_every_choice_answers_better_than_nearest_rounding_and_is_described(choice: dict, network: Net) -> None:
    images = drawn(0)
    labels = torch.randint(6, (len(images),), generator=torch.Generator().manual_seed(3))
    transform = AdaRound(**{**QUICK, "steps": 120, **choice})
    changed = copy.deepcopy(network)

    def losses() -> list[Tensor]:
        return [nn.functional.cross_entropy(changed(images[:16]), labels[:16])]

    before = copy.deepcopy(network)
    grid = PowerQuantization if choice.get("grid") == "power" else UniformQuantization
    run_chain(before, [grid(bits=3, edge_bits=None)], Data(), images)
    run_chain(changed, [transform], Data(images=images.split(16), losses=losses), images)
    kind = choice["loss"] if choice.get("loss") in ("kl", "cosine") else "mse"
    with torch.no_grad():
        assert distance(kind, changed(images), network(images)) < distance(kind, before(images), network(images))
    assert not any(parameter.grad is not None for parameter in changed.parameters())
    fresh, state = copy.deepcopy(network), changed.state_dict()
    apply_structure(fresh, structure(network, changed), state, "config.yaml")
    fresh.load_state_dict(state)
    assert torch.equal(fresh(images), changed(images))


@pytest.mark.parametrize(
    "first",
    [
        UniformQuantization(bits=3, input_bits=8, edge_bits=None),
        PowerQuantization(bits=3, edge_bits=None),
        MassQuantization(edge_bits=None),
    ],
)
def test_codes_of_other_methods_are_refined_on_their_grid(first: object, network: Net) -> None:
    images = drawn(0)
    alone, _ = run(network, [first], images)
    both, chain = run(network, [first, AdaRound(**{**QUICK, "steps": 120}), ResidualExpansion(bits=3)], images)
    assert chain.errors[2] < chain.errors[1] < chain.errors[0]
    layer = both.blocks[0].first
    assert float(layer.stored.orders[0].exponent) == float(alone.blocks[0].first.stored.exponent)
    assert torch.equal(layer.stored.orders[0].largest, alone.blocks[0].first.stored.largest)
    assert (layer.inputs is None) is (alone.blocks[0].first.inputs is None)


def test_same_seed_same_codes(network: Net) -> None:
    settings = {**QUICK, "steps": 20, "inputs": "mix"}
    found = [run(network, [AdaRound(**settings)], drawn(0), seed=seed)[0](drawn(1)) for seed in (0, 0, 1)]
    assert torch.equal(found[0], found[1])
    assert not torch.equal(found[0], found[2])


def test_layers_of_blocks_and_their_order(network: Net) -> None:
    names = [name for name, layer in network.named_modules() if isinstance(layer, nn.Conv2d | nn.Linear)]
    assert block_of(network, "blocks.0.second") == "blocks.0"
    assert block_of(network, "blocks.1.0.first") == "blocks.1.0"
    assert block_of(network, "stem") == "stem"
    used = order_of_use(network, names, drawn(0, 1))
    assert used == ["stem", "blocks.0.first", "blocks.0.second", "blocks.1.0.first", "blocks.1.0.second", "head"]
    assert list(units(network, used, "block")) == ["stem", "blocks.0", "blocks.1.0", "head"]


def test_the_teacher_is_the_float_network_again(network: Net) -> None:
    changed, _ = run(network, [UniformQuantization(bits=3, input_bits=4)], drawn(0))
    torch.testing.assert_close(float_copy(changed)(drawn(1)), network(drawn(1)))
    assert changed.stem.inputs is not None


def test_gradients_weigh_outputs_of_the_unit(network: Net) -> None:
    """Of a linear layer with squared loss to 0, the gradient is known: y times two over the elements."""
    single = nn.Sequential(nn.Linear(3, 4)).requires_grad_(False)
    x = torch.randn(6, 3)
    weights = output_weights(single, "0", lambda: [single(x).square().mean()])
    expected = single(x).square().mean(0)
    torch.testing.assert_close(weights, expected / expected.mean())


def test_images_that_do_not_fit_the_memory_are_left_out_and_told(network: Net) -> None:
    images = drawn(0)
    stem_bytes = (2 * 3 * 144 + 8 * 144) * 4
    settings = {**QUICK, "steps": 2, "memory": 20 * stem_bytes / 2**30}
    _, chain = run(network, [AdaRound(**settings)], images)
    assert any("as few as 11 images" in note for note in chain.reports[0].notes)


def test_bits_of_single_layers(network: Net) -> None:
    settings = {**QUICK, "steps": 2, "layer_bits": {"blocks.0.first": 6}}
    changed, chain = run(network, [AdaRound(**settings)], drawn(0))
    assert changed.blocks[0].first.stored.bits == 6
    assert {record.name: record.bits for record in chain.reports[0].layers}["blocks.0.first"] == 6
    with pytest.raises(ConfigError, match=r"layer_bits\.blocks\.0\.frist: no such layer"):
        run(network, [AdaRound(layer_bits={"blocks.0.frist": 6})], drawn(0))


def test_what_cannot_be_rounded_is_named(network: Net) -> None:
    images = drawn(0)
    changed, _ = run(network, [ResidualExpansion(edge_bits=None)], images)
    with pytest.raises(ConfigError, match="stem has codes on no grid"):
        run(changed, [AdaRound()], images)
    again, _ = run(network, [UniformQuantization()], images)
    for layer in again.modules():
        if hasattr(layer, "floats"):
            layer.floats = None
    with pytest.raises(ConfigError, match="weights of stem are codes and what they were before is not known"):
        run(again, [AdaRound()], images)
    with pytest.raises(ConfigError, match="adaround needs images"):
        check_order([AdaRound()], Data())
    with pytest.raises(ConfigError, match="adaround needs labels"):
        check_order([AdaRound(loss="gradient")], Data(images=[images]))


@pytest.mark.parametrize(
    "settings",
    [{"bits": 9}, {"variable": "scale"}, {"loss": "mae"}, {"steps": 0}, {"mix": 2}, {"exponent": 5}, {"memory": 0}],
)
def test_settings_that_make_no_sense_are_refused(settings: dict) -> None:
    with pytest.raises(ConfigError, match=f"compression.adaround.{next(iter(settings))}="):
        AdaRound(**settings)


@pytest.mark.slow
def test_disjoint_calibration_sets_agree_within_a_point() -> None:
    """The robustness claim of arXiv 2308.07662, on digits."""
    images, labels = (torch.from_numpy(one) for one in load_digits(return_X_y=True))
    images = (images.float().view(-1, 1, 8, 8) / 16).expand(-1, 3, -1, -1)
    torch.manual_seed(0)
    network = Net(10, 16)
    optimizer = torch.optim.Adam(network.parameters(), 3e-3)
    for step in range(400):
        chosen = torch.randint(800, (64,), generator=torch.Generator().manual_seed(step))
        optimizer.zero_grad()
        nn.functional.cross_entropy(network(images[chosen]), labels[chosen]).backward()
        optimizer.step()
    network.eval().requires_grad_(True)
    scores = []
    for part in range(3):
        settings = {**QUICK, "bits": 4, "steps": 400}
        calibration = images[part * 200 : (part + 1) * 200]
        changed, _ = run(network, [AdaRound(**settings)], calibration)
        with torch.no_grad():
            scores.append(float((changed(images[800:]).argmax(1) == labels[800:]).float().mean()))
    assert min(scores) > 0.8
    assert max(scores) - min(scores) <= 0.01


def test_rounded_grids_are_ordinary_ones(network: Net) -> None:
    changed, _ = run(network, [AdaRound(**{**QUICK, "steps": 2})], drawn(0))
    assert isinstance(changed.stem.stored, GridWeight)
    assert changed.stem.stored.stored_bytes == round_to_grid(network.stem.weight, 3).stored_bytes
