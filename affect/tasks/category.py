# SPDX-License-Identifier: Apache-2.0
"""A softmax over the values of any column: identity, camera, gender, a bin of the head's yaw."""

from __future__ import annotations

import itertools
from collections.abc import Mapping, Sequence
from typing import Any, ClassVar

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
from torch import Tensor

from affect.errors import ConfigError, DataError, near
from affect.tasks.base import Columns, Encoded, Task

_MOST_CLASSES = 20_000
_SHOWN = 6


class Category(Task):
    """One of the values of a table's column, represented by logits.

    Without ``bins`` the classes are the column's values as text; those of a column of numbers with fractions have to
    be named then. With ``bins``, edges ``e_0 < e_1 < … < e_n``, they are the n intervals ``[e_k, e_(k+1))``, the last
    one closed. A missing value, and one that is no class or lies outside the bins, is masked; the latter are counted
    in the run's notes.

    Predictions are in the columns ``category_<column>`` (the class) and ``category_<column>_<class>`` (probabilities),
    because the column itself, a person's name for instance, has other uses in a table.

    Args:
        column: Column of the table; it has to be named.
        bins: Edges, for a column of numbers.
        classes: Values in output order; None for those that the tables hold, sorted (numbers by size).
        mirror: Class of the mirrored image by class, for columns that a mirror changes; others keep theirs. With bins
            of ``pose_yaw`` it follows by itself; an interval whose mirror image is no interval has no label then.
        **common: Arguments of ``Task``.

    Raises:
        ConfigError: If arguments do not fit together; in ``bind``, if the column measures something and neither bins
            nor classes say which of its values belong together.
    """

    softmax: ClassVar[bool] = True

    def __init__(
        self,
        column: str | None = None,
        bins: Sequence[float] | None = None,
        classes: Sequence[str] | None = None,
        mirror: Mapping[str, str] | None = None,
        **common: Any,  # noqa: ANN401
    ) -> None:
        super().__init__(**common)
        self.column = "" if column is None else str(column)
        if self.column == "pose_roll":
            raise ConfigError(
                "column=pose_roll: crop and augmentation change the roll that a model sees, so a bin of the stored "
                "one is no label of it; choose another column"
            )
        self.bins = None if bins is None else tuple(float(edge) for edge in bins)
        self.classes = None if classes is None else tuple(str(name) for name in classes)
        if self.bins is not None:
            if len(self.bins) < 3 or not all(a < b for a, b in itertools.pairwise(self.bins)):
                raise ConfigError(
                    f"bins={list(self.bins)}: give at least three edges that rise, for two classes or more"
                )
            names = tuple(f"{a:g} to {b:g}" for a, b in itertools.pairwise(self.bins))
            if self.classes not in (None, names):
                raise ConfigError(
                    f"classes={list(self.classes or ())}: the bins are {list(names)}; give one or the other"
                )
            self.classes = names
        if self.classes is not None and (len(set(self.classes)) != len(self.classes) or not self.classes):
            raise ConfigError(f"classes={list(self.classes)}: name each class once, and at least one")
        self.mirror = None if mirror is None else {str(k): str(v) for k, v in mirror.items()}
        for name in {*(self.mirror or {}), *(self.mirror or {}).values()} if self.classes is not None else ():
            if name not in self.classes:  # type: ignore[operator]
                raise ConfigError(f"mirror: no class {name!r}; {near(name, self.classes)}")  # type: ignore[arg-type]
        self._order: np.ndarray | None = None

    def bind(self, sources: Sequence[Columns]) -> None:
        if not self.column:
            columns = sorted(frozenset().union(*(source.names for source in sources)))
            raise ConfigError(f"a task of categories needs task.<name>.column=…; the tables have {', '.join(columns)}")
        if self.classes is None:
            measured = next((s for s in sources if self.column in s.names and self._is_measured(s)), None)
            if measured is not None:
                raise ConfigError(
                    f"column {self.column} holds numbers with fractions, and each would be a class of its own; set "
                    "task.<name>.bins=[…] (edges), or task.<name>.classes=[…] for few values that are groups"
                )
            found = {name for source in sources if self.column in source.names for name in self._values(source)}
            if len(found) > _MOST_CLASSES:
                raise DataError(
                    f"column {self.column} has {len(found)} different values, more than a softmax can have; "
                    "give bins for numbers, or a column of groups"
                )
            self.classes = tuple(sorted(found, key=_by_size)) or None
        if self.classes is None:
            names = frozenset().union(*(source.names for source in sources))
            why = "holds no value" if self.column in names else f"is in no table; {near(self.column, names)}"
            raise DataError(f"{type(self).__name__}: the column {self.column} {why}")
        super().bind(sources)

    def _is_measured(self, source: Columns) -> bool:
        """Return whether the column is one of numbers and not all of them are whole."""
        try:
            numbers, valid = source.numbers(self.column)
        except DataError:  # text
            return False
        known = numbers[valid & np.isfinite(numbers)] if numbers.ndim == 1 else numbers[:0]
        return bool((known != np.round(known)).any())

    def _values(self, source: Columns) -> list[str]:
        """Return the distinct values of the column as text."""
        values, valid = self._texts(source)
        return [str(name) for name in pc.unique(pa.array(values[valid], pa.string())).to_pylist()]

    def _texts(self, source: Columns, rows: np.ndarray | None = None) -> tuple[np.ndarray, np.ndarray]:
        values, valid = source.strings(self.column, rows)
        return values, valid & (values != "nan")

    @property
    def outputs(self) -> tuple[str, ...]:
        return self.classes or ()

    def vocabulary(self) -> dict[str, list]:
        return {"classes": list(self.outputs)}

    def wanted(self) -> tuple[str, ...]:
        return (self.column,)

    def columns(self, available: frozenset[str]) -> tuple[str, ...]:
        return tuple(name for name in self.wanted() if name in available)

    def encode(self, source: Columns, rows: np.ndarray | None = None) -> Encoded:
        if self.column not in source.names:
            size = len(source.strings("image", rows)[0])
            where = np.full(size, -1)
        else:
            where = self._places(source, rows)
        target = np.zeros((len(where), self.num_outputs), np.float32)
        known = np.flatnonzero(where >= 0)
        target[known, where[known]] = 1
        return Encoded(target, np.repeat((where >= 0)[:, None], self.num_outputs, 1))

    def _places(self, source: Columns, rows: np.ndarray | None = None) -> np.ndarray:
        """Return the class of each row, int64 ``(N,)``; -1 where the value is missing or no class."""
        if self.bins is None:
            values, valid = self._texts(source, rows)
            found = pc.index_in(pa.array(values, pa.string()), value_set=pa.array(self.outputs, pa.string()))
            places = found.fill_null(-1).to_numpy(zero_copy_only=False).astype(np.int64)
            return np.where(valid, places, -1)
        numbers, valid = source.numbers(self.column, rows)
        if numbers.ndim != 1:
            raise DataError(f"column {self.column}: bins need one number per row, and it has {numbers.shape[1]}")
        edges = np.asarray(self.bins, np.float32)
        places = np.searchsorted(edges, numbers, side="right").astype(np.int64) - 1
        places[numbers == edges[-1]] = len(edges) - 2
        return np.where(valid & np.isfinite(numbers) & (places >= 0) & (places < self.num_outputs), places, -1)

    def notes(self, source: Columns) -> list[str]:
        if self.column not in source.names:
            return []
        known = self._places(source) >= 0
        if self.bins is not None:
            valid = source.numbers(self.column)[1]
            outside = int((valid & ~known).sum())
            low, high = self.bins[0], self.bins[-1]
            return [f"{outside} rows have a {self.column} outside [{low:g}, {high:g}] and no label"] if outside else []
        values, valid = self._texts(source)
        foreign = values[valid & ~known]
        if not len(foreign):
            return []
        names = sorted(set(pc.unique(pa.array(foreign, pa.string())).to_pylist()), key=_by_size)
        listed = ", ".join(names[:_SHOWN]) + (", …" if len(names) > _SHOWN else "")
        return [f"{len(foreign)} rows have a {self.column} that is no class of the task ({listed}) and no label"]

    def check(self, source: Columns) -> None:
        if self.column in source.names and self.bins is not None:
            source.numbers(self.column)  # a column of text is an error here, before any training

    def flip(self, encoded: Encoded) -> Encoded:
        """Return the labels of mirrored images: classes change as ``mirror`` says, or with the sign of the yaw."""
        if self._order is None or len(self._order) != self.num_outputs:
            self._order = self._mirrored()
        if (self._order == np.arange(self.num_outputs)).all():
            return encoded
        # A mirror changes places both ways, so the class that a place comes from is the one that it goes to.
        known = self._order >= 0
        target = np.where(known, encoded.target[:, self._order], 0).astype(np.float32)
        lost = np.asarray((encoded.target[:, ~known] > 0).any(1))
        mask = encoded.mask & ~lost[:, None]
        return Encoded(np.where(mask, target, 0).astype(np.float32), mask)

    def _mirrored(self) -> np.ndarray:
        """Return the class of the mirrored image of each class, -1 where there is none."""
        order = np.arange(self.num_outputs)
        if self.mirror is not None:
            place = {name: k for k, name in enumerate(self.outputs)}
            for name, other in self.mirror.items():
                for key in (name, other):
                    if key not in place:
                        raise ConfigError(f"mirror: no class {key!r}; {near(key, self.outputs)}")
                order[place[name]], order[place[other]] = place[other], place[name]
        elif self.column == "pose_yaw" and self.bins is not None:
            intervals = list(itertools.pairwise(self.bins))
            place_of = {interval: k for k, interval in enumerate(intervals)}
            order = np.array([place_of.get((0.0 - high, 0.0 - low), -1) for low, high in intervals])
        return order

    def predict(self, output: Tensor) -> Tensor:
        return output.softmax(-1)

    def decode(self, values: np.ndarray) -> dict[str, np.ndarray]:
        best = np.array(self.outputs, dtype=object)[values.argmax(1)]
        return {
            f"category_{self.column}": best,
            **{name: values[:, k] for k, name in enumerate(self._probability_columns())},
        }

    def read_values(self, source: Columns, rows: np.ndarray | None = None) -> np.ndarray:
        return np.stack([source.numbers(name, rows)[0] for name in self._probability_columns()], 1)

    def _probability_columns(self) -> list[str]:
        return [f"category_{self.column}_{name}" for name in self.outputs]


def _by_size(name: str) -> tuple[bool, float, str]:
    """Return a key that sorts numbers by size, before all other texts."""
    try:
        return (False, float(name), name)
    except ValueError:
        return (True, 0.0, name)
