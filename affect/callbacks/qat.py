# SPDX-License-Identifier: Apache-2.0
"""Quantization-aware training of any model; what is quantized, and how, is ``affect.quantization.Quantization``."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import pytorch_lightning as pl
import torch
import torch.distributed
from torch import nn

from affect.errors import ConfigError
from affect.models.base import AffectModule
from affect.quantization import Captured, Quantization
from affect.quantization.plan import SKIP
from affect.quantization.weights import Bits, Scale


class QuantizationAwareTraining(pl.Callback):
    """Trains a model with quantized weights, or with quantized weights and activations of its encoder.

    The model is wrapped before an optimiser is made and before a state is loaded. Validation, the best weights and the
    release are those of the quantized model.

    Args:
        weights: ``binary``, ``ternary`` or a number of bits.
        activations: Bits of what layers of an encoder are fed; None quantizes weights only.
        modules: Sub-modules that are quantized; ``[all]`` is the whole model (weights only).
        also: With ``activations``: further sub-modules of which only weights are quantized.
        outer: The first layer of each encoder, and the heads where ``modules`` or ``also`` hold them: bits, ``same``
            as the rest, or ``float``. What a head is fed stays float.
        scale: Weights only, of a number of bits: ``max`` or ``mean``.
        skip: Patterns of parameters that stay float.
        learned: With ``activations``: learn the steps of the grids. None learns them below 8 bits.
        freeze_norms: Epoch (from 0) from which batch norms use and keep their running statistics; None for never.
        freeze_observers: Epoch from which ranges and learned steps stay as they are; None for never. Acts with
            ``activations``.

    Raises:
        ConfigError: If a value is unknown, or two contradict each other.
    """

    def __init__(
        self,
        weights: Bits = 8,
        activations: int | None = None,
        modules: Sequence[str] = ("encoder",),
        also: Sequence[str] = (),
        outer: Bits = 8,
        scale: Scale = "max",
        skip: Sequence[str] = SKIP,
        learned: bool | None = None,
        freeze_norms: int | None = None,
        freeze_observers: int | None = None,
    ) -> None:
        self.quantization = Quantization(weights, activations, modules, also, outer, scale, skip, learned)
        for key, epoch in (("freeze_norms", freeze_norms), ("freeze_observers", freeze_observers)):
            if epoch is not None and (not isinstance(epoch, int) or isinstance(epoch, bool) or epoch < 0):
                raise ConfigError(f"callbacks.qat.{key}={epoch}: an epoch from 0 on, or null for never")
        if freeze_observers is not None and activations is None:
            raise ConfigError(
                "callbacks.qat.freeze_observers acts on ranges of activations, and callbacks.qat.activations=null has "
                "none: leave it out"
            )
        self.freeze_norms, self.freeze_observers = freeze_norms, freeze_observers

    def wrap(self, module: AffectModule, trainer: pl.Trainer | None = None) -> None:
        """Quantize a new model; a second call does nothing.

        Args:
            module: The model, without a state that was loaded into it.
            trainer: Refused if its precision is not float32 and activations are quantized.

        Raises:
            ConfigError: If the model cannot be quantized so.
        """
        if trainer is not None and self.quantization.activations is not None and "32" not in str(trainer.precision):
            raise ConfigError(
                f"trainer.precision={trainer.precision}: the grids of activations need float32; set "
                "trainer.precision=32-true, or callbacks.qat.activations=null for weights only"
            )
        self.quantization.apply(module)

    # ---------------------------------------------------------------------------------------------- Lightning

    def setup(self, trainer: pl.Trainer, pl_module: pl.LightningModule, stage: str) -> None:
        """Quantize the model, where nobody has done so before the trainer started."""
        assert isinstance(pl_module, AffectModule)
        self.wrap(pl_module, trainer)

    def on_train_batch_start(
        self,
        trainer: pl.Trainer,
        pl_module: pl.LightningModule,
        batch: Any,  # noqa: ANN401
        batch_idx: int,
    ) -> None:
        """Start ranges and steps from the first batch of a run, and freeze what is due.

        Modes are set at every batch: Lightning sets a module's own after each validation, and a continued run must be
        frozen before its first batch.
        """
        captured = _captured(pl_module)
        if captured and trainer.global_step == 0 and trainer.current_epoch == 0 and batch_idx == 0:
            _start(captured, pl_module, batch)
        if self.freeze_norms is not None and trainer.current_epoch >= self.freeze_norms:
            for sub in pl_module.modules():
                if isinstance(sub, nn.modules.batchnorm._BatchNorm) or type(sub).__name__ == "SwitchedBatchNorm":
                    sub.training = False
        if self._are_frozen(trainer):
            for sub in captured:
                sub.freeze_observers()

    def on_before_optimizer_step(
        self, trainer: pl.Trainer, pl_module: pl.LightningModule, optimizer: torch.optim.Optimizer
    ) -> None:
        """Leave frozen steps out: without a gradient an optimiser skips them."""
        if self._are_frozen(trainer):
            for sub in _captured(pl_module):
                for step in sub.learned_steps():
                    step.grad = None

    def on_train_batch_end(
        self,
        trainer: pl.Trainer,
        pl_module: pl.LightningModule,
        outputs: Any,  # noqa: ANN401
        batch: Any,  # noqa: ANN401
        batch_idx: int,
    ) -> None:
        """Keep learned steps above 0."""
        for sub in _captured(pl_module):
            sub.positive_steps()

    def on_validation_start(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        """Take the ranges of the first process in a distributed run: each has seen its own batches."""
        for sub in _captured(pl_module):
            _from_first_process(sub)

    def _are_frozen(self, trainer: pl.Trainer) -> bool:
        return self.freeze_observers is not None and trainer.current_epoch >= self.freeze_observers


def _captured(module: nn.Module) -> list[Captured]:
    return [sub for sub in module.modules() if isinstance(sub, Captured)]


def _start(captured: Sequence[Captured], module: nn.Module, batch: Any) -> None:  # noqa: ANN401
    """Pass a batch through the model in training mode to start ranges and steps from it."""
    from contextlib import ExitStack

    devices = [batch.image.device] if batch.image.device.type == "cuda" else []
    with ExitStack() as stack:
        # Dropout draws in here; the step that follows draws what it would have drawn.
        stack.enter_context(torch.random.fork_rng(devices=devices))
        for sub in captured:
            stack.enter_context(sub.start_from())
        for sub in captured:
            sub(batch.image)
    for sub in captured:
        _from_first_process(sub)


def _from_first_process(captured: Captured) -> None:
    if not (torch.distributed.is_available() and torch.distributed.is_initialized()):
        return
    for _, quantizer in captured.quantizers():
        for tensor in (*quantizer.parameters(), *quantizer.buffers()):
            torch.distributed.broadcast(tensor.data, src=0)
