# SPDX-License-Identifier: Apache-2.0
"""Networks that MONET is compared with: a common trunk, separate branches, and soft layer ordering.

Shapes as in the authors' research code; soft layer ordering is that of Meyerson and Miikkulainen, "Beyond shared
hierarchies", ICLR 2018.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor, nn

from affect.encoders import TimmEncoder
from affect.errors import ConfigError, near
from affect.models.base import AffectModule, Batch
from affect.models.baseline.network import Heads
from affect.tasks import Task


class CommonTrunk(nn.Module):
    """VMN-common: two hidden layers (ReLU, batch norm) that all outputs share, and one linear layer.

    Args:
        features: Size D of the vector.
        outputs: Number of outputs T.
        width: Units of a hidden layer.
    """

    def __init__(self, features: int, outputs: int, width: int = 64) -> None:
        super().__init__()
        self.layers = nn.Sequential(
            *(nn.Linear(features, width), nn.ReLU(), nn.BatchNorm1d(width)),
            *(nn.Linear(width, width), nn.ReLU(), nn.BatchNorm1d(width)),
            nn.Linear(width, outputs),
        )

    def forward(self, vector: Tensor) -> Tensor:
        """Return logits ``(B, T)`` of ``(B, D)``."""
        return self.layers(vector)

    def last_bias(self) -> Tensor:
        """Return the bias of each output ``(T,)``."""
        return self.layers[-1].bias  # type: ignore[return-value]


class SeparateBranches(nn.Module):
    """VMN-separate: the layers of ``CommonTrunk`` once for each output, computed together.

    Args:
        features: Size D of the vector.
        outputs: Number of outputs T.
        width: Units of a hidden layer of each branch.
    """

    def __init__(self, features: int, outputs: int, width: int = 64) -> None:
        super().__init__()
        self.outputs, self.width = outputs, width
        # Grouped convolutions of length 1 are linear layers of each branch.
        self.layers = nn.Sequential(
            *(nn.Conv1d(features, outputs * width, 1), nn.ReLU(), nn.BatchNorm1d(outputs * width)),
            *(nn.Conv1d(outputs * width, outputs * width, 1, groups=outputs), nn.ReLU()),
            *(nn.BatchNorm1d(outputs * width), nn.Conv1d(outputs * width, outputs, 1, groups=outputs)),
        )

    def forward(self, vector: Tensor) -> Tensor:
        """Return logits ``(B, T)`` of ``(B, D)``."""
        return self.layers(vector[..., None])[..., 0]

    def last_bias(self) -> Tensor:
        """Return the bias of each output ``(T,)``."""
        return self.layers[-1].bias  # type: ignore[return-value]


class SoftLayerOrder(nn.Module):
    r"""Every output passes through shared layers in an order of its own, which is soft and learnt.

    .. math:: x_{t,d+1} = \sum_m \mathrm{softmax}(s_{d,t})_m \, \mathrm{relu}(W_m x_{t,d})

    Args:
        features: Size D of the vector; a linear layer makes it ``width``.
        outputs: Number of outputs T.
        width: Units of a layer.
        layers: Number of shared layers M, without biases.
        depth: Number of times that a layer is applied.
    """

    def __init__(self, features: int, outputs: int, width: int = 64, layers: int = 4, depth: int = 4) -> None:
        super().__init__()
        self.enter = nn.Linear(features, width)
        self.kernels = nn.Parameter(torch.empty(layers, width, width))
        for kernel in self.kernels.data:
            nn.init.xavier_uniform_(kernel)
        self.scales = nn.Parameter(torch.zeros(depth, outputs, layers))
        self.head_weight = nn.Parameter(torch.empty(outputs, width))
        self.head_bias = nn.Parameter(torch.zeros(outputs))
        nn.init.xavier_uniform_(self.head_weight)

    def forward(self, vector: Tensor) -> Tensor:
        """Return logits ``(B, T)`` of ``(B, D)``."""
        x = self.enter(vector)[:, None].expand(-1, len(self.head_bias), -1)
        for scale in self.scales.softmax(-1):
            x = torch.einsum("tm,btmw->btw", scale, torch.einsum("bti,miw->btmw", x, self.kernels).relu())
        return (x * self.head_weight).sum(-1) + self.head_bias

    def last_bias(self) -> Tensor:
        """Return the bias of each output ``(T,)``."""
        return self.head_bias


class VectorNetwork(AffectModule):
    """A shared encoder with a network on its vector for one task; other tasks get a linear head.

    Args:
        tasks: What to predict, by name.
        encoder: Backbone with ``output=vector``.
        task: Name of the task that the network serves.
        log_odds_bias: Start the last biases of the network at the log-odds of the training rates.
        **common: Arguments of ``AffectModule``.
    """

    def __init__(
        self,
        tasks: Mapping[str, Task],
        encoder: TimmEncoder,
        task: str = "au",
        log_odds_bias: bool = False,
        **common: Any,  # noqa: ANN401
    ) -> None:
        super().__init__(tasks, **common)
        if task not in self.tasks:
            raise ConfigError(f"model.task={task}: no such task; {near(task, self.tasks)}")
        self.task, self.encoder = task, encoder
        self.network = self.make_network(encoder.num_features, self.tasks[task].num_outputs)
        others = {name: other.num_outputs for name, other in self.tasks.items() if name != task}
        self.head = Heads(encoder.num_features, others) if others else None
        rates = self.tasks[task].rates
        if log_odds_bias and rates is not None:
            start = torch.as_tensor(rates, dtype=torch.float32)
            self.network.last_bias().data.copy_(torch.logit(start.nan_to_num(0.5).clamp(1e-3, 1 - 1e-3)))

    def make_network(self, features: int, outputs: int) -> CommonTrunk | SeparateBranches | SoftLayerOrder:
        """Return the network from ``features`` numbers to ``outputs`` logits."""
        raise NotImplementedError

    def forward(self, batch: Batch) -> dict[str, Tensor]:
        """Return the representation of each task."""
        image = batch.image
        vector = self.encoder(image.contiguous(memory_format=torch.channels_last) if self.channels_last else image)
        raw = {} if self.head is None else dict(self.head(vector))
        raw[self.task] = self.network(vector)
        return {name: task.link(raw[name]) for name, task in self.tasks.items()}

    def heads(self) -> dict[str, nn.Linear]:
        """Return the linear layers of the other tasks."""
        return {} if self.head is None else dict(self.head.linear.items())  # type: ignore[arg-type]


class VMNCommon(VectorNetwork):
    """Baseline VMN-common: see ``CommonTrunk`` and ``VectorNetwork``."""

    def __init__(self, tasks: Mapping[str, Task], encoder: TimmEncoder, width: int = 64, **common: Any) -> None:  # noqa: ANN401
        self.width = width
        super().__init__(tasks, encoder, **common)

    def make_network(self, features: int, outputs: int) -> CommonTrunk | SeparateBranches | SoftLayerOrder:
        return CommonTrunk(features, outputs, self.width)


class VMNSeparate(VMNCommon):
    """Baseline VMN-separate: see ``SeparateBranches`` and ``VectorNetwork``."""

    def make_network(self, features: int, outputs: int) -> CommonTrunk | SeparateBranches | SoftLayerOrder:
        return SeparateBranches(features, outputs, self.width)


class SoftLayerOrdering(VectorNetwork):
    """Baseline soft layer ordering: see ``SoftLayerOrder`` and ``VectorNetwork``."""

    def __init__(
        self,
        tasks: Mapping[str, Task],
        encoder: TimmEncoder,
        width: int = 64,
        layers: int = 4,
        depth: int = 4,
        **common: Any,  # noqa: ANN401
    ) -> None:
        self.sizes = (width, layers, depth)
        super().__init__(tasks, encoder, **common)

    def make_network(self, features: int, outputs: int) -> CommonTrunk | SeparateBranches | SoftLayerOrder:
        return SoftLayerOrder(features, outputs, *self.sizes)
