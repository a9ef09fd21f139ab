# SPDX-License-Identifier: Apache-2.0
"""Learning-rate schedules at their corners."""

from __future__ import annotations

import itertools

import pytest
import torch

from affect.optimization import polynomial_factor, warmup_cosine, warmup_cosine_factor


def test_warm_up_rises_linearly_and_the_cosine_ends_at_its_final_factor() -> None:
    factors = [warmup_cosine_factor(step, 100, warmup=0.1, final=0.02) for step in range(101)]
    assert factors[0] == pytest.approx(1 / 11)
    assert factors[9] == pytest.approx(10 / 11)
    assert factors[10] == 1
    assert factors[55] == pytest.approx(0.51)
    assert factors[100] == pytest.approx(0.02)
    assert all(a >= b for a, b in itertools.pairwise(factors[10:]))


def test_polynomial_ends_at_zero() -> None:
    assert [polynomial_factor(step, 4, 2.0) for step in (0, 2, 4, 5)] == [1, 0.25, 0, 0]


def test_the_schedule_scales_every_group_by_its_own_rate() -> None:
    groups = [{"params": [torch.nn.Parameter(torch.zeros(1))], "lr": lr} for lr in (1.0, 0.1)]
    optimizer = torch.optim.SGD(groups)
    scheduler = warmup_cosine(optimizer, 10, warmup=0.0, final=0.5)
    for _ in range(10):
        optimizer.step()
        scheduler.step()
    assert [group["lr"] for group in optimizer.param_groups] == pytest.approx([0.5, 0.05])
