# SPDX-License-Identifier: Apache-2.0
"""A trained model as a landmark provider: for ``affect prepare`` and ``affect predict``, told apart by its weights."""

from __future__ import annotations

import json
import re
import shlex
import shutil
from pathlib import Path

import numpy as np
import pytest
import torch
from safetensors.torch import load_file, save_file

from affect.commands import landmarks
from affect.commands.face_pictures import note
from affect.commands.main import main
from affect.data import faces
from affect.data.batch import FaceBatch
from affect.data.faces import FaceDials, FaceImages
from affect.data.layouts.common import write_image
from affect.data.table import FaceTable
from affect.encoders import Pixels, TimmEncoder
from affect.errors import CheckpointError, ConfigError
from affect.geometry import CropRecipe, FaceDetector, FaceObservation, TwoStageFinder, invert, transform_points
from affect.geometry.providers import Detection, mean_face
from affect.models.baseline import Baseline
from affect.models.decafa import Decafa
from affect.release import read_release, write_release
from affect.tasks import AUOccurrence, Landmarks
from tests.commands.test_prepare import sources

SIZE = 32
RECIPE = CropRecipe(name="box", kind="box", size=SIZE, margin=0.1)
MEAN = mean_face("68")[1] * 0.6 + 0.2
"""What the model of these tests says of every crop, as fractions of it."""

BOXES = np.array([[8.0, 6, 56, 58], [10, 10, 50, 50]])


def write_model(folder: Path, schemes: tuple[str, ...] = ("68", "5"), move: float = 0.0) -> Path:
    """Write a release of a model that sees the mean face in every crop, moved by ``move`` of its side."""
    torch.manual_seed(0)
    tasks = {f"landmarks_{scheme}": Landmarks(scheme) for scheme in schemes} or {"au": AUOccurrence([1, 2])}
    module = Baseline(tasks, TimmEncoder("test_resnet", image_size=SIZE))
    for name, layer in module.heads().items():
        torch.nn.init.zeros_(layer.weight)
        if name == "landmarks_68":
            layer.bias.data = torch.from_numpy(MEAN - 0.5 + move).float().flatten()
    nodes = {n: {"_target_": "affect.tasks.Landmarks", "scheme": n.removeprefix("landmarks_")} for n in tasks}
    if not schemes:
        nodes = {"au": {"_target_": "affect.tasks.AUOccurrence", "aus": [1, 2]}}
    encoder = {"_target_": "affect.encoders.TimmEncoder", "name": "test_resnet", "image_size": SIZE}
    config = {"task": nodes, "model": {"_target_": "affect.models.baseline.Baseline", "encoder": encoder}}
    preprocess = {"recipe": RECIPE.describe(), "image_size": SIZE, "points": {"68": MEAN.tolist()}}
    names = {name: task.outputs for name, task in tasks.items()}
    write_release(folder, module.release_state(), config, names, preprocess, {}, "card")
    return folder


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_model(tmp_path_factory.mktemp("model"))


@pytest.fixture(scope="module")
def delivered(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Built-in faces as images of a user's own table that says nothing of where faces are."""
    root = tmp_path_factory.mktemp("delivered")
    table = FaceTable.from_arrow(faces.labels_table(FaceDials(image_size=64, subjects=3), 3, 6), root)
    names = [f"{k}.png" for k in range(6)]
    for name, image in zip(names, FaceImages(FaceDials(image_size=64, subjects=3), 3).read(np.arange(6)), strict=True):
        write_image(root / name, image)
    kept = table.with_columns({"image": names})
    known = ["image", "subject", *(name for name in kept.arrow.column_names if name.endswith("_occurrence"))]
    FaceTable(kept.arrow.select(known), root, {"dataset": "mine"}).save(root / "labels.arrow")
    return root


@pytest.fixture(autouse=True)
def user(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)


class Boxes:
    """A detector that sees the same two boxes everywhere."""

    def detect(self, image: np.ndarray) -> list[Detection]:
        return [Detection(box, 0.9) for box in BOXES]


def test_points_of_a_checkpoint_are_in_pixels_of_the_image(model: Path) -> None:
    provider = landmarks.landmark_provider(read_release(model), passes=1)
    assert provider.scheme == "68"
    image = np.zeros((64, 64, 3), np.uint8)
    found = provider.landmarks(image, BOXES)
    # The crop puts the mean face of the box where the model expects it, so its answer is the mean face in the box.
    side = (BOXES[:, 2:] - BOXES[:, :2]).max(1)[:, None, None]
    expected = (BOXES[:, None, :2] + BOXES[:, None, 2:]) / 2 + side * (mean_face("68")[1] - 0.5)
    np.testing.assert_allclose(found, expected, atol=1e-3)
    finder = TwoStageFinder(Boxes(), provider)
    assert [len(each) for each in finder.find_many([image] * 3)] == [2, 2, 2]
    assert isinstance(Boxes(), FaceDetector)


def test_the_name_follows_from_what_decides_the_points(model: Path, tmp_path: Path) -> None:
    name = landmarks.provider_name(read_release(model))
    assert re.fullmatch(r"baseline-[0-9a-f]{12}", name)
    shutil.copytree(model, tmp_path / "moved")
    (tmp_path / "moved" / "README.md").write_text("another card")
    assert landmarks.provider_name(read_release(tmp_path / "moved")) == name
    state = load_file(model / "model.safetensors")
    state["head.linear.landmarks_68.bias"] += 0.001
    save_file(state, tmp_path / "moved" / "model.safetensors")
    names = {name, landmarks.provider_name(read_release(tmp_path / "moved"))}
    shutil.copytree(model, tmp_path / "cropped")
    preprocess = json.loads((model / "preprocess.json").read_text())
    preprocess["recipe"]["margin"] = 0.2
    (tmp_path / "cropped" / "preprocess.json").write_text(json.dumps(preprocess))
    names.add(landmarks.provider_name(read_release(tmp_path / "cropped")))
    assert len(names) == 3


def test_prepare_looks_with_a_checkpoint_and_training_finds_its_crops(
    model: Path, delivered: Path, tmp_path: Path, capsys: pytest.CaptureFixture
) -> None:
    keys = ["dataset=table", f"dataset.table={delivered / 'labels.arrow'}", "prepare=similarity49_200", "workers=0"]
    assert main(["prepare", *keys, "landmarks=baseline", f"checkpoint={model}"]) == 0
    said = capsys.readouterr().out
    provider = landmarks.provider_name(read_release(model))
    assert f"prepare.provider={provider}" in " ".join(said.split())
    (folder,) = (path.parent for path in tmp_path.rglob("recipe.json"))
    described = json.loads((folder / "recipe.json").read_text())
    assert described["recipe"]["provider"] == provider
    assert described["models"]["provider"] == landmarks.describe_provider(read_release(model))
    assert "face-api" in described["models"]["detector"]
    (source,) = sources(*keys[:3], f"prepare.provider={provider}")
    table = source.table
    found = table.strings("face")[0] == "found"
    assert found.sum() >= 4  # of six drawn faces
    assert "landmarks_68" in table.metadata["from_finder"]
    # Crops are aligned by what the model says: the mean face in them is upright, where the recipe wants it.
    points = table.numbers("landmarks_68")[0].reshape(-1, 68, 2)[found]
    recipe = CropRecipe.read(described["recipe"])
    np.testing.assert_allclose(points[:, list(range(17, 60))], np.stack([recipe.target()[:43]] * len(points)), atol=0.6)
    other = write_model(tmp_path / "other", move=0.02)
    assert main(["prepare", *keys, "landmarks=baseline", f"checkpoint={other}"]) == 0
    assert len(list(tmp_path.rglob("recipe.json"))) == 2
    capsys.readouterr()
    # Trained on without the checkpoint: the recipe's name says which crops are meant.
    wanted = next(word for word in shlex.split(said.split("next: ")[1]) if word.startswith("prepare.provider="))
    assert wanted == f"prepare.provider={provider}"


def write_decafa(folder: Path) -> Path:
    """Write a release of a small DeCaFA of three schemes, whose weights are random."""
    torch.manual_seed(0)
    schemes, encoder = ("98", "68", "5"), {"image_size": SIZE, "grey": True}
    settings = {"stages": 2, "widths": [4, 6], "convolutions": 1, "skips": True, "temperature": 0.02}
    module = Decafa({f"landmarks_{s}": Landmarks(s) for s in schemes}, Pixels(**encoder), **settings)
    node = {"_target_": "affect.models.decafa.Decafa", "encoder": {"_target_": "affect.encoders.Pixels", **encoder}}
    tasks = {f"landmarks_{s}": {"_target_": "affect.tasks.Landmarks", "scheme": s} for s in schemes}
    names = {name: task.outputs for name, task in module.tasks.items()}
    preprocess = {"recipe": RECIPE.describe(), "image_size": SIZE, "points": {"68": MEAN.tolist()}}
    config = {"task": tasks, "model": node | settings}
    write_release(folder, module.release_state(), config, names, preprocess, {}, "card")
    return folder


def test_prepare_looks_with_decafa_at_many_faces_at_once(
    delivered: Path, tmp_path: Path, capsys: pytest.CaptureFixture, monkeypatch: pytest.MonkeyPatch
) -> None:
    checkpoint, table = write_decafa(tmp_path / "decafa"), delivered / "labels.arrow"
    keys = ["dataset=table", f"dataset.table={table}", "prepare=similarity49_200", "workers=0"]
    seen: list[int] = []
    step = Decafa.predict_step
    monkeypatch.setattr(Decafa, "predict_step", lambda own, batch: seen.append(len(batch.image)) or step(own, batch))
    assert main(["prepare", *keys, "landmarks=decafa", f"checkpoint={checkpoint}"]) == 0
    capsys.readouterr()
    (folder,) = (path.parent for path in tmp_path.rglob("recipe.json"))
    described = json.loads((folder / "recipe.json").read_text())
    assert re.fullmatch(r"decafa-[0-9a-f]{12}", described["recipe"]["provider"])
    assert described["models"]["provider"].startswith("affect.models.decafa.Decafa, scheme 68, sha256 ")
    (source,) = sources(*keys[:3], f"prepare.provider={described['recipe']['provider']}")
    rows = np.flatnonzero(source.table.strings("face")[0] == "found")
    assert seen[0] >= len(rows) >= 4
    assert seen == [seen[0]] * 2, "one batch of all faces in each of two passes"
    # Points of the crops, back in pixels of the images, are those that the model says of each image alone.
    back = invert(source.table.numbers("crop_matrix", rows)[0].reshape(-1, 2, 3))
    found = transform_points(back, source.table.numbers("landmarks_68", rows)[0].reshape(-1, 68, 2))
    finder = landmarks.checkpoint_finder(checkpoint)
    images = FaceImages(FaceDials(image_size=64, subjects=3), 3).read(rows)
    alone = np.stack([finder.find(image)[0].points for image in images])
    np.testing.assert_allclose(found, alone, atol=0.05)


def test_what_does_not_fit_is_said_in_one_line(
    model: Path, delivered: Path, tmp_path: Path, capsys: pytest.CaptureFixture
) -> None:
    start = ["prepare", "dataset=table", f"dataset.table={delivered / 'labels.arrow'}", "workers=0"]
    table = [*start, "prepare=similarity49_200"]
    pointless, five = write_model(tmp_path / "pointless", ()), write_model(tmp_path / "five", ("5",))
    for words, message in (
        ([*table, "landmarks=decafa"], "checkpoint=<run or release>"),
        ([*table, "landmarks=facapi"], "did you mean faceapi"),
        ([*table, "landmarks=decafa", f"checkpoint={model}"], "is baseline, baseline-"),
        ([*table, "landmarks=faceapi", f"checkpoint={model}"], "is not used by landmarks=faceapi"),
        ([*table, "landmarks=baseline", f"checkpoint={pointless}"], "give a checkpoint with a landmarks task"),
        ([*table, "landmarks=baseline", "checkpoint=nowhere"], "no such folder"),
        ([*table, "landmarks=baseline", f"checkpoint={five}"], "from 5 landmarks; use points=eyes_mouth_5"),
        ([*table, "prepare.provider=baseline-0123456789ab", f"checkpoint={model}"], "landmarks=baseline-0123456789ab"),
    ):
        assert main(words) == 2, words
        said = " ".join(capsys.readouterr().err.split())
        assert message in said, said
        assert "Traceback" not in said
    assert not list(tmp_path.rglob("recipe.json")), "it is said before anything is written"


def test_own_boxes_need_no_landmarks(model: Path) -> None:
    with pytest.raises(ConfigError, match="checkpoint=<run or release>"):
        landmarks.read_provider("decafa", None)
    with pytest.raises(CheckpointError, match="no such folder"):
        landmarks.read_provider("decafa", "nowhere")
    assert landmarks.read_provider("baseline", model).folder == model


def test_typical_points_are_means_over_labelled_faces() -> None:
    tasks = {"five": Landmarks("5"), "many": Landmarks("68"), "au": AUOccurrence([1])}
    five = torch.rand(4, 5, 2, generator=torch.Generator().manual_seed(0))
    mask = torch.tensor([[True] * 5, [True] * 5, [False] * 5, [True, False, True, True, True]])
    batch = FaceBatch(
        image=torch.zeros(4, 3, 8, 8, dtype=torch.uint8),
        targets={"five": five, "many": torch.zeros(4, 68, 2), "au": torch.zeros(4, 1)},
        masks={"five": mask, "many": torch.zeros(4, 68) > 0, "au": torch.ones(4, 1) > 0},
    )
    found = landmarks.typical_points(tasks, batch)
    assert list(found) == ["5"]
    np.testing.assert_allclose(found["5"][0], five[[0, 1, 3], 0].mean(0), atol=1e-4)
    np.testing.assert_allclose(found["5"][1], five[[0, 1], 1].mean(0), atol=1e-4)


def test_crops_of_a_checkpoint_are_those_it_was_trained_on(model: Path) -> None:
    """In the crop of the last pass the points have their typical place, whatever box a detector gives."""
    seen = []
    provider = landmarks.landmark_provider(read_release(model))
    predict = provider.predict
    provider.predict = lambda crops: seen.append(crops) or predict(crops)
    image = FaceImages(FaceDials(image_size=64), 3)(0)
    points = provider.landmarks(image, BOXES[:1])
    (first, second) = seen
    assert first.shape == second.shape == (1, SIZE, SIZE, 3)
    matrix = provider._crops(points)[1][0]
    np.testing.assert_allclose(transform_points(matrix, points[0]), MEAN * SIZE - 0.5, atol=1e-3)


def test_every_predicted_scheme_is_drawn() -> None:
    tasks = {f"landmarks_{scheme}": Landmarks(scheme) for scheme in ("5", "98", "68")}
    seen = FaceObservation(BOXES[0], 0.9, np.zeros((68, 2)))
    row = {task.scheme.column: np.full(2 * task.scheme.points, k) for k, task in enumerate(tasks.values())}
    drawn = note(seen, row, tasks)
    np.testing.assert_array_equal(drawn.points, np.full((98, 2), 1))
    assert list(drawn.further) == ["68 points", "5 points"]
    np.testing.assert_array_equal(drawn.further["5 points"], np.zeros((5, 2)))
    np.testing.assert_array_equal(note(seen, {}, {}).points, seen.points)  # a model without points: the finder's
