# SPDX-License-Identifier: Apache-2.0
"""Result tables for the terminal (rich) and for README files (Markdown), from the records of an evaluation."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from typing import Any

from rich import box
from rich.table import Table
from rich.text import Text

from affect.errors import DataError, near
from affect.report.records import (
    Record,
    Score,
    number_text,
    overall,
    read_arms,
    read_scores,
    score_like,
    select_names,
)

INTERVAL = "95 % interval"
"""Heading of the interval column, the level of ``affect.metrics``' bootstrap."""


def results_table(
    records: Sequence[Record], title: str | None = None, *, digits: int = 3, note: str | None = None
) -> Table:
    """Return a table of metric, value, interval, best constant predictor, and number of samples and of their groups.

    A value that clearly beats the best constant predictor (its whole interval does) is bold green, one that does not
    beat it is red and carries an exclamation mark. Subgroups are left to ``subgroup_table``.

    Args:
        records: Records of one evaluation; each of several tasks has its name above its rows.
        title: Heading above the table.
        digits: Decimals of every number.
        note: Line below the table: where the numbers come from.
    """
    scores = overall(read_scores(records))
    tasks = list(dict.fromkeys(score.task for score in scores))
    counts = _count_headings(scores)
    table = _table(title)
    table.add_column("metric", overflow="fold")
    for heading in ("value", INTERVAL, "constant", *counts):
        table.add_column(heading, justify="right", no_wrap=True)
    for task in tasks:
        rows = [score for score in scores if score.task == task]
        if len(tasks) > 1:
            table.add_row(Text(task, style="bold"))
        for index, score in enumerate(rows):
            cells: list[str | Text] = [score.name, _value(score, digits), _interval(score, digits)]
            cells += [number_text(score.constant, digits), *_counts([score])[: len(counts)]]
            table.add_row(*map(_plain, cells), end_section=index == len(rows) - 1)
    notes = [
        f"no interval: {reason}" for reason in dict.fromkeys(score.reason for score in scores) if _is_telling(reason)
    ]
    if any(score.beats_constant is False for score in scores):
        notes.insert(0, "! not better than the best constant predictor")
    return _noted(table, notes if scores else ["no results"], note)


def subgroup_tables(
    records: Sequence[Record],
    *,
    names: Sequence[str] | None = None,
    digits: int = 3,
    note: str | None = None,
) -> list[Table]:
    """Return for each task a table of its subgroups, narrow enough for a terminal of 80 columns.

    Args:
        records: Records of one evaluation with those of its subgroups.
        names: Record names to show in the tables of tasks that have one of them; see ``subgroup_table``.
        digits: Decimals of every number.
        note: Line below each table: where the numbers come from.
    """
    tables = []
    for task in dict.fromkeys(score.task for score in read_scores(records)):
        own = [record for record in records if str(record.get("task") or "") == task]
        shown = [name for name in names or () if any(record["name"] == name for record in own)]
        title = f"{task or 'all'} by subgroup"
        tables.append(subgroup_table(own, title, names=shown or None, digits=digits, note=note))
    return tables


def subgroup_table(
    records: Sequence[Record],
    title: str | None = None,
    *,
    names: Sequence[str] | None = None,
    digits: int = 3,
    note: str | None = None,
) -> Table:
    """Return a table with one row per subgroup, one column per metric, and the largest gap between subgroups.

    Args:
        records: Records of one evaluation with those of its subgroups.
        title: Heading above the table.
        names: Record names to show; None takes each task's summaries of which more is better (``f1/mean``,
            ``accuracy`` …), its other summaries if there are none, or everything if there are no summaries.
        digits: Decimals of every number.
        note: Line below the table: where the numbers come from.

    Raises:
        DataError: If a name is asked for that no record has.
    """
    scores = read_scores(records)
    known = {(score.task, score.name): score for score in scores}
    if names is None:
        tasks = dict.fromkeys(task for task, _ in known)
        chosen = [score_like(score for key, score in known.items() if key[0] == task) for task in tasks]
        keys = [(score.task, score.name) for part in chosen for score in part]
    else:
        missing = [name for name in names if name not in {key[1] for key in known}]
        if missing:
            raise DataError(f"no record holds {missing[0]!r}; {near(missing[0], [key[1] for key in known])}")
        keys = [key for name in names for key in known if key[1] == name]
    several = len({task for task, _ in keys}) > 1
    groups = list(dict.fromkeys(score.subgroup for score in scores if score.subgroup))
    cells = {(score.subgroup, score.task, score.name): score for score in scores}

    table = _table(title)
    table.add_column("subgroup")
    headings = _count_headings(scores)
    for heading in headings:
        table.add_column(heading, justify="right", no_wrap=True)
    for task, name in keys:
        table.add_column(_heading(task if several else "", name), justify="right")
    for group in ["", *groups]:
        row = [cells.get((group, *key)) for key in keys]
        if not group and not any(row):
            continue
        counts = _counts([score for score in row if score is not None])[: len(headings)]
        texts = [_plain(_value(score, digits)) if score is not None else Text("–") for score in row]
        shown = Text(group) if group else Text("all", style="bold")
        table.add_row(shown, *counts, *texts, end_section=not group)
    if len(groups) > 1:
        table.add_section()
        gaps = [_gap([cells.get((group, *key)) for group in groups]) for key in keys]
        gap_texts = [number_text(gap, digits) for gap in gaps]
        table.add_row(Text("largest gap", style="italic"), *("" for _ in headings), *gap_texts)
    return _noted(table, [] if groups else ["no subgroups; group_by=<column> makes them"], note)


def comparison_table(
    arms: Mapping[str, Sequence[Record]],
    title: str | None = None,
    *,
    names: Sequence[str] | None = None,
    digits: int = 3,
    note: str | None = None,
) -> Table:
    """Return a table with one row per arm of a comparison and one column per metric; the best of a column is bold.

    The last row is the best constant predictor. Intervals stand below the value where records have them.

    Args:
        arms: Records by arm, in the order of the rows.
        title: Heading above the table.
        names: Record names to show; None takes the summaries, or everything if there are no summaries.
        digits: Decimals of every number.
        note: Line below the table: where the numbers come from.

    Raises:
        DataError: If an arm holds a number twice, or if no arm holds a name that was asked for.
    """
    read = read_arms(arms)
    keys = select_names(read, names)
    several = len({task for task, _ in keys}) > 1
    table = _table(title)
    table.add_column("arm")
    for key in keys:
        shown = [_interval(scores[key], digits) for scores in read.values() if key in scores]
        # The heading may break between its words, an interval may not.
        widest = max(map(len, shown), default=None)
        table.add_column(_heading(key[0] if several else "", key[1]), justify="right", min_width=widest)
    best = {key: _best([scores[key] for scores in read.values() if key in scores], digits) for key in keys}
    for index, (arm, scores) in enumerate(read.items()):
        cells = []
        for key in keys:
            score = scores.get(key)
            if score is None:
                cells.append(Text("–"))
                continue
            value = number_text(score.value, digits)
            cell = Text(value, style="bold" if value == best[key] else "")
            if score.has_interval:
                cell.append(f"\n{_interval(score, digits)}", style="not bold dim")
            cells.append(cell)
        table.add_row(Text(arm), *cells, end_section=index == len(read) - 1)
    if keys:
        table.add_row(Text("best constant", style="italic"), *(Text(_constants(read, key, digits)) for key in keys))
    return _noted(table, [] if keys else ["nothing to compare"], note)


def reference_table(reference: Mapping[str, Any], records: Sequence[Record], title: str | None = None) -> Table:
    """Return what a paper reports beside what was measured here; it is printed as what it is and never asserted.

    Args:
        reference: ``paper``, ``table``, ``metric`` (``<task>/<quantity>`` with ``values`` by output, or a task alone
            with ``values`` by number, e.g. ``accuracy``; None where none are known; in the metric's own unit),
            ``confidence`` (``found``, ``recalled-high`` …) and, optionally, ``status`` (``transfer``: no paper reports
            this pair) and ``note``.
        records: Records of this run.
        title: Heading above the table.
    """
    metric = str(reference.get("metric") or "")
    task, slash, quantity = metric.rpartition("/")
    if not slash and reference.get("values"):
        task, quantity = metric, ""
    scores = {score.name: score for score in overall(read_scores(records)) if not task or score.task == task}
    confidence = str(reference.get("confidence") or "none")
    heading = title or f"Reference: {reference.get('paper')}, table {reference.get('table')}"
    table = _table(heading)
    values = reference.get("values") or {}
    table.add_column("metric", overflow="fold")
    table.add_column("here", justify="right", no_wrap=True)
    table.add_column(f"reference ({confidence})", justify="right", no_wrap=True)
    if not values:
        table.add_row(Text(quantity), Text("–"), Text("no values"))
    for output, value in values.items():
        name = f"{quantity}/{output}" if quantity else str(output)
        score = scores.get(name)
        here = "–" if score is None else number_text(score.value)
        table.add_row(Text(name), Text(here), Text(number_text(float(value))))
    notes = [f"status: {reference['status']}"] if reference.get("status") else []
    shown = _noted(table, notes, str(reference["note"]) if reference.get("note") else None)
    shown.min_width = min(max(shown.min_width or 0, len(heading)), 78)  # rich would break a title to a narrow table
    return shown


def order_table(found: Mapping[str, Any], title: str | None = "Most probable orders") -> Table:
    """Return the table of a learnt order of tasks: weight in the mixture and tasks from first to last.

    Args:
        found: What MONET finds (``affect.models.monet.Monet.findings``): ``orders`` with ``weight`` and ``order``, the
            ``entropy`` of the mixture in nats, and ``uniform_entropy``, the largest that it can be.
        title: Heading above the table.
    """
    table = _table(title)
    table.add_column("weight", justify="right", no_wrap=True)
    table.add_column("order")
    for entry in found["orders"]:
        table.add_row(Text(number_text(entry["weight"])), Text(" ".join(map(str, entry["order"]))))
    note = f"entropy of the mixture {found['entropy']:.2f} of at most {found['uniform_entropy']:.2f} nats"
    uniform = len(found["orders"]) > 1 and math.isclose(found["entropy"], found["uniform_entropy"], rel_tol=1e-6)
    return _noted(table, [note, "all orders weigh the same: the mixture was not trained"] if uniform else [note])


def markdown_table(records: Sequence[Record], *, digits: int = 3, note: str | None = None) -> str:
    """Return ``results_table`` as a GitHub-flavoured Markdown table, ending with a line break."""
    return markdown(results_table(records, digits=digits, note=note))


def markdown(table: Table) -> str:
    """Return any table of this module as GitHub-flavoured Markdown; bold cells stay bold, the title is left out."""
    headings = [_cell(column.header) for column in table.columns]
    rules = ["---:" if column.justify == "right" else "---" for column in table.columns]
    rows = zip(*([_cell(cell) for cell in column.cells] for column in table.columns), strict=True)
    lines = [f"| {' | '.join(cells)} |" for cells in (headings, rules, *rows)]
    if table.caption:
        lines += [text for line in table.caption.split("\n") for text in ("", _cell(line))]  # type: ignore[union-attr]
    return "\n".join(lines) + "\n"


def _is_telling(reason: str) -> bool:
    """Whether a reason for missing intervals concerns the whole evaluation, so that its reader can change it."""
    return reason in ("no groups", "no resamples") or reason.startswith("only ")


def _noted(table: Table, notes: Sequence[str], origin: str | None = None) -> Table:
    lines = [line for line in (origin, "; ".join(notes)) if line]
    table.caption = Text("\n".join(lines)) if lines else None
    table.caption_justify = "left"
    # rich would break a note to the width of a table without rows.
    table.min_width = min(max((len(note) for note in notes), default=0), 60)
    return table


def _table(title: str | None) -> Table:
    shown = None if title is None else Text(title, style="bold")
    return Table(
        title=shown,
        title_justify="left",
        box=box.SIMPLE_HEAD,
        header_style="bold",
        pad_edge=False,
        padding=(0, 1, 0, 0),
    )


def _heading(task: str, name: str) -> Text:
    # Words of their own, so that a narrow terminal breaks the heading between them and cuts none.
    return Text(f"{task} {name}".strip().replace("_", " "))


def _count_headings(scores: Sequence[Score]) -> list[str]:
    return ["n", "groups"] if any(score.groups is not None for score in scores) else ["n"]


def _counts(scores: Sequence[Score]) -> list[str]:
    """Texts of the largest number of samples and of groups: labels may be missing for some of the scores."""
    samples = [score.n for score in scores if score.n is not None]
    groups = [score.groups for score in scores if score.groups is not None]
    return [_count(max(samples, default=None)), _count(max(groups, default=None))]


def _value(score: Score, digits: int) -> Text:
    if score.is_count and math.isfinite(score.value):
        return Text(f"{score.value:,.0f}")
    text = number_text(score.value, digits)
    if score.beats_constant is False:
        return Text(text + " !", style="red")
    return Text(text, style="bold green" if score.clearly_beats_constant else "")


def _interval(score: Score, digits: int) -> str:
    if not score.has_interval:
        return "–"
    return f"[{number_text(score.low, digits)}, {number_text(score.high, digits)}]"


def _count(n: int | None) -> str:
    return "–" if n is None else f"{n:,}"


def _gap(scores: Sequence[Score | None]) -> float:
    values = [score.value for score in scores if score is not None and math.isfinite(score.value)]
    return max(values) - min(values) if len(values) > 1 else math.nan


def _best(scores: Sequence[Score], digits: int) -> str | None:
    """Text of the best value: arms that read the same are equally best. None if there is nothing to compare."""
    known = [score for score in scores if math.isfinite(score.value)]
    if len(known) < 2:
        return None
    better = max if known[0].higher_is_better else min
    return number_text(better(score.value for score in known), digits)


def _constants(arms: Mapping[str, Mapping[tuple[str, str], Score]], key: tuple[str, str], digits: int) -> str:
    """The constant predictor's number; a range where arms were evaluated on different rows."""
    texts = [number_text(scores[key].constant, digits) for scores in arms.values() if key in scores]
    distinct = list(dict.fromkeys(text for text in texts if text != "–"))
    return " / ".join(distinct) if distinct else "–"


def _plain(cell: str | Text) -> Text:
    # A plain string would be read as console markup, where a name in square brackets vanishes.
    return cell if isinstance(cell, Text) else Text(cell)


def _cell(cell: object) -> str:
    text = cell if isinstance(cell, Text) else Text(str(cell))
    plain = text.plain.replace("\\", "\\\\").replace("|", "\\|").replace("\n", " ")
    if "bold" in str(text.style).split() and plain:
        # Only the part that is bold in the terminal: an interval behind the value stays plain.
        end = min((span.start for span in text.spans if "not bold" in str(span.style)), default=len(plain))
        return f"**{plain[:end]}**{plain[end:]}"
    return plain
