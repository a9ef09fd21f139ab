# SPDX-License-Identifier: Apache-2.0
"""Controlled experiments on uncertainty weighting, privileged attribution and THIN on faces: arms, measures, a run."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import pytest
import torch

from affect import losses
from affect.commands import assembly, measures
from affect.commands.configuration import compose
from affect.commands.main import main
from affect.commands.run_folder import result_hash
from affect.errors import ConfigError
from affect.models.weighting import UncertaintyWeighting

NAMES = ("uncertainty_scales", "uncertainty_scales_faces", "pal_shortcut", "pal_shortcut_faces", "thin_faces")


@pytest.mark.parametrize("name", [*NAMES[:-1], pytest.param("thin_faces", marks=pytest.mark.slow)])
def test_every_arm_is_another_run_and_has_what_its_name_says(name: str) -> None:
    plan = compose("train", [f"experiment=controlled/{name}"]).controlled
    hashes = set()
    for arm, overrides in plan.arms.items():
        cell = compose("train", [f"experiment=controlled/{name}", *plan.get("common", []), *overrides])
        assert cell.figures is False
        hashes.add(result_hash(cell))
        for key, objective in (assembly.make(cell.objectives, "objectives") or {}).items():
            assert key == "pal"
            assert objective.shuffled == (arm == "shuffled")
            assert (objective.kind == "grad") == (arm == "grad")
            assert (objective.weight == 0) == (arm in ("plain", "no_shortcut"))
        weighting = assembly.make(cell.weighting, "weighting")
        if isinstance(weighting, UncertaintyWeighting):
            outputs = {"coefficients": ("y_precise", "y_noisy", "y_large"), "attributes": ("sign",)}
            if name == "uncertainty_scales":
                weighting.bind({"coefficients": losses.MSE(), "attributes": losses.BinaryCrossEntropy()}, outputs)
                learnt = {p.requires_grad for p in weighting.parameters()}
                assert learnt == {arm.startswith("uncertainty")}
    assert len(hashes) == len(plan.arms)
    for scale in plan.scales.values():
        assert set(scale.get("arms", [])) <= set(plan.arms)
        assert plan.baseline in scale.get("arms", [plan.baseline]), "differences need their baseline"
    assert plan.scales.paper.seeds >= 5


def test_the_oracle_gate_has_an_expert_for_each_class() -> None:
    config = compose("train", ["experiment=controlled/thin_faces"])
    common = compose("train", ["experiment=controlled/thin_faces", *config.controlled.common])
    classes = len(config.task.exogenous.bins) - 1
    assert classes == common.model.exogenous.classes == common.model.experts
    assert tuple(config.dataset.dials.yaw) == (config.task.exogenous.bins[0], config.task.exogenous.bins[-1])


def test_errors_are_in_units_of_the_labels_spread(monkeypatch: pytest.MonkeyPatch) -> None:
    random = np.random.default_rng(0)
    target = torch.from_numpy(random.normal(size=(500, 2)) * [1, 10])
    values = target + torch.from_numpy(random.normal(size=(500, 2)) * [0.3, 1])
    mask = torch.ones(500, 2, dtype=torch.bool)
    mask[::7, 1] = False
    values = torch.where(mask, values, 1e6)
    monkeypatch.setattr(measures, "_answers", lambda results, task, part: (values, target, mask))
    results = {"labels": {"numbers": ["a", "b"]}}
    known = mask[:, 1]
    wanted = [
        float((values - target)[:, 0].square().mean().sqrt() / target[:, 0].std(correction=0)),
        float((values - target)[known, 1].square().mean().sqrt() / target[known, 1].std(correction=0)),
    ]
    assert [measures.relative_error(results, "numbers", name) for name in "ab"] == pytest.approx(wanted)
    assert measures.relative_error(results, "numbers") == pytest.approx(sum(wanted) / 2)
    assert wanted == pytest.approx([0.3, 0.1], rel=0.1)
    with pytest.raises(ConfigError, match="no output 'c'"):
        measures.relative_error(results, "numbers", "c")


def test_learnt_deviations_are_read_where_there_are_some() -> None:
    results = {"findings": {"weighting": {"sigma": {"au": {"AU1": 0.5}}}}}
    assert measures.learnt_sigma(results, "au", "AU1") == 0.5
    assert measures.learnt_sigma({"findings": {}}, "au", "AU1") is None
    with pytest.raises(ConfigError, match="no sigma of au AU2; did you mean au AU1"):
        measures.learnt_sigma(results, "au", "AU2")


@pytest.mark.parametrize(
    "name",
    [
        name if name == "pal_shortcut" else pytest.param(name, marks=pytest.mark.slow)
        for name in (*NAMES, "thin_shapes", "thin_faces_identity")
    ],
)
def test_it_runs_on_the_quick_scale(name: str, tmp_path: Path) -> None:
    paths = [f"paths.runs={tmp_path}", f"paths.cache={tmp_path / 'cache'}"]
    line = ["reproduce", f"experiment=controlled/{name}", "scale=quick", "callbacks.progress=null", *paths]
    assert main(line) in (0, None)
    out = tmp_path / "reproduce" / name / "quick"
    stored = json.loads((out / "reproduce.json").read_text())
    assert (out / "figure.png").is_file()
    for label, cells in stored["measures"].items():
        found = [value for arm in cells.values() for value in arm["values"].values()]
        assert any(value is not None and np.isfinite(value) for value in found), label
