# SPDX-License-Identifier: Apache-2.0
"""What a table of Aff-Wild2's size costs against one of 10,000 rows: opening, memory of workers, a sample, reading.

Unique memory of a process is what it alone holds (``Private_*`` in ``/proc/<process>/smaps_rollup``): pages of the
mapped table and of the parent that several processes see do not count. Workers are measured after all of them have
delivered batches. Every row shows the same crop, decoded anew, so that only tables differ.
"""

from __future__ import annotations

import itertools
import re
import tempfile
import time
from pathlib import Path
from typing import Any

import cv2
import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
from torch.utils.data import DataLoader

from affect import labels
from affect.data.datamodule import FaceDataModule
from affect.data.images import Source
from affect.data.layouts import affwild2
from affect.data.protocol import TRAIN, Protocol
from affect.data.table import FaceTable
from affect.data.transforms import FaceTransform
from affect.errors import ConfigError
from affect.losses import BinaryCrossEntropy, CrossEntropy
from affect.tasks import AUOccurrence, Expression, Task, ValenceArousal

ROWS, SMALL, FRAMES, WORKERS, BATCH, SIDE = 2_700_000, 10_000, 4_500, 8, 64, 112
"""Rows of the large and of the small table, frames of a video, loading processes, samples of a batch, pixels."""


class _OneCrop:
    """A crop of the size of Aff-Wild2's, decoded for every row from the same JPEG in memory."""

    def __init__(self) -> None:
        noise = np.random.default_rng(0).integers(60, 196, (14, 14, 3)).astype(np.uint8)
        worked, data = cv2.imencode(".jpg", cv2.resize(noise, (SIDE, SIDE), interpolation=cv2.INTER_CUBIC))
        assert worked
        self.data = data

    def read(self, rows: np.ndarray) -> list[np.ndarray]:
        """Return the crop for each row."""
        return [cv2.imdecode(self.data, cv2.IMREAD_COLOR_RGB) for _ in rows]


def build_table(rows: int, frames: int = FRAMES) -> FaceTable:
    """Return a synthetic table in the columns of Aff-Wild2: videos of ``frames`` rows, a third of all cells missing."""
    random = np.random.default_rng(0)
    video = np.arange(rows) // frames
    frame = (np.arange(rows) % frames + 1).astype(np.int32)
    names = pa.array([f"video{k:04d}" for k in range(int(video.max()) + 1)])
    sequence = names.take(pa.array(video))
    number = pc.utf8_lpad(pa.array(frame).cast(pa.string()), 5, "0")
    image = pc.binary_join_element_wise("cropped_aligned/", sequence, "/", number, ".jpg", "")
    part = pa.array(["train", "validation"]).take(pa.array((video % 2 == 1).astype(np.int64)))
    known = {track: random.random(rows) < 2 / 3 for track in ("va", "expr", "au")}
    classes = labels.EXPRESSION_ORDERS["abaw"]
    code = pa.array(random.integers(0, len(classes), rows), mask=~known["expr"])
    columns: dict[str, Any] = {
        "image": image,
        "sequence": sequence,
        "video": sequence,
        "frame": frame,
        "part": part,
        **{f"part_{track}": part for track in known},
        "expression": pa.array(list(classes)).take(code),
    }
    for au in labels.AU_SETS["affwild2"]:
        columns[f"au{au:02d}_occurrence"] = ((random.random(rows) < 0.2).astype(np.float32), known["au"])
    for axis in labels.AFFECT_AXES:
        columns[axis] = (random.uniform(-1, 1, rows).round(3).astype(np.float32), known["va"])
    return FaceTable.from_columns(columns, ".", {"dataset": "affwild2", "expressions": list(classes)})


def _tasks() -> dict[str, Task]:
    return {
        "au": AUOccurrence(loss=BinaryCrossEntropy()),
        "expression": Expression(loss=CrossEntropy()),
        "valence_arousal": ValenceArousal(),
    }


def _data(table: FaceTable, workers: int = 0) -> FaceDataModule:
    """Return the data module of a training on ``table``, set up."""
    data = FaceDataModule(
        [Source("affwild2", table, _OneCrop(), group="video")],
        _tasks(),
        Protocol(test="validation"),
        FaceTransform(SIDE),
        FaceTransform(SIDE),
        batch_size=BATCH,
        num_workers=workers,
    )
    data.setup("fit")
    return data


def unique_memory(process: int) -> float:
    """Return the MB of memory that a process alone holds.

    Raises:
        ConfigError: If the system does not tell.
    """
    path = Path(f"/proc/{process}/smaps_rollup")
    try:
        found = re.findall(r"^Private_\w+:\s+(\d+) kB", path.read_text(), re.MULTILINE)
    except OSError as error:
        raise ConfigError(f"{path}: cannot be read ({error.strerror}); affect benchmark table needs Linux") from error
    return sum(int(number) for number in found) / 1024


def worker_memory(data: FaceDataModule, workers: int, context: str, batches: int) -> list[float]:
    """Return the unique memory in MB of each worker of a training loader, after ``batches`` batches of each."""
    loader = data.train_dataloader()
    plain = DataLoader(
        loader.dataset,
        # No more than are fetched: a spawned worker that has to end while it still sends a batch may abort.
        sampler=list(itertools.islice(loader.order, workers * batches)),
        batch_size=None,
        num_workers=workers,
        collate_fn=loader.collate_fn,
        worker_init_fn=loader.worker_init_fn,
        multiprocessing_context=context,
    )
    iterator = iter(plain)
    for _ in range(len(plain)):
        next(iterator)
    found = [unique_memory(worker.pid) for worker in iterator._workers]  # type: ignore[attr-defined]
    iterator._shutdown_workers()  # type: ignore[attr-defined]
    return found


def sample_costs(modules: list[FaceDataModule], rounds: int, batches: int) -> tuple[list[float], list[float]]:
    """Return microseconds per sample of reading labels, and of a whole sample, for each module.

    Batches are random ones of the training part. Time is the processor's, rounds alternate and the best one counts, so
    that a busy machine tells the same.
    """
    datasets = [data.dataset(TRAIN) for data in modules]
    random = np.random.default_rng(0)
    label_times, times = [np.inf] * len(modules), [np.inf] * len(modules)
    for _ in range(rounds):
        for k, (data, dataset) in enumerate(zip(modules, datasets, strict=True)):
            table, tasks = data.sources[0].table, list(data.tasks.values())
            chosen = [random.integers(0, len(dataset), BATCH) for _ in range(batches)]
            start = time.process_time()
            for positions in chosen:
                rows = dataset.locate(positions)[1]
                for task in tasks:
                    task.encode(table, rows)
            label_times[k] = min(label_times[k], time.process_time() - start)
            start = time.process_time()
            for positions in chosen:
                dataset.batch(0, positions)
            times[k] = min(times[k], time.process_time() - start)
    scale = 1e6 / (batches * BATCH)
    return [scale * t for t in label_times], [scale * t for t in times]


def reading_time(folder: Path, videos: int, frames: int) -> tuple[float, int]:
    """Return the seconds that Aff-Wild2's reader takes for a tree of ``videos`` in three tracks, and its rows."""
    table = build_table(videos * frames, frames)
    affwild2.write(table, folder, _OneCrop())
    start = time.perf_counter()
    found = affwild2.read(folder)
    return time.perf_counter() - start, len(found)


def measure(quick: bool) -> list[dict[str, Any]]:
    """Return rows of figure, value for the large and the small table, and their difference or ratio."""
    large, small, workers = (60_000, 4_000, 2) if quick else (ROWS, SMALL, WORKERS)
    rows = []
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        paths = [folder / "large.arrow", folder / "small.arrow"]
        build_table(large).save(paths[0])
        build_table(small, FRAMES * small // large or 1).save(paths[1])
        opening = [min(_opening(path) for _ in range(3)) for path in paths]
        rows.append(_row("opening, ms", opening, None))
        modules, setting_up = [], []
        for path in paths:
            start = time.perf_counter()
            modules.append(_data(FaceTable.open(path)))
            modules[-1].summary()
            setting_up.append(time.perf_counter() - start)
        rows.append(_row("setting up a training (parts, checks, counts), s", setting_up, None))
        for context in ("fork", "spawn"):
            held = [worker_memory(data, workers, context, 2 if quick else 10) for data in modules]
            worst = max(abs(a - b) for a, b in zip(sorted(held[0]), sorted(held[1]), strict=True))
            rows.append(
                _row(
                    f"unique memory of a worker, MB, mean of {workers} ({context})",
                    [float(np.mean(one)) for one in held],
                    f"at most {worst:.1f} MB apart",
                )
            )
        costs = sample_costs(modules, 2 if quick else 20, 5 if quick else 100)
        for figure, pair in zip(("reading a sample's labels, µs", "a whole sample, µs"), costs, strict=True):
            rows.append(_row(figure, pair, f"ratio {pair[0] / pair[1]:.3f}"))
        videos, frames = (2, 300) if quick else (6, FRAMES)
        seconds, count = reading_time(folder / "tree", videos, frames)
    whole = seconds * large / count
    rows.append(
        {
            "figure": "reading the text files of three tracks, s",
            f"{large:,} rows".replace(",", " "): whole,
            f"{small:,} rows".replace(",", " "): seconds * small / count,
            "compared": f"scaled from {count} rows in {seconds:.2f} s",
        }
    )
    # All rows under the same columns.
    return [dict(zip(rows[-1], row.values(), strict=True)) for row in rows]


def _opening(path: Path) -> float:
    start = time.perf_counter()
    table = FaceTable.open(path)
    table.numbers("valence", np.array([0, len(table) - 1]))
    return 1000 * (time.perf_counter() - start)


def _row(figure: str, values: list[float], compared: str | None) -> dict[str, Any]:
    return {"figure": figure, "large": values[0], "small": values[1], "compared": compared or ""}
