# SPDX-License-Identifier: Apache-2.0
"""What all tests share: one thread (the machine's cores belong to test processes) and runs in small."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from omegaconf import DictConfig

torch.set_num_threads(1)

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
