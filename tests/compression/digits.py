# SPDX-License-Identifier: Apache-2.0
"""A small trained network on photographs of digits, with what transforms get of a model."""

from __future__ import annotations

import functools
from collections.abc import Iterator

import torch
import torch.nn.functional as F
from sklearn.datasets import load_digits
from torch import Tensor, nn

from affect.compression.base import Data
from affect.compression.pruning import PruningGraph


class Smooth(nn.Module):
    """A small convolutional network without kinks; its head stays outside of what is pruned."""

    def __init__(self, width: int = 8) -> None:
        super().__init__()
        self.conv1 = nn.Conv2d(1, width, 3, padding=1)
        self.conv2 = nn.Conv2d(width, width, 3, padding=1, stride=2)
        self.fc = nn.Linear(16 * width, 24)
        self.out = nn.Linear(24, 16)

    def forward(self, x: Tensor) -> Tensor:
        x = F.gelu(self.conv2(F.gelu(self.conv1(x))))
        return F.gelu(self.out(F.gelu(self.fc(x.flatten(1)))))


@functools.cache
def digits() -> tuple[Tensor, Tensor]:
    found = load_digits()
    return torch.tensor(found.images).float()[:, None] / 8 - 1, torch.tensor(found.target)


class Task:
    """A network with a head on the digits: the data that transforms get of a model."""

    def __init__(self, seed: int = 0, steps: int = 150, width: int = 8) -> None:
        torch.manual_seed(seed)
        self.network, self.head = Smooth(width), nn.Linear(16, 10)
        self.images, self.labels = digits()
        self.generator = torch.Generator().manual_seed(seed)
        self.train(steps, 3e-3)

    def loss(self, rows: Tensor) -> Tensor:
        return F.cross_entropy(self.head(self.network(self.images[rows])), self.labels[rows])

    def losses(self) -> Iterator[Tensor]:
        for start in range(0, 256, 128):
            yield self.loss(torch.arange(start, start + 128))

    def train(self, steps: int, rate: float = 1e-3) -> None:
        parameters = [*self.network.parameters(), *self.head.parameters()]
        optimizer = torch.optim.Adam(parameters, lr=rate)
        for _ in range(steps):
            optimizer.zero_grad()
            self.loss(torch.randint(1200, (64,), generator=self.generator)).backward()
            optimizer.step()

    @torch.no_grad()
    def accuracy(self) -> float:
        return float((self.head(self.network(self.images[1200:])).argmax(1) == self.labels[1200:]).float().mean())

    def data(self) -> Data:
        return Data(losses=self.losses, train=self.train, example=self.images[:1])

    def graph(self) -> PruningGraph:
        return PruningGraph(self.network, self.images[:1])
