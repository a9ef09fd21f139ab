# SPDX-License-Identifier: Apache-2.0
"""Your own labels: a CSV, Parquet or Arrow file beside a folder of images.

Layout on disk::

    my_faces/
    ├── labels.csv            one line per image; any name, also .tsv, .parquet, .arrow
    ├── anna/0001.jpg         whatever the column `image` names
    └── ben/0001.jpg

Columns, all optional but ``image``; an empty cell is a missing label (``docs/architecture.md`` has every type)::

    image                        path relative to the root (by default the table's folder)
    subject, sequence, frame     person, video, number within the video
    part                         official part (train, test, …) where there is one
    auNN_occurrence              0 or 1, or a probability
    auNN_intensity               0 to 5
    expression                   class name; happy, sad, angry and the like are understood
    expression_<class>           probability of a class, instead of or beside one name
    valence, arousal             -1 to 1
    pose_pitch, _yaw, _roll      degrees
    attribute_<name>             0 or 1
    box_x1, _y1, _x2, _y2        face box in pixels (in Parquet one column `box` of four numbers)
    landmarks_68_x0, _y0, …      points in pixels, first pixel centre at 0 (in Parquet one column of lists)
    any other                    kept, usable as `group_by` and as the group of the split

A predictions table that ``affect`` wrote is such a table: predicted columns carry the label names, the true labels the
prefix ``target_``.
"""

from __future__ import annotations

import logging
from pathlib import Path

import numpy as np
import pyarrow as pa

from affect import labels
from affect.data.images import NO_SUBJECT, FileImages
from affect.data.table import TARGET_PREFIX, FaceTable
from affect.errors import ConfigError, DataError

__all__ = ["canonical_expressions", "read", "write"]

_log = logging.getLogger(__name__)


def read(table: str | Path, root: str | Path | None = None, check_images: bool = True) -> FaceTable:
    """Return the face table in a file, with expression names in the package's spelling.

    Args:
        table: CSV (``.csv``, ``.tsv``, ``.txt``), Parquet (``.parquet``, ``.pq``) or Arrow IPC file
            (``.arrow``, ``.feather``, ``.ipc``).
        root: Folder that the column ``image`` is relative to; None takes what the file says, or else its folder.
        check_images: Whether every image file has to exist.

    Raises:
        DataError: If the file cannot be read, a cell is not what its column declares, or images are missing.
        ConfigError: If the file's ending is none of these.
    """
    path = Path(table)
    ending = path.suffix.lower()
    if ending in (".csv", ".tsv", ".txt"):
        faces = FaceTable.read_csv(path, root)
    elif ending in (".parquet", ".pq"):
        faces = FaceTable.read_parquet(path, root)
    elif ending in (".arrow", ".feather", ".ipc"):
        faces = FaceTable.open(path, root)
    else:
        raise ConfigError(f"table={path}: unknown ending {ending!r}; write .csv, .tsv, .parquet or .arrow")
    if not len(faces):
        raise DataError(f"{path}: the table has no rows")
    faces = canonical_expressions(faces)
    if check_images:
        FileImages(faces).require_files()
    if "subject" not in faces.names:
        _log.warning("%s: %s", path, NO_SUBJECT)
    return faces


def write(table: FaceTable, path: str | Path) -> None:
    """Write a face table as CSV, Parquet or Arrow IPC, by the ending of ``path``."""
    path = Path(path)
    ending = path.suffix.lower()
    if ending == ".csv":
        table.to_csv(path)
    elif ending in (".parquet", ".pq"):
        table.to_parquet(path)
    elif ending in (".arrow", ".feather", ".ipc"):
        table.save(path)
    else:
        raise ConfigError(f"{path}: unknown ending {ending!r}; write .csv, .parquet or .arrow")


def canonical_expressions(table: FaceTable) -> FaceTable:
    """Return the table with expression classes, in cells and in column names, as ``labels.canonical_expression``."""
    columns: dict[str, pa.Array] = {}
    changed = False
    for name in table.arrow.column_names:
        column = table.column(name)
        prefix = TARGET_PREFIX if name.startswith(TARGET_PREFIX) else ""
        plain = name.removeprefix(prefix)
        if plain == "expression":
            codes, classes = table.codes(name)
            known = [labels.canonical_expression(value) for value in classes]
            if known != list(classes):
                # An empty name is no class: its cells are missing.
                values = np.array([*(value or None for value in known), None], dtype=object)[codes]
                column, changed = pa.array(values, pa.string()), True
        elif plain.startswith("expression_"):
            new = prefix + labels.expression_column(labels.canonical_expression(plain.removeprefix("expression_")))
            changed |= new != name
            name = new
        if name in columns:
            raise DataError(f"column {name} occurs twice under two spellings of the class; keep one")
        columns[name] = column
    if not changed:
        return table
    changed_table = FaceTable.from_columns(columns, table.root, table.metadata)
    if not table.metadata.get("expressions"):
        return changed_table
    return changed_table.with_metadata(expressions=[labels.canonical_expression(name) for name in table.expressions])
