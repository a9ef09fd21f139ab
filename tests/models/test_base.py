# SPDX-License-Identifier: Apache-2.0
"""The base module: terms over valid cells, weighting, objectives and taps, parameter groups, logging."""

from __future__ import annotations

import copy
import functools

import pytest
import pytorch_lightning as pl
import torch
from torch import Tensor, nn

from affect import losses, metrics, optimization, tasks
from affect.callbacks import EMA, BestWeights, History, LastCheckpoint
from affect.data.batch import FaceBatch
from affect.encoders import TimmEncoder
from affect.errors import ConfigError
from affect.losses.base import Terms
from affect.models.base import AffectModule, Objective
from affect.models.baseline import Baseline

SGD = functools.partial(torch.optim.SGD, lr=0.1)


def make_tasks() -> dict[str, tasks.Task]:
    made: dict[str, tasks.Task] = {
        "au": tasks.AUOccurrence(aus=[1, 2], loss=losses.BinaryCrossEntropy(), metrics=[metrics.F1()], score="f1/mean"),
        "valence_arousal": tasks.ValenceArousal(loss=losses.MSE(), metrics=[metrics.CCC()], score="ccc/mean", weight=2),
        "landmarks": tasks.Landmarks("5", loss=losses.SmoothL1(), metrics=[metrics.AlignmentError("5")]),
    }
    for task in made.values():
        for metric in task.metrics:
            metric.bind(task.outputs)
    return made


def make_batch(size: int = 4, seed: int = 0) -> FaceBatch:
    generator = torch.Generator().manual_seed(seed)
    targets = {
        "au": torch.randint(0, 2, (size, 2), generator=generator).float(),
        "valence_arousal": torch.rand(size, 2, generator=generator) * 2 - 1,
        "landmarks": torch.rand(size, 5, 2, generator=generator),
    }
    masks = {name: torch.rand(t.shape[:2], generator=generator) > 0.3 for name, t in targets.items()}
    image = torch.randint(0, 256, (size, 3, 32, 32), dtype=torch.uint8, generator=generator)
    return FaceBatch(image=image, targets=targets, masks=masks)


def make_module(**arguments: object) -> Baseline:
    torch.manual_seed(0)
    return Baseline(make_tasks(), TimmEncoder("test_resnet"), optimizer=SGD, **arguments)  # type: ignore[arg-type]


class Repeat:
    """A loader of fixed batches."""

    def __init__(self, batches: list[FaceBatch]) -> None:
        self.batches = batches

    def __len__(self) -> int:
        return len(self.batches)

    def __iter__(self):
        return iter(self.batches)


def trainer(tmp_path, callbacks: list | None = None, **arguments: object) -> pl.Trainer:
    return pl.Trainer(
        accelerator="cpu",
        logger=False,
        enable_progress_bar=False,
        enable_model_summary=False,
        default_root_dir=tmp_path,
        callbacks=[*(callbacks or []), LastCheckpoint(tmp_path)],
        num_sanity_val_steps=0,
        **{"max_epochs": 1, **arguments},  # type: ignore[arg-type]
    )


def test_the_total_is_the_weighed_mean_over_valid_cells() -> None:
    module, batch = make_module(), make_batch()
    module.eval()
    total = module.training_step(batch, 0)
    outputs = module(batch)
    mask, target = batch.masks["au"], batch.targets["au"]
    au = nn.functional.binary_cross_entropy_with_logits(outputs["au"], target, reduction="none")[mask].mean()
    mask, target = batch.masks["valence_arousal"], batch.targets["valence_arousal"]
    affect = ((outputs["valence_arousal"] - target) ** 2)[mask].mean()
    mask, target = batch.masks["landmarks"], batch.targets["landmarks"]
    term = module.losses["landmarks"](outputs["landmarks"], target, mask)
    points = term.sum.sum() / term.count.sum()
    assert torch.allclose(total, au + 2 * affect + points, atol=1e-6)


def test_a_batch_without_labels_gives_zero_with_a_graph() -> None:
    module, batch = make_module(), make_batch()
    empty = FaceBatch(batch.image, batch.targets, {name: torch.zeros_like(mask) for name, mask in batch.masks.items()})
    total = module.training_step(empty, 0)
    total.backward()
    assert total.item() == 0
    assert all(p.grad is None or not p.grad.any() for p in module.parameters())


def test_only_losses_see_transformed_targets() -> None:
    module, batch = make_module(), make_batch()
    module.eval()
    plain = module.task_terms(module(batch), batch)["au"].sum
    module.tasks["au"].target = tasks.UniformSmoothing(0.3)
    before = batch.targets["au"].clone()
    smoothed = module.task_terms(module(batch), batch)["au"].sum
    assert not torch.allclose(plain, smoothed)
    assert torch.equal(batch.targets["au"], before)


def test_outputs_do_not_depend_on_other_images_of_the_batch_in_evaluation() -> None:
    module, batch = make_module().eval(), make_batch()
    alone = module.predict_step(FaceBatch(batch.image[:1], {}, {}))
    together = module.predict_step(batch)
    for name, value in alone.items():
        assert torch.allclose(value[0], together[name][0], atol=1e-6)


class Activation(Objective):
    """Mean square of a tapped activation."""

    def __init__(self, layer: str) -> None:
        super().__init__()
        self.layers = (layer,)

    def forward(self, batch: object, outputs: dict[str, Tensor], taps: dict[str, Tensor]) -> Terms:
        tapped = taps[self.layers[0]]
        return Terms(tapped.square().mean((1, 2, 3)).sum()[None], tapped.new_tensor([len(tapped)]))


def test_an_objective_reaches_the_layers_below_its_tap() -> None:
    layer = "encoder.model.layer2"
    module = make_module(objectives={"activation": Activation(layer)})
    module.setup("fit")
    batch = make_batch()
    empty = FaceBatch(batch.image, batch.targets, {name: torch.zeros_like(mask) for name, mask in batch.masks.items()})
    module.training_step(empty, 0).backward()
    names = {n for n, p in module.named_parameters() if p.grad is not None and p.grad.abs().sum() > 0}
    assert any(name.startswith("encoder.model.layer1") for name in names)
    assert not any(name.startswith(("head", "encoder.model.layer4")) for name in names)
    assert not module.taps


@pytest.mark.parametrize("written", ["encoder.model.layr2", "layr2"])
def test_a_tap_on_a_layer_that_does_not_exist_names_the_near_ones(written: str) -> None:
    module = make_module(objectives={"activation": Activation(written)})
    with pytest.raises(ConfigError, match=rf"no layer '{written}'; did you mean .*encoder.model.layer2"):
        module.setup("fit")


def test_parameter_groups_hold_every_trainable_parameter_once() -> None:
    module = make_module(encoder_lr_scale=0.1, layer_decay=0.5)
    groups = module.parameter_groups()
    held = [id(parameter) for group in groups for parameter in group["params"]]
    assert len(held) == len(set(held))
    assert set(held) == {id(p) for p in module.parameters() if p.requires_grad}
    scale = {id(p): group["lr_scale"] for group in groups for p in group["params"]}
    layers = module.encoder.layer_index()
    last = max(layers.values())
    for name, parameter in module.encoder.model.named_parameters():
        assert scale[id(parameter)] == pytest.approx(0.1 * 0.5 ** (last - layers[name]))
    assert all(scale[id(p)] == 1 for p in module.head.parameters())
    for group in groups:
        assert ("weight_decay" in group) == (group["params"][0].ndim <= 1)


def test_what_an_architecture_excludes_gets_no_weight_decay() -> None:
    torch.manual_seed(0)
    module = Baseline(make_tasks(), TimmEncoder("test_vit"), optimizer=SGD)
    held = dict(module.encoder.model.named_parameters())
    excluded = [held[name] for name in module.encoder.model.no_weight_decay() if name in held]
    assert any(parameter is held["pos_embed"] for parameter in excluded)
    decay = {id(p): group.get("weight_decay") for group in module.parameter_groups() for p in group["params"]}
    assert all(decay[id(parameter)] == 0.0 for parameter in excluded)


@pytest.mark.parametrize(("schedule", "rate"), [(torch.optim.lr_scheduler.StepLR, 0.1), (optimization.polynomial, 0.0)])
def test_schedules_advance_per_epoch_unless_they_know_the_steps(tmp_path, schedule, rate) -> None:
    arguments = {"step_size": 2} if schedule is torch.optim.lr_scheduler.StepLR else {}
    module = make_module(scheduler=functools.partial(schedule, **arguments))
    run = trainer(tmp_path)
    run.fit(module, Repeat([make_batch() for _ in range(4)]))
    assert run.optimizers[0].param_groups[0]["lr"] == pytest.approx(rate)


def test_an_objective_with_the_name_of_a_task_is_refused() -> None:
    with pytest.raises(ConfigError, match=r"objectives\.au: a task has this name"):
        make_module(objectives={"au": Activation("encoder.model.layer2")})


def test_validation_and_prediction_keep_no_activation() -> None:
    module = make_module(objectives={"activation": Activation("encoder.model.layer2")}).eval()
    module.setup("fit")
    module.predict_step(make_batch())
    assert not module.taps
    module.validation_step(make_batch(), 0)
    assert not module.taps


def test_a_linear_probe_trains_the_heads_alone() -> None:
    torch.manual_seed(0)
    module = Baseline(make_tasks(), TimmEncoder("test_resnet", trainable="none"), optimizer=SGD)
    held = {id(p) for group in module.parameter_groups() for p in group["params"]}
    assert held == {id(p) for p in module.head.parameters()}


def test_logged_metrics_are_those_of_all_validation_samples(tmp_path) -> None:
    module, history = make_module(), History()
    batches = [make_batch(4, 1), make_batch(3, 2)]
    trainer(tmp_path, [history]).fit(module, Repeat([make_batch()]), Repeat(batches))
    module.eval()
    with torch.no_grad():
        logits = torch.cat([module(batch)["au"] for batch in batches])
    target = torch.cat([batch.targets["au"] for batch in batches])
    mask = torch.cat([batch.masks["au"] for batch in batches])
    metric = metrics.F1()
    metric.bind(["AU1", "AU2"])
    expected = metric.score(logits.sigmoid(), target, mask)
    for name, value in expected.items():
        assert history.epochs[0][f"val/au/{name}"] == pytest.approx(float(value))
    both = [history.epochs[0]["val/au/f1/mean"], history.epochs[0]["val/valence_arousal/ccc/mean"]]
    assert history.epochs[0]["val/score"] == pytest.approx(sum(both) / 2)
    assert history.epochs[0]["train/au/loss"] > 0


def test_a_score_that_no_metric_gives_is_refused(tmp_path) -> None:
    module = make_module()
    module.tasks["au"].score = "f1/meen"
    with pytest.raises(ConfigError, match=r"task.au.score=f1/meen: no such metric; did you mean .*f1/mean"):
        trainer(tmp_path).fit(module, Repeat([make_batch()]), Repeat([make_batch()]))


def test_best_weights_are_those_of_the_best_epoch_and_averaged_with_ema(tmp_path) -> None:
    from safetensors.torch import load_file

    class Watch(pl.Callback):
        """Keeps the weights that each validation saw."""

        def __init__(self) -> None:
            self.seen: list[dict[str, Tensor]] = []
            self.scores: list[float] = []

        def on_validation_epoch_end(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
            self.seen.append(copy.deepcopy(pl_module.release_state()))

        def on_validation_end(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
            self.scores.append(pl_module.last_validation["val/score"])

    module, watch = make_module(), Watch()
    best = BestWeights(tmp_path, "val/score")
    ema = EMA(decay=0.5)
    run = trainer(tmp_path, [best, watch, ema], max_epochs=4)
    run.fit(module, Repeat([make_batch(8, k) for k in range(3)]), Repeat([make_batch(8, 9)]))
    chosen = max(range(4), key=lambda k: (watch.scores[k], -k))
    assert best.epoch == chosen
    held = load_file(tmp_path / "best.safetensors")
    assert held.keys() == watch.seen[chosen].keys()
    assert all(torch.equal(held[name], value) for name, value in watch.seen[chosen].items())
    raw = torch.load(tmp_path / "last.ckpt", weights_only=True)["current_model_state"]
    assert any(not torch.equal(raw[name], value) for name, value in watch.seen[3].items())


def test_uncertainties_in_results_are_those_of_the_chosen_epoch(tmp_path) -> None:
    from types import SimpleNamespace

    from affect.commands.train import select_weights
    from affect.models.weighting import UncertaintyWeighting

    class Falling(pl.Callback):
        """Makes the first epoch the best one, and notes what the weighting has learnt by each."""

        def __init__(self) -> None:
            self.sigmas: list[dict] = []

        def on_validation_end(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
            pl_module.last_validation["val/score"] = -float(trainer.current_epoch)
            self.sigmas.append(pl_module.findings()["weighting"]["sigma"])

    module, falling = make_module(weighting=UncertaintyWeighting(lr=0.1)), Falling()
    best, history = BestWeights(tmp_path, "val/score"), History()
    run = trainer(tmp_path, [falling, best, history], max_epochs=2)
    run.fit(module, Repeat([make_batch(8, k) for k in range(3)]), Repeat([make_batch(8, 9)]))
    assert falling.sigmas[0] != falling.sigmas[1] == module.findings()["weighting"]["sigma"]
    continued = BestWeights(tmp_path, "val/score")
    continued.load_state_dict(best.state_dict())
    config = SimpleNamespace(selection="best_val", monitor="val/score")
    chosen = select_weights(config, SimpleNamespace(callbacks=[continued]), module, history, tmp_path)  # type: ignore[arg-type]
    assert chosen["epoch"] == 0
    assert module.findings()["weighting"]["sigma"] == falling.sigmas[0]


def test_a_monitor_that_is_not_logged_names_the_near_ones(tmp_path) -> None:
    best = BestWeights(tmp_path, "val/scor")
    with pytest.raises(ConfigError, match=r"monitor=val/scor: not among the logged values; did you mean val/score"):
        trainer(tmp_path, [best]).fit(make_module(), Repeat([make_batch()]), Repeat([make_batch()]))


def test_release_state_holds_what_prediction_needs_and_no_more() -> None:
    module, batch = make_module().eval(), make_batch()
    state = {name: value.clone() for name, value in module.release_state().items()}
    assert all(name.startswith(("encoder.", "head.")) for name in state)
    torch.manual_seed(5)
    other = Baseline(make_tasks(), TimmEncoder("test_resnet"))
    other.load_release_state(state)
    for name, value in module.predict_step(batch).items():
        assert torch.equal(other.eval().predict_step(batch)[name], value)
    del state["head.linear.au.bias"]
    with pytest.raises(RuntimeError, match="missing tensors"):
        other.load_release_state(state)


def test_a_model_needs_a_task() -> None:
    with pytest.raises(ConfigError, match="at least one task"):
        AffectModule({})


class TestMixup:
    @staticmethod
    def make(**arguments: object) -> Baseline:
        made = make_tasks()
        made.pop("landmarks")
        torch.manual_seed(0)
        return Baseline(made, TimmEncoder("test_resnet"), optimizer=SGD, mixup=0.4, **arguments)  # type: ignore[arg-type]

    def test_images_and_labels_are_mixed_alike(self) -> None:
        module, batch = self.make(), make_batch(16)
        mixed = module._mix(batch)
        share, partner = module._mixed
        assert ((share > 0) & (share < 1)).all()
        wanted = share.view(-1, 1, 1, 1) * batch.image + (1 - share.view(-1, 1, 1, 1)) * batch.image[partner]
        assert (mixed.image - wanted).abs().max() <= 0.5
        target, mask = module.loss_targets("au", mixed)
        both = batch.masks["au"] & batch.masks["au"][partner]
        assert torch.equal(mask, both)
        labels = share * batch.targets["au"] + (1 - share) * batch.targets["au"][partner]
        torch.testing.assert_close(target[both], labels[both])
        assert (target[~both] == 0).all()

    def test_smoothing_comes_after_it(self) -> None:
        made = make_tasks()
        made.pop("landmarks")
        made["au"].target = tasks.UniformSmoothing(0.2)
        module = Baseline(made, TimmEncoder("test_resnet"), mixup=0.4)
        batch = make_batch(16)
        module._mix(batch)
        share, partner = module._mixed
        target, mask = module.loss_targets("au", batch)
        labels = share * batch.targets["au"] + (1 - share) * batch.targets["au"][partner]
        torch.testing.assert_close(target[mask], (0.8 * labels + 0.1)[mask])

    def test_it_acts_in_training_alone(self) -> None:
        module, batch = self.make(), make_batch(8)
        seen = []
        module.encoder.register_forward_hook(lambda _, inputs, __: seen.append(inputs[0]))
        torch.manual_seed(1)
        module.training_step(batch, 0).backward()
        module.validation_step(batch, 0)
        assert not torch.equal(seen[0], batch.image)
        assert torch.equal(seen[1], batch.image)
        assert module._mixed is None

    def test_a_step_decides(self) -> None:
        losses_of = []
        for _ in range(2):
            module = self.make().eval()
            torch.manual_seed(7)
            losses_of.append(float(module.training_step(make_batch(8), 0).detach()))
        assert losses_of[0] == losses_of[1]

    def test_points_are_not_mixed(self) -> None:
        with pytest.raises(ConfigError, match="points of two faces"):
            make_module(mixup=0.4)
        with pytest.raises(ConfigError, match="more than 0"):
            self.make() and Baseline({"au": make_tasks()["au"]}, TimmEncoder("test_resnet"), mixup=0.0)
