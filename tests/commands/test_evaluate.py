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
from affect.release import read_release
from affect.tasks import Expression
from tests.commands.test_predict import release  # noqa: F401 - a fixture

Compose = Callable[..., DictConfig]
SETTINGS = ("data.num_workers=0", "bootstrap.resamples=20", "prepare=similarity", "protocol=default")


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
    overrides = ("data.limit=3", "+protocol.test=2")
    given = evaluate.data_settings(compose("evaluate", f"checkpoint={plain_release}", *overrides), loaded, [])
    assert (given.data.limit, given.protocol.test, given.protocol.f1_empty) == (3, 2, 0.5)
    part = compose("evaluate", f"checkpoint={plain_release}", "+dataset.root=here")
    with pytest.raises(ConfigError, match=r"dataset.root: name the dataset too \(dataset=<name>\)"):
        evaluate.data_settings(part, loaded, [])
    with pytest.raises(ConfigError, match=r"no dataset is chosen here; choose one too: dataset=<name>"):
        compose("evaluate", f"checkpoint={plain_release}", "dataset.root=here")


def test_a_run_folder_of_a_stranger_runs_nothing(compose: Compose, plain_release: Path, tmp_path: Path) -> None:
    target = "affect.commands.run_folder.os.system"
    store_run(plain_release, read={"_target_": target, "command": f"touch {tmp_path / 'ran'}"})
    with pytest.raises(CheckpointError, match=r"dataset.read._target_=.*not on the list"):
        evaluate.run(compose("evaluate", f"checkpoint={plain_release}"))
    assert not (tmp_path / "ran").exists()
