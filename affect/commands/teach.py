# SPDX-License-Identifier: Apache-2.0
"""``affect teach``: label photographs with a packaged teacher network."""

from __future__ import annotations

from pathlib import Path

from omegaconf import DictConfig
from rich.console import Console

from affect.data import teacher
from affect.errors import ConfigError


def run(config: DictConfig) -> None:
    """Write blendshape coefficients, points and pose of each photograph to the Parquet file ``out``."""
    out = Path(config.out).expanduser()
    if config.photographs == "orl":
        counts = teacher.teach_orl(out, root=config.root)
    elif config.photographs == "folder":
        if config.root is None:
            raise ConfigError("root is needed: write root=<folder of images>")
        counts = teacher.teach_folder(out, root=config.root)
    else:
        raise ConfigError(f"photographs={config.photographs}: write orl or folder")
    console = Console()
    for name, count in counts.items():
        console.print(f"{name}: {count}")
    console.print(f"[bold]{out}[/bold]")
