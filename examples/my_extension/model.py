# SPDX-License-Identifier: Apache-2.0
"""A model of its own: an encoder's map, attention pooling per task, linear heads."""

from __future__ import annotations

from collections.abc import Mapping
from typing import ClassVar

from torch import Tensor, nn

from affect.encoders import TimmEncoder
from affect.errors import ConfigError
from affect.models.base import AffectModule, Batch
from affect.tasks import Task
from my_extension.network import TaskAttention


class AttentionModel(AffectModule):
    """A shared encoder whose positions each task attends to by itself.

    Args:
        tasks: What to predict, by name.
        encoder: Backbone with ``output=map``.
        width: Channels of queries and keys.
        **common: Arguments of ``affect.models.base.AffectModule``.
    """

    no_weight_decay: ClassVar[tuple[str, ...]] = ("query",)

    def __init__(self, tasks: Mapping[str, Task], encoder: TimmEncoder, width: int = 64, **common) -> None:  # noqa: ANN003
        super().__init__(tasks, **common)
        if encoder.output != "map":
            raise ConfigError(f"AttentionModel looks at positions: set encoder.output=map (it is {encoder.output})")
        self.encoder = encoder
        self.pool = TaskAttention(encoder.num_features, {n: t.num_outputs for n, t in self.tasks.items()}, width)

    def forward(self, batch: Batch) -> dict[str, Tensor]:
        """Return the representation of each task for a batch of RGB uint8 images."""
        tokens = self.encoder(batch.image).flatten(2).transpose(1, 2)
        return {name: self.tasks[name].link(raw) for name, raw in self.pool(tokens).items()}

    def heads(self) -> dict[str, nn.Linear]:
        """Return the linear layers, for ``init=`` by label name."""
        return dict(self.pool.linear.items())  # type: ignore[arg-type]
