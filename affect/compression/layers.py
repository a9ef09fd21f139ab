# SPDX-License-Identifier: Apache-2.0
"""Layers that take the place of a network's own after compression.

A compressed network differs from the original in single layers only: no graph is stored, and no code. Each class here
is made from the layer that it replaces and plain settings, ``of(original, **settings)``, and tells its settings.
"""

from __future__ import annotations

import copy
from collections.abc import Mapping
from typing import Any, Protocol, TypeVar, runtime_checkable

import torch
import torch.nn.functional as F
from timm.layers import Conv2dSame
from torch import Tensor, nn

from affect.compression.stored import StoredWeight, build_weight, weight_node

__all__ = ["LAYERS", "CompressedConv2d", "CompressedLinear", "InputGrid", "Replacing", "WithoutNorm", "baked"]

Network = TypeVar("Network", bound=nn.Module)


@runtime_checkable
class Replacing(Protocol):
    """A layer that takes the place of another one."""

    def settings(self) -> dict[str, Any]:
        """Return plain settings with which ``of(original, **settings)`` builds an empty layer of this shape."""
        ...


class InputGrid(nn.Module):
    """A static grid for the inputs of a layer: ``round((x - t) / s)`` in [low, high], times s, plus t.

    The scale s is one number or one per input channel; the shift t makes a range that is not symmetric unsigned.

    Args:
        channels: Number of scales: input channels, or 1.
        bits: Bits of a code, 2 to 8.
        signed: Codes -n … n with n = 2^(b-1) - 1, or 0 … 2^b - 1.
        axis: Dimension of the channels: 1 for maps ``(B, C, H, W)``, -1 for vectors and tokens.
        power: Whether codes lie on a grid of powers with the exponent ``exponent``.
        orders: Codes for an input: the first, and for what each left over one on a grid 2n times as fine (REx).
        absorbed: Whether the layer's weight has the scales in it, so that the inputs stay codes (SPIQ).
    """

    def __init__(
        self,
        channels: int,
        bits: int,
        signed: bool,
        axis: int = 1,
        power: bool = False,
        orders: int = 1,
        absorbed: bool = False,
    ) -> None:
        super().__init__()
        self.channels, self.bits, self.signed, self.axis = int(channels), int(bits), bool(signed), int(axis)
        self.power, self.orders, self.absorbed = bool(power), int(orders), bool(absorbed)
        if self.orders < 1:
            raise ValueError(f"inputs have at least one order, not {orders}")
        if self.absorbed and (self.power or self.orders > 1):
            raise ValueError("a weight can have the scales of one uniform grid in it, not those of powers or of orders")
        self.high = 2 ** (self.bits - 1) - 1 if self.signed else 2**self.bits - 1
        self.low = -self.high if self.signed else 0
        self.register_buffer("scale", torch.ones(self.channels))
        self.register_buffer("shift", torch.zeros(()))
        self.register_buffer("exponent", torch.ones(()))

    def forward(self, x: Tensor) -> Tensor:
        """Return ``x`` on the grid."""
        scale = self.scale
        if self.channels > 1:
            view = [1] * x.ndim
            view[self.axis] = -1
            scale = scale.view(view)
        y = (x - self.shift) / scale
        if self.power:
            y = self.high * y.sign() * (y.abs() / self.high).pow(self.exponent)
        codes = y.round().clamp(self.low, self.high)
        if y.requires_grad:  # layers before this one learn through the rounding, as far as it does not cut off
            inside = y.clamp(self.low, self.high)
            codes = inside + (codes - inside).detach()
        y = codes
        if self.power:
            y = self.high * y.sign() * (y.abs() / self.high).pow(1 / self.exponent)
        if self.absorbed:
            return y
        y = y * scale + self.shift
        left = 2 ** (self.bits - 1) - 1  # what is left over has both signs
        for _ in range(self.orders - 1):
            scale = scale / (2 * left)
            y = y + ((x - y) / scale).round().clamp(-left, left) * scale
        return y

    def settings(self) -> dict[str, Any]:
        """Return the arguments of the constructor."""
        return {
            "channels": self.channels,
            "bits": self.bits,
            "signed": self.signed,
            "axis": self.axis,
            "power": self.power,
            "orders": self.orders,
            "absorbed": self.absorbed,
        }


class CodesReadError(AttributeError):
    """Something else than a layer reads its weight, which is codes now.

    Attributes:
        layer: The layer.
    """

    def __init__(self, layer: nn.Module) -> None:
        super().__init__("a weight that became codes was read")
        self.layer = layer


class _Compressed(nn.Module):
    """What compressed convolutions and linear layers share: where weight, bias and inputs come from.

    Attributes:
        floats: The weight before it became codes, while it is known; later transforms refine codes with it. It is in
            no state dict, so a layer that was read from a file has None.
    """

    def __init__(
        self, weight: Tensor, bias: Tensor | None, stored: Mapping[str, Any] | None, inputs: Mapping[str, Any] | None
    ) -> None:
        super().__init__()
        self.floats: Tensor | None = None
        self.stored: StoredWeight | None = None if stored is None else build_weight(stored)
        if self.stored is None:
            self.weight = nn.Parameter(weight.detach().clone())
        elif self.stored.shape != tuple(weight.shape):
            raise ValueError(f"a stored weight of shape {list(self.stored.shape)} replaces one of {list(weight.shape)}")
        self.bias = None if bias is None else nn.Parameter(bias.detach().clone())
        self.inputs: InputGrid | None = None if inputs is None else InputGrid(**inputs)

    def __getattr__(self, name: str) -> Any:  # noqa: ANN401
        try:
            return super().__getattr__(name)
        except AttributeError as error:
            if name == "weight":
                raise CodesReadError(self) from error
            raise

    def current_weight(self) -> Tensor:
        """Return the weight that is multiplied by."""
        return self.weight if self.stored is None else self.stored()

    def store(self, weight: StoredWeight) -> None:
        """Replace the weight by codes."""
        if weight.shape != tuple(self.current_weight().shape):
            raise ValueError(f"codes of shape {weight.shape} for a weight of {tuple(self.current_weight().shape)}")
        if self.stored is None:
            self.floats = self.weight.detach()
            del self.weight
        self.stored = weight

    def _nodes(self) -> dict[str, Any]:
        return {
            "bias": self.bias is not None,
            "stored": None if self.stored is None else weight_node(self.stored),
            "inputs": None if self.inputs is None else self.inputs.settings(),
        }


class CompressedConv2d(_Compressed):
    """A convolution whose weight may be codes, whose inputs may lie on a grid, and whose padding may have values.

    A batch norm that is folded forward through a padded convolution needs padding with the value that it maps to zero
    (``padding_value``, per input channel); then the result is exact at the border too.
    """

    def __init__(
        self,
        original: nn.Conv2d | CompressedConv2d,
        bias: bool,
        padded: bool = False,
        stored: Mapping[str, Any] | None = None,
        inputs: Mapping[str, Any] | None = None,
    ) -> None:
        weight = original.weight if isinstance(original, nn.Conv2d) else original.current_weight()
        old = original.bias if original.bias is not None else torch.zeros(len(weight))
        super().__init__(weight, old if bias else None, stored, inputs)
        self.stride: tuple[int, ...] = tuple(original.stride)
        self.dilation: tuple[int, ...] = tuple(original.dilation)
        self.groups: int = int(original.groups)
        if isinstance(original, nn.Conv2d) and original.padding_mode != "zeros":
            raise ValueError(f"padding_mode={original.padding_mode} is not supported")
        # timm's convolutions with padding as in TensorFlow compute it from the size of their input.
        self.same = bool(getattr(original, "same", isinstance(original, Conv2dSame)) or original.padding == "same")
        self.padding: str | tuple[int, ...] = original.padding
        self.padded = bool(padded)
        if self.padded:
            known = getattr(original, "padding_value", None)
            channels = weight.shape[1] * original.groups
            self.register_buffer("padding_value", torch.zeros(channels) if known is None else known.detach().clone())

    @classmethod
    def of(cls, original: nn.Module, **settings: Any) -> CompressedConv2d:  # noqa: ANN401
        """Return a compressed layer in the place of a convolution; without settings one that computes the same."""
        if type(original) not in (nn.Conv2d, Conv2dSame, CompressedConv2d):
            raise ValueError(f"a compressed convolution cannot take the place of {type(original).__name__}")
        defaults = (
            original.settings() if isinstance(original, CompressedConv2d) else {"bias": original.bias is not None}
        )
        made = cls(original, **{**defaults, **settings})  # type: ignore[arg-type]
        if isinstance(original, CompressedConv2d):
            _take_over(original, made)
        return made

    def sides(self, x: Tensor) -> list[int]:
        """Return the padding of ``x`` in the order of ``torch.nn.functional.pad``."""
        height, width = self.current_kernel()
        if self.same:
            sides = []
            for size, k, stride, dilation in (
                (x.shape[-1], width, self.stride[1], self.dilation[1]),
                (x.shape[-2], height, self.stride[0], self.dilation[0]),
            ):
                total = max((-(-size // stride) - 1) * stride + (k - 1) * dilation + 1 - size, 0)
                sides += [total // 2, total - total // 2]
            return sides
        if isinstance(self.padding, str):  # "valid"
            return [0, 0, 0, 0]
        vertical, horizontal = self.padding
        return [int(horizontal), int(horizontal), int(vertical), int(vertical)]

    def current_kernel(self) -> tuple[int, int]:
        """Return height and width of the kernel."""
        shape = self.weight.shape if self.stored is None else self.stored.shape
        return int(shape[-2]), int(shape[-1])

    def forward(self, x: Tensor) -> Tensor:
        """Return the convolution of ``(B, I, H, W)``."""
        if self.inputs is not None:
            x = self.inputs(x)
        sides = self.sides(x)
        if self.padded and any(sides):
            value = self.padding_value.view(-1, 1, 1)
            x = F.pad(x - value, sides) + value
        elif any(sides):
            x = F.pad(x, sides)
        return F.conv2d(x, self.current_weight(), self.bias, self.stride, 0, self.dilation, self.groups)

    def settings(self) -> dict[str, Any]:
        """Return what ``of`` takes beside the original."""
        return {**self._nodes(), "padded": self.padded}


class CompressedLinear(_Compressed):
    """A linear layer whose weight may be codes and whose inputs may lie on a grid."""

    def __init__(
        self,
        original: nn.Linear | CompressedLinear,
        bias: bool,
        stored: Mapping[str, Any] | None = None,
        inputs: Mapping[str, Any] | None = None,
    ) -> None:
        weight = original.weight if isinstance(original, nn.Linear) else original.current_weight()
        old = original.bias if original.bias is not None else torch.zeros(len(weight))
        super().__init__(weight, old if bias else None, stored, inputs)
        self.out_features, self.in_features = (int(size) for size in weight.shape)

    @classmethod
    def of(cls, original: nn.Module, **settings: Any) -> CompressedLinear:  # noqa: ANN401
        """Return a compressed layer in the place of a linear one; without settings one that computes the same."""
        if type(original) not in (nn.Linear, CompressedLinear):
            raise ValueError(f"a compressed linear layer cannot take the place of {type(original).__name__}")
        defaults = (
            original.settings() if isinstance(original, CompressedLinear) else {"bias": original.bias is not None}
        )
        made = cls(original, **{**defaults, **settings})  # type: ignore[arg-type]
        if isinstance(original, CompressedLinear):
            _take_over(original, made)
        return made

    def forward(self, x: Tensor) -> Tensor:
        """Return ``x W' + b`` of ``(…, I)``."""
        if self.inputs is not None:
            x = self.inputs(x)
        return F.linear(x, self.current_weight(), self.bias)

    def settings(self) -> dict[str, Any]:
        """Return what ``of`` takes beside the original."""
        return self._nodes()


def _take_over(old: _Compressed, new: _Compressed) -> None:
    """Copy codes and input grids that the new layer has of the same kind and shape, and the weight before codes."""
    if new.stored is not None:
        new.floats = old.floats
    for name in ("stored", "inputs"):
        before, after = getattr(old, name), getattr(new, name)
        if before is not None and after is not None and type(before) is type(after):
            shapes = {key: value.shape for key, value in before.state_dict().items()}
            if shapes == {key: value.shape for key, value in after.state_dict().items()}:
                after.load_state_dict(before.state_dict())


class WithoutNorm(nn.Module):
    """What is left of a batch norm that was folded away: nothing, or the activation that timm keeps in it.

    Args:
        original: The normalisation layer.
        copies: Whether the output is a copy: a batch norm's is a new tensor, into which what follows may write, while
            others still read the input.
    """

    def __init__(self, original: nn.Module, copies: bool = False) -> None:
        super().__init__()
        self.copies = bool(copies)
        self.drop = copy.deepcopy(getattr(original, "drop", None)) or nn.Identity()
        self.act = copy.deepcopy(getattr(original, "act", None)) or nn.Identity()
        for part in self.modules():
            if hasattr(part, "inplace"):  # it wrote into the batch norm's output, which is no longer there
                part.inplace = False

    @classmethod
    def of(cls, original: nn.Module, copies: bool = False) -> WithoutNorm:
        """Return the rest of a normalisation layer."""
        return cls(original, copies)

    def forward(self, x: Tensor) -> Tensor:
        """Return the activation of ``x``."""
        y = self.act(self.drop(x))
        return y.clone() if self.copies and y is x else y

    def settings(self) -> dict[str, Any]:
        """Return what ``of`` takes beside the original."""
        return {"copies": self.copies}


LAYERS: dict[str, Any] = {
    "convolution": CompressedConv2d,
    "linear": CompressedLinear,
    "without_norm": WithoutNorm,
}
"""Layers by the name that a file has for them."""


def baked(network: Network) -> Network:
    """Return a copy whose stored weights are decoded once: the same numbers, ordinary speed; to predict and to export.

    Grids of inputs stay, since they round what comes in.
    """
    made = copy.deepcopy(network)
    for layer in made.modules():
        if isinstance(layer, _Compressed) and layer.stored is not None:
            weight = nn.Parameter(layer.stored().detach())
            layer.stored = layer.floats = None
            layer.weight = weight
    return made
