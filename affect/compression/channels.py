# SPDX-License-Identifier: Apache-2.0
"""Which channels of a network are the same for every image, and which can be removed or reordered without a change.

Two channels are the same if they are computed in the same way from channels that are the same. So labels are handed on
from the images to the output: channels with one label are equal whatever is shown. Channels that are tied by sums,
products, concatenations and activations can only go or move together, and only where nothing but layers reads them;
everything that is not known to treat channels alone (softmax, layer norms, grouped convolutions) blocks.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from scipy.sparse import coo_matrix
from scipy.sparse.csgraph import connected_components
from torch import Tensor, nn

from affect.compression.folding import norm_affine
from affect.compression.graph import Step, record
from affect.compression.layers import CompressedConv2d, CompressedLinear

__all__ = ["Channels", "Duplicates", "Family"]

Array = NDArray[np.float64]
Numbers = NDArray[np.int64]

_HOMOGENEOUS = {"relu", "leaky_relu", "ReLU", "LeakyReLU", "Identity"}
"""Activations f with f(c x) = c f(x) for c > 0."""

_ACTIVATIONS = {
    "abs", "celu", "clamp", "clamp_max", "clamp_min", "elu", "exp", "gelu", "hardsigmoid", "hardswish", "hardtanh",
    "mish", "neg", "pow", "rsqrt", "selu", "sigmoid", "silu", "softplus", "sqrt", "tanh",
    "ELU", "GELU", "HardMish", "HardSigmoid", "HardSwish", "Hardsigmoid", "Hardswish", "Hardtanh", "Mish", "ReLU6",
    "SELU", "SiLU", "Sigmoid", "Softplus", "Swish", "Tanh",
}  # fmt: skip
"""Others that look at each value alone: operators, and classes that timm puts into batch norms."""

_COPIES = {"alias", "clone", "contiguous", "detach", "dropout", "lift_fresh", "native_dropout"}
_PAIRS = {"add", "div", "maximum", "minimum", "mul", "sub"}
_KINDS = (nn.Conv2d, nn.Linear, CompressedConv2d, CompressedLinear)


@dataclass(frozen=True)
class _Role:
    """How a step treats channels.

    Attributes:
        step: The step.
        kind: ``dense`` (a convolution of all channels, a linear layer), ``depthwise``, ``norm``, ``prelu`` (with a
            slope for each channel), ``one`` (each value alone, or within its channel), ``two`` (of two tensors),
            ``join``, ``repeat``, or ``stop``.
        homogeneous: Whether a factor in front may as well come after it.
        reads: Whether the channels of its input are those that its weight's columns stand for, and zeros pad them.
    """

    step: Step
    kind: str
    homogeneous: bool = False
    reads: bool = True


@dataclass(frozen=True)
class Family:
    """Channels that can be exchanged with one another: each is found in the same tensors.

    Attributes:
        nodes: Places of each, ``(M, P)``: column p is the same tensor for all.
        values: The tensor of each column ``(P,)``.
    """

    nodes: Numbers
    values: tuple[int, ...]


@dataclass(frozen=True)
class Duplicates:
    """Channels of a family that equal others, up to a factor.

    Attributes:
        family: The family.
        kept: Row of the channel that stays ``(N,)``.
        gone: Row of the channel that goes ``(N,)``.
        factor: What the one that goes is a multiple of the other by, ``(N, P)``.
    """

    family: Family
    kept: Numbers
    gone: Numbers
    factor: Array


class Channels:
    """Channels of a network in evaluation mode.

    Args:
        network: The network.
        example: Normalised images ``(B, 3, H, W)``.
        protect: Names of modules, or their beginnings, whose channels stay as they are.

    Attributes:
        families: Those that can be removed or moved, by their tensors.

    Raises:
        ConfigError: If what the network computes cannot be written down.
    """

    def __init__(self, network: nn.Module, example: Tensor, protect: Sequence[str] = ()) -> None:
        self.network, self.protect = network, tuple(protect)
        self.graph = record(network, example)
        self.modules = dict(network.named_modules())
        self.axes: dict[int, int | None] = {}
        self.roles = [self._role(step) for step in self.graph.steps]
        sizes = [self._size(value.index) for value in self.graph.values]
        self.starts = np.concatenate([[0], np.cumsum(sizes)]).astype(np.int64)
        self.families = self._families()

    # ------------------------------------------------------------------------------------------ what steps do

    def _size(self, value: int) -> int:
        axis = self.axes.get(value)
        return 0 if axis is None else self.graph.values[value].shape[axis]

    def _shape(self, value: int) -> tuple[int, ...]:
        return self.graph.values[value].shape

    def _role(self, step: Step) -> _Role:
        """Return how a step treats channels, and note which dimension of its output they are."""
        role = self._known(step) or _Role(step, "stop")
        for k, value in enumerate(step.outputs):
            dimensions = len(self._shape(value))
            axis: int | None = {2: 1, 3: 2, 4: 1}.get(dimensions)
            if k == 0 and step.operator.endswith("Linear"):
                axis = dimensions - 1
            elif k == 0 and role.kind in ("one", "two"):
                axis = self.axes[step.inputs[0]]
            self.axes[value] = axis
        return role

    def _known(self, step: Step) -> _Role | None:
        """Return the role of a step whose treatment of channels is known."""
        if any(step.name == p or step.name.startswith(f"{p}.") for p in self.protect) or not step.inputs:
            return None
        axes = [self.axes[value] for value in step.inputs]
        layer = self.modules.get(step.name)
        if isinstance(layer, _KINDS) and step.operator == type(layer).__name__:
            return self._layer(step, layer, axes[0])
        if step.kind == "norm":
            return _Role(step, "norm") if axes[0] == 1 else None
        if step.kind in ("same", "maximum", "join", "repeat"):
            kinds = {"join": "join", "repeat": "repeat"}
            return _Role(step, kinds.get(step.kind, "one"), True) if set(axes) == {1} else None
        if isinstance(layer, nn.PReLU) and step.operator == "_prelu_kernel":
            alone = layer.weight.numel() == 1
            fits = self._shape(step.inputs[0]) == self._shape(step.outputs[0]) and axes[0] == 1
            return _Role(step, "one" if alone else "prelu", True) if alone or fits else None
        if step.constants:
            return None
        if step.operator in _PAIRS and len(step.inputs) == 2:
            return self._pair(step, axes)
        shapes = {self._shape(value) for value in (*step.inputs, step.outputs[0])} if step.outputs else set()
        if len(step.inputs) != 1 or len(shapes) != 1 or axes[0] is None:
            return None
        known = step.operator in _HOMOGENEOUS | _ACTIVATIONS | _COPIES
        if known or (step.operator in _PAIRS and step.numbers):
            return _Role(step, "one", step.operator in _HOMOGENEOUS | _COPIES)
        return None

    def _layer(self, step: Step, layer: Any, axis: int | None) -> _Role | None:  # noqa: ANN401
        """Return the role of a layer that runs once."""
        if step.name in self.graph.refused or not isinstance(getattr(layer, "weight", None), Tensor):
            return None
        dimensions = len(self._shape(step.inputs[0]))
        if isinstance(layer, nn.Linear | CompressedLinear):
            return _Role(step, "dense", reads=axis == dimensions - 1)
        if step.kind != "layer" or axis != 1:
            return None
        if layer.groups == 1:
            return _Role(step, "dense", reads=not getattr(layer, "padded", False))
        alone = layer.weight.shape[1] == 1 and layer.groups == self._shape(step.inputs[0])[1]
        return _Role(step, "depthwise") if alone else None

    def _pair(self, step: Step, axes: list[int | None]) -> _Role | None:
        """Return the role of an operation on two tensors, of which one may have a single channel."""
        shapes = [self._shape(value) for value in step.inputs]
        if axes[0] is None or axes[0] != axes[1] or len(shapes[0]) != len(shapes[1]):
            return None
        counts = [shape[axes[0]] for shape in shapes]
        wide = counts[0] == self._shape(step.outputs[0])[axes[0]]
        return _Role(step, "two", True) if wide and (counts[1] in (counts[0], 1)) else None

    # ----------------------------------------------------------------------------------- what goes together

    def places(self, value: int) -> Numbers:
        """Return the places of a tensor's channels among all."""
        return np.arange(self.starts[value], self.starts[value + 1])

    def _families(self) -> list[Family]:
        """Return channels that nothing blocks, together with those that can take their place."""
        count = int(self.starts[-1])
        blocked = np.zeros(count, bool)
        first: list[Numbers] = []
        second: list[Numbers] = []
        for role in self.roles:
            step = role.step
            if role.kind == "stop":
                for value in (*step.inputs, *step.outputs):
                    blocked[self.places(value)] = True
                continue
            for value in step.outputs[1:]:
                blocked[self.places(value)] = True
            before, after = [self.places(value) for value in step.inputs], self.places(step.outputs[0])
            if role.kind == "dense":
                if not role.reads:
                    blocked[before[0]] = True
            elif role.kind == "join":
                first.append(np.concatenate(before))
                second.append(after)
            elif role.kind in ("repeat", "depthwise"):
                first.append(np.repeat(before[0], len(after) // len(before[0])))
                second.append(after)
            else:
                for one in before:
                    if len(one) == len(after):
                        first.append(one)
                        second.append(after)
                    else:
                        blocked[one] = True
        ends = (np.concatenate([np.zeros(0, np.int64), *side]) for side in (first, second))
        matrix = coo_matrix((np.ones(sum(map(len, first)), np.int8), tuple(ends)), shape=(count, count))
        labels = connected_components(matrix, directed=False)[1]
        free = np.ones(int(labels.max(initial=-1)) + 1, bool)
        free[labels[blocked]] = False
        of_value = np.repeat(np.arange(len(self.starts) - 1), np.diff(self.starts))
        order = np.argsort(labels, kind="stable")
        sets = np.split(order, np.cumsum(np.bincount(labels))[:-1]) if count else []
        found: dict[tuple[int, ...], list[Numbers]] = {}
        for places in sets:
            if free[labels[places[0]]]:
                found.setdefault(tuple(of_value[places].tolist()), []).append(places)
        stacked = [(key, np.stack(each)) for key, each in found.items()]
        return [Family(nodes[np.argsort(nodes[:, 0])], key) for key, nodes in stacked]

    # ------------------------------------------------------------------------------------- which are the same

    def labels(self, proportional: bool = False, tolerance: float = 1e-6) -> tuple[Numbers, Array]:
        """Return a label and a factor for each channel: those of one label are equal for all images but for factors.

        Args:
            proportional: Also find channels that are positive multiples of one another; otherwise factors are 1.
            tolerance: For these: largest distance of two normalised rows of weights.
        """
        count = int(self.starts[-1])
        labels, factors = np.arange(count, dtype=np.int64), np.ones(count)
        for role in self.roles:
            if role.kind == "stop" or not role.step.outputs:
                continue
            step = role.step
            after = self.places(step.outputs[0])
            own = [labels[self.places(value)] for value in step.inputs]
            scales = [factors[self.places(value)] for value in step.inputs]
            if role.kind == "join":
                # Labels stay those of the parts: the same channel may be joined twice.
                labels[after], factors[after] = np.concatenate(own), np.concatenate(scales)
                continue
            keys, rows, factor = self._described(role, own, scales, len(after))
            found, factor = _distinct(keys, rows, factor, proportional, tolerance)
            labels[after], factors[after] = after[found], factor
        return labels, factors

    def _described(
        self, role: _Role, own: list[Numbers], scales: list[Array], count: int
    ) -> tuple[Numbers, Array | None, Array]:
        """Return what a step's output channels are equal by.

        Returns:
            Whole numbers ``(C, n)`` that must be equal; weights ``(C, m)`` that may be multiples of one another where
            that is asked for, or None; and factors ``(C,)`` that stand in front.
        """
        step, layer = role.step, self.modules.get(role.step.name)
        if role.kind == "dense":
            weight, bias = _arrays(layer)
            flat = weight.reshape(len(weight), weight.shape[1], -1)
            if role.reads:
                flat = _summed(flat * scales[0][:, None], own[0])
            return np.zeros((count, 0), np.int64), np.column_stack([flat.reshape(count, -1), bias]), np.ones(count)
        times = count // len(own[0])
        label, scale = np.repeat(own[0], times), np.repeat(scales[0], times)
        if role.kind == "repeat":
            return np.column_stack([label, np.tile(np.arange(times), len(own[0]))]), None, scale
        if role.kind == "depthwise":
            weight, bias = _arrays(layer)
            member = np.tile(np.arange(times), len(own[0]))  # outputs of one channel change their order with it
            pads = _codes(np.repeat(_padding(layer, len(own[0])), times) / scale)
            rows = np.column_stack([weight.reshape(count, -1) * scale[:, None], bias])
            return np.column_stack([label, member, pads]), rows, np.ones(count)
        if role.kind == "norm":
            factor, shift = norm_affine(layer)  # type: ignore[arg-type]
            return label[:, None], np.column_stack([factor * scale, shift]), np.ones(count)
        if role.kind == "prelu":
            assert isinstance(layer, nn.PReLU)
            slopes = _codes(layer.weight.detach().cpu().double().numpy())
            return np.column_stack([label, slopes]), None, scale
        if role.kind == "two":
            other, factor = np.resize(own[1], count), np.resize(scales[1], count)
            if step.operator in ("mul", "div"):
                both = scale * factor if step.operator == "mul" else scale / factor
                return np.column_stack([label, other]), None, both
            return np.column_stack([label, other, _codes(factor / scale)]), None, scale
        if role.homogeneous:
            return label[:, None], None, scale
        return np.column_stack([label, _codes(scale)]), None, np.ones(count)

    def duplicates(self, proportional: bool = False) -> list[Duplicates]:
        """Return channels that can go because another one is the same, or a positive multiple of it."""
        labels, factors = self.labels(proportional)
        found = []
        for family in self.families:
            known: dict[bytes, int] = {}
            pairs = []
            for row, key in enumerate(labels[family.nodes]):
                first = known.setdefault(key.tobytes(), row)
                if first != row:
                    pairs.append((first, row))
            if pairs:
                kept, gone = np.array(pairs, np.int64).T
                factor = factors[family.nodes[gone]] / factors[family.nodes[kept]]
                found.append(Duplicates(family, kept, gone, factor))
        return found

    # --------------------------------------------------------------------------------------------- weights

    def described_by(self, family: Family) -> list[tuple[str, str, Numbers]]:
        """Return what makes the channels of a family: module, tensor of it, and its row for each channel ``(M,)``."""
        made: list[tuple[str, str, Numbers]] = []
        for role in self.roles:
            if role.kind not in ("dense", "depthwise", "norm", "prelu"):
                continue
            layer, value = self.modules[role.step.name], role.step.outputs[0]
            for column, other in enumerate(family.values):
                if other == value:
                    rows = family.nodes[:, column] - self.starts[value]
                    made += [(role.step.name, key, rows) for key in _TENSORS if _tensor(layer, key) is not None]
        return made

    def remove(self, duplicates: Sequence[Duplicates]) -> None:
        """Take channels out of the network; what reads them adds their weights to those of the ones that stay.

        The network changes in place, so this object cannot be used afterwards.
        """
        kept: dict[int, NDArray[np.bool_]] = {}
        moved: dict[int, list[tuple[Numbers, Numbers, Array]]] = {}
        for one in duplicates:
            for column, value in enumerate(one.family.values):
                start = self.starts[value]
                gone, taker = (one.family.nodes[rows, column] - start for rows in (one.gone, one.kept))
                kept.setdefault(value, np.ones(self._size(value), bool))[gone] = False
                moved.setdefault(value, []).append((gone, taker, one.factor[:, column]))
        joined = {
            v: (np.concatenate([m[0] for m in e]), np.concatenate([m[1] for m in e]), np.concatenate([m[2] for m in e]))
            for v, e in moved.items()
        }
        self._rearrange({value: np.flatnonzero(mask) for value, mask in kept.items()}, joined)

    def reorder(self, family: Family, order: Numbers) -> None:
        """Put the channels of a family in another order, in the layers that make and that read them.

        Args:
            family: The family.
            order: Rows of the family in their new order ``(M,)``.
        """
        index: dict[int, Numbers] = {}
        for column, value in enumerate(family.values):
            places = family.nodes[:, column] - self.starts[value]
            index.setdefault(value, np.arange(self._size(value)))[places] = places[order]
        self._rearrange(index, {})

    @torch.no_grad()
    def _rearrange(self, index: Mapping[int, Numbers], moved: Mapping[int, tuple[Numbers, Numbers, Array]]) -> None:
        """Give tensors other channels.

        Args:
            index: Old channels of each tensor in their new order.
            moved: Channels that go, those that take their place, and the factors between them.
        """
        for role in self.roles:
            if role.kind not in ("dense", "depthwise", "norm", "prelu"):
                continue
            layer: Any = self.modules[role.step.name]
            into, out = role.step.inputs[0], role.step.outputs[0]
            if role.kind == "dense":
                weight = layer.weight.detach().clone()
                if role.reads and into in moved:
                    gone, taker, factor = (torch.from_numpy(one).to(weight.device) for one in moved[into])
                    factor = factor.view(-1, *[1] * (weight.ndim - 2))
                    weight = weight.double().index_add(1, taker, weight[:, gone].double() * factor).to(weight.dtype)
                if role.reads and into in index:
                    weight = weight[:, _index(index[into], weight)]
                layer.weight = nn.Parameter(weight, requires_grad=layer.weight.requires_grad)
            if out in index:
                for key in _TENSORS:
                    tensor = _tensor(layer, key)
                    if tensor is not None:
                        _put(layer, key, tensor[_index(index[out], tensor)])
            if role.kind == "depthwise" and into in index:
                if getattr(layer, "padded", False):
                    layer.padding_value = layer.padding_value[_index(index[into], layer.padding_value)]
                layer.groups = len(index[into])
            _fit(layer)


_TENSORS = ("weight", "bias", "running_mean", "running_var")


def _tensor(layer: nn.Module, key: str) -> Tensor | None:
    found = getattr(layer, key, None)
    return found if isinstance(found, Tensor) else None


def _put(layer: nn.Module, key: str, tensor: Tensor) -> None:
    old = getattr(layer, key)
    made = tensor.detach().clone()
    setattr(layer, key, nn.Parameter(made, requires_grad=old.requires_grad) if key in layer._parameters else made)


def _fit(layer: Any) -> None:  # noqa: ANN401
    """Set the numbers of a plain layer that follow from its weight."""
    if isinstance(layer, nn.Conv2d):
        layer.out_channels, layer.in_channels = len(layer.weight), layer.weight.shape[1] * layer.groups
    elif isinstance(layer, nn.Linear | CompressedLinear):
        layer.out_features, layer.in_features = (int(size) for size in layer.weight.shape)
    elif isinstance(layer, nn.PReLU):
        layer.num_parameters = len(layer.weight)
    elif hasattr(layer, "num_features"):
        layer.num_features = len(layer.running_mean)


def _index(index: Numbers, like: Tensor) -> Tensor:
    return torch.from_numpy(index).to(like.device)


def _arrays(layer: Any) -> tuple[Array, Array]:  # noqa: ANN401
    """Return weight and bias of a layer in float64; no bias is 0."""
    weight = layer.weight.detach().cpu().double().numpy()
    bias = np.zeros(len(weight)) if layer.bias is None else layer.bias.detach().cpu().double().numpy()
    return weight, bias


def _padding(layer: Any, channels: int) -> Array:  # noqa: ANN401
    """Return with which value each input channel is padded."""
    padded = getattr(layer, "padded", False)
    return layer.padding_value.detach().cpu().double().numpy() if padded else np.zeros(channels)


def _codes(numbers: Array) -> Numbers:
    """Return whole numbers that are equal where numbers are; 0 and -0 are."""
    return np.ascontiguousarray(numbers + 0.0).view(np.int64)


def _summed(weight: Array, labels: Numbers) -> Array:
    """Return ``(O, I, K)`` with the columns of one label added up, in the order of labels ``(O, L, K)``."""
    distinct, inverse = np.unique(labels, return_inverse=True)
    if len(distinct) == len(labels):
        return weight[:, np.argsort(labels)]
    out = np.zeros((len(distinct), len(weight), weight.shape[2]))
    np.add.at(out, inverse, weight.swapaxes(0, 1))
    return out.swapaxes(0, 1)


def _distinct(
    keys: Numbers, rows: Array | None, factor: Array, proportional: bool, tolerance: float
) -> tuple[Numbers, Array]:
    """Return for each channel the first one that it equals, and its factor."""
    if rows is not None and proportional:
        return _multiples(keys, rows, factor, tolerance)
    parts = [np.ascontiguousarray(keys)] if rows is None else [np.ascontiguousarray(keys), _codes(rows)]
    known: dict[bytes, int] = {}
    table = np.ascontiguousarray(np.concatenate(parts, 1))
    return np.array([known.setdefault(row.tobytes(), k) for k, row in enumerate(table)], np.int64), factor


def _multiples(keys: Numbers, rows: Array, factor: Array, tolerance: float) -> tuple[Numbers, Array]:
    """Return for each channel the first one whose row is a positive multiple of its own, and the length of its row."""
    length = np.linalg.norm(rows, axis=1)
    length[length == 0] = 1
    unit = rows / length[:, None]
    alike = 2 - 2 * (unit @ unit.T) < tolerance**2
    np.fill_diagonal(alike, True)
    same = _distinct(keys, None, factor, False, 0)[0]
    alike &= same[:, None] == same[None]
    first = alike.argmax(1)
    while not np.array_equal(first, first[first]):
        first = first[first]
    return first, factor * length
