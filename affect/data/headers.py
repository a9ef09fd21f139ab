# SPDX-License-Identifier: Apache-2.0
"""What image files say of themselves: size, format and pixels, from the first and last bytes, without decoding.

A million files take about half a minute of processor time: JPEG and PNG, which nearly all datasets are, are read here
in a few microseconds; Pillow reads the rest, and whatever looks unusual. A file without the end that its format
demands is decoded, since it was probably cut short.
"""

from __future__ import annotations

import io
import os
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from typing import NamedTuple

import numpy as np

from affect.data.images import FileImages, ImageReader, Picture, open_pictures, read_image
from affect.errors import DataError

MISSING, EMPTY, UNREADABLE = "missing", "empty", "unreadable"
PROBLEMS = (MISSING, EMPTY, UNREADABLE)
"""Why an image cannot be used: there is no file, it has no byte, or its bytes are no whole image."""

COLOUR, GREY, PALETTE, CMYK, DEEP = "colour", "grey", "palette", "CMYK", "16-bit"
"""How pixels are stored; all of them are read as RGB, 8 bits each."""

Progress = Callable[[int], object]
"""Called with the number of images that were just dealt with."""

_BLOCK = 256
_FIRST = 4096
_SEVERAL = 64 * 1024

_ENDINGS = {
    "JPEG": ("jpg", "jpeg", "jpe", "jfif"),
    "MPO": ("jpg", "jpeg", "mpo"),
    "PNG": ("png",),
    "PPM": ("ppm", "pgm", "pbm", "pnm"),
    "BMP": ("bmp", "dib"),
    "TIFF": ("tif", "tiff"),
    "WEBP": ("webp",),
    "GIF": ("gif",),
    "JPEG2000": ("jp2", "j2k", "jpx"),
}
"""Endings of file names by format; a format that is not listed is not judged by its name."""

_FRAMES = frozenset({0xC0, 0xC1, 0xC2, 0xC3, 0xC5, 0xC6, 0xC7, 0xC9, 0xCA, 0xCB, 0xCD, 0xCE, 0xCF})
"""JPEG markers of a frame's header, which holds size and components."""

_PNG = b"\x89PNG\r\n\x1a\n"


class Header(NamedTuple):
    """What one file says of itself.

    Attributes:
        width: Pixels as shown, that is with the camera's rotation applied; 0 if unknown.
        height: Likewise.
        kind: Format, e.g. ``JPEG``; empty if unknown.
        pixels: ``colour``, ``grey``, ``palette``, ``CMYK`` or ``16-bit``; empty if unknown.
        turned: Whether the camera noted a rotation or reflection, which readers apply.
        whole: Whether the file ends as its format demands; True where the format demands nothing.
        problem: One of ``PROBLEMS``, or empty.
    """

    width: int
    height: int
    kind: str
    pixels: str
    turned: bool = False
    whole: bool = True
    problem: str = ""


@dataclass(frozen=True)
class Headers:
    """Headers of many images, one row per image that was looked at.

    Attributes:
        rows: Rows of the table ``(N,)``.
        sizes: Width and height ``(N, 2)`` int32; 0 where unknown.
        kinds: Format of each ``(N,)``, objects.
        pixels: How each stores its pixels ``(N,)``, objects.
        turned: Whether a camera's rotation is applied ``(N,)``.
        problems: One of ``PROBLEMS`` or empty ``(N,)``, objects.
        lying: Whether the file's ending is that of another format ``(N,)``.
    """

    rows: np.ndarray
    sizes: np.ndarray
    kinds: np.ndarray
    pixels: np.ndarray
    turned: np.ndarray
    problems: np.ndarray
    lying: np.ndarray


def read_headers(images: FileImages, rows: np.ndarray, workers: int = 8, progress: Progress | None = None) -> Headers:
    """Return the headers of the image files of ``rows`` ``(N,)``.

    Args:
        images: Reader whose images are plain files.
        rows: Rows of its table, each image once.
        workers: Threads; more than one only helps where files are far away.
        progress: Called after each block of files.
    """

    def look(block: np.ndarray) -> list[tuple[Header, bool]]:
        found = []
        for path in images.paths(block):
            header = read_header(path)
            found.append((header, is_lying(path, header.kind)))
        return found

    headers: list[tuple[Header, bool]] = []
    for block in in_blocks(look, rows, workers, progress):
        headers += block
    count = len(headers)
    return Headers(
        rows=np.asarray(rows, np.int64),
        sizes=np.array([header[:2] for header, _ in headers], np.int32).reshape(count, 2),
        kinds=_objects([header.kind for header, _ in headers]),
        pixels=_objects([header.pixels for header, _ in headers]),
        turned=np.array([header.turned for header, _ in headers], bool),
        problems=_objects([header.problem for header, _ in headers]),
        lying=np.array([lying for _, lying in headers], bool),
    )


def decode_headers(
    images: ImageReader, rows: np.ndarray, workers: int = 8, progress: Progress | None = None
) -> Headers:
    """Return what decoding the images of ``rows`` ``(N,)`` tells of them: their size, or that they are unreadable.

    Args:
        images: Any reader.
        rows: Rows, sorted, so that a video is read forwards.
        workers: Threads; readers of archives and videos keep state, so they get one.
        progress: Called after each block of images.
    """

    def look(block: np.ndarray) -> list[tuple[int, int]]:
        try:
            return [_decoded_size(picture) for picture in open_pictures(images, block)]
        except DataError:
            return [_decoded_size(row) for row in block]

    def _decoded_size(given: Picture | np.int64) -> tuple[int, int]:
        try:
            picture = given if not isinstance(given, np.integer) else open_pictures(images, np.array([given]))[0]
            height, width = picture.pixels().shape[:2]
        except DataError:
            return 0, 0
        return width, height

    many = workers if isinstance(images, FileImages) else 1
    sizes: list[tuple[int, int]] = []
    for block in in_blocks(look, rows, many, progress):
        sizes += block
    found = np.array(sizes, np.int32).reshape(len(rows), 2)
    empty = [""] * len(rows)
    return Headers(
        rows=np.asarray(rows, np.int64),
        sizes=found,
        kinds=_objects(empty),
        pixels=_objects(empty),
        turned=np.zeros(len(rows), bool),
        problems=_objects([UNREADABLE if not width else "" for width in found[:, 0].tolist()]),
        lying=np.zeros(len(rows), bool),
    )


def in_blocks(
    work: Callable[[np.ndarray], list], rows: np.ndarray, workers: int, progress: Progress | None = None
) -> Iterator[list]:
    """Give the results of ``work`` on blocks of ``rows``, in their order, computed in threads."""
    blocks = [rows[start : start + _BLOCK] for start in range(0, len(rows), _BLOCK)]
    if workers <= 1 or len(blocks) <= 1:
        results: Iterator[list] = map(work, blocks)
        yield from _reported(results, blocks, progress)
        return
    with ThreadPoolExecutor(workers) as pool:
        yield from _reported(pool.map(work, blocks), blocks, progress)


def _reported(results: Iterator[list], blocks: Sequence[np.ndarray], progress: Progress | None) -> Iterator[list]:
    for result, block in zip(results, blocks, strict=True):
        if progress is not None:
            progress(len(block))
        yield result


def _objects(values: list[str]) -> np.ndarray:
    array = np.empty(len(values), object)
    array[:] = values
    return array


def is_lying(path: Path, kind: str) -> bool:
    """Return whether a file's ending belongs to another format than ``kind``.

    Example:
        >>> is_lying(Path("face.png"), "JPEG"), is_lying(Path("face.JPG"), "JPEG"), is_lying(Path("face"), "JPEG")
        (True, False, False)
    """
    own, ending = _ENDINGS.get(kind), path.suffix.lower().lstrip(".")
    return own is not None and ending not in own and any(ending in endings for endings in _ENDINGS.values())


def read_header(path: Path) -> Header:
    """Return what a file says of itself; never raises, a problem is part of the answer."""
    try:
        with open(path, "rb", buffering=0) as file:  # noqa: PTH123 - unbuffered, which Path.open wraps
            header = _header(file, os.fstat(file.fileno()).st_size)
    except (FileNotFoundError, NotADirectoryError):
        return _problem(MISSING)
    except OSError:
        return _problem(UNREADABLE)
    if header.problem or header.whole:
        return header
    # Bytes behind the end are harmless, a missing end is not: only a decoder can tell.
    try:
        read_image(path)
    except DataError:
        return header._replace(problem=UNREADABLE)
    return header


def _problem(kind: str) -> Header:
    return Header(0, 0, "", "", problem=kind)


def _header(file: io.FileIO, size: int) -> Header:
    if size == 0:
        return _problem(EMPTY)
    start = file.read(_FIRST) or b""
    end = start[-12:] if size <= len(start) else _last(file, 12)
    header = None
    if start.startswith(b"\xff\xd8"):
        header = _jpeg(start, end)
        if header is None and size > len(start):
            # Embedded thumbnails and colour profiles stand before the frame.
            file.seek(0)
            header = _jpeg(file.read(_SEVERAL) or b"", end)
    elif start.startswith(_PNG):
        header = _png(start, end)
    return header if header is not None else _by_pillow(file, end)


def _last(file: io.FileIO, count: int) -> bytes:
    file.seek(-count, os.SEEK_END)
    return file.read(count) or b""


def _jpeg(data: bytes, end: bytes) -> Header | None:
    """Return the header of a JPEG; None if it stands further on, or a camera's notes have to be read."""
    place, length = 2, len(data)
    while place + 10 <= length:
        if data[place] != 0xFF:
            return None
        marker = data[place + 1]
        if marker == 0xFF:  # A filling byte.
            place += 1
            continue
        if marker in _FRAMES:
            depth, components = data[place + 4], data[place + 9]
            height = int.from_bytes(data[place + 5 : place + 7], "big")
            width = int.from_bytes(data[place + 7 : place + 9], "big")
            if depth != 8 or components not in (1, 3, 4) or not (width and height):
                return None
            pixels = {1: GREY, 3: COLOUR, 4: CMYK}[components]
            return Header(width, height, "JPEG", pixels, whole=end.endswith(b"\xff\xd9"))
        if marker == 0xE1 and data[place + 4 : place + 8] == b"Exif":
            return None
        if marker == 0xDA:
            return None
        place += 2 + int.from_bytes(data[place + 2 : place + 4], "big")
    return None


def _png(data: bytes, end: bytes) -> Header | None:
    if data[12:16] != b"IHDR" or len(data) < 33 or b"eXIf" in data:
        return None
    width, height = int.from_bytes(data[16:20], "big"), int.from_bytes(data[20:24], "big")
    depth, kind = data[24], data[25]
    pixels = DEEP if depth == 16 else {0: GREY, 4: GREY, 3: PALETTE}.get(kind, COLOUR)
    return Header(width, height, "PNG", pixels, whole=end[4:8] == b"IEND")


def _by_pillow(file: io.FileIO, end: bytes) -> Header:
    from PIL import Image

    file.seek(0)
    try:
        with Image.open(file) as image:
            orientation = image.getexif().get(0x0112, 1)
            width, height = image.size
            kind, mode = str(image.format), image.mode
            raw = str(image.tile[0][3]) if image.tile else ""
    # Pillow's parsers raise what they please on bytes that they do not understand.
    except (
        OSError,
        SyntaxError,
        ValueError,
        TypeError,
        KeyError,
        IndexError,
        OverflowError,
        Image.DecompressionBombError,
    ):
        return _problem(UNREADABLE)
    turned = orientation in range(2, 9)
    if orientation in range(5, 9):
        width, height = height, width
    if mode.startswith(("I", "F")) or "16" in raw:
        pixels = DEEP
    elif mode in ("1", "L", "LA"):
        pixels = GREY
    else:
        pixels = {"P": PALETTE, "PA": PALETTE, "CMYK": CMYK}.get(mode, COLOUR)
    whole = end.endswith(b"\xff\xd9") if kind in ("JPEG", "MPO") else True
    return Header(width, height, kind, pixels, turned, whole)
