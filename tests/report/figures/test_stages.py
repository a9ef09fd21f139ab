# SPDX-License-Identifier: Apache-2.0
"""The sheet of stages: attention lies where the maps have it, points where they are, errors above their stage."""

from __future__ import annotations

import numpy as np
import pytest

from affect.errors import DataError
from affect.report.figures import stage_sheet
from tests.report.figures.artists import all_text, by_gid, outside, overlaps, texts


def sheet(faces=2, stages=3, size=24, **arguments):
    random = np.random.default_rng(0)
    images = np.full((faces, size, size, 3), 120, np.uint8)
    maps = random.random((stages, faces, size, size))
    points = random.random((faces, 5, 2)) * (size - 1)
    return stage_sheet(images, maps, points, points + 1, **arguments), maps, points


def test_a_column_per_stage_and_a_row_per_face_each_with_its_own_attention():
    figure, maps, _ = sheet()
    for row in range(2):
        for stage in range(3):
            (drawn,) = by_gid(figure, f"stage {stage}, face {row}")
            heat = np.asarray(drawn.get_array(), float)
            excess = heat[..., 0] - heat[..., 2]  # the colour map goes from black over red to yellow
            assert np.corrcoef(excess.ravel(), maps[stage, row].ravel())[0, 1] > 0.5
    assert len(by_gid(figure, "face 0")) == len(by_gid(figure, "face 1")) == 1


def test_points_of_first_and_last_stage_and_the_way_between_them():
    figure, _, points = sheet(target=np.full((2, 5, 2), 3.0))
    for row in range(2):
        np.testing.assert_allclose(by_gid(figure, "first")[row].get_offsets(), points[row])
        np.testing.assert_allclose(by_gid(figure, "last")[row].get_offsets(), points[row] + 1)
        np.testing.assert_allclose(by_gid(figure, "true")[row].get_offsets(), 3.0)
        ways = np.stack(by_gid(figure, "ways")[row].get_segments())
        np.testing.assert_allclose(ways, np.stack([points[row], points[row] + 1], 1))


def test_unlabelled_points_are_left_out():
    target = np.full((2, 5, 2), 3.0)
    target[0, 1:] = np.nan
    figure, _, _ = sheet(target=target)
    assert [len(each.get_offsets()) for each in by_gid(figure, "true")] == [1, 5]


def test_errors_stand_above_their_stages():
    figure, _, _ = sheet(errors=[7.5, 6.25, float("nan")], title="Stages of landmarks_68")
    shown = texts(figure)
    assert [t for t in shown if t[:5] in ("point", "stage")] == [
        "points",
        "stage 1, 7.50 %",
        "stage 2, 6.25 %",
        "stage 3",
    ]
    assert "Stages of landmarks_68" in shown
    assert "Orange: points of the first stage. Blue: of the last." in all_text(figure)
    assert not overlaps(figure)
    assert not outside(figure)


def test_nothing_to_show_says_so():
    figure = stage_sheet(
        np.zeros((0, 4, 4, 3), np.uint8), np.zeros((2, 0, 4, 4)), np.zeros((0, 5, 2)), np.zeros((0, 5, 2))
    )
    assert "no faces to show" in all_text(figure)


def test_parts_that_do_not_fit_are_refused():
    images, points = np.zeros((2, 8, 8, 3), np.uint8), np.zeros((2, 5, 2))
    with pytest.raises(DataError, match=r"attention of shape \(3, 1, 8, 8\) for 2 faces"):
        stage_sheet(images, np.zeros((3, 1, 8, 8)), points, points)
    with pytest.raises(DataError, match="not finite"):
        stage_sheet(images, np.full((3, 2, 8, 8), np.nan), points, points)
    with pytest.raises(DataError, match=r"last points \(2, 4, 2\)"):
        stage_sheet(images, np.zeros((3, 2, 8, 8)), points, points[:, :4])
    with pytest.raises(DataError, match=r"points of shape \(1, 5, 2\) for 2 faces"):
        stage_sheet(images, np.zeros((3, 2, 8, 8)), points[:1], points[:1])
    with pytest.raises(DataError, match="2 errors for 3 stages"):
        stage_sheet(images, np.zeros((3, 2, 8, 8)), points, points, errors=[1.0, 2.0])
