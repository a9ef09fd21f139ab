# SPDX-License-Identifier: Apache-2.0
"""The tables of a sweep: folds to a mean per seed, seeds to mean and spread, settings to differences.

Everything here is a pure function of numbers. The order of the means is that of the literature on action units: each
class and test part by itself, the mean over test parts, the mean over classes; and only then mean and standard
deviation over seeds. A standard deviation over seeds says how far another seed moves the number on the same people; how
far other people would is what the interval of a comparison says.
"""

from __future__ import annotations

import csv
import io
import math
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, NamedTuple

import numpy as np

from affect.report.records import number_text

Scores = Mapping[tuple[int, str], Mapping[str, float]]
"""Numbers by name, by seed and test part."""

VALUE, POOLED, MEAN = "value", "pooled", "mean"


class Spread(NamedTuple):
    """A number over seeds.

    Attributes:
        mean: Mean over the seeds that have it; NaN without any.
        std: Standard deviation over seeds with n − 1 in its denominator; NaN of fewer than two.
        n: Number of seeds.
    """

    mean: float
    std: float
    n: int


class Left(NamedTuple):
    """A seed that is left out of a setting's numbers, because a test part is missing.

    Attributes:
        setting: The setting.
        seed: The seed.
        fold: The test part that is missing.
        reason: Why.
    """

    setting: str
    seed: int
    fold: str
    reason: str


@dataclass(frozen=True)
class Row:
    """A row of a table: a setting, or what a paper reports.

    Attributes:
        name: Setting, or paper with the confidence of its values.
        cells: Number by column.
        seeds: Number of seeds; None in a reference.
    """

    name: str
    cells: Mapping[str, Spread]
    seeds: int | None = None


@dataclass(frozen=True)
class ScoreTable:
    """One metric of one task on one dataset.

    Attributes:
        dataset: Its name.
        task: Name of the task.
        quantity: The metric's quantity, e.g. ``f1``.
        columns: Classes and summaries, then ``pooled``.
        rows: Settings, each followed by its reference, if it has one.
        higher_is_better: Direction.
        notes: Sentences below the table.
    """

    dataset: str
    task: str
    quantity: str
    columns: Sequence[str]
    rows: Sequence[Row]
    higher_is_better: bool = True
    notes: Sequence[str] = field(default=())

    @property
    def title(self) -> str:
        """Dataset, task and quantity in one line."""
        return f"{self.dataset}: {self.task} {self.quantity}"


class Comparison(NamedTuple):
    """The difference of two settings on the same seeds, test parts and groups.

    Attributes:
        first: A setting.
        second: The setting that it is compared with.
        dataset: Dataset of both.
        task: Task.
        name: Name of the number, e.g. ``f1/mean``.
        difference: Score of the first minus that of the second, test parts pooled, mean over seeds; NaN if unknown.
        low: Lower end of its interval; NaN without one.
        high: Upper end.
        seeds: Number of seeds that both have.
        groups: Number of test groups.
        higher_is_better: Direction of the number.
        reason: Why there is no difference or no interval; empty if there is.
    """

    first: str
    second: str
    dataset: str
    task: str
    name: str
    difference: float
    low: float
    high: float
    seeds: int
    groups: int
    higher_is_better: bool = True
    reason: str = ""

    @property
    def verdict(self) -> str:
        """Which setting is better, ``not resolved`` where the interval contains 0, or why nothing is said."""
        if not math.isfinite(self.low):
            return self.reason or "no interval"
        if self.low <= 0 <= self.high:
            return "not resolved"
        return self.first if (self.low > 0) == self.higher_is_better else self.second


# ---------------------------------------------------------------------------------------------------- means


def spread(values: Iterable[float]) -> Spread:
    """Return mean and standard deviation of the values that exist.

    Example:
        >>> spread([1.0, 2.0, 3.0, float("nan")])
        Spread(mean=2.0, std=1.0, n=3)
    """
    known = np.array([value for value in values if math.isfinite(value)], float)
    if not len(known):
        return Spread(math.nan, math.nan, 0)
    return Spread(float(known.mean()), float(known.std(ddof=1)) if len(known) > 1 else math.nan, len(known))


def over_folds(
    scores: Scores, seed: int, folds: Sequence[str], classes: Mapping[str, Sequence[str]]
) -> dict[str, float]:
    """Return each number of a seed: its mean over test parts, and for each quantity the mean of its classes' means.

    A class that has no number in a test part (no labels) takes no part in its mean there.

    Args:
        scores: Numbers by seed and test part.
        seed: The seed; it has all test parts.
        folds: The test parts.
        classes: Names of the outputs by quantity; ``<quantity>/mean`` becomes the mean over them.

    Example:
        >>> fold = {"f1/AU1": 0.2, "f1/AU2": 0.4, "f1/mean": 0.3}
        >>> other = {"f1/AU1": 0.4, "f1/AU2": float("nan"), "f1/mean": 0.4}
        >>> found = over_folds({(1, "P1"): fold, (1, "P2"): other}, 1, ["P1", "P2"], {"f1": ["AU1", "AU2"]})
        >>> {name: round(value, 2) for name, value in found.items()}
        {'f1/AU1': 0.3, 'f1/AU2': 0.4, 'f1/mean': 0.35}
    """
    names = dict.fromkeys(name for fold in folds for name in scores[seed, fold])
    means = {name: _mean([scores[seed, fold].get(name, math.nan) for fold in folds]) for name in names}
    for quantity, outputs in classes.items():
        if f"{quantity}/{MEAN}" in means:
            means[f"{quantity}/{MEAN}"] = _mean([means[f"{quantity}/{output}"] for output in outputs])
    return means


def _mean(values: Sequence[float]) -> float:
    known = [value for value in values if math.isfinite(value)]
    return math.fsum(known) / len(known) if known else math.nan


def complete_seeds(
    scores: Scores, seeds: Sequence[int], folds: Sequence[str], setting: str, reasons: Mapping[tuple[int, str], str]
) -> tuple[list[int], list[Left]]:
    """Return the seeds that have every test part, and the others with what they miss.

    Args:
        scores: Numbers by seed and test part.
        seeds: Seeds that were asked for.
        folds: Test parts that were asked for.
        setting: Name of the setting.
        reasons: Why a run is missing, by seed and test part.
    """
    whole, left = [], []
    for seed in seeds:
        missing = [fold for fold in folds if (seed, fold) not in scores]
        left += [Left(setting, seed, fold, reasons.get((seed, fold), "no such run")) for fold in missing]
        whole += [] if missing else [seed]
    return whole, left


def gaps(scores: Scores, seeds: Sequence[int], folds: Sequence[str], names: Sequence[str]) -> list[str]:
    """Return which numbers do not exist in which test part, as sentences for a table's notes."""
    absent: dict[str, list[str]] = {}
    for name in names:
        for fold in folds:
            if any(not math.isfinite(scores[seed, fold].get(name, math.nan)) for seed in seeds):
                absent.setdefault(name, []).append(fold)
    return [f"{name} has no value in test part {', '.join(parts)}" for name, parts in absent.items()]


def score_tables(
    dataset: str,
    task: str,
    settings: Mapping[str, tuple[Mapping[int, Mapping[str, float]], Mapping[int, Mapping[str, float]]]],
    higher: Mapping[str, bool],
    references: Mapping[str, Mapping[str, Any] | None] | None = None,
    notes: Mapping[str, Sequence[str]] | None = None,
) -> list[ScoreTable]:
    """Return a table for each quantity of a task.

    Args:
        dataset: Name of the dataset.
        task: Name of the task.
        settings: For each setting its numbers by seed over test parts, and those of pooled test parts.
        higher: Direction of each number, in the order of the columns.
        references: The ``reference`` node of each setting's experiment, if it has one.
        notes: Sentences by quantity.
    """
    tables = []
    for quantity in dict.fromkeys(split_name(name)[0] for name in higher):
        names = {split_name(name)[1]: name for name in higher if split_name(name)[0] == quantity}
        main = names.get(MEAN) or names.get(VALUE)
        # Classes first, as papers print them, and what sums them up behind.
        columns = [column for column in names if column not in (MEAN, "micro")]
        columns += [column for column in (MEAN, "micro") if column in names]
        rows: list[Row] = []
        for setting, (means, pooled) in settings.items():
            cells = {c: spread(found.get(names[c], math.nan) for found in means.values()) for c in columns}
            cells[POOLED] = spread(found.get(main, math.nan) for found in pooled.values()) if main else spread([])
            rows.append(Row(setting, cells, len(means)))
            rows += _reference(task, quantity, (references or {}).get(setting), columns)
        rows = _without_repeated_references(rows)
        direction = all(higher[name] for name in names.values())
        shown = [*columns, POOLED] if main else columns
        tables.append(
            ScoreTable(dataset, task, quantity, shown, rows, direction, tuple((notes or {}).get(quantity, ())))
        )
    return tables


def split_name(name: str) -> tuple[str, str]:
    """Return quantity and column of a number's name.

    Example:
        >>> split_name("f1/AU12"), split_name("accuracy")
        (('f1', 'AU12'), ('accuracy', 'value'))
    """
    quantity, slash, output = name.rpartition("/")
    return (quantity, output) if slash else (output, VALUE)


def _reference(task: str, quantity: str, reference: Mapping[str, Any] | None, columns: Sequence[str]) -> list[Row]:
    if not reference or not reference.get("values"):
        return []
    metric = str(reference.get("metric") or "")
    found: dict[str, float] = {}
    for output, value in reference["values"].items():
        full = f"{metric}/{output}"
        own, _, name = full.partition("/")
        column = split_name(name)
        if own == task and column[0] == quantity and column[1] in columns:
            found[column[1]] = float(value)
        elif own == task and name.rpartition("/")[2] == quantity and VALUE in columns:
            found[VALUE] = float(value)
    if not found:
        return []
    status = f", {reference['status']}" if reference.get("status") else ""
    name = f"{reference.get('paper')}, table {reference.get('table')} ({reference.get('confidence') or 'none'}{status})"
    return [Row(f"reference: {name}", {column: Spread(value, math.nan, 0) for column, value in found.items()})]


def _without_repeated_references(rows: Sequence[Row]) -> list[Row]:
    """Keep the last of rows that several settings share, so that it stands below all of them."""
    last = {row.name: index for index, row in enumerate(rows) if row.seeds is None}
    return [row for index, row in enumerate(rows) if row.seeds is not None or last[row.name] == index]


# ----------------------------------------------------------------------------------------------------- text


def cell_text(cell: Spread | None, digits: int = 3, plus: str = " ± ") -> str:
    """Return a number with its spread.

    Example:
        >>> cell_text(Spread(0.5456, 0.0123, 3)), cell_text(Spread(0.5, float("nan"), 1)), cell_text(None)
        ('0.546 ± 0.012', '0.500', '–')
    """
    if cell is None or not math.isfinite(cell.mean):
        return "–"
    mean = number_text(cell.mean, digits)
    return f"{mean}{plus}{number_text(cell.std, digits)}" if math.isfinite(cell.std) else mean


def table_note(table: ScoreTable, folds: Sequence[str]) -> str:
    """Return the sentence that says what the numbers of a table are."""
    parts = f"mean over test parts {', '.join(folds)}" if len(folds) > 1 else f"test part {folds[0]}"
    classes = ", then over classes" if MEAN in table.columns and len(folds) > 1 else ""
    pooled = f"; `{POOLED}`: the same number of all test parts together" if len(folds) > 1 else ""
    return (
        f"{table.title}, {'higher' if table.higher_is_better else 'lower'} is better: {parts}{classes}; "
        f"mean ± standard deviation over seeds (n of them){pooled}."
    )


def markdown(table: ScoreTable, folds: Sequence[str], digits: int = 3) -> str:
    """Return a table as Markdown with its notes, ending with a line break."""
    heads = ["setting", "n", *table.columns]
    lines = [f"| {' | '.join(map(_escaped, heads))} |", f"|---|{'---:|' * (len(heads) - 1)}"]
    for row in table.rows:
        cells = [cell_text(row.cells.get(column), digits) for column in table.columns]
        lines.append(f"| {' | '.join([_escaped(row.name), '' if row.seeds is None else str(row.seeds), *cells])} |")
    lines += ["", table_note(table, folds), *(f"Note: {note}." for note in table.notes)]
    return "\n".join(lines) + "\n"


def _escaped(text: str) -> str:
    return text.replace("\\", "\\\\").replace("|", "\\|")


_TEX = str.maketrans(
    {
        **{c: f"\\{c}" for c in "&%$#_{}"},
        "~": r"\textasciitilde{}",
        "^": r"\textasciicircum{}",
        "\\": r"\textbackslash{}",
    }
)


def latex(table: ScoreTable, folds: Sequence[str], digits: int = 3) -> str:
    """Return a table as LaTeX (booktabs), ending with a line break."""

    def text(words: str) -> str:
        return words.translate(_TEX).replace("±", r"$\pm$").replace("–", "--").replace("−", "$-$")

    heads = ["setting", "$n$", *map(text, table.columns)]
    lines = [
        r"\begin{table}",
        r"\centering",
        f"\\caption{{{text(table_note(table, folds).replace('`', ''))}}}",
        f"\\begin{{tabular}}{{l{'r' * (len(heads) - 1)}}}",
        r"\toprule",
        " & ".join(heads) + r" \\",
        r"\midrule",
    ]
    for row in table.rows:
        cells = [text(cell_text(row.cells.get(column), digits)) for column in table.columns]
        lines.append(" & ".join([text(row.name), "" if row.seeds is None else str(row.seeds), *cells]) + r" \\")
    return "\n".join([*lines, r"\bottomrule", r"\end{tabular}", r"\end{table}"]) + "\n"


def summary_csv(tables: Sequence[ScoreTable]) -> str:
    """Return all tables as one CSV with a row per setting and column."""
    rows = [
        [t.dataset, t.task, t.quantity, row.name, column, *_numbers(cell.mean, cell.std), cell.n, row.seeds is None]
        for t in tables
        for row in t.rows
        for column in t.columns
        if (cell := row.cells.get(column)) is not None
    ]
    heads = ["dataset", "task", "quantity", "setting", "column", "mean", "std", "seeds", "reference"]
    return csv_text(heads, rows)


def csv_text(heads: Sequence[str], rows: Iterable[Sequence[object]]) -> str:
    """Return rows as CSV with a heading."""
    stream = io.StringIO()
    writer = csv.writer(stream, lineterminator="\n")
    writer.writerow(heads)
    writer.writerows(rows)
    return stream.getvalue()


def _numbers(*values: float) -> list[str]:
    return [repr(value) if math.isfinite(value) else "" for value in values]


def comparisons_csv(comparisons: Sequence[Comparison]) -> str:
    """Return comparisons as CSV."""
    heads = [*Comparison._fields[:5], "difference", "low", "high", "seeds", "groups", "verdict"]
    rows = [[*c[:5], *_numbers(c.difference, c.low, c.high), c.seeds, c.groups, c.verdict] for c in comparisons]
    return csv_text(heads, rows)


def comparisons_markdown(comparisons: Sequence[Comparison], level: float = 0.95, digits: int = 3) -> str:
    """Return comparisons as Markdown; empty without any."""
    if not comparisons:
        return ""
    heads = ["number", "settings", "difference", f"{level:.0%} interval", "seeds", "groups", "better"]
    lines = [f"| {' | '.join(heads)} |", "|---|---|---:|---:|---:|---:|---|"]
    for c in comparisons:
        interval = f"[{number_text(c.low, digits)}, {number_text(c.high, digits)}]" if math.isfinite(c.low) else "–"
        cells = [f"{c.dataset} {c.task} {c.name}", f"{c.first} − {c.second}", number_text(c.difference, digits)]
        lines.append(f"| {' | '.join(map(_escaped, [*cells, interval, str(c.seeds), str(c.groups), c.verdict]))} |")
    lines += [
        "",
        "Differences of the pooled score, mean over the seeds that both have; intervals by bootstrap over the pooled "
        "test groups, drawn together for both settings and all seeds. `not resolved`: the interval contains 0.",
    ]
    return "\n".join(lines) + "\n"


def left_text(left: Sequence[Left]) -> list[str]:
    """Return a sentence for each seed that is left out."""
    found: dict[tuple[str, int], list[Left]] = {}
    for each in left:
        found.setdefault((each.setting, each.seed), []).append(each)
    return [
        f"{setting}, seed {seed} is left out: "
        + "; ".join(f"test part {each.fold} is missing ({each.reason})" for each in missing)
        for (setting, seed), missing in found.items()
    ]
