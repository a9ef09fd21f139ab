# SPDX-License-Identifier: Apache-2.0
"""Weights of few levels: levels and errors by their formulas, straight-through gradients, and no change at 32 bits."""

from __future__ import annotations

import pytest
import torch
from torch import nn

from affect.errors import ConfigError
from affect.quantization import WeightQuantizer, binary, straight_through, ternary, uniform
from affect.quantization.weights import check_bits, per_channel, stored_bits


def weights(*shape: int) -> torch.Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(len(shape)), dtype=torch.float64)


def test_binary_is_the_sign_times_the_mean_of_each_channel() -> None:
    weight = torch.tensor([[1.0, -2.0, 0.0], [-4.0, 4.0, 1.0]])
    assert binary(weight).tolist() == [[1, -1, 1], [-3, 3, 3]]
    assert binary(weight.T, axis=1).T.tolist() == [[1, -1, 1], [-3, 3, 3]]


def test_ternary_keeps_what_is_larger_than_the_threshold() -> None:
    weight = torch.tensor([[0.1, -1.0, 3.0, -0.5]])  # threshold 0.7 * 1.15 = 0.805
    assert ternary(weight).tolist() == [[0, -2, 2, 0]]
    assert ternary(torch.zeros(2, 3)).tolist() == [[0] * 3] * 2


@pytest.mark.parametrize("bits", [2, 3, 4, 8])
@pytest.mark.parametrize("scale", ["max", "mean"])
def test_a_grid_has_its_levels_and_its_error(bits: int, scale: str) -> None:
    weight = weights(5, 40)
    found, top = uniform(weight, bits, scale=scale), 2 ** (bits - 1) - 1
    for row, levels in zip(weight, found, strict=True):
        step = row.abs().max() / top if scale == "max" else 2 * row.abs().mean() / top**0.5
        codes = levels / step
        torch.testing.assert_close(codes, codes.round())
        assert len(levels.unique()) <= 2**bits - 1
        assert codes.abs().max() <= top + 1e-9
        inside = row.abs() <= top * step
        assert ((levels - row).abs()[inside] <= step / 2 + 1e-12).all()
        torch.testing.assert_close(levels[~inside], row.sign()[~inside] * top * step)
    assert (scale == "mean") <= bool((weight.abs().amax(1) > found.abs().amax(1) + 1e-9).any()) or bits > 3


@pytest.mark.parametrize("bits", ["binary", 2, 3, 8])
def test_quantized_weights_are_fixed_points(bits: int | str) -> None:
    quantizer = WeightQuantizer(bits)  # type: ignore[arg-type]
    once = quantizer(weights(6, 4, 3, 3))
    torch.testing.assert_close(quantizer(once), once, rtol=1e-12, atol=1e-12)


@pytest.mark.parametrize("bits", [32, 64])
def test_from_32_bits_on_nothing_changes(bits: int) -> None:
    weight = weights(3, 7)
    assert uniform(weight, bits) is weight


@pytest.mark.parametrize("bits", ["binary", "ternary", 2])
def test_the_gradient_is_that_of_the_levels(bits: int | str) -> None:
    weight = weights(3, 8).requires_grad_()
    sent = weights(3, 8)
    (WeightQuantizer(bits)(weight) * sent).sum().backward()  # type: ignore[arg-type]
    assert weight.grad is not None
    assert torch.equal(weight.grad, sent)


def test_no_gradient_reaches_weights_out_of_range() -> None:
    weight = torch.tensor([[0.1, -0.2, 0.1, 9.0]], requires_grad=True)  # mean 2.35: the levels are 0 and ±4.7
    uniform(weight, 2, scale="mean").sum().backward()
    assert weight.grad is not None
    assert weight.grad.tolist() == [[1, 1, 1, 0]]


def test_a_gradient_of_a_gradient_passes_too() -> None:
    weight = weights(2, 3).requires_grad_()
    values = weights(3).requires_grad_()
    score = (straight_through(weight, weight.sign()) @ values).pow(2).sum()
    (gradient,) = torch.autograd.grad(score, values, create_graph=True)
    gradient.square().sum().backward()
    assert weight.grad is not None
    sign = weight.detach().sign().requires_grad_()  # the same without a quantizer, at the levels
    (expected,) = torch.autograd.grad((sign @ values).pow(2).sum(), values, create_graph=True)
    (wanted,) = torch.autograd.grad(expected.square().sum(), sign)
    torch.testing.assert_close(weight.grad, wanted)


def test_the_forward_pass_has_the_levels_exactly() -> None:
    """``w + (q - w)`` would not: its rounding differs from weight to weight."""
    assert len(binary(weights(1, 1000).float()).unique()) == 2


@pytest.mark.parametrize(("bits", "stored"), [("binary", 1), ("ternary", 2), (4, 4), (64, 32)])
def test_how_many_bits_a_file_takes(bits: int | str, stored: int) -> None:
    assert stored_bits(bits) == stored  # type: ignore[arg-type]


@pytest.mark.parametrize("bits", [1, 0, True, 2.5, "two", None])
def test_unknown_widths_are_refused(bits: object) -> None:
    with pytest.raises(ConfigError, match="write binary, ternary or a number of bits"):
        check_bits(bits, "qat.weights")


def test_statistics_of_channels_broadcast() -> None:
    layer = nn.ConvTranspose2d(3, 5, 2)
    assert per_channel(layer.weight, lambda rows: rows.amax(1), axis=1).shape == (1, 5, 1, 1)
