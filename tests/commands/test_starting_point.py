# SPDX-License-Identifier: Apache-2.0
"""``init=``: the encoder and the head outputs whose label name matches are taken, and the rest is told."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from rich.console import Console

from affect import tasks
from affect.commands.starting_point import apply_starting_point, preprocess_differences
from affect.encoders import TimmEncoder
from affect.errors import CheckpointError
from affect.geometry import CropRecipe
from affect.models.baseline import Baseline
from affect.release import build_model, build_tasks, read_release
from tests.commands.test_predict import release  # noqa: F401 - a fixture


def test_outputs_are_matched_by_name_and_the_rest_stays_new(release: Path) -> None:  # noqa: F811
    torch.manual_seed(9)
    mine = {"units": tasks.AUOccurrence(aus=[4, 2]), "pose": tasks.HeadPose()}
    module = Baseline(mine, TimmEncoder("test_resnet", image_size=32))
    fresh = module.head.linear["units"].weight.detach().clone()
    told = apply_starting_point(module, str(release), [], Console(quiet=True), CropRecipe(size=32))
    loaded = read_release(release)
    source = build_model(loaded, build_tasks(loaded))
    assert torch.equal(module.head.linear["units"].weight[1], source.head.linear["au"].weight[1])
    assert torch.equal(module.head.linear["units"].weight[0], fresh[0])
    for name, value in source.encoder.state_dict().items():
        assert torch.equal(module.encoder.state_dict()[name], value)
    assert told["outputs"]["units"]["taken"] == ["AU2"]
    assert told["outputs"]["units"]["new"] == ["AU4"]
    assert told["outputs"]["pose"]["new"] == ["pitch", "yaw", "roll"]
    assert len(told["sha256"]) == 64


def test_dropped_outputs_are_named(release: Path) -> None:  # noqa: F811
    module = Baseline({"au": tasks.AUOccurrence(aus=[1])}, TimmEncoder("test_resnet", image_size=32))
    told = apply_starting_point(module, str(release), [], Console(quiet=True), CropRecipe(size=32))
    assert told["outputs"]["au"] == {"taken": ["AU1"], "new": [], "dropped": ["AU2"]}


def test_another_encoder_is_refused(release: Path) -> None:  # noqa: F811
    module = Baseline({"au": tasks.AUOccurrence(aus=[1])}, TimmEncoder("vit_tiny_patch16_224", image_size=32))
    with pytest.raises(
        CheckpointError, match=r"no tensor of its encoder fits.*encoder=timm encoder.name=test_resnet encoder.image"
    ):
        apply_starting_point(module, str(release), [], Console(quiet=True), CropRecipe(size=32))


def test_other_preprocessing_is_told_and_recorded(
    release: Path,  # noqa: F811
    capsys: pytest.CaptureFixture,
) -> None:
    encoder = TimmEncoder("test_resnet", image_size=64, mean=(0.1, 0.2, 0.3))
    module = Baseline({"au": tasks.AUOccurrence(aus=[1])}, encoder)
    same = apply_starting_point(module, str(release), [], Console(), CropRecipe(size=64, margin=0.5))["preprocess"]
    assert [line.split()[0] for line in same] == ["image_size", "recipe.margin", "recipe.size"]
    assert "other preprocessing: image_size 32, here 64" in capsys.readouterr().out
    before = {"image_size": 64, "mean": [0.5, 0.5, 0.5], "recipe": None}
    told = preprocess_differences(before, module, CropRecipe(size=64))
    assert told == ["mean [0.5, 0.5, 0.5], here [0.1, 0.2, 0.3]", "recipe whole images, here similarity"]
    assert preprocess_differences({"image_size": 64, "recipe": None}, module, None) == []


def test_errors_name_the_key_that_was_written(tmp_path: Path) -> None:
    module = Baseline({"au": tasks.AUOccurrence(aus=[1])}, TimmEncoder("test_resnet", image_size=32))
    with pytest.raises(CheckpointError, match=r"^init=.*no such folder"):
        apply_starting_point(module, str(tmp_path / "none"), [], Console(quiet=True), None)
