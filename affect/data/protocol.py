# SPDX-License-Identifier: Apache-2.0
"""Which rows train, select and test: official parts or folds, always by whole groups.

A group (a person, a video, an image where a set knows neither) never straddles two parts. Which part a group falls
into depends on the group's name, the seed and the set of groups, never on the order of rows. The test part selects
nothing: validation groups are held out of the training part.
"""

from __future__ import annotations

import hashlib
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

from affect.data.images import Source
from affect.data.table import FaceTable
from affect.errors import ConfigError, DataError, near

TRAIN, VALIDATION, TEST = "train", "validation", "test"
PARTS = (TRAIN, VALIDATION, TEST)
"""The parts that every assignment has, in this order."""

SELECTIONS = ("best_val", "last")
_TRAINING_NAMES = ("train", "training")
_VALIDATION_NAMES = ("val", "valid", "validation", "dev")
_TEST_NAMES = ("test", "testing")


@dataclass(frozen=True)
class Protocol:
    """How a source is split and scored.

    Attributes:
        test: Name of the official test part (a value of the column ``part``; case does not matter, here and below),
            index of the test fold, ``"all"`` to test on every row, or None: the official part ``test`` or ``testing``,
            fold 0 of a source without official parts.
        folds: Number of folds over groups where parts are not official.
        split_seed: Seed of folds and validation groups, independent of the seed of training.
        validation_fraction: Share of the training groups that are held out for selection; 0 for none.
        group: Column that replaces the source's own group; None keeps it.
        every: Training uses every n-th row.
        train: Official parts that train; None takes ``train`` where it exists, else all that do not test or select.
        validation: Official part that selects instead of held-out training groups; None takes ``val``, ``valid``,
            ``validation`` or ``dev`` where it is there and has no other use, and holds groups out otherwise.
        f1_empty: F1 of an output that has neither positives nor positive predictions.
        selection: ``best_val`` (best on the validation part) or ``last``.
    """

    test: str | int | None = None
    folds: int = 5
    split_seed: int = 0
    validation_fraction: float = 0.15
    group: str | None = None
    every: int = 1
    train: Sequence[str] | None = None
    validation: str | None = None
    f1_empty: float = 0.0
    selection: str = "best_val"

    def __post_init__(self) -> None:
        if self.folds < 2:
            raise ConfigError(f"protocol.folds={self.folds}: at least 2 folds are needed")
        if isinstance(self.test, int) and not 0 <= self.test < self.folds:
            raise ConfigError(f"protocol.test={self.test}: folds are 0 to {self.folds - 1} (protocol.folds)")
        if not 0 <= self.validation_fraction < 1:
            raise ConfigError(f"protocol.validation_fraction={self.validation_fraction} must lie in [0, 1)")
        if self.every < 1:
            raise ConfigError(f"protocol.every={self.every} must be at least 1")
        if self.selection not in SELECTIONS:
            raise ConfigError(f"selection={self.selection}: {near(self.selection, SELECTIONS)}")


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
    """Return the rows of each part of ``PARTS``, sorted int64.

    A source that knows only some official parts gives empty rows for the others; ``require_parts`` checks a whole
    list of sources.

    Raises:
        DataError: If the test part does not exist, a group lies in two parts, too few groups remain for validation, or
            folds are more than groups.
    """
    table = source.table
    codes, names = group_codes(table, protocol.group or source.group)
    if protocol.test == "all":
        empty = np.empty(0, np.int64)
        return {TRAIN: empty, VALIDATION: empty, TEST: np.arange(len(table))}
    part = _official(source, protocol)
    if part is None:
        part = _folds(source, protocol, codes, names)
    column = protocol.group or source.group
    require_no_leak(part, codes, names, f"{source.name}, column {column}")
    rows = {name: np.flatnonzero(part == k) for k, name in enumerate(PARTS)}
    selected = protocol.validation is not None or len(rows[VALIDATION]) > 0
    if not selected and len(rows[TRAIN]) and protocol.validation_fraction > 0:
        rows[TRAIN], rows[VALIDATION] = _hold_out(source, protocol, rows[TRAIN], codes, names, column)
    rows[TRAIN] = rows[TRAIN][:: protocol.every]
    return rows


def _official(source: Source, protocol: Protocol) -> np.ndarray | None:
    """Return the index of ``PARTS`` of each row by the column ``part``, -1 for unused rows; None to use folds."""
    if isinstance(protocol.test, int):
        return None
    codes, found = source.table.codes("part") if "part" in source.table.names else (None, np.empty(0, object))
    if not len(found):
        if protocol.test is None:
            return None
        raise DataError(
            f"{source.name}: protocol.test={protocol.test} needs a column part; without one, give the index of a fold "
            f"(0 to {protocol.folds - 1})"
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
        if not test:
            raise DataError(
                f"{source.name}: no part {' or '.join(_TEST_NAMES)} among the values of column part "
                f"({', '.join(sorted(written))}); set protocol.test to one of them or to the index of a fold "
                f"(0 to {protocol.folds - 1})"
            )
    else:
        test = {_plain(str(protocol.test))}
    if protocol.validation is None:
        validation = found.intersection(_VALIDATION_NAMES) - train - test
    train = train or found.intersection(_TRAINING_NAMES) - test - validation or found - test - validation
    if not test & found and not train.intersection(_TRAINING_NAMES):
        raise DataError(f"{source.name}: no row has part={protocol.test}; {near(str(protocol.test), written)}")
    if train & test or train & validation or validation & test:
        raise ConfigError(
            f"protocol: parts train={sorted(train)}, validation={sorted(validation)}, test={sorted(test)} overlap"
        )
    return train, validation, test


def unused_rows(source: Source, protocol: Protocol) -> np.ndarray:
    """Return the rows ``(M,)`` whose official part neither trains nor selects nor tests, sorted."""
    part = None if protocol.test == "all" else _official(source, protocol)
    return np.empty(0, np.int64) if part is None else np.flatnonzero(part < 0)


def _folds(source: Source, protocol: Protocol, codes: np.ndarray, names: np.ndarray) -> np.ndarray:
    if len(names) < protocol.folds:
        raise DataError(
            f"{source.name}: {len(names)} groups cannot fill {protocol.folds} folds; set protocol.folds to at most "
            f"{len(names)}, or protocol.group to another column"
        )
    fold = split_groups(names, protocol.folds, protocol.split_seed, salt="folds")
    return np.where(fold == int(protocol.test or 0), 2, 0)[codes]


def _hold_out(
    source: Source, protocol: Protocol, rows: np.ndarray, codes: np.ndarray, names: np.ndarray, column: str
) -> tuple[np.ndarray, np.ndarray]:
    """Return training and validation rows of the training ``rows``."""
    inside = np.unique(codes[rows])
    if len(inside) < 2:
        raise DataError(
            f"{source.name}: {len(inside)} group (column {column}) is left for training, so none can be held out for "
            "validation; add groups, or set protocol.validation_fraction=0 with selection=last"
        )
    # At least one group on either side, however small the fraction.
    held = np.clip(round(protocol.validation_fraction * len(inside)), 1, len(inside) - 1) / len(inside)
    part = split_groups(names[inside], (1 - held, held), protocol.split_seed, salt="validation")
    chosen = np.zeros(len(names), bool)
    chosen[inside[part == 1]] = True
    return rows[~chosen[codes[rows]]], rows[chosen[codes[rows]]]


def require_no_leak(part: np.ndarray, codes: np.ndarray, names: np.ndarray, where: str) -> None:
    """Raise ``DataError`` with names if a group has rows in two parts.

    Args:
        part: Part of each row ``(N,)``; negative for rows that no part uses.
        codes: Group of each row ``(N,)``.
        names: Names of the groups ``(G,)``.
        where: Source and column, for the message.
    """
    used = part >= 0
    low = np.full(len(names), np.iinfo(np.int64).max)
    high = np.full(len(names), -1)
    np.minimum.at(low, codes[used], part[used])
    np.maximum.at(high, codes[used], part[used])
    straddling = np.flatnonzero(high > low)
    if len(straddling):
        shown = ", ".join(str(name) for name in names[straddling[:5]]) + (", …" if len(straddling) > 5 else "")
        first = straddling[0]
        raise DataError(
            f"{where}: {len(straddling)} groups lie in two parts, e.g. in {PARTS[low[first]]} and "
            f"{PARTS[high[first]]}: {shown}; set protocol.group to a column that keeps them apart, or mend the parts"
        )


def require_parts(sources: Sequence[Source], parts: Sequence[dict[str, np.ndarray]], protocol: Protocol) -> None:
    """Raise ``DataError`` if no source has a row in a part that training, selection or testing needs."""
    needed = [TRAIN, TEST]
    official = protocol.validation is not None or any(len(rows[VALIDATION]) for rows in parts)
    if official or (protocol.validation_fraction > 0 and protocol.selection == "best_val"):
        needed.append(VALIDATION)
    if protocol.selection == "best_val" and VALIDATION not in needed:
        raise ConfigError(
            "selection=best_val needs a validation part; set protocol.validation_fraction above 0 or selection=last"
        )
    for name in needed:
        if not any(len(rows[name]) for rows in parts):
            known = {
                source.name: sorted(source.table.codes("part")[1]) if "part" in source.table.names else "no column part"
                for source in sources
            }
            raise DataError(f"the {name} part is empty with protocol.test={protocol.test} (parts: {known})")


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
