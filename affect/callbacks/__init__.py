# SPDX-License-Identifier: Apache-2.0
"""Callbacks that act on any model."""

from affect.callbacks.checkpoint import BEST, LAST, AtomicCheckpointIO, BestWeights, LastCheckpoint
from affect.callbacks.ema import EMA
from affect.callbacks.history import History
from affect.callbacks.seeding import SeedEachStep

__all__ = [
    "BEST",
    "EMA",
    "LAST",
    "AtomicCheckpointIO",
    "BestWeights",
    "History",
    "LastCheckpoint",
    "SeedEachStep",
]
