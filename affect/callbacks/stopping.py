# SPDX-License-Identifier: Apache-2.0
"""Early stopping that a continued run remembers."""

from __future__ import annotations

from typing import Any

import pytorch_lightning as pl


class EarlyStopping(pl.callbacks.EarlyStopping):
    """Lightning's early stopping whose decision is part of the checkpoint.

    Lightning forgets it: a run that had stopped and was killed before its results were written would train on.

    Args:
        monitor: Value to watch.
        mode: Whether the best value is the ``max`` or the ``min``.
        patience: Validations without improvement after which training stops.
        min_delta: Smallest change that counts as an improvement.
        check_finite: Stop when the value is not finite.
        stopping_threshold: Stop once the value is better than this; None for no such limit.
        divergence_threshold: Stop once the value is worse than this; None for no such limit.
    """

    def __init__(
        self,
        monitor: str,
        mode: str = "max",
        patience: int = 10,
        min_delta: float = 0.0,
        check_finite: bool = True,
        stopping_threshold: float | None = None,
        divergence_threshold: float | None = None,
    ) -> None:
        super().__init__(
            monitor=monitor,
            mode=mode,
            patience=patience,
            min_delta=min_delta,
            check_finite=check_finite,
            stopping_threshold=stopping_threshold,
            divergence_threshold=divergence_threshold,
        )
        self.stopped = False

    def _run_early_stopping_check(self, trainer: pl.Trainer) -> None:
        super()._run_early_stopping_check(trainer)
        self.stopped = trainer.should_stop

    def on_fit_start(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        """Stop at once if the run that is continued had stopped."""
        trainer.should_stop = trainer.should_stop or self.stopped

    def state_dict(self) -> dict[str, Any]:
        """Return what a continued run must know."""
        return {**super().state_dict(), "stopped": self.stopped}

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Restore what ``state_dict`` returned."""
        super().load_state_dict(state_dict)
        self.stopped = state_dict["stopped"]
