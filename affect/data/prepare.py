# SPDX-License-Identifier: Apache-2.0
"""From photographs and videos as delivered to crops on disk: detection, landmarks, alignment, crop.

A prepared dataset is one self-contained folder that can be moved and trained from without the delivered files::

    <prepared>/<dataset>/<hash of the stored recipe>/
        recipe.json               the whole recipe, the models that found faces, how crops are stored
        units/<unit>.arrow        what was found in each image of a unit of work, and where its crop lies
        crops/<unit>/<image>.jpg  crops as files, or
        shards/<unit>.arrow       crops packed into shards
        table-<reading>.arrow     the layout's table with labels, points and boxes moved into the crops

A unit is one or more whole sequences, or a block of single images. Its name is a hash of its images (their names, and
sizes and times of change of their files) and of what the table says about their faces: a table with other labels of the
same images takes the crops as they are, and images that were replaced, or have the same names below another root, are
other units. So what is on disk never changes: a unit is worked on by one process from beginning to end, its crops
appear at once, then its table, and then it is done. A run that is killed at any point and started again, on any number
of processes or machines, ends with the same bytes. Copies of a delivery are the same images where they keep the times
of files (``cp -p``, ``rsync -a``, ``tar``).

The prepared table remembers what it was made from (metadata ``delivered``), so that a training on labels or images that
are there and are others is stopped (``what_changed``).

No image is lost silently. A row whose face was not found gets a crop all the same, and the column ``face`` says how:
``found``; ``neighbour`` (box or points of the nearest frames of its sequence); ``centre`` (the table's own box, or the
middle of the image). Images that cannot be read are counted with the reason.
"""

from __future__ import annotations

import hashlib
import json
import multiprocessing
import os
import shutil
import signal
import threading
import uuid
from collections import Counter
from collections.abc import Callable, Container, Iterator, Mapping, Sequence
from concurrent.futures import FIRST_COMPLETED, Future, ProcessPoolExecutor, wait
from concurrent.futures.process import BrokenProcessPool
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any, Literal, get_args

import cv2
import numpy as np
import pyarrow as pa

from affect import __version__, labels
from affect.data.archives import SEPARATOR, ShardImages, split_member
from affect.data.check import is_synthetic
from affect.data.dataset import alignment_scheme, turned
from affect.data.images import FileImages, ImageReader, open_pictures
from affect.data.layouts.common import seen_now, state
from affect.data.placing import CENTRE, FOUND, NEIGHBOUR, Placed, Placer
from affect.data.stored import alone
from affect.data.table import ColumnLike, FaceTable
from affect.errors import ConfigError, DataError
from affect.files import replacing
from affect.geometry.alignment import CropRecipe, transform_points
from affect.geometry.providers import FaceFinder, Pose

UNREADABLE = "unreadable image"

COLOURS = "RGB"
"""Order of the channels of a crop, as readers return it."""

Store = Literal["files", "shards"]
Format = Literal["jpg", "png"]

BLOCK = 128
"""Images of a unit, at least: short sequences share one, a long one is never divided."""

LOOKED_AT = 1000
"""Images, spread over the table, whose files a training compares with those that were prepared."""

_RECORDS = 64
_BLOCK_ROWS = 1 << 16
_MATRIX = pa.list_(pa.float64(), 6)


# ------------------------------------------------------------------------------------------------------- plan


@dataclass(frozen=True, eq=False)
class Unit:
    """A piece of work.

    Attributes:
        name: Hash of its images, the state of their files, and of what the table says about their faces.
        rows: Rows of the table in the order of work ``(N,)``.
        starts: Where in ``rows`` each sequence starts.
        ordered: Whether each of them is a sequence of frames, or images of their own.
        times: Frame number of each row, or where the table has none its place in the sequence ``(N,)``.
    """

    name: str
    rows: np.ndarray
    starts: tuple[int, ...]
    ordered: tuple[bool, ...]
    times: np.ndarray

    def parts(self) -> Iterator[tuple[int, int, bool]]:
        """Yield begin, end and whether it is a sequence of each part."""
        yield from zip(self.starts, (*self.starts[1:], len(self.rows)), self.ordered, strict=True)


def plan(table: FaceTable, block: int = BLOCK, root: Path | None = None) -> list[Unit]:
    """Return the units of a table. Each row is in exactly one; the order is that of the table's first rows.

    Args:
        table: The layout's table.
        block: Images of a unit, at least, where there are as many.
        root: Folder of the images, where it is not the table's.
    """
    frames = _frames(table)
    sequences, order = _sequences(table, frames)
    states = _states(table, table.root if root is None else root)
    breaks = np.flatnonzero(np.diff(sequences[order], prepend=-2)) if len(order) else np.empty(0, np.int64)
    ends = np.append(breaks[1:], len(order))
    runs = sorted(zip(breaks.tolist(), ends.tolist(), strict=True), key=lambda run: int(order[run[0] : run[1]].min()))
    units: list[Unit] = []
    pieces: list[tuple[np.ndarray, bool]] = []

    def close() -> None:
        if pieces:
            rows = np.concatenate([piece for piece, _ in pieces])
            starts = np.cumsum([0, *(len(piece) for piece, _ in pieces[:-1])])
            ordered = tuple(sequence for _, sequence in pieces)
            places = np.concatenate([np.arange(len(piece)) for piece, _ in pieces])
            unit = Unit("", rows, tuple(starts.tolist()), ordered, places if frames is None else frames[rows])
            units.append(replace(unit, name=_unit_name(table, unit, states)))
            pieces.clear()

    for begin, end in runs:
        rows = order[begin:end]
        if sequences[rows[0]] < 0:  # images of their own
            close()
            for start in range(0, len(rows), block):
                pieces.append((rows[start : start + block], False))
                close()
            continue
        pieces.append((rows, True))
        if sum(len(piece) for piece, _ in pieces) >= block:
            close()
    close()
    return units


def _sequences(table: FaceTable, frames: np.ndarray | None) -> tuple[np.ndarray, np.ndarray]:
    """Return the number of each row's sequence, -1 for none, and the rows by sequence and time, ``(N,)`` each."""
    codes = np.full(len(table), -1, np.int64)
    if "sequence" in table.names:
        codes = table.codes("sequence")[0]
        if "subject" in table.names:  # T1 of one person is not T1 of another
            subject = table.codes("subject")[0]
            codes = np.where(codes < 0, -1, codes * (subject.max() + 2) + subject + 1)
    else:
        names = table.strings("image")[0]
        videos: dict[str, int] = {}
        for row, name in enumerate(names):
            archive, member = split_member(name)
            if member is not None and member.isdigit():
                codes[row] = videos.setdefault(archive, len(videos))
    places = np.arange(len(table))
    return codes, np.lexsort((places, places if frames is None else frames, codes))


def _frames(table: FaceTable) -> np.ndarray | None:
    """Return the number of each row's frame ``(N,)``; None if the table has none."""
    if "frame" in table.names:
        column = table.column("frame")
        if not column.null_count:
            return column.to_numpy(zero_copy_only=False).astype(np.int64)
    if "sequence" not in table.names:
        members = [split_member(name)[1] or "" for name in table.strings("image")[0]]
        if all(member.isdigit() for member in members):
            return np.array([int(member) for member in members], np.int64)
    return None


def _states(table: FaceTable, root: Path) -> np.ndarray:
    """Return size and time of change of the file or archive that each row's image is in, int64 ``(N, 2)``; else -1."""
    known: dict[str, tuple[int, int]] = {}
    found = np.empty((len(table), 2), np.int64)
    for row, name in enumerate(table.strings("image")[0]):
        file = split_member(name)[0]
        if file not in known:
            try:
                seen = (root / file).stat()
                known[file] = seen.st_size, seen.st_mtime_ns
            except (OSError, ValueError):  # why it cannot be read is said when it is
                known[file] = -1, -1
        found[row] = known[file]
    return found


def _unit_name(table: FaceTable, unit: Unit, states: np.ndarray) -> str:
    digest = hashlib.sha256(json.dumps([unit.starts, unit.ordered]).encode())
    digest.update("\n".join(table.strings("image", unit.rows)[0]).encode())
    digest.update(states[unit.rows].data)
    digest.update(np.ascontiguousarray(unit.times, np.int64).data)
    for name in ("box", *(labels.SCHEMES[scheme].column for scheme in labels.SCHEMES)):
        if name in table.names:
            values, valid = table.numbers(name, unit.rows)
            digest.update(name.encode())
            digest.update(np.ascontiguousarray(values).data)
            digest.update(np.packbits(valid).data)
    return digest.hexdigest()[:16]


# ----------------------------------------------------------------------------------------------------- working


@dataclass
class Work:
    """Everything that a process needs to work on units.

    Attributes:
        folder: Folder of the prepared dataset.
        table: The layout's table.
        images: Reader of its images.
        recipe: Recipe of the stored crops.
        make_finder: Makes what finds faces, once per process; None takes what the table says.
        store: Whether crops are files or rows of shards.
        format: ``jpg`` or ``png`` (lossless).
        quality: Of JPEG, 1 to 100.
    """

    folder: Path
    table: FaceTable
    images: ImageReader
    recipe: CropRecipe
    make_finder: Callable[[], FaceFinder] | None
    store: Store = "files"
    format: Format = "jpg"
    quality: int = 95
    _finder: FaceFinder | None = field(default=None, init=False, repr=False)

    def __getstate__(self) -> dict[str, Any]:
        return {**self.__dict__, "_finder": None}

    @property
    def finder(self) -> FaceFinder | None:
        """What finds faces in this process."""
        if self._finder is None and self.make_finder is not None:
            self._finder = self.make_finder()
        return self._finder

    def unit_path(self, unit: Unit) -> Path:
        """Return the table of a unit, which exists when the unit is done."""
        return self.folder / "units" / f"{unit.name}.arrow"

    def do(self, unit: Unit, advance: Callable[[int, int], None] = lambda done, missed: None) -> None:
        """Find the faces of a unit, write its crops and then its table, unless another process does or did.

        Args:
            unit: The unit.
            advance: Called now and then with the number of images done and of faces not found since.
        """
        with alone(self.unit_path(unit)):
            if self.unit_path(unit).is_file():
                advance(len(unit.rows), 0)
            else:
                self._do(unit, advance)

    def _do(self, unit: Unit, advance: Callable[[int, int], None]) -> None:
        placer = Placer(self.recipe, self.table, self.finder)
        names = [str(name) for name in self.table.strings("image", unit.rows)[0]]
        results: list[dict[str, Any] | None] = [None] * len(unit.rows)
        with self._writer(unit, names) as write:
            for begin, end, ordered in unit.parts():
                rows = unit.rows[begin:end]
                for place, image, how in placer.placed(self._read(rows), rows, unit.times[begin:end], ordered):
                    if isinstance(image, DataError) or how is None:
                        results[begin + place] = {"reason": UNREADABLE, "error": str(image)}
                    else:
                        crop = write(begin + place, self._encoded(self.recipe.crop(image, how.matrix)))
                        results[begin + place] = _record(crop, how)
                    advance(1, int(how is None or how.face != FOUND))
        scheme = next((r["scheme"] for r in results if r is not None and r.get("scheme")), None)
        with replacing(self.unit_path(unit)) as part:
            _write_ipc(part, _unit_table(names, [r or {} for r in results], scheme))

    def _read(self, rows: np.ndarray) -> Iterator[np.ndarray | DataError]:
        for k in range(len(rows)):
            try:
                yield open_pictures(self.images, rows[k : k + 1])[0].pixels()
            except DataError as error:
                yield error

    def _encoded(self, crop: np.ndarray) -> bytes:
        options = [cv2.IMWRITE_PNG_COMPRESSION, 3]
        if self.format == "jpg":  # with all of its colour: a face's are fine
            options = [
                *(cv2.IMWRITE_JPEG_QUALITY, self.quality),
                *(cv2.IMWRITE_JPEG_SAMPLING_FACTOR, cv2.IMWRITE_JPEG_SAMPLING_FACTOR_444),
            ]
        worked, data = cv2.imencode(f".{self.format}", cv2.cvtColor(crop, cv2.COLOR_RGB2BGR), options)
        if not worked:
            raise DataError(f"crops cannot be written as {self.format}")
        return data.tobytes()

    def _writer(self, unit: Unit, names: Sequence[str]) -> _FileWriter | _ShardWriter:
        if self.store == "shards":
            return _ShardWriter(self.folder, unit.name)
        return _FileWriter(self.folder, unit.name, crop_names(names, self.format))


def crop_names(names: Sequence[str], suffix: str) -> list[str]:
    """Return the names of the crops of images, all different.

    Example:
        >>> crop_names(["F001.zip!T1/1.jpg", "a.png", "a.png"], "jpg")
        ['F001.zip/T1/1.jpg', 'a.png.jpg', 'a.png~2.jpg']
    """
    used: set[str] = set()
    found = []
    for name in names:
        plain = "/".join(part for part in name.replace(SEPARATOR, "/").split("/") if part not in ("", ".", ".."))
        crop, number = plain if plain.endswith(f".{suffix}") else f"{plain}.{suffix}", 1
        while crop in used:
            number += 1
            crop = f"{plain}~{number}.{suffix}"
        used.add(crop)
        found.append(crop)
    return found


class _FileWriter:
    """Writes crops as files, into a folder that takes its name when all of them are on the disk.

    So no reader sees a part of one, and none that is there is written again.
    """

    def __init__(self, folder: Path, unit: str, names: Sequence[str]) -> None:
        self.names, self.unit = names, unit
        self.target = folder / "crops" / unit
        self._part = self.target.with_name(f".{unit}.{uuid.uuid4().hex[:12]}.part")
        self._written: list[Path] = []

    def __enter__(self) -> Callable[[int, bytes], str]:
        self._part.mkdir(parents=True)
        return self._write

    def _write(self, place: int, data: bytes) -> str:
        path = self._part / self.names[place]
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_bytes(data)
        self._written.append(path)
        return f"crops/{self.unit}/{self.names[place]}"

    def __exit__(self, kind: Any, error: Any, trace: Any) -> None:  # noqa: ANN401
        try:
            if kind is None and not self.target.is_dir():  # by a process that was killed before it wrote the table
                for path in self._written:
                    with path.open("rb") as stream:
                        os.fsync(stream.fileno())
                self._part.rename(self.target)
        finally:
            shutil.rmtree(self._part, ignore_errors=True)


class _ShardWriter:
    """Appends crops to a shard, some at a time, so that a long video does not fill the memory."""

    def __init__(self, folder: Path, unit: str) -> None:
        self.name = f"shards/{unit}.arrow"
        self._replacing = replacing(folder / self.name)
        self._schema = pa.schema({"image": pa.large_binary()})
        self._held: list[bytes] = []
        self._count = 0

    def __enter__(self) -> Callable[[int, bytes], str]:
        self._sink = pa.OSFile(str(self._replacing.__enter__()), "wb")
        self._stream = pa.ipc.new_file(self._sink, self._schema)
        return self._write

    def _write(self, place: int, data: bytes) -> str:
        self._held.append(data)
        self._count += 1
        if len(self._held) == _RECORDS:
            self._flush()
        return f"{self.name}{SEPARATOR}{self._count - 1}"

    def _flush(self) -> None:
        self._stream.write_batch(pa.record_batch([pa.array(self._held, pa.large_binary())], schema=self._schema))
        self._held.clear()

    def __exit__(self, kind: Any, error: Any, trace: Any) -> None:  # noqa: ANN401
        if kind is None and self._held:
            self._flush()
        self._stream.close()
        self._sink.close()
        self._replacing.__exit__(kind, error, trace)


def _record(crop: str, how: Placed) -> dict[str, Any]:
    seen = how.observation
    record: dict[str, Any] = {
        "crop": crop,
        "face": how.face,
        "reason": how.reason,
        "faces": how.faces,
        "matrix": how.matrix.ravel(),
    }
    if seen is not None:
        record |= {"box": seen.box, "points": seen.points.ravel(), "scheme": seen.scheme, "pose": seen.pose}
    return record


def _unit_table(names: Sequence[str], results: Sequence[Mapping[str, Any]], scheme: str | None) -> pa.Table:
    def column(key: str, kind: pa.DataType) -> pa.Array:
        return pa.array([result.get(key) for result in results], kind)

    width = 2 * labels.SCHEMES[scheme or "68"].points
    poses: list[Pose | None] = [result.get("pose") for result in results]
    columns = {
        "image": pa.array(names, pa.string()),
        "crop": column("crop", pa.string()),
        "face": column("face", pa.string()),
        "reason": column("reason", pa.string()),
        "error": column("error", pa.string()),
        "faces": column("faces", pa.int32()),
        "matrix": column("matrix", _MATRIX),
        "box": column("box", pa.list_(pa.float32(), 4)),
        "points": column("points", pa.list_(pa.float32(), width)),
        "scheme": pa.array([result.get("scheme") for result in results], pa.string()),
    }
    for k, angle in enumerate(labels.POSE_ANGLES):
        columns[f"pose_{angle}"] = pa.array([None if pose is None else float(pose[k]) for pose in poses], pa.float32())
    return pa.table(columns)


def _write_ipc(path: Path, table: pa.Table) -> None:
    with pa.OSFile(str(path), "wb") as sink, pa.ipc.new_file(sink, table.schema) as writer:
        writer.write_table(table)


# --------------------------------------------------------------------------------------------------- processes

_work: Work | None = None
_progress: Any = None


def _start(work: Work, progress: Any) -> None:  # noqa: ANN401
    global _work, _progress
    # Ctrl-C reaches the whole group of processes; the main one decides.
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    threading.Thread(target=_end_with_parent, daemon=True).start()
    _limit_threads()
    _work, _progress = work, progress


def _end_with_parent() -> None:
    """End this process when the one that started it is gone, however that ended: nobody would wait for its work."""
    parent = multiprocessing.parent_process()
    assert parent is not None
    parent.join()
    os._exit(1)


def _limit_threads() -> None:
    """Let this process use one core: there are as many processes as cores."""
    import torch

    torch.set_num_threads(1)
    cv2.setNumThreads(0)  # in a process that was forked, 1 would wait for threads that only its parent has


def _advance(done: int, missed: int) -> None:
    with _progress.get_lock():
        _progress[0] += done
        _progress[1] += missed


def _do(unit: Unit) -> str:
    assert _work is not None
    _work.do(unit, _advance)
    return unit.name


def run(
    work: Work,
    units: Sequence[Unit],
    workers: int = 1,
    on_progress: Callable[[int, int], None] = lambda done, missed: None,
) -> None:
    """Work on the units that are not done yet.

    Args:
        work: What to do.
        units: The units.
        workers: Processes; 0 works in this one.
        on_progress: Called with the number of images done and of faces not found, so far.

    Raises:
        DataError: If a process was killed from outside.
    """
    waiting = [unit for unit in units if not work.unit_path(unit).is_file()]
    # Long sequences first, so that no process is left alone with one at the end.
    waiting.sort(key=lambda unit: -len(unit.rows))
    if not waiting:
        return
    if workers == 0:
        _run_here(work, waiting, on_progress)
        return
    context = multiprocessing.get_context("spawn")
    progress = context.Array("q", 2)
    executor = ProcessPoolExecutor(min(workers, len(waiting)), context, _start, (work, progress))
    try:
        running: set[Future] = {executor.submit(_do, unit) for unit in waiting}
        while running:
            done, running = wait(running, timeout=0.25, return_when=FIRST_COMPLETED)
            on_progress(*progress[:])
            for future in done:
                future.result()
    except BrokenProcessPool as error:
        left = sum(not work.unit_path(unit).is_file() for unit in units)
        raise DataError(
            f"a process was killed from outside (out of memory?); {len(units) - left} of {len(units)} units are done: "
            "run the same command again, perhaps with fewer workers"
        ) from error
    except BaseException:
        # A unit that is cut off here is no unit yet: nothing has to be finished first.
        for child in multiprocessing.active_children():
            child.terminate()
        raise
    finally:
        executor.shutdown(wait=True, cancel_futures=True)


def _run_here(work: Work, units: Sequence[Unit], on_progress: Callable[[int, int], None]) -> None:
    totals = [0, 0]

    def advance(done: int, missed: int) -> None:
        totals[0] += done
        totals[1] += missed
        on_progress(*totals)

    import torch

    threads = torch.get_num_threads(), cv2.getNumThreads()
    _limit_threads()
    try:
        for unit in units:
            work.do(unit, advance)
    finally:
        torch.set_num_threads(threads[0])
        cv2.setNumThreads(threads[1])


# ----------------------------------------------------------------------------------------------------- folder


def folder_of(prepared: str | Path, dataset: str, recipe: CropRecipe) -> Path:
    """Return the folder of a dataset's crops by a recipe with ``stored`` pixels."""
    return Path(prepared).expanduser() / dataset / recipe.storage().hash


def reading_arguments(read: Mapping[str, Any]) -> dict[str, Any]:
    """Return what decides the labels of a reading: the arguments of ``dataset.read`` but where the files lie."""
    return {str(key): value for key, value in read.items() if key not in ("root", "_target_", "_convert_")}


def table_path(folder: Path, read: Mapping[str, Any]) -> Path:
    """Return the prepared table of a reading with these arguments."""
    described = json.dumps(reading_arguments(read), sort_keys=True, default=str)
    return folder / f"table-{hashlib.sha256(described.encode()).hexdigest()[:12]}.arrow"


def claim(work: Work, models: Mapping[str, str]) -> None:
    """Write ``recipe.json`` into the folder of the work, or make sure that the one there says the same.

    Args:
        work: What will be done.
        models: Which models find faces, as text.

    Raises:
        ConfigError: If crops there were made or stored in another way.
    """
    for key, value, options in (("store", work.store, get_args(Store)), ("format", work.format, get_args(Format))):
        if value not in options:
            raise ConfigError(f"{key}={value!r}; write {' or '.join(options)}")
    if not 1 <= work.quality <= 100:
        raise ConfigError(f"quality={work.quality} must lie between 1 and 100")
    folder = work.folder
    wanted: dict[str, Any] = {
        "recipe": work.recipe.describe(),
        "models": dict(models),
        "store": work.store,
        "format": work.format,
        "quality": work.quality if work.format == "jpg" else None,
        "colours": COLOURS,
        "affect": __version__,
    }
    path = folder / "recipe.json"
    if path.is_file():
        there = json.loads(path.read_text())
        # The name of a recipe changes no pixel, nor does another version of the package by itself.
        differing = [
            f"{key}={json.dumps(there.get(key))}, now {json.dumps(wanted[key])}"
            for key in ("models", "store", "format", "quality")
            if there.get(key) != wanted[key]
        ]
        if differing:
            raise ConfigError(f"{folder} was prepared with {'; '.join(differing)}: keep to that, or remove the folder")
        return
    with replacing(path) as part:
        part.write_text(json.dumps(wanted, indent=1, sort_keys=True) + "\n")


def has_own(table: FaceTable, recipe: CropRecipe) -> bool:
    """Return whether the table has the points or boxes that the recipe crops by."""
    if recipe.needs == "box":
        return "box" in table.names
    return recipe.needs == "nothing" or alignment_scheme(table.names) is not None


# ------------------------------------------------------------------------------------------------------- table


def missing_units(work: Work, units: Sequence[Unit]) -> list[int]:
    """Return the numbers of the units that are not done."""
    there = {path.name for path in (work.folder / "units").glob("*.arrow")}
    return [k for k, unit in enumerate(units) if work.unit_path(unit).name not in there]


def _shards(absent: Sequence[int], count: int) -> str:
    """Return the fewest shards, of the lowest number, that hold the units ``absent`` of ``count`` and no other one."""
    numbers = np.asarray(absent)
    for n in (*range(1, min(count, 1024)), count):
        mine = np.unique(numbers % n)
        if (-(-(count - mine) // n)).sum() == len(numbers):
            break
    return ", ".join(f"shard={i}/{n}" for i in mine[:10]) + (", …" if len(mine) > 10 else "")


def merge(work: Work, units: Sequence[Unit], read: Mapping[str, Any], code: str = "") -> FaceTable:
    """Write the prepared table from the units, all of which are done, and return it.

    Args:
        work: What was done.
        units: All units of its table.
        read: Arguments of the layout's reading.
        code: What tells the code of the reading from another (``affect.data.stored.source_code``).

    Raises:
        DataError: If units are missing, with their numbers, or if no image could be read.
    """
    absent = missing_units(work, units)
    if absent:
        shown = ", ".join(map(str, absent[:10])) + (", …" if len(absent) > 10 else "")
        raise DataError(
            f"{work.folder}: {len(absent)} of {len(units)} units are not done (number {shown}); run affect prepare "
            f"with {_shards(absent, len(units))}, or without shard to do them all, then merge=true again"
        )
    _clean(work.folder, {unit.name for unit in units})
    parts = []
    for unit in units:
        with pa.memory_map(str(work.unit_path(unit))) as source:
            parts.append(pa.ipc.open_file(source).read_all())
    stacked = pa.concat_tables([_one_scheme(part, parts) for part in parts])
    order = np.concatenate([unit.rows for unit in units])
    stacked = stacked.take(pa.array(np.argsort(order, kind="stable"))).combine_chunks()
    table = _joined(work, stacked, read)
    delivered: dict[str, Any] = {
        "root": str(work.table.root.absolute()),
        "files": _files(work, read),
        "code": _digest(code),
    }
    table = table.with_metadata(delivered=delivered, synthetic=is_synthetic(work.table.root))
    target = table_path(work.folder, read)
    with alone(target):  # so that what lies there unfinished is no other process's
        for leftover in work.folder.glob(f".{target.stem}.*.part{target.suffix}"):
            leftover.unlink(missing_ok=True)
        return table.save(target)


def _clean(folder: Path, done: Container[str]) -> None:
    """Remove what killed processes left of units that are done; other ones may be worked on right now."""
    for place in ("units", "shards", "crops"):
        for leftover in (folder / place).glob(".*.part*"):
            if leftover.name.split(".")[1] not in done:
                continue
            if leftover.is_dir():
                shutil.rmtree(leftover, ignore_errors=True)
            else:
                leftover.unlink(missing_ok=True)


def _files(work: Work, read: Mapping[str, Any]) -> dict[str, list[int] | None]:
    """Return the state of the files that labels come from, as the reading saw them, and of some of the images'."""
    table = work.table
    found: dict[str, list[int] | None] = dict(table.metadata.get("touched") or {})  # type: ignore[arg-type, call-overload]
    own = [Path(value).expanduser() for value in reading_arguments(read).values() if isinstance(value, str)]
    names = [str(path.absolute()) for path in own if path.is_file()]  # a user's own table
    rows = np.unique(np.linspace(0, len(table) - 1, min(LOOKED_AT, len(table))).astype(np.int64))
    images = image_root(work)
    names += [os.path.relpath(images / split_member(name)[0], table.root) for name in table.strings("image", rows)[0]]
    return found | {name: state(table.root / name) for name in dict.fromkeys(names)}


def _digest(code: str) -> str:
    return hashlib.sha256(code.encode()).hexdigest()[:16]


def image_root(work: Work) -> Path:
    """Return the folder that the names of the images are relative to."""
    return Path(getattr(work.images, "root", work.table.root))


def what_changed(table: FaceTable, root: str | Path | None = None, code: str = "") -> str | None:
    """Return in what a delivered dataset is not the one that a table was prepared from.

    Sizes and times of change are compared of all that labels were read from, and of ``LOOKED_AT`` of the images.

    Args:
        table: A prepared table.
        root: Folder as delivered; None takes the one that it was prepared from.
        code: What tells the code of the reading, as it was given to ``merge``.

    Returns:
        None if nothing is different, or if the folder is not there any more: crops need nothing else.
    """
    delivered: Mapping[str, Any] = table.metadata.get("delivered") or {}  # type: ignore[assignment]
    folder = Path(root if root is not None else delivered.get("root", "")).expanduser()
    if not folder.is_dir():
        return None
    for name, seen in delivered.get("files", {}).items():
        now = seen_now(folder, name)
        if now != seen and (now is not None or not Path(name).is_absolute()):
            return f"{folder / name} is not what was prepared from {delivered['root']}"
    if delivered.get("code") != _digest(code):
        return "labels are read by another version of the code than the one that prepared them"
    return None


def _one_scheme(part: pa.Table, parts: Sequence[pa.Table]) -> pa.Table:
    """Return a unit's table whose points have the width of the others', if it has none itself."""
    width = max((p["points"].type.list_size for p in parts if p["points"].null_count < len(p)), default=136)
    kind = pa.list_(pa.float32(), width)
    if part["points"].type != kind:
        return part.set_column(part.column_names.index("points"), "points", pa.nulls(len(part), kind))
    return part


def _joined(work: Work, found: pa.Table, read: Mapping[str, Any]) -> FaceTable:
    """Return the table's rows that have a crop, with everything that is measured in pixels moved into it."""
    source = work.table
    has_crop = found["crop"].is_valid().to_numpy(zero_copy_only=False)
    rows = np.flatnonzero(has_crop)
    if not len(rows):
        first = found["error"].drop_null()
        raise DataError(f"none of {len(source)} images can be read (first: {first[0].as_py() if len(first) else '?'})")
    kept = source
    if len(rows) < len(source):
        kept, found = source.take(rows), found.filter(pa.array(has_crop)).combine_chunks()

    def column(name: str) -> pa.Array:
        return found[name].chunk(0) if found[name].num_chunks else pa.array([], found[name].type)

    matrices = column("matrix").flatten().to_numpy(zero_copy_only=False).reshape(-1, 2, 3)
    columns: dict[str, ColumnLike] = {
        "image": column("crop"),
        "source_image": kept.column("image"),
        "face": column("face"),
        "face_reason": column("reason"),
        "faces_found": column("faces"),
        "crop_matrix": column("matrix"),
    }
    measured: dict[str, str] = {}
    scheme = next((name for name in column("scheme").unique().to_pylist() if name is not None), None)
    if scheme is not None:
        measured = {labels.SCHEMES[scheme].column: "points", "box": "box"}
    poses = [f"pose_{angle}" for angle in labels.POSE_ANGLES]
    if column(poses[0]).null_count < len(kept):
        measured |= {name: name for name in poses}
    from_finder = sorted(set(measured) - kept.names)  # labels of the dataset itself are never replaced
    everything = {name: _numbers(column(measured[name])) for name in from_finder}
    pixels = ["box", *(labels.SCHEMES[name].column for name in labels.SCHEMES)]
    everything |= {name: kept.numbers(name) for name in [*pixels, "pose_roll"] if name in kept.names}
    for name, (values, valid) in everything.items():
        if name == "box":
            columns[name] = _moved_boxes(values, matrices), valid
        elif name in pixels:
            columns[name] = _moved_points(values, matrices), valid
        elif name == "pose_roll":
            roll = values + turned(matrices)
            columns[name] = (roll - 360 * np.round(roll / 360)).astype(np.float32), valid
        else:
            columns[name] = values, valid

    counts = Counter(column("face").to_pylist())
    several = int(np.nansum(column("faces").to_numpy(zero_copy_only=False) > 1)) if len(kept) else 0
    unreadable = source.arrow["image"].filter(pa.array(~has_crop)).to_pylist()
    metadata: dict[str, Any] = {key: value for key, value in kept.metadata.items() if key != "touched"}
    skipped, examples = dict(metadata.get("skipped") or {}), dict(metadata.get("skipped_examples") or {})
    if unreadable:
        skipped[UNREADABLE] = skipped.get(UNREADABLE, 0) + len(unreadable)
        examples[UNREADABLE] = unreadable[:10]
    if source.expressions:
        metadata["expressions"] = list(source.expressions)
    metadata |= {
        "skipped": skipped,
        "skipped_examples": examples,
        "recipe": work.recipe.describe(),
        "colours": COLOURS,
        "read": json.loads(json.dumps(reading_arguments(read), sort_keys=True, default=str)),
        "faces": {name: counts[name] for name in (FOUND, NEIGHBOUR, CENTRE)},
        "several_faces": several,
        "from_finder": from_finder,
    }
    return FaceTable(kept.with_columns(columns).arrow, work.folder, metadata)


def _numbers(column: pa.Array) -> tuple[np.ndarray, np.ndarray]:
    valid = column.is_valid().to_numpy(zero_copy_only=False)
    if pa.types.is_fixed_size_list(column.type):
        width = column.type.list_size
        values = np.zeros((len(column), width), np.float32)
        values[valid] = column.drop_null().flatten().to_numpy(zero_copy_only=False).reshape(-1, width)
        return values, valid
    return column.fill_null(0).to_numpy(zero_copy_only=False), valid


def _moved_points(values: np.ndarray, matrices: np.ndarray) -> np.ndarray:
    moved = np.empty(values.shape, np.float32)
    for start in range(0, len(values), _BLOCK_ROWS):
        chosen = slice(start, start + _BLOCK_ROWS)
        points = values[chosen].reshape(len(values[chosen]), -1, 2)
        moved[chosen] = transform_points(matrices[chosen], points).reshape(len(points), -1)
    return moved


def _moved_boxes(values: np.ndarray, matrices: np.ndarray) -> np.ndarray:
    """Return the upright boxes around moved boxes, float32 ``(N, 4)``."""
    corners = _moved_points(values[:, [0, 1, 2, 1, 2, 3, 0, 3]], matrices).reshape(-1, 4, 2)
    return np.concatenate([corners.min(1), corners.max(1)], 1)


# ---------------------------------------------------------------------------------------------------- training


def find_prepared(prepared: str | Path, dataset: str, recipe: CropRecipe, read: Mapping[str, Any]) -> FaceTable:
    """Return the prepared table of a dataset.

    Args:
        prepared: Folder of all prepared datasets.
        dataset: Name of the dataset.
        recipe: Recipe with ``stored`` pixels.
        read: Arguments of the layout's reading.

    Raises:
        DataError: If it is not there; it says what is, and in what that differs.
    """
    folder = folder_of(prepared, dataset, recipe)
    path = table_path(folder, read)
    if path.is_file():
        return FaceTable.open(path)
    raise DataError(_why_not_there(folder, dataset, recipe, read))


def _why_not_there(folder: Path, dataset: str, recipe: CropRecipe, read: Mapping[str, Any]) -> str:
    stored = recipe.storage().describe()
    said = f"{dataset} is not prepared with recipe {recipe.name}"
    wanted = json.loads(json.dumps(reading_arguments(read), sort_keys=True, default=str))
    tables = sorted(folder.glob("table-*.arrow"))
    if tables:
        there = [dict(FaceTable.open(path).metadata.get("read") or {}) for path in tables]  # type: ignore[arg-type, call-overload]
        return f"{said} as it is read here: {_nearest(there, wanted, 'dataset.')}"
    if (folder / "recipe.json").is_file():  # claimed, perhaps without a unit that is done
        return f"{said} to the end: {folder} has no table yet, run affect prepare again (merge=true behind shard=i/n)"
    recipes = [json.loads(path.read_text())["recipe"] for path in sorted(folder.parent.glob("*/recipe.json"))]
    if recipes:
        return f"{said}: {_nearest([_on_disk(other) for other in recipes], _on_disk(stored), 'prepare.')}"
    return f"{said} (nothing in {folder.parent})"


def _on_disk(described: Mapping[str, Any]) -> dict[str, Any]:
    """Return the description of a stored recipe under the keys of its configuration."""
    unset = ("name", "template")  # The mean face is that of the version, nothing that one could write.
    return {"stored" if key == "size" else key: value for key, value in described.items() if key not in unset}


def _nearest(there: Sequence[Mapping[str, Any]], wanted: Mapping[str, Any], prefix: str) -> str:
    """Return in what the nearest of several descriptions differs from the wanted one."""

    def differing(other: Mapping[str, Any]) -> list[str]:
        return sorted(key for key in {*other, *wanted} if other.get(key) != wanted.get(key))

    other = min(there, key=lambda one: len(differing(one)))
    keys = differing(other)
    if not keys:
        return "prepared with the mean face of another version, which has other crops"
    written = [f"{prefix}{key}={_written(other.get(key))}, wanted {_written(wanted.get(key))}" for key in keys]
    return f"prepared with {'; '.join(written)}"


def _written(value: object) -> str:
    """Return a value as it is written on a command line."""
    return str(value) if isinstance(value, str) else json.dumps(value)


def prepared_images(table: FaceTable) -> ImageReader:
    """Return the reader of a prepared table's crops."""
    first = str(table.strings("image", np.array([0]))[0][0])
    return ShardImages(table) if SEPARATOR in first else FileImages(table)
