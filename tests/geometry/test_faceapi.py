# SPDX-License-Identifier: Apache-2.0
"""The packaged networks: weights, detection, votes and crops."""

from __future__ import annotations

import importlib
import json
import shutil
from importlib import resources

import numpy as np
import pytest
import torch

from affect import labels
from affect.errors import DataError
from affect.geometry import faceapi
from affect.geometry.alignment import CropRecipe

skimage = pytest.importorskip("skimage.data")


@pytest.fixture(scope="module")
def astronaut():
    return skimage.astronaut()


def test_every_byte_of_the_weight_files_is_used():
    folder = resources.files("affect.geometry") / "weights"
    for name in ("tiny_face_detector", "face_landmark_68", "face_expression"):
        arrays = faceapi._read_weights(name)
        manifest = json.loads((folder / f"{name}_model-weights_manifest.json").read_text())
        quantised = {w["name"]: "quantization" in w for group in manifest for w in group["weights"]}
        used = sum(array.size * (1 if quantised[key] else 4) for key, array in arrays.items())
        assert used == len((folder / f"{name}_model.bin").read_bytes())
        assert sum(p.numel() for p in faceapi.network(name).parameters()) == sum(a.size for a in arrays.values())


def test_licence_and_origin_travel_with_the_weights():
    folder = resources.files("affect.geometry") / "weights"
    assert "MIT License" in (folder / "LICENSE").read_text()
    origin = (folder / "README.md").read_text()
    assert faceapi.ORIGIN.removeprefix("npm ") in origin
    assert all(digest in origin for digest in faceapi._SHA256.values())


def test_a_damaged_weight_file_is_named(tmp_path, monkeypatch):
    copied = shutil.copytree(resources.files("affect.geometry") / "weights", tmp_path / "weights")
    raw = bytearray((copied / "face_expression_model.bin").read_bytes())
    raw[1000] ^= 1
    (copied / "face_expression_model.bin").write_bytes(bytes(raw))
    monkeypatch.setattr(faceapi.resources, "files", lambda _: tmp_path)
    with pytest.raises(DataError, match=r"face_expression_model\.bin is damaged"):
        faceapi._read_weights("face_expression")


@pytest.mark.parametrize("size", [160, 224, 416])
def test_detector_grid_covers_the_input(size):
    """416 pixels give 13 cells of 32 pixels, whatever the convolutions do at the edges."""
    boxes = faceapi.network("tiny_face_detector")(torch.zeros(2, 3, size, size))
    assert boxes.shape == (2, (size // 32) ** 2 * 5, 5)
    assert (boxes[..., 4] < 0.1).all()


def test_box_of_the_astronaut_at_the_networks_own_size(astronaut):
    best = faceapi.candidates([astronaut], 416)[0][0]
    np.testing.assert_allclose(best[:4], [163, 76, 279, 186], atol=3)
    assert best[4] > 0.95


def test_batches_and_padding_give_the_boxes_of_single_images(astronaut):
    images = [astronaut, astronaut[:256, 100:356], np.zeros((90, 40, 3), np.uint8)]
    together = faceapi.candidates(images, 320)
    for image, found in zip(images, together, strict=True):
        np.testing.assert_allclose(found, faceapi.candidates([image], 320)[0], atol=1e-3)
    assert len(together[2]) == 0
    plain, padded = together[0][0], faceapi.candidates([astronaut], 608, padding=0.25)[0][0]
    np.testing.assert_allclose((plain[:2] + plain[2:4]) / 2, (padded[:2] + padded[2:4]) / 2, atol=6)


class TestVote:
    FACE = np.array([10.0, 10, 50, 50])

    def scale(self, *scored):
        return np.array([[*box, score] for box, score in scored]).reshape(-1, 5)

    def test_two_sizes_that_agree_make_one_face(self):
        found = faceapi.vote([self.scale((self.FACE, 0.8)), self.scale((self.FACE + 4, 0.6), (self.FACE - 2, 0.4))])
        assert len(found) == 1
        assert found[0, 4] == pytest.approx(0.7)
        weights = np.array([0.64, 0.36, 0.16])
        np.testing.assert_allclose(found[0, :4], self.FACE + (weights * [0, 4, -2]).sum() / weights.sum())

    def test_one_size_alone_gets_half(self):
        found = faceapi.vote([self.scale((self.FACE, 0.9)), self.scale()])
        assert found[0, 4] == pytest.approx(0.45)
        assert faceapi.vote([self.scale((self.FACE, 0.9)), self.scale()], agreement=1)[0, 4] == pytest.approx(0.9)

    def test_faces_apart_stay_apart_and_the_surest_is_first(self):
        scales = [self.scale((self.FACE, 0.5), (self.FACE + 100, 0.9))] * 2
        found = faceapi.vote(scales)
        assert found[:, 4].tolist() == [0.9, 0.5]
        np.testing.assert_allclose(found[0, :4], self.FACE + 100)

    def test_nothing(self):
        assert faceapi.vote([self.scale(), self.scale()]).shape == (0, 5)
        assert faceapi.vote([]).shape == (0, 5)

    def test_intersection_over_union(self):
        a, b = np.array([[0.0, 0, 2, 2], [0, 0, 0, 0]]), np.array([[1.0, 1, 3, 3], [0, 0, 2, 2], [5, 5, 6, 6]])
        np.testing.assert_allclose(faceapi.overlaps(a, b), [[1 / 7, 1, 0], [0, 0, 0]])


def test_crops_are_what_the_recipe_cuts(astronaut):
    recipe = CropRecipe(kind="box", size=112, margin=0, border="replicate")
    matrices = recipe.matrices(boxes=[[163, 76, 279, 186], [-30, -30, 50, 60]])
    crops = faceapi.cut([astronaut, astronaut], matrices)
    assert crops.shape == (2, 112, 112, 3)
    np.testing.assert_array_equal(crops[0], recipe.crop(astronaut, matrices[0]))
    np.testing.assert_array_equal(crops[1], recipe.crop(astronaut, matrices[1]))


def test_expression_of_the_astronaut(astronaut):
    crops = faceapi.cut([astronaut], CropRecipe(kind="box", size=112, margin=0.1).matrices(boxes=[[163, 76, 279, 186]]))
    probability = faceapi.expressions_in_crops(crops)
    assert probability.shape == (1, 7)
    assert probability.sum() == pytest.approx(1)
    assert probability[0, faceapi.EXPRESSIONS.index(labels.HAPPINESS)] > 0.99


def test_networks_are_read_once_and_never_trained():
    network = faceapi.network("face_landmark_68")
    assert network is faceapi.network("face_landmark_68")
    assert not network.training
    assert not any(parameter.requires_grad for parameter in network.parameters())


def test_import_has_no_side_effect_on_random_state():
    torch.manual_seed(3)
    before = torch.random.get_rng_state()
    importlib.reload(faceapi)
    assert torch.equal(before, torch.random.get_rng_state())
