# SPDX-License-Identifier: Apache-2.0
"""The field's vocabulary: action units, expressions, landmark schemes, and conversions by name.

Every label tuple of the package lives here once. An index is only ever derived from a name, because each dataset
numbers its classes differently (``shared`` order tables of RAF-DB, AffectNet, ABAW, FER2013 and FER+ disagree in
every position). This module imports nothing of ours and nothing heavy.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from types import MappingProxyType

# --------------------------------------------------------------------------------------------- action units

AU_NAMES = MappingProxyType(
    {
        1: "inner brow raiser",
        2: "outer brow raiser",
        4: "brow lowerer",
        5: "upper lid raiser",
        6: "cheek raiser",
        7: "lid tightener",
        9: "nose wrinkler",
        10: "upper lip raiser",
        11: "nasolabial deepener",
        12: "lip corner puller",
        13: "sharp lip puller",
        14: "dimpler",
        15: "lip corner depressor",
        16: "lower lip depressor",
        17: "chin raiser",
        18: "lip pucker",
        19: "tongue show",
        20: "lip stretcher",
        22: "lip funneler",
        23: "lip tightener",
        24: "lip pressor",
        25: "lips part",
        26: "jaw drop",
        27: "mouth stretch",
        28: "lip suck",
        29: "jaw thrust",
        30: "jaw sideways",
        31: "jaw clencher",
        32: "lip bite",
        33: "cheek blow",
        34: "cheek puff",
        35: "cheek suck",
        36: "tongue bulge",
        37: "lip wipe",
        38: "nostril dilator",
        39: "nostril compressor",
        43: "eyes closed",
        45: "blink",
    }
)
"""FACS action unit number to name."""

AU_SETS = MappingProxyType(
    {
        "bp4d": (1, 2, 4, 6, 7, 10, 12, 14, 15, 17, 23, 24),
        "disfa8": (1, 2, 4, 6, 9, 12, 25, 26),
        "disfa12": (1, 2, 4, 5, 6, 9, 12, 15, 17, 20, 25, 26),
        "affwild2": (1, 2, 4, 6, 7, 10, 12, 15, 23, 24, 25, 26),
        "affwild2_abaw1": (1, 2, 4, 6, 12, 15, 20, 25),
        "bp4d_intensity": (6, 10, 12, 14, 17),
        "faces": (1, 2, 4, 5, 6, 7, 9, 10, 12, 14, 15, 17, 20, 23, 24, 25, 26, 43),
    }
)
"""Benchmark order of action units per dataset or protocol."""


def occurrence_column(au: int) -> str:
    """Return the table column of an action unit's occurrence, e.g. ``au01_occurrence``."""
    return f"au{au:02d}_occurrence"


def intensity_column(au: int) -> str:
    """Return the table column of an action unit's intensity (0 to 5), e.g. ``au12_intensity``."""
    return f"au{au:02d}_intensity"


def au_output(au: int) -> str:
    """Return the short output name of an action unit, e.g. ``AU12``."""
    return f"AU{au}"


# ---------------------------------------------------------------------------------------------- expressions

NEUTRAL, HAPPINESS, SADNESS, SURPRISE = "neutral", "happiness", "sadness", "surprise"
FEAR, DISGUST, ANGER, CONTEMPT, OTHER = "fear", "disgust", "anger", "contempt", "other"

EXPRESSION_ORDERS = MappingProxyType(
    {
        "rafdb": (SURPRISE, FEAR, DISGUST, HAPPINESS, SADNESS, ANGER, NEUTRAL),
        "affectnet7": (NEUTRAL, HAPPINESS, SADNESS, SURPRISE, FEAR, DISGUST, ANGER),
        "affectnet8": (NEUTRAL, HAPPINESS, SADNESS, SURPRISE, FEAR, DISGUST, ANGER, CONTEMPT),
        "abaw": (NEUTRAL, ANGER, DISGUST, FEAR, HAPPINESS, SADNESS, SURPRISE, OTHER),
        "abaw7": (NEUTRAL, ANGER, DISGUST, FEAR, HAPPINESS, SADNESS, SURPRISE),
        "fer2013": (ANGER, DISGUST, FEAR, HAPPINESS, SADNESS, SURPRISE, NEUTRAL),
        "ferplus": (NEUTRAL, HAPPINESS, SURPRISE, SADNESS, ANGER, DISGUST, FEAR, CONTEMPT),
        "imagefolder8": (ANGER, CONTEMPT, DISGUST, FEAR, HAPPINESS, NEUTRAL, SADNESS, SURPRISE),
        "faces": (NEUTRAL, HAPPINESS, SADNESS, SURPRISE, FEAR, DISGUST, ANGER, CONTEMPT),
    }
)
"""Class order of each dataset's own expression labels. RAF-DB's file values are 1 to 7: subtract 1 for an index."""

EXPRESSION_SYNONYMS = MappingProxyType(
    {
        "happy": HAPPINESS,
        "joy": HAPPINESS,
        "sad": SADNESS,
        "surprised": SURPRISE,
        "fearful": FEAR,
        "afraid": FEAR,
        "disgusted": DISGUST,
        "angry": ANGER,
        "contemptuous": CONTEMPT,
    }
)
"""Spellings that readers meet in files, mapped to the package's name."""

RAFDB_COMPOUND = (
    "happily surprised",
    "happily disgusted",
    "sadly fearful",
    "sadly angry",
    "sadly surprised",
    "sadly disgusted",
    "fearfully angry",
    "fearfully surprised",
    "angrily surprised",
    "angrily disgusted",
    "disgustedly surprised",
)
"""Compound classes of RAF-DB in file order (file values are 1 to 11)."""


def canonical_expression(name: str) -> str:
    """Return the package's name of an expression class, e.g. ``Happy`` gives ``happiness``."""
    lowered = name.strip().lower().replace("_", " ")
    return EXPRESSION_SYNONYMS.get(lowered, lowered)


def expression_column(name: str) -> str:
    """Return the table column of a class probability, e.g. ``expression_happiness``."""
    return "expression_" + name.replace(" ", "_")


def permutation(source: Sequence[str], target: Sequence[str]) -> list[int]:
    """Return for each name of ``target`` its index in ``source``; -1 where ``source`` lacks it.

    Example:
        >>> permutation(("anger", "fear"), ("fear", "contempt", "anger"))
        [1, -1, 0]
    """
    index = {name: i for i, name in enumerate(source)}
    return [index.get(name, -1) for name in target]


# ----------------------------------------------------------------------------------------------- landmarks


@dataclass(frozen=True)
class LandmarkScheme:
    """A set of facial points: how many, how they swap under a horizontal flip, and how errors are normalised.

    Attributes:
        name: Key of the scheme; the table column is ``landmarks_<name>``.
        points: Number of points.
        swap: For each point the index of the point that takes its place in a mirrored image, ``(points,)``.
        eye_corners: Two indices whose distance is the inter-ocular normaliser.
        left_eye: Indices whose mean is the centre of the eye on the image's left.
        right_eye: Indices whose mean is the centre of the eye on the image's right.
    """

    name: str
    points: int
    swap: tuple[int, ...]
    eye_corners: tuple[int, int]
    left_eye: tuple[int, ...]
    right_eye: tuple[int, ...]

    @property
    def column(self) -> str:
        """Table column of the scheme."""
        return f"landmarks_{self.name}"


def _swap(points: int, pairs: Iterable[tuple[int, int]]) -> tuple[int, ...]:
    swap = list(range(points))
    for a, b in pairs:
        swap[a], swap[b] = b, a
    return tuple(swap)


def _mirror(first: int, last: int) -> list[tuple[int, int]]:
    """Pairs that mirror the run ``first..last`` about its middle."""
    return [(first + i, last - i) for i in range((last - first + 1) // 2)]


_PAIRS_68 = [
    *_mirror(0, 16),
    *_mirror(17, 26),
    *[(31, 35), (32, 34)],
    *[(36, 45), (37, 44), (38, 43), (39, 42), (40, 47), (41, 46)],
    *[(48, 54), (49, 53), (50, 52), (55, 59), (56, 58)],
    *[(60, 64), (61, 63), (65, 67)],
]
_PAIRS_98 = [
    *_mirror(0, 32),
    *[(33, 46), (34, 45), (35, 44), (36, 43), (37, 42), (38, 50), (39, 49), (40, 48), (41, 47)],
    *[(55, 59), (56, 58)],
    *[(60, 72), (61, 71), (62, 70), (63, 69), (64, 68), (65, 75), (66, 74), (67, 73)],
    *[(76, 82), (77, 81), (78, 80), (87, 83), (86, 84)],
    *[(88, 92), (89, 91), (95, 93), (96, 97)],
]
_PAIRS_49 = [
    *_mirror(0, 9),
    *[(14, 18), (15, 17)],
    *[(19, 28), (20, 27), (21, 26), (22, 25), (23, 30), (24, 29)],
    *[(31, 37), (32, 36), (33, 35), (38, 42), (39, 41)],
    *[(43, 45), (46, 48)],
]
_PAIRS_29 = [
    *[(0, 1), (2, 3), (4, 6), (5, 7)],
    *[(8, 9), (10, 11), (12, 14), (13, 15), (16, 17)],
    *[(18, 19), (22, 23)],
]
_PAIRS_106 = [
    *_mirror(0, 32),
    *[(33, 46), (34, 45), (35, 44), (36, 43), (37, 42), (38, 50), (39, 49), (40, 48), (41, 47)],
    *_mirror(55, 65),
    *[(66, 79), (67, 78), (68, 77), (69, 76), (70, 75), (71, 82), (72, 81), (73, 80), (74, 83)],
    *_mirror(84, 90),
    *[(91, 95), (92, 94)],
    *[(96, 100), (97, 99), (101, 103), (104, 105)],
]

SCHEMES = MappingProxyType(
    {
        "68": LandmarkScheme("68", 68, _swap(68, _PAIRS_68), (36, 45), tuple(range(36, 42)), tuple(range(42, 48))),
        "98": LandmarkScheme("98", 98, _swap(98, _PAIRS_98), (60, 72), tuple(range(60, 68)), tuple(range(68, 76))),
        "49": LandmarkScheme("49", 49, _swap(49, _PAIRS_49), (19, 28), tuple(range(19, 25)), tuple(range(25, 31))),
        "5": LandmarkScheme("5", 5, _swap(5, [(0, 1), (3, 4)]), (0, 1), (0,), (1,)),
        "29": LandmarkScheme("29", 29, _swap(29, _PAIRS_29), (8, 9), (16,), (17,)),
        "106": LandmarkScheme("106", 106, _swap(106, _PAIRS_106), (66, 79), tuple(range(66, 74)), tuple(range(75, 83))),
    }
)
"""Landmark schemes: iBUG 68, WFLW 98, the 49 inner points without inner mouth corners, CelebA 5, COFW 29, LaPa 106.

The eyes of COFW are its two annotated pupils. Pairs and corners of 29 and 106 are those of MMPose's data set files
(``configs/_base_/datasets/cofw.py`` and ``lapa.py``); HRNet's table of COFW agrees.
"""

NORMALISERS = ("inter_ocular", "inter_pupil", "box")
"""Lengths that landmark errors are divided by: between the outer eye corners, between the eyes' centres, and the square
root of width times height of the box around the true points."""

INNER_51 = tuple(range(17, 68))
"""The points of scheme 68 without the jaw line, on which providers agree best."""

POINTS_68_TO_5 = ((36, 37, 38, 39, 40, 41), (42, 43, 44, 45, 46, 47), (30,), (48,), (54,))
"""For each of the 5 points (two eyes, nose tip, two mouth corners) the points of scheme 68 whose mean it is."""

MESH_478_TO_68 = (
    *(127, 234, 93, 132, 58, 136, 150, 176, 152, 400, 379, 365, 288, 361, 323, 454, 356),
    *(70, 63, 105, 66, 107, 336, 296, 334, 293, 300),
    *(168, 197, 5, 4, 98, 97, 2, 326, 327),
    *(33, 160, 158, 133, 153, 144, 362, 385, 387, 263, 373, 380),
    *(61, 40, 37, 0, 267, 270, 291, 321, 314, 17, 84, 91),
    *(78, 81, 13, 311, 308, 402, 14, 178),
)
"""Vertices of MediaPipe's 478-point mesh at the points of scheme 68. The jaw (first 17) is not the iBUG jaw line."""

POSE_ANGLES = ("pitch", "yaw", "roll")
"""Head rotation in degrees. Pitch > 0 looks down, yaw > 0 turns to the image's right, roll > 0 tilts clockwise."""

AFFECT_AXES = ("valence", "arousal")
"""Circumplex coordinates, each in [-1, 1]."""
