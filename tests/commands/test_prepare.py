# SPDX-License-Identifier: Apache-2.0
"""``affect prepare``, and how a training finds what it made."""

from __future__ import annotations

import importlib.util
import re
import shlex
import shutil

import numpy as np
import pytest
from hydra import compose, initialize_config_dir

from affect.commands import assembly
from affect.commands.configuration import config_directory
from affect.commands.main import main
from affect.commands.prepare import read_shard
from affect.commands.prepared import stored_recipes
from affect.data import faces
from affect.data.archives import ShardImages
from affect.data.faces import FaceDials, FaceImages
from affect.data.images import read_image
from affect.data.layouts.common import write_image
from affect.data.table import FaceTable
from affect.errors import ConfigError

DIALS = FaceDials(image_size=64, subjects=4, missing_landmarks=0.0)
OWN = ["prepare.provider=annotations", "workers=0"]


@pytest.fixture(scope="module")
def delivered(tmp_path_factory):
    """Built-in faces as a user's own table beside a folder of images."""
    root = tmp_path_factory.mktemp("delivered")
    table = FaceTable.from_arrow(faces.labels_table(DIALS, 3, 12), root, {"dataset": "mine"})
    names = [f"{k}.png" for k in range(12)]
    for name, image in zip(names, FaceImages(DIALS, 3).read(np.arange(12)), strict=True):
        write_image(root / name, image)
    table.with_columns({"image": names}).save(root / "labels.arrow")
    return root


@pytest.fixture(autouse=True)
def user(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)


def sources(*overrides, command="train"):
    with initialize_config_dir(str(config_directory()), version_base="1.3"):
        config = compose(command, ["task=[au]", "encoder.image_size=48", *overrides])
        return assembly.build_sources(config, assembly.make(config.prepare, "prepare"))


def test_prepare_and_train_find_each_other_by_the_same_keys(delivered, tmp_path, capsys):
    keys = ["dataset=table", f"dataset.table={delivered / 'labels.arrow'}", "prepare=similarity49_200"]
    keys += ["prepare.provider=annotations"]
    with pytest.raises(ConfigError, match="table is not prepared with recipe similarity49_200") as caught:
        sources(*keys)
    command = re.search(r"run: affect (prepare .*)$", str(caught.value))[1].replace("<folder as delivered>", "null")
    assert main([*shlex.split(command), "workers=0"]) == 0
    assert "12 crops of 12 rows" in capsys.readouterr().out
    (source,) = sources(*keys)
    assert (source.recipe.kind, source.recipe.size) == ("none", 48)
    assert source.prepared.window == 176
    assert source.described == source.prepared
    assert [image.shape for image in source.images.read(np.arange(2))] == [(200, 200, 3)] * 2
    with pytest.raises(ConfigError, match=r"prepare.stored=200, wanted 160; run: .*prepare.stored=160"):
        sources(*keys, "prepare.stored=160", "prepare.window=0")


def test_job_arrays_are_merged(delivered, tmp_path, capsys):
    line = ["prepare", "dataset=table", f"dataset.table={delivered / 'labels.arrow'}", "prepare=box5", "store=shards"]
    line += OWN
    assert main([*line, "merge=true"]) == 2
    assert "1 of 1 units are not done (number 0)" in capsys.readouterr().err
    assert main([*line, "shard=0/2"]) == 0
    assert "shard 0/2 is done; 0 of 1 units are left" in capsys.readouterr().out
    assert main([*line, "shard=1/2"]) == 0
    assert not list(tmp_path.rglob("table-*"))
    assert main([*line, "merge=true"]) == 0
    (source,) = sources(*line[1:4], "prepare.provider=annotations")
    assert isinstance(source.images, ShardImages)
    assert main([*line, "merge=true", "shard=0/2"]) == 2


@pytest.mark.parametrize("given", ["2/2", "1", "a/b", "-1/4", "1/2/3"])
def test_shards_that_do_not_exist(given):
    with pytest.raises(ConfigError, match="write shard=i/n with i from 0 to n - 1"):
        read_shard(given)


def test_a_recipe_that_stores_nothing_needs_no_preparing(capsys, tmp_path):
    assert main(["prepare", "dataset=faces", "prepare=similarity"]) == 0
    said = " ".join(capsys.readouterr().out.split())
    assert "prepare=similarity stores nothing, so nothing has to be prepared" in said
    assert "box5, landmarks_only, mtcnn_256_224, similarity49_200, similarity68_299" in said
    assert not list(tmp_path.rglob("*"))


def test_recipes_of_the_literature_are_stored_ones():
    assert stored_recipes() == ["box5", "landmarks_only", "mtcnn_256_224", "similarity49_200", "similarity68_299"]


def test_points_that_the_set_does_not_have(delivered, tmp_path, capsys):
    table = FaceTable.open(delivered / "labels.arrow")
    FaceTable.from_columns({"image": table.column("image")}, delivered).save(tmp_path / "bare.arrow")
    line = ["prepare", "dataset=table", "dataset.table=bare.arrow", f"dataset.root={delivered}"]
    assert main([*line, "prepare=similarity68_299", *OWN]) == 2
    assert "table has no landmarks of its own; use prepare.provider=faceapi" in capsys.readouterr().err


def test_whole_images_are_for_sets_delivered_as_crops(delivered, tmp_path):
    keys = ["dataset=table", f"dataset.table={delivered / 'labels.arrow'}"]
    with pytest.raises(
        ConfigError, match=r"table is not delivered as crops: use one of box5, .*affect prepare"
    ) as caught:
        sources(*keys, "prepare=none", "++dataset.cropped=false")
    assert "landmarks_only" not in str(caught.value), "it keeps whole images too"
    assert "crop while loading by what it has with prepare=similarity or box" in str(caught.value)
    table = FaceTable.open(delivered / "labels.arrow")
    FaceTable.from_columns({"image": table.column("image")}, delivered).save(tmp_path / "bare.arrow")
    keys = ["dataset=table", f"dataset.table={tmp_path / 'bare.arrow'}", f"dataset.root={delivered}"]
    with pytest.raises(ConfigError, match=r"use one of box5, .* with affect prepare$"):
        sources(*keys, "prepare=none", "++dataset.cropped=false")
    keys = ["dataset=table", f"dataset.table={delivered / 'labels.arrow'}"]
    (source,) = sources(*keys, "prepare=none", "++dataset.cropped=true")
    assert source.prepared is None


def test_cropping_while_loading_needs_points_or_boxes(delivered, tmp_path):
    table = FaceTable.open(delivered / "labels.arrow")
    FaceTable.from_columns({"image": table.column("image")}, delivered).save(tmp_path / "bare.arrow")
    keys = ["dataset=table", "dataset.table=bare.arrow", f"dataset.root={delivered}", "++dataset.cropped=true"]
    with pytest.raises(ConfigError, match=r"has no points to crop by: .*with affect prepare, or prepare=none"):
        sources(*keys, "prepare=similarity")
    with pytest.raises(ConfigError, match="has no boxes to crop by"):
        sources(*keys, "prepare=box")


def test_labels_that_changed_after_preparing_are_read_again(delivered, tmp_path):
    table = FaceTable.open(delivered / "labels.arrow").with_columns({"au12_occurrence": np.zeros(12)})
    FaceTable(table.arrow, delivered, {}).save(tmp_path / "mine.arrow")
    keys = ["dataset=table", "dataset.table=mine.arrow", "prepare=box5", "prepare.provider=annotations"]
    assert main(["prepare", *keys, "workers=0"]) == 0
    (source,) = sources(*keys)
    assert not source.table.numbers("au12_occurrence")[0].any()
    changed = table.with_columns({"au12_occurrence": np.ones(12)})
    FaceTable(changed.arrow, delivered, {}).save(tmp_path / "mine.arrow")
    with pytest.raises(ConfigError, match=r"mine.arrow is not what was prepared from .*; run: affect prepare"):
        sources(*keys)
    assert main(["prepare", *keys, "workers=0"]) == 0
    (source,) = sources(*keys)
    assert source.table.numbers("au12_occurrence")[0].all()


def test_crops_of_one_delivery_are_not_taken_for_those_of_another(tmp_path):
    assert main(["synthesize", "layout=disfaplus", "dataset.count=16", "out=one"]) == 0
    shutil.copytree("one", "two")  # with the times of the files: the same delivery in another place
    keys = ["dataset=disfaplus", "prepare=landmarks_only", "prepare.provider=annotations"]
    assert main(["prepare", *keys, "dataset.root=one", "workers=0"]) == 0
    (first,) = sources(*keys, "dataset.root=two")
    before = first.images.read(np.arange(len(first.table)))
    for path in (tmp_path / "two").rglob("*.jpg"):
        write_image(path, 255 - read_image(path))
    with pytest.raises(ConfigError, match=r"two/Images/.* is not what was prepared from .*one; run: affect .*two"):
        sources(*keys, "dataset.root=two")
    assert main(["prepare", *keys, "dataset.root=two", "workers=0"]) == 0
    (second,) = sources(*keys, "dataset.root=two")
    for image, other in zip(second.images.read(np.arange(len(before))), before, strict=True):
        assert np.abs(image.astype(int) - (255 - other)).mean() < 8
    with pytest.raises(ConfigError, match=r"one/.* is not what was prepared from .*two"):
        sources(*keys, "dataset.root=one")
    (tmp_path / "one").rename(tmp_path / "gone")
    assert len(sources(*keys, "dataset.root=one")[0].table) == len(before)


@pytest.mark.skipif(importlib.util.find_spec("facenet_pytorch") is not None, reason="the package is installed")
def test_a_detector_that_is_missing_leaves_nothing_behind(delivered, tmp_path, capsys):
    keys = ["dataset=table", f"dataset.table={delivered / 'labels.arrow'}", "prepare=mtcnn_256_224", "workers=0"]
    assert main(["prepare", *keys]) == 2
    assert "facenet-pytorch==2.6.0" in capsys.readouterr().err
    assert not list(tmp_path.rglob("recipe.json"))


def test_faces_of_one_photograph_stay_together_as_crops(delivered, tmp_path):
    table = FaceTable.open(delivered / "labels.arrow")
    twice = table.take(np.repeat(np.arange(12), 2))
    columns = {name: twice.column(name) for name in twice.names - {"subject"}}
    FaceTable.from_columns(columns, delivered).save(tmp_path / "twice.arrow")
    keys = ["dataset=table", "dataset.table=twice.arrow", f"dataset.root={delivered}", "dataset.group=image"]
    keys += ["prepare=box5", "prepare.provider=annotations"]
    assert main(["prepare", *keys, "workers=0"]) == 0
    (source,) = sources(*keys)
    assert len(set(source.table.strings("image")[0])) == 24
    assert len(set(source.table.strings(source.group)[0])) == 12
