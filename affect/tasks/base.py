# SPDX-License-Identifier: Apache-2.0
"""The contract of a task: what it reads from a table, how a model represents it, and what it writes back.

A task never sees a model or a dataset. Values pass through four spaces:

===============  =======================  ==========================================================
space            shape                    example (action units)
===============  =======================  ==========================================================
columns          a table                  ``au01_occurrence`` … in {0, 1}, null where not coded
target, mask     ``(B, K)``, ``(B, K)``   0. / 1. and whether the cell is labelled
representation   ``(B, K)``               logits: what a model's forward returns and losses take
values           ``(B, K)``               probabilities: what metrics, tables and figures use
===============  =======================  ==========================================================
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Mapping, Sequence
from typing import ClassVar, NamedTuple, Protocol

import numpy as np
from torch import Tensor, nn

from affect.errors import ConfigError, DataError


class Columns(Protocol):
    """Read access to a table's columns, vectorised over rows. ``FaceTable`` implements it."""

    @property
    def names(self) -> frozenset[str]:
        """Names of the columns that exist."""
        ...

    @property
    def expressions(self) -> tuple[str, ...]:
        """Expression classes that the table's source can label; empty if unknown."""
        ...

    def numbers(self, name: str, rows: np.ndarray | None = None) -> tuple[np.ndarray, np.ndarray]:
        """Return values ``(N,)`` or ``(N, width)`` as float32, 0 where null, and validity ``(N,)`` as bool."""
        ...

    def strings(self, name: str, rows: np.ndarray | None = None) -> tuple[np.ndarray, np.ndarray]:
        """Return values ``(N,)`` as an object array, ``""`` where null, and validity ``(N,)`` as bool."""
        ...


class Encoded(NamedTuple):
    """Targets and their masks.

    Attributes:
        target: float32 ``(N, K)``, or ``(N, P, 2)`` for landmarks. 0 where the mask is False.
        mask: bool ``(N, K)``, or ``(N, P)`` for landmarks. True where the cell is labelled.
    """

    target: np.ndarray
    mask: np.ndarray


class Task(ABC):
    """One thing to predict from a face.

    Args:
        loss: Module called as ``loss(output, target, mask)`` with representations, targets and masks; it returns the
            sum of the loss over valid cells and their number (see ``affect.losses.base``).
        metrics: Metrics called with values, targets and masks (see ``affect.metrics.base``).
        target: Transform of targets that only losses see (``affect.tasks.targets``); None leaves them as they are.
        weight: Fixed weight of the task's loss in a multi-task sum.
        score: Name of the metric (higher is better) that stands for the task when a checkpoint is selected, e.g.
            ``f1/mean``; None leaves the task out of the selection.

    Attributes:
        softmax: Whether the outputs are classes of one distribution (one loss term) and not K separate terms.
        flags: Whether each value is the probability of a yes or no, which pictures show as present or absent.
        rates: Mean label of the coded training cells of each output ``(K,)``, NaN where none is coded; None before
            training data were seen.
    """

    softmax: ClassVar[bool] = False
    flags: ClassVar[bool] = False
    metrics: list
    rates: np.ndarray | None = None

    def __init__(
        self,
        loss: nn.Module | None = None,
        metrics: Sequence | Mapping | None = None,
        target: TargetTransform | None = None,
        weight: float = 1.0,
        score: str | None = None,
    ) -> None:
        self.loss = loss
        listed = metrics.values() if isinstance(metrics, Mapping) else (metrics or ())
        self.metrics = [metric for metric in listed if metric is not None]
        self.target = target or None  # an empty config node means no transform
        self.weight = float(weight)
        self.score = score

    # ------------------------------------------------------------------------------------------- vocabulary

    @property
    @abstractmethod
    def outputs(self) -> tuple[str, ...]:
        """Name of each output, e.g. ``("AU1", "AU2")``; its length is the number of outputs of a head."""

    @property
    def num_outputs(self) -> int:
        """Number of scalars that a head returns."""
        return len(self.outputs)

    def vocabulary(self) -> dict[str, list]:
        """Return the constructor arguments that fix the outputs, so that a release can be built without any table."""
        return {}

    @property
    def landmark_scheme(self) -> str | None:
        """Scheme of the points that the task predicts; None for tasks without points."""
        return None

    @abstractmethod
    def columns(self, available: frozenset[str]) -> tuple[str, ...]:
        """Return which of the ``available`` columns the task would read."""

    def bind(self, sources: Sequence[Columns]) -> None:
        """Fix outputs that the config left open from what the training tables hold.

        Raises:
            ConfigError: If no table holds a column of the task.
        """
        if not any(self.columns(source.names) for source in sources):
            wanted = ", ".join(self.wanted()[:6])
            raise DataError(f"{type(self).__name__}: no table has its columns ({wanted}); remove the task or add them")
        for metric in self.metrics:
            metric.bind(self.outputs)

    def wanted(self) -> tuple[str, ...]:
        """Return the columns that the task looks for, for messages."""
        return ()

    # ------------------------------------------------------------------------------------- columns ⇄ targets

    @abstractmethod
    def encode(self, source: Columns, rows: np.ndarray | None = None) -> Encoded:
        """Return targets and masks of ``rows`` (all rows if None), vectorised."""

    def check(self, source: Columns) -> None:  # noqa: B027 - a task without a range has nothing to check
        """Raise ``DataError`` if a label lies outside its range, naming column, first row and value."""

    def notes(self, source: Columns) -> list[str]:
        """Return what readers of results have to know of the table's labels, one sentence each."""
        return []

    def flip(self, encoded: Encoded) -> Encoded:
        """Return the targets of the mirrored images."""
        return encoded

    def turn(self, encoded: Encoded, degrees: np.ndarray) -> Encoded:
        """Return the targets of images turned clockwise by ``degrees`` ``(N,)``, before they are mirrored."""
        return encoded

    def unturn(self, values: np.ndarray, degrees: np.ndarray, flipped: np.ndarray) -> np.ndarray:
        """Return values ``(N, K)`` of turned and then mirrored images as they are for the stored images.

        The inverse of ``turn`` followed by ``flip``. A value whose mirrored partner is not predicted stays.

        Args:
            values: Values in the frame of what the model saw.
            degrees: By how much each image was turned clockwise ``(N,)``.
            flipped: Whether it was mirrored after that ``(N,)``.
        """
        mask = np.ones(values.shape[:2], bool)
        mirrored = self.flip(Encoded(values, mask))
        upright = np.where(flipped[:, None] & mirrored.mask, mirrored.target, values)
        return self.turn(Encoded(upright, mask), -degrees).target

    # -------------------------------------------------------------------------------- representation, values

    def link(self, raw: Tensor) -> Tensor:
        """Return the representation of a head's unbounded outputs ``(B, K)``; identity for logits."""
        return raw

    def predict(self, output: Tensor) -> Tensor:
        """Return values (probabilities, bounded numbers) of a representation."""
        return output

    @abstractmethod
    def decode(self, values: np.ndarray) -> dict[str, np.ndarray]:
        """Return table columns of ``values`` ``(N, K)``; a read of them by ``read_values`` gives ``values`` again."""

    @abstractmethod
    def read_values(self, source: Columns, rows: np.ndarray | None = None) -> np.ndarray:
        """Return the values ``(N, K)`` that ``decode`` wrote."""

    def bars(self, row: Mapping[str, float]) -> tuple[dict[str, float], float]:
        """Return what pictures show of one decoded row: a number per name, and the number that fills a bar."""
        return {}, 1.0

    # ----------------------------------------------------------------------------------------------- losses

    def fit(self, encoded: Sequence[Encoded]) -> None:
        """Take statistics of the coded cells of the rows used for fitting (class weights, smoothing rates).

        Args:
            encoded: Targets and masks of each training table, restricted to the training rows.
        """
        for part in (self.loss, self.target):
            if part is not None and hasattr(part, "fit"):
                part.fit(encoded)

    def transform_targets(self, target: Tensor, mask: Tensor) -> Tensor:
        """Return the targets that losses see: smoothed where a target transform is set, after mixup."""
        return target if self.target is None else self.target(target, mask)


class TargetTransform(nn.Module):
    """Maps ``(target, mask)`` to the targets that losses see; metrics and models keep the original ones."""

    def fit(self, encoded: Sequence[Encoded]) -> None:
        """Take statistics of the coded training cells. The default needs none."""


def require_range(source: Columns, column: str, low: float, high: float, integer: bool = False) -> None:
    """Raise ``DataError`` if a valid value of ``column`` is not finite or lies outside ``[low, high]``."""
    values, valid = source.numbers(column)
    flat = values.reshape(len(values), -1)
    with np.errstate(invalid="ignore"):
        bad = ~((flat >= low) & (flat <= high)).all(1)
        if integer:
            bad |= (flat != np.round(flat)).any(1)
    bad &= valid
    if bad.any():
        row = int(np.argmax(bad))
        kind = "an integer" if integer else "a number"
        raise DataError(
            f"column {column}, row {row}: value {flat[row].tolist()} is not {kind} in [{low:g}, {high:g}] "
            f"({int(bad.sum())} such rows); missing labels must be empty, not a number"
        )


def require_own_columns(tasks: Mapping[str, Task]) -> None:
    """Raise ``ConfigError`` if two tasks predict one column of a table, where one would replace the other."""
    owner: dict[str, str] = {}
    for name, task in tasks.items():
        for column in task.decode(np.zeros((1, task.num_outputs), np.float32)):
            if column in owner:
                raise ConfigError(f"tasks {owner[column]} and {name} both predict column {column}; remove one of them")
            owner[column] = name


def require_known(names: Sequence[str] | Sequence[int], known: Mapping | Sequence, what: str) -> None:
    """Raise ``ConfigError`` if a name is not among ``known``."""
    from affect.errors import near

    for name in names:
        if name not in known:
            raise ConfigError(f"unknown {what} {name!r}: {near(str(name), [str(k) for k in known])}")
