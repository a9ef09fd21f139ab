# SPDX-License-Identifier: Apache-2.0
"""WFLW: lists of 207 and 197 fields, several faces in a photograph, points outside, six attributes."""

from __future__ import annotations

import numpy as np
import pytest

from affect.data.layouts import wflw
from affect.errors import ConfigError, DataError
from tests.data import samples
from tests.data.layouts.contract import LayoutContract

LISTS = "WFLW_annotations/list_98pt_rect_attr_train_test"
SUBSETS = "WFLW_annotations/list_98pt_test"


def points(k):
    """Points that differ from face to face; some lie outside of the image."""
    return np.stack([np.linspace(-5.5, 60, 98) + k, np.linspace(3, 40.25, 98)], 1)


def line(k, image, box="1 2 33 44", flags="0 0 0 0 0 0", short=False):
    coordinates = " ".join(f"{value:.6f}" for value in points(k).ravel())
    return f"{coordinates} {image}" if short else f"{coordinates} {box} {flags} {image}"


@pytest.fixture
def root(tmp_path):
    """Three faces for training, two of them in one photograph, and two for testing."""
    tree = tmp_path / "tree"
    write(tree, f"{LISTS}/list_98pt_rect_attr_train.txt", [
        line(0, "0--Parade/a.jpg", flags="1 0 0 0 0 0"),
        line(1, "0--Parade/a.jpg", box="5 6 7 8"),
        line(2, "1--Handshaking/b.jpg", flags="0 1 0 1 0 1"),
    ])  # fmt: skip
    write(tree, f"{LISTS}/list_98pt_rect_attr_test.txt", [
        line(3, "0--Parade/c.jpg", flags="1 0 1 0 0 0"), line(4, "0--Parade/c.jpg", flags="0 0 1 0 1 1"),
    ])  # fmt: skip
    for k, name in enumerate(("0--Parade/a.jpg", "1--Handshaking/b.jpg", "0--Parade/c.jpg")):
        path = tree / "WFLW_images" / name
        path.parent.mkdir(parents=True, exist_ok=True)
        samples.write_image(path, samples.smooth_image(k))
    return tree


def write(tree, name, lines, ending="\n"):
    path = tree / name
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_bytes("".join(text + ending for text in lines).encode())


class TestContract(LayoutContract):
    layout = wflw
    group = "photograph"
    unread = ("WFLW_annotations/list_#pt_test",)


class TestContractWithRectangles(LayoutContract):
    layout = wflw
    group = "photograph"
    unread = ("WFLW_annotations/list_#pt_test",)

    def read(self, root):
        return wflw.read(root, box="detector")


class TestLists:
    def test_faces_of_one_photograph_are_rows_of_their_own(self, root):
        table = wflw.read(root)
        assert list(table.strings("part")[0]) == ["train"] * 3 + ["test"] * 2
        assert list(table.strings("photograph")[0]) == [
            "WFLW_images/0--Parade/a.jpg", "WFLW_images/0--Parade/a.jpg", "WFLW_images/1--Handshaking/b.jpg",
            "WFLW_images/0--Parade/c.jpg", "WFLW_images/0--Parade/c.jpg",
        ]  # fmt: skip
        assert (table.strings("photograph")[0] == table.strings("image")[0]).all()
        found = table.numbers("landmarks_98")[0].reshape(-1, 98, 2)
        np.testing.assert_allclose(found, [points(k) for k in range(5)], atol=1e-5)

    def test_points_outside_of_the_image_stay(self, root):
        assert wflw.read(root).numbers("landmarks_98")[0].min() == -5.5

    def test_the_six_flags_in_their_order(self, root):
        table = wflw.read(root)
        names = ("large_pose", "expression", "illumination", "make_up", "occlusion", "blur")
        assert tuple(wflw.FLAGS) == names
        flags = np.stack([table.numbers(f"attribute_{name}")[0] for name in names], 1)
        assert flags.tolist() == [
            [1, 0, 0, 0, 0, 0], [0, 0, 0, 0, 0, 0], [0, 1, 0, 1, 0, 1], [1, 0, 1, 0, 0, 0], [0, 0, 1, 0, 1, 1],
        ]  # fmt: skip

    def test_the_box_by_policy(self, root):
        tight = wflw.read(root).numbers("box")[0]
        np.testing.assert_allclose(tight[1], [-4.5, 3, 61, 40.25])
        table = wflw.read(root, box="detector")
        np.testing.assert_allclose(table.numbers("box")[0][:2], [[1, 2, 33, 44], [5, 6, 7, 8]])
        assert "box: the detection rectangle of the lists, enlarged by 0 on each side" in table.metadata["notes"]
        grown = wflw.read(root, box="detector", enlarge=0.5).numbers("box")[0][1]
        np.testing.assert_allclose(grown, [4, 5, 8, 9])
        with pytest.raises(ConfigError, match=r"dataset\.box=rect: unknown"):
            wflw.read(root, box="rect")

    @pytest.mark.parametrize("ending", ["\r\n", "  \n", "\n\n"])
    def test_line_ends_do_not_matter(self, root, ending):
        plain = wflw.read(root)
        lines = (root / LISTS / "list_98pt_rect_attr_test.txt").read_text().split("\n")[:-1]
        write(root, f"{LISTS}/list_98pt_rect_attr_test.txt", [text.replace(" ", "  ") for text in lines], ending)
        assert wflw.read(root).fingerprint == plain.fingerprint

    def test_without_flags_in_the_test_list_they_come_from_the_subset_lists(self, root):
        """A photograph's two faces are told apart by their coordinates, not by the path."""
        plain = wflw.read(root)
        (root / LISTS / "list_98pt_rect_attr_test.txt").unlink()
        three, four = line(3, "0--Parade/c.jpg", short=True), line(4, "0--Parade/c.jpg", short=True)
        write(root, f"{SUBSETS}/list_98pt_test.txt", [three, four])
        subsets = {"largepose": [three], "illumination": [four, three], "occlusion": [four], "blur": [four]}
        for ending in ("largepose", "expression", "illumination", "makeup", "occlusion", "blur"):
            write(root, f"{SUBSETS}/list_98pt_test_{ending}.txt", subsets.get(ending, []))
        table = wflw.read(root)
        assert table.fingerprint == plain.fingerprint
        assert any("attributes from the subset lists" in note for note in table.metadata["notes"])
        assert wflw.read(root, box="detector").numbers("box")[1].tolist() == [True] * 3 + [False] * 2

    def test_a_line_that_is_there_twice_counts_once(self, root):
        path = root / LISTS / "list_98pt_rect_attr_train.txt"
        path.write_text(path.read_text() + line(1, "0--Parade/a.jpg", box="5 6 7 8") + "\n")
        table = wflw.read(root)
        assert len(table) == 5
        assert table.metadata["skipped"] == {"the same line again": 1}
        assert table.metadata["skipped_examples"]["the same line again"] == [
            f"{LISTS}/list_98pt_rect_attr_train.txt, line 4"
        ]

    def test_missing_images_are_counted(self, root):
        (root / "WFLW_images/0--Parade/c.jpg").unlink()
        table = wflw.read(root)
        assert len(table) == 3
        assert table.metadata["skipped"] == {"image missing": 2}

    @pytest.mark.parametrize(
        ("text", "message"),
        [
            (line(0, "a.jpg")[9:], r"line 4: 206 fields, expected 207"),
            (line(0, "a b.jpg"), r"line 4: 208 fields, expected 207"),
            (line(0, "a.jpg", short=True), r"line 4: 197 fields, expected 207"),
            (line(0, "a.jpg").replace("-5.500000", "high", 1), r"line 4: expected a number, found 'high'"),
            (line(0, "a.jpg").replace("-5.500000", "inf", 1), r"line 4: expected a number, found 'inf'"),
            (line(0, "a.jpg").replace("-5.500000", "5_5", 1), r"line 4: expected a number, found '5_5'"),
            (line(0, "a.jpg").replace("-5.500000", "1e30", 1), r"line 4: expected coordinates in pixels"),
            (line(0, "a.jpg", flags="0 0 2 0 0 0"), r"line 4: expected 6 flags of 0 or 1"),
            (line(0, "a.jpg", box="10 0 5 5"), r"line 4: expected x_max >= x_min"),
        ],
    )
    def test_damage_is_named_with_its_line(self, root, text, message):
        path = root / LISTS / "list_98pt_rect_attr_train.txt"
        path.write_text(path.read_text() + text + "\n")
        with pytest.raises(DataError, match=rf"list_98pt_rect_attr_train\.txt, {message}") as caught:
            wflw.read(root)
        assert "\n" not in str(caught.value)

    @pytest.mark.parametrize("part", ["train", "test"])
    def test_a_missing_or_empty_list(self, root, part):
        path = root / LISTS / f"list_98pt_rect_attr_{part}.txt"
        path.write_text("\n \n")
        with pytest.raises(DataError, match=rf"attr_{part}\.txt: the file is empty"):
            wflw.read(root)
        path.unlink()
        with pytest.raises(DataError, match=rf"attr_{part}\.txt: no such file"):
            wflw.read(root)


def test_subset_lists_are_those_of_the_flags(tmp_path, drawn):
    dressed = wflw.dress(drawn)

    class Grey:
        def read(self, rows):
            return [np.full((8, 8, 3), 128, np.uint8) for _ in rows]

    wflw.write(dressed.table, tmp_path, Grey())
    parts = dressed.table.strings("part")[0]
    for name, (ending, _) in wflw.FLAGS.items():
        wanted = int(dressed.table.numbers(f"attribute_{name}")[0][parts == "test"].sum())
        assert len((tmp_path / SUBSETS / f"list_98pt_test_{ending}.txt").read_text().split("\n")) - 1 == wanted > 0


def test_published_sizes():
    counts = {entry.key: (entry.value, entry.found) for entry in wflw.expected()}
    assert counts["rows/part=train"] == (7500, True)
    assert counts["rows/part=test"] == (2500, True)
    assert counts["rows/part=test/attribute_make_up=1"] == (206, False)


def test_a_row_without_a_flag_cannot_be_written(root, tmp_path):
    table = wflw.read(root).with_columns({"attribute_blur": [1.0, None, 0.0, 0.0, 1.0]})
    with pytest.raises(DataError, match="row 1 has no attribute_blur"):
        wflw.write(table, tmp_path / "copy")
