# SPDX-License-Identifier: Apache-2.0
"""JLCM: weights as codes into codebooks that groups of similar neurons share, both learned together.

Rows of a weight that are distributed alike are put next to each other, so that each block has a codebook (or a scale)
of its own and no weight says which. Entries and codes are learned so that the layer answers as before. Codes get a
proximal gradient: with w = c_m the score of entry k has ∂L/∂w sign(c_k - c_m) / (ε + |c_k - c_m|), so that the next
entry is chosen before those beyond it, where the gradient of a softmax prefers the farthest. Yvinec, Dapogny and
Bailly: Network Memory Footprint Compression Through Jointly Learnable Codebooks and Mappings. ICLR 2024, arXiv
2309.17361. Only abstract, a figure's caption and reviews were available, so most choices here are arguments.
"""

from __future__ import annotations

import copy
import math
import warnings
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from scipy.cluster.vq import kmeans2
from torch import Tensor, nn

from affect.compression.arguments import check_bits, check_choices, check_counts, check_range
from affect.compression.base import Data, quantizable
from affect.compression.channels import Channels
from affect.compression.report import LayerRecord, Report, signal_to_noise
from affect.compression.rounding import distance, order_of_use, unit_samples
from affect.compression.stored import CodebookWeight, StoredWeight
from affect.compression.uniform import compressed_layer, current_weight, edge_layers, put_weight, round_to_grid
from affect.errors import ConfigError

__all__ = [
    "JLCM",
    "LearnedCodebook",
    "absorb_orders",
    "blocks_of_rows",
    "choose",
    "codebook_bits",
    "entries_of",
    "grouped_codebooks",
    "row_features",
]

Array = NDArray[np.float64]

VARIANTS = ("codebooks", "block_scales", "row_scales")
GRADIENTS = ("proximal", "softmax")

COPIES = 6
"""Tensors of the size of the scores while they are learned."""


# ------------------------------------------------------------------------------------------- groups and codebooks


def row_features(weight: Tensor) -> Array:
    """Return what rows are alike by: nine deciles over the standard deviation, and its logarithm, ``(O, 10)``."""
    rows = weight.detach().cpu().double().flatten(1).numpy()
    spread = np.maximum(np.sqrt(np.square(rows).mean(1)), 1e-12)
    deciles = np.quantile(rows, np.linspace(0.1, 0.9, 9), axis=1).T / spread[:, None]
    return np.column_stack([deciles, np.log(spread)])


def blocks_of_rows(weight: Tensor, groups: int, seed: int = 0) -> tuple[Tensor, list[int]]:
    """Return the rows of a weight ``(O, …)`` in an order in which similar ones are neighbours, and rows of each block.

    Args:
        weight: The weight.
        groups: Most blocks.
        seed: Of k-means on ``row_features``.
    """
    groups = min(groups, len(weight))
    if groups == 1:
        return torch.arange(len(weight)), [len(weight)]
    features = row_features(weight)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # fewer groups than asked for are fine
        labels = kmeans2(features, groups, minit="++", seed=np.random.default_rng(seed))[1]
    order = np.argsort(labels, kind="stable")
    sizes = np.bincount(labels)
    return torch.from_numpy(order), [int(size) for size in sizes if size]


def entries_of(values: Array, count: int, steps: int = 50) -> Array:
    """Return at most ``count`` values, rising, that are near all others: k-means of numbers (Lloyd).

    Args:
        values: Numbers ``(N,)``.
        count: Most entries; where no more values differ, these are the entries.
        steps: Most rounds.
    """
    ordered = np.sort(values)
    distinct = np.unique(ordered)
    if len(distinct) <= count:
        return distinct
    sums = np.concatenate([[0.0], np.cumsum(ordered)])
    entries = np.quantile(distinct, (np.arange(count) + 0.5) / count)
    for _ in range(steps):
        borders = np.searchsorted(ordered, (entries[1:] + entries[:-1]) / 2)
        edges = np.concatenate([[0], borders, [len(ordered)]])
        sizes = np.diff(edges)
        means = np.where(sizes > 0, np.diff(sums[edges]) / np.maximum(sizes, 1), entries)
        if np.allclose(means, entries, rtol=0, atol=1e-9 * float(np.ptp(ordered))):
            break
        entries = means
    return entries


def nearest(values: Tensor, entries: Tensor) -> Tensor:
    """Return the number of the nearest of rising entries ``(k,)`` for each value, int64 of their shape."""
    return torch.searchsorted((entries[1:] + entries[:-1]) / 2, values.contiguous())


def grouped_codebooks(
    weight: Tensor,
    bits: int,
    groups: int = 8,
    variant: str = "codebooks",
    half: bool = True,
    ordered: Sequence[int] | None = None,
    seed: int = 0,
) -> CodebookWeight:
    """Return a weight as codes of the nearest entries, which k-means gives.

    Args:
        weight: ``(O, …)``.
        bits: Bits of a code; ``2^bits`` entries.
        groups: Blocks of rows.
        variant: ``codebooks``, one for each block; or one codebook with ``block_scales`` or ``row_scales``, which are
            root mean squares.
        half: Whether entries and scales are float16, or float32.
        ordered: Rows of each block where they lie in order already; None orders them and stores the order.
        seed: Of the grouping.
    """
    if variant == "row_scales" or groups == 1:
        order, blocks = torch.arange(len(weight)), [len(weight)]
    elif ordered is not None:
        order, blocks = torch.arange(len(weight)), list(ordered)
    else:
        order, blocks = blocks_of_rows(weight, groups, seed)
    number = torch.float16 if half else torch.float32
    order = order.to(weight.device)
    rows = weight.detach().float().flatten(1)[order]
    scale = None
    if variant != "codebooks":
        parts = rows.split(blocks) if variant == "block_scales" else rows.split(1)
        scale = torch.stack([part.square().mean().sqrt() for part in parts])
        scale = torch.where(scale > 0, scale, torch.ones_like(scale)).to(number)
        times = torch.tensor(blocks, device=rows.device) if variant == "block_scales" else 1
        rows = rows / scale.float().repeat_interleave(times)[:, None]
    parts = rows.split(blocks) if variant == "codebooks" else (rows,)
    found = [torch.from_numpy(entries_of(part.cpu().double().numpy().ravel(), 2**bits)) for part in parts]
    size = 2**bits
    codebook = torch.stack([torch.cat([one, one[-1:].expand(size - len(one))]) for one in found])
    codebook = codebook.to(rows.device).to(number)
    codes = torch.cat([nearest(part, own.float()) for part, own in zip(parts, codebook, strict=True)])
    kept = None if torch.equal(order, torch.arange(len(order), device=order.device)) else order
    by = "block" if variant == "block_scales" else "row"
    return CodebookWeight.of(codes.view(weight.shape), codebook, kept, blocks, scale, by, half)


def codebook_bits(
    weights: int, bits: int, codebooks: int = 1, scales: int = 0, rows: int = 0, numbers: int = 16
) -> int:
    """Return the bits that a weight takes: ``|W| log2 k + G k 16 + scales 16 + rows log2 rows``.

    Args:
        weights: |W|.
        bits: log2 k.
        codebooks: G.
        scales: Number of scales.
        rows: Rows whose order is stored; 0 where layers hold them in order.
        numbers: Bits of an entry and of a scale.
    """
    order = rows * max(1, (rows - 1).bit_length()) if rows else 0
    return weights * bits + codebooks * 2**bits * numbers + scales * numbers + order


@torch.no_grad()
def absorb_orders(
    network: nn.Module, example: Tensor, names: Sequence[str], groups: int, seed: int = 0, protect: Sequence[str] = ()
) -> dict[str, list[int]]:
    """Put rows of layers in the order of their blocks, and the columns of what reads them with them; the output stays.

    Channels that several layers make together (residual sums) take the order of the first one.

    Args:
        network: In evaluation mode; changed in place.
        example: Normalised images ``(B, 3, H, W)``.
        names: Layers whose rows are to be ordered.
        groups: Blocks of each.
        seed: Of the grouping.
        protect: Names of modules, or their beginnings, whose channels stay where they are.

    Returns:
        Rows of each block, for the layers whose rows lie in order now.
    """
    channels = Channels(network, example, protect)
    found: dict[str, list[int]] = {}
    for family in channels.families:
        for name, key, rows in channels.described_by(family):
            layer = channels.modules[name]
            whole = key == "weight" and name in names and len(np.unique(rows)) == len(current_weight(layer))
            if whole and len(rows) == len(current_weight(layer)):
                order, blocks = blocks_of_rows(current_weight(layer)[torch.from_numpy(rows)], groups, seed)
                channels.reorder(family, order.numpy())
                if (np.diff(rows) > 0).all():
                    found[name] = blocks
                break
    return found


# ------------------------------------------------------------------------------------------------------- learning


class _Choose(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, scores: Tensor, entries: Tensor, proximal: bool, epsilon: float) -> Tensor:  # noqa: ANN401
        chosen = scores.argmax(-1, keepdim=True)
        current = entries.gather(-1, chosen)
        ctx.save_for_backward(scores, entries, chosen, current)
        ctx.proximal, ctx.epsilon = proximal, epsilon
        return current.squeeze(-1)

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor, Tensor, None, None]:  # noqa: ANN401
        scores, entries, chosen, current = ctx.saved_tensors
        upstream = grads[0].unsqueeze(-1)
        if ctx.proximal:
            away = entries - current
            pull = away.sign() / (ctx.epsilon + away.abs())
            pull = pull / pull.abs().amax(-1, keepdim=True).clamp_min(1e-30)
        else:
            shares = scores.softmax(-1)
            pull = shares * (entries - (shares * entries).sum(-1, keepdim=True))
        by_entry = torch.zeros_like(entries).scatter_(-1, chosen, upstream)
        return upstream * pull, by_entry, None, None


def choose(scores: Tensor, entries: Tensor, gradient: str = "proximal", epsilon: float = 0.0) -> Tensor:
    """Return the entry with the highest score; scores get a proximal gradient, or that of a softmax.

    ``proximal``: ``∂L/∂w sign(c_k - c) / (ε + |c_k - c|)``, divided by the largest of a weight's factors, with c the
    entry chosen now; ``softmax``: ``∂L/∂w p_k (c_k - Σ p c)``. Entries get the gradient of what chose them.

    Args:
        scores: ``(…, K)``.
        entries: ``(…, K)``.
        gradient: Which.
        epsilon: ε, in units of the entries.

    Returns:
        ``(…)``.
    """
    if gradient == "proximal" and not epsilon > 0:
        epsilon = 1e-12
    out: Tensor = _Choose.apply(scores, entries, gradient == "proximal", epsilon)  # type: ignore[no-untyped-call]
    return out


class LearnedCodebook(StoredWeight):
    """A weight in codebooks while entries, scales and codes are learned; takes the place of the stored one meanwhile.

    Args:
        stored: Where it begins.
        floats: The weight before it became codes. Scores begin at minus the distance of the float from each entry, in
            steps of the codebook.
        neighbours: Entries on each side of the first code that it can move to; the memory is that of as many scores.
        gradient: ``proximal`` or ``softmax``.
        epsilon: ε of the proximal gradient, in steps of the codebook.
        margin: How far the score of the first code is ahead of all others, which are equal; None takes distances.
    """

    def __init__(
        self,
        stored: CodebookWeight,
        floats: Tensor,
        neighbours: int = 8,
        gradient: str = "proximal",
        epsilon: float = 0.1,
        margin: float | None = None,
    ) -> None:
        super().__init__()
        self.shape, self.template, self.gradient = stored.shape, copy.deepcopy(stored), gradient
        codebook = stored.codebook.detach().float()
        self.spread = float(codebook.std().clamp_min(1e-12)) if codebook.numel() > 1 else 1.0
        self.codebook = nn.Parameter(codebook / self.spread)
        self.scale = nn.Parameter(stored.scale.detach().float().clone()) if stored.scales != "none" else None
        codes = stored.indices()
        width = self.width = min(stored.entries, 2 * int(neighbours) + 1)
        self.register_buffer("first", (codes - neighbours).clamp(0, stored.entries - width).to(torch.int32))
        step = float(codebook.amax() - codebook.amin()) / max(stored.entries - 1, 1) / self.spread
        self.epsilon, step = epsilon * step, max(step, 1e-12)
        if margin is None:
            wanted = self._in_units(floats)
            scores = -(self._entries().detach() - wanted[..., None]).abs() / step
        else:
            scores = torch.zeros(*codes.shape, width, device=codes.device)
        # Of equal entries the one that is stored goes first, and so it does where floats moved.
        start = (codes - self.first).unsqueeze(-1)
        best = scores.amax(-1, keepdim=True) + (1e-4 if margin is None else margin)
        self.scores = nn.Parameter(scores.scatter(-1, start, best))

    def _in_units(self, floats: Tensor) -> Tensor:
        """Return the floats in stored order of rows, as entries stand for them."""
        rows = floats.detach().float().flatten(1)[self._order()]
        if self.template.scales != "none":
            rows = rows / self._row_scale()[:, None]
        return rows / self.spread

    def _order(self) -> Tensor:
        """Return the place in use of each stored row."""
        return self.template.order()

    def _row_scale(self) -> Tensor:
        assert self.scale is not None
        return self.scale if self.template.scales == "row" else self.scale[self.template.row_blocks()]

    def _entries(self) -> Tensor:
        """Return the entries that each weight can take, ``(O, N, K)``."""
        reach = torch.arange(self.width, device=self.codebook.device)
        return self.codebook[self.template.row_groups()[:, None, None], self.first.long()[..., None] + reach]

    def codes(self) -> Tensor:
        """Return whole codes ``(O, N)``, in stored order of rows."""
        return self.first.long() + self.scores.detach().argmax(-1)

    def forward(self) -> Tensor:
        """Return the weight, with gradients."""
        rows = choose(self.scores, self._entries(), self.gradient, self.epsilon) * self.spread
        if self.scale is not None:
            rows = rows * self._row_scale()[:, None]
        return torch.zeros_like(rows).index_copy(0, self._order(), rows).view(self.shape)

    @torch.no_grad()
    def frozen(self) -> CodebookWeight:
        """Return what it has come to, as it is stored."""
        old = self.template
        scale = None if self.scale is None else self.scale.detach()
        order = self._order() if old.permuted else None
        codebook = self.codebook.detach() * self.spread
        by = old.scales if old.scales != "none" else "row"
        return CodebookWeight.of(self.codes().view(self.shape), codebook, order, old.blocks, scale, by, old.half)


@dataclass(frozen=True)
class Learning:
    """How codes and codebooks are learned.

    Attributes:
        steps: Of gradient descent for each layer; 0 keeps what k-means gave.
        batch_size: Images of a step.
        rate: What the score of a weight with an average gradient moves by, at first; it falls to 0 in a line.
        codebook_rate: Adam's rate of entries, in standard deviations of the codebook, and of scales.
    """

    steps: int = 300
    batch_size: int = 32
    rate: float = 0.02
    codebook_rate: float = 2e-3


def learn_codebook(
    learner: LearnedCodebook, loss: Callable[[Tensor], Tensor], count: int, how: Learning, generator: torch.Generator
) -> None:
    """Learn scores by gradient descent and entries by Adam, in one loop.

    Adam would move all scores of a weight alike, whatever their gradients, and undo what the proximal gradient is for.
    So scores take plain steps, divided by the root mean square of the layer's largest gradients.

    Args:
        learner: In place.
        loss: Of a batch, given the numbers of its images.
        count: Images.
        how: Numbers.
        generator: Of the draws of images.
    """
    smooth = [learner.codebook] + ([] if learner.scale is None else [learner.scale])
    optimizer = torch.optim.Adam(smooth, lr=how.codebook_rate)
    for step in range(how.steps):
        chosen = torch.randint(count, (min(how.batch_size, count),), generator=generator)
        grads = torch.autograd.grad(loss(chosen), [learner.scores, *smooth])
        left = 1 - step / how.steps
        size = grads[0].abs().amax(-1).square().mean().sqrt().clamp_min(1e-30)
        with torch.no_grad():
            learner.scores -= how.rate * left / size * grads[0]
        for parameter, grad in zip(smooth, grads[1:], strict=True):
            parameter.grad = grad
        optimizer.param_groups[0]["lr"] = how.codebook_rate * left
        optimizer.step()


# ------------------------------------------------------------------------------------------------------ transform


class JLCM:
    """Weights as codes into codebooks of groups of similar rows, learned jointly on training images.

    Args:
        bits: Bits of a code, 1 to 8; a codebook has ``2^bits`` entries.
        groups: Blocks of similar rows in each layer.
        variant: ``codebooks`` of each block, or one codebook with ``block_scales`` or ``row_scales``.
        entry_bits: 16 or 32, of entries and scales.
        absorb: Whether rows are put in order in the network itself where what reads them can follow; others store
            their order.
        steps: Of learning for each layer; 0 needs no images.
        batch_size: Images of a step.
        rate: What the score of a weight with an average gradient moves by at first.
        codebook_rate: Of entries, in standard deviations of the codebook, and of scales.
        gradient: Of codes: ``proximal`` or ``softmax``.
        epsilon: ε of the proximal gradient, in steps of the codebook.
        neighbours: Entries on each side of its first code that a weight can move to.
        memory: GiB for a layer's inputs and outputs, and as much for its scores; fewer images are used, and fewer
            neighbours, where they are larger.
        edge_bits: Bits of the first and last layer, which become uniform; None treats them like the others.
        protect: Names of layers, or their beginnings, that stay floats.
    """

    name, stage = "jlcm", "weights"

    def __init__(
        self,
        bits: int = 4,
        groups: int = 8,
        variant: str = "codebooks",
        entry_bits: int = 16,
        absorb: bool = True,
        steps: int = 300,
        batch_size: int = 32,
        rate: float = 0.02,
        codebook_rate: float = 2e-3,
        gradient: str = "proximal",
        epsilon: float = 0.1,
        neighbours: int = 8,
        memory: float = 2.0,
        edge_bits: int | None = 8,
        protect: Sequence[str] = (),
    ) -> None:
        where = f"compression.{self.name}"
        check_choices(self.name, variant=(variant, VARIANTS), gradient=(gradient, GRADIENTS))
        check_range(self.name, 1, 8, {"bits": bits})
        check_bits(self.name, edge_bits=edge_bits)
        check_counts(self.name, groups=groups, batch_size=batch_size, neighbours=neighbours)
        if int(entry_bits) not in (16, 32):
            raise ConfigError(f"{where}.entry_bits={entry_bits}: 16 or 32")
        for key, rest in (("steps", steps), ("rate", rate), ("codebook_rate", codebook_rate), ("epsilon", epsilon)):
            if not float(rest) >= 0:
                raise ConfigError(f"{where}.{key}={rest}: 0 or more")
        if not float(memory) > 0:
            raise ConfigError(f"{where}.memory={memory}: GiB, more than 0")
        self.bits, self.groups, self.variant, self.half = int(bits), int(groups), variant, int(entry_bits) == 16
        self.absorb, self.gradient, self.epsilon = bool(absorb), gradient, float(epsilon)
        self.neighbours, self.memory = int(neighbours), float(memory)
        self.learning = Learning(int(steps), int(batch_size), float(rate), float(codebook_rate))
        self.edge_bits, self.protect = edge_bits, tuple(protect)
        self.needs: tuple[str, ...] = ("images",) if self.learning.steps else ()

    def prepare(self, network: nn.Module, data: Data) -> None:
        """Nothing is needed of the untouched network."""

    def __call__(self, network: nn.Module, data: Data) -> Report:
        """Put every convolution and linear layer into codebooks, then learn these layer by layer."""
        layers = quantizable(network, self.protect)
        for name, layer in layers.items():
            if getattr(layer, "stored", None) is not None:
                raise ConfigError(f"compression.{self.name}: {name} has codes already; leave out the method before")
        edges = edge_layers(network, layers) if self.edge_bits is not None else set()
        keys = ("bits", "groups", "variant", "gradient", "absorb")
        report = Report(self.name, {k: getattr(self, k) for k in keys} | {"steps": self.learning.steps})
        ordered: dict[str, list[int]] = {}
        inner = [name for name in layers if name not in edges]
        if self.absorb and self.groups > 1 and self.variant != "row_scales":
            example = data.example if data.example is not None else next(iter(data.images), None)
            if example is None:
                raise ConfigError(f"compression.{self.name}.absorb=true needs images of the size that is used")
            ordered = absorb_orders(network, example, inner, self.groups, data.seed, self.protect)
        teacher = copy.deepcopy(network).eval().requires_grad_(False)
        records: dict[str, LayerRecord] = {}
        for name in layers:
            weight = current_weight(network.get_submodule(name))
            if name in edges:
                bits = int(self.edge_bits or 8)
                records[name] = put_weight(network, name, round_to_grid(weight, bits), self.name, bits)
                continue
            stored = grouped_codebooks(
                weight, self.bits, self.groups, self.variant, self.half, ordered.get(name), data.seed
            )
            told = f"{len(stored.blocks)} blocks of rows" + (", their order stored" if stored.permuted else "")
            records[name] = put_weight(network, name, stored, self.name, self.bits, told)
        kept, moved, total = 0, 0, 0
        if self.learning.steps:
            for number, name in enumerate(order_of_use(network, inner, data.images[0])):
                if self._width(network, name) < 3:
                    records[name].note += f"; not learned: its scores take more than memory={self.memory:g} GiB"
                    continue
                changed, note = self._learned(network, teacher, name, data, number)
                moved, total = moved + changed, total + current_weight(network.get_submodule(name)).numel()
                kept += note is None
                layer = compressed_layer(network, name)
                assert layer.stored is not None
                assert layer.floats is not None
                records[name].signal_to_noise = signal_to_noise(layer.floats, layer.stored())
                records[name].note += f"; {note}" if note else "; learned codes answered no better"
        report.layers = list(records.values())
        permuted = sum(", their order stored" in record.note for record in report.layers)
        report.totals = {"ordered": len(ordered), "permuted": permuted, "moved": moved / max(total, 1)}
        if kept:
            report.totals["kept"] = kept
            report.notes.append(f"{kept} layers keep what k-means gave, which answered better than what was learned")
        return report

    def _learned(
        self, network: nn.Module, teacher: nn.Module, name: str, data: Data, number: int
    ) -> tuple[int, str | None]:
        """Learn the codes of a layer; return how many changed, and what to say, or None where they are kept."""
        generator = torch.Generator().manual_seed(data.seed * 100_003 + number)
        layer = compressed_layer(network, name)
        before = layer.stored
        assert isinstance(before, CodebookWeight)
        assert layer.floats is not None
        batches = self._batches(network, name, data)
        inputs = unit_samples(network, name, batches)[0]
        target = unit_samples(teacher, name, batches)[1]

        def loss(chosen: Tensor) -> Tensor:
            return distance("mse", layer(inputs[chosen]), target[chosen])

        @torch.no_grad()
        def whole() -> float:
            parts = torch.arange(len(target)).split(64)
            return sum(float(loss(part)) * len(part) for part in parts) / len(target)

        first = whole()
        reach = (self._width(network, name) - 1) // 2
        learner = LearnedCodebook(before, layer.floats, reach, self.gradient, self.epsilon)
        layer.stored = learner
        learn_codebook(learner, loss, len(target), self.learning, generator)
        layer.stored = learner.frozen()
        last = whole()
        if not last < first:
            layer.stored = before
            return 0, None
        jumps = (learner.codes() - before.indices()).abs()
        changed = int((jumps > 0).sum())
        return changed, f"{changed / jumps.numel():.1%} of codes moved; loss {first:.3g} → {last:.3g}"

    def _width(self, network: nn.Module, name: str) -> int:
        """Return for how many entries of each weight scores, their gradients and what is between fit the memory."""
        most = int(self.memory * 2**30 / (COPIES * 4 * current_weight(network.get_submodule(name)).numel()))
        return min(2 * self.neighbours + 1, most)

    def _batches(self, network: nn.Module, name: str, data: Data) -> list[Tensor]:
        """Return as many images as the memory holds inputs and outputs of a layer for."""
        one, out = unit_samples(network, name, [data.images[0][:1]])
        most = max(1, int(self.memory * 2**30 / ((one.numel() + out.numel()) * one.element_size())))
        images = torch.cat(list(data.images))[:most]
        return list(images.split(max(1, math.ceil(len(data.images[0])))))
