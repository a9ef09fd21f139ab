# SPDX-License-Identifier: Apache-2.0
"""What all tests share: one thread (the machine's cores belong to test processes) and runs in small."""

from __future__ import annotations

import gc
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from omegaconf import DictConfig

torch.set_num_threads(1)


def pytest_collection() -> None:
    """Look for no garbage while modules are imported: what they make stays."""
    gc.disable()


def pytest_runtestloop() -> None:
    """Collect garbage from here on, without walking through all that the imports have made each time."""
    gc.enable()
    gc.collect()
    gc.freeze()


def pytest_unconfigure() -> None:
    """Let the interpreter clear its modules as ever: libraries look for what stayed behind."""
    gc.unfreeze()


SMALL = (
    "debug=fast",
    "encoder=timm",
    "encoder.name=test_resnet",
    "encoder.image_size=32",
    "dataset.count=200",
    "dataset.dials.image_size=48",
    "dataset.dials.subjects=20",
    "callbacks.progress=null",
    "trainer.enable_progress_bar=false",
    "logger=none",
)
"""Overrides of a run of seconds on the built-in faces."""

FACES = (
    "encoder.image_size=32",
    "dataset.count=60",
    "dataset.dials.subjects=12",
    "dataset.dials.image_size=48",
    "task=[au,expression,valence_arousal]",
    "trainer.max_epochs=1",
    "trainer.accelerator=cpu",
    "trainer.enable_progress_bar=false",
    "callbacks.progress=null",
    "data.num_workers=0",
    "protocol.test=2",
    "bootstrap.resamples=0",
    "logger=none",
)
"""Overrides of a run on built-in faces that is finished and tested, with a class, a regression and units."""


@pytest.fixture(scope="session")
def trained_faces(tmp_path_factory: pytest.TempPathFactory) -> Callable[..., Path]:
    """Return a function that trains on 60 built-in faces and gives the folder of the run; the cache lies beside it."""
    from affect.commands import figures, train
    from affect.commands.configuration import compose as compose_config

    def make(*overrides: str) -> Path:
        folder = tmp_path_factory.mktemp("faces") / "run"
        paths = (f"paths.output={folder}", f"paths.cache={folder.parent / 'cache'}")
        with pytest.MonkeyPatch.context() as patch:
            patch.setattr(figures, "write_run_figures", lambda *arguments: None)
            train.run(compose_config("train", [*FACES, *paths, *overrides]))
        return folder

    return make


@pytest.fixture
def compose() -> Callable[..., DictConfig]:
    """Return a function that composes a command's config from overrides."""
    from affect.commands.configuration import compose as compose_config

    return lambda command, *overrides, **keywords: compose_config(command, list(overrides), **keywords)


@pytest.fixture
def tiny_run(compose: Callable[..., DictConfig], tmp_path: Path) -> Callable[..., DictConfig]:
    """Return a function that gives the config of a tiny training run in ``tmp_path/run``."""

    def make(*overrides: str, output: str = "run") -> DictConfig:
        paths = (f"paths.output={tmp_path / output}", f"paths.cache={tmp_path / 'cache'}")
        return compose("train", *SMALL, *paths, *overrides)

    return make
