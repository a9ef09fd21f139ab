# SPDX-License-Identifier: Apache-2.0
"""Records as an evaluation writes them, for the tests of tables and figures."""

from __future__ import annotations


def record(name: str, value: float | None, low: float | None = None, high: float | None = None, **more) -> dict:
    known = {"constant": None, "n": 100, "higher_is_better": True, "subgroup": None, "task": "au", "reason": None}
    return {"name": name, "value": value, "low": low, "high": high, **known, **more}


AU = [
    record("f1/AU1", 0.30, 0.20, 0.41, constant=0.45, n=812),
    record("f1/AU12", 0.80, 0.75, 0.85, constant=0.60, n=1812),
    record("f1/AU45", None, None, None, n=0),
    record("f1/mean", 0.55, 0.50, 0.62, constant=0.525, n=1812),
]
ALIGNMENT = [
    record("nme", 4.25, 4.0, 4.5, constant=9.5, higher_is_better=False, task="landmarks"),
    record("fr/10", 2.0, None, None, constant=30.0, higher_is_better=False, task="landmarks", reason="only one group"),
    record("skipped", 3.0, task="landmarks", reason="a count", higher_is_better=False),
]
