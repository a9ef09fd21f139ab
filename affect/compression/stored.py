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

__all__ = ["CodebookWeight", "GridWeight", "ResidualWeight", "StoredWeight", "build_weight", "signed_levels"]


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
    """Codes that name entries of a codebook; contiguous blocks of rows share one.

    Args:
        shape: Shape of the weight; its first dimension are rows.
        bits: Bits of a code, 1 to 8; a codebook has ``2^bits`` entries.
        groups: Number of codebooks; rows are split evenly, in order, the first blocks one row longer where needed.
        permuted: Whether rows are stored in another order than they are used in.
    """

    def __init__(self, shape: Sequence[int], bits: int, groups: int = 1, permuted: bool = False) -> None:
        super().__init__()
        self.shape, self.bits, self.groups = tuple(int(x) for x in shape), int(bits), int(groups)
        self.permuted = bool(permuted)
        if not (1 <= self.bits <= 8 and 1 <= self.groups <= self.shape[0]):
            raise ValueError(f"{groups} codebooks of {bits} bits do not fit a weight of {self.shape[0]} rows")
        self.register_buffer("codes", torch.zeros(packed_bytes(math.prod(self.shape), self.bits), dtype=torch.uint8))
        self.register_buffer("codebook", torch.zeros(self.groups, 2**self.bits, dtype=torch.float16))
        if self.permuted:
            self.register_buffer("rows", torch.arange(self.shape[0], dtype=torch.int32))

    @classmethod
    def of(cls, codes: Tensor, codebook: Tensor, rows: Tensor | None = None) -> CodebookWeight:
        """Return codes ``(O, …)`` into a codebook ``(G, k)``.

        Args:
            codes: Entries' numbers, in stored order of rows.
            codebook: Values; kept in float16. Fewer than a power of two are filled up with zeros.
            rows: Position of each stored row in the weight ``(O,)``; None keeps the order.
        """
        bits = max(1, (codebook.shape[1] - 1).bit_length())
        made = cls(codes.shape, bits, len(codebook), rows is not None)
        made.codes = pack(codes, bits)
        made.codebook[:, : codebook.shape[1]] = codebook.detach().to(torch.float16)
        if rows is not None:
            made.rows = rows.to(torch.int32)
        return made

    def row_groups(self) -> Tensor:
        """Return the codebook of each stored row ``(O,)``."""
        sizes = [len(part) for part in torch.arange(self.shape[0]).tensor_split(self.groups)]
        return torch.repeat_interleave(torch.arange(self.groups), torch.tensor(sizes)).to(self.codebook.device)

    def forward(self) -> Tensor:
        """Return the decoded weight, rows in the order of use."""
        codes = unpack(self.codes, self.bits, math.prod(self.shape)).view(self.shape[0], -1).long()
        decoded = self.codebook.float()[self.row_groups()[:, None], codes]
        if self.permuted:
            decoded = torch.empty_like(decoded).index_copy(0, self.rows.long(), decoded)
        return decoded.view(self.shape)

    def settings(self) -> dict[str, Any]:
        """Return the arguments of the constructor."""
        return {"shape": list(self.shape), "bits": self.bits, "groups": self.groups, "permuted": self.permuted}


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


KINDS: dict[str, type[StoredWeight]] = {"grid": GridWeight, "codebook": CodebookWeight, "residual": ResidualWeight}
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
