# SPDX-License-Identifier: Apache-2.0
"""Tables say what the records say, in the terminal and in Markdown."""

from __future__ import annotations

import pytest
from rich.console import Console
from rich.table import Table

from affect.errors import DataError
from affect.report import comparison_table, markdown, markdown_table, results_table, subgroup_table
from tests.report.sample_records import ALIGNMENT, AU, record


def shown(table: Table) -> str:
    console = Console(width=160, record=True, file=open("/dev/null", "w"))  # noqa: SIM115, PTH123
    console.print(table)
    return console.export_text()


def rows(text: str) -> list[list[str]]:
    return [[cell.strip() for cell in line.strip("|").split("|")] for line in text.splitlines() if line.startswith("|")]


def test_results_table_holds_every_number():
    table = rows(markdown(results_table([*AU, *ALIGNMENT])))
    assert table[0] == ["task", "metric", "value", "95 % interval", "best constant", "n"]
    assert table[2] == ["au", "f1/AU1", "0.300 !", "[0.200, 0.410]", "0.450", "812"]
    assert table[3] == ["", "f1/AU12", "**0.800**", "[0.750, 0.850]", "0.600", "1,812"]
    assert table[4] == ["", "f1/AU45", "–", "–", "–", "0"]
    assert table[6] == ["landmarks", "nme", "**4.250**", "[4.000, 4.500]", "9.500", "100"]
    assert table[8] == ["", "skipped", "3", "–", "–", "100"]


def test_one_task_needs_no_task_column():
    assert rows(markdown_table(AU))[0] == ["metric", "value", "95 % interval", "best constant", "n"]


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
