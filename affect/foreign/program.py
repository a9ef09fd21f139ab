# SPDX-License-Identifier: Apache-2.0
"""An ONNX file as a predictor: one that ``affect export`` wrote, or somebody else's with an adapter.

A file from a stranger is a graph of operators that ONNX Runtime knows; no library of own operators is ever loaded. What
could still reach beyond the file is refused before the runtime sees it: tensors that lie in other files, and names of
other files in nodes. It is handed over as bytes, so that the runtime knows no folder to look in.
"""

from __future__ import annotations

import json
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
from torch import Tensor

from affect.errors import CheckpointError, ConfigError
from affect.foreign.adapter import Adapter, Input, as_torch
from affect.models.base import Batch
from affect.release import Release, check_texts, parse_plain
from affect.tasks import Task

if TYPE_CHECKING:
    import onnx

PREFIX = "affect."
"""Prefix of the metadata that an exported file holds."""

FORMAT, FORMAT_VERSION = "affect.format", "1"
IMAGE = "image"
"""Name of the input of an exported file: RGB uint8 ``(B, 3, S, S)``."""

METADATA = ("task", "labels", "preprocess", "metrics", "people", "training", "selection")
"""What an exported file says of itself, each as JSON under ``affect.<name>``."""

MOST_BYTES = 2 << 30
"""Largest file: what one protobuf message can hold."""

NATIVE_DOMAINS = ("", "ai.onnx", "ai.onnx.ml", "com.microsoft", "pkg.onnxscript.torch_lib", "pkg.torch.onnx")


@dataclass(frozen=True)
class Program(Release):
    """An ONNX file that was read and checked, in the place of a release.

    Attributes:
        file: The file.
        content: Its bytes.
        adapter: What it takes and gives; None for a file that ``affect export`` wrote.
        selection: What selected the weights, as its run noted it.
    """

    file: Path = Path()
    content: bytes = b""
    adapter: Adapter | None = None
    selection: dict[str, Any] | None = None


# ----------------------------------------------------------------------------------------------------- reading


def read_program(
    path: Path, adapter: Adapter | None = None, trust: Sequence[str] = (), what: str = "checkpoint"
) -> Program:
    """Return the ONNX file at ``path``.

    Args:
        path: The file.
        adapter: What it takes and gives; None if ``affect export`` wrote it.
        trust: Packages whose classes its tasks may name besides this package's public ones.
        what: Key of the command line that named it, for messages.

    Raises:
        CheckpointError: If it is damaged, reaches beyond itself, or says nothing of its outputs and has no adapter.
    """
    where = f"{what}={path}"
    if not path.is_file():
        raise CheckpointError(f"{where}: no such file")
    if path.stat().st_size >= MOST_BYTES:
        raise CheckpointError(f"{where}: larger than an ONNX file can be ({MOST_BYTES >> 30} GB)")
    content = path.read_bytes()
    model = parse_graph(content, where)
    texts: dict[str, Any]
    if adapter is not None:
        texts = {"task": adapter.config(), "labels": adapter.labels(), "preprocess": adapter.preprocess()}
        selection = None
    else:
        texts = _texts(model, where)
        selection = texts.get("selection") or None
    labels: Any = texts.get("labels")
    preprocess: Any = texts.get("preprocess")
    people, training, metrics = texts.get("people", {}), texts.get("training", {}), texts.get("metrics", {})
    config: dict[str, Any] = {"task": texts.get("task"), "model": {}}
    check_texts(config, labels, preprocess, people, training, trust, lambda name: f"{where}: {name}")
    if selection is not None and not isinstance(selection, dict):
        raise CheckpointError(f"{where}: what selected it must be a mapping")
    return Program(
        path.parent,
        config,
        labels,
        preprocess,
        metrics,
        {},
        people,
        training,
        file=path,
        content=content,
        adapter=adapter,
        selection=selection,
    )


def _texts(model: onnx.ModelProto, where: str) -> dict[str, Any]:
    """Return what an exported file says of itself."""
    found = {entry.key: entry.value for entry in model.metadata_props}
    if FORMAT not in found:
        raise CheckpointError(
            f"{where}: not written by affect export, so it does not say what it gives; add adapter=<name or YAML file>"
        )
    if found[FORMAT] != FORMAT_VERSION:
        raise CheckpointError(f"{where}: written in format {found[FORMAT]!r}, which this version does not know")
    return {
        name: parse_plain(found[PREFIX + name], f"{where}: {PREFIX}{name}")
        for name in METADATA
        if PREFIX + name in found
    }


def parse_graph(content: bytes, where: str) -> onnx.ModelProto:
    """Return the graph in the bytes of an ONNX file, after what reaches beyond them was refused.

    Raises:
        CheckpointError: If it is damaged, or names other files or operators of strangers.
    """
    onnx = require("onnx")
    try:
        model = onnx.load_model_from_string(content)
    except Exception as error:  # protobuf's own kinds of errors differ between its implementations
        raise CheckpointError(f"{where}: no ONNX file, or damaged ({_line(error)})") from error
    if not model.graph.node:
        raise CheckpointError(f"{where}: no ONNX file, or damaged (it has no graph)")
    domains = {entry.domain for entry in model.functions}
    for graph in _graphs(model):
        for tensor in _tensors(graph):
            _check_tensor(tensor, where)
        for node in graph.node:
            if node.op_type == "EPContext":
                raise CheckpointError(f"{where}: node {node.name!r} names a file of an accelerator, which is refused")
            if node.domain not in NATIVE_DOMAINS and node.domain not in domains:
                raise CheckpointError(
                    f"{where}: operator {node.domain}.{node.op_type} is none of ONNX Runtime; own operators are refused"
                )
    return model


def _check_tensor(tensor: onnx.TensorProto, where: str) -> None:
    """Refuse a tensor outside the file, of negative size, or with numbers that are not finite."""
    onnx = require("onnx")
    if tensor.data_location == onnx.TensorProto.EXTERNAL or tensor.external_data:
        places = [entry.value for entry in tensor.external_data if entry.key == "location"]
        raise CheckpointError(
            f"{where}: tensor {tensor.name!r} lies in another file ({', '.join(places) or 'not named'}); only tensors "
            "inside the file are read. Save it whole: onnx.save(model, file, save_as_external_data=False)"
        )
    count = 1
    for side in tensor.dims:
        if side < 0:
            raise CheckpointError(f"{where}: tensor {tensor.name!r} has a negative size")
        count *= side
    if count > MOST_BYTES:
        raise CheckpointError(f"{where}: tensor {tensor.name!r} claims {count} numbers, more than a file can hold")
    if tensor.data_type in (onnx.TensorProto.FLOAT, onnx.TensorProto.FLOAT16, onnx.TensorProto.DOUBLE):
        try:
            numbers = onnx.numpy_helper.to_array(tensor)
        except Exception as error:
            raise CheckpointError(f"{where}: tensor {tensor.name!r} is damaged ({_line(error)})") from error
        # An infinity alone has its uses (a mask before a softmax); a number that is none has not.
        if np.isnan(numbers).any():
            raise CheckpointError(f"{where}: tensor {tensor.name!r} holds values that are not numbers")


def _graphs(model: onnx.ModelProto) -> Iterator[Any]:
    """Yield the graph, its sub-graphs, and the functions of a model and the sub-graphs of these."""
    stack: list[Any] = [model.graph, *model.functions]
    while stack:
        graph = stack.pop()
        yield graph
        for node in graph.node:
            for attribute in node.attribute:
                if attribute.HasField("g"):
                    stack.append(attribute.g)
                stack += list(attribute.graphs)


def _tensors(graph: Any) -> Iterator[onnx.TensorProto]:  # noqa: ANN401
    """Yield every tensor that a graph or a function holds."""
    yield from getattr(graph, "initializer", ())
    for sparse in getattr(graph, "sparse_initializer", ()):
        yield sparse.values
        yield sparse.indices
    for node in graph.node:
        for attribute in node.attribute:
            if attribute.HasField("t"):
                yield attribute.t
            yield from attribute.tensors
            sparse = [attribute.sparse_tensor] if attribute.HasField("sparse_tensor") else []
            for one in (*sparse, *attribute.sparse_tensors):
                yield one.values
                yield one.indices


def require(name: str) -> Any:  # noqa: ANN401
    """Return a module of the extra ``export``.

    Raises:
        ConfigError: If it is not installed.
    """
    import importlib

    try:
        return importlib.import_module(name)
    except ImportError as error:
        raise ConfigError(f"ONNX files need the package {name}: pip install 'affect[export]'") from error


def _line(error: BaseException) -> str:
    lines = [line.strip() for line in str(error).splitlines() if line.strip()]
    return lines[0][:200] if lines else type(error).__name__


# -------------------------------------------------------------------------------------------------- predicting


class ProgramModule:
    """Predicts by ONNX Runtime on the CPU what a module of ours would.

    Args:
        content: Bytes of a file that was checked.
        tasks: What it predicts.
        where: The file, for messages.
        adapter: What it takes and gives; None for a file of ours.
        threads: Threads of an operator; None leaves that to the runtime.
        optimized: Whether the runtime may fuse operators; off, int8 is computed exactly as the graph says.

    Raises:
        CheckpointError: If the runtime refuses the file, or its inputs and outputs are not those that are expected.
    """

    def __init__(
        self,
        content: bytes,
        tasks: Mapping[str, Task],
        where: str,
        adapter: Adapter | None = None,
        threads: int | None = None,
        optimized: bool = True,
    ) -> None:
        self.tasks, self.where, self.adapter = dict(tasks), where, adapter
        self.session = open_session(content, where, threads, optimized)
        self.names = self._output_names()
        self.input = self._find_input()

    def eval(self) -> ProgramModule:
        """Return itself: a file knows no training."""
        return self

    def to(self, device: torch.device | str) -> ProgramModule:
        """Return itself: it runs where its session was opened."""
        return self

    def predict_step(self, batch: Batch, batch_index: int = 0) -> dict[str, Tensor]:
        """Return the values of each task, as ``AffectModule.predict_step`` does, on the CPU.

        Raises:
            CheckpointError: If the graph cannot run, or gives something else than it should.
        """
        image = batch.image.cpu()
        x = image if self.adapter is None else self.adapter.input.prepare(image)
        given = np.ascontiguousarray(x.numpy().astype(self._number_kind, copy=False))
        fixed = self.input.shape[0] if isinstance(self.input.shape[0], int) else None
        if fixed is None or fixed == len(given):
            return self._values(self._run(given), len(given))
        parts = []
        for start in range(0, len(given), fixed):
            part = given[start : start + fixed]
            padded = np.concatenate([part, np.repeat(part[-1:], fixed - len(part), 0)])
            raw = self._run(padded)
            parts.append(self._values([array[: len(part)] for array in raw], len(part)))
        return {name: torch.cat([part[name] for part in parts]) for name in self.tasks}

    def _run(self, given: np.ndarray) -> list[np.ndarray]:
        try:
            return self.session.run(list(dict.fromkeys(self.names.values())), {self.input.name: given})
        except Exception as error:  # the runtime raises kinds of its own
            raise CheckpointError(f"{self.where}: the graph does not run: {_line(error)}") from error

    def _values(self, raw: Sequence[np.ndarray], rows: int) -> dict[str, Tensor]:
        by_name = dict(zip(dict.fromkeys(self.names.values()), raw, strict=True))
        found = {}
        for task, name in self.names.items():
            array = as_torch(by_name[name])
            if array.ndim < 1 or array.shape[0] != rows:
                raise CheckpointError(f"{self.where}: output {name} has {tuple(array.shape)} numbers for {rows} images")
            values = array.float()
            if self.adapter is not None:
                self._check_width(task, name, array)
                values = self.adapter.outputs[task].read(array)
            elif values[0].numel() != self.tasks[task].num_outputs:
                raise CheckpointError(
                    f"{self.where}: output {name} has {values[0].numel()} numbers per image, and {task} has "
                    f"{self.tasks[task].num_outputs} outputs"
                )
            if not bool(values.isfinite().all()):
                raise CheckpointError(f"{self.where}: output {name} holds values that are not finite")
            found[task] = values
        return found

    def _check_width(self, task: str, name: str, array: Tensor) -> None:
        assert self.adapter is not None
        output, width = self.adapter.outputs[task], array[0].numel()
        last = len(output.labels) if output.columns is None else output.columns[1]
        if width < last or (output.columns is None and width != last):
            raise CheckpointError(
                f"{self.where}: output {name} has {width} numbers per image, and the adapter {self.adapter.name} names "
                f"{last} for {task}"
            )

    def _output_names(self) -> dict[str, str]:
        given = [output.name for output in self.session.get_outputs()]
        names = {}
        for task in self.tasks:
            wanted: str | int | None = task if self.adapter is None else self.adapter.outputs[task].name
            if wanted is None and len(given) == 1:
                wanted = 0
            if isinstance(wanted, int) and 0 <= wanted < len(given):
                wanted = given[wanted]
            if wanted is None:
                raise CheckpointError(
                    f"{self.where}: the file has {len(given)} outputs ({', '.join(given[:6])}); say in the adapter "
                    f"which one is {task}: outputs.{task}.name"
                )
            if not isinstance(wanted, str) or wanted not in given:
                raise CheckpointError(
                    f"{self.where}: no output {wanted!r} for {task}; there are {', '.join(given[:8])}"
                )
            names[task] = wanted
        return names

    def _find_input(self) -> Any:  # noqa: ANN401
        given = self.session.get_inputs()
        wanted = IMAGE if self.adapter is None else self.adapter.input.name
        found = next((one for one in given if one.name == wanted), given[0] if wanted is None and given else None)
        names = ", ".join(one.name for one in given)
        if found is None:
            raise CheckpointError(f"{self.where}: no input {wanted!r}; there are {names or 'none'}")
        if len(given) != 1:
            raise CheckpointError(f"{self.where}: needs {len(given)} inputs ({names}); only an image can be given")
        expected = Input(0) if self.adapter is None else self.adapter.input
        if found.type not in _KINDS:
            raise CheckpointError(f"{self.where}: input {found.name} takes {found.type}, which is no image")
        if len(found.shape) != 4:
            raise CheckpointError(f"{self.where}: input {found.name} has {len(found.shape)} axes; an image batch has 4")
        channel, size = (3, expected.size) if expected.layout == "NHWC" else (1, expected.size)
        sides = (1, 2) if expected.layout == "NHWC" else (2, 3)
        if isinstance(found.shape[channel], int) and found.shape[channel] != expected.channels:
            raise CheckpointError(
                f"{self.where}: input {found.name} has the shape {found.shape}, and {expected.layout} "
                f"{expected.colour} images have {expected.channels} channels on axis {channel}"
            )
        if size and any(isinstance(found.shape[side], int) and found.shape[side] != size for side in sides):
            raise CheckpointError(
                f"{self.where}: input {found.name} has the shape {found.shape}, and the adapter says size {size}"
            )
        self._number_kind = _KINDS[found.type]
        if self.adapter is None and self._number_kind is not np.uint8:
            raise CheckpointError(f"{self.where}: input {found.name} takes {found.type}, not pixels")
        return found


_KINDS = {"tensor(float)": np.float32, "tensor(float16)": np.float16, "tensor(uint8)": np.uint8}


def open_session(content: bytes, where: str, threads: int | None = None, optimized: bool = True) -> Any:  # noqa: ANN401
    """Return a session of ONNX Runtime on the CPU; arguments as for ``ProgramModule``.

    Raises:
        CheckpointError: If the runtime refuses the file.
    """
    runtime = require("onnxruntime")
    options = runtime.SessionOptions()
    options.log_severity_level = 3  # warnings of the runtime concern its own developers
    if threads is not None:
        options.intra_op_num_threads = threads
        options.inter_op_num_threads = 1
    if not optimized:
        options.graph_optimization_level = runtime.GraphOptimizationLevel.ORT_DISABLE_ALL
    try:
        return runtime.InferenceSession(content, options, providers=["CPUExecutionProvider"])
    except Exception as error:  # the runtime raises kinds of its own
        raise CheckpointError(f"{where}: ONNX Runtime refuses it: {_line(error)}") from error


def describe(texts: Mapping[str, Any]) -> dict[str, str]:
    """Return the metadata of an exported file, ready to be stored: ``affect.<name>`` to JSON."""
    unknown = sorted(texts.keys() - set(METADATA))
    assert not unknown, unknown
    return {FORMAT: FORMAT_VERSION} | {PREFIX + name: json.dumps(value) for name, value in texts.items()}
