# SPDX-License-Identifier: Apache-2.0
"""``affect benchmark predict``: every row reads the same video; stages add up to no more than the whole."""

from __future__ import annotations

from pathlib import Path

import pytest

from affect.commands.benchmarks import predict
from affect.data.video import VideoFile
from affect.geometry import FaceApiFinder

pytest.importorskip("skimage.data")


def test_the_video_shows_a_face_that_moves(tmp_path: Path) -> None:
    frames = list(VideoFile(predict.write_video(tmp_path, 30)).frames())
    assert len(frames) == 30
    finder = FaceApiFinder(sizes=(160, 224), agreement=1)
    boxes = [finder.find(frames[k].image)[0].box for k in (0, 25)]
    assert abs(boxes[0] - boxes[1]).max() > 5


def test_stages_are_those_of_one_run(tmp_path: Path) -> None:
    video = predict.write_video(tmp_path, 6)
    measured = predict.ours(video, predict.make_predictor(quick=True), FaceApiFinder(sizes=(160, 224), agreement=1), 3)
    assert measured["frames"] == measured["faces"] == 6
    assert set(measured["stages"]) == set(predict.STAGES)
    assert 0.5 * measured["seconds"] < sum(measured["stages"].values()) <= measured["seconds"]
    row = predict._row("x", measured)
    assert row["faces/s"] == pytest.approx(6 / measured["seconds"])
    assert row["detect, ms/frame"] == pytest.approx(1000 * measured["stages"]["detect"] / 6)


@pytest.mark.slow
def test_the_model_alone_is_measured_in_each_form() -> None:
    rows = predict.model_alone(predict.make_predictor(quick=True), rounds=1)
    assert rows[0]["what"] == "model alone: torch float"
    assert all(row["faces/s"] > 0 for row in rows if row["faces/s"] is not None)
    assert all(list(row) == list(rows[0]) for row in rows)
    pytest.importorskip("onnxscript")
    assert [row["what"] for row in rows[1:]] == ["model alone: ONNX float", "model alone: ONNX int8"]


@pytest.mark.slow
def test_every_row_has_the_same_columns() -> None:
    rows = predict.measure(quick=True)
    assert all(list(row) == list(rows[0]) for row in rows)
    ends = [row for row in rows if row["what"].startswith("affect predict")]
    assert len({row["faces"] for row in ends}) == 1, "every row reads the same video"
