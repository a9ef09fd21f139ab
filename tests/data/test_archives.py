# SPDX-License-Identifier: Apache-2.0
from __future__ import annotations

import multiprocessing
import pickle
import zipfile

import cv2
import numpy as np
import pyarrow as pa
import pytest

from affect.data import archives
from affect.data.archives import ShardImages, VideoImages, ZipImages, split_member
from affect.data.images import ImageReader, PictureReader
from affect.data.layouts.common import write_image
from affect.data.table import FaceTable
from affect.errors import DataError

FRAMES = 12


def picture(k, height=40, width=56):
    """A smooth picture that is different for each k."""
    y, x = np.mgrid[:height, :width]
    return np.stack([(x * 3 + 17 * k) % 200, y * 4 % 256, np.full_like(x, 20 * k % 256)], -1).astype(np.uint8)


def encoded(image, suffix=".png"):
    return cv2.imencode(suffix, cv2.cvtColor(image, cv2.COLOR_RGB2BGR))[1].tobytes()


def table_of(names, root):
    return FaceTable.from_columns({"image": names}, root)


@pytest.fixture
def zipped(tmp_path):
    """Two archives, one packed and one stored, and a plain file beside them."""
    for name, method in (("F001", zipfile.ZIP_DEFLATED), ("F002", zipfile.ZIP_STORED)):
        with zipfile.ZipFile(tmp_path / f"{name}.zip", "w", method) as archive:
            archive.writestr(f"{name}/T1/", "")
            for k in (3, 1, 2):
                archive.writestr(f"{name}/T1/{k}.png", encoded(picture(k)))
    write_image(tmp_path / "plain.png", picture(9))
    return tmp_path


def write_video(path, codec="MJPG"):
    """Numbered frames: frame n is grey with level 20 n; returns what was written."""
    writer = cv2.VideoWriter(str(path), cv2.VideoWriter_fourcc(*codec), 20, (64, 48))
    assert writer.isOpened()
    for k in range(1, FRAMES + 1):
        writer.write(np.full((48, 64, 3), 20 * k, np.uint8))
    writer.release()


def write_shard(path, images):
    table = pa.table({"image": pa.array(images, pa.large_binary())})
    with pa.ipc.new_file(path, table.schema) as writer:
        writer.write_table(table)


def number_of(frame):
    return round(float(frame.mean()) / 20)


def test_names_are_split_at_the_first_separator():
    assert split_member("a.zip!b!c.jpg") == ("a.zip", "b!c.jpg")
    assert split_member("a/b.jpg") == ("a/b.jpg", None)


def test_members_of_packed_and_stored_archives_and_plain_files_are_read(zipped):
    names = ["F002.zip!F002/T1/2.png", "F001.zip!F001/T1/3.png", "plain.png", "F001.zip!F001/T1/1.png"]
    reader = ZipImages(table_of(names, zipped))
    for image, k in zip(reader.read(np.arange(4)), (2, 3, 9, 1), strict=True):
        np.testing.assert_array_equal(image, picture(k))
    assert isinstance(reader, ImageReader)
    assert isinstance(reader, PictureReader)


def test_a_large_photograph_in_an_archive_is_decoded_at_a_reduced_size(tmp_path):
    rng = np.random.default_rng(0)
    photograph = cv2.resize(rng.integers(0, 256, (60, 80, 3), np.uint8), (1600, 1200), interpolation=cv2.INTER_CUBIC)
    with zipfile.ZipFile(tmp_path / "a.zip", "w") as archive:
        archive.writestr("1.jpg", encoded(photograph, ".jpg"))
    (opened,) = ZipImages(table_of(["a.zip!1.jpg"], tmp_path)).open(np.array([0]))
    assert opened.size == (1600, 1200)
    assert opened.pixels(4).shape == (300, 400, 3)


def test_readers_travel_without_what_they_have_open(zipped, tmp_path):
    write_video(tmp_path / "v.avi")
    write_shard(tmp_path / "u.arrow", [encoded(picture(5))])
    for make, name in ((ZipImages, "F001.zip!F001/T1/2.png"), (VideoImages, "v.avi!4"), (ShardImages, "u.arrow!0")):
        reader = make(table_of([name], tmp_path))
        (before,) = reader.read(np.array([0]))
        assert reader._archives._held
        again = pickle.loads(pickle.dumps(reader))
        assert not again._archives._held
        np.testing.assert_array_equal(again.read(np.array([0]))[0], before)


def read_in_child(reader, queue):
    queue.put(number_of(reader.read(np.array([1]))[0]))


def test_a_forked_process_has_a_decoder_of_its_own(tmp_path):
    write_video(tmp_path / "v.avi")
    reader = VideoImages(table_of([f"v.avi!{n}" for n in (3, 7, 4)], tmp_path))
    assert number_of(reader.read(np.array([0]))[0]) == 3
    context = multiprocessing.get_context("fork")
    queue = context.Queue()
    child = context.Process(target=read_in_child, args=(reader, queue))
    child.start()
    assert queue.get(timeout=30) == 7
    child.join()
    assert number_of(reader.read(np.array([2]))[0]) == 4


def test_damaged_members_and_archives_say_so(zipped):
    def reading(name):
        return ZipImages(table_of([name], zipped)).read(np.array([0]))

    with pytest.raises(DataError, match=r"holds no F001/T1/8.png \(3 files\)"):
        reading("F001.zip!F001/T1/8.png")
    with pytest.raises(DataError, match="no such archive"):
        reading("F003.zip!F003/T1/1.png")
    raw = (zipped / "F001.zip").read_bytes()
    (zipped / "F001.zip").write_bytes(raw[: len(raw) // 2])
    with pytest.raises(DataError, match="not a readable ZIP file"):
        reading("F001.zip!F001/T1/1.png")
    stored = bytearray((zipped / "F002.zip").read_bytes())
    at = stored.index(b"IDAT") + 20
    stored[at] ^= 0xFF
    (zipped / "F002.zip").write_bytes(stored)
    with pytest.raises(DataError, match="is damaged"):
        reading("F002.zip!F002/T1/3.png")


@pytest.mark.parametrize(("codec", "suffix"), [("MJPG", ".avi"), ("mp4v", ".mp4")])
def test_every_frame_is_the_one_with_its_number(tmp_path, codec, suffix):
    write_video(tmp_path / f"v{suffix}", codec)
    order = [5, 2, 12, 1, 5, 7]
    reader = VideoImages(table_of([f"v{suffix}!{n}" for n in order], tmp_path))
    assert [number_of(image) for image in reader.read(np.arange(6))] == order
    assert [number_of(reader.read(np.array([k]))[0]) for k in range(6)] == order


def test_colours_of_a_video_are_rgb(tmp_path):
    writer = cv2.VideoWriter(str(tmp_path / "v.avi"), cv2.VideoWriter_fourcc(*"MJPG"), 20, (64, 48))
    writer.write(np.full((48, 64, 3), (200, 30, 10), np.uint8))  # blue
    writer.release()
    (image,) = VideoImages(table_of(["v.avi!1"], tmp_path)).read(np.array([0]))
    np.testing.assert_allclose(image.mean((0, 1)), (10, 30, 200), atol=6)


def test_frames_one_by_one_decode_a_video_once_and_none_ahead(tmp_path, monkeypatch):
    write_video(tmp_path / "v.avi")
    grabbed = []

    class Counting:
        def __init__(self, *arguments):
            self.inner = capture(*arguments)

        def grab(self):
            grabbed.append(1)
            return self.inner.grab()

        def __getattr__(self, name):
            return getattr(self.inner, name)

    capture = cv2.VideoCapture
    monkeypatch.setattr(archives.cv2, "VideoCapture", Counting)
    reader = VideoImages(table_of([f"v.avi!{n}" for n in (2, 3, 3, 8, 12)], tmp_path))
    stream = (reader.read(np.array([row]))[0] for row in range(5))
    assert number_of(next(stream)) == 2
    assert len(grabbed) == 2  # nothing is decoded ahead
    assert [number_of(image) for image in stream] == [3, 3, 8, 12]
    assert len(grabbed) == 12


def test_frames_that_do_not_exist_say_so(tmp_path):
    write_video(tmp_path / "v.avi")
    (tmp_path / "text.avi").write_text("nothing")
    for name, said in (
        ("v.avi!13", "no frame 13, the video ends after 12"),
        ("v.avi!0", "frames are counted from 1"),
        ("v.avi!last", "expected the number of a frame"),
        ("w.avi!1", "no such video"),
        ("text.avi!1", "not a readable video"),
    ):
        with pytest.raises(DataError, match=said):
            VideoImages(table_of([name], tmp_path)).read(np.array([0]))


def test_shards_give_their_rows(tmp_path):
    images = [encoded(picture(k)) for k in range(4)]
    write_shard(tmp_path / "u00000.arrow", images)
    reader = ShardImages(table_of(["u00000.arrow!3", "u00000.arrow!0"], tmp_path))
    for image, k in zip(reader.read(np.arange(2)), (3, 0), strict=True):
        np.testing.assert_array_equal(image, picture(k))
    with pytest.raises(DataError, match=r"has no row 4 \(4 rows\)"):
        ShardImages(table_of(["u00000.arrow!4"], tmp_path)).read(np.array([0]))
    (tmp_path / "text.arrow").write_text("nothing")
    with pytest.raises(DataError, match="not a shard"):
        ShardImages(table_of(["text.arrow!0"], tmp_path)).read(np.array([0]))
    with pytest.raises(DataError, match="no such shard"):
        ShardImages(table_of(["none.arrow!0"], tmp_path)).read(np.array([0]))


def test_few_archives_stay_open(tmp_path, monkeypatch):
    monkeypatch.setattr(archives, "MOST_OPEN", 2)
    for k in range(5):
        write_shard(tmp_path / f"u{k}.arrow", [encoded(picture(k))])
    reader = ShardImages(table_of([f"u{k}.arrow!0" for k in (0, 1, 2, 3, 4, 0)], tmp_path))
    for image, k in zip(reader.read(np.arange(6)), (0, 1, 2, 3, 4, 0), strict=True):
        np.testing.assert_array_equal(image, picture(k))
    assert len(reader._archives._held) == 2
