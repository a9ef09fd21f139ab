# SPDX-License-Identifier: Apache-2.0
"""Geometry of faces: alignment and crops, detectors and landmark providers; heat maps are in ``heatmaps``."""

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
from affect.geometry.providers import (
    Detection,
    FaceAlignmentFinder,
    FaceApiDetector,
    FaceApiFinder,
    FaceApiLandmarks,
    FaceDetector,
    FaceFinder,
    FaceObservation,
    LandmarkProvider,
    MediapipeFinder,
    Pose,
    TwoStageFinder,
    build_finder,
)

__all__ = [
    "CropRecipe",
    "Detection",
    "FaceAlignmentFinder",
    "FaceApiDetector",
    "FaceApiFinder",
    "FaceApiLandmarks",
    "FaceDetector",
    "FaceFinder",
    "FaceObservation",
    "LandmarkProvider",
    "MediapipeFinder",
    "Pose",
    "TwoStageFinder",
    "build_finder",
    "compose",
    "flip_matrix",
    "invert",
    "mean_shape",
    "scale_of",
    "similarity",
    "transform_points",
    "warp",
]
