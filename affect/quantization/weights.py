# SPDX-License-Identifier: Apache-2.0
"""Weights of few levels with straight-through gradients, on any layer, by ``torch.nn.utils.parametrize``.

The forward pass sees the levels; the gradient goes to the latent float weights as if there were none (straight through;
Bengio, Léonard and Courville, arXiv 1308.3432). A double backward pass works, so privileged attribution does.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, Literal

import torch
from torch import Tensor, nn

from affect.errors import ConfigError

Bits = int | Literal["binary", "ternary"]
Scale = Literal["max", "mean"]

FLOAT_BITS = 32
"""From so many bits on a weight stays what it is, bit for bit."""


class _StraightThrough(torch.autograd.Function):
    """Gives the quantized weights exactly; the gradient passes where a weight lies inside the range of the levels."""

    @staticmethod
    def forward(ctx: Any, weight: Tensor, quantized: Tensor, inside: Tensor | None) -> Tensor:  # noqa: ANN401
        ctx.save_for_backward(*([] if inside is None else [inside]))
        return quantized.clone()

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor) -> tuple[Tensor, None, None]:  # noqa: ANN401
        (gradient,) = gradients
        if ctx.saved_tensors:
            gradient = gradient * ctx.saved_tensors[0]
        return gradient, None, None


def straight_through(weight: Tensor, quantized: Tensor, inside: Tensor | None = None) -> Tensor:
    """Return ``quantized`` with the gradient of ``weight``.

    Args:
        weight: Latent weights.
        quantized: What the forward pass sees, of the same shape.
        inside: Where the gradient passes; it is 0 elsewhere. None passes it everywhere.
    """
    return _StraightThrough.apply(weight, quantized.detach(), inside)


def per_channel(weight: Tensor, reduce: Callable[[Tensor], Tensor], axis: int = 0) -> Tensor:
    """Return a statistic ``reduce`` ((C, N) to (C,)) of each channel, shaped to broadcast with ``weight``."""
    rows = weight.movedim(axis, 0).flatten(1) if weight.ndim > 1 else weight[None]
    shape = [1] * weight.ndim
    if weight.ndim > 1:
        shape[axis] = -1
    return reduce(rows).reshape(shape)


def binary(weight: Tensor, axis: int = 0) -> Tensor:
    r"""Return :math:`\operatorname{sign}(w) \cdot \operatorname{mean}|w|`, the mean per channel (arXiv 1603.05279).

    The sign of 0 is +1, so that there are two levels. The gradient passes everywhere: no weight is out of range.

    Args:
        weight: ``(C, …)``.
        axis: Axis of the output channels.
    """
    with torch.no_grad():
        scale = per_channel(weight.abs(), lambda rows: rows.mean(1), axis)
        quantized = torch.where(weight >= 0, scale, -scale)
    return straight_through(weight, quantized)


def ternary(weight: Tensor, axis: int = 0, threshold: float = 0.7) -> Tensor:
    r"""Return weights of three levels (ternary weight networks, arXiv 1605.04711).

    .. math:: q = \operatorname{sign}(w)\, \alpha\, [|w| > \Delta], \quad
              \Delta = 0.7 \operatorname{mean}|w|, \quad \alpha = \operatorname{mean}(|w| : |w| > \Delta)

    Args:
        weight: ``(C, …)``.
        axis: Axis of the output channels.
        threshold: The factor 0.7.
    """
    with torch.no_grad():
        size = weight.abs()
        kept = size > threshold * per_channel(size, lambda rows: rows.mean(1), axis)
        total = per_channel(size * kept, lambda rows: rows.sum(1), axis)
        number = per_channel(kept.to(size.dtype), lambda rows: rows.sum(1), axis)
        quantized = weight.sign() * kept * (total / number.clamp(min=1))
    return straight_through(weight, quantized)


def uniform(weight: Tensor, bits: int, axis: int = 0, scale: Scale = "max") -> Tensor:
    r"""Return weights on a symmetric grid of :math:`2n + 1` levels, :math:`n = 2^{b-1} - 1`.

    .. math:: q = s \operatorname{clip}(\operatorname{round}(w / s), -n, n)

    with :math:`s = \max|w| / n` per channel, a constant in the backward pass. At two bits this scale sends every weight
    below half of the largest to 0; ``mean`` takes :math:`s = 2 \operatorname{mean}|w| / \sqrt n` instead, the start of
    learned step sizes (arXiv 1902.08153).

    Args:
        weight: ``(C, …)``.
        bits: b, 2 or more.
        axis: Axis of the output channels.
        scale: ``max`` or ``mean``.
    """
    if bits >= FLOAT_BITS:
        return weight
    top = 2 ** (bits - 1) - 1
    with torch.no_grad():
        if scale == "max":
            step = per_channel(weight.abs(), lambda rows: rows.amax(1), axis) / top
        else:
            step = per_channel(weight.abs(), lambda rows: rows.mean(1), axis) * (2 / top**0.5)
        step = step.clamp(min=torch.finfo(weight.dtype).tiny)
        ratio = weight / step
        quantized = ratio.round().clamp(-top, top) * step
        # The largest weight itself may come out of the division above n by rounding.
        inside = None if scale == "max" else ratio.abs() <= top
    return straight_through(weight, quantized, inside)


class WeightQuantizer(nn.Module):
    """The parametrization of one weight; it has no state.

    Args:
        bits: ``binary``, ``ternary`` or a number of bits.
        axis: Axis of the output channels.
        scale: Of a number of bits: ``max`` or ``mean``.
    """

    def __init__(self, bits: Bits, axis: int = 0, scale: Scale = "max") -> None:
        super().__init__()
        self.bits, self.axis, self.scale = bits, axis, scale

    def forward(self, weight: Tensor) -> Tensor:
        """Return the quantized weight."""
        if self.bits == "binary":
            return binary(weight, self.axis)
        if self.bits == "ternary":
            return ternary(weight, self.axis)
        return uniform(weight, int(self.bits), self.axis, self.scale)

    def extra_repr(self) -> str:
        """Return what printing shows."""
        return f"bits={self.bits}, axis={self.axis}, scale={self.scale}"


def check_bits(bits: Any, key: str, others: tuple[str, ...] = ()) -> Bits:  # noqa: ANN401
    """Return a width of weights.

    Raises:
        ConfigError: If it is none.
    """
    if bits in ("binary", "ternary", *others):
        return bits
    if isinstance(bits, int) and not isinstance(bits, bool) and bits >= 2:
        return bits
    known = ", ".join(["binary", "ternary", *others])
    raise ConfigError(f"{key}={bits}: write {known} or a number of bits from 2 on")


def stored_bits(bits: Bits) -> int:
    """Return how many bits a weight of so many levels takes in a file that packs them."""
    return {"binary": 1, "ternary": 2}[bits] if isinstance(bits, str) else min(bits, FLOAT_BITS)
