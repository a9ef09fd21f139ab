# SPDX-License-Identifier: Apache-2.0
"""``affect evaluate``: predictions and metrics of a trained run or a release on a dataset."""

from __future__ import annotations

import hashlib
import time
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from omegaconf import DictConfig, OmegaConf
from rich.console import Console

from affect.commands import assembly, inference
from affect.commands.run_folder import CONFIG, RESULTS
from affect.commands.train import check_columns, group_columns, quiet
from affect.data.datamodule import ALL
from affect.data.images import Source
from affect.data.protocol import TEST
from affect.errors import CheckpointError, ConfigError
from affect.geometry import CropRecipe
from affect.metrics import F1
from affect.release import MODEL, Release, build_model, build_tasks, check_config, read_release
from affect.report import environment, read_json, results_table, subgroup_tables, write_json
from affect.tasks import Task

PARTS = ("train", "validation", "test", "all")


def run(config: DictConfig) -> None:
    """Write predictions and metrics of ``checkpoint`` on a part of ``dataset`` and print the table."""
    quiet()
    started = time.time()
    console = Console()
    if config.part not in (None, *PARTS):
        raise ConfigError(f"part={config.part}: write one of {', '.join(PARTS)}")
    trust = list(config.trust)
    release = read_release(Path(config.checkpoint).expanduser(), trust)
    settings = data_settings(config, release, trust)
    described = release.preprocess.get("recipe")
    sources = assembly.build_sources(settings, CropRecipe.read(described) if described else None)
    part = config.part or default_part(settings, stored_run(release, trust), sources)
    offered = build_tasks(release)
    tasks = usable_tasks(offered, sources, release, console)
    if "f1_empty" in (config.get("protocol") or {}):
        score_empty_outputs(tasks, float(settings.protocol.f1_empty))
    module = build_model(release, build_tasks(release))
    image_size = int(release.preprocess["image_size"])
    datamodule = assembly.build_datamodule(settings, sources, tasks, image_size)
    datamodule.setup("test")
    loader = datamodule.part_dataloader(part)
    summary = datamodule.summary()
    total = sum(len(source.table) for source in sources)
    numbers = summary["parts"][part]
    console.print(f"part {part}: {numbers['rows']} rows of {total}, {numbers['groups']} groups")
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    values, index, rows = inference.predict_values(module, loader, device, f"predicting {part}", tasks)
    group_by = group_columns(config)
    check_columns(config, sources)
    table = inference.predictions_table(sources, tasks, values, index, rows, settings.protocol.get("group"), group_by)
    records = inference.table_metrics(table, tasks, config.bootstrap.resamples, config.bootstrap.level, 0, group_by)

    out = Path(config.out) if config.out else Path(config.checkpoint) / "evaluate" / f"{data_name(settings)}-{part}"
    table.to_parquet(out / "predictions" / f"{part}.parquet")
    results: dict[str, Any] = {
        "checkpoint": str(config.checkpoint),
        "sha256": hashlib.sha256((release.folder / MODEL).read_bytes()).hexdigest(),
        "selection": selection_of_run(release),
        "dataset": settings.dataset.name,
        "dataset_config": OmegaConf.to_container(settings.dataset, resolve=True),
        "label_source": [source.table.metadata.get("label_source", "") for source in sources],
        "part": part,
        "protocol": OmegaConf.to_container(settings.protocol, resolve=True),
        "bootstrap": OmegaConf.to_container(config.bootstrap, resolve=True),
        "tasks_left_out": sorted(offered.keys() - tasks.keys()),
        "metrics": {part: records},
        "data": summary,
        "preprocess": release.preprocess,
        "environment": environment(),
        "seconds": time.time() - started,
    }
    write_json(out / "results.json", results)
    shown = [record for record in records if not record.get("subgroup")]
    console.print(results_table(shown, f"{settings.dataset.name}, {part} part"))
    if group_by:
        for subgroups in subgroup_tables(records):
            console.print(subgroups)
    console.print(f"[bold]{out}[/bold]: results.json, predictions/{part}.parquet")


def default_part(settings: DictConfig, stored: DictConfig | None, sources: Sequence[Source]) -> str:
    """Return the part where the command line names none: ``test``, but ``all`` of another set without a test part.

    Args:
        settings: Nodes ``dataset`` and ``protocol`` of the evaluation.
        stored: Those of the run that made the checkpoint; rows of the same set may have trained it.
        sources: The dataset.
    """
    if stored is not None and all(settings.dataset.get(key) == stored.dataset.get(key) for key in ("name", "table")):
        return TEST
    wanted = TEST if settings.protocol.get("test") is None else settings.protocol.get("test")
    official = any("part" in s.table.names and wanted in s.table.codes("part")[1] for s in sources)
    return TEST if official else ALL


def data_name(settings: DictConfig) -> str:
    """Return the dataset's name, with that of the user's table where it reads one."""
    table = settings.dataset.get("table")
    return f"{settings.dataset.name}-{Path(table).stem}" if table else str(settings.dataset.name)


def score_empty_outputs(tasks: Mapping[str, Task], value: float) -> None:
    """Let every F1 of ``tasks`` give ``value`` to an output without positives and without predictions."""
    for metric in (metric for task in tasks.values() for metric in task.metrics):
        if isinstance(metric, F1):
            metric.empty = value


def selection_of_run(release: Release) -> dict[str, Any] | None:
    """Return what selected the weights, as the run that the release lies in noted it; None without a run."""
    path = release.folder.parent / RESULTS
    try:
        results = read_json(path) if path.is_file() else None
    except ValueError as error:
        raise CheckpointError(f"{path}: damaged ({error})") from error
    return results.get("selection") if isinstance(results, dict) else None


def data_settings(config: DictConfig, release: Release, trust: list[str]) -> DictConfig:
    """Return the nodes ``dataset``, ``protocol`` and ``data`` of the evaluation.

    What the command line leaves open comes from the run that made the checkpoint.
    """
    settings = OmegaConf.create(OmegaConf.to_container(config, resolve=False))
    OmegaConf.set_struct(settings, False)
    settings.encoder = {
        "image_size": release.preprocess["image_size"]
    }  # what a crop recipe of the config tree asks for
    stored = stored_run(release, trust)
    if not settings.get("dataset"):
        if stored is None:
            raise ConfigError(f"checkpoint={config.checkpoint} is a release without its run: name a dataset=…")
        settings.dataset = stored.dataset
        if settings.data.limit is None:
            settings.data.limit = stored.data.limit
    elif not (settings.dataset.get("read") or settings.dataset.get("sources")):
        raise ConfigError(f"dataset.{next(iter(settings.dataset))}: name the dataset too (dataset=<name>)")
    if stored is not None:
        # A part of the protocol (+protocol.test=1) changes the run's; a whole one (protocol=default) replaces it.
        settings.protocol = OmegaConf.merge(stored.protocol, settings.get("protocol") or {})
    if not settings.get("protocol"):
        raise ConfigError("name a protocol=… (e.g. protocol=default)")
    recipe = release.preprocess.get("recipe")
    given = assembly.make(settings.get("prepare"), "prepare")
    if given is not None and recipe is not None and given.describe() != recipe:
        differing = sorted(key for key in recipe if given.describe().get(key) != recipe[key])
        raise ConfigError(f"prepare: the checkpoint was trained on other crops (differs in {', '.join(differing)})")
    return settings


def stored_run(release: Release, trust: list[str]) -> DictConfig | None:
    """Return the nodes ``dataset``, ``protocol`` and ``data.limit`` of the run that a release lies in, if it does.

    Raises:
        CheckpointError: If they could run code that is neither ours nor trusted.
    """
    path = release.folder.parent / CONFIG
    loaded = OmegaConf.load(path) if path.is_file() else None
    if not isinstance(loaded, DictConfig) or "dataset" not in loaded or "protocol" not in loaded:
        return None
    plain = OmegaConf.to_container(loaded, resolve=False)
    assert isinstance(plain, dict)
    kept = {"dataset": plain["dataset"], "protocol": plain["protocol"], "data": {"limit": None}}
    if isinstance(plain.get("data"), dict):
        kept["data"]["limit"] = plain["data"].get("limit")
    check_config(kept, trust, str(path), dataset=True)
    return OmegaConf.create(kept)


def usable_tasks(tasks: dict[str, Task], sources: list[Source], release: Release, console: Console) -> dict[str, Task]:
    """Return the tasks that the tables have labels for, and say which are left out.

    Raises:
        CheckpointError: If there is none.
    """
    names = frozenset().union(*(source.table.names for source in sources))
    usable = {name: task for name, task in tasks.items() if task.columns(names)}
    for name in tasks.keys() - usable.keys():
        console.print(f"not evaluated: {name} (the table has none of {', '.join(tasks[name].wanted()[:4])}…)")
    if not usable:
        offered = "; ".join(f"{name}: {', '.join(outputs[:4])}" for name, outputs in release.labels.items())
        raise CheckpointError(
            f"the checkpoint predicts other things than the table has labels for (it predicts {offered}; the table has "
            f"{', '.join(sorted(names)[:8])})"
        )
    return usable
