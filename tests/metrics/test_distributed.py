# SPDX-License-Identifier: Apache-2.0
from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

from tests.metrics.every import every_metric

ROOT = Path(__file__).parents[2]


def test_two_processes_with_unequal_parts_equal_one(tmp_path):
    command = [sys.executable, "-m", "tests.metrics.two_processes", str(tmp_path)]
    environment = os.environ | {"OMP_NUM_THREADS": "1", "GLOO_SOCKET_IFNAME": "lo"}
    done = subprocess.run(command, cwd=ROOT, env=environment, capture_output=True, text=True, timeout=180, check=False)
    assert done.returncode == 0, done.stderr[-3000:]
    ranks = [json.loads((tmp_path / f"rank{rank}.json").read_text()) for rank in (0, 1)]
    assert ranks[0] == ranks[1]
    for part in ("most and few", "all and none"):
        for name, (metric, data) in every_metric().items():
            expected = {key: float(number) for key, number in metric.score(*data).items()}
            assert ranks[0][f"{part}: {name}"] == pytest.approx(expected, rel=1e-12), (part, name)
