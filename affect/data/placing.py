# SPDX-License-Identifier: Apache-2.0
"""Where the face of each image of a sequence is: which of several faces, and what to do where none is found.

Images come in as a stream and leave as soon as it is known how they are cropped, so that a video of any length is
worked on in bounded memory.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field, replace
from typing import NamedTuple

import numpy as np

from affect.data.dataset import alignment_scheme, read_points
from affect.data.table import FaceTable
from affect.errors import DataError
from affect.geometry.alignment import CropRecipe
from affect.geometry.providers import FaceFinder, FaceObservation, overlap

FOUND, NEIGHBOUR, CENTRE = "found", "neighbour", "centre"
"""How a face's place is known: values of the column ``face``."""

REACH = 64
"""A face is taken from a neighbour whose frame number differs by this much at most; as many images wait in memory."""

_BATCH = 8
_PRECISION = 64


class Placed(NamedTuple):
    """How the crop of an image was found.

    Attributes:
        matrix: From pixels of the image to pixels of the crop ``(2, 3)``.
        face: ``found``, ``neighbour`` or ``centre``.
        reason: Why it was not found; None if it was.
        faces: Number of faces that the finder saw; None where nobody looked.
        observation: What the finder says of the face; None where it says nothing.
    """

    matrix: np.ndarray
    face: str
    reason: str | None
    faces: int | None
    observation: FaceObservation | None


class _Sighting(NamedTuple):
    """A face that the recipe can crop by: its points or its box, ``anchor``."""

    anchor: np.ndarray
    time: int
    observation: FaceObservation | None


class _Waiting(NamedTuple):
    """A frame without a face that waits for the next one with a face."""

    place: int
    time: int
    image: np.ndarray
    reason: str
    faces: int | None
    hint: np.ndarray | None


@dataclass
class Placer:
    """Decides where crops lie, image by image, in bounded memory.

    Args:
        recipe: Recipe of the stored crops.
        table: The layout's table, whose boxes say whose face it is, and whose points are aligned by where the recipe
            asks for ``annotations``.
        finder: Finds faces; None where the recipe needs none.
    """

    recipe: CropRecipe
    table: FaceTable
    finder: FaceFinder | None
    most_held: int = field(default=0, init=False)
    """Largest number of images that were held at once."""

    def placed(
        self, images: Iterator[np.ndarray | DataError], rows: np.ndarray, times: np.ndarray, ordered: bool
    ) -> Iterator[tuple[int, np.ndarray | DataError, Placed | None]]:
        """Yield (place in ``rows``, image, how it is cropped), not always in order; None for an unreadable image.

        Args:
            images: The images of ``rows``, or why one cannot be read.
            rows: Rows of the table ``(N,)``.
            times: Their frame numbers, or places in the sequence ``(N,)``.
            ordered: Whether they are frames of one sequence.
        """
        hints = self._hints(rows)
        last: _Sighting | None = None
        waiting: deque[_Waiting] = deque()
        for place, image, seen in self._looked(images, rows):
            if isinstance(image, DataError) or seen is None:
                yield place, image, None
                continue
            hint = hints[place]
            sighting, reason, count = self._sighting(seen, hint, last, int(times[place]))
            self.most_held = max(self.most_held, len(waiting) + _BATCH)
            if sighting is not None:
                while waiting:
                    held = waiting.popleft()
                    yield held.place, held.image, self._between(held, last, sighting)
                last = sighting if ordered else None
                matrix = self._matrix(sighting.anchor, image)
                yield place, image, Placed(matrix, FOUND, None, count, sighting.observation)
                continue
            waiting.append(_Waiting(place, int(times[place]), image, str(reason), count, hint))
            while waiting and (not ordered or place - waiting[0].place >= REACH):
                held = waiting.popleft()
                yield held.place, held.image, self._between(held, last, None)
        while waiting:
            held = waiting.popleft()
            yield held.place, held.image, self._between(held, last, None)

    # ------------------------------------------------------------------------------------------------ looking

    def _looked(
        self, images: Iterator[np.ndarray | DataError], rows: np.ndarray
    ) -> Iterator[tuple[int, np.ndarray | DataError, list[FaceObservation] | np.ndarray | None]]:
        """Yield each image with the faces in it, or with the table's own points or box ``(K, 2)`` or ``(4,)``."""
        if self.finder is None:
            given = self._given(rows)
            for place, image in enumerate(images):
                yield place, image, None if isinstance(image, DataError) else given[place]
            return
        many: Callable[..., list[list[FaceObservation]]] | None = getattr(self.finder, "find_many", None)
        batch: list[tuple[int, np.ndarray | DataError]] = []

        def looked() -> Iterator[tuple[int, np.ndarray | DataError, list[FaceObservation] | None]]:
            readable = [image for _, image in batch if not isinstance(image, DataError)]
            assert self.finder is not None
            found = iter(many(readable) if many is not None else [self.finder.find(image) for image in readable])
            for place, image in batch:
                yield place, image, None if isinstance(image, DataError) else next(found)
            batch.clear()

        for place, image in enumerate(images):
            batch.append((place, image))
            if len(batch) == _BATCH:
                yield from looked()
        yield from looked()

    def _given(self, rows: np.ndarray) -> np.ndarray:
        """Return what the table itself says of the faces: points ``(N, P, 2)`` or boxes ``(N, 4)``, NaN if unknown."""
        if self.recipe.needs == "nothing":
            return np.zeros((len(rows), 0))
        if self.recipe.needs == "box":
            values, valid = self.table.numbers("box", rows)
            return np.where(valid[:, None], values, np.nan)
        points, mask = read_points(self.table, alignment_scheme(self.table.names) or "68", rows)
        return np.where(mask[..., None], points, np.nan)

    def _hints(self, rows: np.ndarray) -> list[np.ndarray | None]:
        """Return the box of the face that each row is about, where the table knows it."""
        hints: list[np.ndarray | None] = [None] * len(rows)
        scheme = alignment_scheme(self.table.names)
        if "box" in self.table.names:
            boxes, valid = self.table.numbers("box", rows)
        elif scheme is not None:
            points, mask = read_points(self.table, scheme, rows)
            low = np.where(mask[..., None], points, np.inf).min(1)
            boxes = np.concatenate([low, np.where(mask[..., None], points, -np.inf).max(1)], 1)
            valid = mask.sum(1) > 1
        else:
            return hints
        usable = valid & np.isfinite(boxes).all(1) & (boxes[:, 2:] > boxes[:, :2]).all(1)
        for place in np.flatnonzero(usable).tolist():
            hints[place] = boxes[place].astype(np.float64)
        return hints

    # ----------------------------------------------------------------------------------------------- choosing

    def _sighting(
        self,
        seen: list[FaceObservation] | np.ndarray,
        hint: np.ndarray | None,
        last: _Sighting | None,
        time: int,
    ) -> tuple[_Sighting | None, str | None, int | None]:
        """Return the face to crop, or why there is none, and how many there were."""
        if isinstance(seen, np.ndarray):
            if self._usable(seen):
                return _Sighting(seen, time, None), None, None
            return None, f"the table has no {self.recipe.needs} of the face", None
        if not seen:
            return None, "no face found", 0
        previous = None if last is None or last.observation is None else last.observation.box
        face = choose(seen, hint, previous)
        if face is None:
            return None, "no face found overlaps the table's box", len(seen)
        face = _rounded(face)
        anchor = face.box if self.recipe.needs == "box" else face.points
        if not self._usable(anchor):
            return None, "the points found cannot be aligned", len(seen)
        return _Sighting(anchor, time, face), None, len(seen)

    def _usable(self, anchor: np.ndarray) -> bool:
        if self.recipe.needs == "nothing":
            return True
        if self.recipe.needs == "box":
            return bool(self.recipe.usable(boxes=anchor[None])[0])
        return bool(self.recipe.usable(points=anchor[None])[0])

    def _matrix(self, anchor: np.ndarray, image: np.ndarray) -> np.ndarray:
        if self.recipe.needs == "nothing":
            return self.recipe.matrix(image_size=(image.shape[0], image.shape[1]))
        if self.recipe.needs == "box":
            return self.recipe.matrix(box=anchor)
        return self.recipe.matrix(landmarks=anchor)

    def _between(self, held: _Waiting, before: _Sighting | None, after: _Sighting | None) -> Placed:
        """Return how to crop a frame without a face: by the faces before and behind it, else by what is in the middle.

        Between two frames points move in a straight line; with one of them they stay. A frame whose number is farther
        away than ``REACH`` is no neighbour, however few images lie between: sets are delivered with gaps.
        """
        if before is not None and held.time - before.time > REACH:
            before = None
        if after is not None and after.time - held.time > REACH:
            after = None
        anchor = None
        if before is not None and after is not None:
            share = (held.time - before.time) / max(after.time - before.time, 1)
            anchor = before.anchor + np.clip(share, 0, 1) * (after.anchor - before.anchor)
        elif before is not None or after is not None:
            anchor = (before or after).anchor  # type: ignore[union-attr]
        if anchor is not None and self.recipe.needs != "nothing" and self._usable(anchor):
            return Placed(self._matrix(anchor, held.image), NEIGHBOUR, held.reason, held.faces, None)
        return Placed(self._centre(held), CENTRE, held.reason, held.faces, None)

    def _centre(self, held: _Waiting) -> np.ndarray:
        if self.recipe.needs == "nothing":
            return self._matrix(np.zeros(0), held.image)
        upright = replace(self.recipe, kind="box")
        if held.hint is not None:
            return upright.matrix(box=held.hint)
        height, width = held.image.shape[:2]
        centre, half = np.array([(width - 1) / 2, (height - 1) / 2]), min(height, width) / 2
        return replace(upright, margin=0.0).matrix(box=np.concatenate([centre - half, centre + half]))


def choose(
    faces: Sequence[FaceObservation], hint: np.ndarray | None = None, previous: np.ndarray | None = None
) -> FaceObservation | None:
    """Return the face that a row is about.

    It is the one that overlaps the table's box most; where there is none, the one nearest to the face in the frame
    before; otherwise the largest.

    Args:
        faces: What a finder saw, largest first, at least one.
        hint: The table's box ``(4,)``.
        previous: Box of the face in the frame before ``(4,)``.

    Returns:
        None if no face overlaps ``hint``: another person's face would be worse than none.
    """
    if hint is not None:
        overlaps = [overlap(hint, face.box) for face in faces]
        return faces[int(np.argmax(overlaps))] if max(overlaps) > 0 else None
    if previous is not None and len(faces) > 1:
        centre = previous[:2] + previous[2:]
        return min(faces, key=lambda face: float(np.linalg.norm(face.box[:2] + face.box[2:] - centre)))
    return faces[0]


def _rounded(face: FaceObservation) -> FaceObservation:
    # Finer than any finder's own noise, and coarser than what differs between two machines' arithmetic.
    return replace(
        face,
        box=np.round(np.asarray(face.box, np.float64) * _PRECISION) / _PRECISION,
        points=np.round(np.asarray(face.points, np.float64) * _PRECISION) / _PRECISION,
    )
