# SPDX-License-Identifier: Apache-2.0
from __future__ import annotations

import sys

import numpy as np
import pytest
import torch

from affect.errors import ConfigError, DataError
from affect.metrics import AUC, CCC, MAE, Metric, bootstrap
from affect.metrics import auc as auc_module
from affect.metrics.bootstrap import draws, group_index, percentile_intervals
from tests.metrics.every import every_metric

NAMES = list(every_metric())


def naive(metric: Metric, data: tuple, groups: np.ndarray, resamples: int, seed: int) -> dict[str, tuple[float, float]]:
    """Draw groups one by one, copy their rows, compute the metric anew."""
    values, target, mask = (tensor[data[2].any(1)] for tensor in data)
    groups = groups[data[2].any(1).numpy()]
    found = np.unique(groups)
    generator = np.random.default_rng(seed)
    collected: dict[str, list[float]] = {name: [] for name in metric.names}
    for _ in range(resamples):
        drawn = found[generator.integers(0, len(found), len(found))]
        rows = np.concatenate([np.flatnonzero(groups == name) for name in drawn])
        for name, number in metric.score(values[rows], target[rows], mask[rows]).items():
            collected[name].append(float(number))
    return {name: tuple(np.nanquantile(numbers, [0.05, 0.95])) for name, numbers in collected.items()}


@pytest.mark.parametrize("name", NAMES)
def test_equals_a_naive_loop(name):
    metric, data = every_metric()[name]
    groups = np.array(["anna", "ben", "cleo", "dan", "eve"], dtype=object)[np.arange(90) % 7 % 5]
    found = bootstrap(metric, *data, groups, resamples=40, seed=3, level=0.9)
    for key, interval in naive(metric, data, groups, 40, 3).items():
        if key in metric.counts:
            assert found[key] is None
        else:
            assert found[key] == pytest.approx(interval, abs=1e-9), key


def test_auc_of_many_groups_equals_that_of_few(monkeypatch):
    metric, data = every_metric()["auc"]
    groups = np.arange(90) // 2
    few = bootstrap(metric, *data, groups, resamples=50)
    monkeypatch.setattr(auc_module, "_PAIRED_GROUPS", 0)
    many = bootstrap(metric, *data, groups, resamples=50)
    for name, interval in few.items():
        assert many[name] == pytest.approx(interval)


def test_draws_depend_on_the_seed_alone(monkeypatch):
    whole = torch.cat(list(draws(9, 40, 1)))
    assert (whole.sum(1) == 9).all()
    assert torch.equal(torch.cat(list(draws(9, 40, 1))), whole)
    assert not torch.equal(torch.cat(list(draws(9, 40, 2))), whole)
    monkeypatch.setattr(sys.modules[draws.__module__], "_CELLS", 100)  # affect.metrics.bootstrap is the function
    chunks = list(draws(9, 40, 1))
    assert len(chunks) > 3
    assert torch.equal(torch.cat(chunks), whole)


def test_covers_the_truth_about_as_often_as_it_says():
    """The mean of 60 groups' errors: intervals of 90 % should hold the true mean in roughly 90 % of 200 trials."""
    metric = MAE()
    metric.bind(["a"])
    rng = np.random.default_rng(0)
    groups = np.repeat(np.arange(60), 3)
    hits = 0
    for trial in range(200):
        errors = torch.from_numpy(1 + rng.random((60, 1)).repeat(3, 0) + 0.1 * rng.random((180, 1)))
        low, high = bootstrap(
            metric, errors, torch.zeros(180, 1), torch.ones(180, 1) > 0, groups, resamples=200, seed=trial, level=0.9
        )["mae/a"]
        hits += low <= 1.55 <= high
    assert 165 <= hits <= 195


def test_frames_of_one_group_count_once():
    """Copying every frame ten times must not narrow the interval."""
    metric, data = every_metric()["ccc"]
    groups = np.arange(90) % 9
    copied = tuple(tensor.repeat_interleave(10, 0) for tensor in data)
    once = bootstrap(metric, *data, groups, resamples=100)["ccc/mean"]
    ten = bootstrap(metric, *copied, groups.repeat(10), resamples=100)["ccc/mean"]
    assert ten == pytest.approx(once)


def test_one_group_gives_no_interval():
    metric, data = every_metric()["f1"]
    assert set(bootstrap(metric, *data, ["only"] * 90).values()) == {None}
    assert set(bootstrap(metric, *data, np.arange(90), resamples=0).values()) == {None}


def test_groups_without_labels_are_not_drawn():
    values, target, mask = every_metric()["ccc"][1]
    groups = np.arange(90) % 6
    empty = mask & torch.from_numpy(groups < 4).unsqueeze(1)
    metric = CCC()
    metric.bind(["a", "b"])
    with_empty = bootstrap(metric, values, target, empty, groups)
    rows = groups < 4
    assert with_empty == bootstrap(metric, values[rows], target[rows], empty[rows], groups[rows])


def test_resamples_without_the_number_are_left_out():
    """Only one group has positives of the second output: it exists only in the resamples that hold that group."""
    target = torch.zeros(40, 2)
    target[::2, 0], target[:5, 1] = 1, 1
    metric = AUC()
    metric.bind(["a", "b"])
    found = bootstrap(metric, torch.rand(40, 2), target, torch.ones(40, 2) > 0, np.arange(40) // 10, resamples=60)
    assert all(interval is not None and interval[0] <= interval[1] for interval in found.values())
    assert percentile_intervals({"x": torch.tensor([torch.nan, torch.nan])}, 0.9) == {"x": None}


def test_bad_arguments_are_named():
    metric, data = every_metric()["f1"]
    with pytest.raises(DataError, match="5 groups for 90 samples"):
        bootstrap(metric, *data, ["a"] * 5)
    with pytest.raises(ConfigError, match="level"):
        bootstrap(metric, *data, np.arange(90), level=1.0)


def test_group_index_takes_names_and_numbers():
    index, number = group_index(["b", "a", "b"])
    assert (index.tolist(), number) == ([1, 0, 1], 2)
    assert group_index(np.array(["x", None, "x"], dtype=object))[1] == 2
    assert group_index(np.array([7, 7, 3]))[0].tolist() == [1, 1, 0]
