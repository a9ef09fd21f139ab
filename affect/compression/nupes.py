# SPDX-License-Identifier: Apache-2.0
"""NUPES: codes on a grid of powers and its exponent, both learned by gradients.

Once the grid itself moves, rounding up or down around a float is not enough: codes may take any value of the grid.
Yvinec, Dapogny and Bailly: NUPES: non-uniform post-training quantization via power exponent search. arXiv 2308.05600;
IEEE TPAMI 2025.

Two gradients of the exponent must not be mixed. Where codes are derived anew from floats at every step, the gradient
passes through encoding and decoding (``learn_exponent``). Where codes are parameters of their own, it is that of
decoding alone (``Nupes``): with codes that follow the exponent it would have the wrong sign.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import torch
from torch import Tensor, nn

from affect.compression.base import Data
from affect.compression.power import power_grid
from affect.compression.report import Report
from affect.compression.rounding import EXPONENTS, GradientRounding, Schedule, continuous_codes, power_decode
from affect.compression.stored import GridWeight, signed_levels
from affect.compression.uniform import compressed_layer, largest_weights

__all__ = ["Nupes", "exponent_gradient", "learn_exponent", "straight_through_weight"]


def straight_through_weight(weight: Tensor, exponent: Tensor, bits: int, per_channel: bool = True) -> Tensor:
    """Return a weight rounded to its grid of powers, with the gradient of the exponent through both directions.

    Args:
        weight: ``(O, …)``.
        exponent: ``()``.
        bits: Bits of a code.
        per_channel: Whether each output channel has its own largest value.
    """
    levels = signed_levels(bits)
    largest = largest_weights(weight, per_channel).view(-1, *[1] * (weight.ndim - 1))
    codes = continuous_codes(weight.detach(), exponent, largest, levels)
    return power_decode(codes + (codes.round() - codes).detach(), exponent, largest, levels)


def exponent_gradient(
    weight: Tensor, exponent: float, bits: int, per_channel: bool = True, frozen: bool = False
) -> float:
    """Return the gradient of ``‖W - Q⁻¹(Q(W))‖²`` for the exponent.

    Args:
        weight: ``(O, …)``.
        exponent: Where.
        bits: Bits of a code.
        per_channel: Whether each output channel has its own largest value.
        frozen: Leave out the way through the codes, as if they were parameters of their own; then it is not the
            derivative of this loss, whose codes follow the exponent.
    """
    a = torch.tensor(float(exponent), dtype=weight.dtype, requires_grad=True)
    if frozen:
        levels = signed_levels(bits)
        largest = largest_weights(weight, per_channel).view(-1, *[1] * (weight.ndim - 1))
        codes = continuous_codes(weight.detach(), a.detach(), largest, levels).round()
        decoded = power_decode(codes, a, largest, levels)
    else:
        decoded = straight_through_weight(weight, a, bits, per_channel)
    return float(torch.autograd.grad((decoded - weight.detach()).square().sum(), a)[0])


def learn_exponent(
    weight: Tensor, bits: int, per_channel: bool = True, start: float = 0.5, steps: int = 300, rate: float = 0.05
) -> float:
    """Return the exponent that gradients find for a weight's squared error, without data.

    Args:
        weight: ``(O, …)``.
        bits: Bits of a code.
        per_channel: Whether each output channel has its own largest value.
        start: First exponent, within ``EXPONENTS``.
        steps: Of Adam, its rate falling to 0 in a line.
        rate: Of the position of the exponent on a sigmoid.
    """
    low, high = EXPONENTS
    share = (torch.tensor(float(start), dtype=weight.dtype).clamp(low + 1e-3, high - 1e-3) - low) / (high - low)
    position = torch.logit(share).requires_grad_()
    optimizer = torch.optim.Adam([position], lr=rate)
    slower = torch.optim.lr_scheduler.LinearLR(optimizer, 1.0, 0.01, steps)
    power = weight.detach().square().mean().clamp_min(1e-30)
    for _ in range(steps):
        optimizer.zero_grad()
        decoded = straight_through_weight(weight, low + (high - low) * torch.sigmoid(position), bits, per_channel)
        ((decoded - weight.detach()).square().mean() / power).backward()
        optimizer.step()
        slower.step()
    return float(low + (high - low) * torch.sigmoid(position.detach()))


class Nupes(GradientRounding):
    """Learns codes over the whole grid, and the exponent of each layer.

    After PowerQuant it starts from its codes; otherwise it searches one exponent for the network as PowerQuant does.

    Args:
        bits: Bits of a weight, 2 to 8, of layers without codes.
        exponent: To start from; None searches it.
        learn_exponent: Whether each layer's exponent is learned. With ``exponent=0.5`` and without learning, integers
            suffice to run the network.
        learn_scale: Whether largest values are learned.
        data_free: Learn only exponents, of the weights' own error and without images; codes are the nearest.
        per_channel: Whether each output channel has its own range.
        unit: Whether ``layer`` by layer or ``block`` by block.
        inputs: ``float`` features, ``quantized`` ones, or a random ``mix`` of both.
        mix: Part of the elements that are quantized in a mix.
        steps: Of the optimizer, for each unit.
        batch_size: Images of a step.
        optimizer: ``adam``, ``adamw`` or ``sgd``.
        rate: Learning rate of codes, in code units.
        exponent_rate: Learning rate of the exponent's position.
        scale_rate: Of logarithms of largest values.
        strength: λ of the pull to whole codes.
        warm_start: Part of the steps without it.
        beta_start: Its sharpness β after the warm start.
        beta_end: And at the end.
        memory: GiB for a unit's inputs and outputs; fewer images are used where they are larger.
        layer_bits: Bits of single layers by name, for mixed precision.
        edge_bits: Bits of the first and last layer; None treats them like the others.
        protect: Names of layers, or their beginnings, that stay as they are.
    """

    name = "nupes"

    def __init__(
        self,
        bits: int = 4,
        exponent: float | None = None,
        learn_exponent: bool = True,
        learn_scale: bool = False,
        data_free: bool = False,
        per_channel: bool = True,
        unit: str = "layer",
        inputs: str = "quantized",
        mix: float = 0.5,
        steps: int = 2000,
        batch_size: int = 32,
        optimizer: str = "adam",
        rate: float = 1e-2,
        exponent_rate: float = 1e-3,
        scale_rate: float = 1e-4,
        strength: float = 1e-2,
        warm_start: float = 0.2,
        beta_start: float = 20.0,
        beta_end: float = 2.0,
        memory: float = 2.0,
        layer_bits: Mapping[str, int] | None = None,
        edge_bits: int | None = 8,
        protect: Sequence[str] = (),
    ) -> None:
        schedule = Schedule(
            int(steps), int(batch_size), optimizer, float(rate), float(exponent_rate), float(scale_rate),
            float(strength), float(warm_start), (float(beta_start), float(beta_end)),
        )  # fmt: skip
        super().__init__(
            bits, "power", exponent, per_channel, "codes", learn_exponent, learn_scale, "mse", unit, inputs, mix,
            schedule, memory, layer_bits, edge_bits, protect,
        )  # fmt: skip
        self.data_free = bool(data_free)
        if self.data_free:
            self.needs = ()

    def __call__(self, network: nn.Module, data: Data) -> Report:
        """Learn codes and exponents, or exponents alone."""
        report = self.without_data(network) if self.data_free else super().__call__(network, data)
        for record in report.layers:
            stored = compressed_layer(network, record.name).stored
            assert isinstance(stored, GridWeight)
            record.note = f"exponent {float(stored.exponent):.3f}; {record.note}"
        return report

    def without_data(self, network: nn.Module) -> Report:
        """Learn the exponent of each layer from its weight."""
        bits = self.put_grids(network)
        report = Report(self.name, {"bits": self.bits, "data_free": True, "edge_bits": self.edge_bits})
        for name, number in bits.items():
            layer = compressed_layer(network, name)
            first, floats = layer.stored, layer.floats
            assert isinstance(first, GridWeight)
            assert floats is not None
            per_channel = first.per_channel
            found = learn_exponent(floats, number, per_channel, float(first.exponent))
            learned = power_grid(floats, number, found, per_channel)
            better = (learned() - floats).norm() < (first() - floats).norm()
            layer.stored = learned if bool(better) else first
            report.layers.append(self.record(network, name, first, number, "learned without data"))
        return report
