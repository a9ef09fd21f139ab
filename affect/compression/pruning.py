# SPDX-License-Identifier: Apache-2.0
"""Structured pruning with the relevance of SInGE, entwined with fine-tuning.

What must be removed together (a filter, its batch norm, the inputs of all layers that read it) is found by the
dependency graph of torch-pruning. Each such *unit* gets a gate g at the inputs of the layers that read it; g = 1 is the
network, g = 0 the network without the unit. SInGE integrates the gradient along the way,

    IG_i = ∫₀¹ ∂L/∂g_i dg_i = L(network) - L(network without unit i)    (completeness),

where first-order criteria (Taylor) take the gradient at g = 1 only. Yvinec et al., SInGE: Sparsity via Integrated
Gradients Estimation of Neuron Relevance, NeurIPS 2022; Fang et al., DepGraph, CVPR 2023.
"""

from __future__ import annotations

import itertools
import math
import warnings
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from affect.compression.arguments import check_choices, check_counts, check_parts
from affect.compression.base import Data
from affect.compression.layers import LAYERS
from affect.compression.report import LayerRecord, Report, count_macs
from affect.errors import ConfigError

__all__ = [
    "CRITERIA",
    "ChannelGroup",
    "Gate",
    "PruningGraph",
    "SInGE",
    "Scoring",
    "ablations",
    "gated",
    "integrated_gradients",
    "layer_sizes",
    "path_nodes",
    "pruned_records",
    "relevance",
    "select_units",
    "traceable",
    "weight_bytes",
    "weight_magnitudes",
]

CRITERIA = ("singe", "taylor", "gradient", "l1", "l2")
BUDGETS = ("macs", "parameters", "channels")
HEADS = ("dims", "whole", "none")
Losses = Callable[[], Iterable[Tensor]]


# ------------------------------------------------------------------------------------------------ what goes together


@dataclass(frozen=True)
class Gate:
    """Where the gates of a group multiply.

    Attributes:
        layer: Name of the layer.
        output: Whether its output is multiplied (queries, keys and values), or else its input.
        axis: Dimension of the channels.
        positions: Channels that have a gate ``(P,)``.
        units: Unit of each of them ``(P,)``.
    """

    layer: str
    output: bool
    axis: int
    positions: Tensor
    units: Tensor


@dataclass(frozen=True)
class ChannelGroup:
    """Channels of several layers that can only be removed together, unit by unit.

    Attributes:
        name: Name of the first layer that makes them.
        root: Layer that torch-pruning starts from.
        handler: Function of torch-pruning with which it starts.
        units: Channels of the root that make a unit, ``(U, n)``; n > 1 for grouped convolutions and attention.
        gates: Where the gates of the units multiply.
        outputs: Output channels that one unit takes from a layer, by its name.
        inputs: Input channels that one unit takes from a layer, by its name.
    """

    name: str
    root: nn.Module
    handler: Callable[..., Any]
    units: Tensor
    gates: tuple[Gate, ...]
    outputs: Mapping[str, float]
    inputs: Mapping[str, float]

    def __len__(self) -> int:
        """Return the number of units."""
        return len(self.units)


def _library() -> Any:  # noqa: ANN401
    try:
        import torch_pruning
    except ImportError as error:
        raise ConfigError("pruning needs torch-pruning: pip install 'affect[compress]'") from error
    return torch_pruning


@contextmanager
def traceable(network: nn.Module) -> Iterator[None]:
    """Let gradients reach every parameter, and attention be a graph of plain operations."""
    frozen = [p for p in network.parameters() if not p.requires_grad]
    fused = [m for m in network.modules() if getattr(m, "fused_attn", False) is True]
    for p in frozen:
        p.requires_grad_(True)
    for m in fused:
        m.fused_attn = False  # type: ignore[assignment]
    try:
        with torch.enable_grad():
            yield
    finally:
        for p in frozen:
            p.requires_grad_(False)
        for m in fused:
            m.fused_attn = True  # type: ignore[assignment]


@contextmanager
def running(network: nn.Module) -> Iterator[list[str]]:
    """Yield the names of the modules that are running, the innermost last: after an error, where it was."""
    names: list[str] = []

    def leave(*_: object) -> None:
        names.pop()

    hooks = []
    for name, module in network.named_modules():
        hooks += [module.register_forward_pre_hook(lambda *_, name=name: names.append(name))]
        hooks += [module.register_forward_hook(leave)]
    try:
        yield names
    finally:
        for hook in hooks:
            hook.remove()


class PruningGraph:
    """The units of a network that can be removed without changing the shape of its output.

    Args:
        network: In evaluation mode.
        example: Images ``(B, 3, H, W)`` of the size that it is used with.
        protect: Names of layers, or their beginnings, that stay as they are.
        heads: What to remove of attention: ``dims`` of every head, ``whole`` heads, or ``none``.

    Attributes:
        groups: By name.
        left: Groups that stay whole: name and why.
        notes: Lines on those of them that a user would not expect to stay.

    Raises:
        ConfigError: If the network cannot be traced, or was compressed before.
    """

    def __init__(self, network: nn.Module, example: Tensor, protect: Sequence[str] = (), heads: str = "dims") -> None:
        self.network, self.example, self.heads, self.protect = network, example[:1], heads, tuple(protect)
        for name, layer in network.named_modules():
            if isinstance(layer, tuple(LAYERS.values())):
                raise ConfigError(f"{name}: is compressed already ({type(layer).__name__}); prune before other methods")
        library = _library()
        self.graph = library.DependencyGraph()
        with traceable(network), running(network) as entered, warnings.catch_warnings():
            warnings.simplefilter("ignore")
            try:
                self.graph.build_dependency(network, self.example, verbose=False)
            except Exception as error:
                place = ".".join(entered[-1:]) or f"a {type(network).__name__}"
                raise ConfigError(f"{place}: torch-pruning cannot follow this network: {error}") from error
        self.names = {layer: name for name, layer in network.named_modules()}
        self.attention = {
            attention.qkv: attention  # type: ignore[misc]
            for attention in network.modules()
            if isinstance(getattr(attention, "qkv", None), nn.Linear) and hasattr(attention, "num_heads")
        }
        self.groups: dict[str, ChannelGroup] = {}
        self.left: dict[str, str] = {}
        for found in self.graph.get_all_groups():
            self._add(found, self.protect)
        unread = [(name, why) for name, why in self.left.items() if why.startswith(("torch-pruning", "its channels"))]
        self.notes = [f"{name} and what goes with it stays whole: {why}" for name, why in unread]

    def _handlers(self, dependency: Any) -> tuple[bool, bool]:  # noqa: ANN401
        """Return whether a dependency removes outputs, and whether inputs; both for layers that work by channel."""
        out = self.graph.is_out_channel_pruning_fn(dependency.handler)
        into = self.graph.is_in_channel_pruning_fn(dependency.handler)
        layer = dependency.target.module
        if isinstance(layer, nn.Conv1d | nn.Conv2d) and layer.groups == layer.out_channels == layer.in_channels > 1:
            return True, True
        return out, into

    def _add(self, found: Any, protect: tuple[str, ...]) -> None:  # noqa: ANN401
        """Describe a group of torch-pruning, or say why it stays."""
        library = _library()
        layers = [(d, self.names[d.target.module]) for d, _ in found if d.target.module in self.names]
        made = [name for d, name in layers if self._handlers(d) == (True, False)] or [layers[0][1]]
        order = {name: k for k, name in enumerate(self.names.values())}
        name = min(made, key=lambda one: order[one])
        kept = [n for _, n in layers if any(n == p or n.startswith(f"{p}.") for p in protect)]
        attentions = [self.attention[d.target.module] for d, _ in found if d.target.module in self.attention]
        queries = [d for d, _ in found if d.target.module in self.attention and self._handlers(d) == (True, False)]
        odd = [n for d, n in layers if isinstance(d.target.module, nn.MultiheadAttention | nn.RNNBase)]
        # Attention with tensors of its own (tables of relative positions) has more sizes than those of its parts.
        odd += [self.names[attention] for attention in attentions if not _plain_attention(attention)]
        if any(d.target.type == library.ops.OPTYPE.OUTPUT for d, _ in found):
            self.left[name] = "makes the output of the network"
            return
        if kept or odd or (queries and (self.heads == "none" or len(attentions) != 1)):
            self.left[name] = f"{kept[0]} is protected" if kept else f"{(odd or [name])[0]} cannot be resized"
            return
        if queries:
            name = self.names[queries[0].target.module]
            after = [d for d, _ in found if d.target.module in self.names and self._handlers(d) == (False, True)]
            if not after:
                self.left[name] = "no layer reads it"
                return
            root = after[0].target.module
            found = self.graph.get_pruning_group(root, after[0].handler, list(range(root.in_features)))
        misread = next((d for d, channels in found if max(channels) >= self._channels(d)), None)
        if misread is not None:
            layer = self.names.get(misread.target.module, "a parameter")
            self.left[name] = f"torch-pruning gives {layer} channels beyond the {self._channels(misread)} that it has"
            return
        units = self._units(found, attentions[0] if queries else None)
        if units is None:
            self.left[name] = "its channels go in sets of different sizes"
            return
        of_root = torch.full((int(units.max()) + 1,), -1)
        of_root[units.flatten()] = torch.arange(len(units)).repeat_interleave(units.shape[1])
        gates: list[Gate] = []
        outputs: dict[str, float] = {}
        inputs: dict[str, float] = {}
        for item in found:
            layer = item.dep.target.module
            if layer not in self.names or not isinstance(layer, nn.Conv1d | nn.Conv2d | nn.Linear):
                continue
            out, into = self._handlers(item.dep)
            size = len(item.idxs) / len(units)
            if out:
                outputs[self.names[layer]] = outputs.get(self.names[layer], 0) + size
            elif into:
                inputs[self.names[layer]] = inputs.get(self.names[layer], 0) + size
            if (out and not into and layer in self.attention) if queries else (into and not out):
                axis = -1 if isinstance(layer, nn.Linear) else 1
                positions, roots = torch.tensor(item.idxs), torch.tensor(item.root_idxs)
                gates.append(Gate(self.names[layer], bool(queries), axis, positions, of_root[roots]))
        if not gates or len(units) < 2:
            self.left[name] = "no layer reads it" if not gates else "has one channel"
            return
        first = found[0].dep
        self.groups[name] = ChannelGroup(name, first.target.module, first.handler, units, tuple(gates), outputs, inputs)

    def _channels(self, dependency: Any) -> float:  # noqa: ANN401
        """Return how many channels the layer of a dependency has where it is pruned; inf if it has no weight."""
        layer = dependency.target.module
        if layer not in self.names:
            return math.inf
        outputs = self.graph.is_out_channel_pruning_fn(dependency.handler)
        size = self.graph.get_out_channels(layer) if outputs else self.graph.get_in_channels(layer)
        return math.inf if size is None else size

    def _units(self, found: Any, attention: nn.Module | None) -> Tensor | None:  # noqa: ANN401
        """Return which channels of the root go together ``(U, n)``, or None if not all units have as many."""
        channels = torch.arange(len(found[0].idxs))
        if attention is not None:
            by_head = channels.view(int(attention.num_heads), -1)  # type: ignore[arg-type]
            return by_head if self.heads == "whole" else by_head.T.contiguous()
        parts = 1
        for dependency, _ in found:
            layer = dependency.target.module
            if isinstance(layer, nn.GroupNorm):
                parts = max(parts, layer.num_groups)
            elif isinstance(layer, nn.Conv1d | nn.Conv2d) and self._handlers(dependency) != (True, True):
                parts = max(parts, layer.groups)
        return self._closed(found, channels.view(parts, -1).T.contiguous())

    def _closed(self, found: Any, units: Tensor) -> Tensor | None:  # noqa: ANN401
        """Join units of which one takes the other with it: what a channel makes is read beside itself (concatenation).

        Returns:
            Channels of the root ``(U, n)``; None if not all units have as many.
        """
        root = found[0].dep

        def taken(chosen: Tensor) -> set[int]:
            channels = sorted(units[chosen].flatten().tolist())
            group = self.graph.get_pruning_group(root.target.module, root.handler, channels)
            return {k for item in group if item.dep == root for k in item.idxs}

        kinds = _library().ops.OPTYPE
        renumbering = {kinds.CONCAT, kinds.SPLIT, kinds.SLICE, kinds.UNBIND, kinds.EXPAND, kinds.RESHAPE}
        renumbered = {d.target.type for d, _ in found} & renumbering
        makers = {d.target.module for d, _ in found if d.target.module in self.names and self._handlers(d)[0]}
        makers = {layer for layer in makers if isinstance(layer, nn.Conv1d | nn.Conv2d | nn.Linear)}
        if not renumbered or (renumbered == {kinds.CONCAT} and len(makers) == 1):
            return units  # channels keep their numbers everywhere, or never come back to where they are made

        # Two units differ in a digit of their numbers, so one that takes the other shows in one of these halves.
        numbers = torch.arange(len(units))
        digits = [numbers >> k & 1 for k in range((len(units) - 1).bit_length())]
        halves = [(digit == one).nonzero().flatten() for digit in digits for one in (0, 1)]
        if all(len(taken(half)) == units[half].numel() for half in halves):
            return units
        of_channel = {channel: u for u, one in enumerate(units.tolist()) for channel in one}
        joined = {u: {u} for u in range(len(units))}
        for unit in range(len(units)):
            for other in {of_channel[k] for k in taken(torch.tensor([unit]))}:
                if joined[other] is not joined[unit]:
                    joined[unit] |= joined[other]
                    joined.update(dict.fromkeys(joined[other], joined[unit]))
        sets = {min(one): sorted(one) for one in joined.values()}
        if len({len(one) for one in sets.values()}) > 1:
            return None
        return torch.stack([units[one].flatten() for _, one in sorted(sets.items())])

    def prune(self, removed: Mapping[str, Tensor]) -> None:
        """Remove units in place; the graph cannot be used afterwards, make a new one.

        Args:
            removed: Numbers of the units by name of their group.

        Raises:
            ConfigError: If the network does not run afterwards.
        """
        with torch.no_grad():
            expected = _shapes(self.network(self.example))
        before = {n: layer_sizes(layer) for n, layer in self.network.named_modules()}
        for name, units in removed.items():
            if len(units):
                group = self.groups[name]
                channels = sorted(group.units[units].flatten().tolist())
                with traceable(self.network):
                    try:
                        self.graph.get_pruning_group(group.root, group.handler, channels).prune()
                    except Exception as error:
                        raise ConfigError(
                            f"{name}: torch-pruning cannot remove its channels ({error}); name it in protect=[…]"
                        ) from error
                for qkv, attention in self.attention.items():
                    if self.names[qkv] == name:
                        self._fit_attention(attention, qkv, len(units))
        try:
            with torch.no_grad():
                found = _shapes(self.network(self.example))
            if found != expected:
                raise RuntimeError(f"its output has the shape {found}, not {expected}")
        except (RuntimeError, AssertionError, ValueError) as error:
            changed = [n for n, layer in self.network.named_modules() if before.get(n) != layer_sizes(layer)]
            raise ConfigError(
                f"the network does not run after pruning ({error}); {changed[0]} is the first of {len(changed)} layers "
                "that changed: name in protect=[…] the layers that torch-pruning follows wrongly"
            ) from error

    def _fit_attention(self, attention: nn.Module, qkv: nn.Module, removed: int) -> None:
        """Set the numbers of an attention layer, and scale queries so that scores of what is left stay the same.

        Fused attention divides by the root of the dimension that it sees, so ``scale`` must say the same.
        """
        if self.heads == "whole":
            attention.num_heads = int(attention.num_heads) - removed  # type: ignore[arg-type, assignment]
        heads = int(attention.num_heads)  # type: ignore[arg-type]
        width = int(qkv.out_features) // (3 * heads)  # type: ignore[arg-type]
        if isinstance(getattr(attention, "scale", None), float):
            factor = float(attention.scale) * width**0.5  # type: ignore[arg-type]
            with torch.no_grad():
                for tensor in (qkv.weight, qkv.bias):
                    if isinstance(tensor, Tensor):
                        tensor[: heads * width] *= factor
            attention.scale = width**-0.5  # type: ignore[assignment]
        for key, value in (("head_dim", width), ("attn_dim", heads * width)):
            if hasattr(attention, key):
                setattr(attention, key, value)

    def layer_costs(self, budget: str) -> dict[str, float]:
        """Return parameters, multiplications (``macs``) or output channels of each layer."""
        if budget == "macs":
            with torch.no_grad():
                return {n: float(c) for n, c in count_macs(self.network, lambda: self.network(self.example)).items()}
        kinds = nn.Conv1d | nn.Conv2d | nn.Linear
        layers = {n: layer for n, layer in self.network.named_modules() if isinstance(layer, kinds)}
        if budget == "parameters":
            return {n: float(layer.weight.numel()) for n, layer in layers.items()}
        return {n: float(len(layer.weight)) for n, layer in layers.items()}

    def cost_after(self, costs: Mapping[str, float], removed: Mapping[str, int], by_inputs: bool = True) -> float:
        """Return what is left of ``layer_costs`` without numbers of units, by name of the group.

        Args:
            costs: Of the layers now.
            removed: How many units of each group go.
            by_inputs: Whether a layer with fewer inputs costs less (not so for a count of channels).
        """
        out, into = dict.fromkeys(costs, 0.0), dict.fromkeys(costs, 0.0)
        for name, count in removed.items():
            for layer, size in self.groups[name].outputs.items():
                out[layer] = out.get(layer, 0.0) + size * count
            for layer, size in self.groups[name].inputs.items():
                into[layer] = into.get(layer, 0.0) + size * count
        total = 0.0
        for layer, cost in costs.items():
            outputs, inputs = layer_sizes(self.network.get_submodule(layer))
            cost *= 1 - out[layer] / max(outputs, 1)
            total += cost * (1 - into[layer] / max(inputs, 1) if by_inputs else 1)
        return total


def _plain_attention(attention: nn.Module) -> bool:
    """Return whether sizes of attention follow from its linear layers: no tables, no norms of queries and keys."""
    norms = [getattr(attention, key, None) for key in ("q_norm", "k_norm")]
    return not list(attention.parameters(recurse=False)) and all(n is None or isinstance(n, nn.Identity) for n in norms)


def layer_sizes(layer: nn.Module) -> tuple[int, int]:
    """Return output and input channels of a convolution or linear layer."""
    if isinstance(layer, nn.Linear):
        return layer.out_features, layer.in_features
    if isinstance(layer, nn.Conv1d | nn.Conv2d):
        return layer.out_channels, layer.in_channels
    return 0, 0


def _shapes(output: Any) -> list[tuple[int, ...]]:  # noqa: ANN401
    return [tuple(output.shape)] if isinstance(output, Tensor) else [shape for one in output for shape in _shapes(one)]


# ------------------------------------------------------------------------------------------------------ relevance


@contextmanager
def gated(network: nn.Module, groups: Iterable[ChannelGroup], gates: Mapping[str, Tensor]) -> Iterator[None]:
    """Multiply the units of groups by gates ``(U,)``, by name of the group."""
    handles = []

    def multiply(x: Tensor, gate: Gate, values: Tensor) -> Tensor:
        full = torch.ones(x.shape[gate.axis], dtype=x.dtype, device=x.device)
        full = full.index_put((gate.positions.to(x.device),), values.to(x)[gate.units.to(x.device)])
        return x * (full if gate.axis == -1 else full.view(-1, *[1] * (x.ndim - 2)))

    for group in groups:
        for gate in group.gates:
            layer, values = network.get_submodule(gate.layer), gates[group.name]

            def before(_: Any, inputs: Any, gate: Gate = gate, values: Tensor = values) -> Any:  # noqa: ANN401
                return (multiply(inputs[0], gate, values), *inputs[1:])

            def after(_: Any, inputs: Any, output: Tensor, gate: Gate = gate, values: Tensor = values) -> Tensor:  # noqa: ANN401
                return multiply(output, gate, values)

            handles.append(
                layer.register_forward_hook(after) if gate.output else layer.register_forward_pre_hook(before)
            )
    try:
        yield
    finally:
        for handle in handles:
            handle.remove()


def path_nodes(steps: int, path: str = "midpoint", mu: float = 0.7) -> list[tuple[float, float]]:
    """Return positions of gates on their way to 0 and the width of the interval that each stands for.

    ``midpoint`` splits [0, 1] evenly. ``geometric`` has the borders μ^0, μ^1, …, μ^steps of the paper, each interval
    represented by its middle; what lies below μ^steps is left out, so widths add up to 1 - μ^steps.
    """
    if path == "midpoint":
        return [((s + 0.5) / steps, 1 / steps) for s in range(steps)]
    return [((mu**s + mu ** (s + 1)) / 2, mu**s - mu ** (s + 1)) for s in range(steps)]


def _losses(losses: Losses, batches: int | None) -> list[Tensor]:
    return list(itertools.islice(losses(), batches))


@torch.no_grad()
def ablations(network: nn.Module, group: ChannelGroup, losses: Losses, batches: int | None = None) -> Tensor:
    """Return L(network) - L(network without unit i) of each unit of a group, ``(U,)``: the ground truth."""
    whole = torch.stack([loss.detach() for loss in _losses(losses, batches)]).mean()
    found = []
    for unit in range(len(group)):
        gate = torch.ones(len(group)).index_fill(0, torch.tensor([unit]), 0)
        with gated(network, [group], {group.name: gate}):
            found.append(whole - torch.stack([loss.detach() for loss in _losses(losses, batches)]).mean())
    return torch.stack(found)


def _gate_gradients(
    network: nn.Module, groups: Sequence[ChannelGroup], gates: Mapping[str, Tensor], losses: Losses, batches: int | None
) -> dict[str, Tensor]:
    """Return ∂L/∂g for each batch ``(batches, U)``, by name of the group."""
    leaves = {name: gate.detach().clone().requires_grad_(True) for name, gate in gates.items()}
    rows: dict[str, list[Tensor]] = {group.name: [] for group in groups}
    with torch.enable_grad(), gated(network, groups, leaves):
        for loss in itertools.islice(losses(), batches):
            gradients = torch.autograd.grad(loss, [leaves[g.name] for g in groups], allow_unused=True)
            for group, gradient in zip(groups, gradients, strict=True):
                rows[group.name].append(torch.zeros(len(group)) if gradient is None else gradient.detach().cpu())
    return {name: torch.stack(found) for name, found in rows.items()}


def integrated_gradients(
    network: nn.Module,
    group: ChannelGroup,
    losses: Losses,
    mode: str = "layer",
    steps: int = 8,
    path: str = "midpoint",
    mu: float = 0.7,
    batches: int | None = None,
) -> Tensor:
    """Return ∫ ∂L/∂g_i dg_i for each batch and unit, ``(batches, U)``, signed.

    Args:
        network: In evaluation mode.
        group: Its units.
        losses: Gives a loss per batch, the same batches at every call.
        mode: ``exact`` moves the gate of one unit at a time (complete); ``layer`` those of the group together.
        steps: Points of the path.
        path: ``midpoint`` or ``geometric``.
        mu: Factor of the geometric path.
        batches: Most batches; None takes all.
    """
    total = torch.zeros(())
    for position, width in path_nodes(steps, path, mu):
        if mode == "layer":
            gate = torch.full((len(group),), position)
            found = _gate_gradients(network, [group], {group.name: gate}, losses, batches)[group.name]
        else:
            columns = []
            for unit in range(len(group)):
                gate = torch.ones(len(group)).index_fill(0, torch.tensor([unit]), position)
                gradient = _gate_gradients(network, [group], {group.name: gate}, losses, batches)[group.name]
                columns.append(gradient[:, unit])
            found = torch.stack(columns, 1)
        total = total + width * found
    return total


def weight_magnitudes(graph: PruningGraph, group: ChannelGroup, power: int = 2) -> Tensor:
    """Return torch-pruning's magnitude of each unit ``(U,)``: norms over all layers of the group."""
    library = _library()
    importance = library.importance.GroupMagnitudeImportance(p=power, normalizer=None)
    channels = list(range(int(group.units.max()) + 1))
    found = importance(graph.graph.get_pruning_group(group.root, group.handler, channels))
    return found[group.units].sum(1).cpu()


def relevance(
    graph: PruningGraph,
    losses: Losses | None,
    criterion: str = "singe",
    mode: str = "layer",
    steps: int = 8,
    path: str = "midpoint",
    mu: float = 0.7,
    absolute: str = "batch",
    batches: int | None = None,
) -> dict[str, Tensor]:
    """Return how much each unit matters, ``(U,)`` ≥ 0 by name of its group.

    Args:
        graph: Units of the network.
        losses: As for ``integrated_gradients``; the criteria ``l1`` and ``l2`` need none.
        criterion: ``singe``; ``taylor`` (gradient at g = 1); ``gradient`` (norm of the weights' gradients); ``l1`` and
            ``l2`` (norms of weights).
        mode: See ``integrated_gradients``.
        steps: See there.
        path: See there.
        mu: See there.
        absolute: ``batch``: mean over batches of |·|; ``mean``: |mean over batches|.
        batches: Most batches.
    """
    groups = list(graph.groups.values())
    if criterion in ("l1", "l2"):
        return {g.name: weight_magnitudes(graph, g, int(criterion[1])) for g in groups}
    assert losses is not None
    if criterion == "gradient":
        return _gradient_magnitudes(graph, losses, batches)

    def reduced(signed: Tensor) -> Tensor:
        return signed.abs().mean(0) if absolute == "batch" else signed.mean(0).abs()

    if criterion == "taylor":
        gates = {g.name: torch.ones(len(g)) for g in groups}
        return {n: reduced(x) for n, x in _gate_gradients(graph.network, groups, gates, losses, batches).items()}
    return {
        g.name: reduced(integrated_gradients(graph.network, g, losses, mode, steps, path, mu, batches)) for g in groups
    }


@dataclass(frozen=True)
class Scoring:
    """How units are scored: the arguments of ``relevance`` beside what it looks at."""

    criterion: str = "singe"
    mode: str = "layer"
    steps: int = 8
    path: str = "midpoint"
    mu: float = 0.7
    absolute: str = "batch"
    batches: int = 4

    @property
    def needs(self) -> tuple[str, ...]:
        """Fields of ``Data`` that it needs."""
        return () if self.criterion in ("l1", "l2") else ("losses",)

    def check(self, method: str) -> None:
        """Refuse arguments that make no sense.

        Raises:
            ConfigError: With the key.
        """
        check_choices(
            method,
            criterion=(self.criterion, CRITERIA),
            mode=(self.mode, ("layer", "exact")),
            path=(self.path, ("midpoint", "geometric")),
            absolute=(self.absolute, ("batch", "mean")),
        )
        check_parts(method, mu=self.mu)
        check_counts(method, steps=self.steps, batches=self.batches)

    def __call__(self, graph: PruningGraph, losses: Losses | None) -> dict[str, Tensor]:
        """Return the relevance of each unit, by name of its group."""
        return relevance(graph, losses, **vars(self))


def _gradient_magnitudes(graph: PruningGraph, losses: Losses, batches: int | None) -> dict[str, Tensor]:
    """Return squared norms of the mean gradient of each unit's weights."""
    parameters = list(graph.network.parameters())
    sums = [torch.zeros_like(p) for p in parameters]
    with traceable(graph.network):
        for loss in itertools.islice(losses(), batches):
            for held, gradient in zip(sums, torch.autograd.grad(loss, parameters, allow_unused=True), strict=True):
                if gradient is not None:
                    held += gradient
    weights = [p.data for p in parameters]
    try:
        for p, held in zip(parameters, sums, strict=True):
            p.data = held
        return {g.name: weight_magnitudes(graph, g) for g in graph.groups.values()}
    finally:
        for p, held in zip(parameters, weights, strict=True):
            p.data = held


# ------------------------------------------------------------------------------------------------------ selection


def select_units(
    graph: PruningGraph,
    scores: Mapping[str, Tensor],
    target: float,
    budget: str = "macs",
    normalise: str = "cost",
    round_to: int = 1,
    most: float = 0.9,
    whole: Mapping[str, int] | None = None,
) -> dict[str, Tensor]:
    """Return the least relevant units of all groups together, as few as bring the cost to ``target`` or below.

    Args:
        graph: Units of the network.
        scores: Relevance of each unit.
        target: Cost that is allowed afterwards, in the unit of ``budget``.
        budget: ``macs``, ``parameters`` or ``channels``.
        normalise: ``cost``: scores are divided by what a unit saves; ``mean``: by the mean of their group; ``none``.
        round_to: Sizes of groups afterwards are multiples of this, where they were larger.
        most: Largest part of a group's original units that may ever go.
        whole: Original number of units by group, if some are gone already.
    """
    costs = graph.layer_costs(budget)
    by_inputs = budget != "channels"
    now = graph.cost_after(costs, {}, by_inputs)
    chunks = []
    for k, (name, group) in enumerate(graph.groups.items()):
        score = scores[name].double()
        if normalise == "mean":
            score = score / score.mean().clamp_min(1e-300)
        elif normalise == "cost":
            score = score / max(now - graph.cost_after(costs, {name: 1}, by_inputs), 1e-300)
        order = torch.argsort(score, stable=True)
        floor = max(1, math.ceil((1 - most) * (whole or {}).get(name, len(group))))
        gone = 0
        while True:
            left = len(group) - gone
            size = left % round_to or round_to
            if left - size < max(floor, round_to if round_to > 1 else 1):
                break
            units = order[gone : gone + size]
            chunks.append((float(score[units].mean()), k, gone, name, units))
            gone += size
    chunks.sort(key=lambda chunk: chunk[:3])

    def taken(count: int) -> dict[str, Tensor]:
        found: dict[str, list[Tensor]] = {}
        for *_, name, units in chunks[:count]:
            found.setdefault(name, []).append(units)
        return {name: torch.cat(parts) for name, parts in found.items()}

    low, high = 0, len(chunks)
    while low < high:  # the fewest chunks that are enough; all of them where none are
        middle = (low + high) // 2
        removed = {name: len(units) for name, units in taken(middle).items()}
        if graph.cost_after(costs, removed, by_inputs) <= target * (1 + 1e-9):
            high = middle
        else:
            low = middle + 1
    return taken(low)


class SInGE:
    """Removal of the least relevant units, a little at a time, with training in between.

    Args:
        ratio: Part of the budget to remove, 0 to 1.
        budget: ``macs``, ``parameters`` or ``channels``.
        criterion: One of ``CRITERIA``; those besides ``singe`` are what it is compared with.
        mode: ``layer``: gates of a group move together, one backward pass per group and step; ``exact``: one per unit.
        steps: Points of the path from 1 to 0.
        path: ``midpoint`` or ``geometric``.
        mu: Factor of the geometric path, 0 to 1.
        absolute: ``batch``: mean of |relevance| over batches; ``mean``: |mean|.
        batches: Batches of the training part that relevance is measured on.
        rounds: Times that units are scored and removed; 1 is one-shot pruning.
        tune_steps: Training steps after each round.
        final_steps: Training steps at the end.
        normalise: See ``select_units``.
        round_to: See there.
        most: See there.
        heads: ``dims``, ``whole`` or ``none``: what is removed of attention.
        protect: Names of layers, or their beginnings, that stay as they are.
    """

    name, stage = "singe", "prune"

    def __init__(
        self,
        ratio: float = 0.5,
        budget: str = "macs",
        criterion: str = "singe",
        mode: str = "layer",
        steps: int = 8,
        path: str = "midpoint",
        mu: float = 0.7,
        absolute: str = "batch",
        batches: int = 4,
        rounds: int = 10,
        tune_steps: int = 200,
        final_steps: int = 1000,
        normalise: str = "cost",
        round_to: int = 1,
        most: float = 0.9,
        heads: str = "dims",
        protect: Sequence[str] = (),
    ) -> None:
        self.scoring = Scoring(criterion, mode, int(steps), path, float(mu), absolute, int(batches))
        self.scoring.check(self.name)
        check_choices(
            self.name, budget=(budget, BUDGETS), normalise=(normalise, ("mean", "cost", "none")), heads=(heads, HEADS)
        )
        check_parts(self.name, ratio=ratio, most=most)
        check_counts(self.name, rounds=rounds, round_to=round_to)
        self.ratio, self.budget, self.rounds = float(ratio), budget, int(rounds)
        self.tune_steps, self.final_steps = int(tune_steps), int(final_steps)
        self.normalise, self.round_to, self.most, self.heads = normalise, int(round_to), float(most), heads
        self.protect = tuple(protect)
        trained = self.tune_steps or self.final_steps
        self.needs: tuple[str, ...] = (*self.scoring.needs, *(("train",) if trained else ()))

    def prepare(self, network: nn.Module, data: Data) -> None:
        """Nothing is needed of the untouched network."""

    def __call__(self, network: nn.Module, data: Data) -> Report:
        """Prune and train in turn."""
        assert data.example is not None
        keys = ("ratio", "budget", "rounds", "tune_steps", "final_steps", "normalise")
        report = Report(self.name, {**{key: getattr(self, key) for key in keys}, **vars(self.scoring)})
        sizes = {n: weight_bytes(layer) for n, layer in network.named_modules()}
        widths = {n: layer_sizes(layer) for n, layer in network.named_modules()}
        graph = PruningGraph(network, data.example, self.protect, self.heads)
        if not graph.groups:
            why = "; ".join(f"{name} {reason}" for name, reason in list(graph.left.items())[:3])
            raise ConfigError(f"compression={self.name}: no channels can be removed of this network: {why}")
        whole = {name: len(group) for name, group in graph.groups.items()}
        by_inputs = self.budget != "channels"
        start = graph.cost_after(graph.layer_costs(self.budget), {}, by_inputs)
        for k in range(self.rounds):
            graph = PruningGraph(network, data.example, self.protect, self.heads) if k else graph
            target = start * (1 - self.ratio * (k + 1) / self.rounds)
            removed = select_units(
                graph,
                self.scoring(graph, data.losses),
                target,
                self.budget,
                self.normalise,
                self.round_to,
                self.most,
                whole,
            )
            graph.prune(removed)
            if self.tune_steps and data.train is not None:
                data.train(self.tune_steps)
                network.eval()
        if self.final_steps and data.train is not None:
            data.train(self.final_steps)
            network.eval()
        graph = PruningGraph(network, data.example, self.protect, self.heads)
        report.notes += graph.notes
        end = graph.cost_after(graph.layer_costs(self.budget), {}, by_inputs)
        report.totals = {"before": start, "after": end, "removed": 1 - end / start}
        if end > start * (1 - self.ratio) * 1.001:
            report.notes.append(
                f"ratio={self.ratio:g} of {self.budget} cannot be removed: {1 - end / start:.1%} went, the rest makes "
                f"the output, is protected, or would leave groups under {1 - self.most:.0%} of their channels"
            )
        report.layers = pruned_records(network, widths, sizes, self.name)
        return report


def weight_bytes(layer: nn.Module) -> int:
    """Return the bytes of a layer's own parameters."""
    return sum(p.numel() * p.element_size() for p in layer.parameters(recurse=False))


def pruned_records(
    network: nn.Module, widths: Mapping[str, tuple[int, int]], sizes: Mapping[str, int], method: str
) -> list[LayerRecord]:
    """Return a record of each convolution and linear layer: its channels and bytes before and after."""
    records = []
    for name, layer in network.named_modules():
        out, into = layer_sizes(layer)
        if out:
            before = widths[name]
            note = f"{before[1]}→{before[0]} channels, now {into}→{out}" if before != (out, into) else "unchanged"
            records.append(LayerRecord(name, method, None, None, None, sizes[name], weight_bytes(layer), note))
    return records
