# SPDX-License-Identifier: Apache-2.0
"""The table of ``affect predict``: one row per face and frame, under the names that users of Py-Feat and OpenFace know.

Column names of a face table (``docs/architecture.md``) are those of labels; here they are what others' tools print.
``docs/predictions.md`` describes every column. Rows are written as they come, so that memory does not grow with them.
"""

from __future__ import annotations

import json
import re
from collections.abc import Iterator, Mapping, Sequence
from contextlib import ExitStack
from pathlib import Path
from types import TracebackType
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.csv as pa_csv
import pyarrow.parquet as pq

from affect import labels
from affect.errors import ConfigError, DataError
from affect.files import replacing

SCHEMA_KEY = b"affect"
FIXED = (
    ("frame", pa.int32()),
    ("timestamp", pa.float64()),
    ("face", pa.int32()),
    ("track", pa.int32()),
    ("FaceRectX", pa.float32()),
    ("FaceRectY", pa.float32()),
    ("FaceRectWidth", pa.float32()),
    ("FaceRectHeight", pa.float32()),
    ("FaceScore", pa.float32()),
    ("success", pa.int8()),
)
"""First columns of every table. ``input``, the file, is the last one."""

POSE = ("Pitch", "Roll", "Yaw")
_UNIT = re.compile(r"au(\d\d)_(occurrence|intensity)")
_FLAT = pa.float32()


# ------------------------------------------------------------------------------------------------------ names


def published_names(column: str, points: str) -> tuple[str, ...]:
    """Return the columns of a predictions table that a column of a face table becomes.

    Args:
        column: Name of a declared column, or of any other, which stays.
        points: Scheme of ``x_0`` …; points of another scheme carry its name.

    Example:
        >>> published_names("au12_intensity", "68"), published_names("expression_happiness", "68")
        (('AU12_r',), ('happiness',))
        >>> published_names("landmarks_5", "68")[:2]
        ('landmarks_5_x_0', 'landmarks_5_x_1')
    """
    unit = _UNIT.fullmatch(column)
    if unit:
        return (f"AU{unit[1]}" + ("_r" if unit[2] == "intensity" else ""),)
    if column.startswith("expression_"):
        return (column.removeprefix("expression_"),)
    if column.startswith("pose_") and column.removeprefix("pose_").title() in POSE:
        return (column.removeprefix("pose_").title(),)
    if column.startswith("landmarks_") and column.removeprefix("landmarks_") in labels.SCHEMES:
        scheme = column.removeprefix("landmarks_")
        return point_names(scheme, "" if scheme == points else f"{column}_")
    return (column,)


def point_names(scheme: str, prefix: str = "") -> tuple[str, ...]:
    """Return the columns of the points of a scheme: all x, then all y."""
    count = labels.SCHEMES[scheme].points
    return tuple(f"{prefix}{axis}_{k}" for axis in "xy" for k in range(count))


def decision_name(column: str) -> str:
    """Return the column of the yes or no behind a column of probabilities: ``AU12`` gives ``AU12_c``."""
    return f"{column}_c"


def table_schema(points: str, outputs: Mapping[str, pa.DataType], metadata: Mapping[str, Any]) -> pa.Schema:
    """Return the columns of a predictions table in their order.

    Args:
        points: Scheme of ``x_0`` … and ``y_0`` ….
        outputs: Type of each further column, in their order; points and pose among them keep their usual place.
        metadata: What the file says of itself, ready for JSON.

    Raises:
        ConfigError: If an output has the name of another column.
    """
    usual = dict(FIXED) | dict.fromkeys((*point_names(points), *POSE), _FLAT)
    taken = [name for name in outputs if name in {fixed for fixed, _ in FIXED} or name == "input"]
    if taken:
        raise ConfigError(
            f"an output of the checkpoint is named {taken[0]}, which a predictions table keeps for itself"
        )
    columns = usual | dict(outputs) | {"input": pa.string()}
    schema = pa.schema(list(columns.items()))
    return schema.with_metadata({SCHEMA_KEY: json.dumps(dict(metadata)).encode()})


# ---------------------------------------------------------------------------------------------------- writing


class PredictionsWriter:
    """Writes a predictions table row group by row group to CSV, Parquet or both.

    Use it in a ``with`` block: files appear under their names when the block ends well, whole, and not at all
    otherwise.

    Args:
        paths: Files to write, ending in ``.csv`` or ``.parquet``.
        schema: Columns, see ``table_schema``.

    Attributes:
        rows: Number of rows so far.
    """

    def __init__(self, paths: Sequence[Path], schema: pa.Schema) -> None:
        for path in paths:
            if path.suffix not in (".csv", ".parquet"):
                raise ConfigError(f"{path}: predictions are written as .csv or .parquet")
        self.paths, self.schema, self.rows = tuple(paths), schema, 0
        self._writers: list[Any] = []
        self._stack = ExitStack()

    def __enter__(self) -> PredictionsWriter:
        with ExitStack() as stack:
            for path in self.paths:
                part = stack.enter_context(replacing(path))
                if path.suffix == ".parquet":
                    writer = pq.ParquetWriter(part, self.schema, compression="zstd")
                else:
                    writer = pa_csv.CSVWriter(
                        part, self.schema, write_options=pa_csv.WriteOptions(quoting_style="needed")
                    )
                self._writers.append(stack.enter_context(writer))
            self._stack = stack.pop_all()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> bool | None:
        return self._stack.__exit__(kind, error, trace)

    def write(self, table: pa.Table) -> None:
        """Add rows; columns that ``table`` lacks are null there."""
        size = table.num_rows
        columns = [
            table[field.name].cast(field.type) if field.name in table.column_names else pa.nulls(size, field.type)
            for field in self.schema
        ]
        whole = pa.table(columns, schema=self.schema)
        for writer in self._writers:
            writer.write_table(whole)
        self.rows += size


def read_batches(path: Path, columns: Sequence[str], size: int = 65536) -> Iterator[dict[str, pa.Array]]:
    """Yield columns of a Parquet table of predictions, ``size`` rows at a time.

    Raises:
        DataError: If it is no such table.
    """
    try:
        with pq.ParquetFile(path) as file:
            for batch in file.iter_batches(size, columns=list(columns)):
                yield {name: batch.column(name) for name in columns}
    except (pa.ArrowInvalid, KeyError, OSError) as error:
        raise DataError(f"{path}: not a table of predictions ({str(error).splitlines()[0]})") from error


def scattered(cells: np.ndarray, where: np.ndarray, size: int) -> pa.Array:
    """Return a column of ``size`` rows that holds ``cells`` in the rows ``where`` and null elsewhere.

    NaN cells are null too: a missing value is never a number.
    """
    values = np.asarray(cells)
    column = np.zeros(size, values.dtype) if values.dtype != object else np.full(size, None, object)
    column[where] = values
    missing = np.ones(size, bool)
    missing[where] = np.isnan(values) if np.issubdtype(values.dtype, np.floating) else False
    return pa.array(column, mask=missing, from_pandas=False)
