# SPDX-License-Identifier: Apache-2.0
"""What all metrics share: names, masks, sums that are exact in distributed runs, and numbers per group for intervals.

A metric is called with values, targets and masks. An additive one splits into three pure functions:

- statistics: ``(values, target, mask) -> (N, …)``, what each sample adds, float64, zero where masked;
- scores: statistics summed over samples to numbers, for any leading dimensions;
- best constant: the same numbers for the best constant prediction on these samples.

So one code serves the training loop (sums over batches and devices), the final table, and the bootstrap (sums over
groups, resampled by one matrix product).
"""

from __future__ import annotations

from abc import abstractmethod
from collections.abc import Callable, Mapping, Sequence
from typing import ClassVar

import torch
import torchmetrics
from torch import Tensor

from affect.errors import ConfigError, DataError

Resampler = Callable[[Tensor], dict[str, Tensor]]
"""Maps how often each group is drawn, float64 ``(R, G)``, to named numbers ``(R,)``."""

CHUNK = 1 << 16
"""Rows whose statistics are held at once."""


def prepare(values: Tensor, target: Tensor, mask: Tensor) -> tuple[Tensor, Tensor]:
    """Return values and targets as float64 with 0 in masked cells.

    Args:
        values: ``(N, K)``, or points ``(N, P, 2)``.
        target: Same shape.
        mask: bool ``(N, K)`` or ``(N, P)``, True where labelled.

    Raises:
        DataError: If shapes or types do not fit together.
    """
    if values.shape != target.shape or mask.ndim != 2 or values.shape[:2] != mask.shape or values.ndim > 3:
        raise DataError(
            f"metric: values {tuple(values.shape)}, target {tuple(target.shape)}, mask {tuple(mask.shape)} do not fit; "
            "give (N, K) three times, or points (N, P, 2) twice and a mask (N, P)"
        )
    if mask.dtype != torch.bool:
        raise DataError(f"metric: the mask has type {mask.dtype}; give bool, True where labelled")
    cells = mask if mask.ndim == values.ndim else mask.unsqueeze(-1)
    return torch.where(cells, values.double(), 0), torch.where(cells, target.double(), 0)


def ratio(numerator: Tensor, denominator: Tensor, otherwise: float) -> Tensor:
    """Return the quotient, ``otherwise`` where the denominator is 0."""
    safe = torch.where(denominator > 0, denominator, 1)
    return torch.where(denominator > 0, numerator / safe, otherwise)


def where_labelled(numbers: Tensor, count: Tensor) -> Tensor:
    """Return numbers per output ``(…, K)``, NaN for an output without labelled cells."""
    return torch.where(count > 0, numbers, torch.nan)


def mean(numbers: Tensor) -> Tensor:
    """Return the mean over outputs ``(…, K) -> (…)``, leaving out those that are NaN; NaN if all are."""
    return numbers.nanmean(-1)


class Metric(torchmetrics.Metric):
    """Base of metrics.

    Numbers are called ``<quantity>/<output>`` or ``<quantity>/mean``, e.g. ``f1/AU12``. A number that does not exist
    (no labels) is NaN.

    Attributes:
        per_output: Quantities with one number per output.
        summaries: Further numbers, in full.
        outputs: Names of the outputs, set by ``bind``.
        higher_is_better: Direction of all numbers, or of each quantity by name.
        counts: Names of numbers that are counts: no interval is computed for them.
    """

    full_state_update = False
    is_differentiable = False
    higher_is_better: bool | Mapping[str, bool] = True  # type: ignore[assignment]
    per_output: ClassVar[tuple[str, ...]] = ()
    counts: ClassVar[frozenset[str]] = frozenset()

    def __init__(self) -> None:
        super().__init__()
        self.outputs: tuple[str, ...] = ()

    @property
    def summaries(self) -> tuple[str, ...]:
        return tuple(f"{quantity}/mean" for quantity in self.per_output)

    @property
    def names(self) -> tuple[str, ...]:
        """Name of each number that ``compute`` returns, in its order: summaries first."""
        return (*self.summaries, *(f"{quantity}/{name}" for quantity in self.per_output for name in self.outputs))

    def higher(self, name: str) -> bool:
        """Return whether more is better for the number of this name."""
        direction = type(self).higher_is_better
        return direction if isinstance(direction, bool) else direction[name.split("/")[0]]

    def bind(self, outputs: Sequence[str]) -> None:
        """Fix the outputs by name and reset; the framework calls it once the tasks know their outputs."""
        self.outputs = tuple(outputs)

    def label(self, raw: Mapping[str, Tensor]) -> dict[str, Tensor]:
        """Return named numbers ``(…)`` of quantities ``(…, K)`` and summaries ``(…)``."""
        named = {name: raw[name] for name in self.summaries}
        for quantity in self.per_output:
            each = raw[quantity].unbind(-1)
            named |= {f"{quantity}/{name}": number for name, number in zip(self.outputs, each, strict=True)}
        return named

    def sizes(self, target: Tensor, mask: Tensor) -> dict[str, int]:
        """Return the number of labelled samples behind each number."""
        rows = int(mask.any(1).sum())
        each = mask.sum(0).tolist()
        named = dict.fromkeys(self.summaries, rows)
        for quantity in self.per_output:
            named |= {f"{quantity}/{name}": each[k] for k, name in enumerate(self.outputs)}
        return named

    @abstractmethod
    def constants(self, target: Tensor, mask: Tensor) -> dict[str, Tensor]:
        """Return each number for the constant prediction that is best for it on these samples."""

    @abstractmethod
    def resampler(self, values: Tensor, target: Tensor, mask: Tensor, group: Tensor, groups: int) -> Resampler:
        """Return a function of how often each group is drawn; ones give the numbers of all samples.

        Args:
            values: ``(N, K)``.
            target: ``(N, K)``.
            mask: bool ``(N, K)``.
            group: Index of each sample's group, int64 ``(N,)``.
            groups: Number of groups G.
        """

    def score(self, values: Tensor, target: Tensor, mask: Tensor) -> dict[str, Tensor]:
        """Return the numbers of these samples, without touching the metric's state."""
        group = torch.zeros(len(values), dtype=torch.int64, device=values.device)
        one = torch.ones(1, 1, dtype=torch.float64, device=values.device)
        return {name: number[0] for name, number in self.resampler(values, target, mask, group, 1)(one).items()}

    def require_bound(self) -> None:
        """Raise ``ConfigError`` if the outputs are not known yet."""
        if not self.outputs:
            raise ConfigError(f"{type(self).__name__}: call bind(outputs) with the names of the outputs before its use")


class AdditiveMetric(Metric):
    """Base of metrics that are functions of sums over samples."""

    total: Tensor

    @abstractmethod
    def shape(self, outputs: int) -> tuple[int, ...]:
        """Return the shape of the statistics of one sample."""

    @abstractmethod
    def statistics(self, values: Tensor, target: Tensor, mask: Tensor) -> Tensor:
        """Return what each sample adds, float64 ``(N, …)``, zero where masked."""

    @abstractmethod
    def scores(self, total: Tensor) -> dict[str, Tensor]:
        """Return quantities ``(…, K)`` and summaries ``(…)`` of statistics summed over samples."""

    @abstractmethod
    def best_constant(self, total: Tensor) -> dict[str, Tensor]:
        """Return what ``scores`` returns, for the best constant prediction on the same samples."""

    def bind(self, outputs: Sequence[str]) -> None:
        super().bind(outputs)
        self.add_state("total", torch.zeros(self.shape(len(self.outputs)), dtype=torch.float64), dist_reduce_fx="sum")

    def update(self, values: Tensor, target: Tensor, mask: Tensor) -> None:
        """Add a batch of values, targets and masks."""
        self.require_bound()
        self.total += self.statistics(values.detach(), target, mask).sum(0)

    def compute(self) -> dict[str, Tensor]:
        """Return all numbers by name, float64 scalars."""
        self.require_bound()
        return self.label(self.scores(self.total))

    def constants(self, target: Tensor, mask: Tensor) -> dict[str, Tensor]:
        # The best constant depends on targets alone, so any values will do.
        group = torch.zeros(len(target), dtype=torch.int64, device=target.device)
        return self.label(self.best_constant(self.group_totals(target, target, mask, group, 1)[0]))

    def group_totals(self, values: Tensor, target: Tensor, mask: Tensor, group: Tensor, groups: int) -> Tensor:
        """Return statistics summed per group, float64 ``(G, …)``."""
        self.require_bound()
        total = torch.zeros(groups, *self.shape(len(self.outputs)), dtype=torch.float64, device=values.device)
        for start in range(0, len(values), CHUNK):
            rows = slice(start, start + CHUNK)
            total.index_add_(0, group[rows], self.statistics(values[rows], target[rows], mask[rows]))
        return total

    def resampler(self, values: Tensor, target: Tensor, mask: Tensor, group: Tensor, groups: int) -> Resampler:
        total = self.group_totals(values, target, mask, group, groups)

        def resampled(drawn: Tensor) -> dict[str, Tensor]:
            return self.label(self.scores((drawn @ total.flatten(1)).unflatten(1, total.shape[1:])))

        return resampled
