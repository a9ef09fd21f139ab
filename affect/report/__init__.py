# SPDX-License-Identifier: Apache-2.0
"""Result files and tables; the figures, which load matplotlib, are in ``affect.report.figures``."""

from affect.report.provenance import provenance
from affect.report.records import Record, Score, read_scores
from affect.report.results import code_patch, environment, patch_hash, read_json, to_json, write_json
from affect.report.tables import (
    comparison_table,
    markdown,
    markdown_table,
    order_table,
    reference_table,
    results_table,
    subgroup_table,
    subgroup_tables,
)

__all__ = [
    "Record",
    "Score",
    "code_patch",
    "comparison_table",
    "environment",
    "markdown",
    "markdown_table",
    "order_table",
    "patch_hash",
    "provenance",
    "read_json",
    "read_scores",
    "reference_table",
    "results_table",
    "subgroup_table",
    "subgroup_tables",
    "to_json",
    "write_json",
]
