# SPDX-License-Identifier: Apache-2.0
"""Faces that leave the frame, boxes without area, points far outside: cropped and scored as they are, or left out."""

from __future__ import annotations

import numpy as np
import pytest
import torch

from affect.data.datamodule import FaceDataModule
from affect.data.images import Source
from affect.data.placing import Placer
from affect.data.protocol import Protocol
from affect.data.table import FaceTable
from affect.data.transforms import FaceTransform
from affect.errors import DataError
from affect.geometry.alignment import CropRecipe, invert, transform_points
from affect.metrics import AlignmentError
from affect.tasks import Landmarks
from tests.data import samples
from tests.data.finders import RedSquares, photograph

SIZE = 32
BOX = CropRecipe(name="box", kind="box", size=SIZE, margin=0.1)

# Two good faces, one far out of the frame, three that cannot be cropped, one without a box.
BOXES = [[10, 10, 60, 60], [20, 20, 70, 70], [5000, -900, 5050, -850], [10, 10, 10, 60], [60, 60, 10, 10], [0, 0, 0, 0]]


def table() -> FaceTable:
    points = samples.points_68(0, 7, size=100)
    points[1, :3] = [[-4e4, 9e5], [3e4, -2e3], [1e6, 1e6]]
    points[2] += [5000, -900]
    points[4, 5] = np.nan
    boxes = np.array([*BOXES, [0, 0, 1, 1]], float)
    return FaceTable.from_columns(
        {
            "image": [f"{k}.png" for k in range(7)],
            "subject": [f"person{k}" for k in range(7)],
            "landmarks_68": points.reshape(7, -1),
            "box": (boxes, np.array([True] * 6 + [False])),
        }
    )


def module(faces: FaceTable, **augment: float) -> FaceDataModule:
    task = Landmarks("68", metrics=[AlignmentError("68")])
    source = Source("bad", faces, samples.DrawnImages(), recipe=BOX, group="subject")
    made = FaceDataModule(
        [source],
        {"landmarks": task},
        Protocol(test="all"),
        FaceTransform(SIZE, **augment),
        FaceTransform(SIZE),
        batch_size=4,
    )
    made.setup("test")
    return made


def test_boxes_without_area_are_left_out_and_counted() -> None:
    made = module(table())
    assert np.concatenate(made.part_rows("test")).tolist() == [0, 1, 2]
    said = str(made.summary())
    assert "no box to crop by" in said
    assert "4" in said.split("no box to crop by")[1][:8]


def test_faces_out_of_the_frame_and_points_far_outside_keep_their_labels() -> None:
    faces = table()
    made = module(faces)
    batch = next(iter(made.test_dataloader()))
    assert batch.row.tolist() == [0, 1, 2]
    assert all(torch.isfinite(array).all() for array in (batch.targets["landmarks"], batch.matrix))
    assert batch.masks["landmarks"].all()
    assert int(batch.image[2].max()) == 0  # nothing of the image is in the third crop
    pixels = batch.targets["landmarks"].numpy().astype(np.float64) * SIZE - 0.5
    back = transform_points(invert(batch.matrix.numpy()), pixels)
    stored = faces.numbers("landmarks_68", np.arange(3))[0].reshape(3, 68, 2)
    np.testing.assert_allclose(back, stored, rtol=1e-5, atol=0.05)
    metric = AlignmentError("68")
    metric.bind(["points"])
    target, mask = torch.from_numpy(back), batch.masks["landmarks"]
    found = metric.score(target + 5, target, mask)
    assert torch.isfinite(found["nme"])
    assert float(found["skipped"]) == 0


def test_a_table_without_any_box_to_crop_by_is_refused() -> None:
    faces = table()
    with pytest.raises(DataError, match="no row has the box that the crop needs"):
        module(faces.take(np.array([3, 4, 5, 6])))


def test_preparation_looks_past_boxes_without_area() -> None:
    """A row whose box has no area is about nobody in particular: the largest face is taken, as without a box."""
    squares = [(8, 8, 20), (60, 30, 40)]
    boxes = np.array([[60, 30, 100, 70], [30, 30, 30, 70], [8, 8, 28, 28], [4000, 4000, 4050, 4050]], float)
    images = [photograph(k, squares, size=(96, 128)) for k in range(4)]
    faces = FaceTable.from_columns({"image": list("abcd"), "box": boxes})
    placer = Placer(CropRecipe(kind="box", size=SIZE, margin=0.0), faces, RedSquares())
    placed = {
        place: how for place, _, how in placer.placed(iter(images), np.arange(4), np.zeros(4, int), ordered=False)
    }
    assert [placed[k].face for k in range(4)] == ["found", "found", "found", "centre"]
    assert placed[3].reason == "no face found overlaps the table's box"
    left = [placed[k].observation.box[0] for k in range(3)]
    assert left[0] == left[1]
    assert abs(left[2] - 7.5) < 1
    assert all(np.isfinite(placed[k].matrix).all() for k in range(4))
