# SPDX-License-Identifier: Apache-2.0
"""Adapters say what other people's files take and give, and nothing that could run or reach anything."""

from __future__ import annotations

import copy
from pathlib import Path
from typing import Any

import cv2
import numpy as np
import pytest
import torch
import yaml

from affect.commands.configuration import config_directory
from affect.data.batch import FaceBatch
from affect.errors import CheckpointError
from affect.foreign import ProgramModule, adapter_names, read_adapter
from affect.foreign.adapter import Input, Output, parse_adapter
from affect.foreign.program import read_program
from affect.release import build_tasks

pytest.importorskip("onnxruntime")
from tests.foreign.graphs import colour_classifier

COLOURS = {
    "neutral": (128, 128, 128), "happiness": (255, 255, 0), "sadness": (0, 0, 255), "surprise": (255, 128, 0),
    "fear": (128, 0, 128), "disgust": (0, 128, 0), "anger": (255, 0, 0), "contempt": (0, 255, 255),
}  # fmt: skip
"""The colour of each expression in these tests."""

PALETTE = np.array([(r, g, b) for r in (0, 128, 255) for g in (0, 128, 255) for b in (0, 255)], np.float32)

ALPHABETIC = ["anger", "contempt", "disgust", "fear", "happiness", "neutral", "sadness", "surprise"]
SEVEN = [name for name in ALPHABETIC if name != "contempt"]
AFFECTNET = ["neutral", "happiness", "sadness", "surprise", "fear", "disgust", "anger", "contempt"]
RAF = ["surprise", "fear", "disgust", "happiness", "sadness", "anger", "neutral"]

# How the authors' own code feeds and reads their networks, written down here once more, independent of the adapters.
SIGNATURES: dict[str, dict[str, Any]] = {
    "emotiefflib_8": {"size": 224, "columns": ALPHABETIC},
    "emotiefflib_b2_8": {"size": 260, "columns": ALPHABETIC},
    "emotiefflib_b2_7": {"size": 260, "columns": SEVEN},
    "emotiefflib_mtl": {"size": 224, "columns": ALPHABETIC, "tail": np.array([[0.1, 0.0], [0.0, 0.1], [0.0, 0.0]])},
    "posterpp_rafdb": {"size": 224, "columns": RAF},
    "posterpp_affectnet7": {"size": 224, "columns": AFFECTNET[:7]},
    "posterpp_affectnet8": {"size": 224, "columns": AFFECTNET},
    "dan_rafdb": {"size": 224, "columns": RAF, "extra": ("features", "heads")},
    "dan_affectnet7": {"size": 224, "columns": AFFECTNET[:7], "extra": ("features", "heads")},
    "dan_affectnet8": {"size": 224, "columns": AFFECTNET, "extra": ("features", "heads")},
    "me_graphau_bp4d": {"size": 224, "aus": (1, 2, 4, 6, 7, 10, 12, 14, 15, 17, 23, 24), "extra": ("cl_edge",)},
    "me_graphau_disfa": {"size": 224, "aus": (1, 2, 4, 6, 9, 12, 25, 26), "extra": ("cl_edge",)},
}
MEAN, STD = np.array([0.485, 0.456, 0.406]), np.array([0.229, 0.224, 0.225])


def shipped(name: str) -> Path:
    return config_directory() / "foreign" / f"{name}.yaml"


def plain_images(colours: list, size: int = 32) -> torch.Tensor:
    """Return RGB uint8 images ``(B, 3, S, S)`` of one colour each."""
    return torch.tensor(np.array(colours), dtype=torch.uint8)[:, :, None, None].expand(-1, -1, size, size).contiguous()


def predict(content: bytes, path: Path, adapter: Path, image: torch.Tensor) -> dict[str, torch.Tensor]:
    path.write_bytes(content)
    program = read_program(path, read_adapter(adapter))
    module = ProgramModule(program.content, build_tasks(program), str(path), program.adapter)
    return module.predict_step(FaceBatch(image=image, targets={}, masks={}))


def test_every_shipped_adapter_is_tested_here() -> None:
    assert adapter_names(config_directory()) == sorted(SIGNATURES)
    for name in SIGNATURES:
        assert not read_adapter(shipped(name)).tested
        assert "Untested on the original weights" in shipped(name).read_text()


@pytest.mark.parametrize("name", sorted(name for name in SIGNATURES if "columns" in SIGNATURES[name]))
def test_expressions_come_out_under_their_names(name: str, tmp_path: Path) -> None:
    signature = SIGNATURES[name]
    size, columns = signature["size"], signature["columns"]
    units = (np.array([COLOURS[one] for one in columns]) / 255 - MEAN) / STD
    content = colour_classifier(
        units, ("batch", 3, size, size), tail=signature.get("tail"), extra=signature.get("extra", ())
    )
    asked = sorted(columns, reverse=True)  # no network has this order
    found = predict(content, tmp_path / "x.onnx", shipped(name), plain_images([COLOURS[one] for one in asked], size))
    outputs = read_adapter(shipped(name)).outputs["expression"].labels
    assert [outputs[k] for k in found["expression"].argmax(1)] == asked
    assert torch.allclose(found["expression"].sum(1), torch.ones(len(asked)))
    if "tail" in signature:
        expected = ((np.array([COLOURS[one] for one in asked]) / 255 - MEAN) / STD)[:, :2] * 0.1
        assert torch.allclose(found["valence_arousal"], torch.tensor(expected, dtype=torch.float32), atol=1e-3)


@pytest.mark.parametrize("name", sorted(name for name in SIGNATURES if "aus" in SIGNATURES[name]))
def test_action_units_come_out_under_their_numbers(name: str, tmp_path: Path) -> None:
    signature = SIGNATURES[name]
    size, aus = signature["size"], signature["aus"]
    units = (PALETTE[: len(aus)] / 255 - MEAN) / STD
    content = colour_classifier(units, ("batch", 3, size, size), softmax=True, extra=signature["extra"])
    order = list(range(len(aus)))[::-1]
    image = plain_images([PALETTE[k] for k in order], size)
    values = predict(content, tmp_path / "x.onnx", shipped(name), image)["au"]
    labels = read_adapter(shipped(name)).outputs["au"].labels
    for row, k in enumerate(order):
        assert [label for label, value in zip(labels, values[row], strict=True) if value > 0.5] == [f"AU{aus[k]}"]


@pytest.mark.parametrize(
    ("given", "expected"),
    [
        (Input(4), (0.2, 0.4, 0.6)),
        (Input(4, colour="BGR"), (0.6, 0.4, 0.2)),
        (Input(4, range=255.0), (51.0, 102.0, 153.0)),
        (Input(4, range=2.0, mean=(1.0,)), (-0.6, -0.2, 0.2)),
        (Input(4, mean=(0.1, 0.2, 0.3), std=(0.1, 0.2, 0.3)), (1.0, 1.0, 1.0)),
    ],
)
@pytest.mark.parametrize("layout", ["NCHW", "NHWC"])
def test_pixels_become_what_the_network_was_trained_on(given: Input, expected: tuple, layout: str) -> None:
    import dataclasses

    x = dataclasses.replace(given, layout=layout).prepare(plain_images([(51, 102, 153)], 4))
    assert x.shape == ((1, 3, 4, 4) if layout == "NCHW" else (1, 4, 4, 3))
    channels = x[0, :, 2, 1] if layout == "NCHW" else x[0, 2, 1]
    assert torch.allclose(channels, torch.tensor(expected), atol=1e-4)


def test_grey_is_that_of_image_libraries() -> None:
    image = np.random.default_rng(0).integers(0, 256, (8, 8, 3), np.uint8)
    expected = cv2.cvtColor(image, cv2.COLOR_RGB2GRAY).astype(np.float32)
    x = Input(8, colour="GREY", range=255.0).prepare(torch.from_numpy(image).permute(2, 0, 1)[None])
    assert x.shape == (1, 1, 8, 8)
    assert np.abs(x[0, 0].numpy() - expected).max() <= 1


def test_valence_and_arousal_are_taken_by_name() -> None:
    output = Output("valence_arousal", ("arousal", "valence"), columns=(1, 3), values="numbers")
    assert output.read(torch.tensor([[9.0, 0.25, -3.0]])).tolist() == [[-1.0, 0.25]]
    assert output.outputs() == ["valence", "arousal"]


GOOD = {
    "name": "theirs",
    "input": {"size": 32},
    "outputs": {"expression": {"kind": "expression", "labels": ["anger", "Happy"]}},
}


def changed(*keys: Any, value: Any) -> Any:
    node = copy.deepcopy(GOOD)
    inner: Any = node
    for key in keys[:-1]:
        inner = inner[key]
    inner[keys[-1]] = value
    return node


def test_a_small_file_is_enough() -> None:
    adapter = parse_adapter(GOOD, "x.yaml")
    assert adapter.labels() == {"expression": ["anger", "happiness"]}
    assert adapter.preprocess()["image_size"] == 32


@pytest.mark.parametrize(
    ("keys", "value", "message"),
    [
        # What could run or reach something.
        (("input", "_target_"), "os.system", "not on the list"),
        (("crop",), {"_target_": "os.system"}, "not on the list"),
        (("unused",), {"a": [{"_target_": "os.system"}]}, "not on the list"),
        (("outputs", "expression", "_args_"), [1], "_args_ is not allowed"),
        (("name",), "${oc.env:HOME}", "interpolation is not allowed"),
        (("source",), "${oc.env:HOME}", "interpolation is not allowed"),
        (("input", "name"), "${hydra:runtime.cwd}", "interpolation is not allowed"),
        (("source",), "https://example.org/model.onnx", "paths and addresses"),
        (("input", "name"), "/etc/passwd", "paths and addresses"),
        (("name",), "../../outside", "paths and addresses"),
        (("name",), "a/b", "cannot be named"),
        (("outputs",), {"../x": GOOD["outputs"]["expression"]}, "cannot be named"),
        (("checkpoint_path",), "x.pth", "paths and addresses"),
        (("weights",), "x.onnx", "no key weights"),
        # What makes no sense.
        (("inptu",), {}, "no key inptu; did you mean input"),
        (("input", "colour"), "rgb", "input.colour='rgb'; did you mean|input.colour='rgb'"),
        (("input", "size"), 0, "input.size=0"),
        (("input", "size"), 10**9, "input.size=1000000000"),
        (("input", "size"), True, "input.size=True"),
        (("input", "mean"), [0.1, 0.2], "input.mean needs one number, or 3"),
        (("input", "std"), 0.0, "input.std must be above 0"),
        (("input", "mean"), float("nan"), "input.mean=nan"),
        (("input", "range"), -1, "input.range=-1"),
        (("input", "layout"), "HWC", "input.layout='HWC'"),
        (("outputs",), {}, "at least one task"),
        (
            ("outputs", "expression", "labels"),
            ["anger", "hapiness"],
            "no expression .hapiness.*mean happiness",
        ),
        (("outputs", "expression", "labels"), ["anger", "angry"], "names anger twice"),
        (("outputs", "expression", "labels"), "anger", "must list the names"),
        (("outputs", "expression", "labels"), None, "outputs.expression.labels is missing"),
        (("outputs", "expression", "columns"), [0, 3], "2 labels need as many columns"),
        (("outputs", "expression", "columns"), [-2, 0], "2 labels need as many columns"),
        (("outputs", "expression", "kind"), "emotion", "kind='emotion'"),
        (("outputs", "expression", "values"), "numbers", "expression is values=logits or probabilities"),
        (("outputs", "expression", "values"), "softmax", "values='softmax'"),
        (("outputs", "expression", "name"), 1.5, "must be a name, or the number"),
        (("outputs", "expression"), {"kind": "au", "labels": ["AU3"]}, "no action unit 'AU3'"),
        (("outputs", "expression"), {"kind": "valence_arousal", "labels": ["valence"]}, "is values=numbers"),
        (("crop",), {"kind": "similar"}, "crop: .*did you mean similarity"),
        (("crop",), {"kind": "box", "margins": 1}, "crop: .*unknown key 'margins'"),
        (("crop",), "box", "crop must be null or a crop recipe"),
    ],
)
def test_what_an_adapter_may_not_say_is_refused(keys: tuple, value: Any, message: str) -> None:
    with pytest.raises(CheckpointError, match=message) as error:
        parse_adapter(changed(*keys, value=value), "theirs.yaml")
    assert "\n" not in str(error.value)
    assert "theirs.yaml" in str(error.value)


@pytest.mark.parametrize("node", [None, 3, [GOOD], "text"])
def test_what_is_no_mapping_is_refused(node: Any) -> None:
    with pytest.raises(CheckpointError, match="must hold name, input"):
        parse_adapter(node, "theirs.yaml")


def test_code_in_the_file_does_not_run(tmp_path: Path) -> None:
    path = tmp_path / "theirs.yaml"
    path.write_text(f"name: !!python/object/apply:os.mkdir ['{tmp_path / 'ran'}']\n")
    with pytest.raises(CheckpointError):
        read_adapter(path)
    assert not (tmp_path / "ran").exists()


def test_a_file_that_names_itself_or_grows_without_end_is_refused(tmp_path: Path) -> None:
    path = tmp_path / "theirs.yaml"
    path.write_text("&a [*a]\n")
    with pytest.raises(CheckpointError, match="contains itself"):
        read_adapter(path)
    path.write_text("a0: &a0 [1, 1]\n" + "".join(f"a{k}: &a{k} [*a{k - 1}, *a{k - 1}]\n" for k in range(1, 40)))
    with pytest.raises(CheckpointError, match="more than 5000000 values"):
        read_adapter(path)
    path.write_text("[" * 100_000)
    with pytest.raises(CheckpointError, match="nested too deep"):
        read_adapter(path)
    with pytest.raises(CheckpointError, match="no such file"):
        read_adapter(tmp_path / "missing.yaml")


def test_shipped_adapters_list_every_key() -> None:
    for name in SIGNATURES:
        node = yaml.safe_load(shipped(name).read_text())
        assert set(node) == {"name", "tested", "source", "input", "crop", "outputs"}
        assert set(node["input"]) == {"name", "size", "layout", "colour", "range", "mean", "std"}
        for output in node["outputs"].values():
            assert set(output) == {"kind", "name", "columns", "labels", "values"}
