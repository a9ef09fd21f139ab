# SPDX-License-Identifier: Apache-2.0
"""Small models and batches for the tests of quantization."""

from __future__ import annotations

import functools
from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor

from affect import losses, tasks
from affect.data.batch import FaceBatch
from affect.encoders import PlainConvolutions
from affect.models.base import AffectModule
from affect.models.baseline import Baseline
from affect.models.monet import Monet

SIDE, UNITS = 16, 4


def batch(size: int = 6, seed: int = 0) -> FaceBatch:
    draw = torch.Generator().manual_seed(seed)
    return FaceBatch(
        image=torch.randint(0, 256, (size, 3, SIDE, SIDE), generator=draw, dtype=torch.uint8),
        targets={"au": torch.randint(0, 2, (size, UNITS), generator=draw).float()},
        masks={"au": torch.ones(size, UNITS, dtype=torch.bool)},
        points={},
        point_masks={},
    )


def au_task() -> dict[str, tasks.Task]:
    return {"au": tasks.AUOccurrence(aus=[1, 2, 4, 12], loss=losses.BinaryCrossEntropy(), metrics=[])}


def encoder(**arguments: Any) -> PlainConvolutions:
    return PlainConvolutions(image_size=SIDE, widths=(8, 16), output="vector", **arguments)


def baseline(seed: int = 0, **arguments: Any) -> Baseline:
    torch.manual_seed(seed)
    optimizer = functools.partial(torch.optim.Adam, lr=1e-2)
    return _with_statistics(Baseline(au_task(), encoder(), optimizer=optimizer, **arguments))


def monet(seed: int = 0) -> Monet:
    torch.manual_seed(seed)
    optimizer = functools.partial(torch.optim.Adam, lr=1e-2)
    return Monet(au_task(), encoder(), orders=6, kept=3, hidden=8, label_features=8, samples=4, optimizer=optimizer)


def _with_statistics(module: AffectModule) -> Any:
    """Give batch norms other numbers than those that they are born with."""
    for sub in module.modules():
        if isinstance(sub, torch.nn.BatchNorm2d):
            sub.eps, sub.momentum = 1e-2, 0.3
            torch.nn.init.uniform_(sub.weight, -1.5, 1.5)
            torch.nn.init.normal_(sub.bias)
            sub.running_mean.normal_(0, 0.3)
            sub.running_var.uniform_(0.5, 2)
    return module


def same(one: Mapping[str, Tensor], other: Mapping[str, Tensor]) -> bool:
    return one.keys() == other.keys() and all(torch.equal(one[name], other[name]) for name in one)
