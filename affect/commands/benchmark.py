# SPDX-License-Identifier: Apache-2.0
"""``affect benchmark <what>``: ratios from one run, printed as a table and as JSON."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from omegaconf import DictConfig
from rich.console import Console
from rich.table import Table

from affect.commands.benchmarks import (
    export,
    faces,
    landmarks,
    loader,
    monet,
    pal,
    predict,
    pruning,
    ranges,
    step,
    table,
    training,
)
from affect.commands.train import quiet
from affect.errors import ConfigError, near
from affect.release import read_release
from affect.report import environment, write_json

BENCHMARKS: dict[str, Callable[[bool], list[dict[str, Any]]]] = {
    "step": step.measure,
    "training": training.measure,
    "loader": loader.measure,
    "faces": faces.measure,
    "table": table.measure,
    "pal": pal.measure,
    "monet": monet.measure,
    "predict": predict.measure,
    "export": export.measure,
    "pruning": pruning.measure,
    "ranges": ranges.measure,
}

OF_CHECKPOINTS = ("landmarks", "photographs")
"""Benchmarks that take a checkpoint; the second one needs it."""


def rows_of(config: DictConfig, folder: Path) -> list[dict[str, Any]]:
    """Return what a benchmark measured, one row per measured thing; pictures go to ``folder``.

    Raises:
        ConfigError: If there is no such benchmark, or it needs a checkpoint, or takes none.
        CheckpointError: If the checkpoint cannot be read.
    """
    what = str(config.what)
    if what in BENCHMARKS:
        if config.checkpoint is not None:
            raise ConfigError(f"benchmark {what} takes no checkpoint; {' and '.join(OF_CHECKPOINTS)} do")
        return BENCHMARKS[what](bool(config.quick))
    if what not in OF_CHECKPOINTS:
        raise ConfigError(f"benchmark {what}: {near(what, (*BENCHMARKS, *OF_CHECKPOINTS))}")
    release = None
    if config.checkpoint is not None:
        release = read_release(Path(config.checkpoint).expanduser(), list(config.trust))
    if what == "landmarks":
        return landmarks.measure(bool(config.quick), release)
    if release is None:
        raise ConfigError("benchmark photographs: name the model: checkpoint=<folder of a run or of a release>")
    return landmarks.compare(release, folder, bool(config.quick))


def run(config: DictConfig) -> None:
    """Measure, print the table, and write it as JSON to ``out``."""
    quiet()
    torch.set_num_threads(int(config.threads))
    out = Path(config.out) if config.out else Path("benchmarks") / f"{config.what}.json"
    rows = rows_of(config, out.parent)
    console = Console()
    shown = Table(title=f"benchmark {config.what}")
    for column in rows[0]:
        shown.add_column(column, justify="left" if isinstance(rows[0][column], str) else "right")
    for row in rows:
        shown.add_row(*(f"{value:.3g}" if isinstance(value, float) else str(value) for value in row.values()))
    console.print(shown)
    write_json(
        out, {"benchmark": config.what, "threads": int(config.threads), "rows": rows, "environment": environment()}
    )
    console.print(f"[bold]{out}[/bold]")
