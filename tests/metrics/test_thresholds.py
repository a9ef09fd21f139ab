# SPDX-License-Identifier: Apache-2.0
from __future__ import annotations

import numpy as np
import pytest
import torch
from sklearn.metrics import f1_score

from affect.metrics import F1, best_thresholds


@pytest.mark.parametrize("seed", range(6))
def test_no_other_threshold_is_better(seed):
    generator = torch.Generator().manual_seed(seed)
    target = (torch.rand(60, 3, generator=generator) < torch.tensor([0.1, 0.5, 0.9])).float()
    values = (target + 2 * torch.randn(60, 3, generator=generator)).sigmoid()
    if seed % 2:
        values = (values * 10).round() / 10  # ties
    mask = torch.rand(60, 3, generator=generator) < 0.8
    found = best_thresholds(values, target, mask)
    metric = F1(threshold=found.tolist())
    metric.bind(["a", "b", "c"])
    reached = metric.score(values, target, mask)
    for k, name in enumerate("abc"):
        rows = mask[:, k]
        value, label = values[rows, k].numpy(), target[rows, k].numpy()
        best = max(f1_score(label, value >= cut, zero_division=0) for cut in np.unique(value))
        assert float(reached[f"f1/{name}"]) == pytest.approx(best)


def test_the_cut_is_half_way_and_the_highest_of_ties():
    values = torch.tensor([[0.1], [0.3], [0.5], [0.9]])
    every = torch.ones(4, 1) > 0
    assert best_thresholds(values, torch.tensor([[0.0], [0.0], [1.0], [1.0]]), every).item() == pytest.approx(0.4)
    # Cuts below 0.9 and below 0.1 give 2 / 3 each: the highest is taken.
    assert best_thresholds(values, torch.tensor([[1.0], [0.0], [0.0], [1.0]]), every).item() == pytest.approx(0.7)


def test_neighbours_in_single_precision_are_told_apart():
    high = torch.tensor(0.7)
    low = torch.nextafter(high, torch.tensor(0.0))
    values, target = torch.stack([low, high]).unsqueeze(1), torch.tensor([[0.0], [1.0]])
    metric = F1(best_thresholds(values, target, torch.ones(2, 1) > 0).tolist())
    metric.bind(["a"])
    assert metric.score(values, target, torch.ones(2, 1) > 0)["f1/a"] == 1


def test_without_positives_or_labels_the_default_stays():
    values, target = torch.rand(5, 3), torch.ones(5, 3)
    target[:, 0] = 0
    mask = torch.ones(5, 3) > 0
    mask[:, 1] = False
    found = best_thresholds(values, target, mask, default=0.25)
    assert found[:2].tolist() == [0.25, 0.25]
    assert found[2] == values[:, 2].min().double()
    assert best_thresholds(values[:0], target[:0], mask[:0]).tolist() == [0.5] * 3


def test_nothing_leaks_from_masked_cells():
    values, target, mask = torch.rand(20, 2), (torch.rand(20, 2) < 0.5).float(), torch.rand(20, 2) < 0.7
    expected = best_thresholds(values, target, mask)
    for spoil in (torch.nan, torch.inf, -torch.inf):
        spoiled = torch.where(mask, values, spoil), torch.where(mask, target, spoil)
        assert torch.equal(best_thresholds(*spoiled, mask), expected)
