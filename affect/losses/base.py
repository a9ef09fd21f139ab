# SPDX-License-Identifier: Apache-2.0
"""What all losses share: the sum and count that they return, and how masked cells are kept out.

A loss is a pure function that returns one number per cell (or per row, or per output) and a thin module around it that
adds the numbers up. Dividing is left to the caller, because only it knows the count over all devices.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import NamedTuple, Protocol

import numpy as np
import torch
from torch import Tensor, nn

from affect.errors import ConfigError, DataError


class Terms(NamedTuple):
    """A loss before division: ``sum.sum() / count.sum()`` is its mean over valid cells.

    Attributes:
        sum: Loss added up over valid cells, float ``(K,)``, one entry per output; ``(1,)`` for a softmax.
        count: Number of valid cells behind each entry, float, same shape.
    """

    sum: Tensor
    count: Tensor  # type: ignore[assignment]


class Encoded(Protocol):
    """Targets and masks of one table as a task encodes them (``affect.tasks.base.Encoded``)."""

    @property
    def target(self) -> np.ndarray:
        """Targets ``(N, K)``."""
        ...

    @property
    def mask(self) -> np.ndarray:
        """Masks ``(N, K)``, True where labelled."""
        ...


class Loss(nn.Module):
    """Base of losses: called with representations, targets and masks, returns ``Terms``.

    Whatever stands in a masked cell of ``output`` or ``target`` (infinity and NaN included) has no influence on the
    sum or the gradient. If everything is masked, the sum is 0 and still has a graph, so that its gradient is zero.
    """

    def forward(self, output: Tensor, target: Tensor, mask: Tensor) -> Terms:
        """Return sum and count of the loss.

        Args:
            output: Representation ``(B, K)``, for landmarks ``(B, P, 2)``.
            target: Targets, same shape.
            mask: True where labelled, bool ``(B, K)``, for landmarks ``(B, P)``.
        """
        raise NotImplementedError

    def cells(self, output: Tensor, target: Tensor, mask: Tensor) -> Tensor:
        """Return the loss of each cell ``(B, K)``, 0 where masked, for methods that mix losses before they are summed.

        Arguments as in ``forward``.

        Raises:
            ConfigError: If the loss is no sum over cells.
        """
        raise ConfigError(f"loss {type(self).__name__} is not taken cell by cell; choose another, e.g. loss=bce")

    def fit(self, encoded: Sequence[Encoded]) -> None:
        """Take statistics of the coded training cells, e.g. class weights. The default needs none.

        Args:
            encoded: Targets and masks of each training table, restricted to the training rows.
        """


def prepare(output: Tensor, target: Tensor, mask: Tensor) -> tuple[Tensor, Tensor]:
    """Return output and target with 0 in masked cells, in float32 or wider.

    Cells are blanked before any non-linearity: a mask applied after one would turn an infinity into NaN gradients.

    Args:
        output: ``(B, K)`` or ``(B, P, 2)``, any float type.
        target: Same shape.
        mask: bool ``(B, K)`` or ``(B, P)``.

    Raises:
        DataError: If shapes or types do not fit together.
    """
    if output.shape != target.shape or mask.ndim != 2 or output.shape[:2] != mask.shape or output.ndim > 3:
        raise DataError(
            f"loss: output {tuple(output.shape)}, target {tuple(target.shape)}, mask {tuple(mask.shape)} do not fit; "
            "give (B, K) three times, or points (B, P, 2) twice and a mask (B, P)"
        )
    if mask.dtype != torch.bool:
        raise DataError(f"loss: the mask has type {mask.dtype}; give bool, True where labelled")
    kind = torch.promote_types(output.dtype, torch.float32)
    cells = mask if mask.ndim == output.ndim else mask.unsqueeze(-1)
    return torch.where(cells, output.to(kind), 0), torch.where(cells, target.to(kind), 0)


def cellwise(function: Callable[[Tensor, Tensor], Tensor], output: Tensor, target: Tensor, mask: Tensor) -> Tensor:
    """Return ``function(output, target)`` per cell, 0 where masked, in the shape of ``mask``.

    For points ``(B, P, 2)`` it is the mean over both coordinates, so that a fully labelled batch gives torch's mean.
    """
    output, target = prepare(output, target, mask)
    values = function(output, target)
    if values.ndim > mask.ndim:
        values = values.mean(-1)
    return torch.where(mask, values, 0)


def reduce(values: Tensor, mask: Tensor) -> Terms:
    """Return ``Terms`` of shape ``(K,)`` of a loss per cell ``(B, K)`` that is 0 where masked."""
    return Terms(values.sum(0), mask.sum(0).to(values.dtype))
