# SPDX-License-Identifier: Apache-2.0
"""A trained model as one file that other programs run: ONNX in float or int8, or a program of ``torch.export``.

The graph takes RGB uint8 ``(B, 3, S, S)`` and gives the values of every task (probabilities, bounded numbers), each
under the task's name; normalisation is inside, and the batch size is open. Names of outputs, thresholds and the way
from photographs to crops stand in the file's metadata, so that the file alone is enough (``affect.foreign.Program``).
"""

from __future__ import annotations

import contextlib
import hashlib
import io
import json
import logging
import statistics
import tempfile
import time
import warnings
from collections.abc import Iterable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import torch
from torch import Tensor, nn

from affect.data.batch import FaceBatch
from affect.errors import CheckpointError, ConfigError
from affect.files import replacing
from affect.foreign.program import IMAGE, ProgramModule, describe, open_session, require
from affect.models.base import AffectModule
from affect.tasks import Task

ONNX, ONNX_INT8, TORCH = "onnx", "onnx_int8", "torch_export"
FORMATS = (ONNX, ONNX_INT8, TORCH)
SUFFIXES = {ONNX: ".onnx", ONNX_INT8: ".onnx", TORCH: ".pt2"}

LARGEST = 1e-4
"""Largest difference of a value, in parts of its task's scale, that a float file may show."""

MEAN_INT8 = 0.05
"""Largest mean difference of a task's values, in parts of its scale, that an int8 file may show."""

QUANTIZED = ("Conv", "Gemm", "MatMul")
"""Operators whose weights and inputs int8 holds."""


class Graph(nn.Module):
    """What is exported: a model from pixels to the values of its tasks, in their order.

    Args:
        module: The model, in evaluation mode.
    """

    def __init__(self, module: AffectModule) -> None:
        super().__init__()
        self.module = module

    def forward(self, image: Tensor) -> tuple[Tensor, ...]:
        """Return the values of each task for RGB uint8 images ``(B, 3, S, S)``."""
        values = self.module.predict_step(FaceBatch(image=image, targets={}, masks={}))
        return tuple(values[name] for name in self.module.tasks)


class Difference(NamedTuple):
    """How far two predictors are apart on the same images, in one task.

    Attributes:
        largest: Largest difference of a value.
        mean: Mean difference.
        scale: What they are to be compared with: 1, or the largest value if that is more (points, degrees).
    """

    largest: float
    mean: float
    scale: float


class Speed(NamedTuple):
    """What two files take for the same batch, measured in turns.

    Attributes:
        first: Median milliseconds of the first.
        second: Median milliseconds of the second.
        ratio: Median ratio of neighbouring runs, first over second: above 1 the second is the faster one.
    """

    first: float
    second: float
    ratio: float


# ------------------------------------------------------------------------------------------------------- graphs


def check_exportable(module: AffectModule) -> None:
    """Refuse models that give an image another answer at every call.

    Raises:
        ConfigError: If there is such a setting.
    """
    if getattr(module, "fresh_samples", False):
        raise ConfigError("model.fresh_samples=true draws anew at every inference; a file gives an image one answer")


def open_program(module: AffectModule, size: int) -> torch.export.ExportedProgram:
    """Return the program of a model with an open batch size.

    Args:
        module: The model; it is left in evaluation mode.
        size: Side of its input in pixels.

    Raises:
        ConfigError: If the model cannot be captured, or only for one batch size; it names the operation.
    """
    check_exportable(module)
    graph = Graph(module.eval().cpu())
    image = torch.zeros(2, 3, size, size, dtype=torch.uint8)
    shapes = {"image": {0: torch.export.Dim("batch", min=1)}}
    try:
        with _calm(), torch.no_grad():
            program = torch.export.export(graph, (image,), dynamic_shapes=shapes, strict=False)
    except Exception as error:  # the tracer raises kinds of many libraries
        raise ConfigError(f"{type(module).__name__} cannot be exported: {_line(error)}") from error
    return program


def onnx_bytes(module: AffectModule, size: int, names: Sequence[str]) -> bytes:
    """Return a model as an ONNX file.

    Args:
        module: The model; it is left in evaluation mode.
        size: Side of its input in pixels.
        names: Names of its outputs, the tasks.

    Raises:
        ConfigError: If the model cannot be captured, or an operator has no counterpart.
    """
    require("onnx")
    require("onnxscript")
    program = open_program(module, size)
    try:
        with _calm():
            made = torch.onnx.export(program, input_names=[IMAGE], output_names=list(names), dynamo=True, verbose=False)
        assert made is not None
        proto = made.model_proto
    except Exception as error:
        raise ConfigError(f"{type(module).__name__} cannot be exported to ONNX: {_line(error)}") from error
    if not proto.graph.input[0].type.tensor_type.shape.dim[0].dim_param:
        raise ConfigError(f"{type(module).__name__} can be exported for one batch size only, which is of little use")
    return proto.SerializeToString()


def torch_bytes(module: AffectModule, size: int, texts: Mapping[str, Any]) -> bytes:
    """Return a model as a file of ``torch.export`` with its metadata in ``extra_files``."""
    program = open_program(module, size)
    stream = io.BytesIO()
    with _calm():
        torch.export.save(program, stream, extra_files={"affect.json": json.dumps(describe(texts))})
    return stream.getvalue()


def with_metadata(content: bytes, texts: Mapping[str, Any], note: str) -> bytes:
    """Return an ONNX file with what it has to say of itself.

    Args:
        content: The file.
        texts: Values by name (``affect.foreign.program.METADATA``).
        note: One line for people, the graph's documentation.
    """
    onnx = require("onnx")
    model = onnx.load_model_from_string(content)
    model.producer_name, model.doc_string = "affect", note
    del model.metadata_props[:]
    for key, value in describe(texts).items():
        model.metadata_props.add(key=key, value=value)
    # Where in which file of this machine an operator comes from is nobody's business.
    for graph in (model.graph, *model.functions):
        graph.doc_string = ""
        for node in graph.node:
            node.doc_string = ""
            kept = [entry for entry in node.metadata_props if not _tells_of_the_machine(entry.value)]
            del node.metadata_props[:]
            node.metadata_props.extend(kept)
    return model.SerializeToString()


def _tells_of_the_machine(text: str) -> bool:
    return "File " in text or "/" in text


def write_file(path: Path, content: bytes) -> None:
    """Write a file atomically."""
    with replacing(path) as part:
        part.write_bytes(content)


# --------------------------------------------------------------------------------------------------------- int8


def quantize(
    content: bytes, batches: Iterable[np.ndarray], reduce_range: bool | None = None, outside: Sequence[str] = ()
) -> bytes:
    """Return an ONNX file with int8 weights and activations, whose ranges come from images (static QDQ).

    Args:
        content: A float file.
        batches: RGB uint8 images ``(B, 3, S, S)`` of the training part.
        reduce_range: Whether weights keep one bit less, which processors without VNNI need so that sums of products of
            16 bits do not overflow; None asks this processor.
        outside: Names of nodes that stay float.

    Raises:
        ConfigError: If the runtime cannot quantize the graph.
    """
    require("onnxruntime")
    from onnxruntime.quantization import CalibrationDataReader, QuantFormat, QuantType, quantize_static
    from onnxruntime.quantization.shape_inference import quant_pre_process

    reduced = not has_vnni() if reduce_range is None else reduce_range

    class Reader(CalibrationDataReader):
        """Gives one batch after the other."""

        def __init__(self) -> None:
            self.left = iter(batches)

        def get_next(self) -> dict[str, np.ndarray] | None:
            """Return the next batch, None behind the last."""
            found = next(self.left, None)
            return None if found is None else {IMAGE: found}

    with tempfile.TemporaryDirectory() as folder, _calm():
        source, ready, out = (Path(folder) / name for name in ("float.onnx", "ready.onnx", "int8.onnx"))
        source.write_bytes(content)
        try:
            quant_pre_process(source, ready, skip_symbolic_shape=True)
            quantize_static(
                ready,
                out,
                Reader(),
                quant_format=QuantFormat.QDQ,
                per_channel=True,
                reduce_range=reduced,
                activation_type=QuantType.QUInt8,
                weight_type=QuantType.QInt8,
                op_types_to_quantize=list(QUANTIZED),
                nodes_to_exclude=list(outside),
            )
        except Exception as error:
            raise ConfigError(f"ONNX Runtime cannot quantize the graph: {_line(error)}") from error
        return out.read_bytes()


def nodes_outside(content: bytes, inside: Sequence[str] = ("encoder",)) -> list[str]:
    """Return the names of the nodes of a float file that do not belong to named sub-modules of the model.

    Args:
        content: A file that ``onnx_bytes`` made.
        inside: Names of sub-modules; heads, recurrent cells and order logits are outside of an encoder.
    """
    onnx = require("onnx")
    found = []
    for node in onnx.load_model_from_string(content).graph.node:
        scopes = next((e.value for e in node.metadata_props if e.key == "pkg.torch.onnx.name_scopes"), "")
        parts = {part for scope in scopes.replace("'", "").strip("[]").split(", ") for part in scope.split(".")}
        if not parts & set(inside):
            found.append(node.name)
    return found


def is_quantized(content: bytes) -> bool:
    """Return whether an ONNX file holds quantized operators."""
    onnx = require("onnx")
    return any(node.op_type == "QuantizeLinear" for node in onnx.load_model_from_string(content).graph.node)


def cpu_features() -> list[str]:
    """Return what this processor offers to integer and vector arithmetic, as far as Linux tells."""
    wanted = ("avx2", "avx512f", "avx512_vnni", "avx_vnni", "amx_int8", "asimddp", "i8mm")
    path = Path("/proc/cpuinfo")
    if not path.is_file():
        return []
    lines = path.read_text(encoding="utf-8", errors="replace").splitlines()
    flags = next((line.split() for line in lines if line.casefold().startswith(("flags", "features"))), [])
    return [name for name in wanted if name in flags]


def has_vnni() -> bool:
    """Return whether this processor multiplies bytes into sums of 32 bits."""
    return bool({"avx512_vnni", "avx_vnni", "amx_int8", "asimddp", "i8mm"} & set(cpu_features()))


# ------------------------------------------------------------------------------------------------ what is promised


def differences(
    expected: Mapping[str, Tensor], found: Mapping[str, Tensor], tasks: Mapping[str, Task]
) -> dict[str, Difference]:
    """Return how far two predictors are apart, by task.

    Args:
        expected: Values by task ``(B, …)``.
        found: Values of the other by task; flattened per image they are as many.
        tasks: The tasks.
    """
    result = {}
    for name in tasks:
        first, second = expected[name].double().flatten(1).cpu(), found[name].double().flatten(1).cpu()
        gap = (first - second).abs()
        result[name] = Difference(float(gap.max()), float(gap.mean()), max(1.0, float(first.abs().max())))
    return result


def refusal(parity: Mapping[str, Difference], int8: bool, tolerance: float | None = None) -> str | None:
    """Return why a file is refused that differs so much from its model, None if it is not.

    Args:
        parity: Differences by task.
        int8: Whether the file holds int8: then means are compared, not single values.
        tolerance: Replaces the limit, in parts of the scale.
    """
    limit = tolerance if tolerance is not None else (MEAN_INT8 if int8 else LARGEST)
    for name, one in parity.items():
        gap = one.mean if int8 else one.largest
        if not gap <= limit * one.scale:
            kind = "mean" if int8 else "largest"
            return f"task {name}: {kind} difference {gap:.3g} is above {limit * one.scale:.3g}"
    return None


def program_values(
    content: bytes, tasks: Mapping[str, Task], image: Tensor, optimized: bool = True
) -> dict[str, Tensor]:
    """Return what an exported ONNX file says of images ``(B, 3, S, S)``."""
    module = ProgramModule(content, tasks, "the exported file", optimized=optimized)
    return module.predict_step(FaceBatch(image=image, targets={}, masks={}))


def torch_values(content: bytes, tasks: Mapping[str, Task], image: Tensor) -> dict[str, Tensor]:
    """Return what a file of ``torch.export`` of our own making says of images ``(B, 3, S, S)``."""
    program = torch.export.load(io.BytesIO(content)).module()
    with torch.no_grad():
        return dict(zip(tasks, program(image), strict=True))


def compare_speed(first: bytes, second: bytes, image: np.ndarray, seconds: float = 2.0, threads: int = 1) -> Speed:
    """Return what two ONNX files take for a batch; they run in turns, so that a busy machine slows both alike.

    Args:
        first: A file.
        second: Another one.
        image: RGB uint8 ``(B, 3, S, S)``.
        seconds: Time to measure for, at least five turns.
        threads: Threads of an operator.
    """
    sessions = [open_session(content, "the exported file", threads) for content in (first, second)]

    def run(session: Any) -> float:  # noqa: ANN401
        started = time.perf_counter()
        session.run(None, {IMAGE: image})
        return 1000 * (time.perf_counter() - started)

    for session in sessions:
        run(session), run(session)
    pairs: list[tuple[float, float]] = []
    until = time.perf_counter() + seconds
    while len(pairs) < 5 or time.perf_counter() < until:
        pairs.append((run(sessions[0]), run(sessions[1])))
    return Speed(
        statistics.median(a for a, _ in pairs),
        statistics.median(b for _, b in pairs),
        statistics.median(a / b for a, b in pairs),
    )


def sha256(content: bytes) -> str:
    """Return the hash of a file's bytes in hexadecimal digits."""
    return hashlib.sha256(content).hexdigest()


# ------------------------------------------------------------------------------------------------------ helpers


@contextlib.contextmanager
def _calm() -> Iterator[None]:
    """Keep what exporters tell their own developers out of the terminal."""
    before = logging.root.manager.disable
    logging.disable(logging.WARNING)
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            yield
    finally:
        logging.disable(before)


def _line(error: BaseException) -> str:
    """Return the line of an exporter's error that says something: the innermost cause's first."""
    inner: BaseException = error
    while inner.__cause__ is not None:
        inner = inner.__cause__
    lines = [line.strip() for line in str(inner).splitlines() if line.strip()]
    return lines[0][:300] if lines else type(inner).__name__


def require_format(given: Any) -> str:  # noqa: ANN401
    """Return the format that a user asks for.

    Raises:
        ConfigError: If there is none of that name.
    """
    if given not in FORMATS:
        raise ConfigError(f"format={given}: write one of {', '.join(FORMATS)}")
    return str(given)


def refuse(text: str) -> CheckpointError:
    """Return the error that says why a file was not written."""
    return CheckpointError(f"the exported file does not predict what its model does and was not written: {text}")
