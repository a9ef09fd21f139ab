# SPDX-License-Identifier: Apache-2.0
"""The head: signs of pose, symmetry, and action units that move what their names say."""

from __future__ import annotations

import numpy as np
import pytest

from affect import labels
from affect.data.faces.dials import ACTION_UNITS
from affect.data.faces.geometry3d import (
    IDENTITY,
    Pose,
    coefficient_names,
    coefficients,
    face_model,
    landmarks,
    rotation,
)

SIZE = 200


def still(**changes: float) -> Pose:
    values = {"zoom": 1.0, "distance": 60.0, **changes}
    return Pose(*(np.array([float(values.get(name, 0.0))]) for name in Pose._fields))


def points(
    units: dict[int, float] | None = None,
    pose: Pose | None = None,
    side: float = 0.0,
    identity: np.ndarray | None = None,
    gaze: tuple[float, float] = (0.0, 0.0),
) -> dict[str, np.ndarray]:
    intensity = np.zeros((1, len(ACTION_UNITS)))
    for au, value in (units or {}).items():
        intensity[0, ACTION_UNITS.index(au)] = value
    identity = np.zeros((1, len(IDENTITY))) if identity is None else identity[None]
    pitch, yaw = np.array([gaze[0]]), np.array([gaze[1]])
    vector = coefficients(identity, intensity, np.array([side]), pitch)
    found = landmarks(vector, pose or still(), pitch, yaw, SIZE)
    return {key: value[0] for key, value in found.items()}


def test_the_mesh_is_sound() -> None:
    model = face_model()
    assert model.triangles.min() == 0
    assert model.triangles.max() == len(model.rest) - 1
    assert model.basis.shape == (len(coefficient_names()), len(model.rest), 3)
    assert np.isfinite(model.basis).all()
    assert ((model.texture >= 0) & (model.texture <= 1)).all()
    a, b, c = (model.rest[model.triangles[:, k]] for k in range(3))
    assert (np.linalg.norm(np.cross(b - a, c - a), axis=1) > 0).mean() > 0.99


def test_rotation_has_the_signs_of_the_vocabulary() -> None:
    nose, crown = np.array([0, 0, 1.0]), np.array([0, 1.0, 0])

    def turned(pitch: float = 0, yaw: float = 0, roll: float = 0) -> np.ndarray:
        return rotation(np.array([pitch]), np.array([yaw]), np.array([roll]))[0]

    assert (turned(pitch=20) @ nose)[1] == pytest.approx(-np.sin(np.radians(20)))  # looks down
    assert (turned(yaw=20) @ nose)[0] == pytest.approx(np.sin(np.radians(20)))  # to the image's right
    assert (turned(roll=20) @ crown)[0] == pytest.approx(np.sin(np.radians(20)))  # clockwise
    matrix = turned(10, -30, 25)
    np.testing.assert_allclose(matrix @ matrix.T, np.eye(3), atol=1e-12)
    assert np.linalg.det(matrix) == pytest.approx(1)


def test_pose_moves_the_projected_points() -> None:
    front = points()["68"]
    eyes = front[36:48].mean(0)
    assert front[30, 0] == pytest.approx(eyes[0], abs=0.1)
    assert points(pose=still(yaw=20))["68"][30, 0] > points(pose=still(yaw=20))["68"][36:48, 0].mean() + 5
    down = points(pose=still(pitch=20))["68"]
    assert down[30, 1] - down[36:48, 1].mean() > front[30, 1] - eyes[1] + 5
    tilted = points(pose=still(roll=20))["68"]
    assert tilted[45, 1] > tilted[36, 1] + 10  # the eye on the image's right goes down when tilting clockwise
    moved = points(pose=still(shift_x=0.1, shift_y=-0.05))["68"]
    np.testing.assert_allclose(moved - front, np.broadcast_to([0.1 * SIZE, -0.05 * SIZE], (68, 2)), atol=1e-3)


@pytest.mark.parametrize("scheme", ["68", "98", "5"])
def test_a_symmetric_face_mirrors_into_the_swapped_points(scheme: str) -> None:
    identity = np.linspace(-1.5, 1.5, len(IDENTITY))
    for name in ("crooked_mouth", "crooked_nose"):
        identity[IDENTITY.index(name)] = 0
    found = points({1: 3, 12: 4, 25: 3, 26: 2, 6: 3}, identity=identity)[scheme]
    assert found.shape == (labels.SCHEMES[scheme].points, 2)
    mirrored = found[list(labels.SCHEMES[scheme].swap)] * [-1, 1] + [SIZE - 1, 0]
    np.testing.assert_allclose(found, mirrored, atol=0.35)


def test_schemes_agree_where_they_mark_the_same_places() -> None:
    found = points({12: 3, 25: 4, 26: 3}, pose=still(yaw=15, pitch=-10))
    full, wide, five = found["68"], found["98"], found["5"]
    np.testing.assert_allclose(full[48:68:6], wide[[76, 82, 88, 94]], atol=1e-3)  # every sixth point of the mouth
    np.testing.assert_allclose(full[[36, 39, 42, 45]], wide[[60, 64, 68, 72]], atol=1e-3)
    np.testing.assert_allclose(full[[27, 30, 33]], wide[[51, 54, 57]], atol=1e-3)
    np.testing.assert_allclose(full[[0, 8, 16]], wide[[0, 16, 32]], atol=1e-3)
    for k, members in enumerate(labels.POINTS_68_TO_5):
        np.testing.assert_allclose(five[k], full[list(members)].mean(0), atol=1e-3)
    assert (found["box"][:2] <= full.min(0) + 1e-3).all()
    assert (found["box"][2:] >= full.max(0) - 1e-3).all()


def test_pupils_follow_the_gaze() -> None:
    ahead, aside, low = (points(gaze=gaze)["98"][96:] for gaze in ((0, 0), (0, 15), (15, 0)))
    assert ((aside - ahead)[:, 0] > 2).all()
    assert ((low - ahead)[:, 1] > 2).all()


MOVES = {
    1: lambda p: -p[21, 1] - p[22, 1],
    2: lambda p: -p[17, 1] - p[26, 1],
    4: lambda p: p[21, 1] + p[22, 1] - (p[22, 0] - p[21, 0]),
    5: lambda p: -p[37, 1] - p[44, 1],
    6: lambda p: -p[41, 1] - p[46, 1],
    7: lambda p: -(p[41, 1] - p[37, 1]),
    9: lambda p: -p[31, 1] - p[35, 1],
    10: lambda p: -p[51, 1],
    12: lambda p: p[54, 0] - p[48, 0] - p[48, 1] - p[54, 1],
    14: lambda p: p[54, 0] - p[48, 0],
    15: lambda p: p[48, 1] + p[54, 1] - 2 * p[62, 1],
    17: lambda p: -p[57, 1],
    20: lambda p: p[54, 0] - p[48, 0],
    23: lambda p: p[51, 1] - p[57, 1],
    24: lambda p: p[51, 1] - p[57, 1],
    25: lambda p: p[66, 1] - p[62, 1],
    26: lambda p: p[8, 1],
    43: lambda p: p[37, 1] - p[41, 1],
}
"""What grows in image coordinates when an action unit acts (68 points; y points down)."""


@pytest.mark.parametrize("au", ACTION_UNITS)
def test_action_units_move_what_they_name_monotonically(au: int) -> None:
    values = [float(MOVES[au](points({au: level})["68"])) for level in (0, 1, 2, 3, 4, 5)]
    assert (np.diff(values) > 0.02).all()
    assert values[-1] - values[0] > 1  # a pixel of 200 for 22 cm


def test_closed_eyes_meet_and_sealed_lips_do_not_part() -> None:
    open_eyes, closed = points()["68"], points({43: 5})["68"]
    assert (open_eyes[[41, 46], 1] - open_eyes[[37, 44], 1] > 4).all()
    assert (np.abs(closed[[41, 46], 1] - closed[[37, 44], 1]) < 1.5).all()
    sealed, parted = points({26: 5})["68"], points({26: 5, 25: 5})["68"]
    assert sealed[66, 1] - sealed[62, 1] < 3
    assert parted[66, 1] - parted[62, 1] > 12
    assert sealed[8, 1] > points()["68"][8, 1] + 8


def test_one_sided_displays_leave_the_other_side() -> None:
    rest, right = points()["68"], points({12: 5}, side=1.0)["68"]
    assert np.linalg.norm(right[48] - rest[48]) > 5  # the subject's right is on the image's left
    assert np.linalg.norm(right[54] - rest[54]) < 0.6
