# SPDX-License-Identifier: Apache-2.0
"""Sheets show every face where it belongs, its points on its pixels, and mark exactly the errors."""

from __future__ import annotations

import numpy as np
import pytest
from skimage.data import astronaut

from affect.errors import DataError
from affect.report.figures import landmark_sheet, prediction_sheet, sample_sheet
from tests.report.figures.artists import all_text, by_gid, outside, overlaps, pixels, texts


@pytest.fixture(scope="module")
def face() -> np.ndarray:
    return np.ascontiguousarray(astronaut()[60:188:2, 160:288:2])


@pytest.mark.parametrize("count", [1, 5, 12, 50])
def test_every_face_and_caption_is_there(face, count):
    captions = [f"happiness {k}\nAU 6+12" for k in range(count)]
    figure = sample_sheet([face] * count, captions, title="Built-in faces")
    assert len(figure.axes) == 1
    assert sum(image.get_gid() == f"face {k}" for k, image in enumerate(figure.axes[0].images)) == count
    assert {caption.split("\n")[0] for caption in captions} <= set(texts(figure))
    assert not overlaps(figure)
    assert not outside(figure)


def test_long_captions_are_cut_and_dollar_signs_are_text(face):
    figure = sample_sheet([face] * 8, ["a $\\bad$ caption that goes on and on " * 9] * 8, title="$\\bad$")
    assert not overlaps(figure)
    assert not outside(figure)
    assert "…" in all_text(figure)


def test_point_lies_on_its_pixel():
    image = np.zeros((50, 40, 3), np.uint8)
    figure = sample_sheet([image], [""], [np.array([[0.0, 0.0], [39.0, 49.0], [np.nan, 3.0], [60.0, 3.0]])])
    (dots,) = by_gid(figure, "points")
    (drawn,) = figure.axes[0].images
    left, right, bottom, top = drawn.get_extent()
    width, height = (right - left) / 40, (bottom - top) / 50
    # Centres of the first and of the last pixel; the missing point and the one outside are not drawn.
    expected = [[left + width / 2, top + height / 2], [right - width / 2, bottom - height / 2]]
    assert np.allclose(dots.get_offsets(), expected)


def test_drawn_dot_hits_the_pixel_in_the_picture():
    image = np.full((20, 20, 3), 255, np.uint8)
    image[5, 14] = (255, 0, 0)
    figure = sample_sheet([image], [""], [np.array([[14.0, 5.0]])])
    for dots in by_gid(figure, "points"):
        centre = dots.get_offset_transform().transform(dots.get_offsets())[0]
        dots.set_visible(False)
    drawn = pixels(figure)
    red, green, blue = drawn[int(drawn.shape[0] - centre[1]), int(centre[0])].astype(int)
    assert red > 240
    assert green < 160
    assert blue < 160


def test_pictures_of_different_sizes_keep_their_shape(face):
    figure = sample_sheet([face, face[:20], face[:, :10], face[..., 0]], ["a", "b", "c", "d"])
    for image, shape in zip(figure.axes[0].images, [(64, 64), (20, 64), (64, 10), (64, 64)], strict=True):
        left, right, bottom, top = image.get_extent()
        assert (bottom - top) / (right - left) == pytest.approx(shape[0] / shape[1])
    assert not outside(figure)


def test_empty_sheets_say_so():
    for figure in (sample_sheet([], []), prediction_sheet([], [], []), landmark_sheet([], [])):
        assert "no faces to show" in all_text(figure)


def test_unequal_lengths_and_no_images_are_refused(face):
    with pytest.raises(DataError, match="2 images, 1 captions"):
        sample_sheet([face] * 2, ["a"])
    with pytest.raises(DataError, match="expected uint8"):
        sample_sheet([face.astype(np.float32)], ["a"])
    with pytest.raises(DataError, match="1 images, 1 predictions, 2 targets"):
        prediction_sheet([face], ["a"], ["a", "b"])


def test_wrong_classes_are_framed_and_crossed(face):
    figure = prediction_sheet([face] * 4, ["happiness", "fear", "anger", "x"], ["happiness", "sadness", "anger", "x"])
    (frame,) = by_gid(figure, "wrong")
    left, right, _, top = figure.axes[0].images[1].get_extent()
    assert (frame.get_x(), frame.get_y()) == (left, top)
    assert frame.get_width() == pytest.approx(right - left)
    text = texts(figure)
    assert {"✓ happiness", "✗ fear", "sadness", "✓ anger"} <= set(text)
    assert not overlaps(figure)


def test_unlabelled_classes_are_no_errors(face):
    figure = prediction_sheet([face] * 2, [{"expression": "fear"}] * 2, [{"expression": None}, {}])
    assert not by_gid(figure, "wrong")
    assert "✗ fear" not in texts(figure)
    assert texts(figure).count("–") == 2


def test_long_class_names_stand_on_two_lines(face):
    figure = prediction_sheet([face] * 6, ["disgustedly surprised"] * 6, ["fearfully surprised"] * 6)
    assert {"✗ disgustedly surprised", "fearfully surprised"} <= set(texts(figure))
    assert not overlaps(figure)
    assert not outside(figure)


def test_numbers_are_marked_beyond_the_tolerance(face):
    predicted = [{"valence": 0.5, "arousal": 0.1, "pitch": np.nan, "yaw": np.float32(3.0)}]
    target = [{"valence": 0.7, "arousal": 0.15, "pitch": 1.0, "yaw": None}]
    text = texts(prediction_sheet([face], predicted, target, tolerance=0.1))
    assert "✗ 0.50" in text
    assert "0.10" in text
    assert "0.70" in text
    assert text.count("–") == 2
    assert "✗" not in "".join(texts(prediction_sheet([face], predicted, target))[:-1]).replace("✗ marks", "")


def test_action_units_are_sorted_into_found_false_and_missed(face):
    predicted = [{"AU1": True, "AU4": np.bool_(True), "AU6": False, "AU12": True, "AU25": False, "AU45": True}]
    target = [{"AU1": True, "AU4": False, "AU6": True, "AU12": True, "AU25": False, "AU45": None}]
    text = texts(prediction_sheet([face], predicted, target))
    assert {"✓ AU 1+12", "✗ false AU4", "✗ missed AU6", "not labelled AU45"} <= set(text)
    assert "✓ none" in texts(prediction_sheet([face], [{"AU1": False}], [{"AU1": False}]))


def test_landmarks_are_joined_with_their_targets(face):
    rng = np.random.default_rng(0)
    target = rng.uniform(5, 58, (2, 68, 2))
    target[0, 3] = np.nan
    predicted = np.nan_to_num(target, nan=30.0) + 1.5
    figure = landmark_sheet([face] * 2, predicted, target, errors=[3.216, np.nan])
    assert [len(dots.get_offsets()) for dots in by_gid(figure, "predicted")] == [68, 68]
    assert [len(dots.get_offsets()) for dots in by_gid(figure, "true")] == [67, 68]
    assert [len(lines.get_segments()) for lines in by_gid(figure, "joined")] == [67, 68]
    assert {"3.22 %", "no error"} <= set(texts(figure))
    assert not overlaps(figure)
    with pytest.raises(DataError, match="predicted points"):
        landmark_sheet([face], predicted[:1], target[:1, :5])


def test_landmarks_without_targets(face):
    figure = landmark_sheet([face] * 2, [np.full((68, 2), np.nan), np.zeros((5, 2))])
    assert [len(dots.get_offsets()) for dots in by_gid(figure, "predicted")] == [0, 5]
    assert not by_gid(figure, "true")
