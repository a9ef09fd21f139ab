# SPDX-License-Identifier: Apache-2.0
"""A cell of a controlled experiment on compression: one trained model, one way to make it smaller, what is left of it.

A cell is ``affect compress`` with the overrides of its arm, or a library in its place (``library=…``), judged alike: on
the test part by the model's own metrics, by its bytes and multiplications, and by the time of its ONNX file, which runs
in turns with the float model's.
"""

from __future__ import annotations

import copy
import functools
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
from hydra import compose
from omegaconf import DictConfig, OmegaConf
from torch import Tensor, fx, nn

from affect import export
from affect.commands import compress, evaluate, inference
from affect.commands.export import parity_faces
from affect.commands.run_folder import RESULTS
from affect.compression.layers import baked
from affect.compression.report import stored_size
from affect.data.datamodule import FaceDataModule
from affect.data.protocol import TEST, TRAIN
from affect.errors import ConfigError, near
from affect.foreign import Predictor
from affect.foreign.program import ProgramModule
from affect.models.base import AffectModule
from affect.quantization import Captured
from affect.release import build_model, build_tasks, read_release
from affect.report import environment, write_json

NONE, ONNX_RUNTIME, TORCHAO = "none", "onnxruntime", "torchao"
LIBRARIES = (NONE, ONNX_RUNTIME, TORCHAO)
"""What a cell may do in the place of ``affect compress``: nothing, or 8 bits by a library, ranges from images."""

LIBRARY = "library"
"""Key of an arm that names one of ``LIBRARIES``."""

RELEASE = "release"
"""Folder of the compressed release in that of the cell."""


def run(folder: Path, overrides: Sequence[str], batch_size: int = 1, seconds: float = 1.0) -> None:
    """Compress the model that ``checkpoint=`` names as ``overrides`` say, judge it, and write ``results.json``.

    Args:
        folder: Of the cell.
        overrides: Of ``affect compress``; those of a method that the cell does not run are left out. ``library=…``
            names one of ``LIBRARIES`` instead of methods.
        batch_size: Images of a timed batch.
        seconds: To time for.

    Raises:
        ConfigError: If the library is unknown, or an override does not fit.
    """
    library = next((o.partition("=")[2] for o in overrides if key_of(o) == LIBRARY), None)
    if library is not None and library not in LIBRARIES:
        raise ConfigError(f"{LIBRARY}={library}: {near(library, LIBRARIES)}")
    config = cell_config(folder, [o for o in overrides if key_of(o) != LIBRARY])
    trust = list(config.trust)
    release = read_release(Path(config.checkpoint), trust)
    source = compress.training_data(config, release, trust, compress.with_losses(release, trust))
    tasks = build_tasks(release)
    module = build_model(release, tasks)
    size = int(release.preprocess["image_size"])
    plain = float_file(release.folder, evaluate.weights_hash(release), tuple(trust))
    content, multiplied = plain, module
    predictor: Predictor = module
    if library is None:
        compress.run(config)
        made = read_release(Path(config.out), trust)
        module = build_model(made, build_tasks(made))
        multiplied = baked(module)
        predictor, content = multiplied, export.onnx_bytes(multiplied, size, list(tasks))
    elif library == ONNX_RUNTIME:
        batches = (batch.image.numpy() for batch in source.part_dataloader(TRAIN, int(config.data.images)))
        content = export.quantize(plain, batches, outside=export.nodes_outside(plain))
        predictor = ProgramModule(content, tasks, "the quantized file")
    elif library == TORCHAO:
        images = (batch.image for batch in source.part_dataloader(TRAIN, int(config.data.images)))
        predictor = module = quantized_by_torchao(module, images)
        content = export.onnx_bytes(module, size, list(tasks))
    stored = len(content) if library == ONNX_RUNTIME else size_of(module)
    image, _ = parity_faces(release.preprocess)
    pixels = np.random.default_rng(0).integers(0, 256, (batch_size, 3, size, size), np.uint8)
    speed = export.compare_speed(plain, content, pixels, seconds)
    found = {
        "kilobytes": stored / 1000,
        "file_kilobytes": len(content) / 1000,
        "million_macs": compress.model_macs(multiplied, image) / 1e6,
        "time": 1 / speed.ratio,  # of neighbouring runs, which a busy machine slows alike
        "milliseconds": speed.second,
    }
    write_json(
        folder / RESULTS,
        {
            "overrides": list(overrides),
            "settings": OmegaConf.to_container(config.compression, resolve=True),
            "metrics": {TEST: scored(predictor, source)},
            "findings": found,
            "environment": environment(),
        },
    )


@functools.lru_cache(maxsize=1)
def float_file(folder: Path, weights: str, trust: tuple[str, ...]) -> bytes:
    """Return a release as a float ONNX file; all cells of a seed ask for the same one, and an export takes long.

    Args:
        folder: Of the release.
        weights: Hash of its weights, which tells one training in a folder from the next.
        trust: Packages whose classes it may name.
    """
    release = read_release(folder, list(trust))
    tasks = build_tasks(release)
    return export.onnx_bytes(build_model(release, tasks), int(release.preprocess["image_size"]), list(tasks))


def key_of(override: str) -> str:
    """Return the key of an override."""
    return override.partition("=")[0].lstrip("+~")


def cell_config(folder: Path, overrides: Sequence[str]) -> DictConfig:
    """Return the configuration of ``affect compress`` for a cell, without settings of methods that it does not run."""
    group = next((o.partition("=")[2] for o in overrides if key_of(o) == "compression"), "[]")
    methods = [name.strip() for name in group.strip("[]").split(",") if name.strip()]
    kept = [o for o in overrides if not key_of(o).startswith("compression.") or key_of(o).split(".")[1] in methods]
    config = compose(config_name="compress", overrides=kept)
    OmegaConf.set_struct(config, False)
    config.out, config.force = str(folder / RELEASE), True
    return config


def scored(predictor: Predictor, source: FaceDataModule) -> list[dict[str, Any]]:
    """Return the metric records of a predictor on the test part of the data that its model was trained on."""
    tasks = source.tasks
    loader = source.part_dataloader(TEST)
    values, index, rows = inference.predict_values(predictor, loader, torch.device("cpu"), "predicting test", tasks)
    groups = [protocol.group for protocol in source.protocols]
    table = inference.predictions_table(source.sources, tasks, values, index, rows, groups)
    return inference.table_metrics(table, tasks, 0)


# ------------------------------------------------------------------------------------------------------- torchao


def quantized_by_torchao(module: AffectModule, images: Iterable[Tensor]) -> AffectModule:
    """Return a copy of a model whose encoders have int8 weights and activations by torchao's PT2E, without training.

    Args:
        module: The model.
        images: Batches of RGB uint8 faces ``(B, 3, S, S)`` that ranges are taken from.

    Raises:
        ConfigError: If torchao is not installed, or an encoder cannot be captured.
    """
    try:
        from torchao.quantization.pt2e.quantize_pt2e import convert_pt2e, prepare_pt2e
        from torchao.quantization.pt2e.quantizer import x86_inductor_quantizer as x86
    except ImportError as error:
        raise ConfigError(f"{LIBRARY}={TORCHAO} needs torchao ({error}): pip install 'affect[export]'") from error
    made = copy.deepcopy(module).eval()
    batches = list(images)
    for name, encoder in list(made.encoder_modules()):
        shapes = ({0: torch.export.Dim("batch")},)
        try:
            with torch.no_grad():
                program = torch.export.export(encoder, (batches[0][:2],), dynamic_shapes=shapes, strict=False)
                captured = program.module()
        except Exception as error:  # the tracer raises kinds of many libraries
            raise ConfigError(f"{name} cannot be captured: {str(error).strip().splitlines()[0]}") from error
        assert isinstance(captured, fx.GraphModule)
        without_guards(captured)
        quantizer = x86.X86InductorQuantizer()
        # Processors without VNNI add products of bytes in 16 bits, which overflow with whole bytes as weights.
        reduced = not export.has_vnni()
        quantizer.set_global(x86.get_default_x86_inductor_quantization_config(reduce_range=reduced))
        prepared = prepare_pt2e(captured, quantizer)
        with torch.no_grad():
            for batch in batches:
                prepared(batch)
            converted = convert_pt2e(prepared)
        for key in ("train", "eval"):  # methods that refuse; the graph is that of evaluation in either mode
            vars(converted).pop(key, None)
        shell = Captured(converted, encoder, name, {})
        shell.converted_graph = True
        parent, _, last = name.rpartition(".")
        setattr(made.get_submodule(parent), last, shell)
    return made


def without_guards(graph: fx.GraphModule) -> None:
    """Take checks out of a captured graph that hold for the batch of the capture."""
    for node in list(graph.graph.nodes):
        check = node.op == "call_function" and "_assert" in str(node.target)
        if (check or (node.op == "call_module" and "guards" in str(node.target))) and not node.users:
            graph.graph.erase_node(node)
    graph.graph.eliminate_dead_code()
    graph.recompile()


def size_of(module: nn.Module) -> int:
    """Return the bytes of a model's tensors; of a captured encoder, those that its graph reads."""
    graphs = {name: sub for name, sub in module.named_modules() if isinstance(sub, Captured)}
    if not graphs:
        return stored_size(module)
    inside = [
        _attribute(captured.graph, str(node.target))
        for captured in graphs.values()
        for node in captured.graph.graph.nodes
        if node.op == "get_attr"
    ]
    state = module.state_dict()
    outside = [state[name] for name in state if not any(name.startswith(f"{prefix}.") for prefix in graphs)]
    tensors = {id(tensor): tensor for tensor in (*inside, *outside) if isinstance(tensor, Tensor)}
    return sum(tensor.numel() * tensor.element_size() for tensor in tensors.values())


def _attribute(root: nn.Module, name: str) -> Any:  # noqa: ANN401
    found: Any = root
    for part in name.split("."):
        found = getattr(found, part)
    return found
