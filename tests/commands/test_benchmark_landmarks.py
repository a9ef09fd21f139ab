# SPDX-License-Identifier: Apache-2.0
"""The benchmark of landmark providers: the same faces for all, points that are compared where they mean the same."""

from __future__ import annotations

import json
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest

from affect import labels
from affect.commands.benchmarks import landmarks
from affect.commands.main import main
from affect.geometry import LandmarkProvider, faceapi
from affect.geometry.templates import FACE_68, WFLW_TO_68
from affect.release import read_release
from tests.commands.test_landmarks import write_model

pytest.importorskip("face_alignment")


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_model(tmp_path_factory.mktemp("model"))


def test_every_provider_gets_the_same_faces(monkeypatch: pytest.MonkeyPatch, model: Path) -> None:
    given = {}

    class Spy:
        passes = 1

        def __init__(self, name: str) -> None:
            self.name = name

        def landmarks_many(self, images: list, boxes: np.ndarray) -> None:
            given.setdefault(self.name, []).append((np.stack(images), boxes))

    times = iter([0.0, 9.0, 9.0, 18.0, 20.0, 20.5, 30.0, 32.0])
    names = (landmarks.PACKAGED, "other")
    monkeypatch.setattr(landmarks, "contenders", lambda quick, release: {name: (Spy(name), 10**6) for name in names})
    monkeypatch.setattr(landmarks, "time", SimpleNamespace(perf_counter=lambda: next(times)))
    packaged, other = landmarks.measure(quick=True)
    assert (packaged["faces/s"], other["faces/s"]) == (4.0, 1.0)
    assert (packaged["ratio to the packaged one"], other["ratio to the packaged one"]) == (1.0, 0.25)
    assert other["million parameters"] == 1.0
    (first, boxes), (second, same) = given[names[0]][0], given[names[1]][1]
    np.testing.assert_array_equal(first, second)
    np.testing.assert_array_equal(boxes, same)
    assert (boxes[:, :2] >= 0).all()
    assert (boxes[:, 2:] > boxes[:, :2]).all()


def test_contenders_find_points_and_are_the_networks_of_the_experiments(model: Path) -> None:
    found = landmarks.contenders(True, read_release(model))
    images, boxes = landmarks._drawn(2, 96)
    for name, (provider, parameters) in found.items():
        assert isinstance(provider, LandmarkProvider), name
        assert parameters > 1000
        assert provider.landmarks_many(images, boxes).shape == (2, 68, 2), name
    assert "face-alignment's FAN-1, 1 pass" in found
    assert any(str(model) in name for name in found)
    sides = {landmarks.untrained(name).encoder.image_size for name in ("decafa_faces", "decafa_300w")}
    assert 128 in sides


def test_contenders_have_the_same_conditions(model: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """As many faces at once for all, and in each pass a crop of the face, whatever random weights say."""
    counts, batches = [], {}
    run = faceapi.FaceCropNet.forward
    monkeypatch.setattr(faceapi.FaceCropNet, "forward", lambda net, x: counts.append(len(x)) or run(net, x))
    found = landmarks.contenders(True, read_release(model))
    images, boxes = landmarks._drawn(5, 96)
    for name, (provider, _) in found.items():
        if name == landmarks.PACKAGED:
            provider.landmarks_many(images, boxes)
            assert counts == [4, 1] * 2
            continue
        seen, predict = [], provider.predict  # type: ignore[attr-defined]
        provider.predict = lambda crops, seen=seen, predict=predict: seen.append(crops) or predict(crops)  # type: ignore[attr-defined]
        provider.landmarks_many(images, boxes)
        batches[name] = [len(crops) for crops in seen]
        assert batches[name] == [4, 1] * provider.passes  # type: ignore[attr-defined]
        if name == "DeCaFA of decafa_faces, 2 passes":
            first, second = np.concatenate(seen[:2]).astype(float), np.concatenate(seen[2:]).astype(float)
            assert np.abs(first - second).mean() < 1, "the second pass sees the face too, not a speck of it"
    assert len(batches) == 4


def test_points_are_compared_where_schemes_mean_the_same() -> None:
    theirs = FACE_68 * 100
    between = np.linalg.norm(theirs[36] - theirs[45])
    moved = theirs + np.array([3.0, 4.0])
    moved[:17] += 1000  # jaw lines differ
    assert landmarks.point_distance(moved, "68", theirs) == pytest.approx(5 / between)
    fine = np.zeros((98, 2))
    fine[list(WFLW_TO_68)] = moved
    assert landmarks.point_distance(fine, "98", theirs) == pytest.approx(5 / between)
    five = np.stack([moved[list(group)].mean(0) for group in labels.POINTS_68_TO_5])
    assert landmarks.point_distance(five, "5", theirs) == pytest.approx(5 / between)
    for scheme, points, count in (("68", moved, 68), ("98", fine, 68), ("5", five, 5)):
        first, second = landmarks.common_points(points, scheme, theirs)
        assert first.shape == second.shape == (count, 2)


def test_photographs_are_compared_and_drawn(model: Path, tmp_path: Path, capsys: pytest.CaptureFixture) -> None:
    pytest.importorskip("skimage")
    out = tmp_path / "found" / "photographs.json"
    assert main(["benchmark", "photographs", f"checkpoint={model}", "quick=true", f"out={out}"]) == 0
    rows = json.loads(out.read_text())["rows"]
    assert rows[0]["photographs"] == "astronaut"
    assert rows[0]["found"] == "1 of 1"
    # The model says the mean face of every box: not the face, but near to it.
    assert 1 < rows[0]["distance, mean %"] < 40
    assert rows[0]["distance, mean %"] == rows[0]["median %"]
    assert {path.name for path in out.parent.glob("*.png")} == {"landmarks_photographs.png", "landmarks_astronaut.png"}


def test_what_is_missing_or_not_needed_is_said(model: Path, capsys: pytest.CaptureFixture) -> None:
    for words, message in (
        (["benchmark", "photographs"], "checkpoint=<folder of a run or of a release>"),
        (["benchmark", "faces", f"checkpoint={model}"], "benchmark faces takes no checkpoint"),
        (["benchmark", "landmark"], "landmarks"),
        (["benchmark", "photographs", "checkpoint=nowhere"], "no such folder"),
    ):
        assert main(words) == 2
        assert message in " ".join(capsys.readouterr().err.split())
