# SPDX-License-Identifier: Apache-2.0
"""The baseline: one encoder, one linear head per task."""

from affect.models.baseline.module import Baseline
from affect.models.baseline.network import Heads

__all__ = ["Baseline", "Heads"]
