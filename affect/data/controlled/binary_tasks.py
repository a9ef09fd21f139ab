# SPDX-License-Identifier: Apache-2.0
"""Yes-or-no tasks whose best order is known: the parity chain, and the dyadic intervals of MONET's toy."""

from __future__ import annotations

import numpy as np

from affect.data.controlled.vectors import VectorImages, divide, vector_table
from affect.data.table import FaceTable

__all__ = ["dyadic", "images", "parity_chain"]

LOW, HIGH = -2.0, 2.0
"""Range of all numbers."""


def parity_chain(
    tasks: int = 6, train: int = 2000, validation: int = 500, test: int = 2000, seed: int = 0
) -> FaceTable:
    """Return vectors of independent signs, with magnitudes uniform in [0.3, 1.7]; label i is a parity.

    Label i says whether the number of positive entries among the first i is odd. From nothing known each label is a
    parity of i signs; given the label before it is one of two: the natural order alone makes every step easy.

    Args:
        tasks: Number of entries and labels.
        train: Training rows.
        validation: Rows that select.
        test: Test rows.
        seed: Seed of the draw.
    """
    random = np.random.default_rng((seed, 1))
    count = train + validation + test
    positive = random.random((count, tasks)) < 0.5
    vectors = np.where(positive, 1, -1) * random.uniform(0.3, 1.7, (count, tasks))
    labels = np.cumsum(positive, 1) % 2
    names = [f"parity_{k + 1}" for k in range(tasks)]
    return vector_table(vectors, labels, divide(train, validation, test), names, "parity_chain", "arithmetic")


def dyadic(
    tasks: int = 4, first: int = 0, train: int = 500, validation: int = 500, test: int = 500, seed: int = 0
) -> FaceTable:
    """Return points of a square; label i alternates over 2^(first + i) equal intervals of the first coordinate.

    With ``s`` the first coordinate in [0, 1], label i is 1 where ``ceil(s 2^i) - 1`` is even: intervals are closed on
    the right and the first is positive. The labels before locate a point in one interval, where the next is a single
    threshold. Points are standardised by the training part's mean and deviation (Tallec et al., arXiv 2202.00446).

    Args:
        tasks: Number of labels.
        first: Labels begin with 2^(first + 1) intervals; more than 0 is harder.
        train: Training rows.
        validation: Rows that select.
        test: Test rows.
        seed: Seed of the draw.
    """
    random = np.random.default_rng((seed, 2))
    points = random.uniform(-1, 1, (train + validation + test, 2))
    share = (points[:, :1] + 1) / 2
    labels = (np.ceil(share * 2.0 ** np.arange(first + 1, first + tasks + 1)) - 1) % 2 == 0
    known = points[:train]
    vectors = (points - known.mean(0)) / known.std(0)
    names = [f"dyadic_{first + k + 1}" for k in range(tasks)]
    return vector_table(vectors, labels, divide(train, validation, test), names, "dyadic", "arithmetic")


def images(table: FaceTable) -> VectorImages:
    """Return the reader of the vectors' images."""
    return VectorImages(table, LOW, HIGH)
