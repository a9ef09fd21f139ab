# SPDX-License-Identifier: Apache-2.0
"""``affect reproduce``: a controlled experiment, every arm with every seed through ``affect train``, and one table.

An experiment is a configuration of ``affect train`` with a node ``controlled``: the claim and its source, arms as lists
of overrides, what is measured, and how large it is on which scale. There is no training here. Where the arms do
something else to a model that was trained before them, ``controlled.cell`` names the function that does it.
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

from affect.callbacks import preemptible
from affect.commands import assembly
from affect.commands.run_folder import RESULTS, is_first_process
from affect.errors import ConfigError, near
from affect.files import replacing
from affect.report import environment, read_json, write_json
from affect.report.experiments import (
    Cells,
    baseline_of,
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
    *("selection_note", "tune", "cell", "tradeoff"),
)

BEFORE = "before"
"""Folder of the runs that arms build on."""

TUNE = "tune"
"""Folder of the runs that choose a setting of each arm."""


@preemptible()
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
    tuned, own = run_tuning(plan, scale, given, arms, out, chosen, console)
    # Seed by seed, so that an experiment that is stopped early has whole seeds to compare.
    for seed in seeds:
        brought = run_before(plan, scale, given, seed, out, chosen, console)
        for arm in arms:
            folder = out / arm / f"seed{seed}"
            if plan.get("cell"):
                run_cell(plan, scale, arm, folder, [*brought, f"seed={seed}"], console)
                results[arm][seed] = read_json(folder / RESULTS) | {"folder": str(folder)}
                continue
            common = [*plan.get("common", []), *scale.get("overrides", []), *brought]
            overrides = [*common, *plan["arms"][arm], *own.get(arm, []), *given, f"seed={seed}"]
            cell = compose(config_name="train", overrides=[f"experiment={chosen}", *overrides])
            OmegaConf.set_struct(cell, False)
            cell.compare, cell.paths.output = {}, str(folder)
            if not (folder / RESULTS).is_file():
                console.rule(f"{arm}, seed {seed}")
            train.train(cell, folder)
            if is_first_process():
                results[arm][seed] = read_json(folder / RESULTS) | {"folder": str(folder)}
    if is_first_process():
        write_summary(out, config, plan, chosen, results, console, tuned)


def run_cell(
    plan: Mapping[str, Any], scale: Mapping[str, Any], arm: str, folder: Path, brought: Sequence[str], console: Console
) -> None:
    """Have ``controlled.cell`` do what an arm says, unless it has been done.

    Args:
        plan: Node ``controlled``; ``cell`` names a function of a folder and overrides, which writes ``results.json``.
        scale: Its scale: ``cells`` are overrides of every arm, ``cell`` other arguments of the function.
        arm: The arm.
        folder: Of the cell.
        brought: Overrides that name what was trained before, and the seed.
        console: Where it says what it does.
    """
    if (folder / RESULTS).is_file():
        return
    console.rule(f"{arm}, {folder.name}")
    overrides = [*plan.get("common", []), *scale.get("cells", []), *brought, *plan["arms"][arm]]
    node = OmegaConf.create({**plan["cell"], **(scale.get("cell") or {})})
    assembly.make(node, "controlled.cell", _partial_=True)(folder=folder, overrides=overrides)


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
    ``key`` in every arm. Of the command line it takes what is no setting of the arms' model or tasks, which arms that
    are no trainings do not have.
    """
    from affect.commands import train

    brought = []
    for name, step in (plan.get("before") or {}).items():
        folder = out / BEFORE / str(name) / f"seed{seed}"
        own = () if plan.get("cell") else ("model", "task")
        shared = [override for override in given if _key(override).split(".")[0] not in own]
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


def run_tuning(
    plan: Mapping[str, Any],
    scale: Mapping[str, Any],
    given: Sequence[str],
    arms: Sequence[str],
    out: Path,
    chosen: str,
    console: Console,
) -> tuple[dict[str, Any], dict[str, list[str]]]:
    """Choose a setting for arms (``controlled.tune``) by a number of the validation part.

    Each group is tuned on one arm, ``arm``, with every value and seed, and the best mean over seeds holds for it and
    for the arms ``also``. A scale may have other ``values`` and ``seeds`` in a node ``tune`` of its own.

    Args:
        plan: Node ``controlled``.
        scale: Its scale.
        given: Overrides of the command line.
        arms: Arms that are run; groups without one of them are left out.
        out: Folder of the experiment.
        chosen: Name of the experiment.
        console: Where it says what it does.

    Returns:
        Value and mean score of each value by the arm that was tuned on, and the overrides of each arm.
    """
    from affect.commands import train
    from affect.commands.distributed import wait_for_all

    node = {**(plan.get("tune") or {}), **(scale.get("tune") or {})}
    tuned: dict[str, Any] = {}
    own: dict[str, list[str]] = {}
    for group in node.get("groups", ()):
        on, together = str(group["arm"]), [str(group["arm"]), *map(str, group.get("also", ()))]
        if not set(together) & set(arms) or any(_key(override) == node["key"] for override in given):
            continue
        scores: dict[Any, float] = {}
        for value in node["values"]:
            cells = []
            for seed in range(1, 1 + int(node["seeds"])):
                folder = out / TUNE / on / str(value) / f"seed{seed}"
                common = [*plan.get("common", []), *scale.get("overrides", [])]
                overrides = [*common, *plan["arms"][on], *given, f"{node['key']}={value}", f"seed={seed}"]
                cell = compose(config_name="train", overrides=[f"experiment={chosen}", *overrides])
                OmegaConf.set_struct(cell, False)
                cell.compare, cell.paths.output = {}, str(folder)
                if not (folder / RESULTS).is_file():
                    console.rule(f"tuning {on}: {node['key']}={value}, seed {seed}")
                train.train(cell, folder)
                wait_for_all()
                found = measured(read_json(folder / RESULTS) | {"folder": str(folder)}, node["measure"], "tune")
                cells.append(float("nan") if found is None else found)
            scores[value] = float(np.nanmean(cells)) if np.isfinite(cells).any() else float("-inf")
        best = max(scores, key=lambda value: scores[value])  # of equal ones the first
        tuned[on] = {
            "key": node["key"],
            "chosen": best,
            "arms": [arm for arm in together if arm in arms],
            "scores": {str(value): score for value, score in scores.items()},
        }
        own |= {arm: [f"{node['key']}={best}"] for arm in together}
    return tuned, own


def tuning_notes(tuned: Mapping[str, Any]) -> list[str]:
    """Return a sentence for each value that was chosen, which says where a better one may lie beyond those tried."""
    notes = []
    for on, node in tuned.items():
        said = ", ".join(f"{value} ({score:.3f})" for value, score in node["scores"].items())
        end = None
        values = [number for number in map(_number, node["scores"]) if number is not None]
        if len(values) > 1 and len(values) == len(node["scores"]) and _number(str(node["chosen"])) is not None:
            end = {min(values): "smallest", max(values): "largest"}.get(float(node["chosen"]))
        beyond = f" It is the {end} that was tried: a better one may lie beyond." if end else ""
        chosen = f"{node['key']}={node['chosen']} for {', '.join(node['arms'])}"
        notes.append(f"{chosen}: best of {said} on the validation part of {on}.{beyond}")
    return notes


def _number(text: str) -> float | None:
    try:
        return float(text)
    except ValueError:
        return None


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
    for name in {BEFORE, TUNE} & set(plan["arms"]):
        raise ConfigError(f"controlled.arms: the name {name} is that of a folder; give the arm another one")
    if plan.get("cell") and (not plan.get("before") or plan.get("tune")):
        raise ConfigError(
            "controlled.cell: arms that are no trainings need a model that is trained before, and no tuning"
        )
    shown = plan.get("tradeoff") or {}
    for measure in [*([shown.get("against")] if shown else []), *shown.get("of", [])]:
        if measure not in plan["measures"]:
            known = near(str(measure), plan["measures"])
            raise ConfigError(f"controlled.tradeoff: no measure {measure!r}; {known}")
    for name, step in (plan.get("before") or {}).items():
        if not isinstance(step, Mapping) or not step.get("key"):
            raise ConfigError(f"controlled.before.{name}: needs key=<setting of the arms that gets its folder>")
    for oracle, other in (plan.get("headroom") or {}).items():
        for arm in [oracle] if isinstance(other, Mapping) else [oracle, other]:
            if arm not in plan["arms"]:
                raise ConfigError(f"controlled.headroom: no arm {arm!r}; {near(str(arm), plan['arms'])}")
        if isinstance(other, Mapping):
            if other.get("measure") not in plan["measures"]:
                known = near(str(other.get("measure")), plan["measures"])
                raise ConfigError(f"controlled.headroom.{oracle}: no measure {other.get('measure')!r}; {known}")
            if not isinstance(other.get("at_least"), int | float):
                raise ConfigError(f"controlled.headroom.{oracle}: needs at_least=<number>")
    check_tuning_plan(plan)
    named = plan.get("baseline") or []
    for arm in named.values() if isinstance(named, Mapping) else [named] if named else []:
        if arm not in plan["arms"]:
            raise ConfigError(f"controlled.baseline: no arm {arm!r}; {near(str(arm), plan['arms'])}")


def check_tuning_plan(plan: Mapping[str, Any]) -> None:
    """Refuse a tuning that lacks something, names arms that are not there, or would select on the test part."""
    node = plan.get("tune")
    if not node:
        return
    missing = [key for key in ("key", "values", "measure", "seeds", "groups") if not node.get(key)]
    if missing:
        raise ConfigError(f"controlled.tune.{missing[0]} is missing")
    if node["measure"].get("part") != "validation":
        raise ConfigError("controlled.tune.measure: the test part selects nothing; write part: validation")
    seen: set[str] = set()
    for group in node["groups"]:
        for arm in [group.get("arm"), *group.get("also", ())]:
            if arm not in plan["arms"]:
                raise ConfigError(f"controlled.tune.groups: no arm {arm!r}; {near(str(arm), plan['arms'])}")
            if arm in seen:
                raise ConfigError(f"controlled.tune.groups: arm {arm} is in two groups")
            seen.add(arm)


# ------------------------------------------------------------------------------------------------ measuring


def measured(results: Mapping[str, Any], measure: Any, label: str) -> float | None:  # noqa: ANN401
    """Return a number of a run.

    Args:
        results: Contents of its ``results.json``, and its ``folder`` for measures that read predictions.
        measure: ``{part, task, name}`` of a metric, ``{finding: a/b/c}`` of what a model tells of itself (of a list a
            place, ``-1`` for the last), or a node whose ``_target_`` is a function of the results.
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
            places = range(-len(node), len(node)) if isinstance(node, list) else node
            options = {str(option): option for option in places} if isinstance(node, list | Mapping) else {}
            if key not in options:
                raise ConfigError(f"controlled.measures.{label}: no finding {key!r}; {near(key, options)}")
            node = node[options[key]]
        return None if node is None else float(node)
    part, task, name = str(measure.get("part", "test")), measure.get("task"), measure.get("name")
    records = [r for r in results["metrics"].get(part, []) if not r.get("subgroup")]
    for record in records:
        if record["name"] == name and record["task"] == task:
            return None if record["value"] is None else float(record["value"])
    known = {f"{record['task']} {record['name']}" for record in records}
    raise ConfigError(f"controlled.measures.{label}: no metric {task} {name}; {near(f'{task} {name}', known)}")


def headroom_notes(plan: Mapping[str, Any], measures: Mapping[str, Cells]) -> list[str]:
    """Return for each entry of ``controlled.headroom`` whether there is something that a method could gain.

    A pair of arms has headroom where the oracle beats its baseline in the first measure: where it does not (the
    interval of the difference reaches 0), even perfect conditioning gains nothing. An arm with ``measure`` and
    ``at_least`` has headroom where the interval of that measure lies above: a net that memorises nothing wrong cannot
    be kept from it. Without headroom the arms of that setting say nothing about a method.
    """
    notes = []
    label, cells = next(iter(measures.items()))
    for oracle, baseline in (plan.get("headroom") or {}).items():
        if isinstance(baseline, Mapping):
            notes += _level_notes(str(oracle), baseline, measures)
            continue
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


def _level_notes(arm: str, asked: Mapping[str, Any], measures: Mapping[str, Cells]) -> list[str]:
    label, level = str(asked["measure"]), float(asked["at_least"])
    values = [value for value in measures[label].get(arm, {}).values() if value is not None]
    if not values:
        return []
    found = estimate(values)
    verdict = "headroom"
    if not np.isfinite(found.low):
        verdict = "too few seeds to tell whether there is headroom"
    elif found.low < level:
        verdict = "no headroom, and nothing is concluded from this setting"
    return [f"{label}: {arm} = {estimate_text(found)}, asked for at least {level:g}: {verdict}."]


def _difference(cells: Cells, arm: str, baseline: str | None) -> dict[str, Any] | None:
    return None if baseline is None else difference(cells, arm, baseline)._asdict()


def write_summary(
    out: Path,
    config: DictConfig,
    plan: Mapping[str, Any],
    chosen: str,
    results: Mapping[str, Mapping[int, Mapping[str, Any]]],
    console: Console,
    tuned: Mapping[str, Any] | None = None,
) -> None:
    """Write ``table.md``, ``reproduce.json`` and the figure of an experiment, and print the table."""
    from affect.report.figures import save
    from affect.report.figures.experiments import experiment_figure, tradeoff_figure

    name = chosen.removeprefix("controlled/")
    measures: dict[str, Cells] = {
        str(label): {arm: {s: measured(r, measure, label) for s, r in runs.items()} for arm, runs in results.items()}
        for label, measure in plan["measures"].items()
    }
    baseline = plan.get("baseline")
    if isinstance(baseline, Mapping):
        baseline = {pattern: arm for pattern, arm in baseline.items() if arm in results}
    elif baseline not in results:
        baseline = None
    table = experiment_markdown(measures, baseline)
    command = " ".join(["affect reproduce", f"experiment={chosen}", f"scale={config.scale}", *_further(config)])
    notes = [*headroom_notes(plan, measures), *tuning_notes(tuned or {})]
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
        "headroom": headroom_notes(plan, measures),
        "tuned": dict(tuned or {}),
        "arms": {arm: list(plan["arms"][arm]) for arm in results},
        "measures": {
            label: {
                arm: {
                    "values": {str(seed): value for seed, value in cells[arm].items()},
                    "estimate": estimate(list(cells[arm].values()))._asdict(),
                    "difference": _difference(cells, arm, baseline_of(arm, baseline)),
                }
                for arm in cells
            }
            for label, cells in measures.items()
        },
        "environment": environment(),
    }
    write_json(out / STORED, stored)
    shown = plan.get("tradeoff")
    save(
        tradeoff_figure(measures, shown["against"], shown["of"], f"{name} ({config.scale})")
        if shown
        else experiment_figure(measures, f"{name} ({config.scale})"),
        out / "figure.png",
    )
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
