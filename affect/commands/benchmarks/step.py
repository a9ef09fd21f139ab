# SPDX-License-Identifier: Apache-2.0
"""The training step of our module in its trainer against a bare PyTorch loop with the same network and batch."""

from __future__ import annotations

import itertools
import statistics
import tempfile
import time
from typing import Any

import pytorch_lightning as pl
import torch
from torch import nn

from affect.callbacks import AtomicCheckpointIO, BestWeights, History, LastCheckpoint, SeedEachStep
from affect.data.batch import FaceBatch
from affect.encoders import TimmEncoder
from affect.losses import BinaryCrossEntropy
from affect.models.baseline import Baseline
from affect.tasks import AUOccurrence

NETWORKS = (("resnet18", 112, 16), ("two convolutions", 32, 16))
"""Network, image side, batch size: a normal one, and one whose step takes about two milliseconds."""


class _TwoConvolutions(nn.Module):
    """An encoder so small that what surrounds it is what a step costs."""

    num_features = 32

    def __init__(self) -> None:
        super().__init__()
        self.model = nn.Sequential(
            nn.Conv2d(3, 16, 3, 2, 1), nn.ReLU(), nn.Conv2d(16, 32, 3, 2, 1), nn.ReLU(), nn.AdaptiveAvgPool2d(1)
        )

    def forward(self, image: torch.Tensor) -> torch.Tensor:
        """Return vectors ``(B, 32)`` of RGB uint8 images."""
        return self.model(image.float() / 255).flatten(1)


class Batches:
    """A loader that repeats one batch, so that only the step is timed."""

    def __init__(self, batch: FaceBatch, steps: int) -> None:
        self.batch, self.steps = batch, steps

    def __len__(self) -> int:
        return self.steps

    def __iter__(self) -> Any:  # noqa: ANN401
        return (self.batch for _ in range(self.steps))


class _Clock(pl.Callback):
    """Takes the time at the end of each training batch."""

    def __init__(self) -> None:
        self.times: list[float] = []

    def on_train_batch_end(self, *arguments: Any) -> None:  # noqa: ANN401
        """Append the time."""
        self.times.append(time.perf_counter())


def drawn_batch(size: int, side: int, outputs: int) -> FaceBatch:
    """Return a batch of noise ``(size, 3, side, side)`` with a random label for each output."""
    generator = torch.Generator().manual_seed(0)
    image = torch.randint(0, 256, (size, 3, side, side), dtype=torch.uint8, generator=generator)
    target = torch.randint(0, 2, (size, outputs), generator=generator).float()
    return FaceBatch(image=image, targets={"au": target}, masks={"au": torch.ones_like(target, dtype=torch.bool)})


def _network(name: str, side: int) -> Baseline:
    torch.manual_seed(0)
    task = AUOccurrence(aus="bp4d", loss=BinaryCrossEntropy())
    optimizer = lambda groups: torch.optim.AdamW(groups, lr=1e-3)  # noqa: E731
    encoder = _TwoConvolutions() if name == "two convolutions" else TimmEncoder(name, image_size=side)
    return Baseline({"au": task}, encoder, optimizer=optimizer)  # type: ignore[arg-type]


def _ours(name: str, side: int, batch: FaceBatch, steps: int) -> list[float]:
    """Return seconds per step in the trainer with the callbacks of a normal run."""
    clock, module = _Clock(), _network(name, side)
    with tempfile.TemporaryDirectory() as folder:
        best, last = BestWeights(folder, "val/score"), LastCheckpoint(folder)
        trainer = pl.Trainer(
            max_epochs=1,
            accelerator="cpu",
            gradient_clip_val=1.0,
            logger=pl.loggers.CSVLogger(folder),
            log_every_n_steps=10,
            callbacks=[SeedEachStep(0), History(), best, last, clock],
            plugins=[AtomicCheckpointIO()],
            enable_progress_bar=False,
            enable_model_summary=False,
        )
        trainer.fit(module, Batches(batch, steps + 1))
    return [b - a for a, b in itertools.pairwise(clock.times)]


def _bare(name: str, side: int, batch: FaceBatch, steps: int) -> list[float]:
    """Return seconds per step of the loop that a user of PyTorch would write."""
    module = _network(name, side)
    encoder, head = module.encoder.train(), module.head.train()
    parameters = [*encoder.parameters(), *head.parameters()]
    optimizer = torch.optim.AdamW(parameters, lr=1e-3)
    times = []
    for _ in range(steps + 1):
        loss = nn.functional.binary_cross_entropy_with_logits(head(encoder(batch.image))["au"], batch.targets["au"])
        optimizer.zero_grad()
        loss.backward()
        nn.utils.clip_grad_norm_(parameters, 1.0)
        optimizer.step()
        times.append(time.perf_counter())
    return [b - a for a, b in itertools.pairwise(times)]


def measure(quick: bool) -> list[dict[str, Any]]:
    """Return a row per network: milliseconds of both, their ratio and the overhead of a step.

    Rounds alternate, so that a busy machine slows both alike; medians are over all steps of all rounds.
    """
    rows = []
    for name, side, size in NETWORKS:
        batch = drawn_batch(size, side, 12)
        steps = 5 if quick else (20 if side > 64 else 200)
        ours: list[float] = []
        bare: list[float] = []
        for _ in range(1 if quick else 5):
            bare += _bare(name, side, batch, steps)
            ours += _ours(name, side, batch, steps)
        a, b = 1000 * statistics.median(ours), 1000 * statistics.median(bare)
        rows.append(
            {
                "network": f"{name} {side} px, batch {size}",
                "ours, ms": a,
                "bare loop, ms": b,
                "ratio": a / b,
                "overhead, ms": a - b,
                "steps": len(ours),
            }
        )
    return rows
