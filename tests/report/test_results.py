# SPDX-License-Identifier: Apache-2.0
"""The result file: strict JSON, the same bytes for the same data, whole or not there at all."""

from __future__ import annotations

import dataclasses
import json
import math
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest

import affect
from affect.errors import DataError
from affect.files import replacing
from affect.report import environment, read_json, results, to_json, write_json


@dataclasses.dataclass
class Options:
    rate: float
    sizes: tuple[int, ...]


class Tensor:
    """What torch's tensors look like to the writer; importing torch here would cost the suite seconds."""

    def detach(self):
        return self

    def tolist(self):
        return [1.0, math.nan]


DATA = {
    "b": np.float32(0.5),
    "a": {"nan": math.nan, "infinite": -math.inf, "array": np.array([[1.0, np.nan]]), "integer": np.int64(3)},
    "flags": [True, np.bool_(False), None],
    "options": Options(0.1, (1, 2)),
    "path": Path("runs") / "x",
    "names": {"c", "a", "b"},
    "tensor": Tensor(),
    "text": "Schröder → ✓",
    3: "integer key",
}


def test_everything_becomes_strict_json(tmp_path):
    path = write_json(tmp_path / "deep" / "results.json", DATA)
    strict = json.loads(path.read_text(encoding="utf-8"), parse_constant=lambda name: pytest.fail(name))
    assert strict == {
        "b": 0.5,
        "a": {"nan": None, "infinite": None, "array": [[1.0, None]], "integer": 3},
        "flags": [True, False, None],
        "options": {"rate": 0.1, "sizes": [1, 2]},
        "path": "runs/x",
        "names": ["a", "b", "c"],
        "tensor": [1.0, None],
        "text": "Schröder → ✓",
        "3": "integer key",
    }
    assert strict["flags"][0] is True
    assert read_json(path) == strict
    assert [item.name for item in path.parent.iterdir()] == ["results.json"]


def test_equal_data_gives_equal_bytes(tmp_path):
    first = write_json(tmp_path / "1.json", DATA).read_bytes()
    second = write_json(tmp_path / "2.json", dict(reversed(DATA.items()))).read_bytes()
    assert first == second
    assert first.endswith(b"}\n")


@pytest.mark.parametrize(
    ("data", "message"),
    [
        ({"a": {"b": [1, object()]}}, r"data\.a\.b\.1: a object"),
        ({(1, 2): 3}, r"at data: key \(1, 2\)"),
        ({1: "a", "1": "b"}, r"at data: two keys"),
        ({"a": b"bytes"}, r"data\.a: a bytes"),
    ],
)
def test_what_has_no_json_is_refused_with_its_place(tmp_path, data, message):
    with pytest.raises(DataError, match=message):
        write_json(tmp_path / "results.json", data)
    assert list(tmp_path.iterdir()) == []


def test_failed_write_leaves_the_old_file(tmp_path):
    path = write_json(tmp_path / "results.json", {"old": 1})

    def stop_half_way():
        with replacing(path) as part:
            part.write_text('{"new": ')
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        stop_half_way()
    assert read_json(path) == {"old": 1}
    assert list(tmp_path.iterdir()) == [path]


def test_killed_writer_leaves_the_old_file(tmp_path):
    path = write_json(tmp_path / "results.json", {"old": 1})
    program = (
        "import os, sys; from affect.files import replacing\n"
        "with replacing(sys.argv[1]) as part:\n    part.write_text('half'); os.kill(os.getpid(), 9)"
    )
    done = subprocess.run([sys.executable, "-c", program, str(path)], check=False)
    assert done.returncode == -9
    assert read_json(path) == {"old": 1}


def test_file_keeps_the_permissions_that_the_user_asked_for(tmp_path):
    plain = tmp_path / "plain"
    plain.write_text("")
    assert write_json(tmp_path / "results.json", {}).stat().st_mode == plain.stat().st_mode


@pytest.mark.parametrize(
    ("text", "message"),
    [
        (None, "no such file"),
        ('{\n"a": }', "line 2: not JSON"),
        ("[1]", "holds a list"),
        (b"\xff\xfe", "cannot be read"),
    ],
)
def test_bad_file_is_one_clear_line(tmp_path, text, message):
    path = tmp_path / "results.json"
    if text is not None:
        path.write_bytes(text if isinstance(text, bytes) else text.encode())
    with pytest.raises(DataError, match=message) as caught:
        read_json(path)
    assert "\n" not in str(caught.value)
    assert str(path) in str(caught.value)


def test_environment_names_versions_and_fits_json():
    found = environment()
    assert found["affect"] == affect.__version__
    assert found["packages"]["numpy"] == np.__version__
    assert to_json(found) == found
    git = found["git"]
    assert git is None or (len(git["commit"]) == 40 and isinstance(git["dirty"], bool))


def test_commit_is_that_of_the_package_only(tmp_path):
    """An installed package inside somebody's repository is not that repository's code."""

    def git(*words: str) -> str:
        asked = ["git", "-C", str(tmp_path), "-c", "user.name=a", "-c", "user.email=a@b", *words]
        return subprocess.run(asked, check=True, capture_output=True, text=True).stdout.strip()

    package = tmp_path / "affect"
    package.mkdir()
    (package / "__init__.py").write_text("")
    assert results._git(package) is None
    git("init", "-q")
    (tmp_path / "other.txt").write_text("")
    git("add", "other.txt")
    git("commit", "-q", "-m", "other")
    assert results._git(package) is None
    git("add", "affect/__init__.py")
    git("commit", "-q", "-m", "package")
    assert results._git(package) == {"commit": git("rev-parse", "HEAD"), "dirty": False}
    (package / "__init__.py").write_text("changed = 1\n")
    found = results._git(package)
    assert found["dirty"] is True
    assert found["patch"] == results.patch_hash(results.code_patch(package))


def test_code_that_is_not_committed_can_be_had_back(tmp_path):
    """The patch turns the commit into the code that ran, new files included."""

    def git(where, *words: str) -> str:
        asked = ["git", "-C", str(where), "-c", "user.name=a", "-c", "user.email=a@b", *words]
        return subprocess.run(asked, check=True, capture_output=True, text=True).stdout

    first, second = tmp_path / "first", tmp_path / "second"
    for folder in (first / "affect", first / "conf"):
        folder.mkdir(parents=True)
    (first / "affect" / "__init__.py").write_text("old = 1\n")
    (first / "conf" / "train.yaml").write_text("a: 1\n")
    (first / ".gitignore").write_text("*.log\n")
    git(first, "init", "-q")
    git(first, "add", ".")
    git(first, "commit", "-q", "-m", "code")
    git(tmp_path, "clone", "-q", str(first), str(second))
    assert results.code_patch(first / "affect") == ""
    assert results.patch_hash("") is None
    (first / "affect" / "__init__.py").write_text("new = 2\n")
    (first / "affect" / "mine.py").write_text("mine = 'ä'\n")
    (first / "affect" / "run.log").write_text("ignored\n")
    (first / "notes.txt").write_text("not code\n")
    patch = results.code_patch(first / "affect")
    assert "notes.txt" not in patch
    assert "run.log" not in patch
    (tmp_path / "code.patch").write_bytes(patch.encode("utf-8", "surrogateescape"))
    git(second, "apply", str(tmp_path / "code.patch"))
    assert (second / "affect" / "__init__.py").read_text() == "new = 2\n"
    assert (second / "affect" / "mine.py").read_text() == "mine = 'ä'\n"
    assert git(first, "status", "--porcelain", "--", "affect").count("??") == 1  # nothing was staged


def test_environment_never_fails(monkeypatch):
    def broken(*args, **kwargs):
        raise OSError("no such program")

    monkeypatch.setattr(results.subprocess, "run", broken)
    monkeypatch.setattr(results.importlib.metadata, "version", broken)
    found = environment()
    assert found["git"] is None
    assert found["packages"] == {}


def test_results_and_tables_load_neither_torch_nor_matplotlib():
    program = "import sys, affect.report; print(sorted({'torch', 'matplotlib', 'cv2'} & set(sys.modules)))"
    done = subprocess.run([sys.executable, "-c", program], check=True, capture_output=True, text=True)
    assert done.stdout.strip() == "[]"
