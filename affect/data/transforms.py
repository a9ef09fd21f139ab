# SPDX-License-Identifier: Apache-2.0
"""From a stored image to what a model sees: crop, mirroring, jitter, colour and occlusion, moved as one.

Geometry comes first and is one matrix: the crop of the recipe, then rotation, scale and shift about the crop's
centre, then mirroring. Pixels are interpolated once, points move by the same matrix, and mirrored points take the place
of their partners. Colour, noise and occlusion follow on uint8 crops by albumentations.

Every draw is a function of (seed, epoch, source, row): the number of workers, the order of samples and what was drawn
before make no difference.
"""

from __future__ import annotations

import os
import pickle
import random
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import TYPE_CHECKING, Any, NamedTuple

import cv2
import numpy as np

from affect import labels
from affect.errors import ConfigError
from affect.geometry.alignment import Border, Interpolation, compose, flip_matrix, transform_points, warp

if TYPE_CHECKING:
    from albumentations import BasicTransform

_GOLDEN = np.uint64(0x9E3779B97F4A7C15)


# -------------------------------------------------------------------------------------------------- randomness


def _mix(values: np.ndarray) -> np.ndarray:
    """Return well mixed 64-bit numbers, the finaliser of SplitMix64 (Steele, Lea and Flood, OOPSLA 2014)."""
    values = (values ^ (values >> np.uint64(30))) * np.uint64(0xBF58476D1CE4E5B9)
    values = (values ^ (values >> np.uint64(27))) * np.uint64(0x94D049BB133111EB)
    return values ^ (values >> np.uint64(31))


def sample_keys(seed: int, epoch: int, source: np.ndarray, row: np.ndarray) -> np.ndarray:
    """Return a 64-bit key for each sample, uint64 ``(N,)``, from which all its draws follow.

    Args:
        seed: Seed of the run.
        epoch: Epoch.
        source: Index of each sample's table ``(N,)``.
        row: Row of each sample in its table ``(N,)``.
    """
    key = np.full(len(row), seed & 0xFFFFFFFFFFFFFFFF, np.uint64)
    for part in (np.full(len(row), epoch), source, row):
        key = _mix(key + _GOLDEN) ^ _mix(part.astype(np.int64).astype(np.uint64) * _GOLDEN + np.uint64(1))
    return _mix(key)


def uniforms(keys: np.ndarray, count: int) -> np.ndarray:
    """Return independent uniform numbers in [0, 1), float64 ``(N, count)``, a function of each key alone."""
    steps = np.arange(1, count + 1, dtype=np.uint64) * _GOLDEN
    return (_mix(keys[:, None] + steps[None]) >> np.uint64(11)) * 2.0**-53


# -------------------------------------------------------------------------------------------- points and flips


def swap_mirrored(values: np.ndarray, scheme: str, flipped: np.ndarray) -> np.ndarray:
    """Return points ``(N, P, 2)`` or masks ``(N, P)`` with partners exchanged in the ``flipped`` samples ``(N,)``."""
    swap = np.asarray(labels.SCHEMES[scheme].swap)
    chosen = flipped.reshape(-1, *[1] * (values.ndim - 1))
    return np.where(chosen, values[:, swap], values)


class Moved(NamedTuple):
    """One transformed sample.

    Attributes:
        image: RGB uint8 ``(size, size, 3)``.
        points: By landmark scheme, ``(P, 2)`` in pixels of ``image``; they may lie outside of it.
        matrix: ``(2, 3)``, maps pixels of the stored image to pixels of ``image``.
        flipped: Whether left and right are exchanged.
    """

    image: np.ndarray
    points: dict[str, np.ndarray]
    matrix: np.ndarray
    flipped: bool


# -------------------------------------------------------------------------------------------------- transform


class FaceTransform:
    """Crops a face and, in training, augments it.

    Args:
        size: Side of the square output in pixels.
        flip: Probability of mirroring.
        rotation: Largest rotation in degrees, drawn uniformly in [-rotation, rotation].
        scale: Largest relative change of size, drawn uniformly in [-scale, scale].
        shift: Largest shift in each direction as a share of ``size``, drawn uniformly in [-shift, shift].
        augment: Albumentations transforms of the RGB uint8 crop, as objects or as configs with ``_target_``. Colour,
            noise and occlusion leave points where they are. A transform that moves pixels moves points too, and the
            matrix by its affine part, at the price of a second interpolation: prefer the arguments above.

    Raises:
        ConfigError: If a number lies outside its range, or a transform is unknown or has unknown arguments.
    """

    def __init__(
        self,
        size: int,
        flip: float = 0.0,
        rotation: float = 0.0,
        scale: float = 0.0,
        shift: float = 0.0,
        augment: Sequence[BasicTransform | Mapping[str, Any]] | None = None,
    ) -> None:
        if size < 1:
            raise ConfigError(f"transform.size={size} must be at least 1 pixel")
        if not 0 <= flip <= 1:
            raise ConfigError(f"transform.flip={flip} is a probability in [0, 1]")
        if not 0 <= scale < 1:
            raise ConfigError(f"transform.scale={scale} must lie in [0, 1)")
        if rotation < 0 or shift < 0:
            raise ConfigError(f"transform.rotation={rotation} and transform.shift={shift} must not be negative")
        self.size = int(size)
        self.flip, self.rotation, self.scale, self.shift = float(flip), float(rotation), float(scale), float(shift)
        self.augment = _build(augment or ())
        self._prepare()

    def _prepare(self) -> None:
        """Join the transforms to one pair of generators, which is reseeded in place for each sample."""
        self._bits = np.random.PCG64(0)
        self._state = self._bits.state
        self._random = random.Random(0)
        generator = np.random.Generator(self._bits)
        for transform in self.augment:
            transform.set_random_state(generator, self._random)
        self._moves = any(_moves_pixels(transform) for transform in self.augment)
        self._pipeline = None
        if self._moves:
            with _quiet_albumentations() as albumentations:
                points = albumentations.KeypointParams("xy", remove_invisible=False)
                self._pipeline = albumentations.Compose(self.augment, keypoint_params=points)
            self._pipeline.set_random_state(generator, self._random)

    # ------------------------------------------------------------------------------------------------- batches

    def matrices(self, keys: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
        """Return the drawn motion of each crop, ``(N, 2, 3)`` from crop to output, and whether it mirrors, ``(N,)``."""
        draw = uniforms(keys, 5)
        signed = 2 * draw - 1
        flipped = draw[:, 0] < self.flip
        angle = np.deg2rad(self.rotation) * signed[:, 1]
        factor = 1 + self.scale * signed[:, 2]
        cosine, sine = factor * np.cos(angle), factor * np.sin(angle)
        linear = np.stack([np.stack([cosine, -sine], -1), np.stack([sine, cosine], -1)], -2)
        centre = np.full(2, (self.size - 1) / 2)
        offset = centre + self.shift * self.size * signed[:, 3:5] - linear @ centre
        motion = np.concatenate([linear, offset[..., None]], -1)
        return np.where(flipped[:, None, None], compose(flip_matrix(self.size), motion), motion), flipped

    @property
    def still(self) -> bool:
        """Whether crops stay where the recipe puts them."""
        return not (self.flip or self.rotation or self.scale or self.shift)

    def retouch(
        self, image: np.ndarray, key: int, points: np.ndarray | None = None
    ) -> tuple[np.ndarray, np.ndarray | None, np.ndarray | None]:
        """Return the augmented crop, with the matrix ``(2, 3)`` and points of a further motion where there was one.

        Args:
            image: RGB uint8 ``(size, size, 3)``.
            key: The sample's key.
            points: ``(P, 2)`` in pixels of ``image``; only needed where ``moves`` is True.
        """
        if not self.augment:
            return image, None, points
        self._reseed(key)
        if self._pipeline is None:
            for transform in self.augment:
                image = transform(image=image)["image"]
            return self._checked(image), None, points
        # The corners go with the points and tell the motion, and with it whether the transforms mirror.
        end = self.size - 1.0
        corners = np.array([[0, 0], [end, 0], [0, end], [end, end]])
        given = corners if points is None else np.concatenate([corners, points])
        result = self._pipeline(image=image, keypoints=given)
        moved = np.asarray(result["keypoints"], np.float64)
        motion = np.linalg.lstsq(np.column_stack([corners, np.ones(4)]), moved[:4], rcond=None)[0].T
        return self._checked(result["image"]), motion, None if points is None else moved[4:]

    @property
    def moves(self) -> bool:
        """Whether ``augment`` holds a transform that moves pixels, so that ``retouch`` needs the points."""
        return self._moves

    def _reseed(self, key: int) -> None:
        key = int(key)
        self._state["state"]["state"] = key << 64 | key
        self._state["has_uint32"] = 0
        self._bits.state = self._state
        self._random.seed(key)
        cv2.setRNGSeed(key & 0x7FFFFFFF)  # A few transforms draw noise in OpenCV.

    def _checked(self, image: np.ndarray) -> np.ndarray:
        if image.shape != (self.size, self.size, 3) or image.dtype != np.uint8:
            raise ConfigError(
                f"transform.augment turned a uint8 crop of {self.size} px into {image.dtype} {image.shape}; "
                "remove the transform that resizes or normalises (the encoder normalises)"
            )
        return image

    # ------------------------------------------------------------------------------------------------ one image

    def __call__(
        self,
        image: np.ndarray,
        matrix: np.ndarray,
        points: Mapping[str, np.ndarray] | None = None,
        *,
        seed: int = 0,
        epoch: int = 0,
        source: int = 0,
        row: int = 0,
        border: Border = "constant",
        interpolation: Interpolation = "linear",
        antialias: bool = True,
    ) -> Moved:
        """Return one image as a batch would hold it.

        Args:
            image: Stored image, RGB uint8 ``(H, W, 3)``.
            matrix: Crop of the recipe ``(2, 3)``, from pixels of ``image`` to pixels of a crop of ``size``.
            points: By landmark scheme, ``(P, 2)`` in pixels of ``image``.
            seed: Seed of the run.
            epoch: Epoch.
            source: Index of the sample's table.
            row: Row of the sample in its table.
            border: What lies outside the image (see ``affect.geometry.warp``).
            interpolation: How values between pixels are found.
            antialias: Average first where the image is shrunk to less than half.
        """
        keys = sample_keys(seed, epoch, np.array([source]), np.array([row]))
        motion, flipped = self.matrices(keys)
        full = compose(motion[0], matrix)
        crop = warp(image, full, self.size, border, interpolation, antialias)
        given = dict(points or {})
        stacked = np.concatenate([transform_points(full, value) for value in given.values()]) if given else None
        crop, further, stacked = self.retouch(crop, keys[0], stacked)
        if further is not None:
            full = compose(further, full)
            flipped = flipped ^ mirrors(further)
        moved = {}
        if stacked is not None:
            ends = np.cumsum([len(value) for value in given.values()])
            for name, value in zip(given, np.split(stacked, ends[:-1]), strict=True):
                moved[name] = swap_mirrored(value[None], name, flipped)[0]
        return Moved(crop, moved, full, bool(flipped[0]))

    # ------------------------------------------------------------------------------------------------- pickling

    def __getstate__(self) -> dict[str, Any]:
        plain = {name: getattr(self, name) for name in ("size", "flip", "rotation", "scale", "shift")}
        return {**plain, "augment": pickle.dumps(self.augment)}

    def __setstate__(self, state: dict[str, Any]) -> None:
        self.__dict__.update(state)
        # Albumentations is imported quietly before its objects are.
        with _quiet_albumentations():
            self.augment = pickle.loads(state["augment"])
        self._prepare()


def mirrors(matrix: np.ndarray) -> np.ndarray:
    """Return whether matrices ``(…, 2, 3)`` exchange left and right, bool ``(…,)``."""
    return matrix[..., 0, 0] * matrix[..., 1, 1] - matrix[..., 0, 1] * matrix[..., 1, 0] < 0


# ------------------------------------------------------------------------------------------- albumentations


@contextmanager
def _quiet_albumentations() -> Iterator[Any]:
    """Import albumentations without its request for a newer version, which would reach for the network.

    The library knows one switch, an environment variable that it reads at import. It is set for the import alone.
    """
    name = "NO_ALBUMENTATIONS_UPDATE"
    before = os.environ.get(name)
    os.environ[name] = "1"
    try:
        import albumentations

        yield albumentations
    finally:
        if before is None:
            os.environ.pop(name, None)
        else:
            os.environ[name] = before


def _build(augment: Sequence[BasicTransform | Mapping[str, Any]]) -> list[BasicTransform]:
    """Return the transforms of a list of objects and configs."""
    if not len(augment):
        return []
    with _quiet_albumentations() as albumentations:
        built = []
        for entry in augment:
            made = entry
            if isinstance(entry, Mapping):
                made = _instantiate(entry)
            if not isinstance(made, albumentations.BasicTransform | albumentations.BaseCompose):
                raise ConfigError(f"transform.augment: {made!r} is no albumentations transform; give a _target_")
            for leaf in _leaves(made):
                if getattr(leaf, "invalid_args", None):
                    unknown = ", ".join(leaf.invalid_args)
                    raise ConfigError(f"transform.augment: {type(leaf).__name__} has no argument {unknown}")
            built.append(made)
    return built


def _instantiate(config: Mapping[str, Any]) -> BasicTransform:
    import warnings

    from hydra.errors import HydraException
    from hydra.utils import instantiate

    try:
        with warnings.catch_warnings():
            # Unknown arguments are only warned of; they are reported as an error below.
            warnings.simplefilter("ignore", UserWarning)
            return instantiate(config, _convert_="all")
    except (HydraException, ValueError, TypeError) as error:
        reason = " ".join(str(error.__cause__ or error).split())
        raise ConfigError(f"transform.augment: {config.get('_target_', config)}: {reason}") from error


def _leaves(transform: BasicTransform) -> Iterator[BasicTransform]:
    if hasattr(transform, "transforms"):
        for inner in transform.transforms:
            yield from _leaves(inner)
    else:
        yield transform


def _moves_pixels(transform: BasicTransform) -> bool:
    """Whether pixels change places. Occlusion counts as not: it hides points, which keep their place and label."""
    with _quiet_albumentations() as albumentations:
        from albumentations.augmentations.dropout.transforms import BaseDropout

        moving, hiding = albumentations.DualTransform, (BaseDropout, albumentations.PixelDropout)
        return any(isinstance(leaf, moving) and not isinstance(leaf, hiding) for leaf in _leaves(transform))
