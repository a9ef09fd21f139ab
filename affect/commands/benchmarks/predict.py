# SPDX-License-Identifier: Apache-2.0
"""How many faces ``affect predict`` reads a second, stage by stage, beside MediaPipe on the same video.

The video is a photograph under a moving camera; the model an EfficientNet-Lite0 (of a tiny network with ``quick``) with
heads for action units, expression, valence and arousal, whose weights do not change how long it takes. Then the model
alone, in torch and in ONNX Runtime. Every row is measured in the same process, in turns; the best round counts.

MediaPipe's landmarker is another measurement, 478 points and 52 blendshapes of one network each, with threads of its
own: a peer in what it is used for, not in what it computes.
"""

from __future__ import annotations

import math
import tempfile
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import cv2
import numpy as np
import torch

from affect.commands.benchmarks.loader import _photograph
from affect.commands.face_rows import Columns
from affect.commands.predict import Options, stream
from affect.commands.predictor import CheckpointPredictor
from affect.commands.stages import Stages
from affect.data.video import VideoFile, VideoWriter, writable_codec
from affect.encoders import TimmEncoder
from affect.errors import ConfigError
from affect.geometry import CropRecipe, FaceApiFinder, FaceFinder, MediapipeFinder
from affect.geometry.providers import landmarker_bundle
from affect.models.baseline import Baseline
from affect.report.predictions import PredictionsWriter
from affect.tasks import AUOccurrence, Expression, Task, ValenceArousal

STAGES = ("decode", "detect", "landmarks", "crop", "model", "write")
SIZE, RATE = (360, 640), 25.0
BATCH = 16


def write_video(folder: Path, count: int) -> Path:
    """Write a video of a photograph under a camera that moves and zooms, and return its path."""
    photograph = _photograph()
    codec, suffix = writable_codec(folder)
    path = folder / f"video{suffix}"
    height, width = photograph.shape[:2]
    with VideoWriter(path, RATE, codec) as writer:
        for k in range(count):
            phase = 2 * math.pi * k / 100
            scale = SIZE[0] / height * (1.2 + 0.15 * math.sin(phase))
            centre = width * (0.47 + 0.04 * math.cos(phase)), height * (0.4 + 0.03 * math.sin(2 * phase))
            shift = [SIZE[1] / 2 - scale * centre[0], SIZE[0] / 2 - scale * centre[1]]
            matrix = np.array([[scale, 0, shift[0]], [0, scale, shift[1]]])
            writer.write(cv2.warpAffine(photograph, matrix, (SIZE[1], SIZE[0]), flags=cv2.INTER_AREA))
    return path


def make_predictor(quick: bool) -> CheckpointPredictor:
    """Return a model of usual size with random weights."""
    tasks: dict[str, Task] = {
        "au": AUOccurrence([1, 2, 4, 6, 7, 10, 12, 14, 15, 17, 23, 24]),
        "expression": Expression("affectnet8"),
        "valence_arousal": ValenceArousal(),
    }
    torch.manual_seed(0)
    size = 32 if quick else 224
    module = Baseline(tasks, TimmEncoder("test_resnet" if quick else "tf_efficientnet_lite0", image_size=size)).eval()
    return CheckpointPredictor(module, tasks, {"image_size": size, "recipe": CropRecipe(size=size).describe()})


def ours(video: Path, predictor: CheckpointPredictor, finder: FaceFinder, detect_every: int) -> dict[str, Any]:
    """Return what ``affect predict`` takes for a video, without pictures."""
    stages = Stages()
    columns = Columns(predictor, "68", {})
    paths = [video.with_name("predictions.csv"), video.with_name("predictions.parquet")]
    faces = frames = 0
    with PredictionsWriter(paths, columns.schema) as writer:
        options = Options(detect_every=detect_every)
        for rows, _ in stream(VideoFile(video), predictor, finder, options, stages):
            with stages("write"):
                writer.write(columns.table(rows))
            faces, frames = faces + len(rows.seen), frames + len(rows.frames)
    took = time.perf_counter() - stages.start
    return {"frames": frames, "faces": faces, "seconds": took, "stages": stages.seconds}


def mediapipe(video: Path) -> dict[str, Any]:
    """Return what MediaPipe's landmarker takes in its mode for videos.

    Raises:
        ConfigError: If it is not installed.
    """
    bundle = landmarker_bundle()
    try:
        import mediapipe as mp
        from mediapipe.tasks.python import BaseOptions, vision
    except (ImportError, OSError) as error:
        raise ConfigError(f"MediaPipe cannot be imported ({error})") from error
    options = vision.FaceLandmarkerOptions(
        base_options=BaseOptions(model_asset_path=str(bundle)),
        running_mode=vision.RunningMode.VIDEO,
        output_face_blendshapes=True,
        num_faces=1,
    )
    stages, faces, frames = Stages(), 0, 0
    with vision.FaceLandmarker.create_from_options(options) as landmarker:
        stages = Stages()
        for frame in stages.timed(VideoFile(video).frames(), "decode"):
            assert frame.image is not None
            with stages("model"):
                image = mp.Image(image_format=mp.ImageFormat.SRGB, data=frame.image)
                faces += len(landmarker.detect_for_video(image, int(1000 * frame.index / RATE)).face_landmarks)
            frames += 1
        took = time.perf_counter() - stages.start
    return {"frames": frames, "faces": faces, "seconds": took, "stages": stages.seconds}


def _row(what: str, measured: dict[str, Any] | None, note: str = "") -> dict[str, Any]:
    if measured is None:
        return dict.fromkeys(("what", "faces", "faces/s", *(f"{stage}, ms/frame" for stage in STAGES), "note")) | {
            "what": what,
            "note": note,
        }
    took = {name: 1000 * seconds / max(measured["frames"], 1) for name, seconds in measured["stages"].items()}
    return {
        "what": what,
        "faces": measured["faces"],
        "faces/s": measured["faces"] / measured["seconds"],
        **{f"{stage}, ms/frame": took.get(stage) for stage in STAGES},
        "note": note,
    }


def _alone(run: Callable[[np.ndarray], Any], crops: np.ndarray, rounds: int) -> dict[str, Any]:
    run(crops)
    best = math.inf
    for _ in range(rounds):
        start = time.perf_counter()
        run(crops)
        best = min(best, time.perf_counter() - start)
    return {"frames": len(crops), "faces": len(crops), "seconds": best, "stages": {"model": best}}


def model_alone(predictor: CheckpointPredictor, rounds: int) -> list[dict[str, Any]]:
    """Return rows of the model alone, batches of ``BATCH`` crops: torch, ONNX in float and in int8."""
    size = predictor.recipe.size
    crops = np.random.default_rng(0).integers(0, 256, (BATCH, size, size, 3)).astype(np.uint8)
    rows = [_row("model alone: torch float", _alone(predictor.predict, crops, rounds))]
    try:
        from affect.export import nodes_outside, onnx_bytes, quantize
        from affect.foreign.program import ProgramModule

        content = onnx_bytes(predictor.module, size, list(predictor.tasks))  # type: ignore[arg-type]
        planes = np.ascontiguousarray(crops.transpose(0, 3, 1, 2))
        small = quantize(content, [planes], outside=nodes_outside(content))
        for name, each in (("float", content), ("int8", small)):
            program = ProgramModule(each, predictor.tasks, "benchmark", threads=torch.get_num_threads())
            preprocess = {"image_size": size, "recipe": predictor.recipe.describe()}
            other = CheckpointPredictor(program, predictor.tasks, preprocess)
            rows.append(_row(f"model alone: ONNX {name}", _alone(other.predict, crops, rounds)))
    except ConfigError as error:
        rows.append(_row("model alone: ONNX", None, str(error)))
    return rows


def measure(quick: bool) -> list[dict[str, Any]]:
    """Return faces per second end to end and milliseconds per frame of each stage; rounds alternate."""
    count, rounds = (12, 1) if quick else (250, 3)
    predictor, finder = make_predictor(quick), FaceApiFinder()
    with tempfile.TemporaryDirectory() as name:
        video = write_video(Path(name), count)
        runs: dict[str, Callable[[], dict[str, Any]]] = {
            "affect predict, detect_every=10": lambda: ours(video, predictor, finder, 10),
            "affect predict, detect_every=1": lambda: ours(video, predictor, finder, 1),
        }
        notes = dict.fromkeys(runs, "")
        try:
            landmarker = MediapipeFinder(centred=False)
            runs["affect predict, finder=mediapipe"] = lambda: ours(video, predictor, landmarker, 1)
            runs["MediaPipe face landmarker (478 points, 52 blendshapes)"] = lambda: mediapipe(video)
        except ConfigError as error:
            notes["MediaPipe"] = str(error)
        measured = _in_turns(runs, rounds)
        rows = [_row(what, best) for what, best in measured.items()]
        rows += [_row(what, None, note) for what, note in notes.items() if note]
    return rows + model_alone(predictor, 2 if quick else 20)


def _in_turns(runs: dict[str, Callable[[], dict[str, Any]]], rounds: int) -> dict[str, dict[str, Any]]:
    """Return the fastest of some rounds of each, which run in turns so that a busy machine slows all alike."""
    found: dict[str, Sequence[dict[str, Any]]] = {name: [] for name in runs}
    for _ in range(rounds):
        for name, run in runs.items():
            found[name] = [*found[name], run()]
    return {name: min(each, key=lambda one: one["seconds"]) for name, each in found.items()}
