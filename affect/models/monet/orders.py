# SPDX-License-Identifier: Apache-2.0
"""Orders of tasks: drawing distinct permutations, and the doubly stochastic matrix that a mixture of them is.

An order is a permutation ``o`` of the tasks; ``o[k]`` is the task that is treated at step ``k``.
"""

from __future__ import annotations

import itertools
import math

import numpy as np
import torch
from torch import Tensor

from affect.errors import ConfigError

_ENUMERATED = 8
"""Up to this many tasks all permutations can be listed."""


def draw_orders(tasks: int, count: int, seed: int = 0, identity: bool = False) -> np.ndarray:
    """Return ``count`` distinct permutations of ``tasks`` tasks, int64 ``(count, tasks)``.

    They are drawn uniformly without replacement; all of them come in lexicographic order.

    Args:
        tasks: Number of tasks T.
        count: Number of orders M, at most T!.
        seed: Seed of the draw.
        identity: Whether the first order is the natural one; the others are drawn.

    Raises:
        ConfigError: If there are fewer than ``count`` permutations.
    """
    if tasks < 1 or count < 1:
        raise ConfigError(f"model.orders={count}: at least one order of at least one task is needed (tasks: {tasks})")
    total = math.factorial(tasks)
    if count > total:
        raise ConfigError(f"model.orders={count}: {tasks} tasks have only {total} orders; set model.orders={total}")
    random = np.random.default_rng(seed)
    if tasks <= _ENUMERATED:
        every = np.array(list(itertools.permutations(range(tasks))), np.int64)
        if count == total:
            return every
        chosen = random.permutation(np.arange(1, total))[: count - 1] if identity else random.permutation(total)[:count]
        return np.concatenate([every[:1], every[chosen]]) if identity else every[chosen]
    found: dict[bytes, np.ndarray] = {}
    if identity:
        first = np.arange(tasks)
        found[first.tobytes()] = first
    while len(found) < count:  # far more permutations than orders: a repetition is rare
        for order in random.permuted(np.tile(np.arange(tasks), (count, 1)), axis=1):
            if len(found) < count:
                found.setdefault(order.tobytes(), order)
    return np.stack(list(found.values())).astype(np.int64)


def check_orders(orders: np.ndarray, tasks: int) -> np.ndarray:
    """Return given orders as int64 ``(M, T)``.

    Raises:
        ConfigError: If a row is no permutation of the tasks, or occurs twice.
    """
    orders = np.asarray(orders, np.int64)
    if orders.ndim != 2 or orders.shape[1] != tasks or (np.sort(orders, 1) != np.arange(tasks)).any():
        raise ConfigError(
            f"model.orders: each order must be a permutation of 0 … {tasks - 1}, got {orders.tolist()[:3]}"
        )
    if len(np.unique(orders, axis=0)) < len(orders):
        raise ConfigError("model.orders: an order occurs twice")
    return orders


def order_matrices(orders: Tensor) -> Tensor:
    """Return the permutation matrices ``(M, T, T)`` of orders ``(M, T)``: 1 at [m, k, t] if step k treats task t."""
    return torch.nn.functional.one_hot(orders, orders.shape[-1]).to(torch.get_default_dtype())


def soft_order(orders: Tensor, weights: Tensor) -> Tensor:
    r"""Return the soft order :math:`\Omega = \sum_m \pi_m P_m`, a point of Birkhoff's polytope ``(T, T)``.

    Its rows (steps) and columns (tasks) sum to 1: entry [k, t] is the probability that step k treats task t.

    Args:
        orders: Orders ``(M, T)``.
        weights: Their weights :math:`\pi` ``(M,)``, which sum to 1.
    """
    tasks = orders.shape[1]
    steps = torch.arange(tasks, device=orders.device).expand_as(orders)
    flat = torch.zeros(tasks * tasks, dtype=weights.dtype, device=weights.device)
    flat = flat.index_add(0, (steps * tasks + orders).reshape(-1), weights[:, None].expand_as(orders).reshape(-1))
    return flat.view(tasks, tasks)


def kendall_distance(a: np.ndarray, b: np.ndarray) -> np.ndarray:
    """Return in how many pairs of tasks two orders ``(…, T)`` disagree, int64 ``(…)``; leading axes broadcast."""
    a, b = np.argsort(a, -1), np.argsort(b, -1)  # position of each task
    first, second = np.triu_indices(a.shape[-1], 1)
    return ((a[..., first] < a[..., second]) != (b[..., first] < b[..., second])).sum(-1)
