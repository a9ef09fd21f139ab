# SPDX-License-Identifier: Apache-2.0
"""Faces keep their numbers through a video, and between detections their boxes follow what the pixels do."""

from __future__ import annotations

from collections.abc import Sequence

import cv2
import numpy as np
import pytest

from affect.errors import ConfigError
from affect.geometry import Detection, FaceObservation, TwoStageFinder
from affect.geometry.faceapi import overlaps
from affect.geometry.providers import coarser_points
from affect.geometry.templates import FACE_68
from affect.geometry.tracking import FaceFollower, assign, find_faces, follow_box

SIDE = 40
RANDOM = np.random.default_rng(0)
TEXTURES = [cv2.GaussianBlur(RANDOM.integers(60, 255, (SIDE, SIDE, 3)).astype(np.uint8), (7, 7), 0) for _ in range(3)]


def scene(*places: tuple[int, int, int]) -> np.ndarray:
    """A black picture with textured squares, each ``(x, y, texture)``."""
    image = np.zeros((120, 200, 3), np.uint8)
    for x, y, texture in places:
        image[y : y + SIDE, x : x + SIDE] = np.maximum(TEXTURES[texture], 1)
    return image


def squares(image: np.ndarray) -> np.ndarray:
    """Boxes of the squares of a scene ``(N, 4)``."""
    _, _, found, _ = cv2.connectedComponentsWithStats((image.max(-1) > 0).astype(np.uint8))
    return np.array([[x, y, x + w - 1, y + h - 1] for x, y, w, h, _ in found[1:]], np.float64).reshape(-1, 4)


class Detector:
    """Sees every square, and counts how often it looks."""

    def __init__(self) -> None:
        self.looks = 0

    def detect(self, image: np.ndarray) -> list[Detection]:
        self.looks += 1
        return [Detection(box, 0.9) for box in squares(image)]


class Provider:
    """Puts the mean face into the square nearest to a box; without any, into the box itself."""

    scheme = "68"

    def landmarks(self, image: np.ndarray, boxes: np.ndarray) -> np.ndarray:
        points = []
        there = squares(image)
        for box in boxes:
            found = there[np.argmax(overlaps(box[None], there)[0])] if len(there) else box
            points.append(found[:2] + FACE_68 * (found[2:] - found[:2]))
        return np.array(points)


def followed(images: Sequence[np.ndarray | None], cut: int = 32, **settings) -> tuple[list, Detector]:
    detector = Detector()
    follower = FaceFollower(TwoStageFinder(detector, Provider()), **settings)
    found = []
    for start in range(0, len(images), cut):
        found += follower.find(images[start : start + cut])
    assert follower.detections == detector.looks
    return found, detector


def tracks(found: list) -> list[list[int]]:
    return [[face.track for face in faces] for faces in found]


# ------------------------------------------------------------------------------------------------- assignment


def test_overlap_is_intersection_over_union() -> None:
    boxes = np.array([[0, 0, 10, 10], [5, 5, 15, 15], [20, 20, 20, 20], [0, 0, 5, 10]], np.float64)
    expected = [[1, 25 / 175, 0, 0.5], [25 / 175, 1, 0, 0], [0, 0, 0, 0], [0.5, 0, 0, 1]]
    assert overlaps(boxes, boxes) == pytest.approx(np.array(expected))


def test_the_best_sum_of_overlaps_wins_over_the_best_single_one() -> None:
    before = np.array([[0, 0, 10, 10], [4, 0, 14, 10]], np.float64)
    after = np.array([[3, 0, 13, 10], [9, 0, 19, 10]], np.float64)
    # Greedy would pair 1 with 0 (overlap 0.82) and leave 0 without a partner.
    assert np.unravel_index(overlaps(before, after).argmax(), (2, 2)) == (1, 0)
    assert assign(before, after, 0.3) == [(0, 0), (1, 1)]
    assert assign(before, after, 0.6) == [(1, 0)]
    assert assign(np.zeros((0, 4)), after, 0.3) == []


def test_a_box_moves_and_grows_with_its_points_and_stays_upright() -> None:
    points = RANDOM.normal(size=(68, 2))
    angle, scale = 0.3, 1.5
    turn = scale * np.array([[np.cos(angle), -np.sin(angle)], [np.sin(angle), np.cos(angle)]])
    box = np.array([-2.0, -3, 4, 5])
    moved = follow_box(box, points, points @ turn.T + [10, 20])
    centre = turn @ [1, 1] + [10, 20]
    assert moved == pytest.approx(
        np.concatenate([centre - scale * np.array([3, 4]), centre + scale * np.array([3, 4])])
    )


# -------------------------------------------------------------------------------------------------- following


def test_between_detections_boxes_follow_and_have_no_score() -> None:
    images = [scene((10 + 3 * k, 20, 0)) for k in range(25)]
    found, detector = followed(images, detect_every=10)
    assert tracks(found) == [[0]] * 25
    assert detector.looks == 3
    for k, (face,) in enumerate(found):
        assert face.detected == (k % 10 == 0)
        assert face.observation.score == (0.9 if face.detected else None)
        assert face.observation.box == pytest.approx(squares(images[k])[0], abs=1e-6)


@pytest.mark.parametrize("every", [1, 4, 10])
def test_the_cut_of_a_video_changes_nothing(every: int) -> None:
    images: list[np.ndarray | None] = [scene((10 + 2 * k, 20, 0), (150 - 2 * k, 75, 1)) for k in range(20)]
    images[5:9] = [scene()] * 4
    images[12] = None
    whole, _ = followed(images, 32, detect_every=every)
    for cut in (1, 3, 7):
        parts, _ = followed(images, cut, detect_every=every)
        assert tracks(parts) == tracks(whole)
        for a, b in zip(whole, parts, strict=True):
            assert [face.observation.box.tolist() for face in a] == [face.observation.box.tolist() for face in b]


def test_a_face_that_is_gone_is_not_followed_on() -> None:
    images = [scene((10, 20, 0))] * 4 + [scene()] * 3 + [scene((12, 20, 0))] * 4
    found, detector = followed(images, detect_every=10)
    assert tracks(found) == [[0]] * 4 + [[]] * 3 + [[0]] * 4
    # Frame 0; the loss and the two empty frames after it; the return; frame 10.
    assert detector.looks == 6
    found, _ = followed(images, detect_every=10, patience=2)
    assert tracks(found)[7:] == [[1]] * 4


def test_other_pixels_at_the_same_place_are_searched_at_once() -> None:
    images = [scene((10, 20, 0))] * 3 + [scene((10, 20, 1))] * 3
    found, detector = followed(images, detect_every=10)
    assert detector.looks == 2, "its pixels are others"
    assert [face.detected for (face,) in found] == [True, False, False, True, False, False]
    assert tracks(found) == [[0]] * 6, "boxes are all that numbers go by"


def test_a_face_that_jumps_is_another_one() -> None:
    images = [scene((10, 20, 0))] * 3 + [scene((100, 60, 0))] * 3
    found, detector = followed(images, detect_every=10)
    assert detector.looks == 2
    assert tracks(found) == [[0]] * 3 + [[1]] * 3


def test_a_second_face_gets_its_own_number_at_the_next_detection() -> None:
    images = [scene((10, 20, 0))] * 2 + [scene((10, 20, 0), (120, 60, 1))] * 4
    found, _ = followed(images, detect_every=4)
    assert [sorted(numbers) for numbers in tracks(found)] == [[0]] * 4 + [[0, 1]] * 2


def test_a_frame_without_pixels_has_no_face_and_ends_nothing() -> None:
    found, _ = followed([scene((10, 20, 0)), None, scene((11, 20, 0))], detect_every=10)
    assert tracks(found) == [[0], [], [0]]


class Fewer(Provider):
    """Five points, as some landmark networks give."""

    scheme = "5"

    def landmarks(self, image: np.ndarray, boxes: np.ndarray) -> np.ndarray:
        return coarser_points(super().landmarks(image, boxes), "68", "5")


def test_faces_are_followed_by_five_points() -> None:
    images = [scene((10 + 2 * k, 30, 0)) for k in range(8)]
    detector = Detector()
    found = FaceFollower(TwoStageFinder(detector, Fewer()), detect_every=8).find(images)
    assert tracks(found) == [[0]] * 8
    assert detector.looks == 1


@pytest.mark.parametrize("nowhere", [np.nan, 7.0])
def test_points_that_follow_nothing_let_every_frame_be_searched(nowhere: float) -> None:
    class Lost(Provider):
        """Knows no point, or puts all of them into one place, as networks do that learnt nothing."""

        def landmarks(self, image: np.ndarray, boxes: np.ndarray) -> np.ndarray:
            return np.full((len(boxes), 68, 2), nowhere)

    detector = Detector()
    found = FaceFollower(TwoStageFinder(detector, Lost()), detect_every=4).find([scene((10, 30, 0))] * 6)
    assert tracks(found) == [[0]] * 6
    assert detector.looks == 6


def test_a_finder_in_one_step_looks_at_every_frame() -> None:
    class OneStep:
        def find(self, image: np.ndarray) -> list[FaceObservation]:
            points = Provider().landmarks(image, squares(image))
            return [FaceObservation(box, None, face) for box, face in zip(squares(image), points, strict=True)]

    follower = FaceFollower(OneStep(), detect_every=10)
    found = follower.find([scene((10 + k, 20, 0)) for k in range(5)])
    assert tracks(found) == [[0]] * 5
    assert follower.detections == 5


def test_faces_of_many_images_are_those_of_each() -> None:
    finder = TwoStageFinder(Detector(), Provider())
    images = [scene((10, 20, 0), (100, 60, 1)), scene(), scene((50, 20, 2))]
    for together, image in zip(find_faces(finder, images), images, strict=True):
        alone = finder.find(image)
        assert [face.box.tolist() for face in together] == [face.box.tolist() for face in alone]
        assert [face.points.tolist() for face in together] == [face.points.tolist() for face in alone]


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"detect_every": 0}, "detect_every=0"),
        ({"detect_every": 2.5}, "detect_every=2.5"),
        ({"overlap": 0.0}, "overlap=0"),
        ({"patience": -1}, "patience=-1"),
    ],
)
def test_settings_that_make_no_sense_are_refused(settings: dict, message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        FaceFollower(TwoStageFinder(Detector(), Provider()), **settings)
