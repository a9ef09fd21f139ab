# SPDX-License-Identifier: Apache-2.0
"""``affect predict``: the faces of an image or a folder, aligned as in training, as a table and as pictures."""

from __future__ import annotations

import shlex
from pathlib import Path
from typing import Any

import numpy as np
import torch
from omegaconf import DictConfig
from rich.console import Console
from tqdm import tqdm

from affect.commands import assembly, decisions
from affect.commands.train import quiet
from affect.data.batch import FaceBatch
from affect.data.dataset import turned
from affect.data.images import read_image
from affect.data.table import FaceTable
from affect.errors import DataError
from affect.geometry import CropRecipe, FaceObservation, invert, transform_points
from affect.models.base import AffectModule
from affect.release import PREPROCESS, build_model, build_tasks, read_release
from affect.report.figures import FaceNote, annotate_faces, save_image
from affect.report.provenance import decision_texts
from affect.tasks import Expression, Task, ValenceArousal

IMAGE_SUFFIXES = (".jpg", ".jpeg", ".png", ".bmp", ".webp", ".tif", ".tiff", ".pgm", ".ppm")
ANNOTATED = "annotated"
"""Folder of the annotated copies within ``out``; a search for images never enters it."""
MOST_BARS = 8
BOX_MARGIN = 0.1
"""Added on each side of a face's box, as a fraction of it, for a model that was trained on delivered crops."""


def run(config: DictConfig) -> None:
    """Write ``predictions.csv``, ``predictions.parquet`` and annotated copies of ``input`` to ``out``.

    Raises:
        DataError: If there is no image, none can be read, or no face is found in any.
    """
    quiet()
    console = Console()
    out = Path(config.out).expanduser()
    paths, root = input_images(Path(config.input).expanduser(), out)
    release = read_release(Path(config.checkpoint).expanduser(), list(config.trust))
    tasks = build_tasks(release)
    module = build_model(release, tasks)
    thresholds = decisions.read_thresholds(release.preprocess, str(release.folder / PREPROCESS))
    finder = assembly.make(config.finder, "finder")
    recipe = prediction_recipe(release.preprocess)
    if was_delivered(release.preprocess):
        console.print(f"trained on delivered crops: each face's box with a margin of {BOX_MARGIN:.0%} is cropped")
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    module.to(device)

    columns: dict[str, list[Any]] = {}
    skipped: dict[str, int] = {}
    for path in tqdm(paths, unit="image", disable=len(paths) == 1):
        name = str(path.relative_to(root))
        try:
            image = read_image(path)
        except DataError:
            if len(paths) == 1:
                raise
            skipped["unreadable image"] = skipped.get("unreadable image", 0) + 1
            add_row(columns, {"image": name, "success": 0.0})
            continue
        found = finder.find(image)
        if not found:
            skipped["no face found"] = skipped.get("no face found", 0) + 1
            add_row(columns, {"image": name, "success": 0.0})
            continue
        values = predict_faces(module, tasks, recipe, image, found, device, int(config.batch_size))
        if thresholds is not None:
            add_present(values, tasks, thresholds["values"])
        for face, (observation, row) in enumerate(zip(found, values, strict=True)):
            add_row(columns, {"image": name, "face": face, "success": 1.0, **observed(observation), **row})
        if config.annotate:
            notes = [note(observation, row, tasks) for observation, row in zip(found, values, strict=True)]
            copy = name if name.endswith(".png") else f"{name}.png"
            save_image(annotate_faces(image, notes, top=MOST_BARS), out / ANNOTATED / copy)
    for reason, count in skipped.items():
        console.print(f"{reason}: {count} of {len(paths)} images")
    if sum(skipped.values()) == len(paths):
        raise DataError(f"input={config.input}: no face found in {len(paths)} image(s); nothing was predicted")
    table = FaceTable.from_columns(columns, root, {"dataset": str(config.input), "label_source": "predictions"})
    table.to_csv(out / "predictions.csv")
    table.to_parquet(out / "predictions.parquet")
    faces = sum(1 for value in columns["success"] if value)
    console.print(f"{faces} face(s) in {len(paths)} image(s): [bold]{out / 'predictions.csv'}[/bold]", soft_wrap=True)
    if config.annotate:
        console.print(f"annotated copies: [bold]{out / ANNOTATED}[/bold]", soft_wrap=True)
    if thresholds is not None and decision_texts({"thresholds": thresholds}):
        console.print(f"present: {decision_texts({'thresholds': thresholds})[0]}", highlight=False)
    command = training_command(out / "predictions.parquet", recipe, tasks)
    console.print(f"train on it: {command}", markup=False, soft_wrap=True)


def training_command(table: Path, recipe: CropRecipe, tasks: dict[str, Task]) -> str:
    """Return the command that trains on a predictions table, with the crop and the tasks of its model."""
    names = ",".join(tasks)
    return f"affect train dataset=table dataset.table={shlex.quote(str(table))} prepare={recipe.kind} task=[{names}]"


def input_images(path: Path, out: Path) -> tuple[list[Path], Path]:
    """Return the image files at ``path`` and the folder they are under.

    Args:
        path: An image, or a folder, searched to any depth.
        out: Folder that predictions are written to; the annotated copies of an earlier run in it are left out.

    Raises:
        DataError: If there is nothing at ``path``, or no image in it.
    """
    if path.is_file():
        return [path], path.parent
    if not path.is_dir():
        raise DataError(f"input={path}: no such file or folder")
    found = (file for file in path.rglob("*") if file.suffix.lower() in IMAGE_SUFFIXES)
    copies = (out / ANNOTATED).resolve()
    files = sorted(file for file in found if not file.resolve().is_relative_to(copies))
    if not files:
        raise DataError(f"input={path}: no image in it ({', '.join(IMAGE_SUFFIXES)})")
    return files, path


def prediction_recipe(preprocess: dict[str, Any]) -> CropRecipe:
    """Return the recipe of a release; a model trained on delivered crops gets the box of the face with a margin."""
    size = int(preprocess["image_size"])
    if was_delivered(preprocess):
        return CropRecipe(name="box", kind="box", size=size, margin=BOX_MARGIN)
    return CropRecipe.read({**preprocess["recipe"], "size": size}).composed()


def was_delivered(preprocess: dict[str, Any]) -> bool:
    """Return whether a model was trained on images that were crops already."""
    described = preprocess.get("recipe")
    return described is None or described["kind"] == "none"


def predict_faces(
    module: AffectModule,
    tasks: dict[str, Task],
    recipe: CropRecipe,
    image: np.ndarray,
    found: list[FaceObservation],
    device: torch.device,
    batch_size: int,
) -> list[dict[str, Any]]:
    """Return the predicted columns of each face in ``image``; landmarks in pixels of the image."""
    points = np.stack([observation.points for observation in found])
    boxes = np.stack([observation.box for observation in found])
    matrices = recipe.matrices(points=points, boxes=boxes)
    crops = np.stack([recipe.crop(image, matrix) for matrix in matrices])
    stacked = torch.from_numpy(crops).permute(0, 3, 1, 2).contiguous()
    parts = []
    with torch.inference_mode():
        for start in range(0, len(stacked), batch_size):
            batch = FaceBatch(image=stacked[start : start + batch_size], targets={}, masks={})
            parts.append({n: v.cpu().numpy() for n, v in module.predict_step(batch.to(device)).items()})
    rows: list[dict[str, Any]] = [{} for _ in found]
    for name, task in tasks.items():
        values = np.concatenate([part[name] for part in parts])
        if task.landmark_scheme is not None:
            pixels = values.astype(np.float64) * recipe.size - 0.5
            values = transform_points(invert(matrices), pixels).astype(np.float32)
        else:
            values = task.unturn(values, turned(matrices), np.zeros(len(values), bool))
        for column, cells in task.decode(values).items():
            for row, cell in zip(rows, cells, strict=True):
                row[column] = cell
    return rows


def add_present(rows: list[dict[str, Any]], tasks: dict[str, Task], thresholds: decisions.Thresholds) -> None:
    """Add the column ``present`` in place: names of the outputs that reach the checkpoint's thresholds, as one text."""
    decided = {name: task for name, task in tasks.items() if name in thresholds}
    values = {n: np.array([[row[column] for column in task.wanted()] for row in rows]) for n, task in decided.items()}
    for row, text in zip(rows, decisions.present(decided, values, thresholds), strict=False):
        row["present"] = text


def observed(observation: FaceObservation) -> dict[str, Any]:
    """Return the columns of what the finder saw: box, score, and points if no task predicts points of that scheme."""
    return {
        "box": np.asarray(observation.box, np.float32),
        "score": observation.score,
        f"landmarks_{observation.scheme}": np.asarray(observation.points, np.float32).reshape(-1),
    }


def add_row(columns: dict[str, list[Any]], row: dict[str, Any]) -> None:
    """Append a row; a column that the row or the earlier rows lack is null there."""
    count = len(next(iter(columns.values()))) if columns else 0
    for name in row:
        columns.setdefault(name, [None] * count)
    for name, cells in columns.items():
        cells.append(row.get(name))


def note(observation: FaceObservation, row: dict[str, Any], tasks: dict[str, Task]) -> FaceNote:
    """Return what is drawn for one face: its box, points, largest values, expression and place in the circumplex."""
    points: Any = observation.points
    bars: dict[str, float] = {}
    limit = 1.0
    expression = affect = None
    for task in tasks.values():
        shown, full = task.bars(row)
        if shown:
            bars, limit = bars | shown, max(limit, full)
        if isinstance(task, Expression):
            name = row["expression"]
            expression = (str(name), float(row[f"expression_{str(name).replace(' ', '_')}"]))
        elif isinstance(task, ValenceArousal):
            affect = (float(row["valence"]), float(row["arousal"]))
        elif task.landmark_scheme is not None:
            points = np.asarray(row[f"landmarks_{task.landmark_scheme}"]).reshape(-1, 2)
    return FaceNote(observation.box, points, expression, bars, limit, affect)
