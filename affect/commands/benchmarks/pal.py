# SPDX-License-Identifier: Apache-2.0
"""The training step with privileged attribution on a late layer against the plain step of the same network.

Only the layers above the constrained one are differentiated twice, so that the step costs little more: at most 1.35
times the plain one is promised for a layer whose output is the encoder's last map. At inference both are one graph.
"""

from __future__ import annotations

import statistics
import time
from typing import Any

import torch

from affect.data.batch import FaceBatch
from affect.encoders import TimmEncoder
from affect.losses import CrossEntropy
from affect.models.base import AffectModule, Objective
from affect.models.baseline import Baseline
from affect.models.pal import PrivilegedAttribution
from affect.tasks import Expression

CASES = (
    ("resnet18", "layer4", 112, 8),
    ("resnet18", "layer3", 112, 8),
    ("resnet50", "layer4", 112, 4),
    ("resnet50", "layer3", 112, 4),
    ("vgg16", "features.29", 224, 8),
)
"""Network, constrained layer, image side and batch size: the last map, and the stage before it.

VGG-16's conv5_3 is the layer of ``pal_*``; behind it come only pooling and the classifier.
"""

LAST = ("layer4", "features.29")
"""Layers whose output is the last map of their network, for which the ratio is promised."""

ON_ACCELERATOR = (
    ("resnet18", "layer4", 224, 128),
    ("resnet18", "layer3", 224, 128),
    ("resnet50", "layer4", 224, 64),
    ("resnet50", "layer3", 224, 64),
    ("vgg16", "features.29", 224, 64),
)

PROMISED = 1.35
"""Ratio of the steps that is promised for the last map, at most."""


def build(name: str, side: int, objective: Objective | None = None) -> AffectModule:
    """Return a network of seven expressions, in training mode."""
    torch.manual_seed(0)
    task = Expression(classes="rafdb", loss=CrossEntropy(), metrics=[])
    objectives = {} if objective is None else {"pal": objective}
    module = Baseline({"expression": task}, TimmEncoder(name, image_size=side), objectives=objectives)
    module.setup("fit")
    return module.train()


def make_batch(size: int, side: int, device: torch.device) -> FaceBatch:
    """Return random images with classes and 68 landmarks."""
    generator = torch.Generator().manual_seed(0)
    batch = FaceBatch(
        image=torch.randint(0, 256, (size, 3, side, side), dtype=torch.uint8, generator=generator),
        targets={"expression": torch.eye(7)[torch.arange(size) % 7]},
        masks={"expression": torch.ones(size, 7, dtype=torch.bool)},
        points={"68": torch.rand(size, 68, 2, generator=generator) * side},
        point_masks={"68": torch.ones(size, 68, dtype=torch.bool)},
    )
    return batch.to(device)


class Stepper:
    """Training steps of one module.

    Args:
        module: The module.
        batch: What each step sees.
    """

    def __init__(self, module: AffectModule, batch: FaceBatch) -> None:
        self.module, self.batch = module.to(batch.image.device), batch
        self.module.log = lambda *_, **__: None  # type: ignore[method-assign, assignment]
        self.optimizer = torch.optim.AdamW(module.parameters(), lr=1e-4)

    def __call__(self) -> float:
        """Make a step and return its seconds."""
        self._wait()
        started = time.perf_counter()
        loss = self.module.training_step(self.batch, 0)
        self.optimizer.zero_grad()
        loss.backward()
        self.optimizer.step()
        self._wait()
        return time.perf_counter() - started

    def _wait(self) -> None:
        if self.batch.image.is_cuda:
            torch.cuda.synchronize()


def judged(layer: str, ratio: float) -> str:
    """Return whether a ratio is as promised; nothing is promised for layers before the last map."""
    return ("yes" if ratio <= PROMISED else "no") if layer in LAST else "not promised"


def measure(quick: bool) -> list[dict[str, Any]]:
    """Return a row per network and layer: milliseconds of both steps, their ratio, and whether it is as promised.

    Steps alternate, so that a busy machine slows both alike; the ratio is the median of those of neighbouring steps.
    """
    accelerated = torch.cuda.is_available()
    device = torch.device("cuda" if accelerated else "cpu")
    rows = []
    for name, layer, side, size in (ON_ACCELERATOR if accelerated else CASES)[: 1 if quick else None]:
        batch = make_batch(size, side, device)
        plain = Stepper(build(name, side), batch)
        constrained = Stepper(build(name, side, PrivilegedAttribution(f"encoder.model.{layer}")), batch)
        steps = 2 if quick else (50 if accelerated else 8)
        for _ in range(1 if quick or not accelerated else 3):
            plain(), constrained()
        pairs = [(plain(), constrained()) for _ in range(steps)]
        ratio = statistics.median(b / a for a, b in pairs)
        rows.append(
            {
                "network": f"{name} {side} px, batch {size}",
                "layer": layer,
                "device": torch.cuda.get_device_name() if accelerated else "cpu",
                "plain, ms": 1000 * statistics.median(a for a, _ in pairs),
                "with PAL, ms": 1000 * statistics.median(b for _, b in pairs),
                "ratio": ratio,
                f"at most {PROMISED}": judged(layer, ratio),
                "steps": steps,
            }
        )
    return rows
