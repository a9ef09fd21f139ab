# SPDX-License-Identifier: Apache-2.0
"""Similarities, matrices, warping and crop recipes."""

from __future__ import annotations

import dataclasses
import json

import numpy as np
import pytest
from skimage.transform import SimilarityTransform

from affect import labels
from affect.errors import ConfigError, DataError
from affect.geometry import alignment
from affect.geometry.alignment import CropRecipe, compose, flip_matrix, invert, similarity, transform_points, warp
from affect.geometry.templates import FACE_68, WFLW_TO_68

RNG = np.random.default_rng(0)


def rotation(degrees, scale=1.0, shift=(0.0, 0.0)):
    c, s = scale * np.cos(np.radians(degrees)), scale * np.sin(np.radians(degrees))
    return np.array([[c, -s, shift[0]], [s, c, shift[1]]])


def centre_of_mass(image):
    mass = image.astype(float)
    grid_y, grid_x = np.mgrid[: image.shape[0], : image.shape[1]]
    return np.array([(mass * grid_x).sum(), (mass * grid_y).sum()]) / mass.sum()


class TestSimilarity:
    def test_finds_the_exact_matrix_of_a_batch(self):
        source = RNG.normal(size=(5, 7, 2)) * 40
        truth = np.stack(
            [rotation(d, s, (d, -s)) for d, s in zip((-170, -20, 0, 45, 90), (0.1, 1, 3, 2, 9), strict=True)]
        )
        found = similarity(source, transform_points(truth, source))
        assert found.shape == (5, 2, 3)
        np.testing.assert_allclose(found, truth, atol=1e-9)

    def test_agrees_with_scikit_image_on_noisy_points(self):
        source, target = RNG.normal(size=(20, 2)) * 30, RNG.normal(size=(20, 2)) * 30
        reference = SimilarityTransform.from_estimate(source, target)
        np.testing.assert_allclose(similarity(source, target), reference.params[:2], atol=1e-9)

    def test_is_a_minimum(self):
        source = RNG.normal(size=(9, 2))
        target, weights = RNG.normal(size=(9, 2)), RNG.uniform(0.1, 1, 9)
        best = similarity(source, target, weights)

        def cost(matrix):
            return (weights * ((transform_points(matrix, source) - target) ** 2).sum(1)).sum()

        for _ in range(50):
            other = compose(rotation(RNG.normal(), 1 + 0.01 * RNG.normal(), RNG.normal(size=2) * 0.01), best)
            assert cost(other) > cost(best)

    def test_never_reflects(self):
        source = RNG.normal(size=(9, 2))
        matrix = similarity(source, source * [-1, 1])
        assert np.linalg.det(matrix[:, :2]) > 0

    def test_masked_points_do_not_count_even_if_they_are_nan(self):
        source = RNG.normal(size=(6, 2))
        target = transform_points(rotation(30, 2), source)
        dirty, mask = source.copy(), np.ones(6, bool)
        dirty[[1, 4]], mask[[1, 4]] = np.nan, False
        np.testing.assert_allclose(similarity(dirty, target, mask), rotation(30, 2), atol=1e-9)

    def test_broadcasts_one_template_over_a_batch(self):
        assert similarity(RNG.normal(size=(3, 4, 8, 2)), RNG.normal(size=(8, 2))).shape == (3, 4, 2, 3)

    @pytest.mark.parametrize(
        ("source", "weights"),
        [
            ([[1, 1], [1, 1]], None),
            ([[0, 0], [1, 1]], [1, 0]),
            ([[0, np.nan], [1, 1]], None),
            ([[900.1, 3], [900.1, 3]], None),
        ],
    )
    def test_degenerate_points_are_refused(self, source, weights):
        with pytest.raises(DataError, match="distinct"):
            similarity(source, [[0, 0], [1, 1]], weights)

    def test_counts_must_agree(self):
        with pytest.raises(DataError, match="3, 2"):
            similarity(np.ones((3, 2)), np.ones((2, 2)))


class TestMatrices:
    def test_inverse_and_composition(self):
        matrices = RNG.normal(size=(4, 2, 3))
        points = RNG.normal(size=(4, 10, 2)) * 100
        np.testing.assert_allclose(
            transform_points(invert(matrices), transform_points(matrices, points)), points, atol=1e-6
        )
        other = RNG.normal(size=(2, 3))
        np.testing.assert_allclose(
            transform_points(compose(matrices, other), points),
            transform_points(matrices, transform_points(other, points)),
            atol=1e-9,
        )

    def test_singular_matrix(self):
        with pytest.raises(DataError, match="inverse"):
            invert(np.zeros((2, 3)))

    def test_flip_is_its_own_inverse_and_moves_pixels(self):
        image = RNG.integers(0, 255, (5, 8, 3), dtype=np.uint8)
        np.testing.assert_array_equal(warp(image, flip_matrix(8), (5, 8)), image[:, ::-1])
        np.testing.assert_allclose(compose(flip_matrix(8), flip_matrix(8)), rotation(0), atol=1e-12)

    def test_scale(self):
        np.testing.assert_allclose(alignment.scale_of([rotation(33, 2.5), flip_matrix(9)]), [2.5, 1])


class TestWarp:
    def test_integer_shift_is_exact(self):
        image = RNG.integers(0, 255, (20, 30, 3), dtype=np.uint8)
        moved = warp(image, rotation(0, 1, (3, 2)), (20, 30))
        np.testing.assert_array_equal(moved[2:, 3:], image[:-2, :-3])
        assert (moved[:2] == 0).all()

    @pytest.mark.parametrize("interpolation", ["linear", "cubic", "lanczos"])
    @pytest.mark.parametrize("antialias", [True, False])
    @pytest.mark.parametrize(
        "matrix", [rotation(0, 1, (0.25, -0.6)), rotation(25, 1.7, (4, 9)), rotation(-70, 0.9, (8, 60))]
    )
    def test_a_bright_spot_moves_as_points_do(self, matrix, interpolation, antialias):
        image = np.zeros((64, 64), np.float32)
        image[29:32, 33:36] = 200
        warped = warp(image, matrix, 120, interpolation=interpolation, antialias=antialias)
        expected = transform_points(matrix, [[34.0, 30.0]])[0]
        # OpenCV's cubic kernel (a = -0.75) does not keep the centre of mass exactly; the others do.
        np.testing.assert_allclose(centre_of_mass(warped), expected, atol=0.05 if interpolation == "cubic" else 0.02)

    @pytest.mark.parametrize("scale", [0.5, 0.34, 0.2, 0.13])
    def test_shrinking_averages_and_keeps_positions(self, scale):
        image = np.zeros((201, 203), np.float32)
        image[85:99, 105:119] = 200
        matrix = rotation(20, scale, (10, 3))
        warped = warp(image, matrix, 96)
        expected = transform_points(matrix, [[111.5, 91.5]])[0]
        np.testing.assert_allclose(centre_of_mass(warped), expected, atol=0.06)
        # The spot's energy survives: a sampled warp would miss or double it.
        assert warped.sum() == pytest.approx(200 * 14 * 14 * scale**2, rel=0.05)

    def test_shrinking_suppresses_what_the_crop_cannot_show(self):
        stripes = np.tile(np.array([[0, 255]], np.uint8), (128, 64))
        matrix = rotation(0, 0.22, (0, 0))
        assert warp(stripes, matrix, 24)[4:-4, 4:-4].std() < 10
        assert warp(stripes, matrix, 24, antialias=False)[4:-4, 4:-4].std() > 50

    def test_only_the_needed_part_matters(self):
        image = RNG.integers(0, 255, (400, 500, 3), dtype=np.uint8)
        matrix = compose(rotation(0, 0.25), rotation(0, 1, (-200, -100)))
        part = warp(image[80:320, 180:420], compose(matrix, rotation(0, 1, (180, 80))), 32)
        whole = warp(image, matrix, 32)
        np.testing.assert_allclose(part.astype(int), whole.astype(int), atol=2)

    @pytest.mark.parametrize("scale", [1.0, 0.2])
    def test_borders(self, scale):
        image = np.full((60, 60), 100, np.uint8)
        matrix = rotation(0, scale, (30, 30))
        assert warp(image, matrix, 90, "constant")[0, 0] == 0
        assert warp(image, matrix, 90, "replicate")[0, 0] == 100
        assert warp(image, matrix, 90, "reflect")[0, 0] == 100

    def test_a_crop_outside_the_image_is_border(self):
        assert (warp(np.full((50, 50, 3), 9, np.uint8), rotation(0, 0.3, (500, 500)), 20) == 0).all()


def faces(count=4, scheme="68"):
    """The mean face at random places, sizes and angles."""
    matrices = np.stack(
        [rotation(RNG.uniform(-40, 40), RNG.uniform(30, 300), RNG.uniform(0, 200, 2)) for _ in range(count)]
    )
    points = transform_points(matrices, FACE_68)
    if scheme == "98":
        wide = np.full((count, 98, 2), np.nan)
        wide[:, list(WFLW_TO_68)] = points
        return wide
    if scheme == "49":
        return points[:, [k for k in range(17, 68) if k not in (60, 64)]]
    if scheme == "5":
        return np.stack([points[:, list(group)].mean(1) for group in labels.POINTS_68_TO_5], 1)
    return points


class TestTemplate:
    def test_is_symmetric_and_fills_the_unit_square(self):
        mirrored = FACE_68[list(labels.SCHEMES["68"].swap)] * [-1, 1] + [1, 0]
        np.testing.assert_allclose(mirrored, FACE_68, atol=1e-4)
        low, high = FACE_68.min(0), FACE_68.max(0)
        assert (high - low).max() == pytest.approx(1)
        np.testing.assert_allclose((low + high) / 2, 0.5, atol=1e-3)

    def test_has_a_face_the_right_way_up(self):
        centres = [FACE_68[list(group)].mean(0) for group in labels.POINTS_68_TO_5]
        left_eye, right_eye, nose, left_mouth, right_mouth = centres
        assert left_eye[0] < nose[0] < right_eye[0]
        assert left_mouth[0] < nose[0] < right_mouth[0]
        assert left_eye[1] < nose[1] < left_mouth[1] < FACE_68[8, 1]

    def test_mean_shape_recovers_a_shape_and_its_symmetry(self):
        shapes = faces(20)
        mean = alignment.mean_shape(shapes, labels.SCHEMES["68"].swap)
        back = transform_points(similarity(mean, FACE_68), mean)
        np.testing.assert_allclose(back, FACE_68, atol=1e-3)
        np.testing.assert_allclose(mean[list(labels.SCHEMES["68"].swap)] * [-1, 1], mean, atol=1e-9)

    def test_wflw_indices_are_distinct_and_mirror_alike(self):
        assert len(set(WFLW_TO_68)) == 68
        swap_68, swap_98 = labels.SCHEMES["68"].swap, labels.SCHEMES["98"].swap
        assert [WFLW_TO_68[swap_68[k]] for k in range(68)] == [swap_98[WFLW_TO_68[k]] for k in range(68)]


class TestRecipe:
    @pytest.mark.parametrize("scheme", ["68", "98", "49", "5"])
    @pytest.mark.parametrize("points", ["inner_51", "inner_49", "eyes_mouth_5", "eyes_2"])
    def test_every_scheme_lands_on_the_mean_face(self, scheme, points):
        recipe = CropRecipe(points=points, size=128, margin=0.25)
        given = faces(4, scheme)
        if scheme == "5" and points.startswith("inner"):
            with pytest.raises(DataError, match="eyes_mouth_5"):
                recipe.matrices(given)
            return
        found = transform_points(recipe.matrices(given), given)
        if scheme == "68":
            expected = (FACE_68 + 0.25) / 1.5 * 128 - 0.5
            np.testing.assert_allclose(found, np.broadcast_to(expected, found.shape), atol=1e-4)
        eyes = labels.SCHEMES[scheme]
        left = np.nanmean(found[:, list(eyes.left_eye)], 1) if scheme != "98" else found[:, [60]].mean(1)
        right = np.nanmean(found[:, list(eyes.right_eye)], 1) if scheme != "98" else found[:, [72]].mean(1)
        np.testing.assert_allclose(left[:, 1], right[:, 1], atol=1e-6)  # upright
        np.testing.assert_allclose((left + right)[:, 0] / 2, 63.5, atol=1e-6)  # centred

    def test_margin_zero_fills_the_crop_from_edge_to_edge(self):
        crop = CropRecipe(size=100, margin=0).matrix(FACE_68 * 37)
        jaw = transform_points(crop, FACE_68 * 37)[[0, 16], 0]
        np.testing.assert_allclose(jaw, [-0.5, 99.5], atol=1e-6)

    def test_box_keeps_centre_and_longer_side(self):
        recipe = CropRecipe(kind="box", size=64, margin=0.5)
        matrices = recipe.matrices(boxes=[[10, 20, 30, 60], [0, 0, 4, 2]])
        np.testing.assert_allclose(transform_points(matrices, [[[20, 40]], [[2, 1]]])[:, 0], 31.5)
        np.testing.assert_allclose(alignment.scale_of(matrices), [64 / 80, 64 / 8])

    def test_whole_image_keeps_everything_and_its_shape(self):
        recipe = CropRecipe(kind="none", size=100, margin=0)
        matrix = recipe.matrix(image_size=(50, 25))
        np.testing.assert_allclose(transform_points(matrix, [[-0.5, -0.5], [24.5, 49.5]]), [[24.5, -0.5], [74.5, 99.5]])
        image = RNG.integers(0, 255, (100, 100, 3), dtype=np.uint8)
        np.testing.assert_array_equal(recipe.crop(image, recipe.matrix(image_size=(100, 100))), image)

    def test_missing_points_are_left_out(self):
        recipe = CropRecipe()
        given = faces(3)
        dirty, valid = given.copy(), np.ones((3, 68), bool)
        dirty[1, 40:], valid[1, 40:] = -999, False
        np.testing.assert_allclose(recipe.matrices(dirty, valid=valid), recipe.matrices(given), atol=1e-6)

    def test_rows_without_landmarks_are_named_and_can_be_found(self):
        recipe = CropRecipe()
        given = faces(4)
        given[2], given[3] = np.nan, 0
        assert recipe.usable(given).tolist() == [True, True, False, False]
        with pytest.raises(DataError, match=r"2 of 4 images have no usable landmarks \(first: row 2\)"):
            recipe.matrices(given)

    def test_rows_without_a_box(self):
        boxes = [[0, 0, 5, 5], [0, 0, 0, 0], [0, 0, np.nan, 4]]
        recipe = CropRecipe(kind="box")
        assert recipe.usable(boxes=boxes).tolist() == [True, False, False]
        with pytest.raises(DataError, match="2 of 3 images have no usable box"):
            recipe.matrices(boxes=boxes)

    @pytest.mark.parametrize(("kind", "word"), [("similarity", "landmarks"), ("box", "box"), ("none", "height")])
    def test_what_is_missing_is_said(self, kind, word):
        with pytest.raises(DataError, match=word):
            CropRecipe(kind=kind).matrices()

    def test_unknown_number_of_points(self):
        with pytest.raises(DataError, match="21 points"):
            CropRecipe().matrices(np.zeros((2, 21, 2)))

    @pytest.mark.parametrize(
        ("arguments", "match"),
        [
            ({"kind": "boks"}, "did you mean box"),
            ({"points": "inner51"}, "inner_51"),
            ({"border": "black"}, "constant"),
            ({"interpolation": "area"}, "known|mean"),
            ({"size": 0}, "size"),
            ({"size": 12.5}, "size"),
            ({"margin": -0.5}, "margin"),
        ],
    )
    def test_wrong_values_are_refused_by_name(self, arguments, match):
        with pytest.raises(ConfigError, match=match):
            CropRecipe(**arguments)

    def test_description_round_trip(self):
        recipe = CropRecipe(name="x", kind="box", size=96, margin=0.3)
        described = json.loads(json.dumps(recipe.describe()))
        assert CropRecipe.read(described) == recipe
        assert CropRecipe.read(CropRecipe().describe()) == CropRecipe()
        with pytest.raises(ConfigError, match="did you mean margin"):
            CropRecipe.read({"margn": 0.2})
        with pytest.raises(ConfigError, match="mean face"):
            CropRecipe.read({"template": "other"})

    def test_hash_follows_pixels_and_not_the_name(self):
        base = CropRecipe()
        assert dataclasses.replace(base, name="other").hash == base.hash
        changes = {
            "kind": "box",
            "size": 112,
            "margin": 0.21,
            "points": "eyes_2",
            "interpolation": "cubic",
            "border": "reflect",
            "antialias": False,
            "detector": "mediapipe",
            "provider": "mediapipe",
            "stored": 256,
        }
        hashes = {dataclasses.replace(base, **{key: value}).hash for key, value in changes.items()}
        assert len(hashes | {base.hash}) == len(changes) + 1
        assert set(changes) | {"name", "window"} == {field.name for field in dataclasses.fields(base)}
        stored = dataclasses.replace(base, stored=256)
        assert dataclasses.replace(stored, window=224).hash != stored.hash

    def test_a_recipe_that_crops_while_loading_is_described_as_before_there_were_stored_crops(self):
        assert CropRecipe().hash == "cfd929d2170e"
        assert not {"stored", "window"} & set(CropRecipe().describe())
        stored = CropRecipe(stored=256, window=224)
        assert CropRecipe.read(stored.describe()) == stored

    @pytest.mark.parametrize("window", [0, 176])
    def test_a_stored_crop_and_its_window_are_one_recipe_from_the_photograph(self, window):
        recipe = CropRecipe(size=112, margin=0.1243, stored=200, window=window)
        given = transform_points(rotation(12, 50, (20, 30)), FACE_68)
        on_disk, seen = recipe.storage(), recipe.loading()
        assert (on_disk.size, on_disk.margin, seen.kind, seen.size) == (200, 0.1243, "none", 112)
        two = compose(seen.matrix(image_size=(200, 200)), on_disk.matrix(given))
        np.testing.assert_allclose(two, recipe.composed().matrix(given), atol=1e-9)
        centre = transform_points(seen.matrix(image_size=(200, 200)), [[99.5, 99.5]])
        np.testing.assert_allclose(centre, [[55.5, 55.5]])
        assert recipe.composed(64).size == recipe.loading(64).size == 64
        assert dataclasses.replace(recipe, window=100).storage() == on_disk

    def test_stored_crops_that_cannot_be(self):
        with pytest.raises(ConfigError, match="window=224 must lie inside the stored crop"):
            CropRecipe(stored=200, window=224)
        with pytest.raises(ConfigError, match=r"recipe.stored=-1 must be a whole number"):
            CropRecipe(stored=-1)
        with pytest.raises(ConfigError, match="stored=0"):
            CropRecipe().storage()
        assert CropRecipe(size=96).composed() == CropRecipe(size=96)

    def test_flip_of_image_and_points_gives_the_mirrored_crop(self):
        image = RNG.integers(0, 255, (120, 90, 3), dtype=np.uint8)
        given = transform_points(rotation(12, 50, (20, 30)), FACE_68)
        swap = list(labels.SCHEMES["68"].swap)
        mirrored = transform_points(flip_matrix(90), given)[swap]
        recipe = CropRecipe(size=64)
        plain = recipe.crop(image, recipe.matrix(given))
        flipped = recipe.crop(image[:, ::-1].copy(), recipe.matrix(mirrored))
        assert np.abs(plain[:, ::-1].astype(int) - flipped).mean() < 3  # the mean face is symmetric to 1e-4
