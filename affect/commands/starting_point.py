# SPDX-License-Identifier: Apache-2.0
"""``init=<run | release>``: start from trained weights, head outputs matched by the name of their label."""

from __future__ import annotations

import hashlib
from pathlib import Path
from typing import Any

import torch
from rich.console import Console
from torch import nn

from affect.errors import CheckpointError
from affect.models.base import AffectModule
from affect.release import MODEL, Release, build_model, build_tasks, read_release


def apply_starting_point(module: AffectModule, init: str, trust: list[str], console: Console) -> dict[str, Any]:
    """Load into ``module`` every tensor of a release that fits, and each head output whose label name matches.

    Args:
        module: The new model; changed in place.
        init: Folder of a run or of a release.
        trust: Packages whose classes the release may name.
        console: Where the summary is printed.

    Returns:
        Origin, hash, and what was taken, new and dropped, for the results file.

    Raises:
        CheckpointError: If the release cannot be read, or nothing of its encoder fits.
    """
    release = read_release(Path(init), trust)
    source = build_model(release, build_tasks(release))
    outputs = transfer_heads(source, release, module)
    tensors = transfer_tensors(source, module)
    encoders = [name for name, _ in module.encoder_modules()]
    if encoders and not any(key.startswith(tuple(f"{name}." for name in encoders)) for key in tensors["taken"]):
        raise CheckpointError(
            f"init={init}: no tensor of its encoder fits; give the encoder that it was trained with "
            f"(encoder.name={release.config['model'].get('encoder', {}).get('name')})"
        )
    summary = {
        "origin": str(init),
        "sha256": hashlib.sha256((release.folder / MODEL).read_bytes()).hexdigest(),
        "tensors": {key: len(names) for key, names in tensors.items()},
        "outputs": outputs,
    }
    console.print(f"init from {init}: " + ", ".join(f"{len(names)} tensors {key}" for key, names in tensors.items()))
    for task, found in outputs.items():
        console.print(f"  {task}: " + "; ".join(f"{key} {', '.join(names)}" for key, names in found.items() if names))
    return summary


def _head_tensors(module: AffectModule) -> set[str]:
    heads = {id(layer) for layer in module.heads().values()}
    prefixes = [name for name, layer in module.named_modules() if id(layer) in heads]
    return {f"{prefix}.{kind}" for prefix in prefixes for kind in ("weight", "bias")}


def transfer_tensors(source: AffectModule, module: AffectModule) -> dict[str, list[str]]:
    """Copy tensors of equal name and shape, heads excepted; return the names taken, new and dropped."""
    own, other = module.release_state(), source.release_state()
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
