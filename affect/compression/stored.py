# SPDX-License-Identifier: Apache-2.0
"""Weights that are stored as codes: the tensor that a layer multiplies by is decoded from integers.

Each kind is a module without parameters that returns its weight when called, so a compressed layer needs to know no
kind, and a file holds codes and scales alone. ``settings()`` are the arguments that build an empty one of the same
shape, into which a state dict is loaded.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import Tensor, nn

from affect.compression.packing import pack, packed_bytes, unpack

__all__ = [
    "CodebookWeight",
    "GridWeight",
    "ResidualWeight",
    "SplitWeight",
    "StoredWeight",
    "build_weight",
    "signed_levels",
]


def signed_levels(bits: int) -> int:
    """Return n, the largest code of a symmetric signed grid of ``bits`` bits, -n … n; ternary has 2 bits and n = 1."""
    return 2 ** (bits - 1) - 1


class StoredWeight(nn.Module):
    """Base of stored weights.

    Attributes:
        shape: Shape of the decoded weight.
    """

    shape: tuple[int, ...]

    def forward(self) -> Tensor:
        """Return the decoded weight in float32."""
        raise NotImplementedError

    def settings(self) -> dict[str, Any]:
        """Return plain arguments that build an empty module of this kind and shape."""
        raise NotImplementedError

    @property
    def stored_bytes(self) -> int:
        """Bytes in a file: all buffers."""
        return sum(buffer.numel() * buffer.element_size() for buffer in self.buffers())


class GridWeight(StoredWeight):
    """Codes on one grid of signed powers, ``sign(q) (|q| / n)^(1/a) m``; a = 1 is the uniform grid.

    Args:
        shape: Shape of the weight; its first dimension are output channels.
        bits: Bits of a code, 2 to 8.
        per_channel: Whether each output channel has its own largest value m, or the tensor one.
        levels: Largest code n; None takes that of ``bits``.
    """

    def __init__(self, shape: Sequence[int], bits: int, per_channel: bool = True, levels: int | None = None) -> None:
        super().__init__()
        self.shape, self.bits, self.per_channel = tuple(int(x) for x in shape), int(bits), bool(per_channel)
        self.levels = signed_levels(bits) if levels is None else int(levels)
        if not (2 <= self.bits <= 8 and 1 <= self.levels <= 2 ** (self.bits - 1)):
            raise ValueError(f"a signed grid has 2 to 8 bits and at most half as many levels, not {bits} and {levels}")
        self.register_buffer("codes", torch.zeros(packed_bytes(math.prod(self.shape), self.bits), dtype=torch.uint8))
        self.register_buffer("largest", torch.ones(self.shape[0] if per_channel else 1))
        self.register_buffer("exponent", torch.ones(()))

    @classmethod
    def of(cls, codes: Tensor, largest: Tensor, bits: int, exponent: float = 1.0) -> GridWeight:
        """Return codes in [-n, n] ``(O, …)`` with the largest value ``(O,)`` or ``(1,)`` of the grid."""
        made = cls(codes.shape, bits, largest.numel() > 1 or codes.shape[0] == 1)
        made.codes = pack(codes.to(torch.int64) + made.levels, bits)
        made.largest = largest.detach().flatten().float().clone()
        made.exponent = torch.tensor(float(exponent))
        return made

    def integers(self) -> Tensor:
        """Return the codes, int16 of the weight's shape, in [-n, n]."""
        return (unpack(self.codes, self.bits, math.prod(self.shape)) - self.levels).view(self.shape)

    def forward(self) -> Tensor:
        """Return the decoded weight."""
        codes = self.integers().float() / self.levels
        if float(self.exponent) != 1:
            codes = codes.sign() * codes.abs().pow(1 / self.exponent)
        return codes * self.largest.view(-1, *[1] * (len(self.shape) - 1))

    def settings(self) -> dict[str, Any]:
        """Return the arguments of the constructor."""
        return {"shape": list(self.shape), "bits": self.bits, "per_channel": self.per_channel, "levels": self.levels}


class CodebookWeight(StoredWeight):
    """Codes that name entries of a codebook; contiguous blocks of rows share one, or a scale, or both.

    Args:
        shape: Shape of the weight; its first dimension are rows.
        bits: Bits of a code, 1 to 16; a codebook has at most ``2^bits`` entries.
        groups: Number of codebooks: one for all rows, or one for each block.
        permuted: Whether rows are stored in another order than they are used in.
        blocks: Rows of each block, in stored order; None splits them evenly into as many as there are codebooks, the
            first ones one row longer where needed.
        scales: Numbers that multiply the entries: ``none``, one for each ``block``, or for each ``row`` as stored.
        entries: Entries of a codebook; None takes ``2^bits``.
        half: Whether entries and scales are float16, or float32.
    """

    def __init__(
        self,
        shape: Sequence[int],
        bits: int,
        groups: int = 1,
        permuted: bool = False,
        blocks: Sequence[int] | None = None,
        scales: str = "none",
        entries: int | None = None,
        half: bool = True,
    ) -> None:
        super().__init__()
        self.shape, self.bits, self.groups = tuple(int(x) for x in shape), int(bits), int(groups)
        self.permuted, self.scales, self.half = bool(permuted), str(scales), bool(half)
        if not (1 <= self.bits <= 16 and 1 <= self.groups <= self.shape[0]):
            raise ValueError(f"{groups} codebooks of {bits} bits do not fit a weight of {self.shape[0]} rows")
        self.entries = 2**self.bits if entries is None else int(entries)
        even = [len(part) for part in torch.arange(self.shape[0]).tensor_split(self.groups)]
        self.blocks = even if blocks is None else [int(rows) for rows in blocks]
        if min(self.blocks) < 1 or sum(self.blocks) != self.shape[0] or self.groups not in (1, len(self.blocks)):
            raise ValueError(f"blocks of {self.blocks} do not fit {self.groups} codebooks and {self.shape[0]} rows")
        fits = 1 <= self.entries <= 2**self.bits and self.groups * self.entries <= 2**24
        if not fits or scales not in ("none", "block", "row"):
            raise ValueError(f"a codebook of {entries} entries and scales={scales} do not fit codes of {bits} bits")
        number = torch.float16 if half else torch.float32
        self.register_buffer("codes", torch.zeros(packed_bytes(math.prod(self.shape), self.bits), dtype=torch.uint8))
        self.register_buffer("codebook", torch.zeros(self.groups, self.entries, dtype=number))
        if self.scales != "none":
            count = len(self.blocks) if self.scales == "block" else self.shape[0]
            self.register_buffer("scale", torch.ones(count, dtype=number))
        if self.permuted:
            size = packed_bytes(self.shape[0], self.row_bits)
            self.register_buffer("rows", torch.zeros(size, dtype=torch.uint8))
            self.rows = pack(torch.arange(self.shape[0]), self.row_bits)

    @property
    def row_bits(self) -> int:
        """Bits of a row's number."""
        return max(1, (self.shape[0] - 1).bit_length())

    @classmethod
    def of(
        cls,
        codes: Tensor,
        codebook: Tensor,
        rows: Tensor | None = None,
        blocks: Sequence[int] | None = None,
        scale: Tensor | None = None,
        scales: str = "row",
        half: bool = True,
    ) -> CodebookWeight:
        """Return codes ``(O, …)`` into a codebook ``(G, k)``.

        Args:
            codes: Entries' numbers, in stored order of rows.
            codebook: Values.
            rows: Position of each stored row in the weight ``(O,)``; None keeps the order.
            blocks: Rows of each block; None splits them evenly.
            scale: Numbers that multiply the entries; None for none.
            scales: What each is of: a ``block`` ``(B,)`` or a ``row`` as stored ``(O,)``.
            half: Whether values and scales are kept in float16.
        """
        bits = max(1, (codebook.shape[1] - 1).bit_length())
        kind = "none" if scale is None else scales
        made = cls(codes.shape, bits, len(codebook), rows is not None, blocks, kind, codebook.shape[1], half)
        made = made.to(codes.device)
        made.codes = pack(codes, bits)
        made.codebook = codebook.detach().to(made.codebook.dtype)
        if scale is not None:
            made.scale = scale.detach().to(made.scale.dtype)
        if rows is not None:
            made.rows = pack(rows, made.row_bits)
        return made

    def row_blocks(self) -> Tensor:
        """Return the block of each stored row ``(O,)``."""
        blocks = torch.tensor(self.blocks, device=self.codebook.device)
        return torch.repeat_interleave(torch.arange(len(blocks), device=blocks.device), blocks)

    def row_groups(self) -> Tensor:
        """Return the codebook of each stored row ``(O,)``."""
        blocks = self.row_blocks()
        return blocks if self.groups > 1 else torch.zeros_like(blocks)

    def order(self) -> Tensor:
        """Return the place in use of each stored row ``(O,)``, int64."""
        if not self.permuted:
            return torch.arange(self.shape[0], device=self.codebook.device)
        return unpack(self.rows, self.row_bits, self.shape[0]).long()

    def indices(self) -> Tensor:
        """Return the entries' numbers ``(O, N)``, int64, in stored order of rows."""
        return unpack(self.codes, self.bits, math.prod(self.shape)).view(self.shape[0], -1).long()

    def forward(self) -> Tensor:
        """Return the decoded weight, rows in the order of use."""
        decoded = self.codebook.float()[self.row_groups()[:, None], self.indices()]
        if self.scales != "none":
            scale = self.scale.float()
            decoded = decoded * (scale if self.scales == "row" else scale[self.row_blocks()])[:, None]
        if self.permuted:
            decoded = torch.empty_like(decoded).index_copy(0, self.order(), decoded)
        return decoded.view(self.shape)

    def settings(self) -> dict[str, Any]:
        """Return the arguments of the constructor."""
        return {
            "shape": list(self.shape),
            "bits": self.bits,
            "groups": self.groups,
            "permuted": self.permuted,
            "blocks": self.blocks,
            "scales": self.scales,
            "entries": self.entries,
            "half": self.half,
        }


class SplitWeight(StoredWeight):
    """Distinct kernels of each input channel, and which of them each output channel takes (RED++).

    Args:
        shape: Shape of the weight ``(O, I, …)``; what follows is a kernel.
        kernels: Distinct kernels of all input channels together.
        bits: Bits of the number of a kernel among those of its input channel, 1 to 16.
        groups: Of the convolution; there are ``I * groups`` input channels.
        values: Distinct values of all kernels, which are codes then; None stores kernels as floats.
    """

    def __init__(
        self, shape: Sequence[int], kernels: int, bits: int, groups: int = 1, values: int | None = None
    ) -> None:
        super().__init__()
        self.shape, self.kernels, self.bits = tuple(int(x) for x in shape), int(kernels), int(bits)
        self.groups, self.values = int(groups), None if values is None else int(values)
        channels = self.shape[1] * self.groups
        if len(self.shape) < 2 or self.shape[0] % self.groups or not 1 <= self.bits <= 16:
            raise ValueError(f"kernels of a weight {list(shape)} do not fit {groups} groups and numbers of {bits} bits")
        if not channels <= self.kernels <= self.shape[0] * self.shape[1]:
            raise ValueError(f"{kernels} distinct kernels do not fit a weight of {list(shape)}")
        if self.values is not None and not 1 <= self.values <= 2**16:
            raise ValueError(f"{values} distinct values: at most {2**16}")
        size = math.prod(self.shape[2:])
        self.register_buffer("counts", torch.zeros(channels, dtype=torch.int32))
        self.register_buffer(
            "positions", torch.zeros(packed_bytes(self.shape[0] * self.shape[1], self.bits), dtype=torch.uint8)
        )
        if self.values is None:
            self.register_buffer("table", torch.zeros(self.kernels, size))
        else:
            self.register_buffer("table", torch.zeros(self.values))
            packed = packed_bytes(self.kernels * size, self.value_bits)
            self.register_buffer("codes", torch.zeros(packed, dtype=torch.uint8))

    @property
    def value_bits(self) -> int:
        """Bits of the code of a value."""
        return max(1, ((self.values or 1) - 1).bit_length())

    @classmethod
    def of(
        cls,
        shape: Sequence[int],
        counts: Tensor,
        positions: Tensor,
        kernels: Tensor,
        groups: int = 1,
        values: Tensor | None = None,
    ) -> SplitWeight:
        """Return a split weight.

        Args:
            shape: Shape of the weight ``(O, I, …)``.
            counts: Distinct kernels of each input channel ``(I * groups,)``.
            positions: Number of the kernel, among those of its input channel ``(O, I)``.
            kernels: All kernels in order of input channels ``(U, K)``: floats, or codes if there are values.
            groups: Of the convolution.
            values: Distinct values ``(V,)`` that codes name; None if kernels are floats.
        """
        bits = max(1, (int(counts.max()) - 1).bit_length())
        made = cls(shape, len(kernels), bits, groups, None if values is None else len(values)).to(positions.device)
        made.counts = counts.to(torch.int32)
        made.positions = pack(positions, bits)
        if values is None:
            made.table = kernels.detach().float()
        else:
            made.table, made.codes = values.detach().float(), pack(kernels, made.value_bits)
        return made

    def distinct(self) -> Tensor:
        """Return all kernels in order of input channels ``(U, K)``."""
        if self.values is None:
            return self.table
        size = math.prod(self.shape[2:])
        codes = unpack(self.codes, self.value_bits, self.kernels * size).long()
        return self.table[codes].view(self.kernels, size)

    def numbers(self) -> Tensor:
        """Return the number among all kernels of that between each output and input channel ``(O, I)``, int64."""
        outputs, inputs = self.shape[:2]
        own = unpack(self.positions, self.bits, outputs * inputs).long().view(outputs, inputs)
        starts = (self.counts.long().cumsum(0) - self.counts).view(self.groups, inputs)
        return own + starts.repeat_interleave(outputs // self.groups, 0)

    def forward(self) -> Tensor:
        """Return the decoded weight."""
        return self.distinct()[self.numbers()].view(self.shape)

    def settings(self) -> dict[str, Any]:
        """Return the arguments of the constructor."""
        return {
            "shape": list(self.shape),
            "kernels": self.kernels,
            "bits": self.bits,
            "groups": self.groups,
            "values": self.values,
        }


class ResidualWeight(StoredWeight):
    """A sum of stored weights: the first, and what it left over, in turn (REx).

    Args:
        orders: Nodes of ``build_weight``; an order may cover some rows only, its node then has ``kept``, their number.
        shape: Shape of the weight.
    """

    def __init__(self, shape: Sequence[int], orders: Sequence[Mapping[str, Any]]) -> None:
        super().__init__()
        self.shape = tuple(int(x) for x in shape)
        self.orders = nn.ModuleList()
        for k, node in enumerate(orders):
            plain = dict(node)
            kept = plain.pop("kept", None)
            self.orders.append(build_weight(plain))
            if kept is not None:
                self.register_buffer(f"rows_{k}", torch.zeros(int(kept), dtype=torch.int32))

    @classmethod
    def of(cls, orders: Sequence[StoredWeight], rows: Sequence[Tensor | None]) -> ResidualWeight:
        """Return the sum of stored weights; ``rows`` names for each the rows that it covers, None for all."""
        nodes = [
            weight_node(order) | ({} if kept is None else {"kept": len(kept)})
            for order, kept in zip(orders, rows, strict=True)
        ]
        made = cls(orders[0].shape, nodes)
        made.orders = nn.ModuleList(orders)
        for k, kept in enumerate(rows):
            if kept is not None:
                setattr(made, f"rows_{k}", kept.to(torch.int32))
        return made

    def forward(self) -> Tensor:
        """Return the sum."""
        total = torch.zeros(self.shape, device=next(self.buffers()).device)
        for k, order in enumerate(self.orders):
            rows = getattr(self, f"rows_{k}", None)
            total = total + order() if rows is None else total.index_add(0, rows.long(), order())
        return total

    def settings(self) -> dict[str, Any]:
        """Return the arguments of the constructor."""
        nodes = []
        for k, order in enumerate(self.orders):
            rows = getattr(self, f"rows_{k}", None)
            nodes.append(weight_node(order) | ({} if rows is None else {"kept": len(rows)}))  # type: ignore[arg-type]
        return {"shape": list(self.shape), "orders": nodes}


KINDS: dict[str, type[StoredWeight]] = {
    "grid": GridWeight,
    "codebook": CodebookWeight,
    "split": SplitWeight,
    "residual": ResidualWeight,
}
"""Kinds of stored weights by the name that a file has for them."""


def weight_node(weight: nn.Module) -> dict[str, Any]:
    """Return plain data that ``build_weight`` turns into an empty module of the same kind and shape."""
    assert isinstance(weight, StoredWeight)
    name = next(name for name, kind in KINDS.items() if type(weight) is kind)
    return {"kind": name, **weight.settings()}


def build_weight(node: Mapping[str, Any]) -> StoredWeight:
    """Return an empty stored weight.

    Raises:
        ValueError: If the kind is unknown or arguments do not fit it.
    """
    plain = dict(node)
    kind = plain.pop("kind", None)
    if kind not in KINDS:
        raise ValueError(f"no kind of stored weight {kind!r}; there are {', '.join(KINDS)}")
    try:
        return KINDS[kind](**plain)
    except TypeError as error:
        raise ValueError(f"stored weight {kind}: {error}") from error
