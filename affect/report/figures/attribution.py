# SPDX-License-Identifier: Apache-2.0
"""Where a network's evidence lies, beside the face that it was shown."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
from matplotlib.figure import Figure

from affect.errors import DataError
from affect.report.figures import style
from affect.report.figures.findings import overlay
from affect.report.figures.sheets import sample_sheet


def attribution_sheet(
    images: np.ndarray,
    maps: np.ndarray,
    captions: Sequence[str],
    points: np.ndarray | None = None,
    *,
    title: str | None = "Faces, and where the evidence lies",
) -> Figure:
    """Return faces with their attribution beside them, drawn over the same face.

    Only evidence for the score is drawn, brighter where there is more; each map is scaled to its own largest value.

    Args:
        images: RGB uint8 faces ``(B, H, W, 3)``.
        maps: Attribution ``(B, h, w)``, of any sign and scale.
        captions: One text per face.
        points: Landmarks ``(B, P, 2)`` in pixels of the face, drawn on the face itself; NaN points are left out.
        title: Heading.

    Raises:
        DataError: If there is not one finite map per face.
    """
    maps = np.asarray(maps, float)
    if maps.ndim != 3 or len(maps) != len(images):
        raise DataError(f"attribution of shape {maps.shape} for {len(images)} faces; expected (B, h, w)")
    if not np.isfinite(maps).all():
        raise DataError("attribution holds values that are not finite")
    pairs = []
    for image, evidence in zip(images, maps, strict=True):
        face = style.as_rgb(image)
        pairs.append(np.concatenate([face, overlay(face, evidence.clip(0))], 1))
    return sample_sheet(pairs, captions, points, title, columns=min(4, max(1, len(pairs))), lines=2)
