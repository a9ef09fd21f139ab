# SPDX-License-Identifier: Apache-2.0
"""BP4D+: round trip with zips, and each trap of its files planted in a small tree."""

from __future__ import annotations

import itertools
import pickle
import zipfile

import numpy as np
import pytest

from affect.data.layouts import bp4dplus, facs
from affect.data.layouts.common import encode_image, unchanged, write_image
from affect.errors import DataError
from affect.labels import AU_SETS, occurrence_column
from tests.data.layouts.contract import LayoutContract

FRAMES = range(5, 11)


class TestContract(LayoutContract):
    layout = bp4dplus
    maskable = (*map(occurrence_column, (*AU_SETS["bp4d"], 5, 20)), "au06_intensity", "au17_intensity", "landmarks_49")

    def test_every_fold_has_people(self, table):
        people = {fold: set() for fold in bp4dplus.FOLDS}
        for part, subject in zip(table.strings("part")[0], table.strings("subject")[0], strict=True):
            people[part].add(subject)
            assert subject in bp4dplus.FOLDS[part]
        assert min(map(len, people.values())) >= 2

    def test_images_lie_in_zips(self, table, root):
        assert all(".zip!" in name for name in table.strings("image")[0])
        assert not list(root.rglob("*.jpg"))

    def test_the_reader_travels_to_other_processes(self, table):
        reader = bp4dplus.images(table)
        before = reader.read(np.arange(3))
        for one, other in zip(before, pickle.loads(pickle.dumps(reader)).read(np.arange(3)), strict=True):
            np.testing.assert_array_equal(one, other)

    def test_written_zips_are_a_function_of_the_images(self, dressed, root, tmp_path):
        self.write(dressed.table, tmp_path / "again", bp4dplus.images(bp4dplus.read(root)))
        for path in (root / "2D+3D").iterdir():
            with zipfile.ZipFile(path) as a, zipfile.ZipFile(tmp_path / "again" / "2D+3D" / path.name) as b:
                assert a.namelist() == b.namelist()
                assert {info.date_time for info in a.infolist()} == {(1980, 1, 1, 0, 0, 0)}


def line(frame, **cells):
    values = {au: 0 if au in AU_SETS["bp4d"] else 9 for au in bp4dplus.UNITS}
    values |= {int(name[2:]): value for name, value in cells.items()}
    return ",".join(map(str, [frame, *values.values()]))


def put(path, lines):
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text("\n".join(lines) + "\n")


HEADER = ",".join(map(str, (0, *bp4dplus.UNITS)))
JPEG = encode_image(np.full((8, 6, 3), 90, np.uint8), ".jpg")


def put_zip(path, members):
    path.parent.mkdir(parents=True, exist_ok=True)
    with zipfile.ZipFile(path, "w") as archive:
        for name in members:
            archive.writestr(name, JPEG if name.endswith(".jpg") else b"v 0 0 0")


def coding(root, subject, task, lines=None):
    put(root / f"AUCoding/AU_OCC/{subject}_T{task}.csv", [HEADER, *(lines or [line(f, au6=1) for f in FRAMES])])


@pytest.fixture
def tree(tmp_path):
    """One person of each fold; F001 in a zip, M001 and M040 unpacked, M058 in a zip of another shape."""
    root = tmp_path / "BP4D+"
    for subject in ("F001", "M001", "M040", "M058"):
        for task in (1, 8):
            coding(root, subject, task)
    members = [f"F001/T{task}/{frame:04d}.jpg" for task in (1, 2, 8) for frame in range(1, 13)]
    put_zip(root / "2D+3D/F001.zip", [*members, "F001/T1/0005.obj", "F001/", "__MACOSX/F001/T1/._0005.jpg"])
    for subject, task, frame in itertools.product(("M001", "M040"), (1, 8), range(1, 13)):
        write_image(root / f"2D+3D/{subject}/T{task}/{frame}.jpg", np.full((8, 6, 3), 90, np.uint8))
    put_zip(root / "2D+3D/M058.zip", [f"T{task}/{frame}.jpg" for task in (1, 8) for frame in range(1, 13)])
    return root


class TestTraits:
    def test_zips_and_folders_are_read_alike(self, tree):
        table = bp4dplus.read(tree)
        assert len(table) == 4 * 2 * 6
        names = set(table.strings("image")[0])
        assert {
            "2D+3D/F001.zip!F001/T1/0005.jpg",
            "2D+3D/M001/T8/10.jpg",
            "2D+3D/M058.zip!T8/10.jpg",
        } <= names
        assert not table.metadata["skipped"]
        pixels = bp4dplus.images(table).read(np.arange(len(table)))
        assert all(image.shape == (8, 6, 3) for image in pixels)

    def test_a_coded_task_without_an_occurrence_file_is_named(self, tree):
        assert not bp4dplus.read(tree).metadata["notes"]
        (tree / "AUCoding/AU_OCC/M058_T8.csv").unlink()
        put_zip(tree / "2D+3D/F041.zip", [f"F041/T{task}/1.jpg" for task in (1, 7)])
        put_zip(tree / "2D+3D/F042.zip", ["F042/T2/1.jpg"])
        (note,) = bp4dplus.read(tree).metadata["notes"]
        assert "no occurrence file" in note
        assert note.endswith("(2: F041_T1, M058_T8)")

    def test_unpacked_images_come_first(self, tree):
        write_image(tree / "2D+3D/F001/T1/5.jpg", np.zeros((8, 6, 3), np.uint8))
        table = bp4dplus.read(tree)
        names = [name for name in table.strings("image")[0] if "F001" in name]
        assert names[0] == "2D+3D/F001/T1/5.jpg"
        assert names[1] == "2D+3D/F001.zip!F001/T8/0005.jpg"  # T1 is taken as unpacked, T8 from the zip
        assert table.metadata["skipped"] == {"no image of a labelled frame": 5}

    def test_only_four_tasks_are_coded(self, tree):
        coding(tree, "F001", 10)
        table = bp4dplus.read(tree)
        assert len(table) == 48
        (reason,) = table.metadata["skipped"]
        assert "not coded (T1, T6, T7 and T8 are)" in reason
        assert table.metadata["skipped_examples"][reason] == ["AUCoding/AU_OCC/F001_T10.csv"]

    def test_the_known_bad_sequence_is_left_out_and_counted(self, tree):
        coding(tree, "F041", 7)
        coding(tree, "F041", 6)
        put_zip(tree / "2D+3D/F041.zip", [f"F041/T{task}/{frame}.jpg" for task in (6, 7) for frame in range(1, 13)])
        table = bp4dplus.read(tree)
        assert set(table.strings("sequence")[0]) >= {"F041_T6"}
        assert "F041_T7" not in set(table.strings("sequence")[0])
        assert table.metadata["skipped"] == {bp4dplus.BAD["F041_T7"]: 6}
        assert table.metadata["skipped_examples"][bp4dplus.BAD["F041_T7"]][0] == "F041_T7 frame 5"

    def test_a_person_with_missing_data_is_counted(self, tree):
        coding(tree, "F082", 1)
        coding(tree, "F082", 6)
        put_zip(tree / "2D+3D/F082.zip", [f"F082/T1/{frame}.jpg" for frame in range(1, 9)])
        table = bp4dplus.read(tree)
        assert (table.strings("subject")[0] == "F082").sum() == 4
        assert table.metadata["skipped"] == {"no image of a labelled frame": 8}

    def test_9_and_999_are_null(self, tree):
        rows = [line(f, au6=1) for f in FRAMES]
        rows[1] = line(6, au6=9, au4=999)
        coding(tree, "F001", 1, rows)
        put(tree / "AUCoding/AU_INT/AU06/F001_T1_AU06.csv", ["5,3", "6,9", "7,999", "8,0", "9,1", "10,2"])
        table = bp4dplus.read(tree)
        rows = np.flatnonzero(table.strings("sequence")[0] == "F001_T1")
        assert table.numbers("au06_occurrence", rows)[1].tolist() == [True, False, True, True, True, True]
        assert table.numbers("au04_occurrence", rows)[1].tolist() == [True, False, True, True, True, True]
        values, valid = table.numbers("au06_intensity", rows)
        assert valid.tolist() == [True, False, False, True, True, True]
        assert values[valid].tolist() == [3, 0, 1, 2]

    def test_no_occlusion_column(self, tree):
        assert "attribute_occluded" not in bp4dplus.read(tree).names

    def test_complete_frames(self, tree):
        coding(tree, "F001", 1, [line(f, au6=9 if f == 7 else 1) for f in FRAMES])
        assert len(bp4dplus.read(tree)) == 48
        assert len(bp4dplus.read(tree, complete_frames=True)) == 47

    def test_a_damaged_zip(self, tree):
        path = tree / "2D+3D/F001.zip"
        path.write_bytes(path.read_bytes()[:-30])
        with pytest.raises(DataError, match=r"F001\.zip: not a readable ZIP file"):
            bp4dplus.read(tree)

    def test_two_folders_of_one_task_in_a_zip(self, tree):
        put_zip(tree / "2D+3D/F001.zip", ["F001/T1/5.jpg", "copy/T1/5.jpg"])
        with pytest.raises(DataError, match=r"images of T1 lie in F001/T1 and copy/T1"):
            bp4dplus.read(tree)

    def test_a_new_zip_is_noticed(self, tree):
        table = bp4dplus.read(tree)
        assert unchanged(table, tree)
        put_zip(tree / "2D+3D/F001.zip", ["F001/T1/0005.jpg"])
        assert not unchanged(table, tree)

    @pytest.mark.parametrize(
        ("rows", "message"),
        [
            ([line(5), line(6, au4=-1)], r"F001_T1\.csv, line 3: expected AU4 to be one of 0, 1, 9, 999"),
            ([line(5), line(5)], r"line 3: expected a frame number above"),
            ([line(5), line(6)[:-2]], r"line 3: 34 fields, expected 35"),
        ],
    )
    def test_bad_lines(self, tree, rows, message):
        coding(tree, "F001", 1, rows)
        with pytest.raises(DataError, match=message):
            bp4dplus.read(tree)

    def test_people_that_are_not_of_the_set(self, tree):
        coding(tree, "F083", 1)
        with pytest.raises(DataError, match=r"F083 is nobody of BP4D\+"):
            bp4dplus.read(tree)


class TestFolds:
    def test_they_are_disjoint_and_hold_everybody(self):
        people = list(itertools.chain(*bp4dplus.FOLDS.values()))
        assert [len(fold) for fold in bp4dplus.FOLDS.values()] == [35] * 4
        assert sorted(people) == [f"F{k:03d}" for k in range(1, 83)] + [f"M{k:03d}" for k in range(1, 59)]

    def test_each_person_is_in_its_fold(self, tree):
        table = bp4dplus.read(tree)
        owner = dict(zip(table.strings("subject")[0], table.strings("part")[0], strict=True))
        assert owner == {"F001": "fold3", "M001": "fold2", "M040": "fold1", "M058": "fold4"}

    def test_people_are_not_those_of_bp4d(self, tree):
        assert bp4dplus.read(tree).metadata["people"] == "bp4dplus"


def test_expected():
    counts = {entry.key: entry for entry in bp4dplus.expected()}
    assert counts["distinct/subject"].value == 140
    assert counts["distinct/subject/part=fold4"].value == 35
    assert not counts["distinct/sequence"].found
    assert "rows" not in counts


def test_units_are_those_of_the_files():
    assert len(bp4dplus.UNITS) == 34
    assert set(AU_SETS["bp4d"]) < set(bp4dplus.UNITS)
    assert facs.part_of({"a": ["x"]}) == {"x": "a"}
