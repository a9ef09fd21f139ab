# SPDX-License-Identifier: Apache-2.0
"""Controlled experiments whose arms build on another run: it is trained once per seed, and its folder reaches them."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
from omegaconf import OmegaConf

from affect.commands import figures, reproduce
from affect.commands.main import main
from affect.errors import ConfigError

PLAN = {
    "claim": "a", "source": "b", "expected": "c", "measures": {"m": {"finding": "x"}}, "scales": {"quick": {}},
    "arms": {"one": [], "two": []},
}  # fmt: skip


@pytest.mark.slow
def test_digits_run_on_the_quick_scale(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    pytest.importorskip("sklearn.datasets")
    monkeypatch.setattr(figures, "write_run_figures", lambda *arguments: None)  # slow, and tested elsewhere
    words = [
        "reproduce", "experiment=controlled/thin_digits", "scale=quick", f"paths.runs={tmp_path / 'runs=1'}",
        f"paths.cache={tmp_path / 'cache'}", "arms=[mean_128,oracle_128]", "model.hidden=[4]", "trainer.max_epochs=1",
    ]  # fmt: skip
    assert main(words) in (0, None)
    out = tmp_path / "runs=1" / "reproduce" / "thin_digits" / "quick"
    first = json.loads((out / "before" / "exogenous" / "seed1" / "results.json").read_text())
    assert first["config"]["model"]["_target_"] == "affect.models.thin.Exogenous"
    assert first["config"]["trainer"]["max_epochs"] == 1
    assert list(first["labels"]) == ["exogenous"]
    for arm in ("mean_128", "oracle_128"):
        found = json.loads((out / arm / "seed1" / "results.json").read_text())
        assert found["config"]["model"]["hidden"] == [4]
        assert Path(found["config"]["model"]["exogenous"]["weights"]) == out / "before" / "exogenous" / "seed1"
        assert (
            found["data"]["sources"] == first["data"]["sources"]
        )  # one division for both stages: no test drawing leaks
        assert {"dispelling", "reads", "probe", "gate"} <= found["findings"].keys()
    stored = json.loads((out / "reproduce.json").read_text())
    assert stored["before"]["exogenous"]["key"] == "model.exogenous.weights"
    assert "too few seeds" in (out / "table.md").read_text()
    assert main(words) in (0, None)  # finished runs are not trained again


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"before": {"first": {"overrides": []}}}, r"controlled\.before\.first: needs key"),
        ({"arms": {"before": []}}, "is that of a folder"),
        ({"headroom": {"oracel": "one"}}, "no arm 'oracel'"),
        ({"headroom": {"one": "too"}}, "did you mean two"),
        ({"befor": {}}, "did you mean before"),
    ],
)
def test_plans_that_do_not_fit(changes: dict, message: str) -> None:
    config = OmegaConf.create({"scale": "quick", "arms": []})
    with pytest.raises(ConfigError, match=message):
        reproduce.check_plan(config, PLAN | changes, "controlled/x")


@pytest.mark.parametrize(
    ("gains", "verdict"),
    [
        ([0.1, 0.11, 0.12], "accuracy: oracle − mean = +0.110 [+0.085, +0.135]: headroom."),
        ([0.1, -0.1, 0.05], "no headroom, and nothing is concluded from this setting."),
        ([0.1], "too few seeds to tell whether there is headroom."),
    ],
)
def test_an_oracle_that_does_not_beat_the_mean_concludes_nothing(gains: list[float], verdict: str) -> None:
    cells = {"oracle": {k: 0.5 + gain for k, gain in enumerate(gains)}, "mean": dict.fromkeys(range(len(gains)), 0.5)}
    (note,) = reproduce.headroom_notes({"headroom": {"oracle": "mean", "other": "mean"}}, {"accuracy": cells})
    assert verdict.replace("+0.085", "0.085").replace("+0.135", "0.135") in note.replace("[+", "[").replace(", +", ", ")
