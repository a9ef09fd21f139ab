# SPDX-License-Identifier: Apache-2.0
"""Folding of batch norms into convolutions and linear layers, wherever the network stays the same.

After Yvinec, Dapogny and Bailly, "To Fold or Not to Fold: a Necessary and Sufficient Condition on Batch-Normalization
Layers Folding" (IJCAI 2022). In evaluation mode a batch norm is ``S x + T`` per channel. It can go if everything that
gives its input can be changed to give ``S x + T`` itself, and everything else that reads this can take it back
(backward); or if everything that reads its output can take ``S x + T`` of what it gets, and everything else that gives
this can be changed to fit (forward).

Channels that are tied by additions, concatenations and pooling form classes; what ends a class must be a layer. The
search looks at single channels, and all numbers are computed in float64.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from scipy.sparse import coo_matrix
from scipy.sparse.csgraph import connected_components
from torch import Tensor, nn

from affect.compression.base import Data, relative_error
from affect.compression.graph import Graph, Step, record
from affect.compression.layers import CompressedConv2d, WithoutNorm
from affect.compression.report import LayerRecord, Report
from affect.compression.structure import replace_layer
from affect.errors import ConfigError, near

__all__ = ["BatchNormFolding", "Fold", "Folded", "fold_batch_norms", "norm_affine"]

Array = NDArray[np.float64]

SEARCHES = ("full", "adjacent")

REACHES = ("one side", "layers", "norms")
"""What a fold may change: one side of the batch norm; layers on both; and other batch norms too."""


@dataclass(frozen=True)
class Fold:
    """What became of a batch norm.

    Attributes:
        name: Its name.
        direction: ``backward``, ``forward``, or None where it stays.
        layers: Layers that were changed for it.
        reason: What stands in the way, for each direction.
    """

    name: str
    direction: str | None
    layers: tuple[str, ...] = ()
    reason: str = ""


@dataclass
class Folded:
    """Outcome of a search.

    Attributes:
        folds: One for each batch norm, in order of the network.
        adjacent: How many follow a layer that nothing else reads: what folding of neighbours finds.
        padded: Layers that got a padding with values.
    """

    folds: list[Fold]
    adjacent: int
    padded: list[str]

    def count(self, direction: str | None) -> int:
        """Return how many batch norms were folded that way; None: how many are left."""
        return sum(fold.direction == direction for fold in self.folds)


def norm_affine(norm: nn.Module) -> tuple[Array, Array]:
    """Return S and T of a batch norm ``S x + T`` in float64, each ``(C,)``."""
    mean, variance = _array(norm.running_mean), _array(norm.running_var)
    scale = 1 / np.sqrt(variance + float(norm.eps))  # type: ignore[arg-type]
    if norm.weight is not None:
        scale = scale * _array(norm.weight)
    shift = -scale * mean
    return scale, shift if norm.bias is None else shift + _array(norm.bias)


def _array(tensor: Any) -> Array:  # noqa: ANN401
    return np.array(tensor.detach().cpu().double().numpy())


class _Layer:
    """Weight, bias and padding of a convolution or linear layer in float64, until they are written back."""

    def __init__(self, layer: Any) -> None:  # noqa: ANN401
        self.weight = _array(layer.weight)
        self.bias = None if layer.bias is None else _array(layer.bias)
        self.groups = int(getattr(layer, "groups", 1))
        channels = self.weight.shape[1] * self.groups
        known = getattr(layer, "padding_value", None)
        self.padding = np.zeros(channels) if known is None else _array(known)
        self.pads = _pads(layer)
        self.changed = False

    def give(self, factor: Array, shift: Array) -> None:
        """Give ``factor y + shift`` instead of y."""
        self.changed = True
        self.weight *= factor.reshape(-1, *[1] * (self.weight.ndim - 1))
        if self.bias is not None:
            self.bias = self.bias * factor + shift
        elif shift.any():
            self.bias = shift.copy()

    def take(self, factor: Array, shift: Array) -> None:
        """Expect ``factor x + shift`` instead of x; at its border, too."""
        self.changed = True
        split = self.weight.reshape(self.groups, len(self.weight) // self.groups, -1, self.weight[0, 0].size)
        split = split / factor.reshape(self.groups, 1, -1, 1)
        moved = (split.sum(-1) @ shift.reshape(self.groups, -1, 1)).reshape(-1)
        self.weight = split.reshape(self.weight.shape)
        if self.bias is not None or moved.any():
            self.bias = (0 if self.bias is None else self.bias) - moved
        if self.pads:
            self.padding = self.padding * factor + shift

    def write(self, network: nn.Module, name: str) -> bool:
        """Change the layer; return whether it pads with values now."""
        layer: Any = network.get_submodule(name)
        padded = bool(self.padding.any()) and self.pads
        if padded and not getattr(layer, "padded", False):
            replaced = CompressedConv2d.of(layer, bias=self.bias is not None, padded=True).to(layer.weight.device)
            layer = replaced.to(layer.weight.dtype).eval()
            replace_layer(network, name, layer)
        if getattr(layer, "padded", False):
            layer.padding_value.copy_(torch.from_numpy(self.padding))
        layer.weight.data.copy_(torch.from_numpy(self.weight))
        if self.bias is not None:
            if layer.bias is None:
                layer.bias = nn.Parameter(layer.weight.new_zeros(len(self.bias)))
            layer.bias.data.copy_(torch.from_numpy(self.bias))
        return padded


def _pads(layer: Any) -> bool:  # noqa: ANN401
    """Return whether a layer puts zeros (or set values) around its input."""
    if isinstance(layer, nn.Linear) or not hasattr(layer, "padding"):
        return False
    if getattr(layer, "padding_mode", "zeros") != "zeros":
        return False  # mirrored or repeated values are those of the input, changed or not
    if isinstance(layer.padding, str) or getattr(layer, "same", type(layer) is not nn.Conv2d):
        return layer.padding != "valid"
    return any(int(side) > 0 for side in layer.padding)


class _Norm:
    """Factor and shift of a batch norm in float64, until they are written back."""

    def __init__(self, norm: Any) -> None:  # noqa: ANN401
        self.scale, self.shift = norm_affine(norm)
        self.affine = norm.weight is not None and norm.bias is not None
        self.changed = False

    def give(self, factor: Array, shift: Array) -> None:
        """Give ``factor y + shift`` instead of y."""
        self.changed = True
        self.scale, self.shift = self.scale * factor, self.shift * factor + shift

    def take(self, factor: Array, shift: Array) -> None:
        """Expect ``factor x + shift`` instead of x."""
        self.changed = True
        self.scale = self.scale / factor
        self.shift = self.shift - self.scale * shift

    def write(self, norm: Any) -> None:  # noqa: ANN401
        """Change the batch norm: its statistics become those of a standard distribution."""
        norm.running_mean.zero_()
        norm.running_var.fill_(1 - norm.eps)
        norm.weight.data.copy_(torch.from_numpy(self.scale))
        norm.bias.data.copy_(torch.from_numpy(self.shift))


class _RefusedError(Exception):
    """What stands in the way of a fold."""


class _Search:
    """The recorded network while batch norms are taken out of it.

    Args:
        network: In evaluation mode; changed by ``write`` alone.
        graph: What it computes.
        strict: Whether folds that need a padding with values are refused.
        inverse_limit: Largest ``|T / S|`` that others take back.
        protect: Names of layers, or their beginnings, that stay as they are.
    """

    def __init__(
        self, network: nn.Module, graph: Graph, strict: bool, inverse_limit: float, protect: Sequence[str]
    ) -> None:
        self.network, self.graph, self.strict, self.inverse_limit = network, graph, strict, inverse_limit
        self.names = [step.name for step in graph.steps if step.kind == "norm"]
        self.folds: dict[str, Fold] = {}
        for step in graph.steps:
            if step.kind in ("layer", "norm") and any(step.name == p or step.name.startswith(f"{p}.") for p in protect):
                if step.kind == "norm":
                    self.folds[step.name] = Fold(step.name, None, (), "protected")
                step.kind = "other"
        self.layers = {s.name: _Layer(network.get_submodule(s.name)) for s in graph.steps if s.kind == "layer"}
        self.norms = {s.name: _Norm(network.get_submodule(s.name)) for s in graph.steps if s.kind == "norm"}
        sizes = [value.channels for value in graph.values]
        self.starts = np.concatenate([[0], np.cumsum(sizes)]).astype(np.int64)
        self.producer = graph.producer()
        self.storage = {value.index: value.storage for value in graph.values}
        pairs = [pair for step in graph.steps for pair in self.ties(step)]
        self.labels = _components(pairs, int(self.starts[-1]))
        self.ends = [s for s in graph.steps if s.kind not in ("same", "maximum", "add", "join", "repeat")]
        self.order = {id(step): index for index, step in enumerate(graph.steps)}
        self.copies: set[str] = set()

    def at(self, value: int) -> NDArray[np.int64]:
        """Return the classes of a value's channels."""
        return self.labels[self.starts[value] : self.starts[value + 1]]

    def channels(self, value: int) -> NDArray[np.int64]:
        """Return the numbers of a value's channels among all."""
        return np.arange(self.starts[value], self.starts[value + 1])

    def ties(self, step: Step) -> Iterator[tuple[NDArray[np.int64], NDArray[np.int64]]]:
        """Yield channels that a step ties to each other."""
        if step.kind in ("same", "maximum", "add"):
            for value in step.inputs:
                yield self.channels(value), self.channels(step.outputs[0])
        elif step.kind == "join":
            yield np.concatenate([self.channels(value) for value in step.inputs]), self.channels(step.outputs[0])
        elif step.kind == "repeat":
            before, after = self.channels(step.inputs[0]), self.channels(step.outputs[0])
            yield np.repeat(before, len(after) // len(before)), after

    def try_fold(self, step: Step, direction: str, reach: str) -> Fold:
        """Fold one batch norm, if that takes no more than ``reach``.

        Raises:
            _RefusedError: With what stands in the way.
        """
        norm = self.norms[step.name]
        target = step.inputs[0] if direction == "backward" else step.outputs[0]
        here = self.at(target)
        if len(np.unique(here)) != len(here):
            raise _RefusedError("a channel that is read twice")
        position = np.full(int(self.labels.max()) + 1, -1)
        position[here] = np.arange(len(here))
        given, taken = self.ends_of(step, direction, position, reach == "norms")
        if reach == "one side" and (taken if direction == "backward" else given):
            raise _RefusedError("others that must take it back")
        if direction == "backward":
            factor = norm.scale
        elif (norm.scale == 0).any():
            raise _RefusedError("a scale of zero")
        else:
            factor = 1 / norm.scale
        for through in self.graph.steps:
            if through.kind == "maximum":
                touched = position[self.at(through.inputs[0])]
                if (factor[touched[touched >= 0]] <= 0).any():
                    raise _RefusedError(f"a negative scale before {through.told()}")
        shifts = self.delivered(step, direction, position, norm, target)
        moved = self.propagated(shifts)
        self.require_invertible(taken, position, factor, moved, direction)
        for end, value in taken:
            self.of(end).take(self.spread(value, position, factor, 1.0), moved.get(value, self.nothing(value)))
        for end, value in given:
            shift = shifts.get(id(end), self.nothing(value))
            self.of(end).give(self.spread(value, position, factor, 1.0), shift)
        self.remove(step)
        changed = dict.fromkeys(end.name for end, _ in (*given, *taken))
        return Fold(step.name, direction, tuple(changed))

    def ends_of(
        self, step: Step, direction: str, position: NDArray[np.int64], through_norms: bool
    ) -> tuple[list[tuple[Step, int]], list[tuple[Step, int]]]:
        """Return what gives and what reads channels of the classes, without the batch norm itself."""
        counted = np.concatenate([[0], np.cumsum(position[self.labels] >= 0)])
        touched = counted[self.starts[1:]] > counted[self.starts[:-1]]
        given: list[tuple[Step, int]] = []
        taken: list[tuple[Step, int]] = []
        for end in self.ends:
            if end.kind == "same":  # a batch norm that was folded
                continue
            sides: list[tuple[Sequence[int], list[tuple[Step, int]], bool]] = [
                (end.outputs, given, end is step and direction == "forward"),
                (list(dict.fromkeys(end.inputs)), taken, end is step and direction == "backward"),
            ]
            for values, found, itself in sides:
                for value in values:
                    if itself or not touched[value]:
                        continue
                    if end is step:
                        raise _RefusedError("a path around it to itself")
                    if end.kind == "norm" and not (through_norms and self.norms[end.name].affine):
                        raise _RefusedError(f"batch norm {end.name}")
                    if end.kind not in ("norm", "layer"):
                        raise _RefusedError(end.told())
                    found.append((end, value))
        return given, taken

    def of(self, step: Step) -> _Layer | _Norm:
        """Return the numbers of a layer or batch norm."""
        return self.layers[step.name] if step.kind == "layer" else self.norms[step.name]

    def nothing(self, value: int) -> Array:
        """Return a shift of zero for a value."""
        return np.zeros(len(self.at(value)))

    def spread(self, value: int, position: NDArray[np.int64], numbers: Array, otherwise: float) -> Array:
        """Return numbers of classes at the channels of a value."""
        found = position[self.at(value)]
        return np.where(found >= 0, numbers[found], otherwise)

    def delivered(
        self, step: Step, direction: str, position: NDArray[np.int64], norm: _Norm, target: int
    ) -> dict[int, Array]:
        """Return the shift that each step delivers.

        Of several that are added up one alone delivers it, and once, however often it is added.
        """
        if direction == "forward":
            return {id(step): -norm.shift / norm.scale}
        unit: dict[int, Array] = {}
        stack = [(target, np.ones(len(self.at(target))))]
        while stack:
            value, wanted = stack.pop()
            origin = self.producer[value]
            if origin.kind in ("same", "maximum", "add"):
                stack.append((origin.inputs[0], wanted))
            elif origin.kind == "join":
                cuts = np.cumsum([len(self.at(part)) for part in origin.inputs])[:-1]
                stack += list(zip(origin.inputs, np.split(wanted, cuts), strict=True))
            elif origin.kind == "repeat":
                stack.append((origin.inputs[0], wanted))
            else:
                unit[id(origin)] = np.maximum(unit.get(id(origin), 0), wanted)
        arriving = self.propagated(unit)[target]
        shift = norm.shift / arriving
        ends = {id(end): end for end in self.ends}
        return {k: one * self.spread(ends[k].outputs[0], position, shift, 0.0) for k, one in unit.items()}

    def propagated(self, shifts: dict[int, Array]) -> dict[int, Array]:
        """Return the shift of each value that has one, given those that steps deliver."""
        moved: dict[int, Array] = {}
        for step in self.graph.steps:
            if id(step) in shifts:
                moved[step.outputs[0]] = shifts[id(step)]
            elif step.kind in ("same", "maximum", "add", "join", "repeat") and any(v in moved for v in step.inputs):
                parts = [moved.get(value, self.nothing(value)) for value in step.inputs]
                if step.kind == "join":
                    moved[step.outputs[0]] = np.concatenate(parts)
                elif step.kind == "repeat":
                    after = len(self.at(step.outputs[0]))
                    moved[step.outputs[0]] = np.repeat(parts[0], after // len(parts[0]))
                else:
                    moved[step.outputs[0]] = np.sum(parts, axis=0)
        return moved

    def require_invertible(
        self,
        taken: list[tuple[Step, int]],
        position: NDArray[np.int64],
        factor: Array,
        moved: dict[int, Array],
        direction: str,
    ) -> None:
        """Refuse what layers could not take back, or not to the precision of the network."""
        for end, value in taken:
            own = self.spread(value, position, factor, 1.0)
            shift = moved.get(value, self.nothing(value))
            if (own == 0).any():
                raise _RefusedError(f"a scale of zero that {end.name} cannot take back")
            if direction == "backward" and np.abs(shift / own).max(initial=0) > self.inverse_limit:
                raise _RefusedError(f"a scale so small that {end.name} cannot take it back")
            if end.kind == "layer" and self.strict:
                layer = self.layers[end.name]
                if layer.pads and (layer.padding * own + shift).any():
                    raise _RefusedError(f"the padding of {end.name}")

    def remove(self, step: Step) -> None:
        """Take a batch norm out of the recorded network."""
        self.norms[step.name].changed = False
        before, after = step.inputs[0], step.outputs[0]
        if self.must_copy(step):
            self.copies.add(step.name)
        else:
            old, new = self.storage[after], self.storage[before]
            self.storage = {value: new if held == old else held for value, held in self.storage.items()}
        step.kind = "same"
        count = int(self.labels.max()) + 1
        self.labels = _components([(self.at(before), self.at(after))], count)[self.labels]

    def must_copy(self, step: Step) -> bool:
        """Return whether others read the batch norm's input after something has written into its output."""
        later = self.graph.steps[self.order[id(step)] + 1 :]
        held, made = self.storage[step.inputs[0]], self.storage[step.outputs[0]]
        outside = self.storage[self.graph.steps[0].outputs[0]] == held
        read = outside or any(self.storage[value] == held for other in later for value in other.inputs)
        written = {self.storage[s.outputs[0]] for s in later if s.writes is not None and s.outputs}
        return read and made in written

    def run(self, through_norms: bool) -> None:
        """Fold all batch norms that can be: those first that nothing must take back, then those that layers can."""
        steps = [step for step in self.graph.steps if step.kind == "norm"]
        reasons: dict[str, list[str]] = {}
        again = True
        while again:
            again = False  # folding one may let another be folded
            for reach in REACHES[: 2 + through_norms]:
                for step in steps:
                    if step.name in self.folds or (again and reach != REACHES[0]):
                        continue
                    fold, reasons[step.name] = self.tried(step, reach)
                    if fold is not None:
                        self.folds[step.name], again = fold, True
        for step in steps:
            if step.name not in self.folds:
                self.folds[step.name] = Fold(step.name, None, (), "; ".join(reasons[step.name]))

    def tried(self, step: Step, reach: str) -> tuple[Fold | None, list[str]]:
        """Fold one batch norm in one of both directions; or return None, and what stands in the way of each."""
        reasons = []
        for direction in ("backward", "forward"):
            try:
                return self.try_fold(step, direction, reach), []
            except _RefusedError as refused:
                reasons.append(f"{direction}: {refused}")
        return None, reasons

    def run_adjacent(self) -> None:
        """Fold batch norms behind a layer that nothing else reads, and no others."""
        for step in [step for step in self.graph.steps if step.kind == "norm"]:
            if step.name in self.adjacent():
                self.folds[step.name] = self.try_fold(step, "backward", REACHES[0])
            else:
                self.folds[step.name] = Fold(step.name, None, (), "no layer right before it that nothing else reads")

    def adjacent(self) -> set[str]:
        """Return batch norms behind a layer that nothing else reads."""
        consumers = self.graph.consumers()
        return {
            step.name
            for step in self.graph.steps
            if step.kind == "norm"
            and self.producer[step.inputs[0]].kind == "layer"
            and len(consumers[step.inputs[0]]) == 1
        }

    @torch.no_grad()
    def write(self) -> list[str]:
        """Change the network; return layers that pad with values."""
        padded = [name for name, layer in self.layers.items() if layer.changed and layer.write(self.network, name)]
        for name, fold in self.folds.items():
            if fold.direction is not None:
                norm = self.network.get_submodule(name)
                replace_layer(self.network, name, WithoutNorm.of(norm, copies=name in self.copies).eval())
            elif name in self.norms and self.norms[name].changed:
                self.norms[name].write(self.network.get_submodule(name))
        return padded


def _components(pairs: Sequence[tuple[NDArray[np.int64], NDArray[np.int64]]], count: int) -> NDArray[np.int64]:
    """Return the class of each of ``count`` elements, given which are tied."""
    first = np.concatenate([pair[0] for pair in pairs]) if pairs else np.zeros(0, np.int64)
    second = np.concatenate([pair[1] for pair in pairs]) if pairs else np.zeros(0, np.int64)
    matrix = coo_matrix((np.ones(len(first), np.int8), (first, second)), shape=(count, count))
    return connected_components(matrix, directed=False)[1].astype(np.int64)


def fold_batch_norms(
    network: nn.Module,
    example: Tensor,
    strict: bool = False,
    search: str = "full",
    through_norms: bool = True,
    inverse_limit: float = 1e3,
    protect: Sequence[str] = (),
) -> Folded:
    """Fold batch norms of a network in evaluation mode, in place.

    Args:
        network: Maps images to features.
        example: Normalised images ``(B, 3, H, W)`` of the size that it is used with.
        strict: Refuse folds after which a convolution must pad with values instead of zeros.
        search: ``full`` finds all that can be folded; ``adjacent`` those right behind a layer, as other tools do.
        through_norms: Whether another batch norm may take back what a fold changes.
        inverse_limit: Largest ``|T / S|`` of a channel that others take back: as many times the rounding error grows.
        protect: Names of layers, or their beginnings, that stay as they are.

    Raises:
        ConfigError: If the network is training, or what it computes cannot be written down.
    """
    if network.training:
        raise ConfigError("batch norms can be folded in evaluation mode only: call network.eval() first")
    if search not in SEARCHES:
        raise ConfigError(f"compression.bn_folding.search={search}: {near(search, SEARCHES)}")
    found = _Search(network, record(network, example), strict, inverse_limit, protect)
    adjacent = len(found.adjacent())
    if search == "full":
        found.run(through_norms)
    else:
        found.run_adjacent()
    padded = found.write()
    return Folded([found.folds[name] for name in found.names], adjacent, padded)


class BatchNormFolding:
    """Fold every batch norm that can be folded without changing what the network computes.

    Args:
        strict: Refuse folds after which a convolution must pad with values instead of zeros.
        search: ``full`` or ``adjacent``.
        through_norms: Whether another batch norm may take back what a fold changes.
        inverse_limit: Largest ``|T / S|`` of a channel that others take back.
        protect: Names of layers, or their beginnings, that stay as they are.
    """

    name, stage = "bn_folding", "fold"
    needs: tuple[str, ...] = ()

    TOLERANCE = 1e-2
    """Relative change of the output above which a fold cannot have been rounding."""

    def __init__(
        self,
        strict: bool = False,
        search: str = "full",
        through_norms: bool = True,
        inverse_limit: float = 1e3,
        protect: Sequence[str] = (),
    ) -> None:
        if search not in SEARCHES:
            raise ConfigError(f"compression.{self.name}.search={search}: {near(search, SEARCHES)}")
        if not float(inverse_limit) > 0:
            raise ConfigError(f"compression.{self.name}.inverse_limit={inverse_limit}: must be positive")
        self.strict, self.search, self.through_norms = bool(strict), str(search), bool(through_norms)
        self.inverse_limit, self.protect = float(inverse_limit), tuple(protect)

    def prepare(self, network: nn.Module, data: Data) -> None:
        """Nothing is needed of the untouched network."""

    def __call__(self, network: nn.Module, data: Data) -> Report:
        """Fold."""
        example = data.example if data.example is not None else next(iter(data.images), None)
        if example is None:
            raise ConfigError(f"compression={self.name} needs images of the size that the network is used with")
        sizes = {name: _bytes(module) for name, module in network.named_modules()}
        shown = torch.randn(2, *example.shape[1:], generator=torch.Generator().manual_seed(data.seed))
        before = _outputs(network, shown.to(example))
        found = fold_batch_norms(
            network, example, self.strict, self.search, self.through_norms, self.inverse_limit, self.protect
        )
        worst = max(map(relative_error, before, _outputs(network, shown.to(example))), default=0.0)
        if not worst < self.TOLERANCE:
            raise ConfigError(
                f"compression={self.name} changes the output by {worst:.1%}: scales of batch norms are too small for "
                f"float32; set compression.{self.name}.through_norms=false, or protect layers"
            )
        report = Report(self.name, {"strict": self.strict, "search": self.search, "through_norms": self.through_norms})
        for fold in found.folds:
            note = f"{fold.direction} into {', '.join(fold.layers)}" if fold.direction else f"stays: {fold.reason}"
            after = 0 if fold.direction else sizes[fold.name]
            report.layers.append(LayerRecord(fold.name, self.name, None, None, None, sizes[fold.name], after, note))
        forward, backward = found.count("forward"), found.count("backward")
        report.totals = {
            "norms": len(found.folds),
            "folded": forward + backward,
            "forward": forward,
            "left": found.count(None),
            "adjacent": found.adjacent,
            "padded": len(found.padded),
        }
        if not found.folds:
            report.notes.append("the network has no batch norms")
        return report


def _bytes(module: nn.Module) -> int:
    own = [*module.parameters(recurse=False), *module.buffers(recurse=False)]
    return sum(tensor.numel() * tensor.element_size() for tensor in own)


@torch.no_grad()
def _outputs(network: Callable[[Tensor], Any], images: Tensor) -> list[Tensor]:
    """Return all tensors that a network gives."""
    return [leaf for leaf in torch.utils._pytree.tree_leaves(network(images)) if isinstance(leaf, Tensor)]
