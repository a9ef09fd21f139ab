# SPDX-License-Identifier: Apache-2.0
"""The experiments of DeCaFA train on drawn faces in the official trees, also on three sets with a scheme each."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import pytorch_lightning as pl
import torch
from omegaconf import DictConfig
from safetensors.torch import load_file

from affect.commands import assembly, train
from affect.commands.configuration import compose
from affect.commands.synthesize import Tree
from affect.data.faces import FaceDials
from affect.data.table import FaceTable
from affect.models.decafa import Decafa

SMALL = (
    "encoder.image_size=16", "model.stages=2", "model.widths=[4,6]", "model.convolutions=1", "debug=fast",
    "callbacks.progress=null", "trainer.enable_progress_bar=false", "logger=none", "bootstrap.resamples=0",
    "data.sampling.length=16", "data.batch_size=4", "data.limit=16", "figures=false",
)  # fmt: skip


@pytest.fixture(scope="module")
def tree(tmp_path_factory: pytest.TempPathFactory) -> Callable[..., Path]:
    """Return a function that gives the root of a dataset as it is delivered, with drawn faces in it."""
    folder = tmp_path_factory.mktemp("trees")

    def root(name: str, **options: str) -> Path:
        if not (folder / name).is_dir():
            Tree.of(name, folder / name, options).write(FaceDials(image_size=48, subjects=12), 0, 32)
        return folder / name

    return root


def composed(tmp_path: Path, name: str, *overrides: str) -> DictConfig:
    places = [f"paths.output={tmp_path / 'run'}", f"paths.cache={tmp_path / 'cache'}"]
    return compose("train", [f"experiment={name}", *SMALL, *places, *overrides])


def numbers(tmp_path: Path) -> dict:
    return json.loads((tmp_path / "run" / "results.json").read_text())


def joint(tmp_path: Path, tree: Callable[..., Path], *overrides: str) -> DictConfig:
    roots = {"wflw": tree("wflw"), "set300w": tree("300w"), "celeba": tree("celeba", pictures="wild")}
    given = [f"dataset.sources.{key}.root={root}" for key, root in roots.items()]
    return composed(tmp_path, "decafa_joint", *given, *overrides)


@pytest.mark.slow
def test_three_sets_with_three_schemes_are_learnt_by_turns(tmp_path: Path, tree: Callable[..., Path]) -> None:
    config = joint(tmp_path, tree)
    train.run(config)
    results = numbers(tmp_path)
    assert [source["name"] for source in results["data"]["sources"]] == ["wflw", "300w", "celeba"]
    assert {record["task"] for record in results["metrics"]["test"]} == {"landmarks_98", "landmarks_68", "landmarks_5"}
    assert [record["name"] for record in results["headline"]] == [f"NME of {p} points" for p in (98, 68, 5)]
    stages = results["findings"]["stages"]
    assert {task: len(found["nme"]) for task, found in stages.items()} == dict.fromkeys(stages, 2)
    subsets = {(record["task"], record["subgroup"]) for record in results["metrics"]["test"] if record["subgroup"]}
    table = FaceTable.read_parquet(tmp_path / "run" / "predictions" / "test.parquet")
    held = {name for name in config.protocol.subsets if (table.numbers(f"subset_{name}")[0] == 1).any()}
    assert held > {"common", "challenge"}, "no tested face is in a subset of WFLW"
    assert subsets == {("landmarks_68" if name in ("common", "challenge") else "landmarks_98", name) for name in held}
    for task, found in stages.items():  # the last stage is what predicts
        (record,) = [
            r for r in results["metrics"]["test"] if (r["task"], r["name"]) == (task, "nme") and not r["subgroup"]
        ]
        assert found["nme"][-1] == pytest.approx(record["value"], rel=1e-4), task


@pytest.mark.slow
def test_batches_of_the_joint_training_hold_one_set_and_one_scheme(tmp_path: Path, tree: Callable[..., Path]) -> None:
    config = joint(tmp_path, tree)
    tasks = assembly.build_tasks(config)
    recipe = assembly.make(config.prepare, "prepare")
    data = assembly.build_datamodule(config, assembly.build_sources(config, recipe), tasks, 16)
    data.setup("fit")
    schemes = {0: "landmarks_98", 1: "landmarks_68", 2: "landmarks_5"}
    turns = []
    for batch in data.train_dataloader():
        (source,) = set(batch.source.tolist())
        turns.append(source)
        assert {name for name, mask in batch.masks.items() if mask.any()} == {schemes[source]}
    assert sorted(turns[:3]) == [0, 1, 2]
    module = assembly.build_model(assembly.bound_config(config, tasks), tasks)
    assert isinstance(module, Decafa)
    assert list(module.cascade.schemes) == ["98", "68", "5"]
    assert set(module(batch)) == set(schemes.values()), "every scheme is predicted for every face"


@pytest.mark.slow
@pytest.mark.parametrize(
    ("name", "dataset", "options"),
    [
        ("decafa_300w", "300w", {}),
        ("decafa_wflw", "wflw", {}),
        ("decafa_celeba", "celeba", {"pictures": "wild"}),
    ],
)
def test_experiments_on_one_set(
    name: str, dataset: str, options: dict, tmp_path: Path, tree: Callable[..., Path]
) -> None:
    train.run(composed(tmp_path, name, f"dataset.root={tree(dataset, **options)}"))
    results = numbers(tmp_path)
    assert [record["name"] for record in results["headline"]] == ["NME", "FR", "AUC"]
    assert results["reference"]["metric"] in results["findings"]["stages"]


@pytest.mark.slow
def test_the_small_one_on_built_in_faces_draws_its_stages(tmp_path: Path) -> None:
    small = ["dataset.count=40", "dataset.dials.image_size=32", "dataset.dials.subjects=10", "figures=true"]
    train.run(composed(tmp_path, "decafa_faces", *small))
    drawn = {path.name for path in (tmp_path / "run" / "figures").iterdir()}
    assert {f"landmarks_{scheme}_stages.png" for scheme in ("98", "68", "5")} <= drawn
    assert {f"landmarks_{scheme}.png" for scheme in ("98", "68", "5")} <= drawn


def test_joint_training_is_told_by_the_subsets_of_its_sets() -> None:
    joint, *own = (compose("train", [f"experiment=decafa_{name}"]).protocol for name in ("joint", "300w", "wflw"))
    assert joint.subsets == {**own[0].subsets, **own[1].subsets}
    assert len(joint.subsets) == 2 + 6


def test_updates_and_rates_are_those_recalled_of_the_paper() -> None:
    for name, sets in (("decafa_300w", 1), ("decafa_wflw", 1), ("decafa_celeba", 1), ("decafa_joint", 3)):
        config = compose("train", [f"experiment={name}"])
        updates = config.trainer.max_epochs * config.data.sampling.length // config.data.batch_size
        assert updates == sets * 400_000, name
        assert (config.optimizer.lr, config.scheduler.power, config.encoder.image_size) == (5e-4, 0.9, 128)


class StoppedError(Exception):
    """What stops a run in the middle of an epoch."""


class Stop(pl.callbacks.Checkpoint):
    """Lightning runs this kind last, after last.ckpt was written."""

    def on_train_batch_end(self, trainer: pl.Trainer, *arguments: Any) -> None:
        if trainer.global_step == 3:
            raise StoppedError


@pytest.mark.slow
def test_training_by_turns_continues_bit_identically_where_it_stopped(
    tmp_path: Path, tree: Callable[..., Path], monkeypatch: pytest.MonkeyPatch
) -> None:
    def config(folder: str) -> DictConfig:
        given = [f"paths.output={tmp_path / folder}", "trainer.max_epochs=2"]
        return joint(tmp_path, tree, *given, "selection=last", "callbacks.last.every_n_steps=1")

    train.run(config("whole"))
    with monkeypatch.context() as patch:
        plain = train.build_trainer

        def stopping(*arguments: Any) -> pl.Trainer:
            trainer = plain(*arguments)
            trainer.callbacks.append(Stop())  # type: ignore[attr-defined]
            return trainer

        patch.setattr(train, "build_trainer", stopping)
        with pytest.raises(StoppedError):
            train.run(config("cut"))
    train.run(config("cut"))
    whole, cut = (load_file(tmp_path / name / "release" / "model.safetensors") for name in ("whole", "cut"))
    assert whole.keys() == cut.keys()
    for name, value in whole.items():
        assert torch.equal(value, cut[name]), name
