# SPDX-License-Identifier: Apache-2.0
"""``affect rerun``: the run of a ``results.json`` again, in a new folder, and what differs from then.

The configuration is the stored one, so that configurations that changed since do not matter. What the code, packages,
machine and data were then stands in the results too, and is held against what they are now: before the run starts, and
its numbers afterwards.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from omegaconf import DictConfig, OmegaConf, open_dict
from rich.console import Console

from affect.callbacks import preemptible
from affect.commands import assembly, configuration, train
from affect.commands.distributed import join_tasks, processes_of_a_run
from affect.commands.run_folder import CODE, CONFIG, RESULTS, contents, is_first_process
from affect.errors import ConfigError, DataError, near
from affect.report import environment, read_json, write_json

RERUN = "rerun.json"

COMPLETED = ("data", "trainer", "protocol", "paths", "bootstrap")
"""Nodes of a stored configuration that get the keys which this version added, with their defaults."""


def run(config: DictConfig) -> float | None:
    """Start a run again and say what differs from then; its score is returned.

    Told to leave by a signal it does what ``affect train`` does.
    """
    join_tasks()
    with preemptible(), processes_of_a_run():
        return _run(config)


def _run(config: DictConfig) -> float | None:
    console = Console(quiet=not is_first_process())
    path = Path(config.results).expanduser()
    path = path / RESULTS if path.is_dir() else path
    before = read_json(path)
    missing = [key for key in ("config", "metrics", "environment") if not before.get(key)]
    if missing:
        raise ConfigError(f"{path}: no results of affect train (it has no {missing[0]})")
    out = new_folder(path.parent, config.out)
    again, notes = stored_config(in_order(before, path.parent), out, [str(change) for change in config.change])
    with open_dict(again):
        again.trust = list(dict.fromkeys([*again.get("trust", []), *config.trust]))
    now = environment()
    differences = [*notes, *environment_differences(before["environment"], now)]
    differences += patch_notes(path.parent, before["environment"], now)
    try:
        sources = assembly.build_sources(again, assembly.make(again.prepare, "prepare"))
    except (ConfigError, DataError) as error:
        places = ", ".join(
            f"{key}={value}"
            for key, value in configuration.leaves(OmegaConf.to_container(again.dataset), "dataset.")
            if isinstance(value, str) and configuration.is_path_key(key)
        )
        raise type(error)(
            f"{error}. The run's own paths: {places or 'none'}; change=[<key>=<path>] says where things lie now"
        ) from error
    made_of = contents(sources, again)
    differences += data_differences(before.get("made_of"), made_of)
    say(
        console,
        f"{path}: what differs from then",
        differences or ["nothing: code, packages, machine and data are the same"],
    )
    if config.check:
        return None
    score = train.train(again, out)
    if is_first_process():
        found = read_json(out / RESULTS)
        numbers, count = number_differences(before["metrics"], found["metrics"])
        stored = {"results": str(path.absolute()), "differences": differences, "numbers": numbers, "compared": count}
        write_json(out / RERUN, stored)
        heading = (
            f"{len(numbers)} of {count} numbers differ from then"
            if numbers
            else f"all {count} numbers are those of then"
        )
        say(console, heading, [number["text"] for number in numbers[:20]])
        if len(numbers) > 20:
            console.print(f"  … and {len(numbers) - 20} more")
        console.print(f"[bold]{out}[/bold]: {RESULTS}, {RERUN}")
    return score


def say(console: Console, heading: str, lines: Sequence[str]) -> None:
    """Print lines below a heading."""
    console.print(heading, highlight=False, markup=False, soft_wrap=True)
    for line in lines:
        console.print(f"  {line}", highlight=False, markup=False, soft_wrap=True)


def new_folder(beside: Path, given: str | None) -> Path:
    """Return the folder of the new run: the given one, or the first ``rerun<k>`` that holds no finished run.

    Raises:
        ConfigError: If the given folder is that of the run itself.
    """
    if given:
        folder = Path(given).expanduser().absolute()
        if folder == beside.absolute():
            raise ConfigError(f"out={given}: the run itself lies there; choose another folder")
        return folder
    number = 1
    while (beside / f"rerun{number}" / RESULTS).is_file():
        number += 1
    return (beside / f"rerun{number}").absolute()


def in_order(results: Mapping[str, Any], folder: Path) -> dict[str, Any]:
    """Return the configuration of results with its keys in the order that the run had, in which weights are drawn."""
    keys = results.get("config_keys")
    if keys is None and (folder / CONFIG).is_file():
        keys = [key for key, _ in configuration.leaves(OmegaConf.to_container(OmegaConf.load(folder / CONFIG)))]
    ordered: dict[str, Any] = {}
    places = {key: position for position, key in enumerate(keys or ())}
    found = list(configuration.leaves(results["config"]))
    for key, value in sorted(found, key=lambda leaf: places.get(leaf[0], len(places))):
        node = ordered
        *parents, last = key.split(".")
        for parent in parents:
            node = node.setdefault(parent, {})
        node[last] = value
    return ordered


def stored_config(stored: Mapping[str, Any], out: Path, changes: Sequence[str] = ()) -> tuple[DictConfig, list[str]]:
    """Return the configuration of a stored run for another folder, and notes on what is not as then.

    Every path below the run's old folder lies below the new one; keys that this version added get their defaults.

    Args:
        stored: ``config`` of the results.
        out: Folder of the new run.
        changes: ``key=value`` of keys that the run has.

    Raises:
        ConfigError: If a key of ``changes`` does not exist.
    """
    old = str(stored["paths"]["output"]).rstrip("/")

    def moved(node: Any) -> Any:  # noqa: ANN401
        if isinstance(node, Mapping):
            return {key: moved(value) for key, value in node.items()}
        if isinstance(node, list):
            return [moved(value) for value in node]
        if isinstance(node, str):
            for start in ("", "sqlite:///"):
                if node == start + old or node.startswith(f"{start}{old}/"):
                    return start + str(out) + node[len(start) + len(old) :]
        return node

    plain, notes = moved(stored), []
    plain |= {"force": False, "compare": {}}
    defaults = OmegaConf.to_container(configuration.compose("train"), resolve=False)
    assert isinstance(defaults, dict)
    for place, node, wanted in (("", plain, defaults), *((f"{k}.", plain.get(k), defaults.get(k)) for k in COMPLETED)):
        if not isinstance(node, dict) or not isinstance(wanted, dict):
            continue
        for key in [key for key in wanted if key not in node]:
            node[key] = wanted[key] if not isinstance(wanted[key], dict) or place else _without_links(wanted[key])
            notes.append(f"key {place}{key} is new since then: {_short(node[key])}")
    config = OmegaConf.create(plain)
    for override in configuration.parse_overrides(configuration.quote_paths(changes)):
        key, value = override.key_or_group, override.value()
        known = [name for name, _ in configuration.leaves(plain)]
        absent = object()
        before = OmegaConf.select(config, key, default=absent)
        if before is absent:
            raise ConfigError(f"change: the run has no key {key}; {near(key, known)}")
        OmegaConf.update(config, key, value, merge=False)
        notes.append(f"{key}: {_short(before)} then, {_short(value)} now (change)")
        for other in _same(plain, before, key):
            OmegaConf.update(config, other, value, merge=False)
    return config, notes


def _same(plain: Mapping[str, Any], value: Any, key: str) -> list[str]:  # noqa: ANN401
    """Return the keys below the same first node whose stored value is that of a changed path.

    Interpolations are stored as what they stand for: ``dataset.read.root`` is ``dataset.root``.
    """
    if not isinstance(value, str) or not configuration.is_path_key(key):
        return []
    first = key.split(".")[0]
    return [
        name
        for name, found in configuration.leaves(plain)
        if name.split(".")[0] == first and found == value and name != key
    ]


def _without_links(node: Any) -> Any:  # noqa: ANN401
    return {} if isinstance(node, dict) and any("${" in str(value) for value in node.values()) else node


def _short(value: Any) -> str:  # noqa: ANN401
    text = str(value)
    return text if len(text) <= 60 else f"{text[:57]}…"


def environment_differences(then: Mapping[str, Any], now: Mapping[str, Any]) -> list[str]:
    """Return what differs between two environments, as sentences: code first, then packages, then the machine.

    Example:
        >>> environment_differences({"python": "3.11.2", "packages": {"a": "1"}}, {"python": "3.12.0", "packages": {}})
        ['package a: 1 then, none now', 'python: 3.11.2 then, 3.12.0 now']
    """
    said = []
    a, b = then.get("git") or {}, now.get("git") or {}
    for key, name in (("commit", "commit"), ("patch", "code that was not committed (hash of the patch)")):
        if a.get(key) != b.get(key):
            said.append(f"{name}: {a.get(key) or 'none'} then, {b.get(key) or 'none'} now")
    packages, others = then.get("packages") or {}, now.get("packages") or {}
    said += [
        f"package {name}: {packages.get(name) or 'none'} then, {others.get(name) or 'none'} now"
        for name in sorted({*packages, *others})
        if packages.get(name) != others.get(name)
    ]
    machine = ("affect", "python", "platform", "machine", "host", "processor", "cpus", "accelerators")
    said += [
        f"{key}: {_listed(then[key])} then, {_listed(now.get(key))} now"
        for key in machine
        if key in then and then[key] != now.get(key)
    ]
    return said


def _listed(value: Any) -> str:  # noqa: ANN401
    return ", ".join(map(str, value)) or "none" if isinstance(value, list) else str(value)


def patch_notes(folder: Path, then: Mapping[str, Any], now: Mapping[str, Any]) -> list[str]:
    """Return how to get the code of then back, if it differs and its patch is stored."""
    a, b = then.get("git") or {}, now.get("git") or {}
    if not a or (a.get("commit"), a.get("patch")) == (b.get("commit"), b.get("patch")):
        return []
    patch = folder / CODE / f"{a.get('patch')}.patch"
    apply = f" && git apply {patch}" if a.get("patch") and patch.is_file() else ""
    lost = " (its patch is not beside the results)" if a.get("patch") and not apply else ""
    return [f"the code of then: git checkout {a.get('commit')}{apply}{lost}"]


def data_differences(then: Mapping[str, Any] | None, now: Mapping[str, Any]) -> list[str]:
    """Return which tables or initial weights are not those of then."""
    if then is None:
        return ["data: the results do not say what they were made of"]
    return [
        f"{kind} {name}: {then.get(kind, {}).get(name, 'none')} then, {now.get(kind, {}).get(name, 'none')} now"
        for kind in sorted({*then, *now})
        for name in sorted({*then.get(kind, {}), *now.get(kind, {})})
        if then.get(kind, {}).get(name) != now.get(kind, {}).get(name)
    ]


def number_differences(
    then: Mapping[str, Sequence[Mapping[str, Any]]], now: Mapping[str, Sequence[Mapping[str, Any]]]
) -> tuple[list[dict[str, Any]], int]:
    """Return the numbers that differ, largest difference first, and how many were compared."""

    def flat(metrics: Mapping[str, Sequence[Mapping[str, Any]]]) -> dict[str, float]:
        return {
            f"{part} {r['task']} {r['name']}{' ' + str(r['subgroup']) if r.get('subgroup') else ''}": math.nan
            if r["value"] is None
            else float(r["value"])
            for part, records in metrics.items()
            for r in records
        }

    a, b = flat(then), flat(now)
    found: list[dict[str, Any]] = []
    for name in dict.fromkeys([*a, *b]):
        old, new = a.get(name, math.nan), b.get(name, math.nan)
        if old != new and not (math.isnan(old) and math.isnan(new)):
            text = f"{name}: {old:.6g} then, {new:.6g} now"
            found.append({"name": name, "then": old, "now": new, "text": text})
    gaps = [abs(a.get(each["name"], math.nan) - b.get(each["name"], math.nan)) for each in found]
    order = sorted(range(len(found)), key=lambda k: -gaps[k] if math.isfinite(gaps[k]) else -math.inf)
    found = [found[k] for k in order]
    return found, len(dict.fromkeys([*a, *b]))
