# SPDX-License-Identifier: Apache-2.0
"""The ladders of THIN: each arm is what its name says, budgets are equal, controls control, and all of them compose."""

from __future__ import annotations

from typing import Any

import pytest
import yaml

from affect.commands.configuration import compose, config_directory
from affect.commands.run_folder import result_hash
from affect.models.thin.network import Experts

NAMES = ("thin_digits", "thin_shapes", "thin_faces", "thin_faces_identity")


def plan(name: str) -> dict[str, Any]:
    file = config_directory() / "experiment" / "controlled" / f"{name}.yaml"
    return yaml.safe_load(file.read_text(encoding="utf-8"))["controlled"]


def settings(found: dict[str, Any], arm: str) -> dict[str, Any]:
    """What common and own overrides of an arm set, those of the arm last; otherwise the defaults of model=thin."""
    model = yaml.safe_load((config_directory() / "model" / "thin.yaml").read_text(encoding="utf-8"))
    start = {f"model.{key}": value for key, value in model.items()}
    start["model.exogenous.random"] = model["exogenous"]["random"]
    pairs = (override.partition("=") for override in [*found["common"], *found["arms"][arm]])
    return start | {key: yaml.safe_load(value) for key, _, value in pairs}


@pytest.mark.parametrize("name", NAMES)
def test_every_arm_is_what_its_name_says(name: str) -> None:
    found = plan(name)
    experts = settings(found, "mean_16")["model.experts"]
    for arm in found["arms"]:
        kind, budget, *rest = arm.split("_")
        own = settings(found, arm)
        gates = {"single": "none", "mean": "none", "endogenous": "endogenous", "oracle": "oracle"}
        assert own["model.gate"] == gates.get(kind, "exogenous"), arm
        assert own["model.experts"] == (1 if kind == "single" else experts), arm
        assert own["model.hidden"] == [int(budget) * (experts if kind == "single" else 1)], arm
        dispelling = {"weak": 0.1, "strong": 10}.get(rest[-1] if rest else "", 1)
        assert own["model.dispelling"] == (dispelling if kind == "thin" else float("dispelled" in rest)), arm
        assert own["model.shuffled"] is (kind == "shuffled"), arm
        assert own["model.exogenous.random"] is (kind == "random"), arm
        assert own["model.initialise"] is (rest != ["own", "start"]), arm
        reads = rest[0] if rest and rest[0] in ("maps", "probabilities") else "penultimate"
        assert own["model.reads"] == ("maps" if kind == "endogenous" else reads), arm


def test_the_ladders_are_one_ladder() -> None:
    digits = plan("thin_digits")
    for name in NAMES[1:]:
        other = plan(name)
        assert other["arms"] == digits["arms"]
        assert (other["headroom"], other["baseline"]) == (digits["headroom"], digits["baseline"])
    small, large = ({arm for arm in digits["arms"] if budget in arm.split("_")} for budget in ("16", "128"))
    assert {arm.replace("128", "16") for arm in large} == small
    for arms in (small, large):
        assert {settings(digits, arm)["model.dispelling"] for arm in arms} == {0, 0.1, 1, 10}
    assert digits["headroom"] == {"oracle_16": "mean_16", "oracle_128": "mean_128"}
    measures = {str(measure.get("finding", measure.get("name"))) for measure in digits["measures"].values()}
    told = {"dispelling/abs_cos", "reads/endogenous", "probe/linear", "probe/mlp", "gate/information"}
    assert measures == {"accuracy", *told}


@pytest.mark.parametrize("budget", [16, 128])
def test_single_nets_have_the_size_of_all_experts(budget: int) -> None:
    found = plan("thin_digits")
    sizes = []
    for arm in (f"single_{budget}", f"mean_{budget}"):
        own = settings(found, arm)
        experts = Experts(288, 10, own["model.experts"], own["model.hidden"])
        sizes.append(sum(parameter.numel() for parameter in experts.parameters()))
    assert 0 <= sizes[1] - sizes[0] == 7 * 10, "only the biases of the outputs are there once for each expert"


@pytest.mark.parametrize(
    "name", [pytest.param(name, marks=[] if name == "thin_faces_identity" else pytest.mark.slow) for name in NAMES]
)
def test_stages_share_their_data_and_the_oracle_has_an_expert_for_each_class(name: str) -> None:
    found = plan(name)
    first = compose("train", [f"experiment=controlled/{name}", *found["before"]["exogenous"]["overrides"]])
    second = compose("train", [f"experiment=controlled/{name}", *found["common"], *found["arms"]["oracle_128"]])
    assert first.model["_target_"].endswith("Exogenous")
    assert (first.dataset, first.protocol, first.encoder) == (second.dataset, second.protocol, second.encoder)
    assert first.task.exogenous == second.task.exogenous
    assert second.dataset.seed == second.seed
    assert second.model.exogenous.classes <= second.model.experts
    bins = second.task.exogenous.bins
    assert bins is None or len(bins) - 1 == second.model.exogenous.classes
    assert list(second.model.exogenous.hidden) == list(first.model.hidden)
    assert second.model.exogenous_task in second.task
    assert first.transform == second.transform


@pytest.mark.slow
@pytest.mark.parametrize("name", NAMES)
def test_every_arm_composes_and_is_another_run(name: str) -> None:
    found = plan(name)
    hashes = set()
    for overrides in found["arms"].values():
        cell = compose("train", [f"experiment=controlled/{name}", *found["common"], *overrides])
        hashes.add(result_hash(cell))
    assert len(hashes) == len(found["arms"])
