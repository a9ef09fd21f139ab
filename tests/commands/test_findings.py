# SPDX-License-Identifier: Apache-2.0
"""What a trained model tells of itself reaches the run folder, the terminal and the logger."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path

import pytest
from omegaconf import DictConfig
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

from affect.commands import train

BUILT_IN = ("task=[au]", "logger=tensorboard", "dataset.aus=[1,4,12,25]")


@pytest.mark.slow
def test_the_order_of_monet_is_drawn_printed_and_logged(
    tiny_run: Callable[..., DictConfig], capsys: pytest.CaptureFixture[str]
) -> None:
    config = tiny_run(*BUILT_IN, "model=monet", "model.orders=24", "model.kept=8", "trainer.max_epochs=2")
    train.run(config)
    output = Path(config.paths.output)
    found = json.loads((output / "results.json").read_text())
    assert (output / "figures" / "order.png").stat().st_size > 1000
    assert "Most probable orders" in capsys.readouterr().out
    text = (output / "figures" / "order.md").read_text()
    assert all(" ".join(entry["order"]) in text for entry in found["findings"]["order"]["orders"])
    events = EventAccumulator(str(output / "tensorboard"), size_guidance={"images": 0}).Reload()
    assert "order" in events.Tags()["images"]
    assert "order/entropy" in events.Tags()["scalars"]
    assert [set(epoch) >= {"order/entropy", "order/largest_weight"} for epoch in found["history"]] == [True, True]


@pytest.mark.slow
def test_tokens_show_where_they_look_and_uncertainties_are_drawn(tiny_run: Callable[..., DictConfig]) -> None:
    tasks = "task=[au,expression,valence_arousal]"
    model = ("model=task_token_transformer", "encoder.output=map", "model.dim=16", "model.heads=2", "model.hidden=16")
    config = tiny_run(*BUILT_IN, tasks, *model, "weighting=uncertainty", "weighting.lr=0.1", "trainer.max_epochs=2")
    train.run(config)
    output = Path(config.paths.output)
    for name in ("au_attention", "expression_attention", "valence_arousal_attention", "uncertainties"):
        assert (output / "figures" / f"{name}.png").stat().st_size > 1000, name
    history = json.loads((output / "results.json").read_text())["history"]
    sigmas = [epoch["weighting/sigma/au/AU12"] for epoch in history]
    assert sigmas[0] != 1.0
    assert sigmas[0] != sigmas[1]
    assert "weighting/sigma/valence_arousal/arousal" in history[0]
    events = EventAccumulator(str(output / "tensorboard"), size_guidance={"images": 0}).Reload()
    assert {"attention/au", "uncertainties"} <= set(events.Tags()["images"])
    assert "weighting/sigma/au/AU12" in events.Tags()["scalars"]
