# SPDX-License-Identifier: Apache-2.0
"""The judge measures what it says, shown with judges whose answers are known."""

from __future__ import annotations

from dataclasses import dataclass, replace

import numpy as np
import pytest

from affect.data.faces.dials import EXPRESSIONS, FaceDials
from affect.data.faces.judge import BLENDSHAPES, judge, judge_action_units, judge_expressions, judge_points
from affect.data.faces.sample import points_of, sample

DIALS = FaceDials(image_size=64)


@dataclass
class Seen:
    points: np.ndarray
    blendshapes: dict[str, float] | None = None


class Knowing:
    """Finds every second face, a known distance off."""

    def __init__(self, dials: FaceDials, seed: int, count: int, offset: float) -> None:
        self.points = points_of(sample(dials, seed, np.arange(count)), dials.image_size)["68"]
        self.offset, self.calls = offset, -1

    def find(self, image: np.ndarray) -> list[Seen]:
        self.calls += 1
        assert image.shape == (64, 64, 3)
        if self.calls % 2:
            return []
        points = self.points[self.calls]
        eye = np.linalg.norm(points[36] - points[45])
        return [Seen(points + 500), Seen(points + np.array([self.offset * eye, 0]))]


def test_points_are_judged_by_rate_and_error() -> None:
    dials = replace(DIALS, occluder=0.0, pitch=(-12, 12), yaw=(-20, 20))
    result = judge_points(Knowing(dials, 3, 10, 0.05), DIALS, 3, 10)
    assert result["detection_rate"] == 0.5
    assert result["nme_mean"] == pytest.approx(0.05, abs=1e-4)
    assert result["nme_90"] == pytest.approx(0.05, abs=1e-4)


class Bright:
    """Answers with the darkness of the middle of the picture for every blendshape."""

    def find(self, image: np.ndarray) -> list[Seen]:
        dark = 1 - image[40:52, 24:40].mean() / 255
        points = np.full((68, 2), 31.5)
        points[::2, 1] = 36
        return [Seen(points, dict.fromkeys((name for row in BLENDSHAPES.values() for name in row), float(dark)))]


def test_action_units_are_swept() -> None:
    result = judge_action_units(Bright(), DIALS, 1, identities=2, levels=(0, 2.5, 5))
    assert set(result) == {f"AU{au}" for au in BLENDSHAPES}
    jaw = result["AU26"]
    assert len(jaw["means"]) == 3
    assert jaw["monotone"]
    assert jaw["spearman"] == pytest.approx(1)
    assert jaw["rise"] > 0.02
    assert not result["AU5"]["monotone"]


def test_expressions_are_judged_by_accuracy() -> None:
    chosen = judge_expressions(lambda image, points: {"neutral": 1.0, "anger": 0.5}, DIALS, 1, 40, ("neutral", "anger"))
    assert chosen["recall"] == {"neutral": 1.0, "anger": 0.0}
    truth = sample(replace(DIALS, occluder=0, pitch=(-10, 10), yaw=(-15, 15)), 1, np.arange(40))["expression"]
    neutral, anger = ((truth == EXPRESSIONS.index(name)).sum() for name in ("neutral", "anger"))
    assert chosen["count"] == neutral + anger
    assert chosen["accuracy"] == pytest.approx(neutral / (neutral + anger))


def test_a_judge_without_blendshapes_judges_points_only() -> None:
    result = judge(Knowing(replace(DIALS, occluder=0.0, yaw=(-20, 20)), 3, 12, 0.0), DIALS, 3, count=4, identities=0)
    assert set(result) == {"seed", "image_size", "points"}
