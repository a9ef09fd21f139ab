# SPDX-License-Identifier: Apache-2.0
"""Built-in faces whose test part is drawn otherwise: a shortcut that breaks, labels that only training has noisy."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa

from affect.data.faces import FaceDials, labels_table
from affect.data.images import ImageReader
from affect.data.layouts import faces
from affect.data.table import FaceTable
from affect.errors import ConfigError, near
from affect.labels import EXPRESSION_ORDERS

__all__ = ["images", "shifted_faces"]

TEST_SEED = 1_000_003
"""Added to the seed of the test part, so that its people are others."""


def shifted_faces(
    dials: FaceDials,
    test_dials: Mapping[str, Any] | None = None,
    seed: int = 0,
    count: int = 3000,
    test_count: int = 1500,
    same_people: bool = False,
) -> FaceTable:
    """Return built-in faces with the parts ``train`` and ``test``; labels of the test part are the true ones.

    Args:
        dials: What is drawn for training, and how its labels are disturbed.
        test_dials: Dials that differ in the test part.
        seed: Seed of the set.
        count: Faces for training (of which the protocol holds people out for validation).
        test_count: Faces of the test part.
        same_people: Whether the test part shows the people of the training part; by default it shows others.

    Raises:
        ConfigError: If a dial is unknown.
    """
    other = _test_dials(dials, test_dials)
    train = labels_table(dials, seed, count)
    test = labels_table(other, _test_seed(seed, same_people), test_count, first=count, clean=True)
    if not same_people:
        names = pa.array([f"test_{name}" for name in test["subject"].to_pylist()], pa.string())
        test = test.set_column(test.schema.get_field_index("subject"), "subject", names)
    parts = pa.array(np.repeat(["train", "test"], [count, test_count]), pa.string())
    plain = [part.replace_schema_metadata(None) for part in (train, test)]
    joined = pa.concat_tables(plain).combine_chunks().append_column("part", parts)
    metadata = {
        "dataset": "shifted_faces",
        "identities": f"faces-{seed}",
        "expressions": list(EXPRESSION_ORDERS["faces"]),
        "label_source": "parameters of drawn faces; never a result on people",
    }
    return FaceTable.from_arrow(joined, ".", metadata)


def images(
    dials: FaceDials,
    test_dials: Mapping[str, Any] | None = None,
    seed: int = 0,
    count: int = 3000,
    test_count: int = 1500,
    same_people: bool = False,
    cache: str | Path | None = None,
) -> ShiftedImages:
    """Return the reader of the images; arguments as in ``shifted_faces``.

    Args:
        dials: What is drawn for training.
        test_dials: Dials that differ in the test part.
        seed: Seed of the set.
        count: Faces for training.
        test_count: Faces of the test part.
        same_people: Whether the test part shows the people of the training part.
        cache: Folder that keeps drawn images for later epochs and runs; None draws them each time.
    """
    other = _test_dials(dials, test_dials)
    train = faces.images(dials, seed, count, cache)
    test = faces.images(other, _test_seed(seed, same_people), count + test_count, cache)
    return ShiftedImages(train, test, count)


class ShiftedImages:
    """Images of which the first come from one reader and the others from another.

    Args:
        train: Reader of the first images.
        test: Reader of the others, by the same indices.
        count: Number of the first images.
    """

    def __init__(self, train: ImageReader, test: ImageReader, count: int) -> None:
        self.train, self.test, self.count = train, test, int(count)

    def read(self, rows: np.ndarray) -> list[np.ndarray]:
        """Return the images of ``rows``, each RGB uint8 ``(S, S, 3)``."""
        rows = np.asarray(rows, np.int64).reshape(-1)
        first = rows < self.count
        found = [iter(reader.read(rows[chosen])) for reader, chosen in ((self.train, first), (self.test, ~first))]
        return [next(found[0] if of_training else found[1]) for of_training in first]


def _test_dials(dials: FaceDials, changed: Mapping[str, Any] | None) -> FaceDials:
    names = set(FaceDials.__dataclass_fields__)
    for name in changed or {}:
        if name not in names:
            raise ConfigError(f"dataset.test_dials.{name}: no such dial; {near(str(name), names)}")
    return replace(dials, **{str(name): value for name, value in (changed or {}).items()})


def _test_seed(seed: int, same_people: bool) -> int:
    return seed if same_people else seed + TEST_SEED
