# SPDX-License-Identifier: Apache-2.0
"""An ordinal task, which affect does not have: is the pain at least 1, at least 2, …?"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from itertools import pairwise
from typing import ClassVar

import numpy as np
from torch import Tensor

from affect.errors import ConfigError
from affect.tasks import Columns, Encoded, Task
from affect.tasks.base import require_range

COLUMN, HIGHEST = "pain", 16


class PainLevel(Task):
    """Levels of the column ``pain`` (0 to 16), represented by one logit per threshold: is it reached?

    Args:
        thresholds: Lowest pain of each level above the first, increasing; ``[1, 2, 3, 4, 6]`` makes the six levels
            0, 1, 2, 3, 4 to 5 and 6 to 16.
        **common: Arguments of ``affect.tasks.Task``.
    """

    flags: ClassVar[bool] = True

    def __init__(self, thresholds: Sequence[int] = (1, 2, 3, 4, 6), **common) -> None:  # noqa: ANN003
        super().__init__(**common)
        self.thresholds = tuple(int(number) for number in thresholds)
        bounds = (0, *self.thresholds, HIGHEST + 1)
        if not self.thresholds or any(low >= high for low, high in pairwise(bounds)):
            raise ConfigError(f"thresholds={list(thresholds)}: increasing whole numbers from 1 to {HIGHEST}")

    @property
    def outputs(self) -> tuple[str, ...]:
        return tuple(f"at_least_{number}" for number in self.thresholds)

    def columns(self, available: frozenset[str]) -> tuple[str, ...]:
        return tuple(name for name in self.wanted() if name in available)

    def wanted(self) -> tuple[str, ...]:
        return (COLUMN,)

    def encode(self, source: Columns, rows: np.ndarray | None = None) -> Encoded:
        """Return 1 for each threshold that is reached ``(N, K)``; a row without pain is masked in all of them."""
        if COLUMN not in source.names:
            nothing = np.zeros((len(source.strings("image", rows)[0]), self.num_outputs), np.float32)
            return Encoded(nothing, nothing > 0)
        pain, coded = source.numbers(COLUMN, rows)
        reached = (pain[:, None] >= self.thresholds) & coded[:, None]
        return Encoded(reached.astype(np.float32), np.repeat(coded[:, None], self.num_outputs, 1))

    def check(self, source: Columns) -> None:
        if COLUMN in source.names:
            require_range(source, COLUMN, 0, HIGHEST, integer=True)

    def predict(self, output: Tensor) -> Tensor:
        """Return probabilities ``(B, K)`` that never rise: who reaches a threshold reaches those below it."""
        return output.sigmoid().cummin(-1).values

    def decode(self, values: np.ndarray) -> dict[str, np.ndarray]:
        """Return the probabilities, and as ``pain`` the lowest pain of the most likely level."""
        lowest = np.array((0, *self.thresholds), np.float32)[(values >= 0.5).sum(1)]
        return {COLUMN: lowest, **{f"{COLUMN}_{name}": values[:, k] for k, name in enumerate(self.outputs)}}

    def read_values(self, source: Columns, rows: np.ndarray | None = None) -> np.ndarray:
        return np.stack([source.numbers(f"{COLUMN}_{name}", rows)[0] for name in self.outputs], 1)

    def bars(self, row: Mapping[str, float]) -> tuple[dict[str, float], float]:
        return {COLUMN: float(row[COLUMN])}, HIGHEST
