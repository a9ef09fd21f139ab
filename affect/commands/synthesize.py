# SPDX-License-Identifier: Apache-2.0
"""``affect synthesize``: write the built-in faces as image files with a table beside them."""

from __future__ import annotations

from pathlib import Path

import numpy as np
from omegaconf import DictConfig
from rich.console import Console

from affect.commands import assembly
from affect.data import faces
from affect.errors import ConfigError


def run(config: DictConfig) -> None:
    """Write ``dataset.count`` faces, ``faces.parquet`` and a contact sheet to ``out``; continues where it stopped."""
    if config.dataset.name != "faces":
        raise ConfigError(f"dataset={config.dataset.name}: only the built-in faces can be written, dataset=faces")
    console = Console()
    dials = assembly.make(config.dataset.dials, "dataset.dials")
    out = Path(config.out).expanduser()
    faces.write_files(dials, int(config.dataset.seed), int(config.dataset.count), out)
    if config.sheet:
        faces.sheet(dials, int(config.dataset.seed), np.arange(min(40, int(config.dataset.count))), out / "sheet.png")
    console.print(f"[bold]{out}[/bold]: faces.parquet and {config.dataset.count} images")
    console.print(f"train on them: affect train dataset=table dataset.table={out / 'faces.parquet'}")
