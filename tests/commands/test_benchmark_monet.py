# SPDX-License-Identifier: Apache-2.0
"""The benchmark of MONET times whole steps and the head alone, and says what they take of memory."""

from __future__ import annotations

import math

import torch

from affect.commands.benchmarks import monet


def test_steps_train_and_the_heads_parameters_are_monets_own() -> None:
    batch = monet.make_batch(4, 32)
    module = monet.make_module("test_resnet", 32, orders=8, kept=4)
    before = [parameter.clone() for parameter in module.parameters()]
    monet._step(module, batch)()
    assert any(not torch.equal(a, b) for a, b in zip(before, module.parameters(), strict=True))
    head = monet.make_module(None, 32, monet.ORDERS, monet.KEPT)
    trained = sum(parameter.numel() for parameter in head.parameters())
    assert trained == 429_964 + monet.ORDERS  # the published setting's count with T = 12, D = 2048
    monet._step(head, batch, torch.randn(4, 2048))()


def test_rows_compare_with_the_shared_trunk(monkeypatch) -> None:
    times = iter([(9.0, 1.0), (9.0, 1.0), (2.0, 1.5), (2.2, 1.6), (2.0, 1.2), (2.4, 1.7)])
    monkeypatch.setattr(monet, "_timed", lambda step, device: next(times, (0.5, 0.1)))
    rows = monet.measure(quick=True)
    assert [row["ratio to the shared trunk"] for row in rows[:2]] == [1.0, 2.3 / 2.0]
    assert [row["peak memory, GB"] for row in rows[:2]] == [1.5, 1.7]
    assert all(row["ratio to the shared trunk"] == 1.25 for row in rows[2:])
    assert len({row["what"] for row in rows}) == len(rows) == 5


def test_peak_memory_starts_anew() -> None:
    def step() -> None:
        torch.ones(40_000_000)

    _, large = monet._timed(step, torch.device("cpu"))
    _, small = monet._timed(lambda: None, torch.device("cpu"))
    assert math.isnan(large) or large > small + 0.1
