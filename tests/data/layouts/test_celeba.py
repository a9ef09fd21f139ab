# SPDX-License-Identifier: Apache-2.0
"""CelebA in its official layout: aligned images and images in the wild, and every trap of the files."""

from __future__ import annotations

import numpy as np
import pyarrow as pa
import pytest

from affect import labels
from affect.data import faces
from affect.data.images import Source
from affect.data.layouts import celeba
from affect.data.table import FaceTable
from affect.errors import ConfigError, DataError
from affect.geometry.alignment import CropRecipe
from tests.data.layouts.contract import DIALS, ChosenFaces, LayoutContract

ATTRIBUTES = "Anno/list_attr_celeba.txt"
ALIGNED = "Anno/list_landmarks_align_celeba.txt"
WILD = "Anno/list_landmarks_celeba.txt"
BOXES = "Anno/list_bbox_celeba.txt"
IDENTITIES = "Anno/identity_CelebA.txt"
PARTITION = "Eval/list_eval_partition.txt"


class TestAligned(LayoutContract):
    layout = celeba

    def test_forty_attributes_of_which_some_differ(self, table):
        names = {name for name in table.names if name.startswith("attribute_")}
        assert len(names) == 40
        assert {"attribute_5_o_clock_shadow", "attribute_male", "attribute_wearing_necktie"} <= names
        for name in names:
            assert set(table.numbers(name)[0]) <= {0, 1}
        smiling = table.numbers("attribute_smiling")[0]
        assert 0 < smiling.mean() < 1
        assert not table.numbers("attribute_wearing_hat")[0].any()

    def test_every_part_has_people_of_its_own(self, table):
        groups, parts = table.strings("subject")[0], table.strings("part")[0]
        people = {part: set(groups[parts == part]) for part in celeba.PARTS}
        assert len(people["train"]) >= 2
        assert all(people.values())
        assert table.metadata["people"] == "celeba"

    def test_the_files_look_like_the_official_ones(self, root, table):
        lines = (root / ATTRIBUTES).read_text().split("\n")
        assert lines[0] == str(len(table))
        assert lines[1].split() == list(celeba.ATTRIBUTES)
        assert "  1" in lines[2]
        assert len(lines[2].split()) == 41
        assert (root / ALIGNED).read_text().split("\n")[1].split() == list(celeba.POINTS)
        assert not (root / WILD).exists()

    def test_five_points_align_faces(self, table):
        points = table.numbers("landmarks_5")[0].reshape(-1, 5, 2)
        recipe = CropRecipe(points="eyes_mouth_5", size=64)
        matrices = recipe.matrices(points)
        moved = np.einsum("nij,npj->npi", matrices[:, :, :2], points) + matrices[:, None, :, 2]
        assert np.abs(moved - recipe.target()).mean() < 5


class TestWild(LayoutContract):
    layout = celeba
    maskable = ("box",)

    def read(self, root):
        return celeba.read(root, "wild")

    def dress(self, drawn):
        return celeba.dress(drawn, "wild")

    def expected(self):
        return celeba.expected("wild")

    def test_boxes_are_corners(self, root, table):
        header, first = (root / BOXES).read_text().split("\n")[1:3]
        assert header.split() == ["image_id", "x_1", "y_1", "width", "height"]
        x, y, width, height = map(float, first.split()[1:])
        np.testing.assert_allclose(table.numbers("box")[0][0], [x, y, x + width, y + height])

    def test_points_lie_in_their_boxes(self, table):
        points = table.numbers("landmarks_5")[0].reshape(-1, 5, 2).mean(1)
        box = table.numbers("box")[0]
        assert ((box[:, :2] < points) & (points < box[:, 2:])).all()


# ------------------------------------------------------------------------------------------------------- traps


@pytest.fixture
def tree(tmp_path):
    """A tree by hand, as datasets.md asks: four images, several blanks between cells, nameless first column."""
    root = tmp_path / "celeba"
    for folder in ("Anno", "Eval", "Img/img_align_celeba", "Img/img_celeba"):
        (root / folder).mkdir(parents=True)
    names = [f"{k:06d}.jpg" for k in range(1, 5)]
    for name in names:
        for folder in ("img_align_celeba", "img_celeba"):
            (root / "Img" / folder / name).write_bytes(b"\xff\xd8\xff")
    (root / ATTRIBUTES).write_text(
        "4\nMale Young 5_o_Clock_Shadow \n000001.jpg -1  1 -1\n000002.jpg  1  1 -1\n000003.jpg -1 -1  1\n"
        "000004.jpg  1  1  1\n"
    )
    header = " ".join(celeba.POINTS) + " "
    rows = [f"{name} 69  109  106  113   77  142   73  152  {100 + k}  154 \n" for k, name in enumerate(names)]
    (root / ALIGNED).write_text(f"4\n{header}\n" + "".join(rows))
    rows = [f"{name} 165  184  244  176  196  249  194  271  266  {260 + k}\n" for k, name in enumerate(names)]
    (root / WILD).write_text(f"4\n{header}\n" + "".join(rows))
    (root / BOXES).write_text(
        "4\nimage_id x_1 y_1 width height\n000001.jpg    95  71 226 313\n000002.jpg    72  94 221 306\n"
        "000003.jpg     0   0   0   0\n000004.jpg   622 257 564 781\n"
    )
    (root / IDENTITIES).write_text("000001.jpg 2880\n000002.jpg 2937\n000003.jpg 8692\n000004.jpg 5805\n")
    (root / PARTITION).write_text("000001.jpg 0\n000002.jpg 0\n000003.jpg 1\n000004.jpg 2")
    return root


def edit(path, old, new):
    text = path.read_text()
    assert old in text
    path.write_text(text.replace(old, new, 1))


class TestFiles:
    def test_aligned_images_with_their_own_points(self, tree):
        table = celeba.read(tree)
        assert table.strings("image")[0].tolist()[0] == "Img/img_align_celeba/000001.jpg"
        assert table.strings("subject")[0].tolist() == ["2880", "2937", "8692", "5805"]
        assert table.strings("part")[0].tolist() == ["train", "train", "validation", "test"]
        assert table.numbers("attribute_male")[0].tolist() == [0, 1, 0, 1]
        assert table.numbers("attribute_5_o_clock_shadow")[0].tolist() == [0, 0, 1, 1]
        assert table.numbers("landmarks_5")[0][1].tolist() == [69, 109, 106, 113, 77, 142, 73, 152, 101, 154]
        assert "box" not in table.names

    def test_images_in_the_wild_with_theirs(self, tree):
        table = celeba.read(tree, "wild")
        assert table.strings("image")[0].tolist()[3] == "Img/img_celeba/000004.jpg"
        assert table.numbers("landmarks_5")[0][3].tolist() == [165, 184, 244, 176, 196, 249, 194, 271, 266, 263]
        box, known = table.numbers("box")
        assert known.tolist() == [True, True, False, True]
        assert box[0].tolist() == [95, 71, 95 + 226, 71 + 313]
        assert table.metadata["notes"] == ["1 boxes have no size and are missing"]

    def test_each_kind_reads_its_own_files_alone(self, tree):
        touched = celeba.read(tree).metadata["touched"]
        assert ALIGNED in touched
        assert not {WILD, BOXES, "Img/img_celeba"} & set(touched)
        touched = celeba.read(tree, "wild").metadata["touched"]
        assert {WILD, BOXES, "Img/img_celeba"} <= set(touched)
        assert ALIGNED not in touched

    def test_left_is_left_in_the_image(self, tree):
        points = celeba.read(tree).numbers("landmarks_5")[0].reshape(-1, 5, 2)
        scheme = labels.SCHEMES["5"]
        assert scheme.swap == (1, 0, 2, 4, 3)
        assert (points[:, 0, 0] < points[:, 1, 0]).all()
        assert (points[:, 3, 0] < points[:, 4, 0]).all()

    def test_files_are_joined_by_name(self, tree):
        before = celeba.read(tree)
        count, header, *rows = (tree / ATTRIBUTES).read_text().strip().split("\n")
        (tree / ATTRIBUTES).write_text("\n".join([count, header, *rows[::-1]]))
        rows = (tree / IDENTITIES).read_text().strip().split("\n")
        (tree / IDENTITIES).write_text("\n".join([rows[2], rows[0], rows[3], rows[1]]))
        assert celeba.read(tree).fingerprint == before.fingerprint

    def test_columns_are_found_by_name(self, tree):
        before = celeba.read(tree, "wild")
        edit(tree / BOXES, "image_id x_1 y_1 width height", "image_id y_1 x_1 height width")
        for old, new in (("95  71 226 313", "71 95 313 226"), ("72  94 221 306", "94 72 306 221"),
                         ("622 257 564 781", "257 622 781 564")):  # fmt: skip
            edit(tree / BOXES, old, new)
        assert celeba.read(tree, "wild").fingerprint == before.fingerprint

    def test_crlf_byte_order_mark_tabs_and_blank_lines(self, tree):
        before = celeba.read(tree)
        for name in (ATTRIBUTES, ALIGNED, IDENTITIES, PARTITION):
            text = (tree / name).read_text().replace("\n", "\r\n\r\n").replace(" ", "\t", 3)
            (tree / name).write_bytes(("\ufeff" + text + "\r\n").encode())
        assert celeba.read(tree).fingerprint == before.fingerprint

    def test_a_missing_image_is_counted(self, tree):
        (tree / "Img/img_align_celeba/000002.jpg").unlink()
        table = celeba.read(tree)
        assert len(table) == 3
        assert table.metadata["skipped_examples"] == {"image is missing": ["000002.jpg"]}
        assert table.numbers("attribute_male")[0].tolist() == [0, 0, 1]
        assert len(celeba.read(tree, "wild")) == 4

    def test_an_image_that_a_file_lacks_has_null_cells(self, tree):
        edit(tree / ATTRIBUTES, "4\n", "3\n")
        edit(tree / ATTRIBUTES, "000003.jpg -1 -1  1\n", "")
        edit(tree / IDENTITIES, "000001.jpg 2880\n", "")
        table = celeba.read(tree)
        assert table.numbers("attribute_young")[1].tolist() == [True, True, False, True]
        assert table.strings("subject")[1].tolist() == [False, True, True, True]
        assert any("not in Anno/list_attr_celeba.txt (first: 000003.jpg)" in note for note in table.metadata["notes"])

    def test_without_identities(self, tree):
        (tree / IDENTITIES).unlink()
        with pytest.raises(DataError, match=r"identity_CelebA\.txt: no such file"):
            celeba.read(tree)
        table = celeba.read(tree, identities=False)
        assert "subject" not in table.names
        assert "people" not in table.metadata
        assert Source("celeba", table, ChosenFaces(np.arange(4))).group == "image"


class TestErrors:
    @pytest.mark.parametrize(
        ("file", "old", "new", "message"),
        [
            (
                ATTRIBUTES,
                "4\n",
                "5\n",
                r"line 1: expected 5 rows as this line says, found 4; the file may be cut short",
            ),
            (ATTRIBUTES, "4\n", "four\n", r"line 1: expected a whole number, found 'four'"),
            (ATTRIBUTES, "000002.jpg  1  1 -1", "000002.jpg  1  1", r"line 4: 3 fields, expected 4"),
            (ATTRIBUTES, "000002.jpg  1  1 -1", "000002.jpg  1  1 -1 1", r"line 4: 5 fields, expected 4"),
            (ATTRIBUTES, "000002.jpg  1  1 -1", "000002.jpg  1  yes -1", r"line 4: expected a number, found 'yes'"),
            (ATTRIBUTES, "000002.jpg  1  1 -1", "000002.jpg  1  0 -1", r"line 4: expected attributes -1 or 1, found"),
            (ATTRIBUTES, "000002.jpg  1", "000001.jpg  1", r"line 4: 000001.jpg is in an earlier line too; remove one"),
            (ATTRIBUTES, "Male Young", "Male Male", r"line 2: column Male occurs more than once"),
            (ALIGNED, "lefteye_x", "left_x", r"line 2: no column lefteye_x; expected lefteye_x lefteye_y"),
            (ALIGNED, "69  109", "69  inf", r"line 3: expected a number, found 'inf'"),
            (ALIGNED, "69  109", "69  109000", r"line 3: expected coordinates in pixels, found '000001"),
            (
                IDENTITIES,
                "2937",
                "29.5",
                r"line 2: expected an identity, a whole number from 1, found '000002.jpg 29.5'",
            ),
            (IDENTITIES, "2937", "-3", r"line 2: expected an identity, a whole number from 1, found '000002.jpg -3'"),
            (IDENTITIES, "2937", "99999999", r"line 2: expected an identity"),
            (PARTITION, "000003.jpg 1", "000003.jpg 3", r"line 3: expected 0, 1 or 2, found '000003.jpg 3'"),
            (PARTITION, "000003.jpg 1", "000003.jpg", r"line 3: 1 fields, expected 2"),
        ],
    )
    def test_say_file_line_expected_and_found(self, tree, file, old, new, message):
        edit(tree / file, old, new)
        with pytest.raises(DataError, match=rf"{file.rpartition('/')[2]}, {message}"):
            celeba.read(tree)

    def test_of_files_that_are_empty_or_missing(self, tree):
        (tree / ATTRIBUTES).write_text("4\n")
        with pytest.raises(DataError, match=r"list_attr_celeba\.txt: expected the number of images, column names"):
            celeba.read(tree)
        (tree / ATTRIBUTES).unlink()
        with pytest.raises(DataError, match=r"list_attr_celeba\.txt: no such file"):
            celeba.read(tree)
        (tree / PARTITION).write_text("")
        with pytest.raises(DataError):
            celeba.read(tree)

    @pytest.mark.parametrize("file", [IDENTITIES, PARTITION])
    def test_of_a_file_without_a_byte(self, tree, file):
        (tree / file).write_bytes(b"")
        with pytest.raises(DataError, match=rf"{file}: expected lines with an image .*found an empty file; copy it"):
            celeba.read(tree)

    def test_of_a_partition_that_is_cut_short_at_a_line_end(self, tree):
        edit(tree / PARTITION, "\n000003.jpg 1\n000004.jpg 2", "\n")
        message = r"partition\.txt: 2 images of Anno/list_attr_celeba\.txt are in no part \(first: 000003\.jpg\)"
        with pytest.raises(DataError, match=message):
            celeba.read(tree)

    def test_of_a_root_without_images(self, tree):
        for path in (tree / "Img/img_celeba").iterdir():
            path.unlink()
        with pytest.raises(DataError, match=r"img_celeba: none of the 4 images is there"):
            celeba.read(tree, "wild")

    def test_of_an_unknown_kind_of_images(self, tree):
        with pytest.raises(ConfigError, match="pictures=aligne: did you mean aligned"):
            celeba.read(tree, "aligne")

    def test_of_what_cannot_be_written(self, drawn, tmp_path):
        dressed = celeba.dress(drawn)
        table, reader = dressed.table, ChosenFaces(dressed.rows)
        hidden = np.arange(len(table)) == 3
        male = table.with_columns({"attribute_male": (table.numbers("attribute_male")[0], ~hidden)})
        with pytest.raises(DataError, match=r"image 000004\.jpg: CelebA cannot leave out attribute_male"):
            celeba.write(male, tmp_path, reader)
        parts = pa.array(np.where(hidden, "dev", table.strings("part")[0]), pa.string())
        with pytest.raises(DataError, match="CelebA has no part 'dev'"):
            celeba.write(table.with_columns({"part": parts}), tmp_path, reader)


def test_few_faces_give_all_parts():
    few = FaceTable.from_arrow(faces.labels_table(DIALS, 1, 12), ".")
    table = celeba.dress(few).table
    groups, parts = table.strings("subject")[0], table.strings("part")[0]
    assert set(parts) == set(celeba.PARTS)
    assert len(set(groups[parts == "train"])) >= 2


def test_large_files_are_read_without_a_loop_over_rows(tmp_path, monkeypatch):
    """The slow path, which looks at one line after the other, is for files with an error alone."""
    count = 3000
    names = [f"{k:06d}.jpg" for k in range(count)]
    random = np.random.default_rng(0)
    signs = np.where(random.random((count, 40)) < 0.5, -1, 1)
    for folder in ("Anno", "Eval", "Img/img_align_celeba"):
        (tmp_path / folder).mkdir(parents=True)
    celeba._write_counted(tmp_path / ATTRIBUTES, names, " ".join(celeba.ATTRIBUTES), signs)
    points = random.integers(0, 178, (count, 10))
    celeba._write_counted(tmp_path / ALIGNED, names, " ".join(celeba.POINTS), points)
    (tmp_path / PARTITION).write_text("\n".join(f"{name} {k % 3}" for k, name in enumerate(names)))
    (tmp_path / IDENTITIES).write_text("\n".join(f"{name} {k % 3 + 1}" for k, name in enumerate(names)))

    def slow(*_):
        raise AssertionError("a well-formed file was read line by line")

    monkeypatch.setattr(celeba.Reading, "lines", slow)
    monkeypatch.setattr(celeba.Reading, "listing", lambda self, folder: names)
    table = celeba.read(tmp_path)
    assert len(table) == count
    np.testing.assert_array_equal(table.numbers("attribute_male")[0], signs[:, 20] > 0)
    np.testing.assert_array_equal(table.numbers("landmarks_5")[0], points)


def test_expected_counts_add_up_and_only_warn():
    found = {entry.key: entry for entry in celeba.expected()}
    assert found["rows"].value == sum(found[f"rows/part={part}"].value for part in celeba.PARTS)
    assert not any(entry.found for entry in found.values())
    assert "distinct/subject" not in {entry.key for entry in celeba.expected(identities=False)}
    assert "size" not in {entry.key for entry in celeba.expected("wild")}
