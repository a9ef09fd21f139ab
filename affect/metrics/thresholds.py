# SPDX-License-Identifier: Apache-2.0
"""The threshold of each binary output that maximises its F1. To be chosen on validation rows, never on test rows."""

from __future__ import annotations

import torch
from torch import Tensor

from affect.metrics.base import prepare, ratio
from affect.metrics.counts import PRESENT


def best_thresholds(values: Tensor, target: Tensor, mask: Tensor, default: float = 0.5) -> Tensor:
    """Return for each output the threshold with the highest F1 on these samples, float64 ``(K,)``.

    Exact: every cut between two different values is tried, not a grid. The threshold lies half way between the lowest
    value that is predicted and the next one below; of equally good cuts the highest is taken. All numbers are float32
    ones, so that ``p >= threshold`` in ``F1`` gives exactly the F1 that was found.

    Args:
        values: Probabilities ``(N, K)``.
        target: Labels in [0, 1] ``(N, K)``, present from 0.5.
        mask: True where labelled, bool ``(N, K)``.
        default: Threshold of an output without positives, where F1 says nothing.

    Example:
        >>> values, target = torch.tensor([[0.1], [0.2], [0.4], [0.9]]), torch.tensor([[0.0], [1.0], [1.0], [1.0]])
        >>> best_thresholds(values, target, torch.ones(4, 1, dtype=torch.bool))
        tensor([0.1500], dtype=torch.float64)
    """
    count = len(values)
    if not count:
        return torch.full(values.shape[1:], default, dtype=torch.float64, device=values.device)
    values, target = prepare(values, target, mask)
    # Masked cells sort last and change nothing there.
    value, order = torch.where(mask, values.float(), -torch.inf).sort(0, descending=True)
    labelled = mask.gather(0, order)
    present = (target >= PRESENT).gather(0, order) & labelled
    positives = present.sum(0)
    f1 = ratio(2 * present.cumsum(0).double(), (labelled.cumsum(0) + positives).double(), 0.0)
    following = torch.cat([value[1:], torch.full_like(value[:1], -torch.inf)])
    # A cut inside a run of equal values cannot be made.
    best = torch.where(labelled & (following < value), f1, -1.0).argmax(0, keepdim=True)
    lowest, below = value.gather(0, best), following.gather(0, best)
    middle = torch.where(below.isfinite(), lowest / 2 + below / 2, lowest)
    threshold = torch.where((middle > below) & (middle <= lowest), middle, lowest).squeeze(0).double()
    return torch.where(positives > 0, threshold, default)
