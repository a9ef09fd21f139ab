# SPDX-License-Identifier: Apache-2.0
"""What a trained MONET says of the order, as numbers for controlled experiments: functions of ``results.json``.

Each is None for a run of another model, which has no order.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import numpy as np


def natural_weight(results: Mapping[str, Any]) -> float | None:
    """Return the weight of the natural order in the mixture, 0 if it is not among the ten most probable."""
    found = results["findings"].get("order")
    if found is None:
        return None
    return next((entry["weight"] for entry in found["orders"] if entry["order"] == found["outputs"]), 0.0)


def favourite(results: Mapping[str, Any]) -> list[str] | None:
    """Return the most probable order; None also for a mixture that prefers none, as one that is uniform does not."""
    found = results["findings"].get("order")
    if found is None:
        return None
    first, *others = found["orders"]
    return None if others and others[0]["weight"] >= first["weight"] else first["order"]


def natural_selected(results: Mapping[str, Any]) -> float | None:
    """Return 1 if the natural order is the most probable one, else 0; None where none is."""
    selected = favourite(results)
    return None if selected is None else float(selected == results["findings"]["order"]["outputs"])


def natural_rank(results: Mapping[str, Any]) -> float | None:
    """Return the place of the natural order by its loss on held-out labels: 1 if no other order has a smaller one.

    None too where it is not among the orders whose loss is told.
    """
    found, told = results["findings"].get("order"), results["findings"].get("order_loss")
    if found is None or told is None:
        return None
    loss = next((entry["loss"] for entry in told["orders"] if entry["order"] == found["outputs"]), None)
    return None if loss is None else 1.0 + sum(entry["loss"] < loss for entry in told["orders"])


def distance_to_natural(results: Mapping[str, Any]) -> float | None:
    """Return the Frobenius distance of the soft order from the natural order's permutation matrix."""
    found = results["findings"].get("order")
    if found is None:
        return None
    matrix = np.array(found["soft_order"])
    return float(np.linalg.norm(matrix - np.eye(len(matrix))))


def later_pairs_in_order(results: Mapping[str, Any]) -> float | None:
    """Return the share of pairs among all tasks but the first that the most probable order treats in natural order.

    For the dyadic toy: its first task is solved from the input alone, so its place is free. None where no order is the
    most probable.
    """
    selected = favourite(results)
    if selected is None:
        return None
    place = [selected.index(name) for name in results["findings"]["order"]["outputs"][1:]]
    pairs = [(a, b) for k, a in enumerate(place) for b in place[k + 1 :]]
    return float(np.mean([a < b for a, b in pairs])) if pairs else 1.0
