# SPDX-License-Identifier: Apache-2.0
"""How the losses of several orders become one (Tallec et al., MONET, arXiv 2202.00446)."""

from __future__ import annotations

import torch
from torch import Tensor


def mixture(losses: Tensor, logits: Tensor) -> Tensor:
    r"""Return the negative log-likelihood of the mixture of orders (loss A), ``(B,)``.

    .. math:: -\log \sum_m \pi_m e^{-l_m} = \mathrm{lse}(u) - \mathrm{lse}(u - l), \qquad \pi = \mathrm{softmax}(u)

    Args:
        losses: Negative log-likelihood l of each order ``(B, M)``.
        logits: Order logits u, ``(M,)`` or ``(B, M)``; minus infinity leaves an order out.
    """
    return torch.logsumexp(logits.expand_as(losses), -1) - torch.logsumexp(logits - losses, -1)


def bound(losses: Tensor, logits: Tensor) -> Tensor:
    r"""Return Jensen's upper bound of ``mixture`` (loss B), :math:`\sum_m \pi_m l_m`, per example or per cell.

    Args:
        losses: Losses of each order ``(B, M)``, or of each order and task ``(B, M, T)``.
        logits: Order logits u, ``(M,)`` or ``(B, M)``; minus infinity leaves an order out.

    Returns:
        ``(B,)``, or ``(B, T)``.
    """
    weights = logits.softmax(-1).expand(losses.shape[:2])
    # An order that is left out has weight 0; its loss must not turn that into NaN.
    weights = weights if losses.ndim == 2 else weights[..., None]
    return torch.where(weights > 0, weights * losses, 0).sum(1)
