# SPDX-License-Identifier: Apache-2.0
"""Videos in, one row per face and frame out: streamed, in memory that does not grow, whole after Ctrl-C."""

from __future__ import annotations

import itertools
import signal
import tracemalloc
import weakref
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any, ClassVar

import cv2
import numpy as np
import pyarrow as pa
import pyarrow.csv as pa_csv
import pyarrow.parquet as pq
import pytest
from omegaconf import DictConfig

from affect.commands import predict
from affect.commands.face_pictures import Pictures
from affect.commands.face_rows import Columns
from affect.commands.predict import Options, stream
from affect.commands.stages import Stages
from affect.data.video import Frame, VideoFile
from affect.errors import ConfigError, DataError
from affect.geometry import CropRecipe, Detection, FaceApiFinder, TwoStageFinder
from affect.geometry.templates import FACE_68
from affect.geometry.tracking import FaceFollower
from affect.report.predictions import PredictionsWriter
from affect.tasks import AUIntensity, AUOccurrence, Expression, HeadPose, Landmarks, Task, ValenceArousal
from examples.my_extension.task import PainLevel

data = pytest.importorskip("skimage.data")

SIZE = (120, 160)
FACES, BLANK = 14, 4


class Reader:
    """A predictor whose values are functions of the crop's mean brightness."""

    delivered = False
    thresholds = None
    recipe = CropRecipe(size=24)
    typical: ClassVar[dict] = {}

    def __init__(self) -> None:
        self.tasks: dict[str, Task] = {
            "au": AUOccurrence([1, 12]),
            "au_intensity": AUIntensity([12]),
            "expression": Expression(["neutral", "happiness"]),
            "affect": ValenceArousal(),
            "pose": HeadPose(),
            "points": Landmarks("68"),
        }

    def predict(self, crops: np.ndarray) -> dict[str, np.ndarray]:
        assert crops.dtype == np.uint8
        mean = crops.reshape(len(crops), -1).mean(1).astype(np.float32) / 255
        one = mean[:, None]
        return {
            "au": np.concatenate([one, 1 - one], 1),
            "au_intensity": 5 * one,
            "expression": np.concatenate([one, 1 - one], 1),
            "affect": np.concatenate([one, -one], 1),
            "pose": np.zeros((len(crops), 3), np.float32),
            "points": np.full((len(crops), 68, 2), 0.5, np.float32),
        }


class Detector:
    """Sees one face in the middle of everything that is not dark."""

    def detect(self, image: np.ndarray) -> list[Detection]:
        height, width = image.shape[:2]
        box = np.array([0.25 * width, 0.25 * height, 0.75 * width, 0.75 * height])
        return [Detection(box, 0.8)] if image.max() > 60 else []


class Provider:
    scheme = "68"

    def landmarks(self, image: np.ndarray, boxes: np.ndarray) -> np.ndarray:
        return boxes[:, None, :2] + FACE_68 * (boxes[:, 2:] - boxes[:, :2])[:, None]


class Film:
    """Noise that is drawn when it is asked for; it knows how many of its frames are alive."""

    name, root, moving, rate = "film", Path(), True, 25.0

    def __init__(self, length: int, interrupt: int | None = None) -> None:
        self.length: int | None = length
        self.interrupt = interrupt
        self.alive: weakref.WeakSet = weakref.WeakSet()
        self.most = 0

    def frames(self) -> Iterator[Frame]:
        picture = np.random.default_rng(0).integers(0, 255, (64, 64, 3)).astype(np.uint8)
        for k in range(self.length or 0):
            if k == self.interrupt:
                signal.raise_signal(signal.SIGINT)
            frame = Frame(k, k / 25, picture.copy(), "film")
            self.alive.add(frame)
            self.most = max(self.most, len(self.alive))
            yield frame
            del frame

    def notes(self) -> list[str]:
        return []


@pytest.fixture
def parts(monkeypatch: pytest.MonkeyPatch) -> None:
    """Let the command use the reader and the finder of this file."""
    monkeypatch.setattr(predict, "open_predictor", lambda *_: Reader())
    monkeypatch.setattr(predict.assembly, "make", lambda *_: TwoStageFinder(Detector(), Provider()))


@pytest.fixture(scope="module")
def film(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A face that moves to the right, then nothing, then the face again."""
    path = tmp_path_factory.mktemp("film") / "a film.mp4"
    photograph = cv2.resize(np.ascontiguousarray(data.astronaut()[0:256, 80:400]), (SIZE[1] + 60, SIZE[0] + 40))
    writer = cv2.VideoWriter(str(path), cv2.VideoWriter_fourcc(*"mp4v"), 20.0, (SIZE[1], SIZE[0]))
    for k in range(2 * FACES + BLANK):
        x = min(k, FACES + 6) * 2
        blank = FACES <= k < FACES + BLANK
        image = np.full((*SIZE, 3), 30, np.uint8) if blank else photograph[20 : 20 + SIZE[0], 50 - x : 50 - x + SIZE[1]]
        writer.write(np.ascontiguousarray(image[..., ::-1]))
    writer.release()
    return path


def columns() -> Columns:
    return Columns(Reader(), "68", {})


# ------------------------------------------------------------------------------------------------- end to end


def test_a_video_gives_a_row_per_face_and_frame_a_copy_and_a_timeline(
    compose: Callable[..., DictConfig],
    film: Path,
    tmp_path: Path,
    capsys: pytest.CaptureFixture,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(predict, "open_predictor", lambda *_: Reader())
    monkeypatch.setattr(predict.assembly, "make", lambda *_: FaceApiFinder(sizes=(128, 160), agreement=1))
    predict.run(
        compose("predict", "checkpoint=x", f"input={film}", f"out={tmp_path}", "detect_every=5", "batch_size=8")
    )
    table = pq.read_table(tmp_path / "predictions.parquet").to_pydict()
    count = 2 * FACES + BLANK
    blank = [FACES <= k < FACES + BLANK for k in range(count)]
    assert table["frame"] == list(range(count))
    assert table["timestamp"] == pytest.approx([k / 20 for k in range(count)])
    assert table["success"] == [int(not empty) for empty in blank]
    assert table["track"] == [None if empty else 0 for empty in blank], "it is the same face when it comes back"
    assert table["face"] == table["track"]
    assert set(table["input"]) == {"a film.mp4"}
    scored = [score is not None for score in table["FaceScore"]]
    assert scored == [k in {0, 5, 10, 18, 20, 25, 30} for k in range(count)], "followed faces have no score"
    boxes = zip(table["FaceRectX"], table["FaceRectWidth"], strict=True)
    middle = [x + width / 2 for x, width in boxes if x is not None]
    # The picture moves 2 px a frame to the right, until it stands still.
    assert middle[12] - middle[0] == pytest.approx(24, abs=4)
    assert max(abs(b - a) for a, b in itertools.pairwise(middle[:FACES])) < 8
    for name in ("AU01", "AU12_r", "happiness", "valence", "Pitch", "x_0"):
        assert [value is None for value in table[name]] == blank, name
    assert {value for value in table["AU12_c"] if value is not None} <= {0, 1}

    printed = capsys.readouterr().out
    assert f"no face found: {BLANK} of {count} frames" in printed
    assert f"{2 * FACES} face(s), 1 different in {count} frame(s)" in printed
    assert "by stage alone: decode" in printed
    copy = VideoFile(tmp_path / "annotated" / "a film.mp4.webm")
    assert copy.length == count
    assert copy.rate == pytest.approx(20)
    shape = next(frame for frame in copy.frames() if frame.image is not None).image.shape
    assert shape[0] >= SIZE[0]
    assert shape[1] > SIZE[1] * shape[0] / SIZE[0], "values stand beside the picture"
    figure = cv2.imread(str(tmp_path / "timelines" / "a film.mp4.face0.png"))
    assert figure is not None
    assert figure.shape[1] == 1280
    assert not (tmp_path / "face_table.parquet").exists()


@pytest.mark.usefixtures("parts")
def test_a_folder_of_videos_and_photographs_is_one_table(
    compose: Callable[..., DictConfig], film: Path, tmp_path: Path, capsys: pytest.CaptureFixture
) -> None:
    folder = tmp_path / "in"
    folder.mkdir()
    for name in ("a.mp4", "b.mp4"):
        (folder / name).write_bytes(film.read_bytes())
    (folder / "c.mp4").write_bytes(b"broken")
    cv2.imwrite(str(folder / "d.png"), np.full((64, 64, 3), 200, np.uint8))
    settings = ("formats=[parquet]", "annotate=false", "timeline=false", "limit=6")
    predict.run(compose("predict", "checkpoint=x", f"input={folder}", f"out={tmp_path / 'out'}", *settings))
    table = pq.read_table(tmp_path / "out" / "predictions.parquet").to_pydict()
    assert table["input"] == ["d.png"] + ["a.mp4"] * 6 + ["b.mp4"] * 6
    assert table["track"] == [None] + [0] * 12
    assert (table["timestamp"][0], table["timestamp"][1]) == (None, 0.0)
    assert sorted(path.name for path in (tmp_path / "out").iterdir()) == ["face_table.parquet", "predictions.parquet"]
    printed = " ".join(capsys.readouterr().out.split())
    assert "c.mp4: not a readable video (6 bytes)" in printed
    assert "looked for faces in 2 of 12 frames, followed them in 10" in printed
    assert "13 face(s), 2 different in 13 picture(s)" in printed
    # A video alone that cannot be read is no frame of anything.
    (folder / "a.mp4").unlink()
    (folder / "b.mp4").unlink()
    (folder / "e.png").write_bytes(b"broken")
    predict.run(compose("predict", "checkpoint=x", f"input={folder}", f"out={tmp_path / 'few'}", *settings))
    printed = " ".join(capsys.readouterr().out.split())
    assert "unreadable image: 1 of 2 images" in printed
    assert "1 face(s) in 2 image(s)" in printed
    assert "looked for faces" not in printed
    with pytest.raises(DataError, match=r"c\.mp4: not a readable video"):
        predict.run(compose("predict", "checkpoint=x", f"input={folder / 'c.mp4'}", f"out={tmp_path / 'alone'}"))
    assert [path for path in (tmp_path / "alone").rglob("*") if path.is_file()] == []


@pytest.mark.usefixtures("parts")
def test_a_video_without_faces_is_a_table_of_its_frames(compose: Callable[..., DictConfig], tmp_path: Path) -> None:
    writer = cv2.VideoWriter(str(tmp_path / "dark.avi"), cv2.VideoWriter_fourcc(*"MJPG"), 25.0, (64, 48))
    for _ in range(5):
        writer.write(np.zeros((48, 64, 3), np.uint8))
    writer.release()
    predict.run(compose("predict", "checkpoint=x", f"input={tmp_path / 'dark.avi'}", f"out={tmp_path / 'out'}"))
    table = pq.read_table(tmp_path / "out" / "predictions.parquet")
    assert table["success"].to_pylist() == [0] * 5
    assert table["AU12"].null_count == 5
    assert not (tmp_path / "out" / "timelines").exists()


# --------------------------------------------------------------------------------------------------- streaming


def streamed(length: int, path: Path) -> tuple[Film, int]:
    """Return the film after it was read and written, and the most bytes that Arrow held at the end of a batch."""
    source, sink, most = Film(length), columns(), 0
    finder = TwoStageFinder(Detector(), Provider())
    with PredictionsWriter([path / "a.csv", path / "a.parquet"], sink.schema) as writer:
        for rows, _ in stream(source, Reader(), finder, Options(batch_size=16), Stages()):
            writer.write(sink.table(rows, "film"))
            most = max(most, pa.total_allocated_bytes())
    return source, most


def test_no_frame_is_kept_beyond_its_batch(tmp_path: Path) -> None:
    _, few = streamed(32, tmp_path)
    film, many = streamed(128, tmp_path)
    assert film.most <= 2 * 16 + 1
    assert many < 1.5 * few + 2**18
    assert pq.read_metadata(tmp_path / "a.parquet").num_rows == 128
    assert pa_csv.read_csv(tmp_path / "a.csv").num_rows == 128


@pytest.mark.slow
def test_memory_does_not_grow_with_the_video(tmp_path: Path) -> None:
    streamed(32, tmp_path)  # what is allocated once
    peaks = []
    for length in (80, 400):
        tracemalloc.start()
        streamed(length, tmp_path)
        peaks.append(tracemalloc.get_traced_memory()[1])
        tracemalloc.stop()
    assert peaks[1] < 1.25 * peaks[0]


@pytest.mark.usefixtures("parts")
def test_an_interrupted_run_leaves_the_frames_that_were_read(
    compose: Callable[..., DictConfig], tmp_path: Path, capsys: pytest.CaptureFixture, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(predict, "open_input", lambda *_: [Film(80, interrupt=21), Film(5)])
    before = signal.getsignal(signal.SIGINT)
    settings = compose("predict", "checkpoint=x", "input=film", f"out={tmp_path}", "batch_size=8")
    with pytest.raises(KeyboardInterrupt):
        predict.run(settings)
    assert signal.getsignal(signal.SIGINT) is before
    frames = pq.read_table(tmp_path / "predictions.parquet")["frame"].to_pylist()
    assert frames == list(range(21))
    assert pa_csv.read_csv(tmp_path / "predictions.csv")["frame"].to_pylist() == frames
    assert VideoFile(tmp_path / "annotated" / "film.webm").length == 21
    assert "interrupted: the tables hold the frames that were read until then" in capsys.readouterr().out


@pytest.mark.usefixtures("parts")
def test_an_error_leaves_no_part_of_a_table(
    compose: Callable[..., DictConfig], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    class Broken(Film):
        def frames(self) -> Iterator[Frame]:
            yield from super().frames()
            raise RuntimeError("the disk is gone")

    monkeypatch.setattr(predict, "open_input", lambda *_: [Broken(12)])
    with pytest.raises(RuntimeError, match="disk"):
        predict.run(compose("predict", "checkpoint=x", "input=film", f"out={tmp_path}", "batch_size=8"))
    assert [path for path in tmp_path.rglob("*") if path.is_file()] == []


def test_faces_do_not_depend_on_the_batch() -> None:
    tables = []
    for size in (1, 5, 32):
        sink = columns()
        finder = TwoStageFinder(Detector(), Provider())
        parts = [sink.table(r) for r, _ in stream(Film(20), Reader(), finder, Options(batch_size=size), Stages())]
        tables.append([row for part in parts for row in part.to_pylist()])
    for table in tables[1:]:
        for a, b in zip(tables[0], table, strict=True):
            words = {name for name, cell in a.items() if not isinstance(cell, float)}
            assert {name: a[name] for name in words} == {name: b[name] for name in words}
            assert [a[n] for n in a.keys() - words] == pytest.approx([b[n] for n in a.keys() - words], abs=1e-5)


# ------------------------------------------------------------------------------------------------------ columns


def test_points_of_the_model_take_the_place_of_the_finders() -> None:
    sink = columns()
    [(rows, _)] = list(stream(Film(2), Reader(), TwoStageFinder(Detector(), Provider()), Options(), Stages()))
    table = sink.table(rows).to_pydict()
    # The model says the middle of its crop, wherever the finder saw the points.
    matrix = Reader.recipe.matrix(landmarks=rows.observations[0].points)
    centre = np.linalg.solve(matrix[:, :2], np.full(2, 0.5 * 24 - 0.5) - matrix[:, 2])
    assert [table["x_7"][0], table["y_7"][0]] == pytest.approx(centre.tolist(), abs=1e-3)
    assert "landmarks_68_x_0" not in table


def test_a_task_from_outside_keeps_its_own_columns() -> None:
    reader = Reader()
    pain = PainLevel((1, 6))
    reader.tasks = {"pain": pain}
    names = Columns(reader, "68", {}).schema.names
    own = list(pain.decode(np.zeros((1, pain.num_outputs), np.float32)))
    assert "pain_at_least_6" in own
    assert names[-len(own) - 1 :] == [*own, "input"]


def test_two_outputs_of_one_name_are_refused() -> None:
    reader = Reader()
    reader.tasks = {"a": Expression(["neutral", "valence"]), "b": ValenceArousal()}
    with pytest.raises(ConfigError, match="column valence"):
        Columns(reader, "68", {})


@pytest.mark.parametrize(
    ("override", "message"),
    [
        ("formats=[xlsx]", "formats=xlsx"),
        ("formats=[]", "formats="),
        ("batch_size=0", "batch_size=0"),
        ("limit=0", "limit"),
        ("limit=true", "limit=True: give a whole number"),
    ],
)
def test_settings_that_make_no_sense_are_refused(
    compose: Callable[..., DictConfig], film: Path, tmp_path: Path, override: str, message: str
) -> None:
    with pytest.raises(ConfigError, match=message):
        predict.run(compose("predict", "checkpoint=x", f"input={film}", f"out={tmp_path}", override))


@pytest.mark.parametrize("override", ["likeness=high", "likeness=2", "overlap=wide", "patience=long"])
def test_numbers_of_a_follower_are_checked(override: str) -> None:
    name, _, text = override.partition("=")
    value: Any = float(text) if text.isdecimal() else text
    with pytest.raises(ConfigError, match=rf"tracking\.{name}=.*: give a"):
        FaceFollower(TwoStageFinder(Detector(), Provider()), **{name: value})


def test_the_copy_of_a_camera_has_the_rate_that_it_tells_with_its_first_frame(tmp_path: Path) -> None:
    """Nobody knows it before: a camera is opened when its frames are asked for."""

    class Opening(Film):
        rate: Any = None

        def frames(self) -> Iterator[Frame]:
            self.rate = 12.0
            yield from super().frames()

    camera = Opening(3)
    finder = TwoStageFinder(Detector(), Provider())
    with Pictures(tmp_path, Reader().tasks) as pictures:
        pictures.start(camera)
        for rows, _ in stream(camera, Reader(), finder, Options(batch_size=2), Stages()):
            pictures.add(rows)
    (copy,) = tmp_path.iterdir()
    assert cv2.VideoCapture(str(copy)).get(cv2.CAP_PROP_FPS) == pytest.approx(12.0, abs=0.1)


def test_a_place_that_cannot_be_written_to_is_named_before_anything_is_read(
    parts: None, compose: Callable[..., DictConfig], film: Path, tmp_path: Path
) -> None:
    (tmp_path / "file").touch()
    for out in (tmp_path / "file", tmp_path / "file" / "below", Path("/proc/nowhere")):
        with pytest.raises(ConfigError, match=rf"^{out}: cannot be written to"):
            predict.run(compose("predict", "checkpoint=x", f"input={film}", f"out={out}"))
