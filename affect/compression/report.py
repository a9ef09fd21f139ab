# SPDX-License-Identifier: Apache-2.0
"""What a compression did, layer by layer, and how large a network is."""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, nn

from affect.compression.layers import CompressedConv2d, CompressedLinear
from affect.compression.stored import ResidualWeight

__all__ = ["LayerRecord", "Report", "count_macs", "signal_to_noise", "stored_size"]


@dataclass
class LayerRecord:
    """What happened to one layer.

    Attributes:
        name: Dotted name in the network.
        method: Name of the transform.
        bits: Bits of a stored weight; None where weights stay floats.
        input_bits: Bits of the layer's inputs; None where they stay floats.
        signal_to_noise: Of the weight against the one before, in dB; None where they cannot be compared.
        bytes_before: Bytes of weight and bias before.
        bytes_after: Bytes of them in a file afterwards.
        note: Anything else, in words.
        scales: Shape of the numbers that scale a stored weight's codes; None without such.
        parameters: Numbers of weight and bias that the layer multiplies by and adds; None where it is gone.
        macs: Multiplications of one image; None for layers that multiply by no weight.
    """

    name: str
    method: str
    bits: int | None = None
    input_bits: int | None = None
    signal_to_noise: float | None = None
    bytes_before: int | None = None
    bytes_after: int | None = None
    note: str = ""
    scales: list[int] | None = None
    parameters: int | None = None
    macs: int | None = None


@dataclass
class Report:
    """What one transform did.

    Attributes:
        method: Its name.
        settings: Its arguments.
        layers: A record for each layer that it touched or looked at.
        totals: Numbers of the whole, e.g. ``folded``, ``left``, ``exponent``.
        notes: Lines for the user.
        details: Anything else as plain data, by name: tables of numbers by layer.
        error: Relative error of the network's output on given images, ``|y' - y| / |y|``; None before it is measured.
    """

    method: str
    settings: dict[str, Any] = field(default_factory=dict)
    layers: list[LayerRecord] = field(default_factory=list)
    totals: dict[str, float] = field(default_factory=dict)
    notes: list[str] = field(default_factory=list)
    details: dict[str, Any] = field(default_factory=dict)
    error: float | None = None

    def plain(self) -> dict[str, Any]:
        """Return the report as plain data."""
        return dataclasses.asdict(self)


def signal_to_noise(before: Tensor, after: Tensor) -> float:
    """Return ``10 log10(Σ before² / Σ (after - before)²)`` in dB; inf for equal tensors."""
    noise = float((after.double() - before.double()).square().sum())
    power = float(before.double().square().sum())
    return math.inf if noise == 0 else 10 * math.log10(max(power, 1e-300) / noise)


def stored_size(network: nn.Module) -> int:
    """Return the bytes of all parameters and persistent buffers, codes packed: what a file of weights takes."""
    return sum(tensor.numel() * tensor.element_size() for tensor in network.state_dict().values())


@torch.no_grad()
def count_macs(network: nn.Module, run: Callable[[], object]) -> dict[str, int]:
    """Return multiplications (with an addition each) of every convolution and linear layer during ``run()``, by name.

    Divide by the batch size for those of one image. What attention multiplies with itself is not counted.
    """
    found: dict[str, int] = {}
    handles = []
    kinds = (nn.Conv1d, nn.Conv2d, nn.Linear, CompressedConv2d, CompressedLinear)

    def counter(name: str) -> Callable[[nn.Module, Any, Tensor], None]:
        def count(layer: nn.Module, inputs: Any, output: Tensor) -> None:  # noqa: ANN401
            weight = layer.current_weight() if hasattr(layer, "current_weight") else layer.weight
            found[name] = found.get(name, 0) + output.numel() * int(weight[0].numel())  # type: ignore[index]

        return count

    for name, layer in network.named_modules():
        if isinstance(layer, kinds):
            handles.append(layer.register_forward_hook(counter(name)))
    try:
        run()
    finally:
        for handle in handles:
            handle.remove()
    return found


def measure(report: Report, network: nn.Module, image: Tensor) -> None:
    """Write into a report what its layers are now: scales, parameters and multiplications.

    Args:
        report: Of the last transform.
        network: What it left.
        image: One normalised image ``(1, 3, H, W)``.
    """
    macs = count_macs(network, lambda: network(image))
    layers = dict(network.named_modules())
    for record in report.layers:
        layer = layers.get(record.name)
        if layer is None or record.name not in macs:
            continue
        compressed = isinstance(layer, CompressedConv2d | CompressedLinear)
        weight = layer.current_weight() if compressed else layer.weight  # type: ignore[operator]
        bias = getattr(layer, "bias", None)
        stored = getattr(layer, "stored", None)
        grid = stored.orders[0] if isinstance(stored, ResidualWeight) else stored
        scale = getattr(grid, "largest", getattr(grid, "scale", None))
        record.macs = macs[record.name]
        record.parameters = weight.numel() + (0 if bias is None else bias.numel())  # type: ignore[union-attr, operator]
        record.scales = None if scale is None else list(scale.shape)


def table(reports: Sequence[Report]) -> str:
    """Return the records of all layers as Markdown."""
    lines = [
        "| layer | method | bits | inputs | scales | dB | bytes | parameters | MACs | note |",
        "|---|---|---|---|---|---|---|---|---|---|",
    ]
    for report in reports:
        for record in report.layers:
            noise = "" if record.signal_to_noise is None else f"{record.signal_to_noise:.1f}"
            size = "" if record.bytes_after is None else f"{record.bytes_before} → {record.bytes_after}"
            bits = ["" if number is None else str(number) for number in (record.bits, record.input_bits)]
            scales = "" if record.scales is None else " x ".join(map(str, record.scales))
            counts = ["" if number is None else str(number) for number in (record.parameters, record.macs)]
            cells = [record.name, record.method, *bits, scales, noise, size, *counts, record.note]
            lines.append(f"| {' | '.join(cells)} |")
    return "\n".join(lines)
