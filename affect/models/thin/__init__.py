# SPDX-License-Identifier: Apache-2.0
"""THIN: throwable information networks (arXiv 2010.07614)."""

from affect.models.thin.loss import Dispelling
from affect.models.thin.module import Exogenous, Thin
from affect.models.thin.network import ExogenousHead, ExogenousStream, Experts

__all__ = ["Dispelling", "Exogenous", "ExogenousHead", "ExogenousStream", "Experts", "Thin"]
