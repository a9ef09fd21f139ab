# SPDX-License-Identifier: Apache-2.0
"""Holds a dataset against what was published of it and against itself, before anything is trained on it.

Every finding has a key, by which it can be accepted, and a level::

    ok         as published
    note       worth knowing: a known variant of the dataset, rows that reading left out, images without colour
    warning    look at it: a number that was recalled and differs, a file whose name lies about its format
    error      training would be on the wrong data
    accepted   a warning or an error that the user accepted by its key

Keys are those of ``affect.data.expected`` (``rows/part=train``, ``rate/au12_occurrence``, ``size``) and::

    skipped/<reason>        rows that reading left out
    labels/none             rows without any label
    labels/<task>           labels outside their range
    expression/<class>      declared classes that no row has
    groups/<column>         people, videos or photographs in more than one official part
    rows/duplicate          rows that show one face twice; rows/conflicting: with different labels
    images/<problem>        missing, empty, unreadable; images/extension: named as another format
    images/<pixels>         grey, palette, CMYK, 16-bit; images/turned: rotated by the camera's note
    points/<scheme>, box    labels far outside of their image
    near_duplicates         pictures of one scene in more than one official part
    protocol                parts of the chosen protocol
    notes                   what the reading noted: files that are missing, or that it passed over

A key that is accepted may hold wildcards: ``rate/*`` accepts every rate.
"""

from __future__ import annotations

import shlex
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from fnmatch import fnmatchcase
from pathlib import Path
from typing import Any

import numpy as np

from affect import labels
from affect.data.expected import FAIL_RATE, WARN_RATE, Expected, measure
from affect.data.headers import CMYK, DEEP, GREY, PALETTE, PROBLEMS, Headers
from affect.data.table import FaceTable, declared_type
from affect.errors import ConfigError, DataError, near, write_list

OK, NOTE, WARNING, ERROR, ACCEPTED = "ok", "note", "warning", "error", "accepted"
LEVELS = (ERROR, WARNING, ACCEPTED, NOTE, OK)
"""All levels, the gravest first."""

SYNTHETIC = "SYNTHETIC.md"
"""File in the root of a tree of built-in faces: counts of such a tree are not those of the dataset, and need not be."""

LEFT_OUT = "left out by dataset.leave_out"
"""Reason of rows that the user leaves out by a list of images."""

UNUSABLE = tuple(f"images/{problem}" for problem in PROBLEMS)
"""Keys of images that no training can read, whoever accepts them: they can only be left out."""

EXAMPLES = 10
"""How many names a finding lists."""

LOST = (
    *("image missing", "image is missing", "no image of a labelled frame", "label files without an image"),
    *("no video of", "the video ends before", "no folder of extracted frames", "label lines of a video without"),
)
"""Beginnings of readers' reasons to leave out labelled rows whose image ought to be there; that of a frame in which
nobody's face was detected is none of them."""

FEW_LOST = 0.01
"""Share of labelled rows beyond which lost images are an error: a part of the delivery was not copied or unpacked."""

FAR = 0.5
"""By how many image sides a point may lie outside of its image before it counts as far outside."""

MANY = 0.05
"""Share of rows beyond which labels that do not fit their images are taken for those of other images."""

_BLOCK = 65536
_FEW = 3
_NO_LABELS = frozenset({"image", "subject", "sequence", "part", "frame", "box"})
_ELSEWHERE = (
    *("skipped/", "labels/", "expression/", "groups/", "images/", "points/"),
    *("rows/duplicate", "rows/conflicting", "box", "near_duplicates", "protocol", "size", "notes"),
)
"""Beginnings of the keys that only the whole check can find."""


@dataclass(frozen=True)
class Finding:
    """One thing that was looked at.

    Attributes:
        key: By which it is accepted.
        level: One of ``LEVELS``.
        sentence: What was found, for a reader.
        measured: The number that was found, where it is one.
        expected: The number that was expected, where there is one.
        source: Who published it.
        examples: Names of the first rows concerned.
    """

    key: str
    level: str
    sentence: str
    measured: Any = None
    expected: Any = None
    source: str = ""
    examples: Sequence[str] = field(default=())


# ------------------------------------------------------------------------------------------ published numbers


def compare(
    table: FaceTable,
    expected: Iterable[Expected],
    image_sizes: Mapping[tuple[int, int], int] | None = None,
    accept: Sequence[str] = (),
    synthetic: bool = False,
) -> list[Finding]:
    """Return a finding for each published number.

    Whole numbers that were counted in a public list are exact; another number is an error, unless it is that of a
    known variant. Rates may differ by ``WARN_RATE`` without a word and by ``FAIL_RATE`` with a warning. Numbers that
    were recalled never give more than a warning. Where the rows are those of a known variant, other counts and rates
    that nobody published of it are only noted, as long as the rows that it has less or more can explain them.

    Args:
        table: The dataset as read.
        expected: Published numbers.
        image_sizes: Number of images by (width, height); None skips ``size``.
        accept: Keys that the user accepts; keys of other findings are let pass.
        synthetic: Whether the tree holds built-in faces, so that differences are only noted.
    """
    expected = tuple(expected)
    whole = next((entry for entry in expected if entry.key == "rows" and len(table) in entry.variants), None)
    found = []
    for entry in expected:
        if entry.key == "size":
            finding = _compare_size(entry, image_sizes)
            found += [] if finding is None else [finding]
        else:
            found.append(_compare_number(table, entry, whole))
    if synthetic:
        found = [_as_synthetic(finding) for finding in found]
    return [_accept(finding, accept) for finding in found]


def _as_synthetic(finding: Finding) -> Finding:
    if finding.level not in (WARNING, ERROR):
        return finding
    return replace(finding, level=NOTE, sentence=f"{finding.sentence} (synthetic tree: not compared)")


def _compare_number(table: FaceTable, entry: Expected, whole: Expected | None) -> Finding:
    """Return the finding on a number; ``whole`` is the entry of all rows if they are as many as a variant has."""
    measured = measure(table, entry.key)
    rate = entry.key.startswith("rate/")
    assert isinstance(entry.value, int | float)
    shown = "no labelled cell" if measured is None else _number(measured, rate)
    wanted = _number(entry.value, rate)

    def finding(level: str, sentence: str) -> Finding:
        return Finding(entry.key, level, sentence, measured, entry.value, entry.source)

    if measured is not None and _agrees(measured, entry.value, rate):
        return finding(OK, f"{shown}, as published ({entry.source})")
    variant = None if measured is None or rate else entry.variants.get(round(measured))
    if variant is not None:
        return finding(NOTE, f"{shown} is the number of {variant}; {wanted} elsewhere ({entry.source})")
    if whole is not None and measured is not None and _explained(table, measured, entry, whole):
        variant = whole.variants[len(table)]
        return finding(NOTE, f"{shown}: the number of {variant} is not known; {wanted} elsewhere ({entry.source})")
    gone = _rows_left_out(table)
    if gone and measured is not None and not entry.key.startswith("distinct/"):
        # So many rows more would have been counted, or less.
        short = gone / len(table) + WARN_RATE if rate else gone
        if abs(measured - entry.value) <= short + 1e-9 and (rate or measured < entry.value):
            return finding(NOTE, f"{shown}, {wanted} published ({entry.source}): {gone:,} rows are {LEFT_OUT}")
    sentence = f"found {shown}, expected {wanted} ({_named(entry)})"
    if entry.variants:
        sentence += "; known variants: " + ", ".join(f"{count:,} ({whose})" for count, whose in entry.variants.items())
    close = rate and measured is not None and abs(measured - entry.value) <= FAIL_RATE + 1e-9
    return finding(ERROR if entry.found and not close else WARNING, sentence)


def _rows_left_out(table: FaceTable) -> int:
    skipped = table.metadata.get("skipped")
    count = skipped.get(LEFT_OUT) if isinstance(skipped, Mapping) else None
    return count if isinstance(count, int) else 0


def _named(entry: Expected) -> str:
    """Return the source of a number, and that nobody has checked it where it does not say so itself."""
    return entry.source if entry.found or "recalled" in entry.source else f"{entry.source}; recalled, not checked"


def _explained(table: FaceTable, measured: float, entry: Expected, whole: Expected) -> bool:
    """Return whether a variant whose number is not known may have it, by how many rows it differs in."""
    kind = entry.key.partition("/")[0]
    if whole.variants[len(table)] in entry.variants.values() or kind == "distinct":
        return False  # Its number is known, or people are missing, which no variant lacks.
    assert isinstance(entry.value, int | float)
    assert isinstance(whole.value, int | float)
    rows, difference = abs(len(table) - whole.value), abs(measured - entry.value)
    return difference <= (rows / len(table) + WARN_RATE if kind == "rate" else rows) + 1e-9


def _agrees(measured: float, value: float, rate: bool) -> bool:
    # Published rates are decimal: a difference of exactly the tolerance is inside of it.
    return abs(measured - value) <= WARN_RATE + 1e-9 if rate else round(measured) == round(value)


def _number(value: float, rate: bool) -> str:
    return f"{value:.4f}" if rate else f"{round(value):,}"


def _compare_size(entry: Expected, image_sizes: Mapping[tuple[int, int], int] | None) -> Finding | None:
    if image_sizes is None:
        return None
    assert isinstance(entry.value, tuple | list)
    wanted = (int(entry.value[0]), int(entry.value[1]))
    total = sum(image_sizes.values())
    others = {size: count for size, count in image_sizes.items() if tuple(size) != wanted}
    shown = f"{wanted[0]} x {wanted[1]}"
    if not others:
        level, sentence = OK, f"all {total:,} images are {shown}, as published ({entry.source})"
        if not total:
            level, sentence = WARNING, f"no image could be measured; expected {shown} ({entry.source})"
        return Finding(entry.key, level, sentence, wanted if total else None, wanted, entry.source)
    common = sorted(others, key=lambda size: (-others[size], size))
    listed = ", ".join(f"{w} x {h} ({others[w, h]:,})" for w, h in common[:3]) + (", …" if len(common) > 3 else "")
    sentence = f"{sum(others.values()):,} of {total:,} images are not {shown} but {listed} ({_named(entry)})"
    commonest = max(image_sizes, key=lambda size: (image_sizes[size], size))
    return Finding(entry.key, ERROR if entry.found else WARNING, sentence, commonest, wanted, entry.source)


# -------------------------------------------------------------------------------------------------- accepting


def accepted(findings: Sequence[Finding], accept: Sequence[str]) -> list[Finding]:
    """Return the findings with warnings and errors accepted whose key is named; ``require_known`` tells wrong keys."""
    return [_accept(finding, accept) for finding in findings]


def require_known(findings: Iterable[Finding], accept: Sequence[str], elsewhere: bool = False) -> None:
    """Raise ``ConfigError`` if a key names no finding.

    Args:
        findings: All findings.
        accept: Keys.
        elsewhere: Whether keys of findings that only the whole check makes may be named as well.
    """
    known = list(dict.fromkeys(finding.key for finding in findings))
    for key in accept:
        if not any(_matches(name, [key]) for name in known) and not (elsewhere and key.startswith(_ELSEWHERE)):
            raise ConfigError(f"accept={key}: no finding has this key; {near(key, known)}")


def _accept(finding: Finding, accept: Sequence[str]) -> Finding:
    if finding.level not in (WARNING, ERROR) or not _matches(finding.key, accept):
        return finding
    return replace(finding, level=ACCEPTED)


def _matches(key: str, accept: Sequence[str]) -> bool:
    return key in accept or any(fnmatchcase(key, pattern) for pattern in accept)


def accept_words(findings: Iterable[Finding]) -> str:
    """Return ``accept=[…]`` for the keys of findings, ready to be pasted into a shell; empty if there is none.

    More than ``_FEW`` keys of one kind are written as one with a wildcard. Images that cannot be used are not among
    them: a training that accepted them would stop at the first one.
    """
    keys = list(dict.fromkeys(finding.key for finding in findings if finding.key not in UNUSABLE))
    kinds = [key.partition("/")[0] if "/" in key else "" for key in keys]
    many = {kind for kind in kinds if kind and kinds.count(kind) > _FEW}
    short = dict.fromkeys(f"{kind}/*" if kind in many else key for key, kind in zip(keys, kinds, strict=True))
    return shlex.quote(write_list("accept", list(short))) if short else ""


def is_synthetic(root: str | Path) -> bool:
    """Return whether a tree holds built-in faces in a dataset's layout (``affect synthesize layout=…``)."""
    return (Path(root).expanduser() / SYNTHETIC).is_file()


def require_expected(
    table: FaceTable,
    expected: Iterable[Expected],
    accept: Sequence[str] = (),
    name: str = "dataset",
    root: str | Path | None = None,
) -> list[Finding]:
    """Return the findings on a table's counts and rates, which take no look at an image.

    Args:
        table: The dataset as read.
        expected: Published numbers.
        accept: Keys that the user accepts; those of other findings are let pass (``require_known`` tells).
        name: Name of the dataset for messages.
        root: Folder as delivered, where the table is one of crops that lie elsewhere.

    Raises:
        DataError: If an error among them is not accepted.
    """
    said = table.metadata.get("synthetic")  # crops know what they were cut from
    synthetic = bool(said) if said is not None else any(is_synthetic(at) for at in (table.root, root) if at is not None)
    findings = compare(table, expected, accept=accept, synthetic=synthetic)
    wrong = errors(findings)
    if wrong:
        more = f" (and {len(wrong) - 1} more: {', '.join(f.key for f in wrong[1:4])})" if len(wrong) > 1 else ""
        raise DataError(
            f"{name}: {wrong[0].key}: {wrong[0].sentence}{more}; affect check dataset={name} tells more, "
            f"{accept_words(wrong)} goes on all the same"
        )
    return findings


def errors(findings: Iterable[Finding]) -> list[Finding]:
    """Return the findings that stop a training."""
    return [finding for finding in findings if finding.level == ERROR]


# ------------------------------------------------------------------------------------------------------ table


def examine_table(table: FaceTable, group: str | None = None, expected: Iterable[Expected] = ()) -> list[Finding]:
    """Return what a table tells of itself: skipped rows, labels, groups in two parts, duplicates.

    Args:
        table: The dataset as read.
        group: Column whose values never straddle two parts; None checks people alone.
        expected: Published numbers: lost images are no error where the number of rows is known to be right.
    """
    columns = [column for column in dict.fromkeys((group, "subject")) if column is not None and column != "image"]
    return [
        *_notes(table),
        *_skipped(table, any(_counted(table, entry) for entry in expected)),
        *_labels(table),
        *_classes(table),
        *(finding for column in columns if (finding := _groups(table, column)) is not None),
        *_duplicates(table),
    ]


def label_columns(table: FaceTable) -> list[str]:
    """Return the columns that hold labels, sorted."""
    return sorted(name for name in table.names - _NO_LABELS if declared_type(name) is not None)


def _counted(table: FaceTable, entry: Expected) -> bool:
    """Return whether the table has the rows that were counted by others, or those of a known variant."""
    return entry.key == "rows" and bool(entry.found) and len(table) in (entry.value, *entry.variants)


def _notes(table: FaceTable) -> list[Finding]:
    notes = table.metadata.get("notes")
    return [Finding("notes", WARNING, str(note)) for note in notes] if isinstance(notes, list | tuple) else []


def _skipped(table: FaceTable, complete: bool) -> list[Finding]:
    given, names = table.metadata.get("skipped"), table.metadata.get("skipped_examples")
    counts: Mapping[str, Any] = given if isinstance(given, Mapping) else {}
    lost = sum(count for reason, count in counts.items() if reason.startswith(LOST))
    labelled = len(table) + lost
    incomplete = not complete and lost > FEW_LOST * labelled
    found = []
    for reason, count in counts.items():
        listed = names.get(reason, ()) if isinstance(names, Mapping) else ()
        assert isinstance(listed, Sequence)
        examples = [str(name) for name in listed][:EXAMPLES]
        level, sentence = NOTE, f"{count:,} rows left out: {reason}"
        if incomplete and reason.startswith(LOST):
            level = ERROR
            sentence += f", {count / labelled:.1%} of those with labels: copy or unpack the images again"
        found.append(Finding(f"skipped/{reason}", level, sentence, count, examples=examples))
    return found


def _labels(table: FaceTable) -> list[Finding]:
    found = []
    known = np.zeros(len(table), bool)
    for name in label_columns(table):
        known |= table.column(name).is_valid().to_numpy(zero_copy_only=False)
    without = np.flatnonzero(~known)
    if len(without):
        level = ERROR if len(without) == len(table) else NOTE
        sentence = f"{_share(len(without), len(table), 'rows')} have no label at all"
        found.append(Finding("labels/none", level, sentence, len(without), 0, examples=_names(table, without)))
    for name, task in _tasks(table).items():
        try:
            task.bind([table])
            task.check(table)
        except (DataError, ConfigError) as error:
            found.append(Finding(f"labels/{name}", ERROR, str(error)))
    return found


def _tasks(table: FaceTable) -> dict[str, Any]:
    """Return the tasks whose labels a table holds: they know the ranges."""
    from affect import tasks

    plain = {
        "au": tasks.AUOccurrence(),
        "au_intensity": tasks.AUIntensity(),
        "expression": tasks.Expression(),
        "valence_arousal": tasks.ValenceArousal(),
        "pose": tasks.HeadPose(),
        "attributes": tasks.Attributes(),
    }
    beginnings = {
        "au": lambda name: name.startswith("au") and name.endswith("_occurrence"),
        "au_intensity": lambda name: name.startswith("au") and name.endswith("_intensity"),
        "expression": lambda name: name == "expression" or name.startswith("expression_"),
        "valence_arousal": lambda name: name in labels.AFFECT_AXES,
        "pose": lambda name: name.startswith("pose_"),
        "attributes": lambda name: name.startswith("attribute_"),
    }
    columns = label_columns(table)
    return {name: task for name, task in plain.items() if any(beginnings[name](column) for column in columns)}


def _classes(table: FaceTable) -> list[Finding]:
    if "expression" not in table.names:
        return []
    counts = class_counts(table)
    return [
        Finding(f"expression/{name}", WARNING, f"no row is labelled {name}, a class of the dataset", 0)
        for name in table.expressions
        if not counts.get(name) and labels.expression_column(name) not in table.names
    ]


def class_counts(table: FaceTable) -> dict[str, int]:
    """Return the rows of each expression class, in the dataset's order; empty without named expressions."""
    if "expression" not in table.names:
        return {}
    codes, names = table.codes("expression")
    counts = dict(zip(names.tolist(), np.bincount(codes[codes >= 0], minlength=len(names)).tolist(), strict=True))
    order = [*(name for name in table.expressions if name in counts), *sorted(set(counts) - set(table.expressions))]
    return {name: counts[name] for name in order}


def positive_rates(table: FaceTable) -> dict[str, float]:
    """Return the mean of the labelled cells of each column of action units and attributes."""
    chosen = [n for n in label_columns(table) if n.endswith("_occurrence") or n.startswith("attribute_")]
    rates = {name: measure(table, f"rate/{name}") for name in chosen}
    return {name: rate for name, rate in rates.items() if rate is not None}


def _groups(table: FaceTable, column: str) -> Finding | None:
    """Return whether a value of ``column`` lies in several official parts; None where that cannot be asked."""
    if "part" not in table.names or column not in table.names:
        return None
    codes, names = table.codes(column)
    key, unknown = f"groups/{column}", int((codes < 0).sum())
    if unknown == len(table):
        return Finding(
            key, WARNING, f"no row names its {column}: nobody can tell whether one lies in two parts", unknown, 0
        )
    found = _straddling(table, codes, [str(name) for name in names], key, column)
    if not unknown:
        return found
    sentence = f"{found.sentence}; {_share(unknown, len(table), 'rows')} do not name theirs"
    return replace(found, level=NOTE if found.level == OK else found.level, sentence=sentence)


def _straddling(table: FaceTable, codes: np.ndarray, names: Sequence[str], key: str, what: str) -> Finding:
    parts, part_names = table.codes("part")
    used = (codes >= 0) & (parts >= 0)
    pairs = np.unique(codes[used] * max(len(part_names), 1) + parts[used])
    owners, first, count = np.unique(pairs // max(len(part_names), 1), return_index=True, return_counts=True)
    several = np.flatnonzero(count > 1)
    if not len(several):
        return Finding(key, OK, f"no {what} lies in two official parts", 0, 0)
    shown = []
    for k in several[:EXAMPLES]:
        of = [str(part_names[p]) for p in pairs[first[k] : first[k] + count[k]] % len(part_names)]
        shown.append(f"{names[owners[k]]} ({', '.join(of)})")
    sentence = f"{len(several):,} of {len(owners):,} {what}s lie in two official parts: a model would be tested on them"
    return Finding(key, ERROR, sentence, len(several), 0, examples=shown)


def _duplicates(table: FaceTable) -> list[Finding]:
    """Return findings on rows that show one face twice; several faces of one image are no duplicates."""
    images, paths = table.codes("image")
    repeated = np.flatnonzero(np.bincount(images, minlength=len(paths))[images] > 1)
    if not len(repeated):
        return []
    places = [name for name in ("box", *(s.column for s in labels.SCHEMES.values())) if name in table.names]
    keys = [images[repeated].astype(np.float64)[:, None], *(_comparable(table, name, repeated) for name in places)]
    face = np.unique(np.concatenate(keys, 1), axis=0, return_inverse=True)[1].reshape(-1)
    twice = np.bincount(face)[face] > 1
    repeated, face = repeated[twice], face[twice]
    if not len(repeated):
        return []
    kinds = len(np.unique(face))
    said = [face.astype(np.float64)[:, None]]
    said += [_comparable(table, name, repeated) for name in label_columns(table)]
    distinct = np.unique(np.concatenate(said, 1), axis=0)[:, 0]
    conflicting = np.flatnonzero(np.isin(face, distinct[:-1][np.diff(distinct) == 0]))
    order = repeated[np.argsort(face, kind="stable")]
    examples = list(dict.fromkeys(_names(table, order, limit=None)))[:EXAMPLES]
    found = [
        Finding(
            "rows/duplicate",
            WARNING,
            f"{len(repeated) - kinds:,} rows show a face that another row shows ({kinds:,} such faces)",
            len(repeated) - kinds,
            0,
            examples=examples,
        )
    ]
    if len(conflicting):
        faces = len(np.unique(face[conflicting]))
        names = list(dict.fromkeys(_names(table, repeated[conflicting], limit=None)))[:EXAMPLES]
        sentence = f"{faces:,} faces are labelled twice, differently"
        found.append(Finding("rows/conflicting", WARNING, sentence, faces, 0, examples=names))
    if "part" in table.names:
        codes = np.full(len(table), -1)
        codes[repeated] = images[repeated]
        found.append(_straddling(table, codes, [str(path) for path in paths], "groups/image", "image"))
    return found


def _comparable(table: FaceTable, name: str, rows: np.ndarray) -> np.ndarray:
    """Return a column as numbers ``(N, width)`` that are equal where its cells are; missing is a number of its own."""
    if name == "expression":
        return table.codes(name)[0][rows].astype(np.float64)[:, None]
    values, valid = table.numbers(name, rows)
    flat = np.nan_to_num(values.reshape(len(rows), -1).astype(np.float64), nan=-1e9)
    return np.where(valid[:, None], flat, -2e9)


def _names(table: FaceTable, rows: np.ndarray, limit: int | None = EXAMPLES) -> list[str]:
    chosen = rows if limit is None else rows[:limit]
    return [str(name) for name in table.strings("image", chosen)[0]]


def _share(count: int, total: int, what: str) -> str:
    return f"{count:,} of {total:,} {what}"


# ----------------------------------------------------------------------------------------------------- images


def distinct_images(table: FaceTable) -> tuple[np.ndarray, np.ndarray]:
    """Return one row of each image ``(M,)``, in the table's order, and the place of each row's image there ``(N,)``."""
    codes = table.codes("image")[0]
    _, first, inverse = np.unique(codes, return_index=True, return_inverse=True)
    order = np.argsort(first)
    place = np.empty(len(order), np.int64)
    place[order] = np.arange(len(order))
    return first[order], place[inverse.reshape(-1)]


def examine_images(table: FaceTable, headers: Headers, total: int) -> list[Finding]:
    """Return findings on the image files.

    Args:
        table: The dataset as read.
        headers: Of the images that were looked at.
        total: Images of the dataset.
    """
    found = []
    looked = len(headers.rows)
    what = "images" if looked == total else f"images of a sample of {total:,}"
    sentences = {
        "missing": "are not there: check dataset.root, or drop their rows",
        "empty": "have 0 bytes: copy them again",
        "unreadable": "cannot be decoded: no images, or cut short; copy them again",
    }
    for problem in PROBLEMS:
        at = np.flatnonzero(headers.problems == problem)
        if len(at):
            sentence = f"{_share(len(at), looked, what)} {sentences[problem]}"
            examples = _names(table, headers.rows[at])
            found.append(Finding(f"images/{problem}", ERROR, sentence, len(at), 0, examples=examples))
    at = np.flatnonzero(headers.lying)
    if len(at):
        kinds = ", ".join(sorted(set(headers.kinds[at].tolist())))
        sentence = f"{_share(len(at), looked, what)} are named as another format than they have ({kinds})"
        examples = _names(table, headers.rows[at])
        found.append(Finding("images/extension", WARNING, sentence, len(at), 0, examples=examples))
    notes = {
        GREY: (headers.pixels == GREY, "are grey; they are read with three equal channels"),
        PALETTE: (headers.pixels == PALETTE, "have a palette; they are read as RGB"),
        CMYK: (headers.pixels == CMYK, "are CMYK; they are read as RGB"),
        DEEP: (headers.pixels == DEEP, "have 16 bits per channel; they are read with 8"),
        "turned": (headers.turned, "were turned by the camera; they and their labels are taken upright"),
    }
    for name, (chosen, said) in notes.items():
        at = np.flatnonzero(chosen)
        if len(at):
            sentence = f"{_share(len(at), looked, what)} {said}"
            examples = _names(table, headers.rows[at])
            found.append(Finding(f"images/{name}", NOTE, sentence, len(at), examples=examples))
    return found


def size_counts(headers: Headers) -> dict[tuple[int, int], int]:
    """Return the number of images of each (width, height), those left out that cannot be used."""
    known = headers.sizes[(headers.sizes > 0).all(1) & (headers.problems == "")]
    sizes, counts = np.unique(known, axis=0, return_counts=True)
    return {(int(w), int(h)): int(count) for (w, h), count in zip(sizes, counts, strict=True)}


def value_counts(values: np.ndarray) -> dict[str, int]:
    """Return how often each text occurs, empty ones left out."""
    names, counts = np.unique(values[values != ""].astype(str), return_counts=True)
    return dict(zip(names.tolist(), counts.tolist(), strict=True))


def examine_points(table: FaceTable, rows: np.ndarray, sizes: np.ndarray) -> list[Finding]:
    """Return findings on points and boxes that do not fit their images.

    Args:
        table: The dataset as read.
        rows: Rows whose image's size is known ``(N,)``.
        sizes: Width and height of their images ``(N, 2)``.
    """
    found = []
    checks = {scheme.column: f"points/{scheme.name}" for scheme in labels.SCHEMES.values()}
    for column, key in {**checks, "box": "box"}.items():
        if column not in table.names:
            continue
        bad, labelled = [], 0
        for start in range(0, len(rows), _BLOCK):
            block = rows[start : start + _BLOCK]
            values, valid = table.numbers(column, block)
            judge = _bad_box if column == "box" else _far_points
            labelled += int(valid.sum())
            bad.append(block[valid & judge(values, sizes[start : start + _BLOCK].astype(np.float32))])
        at = np.concatenate(bad) if bad else np.empty(0, np.int64)
        if len(at):
            many = len(at) > MANY * labelled
            said = "have a box without area or beside the image" if column == "box" else "have points far outside"
            advice = ": are they of other images (aligned against as taken)?" if many else ""
            sentence = f"{_share(len(at), labelled, 'rows')} {said} ({column}){advice}"
            level = ERROR if many else WARNING
            found.append(Finding(key, level, sentence, len(at), 0, examples=_names(table, at)))
    return found


def _far_points(values: np.ndarray, sizes: np.ndarray) -> np.ndarray:
    """Return where a point lies far outside, or most points lie outside ``(N,)``; points that are missing are NaN."""
    points = values.reshape(len(values), -1, 2)
    side = sizes[:, None]
    beyond = np.maximum(-points, points - (side - 1)) / np.maximum(side, 1)
    beyond = np.nan_to_num(beyond.max(2), nan=-1.0)
    return (beyond > FAR).any(1) | ((beyond > 0).mean(1) > 0.5)


def _bad_box(values: np.ndarray, sizes: np.ndarray) -> np.ndarray:
    left, top, right, bottom = values.T
    inside = (right > 0) & (bottom > 0) & (left < sizes[:, 0]) & (top < sizes[:, 1])
    return ~((right > left) & (bottom > top) & inside)


def examine_near_duplicates(table: FaceTable, groups: np.ndarray) -> list[Finding]:
    """Return whether near-duplicates lie in two official parts.

    Args:
        table: The dataset as read.
        groups: Group of each row ``(N,)``; see ``affect.data.duplicates``.
    """
    sizes = np.bincount(groups)
    members = int(sizes[sizes > 1].sum())
    kinds = int((sizes > 1).sum())
    sentence = f"{members:,} rows in {kinds:,} groups of near-duplicates" if kinds else "no near-duplicates"
    found = [Finding("near_duplicates/groups", NOTE if kinds else OK, sentence, kinds)]
    if "part" not in table.names:
        return found
    first = np.full(len(sizes), len(table))
    np.minimum.at(first, groups, np.arange(len(table)))
    images = table.strings("image", np.minimum(first, len(table) - 1))[0]
    codes = np.where(sizes[groups] > 1, groups, -1)
    straddling = _straddling(table, codes, [str(name) for name in images], "near_duplicates", "near-duplicate")
    level = OK if straddling.level == OK else WARNING
    return [*found, replace(straddling, level=level)]


# ----------------------------------------------------------------------------------------------------- report


def part_counts(table: FaceTable, group: str) -> dict[str, dict[str, int]]:
    """Return rows and groups of each official part; rows of none come under ``none``."""
    if "part" not in table.names:
        return {}
    parts, names = table.codes("part")
    codes = table.codes(group)[0] if group in table.names else np.full(len(table), -1)
    counts = {}
    for k in [*range(len(names)), *([-1] if (parts < 0).any() else [])]:
        inside = codes[parts == k]
        distinct = len(np.unique(inside[inside >= 0])) + int((inside < 0).sum())
        counts[str(names[k]) if k >= 0 else "none"] = {"rows": len(inside), "groups": distinct}
    return counts


def sheet_rows(table: FaceTable, count: int, usable: np.ndarray | None = None, seed: int = 0) -> np.ndarray:
    """Return at most ``count`` rows spread over official parts and classes, sorted: a function of the table alone.

    Each kind (part and class) gives one row before any gives a second one.

    Args:
        table: The dataset as read.
        count: Most rows.
        usable: Which rows may be chosen ``(N,)``; None takes all.
        seed: Another seed gives other rows.
    """
    kinds = np.zeros(len(table), np.int64)
    for name in ("part", "expression"):
        if name in table.names:
            codes, names = table.codes(name)
            kinds = kinds * (len(names) + 1) + codes + 1
    random = np.random.default_rng(seed).permutation(len(table))
    random = random if usable is None else random[usable[random]]
    order = random[np.argsort(kinds[random], kind="stable")]
    starts = np.flatnonzero(np.diff(kinds[order], prepend=-1))
    turn = np.arange(len(order)) - np.repeat(starts, np.diff(starts, append=len(order)))
    return np.sort(order[np.argsort(turn, kind="stable")][:count])


def caption(table: FaceTable, row: int) -> str:
    """Return the labels of a row as one text; action units that do not occur are left out, V is valence, A arousal."""
    rows = np.array([row])
    parts = []
    for name in ("part", "subject", "expression"):
        if name in table.names:
            value, valid = table.strings(name, rows)
            parts += [str(value[0])] if valid[0] else []
    occurring: dict[str, float] = {}
    for name in label_columns(table):
        ending = name.rpartition("_")[2]
        if ending in ("occurrence", "intensity") and name.startswith("au"):
            values, valid = table.numbers(name, rows)
            if valid[0] and values[0] >= (0.5 if ending == "occurrence" else 1):
                occurring[f"AU{int(name[2:4])}"] = float(values[0])
    parts += [" ".join(occurring)] if occurring else []
    for name in labels.AFFECT_AXES:
        if name in table.names:
            values, valid = table.numbers(name, rows)
            parts += [f"{name[0].upper()} {values[0]:+.2f}"] if valid[0] else []
    attributes = [name for name in label_columns(table) if name.startswith("attribute_")]
    given = [name.removeprefix("attribute_").replace("_", " ") for name in attributes if _is_set(table, name, rows)]
    return ", ".join([*parts, *given[:4]]) or "no label"


def _is_set(table: FaceTable, name: str, rows: np.ndarray) -> bool:
    values, valid = table.numbers(name, rows)
    return bool(valid[0] and values[0] >= 0.5)
