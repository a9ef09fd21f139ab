# SPDX-License-Identifier: Apache-2.0
"""The attribution sheet: the face as it was, and beside it the same face with evidence where the map has it."""

from __future__ import annotations

import numpy as np
import pytest

from affect.errors import DataError
from affect.report.figures import attribution_sheet


def drawn(figure) -> list[np.ndarray]:
    """Return the pictures of a sheet."""
    (axes,) = figure.axes
    return [np.asarray(image.get_array()) for image in axes.get_images()]


def test_evidence_lies_where_the_map_has_it_and_the_face_is_left_alone():
    face = np.full((40, 40, 3), 200, np.uint8)
    maps = np.full((2, 4, 4), -1.0)  # evidence against the score is not drawn
    maps[0, 0, 0] = 5.0
    shown = drawn(attribution_sheet(np.stack([face, face]), maps, ["a", "b"]))[0]
    half = shown.shape[1] // 2
    left, right = shown[:, :half].astype(int), shown[:, half:].astype(int)
    assert np.ptp(left) == 0
    corner, rest = right[: len(right) // 8, : half // 8], right[len(right) // 2 :, half // 2 :]
    assert np.ptp(corner.mean((0, 1))) > 20  # coloured
    assert np.ptp(rest) <= 1  # grey as it was


def test_captions_and_points_stand_with_their_faces():
    points = np.full((1, 2, 2), 10.0)
    figure = attribution_sheet(np.zeros((1, 20, 20, 3), np.uint8), np.ones((1, 2, 2)), ["fear"], points, title="Here")
    texts = [text.get_text() for text in figure.axes[0].texts]
    assert "fear" in texts
    assert "Here" in texts


def test_maps_of_another_shape_are_refused():
    faces = np.zeros((2, 8, 8, 3), np.uint8)
    with pytest.raises(DataError, match=r"attribution of shape \(1, 2, 2\) for 2 faces"):
        attribution_sheet(faces, np.ones((1, 2, 2)), ["a", "b"])
    with pytest.raises(DataError, match="not finite"):
        attribution_sheet(faces, np.full((2, 2, 2), np.nan), ["a", "b"])
