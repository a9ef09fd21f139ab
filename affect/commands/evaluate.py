# SPDX-License-Identifier: Apache-2.0
"""``affect evaluate``: predictions and metrics of a trained run or a release on a dataset."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch
from omegaconf import DictConfig, OmegaConf
from rich.console import Console

from affect.commands import assembly, inference
from affect.commands.run_folder import CONFIG
from affect.commands.train import quiet
from affect.data.images import Source
from affect.errors import CheckpointError, ConfigError
from affect.geometry import CropRecipe
from affect.release import Release, build_model, build_tasks, check_config, read_release
from affect.report import environment, results_table, subgroup_tables, write_json
from affect.tasks import Task

PARTS = ("train", "validation", "test", "all")


def run(config: DictConfig) -> None:
    """Write predictions and metrics of ``checkpoint`` on ``part`` of ``dataset`` and print the table."""
    quiet()
    console = Console()
    if config.part not in PARTS:
        raise ConfigError(f"part={config.part}: write one of {', '.join(PARTS)}")
    trust = list(config.trust)
    release = read_release(Path(config.checkpoint).expanduser(), trust)
    settings = data_settings(config, release, trust)
    described = release.preprocess.get("recipe")
    sources = assembly.build_sources(settings, CropRecipe.read(described) if described else None)
    tasks = usable_tasks(build_tasks(release), sources, release, console)
    module = build_model(release, build_tasks(release))
    module.tasks = tasks
    image_size = int(release.preprocess["image_size"])
    datamodule = assembly.build_datamodule(settings, sources, tasks, image_size)
    datamodule.setup("test")
    loader = datamodule.part_dataloader(config.part)
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    values, index, rows = inference.predict_values(module, loader, device, f"predicting {config.part}")
    group_by = list(config.group_by)
    table = inference.predictions_table(sources, tasks, values, index, rows, settings.protocol.get("group"), group_by)
    records = inference.table_metrics(table, tasks, config.bootstrap.resamples, config.bootstrap.level, 0, group_by)

    name = settings.dataset.name
    out = Path(config.out) if config.out else Path(config.checkpoint) / "evaluate" / f"{name}-{config.part}"
    table.to_parquet(out / "predictions" / f"{config.part}.parquet")
    results: dict[str, Any] = {
        "checkpoint": str(config.checkpoint),
        "dataset": name,
        "part": config.part,
        "protocol": OmegaConf.to_container(settings.protocol, resolve=True),
        "metrics": {config.part: records},
        "data": datamodule.summary(),
        "preprocess": release.preprocess,
        "environment": environment(),
    }
    write_json(out / "results.json", results)
    console.print(results_table([r for r in records if not r.get("subgroup")], f"{name}, {config.part} part"))
    if group_by:
        for subgroups in subgroup_tables(records):
            console.print(subgroups)
    console.print(f"[bold]{out}[/bold]: results.json, predictions/{config.part}.parquet")


def data_settings(config: DictConfig, release: Release, trust: list[str]) -> DictConfig:
    """Return the nodes ``dataset``, ``protocol`` and ``data`` of the evaluation.

    What the command line leaves open comes from the run that made the checkpoint.
    """
    settings = OmegaConf.create(OmegaConf.to_container(config, resolve=False))
    OmegaConf.set_struct(settings, False)
    stored = stored_run(release, trust)
    if not settings.get("dataset"):
        if stored is None:
            raise ConfigError(f"checkpoint={config.checkpoint} is a release without its run: name a dataset=…")
        settings.dataset, settings.data.limit = stored.dataset, stored.data.limit
    if not settings.get("protocol"):
        if stored is None:
            raise ConfigError("name a protocol=… (e.g. protocol=default)")
        settings.protocol = stored.protocol
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
