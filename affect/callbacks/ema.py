# SPDX-License-Identifier: Apache-2.0
"""Exponential moving average of the weights: Lightning's, kept in place until the validation is over."""

from __future__ import annotations

import functools
from typing import Any

import pytorch_lightning as pl
from pytorch_lightning.callbacks import EMAWeightAveraging
from torch import Tensor


class EMA(EMAWeightAveraging):
    """Lightning's EMA callback whose averaged weights stay in the model until ``on_validation_end``.

    Lightning swaps the weights back before validation metrics exist, so a callback that keeps the best weights by such
    a metric would keep the wrong ones. Checkpoints that are written after the validation see the original weights.

    Args:
        decay: Factor of the old average per update, in [0, 1).
        update_every_n_steps: Steps between two updates.
        update_starting_at_step: First step that updates; None starts at once.
    """

    def __init__(
        self, decay: float = 0.999, update_every_n_steps: int = 1, update_starting_at_step: int | None = None
    ) -> None:
        super().__init__(
            decay=decay,
            update_every_n_steps=update_every_n_steps,
            update_starting_at_step=update_starting_at_step,
            use_buffers=True,
        )
        self._kwargs["avg_fn"] = functools.partial(_averaged, decay=float(decay))

    def on_validation_epoch_end(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        """Leave the averaged weights in place."""

    def on_validation_end(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        """Put the original weights back."""
        super().on_validation_epoch_end(trainer, pl_module)

    def load_averaged(self, module: pl.LightningModule) -> None:
        """Copy the averaged weights into ``module``.

        Lightning does so when training ends, which a continued run whose training had ended never reaches.
        """
        if self._average_model is not None:
            self._copy_average_to_current(module)


def _averaged(average: Tensor, current: Tensor, count: Any, decay: float) -> Tensor:  # noqa: ANN401
    """Return the new average, written so that weights that nobody trains stay bit-identical."""
    return average + (1 - decay) * (current - average)
