# SPDX-License-Identifier: Apache-2.0
"""``affect benchmark pal``: what it measures is a step with the objective, and one without; inference is one graph."""

from __future__ import annotations

import torch
from omegaconf import OmegaConf

from affect.commands.benchmarks import pal
from affect.models.pal import PrivilegedAttribution

LAYER = "encoder.model.layer4"


def test_a_row_per_network_and_layer(monkeypatch):
    monkeypatch.setattr(pal, "CASES", (("test_resnet", "layer4", 32, 2), ("test_resnet", "layer3", 32, 2)))
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    (row,) = pal.measure(quick=True)
    assert row["layer"] == "layer4"
    assert row["ratio"] > 0
    assert row["at most 1.35"] == ("yes" if row["ratio"] <= 1.35 else "no")
    assert [row["at most 1.35"] for row in pal.measure(quick=False)][1] == "not promised"


def test_the_promise_is_judged_for_the_last_map():
    assert [pal.judged("layer4", 1.35), pal.judged("features.29", 1.36)] == ["yes", "no"]
    assert pal.judged("layer3", 1.0) == "not promised"


def test_the_layers_of_hints_and_experiments_are_measured_and_promised():
    from affect.commands.configuration import _EXAMPLES, config_directory

    experiments = (config_directory() / "experiment").glob("pal_*.yaml")
    named = {str(OmegaConf.load(path).objectives.pal.layer) for path in experiments}
    named |= {_EXAMPLES["objectives.pal.layer"].rpartition("=")[2]}
    for cases in (pal.CASES, pal.ON_ACCELERATOR):
        assert named <= {f"encoder.model.{layer}" for _, layer, *_ in cases if layer in pal.LAST}


def count(step: pal.Stepper, operation: str) -> int:
    with torch.profiler.profile() as profile:
        step()
    return sum(event.count for event in profile.key_averages() if event.key == operation)


def test_only_layers_above_the_constrained_one_are_differentiated_twice():
    batch = pal.make_batch(2, 32, torch.device("cpu"))
    layers = pal.build("test_resnet", 32).encoder.model
    above = sum(isinstance(module, torch.nn.Conv2d) for module in layers.layer4.modules())
    backward = {}
    for layer in (None, "layer4", "layer3"):
        objective = None if layer is None else PrivilegedAttribution(f"encoder.model.{layer}")
        backward[layer] = count(
            pal.Stepper(pal.build("test_resnet", 32, objective), batch), "aten::convolution_backward"
        )
    assert backward["layer4"] == backward[None], "no convolution lies above the last map"
    # Behind layer3 each convolution of layer4 has a gradient for the attribution, and that gradient has its own.
    assert above <= backward["layer3"] - backward[None] <= 2 * above


def test_inference_is_the_same_graph():
    batch = pal.make_batch(2, 32, torch.device("cpu"))
    plain = pal.build("test_resnet", 32).eval()
    constrained = pal.build("test_resnet", 32, PrivilegedAttribution(LAYER)).eval()
    assert list(plain.release_state()) == list(constrained.release_state())
    seen = []
    for module in (plain, constrained):
        with torch.profiler.profile() as profile, torch.inference_mode():
            values = module.predict_step(batch)["expression"]
        seen.append(([event.name for event in profile.events() if event.name.startswith("aten::")], values))
    assert seen[0][0] == seen[1][0]
    assert torch.equal(seen[0][1], seen[1][1])
