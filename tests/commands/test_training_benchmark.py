# SPDX-License-Identifier: Apache-2.0
"""What the training benchmark compares is the same network, and its time is that between two steps."""

from __future__ import annotations

import time

import pytest
import torch

from affect.commands.benchmarks.training import QUICK_NETWORKS, Stopwatch, our_module, their_model

CPU = torch.device("cpu")


@pytest.mark.parametrize(("name", "side"), [(name, side) for name, side, _ in QUICK_NETWORKS])
def test_both_sides_train_the_same_network(name: str, side: int) -> None:
    ours, theirs = our_module(name, side, CPU).train(), their_model(name, CPU)
    assert sorted(p.shape for p in ours.parameters()) == sorted(p.shape for p in theirs.parameters())


def test_the_stopwatch_leaves_first_steps_out() -> None:
    watch = Stopwatch(CPU, 2, 4)
    for pause in (0.2, 0.0, 0.05, 0.05, 0.2):
        time.sleep(pause)
        watch.step()
    assert 0.1 <= watch.seconds < 0.2
