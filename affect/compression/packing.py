# SPDX-License-Identifier: Apache-2.0
"""Codes of b bits as bytes and back, so that a file is as small as the report says."""

from __future__ import annotations

import torch
from torch import Tensor

__all__ = ["pack", "packed_bytes", "unpack"]

PIECE = 2**22
"""Codes that are taken apart at once, a multiple of 8: each of their bits is a number of 8 bytes meanwhile."""


def packed_bytes(count: int, bits: int) -> int:
    """Return how many bytes ``count`` codes of ``bits`` bits take: no gaps between codes, the last byte filled up."""
    return (count * bits + 7) // 8


def pack(codes: Tensor, bits: int) -> Tensor:
    """Return unsigned codes as bytes, the lowest bit of the first code first.

    Args:
        codes: Integers in [0, 2^bits - 1], any shape.
        bits: Bits of a code, 1 to 16.

    Returns:
        uint8 ``(ceil(N bits / 8),)``.

    Raises:
        ValueError: If a code does not fit.
    """
    flat = codes.flatten().to(torch.int64)
    if not 1 <= bits <= 16:
        raise ValueError(f"codes have 1 to 16 bits, not {bits}")
    if len(flat) and not 0 <= int(flat.min()) <= int(flat.max()) < 2**bits:
        raise ValueError(f"codes from {int(flat.min())} to {int(flat.max())} do not fit {bits} bits")
    if bits == 8:
        return flat.to(torch.uint8)
    if len(flat) > PIECE:
        return torch.cat([pack(part, bits) for part in flat.split(PIECE)])
    digits = ((flat[:, None] >> torch.arange(bits, device=flat.device)) & 1).flatten()
    digits = torch.nn.functional.pad(digits, (0, -len(digits) % 8)).view(-1, 8)
    return (digits << torch.arange(8, device=flat.device)).sum(1).to(torch.uint8)


def unpack(packed: Tensor, bits: int, count: int) -> Tensor:
    """Return the first ``count`` codes of ``pack`` ``(count,)``: int16, or int32 for codes of 16 bits.

    Raises:
        ValueError: If there are not as many bytes as ``count`` codes take.
    """
    if packed.numel() != packed_bytes(count, bits):
        raise ValueError(f"{count} codes of {bits} bits take {packed_bytes(count, bits)} bytes, not {packed.numel()}")
    if 8 % bits == 0:  # whole codes in a byte
        starts = torch.arange(0, 8, bits, dtype=torch.uint8, device=packed.device)
        return ((packed.flatten()[:, None] >> starts) & (2**bits - 1)).flatten()[:count].to(torch.int16)
    if count > PIECE:
        pieces = packed.flatten().split(PIECE * bits // 8)
        return torch.cat([unpack(part, bits, min(PIECE, count - k * PIECE)) for k, part in enumerate(pieces)])
    digits = ((packed.flatten()[:, None].to(torch.int16) >> torch.arange(8, device=packed.device)) & 1).flatten()
    digits = digits[: count * bits].view(count, bits)
    whole = torch.int16 if bits < 16 else torch.int32
    return (digits << torch.arange(bits, device=packed.device)).sum(1).to(whole)
