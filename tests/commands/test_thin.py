# SPDX-License-Identifier: Apache-2.0
"""THIN by whole runs: the exogenous run, the gated one on top of it, its release without any file of the first."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from pathlib import Path

import cv2
import numpy as np
import pytest
import torch
from omegaconf import DictConfig

from affect.commands import train
from affect.data.batch import FaceBatch
from affect.data.table import FaceTable
from affect.errors import ConfigError, DataError
from affect.release import build_model, build_tasks, read_release

ENCODER = ("encoder=plain_convolutions", "encoder.image_size=24", "encoder.widths=[4,6]")
YAW = (
    "task.exogenous.column=pose_yaw",
    "task.exogenous.bins=[-30,-10,10,30]",
)
BOTH = ("task=[expression,exogenous]", *YAW, "model=thin", "model.experts=4", "model.hidden=[8]")
STAGE1 = ("task=[exogenous]", *YAW, "model=exogenous", "model.hidden=[5]")


@pytest.fixture
def run(compose: Callable[..., DictConfig], tmp_path: Path) -> Callable[..., Path]:
    def make(*overrides: str, output: str, figures: bool = False) -> Path:
        from tests.conftest import SMALL

        own = ("encoder", "dataset") if "dataset=table" in overrides else ("encoder",)
        kept = [o for o in SMALL if not o.startswith(own)]
        paths = (f"paths.output={tmp_path / output}", f"paths.cache={tmp_path / 'cache'}", f"figures={figures}")
        train.run(compose("train", *kept, *ENCODER, *paths, *overrides))
        return tmp_path / output

    return make


def results(folder: Path) -> dict:
    return json.loads((folder / "results.json").read_text())


def predict(release: Path, batch: FaceBatch) -> dict[str, torch.Tensor]:
    found = read_release(release)
    return build_model(found, build_tasks(found)).predict_step(batch)


def test_two_stages_and_a_release_that_needs_neither(run: Callable[..., Path], tmp_path: Path) -> None:
    first = run(*STAGE1, output="first")
    assert results(first)["labels"] == {"exogenous": ["-30 to -10", "-10 to 10", "10 to 30"]}
    stage2 = (*BOTH, "model.exogenous.classes=3", "model.exogenous.hidden=[5]", f"model.exogenous.weights={first}")
    second = run(*stage2, output="second", figures=True)
    found = results(second)
    assert found["labels"]["expression"]
    assert found["initial_weights"]["encoder"]["exogenous.encoder"].startswith("exogenous run first, sha256 ")
    assert found["initial_weights"]["encoder"]["encoder"] == found["initial_weights"]["encoder"]["exogenous.encoder"]
    assert {"dispelling", "reads", "probe", "gate"} <= found["findings"].keys()
    assert len(found["findings"]["gate"]["usage"][0]) == 4
    assert (second / "figures" / "gate_usage.png").is_file()
    assert any("train/dispelling/loss" in epoch for epoch in found["history"])

    stage_1 = build_model(release := read_release(first), build_tasks(release))
    stage_2 = build_model(release := read_release(second), build_tasks(release))
    for name, value in stage_1.encoder.state_dict().items():
        assert torch.equal(value, stage_2.exogenous.encoder.state_dict()[name]), name
    for name, value in stage_1.phi.state_dict().items():
        assert torch.equal(value, stage_2.exogenous.head.state_dict()[name]), name

    batch = FaceBatch(torch.randint(0, 256, (3, 3, 24, 24), dtype=torch.uint8), {}, {})
    before = predict(second, batch)
    shutil.copytree(second / "release", tmp_path / "copy")
    shutil.rmtree(first)
    shutil.rmtree(second)
    after = predict(tmp_path / "copy", batch)
    assert all(torch.equal(before[name], after[name]) for name in before)
    assert str(tmp_path) not in (tmp_path / "copy" / "config.yaml").read_text()


def test_what_is_missing_is_said(run: Callable[..., Path], tmp_path: Path) -> None:
    given = (*BOTH, "model.exogenous.classes=3")
    with pytest.raises(ConfigError, match=r"model\.exogenous\.weights: name the folder"):
        run(*given, output="a")
    with pytest.raises(ConfigError, match="write the number of classes"):
        run(*BOTH, output="b")
    with pytest.raises(ConfigError, match=r"needs task\.<name>\.column"):
        run("task=[exogenous]", "model=exogenous", output="c")
    one = ("task=[exogenous]", "model=exogenous", "task.exogenous.column=pose_yaw", "task.exogenous.bins=[-90,90,180]")
    with pytest.raises(DataError, match="all training labels are -90 to 90; at least two classes are needed"):
        run(*one, output="d")


@pytest.mark.slow
def test_the_controls_run(run: Callable[..., Path]) -> None:
    given = (*BOTH, "model.exogenous.classes=3", "model.exogenous.random=true", "model.dispelling=0")
    for name, extra in {
        "oracle": ("model.gate=oracle",),
        "shuffled": ("model.shuffled=true", "model.reads=penultimate"),
    }.items():
        found = results(run(*given, *extra, output=name))
        assert found["findings"]["gate"]["usage"]


@pytest.mark.parametrize("rung", ["thin_single", "thin_mean", "thin_endogenous"])
def test_rungs_need_no_exogenous_run(run: Callable[..., Path], rung: str) -> None:
    found = results(run("task=[expression]", f"model={rung}", "model.hidden=[8]", output=rung))
    assert found["metrics"]["test"]


def cohort(folder: Path, parts: dict[str, str]) -> str:
    """Write noise with labels of named people, four images each; return the override that takes it."""
    folder.mkdir()
    random = np.random.default_rng(0)
    who = [name for name in parts for _ in range(4)]
    names = [f"{k:02d}.png" for k in range(len(who))]
    for name in names:
        cv2.imwrite(str(folder / name), random.integers(0, 256, (24, 24, 3), np.uint8))
    columns = {
        "image": names,
        "subject": who,
        "part": [parts[name] for name in who],
        "expression": [("happiness", "sadness")[k % 2] for k in range(len(who))],
        "pose_yaw": np.tile(np.float32([-20, 0, 20, 5]), len(parts)),
    }
    FaceTable.from_columns(columns, folder, {"dataset": "cohort", "people": "cohort"}).save(folder / "labels.arrow")
    return f"dataset.table={folder / 'labels.arrow'}"


def test_people_of_the_exogenous_run_are_no_test_and_stay_known(run: Callable[..., Path], tmp_path: Path) -> None:
    given = ("dataset=table", "prepare=none", "data.limit=null")
    parts = {"ada": "train", "bea": "train", "cyd": "train", "dan": "train", "eva": "test"}
    first = run(*STAGE1, *given, cohort(tmp_path / "one", parts), output="first")
    assert results(first)["people"] == {"cohort": ["ada", "bea", "cyd", "dan"]}
    other = cohort(tmp_path / "two", {"fay": "train", "gil": "train", "hal": "train", "ada": "test"})
    second = (*BOTH, *given, other, "model.exogenous.classes=3", "model.exogenous.hidden=[5]")
    by_file = f"model.exogenous.weights={first / 'release' / 'model.safetensors'}"
    told = r"model\.exogenous\.weights=.*trained on 1 people of cohort among these rows: ada; .*allow_leak"
    for weights in (f"model.exogenous.weights={first}", by_file):
        with pytest.raises(DataError, match=told):
            run(*second, weights, output="second")
    assert not (tmp_path / "second" / "last.ckpt").exists()
    allowed = results(run(*second, by_file, "protocol.allow_leak=true", output="second"))
    assert ["ada" in leak for leak in allowed["data"]["leaks"]] == [True]
    assert set(allowed["people"]["cohort"]) == {"ada", "bea", "cyd", "dan", "fay", "gil", "hal"}


@pytest.mark.slow
def test_another_exogenous_run_in_the_same_folder_makes_another_run(run: Callable[..., Path], tmp_path: Path) -> None:
    first = run(*STAGE1, output="first")
    stage2 = (*BOTH, "model.exogenous.classes=3", "model.exogenous.hidden=[5]", f"model.exogenous.weights={first}")
    second = run(*stage2, output="second")
    held = json.loads((second / "data.json").read_text())
    assert list(held["model.exogenous.weights"]) == [str(first)]
    assert held["init"] == {}
    run(*STAGE1, "seed=5", output="other")
    shutil.rmtree(first)
    shutil.move(tmp_path / "other", first)
    with pytest.raises(ConfigError, match=r"holds a run on other data \(model\.exogenous\.weights .*force=true"):
        run(*stage2, output="second")
