# SPDX-License-Identifier: Apache-2.0
"""How task losses are weighed in a multi-task sum."""

from __future__ import annotations

from collections.abc import Mapping

from torch import Tensor, nn

from affect.errors import ConfigError, near
from affect.losses.base import Terms


class FixedWeighting(nn.Module):
    """A constant factor per task.

    Args:
        weights: Factor by task name. Tasks that are not named weigh 1.
    """

    def __init__(self, weights: Mapping[str, float] | None = None) -> None:
        super().__init__()
        self.weights = {name: float(weight) for name, weight in (weights or {}).items()}

    def forward(self, terms: Mapping[str, Terms]) -> dict[str, Tensor]:
        """Return the weighed mean over valid cells of each task; counts are global, sums are local."""
        for name in self.weights:
            if name not in terms:
                raise ConfigError(f"weighting: no task {name!r}; {near(name, terms)}")
        return {
            name: self.weights.get(name, 1.0) * term.sum.sum() / term.count.sum().clamp(min=1)
            for name, term in terms.items()
        }
