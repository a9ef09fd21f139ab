# SPDX-License-Identifier: Apache-2.0
"""Sums of numbers of several tasks: the arithmetic, each term over its own rows, and intervals of the sum."""

from __future__ import annotations

import numpy as np
import pytest
import torch

from affect.errors import ConfigError
from affect.metrics import CCC, F1, ICC, MAE, Answers, evaluate, evaluate_sums

RANDOM = np.random.default_rng(0)
ROWS, GROUPS = 240, 12
GROUP = np.array([f"v{k % GROUPS}" for k in range(ROWS)])


def answers(metric, outputs, values, target, mask):
    metric.bind(outputs)
    return Answers([metric], *(torch.as_tensor(array) for array in (values, target, mask)))


@pytest.fixture
def tasks():
    """Valence and arousal in the first two thirds of the rows, action units in the last two thirds."""
    target = RANDOM.uniform(-1, 1, (ROWS, 2))
    emotion = answers(
        CCC(),
        ["valence", "arousal"],
        target + RANDOM.normal(0, 0.4, (ROWS, 2)),
        target,
        np.repeat(np.arange(ROWS)[:, None] < 160, 2, 1),
    )
    labels = (RANDOM.random((ROWS, 3)) < 0.4).astype(float)
    units = answers(
        F1(),
        ["AU1", "AU2", "AU4"],
        np.clip(labels * 0.5 + RANDOM.random((ROWS, 3)) * 0.6, 0, 1),
        labels,
        np.repeat(np.arange(ROWS)[:, None] >= 80, 3, 1),
    )
    return {"va": emotion, "au": units}


def single(task, name, **options):
    found = evaluate(task.metrics, task.values, task.target, task.mask, GROUP, **options)
    return next(record for record in found if record["name"] == name)


def test_a_sum_is_the_sum_of_its_terms_each_over_its_own_rows(tasks):
    record = evaluate_sums({"P": [("va", "ccc/mean"), ("au", "f1/mean")]}, tasks, GROUP, 200)[0]
    terms = [single(tasks["va"], "ccc/mean"), single(tasks["au"], "f1/mean")]
    assert record["value"] == pytest.approx(sum(term["value"] for term in terms), abs=1e-12)
    assert record["constant"] == pytest.approx(sum(term["constant"] for term in terms), abs=1e-12)
    assert [term["n"] for term in terms] == [160, 160]
    assert record["n"] == ROWS, "rows that are labelled for a term"
    assert record["groups"] == GROUPS
    assert record["terms"] == ["va/ccc/mean", "au/f1/mean"]
    assert record["low"] < record["value"] < record["high"]


def test_the_interval_of_one_term_is_that_of_its_number(tasks):
    record = evaluate_sums({"F1": [("au", "f1/mean")]}, tasks, GROUP, 300, seed=3)[0]
    alone = single(tasks["au"], "f1/mean", resamples=300, seed=3)
    for key in ("value", "low", "high", "constant", "n", "groups", "higher_is_better", "reason"):
        assert record[key] == alone[key], key


def test_terms_are_resampled_together(tasks):
    """A number and its mirror image: what one gains the other loses, so their sum does not vary."""
    va = tasks["va"]
    one, other = (answers(ICC(), ["valence", "arousal"], sign * va.values, va.target, va.mask) for sign in (1, -1))
    record = evaluate_sums({"zero": [("a", "icc/mean"), ("b", "icc/mean")]}, {"a": one, "b": other}, GROUP, 200)[0]
    spread = single(one, "icc/mean", resamples=200)
    assert spread["high"] - spread["low"] > 0.03
    assert (record["low"], record["high"]) == pytest.approx((0, 0), abs=1e-9)


@pytest.mark.parametrize(
    ("groups", "resamples", "reason"),
    [(None, 100, "no groups"), (GROUP, 0, "no resamples"), (np.array(["a"] * ROWS), 100, "only one group")],
)
def test_no_interval_has_a_reason(tasks, groups, resamples, reason):
    record = evaluate_sums({"F1": [("au", "f1/mean")]}, tasks, groups, resamples)[0]
    assert record["low"] is None
    assert record["reason"] == reason


def test_a_sum_without_labels_does_not_exist(tasks):
    empty = tasks["au"]._replace(mask=torch.zeros(ROWS, 3, dtype=torch.bool))
    record = evaluate_sums({"F1": [("au", "f1/mean")]}, {"au": empty}, GROUP, 50)[0]
    assert (record["value"], record["low"], record["n"]) == (None, None, 0)


def test_sums_that_mean_nothing_are_refused(tasks):
    error = answers(MAE(), ["valence", "arousal"], *tasks["va"][1:])
    both = {**tasks, "error": error}
    with pytest.raises(ConfigError, match="more is better for one term and less for another"):
        evaluate_sums({"P": [("va", "ccc/mean"), ("error", "mae/mean")]}, both, GROUP)
    with pytest.raises(ConfigError, match="headline P: task va has no number ccc/joy"):
        evaluate_sums({"P": [("va", "ccc/joy")]}, tasks, GROUP)


def test_subsets_may_overlap_and_are_evaluated_on_their_own_rows(tasks):
    au = tasks["au"]
    first, even = np.arange(ROWS) < 150, np.arange(ROWS) % 2 == 0
    mask, unlabelled = au.mask.clone(), np.arange(ROWS) >= ROWS - 20  # faces of another set, say
    mask[unlabelled] = False
    subsets = {"first": first, "even": even, "nobody": np.zeros(ROWS, bool), "unlabelled": unlabelled}
    found = evaluate(au.metrics, au.values, au.target, mask, GROUP, resamples=0, subsets=subsets)
    assert {record["subgroup"] for record in found} == {None, "first", "even"}
    for name in ("first", "even"):
        rows = np.flatnonzero(subsets[name])
        alone = evaluate(au.metrics, au.values[rows], au.target[rows], mask[rows], GROUP[rows], resamples=0)
        mine = [{**record, "subgroup": None} for record in found if record["subgroup"] == name]
        assert mine == alone
