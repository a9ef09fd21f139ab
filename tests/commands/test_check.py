# SPDX-License-Identifier: Apache-2.0
"""``affect check`` through the dispatcher: report, sheet, exit codes, and that a training heeds what it says."""

from __future__ import annotations

import json
import re
import shlex
import shutil
from collections.abc import Callable
from pathlib import Path

import cv2
import numpy as np
import pytest
from omegaconf import DictConfig, OmegaConf

from affect.commands import train
from affect.commands.check import decoded_sample, verified
from affect.commands.main import main
from affect.commands.synthesize import Tree
from affect.data import faces
from affect.data.faces import FaceDials, FaceImages
from affect.data.table import FaceTable
from affect.errors import ConfigError, DataError
from tests.conftest import SMALL

DIALS = FaceDials(image_size=48, subjects=8)
COUNT = 40

LEAF = """
# An invented dataset: a table, and numbers that were published of it.
name: invented
root: ???
group: subject
expressions: null
aus: null
rows: 40
source_found: true
read:
  _target_: affect.data.layouts.table.read
  table: ${..root}/labels.parquet
  root: ${..root}
images: null
expected:
  _target_: invented_numbers.expected
  rows: ${..rows}
  found: ${..source_found}
"""

MODULE = """
from affect.data.expected import Expected

def expected(rows, found):
    return (
        Expected("rows", rows, "the invented paper", found, {41: "the variant of somebody"}),
        Expected("size", (48, 48), "the invented paper"),
    )
"""


@pytest.fixture(scope="module")
def conf(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("extension")
    (folder / "conf" / "dataset").mkdir(parents=True)
    (folder / "conf" / "dataset" / "invented.yaml").write_text(LEAF)
    (folder / "invented_numbers.py").write_text(MODULE)
    return folder / "conf"


@pytest.fixture(scope="module")
def drawn() -> tuple[FaceTable, list[np.ndarray]]:
    table = FaceTable.from_arrow(faces.labels_table(DIALS, 5, COUNT), ".", {"dataset": "invented"})
    return table, FaceImages(DIALS, 5).read(np.arange(COUNT))


@pytest.fixture
def tree(tmp_path: Path, drawn: tuple[FaceTable, list[np.ndarray]], monkeypatch: pytest.MonkeyPatch) -> Path:
    """A dataset of built-in faces on disk; the current folder is an empty one."""
    root = tmp_path / "tree"
    (root / "images").mkdir(parents=True)
    table, images = drawn
    for k, image in enumerate(images):
        cv2.imwrite(str(root / "images" / f"{k:02d}.png"), image[..., ::-1])
    names = [f"images/{k:02d}.png" for k in range(COUNT)]
    table.with_columns({"image": names}).to_parquet(root / "labels.parquet")
    (tmp_path / "user").mkdir()
    monkeypatch.chdir(tmp_path / "user")
    return root


@pytest.fixture
def check(tree: Path, conf: Path) -> Callable[..., int]:
    """Return a function that runs the command and returns its exit code."""

    def run(*overrides: str) -> int:
        return main(["check", "--config-dir", str(conf), "dataset=invented", f"dataset.root={tree}", *overrides])

    return run


def report(path: str | Path = "check.json") -> dict:
    return json.loads(Path(path).read_text())


def levels(path: str | Path = "check.json") -> dict[str, str]:
    return {finding["key"]: finding["level"] for finding in report(path)["findings"]}


def test_a_sound_dataset_passes_with_a_report_and_a_sheet(
    check: Callable[..., int], tree: Path, capsys: pytest.CaptureFixture
) -> None:
    assert check("report=check.json") == 0
    said = report()
    assert (said["ok"], said["rows"], said["dataset"], said["root"]) == (True, COUNT, "invented", str(tree))
    assert said["images"] == {
        "images": COUNT, "headers": COUNT, "decoded": COUNT, "sizes": {"48x48": COUNT}, "formats": {"PNG": COUNT},
        "pixels": {"colour": COUNT}, "problems": {},
    }  # fmt: skip
    assert levels()["rows"] == levels()["size"] == levels()["protocol"] == "ok"
    assert not {"error", "warning"} & set(levels().values())
    assert said["options"]["dataset"]["root"] == str(tree)
    assert said["expected"][0]["variants"] == {"41": "the variant of somebody"}
    sheet = cv2.imread("check.png")
    assert sheet is not None
    assert sheet.std() > 20
    printed = capsys.readouterr().out.replace("\n", " ")
    assert f"next: affect train dataset=invented dataset.root={tree}" in printed
    before = Path("check.png").read_bytes(), Path("check.json").read_bytes()
    assert check("report=check.json") == 0
    assert (Path("check.png").read_bytes(), Path("check.json").read_bytes()) == before


def test_the_report_lies_among_the_runs_where_no_place_is_given(check: Callable[..., int]) -> None:
    assert check("sheet=false", "paths.runs=there") == 0
    assert [path.name for path in Path("there/check/invented").iterdir()] == ["check.json"]


def test_wrong_counts_fail_until_they_are_accepted_by_name(
    check: Callable[..., int], capsys: pytest.CaptureFixture
) -> None:
    assert check("report=check.json", "sheet=false", "dataset.rows=99") == 2
    error = capsys.readouterr().err
    assert "1 error (rows): training would be on the wrong data" in error
    assert "accept=[rows]" in error
    assert error.count("\n") >= 1
    assert (report()["ok"], levels()["rows"]) == (False, "error")
    assert check("report=check.json", "sheet=false", "dataset.rows=99", "accept=[rows]") == 0
    assert (report()["ok"], report()["accepted"], levels()["rows"]) == (True, ["rows"], "accepted")
    assert "accept=[rows]" in capsys.readouterr().out.replace("\n", "")
    Path("check.json").unlink()
    assert check("report=check.json", "dataset.rows=99", "accept=[row]") == 2
    assert "accept=row: no finding has this key; did you mean rows" in capsys.readouterr().err
    assert levels()["rows"] == "error", "the report is written all the same"
    assert Path("check.png").is_file()


@pytest.mark.parametrize("override", ["protocol.test=challenge", "protocol.folds=100", "protocol.group=camera"])
def test_a_protocol_that_cannot_be_followed_fails(check: Callable[..., int], override: str) -> None:
    assert check("report=check.json", "sheet=false", override) == 2
    assert levels()["protocol"] == "error"
    assert check("report=check.json", "sheet=false", override, "accept=[protocol]") == 0


def test_a_part_of_the_protocol_without_rows_fails(check: Callable[..., int], tree: Path) -> None:
    table = FaceTable.read_parquet(tree / "labels.parquet")
    table.with_columns({"part": ["train"] * COUNT}).to_parquet(tree / "labels.parquet")
    assert check("report=check.json", "sheet=false", "protocol.test=challenge", "protocol.train=[train]") == 2
    assert levels()["protocol"] == "error"


def test_a_recalled_count_only_warns_and_a_variant_is_noted(check: Callable[..., int]) -> None:
    assert check("report=check.json", "sheet=false", "dataset.rows=99", "dataset.source_found=false") == 0
    assert levels()["rows"] == "warning"


def test_a_synthetic_tree_passes_with_other_counts(check: Callable[..., int], tree: Path) -> None:
    (tree / "SYNTHETIC.md").touch()
    assert check("report=check.json", "sheet=false", "dataset.rows=99") == 0
    assert (levels()["rows"], report()["synthetic"]) == ("note", True)


def test_images_that_cannot_be_used_are_listed_by_reason(check: Callable[..., int], tree: Path) -> None:
    images = tree / "images"
    whole = (images / "03.png").read_bytes()
    (images / "00.png").unlink()
    (images / "01.png").write_bytes(b"")
    (images / "02.png").write_text("an error page instead of an image")
    (images / "03.png").write_bytes(whole[: len(whole) // 2])
    jpeg = cv2.imencode(".jpg", cv2.imread(str(images / "04.png")))[1]
    (images / "04.png").write_bytes(jpeg.tobytes())
    cv2.imwrite(str(images / "05.png"), cv2.imread(str(images / "05.png"), cv2.IMREAD_GRAYSCALE))
    cv2.imwrite(str(images / "06.png"), np.zeros((30, 30, 3), np.uint8))
    assert check("report=check.json", "near_duplicates=true") == 2
    found = {finding["key"]: finding for finding in report()["findings"]}
    assert found["images/missing"]["examples"] == ["images/00.png"]
    assert found["images/empty"]["examples"] == ["images/01.png"]
    assert found["images/unreadable"]["examples"] == ["images/02.png", "images/03.png"]
    assert found["images/extension"]["examples"] == ["images/04.png"]
    assert found["images/grey"]["examples"] == ["images/05.png"]
    assert found["size"]["level"] == "error"
    assert found["near_duplicates"]["level"] == "note"
    assert report()["images"]["problems"] == {"missing": 1, "empty": 1, "unreadable": 2}
    assert report()["images"]["sizes"] == {"48x48": 35, "30x30": 1}
    assert Path("check.png").is_file()


def test_damage_inside_of_an_image_is_found_by_decoding(check: Callable[..., int], tree: Path) -> None:
    data = bytearray((tree / "images" / "07.png").read_bytes())
    data[60:400] = bytes(340)
    (tree / "images" / "07.png").write_bytes(data)
    assert check("report=check.json", "sheet=false", "decode=0") == 0
    assert check("report=check.json", "sheet=false", "decode=all") == 2
    assert levels()["images/unreadable"] == "error"


def test_copies_in_two_parts_are_found(check: Callable[..., int], tree: Path) -> None:
    table = FaceTable.read_parquet(tree / "labels.parquet")
    part = np.where(np.arange(COUNT) < 30, "train", "test").astype(object)
    subject = [f"s{k}" for k in range(COUNT)]
    table.with_columns({"part": part, "subject": subject}).to_parquet(tree / "labels.parquet")
    (tree / "images" / "35.png").write_bytes((tree / "images" / "05.png").read_bytes())
    assert check("report=check.json", "sheet=false", "near_duplicates=true") == 0
    found = {finding["key"]: finding for finding in report()["findings"]}
    assert found["near_duplicates"]["level"] == "warning"
    assert found["near_duplicates"]["examples"] == ["images/05.png (test, train)"]
    assert report()["parts"] == {"test": {"rows": 10, "groups": 10}, "train": {"rows": 30, "groups": 30}}
    assert found["protocol"]["measured"]["test"] == 10


def test_a_person_in_two_parts_fails(check: Callable[..., int], tree: Path, capsys: pytest.CaptureFixture) -> None:
    table = FaceTable.read_parquet(tree / "labels.parquet")
    part = np.where(np.arange(COUNT) < 30, "train", "test").astype(object)
    table.with_columns({"part": part}).to_parquet(tree / "labels.parquet")
    assert check("report=check.json", "sheet=false") == 2
    assert levels()["groups/subject"] == "error"
    assert levels()["protocol"] == "error"
    assert "groups/subject" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("name", "lost"),
    [
        ("affectnet", "train_set/images/*"),
        ("affwild2", "cropped_aligned/1-30-1280x720_left"),
        ("bp4dplus", "2D+3D/*.zip"),
        ("celeba", "**/*.jpg"),
        ("disfa", "Videos_LeftCamera/LeftVideoSN001_comp.avi"),
        ("disfaplus", "Images/SN001"),
        ("rafdb", "**/*.jpg"),
        ("300w", "**/*.jpg"),
        ("300w", "*/testset"),
        ("wflw", "**/*.jpg"),
    ],
)
def test_images_that_were_not_copied_fail_in_every_layout(
    name: str, lost: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    Tree.of(name, tmp_path / "tree", {}).write(DIALS, 0, COUNT)
    gone = sorted((tmp_path / "tree").glob(lost))
    for path in gone if all(map(Path.is_dir, gone)) else gone[::3]:
        (shutil.rmtree if path.is_dir() else Path.unlink)(path)
    assert main(["check", f"dataset={name}", "dataset.root=tree", "report=check.json", "sheet=false"]) == 2
    [key] = [key for key, level in levels().items() if level == "error"]
    assert key.startswith("protocol" if lost == "*/testset" else "skipped/")


@pytest.mark.parametrize(
    ("override", "message"),
    [
        ("decode=-1", "decode=-1: write a number of images, or all"),
        ("decode=some", "decode=some: write a number of images, or all"),
        ("near=true", "no key 'near'"),
        ("dataset.root=/nowhere/at/all", "no such folder"),
    ],
)
def test_mistakes_are_one_line(
    check: Callable[..., int], override: str, message: str, capsys: pytest.CaptureFixture
) -> None:
    assert check(override) == 2
    [line] = capsys.readouterr().err.strip().splitlines()[-1:]
    assert message in line


def test_the_dataset_has_to_be_named_and_help_shows_examples(capsys: pytest.CaptureFixture) -> None:
    assert main(["check"]) == 2
    assert "choose one of dataset" in capsys.readouterr().err
    assert main(["check", "--help"]) == 0
    assert "affect check dataset=bp4d dataset.root=/data/BP4D" in capsys.readouterr().out


def test_the_sample_is_spread_seeded_and_without_repetition() -> None:
    some = decoded_sample(100, 1000)
    assert len(np.unique(some)) == 100
    assert (np.diff(some) > 0).all()
    assert some.max() > 900
    assert some.min() < 100
    assert some.tolist() == decoded_sample(100, 1000).tolist()
    assert decoded_sample("all", 5).tolist() == decoded_sample(500, 5).tolist() == [0, 1, 2, 3, 4]
    assert len(decoded_sample(0, 5)) == 0


# -------------------------------------------------------------------------------------------------- in training


def training(compose: Callable[..., DictConfig], conf: Path, tree: Path, *overrides: str) -> DictConfig:
    settings = [value for value in SMALL if not value.startswith("dataset.")]
    return compose(
        "train", "dataset=invented", f"dataset.root={tree}", "task=[expression]", f"paths.output={tree.parent / 'run'}",
        *settings, *overrides, config_dir=conf,
    )  # fmt: skip


def test_a_training_stops_on_counts_of_other_data_and_keeps_what_is_accepted(
    compose: Callable[..., DictConfig], conf: Path, tree: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.syspath_prepend(str(conf.parent))
    with pytest.raises(DataError, match=r"invented: rows: found 40, expected 99.*accept=\[rows\]"):
        train.run(training(compose, conf, tree, "dataset.rows=99"))
    assert not (tree.parent / "run" / "results.json").exists()
    train.run(training(compose, conf, tree, "dataset.rows=99", "accept=[rows]"))
    results = report(tree.parent / "run" / "results.json")
    assert results["config"]["accept"] == ["rows"]
    assert "accepted: rows: found 40, expected 99" in json.dumps(results)
    assert OmegaConf.load(tree.parent / "run" / "config.yaml").accept == ["rows"]


def test_a_training_refuses_keys_that_no_check_has(
    compose: Callable[..., DictConfig], conf: Path, tree: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.syspath_prepend(str(conf.parent))
    with pytest.raises(ConfigError, match="accept=row: no finding has this key; did you mean rows"):
        train.run(training(compose, conf, tree, "accept=[row]"))


def test_without_published_numbers_a_training_is_as_before(compose: Callable[..., DictConfig]) -> None:
    from rich.console import Console

    from affect.commands import assembly

    config = compose("train", "dataset.count=20")
    sources = assembly.build_sources(config, None)
    assert verified(config, sources, Console(quiet=True)) == sources


def damage(tree: Path, count: int = 2) -> list[str]:
    """Cut ``count`` images of a tree short and return their names."""
    names = [f"images/{k:02d}.png" for k in range(3, 3 + count)]
    for name in names:
        data = (tree / name).read_bytes()
        (tree / name).write_bytes(data[: len(data) // 2])
    return names


def pasted(printed: str) -> list[str]:
    """Return the words of the next command that was printed, as a shell reads them."""
    [line] = [line for line in printed.splitlines() if line.startswith("next: ")]
    return shlex.split(line.removeprefix("next: "))


def test_images_that_cannot_be_used_are_left_out_by_a_list_and_trained_without(
    check: Callable[..., int],
    tree: Path,
    conf: Path,
    compose: Callable[..., DictConfig],
    capsys: pytest.CaptureFixture,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    names = damage(tree)
    assert check("report=check.json", "sheet=false") == 2
    error = capsys.readouterr().err
    assert "dataset.leave_out=check_unusable.txt" in error
    assert "accept=" not in error, "no training could honour it"
    assert Path("check_unusable.txt").read_text().split() == names
    assert check("report=again.json", "sheet=false", "dataset.leave_out=check_unusable.txt") == 0
    assert (report("again.json")["rows"], report("again.json")["images"]["problems"]) == (COUNT - 2, {})
    found = {finding["key"]: finding for finding in report("again.json")["findings"]}
    assert found["rows"]["level"] == "note", "40 are published, and 2 are left out"
    assert found["skipped/left out by dataset.leave_out"]["examples"] == names
    words = pasted(capsys.readouterr().out)
    assert "dataset.leave_out=check_unusable.txt" in words
    monkeypatch.syspath_prepend(str(conf.parent))
    train.run(training(compose, conf, tree, "dataset.leave_out=check_unusable.txt"))
    results = report(tree.parent / "run" / "results.json")
    assert results["data"]["skipped"]["left out by dataset.leave_out"] == 2
    assert results["data"]["sources"][0]["rows"] == COUNT - 2


def test_accepting_images_that_cannot_be_used_leads_to_a_training_without_them(
    check: Callable[..., int],
    tree: Path,
    conf: Path,
    compose: Callable[..., DictConfig],
    capsys: pytest.CaptureFixture,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    damage(tree)
    assert check("report=check.json", "sheet=false", "dataset.rows=99", "accept=[rows,images/unreadable]") == 0
    words = pasted(capsys.readouterr().out)
    assert "accept=[rows]" in words
    assert "dataset.leave_out=check_unusable.txt" in words
    monkeypatch.syspath_prepend(str(conf.parent))
    with pytest.raises(ConfigError, match=r"accept=images/unreadable: no training can read.*dataset\.leave_out="):
        train.run(training(compose, conf, tree, "accept=[images/unreadable]"))


def test_a_list_of_images_to_leave_out_grows_and_is_mapped(
    check: Callable[..., int], tree: Path, conf: Path, compose: Callable[..., DictConfig]
) -> None:
    from affect.commands import assembly

    Path("mine.txt").write_text("\ufeffimages/00.png\r\n\r\nimages/01.png\r\n", encoding="utf-8")
    damage(tree, 1)
    assert check("report=check.json", "sheet=false", "dataset.leave_out=mine.txt") == 2
    assert Path("check_unusable.txt").read_text().split() == ["images/00.png", "images/01.png", "images/03.png"]
    config = training(compose, conf, tree, "dataset.leave_out=check_unusable.txt", "paths.cache=cache")
    first, again = (assembly.read_table(config.dataset, Path("cache")) for _ in range(2))
    assert first.path == again.path is not None
    assert first.strings("image")[0].tolist() == [f"images/{k:02d}.png" for k in range(COUNT) if k not in (0, 1, 3)]
    Path("check_unusable.txt").write_text("images/07.png\n")
    assert len(assembly.read_table(config.dataset, Path("cache"))) == COUNT - 1, "another list is another table"


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("elsewhere.png\n", r"none of its 1 names is an image of the table \(e\.g\. elsewhere\.png\).*images/00\.png"),
        ("\n", "lists no image"),
        (None, "not a readable text file"),
    ],
)
def test_a_list_that_leaves_nothing_out_is_refused(
    check: Callable[..., int], text: str | None, message: str, capsys: pytest.CaptureFixture
) -> None:
    if text is not None:
        Path("list.txt").write_text(text)
    assert check("sheet=false", "dataset.leave_out=list.txt") == 2
    assert re.search(message, capsys.readouterr().err.replace("\n", " "))


def test_what_the_reading_noted_is_a_warning(
    check: Callable[..., int], tree: Path, capsys: pytest.CaptureFixture
) -> None:
    table = FaceTable.read_parquet(tree / "labels.parquet")
    table.with_metadata(notes=["the labels of AU 9 are missing"]).to_parquet(tree / "labels.parquet")
    assert check("report=check.json", "sheet=false") == 0
    [found] = [finding for finding in report()["findings"] if finding["key"] == "notes"]
    assert (found["level"], found["sentence"]) == ("warning", "the labels of AU 9 are missing")
    assert "the labels of AU 9 are missing" in " ".join(capsys.readouterr().out.split())


def test_keys_with_special_characters_are_accepted_as_they_are_printed(
    check: Callable[..., int], conf: Path, capsys: pytest.CaptureFixture, monkeypatch: pytest.MonkeyPatch
) -> None:
    import affect.commands.check as command
    from affect.data.expected import Expected

    keys = ["rows", *(f"rows/part=P{k}" for k in range(5)), "labelled/valence/part=x"]
    monkeypatch.setattr(command, "expectations", lambda node: tuple(Expected(key, 9, "the paper") for key in keys))
    assert check("report=check.json", "sheet=false") == 2
    error = " ".join(capsys.readouterr().err.split())
    [words] = re.findall(r"accept what is meant so: (.*)$", error)
    [word] = shlex.split(words)
    assert word == 'accept=[rows,rows/*,"labelled/valence/part=x"]'
    assert check("report=check.json", "sheet=false", word) == 0
    assert report()["accepted"] == keys
    assert word in pasted(capsys.readouterr().out)
    assert check("report=check.json", "sheet=false", "accept=rows") == 2, "one key needs no list"
    assert levels()["rows"] == "accepted"
    assert check("report=check.json", "sheet=false", "accept=[rate/*]") == 2
    assert "accept=rate/*: no finding has this key" in capsys.readouterr().err
