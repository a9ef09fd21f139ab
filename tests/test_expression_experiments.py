# SPDX-License-Identifier: Apache-2.0
"""Experiments with privileged attribution and task tokens: two batches on drawn trees, and what stops them first."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from omegaconf import OmegaConf

from affect.commands import train
from affect.commands.configuration import compose
from affect.commands.main import main
from affect.commands.synthesize import Tree
from affect.data.faces import FaceDials
from affect.data.table import FaceTable
from affect.errors import CheckpointError, ConfigError

SMALL = (
    "debug=fast",
    "callbacks.progress=null",
    "trainer.enable_progress_bar=false",
    "logger=none",
    "bootstrap.resamples=0",
    "data.num_workers=0",
    "figures=false",
)
VGG = ("encoder.pretrained=false", "encoder.image_size=32", "+encoder.arguments.mlp_ratio=0.01")
"""The architecture of VGGFace from random weights, its first dense layer narrow."""


@pytest.fixture(scope="module")
def trees(tmp_path_factory: pytest.TempPathFactory) -> Callable[[str], Path]:
    folder = tmp_path_factory.mktemp("trees")

    def root(name: str) -> Path:
        if not (folder / name).is_dir():
            Tree.of(name, folder / name, {}).write(FaceDials(image_size=96, subjects=12), 0, 40)
        return folder / name

    return root


def words(name: str, tmp_path: Path, root: Path) -> list[str]:
    paths = (f"paths.{key}={tmp_path / key}" for key in ("output", "cache", "prepared"))
    return [f"experiment={name}", *SMALL, *paths, f"dataset.root={root}"]


def results_of(tmp_path: Path) -> dict:
    return json.loads((tmp_path / "output" / "results.json").read_text())


@pytest.mark.slow
@pytest.mark.parametrize("name", ["pal_affectnet7", pytest.param("pal_affectnet8", marks=pytest.mark.slow)])
def test_affectnet_trains_with_its_own_points(name: str, tmp_path: Path, trees: Callable[[str], Path]) -> None:
    train.run(compose("train", [*words(name, tmp_path, trees("affectnet")), *VGG, "figures=true"]))
    results = results_of(tmp_path)
    assert results["config"]["objectives"]["pal"]["layer"] == "encoder.model.features.29"
    sampling = results["config"]["data"]["sampling"]
    assert (sampling["kind"], sampling["key"]) == ("balanced", "expression")
    assert len(results["labels"]["expression"]) == int(name[-1])
    figures = {path.name for path in (tmp_path / "output" / "figures").iterdir()}
    assert {"pal_attribution.png", "expression_confusion.png", "expression_reliability.png"} <= figures


def test_rafdb_stops_for_its_points_and_trains_when_they_are_found(
    tmp_path: Path, trees: Callable[[str], Path], capsys: pytest.CaptureFixture[str]
) -> None:
    root = trees("rafdb")
    line = [*words("pal_rafdb", tmp_path, root), *VGG]
    with pytest.raises(ConfigError, match=r"run: affect prepare dataset=rafdb .*prepare=landmarks_only"):
        train.run(compose("train", line))
    paths = [f"paths.{key}={tmp_path / key}" for key in ("cache", "prepared")]
    prepare = ["prepare", "dataset=rafdb", f"dataset.root={root}", "prepare=landmarks_only"]
    assert main([*prepare, "workers=0", "format=png", *paths]) == 0
    table = FaceTable.open(next((tmp_path / "prepared" / "rafdb").rglob("table-*.arrow")))
    assert "landmarks_68" in table.names
    capsys.readouterr()
    train.run(compose("train", line))
    assert results_of(tmp_path)["metrics"]["test"]


def test_images_without_points_are_an_error_that_says_how_to_find_them(
    tmp_path: Path, trees: Callable[[str], Path]
) -> None:
    line = [*words("pal_rafdb", tmp_path, trees("rafdb")), *VGG, "prepare=none"]
    with pytest.raises(
        ConfigError,
        match=r"objective pal: none of \d+ training rows has landmarks of scheme 68 .*prepare=landmarks_only",
    ):
        train.run(compose("train", line))
    assert not (tmp_path / "output" / "results.json").exists()


def test_layers_and_tasks_that_do_not_exist_stop_before_training(tmp_path: Path, trees: Callable[[str], Path]) -> None:
    line = [*words("pal_affectnet7", tmp_path, trees("affectnet")), *VGG]
    with pytest.raises(
        ConfigError, match=r"objective pal: no layer 'encoder\.model\.features\.92'; did you mean encoder"
    ):
        train.run(compose("train", [*line, "objectives.pal.layer=encoder.model.features.92"]))
    with pytest.raises(ConfigError, match=r"objectives\.pal\.task=expresion: no such task; did you mean expression"):
        train.run(compose("train", [*line, "objectives.pal.task=expresion"]))
    unused = ("objectives.pal.layer=encoder.model", "objectives.pal.weight=0")
    with pytest.raises(ConfigError, match=r"objective pal: .*never calls layer encoder\.model .*did you mean encoder"):
        train.run(compose("train", [*line, *unused]))
    with pytest.raises(
        ConfigError, match=r"encoder\.model\.features\.28 is changed in place .*encoder\.model\.features"
    ):
        train.run(compose("train", [*line, "objectives.pal.layer=encoder.model.features.28"]))
    with pytest.raises(ConfigError, match=r"objective pal: none of .* scheme 98 .*objectives\.pal\.scheme=68, which"):
        train.run(compose("train", [*line, "objectives.pal.scheme='98'"]))
    assert not list((tmp_path / "output").glob("*.ckpt"))


def test_without_the_file_of_vggface_the_experiment_stops_and_names_it(
    tmp_path: Path, trees: Callable[[str], Path]
) -> None:
    line = [word for word in words("pal_affectnet7", tmp_path, trees("affectnet")) if word != "debug=fast"]
    config = compose("train", line)
    with pytest.raises(CheckpointError, match=r"encoder\.weights=<VGG_FACE\.caffemodel.*allow_imagenet=true"):
        train.run(config)


@pytest.mark.slow
def test_imagenet_weights_are_said_beside_the_results(
    tmp_path: Path, trees: Callable[[str], Path], monkeypatch: pytest.MonkeyPatch
) -> None:
    import timm

    create = timm.create_model
    monkeypatch.setattr(timm, "create_model", lambda name, pretrained=False, **more: create(name.split(".")[0], **more))
    line = [*words("pal_affectnet7", tmp_path, trees("affectnet")), *VGG[1:]]
    line += ["encoder.pretrained=true", "encoder.allow_imagenet=true"]
    train.run(compose("train", line))
    results = results_of(tmp_path)
    assert any("not from VGGFace" in note for note in results["data"]["notes"])
    assert "in place of VGGFace" in results["initial_weights"]["encoder"]["encoder"]

    # Its release brings its own weights and the means that it was trained with.
    from affect.release import build_model, build_tasks, read_release

    release = read_release(tmp_path / "output")
    encoder = build_model(release, build_tasks(release)).encoder
    assert encoder.mean == pytest.approx((0.485, 0.456, 0.406))
    assert list(encoder.mean) == pytest.approx(release.preprocess["mean"])


def test_the_objective_is_chosen_by_its_name_and_left_out_by_null(tmp_path: Path, trees: Callable[[str], Path]) -> None:
    config = compose("train", ["objective=privileged_attribution", "objectives.pal.layer=encoder.model.layer3"])
    assert config.objectives.pal.weight == 1.0
    assert compose("train").objectives == {}
    line = [*words("pal_affectnet7", tmp_path, trees("affectnet")), *VGG, "objectives.pal=null"]
    train.run(compose("train", line))
    assert results_of(tmp_path)["metrics"]["test"]
    assert "objectives" not in results_of(tmp_path)["findings"]


@pytest.mark.parametrize(
    "name",
    [pytest.param(name, marks=pytest.mark.slow) for name in ("thin_rafdb", "thin_affectnet7", "thin_affectnet8")],
)
def test_thin_trains_on_an_exogenous_stage_of_its_own(name: str, tmp_path: Path, trees: Callable[[str], Path]) -> None:
    data = "rafdb" if name == "thin_rafdb" else "affectnet"
    variable = {
        "rafdb": ["task.exogenous.column=age_group"],
        "affectnet": ["task.exogenous.column=valence", "task.exogenous.bins=[-1,0,1]"],
    }[data]
    small = [*VGG[:1], "encoder.image_size=64", *VGG[2:]]
    base = [*SMALL, *(f"paths.{key}={tmp_path / key}" for key in ("cache", "prepared")), f"dataset.root={trees(data)}"]
    stage1 = [f"dataset={data}", "model=exogenous", "task=[exogenous]", *variable]
    stage1 += ["encoder=vgg16_vggface", "encoder.output=map", f"paths.output={tmp_path / 'stage1'}"]
    train.run(compose("train", [*stage1, *base, *small]))
    classes = len(json.loads((tmp_path / "stage1" / "results.json").read_text())["labels"]["exogenous"])
    stage2 = [f"experiment={name}", f"paths.output={tmp_path / 'output'}", "model.exogenous.hidden=[64]"]
    stage2 += [f"model.exogenous.weights={tmp_path / 'stage1'}", f"model.exogenous.classes={classes}"]
    train.run(compose("train", [*stage2, *base, *small]))
    results = results_of(tmp_path)
    assert len(results["labels"]["expression"]) == (int(name[-1]) if data == "affectnet" else 7)
    assert 0 <= results["findings"]["dispelling"]["abs_cos"] <= 1
    assert len(results["findings"]["gate"]["usage"][0]) == 32
    assert results["config"]["data"]["sampling"]["kind"] == ("uniform" if data == "rafdb" else "balanced")


def test_thin_stops_and_names_what_it_needs(tmp_path: Path, trees: Callable[[str], Path]) -> None:
    line = words("thin_affectnet7", tmp_path, trees("affectnet"))
    with pytest.raises(CheckpointError, match=r"encoder\.weights=<VGG_FACE\.caffemodel.*allow_imagenet=true"):
        train.run(compose("train", [word for word in line if word != "debug=fast"]))
    with pytest.raises(ConfigError, match=r"model\.exogenous\.weights: name the folder of a finished run"):
        train.run(compose("train", [*line, *VGG[:1], "encoder.image_size=64", *VGG[2:], "model.exogenous.hidden=[8]"]))


@pytest.mark.slow
def test_task_tokens_learn_with_uncertainties_from_partial_labels(tmp_path: Path, trees: Callable[[str], Path]) -> None:
    line = words("task_token_affwild2", tmp_path, trees("affwild2_mtl"))
    line += ["encoder.name=test_resnet", "encoder.image_size=96", "encoder.pretrained=false", "figures=true"]
    config = compose("train", line)
    train.run(config)
    results = results_of(tmp_path)
    sigma = results["findings"]["weighting"]["sigma"]
    assert [len(sigma[name]) for name in ("au", "expression", "valence_arousal")] == [12, 1, 2]
    assert {record["name"] for record in results["headline"]} == {"P_MTL", "P_VA", "P_EXPR", "P_AU"}
    stored = OmegaConf.create(results["config"])
    assert stored.task.valence_arousal.loss == {"_target_": "affect.losses.MSE"}
    figures = {path.name for path in (tmp_path / "output" / "figures").iterdir()}
    assert {"valence_arousal_circumplex.png", "expression_confusion.png", "au_reliability.png"} <= figures
    assert torch.isfinite(torch.tensor([value for by in sigma.values() for value in by.values()])).all()
