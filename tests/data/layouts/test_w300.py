# SPDX-License-Identifier: Apache-2.0
"""300-W: official parts, every way a .pts file varies between copies, names with spaces, detector boxes."""

from __future__ import annotations

import shutil

import numpy as np
import pytest
from scipy.io import savemat

from affect.data.expected import measure
from affect.data.layouts import w300
from affect.errors import ConfigError, DataError
from tests.data import samples
from tests.data.layouts.contract import LayoutContract

POINTS = np.stack([np.linspace(10.25, 77.25, 68), np.linspace(20.5, 87.5, 68) ** 0.9], 1)


def pts(points=POINTS, ending="\n", head=("version: 1", "n_points:  68"), tail=""):
    """A .pts file whose first pixel centre is (1, 1)."""
    lines = [*head, "{", *(f"{x + 1:.6f} {y + 1:.6f}" for x, y in points), "}"]
    return ending.join(lines) + tail


def put(root, image, text=None, picture=True):
    """Write an image and its points."""
    path = root / image
    path.parent.mkdir(parents=True, exist_ok=True)
    if picture:
        samples.write_image(path, samples.smooth_image(len(image)))
    path.with_suffix(".pts").write_bytes((pts() if text is None else text).encode())


@pytest.fixture
def root(tmp_path):
    """Two images in each folder."""
    for collection, names in {
        "afw": ("1_1.jpg", "2_1.jpg"),
        "helen/trainset": ("11_1.jpg", "12_1.jpg"),
        "helen/testset": ("21_1.jpg", "22_1.jpg"),
        "lfpw/trainset": ("image_0001.png", "image_0002.png"),
        "lfpw/testset": ("image_0003.png", "image_0004.png"),
        "ibug": ("image_003_1.jpg", "image_008 _1.jpg"),
        "300W/01_Indoor": ("indoor_001.png", "indoor_002.png"),
        "300W/02_Outdoor": ("outdoor_001.png", "outdoor_002.png"),
    }.items():
        for name in names:
            put(tmp_path / "tree", f"{collection}/{name}")
    return tmp_path / "tree"


class TestContract(LayoutContract):
    layout = w300
    group = "image"


class TestContractWithDetectorBoxes(LayoutContract):
    layout = w300
    group = "image"

    def read(self, root):
        return w300.read(root, box="detector")

    def write(self, table, root, images):
        w300.write(table, root, images, box="detector")

    def dress(self, drawn):
        return w300.dress(drawn, box="detector")

    def test_the_private_part_has_no_box_of_a_detector(self, table):
        parts, known = table.strings("part")[0], table.numbers("box")[1]
        assert (known == (parts != "private")).all()
        assert 0 < known.sum() < len(table)


class TestParts:
    def test_folders_make_the_official_parts(self, root):
        table = w300.read(root)
        parts, names = table.strings("part")[0], table.strings("image")[0]
        assert len(table) == 16
        assert {part: int((parts == part).sum()) for part in set(parts)} == {
            "train": 6, "common": 4, "challenge": 2, "private": 4,
        }  # fmt: skip
        assert all(
            part == {"afw": "train", "ibug": "challenge", "300W": "private"}.get(name.split("/")[0])
            or part == {"trainset": "train", "testset": "common"}.get(name.split("/")[1])
            for name, part in zip(names, parts, strict=True)
        )
        assert {measure(table, entry.key) for entry in w300.expected() if "collection=" in entry.key} == {2}

    def test_published_sizes_add_up(self):
        counts = {entry.key: entry.value for entry in w300.expected()}
        assert counts["rows/part=train"] == 3148
        assert counts["rows/part=common"] == 554
        assert counts["rows/part=challenge"] == 135
        assert counts["rows/part=common"] + counts["rows/part=challenge"] == 689
        assert counts["rows/part=private"] == 600
        assert not any(entry.found for entry in w300.expected())

    def test_a_folder_that_is_missing_is_said(self, root):
        shutil.rmtree(root / "300W")
        shutil.rmtree(root / "lfpw" / "testset")
        table = w300.read(root)
        assert len(table) == 10
        missing = [note for note in table.metadata["notes"] if "is not there" in note]
        assert len(missing) == 3
        assert any("lfpw/testset" in note and "224 images of the part common" in note for note in missing)

    @pytest.mark.parametrize("name", ["AFW", "Helen"])
    def test_the_case_of_folders_does_not_matter(self, root, name):
        (root / name.lower()).rename(root / name)
        table = w300.read(root)
        assert len(table) == 16
        assert any(image.startswith(f"{name}/") for image in table.strings("image")[0])
        assert name.lower() in {text.split("_")[0] for text in table.strings("collection")[0]}
        assert all(path.is_file() for path in table.image_paths())


class TestPoints:
    @pytest.mark.parametrize(
        "text",
        [
            pts(),
            pts(tail="\n"),
            pts(ending="\r\n", tail="\r\n\r\n"),
            pts(ending="  \n\n", tail="\n \n"),
            pts().replace(" ", "    ").replace("{", "  {").replace("}", " }\t"),
            pts(head=("version: 1.0", "n_points: 68 ")),
            pts(head=()),
            "\ufeff" + pts(),
        ],
        ids=["plain", "final newline", "CRLF", "blank lines", "many blanks", "other head", "no head", "BOM"],
    )
    def test_every_copy_reads_alike(self, root, text):
        put(root, "afw/1_1.jpg", text)
        points = w300.read(root).numbers("landmarks_68")[0][0].reshape(68, 2)
        np.testing.assert_allclose(points, POINTS, atol=1e-4)

    def test_the_first_pixel_is_at_zero_and_nothing_is_rounded(self, root):
        put(root, "afw/1_1.jpg", pts(np.concatenate([[[0.0, 0.0], [0.5, -2.25]], POINTS[2:]])))
        points = w300.read(root).numbers("landmarks_68")[0][0]
        assert points[:4].tolist() == [0.0, 0.0, 0.5, -2.25]

    @pytest.mark.parametrize(
        ("text", "message"),
        [
            (pts().replace("{", ""), r"1_1\.pts: no line with \{"),
            (pts()[:-1], r"1_1\.pts: the closing brace is missing behind 68 points"),
            (pts()[:300], r"1_1\.pts(, line \d+)?: .*(closing brace|two coordinates)"),
            (pts(POINTS[:-1]), r"1_1\.pts: 67 points between the braces, expected 68"),
            (pts(head=("n_points: 49",)), r"1_1\.pts, line 1: 49 points, expected 68"),
            (pts().replace("11.250000 16", "x 16", 1), r"1_1\.pts, line 4: expected a number, found 'x'"),
            (pts().replace("11.250000", "nan", 1), r"1_1\.pts, line 4: expected a number, found 'nan'"),
            (pts().replace("11.250000", "11.2 5", 1), r"1_1\.pts, line 4: expected two coordinates, found '11\.2 5"),
            (pts().replace("11.250000", "1e9", 1), r"1_1\.pts, line 4: expected coordinates in pixels"),
            ("", r"1_1\.pts: no line with"),
        ],
    )
    def test_damage_is_named_with_its_line(self, root, text, message):
        put(root, "afw/1_1.jpg", text)
        with pytest.raises(DataError, match=message) as caught:
            w300.read(root)
        assert "\n" not in str(caught.value)


class TestImages:
    def test_mirrored_copies_are_left_out(self, root):
        put(root, "ibug/image_003_1_mirror.jpg")
        table = w300.read(root)
        assert len(table) == 16
        assert table.metadata["skipped"] == {"mirrored copy of another image": 1}
        assert table.metadata["skipped_examples"]["mirrored copy of another image"] == ["ibug/image_003_1_mirror.jpg"]

    def test_names_with_spaces_and_either_case_are_images(self, root):
        put(root, "ibug/image_010 _2.JPG")
        (root / "ibug" / "image_010 _2.pts").rename(root / "ibug" / "image_010 _2.PTS")
        put(root, "afw/3_1.jpeg")
        names = list(w300.read(root).strings("image")[0])
        assert {"ibug/image_010 _2.JPG", "ibug/image_008 _1.jpg", "afw/3_1.jpeg"} <= set(names)

    def test_what_has_no_partner_is_counted(self, root):
        (root / "afw" / "1_1.jpg").unlink()
        (root / "ibug" / "image_003_1.pts").unlink()
        (root / "ibug" / "readme.txt").write_text("hello")
        table = w300.read(root)
        assert len(table) == 14
        assert table.metadata["skipped"] == {"image missing": 1, "image without points beside it": 1}
        assert table.metadata["skipped_examples"]["image missing"] == ["afw/1_1.pts"]

    def test_two_images_of_one_name_are_an_error(self, root):
        samples.write_image(root / "afw" / "1_1.png", samples.smooth_image(1))
        with pytest.raises(DataError, match=r"afw: 1_1\.jpg and 1_1\.png have one name; remove one"):
            w300.read(root)


class TestBoxes:
    def test_the_tight_box_and_its_enlargement(self, root):
        tight = [10.25, POINTS[:, 1].min(), 77.25, POINTS[:, 1].max()]
        np.testing.assert_allclose(w300.read(root).numbers("box")[0][0], tight, atol=1e-4)
        wide, high = tight[2] - tight[0], tight[3] - tight[1]
        table = w300.read(root, enlarge=0.1)
        grown = np.add(tight, [-0.1 * wide, -0.1 * high, 0.1 * wide, 0.1 * high])
        np.testing.assert_allclose(table.numbers("box")[0][0], grown, atol=1e-4)
        assert "box: tight around the true points, enlarged by 0.1 on each side" in table.metadata["notes"]

    def boxes(self, root, collection, **entries):
        cells = np.empty((1, len(entries)), object)
        for k, (name, square) in enumerate(entries.items()):
            cells[0, k] = {
                "imgName": name,
                "bb_detector": np.array([square], float),
                "bb_ground_truth": np.ones((1, 4)),
            }
        folder = root / "Bounding Boxes"
        folder.mkdir(exist_ok=True)
        savemat(folder / f"bounding_boxes_{collection}.mat", {"bounding_boxes": cells})

    def test_the_detectors_boxes_are_matched_by_name(self, root):
        for collection in ("afw", "helen_trainset", "helen_testset", "lfpw_trainset", "lfpw_testset"):
            self.boxes(root, collection, nobody=[1, 2, 3, 4])
        self.boxes(root, "afw", **{"2_1.jpg": [11, 21, 51, 61], "1_1.JPG": [1, 2, 31, 42]})
        self.boxes(root, "ibug", **{"image_008 _1.jpg": [5, 6, 7, 8]})
        table = w300.read(root, box="detector")
        values, known = table.numbers("box")
        named = dict(zip(table.strings("image")[0][known], values[known].tolist(), strict=True))
        assert named == {
            "afw/1_1.jpg": [0, 1, 30, 41], "afw/2_1.jpg": [10, 20, 50, 60], "ibug/image_008 _1.jpg": [4, 5, 6, 7],
        }  # fmt: skip
        assert "13 images have no box of the official detector" in table.metadata["notes"]

    def test_without_the_files_it_says_which(self, root):
        with pytest.raises(DataError, match=r"bounding_boxes_afw\.mat: no such file; dataset\.box=detector needs it"):
            w300.read(root, box="detector")

    @pytest.mark.parametrize("content", [b"", b"no matrix", b"MATLAB 5.0 MAT-file" + bytes(300)])
    def test_a_damaged_file_is_one_line(self, root, content):
        (root / "Bounding Boxes").mkdir()
        (root / "Bounding Boxes" / "bounding_boxes_afw.mat").write_bytes(content)
        with pytest.raises(DataError, match=r"bounding_boxes_afw\.mat: expected MATLAB structures"):
            w300.read(root, box="detector")

    def test_a_box_that_is_none(self, root):
        self.boxes(root, "afw", **{"1_1.jpg": [31, 2, 1, 42]})
        with pytest.raises(DataError, match=r"1_1\.jpg: expected a box x1 y1 x2 y2, found \[31"):
            w300.read(root, box="detector")

    def test_an_unknown_policy(self, root):
        with pytest.raises(ConfigError, match=r"dataset\.box=detectr: unknown; did you mean detector"):
            w300.read(root, box="detectr")


def test_a_row_without_points_cannot_be_written(root, tmp_path):
    table = w300.read(root)
    points, known = table.numbers("landmarks_68")
    known[3] = False
    with pytest.raises(DataError, match="row 3 has no points"):
        w300.write(table.with_columns({"landmarks_68": (points, known)}), tmp_path / "copy")
