# SPDX-License-Identifier: Apache-2.0
"""Tasks of known noise on the same vectors, for uncertainty weighting: are learned deviations those of the noise?

Numbers are linear in a few shared, curved features of the vector, on scales of their own, plus Gaussian noise; one
yes-or-no label is a sign, of which a share is turned. Training and validation labels are noisy, the test part is clean,
so that an error there is a distance from the truth.
"""

from __future__ import annotations

from collections.abc import Mapping

import numpy as np

from affect.data.controlled.vectors import VectorImages, divide, vector_table
from affect.data.table import FaceTable
from affect.errors import ConfigError

__all__ = ["images", "noisy_tasks"]

LIMIT = 4.0
"""Largest number of a vector; larger draws are cut off."""

FEATURES = 4
"""Shared features that all tasks are linear in."""


def noisy_tasks(
    numbers: Mapping[str, Mapping[str, float]],
    features: int = 8,
    turned: float = 0.1,
    train: int = 4000,
    validation: int = 500,
    test: int = 4000,
    seed: int = 0,
) -> FaceTable:
    """Return standard Gaussian vectors with numbers ``y_<name>`` and the label ``attribute_sign``.

    A number is ``scale * t + noise * n``, where t has unit variance over the rows and n is standard normal.

    Args:
        numbers: By name ``scale`` (deviation of the truth) and ``noise`` (deviation of what is added to it).
        features: Numbers of a vector.
        turned: Share of the yes-or-no labels that are turned.
        train: Training rows.
        validation: Rows that select.
        test: Test rows.
        seed: Seed of vectors, truth and noise.

    Raises:
        ConfigError: If there is no number, a deviation is negative, or ``turned`` does not lie in [0, 0.5].
    """
    if not numbers:
        raise ConfigError("dataset.numbers is empty: name at least one, {name: {scale: 1.0, noise: 0.1}}")
    for name, told in numbers.items():
        if set(told) != {"scale", "noise"} or told["scale"] <= 0 or told["noise"] < 0:
            raise ConfigError(f"dataset.numbers.{name}: needs scale > 0 and noise >= 0, found {dict(told)}")
    if not 0 <= turned <= 0.5:
        raise ConfigError(f"dataset.turned={turned}: must lie in [0, 0.5]")
    random = np.random.default_rng((seed, 8))
    parts = divide(train, validation, test)
    count, noisy = len(parts), parts != "test"
    vectors = np.clip(random.normal(size=(count, features)), -LIMIT, LIMIT)
    shared = np.sin(1.5 * vectors @ random.normal(size=(features, FEATURES)) / np.sqrt(features))
    columns = {}
    for name, told in numbers.items():
        truth = shared @ random.normal(size=FEATURES)
        truth = (truth - truth.mean()) / truth.std()
        drawn = random.normal(size=count)
        columns[f"y_{name}"] = (told["scale"] * truth + told["noise"] * drawn * noisy).astype(np.float32)
    sign = shared @ random.normal(size=FEATURES) > 0
    wrong = (random.random(count) < turned) & noisy
    table = vector_table(vectors, (sign ^ wrong)[:, None], parts, ["sign"], "noisy_tasks", "arithmetic")
    return table.with_columns(columns)


def images(table: FaceTable) -> VectorImages:
    """Return the reader of the vectors' images."""
    return VectorImages(table, -LIMIT, LIMIT)
