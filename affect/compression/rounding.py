# SPDX-License-Identifier: Apache-2.0
"""Post-training quantization by gradients: codes are learned so that layers or blocks answer as before.

AdaRound decides for each weight whether it is rounded up or down: ``W' = s clip(⌊W/s⌋ + h(V), -n, n)`` with
``h(V) = clip(sigmoid(V) (ζ - γ) + γ, 0, 1)``, ζ = 1.1, γ = -0.1, and minimises ``‖f(W x) - f(W' x')‖² +
λ Σ (1 - |2 h(V) - 1|^β)`` while β falls (Nagel et al.: Up or down? Adaptive rounding for post-training quantization.
ICML 2020, arXiv 2004.10568). What may be chosen differently (loss, unit, learned variable, grid, optimizer, inputs)
are the questions of Yvinec, Dapogny and Bailly: Gradient-based post-training quantization: challenging the status quo.
arXiv 2308.07662, which does not say here which choice wins, so all of them are arguments.
"""

from __future__ import annotations

import copy
import math
from collections.abc import Callable, Iterable, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from affect.compression.arguments import check_bits, check_choices, check_range
from affect.compression.base import Data, quantizable
from affect.compression.layers import CompressedConv2d, CompressedLinear
from affect.compression.packing import pack
from affect.compression.power import power_grid, search_exponent
from affect.compression.report import LayerRecord, Report, signal_to_noise
from affect.compression.spiq import give_back
from affect.compression.stored import GridWeight, StoredWeight
from affect.compression.uniform import bits_by_layer, compressed_layer, put_weight, watched_inputs
from affect.errors import ConfigError, near

__all__ = [
    "AdaRound",
    "GradientRounding",
    "LearnedCodes",
    "LearnedRounding",
    "Learner",
    "Schedule",
    "Trace",
    "continuous_codes",
    "learn",
    "power_decode",
]

ZETA, GAMMA = 1.1, -0.1
"""Ends to which the sigmoid is stretched before it is cut to [0, 1]."""

CHOICES = {
    "variable": ("offset", "codes", "all"),
    "grid": ("uniform", "power"),
    "loss": ("mse", "cosine", "kl", "gradient"),
    "unit": ("layer", "block"),
    "optimizer": ("adam", "adamw", "sgd"),
    "inputs": ("float", "quantized", "mix"),
}

EXPONENTS = (0.2, 1.5)
"""Exponents that can be learned."""


# ---------------------------------------------------------------------------------------------- differentiable grid


class _PowerDecode(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, codes: Tensor, exponent: Tensor, largest: Tensor, levels: int) -> Tensor:  # noqa: ANN401
        ratio = codes.abs() / levels
        values = codes.sign() * ratio.pow(1 / exponent)
        ctx.save_for_backward(codes, exponent, largest, values)
        ctx.levels = levels
        return values * largest

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor, Tensor, Tensor, None]:  # noqa: ANN401
        codes, exponent, largest, values = ctx.saved_tensors
        ratio = codes.abs() / ctx.levels
        # At 0 the slope is 0 or infinite unless a = 1: codes there take that of the middle of the first step.
        slope = ratio.clamp_min(0.5 / ctx.levels).pow(1 / exponent - 1) / exponent
        by_codes = grads[0] * slope * largest / ctx.levels
        logs = torch.where(ratio > 0, ratio, torch.ones_like(ratio)).log()
        by_exponent = (grads[0] * values * largest * -logs).sum() / exponent.square()
        return by_codes, by_exponent.view(exponent.shape), (grads[0] * values).sum_to_size(largest.shape), None


def power_decode(codes: Tensor, exponent: Tensor, largest: Tensor, levels: int) -> Tensor:
    """Return ``sign(q) (|q| / n)^(1/a) m`` with finite gradients for codes q, exponent a ``()`` and m everywhere."""
    out: Tensor = _PowerDecode.apply(codes, exponent, largest, levels)  # type: ignore[no-untyped-call]
    return out


def continuous_codes(weight: Tensor, exponent: Tensor, largest: Tensor, levels: int) -> Tensor:
    """Return ``n sign(w) (|w| / m)^a`` before rounding; its gradient for a is 0 at w = 0, where |w|^a ln|w| is."""
    ratio = weight.abs() / largest
    logs = torch.where(ratio > 0, ratio, torch.ones_like(ratio)).log()
    return levels * weight.sign() * (exponent * logs).exp()


def annealed(step: int, steps: int, warm_start: float, start: float, end: float) -> float:
    """Return β of a step: ``start`` until the warm start is over, then in a line down to ``end``."""
    first = warm_start * steps
    return start if step <= first else start + (end - start) * (step - first) / max(steps - first, 1)


# --------------------------------------------------------------------------------------------------------- learners


class Learner(StoredWeight):
    """A weight on a grid whose codes are learned; takes the place of the stored one meanwhile.

    Args:
        weight: Floats ``(O, …)``.
        grid: Where they were rounded to; its bits, largest values and exponent are those of the result.
        learn_exponent: Whether the exponent is learned, within ``EXPONENTS``.
        learn_scale: Whether the largest values are learned.
    """

    def __init__(
        self, weight: Tensor, grid: GridWeight, learn_exponent: bool = False, learn_scale: bool = False
    ) -> None:
        super().__init__()
        self.shape, self.template, self.levels = grid.shape, copy.deepcopy(grid), grid.levels
        view = [-1] + [1] * (weight.ndim - 1)
        self.register_buffer("start_largest", grid.largest.detach().float().view(view).clone())
        self.log_scale = nn.Parameter(torch.zeros_like(self.start_largest)) if learn_scale else None
        self.register_buffer("start_exponent", grid.exponent.detach().clone())
        self.position = None
        if learn_exponent:
            low, high = EXPONENTS
            share = (grid.exponent.detach().clamp(low + 1e-3, high - 1e-3) - low) / (high - low)
            self.position = nn.Parameter(torch.logit(share))
        floats = weight.detach().float()
        codes = continuous_codes(floats, self.start_exponent, self.start_largest, self.levels)
        self.register_buffer("exact", codes.clamp(-self.levels, self.levels), persistent=False)

    def exponent(self) -> Tensor:
        """Return the exponent as it is now ``()``."""
        if self.position is None:
            return self.start_exponent
        low, high = EXPONENTS
        return low + (high - low) * torch.sigmoid(self.position)

    def largest(self) -> Tensor:
        """Return the largest values as they are now, broadcast against the weight."""
        return self.start_largest if self.log_scale is None else self.start_largest * self.log_scale.exp()

    def soft_codes(self) -> Tensor:
        """Return codes with gradients."""
        raise NotImplementedError

    def hard_codes(self) -> Tensor:
        """Return whole codes, without."""
        raise NotImplementedError

    def penalty(self, beta: float) -> Tensor:
        """Return the sum that pulls what is learned to whole codes."""
        raise NotImplementedError

    def undecided(self) -> float:
        """Return the share of weights whose code is not settled."""
        raise NotImplementedError

    def forward(self) -> Tensor:
        """Return the weight, with gradients."""
        return power_decode(self.soft_codes(), self.exponent(), self.largest(), self.levels)

    @torch.no_grad()
    def frozen(self) -> GridWeight:
        """Return the weight as whole codes."""
        made = copy.deepcopy(self.template)
        made.codes = pack(self.hard_codes().long() + self.levels, made.bits)
        made.largest = self.largest().detach().flatten().clone()
        made.exponent = self.exponent().detach().clone()
        return made


class LearnedRounding(Learner):
    """Each code is the float's floor, or one more (AdaRound)."""

    def __init__(
        self, weight: Tensor, grid: GridWeight, learn_exponent: bool = False, learn_scale: bool = False
    ) -> None:
        super().__init__(weight, grid, learn_exponent, learn_scale)
        self.register_buffer("floor", self.exact.floor(), persistent=False)
        share = (self.exact - self.floor - GAMMA) / (ZETA - GAMMA)
        self.offset = nn.Parameter(torch.logit(share))

    def up(self) -> Tensor:
        """Return h(V), how far each code is on its way up, in [0, 1]."""
        return (torch.sigmoid(self.offset) * (ZETA - GAMMA) + GAMMA).clamp(0, 1)

    def soft_codes(self) -> Tensor:
        """Return ``⌊z⌋ + h(V)``."""
        return (self.floor + self.up()).clamp(-self.levels, self.levels)

    def hard_codes(self) -> Tensor:
        """Return the floor or one more, whichever is nearer to h(V)."""
        return (self.floor + (self.up() >= 0.5)).clamp(-self.levels, self.levels)

    def penalty(self, beta: float) -> Tensor:
        """Return ``Σ (1 - |2h - 1|^β)``."""
        return (1 - (2 * self.up() - 1).abs().pow(beta)).sum()

    def undecided(self) -> float:
        """Return the share of h(V) strictly between 0 and 1."""
        up = self.up()
        return float(((up > 0) & (up < 1)).float().mean())


class LearnedCodes(Learner):
    """Each code is free to take any value of the grid: rounded forward, straight through backward."""

    def __init__(
        self, weight: Tensor, grid: GridWeight, learn_exponent: bool = False, learn_scale: bool = False
    ) -> None:
        super().__init__(weight, grid, learn_exponent, learn_scale)
        self.codes = nn.Parameter(self.exact.clone())

    def soft_codes(self) -> Tensor:
        """Return ``z + stop_gradient(round(clip(z)) - z)``."""
        return self.codes + (self.hard_codes() - self.codes).detach()

    def hard_codes(self) -> Tensor:
        """Return ``round(clip(z))``."""
        return self.codes.detach().clamp(-self.levels, self.levels).round()

    def penalty(self, beta: float) -> Tensor:
        """Return ``Σ (1 - |2 frac(z) - 1|^β)``."""
        return (1 - (2 * (self.codes - self.codes.detach().floor()) - 1).abs().pow(beta)).sum()

    def undecided(self) -> float:
        """Return the share of codes further than a tenth from a whole number."""
        return float(((self.codes - self.codes.round()).abs() > 0.1).float().mean())


# --------------------------------------------------------------------------------------------------------- learning


@dataclass(frozen=True)
class Schedule:
    """How codes are learned.

    Attributes:
        steps: Of the optimizer.
        batch_size: Images of a step.
        optimizer: ``adam``, ``adamw`` or ``sgd`` (momentum 0.9).
        rate: Learning rate of rounding offsets or codes, in code units.
        exponent_rate: Of the exponent.
        scale_rate: Of the logarithm of largest values, and of biases.
        strength: λ of the pull to whole codes.
        warm_start: Part of the steps without it.
        betas: β after the warm start and at the end.
    """

    steps: int = 2000
    batch_size: int = 32
    optimizer: str = "adam"
    rate: float = 1e-2
    exponent_rate: float = 1e-3
    scale_rate: float = 1e-4
    strength: float = 1e-2
    warm_start: float = 0.2
    betas: tuple[float, float] = (20.0, 2.0)


@dataclass
class Trace:
    """What learning came to.

    Attributes:
        before: Loss over all images with the codes at the beginning.
        after: With whole codes at the end.
        undecided: Share of weights whose code was not settled when it was made whole.
    """

    before: float
    after: float
    undecided: float


def learn(
    learners: Mapping[str, Learner],
    biases: Sequence[nn.Parameter],
    loss: Callable[[Tensor], Tensor],
    count: int,
    schedule: Schedule,
    generator: torch.Generator,
) -> None:
    """Minimise a loss and the pull to whole codes together.

    Args:
        learners: By layer; they are in place.
        biases: Learned with them.
        loss: Of a batch, given the numbers of its images.
        count: Images.
        schedule: How.
        generator: Of the draws of images.
    """
    groups: dict[float, list[nn.Parameter]] = {}
    for learner in learners.values():
        for key, parameter in learner.named_parameters():
            rates = {"position": schedule.exponent_rate, "log_scale": schedule.scale_rate}
            groups.setdefault(rates.get(key, schedule.rate), []).append(parameter)
    groups.setdefault(schedule.scale_rate, []).extend(biases)
    nodes = [{"params": parameters, "lr": rate} for rate, parameters in groups.items() if parameters]
    kinds: dict[str, Callable[..., torch.optim.Optimizer]] = {"adam": torch.optim.Adam, "adamw": torch.optim.AdamW}
    make = kinds.get(schedule.optimizer)
    optimizer = torch.optim.SGD(nodes, lr=schedule.rate, momentum=0.9) if make is None else make(nodes)
    parameters = [parameter for node in nodes for parameter in node["params"]]  # type: ignore[attr-defined]
    for step in range(schedule.steps):
        chosen = torch.randint(count, (min(schedule.batch_size, count),), generator=generator)
        total = loss(chosen)
        if schedule.strength > 0 and step >= schedule.warm_start * schedule.steps:
            beta = annealed(step, schedule.steps, schedule.warm_start, *schedule.betas)
            total = total + schedule.strength * torch.stack([one.penalty(beta) for one in learners.values()]).sum()
        # Not backward(): layers of the unit that are not learned must gather no gradients.
        for parameter, grad in zip(parameters, torch.autograd.grad(total, parameters, allow_unused=True), strict=True):
            parameter.grad = grad
        optimizer.step()


def channel_axis(output: Tensor) -> int:
    """Return the dimension of channels: 1 for maps ``(B, C, H, W)``, -1 for vectors and tokens."""
    return 1 if output.ndim == 4 else -1


def distance(kind: str, output: Tensor, target: Tensor, weights: Tensor | None = None) -> Tensor:
    """Return the loss between two outputs ``(B, …)``.

    Args:
        kind: ``mse`` (summed over channels, averaged over the rest), ``gradient`` (the same, weighed), ``cosine``
            (one minus the cosine of an image's outputs) or ``kl`` (outputs as logits).
        output: Of the quantized network.
        target: Of the float network.
        weights: Of each element ``(…)``, for ``gradient``.
    """
    if kind == "cosine":
        return 1 - F.cosine_similarity(output.flatten(1), target.flatten(1)).mean()
    if kind == "kl":
        logs = F.log_softmax(output.flatten(1), 1), F.log_softmax(target.flatten(1), 1)
        return F.kl_div(*logs, reduction="batchmean", log_target=True)
    squared = (output - target).square()
    return (squared if weights is None else squared * weights).sum(channel_axis(output)).mean()


# -------------------------------------------------------------------------------------------- what units see


class _ReachedError(Exception):
    """Ends a forward pass once a unit has run."""


@torch.no_grad()
def unit_samples(network: nn.Module, name: str, batches: Iterable[Tensor]) -> tuple[Tensor, Tensor]:
    """Return what goes into a unit and what comes out of it, for all images.

    Raises:
        ConfigError: If a unit takes or gives several tensors.
    """
    seen: list[tuple[Tensor, Tensor]] = []

    def hook(module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any], output: Any) -> None:  # noqa: ANN401
        tensors = [value for value in (*args, *kwargs.values()) if isinstance(value, Tensor)]
        if len(tensors) != 1 or not isinstance(output, Tensor) or not args:
            raise ConfigError(f"{name or 'the network'} takes or gives several tensors: set unit=layer")
        seen.append((tensors[0].detach(), output.detach()))
        raise _ReachedError

    handle = network.get_submodule(name).register_forward_hook(hook, with_kwargs=True)
    try:
        for batch in batches:
            try:
                network(batch)
            except _ReachedError:
                continue
    finally:
        handle.remove()
    return torch.cat([one for one, _ in seen]), torch.cat([other for _, other in seen])


@torch.no_grad()
def order_of_use(network: nn.Module, names: Sequence[str], images: Tensor) -> list[str]:
    """Return the layers that run, in the order in which they first do."""
    found: dict[str, None] = {}
    with watched_inputs(network, names, lambda name, _: found.setdefault(name)):
        network(images)
    return list(found)


def block_of(network: nn.Module, name: str) -> str:
    """Return the block of a layer: the outermost member of a list of modules that is no list itself; or the layer."""
    parts = name.split(".")
    lists = (nn.Sequential, nn.ModuleList)
    for k in range(1, len(parts)):
        parent = network.get_submodule(".".join(parts[: k - 1]))
        place = ".".join(parts[:k])
        if isinstance(parent, lists) and not isinstance(network.get_submodule(place), lists):
            return place
    return name


def units(network: nn.Module, names: Sequence[str], kind: str) -> dict[str, list[str]]:
    """Return the layers of each unit, by the unit's name."""
    found: dict[str, list[str]] = {}
    for name in names:
        found.setdefault(block_of(network, name) if kind == "block" else name, []).append(name)
    return found


def float_copy(network: nn.Module) -> nn.Module:
    """Return the network with floats for weights and inputs, as far as its floats are known.

    Scales that inputs and weights share (SPIQ) are given back; where codes hold them, inputs stay on their grids.
    """
    made = copy.deepcopy(network).eval()
    for layer in made.modules():
        if isinstance(layer, CompressedConv2d | CompressedLinear):
            if layer.stored is not None and layer.floats is not None:
                floats = layer.floats
                layer.stored = None
                layer.weight = nn.Parameter(floats.clone())
            if layer.inputs is not None and layer.inputs.absorbed:
                if layer.stored is None:
                    give_back(layer)
            else:
                layer.inputs = None
    return made.requires_grad_(False)


def output_weights(network: nn.Module, name: str, losses: Iterable[Tensor] | Callable[[], Iterable[Tensor]]) -> Tensor:
    """Return the mean squared gradient of the training loss for each element of a unit's output, of mean 1."""
    seen: list[Tensor] = []

    def hook(module: nn.Module, args: Any, output: Tensor) -> Tensor:  # noqa: ANN401
        output = output if output.requires_grad else output.detach().requires_grad_()
        seen.append(output)
        return output

    total, count = None, 0
    handle = network.get_submodule(name).register_forward_hook(hook)
    try:
        for loss in losses() if callable(losses) else losses:
            squares = torch.autograd.grad(loss, seen[-1])[0].square()
            total = squares.sum(0) if total is None else total + squares.sum(0)
            count += len(squares)
            seen.clear()
    finally:
        handle.remove()
    if total is None:
        raise ConfigError("loss=gradient: there are no labelled images")
    mean = total.mean()
    return total / mean if float(mean) > 0 else torch.ones_like(total)


@contextmanager
def _in_place(network: nn.Module, learners: Mapping[str, Learner]) -> Any:  # noqa: ANN401
    """Put learners in the place of stored weights."""
    before = {name: compressed_layer(network, name).stored for name in learners}
    for name, learner in learners.items():
        compressed_layer(network, name).stored = learner
    try:
        yield
    finally:
        for name, stored in before.items():
            compressed_layer(network, name).stored = stored


# ------------------------------------------------------------------------------------------------------- transforms


@dataclass
class _Problem:
    """The loss of one unit on calibration images."""

    module: nn.Module
    student: Tensor
    teacher: Tensor
    target: Tensor
    kind: str
    inputs: str
    mix: float
    generator: torch.Generator
    weights: Tensor | None = None
    batch: int = field(default=64)

    def drawn(self, chosen: Tensor) -> Tensor:
        """Return the loss of some images, with inputs as asked for."""
        if self.inputs == "float":
            x = self.teacher[chosen]
        elif self.inputs == "quantized":
            x = self.student[chosen]
        else:
            quantized = torch.rand(self.student[chosen].shape, generator=self.generator) < self.mix
            x = torch.where(quantized.to(self.student.device), self.student[chosen], self.teacher[chosen])
        return distance(self.kind, self.module(x), self.target[chosen], self.weights)

    @torch.no_grad()
    def whole(self) -> float:
        """Return the loss over all images, with the inputs that the quantized network gives."""
        total = 0.0
        for part in torch.arange(len(self.target)).split(self.batch):
            output = self.module(self.student[part])
            total += float(distance(self.kind, output, self.target[part], self.weights)) * len(part)
        return total / len(self.target)


class GradientRounding:
    """Learns codes layer by layer or block by block so that the network answers as before.

    Layers that are floats get a grid of ``bits`` here; those that uniform, PowerQuant, TQuant or MQuant rounded before
    keep theirs, and their inputs' grids. Arguments are those of ``AdaRound``.
    """

    name, stage = "", "rounding"

    def __init__(
        self,
        bits: int,
        grid: str,
        exponent: float | None,
        per_channel: bool,
        variable: str,
        learn_exponent: bool,
        learn_scale: bool,
        loss: str,
        unit: str,
        inputs: str,
        mix: float,
        schedule: Schedule,
        memory: float,
        layer_bits: Mapping[str, int] | None,
        edge_bits: int | None,
        protect: Sequence[str],
    ) -> None:
        chosen = {"variable": variable, "grid": grid, "loss": loss, "unit": unit, "inputs": inputs}
        chosen["optimizer"] = schedule.optimizer
        check_choices(self.name, **{key: (value, CHOICES[key]) for key, value in chosen.items()})
        extra = {f"layer_bits.{layer}": value for layer, value in (layer_bits or {}).items()}
        check_bits(self.name, bits=bits, edge_bits=edge_bits, **extra)
        check_range(self.name, 0, 1, {"mix": mix, "warm_start": schedule.warm_start})
        check_range(self.name, *EXPONENTS, {"exponent": exponent})
        for key, number in {"memory": memory, **vars(schedule)}.items():
            if key in ("memory", "steps", "batch_size", "rate") and not number > 0:
                raise ConfigError(f"compression.{self.name}.{key}={number}: more than 0")
        self.bits, self.grid, self.exponent, self.per_channel = int(bits), grid, exponent, bool(per_channel)
        self.variable, self.learn_exponent, self.learn_scale = variable, bool(learn_exponent), bool(learn_scale)
        self.loss, self.unit, self.inputs, self.mix, self.schedule = loss, unit, inputs, float(mix), schedule
        self.memory, self.layer_bits = float(memory), {str(k): int(v) for k, v in (layer_bits or {}).items()}
        self.edge_bits, self.protect = edge_bits, tuple(protect)
        self.needs: tuple[str, ...] = ("images", "losses") if loss == "gradient" else ("images",)

    def prepare(self, network: nn.Module, data: Data) -> None:
        """Nothing is needed of the untouched network."""

    def put_grids(self, network: nn.Module) -> dict[str, int]:
        """Give every layer without codes a grid, and return the bits of all."""
        layers = quantizable(network, self.protect)
        unknown = [name for name in self.layer_bits if name not in layers]
        if unknown:
            raise ConfigError(
                f"compression.{self.name}.layer_bits.{unknown[0]}: no such layer; {near(unknown[0], layers)}"
            )
        bits = bits_by_layer(network, layers, self.bits, self.edge_bits) | self.layer_bits
        fresh = {}
        for name in layers:
            layer = compressed_layer(network, name)
            if layer.stored is None:
                fresh[name] = layer.weight.detach()
            elif not isinstance(layer.stored, GridWeight):
                raise ConfigError(
                    f"compression.{self.name}: {name} has codes on no grid ({type(layer.stored).__name__}), which "
                    "cannot be learned: after red set compression.red.store=floats, or put uniform or powerquant in "
                    f"between; else leave out the method before, or protect=[{name}]"
                )
            elif layer.floats is None:
                raise ConfigError(
                    f"compression.{self.name}: the weights of {name} are codes and what they were before is not known; "
                    f"round in the same run that quantizes, or protect=[{name}]"
                )
            else:
                bits[name] = layer.stored.bits
        exponent = 1.0
        if self.grid == "power":
            found = self.exponent
            each = [bits[name] for name in fresh]
            exponent = float(found) if found else search_exponent(list(fresh.values()), each, self.per_channel)
        for name, weight in fresh.items():
            compressed_layer(network, name).store(power_grid(weight, bits[name], exponent, self.per_channel))
        return bits

    def __call__(self, network: nn.Module, data: Data) -> Report:
        """Learn the codes of every convolution and linear layer that runs."""
        bits = self.put_grids(network)
        before = {name: compressed_layer(network, name).stored for name in bits}
        keys = ("grid", "variable", "loss", "unit", "inputs", "learn_exponent", "learn_scale")
        report = Report(
            self.name, {"bits": self.bits, **{k: getattr(self, k) for k in keys}, "steps": self.schedule.steps}
        )
        teacher = float_copy(network)
        used = order_of_use(network, list(bits), data.images[0])
        records: dict[str, LayerRecord] = {}
        kept = moved = total = 0
        undecided, fewest = [], sum(len(batch) for batch in data.images)
        for number, (place, names) in enumerate(units(network, used, self.unit).items()):
            generator = torch.Generator().manual_seed(data.seed * 100_003 + number)
            problem = self.problem(network, teacher, place, data, generator)
            fewest = min(fewest, len(problem.target))
            trace, was_better = self.fit(network, names, problem, generator)
            kept += was_better
            undecided.append(trace.undecided)
            for name in names:
                first = before[name]
                layer = compressed_layer(network, name)
                stored = layer.stored
                assert isinstance(first, GridWeight)
                assert isinstance(stored, GridWeight)
                changed = int((stored.integers() != first.integers()).sum())
                moved, total = moved + changed, total + math.prod(stored.shape)
                note = f"{changed / math.prod(stored.shape):.1%} of codes moved; loss {trace.before:.3g} → "
                note += f"{trace.after:.3g}" + (f" of {place}" if place != name else "")
                records[name] = self.record(network, name, first, bits[name], note)
        for name in bits:
            first = before[name]
            assert isinstance(first, GridWeight)
            report.layers.append(
                records.get(name) or self.record(network, name, first, bits[name], "never runs: rounded to nearest")
            )
        report.totals = {"moved": moved / max(total, 1), "undecided": sum(undecided) / max(len(undecided), 1)}
        if kept:
            report.totals["kept"] = kept
            report.notes.append(f"{kept} units keep the codes that they had, which answered better than learned ones")
        if fewest < sum(len(batch) for batch in data.images):
            report.notes.append(f"as few as {fewest} images were used for a unit, to stay below memory={self.memory}")
        return report

    def problem(
        self, network: nn.Module, teacher: nn.Module, place: str, data: Data, generator: torch.Generator
    ) -> _Problem:
        """Return the loss of a unit, on as many images as fit the memory."""
        if self.loss == "kl":
            images = torch.cat(list(data.images))
            with torch.no_grad():
                target = torch.cat([teacher(batch) for batch in data.images])
            return _Problem(network, images, images, target, "kl", "quantized", self.mix, generator)
        one, out = unit_samples(network, place, [data.images[0][:1]])
        image = (2 * one.numel() + out.numel()) * one.element_size()
        most = max(1, int(self.memory * 2**30 / image))
        batches, left = [], most
        for batch in data.images:
            batches.append(batch[:left])
            left -= len(batches[-1])
            if left == 0:
                break
        floats, target = unit_samples(teacher, place, batches)
        student = floats if self.inputs == "float" else unit_samples(network, place, batches)[0]
        weights = None
        if self.loss == "gradient":
            assert data.losses is not None
            weights = output_weights(network, place, data.losses)
            if weights.shape != target.shape[1:]:  # the loss saw images of another size
                axes = [axis for axis in range(weights.ndim) if axis != channel_axis(target) % target.ndim - 1]
                weights = weights.mean(axes, keepdim=True)
        module = network.get_submodule(place)
        return _Problem(module, student, floats, target, self.loss, self.inputs, self.mix, generator, weights)

    def learner(self, floats: Tensor, grid: GridWeight) -> Learner:
        """Return what learns the codes of a layer."""
        kind = LearnedRounding if self.variable == "offset" else LearnedCodes
        return kind(floats, grid, self.learn_exponent, self.learn_scale or self.variable == "all")

    def fit(
        self, network: nn.Module, names: Sequence[str], problem: _Problem, generator: torch.Generator
    ) -> tuple[Trace, bool]:
        """Learn the codes of a unit; keep those that it had where they answer better."""
        layers = {name: compressed_layer(network, name) for name in names}
        biases, old = [], {}
        for name, layer in layers.items():
            old[name] = layer.bias
            if self.variable == "all":
                start = torch.zeros(layer.current_weight().shape[0]) if layer.bias is None else layer.bias.detach()
                layer.bias = nn.Parameter(start.to(layer.current_weight().device).clone())
                biases.append(layer.bias)
        before = problem.whole()
        learners = {}
        for name, layer in layers.items():
            assert isinstance(layer.stored, GridWeight)
            assert layer.floats is not None
            learners[name] = self.learner(layer.floats.to(layer.stored.largest.device), layer.stored)
        with _in_place(network, learners):
            learn(learners, biases, problem.drawn, len(problem.target), self.schedule, generator)
        for bias in biases:
            bias.grad = None
        stored = {name: layer.stored for name, layer in layers.items()}
        for name, layer in layers.items():
            layer.stored = learners[name].frozen()
        after = problem.whole()
        undecided = sum(one.undecided() for one in learners.values()) / len(learners)
        if not after < before:
            for name, layer in layers.items():
                layer.stored, layer.bias = stored[name], old[name]
            return Trace(before, before, undecided), True
        return Trace(before, after, undecided), False

    def record(self, network: nn.Module, name: str, first: GridWeight, bits: int, note: str) -> LayerRecord:
        """Return the record of a layer, its noise against the floats."""
        layer = compressed_layer(network, name)
        stored, floats = layer.stored, layer.floats
        assert stored is not None
        assert floats is not None
        layer.stored = first
        record = put_weight(network, name, stored, self.name, bits, note)
        record.signal_to_noise = signal_to_noise(floats, stored())
        record.input_bits = None if layer.inputs is None else layer.inputs.bits
        return record


class AdaRound(GradientRounding):
    """Gradient-based quantization on calibration images, with every choice as an argument.

    Args:
        bits: Bits of a weight, 2 to 8, of layers without codes.
        grid: ``uniform`` or ``power``, of layers without codes.
        exponent: Of a grid of powers; None searches it as PowerQuant does.
        per_channel: Whether each output channel has its own range.
        variable: What is learned: the rounding ``offset``, free ``codes``, or ``all``: codes, scales and biases.
        loss: ``mse``, ``cosine``, ``gradient`` (mse weighed by squared gradients of the training loss), or ``kl``
            of the network's output.
        unit: Whether ``layer`` by layer or ``block`` by block.
        inputs: ``float`` features, ``quantized`` ones, or a random ``mix`` of both.
        mix: Part of the elements that are quantized in a mix.
        steps: Of the optimizer, for each unit.
        batch_size: Images of a step.
        optimizer: ``adam``, ``adamw`` or ``sgd``.
        rate: Learning rate of offsets and codes.
        scale_rate: Of logarithms of scales, and of biases.
        strength: λ of the pull to whole codes.
        warm_start: Part of the steps without it.
        beta_start: β after the warm start.
        beta_end: β at the end.
        memory: GiB for a unit's inputs and outputs; fewer images are used where they are larger.
        layer_bits: Bits of single layers by name, for mixed precision.
        edge_bits: Bits of the first and last layer; None treats them like the others.
        protect: Names of layers, or their beginnings, that stay as they are.
    """

    name = "adaround"

    def __init__(
        self,
        bits: int = 4,
        grid: str = "uniform",
        exponent: float | None = None,
        per_channel: bool = True,
        variable: str = "offset",
        loss: str = "mse",
        unit: str = "layer",
        inputs: str = "quantized",
        mix: float = 0.5,
        steps: int = 2000,
        batch_size: int = 32,
        optimizer: str = "adam",
        rate: float = 1e-2,
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
            int(steps), int(batch_size), optimizer, float(rate), 1e-3, float(scale_rate), float(strength),
            float(warm_start), (float(beta_start), float(beta_end)),
        )  # fmt: skip
        super().__init__(
            bits, grid, exponent, per_channel, variable, False, False, loss, unit, inputs, mix, schedule, memory,
            layer_bits, edge_bits, protect,
        )  # fmt: skip
