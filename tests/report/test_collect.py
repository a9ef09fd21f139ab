# SPDX-License-Identifier: Apache-2.0
"""The tables of a sweep, against means and deviations that numpy gives."""

from __future__ import annotations

import csv
import io
import math

import numpy as np
import pytest

from affect.report import collect
from affect.report.collect import Comparison, Left, Row, ScoreTable, Spread

FOLDS = ["P1", "P2", "P3"]
AUS = ["AU1", "AU2", "AU4"]


def scores(seeds=(1, 2, 3, 4)):
    draw = np.random.default_rng(0)
    found = {}
    for seed in seeds:
        for fold in FOLDS:
            numbers = {f"f1/{au}": float(x) for au, x in zip(AUS, draw.random(3), strict=True)}
            found[seed, fold] = {"f1/mean": float(np.mean(list(numbers.values()))), "f1/micro": 0.25, **numbers}
    return found


def test_folds_then_classes_then_seeds():
    found = scores()
    means = {seed: collect.over_folds(found, seed, FOLDS, {"f1": AUS}) for seed in (1, 2, 3, 4)}
    cube = np.array([[[found[s, f][f"f1/{au}"] for au in AUS] for f in FOLDS] for s in (1, 2, 3, 4)])
    assert [means[s]["f1/AU2"] for s in means] == pytest.approx(cube.mean(1)[:, 1])
    each = cube.mean(1).mean(1)
    assert [means[s]["f1/mean"] for s in means] == pytest.approx(each)
    spread = collect.spread(numbers["f1/mean"] for numbers in means.values())
    assert spread == pytest.approx((each.mean(), each.std(ddof=1), 4))


def test_a_class_without_labels_in_a_fold_does_not_count_there_and_is_named():
    found = scores()
    for seed in (1, 2, 3, 4):
        found[seed, "P2"]["f1/AU4"] = math.nan
    means = collect.over_folds(found, 1, FOLDS, {"f1": AUS})
    au4 = (found[1, "P1"]["f1/AU4"] + found[1, "P3"]["f1/AU4"]) / 2
    assert means["f1/AU4"] == pytest.approx(au4)
    assert means["f1/mean"] == pytest.approx((means["f1/AU1"] + means["f1/AU2"] + au4) / 3)
    # Not the mean of the test parts' means, in which classes would weigh differently.
    assert means["f1/mean"] != pytest.approx(np.mean([found[1, f]["f1/mean"] for f in FOLDS]))
    assert collect.gaps(found, [1, 2], FOLDS, ["f1/AU1", "f1/AU4"]) == ["f1/AU4 has no value in test part P2"]


def test_spread_of_few_values():
    assert collect.spread([]) == pytest.approx((math.nan, math.nan, 0), nan_ok=True)
    assert collect.spread([0.5, math.nan]) == pytest.approx((0.5, math.nan, 1), nan_ok=True)


def test_seeds_without_all_folds_are_left_out_with_the_reason():
    found = scores((1, 2, 3))
    del found[2, "P3"]
    del found[3, "P1"], found[3, "P2"]
    reasons = {(2, "P3"): "killed"}
    whole, left = collect.complete_seeds(found, [1, 2, 3], FOLDS, "monet", reasons)
    assert whole == [1]
    assert left == [
        Left("monet", 2, "P3", "killed"),
        Left("monet", 3, "P1", "no such run"),
        Left("monet", 3, "P2", "no such run"),
    ]
    assert collect.left_text(left) == [
        "monet, seed 2 is left out: test part P3 is missing (killed)",
        "monet, seed 3 is left out: test part P1 is missing (no such run); test part P2 is missing (no such run)",
    ]


REFERENCE = {
    "paper": "arXiv 1", "table": 2, "metric": "au/f1", "confidence": "recalled-low", "values": {"AU1": 0.5, "mean": 0.6}
}  # fmt: skip


def tables(references=None):
    found = scores()
    means = {seed: collect.over_folds(found, seed, FOLDS, {"f1": AUS}) for seed in (1, 2, 3, 4)}
    pooled = {seed: {"f1/mean": 0.4 + seed / 100} for seed in means}
    higher = dict.fromkeys(["f1/mean", "f1/micro", *(f"f1/{au}" for au in AUS)], True) | {"loss": False}
    for numbers in means.values():
        numbers["loss"] = 1.0
    return collect.score_tables("bp4d", "au", {"a": (means, pooled), "b_1": (means, {})}, higher, references)


def test_one_table_per_quantity_with_the_pooled_score_and_the_reference_below():
    first, second = tables({"a": REFERENCE, "b_1": REFERENCE})
    assert (first.quantity, list(first.columns)) == ("f1", [*AUS, "mean", "micro", "pooled"])
    assert (second.quantity, list(second.columns), second.higher_is_better) == ("loss", ["value", "pooled"], False)
    assert [row.name for row in first.rows] == ["a", "b_1", "reference: arXiv 1, table 2 (recalled-low)"]
    assert first.rows[0].cells["pooled"] == pytest.approx((0.425, np.std([1, 2, 3, 4], ddof=1) / 100, 4))
    assert first.rows[0].cells["micro"] == pytest.approx((0.25, 0.0, 4))
    assert first.rows[2].cells == {
        "AU1": Spread(0.5, pytest.approx(math.nan, nan_ok=True), 0),
        "mean": first.rows[2].cells["mean"],
    }
    assert [row.name for row in second.rows] == ["a", "b_1"]  # the reference is of another metric


def test_a_reference_of_a_number_without_classes():
    reference = REFERENCE | {"metric": "expression", "values": {"accuracy": 0.9}}
    (table,) = collect.score_tables(
        "rafdb", "expression", {"a": ({1: {"accuracy": 0.8}}, {})}, {"accuracy": True}, {"a": reference}
    )
    assert table.rows[1].cells["value"].mean == 0.9


def test_markdown_says_what_the_numbers_are():
    text = collect.markdown(tables()[0], FOLDS)
    lines = text.splitlines()
    assert lines[0] == "| setting | n | AU1 | AU2 | AU4 | mean | micro | pooled |"
    assert lines[1].count("---") == 8
    cells = [cell.strip() for cell in lines[2].strip("|").split("|")]
    assert (cells[0], cells[1], cells[6], cells[7]) == ("a", "4", "0.250 ± 0.000", "0.425 ± 0.013")
    assert "mean over test parts P1, P2, P3, then over classes; mean ± standard deviation over seeds" in text
    assert "pooled" in text


def test_latex_compiles_special_characters_away():
    text = collect.latex(tables()[0], FOLDS)
    assert r"b\_1 & 4 &" in text
    assert r"0.425 $\pm$ 0.013 \\" in text
    assert text.count("&") == 3 * 7
    assert r"\begin{tabular}{lrrrrrrr}" in text


def test_csv_has_full_numbers():
    rows = list(csv.DictReader(io.StringIO(collect.summary_csv(tables({"a": REFERENCE})))))
    (row,) = [row for row in rows if (row["setting"], row["quantity"], row["column"]) == ("a", "f1", "pooled")]
    assert float(row["mean"]) == pytest.approx(0.425, abs=1e-15)
    assert (row["seeds"], row["reference"]) == ("4", "False")
    (row,) = [row for row in rows if row["reference"] == "True" and row["column"] == "mean"]
    assert (row["mean"], row["std"]) == ("0.6", "")


def comparison(low, high, better=True, reason=""):
    return Comparison("a", "b", "bp4d", "au", "f1/mean", 0.1, low, high, 3, 41, better, reason)


def test_a_difference_whose_interval_has_0_is_not_resolved():
    assert comparison(-0.1, 0.3).verdict == "not resolved"
    assert comparison(0.0, 0.3).verdict == "not resolved"
    assert comparison(0.01, 0.3).verdict == "a"
    assert comparison(-0.3, -0.1).verdict == "b"
    assert comparison(0.01, 0.3, better=False).verdict == "b"
    assert comparison(math.nan, math.nan, reason="other test rows").verdict == "other test rows"
    text = collect.comparisons_markdown([comparison(-0.1, 0.3), comparison(0.05, 0.15)])
    assert "| bp4d au f1/mean | a − b | 0.100 | [−0.100, 0.300] | 3 | 41 | not resolved |" in text
    assert collect.comparisons_markdown([]) == ""
    assert "not resolved" in collect.comparisons_csv([comparison(-0.1, 0.3)])


def test_figures_show_every_setting():
    from affect.report.figures.collect import class_figure, difference_figure

    table = tables({"a": REFERENCE})[0]
    axes = class_figure(table).axes[0]
    assert [label.get_text() for label in axes.get_xticklabels()] == [*AUS, "mean", "micro", "pooled"]
    assert len(axes.patches) == 2 * 6
    assert len(axes.get_legend().get_texts()) == 3
    figure = difference_figure([comparison(-0.1, 0.3), comparison(0.05, 0.15)])
    assert len(figure.axes[0].get_yticklabels()) == 2
    assert isinstance(table, ScoreTable)
    assert isinstance(table.rows[0], Row)
