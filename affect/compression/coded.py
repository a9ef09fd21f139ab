# SPDX-License-Identifier: Apache-2.0
"""Weights of an ONNX file as the codes that a release has: the file is as small, and a runtime decodes them once.

What turns codes into a weight are operators on constants alone (shifts, a look-up, products), which runtimes compute
while they load a file. From then on the file is as fast as one with floats.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from typing import Any, NamedTuple

import numpy as np
import onnx
from onnx import TensorProto, helper, numpy_helper
from torch import nn

from affect.compression.layers import CompressedConv2d, CompressedLinear
from affect.compression.stored import CodebookWeight, GridWeight, ResidualWeight, SplitWeight, StoredWeight

__all__ = ["Coded", "with_codes"]

OPSET = 18
"""First version of ONNX's operators that has all that are used here."""


class Coded(NamedTuple):
    """An ONNX file with codes.

    Attributes:
        content: The file.
        stored: Names of layers whose weights are codes in it.
        floats: Names of layers with codes whose weights the file still holds as floats: as codes they are no smaller,
            or the exporter changed them.
    """

    content: bytes
    stored: list[str]
    floats: list[str]


def with_codes(content: bytes, network: nn.Module) -> Coded:
    """Return an ONNX file of a compressed network with codes in the place of decoded weights.

    Args:
        content: The file, as exported from the network with decoded weights (``baked``).
        network: The network, whose layers hold the codes.

    Returns:
        The file, which computes the same; weights are found by their values, whatever the exporter called them.
    """
    model = onnx.load_model_from_string(content)
    versions = {one.domain: one.version for one in model.opset_import}
    layers = {
        name: layer.stored
        for name, layer in network.named_modules()
        if isinstance(layer, CompressedConv2d | CompressedLinear) and layer.stored is not None
    }
    weights = {name: stored().detach().cpu().numpy() for name, stored in layers.items()}
    kept, nodes, found = [], [], set[str]()
    for tensor in model.graph.initializer:
        match = None
        if tensor.data_type == TensorProto.FLOAT and versions.get("", 0) >= OPSET:
            match = _matching(numpy_helper.to_array(tensor), weights)
        decoder = None if match is None else _Decoder(tensor.name)
        if match is not None and decoder is not None:
            decoder.weight(layers[match.name], match.factors, match.turned)
            if decoder.size >= tensor.ByteSize():
                decoder = None
        if match is None or decoder is None:
            kept.append(tensor)
            continue
        kept += decoder.constants
        nodes += decoder.nodes
        # An exporter keeps equal weights once.
        found |= {name for name, weight in weights.items() if np.array_equal(weight, weights[match.name])}
    others = list(model.graph.node)
    for field, content_of in ((model.graph.initializer, kept), (model.graph.node, [*nodes, *others])):
        del field[:]
        field.extend(content_of)
    left = [name for name in layers if name not in found]
    return Coded(model.SerializeToString(), [name for name in layers if name in found], left)


class _Match(NamedTuple):
    name: str
    turned: bool
    factors: np.ndarray | None


def _matching(held: np.ndarray, weights: Mapping[str, np.ndarray]) -> _Match | None:
    """Return whose weight a constant of a graph is; exporters give it other names.

    It may be turned round, where a product of matrices stands for a layer, and its rows may be multiplied by what a
    batch norm behind the layer did.
    """
    shaped = []
    for name, weight in weights.items():
        for turned in (False, True) if held.ndim == 2 else (False,):
            own = held.T if turned else held
            if own.shape == weight.shape:
                if np.array_equal(own, weight):
                    return _Match(name, turned, None)
                shaped.append((name, turned, own, weight))
    for name, turned, own, weight in shaped:
        factors = _factors(own.reshape(len(own), -1), weight.reshape(len(weight), -1))
        if factors is not None:
            return _Match(name, turned, factors.reshape(-1, *[1] * (weight.ndim - 1)))
    return None


def _factors(held: np.ndarray, weight: np.ndarray) -> np.ndarray | None:
    """Return the number ``(O,)`` that each row of ``weight`` is multiplied by in ``held``; None if they differ more."""
    above, below = (np.einsum("on,on->o", weight, other, dtype=np.float64) for other in (held, weight))
    factors = np.divide(above, below, out=np.ones_like(above), where=below > 0)
    rest = np.abs(held - factors[:, None] * weight).max(1, initial=0)
    return factors.astype(np.float32) if (rest <= 1e-6 * np.abs(held).max(1, initial=0)).all() else None


class _Decoder:
    """Collects the operators and constants that decode one weight.

    Args:
        name: Name of the decoded weight in the graph.

    Attributes:
        nodes: Operators in order.
        constants: What they start from.
    """

    def __init__(self, name: str) -> None:
        self.name = name
        self.nodes: list[onnx.NodeProto] = []
        self.constants: list[TensorProto] = []

    @property
    def size(self) -> int:
        """Bytes of all that is needed."""
        return sum(one.ByteSize() for one in self.nodes) + sum(one.ByteSize() for one in self.constants)

    # ---------------------------------------------------------------------------------------------- building

    def _new(self) -> str:
        return f"{self.name}/codes/{len(self.nodes) + len(self.constants)}"

    def constant(self, values: Any, kind: Any = None) -> str:  # noqa: ANN401
        """Return the name of a constant."""
        array = np.ascontiguousarray(np.asarray(values, kind))
        self.constants.append(numpy_helper.from_array(array.reshape(np.shape(values)), self._new()))
        return self.constants[-1].name

    def operator(self, kind: str, *inputs: str, **settings: Any) -> str:  # noqa: ANN401
        """Return the name of an operator's output."""
        name = self._new()
        self.nodes.append(helper.make_node(kind, list(inputs), [name], name=name, **settings))
        return name

    def reshape(self, x: str, shape: Sequence[int]) -> str:
        """Return ``x`` in another shape."""
        return self.operator("Reshape", x, self.constant(list(shape), np.int64))

    def gather(self, table: str, index: str) -> str:
        """Return rows of a table."""
        return self.operator("Gather", table, index, axis=0)

    # ---------------------------------------------------------------------------------------------- decoding

    def integers(self, packed: np.ndarray, bits: int, count: int, to: int = TensorProto.FLOAT) -> str:
        """Return the codes ``(count,)`` that ``packing.pack`` made bytes of, as numbers of the given kind."""
        if bits == 8:
            return self.operator("Cast", self.constant(packed, np.uint8), to=to)
        # Eight codes take as many bytes as a code has bits: each lies in bytes of known places from a known bit on.
        rows = -(-len(packed) // bits)
        bytes_ = self.constant(np.pad(packed, (0, rows * bits - len(packed))).reshape(rows, bits), np.uint8)
        starts = np.arange(8) * bits
        total = None
        for k in range(-(-(int((starts % 8).max()) + bits) // 8)):
            place = np.minimum(starts // 8 + k, bits - 1)  # behind a code's last byte: cut off below
            part = self.operator("Gather", bytes_, self.constant(place, np.int64), axis=1)
            part = self.operator("Cast", part, to=TensorProto.UINT32)
            if k:
                part = self.operator("BitShift", part, self.constant(8 * k, np.uint32), direction="LEFT")
            total = part if total is None else self.operator("BitwiseOr", total, part)
        assert total is not None
        codes = self.operator("BitShift", total, self.constant(starts % 8, np.uint32), direction="RIGHT")
        codes = self.operator("BitwiseAnd", codes, self.constant(2**bits - 1, np.uint32))
        codes = self.reshape(codes, [-1])
        if rows * 8 != count:
            ends = (self.constant([edge], np.int64) for edge in (0, count, 0))
            codes = self.operator("Slice", codes, *ends)
        return self.operator("Cast", codes, to=to)

    def decoded(self, stored: StoredWeight) -> str:
        """Return the weight, in its shape."""
        kinds = {
            GridWeight: self._grid, CodebookWeight: self._codebook,
            SplitWeight: self._split, ResidualWeight: self._residual,
        }  # fmt: skip
        return kinds[type(stored)](stored)  # type: ignore[arg-type, operator]

    def weight(self, stored: StoredWeight, factors: np.ndarray | None = None, turned: bool = False) -> None:
        """Give the decoded weight its name, its rows multiplied by ``factors``, or transposed if it is ``turned``."""
        made = self.decoded(stored)
        if factors is not None:
            made = self.operator("Mul", made, self.constant(factors))
        kind = "Transpose" if turned else "Identity"  # of a matrix without a setting: its two dimensions change places
        self.nodes.append(helper.make_node(kind, [made], [self.name], name=self._new()))

    def _grid(self, stored: GridWeight) -> str:
        codes = self.integers(stored.codes.cpu().numpy(), stored.bits, math.prod(stored.shape))
        codes = self.operator("Sub", codes, self.constant(stored.levels, np.float32))
        codes = self.operator("Div", self.reshape(codes, stored.shape), self.constant(stored.levels, np.float32))
        exponent = float(stored.exponent)
        if exponent != 1:
            powers = self.operator("Abs", codes)
            powers = self.operator("Pow", powers, self.constant(1 / exponent, np.float32))
            codes = self.operator("Mul", self.operator("Sign", codes), powers)
        largest = stored.largest.cpu().numpy().reshape(-1, *[1] * (len(stored.shape) - 1))
        return self.operator("Mul", codes, self.constant(largest, np.float32))

    def _codebook(self, stored: CodebookWeight) -> str:
        rows = stored.shape[0]
        index = self.integers(stored.codes.cpu().numpy(), stored.bits, math.prod(stored.shape), TensorProto.INT32)
        index = self.reshape(index, [rows, -1])
        if stored.groups > 1:
            first = stored.row_groups().cpu().numpy()[:, None] * stored.entries
            index = self.operator("Add", index, self.constant(first, np.int32))
        book = self._floats(stored.codebook.flatten().cpu().numpy())
        values = self.gather(book, index)
        if stored.scales != "none":
            scale = stored.scale if stored.scales == "row" else stored.scale[stored.row_blocks()]
            values = self.operator("Mul", values, self._floats(scale[:, None].cpu().numpy()))
        if stored.permuted:
            values = self.gather(values, self.constant(np.argsort(stored.order().cpu().numpy()), np.int64))
        return self.reshape(values, stored.shape)

    def _floats(self, values: np.ndarray) -> str:
        name = self.constant(values)
        return name if values.dtype == np.float32 else self.operator("Cast", name, to=TensorProto.FLOAT)

    def _split(self, stored: SplitWeight) -> str:
        size = math.prod(stored.shape[2:])
        if stored.values is None:
            kernels = self.constant(stored.table.cpu().numpy())
        else:
            codes = stored.codes.cpu().numpy()
            index = self.integers(codes, stored.value_bits, stored.kernels * size, TensorProto.INT32)
            kernels = self.gather(self.constant(stored.table.cpu().numpy()), index)
            kernels = self.reshape(kernels, [stored.kernels, size])
        outputs, inputs = stored.shape[:2]
        numbers = self.integers(stored.positions.cpu().numpy(), stored.bits, outputs * inputs, TensorProto.INT32)
        counts = stored.counts.cpu().numpy().astype(np.int64)
        starts = (counts.cumsum() - counts).reshape(stored.groups, 1, inputs)
        numbers = self.reshape(numbers, [stored.groups, outputs // stored.groups, inputs])
        numbers = self.operator("Add", numbers, self.constant(starts, np.int32))
        return self.reshape(self.gather(kernels, numbers), stored.shape)

    def _residual(self, stored: ResidualWeight) -> str:
        total = None
        for k, order in enumerate(stored.orders):
            assert isinstance(order, StoredWeight)
            part, rows = self.decoded(order), getattr(stored, f"rows_{k}", None)
            if rows is not None:  # rows that an order does not cover get a row of zeros, put behind its own
                nothing = self.constant(np.zeros((1, *stored.shape[1:]), np.float32))
                place = np.full(stored.shape[0], len(rows))
                place[rows.cpu().numpy()] = np.arange(len(rows))
                part = self.operator("Concat", part, nothing, axis=0)
                part = self.gather(part, self.constant(place, np.int64))
            total = part if total is None else self.operator("Add", total, part)
        assert total is not None
        return total
