# SPDX-License-Identifier: Apache-2.0
"""FER2013 and FER+ in their official layouts: sources of pixels, the recipe of the votes, every trap of the files."""

from __future__ import annotations

import pickle

import cv2
import numpy as np
import pytest

from affect import labels
from affect.data import faces
from affect.data.layouts import fer2013
from affect.data.table import FaceTable
from affect.errors import ConfigError, DataError
from affect.tasks.kinds import Expression
from tests.data.layouts.contract import DIALS, ChosenFaces, LayoutContract, assert_same

SOFT = ("probability", "crossentropy", "multi_target")


class FerContract(LayoutContract):
    layout = fer2013
    group = None
    grey = True
    options: tuple[str, ...] = ("fer2013", "majority", "auto")

    def read(self, root):
        return fer2013.read(root, *self.options)

    def dress(self, drawn):
        return fer2013.dress(drawn, *self.options)

    def expected(self):
        return fer2013.expected(*self.options)

    def test_every_part_is_there(self, table):
        parts = table.strings("part")[0].tolist()
        assert parts.count("train") >= 2
        assert "test" in parts
        assert ("validation" in parts) == (self.options[2] != "competition")

    def test_the_reader_travels_to_other_processes(self, table):
        rows = np.array([len(table) - 1, 0])
        reader = self.images(table)
        wanted = reader.read(rows)
        moved = pickle.loads(pickle.dumps(reader)).read(rows)
        assert len(pickle.dumps(reader)) < 200_000
        for a, b in zip(wanted, moved, strict=True):
            np.testing.assert_array_equal(a, b)


class TestFer2013(FerContract):
    expressions = labels.EXPRESSION_ORDERS["fer2013"]

    def test_pixels_are_kept_exactly(self, table, dressed):
        rows = np.arange(5)
        for stored, face in zip(self.images(table).read(rows), ChosenFaces(dressed.rows).read(rows), strict=True):
            assert stored.shape == (48, 48, 3)
            np.testing.assert_array_equal(stored[:, :, 0], np.rint(face.astype(np.float32).mean(2)))


class TestCompetition(FerContract):
    options = ("fer2013", "majority", "competition")
    expressions = labels.EXPRESSION_ORDERS["fer2013"]

    def test_test_rows_have_no_labels(self, root, table):
        assert (root / "test.csv").read_text().startswith("pixels\n")
        valid, parts = table.strings("expression")[1], table.strings("part")[0]
        np.testing.assert_array_equal(valid, parts == "train")
        assert any("have no labels" in note for note in table.metadata["notes"])


class TestFerplus(FerContract):
    options = ("ferplus", "majority", "auto")
    expressions = labels.EXPRESSION_ORDERS["ferplus"]

    def test_rows_that_are_no_face_are_counted(self, table, root):
        lines = (root / "fer2013new.csv").read_text().splitlines()
        empty = [k for k, line in enumerate(lines[1:]) if line.split(",")[1] == ""]
        assert empty
        assert table.metadata["skipped"] == {"not a face (no image name)": len(empty)}
        assert not {f"fer2013.csv!{k}" for k in empty} & set(table.strings("image")[0])


class TestFerplusProbability(FerContract):
    options = ("ferplus", "probability", "csv")
    expressions = labels.EXPRESSION_ORDERS["ferplus"]


class TestFerplusMultiTarget(FerContract):
    options = ("ferplus", "multi_target", "csv")
    expressions = labels.EXPRESSION_ORDERS["ferplus"]

    def test_training_rows_have_shares_and_others_a_class(self, table):
        training = table.strings("part")[0] == "train"
        np.testing.assert_array_equal(table.strings("expression")[1], ~training)
        np.testing.assert_array_equal(table.numbers("expression_fear")[1], training)
        task = Expression("ferplus")
        task.bind([table])
        target, mask = task.encode(table)
        assert mask.all()
        np.testing.assert_allclose(target.sum(1), 1)
        assert (target[training].max(1) == 0.5).any()
        assert (target[~training].max(1) == 1).all()


class TestFerplusFolders(FerContract):
    options = ("ferplus", "majority", "folders")
    expressions = labels.EXPRESSION_ORDERS["ferplus"]

    def test_label_files_look_like_the_delivered_ones(self, root, table):
        first = (root / "FER2013Train/label.csv").read_text().splitlines()[0]
        assert first.startswith('fer0000000.png,"(0, 0, 48, 48)",')
        assert first.count(",") == 14
        assert table.strings("image")[0][0] == "FER2013Train/fer0000000.png"


class TestFerplusFoldersCrossentropy(FerContract):
    options = ("ferplus", "crossentropy", "folders")
    expressions = labels.EXPRESSION_ORDERS["ferplus"]


# ------------------------------------------------------------------------------------------------------- votes


def by_hand(votes, mode):
    """The recipe as datasets.md and the paper describe it, one row at a time: shares of eight classes, or None."""
    left = {k: int(v) for k, v in enumerate(votes) if v > 1}
    total = sum(left.values())
    if mode == "majority":
        clear = [k for k, v in left.items() if 2 * v > total]
        kept = {k: left[k] for k in clear}
    elif mode == "multi_target":
        kept = {k: v for k, v in left.items() if 10 * v >= 3 * total}
        if 2 * sum(kept.values()) <= total:
            return None
    else:
        kept, covered, count, groups = {}, 0, 0, sorted(set(left.values()), reverse=True)
        for votes_of in groups:
            if 4 * covered >= 3 * total or count >= 3:
                break
            stop = False
            for k in sorted(k for k, v in left.items() if v == votes_of):
                covered += votes_of
                if k < 8:
                    kept[k] = votes_of
                    count += 1
                else:
                    if not kept:
                        kept[k] = votes_of
                        count += 1
                    stop = True
                    break
            if stop:
                break
        if 2 * sum(kept.values()) <= total or count > 3:
            return None
    if not kept or max(kept, key=lambda k: (kept[k], -k)) >= 8:
        return None
    kept = {k: (1 if mode == "multi_target" else v) for k, v in kept.items() if k < 8}
    return [kept.get(k, 0) / sum(kept.values()) for k in range(8)]


class TestVotes:
    @pytest.mark.parametrize("mode", ["majority", *SOFT])
    def test_agree_with_the_recipe_by_hand_on_any_votes(self, mode):
        random = np.random.default_rng(0)
        chances = random.dirichlet(np.full(10, 0.4), 2000)
        votes = np.stack([random.multinomial(10, chance) for chance in chances])
        votes[:3] = [[1] * 10, [0] * 10, [5, 5, 0, 0, 0, 0, 0, 0, 0, 0]]
        found, reason = fer2013.shares(votes, mode)
        for row, counted in enumerate(votes):
            wanted = by_hand(counted, mode)
            assert (wanted is None) == (reason[row] > 0), counted
            np.testing.assert_allclose(found[row], wanted or [0] * 8, atol=1e-6, err_msg=str(counted))
        assert 0.3 < (reason == 0).mean() < 0.99

    @pytest.mark.parametrize(
        ("votes", "mode", "wanted"),
        [
            # A single vote counts nothing, so that 5 of the 9 others are more than half.
            ([5, 0, 0, 4, 1, 0, 0, 0, 0, 0], "majority", {"neutral": 1}),
            ([5, 0, 0, 5, 0, 0, 0, 0, 0, 0], "majority", 3),
            ([4, 2, 2, 2, 0, 0, 0, 0, 0, 0], "majority", 3),
            ([1, 1, 1, 1, 1, 1, 1, 1, 1, 1], "majority", 3),
            ([0, 0, 0, 0, 2, 0, 0, 0, 8, 0], "majority", 2),
            ([0, 0, 0, 0, 2, 0, 0, 0, 0, 8], "majority", 1),
            ([0, 0, 0, 4, 0, 0, 0, 0, 3, 3], "majority", 3),
            # One row has nine votes.
            ([0, 5, 0, 4, 0, 0, 0, 0, 0, 0], "majority", {"happiness": 1}),
            ([6, 0, 0, 3, 1, 0, 0, 0, 0, 0], "probability", {"neutral": 2 / 3, "sadness": 1 / 3}),
            ([8, 2, 0, 0, 0, 0, 0, 0, 0, 0], "crossentropy", {"neutral": 1}),
            ([4, 0, 0, 2, 2, 2, 0, 0, 0, 0], "probability", 3),
            ([4, 0, 0, 3, 3, 0, 0, 0, 0, 0], "probability", {"neutral": 0.4, "sadness": 0.3, "anger": 0.3}),
            ([0, 0, 0, 3, 0, 0, 0, 0, 7, 0], "probability", 2),
            ([6, 0, 0, 0, 0, 0, 0, 0, 4, 0], "probability", {"neutral": 1}),
            ([5, 0, 0, 5, 0, 0, 0, 0, 0, 0], "multi_target", {"neutral": 0.5, "sadness": 0.5}),
            ([7, 0, 0, 3, 0, 0, 0, 0, 0, 0], "multi_target", {"neutral": 0.5, "sadness": 0.5}),
            ([6, 0, 0, 2, 2, 0, 0, 0, 0, 0], "multi_target", {"neutral": 1}),
            ([2, 2, 2, 2, 2, 0, 0, 0, 0, 0], "multi_target", 3),
            ([0, 0, 0, 4, 0, 0, 0, 0, 0, 6], "multi_target", 1),
        ],
    )
    def test_constructed(self, votes, mode, wanted):
        found, reason = fer2013.shares(np.array([votes]), mode)
        if isinstance(wanted, int):
            assert reason[0] == wanted
            assert not found.any()
        else:
            assert reason[0] == 0
            shares = dict(zip(fer2013.FERPLUS, found[0].tolist(), strict=True))
            assert {name: share for name, share in shares.items() if share} == pytest.approx(wanted)

    def test_no_rows(self):
        found, reason = fer2013.shares(np.zeros((0, 10), int), "probability")
        assert found.shape == (0, 8)
        assert reason.shape == (0,)


# ------------------------------------------------------------------------------------------------------- traps

HEADER = "Usage,Image name,neutral,happiness,surprise,sadness,anger,disgust,fear,contempt,unknown,NF"
USAGES = ["Training"] * 6 + ["PublicTest"] + ["PrivateTest"] * 2


def picture(k):
    return np.random.default_rng(k).integers(0, 256, (48, 48))


def cell(k):
    return " ".join(map(str, picture(k).ravel()))


@pytest.fixture
def tree(tmp_path):
    """Nine rows, as datasets.md asks: an empty name, *not a face* on top, single votes, no majority."""
    root = tmp_path / "fer"
    root.mkdir()
    rows = [f"{k % 7},{cell(k)},{usage}" for k, usage in enumerate(USAGES)]
    (root / "fer2013.csv").write_text("\n".join(["emotion,pixels,Usage", *rows]) + "\n")
    votes = [
        "fer0000000.png,6,3,1,0,0,0,0,0,0,0",
        ",0,0,0,0,0,0,0,0,0,10",
        "fer0000002.png,0,0,0,0,1,0,0,0,0,9",
        "fer0000003.png,5,0,0,4,1,0,0,0,0,0",
        "fer0000009.png,0,5,0,5,0,0,0,0,0,0",
        "fer0000009.png,0,0,0,0,0,0,2,0,8,0",
        "fer0000006.png,0,9,0,0,0,0,0,0,0,0",
        "fer0000031.png,0,0,0,0,0,10,0,0,0,0",
        "fer0000008.png,0,0,0,0,0,0,0,10,0,0",
    ]
    lines = [f"{usage},{line}" for usage, line in zip(USAGES, votes, strict=True)]
    (root / "fer2013new.csv").write_text("\r\n".join([HEADER, *lines]))
    return root


def edit(path, old, new):
    text = path.read_bytes().decode()
    assert old in text
    path.write_bytes(text.replace(old, new, 1).encode())


class TestPixelFiles:
    def test_labels_parts_and_pixels(self, tree):
        table = fer2013.read(tree)
        assert table.strings("expression")[0].tolist()[:7] == [
            "anger", "disgust", "fear", "happiness", "sadness", "surprise", "neutral",
        ]  # fmt: skip
        assert table.strings("part")[0].tolist() == ["train"] * 6 + ["validation"] + ["test"] * 2
        assert table.strings("image")[0].tolist()[4] == "fer2013.csv!4"
        for k, image in enumerate(fer2013.images(table).read(np.arange(9))):
            np.testing.assert_array_equal(image, np.repeat(picture(k)[:, :, None], 3, 2))

    def test_rows_are_found_by_their_number_in_any_order(self, tree):
        table = fer2013.read(tree).take(np.array([7, 2, 2]))
        for k, image in zip([7, 2, 2], fer2013.images(table).read(np.array([0, 1, 2])), strict=True):
            np.testing.assert_array_equal(image[:, :, 1], picture(k))

    def test_header_cells_with_blanks_in_another_order(self, tree):
        wanted = fer2013.read(tree)
        rows = [line.split(",") for line in (tree / "fer2013.csv").read_text().splitlines()[1:]]
        (tree / "fer2013.csv").unlink()
        lines = [f"{emotion},{usage},{pixels}" for emotion, pixels, usage in rows]
        (tree / "icml_face_data.csv").write_text("\n".join(["emotion, Usage, pixels", *lines]))
        table = fer2013.read(tree)
        assert table.strings("image")[0][3] == "icml_face_data.csv!3"
        assert table.strings("expression")[0].tolist() == wanted.strings("expression")[0].tolist()
        np.testing.assert_array_equal(fer2013.images(table).read(np.array([8]))[0][:, :, 0], picture(8))

    @pytest.mark.parametrize("change", ["crlf", "bom", "blank", "quotes", "double"])
    def test_harmless_differences(self, tree, change):
        before = fer2013.read(tree)
        path = tree / "fer2013.csv"
        text = path.read_text()
        if change == "crlf":
            text = text.replace("\n", "\r\n")
        elif change == "bom":
            text = "\ufeff" + text
        elif change == "blank":
            text = "\n" + text.replace("\n", "\n\n").rstrip()
        elif change == "quotes":
            text = text.replace(cell(2), f'"{cell(2)}"').replace("PublicTest", '"PublicTest"')
        else:
            text = text.replace(cell(2), " " + cell(2).replace(" ", "  ", 5) + " ")
        path.write_bytes(text.encode())
        table = fer2013.read(tree)
        assert table.fingerprint == before.fingerprint
        for k, image in enumerate(fer2013.images(table).read(np.arange(9))):
            np.testing.assert_array_equal(image[:, :, 2], picture(k))

    def test_the_competition_pair(self, tree):
        rows = [line.split(",") for line in (tree / "fer2013.csv").read_text().splitlines()[1:]]
        (tree / "fer2013.csv").unlink()
        (tree / "train.csv").write_text("\n".join(["emotion,pixels", *[",".join(row[:2]) for row in rows[:6]]]))
        (tree / "test.csv").write_text("\n".join(["pixels", *[row[1] for row in rows[6:]]]) + "\n")
        table = fer2013.read(tree)
        assert table.strings("part")[0].tolist() == ["train"] * 6 + ["test"] * 3
        assert table.strings("expression")[1].tolist() == [True] * 6 + [False] * 3
        np.testing.assert_array_equal(fer2013.images(table).read(np.array([6]))[0][:, :, 0], picture(6))
        (tree / "test.csv").unlink()
        assert len(fer2013.read(tree)) == 6

    @pytest.mark.parametrize(
        ("old", "new", "message"),
        [
            ("emotion,pixels,Usage", "emotion,pixel,Usage", r"line 1: no column pixels; expected emotion,pixels,Usage"),
            ("\n1,", "\n7,", r"line 3: column emotion: expected one of 0, 1, .*found '7'"),
            ("\n1,", "\n,", r"line 3: column emotion: expected one of .*found ''"),
            ("\n1,", "\n1,1,", r"line 3: 4 fields, expected 3"),
            (",PublicTest", "", r"line 8: 2 fields, expected 3"),
            ("PublicTest", "Public", r"line 8: column Usage: expected one of Training, PublicTest, PrivateTest, found"),
            (cell(1), cell(1)[:-4], r"line 3: expected 2304 pixels, found 230\d; the file may be cut short"),
            (cell(1), cell(1).replace(" ", "\xa0", 1), r"line 3: expected 2304 pixels, found 2303"),
            (cell(1), cell(1)[:-3] + " 256", r"line 3: expected pixels from 0 to 255, found 256"),
            (cell(1), cell(1)[:-3] + " -1", r"line 3: expected pixels from 0 to 255, found -1"),
            (cell(1), cell(1)[:-3] + " 1.5", r"line 3: expected a whole number, found '1\.5'"),
            (cell(1), cell(1)[:-3] + " x", r"line 3: expected a whole number, found 'x'"),
            (cell(1), "", r"line 3: expected 2304 pixels, found 0"),
        ],
    )
    def test_errors_say_file_line_expected_and_found(self, tree, old, new, message):
        edit(tree / "fer2013.csv", old, new)
        with pytest.raises(DataError, match=rf"fer2013\.csv, {message}"):
            fer2013.images(fer2013.read(tree)).read(np.arange(9))

    @pytest.mark.parametrize(
        ("row", "place", "number", "found"),
        [
            (0, 0, "99999", "expected pixels from 0 to 255, found 99999"),
            (3, 2303, "256", "expected pixels from 0 to 255, found 256"),
            (4, 1000, "260", "expected pixels from 0 to 255, found 260"),
            (5, 7, "1000", "expected pixels from 0 to 255, found 1000"),
            (8, 1, "", "expected 2304 pixels, found 2303"),
        ],
    )
    def test_reading_the_table_looks_at_every_pixel(self, tree, row, place, number, found):
        numbers = cell(row).split()
        numbers[place] = number
        edit(tree / "fer2013.csv", cell(row), " ".join(numbers))
        with pytest.raises(DataError, match=rf"fer2013\.csv, line {row + 2}: {found}"):
            fer2013.read(tree)

    def test_pixels_are_looked_at_one_by_one_in_rows_that_look_wrong_alone(self, tree, monkeypatch):
        numbers = ["255", "0", "25", *cell(2).split()[3:]]
        edit(tree / "fer2013.csv", cell(2), " ".join(numbers))

        def slow(*_):
            raise AssertionError("a well-formed row was looked at again")

        monkeypatch.setattr(fer2013, "_pixels", slow)
        assert len(fer2013.read(tree)) == 9

    def test_a_file_that_was_cut(self, tree):
        data = (tree / "fer2013.csv").read_bytes()
        (tree / "fer2013.csv").write_bytes(data[: len(data) - 5000])
        with pytest.raises(DataError, match=r"fer2013\.csv, line 10: 2 fields, expected 3"):
            fer2013.read(tree)
        table = FaceTable.from_columns({"image": ["fer2013.csv!9"]}, tree)
        (tree / "fer2013.csv").write_bytes(data)
        with pytest.raises(DataError, match=r"fer2013\.csv: 9 rows, expected at least 10"):
            fer2013.images(table)
        (tree / "fer2013.csv").write_bytes(b"")
        with pytest.raises(DataError, match=r"fer2013\.csv: the file is empty"):
            fer2013.read(tree)
        (tree / "fer2013.csv").write_bytes(b"\n\n")
        with pytest.raises(DataError, match=r"fer2013\.csv: the file is empty"):
            fer2013.read(tree)
        (tree / "fer2013.csv").write_bytes(b"emotion,pixels,Usage\n")
        with pytest.raises(DataError, match="no face of fer2013 found"):
            fer2013.read(tree)

    def test_image_paths_that_are_no_rows(self, tree):
        table = FaceTable.from_columns({"image": ["fer2013.csv!0", "fer2013.csv!x"]}, tree)
        with pytest.raises(DataError, match=r"image fer2013\.csv!x: expected <file>\.csv!<row>"):
            fer2013.images(table)

    def test_blocks_do_not_change_what_is_read(self, tree, monkeypatch):
        before = fer2013.read(tree)
        for size in (9973, 3 * 4 * 48 * 48):
            monkeypatch.setattr(fer2013, "_CHUNK", size)
            assert fer2013.read(tree).fingerprint == before.fingerprint


class TestFerplusFiles:
    def test_rows_are_joined_by_order_and_not_by_name(self, tree):
        table = fer2013.read(tree, "ferplus")
        assert table.strings("image")[0].tolist() == [f"fer2013.csv!{k}" for k in (0, 3, 6, 7, 8)]
        assert table.strings("expression")[0].tolist() == ["neutral", "neutral", "happiness", "disgust", "contempt"]
        assert table.strings("label_fer2013")[0].tolist() == ["anger", "happiness", "neutral", "anger", "disgust"]
        np.testing.assert_array_equal(fer2013.images(table).read(np.array([3]))[0][:, :, 0], picture(7))

    def test_what_is_skipped_is_counted_by_reason(self, tree):
        metadata = fer2013.read(tree, "ferplus").metadata
        assert metadata["skipped"] == {
            "not a face (no image name)": 1,
            "not a face (most votes)": 1,
            "unknown expression (most votes)": 1,
            "no expression has enough votes": 1,
        }
        assert metadata["skipped_examples"]["no expression has enough votes"] == ["fer2013.csv!4"]

    def test_votes_are_kept(self, tree):
        table = fer2013.read(tree, "ferplus")
        votes = np.stack([table.numbers(f"votes_{name}")[0] for name in fer2013.VOTES], 1)
        assert votes[0].tolist() == [6, 3, 1, 0, 0, 0, 0, 0, 0, 0]
        assert votes.sum(1).tolist() == [10, 10, 9, 10, 10]

    def test_soft_modes_leave_validation_and_test_to_the_majority(self, tree):
        table = fer2013.read(tree, "ferplus", "multi_target")
        assert table.strings("image")[0].tolist() == [f"fer2013.csv!{k}" for k in (0, 3, 4, 6, 7, 8)]
        assert table.strings("expression")[0].tolist() == ["", "", "", "happiness", "disgust", "contempt"]
        assert table.numbers("expression_sadness")[0][:3].tolist() == [0, 0.5, 0.5]
        assert table.numbers("expression_sadness")[1].tolist() == [True] * 3 + [False] * 3

    def test_columns_are_found_by_name(self, tree):
        before = fer2013.read(tree, "ferplus")
        rows = [line.split(",") for line in (tree / "fer2013new.csv").read_text().split("\n")]
        (tree / "fer2013new.csv").write_text("\n".join(", ".join(row[::-1]) for row in rows))
        assert fer2013.read(tree, "ferplus").fingerprint == before.fingerprint

    @pytest.mark.parametrize(
        ("old", "new", "message"),
        [
            ("NF\r\n", "nf\r\n", r"fer2013new\.csv, line 1: no column 'NF'"),
            ("PublicTest,fer", "Training,fer",
             r"line 8: expected Usage PublicTest as in line 8 of fer2013\.csv, found 'Training': .*joined by row"),
            ("6,3,1,0", "6,3,1", r"fer2013new\.csv, line 2: 11 fields, expected 12"),
            ("6,3,1,0", "6,3,one,0", r"fer2013new\.csv, line 2: expected a whole number, found 'one'"),
            ("6,3,1,0", "6,-3,1,0", r"fer2013new\.csv, line 2: expected a number of votes, found '-3'"),
            ("6,3,1,0", "6,3.5,1,0", r"fer2013new\.csv, line 2: expected a whole number, found '3\.5'"),
            ("\r\nPrivateTest,fer0000008.png,0,0,0,0,0,0,0,10,0,0", "",
             r"fer2013new\.csv: 8 rows, expected 9 as in fer2013\.csv: the two are joined by row"),
        ],
    )  # fmt: skip
    def test_errors(self, tree, old, new, message):
        edit(tree / "fer2013new.csv", old, new)
        with pytest.raises(DataError, match=message):
            fer2013.read(tree, "ferplus")

    def test_without_votes(self, tree):
        (tree / "fer2013new.csv").unlink()
        with pytest.raises(DataError, match=r"fer2013new\.csv: no such file; ferplus needs it"):
            fer2013.read(tree, "ferplus")


@pytest.fixture
def folders(tmp_path):
    """Generated folders, one label file with boxes as delivered, the others as newer programs write them."""
    root = tmp_path / "generated"
    files = {
        "FER2013Train": [
            'fer0000000.png,"(0, 0, 48, 48)",6,3,1,0,0,0,0,0,0,0',
            'fer0000002.png,"(0, 0, 48, 48)",0,0,10,0,0,0,0,0,0,0',
            'fer0000003.png,"(0, 0, 48, 48)",5,0,0,5,0,0,0,0,0,0',
        ],
        "FER2013Valid": ["fer0028638.png,0,10,0,0,0,0,0,0,0,0", "fer0033120.png,0,0,0,0,10,0,0,0,0,0"],
        "FER2013Test": [
            "fer0033120.png,0,0,0,0,10,0,0,0,0,0",
            "fer0033121.png,0,0,0,0,0,10,0,0,0,0",
            "fer0033120.png,0,0,0,0,0,0,10,0,0,0",
        ],
    }
    for folder, lines in files.items():
        (root / folder).mkdir(parents=True)
        (root / folder / "label.csv").write_text("\n".join(lines))
        for line in lines:
            cv2.imwrite(str(root / folder / line.split(",")[0]), picture(len(line)).astype(np.uint8))
    (root / "FER2013Valid/fer0028638.png").unlink()
    return root


class TestFolders:
    def test_both_forms_of_label_files(self, folders):
        table = fer2013.read(folders, "ferplus")
        assert table.strings("image")[0].tolist() == [
            "FER2013Train/fer0000000.png",
            "FER2013Train/fer0000002.png",
            "FER2013Valid/fer0033120.png",
            "FER2013Test/fer0033121.png",
            "FER2013Test/fer0033120.png",
        ]
        assert table.strings("part")[0].tolist() == ["train", "train", "validation", "test", "test"]
        assert table.strings("expression")[0].tolist() == ["neutral", "surprise", "anger", "disgust", "fear"]
        assert fer2013.images(table).read(np.array([0]))[0].shape == (48, 48, 3)

    def test_a_name_that_occurs_twice_shows_the_later_row(self, folders):
        skipped = fer2013.read(folders, "ferplus").metadata["skipped"]
        assert skipped == {
            "image name occurs again: its file shows the later row": 1,
            "image is missing": 1,
            "no expression has enough votes": 1,
        }

    def test_a_missing_folder_is_noted(self, folders):
        for path in (folders / "FER2013Valid").iterdir():
            path.unlink()
        (folders / "FER2013Valid").rmdir()
        table = fer2013.read(folders, "ferplus")
        assert any("no FER2013Valid" in note for note in table.metadata["notes"])
        assert "validation" not in table.strings("part")[0]

    @pytest.mark.parametrize(
        ("new", "message"),
        [
            ("fer0000000.png,6,3,1,0,0,0,0,0,0", "line 1: expected a name, maybe a box"),
            ("fer0000000.png", "line 1: expected a name, maybe a box"),
            ('fer0000000.png,"(0, 0, 24, 48)",6,3,1,0,0,0,0,0,0,0', r"line 1: expected the box \(0, 0, 48, 48\) of"),
            ("fer0000000.png,6,3,1,0,0,0,0,0,0,x", "line 1: expected a whole number, found 'x'"),
        ],
    )
    def test_errors(self, folders, new, message):
        edit(folders / "FER2013Train/label.csv", 'fer0000000.png,"(0, 0, 48, 48)",6,3,1,0,0,0,0,0,0,0', new)
        with pytest.raises(DataError, match=rf"label\.csv, {message}"):
            fer2013.read(folders, "ferplus")


class TestOptions:
    def test_unknown_or_contradicting(self, tree):
        with pytest.raises(ConfigError, match="labels=fer201: did you mean fer2013"):
            fer2013.read(tree, "fer201")
        with pytest.raises(ConfigError, match="votes=majorty: did you mean majority"):
            fer2013.read(tree, "ferplus", "majorty")
        with pytest.raises(ConfigError, match=r"joined with fer2013\.csv by row"):
            fer2013.read(tree, "ferplus", source="competition")
        with pytest.raises(ConfigError, match="votes of FER"):
            fer2013.read(tree, source="folders")

    def test_a_source_that_is_not_there(self, tree, folders):
        with pytest.raises(DataError, match=r"source=competition needs train\.csv there"):
            fer2013.read(tree, source="competition")
        with pytest.raises(DataError, match=r"labels=fer2013, source=auto needs fer2013\.csv or train\.csv there"):
            fer2013.read(folders)

    def test_pixel_files_come_before_folders(self, tree, folders):
        for name in ("fer2013.csv", "fer2013new.csv"):
            (folders / name).write_bytes((tree / name).read_bytes())
        assert "!" in fer2013.read(folders, "ferplus").strings("image")[0][0]
        assert "!" not in fer2013.read(folders, "ferplus", source="folders").strings("image")[0][0]


class TestWriting:
    def test_larger_colour_images_become_48_grey_pixels(self, drawn, tmp_path):
        class Large:
            def read(self, rows):
                return [np.full((96, 96, 3), (30, 60, 90), np.uint8) for _ in rows]

        dressed = fer2013.dress(drawn)
        fer2013.write(dressed.table, tmp_path, Large())
        image = fer2013.images(fer2013.read(tmp_path)).read(np.array([0]))[0]
        assert image.shape == (48, 48, 3)
        assert (image == 60).all()

    def test_a_tree_is_written_again_from_its_own_pixels(self, tree, tmp_path):
        for labelling in ("fer2013", "ferplus"):
            table = fer2013.read(tree, labelling)
            fer2013.write(table, tmp_path / labelling)
            assert_same(table, fer2013.read(tmp_path / labelling, labelling), 0)

    def test_what_cannot_be_written(self, drawn, tmp_path):
        dressed = fer2013.dress(drawn)
        reader = ChosenFaces(dressed.rows)
        with pytest.raises(DataError, match=r"rows must be 0, 1, 2, … in their order, found \[1, 2"):
            fer2013.write(dressed.table.take(np.arange(1, len(dressed.rows))), tmp_path, reader)
        with pytest.raises(DataError, match="FER2013 cannot write the expression 'contempt'"):
            fer2013.write(
                dressed.table.with_columns({"expression": ["contempt"] * len(dressed.rows)}), tmp_path, reader
            )
        with pytest.raises(DataError, match="FER2013 has no such file"):
            fer2013.write(dressed.table.with_columns({"image": ["a/1.png"] * len(dressed.rows)}), tmp_path, reader)

    def test_few_faces_give_all_parts(self):
        few = FaceTable.from_arrow(faces.labels_table(DIALS, 1, 12), ".")
        for labelling in ("fer2013", "ferplus"):
            parts = fer2013.dress(few, labelling).table.strings("part")[0].tolist()
            assert set(parts) == {"train", "validation", "test"}
            assert parts.count("train") >= 2


def test_expected_counts():
    found = {entry.key: entry for entry in fer2013.expected()}
    assert found["rows"].value == 35887
    assert not found["rows"].found
    found = {entry.key: entry for entry in fer2013.expected("ferplus")}
    assert [found[f"rows/part={part}"].value for part in ("train", "validation", "test")] == [25045, 3191, 3137]
    assert found["rows"].value == 25045 + 3191 + 3137
    assert found["rows"].found
    assert set(found["rows/part=train"].variants) == {25046, 25047, 25048}
    assert "rows/part=train" not in {entry.key for entry in fer2013.expected("ferplus", "multi_target")}
