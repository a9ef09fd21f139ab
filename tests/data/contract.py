# SPDX-License-Identifier: Apache-2.0
"""What every reader of a dataset must satisfy; a subclass supplies the tree on disk and what is in it."""

from __future__ import annotations

import numpy as np
import pyarrow as pa
import pytest

from affect.data.dataset import FaceDataset
from affect.data.images import FileImages, Source
from affect.data.protocol import Protocol, assign
from affect.data.table import FaceTable, declared_type
from affect.data.transforms import FaceTransform
from affect.tasks.base import Task


class ReaderContract:
    """Subclass with fixtures ``faces`` (the table that was read), ``tasks`` and the number of ``rows``."""

    rows: int
    group: str = "subject"
    protocol = Protocol(folds=2, validation_fraction=0.3)

    @pytest.fixture
    def faces(self, tmp_path) -> FaceTable:
        raise NotImplementedError

    @pytest.fixture
    def tasks(self) -> dict[str, Task]:
        raise NotImplementedError

    @pytest.fixture
    def source(self, faces) -> Source:
        return Source("sample", faces, FileImages(faces), self.group)

    def test_it_has_every_row_in_declared_types(self, faces):
        assert len(faces) == self.rows
        for field in faces.arrow.schema:
            assert declared_type(field.name) in (None, field.type)
            assert faces.arrow[field.name].num_chunks == 1

    def test_every_image_exists(self, faces):
        assert len(FileImages(faces).missing()) == 0

    def test_labels_lie_in_their_ranges(self, faces, tasks):
        for task in tasks.values():
            task.bind([faces])
            task.check(faces)

    def test_a_missing_label_is_masked_and_zero(self, faces, tasks):
        masked = 0
        for task in tasks.values():
            task.bind([faces])
            target, mask = task.encode(faces)
            missing = ~mask if target.ndim == mask.ndim else np.repeat(~mask[..., None], 2, -1)
            assert (target[missing] == 0).all()
            masked += int(missing.sum())
        assert masked > 0, "the fixture should have a missing label"

    def test_rows_are_read_alike_alone_and_together(self, faces, tasks):
        order = np.random.default_rng(0).permutation(len(faces))[:5]
        for task in tasks.values():
            task.bind([faces])
            whole, some = task.encode(faces), task.encode(faces, order)
            np.testing.assert_array_equal(whole.target[order], some.target)
            np.testing.assert_array_equal(whole.mask[order], some.mask)

    def test_no_group_lies_in_two_parts(self, source):
        parts = assign(source, self.protocol)
        names, _ = source.table.strings(source.group)
        seen = [set(names[rows]) for rows in parts.values()]
        assert sum(len(part) for part in seen) == len(set().union(*seen))

    def test_it_survives_a_round_trip(self, faces, tmp_path):
        again = faces.save(tmp_path / "again" / "table.arrow")
        assert again.arrow.equals(faces.arrow)
        assert again.fingerprint == faces.fingerprint

    def test_mirroring_twice_gives_the_labels_back(self, source, tasks):
        faces = source.table
        for task in tasks.values():
            task.bind([faces])
        rows = [np.arange(len(faces))]
        plain = FaceDataset([source], rows, tasks, FaceTransform(32)).batch(0, np.arange(4))
        mirrored = FaceDataset([source], rows, tasks, FaceTransform(32, flip=1.0)).batch(0, np.arange(4))
        assert mirrored.flipped.all()
        np.testing.assert_allclose(mirrored.image.numpy()[..., ::-1], plain.image.numpy(), atol=2)
        for name, task in tasks.items():
            assert mirrored.masks[name].sum() == plain.masks[name].sum()
            if task.landmark_scheme is None:
                target = mirrored.targets[name].numpy()
                back = task.flip(type(task.encode(faces))(target, mirrored.masks[name].numpy()))
                np.testing.assert_array_equal(back.target, plain.targets[name].numpy())

    def test_columns_are_arrow(self, faces):
        assert isinstance(faces.arrow, pa.Table)
