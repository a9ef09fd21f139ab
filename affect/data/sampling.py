# SPDX-License-Identifier: Apache-2.0
"""Which samples an epoch visits, in which order and batches: a pure function of (seed, epoch).

Positions count through the rows of all sources of a part, one source after the other. Nothing is remembered between
epochs, so a run can start at any batch of any epoch without visiting what came before, and its workers hold no state:
every batch is asked for by a key that carries its epoch.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from typing import NamedTuple

import numpy as np

from affect.errors import ConfigError, DataError

KINDS = ("uniform", "balanced", "weighted")
BATCHES = ("mixed", "alternate")


class BatchKey(NamedTuple):
    """What a sampler yields and a dataset turns into a batch.

    Attributes:
        epoch: Epoch, which augmentation depends on.
        positions: int64 ``(B,)``.
    """

    epoch: int
    positions: np.ndarray


@dataclass(frozen=True)
class Sampling:
    """What the samples of a training epoch are drawn by.

    Attributes:
        kind: ``uniform`` visits every row once; ``balanced`` visits each class of ``key`` equally often; ``weighted``
            visits rows in proportion to the column ``key``.
        key: Task of classes or column (balanced), column of weights (weighted).
        ratios: Share of an epoch by source name; sources that are not named share 1 each, in these units. None takes
            sources by their number of rows.
        length: Samples in an epoch; None takes the number of training rows.
        batches: ``mixed`` lets a batch hold rows of all sources; ``alternate`` lets it hold rows of one source, and
            sources take turns as evenly as their shares allow.
    """

    kind: str = "uniform"
    key: str | None = None
    ratios: Mapping[str, float] | None = None
    length: int | None = None
    batches: str = "mixed"

    def __post_init__(self) -> None:
        if self.kind not in KINDS:
            raise ConfigError(f"data.sampling.kind={self.kind}: write {', '.join(KINDS)}")
        if (self.kind == "uniform") != (self.key is None):
            wanted = "no" if self.kind == "uniform" else "a"
            raise ConfigError(f"data.sampling.kind={self.kind} takes {wanted} data.sampling.key, got {self.key}")
        shares = list((self.ratios or {}).values())
        if any(share < 0 for share in shares) or (shares and not any(shares)):
            raise ConfigError(f"data.sampling.ratios={dict(self.ratios or {})}: shares must be positive, or 0 for none")
        if self.length is not None and self.length < 1:
            raise ConfigError(f"data.sampling.length={self.length} must be at least 1")
        if self.batches not in BATCHES:
            raise ConfigError(f"data.sampling.batches={self.batches}: write {' or '.join(BATCHES)}")


@dataclass(frozen=True)
class Pool:
    """Positions that are drawn from together, and their share of an epoch.

    Attributes:
        positions: int64 ``(N,)``.
        share: Share of the epoch, relative to the other pools.
        weights: Expected draws of each position, relative to each other ``(N,)``; None draws them equally often.
        source: Index of the source that all of them belong to; only alternating batches ask for it.
    """

    positions: np.ndarray
    share: float
    weights: np.ndarray | None = field(default=None)
    source: int = 0


# ------------------------------------------------------------------------------------------------- orders


def apportion(shares: Sequence[float], total: int) -> np.ndarray:
    """Return whole numbers in proportion to ``shares`` that sum to ``total``, by largest remainders.

    Example:
        >>> apportion([1, 1, 1], 10).tolist()
        [4, 3, 3]
    """
    exact = np.asarray(shares, float) / np.sum(shares) * total
    counts = np.floor(exact + 1e-9).astype(np.int64)
    rest = total - counts.sum()
    counts[np.argsort(counts - exact, kind="stable")[:rest]] += 1
    return counts


def epoch_order(pools: Sequence[Pool], length: int, seed: int, epoch: int) -> np.ndarray:
    """Return the positions that an epoch visits, int64 ``(length,)``, shuffled.

    Each pool gives its exact share. Within a pool every position is drawn equally often, give or take one (with
    weights: the expected number, rounded up or down), so that sampling adds as little noise as it can.
    """
    return _shuffled(_drawn_from(pools), length, np.random.default_rng([seed & 0xFFFFFFFF, epoch, 0x5A]))


def alternating_order(pools: Sequence[Pool], length: int, batch: int, seed: int, epoch: int) -> np.ndarray:
    """Return the positions of an epoch whose batches hold one source each, int64 ``(alternating_length,)``.

    Each source gets whole batches in proportion to the share of its pools, and at least one. Its batches are spread
    evenly over the epoch: with equal shares sources follow each other in turn, with 2 to 1 the first one has two turns
    for each of the second. Within a source positions are drawn as by ``epoch_order``.

    Args:
        pools: What to draw from, each of one source.
        length: Samples in an epoch, if they were whole batches.
        batch: Samples of a batch over all processes.
        seed: Seed of the order.
        epoch: Epoch.
    """
    by_source, turns = _turns(pools, length, batch)
    drawn = [
        _shuffled(own, int(count) * batch, np.random.default_rng([seed & 0xFFFFFFFF, epoch, 0x5A, source])).reshape(
            -1, batch
        )
        for (source, own), count in zip(by_source.items(), turns, strict=True)
    ]
    # A source's k-th of n batches has its place at (k + 1/2) / n of the epoch; sources that meet keep their order.
    places = np.concatenate([(np.arange(count) + 0.5) / count for count in turns])
    return np.concatenate(drawn)[np.argsort(places, kind="stable")].reshape(-1)


def alternating_length(pools: Sequence[Pool], length: int, batch: int) -> int:
    """Return the number of positions that ``alternating_order`` gives, a multiple of ``batch``."""
    return int(_turns(pools, length, batch)[1].sum()) * batch


def _turns(pools: Sequence[Pool], length: int, batch: int) -> tuple[dict[int, list[Pool]], np.ndarray]:
    """Return the pools of each source, and how many batches each has."""
    by_source: dict[int, list[Pool]] = {}
    for pool in _drawn_from(pools):
        by_source.setdefault(pool.source, []).append(pool)
    shares = [sum(pool.share for pool in own) for own in by_source.values()]
    return by_source, np.maximum(apportion(shares, max(length // batch, 1)), 1)


def _drawn_from(pools: Sequence[Pool]) -> list[Pool]:
    return [pool for pool in pools if len(pool.positions) and pool.share > 0]


def _shuffled(pools: Sequence[Pool], length: int, random: np.random.Generator) -> np.ndarray:
    counts = apportion([pool.share for pool in pools], length)
    drawn = [_draw(pool, int(count), random) for pool, count in zip(pools, counts, strict=True)]
    order = np.concatenate(drawn)
    random.shuffle(order)
    return order


def _draw(pool: Pool, count: int, random: np.random.Generator) -> np.ndarray:
    size = len(pool.positions)
    if pool.weights is None:
        whole, rest = divmod(count, size)
        partial = random.permutation(size)[:rest]
        return pool.positions[np.concatenate([np.tile(np.arange(size), whole), partial])]
    # Systematic sampling: equally spaced marks on the line of weights, from one random start, in random order of rows.
    shuffled = random.permutation(size)
    line = np.cumsum(pool.weights[shuffled], dtype=np.float64)
    marks = (random.random() + np.arange(count)) * (line[-1] / max(count, 1))
    found = np.searchsorted(line, marks, side="right")
    return pool.positions[shuffled[np.minimum(found, size - 1)]]


def class_pools(positions: np.ndarray, classes: np.ndarray, share: float, source: int = 0) -> list[Pool]:
    """Return a pool per class with equal shares; positions without a class keep their share of the rows.

    Args:
        positions: ``(N,)``.
        classes: Class of each position ``(N,)``, negative where there is no label.
        share: Share of the epoch of all of them together.
        source: Index of the source that they belong to.
    """
    labelled = classes >= 0
    present = np.unique(classes[labelled])
    pools = []
    if not labelled.all():
        pools.append(Pool(positions[~labelled], share * float((~labelled).mean()), source=source))
    each = share * float(labelled.mean()) / max(len(present), 1)
    return pools + [Pool(positions[classes == value], each, source=source) for value in present]


def weighted_pool(positions: np.ndarray, weights: np.ndarray, share: float, where: str, source: int = 0) -> Pool:
    """Return the pool of positions with a positive weight.

    Raises:
        DataError: If a weight is negative or not a number, or none is positive.
    """
    if not np.isfinite(weights).all() or (weights < 0).any():
        raise DataError(f"{where}: sampling weights must be finite and not negative")
    if not weights.any():
        raise DataError(f"{where}: no training row has a positive sampling weight")
    return Pool(positions[weights > 0], share, weights[weights > 0].astype(np.float64), source)


# ------------------------------------------------------------------------------------------------ samplers


class EpochSampler:
    """Yields the batches of one training epoch as keys; every process gets as many batches as the others.

    A ragged end of the epoch is dropped, unless it is all there is: then the epoch is one smaller batch. Processes
    share out each global batch, so that training does not depend on their number otherwise.

    Args:
        pools: What to draw from.
        length: Samples in an epoch, over all processes.
        batch_size: Samples of a batch of one process.
        seed: Seed of the order.
        rank: Index of this process.
        world_size: Number of processes.
        drop_last: Whether to drop a ragged last batch; False wraps it to a multiple of ``world_size``.
        alternate: Whether a batch holds rows of one source and sources take turns (``alternating_order``); batches are
            whole then, and a source of few rows repeats them in its batch.
    """

    def __init__(
        self,
        pools: Sequence[Pool],
        length: int,
        batch_size: int,
        seed: int,
        rank: int = 0,
        world_size: int = 1,
        drop_last: bool = True,
        alternate: bool = False,
    ) -> None:
        self.pools = list(pools)
        self.length, self.batch_size, self.seed = int(length), int(batch_size), int(seed)
        self.rank, self.world_size, self.drop_last = rank, world_size, drop_last
        self.alternate = alternate
        if alternate:
            self.length = alternating_length(self.pools, self.length, self.batch_size * world_size)
        self.epoch = 0
        self._start = (0, 0)

    def __len__(self) -> int:
        """Number of batches of a whole epoch, wherever the next one starts."""
        whole, rest = divmod(self.length, self.batch_size * self.world_size)
        return whole + bool(rest and (not self.drop_last or not whole))

    def __iter__(self) -> Iterator[BatchKey]:
        epoch, first = self.epoch, self._start[1] if self._start[0] == self.epoch else 0
        step = self.batch_size * self.world_size
        if self.alternate:
            order = alternating_order(self.pools, self.length, step, self.seed, epoch)
        else:
            order = epoch_order(self.pools, self.length, self.seed, epoch)
        for k in range(first, len(self)):
            batch = order[k * step : (k + 1) * step]
            if len(batch) % self.world_size:
                batch = np.concatenate([batch, np.resize(order, -len(batch) % self.world_size)])
            yield BatchKey(epoch, batch[self.rank :: self.world_size])

    def set_epoch(self, epoch: int) -> None:
        """Set the epoch that the next iteration visits. Lightning calls this before each epoch."""
        self.epoch = epoch

    def set_position(self, epoch: int, batch: int) -> None:
        """Let epoch ``epoch`` start at batch ``batch``; other epochs start at their beginning."""
        self.epoch = epoch
        self._start = (epoch, batch)

    def state_dict(self) -> dict[str, int]:
        """Return the position that was set. Batches that are under way do not count: only the trainer knows them."""
        return {"epoch": self._start[0], "batch": self._start[1]}

    def load_state_dict(self, state: Mapping[str, int]) -> None:
        """Set the position of ``state_dict``."""
        self.set_position(state["epoch"], state["batch"])


class OrderedSampler:
    """Yields every position once, in order. Processes take consecutive blocks without padding.

    Blocks may differ by a sample, so that processes may differ by a batch: an evaluation step must not wait for others.

    Args:
        length: Number of positions.
        batch_size: Samples of a batch of one process.
        rank: Index of this process.
        world_size: Number of processes.
    """

    def __init__(self, length: int, batch_size: int, rank: int = 0, world_size: int = 1) -> None:
        self.batch_size = int(batch_size)
        self.start = length * rank // world_size
        self.end = length * (rank + 1) // world_size

    def __len__(self) -> int:
        return -(-(self.end - self.start) // self.batch_size)

    def __iter__(self) -> Iterator[BatchKey]:
        for start in range(self.start, self.end, self.batch_size):
            yield BatchKey(0, np.arange(start, min(start + self.batch_size, self.end)))
