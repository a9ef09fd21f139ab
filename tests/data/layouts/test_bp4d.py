# SPDX-License-Identifier: Apache-2.0
"""BP4D: round trip, and each trap of its files planted in a small tree."""

from __future__ import annotations

import io
import itertools
import shutil

import numpy as np
import pytest
import scipy.io

from affect.data import faces as drawn_faces
from affect.data.faces import FaceDials
from affect.data.layouts import bp4d, facs
from affect.data.layouts.common import unchanged, write_image
from affect.data.table import FaceTable
from affect.errors import ConfigError, DataError
from affect.labels import AU_SETS, occurrence_column
from tests.data.layouts.contract import LayoutContract

FRAMES = range(37, 43)
IMAGE = np.full((8, 6, 3), 90, np.uint8)


class TestContract(LayoutContract):
    layout = bp4d
    maskable = (
        *map(occurrence_column, AU_SETS["bp4d"]),
        "au06_intensity",
        "au10_intensity",
        "attribute_occluded",
        "landmarks_49",
    )

    def test_every_part_has_people(self, table):
        people = {part: set() for part in bp4d.PARTS}
        for part, subject in zip(table.strings("part")[0], table.strings("subject")[0], strict=True):
            people[part].add(subject)
            assert subject in bp4d.PARTS[part]
        assert min(map(len, people.values())) >= 2

    def test_a_drawn_person_is_one_subject(self, drawn, dressed):
        pairs = set(zip(drawn.strings("subject", dressed.rows)[0], dressed.table.strings("subject")[0], strict=True))
        assert len(pairs) == len({a for a, _ in pairs}) == len({b for _, b in pairs})

    def test_labels_are_of_the_pictures_that_they_stand_beside(self, drawn, dressed):
        for name in ("au01_occurrence", "au24_occurrence"):
            assert (dressed.table.numbers(name)[0] == drawn.numbers(name, dressed.rows)[0]).all()
        mouth = drawn.numbers("landmarks_68", dressed.rows)[0].reshape(-1, 68, 2)[:, 48]
        np.testing.assert_array_equal(dressed.table.numbers("landmarks_49")[0].reshape(-1, 49, 2)[:, 31], mouth)


def header(numbers=range(100)):
    return ",".join(map(str, numbers))


def line(frame, **cells):
    """A line with zeros for the benchmark, 9 elsewhere; `au4=1` sets a cell, `occlusion` the last column."""
    values = {number: 0 if number in AU_SETS["bp4d"] else 9 for number in range(1, 99)} | {99: 0}
    for name, value in cells.items():
        values[99 if name == "occlusion" else int(name[2:])] = value
    return ",".join(map(str, [frame, *(values[number] for number in sorted(values))]))


def put(path, lines, ending="\n"):
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_bytes((ending.join(lines) + ending).encode())


def put_images(folder, names):
    for name in names:
        write_image(folder / name, IMAGE)


@pytest.fixture
def tree(tmp_path):
    """One person of each part, two tasks, six coded frames from 37 on, and the traits of delivered trees."""
    root = tmp_path / "BP4D"
    for subject in ("F001", "F003", "M006"):
        for task, width in ((1, 4), (2, 1)):
            images = [f"{frame:0{width}d}.jpg" for frame in (35, *FRAMES, 43)]  # the first and last are not coded
            put_images(root / "2D+3D" / subject / f"T{task}", images)
            lines = [line(frame, au12=frame % 2) for frame in FRAMES]
            if (subject, task) == ("F003", 2):
                lines[2] = line(39, au12=1, au4=9)
                lines[4] = line(41, au12=1, occlusion=1)
            put(root / "AUCoding" / "AU_OCC" / f"{subject}_T{task}.csv", [header(), *lines])
    (root / "2D+3D" / "M006" / "T1" / "0040.jpg").unlink()
    return root


def cell(table, image, name):
    row = list(table.strings("image")[0]).index(image)
    value, valid = table.numbers(name, np.array([row]))
    return value[0].item() if valid[0] else None


class TestTraits:
    def test_rows_are_the_coded_frames_that_have_an_image(self, tree):
        table = bp4d.read(tree)
        assert len(table) == 3 * 2 * 6 - 1
        assert set(table.numbers("frame")[0].astype(int)) == set(FRAMES)
        assert table.metadata["skipped"] == {"no image of a labelled frame": 1}
        assert table.metadata["skipped_examples"] == {"no image of a labelled frame": ["2D+3D/M006/T1/40.jpg"]}

    def test_images_are_found_by_number_whatever_their_padding(self, tree):
        names = list(bp4d.read(tree).strings("image")[0])
        assert names[:2] == ["2D+3D/F001/T1/0037.jpg", "2D+3D/F001/T1/0038.jpg"]
        assert names[6] == "2D+3D/F001/T2/37.jpg"

    def test_a_number_twice_in_one_folder_is_an_error(self, tree):
        put_images(tree / "2D+3D" / "F001" / "T2", ["0037.jpg"])
        with pytest.raises(DataError, match=r"F001/T2: 0037\.jpg and 37\.jpg are the same number"):
            bp4d.read(tree)

    @pytest.mark.parametrize("above", ["BP4D-training/", ""])
    def test_an_empty_folder_beside_the_images_is_passed_over(self, tree, above):
        (tree / above).mkdir(exist_ok=True)
        for folder in list((tree / "2D+3D").iterdir()):
            folder.rename(tree / above / folder.name)
        table = bp4d.read(tree)
        assert len(table) == 3 * 2 * 6 - 1
        assert table.strings("image")[0][0] == f"{above}F001/T1/0037.jpg"

    def test_nine_is_null_in_its_own_cell(self, tree):
        table = bp4d.read(tree)
        image = "2D+3D/F003/T2/39.jpg"
        assert cell(table, image, "au04_occurrence") is None
        assert cell(table, image, "au12_occurrence") == 1
        for name in map(occurrence_column, AU_SETS["bp4d"]):
            valid = table.numbers(name)[1]
            assert (~valid).sum() == (name == "au04_occurrence")

    def test_columns_nobody_coded_are_no_columns(self, tree):
        names = bp4d.read(tree).names
        assert {name for name in names if name.startswith("au")} == set(map(occurrence_column, AU_SETS["bp4d"]))
        assert not {name for name in names if name.endswith("_intensity")}

    def test_other_coded_action_units_are_columns(self, tree):
        path = tree / "AUCoding/AU_OCC/M006_T2.csv"
        put(path, [header(), *(line(frame, au28=int(frame == 40), au8=1) for frame in FRAMES)])
        table = bp4d.read(tree)
        assert cell(table, "2D+3D/M006/T2/40.jpg", "au28_occurrence") == 1
        assert cell(table, "2D+3D/M006/T2/41.jpg", "au28_occurrence") == 0
        assert cell(table, "2D+3D/F001/T2/41.jpg", "au28_occurrence") is None
        assert any(note.endswith("of this number: 8") for note in table.metadata["notes"])

    def test_occlusion(self, tree):
        table = bp4d.read(tree)
        assert cell(table, "2D+3D/F003/T2/41.jpg", "attribute_occluded") == 1
        assert table.numbers("attribute_occluded")[0].sum() == 1
        kept = bp4d.read(tree, drop_occluded=True)
        assert len(kept) == len(table) - 1
        assert "2D+3D/F003/T2/41.jpg" not in set(kept.strings("image")[0])
        assert kept.metadata["skipped_examples"]["occluded (drop_occluded)"] == ["F003_T2 frame 41"]

    def test_complete_frames_drops_a_frame_for_one_missing_cell(self, tree):
        table = bp4d.read(tree, complete_frames=True)
        assert len(table) == 34
        reason = "not all 12 action units coded (complete_frames)"
        assert table.metadata["skipped_examples"][reason] == ["F003_T2 frame 39"]

    def test_columns_are_found_by_name(self, tree):
        """A file with fewer columns in another order means the same."""
        before = bp4d.read(tree)
        path = tree / "AUCoding/AU_OCC/F001_T1.csv"
        rows = [text.split(",") for text in path.read_text().splitlines()]
        order = [0, 24, 12, *(au for au in AU_SETS["bp4d"] if au not in (24, 12)), 99]
        put(path, [",".join(row[place] for place in order) for row in rows])
        after = bp4d.read(tree)
        assert after.fingerprint == before.fingerprint

    def test_a_benchmark_unit_that_no_header_names_is_null(self, tree):
        for path in (tree / "AUCoding/AU_OCC").iterdir():
            put(path, [header([*range(24), 100, *range(25, 100)]), *path.read_text().splitlines()[1:]])
        values, valid = bp4d.read(tree).numbers("au24_occurrence")
        assert not valid.any()
        assert len(values) == 35

    def test_crlf_byte_order_mark_and_blank_lines(self, tree):
        before = bp4d.read(tree)
        path = tree / "AUCoding/AU_OCC/F001_T1.csv"
        lines = path.read_text().splitlines()
        path.write_bytes(b"\xef\xbb\xbf" + "\r\n".join([*lines[:3], "", *lines[3:], "", ""]).encode())
        assert bp4d.read(tree).fingerprint == before.fingerprint

    def test_occurrence_files_directly_in_aucoding(self, tree):
        before = bp4d.read(tree)
        for path in list((tree / "AUCoding/AU_OCC").iterdir()):
            path.rename(tree / "AUCoding" / path.name)
        (tree / "AUCoding/AU_OCC").rmdir()
        assert bp4d.read(tree).fingerprint == before.fingerprint

    @pytest.mark.parametrize("folder", ["BP4D-training", "."])
    def test_other_places_of_the_images(self, tree, folder):
        before = bp4d.read(tree)
        if folder == ".":
            for path in list((tree / "2D+3D").iterdir()):
                path.rename(tree / path.name)
            (tree / "2D+3D").rmdir()
        else:
            (tree / "2D+3D").rename(tree / folder)
        table = bp4d.read(tree)
        prefix = "" if folder == "." else f"{folder}/"
        wanted = [name.replace("2D+3D/", prefix) for name in before.strings("image")[0]]
        assert list(table.strings("image")[0]) == wanted
        assert all(path.is_file() for path in table.image_paths())

    def test_a_missing_image_folder_is_counted(self, tree):
        shutil.rmtree(tree / "2D+3D" / "F001")
        table = bp4d.read(tree)
        assert table.metadata["skipped"] == {"no image of a labelled frame": 13}
        assert len(table.metadata["skipped_examples"]["no image of a labelled frame"]) == 10
        shutil.rmtree(tree / "2D+3D")
        with pytest.raises(DataError, match=r"no face of bp4d found \(36 rows: no image of a labelled frame\)"):
            bp4d.read(tree)

    def test_a_coded_task_without_an_occurrence_file_is_named(self, tree):
        assert not bp4d.read(tree).metadata["notes"]
        put_images(tree / "2D+3D" / "F001" / "T3", ["1.jpg", "2.jpg"])
        put(tree / "AUCoding/AU_INT/AU06/F003_T4_AU06.csv", [f"{frame},1" for frame in FRAMES])
        (tree / "AUCoding/AU_OCC/M006_T2.csv").unlink()
        table = bp4d.read(tree)
        assert len(table) == 35 - 6
        (note,) = [note for note in table.metadata["notes"] if "no occurrence file" in note]
        assert note.endswith("(3: F001_T3, F003_T4, M006_T2)")

    def test_a_change_of_any_folder_or_file_is_noticed(self, tree):
        table = bp4d.read(tree)
        assert unchanged(table, tree)
        put_images(tree / "2D+3D" / "M006" / "T1", ["0040.jpg"])
        assert not unchanged(table, tree)
        table = bp4d.read(tree)
        put(tree / "AUCoding/AU_INT/AU06/F001_T1_AU06.csv", [f"{frame},1" for frame in FRAMES])
        assert not unchanged(table, tree)


class TestIntensity:
    def test_by_frame_with_missing_codes_and_files(self, tree):
        put(tree / "AUCoding/AU_INT/AU06/F001_T1_AU06.csv", ["37,0", "38,5", "39,9", "41,2", "42,3", "99,1"])
        table = bp4d.read(tree)
        images = [f"2D+3D/F001/T1/00{frame}.jpg" for frame in FRAMES]
        assert [cell(table, image, "au06_intensity") for image in images] == [0, 5, None, None, 2, 3]
        assert cell(table, "2D+3D/F001/T2/37.jpg", "au06_intensity") is None
        notes = " ".join(table.metadata["notes"])
        assert "no file of AU6's intensity, which is missing there (5: F001_T2, F003_T1" in notes
        assert "without occurrence labels" in notes
        assert "au10_intensity" not in table.names

    def test_a_file_that_is_cut_at_a_line_end_is_named(self, tree):
        for subject, task in itertools.product(("F001", "F003", "M006"), (1, 2)):
            put(tree / f"AUCoding/AU_INT/AU06/{subject}_T{task}_AU06.csv", [f"{frame},1" for frame in FRAMES])
        assert not bp4d.read(tree).metadata["notes"]
        put(tree / "AUCoding/AU_INT/AU06/F003_T1_AU06.csv", [f"{frame},1" for frame in FRAMES[:3]])
        (note,) = bp4d.read(tree).metadata["notes"]
        assert note.startswith("files of intensities lack frames that are coded in occurrence")
        assert note.endswith("(1: AUCoding/AU_INT/AU06/F003_T1_AU06.csv)")

    def test_the_folder_of_fera_2015(self, tree):
        put(tree / "AU Intensity Codes3.0/AU10/F001_T2.csv", [f"{frame},4" for frame in FRAMES])
        assert cell(bp4d.read(tree), "2D+3D/F001/T2/37.jpg", "au10_intensity") == 4

    @pytest.mark.parametrize(
        ("lines", "message"),
        [
            (["37,0", "38,6"], r"F001_T1_AU06\.csv, line 2: expected an intensity from 0 to 5 or 9 .*found '38,6'"),
            (["37,0", "38,-1"], r"line 2: expected an intensity"),
            (["37,0", "38"], r"line 2: 1 fields, expected 2"),
            (["37,0", "37,0"], r"line 2: expected a frame number above"),
            ([], r"F001_T1_AU06\.csv: the file is empty"),
            (["37,1.5"], r"line 1: expected a whole number, found '1\.5'"),
            (["frame,intensity", "37,1"], r"line 1: expected a whole number, found 'frame'"),
        ],
    )
    def test_bad_lines(self, tree, lines, message):
        put(tree / "AUCoding/AU_INT/AU06/F001_T1_AU06.csv", lines)
        with pytest.raises(DataError, match=message):
            bp4d.read(tree)


def put_mat(path, entries, name="fit", field="pred"):
    array = np.zeros((1, len(entries)), [(field, object), ("pose", object)])
    for k, entry in enumerate(entries):
        array[field][0, k] = np.zeros((0, 0)) if entry is None else entry
        array["pose"][0, k] = np.zeros((0, 0))
    path.parent.mkdir(parents=True, exist_ok=True)
    stream = io.BytesIO()
    scipy.io.savemat(stream, {name: array})
    path.write_bytes(stream.getvalue())


def constant(value):
    return np.full((49, 2), float(value))


class TestPoints:
    def values(self, table):
        rows = np.flatnonzero(table.strings("sequence")[0] == "F001_T1")
        points, valid = table.numbers("landmarks_49", rows)
        return [row[0].item() if known else None for row, known in zip(points, valid, strict=True)]

    def test_an_entry_for_each_image_in_order(self, tree):
        put_mat(tree / "2DFeatures/F001_T1.mat", [*map(constant, range(8))])
        table = bp4d.read(tree)
        assert self.values(table) == [1, 2, 3, 4, 5, 6]  # image 35 comes first
        assert not table.numbers("landmarks_49", np.array([6]))[1][0]
        assert any("2DFeatures lacks files" in note for note in table.metadata["notes"])

    def test_an_entry_for_each_frame_from_1(self, tree):
        put_mat(tree / "2DFeatures/F001_T1.mat", [*map(constant, range(1, 61))])
        assert self.values(bp4d.read(tree)) == [37, 38, 39, 40, 41, 42]

    def test_nothing_tracked_is_null(self, tree):
        entries = [*map(constant, range(1, 61))]
        entries[38] = None
        entries[40] = np.full((49, 2), np.nan)
        put_mat(tree / "2DFeatures/F001_T1.mat", entries)
        assert self.values(bp4d.read(tree)) == [37, 38, None, 40, None, 42]

    @pytest.mark.parametrize(
        ("arguments", "note"),
        [
            ({"entries": [constant(1)] * 20}, "fewer entries"),
            ({"entries": [constant(1)] * 60, "field": "points"}, "no struct `fit` with a field `pred`"),
            ({"entries": [constant(1)] * 60, "name": "other"}, "no struct `fit`"),
            ({"entries": [np.zeros((66, 2))] * 60}, "`pred` is not 49 x 2"),
        ],
    )
    def test_other_structures_give_no_points_and_a_note(self, tree, arguments, note):
        put_mat(tree / "2DFeatures/F001_T1.mat", **arguments)
        table = bp4d.read(tree)
        assert len(table) == 35
        assert "landmarks_49" not in table.names
        assert any(note in text for text in table.metadata["notes"])

    def test_unreadable_files_say_how_to_go_on_without(self, tree):
        path = tree / "2DFeatures/F001_T1.mat"
        put(path, ["no MATLAB file"])
        with pytest.raises(DataError, match=r"F001_T1\.mat: not a readable MATLAB file .*dataset\.points=false"):
            bp4d.read(tree)
        assert len(bp4d.read(tree, points=False)) == 35

    def test_cut_short(self, tree):
        path = tree / "2DFeatures/F001_T1.mat"
        put_mat(path, [*map(constant, range(60))])
        path.write_bytes(path.read_bytes()[:-700])
        with pytest.raises(DataError, match="not a readable MATLAB file"):
            bp4d.read(tree)


class TestBadFiles:
    @pytest.mark.parametrize(
        ("lines", "message"),
        [
            ([], r"the file is empty"),
            ([line(37), line(38)], r"F001_T1\.csv, line 1: expected a header"),
            ([header([0, 1, 1, 2]), "37,0,0,0"], r"line 1: expected a header .* once"),
            ([header([0, "AU1", "smile"]), "37,0,0"], r"line 1: expected a header"),
            ([header([0, 97, 98]), "37,0,0"], r"names no action unit"),
            ([header(), line(37), line(38, au4=2)], r"line 3: expected AU4 to be one of 0, 1, 9 \(column 5\)"),
            ([header(), line(37, occlusion=77)], r"line 2: expected occlusion to be one of 0, 1, 9 \(column 100\)"),
            ([header(), line(37, occlusion=-3)], r"line 2: expected occlusion to be one of"),
            ([header(), line(37, occlusion="1e23")], r"line 2: expected occlusion to be one of"),
            ([header(), line(37), line(38, au4="x")], r"line 3: expected a whole number, found 'x'"),
            ([header(), line(37), line(38, au4="nan")], r"line 3: expected a whole number, found 'nan'"),
            ([header(), line(37), line(38)[:-2]], r"line 3: 99 fields, expected 100"),
            ([header(), line(37), line(37)], r"line 3: expected a frame number above that of the line before"),
            ([header(), line(37), line(36)], r"line 3: expected a frame number above"),
            ([header(), line(-1), line(36)], r"line 2: expected a frame number of at least 0"),
            ([header(), line(37), line("38.5")], r"line 3: expected a whole number"),
        ],
    )
    def test_occurrence(self, tree, lines, message):
        put(tree / "AUCoding/AU_OCC/F001_T1.csv", lines)
        with pytest.raises(DataError, match=message) as caught:
            bp4d.read(tree)
        assert "\n" not in str(caught.value)

    def test_a_header_alone_is_counted(self, tree):
        put(tree / "AUCoding/AU_OCC/F001_T1.csv", [header()])
        put_mat(tree / "2DFeatures/F001_T1.mat", [constant(1)] * 8)
        table = bp4d.read(tree)
        assert len(table) == 29
        reason = "label files without a coded frame"
        assert table.metadata["skipped_examples"][reason] == ["AUCoding/AU_OCC/F001_T1.csv"]

    def test_people_of_another_set(self, tree):
        put(tree / "AUCoding/AU_OCC/F024_T1.csv", [header(), line(1)])
        with pytest.raises(DataError, match=r"F024 is nobody of BP4D .*dataset=bp4dplus"):
            bp4d.read(tree)

    def test_no_files(self, tree):
        shutil.rmtree(tree / "AUCoding/AU_OCC")
        with pytest.raises(DataError, match=r"no occurrence files; expected AUCoding/AU_OCC/F001_T1\.csv"):
            bp4d.read(tree)

    def test_an_unknown_division(self, tree):
        with pytest.raises(ConfigError, match="parts=litterature: did you mean literature"):
            bp4d.read(tree, parts="litterature")


class TestParts:
    def test_the_parts_of_the_literature(self):
        sizes = {part: len(people) for part, people in bp4d.PARTS.items()}
        assert sizes == {"P1": 14, "P2": 14, "P3": 13}
        everybody = [f"F{k:03d}" for k in range(1, 24)] + [f"M{k:03d}" for k in range(1, 19)]
        assert sorted(itertools.chain(*bp4d.PARTS.values())) == everybody

    def test_fera_2015(self, tree):
        table = bp4d.read(tree, parts="fera2015")
        owner = dict(zip(table.strings("subject")[0], table.strings("part")[0], strict=True))
        assert owner == {"F001": "train", "F003": "train", "M006": "dev"}
        assert sum(map(len, bp4d.FERA2015.values())) == 41

    def test_each_person_is_in_its_part(self, tree):
        table = bp4d.read(tree)
        owner = dict(zip(table.strings("subject")[0], table.strings("part")[0], strict=True))
        assert owner == {"F001": "P1", "F003": "P2", "M006": "P3"}


class TestExpected:
    def test_counts_add_up(self):
        counts = {entry.key: entry for entry in bp4d.expected()}
        assert counts["rows"].value == 146_847
        assert [counts[f"rows/part=P{k}"].value for k in (1, 2, 3)] == [50_631, 50_182, 46_034]
        assert sum(counts[f"rows/subject={name}"].value for name in bp4d.SUBJECTS) == 146_847
        assert counts["distinct/subject"].value == 41
        assert counts["size"].value == (1040, 1392)
        assert not counts["size"].found
        assert counts["rate/au10_occurrence"].value == 0.594

    def test_known_lists_are_recognised_by_name(self):
        counts = {entry.key: entry for entry in bp4d.expected()}
        assert "JAA-Net" in counts["rows"].variants[146_576]
        assert "FG-Net" in counts["rows"].variants[146_423]
        assert [*counts["rows/part=P1"].variants] == [50_601]
        assert [*counts["rows/part=P2"].variants] == [50_166]
        assert [*counts["rows/part=P3"].variants] == [45_809]

    def test_options_that_change_counts(self):
        keys = {entry.key for entry in bp4d.expected("fera2015")}
        assert {"rows/part=train", "rows/part=dev"} <= keys
        assert not [entry for entry in bp4d.expected(drop_occluded=True) if entry.key.startswith("rows")]


class TestDress:
    @pytest.mark.parametrize(("count", "people"), [(12, 12), (700, 60), (40, 1)])
    def test_any_number_of_faces(self, count, people):
        dials = FaceDials(image_size=48, subjects=people)
        faces = FaceTable.from_arrow(drawn_faces.labels_table(dials, 1, count), ".", {})
        table, rows = bp4d.dress(faces)
        assert sorted(rows.tolist()) == list(range(count))
        assert len(set(table.strings("image")[0])) == count
        assert set(table.strings("subject")[0]) <= set(bp4d.SUBJECTS)
        assert all(name[-1] in "12345678" for name in table.strings("sequence")[0])

    def test_the_written_header_is_that_of_the_delivered_files(self, tmp_path):
        dials = FaceDials(image_size=48, subjects=12)
        faces = FaceTable.from_arrow(drawn_faces.labels_table(dials, 1, 12), ".", {})
        table = bp4d.dress(faces).table
        facs.write_coding(table, tmp_path, range(1, 100))
        first = sorted((tmp_path / "AUCoding/AU_OCC").iterdir())[0]
        lines = first.read_text().splitlines()
        assert lines[0] == header()
        assert {len(text.split(",")) for text in lines} == {100}
        assert (tmp_path / "AUCoding/AU_INT/AU06").is_dir()
        assert len(list((tmp_path / "AUCoding/AU_INT").iterdir())) == 5
