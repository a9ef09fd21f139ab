# SPDX-License-Identifier: Apache-2.0
"""What can be predicted from a face, and the one contract that tables, models, losses and metrics share."""

from affect.tasks.base import Columns, Encoded, TargetTransform, Task
from affect.tasks.category import Category
from affect.tasks.kinds import (
    Attributes,
    AUIntensity,
    AUOccurrence,
    Coefficients,
    Expression,
    HeadPose,
    Landmarks,
    ValenceArousal,
    to_fractions,
    to_pixels,
)
from affect.tasks.targets import RobinHood, UniformSmoothing

__all__ = [
    "AUIntensity",
    "AUOccurrence",
    "Attributes",
    "Category",
    "Coefficients",
    "Columns",
    "Encoded",
    "Expression",
    "HeadPose",
    "Landmarks",
    "RobinHood",
    "TargetTransform",
    "Task",
    "UniformSmoothing",
    "ValenceArousal",
    "to_fractions",
    "to_pixels",
]
