# SPDX-License-Identifier: Apache-2.0
"""Agreement of continuous predictions with labels: CCC, PCC, ICC(3,1) and SAGR, over all samples pooled.

Moments are population moments (division by N), as in the ABAW protocol (Kollias, arXiv 2202.10659).
"""

from __future__ import annotations

from typing import ClassVar, NamedTuple

import torch
from torch import Tensor

from affect.metrics.base import AdditiveMetric, mean, prepare, ratio, where_labelled

_NEGLIGIBLE = 1e-12  # a variance this small beside the mean square is rounding of a constant


class Moments(NamedTuple):
    """Population moments per output, each ``(…, K)``: number of samples, means, variances and covariance."""

    number: Tensor
    mean_x: Tensor
    mean_y: Tensor
    variance_x: Tensor
    variance_y: Tensor
    covariance: Tensor


def moment_statistics(values: Tensor, target: Tensor, mask: Tensor) -> Tensor:
    """Return what each sample adds to the moments, float64 ``(N, K, 6)``: 1, x, y, x², y², xy.

    Args:
        values: Predictions x ``(N, K)``.
        target: Labels y ``(N, K)``.
        mask: True where labelled, bool ``(N, K)``.
    """
    x, y = prepare(values, target, mask)
    return torch.stack([mask.double(), x, y, x * x, y * y, x * y], -1)


def moments(total: Tensor) -> Moments:
    """Return the moments of summed statistics ``(…, K, 6)``; a variance within rounding error of 0 is 0."""
    count, *sums = total.unbind(-1)
    mean_x, mean_y, square_x, square_y, product = (ratio(each, count, 0.0) for each in sums)
    variance_x, variance_y = square_x - mean_x**2, square_y - mean_y**2
    variance_x = torch.where(variance_x > _NEGLIGIBLE * square_x, variance_x, 0)
    variance_y = torch.where(variance_y > _NEGLIGIBLE * square_y, variance_y, 0)
    varies = (variance_x > 0) & (variance_y > 0)
    return Moments(count, mean_x, mean_y, variance_x, variance_y, torch.where(varies, product - mean_x * mean_y, 0))


def ccc(total: Tensor) -> Tensor:
    r"""Return the concordance correlation coefficient per output (Lin, Biometrics 1989), ``(…, K)``.

    .. math:: \frac{2 \operatorname{cov}(x, y)}{\sigma_x^2 + \sigma_y^2 + (\mu_x - \mu_y)^2}

    It is 0 if predictions or labels are constant, also if both are the same constant.

    Args:
        total: Sums of ``moment_statistics`` ``(…, K, 6)``.

    Example:
        >>> x, y = torch.tensor([[1.0], [2.0], [3.0]]), torch.tensor([[2.0], [3.0], [4.0]])
        >>> ccc(moment_statistics(x, y, torch.ones(3, 1, dtype=torch.bool)).sum(0))  # (4 / 3) / (7 / 3)
        tensor([0.5714], dtype=torch.float64)
    """
    m = moments(total)
    spread = m.variance_x + m.variance_y + (m.mean_x - m.mean_y) ** 2
    return where_labelled(ratio(2 * m.covariance, spread, 0.0), m.number)


def pcc(total: Tensor) -> Tensor:
    """Return Pearson's correlation coefficient per output, ``(…, K)``; 0 if predictions or labels are constant.

    Args:
        total: Sums of ``moment_statistics`` ``(…, K, 6)``.

    Example:
        >>> x, y = torch.tensor([[1.0], [2.0], [3.0]]), torch.tensor([[2.0], [3.0], [4.0]])
        >>> pcc(moment_statistics(x, y, torch.ones(3, 1, dtype=torch.bool)).sum(0))
        tensor([1.0000], dtype=torch.float64)
    """
    m = moments(total)
    return where_labelled(ratio(m.covariance, m.variance_x.sqrt() * m.variance_y.sqrt(), 0.0), m.number)


def icc(total: Tensor) -> Tensor:
    r"""Return ICC(3,1) per output (Shrout and Fleiss, 1979) with prediction and label as the two raters, ``(…, K)``.

    .. math:: \frac{BMS - EMS}{BMS + EMS} = \frac{2 \operatorname{cov}(x, y)}{\sigma_x^2 + \sigma_y^2}

    It measures consistency: a constant offset costs nothing. It is 0 if predictions or labels are constant.

    Args:
        total: Sums of ``moment_statistics`` ``(…, K, 6)``.

    Example:
        >>> x, y = torch.tensor([[1.0], [2.0], [3.0]]), torch.tensor([[3.0], [5.0], [7.0]])
        >>> icc(moment_statistics(x, y, torch.ones(3, 1, dtype=torch.bool)).sum(0))
        tensor([0.8000], dtype=torch.float64)
    """
    m = moments(total)
    return where_labelled(ratio(2 * m.covariance, m.variance_x + m.variance_y, 0.0), m.number)


def sign_statistics(values: Tensor, target: Tensor, mask: Tensor) -> Tensor:
    """Return whether signs agree and whether the label is negative, zero, positive, float64 ``(N, K, 4)``."""
    x, y = prepare(values, target, mask)
    sign = y.sign()
    parts = [x.sign() == sign, sign < 0, sign == 0, sign > 0]
    return (torch.stack(parts, -1) & mask.unsqueeze(-1)).double()


def sagr(total: Tensor) -> Tensor:
    """Return the share of samples whose prediction has the label's sign, per output ``(…, K)``.

    Zero is a sign of its own: it agrees with zero only.

    Args:
        total: Sums of ``sign_statistics`` ``(…, K, 4)``.

    Example:
        >>> x, y = torch.tensor([[0.1], [0.1], [0.0]]), torch.tensor([[0.9], [0.0], [0.0]])
        >>> sagr(sign_statistics(x, y, torch.ones(3, 1, dtype=torch.bool)).sum(0))
        tensor([0.6667], dtype=torch.float64)
    """
    return ratio(total[..., 0], total[..., 1:].sum(-1), torch.nan)


class _MomentMetric(AdditiveMetric):
    """A coefficient of the moments, which is 0 for every constant prediction."""

    def shape(self, outputs: int) -> tuple[int, ...]:
        return (outputs, 6)

    def statistics(self, values: Tensor, target: Tensor, mask: Tensor) -> Tensor:
        return moment_statistics(values, target, mask)

    def coefficient(self, total: Tensor) -> Tensor:
        """Return the coefficient per output ``(…, K)``."""
        raise NotImplementedError

    def scores(self, total: Tensor) -> dict[str, Tensor]:
        each = self.coefficient(total)
        (name,) = self.per_output
        return {name: each, f"{name}/mean": mean(each)}

    def best_constant(self, total: Tensor) -> dict[str, Tensor]:
        return {name: numbers * 0 for name, numbers in self.scores(total).items()}


class CCC(_MomentMetric):
    """Concordance correlation coefficient of the pooled samples: ``ccc/<output>`` and ``ccc/mean``."""

    per_output: ClassVar[tuple[str, ...]] = ("ccc",)

    def coefficient(self, total: Tensor) -> Tensor:
        return ccc(total)


class PCC(_MomentMetric):
    """Pearson's correlation coefficient of the pooled samples: ``pcc/<output>`` and ``pcc/mean``."""

    per_output: ClassVar[tuple[str, ...]] = ("pcc",)

    def coefficient(self, total: Tensor) -> Tensor:
        return pcc(total)


class ICC(_MomentMetric):
    """ICC(3,1) of prediction and label: ``icc/<output>`` and ``icc/mean``."""

    per_output: ClassVar[tuple[str, ...]] = ("icc",)

    def coefficient(self, total: Tensor) -> Tensor:
        return icc(total)


class SAGR(AdditiveMetric):
    """Share of equal signs: ``sagr/<output>`` and ``sagr/mean``. Zero agrees with zero only."""

    per_output: ClassVar[tuple[str, ...]] = ("sagr",)

    def shape(self, outputs: int) -> tuple[int, ...]:
        return (outputs, 4)

    def statistics(self, values: Tensor, target: Tensor, mask: Tensor) -> Tensor:
        return sign_statistics(values, target, mask)

    def scores(self, total: Tensor) -> dict[str, Tensor]:
        each = sagr(total)
        return {"sagr": each, "sagr/mean": mean(each)}

    def best_constant(self, total: Tensor) -> dict[str, Tensor]:
        signs = total[..., 1:]
        each = ratio(signs.amax(-1), signs.sum(-1), torch.nan)
        return {"sagr": each, "sagr/mean": mean(each)}
