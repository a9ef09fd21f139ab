# SPDX-License-Identifier: Apache-2.0
"""``affect collect`` on runs whose predictions, and so whose answers, are known."""

from __future__ import annotations

import csv
import json
import shutil
from pathlib import Path

import numpy as np
import pytest
import torch
from omegaconf import OmegaConf

from affect.commands import collect, configuration, sweeps
from affect.data.table import FaceTable
from affect.errors import ConfigError, DataError
from affect.release import write_release
from affect.report import read_json, write_json
from tests.conftest import SMALL

FOLDS, SEEDS, AUS = ("0", "1", "2"), (1, 2, 3), (1, 2, 4)
SUBJECTS, ROWS = 6, 20
"""People of a fold, rows of a person."""

PREPROCESS = {
    "recipe": None, "image_size": 32, "channel_order": "RGB", "mean": [0.5] * 3, "std": [0.5] * 3,
    "thresholds": None, "smoothing": 0,
}  # fmt: skip
BASE = (*SMALL, "task=[au]", "task.au.aus=[1,2,4]", "protocol.folds=3")


@pytest.fixture(scope="module")
def config():
    return OmegaConf.to_container(configuration.compose("train", [*BASE, "paths.output=/nowhere"]), resolve=True)


def truth(fold):
    return np.random.default_rng(int(fold)).random((SUBJECTS * ROWS, 3)) < [0.5, 0.3, 0.2]


def predictions(seed, fold, skill):
    """Probabilities that are right with a probability that grows with skill."""
    draw = np.random.default_rng(100 * seed + int(fold))
    right = draw.random((SUBJECTS * ROWS, 3)) < 0.6 + 0.3 * skill
    present = np.where(right, truth(fold), ~truth(fold))
    return np.where(present, 0.9, 0.1)


def write_run(folder, config, seed, fold, skill, lr=0.001, **changes):
    config = OmegaConf.create(json.loads(json.dumps(config)))
    config.seed, config.protocol.test, config.optimizer.lr = seed, int(fold), lr
    config.paths.output = str(folder)
    for key, value in changes.items():
        OmegaConf.update(config, key.replace("__", "."), value)
    plain = OmegaConf.to_container(config)
    labels = {"au": [f"AU{number}" for number in AUS]}
    write_release(folder / "release", {"x": torch.zeros(1)}, plain, labels, PREPROCESS, {}, "card")
    values, target = predictions(seed, fold, skill), truth(fold)
    columns = {f"au{number:02d}_occurrence": values[:, k] for k, number in enumerate(AUS)}
    columns |= {f"target_au{number:02d}_occurrence": target[:, k].astype(float) for k, number in enumerate(AUS)}
    columns["group"] = np.repeat([f"F{fold}{k}" for k in range(SUBJECTS)], ROWS)
    columns["image"] = [f"{fold}/{k}.png" for k in range(len(values))]
    columns["source"] = ["faces"] * len(values)
    columns["row"] = 1000 * int(fold) + np.arange(len(values))
    (folder / "predictions").mkdir(parents=True)
    FaceTable.from_columns(columns, folder, {"dataset": "faces"}).to_parquet(folder / "predictions" / "test.parquet")
    results = {"name": "train", "dataset": "faces", "seed": seed, "config": plain, "reference": None, "metrics": {}}
    results |= {"made_of": {"table": {"faces": "abc"}, "init": {}}, "environment": {"git": {"commit": "1" * 40}}}
    results |= {"protocol": plain["protocol"], "selection": {"rule": "last", "epoch": 1, "score": 0.5}}
    write_json(folder / "results.json", results)


def job(number, lr, seed, fold, state="finished", reason=None):
    varied = {"optimizer.lr": str(lr), "seed": str(seed), "protocol.test": fold}
    settings = [f"{key}={value}" for key, value in varied.items()]
    return vars(sweeps.Entry(number, str(number), settings, varied, state, reason))


@pytest.fixture(scope="module")
def written(config, tmp_path_factory):
    """Two settings × three seeds × three folds; the second one is better."""
    folder, jobs = tmp_path_factory.mktemp("sweep"), []
    for lr, skill in ((0.001, 0.0), (0.01, 1.0)):
        for seed in SEEDS:
            for fold in FOLDS:
                jobs.append(job(len(jobs), lr, seed, fold))
                write_run(folder / jobs[-1]["folder"], config, seed, fold, skill, lr)
    about = {"command": "train", "line": [], "config_dir": None, "sweeper": "basic", "trials": None}
    write_json(folder / "sweep.json", about | {"varied": ["optimizer.lr", "seed", "protocol.test"], "jobs": jobs})
    return folder


@pytest.fixture
def sweep(written, tmp_path):
    return Path(shutil.copytree(written, tmp_path / "sweep"))


def collected(folder, *overrides):
    collect.run(configuration.compose("collect", [f"folder={folder}", "figures=false", *overrides]))
    return read_json(folder / "collect" / "collect.json")


def f1(present, target):
    hit, wrong = (present & target).sum(0), (present ^ target).sum(0)
    return 2 * hit / (2 * hit + wrong)


def by_hand(skill):
    """F1 by seed, fold and class, and of pooled folds by seed and class."""
    each = np.array([[f1(predictions(s, f, skill) > 0.5, truth(f)) for f in FOLDS] for s in SEEDS])
    together = np.concatenate([truth(f) for f in FOLDS])
    pooled = [f1(np.concatenate([predictions(s, f, skill) for f in FOLDS]) > 0.5, together) for s in SEEDS]
    return each, np.array(pooled)


def cells(data, setting, quantity="f1"):
    (table,) = [table for table in data["tables"] if table["quantity"] == quantity]
    (row,) = [row for row in table["rows"] if row["name"] == setting]
    return row["cells"], row["seeds"]


def test_numbers_are_those_of_numpy(sweep, capsys):
    data = collected(sweep)
    for setting, skill in (("0.001", 0.0), ("0.01", 1.0)):
        each, pooled = by_hand(skill)
        found, seeds = cells(data, setting)
        assert seeds == 3
        for k, number in enumerate(AUS):
            assert found[f"AU{number}"]["mean"] == pytest.approx(each[:, :, k].mean(1).mean())
            assert found[f"AU{number}"]["std"] == pytest.approx(each[:, :, k].mean(1).std(ddof=1))
        means = each.mean(1).mean(1)
        assert (found["mean"]["mean"], found["mean"]["std"]) == pytest.approx((means.mean(), means.std(ddof=1)))
        assert found["pooled"]["mean"] == pytest.approx(pooled.mean(1).mean())
        assert found["pooled"]["std"] == pytest.approx(pooled.mean(1).std(ddof=1))
        assert found["pooled"]["mean"] != pytest.approx(found["mean"]["mean"], abs=1e-6)
    printed = capsys.readouterr().out
    assert "faces: au f1" in printed
    assert "0.01 is better" in printed


def test_the_difference_is_bootstrapped_over_pooled_groups(sweep):
    data = collected(sweep)
    (found,) = [c for c in data["comparisons"] if c["name"] == "f1/mean"]
    assert (found["first"], found["second"], found["seeds"], found["groups"]) == ("0.01", "0.001", 3, 18)
    difference = by_hand(1.0)[1].mean() - by_hand(0.0)[1].mean()
    assert found["difference"] == pytest.approx(difference)
    # The same by hand: groups drawn for both settings and all seeds together.
    draw = np.random.default_rng(7)
    people = [(fold, k) for fold in FOLDS for k in range(SUBJECTS)]

    def score(skill, seed, chosen):
        rows = [(f, slice(k * ROWS, (k + 1) * ROWS)) for f, k in chosen]
        given = {f: predictions(seed, f, skill) > 0.5 for f in FOLDS}
        true = {f: truth(f) for f in FOLDS}
        return f1(np.concatenate([given[f][r] for f, r in rows]), np.concatenate([true[f][r] for f, r in rows])).mean()

    drawn = []
    for _ in range(200):
        chosen = [people[k] for k in draw.integers(0, len(people), len(people))]
        drawn.append(np.mean([score(1.0, s, chosen) - score(0.0, s, chosen) for s in SEEDS]))
    low, high = np.quantile(drawn, [0.025, 0.975])
    assert (found["low"], found["high"]) == pytest.approx((low, high), abs=0.25 * (high - low))
    assert found["verdict"] == "0.01"


def test_equal_settings_are_not_resolved(sweep):
    for path in sweep.glob("*/predictions/test.parquet"):
        results = read_json(path.parents[1] / "results.json")
        other = 0 if results["config"]["optimizer"]["lr"] == 0.01 else None
        if other is not None:
            twin = sweep / str(int(path.parents[1].name) - 9) / "predictions" / "test.parquet"
            shutil.copy(twin, path)
    (found,) = [c for c in collected(sweep)["comparisons"] if c["name"] == "f1/mean"]
    assert (found["difference"], found["low"], found["high"]) == (0, 0, 0)
    assert found["verdict"] == "not resolved"


def test_a_seed_with_a_missing_fold_is_left_out_and_named(sweep, capsys):
    data = read_json(sweep / "sweep.json")
    (sweep / "4" / "results.json").unlink()  # 0.001, seed 2, fold 1
    data["jobs"][4] |= {"state": "failed", "reason": "job 4 (seed=2): CUDA out of memory"}
    shutil.rmtree(sweep / "8")  # 0.001, seed 3, fold 2
    data["jobs"][8] |= {"state": "waiting"}
    write_json(sweep / "sweep.json", data)
    told = collected(sweep)
    assert [(e["setting"], e["seed"], e["fold"], e["reason"]) for e in told["left_out"]] == [
        ("0.001", 2, "1", "CUDA out of memory"),
        ("0.001", 3, "2", "not started"),
    ]
    found, seeds = cells(told, "0.001")
    assert seeds == 1
    assert found["mean"]["mean"] == pytest.approx(by_hand(0.0)[0][0].mean(0).mean())
    assert found["mean"]["std"] is None
    assert cells(told, "0.01")[1] == 3
    assert {c["seeds"] for c in told["comparisons"]} == {1}  # the seed that both have
    printed = " ".join(capsys.readouterr().out.split())
    assert "0.001, seed 2 is left out: test part 1 is missing (CUDA out of memory)" in printed
    assert "seed 2 is left out" in (sweep / "collect" / "tables.md").read_text()


DAMAGE = {
    "results": (lambda run: (run / "results.json").write_text('{"name": '), "not JSON"),
    "no predictions": (lambda run: (run / "predictions" / "test.parquet").unlink(), "no predictions on the test part"),
    "predictions": (lambda run: (run / "predictions" / "test.parquet").write_bytes(b"PAR1"), "is not a Parquet file"),
    "config": (lambda run: (run / "release" / "config.yaml").unlink(), "no config.yaml in it"),
    "labels": (lambda run: (run / "release" / "labels.json").write_text("{}"), "labels.json"),
}


@pytest.mark.parametrize("kind", DAMAGE)
def test_a_damaged_run_is_left_out_and_named_and_the_others_are_read(sweep, kind):
    damage, reason = DAMAGE[kind]
    damage(sweep / "4")  # 0.001, seed 2, fold 1
    told = collected(sweep)
    (left,) = told["left_out"]
    assert (left["setting"], left["seed"], left["fold"]) == ("0.001", 2, "1")
    assert reason in left["reason"]
    assert str(sweep / "4") in left["reason"]
    found, seeds = cells(told, "0.001")
    each = by_hand(0.0)[0][[0, 2]].mean((1, 2))
    assert seeds == 2
    assert found["mean"]["mean"] == pytest.approx(each.mean())
    assert cells(told, "0.01")[1] == 3
    with (sweep / "collect" / "scores.csv").open() as file:
        assert ("0.001", "2") not in {(row["setting"], row["seed"]) for row in csv.DictReader(file)}


def change(folder, **changes):
    results = read_json(folder / "results.json")
    config = OmegaConf.create(results["config"])
    for key, value in changes.items():
        OmegaConf.update(config, key.replace("__", "."), value)
    write_json(folder / "results.json", results | {"config": OmegaConf.to_container(config)})


def test_other_differences_inside_a_setting_are_refused_by_name(sweep):
    change(sweep / "5", trainer__max_epochs=7, model__dropout=0.9)
    with pytest.raises(ConfigError, match=r"only seed and test part may differ .*model\.dropout, trainer\.max_epochs"):
        collected(sweep)
    change(sweep / "5", trainer__max_epochs=1, model__dropout=0.0)
    results = read_json(sweep / "5" / "results.json")
    config = read_json(sweep / "4" / "results.json")["config"]
    results["config"] = config | {"seed": 2, "protocol": results["config"]["protocol"]}
    results["config"]["figures"] = False  # which changes no result
    write_json(sweep / "5" / "results.json", results)
    collected(sweep)
    results["made_of"] = {"table": {"faces": "xyz"}, "init": {}}
    write_json(sweep / "5" / "results.json", results)
    with pytest.raises(ConfigError, match=r"other data \(table faces: abc and xyz\)"):
        collected(sweep)


def test_earlier_stages_may_differ_in_test_part_too(sweep, config, tmp_path):
    """A first stage is trained without the people that the second is tested on, so each test part has its own."""
    runs = [sweep / str(number) for number in range(9)]
    for number, run in enumerate(runs):
        stage = tmp_path / f"stage{number}"
        write_run(stage, config, 1 + number // 3, FOLDS[number % 3], 0.0)
        results = read_json(run / "results.json")
        results["config"]["init"] = str(stage / "release" / "model.safetensors" if number % 2 else stage)
        results["made_of"]["init"] = {results["config"]["init"]: f"{number}"}
        write_json(run / "results.json", results)
    collected(sweep)
    stage = tmp_path / "stage4" / "results.json"
    then = read_json(stage)
    write_json(stage, then | {"made_of": {"table": {"faces": "other labels"}, "init": {}}})
    with pytest.raises(ConfigError, match=r"only seed and test part may differ .* in init; "):
        collected(sweep)
    write_json(stage, then)
    change(tmp_path / "stage4", trainer__max_epochs=7)
    with pytest.raises(ConfigError, match=r"only seed and test part may differ .* in init; "):
        collected(sweep)
    shutil.rmtree(tmp_path / "stage4")
    with pytest.raises(ConfigError, match=r"only seed and test part may differ .* in init; "):
        collected(sweep)


def test_other_test_rows_are_not_compared(sweep):
    path = sweep / "17" / "predictions" / "test.parquet"
    table = FaceTable.read_parquet(path)
    table.take(np.arange(len(table) - 1)).to_parquet(path)
    (found,) = collected(sweep)["comparisons"]
    assert (found["verdict"], found["difference"]) == ("other test rows or labels", None)


@pytest.mark.parametrize("column", ["group", "target_au02_occurrence"])
def test_other_groups_or_labels_of_the_same_rows_are_not_compared(sweep, column):
    for k in range(9, 18):
        path = sweep / str(k) / "predictions" / "test.parquet"
        table = FaceTable.read_parquet(path)
        values = table.strings(column)[0] if column == "group" else table.numbers(column)[0]
        table.with_columns({column: np.roll(values, 1)}).to_parquet(path)
    (found,) = collected(sweep)["comparisons"]
    assert (found["verdict"], found["difference"]) == ("other test rows or labels", None)


def test_thresholds_of_each_run_decide_its_part_of_the_pool(sweep):
    for k in range(9):
        results = read_json(sweep / str(k) / "results.json")
        threshold = 0.95 if results["config"]["protocol"]["test"] == 0 else 0.5
        values = {"au": {f"AU{number}": threshold for number in AUS}}
        write_json(sweep / str(k) / "results.json", results | {"thresholds": {"rule": "tuned", "values": values}})
    found, _ = cells(collected(sweep), "0.001")
    given = {s: [predictions(s, f, 0.0) > (0.95 if f == "0" else 0.5) for f in FOLDS] for s in SEEDS}
    together = np.concatenate([truth(f) for f in FOLDS])
    pooled = np.array([f1(np.concatenate(given[s]), together) for s in SEEDS])
    assert found["pooled"]["mean"] == pytest.approx(pooled.mean(1).mean())


def test_files(sweep):
    collect.run(configuration.compose("collect", [f"folder={sweep}", "baseline=all", f"out={sweep / 'my out'}"]))
    out = sweep / "my out"
    names = sorted(str(path.relative_to(out)) for path in out.rglob("*") if path.is_file())
    assert {"tables.md", "tables.tex", "scores.csv", "summary.csv", "comparisons.csv", "collect.json"} <= set(names)
    assert {"figures/differences.png", "figures/faces_au_f1_classes.png"} <= set(names)
    rows = list(csv.DictReader((out / "scores.csv").open()))
    each = by_hand(0.0)[0]
    (row,) = [r for r in rows if (r["setting"], r["seed"], r["fold"], r["name"]) == ("0.001", "2", "1", "f1/AU4")]
    assert float(row["value"]) == pytest.approx(each[1, 1, 2])
    assert "affect collect sweep=" in (out / "tables.md").read_text()


def test_a_folder_without_a_list_and_settings_by_key(sweep):
    (sweep / "sweep.json").unlink()
    with pytest.raises(DataError, match="two runs"):
        collected(sweep)
    data = collected(sweep, "by=[optimizer.lr]")
    assert [row["name"] for row in data["tables"][0]["rows"]] == ["optimizer.lr=0.001", "optimizer.lr=0.01"]
    assert cells(data, "optimizer.lr=0.01")[1] == 3


def test_a_run_that_is_not_finished_counts_without_a_list_too(sweep):
    (sweep / "sweep.json").unlink()
    config = read_json(sweep / "4" / "results.json")["config"]  # 0.001, seed 2, fold 1
    OmegaConf.save(OmegaConf.create(config), sweep / "4" / "config.yaml")
    write_json(sweep / "4" / "data.json", {})
    shutil.copytree(sweep / "3", sweep / "3" / "rerun1")  # belongs to the run that it lies in
    (sweep / "4" / "results.json").unlink()
    told = collected(sweep, "by=[optimizer.lr]")
    assert [(e["setting"], e["seed"], e["fold"]) for e in told["left_out"]] == [("optimizer.lr=0.001", 2, "1")]


def test_a_listed_run_that_never_began_is_missing_where_keys_tell_settings_apart(sweep):
    for k in (2, 5, 8):  # fold 2 of 0.001, every seed; nothing tells the learning rate of a run that never began
        shutil.rmtree(sweep / str(k))
    told = collected(sweep, "by=[optimizer.lr]")
    assert [(e["setting"], e["seed"], e["fold"]) for e in told["left_out"]] == [
        ("optimizer.lr=0.001", seed, "2") for seed in SEEDS
    ]
    assert [row["name"] for row in told["tables"][0]["rows"]] == ["optimizer.lr=0.01"]


def test_the_default_test_part_of_a_run_that_never_began_is_that_of_the_others(sweep):
    data = read_json(sweep / "sweep.json")
    jobs = [job(k, 0.001, seed, "0") for k, seed in ((0, 1), (3, 2), (6, 3))]
    for entry in jobs:
        del entry["varied"]["protocol.test"], entry["varied"]["optimizer.lr"]
        entry["settings"] = [setting for setting in entry["settings"] if not setting.startswith("protocol")]
    write_json(sweep / "sweep.json", data | {"varied": ["seed"], "jobs": jobs})
    shutil.rmtree(sweep / "3")
    told = collected(sweep)
    assert cells(told, "train")[1] == 2
    assert [(e["seed"], e["fold"]) for e in told["left_out"]] == [(2, "0")]


def test_the_default_seed_of_a_run_that_never_began_is_that_of_the_others(sweep):
    data = read_json(sweep / "sweep.json")
    jobs = [job(k, 0.001, 2, fold) for k, fold in ((3, "0"), (4, "1"), (5, "2"))]
    for entry in jobs:
        del entry["varied"]["seed"], entry["varied"]["optimizer.lr"]
        entry["settings"] = [setting for setting in entry["settings"] if not setting.startswith("seed")]
    write_json(sweep / "sweep.json", data | {"varied": ["protocol.test"], "jobs": jobs})
    shutil.rmtree(sweep / "4")
    settings, _ = collect.read_settings(sweep)
    assert (settings["train"].seeds, settings["train"].folds) == ([2], ["0", "1", "2"])
    assert settings["train"].reasons == {(2, "1"): "not started"}


def test_a_sweep_over_seeds_and_folds_has_the_name_of_its_runs(sweep):
    data = read_json(sweep / "sweep.json")
    jobs = [entry for entry in data["jobs"] if entry["varied"].pop("optimizer.lr") == "0.001"]
    write_json(sweep / "sweep.json", data | {"varied": ["seed", "protocol.test"], "jobs": jobs})
    (sweep / "0" / "results.json").unlink()
    told = collected(sweep)
    assert cells(told, "train")[1] == 2
    assert [(e["setting"], e["seed"]) for e in told["left_out"]] == [("train", 1)]


def test_trials_of_a_search_are_not_compared(sweep):
    data = read_json(sweep / "sweep.json")
    write_json(sweep / "sweep.json", data | {"trials": 18, "sweeper": "optuna"})
    told = collected(sweep)
    assert told["comparisons"] == []
    assert any("not compared" in note for note in told["notes"])


def test_what_an_experiment_did_to_a_trained_model_is_no_training(sweep, tmp_path):
    (sweep / "sweep.json").unlink()
    runs = collected(sweep, "by=[optimizer.lr]")["tables"]
    (sweep / "compressed" / "release").mkdir(parents=True)
    write_json(sweep / "compressed" / "results.json", {"metrics": {}, "findings": {}, "settings": {}})
    assert collected(sweep, "by=[optimizer.lr]")["tables"] == runs
    shutil.copytree(sweep / "compressed", tmp_path / "alone" / "compressed")
    with pytest.raises(DataError, match="no finished run"):
        collected(tmp_path / "alone")


def test_bad_input(sweep, tmp_path):
    with pytest.raises(ConfigError, match="no such folder"):
        collected(tmp_path / "none")
    (tmp_path / "empty").mkdir()
    with pytest.raises(DataError, match="no finished run"):
        collected(tmp_path / "empty")
    (tmp_path / "failed").mkdir()
    listed = read_json(sweep / "sweep.json")
    failed = {"state": "failed", "reason": "job 0 (seed=1): encoder.widths: none", "varied": {"seed": "1"}}
    write_json(tmp_path / "failed" / "sweep.json", listed | {"jobs": [listed["jobs"][0] | failed]})
    with pytest.raises(DataError, match=r"no finished run \(encoder\.widths: none\)$"):
        collected(tmp_path / "failed")
    with pytest.raises(ConfigError, match=r"baseline=0\.1"):
        collected(sweep, "baseline='0.1'")
    with pytest.raises(ConfigError, match=r"no run has a key optimizer\.rl; did you mean optimizer\.lr"):
        collected(sweep, "by=[optimizer.rl]")
    with pytest.raises(DataError, match="validation"):
        collected(sweep, "part=validation")


def without_labels(run):
    path = run / "predictions" / "test.parquet"
    table = FaceTable.read_parquet(path)
    nothing = (np.zeros(len(table), np.float32), np.zeros(len(table), bool))
    missing = {name: nothing for name in table.names if name.startswith("target_")}
    table.with_columns(missing).to_parquet(path)


def test_a_setting_without_labels_in_a_test_part_is_left_out_by_name(sweep, capsys):
    without_labels(sweep / "3")
    found = collected(sweep)
    told = "0.001: left out of au: no labels of it in test part 0 of seed 2"
    assert told in found["notes"]
    assert {row["name"] for table in found["tables"] for row in table["rows"]} == {"0.01"}
    assert told in " ".join(capsys.readouterr().out.split())
    for run in sweep.glob("[0-9]*"):
        without_labels(run)
    with pytest.raises(DataError, match=r"no task has labels in all test parts of a setting: .*0\.01: left out of au"):
        collected(sweep)


@pytest.mark.parametrize("override", ["digits=-1", "resamples=-5", "out=/proc/nowhere"])
def test_numbers_and_places_are_checked_before_anything_is_read(override, sweep):
    with pytest.raises(ConfigError, match=r"give a whole number, 0 or more|cannot be written to"):
        collected(sweep, override)


def test_a_baseline_whose_seeds_are_left_out_is_not_replaced(sweep):
    for seed in range(3):
        shutil.rmtree(sweep / str(3 * seed))
    found = collected(sweep, "baseline='0.001'")
    assert found["comparisons"] == []
    assert "au: baseline=0.001 has no row there, so nothing is compared" in found["notes"]


def test_settings_with_fewer_test_parts_say_so(sweep):
    (sweep / "sweep.json").unlink()
    for number in range(9):
        if number % 3:
            shutil.rmtree(sweep / str(number))
    found = collected(sweep, "by=[optimizer.lr]")
    assert "optimizer.lr=0.001: test part 0 only, others have more" in found["notes"]
    assert not any(note.startswith("optimizer.lr=0.01: test part") for note in found["notes"])
