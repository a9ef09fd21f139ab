# SPDX-License-Identifier: Apache-2.0
"""Aff-Wild2: the contract for every track and year, then each trap of the format in trees of a few lines."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest

from affect import labels
from affect.data.expected import measure
from affect.data.images import FileImages, Source
from affect.data.layouts import affwild2
from affect.data.layouts.common import unchanged, write_lines
from affect.data.protocol import Protocol, divide
from affect.data.table import FaceTable
from affect.errors import ConfigError, DataError
from tests.data.layouts.contract import ChosenFaces, LayoutContract

AUS = tuple(labels.occurrence_column(number) for number in labels.AU_SETS["affwild2"])
AXES = labels.AFFECT_AXES


class TestAllTracks(LayoutContract):
    layout = affwild2
    group = "video"
    maskable = ("expression", *AUS)
    masked_together = (AXES,)
    expressions = labels.EXPRESSION_ORDERS["abaw"]

    def test_every_track_and_part_occurs(self, table):
        for track in affwild2.TRACKS:
            parts, known = table.strings(f"part_{track}")
            assert set(parts[known]) == {"train", "validation"}
        assert not table.strings("part_va")[1].all()
        for name in ("valence", "au12_occurrence"):
            assert table.numbers(name)[1].any()

    def test_published_counts_count_labels_and_videos(self, table):
        known, parts = table.strings("expression")[1], table.strings("part_expr")[0]
        wanted = int((known & (parts == "validation")).sum())
        assert 0 < wanted < known.sum()
        assert measure(table, "labelled/expression/part_expr=validation") == wanted
        sequences = table.strings("sequence")[0][parts == "validation"]
        assert measure(table, "distinct/sequence/part_expr=validation") == len(set(sequences))

    def test_two_people_of_a_video_are_one_group(self, table):
        sequences, videos = table.strings("sequence")[0], table.strings("video")[0]
        pairs = {video: {s for s, v in zip(sequences, videos, strict=True) if v == video} for video in set(videos)}
        assert {len(found) for found in pairs.values()} == {1, 2}
        assert not any(video.endswith(("_left", "_right")) for video in pairs)


class TestValenceArousal(LayoutContract):
    layout = affwild2
    group = "video"

    def read(self, root):
        return affwild2.read(root, tracks="va")

    def dress(self, drawn):
        return affwild2.dress(drawn, tracks="va")

    def expected(self):
        return affwild2.expected("va")


class TestExpressions(LayoutContract):
    layout = affwild2
    group = "video"
    expressions = labels.EXPRESSION_ORDERS["abaw"]

    def read(self, root):
        return affwild2.read(root, tracks=["expr"])

    def dress(self, drawn):
        return affwild2.dress(drawn, tracks=["expr"])

    def write(self, table, root, images):
        affwild2.write(table, root, images, challenge=3)

    def expected(self):
        return affwild2.expected(["expr"])


class TestActionUnits(LayoutContract):
    layout = affwild2
    group = "video"
    maskable = AUS

    def read(self, root):
        return affwild2.read(root, tracks=["au"])

    def dress(self, drawn):
        return affwild2.dress(drawn, tracks=["au"])

    def write(self, table, root, images):
        affwild2.write(table, root, images, challenge=10)

    def expected(self):
        return affwild2.expected(["au"], challenge=10)


class TestFirstChallenge(LayoutContract):
    """Seven classes, eight action units, other folders."""

    layout = affwild2
    group = "video"
    maskable = ("expression", *(labels.occurrence_column(k) for k in labels.AU_SETS["affwild2_abaw1"]))
    masked_together = (AXES,)
    expressions = labels.EXPRESSION_ORDERS["abaw7"]

    def dress(self, drawn):
        return affwild2.dress(drawn, aus="affwild2_abaw1", expressions="abaw7")

    def write(self, table, root, images):
        affwild2.write(table, root, images, challenge=1)

    def expected(self):
        return affwild2.expected(challenge=1)

    def test_folders_are_those_of_the_year(self, root):
        assert sorted(path.name for path in (root / "annotations").iterdir()) == ["AU_Set", "EXPR_Set", "VA_Set"]
        assert (root / "annotations" / "AU_Set" / "Training_Set").is_dir()


class TestMultiTask(LayoutContract):
    layout = affwild2
    group = "video"
    maskable = ("expression", *AUS)
    masked_together = (AXES,)
    expressions = labels.EXPRESSION_ORDERS["abaw"]

    def read(self, root):
        return affwild2.read(root, tracks="mtl")

    def dress(self, drawn):
        return affwild2.dress(drawn, tracks="mtl")

    def expected(self):
        return affwild2.expected("mtl")


class TestMultiTaskOfTheThirdChallenge(TestMultiTask):
    def write(self, table, root, images):
        affwild2.write(table, root, images, challenge=3)

    def test_files_are_those_of_the_year(self, root):
        folder = root / "Third ABAW Annotations" / "MTL_Challenge"
        assert sorted(path.name for path in folder.iterdir()) == ["train_set.txt", "validation_set.txt"]


# ------------------------------------------------------------------------------------------------------------- traps

CLASSES = "Neutral,Anger,Disgust,Fear,Happiness,Sadness,Surprise,Other"
UNITS = "AU1,AU2,AU4,AU6,AU7,AU10,AU12,AU15,AU23,AU24,AU25,AU26"
CHALLENGES = {
    "va": "VA_Estimation_Challenge",
    "expr": "EXPR_Recognition_Challenge",
    "au": "AU_Detection_Challenge",
}
ON, OFF = ",".join("1" * 12), ",".join("0" * 12)


class Tree:
    """A tree of a few lines; images are empty files, since reading labels never opens one."""

    def __init__(self, root: Path) -> None:
        self.root = root
        self.labels = root / "6th ABAW Annotations"

    def images(self, sequence: str, *numbers: int, folder: str = "cropped_aligned") -> None:
        for number in numbers:
            path = self.root / folder / sequence / f"{number:05d}.jpg"
            path.parent.mkdir(parents=True, exist_ok=True)
            path.touch()

    def file(self, track: str, part: str, sequence: str) -> Path:
        return self.labels / CHALLENGES[track] / f"{part}_Set" / f"{sequence}.txt"

    def lines(self, track: str, part: str, sequence: str, *lines: str, header: str | None = None) -> None:
        headers = {"va": "valence,arousal", "expr": CLASSES, "au": UNITS}
        write_lines(self.file(track, part, sequence), [header or headers[track], *lines])

    def other_parts(self) -> None:
        """Fill every part that would be empty, with a video of its own."""
        for track, line in (("va", "0,0"), ("expr", "0"), ("au", OFF)):
            for part in ("Train", "Validation"):
                self.images(f"other-{part}", 1)
                self.lines(track, part, f"other-{part}", line)

    def mtl(self, *lines: str, validation: tuple[str, ...] = (), header: str | None = None) -> None:
        header = header or "image,valence,arousal,expression,aus"
        write_lines(self.root / "training_set_annotations.txt", [header, *lines])
        write_lines(self.root / "validation_set_annotations.txt", [header, *validation])


@pytest.fixture
def tree(tmp_path) -> Tree:
    made = Tree(tmp_path)
    made.other_parts()
    return made


def of(table: FaceTable, sequence: str = "v") -> FaceTable:
    return table.take(np.flatnonzero(table.strings("sequence")[0] == sequence))


def cells(table: FaceTable, name: str) -> list:
    column = table.column(name)
    return [round(v, 3) if isinstance(v, float) else v for v in column.to_pylist()]


class TestFrames:
    def test_line_k_belongs_to_image_k_whatever_is_missing(self, tree):
        tree.images("v", 1, 2, 4)
        tree.lines("va", "Train", "v", "0.1,0", "0.2,0", "0.3,0", "0.4,0", "0.5,0", "0.6,0")
        table = affwild2.read(tree.root, "va")
        assert cells(of(table), "valence") == [0.1, 0.2, 0.4]
        assert cells(of(table), "frame") == [1, 2, 4]
        assert cells(of(table), "image") == [f"cropped_aligned/v/0000{k}.jpg" for k in (1, 2, 4)]
        assert table.metadata["skipped"] == {
            "label line without an image (no face was detected)": 1,
            "label line behind the last image of its video": 2,
        }
        assert table.metadata["skipped_examples"] == {
            "label line without an image (no face was detected)": ["v/00003"],
            "label line behind the last image of its video": ["v/00005", "v/00006"],
        }

    def test_videos_without_a_label_file_are_counted_and_named(self, tree):
        tree.images("v", 1, 2)
        tree.lines("va", "Train", "v", "0.1,0", "0.2,0")
        tree.images("lost", 1, 2, 3)
        tree.images("later", 4, folder="cropped_aligned_new_50_vids")
        tree.lines("au", "Train", "later", *[OFF] * 4)
        reason = "image of a video without a label file in the selected tracks (the test set's have none)"
        table = affwild2.read(tree.root, "va")
        assert table.metadata["skipped"] == {reason: 4}
        assert table.metadata["skipped_examples"] == {reason: ["later", "lost"]}
        assert affwild2.read(tree.root).metadata["skipped_examples"][reason] == ["lost"]
        tree.images("lost", 4)
        assert not unchanged(table, tree.root)

    def test_a_doubled_line_is_suspected_where_every_frame_has_an_image(self, tree):
        tree.images("v", 1, 2, 3)
        tree.images("gap", 1, 3)
        tree.images("w", 1, 2)
        tree.lines("va", "Train", "v", "0.1,0", "0.2,0", "0.2,0", "0.3,0")
        tree.lines("va", "Train", "gap", "0.1,0", "0.2,0", "0.3,0", "0.4,0")
        tree.lines("va", "Train", "w", "0.1,0", "0.2,0")
        (note,) = affwild2.read(tree.root, "va").metadata["notes"]
        assert "one label line more" in note
        assert note.endswith("(1: v: 4 lines, 3 images)")

    def test_written_trees_have_no_note(self, drawn, tmp_path):
        dressed = affwild2.dress(drawn)
        affwild2.write(dressed.table, tmp_path, ChosenFaces(dressed.rows))
        assert not affwild2.read(tmp_path).metadata["notes"]

    def test_tracks_of_a_video_that_differ_in_length_are_named(self, tree):
        for name in ("v", "w"):
            tree.images(name, 1, 2, 4)
            tree.lines("va", "Train", name, *["0.1,0"] * 4)
            tree.lines("au", "Train", name, *[OFF] * (5 if name == "v" else 4))
        (note,) = affwild2.read(tree.root, ("va", "au")).metadata["notes"]
        assert "label files of different lengths" in note
        assert note.endswith("(1: v: va 4, au 5)")
        assert not affwild2.read(tree.root, "va").metadata["notes"]

    def test_images_behind_the_last_line_are_not_labelled(self, tree):
        tree.images("v", 1, 2, 3, 4)
        tree.lines("va", "Train", "v", "0.1,0", "0.2,0")
        table = affwild2.read(tree.root, "va")
        assert cells(of(table), "frame") == [1, 2]
        assert table.metadata["skipped"] == {"image without a label line": 2}

    def test_a_track_with_fewer_lines_is_missing_behind_them(self, tree):
        tree.images("v", 1, 2, 3)
        tree.lines("va", "Train", "v", "0.1,0", "0.2,0", "0.3,0")
        tree.lines("expr", "Train", "v", "4", "6")
        table = of(affwild2.read(tree.root, ["va", "expr"]))
        assert cells(table, "expression") == ["happiness", "surprise", None]
        assert cells(table, "valence") == [0.1, 0.2, 0.3]

    def test_stray_files_are_no_frames_and_no_videos(self, tree):
        tree.images("v", 1)
        tree.lines("va", "Train", "v", "0.1,0")
        for name in (".DS_Store", "._00002.jpg", "Thumbs.db", "00002.txt", "00002_copy.jpg"):
            (tree.root / "cropped_aligned" / "v" / name).touch()
        (tree.root / "cropped_aligned" / ".DS_Store").touch()
        tree.file("va", "Train", "v").with_name("._v.txt").write_bytes(b"\x00\x05\x16\x07")
        tree.file("va", "Train", "v").with_name(".DS_Store").write_bytes(b"\x00")
        table = affwild2.read(tree.root, "va")
        assert cells(of(table), "frame") == [1]
        assert not table.metadata["skipped"]

    def test_padding_differs_between_copies(self, tree):
        folder = tree.root / "cropped_aligned" / "v"
        folder.mkdir()
        for name in ("1.jpg", "0002.JPG", "10.png", "00003.jpeg"):
            (folder / name).touch()
        tree.lines("va", "Train", "v", *(f"0.{k:02d},0" for k in range(1, 12)))
        table = of(affwild2.read(tree.root, "va"))
        assert cells(table, "valence") == [0.01, 0.02, 0.03, 0.1]
        names = [image.rpartition("/")[2] for image in cells(table, "image")]
        assert names == ["1.jpg", "0002.JPG", "00003.jpeg", "10.png"]

    def test_two_images_of_one_number(self, tree):
        tree.images("v", 1)
        (tree.root / "cropped_aligned" / "v" / "1.jpg").touch()
        tree.lines("va", "Train", "v", "0,0")
        with pytest.raises(DataError, match=r"00001\.jpg and 1\.jpg are the same number"):
            affwild2.read(tree.root, "va")

    def test_a_video_without_images_is_counted(self, tree):
        tree.lines("va", "Train", "v", "0,0", "0,0", "0,0")
        skipped = affwild2.read(tree.root, "va").metadata
        assert skipped["skipped"] == {"label lines of a video without a folder of images": 3}
        assert skipped["skipped_examples"] == {"label lines of a video without a folder of images": ["v"]}

    def test_a_video_is_taken_from_the_first_folder_that_has_it(self, tree):
        tree.images("v", 1, 2)
        tree.images("v", 1, 2, 3, folder="cropped_aligned_new_50_vids")
        tree.images("w", 1, folder="cropped_aligned_new_50_vids")
        tree.lines("va", "Train", "v", "0,0", "0,0", "0,0")
        tree.lines("va", "Train", "w", "0,0")
        table = affwild2.read(tree.root, "va")
        assert cells(of(table), "image") == ["cropped_aligned/v/00001.jpg", "cropped_aligned/v/00002.jpg"]
        assert cells(of(table, "w"), "image") == ["cropped_aligned_new_50_vids/w/00001.jpg"]
        new = affwild2.read(tree.root, "va", crops="cropped_aligned_new_50_vids")
        assert len(of(new)) == 3
        assert set(cells(new, "sequence")) == {"v", "w"}


class TestMissing:
    def test_minus_five_in_one_masks_both(self, tree):
        tree.images("v", 1, 2, 3)
        tree.lines("va", "Train", "v", "-5,0.3", "0.1,0.2", "0.3,-5")
        tree.lines("expr", "Train", "v", "1", "1", "1")
        table = affwild2.read(tree.root, ["va", "expr"])
        assert cells(of(table), "valence") == [None, 0.1, None]
        assert cells(of(table), "arousal") == [None, 0.2, None]
        assert not table.metadata["notes"]

    def test_valence_outside_its_range_is_masked_and_noted(self, tree):
        tree.images("v", 1, 2, 3)
        tree.lines("va", "Train", "v", "1.5,0", "1,-1", "0,-1.01")
        table = affwild2.read(tree.root, "va")
        assert cells(of(table), "valence") == [1.0]
        (note,) = table.metadata["notes"]
        assert note.startswith("2 frames have valence or arousal outside [-1, 1]")
        assert "v.txt, line 2" in note

    def test_minus_one_is_no_class(self, tree):
        tree.images("v", 1, 2, 3)
        tree.lines("expr", "Train", "v", "-1", "7", "0")
        table = affwild2.read(tree.root, "expr")
        assert cells(of(table), "expression") == ["other", "neutral"]
        assert table.metadata["skipped"] == {"no label in the selected tracks (-5 or -1)": 1}

    def test_each_action_unit_is_masked_by_itself(self, tree):
        tree.images("v", 1, 2)
        tree.lines("au", "Train", "v", "1,-1" + ",0" * 10, ON)
        table = of(affwild2.read(tree.root, "au"))
        assert cells(table, "au01_occurrence") == [1.0, 1.0]
        assert cells(table, "au02_occurrence") == [None, 1.0]
        assert cells(table, "au26_occurrence") == [0.0, 1.0]

    def test_complete_aus_leaves_frames_out_as_public_readers_do(self, tree):
        tree.images("v", 1, 2)
        tree.lines("au", "Train", "v", "1,-1" + ",0" * 10, ON)
        assert cells(of(affwild2.read(tree.root, "au", complete_aus=True)), "frame") == [2]

    def test_a_frame_without_any_label_is_no_row(self, tree):
        tree.images("v", 1, 2)
        tree.lines("va", "Train", "v", "-5,-5", "0,0")
        tree.lines("expr", "Train", "v", "-1", "0")
        tree.lines("au", "Train", "v", ",".join(["-1"] * 12), OFF)
        table = affwild2.read(tree.root)
        assert cells(of(table), "frame") == [2]
        assert table.metadata["skipped"] == {"no label in the selected tracks (-5 or -1)": 1}


class TestHeaders:
    def test_the_header_of_expressions_lists_classes(self, tree):
        tree.images("v", 1, 2)
        header = "Neutral,Happiness,Sadness,Surprise,Fear,Disgust,Anger,Other"
        tree.lines("expr", "Train", "v", "1", "6", header=header)
        table = affwild2.read(tree.root, "expr")
        assert cells(of(table), "expression") == ["happiness", "anger"]
        assert table.expressions == labels.EXPRESSION_ORDERS["abaw"]

    def test_action_units_are_read_by_name(self, tree):
        tree.images("v", 1)
        units = UNITS.split(",")[::-1]
        for part in ("Train", "Validation"):
            tree.lines("au", part, f"other-{part}", OFF, header=",".join(units))
        tree.lines("au", "Train", "v", "1" + ",0" * 11, header=",".join(units))
        table = of(affwild2.read(tree.root, "au"))
        assert cells(table, "au26_occurrence") == [1.0]
        assert cells(table, "au01_occurrence") == [0.0]

    def test_arousal_may_come_first(self, tree):
        tree.images("v", 1)
        tree.lines("va", "Train", "v", "0.7,-0.2", header="Arousal, Valence")
        table = of(affwild2.read(tree.root, "va"))
        assert (cells(table, "valence"), cells(table, "arousal")) == ([-0.2], [0.7])

    @pytest.mark.parametrize(
        ("track", "header", "message"),
        [
            ("va", "0.1,0.2", r"v\.txt, line 1: expected valence,arousal, found '0\.1,0\.2'"),
            ("expr", "4", r"line 1: expected the class list Neutral,Anger,.*found '4'"),
            ("expr", "Neutral,Anger,Disgust,Fear,Happiness,Sadness,Neutral", "line 1: expected the class list"),
            ("au", "1,0,0,0,0,0,0,0,0,0,0,0", r"line 1: expected names like AU1,AU2"),
            ("au", UNITS.replace("AU2,", "AU1,"), "line 1: expected names like AU1,AU2"),
            ("au", UNITS.replace("AU26", "AU25,AU27"), "other action units than in the files before|line 1: expected"),
        ],
    )
    def test_a_header_that_is_none(self, tree, track, header, message):
        tree.images("v", 1)
        tree.lines(track, "Train", "v", header=header)
        with pytest.raises(DataError, match=message):
            affwild2.read(tree.root, track)

    def test_files_of_two_years_do_not_mix(self, tree):
        tree.images("v", 1)
        tree.lines("au", "Train", "v", "0,0,0,0,0,0,0,1", header="AU1,AU2,AU4,AU6,AU12,AU15,AU20,AU25")
        with pytest.raises(DataError, match="other action units than in the files before"):
            affwild2.read(tree.root, "au")


class TestParts:
    def test_a_video_that_validates_in_one_track_trains_in_none(self, tree):
        tree.images("v", 1, 2, 3)
        tree.lines("va", "Train", "v", "0.1,0", "0.2,0", "-5,-5")
        tree.lines("expr", "Validation", "v", "4", "-1", "4")
        table = affwild2.read(tree.root, ["va", "expr"])
        video = of(table)
        assert cells(video, "frame") == [1, 3]
        assert set(cells(video, "part")) == {"validation"}
        assert set(cells(video, "part_va")) == {"train"}
        assert set(cells(video, "part_expr")) == {"validation"}
        assert cells(video, "valence") == [None, None]
        reason = "training label of track va of a video that validates another"
        assert table.metadata["skipped"] == {reason: 2}
        assert table.metadata["skipped_examples"] == {reason: ["v/00001", "v/00002"]}

    def test_tracks_that_are_read_apart_know_their_common_videos(self, tree):
        tree.images("v", 1)
        tree.lines("va", "Train", "v", "0.1,0")
        tree.lines("expr", "Validation", "v", "4")
        tables = [affwild2.read(tree.root, track) for track in ("va", "expr")]
        sources = [Source(f"{k}", table, FileImages(table), "video") for k, table in enumerate(tables)]
        protocol = Protocol(test="validation", train=["train"], validation_fraction=0)
        with pytest.raises(DataError, match=r"videos of affwild2 lie in two parts.*\bv\b"):
            divide(sources, [protocol] * 2)

    def test_of_one_track_parts_are_the_official_ones(self, tree):
        tree.images("v", 1)
        tree.lines("va", "Train", "v", "0.1,0")
        tree.lines("expr", "Validation", "v", "4")
        table = affwild2.read(tree.root, "va")
        assert cells(of(table), "part") == ["train"]
        assert cells(of(table), "valence") == [0.1]
        assert not table.metadata["skipped"]

    def test_the_other_person_of_a_video_is_held_out_too(self, tree):
        for side in ("_left", "_right"):
            tree.images(f"v{side}", 1)
        tree.lines("va", "Train", "v_left", "0.1,0")
        tree.lines("va", "Validation", "v_right", "0.2,0")
        table = affwild2.read(tree.root, "va")
        assert len(of(table, "v_left")) == 0
        assert cells(of(table, "v_right"), "video") == ["v"]
        assert table.metadata["skipped"] == {"training label of track va of a video that validates another": 1}

    def test_only_an_ending_is_a_side(self, tree):
        tree.images("left_right", 1)
        tree.images("5_left_4", 1)
        tree.lines("va", "Train", "left_right", "0,0")
        tree.lines("va", "Train", "5_left_4", "0,0")
        table = affwild2.read(tree.root, "va")
        assert set(cells(table, "video")) == {"left", "5_left_4", "other-Train", "other-Validation"}

    def test_a_video_in_both_parts_of_a_track(self, tree):
        tree.images("v", 1)
        tree.lines("va", "Train", "v", "0,0")
        tree.lines("va", "Validation", "v", "0,0")
        with pytest.raises(DataError, match="v is in train and validation; remove one"):
            affwild2.read(tree.root, "va")

    def test_a_table_with_masked_labels_survives_a_round_trip(self, tree, tmp_path):
        tree.images("v", 1, 2)
        tree.lines("va", "Train", "v", "0.1,0", "0.2,0")
        tree.lines("expr", "Validation", "v", "4", "3")
        tree.lines("au", "Validation", "v", ON, OFF)
        table = affwild2.read(tree.root)
        black = [np.zeros((8, 8, 3), np.uint8)] * len(table)

        class Black:
            def read(self, rows):
                return black[: len(rows)]

        affwild2.write(table, tmp_path / "again", Black())
        again = affwild2.read(tmp_path / "again")
        assert again.arrow.equals(table.arrow)


class TestFolders:
    def test_labels_are_found_two_folders_deep(self, tree):
        deeper = tree.root / "annotations" / "3rd" / "Third ABAW Annotations"
        deeper.parent.mkdir(parents=True)
        tree.labels.rename(tree.root / "annotations" / "3rd" / "x")
        tree.labels = tree.root / "annotations" / "3rd" / "x"
        with pytest.raises(
            DataError, match="no labels of track va; expected a folder VA_Estimation_Challenge or VA_Set"
        ):
            affwild2.read(tree.root, "va")
        tree.labels.rename(tree.root / "annotations" / "y")
        assert len(affwild2.read(tree.root, "va")) == 2

    def test_labels_may_lie_in_the_root(self, tree):
        for folder in tree.labels.iterdir():
            folder.rename(tree.root / folder.name)
        assert len(affwild2.read(tree.root)) == 2

    def test_several_years_have_to_be_chosen(self, tree):
        tree.images("v", 1)
        old = tree.root / "Third ABAW Annotations" / "VA_Estimation_Challenge"
        for part in ("Train_Set", "Validation_Set"):
            write_lines(old / part / ("v.txt" if part == "Train_Set" else "other-Validation.txt"),
                        ["valence,arousal", "0.5,0.5"])  # fmt: skip
        with pytest.raises(DataError, match=r"several years: 6th ABAW.*, Third ABAW.*choose one by dataset\.va="):
            affwild2.read(tree.root, "va")
        table = affwild2.read(tree.root, "va", va="Third ABAW Annotations/VA_Estimation_Challenge")
        assert cells(table, "sequence") == ["other-Validation", "v"]
        assert "Third ABAW" in table.metadata["label_source"]
        absolute = affwild2.read(tree.root, "va", va=str(old))
        assert absolute.arrow.equals(table.arrow)

    @pytest.mark.parametrize("folder", ["VA_Set", "VA_Estimation_Challenge"])
    @pytest.mark.parametrize("train", ["Train_Set", "Training_Set"])
    def test_folder_names_changed_over_the_years(self, tree, folder, train):
        (tree.labels / CHALLENGES["va"] / "Train_Set").rename(tree.labels / CHALLENGES["va"] / train)
        (tree.labels / CHALLENGES["va"]).rename(tree.labels / f"{folder} ")
        (tree.labels / f"{folder} ").rename(tree.labels / folder)
        assert len(affwild2.read(tree.root, "va")) == 2

    @pytest.mark.parametrize("folder", affwild2.FOLDERS["expr"])
    def test_every_name_of_the_expression_folder_is_known(self, tree, folder):
        source = tree.labels / CHALLENGES["expr"]
        if source.name != folder:
            source.rename(tree.labels / folder)
        assert len(affwild2.read(tree.root, "expr")) == 2

    def test_labels_of_two_years_are_noted(self, tree):
        (tree.root / "Third ABAW Annotations").mkdir()
        moved = tree.root / "Third ABAW Annotations" / "EXPR_Classification_Challenge"
        (tree.labels / CHALLENGES["expr"]).rename(moved)
        (note,) = affwild2.read(tree.root, ["va", "expr"]).metadata["notes"]
        assert note.startswith("labels come from several folders: 6th ABAW")

    def test_a_part_without_a_folder(self, tree):
        (tree.labels / CHALLENGES["va"] / "Validation_Set").rename(tree.labels / CHALLENGES["va"] / "Test_Set")
        with pytest.raises(DataError, match=r"expected a folder Validation_Set .*found Test_Set, Train_Set"):
            affwild2.read(tree.root, "va")

    def test_a_part_without_files(self, tree):
        tree.file("va", "Train", "other-Train").unlink()
        with pytest.raises(DataError, match=r"Train_Set: no label files; expected <video>\.txt"):
            affwild2.read(tree.root, "va")

    def test_a_folder_that_is_not_there(self, tree):
        with pytest.raises(DataError, match=r"dataset\.va=nowhere: no such folder"):
            affwild2.read(tree.root, "va", va="nowhere")

    def test_crops_are_not_walked_for_labels(self, tree):
        table = affwild2.read(tree.root, "va")
        touched = {name for name in table.metadata["touched"] if name.startswith("cropped_aligned")}
        assert touched <= {
            "cropped_aligned", "cropped_aligned_new_50_vids",
            "cropped_aligned/other-Train", "cropped_aligned/other-Validation",
        }  # fmt: skip

    def test_unknown_tracks(self, tree):
        with pytest.raises(ConfigError, match="no track expression"):
            affwild2.read(tree.root, ["va", "expression"])
        with pytest.raises(ConfigError, match="or mtl alone"):
            affwild2.read(tree.root, ["va", "mtl"])
        with pytest.raises(ConfigError, match="choose some of va, expr, au"):
            affwild2.read(tree.root, [])


class TestBadLines:
    @pytest.mark.parametrize(
        ("track", "lines", "message"),
        [
            ("va", ["0,0", "0.1"], r"v\.txt, line 3: 1 fields, expected 2"),
            ("va", ["0,0", "0.1,x"], r"line 3: expected a number, found 'x'"),
            ("va", ["0,0", "nan,0"], r"line 3: expected a number, found 'nan'"),
            ("va", ["0,0", "", "0,0"], r"line 3: blank, expected the labels of a frame"),
            ("va", ["0,0", "  ", "0,0"], r"line 3: blank"),
            ("expr", ["0", "8"], r"line 3: expected a class from 0 to 7, or -1, found '8'"),
            ("expr", ["0", "-2"], r"line 3: expected a class from 0 to 7"),
            ("expr", ["0", "1.5"], r"line 3: expected a whole number, found '1\.5'"),
            ("expr", ["0", "1,2"], r"line 3: 2 fields, expected 1"),
            ("au", [ON, "2" + ",0" * 11], r"line 3: expected 0, 1 or -1 for each action unit"),
            ("au", [ON, "1,0,0"], r"line 3: 3 fields, expected 12"),
        ],
    )
    def test_one_line_says_where(self, tree, track, lines, message):
        tree.images("v", 1, 2, 3)
        tree.lines(track, "Train", "v", *lines)
        with pytest.raises(DataError, match=message) as caught:
            affwild2.read(tree.root, track)
        assert "\n" not in str(caught.value)

    def test_seven_classes_have_no_eighth(self, tree):
        tree.images("v", 1)
        tree.lines("expr", "Train", "v", "7", header=CLASSES.removesuffix(",Other"))
        with pytest.raises(DataError, match="a class from 0 to 6"):
            affwild2.read(tree.root, "expr")

    def test_line_ends_and_byte_order_marks_do_not_matter(self, tree):
        tree.images("v", 1, 2)
        tree.file("va", "Train", "v").write_bytes(b"\xef\xbb\xbfvalence,arousal\r\n0.1,0.2\r\n0.3,0.4\r\n\r\n")
        assert cells(of(affwild2.read(tree.root, "va")), "arousal") == [0.2, 0.4]

    def test_an_empty_file(self, tree):
        tree.file("va", "Train", "v").write_bytes(b"")
        with pytest.raises(DataError, match=r"v\.txt: the file is empty"):
            affwild2.read(tree.root, "va")

    def test_a_header_alone_labels_nothing(self, tree):
        tree.images("v", 1, 2)
        tree.lines("va", "Train", "v")
        table = affwild2.read(tree.root, "va")
        assert not len(of(table))
        assert table.metadata["skipped"] == {"image without a label line": 2}

    def test_nothing_found(self, tree):
        for sequence in ("other-Train", "other-Validation"):
            (tree.root / "cropped_aligned" / sequence / "00001.jpg").unlink()
        with pytest.raises(DataError, match=r"no face of affwild2 found \(2 rows: label line behind the last image"):
            affwild2.read(tree.root, "va")


ROW = "v/{:05d}.jpg,0.274,0.129,3,0,0,1,0,0,1,0,0,0,0,1,0"
TESTED = "w/00001.jpg,0,0,0" + ",0" * 12


class TestMultiTaskFiles:
    @pytest.fixture
    def tree(self, tmp_path) -> Tree:
        made = Tree(tmp_path)
        made.images("v", *range(1, 12))
        made.images("w", 1)
        return made

    def test_sixteen_fields_below_five_names(self, tree):
        tree.mtl(ROW.format(2), ROW.format(1), validation=(TESTED,))
        table = affwild2.read(tree.root, "mtl")
        assert cells(table, "frame") == [2, 1, 1]
        assert cells(table, "part") == ["train", "train", "validation"]
        assert cells(table, "valence") == [0.274, 0.274, 0.0]
        assert cells(table, "arousal") == [0.129, 0.129, 0.0]
        assert cells(table, "expression") == ["fear", "fear", "neutral"]
        ones = [name for name in AUS if cells(table, name)[0] == 1]
        assert ones == ["au04_occurrence", "au10_occurrence", "au25_occurrence"]

    def test_all_kinds_of_missing(self, tree):
        aus = ",".join("0" * 12)
        lines = [
            f"v/00001.jpg,-5,-5,1,{aus}",
            f"v/00002.jpg,-5,0.2,1,{aus}",
            f"v/00003.jpg,0.1,0.2,-1,{aus}",
            f"v/00004.jpg,0.1,0.2,1,-1{aus[1:]}",
            "v/00005.jpg,-5,-5,-1" + ",-1" * 12,
            f"v/00006.jpg,1.2,0,1,{aus}",
            f"v/00099.jpg,0,0,1,{aus}",
            f"x/00001.jpg,0,0,1,{aus}",
        ]
        tree.mtl(*lines, validation=(TESTED,))
        table = affwild2.read(tree.root, "mtl")
        train = of(table)
        assert cells(train, "frame") == [1, 2, 3, 4, 6]
        assert cells(train, "valence") == [None, None, 0.1, 0.1, None]
        assert cells(train, "expression") == ["anger", "anger", None, "anger", "anger"]
        assert cells(train, "au01_occurrence") == [0, 0, 0, None, 0]
        assert cells(train, "au02_occurrence") == [0] * 5
        assert table.metadata["skipped"] == {"image is missing": 2, "no label (-5 or -1)": 1}
        assert table.metadata["skipped_examples"]["image is missing"] == ["v/00099", "x/00001"]
        (note,) = table.metadata["notes"]
        assert "training_set_annotations.txt, line 7" in note

    def test_complete_aus(self, tree):
        tree.mtl(ROW.format(1), "v/00002.jpg,0,0,1,-1" + ",0" * 11, validation=(TESTED,))
        table = affwild2.read(tree.root, "mtl", complete_aus=True)
        assert cells(of(table), "au26_occurrence") == [0, None]

    def test_a_video_in_both_files_is_validated_only(self, tree):
        tree.images("w_left", 1)
        tree.mtl(ROW.format(1), TESTED.replace("w/", "w_left/"), validation=(TESTED,))
        table = affwild2.read(tree.root, "mtl")
        assert cells(table, "sequence") == ["v", "w"]
        assert table.metadata["skipped"] == {"training frame of a video that validates": 1}

    @pytest.mark.parametrize(
        ("line", "message"),
        [
            (ROW.format(2).rpartition(",")[0], r"training_set_annotations\.txt, line 3: 15 fields, expected 16"),
            (ROW.format(2) + ",0", r"line 3: 17 fields, expected 16"),
            (ROW.format(2).replace("0.274", "x"), r"line 3: expected a number, found 'x'"),
            (ROW.format(2).replace(",3,", ",9,"), r"line 3: expected a class from 0 to 7, or -1, as fourth"),
            (ROW.format(2)[:-1] + "2", r"line 3: expected 0, 1 or -1 for each action unit"),
            (ROW.format(1), r"line 3: expected each image once, found 'v/00001\.jpg"),
            (ROW.format(2).replace("v/", ""), r"line 3: expected an image like 46-30-484x360/00112\.jpg first"),
        ],
    )
    def test_one_line_says_where(self, tree, line, message):
        tree.mtl(ROW.format(1), line, ROW.format(3), validation=(TESTED,))
        with pytest.raises(DataError, match=message):
            affwild2.read(tree.root, "mtl")

    def test_a_header_that_is_another(self, tree):
        tree.mtl(ROW.format(1), header="image,valence,arousal", validation=(TESTED,))
        with pytest.raises(DataError, match="line 1: expected image,valence,arousal,expression,aus, found"):
            affwild2.read(tree.root, "mtl")

    def test_line_ends_blanks_and_blank_lines_do_not_matter(self, tree):
        tree.mtl(ROW.format(1), validation=(TESTED,))
        path = tree.root / "training_set_annotations.txt"
        path.write_bytes(b"\xef\xbb\xbf" + path.read_bytes().replace(b"\n", b"\r\n\r\n").replace(b",", b", "))
        assert cells(affwild2.read(tree.root, "mtl"), "expression") == ["fear", "neutral"]

    def test_files_are_found_or_named(self, tree):
        tree.mtl(ROW.format(1), validation=(TESTED,))
        table = affwild2.read(tree.root, "mtl")
        files = ("training_set_annotations.txt", "validation_set_annotations.txt")
        third = tree.root / "annotations" / "Third ABAW Annotations" / "MTL_Challenge"
        third.mkdir(parents=True)
        for file, name in zip(files, ("train_set.txt", "validation_set.txt"), strict=True):
            (third / name).write_bytes((tree.root / file).read_bytes())
        with pytest.raises(DataError, match=r"several multi-task challenges: .*choose one by dataset\.mtl="):
            affwild2.read(tree.root, "mtl")
        for given in (".", str(third.relative_to(tree.root)), files):
            assert affwild2.read(tree.root, "mtl", mtl=given).arrow.equals(table.arrow)
        with pytest.raises(DataError, match="no labels of a multi-task challenge in cropped_aligned; expected"):
            affwild2.read(tree.root, "mtl", mtl="cropped_aligned")
        with pytest.raises(ConfigError, match="expected two files"):
            affwild2.read(tree.root, "mtl", mtl=files[:1])

    def test_no_files(self, tree):
        with pytest.raises(DataError, match=r"no labels of a multi-task challenge; expected training_set_annotations"):
            affwild2.read(tree.root, "mtl")


class TestExpected:
    def test_counts_of_training_hold_for_a_single_track_only(self):
        keys = {entry.key for entry in affwild2.expected()}
        assert "labelled/expression/part_expr=validation" in keys
        assert "labelled/expression/part_expr=train" not in keys
        alone = {entry.key: entry for entry in affwild2.expected("expr")}
        assert alone["labelled/expression/part_expr=train"].value == 585_317
        assert alone["labelled/expression/part_expr=validation"].value == 280_532
        assert alone["labelled/expression/part_expr=validation"].found

    def test_what_was_recalled_only_warns(self):
        assert not any(entry.found for entry in affwild2.expected("va") if entry.key != "size")
        assert not any(entry.found for entry in affwild2.expected("mtl") if entry.key != "size")

    def test_years(self):
        third = {entry.key: entry for entry in affwild2.expected("va", challenge=3)}
        later = {entry.key: entry for entry in affwild2.expected("va")}
        key = "distinct/sequence/part_va=train"
        assert (third[key].value, later[key].value) == (341, 356)
        assert later[key].variants == {341: "ABAW 3"}
        assert [entry.key for entry in affwild2.expected(challenge=1)] == ["size"]
        assert all(entry.key != "size" for entry in affwild2.expected(crops="cropped"))


def test_frames_missing_in_a_writer_are_minus_one(tmp_path):
    columns = {
        "image": np.array(["cropped_aligned/v/00003.jpg"], object),
        "sequence": np.array(["v"], object),
        "frame": np.array([3], np.int32),
        "part_expr": np.array(["validation"], object),
        "expression": np.array(["fear"], object),
    }
    table = FaceTable.from_columns(columns, ".", {"expressions": list(labels.EXPRESSION_ORDERS["abaw"])})

    class Black:
        def read(self, rows):
            return [np.zeros((8, 8, 3), np.uint8)]

    affwild2.write(table, tmp_path, Black())
    path = tmp_path / "6th ABAW Annotations" / "EXPR_Recognition_Challenge" / "Validation_Set" / "v.txt"
    assert path.read_text().splitlines() == [CLASSES, "-1", "-1", "3"]
    with pytest.raises(ConfigError, match="had the track mtl only"):
        affwild2.write(table, tmp_path, Black(), challenge=7)
