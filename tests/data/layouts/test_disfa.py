# SPDX-License-Identifier: Apache-2.0
"""DISFA: round trip of videos and of extracted frames, and each trap planted in a small tree."""

from __future__ import annotations

import io
import itertools

import cv2
import numpy as np
import pytest
import scipy.io

from affect.data.check import ERROR, NOTE, WARNING, compare
from affect.data.layouts import disfa, facs
from affect.data.layouts.common import unchanged, write_image
from affect.data.table import FaceTable
from affect.errors import ConfigError, DataError
from affect.labels import AU_SETS, intensity_column, occurrence_column
from tests.data.layouts.contract import LayoutContract

PAIRS = tuple((intensity_column(au), occurrence_column(au)) for au in AU_SETS["disfa12"])


class TestVideos(LayoutContract):
    layout = disfa
    maskable = ("landmarks_49",)
    masked_together = PAIRS

    def test_every_part_has_people(self, table):
        people = {part: set() for part in disfa.DIVISIONS["literature"]}
        for part, subject in zip(table.strings("part")[0], table.strings("subject")[0], strict=True):
            people[part].add(subject)
            assert subject in disfa.DIVISIONS["literature"][part]
        assert min(map(len, people.values())) >= 2

    def test_frames_count_from_1_and_are_those_of_the_labels(self, table, root):
        images, frames = table.strings("image")[0], table.numbers("frame")[0].astype(int)
        assert all(name.endswith(f"!{frame}") for name, frame in zip(images, frames, strict=True))
        assert frames.min() == 1
        video = cv2.VideoCapture(str(root / images[0].partition("!")[0]))
        worked, first = video.read()
        assert worked
        np.testing.assert_array_equal(self.images(table).read(np.array([0]))[0], first[:, :, ::-1])

    def test_any_order_of_rows_gives_the_same_pixels(self, table):
        reader = self.images(table)
        rows = np.random.default_rng(0).permutation(len(table))[:20]
        ordered = dict(zip(sorted(rows), reader.read(np.sort(rows)), strict=True))
        for row, image in zip(rows, reader.read(rows), strict=True):
            np.testing.assert_array_equal(image, ordered[row])


class TestExtractedFrames(LayoutContract):
    """Images that count from 0, beside the delivered folders."""

    layout = disfa
    masked_together = PAIRS[:3]

    def dress(self, drawn):
        return disfa.dress(drawn, frames="frames", offset=1)

    def read(self, root):
        return disfa.read(root, frames="frames", offset=1)

    def test_image_0_has_the_label_of_frame_1(self, table):
        names, frames = table.strings("image")[0], table.numbers("frame")[0].astype(int)
        assert "frames/SN001/0.png" in set(names)
        assert all(int(n.rpartition("/")[2][:-4]) == f - 1 for n, f in zip(names, frames, strict=True))


def put(path, lines):
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text("\n".join(lines) + "\n")


def put_video(path, frames):
    """A video whose frame k is grey with 10 k."""
    path.parent.mkdir(parents=True, exist_ok=True)
    code = cv2.VideoWriter.fourcc(*"MJPG")
    writer = cv2.VideoWriter(str(path), cv2.CAP_OPENCV_MJPEG, code, 20.0, (32, 24), [cv2.VIDEOWRITER_PROP_QUALITY, 95])
    for k in range(1, frames + 1):
        writer.write(np.full((24, 32, 3), 10 * k, np.uint8))
    writer.release()


LENGTHS = {"SN001": 8, "SN010": 7, "SN029": 8}
AU_OF_25 = [0, 1, 2, 3, 4, 5, 0, 2]


@pytest.fixture
def tree(tmp_path):
    """One person of P1 with 8 frames, SN010 with 7, one of P3 without a file of AU4; videos and no frames."""
    root = tmp_path / "DISFA"
    for subject, length in LENGTHS.items():
        for au in AU_SETS["disfa12"]:
            if (subject, au) != ("SN029", 4):
                values = AU_OF_25 if au == 25 else [0] * 8
                lines = [f"{k + 1},{values[k]}" for k in range(length)]
                put(root / f"ActionUnit_Labels/{subject}/{subject}_au{au}.txt", lines)
        put_video(root / f"Videos_LeftCamera/LeftVideo{subject}_comp.avi", length)
    put_video(root / "Videos_RightCamera/RightVideoSN001_comp.avi", 8)
    return root


def extract(folder, first, lengths=LENGTHS, pattern="{}.png"):
    for subject, length in lengths.items():
        for k in range(length):
            image = np.full((6, 8, 3), 10 * (k + 1), np.uint8)
            write_image(folder / subject / pattern.format(first + k), image)


def of(table, subject, name):
    rows = np.flatnonzero(table.strings("subject")[0] == subject)
    values, valid = table.numbers(name, rows)
    return [value.item() if known else None for value, known in zip(values, valid, strict=True)]


class TestLabels:
    def test_rows(self, tree):
        table = disfa.read(tree)
        assert len(table) == 23
        assert table.metadata["people"] == "disfa"
        assert not table.metadata["skipped"]
        assert of(table, "SN010", "frame") == [1, 2, 3, 4, 5, 6, 7]

    def test_intensity_and_occurrence_from_two_on(self, tree):
        table = disfa.read(tree)
        assert of(table, "SN001", "au25_intensity") == AU_OF_25
        assert of(table, "SN001", "au25_occurrence") == [0, 0, 1, 1, 1, 1, 0, 1]

    @pytest.mark.parametrize(("threshold", "positive"), [(1, 6), (3, 3), (5, 1)])
    def test_another_threshold(self, tree, threshold, positive):
        assert sum(of(disfa.read(tree, threshold=threshold), "SN001", "au25_occurrence")) == positive

    @pytest.mark.parametrize("threshold", [0, 6])
    def test_a_threshold_that_is_none(self, tree, threshold):
        with pytest.raises(ConfigError, match=f"threshold={threshold}: expected an intensity from 1 to 5"):
            disfa.read(tree, threshold=threshold)

    def test_a_missing_file_is_null_and_never_zero(self, tree):
        table = disfa.read(tree)
        for name in ("au04_intensity", "au04_occurrence"):
            assert of(table, "SN029", name) == [None] * 8
            assert of(table, "SN001", name) == [0] * 8
        assert of(table, "SN029", "au25_intensity") == AU_OF_25
        assert any(note.startswith("SN029 has no label file of AU 4") for note in table.metadata["notes"])

    def test_files_without_the_prefix(self, tree):
        before = disfa.read(tree)
        for path in list((tree / "ActionUnit_Labels/SN001").iterdir()):
            path.rename(path.with_name(path.name.removeprefix("SN001_")))
        assert disfa.read(tree).fingerprint == before.fingerprint

    def test_both_names_of_one_file(self, tree):
        put(tree / "ActionUnit_Labels/SN001/au1.txt", ["1,0"])
        with pytest.raises(DataError, match=r"SN001: SN001_au1\.txt and au1\.txt are the same action unit"):
            disfa.read(tree)

    def test_a_line_that_one_file_lacks_is_null_there(self, tree):
        put(tree / "ActionUnit_Labels/SN001/SN001_au1.txt", [f"{k},3" for k in (1, 2, 4, 5, 6, 7, 8)])
        table = disfa.read(tree)
        assert of(table, "SN001", "au01_intensity") == [3, 3, None, 3, 3, 3, 3, 3]
        assert of(table, "SN001", "au02_intensity") == [0] * 8
        assert any("lack frames" in note for note in table.metadata["notes"])

    def test_all_twelve_columns_are_there_even_if_empty(self, tree):
        for path in tree.rglob("*_au26.txt"):
            path.unlink()
        table = disfa.read(tree)
        assert {name for pair in PAIRS for name in pair} <= table.names
        assert not table.numbers("au26_occurrence")[1].any()

    @pytest.mark.parametrize(
        ("lines", "message"),
        [
            (["1,0", "2,6"], r"SN001_au1\.txt, line 2: expected an intensity from 0 to 5, found '2,6'"),
            (["1,0", "2,9"], r"line 2: expected an intensity from 0 to 5, found"),
            (["1,0", "2"], r"line 2: 1 fields, expected 2"),
            (["1,0", "2,0,0"], r"line 2: 3 fields, expected 2"),
            (["1,0", "two,0"], r"line 2: expected a whole number, found 'two'"),
            (["1,0", "1,0"], r"line 2: expected a frame number above"),
            ([""], r"SN001_au1\.txt: the file is empty"),
        ],
    )
    def test_bad_lines(self, tree, lines, message):
        put(tree / "ActionUnit_Labels/SN001/SN001_au1.txt", lines)
        with pytest.raises(DataError, match=message):
            disfa.read(tree)

    def test_windows_files(self, tree):
        before = disfa.read(tree)
        for path in (tree / "ActionUnit_Labels/SN001").iterdir():
            path.write_bytes(b"\xef\xbb\xbf" + path.read_bytes().replace(b"\n", b"\r\n") + b"\r\n")
        assert disfa.read(tree).fingerprint == before.fingerprint

    def test_a_number_that_nobody_has(self, tree):
        (tree / "ActionUnit_Labels/SN014").mkdir()
        with pytest.raises(DataError, match="SN014: nobody of DISFA has this number"):
            disfa.read(tree)


class TestVideosOfATree:
    def test_the_left_camera(self, tree):
        names = disfa.read(tree).strings("image")[0]
        assert names[0] == "Videos_LeftCamera/LeftVideoSN001_comp.avi!1"
        assert all("LeftVideo" in name for name in names)

    def test_pixels_are_those_of_the_labelled_frame(self, tree):
        table = disfa.read(tree)
        for row, image in enumerate(disfa.images(table).read(np.arange(len(table)))):
            assert abs(image.mean() - 10 * table.numbers("frame", np.array([row]))[0][0]) <= 3

    def test_the_other_spelling_of_the_folder(self, tree):
        (tree / "Videos_LeftCamera").rename(tree / "Video_LeftCamera")
        assert disfa.read(tree).strings("image")[0][0].startswith("Video_LeftCamera/")

    def test_a_person_without_a_video_is_counted(self, tree):
        (tree / "Videos_LeftCamera/LeftVideoSN010_comp.avi").unlink()
        table = disfa.read(tree)
        assert len(table) == 16
        assert table.metadata["skipped"] == {"no video of the left camera of this person": 7}

    def test_a_short_video_is_counted_and_noted(self, tree):
        put_video(tree / "Videos_LeftCamera/LeftVideoSN001_comp.avi", 6)
        table = disfa.read(tree)
        reason = "the video ends before this labelled frame"
        assert table.metadata["skipped_examples"][reason] == ["SN001 frame 7", "SN001 frame 8"]
        assert any("6 frames, labels are of 8" in note for note in table.metadata["notes"])

    def test_a_longer_video_has_frames_that_are_no_rows(self, tree):
        put_video(tree / "Videos_LeftCamera/LeftVideoSN001_comp.avi", 9)
        table = disfa.read(tree)
        assert len(table) == 23
        assert any("9 frames, labels are of 8" in note for note in table.metadata["notes"])

    def test_no_video(self, tree, tmp_path):
        for path in (tree / "Videos_LeftCamera").iterdir():
            path.unlink()
        with pytest.raises(DataError, match=r"no videos; .* dataset\.frames=<folder> dataset\.offset=0 or 1"):
            disfa.read(tree)

    def test_a_damaged_video(self, tree):
        (tree / "Videos_LeftCamera/LeftVideoSN001_comp.avi").write_bytes(b"RIFF")
        with pytest.raises(DataError, match=r"LeftVideoSN001_comp\.avi: not a readable video \(4 bytes\)"):
            disfa.read(tree)

    def test_a_new_video_is_noticed(self, tree):
        table = disfa.read(tree)
        assert unchanged(table, tree)
        put_video(tree / "Videos_LeftCamera/LeftVideoSN001_comp.avi", 6)
        assert not unchanged(table, tree)


class TestOffset:
    @pytest.mark.parametrize(("first", "offset"), [(0, 1), (1, 0)])
    def test_both_conventions_give_the_same_labels(self, tree, first, offset):
        extract(tree / "frames", first, pattern="{:05d}.png" if first else "{}.png")
        table = disfa.read(tree, frames="frames", offset=offset)
        assert len(table) == 23
        for row, image in enumerate(disfa.images(table).read(np.arange(23))):
            assert image.mean() == 10 * table.numbers("frame", np.array([row]))[0][0]

    def test_images_from_0_with_offset_0(self, tree):
        extract(tree / "frames", 0)
        with pytest.raises(
            DataError, match=r"frames/SN001 holds 0\.png, so its images count from 0: set dataset.off.*=1"
        ):
            disfa.read(tree, frames="frames", offset=0)

    def test_images_from_1_with_offset_1(self, tree):
        extract(tree / "frames", 1)
        with pytest.raises(DataError, match=r"SN001 holds no image 0, .*1\.png …\): set dataset\.offset=0"):
            disfa.read(tree, frames="frames", offset=1)

    def test_one_person_numbered_otherwise(self, tree):
        extract(tree / "frames", 0, {"SN001": 8, "SN029": 8})
        extract(tree / "frames", 1, {"SN010": 7})
        with pytest.raises(DataError, match="SN010 holds no image 0"):
            disfa.read(tree, frames="frames", offset=1)
        with pytest.raises(DataError, match=r"SN001 holds 0\.png"):
            disfa.read(tree, frames="frames", offset=0)

    @pytest.mark.parametrize(("first", "offset"), [(0, 1), (1, 0)])
    def test_not_stated(self, tree, first, offset):
        extract(tree / "frames", first)
        with pytest.raises(ConfigError, match=rf"begins with {first}\.png, .* dataset\.offset={offset}"):
            disfa.read(tree, frames="frames")

    def test_another_number(self, tree):
        extract(tree / "frames", 1)
        with pytest.raises(ConfigError, match="offset=2: expected 0"):
            disfa.read(tree, frames="frames", offset=2)

    def test_one_person_from_1_whose_last_image_is_lost(self, tree):
        extract(tree / "frames", 0, {"SN001": 8, "SN029": 8})
        extract(tree / "frames", 1, {"SN010": 6})
        with pytest.raises(DataError, match=r"SN010 holds no image 0, .* dataset\.lost_first=\[SN010\]"):
            disfa.read(tree, frames="frames", offset=1)

    @pytest.mark.parametrize("gone", [0, 3])
    def test_a_missing_image_is_counted(self, tree, gone):
        extract(tree / "frames", 0)
        (tree / f"frames/SN029/{gone}.png").unlink()
        lost_first = ["SN029"] if gone == 0 else ()
        table = disfa.read(tree, frames="frames", offset=1, lost_first=lost_first)
        assert len(table) == 22
        assert table.metadata["skipped_examples"] == {"no image of a labelled frame": [f"SN029 frame {gone + 1}"]}

    def test_nobody_whose_image_0_is_lost(self, tree):
        with pytest.raises(ConfigError, match=r"lost_first=SN01: did you mean SN0"):
            disfa.read(tree, frames="frames", offset=1, lost_first=["SN01"])

    def test_a_missing_folder_is_counted(self, tree):
        extract(tree / "frames", 0, {"SN001": 8})
        table = disfa.read(tree, frames="frames", offset=1)
        assert table.metadata["skipped"] == {"no folder of extracted frames of this person": 15}

    def test_frames_elsewhere(self, tree, tmp_path):
        extract(tmp_path / "extracted", 1)
        table = disfa.read(tree, frames=str(tmp_path / "extracted"), offset=0)
        assert table.strings("image")[0][0] == "../extracted/SN001/1.png"
        assert len(disfa.images(table).read(np.arange(23))) == 23

    def test_no_such_folder(self, tree):
        with pytest.raises(DataError, match=r"no such folder of extracted frames \(dataset\.frames=farmes\)"):
            disfa.read(tree, frames="farmes", offset=0)
        (tree / "frames").mkdir()
        with pytest.raises(DataError, match="no frames; expected frames/SN001/"):
            disfa.read(tree, frames="frames", offset=0)


def put_points(path, value, name="pts", shape=(66, 2)):
    path.parent.mkdir(parents=True, exist_ok=True)
    points = np.zeros(shape)
    points[17:] = value
    stream = io.BytesIO()
    scipy.io.savemat(stream, {name: points})
    path.write_bytes(stream.getvalue())


class TestPoints:
    def first(self, table, subject="SN001"):
        rows = np.flatnonzero(table.strings("subject")[0] == subject)
        points, valid = table.numbers("landmarks_49", rows)
        return [row[0].item() if known else None for row, known in zip(points, valid, strict=True)]

    def test_names_that_count_from_0(self, tree):
        for k in range(8):
            put_points(tree / f"Landmark_Points/SN001/tmp_frame_lm/SN001_{k:04d}_lm.mat", k + 1)
        table = disfa.read(tree)
        assert self.first(table) == [1, 2, 3, 4, 5, 6, 7, 8]
        assert self.first(table, "SN010") == [None] * 7

    def test_names_that_count_from_1_and_a_missing_one(self, tree):
        for k in (1, 2, 3, 5, 6, 7, 8):
            put_points(tree / f"Landmark_Points/SN001/tmp_frame_lm/l{k:05d}_lm.mat", k)
        table = disfa.read(tree)
        assert self.first(table) == [1, 2, 3, None, 5, 6, 7, 8]
        assert any("no points of some frames" in note for note in table.metadata["notes"])

    def test_the_jaw_is_left_out(self, tree):
        put_points(tree / "Landmark_Points/SN001/tmp_frame_lm/l00001_lm.mat", np.arange(98).reshape(49, 2))
        np.testing.assert_array_equal(disfa.read(tree).numbers("landmarks_49", np.array([0]))[0][0], np.arange(98))

    def test_other_contents_are_null_with_a_note(self, tree):
        put_points(tree / "Landmark_Points/SN001/tmp_frame_lm/l00001_lm.mat", 1, name="other")
        put_points(tree / "Landmark_Points/SN001/tmp_frame_lm/l00002_lm.mat", 1, shape=(68, 2))
        put_points(tree / "Landmark_Points/SN001/tmp_frame_lm/l00003_lm.mat", 1)
        table = disfa.read(tree)
        assert self.first(table)[:4] == [None, None, 1, None]
        assert any("hold no 66 points" in note for note in table.metadata["notes"])

    def test_they_can_be_left_out(self, tree):
        put_points(tree / "Landmark_Points/SN001/tmp_frame_lm/l00001_lm.mat", 1)
        assert "landmarks_49" not in disfa.read(tree, points=False).names


class TestFolds:
    def test_every_division_holds_everybody_once(self):
        everybody = sorted(f"SN{k:03d}" for k in {*range(1, 33)} - {14, 15, 19, 20, 22})
        assert list(disfa.SUBJECTS) == everybody
        for parts in disfa.DIVISIONS.values():
            assert sorted(itertools.chain(*parts.values())) == everybody
        for name in ("literature", "classic", "intensity"):
            assert [len(people) for people in disfa.DIVISIONS[name].values()] == [9, 9, 9]

    def test_the_tuning_division_tests_the_third_part(self):
        tuning, parts = disfa.DIVISIONS["tuning"], disfa.DIVISIONS["literature"]
        assert tuning["test"] == parts["P3"]
        assert set(tuning["train"]) | set(tuning["validation"]) == set(parts["P1"]) | set(parts["P2"])

    @pytest.mark.parametrize(
        ("folds", "parts"),
        [
            ("literature", ["P1", "P1", "P3"]),
            ("classic", ["P1", "P2", "P3"]),
            ("intensity", ["P1", "P2", "P1"]),
            ("tuning", ["train", "train", "test"]),
        ],
    )
    def test_parts_of_the_rows(self, tree, folds, parts):
        table = disfa.read(tree, folds=folds)
        owner = dict(zip(table.strings("subject")[0], table.strings("part")[0], strict=True))
        assert [owner[name] for name in LENGTHS] == parts

    def test_an_unknown_division(self, tree):
        with pytest.raises(ConfigError, match="folds=clasic: did you mean classic"):
            disfa.read(tree, folds="clasic")


class TestExpected:
    def test_counts(self):
        counts = {entry.key: entry for entry in disfa.expected()}
        assert counts["rows"].value == 130_814
        assert "JAA-Net" in counts["rows"].variants[126_144]
        assert [counts[f"rows/part=P{k}"].value for k in (1, 2, 3)] == [43_604, 43_605, 43_605]
        assert counts["rows/subject=SN010"].value == 4_844
        assert counts["rows/subject=SN021"].variants == {1793: disfa._JAANET}
        assert counts["rate/au25_occurrence"].value == 0.278
        assert not counts["size"].found

    def test_the_rows_of_jaa_nets_lists_are_no_error(self):
        """Whom else they lose rows of than the three whose numbers are known nobody published."""
        counts = {name: disfa._WITH_POINTS.get(name, count) for name, count in disfa._ROWS.items()}
        for name in ("SN002", "SN010", "SN016"):
            counts[name] -= (sum(counts.values()) - 126_144) // (1 if name == "SN016" else 3)
        subjects = np.repeat(list(counts), list(counts.values()))
        part = np.array([facs.part_of(disfa.DIVISIONS["literature"])[name] for name in counts], object)
        table = FaceTable.from_columns(
            {"image": subjects, "subject": subjects, "part": np.repeat(part, list(counts.values()))}, ".", {}
        )
        found = compare(table, [entry for entry in disfa.expected() if not entry.key.startswith("rate")])
        assert not [finding for finding in found if finding.level in (WARNING, ERROR)]
        assert [finding.key for finding in found if finding.level == NOTE][:2] == ["rows", "rows/part=P1"]

    def test_rates_are_those_of_the_literatures_threshold(self):
        assert not [entry for entry in disfa.expected(threshold=1) if entry.key.startswith("rate")]
        assert {entry.key for entry in disfa.expected("tuning")} >= {"rows/part=train", "rows/part=validation"}


def test_a_video_of_images_of_several_sizes(tmp_path, drawn):
    class Growing:
        def read(self, rows):
            return [np.zeros((8 + 2 * int(row), 8, 3), np.uint8) for row in rows]

    table = disfa.dress(drawn).table
    with pytest.raises(DataError, match=r"images of a video have one size, found \(8, \d+\) and \(8, \d+\)"):
        disfa.write(table, tmp_path / "tree", Growing())
    written = [path.name for path in (tmp_path / "tree").rglob("*.avi")]
    assert not [name for name in written if name.startswith(".")]
    assert len(written) < len(set(table.strings("subject")[0]))


def test_drawn_landmarks_are_the_inner_ones(drawn):
    points, _ = facs.points_49(drawn)
    whole = drawn.numbers("landmarks_68")[0].reshape(-1, 68, 2)
    points = points.reshape(-1, 49, 2)
    np.testing.assert_array_equal(points[:, 19], whole[:, 36])
    np.testing.assert_array_equal(points[:, 43:], whole[:, [61, 62, 63, 65, 66, 67]])
