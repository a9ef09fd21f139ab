# SPDX-License-Identifier: Apache-2.0
"""Jobs of a real Slurm that lose their machine: each is queued again once, and ends with the weights of a run in peace.

``slurm-local.sh`` starts a Slurm of one node on a machine of Debian where one is root. All jobs run side by side.
"""

from __future__ import annotations

import json
import os
import re
import shutil
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file

from tests.conftest import SMALL

HERE = Path(__file__).parent
STARTER = HERE / "slurm-local.sh"
SETTINGS = (
    *SMALL,
    "callbacks=[default,ema,pace]",
    "task=[au,valence_arousal]",
    "model.dropout=0.3",
    "data.limit=40",
    "trainer.accelerator=cpu",
    "trainer.max_epochs=12",
    "trainer.check_val_every_n_epoch=4",
    "bootstrap.resamples=0",
    "figures=false",
)
STEPS = 120
SUBMITIT = ("hydra/launcher=slurm", "hydra.launcher.cpus_per_task=1", "hydra.launcher.mem_gb=1")
AFFECT = (sys.executable, "-m", "affect.commands.main", "train", "--config-dir", str(HERE / "extension" / "conf"))
ENVIRONMENT = os.environ | {"OMP_NUM_THREADS": "1", "OMP_WAIT_POLICY": "PASSIVE", "GLOO_SOCKET_IFNAME": "lo"}

pytestmark = pytest.mark.slurm


@pytest.fixture(scope="session")
def slurm() -> Iterator[None]:
    """Make sure that a Slurm runs here; what the tests started is stopped again."""
    if shutil.which("sinfo") and not _call("sinfo").returncode:
        yield
        return
    if os.geteuid() != 0 or not Path("/etc/debian_version").is_file():
        pytest.skip("no Slurm runs here, and starting one needs root on Debian or Ubuntu")
    started = subprocess.run([STARTER, "up"], capture_output=True, text=True, timeout=300, check=False)
    if started.returncode:
        pytest.skip(f"no Slurm could be started here: {(started.stderr or started.stdout).strip()[-300:]}")
    yield
    subprocess.run([STARTER, "down"], timeout=60, check=False)


def _call(*words: str) -> subprocess.CompletedProcess[str]:
    return subprocess.run(words, capture_output=True, text=True, timeout=60, check=False)


def _settings(folder: Path, seconds: float) -> list[str]:
    return [*SETTINGS, f"callbacks.pace.seconds={seconds}", f"paths.cache={folder.parent / 'cache'}"]


class Job:
    """A training under Slurm in a folder of its own.

    Args:
        folder: Where its files are.
        seconds: Pause after each step.
        settings: Further settings.
    """

    def __init__(self, folder: Path, seconds: float, *settings: str) -> None:
        self.folder, self.process = folder, None
        self.settings = [*_settings(folder, seconds), *settings]
        self.number = ""
        folder.mkdir()

    def start(self) -> None:
        raise NotImplementedError

    def run_folder(self) -> Path:
        raise NotImplementedError

    def log(self) -> str:
        paths = [path for path in sorted(self.folder.rglob("*")) if path.suffix in (".out", ".err")]
        return "\n".join(path.read_text() for path in paths)

    def steps(self) -> list[int]:
        path = self.run_folder() / "steps-0.txt"
        return [int(step) for step in path.read_text().split()] if path.is_file() else []

    def state(self) -> dict[str, str]:
        found = _call("scontrol", "show", "job", "-o", self.number).stdout
        return dict(pair.split("=", 1) for pair in found.split() if "=" in pair)


class Sweep(Job):
    """One job of a sweep that submitit runs."""

    def start(self) -> None:
        words = [*AFFECT, "-m", *SUBMITIT, *self.settings, f"hydra.sweep.dir={self.folder / 'sweep'}", "seed=1"]
        with (self.folder / "sweep.out").open("w") as out:
            self.process = subprocess.Popen(words, env=ENVIRONMENT, stdout=out, stderr=out, cwd=self.folder)
        folder = self.folder / "sweep" / ".submitit"
        _wait(lambda: folder.is_dir() and any(re.fullmatch(r"\d+(_0)?", path.name) for path in folder.iterdir()), 90)
        self.number = next(path.name for path in folder.iterdir() if re.fullmatch(r"\d+(_0)?", path.name))

    def run_folder(self) -> Path:
        return self.folder / "sweep" / "0"


class Batch(Job):
    """A job of plain ``sbatch``."""

    def start(self) -> None:
        words = " ".join(f"'{word}'" for word in (*AFFECT, *self.settings, f"paths.output={self.run_folder()}"))
        script = self.folder / "job.sh"
        script.write_text(f"#!/bin/bash\nsrun {words}\n")
        options = ("--parsable", "--mem=1G", "--open-mode=append", f"--output={self.folder / 'job.out'}")
        done = subprocess.run(
            ["sbatch", *options, script], env=ENVIRONMENT, capture_output=True, text=True, cwd=self.folder, check=True
        )
        self.number = done.stdout.strip()

    def run_folder(self) -> Path:
        return self.folder / "run"


def _wait(condition: Callable[[], bool], seconds: float) -> None:
    until = time.monotonic() + seconds
    while not condition():
        assert time.monotonic() < until, "waited too long"
        time.sleep(0.5)


@pytest.fixture(scope="module")
def in_peace(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Return the folder of the run that nobody interrupts."""
    folder = tmp_path_factory.mktemp("in_peace") / "run"
    words = [*AFFECT, *_settings(folder, 0.0), f"paths.output={folder}", "seed=1"]
    subprocess.run(words, env=ENVIRONMENT, check=True, cwd=folder.parent, timeout=240)
    return folder


@pytest.fixture(scope="module")
def jobs(slurm: None, tmp_path_factory: pytest.TempPathFactory) -> Iterator[dict[str, Job]]:
    """Return the jobs, each interrupted in its way, all of them finished."""
    folder = tmp_path_factory.mktemp("jobs")
    # A limit has a resolution of minutes, and its signal may come a minute early.
    limit = ("hydra.launcher.timeout_min=2", "hydra.launcher.signal_delay_s=10")
    started: dict[str, Job] = {
        "time limit": Sweep(folder / "limit", 1.0, *limit),
        "scontrol requeue": Sweep(folder / "requeue", 0.5),
        "scancel --signal=TERM": Sweep(folder / "term", 0.5),
        "sbatch": Batch(folder / "batch", 0.5, "seed=1"),
    }
    try:
        for job in started.values():
            job.start()
        for name, words in (
            ("scontrol requeue", ("scontrol", "requeue")),
            ("scancel --signal=TERM", ("scancel", "--signal=TERM")),
            ("sbatch", ("scancel", "--signal=USR1")),
        ):
            job = started[name]
            _wait(lambda job=job: len(job.steps()) > 15, 240)
            done = _call(*words, job.number)
            assert done.returncode == 0, done.stderr
        until = time.monotonic() + 360
        while any(not (job.run_folder() / "results.json").is_file() for job in started.values()):
            if time.monotonic() > until:
                told = (f"{name}: {job.state().get('JobState')}\n{job.log()[-2500:]}" for name, job in started.items())
                pytest.fail("\n".join(told))
            time.sleep(1)
        for job in started.values():
            if job.process is not None:
                assert job.process.wait(60) == 0, job.log()
        yield started
    finally:
        for job in started.values():
            if job.number:
                _call("scancel", job.number)
            if job.process is not None and job.process.poll() is None:
                job.process.kill()


NAMES = ("time limit", "scontrol requeue", "scancel --signal=TERM", "sbatch")


@pytest.mark.parametrize("name", NAMES)
def test_a_job_is_queued_again_once(jobs: dict[str, Job], name: str) -> None:
    assert jobs[name].state()["Restarts"] == "1", jobs[name].log()


@pytest.mark.parametrize("name", NAMES)
def test_it_continues_at_the_batch_where_it_was_stopped(jobs: dict[str, Job], name: str) -> None:
    assert jobs[name].steps() == list(range(1, STEPS + 1)), jobs[name].log()


@pytest.mark.parametrize("name", NAMES)
def test_it_ends_with_the_weights_of_a_run_in_peace(jobs: dict[str, Job], in_peace: Path, name: str) -> None:
    folder = jobs[name].run_folder()
    ours, theirs = (load_file(path / "release" / "model.safetensors") for path in (folder, in_peace))
    assert ours.keys() == theirs.keys()
    assert all(torch.equal(ours[key], value) for key, value in theirs.items())
    found, expected = (json.loads((path / "results.json").read_text()) for path in (folder, in_peace))
    assert found["metrics"] == expected["metrics"]
    assert found["history"] == expected["history"]


def test_who_queued_it_again(jobs: dict[str, Job]) -> None:
    """One owner each: submitit where it started the job, Slurm where it was told to, the job itself under sbatch."""
    said = {name: re.findall(r"state saved; (.*)", job.log()) for name, job in jobs.items()}
    assert said["time limit"] == said["scancel --signal=TERM"] == ["submitit starts the job again"]
    assert len(said["scontrol requeue"]) == 1
    assert said["scontrol requeue"][0].startswith("Slurm is ending job")
    assert said["sbatch"] == [f"job {jobs['sbatch'].number} is queued again"]
