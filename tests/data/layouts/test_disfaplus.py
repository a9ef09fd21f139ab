# SPDX-License-Identifier: Apache-2.0
"""DISFA+: round trip, and each trap of its files planted in a small tree."""

from __future__ import annotations

import numpy as np
import pytest

from affect.data.layouts import disfa, disfaplus
from affect.data.layouts.common import unchanged, write_image
from affect.errors import ConfigError, DataError
from affect.labels import AU_SETS, intensity_column, occurrence_column
from tests.data.layouts.contract import LayoutContract

PAIRS = tuple((intensity_column(au), occurrence_column(au)) for au in AU_SETS["disfa12"])


class TestContract(LayoutContract):
    layout = disfaplus
    masked_together = PAIRS

    def test_people_are_those_of_disfa(self, table):
        assert set(table.strings("subject")[0]) <= set(disfaplus.SUBJECTS)
        assert set(disfaplus.SUBJECTS) < set(disfa.SUBJECTS)
        assert table.metadata["people"] == "disfa"
        assert "part" not in table.names


class TestAligned(LayoutContract):
    layout = disfaplus

    def dress(self, drawn):
        return disfaplus.dress(drawn, aligned=True)

    def read(self, root):
        return disfaplus.read(root, aligned=True)

    def test_the_folder(self, table):
        assert all(name.startswith("Aligned/") for name in table.strings("image")[0])


TRIAL = "A1_AU1_TrailNo_1"
VALUES = (0, 1, 2, 3, 4, 5)


def put(path, lines):
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text("\n".join(lines) + "\n")


def label_lines(values=VALUES):
    return [
        "# AU intensity of DISFA+",
        "# frame     intensity",
        *(f"{k:03d}.jpg     {v}" for k, v in enumerate(values)),
    ]


@pytest.fixture
def tree(tmp_path):
    root = tmp_path / "DISFA+"
    for subject in ("SN001", "SN027"):
        for au in AU_SETS["disfa12"]:
            put(root / f"Labels/{subject}/{TRIAL}/AU{au}.txt", label_lines())
        for k in range(6):
            write_image(root / f"Images/{subject}/{TRIAL}/{k:03d}.jpg", np.full((8, 6, 3), 40 * k, np.uint8))
    return root


def of(table, name, subject="SN001"):
    rows = np.flatnonzero(table.strings("subject")[0] == subject)
    values, valid = table.numbers(name, rows)
    return [value.item() if known else None for value, known in zip(values, valid, strict=True)]


class TestTraits:
    def test_comments_are_no_labels(self, tree):
        table = disfaplus.read(tree)
        assert len(table) == 12
        assert of(table, "au04_intensity") == list(VALUES)
        assert of(table, "au04_occurrence") == [0, 0, 1, 1, 1, 1]
        assert of(table, "frame") == [0, 1, 2, 3, 4, 5]
        assert table.strings("sequence")[0][0] == f"SN001/{TRIAL}"
        assert table.strings("image")[0][0] == f"Images/SN001/{TRIAL}/000.jpg"

    def test_another_threshold(self, tree):
        assert of(disfaplus.read(tree, threshold=1), "au04_occurrence") == [0, 1, 1, 1, 1, 1]
        with pytest.raises(ConfigError, match="threshold=9"):
            disfaplus.read(tree, threshold=9)

    def test_a_missing_file_is_null_and_never_zero(self, tree):
        (tree / f"Labels/SN027/{TRIAL}/AU9.txt").unlink()
        table = disfaplus.read(tree)
        assert of(table, "au09_intensity", "SN027") == [None] * 6
        assert of(table, "au09_intensity") == list(VALUES)
        assert any(f"no label file of AU9 in 1 trials (SN027/{TRIAL})" in note for note in table.metadata["notes"])

    def test_9_and_a_missing_line_are_null(self, tree):
        lines = label_lines((0, 9, 2, 3, 4, 5))
        put(tree / f"Labels/SN001/{TRIAL}/AU9.txt", [*lines[:4], *lines[5:]])
        table = disfaplus.read(tree)
        assert of(table, "au09_intensity") == [0, None, None, 3, 4, 5]
        assert of(table, "au09_occurrence") == [0, None, None, 1, 1, 1]

    def test_order_of_lines_and_padding_do_not_matter(self, tree):
        before = disfaplus.read(tree)
        lines = label_lines()
        put(
            tree / f"Labels/SN001/{TRIAL}/AU9.txt",
            [*lines[:2], *(f"\t{k}.jpg\t{v} " for k, v in reversed([*enumerate(VALUES)]))],
        )
        assert disfaplus.read(tree).fingerprint == before.fingerprint

    def test_a_missing_image_is_counted(self, tree):
        (tree / f"Images/SN001/{TRIAL}/003.jpg").unlink()
        table = disfaplus.read(tree)
        assert len(table) == 11
        assert table.metadata["skipped_examples"] == {"no image of a labelled frame": [f"Images/SN001/{TRIAL}/3.jpg"]}

    def test_folders_that_repeat_the_person(self, tree):
        for above in ("Labels", "Images"):
            (tree / above / "SN001").rename(tree / above / "inside")
            (tree / above / "SN001").mkdir()
            (tree / above / "inside").rename(tree / above / "SN001" / "SN001")
        table = disfaplus.read(tree)
        assert len(table) == 12
        assert table.strings("image")[0][0] == f"Images/SN001/SN001/{TRIAL}/000.jpg"
        assert set(table.strings("sequence")[0]) == {f"SN001/{TRIAL}", f"SN027/{TRIAL}"}

    def test_crops(self, tree):
        with pytest.raises(DataError, match="12 rows: no image of a labelled frame"):
            disfaplus.read(tree, aligned=True)
        (tree / "Images").rename(tree / "Aligned")
        assert len(disfaplus.read(tree, aligned=True)) == 12

    @pytest.mark.parametrize(
        ("lines", "message"),
        [
            (
                [*label_lines()[:3], "001.jpg     6"],
                r"AU9\.txt, line 4: expected an image and an intensity from 0 to 5",
            ),
            ([*label_lines()[:3], "001.jpg"], r"line 4: expected an image and .*found '001\.jpg'"),
            ([*label_lines()[:3], "001.jpg 1 1"], r"line 4: expected an image"),
            ([*label_lines()[:3], "001 1"], r"line 4: expected an image"),
            ([*label_lines()[:3], "001.jpg 1.5"], r"line 4: expected an image"),
            ([*label_lines()[:3], "000.jpg 1"], r"line 4: expected each image once, found '000\.jpg 1' again"),
            (label_lines()[:2], r"AU9\.txt: no label, expected lines like `000\.jpg 3`"),
        ],
    )
    def test_bad_lines(self, tree, lines, message):
        put(tree / f"Labels/SN001/{TRIAL}/AU9.txt", lines)
        with pytest.raises(DataError, match=message):
            disfaplus.read(tree)

    def test_people_of_disfa_that_do_not_pose(self, tree):
        (tree / "Labels/SN002").mkdir()
        with pytest.raises(DataError, match=r"SN002: nobody of DISFA\+ has this number"):
            disfaplus.read(tree)

    def test_no_people(self, tmp_path):
        (tmp_path / "Labels").mkdir()
        with pytest.raises(DataError, match="no folders of people"):
            disfaplus.read(tmp_path)

    def test_a_new_image_is_noticed(self, tree):
        table = disfaplus.read(tree)
        assert unchanged(table, tree)
        write_image(tree / f"Images/SN001/{TRIAL}/006.jpg", np.zeros((8, 6, 3), np.uint8))
        assert not unchanged(table, tree)


def test_expected():
    (people,) = disfaplus.expected()
    assert (people.key, people.value, people.found) == ("distinct/subject", 9, True)
