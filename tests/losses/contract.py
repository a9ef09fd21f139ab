# SPDX-License-Identifier: Apache-2.0
"""What every loss must do; a subclass per loss says how it is made and what it reduces to."""

from __future__ import annotations

import copy
from typing import NamedTuple

import numpy as np
import pytest
import torch
from torch import Tensor

from affect.errors import DataError
from affect.losses import Loss, Terms

torch.set_num_threads(1)


class Coded(NamedTuple):
    """Targets and masks as a task encodes them."""

    target: np.ndarray
    mask: np.ndarray


def mean_of(terms: Terms) -> Tensor:
    return terms.sum.sum() / terms.count.sum()


class LossContract:
    """Tests that every loss inherits. Shapes: 12 samples, 4 outputs."""

    shape: tuple[int, ...] = (12, 4)
    terms_shape: tuple[int, ...] = (4,)

    # ---------------------------------------------------------------------------------- what a subclass says

    def make(self) -> Loss:
        raise NotImplementedError

    def draw(self, generator: torch.Generator) -> tuple[Tensor, Tensor]:
        """Return outputs and targets, float64."""
        raise NotImplementedError

    def by_function(self, output: Tensor, target: Tensor, mask: Tensor) -> Terms:
        """Return the terms by way of the pure function, written out."""
        raise NotImplementedError

    def plain(self, output: Tensor, target: Tensor) -> Tensor:
        """Return the mean loss of fully labelled data, from torch or from the formula."""
        raise NotImplementedError

    # ------------------------------------------------------------------------------------------------ fixtures

    @pytest.fixture
    def data(self) -> tuple[Tensor, Tensor, Tensor]:
        generator = torch.Generator().manual_seed(3)
        output, target = self.draw(generator)
        mask = torch.rand(self.shape[:2], generator=generator) < 0.7
        mask[0] = False
        return output, target, mask

    @staticmethod
    def spoil(numbers: Tensor, mask: Tensor, value: float) -> Tensor:
        cells = mask if mask.ndim == numbers.ndim else mask.unsqueeze(-1)
        return torch.where(cells, numbers, value)

    # --------------------------------------------------------------------------------------------------- tests

    def test_terms_are_sums_and_counts(self, data):
        terms = self.make()(*data)
        assert terms.sum.shape == terms.count.shape == self.terms_shape
        assert terms.sum.is_floating_point()
        assert terms.count.is_floating_point()
        assert torch.isfinite(terms.sum).all()

    def test_reduces_to_the_plain_loss_when_all_is_labelled(self, data):
        output, target, mask = data
        found = mean_of(self.make()(output, target, torch.ones_like(mask)))
        torch.testing.assert_close(found, self.plain(output, target), rtol=1e-6, atol=1e-9)

    def test_module_equals_function(self, data):
        found, expected = self.make()(*data), self.by_function(*data)
        torch.testing.assert_close(found.sum, expected.sum)
        torch.testing.assert_close(found.count, expected.count)

    def test_a_masked_cell_is_as_if_it_were_not_there(self, data):
        """Each output alone, with its labelled rows only, gives the same term."""
        output, target, mask = data
        loss = self.make()
        terms = loss(output, target, mask)
        for k in range(self.shape[1]):
            rows = mask[:, k]
            alone = loss(output[rows, k : k + 1], target[rows, k : k + 1], mask[rows, k : k + 1])
            torch.testing.assert_close(alone.sum[0], terms.sum[k])
            assert alone.count[0] == terms.count[k]

    @pytest.mark.parametrize("value", [float("nan"), float("inf"), float("-inf"), 1e30])
    def test_nothing_leaks_from_masked_cells(self, data, value):
        output, target, mask = data
        loss = self.make()
        expected = loss(output, target, mask)
        spoiled = self.spoil(output, mask, value).requires_grad_()
        found = loss(spoiled, self.spoil(target, mask, value), mask)
        torch.testing.assert_close(found.sum, expected.sum)
        found.sum.sum().backward()
        assert torch.isfinite(spoiled.grad).all()
        assert (spoiled.grad[~mask] == 0).all()
        assert (spoiled.grad[mask] != 0).any()

    @pytest.mark.parametrize("value", [0.5, float("nan"), float("inf"), float("-inf")])
    def test_all_masked_is_zero_with_a_graph(self, data, value):
        output, target, mask = data
        output = torch.full_like(output, value).requires_grad_()
        terms = self.make()(output, torch.full_like(target, value), torch.zeros_like(mask))
        assert (terms.sum == 0).all()
        assert (terms.count == 0).all()
        assert terms.sum.requires_grad
        terms.sum.sum().backward()
        assert (output.grad == 0).all()

    @pytest.mark.filterwarnings("ignore:Anomaly Detection")
    def test_no_step_of_the_backward_pass_is_nan(self, data):
        """Users look for NaN with torch's anomaly mode: a masked one within our graph would be a false alarm."""
        output, target, mask = data
        output.requires_grad_()
        with torch.autograd.detect_anomaly(check_nan=True):
            self.make()(output, target, mask).sum.sum().backward()
            self.make()(output, target, torch.zeros_like(mask)).sum.sum().backward()

    def test_no_samples_give_zero(self, data):
        terms = self.make()(*(tensor[:0] for tensor in data))
        assert (terms.sum == 0).all()
        assert (terms.count == 0).all()

    def test_gradient_is_the_derivative(self, data):
        output, target, mask = data
        loss = self.make()
        assert torch.autograd.gradcheck(lambda x: loss(x, target, mask).sum, output.clone().requires_grad_())

    def test_half_precision_is_summed_in_single(self, data):
        output, target, mask = data
        half = output.bfloat16().requires_grad_()
        loss = self.make()
        with torch.autocast("cpu", torch.bfloat16):
            terms = loss(half, target.float(), mask)
        assert terms.sum.dtype == terms.count.dtype == torch.float32
        expected = loss(half.detach().float(), target.float(), mask)
        torch.testing.assert_close(terms.sum, expected.sum, rtol=1e-5, atol=1e-6)
        terms.sum.sum().backward()
        assert half.grad.dtype == torch.bfloat16
        assert torch.isfinite(half.grad).all()

    def test_inputs_stay_as_they_are(self, data):
        before = [tensor.clone() for tensor in data]
        self.make()(*data)
        for old, new in zip(before, data, strict=True):
            assert torch.equal(old, new)

    def test_wrong_shapes_are_named(self, data):
        output, target, mask = data
        loss = self.make()
        with pytest.raises(DataError, match="do not fit"):
            loss(output, target[:5], mask)
        with pytest.raises(DataError, match="do not fit"):
            loss(output, target, mask[:, 0])
        with pytest.raises(DataError, match="bool"):
            loss(output, target, mask.float())

    def test_copies_and_has_no_state_to_load(self, data):
        loss = self.make()
        torch.testing.assert_close(copy.deepcopy(loss)(*data).sum, loss(*data).sum)
        assert not loss.state_dict()


class PointContract(LossContract):
    """The same for landmarks: 12 samples, 4 points."""

    shape = (12, 4, 2)
