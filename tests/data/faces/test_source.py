# SPDX-License-Identifier: Apache-2.0
"""The faces as a dataset: tables, images on demand, files."""

from __future__ import annotations

import pickle
from pathlib import Path

import cv2
import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from affect import labels
from affect.data.faces import FaceDials, FaceImages, labels_table, sheet, write_files
from affect.data.faces.sample import points_of, sample, valence_arousal
from affect.data.table import FaceTable, declared_type
from affect.errors import ConfigError, DataError

SMALL = FaceDials(image_size=48, subjects=12)


def matrix(table: pa.Table, name: str) -> np.ndarray:
    column = table[name].combine_chunks()
    return np.asarray(column.flatten()).reshape(len(column), -1)


def test_the_table_has_the_declared_columns_and_types() -> None:
    table = labels_table(SMALL, 1, 30)
    assert len(table) == 30
    for field in table.schema:
        assert declared_type(field.name) in (None, field.type), field
    for au in labels.AU_SETS["faces"]:
        assert {labels.occurrence_column(au), labels.intensity_column(au)} <= set(table.column_names)
    assert table["image"].to_pylist()[:2] == ["face/0", "face/1"]
    assert table["subject"].to_pylist()[0].startswith("subject")
    assert sum(column.null_count for column in table.columns) == 0


def test_the_table_says_what_was_drawn() -> None:
    table, rows = labels_table(SMALL, 1, 200), sample(SMALL, 1, np.arange(200))
    points = points_of(rows, 48)
    np.testing.assert_allclose(matrix(table, "landmarks_68"), points["68"].reshape(200, -1), atol=1e-4)
    np.testing.assert_allclose(matrix(table, "landmarks_98"), points["98"].reshape(200, -1), atol=1e-4)
    np.testing.assert_allclose(matrix(table, "box"), points["box"], atol=1e-4)
    for k, au in enumerate(labels.AU_SETS["faces"]):
        intensity = table[labels.intensity_column(au)].to_numpy()
        np.testing.assert_array_equal(intensity, rows["intensity"][:, k])
        np.testing.assert_array_equal(table[labels.occurrence_column(au)].to_numpy(), intensity >= 1)
    names = np.array(labels.EXPRESSION_ORDERS["faces"])[rows["expression"]]
    assert table["expression"].to_pylist() == names.tolist()
    affect = np.stack([table["valence"].to_numpy(), table["arousal"].to_numpy()], 1)
    np.testing.assert_allclose(affect, valence_arousal(rows["intensity"]), atol=1e-6)
    np.testing.assert_allclose(table["pose_yaw"].to_numpy(), rows["yaw"], atol=1e-5)
    people = table["subject"].to_pylist()
    assert [int(name.removeprefix("subject")) for name in people] == rows["subject"].tolist()


def test_a_face_table_reads_its_metadata() -> None:
    table = FaceTable.from_arrow(labels_table(SMALL, 1, 10))
    assert table.metadata["dataset"] == "faces"
    assert table.expressions == labels.EXPRESSION_ORDERS["faces"]
    assert table.metadata["faces"]["dials"]["image_size"] == 48


def test_missing_labels_are_null_and_the_clean_table_is_whole() -> None:
    dials = FaceDials(missing_au=0.5, missing_expression=1.0, missing_landmarks=0.5, missing_valence_arousal=0.3)
    table = labels_table(dials, 1, 400)
    assert 120 < table["au12_occurrence"].null_count < 280
    assert table["au12_occurrence"].null_count == table["au01_intensity"].null_count
    assert table["expression"].null_count == 400
    assert 120 < table["landmarks_98"].null_count == table["box"].null_count < 280
    assert table["pose_yaw"].null_count == 0
    clean = labels_table(dials, 1, 400, clean=True)
    assert sum(column.null_count for column in clean.columns) == 0
    assert clean.drop_columns([]).equals(labels_table(FaceDials(), 1, 400), check_metadata=False)


def test_parts_of_a_set_are_slices_of_it() -> None:
    whole, part = labels_table(SMALL, 1, 40), labels_table(SMALL, 1, 15, first=25)
    assert part["image"].to_pylist()[0] == "face/25"
    for name in ("subject", "expression", "au12_intensity"):
        assert part[name].to_pylist() == whole[name].to_pylist()[25:]
    assert len(labels_table(SMALL, 1, 0)) == 0
    with pytest.raises(ConfigError, match="count=-1"):
        labels_table(SMALL, 1, -1)


def test_images_are_drawn_on_demand_and_travel_to_workers() -> None:
    images = FaceImages(SMALL, 1)
    rows = np.array([5, 2, 5])
    first, second, third = images.read(rows)
    assert first.shape == (48, 48, 3)
    assert first.dtype == np.uint8
    np.testing.assert_array_equal(first, third)
    assert not np.array_equal(first, second)
    other = pickle.loads(pickle.dumps(images))
    np.testing.assert_array_equal(other.read(np.array([2]))[0], second)
    np.testing.assert_array_equal(images(2), second)
    assert images.read(np.array([], int)) == []


def test_files_hold_the_same_faces_and_continue(tmp_path: Path) -> None:
    path = write_files(SMALL, 1, 6, tmp_path, progress=False)
    table = pq.read_table(path)
    files = [tmp_path / name for name in table["image"].to_pylist()]
    stored = [cv2.imread(str(file))[:, :, ::-1] for file in files]
    for drawn, read in zip(FaceImages(SMALL, 1).read(np.arange(6)), stored, strict=True):
        np.testing.assert_array_equal(drawn, read)
    assert labels_table(SMALL, 1, 6).drop_columns(["image"]).equals(table.drop_columns(["image"]))
    # A second call draws only what is missing.
    files[3].unlink()
    kept = files[2].stat().st_mtime_ns
    write_files(SMALL, 1, 8, tmp_path, progress=False)
    assert files[3].exists()
    assert files[2].stat().st_mtime_ns == kept
    assert len(pq.read_table(path)) == 8
    assert not [file for file in tmp_path.rglob("*") if file.name.startswith(".")]
    with pytest.raises(DataError, match="another seed"):
        write_files(SMALL, 2, 6, tmp_path, progress=False)
    with pytest.raises(ConfigError, match="suffix"):
        write_files(SMALL, 1, 6, tmp_path, suffix=".bmp", progress=False)


def test_writing_png_gives_no_jpeg_setting(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    given: list[list[int]] = []
    encode = cv2.imencode

    def imencode(suffix, image, settings):
        given.append(list(settings))
        return encode(suffix, image, settings)

    monkeypatch.setattr(cv2, "imencode", imencode)
    write_files(SMALL, 1, 1, tmp_path / "png", suffix=".png", progress=False)
    write_files(SMALL, 1, 1, tmp_path / "jpg", suffix=".jpg", progress=False)
    assert given == [[], [cv2.IMWRITE_JPEG_QUALITY, 95]]


def test_a_sheet_shows_faces_points_and_captions(tmp_path: Path) -> None:
    plain = sheet(SMALL, 1, range(5), columns=3, captions=False)
    assert plain.shape == (2 * 48, 3 * 48, 3)
    np.testing.assert_array_equal(plain[:48, :48], FaceImages(SMALL, 1)(0))
    marked = sheet(SMALL, 1, range(5), tmp_path / "sheet.png", columns=3, scheme="68")
    assert marked.shape[0] > plain.shape[0]
    assert (marked[:48, :48] != plain[:48, :48]).any()
    np.testing.assert_array_equal(cv2.imread(str(tmp_path / "sheet.png"))[:, :, ::-1], marked)
