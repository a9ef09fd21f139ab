# SPDX-License-Identifier: Apache-2.0
"""The processes of a distributed run: who starts them, how they find each other, and what the first one shares.

Processes come from Slurm's or submitit's tasks, from ``torchrun``, or from Lightning, which starts one per device with
the command line of the first. In a job of a sweep that command line would start the whole sweep again, and in a
launched job it is the launcher's; there the further processes get the settings of the one job.
"""

from __future__ import annotations

import os
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from subprocess import Popen
from typing import Any

import pytorch_lightning as pl
import torch
import torch.distributed
from pytorch_lightning.plugins.environments import (
    ClusterEnvironment,
    LightningEnvironment,
    SLURMEnvironment,
    TorchElasticEnvironment,
)
from pytorch_lightning.strategies.launchers import _SubprocessScriptLauncher
from pytorch_lightning.utilities import rank_zero_only

from affect.commands.configuration import sweep_job
from affect.errors import ConfigError

_SHARED = ("LOCAL_RANK", "NODE_RANK", "WORLD_SIZE", "MASTER_ADDR", "MASTER_PORT")
"""Variables by which the processes of a run find each other."""

_LOCAL_TASKS, _LOCAL_RANK, _LOCAL_JOB = "SUBMITIT_LOCAL_NTASKS", "SUBMITIT_LOCAL_LOCALID", "SUBMITIT_LOCAL_JOB_ID"


def cluster_environment() -> ClusterEnvironment | None:
    """Return how the processes of this job find each other; None leaves it to Lightning.

    Lightning would requeue jobs of Slurm itself, beside submitit, and would expect one task of Slurm per device; here
    one task may also have several devices.
    """
    if TorchElasticEnvironment.detect():
        return None
    if "SLURM_NTASKS" in os.environ:
        several = int(os.environ["SLURM_NTASKS"]) > 1 and SLURMEnvironment.detect()
        return SLURMEnvironment(auto_requeue=False) if several else LightningEnvironment()
    return None


def join_tasks() -> None:
    """Let several tasks of one job of submitit's local launcher find each other, as ``torchrun`` would have.

    Everything else that starts several processes says so in a way that Lightning knows.
    """
    if int(os.environ.get(_LOCAL_TASKS, "1")) < 2 or "LOCAL_RANK" in os.environ:
        return
    rank = os.environ[_LOCAL_RANK]
    port = 15000 + int(os.environ[_LOCAL_JOB]) % 10000  # the same for all tasks of a job, as Lightning does on Slurm
    os.environ |= {"LOCAL_RANK": rank, "NODE_RANK": "0", "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(port)}
    setattr(rank_zero_only, "rank", int(rank))  # noqa: B010


@contextmanager
def processes_of_a_run() -> Iterator[None]:
    """Let go of the processes that a run started, so that the next run of this process starts its own.

    Within a run they stay: a refit, and the arms of a comparison, go on with those of the first training.
    """
    started_here = "LOCAL_RANK" not in os.environ
    before = {name: os.environ.get(name) for name in _SHARED}
    try:
        yield
    finally:
        if started_here and "LOCAL_RANK" in os.environ:
            if torch.distributed.is_available() and torch.distributed.is_initialized():
                torch.distributed.destroy_process_group()
            for name, value in before.items():
                if value is None:
                    os.environ.pop(name, None)
                else:
                    os.environ[name] = value


def check_tasks(trainer: pl.Trainer) -> None:
    """Refuse a job that started several tasks for another number of processes: each would train a run of its own.

    Raises:
        ConfigError: With both numbers and what to set.
    """
    tasks = max(int(os.environ.get(name, "1")) for name in (_LOCAL_TASKS, "SLURM_NTASKS"))
    if tasks > 1 and tasks != trainer.world_size and not TorchElasticEnvironment.detect():
        raise ConfigError(
            f"this job has {tasks} tasks, and trainer.devices × trainer.num_nodes are {trainer.world_size} processes; "
            "start one task, or as many as there are devices (hydra.launcher.tasks_per_node, srun --ntasks-per-node)"
        )


def use_own_launcher(trainer: pl.Trainer) -> None:
    """Have a job of a sweep start its further processes by itself."""
    strategy: Any = trainer.strategy
    launcher = getattr(strategy, "_launcher", None)
    if type(launcher) is _SubprocessScriptLauncher and sweep_job() is not None:
        strategy._launcher = JobLauncher(launcher.cluster_environment, launcher.num_processes, launcher.num_nodes)


class JobLauncher(_SubprocessScriptLauncher):
    """Starts the further processes of a sweep's job by the command line of ``affect``, whoever started the job.

    ``affect`` knows the job's settings from its environment (``affect.commands.main``).
    """

    def _call_children_scripts(self) -> None:
        self._check_can_spawn_children()
        environment = self.cluster_environment
        os.environ |= {
            "MASTER_ADDR": environment.main_address,
            "MASTER_PORT": str(environment.main_port),
            "NODE_RANK": str(environment.node_rank()),
            "LOCAL_RANK": str(environment.local_rank()),
            "WORLD_SIZE": str(self.num_processes * self.num_nodes),
        }
        self.procs = [
            Popen(rank_command(rank), env=os.environ | {"LOCAL_RANK": str(rank)})
            for rank in range(1, self.num_processes)
        ]


def rank_command(rank: int) -> list[str]:
    """Return the command that runs the current job of a sweep as a further process."""
    from hydra.core.hydra_config import HydraConfig

    hydra = HydraConfig.get()
    folders = [source.path for source in hydra.runtime.config_sources if source.provider == "command-line"]
    given = [word for folder in folders for word in ("--config-dir", str(Path(folder)))]
    added = [f"hydra.job.name=train_ddp_process_{rank}", "hydra.output_subdir=null"]
    return [sys.executable, "-m", "affect.commands.main", str(hydra.job.config_name), "-m", *given, *added]


def wait_for_all() -> None:
    """Wait, in a distributed run, until every process is here: the first one writes what others go on with."""
    if torch.distributed.is_available() and torch.distributed.is_initialized():
        torch.distributed.barrier()
