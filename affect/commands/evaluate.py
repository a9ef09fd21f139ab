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

from affect.commands import assembly, decisions, inference
from affect.commands.configuration import config_directory, is_given
from affect.commands.expression_classes import class_note, class_records
from affect.commands.run_folder import CONFIG, RESULTS
from affect.commands.train import check_columns, group_columns, headline_names, headline_table, missing_faces, quiet
from affect.data.datamodule import ALL, FaceDataModule
from affect.data.images import Source
from affect.data.protocol import TEST, known_people, part_name
from affect.errors import CheckpointError, ConfigError, DataError, near
from affect.foreign import (
    PACKAGED,
    Adapter,
    Program,
    adapter_names,
    build_predictor,
    open_checkpoint,
    read_adapter,
)
from affect.foreign.packaged import PackagedRelease
from affect.geometry import CropRecipe
from affect.metrics import F1
from affect.release import MODEL, PREPROCESS, Release, build_tasks, check_config, read_plain
from affect.report import environment, provenance, read_json, results_table, subgroup_tables, write_json
from affect.report.provenance import ON_TEST
from affect.tasks import Task

PARTS = ("train", "validation", "test", "all")


def run(config: DictConfig) -> None:
    """Write predictions and metrics of ``checkpoint`` on a part of ``dataset`` and print the table."""
    quiet()
    started = time.time()
    console = Console()
    if config.part not in (None, *PARTS):
        raise ConfigError(f"part={config.part}: write one of {', '.join(PARTS)}")
    if config.thresholds not in (None, decisions.FIXED):
        raise ConfigError(f"thresholds={config.thresholds}: write {decisions.FIXED}, or null for the checkpoint's own")
    asked = decisions.check_window(config.smoothing)
    trust = list(config.trust)
    release = open_checkpoint(str(config.checkpoint), trust, chosen_adapter(config))
    settings = data_settings(config, release, trust)
    recipe, differing = crop_recipe(settings, release, stored_run(release, trust), is_given("prepare"))
    # Who tests holds nothing out, so near-duplicates need not be found again.
    sources = assembly.build_sources(settings, recipe, hold_out=config.part in ("train", "validation"))
    differing += crop_differences([source.described for source in sources if source.described != recipe], release)
    for line in differing:
        console.print(f"note: {line}", highlight=False, markup=False)
    part = config.part or default_part(settings, stored_run(release, trust), sources, release.training.get("tables"))
    offered = build_tasks(release)
    tasks = usable_tasks(offered, sources, release, console)
    if "f1_empty" in (config.get("protocol") or {}):
        score_empty_outputs(tasks, float(settings.protocol.f1_empty))
    thresholds = decisions.read_thresholds(release.preprocess, str(release.folder / PREPROCESS))
    if config.thresholds == decisions.FIXED or thresholds is None:
        thresholds = decisions.describe(tasks, decisions.FIXED)
    decisions.apply(tasks, thresholds["values"])
    window = decisions.check_window(release.preprocess.get("smoothing")) if config.smoothing is None else asked
    module = build_predictor(release, build_tasks(release))
    image_size = int(release.preprocess["image_size"])
    datamodule = assembly.build_datamodule(settings, sources, tasks, image_size)
    datamodule.setup("test")
    chosen_rows = datamodule.part_rows(part)
    leaks = trained_people(datamodule, part, release)
    headline, left_out = inference.resolve_headline(datamodule.protocol.headline, tasks)
    subsets = (datamodule.protocol.subsets or {}) if part in (TEST, ALL) else {}
    inference.require_subset_columns(sources, subsets)
    inference.require_absent_values(datamodule.sources, tasks, datamodule.protocols, chosen_rows)
    loader = datamodule.part_dataloader(part)
    summary = datamodule.summary()
    summary["leaks"] = [*summary["leaks"], *leaks]
    summary["notes"] += left_out
    total = sum(len(source.table) for source in sources)
    numbers = summary["parts"][part]
    console.print(f"part {part}: {numbers['rows']} rows of {total}, {numbers['groups']} groups")
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    values, index, rows = inference.predict_values(module, loader, device, f"predicting {part}", tasks)
    group_by = group_columns(config)
    check_columns(config, sources)
    summary["notes"] += decisions.smooth_values(values, datamodule.sources, tasks, index, rows, window)
    inference.count_as_absent(values, datamodule.sources, tasks, datamodule.protocols, index, rows)
    groups = [protocol.group for protocol in datamodule.protocols]
    table = inference.predictions_table(datamodule.sources, tasks, values, index, rows, groups, group_by, subsets)
    bootstrap = (config.bootstrap.resamples, config.bootstrap.level)
    records = inference.table_metrics(table, tasks, *bootstrap, 0, group_by)
    sums = inference.headline_records(table, tasks, headline, *bootstrap)
    classes = class_records(table, tasks, *bootstrap)
    for name, found in classes.items():
        summary["notes"].append(class_note(name, found))

    out = Path(config.out) if config.out else output_folder(str(config.checkpoint), release)
    out = out if config.out else out / f"{data_name(settings)}-{part}"
    table.to_parquet(out / "predictions" / f"{part}.parquet")
    results: dict[str, Any] = {
        "checkpoint": str(config.checkpoint),
        "sha256": weights_hash(release),
        "selection": selection_of_run(release),
        "dataset": settings.dataset.name,
        "dataset_config": OmegaConf.to_container(settings.dataset, resolve=True),
        "label_source": [source.table.metadata.get("label_source", "") for source in sources],
        "part": part,
        "protocol": OmegaConf.to_container(settings.protocol, resolve=True),
        "bootstrap": OmegaConf.to_container(config.bootstrap, resolve=True),
        "thresholds": thresholds,
        "smoothing": window,
        "error_lengths": inference.error_lengths(tasks),
        "tasks_left_out": sorted(offered.keys() - tasks.keys()),
        "headline": sums,
        "metrics": {part: records},
        "all_classes": classes,
        "missing_faces": missing_faces(settings, summary),
        "data": summary,
        "preprocess": release.preprocess,
        "crops_differ": differing,
        "environment": environment(),
        "seconds": time.time() - started,
    }
    write_json(out / "results.json", results)
    shown = [record for record in records if not record.get("subgroup")]
    note = provenance(results, part)
    title = f"{settings.dataset.name}, {part} part"
    if (results["selection"] or {}).get("rule") == "best_on_test":
        title += f", {ON_TEST}"
    for leak in summary["leaks"]:
        console.print(f"LEAK (protocol.allow_leak=true): {leak}", highlight=False, markup=False)
    if sums:
        console.print(headline_table(sums, title, note))
    console.print(results_table(shown, title, note=note))
    for name, found in classes.items():
        console.print(f"note: {class_note(name, found)}", highlight=False, markup=False)
        console.print(
            results_table(found["records"], f"{title}, {name} over all {len(found['all'])} classes", note=note)
        )
    if any(record.get("subgroup") for record in records):
        for subgroups in subgroup_tables(records, note=note, names=headline_names(sums)):
            console.print(subgroups)
    console.print(f"[bold]{out}[/bold]: results.json, predictions/{part}.parquet")


def chosen_adapter(config: DictConfig) -> Adapter | None:
    """Return the adapter of an ONNX file: ``adapter=<name or YAML file>``, or the YAML file of its name beside it.

    Raises:
        ConfigError: If there is no adapter of that name.
    """
    given = config.get("adapter")
    if given is None:
        beside = Path(str(config.checkpoint)).expanduser().with_suffix(".yaml")
        return read_adapter(beside) if str(config.checkpoint).endswith(".onnx") and beside.is_file() else None
    if str(given).endswith((".yaml", ".yml")):
        return read_adapter(Path(str(given)).expanduser())
    names = adapter_names(config_directory())
    if given not in names:
        raise ConfigError(f"adapter={given}: {near(str(given), names)}; or give a YAML file")
    return read_adapter(config_directory() / "foreign" / f"{given}.yaml")


def output_folder(checkpoint: str, release: Release) -> Path:
    """Return the folder of a checkpoint's evaluations: inside its own, beside an ONNX file, or here for others."""
    if isinstance(release, Program):
        return release.file.with_suffix(".evaluate")
    path = Path(checkpoint).expanduser()
    if isinstance(release, PackagedRelease) or not path.is_dir():
        return Path("evaluate") / checkpoint.partition(":")[2].replace("/", "--").replace("@", "-")
    return path / "evaluate"


def weights_hash(release: Release) -> str:
    """Return the hash of what holds a checkpoint's weights."""
    if isinstance(release, PackagedRelease):
        return PACKAGED[release.network].sha256
    content = release.content if isinstance(release, Program) else (release.folder / MODEL).read_bytes()
    return hashlib.sha256(content).hexdigest()


def trained_people(datamodule: FaceDataModule, part: str, release: Release) -> list[str]:
    """Return sentences on people of ``part`` that the model was trained on, if ``protocol.allow_leak`` lets them pass.

    A training or validation part that was asked for by name says itself what it is.

    Raises:
        DataError: If there are some and it does not.
    """
    if part not in (TEST, ALL):
        return []
    leaks = known_people(datamodule.sources, datamodule.part_rows(part), release.people)
    if leaks and not datamodule.protocol.allow_leak:
        raise DataError(
            f"{'; '.join(leaks)}; evaluate on other people, leave these out (protocol.keep), or let "
            "allow_leak=true mark every number"
        )
    return leaks


def default_part(
    settings: DictConfig,
    stored: DictConfig | None,
    sources: Sequence[Source],
    tables: Mapping[str, str] | None = None,
) -> str:
    """Return the part where the command line names none: ``test``, but ``all`` of another set without a test part.

    Args:
        settings: Nodes ``dataset`` and ``protocol`` of the evaluation.
        stored: Those of the run that made the checkpoint; rows of the same set may have trained it.
        sources: The dataset.
        tables: Fingerprints of the tables that trained a release, which does not say where they lay.
    """
    if stored is not None and tables and any(source.table.fingerprint in tables.values() for source in sources):
        return TEST
    if stored is not None and all(settings.dataset.get(key) == stored.dataset.get(key) for key in ("name", "table")):
        return TEST
    wanted = set(part_name(settings.protocol.get("test")).casefold().split("+"))
    found = [{str(n).strip().casefold() for n in s.table.codes("part")[1]} for s in sources if "part" in s.table.names]
    return TEST if any(wanted & names for names in found) else ALL


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
    if isinstance(release, Program):
        return release.selection
    if release.training:
        selected = release.training.get("selected")
        return dict(selected) if isinstance(selected, dict) else None
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
    node = settings.get("dataset") or OmegaConf.create({})
    if not _is_whole(node):
        if stored is None:
            raise ConfigError(f"checkpoint={config.checkpoint} is a release without its run: name a dataset=…")
        require_place(stored, node, str(config.checkpoint), release)
        settings.dataset, settings.selection = restated(stored.dataset, node), stored.selection
        if settings.data.limit is None:
            settings.data.limit = stored.data.limit
    if settings.data.limit == "all":
        settings.data.limit = None
    if stored is not None:
        # A part of the protocol (protocol.test=1) changes the run's; a whole one (protocol=default) replaces it.
        given = settings.get("protocol") or OmegaConf.create({})
        if settings.dataset.get("name") == stored.dataset.get("name") and not is_given("protocol"):
            given = OmegaConf.create({})  # the same set: its fold is that of the training, not the set's first one
        settings.protocol = OmegaConf.merge(stored.protocol, given)
        for key in ("keep", "subsets", "headline"):  # A mapping is replaced, not mixed with that of another protocol.
            if key in given:
                settings.protocol[key] = given[key]
        settings.protocol.allow_leak = bool(given.get("allow_leak"))  # who reads the numbers says so, no checkpoint
    if not settings.get("protocol"):
        raise ConfigError("name a protocol=… (e.g. protocol=default)")
    if config.get("allow_leak"):
        settings.protocol.allow_leak = True
    return settings


def require_place(stored: DictConfig, given: DictConfig, checkpoint: str, release: Release) -> None:
    """Refuse to look for a published checkpoint's own dataset where nobody said that it lies.

    Raises:
        ConfigError: With what to add to the command line.
    """
    if not release.training:
        return
    # A table names its folder, or lies in it.
    places = {"table": "table=<your table>"} if "table" in stored.dataset else {"root": "root=<its folder>"}
    for key, what in places.items():
        read = stored.dataset.get("read")
        asked = key in stored.dataset and stored.dataset[key] is None and isinstance(read, DictConfig) and key in read
        if asked and given.get(key) is None and stored.dataset.name not in ("orl", "faces"):
            name = stored.dataset.name
            raise ConfigError(
                f"checkpoint={checkpoint} was trained on {name}, and does not say where yours lies: add dataset={name} "
                f"dataset.{what}"
            )


def _is_whole(node: DictConfig) -> bool:
    """Return whether a node is a dataset, not some keys of one."""
    listed = node.get("sources")
    return bool(node.get("read") or (listed and all(source.get("read") for source in listed.values())))


def restated(stored: DictConfig, given: DictConfig, place: str = "dataset") -> DictConfig:
    """Return the stored node of a dataset with the keys that the command line gives.

    A stored node is resolved. Where ``read``, ``images`` or ``expected`` take an argument of the same name and had the
    same value, they took it from the key that changes, and change with it.

    Raises:
        ConfigError: If the dataset has no such key.
    """
    found = OmegaConf.create(OmegaConf.to_container(stored))
    for key, value in given.items():
        if key not in stored:
            raise ConfigError(f"{place} has no key {key!r}; {near(str(key), [str(name) for name in stored])}")
        if isinstance(value, DictConfig) and isinstance(stored[key], DictConfig):
            found[key] = restated(stored[key], value, f"{place}.{key}")
            continue
        found[key] = value
        for name in ("read", "images", "expected"):
            node = stored.get(name)
            if isinstance(node, DictConfig) and key in node and node[key] == stored[key]:
                found[name][key] = value
    return found


def crop_recipe(
    settings: DictConfig, release: Release, stored: DictConfig | None, given: bool
) -> tuple[CropRecipe | None, list[str]]:
    """Return how faces are cropped, and a sentence where that is not how the checkpoint's were.

    Photographs are cropped as the checkpoint's were, whatever their dataset chooses for a training. Images that are
    delivered as crops (``dataset.cropped``) are taken as their dataset says. ``prepare=…`` of the command line wins.

    Args:
        settings: What ``data_settings`` returned.
        release: The checkpoint.
        stored: Its run, if it lies in one; that knows whether its crops were stored.
        given: Whether the command line names ``prepare``.
    """
    described = release.preprocess.get("recipe")
    trained = CropRecipe.read(described) if described else None
    own = trained
    if stored is not None and stored.get("prepare"):
        run = assembly.make(stored.prepare, "prepare")
        if run is not None and trained is not None and run.composed() == trained.composed():
            own = run
    chosen = assembly.make(settings.get("prepare"), "prepare")
    if chosen is None or not (given or settings.dataset.get("cropped")):
        return own, []
    return chosen, crop_differences([chosen], release)


def crop_differences(recipes: Sequence[CropRecipe | None], release: Release) -> list[str]:
    """Return a sentence for each recipe (from photographs to the model's input) that is not the checkpoint's."""
    found = []
    described = release.preprocess.get("recipe")
    trained = _of_crops(CropRecipe.read(described) if described else None)
    for recipe in recipes:
        here = _of_crops(recipe)
        if bool(here) != bool(trained):
            names = [node.get("kind", "whole images") for node in (here, trained)]
            found.append(f"prepare: crops are not those that the checkpoint was trained on: {names[0]}, not {names[1]}")
            continue
        keys = [key for key in sorted(here.keys() | trained.keys()) if here.get(key) != trained.get(key)]
        if keys:
            listed = ", ".join(f"{key} {here.get(key)}, not {trained.get(key)}" for key in keys)
            found.append(f"prepare: crops are not those that the checkpoint was trained on: {listed}")
    return found


def _of_crops(recipe: CropRecipe | None) -> dict[str, Any]:
    """Return what a recipe says about the way from photographs to crops; empty for whole images."""
    described = {} if recipe is None else recipe.composed().describe()
    return {key: value for key, value in described.items() if key != "name"}


def stored_run(release: Release, trust: list[str]) -> DictConfig | None:
    """Return the nodes ``dataset``, ``protocol``, ``selection``, ``prepare`` and ``data.limit`` of a release's run.

    None if it lies in none.

    Raises:
        CheckpointError: If they could run code that is neither ours nor trusted.
    """
    if release.training:
        keys = ("dataset", "protocol", "selection", "prepare")
        told = {key: release.training[key] for key in keys if release.training.get(key)}
        limit = (release.training.get("data") or {}).get("limit")
        return OmegaConf.create({"selection": "best_val", "data": {"limit": limit}, "protocol": {}} | told)
    if isinstance(release, Program | PackagedRelease):
        return None
    path = release.folder.parent / CONFIG
    # As plain values: OmegaConf copies a node wherever it is named, which a few lines can make last for ever.
    plain = read_plain(path) if path.is_file() else None
    if not isinstance(plain, dict) or "dataset" not in plain or "protocol" not in plain:
        return None
    rule = str(plain.get("selection") or "best_val")
    kept = {"dataset": plain["dataset"], "protocol": plain["protocol"], "selection": rule, "data": {"limit": None}}
    if plain.get("prepare"):
        kept["prepare"] = plain["prepare"]
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
        lacking = f"not evaluated: {name} (the table has none of {', '.join(tasks[name].wanted()[:4])}…)"
        console.print(lacking, markup=False)
    if not usable:
        offered = "; ".join(f"{name}: {', '.join(outputs[:4])}" for name, outputs in release.labels.items())
        raise CheckpointError(
            f"the checkpoint predicts other things than the table has labels for (it predicts {offered}; the table has "
            f"{', '.join(sorted(names)[:8])})"
        )
    return usable
