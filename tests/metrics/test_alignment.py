# SPDX-License-Identifier: Apache-2.0
from __future__ import annotations

import math

import numpy as np
import pytest
import torch

from affect.errors import ConfigError, DataError
from affect.labels import SCHEMES
from affect.metrics import AlignmentError
from affect.metrics.alignment import image_errors, normaliser_length
from tests.metrics.contract import MetricContract, numbers

EVERY = torch.ones(1, 68) > 0


class TestBetweenEyeCorners(MetricContract):
    outputs = tuple(f"{axis}_{k}" for k in range(68) for axis in "xy")
    normaliser = "inter_ocular"

    def make(self):
        return AlignmentError("68", self.normaliser, 8.0)

    def draw(self, generator):
        shape = 100 + 30 * torch.randn(68, 2, generator=generator, dtype=torch.float64)
        shape[36:42] += torch.tensor([-60.0, -40.0])
        shape[42:48] += torch.tensor([60.0, -40.0])
        target = shape + 3 * torch.randn(self.samples, 68, 2, generator=generator, dtype=torch.float64)
        noise = torch.randn(self.samples, 68, 2, generator=generator, dtype=torch.float64)
        values = target + noise * 10 * torch.rand(self.samples, 1, 1, generator=generator, dtype=torch.float64)
        mask = torch.rand(self.samples, 68, generator=generator) < 0.99
        mask[:3] = False
        target[5, 36] = target[5, 45]  # a face without eye distance
        return values, target, mask

    def length(self, points, known):
        if not (known[36] and known[45]):
            return 0.0
        return math.dist(points[36], points[45])

    def test_agrees_with_the_reference(self, data):
        values, target, mask = (tensor.numpy() for tensor in data)
        errors, skipped = [], 0
        for predicted, points, known in zip(values, target, mask, strict=True):
            if not known.any():
                continue
            d = self.length(points, known)
            if d == 0:
                skipped += 1
                continue
            errors.append(100 * np.mean([math.dist(predicted[p], points[p]) for p in np.flatnonzero(known)]) / d)
        errors = np.array(errors)
        grid = np.linspace(0, 8, 20001)
        curve = (errors[None] <= grid[:, None]).mean(1)
        found = numbers(self.bound().score(*data))
        assert found["nme"] == pytest.approx(errors.mean())
        assert found["fr/8"] == pytest.approx((errors > 8).mean())
        assert found["auc/8"] == pytest.approx(np.trapezoid(curve, grid) / 8, abs=1e-4)
        assert 0.1 < found["auc/8"] < 0.9
        assert found["skipped"] == skipped
        sizes = self.bound().sizes(data[1], data[2])
        assert sizes["nme"] == len(errors)
        assert sizes["skipped"] == len(errors) + skipped

    def test_an_output_without_labels_is_left_out(self, data):
        values, target, mask = data
        mask = mask.clone()
        mask[:, 30] = False
        moved = values.clone()
        moved[:, 30] += 500
        assert numbers(self.bound().score(moved, target, mask)) == numbers(self.bound().score(values, target, mask))

    def test_the_constant_is_the_best_one(self, data):
        """The constant is the mean shape: no best one by proof, but better than any other shape here."""
        _, target, mask = data
        metric = self.bound()
        found = numbers(metric.constants(target, mask))
        for face in target[10:30]:
            other = numbers(metric.score(face.expand(target.shape), target, mask))
            assert found["nme"] < other["nme"]
            assert found["auc/8"] > other["auc/8"]
        means = torch.stack([target[mask[:, p], p].mean(0) for p in range(68)])
        assert found == pytest.approx(numbers(metric.score(means.expand(target.shape), target, mask)))

    def test_without_labels_is_no_skipped_image(self, data):
        values, target, mask = data
        assert numbers(self.bound().score(values[:3], target[:3], mask[:3]))["skipped"] == 0


class TestBetweenPupils(TestBetweenEyeCorners):
    normaliser = "inter_pupil"

    def length(self, points, known):
        if not known[36:48].all():
            return 0.0
        return math.dist(points[36:42].mean(0), points[42:48].mean(0))


class TestBox(TestBetweenEyeCorners):
    normaliser = "box"

    def length(self, points, known):
        if known.sum() < 2:
            return 0.0
        width, height = np.ptp(points[known], axis=0)
        return math.sqrt(width * height)


def test_failure_is_a_strict_inequality():
    """A face whose eyes are 100 pixels apart and whose points are all 8 or 8.01 pixels off."""
    target = torch.zeros(2, 5, 2)
    target[:, 1, 0] = 100
    off = torch.tensor([8.0, 8.01])[:, None, None] * torch.tensor([0.0, 1.0])
    metric = AlignmentError("5", threshold=8)
    metric.bind(["points"])
    found = numbers(metric.score(target + off, target, torch.ones(2, 5) > 0))
    assert found["fr/8"] == 0.5
    assert found["auc/8"] == pytest.approx(0, abs=1e-6)
    assert found["nme"] == pytest.approx(8.005)


def test_several_thresholds_and_lengths_are_those_of_several_metrics():
    generator = torch.Generator().manual_seed(2)
    target = 100 * torch.rand(60, 68, 2, generator=generator, dtype=torch.float64)
    values = target + 4 * torch.randn(60, 68, 2, generator=generator, dtype=torch.float64)
    mask = torch.rand(60, 68, generator=generator) < 0.98
    together = AlignmentError("68", ["inter_pupil", "box", "inter_ocular"], [5, 10.5])
    together.bind(["points"])
    found, sizes = numbers(together.score(values, target, mask)), together.sizes(target, mask)
    assert list(found) == ["nme", "fr/5", "fr/10.5", "auc/5", "auc/10.5", "skipped", "nme/box", "nme/inter_ocular"]
    for normaliser, name in (("inter_pupil", "nme"), ("box", "nme/box"), ("inter_ocular", "nme/inter_ocular")):
        for threshold in (5, 10.5):
            alone = AlignmentError("68", normaliser, threshold)
            alone.bind(["points"])
            expected = numbers(alone.score(values, target, mask))
            assert found[name] == pytest.approx(expected["nme"])
            assert sizes[name] == alone.sizes(target, mask)["nme"]
            if name == "nme":
                assert [found[f"{n}/{threshold}"] for n in ("fr", "auc")] == pytest.approx(
                    [expected[f"{n}/{threshold}"] for n in ("fr", "auc")]
                )
    assert sizes["nme/inter_ocular"] > sizes["nme"]  # two corners are more often labelled than all points of both eyes
    assert not together.higher("nme/box")


def test_the_exact_area_is_that_under_the_sorted_errors():
    """The area under the steps of the cumulative curve, summed over the sorted errors one by one."""
    generator = torch.Generator().manual_seed(4)
    target = 100 * torch.rand(40, 68, 2, generator=generator, dtype=torch.float64)
    values = target + 6 * torch.randn(40, 1, 2, generator=generator, dtype=torch.float64)
    mask = torch.ones(40, 68) > 0
    errors = image_errors(values, target, mask, SCHEMES["68"])
    metric = AlignmentError("68", threshold=10)
    metric.bind(["points"])
    inside = np.sort(errors[errors <= 10].numpy())
    steps = np.append(inside, 10.0)
    area = sum((steps[k + 1] - steps[k]) * (k + 1) / 40 for k in range(len(inside)))
    assert 5 < len(inside) < 40
    assert numbers(metric.score(values, target, mask))["auc/10"] == pytest.approx(area / 10)


@pytest.mark.parametrize("name", list(SCHEMES))
def test_every_scheme_has_its_eyes(name):
    scheme = SCHEMES[name]
    points = torch.rand(4, scheme.points, 2, generator=torch.Generator().manual_seed(1)) * 100
    mask = torch.ones(4, scheme.points) > 0
    left, right = scheme.eye_corners
    expected = (points[:, left] - points[:, right]).pow(2).sum(1).sqrt()
    torch.testing.assert_close(normaliser_length(points, mask, scheme, "inter_ocular"), expected)
    assert (normaliser_length(points, mask, scheme, "inter_pupil") > 0).all()


def test_wrong_points_and_settings_are_named():
    metric = AlignmentError("68")
    metric.bind(["points"])
    with pytest.raises(DataError, match=r"needs \(N, 68, 2\)"):
        metric.update(torch.zeros(1, 5, 2), torch.zeros(1, 5, 2), torch.ones(1, 5) > 0)
    with pytest.raises(ConfigError, match="scheme"):
        AlignmentError("86")
    with pytest.raises(ConfigError, match="did you mean inter_ocular"):
        AlignmentError("68", "interocular")
    with pytest.raises(ConfigError, match="threshold"):
        AlignmentError("68", threshold=0)
    with pytest.raises(ConfigError, match="each once"):
        AlignmentError("68", ["box", "box"])
    with pytest.raises(ConfigError, match="at least one"):
        AlignmentError("68", threshold=[])
