# SPDX-License-Identifier: Apache-2.0
"""Faces through the frames of a video: which is which, and where they are between two detections.

Faces of neighbouring frames are the same if their boxes overlap; the assignment is the one of the largest sum of
overlaps (Kuhn 1955, "The Hungarian method for the assignment problem"). Between detections a face's box follows its
landmarks: the landmark network reads the last box, and the box moves and grows with the points. A landmark network
finds a face in anything, so a face is followed only while its pixels look like those of its last detection.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Sequence
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass
from typing import Any, NamedTuple

import numpy as np
from numpy.typing import NDArray
from scipy.optimize import linear_sum_assignment

from affect.errors import ConfigError, DataError
from affect.geometry.alignment import CropRecipe, similarity, transform_points
from affect.geometry.faceapi import overlaps
from affect.geometry.providers import (
    Detection,
    FaceDetector,
    FaceFinder,
    FaceObservation,
    LandmarkProvider,
    TwoStageFinder,
    area,
    require_rgb,
)

Clock = Callable[[str], AbstractContextManager[None]]
"""Takes the time of the block that it opens, under the name of a stage."""


def no_clock(stage: str) -> AbstractContextManager[None]:
    """Return a block whose time nobody takes."""
    return nullcontext()


class TrackedFace(NamedTuple):
    """A face of one frame.

    Attributes:
        observation: Box, points and what else the finder says. A followed face has no score.
        track: Number of the face, the same in all its frames.
        detected: Whether a detector saw it in this frame; otherwise its box follows its landmarks.
    """

    observation: FaceObservation
    track: int
    detected: bool


# ------------------------------------------------------------------------------------------------- detection


def split_finder(finder: FaceFinder) -> tuple[FaceDetector, LandmarkProvider] | None:
    """Return detector and landmark provider of a finder, None if it does both in one step."""
    if isinstance(finder, TwoStageFinder):
        return finder.detector, finder.provider
    if isinstance(finder, FaceDetector) and isinstance(finder, LandmarkProvider):
        return finder, finder
    return None


def find_faces(
    finder: FaceFinder, images: Sequence[NDArray[np.uint8]], clock: Clock = no_clock
) -> list[list[FaceObservation]]:
    """Return the faces of each image, largest first; networks that can run on all images at once.

    Args:
        finder: Finds faces and points.
        images: RGB uint8 ``(H, W, 3)`` each.
        clock: Takes the time of ``detect`` and ``landmarks``.
    """
    stages = split_finder(finder)
    if stages is None:
        with clock("detect"):
            return [finder.find(image) for image in images]
    detector, provider = stages
    many: Any = getattr(detector, "detect_many", None)
    with clock("detect"):
        found: list[list[Detection]] = many(images) if many else [detector.detect(require_rgb(i)) for i in images]
    owner = [k for k, faces in enumerate(found) for _ in faces]
    boxes = np.array([face.box for faces in found for face in faces], np.float64).reshape(-1, 4)
    with clock("landmarks"):
        points = read_landmarks(provider, [images[k] for k in owner], boxes)
    seen: list[list[FaceObservation]] = [[] for _ in images]
    detections = (detection for faces in found for detection in faces)
    for k, detection, face in zip(owner, detections, points, strict=True):
        seen[k].append(FaceObservation(detection.box, detection.score, face, provider.scheme))
    return [sorted(faces, key=lambda face: -area(face.box)) for faces in seen]


def read_landmarks(
    provider: LandmarkProvider, images: Sequence[NDArray[np.uint8]], boxes: NDArray[np.float64]
) -> NDArray[np.float64]:
    """Return points ``(N, P, 2)`` of one box in each of ``images``; neighbours may be the same image."""
    many: Any = getattr(provider, "landmarks_many", None)
    if many:
        return many(images, boxes)
    parts, start = [], 0
    while start < len(images):
        end = start + 1
        while end < len(images) and images[end] is images[start]:
            end += 1
        parts.append(provider.landmarks(images[start], boxes[start:end]))
        start = end
    return np.concatenate(parts) if parts else np.zeros((0, 68, 2))


# ------------------------------------------------------------------------------------------------- assignment


def assign(a: NDArray[np.float64], b: NDArray[np.float64], least: float) -> list[tuple[int, int]]:
    """Return the pairs (row of ``a``, row of ``b``) of the assignment with the largest sum of overlaps.

    Args:
        a: Boxes ``(N, 4)``.
        b: Boxes ``(M, 4)``.
        least: Smallest overlap of a pair.

    Example:
        >>> assign([[0, 0, 10, 10], [20, 0, 30, 10]], [[21, 0, 31, 10], [50, 0, 60, 10]], 0.3)
        [(1, 0)]
    """
    found = overlaps(a, b)
    found[found < least] = 0
    rows, columns = linear_sum_assignment(found, maximize=True)
    return [(int(i), int(j)) for i, j in zip(rows, columns, strict=True) if found[i, j] > 0]


def follow_box(
    box: NDArray[np.float64], before: NDArray[np.float64], after: NDArray[np.float64]
) -> NDArray[np.float64]:
    """Return a box ``(4,)`` moved and scaled as the points ``(P, 2)`` of its face; it stays upright.

    Example:
        >>> points = np.array([[2.0, 2], [4, 2], [3, 5]])
        >>> follow_box(np.array([0.0, 0, 6, 6]), points, points + 1).tolist()
        [1.0, 1.0, 7.0, 7.0]
    """
    matrix = similarity(before, after)
    centre = transform_points(matrix, ((box[:2] + box[2:]) / 2)[None])[0]
    half = (box[2:] - box[:2]) / 2 * np.hypot(matrix[0, 0], matrix[1, 0])
    return np.concatenate([centre - half, centre + half])


# -------------------------------------------------------------------------------------------------- following

_PATCH = CropRecipe(name="patch", kind="similarity", size=24, margin=0.0, border="replicate")
_PATCH_5 = dataclasses.replace(_PATCH, points="eyes_mouth_5")


def face_patch(image: NDArray[np.uint8], points: NDArray[np.float64]) -> NDArray[np.float64]:
    """Return the aligned grey pixels of a face ``(576,)`` with mean 0 and norm 1.

    It is 0 for a flat patch, and where points are unknown or in one place: such a face is like none.
    """
    recipe = _PATCH_5 if len(points) == 5 else _PATCH
    if not recipe.usable(points[None])[0]:
        return np.zeros(recipe.size**2)
    grey = recipe.crop(image, recipe.matrix(landmarks=points)).astype(np.float64).mean(-1).reshape(-1)
    grey -= grey.mean()
    norm = float(np.linalg.norm(grey))
    return grey / norm if norm > 1e-6 else np.zeros_like(grey)


@dataclass
class _Track:
    """What is known of a face: its last box and points, the pixels of its last detection, the last frame it is in."""

    number: int
    box: NDArray[np.float64]
    points: NDArray[np.float64]
    patch: NDArray[np.float64]
    last: int


class FaceFollower:
    """Finds and numbers the faces of a video, frame after frame.

    Args:
        finder: Finds faces. One that finds boxes and points in one step is asked in every frame.
        detect_every: Frames from one detection to the next; 1 detects in every frame. While no face is followed, and
            where one is lost, every frame is searched.
        overlap: Smallest intersection over union of a face's boxes in neighbouring frames, and in two detections.
        patience: Frames that a face may be away and still keep its number.
        likeness: Smallest correlation of a followed face's pixels with those of its last detection; below it the face
            counts as lost.
        clock: Takes the time of ``detect`` and ``landmarks``.

    Attributes:
        detections: Frames in which faces were looked for so far.
        tracks: Number of different faces so far.
    """

    def __init__(
        self,
        finder: FaceFinder,
        detect_every: int = 10,
        overlap: float = 0.3,
        patience: int = 25,
        likeness: float = 0.5,
        clock: Clock = no_clock,
    ) -> None:
        fractions = (("tracking.overlap", overlap), ("tracking.likeness", likeness))
        for name, value in (("detect_every", detect_every), ("tracking.patience", patience), *fractions):
            if isinstance(value, bool) or not isinstance(value, int | float):
                raise ConfigError(f"{name}={value}: give a number")
        for name, value in (("detect_every", detect_every), ("tracking.patience", patience)):
            if int(value) != value or value < (name == "detect_every"):
                raise ConfigError(f"{name}={value}: give a whole number of frames, at least {int(name[0] == 'd')}")
        if not 0 < overlap <= 1:
            raise ConfigError(f"tracking.overlap={overlap}: give a fraction above 0, at most 1")
        if not -1 <= likeness <= 1:
            raise ConfigError(f"tracking.likeness={likeness}: give a correlation from -1 to 1")
        self.finder, self.clock = finder, clock
        stages = split_finder(finder)
        self.provider = None if stages is None else stages[1]
        self.every = int(detect_every) if stages is not None else 1
        self.overlap, self.patience, self.likeness = float(overlap), int(patience), float(likeness)
        self.detections = self.tracks = 0
        self._known: list[_Track] = []
        self._frame = 0

    def find(self, images: Sequence[NDArray[np.uint8] | None]) -> list[list[TrackedFace]]:
        """Return the faces of the next frames, largest first; a frame without pixels has none.

        Images are searched together as far as possible, so longer sequences are faster. The result does not depend on
        how a video is cut into them.
        """
        searched: dict[int, list[FaceObservation]] = {}
        found: list[list[TrackedFace]] = []
        for k, image in enumerate(images):
            if image is None:
                found.append([])
            else:
                faces = None if self._wanted() else self._follow(image)
                if faces is None:
                    if k not in searched:
                        self._search(images, k, searched)
                    faces = self._number(image, searched[k])
                found.append(sorted(faces, key=lambda face: -area(face.observation.box)))
            self._frame += 1
        return found

    def _live(self) -> list[_Track]:
        """Return the tracks of the last frame."""
        return [track for track in self._known if track.last == self._frame - 1]

    def _wanted(self) -> bool:
        return self._frame % self.every == 0 or not self._live()

    def _search(
        self,
        images: Sequence[NDArray[np.uint8] | None],
        first: int,
        searched: dict[int, list[FaceObservation]],
    ) -> None:
        """Detect in frame ``first``, and at once in the later frames that will be searched whatever is found."""
        due = [
            k
            for k in range(first + 1, len(images))
            if (self._frame + k - first) % self.every == 0 and k not in searched
        ]
        together = [k for k in (first, *due) if images[k] is not None]
        faces = find_faces(self.finder, [image for k in together if (image := images[k]) is not None], self.clock)
        searched.update(zip(together, faces, strict=True))
        self.detections += len(together)

    def _number(self, image: NDArray[np.uint8], seen: Sequence[FaceObservation]) -> list[TrackedFace]:
        """Return detected faces with the numbers of the tracks that they continue."""
        self._known = [track for track in self._known if self._frame - track.last <= self.patience + 1]
        boxes = np.array([face.box for face in seen]).reshape(-1, 4)
        before = np.array([track.box for track in self._known]).reshape(-1, 4)
        own = {j: self._known[i] for i, j in assign(before, boxes, self.overlap)}
        faces = []
        for j, face in enumerate(seen):
            patch = face_patch(image, face.points) if self.every > 1 else np.zeros(0)
            track = own.get(j)
            if track is None:
                track = _Track(self.tracks, face.box, face.points, patch, self._frame)
                self.tracks += 1
                self._known.append(track)
            track.box, track.points, track.patch, track.last = face.box, face.points, patch, self._frame
            faces.append(TrackedFace(face, track.number, detected=True))
        return faces

    def _follow(self, image: NDArray[np.uint8]) -> list[TrackedFace] | None:
        """Return the faces of the last frame at their new places, None if one of them is lost."""
        live = self._live()
        assert self.provider is not None
        with self.clock("landmarks"):
            points = read_landmarks(self.provider, [image] * len(live), np.array([track.box for track in live]))
            try:
                boxes = [follow_box(track.box, track.points, new) for track, new in zip(live, points, strict=True)]
            except DataError:  # unknown points, or all of them in one place, which no box can follow
                return None
            if not all(self._same(image, *each) for each in zip(live, boxes, points, strict=True)):
                return None
        faces = []
        for track, box, new in zip(live, boxes, points, strict=True):
            track.box, track.points, track.last = box, new, self._frame
            observation = FaceObservation(box, None, new, self.provider.scheme)
            faces.append(TrackedFace(observation, track.number, detected=False))
        return faces

    def _same(
        self, image: NDArray[np.uint8], track: _Track, box: NDArray[np.float64], points: NDArray[np.float64]
    ) -> bool:
        height, width = image.shape[:2]
        inside = np.clip(np.minimum(box[2:], [width, height]) - np.maximum(box[:2], 0), 0, None).prod()
        if not inside >= 0.5 * area(box) or overlaps(track.box, box)[0, 0] < self.overlap:
            return False
        return float(face_patch(image, points) @ track.patch) >= self.likeness
