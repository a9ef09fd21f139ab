# SPDX-License-Identifier: Apache-2.0
"""Learning-rate schedules that torch does not have in one piece. Everything else is used from torch or timm by name."""

from __future__ import annotations

import math

from torch.optim import Optimizer
from torch.optim.lr_scheduler import LambdaLR


def warmup_cosine_factor(step: int, total_steps: int, warmup: float = 0.05, final: float = 0.01) -> float:
    """Return the factor of the base rate: a linear warm-up, then half a cosine down to ``final``.

    Args:
        step: Steps done so far.
        total_steps: Steps of the whole run.
        warmup: Share of the run that warms up, in [0, 1).
        final: Factor at the end.
    """
    warm = int(warmup * total_steps)
    if step < warm:
        return (step + 1) / (warm + 1)
    progress = min(1.0, (step - warm) / max(1, total_steps - warm))
    return final + (1 - final) * 0.5 * (1 + math.cos(math.pi * progress))


def polynomial_factor(step: int, total_steps: int, power: float = 1.0) -> float:
    """Return ``(1 - step / total_steps) ** power``."""
    return max(0.0, 1 - step / max(1, total_steps)) ** power


def warmup_cosine(optimizer: Optimizer, total_steps: int, warmup: float = 0.05, final: float = 0.01) -> LambdaLR:
    """Return a schedule of ``warmup_cosine_factor``."""
    return LambdaLR(optimizer, lambda step: warmup_cosine_factor(step, total_steps, warmup, final))


def polynomial(optimizer: Optimizer, total_steps: int, power: float = 1.0) -> LambdaLR:
    """Return a schedule of ``polynomial_factor``."""
    return LambdaLR(optimizer, lambda step: polynomial_factor(step, total_steps, power))
