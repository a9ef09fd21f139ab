# SPDX-License-Identifier: Apache-2.0
"""The line beside every number: what it names, and the warnings that nobody may overlook."""

from __future__ import annotations

import pytest

from affect.report import markdown_table, provenance, results_table, subgroup_table
from affect.report.provenance import ON_TEST

RESULTS = {
    "protocol": {"name": "300w", "test": ["common", "challenge"], "missing_faces": "fallback"},
    "selection": {"rule": "best_val", "epoch": 0},
    "data": {"parts": {"test": {"rows": 689, "without_face": 0}}},
    "preprocess": {"recipe": {"name": "aligned", "kind": "similarity"}},
}
RECORD = {"name": "nme", "task": "landmarks", "value": 3.2, "n": 689, "higher_is_better": False, "subgroup": None}


def test_everything_that_decides_what_a_number_means_is_named():
    line = provenance(RESULTS)
    assert line == "protocol 300w, test common+challenge · weights of best_val (epoch 1) · crop aligned"
    assert "\n" not in line


@pytest.mark.parametrize("rule", ["fallback", "drop", "negative"])
def test_missing_faces_are_counted_with_their_rule(rule):
    data = {"parts": {"test": {"rows": 689, "without_face": 1234}}}
    line = provenance({**RESULTS, "data": data, "protocol": {"name": "x", "missing_faces": rule}})
    assert f"no face found: 1,234, {rule}" in line


def test_weights_that_the_test_part_selected_and_leaks_are_marked():
    line = provenance(
        {**RESULTS, "selection": {"rule": "best_on_test", "epoch": 2}, "data": {"leaks": ["SN001 twice"]}}
    )
    assert line.endswith(f"{ON_TEST} · LEAK: SN001 twice")
    assert ON_TEST not in provenance(RESULTS)


def test_a_results_file_of_an_earlier_version_has_a_line_too():
    assert provenance({"protocol": {"test": 2}}, "test") == "protocol default, test fold 2 · crop none"
    assert provenance({}, "all") == "protocol default, all rows · crop none"


def test_tables_carry_the_line():
    for table in (results_table([RECORD], note="from here"), subgroup_table([RECORD], note="from here")):
        assert table.caption.plain.startswith("from here")
    text = markdown_table([RECORD], note="from here")
    assert text.rstrip().splitlines()[-1] == "from here"
