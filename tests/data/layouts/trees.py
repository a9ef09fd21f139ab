# SPDX-License-Identifier: Apache-2.0
"""Every dataset's tree in small, by configuration, to be damaged by tests that hold for all layouts."""

from __future__ import annotations

import functools
import importlib
import inspect
import re
import shutil
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from types import ModuleType
from typing import Any

import numpy as np
from omegaconf import OmegaConf

from affect.commands.configuration import config_directory
from affect.data import faces
from affect.data.faces import FaceDials, FaceImages
from affect.data.images import FileImages, ImageReader
from affect.data.table import FaceTable
from affect.errors import DataError

DIALS = FaceDials(image_size=24, subjects=12, yaw=(-10, 10), missing_au=0.0)
COUNT = 36
IMAGES = (".jpg", ".jpeg", ".png", ".bmp", ".tif", ".tiff")
KINDS = 8
"""Files of one dataset that are damaged, one for each pattern of names."""


@dataclass(frozen=True)
class Case:
    """A dataset's configuration with its layout."""

    name: str
    module: ModuleType
    arguments: dict[str, Any]

    def read(self, root: Path) -> FaceTable:
        return self.module.read(root, **self._fitting(self.module.read))

    def images(self, table: FaceTable) -> ImageReader:
        make = getattr(self.module, "images", None)
        return FileImages(table) if make is None else make(table)

    def write(self, root: Path) -> None:
        table = FaceTable.from_arrow(faces.labels_table(DIALS, 5, COUNT), ".", {"dataset": "faces"})
        dressed = self.module.dress(table, **self._fitting(self.module.dress))
        self.module.write(dressed.table, root, images=Drawn(dressed.rows), **self._fitting(self.module.write))

    def _fitting(self, function: Callable) -> dict[str, Any]:
        known = inspect.signature(function).parameters
        return {key: value for key, value in self.arguments.items() if key in known and key != "root"}


class Drawn:
    """Pictures of a dressed table; each face is drawn once."""

    def __init__(self, rows: np.ndarray) -> None:
        self.rows = rows

    def read(self, rows: np.ndarray) -> list[np.ndarray]:
        return [picture(int(row)) for row in self.rows[rows]]


@functools.cache
def picture(row: int) -> np.ndarray:
    return FaceImages(DIALS, 5)(row)


def cases() -> list[Case]:
    """Return the datasets of the package whose layout can be written."""
    found = []
    for path in sorted((config_directory() / "dataset").glob("*.yaml")):
        config = OmegaConf.create({"dataset": OmegaConf.load(path)})
        target = str((config.dataset.get("read") or {}).get("_target_", ""))
        if not target.startswith("affect.data.layouts."):
            continue
        module = importlib.import_module(target.rpartition(".")[0])
        if hasattr(module, "dress") and hasattr(module, "write"):
            config.dataset.root = "unused"
            arguments = OmegaConf.to_container(config.dataset.read, resolve=True)
            found.append(Case(path.stem, module, {k: v for k, v in arguments.items() if k not in ("_target_", "root")}))
    return found


@functools.cache
def whole(case_name: str, folder: Path) -> Path:
    """Return a dataset's tree, written once below ``folder``; it must not be changed."""
    case = next(case for case in cases() if case.name == case_name)
    case.write(folder / case_name / "tree")
    return folder / case_name / "tree"


def copied(source: Path, target: Path) -> Path:
    """Return a copy of a tree that may be damaged."""
    shutil.copytree(source, target)
    return target


def label_files(root: Path) -> list[str]:
    """Return text files of a tree, the first one for each pattern of names."""
    kinds: dict[str, str] = {}
    for path in sorted(root.rglob("*")):
        name = str(path.relative_to(root))
        if path.is_file() and path.suffix.lower() not in IMAGES and is_text(path):
            kinds.setdefault(re.sub(r"\d+|_?(left|right)|[MF](?=\d)", "#", name), name)
    return list(kinds.values())[:KINDS]


def is_text(path: Path) -> bool:
    content = path.read_bytes()
    try:
        content.decode()
    except UnicodeDecodeError:
        return False
    return b"\0" not in content and len(content) > 0


def nulls(table: FaceTable) -> int:
    """Return how many cells are missing."""
    return sum(table.column(name).null_count for name in table.names)


def told(case: Case, root: Path, before: FaceTable, file: str | None = None) -> str:
    """Return how a reader tells of damage: an error's line, rows counted as left out, a note, cells that are missing.

    It returns ``""`` for a table that shows nothing of it, and raises whatever else than ``DataError`` is raised.
    """
    try:
        table = case.read(root)
        case.images(table).read(np.arange(len(table)))  # pixels may be labels' neighbours in one file
    except DataError as error:
        line = str(error)
        assert "\n" not in line, line
        assert file is None or Path(file).name in line or str(Path(file).parent) in line, line
        return line
    if table.metadata["skipped"] != before.metadata["skipped"]:
        return f"skipped: {table.metadata['skipped']}"
    if table.metadata["notes"] != before.metadata["notes"]:
        return f"notes: {table.metadata['notes']}"
    if nulls(table) > nulls(before):
        return f"missing cells: {nulls(table) - nulls(before)}"
    return ""
