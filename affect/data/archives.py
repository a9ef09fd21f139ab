# SPDX-License-Identifier: Apache-2.0
"""Readers of images inside archives: ZIP files, videos and Arrow shards, without unpacking them.

An image inside an archive is named ``<archive>!<member>`` in the column ``image``, the archive relative to the root:

=====================================  =============================================================================
``2D+3D/F001.zip!F001/T1/1.jpg``       member of a ZIP file
``Videos_LeftCamera/left.avi!57``      frame of a video, counted from 1
``shards/u00012.arrow!17``             row of a shard: an Arrow IPC file whose column ``image`` holds encoded images
=====================================  =============================================================================

A path without ``!`` is a plain file, so that a set which is partly unpacked is read as well. Readers travel to loading
processes without what they have open; each process opens it again.
"""

from __future__ import annotations

import os
import struct
import zipfile
import zlib
from collections import OrderedDict
from collections.abc import Callable
from pathlib import Path
from typing import Generic, Protocol, TypeVar

import cv2
import numpy as np
import pyarrow as pa

from affect.data.images import DecodedPicture, Picture, open_encoded, open_picture
from affect.data.table import FaceTable
from affect.errors import DataError

SEPARATOR = "!"
"""Between an archive and its member."""

MOST_OPEN = 256
"""Archives that a process keeps open: fewer than the 1,024 files that systems commonly allow a process."""


def split_member(name: str) -> tuple[str, str | None]:
    """Return archive and member of an image path; the member is None for a plain file.

    Example:
        >>> split_member("2D+3D/F001.zip!F001/T1/1.jpg"), split_member("1.jpg")
        (('2D+3D/F001.zip', 'F001/T1/1.jpg'), ('1.jpg', None))
    """
    archive, separator, member = name.partition(SEPARATOR)
    return (archive, member) if separator else (name, None)


class _Closable(Protocol):
    def close(self) -> None: ...


Opened = TypeVar("Opened", bound=_Closable)


class _OpenArchives(Generic[Opened]):
    """Archives that this process has open, the ones used longest ago closed first.

    Args:
        make: Opens an archive.
        most: How many stay open.
    """

    def __init__(self, make: Callable[[Path], Opened], most: int) -> None:
        self.make, self.most = make, most
        self._held: OrderedDict[Path, Opened] = OrderedDict()
        self._process = os.getpid()

    def get(self, path: Path) -> Opened:
        if self._process != os.getpid():  # after a fork: a decoder's state is not shared between processes
            self._held, self._process = OrderedDict(), os.getpid()
        if path in self._held:
            self._held.move_to_end(path)
            return self._held[path]
        while len(self._held) >= self.most:
            self._held.popitem(last=False)[1].close()
        opened = self._held[path] = self.make(path)
        return opened

    def __reduce__(self) -> tuple:
        return type(self), (self.make, self.most)


class _ArchiveImages(Generic[Opened]):
    """What the readers share: the images of a table in archives of one kind.

    Args:
        table: The table.
        root: Folder that the paths are relative to; None takes the table's root.
    """

    def __init__(self, table: FaceTable, root: str | Path | None = None) -> None:
        self.table = table
        self.root = table.root if root is None else Path(root)
        self._archives: _OpenArchives[Opened] = self._opening()

    def _opening(self) -> _OpenArchives[Opened]:
        raise NotImplementedError

    def _names(self, rows: np.ndarray) -> list[tuple[str, str | None]]:
        return [split_member(name) for name in self.table.strings("image", np.asarray(rows, np.int64))[0]]

    def read(self, rows: np.ndarray) -> list[np.ndarray]:
        """Return the images of ``rows`` ``(N,)``, each RGB uint8 ``(H, W, 3)``."""
        return [picture.pixels() for picture in self.open(rows)]

    def open(self, rows: np.ndarray) -> list[Picture]:
        """Return the pictures of ``rows`` ``(N,)``."""
        raise NotImplementedError


# ---------------------------------------------------------------------------------------------------------- zip


class _Zip:
    """A ZIP file with an index of a few bytes per member: Python's own takes half a kilobyte each.

    Members are read at their offset without moving a shared position, so that processes may share the open file.
    """

    def __init__(self, path: Path) -> None:
        self.path = path
        try:
            with zipfile.ZipFile(path) as archive:
                members = [info for info in archive.infolist() if not info.is_dir()]
        except FileNotFoundError as error:
            raise DataError(f"{path}: no such archive; check the root folder and the column image") from error
        except (zipfile.BadZipFile, OSError) as error:
            raise DataError(f"{path}: not a readable ZIP file ({error}); copy it again") from error
        members.sort(key=lambda info: info.filename.encode())
        self._names = np.array([info.filename.encode() for info in members], dtype=np.bytes_)
        self._entries = np.array(
            [(i.header_offset, i.compress_size, i.compress_type, i.CRC, i.flag_bits) for i in members], np.int64
        ).reshape(-1, 5)
        self._file = os.open(path, os.O_RDONLY)

    def __contains__(self, member: str) -> bool:
        return self._find(member) is not None

    def _find(self, member: str) -> int | None:
        name = np.bytes_(member.encode())
        place = int(np.searchsorted(self._names, name))
        return place if place < len(self._names) and self._names[place] == name else None

    def data(self, member: str) -> np.ndarray:
        """Return the bytes of a member, uint8 ``(N,)``.

        Raises:
            DataError: If it is not there, encrypted, packed in an unknown way, or damaged.
        """
        place = self._find(member)
        if place is None:
            raise DataError(f"{self.path}: holds no {member} ({len(self._names)} files); check the column image")
        offset, size, method, checksum, flags = self._entries[place].tolist()
        if flags & 1:
            raise DataError(f"{self.path}: {member} is encrypted; unpack the archive with its password first")
        header = os.pread(self._file, 30, offset)
        if len(header) == 30 and header[:4] == b"PK\x03\x04":
            name, extra = struct.unpack("<HH", header[26:])
            packed = os.pread(self._file, size, offset + 30 + name + extra)
            try:
                content = self._unpacked(packed, method, member)
            except zlib.error:
                content = None
            if content is not None and len(packed) == size and zlib.crc32(content) == checksum:
                return np.frombuffer(content, np.uint8)
        raise DataError(f"{self.path}: {member} is damaged; copy the archive again")

    def _unpacked(self, packed: bytes, method: int, member: str) -> bytes:
        if method == zipfile.ZIP_STORED:
            return packed
        if method == zipfile.ZIP_DEFLATED:
            return zlib.decompress(packed, -15)
        raise DataError(f"{self.path}: {member} is packed by method {method}; unpack the archive first")

    def close(self) -> None:
        os.close(self._file)


class _Packed(_Closable, Protocol):
    def data(self, member: str) -> np.ndarray: ...


PackedArchive = TypeVar("PackedArchive", bound=_Packed)


class _EncodedImages(_ArchiveImages[PackedArchive]):
    """Images whose encoded bytes an archive gives by member."""

    def open(self, rows: np.ndarray) -> list[Picture]:
        pictures = []
        for archive, member in self._names(rows):
            path = self.root / archive
            if member is None:
                pictures.append(open_picture(path))
            else:
                pictures.append(open_encoded(self._archives.get(path).data(member), _shown(path, member)))
        return pictures


class ZipImages(_EncodedImages[_Zip]):
    """Images in ZIP files.

    Args:
        table: The table.
        root: Folder that the paths are relative to; None takes the table's root.
    """

    def _opening(self) -> _OpenArchives[_Zip]:
        return _OpenArchives(_Zip, MOST_OPEN)


def _shown(path: Path, member: str) -> Path:
    return Path(f"{path}{SEPARATOR}{member}")


# -------------------------------------------------------------------------------------------------------- video


class _Video:
    """A video that is decoded forwards.

    Seeking is left out on purpose: where a decoder lands depends on the codec and on time stamps, and a label of a
    neighbouring frame is an error that nobody sees. Frames before the wanted one are decoded and dropped.
    """

    def __init__(self, path: Path) -> None:
        if not path.is_file():
            raise DataError(f"{path}: no such video; check the root folder and the column image")
        self.path = path
        self._start()

    def _start(self) -> None:
        # One thread: preparing runs as many processes as there are cores, and each thread would hold frames.
        self._capture = cv2.VideoCapture(str(self.path), cv2.CAP_FFMPEG, [cv2.CAP_PROP_N_THREADS, 1])
        if not self._capture.isOpened():
            self._capture = cv2.VideoCapture(str(self.path))
        if not self._capture.isOpened():
            raise DataError(f"{self.path}: not a readable video ({self.path.stat().st_size} bytes); copy it again")
        self._taken = 0
        self._last: np.ndarray | None = None

    def frame(self, number: int) -> np.ndarray:
        """Return frame ``number`` (from 1) as RGB uint8 ``(H, W, 3)``.

        Raises:
            DataError: If the video has no such frame, or ends early because it is damaged.
        """
        if number < 1:
            raise DataError(f"{self.path}: frame {number}; frames are counted from 1")
        if number == self._taken and self._last is not None:
            return self._last
        if number <= self._taken:
            self.close()
            self._start()
        while self._taken < number:
            if not self._capture.grab():
                raise DataError(
                    f"{self.path}: no frame {number}, the video ends after {self._taken}; "
                    "drop the rows behind or copy the video again if it was cut short"
                )
            self._taken += 1
        worked, image = self._capture.retrieve()
        if not worked or image is None:
            raise DataError(f"{self.path}: frame {number} cannot be decoded; copy the video again")
        self._last = cv2.cvtColor(image, cv2.COLOR_GRAY2RGB if image.ndim == 2 else cv2.COLOR_BGR2RGB)
        return self._last

    def close(self) -> None:
        self._capture.release()


class VideoImages(_ArchiveImages[_Video]):
    """Frames of videos.

    Rows in the order of frames are cheap: each video is decoded once, forwards. Any other order is exact too but slow,
    because going back means decoding from the beginning; ``affect prepare`` turns such a set into crops.

    Args:
        table: The table.
        root: Folder that the paths are relative to; None takes the table's root.
        most: Videos that a process keeps open.
    """

    def __init__(self, table: FaceTable, root: str | Path | None = None, most: int = 2) -> None:
        self.most = most
        super().__init__(table, root)

    def _opening(self) -> _OpenArchives[_Video]:
        return _OpenArchives(_Video, self.most)

    def read(self, rows: np.ndarray) -> list[np.ndarray]:
        names = self._names(rows)
        # Forwards through each video, whatever the order that was asked for.
        order = sorted(range(len(names)), key=lambda k: (names[k][0], _frame_number(*names[k]) if names[k][1] else 0))
        images = {k: self._frame(*names[k]) for k in order}
        return [images[k] for k in range(len(names))]

    def open(self, rows: np.ndarray) -> list[Picture]:
        return [DecodedPicture(image) for image in self.read(rows)]

    def _frame(self, archive: str, member: str | None) -> np.ndarray:
        if member is None:
            return open_picture(self.root / archive).pixels()
        return self._archives.get(self.root / archive).frame(_frame_number(archive, member))


def _frame_number(archive: str, member: str | None) -> int:
    if member is None or not (member.isascii() and member.isdigit()):
        raise DataError(f"{archive}{SEPARATOR}{member}: expected the number of a frame behind {SEPARATOR}")
    return int(member)


# ------------------------------------------------------------------------------------------------------- shards


class _Shard:
    """A memory-mapped shard."""

    def __init__(self, path: Path) -> None:
        self.path = path
        try:
            self._file = pa.memory_map(str(path))
        except FileNotFoundError as error:
            raise DataError(f"{path}: no such shard; run affect prepare again") from error
        try:
            table = pa.ipc.open_file(self._file).read_all()
            self.images = table["image"].combine_chunks() if table["image"].num_chunks != 1 else table["image"].chunk(0)
        except (pa.ArrowInvalid, KeyError) as error:
            raise DataError(f"{path}: not a shard of images; remove it and run affect prepare again") from error

    def data(self, member: str) -> np.ndarray:
        """Return the bytes of a row, uint8 ``(N,)``."""
        if not (member.isascii() and member.isdigit()) or int(member) >= len(self.images):
            raise DataError(f"{self.path}: has no row {member} ({len(self.images)} rows); run affect prepare again")
        value = self.images[int(member)].as_buffer()
        return np.frombuffer(value, np.uint8)

    def close(self) -> None:
        del self.images
        self._file = None


class ShardImages(_EncodedImages[_Shard]):
    """Encoded images in Arrow shards: a few large files where a file system chokes on millions of small ones.

    Args:
        table: The table.
        root: Folder that the paths are relative to; None takes the table's root.
    """

    def _opening(self) -> _OpenArchives[_Shard]:
        return _OpenArchives(_Shard, MOST_OPEN)
