# SPDX-License-Identifier: Apache-2.0
"""Reading images of a table: OpenCV decoding to RGB, one reader protocol, and the source that a data module is given.

A reader returns pixels as they are shown: the orientation that a camera noted is applied; grey, palette, CMYK, 16-bit
and transparent files become RGB uint8. Nothing is skipped silently: a file that is missing or cut short is an error
that names it.
"""

from __future__ import annotations

import io
import os
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Protocol, runtime_checkable

import cv2
import numpy as np

from affect.data.table import FaceTable
from affect.errors import DataError, near

if TYPE_CHECKING:
    from affect.geometry.alignment import CropRecipe

NO_SUBJECT = "no column subject: parts are split by image, so one person may be in training and in test"

NEAR_DUPLICATES = "near_duplicates"
"""Column of groups of almost equal images. It is made when a hold-out needs it, so a table may lack it."""

_REDUCED = {2: cv2.IMREAD_REDUCED_COLOR_2, 4: cv2.IMREAD_REDUCED_COLOR_4, 8: cv2.IMREAD_REDUCED_COLOR_8}
_LARGE_FILE = 48 * 1024
"""Bytes from which a JPEG's header is read first: a smaller file is decoded faster than a decision is made."""


class Picture(Protocol):
    """An image whose size is known and whose pixels are decoded when they are asked for."""

    size: tuple[int, int]
    """Width and height in pixels."""

    def pixels(self, reduce: int = 1) -> np.ndarray:
        """Return RGB uint8 ``(ceil(H / reduce), ceil(W / reduce), 3)``; each pixel is the mean of a square of them.

        Args:
            reduce: 1, 2, 4 or 8.
        """
        ...


@runtime_checkable
class ImageReader(Protocol):
    """Reads the images of a table's rows."""

    def read(self, rows: np.ndarray) -> list[np.ndarray]:
        """Return the images of ``rows`` ``(N,)``, each RGB uint8 ``(H, W, 3)``."""
        ...


@runtime_checkable
class PictureReader(ImageReader, Protocol):
    """A reader that can decode at a reduced size, which is faster and free of aliasing for large photographs."""

    def open(self, rows: np.ndarray) -> list[Picture]:
        """Return the pictures of ``rows`` ``(N,)``, not decoded yet."""
        ...


def open_pictures(reader: ImageReader, rows: np.ndarray) -> list[Picture]:
    """Return the pictures of ``rows`` from any reader."""
    if isinstance(reader, PictureReader):
        return reader.open(rows)
    return [DecodedPicture(image) for image in reader.read(rows)]


def reduce_by_area(image: np.ndarray, reduce: int) -> np.ndarray:
    """Return the image with each square of ``reduce`` x ``reduce`` pixels replaced by its mean.

    A size that is no multiple of ``reduce`` is filled up with its last row and column, as JPEG decoders do.
    """
    if reduce == 1:
        return image
    height, width = image.shape[:2]
    below, right = -height % reduce, -width % reduce
    if below or right:
        image = cv2.copyMakeBorder(image, 0, below, 0, right, cv2.BORDER_REPLICATE)
    size = (image.shape[1] // reduce, image.shape[0] // reduce)
    return cv2.resize(image, size, interpolation=cv2.INTER_AREA)


class DecodedPicture:
    """A picture in memory.

    Args:
        image: RGB uint8 ``(H, W, 3)``.
    """

    def __init__(self, image: np.ndarray) -> None:
        self.image = image
        self.size = (image.shape[1], image.shape[0])

    def pixels(self, reduce: int = 1) -> np.ndarray:
        return reduce_by_area(self.image, reduce)


class _EncodedPicture:
    """A large JPEG file without camera rotation: the decoder reduces it by 2, 4 or 8 for less than a full decode."""

    def __init__(self, data: np.ndarray, size: tuple[int, int], path: Path) -> None:
        self.data, self.size, self.path = data, size, path

    def pixels(self, reduce: int = 1) -> np.ndarray:
        return decode(self.data, self.path, reduce)


def decode(data: np.ndarray, path: Path, reduce: int = 1) -> np.ndarray:
    """Return RGB uint8 ``(H, W, 3)`` of an encoded image.

    Args:
        data: The file's bytes, uint8 ``(N,)``.
        path: Its name, for messages.
        reduce: 1, 2, 4 or 8; other than 1 for JPEG only.

    Raises:
        DataError: If the bytes are no image or are cut short.
    """
    try:
        if reduce == 1:
            image = cv2.imdecode(data, cv2.IMREAD_COLOR_RGB)
        else:
            image = cv2.imdecode(data, _REDUCED[reduce])
            if image is not None:
                cv2.cvtColor(image, cv2.COLOR_BGR2RGB, dst=image)
    except cv2.error:
        image = None
    if image is None:
        raise DataError(
            f"{path}: not a readable image ({len(data)} bytes); replace the file, or leave it out "
            "(dataset.leave_out=<file>, which affect check writes)"
        )
    return image


def read_image(path: str | Path) -> np.ndarray:
    """Return RGB uint8 ``(H, W, 3)`` of an image file, turned as the camera noted.

    Raises:
        DataError: If the file is missing or unreadable.
    """
    path = Path(path)
    return decode(_load(path), path)


def open_picture(path: str | Path) -> Picture:
    """Return the picture in a file: decoded at once if it is small, otherwise when its pixels are asked for."""
    path = Path(path)
    return open_encoded(_load(path), path)


def open_encoded(data: np.ndarray, path: Path) -> Picture:
    """Return the picture in the bytes ``(N,)`` of an encoded image; ``path`` is its name for messages."""
    # JPEG by its first bytes. The other formats have no cheap reduced decoding.
    if len(data) >= _LARGE_FILE and data[0] == 0xFF and data[1] == 0xD8:
        size = _upright_size(data)
        if size is not None:
            return _EncodedPicture(data, size, path)
    return DecodedPicture(decode(data, path))


def _load(path: Path) -> np.ndarray:
    try:
        return np.frombuffer(path.read_bytes(), np.uint8)
    except FileNotFoundError as error:
        raise DataError(f"{path}: no such image; check the root folder and the column image") from error
    except OSError as error:
        raise DataError(f"{path}: cannot be read ({error.strerror})") from error


def _upright_size(data: np.ndarray) -> tuple[int, int] | None:
    """Return width and height of a JPEG from its header, None if a camera rotation has to be applied."""
    from PIL import Image, UnidentifiedImageError

    try:
        with Image.open(io.BytesIO(data.data)) as header:
            upright = header.getexif().get(0x0112, 1) == 1
            return header.size if upright else None
    except (UnidentifiedImageError, OSError, SyntaxError, ValueError):
        return None


class FileImages:
    """Images in files that the table's column ``image`` names.

    Args:
        table: The table.
        root: Folder that the paths are relative to; None takes the table's root.
    """

    def __init__(self, table: FaceTable, root: str | Path | None = None) -> None:
        self.table = table
        self.root = table.root if root is None else Path(root)

    def paths(self, rows: np.ndarray) -> list[Path]:
        """Return the files of ``rows``."""
        return [self.root / name for name in self.table.strings("image", rows)[0]]

    def read(self, rows: np.ndarray) -> list[np.ndarray]:
        return [read_image(path) for path in self.paths(rows)]

    def open(self, rows: np.ndarray) -> list[Picture]:
        return [open_picture(path) for path in self.paths(rows)]

    def missing(self, rows: np.ndarray | None = None) -> np.ndarray:
        """Return the rows whose file does not exist, sorted.

        Folders are listed once each, which is far cheaper than a question per file, above all on network drives.
        """
        rows = np.arange(len(self.table)) if rows is None else np.asarray(rows, np.int64)
        names = self.table.strings("image", rows)[0]
        listed: dict[str, frozenset[str]] = {}
        absent = []
        for row, name in zip(rows.tolist(), names, strict=True):
            folder, _, file = name.rpartition("/")
            if folder not in listed:
                listed[folder] = _files(self.root / (folder or ("/" if name.startswith("/") else "")))
            if file not in listed[folder]:
                absent.append(row)
        return np.array(sorted(absent), np.int64)

    def require_files(self, rows: np.ndarray | None = None) -> None:
        """Raise ``DataError`` with their number and the first ten if image files are missing, empty or no images.

        Whether a file is an image is told by its header; one that is cut short further on is found when it is decoded.
        """
        absent = self.missing(rows)
        if len(absent):
            shown = ", ".join(self.table.strings("image", absent[:10])[0])
            more = ", …" if len(absent) > 10 else ""
            raise DataError(
                f"{self.root}: {len(absent)} of {len(self.table)} image files are missing: {shown}{more}; "
                "set dataset.root to the folder that the column image is relative to, or drop these rows"
            )
        paths = self.paths(np.arange(len(self.table)) if rows is None else rows)
        empty = [path for path in paths if _is_empty(path)]
        foreign = [] if empty else [path for path in paths if not _is_image(path)]
        for found, what in ((empty, "have 0 bytes"), (foreign, "are no images")):
            if found:
                shown = ", ".join(str(path) for path in found[:10]) + (", …" if len(found) > 10 else "")
                raise DataError(f"{len(found)} image files {what}: {shown}; replace them or drop their rows")


def _is_empty(path: Path) -> bool:
    return path.stat().st_size == 0


def _is_image(path: Path) -> bool:
    """Whether the file's header is that of an image that ``read_image`` can decode."""
    from PIL import Image

    if cv2.haveImageReader(str(path)):
        return True
    try:
        with Image.open(path):
            return True
    except OSError:
        return False


def _files(folder: Path) -> frozenset[str]:
    try:
        with os.scandir(folder) as entries:
            return frozenset(entry.name for entry in entries)
    except (FileNotFoundError, NotADirectoryError):
        return frozenset()


@dataclass(frozen=True)
class Source:
    """A table with its images: what a data module trains on and evaluates.

    Without a column ``subject`` a source that would be split by it is split by image, with a note.

    Attributes:
        name: Key in result tables, e.g. ``bp4d``.
        table: Labels, one row per image.
        images: Reader of the rows' images.
        group: Column whose values never straddle two parts: subject, sequence, or ``image`` where a set has neither.
        recipe: How faces are cropped from ``images``; None resizes whole images.
        skipped: Number of items that reading left out, by reason.
        notes: What a reader of results has to know, one sentence each.
        together: Column whose rows with one value are held out together, e.g. ``NEAR_DUPLICATES``.
        stratify: Column of classes that held-out groups are spread over evenly.
        prepared: Where ``images`` are stored crops, the recipe from the photographs to the model's input.
    """

    name: str
    table: FaceTable
    images: ImageReader
    group: str = "subject"
    recipe: CropRecipe | None = None
    skipped: Mapping[str, int] = field(default_factory=dict)
    notes: Sequence[str] = ()
    together: str | None = None
    stratify: str | None = None
    prepared: CropRecipe | None = None

    @property
    def described(self) -> CropRecipe | None:
        """Recipe from photographs to the model's input: what a release tells others to do with new photographs."""
        return self.prepared if self.prepared is not None else self.recipe

    def __post_init__(self) -> None:
        names = self.table.names
        if self.group == "subject" and "subject" not in names:
            object.__setattr__(self, "group", "image")
            object.__setattr__(self, "notes", (*self.notes, NO_SUBJECT))
        elif self.group not in names:
            raise DataError(f"{self.name}: no column {self.group} to split by; {near(self.group, names)}")
        for key, column in (("together", self.together), ("stratify", self.stratify)):
            if column not in (None, NEAR_DUPLICATES) and column not in names:
                raise DataError(f"{self.name}: {key}={column} is no column; {near(str(column), names)}")
