# SPDX-License-Identifier: Apache-2.0
"""True and false positives and negatives of binary outputs, from which F1 and the other rates follow."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from affect.errors import ConfigError
from affect.metrics.base import prepare

PRESENT = 0.5
"""A target of at least this counts as present (soft labels of a teacher, or of several coders)."""


def binary_counts(values: Tensor, target: Tensor, mask: Tensor, threshold: float | Sequence[float] = 0.5) -> Tensor:
    """Return true positives, false positives, false negatives and true negatives, float64 ``(N, K, 4)``.

    An output is predicted if ``p >= threshold``. Both sides are compared in float32, the type in which models answer
    and tables store, so that a threshold that equals a stored value includes it.

    Args:
        values: Probabilities ``(N, K)``.
        target: Labels in [0, 1] ``(N, K)``, present from 0.5.
        mask: True where labelled, bool ``(N, K)``.
        threshold: One number, or one per output.

    Example:
        >>> values, target = torch.tensor([[0.5, 0.2]]), torch.tensor([[1.0, 1.0]])
        >>> binary_counts(values, target, torch.tensor([[True, False]]))
        tensor([[[1., 0., 0., 0.],
                 [0., 0., 0., 0.]]], dtype=torch.float64)
    """
    values, target = prepare(values, target, mask)
    limit = torch.tensor(threshold, dtype=torch.float32, device=values.device)
    if limit.ndim and len(limit) != values.shape[1]:
        raise ConfigError(f"threshold has {len(limit)} numbers but there are {values.shape[1]} outputs; give one each")
    predicted, present = values.float() >= limit, target >= PRESENT
    cells = [predicted & present, predicted & ~present, ~predicted & present, ~predicted & ~present]
    return (torch.stack(cells, -1) & mask.unsqueeze(-1)).double()


def checked_threshold(threshold: float | Sequence[float]) -> float | tuple[float, ...]:
    """Return the threshold as a number or a tuple of numbers."""
    if isinstance(threshold, int | float):
        return float(threshold)
    try:
        return tuple(float(one) for one in threshold)
    except (TypeError, ValueError) as error:
        raise ConfigError(f"threshold={threshold!r}: give a number, or a list with one per output") from error
