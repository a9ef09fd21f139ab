# SPDX-License-Identifier: Apache-2.0
"""Two gloo processes train to the weights of one and validate to its numbers; what depends on the batch says how."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file

from affect.losses import Concordance
from tests.models.two_processes import SIZE, STEPS, make_batch, make_module, take

ROOT = Path(__file__).parents[2]


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Return the folder that the processes write to."""
    return tmp_path_factory.mktemp("processes")


@pytest.fixture(scope="module")
def found(folder: Path) -> dict[str, dict[str, Any]]:
    """Return what one process, and each of two, found."""
    command = [sys.executable, "-m", "tests.models.two_processes", str(folder)]
    environment = os.environ | {"OMP_NUM_THREADS": "1", "GLOO_SOCKET_IFNAME": "lo"}
    done = subprocess.run(command, cwd=ROOT, env=environment, capture_output=True, text=True, timeout=240, check=False)
    assert done.returncode == 0, done.stderr[-3000:]
    return {path.stem: torch.load(path, weights_only=True) for path in sorted(folder.glob("*.pt"))}


def _far(ours: dict[str, torch.Tensor], theirs: dict[str, torch.Tensor]) -> float:
    assert ours.keys() == theirs.keys()
    return max(float((ours[name] - value).abs().max()) for name, value in theirs.items())


@pytest.mark.parametrize("case", ["unequal masks", "one side"])
def test_training_equals_one_process(found: dict[str, dict[str, Any]], case: str) -> None:
    one, first, second = (found[name][case] for name in ("world1-rank0", "world2-rank0", "world2-rank1"))
    assert _far(first, second) == 0
    assert _far(first, one) < 1e-6
    start = make_module().release_state()
    assert _far(one, start) > 1e-2, "nothing was learnt, so nothing was compared"


def test_the_masks_are_unequal() -> None:
    """The comparison above can fail: averaging the means of two processes gives other weights."""
    batch = make_batch(SIZE, 0)
    one_side = make_batch(SIZE, 0, one_side=True)
    counts = [take(batch, slice(rank, None, 2)).masks["valence_arousal"].sum() for rank in (0, 1)]
    assert counts[0] != counts[1]
    assert not take(one_side, slice(1, None, 2)).masks["valence_arousal"].any()


def test_validation_equals_one_process(found: dict[str, dict[str, Any]]) -> None:
    one, first, second = (found[name]["validation"] for name in ("world1-rank0", "world2-rank0", "world2-rank1"))
    assert first == pytest.approx(second, nan_ok=True, rel=0, abs=0)
    assert first == pytest.approx(one, nan_ok=True, rel=1e-6)
    for name in ("au/f1/mean", "expression/macro_f1", "valence_arousal/ccc/mean", "landmarks/nme"):
        keys = [key for key in one if key.startswith(f"val/{name}")]
        assert keys, (name, sorted(one))
        assert all(one[key] == one[key] for key in keys)


def test_shared_out_encoders_train_to_the_weights_of_one_process(found: dict[str, dict[str, Any]]) -> None:
    """Clipped, accumulated, with validations of unequal lengths, in one go and continued from a checkpoint."""
    one, first, second = (found[name]["shared out"] for name in ("world1-rank0", "world2-rank0", "world2-rank1"))
    assert [each["shared out"] for each in (one, first, second)] == [False, True, True]
    for case in ("weights", "continued"):
        assert _far(first[case], second[case]) == 0
        assert _far(first[case], one["weights"]) < 1e-5, case
    assert _far(one["weights"], make_module().release_state()) > 1e-2


def test_files_of_a_shared_out_run_hold_whole_weights(found: dict[str, dict[str, Any]], folder: Path) -> None:
    ours = load_file(folder / "world2" / "best.safetensors")
    theirs = load_file(folder / "world1" / "best.safetensors")
    assert _far(ours, theirs) < 1e-5
    last = torch.load(folder / "world2" / "2.ckpt", weights_only=True)["state_dict"]
    for name, value in found["world2-rank0"]["shared out"]["weights"].items():
        assert torch.equal(last[name], value), name


def test_concordance_is_averaged_over_the_parts_of_each_process(found: dict[str, dict[str, Any]]) -> None:
    """Documented in ``Concordance``: each process takes the coefficient of its own part."""
    module, loss = make_module(concordance=True), Concordance()
    optimizer = torch.optim.SGD([p for p in module.parameters() if p.requires_grad], lr=0.5)
    for seed in range(STEPS):
        batch = make_batch(SIZE, seed)
        terms = []
        for rank in (0, 1):
            part = take(batch, slice(rank, None, 2))
            terms.append(loss(module(part)["valence_arousal"], *module.loss_targets("valence_arousal", part)))
        optimizer.zero_grad()
        (sum(term.sum.sum() for term in terms) / sum(term.count.sum() for term in terms)).backward()
        optimizer.step()
    first, one = found["world2-rank0"]["concordance"], found["world1-rank0"]["concordance"]
    assert _far(first, module.release_state()) < 1e-6
    assert _far(first, one) > 1e-4


def test_accumulated_batches_count_alike_in_any_number_of_processes(found: dict[str, dict[str, Any]]) -> None:
    """Each batch is averaged over its own labels; that is the same rule on one process and on two."""
    first, one = found["world2-rank0"]["accumulated"], found["world1-rank0"]["accumulated"]
    assert _far(first, one) < 1e-6
    assert _far(one, found["world1-rank0"]["unequal masks"]) > 1e-4
