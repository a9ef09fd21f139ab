# SPDX-License-Identifier: Apache-2.0
"""Keys of batch, learning rate and speed take effect, and are refused where they cannot."""

from __future__ import annotations

import copy
import functools
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from omegaconf import DictConfig, OmegaConf

from affect.commands import assembly, train
from affect.commands.acceleration import (
    Batching,
    check_precision,
    compile_encoders,
    learning_rate_factor,
    resolve_batching,
    scale_learning_rate,
)
from affect.commands.run_folder import result_hash
from affect.errors import ConfigError
from affect.models.base import AffectModule, Objective
from affect.models.baseline import Baseline
from tests.models.test_base import Repeat, make_batch, make_module

Make = Callable[..., DictConfig]


def _module(config: DictConfig) -> AffectModule:
    """Return the model of a config for one task of action units."""
    from affect import losses, tasks

    module = assembly.build_model(config, {"au": tasks.AUOccurrence(aus=[1, 2], loss=losses.BinaryCrossEntropy())})
    assert isinstance(module, Baseline)
    return module


# ------------------------------------------------------------------------------------- batch, learning rate


def _batching(config: DictConfig, world: int = 1, accumulated: int = 1) -> Batching:
    trainer: Any = SimpleNamespace(world_size=world, accumulate_grad_batches=accumulated)
    return resolve_batching(config, trainer)


def test_the_effective_batch_is_shared_out(tiny_run: Make) -> None:
    assert _batching(tiny_run(), world=2, accumulated=3).effective == 4 * 2 * 3
    found = _batching(tiny_run("data.effective_batch_size=48"), world=2, accumulated=3)
    assert (found.per_process, found.effective, found.learning_rate_factor) == (8, 48, 1.0)
    with pytest.raises(ConfigError, match=r"effective_batch_size=50 cannot be shared out.* write a multiple of 6"):
        _batching(tiny_run("data.effective_batch_size=50"), world=2, accumulated=3)
    with pytest.raises(ConfigError, match="cannot be shared out"):
        _batching(tiny_run("data.effective_batch_size=0"))


def test_a_run_takes_the_batch_that_was_asked_for(tiny_run: Make) -> None:
    import json

    config = tiny_run("data.effective_batch_size=2", "task=[au]", "figures=false", "bootstrap.resamples=0")
    train.run(config)
    found = json.loads((Path(config.paths.output) / "results.json").read_text())
    assert found["batch"]["per_process"] == found["batch"]["effective"] == 2
    assert found["history"][0]["step"] == 4  # 8 training rows


@pytest.mark.parametrize(("rule", "factor"), [("none", 1.0), ("linear", 4.0), ("sqrt", 2.0)])
def test_the_learning_rate_grows_with_the_effective_batch(rule: str, factor: float, tiny_run: Make) -> None:
    scaling = (f"learning_rate_scaling.rule={rule}", "learning_rate_scaling.reference_batch_size=16")
    config = tiny_run("data.effective_batch_size=64", *scaling)
    assert _batching(config, world=4, accumulated=2).learning_rate_factor == factor
    module = _module(config)
    before = [group["lr"] for group in module.build_optimizer().param_groups]
    scale_learning_rate(module, factor)
    assert [group["lr"] for group in module.build_optimizer().param_groups] == [factor * rate for rate in before]


def test_a_scaling_that_says_too_little_is_refused(tiny_run: Make) -> None:
    with pytest.raises(ConfigError, match="rule=lin: did you mean linear"):
        learning_rate_factor("lin", 64, 64)
    with pytest.raises(ConfigError, match=r"needs learning_rate_scaling.reference_batch_size"):
        _batching(tiny_run("learning_rate_scaling.rule=sqrt"))
    module = make_module()
    module.optimizer = lambda groups: torch.optim.SGD(groups, lr=0.1)
    with pytest.raises(ConfigError, match=r"optimizer.lr is no number"):
        scale_learning_rate(module, 2.0)


# -------------------------------------------------------------------------------------------------- speed


def test_encoders_are_compiled_and_keep_their_weights(tiny_run: Make) -> None:
    config = tiny_run("compile.encoder=true", "compile.backend=eager")
    module = _module(config).eval()
    plain = copy.deepcopy(module)
    compile_encoders(config, module)
    assert module.encoder._compiled_call_impl is not None
    assert list(module.state_dict()) == list(plain.state_dict())
    batch = make_batch()
    assert torch.equal(module(batch)["au"], plain(batch)["au"])
    assert copy.deepcopy(module).state_dict().keys() == plain.state_dict().keys()  # what averaging does


def test_nothing_is_compiled_by_default(tiny_run: Make) -> None:
    module = _module(tiny_run())
    compile_encoders(tiny_run(), module)
    assert module.encoder._compiled_call_impl is None


def test_what_cannot_be_compiled_is_refused(tiny_run: Make) -> None:
    class Tapping(Objective):
        layers = ("encoder.model.layer1",)

    on = tiny_run("compile.encoder=true", "compile.backend=eager")
    with pytest.raises(ConfigError, match=r"objective pal taps layers inside the encoder"):
        compile_encoders(on, make_module(objectives={"pal": Tapping()}))

    class Outside(Objective):
        layers = ("head",)

    compile_encoders(on, make_module(objectives={"dispelling": Outside()}))
    with pytest.raises(ConfigError, match=r"compile.mode=fast"):
        compile_encoders(tiny_run("compile.encoder=true", "compile.mode=fast"), make_module())
    with pytest.raises(ConfigError, match=r"compile.backend=inducto: did you mean inductor"):
        compile_encoders(tiny_run("compile.encoder=true", "compile.backend=inducto"), make_module())
    blind: Any = SimpleNamespace(objectives={}, encoder_modules=lambda: iter(()))
    with pytest.raises(ConfigError, match="this model has no encoder"):
        compile_encoders(on, blind)


def test_privileged_attribution_refuses_to_be_compiled_before_training(tiny_run: Make) -> None:
    layer = "objectives.pal.layer=encoder.model.layer3"
    config = tiny_run("objective=[privileged_attribution]", layer, "compile.encoder=true", "compile.backend=eager")
    with pytest.raises(ConfigError, match="objective pal taps layers inside the encoder"):
        train.run(config)
    assert not (Path(config.paths.output) / "last.ckpt").exists()


@pytest.mark.parametrize("option", ["adam", "adamw", "sgd"])
def test_optimizers_can_be_fused(option: str, tiny_run: Make) -> None:
    module = _module(tiny_run(f"optimizer={option}", "optimizer.fused=true"))
    optimizer = module.build_optimizer()
    assert optimizer.defaults["fused"] is True
    assert _module(tiny_run(f"optimizer={option}")).build_optimizer().defaults["fused"] is None
    module(make_batch())["au"].sum().backward()
    optimizer.step()


def test_half_precision_with_a_fused_optimizer_cannot_clip(tiny_run: Make) -> None:
    keys = ("trainer.precision=16-mixed", "optimizer.fused=true")
    with pytest.raises(ConfigError, match=r"cannot clip gradients.*bf16-mixed"):
        check_precision(tiny_run(*keys))
    check_precision(tiny_run(*keys, "trainer.gradient_clip_val=null"))
    check_precision(tiny_run("trainer.precision=bf16-mixed", "optimizer.fused=true"))


@pytest.mark.parametrize(("precision", "dtype"), [("32-true", torch.float32), ("bf16-mixed", torch.bfloat16)])
def test_mixed_precision_reaches_the_encoder(precision: str, dtype: torch.dtype, tiny_run: Make) -> None:
    config = tiny_run(f"trainer.precision={precision}")
    config.callbacks = {}
    trainer, module, seen = train.build_trainer(config, []), make_module(), []
    next(module.encoder.model.children()).register_forward_hook(lambda *call: seen.append(call[2].dtype))
    trainer.fit(module, Repeat([make_batch()]))
    assert set(seen) == {dtype}
    assert {value.dtype for value in module.release_state().values() if value.is_floating_point()} == {torch.float32}


def test_channels_last_is_the_order_of_weights_in_memory(tiny_run: Make) -> None:
    config = tiny_run("model.channels_last=true")
    config.callbacks = {}
    module = _module(config)
    train.build_trainer(config, []).fit(module, Repeat([make_batch()]))
    weights = [p for p in module.encoder.parameters() if p.ndim == 4 and p.shape[1] > 1 and p.shape[2] > 1]
    assert weights
    assert all(weight.is_contiguous(memory_format=torch.channels_last) for weight in weights)


def test_loading_prepares_batches_ahead(tiny_run: Make) -> None:
    config = tiny_run("data.num_workers=1", "data.prefetch_factor=5", "task=[au]")
    sources = assembly.build_sources(config, assembly.make(config.prepare, "prepare"))
    build = functools.partial(assembly.build_datamodule, sources=sources, tasks=assembly.build_tasks(config))
    loader = build(config, image_size=32).train_dataloader()
    assert (loader.prefetch_factor, loader.pin_memory) == (5, torch.cuda.is_available())
    config.data.num_workers = 0
    assert build(config, image_size=32).train_dataloader().prefetch_factor is None
    config.data.prefetch_factor = 0
    with pytest.raises(ConfigError, match="prefetch_factor=0"):
        build(config, image_size=32)
    config.data.prefetch_factor, config.data.pin_memory = 2, True
    if not torch.cuda.is_available():
        with pytest.raises(ConfigError, match="pin_memory=true: there is no GPU"):
            build(config, image_size=32)


# ------------------------------------------------------------------------------------------- earlier runs


def test_runs_from_before_these_keys_keep_their_folders(tiny_run: Make) -> None:
    now = tiny_run()
    before = copy.deepcopy(now)
    OmegaConf.set_struct(before, False)
    for key in ("learning_rate_scaling", "compile"):
        del before[key]
    for key in ("strategy", "num_nodes", "sync_batchnorm"):
        del before.trainer[key]
    del before.optimizer["fused"]
    for key in ("effective_batch_size", "prefetch_factor", "pin_memory"):
        del before.data[key]
    assert result_hash(now) == result_hash(before)
    assert result_hash(tiny_run("data.prefetch_factor=9")) == result_hash(before)
    for other in ("trainer.sync_batchnorm=true", "data.effective_batch_size=64", "learning_rate_scaling.rule=sqrt"):
        assert result_hash(tiny_run(other)) != result_hash(before)
