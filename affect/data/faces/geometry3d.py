# SPDX-License-Identifier: Apache-2.0
"""The three-dimensional head of the built-in faces: mesh, identity, action units, pose and projection.

The head is linear in a vector of coefficients: vertices = rest + coefficients @ basis. The coefficients are identity
(smooth fields over space), each action unit on either side, and a few products of them (an open jaw shows the teeth
only where the lips part; a lid closes over an eye of any size). Points of a landmark scheme are fixed linear
combinations of vertices, so the labels of many faces come from one small matrix product without any rasterisation,
through exactly the positions that are drawn.

Units: centimetres; x to the image's right, y up, z towards the camera. The face starts from MediaPipe's canonical face
model (``canonical_face.npz``, Apache-2.0, see ``canonical_face.txt``), subdivided once; skull, ears, neck, shoulders,
hair, eyes, teeth and tongue are built around it. The action unit fields follow the descriptions of the Facial Action
Coding System (Ekman, Friesen and Hager, 2002).
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from functools import cache
from importlib.resources import files
from typing import NamedTuple

import numpy as np
from scipy.sparse import coo_matrix, csr_matrix
from scipy.sparse.csgraph import dijkstra

from affect import labels
from affect.data.faces.dials import ACTION_UNITS

# Vertices of the canonical mesh, each from the subject's right (image left) to the left, or clockwise.
UPPER_LID = (246, 161, 160, 159, 158, 157, 173)
LOWER_LID = (7, 163, 144, 145, 153, 154, 155)
EYE_RING = (33, *UPPER_LID, 133, *LOWER_LID[::-1])
INNER_UPPER_LIP = (191, 80, 81, 82, 13)
INNER_LOWER_LIP = (95, 88, 178, 87, 14)
JAW_RIGHT = (127, 234, 93, 132, 58, 172, 136, 150, 149, 176, 148, 152)
OVAL = (
    *(10, 338, 297, 332, 284, 251, 389, 356, 454, 323, 361, 288, 397, 365, 379, 378, 400, 377),
    *(152, 148, 176, 149, 150, 136, 172, 58, 132, 93, 234, 127, 162, 21, 54, 103, 67, 109),
)
WFLW_RIGHT_BROW = (70, 63, 105, 66, 107, 55, 65, 52, 53)
WFLW_RIGHT_EYE = (33, 161, 159, 157, 133, 154, 145, 163)
MOUTH = (61, 40, 37, 0, 267, 270, 291, 321, 314, 17, 84, 91, 78, 81, 13, 311, 308, 402, 14, 178)

EYE_CENTRE = np.array([-3.12, 2.62, 2.40])
EYE_RADIUS = 1.45
IRIS_RADIUS = 0.62
JAW_ANGLE = 0.255
"""Rotation of the jaw at full AU26, radians."""
HEAD_CENTRE = np.array([0.0, 2.0, -2.5])
PIVOT = np.array([0.0, 0.3, 0.5])
NECK_PIVOT = np.array([0.0, -7.0, -4.0])

PARTS = ("face", "skin", "hair", "eye", "teeth", "mouth", "cloth")
"""What a vertex belongs to; the first texture coordinate of a part lies in [index, index + 1] / len(PARTS)."""

IDENTITY = (
    *("width", "height", "depth", "jaw_width", "chin_length", "chin_forward", "cheekbones", "cheek_fullness"),
    *("forehead", "brow_ridge", "nose_length", "nose_width", "nose_bridge", "nose_tip", "nose_up", "eye_size"),
    *("eye_width", "eye_spacing", "eye_tilt", "eye_depth", "mouth_width", "upper_lip", "lower_lip", "mouth_height"),
    *("brow_height", "brow_angle", "temples", "crooked_mouth", "crooked_nose", "philtrum"),
)
"""Names of the identity coefficients, each drawn from a normal distribution (standard deviation 1, cut at 2)."""

PRODUCTS = ("jaw_lips", "lid_follow", "lid_eye_size", "press_gap", "brow_oblique")
"""Coefficients beside identity and action units: see ``coefficients``."""


class Pose(NamedTuple):
    """Where heads are and how the camera sees them; every entry is ``(N,)``.

    Attributes:
        pitch: Degrees, > 0 looks down.
        yaw: Degrees, > 0 turns to the image's right.
        roll: Degrees, > 0 tilts clockwise.
        zoom: Size; at 1 the image's side shows 22 cm at the face's depth.
        shift_x: Offset of the face's centre to the right, fraction of the image's side.
        shift_y: Offset of the face's centre downwards, fraction of the image's side.
        distance: Distance of the camera from the face in centimetres.
    """

    pitch: np.ndarray
    yaw: np.ndarray
    roll: np.ndarray
    zoom: np.ndarray
    shift_x: np.ndarray
    shift_y: np.ndarray
    distance: np.ndarray


@dataclass(frozen=True)
class FaceModel:
    """The constant parts of the head.

    Attributes:
        rest: Positions of all vertices, ``(V, 3)``.
        basis: Displacements per coefficient, ``(C, V, 3)``.
        triangles: Vertex indices, ``(T, 3)`` int32, counter-clockwise seen from outside.
        texture: Texture coordinates per vertex, ``(V, 2)``: the first one carries the part, both lie in [0, 1].
        part: Index into ``PARTS`` per vertex, ``(V,)``.
        rigid: Share of the head's rotation that a vertex follows, ``(V,)``: 1 on the head, 0 on the shoulders.
        occlusion: Ambient light that reaches a vertex at rest, ``(V,)`` in [0, 1].
        eyes: Vertices of the right and of the left eyeball.
        spans: Range of vertices of each named piece of the mesh.
        points: Weights ``(P, F)`` of the F vertices ``point_vertices`` for every point of ``point_names``.
        point_vertices: Vertices that points depend on, ``(F,)``.
        point_slices: Range of rows of ``points`` of each group: ``68``, ``98``, ``outline``.
        normals: Matrix that sums triangle normals at vertices, ``(V, T)``.
        canonical_uv: Texture coordinates of the canonical vertices, ``(468, 2)``, for painting.
        canonical: Positions of the canonical vertices at rest (lips closed), ``(468, 3)``.
        mirror: Mirror image of each canonical vertex, ``(468,)``.
    """

    rest: np.ndarray
    basis: np.ndarray
    triangles: np.ndarray
    texture: np.ndarray
    part: np.ndarray
    rigid: np.ndarray
    occlusion: np.ndarray
    eyes: tuple[np.ndarray, np.ndarray]
    spans: dict[str, slice]
    points: np.ndarray
    point_vertices: np.ndarray
    point_slices: dict[str, slice]
    normals: csr_matrix
    canonical_uv: np.ndarray
    canonical: np.ndarray
    mirror: np.ndarray


def coefficient_names() -> tuple[str, ...]:
    """Return the name of each coefficient in the order of ``FaceModel.basis``."""
    sides = tuple(f"{labels.au_output(au)}_{side}" for side in ("right", "left") for au in ACTION_UNITS)
    return (*IDENTITY, *sides, *PRODUCTS)


def coefficients(identity: np.ndarray, intensity: np.ndarray, side: np.ndarray, gaze_pitch: np.ndarray) -> np.ndarray:
    """Return the coefficients of faces, ``(N, C)`` float32.

    Args:
        identity: Values of ``IDENTITY``, ``(N, I)``.
        intensity: Intensities of ``labels.AU_SETS["faces"]`` in FACS units 0 to 5, ``(N, K)``: what the
            stronger side shows.
        side: Asymmetry, ``(N,)`` or ``(N, K)`` in [-1, 1]: > 0 weakens the subject's left side; at 1 it stays still.
        gaze_pitch: Rotation of the eyes in the head in degrees, ``(N,)``; > 0 looks down, and the lids follow.
    """
    level = np.asarray(intensity, np.float32) / 5
    side = np.asarray(side, np.float32)
    side = np.broadcast_to(side[:, None] if side.ndim == 1 else side, level.shape)
    right = level * (1 - np.clip(-side, 0, 1))
    left = level * (1 - np.clip(side, 0, 1))
    index = {au: k for k, au in enumerate(ACTION_UNITS)}
    closed = level[:, index[43]]
    products = np.stack(
        [
            # Lips that do not part stay together although the jaw drops.
            level[:, index[26]] * np.clip(level[:, index[25]] * 2.5, 0, 1),
            np.asarray(gaze_pitch, np.float32) / 30 * (1 - closed),
            np.asarray(identity, np.float32)[:, IDENTITY.index("eye_size")] * closed,
            # Pressed or tightened lips show less of the gap that parted lips would.
            level[:, index[25]] * np.maximum(level[:, index[24]], 0.6 * level[:, index[23]]),
            # Raised and drawn together at once, the inner brows stand oblique: AU1 holds up what AU4 would lower.
            np.minimum(level[:, index[1]], level[:, index[4]]),
        ],
        1,
    )
    return np.concatenate([np.asarray(identity, np.float32), right, left, products], 1, dtype=np.float32)


# --------------------------------------------------------------------------------------------------- fields


def _gauss(points: np.ndarray, centre: np.ndarray, radius: float | tuple[float, float, float]) -> np.ndarray:
    return np.exp(-0.5 * (((points - np.asarray(centre)) / np.asarray(radius)) ** 2).sum(1))


def _smooth(x: np.ndarray, low: float, high: float) -> np.ndarray:
    t = np.clip((x - low) / (high - low), 0, 1)
    return t * t * (3 - 2 * t)


_Vector = tuple[float, float, float]
_Handle = tuple[int | _Vector, float | _Vector, _Vector]


def _handles(points: np.ndarray, canonical: np.ndarray, handles: list[_Handle]) -> np.ndarray:
    """Return the displacement ``(V, 3)`` of soft handles (vertex or place, radius, displacement), both sides.

    A handle on the subject's right is mirrored. Where handles overlap their weights are normalised, so that a row of
    handles moves as one piece.
    """
    total = np.zeros_like(points)
    weight = np.zeros(len(points))
    for place, radius, move in handles:
        centre = np.array(canonical[place] if isinstance(place, (int, np.integer)) else place, np.float64)
        twins = [(centre, np.array(move))]
        if abs(centre[0]) > 0.05:
            twins.append((centre * [-1, 1, 1], np.array(move) * [-1, 1, 1]))
        for middle, shift in twins:
            w = _gauss(points, middle, radius)
            total += w[:, None] * shift
            weight += w
    return total / np.maximum(weight, 1)[:, None]


def _identity_fields(p: np.ndarray) -> np.ndarray:
    """Return the identity displacements at any places ``(V, 3)``: ``(I, V, 3)`` for one standard deviation each."""
    x, y, z = p.T
    zero = np.zeros_like(x)
    side = np.sign(x) * np.minimum(np.abs(x) / 1.5, 1)
    front = _smooth(z, -3, 3)

    def stack(dx: np.ndarray | float, dy: np.ndarray | float, dz: np.ndarray | float) -> np.ndarray:
        return np.stack([zero + dx, zero + dy, zero + dz], 1)

    def both(centre: tuple[float, float, float], radius: float | tuple[float, float, float]) -> np.ndarray:
        return _gauss(p, np.array(centre), radius) + _gauss(p, np.array(centre) * [-1, 1, 1], radius)

    def at(centre: tuple[float, float, float], radius: float | tuple[float, float, float]) -> np.ndarray:
        return _gauss(p, np.array(centre), radius)

    head = _smooth(y, -16, -9)
    eye = both((-3.15, 2.62, 3.8), (1.5, 0.55, 2))
    lid_up, lid_low = _smooth(y, 2.5, 2.9), 1 - _smooth(y, 2.3, 2.7)
    nose = at((0, 0, 7), (1.9, 2.2, 3))
    mouth = at((0, -4.3, 5), (2.8, 1.5, 3))
    brow = both((-3.4, 4.7, 4.3), (2.4, 0.9, 3))
    lower = 1 - _smooth(y, -7.5, -2)
    fields = {
        "width": stack(0.045 * x * head, 0, 0),
        "height": stack(0, 0.045 * y * head, 0),
        "depth": stack(0, 0, 0.05 * z * head),
        "jaw_width": stack(0.075 * x * lower * head, 0, 0),
        "chin_length": stack(0, -0.42 * (1 - _smooth(y, -8.5, -5)) * front * head, 0),
        "chin_forward": stack(0, 0, 0.4 * at((0, -8, 5), (2.8, 2, 4))),
        "cheekbones": stack(0.28 * side * both((-5.6, 0.4, 2.6), 2.1), 0, 0.3 * both((-4.8, 0.3, 3.2), 1.9)),
        "cheek_fullness": stack(0.4 * side * both((-5.2, -3.6, 2.4), 2.4), 0, 0.3 * both((-4.4, -3.2, 3.2), 2.1)),
        "forehead": stack(0, 0.38 * _smooth(y, 4.8, 9), 0.2 * _smooth(y, 5, 8)),
        "brow_ridge": stack(0, 0, 0.22 * at((0, 4.6, 5), (5, 0.8, 4))),
        "nose_length": stack(0, -0.38 * at((0, -1.1, 6.4), (1.8, 1.4, 3)), 0),
        "nose_width": stack(0.19 * side * both((-1.5, -1.0, 5.4), (1.1, 1.1, 1.6)), 0, 0),
        "nose_bridge": stack(0, 0, 0.3 * at((0, 1.7, 6.2), (1.1, 1.9, 2.5))),
        "nose_tip": stack(0, 0, 0.38 * at((0, -0.7, 7.4), (1.5, 1.2, 2.0))),
        "nose_up": stack(0, 0.26 * at((0, -0.8, 7.5), (1.3, 1.1, 1.6)), 0),
        "eye_size": stack(0, eye * (0.10 * lid_up - 0.05 * lid_low), 0),
        "eye_width": stack(0.08 * both((-4.3, 2.65, 3.3), (0.8, 0.8, 2)) * np.sign(x), 0, 0),
        "eye_spacing": stack(0.14 * side * both((-3.15, 2.8, 3.8), (2.0, 1.8, 3)), 0, 0),
        "eye_tilt": stack(0, 0.14 * both((-4.5, 2.7, 3.2), (0.9, 0.9, 2)) - 0.07 * both((-1.8, 2.6, 3.8), 0.7), 0),
        "eye_depth": stack(0, 0, 0.2 * both((-3.15, 2.62, 3.2), (2.1, 1.5, 3))),
        "mouth_width": stack(0.24 * side * both((-2.2, -4.35, 4.4), (1.2, 1.0, 2)), 0, 0),
        "upper_lip": stack(0, 0.15 * at((0, -3.5, 5.7), (1.9, 0.38, 2)), 0.12 * at((0, -3.7, 5.7), (1.8, 0.5, 2))),
        "lower_lip": stack(0, -0.16 * at((0, -5.1, 5.5), (1.7, 0.42, 2)), 0.13 * at((0, -4.9, 5.5), (1.6, 0.5, 2))),
        "mouth_height": stack(0, 0.24 * mouth, 0),
        "brow_height": stack(0, 0.22 * brow, 0),
        "brow_angle": stack(
            0, 0.20 * both((-4.8, 4.5, 3.7), (1.3, 0.9, 3)) - 0.14 * both((-1.5, 4.6, 5), (1, 0.9, 3)), 0
        ),
        "temples": stack(0.25 * side * both((-6.8, 5.5, 0), (2, 2.2, 3)), 0, 0),
        "crooked_mouth": stack(0.13 * mouth, 0.05 * mouth * np.sign(x) * np.minimum(np.abs(x), 2), 0),
        "crooked_nose": stack(0.12 * nose, 0, 0),
        "philtrum": stack(0, -0.16 * _smooth(-y, 2.2, 3.4) * head, 0),
    }
    return np.stack([fields[name] for name in IDENTITY])


# ----------------------------------------------------------------------------------------------- canonical mesh


def _mirror_of(positions: np.ndarray) -> np.ndarray:
    """Return for each canonical vertex its mirror image."""
    distance = ((positions[:, None] * [-1, 1, 1] - positions[None]) ** 2).sum(2)
    return distance.argmin(1)


def _edges(triangles: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Return the distinct edges ``(E, 2)`` and the edge of each triangle's side, ``(3, T)``."""
    sides = np.sort(np.concatenate([triangles[:, [0, 1]], triangles[:, [1, 2]], triangles[:, [2, 0]]]), 1)
    edges, inverse = np.unique(sides, axis=0, return_inverse=True)
    return edges, inverse.reshape(3, -1)


def _subdivision(count: int, triangles: np.ndarray, keep: float) -> tuple[csr_matrix, np.ndarray]:
    """Return Loop's subdivision as a matrix ``(count + E, count)`` and the new triangles.

    ``keep`` blends between Loop's smoothed old vertices (0) and unmoved ones (1): it preserves fine features.
    """
    edges, side = _edges(triangles)
    used = np.bincount(side.ravel(), minlength=len(edges))
    opposite = np.stack([triangles[:, 2], triangles[:, 0], triangles[:, 1]])
    rows, columns, values = [], [], []

    def put(row: np.ndarray, column: np.ndarray, value: np.ndarray | float) -> None:
        rows.append(row)
        columns.append(column)
        values.append(np.broadcast_to(value, row.shape))

    new = count + np.arange(len(edges))
    inner = used == 2
    for end in (0, 1):
        put(new, edges[:, end], np.where(inner, 3 / 8, 1 / 2))
    flat = side.ravel()
    two = inner[flat]
    put(new[flat[two]], opposite.ravel()[two], 1 / 8)
    border = edges[~inner]
    on_border = np.zeros(count, bool)
    on_border[border.ravel()] = True
    degree = np.bincount(edges.ravel(), minlength=count)
    beta = np.where(degree == 3, 3 / 16, 3 / (8 * np.maximum(degree, 1))) * (1 - keep)
    beta[on_border] = 0
    old = np.arange(count)
    put(old, old, 1 - degree * beta)
    for a, b in ((0, 1), (1, 0)):
        put(edges[:, a], edges[:, b], beta[edges[:, a]])
    put(old[on_border], old[on_border], -(1 - keep) / 4)
    for a, b in ((0, 1), (1, 0)):
        put(border[:, a], border[:, b], (1 - keep) / 8)
    shape = (count + len(edges), count)
    matrix = coo_matrix((np.concatenate(values), (np.concatenate(rows), np.concatenate(columns))), shape=shape).tocsr()
    a, b, c = triangles.T
    ab, bc, ca = side + count
    fine = np.concatenate([np.stack(part, 1) for part in ((a, ab, ca), (ab, b, bc), (ca, bc, c), (ab, bc, ca))])
    return matrix, fine.astype(np.int32)


class _Canonical(NamedTuple):
    positions: np.ndarray  # (468, 3), lips closed
    uv: np.ndarray
    triangles: np.ndarray  # without those inside eyes and mouth
    mirror: np.ndarray
    lower: np.ndarray  # (468,) 1 where skin belongs to the lower lip and jaw, 0 to the upper


def _canonical() -> _Canonical:
    with (files("affect.data.faces") / "canonical_face.npz").open("rb") as file, np.load(file) as data:
        positions = data["positions"].astype(np.float64)
        uv, triangles = data["uv"].astype(np.float64), data["triangles"].astype(np.int64)
    mirror = _mirror_of(positions)
    lips = (78, 308, *INNER_UPPER_LIP, *INNER_LOWER_LIP)
    holes = [set(EYE_RING), {int(mirror[v]) for v in EYE_RING}, {*lips, *(int(mirror[v]) for v in lips)}]
    filled = np.array([any(set(map(int, t)) <= hole for hole in holes) for t in triangles])
    triangles = triangles[~filled]
    # How near a vertex is to the lower lip along the skin, compared with the upper lip.
    edges, _ = _edges(triangles)
    length = np.linalg.norm(positions[edges[:, 0]] - positions[edges[:, 1]], axis=1)
    graph = coo_matrix((length, edges.T), shape=(468, 468)).tocsr()
    reach = [
        dijkstra(graph, directed=False, indices=[*row, *mirror[list(row)]]).min(0)
        for row in (INNER_UPPER_LIP, INNER_LOWER_LIP)
    ]
    gap = reach[0] - reach[1]
    lower = _smooth(gap, -0.6, 0.6)
    lower[(positions[:, 1] > -2.4) | (reach[0] + reach[1] > 15)] *= 0
    # The model's lips stand half a centimetre apart; at rest ours touch.
    seal = np.zeros_like(positions)
    for upper, under in zip(INNER_UPPER_LIP, INNER_LOWER_LIP, strict=True):
        for a, b in {(upper, under), (int(mirror[upper]), int(mirror[under]))}:
            meet = 0.5 * (positions[a] + positions[b])
            seal[a], seal[b] = meet - positions[a], meet - positions[b]
    ring = np.array(
        [*INNER_UPPER_LIP, *mirror[list(INNER_UPPER_LIP)], *INNER_LOWER_LIP, *mirror[list(INNER_LOWER_LIP)]]
    )
    is_lower = lower > 0.5
    weight = np.exp(-0.5 * (((positions[:, None] - positions[None, ring]) / [0.45, 0.75, 1.5]) ** 2).sum(2))
    weight *= is_lower[:, None] == is_lower[None, ring]
    total = weight.sum(1, keepdims=True)
    spread = weight @ seal[ring] / np.maximum(total, 1e-9) * np.minimum(weight.max(1, keepdims=True), 1)
    spread[ring] = seal[ring]
    # The model's brows stand high, and its eyes are narrow.
    brow = np.maximum(
        _gauss(positions, np.array([-3.2, 4.7, 4.4]), (2.6, 0.8, 3)),
        _gauss(positions, np.array([3.2, 4.7, 4.4]), (2.6, 0.8, 3)),
    )
    spread[:, 1] -= 0.26 * brow
    for row, sign in ((UPPER_LID, 0.07), (LOWER_LID, -0.05)):
        index = [*row, *mirror[list(row)]]
        spread[index, 1] += sign * np.clip(1 - ((np.abs(positions[index, 0]) - 3.12) / 1.4) ** 2, 0, 1)
    return _Canonical(positions + spread, uv, triangles, mirror, lower)


# -------------------------------------------------------------------------------------------- action unit fields


def _jaw(p: np.ndarray, angle: float) -> np.ndarray:
    """Return the displacement of a jaw that opens by ``angle`` radians about the joint in front of the ears."""
    return np.stack([0 * p[:, 0], -angle * (p[:, 2] + 3.0), angle * 0.55 * (p[:, 1] - 1.0)], 1)


def _action_fields(c: _Canonical) -> tuple[dict[int, np.ndarray], dict[str, np.ndarray]]:
    """Return the displacement at the canonical vertices of each action unit at intensity 5, and of ``PRODUCTS``."""
    p = c.positions
    x, y, _ = p.T
    lower = c.lower[:, None]
    upper = (1 - c.lower)[:, None]

    def move(*handles: _Handle) -> np.ndarray:
        return _handles(p, p, list(handles))

    def both_sides(row: tuple[int, ...]) -> list[int]:
        return [*row, *(int(c.mirror[v]) for v in row)]

    lid_up, lid_low = both_sides(UPPER_LID), both_sides(LOWER_LID)
    eye_middle = np.abs(x) - 3.12
    arch = np.clip(1 - (eye_middle / 1.55) ** 2, 0, 1)

    def lids(upper_share: float, lower_share: float, spread: float = 0.55) -> np.ndarray:
        """Upper lid goes down and lower lid up by a share of the opening; skin around follows."""
        field = np.zeros_like(p)
        for share, row, other in ((upper_share, lid_up, lid_low), (lower_share, lid_low, lid_up)):
            field[row] = share * (p[other] - p[row])
            # A lid slides over the ball: its distance from the ball's axis stays.
            away = p[row, 1:] - EYE_CENTRE[1:]
            height = away[:, 0] + field[row, 1]
            field[row, 2] = np.sqrt(np.maximum((away**2).sum(1) - height**2, 0)) - away[:, 1]
            field[row, 2] += 0.03 * abs(share) * arch[row]
        crease = both_sides((247, 30, 29, 27, 28, 56, 190))
        field[crease] += 0.5 * upper_share * (p[lid_low] - p[lid_up]) * [1, 1, 0.5]
        fold = both_sides((113, 225, 224, 223, 222, 221, 189))
        field[fold] += 0.18 * upper_share * (p[lid_low] - p[lid_up])
        bag = both_sides((25, 110, 24, 23, 22, 26, 112))
        field[bag] += spread * lower_share * (p[lid_up] - p[lid_low])
        return field

    lip_y = -4.27
    vermilion = _gauss(p, np.array([0, -4.35, 5.2]), (2.4, 1.0, 2.5))[:, None]
    thin = np.concatenate([0 * p[:, :1], (lip_y - y)[:, None], 0 * p[:, :1]], 1) * vermilion
    j_all = _smooth(-y, 2.2, 6.0)[:, None]
    near_mouth = np.exp(-0.5 * ((np.maximum(np.abs(x) - 1.6, 0) / 1.0) ** 2))[:, None]
    region = (y < -2.4)[:, None] & (np.abs(x) < 4.2)[:, None]
    j_open = np.where(
        region, near_mouth * np.maximum(lower, _smooth(-y, 5.6, 7)[:, None]) + (1 - near_mouth) * j_all, j_all
    )
    lips_band = _gauss(p, np.array([0, -4.7, 5.2]), (2.6, 1.0, 3))[:, None]
    j_closed = np.where(region, _smooth(-y, 4.9, 7.4)[:, None] * near_mouth + (1 - near_mouth) * j_all, j_all)
    jaw_sealed = _jaw(p, JAW_ANGLE) * j_closed * 0.8
    jaw_parted = _jaw(p, JAW_ANGLE) * j_open
    # The corners hang between the two lips and move in as the mouth grows tall.
    jaw_parted += move((61, (0.9, 0.8, 1.5), (0.25, -0.55, -0.1))) * (1 - lips_band * 0)

    brow_in = [(107, (1.5, 1.3, 3)), (55, (1.4, 1.1, 3)), (66, (1.2, 1.2, 3)), (65, (1.2, 1.0, 3))]
    brow_out = [
        (70, (1.3, 1.2, 3)),
        (63, (1.2, 1.3, 3)),
        (53, (1.2, 1.0, 3)),
        (46, (1.2, 1.0, 3)),
        (105, (1.1, 1.3, 3)),
    ]

    def rise(rows: Sequence[tuple[int, float | _Vector]], by: _Vector) -> list[_Handle]:
        return [(vertex, radius, by) for vertex, radius in rows]

    part_gap = np.where(c.lower[:, None] > 0.5, [[0, -0.62, -0.12]], [[0, 0.16, 0.03]])
    opening = np.exp(-0.5 * (np.maximum(np.abs(x) - 0.9, 0) / 0.75) ** 2)[:, None]
    part = part_gap * opening * _gauss(p, np.array([0, -4.4, 5.2]), (3.0, 1.0, 3))[:, None]
    part += (lower > 0.5) * move((18, (1.6, 0.9, 2), (0, -0.30, -0.05)))

    fields = {
        1: move(*rise(brow_in, (0.08, 1.08, 0.08)), ((-1.7, 6.4, 4.9), (1.8, 0.9, 3), (0, 0.45, 0))),
        2: move(*rise(brow_out, (-0.05, 0.88, 0.0)), ((-4.6, 6.4, 3.6), (1.8, 0.9, 3), (0, 0.45, 0))),
        4: move(
            *rise(brow_in, (0.48, -0.92, 0.22)),
            *rise([(105, (1.1, 1.1, 3)), (52, (1.1, 1.0, 3))], (0.25, -0.66, 0.05)),
            (9, (0.7, 0.8, 2), (0, -0.45, 0.12)),
        ),
        5: lids(-0.62, -0.10),
        6: move(
            *rise([(50, (1.5, 1.2, 2.5)), (101, (1.3, 1.2, 2.5)), (117, (1.2, 1.0, 2.5))], (0.05, 0.72, 0.32)),
            *rise([(228, (1.1, 0.7, 2)), (230, (1.2, 0.6, 2))], (0.05, 0.50, 0.22)),
            ((-5.4, 2.6, 2.4), (0.9, 0.9, 2), (0.22, 0.08, 0)),
            ((-4.9, 4.2, 3.2), (1.1, 0.8, 2), (0, -0.22, 0)),
        )
        + lids(0.05, 0.17, 0.4),
        7: lids(0.16, 0.32, 0.7),
        9: move(
            *rise([(129, (0.9, 0.9, 1.8)), (198, (0.9, 0.9, 1.6)), (48, (0.7, 0.7, 1.2))], (-0.10, 0.55, 0.10)),
            (6, (0.9, 0.9, 2), (0, -0.18, 0.05)),
            *rise([(55, (1.3, 1.0, 3)), (107, (1.2, 1.0, 3))], (0.28, -0.55, 0.1)),
            ((-2.6, 1.2, 4.2), (1.2, 0.9, 2), (0.25, 0.45, 0.22)),
        )
        + upper * move(*rise([(37, (0.9, 0.8, 2)), (39, (0.9, 0.8, 2))], (-0.02, 0.40, 0.08)))
        + lids(0.08, 0.18),
        10: upper
        * move(
            *rise(
                [(0, (0.8, 0.75, 2)), (37, (0.8, 0.75, 2)), (39, (0.8, 0.8, 2)), (82, 0.7), (81, 0.7)], (0, 0.72, 0.12)
            ),
            (40, (0.8, 0.9, 2), (-0.1, 0.50, 0.05)),
        )
        + move((36, (1.1, 1.2, 2), (0.05, 0.42, 0.25)), (129, (0.7, 0.7, 1.4), (-0.12, 0.25, 0.03))),
        12: move(
            *rise([(v, (1.0, 0.95, 1.8)) for v in (61, 78, 185, 146)], (-1.12, 1.12, -0.62)),
            *rise([(v, (0.8, 0.8, 1.5)) for v in (40, 91, 80, 88)], (-0.60, 0.46, -0.38)),
            *rise([(205, (1.3, 1.3, 2)), (50, (1.4, 1.3, 2))], (-0.24, 0.62, 0.42)),
            ((-3.6, -3.4, 4.1), (0.9, 1.0, 2), (-0.55, 0.62, 0.1)),
            (84, (0.7, 0.7, 1.5), (0, 0.0, -0.20)),
            (37, (0.7, 0.7, 1.5), (0, -0.04, -0.18)),
        ),
        14: move(
            *rise([(v, (0.95, 0.9, 1.6)) for v in (61, 78, 185, 146)], (-0.58, 0.36, -0.50)),
            *rise([(v, (0.7, 0.7, 1.5)) for v in (40, 91)], (-0.26, 0.10, -0.20)),
            ((-3.4, -4.2, 4.0), (0.8, 0.9, 1.5), (-0.02, 0.10, -0.38)),
            ((-4.6, -3.6, 3.4), (1.0, 1.2, 1.5), (-0.1, 0.15, 0.26)),
        ),
        15: move(
            *rise(
                [(v, (1.05, 1.1, 2)) for v in (61, 78, 146, 185)],
                (-0.14, -0.90, -0.08),
            ),
            *rise([(v, (0.8, 1.0, 2)) for v in (91, 40, 80, 88)], (-0.05, -0.42, -0.02)),
            *rise([(v, (0.8, 0.9, 2)) for v in (84, 37, 13)], (0, -0.06, 0.05)),
            ((-3.0, -5.6, 4.0), (0.9, 0.9, 2), (-0.1, -0.40, 0.1)),
        ),
        17: lower
        * move(
            *rise(
                [(17, (1.2, 0.8, 2)), (84, (1.1, 0.8, 2)), (14, (1.1, 0.7, 2)), (18, (1.2, 0.9, 2))], (0, 0.52, 0.30)
            ),
        )
        + upper * move((13, (1.1, 0.6, 2), (0, 0.26, 0.12)), (0, (1.1, 0.6, 2), (0, 0.18, 0.10)))
        + move((199, (1.5, 1.1, 2), (0, 0.55, 0.20)), (200, (1.4, 0.9, 2), (0, 0.55, -0.05))),
        20: move(
            *rise([(61, (1.0, 0.9, 1.8)), (78, (1.0, 0.9, 1.8))], (-1.10, -0.16, -0.55)),
            *rise([(91, (0.9, 0.8, 1.5)), (40, (0.9, 0.8, 1.5))], (-0.60, -0.05, -0.30)),
            ((-4.2, -4.6, 3.4), (1.1, 1.4, 2), (-0.5, -0.1, -0.1)),
        )
        + 0.25 * thin,
        23: 0.62 * thin
        + move((61, (0.9, 0.8, 1.5), (0.36, 0, 0.10)), (91, (0.8, 0.7, 1.5), (0.12, 0, 0.05)))
        + move((0, (1.2, 0.6, 1.5), (0, 0, 0.06)), (17, (1.2, 0.6, 1.5), (0, 0, 0.06))),
        24: 0.55 * thin
        + move(
            *rise(
                [(0, (1.6, 0.6, 1.5)), (17, (1.6, 0.6, 1.5)), (37, (1, 0.6, 1.5)), (84, (1, 0.6, 1.5))], (0, 0, -0.42)
            ),
            (61, (0.8, 0.8, 1.5), (-0.12, -0.06, -0.2)),
            (200, (1.3, 0.7, 1.5), (0, 0.18, 0.22)),
            (164, (1.2, 0.6, 1.5), (0, -0.12, 0.18)),
        ),
        25: part,
        26: jaw_sealed,
        43: lids(0.90, 0.14),
    }
    # The brows pull the fold above the eye with them but not the lid itself.
    above = _smooth(y, 3.0, 4.2)[:, None]
    for au in (1, 2, 4):
        fields[au] *= np.where(y[:, None] > 2.0, 0.06 + 0.94 * above, 1)
    size = _identity_fields(p)[IDENTITY.index("eye_size")]
    near_eye = np.maximum(
        _gauss(p, np.array([-3.12, 2.62, 3.8]), (1.8, 0.8, 2)), _gauss(p, np.array([3.12, 2.62, 3.8]), (1.8, 0.8, 2))
    )
    products = {
        "jaw_lips": jaw_parted - jaw_sealed,
        "lid_follow": lids(0.55, -0.12),
        "lid_eye_size": -size * near_eye[:, None] * 0.9,
        "press_gap": -0.9 * part,
        "brow_oblique": move(*rise(brow_in, (0.05, 0.92, 0))) * np.where(y[:, None] > 2.0, 0.06 + 0.94 * above, 1),
    }
    return fields, products


# --------------------------------------------------------------------------------------------------- the rest


def _grid(rows: int, columns: int, closed: bool) -> np.ndarray:
    """Return the triangles of a grid of vertices ``rows x columns``; ``closed`` joins the last column to the first."""
    r, c = np.meshgrid(np.arange(rows - 1), np.arange(columns if closed else columns - 1), indexing="ij")
    nxt = (c + 1) % columns
    a, b, d, e = r * columns + c, r * columns + nxt, (r + 1) * columns + c, (r + 1) * columns + nxt
    return np.concatenate([np.stack([a, b, d], -1).reshape(-1, 3), np.stack([b, e, d], -1).reshape(-1, 3)])


def _skull(oval: np.ndarray) -> np.ndarray:
    """Return rings ``(R, 36, 3)`` from the face's outline over the skull to the back of the head."""
    start = oval - HEAD_CENTRE
    radius = np.linalg.norm(start, axis=1, keepdims=True)
    direction = start / radius
    back = np.array([0.0, -0.05, -1.0])
    angle = np.arccos(np.clip(direction @ back, -1, 1))[:, None]
    rings = []
    for s in (0.12, 0.24, 0.36, 0.48, 0.6, 0.72, 0.84, 0.94):
        d = (np.sin((1 - s) * angle) * direction + np.sin(s * angle) * back) / np.sin(angle)
        d /= np.linalg.norm(d, axis=1, keepdims=True)
        ellipsoid = 1 / np.sqrt(((d / [7.9, 9.3, 9.6]) ** 2).sum(1, keepdims=True))
        low = _smooth(-d[:, 1:2], 0.1, 0.6)
        blend = _smooth(np.array(s), 0.0, 0.42) * (1 - 0.2 * low)
        rings.append(HEAD_CENTRE + d * (radius * (1 - blend) + ellipsoid * blend))
    return np.stack(rings)


def _ear() -> tuple[np.ndarray, np.ndarray]:
    """Return vertices and triangles of the right ear: a disc with a rim, bent outwards."""
    columns = 16
    t = np.linspace(0, 2 * np.pi, columns, endpoint=False)
    shape_y = np.where(np.sin(t) > 0, 2.9, 3.1) * np.sin(t)
    shape_z = (1.75 - 0.55 * (np.sin(t) < 0) * np.abs(np.sin(t))) * np.cos(t)
    rings = []
    for scale, out in ((1.0, 0.25), (0.97, 1.05), (0.78, 0.85), (0.55, 0.35), (0.2, 0.2)):
        lift = out * (0.55 + 0.45 * -np.cos(t))  # the rear edge stands off the head
        rings.append(np.stack([-7.05 - 1.15 * lift, 1.1 + scale * shape_y, -3.6 + scale * shape_z], 1))
    return np.concatenate(rings), _grid(5, columns, True)


def _normals_of(points: np.ndarray, triangles: np.ndarray) -> np.ndarray:
    a, b, c = points[triangles[:, 0]], points[triangles[:, 1]], points[triangles[:, 2]]
    return np.cross(b - a, c - a)


def _outward(points: np.ndarray, triangles: np.ndarray, inside: np.ndarray) -> np.ndarray:
    """Return the triangles with every normal pointing away from ``inside``."""
    normal = _normals_of(points, triangles)
    middle = points[triangles].mean(1)
    wrong = (normal * (middle - inside)).sum(1) < 0
    fixed = triangles.copy()
    fixed[wrong] = fixed[wrong][:, [0, 2, 1]]
    return fixed


@cache
def face_model() -> FaceModel:
    """Return the head; built once per process (about a quarter of a second)."""
    c = _canonical()
    matrix, fine = _subdivision(468, c.triangles, keep=0.65)
    face = matrix @ c.positions
    au_coarse, product_coarse = _action_fields(c)
    au_face = {au: matrix @ field for au, field in au_coarse.items()}
    product_face = {name: matrix @ field for name, field in product_coarse.items()}

    positions: list[np.ndarray] = []
    triangles: list[np.ndarray] = []
    part: list[np.ndarray] = []
    texture: list[np.ndarray] = []
    occlusion: list[np.ndarray] = []
    spans: dict[str, slice] = {}

    two_sided: list[np.ndarray] = []

    def add(
        name: str,
        points: np.ndarray,
        faces: np.ndarray,
        kind: str,
        uv: np.ndarray,
        light: np.ndarray | float = 1.0,
        sheet: bool = False,
    ) -> slice:
        """Add a piece of the mesh; a ``sheet`` is seen from either side and lit as its first side."""
        two_sided.append(np.concatenate([np.zeros(len(faces), bool), np.ones(len(faces) if sheet else 0, bool)]))
        if sheet:
            faces = np.concatenate([faces, faces[:, [0, 2, 1]]])
        start = sum(len(block) for block in positions)
        positions.append(points)
        triangles.append(faces + start)
        part.append(np.full(len(points), PARTS.index(kind)))
        scaled = np.clip(uv, 0, 1) * [0.98, 1] + [0.01, 0]
        texture.append(np.stack([(PARTS.index(kind) + scaled[:, 0]) / len(PARTS), scaled[:, 1]], 1))
        occlusion.append(np.broadcast_to(light, len(points)))
        spans[name] = slice(start, start + len(points))
        return spans[name]

    add("face", face, fine, "face", matrix @ c.uv)

    # Skull: the first ring repeats the face's outline so that both move together.
    oval = matrix[list(OVAL)] @ c.positions
    rings = np.concatenate([oval[None], _skull(oval)])
    skull = rings.reshape(-1, 3)
    faces = _outward(skull, _grid(len(rings), 36, True), HEAD_CENTRE)
    add(
        "skull",
        skull,
        faces,
        "skin",
        np.zeros((len(skull), 2)),
        0.95 - 0.5 * _smooth(-skull[:, 1], 5, 10) * (skull[:, 2] < 3),
    )

    ear, ear_faces = _ear()
    ear_light = np.repeat([0.8, 1.0, 0.85, 0.6, 0.45], 16)
    for name, sign in (("ear_right", 1), ("ear_left", -1)):
        points = ear * [sign, 1, 1]
        add(
            name,
            points,
            _outward(points, ear_faces, np.array([-4.0 * sign, 1.1, -3.2])),
            "skin",
            np.zeros((80, 2)),
            ear_light,
        )

    # Neck and shoulders.
    t = np.linspace(0, 2 * np.pi, 28, endpoint=False)
    heights = np.array([-5.0, -8.0, -10.5, -13.0, -15.0])
    wide = np.array([4.9, 4.7, 4.7, 5.1, 6.4])
    deep = np.array([4.6, 4.7, 4.8, 5.0, 5.2])
    neck = np.concatenate(
        [
            np.stack([w * np.sin(t), 0 * t + h, -4.2 + d * np.cos(t)], 1)
            for h, w, d in zip(heights, wide, deep, strict=True)
        ]
    )
    shade = np.repeat([0.42, 0.5, 0.68, 0.85, 0.95], 28)
    add(
        "neck",
        neck,
        _outward(neck, _grid(5, 28, True), np.array([0, -10, -4.2])),
        "skin",
        np.zeros((len(neck), 2)),
        shade,
    )
    profile = [
        (-13.6, 6.0, 5.2),
        (-14.6, 8.5, 6.0),
        (-15.6, 13.0, 7.0),
        (-17.0, 18.5, 7.6),
        (-20.0, 21.5, 8.2),
        (-30.0, 23.0, 9.0),
    ]
    cloth = np.concatenate(
        [
            np.stack([w * np.sin(t), 0 * t + h - 1.0 * np.maximum(np.cos(t), 0), -4.6 + d * np.cos(t)], 1)
            for h, w, d in profile
        ]
    )
    cloth_uv = np.stack([np.tile(t / (2 * np.pi), 6), np.repeat(np.linspace(0, 1, 6), 28)], 1)
    add("cloth", cloth, _outward(cloth, _grid(6, 28, True), np.array([0, -24, -4.6])), "cloth", cloth_uv)

    # Hair: a cap over the skull, displaced per hairstyle by the renderer, and a curtain for long hair.
    hair_face = np.stack([oval * (1 - s) + np.array([0, 2.5, 3.5]) * s for s in (0.40, 0.30, 0.2, 0.1)])
    hair_rings = np.concatenate([hair_face, rings])
    hair = hair_rings.reshape(-1, 3)
    hair_uv = np.stack(
        [
            np.tile(np.abs(np.linspace(-1, 1, 36, endpoint=False)), len(hair_rings)),
            np.repeat(np.linspace(0, 1, len(hair_rings)), 36),
        ],
        1,
    )
    hair_faces = _outward(hair, _grid(len(hair_rings), 36, True), HEAD_CENTRE)
    on_jaw = ((hair[:, 1] < -1.5) & (hair[:, 2] > -2.4))[hair_faces].any(1)
    add("hair", hair, hair_faces[~on_jaw], "hair", hair_uv)
    around = np.radians(np.linspace(62, 298, 30))
    drop = np.linspace(0, 1, 9)
    curtain = np.stack(
        [
            np.stack([-8.7 * np.sin(around), 0 * around + 4.5 - 18.5 * s, -2.6 + 8.8 * np.cos(around)], 1)
            * [0.84 + 0.24 * np.sin(np.pi * min(0.62 * s + 0.1, 0.75)), 1, 1]
            for s in drop
        ]
    ).reshape(-1, 3)
    curtain_uv = np.stack([np.tile(np.linspace(0, 1, 30), 9), np.repeat(drop, 30)], 1)
    add(
        "curtain",
        curtain,
        _outward(curtain, _grid(9, 30, False), np.array([0, 0, -2.6])),
        "hair",
        curtain_uv,
        0.85,
        sheet=True,
    )

    # Eyes: front halves of two balls whose pole looks forward; the second coordinate is the angle from the pole.
    polar = np.radians([0.5, 7, 12, 18, 23, 27, 36, 50, 66, 84])
    turn = np.linspace(0, 2 * np.pi, 20, endpoint=False)
    ball = np.stack(
        [
            np.sin(polar)[:, None] * np.cos(turn),
            np.sin(polar)[:, None] * np.sin(turn),
            np.cos(polar)[:, None] + 0 * turn,
        ],
        -1,
    ).reshape(-1, 3)
    eye_uv = np.stack([np.tile(turn / (2 * np.pi), len(polar)), np.repeat(polar / (np.pi / 2), 20)], 1)
    eye_faces = _outward(ball, _grid(len(polar), 20, True), np.zeros(3))
    eyes = []
    for name, sign in (("eye_right", 1), ("eye_left", -1)):
        span = add(name, EYE_CENTRE * [sign, 1, 1] + EYE_RADIUS * ball, eye_faces, "eye", eye_uv)
        eyes.append(np.arange(span.start, span.stop))

    # Sockets: the thickness of the lids, from their edge backwards, so that a wide eye shows no gap beside the ball.
    socket_rings = []
    for name, sign in (("socket_right", 1), ("socket_left", -1)):
        row = [*EYE_RING] if sign == 1 else [int(c.mirror[v]) for v in EYE_RING]
        edge = matrix[row] @ c.positions
        middle = EYE_CENTRE * [sign, 1, 1]
        inside = (edge - middle) * [1.12, 1.25, 1] + middle - [0, 0, 0.9]
        socket = np.concatenate([edge, inside])
        light = np.repeat([0.62, 0.25], len(row))
        faces = _outward(socket, _grid(2, len(row), True), np.add(middle, [0, 0, 0.6]))[:, [0, 2, 1]]
        add(name, socket, faces, "skin", np.zeros((len(socket), 2)), light, sheet=True)
        socket_rings.append(row)

    # Mouth: a bag behind the lips, two rows of teeth and a tongue.
    upper_ring = [78, *INNER_UPPER_LIP, *(int(c.mirror[v]) for v in INNER_UPPER_LIP[-2::-1]), 308]
    lower_ring = [int(c.mirror[v]) for v in INNER_LOWER_LIP[:-1]] + [*INNER_LOWER_LIP[::-1]]
    ring = [*upper_ring, *lower_ring]
    rim = matrix[ring] @ c.positions
    middle = np.array([0, -4.3, 3.0])
    bag = np.concatenate(
        [
            rim,
            rim * [0.98, 1, 1] - [0, 0, 0.5],
            (rim - middle) * [0.85, 1.1, 0] + [0, -4.3, 2.6],
            (rim - middle) * [0.02, 0.02, 0] + [0, -4.3, 1.4],
        ]
    )
    bag[2 * len(ring) : 3 * len(ring), 1] += np.where(np.arange(len(ring)) < len(upper_ring), 0.5, -0.5)
    bag_faces = _outward(bag, _grid(4, len(ring), True), np.array([0, -4.3, 3.4]))[:, [0, 2, 1]]
    bag_light = np.repeat([0.55, 0.35, 0.16, 0.05], len(ring))
    bag_uv = np.stack([np.zeros(len(bag)), np.repeat([0.0, 0.35, 0.7, 1.0], len(ring))], 1)
    add("mouth", bag, bag_faces, "mouth", bag_uv, bag_light, sheet=True)
    across = np.linspace(-2.3, 2.3, 25)
    for name, top, bottom, depth, bright in (
        ("teeth_upper", -3.30, -4.62, 4.66, 0.95),
        ("teeth_lower", -4.72, -5.6, 4.45, 0.62),
    ):
        arc = depth - 0.33 * across**2
        teeth = np.concatenate(
            [
                np.stack([across, 0 * across + h, arc + b], 1)
                for h, b in ((top, -0.1), ((top + bottom) / 2, 0.05), (bottom, 0.0))
            ]
        )
        teeth_uv = np.stack(
            [
                np.tile((across + 2.3) / 4.6, 3),
                np.repeat([0.0, 0.5, 1.0], 25) if top > -4 else np.repeat([1.0, 0.5, 0.0], 25),
            ],
            1,
        )
        add(
            name,
            teeth,
            _outward(teeth, _grid(3, 25, False), np.array([0, teeth[:, 1].mean(), 0])),
            "teeth",
            teeth_uv,
            bright * (1 - 0.45 * np.tile((across / 2.3) ** 2, 3)),
        )
    flat_x, flat_z = np.meshgrid(np.linspace(-1.5, 1.5, 9), np.linspace(1.0, 4.0, 6))
    tongue = np.stack([flat_x, -5.15 - 0.18 * flat_x**2 - 0.12 * (flat_z - 2.5) ** 2, flat_z], -1).reshape(-1, 3)
    add(
        "tongue",
        tongue,
        _outward(tongue, _grid(6, 9, False), np.array([0, -9, 2.5])),
        "mouth",
        np.stack([np.ones(54), np.zeros(54)], 1),
        0.45,
    )

    rest = np.concatenate(positions)
    count = len(rest)
    names = coefficient_names()
    basis = np.zeros((len(names), count, 3))
    # Identity: smooth fields everywhere; eyes move as rigid balls.
    basis[: len(IDENTITY)] = _identity_fields(rest)
    eye_quiet = [IDENTITY.index(name) for name in ("eye_size", "eye_width", "eye_tilt")]
    for index, sign in zip(eyes, (1, -1), strict=True):
        rigid_move = _identity_fields(EYE_CENTRE[None] * [sign, 1, 1] + [[0, 0, EYE_RADIUS]])
        rigid_move[eye_quiet] = 0
        basis[: len(IDENTITY), index] = rigid_move
    # Teeth and mouth bag follow the lips' place, not their shape.
    for name in ("teeth_upper", "teeth_lower", "tongue"):
        for quiet in ("upper_lip", "lower_lip", "crooked_mouth"):
            basis[IDENTITY.index(quiet), spans[name]] = 0
    share_right = 1 / (1 + np.exp(rest[: len(face), 0] / 0.35))
    first = len(IDENTITY)
    outline_rows = np.array(OVAL)
    skull_fade = np.repeat(np.linspace(1, 0, len(rings)) ** 1.5, 36)[:, None]

    def attach(row: int, field: np.ndarray) -> None:
        """Store a face's displacement, and what hangs on the face's borders."""
        basis[row, spans["face"]] = field
        basis[row, spans["skull"]] = np.tile(field[outline_rows], (len(rings), 1)) * skull_fade
        basis[row, spans["mouth"]] = np.concatenate([field[ring], field[ring], field[ring] * 0.8, field[ring] * 0.3])
        for name, edge in zip(("socket_right", "socket_left"), socket_rings, strict=True):
            basis[row, spans[name]] = np.concatenate([field[edge], field[edge]])

    def drop_jaw(row: int, share: float) -> None:
        low = _jaw(rest, JAW_ANGLE) * share
        basis[row, spans["teeth_lower"]] = low[spans["teeth_lower"]]
        basis[row, spans["tongue"]] = low[spans["tongue"]] * 0.95

    for k, au in enumerate(ACTION_UNITS):
        for side, share in enumerate((share_right, 1 - share_right)):
            line = first + side * len(ACTION_UNITS) + k
            attach(line, au_face[au] * share[:, None])
            if au == 26:
                drop_jaw(line, 0.5 * 0.8)
    for k, name in enumerate(PRODUCTS):
        line = first + 2 * len(ACTION_UNITS) + k
        attach(line, product_face[name])
        if name == "jaw_lips":
            drop_jaw(line, 0.2)

    rigid = np.ones(count)
    rigid[spans["neck"]] = np.repeat([0.95, 0.75, 0.5, 0.25, 0.1], 28)
    rigid[spans["cloth"]] = 0.0
    rigid[spans["curtain"]] = np.repeat(np.clip(1.15 - 1.1 * drop, 0, 1), 30)
    all_triangles = np.concatenate(triangles).astype(np.int32)
    lit = np.flatnonzero(~np.concatenate(two_sided))
    corners = all_triangles[lit].T.ravel()
    normals = coo_matrix(
        (np.ones(len(corners), np.float32), (corners, np.tile(lit, 3))), shape=(count, len(all_triangles))
    ).tocsr()
    points, point_vertices, slices = _points(c, matrix, face)
    return FaceModel(
        rest=rest.astype(np.float32),
        basis=basis.astype(np.float32),
        triangles=all_triangles,
        texture=np.concatenate(texture).astype(np.float32),
        part=np.concatenate(part),
        rigid=rigid.astype(np.float32),
        occlusion=np.concatenate(occlusion).astype(np.float32),
        eyes=(eyes[0], eyes[1]),
        spans=spans,
        points=points,
        point_vertices=point_vertices,
        point_slices=slices,
        normals=normals,
        canonical_uv=c.uv,
        canonical=c.positions,
        mirror=c.mirror,
    )


# --------------------------------------------------------------------------------------------------- landmarks


def _points(c: _Canonical, matrix: csr_matrix, face: np.ndarray) -> tuple[np.ndarray, np.ndarray, dict[str, slice]]:
    """Return weights of the points over the face vertices that they use, those vertices, and the groups' rows."""
    mirror = c.mirror
    jaw = [*JAW_RIGHT, *(int(mirror[v]) for v in JAW_RIGHT[-2::-1])]
    step = np.linalg.norm(np.diff(face[jaw], axis=0), axis=1)
    along = np.concatenate([[0], np.cumsum(step)])
    right_jaw = along / along[-1]

    def resampled(count: int) -> np.ndarray:
        weights = np.zeros((count, len(face)))
        for row, place in enumerate(np.linspace(0, 1, count)):
            k = min(int(np.searchsorted(right_jaw, place, side="right")) - 1, len(jaw) - 2)
            share = (place - right_jaw[k]) / (right_jaw[k + 1] - right_jaw[k])
            weights[row, jaw[k]] += 1 - share
            weights[row, jaw[k + 1]] += share
        return weights

    def picked(rows: list[int]) -> np.ndarray:
        return np.eye(len(face))[rows]

    def other(rows: list[int]) -> list[int]:
        return [int(mirror[v]) for v in rows]

    inner = list(labels.MESH_478_TO_68[17:])
    brow = list(WFLW_RIGHT_BROW)
    brow_left = other([*brow[4::-1], *brow[:4:-1]])
    eye = list(WFLW_RIGHT_EYE)
    eye_left = other([eye[4], eye[3], eye[2], eye[1], eye[0], eye[7], eye[6], eye[5]])
    nose = [168, 197, 5, 4, 98, 97, 2, 326, 327]
    groups = {
        "68": np.concatenate([resampled(17), picked(inner)]),
        "98": np.concatenate([resampled(33), picked([*brow, *brow_left, *nose, *eye, *eye_left, *MOUTH])]),
        "outline": picked(list(OVAL)),
    }
    start, slices = 0, {}
    for name, rows in groups.items():
        slices[name] = slice(start, start + len(rows))
        start += len(rows)
    weights = np.concatenate(list(groups.values()))
    used = np.flatnonzero(np.abs(weights).sum(0) > 0)
    return weights[:, used].astype(np.float32), used, slices


def rotation(pitch: np.ndarray, yaw: np.ndarray, roll: np.ndarray) -> np.ndarray:
    """Return rotation matrices ``(N, 3, 3)`` of angles in degrees: first pitch, then yaw, then roll."""
    p, y, r = (np.radians(np.asarray(angle, np.float64)) for angle in (pitch, yaw, roll))
    one, nil = np.ones_like(p), np.zeros_like(p)
    cp, sp, cy, sy, cr, sr = np.cos(p), np.sin(p), np.cos(y), np.sin(y), np.cos(r), np.sin(r)
    about_x = np.stack([one, nil, nil, nil, cp, -sp, nil, sp, cp], -1).reshape(-1, 3, 3)
    about_y = np.stack([cy, nil, sy, nil, one, nil, -sy, nil, cy], -1).reshape(-1, 3, 3)
    about_z = np.stack([cr, sr, nil, -sr, cr, nil, nil, nil, one], -1).reshape(-1, 3, 3)
    return about_z @ about_y @ about_x


def gaze_direction(gaze_pitch: np.ndarray, gaze_yaw: np.ndarray) -> np.ndarray:
    """Return the eyes' axes in the head, ``(N, 3)``, of their rotation in degrees (signs as for the head)."""
    return rotation(gaze_pitch, gaze_yaw, np.zeros_like(np.asarray(gaze_pitch, np.float64)))[:, :, 2]


def _project(x: np.ndarray, y: np.ndarray, z: np.ndarray, pose: Pose, image_size: int) -> tuple[np.ndarray, np.ndarray]:
    """Return the pixel columns and rows, each ``(N, P)``, of points given by coordinate, each ``(N, P)``."""
    r = rotation(*pose[:3]).astype(np.float32)[..., None]
    x, y, z = (axis - np.float32(origin) for axis, origin in zip((x, y, z), PIVOT, strict=True))
    depth = pose.distance.astype(np.float32)[:, None] - (r[:, 2, 0] * x + r[:, 2, 1] * y + r[:, 2, 2] * z)
    factor = (pose.zoom * image_size / 22.0 * pose.distance).astype(np.float32)[:, None] / depth
    column = factor * (r[:, 0, 0] * x + r[:, 0, 1] * y + r[:, 0, 2] * z)
    row = factor * (r[:, 1, 0] * x + r[:, 1, 1] * y + r[:, 1, 2] * z)
    column += ((0.5 + pose.shift_x) * image_size - 0.5).astype(np.float32)[:, None]
    np.subtract(((0.5 + pose.shift_y) * image_size - 0.5).astype(np.float32)[:, None], row, out=row)
    return column, row


def project(points: np.ndarray, pose: Pose, image_size: int) -> np.ndarray:
    """Return pixels ``(N, P, 2)`` (first pixel centre at 0) of points ``(N, P, 3)`` in the head's coordinates."""
    return np.stack(_project(points[..., 0], points[..., 1], points[..., 2], pose, image_size), -1)


def landmarks(
    coefficient: np.ndarray, pose: Pose, gaze_pitch: np.ndarray, gaze_yaw: np.ndarray, image_size: int
) -> dict[str, np.ndarray]:
    """Return the projected points of faces, vectorised and without drawing.

    Args:
        coefficient: Output of ``coefficients``, ``(N, C)``.
        pose: Pose of each face.
        gaze_pitch: Rotation of the eyes in the head in degrees, ``(N,)``.
        gaze_yaw: The same about the vertical axis, ``(N,)``.
        image_size: Side of the image in pixels.

    Returns:
        ``68`` ``(N, 68, 2)``, ``98`` ``(N, 98, 2)``, ``5`` ``(N, 5, 2)`` in pixels and ``box`` ``(N, 4)`` around the
        outline of the face and all points.
    """
    rest, basis = _point_basis()
    # One plane per coordinate: whole rows are contiguous.
    flat = np.asarray(coefficient, np.float32) @ basis
    flat += rest
    planes = flat.reshape(len(flat), 3, basis.shape[1] // 3)
    planes[:, :, -2:] += EYE_RADIUS * gaze_direction(gaze_pitch, gaze_yaw).astype(np.float32)[:, :, None]
    pixels = _project(planes[:, 0], planes[:, 1], planes[:, 2], pose, image_size)
    slices = face_model().point_slices
    rows68, rows98, outline = slices["68"], slices["98"], slices["outline"]
    full = np.concatenate([np.arange(rows98.start, rows98.stop), [planes.shape[2] - 2, planes.shape[2] - 1]])
    centres = np.zeros((68, 5), np.float32)
    for k, members in enumerate(labels.POINTS_68_TO_5):
        centres[list(members), k] = 1 / len(members)
    corners = [
        reduce(np.stack([reduce(axis[:, outline], 1), reduce(axis[:, rows68], 1)]), 0)
        for reduce in (np.min, np.max)
        for axis in pixels
    ]
    return {
        "68": np.stack([axis[:, rows68] for axis in pixels], -1),
        "98": np.stack([np.take(axis, full, 1) for axis in pixels], -1),
        "5": np.stack([axis[:, rows68] @ centres for axis in pixels], -1),
        "box": np.stack(corners, 1),
    }


@cache
def _point_basis() -> tuple[np.ndarray, np.ndarray]:
    """Return rest ``(3 Q,)`` and basis ``(C, 3 Q)``, by coordinate, of all points and then the two eyes' centres."""
    model = face_model()
    rest = model.points @ model.rest[model.point_vertices]
    basis = np.einsum("pf,cfd->cdp", model.points, model.basis[:, model.point_vertices])
    centres = np.stack([EYE_CENTRE, EYE_CENTRE * [-1, 1, 1]])
    moved = np.stack([model.basis[:, index[0]] for index in model.eyes], 2)
    rest = np.concatenate([rest, centres]).T.astype(np.float32)
    basis = np.concatenate([basis, moved], 2).astype(np.float32)
    return np.ascontiguousarray(rest).ravel(), basis.reshape(len(basis), -1)
