# SPDX-License-Identifier: Apache-2.0
"""The baseline as a Lightning module: linear probe, full or partial fine-tuning, training from scratch."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor, nn

from affect.encoders import TimmEncoder
from affect.models.base import AffectModule, Batch
from affect.models.baseline.network import Heads
from affect.tasks import Task


class Baseline(AffectModule):
    """A shared encoder with one linear head per task.

    Args:
        tasks: What to predict, by name.
        encoder: Backbone with ``output=vector``.
        hidden: Units of a shared hidden layer before the heads; None for none.
        dropout: Dropout rate before the heads.
        **common: Arguments of ``AffectModule``.
    """

    def __init__(
        self,
        tasks: Mapping[str, Task],
        encoder: TimmEncoder,
        hidden: int | None = None,
        dropout: float = 0.0,
        **common: Any,  # noqa: ANN401
    ) -> None:
        super().__init__(tasks, **common)
        self.encoder = encoder
        self.head = Heads(encoder.num_features, {n: t.num_outputs for n, t in self.tasks.items()}, hidden, dropout)

    def forward(self, batch: Batch) -> dict[str, Tensor]:
        """Return the representation of each task for a batch of RGB uint8 images."""
        image = batch.image
        if self.channels_last:
            image = image.contiguous(memory_format=torch.channels_last)
        raw = self.head(self.encoder(image))
        return {name: self.tasks[name].link(value) for name, value in raw.items()}

    def heads(self) -> dict[str, nn.Linear]:
        """Return the linear layer of each task; its rows are the task's outputs in order."""
        return dict(self.head.linear.items())  # type: ignore[arg-type]
