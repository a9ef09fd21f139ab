# SPDX-License-Identifier: Apache-2.0
"""Tables say what the records say, in the terminal and in Markdown."""

from __future__ import annotations

import pytest
from rich.console import Console
from rich.table import Table

from affect.errors import DataError
from affect.report import (
    comparison_table,
    markdown,
    markdown_table,
    order_table,
    reference_table,
    results_table,
    subgroup_table,
    subgroup_tables,
)
from tests.report.sample_records import ALIGNMENT, AU, record


def shown(table: Table, width: int = 160) -> str:
    console = Console(width=width, record=True, file=open("/dev/null", "w"))  # noqa: SIM115, PTH123
    console.print(table)
    return console.export_text()


def rows(text: str) -> list[list[str]]:
    return [[cell.strip() for cell in line.strip("|").split("|")] for line in text.splitlines() if line.startswith("|")]


def test_results_table_holds_every_number():
    table = rows(markdown(results_table([*AU, *ALIGNMENT])))
    assert table[0] == ["metric", "value", "95 % interval", "constant", "n"]
    assert table[2] == ["**au**", "", "", "", ""]
    assert table[3] == ["f1/AU1", "0.300 !", "[0.200, 0.410]", "0.450", "812"]
    assert table[4] == ["f1/AU12", "**0.800**", "[0.750, 0.850]", "0.600", "1,812"]
    assert table[5] == ["f1/AU45", "–", "–", "–", "0"]
    assert table[7] == ["**landmarks**", "", "", "", ""]
    assert table[8] == ["nme", "**4.250**", "[4.000, 4.500]", "9.500", "100"]
    assert table[10] == ["skipped", "3", "–", "–", "100"]


def test_one_task_needs_no_heading_of_its_own():
    assert rows(markdown_table(AU))[2][0] == "f1/AU1"


def test_groups_stand_beside_n_and_too_few_give_no_interval():
    few = [record("f1/mean", 0.5, n=1200, groups=3, reason="only 3 groups")]
    table = rows(markdown_table(few))
    assert table[0][-2:] == ["n", "groups"]
    assert table[2][-2:] == ["1,200", "3"]
    assert table[2][2] == "–"
    assert "no interval: only 3 groups" in markdown_table(few)
    by_group = rows(markdown(subgroup_table([*few, record("f1/mean", 0.4, subgroup="g=1", n=9, groups=2)])))
    assert by_group[0] == ["subgroup", "n", "groups", "f1/mean"]
    assert by_group[3] == ["g=1", "9", "2", "0.400"]


WIDE = {"constant": -0.125, "n": 16_000, "groups": 1_000}


def test_a_terminal_of_80_columns_cuts_and_wraps_nothing():
    records = [
        record("mean_class_accuracy", -0.3, -0.127, 1.0, task="valence_arousal", **WIDE),
        record("accuracy", 0.8, 0.7, 0.9, task="expression", **WIDE),
    ]
    lines = shown(results_table(records), width=80).splitlines()
    [line] = [line for line in lines if "mean_class_accuracy" in line]
    assert line.split() == ["mean_class_accuracy", "−0.300", "!", "[−0.127,", "1.000]", "−0.125", "16,000", "1,000"]
    assert "…" not in "".join(lines)
    named = [record("NME of 98 points = landmarks_98/nme", -0.3, -0.127, 1.0, task="landmarks_98", **WIDE)]
    text = shown(results_table(named), width=80)
    assert "…" not in text, "a long name wraps; numbers do not"
    assert "[−0.127, 1.000]" in text
    assert "landmarks_98/nme" in text
    records += [record("mean_class_accuracy", 0.8, 0.7, 0.9, task=task) for task in ("au", "expression")]
    arms = {"initialised": records, "from scratch": records}
    text = shown(comparison_table(arms), width=80)
    assert "…" not in text
    assert text.count("[−0.127, 1.000]") == 2


def test_subgroups_have_one_narrow_table_per_task():
    names = ["accuracy", "mean_class_accuracy", "f1/macro", "kappa", "cross_entropy", "f1/happiness"]
    records = [
        record(name, 0.5, subgroup=group, task="expression", higher_is_better=name != "cross_entropy", **WIDE)
        for group in (None, "subject=12", "subject=13")
        for name in names
    ]
    records += [record("nme", 4.0, subgroup=g, task="landmarks", higher_is_better=False) for g in (None, "subject=12")]
    expression, landmarks = subgroup_tables(records)
    assert rows(markdown(expression))[0][3:] == ["accuracy", "mean class accuracy", "f1/macro", "kappa"]
    assert rows(markdown(landmarks))[0] == ["subgroup", "n", "nme"]
    text = shown(expression, width=80)
    assert "expression by subgroup" in text
    assert "…" not in text
    for word in ("subject=12", "16,000", "1,000", "class", "accuracy"):
        assert word in text


def test_notes_explain_marks_and_missing_intervals():
    assert "! not better than the best constant predictor" in markdown_table(AU)
    assert "not better" not in markdown_table(AU[1:2])
    assert "no interval: only one group" in markdown_table(ALIGNMENT)


def test_terminal_shows_the_same_cells_and_no_markup_is_read():
    strange = [record("accuracy[bold]", 0.5, subgroup=None)]
    text = shown(results_table([*AU, *strange], title="Part [red]test"))
    assert "Part [red]test" in text
    assert "accuracy[bold]" in text
    assert "[0.200, 0.410]" in text


def test_subgroup_table_has_groups_metrics_and_the_largest_gap():
    groups = {"sex=female": (0.50, 40), "sex=male": (0.62, 50), "age=60+": (None, 0)}
    more = [record("f1/mean", value, subgroup=name, n=n, constant=0.1) for name, (value, n) in groups.items()]
    table = rows(markdown(subgroup_table([*AU, *more])))
    assert table[0] == ["subgroup", "n", "f1/mean"]
    # Better than the constant, but its interval is not: no bold value.
    assert table[2] == ["**all**", "1,812", "0.550"]
    assert table[3:6] == [["sex=female", "40", "0.500"], ["sex=male", "50", "0.620"], ["age=60+", "0", "–"]]
    assert table[6] == ["largest gap", "", "0.120"]


def test_subgroup_table_by_name_and_unknown_name():
    table = rows(markdown(subgroup_table([*AU, record("f1/AU1", 0.2, subgroup="g=1")], names=["f1/AU1"])))
    assert table[0][2] == "f1/AU1"
    assert table[3] == ["g=1", "100", "0.200"]
    with pytest.raises(DataError, match=r"no record holds 'f1/AU99'"):
        subgroup_table(AU, names=["f1/AU99"])


def test_comparison_marks_the_best_by_direction_and_ends_with_the_constant():
    arms = {
        "scratch": [
            record("f1/mean", 0.5, 0.4, 0.6, constant=0.3),
            record("nme", 5.0, constant=9.0, higher_is_better=False),
        ],
        "tuned": [record("f1/mean", 0.7, constant=0.3), record("nme", 6.0, constant=9.0, higher_is_better=False)],
        "absent": [],
    }
    table = rows(markdown(comparison_table(arms, "Ladder")))
    assert table[0] == ["arm", "f1/mean", "nme"]
    assert table[2] == ["scratch", "0.500 [0.400, 0.600]", "**5.000**"]
    assert table[3] == ["tuned", "**0.700**", "6.000"]
    assert table[4] == ["absent", "–", "–"]
    assert table[5] == ["best constant", "0.300", "9.000"]


def test_comparison_of_one_arm_marks_nothing_and_equal_arms_are_both_best():
    one = markdown(comparison_table({"a": [record("f1", 0.5)]}))
    assert "**" not in one
    two = markdown(comparison_table({"a": [record("f1", 0.5)], "b": [record("f1", 0.50001)]}))
    assert two.count("**0.500**") == 2


def test_different_constants_are_both_shown():
    table = rows(
        markdown(comparison_table({"a": [record("f1", 0.5, constant=0.1)], "b": [record("f1", 0.5, constant=0.2)]}))
    )
    assert table[-1] == ["best constant", "0.100 / 0.200"]


@pytest.mark.parametrize(
    ("table", "note"),
    [
        (results_table([]), "no results"),
        (comparison_table({}), "nothing to compare"),
        (subgroup_table([]), "no subgroups"),
        (subgroup_table(AU), "no subgroups"),
    ],
)
def test_empty_tables_say_so(table, note):
    assert note in markdown(table)
    assert note in shown(table)


def test_markdown_escapes_what_would_break_a_row():
    text = markdown_table([record("f1/a|b", 0.5)])
    assert "f1/a\\|b" in text


def test_negative_zero_and_minus_sign():
    table = rows(markdown_table([record("ccc/valence", -0.00001, -0.2, 0.1)]))
    assert table[2][1:3] == ["0.000", "[−0.200, 0.100]"]


def test_a_reference_stands_beside_the_run_as_what_it_is():
    reference = {
        "paper": "a paper", "table": 2, "metric": "au/f1", "values": {"AU1": 0.5, "AU9": 0.4, "mean": 0.45},
        "confidence": "recalled-medium", "status": "transfer", "note": "from memory",
    }  # fmt: skip
    records = [record("f1/AU1", 0.25), record("f1/mean", 0.125), record("f1/AU1", 0.9, task="other")]
    text = shown(reference_table(reference, records))
    for part in ("Reference: a paper, table 2", "recalled-medium", "status: transfer", "from memory"):
        assert part in text
    lines = [line.split() for line in text.splitlines() if line.strip().startswith("f1/")]
    assert lines == [["f1/AU1", "0.250", "0.500"], ["f1/AU9", "–", "0.400"], ["f1/mean", "0.125", "0.450"]]
    empty = shown(reference_table({**reference, "values": None, "confidence": "none"}, []))
    assert "no values" in empty
    assert "Reference: a paper, table 2" in empty


def test_the_most_probable_orders_are_listed_with_their_weights():
    found = {"orders": [{"weight": 0.75, "order": ["AU4", "AU1"]}], "entropy": 0.56, "uniform_entropy": 0.69}
    text = shown(order_table(found))
    assert ["0.750", "AU4", "AU1"] in [line.split() for line in text.splitlines()]
    assert "entropy of the mixture 0.56 of at most 0.69 nats" in text
    assert "the same" not in text
    both = [{"weight": 0.5, "order": order} for order in (["AU1", "AU4"], ["AU4", "AU1"])]
    text = shown(order_table({"orders": both, "entropy": 0.693, "uniform_entropy": 0.693}))
    assert "all orders weigh the same" in " ".join(text.split())


def test_a_reference_may_list_whole_numbers_of_a_task():
    reference = {"paper": "P", "table": 1, "metric": "expression", "values": {"accuracy": 0.8954}, "confidence": "none"}
    text = shown(reference_table(reference, [record("accuracy", 0.5, task="expression")]))
    lines = [line.split() for line in text.splitlines() if line.strip().startswith("accuracy")]
    assert lines == [["accuracy", "0.500", "0.895"]]
