# SPDX-License-Identifier: Apache-2.0
"""Similarity alignment, affine matrices, warping, and the recipe that turns a stored face image into a crop.

One convention everywhere: pixels are counted from the centre of the first pixel, so an image of width ``W`` has pixel
centres at 0 … ``W - 1`` and edges at -0.5 and ``W - 0.5``. A matrix ``(2, 3)`` maps points of the source image to
points of the crop: ``x' = M[:, :2] @ x + M[:, 2]``. ``warp`` moves pixels exactly as ``transform_points`` moves points.

The least-squares similarity is that of S. Umeyama, "Least-squares estimation of transformation parameters between two
point patterns", IEEE Transactions on Pattern Analysis and Machine Intelligence 13(4), 1991, in two dimensions, where it
has a closed form: with points as complex numbers the optimum is a complex regression slope.
"""

from __future__ import annotations

import dataclasses
import functools
import hashlib
import json
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Literal, get_args

import cv2
import numpy as np
from numpy.typing import ArrayLike, NDArray

from affect import labels
from affect.errors import ConfigError, DataError, near
from affect.geometry.templates import FACE_68, TEMPLATE_VERSION, WFLW_TO_68

Border = Literal["constant", "replicate", "reflect"]
Interpolation = Literal["linear", "cubic", "lanczos", "nearest"]
Kind = Literal["none", "box", "similarity"]
PointSet = Literal["inner_51", "inner_49", "eyes_mouth_5", "eyes_2", "all_68"]

_NUMBERS = (int, float, np.integer, np.floating)
_BORDERS = {"constant": cv2.BORDER_CONSTANT, "replicate": cv2.BORDER_REPLICATE, "reflect": cv2.BORDER_REFLECT_101}
_INTERPOLATIONS = {
    "linear": cv2.INTER_LINEAR,
    "cubic": cv2.INTER_CUBIC,
    "lanczos": cv2.INTER_LANCZOS4,
    "nearest": cv2.INTER_NEAREST,
}


# --------------------------------------------------------------------------------------------------- matrices


def similarity(source: ArrayLike, target: ArrayLike, weights: ArrayLike | None = None) -> NDArray[np.float64]:
    """Return the similarity (rotation, one scale, shift; no reflection) that best maps ``source`` to ``target``.

    It minimises the weighted sum of squared distances between mapped source points and target points.

    Args:
        source: Points ``(…, P, 2)``.
        target: Points ``(…, P, 2)``, leading axes broadcast against those of ``source``.
        weights: Non-negative weights ``(…, P)``; a mask works too. None weighs all points alike.

    Returns:
        Matrices ``(…, 2, 3)``.

    Raises:
        DataError: If a set has fewer than two distinct weighted source points, or a number is not finite.

    Example:
        >>> similarity([[0, 0], [1, 0]], [[2, 3], [2, 5]]).round(6).tolist()
        [[0.0, -2.0, 2.0], [2.0, 0.0, 3.0]]
    """
    s = _points(source, "source")
    t = _points(target, "target")
    w = np.ones(s.shape[-2]) if weights is None else np.asarray(weights, np.float64)
    if s.shape[-2] != t.shape[-2] or w.shape[-1] != s.shape[-2]:
        raise DataError(
            f"similarity needs as many source points as target points and weights, "
            f"got {s.shape[-2]}, {t.shape[-2]} and {w.shape[-1]}"
        )
    used = w[..., None] > 0  # a masked point may hold anything, also NaN
    z, u = _complex(np.where(used, s, 0)), _complex(np.where(used, t, 0))
    with np.errstate(divide="ignore", invalid="ignore"):
        w = w / w.sum(-1, keepdims=True)
        z_mean, u_mean = (w * z).sum(-1), (w * u).sum(-1)
        z, u = z - z_mean[..., None], u - u_mean[..., None]
        spread = (w * np.abs(z) ** 2).sum(-1)
        slope = (w * z.conj() * u).sum(-1) / spread
    shift = u_mean - slope * z_mean
    # Relative to the size of the coordinates: repeated points leave only rounding errors.
    flat = ~(spread > 1e-18 * (1 + np.abs(z_mean) ** 2))
    if np.any(flat | ~np.isfinite(slope) | ~np.isfinite(shift)):
        where = np.argwhere(np.atleast_1d(flat | ~np.isfinite(slope) | ~np.isfinite(shift)))[0].tolist()
        raise DataError(f"similarity: points of set {where} are not finite, or fewer than two of them are distinct")
    return np.stack(
        [np.stack([slope.real, -slope.imag, shift.real], -1), np.stack([slope.imag, slope.real, shift.imag], -1)], -2
    )


def invert(matrix: ArrayLike) -> NDArray[np.float64]:
    """Return the inverse of affine matrices ``(…, 2, 3)``.

    Raises:
        DataError: If a matrix is singular.
    """
    m = _matrices(matrix)
    determinant = m[..., 0, 0] * m[..., 1, 1] - m[..., 0, 1] * m[..., 1, 0]
    if not np.all(np.isfinite(determinant) & (determinant != 0)):
        raise DataError("invert: a matrix has no inverse (its determinant is 0 or not finite)")
    linear = (
        np.stack([np.stack([m[..., 1, 1], -m[..., 0, 1]], -1), np.stack([-m[..., 1, 0], m[..., 0, 0]], -1)], -2)
        / (determinant[..., None, None])
    )
    return np.concatenate([linear, -linear @ m[..., 2:]], -1)


def compose(a: ArrayLike, b: ArrayLike) -> NDArray[np.float64]:
    """Return the matrices ``(…, 2, 3)`` that apply ``b`` first and then ``a``, as in ``a(b(x))``."""
    a, b = _matrices(a), _matrices(b)
    linear = a[..., :2] @ b[..., :2]
    return np.concatenate([linear, a[..., :2] @ b[..., 2:] + a[..., 2:]], -1)


def transform_points(matrix: ArrayLike, points: ArrayLike) -> NDArray[np.float64]:
    """Return points ``(…, P, 2)`` mapped by matrices ``(…, 2, 3)``; leading axes broadcast."""
    m, p = _matrices(matrix), _points(points, "points")
    return p @ np.swapaxes(m[..., :2], -1, -2) + m[..., None, :, 2]


def flip_matrix(width: int) -> NDArray[np.float64]:
    """Return the matrix ``(2, 3)`` that mirrors an image of ``width`` pixels left to right."""
    return np.array([[-1.0, 0.0, width - 1.0], [0.0, 1.0, 0.0]])


def scale_of(matrix: ArrayLike) -> NDArray[np.float64]:
    """Return the scale ``(…,)`` of matrices ``(…, 2, 3)``: the root of the area that a unit square takes."""
    m = _matrices(matrix)
    return np.sqrt(np.abs(m[..., 0, 0] * m[..., 1, 1] - m[..., 0, 1] * m[..., 1, 0]))


def mean_shape(shapes: ArrayLike, swap: tuple[int, ...] | None = None, rounds: int = 20) -> NDArray[np.float64]:
    """Return the mean of shapes after alignment by similarities (generalised Procrustes analysis).

    Args:
        shapes: Points ``(N, P, 2)``.
        swap: Index of each point's mirror partner; if given, the mean is made mirror-symmetric about ``x = 0``.
        rounds: Number of alignments to the running mean.

    Returns:
        Points ``(P, 2)`` with centroid 0 and unit root-mean-square distance from it.
    """
    shapes = _points(shapes, "shapes")
    mean = shapes[0]
    for _ in range(rounds):
        mean = transform_points(similarity(shapes, mean), shapes).mean(0)
        if swap is not None:
            mirrored = mean[list(swap)] * [-1, 1]
            mean = (transform_points(similarity(mean, mean - mean.mean(0)), mean) + mirrored - mirrored.mean(0)) / 2
        mean = mean - mean.mean(0)
        mean = mean / np.sqrt((mean**2).sum(1).mean())
    return mean


# ---------------------------------------------------------------------------------------------------- warping


def warp(
    image: np.ndarray,
    matrix: ArrayLike,
    size: int | tuple[int, int],
    border: Border = "constant",
    interpolation: Interpolation = "linear",
    antialias: bool = True,
) -> np.ndarray:
    """Return the crop that ``matrix`` maps an image to.

    A pixel at ``x`` of the image lands exactly at ``transform_points(matrix, x)`` of the crop.

    Args:
        image: ``(H, W)`` or ``(H, W, C)``, uint8 or float32.
        matrix: ``(2, 3)``, maps pixels of the image to pixels of the crop.
        size: Side of a square crop, or (height, width).
        border: What lies outside the image: black, its edge pixels, or its mirror image.
        interpolation: How values between pixels are found.
        antialias: Average pixels first where the crop is smaller than half of the source, which a plain warp would
            sample only here and there.

    Returns:
        ``(height, width)`` or ``(height, width, C)`` of the image's type.
    """
    m = _matrices(matrix)
    height, width = (size, size) if isinstance(size, int | np.integer) else size
    if antialias and interpolation != "nearest":
        factor = int(1 / max(float(scale_of(m)), 1e-6))
        if factor >= 2:
            image, shrink = _shrink(image, m, (height, width), factor, border)
            m = compose(m, invert(shrink))
    return cv2.warpAffine(
        image, m, (int(width), int(height)), flags=_INTERPOLATIONS[interpolation], borderMode=_BORDERS[border]
    )


def _shrink(
    image: np.ndarray, matrix: NDArray[np.float64], size: tuple[int, int], factor: int, border: Border
) -> tuple[np.ndarray, NDArray[np.float64]]:
    """Return the part of an image that a crop needs, averaged over ``factor``² pixels, and the matrix into it."""
    height, width = size
    corners = np.array([[-0.5, -0.5], [width - 0.5, -0.5], [-0.5, height - 0.5], [width - 0.5, height - 0.5]])
    needed = transform_points(invert(matrix), corners)
    rows, columns = image.shape[:2]
    reach = 4 * factor  # what the widest interpolation kernel sees beyond the corners
    x0, y0 = np.clip(np.floor(needed.min(0)).astype(int) - reach, 0, [columns - 1, rows - 1])
    x1, y1 = np.clip(np.ceil(needed.max(0)).astype(int) + reach + 1, [x0 + 1, y0 + 1], [columns, rows])
    part = image[y0:y1, x0:x1]
    below, right = -part.shape[0] % factor, -part.shape[1] % factor
    if below or right:
        # Averages need whole blocks. Repeating the last row keeps the edge where it is, up to less than one block.
        kind = cv2.BORDER_CONSTANT if border == "constant" else cv2.BORDER_REPLICATE
        part = cv2.copyMakeBorder(part, 0, below, 0, right, kind)
    small = cv2.resize(part, (part.shape[1] // factor, part.shape[0] // factor), interpolation=cv2.INTER_AREA)
    # The centre of the first block of pixels becomes the first pixel centre.
    offset = (factor - 1) / 2
    shrink = np.array([[1 / factor, 0, -(x0 + offset) / factor], [0, 1 / factor, -(y0 + offset) / factor]])
    return small, shrink


# --------------------------------------------------------------------------------------------------- recipes


@dataclass(frozen=True)
class CropRecipe:
    """How a face crop is cut from a stored image; part of every release, because a model sees nothing else.

    A face has a unit square: for ``similarity`` the square around the 68 points of the mean face, for ``box`` the
    square around the box with its centre and longer side, for ``none`` the square around the whole image. ``margin``
    widens that square on each side by a fraction of its own side, and the result fills the crop.

    Attributes:
        name: What people call the recipe; not part of ``hash``.
        kind: ``similarity`` aligns landmarks with the mean face, ``box`` cuts upright, ``none`` takes the whole image
            (for sets that are delivered as crops).
        size: Side of the crop in pixels.
        margin: Width added on each side as a fraction of the unit square; may be negative, above -0.5.
        points: Landmarks that are aligned: ``inner_51`` (without the jaw line), ``inner_49`` (also without the inner
            mouth corners), ``eyes_mouth_5`` (two eyes, nose tip, two mouth corners), ``eyes_2`` or ``all_68``.
        interpolation: ``linear``, ``cubic``, ``lanczos`` or ``nearest``.
        border: What is seen outside the image: ``constant`` (black), ``replicate`` or ``reflect``.
        antialias: Average pixels where the image is shrunk to less than half.
        detector: Name of the face detector that boxes come from; a note for prediction on new images.
        provider: Name of the landmark provider; ``annotations`` stands for the dataset's own points.
        stored: Side in pixels of the crops that ``affect prepare`` writes to disk; 0 crops while loading. The margin is
            then that of the stored crop.
        window: Side in pixels of the centred square of the stored crop that a model sees; 0 shows all of it.
    """

    name: str = "aligned"
    kind: Kind = "similarity"
    size: int = 224
    margin: float = 0.2
    points: PointSet = "inner_51"
    interpolation: Interpolation = "linear"
    border: Border = "constant"
    antialias: bool = True
    detector: str = "faceapi"
    provider: str = "faceapi"
    stored: int = 0
    window: int = 0

    def __post_init__(self) -> None:
        for key, options in (
            ("kind", Kind),
            ("points", PointSet),
            ("interpolation", Interpolation),
            ("border", Border),
        ):
            value = getattr(self, key)
            if value not in get_args(options):
                raise ConfigError(f"recipe.{key}={value!r}: {near(str(value), get_args(options))}")
        for key, least in (("size", 1), ("stored", 0), ("window", 0)):
            value = getattr(self, key)
            whole = isinstance(value, _NUMBERS) and not isinstance(value, bool) and least <= value < 1e9
            if not whole or int(value) != value:
                raise ConfigError(f"recipe.{key}={value!r} must be a whole number of pixels, at least {least}")
            object.__setattr__(self, key, int(value))
        if self.window > self.stored:
            raise ConfigError(
                f"recipe.window={self.window} must lie inside the stored crop, which has stored={self.stored} pixels"
            )
        if not isinstance(self.margin, _NUMBERS) or not -0.5 < self.margin < 100:
            raise ConfigError(f"recipe.margin={self.margin!r} must lie above -0.5 (a fraction of the face's square)")
        object.__setattr__(self, "margin", float(self.margin))

    # ------------------------------------------------------------------------------------------------ matrices

    @property
    def needs(self) -> Literal["nothing", "box", "landmarks"]:
        """What a row must have for a crop."""
        if self.kind == "none":
            return "nothing"
        return "box" if self.kind == "box" else "landmarks"

    def matrices(
        self,
        points: ArrayLike | None = None,
        boxes: ArrayLike | None = None,
        sizes: ArrayLike | None = None,
        valid: ArrayLike | None = None,
    ) -> NDArray[np.float64]:
        """Return the matrices ``(N, 2, 3)`` from pixels of stored images to pixels of crops.

        Args:
            points: Landmarks ``(N, P, 2)`` for ``similarity``; the scheme is told by P (68, 98, 49 or 5).
            boxes: ``(N, 4)`` as x1, y1, x2, y2 for ``box``.
            sizes: Height and width of each stored image, ``(N, 2)``, for ``none``.
            valid: Which points are labelled, ``(N, P)``; None takes all finite ones.

        Raises:
            DataError: If what the recipe needs is missing, or cannot be used in some row (``usable`` tells which).
        """
        if self.kind == "similarity":
            return self._from_points(points, valid)
        if self.kind == "box":
            if boxes is None:
                raise DataError(
                    f"recipe {self.name}: kind=box needs a box for each image; detect faces or use kind=none"
                )
            centre, side = _box_square(boxes)
        else:
            if sizes is None:
                raise DataError(f"recipe {self.name}: kind=none needs the height and width of each image")
            extent = np.asarray(sizes, np.float64)[..., ::-1]
            centre, side = (extent - 1) / 2, extent.max(-1)
        bad = ~(np.isfinite(centre).all(-1) & (side > 0))
        self._complain(bad, "box" if self.kind == "box" else "height and width")
        scale = self.size / (side * (1 + 2 * self.margin))
        shift = (self.size - 1) / 2 - scale[..., None] * centre
        zero = np.zeros_like(scale)
        return np.stack([np.stack([scale, zero, shift[..., 0]], -1), np.stack([zero, scale, shift[..., 1]], -1)], -2)

    def matrix(
        self,
        landmarks: ArrayLike | None = None,
        box: ArrayLike | None = None,
        image_size: tuple[int, int] | None = None,
    ) -> NDArray[np.float64]:
        """Return the matrix ``(2, 3)`` of one image from landmarks ``(P, 2)``, a box ``(4,)`` or (height, width)."""
        return self.matrices(
            None if landmarks is None else np.asarray(landmarks, np.float64)[None],
            None if box is None else np.asarray(box, np.float64)[None],
            None if image_size is None else np.asarray(image_size, np.float64)[None],
        )[0]

    def usable(
        self, points: ArrayLike | None = None, boxes: ArrayLike | None = None, valid: ArrayLike | None = None
    ) -> NDArray[np.bool_]:
        """Return which rows have the box or the landmarks that the recipe needs, ``(N,)``.

        Rows without can then be dropped and counted. Arguments as in ``matrices``; ``none`` needs nothing to ask for.
        """
        if self.kind == "box":
            centre, side = _box_square(boxes)
            return np.isfinite(centre).all(-1) & (side > 0)
        chosen, _, mask = self._chosen(points, valid)
        return _spread_out(chosen, mask)

    def crop(self, image: np.ndarray, matrix: ArrayLike) -> np.ndarray:
        """Return the crop ``(size, size, C)`` of an image under a matrix of this recipe."""
        return warp(image, matrix, self.size, self.border, self.interpolation, self.antialias)

    def target(self) -> NDArray[np.float64]:
        """Return where the aligned points of the mean face lie in the crop, ``(K, 2)`` in pixels."""
        return self._to_crop(_averages(self.points) @ FACE_68)

    def _to_crop(self, unit: NDArray[np.float64]) -> NDArray[np.float64]:
        return (unit + self.margin) / (1 + 2 * self.margin) * self.size - 0.5

    def _chosen(
        self, points: ArrayLike | None, valid: ArrayLike | None
    ) -> tuple[NDArray[np.float64], NDArray[np.float64], NDArray[np.bool_]]:
        """Return the points to align ``(N, K, 2)``, where they belong ``(K, 2)`` and which are labelled ``(N, K)``."""
        if points is None:
            raise DataError(
                f"recipe {self.name}: kind=similarity needs landmarks for each image; "
                f"add a landmarks_68 column, or use kind=box or kind=none"
            )
        given = _points(points, "landmarks")
        mask = np.asarray(np.isfinite(given).all(-1))
        if valid is not None:
            mask &= np.asarray(valid, bool)
        given = np.where(mask[..., None], given, 0)
        count = given.shape[-2]
        if count == 5:
            if self.points not in ("eyes_mouth_5", "eyes_2"):
                raise DataError(
                    f"recipe {self.name}: points={self.points} cannot be had from 5 landmarks; use points=eyes_mouth_5"
                )
            keep = len(_POINT_SETS[self.points])
            return given[..., :keep, :], self.target(), mask[..., :keep]
        if count not in _INDEX_IN:
            raise DataError(f"recipe {self.name}: landmarks with {count} points; known are 68, 98, 49 and 5")
        index = np.array(_INDEX_IN[count])
        given, mask = given[..., index, :], mask[..., index] & (index >= 0)
        weights = _averages(self.points)
        # A mean of several points counts only where all of them are labelled.
        return weights @ given, self.target(), ((weights > 0) & ~mask[..., None, :]).sum(-1) == 0

    def _from_points(self, points: ArrayLike | None, valid: ArrayLike | None) -> NDArray[np.float64]:
        chosen, target, mask = self._chosen(points, valid)
        self._complain(~_spread_out(chosen, mask), "landmarks")
        return similarity(chosen, target, mask)

    def _complain(self, bad: NDArray[np.bool_], what: str) -> None:
        if np.any(bad):
            raise DataError(
                f"recipe {self.name}: {int(np.sum(bad))} of {bad.size} images have no usable {what} "
                f"(first: row {int(np.argmax(bad))}); drop these rows or label them"
            )

    # --------------------------------------------------------------------------------------------- stored crops

    def storage(self) -> CropRecipe:
        """Return the recipe of the crops on disk: ``stored`` pixels wide, whatever a model then sees of them.

        Raises:
            ConfigError: If the recipe crops while loading.
        """
        self._require_stored()
        return dataclasses.replace(self, size=self.stored, stored=0, window=0)

    def loading(self, size: int | None = None) -> CropRecipe:
        """Return the recipe from stored crops to a model's input: their centred window, resized.

        Args:
            size: Side of the model's input in pixels; None takes the recipe's.
        """
        self._require_stored()
        margin = ((self.window or self.stored) / self.stored - 1) / 2
        return dataclasses.replace(
            self, kind="none", size=self.size if size is None else size, margin=margin, stored=0, window=0
        )

    def composed(self, size: int | None = None) -> CropRecipe:
        """Return the one recipe from photographs to a model's input that ``storage`` and ``loading`` make together.

        A recipe without stored crops is that already.
        """
        size = self.size if size is None else size
        if not self.stored:
            return dataclasses.replace(self, size=size)
        margin = ((1 + 2 * self.margin) * (self.window or self.stored) / self.stored - 1) / 2
        return dataclasses.replace(self, size=size, margin=margin, stored=0, window=0)

    def _require_stored(self) -> None:
        if not self.stored:
            raise ConfigError(f"recipe {self.name}: stored=0, its crops are cut while loading and never stored")

    # ------------------------------------------------------------------------------------------------ metadata

    def describe(self) -> dict[str, str | int | float | bool]:
        """Return every field and the version of the mean face, ready for JSON or YAML.

        ``stored`` and ``window`` are named by recipes that have them.
        """
        described = dataclasses.asdict(self)
        if not self.stored:
            del described["stored"], described["window"]
        if self.kind == "similarity":
            described["template"] = TEMPLATE_VERSION
        return described

    @property
    def hash(self) -> str:
        """Twelve hexadecimal digits that change with anything that changes pixels (not with ``name``)."""
        described = {key: value for key, value in self.describe().items() if key != "name"}
        return hashlib.sha256(json.dumps(described, sort_keys=True).encode()).hexdigest()[:12]

    @classmethod
    def read(cls, description: Mapping[str, str | float | bool]) -> CropRecipe:
        """Return the recipe that ``describe`` gave.

        Raises:
            ConfigError: If a key is unknown, or the recipe was made with another mean face.
        """
        values = dict(description)
        template = values.pop("template", TEMPLATE_VERSION)
        if template != TEMPLATE_VERSION:
            raise ConfigError(f"the recipe was made with mean face {template}; this version has {TEMPLATE_VERSION}")
        known = [field.name for field in dataclasses.fields(cls)]
        for key in values:
            if key not in known:
                raise ConfigError(f"recipe: unknown key {key!r}: {near(key, known)}")
        return cls(**values)  # type: ignore[arg-type]


# The aligned points as groups of points of scheme 68; a group stands for its mean.
_POINT_SETS: dict[str, tuple[tuple[int, ...], ...]] = {
    "inner_51": tuple((k,) for k in labels.INNER_51),
    "inner_49": tuple((k,) for k in labels.INNER_51 if k not in (60, 64)),
    "all_68": tuple((k,) for k in range(68)),
    "eyes_mouth_5": labels.POINTS_68_TO_5,
    "eyes_2": labels.POINTS_68_TO_5[:2],
}

# By number of points: where each point of scheme 68 is found, -1 if nowhere.
_INDEX_IN: dict[int, tuple[int, ...]] = {
    68: tuple(range(68)),
    98: WFLW_TO_68,
    49: (*[-1] * 17, *range(43), -1, 43, 44, 45, -1, 46, 47, 48),
}


@functools.cache
def _averages(points: str) -> NDArray[np.float64]:
    """Return the matrix ``(K, 68)`` that takes the means of a point set."""
    groups = _POINT_SETS[points]
    weights = np.zeros((len(groups), 68))
    for row, group in enumerate(groups):
        weights[row, list(group)] = 1 / len(group)
    return weights


def _spread_out(points: NDArray[np.float64], mask: NDArray[np.bool_]) -> NDArray[np.bool_]:
    """Return which sets of points ``(…, K, 2)`` have two labelled points apart, ``(…,)``."""
    seen = mask[..., None]
    extent = np.where(seen, points, -np.inf).max(-2) - np.where(seen, points, np.inf).min(-2)
    return (mask.sum(-1) >= 2) & (extent.max(-1) > 0)


def _box_square(boxes: ArrayLike | None) -> tuple[NDArray[np.float64], NDArray[np.float64]]:
    """Return the centre ``(…, 2)`` and longer side ``(…,)`` of boxes ``(…, 4)``; the side is NaN if not positive."""
    box = np.asarray(boxes, np.float64)
    if boxes is None or box.shape[-1:] != (4,):
        raise DataError(f"boxes must have the shape (…, 4) as x1, y1, x2, y2, got {box.shape}")
    extent = box[..., 2:] - box[..., :2]
    side = np.where((extent > 0).all(-1), extent.max(-1), np.nan)
    return (box[..., :2] + box[..., 2:]) / 2, side


def _points(points: ArrayLike, what: str) -> NDArray[np.float64]:
    array = np.asarray(points, np.float64)
    if array.ndim < 2 or array.shape[-1] != 2:
        raise DataError(f"{what} must have the shape (…, P, 2), got {array.shape}")
    return array


def _matrices(matrix: ArrayLike) -> NDArray[np.float64]:
    array = np.asarray(matrix, np.float64)
    if array.shape[-2:] != (2, 3):
        raise DataError(f"an affine matrix must have the shape (…, 2, 3), got {array.shape}")
    return array


def _complex(points: NDArray[np.float64]) -> NDArray[np.complex128]:
    return points[..., 0] + 1j * points[..., 1]
