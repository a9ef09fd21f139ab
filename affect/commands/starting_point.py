# SPDX-License-Identifier: Apache-2.0
"""``init=<run | release>``: start from trained weights, head outputs matched by the name of their label.

Also which weights a run is made of at all, by the keys that name them: who trained those has a part in its leaks, and
their content in what the run is.
"""

from __future__ import annotations

import hashlib
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from omegaconf import DictConfig, OmegaConf
from rich.console import Console
from torch import nn

from affect.errors import CheckpointError
from affect.geometry import CropRecipe
from affect.models.base import AffectModule
from affect.models.thin.network import find_tensors
from affect.quantization import latent_state
from affect.release import LABELS, MODEL, Release, build_model, build_tasks, read_release

EARLIER = ("init", "model.exogenous.weights")
"""Keys that name a run, a release or a file of weights that faces have trained before."""


def earlier_weights(config: DictConfig) -> dict[str, Path]:
    """Return the run, release or file that each key of ``EARLIER`` names; keys without one are left out."""
    found = {key: OmegaConf.select(config, key) for key in EARLIER}
    return {key: Path(str(value)).expanduser() for key, value in found.items() if value}


def weights_file(key: str, given: Path, trust: Sequence[str] = ()) -> Path:
    """Return the file that holds the tensors of a run, of a release, or the file itself.

    Raises:
        CheckpointError: If there is none.
    """
    if key == "init":
        return read_release(given, list(trust), key).folder / MODEL
    return find_tensors(given, f"{key}={given}")


def people_before(config: DictConfig) -> dict[str, dict[str, list[str]]]:
    """Return by key of ``EARLIER`` who trained or selected the weights that it names, and what these started from.

    Of a file by itself nobody knows; of one in the folder of a run or a release they do.

    Raises:
        CheckpointError: If a run or release cannot be read.
    """
    trust, found = list(config.trust), {}
    for key, given in earlier_weights(config).items():
        folder = weights_file(key, given, trust).parent
        if any((place / LABELS).is_file() for place in (folder, folder / "release")):
            found[key] = read_release(folder, trust, key).people
    return found


def apply_starting_point(
    module: AffectModule, init: str, trust: list[str], console: Console, recipe: CropRecipe | None
) -> dict[str, Any]:
    """Load into ``module`` every tensor of a release that fits, and each head output whose label name matches.

    Args:
        module: The new model; changed in place.
        init: Folder of a run or of a release.
        trust: Packages whose classes the release may name.
        console: Where the summary is printed.
        recipe: How the new run crops faces; None for whole images.

    Returns:
        Origin, hash, what was taken, new and dropped, and what differs in preprocessing, for the results file.

    Raises:
        CheckpointError: If the release cannot be read, or nothing of its encoder fits.
    """
    release = read_release(Path(init).expanduser(), trust, "init")
    source = build_model(release, build_tasks(release))
    outputs = transfer_heads(source, release, module)
    tensors = transfer_tensors(source, module)
    encoders = [name for name, encoder in module.encoder_modules() if any(True for _ in encoder.parameters())]
    if encoders and not any(key.startswith(tuple(f"{name}." for name in encoders)) for key in tensors["taken"]):
        keys = encoder_keys(release)
        hint = f" ({keys})" if keys else ""
        raise CheckpointError(
            f"init={init}: no tensor of its encoder fits; give the encoder that it was trained with{hint}"
        )
    differing = preprocess_differences(release.preprocess, module, recipe)
    summary = {
        "origin": str(init),
        "sha256": hashlib.sha256((release.folder / MODEL).read_bytes()).hexdigest(),
        "tensors": {key: len(names) for key, names in tensors.items()},
        "outputs": outputs,
        "preprocess": differing,
    }
    console.print(f"init from {init}: " + ", ".join(f"{len(names)} tensors {key}" for key, names in tensors.items()))
    for task, found in outputs.items():
        console.print(f"  {task}: " + "; ".join(f"{key} {', '.join(names)}" for key, names in found.items() if names))
    for line in differing:
        console.print(f"  other preprocessing: {line}")
    return summary


def encoder_keys(release: Release) -> str:
    """Return the settings of the command line that choose the encoder of a release; empty without such a node."""
    node = release.config["model"].get("encoder")
    if not isinstance(node, dict):
        return ""
    given = {key: node[key] for key in ("name", "image_size", "output") if node.get(key) is not None}
    return " ".join(["encoder=timm", *(f"encoder.{key}={value}" for key, value in given.items())])


def preprocess_differences(preprocess: Mapping[str, Any], module: AffectModule, recipe: CropRecipe | None) -> list[str]:
    """Return a line for each thing in which a release and a new run prepare images differently.

    Args:
        preprocess: What the release says.
        module: The new model, whose first encoder names image size, mean and standard deviation.
        recipe: How the new run crops faces.
    """
    encoder = next((encoder for _, encoder in module.encoder_modules()), None)
    new = {key: getattr(encoder, key, None) for key in ("image_size", "mean", "std")}
    lines = [
        f"{key} {_shown(preprocess[key])}, here {_shown(value)}"
        for key, value in new.items()
        if preprocess.get(key) and value is not None and _shown(preprocess[key]) != _shown(value)
    ]
    before, after = preprocess.get("recipe") or {}, recipe.describe() if recipe is not None else {}
    if not before or not after:
        kinds = [str(node.get("kind", "whole images")) for node in (before, after)]
        return [*lines, f"recipe {kinds[0]}, here {kinds[1]}"] if bool(before) != bool(after) else lines
    keys = [key for key in sorted(before.keys() | after.keys()) if _shown(before.get(key)) != _shown(after.get(key))]
    return [*lines, *(f"recipe.{key} {_shown(before.get(key))}, here {_shown(after.get(key))}" for key in keys)]


def _shown(value: Any) -> str:  # noqa: ANN401
    if isinstance(value, list | tuple):
        return "[" + ", ".join(_shown(entry) for entry in value) + "]"
    return f"{value:.4g}" if isinstance(value, float) else str(value)


def _head_tensors(module: AffectModule) -> set[str]:
    heads = {id(layer) for layer in module.heads().values()}
    prefixes = [name for name, layer in module.named_modules() if id(layer) in heads]
    return {f"{prefix}.{kind}" for prefix in prefixes for kind in ("weight", "bias")}


def transfer_tensors(source: AffectModule, module: AffectModule) -> dict[str, list[str]]:
    """Copy tensors of equal name and shape, heads excepted; return the names taken, new and dropped."""
    # A quantized model starts another by its latent weights, under the names that they have in a float one.
    own, other = module.release_state(), latent_state(source.release_state())
    skip = _head_tensors(module) | _head_tensors(source)
    taken = [k for k, v in own.items() if k not in skip and k in other and other[k].shape == v.shape]
    module.load_state_dict({name: other[name] for name in taken}, strict=False)
    return {
        "taken": taken,
        "new": [name for name in own if name not in skip and name not in taken],
        "dropped": [name for name in other if name not in skip and name not in taken],
    }


def transfer_heads(source: AffectModule, release: Release, module: AffectModule) -> dict[str, dict[str, list[str]]]:
    """Copy the row of each head output whose label the release has in a task of the same kind; return names by task."""
    heads, origin = module.heads(), source.heads()
    report = {}
    for name, layer in heads.items():
        task = module.tasks[name]
        found: dict[str, tuple[nn.Linear, int]] = {}
        # The task of the same name comes first, then tasks of the same kind under other names.
        for other in sorted(origin, key=lambda other: other != name):
            if type(source.tasks[other]) is type(task) and origin[other].in_features == layer.in_features:
                for row, label in enumerate(release.labels[other]):
                    found.setdefault(label, (origin[other], row))
        with torch.no_grad():
            for row, label in enumerate(task.outputs):
                if label in found:
                    other_layer, other_row = found[label]
                    layer.weight[row] = other_layer.weight[other_row]
                    layer.bias[row] = other_layer.bias[other_row]
        offered = {label for other in origin for label in release.labels[other] if other == name}
        report[name] = {
            "taken": [label for label in task.outputs if label in found],
            "new": [label for label in task.outputs if label not in found],
            "dropped": sorted(offered - set(task.outputs)),
        }
    return report
