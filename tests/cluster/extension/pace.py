# SPDX-License-Identifier: Apache-2.0
"""A callback that makes the first attempt of a run last as long as a test needs, whatever the machine."""

from __future__ import annotations

import hashlib
import time
from pathlib import Path
from typing import Any

import pytorch_lightning as pl


class Pace(pl.Callback):
    """Waits after each training batch and notes the step in a file; at the end, what quantizers hold.

    Args:
        folder: Folder of the run.
        seconds: How long to wait; a run that was continued does not.
    """

    def __init__(self, folder: str, seconds: float) -> None:
        self.folder, self.seconds = Path(folder), float(seconds)

    def on_train_start(self, *arguments: Any) -> None:
        """See whether the run was continued."""
        if (self.folder / "last.ckpt").exists():
            self.seconds = 0.0

    def on_train_batch_end(self, trainer: pl.Trainer, *arguments: Any) -> None:
        """Wait and append the step."""
        time.sleep(self.seconds)
        with (self.folder / f"steps-{trainer.global_rank}.txt").open("a", encoding="utf-8") as file:
            file.write(f"{trainer.global_step}\n")

    def on_train_end(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        """Note what this process holds in its quantizers, if it has some."""
        tensors = [v for name, v in pl_module.state_dict().items() if "activation_post_process" in name]
        if tensors:
            digest = hashlib.sha256(b"".join(tensor.cpu().float().numpy().tobytes() for tensor in tensors))
            (self.folder / f"quantizers-{trainer.global_rank}.txt").write_text(f"{len(tensors)} {digest.hexdigest()}")
