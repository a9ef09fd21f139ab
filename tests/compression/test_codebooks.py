# SPDX-License-Identifier: Apache-2.0
from __future__ import annotations

import copy
import json
import math
from pathlib import Path

import numpy as np
import pytest
import timm
import torch
from safetensors.torch import save_file
from torch import Tensor, nn

from affect.compression.base import Data, relative_error, run_chain
from affect.compression.codebooks import (
    JLCM,
    LearnedCodebook,
    Learning,
    absorb_orders,
    blocks_of_rows,
    choose,
    codebook_bits,
    entries_of,
    grouped_codebooks,
    learn_codebook,
    row_features,
)
from affect.compression.layers import baked
from affect.compression.stored import CodebookWeight, GridWeight, build_weight, weight_node
from affect.compression.structure import apply_structure, structure
from affect.compression.uniform import UniformQuantization
from affect.errors import ConfigError
from tests.compression.networks import shake_norms


def mixed_rows(rows: int = 24, columns: int = 200, seed: int = 0) -> tuple[Tensor, Tensor]:
    """Return rows of three distributions in turn, and which each is of."""
    draws = torch.Generator().manual_seed(seed)
    kind = torch.arange(rows) % 3
    bell = torch.randn(rows, columns, generator=draws)
    flat = 4 * torch.rand(rows, columns, generator=draws) - 2
    sparse = 0.05 * bell + 3 * (torch.rand(rows, columns, generator=draws) < 0.05)
    return torch.where(kind[:, None] == 0, bell, torch.where(kind[:, None] == 1, flat, sparse)), kind


# -------------------------------------------------------------------------------------------- groups, codebooks


def test_rows_of_one_distribution_become_neighbours() -> None:
    weight, kind = mixed_rows()
    assert row_features(weight).shape == (24, 10)
    order, blocks = blocks_of_rows(weight, 3)
    assert blocks == [8, 8, 8]
    assert sorted(order.tolist()) == list(range(24))
    assert all(len(set(part.tolist())) == 1 for part in kind[order].split(8))
    np.testing.assert_allclose(row_features(2 * weight)[:, :9], row_features(weight)[:, :9])
    assert blocks_of_rows(weight, 1)[1] == [24]
    assert sum(blocks_of_rows(weight[:2], 8)[1]) == 2


def test_entries_are_the_means_of_what_is_nearest_to_them() -> None:
    """The best two of a Gaussian are ± 0.798, four ± 0.453 and ± 1.510 (Lloyd, Max)."""
    values = np.random.default_rng(0).normal(size=200_000)
    np.testing.assert_allclose(entries_of(values, 2), [-0.798, 0.798], atol=0.01)
    np.testing.assert_allclose(entries_of(values, 4, 200), [-1.510, -0.453, 0.453, 1.510], atol=0.02)
    few = np.array([3.0, 1.0, 1.0, 2.5])
    assert entries_of(few, 3).tolist() == [1, 2.5, 3]
    assert entries_of(few, 8).tolist() == [1, 2.5, 3]


@pytest.mark.parametrize("variant", ["codebooks", "block_scales", "row_scales"])
def test_as_many_entries_as_values_lose_nothing(variant: str) -> None:
    chosen = torch.randint(16, (24, 6, 3, 3), generator=torch.Generator().manual_seed(0))
    values = torch.randn(16, generator=torch.Generator().manual_seed(1))
    if variant != "codebooks":  # values are relative to scales, which are root mean squares
        values = torch.where(torch.arange(16) < 8, -1.0, 1.0) * 0.37
    weight = values[chosen]
    for groups in (1, 4):
        exact = grouped_codebooks(weight, 4, groups, variant, half=False)
        torch.testing.assert_close(exact(), weight, rtol=0 if variant == "codebooks" else 1e-6, atol=0)
    rounded = values.half().float()[chosen]
    if variant == "codebooks":
        assert torch.equal(grouped_codebooks(rounded, 4, 4)(), rounded)
        assert not torch.equal(grouped_codebooks(weight, 3, 1, half=False)(), weight)


def test_more_codebooks_and_scales_lose_less_where_rows_differ() -> None:
    weight = torch.randn(24, 200, generator=torch.Generator().manual_seed(0)) * torch.linspace(0.1, 2, 24)[:, None]

    def lost(stored: CodebookWeight) -> float:
        return float(((stored() - weight).square().sum(1) / weight.square().sum(1)).mean().sqrt())

    one = lost(grouped_codebooks(weight, 3, 1))
    assert lost(grouped_codebooks(weight, 3, 6)) < 0.8 * one
    assert lost(grouped_codebooks(weight, 3, 6, "block_scales")) < 0.8 * one
    assert lost(grouped_codebooks(weight, 3, 6, "row_scales")) < 0.8 * one


# ------------------------------------------------------------------------------------------------------ memory


@pytest.mark.parametrize("variant", ["codebooks", "block_scales", "row_scales"])
@pytest.mark.parametrize("ordered", [True, False])
def test_a_file_takes_the_bytes_of_the_formula(variant: str, ordered: bool, tmp_path: Path) -> None:
    weight = torch.randn(64, 16, 3, 3, generator=torch.Generator().manual_seed(0))
    stored = grouped_codebooks(weight, 4, 8, variant, ordered=[8] * 8 if ordered else None)
    scales = {"codebooks": 0, "block_scales": len(stored.blocks), "row_scales": 64}[variant]
    rows = 64 if stored.permuted else 0
    assert stored.permuted == (not ordered and variant != "row_scales")
    expected = codebook_bits(weight.numel(), 4, stored.groups, scales, rows)
    assert stored.stored_bytes * 8 == expected
    save_file({key: value.contiguous() for key, value in stored.state_dict().items()}, tmp_path / "weights")
    written = (tmp_path / "weights").read_bytes()
    header = int.from_bytes(written[:8], "little")
    assert (len(written) - 8 - header) * 8 == expected
    empty = build_weight(json.loads(json.dumps(weight_node(stored))))
    empty.load_state_dict(stored.state_dict())
    assert torch.equal(empty(), stored())


def test_codebooks_cost_little_beside_codes() -> None:
    """For 512 × 4608 weights and 16 entries; an order costs 9 bits a row, a group's number for each weight 3."""
    count = 512 * 4608
    for groups, bits in ((1, 4.0001), (8, 4.0009), (64, 4.0069)):
        assert codebook_bits(count, 4, groups) / count == pytest.approx(bits, abs=5e-5)
    assert codebook_bits(count, 4, 8, rows=512) - codebook_bits(count, 4, 8) == 512 * 9


# -------------------------------------------------------------------------------------------------- reordering


@pytest.mark.parametrize("name", ["test_resnet", pytest.param("test_efficientnet", marks=pytest.mark.slow)])
def test_reordered_rows_change_nothing_and_need_no_order(name: str) -> None:
    torch.manual_seed(0)
    network = shake_norms(timm.create_model(name, pretrained=False, num_classes=7).double())
    x = torch.randn(2, 3, 32, 32, dtype=torch.float64)
    with torch.no_grad():
        expected = network(x)
    layers = [n for n, layer in network.named_modules() if type(layer) in (nn.Conv2d, nn.Linear)]
    before = {n: network.get_submodule(n).weight.clone() for n in layers}
    found = absorb_orders(network, x, layers[1:-1], 4)
    with torch.no_grad():
        assert relative_error(expected, network(x)) < 1e-12
    assert len(found) > 3
    for n, blocks in found.items():
        weight = network.get_submodule(n).weight.detach()
        assert sum(blocks) == len(weight)
        assert not grouped_codebooks(weight, 4, 4, ordered=blocks).permuted
        again = blocks_of_rows(before[n], 4)[1]
        assert sorted(again) == sorted(blocks)


# ---------------------------------------------------------------------------------------------------- learning


def test_gradients_of_codes_are_those_of_their_formulas() -> None:
    entries = torch.tensor([[-1.0, 0.0, 0.5, 2.0]], dtype=torch.float64, requires_grad=True)
    scores = torch.tensor([[0.1, 0.9, 0.3, 0.2]], dtype=torch.float64, requires_grad=True)
    out = choose(scores, entries, "proximal", 0.25)
    assert out.tolist() == [0.0]
    by_score, by_entry = torch.autograd.grad(-3 * out.sum(), (scores, entries))
    pull = torch.tensor([-1 / 1.25, 0, 1 / 0.75, 1 / 2.25], dtype=torch.float64)
    torch.testing.assert_close(by_score[0], -3 * pull / pull.abs().max())
    assert by_entry.tolist() == [[0, -3, 0, 0]]
    soft = (scores.softmax(-1) * entries).sum()
    expected = torch.autograd.grad(-3 * soft, scores)[0]
    found = torch.autograd.grad(-3 * choose(scores, entries, "softmax").sum(), scores)[0]
    torch.testing.assert_close(found, expected)


def first_jumps(gradient: str, rate: float) -> np.ndarray:
    """Return by how many entries codes jump when they first change, pulled by a gradient each, in small steps."""
    draws = torch.Generator().manual_seed(0)
    count, size = 300, 16
    entries = torch.randn(count, size, generator=draws).sort(1).values
    code = torch.randint(4, 12, (count,), generator=draws)
    upstream = torch.randn(count, generator=draws)
    scores = torch.zeros(count, size).scatter(1, code[:, None], 1.0)
    jumps = torch.zeros(count, dtype=torch.long)
    for _ in range(1000):
        leaf = scores.clone().requires_grad_()
        grad = torch.autograd.grad((choose(leaf, entries, gradient, 0.01) * upstream).sum(), leaf)[0]
        scores = torch.where(jumps[:, None] == 0, scores - rate * grad, scores)
        jumps = torch.where(jumps == 0, (scores.argmax(1) - code).abs(), jumps)
        if bool((jumps > 0).all()):
            break
    return jumps[jumps > 0].numpy()


def test_codes_move_to_the_next_entry_first_and_those_of_a_softmax_do_not() -> None:
    near, far = first_jumps("proximal", 0.05), first_jumps("softmax", 0.5)
    assert len(near) > 280
    assert np.median(near) == 1
    assert (near == 1).mean() > 0.95
    assert len(far) > 150
    assert np.median(far) > 2


class Problem:
    """A layer with correlated inputs, and its loss in codebooks."""

    def __init__(self) -> None:
        draws = torch.Generator().manual_seed(0)
        mixing = torch.randn(64, 64, generator=draws) * torch.linspace(2, 0.1, 64)
        self.inputs = torch.randn(256, 64, generator=draws) @ mixing.T
        self.weight = torch.randn(32, 64, generator=draws)
        self.target = self.inputs @ self.weight.T

    def loss(self, weight: Tensor, chosen: Tensor | None = None) -> Tensor:
        chosen = torch.arange(256) if chosen is None else chosen
        return (self.inputs[chosen] @ weight.T - self.target[chosen]).square().sum(1).mean()


@pytest.mark.parametrize("variant", ["codebooks", "block_scales", "row_scales"])
def test_joint_learning_answers_better_than_k_means(variant: str) -> None:
    problem = Problem()
    start = grouped_codebooks(problem.weight, 3, 4, variant)
    before = float(problem.loss(start()))
    learner = LearnedCodebook(start, problem.weight)
    torch.testing.assert_close(learner().detach(), start(), rtol=1e-5, atol=1e-6)
    generator = torch.Generator().manual_seed(0)
    learn_codebook(learner, lambda chosen: problem.loss(learner(), chosen), 256, Learning(), generator)
    result = learner.frozen()
    assert float(problem.loss(result())) < 0.7 * before
    torch.testing.assert_close(result(), learner().detach(), rtol=2e-3, atol=2e-3)
    jumps = (result.indices() - start.indices()).abs()
    assert 0.01 < float((jumps > 0).float().mean()) < 0.9
    assert float(jumps[jumps > 0].float().median()) == 1
    assert (result.blocks, result.permuted, result.scales) == (start.blocks, start.permuted, start.scales)


def test_codes_stay_within_their_neighbours() -> None:
    problem = Problem()
    start = grouped_codebooks(problem.weight, 5, 1)
    learner = LearnedCodebook(start, problem.weight, neighbours=1)
    assert learner.scores.shape == (32, 64, 3)
    with torch.no_grad():
        learner.scores[..., 0] += 100
    before = start.indices()
    jumps = learner.codes() - before
    inner = (before > 0) & (before < 31)
    assert set(jumps[inner].tolist()) == {-1}
    assert set(jumps[before == 0].tolist()) == {0}


# --------------------------------------------------------------------------------------------------- transform


class Net(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.stem = nn.Conv2d(3, 16, 3, padding=1)
        self.depthwise = nn.Conv2d(16, 16, 3, padding=1, groups=16)
        self.inner = nn.Conv2d(16, 32, 3, stride=2, padding=1)
        self.hidden = nn.Linear(32, 32)
        self.head = nn.Linear(32, 8)

    def forward(self, x: Tensor) -> Tensor:
        x = self.inner(self.depthwise(self.stem(x).relu()).relu()).relu()
        return self.head(self.hidden(x.mean((2, 3))).relu())


@pytest.fixture
def network() -> Net:
    torch.manual_seed(0)
    return Net().eval()


@pytest.fixture
def images() -> list[Tensor]:
    return list(torch.randn(48, 3, 10, 10, generator=torch.Generator().manual_seed(3)).split(16))


def rebuilt(original: nn.Module, changed: nn.Module) -> nn.Module:
    fresh, state = copy.deepcopy(original), changed.state_dict()
    apply_structure(fresh, json.loads(json.dumps(structure(original, changed))), state, "config.yaml")
    fresh.load_state_dict(state)
    return fresh.eval()


def test_learned_codebooks_answer_better_and_are_rebuilt_from_plain_data(network: Net, images: list[Tensor]) -> None:
    x = torch.cat(images)
    errors = {}
    for steps in (0, 60):
        changed = copy.deepcopy(network)
        chain = run_chain(changed, [JLCM(bits=2, groups=4, steps=steps)], Data(images=images), x)
        errors[steps] = chain.errors[0]
        assert torch.equal(rebuilt(network, changed)(x), changed(x))
        torch.testing.assert_close(baked(changed)(x), changed(x))
    assert errors[60] < 0.9 * errors[0]
    report = chain.reports[0]
    assert [record.bits for record in report.layers] == [8, 2, 2, 2, 8]
    assert isinstance(changed.stem.stored, GridWeight)
    assert isinstance(changed.inner.stored, CodebookWeight)
    assert not changed.inner.stored.permuted
    assert len(changed.inner.stored.blocks) == 4
    assert report.totals["ordered"] >= 2
    assert 0 < report.totals["moved"] < 1
    assert "of codes moved; loss" in report.layers[2].note
    for record in report.layers[1:4]:
        stored = changed.get_submodule(record.name).stored
        rows = len(changed.get_submodule(record.name).current_weight()) if stored.permuted else 0
        bits = codebook_bits(math.prod(stored.shape), 2, stored.groups, 0, rows)
        assert record.bytes_after == math.ceil(bits / 8) + 4 * stored.shape[0]


def test_orders_are_stored_where_they_are_not_absorbed(network: Net, images: list[Tensor]) -> None:
    x = images[0]
    absorbed, plain = copy.deepcopy(network), copy.deepcopy(network)
    for changed, absorb in ((absorbed, True), (plain, False)):
        run_chain(changed, [JLCM(bits=4, groups=4, steps=0, absorb=absorb)], Data(), x)
    assert plain.inner.stored.permuted
    assert plain.hidden.stored.permuted
    assert not absorbed.inner.stored.permuted
    torch.testing.assert_close(absorbed(x), plain(x), rtol=1e-4, atol=1e-4)


def test_what_does_not_fit_the_memory_keeps_k_means_and_says_so(network: Net, images: list[Tensor]) -> None:
    size = network.inner.weight.numel() * 4 * 2**-30  # a score of each weight of the largest layer, in GiB
    chain = run_chain(network, [JLCM(bits=2, steps=3, memory=12 * size)], Data(images=images), images[0])
    notes = {record.name: record.note for record in chain.reports[0].layers}
    assert "not learned: its scores take more than memory=" in notes["inner"]
    assert "not learned" not in notes["depthwise"]


def test_codes_are_not_put_on_codes_and_settings_that_make_no_sense_are_refused(network: Net) -> None:
    UniformQuantization(bits=4)(network, Data())
    with pytest.raises(ConfigError, match="stem has codes already"):
        JLCM(steps=0)(network, Data())
    for settings in (
        {"bits": 9}, {"groups": 0}, {"variant": "rows"}, {"entry_bits": 8}, {"steps": -1}, {"gradient": "hard"},
        {"neighbours": 0}, {"memory": 0}, {"edge_bits": 1},
    ):  # fmt: skip
        with pytest.raises(ConfigError, match=f"compression.jlcm.{next(iter(settings))}="):
            JLCM(**settings)
