# SPDX-License-Identifier: Apache-2.0
"""Training with the weights, gradients and optimiser states of encoders shared out over processes (FSDP2).

Encoders are what grows too large for one accelerator, so they are shared out; everything else is small, is read by name
in losses and orders, and stays whole in every process, with its gradients averaged before each step.
"""

from __future__ import annotations

import copy
import itertools
from collections.abc import Iterable
from pathlib import Path
from typing import Any

import torch
import torch.distributed
from pytorch_lightning import LightningModule, Trainer
from pytorch_lightning.strategies import ModelParallelStrategy
from torch import Tensor, nn
from torch.distributed.device_mesh import DeviceMesh
from torch.distributed.fsdp import FSDPModule, fully_shard
from torch.distributed.tensor import DTensor

from affect.errors import CheckpointError

MINIMUM = 1_000_000
"""Parameters of a block that is gathered by itself, so that no process holds the whole encoder while it trains."""


class FullyShardedStrategy(ModelParallelStrategy):
    """Lightning's strategy for FSDP2, over all processes and with checkpoints in one file.

    ``last.ckpt`` holds the gathered weights and states, written by the first process through the run's checkpoint
    writer, so that it is as atomic as any other.

    Args:
        minimum_parameters: Blocks of an encoder are gathered one by one from this size on.
        process_group_backend: ``nccl``, ``gloo``, …; None takes that of the accelerator.
    """

    def __init__(self, minimum_parameters: int = MINIMUM, process_group_backend: str | None = None) -> None:
        super().__init__(
            tensor_parallel_size=1, save_distributed_checkpoint=False, process_group_backend=process_group_backend
        )
        self.minimum_parameters = int(minimum_parameters)

    def setup_environment(self) -> None:
        """Start the processes; all of them share the data."""
        self._data_parallel_size = self.num_nodes * self.num_processes
        super().setup_environment()
        assert self.lightning_module is not None
        self.lightning_module.shards = Shards(self.device_mesh["data_parallel"], self.minimum_parameters)

    def setup(self, trainer: Trainer) -> None:
        """Prepare model and optimisers; what is gathered for a validation is trained with afterwards.

        Tensors that are first made in inference mode could not be.
        """
        evaluations = (trainer.fit_loop.epoch_loop.val_loop, trainer.validate_loop, trainer.test_loop)
        for loop in (*evaluations, trainer.predict_loop):
            loop.inference_mode = False
        super().setup(trainer)

    def load_checkpoint(self, checkpoint_path: str | Path, weights_only: bool | None = None) -> dict[str, Any]:
        """Restore weights and states, and return the rest of the checkpoint; reading runs no code.

        Raises:
            CheckpointError: If the file is damaged, holds more than plain data, or is of another model.
        """
        try:
            return super().load_checkpoint(checkpoint_path, weights_only=True)
        except Exception as error:
            reason = (str(error) or type(error).__name__).splitlines()[0][:120]
            raise CheckpointError(f"{checkpoint_path}: cannot be read ({reason})") from error


class Shards:
    """The shared-out encoders of a model, from ``share_out`` to ``gather``.

    Args:
        mesh: The processes.
        minimum_parameters: See ``FullyShardedStrategy``.
    """

    def __init__(self, mesh: DeviceMesh, minimum_parameters: int = MINIMUM) -> None:
        self.mesh, self.minimum_parameters = mesh, minimum_parameters
        self._plain: dict[str, nn.Module] = {}

    def share_out(self, module: LightningModule, encoders: Iterable[tuple[str, nn.Module]]) -> None:
        """Share out the encoders; all processes begin with the weights of the first, as DDP has it.

        Args:
            module: The model.
            encoders: Its encoders by name, ``AffectModule.encoder_modules``.
        """
        if self._plain:
            return
        by_name = dict(encoders)
        self._broadcast([*module.parameters(), *module.buffers()])
        for name, encoder in by_name.items():
            self._plain[name] = _without_weights(encoder)
            share_out(encoder, self.mesh, self.minimum_parameters)

    def _broadcast(self, tensors: list[Tensor]) -> None:
        group = self.mesh.get_group()
        first = torch.distributed.get_global_rank(group, 0)
        with torch.no_grad():
            for tensor in tensors:
                here = tensor.detach().to(self.mesh.device_type).contiguous()
                torch.distributed.broadcast(here, src=first, group=group)
                tensor.copy_(here)

    def average_gradients(self, module: nn.Module) -> None:
        """Average the gradients of what is not shared out; FSDP does so for the rest.

        A process whose batch has no label of a task counts with zeros; what no process used has no gradient.
        """
        group = self.mesh.get_group()
        whole = [p for p in module.parameters() if p.requires_grad and not isinstance(p, DTensor)]
        used = torch.tensor([p.grad is not None for p in whole], dtype=torch.uint8, device=self.mesh.device_type)
        torch.distributed.all_reduce(used, torch.distributed.ReduceOp.MAX, group=group)
        for parameter in itertools.compress(whole, used.tolist()):
            if parameter.grad is None:
                parameter.grad = torch.zeros_like(parameter)
            torch.distributed.all_reduce(parameter.grad, group=group)
            parameter.grad /= self.mesh.size()

    def keep_whole(self, module: nn.Module, whole: bool) -> None:
        """Hold whole encoders for a while: processes that predict differ in their number of batches.

        Args:
            module: The model.
            whole: False goes back to parts. True also gives all processes the buffers of the first, whose running
                statistics are the ones that are kept.
        """
        if whole:
            self._broadcast(list(module.buffers()))
        encoders = [module.get_submodule(name) for name in self._plain]  # they stay whole after a forward pass anyway
        for part in module.modules():
            if not isinstance(part, FSDPModule):
                continue
            if not any(part is encoder for encoder in encoders):
                part.set_reshard_after_forward(not whole, recurse=False)
            if whole:
                part.unshard()
            else:
                part.reshard()

    def gather(self, module: LightningModule) -> None:
        """Put whole, ordinary encoders with the trained weights in the place of the shared-out ones.

        All processes must call this together. Optimisers know nothing of the new weights: training is over.
        """
        for name, plain in self._plain.items():
            shared = module.get_submodule(name)
            trained = dict(shared.named_parameters(remove_duplicate=False))
            buffers = dict(shared.named_buffers(remove_duplicate=False))
            made: dict[int, nn.Parameter] = {}  # of weights with several names, each once
            for owner_name, owner in plain.named_modules():
                prefix = f"{owner_name}." if owner_name else ""
                for key, parameter in list(owner.named_parameters(recurse=False)):
                    source = trained[prefix + key]
                    if id(source) not in made:
                        made[id(source)] = nn.Parameter(full(source.detach()), parameter.requires_grad)
                    setattr(owner, key, made[id(source)])
                for key, _ in list(owner.named_buffers(recurse=False)):
                    setattr(owner, key, buffers[prefix + key])
            plain.train(shared.training)
            parent, _, key = name.rpartition(".")
            setattr(module.get_submodule(parent), key, plain)
        self._plain = {}


def share_out(encoder: nn.Module, mesh: DeviceMesh, minimum_parameters: int = MINIMUM) -> None:
    """Share out an encoder over the processes of ``mesh``, in place; its ``gathered_together`` are gathered apart.

    Parts of weights are parts of rows, so weights in another memory order (``channels_last``) go back to the plain one.
    """
    for parameter in encoder.parameters():
        parameter.data = parameter.data.contiguous()
    for module in gathered_together(encoder, minimum_parameters):
        fully_shard(module, mesh=mesh)


def gathered_together(encoder: nn.Module, minimum_parameters: int = MINIMUM) -> dict[nn.Module, int]:
    """Return the modules whose parameters are gathered together, with their numbers of parameters; the encoder is last.

    Members of sequences and lists (the blocks of a network) are gathered by themselves from ``minimum_parameters``
    parameters on that no block inside them has taken; what remains is gathered with the encoder. Other modules may be
    entered by other ways than their ``forward``, as timm's networks are by ``forward_features``.
    """
    found: dict[nn.Module, int] = {}

    def visit(module: nn.Module, member: bool) -> int:
        inside = isinstance(module, nn.Sequential | nn.ModuleList)
        own = sum(parameter.numel() for parameter in module.parameters(recurse=False))
        left = own + sum(visit(child, inside) for child in module.children())
        if not member or left < minimum_parameters:
            return left
        found[module] = left
        return 0

    left = visit(encoder, False)
    return {**found, encoder: left}


def full(tensor: Tensor) -> Tensor:
    """Return a tensor as a whole; of one that is shared out, all processes must ask together."""
    return tensor.full_tensor() if isinstance(tensor, DTensor) else tensor


def clip_norm(parameters: list[Tensor], limit: float) -> None:
    """Clip gradients by their common norm where some are shared out and some are not.

    Args:
        parameters: The parameters.
        limit: Largest norm.
    """
    held = [parameter for parameter in parameters if parameter.grad is not None]
    kinds = [[p for p in held if isinstance(p, DTensor) == shared] for shared in (False, True)]
    norms = [full(nn.utils.get_total_norm([p.grad for p in kind])) for kind in kinds if kind]
    if not norms:
        return
    total = torch.linalg.vector_norm(torch.stack(norms))
    for kind in kinds:
        nn.utils.clip_grads_with_norm_(kind, limit, total)


def _without_weights(encoder: nn.Module) -> nn.Module:
    """Return a copy of an encoder that has its buffers, and no memory for its parameters."""
    with torch.no_grad():
        empty = {id(p): nn.Parameter(torch.empty_like(p, device="meta"), p.requires_grad) for p in encoder.parameters()}
    return copy.deepcopy(encoder, dict(empty))
