# SPDX-License-Identifier: Apache-2.0
"""``affect rerun``: the same run again gives the same numbers, and what differs from then is said."""

from __future__ import annotations

import json
import math
import os
import shutil
import signal
from pathlib import Path

import pytest

from affect.callbacks import Preempted
from affect.commands import configuration, rerun, train
from affect.commands.run_folder import note_start
from affect.errors import ConfigError, DataError
from affect.report import read_json, write_json
from tests.conftest import SMALL

QUICK = (*SMALL, "task=[expression,au]", "data.limit=12", "bootstrap.resamples=0", "figures=false")


@pytest.fixture(scope="module")
def finished(tmp_path_factory):
    folder = tmp_path_factory.mktemp("then")
    paths = [f"paths.output={folder / 'run'}", f"paths.cache={folder / 'cache'}"]
    train.run(configuration.compose("train", [*QUICK, *paths]))
    return folder / "run"


@pytest.fixture
def run(finished, tmp_path):
    """The folder of a finished run, moved somewhere else."""
    return Path(shutil.copytree(finished, tmp_path / "moved"))


def again(run, *overrides):
    return rerun.run(configuration.compose("rerun", [f"results={run / 'results.json'}", *overrides]))


def test_the_same_run_gives_the_same_numbers_in_a_new_folder(run, capsys):
    before = {path: path.stat().st_mtime_ns for path in run.rglob("*") if path.is_file()}
    score = again(run)
    assert {path: path.stat().st_mtime_ns for path in before} == before
    then, now = read_json(run / "results.json"), read_json(run / "rerun1" / "results.json")
    assert now["metrics"] == then["metrics"]
    assert now["selection"]["score"] == then["selection"]["score"] == score
    assert now["made_of"] == then["made_of"]
    told = read_json(run / "rerun1" / "rerun.json")
    assert told["numbers"] == []
    assert told["compared"] == sum(map(len, then["metrics"].values())) > 0
    assert f"all {told['compared']} numbers are those of then" in capsys.readouterr().out
    assert str(run.parent / "run") not in json.dumps(now["config"]["callbacks"])


def test_a_signal_is_obeyed_as_in_the_first_run(run, monkeypatch, capsys):
    monkeypatch.delenv("SLURM_JOB_ID", raising=False)
    monkeypatch.setattr(train, "train", lambda config, output: os.kill(os.getpid(), signal.SIGTERM))
    with pytest.raises(Preempted):
        again(run)
    assert "SIGTERM: state saved; the same command continues the run" in capsys.readouterr().err


def test_runs_of_several_processes_keep_how_their_encoders_were_shared_out(run, tmp_path):
    sharing = configuration.compose("train", [*QUICK, "trainer=fsdp"]).trainer.strategy
    results = read_json(run / "results.json")
    results["config"]["trainer"]["strategy"] = dict(sharing)
    results["config_keys"] = [key for key, _ in configuration.leaves(results["config"])]
    config, notes = rerun.stored_config(rerun.in_order(results, run), tmp_path / "new")
    assert config.trainer.strategy == sharing
    assert notes == []


def test_keys_keep_their_order_although_json_sorts_them(run):
    results = read_json(run / "results.json")
    assert list(results["config"]["task"]) == ["au", "expression"]
    assert list(rerun.in_order(results, run)["task"]) == ["expression", "au"]
    del results["config_keys"]
    ordered = rerun.in_order(results, run)  # of an earlier version: by the file beside it
    assert list(ordered["task"]) == ["expression", "au"]
    assert ordered == results["config"]
    assert rerun.in_order(results, run / "elsewhere") == results["config"]


def test_what_differs_is_said_before_anything_starts(run, capsys):
    results = read_json(run / "results.json")
    results["environment"]["packages"]["numpy"] = "1.0"
    results["environment"]["git"] = {"commit": "0" * 40, "dirty": True, "patch": "f" * 16}
    results["made_of"]["table"] = dict.fromkeys(results["made_of"]["table"], "abc")
    del results["config"]["smoothing"]
    write_json(run / "results.json", results)
    (run / "code").mkdir(exist_ok=True)
    (run / "code" / f"{'f' * 16}.patch").write_text("")
    assert again(run, "check=true", "change=['optimizer.lr=0.5']") is None
    printed = capsys.readouterr().out
    assert "key smoothing is new since then: 0" in printed
    assert f"optimizer.lr: {results['config']['optimizer']['lr']} then, 0.5 now (change)" in printed
    assert "package numpy: 1.0 then, " in printed
    assert f"commit: {'0' * 40} then, " in printed
    assert f"git checkout {'0' * 40} && git apply {run}/code/{'f' * 16}.patch" in printed
    assert "table faces: abc then, " in printed
    assert not list(run.glob("rerun*"))


def test_data_that_is_not_where_it_was_is_asked_for(run):
    results = read_json(run / "results.json")
    results["config"]["dataset"]["root"] = "faces"
    write_json(run / "results.json", results)
    with pytest.raises(
        (ConfigError, DataError), match=r"paths: dataset\.root=faces; change=\[<key>=<path>\] says where"
    ):
        again(run, "check=true")


def test_changes_and_places(run, tmp_path):
    stored = read_json(run / "results.json")["config"]
    config, notes = rerun.stored_config(stored, tmp_path / "new", ["optimizer.lr=0.5", "paths.cache=/a b, c"])
    assert (config.optimizer.lr, config.paths.cache) == (0.5, "/a b, c")
    assert config.callbacks.best.folder == config.paths.output == str(tmp_path / "new")
    assert len([note for note in notes if note.endswith("(change)")]) == 2
    with pytest.raises(ConfigError, match=r"no key optimizer\.rl"):
        rerun.stored_config(stored, tmp_path / "new", ["optimizer.rl=0.5"])
    stored["dataset"] |= {"root": "/then", "read": {"root": "/then"}}
    config, _ = rerun.stored_config(stored, tmp_path / "new", ["dataset.root=/now"])
    assert (config.dataset.root, config.dataset.read.root) == ("/now", "/now")


def test_folders(tmp_path):
    assert rerun.new_folder(tmp_path, None) == tmp_path / "rerun1"
    write_json(tmp_path / "rerun1" / "results.json", {})
    assert rerun.new_folder(tmp_path, None) == tmp_path / "rerun2"
    assert rerun.new_folder(tmp_path, str(tmp_path / "x")) == tmp_path / "x"
    with pytest.raises(ConfigError, match="the run itself"):
        rerun.new_folder(tmp_path, str(tmp_path))


def test_numbers_are_compared_by_name():
    def record(name, value, subgroup=None):
        return {"task": "au", "name": name, "value": value, "subgroup": subgroup}

    then = {"test": [record("a", 0.5), record("b", None), record("c", 0.1), record("a", 0.2, "sex=f")]}
    now = {"test": [record("a", 0.5), record("b", None), record("c", 0.4), record("a", 0.3, "sex=f")]}
    found, count = rerun.number_differences(then, now)
    assert [(each["name"], each["then"], each["now"]) for each in found] == [
        ("test au c", 0.1, 0.4),
        ("test au a sex=f", 0.2, 0.3),
    ]
    assert count == 4
    found, _ = rerun.number_differences(then, {"test": [record("a", 0.5)]})
    assert {each["name"] for each in found} == {"test au c", "test au a sex=f"}
    assert all(math.isnan(each["now"]) for each in found)


def test_other_files_are_refused(tmp_path):
    write_json(tmp_path / "results.json", {"config": {"a": 1}})
    with pytest.raises(ConfigError, match="no results of affect train"):
        again(tmp_path)
    with pytest.raises(DataError, match="no such file"):
        again(tmp_path / "none")


def test_each_start_of_a_run_is_noted_with_its_code(tmp_path, monkeypatch):
    from affect.commands import run_folder

    monkeypatch.setattr(run_folder, "code_patch", lambda: "a patch\n")
    assert len(note_start(tmp_path)) == 1
    monkeypatch.setattr(run_folder, "code_patch", lambda: "")
    starts = note_start(tmp_path)
    assert len(starts) == 2
    assert all(start["environment"]["python"] for start in starts)
    (patch,) = (tmp_path / "code").iterdir()
    assert patch.read_text() == "a patch\n"
