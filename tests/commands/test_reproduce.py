# SPDX-License-Identifier: Apache-2.0
"""Controlled experiments run through training, give numbers, and print tables that a terminal of 80 columns holds."""

from __future__ import annotations

import json
import shlex
from pathlib import Path

import numpy as np
import pytest

from affect.commands import figures
from affect.commands.configuration import config_directory
from affect.commands.main import main

EXPERIMENTS = sorted(
    path.stem
    for path in (config_directory() / "experiment" / "controlled").glob("*.yaml")
    if path.stem.startswith(("monet", "rhls", "au_transformer"))
)


def reproduce(tmp_path: Path, *words: str) -> int:
    command = f"reproduce paths.runs={tmp_path} paths.cache={tmp_path / 'cache'} scale=quick callbacks.progress=null"
    return main([*shlex.split(command), *words])


@pytest.mark.parametrize("name", EXPERIMENTS)
def test_every_experiment_of_action_units_runs_on_the_quick_scale(
    name: str, tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(figures, "write_run_figures", lambda *arguments: None)  # slow, and tested elsewhere
    assert reproduce(tmp_path, f"experiment=controlled/{name}") in (0, None)
    out = tmp_path / "reproduce" / name / "quick"
    stored = json.loads((out / "reproduce.json").read_text())
    assert (out / "figure.png").stat().st_size > 1000
    assert stored["claim"] in (out / "table.md").read_text()
    for label, cells in stored["measures"].items():
        found = [value for arm in cells.values() for value in arm["values"].values()]
        assert any(value is not None and np.isfinite(value) for value in found), label
    printed = capsys.readouterr().out
    lines = printed.splitlines()
    for label in stored["measures"]:
        title = max(k for k, line in enumerate(lines) if line.strip() == label)
        words = [line.split()[0] for line in lines[title + 1 :] if line.split()]
        first = words.index(next(word for word in words if word in stored["arms"]))
        assert set(words[first : first + len(stored["arms"])]) == set(stored["arms"])
        assert max(map(len, lines[title : title + 4 + len(stored["arms"])])) <= 80
