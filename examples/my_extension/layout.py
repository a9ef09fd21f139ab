# SPDX-License-Identifier: Apache-2.0
"""Pain faces: frames of videos in which coders rated pain from 0 to 16; an invented dataset with usual habits.

Layout on disk::

    pain_faces/
    ├── frames.txt                 one line per frame, cells separated by semicolons
    └── images/
        └── s003/t1/0007.png       person s003, trial t1, frame 7

    file;person;trial;frame;pain;left_eye_x;left_eye_y; … ;right_mouth_y
    s003/t1/0007.png;s003;t1;7;4;41.5;52.25; … ;80.0

``pain`` is a whole number, -1 or empty where the coders could not see the face. The five points (eyes, nose tip, mouth
corners; left and right as in the image) are pixels counted from 1; where the tracker lost the face they are all zero.
"""

from __future__ import annotations

from pathlib import Path

import cv2
import numpy as np
import pyarrow as pa
import pyarrow.csv as pa_csv

from affect.data.images import FileImages, ImageReader
from affect.data.table import FaceTable
from affect.errors import DataError

FILE, IMAGES = "frames.txt", "images"
POINTS = tuple(
    f"{part}_{axis}" for part in ("left_eye", "right_eye", "nose", "left_mouth", "right_mouth") for axis in "xy"
)
TYPES = {
    **dict.fromkeys(("file", "person", "trial"), pa.string()),
    **dict.fromkeys(("frame", "pain"), pa.int32()),
    **dict.fromkeys(POINTS, pa.float64()),
}
NOT_CODED = -1
LOST = "the tracker lost the face"


def read(root: str | Path) -> FaceTable:
    """Return the face table of the dataset in ``root``, with the columns ``pain`` and ``landmarks_5``.

    Frames without points are left out and counted. Pain that was not coded is null.

    Raises:
        DataError: If the text file or an image is missing, or a cell is not what its column holds.
    """
    root = Path(root).expanduser()
    lines = _read_lines(root / FILE)
    points = np.stack([lines[name].fill_null(0).to_numpy() for name in POINTS], 1)
    tracked = points.any(1)
    lines, points = lines.filter(pa.array(tracked)), points[tracked]
    pain = lines["pain"].fill_null(NOT_CODED).to_numpy()
    table = FaceTable.from_columns(
        {
            "image": pa.array([f"{IMAGES}/{name}" for name in lines["file"].to_pylist()]),
            "subject": lines["person"],
            "sequence": lines["trial"],
            "frame": lines["frame"],
            "pain": (pain.astype(np.float32), pain != NOT_CODED),
            "landmarks_5": (points - 1).astype(np.float32),
        },
        root,
        {"dataset": "pain_faces", "label_source": "coders", "skipped": {LOST: int((~tracked).sum())}},
    )
    FileImages(table).require_files()
    return table


def _read_lines(path: Path) -> pa.Table:
    if not path.is_file():
        raise DataError(f"{path}: no such file; dataset.root is the folder that holds {FILE} and {IMAGES}/")
    convert = pa_csv.ConvertOptions(column_types=TYPES, include_columns=list(TYPES))
    read_options = pa_csv.ReadOptions(use_threads=False)  # only then does an error name its line
    try:
        return pa_csv.read_csv(path, read_options, pa_csv.ParseOptions(delimiter=";"), convert).combine_chunks()
    except (pa.ArrowInvalid, pa.ArrowKeyError) as error:
        raise DataError(f"{path}: {str(error).splitlines()[0]}") from error


def write(table: FaceTable, root: str | Path, images: ImageReader | None = None) -> None:
    """Write a face table as the dataset in ``root``, so that ``read`` gives it back.

    Args:
        table: Columns ``subject``, ``sequence``, ``frame``, ``pain`` and ``landmarks_5``.
        root: Folder of the dataset; it is made if it does not exist.
        images: Reader of the table's images, which are written as PNG; None writes the text file only.
    """
    root = Path(root)
    person, trial = table.strings("subject")[0], table.strings("sequence")[0]
    frame = table.numbers("frame")[0].astype(int)
    files = [f"{s}/{t}/{k:04d}.png" for s, t, k in zip(person, trial, frame, strict=True)]
    pain, coded = table.numbers("pain")
    points, tracked = table.numbers("landmarks_5")
    cells = np.where(tracked[:, None], points.astype(np.float64).round(4) + 1, 0)
    columns = [files, person, trial, frame, np.where(coded, pain, NOT_CODED), *cells.T]
    arrays = [pa.array(column).cast(kind) for column, kind in zip(columns, TYPES.values(), strict=True)]
    root.mkdir(parents=True, exist_ok=True)
    options = pa_csv.WriteOptions(include_header=False, delimiter=";", quoting_style="none")
    with (root / FILE).open("wb") as file:
        file.write((";".join(TYPES) + "\n").encode())
        pa_csv.write_csv(pa.table(arrays, list(TYPES)), file, options)
    for row, name in enumerate(files if images is not None else ()):
        path = root / IMAGES / name
        path.parent.mkdir(parents=True, exist_ok=True)
        cv2.imwrite(str(path), cv2.cvtColor(images.read(np.array([row]))[0], cv2.COLOR_RGB2BGR))
