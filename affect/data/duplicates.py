# SPDX-License-Identifier: Apache-2.0
"""Near-duplicates: the same picture stored again, at another quality, size or brightness, or cropped a little.

Sets that were gathered from the web show one photograph several times. Where parts are split by image, its copies must
stay together. Four stages, each on what the one before left over:

1. a hash of 64 bits per picture (is each cell of an 8 x 9 grid brighter than its left neighbour?). Pairs whose hashes
   differ in at most ``RADIUS`` bits nearly always share two of eight bytes (always, up to six bits), so each of the 28
   pairs of bytes is sorted by once and only neighbours are compared;
2. the correlation of the pictures at 8 x 8 pixels;
3. at 16 x 16 pixels, for all pairs at once: how much of one picture remains when the other is shifted, zoomed and
   brightened to fit (one linear step);
4. for what is left, the same at 48 x 48 pixels with full registration. The fit has to be good *and* one frame has to
   lie inside the other: people who sit still for two photographs fit as well, but their heads move past both frames.

On the ORL photographs, ten of each of 40 people in one session, the closest two that stay apart differ by 0.008 and
copies that are cropped by up to 4 % on each side by at most 0.004; ``tests/data/test_duplicates.py`` has the cases.
Cropping changes the hash: of copies that lose up to 4 % at random on each side one in ten is missed, up to 6 % half.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Iterator
from contextlib import suppress
from itertools import combinations
from pathlib import Path

import cv2
import numpy as np
from scipy.sparse import coo_array
from scipy.sparse.csgraph import connected_components

from affect.data.headers import Progress, in_blocks
from affect.data.images import FileImages, ImageReader, Picture, open_pictures
from affect.data.stored import alone
from affect.data.table import FaceTable
from affect.files import replacing

VERSION = 1
"""Goes up when the same pictures would be grouped otherwise, so that stored groups are made anew."""

RADIUS = 8
"""Most bits in which the hashes of near-duplicates differ."""

SIDE = 48
"""Side of the pictures that are compared."""

SAME_FRAME, INSIDE, CROP = 0.006, 0.004, 0.05
"""Shares of a side: frames that differ by less are one; a cropped frame may stick out by so much, and cut off so much
on each side."""

COPY, CROPPED = 0.02, 0.005
"""Largest difference (1 - correlation of details) of pictures with one frame, and of a picture and its crop."""

FLAT = 4.0
"""Standard deviation in grey levels below which a picture shows nothing that could be recognised."""

LARGE_BUCKET, LARGE_GROUP = 256, 64
"""Sizes from which equal bytes, or chains of similar pictures, are not taken at their word: in a larger bucket each
hash is compared with so many neighbours in the order of hashes; of a larger group only its closest pairs are kept."""

_COARSEST, _COARSE = 8, 16
_ALIKE = 0.95
_COARSE_LIMIT = 0.08
_CHUNK = 4096
_ROUNDS = 5
_EDGE = 3
_SMALLEST = 2 * SIDE
_BITS = np.unpackbits(np.arange(65536, dtype=np.uint16).view(np.uint8).reshape(-1, 2), axis=1).sum(1).astype(np.uint8)


def near_duplicate_groups(
    images: ImageReader,
    count: int,
    cache: Path | None = None,
    progress: Progress | None = None,
    workers: int = 4,
) -> np.ndarray:
    """Return the group of each picture, int64 ``(N,)``: pictures with one number are near-duplicates.

    Groups are numbered by their first picture, and are a function of the pixels alone.

    Args:
        images: Reader of rows ``0`` to ``count - 1``.
        count: Number of pictures; 2.3 kB of memory each.
        cache: Folder that keeps the answer for readers of a table, by what the table holds and was read from. Processes
            that want one answer at the same time find it once: the others wait.
        progress: Called with the number of pictures that were just read.
        workers: Threads that decode plain files; readers of archives and videos keep state, so they get one.

    Raises:
        DataError: If a picture cannot be read.
    """
    stored = None if cache is None else _stored_path(images, count, cache)
    if stored is None:
        return _find_groups(images, count, progress, workers)
    if stored.is_file():
        return np.load(stored)
    with alone(stored):
        if stored.is_file():  # Another process found it while this one waited.
            return np.load(stored)
        groups = _find_groups(images, count, progress, workers)
        # A cache that cannot be written to costs time only.
        with suppress(OSError), replacing(stored) as part:
            np.save(part, groups)
    return groups


def _find_groups(images: ImageReader, count: int, progress: Progress | None, workers: int) -> np.ndarray:
    pictures = thumbnails(images, count, progress, workers)
    left, right = similar_pairs(hashes(pictures), RADIUS, np.flatnonzero(~_is_flat(pictures)))
    for close in (_are_alike, _nearly_fit):
        kept = close(pictures, left, right)
        left, right = left[kept], right[kept]
    found = [fit(pictures[a], pictures[b]) for a, b in zip(left.tolist(), right.tolist(), strict=True)]
    difference = np.array([one[0] for one in found], float)
    limit = np.array([one[1] for one in found], float)
    return join(count, left, right, difference, limit)


def _stored_path(images: ImageReader, count: int, folder: Path) -> Path | None:
    """Return the file that keeps the groups of a table's pictures; None for a reader without a table."""
    table = getattr(images, "table", None)
    if not isinstance(table, FaceTable) or len(table) != count:
        return None
    known = [table.fingerprint, str(table.root.absolute()), table.metadata.get("touched"), VERSION]
    digest = hashlib.sha256(json.dumps(known, sort_keys=True).encode()).hexdigest()[:16]
    return folder / f"near-duplicates-{digest}.npy"


def join(count: int, left: np.ndarray, right: np.ndarray, difference: np.ndarray, limit: np.ndarray) -> np.ndarray:
    """Return the groups ``(N,)`` that pairs with a difference of at most their limit join.

    Groups of more than ``LARGE_GROUP`` are joined anew by pairs with a quarter of the limit alone: a long chain of
    pictures, each a little different from the next, is no set of copies.
    """
    kept = difference <= limit
    groups = _components(count, left[kept], right[kept])
    large = np.bincount(groups, minlength=1)[groups] > LARGE_GROUP
    if large.any():
        kept &= ~large[left] | (difference <= limit / 4)
        groups = _components(count, left[kept], right[kept])
    return groups


def _components(count: int, left: np.ndarray, right: np.ndarray) -> np.ndarray:
    graph = coo_array((np.ones(len(left), bool), (left, right)), shape=(count, count))
    labels = connected_components(graph, directed=False)[1].astype(np.int64)
    _, first, inverse = np.unique(labels, return_index=True, return_inverse=True)
    rank = np.empty(len(first), np.int64)
    rank[np.argsort(first)] = np.arange(len(first))
    return rank[inverse.reshape(-1)]


# ------------------------------------------------------------------------------------------- small pictures


def thumbnails(images: ImageReader, count: int, progress: Progress | None = None, workers: int = 4) -> np.ndarray:
    """Return all pictures in grey and small, uint8 ``(N, SIDE, SIDE)``; large ones are decoded at a reduced size."""
    small = np.empty((count, SIDE, SIDE), np.uint8)
    start = 0

    def work(rows: np.ndarray) -> list[np.ndarray]:
        return [thumbnail(picture) for picture in open_pictures(images, rows)]

    many = workers if isinstance(images, FileImages) else 1
    for block in in_blocks(work, np.arange(count), many, progress):
        small[start : start + len(block)] = block
        start += len(block)
    return small


def thumbnail(picture: Picture) -> np.ndarray:
    """Return a picture in grey, uint8 ``(SIDE, SIDE)``, blurred so that it can be shifted by fractions of a pixel."""
    reduce = next((r for r in (8, 4, 2) if min(picture.size) >= r * _SMALLEST), 1)
    grey = cv2.cvtColor(picture.pixels(reduce), cv2.COLOR_RGB2GRAY)
    way = cv2.INTER_AREA if min(grey.shape) >= _SMALLEST else cv2.INTER_LINEAR
    twice = cv2.GaussianBlur(cv2.resize(grey, (2 * SIDE, 2 * SIDE), interpolation=way).astype(np.float32), (0, 0), 1.6)
    return np.round(cv2.resize(twice, (SIDE, SIDE), interpolation=cv2.INTER_AREA)).astype(np.uint8)


def _is_flat(pictures: np.ndarray) -> np.ndarray:
    flat = np.empty(len(pictures), bool)
    for start in range(0, len(pictures), _CHUNK):
        block = pictures[start : start + _CHUNK].reshape(-1, SIDE * SIDE)
        flat[start : start + _CHUNK] = block.std(1, dtype=np.float32) < FLAT
    return flat


def hashes(pictures: np.ndarray) -> np.ndarray:
    """Return the difference hash of each picture, uint64 ``(N,)``."""
    found = np.empty(len(pictures), np.uint64)
    for k, picture in enumerate(pictures):
        cells = cv2.resize(picture, (9, 8), interpolation=cv2.INTER_AREA)
        found[k] = np.packbits(cells[:, 1:] > cells[:, :-1]).view(np.uint64)[0]
    return found


def similar_pairs(values: np.ndarray, radius: int, rows: np.ndarray | None = None) -> tuple[np.ndarray, np.ndarray]:
    """Return the pairs of hashes that differ in at most ``radius`` bits, as rows ``(P,)`` and larger rows ``(P,)``.

    All pairs up to 6 bits are found, and nearly all beyond, except that in buckets above ``LARGE_BUCKET`` only
    neighbours are compared.

    Args:
        values: Hashes, uint64 ``(N,)``.
        radius: Bits.
        rows: Rows to compare; None compares all.
    """
    rows = np.arange(len(values)) if rows is None else rows
    chosen = values[rows]
    data = chosen.view(np.uint8).reshape(-1, 8)
    codes = [np.empty(0, np.int64)]
    for first, second in combinations(range(8), 2):
        key = data[:, first].astype(np.uint16) << 8 | data[:, second]
        order = np.lexsort((chosen, key))
        found = [a * len(values) + b for a, b in _neighbours(key[order], chosen[order], rows[order], radius)]
        codes.append(np.unique(np.concatenate(found)) if found else codes[0])
    pairs = np.unique(np.concatenate(codes))
    return pairs // max(len(values), 1), pairs % max(len(values), 1)


def _neighbours(
    key: np.ndarray, values: np.ndarray, rows: np.ndarray, radius: int
) -> Iterator[tuple[np.ndarray, np.ndarray]]:
    """Give pairs of rows with equal keys, by their distance in the order of keys."""
    active = np.arange(len(key))
    for distance in range(1, LARGE_BUCKET + 1):
        active = active[active + distance < len(key)]
        active = active[key[active] == key[active + distance]]
        if not len(active):
            return
        close = active[_distance(values[active], values[active + distance]) <= radius]
        a, b = rows[close], rows[close + distance]
        yield np.minimum(a, b), np.maximum(a, b)


def _distance(a: np.ndarray, b: np.ndarray) -> np.ndarray:
    return _BITS[(a ^ b).view(np.uint16)].reshape(-1, 4).sum(1)


# -------------------------------------------------------------------------------------------------- fitting


def _are_alike(pictures: np.ndarray, left: np.ndarray, right: np.ndarray) -> np.ndarray:
    pool = SIDE // _COARSEST
    small = np.empty((len(pictures), _COARSEST**2), np.float32)
    for start in range(0, len(pictures), _CHUNK):
        block = pictures[start : start + _CHUNK].reshape(-1, _COARSEST, pool, _COARSEST, pool)
        small[start : start + _CHUNK] = block.mean((2, 4), dtype=np.float32).reshape(-1, _COARSEST**2)
    small -= small.mean(1, keepdims=True)
    small /= np.maximum(np.linalg.norm(small, axis=1, keepdims=True), 1e-6)
    alike = np.empty(len(left), bool)
    for start in range(0, len(left), _CHUNK):
        a, b = (small[rows[start : start + _CHUNK]] for rows in (left, right))
        alike[start : start + _CHUNK] = np.einsum("ij,ij->i", a, b) >= _ALIKE
    return alike


def _nearly_fit(pictures: np.ndarray, left: np.ndarray, right: np.ndarray) -> np.ndarray:
    return coarse_differences(pictures, left, right) <= _COARSE_LIMIT


def coarse_differences(pictures: np.ndarray, left: np.ndarray, right: np.ndarray) -> np.ndarray:
    """Return the share of the variance of ``right`` that remains after ``left`` was fitted by one linear step ``(P,)``.

    The step frees shift, zoom along both axes and contrast. Brightness and its quadratic course over the picture are
    taken out before: where light falls from one side, that would be most of the variance of any two faces.
    """
    remaining = np.empty(len(left))
    pool = SIDE // _COARSE
    inner = slice(1, -1)
    line = np.arange(_COARSE, dtype=np.float32) - (_COARSE - 1) / 2
    x, y = np.meshgrid(line[inner], line[inner])
    course = np.linalg.qr(np.stack([np.ones_like(x), x, y, x * x, x * y, y * y], 2).reshape(-1, 6))[0]

    def flattened(term: np.ndarray) -> np.ndarray:
        values = term[:, inner, inner].reshape(len(term), -1)
        return values - (values @ course) @ course.T

    for start in range(0, len(left), _CHUNK):
        a, b = (
            pictures[rows[start : start + _CHUNK]]
            .reshape(-1, _COARSE, pool, _COARSE, pool)
            .mean((2, 4), dtype=np.float32)
            for rows in (left, right)
        )
        down, across = np.gradient(a, axis=(1, 2))
        terms = (across, across * line, down, down * line[:, None], a)
        design = np.stack([flattened(term) for term in terms], 2).astype(np.float64)
        target = flattened(b).astype(np.float64)
        normal = design.swapaxes(1, 2) @ design
        # A trace of regularisation keeps pictures without any gradient solvable.
        normal += np.eye(5) * (1e-6 * np.trace(normal, axis1=1, axis2=2)[:, None, None] + 1e-9)
        solved = np.linalg.solve(normal, design.swapaxes(1, 2) @ target[:, :, None])
        rest = target - (design @ solved)[:, :, 0]
        remaining[start : start + _CHUNK] = (rest**2).mean(1) / np.maximum((target**2).mean(1), 1e-6)
    return remaining


_LINE = np.arange(SIDE, dtype=np.float32) - (SIDE - 1) / 2
_INNER = (slice(_EDGE, -_EDGE), slice(_EDGE, -_EDGE))


def fit(left: np.ndarray, right: np.ndarray) -> tuple[float, float]:
    """Return how much two small pictures differ when one is registered to the other, and what they may differ by.

    The difference is 1 - correlation of their details (what a blur of three pixels removes), at the best of a few
    steps of Lucas and Kanade (1981) over shift, zoom along both axes, contrast and brightness. The limit depends on how
    their frames lie to each other: 0 for frames of which none holds the other.
    """
    a, b = left.astype(np.float32), right.astype(np.float32)
    details = _details(b)
    matrix = np.array([[1, 0, 0], [0, 1, 0]], np.float32)
    best, frame = np.inf, matrix
    for _ in range(_ROUNDS + 1):
        moved = cv2.warpAffine(
            a, matrix, (SIDE, SIDE), flags=cv2.INTER_CUBIC | cv2.WARP_INVERSE_MAP, borderMode=cv2.BORDER_REPLICATE
        )
        difference = 1 - _correlation(_details(moved), details)
        if difference < best:
            best, frame = difference, matrix
        if best <= COPY / 8 and frame[0, 0] == 1 and not frame[:, 2].any():
            break  # The same picture as it is.
        matrix = _step(matrix, moved, b)
    return best, _limit(frame)


def _step(matrix: np.ndarray, moved: np.ndarray, target: np.ndarray) -> np.ndarray:
    down, across = np.gradient(moved)
    terms = (across, across * _LINE, down, down * _LINE[:, None], moved, np.ones_like(moved))
    design = np.stack([term[_INNER].reshape(-1) for term in terms], 1).astype(np.float64)
    normal = design.T @ design
    normal += np.eye(6) * (1e-9 * np.trace(normal) + 1e-9)
    x, zoom_x, y, zoom_y, gain, _ = np.linalg.solve(normal, design.T @ target[_INNER].reshape(-1).astype(np.float64))
    gain = gain if abs(gain) > 0.2 else 1.0
    x, y = np.clip([x / gain, y / gain], -2, 2)
    zoom_x, zoom_y = np.clip([zoom_x / gain, zoom_y / gain], -0.1, 0.1)
    centre = (SIDE - 1) / 2
    change = [[zoom_x, 0, x - zoom_x * centre], [0, zoom_y, y - zoom_y * centre]]
    return (matrix + np.array(change)).astype(np.float32)


def _limit(frame: np.ndarray) -> float:
    """Return the largest difference of near-duplicates whose frames lie as ``frame`` says."""
    low, high = -0.5, SIDE - 0.5
    scale, shift = frame[[0, 1], [0, 1]], frame[:, 2]
    # Positive where the right frame lies inside the left one, as a share of the side.
    inside = np.concatenate([scale * low + shift - low, high - (scale * high + shift)]) / SIDE
    if np.abs(inside).max() <= SAME_FRAME:
        return COPY
    holds = inside.min() >= -INSIDE or inside.max() <= INSIDE
    return CROPPED if holds and np.abs(inside).max() <= CROP else 0.0


def _details(picture: np.ndarray) -> np.ndarray:
    return (picture - cv2.GaussianBlur(picture, (0, 0), 3))[_INNER]


def _correlation(a: np.ndarray, b: np.ndarray) -> float:
    return float((a * b).sum() / max(np.sqrt(float((a * a).sum()) * float((b * b).sum())), 1e-9))
