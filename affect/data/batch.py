# SPDX-License-Identifier: Apache-2.0
"""The batch that travels from the data module to every model."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field, fields, replace

import torch
from torch import Tensor


@dataclass(frozen=True)
class FaceBatch:
    """A batch of face crops with their targets.

    Attributes:
        image: RGB, uint8, ``(B, 3, H, W)``; the encoder normalises on the device.
        targets: By task: float ``(B, K)``, for landmarks ``(B, P, 2)`` as fractions of width and height.
        masks: By task: bool ``(B, K)``, for landmarks ``(B, P)``. True where the cell is labelled.
        points: By landmark scheme: ``(B, P, 2)`` in pixels of ``image`` (first pixel centre at 0), for auxiliary
            objectives; 0 where ``point_masks`` is False.
        point_masks: By landmark scheme: bool ``(B, P)``.
        matrix: ``(B, 2, 3)``, maps pixels of the stored image to pixels of ``image`` (crop, resize, augmentation).
        source: Index of the table that each sample comes from, int64 ``(B,)``.
        row: Row of each sample in its table, int64 ``(B,)``.
        flipped: Whether the sample was mirrored, bool ``(B,)``.
    """

    image: Tensor
    targets: dict[str, Tensor]
    masks: dict[str, Tensor]
    points: dict[str, Tensor] = field(default_factory=dict)
    point_masks: dict[str, Tensor] = field(default_factory=dict)
    matrix: Tensor = field(default_factory=lambda: torch.zeros(0, 2, 3))
    source: Tensor = field(default_factory=lambda: torch.zeros(0, dtype=torch.int64))
    row: Tensor = field(default_factory=lambda: torch.zeros(0, dtype=torch.int64))
    flipped: Tensor = field(default_factory=lambda: torch.zeros(0, dtype=torch.bool))

    def __len__(self) -> int:
        return self.image.shape[0]

    def to(self, device: torch.device | str, non_blocking: bool = False) -> FaceBatch:
        """Return the batch on ``device``."""
        return self._map(lambda tensor: tensor.to(device, non_blocking=non_blocking))

    def pin_memory(self) -> FaceBatch:
        """Return the batch in page-locked memory."""
        return self._map(lambda tensor: tensor.pin_memory())

    def _map(self, function: Callable[[Tensor], Tensor]) -> FaceBatch:
        changed = {}
        for item in fields(self):
            value = getattr(self, item.name)
            if isinstance(value, dict):
                changed[item.name] = {key: function(tensor) for key, tensor in value.items()}
            else:
                changed[item.name] = function(value)
        return replace(self, **changed)
