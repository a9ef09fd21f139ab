# SPDX-License-Identifier: Apache-2.0
"""How a compressed network differs from the one that its configuration builds, as plain data.

A release stores this node beside the configuration; ``apply_structure`` repeats it on a freshly built network, after
which the stored tensors fit. Only the layers of ``affect.compression.layers`` can be named, no code and no files.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor, nn

from affect.compression.layers import LAYERS, CompressedConv2d, CompressedLinear, Replacing
from affect.errors import CheckpointError

__all__ = ["apply_structure", "replace_layer", "structure"]

_SIZES = {
    nn.Conv1d: ("out_channels", "in_channels"),
    nn.Conv2d: ("out_channels", "in_channels"),
    nn.Linear: ("out_features", "in_features"),
}
ATTRIBUTES = ("num_heads", "head_dim", "attn_dim")
"""Whole numbers of a layer without tensors of its own that follow from the sizes of its parts (attention)."""

LARGEST = 2**31
"""Elements that a tensor of a compressed release may have."""


def replace_layer(network: nn.Module, name: str, layer: nn.Module) -> None:
    """Put ``layer`` in the place of the sub-module ``name``."""
    parent, _, last = name.rpartition(".")
    setattr(network.get_submodule(parent), last, layer)


def structure(original: nn.Module, compressed: nn.Module) -> dict[str, Any]:
    """Return what turns ``original`` into an empty network of ``compressed``'s shape.

    Args:
        original: The network as its configuration builds it.
        compressed: The same after any transforms; layers may be replaced by those of ``LAYERS`` or resized.

    Returns:
        ``replaced``: layer kinds and settings by name; ``resized``: groups by name; ``attributes``: numbers by name.

    Raises:
        ValueError: If it differs in another way.
    """
    before, after = dict(original.named_modules()), dict(compressed.named_modules())
    names = {kind: name for name, kind in LAYERS.items()}
    replaced: dict[str, Any] = {}
    resized: dict[str, Any] = {}
    attributes: dict[str, Any] = {}
    for name, layer in after.items():
        if any(name.startswith(f"{done}.") for done in replaced):
            continue
        if type(layer) in names:
            assert isinstance(layer, Replacing)
            replaced[name] = {"layer": names[type(layer)], **layer.settings()}
            if name in before and isinstance(layer, CompressedConv2d | CompressedLinear):
                old, shape = before[name], list(layer.current_weight().shape)
                own = old.current_weight() if isinstance(old, CompressedConv2d | CompressedLinear) else old.weight
                if shape != list(own.shape):  # type: ignore[union-attr, arg-type]
                    groups = int(getattr(layer, "groups", 1))
                    resized[name] = {"groups": groups, "bias": layer.bias is not None, "shape": shape}
            continue
        if name not in before or type(before[name]) is not type(layer):
            raise ValueError(f"{name}: a {type(layer).__name__} cannot be stored as a compressed layer")
        shapes = {k: tuple(v.shape) for k, v in _own(before[name]).items()}
        if shapes != {k: tuple(v.shape) for k, v in _own(layer).items()}:
            resized[name] = {
                "groups": int(getattr(layer, "groups", 1)),
                "bias": getattr(layer, "bias", None) is not None,
            }
        changed = {k: int(getattr(layer, k)) for k in ATTRIBUTES if isinstance(getattr(layer, k, None), int)}
        changed = {k: value for k, value in changed.items() if value != getattr(before[name], k)}
        if changed:
            attributes[name] = changed
    gone = [n for n in before if n not in after and not any(n.startswith(f"{done}.") for done in replaced)]
    if gone:
        raise ValueError(f"{gone[0]}: layers that are gone altogether cannot be stored")
    return {"replaced": replaced, "resized": resized, "attributes": attributes}


def apply_structure(network: nn.Module, node: Any, state: Mapping[str, Tensor], where: str) -> None:  # noqa: ANN401
    """Change a freshly built network so that ``state`` fits it.

    Args:
        network: The network as its configuration builds it; changed in place.
        node: What ``structure`` returned, read from a file.
        state: Its tensors by name; sizes of resized layers are those of their tensors.
        where: The file, for messages.

    Raises:
        CheckpointError: If the node does not describe a network that can be built.
    """
    if not isinstance(node, Mapping) or not set(node) <= {"replaced", "resized", "attributes", "methods"}:
        raise CheckpointError(f"{where}: compression must hold replaced, resized and attributes")
    for key in ("replaced", "resized", "attributes"):
        if not isinstance(node.get(key, {}), Mapping):
            raise CheckpointError(f"{where}: compression.{key} must give settings by the name of a layer")
    for name, numbers in node.get("resized", {}).items():
        _check_sizes(numbers, f"{where}: compression.resized.{name}")
        _resize(_layer(network, name, where), name, dict(numbers), state, where)
    for name, numbers in node.get("attributes", {}).items():
        layer = _layer(network, name, where)
        for key, value in dict(numbers).items():
            if key not in ATTRIBUTES or not isinstance(value, int) or not hasattr(layer, key):
                raise CheckpointError(f"{where}: compression.attributes.{name}.{key} is not allowed")
            setattr(layer, key, value)
            if key == "head_dim" and isinstance(getattr(layer, "scale", None), float):
                layer.scale = value**-0.5  # as fused attention has it, whatever the size was
    for name, settings in node.get("replaced", {}).items():
        plain = dict(settings)
        kind = LAYERS.get(plain.pop("layer", None))
        if kind is None:
            raise CheckpointError(f"{where}: compression.replaced.{name}: layer must be one of {', '.join(LAYERS)}")
        _check_sizes(plain, f"{where}: compression.replaced.{name}")
        try:
            replace_layer(network, name, kind.of(_layer(network, name, where), **plain))
        except (TypeError, ValueError, AttributeError, RuntimeError) as error:
            raise CheckpointError(f"{where}: compression.replaced.{name}: {error}") from error


def _layer(network: nn.Module, name: Any, where: str) -> nn.Module:  # noqa: ANN401
    try:
        return network.get_submodule(str(name))
    except AttributeError as error:
        raise CheckpointError(f"{where}: compression names the layer {name}, which the model has not") from error


def _own(layer: nn.Module) -> dict[str, Tensor]:
    found = [*layer.named_parameters(recurse=False), *layer.named_buffers(recurse=False)]
    return {name: tensor for name, tensor in found if tensor is not None}


def _check_sizes(node: Any, place: str) -> None:  # noqa: ANN401
    """Refuse shapes whose tensors would fill the memory before anything is compared."""
    if isinstance(node, Mapping):
        for key, value in node.items():
            numbers = value if isinstance(value, list | tuple) else [value]
            if key in ("shape", "channels", "kept", "groups", "kernels", "entries"):
                size = 1
                for number in numbers:
                    if isinstance(number, bool) or not isinstance(number, int) or number < 1:
                        raise CheckpointError(f"{place}: {key}={value!r} must be positive whole numbers")
                    size *= number
                if size > LARGEST:
                    raise CheckpointError(f"{place}: {key}={value!r} is too large")
            else:
                _check_sizes(value, place)
    elif isinstance(node, list | tuple):
        for value in node:
            _check_sizes(value, place)


def _resize(layer: nn.Module, name: str, numbers: dict[str, Any], state: Mapping[str, Tensor], where: str) -> None:
    """Give the tensors of a layer the shapes of the stored ones, and its attributes the numbers that follow."""
    groups = numbers.get("groups", 1)
    if isinstance(groups, bool) or not isinstance(groups, int) or groups < 1:
        raise CheckpointError(f"{where}: compression.resized.{name}.groups={groups!r} must be a positive whole number")
    if numbers.get("bias") and getattr(layer, "bias", True) is None:
        layer.bias = nn.Parameter(torch.zeros(1))
    stated = numbers.get("shape")
    for key, tensor in _own(layer).items():
        stored = state.get(f"{name}.{key}")
        if stated is not None:
            shape = torch.Size(stated if key == "weight" else stated[:1])
        elif stored is not None:
            shape = stored.shape
        if (stated is None and stored is None) or len(shape) != tensor.ndim:
            raise CheckpointError(f"{where}: the weights have no fitting tensor {name}.{key}")
        empty = torch.zeros(shape, dtype=tensor.dtype)
        if key in layer._parameters:
            layer._parameters[key] = nn.Parameter(empty, requires_grad=tensor.requires_grad)
        else:
            layer._buffers[key] = empty
    weight = getattr(layer, "weight", None)
    for kind, (out, into) in _SIZES.items():
        if isinstance(layer, kind) and isinstance(weight, Tensor):
            setattr(layer, out, int(weight.shape[0]))
            setattr(layer, into, int(weight.shape[1]) * (groups if out == "out_channels" else 1))
    if hasattr(layer, "groups"):
        layer.groups = groups
    if isinstance(weight, Tensor) and hasattr(layer, "num_features"):
        layer.num_features = int(weight.shape[0])
    if isinstance(weight, Tensor) and hasattr(layer, "normalized_shape"):
        layer.normalized_shape = tuple(weight.shape)
