# SPDX-License-Identifier: Apache-2.0
"""What the loader benchmark compares is the same data: shards hold the files, and both give the same batches."""

from __future__ import annotations

from pathlib import Path

import numpy as np

from affect.commands.benchmarks.loader import SHARD, pack, write_photographs
from affect.data.archives import ShardImages
from affect.data.images import FileImages


def test_packed_photographs_are_those_of_the_files(tmp_path: Path) -> None:
    table = write_photographs(tmp_path / "files", SHARD + 3)
    packed = pack(table, tmp_path / "packed")
    assert len(list((tmp_path / "packed" / "shards").glob("*.arrow"))) == 2
    rows = np.array([0, 1, SHARD - 1, SHARD, SHARD + 2])
    for ours, theirs in zip(
        ShardImages(packed, tmp_path / "packed").read(rows), FileImages(table).read(rows), strict=True
    ):
        assert np.array_equal(ours, theirs)
    assert np.array_equal(packed.strings("expression")[0], table.strings("expression")[0])
