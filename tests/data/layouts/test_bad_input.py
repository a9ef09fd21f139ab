# SPDX-License-Identifier: Apache-2.0
"""Damaged trees, over all layouts: one clear line, or rows that are counted; never a wrong table in silence."""

from __future__ import annotations

import re
from pathlib import Path

import cv2
import numpy as np
import pytest
from PIL import Image

from affect.data.table import FaceTable
from affect.errors import DataError
from tests.data.layouts.trees import Case, cases, copied, label_files, told, whole

CASES = cases()
ONE_PER_MODULE = list({case.module.__name__: case for case in reversed(CASES)}.values())
each_module = pytest.mark.parametrize("case", ONE_PER_MODULE, ids=[case.name for case in ONE_PER_MODULE], indirect=True)
NUMBER = re.compile(r"-?\d+(\.\d+)?$")


@pytest.fixture(scope="module")
def folder(tmp_path_factory) -> Path:
    return tmp_path_factory.mktemp("trees")


@pytest.fixture(params=CASES, ids=[case.name for case in CASES])
def case(request) -> Case:
    return request.param


@pytest.fixture
def intact(case, folder) -> Path:
    return whole(case.name, folder)


@pytest.fixture
def before(case, intact) -> FaceTable:
    return case.read(intact)


@pytest.fixture
def root(intact, tmp_path) -> Path:
    """A copy that may be damaged."""
    return copied(intact, tmp_path / "above" / "tree")


def middle(lines: list[str]) -> int:
    """Return the line that is damaged: neither the first nor the last."""
    filled = [k for k, line in enumerate(lines) if line.strip()]
    return filled[max(len(filled) // 2 - 1, 0)]


ANYTHING_GOES = {
    ("celeba", "out of range"): r"identity_",  # whoever it is has some number
    ("fer2013", "line twice"): r"fer2013\.csv",  # rows have no names, and some pictures are there twice
    ("rafdb", "out of range"): r"manu_attri",  # points of the original pictures, which are not those that are read
    ("rafdb_compound", "out of range"): r"manu_attri",
}
"""Files in which a change cannot be told from another dataset."""


def unseen(case: Case, root: Path, before: FaceTable, kind: str, damage) -> list[str]:
    """Damage one label file after the other and return those of which the reader did not tell.

    Files that reading never looked at may hold anything.
    """
    found = []
    pardoned = re.compile(ANYTHING_GOES.get((case.name, kind), "nothing at all"))
    for name in label_files(root):
        if pardoned.search(name):
            continue
        path, good = root / name, (root / name).read_bytes()
        bad = damage(good.decode().split("\n"))
        if bad is not None and name in before.metadata["touched"]:
            path.write_text("\n".join(bad))
            found += [] if told(case, root, before, name) else [name]
            path.write_bytes(good)
    return found


# ---------------------------------------------------------------------------------------------- line by line


@each_module
@pytest.mark.parametrize(
    "change",
    [
        lambda text: text.replace("\n", "\r\n"),
        lambda text: "\ufeff" + text,
        lambda text: text.rstrip("\n"),
        lambda text: text + "\n\n",
    ],
    ids=["CRLF", "BOM", "no newline at the end", "blank lines at the end"],
)
def test_other_editors_change_nothing(case, root, before, change):
    for name in label_files(root):
        path = root / name
        path.write_bytes(change(path.read_text().replace("\r", "")).encode())
    table = case.read(root)
    assert table.fingerprint == before.fingerprint
    assert table.metadata["skipped"] == before.metadata["skipped"]


def with_last_cut(lines):
    last = max(k for k, line in enumerate(lines) if line.strip())
    cells = re.split(r"([,\s]+)", lines[last].strip())
    return [*lines[:last], "".join(cells[:-2])] if len(cells) > 2 else None


def with_field_too_many(lines):
    k = middle(lines)
    return [*lines[:k], lines[k].rstrip() + (",7" if "," in lines[k] else " 7"), *lines[k + 1 :]]


def with_last_cell(lines, value):
    k = middle(lines)
    cells = re.split(r"([,\s]+)", lines[k].strip())
    at = [i for i, cell in enumerate(cells) if NUMBER.fullmatch(cell)]
    if not at:
        return None
    cells[at[-1]] = value
    return [*lines[:k], "".join(cells), *lines[k + 1 :]]


def with_line_twice(lines):
    k = middle(lines)
    return [*lines[: k + 1], lines[k], *lines[k + 1 :]]


DAMAGE = {
    "cut short": with_last_cut,
    "field too many": with_field_too_many,
    "no number": lambda lines: with_last_cell(lines, "x?"),
    "nan": lambda lines: with_last_cell(lines, "nan"),
    "out of range": lambda lines: with_last_cell(lines, "77777777"),
    "line twice": with_line_twice,
    "empty": lambda lines: [],
}


@pytest.mark.parametrize("kind", list(DAMAGE))
def test_damaged_lines_are_told(case, root, before, kind):
    assert not unseen(case, root, before, kind, DAMAGE[kind])


# ---------------------------------------------------------------------------------------------------- images


def first_file(case: Case, root: Path, table: FaceTable) -> tuple[int, Path]:
    """Return a row whose image is a file of its own, and the file."""
    names = table.strings("image")[0]
    rows = [row for row, name in enumerate(names) if "!" not in name and (root / name).is_file()]
    if not rows:
        pytest.skip("images lie in archives")
    row = rows[len(rows) // 2]
    return row, root / names[row]


@each_module
def test_a_missing_image_is_counted_by_name(case, root, before):
    _, path = first_file(case, root, before)
    path.unlink()
    table = case.read(root)
    lost = len(before) - len(table)
    assert lost >= 1
    assert sum(table.metadata["skipped"].values()) - sum(before.metadata["skipped"].values()) == lost
    named = [name for names in table.metadata["skipped_examples"].values() for name in names]
    number = re.findall(r"\d+", path.stem)[-1].lstrip("0")
    assert any(number == found.lstrip("0") for name in named for found in re.findall(r"\d+", name)), named


@each_module
@pytest.mark.parametrize("content", [b"", b"no image", b"\xff\xd8\xff\xe0" + bytes(40)], ids=["empty", "text", "cut"])
def test_an_unreadable_image_is_named_when_it_is_read(case, root, before, content):
    row, path = first_file(case, root, before)
    path.write_bytes(content)
    table = case.read(root)
    if len(table) == len(before):
        with pytest.raises(DataError, match=re.escape(path.name)) as caught:
            case.images(table).read(np.array([row]))
        assert "\n" not in str(caught.value)


def stored(kind: str, image: np.ndarray, path: Path) -> np.ndarray:
    """Write an image in a peculiar way under any name and return what has to be read, RGB uint8."""
    rgb = Image.fromarray(image)
    if kind == "lying extension":
        other = "PNG" if path.suffix.lower() != ".png" else "BMP"
        rgb.save(path, other)
        return image
    if kind == "grey":
        grey = cv2.cvtColor(image, cv2.COLOR_RGB2GRAY)
        Image.fromarray(grey).save(path, "PNG")
        return np.repeat(grey[..., None], 3, 2)
    if kind == "CMYK":
        rgb.convert("CMYK").save(path, "JPEG", quality=98, subsampling=0)
        return image
    if kind == "16 bit":
        path.write_bytes(cv2.imencode(".png", image[..., ::-1].astype(np.uint16) * 257)[1].tobytes())
        return image
    exif = Image.Exif()
    exif[0x0112] = 6  # turned clockwise when it is shown
    rgb.save(path, "JPEG", quality=98, subsampling=0, exif=exif)
    return np.rot90(image, -1)


@each_module
@pytest.mark.parametrize("kind", ["lying extension", "grey", "CMYK", "16 bit", "EXIF rotation"])
def test_every_image_becomes_upright_rgb(case, root, before, kind):
    row, path = first_file(case, root, before)
    smooth = np.random.default_rng(0).integers(40, 216, (4, 3, 3)).astype(np.uint8)
    image = cv2.resize(smooth, (24, 32), interpolation=cv2.INTER_LINEAR)
    wanted = stored(kind, image, path)
    table = case.read(root)
    assert len(table) == len(before)
    found = case.images(table).read(np.array([row]))[0]
    assert found.dtype == np.uint8
    assert found.shape == wanted.shape
    assert np.abs(found.astype(int) - wanted).mean() < 6


# ------------------------------------------------------------------------------------------------------ roots


@each_module
def test_a_root_one_level_off_names_what_was_expected(case, root):
    with pytest.raises(DataError, match=r"one level too high, use dataset\.root=.*tree|not the root.*expected"):
        case.read(root.parent)
    inside = next((entry for entry in sorted(root.iterdir()) if entry.is_dir()), None)
    if inside is not None:
        with pytest.raises(DataError, match=r"too low, use dataset\.root=|not the root.*expected"):
            case.read(inside)
    with pytest.raises(DataError, match="no such folder"):
        case.read(root / "nowhere")


@each_module
def test_an_empty_root_names_what_was_expected(case, tmp_path):
    (tmp_path / "empty").mkdir()
    with pytest.raises(DataError, match="expected"):
        case.read(tmp_path / "empty")
