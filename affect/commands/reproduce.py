# SPDX-License-Identifier: Apache-2.0
"""``affect reproduce``: a controlled experiment, every arm with every seed through ``affect train``, and one table.

An experiment is a configuration of ``affect train`` with a node ``controlled``: the claim and its source, arms as lists
of overrides, what is measured, and how large it is on which scale. There is no training here.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
from hydra import compose
from hydra.core.hydra_config import HydraConfig
from omegaconf import DictConfig, OmegaConf
from rich.console import Console

from affect.commands import assembly
from affect.commands.run_folder import RESULTS, is_first_process
from affect.errors import ConfigError, near
from affect.files import replacing
from affect.report import environment, read_json, write_json
from affect.report.experiments import (
    Cells,
    difference,
    estimate,
    estimate_text,
    experiment_markdown,
    experiment_note,
    experiment_tables,
)

SCALES = ("quick", "paper", "full")
TABLE, STORED = "table.md", "reproduce.json"
_OWN = ("scale", "seeds", "arms", "out", "paths.output", "paths.runs")
"""Keys of this command that no run of the experiment has, or that it sets itself."""

_KEYS = (
    *("claim", "source", "expected", "before", "common", "arms", "measures", "baseline", "headroom", "scales"),
    "selection_note",
)

BEFORE = "before"
"""Folder of the runs that arms build on."""


def run(config: DictConfig) -> None:
    """Train what is missing of the experiment's cells and write its table, numbers and figure."""
    from affect.commands import train

    console = Console(quiet=not is_first_process())
    chosen = str(HydraConfig.get().runtime.choices.get("experiment"))
    plan = OmegaConf.to_container(config.controlled, resolve=True) if config.controlled else None
    check_plan(config, plan, chosen)
    assert isinstance(plan, dict)
    given = [o for o in HydraConfig.get().overrides.task if _key(o) not in (*_OWN, "experiment")]
    scale = plan["scales"][config.scale]
    seeds = range(1, 1 + int(config.seeds or scale["seeds"]))
    arms = [str(arm) for arm in config.arms or scale.get("arms") or plan["arms"]]
    name = chosen.removeprefix("controlled/")
    out = Path(config.out or Path(config.paths.runs) / "reproduce" / name / config.scale).expanduser()
    console.print(f"[bold]{name}[/bold]: {plan['claim']} ({plan['source']})\nexpected: {plan['expected']}")
    console.print(f"{len(arms)} arms × {len(seeds)} seeds, scale {config.scale}: {out}")
    results: dict[str, dict[int, dict[str, Any]]] = {arm: {} for arm in arms}
    # Seed by seed, so that an experiment that is stopped early has whole seeds to compare.
    for seed in seeds:
        brought = run_before(plan, scale, given, seed, out, chosen, console)
        for arm in arms:
            folder = out / arm / f"seed{seed}"
            common = [*plan.get("common", []), *scale.get("overrides", []), *brought]
            overrides = [*common, *plan["arms"][arm], *given, f"seed={seed}"]
            cell = compose(config_name="train", overrides=[f"experiment={chosen}", *overrides])
            OmegaConf.set_struct(cell, False)
            cell.compare, cell.paths.output = {}, str(folder)
            if not (folder / RESULTS).is_file():
                console.rule(f"{arm}, seed {seed}")
            train.train(cell, folder)
            if is_first_process():
                results[arm][seed] = read_json(folder / RESULTS) | {"folder": str(folder)}
    if is_first_process():
        write_summary(out, config, plan, chosen, results, console)


def run_before(
    plan: Mapping[str, Any],
    scale: Mapping[str, Any],
    given: Sequence[str],
    seed: int,
    out: Path,
    chosen: str,
    console: Console,
) -> list[str]:
    """Train what the arms of a seed build on (``controlled.before``) and return the overrides that name it.

    Each entry is a run of the experiment itself with ``overrides`` of its own, whose folder becomes the value of
    ``key`` in every arm. Of the command line it takes what is no setting of the arms' model or tasks.
    """
    from affect.commands import train

    brought = []
    for name, step in (plan.get("before") or {}).items():
        folder = out / BEFORE / str(name) / f"seed{seed}"
        shared = [override for override in given if _key(override).split(".")[0] not in ("model", "task")]
        overrides = [*step.get("overrides", []), *scale.get("overrides", []), *shared, f"seed={seed}"]
        cell = compose(config_name="train", overrides=[f"experiment={chosen}", *overrides])
        OmegaConf.set_struct(cell, False)
        cell.compare, cell.paths.output = {}, str(folder)
        if not (folder / RESULTS).is_file():
            console.rule(f"before the arms: {name}, seed {seed}")
        train.train(cell, folder)
        quoted = str(folder.absolute()).replace("'", "\\'")
        brought.append(f"{step['key']}='{quoted}'")
    return brought


def _key(override: str) -> str:
    return override.partition("=")[0].lstrip("+~")


def check_plan(config: DictConfig, plan: Any, chosen: str) -> None:  # noqa: ANN401
    """Refuse an experiment that is no controlled one, and names that it does not have."""
    if not isinstance(plan, dict) or not plan.get("arms"):
        raise ConfigError(f"experiment={chosen}: no controlled experiment (it has no node `controlled`)")
    missing = [key for key in ("claim", "source", "expected", "measures", "scales") if not plan.get(key)]
    if missing:
        raise ConfigError(f"experiment={chosen}: controlled.{missing[0]} is missing")
    unknown = [key for key in plan if key not in _KEYS]
    if unknown:
        raise ConfigError(f"experiment={chosen}: controlled.{unknown[0]}: {near(unknown[0], _KEYS)}")
    if config.scale not in plan["scales"]:
        raise ConfigError(f"scale={config.scale}: {near(str(config.scale), plan['scales'])}")
    for arm in config.arms or ():
        if arm not in plan["arms"]:
            raise ConfigError(f"arms: no arm {arm!r}; {near(str(arm), plan['arms'])}")
    if BEFORE in plan["arms"]:
        raise ConfigError(f"controlled.arms: the name {BEFORE} is that of a folder; give the arm another one")
    for name, step in (plan.get("before") or {}).items():
        if not isinstance(step, Mapping) or not step.get("key"):
            raise ConfigError(f"controlled.before.{name}: needs key=<setting of the arms that gets its folder>")
    for pair in (plan.get("headroom") or {}).items():
        for arm in pair:
            if arm not in plan["arms"]:
                raise ConfigError(f"controlled.headroom: no arm {arm!r}; {near(str(arm), plan['arms'])}")
    if plan.get("baseline") and plan["baseline"] not in plan["arms"]:
        raise ConfigError(f"controlled.baseline: no arm {plan['baseline']!r}; {near(plan['baseline'], plan['arms'])}")


# ------------------------------------------------------------------------------------------------ measuring


def measured(results: Mapping[str, Any], measure: Any, label: str) -> float | None:  # noqa: ANN401
    """Return a number of a run.

    Args:
        results: Contents of its ``results.json``, and its ``folder`` for measures that read predictions.
        measure: ``{part, task, name}`` of a metric, ``{finding: a/b/c}`` of what a model tells of itself, or a node
            whose ``_target_`` is a function of the results.
        label: Its name, for messages.

    Raises:
        ConfigError: If the run has no such number.
    """
    if "_target_" in measure:
        value = assembly.make(OmegaConf.create(measure), f"controlled.measures.{label}", _partial_=True)(dict(results))
        return None if value is None else float(value)
    if "finding" in measure:
        node: Any = results.get("findings", {})
        for key in str(measure["finding"]).split("/"):
            if not isinstance(node, Mapping) or key not in node:
                options = node if isinstance(node, Mapping) else ()
                raise ConfigError(f"controlled.measures.{label}: no finding {key!r}; {near(key, options)}")
            node = node[key]
        return float(node)
    part, task, name = str(measure.get("part", "test")), measure.get("task"), measure.get("name")
    records = [r for r in results["metrics"].get(part, []) if not r.get("subgroup")]
    for record in records:
        if record["name"] == name and record["task"] == task:
            return None if record["value"] is None else float(record["value"])
    known = {f"{record['task']} {record['name']}" for record in records}
    raise ConfigError(f"controlled.measures.{label}: no metric {task} {name}; {near(f'{task} {name}', known)}")


def headroom_notes(plan: Mapping[str, Any], measures: Mapping[str, Cells]) -> list[str]:
    """Return for each pair of ``controlled.headroom`` whether its oracle beats its baseline in the first measure.

    Where it does not (the interval of the difference reaches 0), even perfect conditioning gains nothing, and the arms
    of that setting say nothing about a method.
    """
    notes = []
    label, cells = next(iter(measures.items()))
    for oracle, baseline in (plan.get("headroom") or {}).items():
        if oracle not in cells or baseline not in cells:
            continue
        found = difference(cells, oracle, baseline)
        told = f"{label}: {oracle} − {baseline} = {estimate_text(found, signed=True)}"
        if not np.isfinite(found.low):
            verdict = "too few seeds to tell whether there is headroom"
        elif found.low > 0:
            verdict = "headroom"
        else:
            verdict = "no headroom, and nothing is concluded from this setting"
        notes.append(f"{told}: {verdict}.")
    return notes


def write_summary(
    out: Path,
    config: DictConfig,
    plan: Mapping[str, Any],
    chosen: str,
    results: Mapping[str, Mapping[int, Mapping[str, Any]]],
    console: Console,
) -> None:
    """Write ``table.md``, ``reproduce.json`` and the figure of an experiment, and print the table."""
    from affect.report.figures import save
    from affect.report.figures.experiments import experiment_figure

    name = chosen.removeprefix("controlled/")
    measures: dict[str, Cells] = {
        str(label): {arm: {s: measured(r, measure, label) for s, r in runs.items()} for arm, runs in results.items()}
        for label, measure in plan["measures"].items()
    }
    baseline = plan.get("baseline") if plan.get("baseline") in results else None
    table = experiment_markdown(measures, baseline)
    command = " ".join(["affect reproduce", f"experiment={chosen}", f"scale={config.scale}", *_further(config)])
    notes = headroom_notes(plan, measures)
    table = "\n".join([table, *(f"{note}\n" for note in notes)])
    text = (
        f"# {name}\n\nClaim: {plan['claim']} ({plan['source']})\n\nExpected: {plan['expected']}\n\n{table}\n"
        f"    {command}\n"
    )
    with replacing(out / TABLE) as part:
        part.write_text(text, encoding="utf-8")
    stored = {
        "experiment": chosen,
        "claim": plan["claim"],
        "source": plan["source"],
        "expected": plan["expected"],
        "scale": config.scale,
        "command": command,
        "baseline": baseline,
        "before": plan.get("before"),
        "common": plan.get("common"),
        "headroom": notes,
        "arms": {arm: list(plan["arms"][arm]) for arm in results},
        "measures": {
            label: {
                arm: {
                    "values": {str(seed): value for seed, value in cells[arm].items()},
                    "estimate": estimate(list(cells[arm].values()))._asdict(),
                    "difference": difference(cells, arm, baseline)._asdict() if baseline else None,
                }
                for arm in cells
            }
            for label, cells in measures.items()
        },
        "environment": environment(),
    }
    write_json(out / STORED, stored)
    save(experiment_figure(measures, f"{name} ({config.scale})"), out / "figure.png")
    for shown in experiment_tables(measures, baseline):
        console.print(shown)
    console.print(experiment_note(measures, baseline), highlight=False, markup=False)
    for note in notes:
        console.print(note, highlight=False, markup=False)
    console.print(f"[bold]{out}[/bold]: {TABLE}, {STORED}, figure.png, one run per arm and seed")


def _further(config: DictConfig) -> list[str]:
    """Return the overrides of this command line besides experiment and scale, without folders."""
    given = HydraConfig.get().overrides.task
    return [override for override in given if _key(override) not in ("experiment", "scale", *_OWN[3:])]
