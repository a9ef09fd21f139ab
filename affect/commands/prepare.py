# SPDX-License-Identifier: Apache-2.0
"""``affect prepare``: find the faces of a dataset, align them and store their crops for training."""

from __future__ import annotations

import dataclasses
import functools
import os
from collections.abc import Callable
from pathlib import Path

import numpy as np
from omegaconf import DictConfig
from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeElapsedColumn, TimeRemainingColumn

from affect import labels
from affect.commands import assembly
from affect.commands.landmarks import describe_provider, finder_maker, landmark_task, provider_name, read_provider
from affect.commands.prepared import read_arguments, reader_code, recipe_words, stored_recipes, train_command
from affect.data import prepare
from affect.data.prepare import Work
from affect.data.table import FaceTable
from affect.errors import ConfigError
from affect.geometry import CropRecipe, FaceFinder, build_finder
from affect.geometry.providers import FINDERS, describe_finder
from affect.release import Release

OWN = "annotations"


def run(config: DictConfig) -> None:
    """Prepare ``dataset`` by the recipe ``prepare``, or the part of it that ``shard`` names."""
    console = Console()
    if "sources" in config.dataset:
        raise ConfigError("prepare the datasets of a training one by one: dataset=<name>")
    name = str(config.dataset.name)
    recipe = assembly.make(config.prepare, "prepare")
    ready = ", ".join(stored_recipes())
    if recipe is None or not recipe.stored:
        which = "prepare=none" if recipe is None else f"prepare={recipe.name}"
        console.print(
            f"{name}: {which} stores nothing, so nothing has to be prepared. Recipes that store crops: {ready}",
            highlight=False,
        )
        return
    shard = read_shard(config.shard)
    if shard is not None and config.merge:
        raise ConfigError("merge=true comes behind the shards: run it once without shard=…")
    cache = Path(config.paths.cache).expanduser() if config.paths.cache else None
    table = assembly.read_table(config.dataset, cache)
    recipe, release = with_landmarks(recipe, config)
    folder = prepare.folder_of(config.paths.prepared, name, recipe)
    detector, provider = needed_models(recipe, table, name)
    if detector is None and config.landmarks is not None:
        raise ConfigError(
            f"landmarks={config.landmarks}: prepare={recipe.name} takes {name}'s own {recipe.needs}, looks for none; "
            "set prepare.detector=faceapi, or leave landmarks out"
        )
    looking: Callable[[], FaceFinder] | None = None
    if release is not None and detector is not None:
        looking = finder_maker(release, detector, str(config.device), list(config.trust))
    elif detector is not None:
        looking = functools.partial(build_finder, detector, provider, str(config.device))
    work = Work(
        folder,
        table,
        assembly.build_images(config.dataset, table),
        recipe.storage(),
        looking,
        config.store,
        config.format,
        int(config.quality),
    )
    _ = work.finder  # what is missing is said once, here, before anything is written
    models = {"detector": OWN, "provider": OWN} if detector is None else describe_finder(detector, provider)
    if release is not None:
        models["provider"] = describe_provider(release)
    prepare.claim(work, models)
    units = prepare.plan(table, root=prepare.image_root(work))
    if not config.merge:
        mine = units if shard is None else [unit for k, unit in enumerate(units) if k % shard[1] == shard[0]]
        workers = (os.cpu_count() or 1) if config.workers is None else int(config.workers)
        _with_progress(console, work, mine, workers, name)
    if shard is not None:
        left = len(prepare.missing_units(work, units))
        console.print(
            f"{name}: shard {config.shard} is done; {left} of {len(units)} units are left to other shards. When none "
            "is, run the same command with merge=true instead of shard.",
            highlight=False,
        )
        return
    prepared = prepare.merge(work, units, read_arguments(config.dataset), reader_code(config.dataset))
    report(console, name, prepared, len(table))
    settings = recipe_words(recipe, Path(config.paths.prepared))
    console.print(
        f"next: {train_command(config.dataset, prepared, settings)}", soft_wrap=True, highlight=False, markup=False
    )


def with_landmarks(recipe: CropRecipe, config: DictConfig) -> tuple[CropRecipe, Release | None]:
    """Return the recipe with the provider that ``landmarks`` names, and the checkpoint if it is one of a model.

    A model's name in the recipe holds the hash of its checkpoint, so that training finds the crops by it alone.

    Raises:
        ConfigError: If the name is unknown, or a checkpoint is missing, is not asked for, or holds something else.
        DataError: If the recipe aligns by points that the model's scheme does not have.
    """
    asked = str(recipe.provider if config.landmarks is None else config.landmarks)
    if asked in (*FINDERS, OWN):
        if config.checkpoint is not None:
            raise ConfigError(
                f"checkpoint={config.checkpoint} is not used by landmarks={asked}; name its model: landmarks=decafa"
            )
        return dataclasses.replace(recipe, provider=asked), None
    release = read_provider(asked, config.checkpoint, list(config.trust))
    if recipe.needs == "landmarks":  # points that say too little are no surprise of the first face
        count = labels.SCHEMES[landmark_task(release)[1]].points
        recipe.usable(points=np.zeros((1, count, 2)))
    return dataclasses.replace(recipe, provider=provider_name(release)), release


def needed_models(recipe: CropRecipe, table: FaceTable, name: str) -> tuple[str | None, str]:
    """Return detector and landmark provider that have to run; None where the table itself says where faces are.

    Raises:
        ConfigError: If the recipe asks for the dataset's own points or boxes, and it has none.
    """
    if recipe.needs == "nothing":  # whole images are stored; a network only adds where their points are
        return (None, OWN) if recipe.provider == OWN else (recipe.detector, recipe.provider)
    if recipe.provider == OWN or (recipe.needs == "box" and recipe.detector == OWN):
        if not prepare.has_own(table, recipe):
            raise ConfigError(
                f"prepare.provider=annotations: {name} has no {recipe.needs} of its own; use prepare.provider=faceapi"
            )
        return None, OWN
    return recipe.detector, recipe.provider


def read_shard(given: str | None) -> tuple[int, int] | None:
    """Return (i, n) of ``shard=i/n``.

    Raises:
        ConfigError: If it is written in another way, or i is not in 0 … n - 1.
    """
    if given is None:
        return None
    parts = str(given).split("/")
    if len(parts) == 2 and all(part.isdigit() for part in parts) and int(parts[0]) < int(parts[1]):
        return int(parts[0]), int(parts[1])
    raise ConfigError(f"shard={given}: write shard=i/n with i from 0 to n - 1, e.g. shard=0/16")


def _with_progress(console: Console, work: Work, units: list[prepare.Unit], workers: int, name: str) -> None:
    left = [unit for unit in units if not work.unit_path(unit).is_file()]
    images, done = (sum(len(unit.rows) for unit in some) for some in (units, set(units) - set(left)))
    columns = (
        TextColumn("{task.description}"),
        BarColumn(),
        MofNCompleteColumn(),
        TextColumn("{task.fields[missed]} not found"),
        TimeElapsedColumn(),
        TimeRemainingColumn(),
    )
    if done:
        console.print(f"{name}: {done} of {images} images were done before", highlight=False)
    with Progress(*columns, console=console) as bar:
        task = bar.add_task(name, total=images - done, missed=0)
        prepare.run(work, units, workers, lambda count, missed: bar.update(task, completed=count, missed=missed))


def report(console: Console, name: str, table: FaceTable, rows: int) -> None:
    """Print how many faces were found, and what happened to the others."""
    faces: dict[str, int] = dict(table.metadata.get("faces", {}))  # type: ignore[arg-type, call-overload]
    said = {
        "found": "face found",
        "neighbour": "not found, cropped where neighbouring frames have it",
        "centre": "not found, cropped at the table's box or at the middle of the image",
    }
    console.print(f"{name}: {len(table)} crops of {rows} rows", highlight=False)
    for key, count in faces.items():
        console.print(f"  {count:>9}  {said[key]}", highlight=False)
    if rows > len(table):
        console.print(f"  {rows - len(table):>9}  without a crop: unreadable image", highlight=False)
        examples: dict[str, list[str]] = dict(table.metadata.get("skipped_examples", {}))  # type: ignore[arg-type, call-overload]
        for path in examples.get(prepare.UNREADABLE, [])[:3]:
            console.print(f"             {path}", highlight=False)
    several = table.metadata.get("several_faces")
    if several:
        console.print(f"  {several:>9}  of these images show more than one face", highlight=False)
    console.print(f"[bold]{table.path}[/bold]", soft_wrap=True)
