# SPDX-License-Identifier: Apache-2.0
"""Computes every metric in two gloo processes with unequal parts of the data; run as a script by a test.

The workers are forked: this process has one thread, and a spawned worker would import everything again.
"""

from __future__ import annotations

import json
import sys
import warnings
from pathlib import Path

import torch
import torch.distributed
import torch.multiprocessing

from tests.metrics.every import every_metric

PARTS = {"most and few": ((0, 71), (71, 90)), "all and none": ((0, 90), (90, 90))}


def work(rank: int, folder: str) -> None:
    torch.set_num_threads(1)
    warnings.simplefilter("ignore")  # the library remarks that the rank without data computes before updating
    torch.distributed.init_process_group("gloo", init_method=f"file://{folder}/store", rank=rank, world_size=2)
    found = {}
    for part, bounds in PARTS.items():
        start, end = bounds[rank]
        for name, (metric, data) in every_metric().items():
            for first in range(start, end, 30):
                metric.update(*(tensor[first : min(first + 30, end)] for tensor in data))
            computed = metric.compute()
            found[f"{part}: {name}"] = {key: float(number) for key, number in computed.items()}
            metric.reset()
            again = metric.compute()
            assert all(float(number) != float(number) for key, number in again.items() if key not in metric.counts)
    Path(folder, f"rank{rank}.json").write_text(json.dumps(found))
    torch.distributed.destroy_process_group()


if __name__ == "__main__":
    torch.set_num_threads(1)
    torch.multiprocessing.start_processes(work, args=(sys.argv[1],), nprocs=2, start_method="fork")
