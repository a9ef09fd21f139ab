# SPDX-License-Identifier: Apache-2.0
"""Decoding: every kind of file becomes upright RGB uint8, at full or reduced size, or an error that names it."""

from __future__ import annotations

import io

import cv2
import numpy as np
import pytest
from PIL import Image

from affect.data import images
from affect.data.images import DecodedPicture, FileImages, Source, open_picture, open_pictures, read_image
from affect.errors import DataError
from tests.data import samples


@pytest.fixture(scope="module")
def photo():
    return samples.smooth_image(1, 60, 90)


def save(path, image, **options):
    Image.fromarray(image).save(path, **options)
    return path


@pytest.mark.parametrize(
    ("name", "mode", "tolerance"),
    [
        ("a.png", "RGB", 0),
        ("a.bmp", "RGB", 0),
        ("a.jpg", "RGB", 6),
        ("a.webp", "RGB", 14),
        ("a.tif", "RGB", 0),
        ("rgba.png", "RGBA", 0),
        ("cmyk.jpg", "CMYK", 8),
    ],
)
def test_files_become_rgb(tmp_path, photo, name, mode, tolerance):
    Image.fromarray(photo).convert(mode).save(tmp_path / name, quality=95)
    image = read_image(tmp_path / name)
    assert (image.shape, image.dtype) == (photo.shape, np.uint8)
    assert np.abs(image.astype(int) - photo).mean() <= tolerance / 2
    assert np.abs(image.astype(int) - photo[..., ::-1]).mean() > 10, "red and blue are not exchanged"


def test_grey_palette_and_16_bit(tmp_path, photo):
    grey = photo[..., 0]
    save(tmp_path / "grey.png", grey)
    np.testing.assert_array_equal(read_image(tmp_path / "grey.png"), np.repeat(grey[..., None], 3, -1))
    assert cv2.imwrite(str(tmp_path / "deep.png"), photo[..., ::-1].astype(np.uint16) * 257)
    np.testing.assert_array_equal(read_image(tmp_path / "deep.png"), photo)
    Image.fromarray(photo).quantize(16).save(tmp_path / "palette.png")
    assert read_image(tmp_path / "palette.png").shape == photo.shape


@pytest.mark.parametrize("orientation", range(1, 9))
def test_camera_rotation_is_applied(tmp_path, photo, orientation):
    exif = Image.Exif()
    exif[0x0112] = orientation
    save(tmp_path / "turned.jpg", photo, quality=95, exif=exif)
    from PIL import ImageOps

    with Image.open(tmp_path / "turned.jpg") as opened:
        expected = np.asarray(ImageOps.exif_transpose(opened).convert("RGB"))
    assert np.abs(read_image(tmp_path / "turned.jpg").astype(int) - expected).max() <= 3


def test_unreadable_files_are_named(tmp_path, photo):
    with pytest.raises(DataError, match=r"gone\.png: no such image"):
        read_image(tmp_path / "gone.png")
    for name, data in (("empty.png", b""), ("text.jpg", b"hello")):
        (tmp_path / name).write_bytes(data)
        with pytest.raises(DataError, match=rf"{name}: not a readable image"):
            read_image(tmp_path / name)
    buffer = io.BytesIO()
    Image.fromarray(photo).save(buffer, "JPEG", quality=95)
    (tmp_path / "cut.jpg").write_bytes(buffer.getvalue()[: len(buffer.getvalue()) // 2])
    with pytest.raises(DataError, match=r"cut\.jpg: not a readable image"):
        read_image(tmp_path / "cut.jpg")


@pytest.mark.parametrize("reduce", [2, 4, 8])
@pytest.mark.parametrize("size", [(640, 512), (413, 299)])
def test_a_reduced_decode_is_the_mean_of_squares(tmp_path, reduce, size, monkeypatch):
    monkeypatch.setattr(images, "_LARGE_FILE", 1)
    photo = samples.smooth_image(2, *size)
    save(tmp_path / "large.jpg", photo, quality=95)
    picture = open_picture(tmp_path / "large.jpg")
    assert type(picture).__name__ == "_EncodedPicture"
    assert picture.size == (size[1], size[0])
    full = DecodedPicture(read_image(tmp_path / "large.jpg"))
    small, expected = picture.pixels(reduce), full.pixels(reduce)
    assert small.shape == expected.shape == (-(-size[0] // reduce), -(-size[1] // reduce), 3)
    inner = np.s_[:-1, :-1]
    assert np.abs(small[inner].astype(int) - expected[inner]).max() <= 3
    blocks = photo[: size[0] // reduce * reduce, : size[1] // reduce * reduce].astype(float)
    blocks = blocks.reshape(size[0] // reduce, reduce, size[1] // reduce, reduce, 3).mean((1, 3))
    assert np.abs(small[: blocks.shape[0], : blocks.shape[1]] - blocks).mean() < 2


def test_a_turned_photograph_is_not_reduced_by_the_decoder(tmp_path, monkeypatch):
    """Rotation after a reduced decode would count squares from the other edge."""
    monkeypatch.setattr(images, "_LARGE_FILE", 1)
    exif = Image.Exif()
    exif[0x0112] = 6
    save(tmp_path / "turned.jpg", samples.smooth_image(3, 99, 131), quality=95, exif=exif)
    picture = open_picture(tmp_path / "turned.jpg")
    assert isinstance(picture, DecodedPicture)
    assert picture.size == (99, 131)


def test_small_files_are_decoded_at_once(tmp_path, photo):
    save(tmp_path / "small.jpg", photo)
    assert isinstance(open_picture(tmp_path / "small.jpg"), DecodedPicture)


def test_any_reader_gives_pictures():
    reader = samples.DrawnImages()
    pictures = open_pictures(reader, np.array([3, 1]))
    assert [picture.size for picture in pictures] == [(48, 48)] * 2
    np.testing.assert_array_equal(pictures[1].pixels(), samples.smooth_image(1))


def test_file_images_read_in_order_and_list_what_is_missing(tmp_path):
    faces = samples.table(6, tmp_path)
    names = faces.strings("image")[0]
    for k in (0, 1, 4):
        samples.write_image(tmp_path / names[k], samples.smooth_image(k))
    reader = FileImages(faces)
    assert reader.missing().tolist() == [2, 3, 5]
    assert reader.missing(np.array([4, 5])).tolist() == [5]
    read = reader.read(np.array([4, 0]))
    np.testing.assert_array_equal(read[0], samples.smooth_image(4))
    np.testing.assert_array_equal(read[1], samples.smooth_image(0))
    with pytest.raises(DataError, match="3 of 6 image files are missing"):
        reader.require_files()
    assert FileImages(faces, tmp_path / "elsewhere").missing().tolist() == list(range(6))


def test_empty_files_are_named(tmp_path):
    faces = samples.table(3, tmp_path)
    names = faces.strings("image")[0]
    for k in range(3):
        samples.write_image(tmp_path / names[k], samples.smooth_image(k))
    FileImages(faces).require_files()
    (tmp_path / names[1]).write_bytes(b"")
    with pytest.raises(DataError, match=rf"1 image files have 0 bytes: .*{names[1]}"):
        FileImages(faces).require_files()
    FileImages(faces).require_files(np.array([0, 2]))


def test_files_that_are_no_images_are_named_before_any_is_decoded(tmp_path):
    faces = samples.table(2, tmp_path)
    names = faces.strings("image")[0]
    for k in range(2):
        samples.write_image(tmp_path / names[k], samples.smooth_image(k))
    (tmp_path / names[1]).write_text("<html>not found</html>")
    with pytest.raises(DataError, match=rf"1 image files are no images: .*{names[1]}"):
        FileImages(faces).require_files()


def test_a_source_without_subjects_is_split_by_image():
    faces = samples.table(4)
    plain = Source("s", faces, samples.DrawnImages())
    assert (plain.group, plain.notes) == ("subject", ())
    anonymous = faces.arrow.drop_columns(["subject"])
    from affect.data.table import FaceTable

    source = Source("s", FaceTable.from_arrow(anonymous), samples.DrawnImages(), notes=("first",))
    assert source.group == "image"
    assert source.notes[0] == "first"
    assert "split by image" in source.notes[1]
    with pytest.raises(DataError, match="s: no column sequence to split by"):
        Source("s", faces, samples.DrawnImages(), group="sequence")


def test_a_source_names_existing_columns_to_hold_out_by_and_describes_the_way_from_photographs():
    from affect.geometry import CropRecipe

    faces = samples.table(4).with_columns({"copies": ["a", "a", "b", "c"]})
    source = Source("s", faces, samples.DrawnImages(), together="copies", stratify="expression")
    assert (source.together, source.stratify, source.described) == ("copies", "expression", None)
    for key in ("together", "stratify"):
        with pytest.raises(DataError, match=f"s: {key}=copise is no column; did you mean copies"):
            Source("s", faces, samples.DrawnImages(), **{key: "copise"})
    stored = CropRecipe(name="stored", kind="none", size=32, margin=0.0)
    whole = CropRecipe(name="whole", kind="similarity", size=32)
    assert Source("s", faces, samples.DrawnImages(), recipe=stored).described is stored
    assert Source("s", faces, samples.DrawnImages(), recipe=stored, prepared=whole).described is whole
