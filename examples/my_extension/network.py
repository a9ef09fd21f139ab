# SPDX-License-Identifier: Apache-2.0
"""Attention pooling: each task has a query of its own that looks over the positions of the encoder's map."""

from __future__ import annotations

from collections.abc import Mapping

import torch
from torch import Tensor, nn


class TaskAttention(nn.Module):
    """One learned query and one linear head per task.

    Args:
        features: Channels D of a position.
        outputs: Number of outputs by task.
        width: Channels of queries and keys.
    """

    def __init__(self, features: int, outputs: Mapping[str, int], width: int = 64) -> None:
        super().__init__()
        self.query = nn.Parameter(torch.randn(len(outputs), width))
        self.key = nn.Linear(features, width)
        self.attention = nn.Softmax(dim=-1)  # a layer by itself, so that objectives can tap its weights (B, T, N)
        self.linear = nn.ModuleDict({name: nn.Linear(features, count) for name, count in outputs.items()})

    def forward(self, tokens: Tensor) -> dict[str, Tensor]:
        """Return unbounded outputs ``(B, K)`` by task of tokens ``(B, N, D)``."""
        scores = self.query @ self.key(tokens).transpose(1, 2) / self.query.shape[1] ** 0.5
        seen = self.attention(scores) @ tokens
        return {name: layer(seen[:, t]) for t, (name, layer) in enumerate(self.linear.items())}
