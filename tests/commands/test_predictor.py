# SPDX-License-Identifier: Apache-2.0
"""How faces of new photographs are cropped: upright ones by their points, as in training, whatever their boxes are."""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence
from pathlib import Path

import numpy as np
import pytest
import torch

from affect.commands import predictor as reading
from affect.commands.landmarks import landmark_provider
from affect.commands.predictor import face_crops, open_predictor, points_in_crops, prediction_recipe, read_faces
from affect.errors import CheckpointError
from affect.geometry import CropRecipe, FaceObservation, transform_points
from affect.geometry.providers import coarser_points, mean_face
from affect.geometry.templates import FACE_68, WFLW_TO_68
from affect.release import read_release
from tests.commands.test_landmarks import MEAN, SIZE, write_model

POINTS = MEAN * 40 + [12.0, 7.0]
"""A face in a photograph: the one that the model of these tests sees everywhere."""

PIXELS = MEAN * SIZE - 0.5


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_model(tmp_path_factory.mktemp("model"))


def seen(box: Sequence[float] | np.ndarray, points: np.ndarray = POINTS, scheme: str = "68") -> FaceObservation:
    return FaceObservation(np.array(box, float), 0.9, points, scheme)


def test_points_decide_upright_crops_and_boxes_do_not(model: Path) -> None:
    predictor = open_predictor(model, device="cpu")
    tight = [*POINTS.min(0), *POINTS.max(0)]
    usable, matrices = face_crops(predictor, [seen(tight), seen([0, 0, 90, 70]), seen([5, 5, 5, 5])])
    assert usable.all()
    for matrix in matrices:
        np.testing.assert_allclose(transform_points(matrix, POINTS), PIXELS, atol=1e-9)
    np.testing.assert_allclose(landmark_provider(read_release(model))._crops(POINTS[None])[1], matrices[:1])
    # The model says the mean face of every crop, which in the photograph is this very face.
    read = read_faces(predictor, [np.zeros((64, 64, 3), np.uint8)], [seen([0, 0, 90, 70])])
    np.testing.assert_allclose(read.values["landmarks_68"][0], POINTS, atol=1e-3)


def test_a_face_whose_points_are_in_one_place_is_cropped_by_its_box(model: Path) -> None:
    predictor = open_predictor(model, device="cpu")
    nowhere = np.full((68, 2), 9.0)
    box = np.array([10.0, 20, 40, 50])
    usable, matrices = face_crops(predictor, [seen([5, 5, 5, 5], nowhere), seen(box, nowhere), seen(box)])
    assert usable.tolist() == [False, True, True]
    np.testing.assert_allclose(matrices[0], predictor.recipe.matrix(box=box))
    assert not np.allclose(matrices[0], matrices[1])
    assert face_crops(predictor, [])[1].shape == (0, 2, 3)


@pytest.mark.parametrize(("known", "given"), [("68", "98"), ("98", "68"), ("98", "5"), ("5", "68"), ("68", "5")])
def test_finders_and_models_may_have_other_schemes(
    known: str, given: str, model: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def as_scheme(points: np.ndarray, scheme: str) -> np.ndarray:
        if scheme == "98":
            fine = np.zeros((98, 2))
            fine[list(WFLW_TO_68)] = points
            return fine
        found = coarser_points(points, "68", scheme)
        assert found is not None
        return found

    loaded = read_release(model)
    points = {known: as_scheme(MEAN, known).tolist()}
    described = dataclasses.replace(loaded, preprocess={**loaded.preprocess, "points": points})
    monkeypatch.setattr(reading, "open_checkpoint", lambda *_: described)
    predictor = open_predictor(model, device="cpu")
    _, matrices = face_crops(predictor, [seen([0, 0, 90, 70], as_scheme(POINTS, given), given)])
    np.testing.assert_allclose(transform_points(matrices[0], POINTS), PIXELS, atol=1e-9)


def test_boxes_decide_where_the_checkpoint_says_nothing_of_points(model: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    loaded = read_release(model)
    kept = {key: value for key, value in loaded.preprocess.items() if key != "points"}
    monkeypatch.setattr(reading, "open_checkpoint", lambda *_: dataclasses.replace(loaded, preprocess=kept))
    predictor = open_predictor(model, device="cpu")
    assert not predictor.typical
    _, matrices = face_crops(predictor, [seen([0, 0, 90, 70])])
    np.testing.assert_allclose(matrices[0], predictor.recipe.matrix(box=[0, 0, 90, 70]))


def test_values_that_are_not_finite_are_refused(model: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    predictor = open_predictor(model, device="cpu")
    assert isinstance(predictor, reading.CheckpointPredictor)
    crops = np.zeros((2, SIZE, SIZE, 3), np.uint8)
    assert predictor.predict(crops)
    monkeypatch.setattr(predictor.module, "predict_step", lambda _: {"points": torch.tensor([[0.5], [torch.nan]])})
    with pytest.raises(CheckpointError, match=r"preprocess\.json: the model's values of points are not finite"):
        predictor.predict(crops)


def test_aligned_crops_follow_from_their_recipe_alone() -> None:
    aligned = {"recipe": CropRecipe(size=32).describe(), "image_size": 32, "points": {"68": MEAN.tolist()}}
    assert points_in_crops(aligned) == {}
    delivered = {"recipe": CropRecipe(kind="none", size=32).describe(), "image_size": 32, "points": aligned["points"]}
    assert prediction_recipe(delivered).kind == "box"
    np.testing.assert_allclose(points_in_crops(delivered)["68"], PIXELS)


def test_coarser_points_are_those_that_finer_ones_hold() -> None:
    fine = np.random.default_rng(0).random((3, 98, 2))
    middle = coarser_points(fine, "98", "68")
    assert middle is not None
    np.testing.assert_array_equal(middle, fine[:, list(WFLW_TO_68)])
    five, direct = coarser_points(middle, "68", "5"), coarser_points(fine, "98", "5")
    assert five is not None
    assert direct is not None
    np.testing.assert_array_equal(five, direct)
    np.testing.assert_allclose(five[:, 0], middle[:, 36:42].mean(1))
    np.testing.assert_allclose(five[:, 2:], middle[:, [30, 48, 54]])
    assert coarser_points(five, "5", "68") is None
    assert coarser_points(middle, "68", "98") is None
    index, mean = mean_face("5") or (None, None)
    np.testing.assert_array_equal(index, np.arange(5))
    np.testing.assert_array_equal(mean, coarser_points(np.asarray(FACE_68), "68", "5"))
