# SPDX-License-Identifier: Apache-2.0
"""MONET as a module: what losses see, what cells are fed, which parameters learn how."""

from __future__ import annotations

import functools

import numpy as np
import pytest
import pytorch_lightning as pl
import torch
from omegaconf import OmegaConf
from torch.utils.data import DataLoader

from affect import losses, metrics, optimization, tasks
from affect.commands.configuration import config_directory
from affect.data.batch import FaceBatch
from affect.encoders import TimmEncoder
from affect.errors import ConfigError
from affect.models.monet import Monet
from affect.models.monet.loss import bound
from affect.models.monet.reading import natural_rank
from affect.tasks.base import Encoded

AUS = [1, 2, 4, 12]


def make_task(**arguments) -> tasks.AUOccurrence:
    task = tasks.AUOccurrence(
        aus=AUS, loss=losses.BinaryCrossEntropy(), metrics=[metrics.F1()], score="f1/mean", **arguments
    )
    for metric in task.metrics:
        metric.bind(task.outputs)
    return task


def make(au=None, others=None, **arguments) -> Monet:
    torch.manual_seed(0)
    common = {"optimizer": functools.partial(torch.optim.AdamW, lr=1e-3), "orders": 8, "kept": 4, "hidden": 8}
    return Monet(
        {"au": au or make_task(), **(others or {})},
        TimmEncoder("test_resnet", image_size=32),
        **{"label_features": 6, "warmup_epochs": 1, **common, **arguments},
    )


def make_batch(size=6, missing=0.3) -> FaceBatch:
    torch.manual_seed(4)
    return FaceBatch(
        image=torch.randint(0, 256, (size, 3, 32, 32), dtype=torch.uint8),
        targets={"au": torch.randint(0, 2, (size, 4)).float(), "valence_arousal": torch.rand(size, 2)},
        masks={"au": torch.rand(size, 4) > missing, "valence_arousal": torch.rand(size, 2) > missing},
    )


def test_the_bound_is_taken_over_labelled_cells():
    model, batch = make(kept=None), make_batch(missing=0.0)
    model.eval()
    terms = model.training_terms(batch)["au"]
    vector = model.features(batch)
    logits = model.orders.forced(vector, batch.targets["au"])
    cells = torch.nn.functional.binary_cross_entropy_with_logits(
        logits, batch.targets["au"][:, None].expand_as(logits), reduction="none"
    )
    torch.testing.assert_close(terms.sum, bound(cells, model.orders.order_logits).sum(0))
    assert terms.count.tolist() == [6.0] * 4


@pytest.mark.parametrize("mixing", ["bound", "mixture"])
def test_masked_cells_have_no_influence(mixing):
    model, batch = make(kept=None, mixing=mixing, unknown="zero"), make_batch()
    model.eval()
    found = []
    for filler in (0.0, 1.0):
        batch.targets["au"] = torch.where(batch.masks["au"], batch.targets["au"], filler)
        terms = model.training_terms(batch)["au"]
        assert terms.count.sum() == batch.masks["au"].sum()
        found.append(terms.sum.sum())
    torch.testing.assert_close(found[0], found[1])


@pytest.mark.parametrize("mixing", ["bound", "mixture"])
def test_an_all_masked_batch_has_a_zero_gradient(mixing):
    model, batch = make(mixing=mixing), make_batch(missing=2.0)
    loss = model.training_step(batch, 0)
    loss.backward()
    assert float(loss.detach()) == 0
    gradients = [p.grad for p in model.parameters() if p.grad is not None]
    assert gradients
    assert all((g == 0).all() for g in gradients)


@pytest.mark.parametrize("mixing", ["bound", "mixture"])
def test_smoothing_reaches_the_loss_but_not_the_cells(mixing):
    plain = make(kept=None, mixing=mixing)
    smooth = make(make_task(target=tasks.UniformSmoothing(0.4)), kept=None, mixing=mixing)
    batch = make_batch(missing=0.0)
    for model in (plain, smooth):
        model.eval()
    seen = {}
    for name, model in (("plain", plain), ("smooth", smooth)):
        forced = model.orders.forced
        model.orders.forced = lambda vector, labels, *rest, f=forced, n=name: (  # type: ignore[method-assign]
            seen.setdefault(n, labels.clone()),
            f(vector, labels, *rest),
        )[1]
    assert not torch.allclose(plain.training_terms(batch)["au"].sum, smooth.training_terms(batch)["au"].sum)
    assert torch.equal(seen["plain"], seen["smooth"])
    assert set(seen["smooth"].unique().tolist()) <= {0.0, 1.0}


def test_weights_and_dice_of_the_task_are_used():
    batch = make_batch(missing=0.0)
    weighted = make_task()
    weighted.loss = losses.BinaryCrossEntropy(weights=[0.0, 0.0, 4.0, 0.0])
    terms = make(weighted, kept=None).eval().training_terms(batch)["au"]
    assert (terms.sum > 0).tolist() == [False, False, True, False]
    both = make_task()
    both.loss = losses.Combined({"bce": losses.BinaryCrossEntropy(), "dice": losses.Dice(per_sample=True)})
    more = make(both, kept=None).eval().training_terms(batch)["au"]
    plain = make(kept=None).eval().training_terms(batch)["au"]
    assert (more.sum > plain.sum).all()


def test_a_loss_over_the_batch_is_refused_before_training():
    task = make_task()
    task.loss = losses.Dice()
    with pytest.raises(ConfigError, match="per_sample=true"):
        make(task).setup("fit")


def test_other_tasks_get_linear_heads():
    other = tasks.ValenceArousal(loss=losses.MSE(), metrics=[])
    model, batch = make(others={"valence_arousal": other}), make_batch()
    assert set(model(batch)) == {"au", "valence_arousal"}
    assert set(model.training_terms(batch)) == {"au", "valence_arousal"}
    assert set(model.heads()) == {"valence_arousal"}


def test_head_biases_start_at_the_log_odds_of_the_rates():
    task = make_task()
    task.rates = np.array([0.1, 0.5, np.nan, 0.8])
    bias = make(task).orders.cells.head_bias
    torch.testing.assert_close(bias, torch.tensor([np.log(1 / 9), 0.0, 0.0, np.log(4)]).float())
    assert (make(task, log_odds_bias=False).orders.cells.head_bias == 0).all()


class TestOrderLogits:
    def test_they_have_a_group_of_their_own(self):
        model = make()
        group = next(g for g in model.parameter_groups() if g.get("name") == "order_logits")
        assert [p is model.orders.order_logits for p in group["params"]] == [True]
        assert group["lr"] == 5e-3
        assert group["weight_decay"] == 0
        listed = [id(p) for g in model.parameter_groups() for p in g["params"]]
        assert len(listed) == len(set(listed)) == len(list(model.parameters()))

    def fit(self, model, epochs, **trainer) -> list[torch.Tensor]:
        seen = []

        class Look(pl.Callback):
            def on_train_epoch_end(self, trainer, module) -> None:
                seen.append(module.orders.order_logits.detach().clone())
                rates.append([g["lr"] for g in trainer.optimizers[0].param_groups if g.get("name") == "order_logits"])

        rates: list[list[float]] = []
        pl.Trainer(
            max_epochs=epochs,
            accelerator="cpu",
            logger=False,
            enable_checkpointing=False,
            enable_progress_bar=False,
            enable_model_summary=False,
            callbacks=[Look()],
            **trainer,
        ).fit(model, DataLoader([make_batch()] * 2, batch_size=None))
        self.rates = rates
        return seen

    def test_warm_up_keeps_the_mixture_uniform_and_then_it_moves(self):
        scheduler = functools.partial(optimization.warmup_cosine, warmup=0.0)
        seen = self.fit(make(warmup_epochs=2, scheduler=scheduler), 3)
        assert (seen[0] == 0).all()
        assert (seen[1] == 0).all()
        assert (seen[2] != 0).any()
        assert self.rates == [[5e-3]] * 3  # the schedule leaves their rate alone

    def test_an_untrained_mixture_stays_uniform(self):
        seen = self.fit(make(warmup_epochs=0, train_orders=False), 2)
        assert (seen[-1] == 0).all()

    def test_clipping_leaves_them_alone(self):
        model = make(warmup_epochs=0)
        optimizer = model.build_optimizer()
        for parameter in model.parameters():
            parameter.grad = torch.ones_like(parameter)
        model.configure_gradient_clipping(optimizer, 1e-3, "norm")
        assert (model.orders.order_logits.grad == 1).all()
        others = [p.grad for p in model.parameters() if p is not model.orders.order_logits]
        assert torch.stack([g.norm() for g in others]).norm() < 1.01e-3


def test_findings_say_what_was_learnt():
    model = make()
    model.orders.order_logits.data[3] = 5.0
    found = model.findings()["order"]
    assert found["outputs"] == ["AU1", "AU2", "AU4", "AU12"]
    first = found["orders"][0]
    assert first["order"] == [found["outputs"][t] for t in model.orders.orders[3].tolist()]
    assert first["weight"] == pytest.approx(float(model.orders.order_logits.softmax(0)[3]))
    np.testing.assert_allclose(np.array(found["soft_order"]).sum(0), 1)
    assert found["entropy"] < found["uniform_entropy"]


def test_the_loss_of_each_order_is_told_on_held_out_labels():
    model = make().eval()
    model.orders.order_logits.data[3] = 5.0
    batches = [make_batch(size=6, missing=0.0), make_batch(size=3, missing=0.0)]
    told = model.examine({"test": batches}.get)["order_loss"]
    assert told["rows"] == 9
    with torch.no_grad():
        likelihoods = []
        for batch in batches:
            chance = model.orders.forced(model.features(batch), batch.targets["au"]).sigmoid()
            target = batch.targets["au"][:, None]
            likelihoods.append(torch.where(target == 1, chance, 1 - chance).prod(-1))
    wanted = -torch.cat(likelihoods).log().mean(0)
    names = model.tasks["au"].outputs
    found = {tuple(names.index(name) for name in entry["order"]): entry for entry in told["orders"]}
    assert [found[tuple(order)]["loss"] for order in model.orders.orders.tolist()] == pytest.approx(wanted.tolist())
    assert [entry["loss"] for entry in told["orders"]] == sorted(entry["loss"] for entry in told["orders"])
    assert found[tuple(model.orders.orders[3].tolist())]["weight"] > 0.9


def test_the_loss_of_an_order_leaves_missing_labels_out_and_repeats():
    model = make().eval()
    batch = make_batch()
    told = model.examine({"validation": [batch]}.get)["order_loss"]
    assert told["rows"] == int(batch.masks["au"].any(1).sum())
    torch.manual_seed(1)
    batch.targets["au"][~batch.masks["au"]] = torch.nan
    assert model.examine({"validation": [batch]}.get)["order_loss"] == told
    batch.masks["au"][:] = False
    assert "order_loss" not in model.examine({"validation": [batch]}.get)


def test_the_rank_of_the_natural_order_counts_smaller_losses():
    entries = [{"order": list(order), "loss": loss} for order, loss in (("ba", 0.5), ("ab", 0.7))]
    findings = {"order": {"outputs": ["a", "b"]}, "order_loss": {"orders": entries}}
    assert natural_rank({"findings": findings}) == 2
    assert natural_rank({"findings": findings | {"order_loss": {"orders": entries[1:]}}}) == 1
    assert natural_rank({"findings": findings | {"order_loss": {"orders": entries[:1]}}}) is None
    assert natural_rank({"findings": {}}) is None


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"orders": 25}, "only 24 orders"),
        ({"kept": 9}, "between 1 and the number of orders"),
        ({"task": "aus"}, "did you mean au"),
        ({"mixing": "bond"}, "did you mean bound"),
        ({"samples": 0}, "at least one sample"),
        ({"orders": [[0, 1, 2, 2]], "kept": None}, "permutation"),
    ],
)
def test_bad_arguments_are_refused(arguments, message):
    with pytest.raises(ConfigError, match=message):
        make(**arguments)


def test_a_task_without_yes_or_no_is_refused():
    other = tasks.ValenceArousal(loss=losses.MSE(), metrics=[])
    with pytest.raises(ConfigError, match="yes-or-no"):
        make(others={"valence_arousal": other}, task="valence_arousal")


class TestRobinHood:
    @pytest.fixture
    def fitted(self):
        transform = tasks.RobinHood(0.1)
        target = np.array([[0, 1, 1, 0], [0, 1, 0, 1], [1, 1, 0, 0], [0, 0, 0, 1]], np.float32)
        mask = np.ones((4, 4), bool)
        mask[2, 0] = False  # the only positive of the first output is not coded
        transform.fit([Encoded(target, mask)])
        return transform

    def test_rates_are_those_of_coded_cells(self, fitted):
        np.testing.assert_allclose(fitted.rates.numpy(), [0, 0.75, 0.25, 0.5])

    def test_only_the_majority_side_gives(self, fitted):
        low, high = torch.zeros(1, 4), torch.ones(1, 4)
        mask = torch.ones(1, 4, dtype=torch.bool)
        torch.testing.assert_close(fitted(low, mask), torch.tensor([[0.1, 0.0, 0.1, 0.0]]))
        torch.testing.assert_close(fitted(high, mask), torch.tensor([[1.0, 0.9, 1.0, 1.0]]))
        assert torch.equal(fitted(low, ~mask), low)

    def test_the_wrong_side_is_the_other_one(self, fitted):
        wrong = tasks.RobinHood(0.1, wrong_side=True)
        wrong.rates = fitted.rates
        mask = torch.ones(1, 4, dtype=torch.bool)
        torch.testing.assert_close(wrong(torch.zeros(1, 4), mask), torch.tensor([[0.0, 0.1, 0.0, 0.0]]))
        torch.testing.assert_close(wrong(torch.ones(1, 4), mask), torch.tensor([[0.9, 1.0, 0.9, 1.0]]))

    def test_nothing_is_nothing_and_it_commutes_with_mixup(self, fitted):
        none = tasks.RobinHood(0.0)
        none.rates = fitted.rates
        labels, mask = torch.rand(5, 4).round(), torch.ones(5, 4, dtype=torch.bool)
        assert torch.equal(none(labels, mask), labels)
        mixed = 0.3 * labels + 0.7 * labels.flip(0)
        both = 0.3 * fitted(labels, mask) + 0.7 * fitted(labels.flip(0), mask)
        torch.testing.assert_close(fitted(mixed, mask), both)

    def test_gradients_on_the_logit(self, fitted):
        logit = torch.tensor([[-1.0, 0.0, 0.3, 0.0]], requires_grad=True)
        mask = torch.ones(1, 4, dtype=torch.bool)
        for label, wanted in ((0.0, [0.1, 0.0, 0.1, 0.0]), (1.0, [1.0, 0.9, 1.0, 1.0])):
            target = fitted(torch.full((1, 4), label), mask)
            (gradient,) = torch.autograd.grad(losses.BinaryCrossEntropy()(logit, target, mask).sum.sum(), logit)
            torch.testing.assert_close(gradient, logit.detach().sigmoid() - torch.tensor([wanted]))

    def test_the_minimiser_is_its_closed_form(self, fitted):
        eta = 0.3  # share of positives at one x, of a rare output
        labels = torch.cat([torch.ones(3, 4), torch.zeros(7, 4)])
        mean = fitted(labels, torch.ones(10, 4, dtype=torch.bool)).mean(0)
        assert float(mean[0]) == pytest.approx(0.1 + 0.9 * eta)
        assert float(mean[1]) == pytest.approx(0.9 * eta)

    def test_it_has_to_be_fitted(self):
        with pytest.raises(ConfigError, match="fit"):
            tasks.RobinHood()(torch.zeros(1, 1), torch.ones(1, 1, dtype=torch.bool))

    LOSSES = (
        losses.BinaryCrossEntropy(),
        losses.Dice(),
        losses.Dice(per_sample=True),
        losses.Asymmetric(),
        losses.Combined({"bce": losses.BinaryCrossEntropy(), "dice": losses.Dice(per_sample=True)}),
    )

    def test_every_loss_of_action_units_is_listed(self):
        files = (config_directory() / "loss").glob("*.yaml")
        offered = {str(OmegaConf.load(file)["_target_"]).rpartition(".")[2] for file in files}
        assert offered <= {type(loss).__name__ for loss in self.LOSSES}

    @pytest.mark.parametrize("loss", LOSSES, ids=lambda loss: type(loss).__name__)
    def test_it_reaches_every_loss_of_action_units(self, fitted, loss):
        from affect.models.baseline import Baseline

        batch = make_batch(missing=0.0)
        sums = []
        for target in (None, fitted):
            task = make_task(target=target)
            task.loss = loss
            torch.manual_seed(0)
            model = Baseline({"au": task}, TimmEncoder("test_resnet", image_size=32)).eval()
            sums.append(model.training_terms(batch)["au"].sum.sum())
        assert not torch.allclose(*sums)


def test_mixup_changes_the_loss_but_not_what_cells_are_fed():
    model, batch = make(kept=None, mixup=0.4).eval(), make_batch(missing=0.0)
    fed = []
    forced = model.orders.forced
    model.orders.forced = lambda vector, labels, *rest: (fed.append(labels), forced(vector, labels, *rest))[1]  # type: ignore[method-assign]
    seen = []
    cells = model.losses["au"].cells
    model.losses["au"].cells = lambda output, target, mask: (seen.append(target), cells(output, target, mask))[1]
    model.training_step(batch, 0).backward()
    assert torch.equal(fed[0], batch.targets["au"])
    assert ((seen[0] > 0) & (seen[0] < 1)).any()
