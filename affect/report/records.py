# SPDX-License-Identifier: Apache-2.0
"""How reports read the records of an evaluation: one typed view that every table and figure shares.

A record is a JSON-friendly mapping, one number of one result file::

    {"name": "f1/AU12", "value": 0.61, "low": 0.55, "high": 0.66, "constant": 0.42, "n": 812,
     "groups": 31, "higher_is_better": true, "subgroup": null, "task": "au"}

``affect.metrics.evaluate`` makes them, and ``task`` is added where several tasks share a file. ``name`` is
``<metric>``, ``<metric>/<output>`` or ``<metric>/<parameter>`` (``fr/10``). Null (or NaN) means that the number does
not exist, e.g. an output without labels. ``subgroup`` is null for all rows together; ``reason`` says why there is no
interval.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass

from affect.errors import DataError, near
from affect.labels import AU_NAMES, NORMALISERS

Record = Mapping[str, object]
"""One number of a result file; the module's docstring lists the keys."""

SUMMARIES = ("mean", "micro", "macro")
"""Output names that stand for several outputs together."""

_ACRONYMS = {"f1", "auc", "ccc", "pcc", "rmse", "mse", "mae", "sagr", "icc", "nme", "fr"}


@dataclass(frozen=True)
class Score:
    """A record with every number present: what does not exist is NaN.

    Attributes:
        task: Task that the number belongs to; empty if the record names none.
        metric: Name of the metric, e.g. ``f1``.
        output: Output within the task, e.g. ``AU12`` or ``mean``; empty where the metric has one number per task.
        value: The number itself, in the metric's own unit.
        low: Lower end of its interval, NaN if there is none.
        high: Upper end of its interval, NaN if there is none.
        constant: The best constant predictor's number on the same rows, NaN if unknown.
        n: Number of samples behind it, None if the record does not say.
        higher_is_better: Direction of the metric.
        subgroup: Readable name of the subgroup, empty for all rows together.
        reason: Why there is no interval, empty if there is one or if the record does not say.
        groups: Number of groups (subjects, videos) behind it, None if the record does not say.
    """

    task: str
    metric: str
    output: str
    value: float
    low: float = math.nan
    high: float = math.nan
    constant: float = math.nan
    n: int | None = None
    higher_is_better: bool = True
    subgroup: str = ""
    reason: str = ""
    groups: int | None = None

    @property
    def name(self) -> str:
        """Name as in the record, e.g. ``f1/AU12``."""
        return f"{self.metric}/{self.output}" if self.output else self.metric

    @property
    def is_summary(self) -> bool:
        """Whether the number stands for the whole task: not for one output, and not a mere count."""
        return not self.is_count and (not self.output or self.output in SUMMARIES or _is_parameter(self.output))

    @property
    def is_count(self) -> bool:
        """Whether the number counts something, e.g. skipped images, and so is neither good nor bad."""
        return self.reason == "a count"

    @property
    def has_interval(self) -> bool:
        """Whether both ends of the interval exist."""
        return math.isfinite(self.low) and math.isfinite(self.high)

    @property
    def beats_constant(self) -> bool | None:
        """Whether the value is better than the best constant predictor's; None if either is unknown."""
        if math.isnan(self.value) or math.isnan(self.constant):
            return None
        return self.value > self.constant if self.higher_is_better else self.value < self.constant

    @property
    def clearly_beats_constant(self) -> bool:
        """Whether the whole interval lies on the better side of the best constant predictor."""
        if not self.has_interval or math.isnan(self.constant):
            return False
        return self.low > self.constant if self.higher_is_better else self.high < self.constant


def read_score(record: Record) -> Score:
    """Return the typed view of one record.

    Raises:
        DataError: If the record lacks its name or value, or if one of its numbers is not a number.
    """
    name = record.get("name")
    if not isinstance(name, str) or not name:
        raise DataError(f"result record {dict(record)!r}: it has no name; expected a text such as f1/AU12")
    if "value" not in record:
        raise DataError(f"result record {name}: it has no value; write null where a number does not exist")
    metric, _, output = name.rpartition("/")
    return Score(
        task=str(record.get("task") or ""),
        metric=metric or output,
        output=output if metric else "",
        value=_number(record, name, "value"),
        low=_number(record, name, "low"),
        high=_number(record, name, "high"),
        constant=_number(record, name, "constant"),
        n=_whole(record, name, "n"),
        higher_is_better=record.get("higher_is_better") is not False,
        subgroup=subgroup_name(record.get("subgroup")),
        reason=str(record.get("reason") or ""),
        groups=_whole(record, name, "groups"),
    )


def read_scores(records: Iterable[Record]) -> list[Score]:
    """Return the typed view of all records, in their order."""
    return [read_score(record) for record in records]


def overall(scores: Iterable[Score]) -> list[Score]:
    """Return the scores of all rows together, without those of subgroups."""
    return [score for score in scores if not score.subgroup]


def read_arms(arms: Mapping[str, Sequence[Record]]) -> dict[str, dict[tuple[str, str], Score]]:
    """Return for each arm of a comparison its overall scores by (task, name).

    Raises:
        DataError: If an arm holds one number twice (e.g. two seeds that were not yet summarised).
    """
    read: dict[str, dict[tuple[str, str], Score]] = {}
    for arm, records in arms.items():
        read[arm] = {}
        for score in overall(read_scores(records)):
            key = (score.task, score.name)
            if key in read[arm]:
                raise DataError(f"arm {arm!r} holds {score.name} twice; give one record per arm and name")
            read[arm][key] = score
    return read


def select_names(
    arms: Mapping[str, Mapping[tuple[str, str], Score]], names: Sequence[str] | None
) -> list[tuple[str, str]]:
    """Return the (task, name) keys that a comparison shows, in the order in which they were asked for or first found.

    Args:
        arms: Scores as ``read_arms`` returns them.
        names: Record names to show; None takes the summaries (``f1/mean``, ``accuracy`` …), or everything if there
            are no summaries.

    Raises:
        DataError: If no arm holds a name that was asked for.
    """
    found = {key: score for scores in arms.values() for key, score in scores.items()}
    if names is None:
        return [key for key, score in found.items() if score.is_summary] or list(found)
    chosen: list[tuple[str, str]] = []
    for name in names:
        hits = [key for key in found if key[1] == name]
        if not hits:
            raise DataError(f"no arm holds the number {name!r}; {near(name, [key[1] for key in found])}")
        chosen += hits
    return chosen


def score_like(scores: Iterable[Score]) -> list[Score]:
    """Return the numbers that stand for a task in a narrow table: its summaries of which more is better.

    A task that has none of these keeps its other summaries, and one without summaries keeps everything.
    """
    found = list(scores)
    summaries = [score for score in found if score.is_summary]
    return [score for score in summaries if score.higher_is_better] or summaries or found


def subgroup_name(subgroup: object) -> str:
    """Return a readable name of a record's subgroup, empty for all rows together.

    Example:
        >>> subgroup_name({"sex": "female", "age": "20-29"})
        'sex=female, age=20-29'
    """
    if subgroup is None or subgroup == "":
        return ""
    if isinstance(subgroup, Mapping):
        return ", ".join(f"{key}={value}" for key, value in subgroup.items())
    if isinstance(subgroup, (list, tuple)):
        return ", ".join(str(part) for part in subgroup)
    return str(subgroup)


def readable_metric(metric: str) -> str:
    """Return a metric's name as it is written in text.

    Example:
        >>> readable_metric("f1"), readable_metric("mean_class_accuracy")
        ('F1', 'mean class accuracy')
    """
    words = metric.replace("_", " ").replace("/", " ").split()
    return " ".join(word.upper() if word.lower() in _ACRONYMS else word for word in words)


def facs_name(output: str) -> str | None:
    """Return the FACS name of an output that is an action unit, None for any other output.

    Example:
        >>> facs_name("AU12"), facs_name("happiness")
        ('lip corner puller', None)
    """
    number = output[2:]
    return AU_NAMES.get(int(number)) if output.startswith("AU") and number.isdecimal() else None


def number_text(value: float, digits: int = 3) -> str:
    """Return a number for a table: an en dash if it does not exist, a true minus sign if it is negative.

    Example:
        >>> number_text(0.5), number_text(-0.25, 2), number_text(float("nan"))
        ('0.500', '−0.25', '–')
    """
    if not math.isfinite(value):
        return "–" if math.isnan(value) else ("∞" if value > 0 else "−∞")
    text = f"{value:.{digits}f}"
    # A number that rounds to zero has no sign.
    return text.lstrip("-") if float(text) == 0 else text.replace("-", "−")


def _is_parameter(output: str) -> bool:
    """Whether a name ends in a setting and not in an output: the threshold of ``fr/10``, the length of ``nme/box``."""
    return output.replace(".", "", 1).isdecimal() or output in NORMALISERS


def _whole(record: Record, name: str, key: str) -> int | None:
    value = _number(record, name, key)
    return None if math.isnan(value) else int(value)


def _number(record: Record, name: str, key: str) -> float:
    value = record.get(key)
    if value is None:
        return math.nan
    try:
        return float(value)  # type: ignore[arg-type]
    except (TypeError, ValueError):
        raise DataError(f"result record {name}: {key} is {value!r}; expected a number or null") from None
