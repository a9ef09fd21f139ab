# SPDX-License-Identifier: Apache-2.0
"""What files say of themselves: size, format, pixels, camera rotation, and every way to be no image."""

from __future__ import annotations

import io
from pathlib import Path

import cv2
import numpy as np
import pytest
from PIL import Image

from affect.data.headers import (
    CMYK,
    COLOUR,
    DEEP,
    EMPTY,
    GREY,
    MISSING,
    PALETTE,
    UNREADABLE,
    decode_headers,
    in_blocks,
    is_lying,
    read_header,
    read_headers,
)
from affect.data.images import FileImages
from affect.data.table import FaceTable

RANDOM = np.random.default_rng(0)
PHOTO = cv2.resize(RANDOM.integers(0, 255, (6, 8, 3), dtype=np.uint8), (40, 30), interpolation=cv2.INTER_CUBIC)


def encoded(ending: str, **options: object) -> bytes:
    stream = io.BytesIO()
    Image.fromarray(PHOTO).save(stream, ending, **options)
    return stream.getvalue()


def put(folder: Path, name: str, data: bytes) -> Path:
    (folder / name).write_bytes(data)
    return folder / name


@pytest.mark.parametrize("kind", ["JPEG", "PNG", "BMP", "TIFF", "WEBP", "PPM"])
def test_size_and_format_of_every_usual_file(tmp_path: Path, kind: str) -> None:
    header = read_header(put(tmp_path, f"a.{kind.lower()}", encoded(kind)))
    assert header[:4] == (40, 30, kind, COLOUR)
    assert (header.turned, header.problem) == (False, "")


def test_a_progressive_jpeg_with_a_long_profile_has_its_frame_behind_the_first_bytes(tmp_path: Path) -> None:
    data = encoded("JPEG", progressive=True, icc_profile=bytes(30000))
    assert read_header(put(tmp_path, "a.jpg", data))[:4] == (40, 30, "JPEG", COLOUR)
    data = encoded("JPEG", progressive=True, icc_profile=bytes(200_000))
    assert read_header(put(tmp_path, "b.jpg", data))[:4] == (40, 30, "JPEG", COLOUR)


@pytest.mark.parametrize(
    ("mode", "kind", "pixels"),
    [
        ("L", "JPEG", GREY),
        ("CMYK", "JPEG", CMYK),
        ("L", "PNG", GREY),
        ("LA", "PNG", GREY),
        ("P", "PNG", PALETTE),
        ("I;16", "PNG", DEEP),
        ("RGBA", "PNG", COLOUR),
        ("CMYK", "TIFF", CMYK),
        ("L", "PPM", GREY),
    ],
)
def test_how_pixels_are_stored(tmp_path: Path, mode: str, kind: str, pixels: str) -> None:
    grey = Image.fromarray(PHOTO).convert("L")
    image = Image.fromarray(np.asarray(grey).astype(np.uint16) * 257) if mode == "I;16" else None
    image = image or Image.fromarray(PHOTO).convert(mode)
    stream = io.BytesIO()
    image.save(stream, kind)
    header = read_header(put(tmp_path, f"a.{kind.lower()}", stream.getvalue()))
    assert header[:4] == (40, 30, kind, pixels)


def test_sixteen_bits_in_colour(tmp_path: Path) -> None:
    cv2.imwrite(str(tmp_path / "a.png"), PHOTO.astype(np.uint16) * 257)
    assert read_header(tmp_path / "a.png").pixels == DEEP


@pytest.mark.parametrize("orientation", range(1, 9))
def test_a_rotation_of_the_camera_gives_the_size_as_read(tmp_path: Path, orientation: int) -> None:
    exif = Image.Exif()
    exif[0x0112] = orientation
    path = put(tmp_path, "a.jpg", encoded("JPEG", exif=exif))
    header = read_header(path)
    table = FaceTable.from_columns({"image": ["a.jpg"]}, tmp_path)
    [image] = FileImages(table).read(np.array([0]))
    assert (header.height, header.width) == image.shape[:2]
    assert header.turned == (orientation != 1)


def test_every_way_to_be_no_image(tmp_path: Path) -> None:
    jpeg, png = encoded("JPEG"), encoded("PNG")
    wanted = {
        "missing.jpg": MISSING,
        "folder/inside.jpg": MISSING,
        "whole.jpg": "",
        "empty.jpg": EMPTY,
        "text.jpg": UNREADABLE,
        "one_byte.jpg": UNREADABLE,
        "magic.jpg": UNREADABLE,
        "cut.jpg": UNREADABLE,
        "cut.png": UNREADABLE,
        "longer.jpg": "",  # what stands behind the end does no harm
        "longer.png": "",
    }
    data = {
        "whole.jpg": jpeg,
        "empty.jpg": b"",
        "text.jpg": b"not an image at all, however long it may be",
        "one_byte.jpg": b"\xff",
        "magic.jpg": jpeg[:4],
        "cut.jpg": jpeg[: len(jpeg) * 2 // 3],
        "cut.png": png[: len(png) * 2 // 3],
        "longer.jpg": jpeg + b"trailing bytes",
        "longer.png": png + b"trailing bytes",
    }
    for name, content in data.items():
        put(tmp_path, name, content)
    assert {name: read_header(tmp_path / name).problem for name in wanted} == wanted


def test_names_that_lie(tmp_path: Path) -> None:
    assert is_lying(Path("a.png"), "JPEG")
    assert is_lying(Path("a.JPG"), "PNG")
    assert not is_lying(Path("a.JPEG"), "JPEG")
    assert not is_lying(Path("a.pgm"), "PPM")
    assert not is_lying(Path("a"), "JPEG")
    assert not is_lying(Path("a.dat"), "JPEG")
    header = read_header(put(tmp_path, "a.png", encoded("JPEG")))
    assert (header.kind, header.problem) == ("JPEG", "")


@pytest.mark.parametrize("workers", [1, 4])
def test_rows_keep_their_places_in_many_threads(tmp_path: Path, workers: int) -> None:
    names = []
    for k in range(700):
        image = np.zeros((1, k + 1, 3), np.uint8)
        names.append(f"{k}.png")
        cv2.imwrite(str(tmp_path / names[-1]), image)
    (tmp_path / "300.png").unlink()
    table = FaceTable.from_columns({"image": names}, tmp_path)
    told: list[int] = []
    rows = np.arange(10, 700)
    headers = read_headers(FileImages(table), rows, workers, told.append)
    assert headers.sizes[:, 0].tolist() == [k + 1 if k != 300 else 0 for k in rows]
    assert headers.rows[headers.problems == MISSING].tolist() == [300]
    assert sum(told) == len(rows)
    decoded = decode_headers(FileImages(table), rows, workers)
    assert decoded.sizes.tolist() == headers.sizes.tolist()
    assert decoded.rows[decoded.problems == UNREADABLE].tolist() == [300]


def test_blocks_come_in_order_and_errors_go_through() -> None:
    doubled = [value for block in in_blocks(lambda rows: (rows * 2).tolist(), np.arange(1000), 3) for value in block]
    assert doubled == list(range(0, 2000, 2))

    def fail(rows: np.ndarray) -> list:
        raise ValueError("no")

    with pytest.raises(ValueError, match="no"):
        list(in_blocks(fail, np.arange(1000), 3))
