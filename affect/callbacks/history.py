# SPDX-License-Identifier: Apache-2.0
"""Keeps what each epoch logged, across interruptions, for curves and results."""

from __future__ import annotations

import time
from typing import Any

import pytorch_lightning as pl


class History(pl.Callback):
    """Collects the epoch values of training and validation and the training time.

    Attributes:
        epochs: One dict per finished epoch: ``epoch``, ``step`` and every logged value.
        seconds: Training time over all attempts, up to the last finished epoch.
    """

    def __init__(self) -> None:
        self.epochs: list[dict[str, float]] = []
        self.seconds = 0.0
        self._since = time.monotonic()

    def on_fit_start(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        """Start the clock."""
        self._since = time.monotonic()

    def on_train_epoch_end(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        """Add the epoch; Lightning calls this before the checkpoint of the epoch is written."""
        losses = pl_module.epoch_losses("train") | pl_module.readings()
        pl_module.log_dict(losses, rank_zero_only=True)
        values = losses | dict(getattr(pl_module, "last_validation", {}))
        self.epochs.append({"epoch": trainer.current_epoch, "step": trainer.global_step} | values)
        now = time.monotonic()
        self.seconds += now - self._since
        self._since = now

    def state_dict(self) -> dict[str, Any]:
        """Return epochs and time."""
        return {"epochs": [dict(epoch) for epoch in self.epochs], "seconds": self.seconds}

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Restore epochs and time."""
        self.epochs = [dict(epoch) for epoch in state_dict["epochs"]]
        self.seconds = state_dict["seconds"]
