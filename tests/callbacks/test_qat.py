# SPDX-License-Identifier: Apache-2.0
"""Training with quantized weights and activations: labels and privileged attribution, averages, resume, release."""

from __future__ import annotations

import dataclasses
import functools
import json
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import pytorch_lightning as pl
import torch
from omegaconf import DictConfig, OmegaConf
from pytorch_lightning.callbacks import Checkpoint
from torch.nn.utils import parametrize
from torch.utils.data import DataLoader

from affect.callbacks import EMA, QuantizationAwareTraining
from affect.commands import evaluate, figures, train
from affect.errors import CheckpointError, ConfigError
from affect.models.base import AffectModule
from affect.models.pal import PrivilegedAttribution
from affect.release import build_model, build_tasks, read_release
from tests.conftest import SMALL
from tests.quantization import models

BINARY = {"weights": "binary", "modules": ["all"], "outer": "same"}
INT8 = {"weights": 8, "activations": 8}
LOW = {"weights": 2, "activations": 2, "outer": "same"}


def fit(module: AffectModule, *callbacks: pl.Callback, steps: int = 4, epochs: int = 2, **arguments: Any) -> pl.Trainer:
    batches = [models.batch(8, seed=seed) for seed in range(steps)]
    trainer = pl.Trainer(
        max_epochs=epochs,
        accelerator="cpu",
        logger=False,
        enable_checkpointing=False,
        enable_progress_bar=False,
        enable_model_summary=False,
        num_sanity_val_steps=0,
        callbacks=list(callbacks),
        **arguments,
    )
    loader = DataLoader(batches, batch_size=None)  # type: ignore[arg-type]
    trainer.fit(module, loader, DataLoader(batches[:1], batch_size=None))  # type: ignore[arg-type]
    return trainer


# ----------------------------------------------------------------------------------------- labels and attribution


@pytest.mark.parametrize("how", [BINARY, LOW], ids=["weights", "activations"])
def test_monet_predicts_the_same_whatever_labels_are_in_the_batch(how: dict) -> None:
    if "activations" in how:
        pytest.importorskip("torchao")
    module = models.monet()
    fit(module, QuantizationAwareTraining(**how), steps=2, epochs=1)
    module.eval()
    batch = models.batch()
    other = dataclasses.replace(
        batch,
        targets={"au": 1 - batch.targets["au"]},
        masks={"au": torch.zeros_like(batch.masks["au"])},
    )
    with torch.no_grad():
        assert torch.equal(module(batch)["au"], module(other)["au"])
        assert not torch.equal(module(batch)["au"][0], module(batch)["au"][1])


def with_landmarks(size: int = 4) -> Any:
    batch = models.batch(size)
    points = torch.rand(size, 68, 2, generator=torch.Generator().manual_seed(0)) * models.SIDE
    return dataclasses.replace(batch, points={"68": points}, point_masks={"68": torch.ones(size, 68, dtype=torch.bool)})


def constrained(layer: str) -> AffectModule:
    return models.baseline(objectives={"pal": PrivilegedAttribution(layer, task="au")})


def test_privileged_attribution_trains_quantized_weights_below_its_layer() -> None:
    module = constrained("encoder.model.1")
    QuantizationAwareTraining(**BINARY).wrap(module)
    module.setup("fit")
    batch = with_landmarks()
    term = module.objectives["pal"](batch, module(batch), module.taps)
    term.sum.sum().backward()
    for layer in module.encoder.model:  # type: ignore[union-attr]
        gradient = layer[0].parametrizations["weight"].original.grad
        assert gradient is not None
        assert gradient.abs().sum() > 0


def test_privileged_attribution_inside_a_captured_encoder_is_refused() -> None:
    with pytest.raises(ConfigError, match=r"objective pal taps encoder\.model\.0, which lies inside of encoder"):
        QuantizationAwareTraining(**INT8).wrap(constrained("encoder.model.0"))


def test_other_precisions_are_refused_for_activations() -> None:
    with pytest.raises(ConfigError, match=r"trainer\.precision=bf16-mixed: the grids of activations need float32"):
        fit(models.baseline(), QuantizationAwareTraining(**INT8), precision="bf16-mixed")


def test_a_captured_encoder_is_not_compiled_too() -> None:
    config = OmegaConf.create({"compile": {"encoder": True}})

    def quantized(how: dict) -> AffectModule:
        trainer: Any = SimpleNamespace(callbacks=[QuantizationAwareTraining(**how)], precision="32-true")
        train.quantize(config, module := models.baseline(), trainer)
        return module

    with pytest.raises(ConfigError, match=r"compile\.encoder=true: .* is a captured graph already; set"):
        quantized(INT8)
    assert quantized(BINARY).quantization is not None


def test_weights_train_in_bfloat16() -> None:
    module = models.baseline()
    fit(module, QuantizationAwareTraining(**BINARY), precision="bf16-mixed", epochs=1)
    assert all(torch.isfinite(p).all() for p in module.parameters())


@pytest.mark.parametrize(
    "arguments", [{"freeze_norms": -1}, {"freeze_observers": 1.5, **INT8}, {"freeze_observers": 1}]
)
def test_epochs_that_are_none_are_refused(arguments: dict) -> None:
    with pytest.raises(ConfigError, match=r"callbacks\.qat\.freeze_"):
        QuantizationAwareTraining(**arguments)


# ---------------------------------------------------------------------------------------------- while it trains


class Watch(pl.Callback):
    """Notes what validation predicted and which state it saw."""

    def __init__(self) -> None:
        self.seen: list[Any] = []

    def on_validation_batch_end(self, trainer: pl.Trainer, pl_module: pl.LightningModule, *arguments: Any) -> None:
        weight = pl_module.get_submodule("encoder.model.1.0").weight
        self.seen.append(len(weight[0].unique()))  # type: ignore[index]


def test_validation_sees_quantized_weights_also_those_of_an_average() -> None:
    module, watch, ema = models.baseline(), Watch(), EMA(decay=0.5)
    fit(module, QuantizationAwareTraining(**BINARY), ema, watch)
    assert watch.seen == [2, 2]
    weight = module.get_submodule("encoder.model.1.0")
    assert parametrize.is_parametrized(weight)
    assert len(weight.weight[0].unique()) == 2  # type: ignore[index]


@pytest.mark.parametrize("how", [INT8, LOW], ids=["int8", "w2a2"])
def test_an_average_of_a_captured_encoder_has_steps_of_its_own_ranges(how: dict) -> None:
    pytest.importorskip("torchao")
    module = models.baseline()
    fit(module, QuantizationAwareTraining(**how), EMA(decay=0.5))
    module.eval()
    state = {name: value for name, value in module.state_dict().items() if value.is_floating_point()}
    assert all(torch.isfinite(value).all() for value in state.values())
    with torch.no_grad():
        module(models.batch())
    for name, quantizer in module.encoder.quantizers():  # type: ignore[union-attr, operator]
        if not isinstance(quantizer.scale, torch.nn.Parameter):
            torch.testing.assert_close(quantizer.scale, quantizer.calculate_qparams()[0], msg=name)


class States(pl.Callback):
    """Keeps the state behind each epoch."""

    def __init__(self) -> None:
        self.epochs: list[dict[str, torch.Tensor]] = []

    def on_train_epoch_end(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        self.epochs.append({name: value.clone() for name, value in pl_module.state_dict().items()})

    def moved(self, ending: str, one: int, other: int) -> bool:
        """Return whether a tensor whose name ends so differs between two epochs."""
        names = [name for name in self.epochs[0] if name.endswith(ending)]
        assert names
        return any(not torch.equal(self.epochs[one][name], self.epochs[other][name]) for name in names)


@pytest.mark.parametrize(("how", "kind"), [(INT8, "max_val"), (LOW, "scale")], ids=["int8", "w2a2"])
def test_norms_and_observers_freeze_at_their_epoch_and_not_before(how: dict, kind: str) -> None:
    pytest.importorskip("torchao")
    module, states = models.baseline(), States()
    fit(module, QuantizationAwareTraining(**how, freeze_norms=3, freeze_observers=2), states, epochs=4)
    assert states.moved(kind, 0, 1)  # also behind a validation
    assert not states.moved(kind, 2, 3)
    assert states.moved("running_mean", 1, 2)
    assert not states.moved("running_mean", 2, 3)
    assert states.moved("0.weight", 2, 3)
    frozen = [name for name, _ in module.encoder.quantizers()]  # type: ignore[union-attr, operator]
    assert not any(states.moved(f"{name}.scale", 2, 3) for name in frozen)


def test_norms_of_a_model_with_quantized_weights_freeze_too() -> None:
    module = models.baseline()
    fit(module, QuantizationAwareTraining(**BINARY, freeze_norms=0))
    plain = models.baseline()
    for name, value in plain.state_dict().items():
        if "running" in name:
            assert torch.equal(module.state_dict()[name], value)


# --------------------------------------------------------------------------------------------- whole runs

RUN = (
    *(override for override in SMALL if not override.startswith("encoder")),
    "encoder=plain_convolutions",
    "encoder.image_size=16",
    "encoder.widths=[8,16]",
    "encoder.output=vector",
    "task=[au]",
    "data.limit=16",
    "trainer.max_epochs=2",
    "bootstrap.resamples=0",
    "callbacks.last.every_n_steps=1",
)
KINDS = {
    "binary": ("callbacks=[qat,ema,default]", "callbacks.qat.weights=binary", "callbacks.qat.modules=[all]"),
    "int8": ("callbacks=[default,ema,qat_int8]", "callbacks.qat.freeze_observers=1"),
    "w2a2": ("callbacks=[default,qat]", "callbacks.qat.weights=2", "callbacks.qat.activations=2"),
}


@pytest.fixture
def tiny(compose: Callable[..., DictConfig], tmp_path: Path) -> Callable[..., DictConfig]:
    """Return a function that gives the config of a run of seconds in ``tmp_path/run``."""
    paths = (f"paths.output={tmp_path / 'run'}", f"paths.cache={tmp_path / 'cache'}")
    return lambda *overrides: compose("train", *RUN, *paths, *overrides)


@pytest.fixture(autouse=True)
def _no_figures(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(figures, "write_run_figures", lambda *arguments: None)


class _InterruptedError(Exception):
    pass


class _Interrupt(Checkpoint):  # Lightning runs this kind last, after last.ckpt was written
    def __init__(self, step: int) -> None:
        self.step = step

    def on_train_batch_end(self, trainer: pl.Trainer, *arguments: Any) -> None:
        if trainer.global_step == self.step:
            raise _InterruptedError


def outcome(folder: Path) -> tuple[dict[str, torch.Tensor], Any]:
    results = json.loads((folder / "results.json").read_text())
    kept = {key: results[key] for key in ("metrics", "selection", "history")}
    return read_release(folder).state, kept


@pytest.mark.parametrize(
    "kind", ["binary", pytest.param("int8", marks=pytest.mark.slow), pytest.param("w2a2", marks=pytest.mark.slow)]
)
@pytest.mark.parametrize(
    "steps", [(2, 5), pytest.param((2,), marks=pytest.mark.slow), pytest.param((5,), marks=pytest.mark.slow)], ids=str
)
def test_a_run_that_was_interrupted_ends_as_if_it_had_not_been(
    kind: str, steps: tuple[int, ...], tiny: Callable[..., DictConfig], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    if kind != "binary":
        pytest.importorskip("torchao")
    whole, other = (tiny(*KINDS[kind], f"paths.output={tmp_path / name}") for name in ("whole", "other"))
    train.run(whole)
    build = train.build_trainer

    def interrupted(step: int, *arguments: Any) -> pl.Trainer:
        trainer = build(*arguments)
        trainer.callbacks.append(_Interrupt(step))  # type: ignore[attr-defined]
        return trainer

    for step in steps:
        monkeypatch.setattr(train, "build_trainer", functools.partial(interrupted, step))
        with pytest.raises(_InterruptedError):
            train.run(other)
    monkeypatch.setattr(train, "build_trainer", build)
    train.run(other)
    (ours, kept), (theirs, wanted) = outcome(tmp_path / "other"), outcome(tmp_path / "whole")
    assert models.same(ours, theirs)
    assert json.dumps(kept) == json.dumps(wanted)


@pytest.mark.parametrize("kind", ["binary", "int8", pytest.param("w2a2", marks=pytest.mark.slow)])
def test_run_and_release_are_evaluated_alike(
    kind: str, tiny: Callable[..., DictConfig], compose: Callable[..., DictConfig], tmp_path: Path
) -> None:
    if kind != "binary":
        pytest.importorskip("torchao")
    train.run(tiny(*KINDS[kind]))
    run = tmp_path / "run"
    stored = json.loads((run / "results.json").read_text())
    assert stored["quantization"]["quantized_weights"] > 0
    assert stored["quantization"]["bytes"] < stored["quantization"]["float_bytes"]
    found = []
    for folder in (run, run / "release"):
        evaluate.run(compose("evaluate", f"checkpoint={folder}", "data.num_workers=0", "bootstrap.resamples=0"))
        paths = sorted(run.rglob("evaluate/*/results.json"), key=lambda path: path.stat().st_mtime)
        found.append(json.loads(paths[-1].read_text())["metrics"])
    first, second = (next(iter(metrics.values())) if isinstance(metrics, dict) else metrics for metrics in found)
    assert first == second
    values = {(r["task"], r["name"]): r["value"] for r in stored["metrics"]["test"]}
    assert {(r["task"], r["name"]): r["value"] for r in first} == values


def test_a_release_that_names_another_quantizer_is_refused(tiny: Callable[..., DictConfig], tmp_path: Path) -> None:
    import yaml

    train.run(tiny(*KINDS["binary"], "trainer.max_epochs=1"))
    path = tmp_path / "run" / "release" / "config.yaml"
    text = path.read_text()

    def build() -> None:
        release = read_release(tmp_path / "run")
        build_model(release, build_tasks(release))

    def refused(change: Callable[[dict], None], message: str) -> None:
        config = yaml.safe_load(text)
        change(config["quantization"])
        path.write_text(yaml.safe_dump(config))
        with pytest.raises(CheckpointError, match=message):
            build()

    refused(lambda node: node.update(_target_="os.system"), "not on the list of classes")
    refused(lambda node: node.update(_target_="affect.quantization.WeightQuantizer"), "quantization")
    refused(lambda node: node.update(weights="${oc.env:HOME}"), "interpolation")
    refused(lambda node: node.update(weights="most"), "qat.weights=most")
    refused(lambda node: node.update(modules=["encoder"]), "does not fit its config")
    refused(lambda node: node.update(root="x"), "quantization: .*root")


@pytest.mark.slow
def test_a_float_run_starts_a_quantized_one_and_the_other_way_round(
    tiny: Callable[..., DictConfig], tmp_path: Path
) -> None:
    first, second, third = (tmp_path / name for name in ("float", "quantized", "again"))
    train.run(tiny("trainer.max_epochs=1", f"paths.output={first}"))
    train.run(tiny(*KINDS["binary"], "trainer.max_epochs=1", f"init={first}", f"paths.output={second}"))
    train.run(tiny("trainer.max_epochs=1", f"init={second}", f"paths.output={third}"))
    for folder in (second, third):
        taken = json.loads((folder / "results.json").read_text())["initial_weights"]["init"]
        assert taken["tensors"]["new"] == taken["tensors"]["dropped"] == 0
