# SPDX-License-Identifier: Apache-2.0
"""Every task learns on held-out built-in faces: its loss falls and its metric beats the best constant predictor."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from affect.commands import train
from affect.commands.configuration import compose

HEADLINE = {
    "au": "f1/mean",
    "au_intensity": "icc/mean",
    "expression": "macro_f1",
    "valence_arousal": "ccc/mean",
    "landmarks": "nme",
    "pose": "mae/mean",
    "attributes": "auc/mean",
}


@pytest.mark.slow
def test_every_task_learns(tmp_path: Path) -> None:
    tasks = ",".join(HEADLINE)
    config = compose(
        "train",
        [
            f"task=[{tasks}]", "dataset.count=2400", "dataset.dials.image_size=64", "encoder=fasternet_t0",
            "encoder.image_size=64", "trainer.max_epochs=12", "loss.positive_weights=balanced", "data.num_workers=0",
            "data.batch_size=32", "trainer.enable_progress_bar=false", "callbacks.progress=null", "logger=none",
            "bootstrap.resamples=200", f"paths.output={tmp_path / 'run'}", f"paths.cache={tmp_path / 'cache'}",
        ],
    )  # fmt: skip
    train.run(config)
    results = json.loads((tmp_path / "run" / "results.json").read_text())
    first, last = results["history"][0], results["history"][-1]
    records = {(r["task"], r["name"]): r for r in results["metrics"]["test"]}
    for task, name in HEADLINE.items():
        assert last[f"train/{task}/loss"] < first[f"train/{task}/loss"], task
        record = records[task, name]
        better = (
            record["value"] > record["constant"] if record["higher_is_better"] else record["value"] < record["constant"]
        )
        assert better, (task, record)
