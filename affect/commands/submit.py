# SPDX-License-Identifier: Apache-2.0
"""``affect submit``: the file of predictions that a track of the ABAW challenges takes."""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from pathlib import Path

import numpy as np
import pyarrow as pa
import torch
from omegaconf import DictConfig, OmegaConf
from rich.console import Console
from torch.utils.data import DataLoader

from affect import labels
from affect.commands import decisions, inference
from affect.commands.run_folder import RESULTS
from affect.commands.train import quiet
from affect.data.dataset import FaceDataset, collate
from affect.data.images import FileImages, Source
from affect.data.sampling import OrderedSampler
from affect.data.table import FaceTable
from affect.data.transforms import FaceTransform
from affect.errors import ConfigError, DataError
from affect.foreign.opening import build_inference_model
from affect.geometry import CropRecipe
from affect.release import PREPROCESS, build_tasks, read_plain, read_release
from affect.report.submission import (
    FALLBACK,
    TRACKS,
    Filling,
    Frames,
    columns_of,
    decide,
    every_frame,
    fill,
    frames_of,
    read_sample,
    write_submission,
)

_NUMBERED = re.compile(r"([0-9]+)\.(?:jpe?g|png)$", re.IGNORECASE)
_SHOWN = 5


def run(config: DictConfig) -> None:
    """Write the file and print how its lines were answered."""
    quiet()
    console = Console()
    if config.track not in TRACKS:
        raise ConfigError(f"track={config.track}: write one of {', '.join(TRACKS)}")
    if bool(config.predictions) == bool(config.checkpoint):
        raise ConfigError("one of predictions=<table of affect evaluate> and checkpoint=<run> is needed")
    listed = read_sample(config.sample, config.track) if config.sample else None
    if config.predictions:
        table = FaceTable.read_parquet(find_predictions(Path(config.predictions).expanduser()))
    else:
        if listed is None or not config.root:
            raise ConfigError("checkpoint=… predicts the frames of sample=… in root=<folder of Aff-Wild2>: give both")
        table = predict_frames(config, listed[1])
    table = answered(table, config.track)
    predicted = table_frames(table)
    images, frames = listed if listed is not None else every_frame(predicted)
    filling = fill(frames, predicted)
    columns = {name: table.numbers(name)[0] for name in table.names.intersection(columns_of(config.track))}
    thresholds, origin = chosen_thresholds(config)
    answers = decide(config.track, columns, thresholds)
    out = Path(config.out or f"submission_{config.track}.txt").expanduser()
    write_submission(out, config.track, images, filling, answers)
    lines = said(frames, filling, listed is None)
    if "au" in answers:
        lines.append(f"action units are present from {_listed(thresholds)} on: {origin}")
    for line in lines:
        console.print(line, highlight=False, soft_wrap=True)
    console.print(f"[bold]{out}[/bold]: {len(images)} lines behind the header", highlight=False)


def chosen_thresholds(config: DictConfig) -> tuple[float | dict[str, float], str]:
    """Return from which probability action units are present, one number or one by name, and where it comes from.

    Given ones come first, then those that the checkpoint holds, or the run or evaluation in which the predictions lie.

    Raises:
        CheckpointError: If stored ones are damaged.
    """
    given = config.thresholds
    if given is not None:
        return OmegaConf.to_container(given) if OmegaConf.is_dict(given) else given, "thresholds=…"
    if config.checkpoint:
        release = read_release(Path(config.checkpoint).expanduser(), list(config.trust))
        where, holder = release.folder / PREPROCESS, release.preprocess
    else:
        where = find_predictions(Path(config.predictions).expanduser()).parent.parent / RESULTS
        holder = read_plain(where) if where.is_file() else {}
    stored = decisions.read_thresholds(holder, str(where)) if isinstance(holder, Mapping) else None
    names = [labels.au_output(number) for number in labels.AU_SETS["affwild2"]]
    for values in (stored or {}).get("values", {}).values():
        if set(names) <= set(values):
            rule = (stored or {})["rule"]
            return {name: float(values[name]) for name in names}, f"the {rule} ones of {where.parent}"
    return 0.5, f"{where} holds none" if stored is None else f"{where} holds none of these action units"


def _listed(thresholds: float | Mapping[str, float]) -> str:
    if not isinstance(thresholds, Mapping):
        return f"{thresholds:g}"
    if len(set(thresholds.values())) == 1:
        return f"{next(iter(thresholds.values())):g}"
    return ", ".join(f"{name} {value:.3g}" for name, value in thresholds.items())


def find_predictions(path: Path) -> Path:
    """Return a predictions table, or the only one in the ``predictions`` of a run or an evaluation.

    Raises:
        ConfigError: If there are several, or none.
        DataError: If there is no such file.
    """
    if path.is_dir():
        found = sorted(path.glob("predictions/*.parquet")) or sorted(path.glob("*.parquet"))
        if len(found) != 1:
            names = ", ".join(str(file.relative_to(path)) for file in found) or "none"
            raise ConfigError(f"predictions={path}: name one predictions table (there: {names})")
        path = found[0]
    if not path.is_file():
        raise DataError(f"predictions={path}: no such file")
    return path


def answered(table: FaceTable, track: str) -> FaceTable:
    """Return the rows that have every number of the track: ``affect predict`` writes rows for images without a face.

    Raises:
        DataError: If there is none.
    """
    valid = np.ones(len(table), bool)
    for name in table.names.intersection(columns_of(track)):
        valid &= table.numbers(name)[1]
    if not valid.any():
        raise DataError(f"the predictions have no row with all numbers of track={track}")
    return table if valid.all() else table.take(np.flatnonzero(valid))


def table_frames(table: FaceTable) -> Frames:
    """Return the frames of a table: by its columns ``sequence`` and ``frame``, or else by the names of its images."""
    if {"sequence", "frame"} <= table.names and not any(table.column(n).null_count for n in ("sequence", "frame")):
        codes, names = table.codes("sequence")
        frames = table.column("frame").to_numpy(zero_copy_only=False).astype(np.int64)
        return Frames(np.asarray(names, object), codes.astype(np.int64), frames)
    return frames_of(table.column("image"), "predictions, row")


def predict_frames(config: DictConfig, frames: Frames) -> FaceTable:
    """Return the predictions of a checkpoint for those of the frames that have a crop.

    Raises:
        ConfigError: If the model was trained on other crops than those that are delivered.
    """
    release = read_release(Path(config.checkpoint).expanduser(), list(config.trust))
    described = release.preprocess.get("recipe")
    trained = CropRecipe.read(described) if described else None
    if trained is not None and trained.needs != "nothing":
        raise ConfigError(
            f"checkpoint={config.checkpoint} was trained on faces cropped by {trained.name} ({trained.kind}), and the "
            "crops of Aff-Wild2 are taken as they are; prepare the frames that way and give predictions=…"
        )
    size = int(release.preprocess["image_size"])
    root = Path(config.root).expanduser()
    images = crops_of(root, [str(folder) for folder in config.crops], frames)
    table = FaceTable.from_columns({"image": images}, root, {"dataset": "affwild2"})
    recipe = None if trained is None else CropRecipe.read({**described, "size": size})  # type: ignore[dict-item]
    source = Source("affwild2", table, FileImages(table, root), group="image", recipe=recipe)
    tasks = build_tasks(release)
    module = build_inference_model(release, build_tasks(release))
    dataset = FaceDataset([source], [np.arange(len(table))], {}, FaceTransform(size=size))
    loader: DataLoader = DataLoader(
        dataset,
        sampler=OrderedSampler(len(dataset), int(config.data.batch_size)),
        batch_size=None,
        collate_fn=collate,
        num_workers=int(config.data.num_workers),
    )
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    values, _, rows = inference.predict_values(module, loader, device, "predicting frames")
    columns: dict[str, np.ndarray] = {}
    for name, task in tasks.items():
        if task.landmark_scheme is None:
            columns.update(task.decode(values[name]))
    return table.take(rows).with_columns(columns)


def crops_of(root: Path, folders: Sequence[str], frames: Frames) -> pa.Array:
    """Return the paths below ``root`` of the crops of those frames that have one, by video and frame.

    Raises:
        DataError: If no frame has one.
    """
    found: list[str] = []
    for code, video in enumerate(frames.videos.tolist()):
        folder = next((name for name in folders if (root / name / video).is_dir()), None)
        if folder is None:
            continue
        matches = (_NUMBERED.match(path.name) for path in (root / folder / video).iterdir())
        files = {int(match[1]): match[0] for match in matches if match}
        asked = np.sort(frames.numbers[frames.codes == code])
        there = asked[np.isin(asked, np.fromiter(files, np.int64, len(files)))]
        found += [f"{folder}/{video}/{files[number]}" for number in there.tolist()]
    if not found:
        listed = ", ".join(folders)
        raise DataError(f"root={root}: no crop of the {len(frames.videos)} listed videos in its folders {listed}")
    return pa.array(found, pa.string())


def said(frames: Frames, filling: Filling, guessed: bool) -> list[str]:
    """Return sentences on how the lines were answered."""
    unknown = filling.row < 0
    filled = ~unknown & (filling.distance > 0)
    lines = [f"{int((~unknown & ~filled).sum())} of {len(frames.codes)} frames were predicted"]
    if filled.any():
        lines.append(
            f"{int(filled.sum())} frames without a prediction take that of the nearest frame of their video "
            f"(at most {int(filling.distance.max())} frames away)"
        )
    if unknown.any():
        names = frames.videos[np.unique(frames.codes[unknown])].tolist()
        more = f", and {len(names) - _SHOWN} more" if len(names) > _SHOWN else ""
        lines.append(
            f"{len(names)} videos without any prediction ({int(unknown.sum())} frames: {', '.join(names[:_SHOWN])}"
            f"{more}) have {FALLBACK} in every line"
        )
    if filling.unlisted:
        lines.append(f"{filling.unlisted} predicted frames are not listed and left out")
    if guessed:
        lines.append("no sample file: videos are taken to end at their last predicted frame")
    return lines
