# SPDX-License-Identifier: Apache-2.0
"""``affect synthesize layout=…``: official trees of drawn faces, the same each time, never over anything else."""

from __future__ import annotations

import importlib
import json
import re
import shlex
from pathlib import Path

import numpy as np
import pytest
from omegaconf import OmegaConf

from affect.commands import assembly, configuration
from affect.commands.main import main
from affect.data.check import SYNTHETIC
from affect.data.images import FileImages

SMALL = ("dataset.count=24", "dataset.dials.image_size=48", "dataset.dials.subjects=12")


def layouts() -> dict[str, str]:
    """Return the datasets of the package whose layout can be written, and its module."""
    found = {}
    for path in sorted((configuration.config_directory() / "dataset").glob("*.yaml")):
        target = str((OmegaConf.load(path).get("read") or {}).get("_target_", ""))
        if target.startswith("affect.data.layouts."):
            try:
                module = importlib.import_module(target.rpartition(".")[0])
            except ModuleNotFoundError:
                continue
            if hasattr(module, "dress"):
                found[path.stem] = module.__name__
    return found


def one_per_module() -> list[str]:
    return list({module: name for name, module in reversed(layouts().items())}.values())


def synthesize(name: str, out: Path, *more: str) -> int:
    return main(["synthesize", f"layout={name}", f"out={out}", *SMALL, *more])


def contents(folder: Path) -> dict[str, bytes]:
    return {str(path.relative_to(folder)): path.read_bytes() for path in sorted(folder.rglob("*")) if path.is_file()}


@pytest.mark.parametrize("name", layouts())
def test_a_tree_is_read_back_as_the_dataset(name: str, tmp_path: Path, capfd: pytest.CaptureFixture[str]) -> None:
    out = tmp_path / "a tree"
    assert synthesize(name, out) == 0, capfd.readouterr().err
    captured = capfd.readouterr()
    written = int(re.search(r"(\d+) drawn faces in the layout", captured.out)[1])
    assert 12 < written <= 24, "a dataset that lacks a class leaves its faces out"
    assert f"{written}/{written}" in captured.err, "no progress bar"
    config = configuration.compose("train", [f"dataset={name}", f"dataset.root={out}"])
    table = assembly.make(config.dataset.read, "dataset")
    assert len(table) == written
    sources = assembly.build_sources(config, None) if config.dataset.get("images") else []
    images = sources[0].images if sources else FileImages(table)
    assert all(image.std() > 1 for image in images.read(np.arange(written)))
    commands = [shlex.split(line) for line in captured.out.splitlines() if line.startswith("  affect ")]
    kinds = [words[1] for words in commands]
    assert kinds == ["check", *(["prepare"] if config.prepare.get("stored") else []), "train"]
    assert all(words[2:4] == [f"dataset={name}", f"dataset.root={out}"] for words in commands)
    trained = configuration.compose("train", commands[-1][2:])
    for task in assembly.build_tasks(trained).values():
        assert set(task.wanted()) & table.names or not task.wanted()


@pytest.mark.parametrize(
    ("name", "size"), [("rafdb", (100, 100)), ("celeba", (178, 218)), ("affectnet", (224, 224)), ("wflw", (48, 48))]
)
def test_pictures_have_the_official_size_and_their_points_with_them(
    name: str, size: tuple[int, int], tmp_path: Path
) -> None:
    assert synthesize(name, tmp_path) == 0
    config = configuration.compose("train", [f"dataset={name}", f"dataset.root={tmp_path}"])
    table = assembly.make(config.dataset.read, "dataset")
    pictures = FileImages(table).read(np.arange(len(table)))
    assert {picture.shape[1::-1] for picture in pictures} == {size}
    for column in {"landmarks_5", "landmarks_68"} & table.names:
        values, known = table.numbers(column)
        middle = values[known].reshape(known.sum(), -1, 2).mean((0, 1))
        assert np.abs(middle / size - 0.5).max() < 0.12, "faces lie about the middle of their pictures"


@pytest.mark.parametrize("name", one_per_module())
def test_a_tree_is_the_same_each_time(name: str, tmp_path: Path) -> None:
    assert synthesize(name, tmp_path / "one") == 0
    assert synthesize(name, tmp_path / "two") == 0
    assert contents(tmp_path / "one") == contents(tmp_path / "two")


def test_a_run_that_was_stopped_is_continued_by_the_same_command(tmp_path: Path) -> None:
    assert synthesize("wflw", tmp_path / "tree") == 0
    first = contents(tmp_path / "tree")
    (tmp_path / "tree" / next(path for path in first if path != SYNTHETIC)).unlink()
    assert synthesize("wflw", tmp_path / "tree") == 0
    assert first == contents(tmp_path / "tree")


def test_options_of_the_dataset_shape_its_tree(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert synthesize("300w", tmp_path / "tree", "options={box: detector}") == 0
    out = capsys.readouterr().out
    assert out.count("dataset.box=detector") == 2
    assert (tmp_path / "tree" / "Bounding Boxes" / "bounding_boxes_afw.mat").is_file()
    note = (tmp_path / "tree" / SYNTHETIC).read_text()
    assert json.loads(note.partition("```json")[2].partition("```")[0])["options"] == {"box": "detector"}
    assert synthesize("300w", tmp_path / "other", "options={boxx: detector}") == 2
    assert "options.boxx: dataset=300w has no such key; did you mean box?" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (("layout=wflv",), "layout=wflv: unknown; did you mean wflw?"),
        (("layout=orl",), "layout=orl: it is no dataset that can be written"),
        (("layout=wflw", "dataset.count=11"), "dataset.count=11: a layout needs at least 12 faces"),
        (("options={box: detector}",), "options=… are those of a layout"),
    ],
)
def test_what_cannot_be_written(
    words: tuple[str, ...], message: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert main(["synthesize", f"out={tmp_path / 'tree'}", *words]) == 2
    assert message in capsys.readouterr().err
    assert not (tmp_path / "tree").exists()


def test_another_folder_is_left_alone(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    mine = tmp_path / "mine"
    mine.mkdir()
    (mine / "photo.jpg").write_bytes(b"mine")
    assert synthesize("wflw", mine) == 2
    assert "the folder is not empty and not of this command" in capsys.readouterr().err
    assert contents(mine) == {"photo.jpg": b"mine"}
    assert synthesize("wflw", mine / "photo.jpg") == 2
    assert "not a folder" in capsys.readouterr().err
    assert synthesize("wflw", tmp_path / "tree") == 0
    before = contents(tmp_path / "tree")
    assert synthesize("wflw", tmp_path / "tree", "dataset.seed=1") == 2
    assert "it holds drawn faces of other settings" in capsys.readouterr().err
    assert contents(tmp_path / "tree") == before


def test_a_layout_of_ones_own_is_found_beside_its_configuration(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    conf = tmp_path / "mine" / "conf"
    (conf / "dataset").mkdir(parents=True)
    leaf = (configuration.config_directory() / "dataset" / "wflw.yaml").read_text()
    (conf / "dataset" / "my_wflw.yaml").write_text(leaf.replace("name: wflw", "name: my_wflw"))
    out = tmp_path / "tree"
    assert synthesize("my_wflw", out, "--config-dir", str(conf)) == 0
    assert f"affect check dataset=my_wflw dataset.root={out}" in capsys.readouterr().out
