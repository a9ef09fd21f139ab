# SPDX-License-Identifier: Apache-2.0
"""What a run does when its machine is taken away: it saves at the next batch, and one owner starts it again.

A scheduler announces the end by a signal: submitit by SIGUSR2, Slurm by SIGTERM or by what ``sbatch --signal`` names.
The callback ``Preemption`` notes it, lets the batch end, writes ``last.ckpt`` and raises ``Preempted``; ``preemptible``
around the command then lets exactly one party put the job back into the queue:

- Slurm, where it is ending the job already (``scontrol requeue``, ``scancel``, preemption): nobody else may;
- submitit, where it started the job;
- the job itself (``scontrol requeue``) under a plain ``sbatch``;
- nobody elsewhere: the same command continues the run.
"""

from __future__ import annotations

import re
import signal
import subprocess
import sys
import threading
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytorch_lightning as pl
import torch
import torch.distributed
from pytorch_lightning.plugins.environments import SLURMEnvironment

from affect.callbacks.checkpoint import LAST
from affect.errors import ConfigError

SIGNALS = (signal.SIGTERM, signal.SIGUSR1, signal.SIGUSR2)
"""Signals that announce the end of a job."""

Handler = Callable[[int, Any], Any] | int | None


class Preempted(SystemExit):
    """A signal asked the run to leave and its state is saved; the exit code is the shell's for that signal.

    Attributes:
        signum: The signal.
    """

    def __init__(self, signum: int) -> None:
        super().__init__(128 + signum)
        self.signum = int(signum)


class Preemption(pl.callbacks.Checkpoint):
    """Stops at the next batch boundary after a signal, with ``last.ckpt`` written there.

    A boundary is where a checkpoint can be continued exactly: not within accumulated gradients, and not between the
    last batch of an epoch and its validation, which is finished first. All processes of a distributed run stop at the
    same batch, whichever of them got the signal.

    Args:
        folder: Folder of the run.
        every_n_steps: Optimiser steps between two agreements of several processes on whether to stop; one process
            alone looks at each.
    """

    def __init__(self, folder: str | Path, every_n_steps: int = 1) -> None:
        if every_n_steps < 1:
            raise ConfigError(f"callbacks.preemption.every_n_steps={every_n_steps} must be at least 1")
        self.folder, self.every_n_steps = Path(folder), int(every_n_steps)
        self._noted = 0
        self._replaced: dict[int, Handler] = {}
        self._group: Any = None

    def on_train_start(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        """From here on signals are noted; Lightning has set its own handlers just before."""
        self._noted = 0
        self._replaced = install(self._note)
        if trainer.world_size > 1:
            # Agreeing on the processor costs no wait for an accelerator.
            gloo = torch.distributed.get_backend() == "gloo"
            self._group = None if gloo else torch.distributed.new_group(backend="gloo")

    def on_train_batch_end(
        self,
        trainer: pl.Trainer,
        pl_module: pl.LightningModule,
        outputs: Any,  # noqa: ANN401
        batch: Any,  # noqa: ANN401
        batch_idx: int,
    ) -> None:
        """Leave within an epoch; its last batch is left to ``on_train_epoch_end``."""
        steps, within = divmod(batch_idx + 1, trainer.accumulate_grad_batches)
        if within or batch_idx + 1 >= trainer.num_training_batches:
            return
        if trainer.world_size == 1 or steps % self.every_n_steps == 0:
            self._leave_if_asked(trainer)

    def on_train_epoch_end(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        """Leave at the end of an epoch, after its validation."""
        self._leave_if_asked(trainer)

    def on_train_end(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        """Leave if a signal came behind the last epoch, whose checkpoint is written; put the handlers back.

        What follows has no batches, and would be killed at the end of the grace that the signal began.
        """
        noted = self._agreed(trainer)
        if noted:
            if not (self.folder / LAST).is_file():
                trainer.save_checkpoint(self.folder / LAST)
            raise Preempted(noted)
        self._put_back()

    def on_exception(self, trainer: pl.Trainer, pl_module: pl.LightningModule, exception: BaseException) -> None:
        """Put the handlers back."""
        self._put_back()

    def _note(self, signum: int, frame: Any) -> None:  # noqa: ANN401
        self._noted = int(signum)

    def _put_back(self) -> None:
        replaced, self._replaced = self._replaced, {}
        restore(replaced)

    def _agreed(self, trainer: pl.Trainer) -> int:
        """Return the signal that any process has noted, 0 without one."""
        if trainer.world_size == 1:
            return self._noted
        agreed = torch.tensor(self._noted)
        torch.distributed.all_reduce(agreed, torch.distributed.ReduceOp.MAX, group=self._group)
        return int(agreed)

    def _leave_if_asked(self, trainer: pl.Trainer) -> None:
        noted = self._agreed(trainer)
        if noted:
            trainer.save_checkpoint(self.folder / LAST)
            raise Preempted(noted)


# ------------------------------------------------------------------------------------------------- signals


def install(handler: Callable[[int, Any], Any]) -> dict[int, Handler]:
    """Set the handler of ``SIGNALS`` and return those before; only the main thread may, elsewhere nothing happens."""
    if threading.current_thread() is not threading.main_thread():
        return {}
    return {int(signum): signal.signal(signum, handler) for signum in SIGNALS}


def restore(handlers: Mapping[int, Handler]) -> None:
    """Set handlers that ``install`` returned; those of another language cannot be."""
    for signum, handler in handlers.items():
        if handler is not None:
            signal.signal(signum, handler)


def _leave_at_once(signum: int, frame: Any) -> None:  # noqa: ANN401
    """Leave where there is no batch to finish: every file is written atomically, and a run continues where it was."""
    raise Preempted(signum)


@contextmanager
def preemptible() -> Iterator[None]:
    """Let a command be told to leave by a signal, and have the job started again by the one party that does so.

    Raises:
        SystemExit: In place of what was under way, once a signal came; of code 0 in all processes but the first of a
            distributed run, because launchers kill the others where one fails.
    """
    before = install(_leave_at_once)
    try:
        yield
    except Preempted as stop:
        if _rank():
            raise SystemExit(0) from stop
        restore(before)
        give_way(stop.signum, before)
        raise
    finally:
        restore(before)


# ------------------------------------------------------------------------------------------------- requeue


def give_way(signum: int, handlers: Mapping[int, Handler]) -> None:
    """Have the job put back into the queue, once, and say what happens.

    Args:
        signum: Signal that made the run leave.
        handlers: Handlers that were there before ours: submitit's tells that it started the job.

    Raises:
        SystemExit: Of submitit, which ends its jobs itself.
    """
    name = signal.Signals(signum).name
    job = SLURMEnvironment.job_id()
    if job is not None and (state := slurm_state(job)) not in (None, "RUNNING"):
        _say(f"{name}: state saved; Slurm is ending job {job} itself ({state})")
        return
    owner = submitit_requeue(handlers)
    if owner is not None:
        _say(f"{name}: state saved; submitit starts the job again")
        owner(int(signal.SIGUSR2), None)
        return
    if job is None:
        _say(f"{name}: state saved; the same command continues the run")
        return
    # Slurm ends the job while it is still leaving.
    signal.signal(signal.SIGTERM, signal.SIG_IGN)
    done = _scontrol("requeue", str(job))
    if done is not None and done.returncode == 0:
        _say(f"{name}: state saved; job {job} is queued again")
    else:
        reason = "no scontrol here" if done is None else done.stderr.strip()
        _say(f"{name}: state saved; job {job} cannot be queued again ({reason}); the same command continues the run")


def submitit_requeue(handlers: Mapping[int, Handler]) -> Callable[[int, Any], Any] | None:
    """Return submitit's own handler, which requeues a job, if it is among ``handlers``."""
    handler = handlers.get(int(signal.SIGUSR2))
    owner = type(getattr(handler, "__self__", None)).__module__
    return handler if callable(handler) and owner.partition(".")[0] == "submitit" else None


def slurm_state(job: int) -> str | None:
    """Return the state of a job of Slurm in its own words, e.g. ``RUNNING``; None where nobody tells."""
    done = _scontrol("show", "job", "-o", str(job))
    found = re.search(r"\bJobState=(\w+)", done.stdout) if done is not None and done.returncode == 0 else None
    return found.group(1) if found else None


def _rank() -> int:
    from pytorch_lightning.utilities import rank_zero_only

    return getattr(rank_zero_only, "rank", None) or 0


def _scontrol(*words: str) -> subprocess.CompletedProcess[str] | None:
    try:
        return subprocess.run(["scontrol", *words], capture_output=True, text=True, timeout=60, check=False)
    except (OSError, subprocess.TimeoutExpired):
        return None


def _say(line: str) -> None:
    sys.stderr.write(f"{line}\n")  # in one piece: Slurm writes to the same file at this moment
    sys.stderr.flush()
