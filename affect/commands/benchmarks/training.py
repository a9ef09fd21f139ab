# SPDX-License-Identifier: Apache-2.0
"""Images per second in training: our module in its trainer against the training step of timm, in one run.

Both train the same network of timm on the same batch, which lies on the device, with the same precision (bfloat16 where
autocast takes it), memory order, optimiser and clipping. timm's side is the step of its ``train.py`` (1.0), in which
bfloat16 needs no scaler. What loading costs is another benchmark, ``loader``.
"""

from __future__ import annotations

import functools
import statistics
import tempfile
import time
from typing import Any

import pytorch_lightning as pl
import timm
import torch
from timm.utils import dispatch_clip_grad

from affect.callbacks import AtomicCheckpointIO, BestWeights, History, LastCheckpoint, SeedEachStep
from affect.commands.benchmarks.step import Batches, drawn_batch
from affect.data.batch import FaceBatch
from affect.encoders import TimmEncoder
from affect.losses import BinaryCrossEntropy
from affect.models.baseline import Baseline
from affect.tasks import AUOccurrence

NETWORKS = (("resnet50", 224, 128), ("vit_base_patch16_224", 224, 128))
QUICK_NETWORKS = (("test_resnet", 160, 2), ("test_vit", 160, 2))
"""Model of timm, its image side in pixels, batch size; the quick ones run anywhere."""

OUTPUTS = 12
"""Action units of the task."""

CLIP = 1.0
"""Largest norm of the gradients."""


class Stopwatch:
    """Takes the time from the end of one step to the end of a later one, with what the device still had to do.

    Args:
        device: Where the steps run.
        first: Number of the step, from 1 on, behind which the time begins.
        last: Number of the step with which it ends.
    """

    def __init__(self, device: torch.device, first: int, last: int) -> None:
        self.device, self.first, self.last = device, first, last
        self.seconds, self._count, self._start = float("nan"), 0, 0.0

    def step(self) -> None:
        """Note the end of a step."""
        self._count += 1
        if self._count in (self.first, self.last):
            if self.device.type == "cuda":
                torch.cuda.synchronize()
            now = time.perf_counter()
            self.seconds, self._start = now - self._start, now


class _Watched(pl.Callback):
    """Lets a stopwatch see the steps of a trainer."""

    def __init__(self, watch: Stopwatch) -> None:
        self.watch = watch

    def on_train_batch_end(self, *arguments: Any) -> None:  # noqa: ANN401
        """Note the end of a step."""
        self.watch.step()


def _optimizer(device: torch.device, parameters: Any) -> torch.optim.Optimizer:  # noqa: ANN401
    return torch.optim.AdamW(parameters, lr=1e-3, fused=True if device.type == "cuda" else None)


def our_module(name: str, side: int, device: torch.device) -> Baseline:
    """Return our module around a model of timm."""
    torch.manual_seed(0)
    return Baseline(
        {"au": AUOccurrence(aus="bp4d", loss=BinaryCrossEntropy())},
        TimmEncoder(name, image_size=side),
        optimizer=functools.partial(_optimizer, device),
        channels_last=True,
    )


def their_model(name: str, device: torch.device) -> torch.nn.Module:
    """Return the same network as timm trains it."""
    torch.manual_seed(0)
    model = timm.create_model(name, num_classes=OUTPUTS)
    return model.to(device=device, memory_format=torch.channels_last).train()  # type: ignore[call-overload]


def _ours(name: str, batch: FaceBatch, device: torch.device, watch: Stopwatch) -> float:
    """Return the seconds of our module's steps in its trainer, with the callbacks of a normal run."""
    module = our_module(name, batch.image.shape[-1], device)
    with tempfile.TemporaryDirectory() as folder:
        trainer = pl.Trainer(
            max_epochs=1,
            accelerator="gpu" if device.type == "cuda" else "cpu",
            devices=1,
            precision="bf16-mixed",
            gradient_clip_val=CLIP,
            logger=pl.loggers.CSVLogger(folder),
            log_every_n_steps=10,
            callbacks=[
                *(SeedEachStep(0), History(), BestWeights(folder, "val/score"), LastCheckpoint(folder)),
                _Watched(watch),
            ],
            plugins=[AtomicCheckpointIO()],
            enable_progress_bar=False,
            enable_model_summary=False,
        )
        trainer.fit(module, Batches(batch, watch.last))
    return watch.seconds


def _theirs(name: str, batch: FaceBatch, device: torch.device, watch: Stopwatch) -> float:
    """Return the seconds of the steps that timm's ``train.py`` makes of bytes, which it normalises on the device."""
    model, target = their_model(name, device), batch.targets["au"]
    optimizer, criterion = _optimizer(device, model.parameters()), torch.nn.BCEWithLogitsLoss()
    cfg: Any = model.pretrained_cfg
    mean, std = (torch.tensor(cfg[key], device=device).view(3, 1, 1) * 255 for key in ("mean", "std"))
    for _ in range(watch.last):
        image = batch.image.float().sub(mean).div(std).contiguous(memory_format=torch.channels_last)
        with torch.autocast(device.type, torch.bfloat16):
            loss = criterion(model(image), target)
        loss.backward()
        dispatch_clip_grad(model.parameters(), CLIP, mode="norm")
        optimizer.step()
        optimizer.zero_grad()
        watch.step()
    return watch.seconds


def measure(quick: bool) -> list[dict[str, Any]]:
    """Return a row per network: images per second of both and their ratio; rounds alternate, medians count."""
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    where = torch.cuda.get_device_name() if device.type == "cuda" else "processor"
    first, last, rounds = (1, 3, 1) if quick else (20, 120, 3)
    rows = []
    for name, side, size in QUICK_NETWORKS if quick else NETWORKS:
        batch = drawn_batch(size, side, OUTPUTS).to(device)
        ours, theirs = [], []
        for _ in range(rounds):
            theirs.append(_theirs(name, batch, device, Stopwatch(device, first, last)))
            ours.append(_ours(name, batch, device, Stopwatch(device, first, last)))
        images = size * (last - first)
        a, b = (images / statistics.median(seconds) for seconds in (ours, theirs))
        rows.append(
            {
                "network": f"{name} {side} px, batch {size}, bf16",
                "device": where,
                "ours, images/s": a,
                "timm's step, images/s": b,
                "ratio": a / b,
            }
        )
    return rows
