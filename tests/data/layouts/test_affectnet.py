# SPDX-License-Identifier: Apache-2.0
"""AffectNet: the contract for both releases and their options, then each trap of the formats in tiny trees."""

from __future__ import annotations

import csv
from collections.abc import Sequence
from pathlib import Path

import numpy as np
import pytest

from affect import labels
from affect.data.images import FileImages
from affect.data.layouts import affectnet
from affect.data.layouts.common import write_image, write_lines
from affect.errors import ConfigError, DataError
from tests.data.layouts.contract import LayoutContract

CLASSES = labels.EXPRESSION_ORDERS["affectnet8"]


class TestNewRelease(LayoutContract):
    layout = affectnet
    group = "image"
    maskable = ("valence", "arousal", "landmarks_68")
    expressions = CLASSES

    def test_ids_have_gaps_and_no_padding(self, table):
        ids = [int(Path(image).stem) for image in table.strings("image")[0]]
        training = [k for k, part in zip(ids, table.strings("part")[0], strict=True) if part == "train"]
        assert training == sorted(training)
        assert max(training) > len(training)
        assert all(Path(image).stem == str(k) for k, image in zip(ids, table.strings("image")[0], strict=True))

    def test_label_files_are_watched_by_folder(self, table):
        folders = [f"{part}/{kind}" for part in ("train_set", "val_set") for kind in ("images", "annotations")]
        assert set(table.metadata["touched"]) == {
            ".", *folders, "train_set/annotations/*", "val_set/annotations/*",
        }  # fmt: skip


class TestNewReleaseWithUncertain(LayoutContract):
    layout = affectnet
    group = "image"
    maskable = ("expression", "landmarks_68")
    expressions = CLASSES

    def read(self, root):
        return affectnet.read(root, uncertain="keep")


class TestOldRelease(LayoutContract):
    layout = affectnet
    group = "image"
    maskable = ("valence", "arousal", "landmarks_68", "box")
    expressions = CLASSES

    def dress(self, drawn):
        return affectnet.dress(drawn, release="old")

    def expected(self):
        return affectnet.expected("old")

    def test_extensions_mix(self, table):
        endings = {Path(image).suffix for image in table.strings("image")[0]}
        assert endings == {".jpg", ".JPG", ".jpeg", ".png", ".bmp", ".tif"}


class TestOldReleaseWithUncertain(LayoutContract):
    layout = affectnet
    group = "image"
    maskable = ("expression", "box")
    expressions = CLASSES

    def read(self, root):
        return affectnet.read(root, release="old", uncertain="keep")

    def dress(self, drawn):
        return affectnet.dress(drawn, release="old")

    def expected(self):
        return affectnet.expected("old", uncertain="keep")


class TestAutomaticallyAnnotated(LayoutContract):
    layout = affectnet
    group = "image"
    maskable = ("valence", "arousal", "box")
    expressions = CLASSES

    def read(self, root):
        return affectnet.read(root, automatic=True)

    def dress(self, drawn):
        return affectnet.dress(drawn, release="old", automatic=True)

    def expected(self):
        return affectnet.expected("old", automatic=True)

    def test_they_train_and_can_be_told_apart(self, table):
        kinds, parts = table.strings("annotation")[0], table.strings("part")[0]
        assert set(parts[kinds == "automatic"]) == {"train"}
        assert set(kinds) == {"manual", "automatic"}

    def test_by_default_they_are_not_read(self, table, root):
        manual = affectnet.read(root)
        assert "annotation" not in manual.names
        assert len(manual) == (table.strings("annotation")[0] == "manual").sum()


# ------------------------------------------------------------------------------------------------------- old release

POINTS = tuple(f"{k}.5" for k in range(136))


class Old:
    """A tree of the old release with a few rows; images are empty files, since reading labels never opens one."""

    lists = "Manually_Annotated_file_lists"
    images = "Manually_Annotated/Manually_Annotated_Images"

    def __init__(self, root: Path) -> None:
        self.root = root
        self.training(row("1/a.jpg"))
        self.validation(row("2/b.jpg"))

    def training(self, *rows: Sequence[str], header: bool = True, name: str = "training.csv") -> Path:
        path = self.root / self.lists / name
        path.parent.mkdir(parents=True, exist_ok=True)
        with path.open("w", newline="", encoding="utf-8") as stream:
            csv.writer(stream).writerows([affectnet.COLUMNS, *rows] if header else rows)
        for cells in rows:
            image = self.root / self.images / cells[0]
            if "/" in cells[0]:
                image.parent.mkdir(parents=True, exist_ok=True)
                image.touch()
        return path

    def validation(self, *rows: Sequence[str], header: bool = True) -> Path:
        return self.training(*rows, header=header, name="validation.csv")

    def train(self, **options) -> object:
        table = affectnet.read(self.root, **options)
        return table.take(np.flatnonzero(table.strings("part")[0] == "train"))


def row(
    image: str, expression: object = 0, valence: object = 0.5, arousal: object = -0.25, box=(10, 20, 30, 40),
    points: Sequence[str] | None = (";".join(POINTS),),
) -> list[str]:  # fmt: skip
    return [image, *map(str, box), *points, str(expression), str(valence), str(arousal)]


def stems(table) -> list[str]:
    return [Path(image).name.split(".")[0] for image in table.strings("image")[0]]


def cells(table, name: str) -> list:
    return [round(v, 4) if isinstance(v, float) else v for v in table.column(name).to_pylist()]


@pytest.fixture
def old(tmp_path) -> Old:
    return Old(tmp_path)


class TestOldLists:
    def test_a_row_means_what_it_says(self, old):
        old.training(row("103/a.jpg", 3, 0.25, -0.5))
        table = old.train()
        assert cells(table, "image") == ["Manually_Annotated/Manually_Annotated_Images/103/a.jpg"]
        assert cells(table, "expression") == ["surprise"]
        assert (cells(table, "valence"), cells(table, "arousal")) == ([0.25], [-0.5])
        assert cells(table, "box") == [[10, 20, 40, 60]]
        assert cells(table, "landmarks_68") == [[k + 0.5 for k in range(136)]]

    @pytest.mark.parametrize("header", [True, False])
    def test_a_list_without_a_header_loses_no_row(self, old, header):
        old.validation(row("2/b.jpg", 1), row("2/c.jpg", 2), header=header)
        table = affectnet.read(old.root)
        assert cells(table, "expression") == ["neutral", "happiness", "sadness"]
        assert cells(table, "part") == ["train", "validation", "validation"]

    @pytest.mark.parametrize("header", ["full", "nine names", "none"])
    def test_points_in_columns_of_their_own(self, old, header):
        names = [*affectnet.COLUMNS[:5], *(f"p{k}" for k in range(136)), *affectnet.COLUMNS[6:]]
        rows = [row("1/a.jpg", 4, 0.1, 0.2, points=POINTS), row("1/b.jpg", 5, 0.3, 0.4, points=POINTS)]
        heads = {"full": [names], "nine names": [affectnet.COLUMNS], "none": []}
        old.training(*heads[header], *rows, header=False)
        table = old.train()
        assert cells(table, "expression") == ["fear", "disgust"]
        assert cells(table, "arousal") == [0.2, 0.4]
        assert cells(table, "landmarks_68")[1][-1] == 135.5
        assert not table.metadata["skipped"]

    def test_columns_are_read_by_name(self, old):
        path = old.training(row("1/a.jpg", 6, 0.1, 0.2))
        with path.open(encoding="utf-8", newline="") as stream:
            lines = [["", *cells][::-1] for cells in csv.reader(stream)]
        old.training(row("1/a.jpg"))
        with path.open("w", newline="", encoding="utf-8") as stream:
            csv.writer(stream).writerows(lines)
        assert (cells(old.train(), "expression"), cells(old.train(), "valence")) == (["anger"], [0.1])

    def test_a_missing_column_is_named(self, old):
        path = old.training(row("1/a.jpg"))
        path.write_text(path.read_text().replace("valence", "valenz"))
        with pytest.raises(
            DataError, match=r"training\.csv, line 1: no column valence; expected subDirectory_filePath"
        ):
            affectnet.read(old.root)

    def test_quotes_line_ends_and_byte_order_marks_do_not_matter(self, old):
        path = old.training(row("1/a.jpg", 7))
        with path.open(encoding="utf-8", newline="") as stream:
            lines = list(csv.reader(stream))
        with path.open("w", newline="", encoding="utf-8-sig") as stream:
            csv.writer(stream, quoting=csv.QUOTE_ALL, lineterminator="\r\n").writerows(lines)
        path.write_bytes(path.read_bytes().replace(b"\r\n", b"\r\n\r\n"))
        assert cells(old.train(), "expression") == ["contempt"]

    def test_expressions_that_are_none_are_left_out_by_reason(self, old):
        rows = ((7, 0.5), (8, 0.5), (8, -2), (9, -2), (10, -2))
        old.training(*(row(f"1/{name}.jpg", k, value, value) for name, (k, value) in zip("abcde", rows, strict=True)))
        table = old.train()
        assert stems(table) == ["a"]
        assert table.metadata["skipped"] == {
            "expression is None (8)": 2, "expression is Uncertain (9)": 1, "no face (10)": 1,
        }  # fmt: skip

    def test_none_may_keep_its_valence(self, old):
        rows = ((7, -0.25, -0.25), (8, 0.5, 0.5), (8, -2, -2), (9, 0.1, -2), (10, 0, 0))
        old.training(*(row(f"1/{name}.jpg", *cells) for name, cells in zip("abcde", rows, strict=True)))
        table = old.train(uncertain="keep")
        assert stems(table) == ["a", "b", "d"]
        assert cells(table, "expression") == ["contempt", None, None]
        assert cells(table, "arousal") == [-0.25, 0.5, None]
        assert table.metadata["skipped"] == {
            "expression is None (8) and neither valence nor arousal": 1, "no face (10)": 1,
        }  # fmt: skip

    def test_minus_two_is_missing(self, old):
        old.training(row("1/a.jpg", 0, -2, -2), row("1/b.jpg", 0, "-2.0", 0.5), row("1/c.jpg", 0, -1, 1))
        assert cells(old.train(), "valence") == [None, None, -1.0]
        assert cells(old.train(), "arousal") == [None, 0.5, 1.0]

    def test_a_box_of_negative_width_is_missing_and_noted(self, old):
        old.training(row("1/a.jpg", box=(5, 5, -3, 10)), row("1/b.jpg", box=(5, 5, 3, 0)), row("1/c.jpg"))
        table = old.train()
        assert table.numbers("box")[1].tolist() == [False, False, True]
        assert table.metadata["notes"] == ["2 faces have a box without width or height; it is missing"]

    def test_empty_points_are_missing(self, old):
        old.training(row("1/a.jpg", points=("",)), row("1/b.jpg", points=(";".join(POINTS) + ";",)))
        assert old.train().numbers("landmarks_68")[1].tolist() == [False, True]

    def test_missing_images_are_counted(self, old):
        old.training(row("1/a.jpg"), row("1/b.JPG"), row("7/c.png"))
        (old.root / old.images / "1" / "b.JPG").unlink()
        (old.root / old.images / "7" / "c.png").unlink()
        table = old.train()
        assert stems(table) == ["a"]
        assert table.metadata["skipped"] == {"image is missing": 2}
        assert table.metadata["skipped_examples"]["image is missing"] == [
            f"{old.images}/1/b.JPG", f"{old.images}/7/c.png",
        ]  # fmt: skip

    def test_an_extension_that_lies_is_only_a_name(self, old):
        old.training(row("1/a.png"))
        path = old.root / old.images / "1" / "a.png"
        picture = np.full((16, 16, 3), (200, 100, 20), np.uint8)
        write_image(path.with_suffix(".jpg"), picture)
        path.with_suffix(".jpg").replace(path)
        (image,) = FileImages(old.train()).read(np.array([0]))
        np.testing.assert_allclose(image.mean((0, 1)), (200, 100, 20), atol=6)

    def test_photographs_that_are_listed_twice_count_once(self, old):
        old.training(row("1/a.jpg", 0), row("1/b.jpg", 1), row("1/a.jpg", 2))
        table = old.train()
        assert cells(table, "expression") == ["neutral", "happiness"]
        assert table.metadata["skipped"] == {"photograph that is listed twice": 1}

    def test_a_photograph_in_both_lists_is_validated_only(self, old):
        old.training(row("1/a.jpg"), row("2/b.jpg"))
        table = affectnet.read(old.root)
        assert list(zip(stems(table), cells(table, "part"), strict=True)) == [("a", "train"), ("b", "validation")]
        assert table.metadata["skipped"] == {"training photograph that is in the validation list": 1}

    @pytest.mark.parametrize(
        "places",
        [
            ("Manually_Annotated_file_lists", "Manually_Annotated_Images"),
            ("Manually_Annotated/Manually_Annotated_file_lists", "Manually_Annotated/Manually_Annotated_Images"),
            ("Manually_Annotated", "Manually_Annotated/Manually_Annotated_Images"),
            (".", "Manually_Annotated_Images"),
        ],
    )
    def test_copies_lie_differently(self, tmp_path, places):
        class Copy(Old):
            lists, images = places

        copy = Copy(tmp_path)
        assert cells(affectnet.read(tmp_path), "image") == [f"{copy.images}/1/a.jpg", f"{copy.images}/2/b.jpg"]

    def test_automatically_annotated_photographs_need_their_list(self, old):
        with pytest.raises(DataError, match=r"expected Automatically_Annotated/Automatically_Annotated_Images or"):
            affectnet.read(old.root, automatic=True)


class TestMalformedRows:
    @pytest.mark.parametrize("header", [True, False])
    @pytest.mark.parametrize("place", [0, 1, 2])
    def test_wherever_it_is(self, old, header, place):
        rows = [row("1/a.jpg"), row("1/b.jpg")]
        rows.insert(place, ["1/z.jpg", "3", "4"])
        old.training(*rows, header=header)
        table = old.train()
        assert stems(table) == ["a", "b"]
        (example,) = table.metadata["skipped_examples"]["malformed row"]
        assert f"line {place + header + 1}: 3 fields, expected 9" in example

    @pytest.mark.parametrize(
        ("cells", "message"),
        [
            (["1/z.jpg", "1", "2"], "line 3: 3 fields, expected 9"),
            (row("1/z.jpg", "x"), "line 3: expected a number as expression, found 'x'"),
            (row("1/z.jpg", "0.5"), "line 3: expected a number as expression, found '0.5'"),
            (row("1/z.jpg", valence=""), "line 3: expected a number as valence, found ''"),
            (row("1/z.jpg", valence="nan"), "line 3: expected a number as valence, found 'nan'"),
            (row("1/z.jpg", box=(1, 2, "w", 3)), "line 3: expected a number as face_width, found 'w'"),
            (row("1/z.jpg", points=(";".join(POINTS[:-1]),)), "line 3: expected 136 numbers x1;y1;…, found '0.5;1.5"),
            (row("1/z.jpg", points=(";".join(("?", *POINTS[1:])),)), "line 3: expected 136 numbers"),
            (row("z.jpg"), "line 3: expected <folder>/<file> first, found 'z.jpg'"),
            (row(""), "line 3: expected <folder>/<file> first, found ''"),
        ],
    )
    def test_one_is_left_out_and_counted_and_two_are_an_error(self, old, cells, message):
        old.training(row("1/a.jpg"), cells, row("1/b.jpg"))
        table = old.train()
        assert stems(table) == ["a", "b"]
        assert table.metadata["skipped"] == {"malformed row": 1}
        (example,) = table.metadata["skipped_examples"]["malformed row"]
        assert message in example
        with pytest.raises(
            DataError, match=r"training\.csv, line 3: .*1 or more rows are malformed, and .*malformed=0"
        ):
            affectnet.read(old.root, malformed=0)
        old.training(row("1/a.jpg"), cells, row("1/b.jpg"), cells)
        with pytest.raises(DataError, match=r"line 3: .*2 or more rows are malformed, and .*malformed=1"):
            affectnet.read(old.root)
        assert stems(old.train(malformed=2)) == ["a", "b"]

    @pytest.mark.parametrize("header", [True, False])
    def test_a_list_that_ends_inside_a_row_is_cut_short_however_many_are_tolerated(self, old, header):
        path = old.training(row("1/a.jpg"), row("1/b.jpg"), row("1/c.jpg"), header=header)
        whole = path.read_bytes().rstrip()
        ends = [whole.rindex(b",") + 1, whole.rindex(b";"), whole.rindex(b"1/c") + 5]
        for end in ends:
            path.write_bytes(whole[:end])
            with pytest.raises(DataError, match=rf"training\.csv, line {3 + header}: .*the file is cut short; copy it"):
                affectnet.read(old.root, malformed=5)
        path.write_bytes(whole)  # without a line end, but whole
        assert stems(old.train()) == ["a", "b", "c"]

    def test_lines_are_counted_as_an_editor_does(self, old):
        path = old.training(row("1/a.jpg"), ["1/y.jpg"], row("1/b.jpg"), row("1/z.jpg", "x"), row("1/c.jpg", 11))
        lines = path.read_text().splitlines()
        write_lines(path, [lines[0], "", *lines[1:4], "", *lines[4:]])
        with pytest.raises(DataError, match=r"line 8: expected an expression from 0 to 10, found 11"):
            affectnet.read(old.root, malformed=2)
        write_lines(path, [lines[0], "", *lines[1:4], "", lines[4]])
        found = old.train(malformed=2).metadata["skipped_examples"]["malformed row"]
        assert [example.split(":")[0].rpartition(" ")[2] for example in found] == ["4", "7"]

    @pytest.mark.parametrize(
        ("cells", "message"),
        [
            (row("1/z.jpg", 11), "line 3: expected an expression from 0 to 10, found 11"),
            (row("1/z.jpg", -1), "line 3: expected an expression from 0 to 10, found -1"),
            (row("1/z.jpg", valence=1.5), "line 3: expected valence from -1 to 1, or -2, found 1.5"),
            (row("1/z.jpg", arousal=-3), "line 3: expected arousal from -1 to 1, or -2, found -3"),
        ],
    )
    def test_labels_outside_their_range_are_no_matter_of_tolerance(self, old, cells, message):
        old.training(row("1/a.jpg"), cells)
        with pytest.raises(DataError, match=message):
            affectnet.read(old.root, malformed=5)

    def test_files_that_are_none(self, old):
        path = old.training(row("1/a.jpg"))
        whole = path.read_bytes()
        path.write_bytes(b"")
        with pytest.raises(DataError, match=r"training\.csv: the file is empty"):
            affectnet.read(old.root)
        path.write_bytes(whole.replace(b"1/a", b'"1/a'))
        with pytest.raises(DataError, match=r"training\.csv, line 2: "):
            affectnet.read(old.root, malformed=0)
        path.write_bytes(whole.replace(b"1/a", b"\xff\xfe"))
        with pytest.raises(DataError, match=r"training\.csv"):
            affectnet.read(old.root)
        path.write_bytes(whole[: len(whole) // 2])
        with pytest.raises(DataError, match=r"training\.csv, line 2: 6 fields, expected 9"):
            affectnet.read(old.root, malformed=0)
        path.unlink()
        with pytest.raises(DataError, match="not the root of affectnet"):
            affectnet.read(old.root)

    def test_a_header_alone_has_no_rows(self, old):
        old.training()
        table = affectnet.read(old.root)
        assert cells(table, "part") == ["validation"]


# ------------------------------------------------------------------------------------------------------- new release


class New:
    """A tree of the new release with a few images; they are empty files."""

    def __init__(self, root: Path) -> None:
        self.root = root
        self.face("train_set", "5")
        self.face("val_set", "5")

    def face(self, part: str, name: str, image: bool = True, **arrays: object) -> None:
        if image:
            path = self.root / part / "images" / f"{name}.jpg"
            path.parent.mkdir(parents=True, exist_ok=True)
            path.touch()
        values = {"exp": 0, "val": 0.5, "aro": -0.25, "lnd": np.arange(136.0), **arrays}
        for kind, value in values.items():
            if value is not None:
                path = self.file(part, name, kind)
                path.parent.mkdir(parents=True, exist_ok=True)
                np.save(path, value)

    def file(self, part: str, name: str, kind: str) -> Path:
        return self.root / part / "annotations" / f"{name}_{kind}.npy"

    def train(self, **options) -> object:
        table = affectnet.read(self.root, **options)
        return table.take(np.flatnonzero(table.strings("part")[0] == "train"))


@pytest.fixture
def new(tmp_path) -> New:
    return New(tmp_path)


class TestNewFiles:
    @pytest.mark.parametrize(
        "kind", [np.int64, np.int32, np.uint8, np.float64, np.float32, str, "S3", ">f8", "<U21"], ids=str
    )
    def test_scalars_of_any_type(self, new, kind):
        new.face("train_set", "5", exp=np.array(7, kind) if kind is not str else np.array("7"))
        assert cells(new.train(), "expression") == ["contempt"]

    def test_numbers_as_strings(self, new):
        new.face("train_set", "5", exp=np.array("3"), val=np.array("-0.125"), aro=np.array("-2"))
        table = new.train()
        assert cells(table, "expression") == ["surprise"]
        assert (cells(table, "valence"), cells(table, "arousal")) == ([-0.125], [None])

    def test_rank_one_is_a_number_too(self, new):
        new.face("train_set", "5", exp=np.array([2]), lnd=np.arange(136.0).reshape(68, 2))
        assert cells(new.train(), "expression") == ["sadness"]
        assert cells(new.train(), "landmarks_68") == [list(range(136))]

    def test_ids_are_in_numeric_order(self, new):
        for name in ("10", "9", "100", "0"):
            new.face("train_set", name, val=int(name) / 100)
        assert stems(new.train()) == ["0", "5", "9", "10", "100"]
        assert cells(new.train(), "valence") == [0, 0.5, 0.09, 0.1, 1.0]

    def test_minus_two_is_missing(self, new):
        new.face("train_set", "5", val=-2, aro=-2.0)
        new.face("train_set", "6", val=-1, aro=1)
        assert cells(new.train(), "valence") == [None, -1]
        assert cells(new.train(), "arousal") == [None, 1]

    def test_images_and_labels_without_each_other_are_counted(self, new):
        new.face("train_set", "6", image=False)
        new.face("train_set", "7", exp=None)
        new.face("train_set", "8", val=None, lnd=None)
        table = new.train()
        assert stems(table) == ["5", "8"]
        assert cells(table, "valence") == [0.5, None]
        assert table.numbers("landmarks_68")[1].tolist() == [True, False]
        assert table.metadata["skipped"] == {"label files without an image": 1, "image without an expression file": 1}
        assert table.metadata["skipped_examples"] == {
            "label files without an image": ["train_set/annotations/6"],
            "image without an expression file": ["train_set/images/7.jpg"],
        }
        assert table.metadata["notes"] == [
            "train_set: 1 images have no file _val.npy", "train_set: 1 images have no file _lnd.npy",
        ]  # fmt: skip

    def test_stray_files_do_not_matter(self, new):
        for path in ("images/.DS_Store", "images/list.txt", "annotations/._5_exp.npy", "annotations/x_exp.npy"):
            (new.root / "train_set" / path).write_bytes(b"\x00")
        assert stems(new.train()) == ["5"]
        assert not new.train().metadata["skipped"]

    def test_uncertain_images(self, new):
        new.face("train_set", "6", exp=8)
        assert stems(new.train()) == ["5"]
        assert new.train().metadata["skipped"] == {"expression is None (8)": 1}
        assert cells(new.train(uncertain="keep"), "expression") == ["neutral", None]

    @pytest.mark.parametrize(
        ("kind", "value", "message"),
        [
            ("exp", 11, "6_exp.npy: expected a class from 0 to 7, found 11"),
            ("exp", 1.5, "expected a class from 0 to 7, found 1.5"),
            ("exp", np.array("happy"), "6_exp.npy: expected a number, found 'happy'"),
            ("exp", np.array([1, 2]), r"6_exp.npy: expected a number, found int64 of shape \(2,\)"),
            ("exp", np.array(""), "6_exp.npy: expected a number"),
            ("val", 1.25, "6_val.npy: expected a number from -1 to 1, or -2, found 1.25"),
            ("aro", np.nan, "6_aro.npy: expected finite numbers, found NaN"),
            ("lnd", np.zeros(10), r"6_lnd.npy: expected 136 numbers, found float64 of shape \(10,\)"),
        ],
    )
    def test_an_array_that_is_none_names_its_file(self, new, kind, value, message):
        new.face("train_set", "6", **{kind: value})
        new.face("train_set", "7")
        with pytest.raises(DataError, match=message):
            affectnet.read(new.root)

    def test_nothing_is_unpickled(self, new):
        np.save(new.file("train_set", "5", "exp"), np.array({"a": 1}, object), allow_pickle=True)
        with pytest.raises(DataError, match=r"5_exp\.npy: expected a number, found object"):
            affectnet.read(new.root)

    @pytest.mark.parametrize("content", [b"", b"7", b"\x93NUMPY", b"\x93NUMPY\x01\x00\xff\xff{", b"\x80\x04K\x07."])
    def test_a_file_that_is_no_array(self, new, content):
        new.file("train_set", "5", "exp").write_bytes(content)
        with pytest.raises(DataError, match=r"5_exp\.npy: expected a NumPy array of version 1"):
            affectnet.read(new.root)

    def test_a_file_that_is_cut_short(self, new):
        path = new.file("train_set", "5", "lnd")
        path.write_bytes(path.read_bytes()[:-8])
        with pytest.raises(DataError, match=r"5_lnd\.npy: cut short: expected 1088 bytes of numbers, found 1080"):
            affectnet.read(new.root)

    def test_a_part_without_files(self, new):
        for path in (new.root / "val_set" / "annotations").iterdir():
            path.unlink()
        with pytest.raises(
            DataError, match=r"val_set: expected images/<id>\.jpg and .*found 1 images and 0 expressions"
        ):
            affectnet.read(new.root)


# ------------------------------------------------------------------------------------------------------------ releases


class TestReleases:
    @pytest.fixture
    def mixed(self, tmp_path) -> Path:
        Old(tmp_path)
        New(tmp_path)
        return tmp_path

    def test_both_in_one_root_have_to_be_chosen(self, mixed):
        with pytest.raises(
            DataError, match=r"mixed AffectNet releases: train_set and val_set are the new one, Manually_"
        ):
            affectnet.read(mixed)
        assert "box" not in affectnet.read(mixed, release="new").names
        assert "box" in affectnet.read(mixed, release="old").names
        assert affectnet.read(mixed, release="old").metadata["notes"] == [
            "the root holds both releases of AffectNet; this is the old one",
        ]

    def test_the_other_release_is_named(self, tmp_path):
        Old(tmp_path / "old")
        New(tmp_path / "new")
        with pytest.raises(DataError, match=r"other release .*\(Manually_Annotated, .*dataset=affectnet_old"):
            affectnet.read(tmp_path / "old", release="new")
        with pytest.raises(DataError, match=r"other release .*\(train_set, val_set\).*dataset=affectnet, or"):
            affectnet.read(tmp_path / "new", release="old")

    def test_the_table_says_which_it_is(self, tmp_path):
        Old(tmp_path / "old")
        New(tmp_path / "new")
        assert affectnet.read(tmp_path / "old").metadata["release"] == "old"
        assert affectnet.read(tmp_path / "new").metadata["release"] == "new"

    def test_unknown_options(self, new):
        with pytest.raises(ConfigError, match=r"dataset\.release=newest: did you mean new"):
            affectnet.read(new.root, release="newest")
        with pytest.raises(ConfigError, match=r"dataset\.uncertain=yes: known: drop, keep"):
            affectnet.read(new.root, uncertain="yes")
        with pytest.raises(ConfigError, match="only the old release"):
            affectnet.read(new.root, automatic=True)


class TestExpected:
    def test_the_known_variants_of_the_validation_set(self):
        new = {entry.key: entry for entry in affectnet.expected("new")}
        old = {entry.key: entry for entry in affectnet.expected("old")}
        assert (new["rows/part=validation"].value, old["rows/part=validation"].value) == (3999, 4000)
        assert set(new["rows/part=validation"].variants) == {4000}
        assert set(old["rows/part=validation"].variants) == {3999}
        contempt = "rows/part=validation/expression=contempt"
        assert (new[contempt].value, set(new[contempt].variants)) == (499, {500})

    def test_counts_of_classes_add_up(self):
        for release in affectnet.RELEASES:
            found = {entry.key: entry.value for entry in affectnet.expected(release)}
            for part in ("train", "validation"):
                classes = [found[f"rows/part={part}/expression={name}"] for name in CLASSES]
                assert sum(classes) == found[f"rows/part={part}"]
        assert found["rows/part=train"] == 287_651

    def test_crops_have_a_size_and_photographs_do_not(self):
        assert next(e.value for e in affectnet.expected("new") if e.key == "size") == (224, 224)
        assert not [e for e in affectnet.expected("old") if e.key == "size"]
