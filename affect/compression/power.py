# SPDX-License-Identifier: Apache-2.0
"""PowerQuant: a non-uniform grid whose levels are powers, with one exponent for the whole network, found without data.

``Q(w) = round(n sign(w) (|w| / max|w|)^a)`` and back ``sign(q) (|q| / n)^(1/a) max|w|``: maps ``x -> x^a`` are the
continuous automorphisms of (R+, ×), and a = 1 is the uniform grid. The exponent minimises the summed error of the
weights. Yvinec, Dapogny, Cord and Bailly: PowerQuant: automorphism search for non-uniform quantization. ICLR 2023,
arXiv 2301.09858.

A sum of products is not the power of a sum, so codes are decoded before they are accumulated. At a = 1/2 the decoded
levels are the integers ``sign(q) q²``: the arithmetic is exact in integers (``integer_weight``, ``integer_inputs``),
and what follows the accumulator (scale, ReLU, power, rounding) is a step function of it (``thresholds``).
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
import torch
from scipy.optimize import minimize, minimize_scalar
from torch import Tensor, nn

from affect.compression.arguments import check_bits, check_choices, check_range
from affect.compression.base import Data, quantizable
from affect.compression.layers import InputGrid
from affect.compression.report import Report
from affect.compression.stored import GridWeight, signed_levels
from affect.compression.uniform import (
    bits_by_layer,
    compressed_layer,
    current_weight,
    input_ranges,
    largest_weights,
    put_inputs,
    put_weight,
    require_floats,
    watched_inputs,
)
from affect.errors import ConfigError, near

__all__ = [
    "SOLVERS",
    "PowerQuantization",
    "decode",
    "encode",
    "integer_inputs",
    "integer_weight",
    "power_grid",
    "put_measured_inputs",
    "reconstruction_error",
    "requantize",
    "search_exponent",
    "thresholds",
]

SOLVERS = ("nelder_mead", "bounded", "grid")
BOUNDS = (0.1, 1.2)
"""Exponents that are searched."""

GRID_STEP = 0.01
KEPT = 2**17
"""Places of a layer's sorted weights at which sums are kept. In larger layers a few weights next to a threshold count
to the neighbouring level, which changes the error by less than a thousandth."""


# ------------------------------------------------------------------------------------------------------ operator


def encode(values: Tensor, largest: Tensor, levels: int, exponent: float) -> Tensor:
    """Return ``round(n sign(x) (|x| / m)^a)`` in [-n, n], of the values' shape and type.

    Args:
        values: Any shape.
        largest: m, broadcast against the values.
        levels: n.
        exponent: a; 1 is the uniform grid, bit for bit.
    """
    ratio = values / largest
    if exponent != 1:
        ratio = ratio.sign() * ratio.abs().pow(exponent)
    return (ratio * levels).round().clamp(-levels, levels)


def decode(codes: Tensor, largest: Tensor, levels: int, exponent: float) -> Tensor:
    """Return ``sign(q) (|q| / n)^(1/a) m`` of codes q, given as floats."""
    ratio = codes / levels
    if exponent != 1:
        ratio = ratio.sign() * ratio.abs().pow(1 / exponent)
    return ratio * largest


def power_grid(weight: Tensor, bits: int, exponent: float, per_channel: bool = True) -> GridWeight:
    """Return a weight ``(O, …)`` on the grid of powers."""
    largest = largest_weights(weight, per_channel)
    codes = encode(weight.detach(), largest.view(-1, *[1] * (weight.ndim - 1)), signed_levels(bits), exponent)
    return GridWeight.of(codes.long(), largest, bits, exponent)


@torch.no_grad()
def reconstruction_error(weight: Tensor, bits: int, exponent: float, per_channel: bool = True, p: float = 2) -> float:
    """Return ``‖W - Q⁻¹(Q(W))‖_p`` in float64."""
    exact = weight.detach().double()
    largest = largest_weights(exact, per_channel).view(-1, *[1] * (weight.ndim - 1))
    levels = signed_levels(bits)
    decoded = decode(encode(exact, largest, levels, exponent), largest, levels, exponent)
    return float((exact - decoded).abs().pow(p).sum() ** (1 / p))


class _Sums:
    """Sums over a weight's sorted magnitudes, from which its error at any exponent follows in O(n log N).

    With r = |w| / m in the interval of level v, the squared error is ``Σ m² (r - v)²``: three running sums give it.
    """

    def __init__(self, weight: Tensor, bits: int, per_channel: bool) -> None:
        exact = weight.detach().double().flatten(1)
        largest = largest_weights(exact, per_channel)[:, None]
        ratio, order = (exact.abs() / largest).flatten().sort()
        mass = largest.square().expand_as(exact).flatten()[order]
        sums = torch.stack([mass, mass * ratio, mass * ratio * ratio]).cumsum(1)
        step = -(-len(ratio) // KEPT)
        kept = torch.arange(step - 1, len(ratio), step)
        kept = kept if len(kept) and int(kept[-1]) == len(ratio) - 1 else torch.cat([kept, kept.new_tensor([-1])])
        self.ratio = ratio[kept].contiguous()
        self.sums = torch.nn.functional.pad(sums[:, kept], (1, 0))
        self.levels = signed_levels(bits)

    def error(self, exponent: float) -> float:
        """Return ``‖W - Q⁻¹(Q(W))‖₂``."""
        codes = torch.arange(self.levels + 1, dtype=torch.float64)
        values = (codes / self.levels).pow(1 / exponent)
        cuts = ((codes[:-1] + 0.5) / self.levels).pow(1 / exponent)
        ends = torch.searchsorted(self.ratio, cuts.contiguous())
        ends = torch.cat([ends.new_zeros(1), ends, ends.new_full((1,), len(self.ratio))])
        mass, first, second = self.sums[:, ends].diff(dim=1)
        return float((second - 2 * values * first + values.square() * mass).sum().clamp_min(0).sqrt())


@torch.no_grad()
def search_exponent(
    weights: Sequence[Tensor],
    bits: int | Sequence[int],
    per_channel: bool = True,
    p: float = 2,
    solver: str = "nelder_mead",
    start: float = 0.5,
    bounds: tuple[float, float] = BOUNDS,
) -> float:
    """Return the exponent that minimises ``Σ_l ‖W_l - Q⁻¹(Q(W_l))‖_p``; 1 if none is better than the uniform grid.

    Args:
        weights: Of one or several layers, ``(O, …)`` each.
        bits: Bits of all, or of each.
        per_channel: Whether each output channel has its own largest value.
        p: Of the norm.
        solver: ``nelder_mead`` (the paper's), ``bounded`` (golden section with parabolas), or ``grid`` (steps of 0.01).
        start: First exponent of Nelder–Mead.
        bounds: Exponents that are searched.

    Raises:
        ConfigError: If there is no such solver.
    """
    if solver not in SOLVERS:
        raise ConfigError(f"solver={solver}: {near(solver, SOLVERS)}")
    each = [int(bits)] * len(weights) if isinstance(bits, int) else [int(b) for b in bits]
    if not weights:
        return 1.0
    sums = [_Sums(w, b, per_channel) for w, b in zip(weights, each, strict=True)] if p == 2 else []

    def objective(exponent: Any) -> float:  # noqa: ANN401
        a = float(np.clip(np.ravel(exponent)[0], *bounds))
        if sums:
            return sum(one.error(a) for one in sums)
        return sum(reconstruction_error(w, b, a, per_channel, p) for w, b in zip(weights, each, strict=True))

    if solver == "grid":
        tried = np.arange(bounds[0], bounds[1] + GRID_STEP / 2, GRID_STEP)
        found = float(tried[int(np.argmin([objective(a) for a in tried]))])
    elif solver == "bounded":
        found = float(minimize_scalar(objective, bounds=bounds, method="bounded", options={"xatol": 1e-3}).x)
    else:
        options = {"xatol": 1e-3, "fatol": 1e-9 * max(objective(1.0), 1e-300), "maxfev": 200}
        found = float(minimize(objective, [start], method="Nelder-Mead", bounds=[bounds], options=options).x[0])
    return found if objective(found) < objective(1.0) else 1.0


# ------------------------------------------------------------------------------------------------- integer path


def integer_weight(weight: GridWeight) -> tuple[Tensor, Tensor]:
    """Return integers and the scale of each output channel whose product is the decoded weight exactly, at a = 1/2.

    Returns:
        int64 ``sign(q) q²`` of the weight's shape, in ±49 at 4 bits; scales ``m / n²``, float64 ``(O,)`` or ``(1,)``.

    Raises:
        ConfigError: If the exponent is neither 1/2 nor 1 (then the integers are the codes themselves).
    """
    codes = weight.integers().long()
    power = _whole_power(float(weight.exponent))
    return codes.sign() * codes.abs() ** power, weight.largest.double() / weight.levels**power


def integer_inputs(grid: InputGrid, x: Tensor) -> tuple[Tensor, Tensor]:
    """Return integers and scale whose product is ``grid(x)``, for a grid without shift at a = 1/2 or 1.

    Returns:
        int64 of ``x``'s shape, 0 … 225 at 4 bits unsigned; the scale, float64 ``(channels,)``.

    Raises:
        ConfigError: If the grid is shifted, expanded, or has another exponent.
    """
    if float(grid.shift) != 0 or grid.orders != 1:
        raise ConfigError("integers of inputs need a grid that starts at 0 and has one order")
    power = _whole_power(float(grid.exponent)) if grid.power else 1
    reach = grid.scale.double() * grid.high
    view = [1] * x.ndim
    view[grid.axis] = -1
    codes = encode(x.double(), reach.view(view) if len(reach) > 1 else reach, grid.high, 1 / power)
    codes = codes.clamp(grid.low, grid.high).long()
    return codes.sign() * codes.abs() ** power, reach / grid.high**power


def _whole_power(exponent: float) -> int:
    if exponent not in (0.5, 1.0):
        raise ConfigError(f"codes decode to integers at exponent=0.5 and 1, not {exponent:.4g}: set exponent=0.5")
    return round(1 / exponent)


def thresholds(reach: Tensor, levels: int, exponent: float) -> Tensor:
    """Return the accumulators at which ReLU → power → rounding moves to the next code ``(O, m)``.

    Args:
        reach: Accumulator that maps to the largest code: the output range over the scale of each channel ``(O,)``.
        levels: m, the largest unsigned code.
        exponent: Of the outputs' grid.
    """
    codes = torch.arange(levels, dtype=torch.float64, device=reach.device) + 0.5
    return reach.double()[:, None] * (codes / levels).pow(1 / exponent)


def requantize(accumulators: Tensor, cuts: Tensor) -> Tensor:
    """Return unsigned codes of integer accumulators ``(B, O)`` with ``thresholds`` ``(O, m)``, int64 ``(B, O)``."""
    return torch.searchsorted(cuts, accumulators.double().T.contiguous()).T


# ------------------------------------------------------------------------------------------------------- inputs


@torch.no_grad()
def put_measured_inputs(
    network: nn.Module,
    names: Sequence[str],
    images: Sequence[Tensor],
    bits: Mapping[str, int],
    exponent: float | None = None,
    orders: int = 1,
) -> None:
    """Give the inputs of layers static grids with ranges measured on images.

    Inputs without negative values (after ReLU) get unsigned codes. Others get signed ones, or, after SiLU and GELU,
    whose outputs are bounded below, unsigned ones that start at the smallest input: whichever rounds these images'
    inputs with less squared error.

    Args:
        network: Still with the weights whose inputs are measured.
        names: Layers; those that no image reaches stay without a grid.
        images: Batches of normalised images.
        bits: Bits of a code, by layer.
        exponent: Of a grid of powers; None makes uniform grids.
        orders: Codes for an input.
    """
    ranges = input_ranges(network, names, images)
    signed = [name for name, (low, _) in ranges.items() if float(low) < 0]
    grids: dict[str, list[InputGrid]] = {}
    errors: dict[str, list[float]] = {}
    for name in signed:
        low, high = ranges[name]
        made = [
            put_inputs(network, name, low, high, bits[name], exponent=exponent, shifted=shifted, orders=orders)
            for shifted in (False, True)
        ]
        grids[name], errors[name] = made, [0.0, 0.0]
        compressed_layer(network, name).inputs = None

    def see(name: str, x: Tensor) -> None:
        for k, grid in enumerate(grids[name]):
            errors[name][k] += float((grid(x) - x).double().square().sum())

    with watched_inputs(network, signed, see):
        for batch in images if signed else ():
            network(batch)
    for name, (low, high) in ranges.items():
        if name in grids:
            compressed_layer(network, name).inputs = grids[name][int(errors[name][1] < errors[name][0])]
        else:
            put_inputs(network, name, low, high, bits[name], exponent=exponent, orders=orders)


# ---------------------------------------------------------------------------------------------------- transform


class PowerQuantization:
    """Weights, and inputs if asked for, on grids of powers.

    Args:
        bits: Bits of a weight, 2 to 8.
        input_bits: Bits of an input, its range measured on training images; None leaves inputs floats.
        exponent: Of all grids; None searches it. 0.5 can be run in integers.
        input_exponent: Of the inputs' grids; None takes that of the weights, as the paper.
        search: Whether one exponent is searched for the ``network`` (the paper) or for each ``layer``.
        solver: ``nelder_mead``, ``bounded`` or ``grid``.
        start: First exponent of Nelder–Mead.
        norm: p of the error that is minimised.
        per_channel: Whether each output channel has its own range.
        edge_bits: Bits of the first and last layer; None treats them like the others.
        protect: Names of layers, or their beginnings, that stay floats.
    """

    name, stage = "powerquant", "weights"

    def __init__(
        self,
        bits: int = 4,
        input_bits: int | None = None,
        exponent: float | None = None,
        input_exponent: float | None = None,
        search: str = "network",
        solver: str = "nelder_mead",
        start: float = 0.5,
        norm: float = 2,
        per_channel: bool = True,
        edge_bits: int | None = 8,
        protect: Sequence[str] = (),
    ) -> None:
        check_bits(self.name, bits=bits, input_bits=input_bits, edge_bits=edge_bits)
        check_choices(self.name, search=(search, ("network", "layer")), solver=(solver, SOLVERS))
        check_range(self.name, *BOUNDS, {"start": start})
        for key, number in (("exponent", exponent), ("input_exponent", input_exponent), ("norm", norm)):
            if number is not None and not float(number) > 0:
                raise ConfigError(f"compression.{self.name}.{key}={number}: a positive number")
        self.bits, self.input_bits, self.per_channel = int(bits), input_bits, bool(per_channel)
        self.exponent, self.input_exponent = exponent, input_exponent
        self.search, self.solver, self.start, self.norm = search, solver, float(start), float(norm)
        self.edge_bits, self.protect = edge_bits, tuple(protect)
        self.needs: tuple[str, ...] = () if input_bits is None else ("images",)

    def prepare(self, network: nn.Module, data: Data) -> None:
        """Nothing is needed of the untouched network."""

    def exponents(self, weights: Mapping[str, Tensor], bits: Mapping[str, int]) -> dict[str, float]:
        """Return the exponent of each layer."""
        if self.exponent is not None:
            return dict.fromkeys(weights, float(self.exponent))
        settings = {"per_channel": self.per_channel, "p": self.norm, "solver": self.solver, "start": self.start}
        if self.search == "layer":
            return {name: search_exponent([w], bits[name], **settings) for name, w in weights.items()}  # type: ignore[arg-type]
        found = search_exponent(list(weights.values()), [bits[name] for name in weights], **settings)  # type: ignore[arg-type]
        return dict.fromkeys(weights, found)

    def __call__(self, network: nn.Module, data: Data) -> Report:
        """Search the exponent and round every convolution and linear layer."""
        layers = quantizable(network, self.protect)
        require_floats(layers, self.name)
        bits = bits_by_layer(network, layers, self.bits, self.edge_bits)
        weights = {name: current_weight(layer) for name, layer in layers.items()}
        exponents = self.exponents(weights, bits)
        settings = {"bits": self.bits, "input_bits": self.input_bits, "edge_bits": self.edge_bits}
        report = Report(self.name, {**settings, "exponent": self.exponent, "search": self.search})
        input_bits: dict[str, int] = {}
        if self.input_bits is not None:
            input_bits = bits_by_layer(network, layers, self.input_bits, self.edge_bits)
            if self.input_exponent is not None or self.search == "network" or self.exponent is not None:
                shared = self.input_exponent if self.input_exponent is not None else next(iter(exponents.values()), 1.0)
                put_measured_inputs(network, list(layers), data.images, input_bits, float(shared))
            else:
                for name, exponent in exponents.items():
                    put_measured_inputs(network, [name], data.images, input_bits, exponent)
        for name, weight in weights.items():
            stored = power_grid(weight, bits[name], exponents[name], self.per_channel)
            record = put_weight(network, name, stored, self.name, bits[name], f"exponent {exponents[name]:.3f}")
            if getattr(network.get_submodule(name), "inputs", None) is not None and self.input_bits is not None:
                record.input_bits = input_bits[name]
            report.layers.append(record)
        if exponents and self.search == "network":
            report.totals["exponent"] = next(iter(exponents.values()))
        return report
