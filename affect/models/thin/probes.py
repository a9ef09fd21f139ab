# SPDX-License-Identifier: Apache-2.0
"""Fresh classifiers on frozen features: what can still be read of them, whatever an old classifier reads."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor, nn


def linear_probe(train: tuple[Tensor, Tensor], test: tuple[Tensor, Tensor], classes: int, decay: float = 1e-3) -> float:
    """Return the test accuracy of a multinomial logistic regression, which has one optimum.

    Args:
        train: Features ``(N, D)`` and classes int64 ``(N,)``.
        test: The same of other rows.
        classes: Number of classes.
        decay: Factor of half the squared norm of the weights, on standardised features and the mean loss.
    """
    x, others = _standardised(train[0], test[0])
    layer = nn.Linear(x.shape[1], classes)
    nn.init.zeros_(layer.weight)
    nn.init.zeros_(layer.bias)
    layer.to(x)
    optimizer = torch.optim.LBFGS(layer.parameters(), max_iter=200, history_size=20, line_search_fn="strong_wolfe")

    def loss() -> Tensor:
        optimizer.zero_grad()
        value = F.cross_entropy(layer(x), train[1]) + decay / 2 * layer.weight.square().sum()
        value.backward()
        return value

    with torch.enable_grad():
        optimizer.step(loss)
    return accuracy(layer, others, test[1])


def mlp_probe(
    train: tuple[Tensor, Tensor],
    test: tuple[Tensor, Tensor],
    classes: int,
    hidden: int = 128,
    epochs: int = 40,
    batch_size: int = 128,
    seed: int = 0,
) -> float:
    """Return the test accuracy of a perceptron with one hidden layer, trained by AdamW.

    Args:
        train: Features ``(N, D)`` and classes int64 ``(N,)``.
        test: The same of other rows.
        classes: Number of classes.
        hidden: Units of the hidden layer.
        epochs: Passes over the training rows.
        batch_size: Rows of a step.
        seed: Seed of start and order; the global generators stay as they are.
    """
    x, others = _standardised(train[0], test[0])
    with torch.random.fork_rng(devices=[]), torch.enable_grad():
        torch.manual_seed(seed)
        model = nn.Sequential(nn.Linear(x.shape[1], hidden), nn.ReLU(), nn.Linear(hidden, classes)).to(x)
        optimizer = torch.optim.AdamW(model.parameters(), lr=1e-3, weight_decay=1e-2)
        for _ in range(epochs):
            for rows in torch.randperm(len(x)).to(x.device).split(batch_size):
                optimizer.zero_grad()
                F.cross_entropy(model(x[rows]), train[1][rows]).backward()
                optimizer.step()
    return accuracy(model, others, test[1])


@torch.no_grad()
def accuracy(model: nn.Module, features: Tensor, labels: Tensor) -> float:
    """Return the share of rows whose largest logit is their label's."""
    return float((model(features).argmax(1) == labels).double().mean())


def mutual_information(leaves: Tensor, labels: Tensor) -> float:
    """Return the plug-in mutual information of two lists of integers in nats; few rows make it too large."""
    joint = torch.zeros(int(leaves.max()) + 1, int(labels.max()) + 1, dtype=torch.float64)
    joint.index_put_((leaves.cpu(), labels.cpu()), torch.ones(len(leaves), dtype=torch.float64), accumulate=True)
    joint /= joint.sum()
    independent = joint.sum(1, keepdim=True) * joint.sum(0, keepdim=True)
    some = joint > 0
    return max(0.0, float((joint[some] * (joint[some] / independent[some]).log()).sum()))


def _standardised(train: Tensor, test: Tensor) -> tuple[Tensor, Tensor]:
    train, test = train.float(), test.float()
    mean, spread = train.mean(0), train.std(0, unbiased=False)
    scale = torch.where(spread > 1e-6, 1 / spread.clamp(min=1e-6), 0)  # constant features say nothing
    return (train - mean) * scale, (test - mean) * scale
