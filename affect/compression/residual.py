# SPDX-License-Identifier: Apache-2.0
"""REx: what a low-bit weight leaves over is quantized again, so that any accuracy is reached with one bit-width.

``R1 = Q(W)``, ``Rk = Q(W - Σ_{i<k} Q⁻¹(Ri))``, each with its own scale per output channel: the largest error shrinks by
2n = 2 (2^(b-1) - 1) with every order. Orders after the first may cover only the output channels with most left over
(group-sparse). Yvinec, Dapogny, Cord and Bailly: REx: data-free residual quantization error expansion. NeurIPS 2023,
arXiv 2203.14645.

``ensemble`` adds whole networks instead of orders within each layer, as PIPE (arXiv 2311.15806) as far as it is known.
It is refused unless it is better than its first network by a stated factor.
"""

from __future__ import annotations

import copy
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from affect.compression.arguments import check_bits, check_choices, check_counts, check_range
from affect.compression.base import Data, quantizable, relative_error
from affect.compression.layers import CompressedConv2d, CompressedLinear
from affect.compression.power import put_measured_inputs
from affect.compression.report import Report, signal_to_noise
from affect.compression.stored import ResidualWeight, StoredWeight, signed_levels
from affect.compression.uniform import (
    bits_by_layer,
    compressed_layer,
    edge_layers,
    largest_weights,
    put_weight,
    round_to_grid,
)
from affect.errors import ConfigError

__all__ = [
    "Ensemble",
    "Order",
    "ResidualExpansion",
    "Stacked",
    "ensemble",
    "expand",
    "expand_stored",
    "kept_rows",
    "layer_shares",
    "stacked",
]

BUDGETS = ("equal", "linear")


# ------------------------------------------------------------------------------------------------------ expansion


@dataclass
class Order:
    """One term of an expansion.

    Attributes:
        codes: In [-n, n] ``(K, …)``, in the weight's type.
        scale: Step of each row ``(K,)``.
        rows: Output channels that it covers ``(K,)``; None where all.
    """

    codes: Tensor
    scale: Tensor
    rows: Tensor | None = None

    def decoded(self, shape: Sequence[int]) -> Tensor:
        """Return the term as a weight of the given shape, 0 in rows that it does not cover."""
        values = self.codes * self.scale.view(-1, *[1] * (self.codes.ndim - 1))
        return values if self.rows is None else values.new_zeros(tuple(shape)).index_copy(0, self.rows, values)


def kept_rows(left: Tensor, share: float) -> Tensor | None:
    """Return the rows of ``left`` ``(O, …)`` with the largest norms, in order; None for all, an empty tensor for none.

    Args:
        left: What earlier orders left over.
        share: Of the rows to keep, 0 to 1.
    """
    count = round(min(max(share, 0.0), 1.0) * len(left))
    if count == len(left):
        return None
    return left.flatten(1).norm(dim=1).topk(count).indices.sort().values


def expand(weight: Tensor, bits: int, orders: int, share: float = 1.0) -> list[Order]:
    """Return the terms of a weight's expansion, in the weight's own precision.

    Args:
        weight: ``(O, …)``.
        bits: Of every code.
        orders: Terms, 1 or more.
        share: Of the output channels that orders after the first cover.
    """
    left, found = weight.detach(), []
    for k in range(orders):
        rows = None if k == 0 else kept_rows(left, share)
        if rows is not None and len(rows) == 0:
            break
        part = left if rows is None else left[rows]
        scale = largest_weights(part) / signed_levels(bits)
        codes = (part / scale.view(-1, *[1] * (part.ndim - 1))).round()
        found.append(Order(codes, scale, rows))
        left = left - found[-1].decoded(weight.shape)
    return found


def expand_stored(
    weight: Tensor, first: StoredWeight, bits: int, orders: int, share: float = 1.0
) -> tuple[StoredWeight, float]:
    """Return a stored weight plus uniform orders of what it leaves over.

    Args:
        weight: The floats ``(O, …)``.
        first: Any stored weight of them; it is the first order.
        bits: Of the codes of further orders.
        orders: Terms in all.
        share: Of the output channels that further orders cover.

    Returns:
        The sum, or ``first`` itself where nothing is added; and bits per weight of all codes together, by row.
    """
    terms: list[StoredWeight] = [first]
    rows: list[Tensor | None] = [None]
    total = weight.detach().float()
    left = total - first().float()
    covered = 0.0
    for _ in range(orders - 1):
        kept = kept_rows(left, share)
        if (kept is not None and len(kept) == 0) or not left.any():  # nothing to cover, or nothing left over
            break
        term = round_to_grid(left if kept is None else left[kept], bits)
        left = left - term() if kept is None else left.index_add(0, kept, -term())
        terms.append(term)
        rows.append(kept)
        covered += bits * (1.0 if kept is None else len(kept) / len(weight))
    own = float(getattr(first, "bits", 0))
    return (first if len(terms) == 1 else ResidualWeight.of(terms, rows)), own + covered


def layer_shares(count: int, share: float, budget: str) -> list[float]:
    """Return the share of channels of each of ``count`` layers, first to last.

    Args:
        count: Layers.
        share: Their mean.
        budget: ``equal``, or ``linear``: rising towards the head from 0 (or from what keeps every share below 1).
    """
    if budget == "equal" or count < 2:
        return [share] * count
    reach = min(share, 1 - share)
    return [share + reach * (2 * k / (count - 1) - 1) for k in range(count)]


# -------------------------------------------------------------------------------------------------- one product


@dataclass
class Stacked:
    """All orders of a weight as one integer matrix, so that one product computes every term.

    Attributes:
        codes: Rows of all orders ``(ΣK, …)``, floats that hold integers.
        scale: Step of each row ``(ΣK,)``.
        rows: Output channel of each row ``(ΣK,)``.
        channels: Output channels.
    """

    codes: Tensor
    scale: Tensor
    rows: Tensor
    channels: int

    def linear(self, x: Tensor) -> Tensor:
        """Return ``x W'`` of ``(B, I)``: one product, then scale and add."""
        return self.gathered(F.linear(x, self.codes.flatten(1)), 1)

    def convolution(self, x: Tensor, stride: int = 1, padding: int = 0) -> Tensor:
        """Return the convolution of ``(B, I, H, W)``: one convolution, then scale and add."""
        return self.gathered(F.conv2d(x, self.codes, None, stride, padding), 1)

    def gathered(self, products: Tensor, axis: int) -> Tensor:
        """Scale the products of all rows and add those of one channel."""
        view = [1] * products.ndim
        view[axis] = -1
        shape = list(products.shape)
        shape[axis] = self.channels
        return products.new_zeros(shape).index_add(axis, self.rows, products * self.scale.view(view))


def stacked(orders: Sequence[Order]) -> Stacked:
    """Return the orders of a weight one above the other."""
    channels = len(orders[0].codes)
    device = orders[0].codes.device
    rows = [torch.arange(channels, device=device) if one.rows is None else one.rows for one in orders]
    return Stacked(
        torch.cat([o.codes for o in orders]), torch.cat([o.scale for o in orders]), torch.cat(rows), channels
    )


# ------------------------------------------------------------------------------------------------------ ensemble


class Ensemble(nn.Module):
    """A sum of networks that run independently of each other.

    Args:
        networks: The first holds the biases.
    """

    def __init__(self, networks: Sequence[nn.Module]) -> None:
        super().__init__()
        self.networks = nn.ModuleList(networks)

    def forward(self, x: Tensor) -> Tensor:
        """Return the sum of all outputs."""
        total: Tensor = self.networks[0](x)
        for network in self.networks[1:]:
            total = total + network(x)
        return total


@torch.no_grad()
def ensemble(
    network: nn.Module, expanded: nn.Module, first: int, images: Sequence[Tensor], factor: float = 0.5
) -> Ensemble:
    """Split an expanded network in two whose outputs add up, if that is better than the first alone.

    The first network has the orders up to ``first`` and the biases; the second has the others and no bias. Where each
    layer's first orders are left out, the second network's output is a product of what all layers left over, so little
    is to be expected: hence the rule.

    Args:
        network: With float weights.
        expanded: The same after ``ResidualExpansion``.
        first: Orders of the first network.
        images: Batches on which both are judged.
        factor: The ensemble's error must be below this part of the first network's.

    Raises:
        ConfigError: If it is not, or nothing is expanded beyond ``first`` orders.
    """
    one, two = copy.deepcopy(expanded).eval(), copy.deepcopy(expanded).eval()
    split = 0
    for name, layer in expanded.named_modules():
        if not isinstance(layer, CompressedConv2d | CompressedLinear):
            continue
        second = two.get_submodule(name)
        assert isinstance(second, CompressedConv2d | CompressedLinear)
        second.bias = None
        if isinstance(layer.stored, ResidualWeight) and len(layer.stored.orders) > first:
            kept = one.get_submodule(name)
            assert isinstance(kept, CompressedConv2d | CompressedLinear)
            kept.stored, second.stored = _part(layer.stored, 0, first), _part(layer.stored, first, None)
            split += 1
    if not split:
        raise ConfigError(f"ensemble: no layer has more than {first} orders; expand it further")
    made = Ensemble([one, two]).eval()
    expected = torch.cat([network(batch) for batch in images])
    alone = relative_error(expected, torch.cat([one(batch) for batch in images]))
    together = relative_error(expected, torch.cat([made(batch) for batch in images]))
    if not together < factor * alone:
        raise ConfigError(
            f"ensemble: refused: its error {together:.3g} is not below {factor} of the {alone:.3g} of its first network"
            " alone; use the expansion itself"
        )
    return made


def _part(weight: ResidualWeight, start: int, stop: int | None) -> StoredWeight:
    """Return some orders of a weight, as a sum over all of its rows."""
    chosen = list(range(len(weight.orders)))[start:stop]
    rows = [getattr(weight, f"rows_{k}", None) for k in chosen]
    made = ResidualWeight.__new__(ResidualWeight)
    StoredWeight.__init__(made)
    made.shape = weight.shape
    made.orders = nn.ModuleList([copy.deepcopy(weight.orders[k]) for k in chosen])
    for k, kept in enumerate(rows):
        if kept is not None:
            made.register_buffer(f"rows_{k}", kept.clone())
    return made


# ---------------------------------------------------------------------------------------------------- transform


class ResidualExpansion:
    """Adds orders to weights, on top of whatever quantized them, and to inputs.

    Layers that are floats are first rounded to a uniform grid. What another method (PowerQuant, TQuant, AdaRound, …)
    stored is the first order, and what it left over is expanded uniformly.

    Args:
        bits: Bits of every code, 2 to 8; 2 is ternary.
        orders: Terms of a weight in all.
        share: Of the output channels that orders after the first cover: those with most left over.
        budget: ``equal`` shares in all layers, or ``linear``: more towards the head, the mean as given.
        input_bits: Bits of an input, its range measured on training images; None leaves inputs as they are.
        input_orders: Codes for an input.
        edge_bits: Bits of the first and last layer where they are floats, which are not expanded; None treats them like
            the others.
        protect: Names of layers, or their beginnings, that stay as they are.
    """

    name, stage = "rex", "residuals"

    def __init__(
        self,
        bits: int = 4,
        orders: int = 2,
        share: float = 1.0,
        budget: str = "equal",
        input_bits: int | None = None,
        input_orders: int = 1,
        edge_bits: int | None = 8,
        protect: Sequence[str] = (),
    ) -> None:
        check_bits(self.name, bits=bits, input_bits=input_bits, edge_bits=edge_bits)
        check_counts(self.name, orders=orders, input_orders=input_orders)
        check_range(self.name, 0, 1, {"share": share})
        check_choices(self.name, budget=(budget, BUDGETS))
        if input_bits is None and int(input_orders) > 1:
            raise ConfigError(f"compression.{self.name}.input_orders={input_orders}: needs input_bits")
        self.bits, self.orders, self.share, self.budget = int(bits), int(orders), float(share), budget
        self.input_bits, self.input_orders = input_bits, int(input_orders)
        self.edge_bits, self.protect = edge_bits, tuple(protect)
        self.needs: tuple[str, ...] = () if input_bits is None else ("images",)

    def prepare(self, network: nn.Module, data: Data) -> None:
        """Nothing is needed of the untouched network."""

    def __call__(self, network: nn.Module, data: Data) -> Report:
        """Expand every convolution and linear layer but the edges."""
        layers = quantizable(network, self.protect)
        edges = edge_layers(network, layers) if self.edge_bits is not None else set()
        settings = {key: getattr(self, key) for key in ("bits", "orders", "share", "budget", "input_orders")}
        report = Report(self.name, {**settings, "input_bits": self.input_bits, "edge_bits": self.edge_bits})
        inner = [name for name in layers if name not in edges]
        shares = dict(zip(inner, layer_shares(len(inner), self.share, self.budget), strict=True))
        input_bits: Mapping[str, int] = {}
        if self.input_bits is not None:
            input_bits = bits_by_layer(network, layers, self.input_bits, self.edge_bits)
            put_measured_inputs(network, inner, data.images, input_bits, orders=self.input_orders)
            put_measured_inputs(network, [n for n in layers if n in edges], data.images, input_bits)
        for name in layers:
            layer = compressed_layer(network, name)
            first, floats = layer.stored, layer.floats
            if first is None:
                floats = layer.weight.detach()
                first = round_to_grid(floats, int(self.edge_bits or self.bits) if name in edges else self.bits)
            elif floats is None and name not in edges:
                raise ConfigError(
                    f"compression.{self.name}: the weights of {name} are codes and what they were before is not known;"
                    f" expand in the same run that quantizes, or protect=[{name}]"
                )
            stored, note = first, ""
            if name in shares:
                assert floats is not None
                stored, bits = expand_stored(floats.to(first().device), first, self.bits, self.orders, shares[name])
                note = f"{bits:.1f} bits a weight in all orders"
            record = put_weight(network, name, stored, self.name, int(getattr(first, "bits", self.bits)), note)
            if floats is not None:  # against the floats, not against the codes of the method before
                record.signal_to_noise = signal_to_noise(floats, stored())
            if name in input_bits and layer.inputs is not None:
                record.input_bits = input_bits[name]
            report.layers.append(record)
        return report
