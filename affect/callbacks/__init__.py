# SPDX-License-Identifier: Apache-2.0
"""Callbacks that act on any model."""

from affect.callbacks.checkpoint import BEST, LAST, AtomicCheckpointIO, BestWeights, LastCheckpoint
from affect.callbacks.ema import EMA
from affect.callbacks.history import History
from affect.callbacks.preemption import Preempted, Preemption, preemptible
from affect.callbacks.qat import QuantizationAwareTraining
from affect.callbacks.seeding import SeedEachStep
from affect.callbacks.stopping import EarlyStopping

__all__ = [
    "BEST",
    "EMA",
    "LAST",
    "AtomicCheckpointIO",
    "BestWeights",
    "EarlyStopping",
    "History",
    "LastCheckpoint",
    "Preempted",
    "Preemption",
    "QuantizationAwareTraining",
    "SeedEachStep",
    "preemptible",
]
