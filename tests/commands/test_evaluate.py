# SPDX-License-Identifier: Apache-2.0
"""Evaluation on a run's own data and on a table of the user: parts, settings, trust, and what the results tell."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path

import cv2
import numpy as np
import pytest
from omegaconf import DictConfig, OmegaConf

from affect.commands import evaluate
from affect.data.table import FaceTable
from affect.errors import CheckpointError, ConfigError
from affect.geometry import CropRecipe
from affect.release import read_release
from affect.tasks import Expression
from tests.commands.test_predict import release  # noqa: F401 - a fixture

Compose = Callable[..., DictConfig]
SETTINGS = ("data.num_workers=0", "bootstrap.resamples=20", "protocol=default")


@pytest.fixture
def user(tmp_path: Path) -> Path:
    """Return a folder of six images and a table that has labels of one task only."""
    generator = np.random.default_rng(0)
    names = [f"{index}.png" for index in range(6)]
    for name in names:
        cv2.imwrite(str(tmp_path / name), generator.integers(0, 256, (40, 40, 3), np.uint8))
    columns = {"image": names, "au01_occurrence": [0.0, 1.0] * 3, "au02_occurrence": [0.0] * 6}
    FaceTable.from_columns(columns, tmp_path).to_csv(tmp_path / "mine.csv")
    FaceTable.from_columns({**columns, "part": ["train", "test"] * 3}, tmp_path).to_csv(tmp_path / "split.csv")
    return tmp_path


@pytest.fixture
def plain_release(release: Path, tmp_path: Path) -> Path:  # noqa: F811
    """Return a run's folder with a release that takes images as they are."""
    import shutil

    folder = tmp_path / "run" / "release"
    shutil.copytree(release, folder)
    preprocess = json.loads((folder / "preprocess.json").read_text()) | {"recipe": None}
    (folder / "preprocess.json").write_text(json.dumps(preprocess))
    return folder.parent


def evaluated(compose: Compose, run: Path, table: Path, *more: str) -> dict:
    dataset = ("dataset=table", f"dataset.table={table}", *SETTINGS)
    evaluate.run(compose("evaluate", f"checkpoint={run}", *dataset, *more))
    part = next(p for p in ("all", "test") if (run / "evaluate" / f"table-{table.stem}-{p}").is_dir())
    return json.loads((run / "evaluate" / f"table-{table.stem}-{part}" / "results.json").read_text())


def test_a_table_with_labels_of_one_task_is_evaluated_whole(
    compose: Compose, plain_release: Path, user: Path, capsys: pytest.CaptureFixture
) -> None:
    found = evaluated(compose, plain_release, user / "mine.csv")
    assert found["part"] == "all"
    assert {record["task"] for record in found["metrics"]["all"]} == {"au"}
    assert found["tasks_left_out"] == ["landmarks", "valence_arousal"]
    assert len(found["sha256"]) == 64
    assert found["bootstrap"] == {"resamples": 20, "level": 0.95}
    assert found["dataset_config"]["read"]["table"] == str(user / "mine.csv")
    assert found["selection"] is None
    assert len(found["label_source"]) == 1
    assert found["seconds"] > 0
    assert "part all: 6 rows of 6, 6 groups" in capsys.readouterr().out


def test_an_official_test_part_is_the_default(compose: Compose, plain_release: Path, user: Path) -> None:
    found = evaluated(compose, plain_release, user / "split.csv")
    assert found["part"] == "test"
    assert found["data"]["parts"]["test"]["rows"] == 3


def test_the_protocols_empty_f1_reaches_the_metric(compose: Compose, plain_release: Path, user: Path) -> None:
    found = evaluated(compose, plain_release, user / "mine.csv", "protocol.f1_empty=1.0")
    assert found["protocol"]["f1_empty"] == 1.0
    config = compose("evaluate", "checkpoint=x", "protocol=default", "protocol.f1_empty=1.0")
    from affect.metrics import F1

    task = Expression(classes=["happiness", "sadness"], metrics={"f1": F1()})
    evaluate.score_empty_outputs({"expression": task}, config.protocol.f1_empty)
    assert task.metrics[0].empty == 1.0


def store_run(run: Path, **dataset: object) -> None:
    node = {"name": "table", "table": "x.csv", "read": {"_target_": "affect.data.layouts.table.read"}, **dataset}
    protocol = {"test": None, "folds": 5, "f1_empty": 0.5}
    OmegaConf.save({"dataset": node, "protocol": protocol, "data": {"limit": 8}}, run / "config.yaml")


def test_the_command_line_wins_over_the_run(compose: Compose, plain_release: Path) -> None:
    store_run(plain_release)
    loaded = read_release(plain_release)
    stored = evaluate.data_settings(compose("evaluate", f"checkpoint={plain_release}"), loaded, [])
    assert (stored.data.limit, stored.protocol.test, stored.protocol.f1_empty) == (8, None, 0.5)
    lifted = evaluate.data_settings(compose("evaluate", f"checkpoint={plain_release}", "data.limit=all"), loaded, [])
    assert lifted.data.limit is None
    overrides = ("data.limit=3", "protocol.test=2")
    given = evaluate.data_settings(compose("evaluate", f"checkpoint={plain_release}", *overrides), loaded, [])
    assert (given.data.limit, given.protocol.test, given.protocol.f1_empty) == (3, 2, 0.5)


def test_a_key_of_the_runs_own_dataset_can_be_given_alone(compose: Compose, plain_release: Path) -> None:
    read = {"_target_": "affect.data.layouts.table.read", "table": "x.csv", "root": "/old"}
    store_run(plain_release, root="/old", read=read, group="subject")
    loaded = read_release(plain_release)

    def settings(*overrides: str) -> DictConfig:
        return evaluate.data_settings(
            compose("evaluate", f"checkpoint={plain_release}", *overrides), loaded, []
        ).dataset

    moved = settings("dataset.root=/new place")
    assert (moved.root, moved.read.root, moved.read.table, moved.group) == (
        "/new place",
        "/new place",
        "x.csv",
        "subject",
    )
    assert settings("+dataset.root=/new").read.root == "/new"
    with pytest.raises(ConfigError, match=r"dataset has no key 'rot'; did you mean root"):
        settings("dataset.rot=/new")
    # One of several tables, whose neighbour stays.
    both = {"one": {"root": "/old", "read": read}, "two": {"root": "/old", "read": read}}
    store_run(plain_release, read=None, sources=both)
    moved = settings("dataset.sources.one.root=/new").sources
    assert (moved.one.read.root, moved.two.read.root) == ("/new", "/old")
    (plain_release / "config.yaml").unlink()
    with pytest.raises(ConfigError, match="is a release without its run: name a dataset"):
        settings("dataset.root=/new")


def test_photographs_are_cropped_as_the_checkpoints_were_and_delivered_crops_as_delivered(
    compose: Compose,
    release: Path,  # noqa: F811
) -> None:
    loaded = read_release(release)
    trained = CropRecipe.read(loaded.preprocess["recipe"])

    def crops(given: bool, cropped: bool, *overrides: str) -> tuple[CropRecipe | None, list[str]]:
        line = ("dataset=table", "dataset.table=x.csv", "protocol=default", *overrides)
        settings = evaluate.data_settings(compose("evaluate", f"checkpoint={release}", *line), loaded, [])
        settings.dataset.cropped = cropped
        return evaluate.crop_recipe(settings, loaded, None, given)

    assert crops(False, False) == (trained, [])
    assert crops(False, False, "prepare=box") == (trained, [])
    recipe, notes = crops(False, True, "prepare=none")
    assert (recipe.kind, recipe.size) == ("none", trained.size)
    assert len(notes) == 1
    assert f"kind none, not {trained.kind}" in notes[0]
    assert "margin 0.0, not" in notes[0]
    recipe, notes = crops(True, False, "prepare=box")
    assert recipe.kind == "box"
    assert notes
    assert crops(True, False, f"prepare={trained.kind}", f"prepare.margin={trained.margin}")[1] == []


def test_a_run_folder_of_a_stranger_runs_nothing(compose: Compose, plain_release: Path, tmp_path: Path) -> None:
    target = "affect.commands.run_folder.os.system"
    store_run(plain_release, read={"_target_": target, "command": f"touch {tmp_path / 'ran'}"})
    with pytest.raises(CheckpointError, match=r"dataset.read._target_=.*not on the list"):
        evaluate.run(compose("evaluate", f"checkpoint={plain_release}"))
    assert not (tmp_path / "ran").exists()
