# SPDX-License-Identifier: Apache-2.0
"""``affect benchmark thin``: a row per rung, steps that train what they should, a single predictor of equal size."""

from __future__ import annotations

import pytest
import torch

from affect.commands.benchmark import BENCHMARKS
from affect.commands.benchmarks import thin
from affect.commands.benchmarks.pal import Stepper, make_batch


def test_a_row_per_rung_with_the_single_predictor_as_the_measure(monkeypatch):
    monkeypatch.setattr(thin, "CASES", (("test_resnet", 32, 2, 4), ("test_resnet", 32, 2, 8)))
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    rows = BENCHMARKS["thin"](True)
    assert [row["rung"] for row in rows] == list(thin.RUNGS)
    assert rows[0]["ratio to single"] == 1.0
    assert all(row["ratio to single"] > 0 and row["step, ms"] > 0 for row in rows)
    sizes = [row["trained, millions"] for row in rows]
    assert max(sizes) == pytest.approx(min(sizes), rel=0.05), "rungs of one size are compared"


def test_a_step_of_thin_trains_its_own_stream_and_no_other():
    module = thin.build("test_resnet", 32, 4, thin.RUNGS["THIN"])
    assert module.dispels
    before = {name: value.clone() for name, value in module.state_dict().items()}
    Stepper(module, make_batch(4, 32, torch.device("cpu")))()
    moved = {name for name, value in module.state_dict().items() if not torch.equal(value, before[name])}
    assert any(name.startswith("encoder.") for name in moved)
    assert any(name.startswith("experts.") for name in moved)
    assert not any(name.startswith("exogenous.") for name in moved)
