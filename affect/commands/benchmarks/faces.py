# SPDX-License-Identifier: Apache-2.0
"""How fast the built-in faces are drawn, and how models that learnt from photographs judge them."""

from __future__ import annotations

import time
from collections.abc import Mapping
from typing import Any

import numpy as np

from affect.data.faces import FaceDials, FaceImages, judge
from affect.errors import ConfigError
from affect.geometry import FaceApiFinder, FaceObservation, MediapipeFinder

SEED = 2026
"""Seed of the judged faces; drawing was tuned on other seeds."""


def speed(side: int, count: int, rounds: int) -> float:
    """Return faces per second at ``side`` pixels on this thread, the best of ``rounds``."""
    images = FaceImages(FaceDials(image_size=side), seed=1)
    images.read(np.arange(8))
    best = 0.0
    for k in range(rounds):
        start = time.perf_counter()
        images.read(np.arange(k * count, (k + 1) * count))
        best = max(best, count / (time.perf_counter() - start))
    return best


def measure(quick: bool) -> list[dict[str, Any]]:
    """Return rows of figure, value and judge: speed, then what each judge says where its package is installed."""
    count, rounds = (20, 1) if quick else (200, 5)
    rows = [_row(f"faces/s at {side} px, one thread", speed(side, count, rounds), "clock") for side in (96, 128, 224)]
    faces, people = (10, 2) if quick else (200, 20)
    try:
        with MediapipeFinder() as finder:
            rows += _points(judge.judge_points(finder, FaceDials(image_size=256), SEED, faces), "MediaPipe")
            units = judge.judge_action_units(finder, FaceDials(image_size=256), SEED, people)
            rising = [name for name, unit in units.items() if unit["monotone"]]
            rows.append(
                _row(
                    f"blendshapes that rise monotonically with our action unit, of {len(units)}",
                    len(rising),
                    "MediaPipe",
                )
            )
            for name, unit in units.items():
                verdict = "monotone" if unit["monotone"] else "not monotone"
                rows.append(_row(f"{name}: rise from 0 to 5", float(unit["rise"]), f"MediaPipe, {verdict}"))  # type: ignore[arg-type]
    except ConfigError as error:
        rows.append(_row(str(error), None, "MediaPipe"))
    finder_api = FaceApiFinder()
    rows += _points(judge.judge_points(finder_api, FaceDials(image_size=256), SEED, faces), "face-api (not tuned with)")
    rows += _expressions(finder_api, faces)
    return rows


def _row(figure: str, value: float | None, judged_by: str) -> dict[str, Any]:
    return {"figure": figure, "value": value, "judge": judged_by}


def _points(found: Mapping[str, float], judged_by: str) -> list[dict[str, Any]]:
    return [
        _row("near-frontal faces found", found["detection_rate"], judged_by),
        _row("NME of the inner 51 points, % of outer eye distance, mean", 100 * found["nme_mean"], judged_by),
        _row("… median", 100 * found["nme_median"], judged_by),
    ]


def _expressions(finder: FaceApiFinder, count: int) -> list[dict[str, Any]]:
    """Return how often face-api names the drawn expression, in all and by class."""
    from affect.geometry.faceapi import EXPRESSIONS

    def classify(image: np.ndarray, points: np.ndarray) -> dict[str, float]:
        box = np.concatenate([points.min(0), points.max(0)]).astype(np.float64)
        scores = finder.expressions(image, [FaceObservation(box=box, score=1.0, points=points.astype(np.float64))])
        return dict(zip(EXPRESSIONS, np.asarray(scores)[0].tolist(), strict=True))

    found = judge.judge_expressions(classify, FaceDials(image_size=256), SEED, count, EXPRESSIONS)
    recall = found["recall"]
    assert isinstance(recall, dict)
    rows = [_row(f"drawn expression named (chance {found['chance']:.2f})", float(found["accuracy"]), "face-api")]  # type: ignore[arg-type]
    return rows + [_row(f"… {name}", value, "face-api") for name, value in recall.items()]
