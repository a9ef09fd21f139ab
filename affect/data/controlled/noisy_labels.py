# SPDX-License-Identifier: Apache-2.0
"""Wrong labels in the training and validation part, and a clean test part: for label smoothing and quantization.

Where a label was recorded wrongly, a column with the prefix ``true_`` holds what it should have been.
"""

from __future__ import annotations

import numpy as np
import pyarrow as pa

from affect.data.controlled.digits import handwritten_digits
from affect.data.controlled.vectors import PREFIX, VectorImages, divide, vector_table
from affect.data.faces import FaceDials
from affect.data.layouts import faces
from affect.data.table import FaceTable
from affect.errors import ConfigError, DataError

__all__ = ["digit_images", "images", "missed_positives", "noisy_digits", "noisy_faces"]

TRUE_PREFIX = "true_"
"""Prefix of the columns of labels as they should have been recorded."""

LIMIT = 6.0
"""Largest number that is stored; larger draws are cut off."""


def missed_positives(
    features: int = 10,
    slope: float = 4.0,
    offset: float = -5.0,
    missed: float = 0.3,
    train: int = 4000,
    validation: int = 1000,
    test: int = 20_000,
    seed: int = 0,
) -> FaceTable:
    """Return standard Gaussian vectors with the label ``rare``, drawn from a logistic posterior along one direction.

    With the default numbers 12.5 % are positive. In the training and validation part a share of the positives is
    recorded as negative; the test part is clean.

    Args:
        features: Numbers of a vector.
        slope: Slope of the posterior's logit along the direction.
        offset: The posterior's logit at the origin.
        missed: Share of positives that is recorded as negative.
        train: Training rows.
        validation: Rows that select.
        test: Test rows.
        seed: Seed of the draw.
    """
    random = np.random.default_rng((seed, 3))
    count = train + validation + test
    direction = random.normal(size=features)
    vectors = np.clip(random.normal(size=(count, features)), -LIMIT, LIMIT)
    logit = slope * (vectors @ (direction / np.linalg.norm(direction))) + offset
    label = random.random(count) < 1 / (1 + np.exp(-logit))
    lost = (random.random(count) < missed) & (np.arange(count) < train + validation)
    parts = divide(train, validation, test)
    return vector_table(vectors, (label & ~lost)[:, None], parts, ["rare"], "missed_positives", "arithmetic")


def images(table: FaceTable) -> VectorImages:
    """Return the reader of the vectors' images."""
    return VectorImages(table, -LIMIT, LIMIT)


def noisy_digits(
    noise: float = 0.4, train: int = 800, validation: int = 200, test: int = 797, seed: int = 0
) -> FaceTable:
    """Return real handwritten digits whose labels were redrawn uniformly in the training and validation part.

    The drawings are those of ``affect.data.controlled.digits``. Columns: ``x0`` to ``x63`` (grey levels 0 to 16 row by
    row), ``digit`` (as recorded), ``true_digit``, ``drawing`` (number among the 1,797).

    Args:
        noise: Share of labels that is redrawn; one in ten of these comes out right.
        train: Training rows.
        validation: Rows that select.
        test: Test rows, whose labels are right.
        seed: Seed of the division and of the wrong labels.

    Raises:
        ConfigError: If scikit-learn is not installed, or ``noise`` is no share.
        DataError: If there are not so many drawings.
    """
    _check_share("noise", noise)
    drawings, digits = handwritten_digits("noisy_digits")
    parts = divide(train, validation, test)
    if len(parts) > len(drawings):
        raise DataError(f"digits: {len(parts)} drawings were asked for, and there are {len(drawings)}")
    random = np.random.default_rng((seed, 5))
    chosen = random.permutation(len(drawings))[: len(parts)]
    true = digits[chosen]
    # Drawn for all rows whatever the share, so that more noise only adds wrong labels.
    redrawn = (random.random(len(parts)) < noise) & (parts != "test")
    recorded = np.where(redrawn, random.integers(0, 10, len(parts)), true)
    vectors = drawings[chosen].reshape(len(parts), -1).astype(np.float32)
    columns: dict = {
        "image": [f"digits/{drawing:04d}" for drawing in chosen],
        "part": parts.tolist(),
        "drawing": chosen.astype(np.int64),
        "digit": [str(digit) for digit in recorded],
        f"{TRUE_PREFIX}digit": [str(digit) for digit in true],
    }
    columns |= {f"{PREFIX}{k}": vectors[:, k] for k in range(vectors.shape[1])}
    return FaceTable.from_columns(columns, ".", {"dataset": "noisy_digits", "label_source": "handwriting"})


def digit_images(table: FaceTable) -> VectorImages:
    """Return the reader of the drawings as vectors of 64 grey levels."""
    return VectorImages(table, 0, 16)


def noisy_faces(
    dials: FaceDials,
    seed: int = 0,
    count: int = 1400,
    train: float = 0.45,
    validation: float = 0.15,
    noise: float = 0.2,
) -> FaceTable:
    """Return built-in faces of whose action unit labels a share is flipped in the training and validation part.

    Columns besides those of the faces: ``part``, ``true_auNN_occurrence``.

    Args:
        dials: What is drawn; its own noise on occurrence has to be off.
        seed: Seed of the faces, the division and the wrong labels.
        count: Number of faces.
        train: Share of the people that train.
        validation: Share of the people that select; the others test, with labels that are right.
        noise: Probability that a label is flipped.

    Raises:
        ConfigError: If a share is none, or the dials disturb the labels too.
    """
    for key, value in (("train", train), ("validation", validation), ("train + validation", train + validation)):
        _check_share(key, value)
    _check_share("noise", noise)
    if np.any(np.asarray(dials.au_flip) > 0) or np.any(np.asarray(dials.au_missed) > 0):
        raise ConfigError("dataset.dials: au_flip and au_missed disturb the test part too; set them to 0, and noise")
    table = faces.read(dials, seed, count)
    random = np.random.default_rng((seed, 6))
    codes, people = table.codes("subject")
    place = random.permutation(len(people)) / max(len(people), 1)
    names = np.where(place < train, "train", np.where(place < train + validation, "validation", "test"))
    parts = names[codes]
    columns: dict = {"part": parts.tolist()}
    for name in sorted(name for name in table.names if name.startswith("au") and name.endswith("_occurrence")):
        true, known = table.numbers(name)
        flipped = (random.random(count) < noise) & (parts != "test")
        recorded = pa.array(np.where(flipped, 1 - true, true).astype(np.float32), mask=~known)
        columns |= {name: recorded, f"{TRUE_PREFIX}{name}": table.column(name)}
    noted = "parameters of drawn faces, a share of them flipped; never a result on people"
    return table.with_columns(columns).with_metadata(dataset="noisy_faces", label_source=noted)


def _check_share(key: str, value: float) -> None:
    if not 0 <= value <= 1:
        raise ConfigError(f"dataset.{key}={value}: a share between 0 and 1 is needed")
