# SPDX-License-Identifier: Apache-2.0
"""Thresholds are those of the validation part, and are named; smoothing stays within a video and its gaps."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
from omegaconf import DictConfig

from affect.commands import decisions, evaluate, train
from affect.commands.configuration import compose
from affect.data.images import Source
from affect.data.table import FaceTable
from affect.errors import CheckpointError, ConfigError
from affect.metrics import F1, BinaryRates
from affect.report import provenance
from affect.tasks import AUOccurrence
from tests.conftest import SMALL

TINY = ("task=[au]", "dataset.aus=[1,4,12,25]", "data.limit=40", "bootstrap.resamples=0")


def by_hand(values: np.ndarray, sequence: np.ndarray, frame: np.ndarray, counts: np.ndarray, window: int) -> np.ndarray:
    found = values.copy()
    for row in range(len(values)):
        low, high = frame[row] - (window - 1) // 2, frame[row] + window // 2
        near = (sequence == sequence[row]) & (frame >= low) & (frame <= high) & counts
        if sequence[row] >= 0 and near.any():
            found[row] = values[near].mean(0)
    return found


@pytest.mark.parametrize("window", [2, 3, 6, 15])
def test_the_average_is_over_near_frames_of_the_same_video(window: int) -> None:
    random = np.random.default_rng(window)
    sequence = np.repeat([3, 0, -1, 7, 1], 40)
    frame = np.concatenate([np.sort(random.choice(90, 40, replace=False)) for _ in range(5)])
    mixed = random.permutation(200)
    sequence, frame, counts = sequence[mixed], frame[mixed], random.random(200) < 0.7
    values = random.random((200, 3))
    smooth = decisions.moving_average(values, sequence, frame, counts, window)
    np.testing.assert_allclose(smooth, by_hand(values, sequence, frame, counts, window), atol=1e-12)
    assert not np.allclose(smooth, values)
    np.testing.assert_array_equal(smooth[sequence < 0], values[sequence < 0])


def test_a_gap_is_not_bridged_and_a_frame_without_a_face_takes_from_its_neighbours() -> None:
    frame, counts = np.array([1, 2, 3, 50, 51]), np.array([True, False, True, True, True])
    values = np.array([[0.0], [0.9], [1.0], [0.2], [0.4]])
    smooth = decisions.moving_average(values, np.zeros(5, int), frame, counts, 3)
    np.testing.assert_allclose(smooth[:, 0], [0.0, 0.5, 1.0, 0.3, 0.3])
    alone = decisions.moving_average(values, np.zeros(5, int), frame, np.zeros(5, bool), 3)
    np.testing.assert_array_equal(alone, values)


def test_a_million_frames_take_a_moment() -> None:
    import time

    count = 1_000_000
    values = np.random.default_rng(0).random((count, 12), np.float32)
    start = time.process_time()
    rows = np.arange(count)
    decisions.moving_average(values, rows // 4500, rows % 4500, np.ones(count, bool), 15)
    assert time.process_time() - start < 10


class _NoImages:
    def read(self, rows: np.ndarray) -> list[np.ndarray]:
        raise AssertionError("images are not needed")


def videos(**more: object) -> Source:
    columns = {
        "image": [f"{k}.png" for k in range(8)],
        "sequence": ["a"] * 4 + ["b"] * 3 + [None],
        "frame": [1, 2, 3, 4, 1, 2, 3, 9],
        "au01_occurrence": [0.0, 1.0] * 4,
        "face": ["found", "found", "centre", "found", "found", "found", "found", "found"],
    }
    return Source("videos", FaceTable.from_columns({**columns, **more}, ".", {"dataset": "videos"}), _NoImages())


def test_predictions_are_smoothed_by_sequence_and_frame_of_their_source() -> None:
    task = AUOccurrence([1])
    rows = np.array([3, 2, 1, 0, 4, 6, 7])
    values = {"au": np.array([[0.4], [0.9], [0.2], [0.0], [0.6], [0.8], [0.7]], np.float32)}
    notes = decisions.smooth_values(values, [videos()], {"au": task}, np.zeros(7, int), rows, 3)
    assert notes == []
    assert values["au"].dtype == np.float32
    np.testing.assert_allclose(values["au"][:, 0], [0.4, 0.3, 0.1, 0.1, 0.6, 0.8, 0.7], atol=1e-6)


def test_smoothing_needs_videos() -> None:
    table = FaceTable.from_columns({"image": ["a", "b"], "au01_occurrence": [0.0, 1.0]}, ".", {"dataset": "x"})
    source = Source("photos", table, _NoImages())
    arguments = ({"au": AUOccurrence([1])}, np.zeros(2, int), np.arange(2))
    with pytest.raises(ConfigError, match="no row belongs to a video"):
        decisions.smooth_values({"au": np.zeros((2, 1))}, [source], *arguments, 5)
    assert decisions.smooth_values({"au": np.zeros((2, 1))}, [source], *arguments, 0) == []
    for window in (-1, 2.5, True, "5"):
        with pytest.raises(ConfigError, match="smoothing="):
            decisions.check_window(window)


def test_an_output_without_positives_keeps_the_threshold_of_its_metric() -> None:
    task = AUOccurrence([1, 2, 4], metrics=[F1(0.4), BinaryRates(0.4)])
    columns = {
        "image": ["a", "b", "c", "d"],
        "au01_occurrence": [0.1, 0.2, 0.7, 0.8], "target_au01_occurrence": [0.0, 1.0, 1.0, 1.0],
        "au02_occurrence": [0.9, 0.2, 0.7, 0.8], "target_au02_occurrence": [0.0, 0.0, 0.0, None],
        "au04_occurrence": [0.9, 0.2, 0.7, 0.8], "target_au04_occurrence": [None] * 4,
    }  # fmt: skip
    table = FaceTable.from_columns(columns, ".", {"dataset": "x"})
    found = decisions.tune(table, {"au": task})
    assert found == {"au": {"AU1": pytest.approx(0.15), "AU2": 0.4, "AU4": 0.4}}
    decisions.apply({"au": task}, found)
    assert all(metric.threshold == tuple(found["au"].values()) for metric in task.metrics)
    values = np.array([[0.2, 0.3, 0.5], [0.1, 0.6, 0.1]])
    assert decisions.decide(task, values, found["au"]).tolist() == [[True, False, True], [False, True, False]]
    assert decisions.decide(task, values).tolist() == [[False, False, True], [False, True, False]]
    with pytest.raises(CheckpointError, match="none for AU4"):
        decisions.decide(task, values, {"AU1": 0.1, "AU2": 0.1})
    with pytest.raises(CheckpointError, match="none for AU2"):
        decisions.apply({"au": task}, {"au": {"AU1": 0.3}})


@pytest.fixture(scope="module")
def tuned(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Return the folder of a finished run with tuned thresholds."""
    folder = tmp_path_factory.mktemp("tuned")
    paths = (f"paths.output={folder / 'run'}", f"paths.cache={folder / 'cache'}")
    train.run(compose("train", [*SMALL, *TINY, *paths, "thresholds=tuned"]))
    return folder / "run"


def read(path: Path) -> dict:
    return json.loads((path / "results.json").read_text())


def test_thresholds_are_those_of_the_validation_predictions_and_decide_every_number(tuned: Path) -> None:
    found = read(tuned)
    table = FaceTable.read_parquet(tuned / "predictions" / "validation.parquet")
    task = AUOccurrence([1, 4, 12, 25], metrics=[F1()])
    assert found["thresholds"]["values"] == decisions.tune(table, {"au": task})
    assert found["thresholds"]["rule"] == "tuned"
    assert found["thresholds"]["rows"] == len(table)
    assert f"thresholds tuned per output on {len(table)} validation rows" in provenance(found)
    decisions.apply({"au": task}, found["thresholds"]["values"])
    truth = FaceTable.read_parquet(tuned / "predictions" / "test.parquet")
    values = task.read_values(truth)
    limits = np.array(task.metrics[0].threshold, np.float32)
    target = np.stack([truth.truth().numbers(f"au{au:02d}_occurrence")[0] for au in (1, 4, 12, 25)], 1) >= 0.5
    predicted = values >= limits
    hits = (predicted & target).sum(0)
    expected = 2 * hits / np.maximum(predicted.sum(0) + target.sum(0), 1)
    scores = {record["name"]: record["value"] for record in found["metrics"]["test"]}
    np.testing.assert_allclose([scores[f"f1/{name}"] for name in task.outputs], expected)
    assert json.loads((tuned / "release" / "preprocess.json").read_text())["thresholds"] == found["thresholds"]
    assert "thresholds tuned per output" in (tuned / "release" / "README.md").read_text()


def test_evaluation_decides_at_the_checkpoints_thresholds_unless_told_otherwise(tuned: Path, tmp_path: Path) -> None:
    given = (f"checkpoint={tuned}", "part=test", "bootstrap.resamples=0", "data.num_workers=0")
    evaluate.run(compose("evaluate", [*given, f"out={tmp_path / 'own'}"]))
    evaluate.run(compose("evaluate", [*given, f"out={tmp_path / 'fixed'}", "thresholds=fixed"]))
    own, fixed = read(tmp_path / "own"), read(tmp_path / "fixed")
    names = ("name", "value")
    trained = [[record[key] for key in names] for record in read(tuned)["metrics"]["test"]]
    assert [[record[key] for key in names] for record in own["metrics"]["test"]] == trained
    assert own["thresholds"] == read(tuned)["thresholds"]
    assert set(fixed["thresholds"]["values"]["au"].values()) == {0.5}
    assert "threshold 0.5" in provenance(fixed)
    score = [next(r["value"] for r in found["metrics"]["test"] if r["name"] == "f1/mean") for found in (own, fixed)]
    assert score[0] != score[1]


def test_asking_a_finished_run_for_other_intervals_keeps_its_thresholds(tuned: Path, tmp_path: Path) -> None:
    shutil.copytree(tuned, tmp_path / "run")
    config = compose("train", [*SMALL, *TINY, f"paths.output={tmp_path / 'run'}", "thresholds=tuned"])
    before = read(tmp_path / "run")
    config.bootstrap.resamples = 10
    after = train.evaluate_as_asked(config, tmp_path / "run", read(tmp_path / "run"))
    values = [[record["value"] for record in found["metrics"]["test"]] for found in (before, after)]
    assert values[0] == values[1]


def test_damaged_thresholds_are_refused(tuned: Path, tmp_path: Path) -> None:
    shutil.copytree(tuned / "release", tmp_path / "release")
    path = tmp_path / "release" / "preprocess.json"
    stored = json.loads(path.read_text())
    stored["thresholds"]["values"]["au"]["AU1"] = 7
    path.write_text(json.dumps(stored))
    with pytest.raises(CheckpointError, match="thresholds must hold a rule and a number"):
        evaluate.run(compose("evaluate", [f"checkpoint={tmp_path / 'release'}", "dataset=faces", "protocol=default"]))


@pytest.mark.parametrize(
    ("overrides", "message"),
    [
        (("thresholds=best",), "thresholds=best: "),
        (("thresholds=tuned", "selection=best_on_test"), "would tune on the test part"),
        (("thresholds=tuned", "selection=last", "protocol.validation_fraction=0"), "needs a validation part"),
        (("thresholds=tuned", "task=[valence_arousal]"), "no task has a metric with a threshold"),
        (("smoothing=-3",), "smoothing=-3: give the window in frames"),
    ],
)
def test_what_cannot_be_is_refused_before_training(
    tiny_run: Callable[..., DictConfig], overrides: tuple[str, ...], message: str
) -> None:
    config = tiny_run(*overrides)
    with pytest.raises(ConfigError, match=message):
        train.run(config)
    assert not (Path(config.paths.output) / "last.ckpt").exists()


@pytest.mark.slow
def test_a_refit_decides_at_the_thresholds_of_the_run_that_chose_its_epochs(
    tiny_run: Callable[..., DictConfig],
) -> None:
    config = tiny_run(*TINY, "thresholds=tuned", "selection=refit")
    train.run(config)
    output = Path(config.paths.output)
    found, chosen = read(output), read(output / "selection")
    assert found["thresholds"]["values"] == chosen["thresholds"]["values"]
    assert "by the run that chose the epochs" in provenance(found)
