# SPDX-License-Identifier: Apache-2.0
"""What a network computes, step by step, as far as affine maps of its channels are concerned.

The network is run once on an example and every operation is written down: layers that hold weights and batch norms as
a whole, everything else operator by operator, below Python. So nothing has to be traced symbolically, no operation can
be missed, and what a layer writes into its input is seen. What is recorded holds for all inputs unless the network
decides by values, which is an error.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any

import torch
from timm.layers import BatchNormAct2d, Conv2dSame
from torch import Tensor, nn
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from affect.compression.layers import CompressedConv2d, CompressedLinear
from affect.errors import ConfigError

__all__ = ["MEANS", "NORMS", "Graph", "Step", "Value", "record"]

NORMS = (nn.BatchNorm1d, nn.BatchNorm2d, nn.SyncBatchNorm, BatchNormAct2d)
"""Batch norms; timm's kind has an activation in it, which is a step of its own."""

_LAYERS = (nn.Conv2d, Conv2dSame, nn.Linear, CompressedConv2d, CompressedLinear)

_VIEWS = {
    "_unsafe_view", "alias", "clone", "contiguous", "detach", "dropout", "flatten", "lift_fresh", "reshape", "squeeze",
    "unsqueeze", "view", "_reshape_alias", "_reshape_copy", "view_copy", "native_dropout",
}  # fmt: skip
_MAXIMA = {"adaptive_max_pool2d", "amax", "max_pool2d", "max_pool2d_with_indices"}
MEANS = frozenset({"_adaptive_avg_pool2d", "adaptive_avg_pool2d", "avg_pool2d", "mean"})
"""Operators that average; those of the kind ``same`` do so over the places of a channel."""

_BY_VALUE = {"_local_scalar_dense", "is_nonzero", "item", "nonzero"}


@dataclass(frozen=True)
class Value:
    """A tensor that the network computes.

    Attributes:
        index: Its number.
        shape: Its shape on the example.
        storage: Memory that it lies in: values with the same number may be changed by one another's writers.
    """

    index: int
    shape: tuple[int, ...]
    storage: int

    @property
    def channels(self) -> int:
        """Channels of a map ``(B, C, H, W)`` or vector ``(B, C)``; 0 for anything else."""
        return self.shape[1] if len(self.shape) in (2, 4) else 0


@dataclass
class Step:
    """An operation.

    Attributes:
        kind: ``layer`` (a convolution or linear layer), ``norm`` (a batch norm without its activation), ``same``
            (each channel is moved or averaged, so that an affine map of channels may as well come after as before),
            ``maximum`` (as well, if the factor is positive), ``add``, ``join`` (along channels), ``repeat`` (each
            channel several times, in a row), ``input``, or ``other``, which nothing can be moved through.
        name: Name of the layer, or of the module that an operation is done in.
        operator: Name of the operator, or of the layer's class.
        inputs: Values that it reads.
        outputs: Values that it gives.
        writes: Storage that it changes, if it writes into one of its inputs.
        numbers: Its arguments that are plain numbers, in order.
        constants: Tensors that it reads besides, which do not depend on the images.
    """

    kind: str
    name: str
    operator: str
    inputs: list[int] = field(default_factory=list)
    outputs: list[int] = field(default_factory=list)
    writes: int | None = None
    numbers: tuple[float, ...] = ()
    constants: int = 0

    def told(self) -> str:
        """Return operator and place for messages."""
        return f"{self.operator} in {self.name}" if self.name else self.operator


@dataclass
class Graph:
    """What was recorded.

    Attributes:
        values: All values by number.
        steps: All steps in the order in which they ran; the last one is ``output``.
        refused: Layers that run twice, share weights, or whose weights are used outside of them.
    """

    values: list[Value]
    steps: list[Step]
    refused: frozenset[str] = frozenset()

    def producer(self) -> dict[int, Step]:
        """Return the step that gives each value."""
        return {value: step for step in self.steps for value in step.outputs}

    def consumers(self) -> dict[int, list[Step]]:
        """Return the steps that read each value, in order."""
        found: dict[int, list[Step]] = {value.index: [] for value in self.values}
        for step in self.steps:
            for value in dict.fromkeys(step.inputs):
                found[value].append(step)
        return found


class _Recorder(TorchDispatchMode):
    """Writes down steps; layers are put in by hooks, within which operators are not looked at."""

    def __init__(self, owners: Mapping[int, str]) -> None:
        super().__init__()
        self.owners = owners
        self.values: list[Value] = []
        self.steps: list[Step] = []
        self.held: list[Tensor] = []  # so that no memory is used twice
        self.known: dict[int, dict[tuple[Any, ...], int]] = {}
        self.lying_in: dict[int, list[int]] = {}
        self.places: list[str] = []
        self.inside = 0
        self.used_directly: set[str] = set()

    @staticmethod
    def key(tensor: Tensor) -> tuple[Any, ...]:
        return (tensor.storage_offset(), tuple(tensor.shape), tuple(tensor.stride()), tensor.dtype)

    def add(self, tensor: Tensor) -> int:
        """Give a tensor a new value."""
        storage = tensor.untyped_storage().data_ptr()
        value = Value(len(self.values), tuple(tensor.shape), storage)
        self.values.append(value)
        self.held.append(tensor)
        self.known.setdefault(storage, {})[self.key(tensor)] = value.index
        self.lying_in.setdefault(storage, []).append(value.index)
        return value.index

    def find(self, tensor: Tensor) -> int | None:
        """Return the value of a tensor; None for a constant."""
        storage = tensor.untyped_storage().data_ptr()
        known = self.known.get(storage)
        if known is None:
            if storage in self.owners:
                self.used_directly.add(self.owners[storage])
            return None
        found = known.get(self.key(tensor))
        if found is None:  # memory that was changed through another view, or is looked at in another way
            self.steps.append(Step("other", self.place, "view", list(self.lying_in.get(storage, []))))
            found = self.add(tensor)
            self.steps[-1].outputs.append(found)
        return found

    @property
    def place(self) -> str:
        return self.places[-1] if self.places else ""

    def __torch_dispatch__(
        self,
        func: Any,  # noqa: ANN401
        types: Any,  # noqa: ANN401
        args: tuple[Any, ...] = (),
        kwargs: Mapping[str, Any] | None = None,
    ) -> Any:  # noqa: ANN401
        kwargs = dict(kwargs or {})
        if self.inside:
            return func(*args, **kwargs)
        operator = func._schema.name.split("::")[-1]
        tensors = [leaf for leaf in tree_leaves((args, kwargs)) if isinstance(leaf, Tensor)]
        found = [self.find(tensor) for tensor in tensors]
        inputs = [value for value in found if value is not None]
        shapes = [tuple(tensor.shape) for tensor in tensors]
        outcome = func(*args, **kwargs)
        given = [leaf for leaf in tree_leaves(outcome) if isinstance(leaf, Tensor)]
        if not inputs:  # of constants alone
            return outcome
        if operator in _BY_VALUE:
            raise ConfigError(
                f"{self.place or 'the network'} decides by values of tensors ({operator}): what it computes cannot be "
                "written down once for all images; leave methods out that need it"
            )
        written = _written(func, args, kwargs)
        changed = None if written is None else written.untyped_storage().data_ptr()
        if changed is not None:
            operator = operator.removesuffix("_")
            self.known[changed] = {}
        constant = len(inputs) != len(tensors)
        kind = "other" if constant else _kind(operator, args, kwargs, shapes, given)
        numbers = tuple(float(one) for one in tree_leaves((args, kwargs)) if type(one) in (int, float))
        step = Step(kind, self.place, operator, inputs, [], changed, numbers, len(tensors) - len(inputs))
        self.steps.append(step)
        step.outputs += [self.add(tensor) for tensor in given]
        return outcome


def _written(func: Any, args: tuple[Any, ...], kwargs: Mapping[str, Any]) -> Tensor | None:  # noqa: ANN401
    """Return the tensor that an operator writes into, or None."""
    for index, argument in enumerate(func._schema.arguments):
        if argument.alias_info is not None and argument.alias_info.is_write:
            given = args[index] if index < len(args) else kwargs.get(argument.name)
            if isinstance(given, Tensor):
                return given
    return None


def _kind(
    operator: str, args: tuple[Any, ...], kwargs: Mapping[str, Any], shapes: list[tuple[int, ...]], given: list[Tensor]
) -> str:
    """Return the kind of an operator's step; arguments have the order of PyTorch's schemas."""
    before, after = shapes[0], tuple(given[0].shape) if given else ()
    if not {len(before), len(after)} <= {2, 4} or before[0] != after[0]:
        return "other"
    if operator in _VIEWS and math.prod(before) == math.prod(after):
        if before[1] == after[1]:
            return "same"
        return "repeat" if len(after) == 2 and after[1] == math.prod(before[1:]) else "other"
    if operator in MEANS | _MAXIMA and _is_pooling(operator, args, kwargs, before, after):
        return "maximum" if operator in _MAXIMA else "same"
    if operator == "add" and len(shapes) == 2 and kwargs.get("alpha", 1) == 1:
        alike = [len(shape) == len(after) and shape[1] == after[1] for shape in shapes]
        return "add" if all(alike) else "other"
    if (
        operator == "cat"
        and {len(shape) for shape in shapes} == {len(after)}
        and (args[1] if len(args) > 1 else kwargs.get("dim", 0)) in (1, 1 - len(after))
    ):
        return "join"
    return "other"


def _is_pooling(
    operator: str, args: tuple[Any, ...], kwargs: Mapping[str, Any], before: tuple[int, ...], after: tuple[int, ...]
) -> bool:
    """Return whether values of a channel are averaged or compared among themselves only, and none is made up."""
    if len(before) != 4 or before[1] != after[1]:
        return False
    if operator in ("mean", "amax"):
        dims = args[1] if len(args) > 1 else kwargs.get("dim")
        return dims is not None and {int(d) % 4 for d in ([dims] if isinstance(dims, int) else dims)} <= {2, 3}
    if operator == "avg_pool2d":  # (input, kernel, stride, padding, ceil_mode, count_include_pad, divisor_override)
        padding = args[3] if len(args) > 3 else kwargs.get("padding", 0)
        counts = args[5] if len(args) > 5 else kwargs.get("count_include_pad", True)
        divisor = args[6] if len(args) > 6 else kwargs.get("divisor_override")
        padded = any([padding] if isinstance(padding, int) else padding)
        return divisor is None and not (padded and counts)
    return True


def _hooked(layer: nn.Module) -> bool:
    return bool(layer._forward_hooks or layer._forward_pre_hooks)


def _is_layer(layer: nn.Module) -> bool:
    """Return whether a layer multiplies its input, as it is, by a plain weight."""
    if type(layer) not in _LAYERS or _hooked(layer):
        return False
    return not (isinstance(layer, CompressedConv2d | CompressedLinear) and (layer.stored or layer.inputs))


def _is_norm(layer: nn.Module) -> bool:
    """Return whether a layer is a batch norm with statistics of its own."""
    return type(layer) in NORMS and not _hooked(layer) and getattr(layer, "running_mean", None) is not None


def _activates(layer: nn.Module) -> str | None:
    """Return the class of the activation in timm's batch norm, or None."""
    parts = [getattr(layer, "drop", None), getattr(layer, "act", None)]
    kinds = [type(part).__name__ for part in parts if part is not None and not isinstance(part, nn.Identity)]
    return kinds[-1] if kinds else None


def shared_layers(network: nn.Module) -> set[str]:
    """Return layers that have several names, or share a weight with another one."""
    names: dict[int, list[str]] = {}
    for name, layer in network.named_modules(remove_duplicate=False):
        for parameter in layer.parameters(recurse=False):
            names.setdefault(id(parameter), []).append(name)
    return {name for several in names.values() if len(several) > 1 for name in several}


@torch.no_grad()
def record(network: nn.Module, example: Tensor) -> Graph:
    """Return what a network in evaluation mode computes.

    Layers that run twice, share weights, or whose weights are used outside of them are steps of the kind ``other``.

    Args:
        network: The network; it is left as it is.
        example: Normalised images ``(B, 3, H, W)``; B of at least 2 tells channels from images, so one is repeated.

    Raises:
        ConfigError: If the network decides by values what it computes, or cannot run on the example.
    """
    if len(example) < 2:
        example = example.expand(2, *example.shape[1:])
    example = example.clone()
    chosen = {name: layer for name, layer in network.named_modules() if _is_layer(layer) or _is_norm(layer)}
    owners = {p.untyped_storage().data_ptr(): name for name, layer in chosen.items() for p in layer.parameters()}
    recorder = _Recorder(owners)
    ran: dict[str, list[Step]] = {}
    with _hooks(network, chosen, recorder, ran):
        recorder.steps.append(Step("input", "", "input", [], [recorder.add(example)]))
        try:
            with recorder:
                outcome = network(example)
        except ConfigError:
            raise
        except (RuntimeError, ValueError, TypeError, IndexError, AssertionError) as error:
            where = recorder.place or type(network).__name__
            raise ConfigError(f"{where} does not run on images {list(example.shape)}: {error}") from error
    final = [recorder.find(leaf) for leaf in tree_leaves(outcome) if isinstance(leaf, Tensor)]
    recorder.steps.append(Step("other", "", "output", [value for value in final if value is not None]))
    refused = shared_layers(network) | recorder.used_directly | {name for name, steps in ran.items() if len(steps) > 1}
    for name in refused & ran.keys():
        for step in ran[name]:
            step.kind = "other"
    return Graph(recorder.values, recorder.steps, frozenset(refused))


@contextmanager
def _hooks(
    network: nn.Module, chosen: Mapping[str, nn.Module], recorder: _Recorder, ran: dict[str, list[Step]]
) -> Iterator[None]:
    """Have modules tell the recorder where it is, and chosen layers write their steps."""
    handles = []
    for name, module in network.named_modules():
        enter, leave = _chosen_hooks(name, module, recorder, ran) if name in chosen else _place_hooks(name, recorder)
        handles += [module.register_forward_pre_hook(enter), module.register_forward_hook(leave)]
    try:
        yield
    finally:
        for handle in handles:
            handle.remove()


def _place_hooks(name: str, recorder: _Recorder) -> tuple[Callable[..., None], Callable[..., None]]:
    def enter(module: nn.Module, inputs: Any) -> None:  # noqa: ANN401
        recorder.places.append(name)

    def leave(module: nn.Module, inputs: Any, outputs: Any) -> None:  # noqa: ANN401
        recorder.places.pop()

    return enter, leave


def _chosen_hooks(
    name: str, layer: nn.Module, recorder: _Recorder, ran: dict[str, list[Step]]
) -> tuple[Callable[..., None], Callable[..., None]]:
    read: list[int | None] = []

    def enter(module: nn.Module, inputs: tuple[Tensor, ...]) -> None:
        recorder.places.append(name)
        read.append(recorder.find(inputs[0]))
        recorder.inside += 1

    def leave(module: nn.Module, inputs: tuple[Tensor, ...], output: Tensor) -> None:
        recorder.inside -= 1
        recorder.places.pop()
        value = read.pop()
        kind = "norm" if type(layer) in NORMS else "layer"
        into = [] if value is None else [value]
        # A linear layer acts on the last dimension, and a map's channels are the second one.
        fits = inputs[0].ndim == (2 if isinstance(layer, nn.Linear | CompressedLinear | nn.BatchNorm1d) else 4)
        step = Step(kind if fits and into else "other", name, type(layer).__name__, into)
        recorder.steps.append(step)
        ran.setdefault(name, []).append(step)
        step.outputs.append(recorder.add(output))
        activation = _activates(layer) if kind == "norm" else None
        if activation is not None:
            after = recorder.add(output)
            recorder.steps.append(Step("other", name, activation, [step.outputs[0]], [after]))

    return enter, leave
