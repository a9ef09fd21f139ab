# SPDX-License-Identifier: Apache-2.0
"""The data of a run: sources split into parts, tasks bound and checked, loaders that can start at any batch."""

from __future__ import annotations

import logging
import os
import signal
import threading
from collections.abc import Callable, Mapping, Sequence
from typing import Any, NamedTuple

import cv2
import numpy as np
import pytorch_lightning as pl
import torch
from torch.utils.data import DataLoader

from affect.data.batch import FaceBatch
from affect.data.dataset import FaceDataset, collate, croppable
from affect.data.images import Source
from affect.data.protocol import (
    PARTS,
    TEST,
    TRAIN,
    VALIDATION,
    Division,
    Protocol,
    divide,
    faceless_rows,
    group_codes,
    groups_of,
    keep_classes,
    people_of,
    require_parts,
    spread,
)
from affect.data.sampling import EpochSampler, OrderedSampler, Pool, Sampling, class_pools, weighted_pool
from affect.data.transforms import FaceTransform
from affect.errors import ConfigError, DataError, near
from affect.tasks.base import Task, require_own_columns

_log = logging.getLogger(__name__)

ALL = "all"
_BLOCK = 1 << 16
_MOST_CLASSES = 64


class FaceLoader(DataLoader):
    """A training loader whose place in the epoch goes into checkpoints.

    Lightning stores ``state_dict`` with a checkpoint and gives it back before the first batch. The place is what the
    trainer has completed, not what workers have fetched ahead.

    Args:
        position: Returns (epoch, batches of it that are completed).
        **arguments: Those of ``torch.utils.data.DataLoader``; the sampler is an ``EpochSampler``.
    """

    def __init__(self, position: Callable[[], tuple[int, int]], **arguments: Any) -> None:  # noqa: ANN401
        super().__init__(**arguments)
        self.position = position
        self.order = arguments["sampler"]

    def state_dict(self) -> dict[str, int]:
        """Return epoch and batch to continue at."""
        epoch, batch = self.position()
        return {"epoch": epoch, "batch": batch}

    def load_state_dict(self, state: Mapping[str, int]) -> None:
        """Continue at the place of ``state_dict``."""
        self.order.load_state_dict(state)


class LabelCounts(NamedTuple):
    """Statistics of one task's labels in some rows, float64 or int64 ``(K,)`` each.

    Attributes:
        labelled: Number of labelled cells.
        total: Sum of the labels.
        low: Smallest label, infinite without one.
        high: Largest label, minus infinite without one.
    """

    labelled: np.ndarray
    total: np.ndarray
    low: np.ndarray
    high: np.ndarray

    @property
    def rates(self) -> np.ndarray:
        """Mean label of each output, float64 ``(K,)``; NaN where none is labelled."""
        return np.divide(self.total, self.labelled, out=np.full(len(self.total), np.nan), where=self.labelled > 0)


def count_labels(task: Task, sources: Sequence[Source], rows: Sequence[np.ndarray]) -> LabelCounts:
    """Return statistics of a task's labels in ``rows`` of ``sources``, block by block, so that memory stays flat.

    For landmarks an entry is a point and only ``labelled`` has a meaning.
    """
    counts: LabelCounts | None = None
    for source, chosen in zip(sources, rows, strict=True):
        for start in range(0, len(chosen), _BLOCK):
            target, mask = task.encode(source.table, chosen[start : start + _BLOCK])
            if target.ndim > mask.ndim:
                target = np.zeros(mask.shape, np.float32)
            block = LabelCounts(
                mask.sum(0),
                np.where(mask, target, 0).sum(0, dtype=np.float64),
                np.where(mask, target, np.inf).min(0),
                np.where(mask, target, -np.inf).max(0),
            )
            counts = block if counts is None else _merge(counts, block)
    if counts is None:
        size = task.num_outputs if task.landmark_scheme is None else task.num_outputs // 2
        counts = LabelCounts(np.zeros(size, np.int64), np.zeros(size), np.full(size, np.inf), np.full(size, -np.inf))
    return counts


def _merge(a: LabelCounts, b: LabelCounts) -> LabelCounts:
    return LabelCounts(a.labelled + b.labelled, a.total + b.total, np.minimum(a.low, b.low), np.maximum(a.high, b.high))


def require_variety(name: str, task: Task, counts: LabelCounts) -> list[str]:
    """Return notes on outputs that training cannot learn.

    Raises:
        DataError: If no training row has a label of the task, or all training labels are of one class or one value.
    """
    if not counts.labelled.any():
        raise DataError(
            f"task {name}: no training row has a label ({', '.join(task.wanted()[:4])}); remove the task or label rows"
        )
    if task.landmark_scheme is not None:
        return []
    outputs = np.array(task.outputs)
    if task.softmax:
        present = outputs[counts.total > 0]
        if len(present) < 2:
            raise DataError(f"task {name}: all training labels are {present[0]}; at least two classes are needed")
        absent = outputs[counts.total <= 0]
        return [f"task {name}: no training label of {', '.join(absent)}"] if len(absent) else []
    known = counts.labelled > 0
    constant = known & np.equal(counts.low, counts.high)
    if bool(constant[known].all()):
        values = ", ".join(f"{o}={v:g}" for o, v in list(zip(outputs[known], counts.low[known], strict=True))[:4])
        raise DataError(f"task {name}: each output has one value only in training ({values}); nothing can be learnt")
    notes = []
    if constant.any():
        notes.append(f"task {name}: one value only in training for {', '.join(outputs[constant])}")
    if not known.all():
        notes.append(f"task {name}: no training label of {', '.join(outputs[~known])}")
    return notes


# -------------------------------------------------------------------------------------------------- sampling


def sampling_pools(
    sampling: Sampling, sources: Sequence[Source], rows: Sequence[np.ndarray], tasks: Mapping[str, Task]
) -> list[Pool]:
    """Return what a training epoch draws from.

    Args:
        sampling: Kind, key and shares.
        sources: All sources.
        rows: Training rows of each source; positions count through them.
        tasks: Bound tasks.

    Raises:
        ConfigError: If a source in ``ratios`` or the key is unknown, or the key has no classes.
    """
    names = [source.name for source in sources]
    for name in sampling.ratios or ():
        if name not in names:
            raise ConfigError(f"data.sampling.ratios: no source {name}; {near(name, names)}")
    ends = np.cumsum([len(part) for part in rows])
    blocks = [np.arange(end - len(part), end) for part, end in zip(rows, ends, strict=True)]
    if sampling.ratios is not None:
        shares = [float(sampling.ratios.get(name, 1.0)) for name in names]
    elif sampling.batches == "alternate":
        shares = [float(len(block)) for block in blocks]
    else:
        blocks, shares = [np.arange(int(ends[-1]) if len(ends) else 0)], [1.0]
    groups = [(k, at, share) for k, (at, share) in enumerate(zip(blocks, shares, strict=True))]
    if sampling.kind == "uniform":
        return [Pool(at, share, source=k) for k, at, share in groups]
    key = str(sampling.key)
    if sampling.kind == "balanced":
        classes = _classes(key, sources, rows, tasks)
        return [pool for k, at, share in groups if len(at) for pool in class_pools(at, classes[at], share, k)]
    weights = np.concatenate([_column_weights(key, source, part) for source, part in zip(sources, rows, strict=True)])
    return [weighted_pool(at, weights[at], share, f"column {key}", k) for k, at, share in groups if len(at)]


def _classes(key: str, sources: Sequence[Source], rows: Sequence[np.ndarray], tasks: Mapping[str, Task]) -> np.ndarray:
    """Return the class of each training position, -1 without a label: of a task with classes, or of a column."""
    task = tasks.get(key)
    if task is not None:
        if not task.softmax:
            raise ConfigError(f"data.sampling.key={key}: the task has no classes; name a column of the table instead")
        found = []
        for source, part in zip(sources, rows, strict=True):
            target, mask = task.encode(source.table, part)
            known = (mask & (target > 0)).any(1)
            found.append(np.where(known, target.argmax(1), -1))
        return np.concatenate(found)
    labels: dict[str, int] = {}
    found = []
    for source, part in zip(sources, rows, strict=True):
        if key not in source.table.names:
            options = [*tasks, *source.table.names]
            raise ConfigError(f"data.sampling.key={key}: neither a task nor a column; {near(key, options)}")
        values, valid = _categories(source, key, part)
        names, inverse = np.unique(values, return_inverse=True)
        if len(names) > _MOST_CLASSES:
            raise ConfigError(
                f"data.sampling.key={key}: {len(names)} different values are too many to balance; use weighted sampling"
            )
        number = np.array([labels.setdefault(str(name), len(labels)) for name in names], np.int64)
        found.append(np.where(valid, number[inverse], -1))
    return np.concatenate(found)


def _categories(source: Source, column: str, rows: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    if column.endswith("_occurrence") or column.startswith("attribute_"):
        values, valid = source.table.numbers(column, rows)
        return (values >= 0.5).astype(np.int64), valid  # Soft labels count as metrics count them.
    values, valid = source.table.strings(column, rows)
    return values.astype(str), valid


def _column_weights(column: str, source: Source, rows: np.ndarray) -> np.ndarray:
    if column not in source.table.names:
        raise ConfigError(f"data.sampling.key={column}: no such column; {near(column, source.table.names)}")
    return source.table.numbers(column, rows)[0]


# ----------------------------------------------------------------------------------------------- data module


class FaceDataModule(pl.LightningDataModule):
    """Sources, tasks and protocol in, batches out.

    ``setup("fit")`` checks everything that could fail later: columns, label ranges, images' crops, leaks, empty parts,
    labels of one class. ``setup("test")`` only binds and checks labels, so that any table can be evaluated.

    Distributed training needs ``Trainer(use_distributed_sampler=False)``: samplers share out batches themselves,
    without duplicates in evaluation.

    Args:
        sources: Tables with their images.
        tasks: Tasks by name; bound to the sources here and fitted on training rows.
        protocol: How sources are split and scored.
        train_transform: Crop and augmentation in training.
        eval_transform: Crop in evaluation.
        batch_size: Samples of a batch of one process.
        num_workers: Loading processes; 0 loads in the main process. Batches do not depend on it.
        sampling: What training epochs are drawn by; None visits every row once.
        schemes: Landmark schemes of ``FaceBatch.points``.
        seed: Seed of order and augmentation.
        limit: At most so many rows of each part, spread evenly; None takes all.
        protocols: How single sources are split, by name, where that is not ``protocol``.
        prefetch_factor: Batches that each loading process prepares ahead; None takes torch's choice, 2.
        pin_memory: Whether batches lie in page-locked memory, from which a copy to a GPU overlaps with computing; None
            does so where there is one.
    """

    def __init__(
        self,
        sources: Sequence[Source],
        tasks: Mapping[str, Task],
        protocol: Protocol,
        train_transform: FaceTransform,
        eval_transform: FaceTransform,
        batch_size: int = 64,
        num_workers: int = 0,
        sampling: Sampling | None = None,
        schemes: Sequence[str] = (),
        seed: int = 0,
        limit: int | None = None,
        protocols: Mapping[str, Protocol] | None = None,
        prefetch_factor: int | None = None,
        pin_memory: bool | None = None,
    ) -> None:
        super().__init__()
        if prefetch_factor is not None and prefetch_factor < 1:
            raise ConfigError(f"data.prefetch_factor={prefetch_factor}: at least 1, or null")
        if pin_memory and not torch.cuda.is_available():
            raise ConfigError(
                "data.pin_memory=true: there is no GPU to copy to; write null, which pins where there is one"
            )
        self.prefetch_factor, self.pin_memory = prefetch_factor, pin_memory
        if batch_size < 1 or num_workers < 0 or (limit is not None and limit < 1):
            raise ConfigError(f"data: batch_size={batch_size}, num_workers={num_workers}, limit={limit} out of range")
        if not sources:
            raise ConfigError("data: at least one source is needed; choose a dataset")
        doubled = {source.name for source in sources if [s.name for s in sources].count(source.name) > 1}
        if doubled:
            raise ConfigError(f"data: source names must differ, {sorted(doubled)[0]} occurs twice")
        self.delivered = list(sources)
        self.tasks = dict(tasks)
        self.protocol = protocol
        for name in protocols or {}:
            if name not in (source.name for source in sources):
                raise ConfigError(f"data: a protocol of {name}: {near(name, [source.name for source in sources])}")
        self.protocols = [(protocols or {}).get(source.name, protocol) for source in sources]
        self.sources = [keep_classes(source, own) for source, own in zip(sources, self.protocols, strict=True)]
        self.train_transform, self.eval_transform = train_transform, eval_transform
        self.batch_size, self.num_workers = int(batch_size), int(num_workers)
        self.sampling = sampling or Sampling()
        self.schemes, self.seed, self.limit = tuple(schemes), int(seed), limit
        self.notes: list[str] = []
        self._bound = self._fitted = False
        self._usable: list[np.ndarray] = []
        self._dropped: dict[str, int] = {}
        self._codes: dict[int, np.ndarray] = {}
        self._counts: dict[str, LabelCounts] = {}
        self._divisions: list[Division] | None = None
        self._assigned: dict[str, list[np.ndarray]] | None = None
        self._start = (0, 0)

    # ----------------------------------------------------------------------------------------------- setting up

    def setup(self, stage: str | None = None) -> None:
        """Bind, check and split; a second call of the same stage does nothing.

        Args:
            stage: ``fit`` (or None) for training; anything else for evaluation alone.

        Raises:
            DataError: If the data cannot be used as configured.
        """
        if not self._bound:
            self._bind()
        if stage in (None, "fit") and not self._fitted:
            self._fit()

    def _bind(self) -> None:
        tables = [source.table for source in self.sources]
        for task in self.tasks.values():
            task.bind(tables)
        require_own_columns(self.tasks)
        for source in self.delivered:  # A class whose rows the protocol leaves out is no unknown one.
            for name, task in self.tasks.items():
                try:
                    task.check(source.table)
                except DataError as error:
                    raise DataError(f"{source.name}, task {name}: {error}") from error
        for source, protocol in zip(self.sources, self.protocols, strict=True):
            for note in self._label_notes(source, protocol):
                _log.warning("%s", note)
                self.notes.append(note)
        for source in self.sources:
            usable = croppable(source.table, source.recipe, np.arange(len(source.table)))
            if not usable.any():
                needs = source.recipe.needs if source.recipe is not None else "nothing"
                raise DataError(f"{source.name}: no row has the {needs} that the crop needs; use prepare=none")
            self._usable.append(usable)
            if source.recipe is not None and not usable.all():
                reason = f"no {source.recipe.needs} to crop by"
                self._dropped[reason] = self._dropped.get(reason, 0) + int((~usable).sum())
        self._bound = True

    def _label_notes(self, source: Source, protocol: Protocol) -> list[str]:
        """Return sentences on rows that count otherwise than a reader of results would expect."""
        where = f"{source.name}: " if len(self.sources) > 1 else ""
        column = protocol.group or source.group
        alone = source.table.column(column).null_count if column in source.table.names else 0
        notes = [f"{where}{alone} rows without {column} are groups of their own"] if alone else []
        return notes + [
            f"{where}task {n}: {note}" for n, task in self.tasks.items() for note in task.notes(source.table)
        ]

    @property
    def divisions(self) -> list[Division]:
        """How the rows of each source are used, before ``limit`` and whatever the crop cannot do without."""
        if self._divisions is None:
            self._divisions = divide(self.sources, self.protocols)
            for source, division in zip(self.sources, self._divisions, strict=True):
                where = f"{source.name}: " if len(self.sources) > 1 else ""
                self.notes += [f"{where}{note}" for note in division.notes]
        return self._divisions

    @property
    def leaks(self) -> list[str]:
        """Sentences on people or groups in two parts, which only ``protocol.allow_leak`` lets pass."""
        return [leak for division in self.divisions for leak in division.leaks]

    def people(self) -> dict[str, list[str]]:
        """Return who trains or selects, by name space of identities; the test part where it selects is left out.

        Of tables without people it is what ``groups_of`` keeps of them.
        """
        parts = self._parts()
        selecting = [TRAIN] if self.protocol.selection == "best_on_test" else [TRAIN, VALIDATION]
        rows = [np.concatenate(chosen) for chosen in zip(*(parts[part] for part in selecting), strict=True)]
        return people_of(self.sources, rows) | groups_of(self.sources, rows, self.protocols)

    def faceless(self, part: str) -> int:
        """Return how many rows of a part show no found face, also where ``protocol.missing_faces`` leaves them out."""
        count = 0
        for k, (source, protocol) in enumerate(zip(self.sources, self.protocols, strict=True)):
            rows = faceless_rows(source.table) if part == ALL else self.divisions[k].faceless[part]
            if not len(rows):
                continue
            left_out = {"drop": True, "negative": part in (TRAIN, VALIDATION)}.get(protocol.missing_faces, False)
            count += len(rows) if left_out else int(np.isin(rows, self.part_rows(part)[k]).sum())
        return count

    def _parts(self) -> dict[str, list[np.ndarray]]:
        """Return the rows of each part by source, before ``limit``."""
        if self._assigned is None:
            pairs = list(zip(self.divisions, self._usable, strict=True))
            self._assigned = {
                part: [division.rows[part][usable[division.rows[part]]] for division, usable in pairs] for part in PARTS
            }
            for division, usable in pairs:
                for reason, rows in division.unused.items():
                    count = int(usable[rows].sum())
                    if count:
                        self._dropped[reason] = self._dropped.get(reason, 0) + count
        return self._assigned

    def _fit(self) -> None:
        parts = self._parts()
        require_parts(self.sources, [{p: parts[p][k] for p in PARTS} for k in range(len(self.sources))], self.protocols)
        training = parts[TRAIN]
        for name, task in self.tasks.items():
            self._counts[name] = count_labels(task, self.sources, training)
            for note in require_variety(name, task, self._counts[name]):
                _log.warning("%s", note)
                self.notes.append(note)
            if task.landmark_scheme is None:
                task.rates = self._counts[name].rates
            if _needs_fit(task):
                encoded = [
                    task.encode(source.table, rows)
                    for source, rows in zip(self.sources, training, strict=True)
                    if len(rows)
                ]
                task.fit(encoded)
        self._fitted = True

    # ------------------------------------------------------------------------------------------------- parts

    def part_rows(self, part: str) -> list[np.ndarray]:
        """Return the rows of ``train``, ``validation``, ``test`` or ``all`` by source, after ``limit``."""
        if part not in (*PARTS, ALL):
            raise ConfigError(f"part={part}: {near(part, (*PARTS, ALL))}")
        self.setup("test")
        rows = [np.flatnonzero(usable) for usable in self._usable] if part == ALL else self._parts()[part]
        return spread(rows, self.limit)

    def rows(self, part: str) -> int:
        """Return the number of rows of a part."""
        return sum(len(rows) for rows in self.part_rows(part))

    def dataset(self, part: str, augment: bool = False) -> FaceDataset:
        """Return a part in row order, cropped as in evaluation or augmented as in training."""
        transform = self.train_transform if augment else self.eval_transform
        return FaceDataset(self.sources, self.part_rows(part), self.tasks, transform, self.schemes, self.seed)

    def sample(self, part: str, count: int, augment: bool | None = None, each: bool = False) -> FaceBatch:
        """Return ``count`` samples, spread evenly over a part.

        Args:
            part: The part.
            count: Number of samples; fewer where the part is smaller.
            augment: Whether they are augmented; None does as the model sees them, augmented in training.
            each: Take as many of each source; a small one gives next to nothing beside a large one otherwise.
        """
        dataset = self.dataset(part, augment=part == TRAIN if augment is None else augment)
        sizes = [len(rows) for rows in dataset.rows] if each else [len(dataset)]
        starts = np.cumsum([0, *sizes])
        spread_out = [
            start + np.linspace(0, size - 1, min(count, size)).round()
            for start, size in zip(starts[:-1], sizes, strict=True)
        ]
        return dataset.batch(0, np.concatenate(spread_out).astype(np.int64))

    # ----------------------------------------------------------------------------------------------- loaders

    def train_dataloader(self) -> FaceLoader:
        """Return the loader of training epochs; it continues where ``set_position`` or a checkpoint says."""
        self.setup("fit")
        self._refuse_foreign_sampler()
        dataset = self.dataset(TRAIN, augment=True)
        pools = sampling_pools(self.sampling, self.sources, self.part_rows(TRAIN), self.tasks)
        length = len(dataset) if self.sampling.length is None else self.sampling.length
        rank, world = self._process()
        alternate = self.sampling.batches == "alternate"
        sampler = EpochSampler(pools, length, self.batch_size, self.seed, rank, world, alternate=alternate)
        sampler.set_position(*self._start)
        return FaceLoader(self.position, **self._loading(dataset, sampler))

    def val_dataloader(self) -> DataLoader | list:
        """Return the loader of the validation part, shared out over processes; none if the part is empty."""
        return self._shared(VALIDATION)

    def test_dataloader(self) -> DataLoader | list:
        """Return the loader of the test part, shared out over processes."""
        return self._shared(TEST)

    def predict_dataloader(self) -> DataLoader | list:
        """Return the loader of the test part, shared out over processes."""
        return self._shared(TEST)

    def part_dataloader(self, part: str, most: int | None = None) -> DataLoader:
        """Return the loader of a whole part (``all``: of every row) in row order, on this process alone.

        Args:
            part: The part.
            most: At most so many rows, spread evenly; None takes all.

        Raises:
            DataError: If the part is empty.
        """
        rows = spread(self.part_rows(part), most)
        dataset = FaceDataset(self.sources, rows, self.tasks, self.eval_transform, self.schemes, self.seed)
        if not len(dataset):
            asked = self.protocol.test_name
            raise DataError(f"the {part} part is empty (protocol.test={asked}); evaluate part=all instead")
        loading = self._loading(dataset, OrderedSampler(len(dataset), self.batch_size))
        return DataLoader(**{**loading, "persistent_workers": False})

    def _shared(self, part: str) -> DataLoader | list:
        self._refuse_foreign_sampler()
        dataset = self.dataset(part)
        if not len(dataset):
            return []
        rank, world = self._process()
        return DataLoader(**self._loading(dataset, OrderedSampler(len(dataset), self.batch_size, rank, world)))

    def _loading(self, dataset: FaceDataset, sampler: EpochSampler | OrderedSampler) -> dict[str, Any]:
        # A key asks for a whole batch, so batching is the sampler's and labels are read in one go.
        return {
            "dataset": dataset,
            "sampler": sampler,
            "batch_size": None,
            "collate_fn": collate,
            "num_workers": self.num_workers,
            "worker_init_fn": prepare_worker,
            "persistent_workers": self.num_workers > 0,
            "prefetch_factor": self.prefetch_factor if self.num_workers > 0 else None,
            "pin_memory": torch.cuda.is_available() if self.pin_memory is None else self.pin_memory,
        }

    def _process(self) -> tuple[int, int]:
        trainer = self.trainer
        return (0, 1) if trainer is None else (trainer.global_rank, trainer.world_size)

    def _refuse_foreign_sampler(self) -> None:
        trainer = self.trainer
        if trainer is not None and trainer.world_size > 1 and trainer._accelerator_connector.use_distributed_sampler:
            raise ConfigError("several devices need trainer.use_distributed_sampler=false: the data module shares out")

    def transfer_batch_to_device(self, batch: FaceBatch, device: torch.device, dataloader_idx: int) -> FaceBatch:
        """Copy a batch to the device; from pinned memory the copy overlaps with computing."""
        return batch.to(device, non_blocking=True)

    # ---------------------------------------------------------------------------------------------- position

    def position(self) -> tuple[int, int]:
        """Return the epoch and the number of its batches that the trainer has completed.

        Without a running trainer it is what ``set_position`` said.
        """
        trainer = self.trainer
        if trainer is None or trainer.fit_loop._combined_loader is None:
            return self._start
        epochs: Any = trainer.fit_loop.epoch_progress.current
        batches: Any = trainer.fit_loop.epoch_loop.batch_progress.current
        if batches.processed >= trainer.num_training_batches:
            # The counter keeps its end until the next epoch's first batch; epochs begun are all finished then.
            return (epochs.started, 0)
        return (epochs.processed, batches.processed)

    def set_position(self, epoch: int, batch: int) -> None:
        """Let training start at batch ``batch`` of epoch ``epoch``; takes effect with the next training loader."""
        self._start = (int(epoch), int(batch))

    def state_dict(self) -> dict[str, int]:
        """Return the place to continue at.

        The loader's own state comes too late where an optimiser asks for the number of steps: Lightning then makes the
        loader before it restores the state of its loops.
        """
        epoch, batch = self.position()
        return {"epoch": epoch, "batch": batch}

    def load_state_dict(self, state_dict: dict[str, int]) -> None:
        """Continue at the place of ``state_dict``."""
        self.set_position(state_dict["epoch"], state_dict["batch"])

    # ----------------------------------------------------------------------------------------------- summary

    def summary(self) -> dict[str, Any]:
        """Return what results say of the data, ready for JSON.

        Returns:
            ``parts``: rows, groups and, by task, labelled cells and mean label (rate of positives, share of a class) of
            each output, and how many rows show no found face; ``sources``: name, dataset, rows, group and fingerprint;
            ``skipped``: number by reason; ``notes``: sentences; ``leaks``: sentences on people in two parts.
        """
        self.setup("test")
        names = PARTS if self._fitted else (*PARTS, ALL)
        parts: dict[str, Any] = {}
        for part in names:
            try:
                rows = self.part_rows(part)
            except DataError:
                continue  # A table that is only evaluated need not be splittable.
            groups = sum(self._groups(k, chosen) for k, chosen in enumerate(rows))
            labels = {name: self._label_summary(name, part, rows) for name in self.tasks}
            parts[part] = {
                "rows": sum(len(chosen) for chosen in rows),
                "groups": groups,
                "without_face": self.faceless(part),
                "labels": labels,
            }
        skipped = dict(self._dropped)
        for source in self.sources:
            for reason, count in source.skipped.items():
                skipped[reason] = skipped.get(reason, 0) + int(count)
        several = len(self.sources) > 1
        notes = [f"{s.name}: {note}" if several else note for s in self.sources for note in s.notes]
        return {
            "parts": parts,
            "sources": [
                {
                    "name": source.name,
                    "dataset": source.table.metadata.get("dataset", source.name),
                    "rows": len(source.table),
                    "group": protocol.group or source.group,
                    "fingerprint": source.table.fingerprint,
                }
                for source, protocol in zip(self.delivered, self.protocols, strict=True)
            ],
            "skipped": skipped,
            "notes": [*notes, *self.notes],
            "leaks": self.leaks if self._divisions is not None else [],
        }

    def _groups(self, index: int, rows: np.ndarray) -> int:
        """Return the number of groups that ``rows`` of a source belong to."""
        if index not in self._codes:
            source = self.sources[index]
            self._codes[index] = group_codes(source.table, self.protocols[index].group or source.group)[0]
        return int(np.count_nonzero(np.bincount(self._codes[index][rows]))) if len(rows) else 0

    def _label_summary(self, name: str, part: str, rows: Sequence[np.ndarray]) -> dict[str, Any]:
        task = self.tasks[name]
        known = self._counts.get(name) if part == TRAIN and self.limit is None else None
        counts = count_labels(task, self.sources, rows) if known is None else known
        if task.landmark_scheme is not None:
            return {"labelled": int(counts.labelled.sum())}
        means = np.divide(counts.total, counts.labelled, out=np.zeros(len(counts.total)), where=counts.labelled > 0)
        return {
            "labelled": dict(zip(task.outputs, counts.labelled.tolist(), strict=True)),
            "mean": {
                name: float(mean) if known else None
                for name, mean, known in zip(task.outputs, means, counts.labelled, strict=True)
            },
        }


def prepare_worker(worker: int) -> None:
    """Keep OpenCV to one thread in a loading process, and leave signals of others to the process that it works for.

    Processes are the parallelism, threads would only compete. Schedulers signal every process of a job; a worker that
    died of it would take the run down before its state is saved.
    """
    cv2.setNumThreads(0)
    for signum in (signal.SIGUSR1, signal.SIGUSR2):
        signal.signal(signum, signal.SIG_IGN)
    signal.pthread_sigmask(signal.SIG_BLOCK, {signal.SIGTERM})
    threading.Thread(target=_end_with_parent, daemon=True).start()


def _end_with_parent() -> None:
    """Take SIGTERM from the process that this one works for, and from nobody else."""
    while signal.sigwaitinfo({signal.SIGTERM}).si_pid != os.getppid():
        pass
    os._exit(0)


def _needs_fit(task: Task) -> bool:
    """Whether fitting would do anything, which spares the labels of every training row in memory at once."""
    if type(task).fit is not Task.fit:
        return True
    return any(hasattr(part, "fit") for part in (task.loss, task.target) if part is not None)
