# SPDX-License-Identifier: Apache-2.0
"""A run that is killed at any moment and started again ends bit-identical to one that was left alone."""

from __future__ import annotations

import json
import multiprocessing
import os
import signal
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from safetensors.torch import load_file

from tests.conftest import SMALL

EPOCHS, STEPS = 3, 5
SETTINGS = (
    *SMALL,
    "callbacks=[default,ema]",
    "callbacks.ema.decay=0.8",
    "callbacks.last.every_n_steps=2",
    "model.dropout=0.3",
    "data.limit=20",
    f"trainer.max_epochs={EPOCHS}",
    "bootstrap.resamples=0",
)
TEN = sorted(np.random.default_rng(0).choice(np.arange(1, EPOCHS * STEPS + 1), 10, replace=False).tolist())


def _config(folder: Path) -> Any:
    from affect.commands.configuration import compose

    return compose("train", [*SETTINGS, f"paths.output={folder}", f"paths.cache={folder.parent / 'cache'}"])


def _train(folder: Path) -> None:
    """Train in a process of its own, from the start or from where an earlier one was killed."""
    torch.set_num_threads(1)
    from affect.commands import figures, train

    figures.write_run_figures = lambda *arguments: None  # figures cost time and change nothing
    train.run(_config(folder))


def _kill_after(step: int) -> None:
    """Let the next training kill this process after ``step`` optimiser steps."""
    import pytorch_lightning as pl

    from affect.commands import train

    class Kill(pl.callbacks.Checkpoint):  # Lightning runs this kind last, after last.ckpt was written
        def on_train_batch_end(self, trainer: pl.Trainer, *arguments: Any) -> None:
            if trainer.global_step == step:
                os.kill(os.getpid(), signal.SIGKILL)

    build = train.build_trainer

    def with_kill(*arguments: Any) -> pl.Trainer:
        trainer = build(*arguments)
        trainer.callbacks.append(Kill())
        return trainer

    train.build_trainer = with_kill


def _train_until(folder: Path, step: int) -> None:
    """Train and kill the process after ``step`` optimiser steps."""
    _kill_after(step)
    _train(folder)


def _train_until_write(folder: Path, write: int) -> None:
    """Train and kill the process in the middle of the ``write``-th checkpoint."""
    save, count = torch.save, 0

    def half(checkpoint: object, file: Any) -> None:
        nonlocal count
        count += 1
        if count < write:
            save(checkpoint, file)
            return
        file.write(b"PK half of a checkpoint")
        file.flush()
        os.kill(os.getpid(), signal.SIGKILL)

    torch.save = half
    _train(folder)


def _run(target: Callable[..., None], *arguments: object) -> int:
    context = multiprocessing.get_context("forkserver")
    context.set_forkserver_preload(["affect.commands.train", "albumentations", "tests.commands.test_resume"])
    process = context.Process(target=target, args=arguments)
    process.start()
    process.join(240)
    assert process.exitcode is not None, "the run hangs"
    return process.exitcode


def _outcome(folder: Path) -> tuple[dict[str, torch.Tensor], dict[str, torch.Tensor], dict[str, Any]]:
    results = json.loads((folder / "results.json").read_text())
    last = torch.load(folder / "last.ckpt", weights_only=True)
    kept = {key: results[key] for key in ("metrics", "selection", "history", "data", "labels")}
    return (
        load_file(folder / "release" / "model.safetensors"),
        last.get("current_model_state", {}) | last["state_dict"],
        kept,
    )


@pytest.fixture(scope="module")
def uninterrupted(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("uninterrupted") / "run"
    assert _run(_train, folder) == 0
    return folder


def _same(folder: Path, other: Path) -> None:
    for ours, theirs in zip(_outcome(folder)[:2], _outcome(other)[:2], strict=True):
        assert ours.keys() == theirs.keys()
        assert all(torch.equal(ours[name], value) for name, value in theirs.items())
    assert _outcome(folder)[2] == _outcome(other)[2]


def test_stopped_in_every_way_in_turn(tmp_path: Path, uninterrupted: Path) -> None:
    """``last.ckpt`` is due after 2 and 4 steps of each epoch of 5, and at its end."""
    folder = tmp_path / "run"
    assert _run(_train_until, folder, 3) == -signal.SIGKILL
    assert not (folder / "results.json").exists()
    _full_disk(folder, write=3, last=5)  # 4, 5, then 7 fails
    assert _run(_train_until_write, folder, 3) == -signal.SIGKILL  # 7, 9, then in the middle of 10
    assert list(folder.glob(".last.*.ckpt")), "the kill came before the write"
    assert _run(_train_until, folder, 12) == -signal.SIGKILL
    before = torch.load(folder / "last.ckpt", weights_only=True)
    assert before["global_step"] == 12
    assert _run(_train, folder) == 0
    _same(folder, uninterrupted)
    # The comparison can fail: the steps since then changed the weights.
    after = torch.load(uninterrupted / "last.ckpt", weights_only=True)
    assert any(not torch.equal(before["state_dict"][name], value) for name, value in after["state_dict"].items())


@pytest.mark.slow
@pytest.mark.parametrize("step", TEN)
def test_killed_after_a_step(step: int, tmp_path: Path, uninterrupted: Path) -> None:
    folder = tmp_path / "run"
    assert _run(_train_until, folder, step) == -signal.SIGKILL
    assert not (folder / "results.json").exists()
    assert _run(_train, folder) == 0
    _same(folder, uninterrupted)


@pytest.mark.slow
def test_killed_while_a_checkpoint_is_written(tmp_path: Path, uninterrupted: Path) -> None:
    folder = tmp_path / "run"
    assert _run(_train_until_write, folder, 4) == -signal.SIGKILL
    assert list(folder.glob(".last.*.ckpt")), "the kill came before the write"
    assert _run(_train, folder) == 0
    _same(folder, uninterrupted)


@pytest.mark.slow
def test_killed_twice(tmp_path: Path, uninterrupted: Path) -> None:
    folder = tmp_path / "run"
    assert _run(_train_until, folder, 3) == -signal.SIGKILL
    assert _run(_train_until, folder, 9) == -signal.SIGKILL
    assert _run(_train, folder) == 0
    _same(folder, uninterrupted)


FINISHING = ("data.limit=8", "selection=last", "bootstrap.resamples=0")
STOPPING = ("callbacks.early_stopping.patience=1", "callbacks.early_stopping.min_delta=9.0")


def _train_settings(folder: Path, *overrides: str) -> None:
    from affect.commands import figures, train
    from affect.commands.configuration import compose

    torch.set_num_threads(1)
    figures.write_run_figures = lambda *arguments: None
    paths = (f"paths.output={folder}", f"paths.cache={folder.parent / 'cache'}")
    train.run(compose("train", [*SETTINGS, *FINISHING, *overrides, *paths]))


def _train_until_results(folder: Path, *overrides: str) -> None:
    """Train and kill the process when it is about to write its results."""
    from affect.commands import train

    train.write_json = lambda *arguments: os.kill(os.getpid(), signal.SIGKILL)
    _train_settings(folder, *overrides)


@pytest.mark.slow
@pytest.mark.parametrize(
    "overrides",
    [
        ("trainer.max_epochs=2",),
        ("trainer.max_epochs=3", "trainer.check_val_every_n_epoch=2"),
        ("trainer.max_epochs=4", "callbacks=[default,ema,early_stopping]", *STOPPING),
    ],
    ids=["ema", "rare_validation", "stopped_early"],
)
def test_killed_when_training_had_ended(overrides: tuple[str, ...], tmp_path: Path) -> None:
    whole, killed = tmp_path / "whole", tmp_path / "killed"
    assert _run(_train_settings, whole, *overrides) == 0
    assert _run(_train_until_results, killed, *overrides) == -signal.SIGKILL
    assert _run(_train_settings, killed, *overrides) == 0
    _same(killed, whole)
    history = _outcome(killed)[2]["history"]
    assert ["val/score" in epoch for epoch in history] == {
        "trainer.max_epochs=2": [True, True],
        "trainer.max_epochs=3": [False, True, False],
        "trainer.max_epochs=4": [True, True],  # the first value is an improvement, the second is not
    }[overrides[0]]


@pytest.mark.slow
def test_another_seed_gives_another_result(tmp_path: Path, uninterrupted: Path) -> None:
    """The comparison above can fail: a run that differs in its seed alone is told apart."""
    assert _run(_train_with_seed, tmp_path / "run", 2) == 0
    ours, theirs = _outcome(tmp_path / "run")[0], _outcome(uninterrupted)[0]
    assert any(not torch.equal(ours[name], value) for name, value in theirs.items())


def _train_with_seed(folder: Path, seed: int) -> None:
    from affect.commands import figures, train

    figures.write_run_figures = lambda *arguments: None
    config = _config(folder)
    config.seed = seed
    train.run(config)


# ------------------------------------------------------------------------------------------------- methods

FACES = tuple(setting for setting in SMALL if not setting.startswith("encoder"))
COMMON = (
    *FACES,
    "callbacks.last.every_n_steps=2",
    "data.limit=20",
    f"trainer.max_epochs={EPOCHS}",
    "bootstrap.resamples=0",
    "figures=false",
)
RESNET = ("encoder=timm", "encoder.name=test_resnet", "encoder.image_size=32")
EXOGENOUS = ("task.exogenous.column=pose_yaw", "task.exogenous.bins=[-30,-10,10,30]")
METHODS: dict[str, tuple[str, ...]] = {
    "monet": (*RESNET, "task=[au]", "model=monet", "callbacks=[default,ema]"),
    "pal": (
        *(*RESNET, "task=[expression]", "objective=[privileged_attribution]"),
        *("objectives.pal.layer=encoder.model.layer3", "callbacks=[default,ema]"),
    ),
    "thin": (
        *("encoder=plain_convolutions", "encoder.image_size=24", "encoder.widths=[4,6]", *EXOGENOUS),
        *("task=[expression,exogenous]", "model=thin", "model.experts=4", "model.hidden=[8]"),
        *("model.exogenous.classes=3", "model.exogenous.hidden=[5]", "model.exogenous.random=true"),
    ),
    "decafa": (
        *("encoder=pixels", "encoder.image_size=16", "task=[landmarks]", "model=decafa", "model.stages=2"),
        *("model.widths=[4,6]", "model.convolutions=1"),
    ),
    "quantized weights": (*RESNET, "task=[au]", "callbacks=[default,ema,qat]", "callbacks.qat.weights=4"),
    "quantized": (*RESNET, "task=[au]", "callbacks=[default,qat_int8]"),
}
"""Settings of each method that holds state of its own while it trains, or draws; add new ones here."""


def _train_method(folder: Path, name: str) -> None:
    from affect.commands import train
    from affect.commands.configuration import compose

    torch.set_num_threads(1)
    paths = (f"paths.output={folder}", f"paths.cache={folder.parent / 'cache'}")
    train.run(compose("train", [*COMMON, *METHODS[name], *paths]))


def _train_method_until(folder: Path, name: str, step: int) -> None:
    _kill_after(step)
    _train_method(folder, name)


@pytest.mark.slow
@pytest.mark.parametrize("name", METHODS)
def test_every_method_continues_exactly(name: str, tmp_path: Path) -> None:
    steps = np.random.default_rng(sorted(METHODS).index(name)).choice(np.arange(1, EPOCHS * STEPS), 2, replace=False)
    whole, killed = tmp_path / "whole", tmp_path / "killed"
    assert _run(_train_method, whole, name) == 0
    for step in sorted(steps.tolist()):
        assert _run(_train_method_until, killed, name, step) == -signal.SIGKILL
    assert _run(_train_method, killed, name) == 0
    _same(killed, whole)


# ----------------------------------------------------------------------------------------------- full disk


def _train_until_full(folder: Path, write: int) -> None:
    """Train on a disk that is full in the middle of the ``write``-th checkpoint, for all that this process writes."""
    import resource
    import sys

    from affect.errors import CheckpointError

    save, count = torch.save, 0

    def full(checkpoint: object, file: Any) -> None:
        nonlocal count
        count += 1
        if count == write:
            resource.setrlimit(resource.RLIMIT_FSIZE, (100_000, 100_000))
        save(checkpoint, file)

    torch.save = full
    try:
        _train(folder)
    except CheckpointError as error:
        (folder / "said").write_text(str(error))
        sys.exit(2)


def _full_disk(folder: Path, write: int, last: int) -> None:
    """Train until the disk is full, which leaves the checkpoint of step ``last`` and says so in a line."""
    assert _run(_train_until_full, folder, write) == 2
    said = (folder / "said").read_text()
    assert "last.ckpt: cannot be written (File too large); the last one that was written stays" in said
    assert "\n" not in said
    assert torch.load(folder / "last.ckpt", weights_only=True)["global_step"] == last
    assert not list(folder.glob(".last*")), "half of a file is left"


@pytest.mark.slow
def test_a_full_disk_leaves_the_last_good_checkpoint(tmp_path: Path, uninterrupted: Path) -> None:
    folder = tmp_path / "run"
    _full_disk(folder, write=4, last=5)  # 2, 4, the epoch's end; then 7 fails
    assert _run(_train, folder) == 0
    _same(folder, uninterrupted)
