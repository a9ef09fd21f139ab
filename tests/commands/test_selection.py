# SPDX-License-Identifier: Apache-2.0
"""What chooses the weights, who may be tested, and what stands beside a number: whole runs on a small table."""

from __future__ import annotations

import json
import shutil
from pathlib import Path

import cv2
import numpy as np
import pytest
import torch
from omegaconf import DictConfig
from safetensors.numpy import load_file

from affect.commands import evaluate, figures, train
from affect.commands.configuration import compose as compose_config
from affect.data.table import FaceTable
from affect.errors import ConfigError, DataError
from affect.report.provenance import ON_TEST

COUNT, SUBJECTS = 72, 12
HEADLINE = "protocol.headline={sum: [au/f1/mean, valence_arousal/ccc/mean], F1: [au/f1/mean], NME: [landmarks/nme]}"
FACES = [("found", "found", "found", "centre")[k // SUBJECTS % 4] for k in range(COUNT)]


def write_faces(folder: Path, people: str, subjects: list[str], parts: dict[str, str]) -> Path:
    """Write noise with labels; every fourth round of subjects shows no face and has no valence."""
    random = np.random.default_rng(0)
    names = [f"{k:03d}.png" for k in range(COUNT)]
    folder.mkdir(parents=True)
    for name in names:
        cv2.imwrite(str(folder / name), random.integers(0, 256, (32, 32, 3), np.uint8))
    known = np.array([face == "found" for face in FACES])
    who = [subjects[k % len(subjects)] for k in range(COUNT)]
    columns = {
        "image": names,
        "subject": who,
        "part": [parts.get(name) for name in who],
        "face": FACES,
        "au01_occurrence": (random.random(COUNT) < 0.5).astype(np.float32),
        "au12_occurrence": np.ones(COUNT, np.float32) * (np.arange(COUNT) % 3 > 0),
        "valence": (random.uniform(-1, 1, COUNT).astype(np.float32), known),
        "arousal": (random.uniform(-1, 1, COUNT).astype(np.float32), known),
        "attribute_blur": (np.arange(COUNT) % 2).astype(np.float32),
        "attribute_dark": (np.arange(COUNT) % 4 == 1).astype(np.float32),
    }
    FaceTable.from_columns(columns, folder, {"dataset": people, "people": people}).save(folder / "labels.arrow")
    return folder / "labels.arrow"


PEOPLE = [f"SN{k:03d}" for k in range(1, SUBJECTS + 1)]
PARTS = {name: "P1" if k < 5 else "P2" if k < 9 else "P3" for k, name in enumerate(PEOPLE)}


@pytest.fixture(scope="module")
def table(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_faces(tmp_path_factory.mktemp("data") / "disfa", "disfa", PEOPLE, PARTS)


def config(table: Path, output: Path, *more: str) -> DictConfig:
    overrides = [
        *("debug=fast", "dataset=table", f"dataset.table={table}", "prepare=none", "task=[au,valence_arousal]"),
        *("encoder=timm", "encoder.name=test_resnet", "encoder.image_size=32", "data.limit=null"),
        *("data.batch_size=16", "trainer.max_epochs=3", "protocol.name=bp4d", "protocol.test=P3"),
        *("callbacks.progress=null", "trainer.enable_progress_bar=false", "logger=none", "bootstrap.resamples=10"),
        *(f"paths.output={output}", f"paths.cache={output.parent / 'cache'}"),
    ]
    return compose_config("train", [*overrides, *more])


def results(folder: Path) -> dict:
    return json.loads((folder / "results.json").read_text())


@pytest.fixture(scope="module")
def refit(table: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Return the folder of a refit with subsets, a headline and faces that were not found."""
    folder = tmp_path_factory.mktemp("refit") / "run"
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(figures, "write_run_figures", lambda *arguments: None)
        train.run(config(table, folder, *REFIT))
    return folder


REFIT = (
    "selection=refit",
    "protocol.missing_faces=negative",
    "protocol.subsets={blur: attribute_blur, dark: attribute_dark}",
    HEADLINE,
)


@pytest.fixture
def no_figures(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(figures, "write_run_figures", lambda *arguments: None)


# ---------------------------------------------------------------------------------------------------- refit


def test_a_refit_trains_all_groups_for_as_many_epochs_as_were_chosen(refit: Path) -> None:
    inner, outer = results(refit / "selection"), results(refit)
    assert inner["selection"]["rule"] == "best_val"
    epochs = inner["selection"]["epoch"] + 1
    assert outer["selection"]["rule"] == "refit"
    assert outer["selection"]["epochs"] == len(outer["history"]) == epochs
    assert len(inner["history"]) == 3
    found_in = [k for k in range(COUNT) if FACES[k] == "found" and PARTS[PEOPLE[k % SUBJECTS]] != "P3"]
    rows = {part: numbers["rows"] for part, numbers in outer["data"]["parts"].items()}
    assert rows["train"] == len(found_in)
    assert rows["validation"] == 0
    held = {part: numbers["rows"] for part, numbers in inner["data"]["parts"].items()}
    assert held["train"] + held["validation"] == rows["train"]
    assert held["validation"] > 0
    assert held["test"] == rows["test"]
    chosen_by = outer["selection"]["chosen_by"]
    assert chosen_by["epoch"] == inner["selection"]["epoch"], "results name both"
    assert chosen_by["rows"] == held
    assert outer["selection"]["score"] == inner["selection"]["score"]
    assert all("val/score" not in epoch for epoch in outer["history"])
    assert "refit" in (refit / "release" / "README.md").read_text()


@pytest.mark.parametrize("moment", ["selection", "start", "end"])
def test_a_refit_that_was_interrupted_ends_as_one_that_was_not(
    refit: Path, table: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, no_figures: None, moment: str
) -> None:
    folder = tmp_path / "run"
    run, calls = train.build_trainer, []

    def stopping(config: DictConfig, first: list, epochs: int | None = None) -> object:
        trainer = run(config, first, epochs)
        if moment == "start" and epochs is not None:
            raise KeyboardInterrupt
        calls.append(epochs)
        return trainer

    def interrupted(path: Path, data: object) -> None:
        inner = path.parent.name == "selection"
        if inner == (moment == "selection"):
            raise KeyboardInterrupt
        write(path, data)

    write = train.write_json
    with monkeypatch.context() as patch:
        patch.setattr(train, "build_trainer", stopping)
        patch.setattr(train, "write_json", interrupted)
        with pytest.raises(KeyboardInterrupt):
            train.run(config(table, folder, *REFIT))
    assert not (folder / "results.json").exists()
    stamp = (folder / "selection" / "results.json").stat().st_mtime_ns if moment != "selection" else None
    train.run(config(table, folder, *REFIT))
    if stamp is not None:
        assert (folder / "selection" / "results.json").stat().st_mtime_ns == stamp, "the selection is not run again"
    mine, whole = (load_file(run / "release" / "model.safetensors") for run in (folder, refit))
    assert mine.keys() == whole.keys()
    assert all(np.array_equal(mine[name], value) for name, value in whole.items())
    for key in ("metrics", "headline", "selection", "history", "people"):
        assert results(folder)[key] == results(refit)[key], key


def test_a_refit_cuts_the_schedule_that_chose_its_epochs_and_does_not_compress_it(
    table: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, no_figures: None
) -> None:
    chosen = {"epochs": 1, "score": 0.0, "chosen_by": {"epoch": 0}}
    monkeypatch.setattr(train, "choose_epochs", lambda *arguments: chosen)
    train.run(config(table, tmp_path / "run", "selection=refit", "scheduler=polynomial"))
    assert len(results(tmp_path / "run")["history"]) == 1
    stored = torch.load(tmp_path / "run" / "last.ckpt", weights_only=False)["lr_schedulers"][0]
    assert np.divide(stored["_last_lr"], stored["base_lrs"]) == pytest.approx(2 / 3), "after one epoch of three"


def test_a_forced_refit_replaces_both_runs(refit: Path, table: Path, tmp_path: Path, no_figures: None) -> None:
    shutil.copytree(refit, tmp_path / "run")
    before = results(tmp_path / "run")
    train.run(config(table, tmp_path / "run", *REFIT, "force=true"))
    after = results(tmp_path / "run")
    assert after["metrics"] == before["metrics"]
    assert after["timing"]["finished"] > before["timing"]["finished"]
    assert (tmp_path / "run" / "selection" / "results.json").is_file()


# --------------------------------------------------------------------------------- headline, subsets, faces


def record(found: dict, name: str, subgroup: str | None = None) -> dict:
    return next(r for r in found["metrics"]["test"] if r["name"] == name and r["subgroup"] == subgroup)


def test_the_headline_is_the_sum_of_named_numbers(refit: Path) -> None:
    found = results(refit)
    sums = {line["name"]: line for line in found["headline"]}
    assert set(sums) == {"sum", "F1"}
    terms = record(found, "f1/mean")["value"] + record(found, "ccc/mean")["value"]
    assert sums["sum"]["value"] == pytest.approx(terms, abs=1e-9)
    assert sums["sum"]["terms"] == ["au/f1/mean", "valence_arousal/ccc/mean"]
    assert sums["F1"]["value"] == record(found, "f1/mean")["value"]
    assert "headline NME is left out: task landmarks is not selected" in found["data"]["notes"]


def test_subsets_are_subgroups_of_the_test_part_that_may_overlap(refit: Path) -> None:
    found = results(refit)
    predictions = FaceTable.read_parquet(refit / "predictions" / "test.parquet")
    rows = np.array([int(name[:3]) for name in predictions.strings("image")[0]])
    assert record(found, "f1/mean", "blur")["n"] == int((rows % 2 == 1).sum())
    assert record(found, "f1/mean", "dark")["n"] == int((rows % 4 == 1).sum())
    assert record(found, "f1/mean")["n"] == len(rows)


def test_action_units_count_as_absent_where_no_face_was_found(refit: Path) -> None:
    predictions = FaceTable.read_parquet(refit / "predictions" / "test.parquet")
    found = predictions.strings("face")[0] == "found"
    values = predictions.numbers("au12_occurrence")[0]
    assert (~found).any()
    assert (values[~found] == 0).all()
    assert (values[found] > 0).all()
    counts = results(refit)["missing_faces"]
    assert counts["rule"] == "negative"
    assert counts["test"] == int((~found).sum())
    assert counts["train"] == sum(FACES[k] != "found" and PARTS[PEOPLE[k % SUBJECTS]] != "P3" for k in range(COUNT))
    notes = results(refit)["data"]["notes"]
    assert any("no face found in" in note and "missing_faces=negative" in note for note in notes)


def test_another_task_has_no_absent_value(table: Path, tmp_path: Path) -> None:
    broken = tmp_path / "with_valence.arrow"
    whole = FaceTable.open(table)
    whole.with_columns({"valence": np.full(COUNT, 0.5, np.float32)}).save(broken)
    setting = config(broken, tmp_path / "run", "protocol.missing_faces=negative", f"dataset.root={table.parent}")
    with pytest.raises(DataError, match=r"task valence_arousal has labels in \d+ such rows and no absent value"):
        train.run(setting)


@pytest.mark.parametrize(
    ("override", "message"),
    [
        (
            "protocol.headline={P: [au/f1/meen]}",
            r"protocol.headline.P: au/f1/meen: no such number; did you mean f1/mean",
        ),
        ("protocol.headline={P: [au/f1/*]}", r"protocol.headline.P: au/f1/\*: fits f1/mean, f1/micro"),
        ("protocol.headline={P: [au/f1/mean, valence_arousal/rmse/mean]}", "more is better for one term"),
        (
            "protocol.subsets={blur: attribute_blurr}",
            "protocol.subsets.blur: no column 'attribute_blurr'.*attribute_blur",
        ),
    ],
)
def test_what_does_not_exist_is_named_before_training(table: Path, tmp_path: Path, override: str, message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        train.run(config(table, tmp_path / "run", override))
    assert not (tmp_path / "run" / "last.ckpt").exists()


# ---------------------------------------------------------------------------------------------- best_on_test


def test_best_on_test_is_said_beside_every_number(
    table: Path, tmp_path: Path, no_figures: None, capsys: pytest.CaptureFixture[str]
) -> None:
    folder = tmp_path / "run"
    train.run(config(table, folder, "selection=best_on_test", "protocol.headline={F1: [au/f1/mean]}"))
    found, printed = results(folder), " ".join(capsys.readouterr().out.split())
    assert found["selection"]["rule"] == "best_on_test"
    assert found["data"]["parts"]["validation"] == found["data"]["parts"]["test"]
    assert set(found["metrics"]) == {"test"}
    assert any("the test part selected the weights" in note for note in found["data"]["notes"])
    logged = found["history"][found["selection"]["epoch"]]
    assert logged["val/au/f1/mean"] == pytest.approx(record(found, "f1/mean")["value"], abs=2e-4)
    assert max(epoch["val/score"] for epoch in found["history"]) == found["selection"]["score"]
    assert printed.count(ON_TEST) >= 3, "titles and lines of headline and table"
    assert ON_TEST in (folder / "release" / "README.md").read_text()
    assert "SN010" not in found["people"]["disfa"], "who selects is not who is tested elsewhere"
    evaluate.run(evaluation(folder, tmp_path / "out"))
    assert ON_TEST in " ".join(capsys.readouterr().out.split())
    assert results(tmp_path / "out")["selection"]["rule"] == "best_on_test"


# ---------------------------------------------------------------------------------------------------- leaks


def evaluation(run: Path, out: Path, *more: str) -> DictConfig:
    base = [f"checkpoint={run}", f"out={out}", "data.num_workers=0", "bootstrap.resamples=0"]
    return compose_config("evaluate", [*base, *more])


def test_who_trained_or_selected_is_stored(refit: Path) -> None:
    known = {"disfa": [name for name in PEOPLE if PARTS[name] != "P3"]}
    assert results(refit)["people"] == known
    assert json.loads((refit / "release" / "people.json").read_text()) == known


def test_a_set_of_the_same_people_is_no_test_for_the_model(refit: Path, tmp_path: Path) -> None:
    plus = write_faces(tmp_path / "plus", "disfa", ["SN003", "SN012", "SN099"], {})
    other = ("dataset=table", f"dataset.table={plus}", "prepare=none")
    with pytest.raises(DataError, match=r"trained on 1 people of disfa among these rows: SN003; .*allow_leak"):
        evaluate.run(evaluation(refit, tmp_path / "out", *other, "part=all"))
    evaluate.run(evaluation(refit, tmp_path / "out", *other, "part=all", "++protocol.allow_leak=true"))
    assert "SN003" in results(tmp_path / "out")["data"]["leaks"][0]


def test_other_people_are_a_test(refit: Path, tmp_path: Path) -> None:
    plus = write_faces(tmp_path / "plus", "disfa", ["SN012", "SN099"], {})
    evaluate.run(evaluation(refit, tmp_path / "out", "dataset=table", f"dataset.table={plus}", "prepare=none"))
    assert results(tmp_path / "out")["data"]["leaks"] == []


def test_the_runs_own_test_part_is_evaluated_alike_and_another_part_is_refused(refit: Path, tmp_path: Path) -> None:
    evaluate.run(evaluation(refit, tmp_path / "out", "bootstrap.resamples=10"))
    again = results(tmp_path / "out")
    for mine, trained in (
        (again["metrics"]["test"], results(refit)["metrics"]["test"]),
        (again["headline"], results(refit)["headline"]),
    ):
        assert [line["name"] for line in mine] == [line["name"] for line in trained]
        for line, other in zip(mine, trained, strict=True):
            assert line["value"] == pytest.approx(other["value"], abs=1e-6), line["name"]
            assert (line["n"], line["subgroup"]) == (other["n"], other["subgroup"])
    assert again["missing_faces"]["test"] == results(refit)["missing_faces"]["test"]
    with pytest.raises(DataError, match=r"trained on 5 people of disfa among these rows: SN001, SN002"):
        evaluate.run(evaluation(refit, tmp_path / "out", "+protocol.test=P1"))


def test_people_of_the_initial_weights_are_no_test_and_stay_known(
    refit: Path, tmp_path: Path, no_figures: None
) -> None:
    parts = {"SN003": "P3", "SN020": "P1", "SN021": "P1", "SN022": "P2"}
    plus = write_faces(tmp_path / "plus", "disfa", list(parts), parts)
    run, started = tmp_path / "run", f"init={refit}"
    short = ("trainer.max_epochs=1", "bootstrap.resamples=0")
    with pytest.raises(DataError, match=r"init=.*trained on 1 people of disfa among these rows: SN003; .*allow_leak"):
        train.run(config(plus, run, started, *short))
    assert not (run / "last.ckpt").exists()
    train.run(config(plus, run, started, *short, "protocol.allow_leak=true"))
    assert ["SN003" in leak for leak in results(run)["data"]["leaks"]] == [True]

    parts = {"SN012": "P3", "SN020": "P1", "SN021": "P1", "SN022": "P2"}
    other = write_faces(tmp_path / "other", "disfa", list(parts), parts)
    train.run(config(other, tmp_path / "second", started, *short))
    known = sorted({*results(refit)["people"]["disfa"], "SN020", "SN021", "SN022"})
    assert results(tmp_path / "second")["people"] == {"disfa": known}
    assert results(tmp_path / "second")["data"]["leaks"] == []
    third = config(plus, tmp_path / "third", f"init={tmp_path / 'second'}", *short)
    with pytest.raises(DataError, match="trained on 1 people of disfa among these rows: SN003"):
        train.run(third)


def test_a_training_on_two_sets_of_the_same_people_stops_with_the_names(table: Path, tmp_path: Path) -> None:
    plus = write_faces(tmp_path / "plus", "disfa", ["SN001", "SN011"], {})
    several = [
        *("dataset=concat", "+dataset@dataset.sources.disfa=table", "+dataset@dataset.sources.plus=table"),
        *(f"dataset.sources.disfa.table={table}", f"dataset.sources.plus.table={plus}"),
        *("dataset.sources.disfa.name=disfa", "dataset.sources.plus.name=plus"),
        "+dataset.sources.plus.protocol={train_only: true}",
    ]
    base = [
        *("debug=fast", "prepare=none", "task=[au]", "encoder=timm", "encoder.name=test_resnet", "logger=none"),
        *("encoder.image_size=32", "protocol=default", "protocol.test=P3", "callbacks.progress=null"),
        *("trainer.enable_progress_bar=false", f"paths.output={tmp_path / 'run'}", f"paths.cache={tmp_path / 'cache'}"),
    ]
    message = r"1 people of disfa lie in two parts, e\.g\. in test of disfa and (train|validation) of plus: SN011; "
    with pytest.raises(DataError, match=message):
        train.run(compose_config("train", [*base, *several]))
    assert not (tmp_path / "run" / "last.ckpt").exists()
    marked = compose_config("train", [*base, *several, "protocol.allow_leak=true", "bootstrap.resamples=0"])
    train.run(marked)
    found = results(tmp_path / "run")
    assert "SN011" in found["data"]["leaks"][0]
    assert "LEAK: 1 people of disfa" in (tmp_path / "run" / "release" / "README.md").read_text()
    # Who trains may let a leak pass; who evaluates says so again.
    with pytest.raises(DataError, match=r"allow_leak=true"):
        evaluate.run(evaluation(tmp_path / "run", tmp_path / "out"))
    evaluate.run(evaluation(tmp_path / "run", tmp_path / "out", "allow_leak=true"))
