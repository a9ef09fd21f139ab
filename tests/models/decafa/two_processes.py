# SPDX-License-Identifier: Apache-2.0
"""Trains a small DeCaFA on mixed annotations in one and in two gloo processes; run as a script by a test."""

from __future__ import annotations

import functools
import os
import sys
import warnings
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np
import torch
import torch.multiprocessing
from pytorch_lightning.utilities import rank_zero_only
from torch import Tensor, nn

from affect.data.sampling import EpochSampler, Pool
from affect.models.decafa import Decafa
from tests.models.decafa.parts import make, make_batch
from tests.models.two_processes import Loader, in_one_and_in_two, make_trainer

SOURCES = {"98": range(8), "68": range(8, 16), "5": range(16, 24)}
"""Three sets of eight faces, each with one scheme."""

BATCH, EPOCHS = 8, 2

CASES: Mapping[str, Mapping[str, Any]] = {
    "alternate": {"alternate": True},
    "mixed": {"alternate": False},
    # Nothing but weights of 0 asks for the first stage's points here.
    "last stage": {"alternate": False, "stage_weights": "last", "chain": "separate", "fusion": ["image", "features"]},
}


def make_model(**arguments: Any) -> Decafa:
    """Return a model without batch norm, whose statistics are of each process's own faces."""
    sgd = functools.partial(torch.optim.SGD, lr=10.0)
    model = make(temperature=0.1, optimizer=sgd, **arguments)
    for layer in list(model.modules()):
        for name, child in layer.named_children():
            if isinstance(child, nn.BatchNorm2d):
                setattr(layer, name, nn.Identity())
    return model


def batches(rank: int, world: int, alternate: bool) -> list[np.ndarray]:
    """Return which faces a process is given at each step."""
    pools = [Pool(np.array(rows), 1.0, source=k) for k, rows in enumerate(SOURCES.values())]
    sampler = EpochSampler(pools, 24, BATCH // world, 5, rank, world, alternate=alternate)
    found = []
    for epoch in range(EPOCHS):
        sampler.set_epoch(epoch)
        found += [key.positions for key in sampler]
    return found


def trained(folder: Path, rank: int, world: int, alternate: bool, **arguments: Any) -> dict[str, Tensor]:
    """Return the weights after the steps of ``batches``."""
    model, whole = make_model(**arguments), make_batch(24, known=SOURCES)
    given = Loader()
    for rows in batches(rank, world, alternate):
        targets, masks = ({name: value[rows] for name, value in part.items()} for part in (whole.targets, whole.masks))
        given.append(type(whole)(image=whole.image[rows], targets=targets, masks=masks))
    make_trainer(folder, world, max_epochs=1).fit(model, given)
    return {name: value.clone() for name, value in model.release_state().items()}


def work(rank: int, folder: str, world: int) -> None:
    torch.set_num_threads(1)
    warnings.simplefilter("ignore")
    if world > 1:
        os.environ |= {"LOCAL_RANK": str(rank), "NODE_RANK": "0", "WORLD_SIZE": str(world)}
        setattr(rank_zero_only, "rank", rank)  # noqa: B010
    found = {name: trained(Path(folder), rank, world, **arguments) for name, arguments in CASES.items()}
    torch.save(found, Path(folder) / f"world{world}-rank{rank}.pt")
    if world > 1:
        torch.distributed.destroy_process_group()


if __name__ == "__main__":
    in_one_and_in_two(work, sys.argv[1])
