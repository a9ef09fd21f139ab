# SPDX-License-Identifier: Apache-2.0
"""Parts: whole groups, independent of the order of rows, official where they are named, and refused where they leak."""

from __future__ import annotations

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
    require_parts,
    split_groups,
    spread,
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
