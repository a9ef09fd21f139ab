# SPDX-License-Identifier: Apache-2.0
"""Builds the parts of a run from its config: sources, tasks, data module, model. All checks come before long work."""

from __future__ import annotations

import dataclasses
import hashlib
import inspect
import json
import re
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
from hydra.errors import InstantiationException
from hydra.utils import get_object, instantiate
from omegaconf import DictConfig, ListConfig, OmegaConf
from rich.console import Console
from tqdm import tqdm

from affect.commands.configuration import config_directory, missing_package
from affect.commands.prepared import load_prepared, require_croppable
from affect.commands.run_folder import is_first_process
from affect.data.check import EXAMPLES, LEFT_OUT
from affect.data.datamodule import FaceDataModule
from affect.data.images import NEAR_DUPLICATES, FileImages, ImageReader, Source
from affect.data.prepare import prepared_images
from affect.data.protocol import Protocol
from affect.data.sampling import Sampling
from affect.data.stored import FOLDER as TABLES
from affect.data.stored import read_or_stored, stored_path
from affect.data.table import FaceTable
from affect.data.transforms import FaceTransform
from affect.errors import AffectError, ConfigError, near
from affect.geometry import CropRecipe
from affect.models.base import AffectModule
from affect.tasks import Task


def make(node: Any, what: str, **keywords: Any) -> Any:  # noqa: ANN401
    """Return ``instantiate(node)``; an empty node gives None, a failure one line that names the node.

    Raises:
        AffectError: The error of ours that stopped it, if there was one; otherwise a ``ConfigError``.
    """
    if node is None or (isinstance(node, DictConfig | ListConfig) and len(node) == 0):
        return None
    try:
        return instantiate(node, _convert_="object", **keywords)
    except InstantiationException as error:
        foreign = _foreign_key(error, node)
        if foreign is not None:
            raise foreign from error
        raise translated(error, what) from error


def _foreign_key(error: InstantiationException, node: Any) -> ConfigError | None:  # noqa: ANN401
    """Return the error of a key that a class does not take: mostly one set for another member of a config group."""
    named = re.search(r"(\w+)\.__init__\(\) got an unexpected keyword argument '(\w+)'", str(error))
    place = re.search(r"full_key: ([\w.]+)$", str(error))
    if named is None or place is None or not isinstance(node, DictConfig):
        return None
    key = _own_key(node._get_root(), place[1])
    return ConfigError(
        f"{key}.{named[2]}: {named[1]} takes no {named[2]}; where that was set for another {key} (by an experiment, a "
        f"sweep, another dataset), leave it out with '~{key}.{named[2]}'"
    )


def _own_key(root: Any, key: str) -> str:  # noqa: ANN401
    """Return where a node is written that others point to: ``model.encoder`` is ``encoder``."""
    name = key.rpartition(".")[2]
    same = isinstance(root, DictConfig) and name in root and root[name] == OmegaConf.select(root, key)
    return name if same else key


def translated(error: BaseException, what: str) -> AffectError:
    """Return the error of ours inside ``error``, or a one-line ``ConfigError`` about ``what``."""
    inner: BaseException | None = error
    last = error
    while inner is not None:
        if isinstance(inner, AffectError):
            return inner
        last, inner = inner, inner.__cause__
    optional = missing_package(last)
    if optional is not None:
        return ConfigError(f"{what}: {optional}")
    if isinstance(last, ModuleNotFoundError):
        return ConfigError(f"{what}: {last}; install it, or for a package of yours add --config-dir <its conf folder>")
    lines = [line.strip() for line in str(last).splitlines() if line.strip()]
    return ConfigError(f"{what}: {' '.join(lines[:2]) or type(last).__name__}")


# -------------------------------------------------------------------------------------------------- sources


def build_sources(
    config: DictConfig, recipe: CropRecipe | None, hold_out: bool | None = None, fresh: bool = False
) -> list[Source]:
    """Return the source of ``dataset``, or those of ``dataset.sources`` in their order.

    Args:
        config: Nodes ``dataset``, ``protocol`` and ``paths``.
        recipe: How faces are cropped; a source with a node ``prepare`` is cropped by that.
        hold_out: Whether validation groups will be held out of training, for which near-duplicates are looked for
            where a dataset wants them kept together; None finds out by the protocol of a training.
        fresh: Read label files also where a stored table could be used.

    Raises:
        ConfigError: If two sources have one name, or a root is no folder.
    """
    listed = source_nodes(config)
    for name, keys in _by_name(listed).items():
        if len(keys) > 1:
            raise ConfigError(
                f"dataset.sources: {' and '.join(keys)} are both named {name}, and results and sampling ratios go by "
                f"the name; set dataset.sources.{keys[-1]}.name={name}2"
            )
    _, protocols = build_protocols(config)
    cache, prepared = _folder(config, "cache"), _folder(config, "prepared")
    sources = []
    for key, node in listed.items():
        protocol = protocols[key]
        held = _holds_out(config, protocol) if hold_out is None else hold_out
        own = make(node.get("prepare"), f"dataset.sources.{key}.prepare")
        chosen = own if own is not None else recipe
        sources.append(_build_source(node, _load(node, chosen, cache, prepared, fresh), cache, held))
    return sources


def source_nodes(config: DictConfig) -> dict[str, DictConfig]:
    """Return the nodes of ``dataset.sources`` by key, or that of ``dataset`` alone under its name.

    Raises:
        ConfigError: If ``dataset=concat`` has no source, or a source is no dataset.
    """
    if "sources" not in config.dataset:
        return {str(config.dataset.get("name", "dataset")): config.dataset}
    nodes = config.dataset.sources or {}
    if not nodes:
        raise ConfigError(
            "dataset=concat has no tables; write dataset=[bp4d,affwild2], or '+dataset@dataset.sources.bp4d=bp4d' …"
        )
    for key, node in nodes.items():
        if not isinstance(node, DictConfig) or not node.get("read"):
            raise ConfigError(f"dataset.sources.{key} is no dataset; write '+dataset@dataset.sources.{key}=<dataset>'")
    return {str(key): node for key, node in nodes.items()}


def _by_name(nodes: Mapping[str, DictConfig]) -> dict[str, list[str]]:
    found: dict[str, list[str]] = {}
    for key, node in nodes.items():
        found.setdefault(str(node.get("name", "dataset")), []).append(key)
    return found


def build_protocols(config: DictConfig) -> tuple[Protocol, dict[str, Protocol]]:
    """Return the protocol of the run, and that of each source by its key in ``dataset.sources``.

    A source's own node ``protocol`` may be a whole one or a few keys; what it does not hold is that of the run.

    Raises:
        ConfigError: If a key is unknown.
    """
    run = OmegaConf.to_container(config.protocol, resolve=True) if config.get("protocol") else {}
    assert isinstance(run, dict)
    selection = config.get("selection", "best_val")
    whole = _protocol(run, selection, "protocol")
    found = {}
    for key, node in source_nodes(config).items():
        own = OmegaConf.to_container(node.protocol, resolve=True) if node.get("protocol") else None
        place = f"dataset.sources.{key}.protocol"
        found[key] = whole if own is None else _protocol({**run, **own}, selection, place)  # type: ignore[dict-item]
    return whole, found


def _protocol(node: Mapping[Any, Any], selection: str, place: str) -> Protocol:
    known = {item.name for item in dataclasses.fields(Protocol)} - {"selection"}
    for key in node:
        if key not in known:
            raise ConfigError(f"{place} has no key {key!r}; {near(str(key), known)}")
    return Protocol(**node, selection=selection)


def _holds_out(config: DictConfig, protocol: Protocol) -> bool:
    """Return whether a training holds validation groups out, as far as the protocol alone can tell."""
    if "selection" not in config or protocol.selection in ("refit", "best_on_test") or protocol.test == "all":
        return False
    return protocol.validation is None and protocol.validation_fraction > 0


def _folder(config: DictConfig, key: str) -> Path | None:
    given = (config.get("paths") or {}).get(key)
    return Path(given).expanduser() if given else None


def _build_source(node: DictConfig, loaded: Loaded, cache: Path | None, held: bool) -> Source:
    table, together = loaded.table, node.get("together")
    if together == NEAR_DUPLICATES and held and NEAR_DUPLICATES not in table.names:
        table = with_near_duplicates(table, loaded.images, str(node.get("name", "dataset")), cache)
    return Source(
        name=str(node.get("name", "dataset")),
        table=table,
        images=loaded.images,
        group=loaded.group(str(node.get("group") or "image")),
        recipe=loaded.recipe,
        skipped=dict(table.metadata.get("skipped") or {}),  # type: ignore[arg-type]
        notes=tuple(table.metadata.get("notes") or ()),  # type: ignore[arg-type]
        together=together,
        stratify=node.get("stratify"),
        prepared=loaded.prepared,
    )


class Loaded(NamedTuple):
    """A dataset's table with its images.

    Attributes:
        table: Labels.
        images: Reader of the rows' images.
        recipe: How faces are cropped from ``images``.
        prepared: Where these are stored crops, the recipe from the photographs to the model's input.
    """

    table: FaceTable
    images: ImageReader
    recipe: CropRecipe | None
    prepared: CropRecipe | None = None

    def group(self, column: str) -> str:
        """Return the column to split by: faces of one photograph stay together, also as crops of their own."""
        return "source_image" if column == "image" and self.prepared is not None else column


def _load(
    node: DictConfig, recipe: CropRecipe | None, cache: Path | None, prepared: Path | None, fresh: bool
) -> Loaded:
    """Return table and images of a dataset: photographs that are cropped while loading, or stored crops.

    Crops that are missing stop the run with the command that makes them; so does a recipe that the dataset cannot have.
    """
    if recipe is not None and recipe.stored:
        stored = left_out(node, load_prepared(node, recipe, prepared), cache, "source_image")
        return Loaded(stored, prepared_images(stored), recipe.loading(), recipe)
    table = read_table(node, cache, fresh)
    require_croppable(node, table, recipe)
    return Loaded(table, build_images(node, table), recipe)


def read_table(node: DictConfig, cache: Path | None = None, fresh: bool = False) -> FaceTable:
    """Return the table of a dataset's node: read, or mapped from ``<cache>/tables`` while its files are as they were.

    Args:
        node: A dataset with the nodes ``name``, ``root`` and ``read``.
        cache: Folder of things that can be made again; None stores nothing.
        fresh: Read also where a stored table could be used, and store it anew.

    Raises:
        AffectError: If the root is no folder, or the files cannot be read.
    """
    name, root = str(node.get("name", "dataset")), node.get("root")
    if root is not None and not Path(root).expanduser().is_dir():
        raise ConfigError(f"dataset.root={root}: no such folder")
    where = f"dataset {name}"
    path = None
    if cache is not None:
        arguments = OmegaConf.to_container(node.read, resolve=True)
        assert isinstance(arguments, dict)
        path = stored_path(cache / TABLES, name, _located(arguments), _callee(node.read, where))
    console = Console(quiet=not is_first_process())
    say = lambda line: console.print(line, highlight=False, soft_wrap=True)  # noqa: E731
    return left_out(node, read_or_stored(path, name, lambda: make(node.read, where), say, fresh), cache)


def listed_images(path: Path) -> list[str]:
    """Return the names of images that a file lists, one a line.

    Raises:
        ConfigError: If it cannot be read or lists nothing.
    """
    try:
        names = [line.strip() for line in path.read_text(encoding="utf-8-sig").splitlines() if line.strip()]
    except (OSError, UnicodeDecodeError) as error:
        raise ConfigError(f"dataset.leave_out={path}: not a readable text file ({error}); one image a line") from error
    if not names:
        raise ConfigError(f"dataset.leave_out={path}: lists no image; write one name a line, or dataset.leave_out=null")
    return names


def left_out(node: DictConfig, table: FaceTable, cache: Path | None, column: str = "image") -> FaceTable:
    """Return the table without the rows whose image ``dataset.leave_out`` lists; they are counted as skipped.

    The shorter table is kept in the cache, so that no process holds a copy of it.

    Args:
        node: A dataset, perhaps with ``leave_out``: a file with names as in ``column``, one a line.
        table: The dataset.
        cache: Folder of things that can be made again; None stores nothing.
        column: Column of the names; a prepared table may lack them, since its images could be read.

    Raises:
        ConfigError: If the file cannot be read, or lists no image of a table that was read.
    """
    if not node.get("leave_out"):
        return table
    path = Path(node.leave_out).expanduser()
    names = listed_images(path)
    codes, known = table.codes(column)
    gone = np.append(np.isin(known.astype(str), names), False)[codes]  # a row without a name has the code -1
    if not gone.any():
        if column == "image":
            raise ConfigError(
                f"dataset.leave_out={path}: none of its {len(names)} names is an image of the table (e.g. {names[0]}); "
                f"write them as the table does: {known[0] if len(known) else '?'}"
            )
        return table
    kept = (
        None if cache is None else cache / TABLES / f"{node.get('name', 'dataset')}-{_digest(table, names)}-kept.arrow"
    )
    if kept is not None and kept.is_file():
        stored = FaceTable.open(kept)
        if stored.root.absolute() == table.root.absolute():
            return stored
    skipped: dict[str, Any] = dict(table.metadata.get("skipped") or {})  # type: ignore[arg-type, call-overload]
    examples: dict[str, Any] = dict(table.metadata.get("skipped_examples") or {})  # type: ignore[arg-type, call-overload]
    skipped[LEFT_OUT] = int(gone.sum())
    examples[LEFT_OUT] = [str(name) for name in table.strings(column, np.flatnonzero(gone)[:EXAMPLES])[0]]
    shorter = table.take(np.flatnonzero(~gone)).with_metadata(skipped=skipped, skipped_examples=examples)
    try:
        return shorter if kept is None else shorter.save(kept)
    except OSError:  # A cache that cannot be written to costs memory only.
        return shorter


def _digest(table: FaceTable, names: list[str]) -> str:
    said = json.dumps([table.fingerprint, dict(table.metadata), sorted(names)], sort_keys=True, default=str)
    return hashlib.sha256(said.encode()).hexdigest()[:16]


def _located(arguments: Mapping[Any, Any]) -> dict[str, Any]:
    """Return arguments in which paths of this file system are absolute: a relative one is another from elsewhere."""
    return {
        str(key): str(Path(value).expanduser().absolute())
        if isinstance(value, str) and key != "_target_" and Path(value).expanduser().exists()
        else value
        for key, value in arguments.items()
    }


def build_images(node: DictConfig, table: FaceTable) -> ImageReader:
    """Return the reader of a dataset's images: that of its node ``images``, which is given the table if it takes one.

    Without such a node images are the files that the table names.
    """
    if not node.get("images"):
        return FileImages(table, table.root)
    where = f"dataset {node.get('name', 'dataset')}.images"
    takes = inspect.signature(_callee(node.images, where)).parameters
    return make(node.images, where, **({"table": table} if "table" in takes and "table" not in node.images else {}))


def _callee(node: DictConfig, what: str) -> Callable[..., Any]:
    """Return the function or class that a node names."""
    target = node.get("_target_")
    try:
        return get_object(str(target))
    except (ImportError, ValueError, AttributeError) as error:
        raise translated(error, what) from error


def with_near_duplicates(table: FaceTable, images: ImageReader, name: str, cache: Path | None) -> FaceTable:
    """Return the table with the column ``near_duplicates``: rows with one value show almost the same image."""
    from affect.data.duplicates import near_duplicate_groups

    folder = None if cache is None else cache / TABLES
    with tqdm(total=len(table), desc=f"{name}: near-duplicates", unit="image", disable=not is_first_process()) as bar:
        groups = near_duplicate_groups(images, len(table), folder, bar.update)
    # Text, as every column that rows are grouped by.
    return table.with_columns({NEAR_DUPLICATES: groups.astype(str).astype(object)})


# ----------------------------------------------------------------------------------------------------- tasks


def build_tasks(config: DictConfig) -> dict[str, Task]:
    """Return the tasks of a config, not yet bound to tables.

    Raises:
        ConfigError: If there is none, or ``loss=``/``target=`` was given though no task uses it.
    """
    if not config.get("task"):
        raise ConfigError("no task: choose at least one, e.g. task=[au,expression]")
    # An experiment may hold settings of a task that the command line then leaves out; they name no class.
    selected = {name: node for name, node in config.task.items() if node and "_target_" in node}
    plain = [OmegaConf.to_container(node, resolve=True) for node in selected.values()]
    for group in ("loss", "target"):
        chosen = OmegaConf.to_container(config[group], resolve=True) if config.get(group) else None
        if chosen and not _holds(plain, chosen) and chosen != _default_option(group):
            names = ", ".join(selected)
            raise ConfigError(f"{group}=…: no selected task uses it (task=[{names}]); it acts on task=au, leave it out")
    return {str(name): make(node, f"task.{name}") for name, node in selected.items()}


def _holds(node: Any, part: Any) -> bool:  # noqa: ANN401
    """Return whether plain data contains ``part`` at any depth."""
    children = node.values() if isinstance(node, dict) else node if isinstance(node, list) else ()
    return node == part or any(_holds(child, part) for child in children)


def _default_option(group: str) -> Any:  # noqa: ANN401
    """Return the content of the option that ``affect train`` takes of a group when none is given."""
    folder = config_directory()
    for entry in OmegaConf.load(folder / "train.yaml").defaults:
        if isinstance(entry, DictConfig) and group in entry:
            return OmegaConf.to_container(OmegaConf.load(folder / group / f"{entry[group]}.yaml"), resolve=True)
    return None


def bound_config(config: DictConfig, tasks: Mapping[str, Task]) -> DictConfig:
    """Return the config with every name that tasks took from the tables written out, resolved."""
    resolved = OmegaConf.create(OmegaConf.to_container(config, resolve=True))
    for name, task in tasks.items():
        for key, value in task.vocabulary().items():
            OmegaConf.update(resolved, f"task.{name}.{key}", value)
    return resolved


# --------------------------------------------------------------------------------------------- data, model


def build_datamodule(
    config: DictConfig,
    sources: list[Source],
    tasks: dict[str, Task],
    image_size: int,
    schemes: tuple[str, ...] = (),
) -> FaceDataModule:
    """Return the data module of a run, set up: tasks bound, labels checked, parts assigned, statistics taken."""
    protocol, own = build_protocols(config)
    names = {key: str(node.get("name", "dataset")) for key, node in source_nodes(config).items()}
    train = OmegaConf.to_container(config.transform.train, resolve=True) if config.get("transform") else None
    plain = FaceTransform(size=image_size)
    transform = FaceTransform(size=image_size, **train) if train is not None else plain
    return FaceDataModule(
        sources=sources,
        tasks=tasks,
        protocol=protocol,
        train_transform=transform,
        eval_transform=plain,
        batch_size=config.data.batch_size,
        num_workers=config.data.num_workers,
        prefetch_factor=config.data.get("prefetch_factor"),
        pin_memory=config.data.get("pin_memory"),
        sampling=Sampling(**OmegaConf.to_container(config.data.get("sampling") or OmegaConf.create({}))),
        schemes=schemes,
        seed=config.get("seed", 0),
        limit=config.data.get("limit"),
        protocols={names[key]: found for key, found in own.items() if found is not protocol},
    )


def build_model(config: DictConfig, tasks: Mapping[str, Task]) -> AffectModule:
    """Return the Lightning module of a config for bound tasks."""
    optimizer = make(config.optimizer, "optimizer")
    scheduler = make(config.get("scheduler"), "scheduler")
    weighting = make(config.get("weighting"), "weighting")
    objectives = {str(n): make(node, f"objectives.{n}") for n, node in (config.get("objectives") or {}).items()}
    partial = make(config.model, "model", _partial_=True)
    try:
        module = partial(
            tasks=tasks, optimizer=optimizer, scheduler=scheduler, weighting=weighting, objectives=objectives
        )
    except TypeError as error:
        raise ConfigError(f"model: {error}") from error
    try:
        module.build_optimizer()  # only to see that it can be built: training builds its own
    except (TypeError, ValueError) as error:
        raise translated(error, "optimizer") from error
    return module
