# SPDX-License-Identifier: Apache-2.0
"""What MONET costs over a shared trunk on the same backbone: a whole training step, and its head alone over M and k.

The setting is that of BP4D: 12 action units, 512 orders of which 128 are kept, batches of 64, H = L = 64, ResNet-50 at
224 px; on a GPU in bfloat16. The head's rows time what comes after the backbone, forward and backward; their ratio is
that of a step in which the head is added to the measured backbone.
"""

from __future__ import annotations

import itertools
import statistics
import time
from collections.abc import Callable
from contextlib import AbstractContextManager
from pathlib import Path
from typing import Any

import torch
from torch import nn

from affect.data.batch import FaceBatch
from affect.encoders import TimmEncoder
from affect.losses import BinaryCrossEntropy
from affect.models.base import AffectModule
from affect.models.monet import Monet, VMNCommon
from affect.tasks import AUOccurrence

TASKS, ORDERS, KEPT, BATCH = 12, 512, 128, 64
HEADS = ((512, 128), (512, 32), (512, 512), (128, 128), (4096, 128))
"""Numbers of orders M and of those that are kept k."""


def measure(quick: bool) -> list[dict[str, Any]]:
    """Return a row per measured thing: milliseconds, ratio to the shared trunk's step, peak memory in GB.

    Rounds alternate between the two models, so that a busy machine slows both alike; the median counts.
    """
    name, side, batch_size = ("resnet10t", 64, 16) if quick else ("resnet50", 224, BATCH)
    orders, kept = (64, 16) if quick else (ORDERS, KEPT)
    heads = ((64, 16), (64, 64)) if quick else HEADS
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    batch = make_batch(batch_size, side).to(device)
    trunk, monet = make_module(name, side), make_module(name, side, orders, kept)
    steps = {"shared trunk": _step(trunk.to(device), batch), "MONET": _step(monet.to(device), batch)}
    rounds = 2 if quick else (20 if device.type == "cuda" else 3)
    times: dict[str, list[float]] = {what: [] for what in steps}
    peaks: dict[str, float] = dict.fromkeys(steps, 0.0)
    for round_ in range(rounds + 1):  # the first warms up
        for what, step in steps.items():
            seconds, peak = _timed(step, device)
            peaks[what] = max(peaks[what], peak)
            times[what] += [seconds] if round_ else []
    middle = {what: statistics.median(found) for what, found in times.items()}
    base = middle["shared trunk"]
    where = f"{name} {side} px, batch {batch_size}"
    rows = [
        _row(f"step of the shared trunk, {where}", base, 1.0, peaks["shared trunk"]),
        _row(f"step of MONET, M={orders}, k={kept}, {where}", middle["MONET"], middle["MONET"] / base, peaks["MONET"]),
    ]
    for (total, k), dropout in itertools.product(heads, ("example", "batch")):
        if k == total and dropout == "batch":
            continue
        head = make_module(None, side, total, None if k == total else k, dropout).to(device)
        vectors = torch.randn(batch_size, 2048, device=device)
        timed = [_timed(_step(head, batch, vectors), device) for _ in range(rounds + 1)]
        seconds = statistics.median(found for found, _ in timed[1:])
        what = f"head alone, M={total}, k={k}, orders kept per {dropout}"
        rows.append(_row(what, seconds, 1 + seconds / base, max(peak for _, peak in timed)))
    return rows


def _row(what: str, seconds: float, ratio: float, peak: float) -> dict[str, Any]:
    return {"what": what, "ms": 1000 * seconds, "ratio to the shared trunk": ratio, "peak memory, GB": peak}


def make_batch(size: int, side: int) -> FaceBatch:
    """Return noise with labels of 12 action units."""
    generator = torch.Generator().manual_seed(0)
    image = torch.randint(0, 256, (size, 3, side, side), dtype=torch.uint8, generator=generator)
    target = torch.randint(0, 2, (size, TASKS), generator=generator).float()
    return FaceBatch(image=image, targets={"au": target}, masks={"au": torch.ones_like(target, dtype=torch.bool)})


class _NoBackbone(nn.Module):
    """Stands for an encoder whose vectors are given."""

    num_features, output = 2048, "vector"


def make_module(
    name: str | None, side: int, orders: int | None = None, kept: int | None = None, dropout: str = "example"
) -> AffectModule:
    """Return MONET, or the shared trunk without ``orders``; without a ``name`` there is no backbone."""
    torch.manual_seed(0)
    task = AUOccurrence(aus="bp4d", loss=BinaryCrossEntropy())
    encoder: Any = _NoBackbone() if name is None else TimmEncoder(name, image_size=side)
    if orders is None:
        return VMNCommon({"au": task}, encoder)
    return Monet({"au": task}, encoder, orders=orders, kept=kept, dropout=dropout)  # type: ignore[arg-type]


def _step(module: AffectModule, batch: FaceBatch, vectors: torch.Tensor | None = None) -> Callable[[], None]:
    """Return a training step; of MONET's head alone where ``vectors`` stand for what the backbone gives."""
    module.train()
    optimizer = torch.optim.AdamW(module.parameters(), lr=1e-4)

    def step() -> None:
        with _precision(batch.image.device):
            if vectors is None:
                terms = module.training_terms(batch)["au"]
            else:
                given = vectors.detach().requires_grad_()
                terms = module._ordered_terms(given, batch)  # type: ignore[operator]
            loss = terms.sum.sum() / terms.count.sum()
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()

    return step


def _precision(device: torch.device) -> AbstractContextManager[Any]:
    return torch.autocast(device.type, torch.bfloat16, enabled=device.type == "cuda")


def _timed(step: Callable[[], None], device: torch.device) -> tuple[float, float]:
    """Return the seconds of a step and the peak memory during it in GB, of this process or of the GPU."""
    if device.type == "cuda":
        torch.cuda.synchronize()
        torch.cuda.reset_peak_memory_stats()
    else:
        _forget_peak()
    start = time.perf_counter()
    step()
    if device.type == "cuda":
        torch.cuda.synchronize()
        return time.perf_counter() - start, torch.cuda.max_memory_allocated() / 1e9
    return time.perf_counter() - start, _peak()


def _forget_peak() -> None:
    """Let the kernel count this process' largest memory from now on; where it cannot, it counts from the start."""
    try:
        Path("/proc/self/clear_refs").write_text("5", encoding="ascii")
    except OSError:
        return


def _peak() -> float:
    """Return the largest resident memory of this process in GB; NaN where the system does not tell."""
    try:
        lines = Path("/proc/self/status").read_text(encoding="ascii").splitlines()
    except OSError:
        return float("nan")
    return next((int(line.split()[1]) / 1e6 for line in lines if line.startswith("VmHWM")), float("nan"))
