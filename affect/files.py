# SPDX-License-Identifier: Apache-2.0
"""Atomic writing: a reader sees the old file or the whole new one, never a part, whenever the writer is killed."""

from __future__ import annotations

import fcntl
import os
import socket
import tempfile
import uuid
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING

from affect.errors import ConfigError

if TYPE_CHECKING:
    from collections.abc import Mapping

    from torch import Tensor


@contextmanager
def replacing(path: str | os.PathLike[str]) -> Iterator[Path]:
    """Yield a path beside ``path``; when the block ends well, what was written there takes the place of ``path``.

    The folder is made if it is missing. If the block raises, ``path`` is untouched and the part file is removed.

    Example:
        >>> with replacing("results.json") as part:  # doctest: +SKIP
        ...     part.write_text("{}")
    """
    target = Path(path)
    target.parent.mkdir(parents=True, exist_ok=True)
    # Beside the target, because a rename is atomic only within a file system; the suffix stays, because writers of
    # images choose their format by it. A name of our own keeps the permissions that the user's umask asks for.
    part = target.with_name(f".{target.stem[:80]}.{uuid.uuid4().hex[:12]}.part{target.suffix}")
    try:
        yield part
        with part.open("rb+") as stream:
            os.fsync(stream.fileno())
        part.replace(target)
    finally:
        part.unlink(missing_ok=True)


def require_writable(folder: str | os.PathLike[str]) -> None:
    """Make a folder, and write something that vanishes again to it, before long work relies on that.

    Raises:
        ConfigError: If that fails.
    """
    try:
        Path(folder).mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryFile(dir=folder):
            pass
    except OSError as error:
        raise ConfigError(
            f"{folder}: cannot be written to ({error.strerror}); choose another place: out=<…>"
        ) from error


@contextmanager
def locked(path: str | os.PathLike[str]) -> Iterator[None]:
    """Hold a lock file, which the system releases when the process ends in whatever way; its folder is made.

    Raises:
        ConfigError: If another process holds it.
    """
    path = Path(path)
    path.parent.mkdir(parents=True, exist_ok=True)
    with path.open("a+") as file:
        try:
            fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            file.seek(0)
            holder = file.read().strip() or "unknown"
            raise ConfigError(f"{path.parent}: another process is running it ({holder})") from None
        file.truncate(0)
        file.write(f"process {os.getpid()} on {socket.gethostname()}")
        file.flush()
        yield


def is_locked(path: str | os.PathLike[str]) -> bool:
    """Return whether a process holds a lock file; a file that is not there is not held."""
    try:
        with Path(path).open("rb") as file:
            fcntl.flock(file, fcntl.LOCK_SH | fcntl.LOCK_NB)
    except FileNotFoundError:
        return False
    except BlockingIOError:
        return True
    return False


def save_tensors(path: Path, tensors: Mapping[str, Tensor]) -> None:
    """Write a safetensors file, atomically."""
    from safetensors.torch import save_file

    with replacing(path) as part:
        # Clones, because the format refuses tensors that share memory.
        save_file({name: tensor.detach().cpu().contiguous().clone() for name, tensor in tensors.items()}, part)
