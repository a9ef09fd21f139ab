# SPDX-License-Identifier: Apache-2.0
"""The table of a benchmark shows every number whole, however narrow the terminal."""

from __future__ import annotations

import io

import pytest
from rich.console import Console

from affect.commands.benchmark import show

ROWS = [
    {"encoder": name, "file": file, "side": 224, "faces/s": speed, "F1 lost": lost, "processor": "avx2 avx512_vnni"}
    for name, file, speed, lost in (
        ("a_network_with_a_very_long_name", "float", 12.6916, 0.0),
        ("resnet50", "int8", 41.3709, -0.0052871),
    )
]


@pytest.mark.parametrize("width", [30, 80, 200])
def test_numbers_are_whole_and_what_rows_share_stands_once(width: int) -> None:
    out = io.StringIO()
    show(ROWS, "benchmark export", Console(file=out, width=width))
    text = out.getvalue()
    assert "…" not in text
    for cell in ("a_network_with_a_very_long_name", "float", "int8", "12.7", "41.4", "-0.00529", "faces/s", "F1 lost"):
        assert cell in text
    joined = " ".join(text.split())
    assert joined.count("avx2 avx512_vnni") == 1
    assert "all rows: side 224, processor avx2 avx512_vnni" in joined


def test_a_single_row_keeps_its_columns() -> None:
    out = io.StringIO()
    show(ROWS[:1], "benchmark step", Console(file=out, width=200))
    assert "all rows" not in out.getvalue()
    assert "224" in out.getvalue()
