# SPDX-License-Identifier: Apache-2.0
"""THIN as a module: what is frozen, where gradients go, what gates read, what masks hide, what results tell."""

from __future__ import annotations

import dataclasses

import pytest
import pytorch_lightning as pl
import torch
from torch.utils.data import DataLoader

from affect import losses, tasks
from affect.callbacks import EMA
from affect.errors import ConfigError
from affect.models.thin import Exogenous, Thin
from affect.models.thin.loss import absolute_cosine
from affect.models.thin.module import DISPELLING
from tests.models.thin.parts import ANGLES, category, encoder, exogenous_run, make, make_batch, optimizer, stream


@pytest.fixture(scope="module")
def run(tmp_path_factory):
    return exogenous_run(tmp_path_factory.mktemp("stage1") / "run")


def frozen_state(model: Thin) -> dict[str, torch.Tensor]:
    return {name: value.clone() for name, value in model.exogenous.state_dict().items()}


def same(before: dict[str, torch.Tensor], after: dict[str, torch.Tensor]) -> bool:
    return all(torch.equal(value, after[name]) for name, value in before.items())


# ------------------------------------------------------------------------------------------------ the mixture


def test_undecided_gates_give_the_plain_mean(run):
    model, batch = make(run).eval(), make_batch()
    torch.nn.init.zeros_(model.gate.linear.weight)
    torch.nn.init.zeros_(model.gate.linear.bias)
    grid = model.encoder(batch.image)
    torch.testing.assert_close(model(batch)["shape"], model.experts(model.expert_input(grid)).mean(1))


def test_without_a_gate_it_is_the_mean_and_with_one_expert_a_plain_network(run):
    batch = make_batch()
    model = make(run, gate="none").eval()
    experts = model.experts(model.expert_input(model.encoder(batch.image)))
    torch.testing.assert_close(model(batch)["shape"], experts.mean(1))
    single = make(run, gate="none", experts=1).eval()
    torch.testing.assert_close(
        single(batch)["shape"], single.experts(single.expert_input(single.encoder(batch.image)))[:, 0]
    )


@pytest.mark.parametrize("reads", ["maps", "penultimate", "probabilities"])
@pytest.mark.parametrize("gate", ["endogenous", "exogenous"])
def test_the_gate_reads_what_it_is_told_to(run, gate, reads):
    model, batch = make(run, gate=gate, reads=reads).eval(), make_batch()
    streams = model.streams(batch)
    grid = streams.endogenous if gate == "endogenous" else streams.exogenous
    head = model.exogenous.head
    wanted = {"maps": grid.mean((2, 3)), "penultimate": head.penultimate(grid)}.get(reads, 4 * head(grid).softmax(1))
    torch.testing.assert_close(model.gate_weights(batch, streams), model.gate(wanted))
    torch.testing.assert_close(model.gate_weights(batch, streams).sum(1), torch.ones(8))


def test_only_the_endogenous_gate_teaches_the_endogenous_encoder(run):
    for gate, reaches in (("endogenous", True), ("exogenous", False)):
        model, batch = make(run, gate=gate), make_batch()
        weights = model.gate_weights(batch, model.streams(batch))
        grads = torch.autograd.grad(weights[:, 0].sum(), list(model.encoder.parameters()), allow_unused=True)
        assert any(g is not None and g.abs().sum() > 0 for g in grads) is reaches


def test_the_oracle_chooses_the_expert_of_the_true_class_and_the_mean_without_one(run):
    model, batch = make(run, gate="oracle").eval(), make_batch()
    batch.masks["exogenous"][0] = False
    weights = model.gate_weights(batch, model.streams(batch))
    assert weights[0].tolist() == [0.25] * 4
    assert torch.equal(weights[1:], batch.targets["exogenous"][1:])
    bare = dataclasses.replace(batch, targets={}, masks={})
    assert model.gate_weights(bare, model.streams(bare)).tolist() == [[0.25] * 4] * 8


@pytest.mark.parametrize("gate", ["exogenous", "oracle"])
def test_the_shuffled_control_reads_others_of_the_batch_and_an_evaluation_repeats(run, gate):
    model, plain, batch = make(run, gate=gate, shuffled=True).eval(), make(run, gate=gate).eval(), make_batch(32)
    own, mixed = (m.gate_weights(batch, m.streams(batch)) for m in (plain, model))
    assert not torch.equal(own, mixed)
    torch.testing.assert_close(own.sum(0), mixed.sum(0))  # the same rows in another order
    assert torch.equal(mixed, model.gate_weights(batch, model.streams(batch)))
    model.train()
    assert not torch.equal(*(model._partner(32, torch.device("cpu")) for _ in range(2)))


# --------------------------------------------------------------------------------------------------- frozen


def test_training_leaves_the_exogenous_stream_bit_identical(run):
    model = make(run)
    before, start = frozen_state(model), model.encoder.model[0][0].weight.clone()
    trainer = pl.Trainer(
        max_epochs=2, logger=False, enable_checkpointing=False, enable_progress_bar=False, enable_model_summary=False,
        callbacks=[EMA(decay=0.9)], accelerator="cpu",
    )  # fmt: skip
    loader = DataLoader([make_batch(seed=1), make_batch(seed=2)], batch_size=None)
    trainer.fit(model, loader, DataLoader([make_batch(seed=3)], batch_size=None))
    assert same(before, model.exogenous.state_dict())
    assert not torch.equal(start, model.encoder.model[0][0].weight)
    assert not any(module.training for module in model.exogenous.modules())
    ids = {id(p) for group in model.parameter_groups() for p in group["params"]}
    assert ids == {id(p) for p in model.parameters() if p.requires_grad}
    assert not ids & {id(p) for p in model.exogenous.parameters()}


def test_dispelling_reaches_stream_e_alone(run):
    model, batch = make(run), make_batch()
    model.train()
    outputs = model(batch)
    terms = model.objectives[DISPELLING](batch, outputs, model.taps)
    (terms.sum / terms.count).sum().backward()
    assert any(p.grad is not None and p.grad.abs().sum() > 0 for p in model.encoder.parameters())
    for part in (model.experts, model.gate, model.exogenous):
        assert all(p.grad is None for p in part.parameters())
    assert terms.count.tolist() == [8.0]
    streams = model.eval().streams(batch)
    own, other = model.exogenous.head(streams.endogenous), model.exogenous.head(streams.exogenous)
    model.train()
    assert absolute_cosine(own, other).shape == (8,)


def test_a_strong_dispelling_makes_both_readings_orthogonal(run):
    torch.manual_seed(0)
    model, batch = make(run, dispelling=1.0, optimizer=optimizer(0.01)), make_batch(32)
    model.train()
    learner = model.build_optimizer()
    found = []
    for _ in range(150):
        learner.zero_grad()
        terms = model.objectives[DISPELLING](batch, model(batch), model.taps)
        (terms.sum / terms.count).sum().backward()
        learner.step()
        found.append(float((terms.sum / terms.count).detach()))
    assert found[0] > 0.5
    assert found[-1] < 0.1


def test_a_step_is_the_task_loss_and_the_weighed_dispelling(run):
    model, batch = make(run, dispelling=0.5), make_batch()
    model.train()
    outputs = model(batch)
    terms = {n: t.sum.sum() / t.count.sum() for n, t in model.task_terms(outputs, batch).items()}
    dispelling = model.objectives[DISPELLING](batch, outputs, model.taps)
    wanted = terms["shape"] + terms["exogenous"] + 0.5 * dispelling.sum.sum() / 8
    torch.testing.assert_close(model.training_step(batch, 0), wanted)
    assert model.epoch_losses("train")["train/dispelling/loss"] == pytest.approx(float(dispelling.sum.detach() / 8))


def test_without_dispelling_nothing_of_it_is_computed(run):
    model, batch = make(run, dispelling=0.0, labels=False, gate="none"), make_batch()
    model.exogenous.forward = None  # would fail if it were called
    model.training_step(batch, 0)
    assert DISPELLING not in model.objectives
    inference = make(run, labels=False).eval()
    inference.endogenous_code.register_forward_hook(lambda *_: pytest.fail("phi of stream E is not needed here"))
    inference(batch)


def test_the_exogenous_task_says_what_the_frozen_stream_says(run):
    model, batch = make(run).eval(), make_batch()
    wanted = model.exogenous.head(model.exogenous(batch.image))
    torch.testing.assert_close(model(batch)["exogenous"], wanted)
    assert not model(batch)["exogenous"].requires_grad


# ------------------------------------------------------------------------------------------------------ start


def test_stream_e_starts_with_the_exogenous_weights_or_its_own(run):
    image = make_batch().image
    started, own = make(run), make(run, initialise=False)
    torch.testing.assert_close(started.eval().encoder(image), started.exogenous(image))
    assert not torch.equal(own.eval().encoder(image), own.exogenous(image))
    control = make(run, exogenous=stream(run, random=True)).eval()
    torch.testing.assert_close(control.encoder(image), started.encoder(image))
    assert not torch.equal(control.exogenous(image), started.exogenous(image))


def test_init_may_not_replace_the_exogenous_weights(run):
    model = make(run)
    with torch.no_grad():
        model.exogenous.head.output.bias += 1
    with pytest.raises(ConfigError, match="init brought other exogenous weights"):
        model.setup("fit")


# ------------------------------------------------------------------------------------------------------ masks


def test_unlabelled_rows_have_no_influence_on_the_task_loss(run):
    model, batch = make(run), make_batch()
    batch.masks["shape"][:3] = False
    model.eval()
    found = []
    for filler in (0.0, 1.0):
        batch.targets["shape"][:3] = filler
        terms = model.training_terms(batch)["shape"]
        assert terms.count.sum() == 5
        found.append(terms.sum.sum())
    torch.testing.assert_close(found[0], found[1])


def test_an_all_masked_batch_has_a_zero_gradient(run):
    model, batch = make(run, dispelling=0.0), make_batch()
    for mask in batch.masks.values():
        mask[:] = False
    loss = model.training_step(batch, 0)
    loss.backward()
    assert float(loss.detach()) == 0
    gradients = [p.grad for p in model.parameters() if p.grad is not None]
    assert gradients
    assert all((g == 0).all() for g in gradients)


def test_mixed_precision(run):
    model, batch = make(run), make_batch()
    with torch.autocast("cpu", dtype=torch.bfloat16):
        loss = model.training_step(batch, 0)
    loss.backward()
    assert loss.isfinite()
    assert all(p.grad.isfinite().all() for p in model.parameters() if p.grad is not None)


def test_other_tasks_get_a_linear_head(run):
    va = tasks.ValenceArousal(loss=losses.MSE(), metrics=[])
    model = Thin({"shape": category(), "va": va}, encoder(), task="shape", exogenous=stream(run), experts=2, pool=1)
    found = model.eval()(make_batch())
    assert found["va"].shape == (8, 2)
    assert list(model.heads()) == ["va"]


# --------------------------------------------------------------------------------------------------- examine


def test_results_tell_what_gate_and_features_hold(run):
    model, test = make(run, reads="penultimate").eval(), [make_batch(16, 1), make_batch(16, 2)]
    test[0].masks["exogenous"][:4] = False
    before = frozen_state(model)
    found = model.examine(lambda part: {"train": [make_batch(32, 3)], "test": test}.get(part))
    assert same(before, model.exogenous.state_dict())
    streams = [model.streams(batch) for batch in test]
    own = torch.cat([model.exogenous.head(s.endogenous) for s in streams])
    other = torch.cat([model.exogenous.head(s.exogenous) for s in streams])
    labels = torch.cat([b.targets["exogenous"].argmax(1) for b in test])[4:]
    assert found["dispelling"]["abs_cos"] == pytest.approx(float(absolute_cosine(own, other).mean().detach()))
    assert found["reads"]["exogenous"] == pytest.approx(float((other.argmax(1)[4:] == labels).float().mean()))
    assert found["reads"]["endogenous"] == pytest.approx(float((own.argmax(1)[4:] == labels).float().mean()))
    assert found["reads"]["rows"] == 28
    assert 0 <= found["probe"]["linear"] <= 1
    assert found["probe"]["training_rows"] == 32
    weights = torch.cat([model.gate_weights(b, s) for b, s in zip(test, streams, strict=True)]).detach()
    usage = torch.tensor(found["gate"]["usage"])
    assert [ANGLES.index(name) for name in found["gate"]["classes"]] == sorted(labels.unique().tolist())
    for row, name in zip(usage, found["gate"]["classes"], strict=True):
        torch.testing.assert_close(row, weights[4:][labels == ANGLES.index(name)].mean(0))
    assert sum(found["gate"]["rows"]) == 28
    torch.testing.assert_close(torch.tensor(found["gate"]["overall"]), weights.mean(0))


def test_without_labels_the_classes_are_those_that_the_frozen_stream_says(run):
    model = make(run, labels=False).eval()
    found = model.examine(lambda part: [make_batch(16)] if part == "validation" else None)
    assert set(found) == {"dispelling", "gate"}
    assert "stream says" in found["gate"]["by"]
    assert set(found["gate"]["classes"]) <= set(ANGLES)
    assert model.examine(lambda part: None) == {}


def test_a_perfect_gate_shares_all_its_information_with_the_class(run):
    model = make(run, gate="oracle").eval()
    batch = make_batch(64)
    found = model.examine(lambda part: [batch] if part == "test" else None)
    counts = batch.targets["exogenous"].sum(0) / 64
    assert found["gate"]["information"] == pytest.approx(float(-(counts * counts.log()).sum()), abs=1e-6)
    assert make(run, gate="none").eval().examine(lambda part: [batch])["gate"]["information"] == 0


# ----------------------------------------------------------------------------------------------------- errors


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"gate": "exogen"}, "did you mean exogenous"),
        ({"reads": "map"}, "did you mean maps"),
        ({"experts": 6}, "and 6 were asked for"),
        ({"gate": "oracle", "experts": 2}, "need as many experts"),
        ({"gate": "oracle", "labels": False}, "needs the true classes"),
        ({"pool": 4}, "3 x 3 positions"),
        ({"dispelling": -1.0}, "must be 0 or more"),
        ({"task": "expression"}, "no such task with classes"),
        ({"task": "exogenous"}, "are both exogenous"),
        ({"exogenous": None, "labels": False}, "model.gate=exogenous needs the exogenous stream"),
        ({"exogenous": None, "gate": "none", "labels": False}, "model.dispelling=1 needs"),
        ({"exogenous": None, "gate": "none", "dispelling": 0.0}, "task exogenous needs"),
    ],
)
def test_settings_that_do_not_fit(run, arguments, message):
    with pytest.raises(ConfigError, match=message):
        make(run, **arguments)


def test_training_needs_the_weights_of_stage_one():
    with pytest.raises(ConfigError, match=r"model\.exogenous\.weights: name the folder"):
        make(exogenous=stream(None))


def test_other_exogenous_classes_than_those_of_the_run(run):
    both = {"shape": category(), "exogenous": category(tuple(reversed(ANGLES)), "angle")}
    with pytest.raises(ConfigError, match=r"set task\.exogenous\.classes as in that run"):
        Thin(both, encoder(), task="shape", exogenous=stream(run), experts=4, pool=1)


def test_stage_one_learns_one_task_with_classes():
    with pytest.raises(ConfigError, match="learns the classes of one task"):
        Exogenous({"a": category(), "b": category()}, encoder())
    plain = encoder()
    plain.output = "vector"
    with pytest.raises(ConfigError, match=r"encoder\.output=vector"):
        Exogenous({"a": category()}, plain)


def test_rungs_without_the_stream():
    for arguments in ({"gate": "none"}, {"gate": "endogenous"}, {"gate": "none", "experts": 1}):
        model = make(exogenous=None, labels=False, dispelling=0.0, **arguments)
        assert model(make_batch())["shape"].shape == (8, 3)
        assert model.examine(lambda part: None) == {}
        assert [name for name, _ in model.encoder_modules()] == ["encoder"]
