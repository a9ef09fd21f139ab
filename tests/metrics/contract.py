# SPDX-License-Identifier: Apache-2.0
"""What every metric must do; a subclass per metric says how it is made and gives a reference."""

from __future__ import annotations

import copy
import math
import pickle

import numpy as np
import pytest
import torch
from torch import Tensor

from affect.errors import ConfigError, DataError
from affect.metrics import Metric
from affect.metrics import base as metrics_base

torch.set_num_threads(1)

Data = tuple[Tensor, Tensor, Tensor]


def numbers(named: dict[str, Tensor]) -> dict[str, float]:
    return {name: float(number) for name, number in named.items()}


def same(found: dict[str, Tensor], expected: dict[str, Tensor | float], tolerance: float = 1e-9) -> None:
    assert list(found) == list(expected)
    assert numbers(found) == pytest.approx(numbers(expected), rel=tolerance, abs=tolerance, nan_ok=True)


class MetricContract:
    """Tests that every metric inherits. Shapes: 200 samples, 3 outputs, 70 % of the cells labelled."""

    outputs: tuple[str, ...] = ("a", "b", "c")
    samples = 200
    mean_of: tuple[str, ...] = ()  # quantities whose "/mean" is the mean over outputs

    # ---------------------------------------------------------------------------------- what a subclass says

    def make(self) -> Metric:
        raise NotImplementedError

    def draw(self, generator: torch.Generator) -> Data:
        raise NotImplementedError

    def reference(self, values: np.ndarray, target: np.ndarray) -> dict[str, float]:
        """Return quantities of one output from its labelled samples ``(n,)``, by another library or the formula."""
        raise NotImplementedError

    def constant_candidates(self, target: Tensor) -> list[Tensor]:
        """Return constant predictions ``(K,)`` among which the best one of each output is."""
        raise NotImplementedError

    # ------------------------------------------------------------------------------------------------ fixtures

    def bound(self) -> Metric:
        metric = self.make()
        metric.bind(self.outputs)
        return metric

    @pytest.fixture
    def data(self) -> Data:
        return self.draw(torch.Generator().manual_seed(5))

    @staticmethod
    def draw_mask(generator: torch.Generator, samples: int, outputs: int) -> Tensor:
        mask = torch.rand(samples, outputs, generator=generator) < 0.7
        mask[:3] = False
        return mask

    def groups(self, size: int) -> Tensor:
        return torch.randint(7, (size,), generator=torch.Generator().manual_seed(11))

    # --------------------------------------------------------------------------------------------------- tests

    def test_agrees_with_the_reference(self, data):
        values, target, mask = data
        found = numbers(self.bound().score(*data))
        for k, name in enumerate(self.outputs):
            rows = mask[:, k]
            for quantity, expected in self.reference(values[rows, k].numpy(), target[rows, k].numpy()).items():
                assert found[f"{quantity}/{name}"] == pytest.approx(expected, rel=1e-6, abs=1e-9), quantity
        for quantity in self.mean_of:
            each = [found[f"{quantity}/{name}"] for name in self.outputs]
            assert found[f"{quantity}/mean"] == pytest.approx(np.mean(each))

    def test_class_in_batches_equals_function(self, data):
        metric = self.bound()
        for start in range(0, self.samples, 33):
            metric.update(*(tensor[start : start + 33] for tensor in data))
        found = metric.compute()
        same(found, self.bound().score(*data))
        assert tuple(found) == metric.names
        assert all(number.dtype == torch.float64 and number.ndim == 0 for number in found.values())
        metric.reset()
        metric.update(*(tensor[:50] for tensor in data))
        same(metric.compute(), self.bound().score(*(tensor[:50] for tensor in data)))

    def test_order_does_not_matter(self, data):
        order = torch.randperm(self.samples, generator=torch.Generator().manual_seed(0))
        same(self.bound().score(*(tensor[order] for tensor in data)), self.bound().score(*data))

    @pytest.mark.parametrize("value", [float("nan"), float("inf"), float("-inf")])
    def test_nothing_leaks_from_masked_cells(self, data, value):
        values, target, mask = data
        cells = mask if mask.ndim == values.ndim else mask.unsqueeze(-1)
        spoiled = (torch.where(cells, values, value), torch.where(cells, target, value), mask)
        same(self.bound().score(*spoiled), self.bound().score(*data))
        same(self.bound().constants(spoiled[1], mask), self.bound().constants(target, mask))

    def test_without_labels_nothing_exists(self, data):
        values, target, mask = data
        for found in (
            self.bound().score(values, target, torch.zeros_like(mask)),
            self.bound().constants(target, torch.zeros_like(mask)),
            self.bound().score(values[:0], target[:0], mask[:0]),
            self.bound().constants(target[:0], mask[:0]),
        ):
            for name, number in numbers(found).items():
                assert number == 0 if name in self.make().counts else math.isnan(number)
        assert set(self.bound().sizes(target, torch.zeros_like(mask)).values()) == {0}

    def test_an_output_without_labels_is_left_out(self, data):
        values, target, mask = data
        mask = mask.clone()
        mask[:, 1] = False
        found, complete = numbers(self.bound().score(values, target, mask)), numbers(self.bound().score(*data))
        for name, number in found.items():
            if name.endswith(f"/{self.outputs[1]}"):
                assert math.isnan(number)
            elif name.split("/")[-1] in self.outputs:
                assert number == pytest.approx(complete[name])
        for quantity in self.mean_of:
            rest = [found[f"{quantity}/{self.outputs[k]}"] for k in (0, 2)]
            assert found[f"{quantity}/mean"] == pytest.approx(np.mean(rest))

    def test_drawing_groups_equals_repeating_their_rows(self, data):
        group = self.groups(self.samples)
        counts = torch.tensor([[1, 1, 1, 1, 1, 1, 1], [0, 2, 1, 3, 0, 0, 1], [7, 0, 0, 0, 0, 0, 0]])
        resampled = self.bound().resampler(*data, group, 7)(counts.double())
        for r, count in enumerate(counts):
            rows = torch.arange(self.samples).repeat_interleave(count[group])
            expected = self.bound().score(*(tensor[rows] for tensor in data))
            same({name: number[r] for name, number in resampled.items()}, expected)

    def test_chunks_do_not_matter(self, data, monkeypatch):
        whole = self.bound().score(*data)
        monkeypatch.setattr(metrics_base, "CHUNK", 17)
        same(self.bound().score(*data), whole)

    def test_the_constant_is_the_best_one(self, data):
        """No constant prediction among the candidates is better, and one of them is as good."""
        _, target, mask = data
        metric = self.bound()
        found = numbers(metric.constants(target, mask))
        tried = [
            numbers(metric.score(candidate.to(target).expand(target.shape), target, mask))
            for candidate in self.constant_candidates(target)
        ]
        for name in metric.names:
            sign = 1 if metric.higher(name) else -1
            best = max(sign * one[name] for one in tried)
            assert sign * found[name] >= best - 1e-9, name
            if name.split("/")[-1] in self.outputs:
                assert sign * found[name] == pytest.approx(best, abs=1e-9), name

    def test_names_sizes_and_directions(self, data):
        _, target, mask = data
        metric = self.bound()
        sizes = metric.sizes(target, mask)
        assert set(sizes) == set(metric.names)
        for k, name in enumerate(self.outputs):
            for quantity in metric.per_output:
                assert sizes[f"{quantity}/{name}"] == int(mask[:, k].sum())
        assert all(isinstance(metric.higher(name), bool) for name in metric.names)

    def test_half_precision_is_accepted(self, data):
        values, target, mask = data
        found = self.bound().score(values.bfloat16(), target.float(), mask)
        assert all(torch.isfinite(number) for number in found.values())

    def test_copies_pickles_and_checkpoints(self, data):
        metric = self.bound()
        metric.persistent(True)
        metric.update(*data)
        expected = metric.compute()
        same(copy.deepcopy(metric).compute(), expected)
        same(pickle.loads(pickle.dumps(metric)).compute(), expected)
        loaded = self.bound()
        loaded.persistent(True)
        loaded.load_state_dict(metric.state_dict())
        loaded._update_count = 1  # only silences the library's warning about computing before updating
        same(loaded.compute(), expected)

    def test_needs_names(self, data):
        with pytest.raises(ConfigError, match="bind"):
            self.make().update(*data)
        with pytest.raises(ConfigError, match="bind"):
            self.make().score(*data)

    def test_wrong_shapes_are_named(self, data):
        values, target, mask = data
        with pytest.raises(DataError, match="do not fit"):
            self.bound().update(values, target[:5], mask)
        with pytest.raises(DataError, match="bool"):
            self.bound().update(values, target, mask.float())


class BinaryContract(MetricContract):
    """Binary outputs of different rates."""

    def draw(self, generator: torch.Generator) -> Data:
        target = (torch.rand(self.samples, 3, generator=generator) < torch.tensor([0.2, 0.5, 0.8])).float()
        values = (target + 1.5 * torch.randn(self.samples, 3, generator=generator)).sigmoid()
        values = (values * 20).round() / 20  # ties, and values of exactly 0.5
        return values, target, self.draw_mask(generator, self.samples, 3)

    def constant_candidates(self, target: Tensor) -> list[Tensor]:
        return [torch.tensor([float(i >> k & 1) for k in range(3)]) for i in range(8)]


class RegressionContract(MetricContract):
    """Continuous outputs."""

    def draw(self, generator: torch.Generator) -> Data:
        target = torch.randn(self.samples, 3, generator=generator).tanh()
        values = 0.6 * target + 0.3 * torch.randn(self.samples, 3, generator=generator) + 0.1
        target[::9], values[::11] = 0, 0
        return values.double(), target.double(), self.draw_mask(generator, self.samples, 3)

    def constant_candidates(self, target: Tensor) -> list[Tensor]:
        grid = [torch.full((3,), float(c)) for c in np.linspace(-1, 1, 41)]
        return [*grid, *target.unique()[::7].double().unsqueeze(1).expand(-1, 3)]
