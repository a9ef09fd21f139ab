# SPDX-License-Identifier: Apache-2.0
"""What a dataset should contain, and how a table is held against it.

A layout's ``expected(…)`` returns published numbers, each under a key that says what is counted::

    rows                                  rows of the table
    rows/part=train                       … where a column has a value; several conditions are joined by /
    rows/part=train/expression=fear
    distinct/subject                      different values of a column; conditions may follow
    rate/au12_occurrence                  mean of the labelled cells of a column, in [0, 1]; conditions may follow
    labelled/au12_occurrence              labelled cells of a column; conditions may follow
    size                                  width and height of every image, e.g. (112, 112)
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field

import numpy as np

from affect.data.table import FaceTable
from affect.errors import DataError

WARN_RATE, FAIL_RATE = 0.003, 0.02
"""Published rates are rounded and come from variants of the lists: beyond these it is a warning, an error."""


@dataclass(frozen=True)
class Expected:
    """A published number.

    Attributes:
        key: What is counted (see the module).
        value: The number; (width, height) for ``size``.
        source: Where it was published or counted.
        found: Whether it was counted in a public list; a number that was recalled only ever warns.
        variants: Other counts that are known, and whose they are.
    """

    key: str
    value: float | tuple[int, int]
    source: str
    found: bool = True
    variants: Mapping[int, str] = field(default_factory=dict)


def measure(table: FaceTable, key: str) -> float | None:
    """Return what ``key`` counts in a table; None where nothing can be counted (no labelled cell, no such column).

    ``size`` is not a matter of the table; ask the images.

    Raises:
        DataError: If the key is none.
    """
    kind, *rest = key.split("/")
    column = rest.pop(0) if kind in ("distinct", "rate", "labelled") and rest else None
    chosen = _where(table, rest)
    if kind == "rows":
        return float(chosen.sum())
    if column is None or kind not in ("distinct", "rate", "labelled"):
        raise DataError(f"expected count {key!r}: unknown; write rows, distinct/<column>, rate/<column> or size")
    if column not in table.names:
        return 0.0 if kind != "rate" else None
    if kind == "distinct":
        codes = table.codes(column)[0][chosen]
        return float(len(np.unique(codes[codes >= 0])))
    if kind == "labelled":
        # Of any type: a column of class names has labelled cells too.
        return float((chosen & table.column(column).is_valid().to_numpy(zero_copy_only=False)).sum())
    values, valid = table.numbers(column)
    chosen &= valid
    return float(values[chosen].mean(dtype=np.float64)) if chosen.any() else None


def _where(table: FaceTable, conditions: Sequence[str]) -> np.ndarray:
    chosen = np.ones(len(table), bool)
    for condition in conditions:
        column, _, value = condition.partition("=")
        if column not in table.names:
            return np.zeros(len(table), bool)
        codes, names = table.codes(column)
        at = np.flatnonzero(names.astype(str) == value)
        chosen &= codes == at[0] if len(at) else False
    return chosen
