# SPDX-License-Identifier: Apache-2.0
"""What criteria of pruning keep of small networks on digits, and what removal in small steps does.

Accuracies, not times: they are the same wherever this runs, up to rounding. A criterion scores the channels of all
layers; the least relevant ones go at once, without training, at several budgets. How scores of layers are compared
(``normalise``) is a column, and so is removal of the same part of every layer. Then channels are removed with training:
all at once, or in rounds with as many steps of training in all.
"""

from __future__ import annotations

import copy
import functools
import statistics
from collections.abc import Iterator, Mapping
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from affect.compression.base import Data
from affect.compression.pruning import PruningGraph, SInGE, gated, relevance, select_units
from affect.data.controlled.digits import handwritten_digits

CRITERIA = {
    "singe, mode=exact": ("singe", "exact"),
    "singe, mode=layer": ("singe", "layer"),
    "taylor": ("taylor", "layer"),
    "gradient": ("gradient", "layer"),
    "l1": ("l1", "layer"),
    "l2": ("l2", "layer"),
}
"""Criterion and mode by the name of a row."""

NORMALISED = ("cost", "none", "mean")

BUDGETS = (0.2, 0.35, 0.5, 0.65)
"""Parts of the multiplications that are removed."""

SHARES = (0.125, 0.25, 0.375, 0.5, 0.625)
"""Parts of the channels of every layer."""

STEPS = 4
"""Points of the path from a channel to its removal."""

CASES = ((8, 120, 8), (16, 400, 8))
"""Channels, steps of training, and number of networks."""

REMOVED, ROUNDS = 0.7, 5
"""With training: part of the multiplications, and in how many rounds."""

TUNING = (120, 400)
"""Steps of training in all."""

TUNED = 3
"""Networks that are pruned with training."""

HELD_OUT = 1200
"""Rows of the digits from here on are tested on."""


class Smooth(nn.Module):
    """A small convolutional network without kinks; its head stays outside of what is pruned.

    Args:
        width: Channels of the convolutions.
    """

    def __init__(self, width: int = 8) -> None:
        super().__init__()
        self.conv1 = nn.Conv2d(1, width, 3, padding=1)
        self.conv2 = nn.Conv2d(width, width, 3, padding=1, stride=2)
        self.fc = nn.Linear(16 * width, 24)
        self.out = nn.Linear(24, 16)

    def forward(self, x: Tensor) -> Tensor:
        """Return features ``(B, 16)`` of drawings ``(B, 1, 8, 8)``."""
        x = F.gelu(self.conv2(F.gelu(self.conv1(x))))
        return F.gelu(self.out(F.gelu(self.fc(x.flatten(1)))))


@functools.cache
def digits() -> tuple[Tensor, Tensor]:
    """Return drawings in [-1, 1] ``(1797, 1, 8, 8)`` and their digits ``(1797,)``."""
    images, labels = handwritten_digits("digits")
    return torch.tensor(images).float()[:, None] / 8 - 1, torch.tensor(labels)


class DigitsTask:
    """A network with a head on the digits: the data that transforms get of a model.

    Args:
        seed: Of weights and batches.
        steps: Of training.
        width: Channels of the convolutions.
    """

    def __init__(self, seed: int = 0, steps: int = 150, width: int = 8) -> None:
        torch.manual_seed(seed)
        self.network: nn.Module = Smooth(width)
        self.head = nn.Linear(16, 10)
        self.images, self.labels = digits()
        self.generator = torch.Generator().manual_seed(seed)
        self.train(steps, 3e-3)

    def loss(self, rows: Tensor) -> Tensor:
        """Return the loss on some rows."""
        return F.cross_entropy(self.head(self.network(self.images[rows])), self.labels[rows])

    def losses(self) -> Iterator[Tensor]:
        """Yield the loss of two batches of the training part."""
        for start in range(0, 256, 128):
            yield self.loss(torch.arange(start, start + 128))

    def train(self, steps: int, rate: float = 1e-3) -> None:
        """Train the network and its head."""
        parameters = [*self.network.parameters(), *self.head.parameters()]
        optimizer = torch.optim.Adam(parameters, lr=rate)
        for _ in range(steps):
            optimizer.zero_grad()
            self.loss(torch.randint(HELD_OUT, (64,), generator=self.generator)).backward()
            optimizer.step()

    @torch.no_grad()
    def accuracy(self) -> float:
        """Return the accuracy on the rows that were held out."""
        found = self.head(self.network(self.images[HELD_OUT:])).argmax(1)
        return float((found == self.labels[HELD_OUT:]).float().mean())

    def data(self) -> Data:
        """Return what transforms may use."""
        return Data(losses=self.losses, train=self.train, example=self.images[:1])

    def graph(self) -> PruningGraph:
        """Return what can be removed of the network."""
        return PruningGraph(self.network, self.images[:1])


def accuracy_without(task: DigitsTask, graph: PruningGraph, removed: Mapping[str, Tensor]) -> float:
    """Return the accuracy without some units of each group, by closed gates, which is the same as removal."""
    none = torch.empty(0, dtype=torch.long)
    gates = {name: torch.ones(len(g)).index_fill(0, removed.get(name, none), 0) for name, g in graph.groups.items()}
    with gated(task.network, graph.groups.values(), gates):
        return task.accuracy()


def kept_by_budget(task: DigitsTask, graph: PruningGraph, scores: Mapping[str, Tensor], normalise: str) -> float:
    """Return the mean accuracy over ``BUDGETS``, without training."""
    total = sum(graph.layer_costs("macs").values())
    found = [select_units(graph, scores, total * (1 - part), "macs", normalise) for part in BUDGETS]
    return statistics.mean(accuracy_without(task, graph, removed) for removed in found)


def kept_by_share(task: DigitsTask, graph: PruningGraph, scores: Mapping[str, Tensor]) -> float:
    """Return the mean accuracy over ``SHARES``, where every layer loses the same part, without training."""
    found = [
        {name: score.argsort(stable=True)[: round(share * len(score))] for name, score in scores.items()}
        for share in SHARES
    ]
    return statistics.mean(accuracy_without(task, graph, removed) for removed in found)


def untrained_rows(width: int, steps: int, count: int) -> list[dict[str, Any]]:
    """Return a row for each criterion: what it keeps, and how much more than magnitude with its standard error."""
    found: dict[str, dict[str, list[float]]] = {name: {} for name in CRITERIA}
    for seed in range(1, count + 1):
        task = DigitsTask(seed, steps, width)
        graph = task.graph()
        for name, (criterion, mode) in CRITERIA.items():
            scores = relevance(graph, task.losses, criterion, mode, STEPS)
            for normalise in NORMALISED:
                found[name].setdefault(normalise, []).append(kept_by_budget(task, graph, scores, normalise))
            found[name].setdefault("every layer alike", []).append(kept_by_share(task, graph, scores))
    rows = []
    for name, columns in found.items():
        gaps = [a - b for a, b in zip(columns["cost"], found["l2"]["cost"], strict=True)]
        error = statistics.stdev(gaps) / len(gaps) ** 0.5 if len(gaps) > 1 else 0.0
        rows.append(
            {
                "networks": f"{count} of {width} channels, {steps} steps",
                "removal": "at once, untrained",
                "criterion": name,
                **{column: statistics.mean(values) for column, values in columns.items()},
                "over l2 (cost)": statistics.mean(gaps),
                "standard error": error,
            }
        )
    return rows


def trained_rows(width: int, steps: int, count: int, tuning: int) -> list[dict[str, Any]]:
    """Return a row for removal at once and one for removal in rounds, with as many steps of training."""
    bursts = {"at once": (1, 0), f"in {ROUNDS} rounds": (ROUNDS, tuning // (2 * ROUNDS))}
    rows = []
    for name, (rounds, burst) in bursts.items():
        for mode in ("exact", "layer"):
            row: dict[str, Any] = {
                "networks": f"{count} of {width} channels, {steps} steps",
                "removal": f"{REMOVED:.0%} {name}, {tuning} steps",
                "criterion": f"singe, mode={mode}",
            }
            for normalise in NORMALISED:
                kept = []
                for seed in range(1, count + 1):
                    task = copy.deepcopy(trained(seed, steps, width))
                    method = SInGE(
                        REMOVED,
                        mode=mode,
                        steps=STEPS,
                        rounds=rounds,
                        tune_steps=burst,
                        final_steps=tuning - rounds * burst,
                        normalise=normalise,
                    )
                    method(task.network, task.data())
                    kept.append(task.accuracy())
                row[normalise] = statistics.mean(kept)
            rows.append({**row, "every layer alike": "", "over l2 (cost)": "", "standard error": ""})
    return rows


@functools.cache
def trained(seed: int, steps: int, width: int) -> DigitsTask:
    """Return a trained network; who changes it copies it."""
    return DigitsTask(seed, steps, width)


def measure(quick: bool) -> list[dict[str, Any]]:
    """Return accuracies: a row per criterion without training, and per schedule with training.

    Raises:
        ConfigError: If torch-pruning or scikit-learn is not installed.
    """
    cases, tuning = (((8, 20, 2),), (10,)) if quick else (CASES, TUNING)
    rows = []
    for width, steps, count in cases:
        rows += untrained_rows(width, steps, count)
    for width, steps, count in cases:
        for total in tuning:
            rows += trained_rows(width, steps, min(count, 1 if quick else TUNED), total)
    return rows
