# SPDX-License-Identifier: Apache-2.0
"""Builds the parts of a run from its config: sources, tasks, data module, model. All checks come before long work."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

from hydra.errors import InstantiationException
from hydra.utils import instantiate
from omegaconf import DictConfig, ListConfig, OmegaConf

from affect.commands.configuration import config_directory
from affect.data.datamodule import FaceDataModule
from affect.data.images import FileImages, Source
from affect.data.protocol import Protocol
from affect.data.sampling import Sampling
from affect.data.transforms import FaceTransform
from affect.errors import AffectError, ConfigError
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
        raise translated(error, what) from error


def translated(error: BaseException, what: str) -> AffectError:
    """Return the error of ours inside ``error``, or a one-line ``ConfigError`` about ``what``."""
    inner: BaseException | None = error
    last = error
    while inner is not None:
        if isinstance(inner, AffectError):
            return inner
        last, inner = inner, inner.__cause__
    if isinstance(last, ModuleNotFoundError):
        return ConfigError(f"{what}: {last}; install it, or for a package of yours add --config-dir <its conf folder>")
    lines = [line.strip() for line in str(last).splitlines() if line.strip()]
    return ConfigError(f"{what}: {' '.join(lines[:2]) or type(last).__name__}")


# -------------------------------------------------------------------------------------------------- sources


def build_sources(config: DictConfig, recipe: CropRecipe | None) -> list[Source]:
    """Return the source of ``dataset``, or those of ``dataset.sources`` in their order, cropped by ``recipe``."""
    nodes = config.dataset.get("sources")
    listed = list(nodes.values()) if nodes else [config.dataset]
    return [_build_source(node, recipe) for node in listed]


def _build_source(node: DictConfig, recipe: CropRecipe | None) -> Source:
    name = str(node.get("name", "dataset"))
    root = node.get("root")
    if root is not None and not Path(root).expanduser().is_dir():
        raise ConfigError(f"dataset.root={root}: no such folder")
    table = make(node.read, f"dataset {name}")
    images = make(node.get("images"), f"dataset {name}.images")
    return Source(
        name=name,
        table=table,
        images=images if images is not None else FileImages(table, table.root),
        group=str(node.get("group") or "image"),
        recipe=recipe,
        skipped=dict(table.metadata.get("skipped", {})),
        notes=tuple(table.metadata.get("notes", ())),
    )


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
    protocol = Protocol(
        **OmegaConf.to_container(config.protocol, resolve=True), selection=config.get("selection", "best_val")
    )
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
        sampling=Sampling(**OmegaConf.to_container(config.data.get("sampling") or OmegaConf.create({}))),
        schemes=schemes,
        seed=config.get("seed", 0),
        limit=config.data.get("limit"),
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
