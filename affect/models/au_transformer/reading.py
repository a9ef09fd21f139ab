# SPDX-License-Identifier: Apache-2.0
"""Whether tokens look where they should, as numbers for controlled experiments: functions of ``results.json``."""

from __future__ import annotations

import math
from collections.abc import Mapping
from types import MappingProxyType
from typing import Any

import numpy as np

from affect.geometry.templates import FACE_68

LIPS = tuple(range(48, 68))
REGIONS = MappingProxyType(
    {
        "AU1": (20, 21, 22, 23),
        "AU2": (17, 18, 25, 26),
        "AU4": tuple(range(19, 25)),
        "AU5": (37, 38, 43, 44),
        "AU6": (36, 40, 41, 45, 46, 47),
        "AU7": tuple(range(36, 48)),
        "AU9": tuple(range(28, 36)),
        "AU10": (31, 33, 35, 50, 51, 52),
        "AU12": (48, 54),
        "AU14": (48, 54),
        "AU15": (48, 54),
        "AU17": (7, 8, 9, 57),
        "AU20": (48, 54),
        "AU23": LIPS,
        "AU24": LIPS,
        "AU25": LIPS,
        "AU26": (*LIPS, 8),
        "AU43": tuple(range(36, 48)),
    }
)
"""Points of scheme 68 at which an action unit is seen (after the Facial Action Coding System); the choice is ours."""


def mass_on_own_block(results: Mapping[str, Any], task: str = "attributes") -> float | None:
    """Return the mean share of attention that token t has on the t-th block of a square tiling of the grid.

    It is for ``affect.data.controlled.planted``; None for a model without attention.
    """
    found = (results["findings"].get("attention") or {}).get(task)
    if not found:
        return None
    maps = np.array(list(found.values()))
    blocks = math.ceil(math.sqrt(len(maps)))
    row, column = (np.indices(maps.shape[1:]).T * blocks // maps.shape[1:]).T
    own = row * blocks + column == np.arange(len(maps))[:, None, None]
    return float((maps * own).sum((1, 2)).mean())


def lift_on_landmarks(
    results: Mapping[str, Any], task: str = "au", radius: float = 0.1, others: bool = False
) -> float | None:
    """Return how much more attention tokens have on the landmarks of their action unit than evenly spread attention.

    1 is no preference. The region is the positions within ``radius`` (share of the crop's side) of a landmark of the
    mean face, which similarity crops are aligned to; a map's positions are taken finely, so that coarse grids count by
    area. The mean is over action units; None for a model without attention, or for crops that are not aligned.

    Args:
        results: Of the run.
        task: Task of action units.
        radius: Of the disc around each landmark.
        others: Take the landmarks of the other action units that share none with the token's own: the control, as
            tokens that look at faces rather than at what lies around them prefer every landmark.
    """
    found = (results["findings"].get("attention") or {}).get(task)
    recipe = (results.get("preprocess") or {}).get("recipe") or {}
    if not found or recipe.get("kind") != "similarity":
        return None
    margin = float(recipe["margin"])
    points = (FACE_68 + margin) / (1 + 2 * margin)
    fine = 8
    names = [name for name in found if name in REGIONS]
    lifts = []
    for name in names:
        attention = np.kron(np.array(found[name]), np.ones((fine, fine))) / fine**2
        height, width = attention.shape
        y, x = (np.indices((height, width)).T + 0.5).T / np.array([height, width])[:, None, None]
        apart = [other for other in names if not set(REGIONS[other]) & set(REGIONS[name])]
        for looked_at in apart if others else [name]:
            distance = np.stack([np.hypot(x - px, y - py) for px, py in points[list(REGIONS[looked_at])]]).min(0)
            region = distance <= radius
            lifts.append(attention[region].sum() / region.mean())
    return float(np.mean(lifts)) if lifts else None
