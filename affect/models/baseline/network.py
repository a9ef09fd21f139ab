# SPDX-License-Identifier: Apache-2.0
"""Linear heads on a shared vector."""

from __future__ import annotations

from collections.abc import Mapping

from torch import Tensor, nn

from affect.errors import ConfigError


class Heads(nn.Module):
    """One linear layer per task on a shared vector, optionally behind a shared hidden layer.

    Args:
        features: Channels D of the input vector.
        outputs: Number of outputs by task.
        hidden: Units of a shared hidden layer with ReLU; None for none.
        dropout: Dropout rate before the heads.
    """

    def __init__(
        self, features: int, outputs: Mapping[str, int], hidden: int | None = None, dropout: float = 0.0
    ) -> None:
        super().__init__()
        layers: list[nn.Module] = [nn.Dropout(dropout)] if dropout else []
        if hidden:
            layers += [nn.Linear(features, hidden), nn.ReLU()]
        self.trunk = nn.Sequential(*layers)
        self.linear = nn.ModuleDict({name: nn.Linear(hidden or features, count) for name, count in outputs.items()})
        for layer in self.linear.values():
            # Small weights start every task at its prior: probabilities near 1/2, numbers near 0, points mid-crop.
            nn.init.normal_(layer.weight, std=0.01)
            nn.init.zeros_(layer.bias)

    def forward(self, vector: Tensor) -> dict[str, Tensor]:
        """Return unbounded outputs ``(B, K)`` by task for ``(B, D)``."""
        if vector.ndim != 2:
            raise ConfigError(
                f"heads take a vector per image, got shape {tuple(vector.shape)}: set encoder.output=vector"
            )
        shared = self.trunk(vector)
        return {name: layer(shared) for name, layer in self.linear.items()}
