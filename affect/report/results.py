# SPDX-License-Identifier: Apache-2.0
"""The result file: strict JSON that is written atomically, and the description of what produced it."""

from __future__ import annotations

import dataclasses
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
    "mediapipe",
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
    """Return what produced a result: versions, platform, accelerator, and the commit of a checkout.

    It never fails: what cannot be found out is None. It imports nothing heavy; versions are those of the installed
    distributions. The commit is given only if the running package is itself tracked by git, so that a user's own
    repository around an installed package is never mistaken for it; ``dirty`` says whether tracked files differ.
    """
    return {
        "affect": affect.__version__,
        "python": platform.python_version(),
        "platform": platform.platform(),
        "machine": platform.machine(),
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


def _git(folder: Path) -> dict[str, object] | None:
    def ask(*words: str) -> str | None:
        try:
            done = subprocess.run(
                ["git", "-C", str(folder), *words], capture_output=True, text=True, timeout=10, check=False
            )
        except (OSError, subprocess.SubprocessError, UnicodeDecodeError):
            return None
        return done.stdout.strip() if done.returncode == 0 else None

    if not ask("ls-files", "--error-unmatch", "__init__.py"):
        return None
    commit = ask("rev-parse", "HEAD")
    if commit is None:
        return None
    changed = ask("status", "--porcelain", "--untracked-files=no")
    return {"commit": commit, "dirty": None if changed is None else bool(changed)}
