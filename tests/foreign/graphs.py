# SPDX-License-Identifier: Apache-2.0
"""ONNX files of known behaviour: they tell plain images apart by colour, in the columns and units of other people."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import onnx
from onnx import TensorProto, helper, numpy_helper

OPSET = 17


def model_of(nodes: Sequence, inputs: Sequence, outputs: Sequence, constants: dict[str, np.ndarray]) -> onnx.ModelProto:
    """Return a checked model of nodes and constants."""
    graph = helper.make_graph(
        list(nodes), "graph", list(inputs), list(outputs), [numpy_helper.from_array(v, k) for k, v in constants.items()]
    )
    model = helper.make_model(graph, opset_imports=[helper.make_opsetid("", OPSET)], ir_version=9)
    onnx.checker.check_model(model)
    return model


def colour_classifier(
    colours: np.ndarray,
    shape: Sequence[int | str],
    axes: Sequence[int] = (2, 3),
    softmax: bool = False,
    tail: np.ndarray | None = None,
    extra: Sequence[str] = (),
    kind: int = TensorProto.FLOAT,
    names: tuple[str, str] = ("input", "output"),
) -> bytes:
    """Return a file whose column k is largest for plain images of colour k.

    Args:
        colours: What the graph gets for each class ``(K, C)``, in its own units.
        shape: Shape of the input.
        axes: Axes of height and width.
        softmax: Give probabilities instead of logits.
        tail: Weights ``(C, T)`` of T more columns, which are linear in the colour.
        extra: Names of further outputs, the colour itself.
        kind: Numbers that the input takes.
        names: Names of input and output.
    """
    colours = np.asarray(colours, np.float32)
    constants = {
        "axes": np.asarray(axes, np.int64),
        "weight": (2 * colours.T).astype(np.float32),
        "bias": -(colours**2).sum(1).astype(np.float32),
        "sharp": np.float32(50).reshape(1),
    }
    first, last = names
    nodes = [
        helper.make_node("Cast", [first], ["x"], to=TensorProto.FLOAT),
        helper.make_node("ReduceMean", ["x"], ["kept"], axes=list(axes), keepdims=0),
        helper.make_node("MatMul", ["kept", "weight"], ["product"]),
        helper.make_node("Add", ["product", "bias"], ["near"]),
        helper.make_node("Mul", ["near", "sharp"], ["logits"]),
    ]
    constants.pop("axes")
    found = "logits"
    if softmax:
        nodes.append(helper.make_node("Softmax", [found], ["shares"], axis=-1))
        found = "shares"
    width = len(colours)
    if tail is not None:
        constants["tail"] = np.asarray(tail, np.float32)
        nodes += [
            helper.make_node("MatMul", ["kept", "tail"], ["more"]),
            helper.make_node("Concat", [found, "more"], ["joined"], axis=1),
        ]
        found, width = "joined", width + constants["tail"].shape[1]
    nodes.append(helper.make_node("Identity", [found], [last]))
    batch = shape[0]
    outputs = [helper.make_tensor_value_info(last, TensorProto.FLOAT, [batch, width])]
    for name in extra:
        nodes.append(helper.make_node("Identity", ["kept"], [name]))
        outputs.append(helper.make_tensor_value_info(name, TensorProto.FLOAT, [batch, colours.shape[1]]))
    inputs = [helper.make_tensor_value_info(first, kind, list(shape))]
    return model_of(nodes, inputs, outputs, constants).SerializeToString()
