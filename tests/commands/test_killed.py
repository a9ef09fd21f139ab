# SPDX-License-Identifier: Apache-2.0
"""Commands that are killed at random moments of the clock and started again end as one that was left alone."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from safetensors.torch import load_file

import affect
from affect.data import faces
from affect.data.faces import FaceDials, FaceImages
from affect.data.layouts.common import write_image
from affect.data.table import FaceTable
from tests.conftest import FACES

COUNT = 3000
LIMIT = 240.0
"""Photographs to be prepared, and seconds that no command of these tests takes."""


def start(folder: Path, line: list[str]) -> subprocess.Popen[str]:
    """Start a command in ``folder`` as the leader of a process group."""
    root = Path(affect.__file__).parents[1]
    environment = dict(os.environ, PYTHONPATH=str(root), OMP_NUM_THREADS="1")
    command = [sys.executable, "-m", "affect.commands.main", *line]
    return subprocess.Popen(
        command, cwd=folder, env=environment, text=True, stderr=subprocess.PIPE, stdout=subprocess.DEVNULL,
        start_new_session=True,
    )  # fmt: skip


def stamps(folder: Path) -> dict[Path, int]:
    """Return when each file and folder below ``folder`` was changed; what vanishes meanwhile is left out."""
    found = {}
    for path in folder.rglob("*"):
        try:
            found[path] = path.stat().st_mtime_ns
        except FileNotFoundError:
            continue
    return found


def until_work(process: subprocess.Popen[str], folder: Path, before: dict[Path, int]) -> None:
    """Wait until a command has changed something in ``folder``, or has ended: imports take most of its time."""
    end = time.monotonic() + LIMIT
    while process.poll() is None and stamps(folder) == before:
        assert time.monotonic() < end, "the command changes nothing"
        time.sleep(0.02)


def finish(process: subprocess.Popen[str]) -> None:
    """Wait for a command that has to end well."""
    error = process.communicate(timeout=LIMIT)[1]
    assert process.returncode == 0, error


def left_alone(folder: Path, line: list[str]) -> float:
    """Run a command and return the seconds between the first thing that it changed and its end."""
    before = stamps(folder)
    process = start(folder, line)
    until_work(process, folder, before)
    begun = time.monotonic()
    finish(process)
    return time.monotonic() - begun


def kill(folder: Path, line: list[str], moments: np.ndarray, whole_group: bool) -> int:
    """Start a command and kill it, once for each of ``moments`` (seconds); return how often it was killed in time."""
    count = 0
    for moment in moments:
        before = stamps(folder)
        process = start(folder, line)
        until_work(process, folder, before)
        try:
            process.communicate(timeout=float(moment))
        except subprocess.TimeoutExpired:
            (os.killpg if whole_group else os.kill)(process.pid, signal.SIGKILL)
            process.communicate(timeout=LIMIT)
        assert process.returncode in (0, -signal.SIGKILL), "it did not end by itself"
        count += process.returncode == -signal.SIGKILL
    return count


# -------------------------------------------------------------------------------------------------- preparation


@pytest.fixture(scope="module")
def delivered(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Photographs of a user with landmarks, 60 to a sequence."""
    root = tmp_path_factory.mktemp("delivered")
    dials = FaceDials(image_size=64, subjects=4, missing_landmarks=0.0)
    table = FaceTable.from_arrow(faces.labels_table(dials, 3, 60), root, {"dataset": "mine"})
    for k, image in enumerate(FaceImages(dials, 3).read(np.arange(60))):
        write_image(root / f"{k}.png", image)
    rows = np.arange(COUNT)
    names = [f"{k % 60}.png" for k in rows]
    sequences = [f"s{k // 60:02d}" for k in rows]
    table.take(rows % 60).with_columns({"image": names, "sequence": sequences}).save(root / "labels.arrow")
    return root


def contents(folder: Path) -> dict[str, bytes]:
    """Return what every file below a folder holds."""
    return {str(path.relative_to(folder)): path.read_bytes() for path in folder.rglob("*") if path.is_file()}


@pytest.fixture(scope="module", params=["files", "shards"])
def preparation(request: pytest.FixtureRequest, delivered: Path, tmp_path_factory: pytest.TempPathFactory) -> Any:
    """Return the line of a preparation, what it leaves behind when nobody disturbs it, and its seconds."""
    line = ["prepare", "dataset=table", f"dataset.table={delivered / 'labels.arrow'}", "prepare=box5", "workers=2"]
    line += ["prepare.provider=annotations", f"store={request.param}"]
    folder = tmp_path_factory.mktemp("whole")
    seconds = left_alone(folder, line)
    return line, contents(folder / "prepared"), seconds


@pytest.mark.slow
@pytest.mark.parametrize("whole_group", [True, False], ids=["all_processes", "main_process"])
def test_a_preparation(preparation: Any, whole_group: bool, tmp_path: Path) -> None:
    """Processes that outlive the main one may not disturb the next command."""
    line, wanted, seconds = preparation
    moments = np.random.default_rng(0).uniform(0, seconds, 3)
    killed = kill(tmp_path, line, moments, whole_group)
    finish(start(tmp_path, line))
    assert contents(tmp_path / "prepared") == wanted, f"killed {killed} times, at {moments} of {seconds} s"


# -------------------------------------------------------------------------------------------------------- sweep


SWEEP = ["train", "-m", "seed=1,2", *FACES, "trainer.max_epochs=2", "callbacks.last.every_n_steps=1"]


def outcome(folder: Path) -> list[tuple[dict[str, Any], dict[str, torch.Tensor]]]:
    """Return what decides about each run of the sweep below ``folder``, and its weights."""
    (sweep,) = (folder / "runs" / "sweeps").iterdir()
    jobs = json.loads((sweep / "sweep.json").read_text())["jobs"]
    assert [job["state"] for job in jobs] == ["finished"] * 2
    found = []
    for k in range(2):
        results = json.loads((sweep / str(k) / "results.json").read_text())
        kept = {key: results[key] for key in ("metrics", "selection", "history", "data", "labels")}
        found.append((kept, load_file(sweep / str(k) / "release" / "model.safetensors")))
    return found


@pytest.fixture(scope="module")
def whole_sweep(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, float]:
    folder = tmp_path_factory.mktemp("whole_sweep")
    return folder, left_alone(folder, SWEEP)


@pytest.mark.slow
@pytest.mark.parametrize("launcher", ["basic", "joblib"])
def test_a_sweep(launcher: str, whole_sweep: tuple[Path, float], tmp_path: Path) -> None:
    whole, seconds = whole_sweep
    line = list(SWEEP)
    if launcher == "joblib":
        pytest.importorskip("hydra_plugins.hydra_joblib_launcher")
        line.append("hydra/launcher=joblib")
    moments = np.random.default_rng(1).uniform(0, 0.6 * seconds, 3)
    killed = kill(tmp_path, line, moments, whole_group=True)
    finish(start(tmp_path, line))
    for (ours, weights), (theirs, other) in zip(outcome(tmp_path), outcome(whole), strict=True):
        assert ours == theirs, f"killed {killed} times, at {moments} of {seconds} s"
        assert weights.keys() == other.keys()
        assert all(torch.equal(weights[name], other[name]) for name in weights)
