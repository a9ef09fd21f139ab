# SPDX-License-Identifier: Apache-2.0
"""Statistics of a controlled experiment: arms with several seeds each, means with intervals, paired differences."""

from __future__ import annotations

import fnmatch
from collections.abc import Mapping, Sequence
from typing import NamedTuple

import numpy as np
from rich import box
from rich.table import Table
from rich.text import Text
from scipy import stats

from affect.errors import DataError

Cells = Mapping[str, Mapping[int, float | None]]
"""Value by arm and seed; None or NaN where a run gave none."""

Baseline = str | Mapping[str, str] | None
"""The arm that all others are compared with, or arms by patterns of the others' names; None compares nothing."""


class Estimate(NamedTuple):
    """A mean over seeds.

    Attributes:
        mean: Mean of the values that exist; NaN without any.
        low: Lower end of its interval; NaN with fewer than two values.
        high: Upper end.
        runs: Number of values.
    """

    mean: float
    low: float
    high: float
    runs: int


def estimate(values: Sequence[float | None], level: float = 0.95) -> Estimate:
    """Return the mean of values and its interval by Student's t.

    Seeds are the unit: the interval says how far another set of seeds would move the mean, not how far other data
    would.

    Example:
        >>> estimate([1.0, 2.0, 3.0])
        Estimate(mean=2.0, low=-0.48413771175032934, high=4.4841377117503294, runs=3)
    """
    known = np.array([value for value in values if value is not None and np.isfinite(value)], float)
    if not len(known):
        return Estimate(np.nan, np.nan, np.nan, 0)
    mean = float(known.mean())
    if len(known) < 2:
        return Estimate(mean, np.nan, np.nan, 1)
    half = float(stats.t.ppf((1 + level) / 2, len(known) - 1) * known.std(ddof=1) / len(known) ** 0.5)
    return Estimate(mean, mean - half, mean + half, len(known))


def difference(cells: Cells, arm: str, baseline: str, level: float = 0.95) -> Estimate:
    """Return the mean difference of an arm from the baseline over the seeds that both have, with its interval.

    Differences are taken seed by seed: a seed draws the same data and start for every arm, so that its luck cancels.

    Raises:
        DataError: If there is no such arm.
    """
    for name in (arm, baseline):
        if name not in cells:
            raise DataError(f"no arm {name!r} in the experiment")
    shared = sorted(set(cells[arm]) & set(cells[baseline]))
    pairs = [(cells[arm][seed], cells[baseline][seed]) for seed in shared]
    return estimate([a - b for a, b in pairs if a is not None and b is not None], level)


def baseline_of(arm: str, baseline: Baseline) -> str | None:
    """Return the arm that an arm is compared with: the baseline, or that of the first pattern that its name matches.

    Example:
        >>> baseline_of("binary_40", {"*_0": "float_0", "*_40": "float_40"})
        'float_40'
    """
    if baseline is None or isinstance(baseline, str):
        return baseline
    return next((other for pattern, other in baseline.items() if fnmatch.fnmatchcase(arm, pattern)), None)


def number(value: float, digits: int = 3) -> str:
    """Return a number as tables show it; a dash where there is none."""
    return "–" if not np.isfinite(value) else f"{value:.{digits}f}"


def estimate_text(found: Estimate, digits: int = 3, signed: bool = False) -> str:
    """Return an estimate as text, e.g. ``0.873 [0.861, 0.885]``."""
    if not np.isfinite(found.mean):
        return "–"
    mean = f"{found.mean:+.{digits}f}" if signed else f"{found.mean:.{digits}f}"
    return mean if not np.isfinite(found.low) else f"{mean} [{number(found.low, digits)}, {number(found.high, digits)}]"


def experiment_tables(
    measures: Mapping[str, Cells], baseline: Baseline = None, level: float = 0.95, digits: int = 3
) -> list[Table]:
    """Return a table per measure, narrow enough for a terminal of 80 columns: a row per arm, mean and difference.

    Args:
        measures: Cells by measure; every measure has the same arms.
        baseline: Arm that others are compared with, or arms by patterns of the others' names; None compares nothing.
        level: Level of the intervals.
        digits: Decimals.
    """
    tables = []
    for name, cells in measures.items():
        table = Table(
            title=Text(name, style="bold"),
            title_justify="left",
            box=box.SIMPLE_HEAD,
            header_style="bold",
            pad_edge=False,
            padding=(0, 1, 0, 0),
        )
        table.add_column("arm", overflow="fold")
        table.add_column("mean", justify="right", no_wrap=True)
        if baseline:
            table.add_column("difference", justify="right", no_wrap=True)
        table.add_column("runs", justify="right", no_wrap=True)
        for arm, values in cells.items():
            found = estimate(list(values.values()), level)
            row = [Text(arm), Text(estimate_text(found, digits))]
            if baseline:
                other = baseline_of(arm, baseline)
                compared = None if other is None else difference(cells, arm, other, level)
                text = "–" if compared is None else estimate_text(compared, digits, signed=True)
                row.append(Text("baseline" if arm == other else text))
            table.add_row(*row, Text(str(found.runs)))
        table.min_width = min(len(name) + 1, 78)  # rich would break a title to a narrow table
        tables.append(table)
    return tables


def experiment_note(measures: Mapping[str, Cells], baseline: Baseline = None, level: float = 0.95) -> str:
    """Return the sentence that says what means, intervals and differences of an experiment are."""
    seeds = {seed for cells in measures.values() for arm in cells.values() for seed in arm}
    plural = "" if len(seeds) == 1 else "s"
    return f"Mean over {len(seeds)} seed{plural} [{level:.0%} interval by Student's t over seeds]" + (
        f"; differences from {_named(baseline)} are taken seed by seed." if baseline else "."
    )


def _named(baseline: Baseline) -> str:
    return str(baseline) if not isinstance(baseline, Mapping) else ", ".join(dict.fromkeys(baseline.values()))


def experiment_markdown(
    measures: Mapping[str, Cells], baseline: Baseline = None, level: float = 0.95, digits: int = 3
) -> str:
    """Return a Markdown table: a row per arm, a column per measure, and differences from the baseline beside them.

    Args:
        measures: Cells by measure; every measure has the same arms.
        baseline: Arm that others are compared with, or arms by patterns of the others' names; None compares nothing.
        level: Level of the intervals.
        digits: Decimals.
    """
    arms = list(next(iter(measures.values())))
    heads = ["arm"]
    for name in measures:
        heads += [name] + ([f"{name} − {baseline if isinstance(baseline, str) else 'baseline'}"] if baseline else [])
    heads = [head.replace("|", "\\|") for head in heads]  # as in |cos|
    lines = [f"| {' | '.join(heads)} |", f"|{'---|' * len(heads)}"]
    for arm in arms:
        row = [arm]
        for cells in measures.values():
            row.append(estimate_text(estimate(list(cells[arm].values()), level), digits))
            if baseline:
                other = baseline_of(arm, baseline)
                compared = None if other in (None, arm) else difference(cells, arm, str(other), level)
                row.append("" if compared is None else estimate_text(compared, digits, signed=True))
        lines.append(f"| {' | '.join(row)} |")
    lines += ["", experiment_note(measures, baseline, level)]
    return "\n".join(lines) + "\n"
