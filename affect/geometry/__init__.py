# SPDX-License-Identifier: Apache-2.0
"""Geometry of faces: alignment and crops, heat maps, detectors and landmark providers."""

from affect.geometry.alignment import (
    CropRecipe,
    compose,
    flip_matrix,
    invert,
    mean_shape,
    scale_of,
    similarity,
    transform_points,
    warp,
)

__all__ = [
    "CropRecipe",
    "compose",
    "flip_matrix",
    "invert",
    "mean_shape",
    "scale_of",
    "similarity",
    "transform_points",
    "warp",
]
