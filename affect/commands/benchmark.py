# SPDX-License-Identifier: Apache-2.0
"""``affect benchmark step|loader|faces|table|pal|monet``: ratios from one run, printed as a table and as JSON."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from omegaconf import DictConfig
from rich.console import Console
from rich.table import Table

from affect.commands.benchmarks import faces, loader, monet, pal, predict, step, table
from affect.commands.train import quiet
from affect.errors import ConfigError, near
from affect.report import environment, write_json

BENCHMARKS: dict[str, Callable[[bool], list[dict[str, Any]]]] = {
    "step": step.measure,
    "loader": loader.measure,
    "faces": faces.measure,
    "table": table.measure,
    "pal": pal.measure,
    "monet": monet.measure,
    "predict": predict.measure,
}


def run(config: DictConfig) -> None:
    """Measure, print the table, and write it as JSON to ``out``."""
    if config.what not in BENCHMARKS:
        raise ConfigError(f"benchmark {config.what}: {near(str(config.what), BENCHMARKS)}")
    quiet()
    torch.set_num_threads(int(config.threads))
    rows = BENCHMARKS[config.what](bool(config.quick))
    console = Console()
    shown = Table(title=f"benchmark {config.what}")
    for column in rows[0]:
        shown.add_column(column, justify="left" if isinstance(rows[0][column], str) else "right")
    for row in rows:
        shown.add_row(*(f"{value:.3g}" if isinstance(value, float) else str(value) for value in row.values()))
    console.print(shown)
    out = Path(config.out) if config.out else Path("benchmarks") / f"{config.what}.json"
    write_json(
        out, {"benchmark": config.what, "threads": int(config.threads), "rows": rows, "environment": environment()}
    )
    console.print(f"[bold]{out}[/bold]")
