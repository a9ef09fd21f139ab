# SPDX-License-Identifier: Apache-2.0
"""Rounding to a uniform grid: the baseline of all other quantizers, and what they share.

``Q(w) = round(n w / max|w|)`` with codes -n … n, n = 2^(b-1) - 1; per output channel or per tensor. Inputs of a layer
lie on a static grid whose range is measured on images of the training part.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager

import torch
from torch import Tensor, nn

from affect.compression.arguments import check_bits
from affect.compression.base import Data, quantizable
from affect.compression.layers import CompressedConv2d, CompressedLinear, InputGrid
from affect.compression.report import LayerRecord, Report, signal_to_noise
from affect.compression.stored import GridWeight, ResidualWeight, StoredWeight, signed_levels
from affect.compression.structure import replace_layer
from affect.errors import ConfigError

__all__ = [
    "UniformQuantization",
    "bits_by_layer",
    "compressed_layer",
    "current_weight",
    "edge_layers",
    "input_ranges",
    "largest_weights",
    "put_inputs",
    "put_weight",
    "require_floats",
    "round_to_grid",
    "watched_inputs",
]


def largest_weights(weight: Tensor, per_channel: bool = True) -> Tensor:
    """Return ``max|w|`` of each output channel ``(O,)``, or of the tensor ``(1,)``; 1 where all weights are 0."""
    largest = weight.detach().abs().flatten(1).amax(1)
    largest = largest if per_channel else largest.amax(0, keepdim=True)
    return torch.where(largest > 0, largest, torch.ones_like(largest))


def round_to_grid(weight: Tensor, bits: int, per_channel: bool = True) -> GridWeight:
    """Return a weight ``(O, …)`` rounded to the nearest value of its uniform grid."""
    largest = largest_weights(weight, per_channel)
    scaled = weight.detach() / largest.view(-1, *[1] * (weight.ndim - 1)) * signed_levels(bits)
    return GridWeight.of(scaled.round().long(), largest, bits)


def compressed_layer(network: nn.Module, name: str) -> CompressedConv2d | CompressedLinear:
    """Return the layer ``name``, which becomes a compressed layer that computes the same if it is none yet."""
    layer = network.get_submodule(name)
    if isinstance(layer, CompressedConv2d | CompressedLinear):
        return layer
    made = CompressedLinear.of(layer) if isinstance(layer, nn.Linear) else CompressedConv2d.of(layer)
    replace_layer(network, name, made.eval())
    return made


def put_weight(
    network: nn.Module, name: str, stored: StoredWeight, method: str, bits: int, note: str = ""
) -> LayerRecord:
    """Store a layer's weight as codes and return the record of it."""
    layer = compressed_layer(network, name)
    before = layer.current_weight().detach()
    bias = 0 if layer.bias is None else layer.bias.numel() * layer.bias.element_size()
    size = before.numel() * before.element_size() if layer.stored is None else layer.stored.stored_bytes
    layer.store(stored)
    noise = signal_to_noise(before, stored())
    return LayerRecord(name, method, bits, None, noise, size + bias, stored.stored_bytes + bias, note)


def put_inputs(
    network: nn.Module,
    name: str,
    low: Tensor,
    high: Tensor,
    bits: int,
    *,
    exponent: float | None = None,
    shifted: bool = False,
    orders: int = 1,
) -> InputGrid:
    """Give a layer's inputs a static grid.

    Args:
        network: The network.
        name: The layer.
        low: Smallest inputs, ``(1,)`` or per input channel ``(I,)``. Where none is below 0, codes are unsigned.
        high: Largest inputs, of the same shape.
        bits: Bits of a code.
        exponent: Of a grid of powers; None makes a uniform one.
        shifted: Where inputs are below 0, start an unsigned grid at the smallest (one range for all channels). It is
            stretched a little, so that 0, with which convolutions pad, stays a level.
        orders: Codes for an input: the first, and what each leaves over.

    Raises:
        ConfigError: If the inputs have grids whose scales the weight has in it.
    """
    layer = compressed_layer(network, name)
    if layer.inputs is not None and layer.inputs.absorbed:
        raise ConfigError(
            f"{name}: its inputs have static grids already, whose scales are in its weight (spiq), and can have no "
            "others: set input_bits=null"
        )
    signed = bool((low < 0).any())
    axis = 1 if isinstance(layer, CompressedConv2d) else -1
    a = 1.0 if exponent is None else float(exponent)
    below = 0.0  # part of the range that lies below 0
    if signed and shifted and len(low) == 1 and float(high) > 0:
        top = 2**bits - 1
        below = (math.ceil(top * float(-low / (high - low)) ** a) / top) ** (1 / a)
        signed = below >= 1
    grid = InputGrid(len(low), bits, signed, axis, exponent is not None, orders)
    grid.exponent.fill_(a)
    reach = torch.maximum(low.abs(), high.abs()) if signed else high
    if 0 < below < 1:
        reach = high / (1 - below)
        grid.shift.copy_(-below * reach.squeeze())
    floor = 1e-3 * reach.median().clamp_min(1e-12)  # dead channels must not get a grid of width 0
    grid.scale.copy_(torch.maximum(reach, floor) / grid.high)
    layer.inputs = grid
    return grid


@contextmanager
def watched_inputs(network: nn.Module, names: Sequence[str], see: Callable[[str, Tensor], None]) -> Iterator[None]:
    """Call ``see(name, input)`` whenever one of the named layers runs."""
    handles = []
    for name in names:

        def hook(layer: nn.Module, inputs: tuple[Tensor, ...], name: str = name) -> None:
            see(name, inputs[0].detach())

        handles.append(network.get_submodule(name).register_forward_pre_hook(hook))
    try:
        yield
    finally:
        for handle in handles:
            handle.remove()


@torch.no_grad()
def input_ranges(
    network: nn.Module, names: Sequence[str], images: Sequence[Tensor], per_channel: bool = False
) -> dict[str, tuple[Tensor, Tensor]]:
    """Return the smallest and largest inputs of layers over batches of images, ``(1,)`` or per channel ``(I,)``."""
    found: dict[str, tuple[Tensor, Tensor]] = {}

    def see(name: str, x: Tensor) -> None:
        layer = network.get_submodule(name)
        channels_first = isinstance(layer, nn.Conv2d | CompressedConv2d)
        flat = x.movedim(1, -1).flatten(0, -2) if channels_first else x.flatten(0, -2)
        flat = flat if per_channel else flat.reshape(-1, 1)
        low, high = flat.amin(0), flat.amax(0)
        if name in found:
            low, high = torch.minimum(low, found[name][0]), torch.maximum(high, found[name][1])
        found[name] = (low, high)

    with watched_inputs(network, names, see):
        for batch in images:
            network(batch)
    return found


def edge_layers(network: nn.Module, layers: Iterable[str]) -> set[str]:
    """Return which of ``layers`` are the network's first and last, which usually keep more bits.

    A protected layer stays the first or last one: the next does not take its place.
    """
    names = list(quantizable(network))
    return {names[0], names[-1]} & set(layers) if names else set()


def bits_by_layer(network: nn.Module, layers: Iterable[str], bits: int, edge_bits: int | None) -> dict[str, int]:
    """Return the bits of each of ``layers``: ``edge_bits`` for the network's first and last unless that is None."""
    edges = set() if edge_bits is None else edge_layers(network, layers)
    return {name: int(edge_bits) if name in edges and edge_bits is not None else int(bits) for name in layers}


def current_weight(layer: nn.Module) -> Tensor:
    """Return the weight that a plain or compressed layer multiplies by, without a graph."""
    weight = layer.current_weight() if isinstance(layer, CompressedConv2d | CompressedLinear) else layer.weight
    assert isinstance(weight, Tensor)
    return weight.detach()


def require_floats(layers: Mapping[str, nn.Module], method: str) -> None:
    """Refuse layers that a quantizer rounded before, whose codes would be rounded once more.

    Codebooks and kernels that RED stored hold its weights to the last bit, and may be rounded.

    Raises:
        ConfigError: With the first such layer.
    """
    for name, layer in layers.items():
        if isinstance(getattr(layer, "stored", None), GridWeight | ResidualWeight):
            raise ConfigError(
                f"compression.{method}: {name} has codes already, which would be rounded once more; take one "
                "quantizer, and the run that has floats"
            )


class UniformQuantization:
    """Weights on a uniform grid, and inputs too if asked for.

    Args:
        bits: Bits of a weight, 2 to 8.
        input_bits: Bits of an input, measured on training images; None leaves inputs floats.
        per_channel: Whether each output channel has its own range.
        edge_bits: Bits of the first and last layer (weights, and inputs where ``input_bits`` is given); None treats
            them like the others.
        protect: Names of layers, or their beginnings, that stay floats.
    """

    name, stage = "uniform", "weights"

    def __init__(
        self,
        bits: int = 8,
        input_bits: int | None = None,
        per_channel: bool = True,
        edge_bits: int | None = 8,
        protect: Sequence[str] = (),
    ) -> None:
        check_bits(self.name, bits=bits, input_bits=input_bits, edge_bits=edge_bits)
        self.bits, self.input_bits, self.per_channel = int(bits), input_bits, bool(per_channel)
        self.edge_bits, self.protect = edge_bits, tuple(protect)
        self.needs: tuple[str, ...] = () if input_bits is None else ("images",)

    def prepare(self, network: nn.Module, data: Data) -> None:
        """Nothing is needed of the untouched network."""

    def __call__(self, network: nn.Module, data: Data) -> Report:
        """Round every convolution and linear layer."""
        layers = quantizable(network, self.protect)
        require_floats(layers, self.name)
        edges = edge_layers(network, layers) if self.edge_bits is not None else set()
        ranges = input_ranges(network, list(layers), data.images) if self.input_bits is not None else {}
        report = Report(self.name, {"bits": self.bits, "input_bits": self.input_bits, "edge_bits": self.edge_bits})
        for name, layer in layers.items():
            bits = int(self.edge_bits) if name in edges and self.edge_bits is not None else self.bits
            weight = layer.current_weight() if hasattr(layer, "current_weight") else layer.weight
            record = put_weight(network, name, round_to_grid(weight, bits, self.per_channel), self.name, bits)  # type: ignore[arg-type]
            if name in ranges and self.input_bits is not None:
                record.input_bits = bits if name in edges else int(self.input_bits)
                low, high = ranges[name]
                put_inputs(network, name, low, high, record.input_bits)
            report.layers.append(record)
        return report
