# SPDX-License-Identifier: Apache-2.0
"""Frames of photographs, videos and cameras, one after the other, and videos written frame by frame.

A source gives frames lazily and holds none of them: what a long video costs in memory is decided by who reads it
(``batches`` bounds that by number and by bytes). A frame that cannot be decoded is a frame without pixels, so that it
is counted and not skipped.
"""

from __future__ import annotations

import os
import time
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from glob import has_magic
from pathlib import Path
from types import TracebackType
from typing import Any, Protocol

import cv2
import numpy as np

from affect.data.images import read_image
from affect.errors import DataError
from affect.files import replacing

IMAGE_SUFFIXES = (".jpg", ".jpeg", ".png", ".bmp", ".webp", ".tif", ".tiff", ".pgm", ".ppm")
COUNTED_SUFFIXES = (".mp4", ".m4v", ".mov", ".avi", ".3gp")
"""Videos whose containers say how many frames they hold; of others OpenCV guesses it from their duration."""
VIDEO_SUFFIXES = (".mp4", ".m4v", ".mov", ".avi", ".mkv", ".webm", ".mpg", ".mpeg", ".wmv", ".flv", ".ts", ".3gp")


@dataclass(frozen=True, eq=False)
class Frame:
    """One picture of a source.

    Attributes:
        index: Its number in the source, from 0.
        timestamp: Seconds since the first frame, as the container says; None for photographs, and where a container
            tells no time.
        image: RGB uint8 ``(H, W, 3)``; None if it cannot be decoded.
        name: Name of the file that it comes from, relative to ``FrameSource.root``.
    """

    index: int
    timestamp: float | None
    image: np.ndarray | None
    name: str


class FrameSource(Protocol):
    """Where frames come from.

    Attributes:
        name: What it is called in tables and messages.
        root: Folder that names of frames are relative to.
        length: Number of frames as far as it is known, else None.
        rate: Frames per second as far as it is known, else None.
        moving: Whether neighbouring frames show the same scene, so that faces can be followed.
    """

    name: str
    root: Path
    length: int | None
    rate: float | None
    moving: bool

    def frames(self) -> Iterator[Frame]:
        """Yield the frames in order.

        Raises:
            DataError: If the source cannot be opened, or gives no frame at all.
        """
        ...

    def notes(self) -> list[str]:
        """Return what a user has to know of the frames that were read, one sentence each."""
        ...


# -------------------------------------------------------------------------------------------------- sources


class ImageFiles:
    """Photographs, each on its own.

    Args:
        paths: Files.
        root: Folder that their names are told relative to.
    """

    moving = False

    def __init__(self, paths: Sequence[Path], root: Path) -> None:
        self.rate: float | None = None
        self.paths, self.root = list(paths), root
        self.name = str(root) if len(self.paths) != 1 else str(self.paths[0])
        self.length: int | None = len(self.paths)

    def frames(self) -> Iterator[Frame]:
        for index, path in enumerate(self.paths):
            name = os.path.relpath(path, self.root)
            try:
                image = read_image(path)
            except DataError:
                if len(self.paths) == 1:
                    raise
                image = None
            yield Frame(index, None, image, name)

    def notes(self) -> list[str]:
        return []


class VideoFile:
    """The frames of a video file, decoded by OpenCV's FFmpeg; a rotation that the camera noted is applied.

    Times are those of the container, so that they are right where the frame rate varies.

    Args:
        path: File.
        root: Folder that its name is told relative to; None takes the file's.
    """

    moving = True

    def __init__(self, path: Path, root: Path | None = None) -> None:
        self.path, self.root = path, path.parent if root is None else root
        self.name = os.path.relpath(path, self.root)
        self._delivered, self._end = 0, 0.0
        self.length: int | None = None
        self.rate: float | None = None
        try:
            capture = self._open()
        except DataError:
            return  # who asks for its frames is told
        announced, rate = capture.get(cv2.CAP_PROP_FRAME_COUNT), capture.get(cv2.CAP_PROP_FPS)
        capture.release()
        self.length = int(announced) if 0 < announced < 1e9 else None
        self.rate = float(rate) if 0 < rate < 1e4 else None

    def _open(self) -> Any:  # noqa: ANN401
        if not self.path.is_file():
            raise DataError(f"{self.path}: no such file")
        with _without_chatter():
            capture = cv2.VideoCapture(str(self.path), cv2.CAP_FFMPEG)
        if not capture.isOpened():
            raise DataError(
                f"{self.path}: not a readable video ({self.path.stat().st_size} bytes); it may be cut short, or of a "
                "kind that OpenCV does not decode"
            )
        return capture

    def frames(self) -> Iterator[Frame]:
        capture = self._open()
        count, decoded, last = 0, False, 0.0
        try:
            for index, timestamp, image in _grabbed(capture, lambda: capture.get(cv2.CAP_PROP_POS_MSEC) / 1000):
                count, decoded = index + 1, decoded or image is not None
                if timestamp is not None:  # a frame is taken to last as long as the one before it
                    self._end, last = 2 * timestamp - last, timestamp
                yield Frame(index, timestamp, image, self.name)
        finally:
            capture.release()
        if not decoded:
            raise DataError(f"{self.path}: no frame of it can be decoded")
        self._delivered = count

    def notes(self) -> list[str]:
        missing = (self.length or 0) - self._delivered
        if missing <= 0 or not self._delivered:  # nothing is known of a video that was not read to its end
            return []
        guessed = self.path.suffix.lower() not in COUNTED_SUFFIXES
        if guessed and self.rate and self._end * self.rate >= (self.length or 0) - 1:
            return []  # it was read to its end: the rate varies, so the guess is wrong
        return [f"{self.name}: {missing} of {self.length} frames that the container announces could not be read"]


class Camera:
    """The frames of a camera until nobody wants more; their times are those of a clock.

    Args:
        index: Number of the camera.
    """

    moving = True

    def __init__(self, index: int) -> None:
        self.length: int | None = None
        self.index, self.name, self.root = index, f"camera{index}", Path.cwd()
        self.rate: float | None = None

    def frames(self) -> Iterator[Frame]:
        with _without_chatter():
            capture = cv2.VideoCapture(self.index)
        if not capture.isOpened():
            raise DataError(f"input={self.index}: no camera of this number can be opened")
        try:
            rate = capture.get(cv2.CAP_PROP_FPS)
            self.rate = float(rate) if 0 < rate < 1e4 else None
            start = time.monotonic()
            read = 0
            for index, timestamp, image in _grabbed(capture, lambda: time.monotonic() - start):
                read += image is not None
                yield Frame(index, timestamp, image, self.name)
        finally:
            capture.release()
        if not read:
            raise DataError(f"input={self.index}: the camera gives no frames")

    def notes(self) -> list[str]:
        return []


def _grabbed(
    capture: Any,  # noqa: ANN401
    clock: Callable[[], float],
) -> Iterator[tuple[int, float | None, np.ndarray | None]]:
    """Yield number, time and RGB image of each frame; a time that does not advance is None."""
    index, first, last = 0, 0.0, -np.inf
    while capture.grab():
        now = clock()
        first = now if index == 0 else first
        timestamp = now - first if now > last else None
        last = max(last, now)
        decoded, image = capture.retrieve()
        yield index, timestamp, cv2.cvtColor(image, cv2.COLOR_BGR2RGB) if decoded and image is not None else None
        index += 1


def open_input(given: str | int, leave_out: Sequence[Path] = ()) -> list[FrameSource]:
    """Return the sources that ``input`` names: photographs together, each video and camera by itself.

    Args:
        given: An image or a video, a folder (searched to any depth) or a pattern of such files, or a camera's number.
        leave_out: Folders whose files are not taken, as annotated copies of an earlier run are.

    Raises:
        DataError: If there is no such thing, or nothing in it can be read.
    """
    text = str(given)
    if text.isdecimal() and not Path(text).exists():
        return [Camera(int(text))]
    path = Path(text).expanduser()
    if path.is_file():
        if path.suffix.lower() in VIDEO_SUFFIXES:
            return [VideoFile(path)]
        return [ImageFiles([path], path.parent)]
    known = ", ".join((*IMAGE_SUFFIXES, *VIDEO_SUFFIXES))
    if path.is_dir():
        root, found = path, path.rglob("*")
    elif has_magic(text):
        # Names are relative to the folder before the first star. A folder that is there may have brackets in its name.
        root = Path()
        for part in path.parts:
            if not (root / part).is_dir():
                break
            root /= part
        found = root.glob(str(Path(*path.parts[len(root.parts) :])))
    else:
        raise DataError(f"input={given}: no such file or folder")
    files = sorted(file for file in found if file.is_file())
    for folder in leave_out:
        copies = folder.resolve()
        files = [file for file in files if not file.resolve().is_relative_to(copies)]
    images = [file for file in files if file.suffix.lower() in IMAGE_SUFFIXES]
    videos = [file for file in files if file.suffix.lower() in VIDEO_SUFFIXES]
    if not images and not videos:
        raise DataError(f"input={given}: no image or video in it ({known})")
    sources: list[FrameSource] = [ImageFiles(images, root)] if images else []
    return sources + [VideoFile(video, root) for video in videos]


def batches(frames: Iterable[Frame], size: int, megabytes: float = 256.0) -> Iterator[list[Frame]]:
    """Yield frames in lists of at most ``size``; a list ends early when its pixels reach ``megabytes``."""
    held: list[Frame] = []
    pixels = 0
    for frame in frames:
        held.append(frame)
        pixels += 0 if frame.image is None else frame.image.nbytes
        if len(held) >= size or pixels >= megabytes * 2**20:
            yield held
            held, pixels = [], 0
    if held:
        yield held


# -------------------------------------------------------------------------------------------------- writing

CODECS = (("VP80", ".webm"), ("mp4v", ".mp4"), ("MJPG", ".avi"))
"""Codec and ending in order of preference: browsers play the first; the others need a player."""


class VideoWriter:
    """A video of frames of one size, at a constant rate, that is there when it is complete.

    Use it in a ``with`` block: the file appears when the block ends well; without any frame there is none.

    Args:
        path: File to write; its ending must be that of the codec.
        rate: Frames per second.
        codec: Four letters, see ``CODECS``.
    """

    def __init__(self, path: Path, rate: float, codec: str) -> None:
        self.path, self.rate, self.codec = path, rate, codec
        self._writer: Any = None
        self._shape: tuple[int, int] | None = None
        self._stack = ExitStack()

    def __enter__(self) -> VideoWriter:
        return self

    def write(self, image: np.ndarray) -> None:
        """Add an RGB uint8 image ``(H, W, 3)``; an odd last row or column, which codecs do not take, is repeated.

        Raises:
            DataError: If the codec is not there, or the image is of another size than the first one.
        """
        image = cv2.copyMakeBorder(image, 0, image.shape[0] % 2, 0, image.shape[1] % 2, cv2.BORDER_REPLICATE)
        if self._writer is None:
            self._shape = (image.shape[0], image.shape[1])
            part = self._stack.enter_context(replacing(self.path))
            self._writer = open_writer(part, self.rate, self.codec, self._shape)
            if self._writer is None:
                raise DataError(f"{self.path}: OpenCV cannot write {self.codec} here")
            self._stack.callback(self._writer.release)
        if image.shape[:2] != self._shape:
            raise DataError(f"{self.path}: a frame of {image.shape[:2]} in a video of {self._shape}")
        self._writer.write(cv2.cvtColor(image, cv2.COLOR_RGB2BGR))

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> bool | None:
        return self._stack.__exit__(kind, error, trace)


def open_writer(path: Path, rate: float, codec: str, shape: tuple[int, int]) -> Any | None:  # noqa: ANN401
    """Return OpenCV's writer of a video of ``shape`` (height, width), or None if it has no such codec."""
    with _without_chatter():
        writer = cv2.VideoWriter(str(path), cv2.VideoWriter_fourcc(*codec), float(rate), (shape[1], shape[0]))
    return writer if writer.isOpened() else None


def writable_codec(folder: Path) -> tuple[str, str]:
    """Return the first of ``CODECS`` that OpenCV can write here, with its ending.

    Raises:
        DataError: If there is none.
    """
    folder.mkdir(parents=True, exist_ok=True)
    for codec, suffix in CODECS:
        trial = folder / f".trial-{os.getpid()}{suffix}"
        try:
            writer = open_writer(trial, 25.0, codec, (64, 64))
            if writer is not None:
                writer.release()
                return codec, suffix
        finally:
            trial.unlink(missing_ok=True)
    raise DataError(f"OpenCV has no codec to write a video with; tried {', '.join(codec for codec, _ in CODECS)}")


@contextmanager
def _without_chatter() -> Iterator[None]:
    """Keep what FFmpeg prints about tags and broken headers off the terminal while a file is opened."""
    try:
        kept = os.dup(2)
    except OSError:  # no standard error at all
        yield
        return
    quiet = os.open(os.devnull, os.O_WRONLY)
    try:
        os.dup2(quiet, 2)
        yield
    finally:
        os.dup2(kept, 2)
        os.close(quiet)
        os.close(kept)
