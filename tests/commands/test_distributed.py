# SPDX-License-Identifier: Apache-2.0
"""Training by two processes from the command line: alone, in a sweep, and in jobs of submitit's local launcher."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from collections.abc import Callable, Mapping
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from omegaconf import DictConfig
from pytorch_lightning.plugins.environments import LightningEnvironment, SLURMEnvironment
from pytorch_lightning.strategies import ModelParallelStrategy
from safetensors.torch import load_file

from affect.commands import distributed, train
from affect.commands.acceleration import check_sharing
from affect.errors import ConfigError
from affect.models.sharding import FullyShardedStrategy
from tests.conftest import SMALL

EXTENSION = Path(__file__).parents[1] / "cluster" / "extension" / "conf"
SETTINGS = (
    *SMALL,
    "trainer=ddp",
    "trainer.devices=2",  # debug=fast has set one
    "trainer.accelerator=cpu",
    "callbacks=[default,pace]",
    "task=[au,valence_arousal]",
    "data.limit=21",
    "bootstrap.resamples=0",
    "figures=false",
)
SWEEPS: Mapping[str, tuple[str, ...]] = {
    "basic": ("seed=1,2", "selection=refit", "trainer.max_epochs=2", "experiment=two_arms"),
    "spawned": ("seed=1", "hydra/launcher=submitit_local"),
    "tasks": ("seed=1", "hydra/launcher=submitit_local", "hydra.launcher.tasks_per_node=2"),
    "quantized": ("seed=1", "callbacks=[default,pace,qat_int8]", "selection=last"),
    "shared": ("seed=1", "trainer=fsdp", "trainer.strategy.minimum_parameters=1000", "selection=last"),
}


@pytest.fixture(scope="module")
def sweeps(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    """Return the folders of sweeps that ran side by side."""
    pytest.importorskip("hydra_plugins.hydra_submitit_launcher")
    folder = tmp_path_factory.mktemp("sweeps")
    environment = os.environ | {"OMP_NUM_THREADS": "1", "GLOO_SOCKET_IFNAME": "lo"}
    running = {}
    for name, settings in SWEEPS.items():
        words = [sys.executable, "-m", "affect.commands.main", "train", "-m", "--config-dir", str(EXTENSION), *SETTINGS]
        if "trainer=fsdp" in settings:
            words.remove("trainer=ddp")
        words += [*settings, f"paths.cache={folder / 'cache'}", f"hydra.sweep.dir={folder / name}"]
        with (folder / f"{name}.log").open("w") as log:
            running[name] = subprocess.Popen(words, cwd=folder, env=environment, stdout=log, stderr=log)
    try:
        for name, process in running.items():
            assert process.wait(900) == 0, (folder / f"{name}.log").read_text()[-3000:]
    finally:
        for process in running.values():
            if process.poll() is None:
                process.kill()
    return {name: folder / name for name in SWEEPS}


def _steps(folder: Path) -> list[list[int]]:
    """Return what each process that trained in a folder counted."""
    return [[int(step) for step in path.read_text().split()] for path in sorted(folder.glob("steps-*.txt"))]


@pytest.mark.slow
def test_no_process_starts_the_sweep_again(sweeps: dict[str, Path]) -> None:
    runs = {path.relative_to(sweeps["basic"]).as_posix() for path in sweeps["basic"].rglob("results.json")}
    arms = ("", "selection/", "compare/other/", "compare/other/selection/")
    assert runs == {f"{job}/{arm}results.json" for job in (0, 1) for arm in arms}
    for run in runs:
        counted = _steps((sweeps["basic"] / run).parent)
        assert len(counted) == 2, run
        assert counted[0] == counted[1] == list(range(1, len(counted[0]) + 1)), run
        assert json.loads((sweeps["basic"] / run).read_text())["batch"]["processes"] == 2
    seeds = [json.loads((sweeps["basic"] / str(job) / "results.json").read_text())["seed"] for job in (0, 1)]
    assert seeds == [1, 2]


@pytest.mark.slow
def test_launched_jobs_train_as_two_processes_however_these_start(sweeps: dict[str, Path]) -> None:
    states = []
    for name in ("spawned", "tasks"):
        run = sweeps[name] / "0"
        counted = _steps(run)
        assert counted == [[1, 2], [1, 2]], name
        results = json.loads((run / "results.json").read_text())
        assert results["batch"] == {
            "per_process": 4, "processes": 2, "accumulated": 1, "learning_rate_factor": 1.0, "effective": 8,
        }  # fmt: skip
        assert results["data"]["parts"]["test"]["rows"] == 21
        states.append(load_file(run / "release" / "model.safetensors"))
    assert all(torch.equal(states[0][name], value) for name, value in states[1].items())


@pytest.mark.parametrize("name", ["SLURM_NTASKS", "SUBMITIT_LOCAL_NTASKS"])
def test_tasks_for_another_number_of_processes_are_refused(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    trainer: Any = SimpleNamespace(world_size=2)
    monkeypatch.setenv(name, "2")
    distributed.check_tasks(trainer)
    monkeypatch.setenv(name, "4")
    with pytest.raises(ConfigError, match=r"this job has 4 tasks, and .* are 2 processes"):
        distributed.check_tasks(trainer)


def test_slurm_is_never_asked_by_lightning_to_queue_a_job_again(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("SLURM_NTASKS", raising=False)
    assert distributed.cluster_environment() is None
    for name in ("SLURM_NTASKS", "SLURM_NTASKS_PER_NODE"):
        monkeypatch.setenv(name, "2")
    several = distributed.cluster_environment()
    assert isinstance(several, SLURMEnvironment)
    assert several.auto_requeue is False
    monkeypatch.setenv("SLURM_NTASKS", "1")  # one task that has several devices
    assert isinstance(distributed.cluster_environment(), LightningEnvironment)


@pytest.mark.slow
def test_processes_quantize_alike(sweeps: dict[str, Path]) -> None:
    run = sweeps["quantized"] / "0"
    assert _steps(run) == [[1, 2], [1, 2]]
    results = json.loads((run / "results.json").read_text())
    assert results["batch"]["processes"] == 2
    assert results["quantization"]["activations"] is not None
    held = [path.read_text() for path in sorted(run.glob("quantizers-*.txt"))]
    assert len(held) == 2
    assert held[0] == held[1]  # each process has seen batches, and so ranges, of its own


@pytest.mark.slow
def test_shared_out_encoders_train_to_the_weights_of_copies(sweeps: dict[str, Path]) -> None:
    copies, shared = (sweeps[name] / "0" for name in ("spawned", "shared"))
    for run in (copies, shared):
        assert (run / "last.ckpt").is_file()
    ours, theirs = (load_file(run / "release" / "model.safetensors") for run in (shared, copies))
    assert ours.keys() == theirs.keys()
    for name, value in ours.items():
        torch.testing.assert_close(value, theirs[name], rtol=1e-4, atol=1e-5, msg=name)
    numbers = [json.loads((run / "results.json").read_text())["metrics"]["test"] for run in (copies, shared)]
    assert numbers[0]
    assert len(numbers[0]) == len(numbers[1])


@pytest.mark.parametrize(
    ("settings", "reason"),
    [
        (
            (
                "objective=[privileged_attribution]",
                "objectives.pal.layer=encoder.model.layer3",
                "objectives.pal.task=au",
                "task=[au,landmarks]",
            ),
            "differentiates twice",
        ),
        (("callbacks=[default,ema]",), "averages whole weights"),
        (("callbacks=[default,qat]",), "replaces weights"),
        (("compile.encoder=true",), "never tried"),
        (("trainer.sync_batchnorm=true",), "no effect"),
        (("trainer.precision=16-mixed",), "precision='16-mixed'"),
    ],
)
def test_what_does_not_go_with_shared_out_encoders_is_refused(
    tiny_run: Callable[..., DictConfig], settings: tuple[str, ...], reason: str
) -> None:
    with pytest.raises(ConfigError, match=reason) as caught:
        train.run(tiny_run("trainer=fsdp", "trainer.accelerator=cpu", "trainer.devices=1", *settings))
    assert "\n" not in str(caught.value)


def test_strategies_that_write_parts_of_weights_are_refused(tiny_run: Callable[..., DictConfig]) -> None:
    trainer: Any = SimpleNamespace(strategy=ModelParallelStrategy())
    with pytest.raises(ConfigError, match=r"parts of weights; use trainer=fsdp"):
        check_sharing(tiny_run(), None, trainer)  # type: ignore[arg-type]


def test_encoders_without_weights_are_not_shared_out(tiny_run: Callable[..., DictConfig]) -> None:
    """Those of DeCaFA, say, whose networks work on pixels."""
    trainer: Any = SimpleNamespace(strategy=FullyShardedStrategy(), callbacks=[])
    module: Any = SimpleNamespace(
        objectives={}, quantization=None, encoder_modules=lambda: iter([("encoder", torch.nn.Identity())])
    )
    with pytest.raises(ConfigError, match="no encoder with weights to share out"):
        check_sharing(tiny_run("trainer=fsdp"), module, trainer)
