# SPDX-License-Identifier: Apache-2.0
"""RAF-DB in its official layout: both subsets, both kinds of images, and every trap of the files."""

from __future__ import annotations

import numpy as np
import pyarrow as pa
import pytest

from affect import labels
from affect.data.expected import measure
from affect.data.images import FileImages
from affect.data.layouts import rafdb
from affect.errors import ConfigError, DataError
from tests.data.layouts.contract import DIALS, ChosenFaces, LayoutContract, assert_same

LIST = "basic/EmoLabel/list_patition_label.txt"


class RafdbContract(LayoutContract):
    layout = rafdb
    group = None
    maskable = ("attribute_male",)
    subset, pictures = "basic", "aligned"

    def read(self, root):
        return rafdb.read(root, self.subset, self.pictures)

    def dress(self, drawn):
        return rafdb.dress(drawn, self.subset, self.pictures)

    def expected(self):
        return rafdb.expected(self.subset, self.pictures)


class TestBasicAligned(RafdbContract):
    expressions = labels.EXPRESSION_ORDERS["rafdb"]

    def test_points_of_the_original_images_never_come_with_aligned_ones(self, root, table):
        assert any((root / "basic/Annotation/manual").iterdir())
        assert not {"landmarks_5", "box"} & table.names

    def test_parts_and_padding_of_ids(self, table):
        images, parts = table.strings("image")[0], table.strings("part")[0]
        assert images[0] == "basic/Image/aligned/train_00001_aligned.jpg"
        assert images[parts == "test"][0] == "basic/Image/aligned/test_0001_aligned.jpg"
        assert set(parts) == {"train", "test"}
        for part in ("train", "test"):
            assert len(set(table.strings("expression")[0][parts == part])) >= 2

    def test_the_list_is_written_like_the_official_one(self, root, table):
        text = (root / LIST).read_bytes()
        assert text.startswith(b"train_00001.jpg ")
        assert not text.endswith(b"\n")
        assert len(text.split(b"\n")) == len(table)

    def test_attributes_are_named(self, table):
        assert set(table.strings("race")[0]) <= set(rafdb.RACES)
        assert set(table.strings("age_group")[0]) <= set(rafdb.AGE_GROUPS)
        male, known = table.numbers("attribute_male")
        assert 0 < known.sum() < len(table)
        assert set(male[known]) == {0, 1}


class TestBasicOriginal(RafdbContract):
    pictures = "original"
    maskable = ("attribute_male", "landmarks_5", "box")
    expressions = labels.EXPRESSION_ORDERS["rafdb"]

    def test_points_lie_on_the_drawn_faces(self, table, dressed):
        points, known = table.numbers("landmarks_5")
        box = table.numbers("box")[0]
        assert known.all()
        points = points.reshape(-1, 5, 2)
        assert (points[:, 0, 0] < points[:, 1, 0]).all()
        centre = points.mean(1)
        assert ((box[:, :2] < centre) & (centre < box[:, 2:])).all()


class TestCompound(RafdbContract):
    subset = "compound"
    expressions = labels.RAFDB_COMPOUND


class TestCompoundOriginal(RafdbContract):
    subset, pictures = "compound", "original"
    maskable = ("attribute_male", "landmarks_5", "box")
    expressions = labels.RAFDB_COMPOUND


# ------------------------------------------------------------------------------------------------------- traps


@pytest.fixture
def tree(tmp_path):
    """A tree by hand, as datasets.md asks: 14 training and 7 test images, one missing, no newline at the list's end."""
    lines = [f"train_{k:05d}.jpg {(k - 1) % 7 + 1}" for k in range(1, 15)]
    lines += [f"test_{k:04d}.jpg {k}" for k in range(1, 8)]
    root = tmp_path / "RAF-DB"
    for folder in ("EmoLabel", "Image/aligned", "Image/original", "Annotation/manual", "Annotation/boundingbox"):
        (root / "basic" / folder).mkdir(parents=True)
    (root / LIST).write_text("\n".join(lines))
    for k, line in enumerate(lines):
        stem = line.split(".")[0]
        for name in (f"aligned/{stem}_aligned.jpg", f"original/{stem}.jpg"):
            (root / "basic/Image" / name).write_bytes(b"\xff\xd8\xff")
        points = "10.5\t20\n30 21.5\n20\t30\n12\t40\n28\t41\n"
        manual = root / f"basic/Annotation/manual/{stem}_manu_attri.txt"
        manual.write_text(points + f"{k % 3}\n{k % 3}\n{k % 5}\n")
        (root / f"basic/Annotation/boundingbox/{stem}_boundingbox.txt").write_text("1.5 2.5 90 101.25 \n")
    (root / "basic/Image/aligned/train_00003_aligned.jpg").unlink()
    return root


def edit(path, old, new):
    text = path.read_text()
    assert old in text
    path.write_text(text.replace(old, new, 1))


class TestFiles:
    def test_labels_by_name_and_one_image_missing(self, tree):
        table = rafdb.read(tree)
        assert len(table) == 20
        assert table.metadata["skipped"] == {"image is missing": 1}
        assert table.metadata["skipped_examples"] == {"image is missing": ["train_00003"]}
        named = dict(zip(table.strings("image")[0], table.strings("expression")[0], strict=True))
        order = ["surprise", "fear", "disgust", "happiness", "sadness", "anger", "neutral"]
        assert [named[f"basic/Image/aligned/test_000{k}_aligned.jpg"] for k in range(1, 8)] == order
        assert measure(table, "rows/part=train") == 13

    def test_annotations_of_the_originals(self, tree):
        table = rafdb.read(tree, pictures="original")
        assert len(table) == 21
        points = table.numbers("landmarks_5")[0].reshape(-1, 5, 2)
        np.testing.assert_allclose(points[7], [[10.5, 20], [30, 21.5], [20, 30], [12, 40], [28, 41]])
        np.testing.assert_allclose(table.numbers("box")[0][3], [1.5, 2.5, 90, 101.25])
        male, known = table.numbers("attribute_male")
        assert male[:3].tolist() == [1, 0, 0]
        assert known[:3].tolist() == [True, True, False]
        assert table.strings("race")[0][:3].tolist() == ["caucasian", "african-american", "asian"]
        assert table.strings("age_group")[0][:5].tolist() == ["0-3", "4-19", "20-39", "40-69", "70+"]
        assert not table.metadata["notes"]

    def test_crlf_byte_order_mark_and_blank_lines(self, tree):
        before = rafdb.read(tree)
        text = (tree / LIST).read_text()
        (tree / LIST).write_bytes(("\ufeff" + text.replace("\n", "\r\n\r\n") + "\r\n").encode())
        assert rafdb.read(tree).fingerprint == before.fingerprint

    def test_other_padding_is_the_same_number(self, tree):
        folder = tree / "basic/Image/aligned"
        (folder / "test_0002_aligned.jpg").rename(folder / "test_00002_aligned.png")
        assert "basic/Image/aligned/test_00002_aligned.png" in rafdb.read(tree).strings("image")[0]
        (folder / "test_2_aligned.jpg").write_bytes(b"")
        with pytest.raises(DataError, match=r"test_00002_aligned\.png and test_2_aligned\.jpg are the same number"):
            rafdb.read(tree)

    def test_images_without_a_label_are_noted(self, tree):
        (tree / "basic/Image/aligned/test_0099_aligned.jpg").write_bytes(b"")
        (tree / "basic/Image/aligned/Thumbs.db").write_bytes(b"")
        assert any("1 images of" in note for note in rafdb.read(tree).metadata["notes"])

    def test_an_image_without_annotations_has_null_cells(self, tree):
        (tree / "basic/Annotation/manual/train_00002_manu_attri.txt").unlink()
        (tree / "basic/Annotation/boundingbox/train_00004_boundingbox.txt").unlink()
        table = rafdb.read(tree, pictures="original")
        assert np.flatnonzero(~table.numbers("landmarks_5")[1]).tolist() == [1]
        assert np.flatnonzero(~table.strings("race")[1]).tolist() == [1]
        assert np.flatnonzero(~table.strings("age_group")[1]).tolist() == [1]
        assert np.flatnonzero(~table.numbers("box")[1]).tolist() == [3]
        assert any("manual (first: train_00002)" in note for note in table.metadata["notes"])

    def test_without_annotation_folders(self, tree):
        for folder in ("manual", "boundingbox"):
            for path in (tree / "basic/Annotation" / folder).iterdir():
                path.unlink()
        table = rafdb.read(tree, pictures="original")
        assert table.names == {"image", "part", "expression"}
        assert sum("there is no basic/Annotation" in note for note in table.metadata["notes"]) == 2

    def test_five_equal_points_are_none_and_an_empty_box_is_missing(self, tree):
        edit(tree / "basic/Annotation/manual/test_0001_manu_attri.txt", "10.5\t20\n30 21.5\n20\t30\n12\t40\n28\t41\n",
             "7 7\n" * 5)  # fmt: skip
        (tree / "basic/Annotation/boundingbox/test_0002_boundingbox.txt").write_text("5 5 5 9")
        table = rafdb.read(tree, pictures="original")
        assert np.flatnonzero(~table.numbers("landmarks_5")[1]).tolist() == [14]
        assert np.flatnonzero(~table.numbers("box")[1]).tolist() == [15]
        assert table.strings("race")[1].all()

    def test_points_that_begin_with_the_other_eye_are_exchanged_for_all(self, tree):
        for path in (tree / "basic/Annotation/manual").iterdir():
            first, second, nose, *rest = path.read_text().split("\n")
            path.write_text("\n".join([second, first, nose, rest[1], rest[0], *rest[2:]]))
        table = rafdb.read(tree, pictures="original")
        points = table.numbers("landmarks_5")[0].reshape(-1, 5, 2)
        np.testing.assert_allclose(points[7], [[10.5, 20], [30, 21.5], [20, 30], [12, 40], [28, 41]])
        assert any("exchanged" in note for note in table.metadata["notes"])

    def test_the_table_is_stale_when_an_annotation_changes(self, tree):
        touched = rafdb.read(tree, pictures="original").metadata["touched"]
        assert LIST in touched
        assert "basic/Annotation/manual/test_0001_manu_attri.txt" in touched
        assert "basic/Image/original" in touched


class TestErrors:
    @pytest.mark.parametrize(
        ("old", "new", "message"),
        [
            ("train_00002.jpg 2", "train_00002.jpg 8", r"line 2: expected a label from 1 to 7, found 8"),
            ("train_00002.jpg 2", "train_00002.jpg 0", r"line 2: expected a label from 1 to 7, found 0"),
            ("train_00002.jpg 2", "train_00002.jpg", r"line 2: expected a name and a label"),
            ("train_00002.jpg 2", "train_00002.jpg two", r"line 2: expected a name and a label .*found 'train_00002"),
            ("train_00002.jpg 2", "train_00002.jpg 2 2", r"line 2: expected a name and a label"),
            ("train_00002.jpg 2", "valid_00002.jpg 2", r"line 2: expected a name and a label"),
            ("train_00002.jpg 2", "train_1.jpg 2", r"line 2: train_00001 is in line 1 too"),
        ],
    )
    def test_of_the_list(self, tree, old, new, message):
        edit(tree / LIST, old, new)
        with pytest.raises(DataError, match=rf"list_patition_label\.txt, {message}"):
            rafdb.read(tree)

    @pytest.mark.parametrize(
        ("old", "new", "message"),
        [
            ("10.5\t20\n", "", r"line 7: expected 8 lines .*found 7"),
            ("10.5\t20\n", "10.5\n", r"line 1: expected x and y of a point, found '10\.5'"),
            ("30 21.5", "30 1e9", r"line 2: expected coordinates in pixels, found '1e9'"),
            ("30 21.5", "30 nan", r"line 2: expected a number, found 'nan'"),
            ("\n0\n0\n0\n", "\n3\n0\n0\n", r"line 6: expected gender from 0 to 2, found '3'"),
            ("\n0\n0\n0\n", "\n0\n-1\n0\n", r"line 7: expected race from 0 to 2, found '-1'"),
            ("\n0\n0\n0\n", "\n0\n0\n1.5\n", r"line 8: expected a whole number, found '1\.5'"),
            ("\n0\n0\n0\n", "\n0\n0\n5\n", r"line 8: expected age group from 0 to 4"),
        ],
    )
    def test_of_an_annotation(self, tree, old, new, message):
        edit(tree / "basic/Annotation/manual/train_00001_manu_attri.txt", old, new)
        with pytest.raises(DataError, match=rf"train_00001_manu_attri\.txt, {message}"):
            rafdb.read(tree)

    @pytest.mark.parametrize(
        ("text", "found"), [("1 2 3", "found 3 numbers"), ("1 2 3 x", "found 'x'"), ("", "found 0")]
    )
    def test_of_a_box(self, tree, text, found):
        (tree / "basic/Annotation/boundingbox/train_00001_boundingbox.txt").write_text(text)
        rafdb.read(tree)  # aligned images do not look at boxes
        with pytest.raises(DataError, match=rf"train_00001_boundingbox\.txt, line 1: .*{found}"):
            rafdb.read(tree, pictures="original")

    def test_no_list_and_no_images(self, tree):
        for path in (tree / "basic/Image/aligned").iterdir():
            path.unlink()
        with pytest.raises(DataError, match=r"Image/aligned: no image there; unpack aligned\.zip"):
            rafdb.read(tree)
        (tree / LIST).unlink()
        with pytest.raises(DataError, match=r"list_patition_label\.txt: no such file"):
            rafdb.read(tree)

    def test_the_other_subset_and_the_folder_inside(self, tree):
        with pytest.raises(DataError, match="not the root of rafdb_compound: expected compound there"):
            rafdb.read(tree, "compound")
        with pytest.raises(DataError, match=rf"too low, use dataset\.root={tree}"):
            rafdb.read(tree / "basic")
        with pytest.raises(DataError, match=rf"one level too high, use dataset\.root={tree}"):
            rafdb.read(tree.parent)

    def test_unknown_options(self, tree):
        with pytest.raises(ConfigError, match="subset=basics: did you mean basic"):
            rafdb.read(tree, "basics")
        with pytest.raises(ConfigError, match="pictures=align: did you mean aligned"):
            rafdb.read(tree, pictures="align")

    def test_what_cannot_be_written(self, drawn, tmp_path):
        dressed = rafdb.dress(drawn)
        reader = ChosenFaces(dressed.rows)
        table = dressed.table
        nameless = table.with_columns({"expression": pa.nulls(len(table), pa.string())})
        with pytest.raises(DataError, match="cannot leave out an expression"):
            rafdb.write(nameless, tmp_path, reader)
        foreign = table.with_columns({"expression": ["contempt"] * len(table)})
        with pytest.raises(DataError, match="RAF-DB has no 'contempt'"):
            rafdb.write(foreign, tmp_path, reader)
        raceless = table.with_columns({"race": pa.nulls(len(table), pa.string())})
        with pytest.raises(DataError, match="cannot leave out the race"):
            rafdb.write(raceless, tmp_path, reader)
        with pytest.raises(DataError, match="expected a path that begins with basic or compound"):
            rafdb.write(table.with_columns({"image": ["x/1.jpg"] * len(table)}), tmp_path, reader)


def test_rows_without_any_annotation_survive_a_round_trip(drawn, tmp_path):
    dressed = rafdb.dress(drawn, "basic", "original")
    hidden = np.arange(len(dressed.table)) % 5 == 0
    columns = {name: (dressed.table.numbers(name)[0], ~hidden) for name in ("attribute_male", "landmarks_5", "box")}
    for name in ("race", "age_group"):
        columns[name] = pa.array(dressed.table.strings(name)[0], mask=hidden)
    table = dressed.table.with_columns(columns)
    rafdb.write(table, tmp_path / "tree", ChosenFaces(dressed.rows))
    found = rafdb.read(tmp_path / "tree", pictures="original")
    assert_same(table, found, 1e-3)
    again = tmp_path / "again"
    rafdb.write(found, again)  # pixels from the tree itself
    assert FileImages(found).missing().size == 0
    assert (again / LIST).read_bytes() == (tmp_path / "tree" / LIST).read_bytes()


def test_few_faces_give_both_parts():
    from affect.data import faces
    from affect.data.table import FaceTable

    few = FaceTable.from_arrow(faces.labels_table(DIALS, 1, 12), ".")
    for subset in ("basic", "compound"):
        dressed = rafdb.dress(few, subset)
        parts = dressed.table.strings("part")[0].tolist()
        assert parts.count("train") >= 2
        assert "test" in parts


def test_expected_counts_are_those_of_the_list():
    found = {entry.key: entry for entry in rafdb.expected()}
    assert sum(entry.value for key, entry in found.items() if "expression=" in key) == found["rows"].value == 15339
    assert found["rows/part=train"].value == 12271
    assert all(entry.found for entry in found.values())
    assert not any(entry.found for entry in rafdb.expected("compound") if entry.key != "size")
    assert "size" not in {entry.key for entry in rafdb.expected("basic", "original")}
