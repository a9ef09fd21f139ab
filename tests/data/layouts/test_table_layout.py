# SPDX-License-Identifier: Apache-2.0
"""A user's own table: spelling, line endings, missing cells and every error line of the reader."""

from __future__ import annotations

import logging

import numpy as np
import pytest

from affect.data.layouts import table as layout
from affect.data.table import FaceTable
from affect.errors import ConfigError, DataError
from affect.tasks.kinds import AUOccurrence, Expression, HeadPose, Landmarks, ValenceArousal
from tests.data import samples
from tests.data.contract import ReaderContract


def images(root, names):
    for k, name in enumerate(names):
        samples.write_image(root / name, samples.smooth_image(k))


def write(path, text, encoding="utf-8", newline="\n"):
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_bytes(text.replace("\n", newline).encode(encoding))
    return path


class _Written(ReaderContract):
    rows = 24
    ending = ".csv"

    @pytest.fixture
    def faces(self, tmp_path):
        made = samples.table(self.rows, tmp_path)
        images(tmp_path, made.strings("image")[0])
        layout.write(made, tmp_path / f"labels{self.ending}")
        return layout.read(tmp_path / f"labels{self.ending}")

    @pytest.fixture
    def tasks(self):
        return {
            "au": AUOccurrence(),
            "expression": Expression(),
            "va": ValenceArousal(),
            "pose": HeadPose(),
            "points": Landmarks("68"),
        }


class TestCsv(_Written):
    """The contract on a CSV file."""


class TestParquet(_Written):
    """The contract on a Parquet file."""

    ending = ".parquet"


class TestArrow(_Written):
    """The contract on an Arrow file."""

    ending = ".arrow"


@pytest.mark.parametrize("newline", ["\n", "\r\n"])
@pytest.mark.parametrize("encoding", ["utf-8", "utf-8-sig"])
@pytest.mark.parametrize("delimiter", [",", ";", "\t"])
def test_csv_as_people_have_it(tmp_path, newline, encoding, delimiter, caplog):
    text = " image , subject,valence,expression,au12_occurrence,camera\n"
    text += 'a.png,007, 0.5 ,Happy,1,"front, left"\n\nb.png,,NaN,,,\n'
    if delimiter != ",":
        text = text.replace(", left", " left").replace(",", delimiter)
    path = write(tmp_path / "labels.csv", text, encoding, newline)
    images(tmp_path, ["a.png", "b.png"])
    with caplog.at_level(logging.WARNING):
        faces = layout.read(path)
    assert not caplog.records
    assert faces.strings("image")[0].tolist() == ["a.png", "b.png"]
    assert faces.strings("subject")[0].tolist() == ["007", ""]
    values, valid = faces.numbers("valence")
    assert (values.tolist(), valid.tolist()) == ([0.5, 0.0], [True, False])
    assert faces.expressions == ("happiness",)
    assert faces.strings("expression")[1].tolist() == [True, False]
    assert faces.numbers("au12_occurrence")[1].tolist() == [True, False]
    assert faces.root == tmp_path


def test_expressions_get_their_canonical_names(tmp_path):
    images(tmp_path, ["a.png"])
    path = write(
        tmp_path / "t.csv",
        "image,expression,expression_Happy,expression_angry,target_expression\na.png,SAD,0.2,0.8,Joy\n",
    )
    faces = layout.read(path)
    assert {"expression_happiness", "expression_anger"} <= faces.names
    assert faces.strings("expression")[0].tolist() == ["sadness"]
    assert faces.strings("target_expression")[0].tolist() == ["happiness"]
    path = write(tmp_path / "u.csv", "image,expression_Happy,expression_joy\na.png,0.2,0.8\n")
    with pytest.raises(DataError, match="column expression_happiness occurs twice"):
        layout.read(path)


def test_an_index_column_without_a_name_is_left_out(tmp_path):
    images(tmp_path, ["a.png"])
    faces = layout.read(write(tmp_path / "t.csv", ",image,valence\n0,a.png,0.5\n"))
    assert faces.names == {"image", "valence"}


def test_a_column_that_changes_its_mind_is_text(tmp_path):
    """Undeclared columns never fail: the first rows may look like numbers."""
    names = [f"{k}.png" for k in range(3)]
    images(tmp_path, names)
    faces = layout.read(write(tmp_path / "t.csv", "image,note\n0.png,1\n1.png,2\n2.png,lost\n"))
    assert faces.strings("note")[0].tolist() == ["1", "2", "lost"]


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("image,valence\na.png,0.5\n\nb.png,high\n", r"t\.csv, line 4, column valence: 'high' is not a number"),
        ("image,frame\na.png,1.5\n", r"t\.csv, line 2, column frame: '1\.5' is not a whole number"),
        ('image,valence\na.png,"0,5"\n', r"line 2, column valence: '0,5' is not a number"),
        ("image,valence\na.png,0.5\nb.png\n", r"t\.csv, line 3: 1 cells, the header has 2"),
        ("image,landmarks_5_x0,landmarks_5_y0\na.png,1,x\n", r"line 2, column landmarks_5_y0: 'x' is not a number"),
        ("image,landmarks_5_x0,landmarks_5_y0\na.png,1,2\n", r"column landmarks_5_x1 is missing beside"),
        ("", r"t\.csv, line 1: no header"),
        ("image,valence\n", r"t\.csv: the table has no rows"),
        ("image,valence,valence\na.png,1,1\n", r"t\.csv, line 1: column valence occurs more than once"),
        ("picture,valence\na.png,1\n", r"t\.csv: the table has no column image"),
        ("image,valence\n,1\n", r"t\.csv: column image, row 0: no path"),
    ],
)
def test_what_is_wrong_and_where(tmp_path, text, message):
    with pytest.raises(DataError, match=message) as caught:
        layout.read(write(tmp_path / "t.csv", text), check_images=False)
    assert "\n" not in str(caught.value)


def test_other_encodings_are_refused(tmp_path):
    (tmp_path / "t.csv").write_bytes("image,subject\na.png,Zoë\n".encode("latin-1"))
    with pytest.raises(DataError, match="not UTF-8"):
        layout.read(tmp_path / "t.csv", check_images=False)
    (tmp_path / "u.csv").write_bytes("image,Zoë\na.png,1\n".encode("latin-1"))
    with pytest.raises(DataError, match="line 1: not UTF-8"):
        layout.read(tmp_path / "u.csv", check_images=False)


def test_missing_files_and_endings(tmp_path):
    with pytest.raises(DataError, match=r"no table at .*none\.csv"):
        layout.read(tmp_path / "none.csv")
    with pytest.raises(ConfigError, match=r"unknown ending '\.xlsx'"):
        layout.read(tmp_path / "labels.xlsx")
    with pytest.raises(ConfigError, match=r"unknown ending '\.xlsx'"):
        layout.write(samples.table(3), tmp_path / "labels.xlsx")


def test_missing_images_are_counted_and_listed(tmp_path):
    names = [f"{folder}/{k}.png" for folder in "ab" for k in range(10)]
    images(tmp_path, names[:5])
    path = write(tmp_path / "t.csv", "image,subject\n" + "".join(f"{name},x\n" for name in names))
    with pytest.raises(DataError, match=r"15 of 20 image files are missing: a/5\.png, ") as caught:
        layout.read(path)
    assert str(caught.value).count(".png") == 10
    assert "…" in str(caught.value)
    assert len(layout.read(path, check_images=False)) == 20


def test_the_root_may_lie_elsewhere(tmp_path):
    images(tmp_path / "photos", ["a.png"])
    path = write(tmp_path / "labels" / "t.csv", "image,subject\na.png,x\n")
    assert layout.read(path, tmp_path / "photos").root == tmp_path / "photos"


def test_without_a_subject_it_warns(tmp_path, caplog):
    images(tmp_path, ["a.png"])
    with caplog.at_level(logging.WARNING):
        layout.read(write(tmp_path / "t.csv", "image,valence\na.png,0.5\n"))
    assert "split by image" in caplog.text


def test_predictions_can_be_read_back(tmp_path):
    """A predictions table is a face table: predicted columns under label names, true labels behind ``target_``."""
    made = FaceTable.from_columns(
        {
            "image": ["a.png", "b.png"],
            "group": ["x", "y"],
            "row": np.array([4, 2]),
            "expression": ["fear", "anger"],
            "expression_fear": np.array([0.7, 0.1]),
            "expression_anger": np.array([0.3, 0.9]),
            "target_expression": ["fear", None],
            "landmarks_5": np.ones((2, 10), np.float32),
            "target_landmarks_5": (np.ones((2, 10), np.float32), np.array([True, False])),
        },
        tmp_path,
        {"expressions": ["fear", "anger"]},
    )
    images(tmp_path, ["a.png", "b.png"])
    for name in ("p.parquet", "p.csv"):
        layout.write(made, tmp_path / name)
        faces = layout.read(tmp_path / name)
        assert {n: faces.arrow[n].to_pylist() for n in faces.names} == {
            n: made.arrow[n].to_pylist() for n in made.names
        }
        task = Expression(["fear", "anger"])
        task.bind([faces])
        np.testing.assert_allclose(task.read_values(faces), [[0.7, 0.3], [0.1, 0.9]], rtol=1e-6)
        encoded = task.encode(faces.truth())
        assert encoded.target.tolist() == [[1, 0], [0, 0]]
        assert encoded.mask.tolist() == [[True, True], [False, False]]
