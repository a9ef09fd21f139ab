# SPDX-License-Identifier: Apache-2.0
"""Parts: whole groups, independent of the order of rows, official where they are named, and refused where they leak."""

from __future__ import annotations

import pickle

import numpy as np
import pytest

from affect.data.images import Source
from affect.data.protocol import (
    PARTS,
    UNUSED_PART,
    Protocol,
    assign,
    divide,
    group_codes,
    groups_of,
    keep_classes,
    known_people,
    people_of,
    require_parts,
    split_groups,
    spread,
    together,
)
from affect.data.table import FaceTable
from affect.errors import ConfigError, DataError
from tests.data import samples

NAMES = [f"person {k}" for k in range(101)]


def source(count=60, subjects=12, **columns):
    faces = samples.table(count, subjects=subjects, landmarks=False)
    return Source("sample", faces.with_columns(columns) if columns else faces, samples.DrawnImages())


# ------------------------------------------------------------------------------------------------- groups


@pytest.mark.parametrize("fractions", [2, 3, 10, (0.7, 0.3), (0.5, 0.25, 0.25), (1.0,), (0.0, 1.0)])
def test_parts_have_their_share_within_one_group(fractions):
    part = split_groups(NAMES, fractions, seed=0)
    shares = np.full(fractions, 1 / fractions) if isinstance(fractions, int) else np.array(fractions)
    counts = np.bincount(part, minlength=len(shares))
    assert (np.abs(counts - shares * len(NAMES)) < 1).all()


def test_assignment_follows_names_and_seed_alone():
    part = dict(zip(NAMES, split_groups(NAMES, 5, seed=3), strict=True))
    backwards = dict(zip(NAMES[::-1], split_groups(NAMES[::-1], 5, seed=3), strict=True))
    assert part == backwards
    other = dict(zip(NAMES, split_groups(NAMES, 5, seed=4), strict=True))
    salted = dict(zip(NAMES, split_groups(NAMES, 5, seed=3, salt="x"), strict=True))
    for changed in (other, salted):
        same = np.mean([part[name] == changed[name] for name in NAMES])
        assert same < 0.4, "another seed gives an independent split"


def test_assignment_is_stable_over_versions():
    """A change of this list would silently change every published split."""
    assert split_groups(["anna", "ben", "carl", "dora", "emil"], 5, seed=0).tolist() == STABLE


STABLE = [2, 1, 0, 3, 4]


def test_strata_are_split_alike():
    strata = np.arange(len(NAMES)) % 4
    part = split_groups(NAMES, (0.6, 0.2, 0.2), seed=1, stratify=strata)
    for stratum in range(4):
        counts = np.bincount(part[strata == stratum], minlength=3)
        assert (np.abs(counts - np.array([0.6, 0.2, 0.2]) * (strata == stratum).sum()) <= 1.5).all()
    counts = np.bincount(part, minlength=3)
    assert (np.abs(counts - np.array([0.6, 0.2, 0.2]) * len(NAMES)) < 1).all()


def test_bad_fractions_are_refused():
    with pytest.raises(ConfigError, match="must be non-negative and sum to 1"):
        split_groups(NAMES, (0.5, 0.6), 0)


def test_rows_without_a_group_are_groups_of_their_own():
    faces = FaceTable.from_columns({"image": list("abcd"), "subject": ["x", None, "x", None]})
    codes, names = group_codes(faces, "subject")
    assert names[codes].tolist() == ["x", "b", "x", "d"]


# -------------------------------------------------------------------------------------------------- parts


def test_folds_cover_every_row_once():
    data = source()
    tests = [assign(data, Protocol(test=k, folds=4))["test"] for k in range(4)]
    assert sorted(np.concatenate(tests).tolist()) == list(range(60))
    rows = assign(data, Protocol(test=1, folds=4))
    assert sorted(np.concatenate([rows[part] for part in PARTS]).tolist()) == list(range(60))
    groups = [set(data.table.strings("subject", rows[part])[0]) for part in PARTS]
    assert len(set().union(*groups)) == sum(len(group) for group in groups) == 12
    assert len(groups[1]) == round(0.15 * 9)


def test_order_of_rows_does_not_matter():
    data = source()
    shuffled = np.random.default_rng(0).permutation(60)
    other = Source("sample", data.table.take(shuffled), data.images)
    for part, rows in assign(data, Protocol(test=0)).items():
        moved = assign(other, Protocol(test=0))[part]
        assert sorted(shuffled[moved]) == rows.tolist()


def test_split_seed_and_validation_are_independent_of_the_test_fold():
    data = source(120, 40)
    rows = [assign(data, Protocol(test=0, split_seed=seed))["validation"] for seed in (0, 1)]
    assert rows[0].tolist() != rows[1].tolist()


def test_official_parts():
    names = np.array(["train", "test", "other"] * 20, dtype=object)
    data = source(60, 3, part=names)  # subject k % 3 goes with part k % 3
    with pytest.raises(DataError, match=r"1 group .* is left for training"):
        assign(data, Protocol(test="test"))
    names = np.array(["train", "test", "validation"] * 20, dtype=object)
    data = source(60, 12, part=names)
    rows = assign(data, Protocol(test="test"))
    assert (names[rows["test"]] == "test").all()
    assert len(rows["test"]) == 20
    assert (names[rows["train"]] == "train").all()
    assert (names[rows["validation"]] == "validation").all()
    assert len(rows["train"]) == len(rows["validation"]) == 20, "the official validation part selects"
    assert assign(data, Protocol())["test"].tolist() == np.flatnonzero(names == "test").tolist()
    rows = assign(data, Protocol(test="validation", train=["train", "test"]))
    assert len(rows["train"]) + len(rows["validation"]) == 40
    assert len(assign(data, Protocol(test=0, folds=3))["test"]) == 20, "a fold is a fold, with official parts too"


def test_parts_by_their_usual_names():
    names = np.array(["Train", "Test"] * 30, dtype=object)
    rows = assign(source(60, 12, part=names), Protocol())
    assert rows["test"].tolist() == np.flatnonzero(names == "Test").tolist()
    assert set(names[np.concatenate([rows["train"], rows["validation"]])]) == {"Train"}
    assert len(rows["validation"]) > 0, "without an official part, groups are held out"
    assert assign(source(60, 12, part=names), Protocol(test="test"))["test"].tolist() == rows["test"].tolist()
    names = np.array(["train", "val", "test"] * 20, dtype=object)
    data = source(60, 12, part=names)
    rows = assign(data, Protocol(validation_fraction=0))
    assert {part: set(names[chosen]) for part, chosen in rows.items()} == {
        "train": {"train"},
        "validation": {"val"},
        "test": {"test"},
    }
    require_parts([data], [rows], Protocol(validation_fraction=0))
    joined = assign(data, Protocol(train=["train", "val"]))
    assert set(names[joined["train"]]) == {"train", "val"}


def test_parts_without_a_test_part_are_not_guessed():
    data = source(60, 12, part=["train", "val"] * 30)
    with pytest.raises(DataError, match=r"no part test or testing .*\(train, val\); set protocol.test .* \(0 to 4\)"):
        assign(data, Protocol())
    rows = assign(data, Protocol(test="val"))
    assert (len(rows["test"]), len(rows["train"]) + len(rows["validation"])) == (30, 30)
    assert len(assign(data, Protocol(test=0))["test"]) > 0


def test_rows_of_no_part_are_unused():
    names = np.array(["train", "train", "test", None] * 15, dtype=object)
    data = source(60, 12, part=names.tolist(), subject=[f"{k % 4} {k % 20}" for k in range(60)])
    rows = assign(data, Protocol(test="test"))
    assert sum(len(part) for part in rows.values()) == 45
    unused = divide([data], [Protocol(test="test")])[0].unused
    assert {reason: rows.tolist() for reason, rows in unused.items()} == {UNUSED_PART: list(range(3, 60, 4))}
    assert not divide([data], [Protocol(test=0)])[0].unused


def test_a_leak_names_the_groups():
    data = source(60, 12, part=np.where(np.arange(60) < 30, "train", "test").tolist())
    with pytest.raises(DataError, match=r"12 groups lie in two parts, e\.g\. in train and test: s00, s01") as caught:
        assign(data, Protocol(test="test"))
    assert "\n" not in str(caught.value)
    rows = assign(data, Protocol(test="test", group="image"))
    assert len(rows["test"]) == 30


def test_errors_of_parts():
    data = source(60, 12, part=["train", "test"] * 30)
    with pytest.raises(DataError, match="no row has part=trial; "):
        assign(data, Protocol(test="test", train=["trial"]))
    with pytest.raises(ConfigError, match="overlap"):
        assign(data, Protocol(test="test", train=["train", "test"]))
    with pytest.raises(DataError, match=r"protocol\.test=test needs a column part"):
        assign(source(), Protocol(test="test"))
    with pytest.raises(DataError, match="12 groups cannot fill 20 folds"):
        assign(source(), Protocol(test=0, folds=20))
    with pytest.raises(DataError, match="no column camera_id to split by"):
        assign(source(), Protocol(group="camera_id"))
    parts = assign(data, Protocol(test="tset"))
    with pytest.raises(DataError, match=r"the test part is empty with protocol.test=tset .*'test', 'train'"):
        require_parts([data], [parts], Protocol(test="tset"))


def test_a_source_may_only_train():
    official = source(60, 12, part=["train", "test"] * 30)
    extra = source(60, 12, part=["train"] * 60)
    parts = [assign(data, Protocol(test="test")) for data in (official, extra)]
    assert [len(rows["test"]) for rows in parts] == [30, 0]
    require_parts([official, extra], parts, Protocol(test="test"))


def test_validation_may_be_left_out():
    protocol = Protocol(test=0, validation_fraction=0, selection="last")
    rows = assign(source(), protocol)
    assert len(rows["validation"]) == 0
    require_parts([source()], [rows], protocol)
    with pytest.raises(ConfigError, match="selection=best_val needs a validation part"):
        require_parts([source()], [rows], Protocol(test=0, validation_fraction=0))


def test_every_nth_row_trains():
    full, thin = (assign(source(), Protocol(test=0, every=every)) for every in (1, 3))
    assert thin["train"].tolist() == full["train"][::3].tolist()
    assert thin["test"].tolist() == full["test"].tolist()
    assert thin["validation"].tolist() == full["validation"].tolist()


def test_everything_may_be_tested():
    rows = assign(source(4, 1), Protocol(test="all"))
    assert (len(rows["train"]), len(rows["test"])) == (0, 4)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"test": 5}, "folds are 0 to 4"),
        ({"folds": 1}, "at least 2 folds"),
        ({"folds": None}, "protocol.folds=None: give a whole number"),
        ({"every": 2.5}, "protocol.every=2.5: give a whole number"),
        ({"split_seed": [1]}, r"protocol.split_seed=\[1\]: give a whole number"),
        ({"validation_fraction": "x"}, "protocol.validation_fraction=x: give a number"),
        ({"group": 3}, "protocol.group=3: give a name"),
        ({"keep": [1]}, r"protocol.keep=\[1\]: give a mapping"),
        ({"subsets": "x"}, "protocol.subsets=x: give a mapping"),
        ({"headline": True}, "protocol.headline=True: give a mapping"),
        ({"missing_faces": None}, "protocol.missing_faces=None: known: drop"),
        ({"validation_fraction": 1.0}, r"must lie in \[0, 1\)"),
        ({"every": 0}, "must be at least 1"),
        ({"selection": "best"}, "selection=best: did you mean best_val"),
    ],
)
def test_bad_protocols(arguments, message):
    with pytest.raises(ConfigError, match=message):
        Protocol(**arguments)


def test_spread_keeps_every_source_and_order():
    rows = [np.arange(0, 300, 3), np.arange(10)]
    assert spread(rows, None)[0] is rows[0]
    some = spread(rows, 11)
    assert sum(len(part) for part in some) == 11
    assert len(some[1]) == 1
    assert all(np.isin(a, b).all() and (np.diff(a) > 0).all() for a, b in zip(some, rows, strict=True))
    assert [len(part) for part in spread(rows, 1)] == [1, 0]
    assert spread(rows, 1000)[1].tolist() == list(range(10))


# --------------------------------------------------------------------------------- lists of parts, kept rows


def test_test_parts_may_be_a_list():
    names = np.array(["train", "Common", "challenge", "private"] * 15, dtype=object)
    data = source(60, 60, part=names, subject=[f"p{k}" for k in range(60)])
    protocol = Protocol(test=["common", "challenge"], train=["train"])
    assert set(names[assign(data, protocol)["test"]]) == {"Common", "challenge"}
    assert len(assign(data, protocol)["test"]) == 30, "one set, not two"
    assert set(names[assign(data, Protocol(test="challenge"))["test"]]) == {"challenge"}
    unused = divide([data], [protocol])[0].unused
    assert set(names[unused[UNUSED_PART]]) == {"private"}
    assert protocol.test_name == "common+challenge"


def test_half_of_a_list_is_no_test_part():
    data = source(60, 60, part=["train", "common"] * 30, subject=[f"p{k}" for k in range(60)])
    with pytest.raises(DataError, match=r"sample: no row has part=challenge; known: common, train"):
        assign(data, Protocol(test=["common", "challenge"]))
    with pytest.raises(ConfigError, match=r"protocol.test=\[\]: name at least one part"):
        Protocol(test=[])


def test_a_source_that_only_trains_leaves_its_test_part_out():
    names = np.array(["train", "test"] * 30, dtype=object)
    data = source(60, 12, part=names)
    rows = assign(data, Protocol(test="test", train_only=True))
    assert len(rows["test"]) == 0
    assert set(names[np.concatenate([rows["train"], rows["validation"]])]) == {"train"}
    for test in ("P3", 2, "all", None):
        rows = assign(source(), Protocol(test=test, train_only=True))
        assert len(rows["test"]) == 0
        assert len(rows["train"]) + len(rows["validation"]) == 60, "without official parts everything trains"


def test_kept_rows_are_those_with_the_values_and_others_are_counted():
    data = source(60, 12)
    kinds, valid = data.table.strings("expression")
    protocol = Protocol(test=0, keep={"expression": ["neutral", "happiness"]})
    division = divide([data], [protocol])[0]
    used = np.concatenate(list(division.rows.values()))
    assert sorted(used) == np.flatnonzero(valid & np.isin(kinds, ["neutral", "happiness"])).tolist()
    (reason, left) = next(iter(division.unused.items()))
    assert reason == "expression is none of neutral, happiness (protocol.keep)"
    assert len(left) == 60 - len(used)
    assert set(assign(data, Protocol(test=0, keep={"camera": [1]}))["test"] % 2) == {1}, "numbers compare as numbers"


def test_kept_rows_need_a_column_and_a_value_that_exists():
    with pytest.raises(DataError, match=r"protocol.keep: no column expresion; did you mean expression"):
        assign(source(), Protocol(test=0, keep={"expresion": ["neutral"]}))
    with pytest.raises(DataError, match=r"protocol.keep.expression: no row has neutrl; did you mean neutral"):
        assign(source(), Protocol(test=0, keep={"expression": ["neutrl"]}))
    with pytest.raises(ConfigError, match=r"protocol.keep.expression=neutral: give the list of values"):
        Protocol(keep={"expression": "neutral"})


def test_a_class_whose_rows_are_left_out_is_no_class_of_the_source():
    data = source()
    kept = keep_classes(data, Protocol(keep={"expression": ["neutral", "sadness"]}))
    assert kept.table.expressions == ("neutral", "sadness")
    assert keep_classes(data, Protocol()) is data


def test_a_mapped_table_keeps_its_classes_in_another_process(tmp_path):
    data = source()
    mapped = Source("sample", data.table.save(tmp_path / "table.arrow"), data.images)
    kept = keep_classes(mapped, Protocol(keep={"expression": ["neutral", "sadness"]})).table
    received = pickle.loads(pickle.dumps(kept))
    assert received.expressions == ("neutral", "sadness")
    assert received.path == mapped.table.path, "mapped there, too"


# ------------------------------------------------------------------------------------------- missing faces


def faces(count=60):
    """Every fifth face was not found; subjects and parts are independent of that."""
    return source(
        count,
        12,
        face=[("found", "centre", "found", "neighbour", "found")[k % 5] for k in range(count)],
        part=["train" if k % 12 < 8 else "test" for k in range(count)],
    )


def missing(rows):
    return np.isin(rows % 5, (1, 3))


def test_missing_faces_fall_back_to_the_crop_that_preparation_made():
    with_face, without = (assign(data, Protocol()) for data in (faces(), faces()))
    plain = source(60, 12, part=["train" if k % 12 < 8 else "test" for k in range(60)])
    for part, rows in assign(plain, Protocol()).items():
        assert with_face[part].tolist() == without[part].tolist() == rows.tolist()
    division = divide([faces()], [Protocol()])[0]
    for part, rows in division.rows.items():
        assert division.faceless[part].tolist() == rows[missing(rows)].tolist()
    assert sum(len(rows) for rows in division.faceless.values()) == 24


def test_missing_faces_can_be_dropped_from_every_part():
    division = divide([faces()], [Protocol(missing_faces="drop")])[0]
    for rows in division.rows.values():
        assert len(rows)
        assert not missing(rows).any()
    assert len(division.unused["no face found (protocol.missing_faces=drop)"]) == 24
    assert sum(len(rows) for rows in division.faceless.values()) == 24, "still counted by part"


def test_missing_faces_as_negatives_are_tested_and_neither_train_nor_select():
    division = divide([faces()], [Protocol(missing_faces="negative")])[0]
    assert not missing(division.rows["train"]).any()
    assert not missing(division.rows["validation"]).any()
    everything = assign(faces(), Protocol())["test"]
    assert division.rows["test"].tolist() == everything.tolist()
    with pytest.raises(ConfigError, match=r"protocol\.missing_faces=ignore"):
        Protocol(missing_faces="ignore")


def test_a_table_that_was_not_prepared_misses_no_face():
    division = divide([source()], [Protocol(test=0, missing_faces="drop")])[0]
    assert not division.unused
    assert sum(len(rows) for rows in division.rows.values()) == 60


# -------------------------------------------------------------------------------- image-wise hold-out


def images(count=400, **options):
    """Photographs of nobody known: three classes of 10, 30 and 60 per cent, twins that are near-duplicates."""
    kinds = np.array(["fear"] * 1 + ["sadness"] * 3 + ["happiness"] * 6, dtype=object)[np.arange(count) // 2 % 10]
    table = FaceTable.from_columns(
        {
            "image": [f"{k:04d}.jpg" for k in range(count)],
            "expression": kinds.tolist(),
            "part": ["train" if k < count * 3 // 4 else "test" for k in range(count)],
            "near_duplicates": [f"{k // 2}" for k in range(count)],
        },
        metadata={"dataset": "photographs"},
    )
    return Source("photographs", table, samples.DrawnImages(), group="image", **options)


def test_held_out_images_are_spread_over_classes_and_twins_stay_together():
    data = images(stratify="expression", together="near_duplicates")
    for seed in range(3):
        division = divide([data], [Protocol(validation_fraction=0.2, split_seed=seed)])[0]
        held = division.rows["validation"]
        pairs = np.bincount(held // 2, minlength=200)
        assert set(pairs.tolist()) <= {0, 2}, "both twins or none"
        kinds = data.table.strings("expression", held)[0]
        shares = {name: int((kinds == name).sum()) for name in ("fear", "sadness", "happiness")}
        assert shares == {"fear": 6, "sadness": 18, "happiness": 36}, "a fifth of each class of 300 images"
    assert division.notes == (
        "validation is split by image, stratified by expression, near-duplicates kept together: one person may be in "
        "training and in validation",
    )


def test_without_strata_and_twins_images_are_held_out_one_by_one():
    division = divide([images()], [Protocol(validation_fraction=0.2)])[0]
    assert 1 in np.bincount(division.rows["validation"] // 2)
    assert division.notes == ("validation is split by image: one person may be in training and in validation",)


def test_near_duplicates_that_nobody_looked_for_are_not_claimed():
    table = FaceTable.from_columns({"image": [f"{k}.jpg" for k in range(40)]})
    data = Source("photographs", table, samples.DrawnImages(), group="image", together="near_duplicates")
    assert "near-duplicates not looked for" in divide([data], [Protocol()])[0].notes[0]


def test_joined_groups_follow_names_and_chains():
    table = FaceTable.from_columns(
        {"image": list("abcdef"), "twin": ["1", "1", None, "2", "2", None], "also": ["x"] * 6},
    )
    data = Source("s", table, samples.DrawnImages(), group="image", together="twin")
    codes, names = group_codes(table, "image")
    units, called = together(data, codes, names)
    assert [str(called[unit]) for unit in units] == ["a", "a", "c", "d", "d", "f"]
    moved = np.array([4, 2, 0, 5, 1, 3])
    other = Source("s", table.take(moved), samples.DrawnImages(), group="image", together="twin")
    units, called = together(other, *group_codes(other.table, "image"))
    assert [str(called[unit]) for unit in units] == ["d", "c", "a", "f", "a", "d"]


# -------------------------------------------------------------------------------------------- selection rules


def official(*parts):
    return source(60, 12, part=[parts[k % 12 % len(parts)] for k in range(60)])


def test_a_refit_trains_on_what_selected():
    data = official("train", "train", "test")
    chosen, final = (assign(data, Protocol(selection=rule)) for rule in ("best_val", "refit"))
    assert len(chosen["validation"]) > 0
    assert len(final["validation"]) == 0
    assert final["train"].tolist() == sorted([*chosen["train"], *chosen["validation"]])
    assert final["test"].tolist() == chosen["test"].tolist()
    require_parts([data], [final], Protocol(selection="refit"))
    data = official("train", "val", "test")
    protocol = Protocol(selection="refit", validation="val")
    assert len(assign(data, protocol)["train"]) == 40, "an official validation part, too"
    require_parts([data], [assign(data, protocol)], protocol)


def test_best_on_test_selects_on_the_test_part_and_holds_nothing_out():
    data = official("train", "val", "test")
    rows = assign(data, Protocol(selection="best_on_test"))
    assert rows["validation"].tolist() == rows["test"].tolist()
    assert len(rows["train"]) == 20, "the official validation part is not trained on"
    require_parts([data], [rows], Protocol(selection="best_on_test"))


# ----------------------------------------------------------------------------------------------- people


def person(name, people, parts=None, space="disfa"):
    columns = {"image": [f"{k}.jpg" for k in range(len(people))], "subject": list(people)}
    if parts is not None:
        columns["part"] = list(parts)
    table = FaceTable.from_columns(columns, metadata={"dataset": name, "people": space})
    return Source(name, table, samples.DrawnImages())


def test_a_person_who_trains_in_one_set_and_is_tested_in_another_is_a_leak():
    disfa = person("disfa", ["SN001", "SN002", "SN003", "SN004"], ["P1", "P1", "P2", "P3"])
    plus = person("disfaplus", ["SN001", "SN004", "SN003"])
    protocols = [Protocol(test="P3"), Protocol(train_only=True)]
    with pytest.raises(DataError, match=r"1 people of disfa lie in two parts.*in test of disfa.*SN004") as caught:
        divide([disfa, plus], protocols)
    assert "protocol.allow_leak=true" in str(caught.value)
    assert "\n" not in str(caught.value)
    elsewhere = person("other", ["SN001", "SN004", "SN003"], space="other")
    assert len(divide([disfa, elsewhere], protocols)) == 2, "the same names elsewhere are other people"
    allowed = [Protocol(test="P3", allow_leak=True), Protocol(train_only=True, allow_leak=True)]
    assert "SN004" in divide([disfa, plus], allowed)[0].leaks[0]


def test_sets_with_the_same_people_hold_out_the_same_people():
    people = [f"SN{k:03d}" for k in range(1, 28)]
    first = person("disfa", people)
    second = person("disfaplus", people[:9] * 2)
    for seed in range(5):
        protocol = Protocol(train_only=True, split_seed=seed)
        one, other = divide([first, second], [protocol, protocol])
        trained, held = (
            [
                set(data.table.strings("subject", rows[part])[0])
                for data, rows in zip((first, second), (one.rows, other.rows), strict=True)
            ]
            for part in ("train", "validation")
        )
        assert not (trained[0] | trained[1]) & (held[0] | held[1])
        assert len(held[0] | held[1]) == round(0.15 * 27)


def clips(name, videos, parts):
    columns = {"image": [f"{k}.jpg" for k in range(len(videos))], "video": list(videos), "part": list(parts)}
    metadata = {"dataset": "affwild2", "people": "affwild2", "identity": "video"}
    return Source(name, FaceTable.from_columns(columns, metadata=metadata), samples.DrawnImages(), "video")


def test_a_video_that_trains_in_one_track_and_is_tested_in_another_is_a_leak():
    units = clips("affwild2_au", ["1", "2", "3", "4"], ["train", "train", "train", "validation"])
    affect = clips("affwild2_va", ["1", "2", "5"], ["train", "validation", "validation"])
    protocol = Protocol(test="validation", train=["train"])
    for pair in ([units, affect], [affect, units]):
        message = r"1 videos of affwild2 lie in two parts.*: 2; .*protocol.group=video.*one source with all labels"
        with pytest.raises(DataError, match=message):
            divide(pair, [protocol, protocol])
    trained = people_of([units], [np.arange(3)])
    assert trained == {"affwild2": ["1", "2", "3"]}
    (sentence,) = known_people([affect], [np.array([1, 2])], trained)
    assert sentence == "the model was trained on 1 videos of affwild2 among these rows: 2"


def test_tracks_hold_out_the_same_videos():
    videos = [f"{k}" for k in range(20)]
    starts = {"affwild2_au": 0, "affwild2_va": 12}
    tracks = [clips(name, videos[k:], ["train"] * (20 - k)) for name, k in starts.items()]
    for seed in range(5):
        divisions = divide(tracks, [Protocol(train_only=True, split_seed=seed)] * 2)
        held, trained = (
            set().union(*(np.array(videos[k:])[d.rows[part]] for k, d in zip(starts.values(), divisions, strict=True)))
            for part in ("validation", "train")
        )
        assert held
        assert not held & trained


@pytest.mark.parametrize("group", ["image", "sequence"])
def test_groups_of_another_column_still_keep_people_apart(group):
    data = person("disfa", [f"SN{k // 8:03d}" for k in range(80)])
    table = data.table.with_columns({"sequence": [str(k // 2) for k in range(80)]})
    data = Source("disfa", table, data.images)
    with pytest.raises(DataError, match=r"people of disfa lie in two parts.*SN000.*protocol.group=subject"):
        divide([data], [Protocol(test=0, group=group)])
    [marked] = divide([data], [Protocol(test=0, group=group, allow_leak=True)])
    assert "SN000" in marked.leaks[0]
    [sound] = divide([data], [Protocol(test=0)])
    assert sound.leaks == ()


def test_groups_of_another_column_keep_those_apart_who_train_and_who_select():
    data = person("disfa", ["SN001", "SN002"] * 20 + ["SN003"] * 9, ["train"] * 40 + ["test"] * 9)
    with pytest.raises(DataError, match=r"2 people of disfa lie in two parts, e\.g\. in train .*and validation"):
        divide([data], [Protocol(group="image")])
    for rule in ("refit", "best_on_test"):
        [division] = divide([data], [Protocol(group="image", selection=rule)])
        assert division.leaks == ()


def test_two_deliveries_of_one_set_without_identities_are_told():
    def photographs(name, dataset="affectnet", **columns):
        columns = {"image": [f"{name}/{k}.jpg" for k in range(20)], "part": ["train", "validation"] * 10, **columns}
        return Source(name, FaceTable.from_columns(columns, metadata={"dataset": dataset}), samples.DrawnImages())

    def notes(*sources):
        protocol = Protocol(test="validation", train=["train"])
        return [
            [note for note in division.notes if "again" in note]
            for division in divide(sources, [protocol] * len(sources))
        ]

    first, [said] = notes(photographs("affectnet"), photographs("affectnet_old"))
    assert first == []
    assert said.startswith("delivers affectnet again, as affectnet does, and neither says who is shown")
    known = photographs("other", subject=[str(k) for k in range(20)])
    assert notes(photographs("affectnet"), photographs("rafdb", "rafdb"), known) == [[], [], []]


def test_official_parts_that_share_a_group_may_be_let_pass_and_are_named():
    data = source(60, 12, part=np.where(np.arange(60) < 30, "train", "test").tolist())
    division = divide([data], [Protocol(test="test", allow_leak=True)])[0]
    assert "s00, s01" in division.leaks[0]
    assert "12 groups lie in two parts" in division.leaks[0]


def test_people_that_a_model_knows_are_named():
    data = person("disfaplus", ["SN001", "SN009"])
    everyone = [np.arange(2)]
    assert people_of([data], everyone) == {"disfa": ["SN001", "SN009"]}
    assert known_people([data], everyone, {"bp4d": ["SN001"]}) == []
    (sentence,) = known_people([data], everyone, {"disfa": ["SN002", "SN009"]})
    assert sentence == "the model was trained on 1 people of disfa among these rows: SN009"


def on_disk(folder, images, subjects=None, group="subject", **columns):
    """A user's table; each image is a file whose content tells it from those of other folders."""
    folder.mkdir(exist_ok=True)
    for image in images:
        (folder / image).write_bytes(f"{folder.name} {image}".encode())
    named = {} if subjects is None else {"subject": list(subjects)}
    table = FaceTable.from_columns({"image": list(images)} | named | columns, folder)
    return Source("table", table, samples.DrawnImages(), group)


def test_a_table_without_a_name_space_is_known_again_by_its_files_and_then_by_its_groups(tmp_path):
    images, people = [f"{k}.png" for k in range(12)], [f"{k % 4:02d}" for k in range(12)]
    data = on_disk(tmp_path / "mine", images, people)
    trained = groups_of([data], [np.array([0, 1, 4])], [Protocol()])  # persons 00 and 01, not every image of theirs
    assert set(trained) == {"image files", "subject of tables"}
    assert [len(hashes) for hashes in trained.values()] == [3, 2]
    assert "mine" not in str(trained)
    assert ".png" not in str(trained)

    def known(other, rows):
        return known_people([other], [np.array(rows)], trained)

    wider = on_disk(tmp_path / "mine", images, [str(int(p)) for p in people], valence=np.zeros(12, np.float32))
    assert known(data, [2, 3, 6]) == [], "other people of the same table"
    for same in (data, wider):
        (groups,) = known(same, [8, 9, 2])  # the same people on images that did not train
        assert "table: the model was trained on 2 values of subject among these rows: 0" in groups
        assert known(same, [0, 2])[1].endswith("1 image files among these rows: 0.png")
    anonymous = on_disk(tmp_path / "mine", images[:3])
    assert known(anonymous, [0, 2]) == ["table: the model was trained on 1 image files among these rows: 0.png"]
    assert known(on_disk(tmp_path / "ours", images, people), range(12)) == [], "it counts from 0, too"
    assert groups_of([person("disfa", ["SN001"])], [np.arange(1)], [Protocol()]) == {}, "people_of has these"
    assert "image files" not in groups_of([source()], [np.arange(60)], [Protocol()]), "drawn images are no files"


def test_people_of_two_training_tables_that_count_from_0_are_not_taken_for_each_other(tmp_path):
    first = on_disk(tmp_path / "first", [f"{k}.png" for k in range(8)], map(str, range(8)))
    own = on_disk(tmp_path / "own", [f"{k}.png" for k in range(12)], map(str, range(12)))
    trained = groups_of([first, own], [np.arange(8), np.arange(8, 12)], [Protocol(), Protocol()])
    assert len(trained["subject of tables"]) == 12
    assert known_people([own], [np.arange(8)], trained) == [], "people 0 to 7 of the other table are others"
    (people, files) = known_people([own], [np.arange(7, 10)], trained)
    assert "2 values of subject among these rows: 8, 9" in people
    assert "2 image files among these rows: 8.png, 9.png" in files


def test_others_on_a_photograph_that_showed_a_trained_person_are_not_known(tmp_path):
    faces = on_disk(tmp_path / "groups", ["a.png", "a.png", "b.png", "b.png"], ["0", "1", "2", "3"])
    trained = groups_of([faces], [np.array([0, 2])], [Protocol()])
    assert known_people([faces], [np.array([1, 3])], trained) == []
    (people, files) = known_people([faces], [np.array([1, 2])], trained)
    assert "1 values of subject among these rows: 2" in people
    assert "1 image files among these rows: b.png" in files


def test_of_a_large_training_a_sample_is_kept_that_is_the_same_wherever_it_is_met(tmp_path, monkeypatch):
    monkeypatch.setattr("affect.data.protocol.KNOWN", 8)
    monkeypatch.setattr("affect.data.protocol._CHUNK", 7)
    data = on_disk(tmp_path / "many", [f"{k:03d}.png" for k in range(100)], group="image")
    everything, half = (groups_of([data], [rows], [Protocol()]) for rows in (np.arange(100), np.arange(50)))
    assert list(everything) == ["image files"]
    assert len(everything["image files"]) == len(half["image files"]) == 8
    (said,) = known_people([data], [np.arange(100)], everything)
    assert "trained on 8 image files" in said
    assert known_people([data], [np.arange(50, 100)], half) == []


def test_drawn_people_are_those_of_the_generators_seed():
    from affect.data.faces import FaceDials
    from affect.data.layouts import faces

    def drawn(seed, subjects, count=60, group="subject"):
        return Source("faces", faces.read(FaceDials(subjects=subjects), seed, count), samples.DrawnImages(), group)

    first = drawn(0, 12)
    chosen = [np.flatnonzero(first.table.strings("subject")[0] == "subject03")]
    trained = groups_of([first], chosen, [Protocol()])
    assert {space: len(hashes) for space, hashes in trained.items()} == {"faces-0": 1}
    for same in (first, drawn(0, 12, 80), drawn(0, 100, 1000)):
        (said,) = known_people([same], [np.arange(len(same.table))], trained)
        assert "trained on 1 values of subject among these rows: subject" in said
    assert known_people([drawn(1, 12)], [np.arange(60)], trained) == [], "another seed draws other people"
    assert groups_of([first], chosen, [Protocol(group="image")]) == {}, "split by image, they are in all parts"


def test_parts_of_another_division_under_the_same_names_are_refused():
    data = person("disfa", ["SN001", "SN002", "SN003", "SN004"], ["P1", "P1", "P2", "P3"])
    classic = Source("disfa", data.table.with_metadata(division="classic"), data.images)
    with pytest.raises(DataError, match=r"division 'literature' into parts, .* has 'classic' .*folds=literature"):
        assign(classic, Protocol(name="disfa", test="P3", division="literature"))
    for fitting in (data, classic):
        assert len(assign(fitting, Protocol(test="P3", division="classic"))["test"]) == 1
