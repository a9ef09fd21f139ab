# SPDX-License-Identifier: Apache-2.0
"""The published checkpoint format: a folder that names its outputs, its preprocessing and its metrics.

===================  ==============================================================================
``model.safetensors``  weights that prediction needs
``config.yaml``        plain YAML: the nodes ``task`` and ``model``, with every name written out; a compressed model
                       has a node ``compression`` too, a quantized one the node ``quantization``
``labels.json``        the name of each output, by task
``preprocess.json``    crop recipe, image size, channel order, mean and standard deviation
``metrics.json``       the metrics of the run that made it
``people.json``        who trained or selected it, by name space of identities; hashed in what ``affect release`` writes
``training.json``      dataset, protocol and rule of selection, where ``affect release`` wrote the folder
``README.md``          model card
===================  ==============================================================================

A release from a stranger cannot run code or reach the network: its config is plain YAML, every ``_target_`` must name a
public class of this package or of a package that the user trusts by name, and weights come from safetensors only. Nor
can it take the machine's memory by a few lines: texts are limited, and so are the tensors that a config asks for.
"""

from __future__ import annotations

import importlib
import inspect
import json
import math
import re
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
import yaml
from hydra.utils import instantiate
from safetensors import SafetensorError
from safetensors.torch import load_file
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode

from affect.compression.structure import apply_structure
from affect.errors import CheckpointError, ConfigError
from affect.files import replacing, save_tensors
from affect.geometry import CropRecipe
from affect.labels import SCHEMES
from affect.models.base import AffectModule
from affect.quantization import Quantization
from affect.tasks import Task

TRUSTED_ROOMS = ("affect.tasks", "affect.metrics", "affect.models", "affect.encoders", "affect.quantization")
"""Rooms whose public classes a release may name."""

DATASET_TARGETS = ("affect.data.faces.FaceDials", "affect.data.faces.FaceImages", "affect.geometry.CropRecipe")
DATASET_ROOM, DATASET_FUNCTIONS = "affect.data.layouts", ("read", "images", "expected")
CONTROLLED_ROOM = "affect.data.controlled"
"""What a stored dataset may name: these classes, these functions of a layout that lists them in ``__all__``, and what a
module of controlled data lists there."""

TRAINING_SHAPES: Mapping[str, type] = {"selection": str} | dict.fromkeys(
    ("data", "prepare", "selected", "tables"), dict
)
DATASET_SHAPES: Mapping[str, type] = dict.fromkeys(("root", "table", "group"), str) | dict.fromkeys(
    ("sources", "read", "images", "expected"), dict
)
"""What a stored training and its datasets hold where they hold anything."""
_SHAPES: Mapping[type, str] = {str: "text", dict: "mapping"}

REFUSED_KEYS = ("_args_", "_partial_", "_recursive_", "_convert_")
FILE_KEYS = ("checkpoint_path", "pretrained_cfg", "pretrained_cfg_overlay", "cache_dir")
"""Arguments of timm that read files or addresses; a release has no use for them."""

MODEL, CONFIG, LABELS, PREPROCESS = "model.safetensors", "config.yaml", "labels.json", "preprocess.json"
METRICS, CARD, PEOPLE, TRAINING = "metrics.json", "README.md", "people.json", "training.json"
FILES = (MODEL, CONFIG, LABELS, PREPROCESS, METRICS, CARD, PEOPLE, TRAINING)
"""Every file of a release."""

TEXT_BYTES, TEXT_NODES = 64 << 20, 5_000_000
"""Largest text of a release, and most values that it may stand for: YAML can name one node many times."""

SPARE_BYTES = 1 << 30
"""What a config may ask for in tensors beyond twice the bytes of the weights: buffers that are made, not stored."""

LARGEST_SIDE = 4096
"""Largest side of an input in pixels: every crop takes its square in memory."""

POINTS = "points"
"""Key of ``preprocess.json``: by landmark scheme the mean position of points in crops, as fractions."""

PLAIN_NAME = re.compile(r"[^\W_][\w .+-]{0,99}|_[\w .+-]{1,99}")
"""Names of tasks and datasets, which become columns and folders."""

_CONTROL = re.compile(r"[\x00-\x08\x0b\x0c\x0e-\x1f\x7f-\x9f]")
_NUMBER = r"(?:inf|\d+(?:\.\d+)?(?:e[+-]?\d+)?)"
_FORMULA = re.compile(rf"[=@]|[+-](?!{_NUMBER}(?: to [+-]?{_NUMBER})?$)")

COMPRESSION = "compression"
"""Node of a config that says how the layers of a compressed model differ from those that its node ``model`` builds."""

QUANTIZATION = "quantization"
"""Node of a config that says what of a model was quantized while it was trained."""

CONFIG_NODES = {"task", "model", COMPRESSION, QUANTIZATION}


@dataclass(frozen=True)
class Release:
    """A release that was read and checked, not yet built.

    Attributes:
        folder: Where it was read.
        config: Plain nodes ``task`` and ``model``, and ``compression`` for a compressed model.
        labels: Output names by task.
        preprocess: Crop recipe, image size, channel order, mean, standard deviation.
        metrics: What the run measured.
        state: Weights.
        people: Who trained or selected the model, by name space of identities; evaluation refuses to test on them.
        training: Nodes ``dataset``, ``protocol``, ``selection``, ``prepare`` and ``data`` of its run without paths, and
            what is to be known of the training; empty where it lies in its run.
    """

    folder: Path
    config: dict[str, Any]
    labels: dict[str, list[str]]
    preprocess: dict[str, Any]
    metrics: dict[str, Any]
    state: dict[str, Tensor]
    people: dict[str, list[str]] = field(default_factory=dict)
    training: dict[str, Any] = field(default_factory=dict)


def write_release(
    folder: Path,
    state: Mapping[str, Tensor],
    config: Mapping[str, Any],
    labels: Mapping[str, Sequence[str]],
    preprocess: Mapping[str, Any],
    metrics: Mapping[str, Any],
    card: str,
    people: Mapping[str, Sequence[str]] | None = None,
    training: Mapping[str, Any] | None = None,
) -> None:
    """Write a release folder; each file atomically, the weights last, so that a partial folder is never read."""
    folder.mkdir(parents=True, exist_ok=True)
    plain = release_config(config)
    texts = {
        CONFIG: yaml.safe_dump(plain, sort_keys=False),
        LABELS: json.dumps({name: list(names) for name, names in labels.items()}, indent=1),
        PREPROCESS: json.dumps(dict(preprocess), indent=1),
        METRICS: json.dumps(dict(metrics), indent=1),
        PEOPLE: json.dumps({space: list(names) for space, names in (people or {}).items()}, indent=1),
        CARD: card,
    }
    if training:
        texts[TRAINING] = json.dumps(dict(training), indent=1)
    for name, text in texts.items():
        with replacing(folder / name) as part:
            part.write_text(text, encoding="utf-8")
    save_tensors(folder / MODEL, dict(state))


def release_config(config: Mapping[str, Any]) -> dict[str, Any]:
    """Return the nodes ``task`` and ``model`` of a resolved run config, without what only training needs."""
    tasks = {}
    for name, node in config["task"].items():
        if node and "_target_" in node:  # else settings of a task that was not selected
            tasks[name] = {k: v for k, v in node.items() if k not in ("loss", "target")}
    model = {k: v for k, v in config["model"].items() if k not in ("objectives", "weighting")}
    plain = {"task": tasks, "model": _without_weights(model)}
    return plain | {key: config[key] for key in (COMPRESSION, QUANTIZATION) if config.get(key)}


def with_statistics(config: Mapping[str, Any], module: AffectModule) -> dict[str, Any]:
    """Return a run config that says what a trained model alone knows: the statistics of encoders, and quantization.

    A release is built without the weights that brought mean and standard deviation, so it has to hold them itself. An
    encoder's node is found by the encoder's name in the module.
    """
    model = config["model"]
    for name, encoder in module.encoder_modules():
        numbers = {key: [float(x) for x in getattr(encoder, key)] for key in ("mean", "std") if hasattr(encoder, key)}
        model = _with_numbers(model, name.split("."), numbers)
    quantized = {} if module.quantization is None else {QUANTIZATION: module.quantization.describe()}
    return {**config, "model": model, **quantized}


def _with_numbers(node: Any, path: list[str], numbers: Mapping[str, list[float]]) -> Any:  # noqa: ANN401
    if not isinstance(node, Mapping):
        return node
    if path:
        return {k: _with_numbers(v, path[1:], numbers) if k == path[0] else v for k, v in node.items()}
    ours = str(node.get("_target_", "")).startswith("affect.encoders.")
    return {**node, **{key: value for key, value in numbers.items() if ours or key in node}}


def _without_weights(node: Any) -> Any:  # noqa: ANN401
    """Return a model's ``node`` with every ``pretrained`` and ``weights`` off and without arguments that name files.

    Numbers under ``weights`` are no origin of weights and stay.
    """
    if isinstance(node, Mapping):
        kept = {key: _without_weights(value) for key, value in node.items() if key not in FILE_KEYS}
        if "pretrained" in kept:
            kept["pretrained"] = False
        if isinstance(kept.get("weights"), str):
            kept["weights"] = None
        return kept
    if isinstance(node, list | tuple):
        return [_without_weights(value) for value in node]
    return node


def read_release(folder: Path, trust: Sequence[str] = (), what: str = "checkpoint") -> Release:
    """Return the release in ``folder``.

    Args:
        folder: A release folder, or the folder of a run, whose release lies in its sub-folder ``release``.
        trust: Packages whose classes the config may name besides this package's public ones.
        what: Key of the command line that named the folder, for messages.

    Raises:
        CheckpointError: If files are missing or damaged, or the config names what it may not.
    """
    folder = Path(folder)
    if (folder / "release" / MODEL).is_file():
        folder = folder / "release"
    if folder.is_file():
        raise CheckpointError(f"{what}={folder}: a file; {_folder_of(folder, what)}")
    if not folder.is_dir():
        raise CheckpointError(f"{what}={folder}: no such folder; give the folder of a run or of a release")
    for name in (MODEL, CONFIG, LABELS, PREPROCESS):
        if not (folder / name).is_file():
            hint = " (the run is not finished)" if (folder / "last.ckpt").exists() else ""
            raise CheckpointError(f"{what}={folder}: no {name} in it{hint}; give the folder of a run or of a release")
    config, labels, preprocess = (read_plain(folder / name) for name in (CONFIG, LABELS, PREPROCESS))
    metrics, people, training = (
        read_plain(folder / name) if (folder / name).is_file() else {} for name in (METRICS, PEOPLE, TRAINING)
    )
    if not isinstance(config, dict) or not {"task", "model"} <= set(config) <= CONFIG_NODES:
        raise CheckpointError(f"{folder / CONFIG}: must hold the nodes task and model and nothing else")
    check_texts(config, labels, preprocess, people, training, trust, lambda name: str(folder / name))
    try:
        state = load_file(folder / MODEL)
    except (SafetensorError, OSError, ValueError) as error:
        raise CheckpointError(f"{folder / MODEL}: damaged ({error})") from error
    for name, tensor in state.items():
        if tensor.is_complex():
            raise CheckpointError(f"{folder / MODEL}: tensor {name} holds complex numbers, which no model has")
        # As a model holds them: a number of 64 bits may become infinite there.
        if tensor.is_floating_point() and not bool(tensor.float().isfinite().all()):
            raise CheckpointError(f"{folder / MODEL}: tensor {name} holds values that are not finite")
    config["model"] = _without_weights(config["model"])
    return Release(folder, config, labels, preprocess, metrics, state, people, training)


def _folder_of(file: Path, what: str) -> str:
    """Return what to give instead of a file, such as a run's ``last.ckpt``, which holds no selected weights."""
    parent = file.parent
    if any((folder / MODEL).is_file() for folder in (parent, parent / "release")):
        return f"give the folder, which knows the selected weights, their labels and their crop: {what}={parent}"
    if (parent / "last.ckpt").is_file():
        return f"give the folder of a finished run; {parent} is not finished: repeat the command that started it"
    return "give the folder of a run or of a release"


def read_plain(path: Path) -> Any:  # noqa: ANN401
    """Return the values of a YAML or JSON file of a stranger.

    Raises:
        CheckpointError: If it is no such file, larger than a release's texts are, or stands for itself.
    """
    if path.stat().st_size > TEXT_BYTES:
        raise CheckpointError(f"{path}: larger than {TEXT_BYTES >> 20} MB, which no text of a release is")
    try:
        return parse_plain(path.read_text(encoding="utf-8"), str(path), path.suffix in (".yaml", ".yml"))
    except UnicodeDecodeError as error:
        raise CheckpointError(f"{path}: no text ({error})") from error


def parse_plain(text: str, where: str, is_yaml: bool = False) -> Any:  # noqa: ANN401
    """Return the values of a text of a stranger, in JSON or YAML; arguments as ``read_plain`` makes them."""
    try:
        found = yaml.safe_load(text) if is_yaml else json.loads(text)
    except RecursionError as error:
        raise CheckpointError(f"{where}: nested too deep") from error
    except (yaml.YAMLError, ValueError, OverflowError) as error:  # among them impossible numbers and dates
        raise CheckpointError(f"{where}: {_first_line(error)}") from error
    require_finite_size(found, where)
    return found


def require_finite_size(node: Any, where: str) -> None:  # noqa: ANN401
    """Refuse nodes that contain themselves, are nested too deep, or are named so often that a walk takes for ever.

    Nor may a text hold control characters: what a terminal prints of it must not move its cursor or change its title.

    Raises:
        CheckpointError: If there are such nodes or texts.
    """
    if isinstance(node, str):
        _require_printable(node, where)
    sizes: dict[int, int] = {}
    stack: list[tuple[Any, int, bool]] = [(node, 0, False)]
    while stack:
        one, depth, done = stack.pop()
        if not isinstance(one, dict | list):
            continue
        children = list(one.values()) if isinstance(one, dict) else one
        if done:
            sizes[id(one)] = 1 + sum(sizes.get(id(child), 1) for child in children)
            if sizes[id(one)] > TEXT_NODES:
                raise CheckpointError(f"{where}: stands for more than {TEXT_NODES} values")
        elif depth > 100:
            raise CheckpointError(f"{where}: nested too deep")
        elif sizes.get(id(one)) == 0:
            raise CheckpointError(f"{where}: a node contains itself")
        elif id(one) not in sizes:
            sizes[id(one)] = 0  # open: whoever meets it before it is done lies inside it
            for text in (*children, *(one if isinstance(one, dict) else ())):
                if isinstance(text, str):
                    _require_printable(text, where)
            stack.append((one, depth, True))
            stack += [(child, depth + 1, False) for child in children]


def _require_printable(text: str, where: str) -> None:
    if _CONTROL.search(text):
        raise CheckpointError(f"{where}: {text[:80]!r} holds control characters")


def check_texts(
    config: Mapping[str, Any],
    labels: Any,  # noqa: ANN401
    preprocess: Any,  # noqa: ANN401
    people: Any,  # noqa: ANN401
    training: Any,  # noqa: ANN401
    trust: Sequence[str],
    where: Callable[[str], str],
) -> None:
    """Refuse what a release's texts may not say.

    Args:
        config: Nodes ``task`` and ``model``.
        labels: What ``labels.json`` holds.
        preprocess: What ``preprocess.json`` holds.
        people: What ``people.json`` holds.
        training: What ``training.json`` holds.
        trust: Packages whose classes the config may name.
        where: Says where the text of a file's name comes from.

    Raises:
        CheckpointError: With the first thing that is wrong.
    """
    tasks = config["task"]
    named = isinstance(labels, dict) and isinstance(tasks, dict) and set(labels) == set(tasks)
    if not named or not all(_are_texts(names) for names in labels.values()):
        raise CheckpointError(f"{where(LABELS)}: must give a list of output names for each task of {CONFIG}")
    for name in tasks:
        require_plain_name(name, "a task", where(CONFIG))
    for name in (name for names in labels.values() for name in names):
        if _FORMULA.match(name):  # it is written to tables, which people open in spreadsheets
            raise CheckpointError(f"{where(LABELS)}: an output cannot be named {name[:80]!r}, which is a formula")
    if not isinstance(people, dict) or not all(_are_texts(names) for names in people.values()):
        raise CheckpointError(f"{where(PEOPLE)}: must give a list of names for each name space of people")
    _check_preprocess(preprocess, where(PREPROCESS))
    check_config(config, trust, where(CONFIG))
    check_training(training, trust, where(TRAINING))


def check_training(training: Any, trust: Sequence[str], where: str) -> None:  # noqa: ANN401
    """Refuse a description of a training that could run code, or read or write files of its choice.

    Raises:
        CheckpointError: With the first thing that is wrong.
    """
    if not isinstance(training, dict) or (
        training and not all(isinstance(training.get(key), dict) for key in ("dataset", "protocol"))
    ):
        raise CheckpointError(f"{where}: must hold dataset and protocol")
    if not training:
        return
    check_config(training, trust, where, dataset=True)
    for place, text in _texts(training, ""):
        if _is_path(text):
            raise CheckpointError(f"{where}: {place}={text!r}: paths are not allowed there")
    _check_shapes(training, TRAINING_SHAPES, where, "")
    limit = (training.get("data") or {}).get("limit")
    if limit is not None and (not isinstance(limit, int) or isinstance(limit, bool) or limit < 1):
        raise CheckpointError(f"{where}: data.limit={str(limit)[:80]!r} must be a number of rows, or null")
    if training.get("prepare") and "_target_" not in training["prepare"]:
        raise CheckpointError(f"{where}: prepare names no recipe (_target_)")
    dataset = training["dataset"]
    _check_shapes(dataset, DATASET_SHAPES, where, "dataset.")
    sources = dataset.get("sources") or {}
    for place, node in (("dataset.", dataset), *((f"dataset.sources.{name}.", node) for name, node in sources.items())):
        if not isinstance(node, dict):
            raise CheckpointError(f"{where}: {place[:-1]} must be a mapping")
        _check_shapes(node, DATASET_SHAPES, where, place)
        if node is dataset or node.get("name") is not None:
            require_plain_name(node.get("name"), "a dataset", where)
        if not node.get("read") and not (node is dataset and sources):
            raise CheckpointError(f"{where}: {place}read must say how the dataset is read")


def _check_shapes(node: Mapping[str, Any], shapes: Mapping[str, type], where: str, place: str) -> None:
    """Refuse values of a mapping that are neither null nor of the kind that is read there."""
    for key, kind in shapes.items():
        if node.get(key) is not None and not isinstance(node[key], kind):
            raise CheckpointError(f"{where}: {place}{key}={str(node[key])[:80]!r} must be a {_SHAPES[kind]}")


def require_plain_name(name: Any, what: str, where: str) -> None:  # noqa: ANN401
    """Refuse a name from a stranger that would be more than the name of a column or of one folder.

    Raises:
        CheckpointError: If it has other signs than letters, digits, spaces, ``_``, ``.``, ``+`` and ``-``.
    """
    if not isinstance(name, str) or not PLAIN_NAME.fullmatch(name):
        raise CheckpointError(f"{where}: {what} cannot be named {name!r}")


def _texts(node: Any, path: str) -> Iterator[tuple[str, str]]:  # noqa: ANN401
    """Yield place and text of every text inside a node."""
    if isinstance(node, str):
        yield path, node
    elif isinstance(node, dict):
        for key, value in node.items():
            yield from _texts(value, f"{path}.{key}" if path else str(key))
    elif isinstance(node, list):
        for index, value in enumerate(node):
            yield from _texts(value, f"{path}[{index}]")


def _is_path(text: str) -> bool:
    """Return whether a text is a path out of the current folder."""
    return text.startswith(("/", "~", "\\")) or ".." in re.split(r"[/\\]", text)


def _are_texts(names: Any) -> bool:  # noqa: ANN401
    return isinstance(names, list) and all(isinstance(name, str) for name in names)


def _check_preprocess(preprocess: Any, where: str) -> None:  # noqa: ANN401
    if not isinstance(preprocess, dict):
        raise CheckpointError(f"{where}: must hold image_size and recipe")
    size, recipe = preprocess.get("image_size"), preprocess.get("recipe")
    if not isinstance(size, int) or isinstance(size, bool) or not 1 <= size <= LARGEST_SIDE:
        raise CheckpointError(
            f"{where}: image_size={size!r} must be the side of the input in pixels, at most {LARGEST_SIDE}"
        )
    if recipe is not None and not (isinstance(recipe, dict) and isinstance(recipe.get("kind"), str)):
        raise CheckpointError(f"{where}: recipe must be null or a crop recipe with its kind")
    if recipe is not None:
        try:
            made = CropRecipe.read(recipe)
        except ConfigError as error:
            raise CheckpointError(f"{where}: {_first_line(error)}") from error
        if max(made.size, made.stored, made.window) > LARGEST_SIDE:
            raise CheckpointError(f"{where}: recipe asks for crops of more than {LARGEST_SIDE} px")
    points = preprocess.get(POINTS)
    if points is not None and not (isinstance(points, dict) and all(map(_are_points, points, points.values()))):
        raise CheckpointError(f"{where}: {POINTS} must give two numbers for each point of a landmark scheme")


def _are_points(scheme: str, points: Any) -> bool:  # noqa: ANN401
    """Return whether the values of a stranger are the points of a landmark scheme, as fractions of a crop."""
    if not isinstance(points, list) or not points:
        return False
    if scheme in SCHEMES and len(points) != SCHEMES[scheme].points:
        return False
    return all(isinstance(point, list) and len(point) == 2 and all(map(_is_fraction, point)) for point in points)


def _is_fraction(value: Any) -> bool:  # noqa: ANN401
    """Return whether a value is a number near a crop: the mean of points may lie outside, but not far (NaN is not)."""
    return isinstance(value, int | float) and not isinstance(value, bool) and abs(value) < 100


def check_config(
    node: Any,  # noqa: ANN401
    trust: Sequence[str],
    where: str,
    path: str = "",
    dataset: bool = False,
) -> None:
    """Refuse a config from a stranger that could run code or reach the network.

    Args:
        node: Plain config, interpolations not resolved.
        trust: Packages whose own classes and functions it may name.
        where: Its file, for messages.
        path: Key of the node, for messages.
        dataset: Whether it describes a dataset: those name layouts, and where the user's files are.

    Raises:
        CheckpointError: With the place of the first thing that is not allowed.
    """
    if isinstance(node, dict):
        for key, value in node.items():
            place = f"{path}.{key}" if path else str(key)
            if not isinstance(key, str) or key in REFUSED_KEYS:
                raise CheckpointError(f"{where}: key {place} is not allowed in a checkpoint's config")
            if key in FILE_KEYS:
                raise CheckpointError(f"{where}: key {place}: paths and addresses are not allowed there")
            if key == "_target_":
                _check_target(value, trust, f"{where}: {place}", dataset)
            else:
                check_config(value, trust, where, place, dataset)
    elif isinstance(node, list):
        for index, value in enumerate(node):
            check_config(value, trust, where, f"{path}[{index}]", dataset)
    elif isinstance(node, str):
        if "${" in node:
            raise CheckpointError(f"{where}: {path}={node!r}: interpolation is not allowed in a checkpoint's config")
        if "://" in node or node.startswith(("hf-hub:", "local-dir:")) or (_is_path(node) and not dataset):
            raise CheckpointError(f"{where}: {path}={node!r}: paths and addresses are not allowed there")
    elif not (node is None or isinstance(node, bool | int | float)):
        raise CheckpointError(f"{where}: {path} holds a {type(node).__name__}; only plain values are allowed")


def _check_target(target: Any, trust: Sequence[str], place: str, dataset: bool) -> None:  # noqa: ANN401
    if isinstance(target, str) and "${" in target:
        raise CheckpointError(f"{place}={target!r}: interpolation is not allowed in a checkpoint's config")
    if not isinstance(target, str) or "." not in target:
        raise CheckpointError(f"{place}={target!r} names no class")
    module, _, name = target.rpartition(".")
    if (_may_be_in_dataset if dataset else _may_be_in_release)(module, name):
        return
    trusted = next((package for package in trust if target.startswith(f"{package}.")), None)
    if trusted is not None:
        _check_trusted(module, name, trusted, f"{place}={target}")
        return
    package = target.split(".")[0]
    hint = "" if package == "affect" else f"; if you trust its code, add trust=[{package}]"
    raise CheckpointError(f"{place}={target}: not on the list of classes that a checkpoint may name{hint}")


def _may_be_in_release(module: str, name: str) -> bool:
    if module not in TRUSTED_ROOMS and not module.startswith(tuple(f"{room}." for room in TRUSTED_ROOMS)):
        return False
    return inspect.isclass(_public(module, name))


def _may_be_in_dataset(module: str, name: str) -> bool:
    if f"{module}.{name}" in DATASET_TARGETS:
        return True
    layout = module.startswith(f"{DATASET_ROOM}.") and name in DATASET_FUNCTIONS
    if not layout and not module.startswith(f"{CONTROLLED_ROOM}."):
        return False
    return inspect.isfunction(_public(module, name))


def _public(module: str, name: str) -> Any:  # noqa: ANN401
    """Return what a module of ours lists in ``__all__`` under ``name``, or None."""
    try:
        found = importlib.import_module(module)
    except ImportError:
        return None
    return getattr(found, name, None) if name in getattr(found, "__all__", ()) else None


def _check_trusted(module: str, name: str, package: str, place: str) -> None:
    """Refuse what a trusted package only imported: trust is in its own classes and functions."""
    try:
        found = getattr(importlib.import_module(module), name, None)
    except Exception as error:
        raise CheckpointError(f"{place}: {_first_line(error)}{_import_hint(error)}") from error
    own = str(getattr(found, "__module__", "")).split(".")[0] == package.split(".")[0]
    if not own or not (inspect.isclass(found) or inspect.isfunction(found)):
        raise CheckpointError(f"{place}: no class or function of the package {package}")


def _import_hint(error: BaseException) -> str:
    if not isinstance(error, ModuleNotFoundError):
        return ""
    return "; install it, or for a package of yours add --config-dir <its conf folder>"


def build_tasks(release: Release) -> dict[str, Task]:
    """Return the tasks of a release and check that their outputs are those of ``labels.json``."""
    tasks = {}
    for name, node in release.config["task"].items():
        try:
            tasks[name] = instantiate(node, _convert_="object")
        except Exception as error:
            raise CheckpointError(f"{release.folder / CONFIG}: task {name}: {_inner(error)}") from error
        if not isinstance(tasks[name], Task):
            raise CheckpointError(f"{release.folder / CONFIG}: task {name} names no task (_target_)")
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
    module = build_float_model(release, tasks)
    if QUANTIZATION in release.config:
        _quantize(module, release)
    if COMPRESSION in release.config:
        apply_structure(module, release.config[COMPRESSION], release.state, str(release.folder / CONFIG))
    try:
        module.load_release_state(release.state)
    except RuntimeError as error:
        raise CheckpointError(f"{release.folder / MODEL}: does not fit its config: {_first_line(error)}") from error
    return module.eval()


def build_float_model(release: Release, tasks: Mapping[str, Task]) -> AffectModule:
    """Return the float model that a release was made from, with new weights.

    Raises:
        CheckpointError: If the config does not build.
    """
    stored = sum(tensor.numel() * tensor.element_size() for tensor in release.state.values())
    # A code of a bit or two stands for a float, and channels that are gone are built first.
    factor = 64 if COMPRESSION in release.config else 2
    try:
        with _Limited(factor * stored + SPARE_BYTES):
            built = instantiate(release.config["model"], _partial_=True, _convert_="object")(tasks=dict(tasks))
    except Exception as error:
        raise CheckpointError(f"{release.folder / CONFIG}: model: {_inner(error)}") from error
    if not isinstance(built, AffectModule):  # an encoder, a metric
        raise CheckpointError(f"{release.folder / CONFIG}: model: {type(built).__name__} is no model of ours")
    return built


def _quantize(module: AffectModule, release: Release) -> None:
    """Quantize a new model as the one was whose weights will be loaded."""
    where = f"{release.folder / CONFIG}: {QUANTIZATION}"
    for name, encoder in module.encoder_modules():
        size = getattr(encoder, "image_size", None)
        if isinstance(size, int) and size > LARGEST_SIDE:  # capturing runs it once on images of that size
            raise CheckpointError(f"{where}: {name} takes images of {size} px; at most {LARGEST_SIDE} are read")
    try:
        quantization = instantiate(release.config[QUANTIZATION], _convert_="object")
        if not isinstance(quantization, Quantization):
            raise CheckpointError(f"names a {type(quantization).__name__}")
        quantization.apply(module)
    except Exception as error:
        raise CheckpointError(f"{where}: {_inner(error)}") from error


class _Limited(TorchDispatchMode):
    """Refuses to make tensors that together are larger than a limit, before memory is asked for.

    Args:
        limit: Bytes.
    """

    def __init__(self, limit: int) -> None:
        super().__init__()
        self.limit, self.made = limit, 0

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:  # noqa: ANN401
        name = func.overloadpacket.__name__
        size: Any = ()
        if name in ("empty", "empty_strided", "zeros", "ones", "full", "rand", "randn", "expand_copy"):
            size = next((one for one in args if isinstance(one, list | tuple | torch.Size)), ())
        elif name in ("arange", "linspace", "logspace", "eye", "randperm"):  # the largest number bounds the length
            length = max((abs(int(one)) for one in args if isinstance(one, int | float)), default=0)
            size = [length, length] if name == "eye" else [length]
        self.made += torch.get_default_dtype().itemsize * math.prod(size) if size else 0
        if self.made > self.limit:
            raise CheckpointError(f"asks for tensors of more than {self.limit >> 20} MB, far more than its weights")
        return func(*args, **(kwargs or {}))


def _inner(error: BaseException) -> str:
    while error.__cause__ is not None:
        error = error.__cause__
    return _first_line(error) + _import_hint(error)


def _first_line(error: BaseException) -> str:
    lines = [line.strip() for line in str(error).splitlines() if line.strip()]
    return " ".join(lines[:2])[:300] if lines else type(error).__name__
