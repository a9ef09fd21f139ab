# SPDX-License-Identifier: Apache-2.0
"""Stored tables: used again exactly while what they were read from is as it was, and read once by many processes."""

from __future__ import annotations

import multiprocessing
import os
import sys
import time
from pathlib import Path

import numpy as np
import pytest

from affect.data import stored
from affect.data.layouts.common import Reading
from affect.data.table import FaceTable
from affect.errors import DataError


def read_tree(root: Path, log: Path) -> FaceTable:
    """Read ``<root>/labels.txt``, one valence per line, and note in ``log`` that it was read."""
    with log.open("a") as stream:
        stream.write("read\n")
    reading = Reading(root, "tree", ("labels.txt",))
    values = reading.numbers("labels.txt", 1)[:, 0].astype(np.float32)
    reading.listing("faces")
    reading.skip("blurred", ["x.png"])
    return reading.table({"image": [f"{k}.png" for k in range(len(values))], "valence": values})


@pytest.fixture
def tree(tmp_path: Path) -> Path:
    folder = tmp_path / "tree"
    (folder / "faces").mkdir(parents=True)
    (folder / "labels.txt").write_text("0.5\n-0.5\n")
    return folder


def get(tree: Path, **options) -> FaceTable:
    path = tree.parent / "cache" / "tree-key.arrow"
    return stored.read_or_stored(path, "tree", lambda: read_tree(tree, tree.parent / "log"), **options)


def reads(tree: Path) -> int:
    return len((tree.parent / "log").read_text().split())


def test_a_table_is_read_once_and_then_mapped(tree):
    said: list[str] = []
    first, again = get(tree, say=said.append), get(tree, say=said.append)
    assert reads(tree) == 1
    assert len(said) == 1
    assert "tree: read 2 rows in 0.0 s" in said[0]
    for table in (first, again):
        assert table.path == tree.parent / "cache" / "tree-key.arrow"
        assert table.root == tree
        assert table.numbers("valence")[0].tolist() == [0.5, -0.5]
        assert table.metadata["skipped"] == {"blurred": 1}
    assert [path.name for path in (tree.parent / "cache").iterdir()] == ["tree-key.arrow"]


@pytest.mark.parametrize("change", ["label", "listing", "gone", "back in time"])
def test_it_is_read_again_when_anything_it_looked_at_has_changed(tree, change):
    get(tree)
    labels = tree / "labels.txt"
    if change == "label":
        labels.write_text("0.25\n-0.5\n0.1\n")
        assert len(get(tree)) == 3
    elif change == "listing":
        (tree / "faces" / "new.png").touch()
        get(tree)
    elif change == "gone":
        labels.unlink()
        with pytest.raises(DataError, match=r"expected labels\.txt"):
            get(tree)
        return
    else:
        os.utime(labels, ns=(1, 1))
        get(tree)
    assert reads(tree) == 2
    get(tree)
    assert reads(tree) == 2


def test_it_is_read_again_when_asked_or_when_the_file_is_damaged(tree):
    path = get(tree).path
    get(tree, fresh=True)
    assert reads(tree) == 2
    path.write_bytes(path.read_bytes()[:100])
    assert len(get(tree)) == 2
    assert reads(tree) == 3


def test_a_table_that_does_not_say_what_it_depends_on_is_not_kept(tmp_path):
    made = FaceTable.from_columns({"image": ["a.png"]}, tmp_path)
    path = tmp_path / "cache" / "x.arrow"
    said: list[str] = []
    assert stored.read_or_stored(path, "x", lambda: made, said.append) is made
    assert not said
    assert not list(path.parent.iterdir())


def test_a_failed_reading_keeps_nothing(tree):
    (tree / "labels.txt").write_text("0.5\nhigh\n")
    with pytest.raises(DataError, match="line 2"):
        get(tree)
    assert not list((tree.parent / "cache").iterdir())


def test_a_cache_that_cannot_be_written_to_costs_only_time(tree):
    (tree.parent / "cache").touch()
    assert len(get(tree)) == 2
    assert len(get(tree)) == 2
    assert reads(tree) == 2


def _slow(tree: Path) -> None:
    def read() -> FaceTable:
        time.sleep(0.3)
        return read_tree(tree, tree.parent / "log")

    table = stored.read_or_stored(tree.parent / "cache" / "tree-key.arrow", "tree", read)
    assert table.numbers("valence")[0].tolist() == [0.5, -0.5]


def test_processes_that_want_one_table_read_it_once(tree):
    context = multiprocessing.get_context("fork")
    processes = [context.Process(target=_slow, args=(tree,)) for _ in range(3)]
    for process in processes:
        process.start()
    for process in processes:
        process.join()
    assert [process.exitcode for process in processes] == [0, 0, 0]
    assert reads(tree) == 1


def test_long_readings_are_announced(tree, monkeypatch):
    monkeypatch.setattr(stored, "_FIRST", 0.02)
    monkeypatch.setattr(stored, "_EVERY", 0.02)
    said: list[str] = []

    def read() -> FaceTable:
        while len(said) < 2:
            time.sleep(0.01)
        return read_tree(tree, tree.parent / "log")

    stored.read_or_stored(None, "tree", read, said.append)
    assert "tree: reading the label files" in said[0]
    assert "tree: still reading after" in said[1]


def test_the_key_is_that_of_arguments_and_code(tmp_path, monkeypatch):
    package = tmp_path / "mylayouts"
    package.mkdir()
    (package / "__init__.py").touch()
    (package / "helper.py").write_text("def value():\n    return 1\n")
    (package / "one.py").write_text("from mylayouts.helper import value\n\ndef read(root):\n    return value()\n")
    monkeypatch.syspath_prepend(str(tmp_path))

    def key(node: dict) -> str:
        import importlib

        for name in [name for name in sys.modules if name.startswith("mylayouts")]:
            del sys.modules[name]
        import linecache

        linecache.clearcache()
        importlib.invalidate_caches()
        return stored.stored_path(tmp_path, "set", node, importlib.import_module("mylayouts.one").read).name

    node = {"_target_": "mylayouts.one.read", "root": "/data"}
    first = key(node)
    assert first.startswith("set-")
    assert key(dict(reversed(node.items()))) == first
    assert key({**node, "root": "/other"}) != first
    (package / "helper.py").write_text("def value():\n    return 22\n")
    assert key(node) != first
