# SPDX-License-Identifier: Apache-2.0
"""An exported file predicts what its model does, for any batch size, and says itself what its outputs are."""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any

import numpy as np
import pytest
import torch
from hydra.utils import instantiate
from omegaconf import OmegaConf

from affect import export
from affect.commands.configuration import compose, config_directory
from affect.data.batch import FaceBatch
from affect.errors import ConfigError
from affect.models.base import AffectModule
from affect.tasks import AUOccurrence, Expression, Landmarks, Task, ValenceArousal

onnx = pytest.importorskip("onnx")
pytest.importorskip("onnxscript")
runtime = pytest.importorskip("onnxruntime")

SIZE = 32
MODELS = sorted(path.stem for path in (config_directory() / "model").glob("*.yaml"))
MAPS = ("au_transformer", "task_token_transformer", "exogenous", "thin")
QUICK = ("baseline",)
ELSEWHERE = ("thin", "thin_exogenous", "exogenous")
"""Models that need a trained run to be built; their parts are those of the other THIN models."""


def build(name: str, aus: tuple[int, ...] = (1, 2, 4, 12)) -> AffectModule:
    """Return a small model of ``conf/model``, with weights that make a difference."""
    output = "map" if name.startswith(MAPS) else "vector"
    encoder = ["encoder=pixels"] if name == "decafa" else ["encoder=plain_convolutions", f"encoder.output={output}"]
    overrides = [f"model={name}", *encoder, f"encoder.image_size={SIZE}", "task=[au]"]
    node = compose("train", overrides).model
    plain = OmegaConf.to_container(node, resolve=True)
    assert isinstance(plain, dict)
    plain = {key: value for key, value in plain.items() if key not in ("objectives", "weighting")}
    if isinstance(plain.get("orders"), int):
        plain |= {"orders": min(plain["orders"], 20, math.factorial(len(aus))), "kept": None}
    tasks: dict[str, Task] = {"au": AUOccurrence(aus=list(aus))}
    if name == "decafa":
        tasks = {f"landmarks_{scheme}": Landmarks(scheme=scheme) for scheme in ("98", "68", "5")}
    elif name != "au_transformer":
        tasks |= {"expression": Expression(classes="faces"), "valence_arousal": ValenceArousal()}
    torch.manual_seed(0)
    module = instantiate(plain, _partial_=True, _convert_="object")(tasks=tasks).eval()
    if name != "decafa":  # whose weights are no small ones, and whose softmax over places amplifies rounding
        for parameter in module.parameters():  # heads start near zero: then everything would agree
            parameter.data.add_(0.05 * torch.randn_like(parameter))
    return module


def images(count: int, size: int = SIZE, seed: int = 0) -> torch.Tensor:
    generator = torch.Generator().manual_seed(seed)
    return torch.randint(0, 256, (count, 3, size, size), dtype=torch.uint8, generator=generator)


def values(module: AffectModule, image: torch.Tensor) -> dict[str, torch.Tensor]:
    with torch.inference_mode():
        return module.predict_step(FaceBatch(image=image, targets={}, masks={}))


@pytest.fixture(scope="module")
def made() -> Callable[[str], tuple[AffectModule, bytes]]:
    """Return models and their files, each made once."""
    held: dict[str, tuple[AffectModule, bytes]] = {}

    def make(name: str) -> tuple[AffectModule, bytes]:
        if name not in held:
            module = build(name)
            held[name] = module, export.onnx_bytes(module, SIZE, list(module.tasks))
        return held[name]

    return make


@pytest.mark.parametrize(
    "name", [name if name in QUICK else pytest.param(name, marks=pytest.mark.slow) for name in MODELS]
)
def test_every_model_predicts_the_same_as_a_file(name: str, made: Callable) -> None:
    if name in ELSEWHERE:
        pytest.skip("is built from a trained run")
    module, content = made(name)
    for count in (1, 5):  # the graph was made from two images
        image = images(count, seed=count)
        parity = export.differences(
            values(module, image), export.program_values(content, module.tasks, image), module.tasks
        )
        assert export.refusal(parity, int8=False) is None, parity


@pytest.mark.slow
def test_monet_takes_its_orders_and_draws_along() -> None:
    module = build("monet", (1, 12))
    content = export.onnx_bytes(module, SIZE, list(module.tasks))
    image = images(4)
    whole = export.program_values(content, module.tasks, image)
    assert export.refusal(export.differences(values(module, image), whole, module.tasks), int8=False) is None
    alone = export.program_values(content, module.tasks, image[2:3])  # in any batch an image has the same answer
    assert torch.allclose(whole["au"][2:3], alone["au"], atol=1e-6)


def test_a_model_that_draws_anew_is_refused() -> None:
    module = build("baseline")
    module.fresh_samples = True
    with pytest.raises(ConfigError, match="fresh_samples=true draws anew"):
        export.onnx_bytes(module, SIZE, list(module.tasks))


def test_a_model_that_cannot_be_captured_is_refused_in_one_line() -> None:
    class Reads(type(build("baseline"))):  # type: ignore[misc]
        """Decides by a number that only an image has."""

        def forward(self, batch: Any) -> dict[str, torch.Tensor]:
            if batch.image.float().mean().item() > 100:
                return super().forward(batch)
            return {name: -output for name, output in super().forward(batch).items()}

    module = build("baseline")
    module.__class__ = Reads
    with pytest.raises(ConfigError, match="Reads cannot be exported") as error:
        export.onnx_bytes(module, SIZE, list(module.tasks))
    assert "\n" not in str(error.value)


def test_the_file_says_what_it_is_and_nothing_of_this_machine(made: Callable) -> None:
    module, plain = made("baseline")
    texts = {"labels": {name: list(task.outputs) for name, task in module.tasks.items()}, "preprocess": {"a": 1}}
    content = export.with_metadata(plain, texts, "a note")
    session = runtime.InferenceSession(content, providers=["CPUExecutionProvider"])
    found = session.get_modelmeta().custom_metadata_map
    assert found["affect.format"] == "1"
    assert '"AU12"' in found["affect.labels"]
    assert [output.name for output in session.get_outputs()] == list(module.tasks)
    [given] = session.get_inputs()
    assert (given.name, given.type, given.shape[1:]) == ("image", "tensor(uint8)", [3, SIZE, SIZE])
    assert isinstance(given.shape[0], str)
    for text in (b"/site-packages/", b'File "', b".py"):
        assert text not in content
    image = images(3)
    again = export.program_values(content, module.tasks, image)
    assert all(torch.equal(again[n], v) for n, v in export.program_values(plain, module.tasks, image).items())


def test_int8_is_near_smaller_and_of_the_encoder_alone(made: Callable) -> None:
    module, plain = made("baseline")
    outside = export.nodes_outside(plain)
    graph = onnx.load_model_from_string(plain).graph
    inside = [node.op_type for node in graph.node if node.name not in outside]
    assert inside.count("Conv") == [node.op_type for node in graph.node].count("Conv") > 0
    assert "Gemm" not in inside
    content = export.quantize(plain, [images(8, seed=s).numpy() for s in range(2)], outside=outside)
    assert export.is_quantized(content)
    assert not export.is_quantized(plain)
    image = images(16, seed=9)
    parity = export.differences(
        values(module, image), export.program_values(content, module.tasks, image), module.tasks
    )
    assert export.refusal(parity, int8=True) is None, parity
    assert any(one.largest > 0 for one in parity.values())
    heads = [node for node in onnx.load_model_from_string(content).graph.node if node.op_type == "Gemm"]
    producers = {name: node.op_type for node in onnx.load_model_from_string(content).graph.node for name in node.output}
    assert heads
    assert all(producers.get(head.input[1]) != "DequantizeLinear" for head in heads)


def test_a_program_of_torch_export_holds_its_names(made: Callable) -> None:
    module, _ = made("baseline")
    content = export.torch_bytes(module, SIZE, {"labels": {"au": ["AU1"]}})
    image = images(3)
    found = export.torch_values(content, module.tasks, image)
    assert all(torch.allclose(found[name], value, atol=1e-6) for name, value in values(module, image).items())
    import io

    extra = {"affect.json": ""}
    torch.export.load(io.BytesIO(content), extra_files=extra)
    assert "AU1" in str(extra["affect.json"])


def test_a_file_that_differs_is_refused() -> None:
    task = {"au": AUOccurrence(aus=[1, 2])}
    first, second = {"au": torch.zeros(2, 2)}, {"au": torch.tensor([[0.0, 0.2], [0.0, 0.0]])}
    parity = export.differences(first, second, task)
    assert parity["au"].largest == pytest.approx(0.2)
    assert parity["au"].mean == pytest.approx(0.05)
    assert export.refusal(parity, int8=False) == "task au: largest difference 0.2 is above 0.0001"
    assert export.refusal(parity, int8=True, tolerance=0.01) == "task au: mean difference 0.05 is above 0.01"
    assert export.refusal(parity, int8=True, tolerance=0.1) is None
    broken = export.differences(first, {"au": torch.full((2, 2), torch.nan)}, task)
    assert export.refusal(broken, int8=True) is not None


def test_speed_is_measured_in_turns(made: Callable) -> None:
    _, plain = made("baseline")
    speed = export.compare_speed(plain, plain, np.zeros((2, 3, SIZE, SIZE), np.uint8), seconds=0.05)
    assert speed.first > 0
    assert speed.ratio == pytest.approx(1, abs=0.9)


def test_formats_are_checked() -> None:
    assert export.require_format("onnx") == "onnx"
    with pytest.raises(ConfigError, match="format=tflite: write one of onnx, onnx_int8, torch_export"):
        export.require_format("tflite")


def quantized(activations: int | None) -> tuple[AffectModule, AffectModule]:
    """Return a model that was quantized as in training, and its finished copy."""
    from affect.quantization import Quantization, finished

    module = build("baseline")
    Quantization(8 if activations else 2, activations, ["encoder"]).apply(module)
    module.train()
    with torch.no_grad():
        for seed in range(4):  # ranges follow what is seen
            module(FaceBatch(image=images(8, seed=seed), targets={}, masks={}))
    module.eval()
    return module, finished(module)


@pytest.mark.parametrize("activations", [None, pytest.param(8, marks=pytest.mark.slow)])
def test_what_a_training_learnt_of_quantization_is_in_the_file(activations: int | None) -> None:
    if activations is not None:
        pytest.importorskip("torchao")
    module, ready = quantized(activations)
    content = export.onnx_bytes(ready, SIZE, list(module.tasks))
    assert export.is_quantized(content) == (activations is not None)
    image = images(6, seed=9)
    # Without fused operators the runtime computes what the graph says.
    found = export.program_values(content, module.tasks, image, optimized=False)
    parity = export.differences(values(module, image), found, module.tasks)
    assert export.refusal(parity, int8=activations is not None) is None, parity
    if activations is None:  # the kernels inside the file have the levels of two bits: -1, 0 and 1 times a step
        held = onnx.load_model_from_string(content).graph.initializer
        kernels = [onnx.numpy_helper.to_array(one) for one in held if len(one.dims) == 4]
        assert kernels
        assert min(len(np.unique(np.abs(kernel[0]).round(6))) for kernel in kernels) <= 3
