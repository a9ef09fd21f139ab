# SPDX-License-Identifier: Apache-2.0
"""Two gloo processes train to the weights of one and validate to its numbers; what depends on the batch says how."""

from __future__ import annotations

import os
import re
import signal
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import timm
import torch
from safetensors.torch import load_file

from affect.losses import Concordance
from affect.models.sharding import clip_norm, gathered_together
from tests.models.two_processes import SIZE, STEPS, make_batch, make_module, make_thin, take

ROOT = Path(__file__).parents[2]


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Return the folder that the processes write to."""
    return tmp_path_factory.mktemp("processes")


def _ran(what: str, folder: Path) -> dict[str, dict[str, Any]]:
    command = [sys.executable, "-m", "tests.models.two_processes", what, str(folder)]
    environment = os.environ | {"OMP_NUM_THREADS": "1", "GLOO_SOCKET_IFNAME": "lo"}
    done = subprocess.run(command, cwd=ROOT, env=environment, capture_output=True, text=True, timeout=240, check=False)
    assert done.returncode == 0, done.stderr[-3000:]
    return {path.stem: torch.load(path, weights_only=True) for path in sorted(folder.glob("*.pt"))}


@pytest.fixture(scope="module")
def found(folder: Path) -> dict[str, dict[str, Any]]:
    """Return what one process, and each of two, found."""
    return _ran("small", folder)


@pytest.fixture(scope="module")
def two_encoders(tmp_path_factory: pytest.TempPathFactory) -> list[dict[str, Any]]:
    """Return what each of two processes found that train a model of two encoders."""
    ran = _ran("two encoders", tmp_path_factory.mktemp("two_encoders"))
    return [ran[name] for name in ("rank0", "rank1")]


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


def test_uncertainties_and_attribution_train_as_in_one_process(found: dict[str, dict[str, Any]]) -> None:
    """Where one process has no label of a task, and faces with points are shared out unequally."""
    one, first, second = (found[name]["learnt"] for name in ("world1-rank0", "world2-rank0", "world2-rank1"))
    assert _far(first, second) == 0
    assert _far(first, one) < 1e-6
    start = make_module(learnt=True).state_dict()
    moved = {name for name, value in one.items() if float((value - start[name]).abs().max()) > 1e-3}
    assert {name for name in start if name.startswith("weighting.")} <= moved
    assert any(name.startswith("encoder.") for name in moved)
    known = make_batch(SIZE, 0).point_masks["5"][:, 0]
    assert known[0::2].sum() != known[1::2].sum()


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


@pytest.mark.slow
def test_two_shared_out_encoders_train_as_copies_do(two_encoders: list[dict[str, Any]]) -> None:
    """THIN, whose second encoder is frozen; memory order, rates by depth and 16 bits as in any other run."""
    first, second = two_encoders
    copies, shared = first["copies"][0], first["shared out"][0]
    learnt = [name for name in shared if name.startswith("encoder.model.conv1.")]
    assert learnt
    start = make_thin().release_state()
    assert min(float((shared[name] - start[name]).abs().max()) for name in learnt) > 1e-4
    assert _far({k: v.double() for k, v in shared.items()}, {k: v.double() for k, v in copies.items()}) < 1e-4
    frozen = [name for name in shared if name.startswith("exogenous.")]
    assert frozen
    assert all(torch.equal(shared[name], start[name]) for name in frozen)
    parameters = [name for name, _ in make_thin().named_parameters()]
    assert all(torch.equal(shared[name], second["shared out"][0][name]) for name in parameters)
    half = first["half precision"][0]
    assert all(value.isfinite().all() and value.dtype == shared[name].dtype for name, value in half.items())
    assert any(not torch.equal(half[name], shared[name]) for name in learnt)


@pytest.mark.slow
def test_a_shared_out_run_that_a_signal_stopped_is_continued_exactly(two_encoders: list[dict[str, Any]]) -> None:
    """One process gets the signal, both leave; losses of the epoch are those of both processes."""
    for ran in two_encoders:
        assert ran["signal"] == signal.SIGUSR2
        (whole, history), (continued, told) = ran["shared out"], ran["continued"]
        parameters = [key for key, _ in make_thin().named_parameters()]
        assert all(torch.equal(continued[key], whole[key]) for key in parameters)
        assert [epoch["epoch"] for epoch in told] == [0, 1]
        for then, now in zip(history, told, strict=True):
            assert now == pytest.approx(then, nan_ok=True)
    whole, continued = (two_encoders[0][case][0] for case in ("shared out", "continued"))
    assert all(torch.equal(continued[key], value) for key, value in whole.items()), "running statistics too"
    assert re.search(r"last\.ckpt: cannot be read \(", two_encoders[1]["damaged"])


@pytest.mark.parametrize(
    ("name", "blocks", "largest"),
    [("resnet50", 10, 0.3), ("vit_base_patch16_224", 12, 0.1), ("convnext_base", 32, 0.1)],
)
def test_blocks_of_common_encoders_are_gathered_one_by_one(name: str, blocks: int, largest: float) -> None:
    """The last two stages of ResNet-50, all of a ViT, the last two of ConvNeXt; and large layers beside blocks."""
    with torch.device("meta"):
        network = timm.create_model(name, num_classes=0)
    found = gathered_together(network)
    numbers = list(found.values())
    assert list(found)[-1] is network
    assert sum(numbers) == sum(parameter.numel() for parameter in network.parameters())
    assert len(numbers) - 1 == blocks
    assert min(numbers[:-1]) >= 1_000_000
    assert max(numbers) < largest * sum(numbers)


def test_gradients_that_nobody_has_are_not_clipped() -> None:
    with_one, without = (torch.nn.Parameter(torch.ones(2)) for _ in range(2))
    clip_norm([without], 0.1)
    with_one.grad = torch.tensor([3.0, 4.0])
    clip_norm([with_one, without], 1.0)
    assert without.grad is None
    torch.testing.assert_close(with_one.grad, torch.tensor([0.6, 0.8]), rtol=0, atol=1e-5)


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
