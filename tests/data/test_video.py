# SPDX-License-Identifier: Apache-2.0
"""Frames of photographs, videos and cameras come in order, with the container's times; nothing is skipped silently."""

from __future__ import annotations

import struct
from pathlib import Path

import cv2
import numpy as np
import pytest

from affect.data import video
from affect.data.video import Camera, Frame, ImageFiles, VideoFile, VideoWriter, batches, open_input, writable_codec
from affect.errors import DataError

SIZE = (48, 64)


def picture(k: int, size: tuple[int, int] = SIZE) -> np.ndarray:
    """A picture whose red says which one it is."""
    image = np.full((*size, 3), 40, np.uint8)
    image[..., 0] = 8 * k
    return image


def write(path: Path, count: int, codec: str = "mp4v", rate: float = 25.0) -> Path:
    writer = cv2.VideoWriter(str(path), cv2.VideoWriter_fourcc(*codec), rate, (SIZE[1], SIZE[0]))
    for k in range(count):
        writer.write(picture(k)[..., ::-1].copy())
    writer.release()
    return path


def halve_durations(path: Path, first: int) -> None:
    """Let the frames of an MP4 file from number ``first`` on last half as long: a variable frame rate."""
    data = bytearray(path.read_bytes())

    def boxes(start: int, end: int):
        while start < end:
            size, name = struct.unpack(">I4s", data[start : start + 8])
            yield start, size, name.decode("latin1")
            start += size

    chain, start, end = [], 0, len(data)
    for wanted in ("moov", "trak", "mdia", "minf", "stbl", "stts"):
        found, size = next((s, n) for s, n, name in boxes(start, end) if name == wanted)
        chain.append(found)
        start, end = found + 8, found + size
    at = chain[-1]
    entries, count, duration = struct.unpack(">III", data[at + 12 : at + 24])
    assert entries == 1
    data[at + 12 : at + 24] = struct.pack(">IIIII", 2, first, duration, count - first, duration // 2)
    for box in chain:
        data[box : box + 4] = struct.pack(">I", struct.unpack(">I", data[box : box + 4])[0] + 8)
    path.write_bytes(data)


def test_frames_come_in_order_as_rgb_with_their_times(tmp_path: Path) -> None:
    source = VideoFile(write(tmp_path / "a.mp4", 20))
    frames = list(source.frames())
    assert (source.length, source.rate, source.moving, source.name) == (20, 25.0, True, "a.mp4")
    assert [frame.index for frame in frames] == list(range(20))
    assert [frame.timestamp for frame in frames] == pytest.approx([k / 25 for k in range(20)])
    red = [float(frame.image[..., 0].mean()) for frame in frames if frame.image is not None]
    assert red == pytest.approx([8 * k for k in range(20)], abs=6)
    assert source.notes() == []
    assert [frame.index for frame in source.frames()] == list(range(20)), "a source can be read again"


def test_times_are_the_containers_where_the_frame_rate_varies(tmp_path: Path) -> None:
    path = write(tmp_path / "a.mp4", 12)
    halve_durations(path, first=6)
    times = [frame.timestamp for frame in VideoFile(path).frames()]
    # Six frames of 40 ms, then frames of 20 ms: the mean rate would give other times.
    assert times == pytest.approx([*(0.04 * np.arange(7)), *(0.24 + 0.02 * np.arange(1, 6))], abs=1e-3)


def test_a_rotation_that_the_camera_noted_is_applied(tmp_path: Path) -> None:
    path = tmp_path / "phone.mp4"
    writer = cv2.VideoWriter(str(path), cv2.VideoWriter_fourcc(*"mp4v"), 25.0, (SIZE[1], SIZE[0]))
    for _ in range(3):
        writer.write(np.repeat([[[200]], [[20]]], SIZE[0] // 2, 0).repeat(SIZE[1], 1).repeat(3, 2).astype(np.uint8))
    writer.release()
    data = bytearray(path.read_bytes())
    matrix = data.index(b"tkhd") + 4 + 40
    turn = (0, 1 << 16, 0, -1 << 16, 0, 0, SIZE[0] << 16, 0, 1 << 30)  # a quarter clockwise
    data[matrix : matrix + 36] = struct.pack(">9i", *turn)
    path.write_bytes(data)
    for frame in VideoFile(path).frames():
        assert frame.image is not None
        assert frame.image.shape == (SIZE[1], SIZE[0], 3)
        left, right = np.split(frame.image.mean((0, 2)), 2)
        assert (left.mean() < 60, right.mean() > 160) == (True, True), "what was above is at the right"


def test_frames_that_the_container_announces_and_does_not_have_are_told(tmp_path: Path) -> None:
    path = write(tmp_path / "a.mp4", 30)
    data = path.read_bytes()
    start = data.index(b"mdat") + 4
    end = data.index(b"moov") - 4
    middle = (start + end) // 2
    path.write_bytes(data[:middle] + bytes(end - middle) + data[end:])  # the second half of the pixels is lost
    source = VideoFile(path)
    read = [frame for frame in source.frames() if frame.image is not None]
    assert 5 < len(read) < 30
    [note] = source.notes()
    assert f"{30 - len(read)} of 30 frames" in note
    stopped = VideoFile(path)
    next(stopped.frames())
    assert stopped.notes() == [], "nothing is known of a video that was not read to its end"


def slow_down(path: Path, first: int, milliseconds: int) -> None:
    """Let the frames of a WebM file of 25 a second from number ``first`` on last so long: a variable frame rate."""
    data, k, end = bytearray(path.read_bytes()), 0, 0
    at = data.index(b"\x1f\x43\xb6\x75")  # the cluster
    while (at := data.find(b"\xa3", at + 1)) >= 0:  # a simple block: its size, its track, its time in the cluster
        wide = 9 - data[at + 1].bit_length()
        size = int.from_bytes(data[at + 1 : at + 1 + wide], "big") & (1 << 7 * wide) - 1
        track = at + 1 + wide
        if data[track] != 0x81 or track + size > len(data):
            continue
        (time,) = struct.unpack(">h", data[track + 1 : track + 3])
        start = time + max(k - first, 0) * (milliseconds - 40)
        data[track + 1 : track + 3] = struct.pack(">h", start)
        at, k, end = track + size - 1, k + 1, start + milliseconds
    duration = data.index(b"\x44\x89\x88") + 3
    data[duration : duration + 8] = struct.pack(">d", end)
    path.write_bytes(data)


def test_a_guess_of_the_number_of_frames_is_no_announcement(tmp_path: Path, capfd: pytest.CaptureFixture) -> None:
    path = write(tmp_path / "a.webm", 20, "VP80")
    slow_down(path, first=10, milliseconds=120)
    source = VideoFile(path)
    times = [frame.timestamp for frame in source.frames()]
    assert times == pytest.approx([*(0.04 * np.arange(11)), *(0.4 + 0.12 * np.arange(1, 10))], abs=2e-3)
    assert source.length == 40, "the duration times the rate"
    assert source.notes() == [], "all of its frames were read"
    cut = tmp_path / "cut.webm"
    cut.write_bytes(path.read_bytes()[: len(path.read_bytes()) * 3 // 4])
    source = VideoFile(cut)
    assert 5 < len(list(source.frames())) < 20
    [note] = source.notes()
    assert "could not be read" in note


def test_a_frame_that_cannot_be_decoded_is_a_frame_without_pixels(monkeypatch: pytest.MonkeyPatch) -> None:
    class Capture:
        def __init__(self, *_: object) -> None:
            self.k = -1

        def isOpened(self) -> bool:  # noqa: N802
            return True

        def get(self, key: int) -> float:
            return 30.0 if key == cv2.CAP_PROP_FPS else 0.0

        def grab(self) -> bool:
            self.k += 1
            return self.k < 4

        def retrieve(self) -> tuple[bool, np.ndarray | None]:
            return (False, None) if self.k == 2 else (True, picture(self.k)[..., ::-1].copy())

        def release(self) -> None: ...

    monkeypatch.setattr(video.cv2, "VideoCapture", Capture)
    frames = list(Camera(0).frames())
    assert [frame.image is None for frame in frames] == [False, False, True, False]
    times = [frame.timestamp for frame in frames]
    assert times[0] == 0
    assert times == sorted(times)
    np.testing.assert_array_equal(frames[3].image, picture(3))


def test_a_container_without_times_gives_none() -> None:
    class Capture:
        k = 0

        def grab(self) -> bool:
            self.k += 1
            return self.k <= 3

        def retrieve(self) -> tuple[bool, np.ndarray]:
            return True, picture(0)

    assert [time for _, time, _ in video._grabbed(Capture(), lambda: 0.0)] == [0.0, None, None]


@pytest.mark.parametrize("content", [b"", b"no video at all"])
def test_a_file_that_is_no_video_is_an_error_of_one_line(tmp_path: Path, content: bytes, capfd) -> None:
    path = tmp_path / "a.mp4"
    path.write_bytes(content)
    with pytest.raises(DataError, match=r"a\.mp4: not a readable video") as error:
        list(VideoFile(path).frames())
    assert "\n" not in str(error.value)
    assert capfd.readouterr().err == ""
    with pytest.raises(DataError, match="no such file"):
        list(VideoFile(tmp_path / "b.mp4").frames())


# -------------------------------------------------------------------------------------------------------- input


@pytest.fixture
def mixed(tmp_path: Path) -> Path:
    folder = tmp_path / "mixed"
    (folder / "more").mkdir(parents=True)
    for name in ("b.png", "more/a.jpg", "more/[1].png"):
        cv2.imwrite(str(folder / name), picture(3))
    write(folder / "film.avi", 3, "MJPG")
    (folder / "notes.txt").write_text("no picture")
    return folder


def names(sources: list) -> list[list[str]]:
    return [[str(p.relative_to(s.root)) for p in s.paths] if isinstance(s, ImageFiles) else [s.name] for s in sources]


def test_input_is_a_file_a_folder_or_a_pattern(mixed: Path) -> None:
    assert names(open_input(mixed)) == [["b.png", "more/[1].png", "more/a.jpg"], ["film.avi"]]
    assert names(open_input(mixed / "b.png")) == [["b.png"]]
    assert names(open_input(str(mixed / "more" / "[1].png"))) == [["[1].png"]], "a file comes before a pattern"
    assert names(open_input(mixed / "film.avi")) == [["film.avi"]]
    assert names(open_input(f"{mixed}/*")) == [["b.png"], ["film.avi"]]
    assert names(open_input(f"{mixed}/**/*.jpg")) == [["more/a.jpg"]]
    brackets = mixed / "a [1] é"
    brackets.mkdir()
    (brackets / "x.png").write_bytes((mixed / "b.png").read_bytes())
    assert names(open_input(f"{brackets}/*.png")) == [["x.png"]], "so does a folder"
    assert names(open_input(f"{mixed}/m?re/*.jpg")) == [["more/a.jpg"]]
    [camera] = open_input("0")
    assert isinstance(camera, Camera)
    for given in (mixed / "nothing", f"{mixed}/*.gif", f"{brackets}/nothing.png", f"{mixed}/no[1]/*.png"):
        with pytest.raises(DataError, match="input="):
            open_input(given)


def test_an_unreadable_photograph_is_counted_among_others_and_an_error_alone(mixed: Path) -> None:
    (mixed / "c.png").write_bytes(b"broken")
    images = [frame.image is None for frame in open_input(mixed)[0].frames()]
    assert images == [False, True, False, False]
    with pytest.raises(DataError, match=r"c\.png"):
        list(open_input(mixed / "c.png")[0].frames())


def test_batches_are_bounded_by_number_and_by_pixels() -> None:
    frames = [Frame(k, None, None if k == 1 else np.zeros((512, 512, 4), np.uint8), "") for k in range(7)]  # 1 MiB each
    assert [[f.index for f in b] for b in batches(frames, 3)] == [[0, 1, 2], [3, 4, 5], [6]]
    assert [[f.index for f in b] for b in batches(frames, 9, megabytes=2)] == [[0, 1, 2], [3, 4], [5, 6]]


# ------------------------------------------------------------------------------------------------------ writing


@pytest.mark.parametrize("size", [(48, 64), (47, 63)])
def test_what_is_written_can_be_read(tmp_path: Path, size: tuple[int, int], capfd) -> None:
    codec, suffix = writable_codec(tmp_path)
    assert list(tmp_path.iterdir()) == [], "trials are removed"
    path = tmp_path / "new" / f"a{suffix}"
    with VideoWriter(path, 10.0, codec) as writer:
        for k in range(10):
            writer.write(picture(k, size))
        assert not path.exists()
    frames = list(VideoFile(path).frames())
    assert [frame.timestamp for frame in frames] == pytest.approx([k / 10 for k in range(10)], abs=2e-3)
    assert frames[0].image is not None
    assert frames[0].image.shape == (48, 64, 3)
    assert capfd.readouterr().err == ""


def test_an_interrupted_video_leaves_nothing(tmp_path: Path) -> None:
    codec, suffix = writable_codec(tmp_path)

    def two_sizes() -> None:
        with VideoWriter(tmp_path / f"a{suffix}", 10.0, codec) as writer:
            writer.write(picture(0))
            writer.write(picture(0, (20, 20)))

    with pytest.raises(DataError, match="a frame of"):
        two_sizes()
    with VideoWriter(tmp_path / f"b{suffix}", 10.0, codec):
        pass
    assert list(tmp_path.iterdir()) == []
