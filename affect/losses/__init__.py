# SPDX-License-Identifier: Apache-2.0
"""Losses that take masks: one file each, a pure function and a thin module around it."""

from affect.losses.asymmetric import Asymmetric
from affect.losses.base import Loss, Terms
from affect.losses.binary_cross_entropy import BinaryCrossEntropy
from affect.losses.combined import Combined
from affect.losses.concordance import Concordance
from affect.losses.cross_entropy import CrossEntropy
from affect.losses.dice import Dice
from affect.losses.regression import MAE, MSE, SmoothL1
from affect.losses.wing import Wing

__all__ = [
    "MAE",
    "MSE",
    "Asymmetric",
    "BinaryCrossEntropy",
    "Combined",
    "Concordance",
    "CrossEntropy",
    "Dice",
    "Loss",
    "SmoothL1",
    "Terms",
    "Wing",
]
