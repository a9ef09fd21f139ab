# SPDX-License-Identifier: Apache-2.0
"""``affect synthesize``: write the built-in faces, as image files with a table or in the layout of a real dataset.

``layout=bp4d`` writes the tree that the owner of BP4D delivers, with drawn faces in it, so that a pipeline can be tried
before a licence arrives. A layout is a configuration of the group ``dataset`` whose module has ``dress`` and ``write``.
"""

from __future__ import annotations

import importlib
import inspect
import json
import shlex
from collections.abc import Mapping
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from types import ModuleType
from typing import Any

import numpy as np
from omegaconf import DictConfig, OmegaConf, open_dict
from rich.console import Console
from tqdm import tqdm

from affect.commands import assembly, configuration
from affect.commands.prepared import fitting_tasks
from affect.data import faces
from affect.data.check import SYNTHETIC
from affect.data.faces import FaceDials, FaceImages
from affect.data.layouts import faces as source
from affect.data.table import ColumnLike, FaceTable
from affect.errors import ConfigError, near
from affect.files import replacing
from affect.labels import SCHEMES

FEWEST = 12
"""Faces that a layout needs, so that each of its parts has some."""

LARGEST = 256
"""Sides of official pictures up to which faces are drawn in their size; whole frames would be large for nothing."""

_AT_ONCE = 16


def run(config: DictConfig) -> None:
    """Write ``dataset.count`` faces to ``out``; continues where it stopped.

    Without ``layout`` they are files with ``faces.parquet`` and a contact sheet beside them.
    """
    if config.dataset.name != "faces":
        raise ConfigError(f"dataset={config.dataset.name}: only the built-in faces can be written, dataset=faces")
    console = Console()
    dials = assembly.make(config.dataset.dials, "dataset.dials")
    seed, count, out = int(config.dataset.seed), int(config.dataset.count), Path(config.out).expanduser()
    if config.get("layout"):
        tree = Tree.of(str(config.layout), out, OmegaConf.to_container(config.get("options") or OmegaConf.create({})))
        table = tree.write(dials, seed, count)
        console.print(
            f"[bold]{out}[/bold]: {len(table)} drawn faces in the layout of {tree.name}; next:", soft_wrap=True
        )
        for line in tree.next_commands(table):
            console.print(f"  {line}", soft_wrap=True, markup=False, highlight=False)
        return
    if config.get("options"):
        raise ConfigError("options=… are those of a layout; choose one: layout=bp4d")
    faces.write_files(dials, seed, count, out)
    if config.sheet:
        faces.sheet(dials, seed, np.arange(min(40, count)), out / "sheet.png")
    console.print(f"[bold]{out}[/bold]: faces.parquet and {count} images")
    console.print(f"train on them: affect train dataset=table dataset.table={out / 'faces.parquet'}")


# ---------------------------------------------------------------------------------------------------- layouts


@dataclass(frozen=True)
class Tree:
    """A dataset's tree of drawn faces.

    Attributes:
        name: Name of the dataset's configuration.
        out: Folder to write.
        module: The layout.
        arguments: What the configuration gives to the layout's ``read``, without the root.
        options: Settings that differ from the configuration's own.
        prepared: Whether its recipe stores crops, so that ``affect prepare`` comes before training.
    """

    name: str
    out: Path
    module: ModuleType
    arguments: Mapping[str, Any]
    options: Mapping[str, Any]
    prepared: bool

    @classmethod
    def of(cls, name: str, out: Path, options: Mapping[str, Any]) -> Tree:
        """Return the tree of a dataset's configuration.

        Raises:
            ConfigError: If there is no such configuration, its layout cannot be written, or an option is unknown.
        """
        config_dir = _extension()
        with configuration.open_hydra("train", config_dir) as hydra:
            known = configuration.group_options(hydra, "dataset")
        if name not in known:
            raise ConfigError(f"layout={name}: unknown; {near(name, _writable(known))}")
        config = configuration.compose("train", [f"dataset={name}"], config_dir)
        node = config.dataset
        module = _module(node)
        if module is None or not (hasattr(module, "dress") and hasattr(module, "write")):
            raise ConfigError(f"layout={name}: it is no dataset that can be written; {near(name, _writable(known))}")
        for key, value in options.items():
            if key not in node or key == "root":
                raise ConfigError(f"options.{key}: dataset={name} has no such key; {near(key, [*map(str, node)])}")
            with open_dict(node):
                node[key] = value
        with open_dict(node):
            node.root = str(out)
        arguments = OmegaConf.to_container(node.read, resolve=True)
        assert isinstance(arguments, dict)
        kept = {str(key): value for key, value in arguments.items() if key not in ("_target_", "root")}
        return cls(name, out, module, kept, dict(options), bool(config.prepare.get("stored")))

    def write(self, dials: FaceDials, seed: int, count: int) -> FaceTable:
        """Write the tree and return its table; the same call again gives the same files.

        Pictures have the size of the official ones, where all of these have one of up to ``LARGEST``: the faces are
        drawn in it, whatever ``dials.image_size`` is, and the middle is cut out where it is no square.

        Raises:
            ConfigError: If the folder holds anything else, or ``count`` is too small.
        """
        if count < FEWEST:
            raise ConfigError(
                f"dataset.count={count}: a layout needs at least {FEWEST} faces, so that each part has some"
            )
        self._claim(dials, seed, count)
        width, height = self._size() or (dials.image_size, dials.image_size)
        dials = replace(dials, image_size=max(width, height))
        left, top = (dials.image_size - width) // 2, (dials.image_size - height) // 2
        drawn = _moved(source.read(dials, seed, count), left, top)
        dressed = self.module.dress(drawn, **self._fitting(self.module.dress))
        with tqdm(total=len(dressed.rows), desc=self.name, unit="face") as bar:
            window = slice(top, top + height), slice(left, left + width)
            images = _Drawn(FaceImages(dials, seed), dressed.rows, bar, window)
            self.module.write(dressed.table, self.out, images=images, **self._fitting(self.module.write))
        return dressed.table

    def _size(self) -> tuple[int, int] | None:
        """Return width and height of the official pictures; None where they have no one size, or a large one."""
        expected = getattr(self.module, "expected", None)
        entries = () if expected is None else expected(**self._fitting(expected))
        size = next((entry.value for entry in entries if entry.key == "size"), None)
        return (int(size[0]), int(size[1])) if isinstance(size, tuple) and max(size) <= LARGEST else None

    def _fitting(self, function: Any) -> dict[str, Any]:  # noqa: ANN401
        known = inspect.signature(function).parameters
        return {key: value for key, value in self.arguments.items() if key in known}

    def _claim(self, dials: FaceDials, seed: int, count: int) -> None:
        """Write the note that tells the tree from the real dataset, before anything else."""
        settings = {"layout": self.name, "options": self.options, "count": count, "seed": seed, "dials": asdict(dials)}
        text = _NOTE.format(name=self.name, settings=json.dumps(settings, indent=1, default=list))
        note = self.out / SYNTHETIC
        if self.out.exists() and not self.out.is_dir():
            raise ConfigError(f"out={self.out}: not a folder; choose another")
        if note.is_file():
            if note.read_text(encoding="utf-8") != text:
                raise ConfigError(
                    f"out={self.out}: it holds drawn faces of other settings ({note}); choose another folder"
                )
        elif self.out.is_dir() and any(self.out.iterdir()):
            raise ConfigError(f"out={self.out}: the folder is not empty and not of this command; choose another folder")
        with replacing(note) as part:
            part.write_text(text, encoding="utf-8")

    def next_commands(self, table: FaceTable) -> list[str]:
        """Return the commands that try the pipeline on the tree, as a shell takes them."""
        shared = [f"dataset={self.name}", f"dataset.root={self.out}"]
        shared += [f"dataset.{key}={_spelled(value)}" for key, value in self.options.items()]
        commands = [["check", *shared]]
        if self.prepared:
            commands.append(["prepare", *shared])
        commands.append(["train", *shared, *fitting_tasks(table)])
        return [shlex.join(["affect", *words]) for words in commands]


def _moved(table: FaceTable, left: int, top: int) -> FaceTable:
    """Return the faces with their points and boxes in pictures that lack ``left`` columns and ``top`` rows."""
    places = [name for name in ("box", *(scheme.column for scheme in SCHEMES.values())) if name in table.names]
    moved: dict[str, ColumnLike] = {}
    for name in places:
        values, known = table.numbers(name)
        moved[name] = (values - np.tile(np.array([left, top], np.float32), values.shape[1] // 2), known)
    return table.with_columns(moved) if left or top else table


class _Drawn:
    """Pictures of the rows of a dressed table, a bar beside them.

    Args:
        images: Pictures of the built-in faces.
        rows: Built-in face of each row ``(N,)``.
        bar: Counts what was drawn.
        window: Rows and columns of the pictures that are kept.
    """

    def __init__(self, images: FaceImages, rows: np.ndarray, bar: tqdm, window: tuple[slice, slice]) -> None:
        self.images, self.rows, self.bar, self.window = images, rows, bar, window

    def read(self, rows: np.ndarray) -> list[np.ndarray]:
        found: list[np.ndarray] = []
        wanted = self.rows[rows]
        for start in range(0, len(wanted), _AT_ONCE):
            found += [picture[self.window] for picture in self.images.read(wanted[start : start + _AT_ONCE])]
            self.bar.update(len(found) - start)
        return found


_NOTE = """# Drawn faces

`affect synthesize` wrote this tree: the built-in faces of affect in the layout of `{name}`. Nobody is shown here, and
no number that is measured on it is a result on people. The file tells the tree from the real dataset: leave it here.

```json
{settings}
```
"""


def _extension() -> Path | None:
    """Return the folder that ``--config-dir`` of the running command named."""
    from hydra.core.hydra_config import HydraConfig

    if not HydraConfig.initialized():
        return None
    sources = HydraConfig.get().runtime.config_sources
    return next((Path(entry.path) for entry in sources if entry.provider == "command-line"), None)


def _module(node: DictConfig) -> ModuleType | None:
    """Return the module of a dataset's ``read``."""
    target = str((node.get("read") or {}).get("_target_", ""))
    name = target.rpartition(".")[0]
    try:
        return importlib.import_module(name) if name else None
    except ModuleNotFoundError as error:
        raise ConfigError(f"dataset.read: cannot import {name} ({error})") from error


def _writable(names: list[str]) -> list[str]:
    """Return the datasets of the package whose layout can be written; for messages only."""
    found = []
    for name in names:
        path = configuration.config_directory() / "dataset" / f"{name}.yaml"
        module = _module(OmegaConf.load(path)) if path.is_file() else None  # type: ignore[arg-type]
        found += [name] if module is not None and hasattr(module, "dress") else []
    return found


def _spelled(value: Any) -> str:  # noqa: ANN401
    """Return a setting's value as the command line takes it."""
    return value if isinstance(value, str) else json.dumps(value)
