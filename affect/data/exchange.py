# SPDX-License-Identifier: Apache-2.0
"""Reading and writing face tables as CSV, the format that people edit.

One column per number. Lists of fixed size are spread over columns that say what each number is::

    landmarks_68   →  landmarks_68_x0, landmarks_68_y0, landmarks_68_x1, …, landmarks_68_y67
    box            →  box_x1, box_y1, box_x2, box_y2

A missing label is an empty cell. ``NA``, ``NaN``, ``null`` and ``None`` are read as empty in columns of numbers alone:
in a column of text they may be names.
UTF-8 with or without a byte order mark, any line ending, and comma, semicolon or tab as separator are read.
"""

from __future__ import annotations

import csv
import re
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
import pyarrow.csv as pa_csv

from affect import labels
from affect.data.table import declared_type, to_arrow
from affect.errors import DataError
from affect.files import replacing

NULLS = ("", "NA", "N/A", "n/a", "NaN", "nan", "NULL", "null", "None")
"""Cells of number columns that mean a missing value."""

_BOX = ("x1", "y1", "x2", "y2")


def list_columns(name: str) -> list[str]:
    """Return the CSV columns of a declared column of lists, in the order of its numbers.

    Example:
        >>> list_columns("box")
        ['box_x1', 'box_y1', 'box_x2', 'box_y2']
    """
    if name.endswith("box"):
        return [f"{name}_{corner}" for corner in _BOX]
    kind = declared_type(name)
    if kind is None or not pa.types.is_fixed_size_list(kind):
        raise DataError(f"column {name} holds lists that CSV has no columns for; write Parquet instead")
    return [f"{name}_{axis}{k}" for k in range(kind.list_size // 2) for axis in "xy"]


def write_csv(table: pa.Table, path: Path) -> None:
    """Write an Arrow table to ``path``, atomically; numbers are written so that they read back exactly."""
    columns: dict[str, pa.Array] = {}
    for name in table.column_names:
        column = to_arrow(table[name])
        if not pa.types.is_fixed_size_list(column.type):
            columns[name] = column
            continue
        width = column.type.list_size
        missing = column.is_null().to_numpy(zero_copy_only=False)
        # An offset or nulls of the lists do not reach the numbers below, so both are applied here.
        items = column.values.slice(column.offset * width, len(column) * width)
        for k, flat in enumerate(list_columns(name)):
            item = items.take(pa.array(np.arange(len(column)) * width + k))
            absent = missing | item.is_null().to_numpy(zero_copy_only=False)
            columns[flat] = pa.array(item.to_numpy(zero_copy_only=False), item.type, mask=absent)
    with replacing(path) as temporary:
        pa_csv.write_csv(pa.table(columns), temporary)


def read_csv(path: Path) -> pa.Table:
    """Return the Arrow table in a CSV file, with declared columns in their types.

    Raises:
        DataError: If the file is missing or empty, a row has too few or too many cells, or a cell is not a number where
            the column declares one; the message has file, line and column.
    """
    names, delimiter = _header(path)
    # A column without a name is the row index that some tools write first.
    unnamed = [name or f"_unnamed_{k}" for k, name in enumerate(names)]
    kinds = {name: kind for name in unnamed if (kind := _cell_type(name)) is not None}
    try:
        table = _parse(path, unnamed, delimiter, kinds)
    except pa.ArrowInvalid as error:
        _explain(path, unnamed, delimiter, kinds, error)
        # The fault lies in a column of no declared type whose first rows looked like another type: keep it as text.
        texts = {name: pa.string() for name in unnamed if name not in kinds}
        try:
            table = _parse(path, unnamed, delimiter, {**texts, **kinds})
        except pa.ArrowInvalid as again:
            raise DataError(f"{path}: {str(again).splitlines()[0]}") from again
    return _gather_lists(table.drop_columns([name for name in unnamed if name.startswith("_unnamed_")]), path)


def _header(path: Path) -> tuple[list[str], str]:
    """Return the stripped header cells and the separator."""
    if not path.is_file():
        raise DataError(f"no table at {path}; check the path")
    try:
        with path.open(encoding="utf-8-sig", newline="") as lines:
            first = lines.readline()
    except UnicodeDecodeError as error:
        raise DataError(f"{path}, line 1: not UTF-8; save the file as UTF-8") from error
    if not first.strip():
        raise DataError(f"{path}, line 1: no header; the first line must name the columns")
    delimiter = max(",;\t", key=first.count)
    names = [cell.strip() for cell in next(csv.reader([first], delimiter=delimiter))]
    doubled = sorted({name for name in names if name and names.count(name) > 1})
    if doubled:
        raise DataError(f"{path}, line 1: column {doubled[0]} occurs more than once; rename or drop one")
    return names, delimiter


_LIST_CELL = re.compile(r"(?P<column>(?:target_)?(?:landmarks_[^_]+|box))_[xy]\d+")


def _cell_type(name: str) -> pa.DataType | None:
    """Return the type of the cells of a CSV column."""
    spread = _LIST_CELL.fullmatch(name)
    if spread is not None and declared_type(spread["column"]) is not None:
        return pa.float32()
    return declared_type(name)


def _parse(path: Path, names: list[str], delimiter: str, kinds: dict[str, pa.DataType]) -> pa.Table:
    table = pa_csv.read_csv(
        path,
        read_options=pa_csv.ReadOptions(column_names=names, skip_rows=1),
        parse_options=pa_csv.ParseOptions(delimiter=delimiter, newlines_in_values=True),
        convert_options=pa_csv.ConvertOptions(
            column_types={name: kind for name, kind in kinds.items() if not pa.types.is_fixed_size_list(kind)},
            null_values=list(NULLS),
            strings_can_be_null=False,
        ),
    )
    for k, field in enumerate(table.schema):
        if pa.types.is_string(field.type):
            empty = pc.equal(table[k], "")
            table = table.set_column(k, field.name, pc.if_else(empty, pa.scalar(None, field.type), table[k]))
    return table


def _explain(path: Path, names: list[str], delimiter: str, kinds: dict[str, pa.DataType], error: Exception) -> None:
    """Raise ``DataError`` with the line of the first cell that cannot be read; return if there is none."""
    numeric = [(k, name) for k, name in enumerate(names) if name in kinds and not pa.types.is_string(kinds[name])]
    try:
        for line, cells in _lines(path, delimiter):
            if len(cells) != len(names):
                raise DataError(f"{path}, line {line}: {len(cells)} cells, the header has {len(names)}") from error
            for k, name in numeric:
                cell = cells[k].strip()
                if cell in NULLS:
                    continue
                try:
                    float(cell) if pa.types.is_floating(kinds[name]) else int(cell)
                except ValueError:
                    kind = "a number" if pa.types.is_floating(kinds[name]) else "a whole number"
                    raise DataError(
                        f"{path}, line {line}, column {name}: {cell!r} is not {kind}; leave missing labels empty"
                    ) from error
    except UnicodeDecodeError:
        raise DataError(f"{path}: not UTF-8; save the file as UTF-8") from error


def _lines(path: Path, delimiter: str) -> Iterator[tuple[int, list[str]]]:
    with path.open(encoding="utf-8-sig", newline="") as text:
        reader = csv.reader(text, delimiter=delimiter)
        next(reader)
        for cells in reader:
            if cells:
                yield reader.line_num, cells


def _gather_lists(table: pa.Table, path: Path) -> pa.Table:
    """Return the table with the columns of points and boxes gathered into lists."""
    heads = {match["column"] for name in table.column_names if (match := _LIST_CELL.fullmatch(name))}
    wanted = {f"{prefix}{name}" for prefix in ("", "target_") for name in _list_names()}
    for head in sorted(heads & wanted):
        parts = list_columns(head)
        absent = [part for part in parts if part not in table.column_names]
        if absent:
            raise DataError(f"{path}: column {absent[0]} is missing beside the other columns of {head}")
        cells = [to_arrow(table[part]) for part in parts]
        valid = np.stack([cell.is_valid().to_numpy(zero_copy_only=False) for cell in cells], 1)
        values = np.stack([cell.to_numpy(zero_copy_only=False) for cell in cells], 1).astype(np.float32)
        flat = pa.array(values.reshape(-1), mask=~valid.reshape(-1))
        lists = pa.FixedSizeListArray.from_arrays(flat, len(parts), mask=pa.array(~valid.any(1)))
        at = table.column_names.index(parts[0])
        table = table.add_column(at, head, lists).drop_columns(parts)
    return table


def _list_names() -> tuple[str, ...]:
    return ("box", *(scheme.column for scheme in labels.SCHEMES.values()))
