# SPDX-License-Identifier: Apache-2.0
"""Heat maps and soft-argmax share one pixel-centre convention."""

from __future__ import annotations

import cv2
import numpy as np
import pytest
import torch

from affect.geometry import heatmaps
from affect.tasks.kinds import to_fractions, to_pixels


def test_drawing_and_reading_are_inverse():
    torch.manual_seed(0)
    points = torch.rand(3, 5, 2, dtype=torch.float64) * torch.tensor([28.0, 12.0]) + 6  # x 6..34, y 6..18
    maps = heatmaps.gaussian_heatmaps(points, (25, 41), sigma=1.2, unit="sum")
    assert maps.shape == (3, 5, 25, 41)
    torch.testing.assert_close(maps.sum((-1, -2)), torch.ones(3, 5, dtype=torch.float64))
    torch.testing.assert_close(heatmaps.expected_points(maps), points, atol=1e-4, rtol=0)
    torch.testing.assert_close(heatmaps.soft_argmax(maps.log()), points, atol=1e-4, rtol=0)


def test_peak_is_the_written_out_formula():
    points = torch.tensor([[2.3, 1.0]])
    maps = heatmaps.gaussian_heatmaps(points, (4, 6), sigma=2.0)
    grid = heatmaps.pixel_grid(4, 6, points)
    assert grid[3, 5].tolist() == [5.0, 3.0]
    torch.testing.assert_close(maps[0], torch.exp(-((grid - points[0]) ** 2).sum(-1) / 8))


def test_first_pixel_is_zero_and_last_is_width_minus_one():
    logits = torch.full((2, 4, 5), -100.0)
    logits[0, 0, 0] = 0
    logits[1, 3, 4] = 0
    torch.testing.assert_close(heatmaps.soft_argmax(logits), torch.tensor([[0.0, 0.0], [4.0, 3.0]]))


def test_soft_argmax_is_the_softmax_mean_with_a_gradient():
    logits = torch.randn(2, 3, 6, 7, dtype=torch.float64, requires_grad=True)
    probability = logits.flatten(2).softmax(-1)
    grid = heatmaps.pixel_grid(6, 7, logits).reshape(-1, 2)
    torch.testing.assert_close(heatmaps.soft_argmax(logits), probability @ grid)
    assert torch.autograd.gradcheck(heatmaps.soft_argmax, (logits,))


def test_low_temperature_finds_the_maximum():
    logits = torch.zeros(9, 9)
    logits[6, 2] = 1
    torch.testing.assert_close(heatmaps.soft_argmax(logits, temperature=0.02), torch.tensor([2.0, 6.0]))


def test_half_precision_keeps_positions():
    points = torch.tensor([[150.25, 99.75]])
    logits = (-((heatmaps.pixel_grid(200, 200, points) - points) ** 2).sum(-1) / 18)[None].bfloat16()
    torch.testing.assert_close(heatmaps.soft_argmax(logits), points, atol=0.2, rtol=0)


@pytest.mark.parametrize("factor", [2, 4])
def test_rescaling_follows_what_an_image_resize_does(factor):
    image = np.zeros((32, 48), np.float32)
    image[8:12, 20:24] = 1
    small = cv2.resize(image, (48 // factor, 32 // factor), interpolation=cv2.INTER_AREA)
    maps = torch.from_numpy(small / small.sum())
    moved = heatmaps.rescale_points(torch.tensor([21.5, 9.5]), (32, 48), tuple(small.shape))
    torch.testing.assert_close(heatmaps.expected_points(maps), moved)


def test_rescaling_agrees_with_the_fractions_of_the_landmark_task():
    points = torch.rand(4, 2) * 100
    torch.testing.assert_close(
        heatmaps.rescale_points(points, (90, 120), (30, 60)), to_pixels(to_fractions(points, 90, 120), 30, 60)
    )


def test_a_point_outside_gives_finite_maps_and_gradients():
    points = torch.tensor([[-500.0, 3.0]], requires_grad=True)
    maps = heatmaps.gaussian_heatmaps(points, (8, 8), 1.0, "sum")
    assert maps[0, 3, 0].item() == pytest.approx(maps.max().item())
    maps.square().sum().backward()
    assert torch.isfinite(points.grad).all()


@pytest.mark.parametrize("arguments", [{"sigma": 0}, {"unit": "area"}])
def test_wrong_arguments(arguments):
    with pytest.raises(ValueError, match="must be"):
        heatmaps.gaussian_heatmaps(torch.zeros(1, 2), (4, 4), **arguments)


def test_an_even_map_says_the_centre():
    torch.testing.assert_close(heatmaps.soft_argmax(torch.full((1, 5, 8), 3.0)), torch.tensor([[3.5, 2.0]]))


@pytest.mark.parametrize("shift", [(2, 0), (-3, 1), (0, -4)])
def test_a_shifted_map_shifts_its_point(shift):
    torch.manual_seed(1)
    logits = torch.full((2, 20, 24), -80.0, dtype=torch.float64)
    logits[:, 6:14, 6:14] = torch.randn(2, 8, 8, dtype=torch.float64) * 3
    moved = torch.roll(logits, (shift[1], shift[0]), (-2, -1))
    expected = heatmaps.soft_argmax(logits) + torch.tensor(shift)
    torch.testing.assert_close(heatmaps.soft_argmax(moved), expected)


def test_resizing_as_networks_do_keeps_points_in_their_place():
    """Bilinear resizing without aligned corners and averages over 2x2 pixels cover the same extent as the map."""
    maps = heatmaps.gaussian_heatmaps(torch.tensor([[7.3, 30.6]]), (40, 32), 1.5, "sum")[None]
    finer = torch.nn.functional.interpolate(maps, scale_factor=2.0, mode="bilinear", align_corners=False)
    coarser = torch.nn.functional.avg_pool2d(maps, 2)
    for other in (finer, coarser):
        found = heatmaps.expected_points(other / other.sum((-2, -1), keepdim=True))
        expected = heatmaps.rescale_points(heatmaps.expected_points(maps), (40, 32), tuple(other.shape[-2:]))
        torch.testing.assert_close(found, expected, atol=1e-3, rtol=0)
    aligned = torch.nn.functional.interpolate(maps, scale_factor=2.0, mode="bilinear", align_corners=True)
    found = heatmaps.expected_points(aligned / aligned.sum((-2, -1), keepdim=True))
    wrong = heatmaps.rescale_points(heatmaps.expected_points(maps), (40, 32), (80, 64))
    assert (found - wrong).abs().max() > 0.1, "another convention would be seen"


def test_temperature_divides_scores():
    logits = torch.randn(3, 5, 5)
    torch.testing.assert_close(heatmaps.spatial_softmax(logits, 0.25), heatmaps.spatial_softmax(logits * 4))
    assert heatmaps.spatial_softmax(logits, 1.0).equal(heatmaps.spatial_softmax(logits))
