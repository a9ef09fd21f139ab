# SPDX-License-Identifier: Apache-2.0
"""A small trained network on photographs of digits, with what transforms get of a model: that of the benchmark."""

from __future__ import annotations

from affect.commands.benchmarks.pruning import DigitsTask as Task
from affect.commands.benchmarks.pruning import digits, kept_by_budget

__all__ = ["Task", "digits", "kept_by_budget"]
