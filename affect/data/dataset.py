# SPDX-License-Identifier: Apache-2.0
"""From rows of tables to ``FaceBatch``: labels by column, pixels by image, and both moved alike."""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping, Sequence
from typing import Any, NamedTuple

import cv2
import numpy as np
import torch
from torch import Tensor
from torch.utils.data import Dataset, get_worker_info

from affect import labels
from affect.data.batch import FaceBatch
from affect.data.images import Picture, Source, open_pictures
from affect.data.sampling import BatchKey
from affect.data.table import FaceTable
from affect.data.transforms import FaceTransform, mirrors, sample_keys, swap_mirrored
from affect.errors import AffectError, ConfigError, DataError
from affect.geometry.alignment import CropRecipe, compose, scale_of, transform_points, warp
from affect.tasks.base import Encoded, Task
from affect.tasks.kinds import to_fractions

ALIGNMENT_SCHEMES = ("68", "98", "49", "5")
"""Schemes that a recipe aligns by; a table's first one of these is taken."""


def alignment_scheme(names: frozenset[str]) -> str | None:
    """Return the landmark scheme of a table that a recipe aligns by, None if it has none."""
    return next((name for name in ALIGNMENT_SCHEMES if labels.SCHEMES[name].column in names), None)


def read_points(table: FaceTable, scheme: str, rows: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Return points ``(N, P, 2)`` in pixels of the stored images, 0 where unknown, and masks ``(N, P)``.

    A table without the scheme gives points that are all masked.
    """
    count, column = labels.SCHEMES[scheme].points, labels.SCHEMES[scheme].column
    if column not in table.names:
        return np.zeros((len(rows), count, 2), np.float32), np.zeros((len(rows), count), bool)
    values, valid = table.numbers(column, rows)
    points = values.reshape(-1, count, 2)
    mask = valid[:, None] & np.isfinite(points).all(2)
    return np.where(mask[..., None], points, 0), mask


def croppable(table: FaceTable, recipe: CropRecipe | None, rows: np.ndarray, block: int = 16384) -> np.ndarray:
    """Return which of ``rows`` have the box or the landmarks that the recipe needs, bool ``(N,)``.

    Raises:
        DataError: If the table lacks the column altogether.
    """
    if recipe is None or recipe.needs == "nothing":
        return np.ones(len(rows), bool)
    if recipe.needs == "box":
        if "box" not in table.names:
            raise DataError(f"recipe {recipe.name} needs a column box; add it, or use prepare=none")
        boxes, valid = table.numbers("box", rows)
        return recipe.usable(boxes=boxes) & valid
    scheme = alignment_scheme(table.names)
    if scheme is None:
        raise DataError(f"recipe {recipe.name} needs a column of landmarks, e.g. landmarks_68; or use prepare=none")
    usable = np.zeros(len(rows), bool)
    for start in range(0, len(rows), block):
        points, mask = read_points(table, scheme, rows[start : start + block])
        usable[start : start + block] = recipe.usable(points, valid=mask)
    return usable


def crop_matrices(source: Source, rows: np.ndarray, pictures: Sequence[Picture], size: int) -> np.ndarray:
    """Return the matrices ``(N, 2, 3)`` from pixels of stored images to crops of ``size`` by the source's recipe."""
    recipe = source.recipe or whole_image(size)
    if recipe.needs == "nothing":
        return recipe.matrices(sizes=np.array([picture.size[::-1] for picture in pictures], float).reshape(-1, 2))
    if recipe.needs == "box":
        return recipe.matrices(boxes=source.table.numbers("box", rows)[0])
    points, mask = read_points(source.table, alignment_scheme(source.table.names) or "68", rows)
    return recipe.matrices(points, valid=mask)


def whole_image(size: int) -> CropRecipe:
    """Return the recipe of a source without one: the whole image, resized with its proportions kept."""
    return CropRecipe(name="whole", kind="none", size=size, margin=0.0)


def reduction(factor: int) -> int:
    """Return by how much a decoder may reduce an image that the crop shrinks by ``factor``: 1, 2, 4 or 8.

    The warp averages ``factor`` x ``factor`` pixels. A decoder's averages are part of these, up to rounding, where they
    divide them; otherwise crops would differ visibly from those of ``CropRecipe.crop``.

    Example:
        >>> [reduction(factor) for factor in (1, 2, 3, 6, 8, 12)]
        [1, 2, 1, 2, 8, 4]
    """
    return next(by for by in (8, 4, 2, 1) if factor % by == 0)


def render(picture: Picture, matrix: np.ndarray, recipe: CropRecipe, factor: int, out: np.ndarray) -> None:
    """Write the crop that ``matrix`` maps a picture to into ``out``.

    It is the crop of ``affect.geometry.warp``, except that a decoder which can average pixels while it decodes does so.

    Args:
        picture: The picture.
        matrix: ``(2, 3)``, from pixels of the picture to pixels of the crop.
        recipe: Size, border and interpolation of the crop.
        factor: Whole number of pixels that the crop's pixel spans, ``floor(1 / scale)``.
        out: RGB uint8 ``(size, size, 3)``, contiguous.
    """
    reduce = reduction(factor) if recipe.antialias and recipe.interpolation != "nearest" else 1
    image = picture.pixels(reduce)
    if reduce > 1:
        matrix = compose(matrix, [[reduce, 0, (reduce - 1) / 2], [0, reduce, (reduce - 1) / 2]])
    further = recipe.antialias and factor // reduce >= 2
    # OpenCV warps four channels in half the time of three, to the same bits, which pays unless the image is large.
    padded = not further and image.shape[0] * image.shape[1] <= 4 * recipe.size**2
    if padded:
        image = cv2.cvtColor(image, cv2.COLOR_RGB2RGBA)
    crop = warp(image, matrix, recipe.size, recipe.border, recipe.interpolation, further)
    if padded:
        cv2.cvtColor(crop, cv2.COLOR_RGBA2RGB, dst=out)
    else:
        out[...] = crop


def turned(matrices: np.ndarray) -> np.ndarray:
    """Return by how many degrees crops are turned clockwise against the stored images, before mirroring, ``(N,)``.

    Args:
        matrices: From pixels of stored images to pixels of crops, ``(N, 2, 3)``.
    """
    # Any motion that mirrors is a turn followed by a flip of the x axis.
    sign = np.where(mirrors(matrices), -1.0, 1.0)
    return np.rad2deg(np.arctan2(matrices[:, 1, 0], sign * matrices[:, 0, 0]))


class _Labels(NamedTuple):
    """Targets by task and points by scheme of some samples, in pixels of the stored images where they are points."""

    targets: dict[str, Encoded]
    points: dict[str, Encoded]


class SampleError(DataError):
    """What a loading process could not read.

    The loader raises it again in the main process with the process's traceback as its text; it keeps the message alone.
    """

    def __init__(self, message: str) -> None:
        super().__init__(message.rpartition(f"{type(self).__module__}.{type(self).__qualname__}: ")[2].strip())


class RowSet:
    """Chosen rows of a table, small in memory and in a pickle.

    Parts are made of whole videos or people, whose rows are neighbours: runs of consecutive rows are kept as their
    first row. Other choices are kept as they are, as narrow as they fit. A loading process that is sent a part of
    millions of rows so receives kilobytes.

    Args:
        rows: Row indices ``(N,)``, in any order.
    """

    def __init__(self, rows: np.ndarray) -> None:
        rows = np.asarray(rows, np.int64)
        self._size = len(rows)
        self._start = np.flatnonzero(np.diff(rows, prepend=rows[0] - 2 if len(rows) else 0) != 1)
        self._first: np.ndarray | None = rows[self._start]
        self._rows: np.ndarray | None = None
        if 4 * len(self._start) > self._size:  # An entry of a run is four times as large as one of the narrow rows.
            narrow = self._size == 0 or int(rows.max()) <= np.iinfo(np.int32).max
            self._rows = rows.astype(np.int32 if narrow else np.int64)
            self._start, self._first = np.empty(0, np.int64), None

    def __len__(self) -> int:
        return self._size

    def __getitem__(self, positions: np.ndarray) -> np.ndarray:
        """Return the rows at ``positions`` ``(B,)``, each in ``[0, N)``, as int64."""
        if self._first is None:
            assert self._rows is not None
            return self._rows[positions].astype(np.int64)
        run = np.searchsorted(self._start, positions, side="right") - 1
        return self._first[run] + (positions - self._start[run])

    def __array__(self, dtype: Any = None, copy: bool | None = None) -> np.ndarray:  # noqa: ANN401
        """Return all rows, int64 ``(N,)``."""
        rows = self[np.arange(self._size)]
        return rows if dtype is None else rows.astype(dtype)


class FaceDataset(Dataset):
    """Rows of one or more sources as batches.

    A batch is asked for by ``dataset[BatchKey(epoch, positions)]``; an integer gives a batch of one. Positions count
    through ``rows`` of the first source, then of the second, and so on. The order within a batch is that of the key.

    Args:
        sources: Tables with their images.
        rows: Rows of each source that belong to the dataset.
        tasks: Tasks by name, bound to their outputs.
        transform: Crop size and augmentation.
        schemes: Landmark schemes of ``FaceBatch.points``.
        seed: Seed of the augmentation.

    Raises:
        ConfigError: If a recipe crops to another size than the transform.
    """

    def __init__(
        self,
        sources: Sequence[Source],
        rows: Sequence[np.ndarray],
        tasks: Mapping[str, Task],
        transform: FaceTransform,
        schemes: Sequence[str] = (),
        seed: int = 0,
    ) -> None:
        for source in sources:
            if source.recipe is not None and source.recipe.size != transform.size:
                raise ConfigError(
                    f"{source.name}: the recipe {source.recipe.name} crops to {source.recipe.size} px, the model takes "
                    f"{transform.size} px; set prepare.size to the encoder's image size"
                )
        self.sources = list(sources)
        self.rows = [RowSet(part) for part in rows]
        self.tasks = dict(tasks)
        self.transform = transform
        self.schemes = tuple(dict.fromkeys(str(scheme) for scheme in schemes))
        self.seed = seed
        self.epoch = 0
        self._ends = np.cumsum([len(part) for part in self.rows])

    def __len__(self) -> int:
        return int(self._ends[-1]) if len(self._ends) else 0

    def set_epoch(self, epoch: int) -> None:
        """Set the epoch of samples that are asked for by plain integers; a ``BatchKey`` carries its own."""
        self.epoch = epoch

    def __getitem__(self, key: BatchKey | int) -> FaceBatch:
        if not isinstance(key, tuple):
            if not -len(self) <= key < len(self):
                raise IndexError(f"position {key} of {len(self)}")
            key = BatchKey(self.epoch, np.array([key % len(self)]))
        return self._loaded(*key)

    def __getitems__(self, keys: Sequence[int]) -> FaceBatch:
        return self._loaded(self.epoch, np.asarray(keys, np.int64))

    def _loaded(self, epoch: int, positions: np.ndarray) -> FaceBatch:
        try:
            return self.batch(epoch, positions)
        except AffectError as error:
            if get_worker_info() is None:
                raise
            raise SampleError(str(error)) from error

    def locate(self, positions: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
        """Return the index of the table and the row in it of each position, int64 ``(N,)`` each."""
        positions = np.asarray(positions, np.int64)
        source = np.searchsorted(self._ends, positions, side="right")
        row = np.empty(len(positions), np.int64)
        for k in np.unique(source):
            chosen = source == k
            row[chosen] = self.rows[k][positions[chosen] - (self._ends[k] - len(self.rows[k]))]
        return source, row

    def batch(self, epoch: int, positions: np.ndarray) -> FaceBatch:
        """Return the batch of ``positions`` ``(B,)`` as it looks in ``epoch``."""
        source, row = self.locate(positions)
        keys = sample_keys(self.seed, epoch, source, row)
        parts = [(k, np.flatnonzero(source == k)) for k in np.unique(source).tolist()]
        labelled = _gather([(self._labels(k, row[where]), where) for k, where in parts], len(row))
        if self.transform.still:
            motion, flipped = None, np.zeros(len(row), bool)
        else:
            motion, flipped = self.transform.matrices(keys)

        size = self.transform.size
        images = np.empty((len(row), size, size, 3), np.uint8)
        matrices = np.empty((len(row), 2, 3))
        for k, where in parts:
            pictures = open_pictures(self.sources[k].images, row[where])
            recipe = self.sources[k].recipe or whole_image(size)
            plain = crop_matrices(self.sources[k], row[where], pictures, size)
            matrices[where] = plain if motion is None else compose(motion[where], plain)
            factors = np.maximum(1 / np.maximum(scale_of(matrices[where]), 1e-6), 1).astype(np.int64).tolist()
            for picture, place, factor in zip(pictures, where.tolist(), factors, strict=True):
                render(picture, matrices[place], recipe, factor, images[place])
        stacked = {name: transform_points(matrices, part.target) for name, part in labelled.points.items()}
        if self.transform.augment:
            self._retouch(images, keys, matrices, flipped, stacked)
        self._turn(labelled.targets, matrices)
        return self._assemble(images, matrices, flipped, labelled, stacked, source, row)

    def _turn(self, targets: dict[str, Encoded], matrices: np.ndarray) -> None:
        """Let tasks whose labels turn with the image (``Task.turn``: the roll of the head) follow crop and motion."""
        turns = {name: turn for name in targets if (turn := getattr(self.tasks[name], "turn", None)) is not None}
        if turns:
            degrees = turned(matrices)
            targets.update({name: turn(targets[name], degrees) for name, turn in turns.items()})

    def _labels(self, index: int, rows: np.ndarray) -> _Labels:
        table = self.sources[index].table
        encoded = {name: task.encode(table, rows) for name, task in self.tasks.items()}
        # Landmark tasks read the same columns as the points of their scheme, and move with them.
        wanted = dict.fromkeys(self.schemes)
        points = {f"scheme {scheme}": Encoded(*read_points(table, scheme, rows)) for scheme in wanted}
        points.update({f"task {name}": part for name, part in encoded.items() if self.tasks[name].landmark_scheme})
        return _Labels({name: part for name, part in encoded.items() if f"task {name}" not in points}, points)

    def _scheme(self, key: str) -> str:
        kind, name = key.split(" ", 1)
        return name if kind == "scheme" else str(self.tasks[name].landmark_scheme)

    def _retouch(
        self,
        images: np.ndarray,
        keys: np.ndarray,
        matrices: np.ndarray,
        flipped: np.ndarray,
        points: dict[str, np.ndarray],
    ) -> None:
        """Augment the crops in place, and whatever moves with them."""
        moving = self.transform.moves
        stacked = np.concatenate(list(points.values()), 1) if moving and points else None
        for k, key in enumerate(keys.tolist()):
            image, motion, moved = self.transform.retouch(images[k], key, None if stacked is None else stacked[k])
            images[k] = image
            if motion is not None:
                matrices[k] = compose(motion, matrices[k])
                flipped[k] ^= mirrors(motion)
            if stacked is not None and moved is not None:
                stacked[k] = moved
        if stacked is not None:
            ends = np.cumsum([part.shape[1] for part in points.values()])
            points.update(zip(points, np.split(stacked, ends[:-1], axis=1), strict=True))

    def _assemble(
        self,
        images: np.ndarray,
        matrices: np.ndarray,
        flipped: np.ndarray,
        labelled: _Labels,
        points: dict[str, np.ndarray],
        source: np.ndarray,
        row: np.ndarray,
    ) -> FaceBatch:
        size = self.transform.size
        targets: dict[str, Tensor] = {}
        masks: dict[str, Tensor] = {}
        by_scheme: dict[str, Tensor] = {}
        point_masks: dict[str, Tensor] = {}
        for key, value in points.items():
            scheme = self._scheme(key)
            mask = swap_mirrored(labelled.points[key].mask, scheme, flipped)
            pixels = np.where(mask[..., None], swap_mirrored(value, scheme, flipped), 0).astype(np.float32)
            kind, name = key.split(" ", 1)
            if kind == "scheme":
                by_scheme[name], point_masks[name] = torch.from_numpy(pixels), torch.from_numpy(mask)
            else:
                mask_tensor = torch.from_numpy(mask)
                fractions = to_fractions(torch.from_numpy(pixels), size, size)
                targets[name], masks[name] = fractions * mask_tensor[..., None], mask_tensor
        for name, part in labelled.targets.items():
            target, mask = part
            if flipped.any():
                mirrored = self.tasks[name].flip(Encoded(target[flipped], mask[flipped]))
                target, mask = target.copy(), mask.copy()
                target[flipped], mask[flipped] = mirrored
            targets[name], masks[name] = torch.from_numpy(target), torch.from_numpy(mask)
        return FaceBatch(
            # Planes one after the other: normalising them is several times faster on a CPU than channels last.
            image=torch.from_numpy(images).permute(0, 3, 1, 2).contiguous(),
            targets={name: targets[name] for name in self.tasks},
            masks={name: masks[name] for name in self.tasks},
            points=by_scheme,
            point_masks=point_masks,
            matrix=torch.from_numpy(matrices.astype(np.float32)),
            source=torch.from_numpy(source),
            row=torch.from_numpy(row),
            flipped=torch.from_numpy(flipped),
        )


def _gather(parts: Sequence[tuple[_Labels, np.ndarray]], size: int) -> _Labels:
    """Return the labels of samples from several tables in the order of the batch."""
    if len(parts) == 1:
        return parts[0][0]

    def join(read: Sequence[dict[str, Encoded]]) -> dict[str, Encoded]:
        joined = {}
        for name in read[0]:
            target = np.empty((size, *read[0][name].target.shape[1:]), np.float32)
            mask = np.empty((size, *read[0][name].mask.shape[1:]), bool)
            for (_, where), some in zip(parts, read, strict=True):
                target[where], mask[where] = some[name]
            joined[name] = Encoded(target, mask)
        return joined

    return _Labels(join([part.targets for part, _ in parts]), join([part.points for part, _ in parts]))


def collate(batches: FaceBatch | Sequence[FaceBatch]) -> FaceBatch:
    """Return one batch: a batch as it is, or several joined."""
    if isinstance(batches, FaceBatch):
        return batches
    first = batches[0]
    joined: dict[str, Any] = {}
    for item in dataclasses.fields(FaceBatch):
        values = [getattr(batch, item.name) for batch in batches]
        if isinstance(values[0], dict):
            joined[item.name] = {key: torch.cat([value[key] for value in values]) for key in values[0]}
        else:
            joined[item.name] = torch.cat(values)
    return dataclasses.replace(first, **joined)
