# SPDX-License-Identifier: Apache-2.0
"""A trained model as a landmark provider: what ``affect prepare landmarks=decafa`` and ``finder=decafa`` look with.

Any checkpoint with a landmarks task is one. Its name in recipes and results is that of its model with twelve digits of
the hash of what decides its points, so that crops of another checkpoint lie in another folder.
"""

from __future__ import annotations

import functools
import hashlib
import json
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path

import numpy as np
import torch

from affect.commands.predictor import points_in_crops, prediction_recipe
from affect.data.batch import FaceBatch
from affect.errors import CheckpointError, ConfigError, near
from affect.foreign.opening import build_inference_model
from affect.geometry import CropLandmarks, FaceDetector, FaceFinder, TwoStageFinder
from affect.geometry.providers import FINDERS, build_detector
from affect.models.base import AffectModule
from affect.release import CONFIG, MODEL, POINTS, Release, build_tasks, read_release
from affect.tasks import Task

TYPICAL_FACES = 256
"""Faces of each source that these positions are the mean of, at most."""

SCHEMES = ("68", "98", "5")
"""Schemes that crops are aligned by: the first of them that a checkpoint predicts is provided."""


def landmark_task(release: Release) -> tuple[str, str]:
    """Return the task of a release that provides points, and its scheme.

    Raises:
        CheckpointError: If it predicts no points that crops can be aligned by.
    """
    schemes = {task.landmark_scheme: name for name, task in build_tasks(release).items()}
    scheme = next((known for known in SCHEMES if known in schemes), None)
    if scheme is None:
        raise CheckpointError(
            f"{release.folder}: predicts {', '.join(release.config['task'])}, and no points of scheme "
            f"{' or '.join(SCHEMES)}; give a checkpoint with a landmarks task"
        )
    return schemes[scheme], scheme


def model_name(release: Release) -> str:
    """Return the name of a release's model, e.g. ``decafa``."""
    return str(release.config["model"]["_target_"]).rpartition(".")[2].lower()


def content_hash(release: Release) -> str:
    """Return the SHA-256 of what decides a release's points: weights, configuration, crop."""
    digest = hashlib.sha256()
    for name in (MODEL, CONFIG):
        digest.update((release.folder / name).read_bytes())
    deciding = {key: release.preprocess.get(key) for key in ("recipe", "image_size", POINTS)}
    digest.update(json.dumps(deciding, sort_keys=True).encode())
    return digest.hexdigest()


def provider_name(release: Release) -> str:
    """Return the provider's name in recipes: the model's and twelve digits of the checkpoint's hash."""
    return f"{model_name(release)}-{content_hash(release)[:12]}"


def read_provider(landmarks: str, checkpoint: str | Path | None, trust: Sequence[str] = ()) -> Release:
    """Return the release that provides points.

    Args:
        landmarks: Name of its model, with or without the hash.
        checkpoint: Folder of a run or of a release.
        trust: Packages whose classes it may name.

    Raises:
        ConfigError: If there is no checkpoint, or it holds another model or other weights than are asked for.
        CheckpointError: If it cannot be read, or predicts no points.
    """
    if checkpoint is None:
        raise ConfigError(
            f"landmarks={landmarks}: {near(landmarks, FINDERS)}; for a model that you trained name its folder too: "
            "checkpoint=<run or release>"
        )
    release = read_release(Path(checkpoint).expanduser(), list(trust))
    landmark_task(release)
    own = {model_name(release), provider_name(release)}
    if landmarks not in own:
        raise ConfigError(f"landmarks={landmarks}: checkpoint={checkpoint} is {', '.join(sorted(own))}")
    return release


def describe_provider(release: Release) -> str:
    """Return which model provides the points, as text."""
    return f"{release.config['model']['_target_']}, scheme {landmark_task(release)[1]}, sha256 {content_hash(release)}"


def landmark_provider(
    release: Release, device: str = "cpu", passes: int = 2, batch_size: int = 32, module: AffectModule | None = None
) -> CropLandmarks:
    """Return a release as a provider of points in boxes.

    Args:
        release: A release with a landmarks task.
        device: Where the network runs.
        passes: How often a face is looked at; see ``CropLandmarks``.
        batch_size: Most crops at once.
        module: Its model where it is built already.
    """
    name, scheme = landmark_task(release)
    built = build_inference_model(release, build_tasks(release)) if module is None else module
    predict = functools.partial(predict_points, built.eval().to(device), name)
    typical = points_in_crops(release.preprocess).get(scheme)
    return CropLandmarks(predict, prediction_recipe(release.preprocess), scheme, typical, passes, batch_size)


def predict_points(module: AffectModule, task: str, crops: np.ndarray) -> np.ndarray:
    """Return a task's points ``(N, P, 2)`` in pixels of crops, RGB uint8 ``(N, S, S, 3)``, float64."""
    images = torch.from_numpy(crops).permute(0, 3, 1, 2).contiguous()
    batch = FaceBatch(image=images, targets={}, masks={})
    with torch.inference_mode():
        found = module.predict_step(batch.to(next(module.parameters()).device))[task]
    height, width = crops.shape[1:3]
    return found.cpu().numpy().astype(np.float64) * [width, height] - 0.5


def checkpoint_finder(
    checkpoint: str | Path,
    detector: str = "faceapi",
    device: str = "cpu",
    passes: int = 2,
    batch_size: int = 32,
    trust: Sequence[str] = (),
) -> TwoStageFinder:
    """Return a finder whose boxes are a detector's and whose points are those of a trained model.

    Args:
        checkpoint: Folder of a run or of a release with a landmarks task.
        detector: One of ``affect.geometry.providers.FINDERS``, or ``mtcnn``.
        device: Where networks run.
        passes: How often a face is looked at.
        batch_size: Most crops at once.
        trust: Packages whose classes the checkpoint may name.
    """
    release = read_release(Path(checkpoint).expanduser(), list(trust))
    found: FaceDetector = build_detector(detector, device)
    return TwoStageFinder(found, landmark_provider(release, device, passes, batch_size))


def finder_maker(release: Release, detector: str, device: str, trust: Sequence[str] = ()) -> Callable[[], FaceFinder]:
    """Return what builds the finder of a release in each process that prepares."""
    return functools.partial(checkpoint_finder, str(release.folder), detector, device, trust=tuple(trust))


def typical_points(tasks: Mapping[str, Task], batch: FaceBatch) -> dict[str, list[list[float]]]:
    """Return by scheme the mean position of the labelled points of a batch, as fractions of the crop.

    Schemes with a point that no face of the batch has are left out.
    """
    found = {}
    for name, task in tasks.items():
        if task.landmark_scheme is None or name not in batch.targets:
            continue
        mask, points = batch.masks[name].double(), batch.targets[name].double()
        count = mask.sum(0)
        if bool((count > 0).all()):
            mean = (points * mask.unsqueeze(-1)).sum(0) / count.unsqueeze(-1)
            found[task.landmark_scheme] = [[round(float(x), 5), round(float(y), 5)] for x, y in mean]
    return found
