# SPDX-License-Identifier: Apache-2.0
"""RED and RED++: redundancy among weights is made and taken out without data.

Weights of a layer become the modes of their density (scalar hashing), so that neurons and kernels that were nearly
equal are equal; neurons that are equal are merged, which changes nothing; and kernels that several outputs share are
computed once for each input channel (input-wise splitting). Yvinec, Dapogny, Cord and Bailly: RED: Looking for
Redundancies for Data-Free Structured Compression of Deep Neural Networks. NeurIPS 2021, arXiv 2105.14797; RED++:
Data-Free Pruning of Deep Neural Networks via Input Splitting and Output Merging. TPAMI 2023, arXiv 2110.01397.
"""

from __future__ import annotations

import math
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from numpy.typing import NDArray
from scipy.cluster.hierarchy import cut_tree, linkage
from scipy.ndimage import gaussian_filter1d
from torch import Tensor, nn

from affect.compression.arguments import check_choices
from affect.compression.base import Data, quantizable, relative_error
from affect.compression.channels import Channels, Family
from affect.compression.layers import CompressedConv2d, CompressedLinear
from affect.compression.report import LayerRecord, Report, count_macs, signal_to_noise
from affect.compression.stored import CodebookWeight, SplitWeight, StoredWeight
from affect.compression.uniform import compressed_layer, current_weight, edge_layers, watched_inputs
from affect.errors import ConfigError

__all__ = [
    "RED",
    "Hashed",
    "Split",
    "average_near",
    "bandwidth_of",
    "channel_shares",
    "codebook_weight",
    "hash_values",
    "merge_same",
    "scalar_codes",
    "smallest",
    "split_convolution",
    "split_kernels",
]

Array = NDArray[np.float64]
Numbers = NDArray[np.int64]

RESOLUTION, COARSE = 32, 8
"""Points of the density's grid for one bandwidth: bumps narrower than a step are not seen. Fewer for huge grids."""

LARGE = 2**22
"""Points above which a grid is made coarse."""

REACH = 5
"""Bandwidths after which a kernel is cut off."""

RULES = ("deviation", "gap")
SCHEDULES = ("constant", "increasing", "decreasing", "block")
STORES = ("smallest", "codebook", "split", "floats")


# ---------------------------------------------------------------------------------------------------- hashing


@dataclass(frozen=True)
class Hashed:
    """Numbers that were replaced by modes of their density.

    Attributes:
        codes: Number of the mode of each ``(N,)``.
        values: The modes, rising ``(V,)``.
    """

    codes: Numbers
    values: Array


def hash_values(numbers: Array, bandwidth: float) -> Hashed:
    """Replace each number by the mode of a Gaussian kernel density between whose two minima it lies.

    The density is computed on a grid, 32 points a bandwidth, or 8 where that makes more than ``LARGE``. Gaps wider than
    kernels reach are left out of it, so that it stays small however small the bandwidth is; numbers alone between two
    such gaps stay what they are.

    Args:
        numbers: Any, ``(N,)``.
        bandwidth: Standard deviation of a kernel, in units of the numbers; 0 changes nothing.
    """
    distinct, inverse, counts = np.unique(numbers.astype(np.float64), return_inverse=True, return_counts=True)
    if bandwidth <= 0 or len(distinct) < 2:
        return Hashed(inverse, distinct)
    cluster = np.concatenate([[0], np.cumsum(np.diff(distinct) > 2 * REACH * bandwidth)])
    several = np.bincount(cluster)[cluster] > 1
    modes = distinct.copy()
    if several.any():
        modes[several] = _modes(distinct[several], counts[several], cluster[several], bandwidth)
    values, codes = np.unique(modes, return_inverse=True)
    return Hashed(codes[inverse], values)


def _modes(numbers: Array, counts: Numbers, cluster: Numbers, bandwidth: float) -> Array:
    """Return the mode of each number; clusters are further apart than kernels reach."""
    reach = REACH * bandwidth
    places = reach + np.concatenate([[0], np.cumsum(np.minimum(np.diff(numbers), 2 * reach))])
    fine = (places[-1] + reach) / bandwidth * RESOLUTION <= LARGE
    step = bandwidth / (RESOLUTION if fine else COARSE)
    size = math.ceil((places[-1] + reach) / step) + 2
    left = np.floor(places / step).astype(np.int64)
    share = places / step - left
    histogram = np.bincount(left, counts * (1 - share), size) + np.bincount(left + 1, counts * share, size)
    density = gaussian_filter1d(histogram, bandwidth / step, mode="constant", truncate=REACH)
    rising = np.sign(np.diff(density))
    known = np.maximum.accumulate(np.where(rising != 0, np.arange(len(rising)), -1))
    rising = np.where(known >= 0, rising[known], 1.0)  # on a plateau it goes on as before
    turns = np.flatnonzero(rising[1:] != rising[:-1]) + 1
    peaks, valleys = turns[rising[turns] < 0], turns[rising[turns] > 0]
    bottoms, tops = _refined(density, valleys) * step, _refined(density, peaks) * step
    segment = np.searchsorted(bottoms, places, side="right")
    first = np.searchsorted(cluster, cluster)  # one shift a cluster, so that equal modes are equal to the last bit
    return tops[segment] + (numbers - places)[first]


def _refined(density: Array, points: Numbers) -> Array:
    """Return turning points of a curve between its grid's points: those of parabolas through three points."""
    before, here, after = density[points - 1], density[points], density[points + 1]
    bend = before - 2 * here + after
    return points + np.where(bend != 0, 0.5 * (before - after) / np.where(bend == 0, 1, bend), 0.0).clip(-0.5, 0.5)


def bandwidth_of(numbers: Array, factor: float, rule: str = "deviation") -> float:
    """Return the bandwidth of a layer's density.

    Args:
        numbers: The layer's weights ``(N,)``.
        factor: What the rule's scale is multiplied by.
        rule: ``deviation``, the standard deviation of the weights, or ``gap``, the median of the differences between
            consecutive distinct weights.
    """
    if rule == "gap":
        distinct = np.unique(numbers)
        return factor * float(np.median(np.diff(distinct))) if len(distinct) > 1 else 0.0
    return factor * float(numbers.std())


def hash_within(numbers: Array, bandwidth: float, limit: float | None) -> tuple[Hashed, float]:
    """Hash with the largest of bandwidth, bandwidth / 2, bandwidth / 4, … that moves numbers by at most ``limit``.

    Args:
        numbers: Weights ``(N,)``.
        bandwidth: The largest.
        limit: Root mean square of what they move by, as a part of their own; None sets no limit.

    Returns:
        What came of it and the bandwidth; 0 where none is small enough.
    """
    power = float(np.sqrt(np.square(numbers).mean()))
    for _ in range(20):
        found = hash_values(numbers, bandwidth)
        moved = float(np.sqrt(np.square(found.values[found.codes] - numbers).mean()))
        if limit is None or moved <= limit * power:
            return found, bandwidth
        bandwidth /= 2
    return hash_values(numbers, 0.0), 0.0


# ---------------------------------------------------------------------------------------------------- merging


@torch.no_grad()
def merge_same(network: nn.Module, example: Tensor, proportional: bool = False, protect: Sequence[str] = ()) -> int:
    """Merge channels that are the same for every image, in place, and return how many went.

    ``W₂[:, i] σ(z_i) + W₂[:, j] σ(z_j) = (W₂[:, i] + W₂[:, j]) σ(z_i)`` for any elementwise σ where z_i = z_j.

    Args:
        network: In evaluation mode.
        example: Normalised images ``(B, 3, H, W)``.
        proportional: Also merge channels that are positive multiples c of others: they add ``c W₂[:, j]``. (Not in
            the papers.)
        protect: Names of modules, or their beginnings, whose channels stay as they are.

    Raises:
        ConfigError: If what the network computes cannot be written down, or it asks for a fixed number of channels.
    """
    count = 0
    while True:  # what reads merged channels may have become the same itself
        channels = Channels(network, example, protect)
        found = channels.duplicates(proportional)
        if not found:
            return count
        count += sum(len(one.gone) for one in found)
        channels.remove(found)
        try:
            network(example)
        except (RuntimeError, AssertionError, ValueError) as error:
            tied = channels.described_by(found[0].family)
            raise ConfigError(
                f"the network does not run without channels that equal others, as of {tied[0][0] if tied else 'a sum'} "
                f"({error}); name in protect=[…] the module that asks for a fixed number of channels"
            ) from error


def channel_shares(count: int, share: float, schedule: str) -> list[float]:
    """Return which share of the channels of each group goes, by depth, with the mean ``share``.

    Args:
        count: Groups of channels in order of depth.
        share: Their mean, 0 to 1.
        schedule: ``constant``; ``increasing`` or ``decreasing`` in a line, from or to 0 (or from what keeps all at most
            1); or ``block``: in the second half of the network only (as far as 1 allows).
    """
    if schedule == "constant" or count < 2:
        return [share] * count
    reach = min(share, 1 - share)
    if schedule == "block":
        late = np.arange(count) >= count // 2
        high = min(1.0, share * count / int(late.sum()))
        return [float(high if one else (share * count - high * late.sum()) / (count - late.sum())) for one in late]
    line = [share + reach * (2 * k / (count - 1) - 1) for k in range(count)]
    return line if schedule == "increasing" else line[::-1]


@torch.no_grad()
def average_near(
    network: nn.Module, example: Tensor, share: float, schedule: str = "constant", protect: Sequence[str] = ()
) -> None:
    """Give the nearest channels of each group the mean of their weights, so that ``merge_same`` merges them.

    Near is what has a small Euclidean distance between all that makes the channels: rows of weights with their biases,
    kernels and norms on their way. Clusters have average linkage.

    Args:
        network: In evaluation mode; changed in place.
        example: Normalised images ``(B, 3, H, W)``.
        share: Of the channels that can go then, averaged over groups of channels.
        schedule: How shares depend on depth, see ``channel_shares``.
        protect: As for ``merge_same``.
    """
    channels = Channels(network, example, protect)
    families = [family for family in channels.families if channels.described_by(family)]
    for family, own in zip(families, channel_shares(len(families), share, schedule), strict=True):
        _average(channels, family, own)


def _average(channels: Channels, family: Family, share: float) -> None:
    """Give channels of a family that are near each other the same weights."""
    wanted = max(1, len(family.nodes) - math.floor(share * len(family.nodes) + 1e-9))
    if wanted == len(family.nodes):
        return
    parts = channels.described_by(family)
    tensors = [getattr(channels.modules[name], key) for name, key, _ in parts]
    rows = [t[torch.from_numpy(r).to(t.device)].detach().double().flatten(1) if t.ndim > 1
            else t[torch.from_numpy(r).to(t.device)].detach().double()[:, None]
            for t, (_, _, r) in zip(tensors, parts, strict=True)]  # fmt: skip
    table = torch.cat([one.cpu() for one in rows], 1).numpy()
    clusters = torch.from_numpy(cut_tree(linkage(table, "average"), wanted)[:, 0].astype(np.int64))
    sizes = torch.bincount(clusters).double()
    for tensor, own, (_, _, index) in zip(tensors, rows, parts, strict=True):
        into = clusters.to(own.device)
        mean = own.new_zeros(len(sizes), own.shape[1]).index_add(0, into, own) / sizes.to(own.device)[:, None]
        several = (sizes[clusters] > 1).to(own.device)
        at = torch.from_numpy(index).to(own.device)[several]
        tensor.data[at] = mean[into][several].view(-1, *tensor.shape[1:]).to(tensor.dtype)


# --------------------------------------------------------------------------------------------------- splitting


@dataclass(frozen=True)
class Split:
    """Distinct kernels of each input channel.

    Attributes:
        counts: Of each input channel ``(C,)``.
        positions: Number of the kernel between an output and an input channel, among that input's ``(O, I)``.
        kernels: All of them in order of input channels ``(U, K)``: codes.
        values: What codes stand for ``(V,)``.
    """

    counts: Tensor
    positions: Tensor
    kernels: Tensor
    values: Tensor

    @property
    def products(self) -> float:
        """Multiplications as a part of those without splitting."""
        return int(self.counts.sum()) / self.positions.numel()


def scalar_codes(weight: Tensor) -> tuple[Tensor, Tensor]:
    """Return distinct values of a weight, rising ``(V,)``, and of each weight the number of its value."""
    values, codes = torch.unique(weight.detach() + 0.0, return_inverse=True)  # -0 becomes 0
    return values, codes


def split_kernels(weight: Tensor, groups: int = 1) -> Split:
    """Find for each input channel of a layer the kernels that differ; they are compared as whole numbers.

    Args:
        weight: ``(O, I, …)``: of a convolution with ``I * groups`` input channels, or of a linear layer ``(O, I)``.
        groups: Of the convolution.
    """
    values, codes = scalar_codes(weight)
    outputs, inputs = weight.shape[:2]
    table = codes.reshape(outputs * inputs, -1)
    channel = torch.arange(outputs, device=weight.device) // (outputs // groups) * inputs
    numbers = (channel[:, None] + torch.arange(inputs, device=weight.device)).flatten()
    owner = numbers
    for column in table.T:  # order by channel first, then by one weight after the other
        numbers = torch.unique(numbers * len(values) + column, return_inverse=True)[1]
    total = int(numbers.max()) + 1
    first = torch.full((total,), len(table), device=weight.device)
    first = first.scatter_reduce(0, numbers, torch.arange(len(table), device=weight.device), "amin")
    counts = torch.bincount(owner[first], minlength=inputs * groups)
    starts = counts.cumsum(0) - counts
    return Split(counts, (numbers - starts[owner]).view(outputs, inputs), table[first], values)


def split_convolution(
    x: Tensor,
    split: Split,
    kernel: Sequence[int],
    stride: Sequence[int] = (1, 1),
    dilation: Sequence[int] = (1, 1),
    groups: int = 1,
) -> Tensor:
    """Return the convolution of ``(B, C, H, W)``, padded already: each distinct kernel once, then gather and add.

    The first stage is a depthwise convolution with as many outputs of a channel as it has distinct kernels; the second
    multiplies nothing.

    Args:
        x: Inputs.
        split: Kernels.
        kernel: Height and width of a kernel.
        stride: Of the convolution.
        dilation: Of the convolution.
        groups: Of the convolution.
    """
    outputs, inputs = split.positions.shape
    kernels = split.values[split.kernels].to(x.dtype).view(-1, 1, *kernel)
    spread = x.repeat_interleave(split.counts, 1)
    products = F.conv2d(spread, kernels, None, tuple(stride), 0, tuple(dilation), len(kernels))
    starts = (split.counts.cumsum(0) - split.counts).view(groups, inputs).repeat_interleave(outputs // groups, 0)
    numbers = split.positions + starts
    total = products[:, numbers[:, 0]]
    for k in range(1, inputs):
        total = total + products[:, numbers[:, k]]
    return total


def split_weight(weight: Tensor, split: Split, groups: int = 1, coded: bool = True) -> SplitWeight:
    """Return a weight as it is stored: kernels as codes of values, or as floats."""
    kernels = split.kernels if coded else split.values[split.kernels]
    values = split.values if coded else None
    return SplitWeight.of(weight.shape, split.counts, split.positions, kernels, groups, values)


def codebook_weight(weight: Tensor) -> CodebookWeight:
    """Return a weight as codes of its distinct values, in float32.

    Raises:
        ValueError: If it has more than 65536.
    """
    values, codes = scalar_codes(weight)
    return CodebookWeight.of(codes, values[None].float(), half=False)


def smallest(weight: Tensor, groups: int = 1, store: str = "smallest") -> StoredWeight | None:
    """Return the form in which a weight takes the fewest bytes, or None where that is floats.

    Args:
        weight: ``(O, I, …)``.
        groups: Of the convolution.
        store: ``smallest``; or ``codebook`` or ``split``, whatever they take, where they are possible; or ``floats``.
    """
    if store == "floats":
        return None
    forms: list[StoredWeight] = []
    few = len(torch.unique(weight)) <= 2**16
    if store != "split" and few:
        forms.append(codebook_weight(weight))
    if store != "codebook":
        split = split_kernels(weight, groups)
        if int(split.counts.max()) <= 2**16:
            forms += [split_weight(weight, split, groups, coded) for coded in ((True, False) if few else (False,))]
    best = min(forms, key=lambda one: one.stored_bytes, default=None)
    if best is None or (store == "smallest" and best.stored_bytes >= weight.numel() * weight.element_size()):
        return None
    return best


# --------------------------------------------------------------------------------------------------- transform


@dataclass
class _Found:
    """What hashing did to a layer."""

    bytes: int
    outputs: int
    inputs: int
    noise: float | None = None
    bandwidth: float = 0.0
    largest: float = 0.0
    mean: float = 0.0


class RED:
    """Hash weights, merge channels, and share kernels, without data.

    Args:
        bandwidth: Of the density of a layer's weights, as a part of their standard deviation or of their median gap;
            0 leaves weights as they are.
        rule: ``deviation`` or ``gap``.
        limit: Root mean square of what hashing moves a layer's weights by, as a part of their own; the bandwidth is
            halved until it is kept. None sets no limit.
        share: Of the channels that are merged although they differ, averaged over the network.
        schedule: How that depends on depth: ``constant``, ``increasing``, ``decreasing`` or ``block``.
        proportional: Also merge channels that are positive multiples of others.
        store: ``smallest`` for each layer, ``codebook`` of values, ``split`` kernels, or ``floats``.
        edges: Whether the first and last layer are hashed too.
        measure: Whether the time of split layers is compared with that of plain ones.
        protect: Names of layers, or their beginnings, that stay as they are.
    """

    name, stage = "red", "merge"
    needs: tuple[str, ...] = ()

    TOLERANCE = 1e-3
    """Relative change of the output above which merging of equal channels cannot have been rounding."""

    def __init__(
        self,
        bandwidth: float = 0.02,
        rule: str = "deviation",
        limit: float | None = 0.05,
        share: float = 0.0,
        schedule: str = "constant",
        proportional: bool = False,
        store: str = "smallest",
        edges: bool = False,
        measure: bool = False,
        protect: Sequence[str] = (),
    ) -> None:
        where = f"compression.{self.name}"
        check_choices(self.name, rule=(rule, RULES), schedule=(schedule, SCHEDULES), store=(store, STORES))
        if not float(bandwidth) >= 0:
            raise ConfigError(f"{where}.bandwidth={bandwidth}: 0 or more")
        if limit is not None and not float(limit) > 0:
            raise ConfigError(f"{where}.limit={limit}: more than 0, or null")
        if not 0 <= float(share) < 1:
            raise ConfigError(f"{where}.share={share}: from 0 to below 1")
        self.bandwidth, self.rule, self.limit = float(bandwidth), rule, None if limit is None else float(limit)
        self.share, self.schedule, self.proportional = float(share), schedule, bool(proportional)
        self.store, self.edges, self.measure, self.protect = store, bool(edges), bool(measure), tuple(protect)

    def prepare(self, network: nn.Module, data: Data) -> None:
        """Nothing is needed of the untouched network."""

    @torch.no_grad()
    def __call__(self, network: nn.Module, data: Data) -> Report:
        """Hash, merge and store."""
        example = data.example if data.example is not None else next(iter(data.images), None)
        if example is None:
            raise ConfigError(f"compression={self.name} needs images of the size that the network is used with")
        layers = quantizable(network, self.protect)
        for name, layer in layers.items():
            if getattr(layer, "stored", None) is not None:
                raise ConfigError(f"compression.{self.name}: {name} has codes already; run {self.name} before, alone")
        keys = ("bandwidth", "rule", "limit", "share", "schedule", "proportional", "store", "edges")
        report = Report(self.name, {key: getattr(self, key) for key in keys})
        norms = [n for n, m in network.named_modules() if isinstance(m, nn.BatchNorm2d | nn.BatchNorm1d)]
        if norms:
            report.notes.append(
                f"{len(norms)} batch norms are not folded, {norms[0]} the first: channels are the same only if norms "
                f"are; put bn_folding before {self.name}"
            )
        edges = set() if self.edges else edge_layers(network, layers)
        found = {name: self._hash(layer, name not in edges) for name, layer in layers.items()}
        before = sum(count_macs(network, lambda: network(example[:1])).values())
        merged = self._merge(network, example)
        layers = quantizable(network, self.protect)
        macs = count_macs(network, lambda: network(example[:1]))
        needed, after = 0.0, 0.0
        splits = {}
        for name, layer in layers.items():
            splits[name] = split_kernels(current_weight(layer), int(getattr(layer, "groups", 1)))
            needed += macs.get(name, 0) * splits[name].products
            after += macs.get(name, 0)
        times = self._timed(network, example, splits) if self.measure else {}
        for name in layers:
            report.layers.append(self._stored(network, name, found[name], splits[name], times.get(name)))
        report.totals = {
            "channels": sum(one.outputs for one in found.values()),
            "merged": merged,
            "moved": max((one.largest for one in found.values()), default=0.0),
            "multiplications": after / max(before, 1),
            "split": needed / max(before, 1),
        }
        report.notes.append(
            f"multiplications {after / max(before, 1):.1%} after merging, {needed / max(before, 1):.1%} if each kernel "
            "ran once; releases decode plain weights and run without that (measure=true times both)"
        )
        if times:
            dense, split = (sum(pair[k] for pair in times.values()) for k in (0, 1))
            report.notes.append(f"split layers took {split / dense:.2f} times as long as plain ones")
        return report

    def _hash(self, layer: Any, wanted: bool) -> _Found:  # noqa: ANN401
        """Hash the weights and biases of a layer."""
        weight, bias = layer.weight, layer.bias
        size = weight.numel() * weight.element_size() + (0 if bias is None else bias.numel() * bias.element_size())
        made = _Found(size, len(weight), weight.shape[1] * int(getattr(layer, "groups", 1)))
        if not wanted or self.bandwidth == 0:
            return made
        numbers = weight.detach().cpu().double().numpy().ravel()
        hashed, made.bandwidth = hash_within(numbers, bandwidth_of(numbers, self.bandwidth, self.rule), self.limit)
        values = torch.from_numpy(hashed.values[hashed.codes]).view(weight.shape).to(weight)
        moved = (values - weight).abs()
        made.noise, made.largest, made.mean = signal_to_noise(weight, values), float(moved.max()), float(moved.mean())
        weight.data.copy_(values)
        if bias is not None:  # with the bandwidth of the weights: what moves it moves the output as much
            numbers = bias.detach().cpu().double().numpy()
            hashed = hash_values(numbers, made.bandwidth)
            bias.data.copy_(torch.from_numpy(hashed.values[hashed.codes]).to(bias))
        return made

    def _merge(self, network: nn.Module, example: Tensor) -> int:
        """Merge channels; that of equal ones must not change the output."""
        if self.share > 0:
            average_near(network, example, self.share, self.schedule, self.protect)
        shown = torch.randn(2, *example.shape[1:], generator=torch.Generator().manual_seed(0)).to(example)
        before = network(shown)
        merged = merge_same(network, example, self.proportional, self.protect)
        worst = max(map(relative_error, _tensors(before), _tensors(network(shown))), default=0.0)
        if not worst < self.TOLERANCE:
            raise ConfigError(f"compression={self.name}: merging equal channels changed the output by {worst:.1%}")
        return merged

    def _timed(self, network: nn.Module, example: Tensor, splits: dict[str, Split]) -> dict[str, tuple[float, float]]:
        """Return seconds of each layer on the example, plain and split; the least of three runs each."""
        inputs: dict[str, Tensor] = {}
        with watched_inputs(network, list(splits), lambda name, x: inputs.__setitem__(name, x)):
            network(example)
        found = {}
        for name, x in inputs.items():
            layer: Any = network.get_submodule(name)
            weight, split = current_weight(layer), splits[name]
            if isinstance(layer, nn.Linear | CompressedLinear):
                flat = x.reshape(-1, x.shape[-1], 1, 1)
                found[name] = (_seconds(F.linear, x, weight), _seconds(split_convolution, flat, split, (1, 1)))
                continue
            made = layer if isinstance(layer, CompressedConv2d) else CompressedConv2d.of(layer)
            padded, stride, dilation, groups = F.pad(x, made.sides(x)), made.stride, made.dilation, made.groups
            found[name] = (
                _seconds(F.conv2d, padded, weight, None, stride, 0, dilation, groups),
                _seconds(split_convolution, padded, split, weight.shape[2:], stride, dilation, groups),
            )
        return found

    def _stored(
        self, network: nn.Module, name: str, found: _Found, split: Split, seconds: tuple[float, float] | None
    ) -> LayerRecord:
        """Store a layer in its smallest form, and tell what happened to it."""
        layer: Any = network.get_submodule(name)
        weight, groups = current_weight(layer), int(getattr(layer, "groups", 1))
        stored = smallest(weight, groups, self.store)
        bias = 0 if layer.bias is None else layer.bias.numel() * layer.bias.element_size()
        size = weight.numel() * weight.element_size() if stored is None else stored.stored_bytes
        bits = None
        if stored is not None:
            compressed_layer(network, name).store(stored)
            bits = stored.bits if isinstance(stored, CodebookWeight) else None
        outputs, inputs = len(weight), weight.shape[1] * groups
        told = [f"{len(split.values)} values"]
        if found.noise is not None:
            told.append(f"moved by {found.largest:.2g} at most, {found.mean:.2g} on average")
        if (outputs, inputs) != (found.outputs, found.inputs):
            told.append(f"{found.inputs} → {found.outputs} channels became {inputs} → {outputs}")
        told.append(f"{int(split.counts.sum())} of {split.positions.numel()} kernels differ")
        if isinstance(stored, SplitWeight):
            told.append("kernels stored once")
        if seconds is not None:
            told.append(f"split takes {seconds[1] / max(seconds[0], 1e-9):.2f} times as long")
        return LayerRecord(name, self.name, bits, None, found.noise, found.bytes, size + bias, "; ".join(told))


def _tensors(output: Any) -> list[Tensor]:  # noqa: ANN401
    return [leaf for leaf in torch.utils._pytree.tree_leaves(output) if isinstance(leaf, Tensor)]


def _seconds(run: Callable[..., Tensor], *arguments: Any) -> float:  # noqa: ANN401
    best = math.inf
    for _ in range(3):
        start = time.perf_counter()
        run(*arguments)
        best = min(best, time.perf_counter() - start)
    return best
