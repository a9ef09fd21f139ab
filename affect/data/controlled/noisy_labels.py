# SPDX-License-Identifier: Apache-2.0
"""One rare yes-or-no label of Gaussian vectors, of whose positives coders missed a share: for label smoothing."""

from __future__ import annotations

import numpy as np

from affect.data.controlled.vectors import VectorImages, divide, vector_table
from affect.data.table import FaceTable

__all__ = ["images", "missed_positives"]

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
