# SPDX-License-Identifier: Apache-2.0
"""Every rule of the check: what is an error, a warning or a note, and that nothing is said of good data."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pyarrow as pa
import pytest

from affect.data import check
from affect.data.check import ACCEPTED, ERROR, NOTE, OK, WARNING, Finding
from affect.data.expected import Expected
from affect.data.headers import CMYK, COLOUR, EMPTY, GREY, MISSING, Headers
from affect.data.table import FaceTable
from affect.errors import ConfigError, DataError


def table(root: Path | str = ".", metadata: dict | None = None, **columns: object) -> FaceTable:
    count = len(next(iter(columns.values())))  # type: ignore[arg-type]
    columns = {"image": [f"{k}.jpg" for k in range(count)], **columns}
    return FaceTable.from_columns(columns, root, metadata or {})  # type: ignore[arg-type]


def levels(findings: list[Finding]) -> dict[str, str]:
    assert len({finding.key for finding in findings}) == len(findings), "keys are names"
    return {finding.key: finding.level for finding in findings}


def one(findings: list[Finding], key: str) -> Finding:
    [found] = [finding for finding in findings if finding.key == key]
    return found


def rate(share: float) -> FaceTable:
    """Return a table of 10,000 rows in which AU12 occurs at this rate."""
    values = np.zeros(10_000, np.float32)
    values[: round(share * 10_000)] = 1
    return table(au12_occurrence=values)


# ------------------------------------------------------------------------------------------ published numbers


@pytest.mark.parametrize(
    ("value", "found", "level"),
    [(100, True, OK), (101, True, ERROR), (99, True, ERROR), (101, False, WARNING), (100, False, OK)],
)
def test_whole_numbers_are_exact(value: int, found: bool, level: str) -> None:
    faces = table(valence=np.zeros(100, np.float32))
    [finding] = check.compare(faces, [Expected("rows", value, "the paper", found)])
    assert (finding.key, finding.level, finding.measured, finding.expected) == ("rows", level, 100, value)
    assert "the paper" in finding.sentence
    assert ("recalled" in finding.sentence) == (not found and level != OK)
    if level != OK:
        assert f"found 100, expected {value}" in finding.sentence


def test_a_known_variant_is_named_and_no_error() -> None:
    faces = table(valence=np.zeros(3999, np.float32))
    wanted = Expected("rows", 4000, "the paper", variants={3999: "one image cannot be read", 5000: "somebody"})
    [finding] = check.compare(faces, [wanted])
    assert finding.level == NOTE
    assert "3,999 is the number of one image cannot be read" in finding.sentence
    [finding] = check.compare(faces.take(np.arange(10)), [wanted])
    assert finding.level == ERROR
    assert "3,999 (one image cannot be read), 5,000 (somebody)" in finding.sentence


def test_numbers_that_a_known_variant_may_have_are_noted() -> None:
    part, coded = np.repeat(["train", "test"], [70, 20]), np.repeat([1.0, 0.0], [25, 65]).astype(np.float32)
    faces = table(part=part, subject=np.repeat(["a", "b"], [70, 20]), au12_occurrence=coded)
    wanted = {
        "rows": Expected("rows", 100, "the paper", variants={90: "a list", 80: "another"}),
        "rows/part=train": Expected("rows/part=train", 75, "the paper"),
        "rows/part=test": Expected("rows/part=test", 31, "the paper"),  # the list lacks ten rows, not eleven
        "rows/subject=a": Expected("rows/subject=a", 75, "the paper", variants={71: "a list"}),
        "rows/subject=b": Expected("rows/subject=b", 25, "the paper", variants={24: "another"}),
        "distinct/subject": Expected("distinct/subject", 3, "the paper"),
        "rate/au12_occurrence": Expected("rate/au12_occurrence", 0.2, "the paper"),
        "labelled/au12_occurrence": Expected("labelled/au12_occurrence", 100, "the paper"),
    }
    found = levels(check.compare(faces, wanted.values()))
    assert found == {
        **dict.fromkeys(wanted, NOTE),
        **dict.fromkeys(("rows/part=test", "rows/subject=a", "distinct/subject"), ERROR),
    }
    assert "70: the number of a list is not known; 75 elsewhere" in check.compare(faces, wanted.values())[1].sentence
    away = {**wanted, "rate/au12_occurrence": Expected("rate/au12_occurrence", 0.1, "the paper")}
    assert levels(check.compare(faces, away.values()))["rate/au12_occurrence"] == ERROR
    other = levels(check.compare(faces.take(np.arange(89)), wanted.values()))
    assert {other["rows"], other["rows/part=train"], other["labelled/au12_occurrence"]} == {ERROR}


@pytest.mark.parametrize(
    ("share", "found", "level"),
    [
        (0.500, True, OK),
        (0.503, True, OK),
        (0.497, True, OK),
        (0.5031, True, WARNING),
        (0.520, True, WARNING),
        (0.480, True, WARNING),
        (0.5201, True, ERROR),
        (0.4, True, ERROR),
        (0.4, False, WARNING),
        (0.5031, False, WARNING),
        (0.503, False, OK),
    ],
)
def test_rates_have_two_tolerances(share: float, found: bool, level: str) -> None:
    [finding] = check.compare(rate(share), [Expected("rate/au12_occurrence", 0.5, "a list", found)])
    assert finding.level == level, finding


def test_a_rate_without_a_label_is_an_error() -> None:
    wanted = [Expected("rate/au12_occurrence", 0.5, "a list"), Expected("rate/au01_occurrence", 0.5, "me", False)]
    faces = table(au12_occurrence=[None] * 5)
    found = check.compare(faces, wanted)
    assert [f.level for f in found] == [ERROR, WARNING]
    assert "found no labelled cell" in found[0].sentence


def test_conditions_and_distinct_values_are_compared() -> None:
    faces = table(part=["train", "train", "test"], subject=["a", "b", "b"], expression=["fear", None, "fear"])
    wanted = {
        "rows/part=train": 2,
        "rows/part=train/expression=fear": 1,
        "distinct/subject": 2,
        "distinct/subject/part=test": 1,
        "labelled/expression": 2,
    }
    assert set(levels(check.compare(faces, [Expected(k, v, "x") for k, v in wanted.items()])).values()) == {OK}


@pytest.mark.parametrize(("found", "level"), [(True, ERROR), (False, WARNING)])
def test_sizes(found: bool, level: str) -> None:
    faces = table(valence=np.zeros(3, np.float32))
    wanted = [Expected("size", (100, 100), "the readme", found)]
    assert check.compare(faces, wanted) == []
    assert levels(check.compare(faces, wanted, {(100, 100): 3})) == {"size": OK}
    [finding] = check.compare(faces, wanted, {(100, 100): 2, (224, 200): 1})
    assert finding.level == level
    assert "1 of 3 images are not 100 x 100 but 224 x 200 (1)" in finding.sentence
    assert levels(check.compare(faces, wanted, {})) == {"size": WARNING}


def test_a_synthetic_tree_is_not_held_to_numbers(tmp_path: Path) -> None:
    faces = rate(0.9)
    wanted = [
        Expected("rows", 5, "x"),
        Expected("rate/au12_occurrence", 0.1, "x"),
        Expected("size", (9, 9), "x"),
        Expected("rows/part=train", 10_000, "y", False),
    ]
    found = check.compare(faces, wanted, {(1, 1): 5}, synthetic=True)
    assert {f.level for f in found} == {NOTE}
    assert all("synthetic" in f.sentence for f in found)
    assert not check.is_synthetic(tmp_path)
    (tmp_path / "SYNTHETIC.md").touch()
    assert check.is_synthetic(tmp_path)


# -------------------------------------------------------------------------------------------------- accepting


def test_accepting_by_key() -> None:
    findings = [Finding("a", ERROR, ""), Finding("b", WARNING, ""), Finding("c", NOTE, ""), Finding("d", ERROR, "")]
    assert levels(check.accepted(findings, ["a", "b", "c"])) == {"a": ACCEPTED, "b": ACCEPTED, "c": NOTE, "d": ERROR}
    assert [f.key for f in check.errors(check.accepted(findings, ["a"]))] == ["d"]
    with pytest.raises(ConfigError, match=r"accept=rate/au12_occurence: no finding.*did you mean rate/au12"):
        check.require_known([Finding("rate/au12_occurrence", ERROR, "")], ["rate/au12_occurence"])


def test_a_training_accepts_what_only_the_whole_check_finds() -> None:
    known = [Finding("rows", OK, "")]
    check.require_known(known, ["rows", "size", "images/extension", "rows/duplicate"], elsewhere=True)
    with pytest.raises(ConfigError, match="accept=row: no finding has this key; did you mean rows"):
        check.require_known(known, ["row"], elsewhere=True)
    with pytest.raises(ConfigError, match="accept=size"):
        check.require_known(known, ["size"])


def test_training_stops_on_errors_alone(tmp_path: Path) -> None:
    wanted = [Expected("rows", 5, "the paper"), Expected("distinct/subject", 9, "me", False)]
    faces = table(tmp_path, subject=["a", "b"])
    with pytest.raises(DataError, match=r"mini: rows: found 2, expected 5 \(the paper\).*accept=\[rows\]"):
        check.require_expected(faces, wanted, name="mini")
    found = check.require_expected(faces, wanted, ["rows", "size"], "mini")
    assert levels(found) == {"rows": ACCEPTED, "distinct/subject": WARNING}
    elsewhere = tmp_path / "delivered"
    elsewhere.mkdir()
    (elsewhere / "SYNTHETIC.md").touch()
    assert set(levels(check.require_expected(faces, wanted, root=elsewhere)).values()) == {NOTE}


# ------------------------------------------------------------------------------------------------------ table


def test_a_sound_table_gives_no_finding_above_ok() -> None:
    faces = table(
        subject=["a", "a", "b"],
        part=["train", "train", "test"],
        expression=["fear", "anger", "fear"],
        au12_occurrence=np.array([0, 1, 1], np.float32),
        landmarks_5=np.full((3, 10), 4, np.float32),
        box=np.tile(np.array([1, 1, 9, 9], np.float32), (3, 1)),
    )
    assert levels(check.examine_table(faces, "subject")) == {"groups/subject": OK}
    assert check.examine_points(faces, np.arange(3), np.full((3, 2), 10)) == []


def test_skipped_rows_are_told_by_reason_with_names() -> None:
    metadata = {
        "skipped": {"missing image": 12, "blurred": 1},
        "skipped_examples": {"missing image": list("abcdefghij")},
    }
    found = check.examine_table(table(metadata=metadata, valence=[0.5]))
    assert levels(found) == {"skipped/missing image": NOTE, "skipped/blurred": NOTE}
    assert one(found, "skipped/missing image").examples == list("abcdefghij")
    assert one(found, "skipped/missing image").measured == 12


@pytest.mark.parametrize("reason", check.LOST)
def test_lost_images_are_an_error_where_no_count_says_that_all_are_there(reason: str) -> None:
    def level(lost: int, *expected: Expected) -> str:
        metadata = {"skipped": {f"{reason} …": lost, "blurred": 500}, "skipped_examples": {}}
        faces = table(metadata=metadata, valence=[0.5] * 99)
        return one(check.examine_table(faces, expected=expected), f"skipped/{reason} …").level

    assert [level(lost) for lost in (1, 2, 900)] == [NOTE, ERROR, ERROR], "1 of 100, 2 of 101"
    assert level(2, Expected("rows", 101, "recalled", found=False)) == ERROR
    assert level(2, Expected("rows", 101, "counted")) == ERROR
    assert level(2, Expected("rows", 101, "counted", variants={99: "of somebody"})) == NOTE
    assert level(2, Expected("rows", 99, "counted")) == NOTE


def test_rows_without_labels() -> None:
    found = check.examine_table(table(valence=[0.5, None], expression=[None, None], metadata={"expressions": []}))
    assert one(found, "labels/none").level == NOTE
    assert one(found, "labels/none").examples == ["1.jpg"]
    found = check.examine_table(table(subject=["a", "b"]))
    assert one(found, "labels/none").level == ERROR
    assert "2 of 2 rows have no label at all" in one(found, "labels/none").sentence


@pytest.mark.parametrize(
    ("column", "value", "key"),
    [
        ("au12_occurrence", 9.0, "labels/au"),
        ("au12_intensity", 5.5, "labels/au_intensity"),
        ("valence", -2.0, "labels/valence_arousal"),
        ("attribute_bald", -1.0, "labels/attributes"),
        ("pose_yaw", 999.0, "labels/pose"),
        ("expression_fear", -0.5, "labels/expression"),
    ],
)
def test_a_label_outside_its_range_names_its_row(column: str, value: float, key: str) -> None:
    found = check.examine_table(table(**{column: np.array([0.5, value], np.float32)}))
    assert one(found, key).level == ERROR
    assert f"column {column}, row 1" in one(found, key).sentence
    assert levels(check.examine_table(table(**{column: np.array([0.5, 0.5], np.float32)}))) == {}


def test_a_class_that_no_row_has() -> None:
    faces = table(expression=["fear", "fear"], metadata={"expressions": ["fear", "anger"]})
    assert levels(check.examine_table(faces)) == {"expression/anger": WARNING}
    assert check.class_counts(faces) == {"fear": 2}


def test_a_person_in_two_parts_is_an_error_with_names() -> None:
    faces = table(subject=["anna", "anna", "ben", None], part=["train", "test", "test", "train"], valence=[0.0] * 4)
    found = one(check.examine_table(faces, "subject"), "groups/subject")
    assert (found.level, found.measured) == (ERROR, 1)
    assert found.examples == ["anna (test, train)"]


def test_people_whom_no_row_names_are_not_said_to_be_apart() -> None:
    nobody = pa.array([None, None], pa.string())
    faces = table(subject=nobody, part=["train", "test"], valence=np.zeros(2, np.float32))
    found = one(check.examine_table(faces, "subject"), "groups/subject")
    assert (found.level, found.measured) == (WARNING, 2)
    assert "no row names its subject" in found.sentence
    some = one(check.examine_table(faces.with_columns({"subject": ["a", None]}), "subject"), "groups/subject")
    assert some.level == NOTE
    assert "1 of 2 rows do not name theirs" in some.sentence


def test_the_group_and_the_people_are_both_asked() -> None:
    faces = table(subject=["a", "a"], sequence=["v1", "v2"], part=["train", "test"], valence=np.zeros(2, np.float32))
    assert levels(check.examine_table(faces, "sequence")) == {"groups/sequence": OK, "groups/subject": ERROR}
    unassigned = faces.with_columns({"part": ["train", None]})
    assert levels(check.examine_table(unassigned, "sequence")) == {"groups/sequence": OK, "groups/subject": OK}


def test_duplicates_are_told_from_several_faces_of_one_image() -> None:
    box = np.array([[0, 0, 5, 5], [5, 5, 9, 9], [0, 0, 5, 5], [1, 1, 2, 2]], np.float32)
    images = ["a.jpg", "a.jpg", "b.jpg", "c.jpg"]
    faces = table(image=images, box=box, valence=np.zeros(4, np.float32))
    assert levels(check.examine_table(faces)) == {}
    box[1] = box[0]
    same = faces.with_columns({"box": box})
    found = check.examine_table(same)
    assert levels(found) == {"rows/duplicate": WARNING}
    assert one(found, "rows/duplicate").measured == 1
    assert one(found, "rows/duplicate").examples == ["a.jpg"]
    unsure = same.with_columns({"valence": [0.0, 0.5, 0.0, 0.0]})
    assert levels(check.examine_table(unsure)) == {"rows/duplicate": WARNING, "rows/conflicting": WARNING}
    leak = same.with_columns({"part": ["train", "test", "test", "test"]})
    found = check.examine_table(leak)
    assert levels(found) == {"rows/duplicate": WARNING, "groups/image": ERROR}
    assert one(found, "groups/image").examples == ["a.jpg (test, train)"]


def test_only_the_faces_with_two_labels_conflict() -> None:
    faces = table(image=list("aabbccd"), expression=["fear", "anger", "fear", "fear", None, None, "fear"])
    found = check.examine_table(faces)
    assert one(found, "rows/duplicate").measured == 3
    assert one(found, "rows/conflicting").measured == 1
    assert one(found, "rows/conflicting").examples == ["a"]


# ----------------------------------------------------------------------------------------------------- images


def headers(count: int, **changes: dict[int, object]) -> Headers:
    sizes = np.tile(np.array([[10, 20]], np.int32), (count, 1))
    columns = {
        "kinds": np.array(["JPEG"] * count, object),
        "pixels": np.array([COLOUR] * count, object),
        "turned": np.zeros(count, bool),
        "problems": np.array([""] * count, object),
        "lying": np.zeros(count, bool),
    }
    for name, cells in changes.items():
        for row, value in cells.items():
            columns[name][row] = value
            if name == "problems":
                sizes[row] = 0
    return Headers(np.arange(count), sizes, **columns)


def test_sound_images_give_no_finding() -> None:
    faces = table(valence=np.zeros(4, np.float32))
    assert check.examine_images(faces, headers(4), 4) == []
    assert check.size_counts(headers(4)) == {(10, 20): 4}


def test_images_that_cannot_be_used_are_counted_with_ten_names() -> None:
    faces = table(valence=np.zeros(30, np.float32))
    seen = headers(30, problems={**dict.fromkeys(range(12), MISSING), 20: EMPTY})
    found = check.examine_images(faces, seen, 30)
    assert levels(found) == {"images/missing": ERROR, "images/empty": ERROR}
    assert one(found, "images/missing").measured == 12
    assert one(found, "images/missing").examples == [f"{k}.jpg" for k in range(10)]
    assert "12 of 30 images are not there" in one(found, "images/missing").sentence
    assert check.size_counts(seen) == {(10, 20): 17}
    assert check.value_counts(seen.problems) == {"empty": 1, "missing": 12}


def test_names_that_lie_are_a_warning_and_unusual_pixels_a_note() -> None:
    faces = table(valence=np.zeros(5, np.float32))
    seen = headers(5, lying={0: True}, pixels={1: GREY, 2: CMYK}, turned={3: True})
    found = check.examine_images(faces, seen, 9)
    assert levels(found) == {
        "images/extension": WARNING,
        "images/grey": NOTE,
        "images/CMYK": NOTE,
        "images/turned": NOTE,
    }
    assert "1 of 5 images of a sample of 9" in one(found, "images/grey").sentence


def test_distinct_images_keep_the_order_of_the_table() -> None:
    faces = table(image=["b", "a", "b", "c"], valence=np.zeros(4, np.float32))
    rows, place = check.distinct_images(faces)
    assert rows.tolist() == [0, 1, 3]
    assert place.tolist() == [0, 1, 0, 2]


def points(*shifts: float) -> np.ndarray:
    """Return five points per face around (5, 5), moved to the right by ``shifts``."""
    base = np.array([4, 4, 6, 4, 5, 5, 4, 6, 6, 6], np.float32)
    return base + np.array(shifts, np.float32)[:, None] * np.array([1, 0] * 5, np.float32)


def test_points_far_outside_of_their_image() -> None:
    def found(*shifts: float) -> dict[str, str]:
        values = points(*shifts)
        faces = table(landmarks_5=values)
        return levels(check.examine_points(faces, np.arange(len(values)), np.full((len(values), 2), 10)))

    assert found(0, 0, 2) == {}
    assert found(0, 0, 3.5) == {}  # two points of five lie half a pixel outside, as for large poses
    assert found(*([0] * 40), 9) == {"points/5": WARNING}  # one row of 41
    assert found(0, 0, 30) == {"points/5": ERROR}
    missing = points(0.0, 0.0)
    missing[1, 2:4] = np.nan
    faces = table(landmarks_5=missing)
    assert check.examine_points(faces, np.arange(2), np.full((2, 2), 10)) == []


def test_only_rows_of_known_size_are_judged() -> None:
    faces = table(landmarks_5=points(0.0, 100.0))
    assert check.examine_points(faces, np.array([0]), np.array([[10, 10]])) == []
    [finding] = check.examine_points(faces, np.array([1]), np.array([[10, 10]]))
    assert finding.examples == ["1.jpg"]


def test_boxes_without_area_or_beside_the_image() -> None:
    good = [1, 1, 9, 9]
    for bad in ([9, 1, 1, 9], [1, 1, 1, 9], [20, 20, 30, 30], [-9, -9, -1, -1]):
        faces = table(box=np.array([good] * 30 + [bad], np.float32))
        [finding] = check.examine_points(faces, np.arange(31), np.full((31, 2), 10))
        assert (finding.key, finding.level, finding.examples) == ("box", WARNING, ["30.jpg"])


def test_near_duplicates_in_two_parts() -> None:
    faces = table(part=["train", "train", "test", "test"], valence=np.zeros(4, np.float32))
    assert levels(check.examine_near_duplicates(faces, np.array([0, 0, 1, 2]))) == {
        "near_duplicates/groups": NOTE,
        "near_duplicates": OK,
    }
    found = check.examine_near_duplicates(faces, np.array([0, 1, 1, 2]))
    assert one(found, "near_duplicates").level == WARNING
    assert one(found, "near_duplicates").examples == ["1.jpg (test, train)"]


# ----------------------------------------------------------------------------------------------------- report


def test_rows_and_groups_of_parts() -> None:
    faces = table(part=["train", "train", "test", None], subject=["a", "a", None, "b"])
    assert check.part_counts(faces, "subject") == {
        "test": {"rows": 1, "groups": 1},
        "train": {"rows": 2, "groups": 1},
        "none": {"rows": 1, "groups": 1},
    }
    assert check.part_counts(table(valence=[0.0]), "subject") == {}


def test_the_sheet_shows_every_kind_before_any_twice() -> None:
    expression = ["fear"] * 50 + ["anger"] * 3 + [None] * 5
    part = (["train", "test"] * 29)[:58]
    faces = table(expression=expression, part=part)
    rows = check.sheet_rows(faces, 6)
    kinds = {(faces.strings("expression", rows)[0][k], faces.strings("part", rows)[0][k]) for k in range(6)}
    assert len(kinds) == 6
    assert rows.tolist() == check.sheet_rows(faces, 6).tolist() == sorted(rows.tolist())
    assert len(check.sheet_rows(faces, 100)) == 58
    usable = np.zeros(58, bool)
    usable[[3, 51]] = True
    assert check.sheet_rows(faces, 6, usable).tolist() == [3, 51]


def test_captions_name_the_labels_that_a_row_has() -> None:
    faces = table(
        subject=["anna", None],
        expression=["fear", None],
        au01_occurrence=[1.0, None],
        au02_occurrence=[0.0, None],
        au12_intensity=[3.0, None],
        valence=[-0.5, None],
        attribute_wavy_hair=[1.0, 0.0],
    )
    assert check.caption(faces, 0) == "anna, fear, AU1 AU12, V -0.50, wavy hair"
    assert check.caption(faces, 1) == "no label"
