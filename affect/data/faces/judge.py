# SPDX-License-Identifier: Apache-2.0
"""Judges the built-in faces by models that learnt from photographs.

Three questions, answered as numbers: is a drawn face found, do its points lie where such a model puts them, and do the
model's blendshapes rise with our action units? The finder is an argument (any object with ``find(image)`` that returns
observations with ``points`` in scheme 68 and, where it has them, ``blendshapes`` by name), so that the model that
the drawing was tuned with and one that never saw it are measured by the same code.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import replace
from types import MappingProxyType
from typing import Protocol

import numpy as np
from scipy.stats import spearmanr

from affect import labels
from affect.data.faces.dials import ACTION_UNITS, EXPRESSIONS, FaceDials
from affect.data.faces.geometry3d import coefficients
from affect.data.faces.render import render
from affect.data.faces.sample import Parameters, points_of, sample

BLENDSHAPES = MappingProxyType(
    {
        1: ("browInnerUp",),
        2: ("browOuterUpLeft", "browOuterUpRight"),
        4: ("browDownLeft", "browDownRight"),
        5: ("eyeWideLeft", "eyeWideRight"),
        6: ("eyeSquintLeft", "eyeSquintRight"),
        7: ("eyeSquintLeft", "eyeSquintRight"),
        9: ("noseSneerLeft", "noseSneerRight"),
        10: ("mouthUpperUpLeft", "mouthUpperUpRight"),
        12: ("mouthSmileLeft", "mouthSmileRight"),
        14: ("mouthDimpleLeft", "mouthDimpleRight"),
        15: ("mouthFrownLeft", "mouthFrownRight"),
        17: ("mouthShrugLower",),
        20: ("mouthStretchLeft", "mouthStretchRight"),
        23: ("mouthRollLower", "mouthRollUpper"),
        24: ("mouthPressLeft", "mouthPressRight"),
        25: ("mouthLowerDownLeft", "mouthLowerDownRight"),
        26: ("jawOpen",),
        43: ("eyeBlinkLeft", "eyeBlinkRight"),
    }
)
"""The teacher's coefficients that describe the same movement as an action unit; left and right are averaged."""

PARTNERS = MappingProxyType({26: {25: 3.0}})
"""Action units that are held at an intensity while another one is swept: a dropping jaw is seen by parted lips."""


class Observation(Protocol):
    """What a finder says of one face."""

    @property
    def points(self) -> np.ndarray:
        """Points of scheme 68 ``(68, 2)``, in pixels."""
        ...

    @property
    def blendshapes(self) -> Mapping[str, float] | None:
        """Coefficients by name, if the finder has them."""
        ...

    @property
    def pose(self) -> Sequence[float] | None:
        """Pitch, yaw and roll in degrees, if the finder has them."""
        ...


class Finder(Protocol):
    """Finds faces in a picture."""

    def find(self, image: np.ndarray) -> Sequence[Observation]:
        """Return the faces of an RGB uint8 image ``(H, W, 3)``."""
        ...


def _row(parameters: Parameters, k: int) -> Parameters:
    return {key: values[k] for key, values in parameters.items()}


def _best(found: Sequence[Observation], truth: np.ndarray) -> Observation | None:
    """Return the observation nearest to the drawn face, if any covers it."""
    if not found:
        return None
    near = min(found, key=lambda face: float(np.linalg.norm(np.asarray(face.points).mean(0) - truth.mean(0))))
    reach = np.linalg.norm(truth.max(0) - truth.min(0))
    return near if np.linalg.norm(np.asarray(near.points).mean(0) - truth.mean(0)) < 0.35 * reach else None


def judge_points(finder: Finder, dials: FaceDials, seed: int, count: int = 200) -> dict[str, float]:
    """Return how often drawn faces are found and how well the points agree.

    Args:
        finder: The judge.
        dials: What to draw; pose is narrowed to near-frontal faces (at most 20 degrees of pitch and yaw) and things
            in front of the face are left out.
        seed: Seed of the faces; report on one that was not looked at while tuning.
        count: Number of faces.

    Returns:
        ``detection_rate``; ``nme_mean``, ``nme_median``, ``nme_90`` (90th percentile) of the inner 51 points, as
        fractions of the distance between the outer corners of the eyes; ``count``; and ``pose_error_pitch``, ``…yaw``,
        ``…roll``: mean absolute differences in degrees, if the judge estimates the pose.
    """
    pitch, yaw = (tuple(np.clip(limits, -20.0, 20.0).tolist()) for limits in (dials.pitch, dials.yaw))
    dials = replace(dials, occluder=0.0, pitch=pitch, yaw=yaw)
    parameters = sample(dials, seed, np.arange(count))
    truth = points_of(parameters, dials.image_size)["68"]
    inner, errors, turned = list(labels.INNER_51), [], []
    for k in range(count):
        face = _best(finder.find(render(_row(parameters, k), dials)), truth[k])
        if face is not None:
            between = np.linalg.norm(truth[k, 36] - truth[k, 45])
            errors.append(np.linalg.norm(np.asarray(face.points)[inner] - truth[k, inner], axis=1).mean() / between)
            pose = getattr(face, "pose", None)
            if pose is not None:
                turned.append(np.abs(np.subtract(pose, [parameters[angle][k] for angle in labels.POSE_ANGLES])))
    found = np.array(errors) if errors else np.array([np.nan])
    return {
        "count": count,
        "detection_rate": len(errors) / count,
        "nme_mean": float(found.mean()),
        "nme_median": float(np.median(found)),
        "nme_90": float(np.quantile(found, 0.9)),
        **(
            {f"pose_error_{a}": float(e) for a, e in zip(labels.POSE_ANGLES, np.mean(turned, 0), strict=True)}
            if turned
            else {}
        ),
    }


def judge_action_units(
    finder: Finder, dials: FaceDials, seed: int, identities: int = 20, levels: Sequence[float] = (0, 1, 2, 3, 4, 5)
) -> dict[str, dict[str, float | list[float] | bool]]:
    """Return how the judge's blendshapes answer to each action unit alone, swept over frontal faces.

    Args:
        finder: A judge with blendshapes.
        dials: Size and camera of the pictures.
        seed: Seed of the people.
        identities: Number of people; every one shows every action unit at every level.
        levels: Intensities.

    Returns:
        By action unit (``AU12``): ``means`` per level, ``spearman`` between level and the means, ``spearman_within``
        (mean over people), ``rise`` from the first to the last level, ``monotone`` (means never fall, and rise by at
        least 0.01 in all), ``found`` (share of pictures with a face).
    """
    still = replace(
        dials, occluder=0.0, glasses=0.0, gaze=0.0, subjects=100_000, pitch=(0, 0), yaw=(0, 0), roll=(0, 0), shift=0.0
    )
    parameters = sample(still, seed, np.arange(identities))
    result: dict[str, dict[str, float | list[float] | bool]] = {}
    for column, au in enumerate(ACTION_UNITS):
        answers = np.full((identities, len(levels)), np.nan)
        for step, level in enumerate(levels):
            intensity = np.zeros((identities, len(ACTION_UNITS)), np.float32)
            intensity[:, column] = level
            for partner, held in PARTNERS.get(au, {}).items():
                intensity[:, ACTION_UNITS.index(partner)] = held
            moved = dict(parameters)
            moved["intensity"], moved["side"] = intensity, np.zeros_like(intensity)
            moved["coefficient"] = coefficients(
                parameters["identity"], intensity, np.zeros(identities), parameters["gaze_pitch"]
            )
            truth = points_of(moved, still.image_size)["68"]
            for k in range(identities):
                face = _best(finder.find(render(_row(moved, k), still)), truth[k])
                if face is not None and face.blendshapes:
                    answers[k, step] = np.mean([face.blendshapes[name] for name in BLENDSHAPES[au]])
        whole = answers[np.isfinite(answers).all(1)]
        means = whole.mean(0) if len(whole) else np.full(len(levels), np.nan)
        within = [spearmanr(levels, row).statistic for row in whole if np.ptp(row) > 0]
        result[labels.au_output(au)] = {
            "means": [round(float(value), 4) for value in means],
            "spearman": float(spearmanr(levels, means).statistic) if np.ptp(means) > 0 else 0.0,
            "spearman_within": float(np.mean(within)) if within else 0.0,
            "rise": float(means[-1] - means[0]),
            "monotone": bool((np.diff(means) >= 0).all() and means[-1] - means[0] >= 0.01),
            "found": float(np.isfinite(answers).mean()),
        }
    return result


def judge_expressions(
    classify: object, dials: FaceDials, seed: int, count: int = 160, names: Sequence[str] = EXPRESSIONS
) -> dict[str, float | dict[str, float]]:
    """Return how often a classifier that learnt from photographs names the drawn expression.

    Args:
        classify: Callable ``(image, points68) -> Mapping[str, float]`` from class names to scores.
        dials: What to draw; near-frontal, nothing in front.
        seed: Seed of the faces.
        count: Number of faces.
        names: Classes that the classifier knows; rows of other classes are left out.

    Returns:
        ``accuracy``, ``count``, ``recall`` by class and ``chance`` (one over the number of classes shown).
    """
    dials = replace(dials, occluder=0.0, pitch=(-10, 10), yaw=(-15, 15))
    parameters = sample(dials, seed, np.arange(count))
    truth = points_of(parameters, dials.image_size)["68"]
    hits: dict[str, list[bool]] = {}
    for k in range(count):
        name = EXPRESSIONS[parameters["expression"][k]]
        if name not in names:
            continue
        scores = classify(render(_row(parameters, k), dials), truth[k])  # type: ignore[operator]
        hits.setdefault(name, []).append(max(scores, key=scores.get) == name)
    everything = [hit for row in hits.values() for hit in row]
    return {
        "accuracy": float(np.mean(everything)) if everything else float("nan"),
        "count": len(everything),
        "chance": 1 / max(len(hits), 1),
        "recall": {name: float(np.mean(row)) for name, row in hits.items()},
    }


def judge(
    finder: Finder, dials: FaceDials | None = None, seed: int = 0, count: int = 200, identities: int = 20
) -> dict[str, object]:
    """Return every measurement that ``finder`` allows: points, and action units where it has blendshapes."""
    dials = FaceDials(image_size=256) if dials is None else dials
    result: dict[str, object] = {
        "seed": seed,
        "image_size": dials.image_size,
        "points": judge_points(finder, dials, seed, count),
    }
    if identities:
        units = judge_action_units(finder, dials, seed, identities)
        if any(np.isfinite(unit["means"]).all() for unit in units.values()):
            result["action_units"] = units
            result["monotone_count"] = sum(bool(unit["monotone"]) for unit in units.values())
    return result
