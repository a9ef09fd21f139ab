# SPDX-License-Identifier: Apache-2.0
"""Quantization that is trained with: weights of few levels, captured encoders, and what export makes of them."""

from affect.quantization.captured import Captured
from affect.quantization.plan import Quantization, finished, latent_state
from affect.quantization.weights import WeightQuantizer, binary, straight_through, ternary, uniform

__all__ = [
    "Captured",
    "Quantization",
    "WeightQuantizer",
    "binary",
    "finished",
    "latent_state",
    "straight_through",
    "ternary",
    "uniform",
]
