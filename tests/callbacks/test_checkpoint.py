# SPDX-License-Identifier: Apache-2.0
"""Checkpoint files: atomic, safe to read."""

from __future__ import annotations

from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch

from affect.callbacks import AtomicCheckpointIO, EarlyStopping, LastCheckpoint
from affect.callbacks.checkpoint import is_due
from affect.callbacks.seeding import SeedEachStep, step_seed
from affect.errors import CheckpointError, ConfigError


def test_a_write_that_dies_leaves_the_last_good_file(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    storage, path = AtomicCheckpointIO(), tmp_path / "last.ckpt"
    storage.save_checkpoint({"a": torch.ones(3)}, path)

    def half(checkpoint: object, file: object) -> None:
        file.write(b"half a file")  # type: ignore[attr-defined]
        raise OSError("No space left on device")

    monkeypatch.setattr(torch, "save", half)
    with pytest.raises(CheckpointError, match=r"No space left .*the last one that was written stays"):
        storage.save_checkpoint({"a": torch.zeros(3)}, path)
    assert torch.equal(storage.load_checkpoint(path)["a"], torch.ones(3))
    assert [file.name for file in tmp_path.iterdir()] == ["last.ckpt"]


def test_a_pickle_that_runs_code_is_refused(tmp_path: Path) -> None:
    class Payload:
        def __reduce__(self) -> tuple:
            return (Path.touch, (tmp_path / "ran",))

    torch.save({"state_dict": Payload()}, tmp_path / "last.ckpt")
    with pytest.raises(CheckpointError, match="cannot be read"):
        AtomicCheckpointIO().load_checkpoint(tmp_path / "last.ckpt")
    assert not (tmp_path / "ran").exists()


def test_steps_have_seeds_of_their_own() -> None:
    seeds = {step_seed(seed, step, rank) for seed in range(4) for step in range(50) for rank in range(2)}
    assert len(seeds) == 400


def test_each_process_draws_for_its_part_of_the_batch() -> None:
    """Orders of MONET, dropout: of the same step again the same, of another process others."""

    def drawn(rank: int, batch: int) -> torch.Tensor:
        trainer: Any = SimpleNamespace(current_epoch=0, global_rank=rank)
        SeedEachStep(1).on_train_batch_start(trainer, None, None, batch)  # type: ignore[arg-type]
        return torch.rand(8)

    draws = {(rank, batch): drawn(rank, batch) for rank in (0, 1) for batch in (0, 1)}
    assert all(torch.equal(drawn(*key), value) for key, value in draws.items())
    assert len({tuple(value.tolist()) for value in draws.values()}) == 4


def test_no_checkpoint_is_written_within_an_accumulation_window() -> None:
    assert [k for k in range(1, 13) if is_due(k, every=2, accumulated=1)] == [2, 4, 6, 8, 10, 12]
    assert [k for k in range(1, 13) if is_due(k, every=2, accumulated=4)] == [4, 8, 12]
    assert [k for k in range(1, 13) if is_due(k, every=5, accumulated=3)] == [6, 12]


def test_early_stopping_remembers_that_it_stopped() -> None:
    class Trainer:
        should_stop = False

    stopping, continued = EarlyStopping("val/score"), EarlyStopping("val/score")
    stopping.stopped = True
    continued.load_state_dict(stopping.state_dict())
    continued.on_fit_start(Trainer, None)  # type: ignore[arg-type]
    assert Trainer.should_stop


def test_a_rhythm_of_zero_steps_is_refused(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match="every_n_steps=0 must be at least 1"):
        LastCheckpoint(tmp_path, every_n_steps=0)
