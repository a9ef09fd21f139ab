# SPDX-License-Identifier: Apache-2.0
from __future__ import annotations

import math
import warnings

import numpy as np
import pytest
import torch
from sklearn.metrics import accuracy_score, balanced_accuracy_score, confusion_matrix, f1_score

from affect.metrics import Classification
from affect.metrics import confusion_matrix as our_confusion_matrix
from tests.metrics.contract import MetricContract, numbers

CLASSES = ("neutral", "happiness", "sadness", "contempt")


class TestClassification(MetricContract):
    outputs = CLASSES

    def make(self):
        return Classification()

    def draw(self, generator):
        classes = torch.multinomial(torch.tensor([0.5, 0.3, 0.2]), self.samples, True, generator=generator)
        target = torch.nn.functional.one_hot(classes, 4).double()  # contempt is possible but never occurs
        values = (target + torch.randn(self.samples, 4, generator=generator)).softmax(1).double()
        labelled = torch.rand(self.samples, 1, generator=generator) < 0.7
        return values, target, labelled.expand(-1, 4).clone()

    def test_agrees_with_the_reference(self, data):
        values, target, mask = data
        rows = mask.any(1)
        predicted, actual = values[rows].argmax(1).numpy(), target[rows].argmax(1).numpy()
        found = numbers(self.bound().score(*data))
        every = {"labels": range(4), "zero_division": 0}
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # scikit-learn remarks that contempt is predicted but never true
            recall = balanced_accuracy_score(actual, predicted)
        expected = {
            "accuracy": accuracy_score(actual, predicted),
            "mean_class_accuracy": recall,
            "macro_f1": f1_score(actual, predicted, average="macro", **every),
        }
        each = f1_score(actual, predicted, average=None, **every)
        expected |= {f"f1/{name}": number for name, number in zip(CLASSES, each, strict=True)}
        assert found == pytest.approx(expected)
        matrix = our_confusion_matrix(values, target, mask)
        assert np.array_equal(matrix.numpy(), confusion_matrix(actual, predicted, labels=range(4)))

    def constant_candidates(self, target):
        return list(torch.eye(4))

    def test_an_output_without_labels_is_left_out(self, data):
        """A class that no row's source can label takes no part; a class that merely does not occur counts 0."""
        values, target, mask = data
        mask = mask.clone()
        mask[:, 3] = False
        found = numbers(self.bound().score(values, target, mask))
        smaller = Classification()
        smaller.bind(CLASSES[:3])
        complete = numbers(smaller.score(values[:, :3], target[:, :3], mask[:, :3]))
        assert math.isnan(found.pop("f1/contempt"))
        assert found == pytest.approx(complete)
        constant = numbers(self.bound().constants(target, mask))
        assert math.isnan(constant.pop("f1/contempt"))
        assert constant == pytest.approx(numbers(smaller.constants(target[:, :3], mask[:, :3])))


def test_soft_labels_and_ties_take_the_first_largest():
    metric = Classification()
    metric.bind(["a", "b", "c"])
    values = torch.tensor([[0.2, 0.4, 0.4], [0.1, 0.1, 0.8]])
    target = torch.tensor([[0.1, 0.45, 0.45], [0.5, 0.5, 0.0]])
    found = metric.score(values, target, torch.ones(2, 3) > 0)
    assert found["accuracy"] == 0.5
    assert found["f1/b"] == 1


def test_macro_f1_counts_a_class_that_occurs_nowhere():
    metric = Classification()
    metric.bind(["a", "b", "never"])
    target = torch.eye(3)[[0, 1, 0, 1]]
    found = metric.score(target, target, torch.ones(4, 3) > 0)
    assert found["macro_f1"].item() == pytest.approx(2 / 3)
    assert found["mean_class_accuracy"] == 1
