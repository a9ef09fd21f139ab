# SPDX-License-Identifier: Apache-2.0
"""Learning-rate schedules that torch does not have in one piece. Everything else is used from torch or timm by name."""

from __future__ import annotations

import math
from collections.abc import Callable

from torch.optim import Optimizer
from torch.optim.lr_scheduler import LambdaLR

from affect.errors import ConfigError


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


def token_rate(step: int, batch_size: int, tokens: int, dim: int, steps_per_epoch: int, rise: float = 2.5) -> float:
    r"""Return the rescaled rate of "Attention is all you need" that the AU transformer learns by (arXiv 2203.12531).

    .. math:: \frac{B S}{25000} d^{-1/2} \min(k^{-1/2}, k (e n)^{-3/2})

    Args:
        step: Steps k done so far; 0 at step 0.
        batch_size: Samples of a step B.
        tokens: Vectors per sample S, which take the place of the original's tokens per batch.
        dim: Channels d.
        steps_per_epoch: Steps n of an epoch.
        rise: Epochs e of the linear rise; the peak is at step e n.
    """
    if step == 0:
        return 0.0
    peak = rise * steps_per_epoch
    return batch_size * tokens / 25_000 * dim**-0.5 * min(step**-0.5, step * peak**-1.5)


def token_schedule(
    optimizer: Optimizer,
    steps_per_epoch: int,
    batch_size: int = 64,
    patches: int = 64,
    tokens: int = 12,
    dim: int = 128,
    rise: float = 2.5,
    decay: float = 0.99,
) -> LambdaLR:
    """Return the AU transformer's schedule, in which encoder, patches and tokens have rates of their own.

    The encoder's rate falls by the factor ``decay`` per epoch; patches and tokens follow ``token_rate``, whatever
    the optimiser's ``lr`` is.

    Args:
        optimizer: Optimiser whose groups are named ``encoder``, ``patches`` or ``tokens``.
        steps_per_epoch: Steps of an epoch.
        batch_size: Samples of a step.
        patches: Positions of the feature map.
        tokens: Number of tokens.
        dim: Channels of the transformer.
        rise: Epochs of the linear rise.
        decay: Factor of the encoder's rate per epoch.

    Raises:
        ConfigError: If the model has neither patches nor tokens.
    """
    if not {"patches", "tokens"} & {group.get("name") for group in optimizer.param_groups}:
        raise ConfigError(
            "scheduler=tokens is that of patches and tokens, and the model has none; take another schedule, or "
            "model=au_transformer or task_token_transformer"
        )

    def factor(group: dict) -> Callable[[int], float]:
        vectors = {"patches": patches, "tokens": tokens}.get(group.get("name", ""))
        if vectors is None:
            return lambda step: decay ** (step // max(1, steps_per_epoch))
        base = group["lr"] or 1.0
        return lambda step: token_rate(step, batch_size, vectors, dim, steps_per_epoch, rise) / base

    return LambdaLR(optimizer, [factor(group) for group in optimizer.param_groups])
