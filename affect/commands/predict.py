# SPDX-License-Identifier: Apache-2.0
"""``affect predict``: the faces of photographs and videos, aligned as in training, as a table and as pictures.

Frames pass through in batches: decode → detect or follow → crop → model → rows, pictures. Nothing of a batch is kept
but its rows, which are on disk when the next one is read (those of photographs stay for their face table).
"""

from __future__ import annotations

import itertools
import shlex
from collections.abc import Iterator, Mapping, Sequence
from contextlib import ExitStack
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
from omegaconf import DictConfig, OmegaConf
from rich.console import Console
from tqdm import tqdm

from affect import __version__
from affect.commands import assembly
from affect.commands.evaluate import chosen_adapter
from affect.commands.face_pictures import Pictures, timeline_panels, timelines
from affect.commands.face_rows import Columns, FaceTableParts, Rows, make_rows
from affect.commands.predictor import BOX_MARGIN, Predictor, open_predictor, read_faces
from affect.commands.stages import Interruption, Stages
from affect.commands.train import quiet
from affect.data.video import FrameSource, batches, open_input
from affect.errors import ConfigError, DataError, near
from affect.files import require_writable
from affect.geometry import CropRecipe, FaceFinder
from affect.geometry.tracking import FaceFollower, TrackedFace, find_faces, split_finder
from affect.labels import SCHEMES
from affect.report.figures import save
from affect.report.predictions import PredictionsWriter
from affect.report.provenance import decision_texts
from affect.tasks import Task

ANNOTATED, TIMELINES = "annotated", "timelines"
"""Folders within ``out``; a search for images enters neither."""
FORMATS = ("csv", "parquet")
FACE_TABLE = "face_table.parquet"


# --------------------------------------------------------------------------------------------------- streaming


@dataclass
class Options:
    """How frames are read.

    Attributes:
        batch_size: Frames, and crops, that are read at once.
        detect_every: Frames from one detection to the next in a video.
        limit: Most frames of each source; None takes all.
        tracking: Further arguments of ``FaceFollower``.
    """

    batch_size: int = 32
    detect_every: int = 10
    limit: int | None = None
    tracking: dict[str, Any] = field(default_factory=dict)


@dataclass
class Count:
    """What became of the frames of a source.

    Attributes:
        frames: Frames so far.
        faces: Faces in them.
        empty: Frames without a face.
        unreadable: Frames without pixels.
        detections: Frames in which a detector looked.
        tracks: Different faces; None for photographs.
    """

    frames: int = 0
    faces: int = 0
    empty: int = 0
    unreadable: int = 0
    detections: int = 0
    tracks: int | None = None


def stream(
    source: FrameSource,
    predictor: Predictor,
    finder: FaceFinder,
    options: Options,
    stages: Stages,
    stop: Interruption | None = None,
) -> Iterator[tuple[Rows, Count]]:
    """Yield the rows of a source batch by batch, and what was counted so far.

    Args:
        source: Frames.
        predictor: The model.
        finder: Finds faces.
        options: How frames are read.
        stages: Takes the time of each stage.
        stop: Ends the stream after the frames that were read when it is asked to.
    """
    count = Count()
    follower = FaceFollower(finder, options.detect_every, **options.tracking, clock=stages) if source.moving else None
    wanted = stages.timed(itertools.islice(source.frames(), options.limit), "decode")
    frames = itertools.takewhile(lambda _: stop is None or not stop.asked, wanted)
    for batch in batches(frames, options.batch_size):
        images = [frame.image for frame in batch]
        if follower is not None:
            faces = follower.find(images)
            count.tracks, count.detections = follower.tracks, follower.detections
        else:
            there = [image for image in images if image is not None]
            found = iter(find_faces(finder, there, stages))
            faces = [
                [] if image is None else [TrackedFace(face, -1, detected=True) for face in next(found)]
                for image in images
            ]
            count.detections += len(there)
        pairs = zip(images, faces, strict=True)
        owners = [image for image, found_here in pairs for _ in found_here if image is not None]
        observations = [tracked.observation for found_here in faces for tracked in found_here]
        read = read_faces(predictor, owners, observations, options.batch_size, stages)
        rows = make_rows(batch, faces, read)
        count.frames += len(batch)
        count.faces += len(rows.seen)
        count.unreadable += sum(image is None for image in images)
        count.empty += int((rows.face < 0).sum()) - sum(image is None for image in images)
        yield rows, count


# -------------------------------------------------------------------------------------------------- the command


def run(config: DictConfig) -> None:
    """Write ``predictions.csv``, ``predictions.parquet`` and annotated copies of ``input`` to ``out``.

    Raises:
        ConfigError: If a setting is none.
        DataError: If there is nothing to read, or no face is found in any photograph.
        KeyboardInterrupt: After Ctrl-C, when the table of the frames that were read is written.
    """
    quiet()
    console = Console()
    out = Path(config.out).expanduser()
    formats = check_formats(config.formats)
    options = read_options(config)
    sources = open_input(config.input, [out / ANNOTATED, out / TIMELINES])
    predictor = open_predictor(str(config.checkpoint), list(config.trust), chosen_adapter(config))
    finder = assembly.make(config.finder, "finder")
    require_points(predictor.recipe, finder)
    require_writable(out)
    moving = any(source.moving for source in sources)
    if predictor.delivered:
        by_box = f"each face's box with a margin of {BOX_MARGIN:.0%} is cropped"
        cut = "new ones are cut so that points lie as in these" if predictor.typical else by_box
        console.print(f"trained on delivered crops: {cut}")
    if moving and options.detect_every > 1 and split_finder(finder) is None:
        console.print(f"{type(finder).__name__} finds boxes and points in one step: it looks at every frame")
    metadata = describe(config, predictor, finder)
    columns = Columns(predictor, points_scheme(finder), metadata)
    stages = Stages()
    counts: dict[str, Count] = {}
    face_table = FaceTableParts(predictor.tasks)
    notes: list[str] = []
    with Interruption() as stop:
        with ExitStack() as stack:
            paths = [out / f"predictions.{name}" for name in formats]
            writer = stack.enter_context(PredictionsWriter(paths, columns.schema))
            copies = Pictures(out / ANNOTATED, predictor.tasks)
            pictures = stack.enter_context(copies) if config.annotate else None
            for source in sources:
                if stop.asked:
                    break
                counts[source.name] = Count()
                try:
                    counts[source.name] = _predict_source(
                        source, predictor, finder, options, stages, stop, columns, writer, pictures, face_table
                    )
                except DataError as error:
                    if len(sources) == 1:
                        raise
                    notes.append(str(error))
                notes += source.notes()
            if not moving and not any(count.faces for count in counts.values()):
                raise DataError(
                    f"input={config.input}: no face found in {_total(counts)} image(s); nothing was predicted"
                )
        _report(console, config, sources, counts, notes, stages, columns, predictor.thresholds, out, formats)
        _write_more(console, config, sources, predictor, columns, face_table, out, formats)
        if stop.asked:
            console.print("[bold]interrupted[/bold]: the tables hold the frames that were read until then")
            raise KeyboardInterrupt


def _predict_source(
    source: FrameSource,
    predictor: Predictor,
    finder: FaceFinder,
    options: Options,
    stages: Stages,
    stop: Interruption,
    columns: Columns,
    writer: PredictionsWriter,
    pictures: Pictures | None,
    face_table: FaceTableParts,
) -> Count:
    count = Count()
    if pictures is not None:
        pictures.start(source)
    length = source.length if options.limit is None else min(options.limit, source.length or options.limit)
    unit = "frame" if source.moving else "image"
    with tqdm(total=length, unit=unit, desc=source.name[-40:], disable=length == 1) as progress:
        for rows, count in stream(source, predictor, finder, options, stages, stop):  # noqa: B007 - the last one counts
            with stages("write"):
                writer.write(columns.table(rows, source.name if source.moving else None))
                if not source.moving:
                    face_table.add(rows)
            if pictures is not None:
                with stages("draw"):
                    pictures.add(rows)
            progress.update(len(rows.frames))
    return count


def check_formats(formats: Any) -> list[str]:  # noqa: ANN401
    """Return the endings of the tables to write.

    Raises:
        ConfigError: If there is none, or an unknown one.
    """
    names = [formats] if isinstance(formats, str) else [str(name) for name in formats or ()]
    for name in names:
        if name not in FORMATS:
            raise ConfigError(f"formats={name}: {near(name, FORMATS)}")
    if not names:
        raise ConfigError("formats=[]: write csv, parquet or both, e.g. formats=[csv,parquet]")
    return names


def read_options(config: DictConfig) -> Options:
    """Return how frames are read.

    Raises:
        ConfigError: If a number is none.
    """
    for key in ("batch_size", "limit"):
        value = config[key]
        whole = isinstance(value, int) and not isinstance(value, bool)
        if not (value is None and key == "limit") and (not whole or value < 1):
            raise ConfigError(f"{key}={value}: give a whole number, at least 1")
    tracking: Any = OmegaConf.to_container(config.tracking)
    return Options(int(config.batch_size), config.detect_every, config.limit, tracking)


def points_scheme(finder: FaceFinder) -> str:
    """Return the scheme of a finder's points."""
    stages = split_finder(finder)
    return str(getattr(finder if stages is None else stages[1], "scheme", "68"))


def require_points(recipe: CropRecipe, finder: FaceFinder) -> None:
    """Refuse a finder whose points cannot align the crops of a checkpoint, before any frame is read.

    Raises:
        ConfigError: If there are too few of them.
    """
    scheme = points_scheme(finder)
    if recipe.needs != "landmarks" or scheme not in SCHEMES:
        return
    count = SCHEMES[scheme].points
    try:
        recipe.usable(points=np.zeros((1, count, 2)))
    except DataError as error:
        raise ConfigError(
            f"finder: it gives {count} points of a face, and the checkpoint's crops are aligned by {recipe.points}, "
            "which cannot be had from them; take a finder of 68 points, e.g. finder=faceapi"
        ) from error


def describe(config: DictConfig, predictor: Predictor, finder: FaceFinder) -> dict[str, Any]:
    """Return what a table of predictions says of itself."""
    return {
        "format": "affect predictions 1",
        "affect": __version__,
        "checkpoint": str(config.checkpoint),
        "input": str(config.input),
        "finder": type(finder).__name__,
        "detect_every": int(config.detect_every),
        "recipe": predictor.recipe.describe(),
        "thresholds": predictor.thresholds,
        "outputs": {name: list(task.outputs) for name, task in predictor.tasks.items()},
    }


def _total(counts: Mapping[str, Count]) -> int:
    return sum(count.frames for count in counts.values())


def _report(
    console: Console,
    config: DictConfig,
    sources: Sequence[FrameSource],
    counts: Mapping[str, Count],
    notes: Sequence[str],
    stages: Stages,
    columns: Columns,
    thresholds: Mapping[str, Any] | None,
    out: Path,
    formats: Sequence[str],
) -> None:
    """Print what was found, how fast, and where it is."""
    videos = [counts[source.name] for source in sources if source.moving and source.name in counts]
    total, faces = _total(counts), sum(count.faces for count in counts.values())
    filmed = sum(count.frames for count in videos)
    unit = "image" if not filmed else "frame" if filmed == total else "picture"
    for reason, number in (
        ("no face found", sum(count.empty for count in counts.values())),
        (f"unreadable {unit}", sum(count.unreadable for count in counts.values())),
    ):
        if number:
            console.print(f"{reason}: {number} of {total} {unit}s")
    for line in notes:
        console.print(line, markup=False, soft_wrap=True)
    tracks = sum(count.tracks or 0 for count in videos)
    several = f", {tracks} different" if filmed else ""
    if filmed:
        looked = sum(count.detections for count in videos)
        readable = filmed - sum(count.unreadable for count in videos)
        followed = f", followed them in {readable - looked}" if readable > looked else ""
        console.print(f"looked for faces in {looked} of {filmed} frames{followed}", highlight=False)
    if total > 1:
        console.print(stages.describe(total, unit), highlight=False)
    shown = out / f"predictions.{formats[0]}"
    console.print(f"{faces} face(s){several} in {total} {unit}(s): [bold]{shown}[/bold]", soft_wrap=True)
    if config.annotate and total:
        console.print(f"annotated copies: [bold]{out / ANNOTATED}[/bold]", soft_wrap=True)
    decided = any(name.endswith("_c") for name in columns.schema.names)
    if decided:
        said = decision_texts({"thresholds": thresholds})
        text = said[0] if said else "at 0.5, as the checkpoint stores no thresholds"
        console.print(f"decisions (…_c): {text}", highlight=False, markup=False)


def _write_more(
    console: Console,
    config: DictConfig,
    sources: Sequence[FrameSource],
    predictor: Predictor,
    columns: Columns,
    face_table: FaceTableParts,
    out: Path,
    formats: Sequence[str],
) -> None:
    """Write the face table of photographs and the timelines of videos, and say where they are."""
    photographs = [source for source in sources if not source.moving]
    if photographs and face_table:
        table = face_table.table(photographs[0].root, str(config.input))
        table.to_parquet(out / FACE_TABLE)
        command = training_command(out / FACE_TABLE, predictor.recipe, predictor.tasks)
        console.print(f"train on it: {command}", markup=False, soft_wrap=True)
    if not config.timeline:
        return
    if any(source.moving for source in sources) and "parquet" not in formats:
        console.print("timelines are drawn from the Parquet table: add parquet to formats")
        return
    panels = timeline_panels(predictor.tasks, columns.by_task)
    drawn = 0
    for source in sources:
        for track, figure in timelines(out / "predictions.parquet", source.name, panels) if source.moving else ():
            save(figure, out / TIMELINES / f"{source.name}.face{track}.png")
            drawn += 1
    if drawn:
        console.print(f"timelines: [bold]{out / TIMELINES}[/bold]", soft_wrap=True)


def training_command(table: Path, recipe: CropRecipe, tasks: Mapping[str, Task]) -> str:
    """Return the command that trains on a face table of predictions, with the crop and the tasks of its model."""
    names = ",".join(tasks)
    return f"affect train dataset=table dataset.table={shlex.quote(str(table))} prepare={recipe.kind} task=[{names}]"
