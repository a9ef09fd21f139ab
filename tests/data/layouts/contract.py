# SPDX-License-Identifier: Apache-2.0
"""What every layout must satisfy; a subclass names the module and what is particular to the dataset."""

from __future__ import annotations

import os
import re
import shutil
from pathlib import Path
from types import ModuleType

import numpy as np
import pyarrow as pa
import pytest

from affect import labels
from affect.data import faces
from affect.data.dataset import FaceDataset
from affect.data.expected import Expected, measure
from affect.data.faces import FaceDials, FaceImages
from affect.data.images import FileImages, ImageReader, Source
from affect.data.layouts.common import Dressed, unchanged
from affect.data.table import FaceTable, declared_type
from affect.data.transforms import FaceTransform, swap_mirrored
from affect.errors import DataError
from tests.data.layouts.trees import IMAGES

DIALS = FaceDials(image_size=48, subjects=12, yaw=(-10, 10), occluder=0.0, missing_au=0.0)
COUNT = 60


class ChosenFaces:
    """Pictures of the built-in faces in the order of another table."""

    def __init__(self, rows: np.ndarray) -> None:
        self.reader, self.rows = FaceImages(DIALS, 7), rows

    def read(self, rows: np.ndarray) -> list[np.ndarray]:
        return self.reader.read(self.rows[rows])


@pytest.fixture(scope="session")
def drawn() -> FaceTable:
    """Labels of the built-in faces that trees are made of."""
    return FaceTable.from_arrow(faces.labels_table(DIALS, 7, COUNT), ".", {"dataset": "faces"})


class LayoutContract:
    """Set ``layout``; override ``read``/``images``/``write`` where they take arguments."""

    layout: ModuleType
    group = "subject"
    """Column that never straddles two official parts; None where parts may share people."""
    maskable: tuple[str, ...] = ()
    """Label columns in which the delivered files can express a missing cell, one by one."""
    masked_together: tuple[tuple[str, ...], ...] = ()
    """Columns that are missing together only."""
    expressions: tuple[str, ...] | None = None
    """Declared classes in the dataset's order."""
    tolerance = 1e-3
    """How exactly the files keep numbers (text with a few decimals)."""
    alien = "alien"

    def read(self, root: Path) -> FaceTable:
        return self.layout.read(root)

    def write(self, table: FaceTable, root: Path, images: ImageReader) -> None:
        self.layout.write(table, root, images)

    def images(self, table: FaceTable) -> ImageReader:
        make = getattr(self.layout, "images", None)
        return FileImages(table) if make is None else make(table)

    def dress(self, drawn: FaceTable) -> Dressed:
        return self.layout.dress(drawn)

    # ---------------------------------------------------------------------------------------------- fixtures

    @pytest.fixture(scope="class")
    @classmethod
    def dressed(cls, drawn) -> Dressed:
        return cls().dress(drawn)

    @pytest.fixture(scope="class")
    @classmethod
    def root(cls, dressed, tmp_path_factory) -> Path:
        folder = tmp_path_factory.mktemp("above") / "tree"
        cls().write(dressed.table, folder, ChosenFaces(dressed.rows))
        return folder

    @pytest.fixture(scope="class")
    @classmethod
    def table(cls, root) -> FaceTable:
        return cls().read(root)

    # ------------------------------------------------------------------------------------------------- tests

    def test_it_survives_a_round_trip(self, table, dressed):
        assert_same(dressed.table, table, self.tolerance)

    def test_every_row_is_there_in_declared_types(self, table, dressed):
        assert len(table) == len(dressed.table) == len(dressed.rows)
        for field in table.arrow.schema:
            assert declared_type(field.name) in (None, field.type)

    def test_reading_twice_gives_the_same_order(self, table, root):
        again = self.read(root)
        assert list(again.strings("image")[0]) == list(table.strings("image")[0])
        assert again.fingerprint == table.fingerprint

    def test_official_parts_are_disjoint(self, table):
        if self.group is None or "part" not in table.names:
            pytest.skip("no official parts, or parts that may share people")
        groups, known = table.strings(self.group)
        parts = table.strings("part")[0]
        assert known.all()
        owner: dict[str, str] = {}
        for group, part in zip(groups, parts, strict=True):
            assert owner.setdefault(group, part) == part

    def test_labels_are_named(self, table):
        if self.expressions is not None:
            assert table.expressions == self.expressions
        assert table.metadata["dataset"]
        assert table.metadata["label_source"]
        for name in table.names:
            if name.startswith("au") and name.endswith(("_occurrence", "_intensity")):
                assert int(name[2:4]) in labels.AU_NAMES

    def test_masks_are_exactly_where_cells_are_missing(self, dressed, tmp_path):
        if not (self.maskable or self.masked_together):
            pytest.skip("the files cannot say that a label is missing")
        random = np.random.default_rng(3)
        together = [*((name,) for name in self.maskable), *self.masked_together]
        planted = {}
        for names in together:
            hidden = random.random(len(dressed.table)) < 0.2
            for name in names:
                values, valid = dressed.table.numbers(name) if name != "expression" else dressed.table.strings(name)
                valid = valid & ~hidden
                planted[name] = pa.array(values, mask=~valid) if values.ndim == 1 else (values, valid)
        holes = dressed.table.with_columns(planted)
        self.write(holes, tmp_path / "tree", ChosenFaces(dressed.rows))
        assert_same(holes, self.read(tmp_path / "tree"), self.tolerance)

    def test_images_are_rgb_and_in_their_rows(self, table, dressed):
        rows = np.linspace(0, len(table) - 1, 6).astype(np.int64)
        stored, wanted = self.images(table).read(rows), ChosenFaces(dressed.rows).read(rows)
        for image, face in zip(stored, wanted, strict=True):
            assert image.dtype == np.uint8
            assert image.shape[2] == 3
            if self.grey:
                face = np.repeat(face.mean(2, keepdims=True), 3, 2)
            np.testing.assert_allclose(image.mean((0, 1)), face.mean((0, 1)), atol=self.colour)

    grey = False
    """Whether images are stored without colour."""
    colour = 8.0
    """By how much the mean of a colour may differ, in grey levels (compression)."""

    def test_landmarks_move_with_the_flip(self, table):
        schemes = [s for s in labels.SCHEMES.values() if s.column in table.names]
        if not schemes:
            pytest.skip("no landmarks")
        source = Source("sample", table, self.images(table), "image")
        names = [scheme.name for scheme in schemes]
        rows = [np.arange(len(table))]
        plain = FaceDataset([source], rows, {}, FaceTransform(40), names).batch(0, np.arange(4))
        mirrored = FaceDataset([source], rows, {}, FaceTransform(40, flip=1.0), names).batch(0, np.arange(4))
        for name in names:
            known = plain.point_masks[name].numpy()
            assert known.any()
            moved = plain.points[name].numpy() * [-1, 1] + [39, 0]
            swapped = swap_mirrored(moved, name, np.ones(4, bool))
            both = swap_mirrored(known, name, np.ones(4, bool))
            np.testing.assert_allclose(mirrored.points[name].numpy()[both], swapped[both], atol=0.01)

    def test_a_root_one_level_off_says_so(self, root):
        with pytest.raises(DataError, match=r"one level too high|not the root"):
            self.read(root.parent)
        inside = (
            next(entry for entry in sorted(root.iterdir()) if entry.is_dir())
            if any(entry.is_dir() for entry in root.iterdir())
            else None
        )
        if inside is not None:
            with pytest.raises(DataError, match=r"too low|not the root"):
                self.read(inside)

    def test_a_root_that_is_not_there_says_so(self, tmp_path):
        with pytest.raises(DataError, match="no such folder"):
            self.read(tmp_path / "nowhere")

    unread: tuple[str, ...] = ()
    """Beginnings of the files that are written and that this way of reading does not look at."""

    def test_a_stored_table_knows_whether_the_tree_changed(self, root, tmp_path):
        tree = shutil.copytree(root, tmp_path / "tree")
        table = self.read(tree)
        assert unchanged(table, tree)
        for name, path in kinds(tree).items():
            read = path.stat()
            # Written in place: no folder tells of it.
            os.utime(path, ns=(read.st_atime_ns, read.st_mtime_ns + 1))
            assert unchanged(table, tree) == name.startswith(self.unread), name
            os.utime(path, ns=(read.st_atime_ns, read.st_mtime_ns))
            assert unchanged(table, tree)
        image = tree / table.strings("image", np.array([len(table) // 2]))[0][0].partition("!")[0]
        image.unlink()
        assert not unchanged(table, tree)

    def test_expectations_can_be_measured(self, table):
        wanted = self.expected()
        assert wanted
        assert len({entry.key for entry in wanted}) == len(wanted)
        for entry in wanted:
            assert isinstance(entry, Expected)
            assert entry.source
            if entry.key != "size":
                measure(table, entry.key)

    def expected(self) -> tuple[Expected, ...]:
        return self.layout.expected()


def kinds(tree: Path) -> dict[str, Path]:
    """Return a file of each kind but single images, by its name below ``tree`` without numbers."""
    found: dict[str, Path] = {}
    for path in sorted(tree.rglob("*")):
        if path.is_file() and path.suffix.lower() not in IMAGES:
            found.setdefault(re.sub(r"\d+", "#", str(path.relative_to(tree))), path)
    return found


def assert_same(wanted: FaceTable, found: FaceTable, tolerance: float) -> None:
    """Assert that two tables have the same rows, columns, nulls and values."""
    assert list(found.strings("image")[0]) == list(wanted.strings("image")[0])
    assert found.names == wanted.names, found.names ^ wanted.names
    for name in sorted(wanted.names - {"image"}):
        a, b = wanted.column(name), found.column(name)
        np.testing.assert_array_equal(
            a.is_valid().to_numpy(zero_copy_only=False), b.is_valid().to_numpy(zero_copy_only=False), name
        )
        if pa.types.is_string(a.type):
            assert a.to_pylist() == b.to_pylist(), name
        else:
            np.testing.assert_allclose(found.numbers(name)[0], wanted.numbers(name)[0], atol=tolerance, err_msg=name)
