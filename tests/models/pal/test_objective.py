# SPDX-License-Identifier: Apache-2.0
"""PAL inside a model: it trains, in every precision; images without landmarks do not count; errors say what to do."""

from __future__ import annotations

import dataclasses
import functools
import re

import numpy as np
import pytest
import pytorch_lightning as pl
import torch
from torch.utils.data import DataLoader

from affect import losses, tasks
from affect.callbacks import EMA
from affect.data.batch import FaceBatch
from affect.data.dataset import FaceDataset
from affect.data.images import Source
from affect.data.table import FaceTable
from affect.data.transforms import FaceTransform
from affect.encoders import TimmEncoder
from affect.errors import ConfigError
from affect.labels import SCHEMES
from affect.losses.privileged_attribution import correlation, privileged_attribution
from affect.models.baseline import Baseline
from affect.models.pal import PrivilegedAttribution

LAYER = "encoder.model.layer3"


def make_batch(size: int = 4) -> FaceBatch:
    torch.manual_seed(0)
    mask = torch.ones(size, 68, dtype=torch.bool)
    mask[-1] = False
    return FaceBatch(
        image=torch.randint(0, 256, (size, 3, 64, 64), dtype=torch.uint8),
        targets={"expression": torch.eye(7)[torch.arange(size) % 7]},
        masks={"expression": torch.ones(size, 7, dtype=torch.bool)},
        points={"68": torch.rand(size, 68, 2) * 40 + 10},
        point_masks={"68": mask},
    )


def make(objective: PrivilegedAttribution | None = None, ready: bool = True, **arguments) -> Baseline:
    torch.manual_seed(0)
    task = tasks.Expression(classes="affectnet7", loss=losses.CrossEntropy(), metrics=[])
    module = Baseline(
        {"expression": task},
        TimmEncoder("test_resnet", image_size=64, **arguments),
        objectives={"pal": objective or PrivilegedAttribution(LAYER)},
        optimizer=functools.partial(torch.optim.SGD, lr=0.1),
    )
    torch.nn.init.normal_(module.head.linear["expression"].weight)  # the default starts close to 0
    if ready:
        module.setup("fit")
    return module


def terms(module, batch):
    outputs = module(batch)
    return module.objectives["pal"](batch, outputs, module.taps)


def test_images_without_landmarks_do_not_count():
    module, batch = make().eval(), make_batch()
    found = terms(module, batch)
    assert found.count.tolist() == [3.0]
    moved = dataclasses.replace(batch, points={"68": batch.points["68"].index_fill(0, torch.tensor([3]), 1e4)})
    torch.testing.assert_close(terms(module, moved).sum, found.sum)


@pytest.mark.parametrize("precision", ["32-true", "bf16-mixed"])
@pytest.mark.parametrize("ema", [False, True])
@pytest.mark.parametrize("kind", ["grad_input", "grad"])
def test_it_has_a_gradient_in_every_precision(precision, ema, kind):
    module = make(PrivilegedAttribution("encoder.model.layer2", kind=kind))
    module.losses["expression"].forward = lambda o, t, m: losses.Terms(o.sum()[None] * 0, o.new_ones(1))
    before = {name: p.detach().clone() for name, p in module.named_parameters()}
    pl.Trainer(
        max_steps=1,
        precision=precision,
        accelerator="cpu",
        logger=False,
        enable_checkpointing=False,
        enable_progress_bar=False,
        enable_model_summary=False,
        callbacks=[EMA()] if ema else [],
    ).fit(module, DataLoader([make_batch()], batch_size=None))
    moved = {name for name, p in module.named_parameters() if not torch.equal(p, before[name])}
    assert any(name.startswith("encoder.model.layer4") for name in moved)
    assert "head.linear.expression.weight" in moved or kind == "grad_input"


@pytest.mark.parametrize("kind", ["grad_input", "grad"])
def test_attribution_and_loss_are_float32_under_mixed_precision(kind):
    batch, half = make_batch(), make(PrivilegedAttribution("encoder.model.layer2", kind=kind)).eval()
    with torch.autocast("cpu", dtype=torch.bfloat16):
        outputs = half(batch)
        assert half.taps["encoder.model.layer2"].dtype == torch.bfloat16, "nothing was mixed, so nothing was tested"
        found, _ = half.objectives["pal"].attribution(batch, outputs, half.taps)
        term = half.objectives["pal"](batch, half(batch), half.taps)
    assert found.dtype == term.sum.dtype == torch.float32
    prior, some = half.objectives["pal"].prior(batch, found.shape[2:])
    exact = privileged_attribution(found.detach().double(), prior.double())[some].sum()
    torch.testing.assert_close(term.sum[0].detach().double(), exact, rtol=1e-5, atol=1e-5)
    (term.sum / term.count).sum().backward()
    gradients = [p.grad for p in half.encoder.model.layer3.parameters() if p.grad is not None]
    assert gradients
    assert all(g.isfinite().all() for g in gradients)
    assert any((g != 0).any() for g in gradients)


def test_a_step_in_mixed_precision_has_the_attribution_of_float32(monkeypatch):
    layer, found = "encoder.model.layer2", {}
    for precise in (True, False):
        monkeypatch.setattr(PrivilegedAttribution, "precise", precise)
        module, batch, seen = make(PrivilegedAttribution(layer)).eval(), make_batch(), {}
        module.log = lambda *arguments, **more: None
        objective, inner = module.objectives["pal"], []

        def note(batch, outputs, taps, objective=objective, seen=seen):
            seen["tap"] = taps[layer]
            seen["found"] = objective.attribution(batch, outputs, taps)[0].detach()
            return type(objective).forward(objective, batch, outputs, taps)

        objective.forward = note
        module.encoder.model.layer1.register_forward_hook(lambda *call, inner=inner: inner.append(call[2].dtype))
        with torch.autocast("cpu", dtype=torch.bfloat16):
            module.training_step(batch, 0).backward()
            assert torch.get_autocast_dtype("cpu") == torch.bfloat16
            assert module(batch)["expression"].isfinite().all()
        assert inner == [torch.bfloat16] * 2, "nothing was mixed, so nothing was tested"
        # The same activation in a network without mixed precision.
        put = seen["tap"].detach().float().requires_grad_()
        module.get_submodule(layer).register_forward_hook(lambda *call, put=put: put)
        logits = module(batch)["expression"]
        exact = torch.autograd.grad(logits.sum(), put)[0] * put.detach()
        found[precise] = float((seen["found"] - exact).norm() / exact.norm())
    assert found[True] < 1e-5
    assert found[False] > 1e-3


def test_a_layer_inside_of_a_block_leaves_its_other_branch_in_half_precision():
    module, kinds = make(PrivilegedAttribution("encoder.model.layer3.0.conv1")), {}
    module.log = lambda *arguments, **more: None
    for name in ("layer2", "layer3", "layer4"):
        module.get_submodule(f"encoder.model.{name}").register_forward_hook(
            lambda layer, inputs, output, name=name: kinds.update({name: output.dtype})
        )
    with torch.autocast("cpu", dtype=torch.bfloat16):
        module.training_step(make_batch(), 0).backward()
    assert kinds == {"layer2": torch.bfloat16, "layer3": torch.float32, "layer4": torch.float32}
    assert all(p.grad is None or p.grad.isfinite().all() for p in module.parameters())


@pytest.mark.parametrize("scheme", ["68", "98"])
def test_priors_lie_where_augmentation_moved_the_landmarks_to(scheme):
    """Images are dark but for a blob at each landmark: whatever moves the image, its brightness is the prior."""
    count, side = 6, 64
    random = np.random.default_rng(0)
    points = random.uniform(12, 52, (count, SCHEMES[scheme].points, 2)).astype(np.float32)
    points[:, :, 1] = points[:, :, 1] * 0.4 + 30  # below the middle, so that turns and flips show
    rows, columns = np.mgrid[:side, :side].astype(np.float32)

    class Blobs:
        def read(self, chosen):
            return [self.draw(row) for row in chosen]

        def draw(self, row):
            away = (columns - points[row, :, 0, None, None]) ** 2 + (rows - points[row, :, 1, None, None]) ** 2
            drawn = np.exp(-away / (2 * 3.0**2)).sum(0)
            return np.repeat((255 * drawn / drawn.max()).astype(np.uint8)[..., None], 3, 2)

    table = FaceTable.from_columns(
        {"image": [f"{k}.png" for k in range(count)], "expression": ["anger", "fear", "surprise"] * 2}
        | {SCHEMES[scheme].column: points.reshape(count, -1)}
    )
    module = make(PrivilegedAttribution(LAYER, scheme=scheme))
    module.tasks["expression"].bind([table])
    transform = FaceTransform(side, flip=0.5, rotation=40, scale=0.2, shift=0.1)
    source = Source("blobs", table, Blobs(), recipe=None)
    batch = FaceDataset([source], [np.arange(count)], module.tasks, transform, (scheme,)).batch(1, np.arange(count))
    assert batch.flipped.any()
    objective = module.objectives["pal"]
    prior, some = objective.prior(batch, (side, side))
    assert some.all()
    seen = batch.image.float().mean(1)
    assert float(correlation(seen[:, None], prior).min()) > 0.95
    unmoved = dataclasses.replace(batch, points={scheme: torch.from_numpy(points)})
    assert float(correlation(seen[:, None], objective.prior(unmoved, (side, side))[0]).max()) < 0.9
    assert not torch.allclose(terms(module.eval(), batch).sum, terms(module, unmoved).sum)


def test_the_label_is_a_score_of_its_own():
    batch = make_batch()
    sums = [terms(make(PrivilegedAttribution(LAYER, score=score)).eval(), batch).sum for score in ("sum", "label")]
    assert not torch.allclose(*sums)
    unlabelled = dataclasses.replace(batch, masks={"expression": torch.zeros(4, 7, dtype=torch.bool)})
    found = terms(make(PrivilegedAttribution(LAYER, score="label")).eval(), unlabelled)
    assert (float(found.sum.detach()), float(found.count)) == (0, 0)


def test_it_trains_towards_the_prior():
    module, batch = make(), make_batch()
    module.eval()
    optimizer = torch.optim.Adam(module.parameters(), 1e-3)
    values = []
    for _ in range(20):
        optimizer.zero_grad()
        term = terms(module, batch)
        (term.sum / term.count).sum().backward()
        optimizer.step()
        values.append(float(term.sum.detach()))
    assert values[-1] < values[0] - 1


def test_prediction_is_the_plain_model():
    with_objective, batch = make().eval(), make_batch()
    with torch.no_grad():
        predicted = with_objective.predict_step(batch)
        assert not with_objective.taps
        plain = Baseline(with_objective.tasks, with_objective.encoder).eval()
        plain.head = with_objective.head
        torch.testing.assert_close(predicted, plain.predict_step(batch))
    assert not any("pal" in name for name in with_objective.release_state())


class TestRefusals:
    def test_a_layer_that_does_not_exist(self):
        with pytest.raises(
            ConfigError, match=r"did you mean encoder\.model\.layer.*\(encoder\.model holds conv1, .*layer4"
        ):
            make(PrivilegedAttribution("encoder.model.layer9"))
        with pytest.raises(ConfigError, match=r"\(the model holds .*encoder"):
            make(PrivilegedAttribution("backbone.layer9"))

    def test_a_layer_without_positions(self):
        with pytest.raises(ConfigError, match="convolutional layer"):
            terms(make(PrivilegedAttribution("encoder")), make_batch())

    def test_a_gradient_without_direction(self):
        module = make(PrivilegedAttribution("encoder.model.layer4", kind="grad"))
        with pytest.raises(ConfigError, match="kind=grad_input"):
            terms(module, make_batch())
        terms(make(PrivilegedAttribution("encoder.model.layer4")), make_batch())

    def test_a_frozen_encoder(self):
        with pytest.raises(ConfigError, match=r"encoder\.trainable=all"):
            terms(make(trainable="none"), make_batch())

    def test_an_unknown_task(self):
        with pytest.raises(ConfigError, match="did you mean expression"):
            terms(make(PrivilegedAttribution(LAYER, task="expresion")), make_batch())

    def test_numbers_that_cannot_be(self):
        for key, value in (("sigma", 0.0), ("weight", -1.0), ("weight", float("nan"))):
            with pytest.raises(ConfigError, match=f"{key}={value}"):
                PrivilegedAttribution(LAYER, **{key: value})

    @pytest.mark.parametrize("key", ["score", "scheme", "kind", "channels", "scale"])
    def test_unknown_options(self, key):
        with pytest.raises(ConfigError, match=key):
            PrivilegedAttribution(LAYER, **{key: "other"})


@pytest.mark.parametrize("weight", [0.0, 1.0])
class TestAttempts:
    @pytest.mark.parametrize(
        ("layer", "message"),
        [
            ("encoder.model", r"never calls layer encoder\.model .*did you mean encoder\.model\."),
            ("head.linear", "never calls layer head"),
            ("losses.expression", "never calls layer losses"),
            ("head", r"layer head gives dict, and a map .*encoder\.model"),
            ("encoder", r"layer encoder gives shape \(4, "),
            ("encoder.model.bn1", r"layer encoder\.model\.bn1 is changed in place .*did you mean encoder\.model\."),
            ("encoder.model.layer3.0.bn2", "changed in place"),
        ],
    )
    def test_a_layer_that_cannot_be_used_is_refused_before_training(self, layer, message, weight):
        module = make(PrivilegedAttribution(layer, weight=weight), ready=False)
        with pytest.raises(ConfigError, match=message) as caught:
            module.attempt_objectives(make_batch())
        if "did you mean" in str(caught.value):  # what is named instead can be used
            other = re.search(r"did you mean (\S+?)( or |\?)", str(caught.value))[1]
            make(PrivilegedAttribution(other, weight=weight), ready=False).attempt_objectives(make_batch())

    def test_a_layer_without_a_part_in_the_logits_is_refused(self, weight):
        module = make(PrivilegedAttribution("beside", weight=weight), ready=False)
        module.beside = torch.nn.Conv2d(3, 4, 1)
        module.encoder.register_forward_hook(
            lambda encoder, inputs, output: (module.beside(inputs[0].float()), output)[1]
        )
        with pytest.raises(ConfigError, match="no part in the logits of expression"):
            module.attempt_objectives(make_batch(1))

    def test_a_layer_that_can_be_used_leaves_everything_as_it_was(self, weight):
        module, batch = make(PrivilegedAttribution(LAYER, weight=weight), ready=False).train(), make_batch()
        state = {name: value.clone() for name, value in module.state_dict().items()}
        hooks = len(module.encoder.model.layer3._forward_hooks)
        torch.manual_seed(3)
        wanted = torch.rand(1)
        torch.manual_seed(3)
        module.attempt_objectives(batch)
        assert torch.equal(torch.rand(1), wanted)
        assert module.training
        assert module.taps == {}
        assert len(module.encoder.model.layer3._forward_hooks) == hooks
        assert all(torch.equal(value, state[name]) for name, value in module.state_dict().items())
        assert all(parameter.requires_grad and parameter.grad is None for parameter in module.parameters())


@pytest.mark.parametrize("layer", ["encoder.model.bn1", "encoder.model.layer3.0.bn2"])
def test_what_a_layer_gave_is_constrained_or_the_step_is_refused(layer):
    module = make(PrivilegedAttribution(layer))
    module.log = lambda *arguments, **more: None
    with pytest.raises(ConfigError, match=r"changed in place .*name the activation"):
        module.training_step(make_batch(), 0)
    with torch.inference_mode():
        module.eval().predict_step(make_batch())  # where nothing is constrained, nothing is refused


def test_a_look_at_a_model_changes_nothing_and_knows_where_landmarks_are():
    module, batch = make(), make_batch()
    module.train()
    before = {name: value.clone() for name, value in module.state_dict().items()}
    maps, found = module.objectives["pal"].look(module, batch)
    assert module.training
    assert module.taps == {}
    assert all(torch.equal(value, before[name]) for name, value in module.state_dict().items())
    assert maps.shape == (4, *maps.shape[1:])
    assert not maps.requires_grad
    assert found.isnan().tolist() == [False, False, False, True]  # the last image has no landmarks
    objective = module.objectives["pal"]
    prior = objective.prior(batch, maps.shape[1:])[0]
    for k in range(3):
        wanted = torch.corrcoef(torch.stack([maps[k].flatten(), prior[k].flatten()]))[0, 1]
        torch.testing.assert_close(found[k], wanted, atol=1e-5, rtol=1e-4)


class TestMeasuring:
    def test_an_objective_of_weight_0_leaves_training_as_it_is(self):
        plain, watched = make(PrivilegedAttribution(LAYER)), make(PrivilegedAttribution(LAYER, weight=0.0))
        del plain.objectives["pal"]
        batch = make_batch()
        for module in (plain, watched):
            module.log = lambda *arguments, **more: None
        losses_found = [module.training_step(batch, 0) for module in (plain, watched)]
        assert torch.equal(*losses_found)
        for loss in losses_found:
            loss.backward()
        for a, b in zip(plain.parameters(), watched.parameters(), strict=True):
            assert torch.equal(a.grad, b.grad)

    def test_correlations_are_those_of_every_image_with_landmarks(self):
        module, batch = make(PrivilegedAttribution(LAYER, weight=0.0)).eval(), make_batch()
        found = module.examine(lambda part: [batch, batch] if part == "test" else None)["objectives"]["pal"]
        assert found["layer"] == LAYER
        for kind in ("grad_input", "grad"):
            other = make(PrivilegedAttribution(LAYER, kind=kind)).eval()
            each = other.objectives["pal"].look(other, batch)[1]
            assert found[kind]["rows"] == 6
            assert each.isnan().tolist() == [False, False, False, True]
            assert found[kind]["correlation"] == pytest.approx(float(each[:3].mean()), abs=1e-5)
        assert not module.training

    def test_a_correlation_that_does_not_exist_is_none(self):
        module, batch = make(PrivilegedAttribution("encoder.model.layer4")).eval(), make_batch()
        unknown = dataclasses.replace(batch, point_masks={"68": torch.zeros(4, 68, dtype=torch.bool)})
        found = module.examine(lambda part: [unknown])["objectives"]["pal"]
        assert found["grad_input"] == {"correlation": None, "rows": 0}
        # Behind the last map there is only an average: its gradient is the same everywhere.
        assert module.examine(lambda part: [batch])["objectives"]["pal"]["grad"]["correlation"] is None

    def test_a_frozen_encoder_is_looked_at_and_stays_frozen(self):
        module = make(PrivilegedAttribution(LAYER, weight=0.0), trainable="none").eval()
        found = module.examine(lambda part: [make_batch()])["objectives"]["pal"]
        assert found["grad_input"]["rows"] == 3
        assert not any(parameter.requires_grad for parameter in module.encoder.parameters())

    def test_shuffled_priors_are_those_of_other_images(self):
        batch = make_batch()
        found = terms(make(PrivilegedAttribution(LAYER, shuffled=True)).eval(), batch)
        rolled = dataclasses.replace(
            batch,
            points={"68": batch.points["68"].roll(1, 0)},
            point_masks={"68": batch.point_masks["68"].roll(1, 0)},
        )
        torch.testing.assert_close(found.sum, terms(make().eval(), rolled).sum)
        assert found.count.tolist() == [3.0]
        assert not torch.allclose(found.sum, terms(make().eval(), batch).sum)

    def test_a_prior_that_is_the_same_everywhere_trains_nothing(self):
        module = make().eval()
        objective = module.objectives["pal"]
        objective.prior = lambda batch, size: (torch.ones(4, *size), torch.ones(4, dtype=torch.bool))
        term = terms(module, make_batch())
        assert float(term.sum.detach()) == pytest.approx(0, abs=1e-4)
        (gradient,) = torch.autograd.grad(term.sum.sum(), module.head.linear["expression"].weight)
        assert float(gradient.abs().max()) < 1e-4
