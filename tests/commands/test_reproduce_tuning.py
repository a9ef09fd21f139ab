# SPDX-License-Identifier: Apache-2.0
"""Controlled experiments with wrong labels: a rate per arm, headroom, baselines by pattern, what was memorised."""

from __future__ import annotations

import json
import shlex
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from hydra.utils import instantiate
from omegaconf import OmegaConf

from affect.commands import figures, measures, reproduce
from affect.commands.configuration import compose, config_directory
from affect.commands.main import main
from affect.data.table import FaceTable
from affect.errors import ConfigError
from affect.report.experiments import baseline_of, experiment_markdown

EXPERIMENTS = sorted(
    path.stem for path in (config_directory() / "experiment" / "controlled").glob("qat_noisy_labels*.yaml")
)

COMPOSED = (("stopping_40", "mixup_40", "binary_outer8_40", "w3a3_40"), ("stopping_25", "mixup_25", "w2a2_25"))
"""Arms that tests compose: each takes a moment."""


def plan(name: str = "qat_noisy_labels") -> dict[str, Any]:
    node = OmegaConf.to_container(compose("train", [f"experiment=controlled/{name}"]).controlled, resolve=True)
    assert isinstance(node, dict)
    return node


@pytest.mark.parametrize("name", EXPERIMENTS)
def test_arms_differ_only_in_what_they_say(name: str) -> None:
    found = plan(name)
    config = compose("reproduce", [f"experiment=controlled/{name}"])
    reproduce.check_plan(config, found, name)
    tuned = [arm for group in found["tune"]["groups"] for arm in (group["arm"], *group.get("also", ()))]
    assert sorted(tuned) == sorted(found["arms"]), "every arm has a tuned rate"
    assert found["scales"]["paper"]["seeds"] >= 5
    for arm, overrides in found["arms"].items():
        assert baseline_of(arm, found["baseline"]) in found["arms"]
        noise = next(float(o.partition("=")[2]) for o in overrides if o.startswith("dataset.noise="))
        assert f"{noise:.0%}".removesuffix("%") == arm.rpartition("_")[2]
        assert ("callbacks=[default,qat]" in overrides) == arm.startswith(("w2", "w3", "w4", "w8", "ternary", "binary"))
        both = next((o for o in overrides if o.startswith("callbacks.qat.activations=")), None)
        assert (both is not None) == ("a" in arm.partition("_")[0][2:3])
        if both is not None:
            assert both.endswith(f"={arm[3]}")
            assert f"callbacks.qat.weights={arm[1]}" in overrides
    for level in {arm.rpartition("_")[2] for arm in found["headroom"]}:
        widths = {f"{width}_{level}" for width in ("w8a8", "w4a4", "w3a3", "w2a2", "binary")}
        assert widths <= set(found["arms"]), "the table is read at each level with headroom"
    for arm in next(group for group in COMPOSED if set(group) <= set(found["arms"])):
        overrides = found["arms"][arm]
        cell = compose("train", [f"experiment=controlled/{name}", *overrides])
        assert cell.selection == ("best_val" if arm.startswith("stopping") else "last")
        quantized = cell.callbacks.get("qat")
        if quantized is not None:
            instantiate(quantized, _convert_="object")


@pytest.mark.parametrize(
    "name", [pytest.param(name, marks=[pytest.mark.slow] if name.endswith("faces") else []) for name in EXPERIMENTS]
)
def test_the_quick_scale_tunes_trains_and_says_whether_there_is_headroom(
    name: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    pytest.importorskip("sklearn")
    monkeypatch.setattr(figures, "write_run_figures", lambda *arguments: None)
    command = (
        f"reproduce experiment=controlled/{name} scale=quick paths.runs={tmp_path} paths.cache={tmp_path / 'cache'} "
        "callbacks.progress=null"
    )
    if name == "qat_noisy_labels":  # the slow one captures a graph
        command += " arms=[float_40,stopping_40,binary_40]"
    assert main(shlex.split(command)) in (0, None)
    out = tmp_path / "reproduce" / name / "quick"
    stored = json.loads((out / "reproduce.json").read_text())
    on = next(iter(stored["tuned"]))
    assert stored["tuned"][on]["chosen"] == 0.001
    results = json.loads((out / on / "seed1" / "results.json").read_text())
    assert results["config"]["optimizer"]["lr"] == 0.001
    text = (out / "table.md").read_text()
    assert "on the validation part of" in text
    assert "too few seeds to tell whether there is headroom" in text
    # The same training, once selected by the last epoch and once by the best one.
    plain, stopped = (next(arm for arm in stored["arms"] if arm.startswith(name)) for name in ("float", "stopping"))
    label = next(label for label in stored["measures"] if label.endswith("at the best epoch"))
    score = stored["measures"][label.partition(" ")[0]][stopped]["values"]
    assert stored["measures"][label][plain]["values"] == stored["measures"][label][stopped]["values"] == score
    for arm in stored["arms"]:
        own = json.loads((out / arm / "seed1" / "results.json").read_text())
        seen = [epoch[own["selection"]["monitor"]] for epoch in own["history"]]
        (task,) = own["config"]["task"]
        selecting = own["config"]["task"][task]["score"]
        own["folder"] = str(out / arm / "seed1")
        best = measures.at_best_epoch(own, task, selecting, part="validation")
        assert best == pytest.approx(max(seen)), arm
    # The share of wrong labels that were memorised, from the predictions and the dataset alone.
    value = stored["measures"]["memorised"][on]["values"]["1"]
    run = results | {"folder": str(out / on / "seed1")}
    task = next(iter(results["labels"]))
    assert measures.memorised(run, task) == value
    if task == "category":
        predictions = FaceTable.read_parquet(out / on / "seed1" / "predictions" / "train.parquet")
        table = instantiate(results["config"]["dataset"]["read"])
        rows = predictions.numbers("row")[0].astype(int)
        wrong = (table.strings("digit")[0] != table.strings("true_digit")[0])[rows]
        given, true = table.strings("digit")[0][rows], table.strings("true_digit")[0][rows]
        answered = predictions.strings("category_digit")[0]
        assert value == pytest.approx((answered == given)[wrong].mean())
        assert measures.memorised(run, task, "true") == pytest.approx((answered == true)[wrong].mean())
        (out / on / "seed1" / "predictions" / "train.parquet").unlink()
        with pytest.raises(ConfigError, match="predict_train=true"):
            measures.memorised(run, task)
        with pytest.raises(ConfigError, match="did you mean accuracy"):
            measures.at_best_epoch(run, task, "acuracy")
        (out / on / "seed1" / "predictions" / "test_at_best_epoch.parquet").unlink()
        (out / on / "seed1" / "best.safetensors").unlink()
        with pytest.raises(ConfigError, match=r"callbacks\.best"):
            measures.at_best_epoch(run, task, "accuracy")


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"tune": {"key": "optimizer.lr"}}, r"controlled\.tune\.values is missing"),
        ({"headroom": {"float_40": {"measure": "memorized", "at_least": 0.5}}}, "did you mean memorised"),
        ({"headroom": {"float_40": {"measure": "memorised"}}}, "needs at_least"),
        ({"baseline": {"*": "flaot_40"}}, "did you mean float_40"),
    ],
)
def test_plans_that_cannot_be_are_refused(change: dict, message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        reproduce.check_plan(compose("reproduce", ["experiment=controlled/qat_noisy_labels"]), plan() | change, "x")


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"measure": {"part": "test", "task": "category", "name": "accuracy"}}, "the test part selects nothing"),
        ({"groups": [{"arm": "float_4"}]}, "did you mean float_40"),
        ({"groups": [{"arm": "float_40"}, {"arm": "w2_40", "also": ["float_40"]}]}, "arm float_40 is in two groups"),
    ],
)
def test_tunings_that_cannot_be_are_refused(change: dict, message: str) -> None:
    found = plan()
    found["tune"] |= change
    with pytest.raises(ConfigError, match=message):
        reproduce.check_tuning_plan(found)


@pytest.mark.parametrize(
    ("values", "verdict"),
    [([0.9, 0.91, 0.92], "0.5: headroom"), ([0.2, 0.3, 0.4], "no headroom"), ([0.9], "too few seeds")],
)
def test_headroom_of_a_level(values: list[float], verdict: str) -> None:
    cells = {"memorised": {"float_40": dict(enumerate(values))}}
    (note,) = reproduce.headroom_notes({"headroom": {"float_40": {"measure": "memorised", "at_least": 0.5}}}, cells)
    assert verdict in note


def test_the_best_mean_on_validation_labels_is_taken(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    from rich.console import Console

    from affect.commands import train

    trained: list[tuple[float, int]] = []

    def fake(config: Any, folder: Path) -> None:
        trained.append((config.optimizer.lr, config.seed))
        value = {0.0003: 0.4, 0.001: 0.6, 0.003: 0.6}[config.optimizer.lr] + 0.01 * config.seed
        folder.mkdir(parents=True)
        record = {"task": "category", "name": "accuracy", "value": value}
        (folder / "results.json").write_text(json.dumps({"metrics": {"validation": [record]}}))

    monkeypatch.setattr(train, "train", fake)
    monkeypatch.setattr(reproduce, "compose", lambda config_name, overrides: compose(config_name, overrides))
    found = plan()
    scale = {"tune": {"seeds": 2}}
    arguments = (
        found,
        scale,
        [],
        ["binary_0", "float_0"],
        tmp_path,
        "controlled/qat_noisy_labels",
        Console(quiet=True),
    )
    tuned, own = reproduce.run_tuning(*arguments)
    assert set(tuned) == {"float_40", "binary_40"}
    assert sorted(trained) == sorted([(rate, seed) for rate in (0.0003, 0.001, 0.003) for seed in (1, 2)] * 2)
    assert own["binary_0"] == ["optimizer.lr=0.001"]
    np.testing.assert_allclose([*tuned["float_40"]["scores"].values()], [0.415, 0.615, 0.615])
    trained.clear()
    given = (*arguments[:2], ["optimizer.lr=0.1"], *arguments[3:])
    assert reproduce.run_tuning(*given) == ({}, {}), "what the command line sets is not tuned"
    assert not trained


def test_each_arm_is_compared_with_its_own_baseline() -> None:
    cells = {"x": {"a_1": {1: 1.0, 2: 2.0}, "b_1": {1: 2.0, 2: 3.0}, "a_2": {1: 0.0, 2: 0.0}, "b_2": {1: 5.0, 2: 5.0}}}
    text = experiment_markdown(cells, {"*_1": "a_1", "*_2": "a_2"})
    rows = {
        line.split("|")[1].strip(): line.split("|")[3].strip()
        for line in text.splitlines()
        if line.count("|") > 3 and "_" in line
    }
    assert rows["b_1"].startswith("+1.000")
    assert rows["b_2"].startswith("+5.000")
    assert rows["a_1"] == rows["a_2"] == ""


def test_a_measure_with_bars_in_its_name_is_one_column() -> None:
    head, rule, row, *_ = experiment_markdown({"|cos|": {"a": {1: 0.5, 2: 0.5}}}, None).splitlines()
    assert head == "| arm | \\|cos\\| |"
    assert rule.count("|") == row.count("|") == 3


@pytest.mark.parametrize(
    ("chosen", "tried", "said"),
    [
        (0.001, [0.0003, 0.001, 0.003], ""),
        (0.0003, [0.0003, 0.001, 0.003], " It is the smallest that was tried: a better one may lie beyond."),
        (0.003, [0.0003, 0.001, 0.003], " It is the largest that was tried: a better one may lie beyond."),
        (0.001, [0.001], ""),
        ("adam", ["adam", "sgd"], ""),
        (True, [True, False], ""),
        (0.1, [None, 0.1, 0.2], ""),
    ],
)
def test_a_value_at_the_end_of_those_tried_is_said_to_be_one(chosen: Any, tried: list, said: str) -> None:
    node = {"key": "k", "chosen": chosen, "arms": ["a", "b"], "scores": {str(value): 0.5 for value in tried}}
    (note,) = reproduce.tuning_notes({"a": node})
    assert note.startswith(f"k={chosen} for a, b: best of ")
    assert note.endswith(f"on the validation part of a.{said}")
