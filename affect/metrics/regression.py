# SPDX-License-Identifier: Apache-2.0
"""Root mean squared error and mean absolute error per output, in units of the labels."""

from __future__ import annotations

from typing import ClassVar

import torch
from torch import Tensor

from affect.metrics.agreement import moment_statistics, moments
from affect.metrics.base import AdditiveMetric, mean, prepare, ratio, where_labelled


def squared_error_statistics(values: Tensor, target: Tensor, mask: Tensor) -> Tensor:
    """Return squared error and the moments' statistics of each cell, float64 ``(N, K, 7)``."""
    x, y = prepare(values, target, mask)
    return torch.cat([((x - y) ** 2).unsqueeze(-1), moment_statistics(values, target, mask)], -1)


def rmse(total: Tensor) -> Tensor:
    """Return the root mean squared error per output, ``(…, K)``.

    Args:
        total: Sums of ``squared_error_statistics`` ``(…, K, 7)``.

    Example:
        >>> x, y = torch.tensor([[1.0], [2.0]]), torch.tensor([[4.0], [6.0]])
        >>> rmse(squared_error_statistics(x, y, torch.ones(2, 1, dtype=torch.bool)).sum(0))  # sqrt(25 / 2)
        tensor([3.5355], dtype=torch.float64)
    """
    return ratio(total[..., 0], total[..., 1], torch.nan).sqrt()


def absolute_error_statistics(values: Tensor, target: Tensor, mask: Tensor) -> Tensor:
    """Return absolute error and 1 for each labelled cell, float64 ``(N, K, 2)``."""
    x, y = prepare(values, target, mask)
    return torch.stack([(x - y).abs(), mask.double()], -1)


def mae(total: Tensor) -> Tensor:
    """Return the mean absolute error per output, ``(…, K)``.

    Args:
        total: Sums of ``absolute_error_statistics`` ``(…, K, 2)``.

    Example:
        >>> x, y = torch.tensor([[1.0], [2.0]]), torch.tensor([[4.0], [6.0]])
        >>> mae(absolute_error_statistics(x, y, torch.ones(2, 1, dtype=torch.bool)).sum(0))
        tensor([3.5000], dtype=torch.float64)
    """
    return ratio(total[..., 0], total[..., 1], torch.nan)


def median(target: Tensor, mask: Tensor) -> Tensor:
    """Return the median label of each output, float64 ``(K,)``; NaN without labelled cells."""
    if not len(target):
        return torch.full(target.shape[1:], torch.nan, dtype=torch.float64, device=target.device)
    return torch.where(mask, target.double(), torch.nan).nanmedian(0).values


class RMSE(AdditiveMetric):
    """Root mean squared error: ``rmse/<output>`` and ``rmse/mean`` (the mean of the outputs' errors)."""

    higher_is_better = False
    per_output: ClassVar[tuple[str, ...]] = ("rmse",)

    def shape(self, outputs: int) -> tuple[int, ...]:
        return (outputs, 7)

    def statistics(self, values: Tensor, target: Tensor, mask: Tensor) -> Tensor:
        return squared_error_statistics(values, target, mask)

    def scores(self, total: Tensor) -> dict[str, Tensor]:
        each = rmse(total)
        return {"rmse": each, "rmse/mean": mean(each)}

    def best_constant(self, total: Tensor) -> dict[str, Tensor]:
        """Return the error of the mean label, i.e. the labels' standard deviation."""
        m = moments(total[..., 1:])
        each = where_labelled(m.variance_y.sqrt(), m.number)
        return {"rmse": each, "rmse/mean": mean(each)}


class AbsoluteErrorMetric(AdditiveMetric):
    """Base of mean absolute errors. The best constant is no function of sums, so it takes the labels themselves."""

    higher_is_better = False
    per_output: ClassVar[tuple[str, ...]] = ("mae",)

    def shape(self, outputs: int) -> tuple[int, ...]:
        return (outputs, 2)

    def scores(self, total: Tensor) -> dict[str, Tensor]:
        each = mae(total)
        return {"mae": each, "mae/mean": mean(each)}

    def best_constant(self, total: Tensor) -> dict[str, Tensor]:
        """Return NaN: a median does not follow from sums; ``constants`` is exact."""
        return {name: numbers * torch.nan for name, numbers in self.scores(total).items()}

    def centre(self, target: Tensor, mask: Tensor) -> Tensor:
        """Return the constant with the least absolute error per output, ``(K,)``."""
        raise NotImplementedError

    def constants(self, target: Tensor, mask: Tensor) -> dict[str, Tensor]:
        self.require_bound()
        constant = self.centre(target, mask).expand(target.shape)
        return self.score(constant, target, mask)


class MAE(AbsoluteErrorMetric):
    """Mean absolute error: ``mae/<output>`` and ``mae/mean``. The best constant is the median label."""

    def statistics(self, values: Tensor, target: Tensor, mask: Tensor) -> Tensor:
        return absolute_error_statistics(values, target, mask)

    def centre(self, target: Tensor, mask: Tensor) -> Tensor:
        return median(target, mask)
