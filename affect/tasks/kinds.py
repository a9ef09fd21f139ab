# SPDX-License-Identifier: Apache-2.0
"""The task kinds: action units, expression, valence-arousal, landmarks, head pose, attributes, coefficients."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any, ClassVar

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
import torch
from torch import Tensor

from affect import labels
from affect.errors import ConfigError, DataError, near
from affect.tasks.base import Columns, Encoded, Task, require_known, require_range


class _ScalarColumns(Task):
    """Shared behaviour of tasks whose K outputs are K numeric columns."""

    low: ClassVar[float] = -np.inf
    high: ClassVar[float] = np.inf
    full_bar: ClassVar[float | None] = None

    def _output_columns(self) -> tuple[str, ...]:
        """Return the column of each output."""
        raise NotImplementedError

    def wanted(self) -> tuple[str, ...]:
        return self._output_columns()

    def columns(self, available: frozenset[str]) -> tuple[str, ...]:
        return tuple(column for column in self._output_columns() if column in available)

    def encode(self, source: Columns, rows: np.ndarray | None = None) -> Encoded:
        names = self._output_columns()
        read = {name: source.numbers(name, rows) for name in names if name in source.names}
        size = len(next(iter(read.values()))[0]) if read else len(source.strings("image", rows)[0])
        target = np.zeros((size, len(names)), np.float32)
        mask = np.zeros((size, len(names)), bool)
        for k, name in enumerate(names):
            if name in read:
                target[:, k], mask[:, k] = read[name]
        return Encoded(np.where(mask, target, 0).astype(np.float32), mask)

    def check(self, source: Columns) -> None:
        for column in self.columns(source.names):
            require_range(source, column, self.low, self.high)

    def decode(self, values: np.ndarray) -> dict[str, np.ndarray]:
        return {name: values[:, k] for k, name in enumerate(self._output_columns())}

    def read_values(self, source: Columns, rows: np.ndarray | None = None) -> np.ndarray:
        return np.stack([source.numbers(name, rows)[0] for name in self._output_columns()], 1)

    def bars(self, row: Mapping[str, float]) -> tuple[dict[str, float], float]:
        if self.full_bar is None:
            return {}, 1.0
        named = zip(self.outputs, self._output_columns(), strict=True)
        return {name: float(row[column]) for name, column in named}, self.full_bar


class _ActionUnits(_ScalarColumns):
    """Shared behaviour of the two action unit tasks.

    Args:
        aus: Action unit numbers in output order, the key of a set of ``labels.AU_SETS``, or None for all that the
            training tables hold.
        **common: Arguments of ``Task``.
    """

    suffix: ClassVar[str]

    def __init__(self, aus: Sequence[int] | str | None = None, **common: Any) -> None:  # noqa: ANN401
        super().__init__(**common)
        if isinstance(aus, str):
            require_known([aus], labels.AU_SETS, "action unit set")
            aus = labels.AU_SETS[aus]
        if aus is not None:
            require_known(list(aus), list(labels.AU_NAMES), "action unit")
            if len(set(aus)) != len(aus) or not aus:
                raise ConfigError(f"aus={list(aus)}: name each action unit once, and at least one")
        self.aus = None if aus is None else tuple(int(au) for au in aus)

    def bind(self, sources: Sequence[Columns]) -> None:
        if self.aus is None:
            names = frozenset().union(*(source.names for source in sources))
            self.aus = tuple(au for au in labels.AU_NAMES if self._column(au) in names) or None
        if self.aus is None:
            raise DataError(f"no table has an action unit column ({self._column(1)}, {self._column(12)}, …)")
        super().bind(sources)

    def vocabulary(self) -> dict[str, list]:
        return {"aus": list(self.aus or ())}

    def _column(self, au: int) -> str:
        return f"au{au:02d}_{self.suffix}"

    def _output_columns(self) -> tuple[str, ...]:
        return tuple(self._column(au) for au in self.aus or ())

    @property
    def outputs(self) -> tuple[str, ...]:
        return tuple(labels.au_output(au) for au in self.aus or ())


class AUOccurrence(_ActionUnits):
    """Presence of action units: independent binary labels, represented by logits.

    Soft labels in [0, 1] (a teacher's probabilities) are allowed; metrics count a target of at least 0.5 as present.
    """

    flags: ClassVar[bool] = True
    full_bar: ClassVar[float | None] = 1.0
    suffix: ClassVar[str] = "occurrence"
    low: ClassVar[float] = 0.0
    high: ClassVar[float] = 1.0

    def predict(self, output: Tensor) -> Tensor:
        return output.sigmoid()


class AUIntensity(_ActionUnits):
    """Intensity of action units on the FACS scale, 0 (absent) to 5 (maximum), represented by the number itself."""

    full_bar: ClassVar[float | None] = 5.0
    suffix: ClassVar[str] = "intensity"
    low: ClassVar[float] = 0.0
    high: ClassVar[float] = 5.0

    def predict(self, output: Tensor) -> Tensor:
        return output.clamp(0, 5)


def _counted(names: np.ndarray) -> dict[str, int]:
    """Return how often each text occurs; millions of them in a fraction of the time of a sort."""
    return {one["values"]: one["counts"] for one in pc.value_counts(pa.array(names, pa.string())).to_pylist()}


class Expression(Task):
    """One of C classes, or a distribution over them, represented by logits.

    A class that a table's source can never label takes no part in the softmax of its rows: the mask is False there.
    A row's named class comes before its distribution (``expression_<class>``), which counts where no class is named.

    Args:
        classes: Class names in output order, a key of ``labels.EXPRESSION_ORDERS``, or None for the order that the
            training tables declare.
        **common: Arguments of ``Task``.
    """

    softmax: ClassVar[bool] = True

    def __init__(self, classes: Sequence[str] | str | None = None, **common: Any) -> None:  # noqa: ANN401
        super().__init__(**common)
        self._open = classes is None
        if isinstance(classes, str):
            require_known([classes], labels.EXPRESSION_ORDERS, "expression order")
            classes = labels.EXPRESSION_ORDERS[classes]
        self.classes = None if classes is None else tuple(labels.canonical_expression(name) for name in classes)
        if self.classes is not None and len(set(self.classes)) != len(self.classes):
            raise ConfigError(f"classes={list(self.classes)}: name each class once")

    def bind(self, sources: Sequence[Columns]) -> None:
        if self.classes is None:
            found: list[str] = []
            for source in sources:
                found += [name for name in source.expressions if name not in found]
            self.classes = tuple(found) or None
        if self.classes is None:
            raise DataError("no table has an expression column (expression, or expression_<class>)")
        super().bind(sources)
        for source in sources:
            if self.columns(source.names) and not set(source.expressions) & set(self.classes):
                raise DataError(
                    f"none of the table's expressions {sorted(source.expressions)} is a class of the task "
                    f"{list(self.classes)}"
                )

    @property
    def outputs(self) -> tuple[str, ...]:
        return self.classes or ()

    def vocabulary(self) -> dict[str, list]:
        return {"classes": list(self.outputs)}

    def wanted(self) -> tuple[str, ...]:
        return ("expression", *(labels.expression_column(name) for name in self.outputs))

    def columns(self, available: frozenset[str]) -> tuple[str, ...]:
        return tuple(name for name in self.wanted() if name in available)

    def encode(self, source: Columns, rows: np.ndarray | None = None) -> Encoded:
        classes = self.outputs
        possible = np.array([name in source.expressions for name in classes])
        if "expression" not in source.names:
            target, valid = self._distribution(source, rows)
        else:
            named, given = source.strings("expression", rows)
            found = pc.index_in(pa.array(named, pa.string()), value_set=pa.array(classes, pa.string()))
            where = found.fill_null(-1).to_numpy(zero_copy_only=False).astype(np.int64)
            valid = given & (where >= 0)
            target = np.zeros((len(named), len(classes)), np.float32)
            target[np.flatnonzero(valid), where[valid]] = 1
            unnamed = np.flatnonzero(~given)
            if len(unnamed):
                target[unnamed], valid[unnamed] = self._distribution(
                    source, unnamed if rows is None else np.asarray(rows)[unnamed]
                )
        mask = valid[:, None] & possible[None]
        return Encoded(target * valid[:, None], mask)

    def _distribution(self, source: Columns, rows: np.ndarray | None) -> tuple[np.ndarray, np.ndarray]:
        """Return the shares of the classes ``(N, C)`` in columns ``expression_<class>``, and where there are any."""
        columns = [(k, labels.expression_column(name)) for k, name in enumerate(self.outputs)]
        read = {k: source.numbers(column, rows) for k, column in columns if column in source.names}
        size = len(next(iter(read.values()))[0]) if read else len(source.strings("image", rows)[0])
        target = np.zeros((size, len(columns)), np.float32)
        for k, (value, known) in read.items():
            target[:, k] = np.where(known, value, 0)
        total = target.sum(1, keepdims=True)
        return np.divide(target, total, out=np.zeros_like(target), where=total > 0), total[:, 0] > 0

    def notes(self, source: Columns) -> list[str]:
        found = []
        if "expression" in source.names:
            named, valid = source.strings("expression")
            counts = {str(name): count for name, count in sorted(_counted(named[valid]).items())}
            foreign = {name: count for name, count in counts.items() if name not in self.outputs}
            if foreign:
                listed = ", ".join(f"{name} {count}" for name, count in foreign.items())
                found.append(f"{sum(foreign.values())} rows have an expression that is no class of the task ({listed})")
        usual = {*labels.EXPRESSION_ORDERS["affectnet8"], labels.OTHER}
        if self._open:
            found += [
                f"expression {name!r} is taken for a class of its own; {near(name, usual)}"
                for name in self.outputs
                if name not in usual and name in source.expressions
            ]
        return found

    def check(self, source: Columns) -> None:
        for name in self.columns(source.names):
            if name != "expression":
                require_range(source, name, 0.0, np.inf)
        if "expression" in source.names:
            named, valid = source.strings("expression")
            known = set(self.outputs) | set(source.expressions)
            for name in sorted(_counted(named[valid])):
                if name not in known:
                    row = int(np.flatnonzero(valid & (named == name))[0])
                    raise DataError(f"column expression, row {row}: unknown class {name!r}; {near(name, known)}")

    def predict(self, output: Tensor) -> Tensor:
        return output.softmax(-1)

    def decode(self, values: np.ndarray) -> dict[str, np.ndarray]:
        best = np.array(self.outputs, dtype=object)[values.argmax(1)]
        soft = {labels.expression_column(name): values[:, k] for k, name in enumerate(self.outputs)}
        return {"expression": best, **soft}

    def read_values(self, source: Columns, rows: np.ndarray | None = None) -> np.ndarray:
        return np.stack([source.numbers(labels.expression_column(name), rows)[0] for name in self.outputs], 1)


class ValenceArousal(_ScalarColumns):
    """Valence and arousal in [-1, 1], represented by the bounded number (tanh of the head's output)."""

    low: ClassVar[float] = -1.0
    high: ClassVar[float] = 1.0

    @property
    def outputs(self) -> tuple[str, ...]:
        return labels.AFFECT_AXES

    def _output_columns(self) -> tuple[str, ...]:
        return labels.AFFECT_AXES

    def link(self, raw: Tensor) -> Tensor:
        return raw.tanh()


class Landmarks(Task):
    """Facial points of one scheme, represented as fractions of the crop's width and height.

    A point at pixel ``x`` of an image of width ``W`` (first pixel centre at 0) has the fraction ``(x + 0.5) / W``.

    Args:
        scheme: Key of ``labels.SCHEMES``.
        **common: Arguments of ``Task``.
    """

    def __init__(self, scheme: str = "68", **common: Any) -> None:  # noqa: ANN401
        super().__init__(**common)
        scheme = str(scheme)
        require_known([scheme], labels.SCHEMES, "landmark scheme")
        self.scheme = labels.SCHEMES[scheme]

    @property
    def landmark_scheme(self) -> str | None:
        return self.scheme.name

    @property
    def outputs(self) -> tuple[str, ...]:
        return tuple(f"{axis}_{k}" for k in range(self.scheme.points) for axis in "xy")

    def wanted(self) -> tuple[str, ...]:
        return (self.scheme.column,)

    def columns(self, available: frozenset[str]) -> tuple[str, ...]:
        return tuple(name for name in self.wanted() if name in available)

    def encode(self, source: Columns, rows: np.ndarray | None = None) -> Encoded:
        """Return points ``(N, P, 2)`` in pixels of the stored image, and masks ``(N, P)``.

        The transform moves them with the pixels; ``to_fractions`` then gives the model's representation.
        """
        points = self.scheme.points
        if self.scheme.column not in source.names:
            size = len(source.strings("image", rows)[0])
            return Encoded(np.zeros((size, points, 2), np.float32), np.zeros((size, points), bool))
        values, valid = source.numbers(self.scheme.column, rows)
        pixels = values.reshape(-1, points, 2)
        mask = valid[:, None] & np.isfinite(pixels).all(2)
        return Encoded(np.where(mask[..., None], pixels, 0).astype(np.float32), mask)

    def link(self, raw: Tensor) -> Tensor:
        return raw.reshape(raw.shape[0], self.scheme.points, 2) + 0.5

    def decode(self, values: np.ndarray) -> dict[str, np.ndarray]:
        return {self.scheme.column: values.reshape(len(values), -1)}

    def read_values(self, source: Columns, rows: np.ndarray | None = None) -> np.ndarray:
        return source.numbers(self.scheme.column, rows)[0].reshape(-1, self.scheme.points, 2)


def to_fractions(pixels: Tensor, height: int, width: int) -> Tensor:
    """Return points as fractions of the image; the inverse of ``to_pixels``. Shape ``(…, 2)`` is kept."""
    return (pixels + 0.5) / pixels.new_tensor([width, height])


def to_pixels(fractions: Tensor, height: int, width: int) -> Tensor:
    """Return points in pixels, first pixel centre at 0, of fractions ``(…, 2)``."""
    return fractions * fractions.new_tensor([width, height]) - 0.5


class HeadPose(_ScalarColumns):
    """Pitch, yaw and roll in degrees. The representation is the angle; heads start near zero and scale by 30°.

    A model predicts the roll of the face in the crop that it sees; a table holds that in the stored image.
    """

    low: ClassVar[float] = -180.0
    high: ClassVar[float] = 180.0
    _columns: ClassVar[tuple[str, ...]] = tuple(f"pose_{angle}" for angle in labels.POSE_ANGLES)

    @property
    def outputs(self) -> tuple[str, ...]:
        return labels.POSE_ANGLES

    def _output_columns(self) -> tuple[str, ...]:
        return self._columns

    def link(self, raw: Tensor) -> Tensor:
        return raw * 30.0

    def flip(self, encoded: Encoded) -> Encoded:
        return Encoded(encoded.target * np.array([1, -1, -1], np.float32), encoded.mask)

    def turn(self, encoded: Encoded, degrees: np.ndarray) -> Encoded:
        target = encoded.target.copy()
        roll = target[:, 2] + degrees
        roll = roll - 360 * np.round(roll / 360)
        target[:, 2] = np.where(encoded.mask[:, 2], roll, 0)
        return Encoded(target, encoded.mask)


class Attributes(_ScalarColumns):
    """Binary attributes by name (``attribute_<name>`` columns), represented by logits.

    Args:
        names: Attribute names in output order; None takes every ``attribute_`` column of the training tables.
        **common: Arguments of ``Task``.
    """

    flags: ClassVar[bool] = True
    low: ClassVar[float] = 0.0
    high: ClassVar[float] = 1.0
    prefix: ClassVar[str] = "attribute_"

    def __init__(self, names: Sequence[str] | None = None, **common: Any) -> None:  # noqa: ANN401
        super().__init__(**common)
        self.names = None if names is None else tuple(str(name) for name in names)

    def bind(self, sources: Sequence[Columns]) -> None:
        if self.names is None:
            found = sorted({c for source in sources for c in source.names if c.startswith(self.prefix)})
            self.names = tuple(name.removeprefix(self.prefix) for name in found) or None
        if self.names is None:
            raise DataError(f"no table has a column that starts with {self.prefix}")
        super().bind(sources)

    def vocabulary(self) -> dict[str, list]:
        return {"names": list(self.outputs)}

    @property
    def outputs(self) -> tuple[str, ...]:
        return self.names or ()

    def _output_columns(self) -> tuple[str, ...]:
        return tuple(self.prefix + name for name in self.outputs)

    def predict(self, output: Tensor) -> Tensor:
        return output.sigmoid()


class Coefficients(_ScalarColumns):
    """Continuous coefficients under the names of the columns that hold them, e.g. a teacher's blendshapes.

    They are rig coefficients of a named teacher, neither FACS intensities nor probabilities.

    Args:
        names: Columns in output order; None takes every column that starts with ``prefix``.
        prefix: Prefix that marks coefficient columns.
        low: Smallest value that a label may have.
        high: Largest value that a label may have. Predictions are clamped to [low, high].
        **common: Arguments of ``Task``.
    """

    full_bar: ClassVar[float | None] = 1.0

    def __init__(
        self,
        names: Sequence[str] | None = None,
        prefix: str = "bs_",
        low: float = 0.0,
        high: float = 1.0,
        **common: Any,  # noqa: ANN401
    ) -> None:
        super().__init__(**common)
        self.names = None if names is None else tuple(str(name) for name in names)
        self.prefix = prefix
        self.low, self.high = float(low), float(high)  # type: ignore[misc]

    def bind(self, sources: Sequence[Columns]) -> None:
        if self.names is None:
            found = sorted({c for source in sources for c in source.names if c.startswith(self.prefix)})
            self.names = tuple(found) or None
        if self.names is None:
            raise DataError(f"no table has a column that starts with {self.prefix}")
        super().bind(sources)

    def vocabulary(self) -> dict[str, list]:
        return {"names": list(self.outputs)}

    @property
    def outputs(self) -> tuple[str, ...]:
        return self.names or ()

    def _output_columns(self) -> tuple[str, ...]:
        return self.outputs

    def flip(self, encoded: Encoded) -> Encoded:
        """Exchange outputs whose names differ by Left and Right alone, e.g. ``bs_jawLeft`` and ``bs_jawRight``.

        An output of one side whose partner is not among the outputs has no label in the mirrored image.
        """
        index = {name: k for k, name in enumerate(self.outputs)}
        partner = {"Left": "Right", "Right": "Left"}
        order = list(range(len(self.outputs)))
        known = np.ones(len(self.outputs), bool)
        for name, k in index.items():
            for side, other in partner.items():
                if name.endswith(side):
                    order[k] = index.get(name.removesuffix(side) + other, k)
                    known[k] = order[k] != k
        mask = encoded.mask[:, order] & known
        return Encoded(np.where(mask, encoded.target[:, order], 0), mask)

    def predict(self, output: Tensor) -> Tensor:
        return torch.clamp(output, self.low, self.high)
