# SPDX-License-Identifier: Apache-2.0
"""Tables of delivered datasets, kept after the first reading.

Reading thousands of label files takes minutes. What a layout's ``read`` returned is kept as an Arrow file whose name is
a key of the arguments and of the code that read it, and is mapped instead of read again as long as every file and
folder that the reading looked at is as it was (``affect.data.layouts.common.unchanged``). A table that does not say
what it depends on (metadata ``touched``) is never kept.
"""

from __future__ import annotations

import fcntl
import hashlib
import inspect
import json
import sys
import threading
import time
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from types import ModuleType
from typing import Any

from affect.data.layouts import common
from affect.data.table import FaceTable
from affect.errors import DataError

FOLDER = "tables"
"""Folder of stored tables below ``paths.cache``."""

_FIRST, _EVERY = 5.0, 30.0
"""Seconds after which a reading is announced, and between further lines."""


def stored_path(folder: Path, name: str, node: Mapping[str, Any], read: Callable[..., FaceTable]) -> Path:
    """Return the file that the table of a ``read`` node is kept in.

    Args:
        folder: Folder of stored tables.
        name: Name of the dataset.
        node: Target and arguments of the reading, resolved.
        read: The function that the node names.
    """
    text = json.dumps(node, sort_keys=True, default=str)
    digest = hashlib.sha256(f"{text}\n{source_code(read)}".encode())
    return folder / f"{name}-{digest.hexdigest()[:16]}.arrow"


def source_code(read: Callable[..., FaceTable]) -> str:
    """Return the code that a layout reads with: its module, what that imports from modules beside it, the table's own.

    So a table that another version of a layout has read is never taken for the one that this version would read.
    """
    start = sys.modules[inspect.unwrap(read).__module__]
    found: dict[str, ModuleType] = {}
    queue = [start, common, sys.modules[FaceTable.__module__], sys.modules["affect.labels"]]
    room = start.__name__.rpartition(".")[0]
    while queue:
        module = queue.pop()
        if module.__name__ in found:
            continue
        found[module.__name__] = module
        beside = room and module.__name__.startswith(f"{room}.")
        for value in vars(module).values() if beside or module is start else ():
            name = value.__name__ if inspect.ismodule(value) else getattr(value, "__module__", None)
            if isinstance(name, str) and room and name.startswith(f"{room}.") and name in sys.modules:
                queue.append(sys.modules[name])
    return "\0".join(_code(found[name]) for name in sorted(found))


def _code(module: ModuleType) -> str:
    try:
        return inspect.getsource(module)
    except (OSError, TypeError):  # A module without a file, e.g. one typed into an interpreter.
        return module.__name__


def stored_table(path: Path) -> FaceTable | None:
    """Return the table in ``path``, mapped, if it is there and what it was read from is unchanged."""
    if not path.is_file():
        return None
    try:
        table = FaceTable.open(path)
    except DataError:  # Cut short by a full disk, or of another version: read anew.
        return None
    return table if common.unchanged(table, table.root) else None


def read_or_stored(
    path: Path | None,
    name: str,
    read: Callable[[], FaceTable],
    say: Callable[[str], None] = lambda line: None,
    fresh: bool = False,
) -> FaceTable:
    """Return the stored table, or the one that is read and, where it can be, stored for the next time.

    Processes that want one table at the same time read it once: the others wait. A cache that cannot be written to
    costs time, not the run.

    Args:
        path: File of the table (``stored_path``); None always reads and stores nothing.
        name: Name of the dataset, for messages.
        read: Reads the table.
        say: Takes lines for the user: that a reading takes long, what was read in how many seconds.
        fresh: Read also where a stored table could be used.
    """
    if path is None:
        return _read(name, read, say)
    table = None if fresh else stored_table(path)
    if table is not None:
        return table
    with alone(path):
        # Another process may have stored it while this one waited.
        table = None if fresh else stored_table(path)
        if table is not None:
            return table
        table = _read(name, read, say)
        if not table.metadata.get("touched"):
            return table
        try:
            return table.save(path)
        except OSError as error:
            say(f"{name}: the table cannot be kept in {path.parent} ({error.strerror}); later runs read it again")
            return table


def _read(name: str, read: Callable[[], FaceTable], say: Callable[[str], None]) -> FaceTable:
    start = time.monotonic()
    done = threading.Event()
    watch = threading.Thread(target=_announce, args=(name, done, say), daemon=True)
    watch.start()
    try:
        table = read()
    finally:
        done.set()
        watch.join()
    if table.metadata.get("touched"):
        say(f"{name}: read {len(table):,} rows in {time.monotonic() - start:.1f} s from {table.root}")
    return table


def _announce(name: str, done: threading.Event, say: Callable[[str], None]) -> None:
    """Tell the user that a reading takes long, so that nobody takes it for a hang."""
    if done.wait(_FIRST):
        return
    say(f"{name}: reading the label files; the table is kept for later runs …")
    start = time.monotonic() - _FIRST
    while not done.wait(_EVERY):
        say(f"{name}: still reading after {time.monotonic() - start:.0f} s …")


@contextmanager
def alone(path: Path) -> Iterator[None]:
    """Hold a lock beside ``path``, which the system releases however the process ends; without one where none works.

    Whoever waited for it has to look whether ``path`` is there now.
    """
    lock = path.with_suffix(".lock")
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        stream = lock.open("a")
    except OSError:  # A cache that cannot be written to.
        yield
        return
    with stream:
        try:
            fcntl.flock(stream, fcntl.LOCK_EX)
        except OSError:  # A network drive without locks: two processes may read the same table, which is only slow.
            yield
            return
        try:
            yield
        finally:
            # Whoever waited for this file looks for the stored table first, so losing the name does no harm.
            lock.unlink(missing_ok=True)
