# SPDX-License-Identifier: Apache-2.0
"""Metrics that take masks: pure functions and thin classes, their intervals, and the records of a result file."""

from affect.metrics.agreement import CCC, ICC, PCC, SAGR
from affect.metrics.alignment import AlignmentError
from affect.metrics.auc import AUC
from affect.metrics.base import AdditiveMetric, Metric
from affect.metrics.bootstrap import bootstrap
from affect.metrics.classification import Classification, confusion_matrix
from affect.metrics.evaluate import evaluate
from affect.metrics.f1 import F1
from affect.metrics.pose import PoseMAE
from affect.metrics.rates import BinaryRates
from affect.metrics.regression import MAE, RMSE
from affect.metrics.sums import Answers, evaluate_sums
from affect.metrics.thresholds import best_thresholds

__all__ = [
    "AUC",
    "CCC",
    "F1",
    "ICC",
    "MAE",
    "PCC",
    "RMSE",
    "SAGR",
    "AdditiveMetric",
    "AlignmentError",
    "Answers",
    "BinaryRates",
    "Classification",
    "Metric",
    "PoseMAE",
    "best_thresholds",
    "bootstrap",
    "confusion_matrix",
    "evaluate",
    "evaluate_sums",
]
