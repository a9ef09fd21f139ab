# SPDX-License-Identifier: Apache-2.0
"""What controlled experiments read of a learnt order."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any

import numpy as np
import pytest

from affect.models.monet import reading

NATURAL = ["a", "b", "c", "d"]


def results(*orders: tuple[str, float]) -> dict[str, Any]:
    told = [{"order": list(order), "weight": weight} for order, weight in orders]
    return {"findings": {"order": {"orders": told, "outputs": NATURAL}}}


@pytest.mark.parametrize(
    ("order", "selected", "pairs"), [("abcd", 1, 1), ("bcda", 0, 1), ("dcba", 0, 0), ("cbad", 0, 2 / 3)]
)
def test_the_most_probable_order_is_read(order: str, selected: float, pairs: float) -> None:
    found = results((order, 0.5), ("acbd", 0.3), ("abdc", 0.2))
    assert reading.natural_selected(found) == selected
    assert reading.later_pairs_in_order(found) == pytest.approx(pairs)


def test_a_mixture_that_prefers_no_order_has_selected_none() -> None:
    """A uniform mixture lists the natural order first, by chance of sorting."""
    found = results(("abcd", 0.25), ("dcba", 0.25))
    assert reading.favourite(found) is None
    assert reading.natural_selected(found) is None
    assert reading.later_pairs_in_order(found) is None
    assert reading.natural_weight(found) == 0.25


def test_the_natural_order_has_no_weight_where_it_is_not_listed() -> None:
    assert reading.natural_weight(results(("bacd", 0.6), ("abcd", 0.4))) == 0.4
    assert reading.natural_weight(results(("bacd", 0.6), ("dcba", 0.4))) == 0


@pytest.mark.parametrize(
    ("soft_order", "distance"),
    [(np.eye(4), 0), (np.eye(4)[[1, 0, 2, 3]], 2), (np.eye(4)[::-1], 8**0.5), (np.full((4, 4), 0.25), 3**0.5)],
)
def test_distance_is_that_of_matrices(soft_order: np.ndarray, distance: float) -> None:
    """One exchange of two tasks is at 2, the reversed order at the largest distance, the centre in between."""
    found = {"findings": {"order": {"soft_order": soft_order.tolist()}}}
    assert reading.distance_to_natural(found) == pytest.approx(distance)


@pytest.mark.parametrize(
    "read",
    [
        reading.favourite,
        reading.natural_selected,
        reading.natural_weight,
        reading.natural_rank,
        reading.distance_to_natural,
        reading.later_pairs_in_order,
    ],
)
def test_models_without_an_order_have_none(read: Callable[[Mapping[str, Any]], object]) -> None:
    assert read({"findings": {}}) is None
