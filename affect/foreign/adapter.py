# SPDX-License-Identifier: Apache-2.0
"""What an ONNX file of somebody else takes and gives, as a small YAML file says it.

======================  ===============================================================================================
``name``                what results call the model
``tested``              whether the adapter was tried on the original weights
``source``              where the model comes from, in words
``input``               ``name``, ``size``, ``layout`` (NCHW, NHWC), ``colour`` (RGB, BGR, GREY), ``range`` (the number
                        that 255 becomes), then ``mean`` and ``std`` per channel
``crop``                how photographs are cropped (``affect.geometry.CropRecipe``); null for images that are crops
``outputs``             by task: ``kind``, ``name`` or number of the graph's output, ``columns`` (first, one behind the
                        last), ``labels`` in their order there, ``values`` (logits, probabilities, numbers)
======================  ===============================================================================================

It is read as plain values: no class, no interpolation, no path and no address can stand in it.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from affect import labels
from affect.errors import CheckpointError, ConfigError, near
from affect.geometry import CropRecipe
from affect.release import LARGEST_SIDE, check_config, read_plain, require_plain_name

LAYOUTS = ("NCHW", "NHWC")
COLOURS = ("RGB", "BGR", "GREY")
VALUES = ("logits", "probabilities", "numbers")
"""What an output holds: unbounded numbers before softmax or sigmoid, probabilities, or the values themselves."""

LUMA = (0.299, 0.587, 0.114)
"""Weights of red, green and blue in grey (ITU-R BT.601), as OpenCV and Pillow take them."""

KNOWN_EXPRESSIONS = frozenset(
    name for order in (*labels.EXPRESSION_ORDERS.values(), labels.RAFDB_COMPOUND) for name in order
)


@dataclass(frozen=True)
class Kind:
    """A kind of task that an output can be evaluated as.

    Attributes:
        target: Class of the task.
        argument: Its argument that names the outputs; None where they are fixed.
        metrics: Classes of its metrics by name.
        score: Number that stands for the task.
    """

    target: str
    argument: str | None
    metrics: Mapping[str, str]
    score: str


KINDS: Mapping[str, Kind] = {
    "expression": Kind(
        "affect.tasks.Expression", "classes", {"classification": "affect.metrics.Classification"}, "macro_f1"
    ),
    "au": Kind(
        "affect.tasks.AUOccurrence",
        "aus",
        {"f1": "affect.metrics.F1", "rates": "affect.metrics.BinaryRates", "auc": "affect.metrics.AUC"},
        "f1/mean",
    ),
    "au_intensity": Kind(
        "affect.tasks.AUIntensity",
        "aus",
        {"icc": "affect.metrics.ICC", "pcc": "affect.metrics.PCC", "mae": "affect.metrics.MAE"},
        "icc/mean",
    ),
    "valence_arousal": Kind(
        "affect.tasks.ValenceArousal",
        None,
        {
            "ccc": "affect.metrics.CCC",
            "pcc": "affect.metrics.PCC",
            "rmse": "affect.metrics.RMSE",
            "sagr": "affect.metrics.SAGR",
        },
        "ccc/mean",
    ),
}


@dataclass(frozen=True)
class Input:
    """What a graph takes.

    Attributes:
        size: Side of the square image in pixels.
        name: Name of the graph's input; None takes its only one.
        layout: Order of the axes.
        colour: Order of the channels; GREY is one.
        range: Number that the pixel value 255 becomes, before mean and standard deviation; 255 leaves pixels alone.
        mean: Subtracted, per channel or one number for all.
        std: Divided by, per channel or one number for all.
    """

    size: int
    name: str | None = None
    layout: str = "NCHW"
    colour: str = "RGB"
    range: float = 1.0
    mean: tuple[float, ...] = (0.0,)
    std: tuple[float, ...] = (1.0,)

    @property
    def channels(self) -> int:
        """Number of channels."""
        return 1 if self.colour == "GREY" else 3

    def prepare(self, image: Tensor) -> Tensor:
        """Return what the graph takes, float32, of RGB uint8 images ``(B, 3, H, W)``."""
        x = image.float()
        if self.colour == "GREY":
            # Rounded, as an image library stores grey.
            x = (x * x.new_tensor(LUMA).view(3, 1, 1)).sum(1, keepdim=True).round()
        elif self.colour == "BGR":
            x = x.flip(1)
        x = x * (self.range / 255)
        x = (x - x.new_tensor(self.mean).view(-1, 1, 1)) / x.new_tensor(self.std).view(-1, 1, 1)
        return x.permute(0, 2, 3, 1).contiguous() if self.layout == "NHWC" else x


@dataclass(frozen=True)
class Output:
    """What a graph gives for one task.

    Attributes:
        kind: Key of ``KINDS``.
        labels: Names of the columns in their order.
        name: Name of the graph's output, or its number from 0; None takes the only one.
        columns: First column and the one behind the last; None takes all.
        values: What the columns hold.
    """

    kind: str
    labels: tuple[str, ...]
    name: str | int | None = None
    columns: tuple[int, int] | None = None
    values: str = "logits"

    def task_node(self) -> dict[str, Any]:
        """Return the config of the task, as a release holds it."""
        kind = KINDS[self.kind]
        node: dict[str, Any] = {"_target_": kind.target, "score": kind.score}
        if kind.argument == "aus":
            node["aus"] = [int(name.removeprefix("AU")) for name in self.labels]
        elif kind.argument is not None:
            node[kind.argument] = list(self.labels)
        return node | {"metrics": {name: {"_target_": target} for name, target in kind.metrics.items()}}

    def outputs(self) -> list[str]:
        """Return the task's outputs in its own order."""
        return list(labels.AFFECT_AXES) if self.kind == "valence_arousal" else list(self.labels)

    def read(self, raw: Tensor) -> Tensor:
        """Return values ``(B, K)`` in the task's order of a graph's output ``(B, …)``."""
        found = raw.float().flatten(1)
        if self.columns is not None:
            found = found[:, self.columns[0] : self.columns[1]]
        if self.values == "logits":
            found = found.softmax(-1) if self.kind == "expression" else found.sigmoid()
        elif self.values == "probabilities":
            found = found.clamp(0, 1)  # a sum of rounded numbers may lie beside it
        if self.kind == "valence_arousal":
            found = found[:, [self.labels.index(axis) for axis in labels.AFFECT_AXES]].clamp(-1, 1)
        elif self.kind == "au_intensity":
            found = found.clamp(0, 5)
        return found


@dataclass(frozen=True)
class Adapter:
    """How an ONNX file of somebody else is used.

    Attributes:
        name: What results call the model.
        input: What it takes.
        outputs: What it gives, by task.
        crop: Plain crop recipe of photographs; None where images are crops already.
        tested: Whether the adapter was tried on the original weights.
        source: Where the model comes from, in words.
    """

    name: str
    input: Input
    outputs: Mapping[str, Output]
    crop: Mapping[str, Any] | None = None
    tested: bool = False
    source: str = ""

    def config(self) -> dict[str, Any]:
        """Return the node ``task`` of a release that predicts the same."""
        return {name: output.task_node() for name, output in self.outputs.items()}

    def labels(self) -> dict[str, list[str]]:
        """Return the outputs by task."""
        return {name: output.outputs() for name, output in self.outputs.items()}

    def preprocess(self) -> dict[str, Any]:
        """Return what a release's ``preprocess.json`` would hold."""
        return {
            "recipe": dict(self.crop) if self.crop else None,
            "image_size": self.input.size,
            "channel_order": self.input.colour,
            "mean": list(self.input.mean),
            "std": list(self.input.std),
        }


# ----------------------------------------------------------------------------------------------------- reading


def adapter_names(folder: Path) -> list[str]:
    """Return the names of the adapters in a folder of configurations ``conf``."""
    return sorted(path.stem for path in (folder / "foreign").glob("*.yaml"))


def read_adapter(path: Path) -> Adapter:
    """Return the adapter in a YAML file.

    Raises:
        CheckpointError: If the file is missing or says something else than an adapter does; it names the place.
    """
    if not path.is_file():
        raise CheckpointError(f"adapter={path}: no such file")
    return parse_adapter(read_plain(path), str(path))


def parse_adapter(node: Any, where: str) -> Adapter:  # noqa: ANN401
    """Return the adapter that plain values describe.

    Args:
        node: What the YAML file holds.
        where: The file, for messages.

    Raises:
        CheckpointError: With the place of the first thing that is wrong.
    """
    check_config(node, (), where)
    top = _known(node, Adapter, where, "", needed=("name", "input", "outputs"))
    require_plain_name(top["name"], "a model", where)
    given = _known(top["input"], Input, where, "input", needed=("size",))
    outputs = top["outputs"]
    if not isinstance(outputs, dict) or not outputs:
        raise CheckpointError(f"{where}: outputs must name at least one task ({', '.join(KINDS)})")
    crop = top.get("crop")
    if crop is not None and not (isinstance(crop, dict) and isinstance(crop.get("kind"), str)):
        raise CheckpointError(f"{where}: crop must be null or a crop recipe with its kind")
    if not isinstance(top.get("tested", False), bool) or not isinstance(top.get("source", ""), str):
        raise CheckpointError(f"{where}: tested must be true or false, and source a text")
    made = _input(given, where)
    if crop is not None:
        crop = {"name": top["name"], **crop, "size": made.size}
        try:
            CropRecipe.read(crop)
        except (ConfigError, TypeError, ValueError) as error:
            raise CheckpointError(f"{where}: crop: {error}") from error
    return Adapter(
        top["name"],
        made,
        {_task_name(name, where): _output(name, one, where) for name, one in outputs.items()},
        crop,
        top.get("tested", False),
        top.get("source", ""),
    )


def _task_name(name: Any, where: str) -> str:  # noqa: ANN401
    require_plain_name(name, "a task", where)
    return name


def _known(node: Any, made: type, where: str, place: str, needed: Sequence[str]) -> dict[str, Any]:  # noqa: ANN401
    """Return a mapping of which every key is a field of ``made``, and that has those that are needed."""
    known = [item.name for item in dataclasses.fields(made)]
    label = f"{place}." if place else ""
    if not isinstance(node, dict):
        raise CheckpointError(f"{where}: {place or 'the file'} must hold {', '.join(known)}")
    for key in node:
        if key not in known:
            raise CheckpointError(f"{where}: no key {label}{key}; {near(str(key), known)}")
    for key in needed:
        if node.get(key) is None:
            raise CheckpointError(f"{where}: {label}{key} is missing")
    return node


def _input(node: dict[str, Any], where: str) -> Input:
    size = node["size"]
    if not isinstance(size, int) or isinstance(size, bool) or not 1 <= size <= LARGEST_SIDE:
        raise CheckpointError(f"{where}: input.size={size!r} must be the side of the image in pixels")
    for key, options in (("layout", LAYOUTS), ("colour", COLOURS)):
        if node.get(key) is not None and node[key] not in options:
            raise CheckpointError(f"{where}: input.{key}={node[key]!r}; {near(str(node[key]), options)}")
    if node.get("name") is not None and not isinstance(node["name"], str):
        raise CheckpointError(f"{where}: input.name={node['name']!r} must be a name")
    white = node.get("range", 1.0)
    if not _is_number(white) or white <= 0:
        raise CheckpointError(f"{where}: input.range={white!r} must be what 255 becomes, e.g. 1 or 255")
    made = Input(
        size,
        node.get("name"),
        node.get("layout") or "NCHW",
        node.get("colour") or "RGB",
        float(white),
        _channels(node.get("mean", 0.0), where, "input.mean"),
        _channels(node.get("std", 1.0), where, "input.std"),
    )
    for key in ("mean", "std"):
        if len(getattr(made, key)) not in (1, made.channels):
            raise CheckpointError(f"{where}: input.{key} needs one number, or {made.channels} for {made.colour}")
    if any(value <= 0 for value in made.std):
        raise CheckpointError(f"{where}: input.std must be above 0")
    return made


def _channels(value: Any, where: str, place: str) -> tuple[float, ...]:  # noqa: ANN401
    numbers = value if isinstance(value, list) else [value]
    if not numbers or not all(_is_number(one) for one in numbers):
        raise CheckpointError(f"{where}: {place}={value!r} must be a number, or one for each channel")
    return tuple(float(one) for one in numbers)


def _is_number(value: Any) -> bool:  # noqa: ANN401
    return isinstance(value, int | float) and not isinstance(value, bool) and abs(value) < 1e9  # NaN is not below it


def _output(task: str, node: Any, where: str) -> Output:  # noqa: ANN401
    place = f"outputs.{task}"
    found = _known(node, Output, where, place, needed=("kind", "labels"))
    kind, names, values = found["kind"], found["labels"], found.get("values", "logits")
    if kind not in KINDS:
        raise CheckpointError(f"{where}: {place}.kind={kind!r}; {near(str(kind), KINDS)}")
    if values not in VALUES:
        raise CheckpointError(f"{where}: {place}.values={values!r}; {near(str(values), VALUES)}")
    if kind in ("valence_arousal", "au_intensity") and values != "numbers":
        raise CheckpointError(f"{where}: {place}.values={values!r}: {kind} is values=numbers")
    if kind in ("expression", "au") and values == "numbers":
        raise CheckpointError(f"{where}: {place}.values=numbers: {kind} is values=logits or probabilities")
    which = found.get("name")
    if which is not None and (isinstance(which, bool) or not isinstance(which, str | int)):
        raise CheckpointError(f"{where}: {place}.name={which!r} must be a name, or the number of an output from 0")
    if not isinstance(names, list) or not names or not all(isinstance(name, str) for name in names):
        raise CheckpointError(f"{where}: {place}.labels must list the names of the columns in their order")
    listed = tuple(_label(kind, name, f"{where}: {place}.labels") for name in names)
    if len(set(listed)) != len(listed):
        raise CheckpointError(f"{where}: {place}.labels names {_first_twice(listed)} twice")
    if kind == "valence_arousal" and set(listed) != set(labels.AFFECT_AXES):
        raise CheckpointError(f"{where}: {place}.labels must be {' and '.join(labels.AFFECT_AXES)}, in their order")
    columns = found.get("columns")
    if columns is not None:
        whole = isinstance(columns, list) and len(columns) == 2
        if not whole or not all(isinstance(one, int) and not isinstance(one, bool) for one in columns):
            raise CheckpointError(f"{where}: {place}.columns={columns!r} must be the first and the one behind the last")
        if not 0 <= columns[0] < columns[1] or columns[1] - columns[0] != len(listed):
            raise CheckpointError(f"{where}: {place}.columns={columns}: {len(listed)} labels need as many columns")
        columns = (columns[0], columns[1])
    return Output(kind, listed, which, columns, values)


def _label(kind: str, name: str, place: str) -> str:
    if kind == "expression":
        canonical = labels.canonical_expression(name)
        if canonical not in KNOWN_EXPRESSIONS:
            raise CheckpointError(f"{place}: no expression {name!r}; {near(canonical, KNOWN_EXPRESSIONS)}")
        return canonical
    if kind.startswith("au"):
        known = [labels.au_output(au) for au in labels.AU_NAMES]
        if name not in known:
            raise CheckpointError(f"{place}: no action unit {name!r}; {near(name, known)}")
    return name


def _first_twice(names: Sequence[str]) -> str:
    return next(name for index, name in enumerate(names) if name in names[:index])


def as_torch(array: Any) -> Tensor:  # noqa: ANN401
    """Return a graph's output as a tensor; kinds of numbers that torch does not know are read as float32."""
    import numpy as np

    found = np.asarray(array)
    return torch.from_numpy(np.ascontiguousarray(found if found.dtype.kind in "fiub" else found.astype(np.float32)))
