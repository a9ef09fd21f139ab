# SPDX-License-Identifier: Apache-2.0
"""Draws one built-in face: rasterised mesh, painted skin, light, things in front, background and camera.

OpenCV rasterises the mesh twice with a depth buffer, once with texture coordinates and once with the cosines that
light needs; everything else is computed per visible pixel (deferred shading), so that the cost follows the number of
pixels. Skin is painted in the texture space of the canonical face (``paint.py``). Edges are smoothed by drawing at one
and a third times the size.
"""

from __future__ import annotations

import math
from functools import cache
from types import MappingProxyType
from typing import Any, NamedTuple, TypeAlias

import cv2
import numpy as np

from affect.data.faces.dials import ACTION_UNITS, FaceDials
from affect.data.faces.geometry3d import (
    EYE_CENTRE,
    EYE_RADIUS,
    IRIS_RADIUS,
    PARTS,
    PIVOT,
    FaceModel,
    Pose,
    face_model,
    project,
    rotation,
)
from affect.data.faces.paint import BLOTCHES, CHANNELS, TEXELS, atlas
from affect.data.faces.sample import HAIR_STYLES, OCCLUDERS, Parameters, points_of
from affect.errors import ConfigError

_Row: TypeAlias = "dict[str, Any]"
"""One sampled row: plain numbers, and float32 arrays where a parameter has several."""

_HAIR = MappingProxyType(
    {"short": (-2.2, 0.45, 1.0), "medium": (-4.6, 0.9, 1.2), "long": (-8.0, 0.8, 1.0), "bun": (-3.0, 0.4, 0.5)}
)
"""By hairstyle: height of its lower edge behind the ears, least thickness, more with volume (centimetres)."""
_LIPS = (np.array([80, 81, 82, 13, 312, 311, 310]), np.array([88, 178, 87, 14, 317, 402, 318]))
"""Facing vertices of the upper and the lower lip."""
_PART = {name: k for k, name in enumerate(PARTS)}
_AU = {au: k for k, au in enumerate(ACTION_UNITS)}

_SKIN = np.array(
    [[246, 208, 186], [236, 190, 160], [222, 168, 132], [196, 138, 100], [160, 104, 72], [118, 74, 50], [82, 52, 38]],
    np.float32,
)
_EYES = np.array(
    [[66, 40, 22], [96, 62, 34], [120, 98, 52], [96, 118, 84], [92, 128, 150], [110, 146, 178]], np.float32
)

# ------------------------------------------------------------------------------------------------------ shape


class _Shape(NamedTuple):
    camera: np.ndarray  # (V, 3) camera coordinates, viewer at z = distance
    occlusion: np.ndarray  # (V,)
    shown: np.ndarray  # (T,) triangles of the mesh that this hairstyle has


def _turn(pitch: float, yaw: float, roll: float) -> np.ndarray:
    """Return the rotation matrix ``(3, 3)`` of one head or eye."""
    return rotation(np.array([pitch]), np.array([yaw]), np.array([roll]))[0].astype(np.float32)


@cache
def _hair_limits() -> tuple[np.ndarray, np.ndarray]:
    """Return the direction away from the skull of each vertex of the cap ``(432, 3)`` and its ring ``(432,)``."""
    model = face_model()
    hair = model.rest[model.spans["hair"]]
    away = hair - np.array([0, 2.0, -2.5], np.float32)
    away /= np.linalg.norm(away, axis=1, keepdims=True)
    return away.astype(np.float32), np.repeat(np.arange(len(hair) // 36), 36)


@cache
def _shown(cap: bool, curtain: bool, mouth: bool) -> np.ndarray:
    """Return which triangles are there with or without a cap of hair, long hair, and parted lips, ``(T,)``."""
    model = face_model()
    first = model.triangles[:, 0]
    keep = np.ones(len(first), bool)
    inside = ("mouth", "teeth_upper", "teeth_lower", "tongue")
    for name, shown in (("hair", cap), ("curtain", curtain), *((name, mouth) for name in inside)):
        span = model.spans[name]
        if not shown:
            keep &= ~((first >= span.start) & (first < span.stop))
    return keep


def _comb(row: _Row, model: FaceModel, vertices: np.ndarray) -> None:
    """Move the cap of hair, the curtain of long hair and the ears of ``vertices`` to the row's hairstyle."""
    style, volume, waves = HAIR_STYLES[int(row["hair_style"])], row["hair_volume"], row["hair_wave"]
    if style != "bald":
        low, least, more = _HAIR[style]
        span = model.spans["hair"]
        away, ring = _hair_limits()
        x, y, z = model.rest[span].T
        # In front of the ears hair starts at the temples, behind them at the nape.
        front = np.clip((z + 3.9 + 2.2 * np.clip(-(y + 0.5) / 2, 0, 1)) / 1.6, 0, 1)
        edge = low + (5.2 - 1.2 * row["hairline"] - low) * front
        grow = np.clip((y - edge) / 1.5 + 0.25, -0.7, 1)
        top = 0.75 + 0.45 * np.clip(y / 9, 0, 1)
        # A fringe falls onto the forehead; without one the first rings stay below the skin.
        start = np.clip((ring - 1.7 + 2.6 * row["fringe"] - 0.8 * row["hairline"]) / 1.6, -0.6, 1)
        wave = 1 + 0.12 * waves * np.sin(1.7 * x + 1.1 * y + 6 * volume)
        vertices[span, 1] += 0.25 * row["fringe"] * np.sin(2.6 * x + 9 * volume) * (ring < 2)
        vertices[span] += away * ((least + more * volume) * np.minimum(grow, start) * top * wave)[:, None]
    if style == "long":
        vertices[model.spans["curtain"]] *= np.array([0.92 + 0.16 * volume, 1, 1], np.float32)
    for name, sign in (("ear_right", -1), ("ear_left", 1)):
        ear = vertices[model.spans[name]]
        ear[:, 0] += sign * (np.abs(ear[:, 0]) - 7.3) * (row["ear_out"] - 0.4) * 0.8


def _shape(row: _Row, model: FaceModel) -> _Shape:
    """Return where the row's head is and which parts of it are there."""
    flat = row["coefficient"] @ model.basis.reshape(len(model.basis), -1)
    vertices = model.rest + flat.reshape(-1, 3)
    _comb(row, model, vertices)

    # Eyes turn about their centres.
    turn = _turn(row["gaze_pitch"], row["gaze_yaw"], 0)
    occlusion = model.occlusion.copy()
    for index, sign, lid in ((model.eyes[0], 1, 159), (model.eyes[1], -1, 386)):
        centre = (EYE_CENTRE * [sign, 1, 1]).astype(np.float32)
        moved = vertices[index] - model.rest[index]
        turned = (model.rest[index] - centre) @ turn.T + centre
        vertices[index] = turned + moved
        below = vertices[lid, 1] - vertices[index, 1]
        occlusion[index] = 0.42 + 0.58 * np.clip(below / 0.42, 0, 1)

    style = HAIR_STYLES[int(row["hair_style"])]
    parted = bool((vertices[_LIPS[0], 1] - vertices[_LIPS[1], 1]).max() > 0.02)
    head = _turn(row["pitch"], row["yaw"], row["roll"])
    body = _turn(0.25 * row["pitch"], 0.25 * row["yaw"], 0.25 * row["roll"])
    centred = vertices - PIVOT.astype(np.float32)
    camera = centred @ head.T
    loose = np.flatnonzero(model.rigid < 1)
    camera[loose] += (1 - model.rigid[loose])[:, None] * (centred[loose] @ body.T - camera[loose])
    return _Shape(camera, occlusion, _shown(style != "bald", style == "long", parted))


# ------------------------------------------------------------------------------------------------------ shading


class _Light(NamedTuple):
    key: np.ndarray  # (3,) direction towards the key light, camera coordinates
    half: np.ndarray  # (3,) halfway between the key light and the camera
    warm: np.ndarray  # (3,) colour of the key light


def _light(row: _Row) -> _Light:
    azimuth, elevation = np.radians(row["light_azimuth"]), np.radians(row["light_elevation"])
    key = np.array([np.sin(azimuth) * np.cos(elevation), np.sin(elevation), np.cos(azimuth) * np.cos(elevation)])
    half = np.add(key, [0, 0, 1])
    half /= np.linalg.norm(half)
    warm = 1 + row["light_warm"] * np.array([0.10, 0.0, -0.12])
    return _Light(key.astype(np.float32), half.astype(np.float32), warm.astype(np.float32))


def _view(shape: _Shape, row: _Row) -> tuple[np.ndarray, float]:
    """Return the vertices as OpenCV's rasteriser wants them (camera at 0, looking along -z) and the angle of view."""
    distance = row["distance"]
    points = shape.camera.copy()
    points[:, 2] -= distance
    # A principal point off the middle is a shear along the depth.
    span = 22.0 / (row["zoom"] * distance)
    points[:, 0] -= points[:, 2] * span * row["shift_x"]
    points[:, 1] += points[:, 2] * span * row["shift_y"]
    return points, 2 * math.atan(span / 2)


def _rasterise(
    shape: _Shape, model: FaceModel, row: _Row, light: _Light, size: int
) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Return what every pixel sees.

    Returns:
        Texture coordinates and occlusion ``(S, S, 3)``; cosines of the normal with the key light, the halfway
        direction and the vertical ``(S, S, 3)``; the mask of covered pixels ``(S, S)``.
    """
    points, field = _view(shape, row)
    distance = row["distance"]
    # The lids lie on the balls: moved away along the line of sight, a ball shows in the same place but never pierces.
    for eye in model.eyes:
        points[eye] *= 1 + 0.6 / distance
    a, b, c = (np.take(shape.camera, model.triangles[:, k], 0, mode="clip") for k in range(3))
    ab, ac = b - a, c - a
    flat = np.stack(
        [
            ab[:, 1] * ac[:, 2] - ab[:, 2] * ac[:, 1],
            ab[:, 2] * ac[:, 0] - ab[:, 0] * ac[:, 2],
            ab[:, 0] * ac[:, 1] - ab[:, 1] * ac[:, 0],
        ],
        1,
    )
    normal = model.normals @ flat
    normal /= np.maximum(np.sqrt((normal * normal).sum(1, keepdims=True)), 1e-9)
    # Triangles that face away cannot be seen.
    seen = shape.shown & ((flat * (a - np.array([0, 0, distance], np.float32))).sum(1) < 0)
    triangles = np.ascontiguousarray(model.triangles[seen])
    cosines = np.stack([normal @ light.key, normal @ light.half, normal[:, 1]], 1) * 0.5 + 0.5
    first = np.concatenate([model.texture, shape.occlusion[:, None]], 1)
    out = []
    for colours in (first, cosines):
        canvas, depth = np.zeros((size, size, 3), np.float32), np.full((size, size), 1000, np.float32)
        cv2.triangleRasterize(
            *(points, triangles, np.ascontiguousarray(colours, np.float32), canvas, depth),
            *(np.eye(4, dtype=np.float32), field, 1.0, 1000.0),
        )
        out.append(canvas)
    return out[0], out[1], depth < 999


def _palette(table: np.ndarray, place: float) -> np.ndarray:
    x = place * (len(table) - 1)
    k = min(int(x), len(table) - 2)
    return (table[k] + (x - k) * (table[k + 1] - table[k])) / 255


def _colours(row: _Row) -> dict[str, np.ndarray]:
    skin = _palette(_SKIN, float(row["skin"]))
    skin = skin * np.array([1 + 0.03 * (row["skin_red"] - 0.5), 1, 1 - 0.08 * (row["skin_red"] - 0.5)], np.float32)
    dark = float(row["hair_dark"])
    blond, brown, black = np.array([0.80, 0.62, 0.38]), np.array([0.36, 0.22, 0.13]), np.array([0.07, 0.055, 0.05])
    hair = blond + (brown - blond) * min(dark * 2, 1) if dark < 0.5 else brown + (black - brown) * (dark * 2 - 1)
    hair = hair * np.array([1 + 0.25 * (row["hair_red"] > 0.8), 1, 1])
    grey = float(row["hair_grey"])
    hair = hair * (1 - grey) + np.array([0.66, 0.65, 0.64]) * grey
    hue, saturation, value = row["cloth"][0], 0.15 + 0.6 * row["cloth"][1], 0.15 + 0.7 * row["cloth"][2]
    return {"skin": skin.astype(np.float32), "hair": hair.astype(np.float32), "cloth": _hsv(hue, saturation, value)}


def _hsv(hue: float, saturation: float, value: float) -> np.ndarray:
    channel = np.clip(np.abs((np.array([0, 4, 2]) + float(hue) * 6) % 6 - 3) - 1, 0, 1)
    return (float(value) * (1 - float(saturation) * (1 - channel))).astype(np.float32)


def _soft(x: np.ndarray, low: float, high: float) -> np.ndarray:
    t = np.clip((x - low) / (high - low), 0, 1)
    return t * t * (3 - 2 * t)


def _paint_face(
    uv: np.ndarray, row: _Row, colours: dict[str, np.ndarray]
) -> tuple[np.ndarray, np.ndarray, np.ndarray, np.ndarray]:
    """Return the painted skin of pixels of the face with texture coordinates ``uv`` ``(2, P)``.

    Returns:
        Albedo ``(3, P)``; slope of the folds to the right and upwards ``(2, P)``; share of the ambient light ``(P,)``;
        gloss ``(P,)``.
    """
    painted = atlas()
    place = np.clip(uv * TEXELS, 0, TEXELS - 1).astype(np.int32)
    texel = np.take(painted.maps, place[1] * TEXELS + place[0], 0, mode="clip")
    age, oily, red = row["age"], row["oily"], row["lips_red"]
    old = painted.age * max(age - 0.35, 0) * 1.2

    def folds(sign: int) -> np.ndarray:
        """Return the depth of each fold on the subject's right (-1) or left (1) side."""
        level = row["intensity"] / 5 * (1 - np.clip(sign * row["side"], 0, 1))
        return np.minimum(painted.wrinkle_au @ level, 1.3) * (0.7 + 0.45 * age) + old

    # All that is linear in the maps is one product: folds (height, slopes) and the skin's brightness.
    one_sided = bool(np.abs(row["side"]).max() > 0.3)
    mix = np.zeros((7 if one_sided else 4, texel.shape[1]), np.float32)
    start = len(CHANNELS)
    mix[3, start : start + BLOTCHES] = 0.035 * row["blotches"]
    mix[3, CHANNELS.index("tone")] = 0.016
    mix[3, CHANNELS.index("grain")] = 0.018 * (0.6 + 0.6 * age)
    for k in range(3):
        mix[k, start + BLOTCHES + k :: 3] = folds(-1)
        if one_sided:
            mix[4 + k, start + BLOTCHES + k :: 3] = folds(1)
    fold = mix @ texel.T
    if one_sided:
        fold[:3] += np.clip(20 * uv[0] - 9.5, 0, 1) * (fold[4:] - fold[:3])
    value = dict(zip(CHANNELS, np.ascontiguousarray(texel[:, :start].T), strict=True))

    skin = colours["skin"]
    albedo = skin[:, None] * (1 + fold[3])

    def tint(amount: np.ndarray, *colour: float) -> None:
        """Multiply by a colour (its complement to white is given) where ``amount`` is 1."""
        for k, part in enumerate(colour):
            albedo[k] *= 1 - part * amount

    def cover(amount: np.ndarray, colour: np.ndarray) -> None:
        for k in range(3):
            albedo[k] += amount * (float(colour[k]) - albedo[k])

    tint(value["red"] * (0.25 + 0.5 * row["skin_red"]), 0.02, 0.16, 0.14)
    tint(value["socket"] * (0.4 + 0.8 * age), 0.12, 0.15, 0.11)
    if row["freckles"] > 0:
        tint(row["freckles"] * value["freckles"], 0.16, 0.26, 0.32)
    lip = skin * np.array([0.90, 0.64 - 0.12 * red, 0.62 - 0.12 * red], np.float32)
    cover(value["lips"] * (0.7 + 0.25 * red), lip)
    hair = colours["hair"] * 0.75
    if row["beard"] > 0:
        kind = int(row["beard_kind"])
        areas = (value["moustache"], np.maximum(value["moustache"], value["beard"]))
        strength = row["beard"] * (0.95 if kind < 2 else 0.45)
        cover(np.clip(areas[min(kind, 1)] * strength * (0.9 + 0.3 * value["grain"]), 0, 0.95), hair)
    thick = 0.62 + 0.5 * row["brow_thick"]
    cover(0.85 * _soft(-value["brow"], -thick - 0.45, -thick + 0.45), hair * 0.85 + 0.08 * skin)
    tint(np.minimum(value["lash"], 1), 0.85, 0.87, 0.87)
    tint(value["nostril"], 0.80, 0.88, 0.88)
    ambient = (1 - value["shade"]) * (1 - 0.42 * np.clip(fold[0], 0, 1.3))
    gloss = (0.08 + 0.16 * oily) * (1 + 0.8 * value["red"]) + 0.20 * value["lips"]
    fold[2] *= -1
    return albedo, fold[1:3], ambient, gloss


def _paint_eye(uv: np.ndarray, row: _Row) -> np.ndarray:
    """Return the albedo ``(3, P)`` of pixels on the eyeballs; ``uv`` holds the turn and the angle from the pole."""
    r = uv[1] * (90 / float(np.degrees(np.arcsin(IRIS_RADIUS / EYE_RADIUS))))
    iris = _palette(_EYES, row["eye_colour"])
    spokes = 0.85 + 0.15 * np.sin(uv[0] * (2 * np.pi * 23)) * np.sin(uv[0] * (2 * np.pi * 7) + 1)
    shade = spokes * (1.25 - 0.35 * np.clip((r - 0.40) * 4, 0, 1))
    shade *= 1 - 0.65 * _soft(r, 0.80, 1.0)
    shade *= _soft(r, 0.36, 0.46) * 0.96 + 0.04
    outside, red = _soft(r, 0.95, 1.08), _soft(r, 1.7, 3.0)
    white = np.array([0.90, 0.87, 0.85], np.float32)[:, None] - red * np.array([[0.10], [0.20], [0.20]], np.float32)
    coloured = iris[:, None] * shade
    return coloured + outside * (white - coloured)


def _shade(
    first: np.ndarray, cosines: np.ndarray, place: np.ndarray, row: _Row, light: _Light, head: np.ndarray
) -> np.ndarray:
    """Return the lit colours ``(3, P)`` in [0, 1] (square-rooted, near sRGB) of the pixels ``place`` ``(P,)``."""
    maps, colours = atlas(), _colours(row)
    # One row per quantity: whole-row arithmetic is fast.
    data = np.ascontiguousarray(np.take(first.reshape(-1, 3), place, 0, mode="clip").T)
    cosine = np.ascontiguousarray(np.take(cosines.reshape(-1, 3), place, 0, mode="clip").T)
    cosine *= 2
    cosine -= 1
    scaled = data[0] * len(PARTS)
    part = np.minimum(scaled, len(PARTS) - 1).astype(np.int8)
    data[0] = np.clip((scaled - part - 0.01) / 0.98, 0, 1)
    uv, ambient = data[:2], data[2]
    albedo, gloss = np.empty((3, len(place)), np.float32), np.zeros(len(place), np.float32)

    on = {name: np.flatnonzero(part == k) for name, k in _PART.items()}
    k = on["face"]
    albedo[:, k], slope, share, gloss[k] = _paint_face(uv[:, k], row, colours)
    ambient[k] *= share
    # Folds tilt the normal; the cosines change by the tilt's own cosine (first order).
    for axis, direction in ((0, light.key), (1, light.half)):
        cosine[axis, k] += float(direction @ head[:, 0]) * slope[0] + float(direction @ head[:, 1]) * slope[1]
    k = on["skin"]
    albedo[:, k] = (colours["skin"] * np.array([1, 0.985, 0.98], np.float32))[:, None]
    gloss[k] = 0.06
    k = on["hair"]
    across, along = uv[0, k], uv[1, k]
    along = (along * 255 + 8 * row["hair_wave"] * np.sin(across * 30)).astype(np.int32) % 256
    strand = maps.strands[along, (across * 255).astype(np.int32)]
    albedo[:, k] = colours["hair"][:, None] * np.clip(1 + 0.22 * strand, 0.4, 1.7)
    gloss[k] = np.clip(0.20 + 0.16 * strand, 0, 0.6) * (0.4 + float(colours["hair"].mean()))
    k = on["teeth"]
    if len(k):
        gap = 0.86 + 0.14 * np.minimum(np.abs(np.sin(uv[0, k] * np.pi * 9)) * 4, 1)
        gum = _soft(0.22 - uv[1, k], -0.05, 0.05)
        for channel, (tooth, red) in enumerate(((0.92, 0.72), (0.89, 0.38), (0.83, 0.38))):
            albedo[channel, k] = tooth * gap + gum * (red - tooth * gap)
        gloss[k] = 0.25
    albedo[:, on["mouth"]] = np.array([[0.62], [0.26], [0.25]], np.float32)
    k = on["cloth"]
    fabric = 1 + 0.12 * np.sin(uv[0, k] * (2 * np.pi * 40)) * float(row["cloth"][3] > 0.5)
    albedo[:, k] = colours["cloth"][:, None] * fabric
    k = on["eye"]
    albedo[:, k] = _paint_eye(uv[:, k], row)

    share = 0.35 + 0.65 * ambient
    sky = (0.72 + 0.28 * cosine[2]) * ambient
    sky *= row["light_fill"]
    shine = np.clip(cosine[1], 0, 1)
    wet = shine[k]
    for _ in range(4):  # power 16 for skin and hair
        shine *= shine
    shine *= gloss
    shine[k] = 0.85 * wet**110
    shine *= (0.3 + 0.7 * ambient) * (0.55 * row["light_key"] * row["exposure"])
    albedo *= albedo
    # Skin scatters red light farther into the shadow: the light wraps around by a share per colour.
    for channel, wrap in enumerate((0.42, 0.26, 0.20)):
        lit = np.maximum(cosine[0] + wrap, 0)
        lit *= share
        lit *= row["light_key"] * float(light.warm[channel]) / (1 + wrap)
        lit += sky
        lit *= albedo[channel]
        lit *= row["exposure"]
        lit += shine * float(light.warm[channel])
        albedo[channel] = lit
    np.minimum(albedo, 1, out=albedo)
    return np.sqrt(albedo, out=albedo)


# ------------------------------------------------------------------------------------- in front and behind


def _background(row: _Row, size: int) -> np.ndarray:
    """Return what is behind, ``(S, S, 3)`` in [0, 1]: two colours around the row's hue, mixed by its kind."""
    draw = [float(value) for value in row["background_draw"]]
    hue, kind = row["background_hue"], int(row["background"])
    first = _hsv(hue, 0.12 + 0.5 * draw[0], 0.30 + 0.55 * draw[1])
    second = _hsv((hue + 0.10 * (draw[2] - 0.5)) % 1, 0.10 + 0.5 * draw[3], 0.12 + 0.7 * draw[4])
    ramp = np.linspace(0, 1, size, dtype=np.float32)
    tile = atlas().static
    x, y = int(draw[6] * 400), int(draw[7] * 400)
    if kind == 0:
        blend: np.ndarray = np.zeros((size, size), np.float32)
    elif kind == 1:
        angle = draw[5] * 2 * np.pi
        blend = 0.5 + 0.5 * (math.cos(angle) * (2 * ramp[None] - 1) + math.sin(angle) * (2 * ramp[:, None] - 1))
    elif kind == 2:
        # A scene out of focus: blobs of two sizes, and a straight edge as of a wall or a window.
        blend = np.full((size, size), 0.5, np.float32)
        for cells, amount in ((4 + int(draw[5] * 4), 0.30), (11, 0.12)):
            patch = tile[y : y + cells, x : x + cells]
            blend += amount * cv2.resize(patch, (size, size), interpolation=cv2.INTER_CUBIC)
        blend += 0.35 * np.tanh((ramp[None] - draw[8] + 0.2 * (draw[9] - 0.5) * ramp[:, None]) * 14)
    else:
        angle, count = draw[5] * np.pi, 3 + 8 * draw[6]
        across = math.cos(angle) * ramp[None] + math.sin(angle) * ramp[:, None]
        blend = 0.5 + 0.5 * np.tanh(2.5 * np.sin(count * 2 * np.pi * across + 6 * draw[7]))
        if draw[8] > 0.5:
            along = math.cos(angle) * ramp[:, None] - math.sin(angle) * ramp[None]
            blend *= 0.5 + 0.5 * np.tanh(2.5 * np.sin(count * 2 * np.pi * along))
    return first + np.clip(blend, 0, 1)[:, :, None] * (second - first)


def _pixels(places: np.ndarray, row: _Row, size: int) -> np.ndarray:
    pose = Pose(*(np.array([row[name]]) for name in Pose._fields))
    return project(places[None].astype(np.float32), pose, size)[0]


def _fixed(points: np.ndarray) -> np.ndarray:
    return np.round(points * 16).astype(np.int32)


def _draw_glasses(image: np.ndarray, cover: np.ndarray, row: _Row, vertices: dict[int, np.ndarray], size: int) -> None:
    """Draw glasses into ``image`` and ``cover``: rims before the eyes, a bridge and the visible temple."""
    shape = float(row["glasses_shape"])
    power = 2.0 + 2.5 * (shape % 0.5) * 2
    turn = np.linspace(0, 2 * np.pi, 40)
    width = max(1, round(size * (0.007 + 0.008 * ((shape * 7) % 1))))
    frame = tuple(
        float(v) for v in _hsv((shape * 13) % 1, 0.5 * ((shape * 5) % 1), 0.08 + 0.35 * ((shape * 3) % 1) ** 2)
    )
    rims, dark = [], row["glasses"] > 1
    for sign, corner in ((-1, (33, 133)), (1, (263, 362))):
        middle = (vertices[corner[0]] + vertices[corner[1]]) / 2 + [sign * 0.1, -0.25, 1.35]
        x = np.sign(np.cos(turn)) * np.abs(np.cos(turn)) ** (2 / power) * 2.45
        y = np.sign(np.sin(turn)) * np.abs(np.sin(turn)) ** (2 / power) * (1.65 + 0.35 * shape)
        rims.append(middle + np.stack([x, y, -0.05 * x * x - 0.14 * sign * x], 1))
    for rim in rims:
        pixels = _fixed(_pixels(rim, row, size))
        glass = np.zeros((size, size), np.float32)
        cv2.fillPoly(glass, [pixels], 0.88 if dark else 0.10, cv2.LINE_AA, 4)
        tint = np.array([0.07, 0.07, 0.08] if dark else [0.85, 0.9, 0.95], np.float32)
        image += glass[:, :, None] * (tint - image)
        np.maximum(cover, glass, out=cover) if dark else None
    lines = [
        *rims,
        np.stack(
            [
                rims[0][0] + (rims[1][20] - rims[0][0]) * t + [0, 0.35, 0.5 * np.sin(np.pi * t)]
                for t in np.linspace(0, 1, 7)
            ]
        ),
    ]
    yaw = float(row["yaw"])
    for sign, rim, edge in ((-1, rims[0], 20), (1, rims[1], 0)):
        if sign * yaw < 12:
            hinge = rim[edge] + [0, 0.5, 0]
            lines.append(np.stack([hinge, [sign * 7.75, hinge[1] + 0.1, 0.5], [sign * 7.9, hinge[1] - 0.1, -2.6]]))
    stroke = np.zeros((size, size), np.float32)
    for points in lines:
        cv2.polylines(stroke, [_fixed(_pixels(points, row, size))], False, 1.0, width, cv2.LINE_AA, 4)
    image += stroke[:, :, None] * (np.array(frame, np.float32) - image)
    np.maximum(cover, stroke, out=cover)


def _draw_occluder(image: np.ndarray, cover: np.ndarray, row: _Row, points: np.ndarray, size: int) -> None:
    """Draw what stands before the face; ``points`` are its 68 points in pixels of ``image``."""
    kind, draw = OCCLUDERS[int(row["occluder"])], row["occluder_draw"]
    layer = np.zeros((size, size), np.float32)
    light = np.linspace(1.08, 0.8, size, dtype=np.float32)[:, None]
    centre = points.mean(0)
    if kind == "object":
        angle = draw[0] * 2 * np.pi
        middle = centre + np.array([np.cos(angle), np.sin(angle) * 0.9]) * size * 0.27
        box = (
            tuple(map(float, middle)),
            (float(size * (0.18 + 0.2 * draw[1])), float(size * (0.3 + 0.2 * draw[2]))),
            float(draw[3] * 180),
        )
        cv2.fillConvexPoly(layer, _fixed(cv2.boxPoints(box)), 1.0, cv2.LINE_AA, 4)
        colour = _hsv(draw[4], 0.3 + 0.6 * draw[5], 0.2 + 0.7 * draw[6])
    elif kind == "hand":
        colour = _colours(row)["skin"] * 0.93
        side = 1 if draw[0] < 0.5 else -1
        base = np.array([centre[0] - 0.34 * side * size, size * 1.05])
        tip = points[3 if side == 1 else 13]
        for finger in range(4):
            apart = (finger - 1.5) * side * size
            end = tip + np.array([0.058 * apart, -size * (0.05 + 0.05 * math.sin(finger + 0.4))])
            knuckle = base + 0.55 * (end - base) + np.array([0.03 * apart, 0])
            for a, b, width in ((base, knuckle, 0.095), (knuckle, end, 0.058)):
                thick = max(1, int(width * size))
                cv2.line(layer, tuple(_fixed(a)), tuple(_fixed(b)), 1.0, thick, cv2.LINE_AA, 4)
        edge = cv2.GaussianBlur(layer, (0, 0), size * 0.012)
        colour = colour[None, None] * (0.35 + 0.65 * np.clip(edge * 1.4 - 0.25, 0, 1) ** 0.7)[:, :, None]
    elif kind == "mask":
        outline = np.concatenate([points[2:15], points[[28]] + (points[[29]] - points[[28]]) * 0.6])
        cv2.fillPoly(layer, [_fixed(outline)], 1.0, cv2.LINE_AA, 4)
        colour = (np.array([[0.62, 0.78, 0.86], [0.93, 0.93, 0.92], [0.12, 0.12, 0.13]], np.float32))[
            min(int(draw[0] * 3), 2)
        ]
        folds = 0.9 + 0.1 * np.sin(np.arange(size) / size * 2 * np.pi * 22)
        light = light * folds[:, None].astype(np.float32)
    else:
        colour = _colours(row)["hair"]
        left = draw[0] < 0.5
        top, low = points[19 if left else 24], points[36 if left else 45]
        t = np.linspace(0, 1, 12)[:, None]
        for k in range(7):
            # Locks of hair that taper to their ends; their places and lengths vary.
            vary = math.sin(12.9 * k + 40 * draw[1]), math.sin(7.7 * k + 40 * draw[2])
            start = top + np.array([(k - 3) * 0.03, -0.16]) * size
            end = low + np.array([(k - 3) * 0.028 + 0.03 * vary[0] + 0.1 * (draw[3] - 0.5), 0.10 * vary[1]]) * size
            bend = 0.5 * (start + end) + np.array([0.06 * (draw[4] - 0.5) * size, 0])
            path = (1 - t) ** 2 * start + 2 * t * (1 - t) * bend + t**2 * end
            half = (0.016 * size * (1 - 0.95 * t)) * [1, 0]
            cv2.fillPoly(layer, [_fixed(np.concatenate([path - half, (path + half)[::-1]]))], 0.95, cv2.LINE_AA, 4)
    shadow = cv2.GaussianBlur(layer, (0, 0), size * 0.02)
    image *= (1 - 0.35 * np.roll(shadow, round(size * 0.012), 0))[:, :, None]
    image += layer[:, :, None] * (colour * light[:, :, None] * float(row["exposure"]) - image)
    np.maximum(cover, layer, out=cover)


def render(row: Parameters, dials: FaceDials) -> np.ndarray:
    """Return the picture of one sampled row, RGB uint8 ``(S, S, 3)``.

    Args:
        row: One row of ``sample.sample``: the same keys, each value without its first axis.
        dials: The dials of the set (its ``image_size``).

    Raises:
        ConfigError: If the installed OpenCV cannot rasterise triangles.
    """
    if not hasattr(cv2, "triangleRasterize"):
        raise ConfigError(f"built-in faces are drawn by OpenCV 5; version {cv2.__version__} is installed, upgrade it")
    # Plain numbers do not turn float32 pixels into float64.
    plain = {key: value.item() if np.ndim(value) == 0 else value.astype(np.float32) for key, value in row.items()}
    return _draw(plain, dials.image_size)


def _draw(row: _Row, size: int) -> np.ndarray:
    """Return the picture of a row of plain numbers."""
    model = face_model()
    large = size * 4 // 3
    head = _turn(row["pitch"], row["yaw"], row["roll"])
    light, shape = _light(row), _shape(row, model)
    first, cosines, mask = _rasterise(shape, model, row, light, large)
    image = np.zeros((large, large, 3), np.float32)
    place = np.flatnonzero(mask)
    image.reshape(-1, 3)[place] = _shade(first, cosines, place, row, light, head).T
    cover = mask.astype(np.float32)
    if row["glasses"] > 0:
        flat = row["coefficient"] @ _corner_basis()
        corners = dict(zip(_CORNERS, flat.reshape(4, 3) + model.rest[list(_CORNERS)], strict=True))
        _draw_glasses(image, cover, row, corners, large)
    if row["occluder"] > 0:
        needed = ("index", "coefficient", "gaze_pitch", "gaze_yaw", *Pose._fields)
        batch = {key: np.asarray(row[key])[None] for key in needed}
        _draw_occluder(image, cover, row, points_of(batch, large)["68"][0], large)
    image *= cover[:, :, None]
    image = cv2.resize(image, (size, size), interpolation=cv2.INTER_AREA)
    alpha = cv2.resize(cover, (size, size), interpolation=cv2.INTER_AREA)
    image += (1 - alpha)[:, :, None] * (_background(row, size) * row["exposure"])
    blur = row["blur"] * size
    if blur > 0.25:
        image = cv2.GaussianBlur(image, (0, 0), blur)
    image *= 255
    if row["noise"] > 0:
        tile = atlas().static
        x, y = int(row["noise_key"] * 511), int(row["noise_key"] * 511 * 511) % 511
        window = np.take(np.take(tile, np.arange(y, y + size) % 512, 0), np.arange(x, x + size) % 512, 1)
        image += (row["noise"] * window)[:, :, None]
    return cv2.convertScaleAbs(np.maximum(image, 0, out=image))


_CORNERS = (33, 133, 263, 362)


@cache
def _corner_basis() -> np.ndarray:
    basis = face_model().basis[:, list(_CORNERS)]
    return np.ascontiguousarray(basis.reshape(len(basis), -1))
