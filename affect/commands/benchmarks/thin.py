# SPDX-License-Identifier: Apache-2.0
"""The training step of THIN against that of a single predictor of the same size, and the rungs of the ladder between.

Experts have 128 hidden units behind max-pooling of the last map; a tree gate reads the average of the frozen stream's.
Sizes are those of what is trained. For the gate the frozen stream is run forward; for dispelling also phi, on both
streams, and differentiated with respect to what it reads of the stream that learns.
"""

from __future__ import annotations

import statistics
from typing import Any, Literal, NamedTuple

import torch

from affect.commands.benchmarks.pal import Stepper, make_batch
from affect.encoders import TimmEncoder
from affect.losses import CrossEntropy
from affect.models.thin import ExogenousStream, Thin
from affect.tasks import Expression

CASES = (("resnet18", 112, 8, 8), ("resnet18", 112, 8, 32))
"""Network, image side, batch size and number of experts."""

ON_ACCELERATOR = (("resnet18", 224, 128, 32), ("resnet50", 224, 64, 32), ("vgg16", 224, 64, 32))

HIDDEN, EXOGENOUS_CLASSES = 128, 8


class Rung(NamedTuple):
    """What of THIN a rung of the ladder has.

    Attributes:
        gate: What weighs the experts.
        dispelling: Factor of the dispelling loss.
        single: One predictor with as many hidden units as all experts.
    """

    gate: Literal["none", "endogenous", "exogenous"]
    dispelling: float = 0.0
    single: bool = False


RUNGS = {
    "single": Rung("none", single=True),
    "mean of experts": Rung("none"),
    "endogenous gate": Rung("endogenous"),
    "exogenous gate": Rung("exogenous"),
    "THIN": Rung("exogenous", 1.0),
}


def build(name: str, side: int, experts: int, rung: Rung) -> Thin:
    """Return a rung with random weights that predicts seven expressions, in training mode."""
    torch.manual_seed(0)
    task = Expression(classes="rafdb", loss=CrossEntropy(), metrics=[])

    def encoder() -> TimmEncoder:
        return TimmEncoder(name, image_size=side, output="map")

    needs = rung.gate == "exogenous" or rung.dispelling > 0
    module = Thin(
        {"expression": task},
        encoder(),
        exogenous=ExogenousStream(encoder(), classes=EXOGENOUS_CLASSES, random=True) if needs else None,
        gate=rung.gate,
        experts=1 if rung.single else experts,
        hidden=[HIDDEN * experts] if rung.single else [HIDDEN],
        pool=2 if side >= 64 else 1,
        dispelling=rung.dispelling,
    )
    module.setup("fit")
    return module.train()


def measure(quick: bool) -> list[dict[str, Any]]:
    """Return a row per network and rung: milliseconds of a step and their ratio to those of the single predictor.

    Rungs take turns, so that a busy machine slows all alike; the ratio is the median of those of neighbouring steps.
    """
    accelerated = torch.cuda.is_available()
    device = torch.device("cuda" if accelerated else "cpu")
    rows = []
    for name, side, size, experts in (ON_ACCELERATOR if accelerated else CASES)[: 1 if quick else None]:
        batch = make_batch(size, side, device)
        modules = {what: build(name, side, experts, rung) for what, rung in RUNGS.items()}
        trained = {what: sum(p.numel() for p in one.parameters() if p.requires_grad) for what, one in modules.items()}
        steps = {what: Stepper(module, batch) for what, module in modules.items()}
        rounds = 2 if quick else (50 if accelerated else 8)
        for _ in range(1 if quick or not accelerated else 3):
            for step in steps.values():
                step()
        times = [{what: step() for what, step in steps.items()} for _ in range(rounds)]
        rows += [
            {
                "network": f"{name} {side} px, batch {size}, {experts} experts",
                "rung": what,
                "device": torch.cuda.get_device_name() if accelerated else "cpu",
                "trained, millions": trained[what] / 1e6,
                "step, ms": 1000 * statistics.median(one[what] for one in times),
                "ratio to single": statistics.median(one[what] / one["single"] for one in times),
                "steps": rounds,
            }
            for what in RUNGS
        ]
    return rows
