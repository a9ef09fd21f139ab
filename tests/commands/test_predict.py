# SPDX-License-Identifier: Apache-2.0
"""Photographs in, table and annotated copies out; images without a face are counted, not dropped."""

from __future__ import annotations

import dataclasses
import json
import shlex
import shutil
from collections.abc import Callable
from pathlib import Path

import cv2
import numpy as np
import pyarrow.csv as pa_csv
import pyarrow.parquet as pq
import pytest
import torch
from hydra.utils import instantiate
from omegaconf import DictConfig

from affect.commands import figures, predict, predictor
from affect.commands.configuration import quote_paths
from affect.commands.face_pictures import note
from affect.commands.predictor import open_predictor, prediction_recipe, read_faces
from affect.data.table import FaceTable
from affect.data.video import ImageFiles, open_input
from affect.errors import CheckpointError, ConfigError, DataError
from affect.geometry import CropRecipe, FaceApiFinder, FaceObservation, TwoStageFinder
from affect.release import build_model, build_tasks, read_release, write_release
from affect.tasks import AUIntensity, AUOccurrence, Landmarks, Task
from examples.my_extension.task import PainLevel
from tests.models.test_base import make_module

data = pytest.importorskip("skimage.data")


@pytest.fixture(scope="module")
def release(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Return a release of an untrained model: what it says has no meaning, but where and in what order it does."""
    module = make_module().eval()
    f1 = {"f1": {"_target_": "affect.metrics.F1"}}
    config = {
        "task": {
            "au": {
                "_target_": "affect.tasks.AUOccurrence",
                "aus": [1, 2],
                "metrics": f1,
            },
            "valence_arousal": {"_target_": "affect.tasks.ValenceArousal"},
            "landmarks": {"_target_": "affect.tasks.Landmarks", "scheme": "5"},
        },
        "model": {
            "_target_": "affect.models.baseline.Baseline",
            "encoder": {"_target_": "affect.encoders.TimmEncoder", "name": "test_resnet", "image_size": 32},
        },
    }
    recipe = CropRecipe(size=32)
    preprocess = {"recipe": recipe.describe(), "image_size": 32}
    folder = tmp_path_factory.mktemp("release")
    labels = {name: task.outputs for name, task in module.tasks.items()}
    write_release(folder, module.release_state(), config, labels, preprocess, {}, "card")
    return folder


@pytest.fixture(scope="module")
def photographs(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("photographs")
    astronaut = data.astronaut()
    cv2.imwrite(str(folder / "astronaut.png"), astronaut[..., ::-1])
    (folder / "more").mkdir()
    cv2.imwrite(str(folder / "more" / "mirrored.jpg"), astronaut[:, ::-1, ::-1])
    cv2.imwrite(str(folder / "coffee.png"), data.coffee()[..., ::-1])
    (folder / "broken.jpg").write_bytes(b"\xff\xd8 not a picture")
    return folder


def config(compose: Callable[..., DictConfig], release: Path, source: Path, out: Path, *more: str) -> DictConfig:
    return compose("predict", f"checkpoint={release}", f"input={source}", f"out={out}", *more)


def read(path: Path) -> dict[str, list]:
    return pq.read_table(path).to_pydict()


def test_a_folder_gives_one_row_per_face_and_counts_the_rest(
    compose: Callable[..., DictConfig], release: Path, photographs: Path, tmp_path: Path, capsys: pytest.CaptureFixture
) -> None:
    predict.run(config(compose, release, photographs, tmp_path))
    table = read(tmp_path / "predictions.parquet")
    assert dict(zip(table["input"], table["success"], strict=True)) == {
        "astronaut.png": 1, "broken.jpg": 0, "coffee.png": 0, "more/mirrored.jpg": 1,
    }  # fmt: skip
    assert table["frame"] == [0, 1, 2, 3]
    assert table["timestamp"] == table["track"] == table["Pitch"] == [None] * 4
    assert table["AU01_c"] == [None if value is None else int(value >= 0.5) for value in table["AU01"]]
    always = {"input", "success", "frame", "timestamp", "track", "Pitch", "Yaw", "Roll"}
    for name in table.keys() - always:
        assert [cell is None for cell in table[name]] == [not flag for flag in table["success"]], name
    # The same numbers under the names of labels, which training reads.
    faces = FaceTable.read_parquet(tmp_path / "face_table.parquet")
    assert faces.strings("image")[0].tolist() == table["input"]
    values, valid = faces.numbers("au01_occurrence")
    assert valid.tolist() == [bool(flag) for flag in table["success"]]
    assert values[valid].tolist() == [value for value in table["AU01"] if value is not None]
    points, _ = faces.numbers("landmarks_5")
    assert points[0, 0::2].tolist() == [table[f"landmarks_5_x_{k}"][0] for k in range(5)]
    assert points[0, 1::2].tolist() == [table[f"landmarks_5_y_{k}"][0] for k in range(5)]
    box, _ = faces.numbers("box")
    rectangle = [table[name][0] for name in ("FaceRectX", "FaceRectY", "FaceRectWidth", "FaceRectHeight")]
    assert rectangle == pytest.approx([box[0, 0], box[0, 1], box[0, 2] - box[0, 0], box[0, 3] - box[0, 1]], abs=1e-4)
    printed = capsys.readouterr().out
    assert "no face found: 1 of 4" in printed
    assert "unreadable image: 1 of 4" in printed
    assert "at 0.5, as the checkpoint stores no thresholds" in printed
    assert cv2.imread(str(tmp_path / "annotated" / "astronaut.png")) is not None
    assert (tmp_path / "annotated" / "more" / "mirrored.jpg.png").is_file()
    assert not (tmp_path / "annotated" / "coffee.png").exists()
    assert "delivered crops" not in printed
    command = f"affect train dataset=table dataset.table={tmp_path / 'face_table.parquet'} prepare=similarity task=["
    assert command in printed


def test_both_files_hold_the_same(
    compose: Callable[..., DictConfig], release: Path, photographs: Path, tmp_path: Path
) -> None:
    predict.run(config(compose, release, photographs, tmp_path, "annotate=false"))
    stored = pq.read_table(tmp_path / "predictions.parquet")
    written = pa_csv.read_csv(tmp_path / "predictions.csv")
    assert written.column_names == stored.column_names
    assert stored.column_names[:10] == [
        "frame", "timestamp", "face", "track", "FaceRectX", "FaceRectY", "FaceRectWidth", "FaceRectHeight", "FaceScore",
        "success",
    ]  # fmt: skip
    assert stored.column_names[10:12] == ["x_0", "x_1"]
    assert stored.column_names[145:149] == ["y_67", "Pitch", "Roll", "Yaw"]
    for name in stored.column_names:
        for a, b in zip(written[name].to_pylist(), stored[name].to_pylist(), strict=True):
            assert a == (pytest.approx(b) if isinstance(b, float) else b), name
    assert not (tmp_path / "annotated").exists()


def test_a_search_leaves_out_the_copies_of_an_earlier_run(photographs: Path, tmp_path: Path) -> None:
    for name in ("own.png", "predictions/annotated/own.png", "annotated/kept.png"):
        (tmp_path / name).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / name).write_bytes((photographs / "coffee.png").read_bytes())
    [source] = open_input(tmp_path, [tmp_path / "predictions" / "annotated"])
    assert isinstance(source, ImageFiles)
    assert [str(file.relative_to(tmp_path)) for file in source.paths] == ["annotated/kept.png", "own.png"]
    with pytest.raises(DataError, match="no image or video in it"):
        open_input(tmp_path / "predictions", [tmp_path / "predictions" / "annotated"])


def test_the_table_is_read_back_by_the_printed_command(
    compose: Callable[..., DictConfig], release: Path, photographs: Path, tmp_path: Path, capsys: pytest.CaptureFixture
) -> None:
    out = tmp_path / "my out"
    predict.run(config(compose, release, photographs / "astronaut.png", out))
    [line] = [line for line in capsys.readouterr().out.splitlines() if line.startswith("train on it: ")]
    program, command, *overrides = shlex.split(line.removeprefix("train on it: "))
    assert (program, command) == ("affect", "train")
    settings = compose(command, *(quote_paths(overrides)))
    assert set(settings.task) == {"au", "valence_arousal", "landmarks"}
    table = instantiate(settings.dataset.read)
    assert table.image_paths() == [photographs / "astronaut.png"]


def test_the_face_is_cropped_as_in_training(release: Path, photographs: Path) -> None:
    loaded = read_release(release)
    module = build_model(loaded, build_tasks(loaded))
    image = np.ascontiguousarray(data.astronaut())
    found = FaceApiFinder().find(image)
    model = open_predictor(release, device="cpu")
    read = read_faces(model, [image], found, 8)
    assert read.usable.tolist() == [True]
    recipe = model.recipe
    matrix = recipe.matrix(landmarks=found[0].points)
    crop = torch.from_numpy(recipe.crop(image, matrix)).permute(2, 0, 1)[None]
    with torch.inference_mode():
        vector = module.encoder(crop)
        expected = module.head(vector)["au"].sigmoid()[0]
    assert read.values["au"][0, 0] == pytest.approx(float(expected[0]), abs=1e-6)
    # Points in fractions of the crop come back in pixels of the photograph: the crop's centre is the face's.
    centre = read.values["landmarks"][0].mean(0)
    box = found[0].box
    assert box[0] < centre[0] < box[2]
    assert box[1] < centre[1] < box[3]


def test_a_model_of_delivered_crops_gets_the_box_of_the_face() -> None:
    none = CropRecipe(kind="none", size=32)
    for described in (None, none.describe()):
        recipe = prediction_recipe({"recipe": described, "image_size": 32})
        assert (recipe.kind, recipe.size) == ("box", 32)


def test_a_model_of_delivered_crops_says_what_is_cropped_instead(
    compose: Callable[..., DictConfig],
    release: Path,
    photographs: Path,
    tmp_path: Path,
    capsys: pytest.CaptureFixture,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    loaded = read_release(release)
    delivered = dataclasses.replace(loaded, preprocess={"recipe": None, "image_size": 32})
    monkeypatch.setattr(predictor, "open_checkpoint", lambda *_: delivered)
    predict.run(config(compose, release, photographs / "astronaut.png", tmp_path))
    printed = capsys.readouterr().out
    assert "trained on delivered crops: each face's box with a margin of 10% is cropped" in printed
    assert "prepare=box" in printed


@pytest.mark.parametrize(
    ("source", "message"),
    [("coffee.png", "no face found in 1 image"), ("broken.jpg", "broken.jpg"), ("nowhere", "no such file or folder")],
)
def test_a_single_image_that_gives_nothing_is_an_error(
    compose: Callable[..., DictConfig], release: Path, photographs: Path, tmp_path: Path, source: str, message: str
) -> None:
    with pytest.raises(DataError, match=message) as error:
        predict.run(config(compose, release, photographs / source, tmp_path))
    assert "\n" not in str(error.value)
    assert not (tmp_path / "predictions.csv").exists()


def test_a_folder_without_images_is_an_error(compose: Callable[..., DictConfig], release: Path, tmp_path: Path) -> None:
    with pytest.raises(DataError, match="no image or video in it"):
        predict.run(config(compose, release, tmp_path, tmp_path / "out"))


def test_a_checkpoint_that_is_none_is_an_error(
    compose: Callable[..., DictConfig], photographs: Path, tmp_path: Path
) -> None:
    with pytest.raises(CheckpointError, match=r"no model\.safetensors in it"):
        predict.run(config(compose, tmp_path, photographs, tmp_path / "out"))


class FivePoints:
    """A detector and landmark provider of five points, which nothing may ask for faces."""

    scheme = "5"

    def detect(self, image: np.ndarray) -> list:
        raise AssertionError("no frame is to be read")

    def landmarks(self, image: np.ndarray, boxes: np.ndarray) -> np.ndarray:
        raise AssertionError("no frame is to be read")


def test_a_finder_of_too_few_points_is_refused_before_the_work_starts(
    compose: Callable[..., DictConfig],
    release: Path,
    photographs: Path,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    few = FivePoints()
    monkeypatch.setattr(predict.assembly, "make", lambda *_: TwoStageFinder(few, few))
    with pytest.raises(ConfigError, match=r"gives 5 points .* aligned by inner_51.*finder=faceapi") as error:
        predict.run(config(compose, release, photographs, tmp_path / "out"))
    assert "\n" not in str(error.value)
    assert not (tmp_path / "out").exists()
    # Five points are enough for others.
    for recipe in (CropRecipe(points="eyes_mouth_5"), CropRecipe(kind="box"), CropRecipe(kind="none")):
        predict.require_points(recipe, TwoStageFinder(few, few))


def test_sets_of_points_of_a_model_are_named_by_their_colours() -> None:
    tasks: dict[str, Task] = {"fine": Landmarks("98"), "coarse": Landmarks("68")}
    row = {"landmarks_98": np.arange(196.0), "landmarks_68": np.arange(136.0)}
    drawn = note(FaceObservation(np.array([0.0, 0, 4, 4]), 1.0, np.zeros((68, 2))), row, tasks)
    assert drawn.points is not None
    assert len(drawn.points) == 98
    assert (drawn.points_name, list(drawn.further)) == ("98 points", ["68 points"])


def test_a_task_from_outside_is_drawn_as_it_says() -> None:
    pain, intensity = PainLevel((1, 2)), AUIntensity([12])
    tasks: dict[str, Task] = {"pain": pain, "au": intensity}
    observation = FaceObservation(np.zeros((5, 2), np.float32), np.zeros(4, np.float32), 1.0, "5")
    row = {"pain": 2.0, "pain_at_least_1": 0.9, "pain_at_least_2": 0.6, "au12_intensity": 3.0}
    drawn = note(observation, row, tasks)
    assert drawn.bars == {"pain": 2.0, "AU12": 3.0}
    assert drawn.bar_limits == {"pain": 16.0, "AU12": 5.0}
    values = {"pain": torch.tensor([[0.9, 0.4]]), "au": torch.tensor([[3.0]])}
    assert figures.answers(tasks, values, None, 0) == {"at_least_1": True, "at_least_2": False, "AU12": 3.0}


def test_outputs_at_the_checkpoints_thresholds_are_named(
    compose: Callable[..., DictConfig], release: Path, photographs: Path, tmp_path: Path, capsys: pytest.CaptureFixture
) -> None:
    shutil.copytree(release, tmp_path / "release")
    path = tmp_path / "release" / "preprocess.json"
    tuned = {"rule": "tuned", "values": {"au": {"AU1": 0.0, "AU2": 1.0}}, "part": "validation", "rows": 7}
    path.write_text(json.dumps({**json.loads(path.read_text()), "thresholds": tuned}))
    predict.run(config(compose, tmp_path / "release", photographs / "astronaut.png", tmp_path / "out"))
    table = read(tmp_path / "out" / "predictions.parquet")
    assert (table["AU01_c"], table["AU02_c"]) == ([1], [0])
    assert "decisions (…_c): thresholds tuned per output on 7 validation rows" in capsys.readouterr().out


def test_presence_and_intensity_of_an_action_unit_both_show() -> None:
    tasks: dict[str, Task] = {"au": AUOccurrence([12]), "au_intensity": AUIntensity([12])}
    observation = FaceObservation(np.array([0.0, 0, 4, 4]), 1.0, np.zeros((68, 2)))
    drawn = note(observation, {"au12_occurrence": 0.9, "au12_intensity": 2.0}, tasks)
    assert drawn.bars == {"AU12": 0.9, "AU12 (au_intensity)": 2.0}
    assert drawn.bar_limits == {"AU12": 1.0, "AU12 (au_intensity)": 5.0}


def test_a_packaged_network_reads_photographs_without_any_training(
    compose: Callable[..., DictConfig], photographs: Path, tmp_path: Path
) -> None:
    settings = compose(
        "predict", "checkpoint=packaged:face_expression", f"input={photographs / 'astronaut.png'}", f"out={tmp_path}"
    )
    predict.run(settings)
    table = read(tmp_path / "predictions.parquet")
    assert table["expression"] == ["happiness"]
    assert table["happiness"][0] > 0.95


@pytest.mark.slow
def test_an_exported_file_reads_the_same_as_its_checkpoint(release: Path, photographs: Path, tmp_path: Path) -> None:
    pytest.importorskip("onnxruntime")
    export = pytest.importorskip("affect.commands.export")
    from affect.commands.configuration import compose as compose_config

    file = tmp_path / "model.onnx"
    export.run(compose_config("export", [f"checkpoint={release}", f"out={file}", "format=onnx"]))
    image = np.ascontiguousarray(data.astronaut())
    found = FaceApiFinder().find(image)
    ours, theirs = (read_faces(open_predictor(path), [image], found, 8) for path in (release, file))
    assert ours.values.keys() == theirs.values.keys()
    for name, values in ours.values.items():
        np.testing.assert_allclose(theirs.values[name], values, atol=1e-3, err_msg=name)
