# SPDX-License-Identifier: Apache-2.0
"""``affect teach``: label photographs with a packaged teacher network."""

from __future__ import annotations

from pathlib import Path

from omegaconf import DictConfig

from affect.data import teacher
from affect.errors import ConfigError


def run(config: DictConfig) -> None:
    """Write blendshape coefficients, points and pose of each photograph to the Parquet file ``out``."""
    out = Path(config.out).expanduser()
    if config.dataset == "orl":
        teacher.teach_orl(out, root=config.root)
    elif config.dataset == "folder":
        if config.root is None:
            raise ConfigError("root is needed: write root=<folder of images>")
        teacher.teach_folder(out, root=config.root)
    else:
        raise ConfigError(f"dataset={config.dataset}: write orl or folder")
