# SPDX-License-Identifier: Apache-2.0
"""Built-in faces of which few have many points and many have few: how far do coarse annotations help fine ones?

Every training face is annotated in the fine scheme or in the coarse ones, as when data sets with different points are
joined. Validation and test faces, other people, have the points of all schemes.
"""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np

from affect import labels
from affect.data.faces import FaceDials
from affect.data.layouts import faces
from affect.data.table import FaceTable
from affect.errors import ConfigError, near

__all__ = ["few_fine_faces"]

UNUSED = "unused"
"""Part of the training people's faces that nobody annotated."""


def few_fine_faces(
    dials: FaceDials,
    seed: int = 0,
    count: int = 3000,
    train: float = 0.6,
    validation: float = 0.1,
    fine: int = 50,
    coarse: int | None = None,
    fine_scheme: str = "98",
    coarse_schemes: Sequence[str] = ("68", "5"),
) -> FaceTable:
    """Return built-in faces with ``fine`` finely and ``coarse`` coarsely annotated training faces.

    Which faces these are follows from the seed alone: with another number of coarse ones the fine ones stay the same,
    and a smaller number of either is a part of a larger one. Points of schemes that are neither fine nor coarse are
    left out. Columns besides those of the faces: ``part``, and ``share``, a weight under which fine and coarse faces
    have equal shares of an epoch (``data.sampling.kind=weighted``).

    Args:
        dials: What is drawn.
        seed: Seed of the faces, of the division of people, and of which faces are annotated.
        count: Number of faces, of which some are not used.
        train: Share of the people whose faces train.
        validation: Share of the people that select; the others test.
        fine: Training faces with the points of ``fine_scheme`` and no others.
        coarse: Training faces with the points of ``coarse_schemes`` and no others; None takes all that are left.
        fine_scheme: Key of ``affect.labels.SCHEMES``.
        coarse_schemes: Such keys.

    Raises:
        ConfigError: If a share is none, a scheme is not one of the faces' or fine and coarse at once, or the training
            people have fewer faces than are asked for.
    """
    for key, value in (("train", train), ("validation", validation), ("train + validation", train + validation)):
        if not 0 <= value <= 1:
            raise ConfigError(f"dataset.{key}={value}: a share between 0 and 1 is needed")
    table = faces.read(dials, seed, count)
    drawn = [name for name, scheme in labels.SCHEMES.items() if scheme.column in table.names]
    fine_scheme, coarse_schemes = str(fine_scheme), [str(name) for name in coarse_schemes]
    for name in (fine_scheme, *coarse_schemes):
        if name not in drawn:
            raise ConfigError(f"dataset: the built-in faces have no scheme {name!r}; {near(name, drawn)}")
    if fine_scheme in coarse_schemes:
        raise ConfigError(f"dataset.coarse_schemes={coarse_schemes}: {fine_scheme} is the fine scheme")
    random = np.random.default_rng((seed, 7))
    codes, people = table.codes("subject")
    place = random.permutation(len(people)) / max(len(people), 1)
    names = np.where(place < train, "train", np.where(place < train + validation, "validation", "test"))
    parts = names[codes].astype(object)
    training = random.permutation(np.flatnonzero(parts == "train"))
    wanted = fine + (coarse or 0)
    if min(fine, coarse or 0) < 0 or wanted > len(training):
        raise ConfigError(
            f"dataset: fine={fine} and coarse={coarse} faces of {len(training)} that the training people have; raise "
            "dataset.count"
        )
    finely = training[:fine]
    coarsely = training[fine:] if coarse is None else training[fine:wanted]
    used = np.zeros(len(table), bool)
    used[finely] = used[coarsely] = True
    parts[(parts == "train") & ~used] = UNUSED
    share = np.zeros(len(table), np.float32)
    for chosen in (finely, coarsely):
        share[chosen] = 1 / max(len(chosen), 1)
    columns: dict = {"part": parts.tolist(), "share": (share, used)}
    for name in drawn:
        column = labels.SCHEMES[name].column
        values, known = table.numbers(column)
        hidden = finely if name in coarse_schemes else coarsely if name == fine_scheme else np.arange(len(table))
        known = known.copy()
        known[hidden] = False
        columns[column] = values, known
    return table.with_columns(columns).with_metadata(dataset="few_fine")
