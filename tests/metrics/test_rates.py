# SPDX-License-Identifier: Apache-2.0
from __future__ import annotations

import torch
from sklearn.metrics import accuracy_score, balanced_accuracy_score, precision_score, recall_score

from affect.metrics import BinaryRates
from affect.metrics.rates import QUANTITIES
from tests.metrics.contract import BinaryContract


class TestBinaryRates(BinaryContract):
    mean_of = QUANTITIES

    def make(self):
        return BinaryRates()

    def reference(self, values, target):
        predicted = values >= 0.5
        return {
            "precision": precision_score(target, predicted),
            "recall": recall_score(target, predicted),
            "accuracy": accuracy_score(target, predicted),
            "balanced_accuracy": balanced_accuracy_score(target, predicted),
        }


def test_degenerate_outputs():
    """Columns: no positives and no predictions; no positives but a prediction; only positives, one of two found."""
    metric = BinaryRates()
    metric.bind(["none", "false", "all"])
    values = torch.tensor([[0.0, 1.0, 1.0], [0.0, 0.0, 0.0]])
    target = torch.tensor([[0.0, 0.0, 1.0], [0.0, 0.0, 1.0]])
    found = metric.score(values, target, torch.ones(2, 3) > 0)
    rows = {quantity: [float(found[f"{quantity}/{name}"]) for name in metric.outputs] for quantity in QUANTITIES}
    assert rows == {
        "precision": [0, 0, 1],
        "recall": [0, 0, 0.5],
        "accuracy": [1, 0.5, 0.5],
        "balanced_accuracy": [1, 0.5, 0.5],  # of the only class that occurs, as scikit-learn has it
    }
    constant = metric.constants(target, torch.ones(2, 3) > 0)
    rows = {quantity: [float(constant[f"{quantity}/{name}"]) for name in metric.outputs] for quantity in QUANTITIES}
    assert rows == {
        "precision": [0, 0, 1],
        "recall": [0, 0, 1],
        "accuracy": [1, 1, 1],
        "balanced_accuracy": [1, 1, 1],
    }
