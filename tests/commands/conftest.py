# SPDX-License-Identifier: Apache-2.0
"""A small configuration tree and a stand-in for the training command, so that these tests import no torch."""

from __future__ import annotations

import shutil
import sys
import types
from pathlib import Path

import pytest

from affect.commands import configuration

FILES = {
    "train.yaml": """
defaults:
  - base/hydra
  - _self_
  - dataset: faces
  - encoder: small
  - task: [au, expression]
  - trainer: default
  - experiment: null
  - debug: null
seed: 1
init: null
checkpoint: null
paths:
  output: null
""",
    "predict.yaml": """
defaults:
  - base/hydra
  - _self_
  - finder: ???
checkpoint: ???
input: ???
copy_of_input: ${input}
""",
    "benchmark.yaml": "defaults: [base/hydra, _self_]\nwhat: ???\nquick: false\n",
    "dataset/faces.yaml": "name: faces\nroot: null\ncount: 6000\n",
    "dataset/table.yaml": "name: table\nroot: null\ntable: ???\nread:\n  table: ${dataset.table}\n",
    "encoder/small.yaml": "name: small\nweights: null\nimage_size: 64\n",
    "encoder/large.yaml": "name: large\nweights: null\nimage_size: 224\n",
    "task/au.yaml": "au:\n  weight: 1.0\n",
    "task/expression.yaml": "expression:\n  weight: 1.0\n",
    "task/pose.yaml": "pose:\n  weight: 1.0\n",
    "trainer/default.yaml": "max_epochs: 10\ndevices: 1\n",
    "experiment/first_run.yaml": "# @package _global_\ndefaults:\n  - override /encoder: large\nseed: 7\n",
    "experiment/controlled/parity.yaml": "# @package _global_\nseed: 8\n",
    "experiment/wrong.yaml": "# @package _global_\ndefaults:\n  - override /encoder: lage\n",
    "debug/fast.yaml": "# @package _global_\ntrainer:\n  max_epochs: 1\n",
    "finder/faceapi.yaml": "name: faceapi\n",
    "finder/mediapipe.yaml": "name: mediapipe\n",
}


def write_tree(folder: Path, files: dict[str, str]) -> Path:
    """Write files by relative path."""
    for name, text in files.items():
        path = folder / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(text, encoding="utf-8")
    return folder


@pytest.fixture
def tree(tmp_path, monkeypatch):
    """A configuration tree in place of the package's; the current folder is an empty one of the user."""
    shipped = configuration.config_directory() / "base" / "hydra.yaml"
    folder = write_tree(tmp_path / "tree" / "conf", FILES)
    (folder / "base").mkdir()
    shutil.copy(shipped, folder / "base" / "hydra.yaml")
    monkeypatch.setattr(configuration, "config_directory", lambda: folder)
    (tmp_path / "user").mkdir()
    monkeypatch.chdir(tmp_path / "user")
    return folder


@pytest.fixture
def calls(tree, monkeypatch):
    """Configurations that commands were run with; ``calls.act`` is called with each."""

    class Calls(list):
        act = staticmethod(lambda config: None)

    recorded = Calls()

    def run(config):
        recorded.append(config)
        return recorded.act(config)

    for command in ("train", "predict", "benchmark"):
        module = types.ModuleType(f"affect.commands.{command}")
        module.run = run
        monkeypatch.setitem(sys.modules, module.__name__, module)
    return recorded
