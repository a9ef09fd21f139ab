# SPDX-License-Identifier: Apache-2.0
"""A table of predictions is whole or not there; missing cells are null, and names are those that others' users know."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.csv as pa_csv
import pyarrow.parquet as pq
import pytest

from affect.errors import ConfigError, DataError
from affect.report.predictions import (
    PredictionsWriter,
    decision_name,
    point_names,
    published_names,
    read_batches,
    scattered,
    table_schema,
)


@pytest.mark.parametrize(
    ("column", "names"),
    [
        ("au01_occurrence", ("AU01",)),
        ("au12_intensity", ("AU12_r",)),
        ("expression_happiness", ("happiness",)),
        ("expression", ("expression",)),
        ("pose_pitch", ("Pitch",)),
        ("valence", ("valence",)),
        ("bs_mouthSmile", ("bs_mouthSmile",)),
        ("attribute_Smiling", ("attribute_Smiling",)),
        ("landmarks_68", point_names("68")),
    ],
)
def test_names_are_those_that_others_know(column: str, names: tuple[str, ...]) -> None:
    assert published_names(column, "68") == names


def test_points_are_all_x_then_all_y() -> None:
    assert point_names("5") == tuple(f"{axis}_{k}" for axis in "xy" for k in range(5))
    assert len(set(published_names("landmarks_98", "68")) | set(point_names("68"))) == 2 * 98 + 2 * 68
    assert decision_name("AU12") == "AU12_c"


def test_every_table_begins_and_ends_alike() -> None:
    schema = table_schema("68", {"AU12": pa.float32(), "x_0": pa.float32(), "Yaw": pa.float32()}, {"checkpoint": "x"})
    assert schema.names[:4] == ["frame", "timestamp", "face", "track"]
    assert schema.names[-2:] == ["AU12", "input"]
    assert len(set(schema.names)) == len(schema.names), "points and pose of a model take the usual places"
    assert json.loads(schema.metadata[b"affect"]) == {"checkpoint": "x"}
    for taken in ("success", "input"):
        with pytest.raises(ConfigError, match=f"named {taken}"):
            table_schema("68", {taken: pa.float32()}, {})


def test_missing_cells_are_null_and_never_a_number() -> None:
    column = scattered(np.array([1.5, np.nan, 0.0], np.float32), np.array([4, 0, 2]), 5)
    assert column.to_pylist() == [None, None, 0.0, None, 1.5]
    assert scattered(np.array(["a"], object), np.array([1]), 2).to_pylist() == [None, "a"]
    assert scattered(np.zeros(0, np.int32), np.zeros(0, int), 2).to_pylist() == [None, None]


def test_parts_of_a_table_may_lack_columns(tmp_path: Path) -> None:
    schema = table_schema("5", {"AU12": pa.float32()}, {})
    paths = [tmp_path / "a.csv", tmp_path / "a.parquet"]
    with PredictionsWriter(paths, schema) as writer:
        writer.write(pa.table({"frame": [0], "input": ["a"], "success": [0]}))
        writer.write(pa.table({"frame": [1, 2], "AU12": [0.25, None], "success": [1, 1]}))
        assert not any(path.exists() for path in paths), "readers never see a part"
        assert writer.rows == 3
    stored = pq.read_table(paths[1])
    assert stored.schema.equals(schema, check_metadata=True)
    assert stored["AU12"].to_pylist() == [None, 0.25, None]
    assert pa_csv.read_csv(paths[0])["AU12"].to_pylist() == [None, 0.25, None]
    read = [batch["frame"].to_pylist() for batch in read_batches(paths[1], ["frame"], size=2)]
    assert read == [[0, 1], [2]]
    with pytest.raises(DataError, match="not a table of predictions"):
        list(read_batches(paths[0], ["frame"]))


def test_an_error_leaves_the_table_of_before(tmp_path: Path) -> None:
    path = tmp_path / "a.csv"
    path.write_text("before")
    schema = table_schema("5", {}, {})

    def broken() -> None:
        with PredictionsWriter([path], schema) as writer:
            writer.write(pa.table({"frame": [0]}))
            raise RuntimeError("stop")

    with pytest.raises(RuntimeError, match="stop"):
        broken()
    assert path.read_text() == "before"
    assert list(tmp_path.iterdir()) == [path]
    with pytest.raises(ConfigError, match=r"\.csv or \.parquet"):
        PredictionsWriter([tmp_path / "a.xlsx"], schema)
