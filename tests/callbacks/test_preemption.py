# SPDX-License-Identifier: Apache-2.0
"""A signal ends a run at the next batch with its state saved, and one owner puts the job back into the queue."""

from __future__ import annotations

import multiprocessing
import os
import signal
import subprocess
import sys
import time
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import pytorch_lightning as pl
import torch
from pytorch_lightning.plugins.environments import SLURMEnvironment
from pytorch_lightning.utilities import rank_zero_only

from affect.callbacks import LAST, AtomicCheckpointIO, History, Preempted, Preemption, preemptible, preemption
from affect.data.datamodule import prepare_worker
from affect.errors import ConfigError
from tests.models.test_base import Repeat, make_batch, make_module

BATCHES = [make_batch(seed=seed) for seed in range(6)]


class Signalled(pl.Callback):
    """Sends this process a signal before a batch of its first epoch."""

    def __init__(self, batch: int, signum: int) -> None:
        self.batch, self.signum = batch, signum

    def on_train_batch_start(self, trainer: pl.Trainer, module: Any, batch: Any, batch_idx: int) -> None:
        if trainer.current_epoch == 0 and batch_idx == self.batch:
            os.kill(os.getpid(), self.signum)


def _train(folder: Path, *callbacks: pl.Callback, accumulate: int = 1) -> dict[str, torch.Tensor]:
    """Train two epochs, from ``last.ckpt`` where there is one, and return the weights."""
    trainer = pl.Trainer(
        accelerator="cpu",
        max_epochs=2,
        accumulate_grad_batches=accumulate,
        logger=False,
        enable_progress_bar=False,
        enable_model_summary=False,
        plugins=[AtomicCheckpointIO()],
        callbacks=[History(), *callbacks, Preemption(folder)],
        default_root_dir=folder,
    )
    module = make_module()
    last = folder / LAST
    trainer.fit(module, Resumable(trainer), Repeat(BATCHES[:1]), ckpt_path=str(last) if last.is_file() else None)
    return module.release_state()


class Resumable(Repeat):
    """The batches of an epoch; a continued one starts behind what was trained, as the data module's loader does."""

    def __init__(self, trainer: pl.Trainer) -> None:
        super().__init__(BATCHES)
        self.trainer, self.start = trainer, (0, 0)

    def __iter__(self) -> Any:
        epoch, batch = self.start
        return iter(self.batches[batch if epoch == self.trainer.current_epoch else 0 :])

    def state_dict(self) -> dict[str, int]:
        loop = self.trainer.fit_loop
        done = loop.epoch_loop.batch_progress.current.processed
        whole = done >= len(BATCHES)
        return {"epoch": loop.epoch_progress.current.processed + whole, "batch": 0 if whole else done}

    def load_state_dict(self, state: dict[str, int]) -> None:
        self.start = (state["epoch"], state["batch"])


@pytest.mark.parametrize(("batch", "accumulate", "steps"), [(2, 1, 3), (2, 2, 2), (0, 3, 1), (5, 1, 6)], ids=str)
def test_a_run_leaves_at_the_next_boundary_and_continues_exactly(
    batch: int, accumulate: int, steps: int, tmp_path: Path
) -> None:
    """A boundary lies behind accumulated gradients, and behind the validation where the epoch ends."""
    before = [signal.getsignal(signum) for signum in preemption.SIGNALS]
    with pytest.raises(Preempted) as caught:
        _train(tmp_path, Signalled(batch, signal.SIGUSR2), accumulate=accumulate)
    assert (caught.value.signum, caught.value.code) == (signal.SIGUSR2, 128 + signal.SIGUSR2)
    assert [signal.getsignal(signum) for signum in preemption.SIGNALS] == before
    state = torch.load(tmp_path / LAST, weights_only=True)
    assert state["global_step"] == steps
    history = next(kept for name, kept in state["callbacks"].items() if name.startswith("History"))
    assert len(history["epochs"]) == (1 if batch == 5 else 0)
    continued = _train(tmp_path, accumulate=accumulate)
    whole = _train(tmp_path / "whole", accumulate=accumulate)
    assert all(torch.equal(continued[name], value) for name, value in whole.items())


class SignalledAtTheEnd(pl.Callback):
    """Sends this process a signal when the last epoch is over: no batch, and no epoch, follows."""

    def on_train_end(self, trainer: pl.Trainer, module: Any) -> None:
        os.kill(os.getpid(), signal.SIGUSR2)


def test_a_signal_behind_the_last_epoch_is_obeyed(tmp_path: Path) -> None:
    with pytest.raises(Preempted) as caught:
        _train(tmp_path, SignalledAtTheEnd())
    assert caught.value.signum == signal.SIGUSR2
    assert torch.load(tmp_path / LAST, weights_only=True)["global_step"] == 2 * len(BATCHES)
    continued, whole = _train(tmp_path), _train(tmp_path / "whole")
    assert all(torch.equal(continued[name], value) for name, value in whole.items())


def test_agreements_cannot_be_rarer_than_never(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match=r"every_n_steps=0 must be at least 1"):
        Preemption(tmp_path, every_n_steps=0)


# ------------------------------------------------------------------------------------------------ commands


def _wait_for_a_signal() -> None:
    os.kill(os.getpid(), signal.SIGTERM)
    time.sleep(5)
    pytest.fail("it went on")


def test_what_it_says_is_written_in_one_piece(monkeypatch: pytest.MonkeyPatch) -> None:
    """Slurm writes to the same file while a job is told to end; two writes let it in between a line and its end."""
    wrote: list[str] = []
    monkeypatch.setattr(sys, "stderr", SimpleNamespace(write=wrote.append, flush=lambda: None))
    preemption._say("saved")
    assert wrote == ["saved\n"]


def test_a_command_leaves_at_once_where_there_is_no_batch(capsys: pytest.CaptureFixture[str]) -> None:
    before = [signal.getsignal(signum) for signum in preemption.SIGNALS]
    with pytest.raises(SystemExit) as caught, preemptible():
        _wait_for_a_signal()
    assert caught.value.code == 143
    assert "SIGTERM: state saved; the same command continues the run" in capsys.readouterr().err
    assert [signal.getsignal(signum) for signum in preemption.SIGNALS] == before


def test_further_processes_leave_without_a_word(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """A launcher kills the others where one fails: the first process has to be able to requeue."""
    monkeypatch.setattr(rank_zero_only, "rank", 1)
    with pytest.raises(SystemExit) as caught, preemptible():
        raise Preempted(signal.SIGTERM)
    assert caught.value.code == 0
    assert not capsys.readouterr().err


# -------------------------------------------------------------------------------------------------- owners


class SignalHandler:
    """Stands for submitit's: its module tells."""

    __module__ = "submitit.core.job_environment"

    def __init__(self) -> None:
        self.called: list[int] = []

    def checkpoint_and_try_requeue(self, signum: int, frame: Any) -> None:
        self.called.append(signum)
        raise SystemExit(-1)


@pytest.fixture
def slurm(monkeypatch: pytest.MonkeyPatch) -> Any:
    """A job of Slurm that is in ``state``; what it is told is in ``said``."""

    class Slurm:
        job: int | None = 7
        state, code = "RUNNING", 0

        def __init__(self) -> None:
            self.said: list[tuple[str, ...]] = []

    made = Slurm()

    def scontrol(*words: str) -> subprocess.CompletedProcess[str]:
        if words[0] == "show":
            return subprocess.CompletedProcess(words, 0, f"JobId=7 JobState={made.state} Reason=None\n", "")
        made.said.append(words)
        return subprocess.CompletedProcess(words, made.code, "", "slurm_requeue error: not a batch job\n")

    monkeypatch.setattr(preemption, "_scontrol", scontrol)
    monkeypatch.setattr(SLURMEnvironment, "job_id", staticmethod(lambda: made.job))
    before = signal.getsignal(signal.SIGTERM)
    yield made
    signal.signal(signal.SIGTERM, before)


@pytest.mark.parametrize("signum", preemption.SIGNALS)
def test_submitit_requeues_what_it_started(slurm: Any, signum: int) -> None:
    handler = SignalHandler()
    with pytest.raises(SystemExit):
        preemption.give_way(signum, {int(signal.SIGUSR2): handler.checkpoint_and_try_requeue})
    assert handler.called == [signal.SIGUSR2]
    assert slurm.said == []


@pytest.mark.parametrize("state", ["COMPLETING", "PENDING", "CANCELLED", "PREEMPTED", "TIMEOUT"])
def test_nobody_requeues_what_slurm_is_ending(slurm: Any, state: str, capsys: pytest.CaptureFixture[str]) -> None:
    slurm.state = state
    handler = SignalHandler()
    preemption.give_way(signal.SIGTERM, {int(signal.SIGUSR2): handler.checkpoint_and_try_requeue})
    assert handler.called == slurm.said == []
    assert f"Slurm is ending job 7 itself ({state})" in capsys.readouterr().err


def test_a_plain_job_requeues_itself(slurm: Any, capsys: pytest.CaptureFixture[str]) -> None:
    preemption.give_way(signal.SIGUSR1, {int(signal.SIGUSR2): signal.SIG_DFL})
    assert slurm.said == [("requeue", "7")]
    assert "job 7 is queued again" in capsys.readouterr().err
    slurm.code = 1
    preemption.give_way(signal.SIGUSR1, {})
    assert "cannot be queued again (slurm_requeue error: not a batch job)" in capsys.readouterr().err


# ------------------------------------------------------------------------------------------------- workers


def _work(ready: Any) -> None:
    prepare_worker(0)
    ready.set()
    time.sleep(60)


def test_loading_processes_obey_only_the_process_that_they_work_for() -> None:
    context = multiprocessing.get_context("fork")
    ready = context.Event()
    process = context.Process(target=_work, args=(ready,), daemon=True)
    process.start()
    assert ready.wait(20)
    for name in ("TERM", "USR1", "USR2"):
        subprocess.run(["/bin/kill", f"-{name}", str(process.pid)], check=True)
    process.join(0.5)
    assert process.exitcode is None, "a stranger's signal ended it"
    process.terminate()
    process.join(20)
    assert process.exitcode == 0
