# SPDX-License-Identifier: Apache-2.0
"""Checkpoints that a kill at any moment cannot spoil: the state to continue from, and the best weights so far."""

from __future__ import annotations

import math
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytorch_lightning as pl
import torch
from pytorch_lightning.plugins.io import CheckpointIO
from safetensors import SafetensorError
from torch import Tensor

from affect.errors import CheckpointError, ConfigError, near
from affect.files import replacing, save_tensors

LAST, BEST = "last.ckpt", "best.safetensors"


class AtomicCheckpointIO(CheckpointIO):
    """Writes beside the target and renames, so that the target is the old or the new checkpoint, never a part of one.

    Reading runs no code: ``torch.load(weights_only=True)``.
    """

    def save_checkpoint(self, checkpoint: dict[str, Any], path: str | Path, storage_options: Any = None) -> None:  # noqa: ANN401
        """Write ``checkpoint`` to ``path`` atomically, through to the disk.

        Raises:
            CheckpointError: If it cannot be written, for a full disk say; what was at ``path`` stays.
        """
        with _said(path), replacing(path) as part, part.open("wb") as file:
            torch.save(checkpoint, file)

    def load_checkpoint(self, path: str | Path, map_location: Any = None, weights_only: bool | None = None) -> Any:  # noqa: ANN401
        """Return the checkpoint at ``path``.

        Raises:
            CheckpointError: If the file is damaged or holds more than plain data.
        """
        try:
            return torch.load(path, map_location=map_location or "cpu", weights_only=True)
        except Exception as error:
            raise CheckpointError(f"{path}: cannot be read ({str(error).splitlines()[0][:120]})") from error

    def remove_checkpoint(self, path: str | Path) -> None:
        """Delete the checkpoint at ``path`` if it is there."""
        Path(path).unlink(missing_ok=True)


@contextmanager
def _said(path: str | Path) -> Iterator[None]:
    """Turn a failed write into one line; torch wraps the reason into an error of its own."""
    try:
        yield
    except (OSError, RuntimeError, SafetensorError) as error:
        reason: BaseException | None = error
        while reason is not None and not isinstance(reason, OSError):
            reason = reason.__cause__ or reason.__context__
        full = next((text for text in ("No space left on device", "File too large") if text in str(error)), None)
        said = (reason.strerror if isinstance(reason, OSError) else None) or full
        if said is None:
            raise
        stays = "; the last one that was written stays" if Path(path).is_file() else ""
        raise CheckpointError(
            f"{path}: cannot be written ({said}){stays}; free some space, and the same command continues the run"
        ) from error


class BestWeights(pl.Callback):
    """Keeps the weights of the best validation so far in ``best.safetensors``.

    They are written before ``last.ckpt`` knows of them: a run killed in between repeats the epoch and writes the same
    file again. The command runs this callback before all others, so that EMA's averaged weights are still in place.

    Args:
        folder: Folder of the run.
        monitor: Validation value to maximise; ties keep the earlier epoch.

    Attributes:
        score: Best value so far; NaN before the first validation.
        epoch: Epoch (0-based) of the best value; -1 before the first validation.
        weighting: What the weighting of losses had learnt by then; no release has it, and results tell it.
    """

    def __init__(self, folder: str | Path, monitor: str) -> None:
        self.folder, self.monitor = Path(folder), monitor
        self.score, self.epoch = math.nan, -1
        self.weighting: dict[str, Tensor] = {}

    def on_validation_end(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        """Keep the weights if the monitored value is the best so far."""
        if trainer.sanity_checking or trainer.state.fn != "fit":
            return
        values = getattr(pl_module, "last_validation", {})
        if self.monitor not in values:
            raise ConfigError(f"monitor={self.monitor}: not among the logged values; {near(self.monitor, values)}")
        score = values[self.monitor]
        if self.epoch < 0 or score > self.score or (math.isnan(self.score) and not math.isnan(score)):
            self.score, self.epoch = score, trainer.current_epoch
            weighting = getattr(pl_module, "weighting", None)
            learnt = {} if weighting is None else weighting.state_dict()
            self.weighting = {name: value.detach().cpu().clone() for name, value in learnt.items()}
            # Encoders that are shared out are gathered by all processes.
            state = pl_module.release_state() if trainer.is_global_zero or pl_module.shards is not None else {}
            if trainer.is_global_zero:
                with _said(self.folder / BEST):
                    save_tensors(self.folder / BEST, state)

    def state_dict(self) -> dict[str, Any]:
        """Return what a continued run must know."""
        return {"score": self.score, "epoch": self.epoch, "weighting": self.weighting}

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Restore what ``state_dict`` returned."""
        self.score, self.epoch = state_dict["score"], state_dict["epoch"]
        self.weighting = dict(state_dict.get("weighting", {}))


def is_due(batches: int, every: int, accumulated: int) -> bool:
    """Return whether to write after ``batches`` of an epoch: at the first optimiser step since an ``every``-th batch.

    Gradients that are accumulated are in no checkpoint, so one within their window could not be continued exactly.

    Example:
        >>> [batches for batches in range(1, 13) if is_due(batches, every=2, accumulated=3)]
        [3, 6, 9, 12]
        >>> [batches for batches in range(1, 13) if is_due(batches, every=4, accumulated=3)]
        [6, 9, 12]
    """
    return batches % accumulated == 0 and batches // every > (batches - accumulated) // every


class LastCheckpoint(pl.callbacks.Checkpoint):
    """Writes ``last.ckpt``, the state to continue from, at the end of each epoch and, if asked, within it.

    Lightning runs callbacks of this base class last, so that the state of all others is up to date.

    Args:
        folder: Folder of the run.
        every_n_steps: Also write after every n-th training batch of an epoch, or where gradients are accumulated at the
            next optimiser step; None writes at its end only.
    """

    def __init__(self, folder: str | Path, every_n_steps: int | None = None) -> None:
        if every_n_steps is not None and every_n_steps < 1:
            raise ConfigError(f"callbacks.last.every_n_steps={every_n_steps} must be at least 1, or null")
        self.folder, self.every_n_steps = Path(folder), every_n_steps

    def on_train_batch_end(
        self,
        trainer: pl.Trainer,
        pl_module: pl.LightningModule,
        outputs: Any,  # noqa: ANN401
        batch: Any,  # noqa: ANN401
        batch_idx: int,
    ) -> None:
        """Write within an epoch; its last batch is left to ``on_train_epoch_end``."""
        batches = batch_idx + 1
        if self.every_n_steps is None or batches >= trainer.num_training_batches:
            return
        if is_due(batches, self.every_n_steps, trainer.accumulate_grad_batches):
            trainer.save_checkpoint(self.folder / LAST)

    def on_train_epoch_end(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        """Write at the end of an epoch, after its validation."""
        trainer.save_checkpoint(self.folder / LAST)
