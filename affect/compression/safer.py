# SPDX-License-Identifier: Apache-2.0
"""How much a model suffers from changes of each of its layers, and bits for each layer within a budget of bytes.

The truth is measured: one layer at a time is changed, ``S_l = (A(f) - A(f with W_l + ε)) / ‖ε‖``, with the norm in
parts of ‖W_l‖, since large layers would look frail otherwise. Criteria foretell it from gradients, curvature or
outputs; ``correlations`` says how well each of them does. SAfER: layer-level sensitivity assessment for efficient and
robust neural network inference, arXiv 2308.04753. Which criteria the paper compares and which one wins is not known
here.
"""

from __future__ import annotations

import itertools
import math
import statistics
import warnings
from collections.abc import Callable, Hashable, Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import TypeVar

import numpy as np
import torch
from scipy.stats import kendalltau, spearmanr
from torch import Tensor, nn

from affect.compression.arguments import check_bits, check_choices, check_counts
from affect.compression.base import Data, quantizable, relative_error
from affect.compression.layers import CompressedConv2d, CompressedLinear
from affect.compression.packing import packed_bytes
from affect.compression.pruning import path_nodes, traceable
from affect.compression.report import Report
from affect.compression.uniform import edge_layers, input_ranges, largest_weights, put_inputs, put_weight, round_to_grid
from affect.errors import ConfigError, near

__all__ = [
    "CRITERIA",
    "FAMILIES",
    "Correlation",
    "SAfER",
    "Sensitivity",
    "allocate",
    "changed",
    "correlations",
    "criterion_scores",
    "integrated_gradients",
    "measured_sensitivity",
    "perturbed",
]

CRITERIA = (
    "loss",
    "output",
    "gradient",
    "gradient_weight",
    "integrated_gradients",
    "fisher",
    "hessian",
    "magnitude",
    "size",
    "depth",
)
FAMILIES = ("noise", "grid", "channels", "flips", "float_flips")
STRENGTHS = {"noise": 0.1, "grid": 4, "channels": 0.1, "flips": 1e-3, "float_flips": 1e-5}
"""Of a change: deviation of noise in parts of that of the weights, bits, part of the channels, parts of all bits."""

DRAWN = ("noise", "channels", "flips", "float_flips")
FAULTS = ("flips", "float_flips")
"""Faults of memory come per bit, whatever they do to the norm, so these are not divided by it."""

SECOND_ORDER = ("fisher", "hessian")
"""Criteria whose harm grows with the square of a change."""

BINS = 20_000
"""Steps of a budget."""

GRADIENTS = ("gradient", "gradient_weight", "integrated_gradients", "fisher", "hessian")
Losses = Callable[[], Iterable[Tensor]]
Option = TypeVar("Option", bound=Hashable)


# ------------------------------------------------------------------------------------------------------ perturbations


@torch.no_grad()
def perturbed(weight: Tensor, family: str, strength: float, generator: torch.Generator | None = None) -> Tensor:
    """Return a changed copy of a weight ``(O, …)``.

    Args:
        weight: Floats.
        family: ``noise``: Gaussian, ``strength`` times the root mean square of the weight; ``grid``: rounded to
            ``strength`` bits; ``channels``: a part of the output channels, at least one, is 0; ``flips``: a part of the
            bits, at least one, of 8-bit codes is inverted; ``float_flips``: of the 32 bits of the floats, where one in
            an exponent can give anything, infinity too.
        strength: See there and ``STRENGTHS``.
        generator: Of what is drawn.
    """
    if family == "noise":
        noise = torch.randn(weight.shape, generator=generator).to(weight)
        return weight + float(strength) * weight.square().mean().sqrt() * noise
    if family == "grid":
        return round_to_grid(weight, int(strength))().to(weight)
    if family == "channels":
        gone = torch.randperm(len(weight), generator=generator)[: max(1, round(float(strength) * len(weight)))]
        return weight.index_fill(0, gone.to(weight.device), 0)
    bits = {"flips": 8, "float_flips": 32}[family]
    count = min(weight.numel() * bits, max(1, round(float(strength) * weight.numel() * bits)))
    where = torch.randint(weight.numel() * bits, (count,), generator=generator).unique().to(weight.device)
    if family == "flips":
        step = largest_weights(weight).view(-1, *[1] * (weight.ndim - 1)) / 127
        codes = (weight / step).round().to(torch.int8)
    else:
        step, codes = torch.ones((), device=weight.device), weight.detach().clone().contiguous().view(torch.int32)
    mask = torch.zeros(weight.numel(), dtype=torch.int64, device=weight.device)
    mask = mask.scatter_add(0, where // bits, 2 ** (where % bits)).view(weight.shape)
    if family == "flips":
        return (codes ^ mask.to(torch.int8)).to(weight) * step
    return (codes ^ mask.to(torch.int32)).view(torch.float32)


@contextmanager
def changed(layer: nn.Module, weight: Tensor) -> Iterator[None]:
    """Let a layer multiply by another weight for a while."""
    held = layer.weight.data  # type: ignore[union-attr]
    layer.weight.data = weight  # type: ignore[union-attr]
    try:
        yield
    finally:
        layer.weight.data = held  # type: ignore[union-attr]


# --------------------------------------------------------------------------------------------------- measured truth


@dataclass(frozen=True)
class Sensitivity:
    """What a layer's change costs, over several draws.

    Attributes:
        median: Loss of score, per relative norm of the change but for faults; inf where the score is no number.
        worst: Largest.
    """

    median: float
    worst: float


def mean_loss(losses: Losses, batches: int | None = None) -> float:
    """Return the mean of the first batches' losses."""
    with torch.no_grad():
        found = [float(loss) for loss in itertools.islice(losses(), batches)]
    return sum(found) / len(found)


def measured_sensitivity(
    layers: Mapping[str, nn.Module],
    measure: Callable[[], float],
    family: str = "grid",
    strength: float | None = None,
    draws: int = 3,
    seed: int = 0,
) -> dict[str, Sensitivity]:
    """Return how much a score falls when one layer is changed, by name of the layer.

    Args:
        layers: Convolutions and linear layers of a network.
        measure: Score of the network as it is; higher is better.
        family: One of ``FAMILIES``.
        strength: See ``perturbed``; None takes that of ``STRENGTHS``.
        draws: Changes of each layer that are drawn; a grid needs none.
        seed: Of the draws.
    """
    power = STRENGTHS[family] if strength is None else strength
    before = measure()
    found = {}
    for k, (name, layer) in enumerate(layers.items()):
        weight = layer.weight.detach()  # type: ignore[union-attr, operator]
        drops = []
        for draw in range(draws if family in DRAWN else 1):
            drawn = np.random.SeedSequence((int(seed), k, draw)).generate_state(1)[0]
            generator = torch.Generator().manual_seed(int(drawn))
            moved = perturbed(weight, family, power, generator)
            with changed(layer, moved):
                drop = before - measure()
            drop = math.inf if math.isnan(drop) else drop
            size = 1.0 if family in FAULTS else relative_error(weight, moved)
            drops.append(drop / size if size else 0.0)
        found[name] = Sensitivity(statistics.median(drops), max(drops))
    return found


# ---------------------------------------------------------------------------------------------------------- criteria


def _weights(layers: Mapping[str, nn.Module]) -> list[nn.Parameter]:
    return [layer.weight for layer in layers.values()]  # type: ignore[misc]


def _gradients(
    layers: Mapping[str, nn.Module], losses: Losses, batches: int | None, curved: bool = False
) -> Iterator[list[Tensor]]:
    """Yield the gradient of each layer's weight for each batch; ``curved``: with a graph of its own."""
    weights = _weights(layers)
    for loss in itertools.islice(losses(), batches):
        found = torch.autograd.grad(loss, weights, create_graph=curved, allow_unused=True)
        yield [torch.zeros_like(w) if g is None else g for w, g in zip(weights, found, strict=True)]


def integrated_gradients(layer: nn.Module, losses: Losses, steps: int = 8, batches: int | None = None) -> Tensor:
    """Return ``w ∫₀¹ ∂L/∂w (μ W) dμ`` of each weight; they add up to the loss less that of the layer at 0.

    Args:
        layer: Whose weights go to 0 together; gradients must reach them.
        losses: Gives a loss per batch, the same batches at every call.
        steps: Points of the path.
        batches: Most batches.
    """
    weight = layer.weight.detach().clone()  # type: ignore[union-attr, operator]
    total = torch.zeros_like(weight)
    for position, width in path_nodes(steps):
        with changed(layer, weight * position):
            rows = [found[0].detach() for found in _gradients({"": layer}, losses, batches)]
        total += width * torch.stack(rows).mean(0)
    return weight * total


def criterion_scores(
    network: nn.Module,
    layers: Mapping[str, nn.Module],
    criterion: str,
    data: Data,
    batches: int = 4,
    steps: int = 8,
    samples: int = 4,
    bits: int = 4,
) -> dict[str, float]:
    """Return how much a network suffers from a change of each layer's weight, as a criterion foretells it.

    All are about changes in parts of the weight's norm, so that a layer that is scaled up, and the next one down as
    much, keeps its score; except ``gradient`` and ``magnitude``, which are what they are.

    Args:
        network: In evaluation mode.
        layers: Convolutions and linear layers of it.
        criterion: ``loss`` and ``output``: rise of the loss, and relative error of the output, with the layer on a grid
            of ``bits``, by the relative norm of that change; ``gradient``: mean |g|; ``gradient_weight``: Σ|g w|;
            ``integrated_gradients``: Σ|w ∫g|; ``fisher``: Σg² and ``hessian``: |trace| (Hutchinson), each times the
            mean w²; ``magnitude``: ‖w‖; ``size``: 1 / number of weights; ``depth``: layers from here to the end.
        data: ``losses`` or ``images``, as the criterion needs.
        batches: Batches of them; gradients are those of whole batches.
        steps: Points of the path of ``integrated_gradients``.
        samples: Draws of each batch for ``hessian``.
        bits: Of the grid of ``loss`` and ``output``.
    """
    weights = {name: weight.detach() for name, weight in zip(layers, _weights(layers), strict=True)}
    if criterion == "magnitude":
        return {name: float(w.norm()) for name, w in weights.items()}
    if criterion == "size":
        return {name: 1 / w.numel() for name, w in weights.items()}
    if criterion == "depth":
        return {name: float(len(weights) - k) for k, name in enumerate(weights)}
    if criterion == "loss":
        assert data.losses is not None
        losses = data.losses
        truth = measured_sensitivity(layers, lambda: -mean_loss(losses, batches), "grid", bits)
        return {name: one.median for name, one in truth.items()}
    if criterion == "output":
        errors = _output_errors(network, layers, data.images[:batches], (bits,))
        moved = {name: relative_error(w, perturbed(w, "grid", bits)) for name, w in weights.items()}
        return {name: errors[name][bits] / moved[name] if moved[name] else 0.0 for name in layers}
    assert data.losses is not None
    sums = dict.fromkeys(layers, 0.0)
    with traceable(network):
        if criterion == "integrated_gradients":
            for name, layer in layers.items():
                sums[name] = float(integrated_gradients(layer, data.losses, steps, batches).abs().sum())
            return sums
        generator = torch.Generator().manual_seed(int(data.seed))
        count = 0
        for found in _gradients(layers, data.losses, batches, criterion == "hessian"):
            count += 1
            traces = (
                _traces(found, _weights(layers), samples, generator) if criterion == "hessian" else [0.0] * len(found)
            )
            for name, gradient, trace in zip(layers, found, traces, strict=True):
                sums[name] += _local(criterion, gradient.detach(), weights[name], trace)
    return {name: abs(value) / count for name, value in sums.items()}


def _local(criterion: str, gradient: Tensor, weight: Tensor, trace: float) -> float:
    """Return the score of a layer by a batch's gradient or curvature at the network itself."""
    if criterion == "gradient":
        return float(gradient.abs().mean())
    if criterion == "gradient_weight":
        return float((gradient * weight).abs().sum())
    curvature = trace if criterion == "hessian" else float(gradient.square().sum())
    return curvature * float(weight.square().mean())


def _traces(
    gradients: Sequence[Tensor], weights: Sequence[nn.Parameter], samples: int, generator: torch.Generator
) -> list[float]:
    """Return Hutchinson's estimate of the trace of each layer's own block of the Hessian, ``E vᵀ H v``, v = ±1.

    One pass for each layer: v of all layers at once would save passes, and drown the trace in what layers do together.
    """
    totals = [0.0] * len(weights)
    for k, (gradient, weight) in enumerate(zip(gradients, weights, strict=True)):
        for _ in range(samples if gradient.requires_grad else 0):  # linear in the weight: no curvature
            v = (2 * torch.randint(2, weight.shape, generator=generator) - 1).to(weight)
            (row,) = torch.autograd.grad((gradient * v).sum(), weight, retain_graph=True, allow_unused=True)
            totals[k] += 0.0 if row is None else float((row * v).sum())
    return [total / samples for total in totals]


@torch.no_grad()
def _output_errors(
    network: nn.Module, layers: Mapping[str, nn.Module], images: Sequence[Tensor], choices: Sequence[int]
) -> dict[str, dict[int, float]]:
    """Return the relative error of the network's output with one layer on a grid, by layer and bits."""
    expected = torch.cat([network(batch) for batch in images])
    found: dict[str, dict[int, float]] = {}
    for name, layer in layers.items():
        found[name] = {}
        for bits in choices:
            with changed(layer, perturbed(layer.weight.detach(), "grid", bits)):  # type: ignore[union-attr, operator]
                found[name][bits] = relative_error(expected, torch.cat([network(batch) for batch in images]))
    return found


@dataclass(frozen=True)
class Correlation:
    """How well a criterion puts layers in the order of the truth.

    Attributes:
        criterion: Its name.
        family: The changes by which the truth was measured.
        spearman: Rank correlation, -1 to 1; None where one of both is the same for all layers.
        kendall: The same by pairs.
    """

    criterion: str
    family: str
    spearman: float | None
    kendall: float | None


def correlations(
    criteria: Mapping[str, Mapping[str, float]], truths: Mapping[str, Mapping[str, float]]
) -> list[Correlation]:
    """Return rank correlations of every criterion with every truth, each given by name of the layer."""
    found = []
    for family, truth in truths.items():
        for criterion, scores in criteria.items():
            pairs = [[one[name] for name in truth] for one in (scores, truth)]
            if min(len(set(one)) for one in pairs) < 2:
                found.append(Correlation(criterion, family, None, None))
                continue
            with warnings.catch_warnings():
                warnings.simplefilter("ignore")
                values = [float(f(*pairs).statistic) for f in (spearmanr, kendalltau)]
            found.append(Correlation(criterion, family, *values))
    return found


# ------------------------------------------------------------------------------------------------------------ budget


def allocate(
    costs: Mapping[str, Mapping[Option, float]], harms: Mapping[str, Mapping[Option, float]], budget: float
) -> dict[str, Option]:
    """Return an option for each layer, so that costs add up to a budget at most and harms to as little as can be.

    A knapsack with one choice for each layer, solved over ``BINS`` steps of what the budget leaves above the cheapest
    options; a cost counts as the next step above it. What is over in the end is spent too.

    Args:
        costs: Of each option of each layer, such as bytes by bits.
        harms: Of the same. A cheaper option is never taken to do less harm than a dearer one, which would be chance.
        budget: Of all costs together.

    Raises:
        ConfigError: If the cheapest options cost more.
    """
    least = {name: min(own.values()) for name, own in costs.items()}
    room = budget - sum(least.values())
    if room < -1e-9 * abs(budget):
        raise ConfigError(f"a budget of {budget:,.0f} cannot be met: the cheapest options cost {budget - room:,.0f}")
    options = {name: sorted(own, key=lambda one: -own[one]) for name, own in costs.items()}
    monotone: dict[str, dict[Option, float]] = {}
    for name, order in options.items():
        worst = -math.inf
        monotone[name] = {}
        for one in order:
            worst = max(worst, harms[name][one])
            monotone[name][one] = worst

    def total(chosen: Mapping[str, Option], of: Mapping[str, Mapping[Option, float]]) -> float:
        return sum(of[name][one] for name, one in chosen.items())

    best = np.zeros(BINS + 1)  # least harm of the layers so far, by steps spent
    taken: list[np.ndarray] = []
    for name, order in options.items():
        rows = np.full((len(order), BINS + 1), np.inf)
        for row, one in zip(rows, order, strict=True):
            extra = costs[name][one] - least[name]
            steps = math.ceil(extra / room * BINS - 1e-6) if room > 0 else (0 if extra <= 0 else BINS + 1)
            if steps <= BINS:
                row[steps:] = best[: BINS + 1 - steps] + monotone[name][one]
        taken.append(rows.argmin(0))
        best = rows.min(0)
    chosen: dict[str, Option] = {}
    left = BINS
    for (name, order), row in zip(reversed(options.items()), reversed(taken), strict=True):
        chosen[name] = order[row[left]]
        extra = costs[name][chosen[name]] - least[name]
        left -= math.ceil(extra / room * BINS - 1e-6) if room > 0 else 0
    chosen = {name: chosen[name] for name in costs}
    while True:  # what rounding up left over
        spent = total(chosen, costs)
        raises = [
            ((monotone[name][now] - monotone[name][one]) / (costs[name][one] - costs[name][now]), -k, name, one)
            for k, (name, now) in enumerate(chosen.items())
            for one in options[name]
            if 0 < costs[name][one] - costs[name][now] <= budget - spent and monotone[name][one] < monotone[name][now]
        ]
        if not raises:
            break
        *_, name, one = max(raises, key=lambda move: move[:2])
        chosen[name] = one
    shared = set.intersection(*(set(own) for own in costs.values())) if costs else set()
    even = [dict.fromkeys(costs, one) for one in shared]
    fitting = [one for one in even if total(one, costs) <= budget * (1 + 1e-12)]
    return min([chosen, *fitting], key=lambda one: total(one, monotone))


class SAfER:
    """Weights on uniform grids, each layer with bits of its own, as sensitive as it is and as a budget allows.

    Args:
        bits: Mean bits of a weight over all layers that may choose; sets the budget of bytes.
        kilobytes: Budget of all weights that are quantized, in 1000 bytes, in the place of ``bits``.
        choices: Bits that a layer may have, each from 2 to 8.
        criterion: One of ``CRITERIA``.
        batches: Batches of images or losses that it is measured on.
        steps: See ``criterion_scores``.
        samples: See there.
        compare: Families of changes (``FAMILIES``) for which the truth is measured and all criteria are compared.
        draws: Changes of each layer for these.
        input_bits: Bits of an input, measured on training images; None leaves inputs floats.
        edge_bits: Bits of the first and last layer, outside of the choice; None treats them like the others.
        protect: Names of layers, or their beginnings, that stay floats.
    """

    name, stage = "safer", "weights"

    def __init__(
        self,
        bits: float = 4,
        kilobytes: float | None = None,
        choices: Sequence[int] = (2, 3, 4, 5, 6, 8),
        criterion: str = "output",
        batches: int = 4,
        steps: int = 8,
        samples: int = 4,
        compare: Sequence[str] = (),
        draws: int = 3,
        input_bits: int | None = None,
        edge_bits: int | None = 8,
        protect: Sequence[str] = (),
    ) -> None:
        check_choices(self.name, criterion=(criterion, CRITERIA))
        for family in compare:
            if family not in FAMILIES:
                raise ConfigError(f"compression.{self.name}.compare=[{family}]: {near(str(family), FAMILIES)}")
        check_bits(self.name, input_bits=input_bits, edge_bits=edge_bits)
        for number in choices:
            check_bits(self.name, choices=number)
        check_counts(self.name, batches=batches, steps=steps, samples=samples, draws=draws)
        if len(set(choices)) < 2:
            raise ConfigError(f"compression.{self.name}.choices={list(choices)}: at least two, or take uniform")
        if kilobytes is None and not min(choices) <= float(bits) <= max(choices):
            raise ConfigError(f"compression.{self.name}.bits={bits}: within choices={sorted(choices)}")
        if kilobytes is not None and float(kilobytes) <= 0:
            raise ConfigError(f"compression.{self.name}.kilobytes={kilobytes}: above 0")
        self.bits, self.kilobytes, self.choices = float(bits), kilobytes, sorted({int(one) for one in choices})
        self.criterion, self.batches, self.steps, self.samples = criterion, int(batches), int(steps), int(samples)
        self.compare, self.draws, self.input_bits = tuple(compare), int(draws), input_bits
        self.edge_bits, self.protect = edge_bits, tuple(protect)
        labels = criterion in (*GRADIENTS, "loss") or self.compare
        images = criterion == "output" or input_bits is not None or self.compare
        self.needs: tuple[str, ...] = (*(("images",) if images else ()), *(("losses",) if labels else ()))

    def prepare(self, network: nn.Module, data: Data) -> None:
        """Nothing is needed of the untouched network."""

    def __call__(self, network: nn.Module, data: Data) -> Report:
        """Measure, share the budget out, and round every layer."""
        layers = quantizable(network, self.protect)
        self._check(layers)
        edges = edge_layers(network, layers) if self.edge_bits is not None else set()
        free = {name: layer for name, layer in layers.items() if name not in edges}
        report = Report(
            self.name,
            {
                key: getattr(self, key)
                for key in ("bits", "kilobytes", "choices", "criterion", "compare", "input_bits", "edge_bits")
            },
        )
        costs: dict[str, dict[int, float]] = {}
        rounded = {n: {b: round_to_grid(_weight(layer), b) for b in self.choices} for n, layer in free.items()}
        for name, own in rounded.items():
            costs[name] = {bits: float(stored.stored_bytes) for bits, stored in own.items()}
        fixed = {n: round_to_grid(_weight(layers[n]), int(self.edge_bits or 8)) for n in edges}
        budget = self._budget(free, costs, sum(one.stored_bytes for one in fixed.values()))
        scores, harms = self._harms(network, free, data)
        chosen = allocate(costs, harms, budget) if free else {}
        if self.compare:
            self._compare(network, free, data, report)
        ranges = input_ranges(network, list(layers), data.images) if self.input_bits is not None else {}
        order = {name: k for k, name in enumerate(sorted(scores, key=lambda one: -scores[one]), 1)}
        sizes = {name: _weight(layer).numel() for name, layer in free.items()}  # codes have no weight to ask
        for name in layers:
            stored, bits = (
                (fixed[name], int(self.edge_bits or 8))
                if name in edges
                else (rounded[name][chosen[name]], chosen[name])
            )
            note = "" if name in edges else f"sensitivity {scores[name]:.3g}, rank {order[name]} of {len(order)}"
            record = put_weight(network, name, stored, self.name, bits, note)
            if self.input_bits is not None and name in ranges:
                record.input_bits = bits if name in edges else int(self.input_bits)
                low, high = ranges[name]
                put_inputs(network, name, low, high, record.input_bits)
            report.layers.append(record)
        held = sum(costs[name][bits] for name, bits in chosen.items())
        report.totals = {
            "budget": budget,
            "bytes": held,
            "mean_bits": sum(bits * sizes[name] for name, bits in chosen.items()) / max(sum(sizes.values()), 1),
        }
        report.details["sensitivity"] = {self.criterion: scores}
        return report

    def _check(self, layers: Mapping[str, nn.Module]) -> None:
        compressed = {n: one for n, one in layers.items() if isinstance(one, CompressedConv2d | CompressedLinear)}
        for name, layer in compressed.items():
            if layer.stored is not None:
                raise ConfigError(f"{name}: its weight is codes already; safer takes the place of other quantizers")
            if layer.inputs is not None and (self.criterion in GRADIENTS or self.compare):
                raise ConfigError(
                    f"{name}: gradients do not pass its rounded inputs; use compression.{self.name}.criterion=output "
                    "or loss and compare=[], or leave spiq out"
                )

    def _budget(self, free: Mapping[str, nn.Module], costs: Mapping[str, Mapping[int, float]], edges: int) -> float:
        """Return the bytes that layers with a choice may take together."""
        if self.kilobytes is not None:
            left = 1000 * float(self.kilobytes) - edges
            least = sum(min(own.values()) for own in costs.values())
            if left < least:
                raise ConfigError(
                    f"compression.{self.name}.kilobytes={self.kilobytes:g}: weights take {(least + edges) / 1000:g} at "
                    f"least with choices={self.choices} and edge_bits={self.edge_bits}"
                )
            return left
        total = 0.0
        for name, own in costs.items():
            numel = _weight(free[name]).numel()
            bits = self.choices[0]
            scales = own[bits] - packed_bytes(numel, bits)
            total += math.ceil(numel * self.bits / 8) + scales
        return total

    def _harms(
        self, network: nn.Module, layers: Mapping[str, nn.Module], data: Data
    ) -> tuple[dict[str, float], dict[str, dict[int, float]]]:
        """Return the criterion's score of each layer, and the harm that each of its choices is taken to do."""
        scores = self._scores(network, layers, self.criterion, data)
        if self.criterion == "output":  # squares add up where errors are independent
            errors = _output_errors(network, layers, data.images[: self.batches], self.choices)
            return scores, {name: {b: e * e for b, e in own.items()} for name, own in errors.items()}
        if self.criterion == "loss":
            assert data.losses is not None
            before = mean_loss(data.losses, self.batches)
            harms: dict[str, dict[int, float]] = {}
            for name, layer in layers.items():
                harms[name] = {}
                for bits in self.choices:
                    with changed(layer, perturbed(_weight(layer), "grid", bits)):
                        harms[name][bits] = mean_loss(data.losses, self.batches) - before
            return scores, harms
        order = 2 if self.criterion in SECOND_ORDER else 1
        moved = {
            name: {b: relative_error(_weight(layer), perturbed(_weight(layer), "grid", b)) for b in self.choices}
            for name, layer in layers.items()
        }
        return scores, {name: {b: scores[name] * far**order for b, far in own.items()} for name, own in moved.items()}

    def _scores(
        self, network: nn.Module, layers: Mapping[str, nn.Module], criterion: str, data: Data
    ) -> dict[str, float]:
        return criterion_scores(network, layers, criterion, data, self.batches, self.steps, self.samples)

    def _compare(self, network: nn.Module, layers: Mapping[str, nn.Module], data: Data, report: Report) -> None:
        """Measure the truth of each family and write how well every criterion foretells it."""
        assert data.losses is not None
        losses = data.losses
        truths: dict[str, dict[str, float]] = {}
        for family in self.compare:
            found = measured_sensitivity(
                layers, lambda: -mean_loss(losses, self.batches), family, None, self.draws, data.seed
            )
            truths[family] = {name: one.median for name, one in found.items()}
            report.details[f"truth {family}"] = {
                "median": truths[family],
                "worst": {name: one.worst for name, one in found.items()},
            }
        criteria = {one: self._scores(network, layers, one, data) for one in CRITERIA}
        report.details["criteria"] = criteria
        for family, truth in truths.items():
            rows = correlations(criteria, {family: truth})
            report.details[f"correlation {family}"] = {
                "spearman": {row.criterion: row.spearman for row in rows},
                "kendall": {row.criterion: row.kendall for row in rows},
            }
            best = sorted((row for row in rows if row.spearman is not None), key=lambda row: -(row.spearman or 0))
            told = ", ".join(f"{row.criterion} {row.spearman:.2f}" for row in best)
            report.notes.append(f"rank correlation with the loss under {family} over {len(truth)} layers: {told}")


def _weight(layer: nn.Module) -> Tensor:
    return layer.weight.detach()  # type: ignore[union-attr, operator]
