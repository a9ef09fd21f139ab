# SPDX-License-Identifier: Apache-2.0
"""Which crops a training takes: stored ones, and where they are missing the command that makes them, or others.

A recipe with ``stored`` pixels trains from ``${paths.prepared}``; the delivered files need not be there any more. One
without crops while loading, for which the table needs points or boxes; and ``prepare=none`` takes images as they are,
which is for sets that are delivered as crops.
"""

from __future__ import annotations

import dataclasses
import shlex
from collections.abc import Sequence, Set
from pathlib import Path
from typing import Any

from hydra.utils import get_object
from omegaconf import DictConfig, ListConfig, OmegaConf

from affect import labels
from affect.commands.configuration import config_directory
from affect.data.dataset import alignment_scheme
from affect.data.prepare import find_prepared, what_changed
from affect.data.stored import source_code
from affect.data.table import FaceTable
from affect.errors import ConfigError, DataError
from affect.geometry import CropRecipe

DATASET_ROOT = "<folder as delivered>"


def stored_recipes() -> list[str]:
    """Return the names of the recipes of the configuration tree whose crops are stored."""
    return sorted(name for name, recipe in _recipes().items() if recipe.get("stored"))


def _recipes() -> dict[str, DictConfig | ListConfig]:
    return {path.stem: OmegaConf.load(path) for path in (config_directory() / "prepare").glob("*.yaml")}


def load_prepared(node: DictConfig, recipe: CropRecipe, prepared: Path | None) -> FaceTable:
    """Return the prepared table of a dataset's node.

    Args:
        node: A dataset with the nodes ``name`` and ``read``.
        recipe: Recipe with ``stored`` pixels.
        prepared: ``paths.prepared``.

    Raises:
        ConfigError: If it is not there, or was made from other labels or images than are in the dataset's root now,
            with the command that makes it.
    """
    name = str(node.get("name", "dataset"))
    if prepared is None:
        raise ConfigError("paths.prepared is empty: name the folder that affect prepare wrote to")
    arguments, command = read_arguments(node), prepare_command(node, recipe, prepared)
    try:
        table = find_prepared(prepared, name, recipe, arguments)
    except DataError as error:
        raise ConfigError(f"{error}; run: {command}") from error
    root = None if OmegaConf.is_missing(node, "root") else node.get("root")
    changed = what_changed(table, root, reader_code(node))
    if changed is not None:
        raise ConfigError(f"{name}: {changed}; run: {command} (crops of unchanged images are kept)")
    return table


def reader_code(node: DictConfig) -> str:
    """Return the code that a dataset is read with; empty if its reader cannot be found, which reading itself tells."""
    try:
        return source_code(get_object(str(node.read.get("_target_"))))
    except (ImportError, ValueError, AttributeError):
        return ""


def read_arguments(node: DictConfig) -> dict[str, Any]:
    """Return the resolved arguments of a dataset's reading."""
    arguments = OmegaConf.to_container(node.read, resolve=True)
    assert isinstance(arguments, dict)
    return {str(key): value for key, value in arguments.items()}


def require_croppable(node: DictConfig, table: FaceTable, recipe: CropRecipe | None) -> None:
    """Raise ``ConfigError`` if faces of a dataset cannot be cropped while loading as the recipe asks.

    Datasets that do not say whether they are delivered as crops are taken as the user's own, who knows.
    """
    if recipe is None or node.get("cropped") is None:
        return
    name, fitting = str(node.get("name", "dataset")), _fitting_recipes(bool(node.cropped), table)
    if recipe.kind == "none":
        if not node.cropped:
            raise ConfigError(f"prepare=none takes images as they are, and {name} is not delivered as crops: {fitting}")
        return
    if recipe.kind == "box" and "box" not in table.names:
        lacks = "boxes"
    elif recipe.kind == "similarity" and alignment_scheme(table.names) is None:
        lacks = "points"
    else:
        return
    raise ConfigError(f"prepare={recipe.name} crops while loading, and {name} has no {lacks} to crop by: {fitting}")


def _fitting_recipes(cropped: bool, table: FaceTable) -> str:
    """Return what to choose: recipes that a table can be prepared by, and those that it can be cropped by as it is."""
    scheme = alignment_scheme(table.names)
    own = [] if scheme is None else ["similarity5" if labels.SCHEMES[scheme].points == 5 else "similarity"]
    own += ["box"] if "box" in table.names else []
    # Whole images are kept only where they are crops.
    stored = [name for name in stored_recipes() if cropped or _recipes()[name].get("kind") != "none"]
    said = f"use one of {', '.join(stored)} with affect prepare"
    said += f", or crop while loading by what it has with prepare={' or '.join(own)}" if own else ""
    return said + (", or prepare=none" if cropped else "")


def prepare_command(node: DictConfig, recipe: CropRecipe, prepared: Path | None = None) -> str:
    """Return the command line that prepares a dataset for a training with these settings."""
    root = node.get("root") if not OmegaConf.is_missing(node, "root") else None
    chosen, *changed = dataset_words(node, FOR_TRAINING)
    words = ["affect", "prepare", chosen, f"dataset.root={root or DATASET_ROOT}", *changed]
    words += recipe_words(recipe, prepared)
    return " ".join(word if word.endswith(DATASET_ROOT) else shlex.quote(word) for word in words)


def recipe_words(recipe: CropRecipe, prepared: Path | None = None) -> list[str]:
    """Return the settings that choose a recipe of stored crops and the folder of prepared datasets."""
    words = [f"prepare={recipe.name}"]
    stated = OmegaConf.create({k: v for k, v in dataclasses.asdict(recipe).items() if k not in ("name", "size")})
    # The window is no matter of the stored crop.
    words += _changed(stated, "prepare", recipe.name, skipped={"window"})
    default = OmegaConf.load(config_directory() / "paths" / "default.yaml").prepared
    if prepared is not None and str(prepared) != str(Path(str(default)).expanduser()):
        words.append(f"paths.prepared={prepared}")
    return words


def dataset_words(node: DictConfig, without: Set[str] = frozenset()) -> list[str]:
    """Return the settings that choose a dataset and whatever of it was changed, but for its root and some keys."""
    option = _option(str(node.get("name", "dataset")), node)
    skipped = {"name", "root", "defaults", "protocol", "prepare", *without}
    # No dataset has this key of its own.
    listed = [f"dataset.leave_out={node.leave_out}"] if node.get("leave_out") and "leave_out" not in without else []
    return [f"dataset={option}", *_changed(node, "dataset", option, skipped), *listed]


def train_command(node: DictConfig, table: FaceTable, more: Sequence[str] = ()) -> str:
    """Return the command line that trains on a dataset all that its labels are for.

    Args:
        node: A dataset, with its root.
        table: Its labels.
        more: Further settings.
    """
    chosen, *changed = dataset_words(node)
    where = [f"dataset.root={node.root}"] if node.get("root") else []
    return shlex.join(["affect", "train", chosen, *where, *changed, *more, *fitting_tasks(table)])


def fitting_tasks(table: FaceTable) -> list[str]:
    """Return the settings that choose tasks which a table has labels for: behaviour, or else points, or attributes."""
    names = table.names

    def labelled(start: str, end: str = "") -> bool:
        return any(name.startswith(start) and name.endswith(end) for name in names)

    found = {
        "au": labelled("au", "_occurrence"),
        "au_intensity": labelled("au", "_intensity") and not labelled("au", "_occurrence"),
        "expression": "expression" in names or labelled("expression_"),
        "valence_arousal": {"valence", "arousal"} <= names,
    }
    tasks = [task for task, there in found.items() if there]
    scheme = next((name for name in ("68", "98") if labels.SCHEMES[name].column in names), None)
    if not tasks and scheme is not None:
        return ["task=[landmarks]", *([] if scheme == "68" else [f"task.landmarks.scheme={scheme}"])]
    if tasks or labelled("attribute_"):
        return [f"task=[{','.join(tasks or ['attributes'])}]"]
    return []


def _option(name: str, node: DictConfig) -> str:
    """Return the option of the group ``dataset`` that a node comes from: that of its name, or that of its reader."""
    folder = config_directory() / "dataset"
    if (folder / f"{name}.yaml").is_file() or _chosen() == name:
        return name
    target = node.read.get("_target_")
    same = [
        path.stem
        for path in sorted(folder.glob("*.yaml"))
        if (leaf := OmegaConf.load(path)).get("read") and leaf.read.get("_target_") == target
    ]
    return same[0] if same else name


def _chosen() -> str | None:
    """Return the option of the group ``dataset`` on the command line, which may be one of the user's own."""
    from hydra.core.hydra_config import HydraConfig

    return HydraConfig.get().runtime.choices.get("dataset") if HydraConfig.initialized() else None


def _changed(node: DictConfig, group: str, option: str, skipped: Set[str]) -> list[str]:
    """Return the overrides that make an option of a group what ``node`` is, as far as its plain keys go."""
    path = config_directory() / group / f"{option}.yaml"
    if not path.is_file():
        return []
    leaf, words = OmegaConf.load(path), []
    for key in leaf:
        # Interpolations follow the keys that they point to.
        if key in skipped or key not in node or (not OmegaConf.is_missing(leaf, key) and OmegaConf.is_dict(leaf[key])):
            continue
        if OmegaConf.is_interpolation(leaf, key):
            continue
        before = None if OmegaConf.is_missing(leaf, key) else leaf[key]
        if not OmegaConf.is_missing(node, key) and node[key] != before:
            words.append(f"{group}.{key}={_spelled(node[key])}")
    return words


def _spelled(value: object) -> str:
    """Return a setting's value as the command line takes it."""
    if value is None:
        return "null"
    return str(value).lower() if isinstance(value, bool) else str(value)


FOR_TRAINING = frozenset({"group", "stratify", "together", "cropped", "expressions"})
"""Keys of a dataset that decide nothing about crops or labels."""
