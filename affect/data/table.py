# SPDX-License-Identifier: Apache-2.0
"""The face table: one row per face image, memory-mapped, with every missing label a null of its own cell.

A table is read by tasks through ``names``, ``expressions``, ``numbers`` and ``strings``
(``affect.tasks.base.Columns``). All of them are vectorised over rows and touch only the rows that they are asked for,
so that the cost of a batch does not depend on the size of the table. The working format is uncompressed Arrow IPC,
which is mapped and never copied: data loading workers share one set of pages. Parquet and CSV are for exchange
(``affect.data.exchange``).
"""

from __future__ import annotations

import hashlib
import json
import os
import re
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import NamedTuple, TypeAlias

import numpy as np
import pyarrow as pa

from affect import labels
from affect.errors import DataError, near
from affect.files import replacing

JSON: TypeAlias = "bool | int | float | str | Sequence[JSON] | Mapping[str, JSON] | None"
"""What a table's metadata may hold."""

ColumnLike: TypeAlias = "pa.Array | pa.ChunkedArray | np.ndarray | Sequence | tuple[np.ndarray, np.ndarray]"
"""What ``FaceTable.from_columns`` takes for a column; a pair is (values, validity)."""

TARGET_PREFIX = "target_"
"""Prefix of the true labels in a predictions table."""

_STRINGS = frozenset({"image", "subject", "sequence", "part", "expression"})
_SCALARS = re.compile(
    r"au\d\d_(occurrence|intensity)|expression_.+|valence|arousal|pose_(pitch|yaw|roll)|attribute_.+|bs_.+"
)
_SCHEMA_KEY = b"affect"


# ------------------------------------------------------------------------------------------------- columns


def declared_type(name: str) -> pa.DataType | None:
    """Return the Arrow type of a column by its name, or None for a column that the package does not declare.

    Example:
        >>> declared_type("au12_intensity"), declared_type("box").list_size, declared_type("camera")
        (DataType(float), 4, None)
    """
    name = name.removeprefix(TARGET_PREFIX)
    if name in _STRINGS:
        return pa.string()
    if name == "frame":
        return pa.int32()
    if name == "box":
        return pa.list_(pa.float32(), 4)
    if name == "crop_matrix":
        return pa.list_(pa.float64(), 6)
    scheme = labels.SCHEMES.get(name.removeprefix("landmarks_"))
    if scheme is not None and name == scheme.column:
        return pa.list_(pa.float32(), 2 * scheme.points)
    return pa.float32() if _SCALARS.fullmatch(name) else None


def to_arrow(values: ColumnLike) -> pa.Array:
    """Return one Arrow array of ``values``: an Arrow array, a numpy array or sequence, or a pair (values, validity).

    A two-dimensional numpy array ``(N, width)`` becomes fixed-size lists. In a sequence, None is a missing value. In a
    pair, cells whose validity is False are missing, whatever their value.
    """
    if isinstance(values, pa.ChunkedArray):
        return _one_chunk(values)
    if isinstance(values, pa.Array):
        return values
    valid = None
    if isinstance(values, tuple) and len(values) == 2 and isinstance(values[1], np.ndarray):
        values, valid = values
    if not isinstance(values, np.ndarray):
        return pa.array(values, mask=None if valid is None else ~valid)
    missing = None if valid is None else ~np.asarray(valid, bool)
    if values.ndim == 1:
        return pa.array(values, mask=missing)
    flat = pa.array(np.ascontiguousarray(values).reshape(-1))
    return pa.FixedSizeListArray.from_arrays(flat, values.shape[1], mask=None if missing is None else pa.array(missing))


def conform(name: str, column: pa.Array, table: str = "") -> pa.Array:
    """Return ``column`` in its declared type; columns that are not declared stay as they are, in plain strings.

    Integers, booleans and float64 become float32, dictionaries become strings, lists of equal length become lists of
    fixed size. Text never becomes a number here: readers of text report the line of a bad cell themselves.

    Raises:
        DataError: If the column cannot be cast without loss, with its name and both types.
    """
    wanted, found = declared_type(name), column.type
    if wanted is None:
        text = pa.types.is_dictionary(found) or pa.types.is_large_string(found) or pa.types.is_string_view(found)
        return column.cast(pa.string()) if text else column
    if found == wanted:
        return column
    stringlike = pa.types.is_dictionary(found) or _is_text(found)
    if pa.types.is_null(found) or (stringlike == pa.types.is_string(wanted)):
        try:
            if pa.types.is_fixed_size_list(wanted) and pa.types.is_null(found):
                return pa.nulls(len(column), wanted)
            return column.cast(wanted)
        except (pa.ArrowException, TypeError) as error:
            reason = f" ({str(error).splitlines()[0]})"
    elif pa.types.is_string(wanted) and pa.types.is_integer(found):
        return column.cast(wanted)  # Identities are often numbers.
    else:
        reason = ""
    where = f"{table}: " if table else ""
    raise DataError(f"{where}column {name} holds {found}, expected {wanted}{reason}; convert it before reading")


def _is_text(kind: pa.DataType) -> bool:
    return pa.types.is_string(kind) or pa.types.is_large_string(kind) or pa.types.is_string_view(kind)


def _one_chunk(column: pa.ChunkedArray) -> pa.Array:
    if column.num_chunks == 1:
        return column.chunk(0)
    return pa.concat_arrays(column.chunks) if column.num_chunks else pa.array([], column.type)


# ----------------------------------------------------------------------------------- views on Arrow's memory


class _Bits(NamedTuple):
    """A packed bitmap, read at any rows without unpacking it."""

    data: np.ndarray
    offset: int
    length: int

    def read(self, rows: np.ndarray | None) -> np.ndarray:
        """Return bits as bool, ``(len(rows),)`` or all."""
        if rows is None:
            last = -(-(self.offset + self.length) // 8)
            return np.unpackbits(self.data[:last], bitorder="little")[self.offset :][: self.length].astype(bool)
        position = rows + self.offset
        return (self.data[position >> 3] >> (position & 7).astype(np.uint8) & 1).astype(bool)


def _bitmap(buffer: pa.Buffer, offset: int, length: int) -> _Bits:
    return _Bits(np.frombuffer(buffer, np.uint8), offset, length)


class _Numbers(NamedTuple):
    """A numeric column without a copy: values in Arrow's memory, validity of rows and of the numbers in a list."""

    values: np.ndarray | _Bits
    valid: _Bits | None
    items: _Bits | None
    width: int

    def read(self, rows: np.ndarray | None, length: int) -> tuple[np.ndarray, np.ndarray]:
        size = length if rows is None else len(rows)
        if isinstance(self.values, _Bits):
            values = self.values.read(rows).astype(np.float32)
        else:
            values = (self.values if rows is None else self.values[rows]).astype(np.float32)
        valid = np.ones(size, bool) if self.valid is None else self.valid.read(rows)
        if self.items is not None:
            # A null inside a list, e.g. a point that was not annotated, is NaN: validity is per row.
            inner = None
            if rows is not None:
                inner = (rows[:, None] * self.width + np.arange(self.width)).reshape(-1)
            values[~self.items.read(inner).reshape(size, self.width)] = np.nan
        if self.valid is not None:
            values[~valid] = 0
        return values, valid


def _numbers_view(name: str, column: pa.Array) -> _Numbers:
    width, child = 0, column
    items: _Bits | None = None
    length, offset = len(column), column.offset
    if pa.types.is_fixed_size_list(column.type):
        width = column.type.list_size
        child = column.values
        offset, length = child.offset + column.offset * width, length * width
    if not (pa.types.is_floating(child.type) or pa.types.is_integer(child.type) or pa.types.is_boolean(child.type)):
        raise DataError(f"column {name} holds {column.type}, which is not a column of numbers")
    valid = _bitmap(column.buffers()[0], column.offset, len(column)) if column.null_count else None
    buffers = child.buffers()
    if width and buffers[0] is not None:
        # Counted by Arrow: unpacking the bits of millions of points takes gigabytes.
        complete = column.values.slice(column.offset * width, length).null_count == 0
        items = None if complete else _bitmap(buffers[0], offset, length)
    if pa.types.is_boolean(child.type):
        return _Numbers(_bitmap(buffers[1], offset, length), valid, items, width)
    values = np.frombuffer(buffers[1], child.type.to_pandas_dtype()) if buffers[1] is not None else np.empty(0)
    values = values[offset : offset + length]
    return _Numbers(values.reshape(-1, width) if width else values, valid, items, width)


# --------------------------------------------------------------------------------------------------- table


class FaceTable:
    """One row per face image. Columns, types and metadata are those of ``docs/architecture.md``.

    Use ``from_arrow``, ``from_columns``, ``open``, ``read_parquet`` or ``read_csv`` to make one. A table is never
    changed: ``take``, ``with_columns`` and ``with_metadata`` return new ones.

    Attributes:
        arrow: The Arrow table, one chunk per column.
        root: Folder that the paths of column ``image`` are relative to.
        metadata: What the source says of itself: ``dataset``, ``expressions``, ``label_source``, ``recipe`` and more.
        path: File that the table is mapped from; None for a table in memory.
    """

    def __init__(self, arrow: pa.Table, root: Path, metadata: Mapping[str, JSON], path: Path | None = None) -> None:
        self.arrow = arrow
        self.root = root
        self.metadata = dict(metadata)
        self.path = path
        self._restated: dict[str, JSON] = {}
        self._views: dict[str, _Numbers] = {}
        self._expressions: tuple[str, ...] | None = None
        self._fingerprint: str | None = None

    # ------------------------------------------------------------------------------------------------ making

    @classmethod
    def from_arrow(
        cls, table: pa.Table, root: str | Path = ".", metadata: Mapping[str, JSON] | None = None
    ) -> FaceTable:
        """Return a face table of an Arrow table, with declared columns cast to their types.

        Args:
            table: Any Arrow table with a column ``image``.
            root: Folder that the image paths are relative to.
            metadata: Replaces the metadata that the Arrow schema may carry from an earlier face table.

        Raises:
            DataError: If ``image`` is missing or has nulls, a name occurs twice, or a declared column has another type.
        """
        doubled = sorted({name for name in table.column_names if table.column_names.count(name) > 1})
        if doubled:
            raise DataError(f"column {doubled[0]} occurs more than once in the table; rename or drop one")
        if "image" not in table.column_names:
            known = ", ".join(table.column_names[:12]) + (", …" if len(table.column_names) > 12 else "")
            raise DataError(f"the table has no column image, which it needs; its columns are {known}")
        columns = {name: conform(name, _one_chunk(table[name])) for name in table.column_names}
        images = columns["image"]
        if images.null_count:
            row = int(np.flatnonzero(images.is_null().to_numpy(zero_copy_only=False))[0])
            raise DataError(f"column image, row {row}: no path ({images.null_count} such rows); drop or fill them")
        if metadata is None:
            metadata = _stored(table.schema).get("metadata", {})
        return cls(pa.table(columns), Path(root), metadata)

    @classmethod
    def from_columns(
        cls, columns: Mapping[str, ColumnLike], root: str | Path = ".", metadata: Mapping[str, JSON] | None = None
    ) -> FaceTable:
        """Return a face table of arrays by name (see ``to_arrow`` for what a column may be)."""
        arrays = {name: to_arrow(values) for name, values in columns.items()}
        lengths = {name: len(array) for name, array in arrays.items()}
        if len(set(lengths.values())) > 1:
            raise DataError(f"columns differ in length: {lengths}")
        return cls.from_arrow(pa.table(arrays), root, metadata or {})

    @classmethod
    def open(cls, path: str | Path, root: str | Path | None = None) -> FaceTable:
        """Return the table in an Arrow IPC file, memory-mapped: no row is read before it is asked for.

        Args:
            path: File that ``save`` wrote (or any Arrow IPC file with a column ``image``).
            root: Folder of the images, where it is not the one that was saved.

        Raises:
            DataError: If the file is missing or no Arrow IPC file.
        """
        path = Path(path).absolute()
        if not path.is_file():
            raise DataError(f"no table at {path}; check the path")
        try:
            arrow = pa.ipc.open_file(pa.memory_map(str(path))).read_all()
        except pa.ArrowInvalid as error:
            raise DataError(f"{path} is not an Arrow IPC file ({str(error).splitlines()[0]})") from error
        stored = _stored(arrow.schema)
        folder = Path(root) if root is not None else path.parent / stored.get("root", ".")
        single = all(arrow[name].num_chunks <= 1 for name in arrow.column_names)
        exact = all(declared_type(field.name) in (None, field.type) for field in arrow.schema)
        if "metadata" in stored and single and exact:
            table = cls(arrow.replace_schema_metadata(None), folder, stored["metadata"], path)
            table._fingerprint = stored.get("fingerprint")
            return table
        return cls.from_arrow(arrow, folder)

    def save(self, path: str | Path) -> FaceTable:
        """Write the table to an uncompressed Arrow IPC file, atomically, and return it opened from there.

        The root is stored relative to the file where it is the file's folder or lies below it, so that both can be
        moved together; otherwise as an absolute path.
        """
        path = Path(path)
        arrow = self._with_schema_metadata(path)
        with (
            replacing(path) as temporary,
            pa.OSFile(str(temporary), "wb") as sink,
            pa.ipc.new_file(sink, arrow.schema) as writer,
        ):
            writer.write_table(arrow)
        return FaceTable.open(path)

    def _with_schema_metadata(self, path: Path) -> pa.Table:
        root, folder = self.root.absolute(), path.absolute().parent
        inside = root == folder or folder in root.parents
        stored = {
            "root": os.path.relpath(root, folder) if inside else str(root),
            "metadata": self.metadata,
            "fingerprint": self.fingerprint,
        }
        return self.arrow.replace_schema_metadata({_SCHEMA_KEY: json.dumps(stored)})

    def to_parquet(self, path: str | Path) -> None:
        """Write the table to a Parquet file, atomically; metadata and root go with it."""
        import pyarrow.parquet as pq

        path = Path(path)
        with replacing(path) as temporary:
            pq.write_table(self._with_schema_metadata(path), temporary, compression="zstd")

    @classmethod
    def read_parquet(cls, path: str | Path, root: str | Path | None = None) -> FaceTable:
        """Return the table in a Parquet file; ``root`` is by default what the file says, or else its folder."""
        import pyarrow.parquet as pq

        path = Path(path)
        if not path.is_file():
            raise DataError(f"no table at {path}; check the path")
        try:
            arrow = pq.read_table(path, partitioning=None)
        except (pa.ArrowInvalid, OSError) as error:
            raise DataError(f"{path} is not a Parquet file ({str(error).splitlines()[0]})") from error
        folder = Path(root) if root is not None else path.absolute().parent / _stored(arrow.schema).get("root", ".")
        try:
            return cls.from_arrow(arrow, folder)
        except DataError as error:
            raise DataError(f"{path}: {error}") from error

    def to_csv(self, path: str | Path) -> None:
        """Write the table to a CSV file; see ``affect.data.exchange`` for the columns that lists become."""
        from affect.data.exchange import write_csv

        write_csv(self.arrow, Path(path))

    @classmethod
    def read_csv(cls, path: str | Path, root: str | Path | None = None) -> FaceTable:
        """Return the table in a CSV file; ``root`` is by default the file's folder.

        Raises:
            DataError: With file, line and column of the first cell that is not what its column declares.
        """
        from affect.data.exchange import read_csv

        path = Path(path)
        arrow = read_csv(path)
        try:
            return cls.from_arrow(arrow, path.absolute().parent if root is None else root, {})
        except DataError as error:
            raise DataError(f"{path}: {error}") from error

    def __reduce__(self) -> tuple:
        # A mapped table travels to another process as its path: nothing is copied.
        if self.path is not None:
            return _reopened, (self.path, self.root, self._restated)
        return FaceTable, (self.arrow, self.root, self.metadata)

    # ----------------------------------------------------------------------------------------------- reading

    def __len__(self) -> int:
        return self.arrow.num_rows

    def __repr__(self) -> str:
        dataset = self.metadata.get("dataset", "table")
        return f"FaceTable({dataset}: {len(self)} rows, {self.arrow.num_columns} columns, root={self.root})"

    @property
    def names(self) -> frozenset[str]:
        """Names of the columns that exist."""
        return frozenset(self.arrow.column_names)

    @property
    def expressions(self) -> tuple[str, ...]:
        """Expression classes that the source can label: what the metadata says, or else what the columns hold.

        From columns, the classes come in the order of ``labels.EXPRESSION_ORDERS["affectnet8"]``, then ``other``, then
        the remaining names by alphabet.
        """
        if self._expressions is None:
            stated = self.metadata.get("expressions")
            if isinstance(stated, Sequence) and not isinstance(stated, str) and len(stated):
                self._expressions = tuple(str(name) for name in stated)
            else:
                self._expressions = self._find_expressions()
        return self._expressions

    def _find_expressions(self) -> tuple[str, ...]:
        prefix = "expression_"
        found = {name.removeprefix(prefix).replace("_", " ") for name in self.names if name.startswith(prefix)}
        if "expression" in self.names:
            found |= {name for name in self.column("expression").unique().to_pylist() if name is not None}
        order = (*labels.EXPRESSION_ORDERS["affectnet8"], labels.OTHER)
        return tuple(sorted(found, key=lambda name: (order.index(name) if name in order else len(order), name)))

    def numbers(self, name: str, rows: np.ndarray | None = None) -> tuple[np.ndarray, np.ndarray]:
        """Return values ``(N,)`` or ``(N, width)`` as float32, 0 where null, and validity ``(N,)`` as bool.

        A null inside a list (a point that was not annotated) is NaN, because validity is per row.

        Args:
            name: A column of numbers, booleans or fixed-size lists of numbers.
            rows: Row indices ``(N,)``; None for all rows.
        """
        view = self._views.get(name)
        if view is None:
            view = self._views[name] = _numbers_view(name, self.column(name))
        return view.read(None if rows is None else _indices(rows), len(self))

    def strings(self, name: str, rows: np.ndarray | None = None) -> tuple[np.ndarray, np.ndarray]:
        """Return values ``(N,)`` as an object array, ``""`` where null, and validity ``(N,)`` as bool.

        Columns of other scalar types are written out, e.g. an integer camera number.
        """
        column = self.column(name)
        if rows is not None:
            column = column.take(pa.array(_indices(rows)))
        column = _as_text(name, column)
        values = column.to_numpy(zero_copy_only=False)
        if not column.null_count:
            return values, np.ones(len(values), bool)
        valid = column.is_valid().to_numpy(zero_copy_only=False)
        return np.where(valid, values, ""), valid

    def codes(self, name: str) -> tuple[np.ndarray, np.ndarray]:
        """Return the distinct values of a column and where they occur, without an object per row.

        Returns:
            Codes ``(N,)`` as int64, -1 where null, and the sorted distinct values ``(G,)`` as an object array.
        """
        encoded = _as_text(name, self.column(name)).dictionary_encode()
        codes = encoded.indices.fill_null(-1).to_numpy(zero_copy_only=False).astype(np.int64)
        values = encoded.dictionary.to_numpy(zero_copy_only=False)
        order = np.argsort(values.astype(str), kind="stable") if len(values) else np.empty(0, np.int64)
        rank = np.empty(len(values) + 1, np.int64)
        rank[order], rank[-1] = np.arange(len(values)), -1
        return rank[codes], values[order]

    def image_paths(self, rows: np.ndarray | None = None) -> list[Path]:
        """Return the image files of ``rows``."""
        return [self.root / name for name in self.strings("image", rows)[0]]

    def column(self, name: str) -> pa.Array:
        """Return a column as one Arrow array, without a copy."""
        if name not in self.names:
            raise DataError(f"the table has no column {name}; {near(name, self.names)}")
        return _one_chunk(self.arrow[name])

    @property
    def fingerprint(self) -> str:
        """SHA-256 of names, types, values and nulls of all columns and of the declared expressions, 16 hex digits.

        It does not depend on the root or on how the table is stored. ``save`` keeps it in the file, so that opening a
        large table reads no row.
        """
        if self._fingerprint is None:
            digest = hashlib.sha256(json.dumps([len(self), list(self.expressions)]).encode())
            for name in sorted(self.names):
                column = self.column(name)
                digest.update(f"\n{name}:{column.type}\n".encode())
                try:
                    values, valid = self.numbers(name)
                    digest.update(np.ascontiguousarray(values).data)
                    digest.update(np.packbits(valid).data)
                except DataError:
                    codes, distinct = self.codes(name)
                    digest.update(codes.data)
                    digest.update("\0".join(distinct).encode())
            self._fingerprint = digest.hexdigest()[:16]
        return self._fingerprint

    # ---------------------------------------------------------------------------------------------- changing

    def take(self, rows: np.ndarray) -> FaceTable:
        """Return the table of ``rows``, in their order. The classes that the source can label stay the same."""
        taken = self.arrow.take(pa.array(_indices(rows)))
        columns = {name: _one_chunk(taken[name]) for name in taken.column_names}
        return FaceTable(pa.table(columns), self.root, self._stating_expressions(self.expressions))

    def _stating_expressions(self, names: Sequence[str]) -> dict[str, JSON]:
        """Return the metadata with the classes written out, where fewer columns or rows would no longer tell them."""
        return {**self.metadata, "expressions": list(names)} if names else self.metadata

    def with_columns(self, columns: Mapping[str, ColumnLike]) -> FaceTable:
        """Return the table with ``columns`` added or replaced."""
        merged: dict[str, ColumnLike] = {name: self.column(name) for name in self.arrow.column_names}
        return FaceTable.from_columns({**merged, **columns}, self.root, self.metadata)

    def with_metadata(self, **entries: JSON) -> FaceTable:
        """Return the table with entries of its metadata added or replaced."""
        table = FaceTable(self.arrow, self.root, {**self.metadata, **entries}, self.path)
        table._restated = {**self._restated, **entries}
        return table

    def truth(self) -> FaceTable:
        """Return a predictions table with the true labels under their own names instead of the predicted columns.

        Raises:
            DataError: If no column starts with ``target_``.
        """
        true = {name.removeprefix(TARGET_PREFIX): name for name in self.names if name.startswith(TARGET_PREFIX)}
        if not true:
            raise DataError(f"the table has no column that starts with {TARGET_PREFIX}; it holds no true labels")
        kept = [name for name in self.arrow.column_names if name in _STRINGS - {"expression"} or name == "frame"]
        kept += [name for name in self.arrow.column_names if declared_type(name) is None and name not in true]
        columns = {name: self.column(name) for name in kept if name not in true}
        columns.update({name: self.column(stored) for name, stored in true.items()})
        found = FaceTable(pa.table(columns), self.root, {}).expressions
        known = (*self.expressions, *(name for name in found if name not in self.expressions))
        return FaceTable(pa.table(columns), self.root, self._stating_expressions(known))


def _reopened(path: Path, root: Path, restated: Mapping[str, JSON]) -> FaceTable:
    """Return a mapped table in another process, with the metadata that was changed after it was opened."""
    table = FaceTable.open(path, root)
    return table.with_metadata(**restated) if restated else table


def _indices(rows: np.ndarray) -> np.ndarray:
    rows = np.asarray(rows)
    if rows.dtype == bool:
        raise TypeError("rows are indices; turn a mask into indices by np.flatnonzero")
    return rows.astype(np.int64, copy=False)


def _as_text(name: str, column: pa.Array) -> pa.Array:
    if pa.types.is_string(column.type):
        return column
    try:
        return column.cast(pa.string())
    except (pa.ArrowInvalid, pa.ArrowNotImplementedError) as error:
        raise DataError(f"column {name} holds {column.type}, which cannot be read as text") from error


def _stored(schema: pa.Schema) -> dict:
    """Return what ``save`` left in a schema's metadata."""
    raw = (schema.metadata or {}).get(_SCHEMA_KEY)
    return {} if raw is None else json.loads(raw)
