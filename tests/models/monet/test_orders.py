# SPDX-License-Identifier: Apache-2.0
"""Orders are distinct permutations, and their mixture is doubly stochastic."""

from __future__ import annotations

import itertools
import math

import numpy as np
import pytest
import torch

from affect.errors import ConfigError
from affect.models.monet.orders import check_orders, draw_orders, kendall_distance, order_matrices, soft_order


@pytest.mark.parametrize(("tasks", "count"), [(3, 6), (5, 17), (5, 120), (12, 512), (1, 1)])
def test_orders_are_distinct_permutations(tasks, count):
    orders = draw_orders(tasks, count, seed=3)
    assert orders.shape == (count, tasks)
    assert (np.sort(orders, 1) == np.arange(tasks)).all()
    assert len(np.unique(orders, axis=0)) == count


@pytest.mark.parametrize(("tasks", "count"), [(4, 24), (5, 7), (12, 40)])
def test_a_seed_decides(tasks, count):
    np.testing.assert_array_equal(draw_orders(tasks, count, 5), draw_orders(tasks, count, 5))
    if count < math.factorial(tasks):
        assert (draw_orders(tasks, count, 5) != draw_orders(tasks, count, 6)).any()


@pytest.mark.parametrize(("tasks", "count"), [(4, 5), (12, 40)])
def test_the_natural_order_can_be_among_them(tasks, count):
    assert draw_orders(tasks, count, identity=True)[0].tolist() == list(range(tasks))


def test_drawing_is_uniform_over_permutations():
    counts = np.zeros(24)
    every = [tuple(order) for order in itertools.permutations(range(4))]
    for seed in range(600):
        for order in draw_orders(4, 6, seed):
            counts[every.index(tuple(order))] += 1
    expected = 600 * 6 / 24
    assert ((counts - expected) ** 2 / expected).sum() < 49.7  # 0.1 % point of chi-square with 23 degrees of freedom


def test_too_many_orders_are_refused():
    with pytest.raises(ConfigError, match="only 6 orders"):
        draw_orders(3, 7)


def test_given_orders_are_checked():
    with pytest.raises(ConfigError, match="permutation"):
        check_orders(np.array([[0, 1, 1]]), 3)
    with pytest.raises(ConfigError, match="twice"):
        check_orders(np.array([[0, 1], [0, 1]]), 2)


def test_the_soft_order_is_doubly_stochastic():
    orders = torch.as_tensor(draw_orders(7, 50))
    weights = torch.randn(50, dtype=torch.float64).softmax(0)
    matrix = soft_order(orders, weights)
    assert (matrix >= 0).all()
    assert (matrix <= 1).all()
    torch.testing.assert_close(matrix.sum(0), torch.ones(7, dtype=torch.float64))
    torch.testing.assert_close(matrix.sum(1), torch.ones(7, dtype=torch.float64))


def test_the_soft_order_is_the_mixture_of_permutation_matrices():
    orders = torch.as_tensor(draw_orders(5, 9))
    weights = torch.randn(9).softmax(0)
    torch.testing.assert_close(soft_order(orders, weights), torch.einsum("m,mkt->kt", weights, order_matrices(orders)))
    matrix = order_matrices(orders)[0]
    assert [int(row.argmax()) for row in matrix] == orders[0].tolist()


def test_all_orders_alike_give_the_centre_and_one_gives_a_corner():
    orders = torch.as_tensor(draw_orders(4, 24))
    torch.testing.assert_close(soft_order(orders, torch.full((24,), 1 / 24)), torch.full((4, 4), 0.25))
    one = torch.zeros(24)
    one[13] = 1
    torch.testing.assert_close(soft_order(orders, one), order_matrices(orders)[13])


def test_kendall_distance():
    assert kendall_distance(np.arange(5), np.arange(5)[::-1]) == 10
    assert kendall_distance(np.arange(5), np.array([1, 0, 2, 3, 4])) == 1
    orders = draw_orders(4, 24)
    a, b = orders[7], orders[18]
    inversions = sum(
        (list(a).index(i) < list(a).index(j)) != (list(b).index(i) < list(b).index(j))
        for i, j in itertools.combinations(range(4), 2)
    )
    assert kendall_distance(a, b) == inversions
