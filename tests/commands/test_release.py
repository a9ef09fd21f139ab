# SPDX-License-Identifier: Apache-2.0
"""A published release needs nothing of its run, tells nothing of its machine, and is evaluated on its own test part."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from pathlib import Path

import pytest
import yaml
from omegaconf import DictConfig, OmegaConf
from rich.console import Console

from affect import export as formats
from affect.commands import evaluate, export, figures, train
from affect.commands import release as release_command
from affect.data.protocol import hashed_name, hashed_people
from affect.errors import CheckpointError, ConfigError, DataError
from affect.foreign import open_checkpoint
from affect.release import read_release

Compose = Callable[..., DictConfig]
QUIET = ("data.num_workers=0", "bootstrap.resamples=10")


@pytest.fixture(scope="module")
def run(trained_faces: Callable[..., Path]) -> Path:
    """Return a finished run on built-in faces."""
    return trained_faces("encoder=plain_convolutions", "encoder.output=vector")


@pytest.fixture(scope="module")
def published(run: Path) -> Path:
    from affect.commands.configuration import compose

    out = run.parent / "elsewhere" / "published"
    release_command.run(compose("release", [f"run={run}", f"out={out}"]))
    return out


def results(out: Path) -> dict:
    return json.loads((out / "results.json").read_text())


def score(found: dict, name: str) -> float:
    [value] = [record["value"] for record in found["metrics"]["test"] if record["name"] == name]
    return value


def test_a_release_tells_of_its_training_and_not_of_its_machine(published: Path, run: Path) -> None:
    release = read_release(published)
    assert release.training["protocol"]["test"] == 2
    assert release.training["dataset"]["name"] == "faces"
    assert release.training["parts"]["test"]["rows"] > 0
    assert release.training["selected"]["rule"] == "best_val"
    for file in published.iterdir():
        if file.suffix != ".safetensors":
            text = file.read_text()
            assert str(run) not in text, file.name
            assert str(run.parent) not in text, file.name
    card = (published / "README.md").read_text()
    for part in ("## Training data", "datasets: faces", "test part 2", "## Thresholds", "Limits of use"):
        assert part in card


def test_a_release_is_evaluated_on_its_own_test_part(compose: Compose, published: Path, run: Path) -> None:
    evaluate.run(compose("evaluate", f"checkpoint={published}", *QUIET))
    found = results(published / "evaluate" / "faces-test")
    expected = json.loads((run / "results.json").read_text())
    assert found["data"]["parts"]["test"]["rows"] == expected["data"]["parts"]["test"]["rows"]
    for name in ("accuracy", "ccc/mean", "f1/mean"):
        assert score(found, name) == pytest.approx(score(expected, name), abs=1e-6)
    assert found["selection"]["rule"] == "best_val"


@pytest.mark.parametrize("kind", ["published", pytest.param("run", marks=pytest.mark.slow)])
def test_an_exported_file_gives_the_same_table(
    compose: Compose, published: Path, run: Path, tmp_path: Path, kind: str
) -> None:
    pytest.importorskip("onnxruntime")
    pytest.importorskip("onnxscript")
    expected = json.loads((run / "results.json").read_text())
    file = tmp_path / "model.onnx"
    checkpoint = published if kind == "published" else run
    export.run(compose("export", f"checkpoint={checkpoint}", f"out={file}", *QUIET[:1]))
    evaluate.run(compose("evaluate", f"checkpoint={file}", *QUIET))
    found = results(tmp_path / "model.evaluate" / "faces-test")
    for number in ("accuracy", "ccc/mean", "f1/mean"):
        assert score(found, number) == pytest.approx(score(expected, number), abs=1e-4)
    assert str(run.parent).encode() not in file.read_bytes()
    assert found["selection"]["rule"] == "best_val"
    with pytest.raises(ConfigError, match="is there already; force=true"):
        export.run(compose("export", f"checkpoint={run}", f"out={file}"))
    with pytest.raises(ConfigError, match=r"format=onnx is a file \.onnx"):
        export.run(compose("export", f"checkpoint={run}", f"out={tmp_path / 'x.pt2'}"))


@pytest.mark.slow
def test_int8_takes_its_ranges_from_the_training_part(
    compose: Compose, run: Path, tmp_path: Path, capsys: pytest.CaptureFixture
) -> None:
    pytest.importorskip("onnxruntime")
    pytest.importorskip("onnxscript")
    file = tmp_path / "int8.onnx"
    settings = ("format=onnx_int8", "calibration.images=16", "speed.seconds=0.1", "speed.batch_size=2")
    export.run(compose("export", f"checkpoint={run}", f"out={file}", *settings, *QUIET[:1]))
    printed = " ".join(capsys.readouterr().out.split())
    assert "int8 ranges from 16 images of the training part of faces" in printed
    assert "float/int8" in printed
    evaluate.run(compose("evaluate", f"checkpoint={file}", *QUIET))
    assert results(tmp_path / "int8.evaluate" / "faces-test")["preprocess"]["exported"] == "onnx_int8"


@pytest.mark.slow
def test_a_file_of_a_quantized_training_is_timed_against_float(
    compose: Compose, tmp_path: Path, capsys: pytest.CaptureFixture, monkeypatch: pytest.MonkeyPatch
) -> None:
    for package in ("torchao", "onnxruntime", "onnxscript"):
        pytest.importorskip(package)
    monkeypatch.setattr(figures, "write_run_figures", lambda *arguments: None)
    settings = (
        "debug=fast",
        "callbacks=[default,qat_int8]",
        "callbacks.progress=null",
        "encoder=plain_convolutions",
        "encoder.output=vector",
    )
    size = ("encoder.image_size=32", "trainer.accelerator=cpu", "logger=none", f"paths.cache={tmp_path / 'cache'}")
    train.run(compose("train", *settings, *size, f"paths.output={tmp_path / 'run'}", *QUIET))
    timed: list[bytes] = []
    measure = formats.compare_speed
    monkeypatch.setattr(formats, "compare_speed", lambda *given: timed.extend(given[:2]) or measure(*given))
    asked = (f"checkpoint={tmp_path / 'run'}", "speed.seconds=0.1", "speed.batch_size=2")
    export.run(compose("export", "format=onnx_int8", *asked, *QUIET[:1]))
    assert [formats.is_quantized(content) for content in timed] == [False, True]
    assert "float/int8" in capsys.readouterr().out
    with pytest.raises(ConfigError, match="trained with quantized activations, which its file holds: format=onnx_int8"):
        export.run(compose("export", "format=onnx", *asked, *QUIET[:1]))


@pytest.mark.parametrize(("ratio", "slower"), [(0.8, True), (1.7, False)])
def test_int8_that_is_slower_than_float_is_warned_of(
    compose: Compose, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture, ratio: float, slower: bool
) -> None:
    monkeypatch.setattr(formats, "compare_speed", lambda *_: formats.Speed(2.0, 2.0 / ratio, ratio))
    monkeypatch.setattr(formats, "cpu_features", lambda: ["avx2"])
    settings = compose("export", "checkpoint=x")
    export.say_speed(Console(), bytes(40), bytes(10), 8, settings)
    printed = " ".join(capsys.readouterr().out.split())
    assert ("format=onnx is the better file" in printed) is slower
    assert f"float/int8 {ratio:.2f}; 4.00 times fewer bytes; processor with avx2" in printed
    assert ("warning: int8 is slower than float here" in printed) is slower
    export.say_speed(Console(), bytes(40), bytes(10), 8, settings, learnt=True)  # which has no float file
    printed = " ".join(capsys.readouterr().out.split())
    assert ("a float training (callbacks=[default]) with format=onnx gives the better file" in printed) is slower


@pytest.mark.slow
def test_a_file_unlike_its_model_is_not_written(compose: Compose, run: Path, tmp_path: Path) -> None:
    pytest.importorskip("onnxruntime")
    pytest.importorskip("onnxscript")
    with pytest.raises(CheckpointError, match="does not predict what its model does"):
        export.run(compose("export", f"checkpoint={run}", f"out={tmp_path / 'x.onnx'}", "tolerance=-1.0"))
    assert not list(tmp_path.iterdir())


def test_unfinished_runs_and_other_folders_are_refused(compose: Compose, run: Path, tmp_path: Path) -> None:
    (tmp_path / "empty").mkdir()
    with pytest.raises(CheckpointError, match=r"no results.json in it; give the folder of a finished run"):
        release_command.run(compose("release", f"run={tmp_path / 'empty'}", f"out={tmp_path / 'out'}"))
    (tmp_path / "full").mkdir()
    (tmp_path / "full" / "notes.txt").write_text("mine")
    with pytest.raises(ConfigError, match=r"holds other files \(notes.txt\)"):
        release_command.run(compose("release", f"run={run}", f"out={tmp_path / 'full'}"))


def test_people_are_hashed_and_still_found(run: Path, tmp_path: Path) -> None:
    hashed = hashed_people({"disfa": ["SN001", "SN002"]})
    assert hashed == {"disfa": sorted([hashed_name("disfa", "SN001"), hashed_name("disfa", "SN002")])}
    assert hashed_people(hashed) == hashed
    assert hashed_name("disfa", "SN001") != hashed_name("bp4d", "SN001")
    assert "SN001" not in json.dumps(hashed)


@pytest.mark.parametrize("leak", [False, True])
def test_people_of_the_training_stop_an_evaluation(
    compose: Compose, published: Path, tmp_path: Path, leak: bool, capsys: pytest.CaptureFixture
) -> None:
    """A table of people that a release knows by their hashes."""
    import cv2
    import numpy as np

    from affect.data.table import FaceTable

    folder = tmp_path / "known"
    shutil.copytree(published, folder)
    (folder / "people.json").write_text(json.dumps(hashed_people({"theirs": ["p0", "p9"]})))
    for index in range(4):
        cv2.imwrite(str(tmp_path / f"{index}.png"), np.full((40, 40, 3), 40 * index, np.uint8))
    columns = {
        "image": [f"{index}.png" for index in range(4)],
        "subject": ["p0", "p1", "p2", "p3"],
        "expression": ["anger", "fear", "other", "happiness"],
    }
    table = FaceTable.from_columns(columns, tmp_path, {"people": "theirs", "dataset": "theirs"})
    table.to_parquet(tmp_path / "theirs.parquet")
    asked = [f"checkpoint={folder}", "dataset=table", f"dataset.table={tmp_path / 'theirs.parquet'}", "prepare=none"]
    asked += ["protocol=default", "part=all", f"allow_leak={str(leak).lower()}", f"out={tmp_path / 'out'}", *QUIET]
    if not leak:
        with pytest.raises(DataError, match=r"the model was trained on 1 people of theirs.*p0.*allow_leak=true"):
            evaluate.run(compose("evaluate", *asked))
        return
    evaluate.run(compose("evaluate", *asked))
    printed = " ".join(capsys.readouterr().out.split())
    assert "LEAK" in printed
    # Classes that checkpoint and dataset share, and all of them.
    found = results(tmp_path / "out")["all_classes"]["expression"]
    assert found["only_dataset"] == ["other"]
    assert found["rows_only_dataset"] == 1
    counts = {record["name"]: record["n"] for record in found["records"]}
    assert counts["accuracy"] == 4
    assert "the metrics are over the" in printed


def test_faces_of_the_training_stop_an_evaluation(compose: Compose, published: Path, tmp_path: Path) -> None:
    """Nothing is written by hand: built-in faces are known again by what training and release have kept."""
    asked = [f"checkpoint={published}", f"out={tmp_path / 'out'}", *QUIET]
    with pytest.raises(DataError, match=r"the model was trained on \d+ values of subject.*allow_leak=true"):
        evaluate.run(compose("evaluate", *asked, "protocol.split_seed=7"))


@pytest.mark.slow
@pytest.mark.parametrize("kind", ["published", "run"])
def test_faces_of_the_training_are_marked_where_they_are_let_pass(
    compose: Compose, published: Path, run: Path, tmp_path: Path, kind: str, capsys: pytest.CaptureFixture
) -> None:
    asked = [f"checkpoint={published if kind == 'published' else run}", f"out={tmp_path / 'out'}", *QUIET]
    for overlap in (["part=all"], ["protocol.split_seed=7"], ["protocol.test=0"], ["part=all", "dataset.count=30"]):
        with pytest.raises(DataError, match=r"the model was trained on \d+ values of subject.*allow_leak=true"):
            evaluate.run(compose("evaluate", *asked, *overlap))
    evaluate.run(compose("evaluate", *asked, "dataset.seed=1", "part=all"))
    evaluate.run(compose("evaluate", *asked))
    assert "LEAK" not in capsys.readouterr().out
    assert results(tmp_path / "out")["data"]["leaks"] == []
    evaluate.run(compose("evaluate", *asked, "part=all", "allow_leak=true"))
    assert "LEAK" in capsys.readouterr().out


@pytest.mark.slow
def test_a_users_table_is_known_again(
    compose: Compose, tmp_path: Path, capsys: pytest.CaptureFixture, monkeypatch: pytest.MonkeyPatch
) -> None:
    import cv2
    import numpy as np

    monkeypatch.setattr(figures, "write_run_figures", lambda *arguments: None)

    def table(folder: str, name: str, people: range, more: str = "") -> Path:
        place = tmp_path / folder
        place.mkdir(exist_ok=True)
        lines = ["image,subject,expression" + (",site" if more else "")]
        random = np.random.default_rng([*folder.encode()])
        for person in people:
            for k in range(3):
                image = f"{person}_{k}.png"
                if not (place / image).is_file():
                    cv2.imwrite(str(place / image), random.integers(0, 255, (40, 40, 3), np.uint8))
                lines.append(f"{image},{person},{('anger', 'fear', 'happiness')[k]}{more}")
        (place / name).write_text("\n".join(lines) + "\n")
        return place / name

    mine = table("mine", "t.csv", range(1, 21))
    settings = ("prepare=none", "task=[expression]", "encoder=plain_convolutions", "encoder.output=vector")
    small = ("encoder.image_size=32", "trainer.max_epochs=1", "trainer.accelerator=cpu", "callbacks.progress=null")
    paths = (f"paths.output={tmp_path / 'run'}", f"paths.cache={tmp_path / 'cache'}", "logger=none", *QUIET)
    train.run(compose("train", "dataset=table", f"dataset.table={mine}", *settings, *small, *paths))
    release_command.run(compose("release", f"run={tmp_path / 'run'}", f"out={tmp_path / 'rel'}"))
    assert "60 of image files" not in capsys.readouterr().out, "the test part is not among them"
    for checkpoint in ("rel", "run"):
        own = [f"checkpoint={tmp_path / checkpoint}", f"out={tmp_path / 'out'}", "prepare=none", *QUIET]
        if checkpoint == "rel":
            with pytest.raises(ConfigError, match=r"add dataset=table dataset\.table=<your table>"):
                evaluate.run(compose("evaluate", *own))
        # The release's own test part goes on, with the table alone.
        evaluate.run(compose("evaluate", *own, f"dataset.table={mine}"))
        assert results(tmp_path / "out")["data"]["parts"]["test"]["rows"] < 60
        others = ["dataset=table", f"dataset.table={table('another', 'u.csv', range(1, 9))}", "protocol=default"]
        evaluate.run(compose("evaluate", *own, *others))
        assert "LEAK" not in capsys.readouterr().out, "subjects that count from 1, too"
        wider = ["dataset=table", f"dataset.table={table('mine', 't2.csv', range(1, 21), ',1')}", "protocol=default"]
        for overlap in (wider, [f"dataset.table={mine}", "protocol.split_seed=7"]):
            with pytest.raises(DataError, match=r"trained on \d+ values of subject .* image files among these rows"):
                evaluate.run(compose("evaluate", *own, *overlap))
            evaluate.run(compose("evaluate", *own, *overlap, "allow_leak=true"))
            assert "LEAK" in capsys.readouterr().out


def test_a_release_does_not_choose_where_it_is_written_to(compose: Compose, published: Path, tmp_path: Path) -> None:
    for change, message in (
        ({"name": "../../outside"}, "paths are not allowed|cannot be named"),
        ({"name": "a/b"}, "cannot be named"),
        ({"cache": "/home"}, "paths are not allowed"),
        ({"read": {"_target_": "affect.data.layouts.table.read", "table": "~/secret.csv"}}, "paths are not allowed"),
        ({"read": {"_target_": "os.system", "command": "true"}}, "not on the list"),
        ({"read": {"_target_": "affect.data.layouts.table.read", "table": "${oc.env:HOME}"}}, "interpolation"),
    ):
        folder = tmp_path / "changed"
        shutil.rmtree(folder, ignore_errors=True)
        shutil.copytree(published, folder)
        training = json.loads((folder / "training.json").read_text())
        training["dataset"] |= change
        (folder / "training.json").write_text(json.dumps(training))
        with pytest.raises(CheckpointError, match=message) as error:
            evaluate.run(compose("evaluate", f"checkpoint={folder}", *QUIET))
        assert "\n" not in str(error.value)


def test_a_release_on_the_hub_comes_from_its_cache_or_not_at_all(
    published: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    import huggingface_hub
    from huggingface_hub import constants

    cache, commit = tmp_path / "hub", "0123456789abcdef0123456789abcdef01234567"
    home = cache / "models--someone--faces"
    shutil.copytree(published, home / "snapshots" / commit)
    (home / "snapshots" / commit / "evil.py").write_text("raise SystemExit")
    (home / "refs").mkdir()
    (home / "refs" / "main").write_text(commit)
    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", True)
    original = huggingface_hub.snapshot_download
    monkeypatch.setattr(
        huggingface_hub, "snapshot_download", lambda *args, **kw: original(*args, **kw, cache_dir=cache)
    )
    monkeypatch.chdir(tmp_path)
    for name in ("hf-hub:someone/faces", "someone/faces", f"hf-hub:someone/faces@{commit}"):
        assert open_checkpoint(name).training["dataset"]["name"] == "faces"
    with pytest.raises(CheckpointError, match="nobody/nothing: no such folder here, and the Hugging Face hub"):
        open_checkpoint("nobody/nothing")
    with pytest.raises(CheckpointError, match="write hf-hub:<owner>/<name>"):
        open_checkpoint("hf-hub:../../etc")
    # A mistyped folder stays a folder.
    (tmp_path / "runs").mkdir()
    with pytest.raises(CheckpointError, match="no such folder; give the folder of a run"):
        open_checkpoint("runs/mistyped")


def test_a_release_without_places_says_what_to_add(published: Path, tmp_path: Path, compose: Compose) -> None:
    folder = tmp_path / "bp4d"
    shutil.copytree(published, folder)
    training = json.loads((folder / "training.json").read_text())
    read = {"_target_": "affect.data.layouts.bp4d.read", "root": None}
    training["dataset"] = {"name": "bp4d", "root": None, "group": "subject", "read": read}
    (folder / "training.json").write_text(json.dumps(training))
    with pytest.raises(ConfigError, match=r"was trained on bp4d.*add dataset=bp4d dataset\.root="):
        evaluate.run(compose("evaluate", f"checkpoint={folder}", *QUIET))


def test_a_table_that_is_given_needs_no_folder(published: Path) -> None:
    release = read_release(published)
    read = {"_target_": "affect.data.layouts.table.read", "table": None, "root": None}
    stored = OmegaConf.create({"dataset": {"name": "table", "table": None, "root": None, "read": read}})
    evaluate.require_place(stored, OmegaConf.create({"table": "t2.csv"}), "rel", release)
    with pytest.raises(ConfigError, match=r"add dataset=table dataset\.table=<your table>"):
        evaluate.require_place(stored, OmegaConf.create({"root": "there"}), "rel", release)


def test_no_text_of_a_release_needs_yaml_that_could_run(published: Path) -> None:
    assert set(yaml.safe_load((published / "config.yaml").read_text())) >= {"task", "model"}
