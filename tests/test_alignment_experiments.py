# SPDX-License-Identifier: Apache-2.0
"""The experiments on face alignment compare what can be compared: the same faces, updates and budgets."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from hydra import compose, initialize_config_dir
from omegaconf import DictConfig, OmegaConf
from torch import nn

from affect.commands import assembly, reproduce
from affect.commands.configuration import config_directory
from affect.commands.main import main
from affect.data.batch import FaceBatch
from affect.errors import ConfigError


def composed(*overrides: str) -> DictConfig:
    with initialize_config_dir(str(config_directory()), version_base="1.3"):
        return compose("train", list(overrides))


def cost(config: DictConfig) -> tuple[int, int]:
    """Return a model's parameters, and the multiplications of its convolutions and linear layers for one face."""
    tasks = assembly.build_tasks(config)
    module = assembly.build_model(config, tasks).eval()
    done = [0]

    def count(layer: nn.Module, _: Any, output: torch.Tensor) -> None:
        per_output = layer.weight[0].numel()  # type: ignore[index, union-attr]
        done[0] += output.numel() * per_output

    for layer in module.modules():
        if isinstance(layer, nn.Conv2d | nn.Linear):
            layer.register_forward_hook(count)
    side = int(config.encoder.image_size)
    image = torch.zeros(1, 3, side, side, dtype=torch.uint8)
    with torch.inference_mode():
        module(FaceBatch(image=image, targets={}, masks={}))
    return sum(parameter.numel() for parameter in module.parameters()), done[0]


def test_direct_regression_has_decafas_budget_and_everything_else_of_it() -> None:
    decafa, regression = composed("experiment=decafa_faces"), composed("experiment=regression_faces")
    for key in (
        *("dataset", "prepare", "transform", "task", "scheduler", "data", "protocol", "selection", "seed"),
        *("trainer", "loss", "weighting", "bootstrap", "callbacks"),
    ):
        one, other = (
            OmegaConf.to_container(OmegaConf.create({key: c[key]}), resolve=False) for c in (decafa, regression)
        )
        assert one == other, key
    assert decafa.encoder.image_size == regression.encoder.image_size
    (parameters, operations), (own, own_operations) = cost(decafa), cost(regression)
    assert 0.9 < own / parameters < 1.1
    assert 0.9 < own_operations / operations < 1.1


def test_arms_of_few_fine_faces_differ_in_annotations_and_layers_alone() -> None:
    plan = composed("experiment=controlled/decafa_few_fine").controlled
    rows = {}
    for arm, overrides in plan.arms.items():
        config = composed("experiment=controlled/decafa_few_fine", *overrides)
        rows[arm] = (config.dataset.fine, config.dataset.coarse, config.model.chain, list(config.task))
        assert config.data.sampling.length == 1120
    everything = ["landmarks_98", "landmarks_68", "landmarks_5"]
    assert rows == {
        "fine_only": (30, 0, "scores", everything[:1]),
        "chain": (30, 600, "scores", everything),
        "separate": (30, 600, "separate", everything),
        "all_fine": (630, 0, "scores", everything[:1]),
    }
    assert plan.scales.paper.seeds >= 5


def test_findings_are_measured_by_place() -> None:
    results = {"findings": {"stages": {"landmarks_98": {"nme": [9.0, 7.0, 6.5], "points": 12}}}}

    def found(path: str) -> float | None:
        return reproduce.measured(results, {"finding": f"stages/landmarks_98/{path}"}, "NME")

    assert (found("nme/0"), found("nme/-1"), found("points")) == (9.0, 6.5, 12.0)
    for path in ("nme/3", "nme/last", "points/0"):
        with pytest.raises(ConfigError, match=f"controlled.measures.NME: no finding '{path.rpartition('/')[2]}'"):
            found(path)


@pytest.mark.slow
def test_few_fine_faces_run_on_the_quick_scale(tmp_path: Path) -> None:
    paths = [f"paths.runs={tmp_path / 'runs'}", f"paths.cache={tmp_path / 'cache'}"]
    assert main(["reproduce", "experiment=controlled/decafa_few_fine", "scale=quick", *paths]) == 0
    (path,) = tmp_path.rglob("reproduce.json")
    measures = json.loads(path.read_text())["measures"]
    assert set(measures) == {"NME of 98 points", "NME of the first stage"}
    for arms in measures.values():
        assert set(arms) == {"fine_only", "chain", "separate"}
        assert all(0 < value < 1000 for arm in arms.values() for value in arm["values"].values())
