# SPDX-License-Identifier: Apache-2.0
"""The published checkpoint format: a folder that names its outputs, its preprocessing and its metrics.

===================  ==============================================================================
``model.safetensors``  weights that prediction needs
``config.yaml``        plain YAML: the nodes ``task`` and ``model``, with every name written out
``labels.json``        the name of each output, by task
``preprocess.json``    crop recipe, image size, channel order, mean and standard deviation
``metrics.json``       the metrics of the run that made it
``README.md``          model card
===================  ==============================================================================

A release from a stranger cannot run code or reach the network: its config is plain YAML, every ``_target_`` must name a
public class of this package or of a package that the user trusts by name, and weights come from safetensors only.
"""

from __future__ import annotations

import importlib
import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import yaml
from hydra.utils import instantiate
from safetensors import SafetensorError
from safetensors.torch import load_file
from torch import Tensor

from affect.errors import CheckpointError
from affect.files import replacing, save_tensors
from affect.models.base import AffectModule
from affect.tasks import Task

TRUSTED_ROOMS = ("affect.tasks", "affect.metrics", "affect.models", "affect.encoders")
REFUSED_KEYS = ("_args_", "_partial_", "_recursive_", "_convert_")
MODEL, CONFIG, LABELS, PREPROCESS = "model.safetensors", "config.yaml", "labels.json", "preprocess.json"
METRICS, CARD = "metrics.json", "README.md"


@dataclass(frozen=True)
class Release:
    """A release that was read and checked, not yet built.

    Attributes:
        folder: Where it was read.
        config: Plain nodes ``task`` and ``model``.
        labels: Output names by task.
        preprocess: Crop recipe, image size, channel order, mean, standard deviation.
        metrics: What the run measured.
        state: Weights.
    """

    folder: Path
    config: dict[str, Any]
    labels: dict[str, list[str]]
    preprocess: dict[str, Any]
    metrics: dict[str, Any]
    state: dict[str, Tensor]


def write_release(
    folder: Path,
    state: Mapping[str, Tensor],
    config: Mapping[str, Any],
    labels: Mapping[str, Sequence[str]],
    preprocess: Mapping[str, Any],
    metrics: Mapping[str, Any],
    card: str,
) -> None:
    """Write a release folder; each file atomically, the weights last, so that a partial folder is never read."""
    folder.mkdir(parents=True, exist_ok=True)
    plain = release_config(config)
    texts = {
        CONFIG: yaml.safe_dump(plain, sort_keys=False),
        LABELS: json.dumps({name: list(names) for name, names in labels.items()}, indent=1),
        PREPROCESS: json.dumps(dict(preprocess), indent=1),
        METRICS: json.dumps(dict(metrics), indent=1),
        CARD: card,
    }
    for name, text in texts.items():
        with replacing(folder / name) as part:
            part.write_text(text, encoding="utf-8")
    save_tensors(folder / MODEL, dict(state))


def release_config(config: Mapping[str, Any]) -> dict[str, Any]:
    """Return the nodes ``task`` and ``model`` of a resolved run config, without what only training needs."""
    tasks = {}
    for name, node in config["task"].items():
        tasks[name] = {k: v for k, v in node.items() if k not in ("loss", "target")}
    model = {k: v for k, v in config["model"].items() if k not in ("objectives", "weighting")}
    return {"task": tasks, "model": _without_weights(model)}


def _without_weights(node: Any) -> Any:  # noqa: ANN401
    """Return ``node`` with every ``pretrained`` and ``weights`` of an encoder switched off."""
    if isinstance(node, Mapping):
        encoder = str(node.get("_target_", "")).startswith("affect.encoders.")
        off = {"pretrained": False, "weights": None} if encoder else {}
        return {key: _without_weights(value) for key, value in node.items()} | {
            k: v for k, v in off.items() if k in node
        }
    if isinstance(node, list | tuple):
        return [_without_weights(value) for value in node]
    return node


def read_release(folder: Path, trust: Sequence[str] = ()) -> Release:
    """Return the release in ``folder``.

    Args:
        folder: A release folder, or the folder of a run, whose release lies in its sub-folder ``release``.
        trust: Packages whose classes the config may name besides this package's public ones.

    Raises:
        CheckpointError: If files are missing or damaged, or the config names what it may not.
    """
    folder = Path(folder)
    if (folder / "release" / MODEL).is_file():
        folder = folder / "release"
    if not folder.is_dir():
        raise CheckpointError(f"checkpoint={folder}: no such folder; give the folder of a run or of a release")
    for name in (MODEL, CONFIG, LABELS, PREPROCESS):
        if not (folder / name).is_file():
            hint = " (the run is not finished)" if (folder / "last.ckpt").exists() else ""
            raise CheckpointError(
                f"checkpoint={folder}: no {name} in it{hint}; give the folder of a run or of a release"
            )
    try:
        config = yaml.safe_load((folder / CONFIG).read_text(encoding="utf-8"))
        labels = json.loads((folder / LABELS).read_text(encoding="utf-8"))
        preprocess = json.loads((folder / PREPROCESS).read_text(encoding="utf-8"))
        metrics = json.loads((folder / METRICS).read_text(encoding="utf-8")) if (folder / METRICS).is_file() else {}
    except (yaml.YAMLError, json.JSONDecodeError, UnicodeDecodeError) as error:
        raise CheckpointError(f"checkpoint={folder}: {str(error).splitlines()[0]}") from error
    if not isinstance(config, dict) or set(config) != {"task", "model"}:
        raise CheckpointError(f"{folder / CONFIG}: must hold the nodes task and model and nothing else")
    named = isinstance(labels, dict) and isinstance(config["task"], dict) and set(labels) == set(config["task"])
    if not named or not all(isinstance(names, list) for names in labels.values()):
        raise CheckpointError(f"{folder / LABELS}: must give a list of output names for each task of {CONFIG}")
    check_config(config, trust, str(folder / CONFIG))
    try:
        state = load_file(folder / MODEL)
    except (SafetensorError, OSError, ValueError) as error:
        raise CheckpointError(f"{folder / MODEL}: damaged ({error})") from error
    for name, tensor in state.items():
        if tensor.is_floating_point() and not bool(tensor.isfinite().all()):
            raise CheckpointError(f"{folder / MODEL}: tensor {name} holds values that are not finite")
    return Release(folder, _without_weights(config), labels, preprocess, metrics, state)


def check_config(node: Any, trust: Sequence[str], where: str, path: str = "") -> None:  # noqa: ANN401
    """Refuse a config from a stranger that could run code or reach the network.

    Raises:
        CheckpointError: With the place of the first thing that is not allowed.
    """
    if isinstance(node, dict):
        for key, value in node.items():
            place = f"{path}.{key}" if path else str(key)
            if not isinstance(key, str) or key in REFUSED_KEYS:
                raise CheckpointError(f"{where}: key {place} is not allowed in a checkpoint's config")
            if key == "_target_":
                _check_target(value, trust, f"{where}: {place}")
            else:
                check_config(value, trust, where, place)
    elif isinstance(node, list):
        for index, value in enumerate(node):
            check_config(value, trust, where, f"{path}[{index}]")
    elif isinstance(node, str):
        if "${" in node:
            raise CheckpointError(f"{where}: {path}={node!r}: interpolation is not allowed in a checkpoint's config")
        if "://" in node or node.startswith(("/", "~", "hf-hub:", "local-dir:", "\\")) or ".." in node.split("/"):
            raise CheckpointError(f"{where}: {path}={node!r}: paths and addresses are not allowed there")
    elif not (node is None or isinstance(node, bool | int | float)):
        raise CheckpointError(f"{where}: {path} holds a {type(node).__name__}; only plain values are allowed")


def check_targets(node: Any, trust: Sequence[str], where: str, path: str = "") -> None:  # noqa: ANN401
    """Refuse a node of a stored config in which a ``_target_`` lies outside the packages in ``trust``.

    Raises:
        CheckpointError: With the place of the first one.
    """
    items = node.items() if isinstance(node, dict) else enumerate(node) if isinstance(node, list) else ()
    for key, value in items:
        place = f"{path}.{key}" if path else str(key)
        if key == "_target_":
            if not any(str(value).startswith(f"{package}.") for package in trust):
                package = str(value).split(".")[0]
                raise CheckpointError(
                    f"{where}: {place}={value}: not trusted; if you trust its code, trust=[{package}]"
                )
        else:
            check_targets(value, trust, where, place)


def _check_target(target: Any, trust: Sequence[str], place: str) -> None:  # noqa: ANN401
    if not isinstance(target, str) or "." not in target:
        raise CheckpointError(f"{place}={target!r} names no class")
    if any(target.startswith(f"{package}.") for package in trust):
        return
    module_name, _, attribute = target.rpartition(".")
    if module_name in TRUSTED_ROOMS or any(module_name.startswith(f"{room}.") for room in TRUSTED_ROOMS):
        try:
            public = getattr(importlib.import_module(module_name), "__all__", ())
        except ImportError:
            public = ()
        if attribute in public:
            return
    package = target.split(".")[0]
    hint = "" if package == "affect" else f"; if you trust its code, add trust=[{package}]"
    raise CheckpointError(f"{place}={target}: not on the list of classes that a checkpoint may name{hint}")


def build_tasks(release: Release) -> dict[str, Task]:
    """Return the tasks of a release and check that their outputs are those of ``labels.json``."""
    tasks = {}
    for name, node in release.config["task"].items():
        try:
            tasks[name] = instantiate(node, _convert_="object")
        except Exception as error:
            raise CheckpointError(f"{release.folder / CONFIG}: task {name}: {_inner(error)}") from error
        if list(tasks[name].outputs) != list(release.labels[name]):
            raise CheckpointError(
                f"{release.folder / LABELS}: outputs of {name} are not those of its config "
                f"({list(release.labels[name])[:4]}… against {list(tasks[name].outputs)[:4]}…)"
            )
    return tasks


def build_model(release: Release, tasks: Mapping[str, Task]) -> AffectModule:
    """Return the model of a release with its weights, in evaluation mode.

    Raises:
        CheckpointError: If the config does not build, or tensors are missing or have another shape.
    """
    try:
        module = instantiate(release.config["model"], _partial_=True, _convert_="object")(tasks=dict(tasks))
    except Exception as error:
        raise CheckpointError(f"{release.folder / CONFIG}: model: {_inner(error)}") from error
    try:
        module.load_release_state(release.state)
    except RuntimeError as error:
        raise CheckpointError(f"{release.folder / MODEL}: does not fit its config: {_first_line(error)}") from error
    return module.eval()


def _inner(error: BaseException) -> str:
    while error.__cause__ is not None:
        error = error.__cause__
    return _first_line(error)


def _first_line(error: BaseException) -> str:
    lines = [line.strip() for line in str(error).splitlines() if line.strip()]
    return " ".join(lines[:2])[:300] if lines else type(error).__name__
