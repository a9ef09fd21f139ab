# SPDX-License-Identifier: Apache-2.0
"""The paint of the built-in faces: maps in the texture space of the canonical face, painted once per process.

Lips, brows, lash lines, beard and shading are areas and lines between named vertices of the mesh. Wrinkles are height
maps; the renderer adds them up by the action units that deepen them and tilts the normals by their slopes.
"""

from __future__ import annotations

from functools import cache
from types import MappingProxyType
from typing import NamedTuple

import cv2
import numpy as np

from affect.data.faces.dials import ACTION_UNITS
from affect.data.faces.geometry3d import face_model

WRINKLES = MappingProxyType(
    {
        "forehead": ((1, 0.5), (2, 0.5)),
        "glabella": ((4, 1.0), (9, 0.4)),
        "crow": ((6, 1.0), (12, 0.25), (7, 0.2)),
        "under_eye": ((6, 0.7), (7, 0.8), (9, 0.3)),
        "nasolabial": ((12, 0.9), (10, 0.8), (9, 0.6), (6, 0.3), (20, 0.4)),
        "nose": ((9, 1.0),),
        "corner": ((14, 1.0), (12, 0.35), (15, 0.3)),
        "marionette": ((15, 1.0), (20, 0.5), (17, 0.2)),
        "chin": ((17, 1.0), (15, 0.3)),
        "lip_sides": ((23, 0.8), (24, 0.8)),
    }
)
"""Skin folds and how much each action unit deepens them (at full intensity)."""

CHANNELS = (
    "lips",
    "brow",
    "lash",
    "beard",
    "moustache",
    "nostril",
    "shade",
    "red",
    "freckles",
    "grain",
    "socket",
    "tone",
)


TEXELS = 288
BLOTCHES = 6
_AU = {au: k for k, au in enumerate(ACTION_UNITS)}


class Atlas(NamedTuple):
    """What is painted once.

    Attributes:
        maps: Per texel ``CHANNELS``, then ``BLOTCHES`` maps of uneven tone, then for each of ``WRINKLES`` its height
            and the height's slopes to the right and down: ``(TEXELS * TEXELS, channels)``.
        wrinkle_au: How much each action unit deepens each wrinkle, ``(wrinkles, 18)``.
        age: Depth that age adds to each wrinkle, ``(wrinkles,)``.
        strands: Brightness of hair across and along its strands, ``(256, 256)``, unit variance.
        static: Camera noise, ``(512, 512)``, unit variance.
    """

    maps: np.ndarray
    wrinkle_au: np.ndarray
    age: np.ndarray
    strands: np.ndarray
    static: np.ndarray


@cache
def atlas() -> Atlas:
    """Return the painted maps of the face's texture and tiles of noise; the same in every process."""
    model = face_model()
    size = TEXELS
    place = (model.canonical_uv * size).astype(np.float64)
    random = np.random.Generator(np.random.Philox(key=20240229))

    def mirror(row: list[int] | tuple[int, ...]) -> list[int]:
        return [int(model.mirror[v]) for v in row]

    def line(row: list[int] | tuple[int, ...] | np.ndarray, width: float, blur: float, both: bool = True) -> np.ndarray:
        canvas = np.zeros((size, size), np.float32)
        rows = [row] if isinstance(row, np.ndarray) or not both else [row, mirror(row)]
        for r in rows:
            corner = r if isinstance(r, np.ndarray) else place[list(r)]
            cv2.polylines(
                canvas,
                [np.round(corner * 16).astype(np.int32)],
                False,
                1.0,
                max(1, round(width * size)),
                cv2.LINE_AA,
                4,
            )
        return cv2.GaussianBlur(canvas, (0, 0), blur * size)

    def area(row: list[int] | tuple[int, ...], blur: float, both: bool = True) -> np.ndarray:
        canvas = np.zeros((size, size), np.float32)
        for r in [row, mirror(row)] if both else [row]:
            cv2.fillPoly(canvas, [np.round(place[list(r)] * 16).astype(np.int32)], 1.0, cv2.LINE_AA, 4)
        return cv2.GaussianBlur(canvas, (0, 0), blur * size) if blur else canvas

    def spot(vertex: int, radius: tuple[float, float], offset: tuple[float, float] = (0, 0)) -> np.ndarray:
        yy, xx = np.mgrid[:size, :size]
        total = np.zeros((size, size), np.float32)
        for v, s in ((vertex, 1), (int(model.mirror[vertex]), -1)):
            cx, cy = place[v] + np.array([offset[0] * s, offset[1]]) * size
            total = np.maximum(
                total, np.exp(-0.5 * (((xx - cx) / (radius[0] * size)) ** 2 + ((yy - cy) / (radius[1] * size)) ** 2))
            )
        return total.astype(np.float32)

    def noise(cell: float, octaves: int = 1) -> np.ndarray:
        total = np.zeros((size, size), np.float32)
        for octave in range(octaves):
            n = max(2, round(size / (cell * size) * 2**octave))
            total += (
                cv2.resize(
                    random.standard_normal((n, n)).astype(np.float32), (size, size), interpolation=cv2.INTER_CUBIC
                )
                / 1.6**octave
            )
        return total / total.std()

    outer = [61, 185, 40, 39, 37, 0, 267, 269, 270, 409, 291, 375, 321, 405, 314, 17, 84, 181, 91, 146]
    lips = area(outer, 0.004, both=False)
    # Brow: distance from its middle line, in units of its usual half thickness, thinner at the tail.
    upper, lower = [70, 63, 105, 66, 107], [46, 53, 52, 65, 55]
    brow: np.ndarray = np.full((size, size), 9.0, np.float32)
    for a, b in ((upper, lower), (mirror(upper), mirror(lower))):
        middle = 0.58 * place[a] + 0.42 * place[b]
        dense = np.stack([np.interp(np.linspace(0, 4, 60), np.arange(5), middle[:, k]) for k in (0, 1)], 1)
        thickness = np.interp(np.linspace(0, 1, 60), [0, 0.3, 0.75, 1.0], [0.35, 0.8, 1.1, 0.9]) * 0.018 * size
        yy, xx = np.mgrid[:size, :size]
        for (cx, cy), half in zip(dense, thickness, strict=True):
            reach = int(half * 3) + 2
            window = (slice(max(int(cy) - reach, 0), int(cy) + reach), slice(max(int(cx) - reach, 0), int(cx) + reach))
            d = np.hypot((xx[window] - cx) * 0.8, yy[window] - cy) / half
            brow[window] = np.minimum(brow[window], d)
    brow = np.minimum(brow, 9) + 0.16 * noise(0.005)
    lash = line([33, 246, 161, 160, 159, 158, 157, 173, 133], 0.010, 0.0016) + 0.45 * line(
        [33, 7, 163, 144, 145, 153, 154, 155], 0.006, 0.0016
    )
    beard = area(
        [127, 234, 93, 132, 58, 172, 136, 150, 149, 176, 148, 152, 377, 17, 91, 61, 212, 207, 187, 147, 137], 0.016
    )
    beard = np.maximum(
        beard, area([61, 91, 84, 17, 314, 321, 291, 335, 421, 377, 152, 148, 201, 106], 0.012, both=False)
    )
    beard *= 1 - cv2.dilate(lips, np.ones((3, 3)))
    moustache = area(
        [61, 185, 40, 39, 37, 0, 267, 269, 270, 409, 291, 410, 322, 391, 393, 164, 167, 165, 92, 186], 0.008, both=False
    )
    moustache *= 1 - lips
    nostril = spot(60, (0.011, 0.007), (-0.004, -0.010))
    shade = np.zeros((size, size), np.float32)
    for amount, patch in (
        (0.30, line([98, 97, 2], 0.012, 0.010)),
        (0.22, line([193, 122, 196, 236, 198], 0.020, 0.018)),
        (0.25, line([129, 64, 98], 0.010, 0.007)),
        (0.20, area([17, 84, 181, 194, 201, 200, 421, 418, 405, 314], 0.016, both=False)),
        (0.30, line([61, 76], 0.012, 0.008)),
        (0.20, line([164, 167], 0.006, 0.010)),
        (0.28, line([246, 161, 160, 159, 158, 157, 173], 0.012, 0.008)),
        (0.20, line([247, 30, 29, 27, 28, 56, 190], 0.006, 0.003)),
        (0.14, line([25, 110, 24, 23, 22, 26, 112], 0.010, 0.008)),
        (0.10, line([58, 172, 136, 150, 149, 176, 148, 152], 0.04, 0.03)),
    ):
        shade = np.maximum(shade, amount * patch / max(float(patch.max()), 1e-6))
    red = np.maximum(0.9 * spot(50, (0.07, 0.06), (0.015, 0.0)), 0.8 * spot(4, (0.04, 0.04)))
    socket = np.maximum(spot(230, (0.055, 0.022), (0, 0.0)), 0.7 * spot(221, (0.035, 0.02)))
    fine = random.standard_normal((size, size)).astype(np.float32)
    speck = cv2.GaussianBlur(fine, (0, 0), 1.1)
    speck = np.clip(speck / speck.std() - 1.5, 0, 1.5) * np.clip(
        spot(118, (0.12, 0.07), (0.05, 0)) + spot(195, (0.05, 0.07)), 0, 1
    )
    grain = cv2.GaussianBlur(fine, (0, 0), 0.8)
    grain /= grain.std()
    tone = noise(0.10, 3)
    painted = dict(
        zip(
            CHANNELS,
            (lips, brow, lash, beard, moustache, nostril, shade, red, speck, grain, socket, tone),
            strict=True,
        )
    )
    blotches = np.stack([noise(0.25, 2) for _ in range(BLOTCHES)])

    def between(rows: list[tuple[int, int, float]]) -> np.ndarray:
        return np.array([(1 - t) * place[a] + t * place[b] for a, b, t in rows])

    forehead = [np.array([place[v] for v in row]) for row in ([71, 68, 104, 69, 108, 151, 337, 299, 333, 298, 301],)]
    brows_top = np.array([place[v] for v in [156, 70, 63, 105, 66, 107, 9, 336, 296, 334, 293, 300, 383]])
    lines_forehead = [
        forehead[0][1:-1],
        0.5 * (forehead[0][1:-1] + brows_top[2:-2]),
        1.45 * forehead[0][2:-2] - 0.45 * brows_top[3:-3],
    ]
    folds = {
        "forehead": sum(line(row, 0.005, 0.0042) for row in lines_forehead),
        "glabella": line(between([(107, 9, 0.35), (55, 8, 0.35), (55, 8, 0.5)]), 0.006, 0.004)
        + line(between([(336, 9, 0.35), (285, 8, 0.35), (285, 8, 0.5)]), 0.006, 0.004)
        + 0.7 * line(between([(122, 6, 0.2), (6, 6, 0), (351, 6, 0.2)]), 0.005, 0.004),
        "crow": line([33, 226, 143], 0.004, 0.0032)
        + line([130, 35, 111], 0.004, 0.0032)
        + line([247, 113, 156], 0.004, 0.0032),
        "under_eye": line([35, 31, 228, 229, 230, 231, 232], 0.006, 0.0045)
        + 0.6 * line([33, 25, 110, 24, 23, 22, 26], 0.004, 0.003),
        "nasolabial": line([129, 203, 206, 216, 212], 0.009, 0.0075),
        "nose": line([193, 122, 196], 0.004, 0.0035)
        + line([245, 188, 174], 0.004, 0.0035)
        + line([8, 193], 0.004, 0.004)
        + line(between([(122, 6, 0.0), (6, 6, 0), (351, 6, 0.0)]), 0.004, 0.0035),
        "corner": line([76, 61, 57], 0.010, 0.010) + 0.7 * line([186, 57, 43], 0.010, 0.010),
        "marionette": line([57, 43, 202, 204], 0.010, 0.010),
        "chin": line([194, 201, 200, 421, 418], 0.008, 0.007, both=False)
        + np.clip(noise(0.02), 0, 2) * area([194, 201, 200, 421, 418, 262, 428, 199, 208, 32], 0.02, both=False) * 0.12,
        "lip_sides": line([0, 37, 39, 40, 185, 61], 0.006, 0.006) + line([17, 84, 181, 91, 146, 61], 0.007, 0.006),
    }
    stacked = []
    for name in WRINKLES:
        height = folds[name] / max(float(folds[name].max()), 1e-6)
        dy, dx = np.gradient(height * 0.011 * size)
        stacked += [height, dx, dy]
    maps = np.stack([*(painted[name] for name in CHANNELS), *blotches, *stacked], -1).astype(np.float32)
    wrinkle_au = np.zeros((len(WRINKLES), len(ACTION_UNITS)), np.float32)
    for row, table in enumerate(WRINKLES.values()):
        for au, amount in table:
            wrinkle_au[row, _AU[au]] = amount
    age = np.array([0.35, 0.3, 0.35, 0.4, 0.45, 0.05, 0.15, 0.4, 0.1, 0.1], np.float32)
    coarse = random.standard_normal((8, 256)).astype(np.float32)
    strands = cv2.resize(coarse, (256, 256), interpolation=cv2.INTER_CUBIC)
    strands = cv2.GaussianBlur(strands, (0, 0), sigmaX=0.7, sigmaY=6)
    strands = strands / strands.std() + cv2.resize(
        random.standard_normal((4, 40)).astype(np.float32), (256, 256), interpolation=cv2.INTER_CUBIC
    )
    return Atlas(
        np.ascontiguousarray(maps.reshape(size * size, -1)),
        wrinkle_au,
        age,
        np.ascontiguousarray(strands / strands.std(), np.float32),
        random.standard_normal((512, 512)).astype(np.float32),
    )
