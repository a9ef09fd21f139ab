# SPDX-License-Identifier: Apache-2.0
"""Pictures: deterministic, in register with their points, and different where parameters differ."""

from __future__ import annotations

from dataclasses import replace

import cv2
import numpy as np
import pytest

from affect import labels
from affect.data.faces.dials import ACTION_UNITS, FaceDials
from affect.data.faces.geometry3d import coefficients, face_model
from affect.data.faces.render import _shape, _view, render
from affect.data.faces.sample import Parameters, points_of, sample

PLAIN = FaceDials(
    image_size=96, occluder=0, glasses=0, beard=0, noise=0, blur=0, light=0, background="plain", gaze=0, shift=0
)
FRONT = replace(PLAIN, pitch=(0, 0), yaw=(0, 0), roll=(0, 0))


def row_of(parameters: Parameters, k: int = 0) -> Parameters:
    return {key: values[k] for key, values in parameters.items()}


def shown(dials: FaceDials, units: dict[int, float], index: int = 0) -> tuple[np.ndarray, np.ndarray]:
    """Return the picture of a person with the given action units and its 68 points."""
    parameters = sample(dials, 11, np.array([index]))
    intensity = np.zeros((1, 18), np.float32)
    for au, value in units.items():
        intensity[0, ACTION_UNITS.index(au)] = value
    parameters["intensity"], parameters["side"] = intensity, np.zeros_like(intensity)
    parameters["skin"] = np.full(1, 0.15)
    parameters["coefficient"] = coefficients(parameters["identity"], intensity, np.zeros(1), np.zeros(1))
    return render(row_of(parameters), dials).astype(int), points_of(parameters, dials.image_size)["68"][0]


@pytest.mark.parametrize("size", [32, 97, 128])
def test_pictures_are_rgb_and_repeatable(size: int) -> None:
    dials = FaceDials(image_size=size, occluder=1.0, glasses=1.0, beard=1.0)
    parameters = sample(dials, 1, np.arange(4))
    first = [render(row_of(parameters, k), dials) for k in range(4)]
    second = [render(row_of(parameters, k), dials) for k in (3, 2, 1, 0)][::-1]
    for a, b in zip(first, second, strict=True):
        assert a.shape == (size, size, 3)
        assert a.dtype == np.uint8
        np.testing.assert_array_equal(a, b)
    assert not np.array_equal(first[0], first[1])


def test_the_rasteriser_draws_where_points_are_projected() -> None:
    """The mesh, coloured with its own projected position, shows that position at every pixel."""
    dials = replace(PLAIN, image_size=200, shift=0.1, yaw=(20, 20), pitch=(-10, -10), roll=(15, 15))
    parameters = sample(dials, 3, np.arange(1))
    row = {key: value[0].item() if value.ndim == 1 else value[0] for key, value in parameters.items()}
    model, size = face_model(), dials.image_size
    shape = _shape(row, model)
    scale = row["zoom"] * size / 22 * row["distance"] / (row["distance"] - shape.camera[:, 2])
    place = np.stack([scale * shape.camera[:, 0], -scale * shape.camera[:, 1]], 1)
    place += (0.5 + np.array([row["shift_x"], row["shift_y"]])) * size - 0.5
    colours = np.ascontiguousarray(np.concatenate([place / size, 0 * place[:, :1]], 1), np.float32)
    canvas, depth = np.zeros((size, size, 3), np.float32), np.full((size, size), 1000, np.float32)
    points, field = _view(shape, row)
    cv2.triangleRasterize(
        points, model.triangles, colours, canvas, depth, np.eye(4, dtype=np.float32), field, 1.0, 1000.0
    )
    y, x = np.nonzero(depth < 999)
    assert len(x) > 5000
    assert abs(np.median(canvas[y, x, 0] * size - x)) < 0.02
    assert abs(np.median(canvas[y, x, 1] * size - y)) < 0.02
    inner = list(labels.MESH_478_TO_68[17:])
    np.testing.assert_allclose(points_of(parameters, size)["68"][0, 17:], place[inner], atol=1e-2)


@pytest.mark.parametrize(
    ("units", "middle", "far"),
    [
        ({12: 5}, slice(48, 68), slice(17, 27)),
        ({1: 5, 2: 5}, slice(17, 27), slice(48, 68)),
        ({26: 5, 25: 5}, slice(55, 60), slice(17, 27)),
    ],
)
def test_action_units_change_the_picture_where_they_act(units: dict[int, float], middle: slice, far: slice) -> None:
    (rest, points), (moved, _) = shown(FRONT, {}), shown(FRONT, units)
    change = np.abs(moved - rest).mean(2)

    def near(rows: slice) -> float:
        x0, y0 = np.floor(points[rows].min(0)).astype(int) - 1
        x1, y1 = np.ceil(points[rows].max(0)).astype(int) + 2
        return float(change[y0:y1, x0:x1].mean())

    assert near(middle) > 6
    assert near(middle) > 4 * near(far)


def test_open_mouths_are_darker_inside_and_closed_eyes_hide_the_white() -> None:
    (rest, _), (opened, points) = shown(FRONT, {}), shown(FRONT, {25: 5, 26: 5})
    x, y = np.round(points[[62, 66]].mean(0)).astype(int)
    assert opened[y, x].sum() < rest[y, x].sum() - 100
    (_, eye), (closed, _) = shown(FRONT, {}), shown(FRONT, {43: 5})
    x0, y0 = np.floor(eye[36:42].min(0)).astype(int)
    x1, y1 = np.ceil(eye[36:42].max(0)).astype(int)
    window = np.s_[y0 : y1 + 1, x0 : x1 + 1]
    assert np.ptp(rest[window].mean(2)) > np.ptp(closed[window].mean(2)) - 40
    assert np.abs(rest[window] - closed[window]).mean() > 10


def test_light_comes_from_its_side() -> None:
    parameters = sample(FRONT, 2, np.arange(1))
    sides = []
    for azimuth in (-70.0, 70.0):
        parameters["light_azimuth"] = np.array([azimuth])
        picture = render(row_of(parameters), FRONT).mean(2)
        sides.append(picture[30:60, 50:66].mean() - picture[30:60, 30:46].mean())
    assert sides[0] < -5
    assert sides[1] > 5


def test_things_in_front_cover_the_face() -> None:
    for kind in (1, 2, 3, 4):
        parameters = sample(FRONT, 4, np.arange(6))
        changed = []
        for k in range(6):
            bare = render(row_of(parameters, k), FRONT).astype(int)
            hidden = dict(parameters)
            hidden["occluder"] = np.full(6, kind)
            changed.append((np.abs(render(row_of(hidden, k), FRONT).astype(int) - bare).max(2) > 15).mean())
        assert 0.01 < np.mean(changed) < 0.4, kind


def test_the_shortcut_reaches_the_pixels() -> None:
    dials = replace(FRONT, background_shortcut=1.0)
    parameters = sample(dials, 6, np.arange(60))
    tones: dict[int, list[float]] = {}
    for k in range(60):
        corner = render(row_of(parameters, k), dials)[:4, :4].reshape(-1, 3).mean(0)
        hue = cv2.cvtColor(np.uint8([[corner]]), cv2.COLOR_RGB2HSV)[0, 0, 0] / 180
        tones.setdefault(int(parameters["expression"][k]), []).append(float(hue))
    for expression, hues in tones.items():
        apart = (np.array(hues) - expression / 8 + 0.5) % 1 - 0.5
        assert np.abs(apart).max() < 0.06
