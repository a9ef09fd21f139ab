# SPDX-License-Identifier: Apache-2.0
"""Static ranges for each input channel of a layer, without data (SPIQ).

After Yvinec, Dapogny, Cord and Bailly, "SPIQ: Data-Free Per-Channel Static Input Quantization" (WACV 2023). A batch
norm says what it gives: channel c has mean β_c and standard deviation |γ_c|. Inputs are divided by a scale of their
channel and rounded; the weight is multiplied by it before it is quantized itself, ``W x = (W diag(s)) (x / s)``.

How statistics pass through other operations is not known of the paper; here channels are taken as independent and
Gaussian, and functions of one value are integrated numerically.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from affect.compression.arguments import check_bits, check_range
from affect.compression.base import Data, quantizable
from affect.compression.graph import MEANS, Graph, Step, record
from affect.compression.layers import CompressedConv2d, CompressedLinear, InputGrid
from affect.compression.report import LayerRecord, Report
from affect.compression.uniform import compressed_layer, edge_layers, watched_inputs
from affect.errors import ConfigError

__all__ = ["SPIQ", "Statistics", "absorb", "channel_scales", "give_back", "norm_statistics", "propagate"]

POINTS = 129
"""Points at which a function of a Gaussian is evaluated."""

ELEMENTWISE: dict[str, Callable[..., Tensor]] = {
    "relu": F.relu, "silu": F.silu, "gelu": F.gelu, "hardswish": F.hardswish, "hardsigmoid": F.hardsigmoid,
    "sigmoid": torch.sigmoid, "tanh": torch.tanh, "mish": F.mish, "hardtanh": F.hardtanh,
    "leaky_relu": F.leaky_relu, "elu": F.elu,
}  # fmt: skip
"""Operators that map each value on its own; plain numbers follow the tensor."""


@dataclass(frozen=True)
class Statistics:
    """What is known of the channels of a value.

    Attributes:
        mean: Mean of each channel ``(C,)``.
        std: Standard deviation of each channel.
        low: Smallest value that is reckoned with.
        high: Largest one.
    """

    mean: Tensor
    std: Tensor
    low: Tensor
    high: Tensor

    @classmethod
    def gaussian(cls, mean: Tensor, std: Tensor, reach: float) -> Statistics:
        """Return those of a Gaussian, up to ``reach`` standard deviations."""
        return cls(mean, std, mean - reach * std, mean + reach * std)

    def mapped(self, function: Callable[[Tensor], Tensor]) -> Statistics:
        """Return those of a function of each value; it takes ``(N, C)``."""
        at = torch.linspace(-5, 5, POINTS, dtype=torch.float64)
        weight = torch.exp(-at.square() / 2)[:, None]
        weight = weight / weight.sum()
        values = function(self.mean + at[:, None] * self.std)
        mean = (weight * values).sum(0)
        std = (weight * (values - mean).square()).sum(0).sqrt()
        ends = function(self.low + (self.high - self.low) * torch.linspace(0, 1, POINTS, dtype=torch.float64)[:, None])
        return Statistics(mean, std, ends.amin(0), ends.amax(0))


def norm_statistics(norm: Any, reach: float) -> Statistics:  # noqa: ANN401
    """Return statistics of what a batch or layer norm gives: mean β and standard deviation |γ|."""
    size = norm.running_mean if getattr(norm, "running_mean", None) is not None else norm.weight
    shift = torch.zeros_like(size) if norm.bias is None else norm.bias
    scale = torch.ones_like(size) if norm.weight is None else norm.weight
    return Statistics.gaussian(shift.detach().double(), scale.detach().abs().double(), reach)


def _summed(parts: Sequence[Statistics], reach: float) -> Statistics:
    """Return statistics of a sum of independent values, whose range is no wider than the sum of ranges."""
    mean = torch.stack([part.mean for part in parts]).sum(0)
    std = torch.stack([part.std.square() for part in parts]).sum(0).sqrt()
    low = torch.maximum(torch.stack([part.low for part in parts]).sum(0), mean - reach * std)
    high = torch.minimum(torch.stack([part.high for part in parts]).sum(0), mean + reach * std)
    return Statistics(mean, std, torch.minimum(low, mean), torch.maximum(high, mean))


def _averaged(one: Statistics, count: float, correlation: float, reach: float) -> Statistics:
    """Return statistics of the mean over ``count`` places whose values have one correlation with each other.

    The deviation shrinks by ``√(ρ + (1 - ρ) / n)``: not at all at ρ = 1, by √n for independent places.
    """
    std = one.std * (correlation + (1 - correlation) / max(count, 1.0)) ** 0.5
    low, high = torch.maximum(one.low, one.mean - reach * std), torch.minimum(one.high, one.mean + reach * std)
    return Statistics(one.mean, std, torch.minimum(low, one.mean), torch.maximum(high, one.mean))


def _multiplied(one: Statistics, other: Statistics) -> Statistics:
    """Return statistics of a product of independent values.

    Both do not come to their ends at once: the range is that on the circle on which both together are as far from
    their means as each alone at its end (for a sum it is the deviation of the sum).
    """
    mean = one.mean * other.mean
    square = (one.std.square() + one.mean.square()) * (other.std.square() + other.mean.square())
    angle = torch.linspace(0, 2 * torch.pi, POINTS, dtype=torch.float64)[:, None]

    def at(part: Statistics, place: Tensor) -> Tensor:
        return part.mean + torch.where(place > 0, place * (part.high - part.mean), -place * (part.low - part.mean))

    values = at(one, angle.cos()) * at(other, angle.sin())
    return Statistics(mean, (square - mean.square()).clamp_min(0).sqrt(), values.amin(0), values.amax(0))


def _through_layer(layer: Any, before: Statistics, reach: float) -> Statistics | None:  # noqa: ANN401
    """Return statistics of what a layer gives of independent inputs; None where shapes do not tell."""
    weight = (layer.current_weight() if hasattr(layer, "current_weight") else layer.weight).detach().double()
    groups = int(getattr(layer, "groups", 1))
    if len(before.mean) != weight.shape[1] * groups:
        return None
    split = (
        weight.flatten(2).view(groups, weight.shape[0] // groups, weight.shape[1], -1)
        if weight.ndim > 2
        else (weight[None, :, :, None])
    )
    mean = (split.sum(-1) @ before.mean.view(groups, -1, 1)).reshape(-1)
    variance = (split.square().sum(-1) @ before.std.square().view(groups, -1, 1)).reshape(-1)
    bias = 0 if layer.bias is None else layer.bias.detach().double()
    return Statistics.gaussian(mean + bias, variance.sqrt(), reach)


def propagate(
    network: nn.Module,
    graph: Graph,
    reach: float,
    correlation: float = 1.0,
    limits: tuple[Tensor, Tensor] | None = None,
) -> tuple[dict[int, Statistics], dict[int, Step]]:
    """Return statistics of values by their number, and for others the step that they are not known beyond.

    Args:
        network: The network, with its batch norms.
        graph: What it computes.
        reach: Standard deviations λ that a range covers.
        correlation: Of the places of a channel that are averaged, in [0, 1]; 1 keeps the deviation as a bound.
        limits: Smallest and largest normalised pixel of each channel ``(3,)``; None lets the input, whose mean counts
            as 0 and deviation as 1, reach as far as any other value.
    """
    known: dict[int, Statistics] = {}
    lost: dict[int, Step] = {}
    for step in graph.steps:
        if not step.outputs:
            continue
        if step.kind == "input":
            found: Statistics | None = _of_images(graph.values[step.outputs[0]].shape[1], reach, limits)
        else:
            found = _step_statistics(network, graph, step, known, reach, correlation)
        for value in step.outputs:
            if found is not None:
                known[value] = found
            else:
                lost[value] = next((lost[v] for v in step.inputs if v in lost), step)
    return known, lost


def _of_images(channels: int, reach: float, limits: tuple[Tensor, Tensor] | None) -> Statistics:
    """Return statistics of normalised images; pixels have limits, which no data is needed for."""
    found = Statistics.gaussian(torch.zeros(channels).double(), torch.ones(channels).double(), reach)
    if limits is None:
        return found
    low, high = (one.detach().double().cpu().expand(channels) for one in limits)
    return Statistics(found.mean.clamp(low, high), found.std, low, high)


def _step_statistics(
    network: nn.Module, graph: Graph, step: Step, known: dict[int, Statistics], reach: float, correlation: float
) -> Statistics | None:
    """Return statistics of what a step gives, or None."""
    module = network.get_submodule(step.name)
    if step.kind == "norm" or step.operator == "native_layer_norm":
        known_norm = getattr(module, "weight", None) is not None or step.kind == "norm"
        return norm_statistics(module, reach) if known_norm else None
    parts = [known[value] for value in step.inputs if value in known]
    if not parts or len(parts) != len(step.inputs):
        return None
    first = parts[0]
    if step.kind == "same" and step.operator in MEANS:
        before, after = (graph.values[value].shape for value in (step.inputs[0], step.outputs[0]))
        return _averaged(first, math.prod(before[2:]) / math.prod(after[2:]), correlation, reach)
    if step.kind in ("same", "maximum"):
        return first
    if step.kind == "repeat":
        times = graph.values[step.outputs[0]].shape[1] // len(first.mean)
        fields = (first.mean, first.std, first.low, first.high)
        return Statistics(*(torch.repeat_interleave(one, times) for one in fields))
    if step.kind == "join":
        return Statistics(*(torch.cat([getattr(p, key) for p in parts]) for key in ("mean", "std", "low", "high")))
    if step.kind == "add":
        return _summed(parts, reach)
    if step.operator == "mul" and len(parts) == 2 and len(parts[0].mean) == len(parts[1].mean):
        return _multiplied(*parts)
    if isinstance(module, nn.Conv2d | nn.Linear | CompressedConv2d | CompressedLinear):
        return _through_layer(module, first, reach)
    activation = getattr(module, "act", None)
    if step.kind == "other" and step.operator == type(activation).__name__:  # inside of timm's batch norm
        assert activation is not None
        return first.mapped(lambda x: activation(x.clone()))
    if step.operator in ELEMENTWISE and len(parts) == 1:
        function = ELEMENTWISE[step.operator]
        return first.mapped(lambda x: function(x, *step.numbers))
    if step.operator in ("_prelu_kernel", "prelu") and isinstance(module, nn.PReLU):
        slope = module.weight.detach().double()
        return first.mapped(lambda x: torch.where(x > 0, x, x * slope))
    return None


def channel_scales(low: Tensor, high: Tensor, weight: Tensor, bits: int, alpha: float, groups: int = 1) -> Tensor:
    """Return the step of the grid of each input channel ``(I,)``.

    ``r^alpha / w^(1 - alpha)`` with the channel's range r and largest weight w divides inputs; what is left has one
    range. alpha = 1 is SPIQ: every channel has its own range.

    Args:
        low: Smallest inputs ``(I,)``; where none is below 0, codes are unsigned.
        high: Largest inputs.
        weight: Weight ``(O, I / groups, …)``.
        bits: Bits of a code.
        alpha: How much of the spread of ranges weights take, in [0, 1].
        groups: Groups of the convolution.
    """
    signed = bool((low < 0).any())
    codes = 2 ** (bits - 1) - 1 if signed else 2**bits - 1
    reach = torch.maximum(low.abs(), high.abs())
    reach = torch.maximum(reach, 1e-3 * reach.median()).clamp_min(1e-12)  # dead channels get no grid of width 0
    largest = weight.detach().double().abs().view(groups, weight.shape[0] // groups, weight.shape[1], -1)
    largest = largest.amax((1, 3)).flatten()
    largest = torch.where(largest > 0, largest, largest.max().clamp_min(1e-12))
    divisor = reach.pow(alpha) / largest.pow(1 - alpha)
    return divisor * (reach / divisor).max() / codes


@torch.no_grad()
def absorb(network: nn.Module, name: str, low: Tensor, high: Tensor, bits: int, alpha: float = 1.0) -> None:
    """Round a layer's inputs to codes of static grids, and multiply its weight by their scales.

    Args:
        network: The network; changed in place.
        name: The layer.
        low: Smallest inputs ``(I,)``.
        high: Largest ones.
        bits: Bits of a code.
        alpha: As of ``channel_scales``.
    """
    layer = compressed_layer(network, name)
    weight, groups = layer.weight, int(getattr(layer, "groups", 1))
    scale = channel_scales(low, high, weight, bits, alpha, groups).to(weight)
    signed = bool((low < 0).any())
    grid = InputGrid(len(scale), bits, signed, 1 if isinstance(layer, CompressedConv2d) else -1, absorbed=True)
    grid.scale.copy_(scale)
    layer.inputs = grid.to(weight.device)
    shaped = scale.view(groups, 1, -1, 1)
    split = weight.detach().reshape(groups, weight.shape[0] // groups, weight.shape[1], -1)
    weight.data.copy_((split * shaped).reshape(weight.shape))
    if getattr(layer, "padded", False):
        layer.padding_value.div_(scale)


@torch.no_grad()
def give_back(layer: CompressedConv2d | CompressedLinear) -> None:
    """Undo ``absorb``: take scales out of the weight, and the grid away from its inputs.

    Args:
        layer: With inputs on a grid whose scales its weight, which is no codes, has in it; changed in place.
    """
    assert layer.inputs is not None
    assert layer.stored is None
    scale = layer.inputs.scale
    groups = int(getattr(layer, "groups", 1))
    split = layer.weight.detach().reshape(groups, layer.weight.shape[0] // groups, layer.weight.shape[1], -1)
    layer.weight.data.copy_((split / scale.view(groups, 1, -1, 1)).reshape(layer.weight.shape))
    if getattr(layer, "padded", False):
        layer.padding_value.mul_(scale)
    layer.inputs = None


class SPIQ:
    """Static grids for the inputs of layers, from what batch norms say of them.

    Args:
        input_bits: Bits of an input, 2 to 8.
        reach: Standard deviations that a range covers; None takes 1.25 for each bit, 5 at 4 bits and 10 at 8.
        correlation: Of the places of a channel that are averaged, in [0, 1]: 1 keeps the deviation as a bound.
        alpha: How much of the spread of ranges the weights take: 1 is SPIQ, less as in SmoothQuant.
        edge_bits: Bits of the inputs of the first and last layer; None treats them like the others.
        protect: Names of layers, or their beginnings, whose inputs stay floats.
    """

    name, stage = "spiq", "inputs"
    needs: tuple[str, ...] = ()

    def __init__(
        self,
        input_bits: int = 8,
        reach: float | None = None,
        correlation: float = 0.25,
        alpha: float = 1.0,
        edge_bits: int | None = 8,
        protect: Sequence[str] = (),
    ) -> None:
        check_bits(self.name, input_bits=input_bits, edge_bits=edge_bits)
        check_range(self.name, 0, 1, {"alpha": alpha, "correlation": correlation})
        if reach is not None and not float(reach) > 0:
            raise ConfigError(f"compression.{self.name}.reach={reach}: must be positive")
        self.input_bits, self.reach, self.alpha = int(input_bits), reach, float(alpha)
        self.correlation = float(correlation)
        self.edge_bits, self.protect = edge_bits, tuple(protect)
        self.ranges: dict[str, tuple[Tensor, Tensor, int]] = {}
        self.seen: dict[str, Tensor] = {}
        self.lost: dict[str, str] = {}

    def prepare(self, network: nn.Module, data: Data) -> None:
        """Read statistics of batch norms, which folding takes away."""
        if data.example is None:
            raise ConfigError(f"compression={self.name} needs images of the size that the network is used with")
        layers = quantizable(network, self.protect)
        edges = edge_layers(network, layers) if self.edge_bits is not None else set()
        bits = {name: int(self.edge_bits or 8) if name in edges else self.input_bits for name in layers}
        graph = record(network, data.example)
        self.ranges, self.lost = {}, {}
        for reach in sorted({self.reach_of(b) for b in bits.values()}):
            known, lost = propagate(network, graph, reach, self.correlation, data.limits)
            for step in graph.steps:
                if step.name in layers and step.inputs and self.reach_of(bits[step.name]) == reach:
                    found = known.get(step.inputs[0])
                    if found is None:
                        self.lost[step.name] = lost[step.inputs[0]].told()
                    else:
                        self.ranges[step.name] = (found.low, found.high, bits[step.name])
        self.seen = _inputs(network, list(self.ranges), data)

    def reach_of(self, bits: int) -> float:
        """Return the standard deviations that a range of so many bits covers."""
        return float(self.reach) if self.reach is not None else 1.25 * bits

    def __call__(self, network: nn.Module, data: Data) -> Report:
        """Give layers their grids."""
        keys = ("input_bits", "reach", "correlation", "alpha", "edge_bits")
        report = Report(self.name, {key: getattr(self, key) for key in keys})
        layers = quantizable(network, self.protect)
        now = _inputs(network, [name for name in self.ranges if name in layers], data)
        for name, layer in layers.items():
            if getattr(layer, "stored", None) is not None:
                raise ConfigError(f"compression={self.name}: {name} is quantized already; inputs come before weights")
            note = ""
            if name in now:
                moved = _affine(self.seen[name], now[name])
                if isinstance(moved, str):
                    note = f"inputs stay floats: {moved}"
                else:
                    low, high, bits = self.ranges[name]
                    ends = torch.stack([low * moved[0] + moved[1], high * moved[0] + moved[1]])
                    absorb(network, name, ends.amin(0), ends.amax(0), bits, self.alpha)
                    report.layers.append(LayerRecord(name, self.name, None, bits))
                    continue
            unknown = f"unknown beyond {self.lost[name]}" if name in self.lost else "the layer never runs"
            report.layers.append(LayerRecord(name, self.name, note=note or f"inputs stay floats: {unknown}"))
        done = sum(one.input_bits is not None for one in report.layers)
        report.totals = {"static": done, "floats": len(report.layers) - done}
        if done < len(report.layers):
            first = next(one for one in report.layers if one.input_bits is None)
            report.notes.append(
                f"{len(report.layers) - done} layers keep float inputs, first {first.name}: {first.note}"
            )
        return report


@torch.no_grad()
def _inputs(network: nn.Module, names: Sequence[str], data: Data) -> dict[str, Tensor]:
    """Return inputs of layers on noise as rows of channels ``(N, I)``."""
    assert data.example is not None
    found: dict[str, Tensor] = {}

    def see(name: str, x: Tensor) -> None:
        channels_first = isinstance(network.get_submodule(name), nn.Conv2d | CompressedConv2d)
        rows = x.movedim(1, -1).flatten(0, -2) if channels_first else x.flatten(0, -2)
        found[name] = rows[:: max(1, len(rows) // 256)].double().cpu()

    draws = torch.Generator().manual_seed(data.seed)
    noise = torch.randn(2, *data.example.shape[1:], generator=draws)
    # Wider noise, too, reaches channels that hardly ever are above their ReLU's zero.
    noise = torch.cat([noise, 5 * torch.randn(2, *data.example.shape[1:], generator=draws)])
    with watched_inputs(network, names, see):
        network(noise.to(data.example))
    return found


def _affine(before: Tensor, after: Tensor) -> tuple[Tensor, Tensor] | str:
    """Return factor and shift of each channel that turn ``before`` into ``after``, or why they are not known."""
    changed = "they changed in another way than by folding"
    if before.shape != after.shape:
        return changed
    centred = before - before.mean(0)
    spread = centred.square().sum(0)
    slope = (centred * (after - after.mean(0))).sum(0) / spread.clamp_min(1e-30)
    still = spread <= 1e-20
    factor = torch.where(still, torch.ones_like(slope), slope)
    shift = after.mean(0) - factor * before.mean(0)
    left = (before * factor + shift - after).norm() / after.norm().clamp_min(1e-30)
    if float(left) >= 1e-2:
        return changed
    # A constant shows a shift, and not by what folding multiplied.
    lost = int((still & (shift.abs() > 1e-6 * after.abs().amax().clamp_min(1e-30))).sum())
    return f"{lost} channels are constant on noise, and folding moved them" if lost else (factor, shift)
