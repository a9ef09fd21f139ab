# SPDX-License-Identifier: Apache-2.0
"""What an exported file costs in torch, in ONNX float and in int8, and what int8 costs in F1 and CCC, by encoder.

Each encoder gets heads for action units, valence and arousal, fitted by ridge regression on its features of built-in
faces, and is evaluated on others: enough for a score that int8 can lose, in a minute. EfficientNet-Lite0 has the
ImageNet weights that a package ships, where it is installed; the others keep their random weights, with the faces'
batch statistics. So the scores say what int8 changes, and nothing about the encoders.
"""

from __future__ import annotations

import importlib.util
import statistics
import time
from collections.abc import Callable
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from affect import export
from affect.data.batch import FaceBatch
from affect.data.faces import FaceDials
from affect.data.layouts import faces
from affect.encoders import PACKAGED, TimmEncoder
from affect.foreign.program import IMAGE, open_session
from affect.metrics import CCC, F1
from affect.models.baseline import Baseline
from affect.tasks import AUOccurrence, Task, ValenceArousal

ENCODERS = ("resnet50", "tf_efficientnet_lite0", "mobilenetv3_large_100")
QUICK_ENCODERS = ("resnet10t", "tf_efficientnet_lite0", "mobilenetv3_small_050")
PROMISED = 1.5
"""Float over int8 that is aimed at for ResNet-50."""

AUS = (1, 4, 6, 12, 15, 25)
RIDGE = 1e-2
"""Weight of the penalty, as a fraction of the mean variance of a feature."""


def measure(quick: bool) -> list[dict[str, Any]]:
    """Return a row per encoder and file: faces per second, the time of float over its own, bytes, scores, what is lost.

    ``float/this`` is above 1 where the file is faster than ONNX in float. Batches are of 8 faces, timed in turns.
    """
    side, count, batch_size, rounds = (64, 32, 4, 3) if quick else (224, 240, 8, 15)
    data = drawn_faces(side, 2 * count)
    names = QUICK_ENCODERS if quick else ENCODERS
    return [row for name in names for row in _rows(name, data, batch_size, rounds)]


def drawn_faces(side: int, count: int) -> dict[str, Tensor]:
    """Return images of built-in faces and their labels by task; the second half shows other people than the first."""
    dials = FaceDials(image_size=side, subjects=20)
    # More than are used: halves are made of whole people.
    drawn = faces.read(dials, 0, 4 * count)
    people = np.array([int("".join(c for c in name if c.isdigit()) or 0) for name in drawn.strings("subject")[0]])
    first, second = np.flatnonzero(people % 2 == 0)[: count // 2], np.flatnonzero(people % 2 == 1)[: count // 2]
    rows = np.concatenate([first, second])
    images = np.stack(faces.images(dials, 0, 4 * count).read(rows))
    found = {"image": torch.from_numpy(images).permute(0, 3, 1, 2).contiguous()}
    return found | {name: torch.from_numpy(task.encode(drawn, rows).target) for name, task in make_tasks().items()}


def make_tasks() -> dict[str, Task]:
    """Return the tasks that are scored."""
    affect = ValenceArousal(metrics=[CCC()])
    made: dict[str, Task] = {"au": AUOccurrence(aus=AUS, metrics=[F1()]), "valence_arousal": affect}
    for task in made.values():
        for metric in task.metrics:
            metric.bind(task.outputs)
    return made


def fitted(name: str, side: int, data: dict[str, Tensor]) -> Baseline:
    """Return an encoder with heads that were fitted on the first half of the faces."""
    torch.manual_seed(0)
    packaged = name in PACKAGED and importlib.util.find_spec(PACKAGED[name].module) is not None
    encoder = TimmEncoder(name, weights="packaged" if packaged else None, image_size=side)
    module = Baseline(make_tasks(), encoder)
    half = len(data["image"]) // 2
    images = data["image"][:half]
    if not packaged:
        take_statistics(module, images[: min(half, 64)])
    module.eval()
    with torch.inference_mode():
        features = torch.cat([module.encoder(part) for part in images.split(16)]).double()
    for task, layer in module.heads().items():
        target = data[task][:half].double()
        # What the heads should give before their link: logits of ±2, and what tanh makes the label of.
        wanted = 4 * target - 2 if task == "au" else target.clamp(-0.95, 0.95).atanh()
        weight, bias = ridge(features, wanted)
        layer.weight.data.copy_(weight)
        layer.bias.data.copy_(bias)
    return module


def take_statistics(module: nn.Module, images: Tensor) -> None:
    """Set the running statistics of batch norms to those of images."""
    norms = [sub for sub in module.modules() if isinstance(sub, nn.modules.batchnorm._BatchNorm)]
    for norm in norms:
        norm.reset_running_stats()
        norm.momentum = None  # the mean of all batches
    module.train()
    with torch.no_grad():
        for part in images.split(16):
            module.encoder(part)  # type: ignore[operator]


def ridge(features: Tensor, target: Tensor) -> tuple[Tensor, Tensor]:
    """Return weights ``(K, D)`` and biases ``(K,)`` of ridge regression of ``(N, K)`` on ``(N, D)``."""
    mean, centre = features.mean(0), target.mean(0)
    x, y = features - mean, target - centre
    kernel = x @ x.T
    penalty = RIDGE * kernel.diagonal().mean() * len(x) ** 0.5
    weight = (x.T @ torch.linalg.solve(kernel + penalty * torch.eye(len(x), dtype=x.dtype), y)).T
    return weight, centre - weight @ mean


def score(values: dict[str, Tensor], data: dict[str, Tensor]) -> dict[str, float]:
    """Return mean F1 and mean CCC of values of the second half of the faces."""
    half = len(data["image"]) // 2
    found = {}
    for name, task in make_tasks().items():
        metric = task.metrics[0]
        target = data[name][half:]
        metric.update(values[name].cpu(), target, torch.ones_like(target, dtype=torch.bool))
        [key] = [key for key in ("f1/mean", "ccc/mean") if key in metric.compute()]
        found[key] = float(metric.compute()[key])
    return found


def _rows(name: str, data: dict[str, Tensor], batch_size: int, rounds: int) -> list[dict[str, Any]]:
    side, half = data["image"].shape[-1], len(data["image"]) // 2
    module = fitted(name, side, data)
    plain = export.onnx_bytes(module, side, list(module.tasks))
    batches = (part.numpy() for part in data["image"][: min(half, 64)].split(16))
    files = {"float": plain, "int8": export.quantize(plain, batches, outside=export.nodes_outside(plain))}
    scores = {}
    for what, content in files.items():
        parts = [export.program_values(content, module.tasks, part) for part in data["image"][half:].split(60)]
        scores[what] = score({task: torch.cat([part[task] for part in parts]) for task in module.tasks}, data)
    with torch.inference_mode():
        own = [module.predict_step(FaceBatch(part, {}, {})) for part in data["image"][half:].split(16)]
    scores["torch"] = score({task: torch.cat([part[task] for part in own]) for task in module.tasks}, data)
    seconds = in_turns(module, files, data["image"][:batch_size], rounds)
    size = {"torch": sum(tensor.numel() * tensor.element_size() for tensor in module.release_state().values())}
    size |= {what: len(content) for what, content in files.items()}
    return [
        {
            "encoder": name,
            "file": what,
            "side": side,
            "faces/s": batch_size / statistics.median(seconds[what]),
            "float/this": statistics.median(a / b for a, b in zip(seconds["float"], seconds[what], strict=True)),
            "MB": size[what] / 1e6,
            "F1": scores[what]["f1/mean"],
            "F1 lost": scores["torch"]["f1/mean"] - scores[what]["f1/mean"],
            "CCC": scores[what]["ccc/mean"],
            "CCC lost": scores["torch"]["ccc/mean"] - scores[what]["ccc/mean"],
            "processor": " ".join(export.cpu_features()) or "unknown",
        }
        for what in ("torch", "float", "int8")
    ]


def in_turns(module: Baseline, files: dict[str, bytes], image: Tensor, rounds: int) -> dict[str, list[float]]:
    """Return the seconds of every round of torch and of each file, which run in turns, after one that warms up.

    Args:
        module: The model.
        files: ONNX files by name.
        image: A batch.
        rounds: Number of rounds.
    """
    threads = torch.get_num_threads()
    sessions = {name: open_session(content, name, threads) for name, content in files.items()}
    pixels = image.numpy()
    batch = FaceBatch(image=image, targets={}, masks={})

    def in_torch() -> None:
        with torch.inference_mode():
            module.predict_step(batch)

    runs: dict[str, Callable[[], Any]] = {"torch": in_torch}
    runs |= {name: _runner(session, pixels) for name, session in sessions.items()}
    found: dict[str, list[float]] = {name: [] for name in runs}
    for round_ in range(rounds + 1):
        for name, run in runs.items():
            started = time.perf_counter()
            run()
            if round_:
                found[name].append(time.perf_counter() - started)
    return found


def _runner(session: Any, pixels: np.ndarray) -> Callable[[], Any]:  # noqa: ANN401
    return lambda: session.run(None, {IMAGE: pixels})
