# SPDX-License-Identifier: Apache-2.0
"""Makes every random draw of a training step a function of (seed, step)."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytorch_lightning as pl
import torch


def step_seed(seed: int, step: int, rank: int = 0) -> int:
    """Return a 63-bit seed for a step, well spread over neighbouring arguments."""
    return int(np.random.SeedSequence([seed, step, rank]).generate_state(1, np.uint64)[0] >> np.uint64(1))


class SeedEachStep(pl.Callback):
    """Seeds torch's generators before each training batch, so that dropout needs no state in a checkpoint.

    Args:
        seed: Seed of the run.
    """

    def __init__(self, seed: int) -> None:
        self.seed = int(seed)

    def on_train_batch_start(
        self,
        trainer: pl.Trainer,
        pl_module: pl.LightningModule,
        batch: Any,  # noqa: ANN401
        batch_idx: int,
    ) -> None:
        """Seed by (seed, epoch, batch), which also counts batches that share an optimiser step."""
        step = trainer.current_epoch * 2**32 + batch_idx
        seed = step_seed(self.seed, step, trainer.global_rank)
        # Not torch.manual_seed: for each kind of device that is absent it queues a call with a stack trace, every time.
        torch.default_generator.manual_seed(seed)
        if torch.cuda.is_initialized():
            torch.cuda.manual_seed(seed)
