# SPDX-License-Identifier: Apache-2.0
"""The built-in faces as a dataset: a label table without drawing, images on demand, or both as files."""

from __future__ import annotations

import json
from dataclasses import asdict, dataclass
from pathlib import Path

import cv2
import numpy as np
import pyarrow as pa
from tqdm import tqdm

from affect import labels
from affect.data.faces.dials import ACTION_UNITS, EXPRESSIONS, FaceDials
from affect.data.faces.render import render
from affect.data.faces.sample import attributes_of, labels_of, points_of, sample
from affect.data.table import FaceTable
from affect.errors import ConfigError, DataError
from affect.files import replacing

DATASET = "faces"
SKIN_GROUPS = ("light", "medium", "dark")
_CHUNK = 65536


def metadata(dials: FaceDials, seed: int, clean: bool = False) -> dict[str, object]:
    """Return what the table says of itself."""
    return {
        "dataset": DATASET,
        "expressions": list(EXPRESSIONS),
        "label_source": "exact: parameters of the drawn face" if clean else "drawn face, with the dials' label noise",
        "faces": {"seed": seed, "clean": clean, "dials": asdict(dials)},
    }


def labels_table(dials: FaceDials, seed: int, count: int, *, first: int = 0, clean: bool = False) -> pa.Table:
    """Return the labels of faces ``first`` to ``first + count`` without drawing them.

    Args:
        dials: What is drawn and how labels are disturbed.
        seed: Seed of the set; people and rows are functions of it.
        count: Number of rows.
        first: Index of the first row, so that parts of one set share its people.
        clean: True labels: no noise, nothing missing.

    Returns:
        A table with the columns of ``docs/architecture.md``; ``image`` is ``face/<index>``. Additional columns:
        ``gaze_pitch`` and ``gaze_yaw`` (degrees, eyes in the head, signs as for the head), ``skin_group`` (``light``,
        ``medium``, ``dark``). The schema's metadata is what ``FaceTable.from_arrow`` reads.

    Raises:
        ConfigError: If ``count`` or ``first`` is negative.
    """
    if count < 0 or first < 0:
        raise ConfigError(f"faces: count={count}, first={first}: must not be negative")
    pieces = [
        _piece(dials, seed, np.arange(start, min(start + _CHUNK, first + count)), clean)
        for start in range(first, first + max(count, 1), _CHUNK)
    ]
    table = pa.concat_tables(pieces).combine_chunks()
    # The place where ``FaceTable.from_arrow`` looks for it.
    return table.replace_schema_metadata({"affect": json.dumps({"metadata": metadata(dials, seed, clean)})})


def _piece(dials: FaceDials, seed: int, index: np.ndarray, clean: bool) -> pa.Table:
    parameters = sample(dials, seed, index, camera=False)
    written = labels_of(dials, seed, parameters, clean)
    points = points_of(parameters, dials.image_size)
    columns: dict[str, pa.Array] = {}

    def number(values: np.ndarray, hidden: np.ndarray | None = None) -> pa.Array:
        return pa.array(np.ascontiguousarray(values, np.float32), pa.float32(), mask=hidden)

    def numbers(values: np.ndarray, hidden: np.ndarray) -> pa.Array:
        width = int(np.prod(values.shape[1:]))
        flat = pa.array(np.ascontiguousarray(values, np.float32).ravel())
        return pa.FixedSizeListArray.from_arrays(flat, width, mask=pa.array(hidden))

    def text(codes: np.ndarray, names: list[str]) -> pa.Array:
        return pa.array(names, pa.string()).take(pa.array(codes))

    columns["image"] = pa.array([f"face/{k}" for k in index], pa.string())
    people, place = np.unique(parameters["subject"], return_inverse=True)
    width = len(str(dials.subjects - 1))
    columns["subject"] = text(place, [f"subject{k:0{width}d}" for k in people])
    hidden = written["missing_au"]
    for k, au in enumerate(ACTION_UNITS):
        columns[labels.occurrence_column(au)] = number(written["occurrence"][:, k], hidden)
    for k, au in enumerate(ACTION_UNITS):
        columns[labels.intensity_column(au)] = number(written["intensity"][:, k], hidden)
    codes = pa.array(written["expression"], mask=written["missing_expression"])
    columns["expression"] = pa.array(EXPRESSIONS, pa.string()).take(codes)
    for k, axis in enumerate(labels.AFFECT_AXES):
        columns[axis] = number(written["valence_arousal"][:, k], written["missing_valence_arousal"])
    hidden = written["missing_landmarks"]
    for scheme in ("68", "98", "5"):
        columns[labels.SCHEMES[scheme].column] = numbers(points[scheme], hidden)
    columns["box"] = numbers(points["box"], hidden)
    for angle in labels.POSE_ANGLES:
        columns[f"pose_{angle}"] = number(parameters[angle])
    for axis in ("pitch", "yaw"):
        columns[f"gaze_{axis}"] = number(parameters[f"gaze_{axis}"])
    for name, values in attributes_of(parameters).items():
        columns[f"attribute_{name}"] = number(values)
    columns["skin_group"] = text(np.minimum((parameters["skin"] * 3).astype(int), 2), list(SKIN_GROUPS))
    return pa.table(columns)


@dataclass(frozen=True)
class FaceImages:
    """Draws the images of a set on demand; small, picklable, without state.

    Attributes:
        dials: The dials of the set.
        seed: The seed of the set.
    """

    dials: FaceDials
    seed: int

    def read(self, rows: np.ndarray) -> list[np.ndarray]:
        """Return the images of ``rows`` (indices of the set), each RGB uint8 ``(S, S, 3)``."""
        rows = np.asarray(rows, np.int64).reshape(-1)
        parameters = sample(self.dials, self.seed, rows)
        return [render({key: values[k] for key, values in parameters.items()}, self.dials) for k in range(len(rows))]

    def __call__(self, row: int) -> np.ndarray:
        """Return the image of one row."""
        return self.read(np.array([row]))[0]


def write_files(
    dials: FaceDials,
    seed: int,
    count: int,
    root: str | Path,
    *,
    suffix: str = ".png",
    clean: bool = False,
    progress: bool = True,
) -> Path:
    """Write images ``<root>/face/<thousands>/<index><suffix>`` and the table ``<root>/faces.parquet``; return its path.

    Files are written under a temporary name and renamed, so that an interrupted call leaves no half file; the same
    call again draws only what is missing. The table is written last.

    Args:
        dials: What is drawn.
        seed: Seed of the set.
        count: Number of faces.
        root: Folder to write to; made if missing.
        suffix: ``.png`` (exact) or ``.jpg`` (quality 95).
        clean: Write true labels (see ``labels_table``).
        progress: Show a progress bar.

    Raises:
        ConfigError: If the suffix is unknown.
        DataError: If ``root`` holds a set that was drawn otherwise.
    """
    if suffix not in (".png", ".jpg"):
        raise ConfigError(f"faces: suffix={suffix!r}: write .png or .jpg")
    root = Path(root)
    root.mkdir(parents=True, exist_ok=True)
    note = root / "faces.json"
    described = json.dumps({"seed": seed, "suffix": suffix, "dials": asdict(dials)}, indent=1)
    if note.exists() and note.read_text() != described:
        raise DataError(f"{note}: the folder holds faces of another seed, dials or suffix; choose another folder")
    with replacing(note) as draft:
        draft.write_text(described)
    paths = [f"face/{k // 1000:05d}/{k:08d}{suffix}" for k in range(count)]
    for folder in {Path(path).parent for path in paths}:
        (root / folder).mkdir(parents=True, exist_ok=True)
    images = FaceImages(dials, seed)
    settings = [cv2.IMWRITE_JPEG_QUALITY, 95] if suffix == ".jpg" else []
    missing = [k for k in range(count) if not (root / paths[k]).exists()]
    with tqdm(total=count, initial=count - len(missing), desc="faces", unit="face", disable=not progress) as bar:
        for start in range(0, len(missing), 64):
            block = missing[start : start + 64]
            for k, image in zip(block, images.read(np.array(block)), strict=True):
                done, data = cv2.imencode(suffix, image[:, :, ::-1], settings)
                if not done:
                    raise DataError(f"{root / paths[k]}: OpenCV could not encode the image")
                with replacing(root / paths[k]) as draft:
                    draft.write_bytes(data.tobytes())
            bar.update(len(block))
    table = labels_table(dials, seed, count, clean=clean)
    table = table.set_column(0, "image", pa.array(paths, pa.string()))
    target = root / "faces.parquet"
    FaceTable.from_arrow(table, root).to_parquet(target)
    return target
