# SPDX-License-Identifier: Apache-2.0
"""ONNX files of strangers: what reaches beyond the file is refused, and what does not fit is said in one line."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from affect.data.batch import FaceBatch
from affect.errors import CheckpointError, ConfigError
from affect.foreign import Adapter, Input, Output, ProgramModule, read_program
from affect.foreign import program as program_room
from affect.release import build_tasks

pytest.importorskip("onnxruntime")
onnx = pytest.importorskip("onnx")
from onnx import TensorProto, helper, numpy_helper  # noqa: E402 - behind the check that the package is there

from tests.foreign.graphs import colour_classifier, model_of  # noqa: E402

CLASSES = ("anger", "happiness", "neutral")
COLOURS = np.array([(255, 0, 0), (255, 255, 0), (128, 128, 128)], np.float32)


def adapter(**changes: Any) -> Adapter:
    given = Input(**{"size": 8, "range": 255.0, **changes.pop("input", {})})
    return Adapter("theirs", given, {"expression": Output("expression", CLASSES, **changes)})


def classifier(shape: tuple = ("batch", 3, 8, 8), **options: Any) -> bytes:
    return colour_classifier(COLOURS, shape, **options)


def batch(colours: np.ndarray = COLOURS, size: int = 8) -> FaceBatch:
    image = torch.tensor(colours, dtype=torch.uint8)[:, :, None, None].expand(-1, -1, size, size).contiguous()
    return FaceBatch(image=image, targets={}, masks={})


def opened(path: Path, content: bytes, with_adapter: Adapter) -> ProgramModule:
    path.write_bytes(content)
    program = read_program(path, with_adapter)
    return ProgramModule(program.content, build_tasks(program), str(path), program.adapter)


def said(path: Path, content: bytes, with_adapter: Adapter, match: str) -> None:
    """Check that a file is refused in one line, when it is opened or when it runs."""
    with pytest.raises(CheckpointError, match=match) as error:
        opened(path, content, with_adapter).predict_step(batch())
    assert "\n" not in str(error.value)


@pytest.fixture
def file(tmp_path: Path) -> Path:
    return tmp_path / "theirs.onnx"


# ------------------------------------------------------------------------------------------------- it works


@pytest.mark.parametrize(
    ("shape", "options", "given"),
    [
        (("batch", 3, 8, 8), {}, {}),
        (("batch", 8, 8, 3), {"axes": (1, 2)}, {"layout": "NHWC"}),
        ((1, 3, 8, 8), {}, {}),
        ((2, 3, 8, 8), {}, {}),
        (("batch", 3, 8, 8), {"kind": TensorProto.UINT8}, {}),
        (("batch", 3, 8, 8), {"kind": TensorProto.FLOAT16}, {}),
    ],
)
def test_layouts_kinds_of_numbers_and_fixed_batches(file: Path, shape: tuple, options: dict, given: dict) -> None:
    module = opened(file, classifier(shape, **options), adapter(input=given))
    assert module.eval().to("cpu") is module
    values = module.predict_step(batch(COLOURS[[2, 0, 1]]))["expression"]
    assert values.argmax(1).tolist() == [2, 0, 1]
    assert values.shape == (3, 3)


def test_an_output_is_chosen_by_name_or_number(file: Path) -> None:
    content = classifier(extra=("features",))
    for name in ("output", 0):
        module = opened(file, content, adapter(name=name))
        assert module.predict_step(batch())["expression"].argmax(1).tolist() == [0, 1, 2]
    said(file, content, adapter(), r"2 outputs \(output, features\); say in the adapter which one is expression")
    said(file, content, adapter(name="logits"), "no output 'logits' for expression; there are output, features")
    said(file, content, adapter(name=2), "no output 2 for expression")


# ---------------------------------------------------------------------------------------------- what does not fit


@pytest.mark.parametrize(
    ("content", "with_adapter", "message"),
    [
        (lambda: classifier()[:200], adapter(), "no ONNX file, or damaged"),
        (lambda: b"", adapter(), "no ONNX file, or damaged"),
        (lambda: b"\x80\x04cos\nsystem\n(S'true'\ntR.", adapter(), "no ONNX file, or damaged"),
        (lambda: b"PK\x03\x04" + bytes(100), adapter(), "no ONNX file, or damaged"),
        (lambda: classifier(("batch", 8, 8, 3), axes=(1, 2)), adapter(), "NCHW RGB images have 3 channels on axis 1"),
        (lambda: classifier(), adapter(input={"colour": "GREY"}), "GREY images have 1 channels"),
        (lambda: classifier(), adapter(input={"size": 16}), "the adapter says size 16"),
        (lambda: classifier(), adapter(input={"name": "image"}), "no input 'image'; there are input"),
        (lambda: classifier(kind=TensorProto.INT64), adapter(), r"takes tensor\(int64\), which is no image"),
        (lambda: colour_classifier(np.eye(5, 3), ("b", 3, 8, 8)), adapter(), "5 numbers per image, .* names 3"),
        (lambda: colour_classifier(np.eye(2, 3), ("b", 3, 8, 8)), adapter(columns=(0, 3)), "2 numbers per image"),
    ],
)
def test_what_does_not_fit_is_said_in_one_line(
    file: Path, content: Callable[[], bytes], with_adapter: Adapter, message: str
) -> None:
    said(file, content(), with_adapter, message)


def test_a_file_without_adapter_says_what_is_missing(file: Path) -> None:
    file.write_bytes(classifier())
    with pytest.raises(CheckpointError, match=r"not written by affect export, .*; add adapter="):
        read_program(file)
    with pytest.raises(CheckpointError, match="no such file"):
        read_program(file.with_name("other.onnx"))


def test_a_missing_package_is_named(monkeypatch: pytest.MonkeyPatch) -> None:
    with pytest.raises(ConfigError, match=r"not_there: pip install 'affect\[export\]'"):
        program_room.require("not_there")


# ---------------------------------------------------------------------------------------------------- attacks


def model() -> Any:
    return onnx.load_model_from_string(classifier())


def external(tensor: Any, location: str) -> None:
    tensor.ClearField("raw_data")
    tensor.data_location = TensorProto.EXTERNAL
    for key, value in (("location", location), ("offset", "0"), ("length", "16")):
        tensor.external_data.add(key=key, value=value)


@pytest.mark.parametrize("location", ["/etc/passwd", "../secret.bin", "weights.bin", "file:///etc/passwd"])
def test_tensors_in_other_files_are_refused(file: Path, location: str) -> None:
    (file.parent / "weights.bin").write_bytes(bytes(1024))
    found = model()
    external(found.graph.initializer[0], location)
    said(file, found.SerializeToString(), adapter(), "lies in another file")


def test_tensors_in_other_files_are_refused_wherever_they_hide(file: Path) -> None:
    inner = helper.make_graph([], "inner", [], [helper.make_tensor_value_info("v", TensorProto.FLOAT, [1])])
    value = numpy_helper.from_array(np.zeros(1, np.float32), "v")
    external(value, "/etc/passwd")
    inner.initializer.append(value)
    # In a branch that never runs.
    found = model()
    found.graph.node.append(helper.make_node("If", ["never"], ["unused"], then_branch=inner, else_branch=inner))
    said(file, found.SerializeToString(), adapter(), "lies in another file")
    # In the attribute of a node.
    found = model()
    found.graph.node.append(helper.make_node("Constant", [], ["unused"], value=value))
    said(file, found.SerializeToString(), adapter(), "lies in another file")
    # In a function of the file.
    found = model()
    node = helper.make_node("Constant", [], ["y"], value=value)
    found.functions.append(helper.make_function("theirs", "f", [], ["y"], [node], [helper.make_opsetid("", 17)]))
    said(file, found.SerializeToString(), adapter(), "lies in another file")
    # In a sparse tensor.
    found = model()
    sparse = helper.make_sparse_tensor(value, numpy_helper.from_array(np.zeros(1, np.int64), "i"), [4])
    found.graph.sparse_initializer.append(sparse)
    said(file, found.SerializeToString(), adapter(), "lies in another file")


def test_operators_of_strangers_are_refused(file: Path) -> None:
    found = model()
    found.graph.node.append(helper.make_node("Run", ["kept"], ["unused"], domain="their.library"))
    said(file, found.SerializeToString(), adapter(), "operator their.library.Run is none of ONNX Runtime")
    found = model()
    node = helper.make_node("EPContext", ["kept"], ["unused"], domain="com.microsoft", ep_cache_context="/etc/passwd")
    found.graph.node.append(node)
    said(file, found.SerializeToString(), adapter(), "names a file of an accelerator")


def test_tensors_of_impossible_size_are_refused(file: Path) -> None:
    found = model()
    found.graph.initializer[0].dims[0] = 1 << 40
    said(file, found.SerializeToString(), adapter(), "claims .* numbers, more than a file can hold")
    found = model()
    found.graph.initializer[0].dims[0] = -3
    said(file, found.SerializeToString(), adapter(), "negative size")
    found = model()
    found.graph.initializer[0].raw_data = found.graph.initializer[0].raw_data[:-4]
    said(file, found.SerializeToString(), adapter(), "is damaged|refuses it")


def test_values_that_are_no_numbers_are_refused(file: Path) -> None:
    found = model()
    weight = numpy_helper.to_array(found.graph.initializer[0]).copy()
    weight[0] = np.nan
    found.graph.initializer[0].CopyFrom(numpy_helper.from_array(weight, found.graph.initializer[0].name))
    said(file, found.SerializeToString(), adapter(), "holds values that are not numbers")
    # Numbers that only become infinite while it runs.
    nodes = [
        helper.make_node("ReduceMean", ["input"], ["kept"], axes=[2, 3], keepdims=0),
        helper.make_node("Sub", ["kept", "kept"], ["zero"]),
        helper.make_node("Div", ["kept", "zero"], ["output"]),
    ]
    given = helper.make_tensor_value_info("input", TensorProto.FLOAT, ["b", 3, 8, 8])
    out = helper.make_tensor_value_info("output", TensorProto.FLOAT, ["b", 3])
    content = model_of(nodes, [given], [out], {}).SerializeToString()
    said(file, content, adapter(values="logits"), "not finite")


def test_a_graph_that_gives_too_few_rows_is_refused(file: Path) -> None:
    nodes = [helper.make_node("ReduceMean", ["input"], ["output"], axes=[0, 2, 3], keepdims=0)]
    given = helper.make_tensor_value_info("input", TensorProto.FLOAT, ["b", 3, 8, 8])
    content = model_of(nodes, [given], [helper.make_tensor_value_info("output", TensorProto.FLOAT, [3])], {})
    two = FaceBatch(image=batch().image[:2], targets={}, masks={})
    module = opened(file, content.SerializeToString(), adapter())
    with pytest.raises(CheckpointError, match=r"has \(3,\) numbers for 2 images"):
        module.predict_step(two)


def exported(texts: dict[str, Any]) -> bytes:
    """Return a file that claims to be of ours."""
    content = classifier(kind=TensorProto.UINT8, names=("image", "expression"))
    found = onnx.load_model_from_string(content)
    for key, value in program_room.describe(texts).items():
        found.metadata_props.add(key=key, value=value)
    return found.SerializeToString()


TEXTS: dict[str, Any] = {
    "task": {"expression": {"_target_": "affect.tasks.Expression", "classes": list(CLASSES)}},
    "labels": {"expression": list(CLASSES)},
    "preprocess": {"image_size": 8, "recipe": None},
}


def test_a_file_of_ours_needs_no_adapter(file: Path) -> None:
    file.write_bytes(exported(TEXTS))
    program = read_program(file)
    assert program.labels == {"expression": list(CLASSES)}
    ProgramModule(program.content, build_tasks(program), str(file)).predict_step(batch())


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"task": {"expression": {"_target_": "os.system", "command": "true"}}}, "os.system: not on the list"),
        ({"task": {"expression": {**TEXTS["task"]["expression"], "unused": {"_target_": "os.system"}}}}, "not on the"),
        ({"task": {"expression": {**TEXTS["task"]["expression"], "_partial_": True}}}, "not allowed"),
        ({"task": {"expression": {"_target_": "${oc.env:HOME}"}}}, "interpolation is not allowed"),
        ({"task": {"expression": {**TEXTS["task"]["expression"], "score": "${oc.env:HOME}"}}}, "interpolation"),
        ({"task": {"../x": TEXTS["task"]["expression"]}, "labels": {"../x": list(CLASSES)}}, "cannot be named"),
        ({"labels": {"expression": ["happiness", "anger", "neutral"]}}, "outputs of expression are not those of"),
        ({"labels": {"expression": ["anger", "happiness"]}}, "outputs of expression are not those of"),
        ({"labels": {}}, "list of output names for each task"),
        ({"preprocess": {"image_size": "8"}}, "image_size='8'"),
        ({"preprocess": None}, "must hold image_size"),
        ({"people": ["SN001"]}, "list of names for each name space"),
        ({"training": {"dataset": {"name": "../../x"}, "protocol": {}}}, "paths"),
        ({"training": {"dataset": {"name": "a/b"}, "protocol": {}}}, "cannot be named"),
        (
            {
                "training": {
                    "dataset": {"name": "x", "read": {"_target_": "affect.data.layouts.table.read", "table": "/a"}},
                    "protocol": {},
                }
            },
            "paths are not allowed",
        ),
        (
            {"training": {"dataset": {"name": "x", "read": {"_target_": "os.system"}}, "protocol": {}}},
            "not on the list",
        ),
        ({"selection": ["best"]}, "must be a mapping"),
    ],
)
def test_what_a_file_of_ours_may_not_say_is_refused(file: Path, changes: dict, message: str) -> None:
    file.write_bytes(exported(TEXTS | changes))
    with pytest.raises(CheckpointError, match=message) as error:
        build_tasks(read_program(file))
    assert "\n" not in str(error.value)


def test_a_text_that_is_no_json_and_another_format_are_refused(file: Path) -> None:
    for key, value, message in (
        ("affect.labels", "{", "affect.labels"),
        ("affect.labels", json.dumps([[[]]]) * 2, "affect.labels"),
        ("affect.task", "[" * 100_000, "nested too deep"),
        ("affect.format", "99", "format '99', which this version does not know"),
    ):
        found = onnx.load_model_from_string(exported(TEXTS))
        next(entry for entry in found.metadata_props if entry.key == key).value = value
        file.write_bytes(found.SerializeToString())
        with pytest.raises(CheckpointError, match=message) as error:
            read_program(file)
        assert "\n" not in str(error.value)
