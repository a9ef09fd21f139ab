# SPDX-License-Identifier: Apache-2.0
"""Crop, mirroring, jitter, colour and occlusion: pixels and points move alike; draws follow from the sample alone."""

from __future__ import annotations

import os
import pickle

import cv2
import numpy as np
import pytest
from omegaconf import OmegaConf

from affect import labels
from affect.commands.configuration import config_directory
from affect.data.transforms import FaceTransform, Moved, mirrors, sample_keys, swap_mirrored, uniforms
from affect.errors import ConfigError
from affect.geometry.alignment import CropRecipe, transform_points
from tests.data import samples

CONF = config_directory()
SIZE = 96
MATRIX = CropRecipe(kind="none", size=SIZE, margin=0.0).matrix(image_size=(200, 200))
BRIGHT = {"_target_": "albumentations.RandomBrightnessContrast", "p": 0.5}
OCCLUDE = {
    "_target_": "albumentations.CoarseDropout",
    "num_holes_range": [1, 1],
    "hole_height_range": [0.2, 0.3],
    "hole_width_range": [0.2, 0.3],
    "p": 1.0,
}


def dotted(point, size=200):
    """Return a black image with a soft white dot whose centre of mass is ``point``."""
    y, x = np.mgrid[:size, :size]
    image = 255 * np.exp(-((x - point[0]) ** 2 + (y - point[1]) ** 2) / (2 * 3.0**2))
    return np.repeat(image[..., None], 3, -1).astype(np.uint8)


def centre(image):
    weights = np.maximum(image[..., 0] - np.median(image[..., 0]) - 5.0, 0)  # colour may lift the background
    y, x = np.mgrid[: image.shape[0], : image.shape[1]]
    return np.array([(x * weights).sum(), (y * weights).sum()]) / weights.sum()


ALIGNMENT = OmegaConf.to_container(OmegaConf.load(CONF / "transform" / "alignment.yaml"))["train"]
"""What ``transform=alignment`` trains with."""

MOVING = {
    "alignment": {key: ALIGNMENT[key] for key in ("flip", "rotation", "scale", "shift")},
    "own": {"flip": 0.5, "rotation": 25, "scale": 0.2, "shift": 0.1},
    "flip": {"flip": 1.0},
    "library flip": {"augment": [{"_target_": "albumentations.HorizontalFlip", "p": 0.5}]},
    "library affine": {
        "rotation": 10,
        "flip": 0.5,
        "augment": [
            BRIGHT,
            {"_target_": "albumentations.Affine", "rotate": [-20, 20], "translate_percent": [-0.1, 0.1], "p": 1.0},
            {"_target_": "albumentations.HorizontalFlip", "p": 0.5},
        ],
    },
}


@pytest.mark.parametrize("arguments", MOVING.values(), ids=MOVING.keys())
def test_a_dot_at_a_landmark_stays_at_the_landmark(arguments):
    """Draw a dot at one landmark, transform, and find it where that landmark, under its swapped index, went."""
    transform = FaceTransform(SIZE, **arguments)
    points = samples.points_68(0, 1, size=200)[0]
    swap = labels.SCHEMES["68"].swap
    flips = 0
    for row, index in enumerate((36, 45, 48, 54, 30, 8) * 3):
        moved = transform(dotted(points[index]), MATRIX, {"68": points}, seed=1, epoch=0, source=0, row=row)
        flips += moved.flipped
        now = swap[index] if moved.flipped else index
        np.testing.assert_allclose(centre(moved.image), moved.points["68"][now], atol=0.35)
        expected = transform_points(moved.matrix, points)
        np.testing.assert_allclose(moved.points["68"], expected[list(swap)] if moved.flipped else expected, atol=1e-3)
        assert moved.flipped == mirrors(moved.matrix)
    assert flips > 0
    assert flips < 18 or arguments.get("flip") == 1.0


@pytest.mark.parametrize("scheme", list(labels.SCHEMES))
def test_occlusion_colour_and_blur_leave_the_points_of_every_scheme(scheme):
    """Under the same draw points are where the bare motion puts them, also those that are covered or outside."""
    count = labels.SCHEMES[scheme].points
    points = np.random.default_rng(count).uniform(-30, 230, (count, 2))
    image = samples.smooth_image(0, 200, 200)
    full = FaceTransform(SIZE, **ALIGNMENT)
    bare = FaceTransform(SIZE, **{key: ALIGNMENT[key] for key in ("flip", "rotation", "scale", "shift")})
    changed = outside = 0
    for row in range(12):
        one, other = (each(image, MATRIX, {scheme: points}, seed=1, row=row) for each in (full, bare))
        np.testing.assert_array_equal(one.points[scheme], other.points[scheme])
        np.testing.assert_array_equal(one.matrix, other.matrix)
        changed += not np.array_equal(one.image, other.image)
        outside += (one.points[scheme] < 0).any() or (one.points[scheme] > SIZE - 1).any()
    assert changed > 6
    assert outside > 6


def test_points_far_outside_move_like_all_others():
    far = np.array([[-1e6, 4e5], [3e5, -2e6], [0, 0], [199, 199], [100, 1e7]])
    for row in range(6):
        moved = FaceTransform(SIZE, **ALIGNMENT)(samples.smooth_image(0, 200, 200), MATRIX, {"5": far}, seed=2, row=row)
        expected = transform_points(moved.matrix, far)
        swap = list(labels.SCHEMES["5"].swap)
        np.testing.assert_allclose(moved.points["5"], expected[swap] if moved.flipped else expected, rtol=1e-9)


def test_without_augmentation_it_is_the_recipe():
    recipe = CropRecipe(kind="none", size=SIZE, margin=0.0)
    image = samples.smooth_image(0, 200, 200)
    moved = FaceTransform(SIZE)(image, MATRIX, {"5": np.full((5, 2), 7.0)})
    assert isinstance(moved, Moved)
    np.testing.assert_array_equal(moved.image, recipe.crop(image, MATRIX))
    np.testing.assert_array_equal(moved.matrix, MATRIX)
    assert not moved.flipped


def test_mirroring_is_exact():
    image = samples.smooth_image(0, SIZE, SIZE)
    identity = np.array([[1.0, 0, 0], [0, 1, 0]])
    np.testing.assert_array_equal(FaceTransform(SIZE, flip=1.0)(image, identity).image, image[:, ::-1])


def test_points_may_leave_the_frame():
    moved = FaceTransform(SIZE, shift=0.5)(dotted((100, 100)), MATRIX, {"5": np.array([[0.0, 0.0]] * 5)}, seed=3, row=1)
    assert (moved.points["5"] < 0).any() or (moved.points["5"] > SIZE - 1).any()


def test_draws_lie_in_their_ranges():
    transform = FaceTransform(SIZE, flip=0.25, rotation=30, scale=0.2, shift=0.1)
    n = 4000
    matrices, flipped = transform.matrices(sample_keys(0, 0, np.zeros(n, int), np.arange(n)))
    assert abs(flipped.mean() - 0.25) < 0.03
    assert (mirrors(matrices) == flipped).all()
    straight = matrices[~flipped]
    angle = np.rad2deg(np.arctan2(straight[:, 1, 0], straight[:, 0, 0]))
    scale = np.hypot(straight[:, 1, 0], straight[:, 0, 0])
    middle = np.full((1, 2), (SIZE - 1) / 2)
    shift = (transform_points(straight, middle)[:, 0] - middle) / SIZE
    for values, limit, mean in ((angle, 30, 0), (scale, 0.2, 1), (shift[:, 0], 0.1, 0), (shift[:, 1], 0.1, 0)):
        assert np.abs(values - mean).max() <= limit + 1e-9
        assert np.abs(values - mean).max() > 0.97 * limit
        assert abs(values.mean() - mean) < 0.05 * limit
    assert np.abs(np.corrcoef(np.stack([angle, scale, *shift.T]))[np.triu_indices(4, 1)]).max() < 0.06


def test_keys_differ_in_every_part_and_numbers_are_uniform():
    zero, row = np.zeros(1000, int), np.arange(1000)
    keys = np.concatenate(
        [
            sample_keys(0, 0, zero, row),
            sample_keys(1, 0, zero, row),
            sample_keys(0, 1, zero, row),
            sample_keys(0, 0, zero + 1, row),
        ]
    )
    assert len(np.unique(keys)) == 4000
    drawn = uniforms(keys, 3)
    assert ((drawn >= 0) & (drawn < 1)).all()
    assert np.abs(np.histogram(drawn, 10, (0, 1))[0] / drawn.size - 0.1).max() < 0.01
    assert np.abs(np.corrcoef(drawn.T)[np.triu_indices(3, 1)]).max() < 0.05
    assert sample_keys(5, 2, np.array([0]), np.array([7])) == sample_keys(5, 2, np.array([0, 0]), np.array([3, 7]))[1]


@pytest.mark.parametrize(
    "augment",
    [
        [BRIGHT, OCCLUDE],
        [{"_target_": "albumentations.GaussNoise", "p": 1.0}, {"_target_": "albumentations.ISONoise", "p": 0.5}],
        [{"_target_": "albumentations.ShotNoise", "p": 1.0}, {"_target_": "albumentations.Spatter", "p": 1.0}],
        [{"_target_": "albumentations.OneOf", "transforms": [BRIGHT, OCCLUDE], "p": 0.9}],
        [{"_target_": "albumentations.ElasticTransform", "p": 1.0}],
    ],
)
def test_draws_follow_from_the_sample_alone(augment):
    """Whatever was drawn before, and in another copy of the transform, the same sample looks the same."""
    transform = FaceTransform(32, flip=0.5, rotation=10, augment=augment)
    image = samples.smooth_image(0, 32, 32)
    matrix = np.array([[1.0, 0, 0], [0, 1, 0]])
    first = {row: transform(image, matrix, seed=4, epoch=1, row=row).image for row in range(6)}
    assert len({array.tobytes() for array in first.values()}) == 6
    copy = pickle.loads(pickle.dumps(transform))
    np.random.seed(0)
    cv2.setRNGSeed(99)
    for other in (transform, copy):
        for row in (5, 0, 3):
            np.testing.assert_array_equal(other(image, matrix, seed=4, epoch=1, row=row).image, first[row])
    assert (transform(image, matrix, seed=4, epoch=2, row=0).image != first[0]).any()


def test_occlusion_hides_pixels_and_keeps_points():
    image = np.full((SIZE, SIZE, 3), 200, np.uint8)
    points = np.full((5, 2), SIZE / 2)
    moved = FaceTransform(SIZE, augment=[{**OCCLUDE, "fill": 0}])(
        image, np.array([[1.0, 0, 0], [0, 1, 0]]), {"5": points}
    )
    hidden = (moved.image == 0).all(2).mean()
    assert 0.03 < hidden < 0.1
    np.testing.assert_array_equal(moved.points["5"], points)


def test_occlusion_keeps_points_beside_a_moving_transform():
    """Albumentations would drop points under an occluder; labels must not change their number."""
    transform = FaceTransform(
        SIZE, augment=[{**OCCLUDE, "num_holes_range": [8, 8]}, {"_target_": "albumentations.Rotate", "p": 1.0}]
    )
    moved = transform(samples.smooth_image(0, 200, 200), MATRIX, {"68": samples.points_68(0, 1, 200)[0]})
    assert moved.points["68"].shape == (68, 2)


def test_swap_mirrored_takes_partners():
    points = np.arange(20, dtype=float).reshape(2, 5, 2)
    swapped = swap_mirrored(points, "5", np.array([True, False]))
    assert swapped[0].tolist() == points[0][[1, 0, 2, 4, 3]].tolist()
    assert swapped[1].tolist() == points[1].tolist()
    masks = np.array([[True, False, True, True, False]] * 2)
    assert swap_mirrored(masks, "5", np.array([True, False])).tolist() == [
        [False, True, True, False, True],
        [True, False, True, True, False],
    ]


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"size": 0}, "at least 1 pixel"),
        ({"flip": 1.5}, r"transform\.flip=1\.5 is a probability"),
        ({"scale": 1.0}, r"transform\.scale=1\.0 must lie"),
        ({"rotation": -1}, "must not be negative"),
        ({"augment": [{"_target_": "albumentations.Brightness"}]}, r"transform\.augment: albumentations\.Brightness"),
        ({"augment": [{"_target_": "albumentations.ToGray", "prob": 1}]}, "ToGray has no argument prob"),
        ({"augment": [{"_target_": "albumentations.ToGray", "p": 2}]}, r"transform\.augment: albumentations\.ToGray"),
        ({"augment": [{"p": 1}]}, "give a _target_"),
        ({"augment": [print]}, "no albumentations transform"),
    ],
)
def test_bad_arguments(arguments, message):
    with pytest.raises(ConfigError, match=message) as caught:
        FaceTransform(**{"size": SIZE, **arguments})
    assert "\n" not in str(caught.value)


def test_a_transform_that_resizes_is_refused():
    transform = FaceTransform(SIZE, augment=[{"_target_": "albumentations.Resize", "height": 50, "width": 50}])
    with pytest.raises(ConfigError, match="remove the transform that resizes"):
        transform(samples.smooth_image(0, 200, 200), MATRIX)
    transform = FaceTransform(SIZE, augment=[{"_target_": "albumentations.Normalize"}])
    with pytest.raises(ConfigError, match="the encoder normalises"):
        transform(samples.smooth_image(0, 200, 200), MATRIX)


def test_the_environment_is_left_alone():
    before = dict(os.environ)
    FaceTransform(SIZE, augment=[BRIGHT])
    assert dict(os.environ) == before


def test_configs_and_objects_are_alike():
    import albumentations
    from omegaconf import OmegaConf

    listed = OmegaConf.create([BRIGHT, OCCLUDE])
    built = [albumentations.RandomBrightnessContrast(p=0.5), *FaceTransform(SIZE, augment=[OCCLUDE]).augment]
    image = samples.smooth_image(0, 200, 200)
    a, b = (FaceTransform(SIZE, augment=augment)(image, MATRIX, row=3).image for augment in (listed, built))
    np.testing.assert_array_equal(a, b)
