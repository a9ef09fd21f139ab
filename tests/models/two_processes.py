# SPDX-License-Identifier: Apache-2.0
"""Trains and validates small models in one or in two gloo processes; run as a script by a test.

The workers are forked: this process has one thread, and a spawned worker would import everything again.
"""

from __future__ import annotations

import functools
import os
import signal
import socket
import sys
import warnings
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytorch_lightning as pl
import torch
import torch.multiprocessing
from pytorch_lightning.plugins.environments import LightningEnvironment
from pytorch_lightning.utilities import rank_zero_only
from torch import Tensor, nn

from affect import losses, metrics, tasks
from affect.callbacks import LAST, AtomicCheckpointIO, BestWeights, History, Preempted, Preemption
from affect.data.batch import FaceBatch
from affect.data.sampling import OrderedSampler
from affect.encoders import TimmEncoder
from affect.errors import CheckpointError
from affect.models.baseline import Baseline
from affect.models.pal import PrivilegedAttribution
from affect.models.sharding import FullyShardedStrategy
from affect.models.thin import ExogenousStream, Thin
from affect.models.weighting import UncertaintyWeighting

STEPS, SIZE, ODD = 4, 8, 21
"""Training steps, samples of a step over all processes, samples of the validation, which no even number divides."""


class Encoder(nn.Module):
    """Two convolutions without batch statistics."""

    num_features = 8

    def __init__(self) -> None:
        super().__init__()
        self.model = nn.Sequential(nn.Conv2d(3, 8, 3, 2), nn.ReLU(), nn.Conv2d(8, 8, 3, 2), nn.AdaptiveAvgPool2d(1))

    def forward(self, image: Tensor) -> Tensor:
        return self.model(image.float() / 255).flatten(1)


def make_module(concordance: bool = False, learnt: bool = False) -> Baseline:
    """Return a small module of all kinds of tasks; ``learnt``: with learnt uncertainties and privileged attribution."""
    continuous = losses.Concordance() if concordance else losses.MSE()
    made: dict[str, tasks.Task] = {
        "au": tasks.AUOccurrence(aus=[1, 2], loss=losses.BinaryCrossEntropy(), metrics=[metrics.F1()]),
        "expression": tasks.Expression(
            classes=["neutral", "happiness", "sadness"], loss=losses.CrossEntropy(), metrics=[metrics.Classification()]
        ),
        "valence_arousal": tasks.ValenceArousal(loss=continuous, metrics=[metrics.CCC()]),
        "landmarks": tasks.Landmarks("5", loss=losses.SmoothL1(), metrics=[metrics.AlignmentError("5")]),
    }
    if concordance:
        made = {"valence_arousal": made["valence_arousal"]}
    for task in made.values():
        for metric in task.metrics:
            metric.bind(task.outputs)
    torch.manual_seed(0)
    more: dict[str, Any] = {}
    if learnt:
        pulled = PrivilegedAttribution("encoder.model.2", scheme="5", sigma=2.0, weight=0.5)
        more = {"weighting": UncertaintyWeighting(lr=0.05), "objectives": {"pal": pulled}}
    sgd = functools.partial(torch.optim.SGD, lr=0.1 if learnt else 0.5)
    return Baseline(made, Encoder(), optimizer=sgd, **more)  # type: ignore[arg-type]


def make_batch(size: int, seed: int, one_side: bool = False, side: int = 16) -> FaceBatch:
    """Return faces with random labels; where ``one_side``, only samples of even number have valence and arousal."""
    generator = torch.Generator().manual_seed(seed)
    kind = torch.randint(3, (size,), generator=generator)
    targets = {
        "au": torch.randint(0, 2, (size, 2), generator=generator).float(),
        "expression": nn.functional.one_hot(kind, 3).float(),
        "valence_arousal": torch.rand(size, 2, generator=generator) * 2 - 1,
        "landmarks": torch.rand(size, 5, 2, generator=generator),
    }
    masks = {name: torch.rand(t.shape[:2], generator=generator) > 0.4 for name, t in targets.items()}
    masks["expression"] = masks["expression"][:, :1].expand(-1, 3).clone()
    masks["au"][: size // 2] = False  # the first half of a block has no action unit at all
    if one_side:
        masks["valence_arousal"][0::2] = True
        masks["valence_arousal"][1::2] = False
    image = torch.randint(0, 256, (size, 3, side, side), dtype=torch.uint8, generator=generator)
    # Every third face has no points for an objective, which makes their numbers unequal as well.
    known = {"5": (torch.arange(size) % 3 != 1)[:, None].expand(-1, 5).clone()}
    points = {"5": torch.rand(size, 5, 2, generator=generator) * side}
    return FaceBatch(image=image, targets=targets, masks=masks, points=points, point_masks=known)


PARTS = ("targets", "masks", "points", "point_masks")


def take(batch: FaceBatch, rows: Any) -> FaceBatch:
    pick = {name: {k: v[rows] for k, v in getattr(batch, name).items()} for name in PARTS}
    return FaceBatch(image=batch.image[rows], **pick)


class Loader(list):
    """A loader of fixed batches."""


def make_trainer(folder: Path, world: int, strategy: Any = "ddp", **arguments: Any) -> pl.Trainer:
    return pl.Trainer(
        accelerator="cpu",
        devices=world,
        strategy=strategy if world > 1 else "auto",
        plugins=[LightningEnvironment(), AtomicCheckpointIO()],
        logger=False,
        enable_progress_bar=False,
        enable_model_summary=False,
        use_distributed_sampler=False,
        default_root_dir=folder,
        **({"enable_checkpointing": False} | arguments),
    )


def trained(
    folder: Path,
    rank: int,
    world: int,
    one_side: bool = False,
    concordance: bool = False,
    accumulate: int = 1,
    learnt: bool = False,
) -> dict[str, Tensor]:
    """Return the weights after some steps, each process with its part of every batch."""
    module = make_module(concordance, learnt)
    whole = [make_batch(SIZE, seed, one_side) for seed in range(STEPS)]
    batches = Loader(take(batch, slice(rank, None, world)) for batch in whole)
    make_trainer(folder, world, max_epochs=1, accumulate_grad_batches=accumulate).fit(module, batches)
    state = module.state_dict() if learnt else module.release_state()
    return {name: value.clone() for name, value in state.items()}


def shared_out(folder: Path, rank: int, world: int) -> dict[str, Any]:
    """Train with the encoder shared out, stop in the middle, and go on: weights of both, and what lies in the files."""
    folder = folder / f"world{world}"

    def train(steps: int, resume: Path | None = None) -> tuple[dict[str, Tensor], bool]:
        module = make_module()
        module.optimizer = functools.partial(torch.optim.AdamW, lr=0.01)  # type: ignore[assignment]
        batches = Loader(take(make_batch(SIZE, seed), slice(rank, None, world)) for seed in range(STEPS))
        whole = make_batch(ODD, 99)
        odd = Loader(take(whole, key.positions) for key in OrderedSampler(ODD, 4, rank, world))
        strategy = FullyShardedStrategy(minimum_parameters=500, process_group_backend="gloo")
        best = BestWeights(folder, "val/au/f1/mean")
        trainer = make_trainer(
            folder,
            world,
            strategy,
            max_epochs=steps,
            gradient_clip_val=0.05,
            callbacks=[best],
            accumulate_grad_batches=2,
        )
        trainer.fit(module, batches, odd, ckpt_path=resume)
        kept = any(hasattr(parameter, "full_tensor") for parameter in module.parameters())
        trainer.save_checkpoint(folder / f"{steps}.ckpt")
        if module.shards is not None:
            module.shards.gather(module)
        module(take(whole, slice(rank + 1)))  # an ordinary module again, that no other process has to know of
        return {name: value.clone() for name, value in module.release_state().items()}, kept

    weights, kept = train(2)
    _, _ = train(1)
    continued, _ = train(2, folder / "1.ckpt")
    return {"weights": weights, "continued": continued, "shared out": kept}


class Resumable(Loader):
    """The batches of an epoch; a continued one starts behind what was trained, as the data module's loader does."""

    trainer: pl.Trainer
    start = (0, 0)

    def __iter__(self) -> Any:
        epoch, batch = self.start
        return iter(self[batch if epoch == self.trainer.current_epoch else 0 :])

    def state_dict(self) -> dict[str, int]:
        loop = self.trainer.fit_loop
        done = loop.epoch_loop.batch_progress.current.processed
        whole = done >= len(self)
        return {"epoch": loop.epoch_progress.current.processed + whole, "batch": 0 if whole else done}

    def load_state_dict(self, state: dict[str, int]) -> None:
        self.start = (state["epoch"], state["batch"])


class Signalled(pl.Callback):
    """Sends the second process a signal before the third batch."""

    def on_train_batch_start(self, trainer: pl.Trainer, module: Any, batch: Any, batch_idx: int) -> None:
        if trainer.current_epoch == 0 and batch_idx == 2 and trainer.global_rank == 1:
            os.kill(os.getpid(), signal.SIGUSR2)


def make_thin() -> Thin:
    """Return THIN: an encoder with batch norm that learns, and a frozen one that runs without gradients."""
    torch.manual_seed(0)
    task = tasks.Expression(
        classes=["neutral", "happiness", "sadness"], loss=losses.CrossEntropy(), metrics=[metrics.Classification()]
    )
    task.metrics[0].bind(task.outputs)
    ours, theirs = (TimmEncoder("test_resnet", image_size=64, output="map") for _ in range(2))
    return Thin(
        {"expression": task},
        ours,
        exogenous=ExogenousStream(theirs, classes=4, hidden=(8,), random=True),
        experts=4,
        hidden=(8,),
        layer_decay=0.8,
        channels_last=True,
        optimizer=functools.partial(torch.optim.SGD, lr=0.02, momentum=0.9),  # type: ignore[arg-type]
    )


def thin(
    folder: Path, rank: int, strategy: Any, *callbacks: pl.Callback, precision: Any = "32-true"
) -> tuple[dict[str, Tensor], list[dict[str, float]]]:
    """Train THIN by two processes, from ``last.ckpt`` where there is one, and return weights and history."""
    module, history = make_thin(), History()
    batches = Resumable(take(make_batch(SIZE, seed, side=64), slice(rank, None, 2)) for seed in range(6))
    whole = make_batch(ODD, 99, side=64)
    odd = Loader(take(whole, key.positions) for key in OrderedSampler(ODD, 4, rank, 2))
    callbacks = (history, *callbacks, Preemption(folder))
    trainer = batches.trainer = make_trainer(
        folder,
        2,
        strategy,
        max_epochs=2,
        precision=precision,
        gradient_clip_val=0.5,
        accumulate_grad_batches=2,
        callbacks=list(callbacks),
        enable_checkpointing=True,
    )
    last = folder / LAST
    trainer.fit(module, batches, odd, ckpt_path=str(last) if last.is_file() else None)
    if module.shards is not None:
        assert not trainer.fit_loop.epoch_loop.val_loop.inference_mode
        module.shards.gather(module)
        assert not any(hasattr(parameter, "full_tensor") for parameter in module.parameters())
    return {name: value.clone() for name, value in module.release_state().items()}, history.epochs


def two_encoders(folder: Path, rank: int) -> dict[str, Any]:
    """Train THIN as copies, shared out, and shared out but stopped by a signal and continued."""
    strategy = functools.partial(FullyShardedStrategy, minimum_parameters=10_000, process_group_backend="gloo")
    found: dict[str, Any] = {"copies": thin(folder / "copies", rank, "ddp")}
    found["shared out"] = thin(folder / "shared", rank, strategy())
    found["half precision"] = thin(folder / "half", rank, strategy(), precision="bf16-mixed")
    try:
        thin(folder / "stopped", rank, strategy(), Signalled())
    except Preempted as stop:
        found["signal"] = stop.signum
    found["continued"] = thin(folder / "stopped", rank, strategy())
    torch.distributed.barrier()
    (folder / "damaged").mkdir(exist_ok=True)
    (folder / "damaged" / LAST).write_bytes(b"no checkpoint")
    try:
        thin(folder / "damaged", rank, strategy())
    except CheckpointError as error:
        found["damaged"] = str(error)
    return found


def validated(folder: Path, rank: int, world: int) -> dict[str, float]:
    """Return what the validation of an odd number of samples logs, shared out as the data module does."""
    module, whole = make_module(), make_batch(ODD, 99)
    parts = Loader(take(whole, key.positions) for key in OrderedSampler(ODD, 4, rank, world))
    make_trainer(folder, world).validate(module, parts, verbose=False)
    return module.last_validation


def begin(rank: int, world: int) -> None:
    """Make this process, forked from one that is alone, one of ``world``."""
    torch.set_num_threads(1)
    warnings.simplefilter("ignore")
    if world > 1:
        os.environ |= {"LOCAL_RANK": str(rank), "NODE_RANK": "0", "WORLD_SIZE": str(world)}
        setattr(rank_zero_only, "rank", rank)  # noqa: B010


def work(rank: int, folder: str, world: int) -> None:
    begin(rank, world)
    path = Path(folder)
    found = {
        "unequal masks": trained(path, rank, world),
        "one side": trained(path, rank, world, one_side=True),
        "concordance": trained(path, rank, world, concordance=True),
        "accumulated": trained(path, rank, world, accumulate=2),
        "learnt": trained(path, rank, world, one_side=True, learnt=True),
        "validation": validated(path, rank, world),
        "shared out": shared_out(path, rank, world),
    }
    torch.save(found, path / f"world{world}-rank{rank}.pt")
    if world > 1:
        torch.distributed.destroy_process_group()


def work_with_two_encoders(rank: int, folder: str, world: int) -> None:
    if world == 1:
        return
    begin(rank, world)
    torch.save(two_encoders(Path(folder), rank), Path(folder) / f"rank{rank}.pt")
    torch.distributed.destroy_process_group()


WORK = {"small": work, "two encoders": work_with_two_encoders}


def in_one_and_in_two(work: Callable[[int, str, int], None], folder: str) -> None:
    """Call ``work(rank, folder, world)`` in this process alone, and then in two that know of each other."""
    torch.set_num_threads(1)
    work(0, folder, 1)
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        os.environ |= {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(free.getsockname()[1])}
    torch.multiprocessing.start_processes(work, args=(folder, 2), nprocs=2, start_method="fork")


if __name__ == "__main__":
    in_one_and_in_two(WORK[sys.argv[1]], sys.argv[2])
