# SPDX-License-Identifier: Apache-2.0
"""``affect collect``: the tables of a sweep, each number computed again from the predictions of its runs.

Runs are told apart by setting, seed and test part. Inside a setting only seed and test part may differ: any other key
that can change a result, another table of labels or other initial weights are refused by name.
"""

from __future__ import annotations

import hashlib
import itertools
import re
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import torch
from omegaconf import OmegaConf
from rich.console import Console
from torch import Tensor
from tqdm import tqdm

from affect.commands import configuration, decisions, sweeps
from affect.commands.inference import encode_truth
from affect.commands.run_folder import CONTENTS, RESULTS, differing, held_config
from affect.commands.starting_point import EARLIER, earlier_weights
from affect.data.protocol import part_name
from affect.data.table import FaceTable
from affect.errors import AffectError, ConfigError, DataError, near
from affect.files import replacing, require_writable
from affect.metrics.base import AdditiveMetric, Metric
from affect.metrics.bootstrap import draws, group_index, percentile_intervals
from affect.metrics.evaluate import FEWEST_GROUPS
from affect.release import build_tasks, read_release
from affect.report import collect as report
from affect.report import environment, provenance, read_json, write_json

TEST_PART = re.compile(r"(dataset\.sources\.[^.]+\.)?protocol\.test")
"""Keys of the test part, which with the seed are all that may differ inside a setting."""

UNNAMED = ""


@dataclass(frozen=True)
class Run:
    """A finished run of a sweep.

    Attributes:
        folder: Its folder.
        setting: Name of its setting.
        seed: Its seed.
        fold: Its test part.
        results: Content of its ``results.json``.
    """

    folder: Path
    setting: str
    seed: int
    fold: str
    results: Mapping[str, Any]


@dataclass
class Setting:
    """The runs of a setting.

    Attributes:
        name: Its name.
        runs: Finished runs by seed and test part.
        seeds: Seeds that were asked for, in their order.
        folds: Test parts that were asked for, in their order.
        reasons: Why a run is missing, by seed and test part.
    """

    name: str
    runs: dict[tuple[int, str], Run] = field(default_factory=dict)
    seeds: list[int] = field(default_factory=list)
    folds: list[str] = field(default_factory=list)
    reasons: dict[tuple[int, str], str] = field(default_factory=dict)

    def expect(self, seed: int, fold: str) -> None:
        """Note that a run was asked for."""
        self.seeds += [] if seed in self.seeds else [seed]
        self.folds += [] if fold in self.folds else [fold]


def run(config: Any) -> None:  # noqa: ANN401
    """Read the runs of a sweep, and write and print its tables."""
    console = Console()
    folder = Path(config.folder).expanduser()
    if not folder.is_dir():
        raise ConfigError(
            f"sweep={config.folder}: no such folder; give the folder of a sweep, as affect train -m says it"
        )
    if config.part not in ("test", "validation"):
        raise ConfigError(f"part={config.part}: write test or validation")
    for key in ("resamples", "digits"):
        if not isinstance(config[key], int) or isinstance(config[key], bool) or config[key] < 0:
            raise ConfigError(f"{key}={config[key]}: give a whole number, 0 or more")
    by = [config.by] if isinstance(config.by, str) else [str(key) for key in config.by or ()]
    settings, search = read_settings(folder, by)
    for setting in settings.values():
        require_one_setting(setting)
    if config.baseline not in (None, "all", *settings):
        raise ConfigError(f"baseline={config.baseline}: {near(str(config.baseline), [*settings, 'all'])}")
    out = Path(config.out).expanduser() if config.out else folder / "collect"
    require_writable(out)
    collected = collect(settings, config, search)
    write(out, collected, config, folder)
    show(console, collected, config)
    console.print(f"[bold]{out}[/bold]: tables.md, tables.tex, scores.csv, summary.csv, comparisons.csv, collect.json")


# ---------------------------------------------------------------------------------------------------- runs


def read_settings(folder: Path, by: Sequence[str] = ()) -> tuple[dict[str, Setting], bool]:
    """Return the settings of a sweep by name, and whether it was a search.

    With ``sweep.json`` its list says which runs there should be and what the sweep varies; without, every run that was
    begun below the folder counts, and ``by`` tells settings apart.

    Raises:
        DataError: If there is no finished run, or two of one setting, seed and test part.
        ConfigError: If no run has a key of ``by``.
    """
    data = sweeps.read_sweep(folder)
    settings: dict[str, Setting] = {}
    missing, read = [], []
    for path, job in _folders(folder, data):
        results, reason = _results(path, job)
        if results is None:
            missing.append((path, job, reason))
        else:
            read.append((path, job, results))
    # What an experiment did to a trained model, compression e.g., has results and a release, too, but is no training.
    found = [(path, job, results) for path, job, results in read if "config" in results]
    for key in by if found else ():
        if not any(_has(results["config"], key) for _, _, results in found):
            known = [name for name, _ in configuration.leaves(found[0][2]["config"])]
            raise ConfigError(f"by: no run has a key {key}; {near(key, known)}")
    for path, job, results in found:
        varied = dict(job["varied"]) if job else {}
        seed, fold = int(results["seed"]), _fold_of(varied, results["config"])
        name = _name(varied, results, by, job is not None)
        setting = settings.setdefault(name, Setting(name))
        setting.expect(seed, fold)
        if (seed, fold) in setting.runs:
            raise DataError(
                f"{name}, seed {seed}, test part {fold}: two runs, {setting.runs[seed, fold].folder} and {path}; "
                "by=[key] tells settings apart"
            )
        setting.runs[seed, fold] = Run(path, name, seed, fold, results)
    for path, job, reason in missing:
        _expect_missing(settings, path, job, by, reason)
    for setting in settings.values():
        setting.seeds.sort()
        setting.folds.sort(key=lambda fold: (int(fold) if fold.isdecimal() else -1, fold))
    if not any(setting.runs for setting in settings.values()):
        said = [f"{name}: {why}" if name else why for name, s in settings.items() for why in s.reasons.values()]
        raise DataError(f"{folder}: no finished run" + (f" ({said[0]})" if said else ""))
    if set(settings) == {UNNAMED}:
        only = settings.pop(UNNAMED)
        only.name = str(next(iter(only.runs.values())).results["name"])
        settings[only.name] = only
    return settings, bool(data and data.get("trials"))


def _folders(folder: Path, data: Mapping[str, Any] | None) -> Iterable[tuple[Path, dict[str, Any] | None]]:
    if data is not None:
        return [(folder / job["folder"], job) for job in data["jobs"]]
    found = {path.parent for name in (RESULTS, CONTENTS) for path in folder.rglob(name)}
    found = {path for path in found if ((path / "release").is_dir() if (path / RESULTS).is_file() else _begun(path))}
    # What lies in the folder of a run (the run that chose its epochs, arms, reruns) belongs to that run.
    return [(path, None) for path in sorted(found) if not found & set(path.parents)]


def _begun(folder: Path) -> dict[str, Any] | None:
    """Return of a run that is not finished what its results would say of its setting; None if it has not begun."""
    config = held_config(folder)
    if config is None:
        return None
    plain = OmegaConf.to_container(config)
    assert isinstance(plain, dict)
    return {"config": plain, "seed": plain["seed"], "name": plain["name"], "dataset": plain["dataset"]["name"]}


def _results(path: Path, job: Mapping[str, Any] | None) -> tuple[dict[str, Any] | None, str]:
    """Return the results of a run; None and why where it has none that can be read."""
    if not (path / RESULTS).is_file():
        return None, _reason(path, job)
    try:
        return read_json(path / RESULTS), ""
    except DataError as error:
        return None, str(error)


def _expect_missing(
    settings: dict[str, Setting], path: Path, job: Mapping[str, Any] | None, by: Sequence[str], reason: str
) -> None:
    """Note a run that is not finished in its setting, or, where nothing tells which that is, in each that lacks it."""
    begun = _begun(path)
    varied = dict(job["varied"]) if job else {}
    given = dict(setting.split("=", 1) for setting in job["settings"] if "=" in setting) if job else {}
    seed = begun["seed"] if begun else given.get("seed")
    fold = _fold_of(varied, begun["config"]) if begun else _given_fold(given)
    for name in [_name(varied, begun, by, job is not None)] if begun or not by else list(settings):
        setting = settings.setdefault(name, Setting(name))
        # Before a run has begun its default seed and test part are known from the others alone.
        seeds = [int(seed)] if seed is not None else list(setting.seeds) or [1]
        folds = [fold] if fold is not None else list(setting.folds) or [part_name(None)]
        for missing in itertools.product(seeds, folds):
            if missing not in setting.runs:
                setting.expect(*missing)
                setting.reasons[missing] = reason


def _given_fold(settings: Mapping[str, str]) -> str | None:
    return next((value.strip("'\"") for key, value in settings.items() if TEST_PART.fullmatch(key)), None)


def _fold_of(settings: Mapping[str, str], config: Mapping[str, Any]) -> str:
    return _given_fold(settings) or part_name(config["protocol"].get("test"))


def _name(varied: Mapping[str, str], results: Mapping[str, Any] | None, by: Sequence[str], listed: bool) -> str:
    if by and results is not None:
        return " ".join(f"{key}={_value_of(results['config'], key)}" for key in by)
    pairs = {key: value for key, value in varied.items() if key != "seed" and not TEST_PART.fullmatch(key)}
    if len(pairs) == 1:
        return next(iter(pairs.values())).strip("'\"")
    if pairs:
        return " ".join(f"{key}={value}" for key, value in pairs.items())
    # The setting of a sweep over seeds and test parts alone has the name of its runs, which missing ones do not tell.
    return UNNAMED if listed or results is None else f"{results['name']} {results['dataset']}"


def _value_of(config: Any, key: str) -> object:  # noqa: ANN401
    for part in key.split("."):
        config = config.get(part) if isinstance(config, Mapping) else None
    return config


def _has(config: Mapping[str, Any], key: str) -> bool:
    *nodes, name = key.split(".")
    node = _value_of(config, ".".join(nodes)) if nodes else config
    return isinstance(node, Mapping) and name in node


def _reason(folder: Path, job: Mapping[str, Any] | None) -> str:
    if job and job["state"] == sweeps.FAILED:
        told = str(job["reason"] or "failed")
        return told.split("): ", 1)[-1] if told.startswith("job ") else told
    if (folder / "last.ckpt").is_file():
        return "not finished: it has a checkpoint to continue from"
    return "begun, without a checkpoint yet" if folder.is_dir() else "not started"


def require_one_setting(setting: Setting) -> None:
    """Refuse runs of one setting that differ in more than seed and test part.

    Weights of an earlier stage may be of several runs where these, too, differ in nothing else.

    Raises:
        ConfigError: With the keys in which they do, and the two runs.
    """
    runs = list(setting.runs.values())
    if not runs:
        return
    first = runs[0]
    config, made_of = OmegaConf.create(dict(first.results["config"])), _made_of(first)
    for other in runs[1:]:
        keys = differing(config, OmegaConf.create(dict(other.results["config"])))
        alike = [key for key in EARLIER if key in keys and _same_stage(first, other, key)]
        keys = [key for key in _of_setting(keys) if key not in alike]
        if keys:
            raise ConfigError(
                f"{setting.name}: only seed and test part may differ inside a setting, but {first.folder} and "
                f"{other.folder} differ in {', '.join(keys[:6])}; by=[{','.join(keys[:2])}] makes settings of them"
            )
        for kind, now in _made_of(other).items():
            if kind in alike:
                continue
            for name in sorted({*now, *made_of.get(kind, {})}):
                old, new = made_of.get(kind, {}).get(name), now.get(name)
                if old != new:
                    raise ConfigError(
                        f"{setting.name}: {first.folder} and {other.folder} are of other data ({kind} {name}: {old} "
                        f"and {new}); train them on the same"
                    )


def _of_setting(keys: Iterable[str]) -> list[str]:
    return [key for key in keys if key != "seed" and not TEST_PART.fullmatch(key)]


def _same_stage(first: Run, other: Run, key: str) -> bool:
    """Return whether the weights that two runs took from earlier runs are of one setting and the same tables."""
    one, two = (_earlier_results(run, key) for run in (first, other))
    if one is None or two is None or (one.get("made_of") or {}).get("table") != (two.get("made_of") or {}).get("table"):
        return False
    return not _of_setting(differing(OmegaConf.create(dict(one["config"])), OmegaConf.create(dict(two["config"]))))


def _earlier_results(run: Run, key: str) -> dict[str, Any] | None:
    """Return the results of the run whose weights a run took; None where they cannot be known any more."""
    given = earlier_weights(OmegaConf.create(dict(run.results["config"]))).get(key)
    places = () if given is None else (given, *given.parents[:2])
    found = next((place / RESULTS for place in places if (place / RESULTS).is_file()), None)
    return None if found is None else read_json(found)


def _made_of(run: Run) -> dict[str, dict[str, str]]:
    stored = run.results.get("made_of")
    if stored is None and (run.folder / CONTENTS).is_file():
        stored = read_json(run.folder / CONTENTS)
    return dict(stored or {})


# -------------------------------------------------------------------------------------------------- numbers


@dataclass
class Part:
    """What the predictions of one run say about one metric.

    Attributes:
        metric: Bound metric, with the thresholds of the run.
        groups: Names of the groups ``(G,)``.
        sums: Statistics summed per group ``(G, …)``, of additive metrics.
        values: Values, targets, masks and the group of each row, of others.
        scores: The metric's numbers on this run's rows.
        rows: A text that is equal for equal labelled rows of equal groups.
    """

    metric: Metric
    groups: np.ndarray
    sums: Tensor | None
    values: tuple[Tensor, Tensor, Tensor, Tensor] | None
    scores: dict[str, float]
    rows: str


def read_parts(run: Run, part: str, trust: Sequence[str] = ()) -> dict[str, list[Part]]:
    """Return for each task what the predictions of a run say about each of its metrics; nothing without a label.

    Raises:
        DataError: If the run has no predictions on the part.
    """
    path = run.folder / "predictions" / f"{part}.parquet"
    if not path.is_file():
        raise DataError(f"{path}: no such file; the run has no predictions on the {part} part")
    tasks = build_tasks(read_release(run.folder, list(trust)))
    for task in tasks.values():
        for metric in task.metrics:
            metric.bind(task.outputs)
    decisions.apply(tasks, (run.results.get("thresholds") or {}).get("values") or {})
    table = FaceTable.read_parquet(path)
    names = table.truth().names
    # A row whose group is not known is one of its own.
    groups = table.strings("group")[0] if "group" in table.names else np.arange(len(table)).astype(str)
    parts: dict[str, list[Part]] = {}
    for name, task in tasks.items():
        if not task.metrics or not task.columns(names):
            continue
        encoded = encode_truth(table, task)
        labelled = np.flatnonzero(encoded.mask.any(1))
        if not len(labelled):
            parts[name] = []
            continue
        values, target, mask = (
            torch.from_numpy(np.asarray(array)[labelled])
            for array in (task.read_values(table), encoded.target, encoded.mask)
        )
        own = np.asarray(groups)[labelled].astype(str)
        index, number = group_index(own)
        # Points lie in each setting's own crops; other labels are the same numbers whoever reads them.
        target_of_rows = None if task.landmark_scheme is not None else np.asarray(encoded.target)[labelled]
        told = _rows_text(table, labelled, own, encoded.mask[labelled], target_of_rows)
        for metric in task.metrics:
            scores = {key: float(value) for key, value in metric.score(values, target, mask).items()}
            sums = (
                metric.group_totals(values, target, mask, index, number) if isinstance(metric, AdditiveMetric) else None
            )
            kept = None if sums is not None else (values, target, mask, index)
            parts.setdefault(name, []).append(Part(metric, np.unique(own), sums, kept, scores, told))
    return parts


def _rows_text(
    table: FaceTable, rows: np.ndarray, groups: np.ndarray, mask: np.ndarray, target: np.ndarray | None
) -> str:
    number = table.numbers("row", rows)[0].astype(np.int64) if "row" in table.names else rows
    source = table.strings("source", rows)[0].astype(str) if "source" in table.names else np.full(len(rows), "")
    order = np.lexsort((number, source))
    digest = hashlib.sha256("\0".join(source[order]).encode())
    digest.update(number[order].tobytes())
    digest.update("\0".join(groups[order]).encode())
    digest.update(np.packbits(mask[order].reshape(len(rows), -1), axis=None).tobytes())
    if target is not None:
        digest.update(np.nan_to_num(target[order].astype(np.float64)).tobytes())
    return digest.hexdigest()[:16]


class Pool:
    """One metric on the test parts of a seed together, as a function of how often each group is drawn.

    Args:
        parts: Of each test part.
        groups: Names of all groups ``(G,)``, sorted.
    """

    def __init__(self, parts: Sequence[Part], groups: np.ndarray) -> None:
        self.metric = parts[0].metric
        where = [torch.from_numpy(np.searchsorted(groups, part.groups)) for part in parts]
        self.sums: Tensor | None = None
        if parts[0].sums is not None:
            self.sums = torch.zeros(len(groups), *parts[0].sums.shape[1:], dtype=torch.float64)
            for part, index in zip(parts, where, strict=True):
                assert part.sums is not None
                self.sums.index_add_(0, index, part.sums)
            return
        kept = [part.values for part in parts if part.values is not None]
        values, target, mask = (torch.cat([each[k] for each in kept]) for k in range(3))
        index = torch.cat([own[each[3]] for own, each in zip(where, kept, strict=True)])
        self.resampler = self.metric.resampler(values, target, mask, index, len(groups))

    def __call__(self, drawn: Tensor) -> dict[str, Tensor]:
        """Return the metric's numbers ``(R,)`` for draws ``(R, G)``."""
        if self.sums is None:
            return self.resampler(drawn)
        assert isinstance(self.metric, AdditiveMetric)
        total = (drawn @ self.sums.flatten(1)).unflatten(1, self.sums.shape[1:])
        return self.metric.label(self.metric.scores(total))


# ------------------------------------------------------------------------------------------------ collecting


@dataclass
class Collected:
    """What a sweep says.

    Attributes:
        tables: A table for each dataset, task and quantity.
        folds: Test parts of each table's dataset.
        comparisons: Differences of settings.
        left: Seeds that are left out.
        notes: What else a reader has to know.
        scores: Rows of ``scores.csv``: every number of every run.
        cells: Main number by ``dataset: task name``, setting and seed, for figures.
    """

    tables: list[report.ScoreTable] = field(default_factory=list)
    folds: dict[str, list[str]] = field(default_factory=dict)
    comparisons: list[report.Comparison] = field(default_factory=list)
    left: list[report.Left] = field(default_factory=list)
    notes: list[str] = field(default_factory=list)
    scores: list[list[object]] = field(default_factory=list)
    cells: dict[str, dict[str, dict[int, float | None]]] = field(default_factory=dict)


def collect(settings: Mapping[str, Setting], config: Any, search: bool = False) -> Collected:  # noqa: ANN401
    """Return the tables and comparisons of settings."""
    found = Collected()
    whole: dict[str, list[int]] = {}
    read: dict[str, dict[tuple[int, str], dict[str, list[Part]]]] = {}
    total = sum(len(setting.runs) for setting in settings.values())
    with tqdm(total=total, desc="reading predictions", leave=False, unit="run") as bar:
        for name, setting in settings.items():
            whole[name], read[name], left = _read_setting(setting, config, bar)
            found.left += left
    usable = [name for name in settings if whole[name]]
    if not usable:
        raise DataError("no seed has all test parts: " + "; ".join(report.left_text(found.left)))
    found.notes += [note for name in usable for note in _notes(settings[name])]
    every = {fold for name in usable for fold in settings[name].folds}
    for name in usable:
        if every - set(settings[name].folds):
            found.notes.append(f"{name}: test part {', '.join(settings[name].folds)} only, others have more")
    datasets: dict[str, list[str]] = {}
    for name in usable:
        datasets.setdefault(str(next(iter(settings[name].runs.values())).results["dataset"]), []).append(name)
    for dataset, names in datasets.items():
        _collect_dataset(found, dataset, names, settings, whole, read, config, search)
    if not found.tables:
        raise DataError("no task has labels in all test parts of a setting: " + "; ".join(found.notes[-3:]))
    return found


def _read_setting(
    setting: Setting,
    config: Any,  # noqa: ANN401
    bar: tqdm,
) -> tuple[list[int], dict[tuple[int, str], dict[str, list[Part]]], list[report.Left]]:
    """Return the seeds of a setting that have every test part, what their runs say, and what is left out and why."""
    read: dict[tuple[int, str], dict[str, list[Part]]] = {}
    reasons = dict(setting.reasons)
    there: dict[tuple[int, str], Mapping[str, float]] = {key: {} for key in setting.runs}
    whole, _ = report.complete_seeds(there, setting.seeds, setting.folds, setting.name, reasons)
    for key, run in setting.runs.items():
        bar.update()
        if key[0] not in whole:
            continue
        try:
            read[key] = read_parts(run, config.part, list(config.trust))
        except AffectError as error:
            # One damaged run must not take the others with it.
            reasons[key] = str(error)
            del there[key]
    whole, left = report.complete_seeds(there, setting.seeds, setting.folds, setting.name, reasons)
    return whole, {key: parts for key, parts in read.items() if key[0] in whole}, left


def _notes(setting: Setting) -> list[str]:
    """Return what stands beside the numbers of a setting: protocol, marks, and code that changed meanwhile."""
    runs = list(setting.runs.values())
    code = [(r.results.get("environment") or {}).get("git") or {} for r in runs]
    commits = {
        f"{str(git.get('commit'))[:12]}{' with patch ' + git['patch'] if git.get('patch') else ''}" for git in code
    }
    lines = dict.fromkeys(_without_epoch(provenance(r.results)) for r in runs)
    said = [f"{setting.name}: {' / '.join(lines)}"]
    if len(commits) > 1:
        said.append(f"{setting.name}: runs of {len(commits)} versions of the code ({', '.join(sorted(commits))})")
    return said


def _without_epoch(text: str) -> str:
    text = re.sub(r", test (fold )?\S+(?= ·)", "", text)
    return re.sub(r" \((epoch \d+|\d+ epochs? on all [^)]*)\)", "", text)


def _collect_dataset(
    found: Collected,
    dataset: str,
    names: Sequence[str],
    settings: Mapping[str, Setting],
    whole: Mapping[str, Sequence[int]],
    read: Mapping[str, Mapping[tuple[int, str], Mapping[str, Sequence[Part]]]],
    config: Any,  # noqa: ANN401
    search: bool,
) -> None:
    folds = list(dict.fromkeys(fold for name in names for fold in settings[name].folds))
    found.folds[dataset] = folds
    tasks = dict.fromkeys(task for name in names for parts in read[name].values() for task in parts)
    pools: dict[tuple[str, int, str], list[Pool]] = {}
    groups: dict[tuple[str, int, str], np.ndarray] = {}
    for task in tasks:
        rows: dict[str, tuple[dict[int, dict[str, float]], dict[int, dict[str, float]]]] = {}
        higher: dict[str, bool] = {}
        notes: dict[str, list[str]] = {}
        for name in names:
            own, seeds = settings[name].folds, list(whole[name])
            lacking = [(seed, fold) for seed in seeds for fold in own if not read[name][seed, fold].get(task)]
            if lacking:
                where = ", ".join(f"test part {fold} of seed {seed}" for seed, fold in lacking[:3])
                more = f" and {len(lacking) - 3} more" if len(lacking) > 3 else ""
                found.notes.append(f"{name}: left out of {task}: no labels of it in {where}{more}")
                continue
            scores: dict[tuple[int, str], dict[str, float]] = {}
            classes: dict[str, tuple[str, ...]] = {}
            for (seed, fold), parts in read[name].items():
                scores[seed, fold] = {}
                for part in parts[task]:
                    scores[seed, fold] |= part.scores
                    classes |= dict.fromkeys(part.metric.per_output, part.metric.outputs)
                    # Outputs first, in their order.
                    higher |= {key: part.metric.higher(key) for key in part.metric.names if key not in higher}
                found.scores += [
                    [dataset, name, seed, fold, task, key, value] for key, value in scores[seed, fold].items()
                ]
            means, pooled = {}, {}
            for seed in seeds:
                means[seed] = report.over_folds(scores, seed, own, classes)
                groups[name, seed, task] = _all_groups([read[name][seed, fold][task][0] for fold in own])
                pools[name, seed, task] = [
                    Pool([read[name][seed, fold][task][k] for fold in own], groups[name, seed, task])
                    for k in range(len(read[name][seed, own[0]][task]))
                ]
                once = torch.ones(1, len(groups[name, seed, task]), dtype=torch.float64)
                numbers = [pool(once) for pool in pools[name, seed, task]]
                pooled[seed] = {key: float(value[0]) for each in numbers for key, value in each.items()}
            shared = _overlap([read[name][seeds[0], fold][task][0] for fold in own])
            if shared:
                found.notes.append(
                    f"{name}: {shared} is in more than one test part, and counts once for each when pooled"
                )
            for note in report.gaps(scores, seeds, own, list(higher)):
                notes.setdefault(report.split_name(note.split(" ")[0])[0], []).append(f"{name}: {note}")
            rows[name] = (means, pooled)
        references = {name: _reference(settings[name]) for name in names}
        tables = report.score_tables(dataset, task, rows, higher, references, notes)
        found.tables += tables
        main = next((key for key in higher if key.endswith(f"/{report.MEAN}")), next(iter(higher), None))
        if main is not None:
            label = f"{dataset}: {task} {main}"
            found.cells[label] = {name: {s: v.get(main) for s, v in rows[name][0].items()} for name in rows}
        if search:
            continue
        if rows and config.baseline not in (None, "all", *rows):
            found.notes.append(f"{task}: baseline={config.baseline} has no row there, so nothing is compared")
        for first, second in _pairs(list(rows), config.baseline):
            found.comparisons += _compare(first, second, dataset, task, settings, whole, read, pools, groups, config)
    if search and len(names) > 1:
        found.notes.append(
            "trials of a search are not compared on the test part: it chose among them by their validation score"
        )


def _reference(setting: Setting) -> Mapping[str, Any] | None:
    return next((run.results.get("reference") for run in setting.runs.values()), None)


def _all_groups(parts: Sequence[Part]) -> np.ndarray:
    return np.unique(np.concatenate([part.groups for part in parts]))


def _overlap(parts: Sequence[Part]) -> str:
    names, counts = np.unique(np.concatenate([part.groups for part in parts]), return_counts=True)
    return str(names[counts > 1][0]) if (counts > 1).any() else ""


def _pairs(names: Sequence[str], baseline: str | None) -> list[tuple[str, str]]:
    if baseline == "all":
        return [(b, a) for i, a in enumerate(names) for b in names[i + 1 :]]
    chosen = next(iter(names), None) if baseline is None else baseline
    return [(name, chosen) for name in names if name != chosen and chosen is not None and chosen in names]


def _compare(
    first: str,
    second: str,
    dataset: str,
    task: str,
    settings: Mapping[str, Setting],
    whole: Mapping[str, Sequence[int]],
    read: Mapping[str, Mapping[tuple[int, str], Mapping[str, Sequence[Part]]]],
    pools: Mapping[tuple[str, int, str], Sequence[Pool]],
    groups: Mapping[tuple[str, int, str], np.ndarray],
    config: Any,  # noqa: ANN401
) -> list[report.Comparison]:
    """Return the differences of two settings in every number that both have."""
    seeds = [seed for seed in whole[first] if seed in whole[second]]
    folds = settings[first].folds
    directions = {
        key: pool.metric.higher(key)
        for pool in (pools[first, seeds[0], task] if seeds else ())
        for key in pool.metric.names
        if key not in pool.metric.counts
    }
    reason, number = "", 0
    if not seeds:
        reason = "no seed in common"
    elif set(folds) != set(settings[second].folds):
        reason = "other test parts"
    else:
        number = len(groups[first, seeds[0], task])
        same = all(
            read[first][seed, fold][task][0].rows == read[second][seed, fold][task][0].rows
            and read[first][seed, fold][task][0].rows == read[first][seeds[0], fold][task][0].rows
            for seed in seeds
            for fold in folds
        )
        reason = "" if same else "other test rows or labels"
    nan = float("nan")
    if reason:
        main = next(iter(directions), "all")
        return [report.Comparison(first, second, dataset, task, main, nan, nan, nan, len(seeds), number, True, reason)]

    def differences(drawn: Tensor) -> dict[str, Tensor]:
        sums: dict[str, Tensor] = {}
        for seed in seeds:
            a: dict[str, Tensor] = {}
            b: dict[str, Tensor] = {}
            for pool_a in pools[first, seed, task]:
                a |= pool_a(drawn)
            for pool_b in pools[second, seed, task]:
                b |= pool_b(drawn)
            for key in directions:
                if key in a and key in b:
                    sums[key] = sums.get(key, 0) + (a[key] - b[key]) / len(seeds)
        return sums

    point = {key: float(value[0]) for key, value in differences(torch.ones(1, number, dtype=torch.float64)).items()}
    resampled: dict[str, list[Tensor]] = {}
    if number >= FEWEST_GROUPS and config.resamples:
        for drawn in draws(number, int(config.resamples), 0):
            for key, value in differences(drawn).items():
                resampled.setdefault(key, []).append(value)
    ends = percentile_intervals({key: torch.cat(values) for key, values in resampled.items()}, float(config.level))
    why = f"only {number} groups" if number < FEWEST_GROUPS else "no resamples"
    found = []
    for key, value in point.items():
        low, high = ends.get(key) or (nan, nan)
        said = "" if ends.get(key) else why
        found.append(
            report.Comparison(
                first, second, dataset, task, key, value, low, high, len(seeds), number, directions[key], said
            )
        )
    return found


# -------------------------------------------------------------------------------------------------- writing


def _summaries(comparisons: Sequence[report.Comparison]) -> list[report.Comparison]:
    """Return the comparisons of numbers that stand for a task; those of single classes are in the CSV."""
    chosen = [c for c in comparisons if "/" not in c.name or c.name.endswith((f"/{report.MEAN}", "/micro"))]
    return chosen or list(comparisons)


def write(out: Path, found: Collected, config: Any, folder: Path) -> None:  # noqa: ANN401
    """Write the tables as Markdown, LaTeX and CSV, everything as JSON, and the figures."""
    digits, level = int(config.digits), float(config.level)
    command = f"affect collect sweep={configuration.quoted(str(folder)) if ' ' in str(folder) else folder}"
    tables = "\n".join(
        f"## {table.title}\n\n{report.markdown(table, found.folds[table.dataset], digits)}" for table in found.tables
    )
    compared = report.comparisons_markdown(_summaries(found.comparisons), level, digits)
    notes = [f"- {note}" for note in (*report.left_text(found.left), *found.notes)]
    text = f"# {folder.name}\n\n{tables}\n"
    text += f"## Comparisons\n\n{compared}\n" if compared else ""
    text += "## Notes\n\n" + "\n".join(notes) + f"\n\n    {command}\n"
    files = {
        "tables.md": text,
        "tables.tex": "\n".join(report.latex(t, found.folds[t.dataset], digits) for t in found.tables),
        "scores.csv": report.csv_text(["dataset", "setting", "seed", "fold", "task", "name", "value"], found.scores),
        "summary.csv": report.summary_csv(found.tables),
        "comparisons.csv": report.comparisons_csv(found.comparisons),
    }
    for name, content in files.items():
        with replacing(out / name) as part:
            part.write_text(content, encoding="utf-8")
    write_json(
        out / "collect.json",
        {
            "command": command,
            "tables": [
                {
                    **{key: getattr(t, key) for key in ("dataset", "task", "quantity", "higher_is_better")},
                    "columns": list(t.columns),
                    "rows": [
                        {"name": r.name, "seeds": r.seeds, "cells": {c: s._asdict() for c, s in r.cells.items()}}
                        for r in t.rows
                    ],
                    "notes": list(t.notes),
                }
                for t in found.tables
            ],
            "comparisons": [{**c._asdict(), "verdict": c.verdict} for c in found.comparisons],
            "left_out": [each._asdict() for each in found.left],
            "notes": found.notes,
            "environment": environment(),
        },
    )
    if config.figures:
        from affect.report.figures import save
        from affect.report.figures.collect import class_figure, difference_figure
        from affect.report.figures.experiments import experiment_figure

        if found.cells:
            for label, cells in found.cells.items():
                save(experiment_figure({label: cells}, "", level), out / "figures" / f"{_slug(label)}.png")
        for table in found.tables:
            if report.MEAN in table.columns:
                save(class_figure(table), out / "figures" / f"{_slug(table.title)}_classes.png")
        shown = [c for c in _summaries(found.comparisons) if np.isfinite(c.low)]
        if shown:
            save(difference_figure(shown, level), out / "figures" / "differences.png")


def _slug(text: str) -> str:
    return re.sub(r"[^\w.-]+", "_", text)


def show(console: Console, found: Collected, config: Any) -> None:  # noqa: ANN401
    """Print for each table what sums a setting up, then comparisons and notes."""
    from rich import box
    from rich.table import Table
    from rich.text import Text

    digits = int(config.digits)
    for table in found.tables:
        columns = [
            c for c in table.columns if c in (report.VALUE, report.MEAN, "micro", report.POOLED)
        ] or table.columns
        shown = Table(title=Text(table.title, style="bold"), title_justify="left", box=box.SIMPLE_HEAD, pad_edge=False)
        shown.add_column("setting", overflow="fold")
        for column in ("n", *columns):
            shown.add_column(column, justify="right", no_wrap=True)
        for row in table.rows:
            cells = [report.cell_text(row.cells.get(column), digits) for column in columns]
            shown.add_row(Text(row.name), "" if row.seeds is None else str(row.seeds), *cells)
        console.print(shown)
    for c in _summaries(found.comparisons):
        interval = f" [{c.low:+.{digits}f}, {c.high:+.{digits}f}]" if np.isfinite(c.low) else ""
        better = c.verdict if c.verdict not in (c.first, c.second) else f"{c.verdict} is better"
        value = f"{c.difference:+.{digits}f}" if np.isfinite(c.difference) else "–"
        line = f"{c.dataset} {c.task} {c.name}: {c.first} − {c.second} = {value}{interval}: {better}"
        console.print(line, highlight=False, markup=False)
    for note in (*report.left_text(found.left), *found.notes):
        console.print(f"note: {note}", highlight=False, markup=False)
