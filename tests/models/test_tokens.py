# SPDX-License-Identifier: Apache-2.0
"""The transformer of tokens: exact sizes, equivariances, which tokens there are, and its schedule."""

from __future__ import annotations

import functools

import pytest
import torch
from torch import nn

from affect import losses, metrics, optimization, tasks
from affect.data.batch import FaceBatch
from affect.encoders import TimmEncoder
from affect.errors import ConfigError
from affect.models.au_transformer import AUTransformer
from affect.models.task_token_transformer import TaskTokenTransformer
from affect.models.tokens import Attention, Patches, Span, Tokens, TokenTransformer, plan_tokens, token_names


def make_tasks(*names: str) -> dict[str, tasks.Task]:
    made = {
        "au": tasks.AUOccurrence(aus="affwild2", loss=losses.BinaryCrossEntropy(), metrics=[metrics.F1()]),
        "expression": tasks.Expression(classes="abaw", loss=losses.CrossEntropy(), metrics=[]),
        "valence_arousal": tasks.ValenceArousal(loss=losses.MSE(), metrics=[]),
    }
    for task in made.values():
        for metric in task.metrics:
            metric.bind(task.outputs)
    return {name: made[name] for name in names or made}


def encoder() -> TimmEncoder:
    return TimmEncoder("test_resnet", image_size=64, output="map")


def count(module: nn.Module) -> int:
    return sum(parameter.numel() for parameter in module.parameters())


class TestSizes:
    def test_parameters_are_those_of_the_authors_model(self):
        network = TokenTransformer(2048, 64, {"au": Span(0, 12, 1)})
        assert count(network.patches.project) == 262_272
        assert network.patches.positions.numel() + network.patches.position_bias.numel() == 8_320
        assert count(network.patches.layers[0]) == 198_272
        assert count(network.tokens) + count(network.heads) == 794_881
        assert count(network) == 1_263_745

    def test_outputs(self):
        network = TokenTransformer(6, 16, {"au": Span(0, 12, 1)}, dim=16, heads=2, hidden=8)
        assert network(torch.randn(3, 6, 4, 4))["au"].shape == (3, 12)
        with pytest.raises(ConfigError, match="16 positions"):
            network(torch.randn(3, 6, 5, 5))

    @pytest.mark.parametrize(("plan", "tokens"), [("method", 14), ("task", 3), ("output", 22)])
    def test_plans(self, plan, tokens):
        made = make_tasks()
        spans = plan_tokens(made, plan)
        assert max(span.last for span in spans.values()) == tokens
        assert [(s.last - s.first) * s.outputs for s in spans.values()] == [12, 8, 2]
        covered = [k for s in spans.values() for k in range(s.first, s.last)]
        assert covered == list(range(tokens))
        assert [len(names) for names in token_names(made, spans).values()] == [s.last - s.first for s in spans.values()]


class TestAttention:
    def test_it_is_torchs_multi_head_attention(self):
        torch.manual_seed(0)
        ours, theirs = Attention(12, 3), nn.MultiheadAttention(12, 3, batch_first=True)
        with torch.no_grad():
            theirs.in_proj_weight.copy_(torch.cat([ours.query.weight, ours.key.weight, ours.value.weight]))
            theirs.in_proj_bias.copy_(torch.cat([ours.query.bias, ours.key.bias, ours.value.bias]))
            theirs.out_proj.weight.copy_(ours.out.weight)
            theirs.out_proj.bias.copy_(ours.out.bias)
        query, context = torch.randn(2, 4, 12), torch.randn(2, 7, 12)
        wanted, weights = theirs(query, context, context, average_attn_weights=False)
        found, own = ours(query, context)
        torch.testing.assert_close(found, wanted)
        torch.testing.assert_close(own, weights)
        torch.testing.assert_close(own.sum(-1), torch.ones(2, 3, 4))

    def test_heads_divide_the_channels(self):
        with pytest.raises(ConfigError, match="no multiple"):
            Attention(10, 3)

    def test_it_can_be_differentiated_twice(self):
        attention = Attention(4, 2).double()
        x = torch.randn(1, 3, 4, dtype=torch.double, requires_grad=True)
        assert torch.autograd.gradgradcheck(lambda a: attention(a, a)[0], x)


class TestEquivariance:
    @pytest.fixture
    def network(self):
        torch.manual_seed(0)
        return TokenTransformer(6, 16, {"au": Span(0, 5, 1)}, dim=16, heads=2, hidden=8).eval()

    def test_permuted_tokens_give_permuted_outputs(self, network):
        grid, order = torch.randn(2, 6, 4, 4), torch.tensor([3, 0, 4, 2, 1])
        plain = network(grid)["au"]
        network.tokens.table.data = network.tokens.table.data[order]
        torch.testing.assert_close(network(grid)["au"], plain[:, order])

    def test_permuted_patches_with_their_positions_change_nothing(self, network):
        grid, order = torch.randn(2, 6, 4, 4), torch.randperm(16)
        plain = network(grid)["au"]
        moved = grid.flatten(2)[..., order].view_as(grid)
        assert not torch.allclose(network(moved)["au"], plain, atol=1e-5)
        network.patches.positions.data = network.patches.positions.data[order]
        torch.testing.assert_close(network(moved)["au"], plain)

    def test_constant_patches_tell_no_place(self, network):
        patches = torch.randn(2, 1, 16).expand(-1, 16, -1)
        few = patches[:, :3]
        torch.testing.assert_close(network.tokens(patches)[0], network.tokens(few)[0])


class TestModules:
    def test_any_subset_of_tasks(self):
        image = torch.randint(0, 256, (2, 3, 64, 64), dtype=torch.uint8)
        for names in (("au",), ("expression",), ("valence_arousal", "au"), ()):
            model = TaskTokenTransformer(make_tasks(*names), encoder(), dim=16, heads=2, hidden=8)
            outputs = model(FaceBatch(image=image, targets={}, masks={}))
            assert list(outputs) == list(make_tasks(*names))
            assert {n: o.shape[1] for n, o in outputs.items()} == {n: t.num_outputs for n, t in model.tasks.items()}

    def test_attention_is_a_map_per_token(self):
        model = TaskTokenTransformer(make_tasks(), encoder(), dim=16, heads=2, hidden=8).eval()
        image = torch.randint(0, 256, (2, 3, 64, 64), dtype=torch.uint8)
        maps = model.attention(FaceBatch(image=image, targets={}, masks={}))
        assert {n: m.shape[:2] for n, m in maps.items()} == {
            "au": (2, 12),
            "expression": (2, 1),
            "valence_arousal": (2, 1),
        }
        torch.testing.assert_close(maps["au"].sum((2, 3)), torch.ones(2, 12))

    def test_vit_tokens_are_positions_too(self):
        vit = TimmEncoder("test_vit", image_size=32, output="map")
        model = AUTransformer(make_tasks("au"), vit, dim=16, heads=2, hidden=8)
        assert model.transformer.patches.positions.shape[0] == model.grid[0] * model.grid[1] > 1

    def test_the_au_method_wants_yes_or_no(self):
        with pytest.raises(ConfigError, match="task_token_transformer"):
            AUTransformer(make_tasks(), encoder())

    def test_a_vector_has_no_positions(self):
        with pytest.raises(ConfigError, match=r"encoder\.output=map"):
            AUTransformer(make_tasks("au"), TimmEncoder("test_resnet", image_size=64))

    def test_groups_are_named_and_complete(self):
        model = TaskTokenTransformer(make_tasks(), encoder(), dim=16, heads=2, hidden=8)
        groups = model.parameter_groups()
        assert {group["name"] for group in groups} == {"encoder", "patches", "tokens"}
        listed = [id(p) for group in groups for p in group["params"]]
        assert sorted(listed) == sorted(id(p) for p in model.parameters())
        table = model.transformer.tokens.table
        assert all(g["weight_decay"] == 0 for g in groups if any(p is table for p in g["params"]))

    def test_dense_heads_are_taken_over_by_label_name(self):
        model = TaskTokenTransformer(make_tasks(), encoder(), dim=16, heads=2, hidden=8)
        assert {name: layer.out_features for name, layer in model.heads().items()} == {
            "expression": 8,
            "valence_arousal": 2,
        }

    def test_a_missing_label_changes_nothing(self):
        model = TaskTokenTransformer(make_tasks(), encoder(), dim=16, heads=2, hidden=8).eval()
        torch.manual_seed(1)
        image = torch.randint(0, 256, (4, 3, 64, 64), dtype=torch.uint8)
        targets = {n: torch.rand(4, t.num_outputs).round() for n, t in model.tasks.items()}
        targets["expression"] = torch.eye(8)[:4]
        masks = {n: torch.rand(4, 1).expand(4, t.num_outputs) > 0.5 for n, t in model.tasks.items()}
        sums = []
        for filler in (0.0, 1.0):
            filled = {n: torch.where(masks[n], t, filler) for n, t in targets.items()}
            terms = model.training_terms(FaceBatch(image=image, targets=filled, masks=masks))
            sums.append(torch.stack([term.sum.sum() for term in terms.values()]))
        torch.testing.assert_close(*sums)


class TestSchedule:
    def test_it_rises_linearly_peaks_and_falls_as_the_root(self):
        rate = functools.partial(optimization.token_rate, batch_size=64, dim=128, steps_per_epoch=1000)
        assert rate(0, tokens=64) == 0
        assert rate(1250, tokens=64) == pytest.approx(rate(2500, tokens=64) / 2)
        assert rate(10_000, tokens=64) == pytest.approx(rate(2500, tokens=64) / 2)
        assert max(rate(k, tokens=64) for k in range(0, 6000, 10)) == rate(2500, tokens=64)
        assert rate(2500, tokens=64) == pytest.approx(2.9e-4, rel=0.01)
        assert rate(2500, tokens=12) == pytest.approx(5.4e-5, rel=0.01)

    def test_groups_follow_their_own(self):
        model = AUTransformer(
            make_tasks("au"),
            encoder(),
            dim=16,
            heads=2,
            hidden=8,
            optimizer=functools.partial(torch.optim.SGD, lr=5e-5),
        )
        optimizer = model.build_optimizer()
        schedule = optimization.token_schedule(optimizer, steps_per_epoch=4, batch_size=8, patches=4, tokens=12, dim=16)
        for _ in range(8):
            optimizer.step()
            schedule.step()
        rates = {group["name"]: group["lr"] for group in optimizer.param_groups}
        wanted = optimization.token_rate(8, 8, 4, 16, 4), optimization.token_rate(8, 8, 12, 16, 4)
        assert rates["encoder"] == pytest.approx(5e-5 * 0.99**2)
        assert (rates["patches"], rates["tokens"]) == pytest.approx(wanted)

    def test_a_model_without_tokens_has_no_such_schedule(self):
        optimizer = torch.optim.SGD(nn.Linear(2, 2).parameters(), lr=0.1)
        with pytest.raises(ConfigError, match="scheduler=tokens"):
            optimization.token_schedule(optimizer, steps_per_epoch=4)


def test_tokens_and_patches_start_as_described():
    torch.manual_seed(0)
    patches, tokens = Patches(8, 400, 64, 0), Tokens(400, 64, 0)
    assert float(patches.positions.std()) == pytest.approx(0.02, rel=0.02)
    assert float(tokens.table.std()) == pytest.approx(1, rel=0.02)


def faces(number: int) -> FaceBatch:
    return FaceBatch(image=torch.randint(0, 256, (number, 3, 64, 64), dtype=torch.uint8), targets={}, masks={})


def test_attention_is_examined_on_the_held_out_part():
    model = TaskTokenTransformer(make_tasks(), encoder(), dim=16, heads=2, hidden=8).eval()
    batches = [faces(3), faces(2)]
    found = model.examine({"test": batches}.get)["attention"]
    maps = torch.cat([model.attention(batch)["au"] for batch in batches]).double().mean(0)
    listed = torch.tensor([found["au"][name] for name in model.tasks["au"].outputs], dtype=torch.float64)
    torch.testing.assert_close(listed, maps)
    assert model.examine(lambda part: None) == {}
    assert set(model.examine({"validation": batches}.get)["attention"]) == set(model.tasks)


def test_without_positions_patches_have_no_place():
    torch.manual_seed(0)
    model = AUTransformer(make_tasks("au"), encoder(), dim=16, heads=2, hidden=8, placed=False).eval()
    grid = torch.randn(2, model.encoder.num_features, *model.grid)
    order = torch.randperm(grid[0, 0].numel())
    moved = grid.flatten(2)[..., order].view_as(grid)
    torch.testing.assert_close(model.transformer(moved)["au"], model.transformer(grid)["au"])
    assert not any(p is model.transformer.patches.positions for g in model.parameter_groups() for p in g["params"])
