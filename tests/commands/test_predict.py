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
import pytest
import torch
from hydra.utils import instantiate
from omegaconf import DictConfig

from affect.commands import figures, predict
from affect.commands.configuration import quote_paths
from affect.data.table import FaceTable
from affect.errors import CheckpointError, DataError
from affect.geometry import CropRecipe, FaceApiFinder, FaceObservation
from affect.release import build_model, build_tasks, read_release, write_release
from affect.tasks import AUIntensity, Task
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


def test_a_folder_gives_one_row_per_face_and_counts_the_rest(
    compose: Callable[..., DictConfig], release: Path, photographs: Path, tmp_path: Path, capsys: pytest.CaptureFixture
) -> None:
    predict.run(config(compose, release, photographs, tmp_path))
    table = FaceTable.read_csv(tmp_path / "predictions.csv")
    images, _ = table.strings("image")
    success, _ = table.numbers("success")
    found = dict(zip(images, success, strict=True))
    assert found == {"astronaut.png": 1, "broken.jpg": 0, "coffee.png": 0, "more/mirrored.jpg": 1}
    values, valid = table.numbers("au01_occurrence")
    assert valid.tolist() == [bool(flag) for flag in success]
    assert ((values >= 0) & (values <= 1)).all()
    points, _ = table.numbers("landmarks_5")
    assert points[success == 1].shape == (2, 10)
    for name in table.names - {"image", "success"}:
        assert table.column(name).is_null().to_pylist() == [not flag for flag in success], name
    printed = capsys.readouterr().out
    assert "no face found: 1 of 4" in printed
    assert "unreadable image: 1 of 4" in printed
    assert cv2.imread(str(tmp_path / "annotated" / "astronaut.png")) is not None
    assert (tmp_path / "annotated" / "more" / "mirrored.jpg.png").is_file()
    assert not (tmp_path / "annotated" / "coffee.png").exists()
    assert "delivered crops" not in printed
    command = f"affect train dataset=table dataset.table={tmp_path / 'predictions.parquet'} prepare=similarity task=["
    assert command in printed


def test_a_search_leaves_out_the_copies_of_an_earlier_run(photographs: Path, tmp_path: Path) -> None:
    for name in ("own.png", "predictions/annotated/own.png", "annotated/kept.png"):
        (tmp_path / name).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / name).write_bytes((photographs / "coffee.png").read_bytes())
    files, _ = predict.input_images(tmp_path, tmp_path / "predictions")
    assert [str(file.relative_to(tmp_path)) for file in files] == ["annotated/kept.png", "own.png"]
    with pytest.raises(DataError, match="no image in it"):
        predict.input_images(tmp_path / "predictions", tmp_path / "predictions")


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
    tasks = build_tasks(loaded)
    module = build_model(loaded, tasks)
    image = np.ascontiguousarray(data.astronaut())
    found = FaceApiFinder().find(image)
    recipe = predict.prediction_recipe(loaded.preprocess)
    row = predict.predict_faces(module, tasks, recipe, image, found, torch.device("cpu"), 8)[0]
    matrix = recipe.matrix(landmarks=found[0].points)
    crop = torch.from_numpy(recipe.crop(image, matrix)).permute(2, 0, 1)[None]
    with torch.inference_mode():
        vector = module.encoder(crop)
        expected = module.head(vector)["au"].sigmoid()[0]
    assert row["au01_occurrence"] == pytest.approx(float(expected[0]), abs=1e-6)
    # Points in fractions of the crop come back in pixels of the photograph: the crop's centre is the face's.
    centre = np.asarray(row["landmarks_5"]).reshape(5, 2).mean(0)
    box = found[0].box
    assert box[0] < centre[0] < box[2]
    assert box[1] < centre[1] < box[3]


def test_a_model_of_delivered_crops_gets_the_box_of_the_face() -> None:
    none = CropRecipe(kind="none", size=32)
    for described in (None, none.describe()):
        recipe = predict.prediction_recipe({"recipe": described, "image_size": 32})
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
    monkeypatch.setattr(predict, "read_release", lambda *_: delivered)
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
    with pytest.raises(DataError, match="no image in it"):
        predict.run(config(compose, release, tmp_path, tmp_path / "out"))


def test_a_checkpoint_that_is_none_is_an_error(
    compose: Callable[..., DictConfig], photographs: Path, tmp_path: Path
) -> None:
    with pytest.raises(CheckpointError, match=r"no model\.safetensors in it"):
        predict.run(config(compose, tmp_path, photographs, tmp_path / "out"))


def test_a_task_from_outside_is_drawn_as_it_says() -> None:
    pain, intensity = PainLevel((1, 2)), AUIntensity([12])
    tasks: dict[str, Task] = {"pain": pain, "au": intensity}
    observation = FaceObservation(np.zeros((5, 2), np.float32), np.zeros(4, np.float32), 1.0, "5")
    row = {"pain": 2.0, "pain_at_least_1": 0.9, "pain_at_least_2": 0.6, "au12_intensity": 3.0}
    drawn = predict.note(observation, row, tasks)
    assert drawn.bars == {"pain": 2.0, "AU12": 3.0}
    assert drawn.bar_limit == 16
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
    table = FaceTable.read_parquet(tmp_path / "out" / "predictions.parquet")
    assert table.strings("present")[0].tolist() == ["AU1"]
    assert "present: thresholds tuned per output on 7 validation rows" in capsys.readouterr().out
