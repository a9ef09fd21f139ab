# SPDX-License-Identifier: Apache-2.0
"""Records are read with their meaning: what does not exist, which direction is better, what stands for a whole task."""

from __future__ import annotations

import doctest
import math

import pytest

from affect.errors import DataError
from affect.report import records
from affect.report.records import overall, read_arms, read_score, read_scores, select_names, subgroup_name
from tests.report.sample_records import ALIGNMENT, AU, record


def test_docstrings_tell_the_truth():
    assert doctest.testmod(records).failed == 0


def test_null_and_nan_both_mean_that_a_number_does_not_exist():
    for missing in (None, math.nan):
        score = read_score(record("ccc/valence", missing, missing, missing, constant=missing, n=missing))
        assert math.isnan(score.value)
        assert not score.has_interval
        assert score.beats_constant is None
        assert score.n is None


@pytest.mark.parametrize(
    ("name", "metric", "output", "summary"),
    [
        ("accuracy", "accuracy", "", True),
        ("f1/AU12", "f1", "AU12", False),
        ("f1/mean", "f1", "mean", True),
        ("fr/10", "fr", "10", True),
        ("auc/7.5", "auc", "7.5", True),
        ("a/b/c", "a/b", "c", False),
    ],
)
def test_name_is_split_into_metric_and_output(name, metric, output, summary):
    score = read_score(record(name, 0.5))
    assert (score.metric, score.output, score.is_summary, score.name) == (metric, output, summary, name)


def test_direction_decides_what_beats_the_constant():
    better = {"value": 1.0, "constant": 2.0, "low": 0.9, "high": 1.1}
    assert read_score({"name": "rmse", "higher_is_better": False, **better}).beats_constant
    assert read_score({"name": "rmse", "higher_is_better": False, **better}).clearly_beats_constant
    assert read_score({"name": "f1", "higher_is_better": True, **better}).beats_constant is False
    # Better, but the interval reaches the constant.
    close = read_score(record("f1", 0.5, 0.4, 0.6, constant=0.45))
    assert close.beats_constant
    assert not close.clearly_beats_constant
    # Equal is not better.
    assert read_score(record("ccc", 0.0, constant=0.0)).beats_constant is False


def test_counts_are_no_summaries():
    assert [score.is_summary for score in read_scores(ALIGNMENT)] == [True, True, False]


@pytest.mark.parametrize(
    "bad", [{}, {"name": ""}, {"name": 3, "value": 1}, {"name": "f1"}, {"name": "f1", "value": "high"}]
)
def test_bad_record_is_named(bad):
    with pytest.raises(DataError, match=r"result record"):
        read_score(bad)


def test_subgroups_are_left_out_of_the_overall_scores():
    scores = read_scores([*AU, record("f1/mean", 0.1, subgroup="sex=female")])
    assert [score.name for score in overall(scores)] == [r["name"] for r in AU]
    assert subgroup_name(["a", 1]) == "a, 1"


def test_arms_with_a_number_twice_are_refused():
    with pytest.raises(DataError, match=r"arm 'fine-tuned' holds f1/mean twice"):
        read_arms({"fine-tuned": [AU[3], AU[3]]})
    # The same name in two tasks is two numbers.
    assert len(read_arms({"x": [AU[3], {**AU[3], "task": "other"}]})["x"]) == 2


def test_names_of_a_comparison():
    arms = read_arms({"a": AU, "b": [*AU, *ALIGNMENT]})
    assert select_names(arms, None) == [("au", "f1/mean"), ("landmarks", "nme"), ("landmarks", "fr/10")]
    assert select_names(arms, ["nme", "f1/AU1"]) == [("landmarks", "nme"), ("au", "f1/AU1")]
    assert select_names(read_arms({"a": AU[:2]}), None) == [("au", "f1/AU1"), ("au", "f1/AU12")]
    with pytest.raises(DataError, match=r"'f1/AU11'; did you mean f1/AU1"):
        select_names(arms, ["f1/AU11"])
