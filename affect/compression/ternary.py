# SPDX-License-Identifier: Apache-2.0
"""TQuant and MQuant: which weights become 0 when only -1, 0 and 1 are left.

Rounding to nearest with the largest weight as level sends almost all bell-shaped weights to 0. TQuant makes three bins
of equal length, which minimises the largest error; MQuant three of equal mass under a reference distribution, which
minimises the average one. Yvinec, Dapogny and Bailly: Designing strong baselines for ternary neural network
quantization through support and mass equalization. ICASSP 2023, arXiv 2306.17442.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor, nn

from affect.compression.arguments import check_bits, check_choices
from affect.compression.base import Data, quantizable
from affect.compression.power import put_measured_inputs
from affect.compression.report import Report
from affect.compression.stored import GridWeight, StoredWeight
from affect.compression.uniform import (
    bits_by_layer,
    compressed_layer,
    current_weight,
    edge_layers,
    largest_weights,
    put_weight,
    require_floats,
    round_to_grid,
)
from affect.errors import ConfigError

__all__ = [
    "MassQuantization",
    "SupportQuantization",
    "TernaryLearner",
    "mass_bins",
    "straight_through",
    "support_bins",
    "ternary",
    "ternary_grid",
]

THIRD = math.sqrt(2) * float(torch.erfinv(torch.tensor(1 / 3, dtype=torch.float64)))
"""Φ⁻¹(2/3): a third of a Gaussian's mass lies within ± this many standard deviations."""

REFERENCES = {
    "gaussian": (THIRD, 3 * math.exp(-(THIRD**2) / 2) / math.sqrt(2 * math.pi)),
    "laplace": (math.log(1.5) / math.sqrt(2), (math.log(1.5) + 1) / math.sqrt(2)),
}
"""Threshold that leaves a third of the mass in the middle, and mean magnitude beyond it, in standard deviations."""

LEVELS = ("mean", "step")


def support_bins(weight: Tensor, per_channel: bool = True) -> tuple[Tensor, Tensor]:
    """Return thresholds λ/3 and levels 2λ/3, λ = max|w|: three bins of equal length; no error exceeds λ/3 (TQuant).

    Args:
        weight: ``(O, …)``.
        per_channel: Whether each output channel has its own.

    Returns:
        Thresholds and levels, ``(O,)`` or ``(1,)``.
    """
    largest = largest_weights(weight, per_channel)
    return largest / 3, largest * 2 / 3


def mass_bins(
    weight: Tensor, per_channel: bool = True, reference: str = "gaussian", level: str = "mean"
) -> tuple[Tensor, Tensor]:
    """Return thresholds and levels of three bins of equal mass under a distribution around 0 (MQuant).

    Args:
        weight: ``(O, …)``; its root mean square is the distribution's standard deviation σ.
        per_channel: Whether each output channel has its own.
        reference: ``gaussian`` (t = 0.431 σ) or ``laplace`` (t = 0.287 σ).
        level: ``mean`` of what lies beyond the threshold (Gaussian: 1.091 σ), or the rounding ``step`` 2t.

    Returns:
        Thresholds and levels, ``(O,)`` or ``(1,)``.
    """
    flat = weight.detach().flatten(1) if per_channel else weight.detach().flatten()[None]
    sigma = flat.square().mean(1).sqrt()
    sigma = torch.where(sigma > 0, sigma, torch.ones_like(sigma))
    threshold, mean = REFERENCES[reference]
    return threshold * sigma, (mean if level == "mean" else 2 * threshold) * sigma


def ternary(weight: Tensor, threshold: Tensor) -> Tensor:
    """Return codes -1, 0 and 1 of a weight ``(O, …)`` with thresholds ``(O,)`` or ``(1,)``, int64 of its shape."""
    beyond = weight.detach().abs() > threshold.view(-1, *[1] * (weight.ndim - 1))
    return (weight.detach().sign() * beyond).long()


def ternary_grid(weight: Tensor, threshold: Tensor, level: Tensor) -> GridWeight:
    """Return a weight whose values are -level, 0 and level."""
    return GridWeight.of(ternary(weight, threshold), level, 2)


class _StraightThrough(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, weight: Tensor, threshold: Tensor, level: Tensor) -> Tensor:  # noqa: ANN401
        codes = (weight.abs() > threshold).to(weight.dtype) * weight.sign()
        ctx.save_for_backward(weight.abs() <= threshold + level, codes)
        ctx.level_shape = level.shape
        return codes * level

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor, None, Tensor]:  # noqa: ANN401
        inside, codes = ctx.saved_tensors
        return grads[0] * inside, None, (grads[0] * codes).sum_to_size(ctx.level_shape)


def straight_through(weight: Tensor, threshold: Tensor, level: Tensor) -> Tensor:
    """Return the ternary weight; its gradient passes unchanged where |w| ≤ threshold + level, and is 0 beyond.

    Beyond it, values are clipped: both outer bins end as far from their level as they begin.

    Args:
        weight: ``(O, …)``.
        threshold: Broadcast against the weight.
        level: Broadcast against the weight; its gradient is that of the product with the codes.
    """
    out: Tensor = _StraightThrough.apply(weight, threshold, level)  # type: ignore[no-untyped-call]
    return out


class TernaryLearner(StoredWeight):
    """A ternary weight while it is trained: floats are kept, thresholds follow them.

    Args:
        weight: Floats to begin with ``(O, …)``.
        transform: Whose bins are used.
        learned: Whether levels are parameters; otherwise they are computed from the floats at every step.
    """

    def __init__(self, weight: Tensor, transform: _Ternary, learned: bool) -> None:
        super().__init__()
        self.shape = tuple(weight.shape)
        self.weight = nn.Parameter(weight.detach().clone())
        self.transform = transform
        self.level = nn.Parameter(transform.bins(weight)[1]) if learned else None

    def bins(self) -> tuple[Tensor, Tensor]:
        """Return thresholds and levels as they are now."""
        threshold, level = self.transform.bins(self.weight.detach())
        return threshold, level if self.level is None else self.level

    def forward(self) -> Tensor:
        """Return the ternary weight, with straight-through gradients."""
        view = [-1] + [1] * (len(self.shape) - 1)
        threshold, level = self.bins()
        return straight_through(self.weight, threshold.view(view), level.view(view))

    def frozen(self) -> GridWeight:
        """Return the codes that it has come to; a level that was learnt below 0 turns the signs of its codes."""
        threshold, level = self.bins()
        codes = ternary(self.weight, threshold) * level.detach().sign().view(-1, *[1] * (len(self.shape) - 1)).long()
        return GridWeight.of(codes, level.detach().abs(), 2)


class _Ternary:
    """What both operators share: everything but their bins."""

    name, stage = "", "weights"

    def __init__(
        self,
        input_bits: int | None,
        per_channel: bool,
        steps: int,
        scale: str,
        edge_bits: int | None,
        protect: Sequence[str],
    ) -> None:
        check_bits(self.name, input_bits=input_bits, edge_bits=edge_bits)
        check_choices(self.name, scale=(scale, ("recomputed", "learned")))
        if int(steps) < 0:
            raise ConfigError(f"compression.{self.name}.steps={steps}: 0 or more")
        self.input_bits, self.per_channel = input_bits, bool(per_channel)
        self.steps, self.scale = int(steps), scale
        self.edge_bits, self.protect = edge_bits, tuple(protect)
        self.needs: tuple[str, ...] = (() if input_bits is None else ("images",)) + (("train",) if steps else ())

    def bins(self, weight: Tensor) -> tuple[Tensor, Tensor]:
        """Return thresholds and levels of a weight ``(O, …)``."""
        raise NotImplementedError

    def prepare(self, network: nn.Module, data: Data) -> None:
        """Nothing is needed of the untouched network."""

    def settings(self) -> dict[str, Any]:
        """Return what the report says of the arguments."""
        keys = ("input_bits", "per_channel", "steps", "scale", "edge_bits")
        return {key: getattr(self, key) for key in keys}

    def __call__(self, network: nn.Module, data: Data) -> Report:
        """Make every convolution and linear layer ternary but the edges, and train them so if asked for."""
        layers = quantizable(network, self.protect)
        require_floats(layers, self.name)
        edges = edge_layers(network, layers) if self.edge_bits is not None else set()
        weights = {name: current_weight(layer) for name, layer in layers.items()}
        report = Report(self.name, self.settings())
        input_bits: dict[str, int] = {}
        if self.input_bits is not None:
            input_bits = bits_by_layer(network, layers, self.input_bits, self.edge_bits)
            put_measured_inputs(network, list(layers), data.images, input_bits)
        learners = self._trained(network, data, [name for name in layers if name not in edges]) if self.steps else {}
        for name, weight in weights.items():
            if name in edges and self.edge_bits is not None:
                # Layers at the edge were trained as floats, if at all.
                weight = current_weight(network.get_submodule(name))
                stored, bits = round_to_grid(weight, int(self.edge_bits), self.per_channel), int(self.edge_bits)
            elif name in learners:
                stored, bits = learners[name].frozen(), 2
            else:
                stored, bits = ternary_grid(weight, *self.bins(weight)), 2
            record = put_weight(network, name, stored, self.name, bits)
            if input_bits and compressed_layer(network, name).inputs is not None:
                record.input_bits = input_bits[name]
            if bits == 2:
                codes = stored.integers()
                dead = int((codes.flatten(1) == 0).all(1).sum())
                record.note = f"{float((codes == 0).float().mean()):.0%} zeros"
                if dead:
                    report.notes.append(
                        f"{name}: {dead} of {len(codes)} channels have no weight left; per_channel=true"
                    )
            report.layers.append(record)
        return report

    def _trained(self, network: nn.Module, data: Data, names: Sequence[str]) -> dict[str, TernaryLearner]:
        assert data.train is not None
        learners = {}
        for name in names:
            layer = compressed_layer(network, name)
            made = TernaryLearner(layer.current_weight(), self, self.scale == "learned")
            layer.store(made)
            learners[name] = made
        data.train(self.steps)
        network.eval()
        for name, learner in learners.items():
            # What later methods refine is what was trained, not what it began with.
            compressed_layer(network, name).floats = learner.weight.detach()
        return learners


class SupportQuantization(_Ternary):
    """TQuant: ternary weights with bins of equal length.

    Args:
        input_bits: Bits of an input, its range measured on training images; None leaves inputs floats.
        per_channel: Whether each output channel has its own bins.
        steps: Steps of training with straight-through gradients; 0 trains nothing.
        scale: Whether levels are ``recomputed`` from the weights while training, or ``learned``.
        edge_bits: Bits of the first and last layer, which become uniform; None makes them ternary too.
        protect: Names of layers, or their beginnings, that stay floats.
    """

    name = "tquant"

    def __init__(
        self,
        input_bits: int | None = None,
        per_channel: bool = True,
        steps: int = 0,
        scale: str = "recomputed",
        edge_bits: int | None = 8,
        protect: Sequence[str] = (),
    ) -> None:
        super().__init__(input_bits, per_channel, steps, scale, edge_bits, protect)

    def bins(self, weight: Tensor) -> tuple[Tensor, Tensor]:
        """Return thresholds and levels of equal support."""
        return support_bins(weight, self.per_channel)


class MassQuantization(_Ternary):
    """MQuant: ternary weights with bins of equal mass under a reference distribution.

    Args:
        input_bits: Bits of an input, its range measured on training images; None leaves inputs floats.
        per_channel: Whether each output channel has its own bins.
        reference: Distribution whose mass is split: ``gaussian`` or ``laplace``.
        level: ``mean`` of the outer bins, which has the least squared error, or the rounding ``step``.
        steps: Steps of training with straight-through gradients; 0 trains nothing.
        scale: Whether levels are ``recomputed`` from the weights while training, or ``learned``.
        edge_bits: Bits of the first and last layer, which become uniform; None makes them ternary too.
        protect: Names of layers, or their beginnings, that stay floats.
    """

    name = "mquant"

    def __init__(
        self,
        input_bits: int | None = None,
        per_channel: bool = True,
        reference: str = "gaussian",
        level: str = "mean",
        steps: int = 0,
        scale: str = "recomputed",
        edge_bits: int | None = 8,
        protect: Sequence[str] = (),
    ) -> None:
        super().__init__(input_bits, per_channel, steps, scale, edge_bits, protect)
        check_choices(self.name, reference=(reference, REFERENCES), level=(level, LEVELS))
        self.reference, self.level = reference, level

    def bins(self, weight: Tensor) -> tuple[Tensor, Tensor]:
        """Return thresholds and levels of equal mass."""
        return mass_bins(weight, self.per_channel, self.reference, self.level)

    def settings(self) -> dict[str, Any]:
        """Return what the report says of the arguments."""
        return {**super().settings(), "reference": self.reference, "level": self.level}
