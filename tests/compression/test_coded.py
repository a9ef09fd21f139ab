# SPDX-License-Identifier: Apache-2.0
"""An ONNX file with codes computes what the decoded network does, to the last bit where it can, and is smaller."""

from __future__ import annotations

import copy

import numpy as np
import pytest
import torch
from torch import Tensor, nn

from affect.compression.base import Data, run_chain
from affect.compression.codebooks import JLCM
from affect.compression.layers import CompressedConv2d, CompressedLinear, baked
from affect.compression.power import PowerQuantization
from affect.compression.residual import ResidualExpansion
from affect.compression.stored import (
    CodebookWeight,
    GridWeight,
    ResidualWeight,
    SplitWeight,
    StoredWeight,
    signed_levels,
)
from affect.compression.uniform import UniformQuantization
from tests.compression.networks import shake_norms

onnx = pytest.importorskip("onnx")
pytest.importorskip("onnxscript")
runtime = pytest.importorskip("onnxruntime")

from affect.compression.coded import Coded, with_codes  # noqa: E402 - needs onnx


def draw(*size: int, low: int = 0, high: int) -> Tensor:
    return torch.randint(low, high, size, generator=torch.Generator().manual_seed(high))


def grid(bits: int, exponent: float = 1.0, shape: tuple[int, ...] = (64, 16, 3, 3)) -> GridWeight:
    n = signed_levels(bits)
    return GridWeight.of(draw(*shape, low=-n, high=n + 1), torch.rand(shape[0]) + 0.1, bits, exponent)


def values_of(content: bytes, image: Tensor, optimized: bool = True) -> np.ndarray:
    options = runtime.SessionOptions()
    if not optimized:
        options.graph_optimization_level = runtime.GraphOptimizationLevel.ORT_DISABLE_ALL
    session = runtime.InferenceSession(content, options)
    return session.run(None, {session.get_inputs()[0].name: image.numpy()})[0]


def exported(network: nn.Module, image: Tensor) -> bytes:
    program = torch.onnx.export(baked(network).eval(), (image,), dynamo=True, verbose=False)
    assert program is not None
    return program.model_proto.SerializeToString()


def holding(stored: StoredWeight) -> bytes:
    """Return a file that holds a decoded weight and adds its input to it."""
    shape = list(stored.shape)
    kind = onnx.TensorProto.FLOAT
    graph = onnx.helper.make_graph(
        [onnx.helper.make_node("Add", ["x", "held"], ["y"])],
        "graph",
        [onnx.helper.make_tensor_value_info("x", kind, [1])],
        [onnx.helper.make_tensor_value_info("y", kind, shape)],
        [onnx.numpy_helper.from_array(stored().numpy(), "held")],
    )
    model = onnx.helper.make_model(graph, opset_imports=[onnx.helper.make_opsetid("", 18)], ir_version=8)
    return model.SerializeToString()


def layer_of(stored: StoredWeight) -> tuple[nn.Module, Tensor]:
    """Return a network of one layer with a stored weight, and an input."""
    shape = stored.shape
    if len(shape) == 2:
        layer: nn.Module = CompressedLinear.of(nn.Linear(shape[1], shape[0]))
        image = torch.randn(2, shape[1])
    else:
        groups = getattr(stored, "groups", 1) if isinstance(stored, SplitWeight) else 1
        layer = CompressedConv2d.of(nn.Conv2d(shape[1] * groups, shape[0], shape[2:], groups=groups))
        image = torch.randn(2, shape[1] * groups, 5, 5)
    layer.store(stored)  # type: ignore[operator]
    return nn.Sequential(layer).eval(), image


def split(groups: int, values: bool) -> SplitWeight:
    """Four kernels for each input channel, of which one has three."""
    outputs, inputs, channels = 64, 8, 8 * groups
    counts = torch.full((channels,), 4)
    counts[1] = 3
    positions = draw(outputs, inputs, high=3)
    kernels = torch.randn(int(counts.sum()), 9)
    table = None
    if values:
        table, kernels = torch.randn(10), draw(len(kernels), 9, high=10)
    return SplitWeight.of((outputs, inputs, 3, 3), counts, positions, kernels, groups, table)


def residual() -> ResidualWeight:
    rows = torch.tensor([5, 0, 40])
    return ResidualWeight.of([grid(4), grid(3, shape=(3, 16, 3, 3)), grid(2)], [None, rows, None])


CASES = {
    **{f"grid {bits}": lambda bits=bits: grid(bits) for bits in range(2, 9)},
    "powers": lambda: grid(4, 0.5),
    "one scale": lambda: GridWeight.of(draw(64, 9, low=-1, high=2), torch.tensor([0.3]), 2),
    **{
        f"codebook {bits}": lambda bits=bits: CodebookWeight.of(
            draw(64, 144, high=2**bits), torch.randn(1, 2**bits), half=bits != 5
        )
        for bits in (1, 2, 3, 5, 7, 8, 9, 12)
    },
    "blocks": lambda: CodebookWeight.of(
        draw(64, 33, high=8), torch.randn(3, 8), torch.randperm(64), [10, 30, 24], torch.rand(3), "block"
    ),
    "rows": lambda: CodebookWeight.of(
        draw(64, 8, 3, 3, high=16), torch.randn(2, 16), torch.randperm(64), None, torch.rand(64), "row", half=False
    ),
    "split": lambda: split(1, False),
    "split, groups and values": lambda: split(2, True),
    "residual": residual,
}


@pytest.mark.parametrize("case", CASES)
def test_every_kind_of_code_is_decoded_as_by_us(case: str) -> None:
    torch.manual_seed(0)
    stored = CASES[case]()
    plain = holding(stored)
    made = with_codes(plain, layer_of(stored)[0])
    onnx.checker.check_model(onnx.load_model_from_string(made.content), full_check=True)
    assert made.stored == ["0"]
    assert made.floats == []
    assert len(made.content) < 0.8 * len(plain)
    for optimized in (True, False):
        assert np.array_equal(values_of(made.content, torch.zeros(1), optimized), stored().numpy())


class Tokens(nn.Module):
    """A convolution, into which exporters fold its norm, and matrices for tokens, which they turn round."""

    def __init__(self) -> None:
        super().__init__()
        self.patches = nn.Conv2d(3, 32, 4, 4)
        self.norm = nn.BatchNorm2d(32)
        self.first, self.second = nn.Linear(32, 64), nn.Linear(64, 32)
        self.head = nn.Linear(32, 5)

    def forward(self, x: Tensor) -> Tensor:
        x = self.norm(self.patches(x)).flatten(2).transpose(1, 2)
        x = x + self.second(torch.relu(self.first(x)))
        return torch.sigmoid(self.head(x.mean(1)))


@pytest.mark.parametrize(
    "method",
    [UniformQuantization(4), UniformQuantization(4, input_bits=8), PowerQuantization(3), ResidualExpansion(4),
     JLCM(3, steps=0, edge_bits=None)],
    ids=["uniform", "inputs", "powers", "residual", "codebooks"],
)  # fmt: skip
def test_a_network_computes_the_same_and_its_file_is_as_small_as_its_codes(method: object) -> None:
    torch.manual_seed(0)
    network, image = shake_norms(Tokens()), torch.randn(4, 3, 32, 32)
    run_chain(network, [method], Data([image], example=image), image)  # type: ignore[list-item]
    plain = exported(network, image)
    made = with_codes(plain, network)
    assert made.stored == ["patches", "first", "second"]
    assert made.floats == ["head"]  # whose 160 numbers take less room than operators that decode them
    layers = {name: layer for name, layer in network.named_modules() if getattr(layer, "stored", None) is not None}
    floats = sum(layers[name].current_weight().numel() * 4 for name in made.stored)  # type: ignore[operator, union-attr]
    codes = sum(layers[name].stored.stored_bytes for name in made.stored)  # type: ignore[union-attr]
    operators = 3 * 8_000
    assert len(made.content) < len(plain) - floats + codes + operators
    for optimized in (True, False):
        found, expected = (values_of(content, image, optimized) for content in (made.content, plain))
        np.testing.assert_allclose(found, expected, rtol=1e-5, atol=1e-6)


def test_layers_of_equal_weights_are_each_named() -> None:
    one, image = layer_of(CASES["one scale"]())
    same = nn.Sequential(one[0], nn.Linear(64, 9), nn.ReLU(), copy.deepcopy(one[0])).eval()  # type: ignore[index]
    made = with_codes(exported(same, image), same)
    assert (made.stored, made.floats) == (["0", "3"], [])


def test_a_network_without_codes_keeps_its_file() -> None:
    network, image = Tokens().eval(), torch.randn(2, 3, 32, 32)
    plain = exported(network, image)
    made = with_codes(plain, network)
    assert isinstance(made, Coded)
    assert (made.stored, made.floats) == ([], [])
    assert np.array_equal(values_of(made.content, image), values_of(plain, image))


def test_operators_too_old_for_codes_and_changed_weights_leave_floats_and_are_named() -> None:
    torch.manual_seed(0)
    network, image = layer_of(grid(4))
    model = onnx.load_model_from_string(exported(network, image))
    for one in model.opset_import:
        one.version = 17
    assert with_codes(model.SerializeToString(), network).floats == ["0"]
    other, _ = layer_of(grid(4))
    other[0].stored.codes[0] ^= 1  # type: ignore[union-attr, operator]
    assert with_codes(exported(network, image), other) == (exported(network, image), [], ["0"])
