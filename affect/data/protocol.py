# SPDX-License-Identifier: Apache-2.0
"""Which rows train, select and test: official parts or folds, always by whole groups.

A group (a person, a video, an image where a set knows neither) never straddles two parts. Which part a group falls
into depends on the group's name, the seed and the set of groups, never on the order of rows. The test part selects
nothing (but for the legacy rule ``best_on_test``, which says so): validation groups are held out of the training part.
"""

from __future__ import annotations

import hashlib
import os
import re
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace

import numpy as np

from affect.data.images import NEAR_DUPLICATES, NO_SUBJECT, Source
from affect.data.table import FaceTable
from affect.errors import ConfigError, DataError, near

TRAIN, VALIDATION, TEST = "train", "validation", "test"
PARTS = (TRAIN, VALIDATION, TEST)
"""The parts that every assignment has, in this order."""

SELECTIONS = ("best_val", "refit", "last", "best_on_test")
"""Rules that choose the weights of a run."""

MISSING_FACES = ("fallback", "drop", "negative")
"""What becomes of rows of a prepared table in whose photograph no face was found."""

FACE, FOUND = "face", "found"
"""Column of prepared tables that says where a crop comes from, and its value where the detector found the face."""

UNUSED_PART = "part neither trains, selects nor tests"
"""Reason that a row of an official part is left out."""

HASHED = "sha256:"
"""Prefix of a name that was hashed."""

IMAGES = "image files"
"""Name space of the files that trained a model, by name and content, where a table has no people."""

GROUPS_OF = " of tables"
"""What follows a column in the name space of its values, which count where tables have image files in common."""

KNOWN = 2048
"""Most hashes of image files, and of values of a column, that a checkpoint keeps of tables without people."""

_TRAINING_NAMES = ("train", "training")
_VALIDATION_NAMES = ("val", "valid", "validation", "dev")
_TEST_NAMES = ("test", "testing")
_SHOWN = 5


@dataclass(frozen=True)
class Protocol:
    """How a source is split and scored.

    Attributes:
        name: What results call the protocol.
        test: Name of the official test part (a value of the column ``part``; case does not matter, here and below), a
            list of such names that are tested together, index of the test fold, ``"all"`` to test on every row, or
            None: the official part ``test`` or ``testing``, fold 0 of a source without official parts.
        folds: Number of folds over groups where parts are not official.
        split_seed: Seed of folds and validation groups, independent of the seed of training.
        validation_fraction: Share of the training groups that are held out for selection; 0 for none.
        group: Column that replaces the source's own group; None keeps it.
        every: Training uses every n-th row.
        train: Official parts that train; None takes ``train`` where it exists, else all that do not test or select.
        validation: Official part that selects instead of held-out training groups; None takes ``val``, ``valid``,
            ``validation`` or ``dev`` where it is there and has no other use, and holds groups out otherwise.
        division: How the table has to divide people into parts (metadata ``division``) where a dataset offers several
            under the same names; None takes any.
        train_only: The source's test part is left out: it trains and selects, and others test.
        keep: Values that a row must have, by column; other rows are left out of every part and counted.
        missing_faces: What becomes of rows whose column ``face`` is not ``found``: ``fallback`` uses the crop that
            preparation fell back to, ``drop`` leaves them out of every part, ``negative`` lets them neither train nor
            select, and in evaluation every action unit counts as absent there.
        subsets: Columns by name; results of the test part are also given for the rows where the column is 1, or has
            the value of ``column=value``.
        headline: Names of metrics (``<task>/<metric>``) by name of their sum; printed first.
        allow_leak: Run although the same people train and test; every number is marked.
        f1_empty: F1 of an output that has neither positives nor positive predictions.
        selection: ``best_val`` (best on the validation part), ``refit`` (all training groups, for as many epochs as
            ``best_val`` chose), ``last``, or ``best_on_test`` (legacy: the test part selects).
    """

    name: str = "default"
    test: str | int | Sequence[str] | None = None
    folds: int = 5
    split_seed: int = 0
    validation_fraction: float = 0.15
    group: str | None = None
    every: int = 1
    train: Sequence[str] | None = None
    validation: str | None = None
    division: str | None = None
    train_only: bool = False
    keep: Mapping[str, Sequence] | None = None
    missing_faces: str = "fallback"
    subsets: Mapping[str, str] | None = None
    headline: Mapping[str, Sequence[str]] | None = None
    allow_leak: bool = False
    f1_empty: float = 0.0
    selection: str = "best_val"

    def __post_init__(self) -> None:
        for key in ("folds", "split_seed", "every"):
            value = getattr(self, key)
            if not isinstance(value, int | np.integer) or isinstance(value, bool):
                raise ConfigError(f"protocol.{key}={value}: give a whole number")
        if not isinstance(self.validation_fraction, int | float | np.number):
            raise ConfigError(f"protocol.validation_fraction={self.validation_fraction}: give a number in [0, 1)")
        for key in ("group", "division", "validation"):
            value = getattr(self, key)
            if value is not None and not isinstance(value, str):
                raise ConfigError(f"protocol.{key}={value}: give a name, or null")
        for key in ("keep", "subsets", "headline"):
            value = getattr(self, key)
            if value is not None and not isinstance(value, Mapping):
                raise ConfigError(f"protocol.{key}={value}: give a mapping, or null")
        if self.folds < 2:
            raise ConfigError(f"protocol.folds={self.folds}: at least 2 folds are needed")
        if isinstance(self.test, int) and not 0 <= self.test < self.folds:
            raise ConfigError(f"protocol.test={self.test}: folds are 0 to {self.folds - 1} (protocol.folds)")
        if _is_list(self.test) and not self.test_parts:
            raise ConfigError("protocol.test=[]: name at least one part")
        if not 0 <= self.validation_fraction < 1:
            raise ConfigError(f"protocol.validation_fraction={self.validation_fraction} must lie in [0, 1)")
        if self.every < 1:
            raise ConfigError(f"protocol.every={self.every} must be at least 1")
        if self.selection not in SELECTIONS:
            raise ConfigError(f"selection={self.selection}: {near(str(self.selection), SELECTIONS)}")
        if self.missing_faces not in MISSING_FACES:
            said = near(str(self.missing_faces), MISSING_FACES)
            raise ConfigError(f"protocol.missing_faces={self.missing_faces}: {said}")
        for column, values in (self.keep or {}).items():
            if not _is_list(values) or not len(values):
                raise ConfigError(f"protocol.keep.{column}={values}: give the list of values to keep")
        for name, terms in (self.headline or {}).items():
            if not _is_list(terms) or not len(terms):
                raise ConfigError(f"protocol.headline.{name}={terms}: give a list of <task>/<metric>")

    @property
    def test_parts(self) -> tuple[str, ...]:
        """Names of the official test parts that are asked for; empty for folds, everything, or the default."""
        if _is_list(self.test):
            return tuple(str(name) for name in self.test)  # type: ignore[union-attr]
        return (self.test,) if isinstance(self.test, str) and self.test != "all" else ()

    @property
    def test_name(self) -> str:
        """The test part as one word, for folders and tables."""
        return part_name(self.test)


def _is_list(value: object) -> bool:
    return isinstance(value, Sequence) and not isinstance(value, str)


def part_name(test: object) -> str:
    """Return ``protocol.test`` as one word.

    Example:
        >>> part_name(None), part_name(2), part_name(["common", "challenge"])
        ('test', '2', 'common+challenge')
    """
    if test is None:
        return TEST
    return "+".join(str(name) for name in test) if _is_list(test) else str(test)  # type: ignore[attr-defined]


@dataclass(frozen=True)
class Division:
    """How the rows of one source are used; all row indices are sorted int64.

    Attributes:
        rows: Rows of each part of ``PARTS``.
        unused: Rows that are left out, by reason.
        faceless: Rows without a found face by part, whatever became of them.
        leaks: Sentences on people or groups in two parts; only with ``protocol.allow_leak``.
        notes: What readers of results have to know of the split.
    """

    rows: dict[str, np.ndarray]
    unused: dict[str, np.ndarray] = field(default_factory=dict)
    faceless: dict[str, np.ndarray] = field(default_factory=dict)
    leaks: tuple[str, ...] = ()
    notes: tuple[str, ...] = ()


# ------------------------------------------------------------------------------------------ splitting groups


def split_groups(
    groups: Sequence[str] | np.ndarray,
    fractions: Sequence[float] | int,
    seed: int,
    stratify: Sequence | None = None,
    salt: str = "",
) -> np.ndarray:
    """Return for each group the index of its part, int64 ``(G,)``.

    Groups are ordered by a hash of their name and the seed, and the order is cut at the fractions. Parts differ from
    their exact share by less than one group, also within each stratum.

    Args:
        groups: Distinct names.
        fractions: Shares of the parts, which sum to 1, or the number of equal folds.
        seed: Another seed gives another, independent assignment.
        stratify: A class of each group; each class is cut at the fractions.
        salt: Tells apart splits with the same seed, so that they are independent.

    Example:
        >>> split_groups(["anna", "ben", "carl", "dora"], 2, seed=0).tolist()
        [1, 0, 0, 1]
    """
    shares = np.full(fractions, 1.0 / fractions) if isinstance(fractions, int) else np.asarray(fractions, float)
    if len(shares) < 1 or (shares < 0).any() or abs(shares.sum() - 1) > 1e-6:
        raise ConfigError(f"fractions {shares.tolist()} must be non-negative and sum to 1")
    count = len(groups)
    keys = np.fromiter((_hash(name, seed, salt) for name in groups), np.uint64, count)
    strata = np.zeros(count, np.int64)
    if stratify is not None:
        strata = np.unique(np.asarray(stratify).astype(str), return_inverse=True)[1]
    order = np.lexsort((keys, strata))
    # Ends of parts and strata on one line of groups, rounded once: shares are exact within one group everywhere.
    sizes = np.bincount(strata)
    ends = np.cumsum(sizes)
    cuts = np.floor(ends[:, None] * np.cumsum(shares)[None] + 0.5 - 1e-9).astype(np.int64)
    before = np.vstack([np.zeros((1, len(shares)), np.int64), cuts[:-1]])
    cuts = np.maximum.accumulate(cuts - before, axis=1)
    cuts[:, -1] = sizes
    place = np.arange(count) - (ends - sizes)[strata[order]]
    part = np.empty(count, np.int64)
    part[order] = (place[:, None] >= cuts[strata[order]]).sum(1)
    return part


def _hash(name: str, seed: int, salt: str) -> int:
    return int.from_bytes(hashlib.blake2b(f"{salt}\0{seed}\0{name}".encode(), digest_size=8).digest(), "little")


def group_codes(table: FaceTable, column: str) -> tuple[np.ndarray, np.ndarray]:
    """Return the group of each row as an index ``(N,)`` and the groups' names ``(G,)``.

    A row whose group is not known is a group of its own, under the name of its image.
    """
    if column not in table.names:
        raise DataError(f"the table has no column {column} to split by; {near(column, table.names)}")
    codes, names = table.codes(column)
    alone = codes < 0
    if alone.any():
        codes[alone] = len(names) + np.arange(alone.sum())
        names = np.concatenate([names, table.strings("image", np.flatnonzero(alone))[0]])
    return codes, names


# ------------------------------------------------------------------------------------------- assigning rows


def assign(source: Source, protocol: Protocol) -> dict[str, np.ndarray]:
    """Return the rows of each part of ``PARTS``, sorted int64; see ``divide``."""
    return divide([source], [protocol])[0].rows


def divide(sources: Sequence[Source], protocols: Sequence[Protocol]) -> list[Division]:
    """Return how the rows of each source are used.

    A source that knows only some official parts gives empty rows for the others; ``require_parts`` checks a whole
    list of sources. Sources with the same people (metadata ``people``) hold out the same people, and nobody of them
    may lie in two parts, by whatever column groups are built.

    Args:
        sources: Sources of one training or evaluation.
        protocols: The protocol of each.

    Raises:
        DataError: If the test part does not exist, a group or a person lies in two parts, too few groups remain for
            validation, or folds are more than groups.
    """
    drafts = [_Draft(source, protocol) for source, protocol in zip(sources, protocols, strict=True)]
    clusters: dict[tuple, list[_Draft]] = {}
    for index, draft in enumerate(drafts):
        if draft.holds_out:
            clusters.setdefault(draft.cluster(index), []).append(draft)
    for cluster in clusters.values():
        _hold_out(cluster)
    divisions = [
        replace(division, notes=(*division.notes, *_deliveries(sources[: k + 1])))
        for k, division in enumerate(draft.division() for draft in drafts)
    ]
    selecting = {protocol.selection for protocol in protocols} != {"best_on_test"}
    shared = shared_people(sources, [division.rows for division in divisions], PARTS if selecting else (TRAIN, TEST))
    if shared and not any(protocol.allow_leak for protocol in protocols):
        raise DataError(
            f"{'; '.join(shared)}; keep each in one part (protocol.group={identity_column(sources[0].table)}, or one "
            "source with all labels), test on others, leave these out (protocol.keep), or let protocol.allow_leak=true "
            "mark every number"
        )
    if shared:
        divisions[0] = replace(divisions[0], leaks=(*divisions[0].leaks, *shared))
    return divisions


class _Draft:
    """One source on its way to a ``Division``: parts assigned, groups not yet held out."""

    def __init__(self, source: Source, protocol: Protocol) -> None:
        self.source, self.protocol = source, protocol
        table = source.table
        self.column = protocol.group or source.group
        _require_division(source, protocol)
        self.codes, self.names = group_codes(table, self.column)
        self.unused: dict[str, np.ndarray] = {}
        self.leaks: tuple[str, ...] = ()
        self.notes: tuple[str, ...] = ()
        self.faceless = faceless_rows(table)
        # What is kept together is one unit where we choose the parts; official parts are taken as they are.
        self.units, self.unit_names = together(source, self.codes, self.names)
        part = self._assigned()
        left = part >= 0
        if not left.all():
            self.unused[UNUSED_PART] = np.flatnonzero(~left)
        for column, values in (protocol.keep or {}).items():
            kept = kept_rows(source, column, values)
            reason = f"{column} is none of {', '.join(str(value) for value in values)} (protocol.keep)"
            self._leave_out(reason, left & ~kept)
            left &= kept
        self.part = np.where(left, part, -1)
        if protocol.test != "all" and not self.by_people:  # ``divide`` asks after people, whatever the group is.
            leak = find_leak(self.part, self.codes, self.names, f"{source.name}, column {self.column}")
            if leak and not protocol.allow_leak:
                raise DataError(f"{leak}; set protocol.group to a column that keeps them apart, or mend the parts")
            self.leaks = (leak,) if leak else ()
        self.missing = np.zeros(len(table), bool)
        self.missing[self.faceless] = True
        if protocol.missing_faces == "drop":
            self._leave_out("no face found (protocol.missing_faces=drop)", left & self.missing)
        self.usable = ~self.missing if protocol.missing_faces != "fallback" else np.ones(len(table), bool)
        self.whole_training = np.flatnonzero((self.part == 0) & self.usable)
        self.held = np.zeros(len(table), bool)

    def _assigned(self) -> np.ndarray:
        """Return the index of ``PARTS`` of each row, -1 for unused ones."""
        source, protocol = self.source, self.protocol
        if protocol.test == "all":
            return np.full(len(source.table), 0 if protocol.train_only else 2, np.int64)
        part = _official(source, protocol)
        if protocol.train_only:
            part = np.zeros(len(source.table), np.int64) if part is None else np.where(part == 2, -1, part)
        elif part is None:
            part = _folds(source, protocol, self.units, self.unit_names)
        if protocol.selection == "refit":
            return np.where(part == 1, 0, part)  # what selected the number of epochs trains, too
        if protocol.selection == "best_on_test":
            return np.where(part == 1, -1, part)
        return part

    def _leave_out(self, reason: str, rows: np.ndarray) -> None:
        if rows.any():
            self.unused[reason] = np.flatnonzero(rows)

    @property
    def by_people(self) -> bool:
        """Whether groups are people that other sources may show as well."""
        return bool(self.source.table.metadata.get("people")) and self.column == identity_column(self.source.table)

    @property
    def holds_out(self) -> bool:
        """Whether validation groups have to be held out of the training rows."""
        protocol = self.protocol
        if protocol.selection in ("refit", "best_on_test") or protocol.validation is not None:
            return False
        return protocol.validation_fraction > 0 and len(self.whole_training) > 0 and not (self.part == 1).any()

    def cluster(self, index: int) -> tuple:
        """Return a key that sources share whose groups are held out together."""
        own = ("people", self.source.table.metadata["people"]) if self.by_people else ("source", index)
        return (*own, self.protocol.validation_fraction, self.protocol.split_seed)

    def division(self) -> Division:
        """Return the rows of the parts, with ``every``, ``missing_faces`` and the selection rule applied."""
        protocol = self.protocol
        part = np.where(self.held & (self.part == 0), 1, self.part)
        whole = {name: np.flatnonzero(part == k) for k, name in enumerate(PARTS)}
        if protocol.selection == "best_on_test":
            whole[VALIDATION] = whole[TEST]
        usable = {name: rows[self.usable[rows]] for name, rows in whole.items()}
        if protocol.missing_faces == "negative":
            self._leave_out(
                "no face found, trains and selects nothing (protocol.missing_faces=negative)",
                self.missing & ((part == 0) | (part == 1)),
            )
            usable[TEST] = whole[TEST]
        faceless = {name: rows[self.missing[rows]] for name, rows in whole.items()}
        usable[TRAIN] = usable[TRAIN][:: protocol.every]
        return Division(usable, self.unused, faceless, self.leaks, self.notes)


def _require_division(source: Source, protocol: Protocol) -> None:
    """Raise ``DataError`` if the table's parts are another division of the people under the same names."""
    found = source.table.metadata.get("division")
    if protocol.division and found and found != protocol.division and not protocol.train_only:
        raise DataError(
            f"{source.name}: protocol {protocol.name} is for the division {protocol.division!r} into parts, and the "
            f"table has {found!r} under the same names; read it with dataset.folds={protocol.division}, or choose the "
            "protocol of its division"
        )


def faceless_rows(table: FaceTable) -> np.ndarray:
    """Return the rows whose face was not found when the table was prepared, sorted; none for other tables."""
    if FACE not in table.names:
        return np.empty(0, np.int64)
    codes, names = table.codes(FACE)
    missing = np.array([*(name != FOUND for name in names), False])
    return np.flatnonzero(missing[codes])


def kept_rows(source: Source, column: str, values: Sequence) -> np.ndarray:
    """Return whether each row's ``column`` is one of ``values``, bool ``(N,)``; a row without a value is not kept.

    Raises:
        DataError: If there is no such column, or a value that no row has.
    """
    if column not in source.table.names:
        raise DataError(f"{source.name}: protocol.keep: no column {column}; {near(column, source.table.names)}")
    codes, names = source.table.codes(column)
    wanted = {_number_text(value) for value in values}
    found = [_number_text(name) for name in names]
    absent = sorted(wanted - set(found))
    if absent and len(absent) == len(wanted):
        raise DataError(f"{source.name}: protocol.keep.{column}: no row has {absent[0]}; {near(absent[0], found)}")
    return np.array([*(name in wanted for name in found), False])[codes]


def _number_text(value: object) -> str:
    """Return a cell or a configured value as text, alike for 1, 1.0 and "1.0"."""
    text = str(value)
    try:
        return f"{float(text):g}"
    except ValueError:
        return text


def keep_classes(source: Source, protocol: Protocol) -> Source:
    """Return the source with its expressions narrowed to those that ``protocol.keep`` keeps.

    So a class whose rows are left out takes no part in a softmax, and a model that knows it is not blamed for it.
    """
    kept = (protocol.keep or {}).get("expression")
    names = source.table.expressions if kept is not None else ()
    left = [name for name in names if name in set(kept or ())]
    if kept is None or not left or len(left) == len(names):
        return source
    return replace(source, table=source.table.with_metadata(expressions=left))


def together(source: Source, codes: np.ndarray, names: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Return groups joined where rows of ``source.together`` share a value: index ``(N,)`` and names ``(U,)``.

    A joined unit has the name of the first of its groups by alphabet.

    Args:
        source: The source.
        codes: Group of each row ``(N,)``.
        names: Names of the groups ``(G,)``.
    """
    if source.together is None or source.together not in source.table.names:
        return codes, names
    from scipy.sparse import coo_matrix
    from scipy.sparse.csgraph import connected_components

    values, kinds = source.table.codes(source.together)
    known = np.flatnonzero(values >= 0)
    size = len(names) + len(kinds)
    edges = (np.ones(len(known), bool), (codes[known], len(names) + values[known]))
    unit = connected_components(coo_matrix(edges, shape=(size, size)), directed=False)[1][: len(names)]
    rank = np.empty(len(names), np.int64)
    rank[np.argsort(names.astype(str), kind="stable")] = np.arange(len(names))
    first = np.full(int(unit.max(initial=-1)) + 1, len(names), np.int64)
    np.minimum.at(first, unit, rank)
    alive, unit = np.unique(unit, return_inverse=True)
    ordered = names[np.argsort(rank)]
    return unit[codes], ordered[first[alive]]


def unit_classes(source: Source, units: np.ndarray, count: int, rows: np.ndarray) -> np.ndarray | None:
    """Return the most frequent class of ``source.stratify`` in ``rows`` of each unit ``(count,)``; "" without one."""
    if source.stratify is None or source.stratify not in source.table.names:
        return None
    codes, names = source.table.codes(source.stratify)
    pairs, counts = np.unique(units[rows] * (len(names) + 1) + codes[rows] + 1, return_counts=True)
    unit, kind = np.divmod(pairs, len(names) + 1)
    order = np.lexsort((-kind, counts))  # the last of a unit wins: the most frequent, then the first by alphabet
    classes = np.zeros(count, np.int64)
    classes[unit[order]] = kind[order]
    return np.array(["", *names], dtype=object)[classes].astype(str)


def _hold_out(drafts: Sequence[_Draft]) -> None:
    """Hold whole groups out of the training rows of sources that share their groups, or of one source."""
    first = drafts[0]
    classes: dict[str, str] = {}
    stratified = False
    for draft in drafts:
        inside = np.unique(draft.units[draft.whole_training])
        kinds = unit_classes(draft.source, draft.units, len(draft.unit_names), draft.whole_training)
        stratified |= kinds is not None
        for unit in inside.tolist():
            classes.setdefault(str(draft.unit_names[unit]), "" if kinds is None else str(kinds[unit]))
    names = sorted(classes)
    if len(names) < 2:
        raise DataError(
            f"{first.source.name}: {len(names)} group (column {first.column}) is left for training, so none can be "
            "held out for validation; add groups, or set protocol.validation_fraction=0 with selection=last"
        )
    # At least one group on either side, however small the fraction.
    held = np.clip(round(first.protocol.validation_fraction * len(names)), 1, len(names) - 1) / len(names)
    strata = [classes[name] for name in names] if stratified else None
    part = split_groups(names, (1 - held, held), first.protocol.split_seed, strata, salt="validation")
    chosen = {name for name, k in zip(names, part.tolist(), strict=True) if k == 1}
    for draft in drafts:
        units = np.fromiter((str(name) in chosen for name in draft.unit_names), bool, len(draft.unit_names))
        draft.held = units[draft.units]
        draft.notes = (*draft.notes, *_split_notes(draft))


def _split_notes(draft: _Draft) -> tuple[str, ...]:
    """Return what readers of results have to know of groups that are no people."""
    source = draft.source
    if draft.column == "subject":
        return ()
    said = [f"validation is split by {draft.column}"]
    if source.stratify is not None:
        said.append(f"stratified by {source.stratify}")
    if source.together is not None:
        kept = source.together in source.table.names
        name = "near-duplicates" if source.together == NEAR_DUPLICATES else f"rows with one {source.together}"
        said.append(f"{name} kept together" if kept else f"{name} not looked for")
    known = NO_SUBJECT in source.notes
    return (", ".join(said) + ("" if known else ": one person may be in training and in validation"),)


def _official(source: Source, protocol: Protocol) -> np.ndarray | None:
    """Return the index of ``PARTS`` of each row by the column ``part``, -1 for unused rows; None to use folds."""
    if isinstance(protocol.test, int):
        return None
    codes, found = source.table.codes("part") if "part" in source.table.names else (None, np.empty(0, object))
    if not len(found):
        if protocol.test is None or protocol.train_only:
            return None
        raise DataError(
            f"{source.name}: protocol.test={protocol.test_name} needs a column part; without one, give the index of a "
            f"fold (0 to {protocol.folds - 1})"
        )
    of_name = {name: k for k, names in enumerate(_part_names(source, protocol, found.tolist())) for name in names}
    return np.array([*(of_name.get(_plain(name), -1) for name in found), -1])[codes]


def _plain(name: str) -> str:
    """Return the name of a part as it is compared: without case and outer blanks."""
    return name.strip().casefold()


def _part_names(source: Source, protocol: Protocol, written: Sequence[str]) -> tuple[set[str], set[str], set[str]]:
    """Return which values of the column ``part`` train, select and test, in the spelling of ``_plain``."""
    found = {_plain(name) for name in written}
    train = {_plain(name) for name in protocol.train or ()}
    validation = set() if protocol.validation is None else {_plain(protocol.validation)}
    for name in (*(protocol.train or ()), *((protocol.validation,) if protocol.validation else ())):
        if _plain(name) not in found:
            raise DataError(f"{source.name}: no row has part={name}; {near(name, written)}")
    if protocol.test is None:
        test = found.intersection(_TEST_NAMES) - train - validation
        if not test and not protocol.train_only:
            raise DataError(
                f"{source.name}: no part {' or '.join(_TEST_NAMES)} among the values of column part "
                f"({', '.join(sorted(written))}); set protocol.test to one of them or to the index of a fold "
                f"(0 to {protocol.folds - 1})"
            )
    else:
        test = {_plain(name) for name in protocol.test_parts}
        absent = [name for name in protocol.test_parts if _plain(name) not in found]
        if absent and len(absent) < len(protocol.test_parts):
            # Half of a list would be another set under the same name.
            raise DataError(f"{source.name}: no row has part={absent[0]}; {near(absent[0], written)}")
    if protocol.validation is None:
        validation = found.intersection(_VALIDATION_NAMES) - train - test
    train = train or found.intersection(_TRAINING_NAMES) - test - validation or found - test - validation
    if not test & found and not train.intersection(_TRAINING_NAMES) and not protocol.train_only:
        asked = protocol.test_name
        raise DataError(f"{source.name}: no row has part={asked}; {near(asked, written)}")
    if train & test or train & validation or validation & test:
        raise ConfigError(
            f"protocol: parts train={sorted(train)}, validation={sorted(validation)}, test={sorted(test)} overlap"
        )
    return train, validation, test


def _folds(source: Source, protocol: Protocol, codes: np.ndarray, names: np.ndarray) -> np.ndarray:
    if len(names) < protocol.folds:
        raise DataError(
            f"{source.name}: {len(names)} groups cannot fill {protocol.folds} folds; set protocol.folds to at most "
            f"{len(names)}, or protocol.group to another column"
        )
    fold = split_groups(names, protocol.folds, protocol.split_seed, salt="folds")
    return np.where(fold == (protocol.test or 0), 2, 0)[codes]


def find_leak(part: np.ndarray, codes: np.ndarray, names: np.ndarray, where: str) -> str:
    """Return a sentence with the names of groups that have rows in two parts; empty if there is none.

    Args:
        part: Part of each row ``(N,)``; negative for rows that no part uses.
        codes: Group of each row ``(N,)``.
        names: Names of the groups ``(G,)``.
        where: Source and column, for the sentence.
    """
    used = part >= 0
    low = np.full(len(names), np.iinfo(np.int64).max)
    high = np.full(len(names), -1)
    np.minimum.at(low, codes[used], part[used])
    np.maximum.at(high, codes[used], part[used])
    straddling = np.flatnonzero(high > low)
    if not len(straddling):
        return ""
    first = straddling[0]
    return (
        f"{where}: {len(straddling)} groups lie in two parts, e.g. in {PARTS[low[first]]} and "
        f"{PARTS[high[first]]}: {_listed(names[straddling])}"
    )


def _listed(names: Iterable) -> str:
    shown = [str(name) for name in names]
    return ", ".join(shown[:_SHOWN]) + (", …" if len(shown) > _SHOWN else "")


# ------------------------------------------------------------------------------------------------ people


def identity_column(table: FaceTable) -> str:
    """Return the column that tells who is shown: ``subject``, or ``video`` where a set does not know people."""
    return str(table.metadata.get("identity", "subject"))


def people_in(source: Source, rows: np.ndarray) -> tuple[str, frozenset[str]]:
    """Return the name space of a source's identities and who is in ``rows``; ("", nobody) where it has none."""
    space, column = source.table.metadata.get("people"), identity_column(source.table)
    if not space or column not in source.table.names:
        return "", frozenset()
    codes, names = source.table.codes(column)
    inside = np.unique(codes[rows])
    return str(space), frozenset(str(name) for name in names[inside[inside >= 0]])


def _deliveries(sources: Sequence[Source]) -> list[str]:
    """Return what to know of the last source if it is another delivery of an earlier one without identities."""

    def anonymous(source: Source) -> object:
        known = source.table.metadata.get("people") or identity_column(source.table) in source.table.names
        return None if known else source.table.metadata.get("dataset")

    *before, last = sources
    others = [source.name for source in before if anonymous(last) and anonymous(source) == anonymous(last)]
    if not others:
        return []
    return [
        f"delivers {anonymous(last)} again, as {', '.join(others)} {'does' if len(others) == 1 else 'do'}, and neither "
        "says who is shown: one photograph may train in one and select or test in the other"
    ]


def _identities(sources: Sequence[Source], space: str) -> str:
    """Return what the identities of a name space are called, e.g. "people of disfa"."""
    columns = {identity_column(s.table) for s in sources if s.table.metadata.get("people") == space}
    return f"{'people' if columns == {'subject'} else '/'.join(sorted(columns)) + 's'} of {space}"


def people_of(sources: Sequence[Source], rows: Sequence[np.ndarray]) -> dict[str, list[str]]:
    """Return who is in ``rows`` of each source, sorted, by name space of identities."""
    found: dict[str, set[str]] = {}
    for source, chosen in zip(sources, rows, strict=True):
        space, people = people_in(source, chosen)
        if people:
            found.setdefault(space, set()).update(people)
    return {space: sorted(people) for space, people in sorted(found.items())}


def shared_people(
    sources: Sequence[Source], rows: Sequence[Mapping[str, np.ndarray]], parts: Sequence[str] = PARTS
) -> list[str]:
    """Return a sentence with names for each name space whose people lie in two parts, of one source or of several.

    Args:
        sources: Sources of one training.
        rows: Rows of each part, by source.
        parts: Parts that are compared.
    """
    spaces = [str(source.table.metadata.get("people") or "") for source in sources]
    sentences = []
    for space in sorted(set(filter(None, spaces))):
        where: dict[str, dict[str, str]] = {}
        for source, own, chosen in zip(sources, spaces, rows, strict=True):
            for part in parts if own == space else ():
                for name in people_in(source, chosen[part])[1]:
                    where.setdefault(name, {}).setdefault(part, source.name)
        straddling = sorted(name for name, places in where.items() if len(places) > 1)
        if straddling:
            (low, first), (high, second) = list(where[straddling[0]].items())[:2]
            sentences.append(
                f"{len(straddling)} {_identities(sources, space)} lie in two parts, e.g. in {low} of {first} and "
                f"{high} of {second}: {_listed(straddling)}"
            )
    return sentences


def hashed_name(space: str, name: str) -> str:
    """Return what stands for a person in a published checkpoint: a hash of name space and name.

    It keeps names out of sight, not from those who have the list of a dataset's names and try them all.
    """
    return HASHED + hashlib.sha256(f"{space}/{name}".encode()).hexdigest()[:24]


def hashed_people(people: Mapping[str, Sequence[str]]) -> dict[str, list[str]]:
    """Return people by name space with every name that is not one yet turned into a hash."""
    return {
        space: sorted(name if name.startswith(HASHED) else hashed_name(space, name) for name in names)
        for space, names in people.items()
    }


def known_people(
    sources: Sequence[Source], rows: Sequence[np.ndarray], trained: Mapping[str, Sequence[str]]
) -> list[str]:
    """Return a sentence with names for each name space of which ``rows`` hold people that a model was trained on.

    Tables without people are compared by what ``groups_of`` keeps.

    Args:
        sources: Sources that are evaluated.
        rows: Rows of each.
        trained: Who was in training or selection, by name space; names, or what ``hashed_name`` makes of them.
    """
    sentences = []
    for space, people in people_of(sources, rows).items():
        known = set(trained.get(space, ()))
        both = sorted(name for name in people if name in known or hashed_name(space, name) in known)
        if both:
            sentences.append(
                f"the model was trained on {len(both)} {_identities(sources, space)} among these rows: {_listed(both)}"
            )
    return sentences + [
        f"{source.name}: the model was trained on {said}"
        for source, chosen in zip(sources, rows, strict=True)
        for said in _known_groups(source, chosen, trained)
    ]


# ------------------------------------------------------------------------------------ tables without people


def groups_of(
    sources: Sequence[Source], rows: Sequence[np.ndarray], protocols: Sequence[Protocol]
) -> dict[str, list[str]]:
    """Return hashes that tell what is in ``rows`` of tables without people (``people_of`` has those), by name space.

    Drawn faces name their people by the seed of the generator (metadata ``identities``). Elsewhere a name says little:
    many tables count their subjects from 1. What is kept are image files, by name and content, and the values of
    the column that the training was split by, which count where some of these files are met again. Of each name space
    the ``KNOWN`` least hashes are kept: a sample of the values that is the same wherever they are met. Images that are
    no files tell nothing.

    Args:
        sources: Sources of a training.
        rows: Rows of each.
        protocols: The protocol of each.
    """
    found: dict[str, set[str]] = {}
    for source, chosen, protocol in zip(sources, rows, protocols, strict=True):
        column, space = protocol.group or source.group, source.table.metadata.get("identities")
        if people_in(source, chosen[:0])[0]:
            continue
        if space is None:
            found.setdefault(IMAGES, set()).update(_least_files(source.table, chosen))
            space = f"{column}{GROUPS_OF}"
        elif column != identity_column(source.table):
            continue  # Who splits by image shows the same people in all parts, and was told so.
        if column not in _IMAGE_COLUMNS:
            found.setdefault(str(space), set()).update(_value_hashes(source.table, chosen, column, str(space)))
    return {space: sorted(hashes)[:KNOWN] for space, hashes in sorted(found.items()) if hashes}


_IMAGE_COLUMNS = ("image", "source_image")
_CHUNK = 65536
_TAIL = 16384
"""Bytes of a file's end that are compared."""


def _known_groups(source: Source, rows: np.ndarray, trained: Mapping[str, Sequence[str]]) -> list[str]:
    """Return what of ``rows`` trained a model, by the hashes of ``groups_of``."""
    table, drawn = source.table, source.table.metadata.get("identities")
    if people_in(source, rows[:0])[0]:
        return []
    if drawn is not None:
        columns = {str(drawn): identity_column(table)} if drawn in trained else {}
        files = np.empty(0, np.int64)
    else:
        files = _known_files(table, frozenset(trained.get(IMAGES, ())))
        columns = {space: space.removesuffix(GROUPS_OF) for space in trained if space.endswith(GROUPS_OF)}
    said, common = [], np.intersect1d(files, rows)
    for space, column in columns.items():
        if column not in table.names or not (drawn is not None or len(files)):
            continue
        hashes, trained_on = _value_hashes(table, rows, column, space), set(trained[space])
        known = hashes.keys() & trained_on
        if drawn is None:
            # Another training table may count its subjects from 1, too: files that were met say whom it meant here.
            known &= _value_hashes(table, files, column, space).keys()
            if len(trained_on) < KNOWN:  # all of them: others on the same photograph were not trained on
                codes, names = table.codes(column)
                strangers = {value for one, value in hashes.items() if one not in trained_on}
                strange = np.array([str(name) in strangers for name in names], bool)
                common = common[[code < 0 or not strange[code] for code in codes[common]]]
        if known:
            values = sorted(hashes[one] for one in known)
            said.append(f"{len(values)} values of {column} among these rows: {_listed(values)}")
    if len(common):
        said.append(f"{len(common)} image files among these rows: {_listed(table.strings('image', common)[0])}")
    return said


def _value_hashes(table: FaceTable, rows: np.ndarray, column: str, space: str) -> dict[str, str]:
    """Return the values of a column in ``rows`` by their hash; leading zeros do not count: ``s07`` is ``s7``."""
    codes, names = table.codes(column)
    inside = np.unique(codes[rows])
    values = [str(names[code]) for code in inside[inside >= 0]]
    return {hashed_name(space, re.sub(r"(?<!\d)0+(?=\d)", "", value)): value for value in values}


def _image_hashes(table: FaceTable, rows: np.ndarray) -> Iterator[tuple[np.ndarray, np.ndarray]]:
    """Yield pieces of ``rows`` and a number (uint64) of the name of each row's image."""
    for start in range(0, len(rows), _CHUNK):
        piece = rows[start : start + _CHUNK]
        names = table.strings("image", piece)[0]
        yield piece, np.fromiter((_hash(name, 0, IMAGES) for name in names), np.uint64, len(piece))


def _file_hash(table: FaceTable, row: int, number: int) -> str:
    """Return what stands for an image file: ``HASHED``, number of its name, hash of size and end; "" without a file."""
    [path] = table.image_paths(np.array([row]))
    if not path.is_file():
        return ""
    with path.open("rb") as file:  # Names and sizes of other files may be the same, also of many.
        size = file.seek(0, os.SEEK_END)
        file.seek(max(0, size - _TAIL))
        content = hashlib.sha256(f"{number}/{size}/".encode() + file.read()).hexdigest()[:8]
    return f"{HASHED}{number:016x}{content}"


def _least_files(table: FaceTable, rows: np.ndarray) -> set[str]:
    """Return the hashes of at most ``KNOWN`` image files in ``rows``: those with the least numbers."""
    numbers, where = np.empty(0, np.uint64), np.empty(0, np.int64)
    for piece, found in _image_hashes(table, rows):
        numbers, first = np.unique(np.concatenate([numbers, found]), return_index=True)
        where = np.concatenate([where, piece])[first][:KNOWN]
        numbers = numbers[:KNOWN]
    return {_file_hash(table, row, int(k)) for row, k in zip(where.tolist(), numbers, strict=True)} - {""}


def _known_files(table: FaceTable, known: frozenset[str]) -> np.ndarray:
    """Return the rows of a table whose image file is among ``known``, sorted."""
    numbers = {int(one.removeprefix(HASHED)[:16], 16) for one in known if _FILE_HASH.fullmatch(one)}
    if not numbers:
        return np.empty(0, np.int64)
    wanted, rows = np.array(sorted(numbers), np.uint64), []
    same: dict[int, bool] = {}  # of the file of each name, which many rows may have
    for piece, found in _image_hashes(table, np.arange(len(table))):
        met = np.isin(found, wanted)
        for row, number in zip(piece[met].tolist(), found[met].tolist(), strict=True):
            if number not in same:
                same[number] = _file_hash(table, row, number) in known
            if same[number]:
                rows.append(row)
    return np.array(rows, np.int64)


_FILE_HASH = re.compile(HASHED + "[0-9a-f]{24}")


# ----------------------------------------------------------------------------------------------- checking


def require_parts(
    sources: Sequence[Source], parts: Sequence[dict[str, np.ndarray]], protocol: Protocol | Sequence[Protocol]
) -> None:
    """Raise ``DataError`` if no source has a row in a part that training, selection or testing needs."""
    protocols = [protocol] if isinstance(protocol, Protocol) else list(protocol)
    needed = [TRAIN, TEST]
    selection = protocols[0].selection
    official = any(one.validation is not None for one in protocols) or any(len(rows[VALIDATION]) for rows in parts)
    held_out = any(one.validation_fraction > 0 for one in protocols)
    if selection == "best_on_test" or (selection != "refit" and (official or (held_out and selection == "best_val"))):
        needed.append(VALIDATION)
    if selection == "best_val" and VALIDATION not in needed:
        raise ConfigError(
            "selection=best_val needs a validation part; set protocol.validation_fraction above 0 or selection=last"
        )
    for name in needed:
        if not any(len(rows[name]) for rows in parts):
            known = {
                source.name: sorted(source.table.codes("part")[1]) if "part" in source.table.names else "no column part"
                for source in sources
            }
            tests = dict.fromkeys(one.test_name for one in protocols if not one.train_only)
            asked = protocols[0].test if len(protocols) == 1 and not protocols[0].test_parts else ", ".join(tests)
            raise DataError(f"the {name} part is empty with protocol.test={asked} (parts: {known})")


def spread(rows: Sequence[np.ndarray], limit: int | None) -> list[np.ndarray]:
    """Return at most ``limit`` rows in all, spread evenly over each source's rows, so that every class keeps a chance.

    Args:
        rows: Rows of one part, by source.
        limit: Number of rows; None keeps all.
    """
    total = sum(len(part) for part in rows)
    if limit is None or total <= limit:
        return list(rows)
    everything = np.linspace(0, total - 1, max(limit, 1)).round().astype(np.int64)
    starts = np.cumsum([0, *(len(part) for part in rows)])
    return [
        part[everything[(everything >= start) & (everything < start + len(part))] - start]
        for part, start in zip(rows, starts[:-1], strict=True)
    ]
