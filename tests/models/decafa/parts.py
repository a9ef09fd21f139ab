# SPDX-License-Identifier: Apache-2.0
"""Small tasks, batches and models for the tests of DeCaFA."""

from __future__ import annotations

import functools

import torch

from affect import labels, losses, metrics, tasks
from affect.data.batch import FaceBatch
from affect.encoders import Pixels
from affect.models.decafa import Decafa

SIZE = 16


def landmarks(scheme: str, loss=None, **arguments) -> tasks.Landmarks:
    task = tasks.Landmarks(
        scheme, loss=loss or losses.MAE(), metrics=[metrics.AlignmentError(scheme)], score="auc/10", **arguments
    )
    for metric in task.metrics:
        metric.bind(task.outputs)
    return task


def make_tasks(*schemes: str, **arguments) -> dict[str, tasks.Landmarks]:
    return {f"landmarks_{scheme}": landmarks(scheme, **arguments) for scheme in schemes or ("98", "68", "5")}


def make(given=None, seed: int = 0, size: int = SIZE, **arguments) -> Decafa:
    torch.manual_seed(seed)
    settings = {
        "stages": 2,
        "widths": [4, 6],
        "convolutions": 1,
        "optimizer": functools.partial(torch.optim.Adam, lr=5e-3),
        **arguments,
    }
    return Decafa(given or make_tasks(), Pixels(size, grey=True), **settings)


def make_batch(size: int = 4, known=None, seed: int = 1, side: int = SIZE, schemes=("98", "68", "5")) -> FaceBatch:
    """Return faces whose points lie anywhere in the crop; ``known`` has per scheme the faces that are labelled."""
    random = torch.Generator().manual_seed(seed)
    image = torch.randint(0, 256, (size, 3, side, side), generator=random, dtype=torch.uint8)
    targets, masks = {}, {}
    for scheme in schemes:
        points = labels.SCHEMES[scheme].points
        mask = torch.ones(size, points, dtype=torch.bool)
        if known is not None:
            mask &= torch.tensor([k in known.get(scheme, ()) for k in range(size)])[:, None]
        value = torch.rand(size, points, 2, generator=random)
        targets[f"landmarks_{scheme}"], masks[f"landmarks_{scheme}"] = value * mask[..., None], mask
    matrix = torch.eye(2, 3).expand(size, 2, 3).clone()
    return FaceBatch(image=image, targets=targets, masks=masks, matrix=matrix)
