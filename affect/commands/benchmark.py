# SPDX-License-Identifier: Apache-2.0
"""``affect benchmark <what>``: ratios from one run, printed as a table and as JSON."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from omegaconf import DictConfig
from rich.console import Console
from rich.measure import Measurement
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
    thin,
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
    "thin": thin.measure,
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
    show(rows, f"benchmark {config.what}", console)
    write_json(
        out, {"benchmark": config.what, "threads": int(config.threads), "rows": rows, "environment": environment()}
    )
    console.print(f"[bold]{out}[/bold]")


def show(rows: Sequence[Mapping[str, Any]], title: str, console: Console) -> None:
    """Print rows as a table whose numbers are whole; what all rows share stands below it.

    A table that is wider than the console is printed as wide as it is: lines that a terminal breaks are read, and
    numbers that are cut are not.
    """
    texts = [[f"{value:.3g}" if isinstance(value, float) else str(value) for value in row.values()] for row in rows]
    shared = [len(rows) > 1 and len({text[k] for text in texts}) == 1 for k in range(len(rows[0]))]
    shown = Table(title=title)
    for (column, value), same in zip(rows[0].items(), shared, strict=True):
        if not same:
            shown.add_column(column, justify="left" if isinstance(value, str) else "right", no_wrap=True)
    for text in texts:
        shown.add_row(*(value for value, same in zip(text, shared, strict=True) if not same))
    wanted = Measurement.get(console, console.options.update(max_width=10_000), shown).maximum
    Console(file=console.file, width=max(wanted, console.width)).print(shown)
    common = ", ".join(f"{column} {texts[0][k]}" for k, column in enumerate(rows[0]) if shared[k])
    if common:
        console.print(f"all rows: {common}", soft_wrap=True, highlight=False, markup=False)
