# SPDX-License-Identifier: Apache-2.0
"""How large a step is over all processes, what that does to the learning rate, and what makes a step faster."""

from __future__ import annotations

import functools
import math
from dataclasses import asdict, dataclass
from typing import Any

import pytorch_lightning as pl
import torch
from omegaconf import DictConfig
from pytorch_lightning.strategies import DeepSpeedStrategy, FSDPStrategy, ModelParallelStrategy

from affect.errors import ConfigError, near
from affect.models.base import AffectModule
from affect.models.sharding import FullyShardedStrategy

RULES = ("none", "linear", "sqrt")
MODES = ("default", "reduce-overhead", "max-autotune", "max-autotune-no-cudagraphs")


@dataclass(frozen=True)
class Batching:
    """The samples of one optimiser step.

    Attributes:
        per_process: Samples of a batch of one process.
        processes: Number of processes.
        accumulated: Batches whose gradients are added before a step.
        learning_rate_factor: What the configured learning rate was multiplied by.
    """

    per_process: int
    processes: int
    accumulated: int
    learning_rate_factor: float = 1.0

    @property
    def effective(self) -> int:
        """Samples of a step over all processes and accumulated batches."""
        return self.per_process * self.processes * self.accumulated

    def describe(self) -> dict[str, Any]:
        """Return it for results."""
        return {**asdict(self), "effective": self.effective}


def resolve_batching(config: DictConfig, trainer: pl.Trainer) -> Batching:
    """Return the batch of each process and the factor of the learning rate that a config asks for.

    Raises:
        ConfigError: If ``data.effective_batch_size`` cannot be shared out, or the scaling is unknown.
    """
    processes, accumulated = int(trainer.world_size), int(trainer.accumulate_grad_batches)
    wanted = config.data.get("effective_batch_size")
    size = int(config.data.batch_size)
    if wanted is not None:
        size, rest = divmod(int(wanted), processes * accumulated)
        if rest or size < 1:
            raise ConfigError(
                f"data.effective_batch_size={wanted} cannot be shared out: {processes} processes × "
                f"trainer.accumulate_grad_batches={accumulated}; write a multiple of {processes * accumulated}"
            )
    scaling = config.get("learning_rate_scaling") or {}
    factor = learning_rate_factor(
        str(scaling.get("rule", "none")), size * processes * accumulated, scaling.get("reference_batch_size")
    )
    return Batching(size, processes, accumulated, factor)


def learning_rate_factor(rule: str, effective: int, reference: int | None) -> float:
    """Return what a learning rate that suits batches of ``reference`` samples is multiplied by.

    ``linear`` is the rule of Goyal et al. (arXiv 1706.02677, section 2.1), usual with SGD and a warm-up; ``sqrt`` keeps
    the variance of the update (Krizhevsky, arXiv 1404.5997, section 5), usual with Adam.

    Raises:
        ConfigError: If the rule is unknown, or it lacks a reference.

    Example:
        >>> learning_rate_factor("sqrt", effective=1024, reference=256)
        2.0
    """
    if rule not in RULES:
        raise ConfigError(f"learning_rate_scaling.rule={rule}: {near(rule, RULES)}")
    if rule == "none":
        return 1.0
    if not isinstance(reference, int) or reference < 1:
        raise ConfigError(
            f"learning_rate_scaling.rule={rule} needs learning_rate_scaling.reference_batch_size=<samples of a step "
            "that optimizer.lr was chosen for>"
        )
    ratio = effective / reference
    return ratio if rule == "linear" else math.sqrt(ratio)


def scale_learning_rate(module: AffectModule, factor: float) -> None:
    """Multiply the learning rate that the module will build its optimiser with.

    Raises:
        ConfigError: If the optimiser has no rate to scale.
    """
    if factor == 1.0 or module.optimizer is None:
        return
    partial = module.optimizer
    if not isinstance(partial, functools.partial) or not isinstance(partial.keywords.get("lr"), int | float):
        raise ConfigError("learning_rate_scaling: optimizer.lr is no number that could be scaled")
    rate = partial.keywords["lr"] * factor
    module.optimizer = functools.partial(partial.func, *partial.args, **{**partial.keywords, "lr": rate})


def check_precision(config: DictConfig) -> None:
    """Refuse settings that would silently clip the wrong gradients.

    A fused optimiser unscales half-precision gradients itself, after they were clipped.
    """
    half = str(config.trainer.get("precision", "")) in ("16-mixed", "16", "16-true")
    fused = bool((config.get("optimizer") or {}).get("fused"))
    if half and fused and config.trainer.get("gradient_clip_val"):
        raise ConfigError(
            "optimizer.fused=true with trainer.precision=16-mixed cannot clip gradients (it unscales them itself); "
            "take trainer.precision=bf16-mixed, optimizer.fused=null or trainer.gradient_clip_val=null"
        )


def compile_encoders(config: DictConfig, module: AffectModule) -> None:
    """Compile the encoders if ``compile.encoder`` asks for it; names of weights stay as they are.

    Raises:
        ConfigError: If mode or backend are unknown, or the model cannot be trained compiled.
    """
    node = config.get("compile") or {}
    if not node.get("encoder"):
        return
    mode, backend = str(node.get("mode", "default")), str(node.get("backend", "inductor"))
    if mode not in MODES:
        raise ConfigError(f"compile.mode={mode}: {near(mode, MODES)}")
    backends = torch.compiler.list_backends(exclude_tags=())
    if backend not in backends:
        raise ConfigError(f"compile.backend={backend}: {near(backend, backends)}")
    tapping = objectives_inside(module)
    if tapping:
        raise ConfigError(
            f"compile.encoder=true: objective {tapping[0]} taps layers inside the encoder and differentiates twice, "
            "which compiled code cannot; set compile.encoder=false"
        )
    encoders = list(module.encoder_modules())
    if not encoders:
        raise ConfigError("compile.encoder=true: this model has no encoder; set compile.encoder=false")
    for _, encoder in encoders:
        encoder.compile(backend=backend, mode=None if mode == "default" else mode)


def objectives_inside(module: AffectModule) -> list[str]:
    """Return the names of the objectives that tap layers of encoders."""
    encoders = [name for name, _ in module.encoder_modules()]
    return [
        name
        for name, objective in module.objectives.items()
        for layer in getattr(objective, "layers", ())
        if any(f"{layer}.".startswith(f"{encoder}.") for encoder in encoders)
    ]


def check_sharing(config: DictConfig, module: AffectModule, trainer: pl.Trainer) -> None:
    """Refuse what does not go with encoders that are shared out over processes (``trainer=fsdp``).

    Raises:
        ConfigError: With what to change.
    """
    if not isinstance(trainer.strategy, FullyShardedStrategy):
        if isinstance(trainer.strategy, FSDPStrategy | ModelParallelStrategy | DeepSpeedStrategy):
            raise ConfigError("trainer.strategy: this one writes files with parts of weights; use trainer=fsdp")
        return
    tapping = objectives_inside(module)
    averaging = any(isinstance(c, pl.callbacks.WeightAveraging) for c in trainer.callbacks)  # type: ignore[attr-defined]
    refused = {
        "there is no encoder with weights to share out": not any(
            True for _, encoder in module.encoder_modules() for _ in encoder.parameters()
        ),
        f"objective {''.join(tapping[:1])} differentiates twice through layers of the encoder": bool(tapping),
        "callbacks.ema averages whole weights": averaging,
        "callbacks.qat replaces weights of the encoder": module.quantization is not None,
        "compile.encoder=true was never tried with it": bool((config.get("compile") or {}).get("encoder")),
        "trainer.sync_batchnorm=true has no effect in it": bool(config.trainer.get("sync_batchnorm")),
    }
    for reason, holds in refused.items():
        if holds:
            raise ConfigError(f"trainer.strategy: encoders cannot be shared out here, {reason}; use trainer=ddp")
