# SPDX-License-Identifier: Apache-2.0
"""A checkpoint that reads faces: crops in, values by task out, whatever runs it.

``open_predictor`` is the one place that knows which kinds of checkpoints there are. What it returns says which crops it
takes and which tasks it has; ``read_faces`` turns photographs and observations into values in pixels and degrees of the
photographs.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple, Protocol

import numpy as np
import torch
from numpy.typing import NDArray

from affect.commands import decisions
from affect.data.batch import FaceBatch
from affect.data.dataset import turned
from affect.errors import CheckpointError
from affect.foreign import Adapter, open_checkpoint
from affect.foreign.opening import Predictor as Module
from affect.foreign.opening import build_predictor
from affect.geometry import CropRecipe, FaceObservation, invert, transform_points
from affect.geometry.providers import coarser_points, upright_crops
from affect.geometry.tracking import Clock, no_clock
from affect.release import POINTS, PREPROCESS, build_tasks
from affect.tasks import Task

BOX_MARGIN = 0.1
"""Added on each side of a face's box, as a fraction of it, for a model that was trained on delivered crops."""

SCHEMES = ("98", "68", "5")
"""Schemes that upright crops can be cut by, from fine to coarse."""


class Predictor(Protocol):
    """A model that is ready to read crops.

    Attributes:
        tasks: What it predicts, by name.
        recipe: How a face is cropped for it.
        typical: By landmark scheme where points lie in the crops that it was trained on, ``(P, 2)`` in pixels of the
            crop: what upright crops are cut by. Boxes of another detector hold another part of the face.
        thresholds: What its checkpoint says of thresholds (``decisions.describe``), None if nothing.
        delivered: Whether it was trained on crops as a dataset delivers them.
    """

    tasks: Mapping[str, Task]
    recipe: CropRecipe
    typical: Mapping[str, NDArray[np.float64]]
    thresholds: dict[str, Any] | None
    delivered: bool

    def predict(self, crops: NDArray[np.uint8]) -> dict[str, NDArray[np.float32]]:
        """Return the values of each task (``Task.predict``) for RGB crops ``(N, S, S, 3)``."""
        ...


class CheckpointPredictor:
    """A checkpoint of any kind: a release in PyTorch, an ONNX file, a packaged network.

    Args:
        module: What predicts, in evaluation mode.
        tasks: Its tasks.
        preprocess: What the release says of crops and thresholds.
        where: File that says so, for messages.
        device: Where the model runs, if it can run there.
    """

    def __init__(
        self,
        module: Module,
        tasks: Mapping[str, Task],
        preprocess: Mapping[str, Any],
        where: str = PREPROCESS,
        device: torch.device | str = "cpu",
    ) -> None:
        self.tasks, self.device, self.where = tasks, torch.device(device), where
        self.module = module.to(self.device)
        self.recipe = prediction_recipe(preprocess)
        self.typical: Mapping[str, NDArray[np.float64]] = points_in_crops(preprocess)
        self.delivered = was_delivered(preprocess)
        self.thresholds = decisions.read_thresholds(preprocess, where)

    def predict(self, crops: NDArray[np.uint8]) -> dict[str, NDArray[np.float32]]:
        """Return the values of each task.

        Raises:
            CheckpointError: If some are not finite, as those of damaged or hostile weights.
        """
        images = torch.from_numpy(np.ascontiguousarray(crops)).permute(0, 3, 1, 2).contiguous()
        batch = FaceBatch(image=images, targets={}, masks={})
        with torch.inference_mode():
            found = {
                name: v.float().cpu().numpy() for name, v in self.module.predict_step(batch.to(self.device)).items()
            }
        for name, values in found.items():
            if not np.isfinite(values).all():
                raise CheckpointError(f"{self.where}: the model's values of {name} are not finite: it cannot be used")
        return found


def open_predictor(
    checkpoint: str | Path,
    trust: Sequence[str] = (),
    adapter: Adapter | None = None,
    device: torch.device | str | None = None,
) -> Predictor:
    """Return the predictor of a checkpoint.

    Args:
        checkpoint: Folder of a run or of a release, ONNX file, or another name that ``open_checkpoint`` knows.
        trust: Packages whose classes the checkpoint may name.
        adapter: What an ONNX file of somebody else takes and gives.
        device: Where a PyTorch model runs; None takes a GPU where there is one.
    """
    release = open_checkpoint(checkpoint, list(trust), adapter)
    tasks = build_tasks(release)
    if device is None:
        device = "cuda" if torch.cuda.is_available() else "cpu"
    where = str(release.folder / PREPROCESS)
    return CheckpointPredictor(build_predictor(release, tasks).eval(), tasks, release.preprocess, where, device)


def prediction_recipe(preprocess: Mapping[str, Any]) -> CropRecipe:
    """Return the recipe of a release; a model trained on delivered crops gets the box of the face with a margin."""
    size = int(preprocess["image_size"])
    if was_delivered(preprocess):
        return CropRecipe(name="box", kind="box", size=size, margin=BOX_MARGIN)
    return CropRecipe.read({**preprocess["recipe"], "size": size}).composed()


def was_delivered(preprocess: Mapping[str, Any]) -> bool:
    """Return whether a model was trained on images that were crops already."""
    described = preprocess.get("recipe")
    return described is None or described["kind"] == "none"


def points_in_crops(preprocess: Mapping[str, Any]) -> dict[str, NDArray[np.float64]]:
    """Return by scheme where points lie in a release's upright crops, in pixels; empty where nobody says so."""
    if prediction_recipe(preprocess).kind != "box":
        return {}
    size = int(preprocess["image_size"])
    return {
        scheme: np.asarray(points, np.float64) * size - 0.5 for scheme, points in (preprocess.get(POINTS) or {}).items()
    }


def face_crops(predictor: Predictor, faces: Sequence[FaceObservation]) -> tuple[NDArray[np.bool_], NDArray[np.float64]]:
    """Return which faces a model can be shown, ``(M,)``, and the crops of these as matrices ``(N, 2, 3)``.

    Aligned crops follow from the points. Upright ones are cut so that the points lie where they did in training, and by
    the face's box where the checkpoint does not say where that was, or a face's points are all in one place.
    """
    if not faces:
        return np.zeros(0, bool), np.zeros((0, 2, 3))
    recipe = predictor.recipe
    points, boxes = np.array([face.points for face in faces]), np.array([face.box for face in faces]).reshape(-1, 4)
    usable = recipe.usable(points, boxes)
    matrices = np.zeros((len(faces), 2, 3))
    if usable.any():
        matrices[usable] = recipe.matrices(points=points[usable], boxes=boxes[usable])
    for wanted in SCHEMES if predictor.typical else ():
        seen = coarser_points(points, faces[0].scheme, wanted)
        known = (coarser_points(target, scheme, wanted) for scheme, target in predictor.typical.items())
        target = next((each for each in known if each is not None), None)
        if seen is not None and target is not None:
            placed, upright = upright_crops(seen, target)
            usable, matrices = usable | placed, np.where(placed[:, None, None], upright, matrices)
            break
    return usable, matrices[usable]


class FaceValues(NamedTuple):
    """What a model reads in faces.

    Attributes:
        values: By task, ``(N, K)``; points ``(N, P, 2)`` in pixels of the photographs.
        usable: Which of the faces that were given could be cropped, ``(M,)``; N of them.
    """

    values: dict[str, NDArray[np.float32]]
    usable: NDArray[np.bool_]


def read_faces(
    predictor: Predictor,
    images: Sequence[NDArray[np.uint8]],
    faces: Sequence[FaceObservation],
    batch_size: int = 32,
    clock: Clock = no_clock,
) -> FaceValues:
    """Return what a model reads in faces.

    Args:
        predictor: The model.
        images: The photograph of each face, RGB uint8 ``(H, W, 3)``.
        faces: Box and points of each face.
        batch_size: Crops that the model reads at once.
        clock: Takes the time of ``crop`` and ``model``.
    """
    recipe, tasks = predictor.recipe, predictor.tasks
    usable, matrices = face_crops(predictor, faces)
    kept = np.flatnonzero(usable)
    parts: dict[str, list[NDArray[np.float32]]] = {name: [] for name in tasks}
    for start in range(0, len(kept), batch_size):
        rows = range(start, min(start + batch_size, len(kept)))
        with clock("crop"):
            crops = np.stack([recipe.crop(images[kept[row]], matrices[row]) for row in rows])
        with clock("model"):
            for name, values in predictor.predict(crops).items():
                parts[name].append(values)
    found = {}
    for name, task in tasks.items():
        if not parts[name]:
            continue
        values = np.concatenate(parts[name])
        if task.landmark_scheme is not None:
            pixels = values.astype(np.float64) * recipe.size - 0.5
            found[name] = transform_points(invert(matrices), pixels).astype(np.float32)
        else:
            found[name] = task.unturn(values, turned(matrices), np.zeros(len(values), bool))
    return FaceValues(found, usable)
