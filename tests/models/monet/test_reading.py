# SPDX-License-Identifier: Apache-2.0
"""What controlled experiments read of a learnt order."""

from __future__ import annotations

from typing import Any

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


def test_models_without_an_order_have_none() -> None:
    for read in (reading.favourite, reading.natural_selected, reading.later_pairs_in_order, reading.natural_weight):
        assert read({"findings": {}}) is None
