# SPDX-License-Identifier: Apache-2.0
"""Small streams, tasks and batches for the tests of THIN."""

from __future__ import annotations

import functools
import json
from pathlib import Path

import torch
from safetensors.torch import save_file

from affect import losses, metrics, tasks
from affect.data.batch import FaceBatch
from affect.encoders import PlainConvolutions
from affect.models.thin import Exogenous, ExogenousStream, Thin

CLASSES, ANGLES = ("a", "b", "c"), ("north", "east", "south", "west")
WIDTHS = (4, 6)


def category(classes=CLASSES, column="shape") -> tasks.Category:
    task = tasks.Category(column, classes=classes, loss=losses.CrossEntropy(), metrics=[metrics.Classification()])
    for metric in task.metrics:
        metric.bind(task.outputs)
    return task


def encoder(widths=WIDTHS) -> PlainConvolutions:
    return PlainConvolutions(12, widths)


def optimizer(rate: float = 0.01):
    return functools.partial(torch.optim.Adam, lr=rate)


def exogenous_run(folder: Path, seed: int = 7, classes=ANGLES, **arguments) -> Path:
    """Write what a finished exogenous run leaves behind for stage 2."""
    torch.manual_seed(seed)
    model = Exogenous({"exogenous": category(classes, "angle")}, encoder(), hidden=[5], **arguments)
    model.train()
    model(make_batch())  # moves the batch statistics away from where they start
    release = folder / "release"
    release.mkdir(parents=True)
    save_file(
        {name: value.contiguous() for name, value in model.release_state().items()}, release / "model.safetensors"
    )
    (release / "labels.json").write_text(json.dumps({"exogenous": list(classes)}))
    told = {"image_size": 12, "mean": [0.5] * 3, "std": [0.25] * 3}
    (release / "preprocess.json").write_text(json.dumps(told))
    return folder


def stream(weights: Path | None, **arguments) -> ExogenousStream:
    given = {"classes": len(ANGLES), "hidden": [5], **arguments}
    return ExogenousStream(encoder(), weights=None if weights is None else str(weights), **given)


def make(weights: Path | None = None, labels: bool = True, seed: int = 0, **arguments) -> Thin:
    """Return a small THIN; without ``weights`` its exogenous stream is a random one."""
    torch.manual_seed(seed)
    both = {"shape": category()} | ({"exogenous": category(ANGLES, "angle")} if labels else {})
    given = {"task": "shape", "experts": 4, "hidden": [8], "pool": 1, "optimizer": optimizer(), **arguments}
    if "exogenous" not in given:
        given["exogenous"] = stream(weights, random=weights is None)
    model = Thin(both, encoder(), **given)
    model.setup("fit")
    return model


def make_batch(size: int = 8, seed: int = 1) -> FaceBatch:
    random = torch.Generator().manual_seed(seed)
    shape = torch.randint(0, 3, (size,), generator=random)
    angle = torch.randint(0, 4, (size,), generator=random)
    return FaceBatch(
        image=torch.randint(0, 256, (size, 3, 12, 12), generator=random, dtype=torch.uint8),
        targets={"shape": torch.eye(3)[shape], "exogenous": torch.eye(4)[angle]},
        masks={
            "shape": torch.ones(size, 3, dtype=torch.bool),
            "exogenous": torch.ones(size, 4, dtype=torch.bool),
        },
    )
