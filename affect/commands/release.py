# SPDX-License-Identifier: Apache-2.0
"""``affect release``: what of a run may be published, in a folder that needs nothing else.

A run's own folder ``release`` holds weights, config, outputs and metrics. Published, it also says what trained it
and how that was divided, so that ``affect evaluate`` finds its own test part again and stops on people, groups and
image files that it knows; they are hashed and no path of this machine is left in it.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from omegaconf import DictConfig, OmegaConf
from rich.console import Console

from affect import __version__
from affect.commands.run_folder import CONFIG, CONTENTS, RESULTS
from affect.commands.train import model_card, quiet
from affect.data.protocol import hashed_people
from affect.errors import CheckpointError, ConfigError
from affect.release import (
    FILES,
    Release,
    build_model,
    build_tasks,
    check_training,
    read_release,
    write_release,
)
from affect.report import read_json

PLACES = ("root", "table", "cache", "leave_out")
"""Keys of a dataset whose values say where something lies on this machine."""


def run(config: DictConfig) -> None:
    """Write the release of ``run`` to the folder ``out``.

    Raises:
        CheckpointError: If the run is not finished, or what was written cannot be read back.
        ConfigError: If ``out`` holds other files.
    """
    quiet()
    console = Console()
    folder, out = Path(config.run).expanduser(), Path(config.out).expanduser()
    trust = list(config.trust)
    require_free(out, bool(config.force))
    results = run_results(folder)
    own = read_release(folder, trust, "run")
    training = describe_training(folder, results)
    people = hashed_people(own.people)
    write_release(
        out,
        own.state,
        own.config,
        own.labels,
        own.preprocess,
        own.metrics,
        published_card(results, training, own, people),
        people,
        training,
    )
    written = read_release(out, trust, "out")
    build_model(written, build_tasks(written))
    size = sum((out / name).stat().st_size for name in FILES if (out / name).is_file())
    console.print(f"[bold]{out}[/bold]: {', '.join(name for name in FILES if (out / name).is_file())}", soft_wrap=True)
    console.print(f"{size / 1e6:.1f} MB; {trained_on(people)}; paths are left out")
    console.print(f"evaluate it: affect evaluate checkpoint={out}{_needs(training)}", soft_wrap=True, markup=False)


def trained_on(people: Mapping[str, Sequence[str]]) -> str:
    """Return how many people, groups and image files of its training a release knows again."""
    counts = ", ".join(f"{len(hashes)} of {space}" for space, hashes in people.items())
    if not counts:
        return "nothing tells whom it was trained on, so evaluation cannot stop on them"
    return f"knows its training again by hashes: {counts}"


def require_free(out: Path, force: bool) -> None:
    """Refuse a folder that holds anything but a release that is to be replaced.

    Raises:
        ConfigError: If there are other files, or a release and ``force`` is not set.
    """
    if out.is_file():
        raise ConfigError(f"out={out}: a file; name a folder")
    held = sorted(path.name for path in out.iterdir()) if out.is_dir() else []
    foreign = [name for name in held if name not in FILES]
    if foreign:
        raise ConfigError(f"out={out}: holds other files ({', '.join(foreign[:4])}); name another folder")
    if held and not force:
        raise ConfigError(f"out={out}: holds a release; force=true replaces it")


def run_results(folder: Path) -> dict[str, Any]:
    """Return the results of a finished run.

    Raises:
        CheckpointError: If there are none.
    """
    path = folder / RESULTS
    if not path.is_file():
        hint = " (the run is not finished)" if (folder / "last.ckpt").exists() else ""
        raise CheckpointError(f"run={folder}: no {RESULTS} in it{hint}; give the folder of a finished run")
    try:
        found = read_json(path)
    except ValueError as error:
        raise CheckpointError(f"{path}: damaged ({error})") from error
    if not isinstance(found, dict) or "selection" not in found:
        raise CheckpointError(f"{path}: no results of a training")
    return found


def describe_training(folder: Path, results: Mapping[str, Any]) -> dict[str, Any]:
    """Return what a published checkpoint says of its training: data, protocol, selection; without paths and people.

    Args:
        folder: The run.
        results: Its results.

    Raises:
        CheckpointError: If the run's config is missing or says what no release may.
    """
    path = folder / CONFIG
    loaded = OmegaConf.load(path) if path.is_file() else None
    if not isinstance(loaded, DictConfig) or "dataset" not in loaded or "protocol" not in loaded:
        raise CheckpointError(f"{path}: missing, or no config of a run")
    config = OmegaConf.to_container(loaded, resolve=True)
    assert isinstance(config, dict)
    data = results.get("data") or {}
    contents = read_json(folder / CONTENTS) if (folder / CONTENTS).is_file() else {}
    parts = data.get("parts") or {}
    described: dict[str, Any] = {
        "dataset": without_places(config["dataset"]),
        "protocol": without_places(config["protocol"]),
        "selection": str(config.get("selection") or "best_val"),
        "data": {"limit": (config.get("data") or {}).get("limit")},
        "selected": _plain(results["selection"]),
        "name": str(results.get("name", "")),
        "seed": results.get("seed"),
        "label_source": list(results.get("label_source") or ()),
        "parts": {name: {k: numbers.get(k) for k in ("rows", "groups")} for name, numbers in parts.items()},
        "tables": dict(contents.get("table") or {}),
        "version": __version__,
    }
    if config.get("prepare"):
        described["prepare"] = without_places(config["prepare"])
    check_training(described, list(config.get("trust") or ()), str(path))
    return described


def without_places(node: Any, key: str = "") -> Any:  # noqa: ANN401
    """Return a node of a config with null for every text that says where something lies on this machine."""
    if isinstance(node, Mapping):
        return {str(name): without_places(value, str(name)) for name, value in node.items()}
    if isinstance(node, list | tuple):
        return [without_places(value, key) for value in node]
    if isinstance(node, str) and (key in PLACES or "/" in node or "\\" in node or node.startswith("~")):
        return None
    return node


def _plain(node: Any) -> Any:  # noqa: ANN401
    """Return what selected the weights without what a run that chose epochs tells of its own place."""
    if isinstance(node, Mapping):
        return {str(key): _plain(value) for key, value in node.items() if not _is_place(value)}
    return [_plain(one) for one in node] if isinstance(node, list | tuple) else node


def _is_place(value: Any) -> bool:  # noqa: ANN401
    return isinstance(value, str) and (value.startswith(("/", "~")) or ".." in value)


def _needs(training: Mapping[str, Any]) -> str:
    """Return what a user has to add to evaluate on the release's own test part."""
    dataset = training["dataset"]
    if dataset.get("sources"):
        return " dataset=… (its sources' folders)"
    if "table" in dataset:
        return " dataset=table dataset.table=… (its table)"
    read = dataset.get("read")
    wanted = isinstance(read, dict) and "root" in read and dataset["name"] not in ("orl", "faces")
    return f" dataset={dataset['name']} dataset.root=…" if wanted else ""


def published_card(
    results: Mapping[str, Any], training: Mapping[str, Any], release: Release, people: Mapping[str, list[str]]
) -> str:
    """Return the model card: the run's own, what trained the checkpoint, what it decides at, and how it is used."""
    lines = ["", "## Training data", ""]
    names = [str(training["dataset"]["name"])]
    sources = training["dataset"].get("sources") or {}
    names = [str(node.get("name", key)) for key, node in sources.items()] or names
    lines.append(f"- datasets: {', '.join(names)}")
    for name, numbers in training["parts"].items():
        lines.append(f"- {name}: {numbers['rows']} rows, {numbers['groups']} groups")
    protocol = training["protocol"]
    lines.append(f"- protocol: {protocol.get('name') or 'default'}, test part {protocol.get('test')}")
    for space, hashes in people.items():
        lines.append(f"- trained or selected by {len(hashes)} of {space}; `people.json` holds their hashes")
    thresholds = (release.preprocess.get("thresholds") or {}).get("values") or {}
    if thresholds:
        rule = release.preprocess["thresholds"].get("rule")
        lines += ["", "## Thresholds", "", f"Rule: {rule}.", ""]
        for task, values in thresholds.items():
            lines.append(f"- `{task}`: " + ", ".join(f"{name} {float(value):.3g}" for name, value in values.items()))
    recipe = release.preprocess.get("recipe")
    how = "images that are crops already" if not recipe else f"`{recipe['kind']}` crops ({recipe.get('name', '')})"
    lines += [
        "",
        "## Use",
        "",
        f"Takes {release.preprocess['image_size']} px {release.preprocess.get('channel_order', 'RGB')} {how}.",
        "",
        "```",
        "affect evaluate checkpoint=<this folder> dataset=<a dataset>",
        "affect predict checkpoint=<this folder> input=<photographs>",
        "```",
        "",
        "The licence of the weights is that of their training data: those who publish them have to state it here.",
        "",
    ]
    return model_card(dict(results)) + "\n".join(lines)
