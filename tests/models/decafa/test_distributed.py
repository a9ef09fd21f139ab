# SPDX-License-Identifier: Apache-2.0
"""Two processes train DeCaFA on mixed annotations to the weights of one, whichever schemes a process's faces have."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch

from tests.models.decafa.two_processes import CASES, SOURCES, batches, make_model

ROOT = Path(__file__).parents[3]


@pytest.fixture(scope="module")
def found(tmp_path_factory: pytest.TempPathFactory) -> dict[str, dict[str, dict[str, torch.Tensor]]]:
    """Return the weights of each case that one process, and each of two, came to."""
    folder = tmp_path_factory.mktemp("processes")
    command = [sys.executable, "-m", "tests.models.decafa.two_processes", str(folder)]
    environment = os.environ | {"OMP_NUM_THREADS": "1", "GLOO_SOCKET_IFNAME": "lo"}
    done = subprocess.run(command, cwd=ROOT, env=environment, capture_output=True, text=True, timeout=600, check=False)
    assert done.returncode == 0, done.stderr[-3000:]
    return {path.stem: torch.load(path, weights_only=True) for path in sorted(folder.glob("*.pt"))}


def _far(ours: dict[str, torch.Tensor], theirs: dict[str, torch.Tensor]) -> float:
    assert ours.keys() == theirs.keys()
    return max(float((ours[name] - value).abs().max()) for name, value in theirs.items())


@pytest.mark.slow
@pytest.mark.parametrize("case", CASES)
def test_two_processes_train_to_the_weights_of_one(found: dict, case: str) -> None:
    one, first, second = (found[name][case] for name in ("world1-rank0", "world2-rank0", "world2-rank1"))
    assert _far(first, second) == 0
    assert _far(first, one) < 1e-5
    settings = {key: value for key, value in CASES[case].items() if key != "alternate"}
    assert _far(one, make_model(**settings).release_state()) > 1e-2, "nothing was learnt, so nothing was compared"


def test_processes_share_out_batches_of_one_scheme_and_of_several() -> None:
    """The comparison above can fail: in mixed batches the processes' faces have other schemes."""

    def schemes(rows: object) -> list[int]:
        return [sum(int(row) in own for row in rows) for own in SOURCES.values()]  # type: ignore[attr-defined]

    turns = [[schemes(rows) for rows in batches(rank, 2, True)] for rank in (0, 1)]
    assert turns[0] == turns[1] == [[4, 0, 0], [0, 4, 0], [0, 0, 4]] * 2
    mixed = [[schemes(rows) for rows in batches(rank, 2, False)] for rank in (0, 1)]
    assert mixed[0] != mixed[1]
    for rank in (0, 1):
        whole = [sorted(rows.tolist()) for rows in batches(0, 1, False)]
        assert all(set(own.tolist()) <= set(both) for own, both in zip(batches(rank, 2, False), whole, strict=True))
