# SPDX-License-Identifier: Apache-2.0
"""Parameters and labels of the built-in faces: vectorised draws that are functions of (seed, index) alone.

Every random number is the hash of (seed, stream, index, position), so that row 70,000 needs no row before it and any
order of reading gives the same faces. What belongs to a person is a function of (seed, subject).

Expressions follow prototypical combinations of action units (after Ekman, Friesen and Hager, Facial Action Coding
System Investigator's Guide, 2002: EMFACS) with variation: each action unit of a combination joins with its own
probability, intensities vary around the strength of the display, and a few unrelated action units appear. Valence and
arousal are functions of the displayed intensities (``valence_arousal``), placed as in Russell's circumplex (1980).
"""

from __future__ import annotations

from types import MappingProxyType

import numpy as np
from scipy.special import ndtri

from affect import labels
from affect.data.faces.dials import ACTION_UNITS, BACKGROUNDS, EXPRESSIONS, FaceDials
from affect.data.faces.geometry3d import IDENTITY, Pose, coefficients, landmarks

Parameters = dict[str, np.ndarray]
"""Arrays whose first axis is the row."""

PROTOTYPES = MappingProxyType(
    {
        labels.NEUTRAL: {},
        labels.HAPPINESS: {12: 1.0, 6: 0.85, 25: 0.6, 7: 0.3, 26: 0.25},
        labels.SADNESS: {1: 1.0, 4: 0.8, 15: 1.0, 17: 0.5, 7: 0.15},
        labels.SURPRISE: {1: 1.0, 2: 1.0, 5: 0.9, 25: 1.0, 26: 0.95},
        labels.FEAR: {1: 1.0, 2: 0.7, 4: 0.9, 5: 1.0, 20: 0.85, 25: 0.8, 26: 0.35, 7: 0.3},
        labels.DISGUST: {9: 0.9, 10: 0.7, 4: 0.4, 7: 0.5, 6: 0.2, 17: 0.35, 15: 0.25, 25: 0.25},
        labels.ANGER: {4: 1.0, 7: 0.8, 5: 0.5, 23: 0.75, 24: 0.45, 17: 0.35, 10: 0.2, 25: 0.15},
        labels.CONTEMPT: {14: 1.0, 12: 0.35},
    }
)
"""Probability of each action unit in a display of an expression; 1 is always there."""

EXTRA_RATES = MappingProxyType({2: 0.03, 6: 0.03, 7: 0.06, 14: 0.03, 17: 0.05, 24: 0.03, 25: 0.12, 26: 0.03, 43: 0.04})
"""Usual probability of a weak action unit outside the prototype (scaled by ``FaceDials.au_rates``)."""

VALENCE = MappingProxyType(
    {1: -0.2, 2: 0.15, 4: -0.8, 5: -0.1, 6: 0.5, 9: -0.8, 10: -0.6, 12: 1.3, 14: -0.35}
    | {15: -0.9, 17: -0.3, 20: -0.5, 23: -0.3, 24: -0.3}
)
AROUSAL = MappingProxyType(
    {2: 0.35, 4: 0.4, 5: 0.5, 6: 0.15, 7: 0.3, 9: 0.4, 10: 0.3, 12: 0.35, 14: -0.1}
    | {15: -0.9, 17: -0.2, 20: 0.5, 23: 0.3, 24: 0.2, 25: 0.2, 26: 0.55, 43: -0.9}
)
"""Weights of the action units (at full intensity) in valence and arousal before the hyperbolic tangent."""

FAMILIES = ("au", "expression", "valence_arousal", "landmarks")
"""Label families that partial annotation hides as a whole."""

OCCLUDERS = ("none", "object", "hand", "mask", "strand")
HAIR_STYLES = ("short", "medium", "long", "bald", "bun")

_STREAMS = ("row", "action", "subject", "habit", "noise", "missing", "camera")
_COLUMN = {au: k for k, au in enumerate(ACTION_UNITS)}
_GOLDEN = np.uint64(0x9E3779B97F4A7C15)


def _mix(value: np.ndarray) -> np.ndarray:
    """Return the finaliser of SplitMix64 (Steele, Lea and Flood, 2014) of unsigned 64-bit integers."""
    value = value ^ (value >> np.uint64(30))
    value = value * np.uint64(0xBF58476D1CE4E5B9)
    value = value ^ (value >> np.uint64(27))
    value = value * np.uint64(0x94D049BB133111EB)
    return value ^ (value >> np.uint64(31))


def uniform(seed: int, stream: str, index: np.ndarray, count: int) -> np.ndarray:
    """Return ``count`` uniform numbers in (0, 1) per index, ``(N, count)``, a function of the arguments alone."""
    with np.errstate(over="ignore"):
        key = _mix(np.array([seed % 2**64], np.uint64) + _GOLDEN * np.uint64(_STREAMS.index(stream) + 1))
        base = _mix(_mix(np.asarray(index).astype(np.uint64) * _GOLDEN + key) + key)
        value = _mix(base[:, None] + _GOLDEN * np.arange(1, count + 1, dtype=np.uint64)[None])
    return ((value >> np.uint64(11)).astype(np.float64) + 0.5) * 2.0**-53


def _between(u: np.ndarray, limits: tuple[float, float]) -> np.ndarray:
    return limits[0] + (limits[1] - limits[0]) * u


def prototype_matrix() -> np.ndarray:
    """Return the probability of each action unit in each expression, ``(8, 18)``."""
    matrix = np.zeros((len(EXPRESSIONS), len(ACTION_UNITS)))
    for row, name in enumerate(EXPRESSIONS):
        for au, probability in PROTOTYPES[name].items():
            matrix[row, _COLUMN[au]] = probability
    return matrix


def expression_of(intensity: np.ndarray) -> np.ndarray:
    """Return the expression whose prototype matches intensities best, ``(N,)`` indices of the order ``faces``.

    The match is the cosine between intensities ``(N, 18)`` and a prototype's probabilities; a face without any action
    unit of at least intensity 1 is neutral, and so is one that matches nothing (cosine below 0.3).
    """
    intensity = np.asarray(intensity, np.float64)
    prototypes = prototype_matrix()
    size = np.linalg.norm(prototypes, axis=1)
    norm = np.linalg.norm(intensity, axis=1)
    cosine = intensity @ prototypes.T / (np.maximum(size, 1e-9) * np.maximum(norm, 1e-9)[:, None])
    cosine[:, 0] = 0.3
    return np.where((intensity >= 1).any(1), cosine.argmax(1), 0)


def valence_arousal(intensity: np.ndarray) -> np.ndarray:
    """Return valence and arousal ``(N, 2)`` in (-1, 1): tanh of a weighted sum of intensities / 5."""
    weights = np.zeros((len(ACTION_UNITS), 2))
    for column, table in enumerate((VALENCE, AROUSAL)):
        for au, weight in table.items():
            weights[_COLUMN[au], column] = weight
    return np.tanh(np.asarray(intensity, np.float64) / 5 @ weights)


# -------------------------------------------------------------------------------------------------- sampling


def sample_subjects(dials: FaceDials, seed: int, subject: np.ndarray) -> Parameters:
    """Return what belongs to people, each ``(N,)`` or ``(N, I)``, as a function of (seed, subject)."""
    u = uniform(seed, "subject", subject, 40 + len(IDENTITY))
    body = u[:, 40:]
    age = u[:, 0]
    style = np.searchsorted([0.40, 0.60, 0.80, 0.90], u[:, 1])
    bearded = (u[:, 2] < dials.beard) & (style < 2) | (u[:, 2] < dials.beard) & (style == 3)
    glasses = u[:, 5] < dials.glasses
    skin = u[:, 7]
    dark = np.clip(skin * 1.6 - 0.3, 0, 1)
    return {
        "identity": np.clip(ndtri(body), -2, 2).astype(np.float32),
        "age": age,
        "hair_style": style,
        "hair_volume": u[:, 3],
        "hairline": u[:, 4],
        "beard": np.where(bearded, 0.45 + 0.55 * u[:, 11], 0.0),
        "beard_kind": np.minimum((u[:, 12] * 3).astype(int), 2),
        "glasses": glasses.astype(np.float64) + (glasses & (u[:, 6] < 0.25)),
        "glasses_shape": u[:, 13],
        "skin": skin,
        "skin_red": u[:, 8],
        # Hair: melanin (dark for dark skin), redness, grey with age.
        "hair_dark": np.clip(np.maximum(u[:, 9], dark * 0.9 + 0.1 * u[:, 14]), 0, 1),
        "hair_red": u[:, 10],
        "hair_grey": np.where(age > 0.6, np.clip((age - 0.6) * 3 * u[:, 15], 0, 1), 0.0),
        "hair_wave": u[:, 16],
        "brow_thick": u[:, 17],
        "eye_colour": np.where(dark > 0.4, 0.15 * u[:, 18], u[:, 18]),
        "freckles": np.where((u[:, 19] < 0.2) & (skin < 0.45), 0.4 + 0.6 * u[:, 20], 0.0),
        "lips_red": u[:, 21] * np.where(style == 2, 1.0, 0.6),
        "blotches": u[:, 22:28] - 0.5,
        "cloth": u[:, 28:32],
        "oily": u[:, 32],
        "ear_out": u[:, 33],
        "fringe": np.where(u[:, 35] < 0.45, 0.0, u[:, 36]),
        "favourite": np.minimum((u[:, 34] * len(EXPRESSIONS)).astype(int), len(EXPRESSIONS) - 1),
    }


def _from_expression(dials: FaceDials, expression: np.ndarray, u: np.ndarray, strength: np.ndarray) -> np.ndarray:
    """Return intensities ``(N, K)`` of displays of the given expressions."""
    k = len(ACTION_UNITS)
    join, vary, extra = u[:, :k], u[:, k : 2 * k], u[:, 2 * k : 3 * k]
    on = join < prototype_matrix()[expression]
    name = {expression_name: row for row, expression_name in enumerate(EXPRESSIONS)}
    # Disgust needs AU9 or AU10, anger AU23 or AU24: the one that is likelier joins if neither did.
    for wanted, first, second in ((labels.DISGUST, 9, 10), (labels.ANGER, 23, 24)):
        lacks = (expression == name[wanted]) & ~on[:, _COLUMN[first]] & ~on[:, _COLUMN[second]]
        on[:, _COLUMN[first]] |= lacks
    rates = np.zeros(k)
    for au, rate in EXTRA_RATES.items():
        rates[_COLUMN[au]] = rate
    added = (extra < np.minimum(rates * float(dials.rates()[0]), 1)) & ~on
    level = np.clip(0.12 + 0.72 * strength[:, None] + 0.36 * (vary - 0.4), 0, 1)
    level = np.where(added, 0.3 * vary, level)
    on |= added
    # What one face cannot do at once, the stronger reason wins: a jaw that drops here parts the lips, pressed or
    # tightened lips of anger stay closed, and a wide eye does not close.
    pressed = on[:, _COLUMN[24]] & ~added[:, _COLUMN[24]]
    on[:, _COLUMN[26]] &= ~pressed
    on[:, _COLUMN[25]] = (on[:, _COLUMN[25]] | on[:, _COLUMN[26]]) & ~pressed
    on[:, _COLUMN[24]] &= ~on[:, _COLUMN[25]]
    on[:, _COLUMN[43]] &= ~on[:, _COLUMN[5]]
    lifted = np.maximum(level[:, _COLUMN[25]], 0.6 * level[:, _COLUMN[26]] * on[:, _COLUMN[26]])
    level[:, _COLUMN[25]] = lifted
    # Where the inner brows rise in fear and sadness, their lowering is the weaker of the two.
    level[:, _COLUMN[4]] = np.where(
        on[:, _COLUMN[1]], np.minimum(level[:, _COLUMN[4]], 0.85 * level[:, _COLUMN[1]]), level[:, _COLUMN[4]]
    )
    # Weakly drooped lids read as sleepy: closed eyes are closed.
    level[:, _COLUMN[43]] = 0.8 + 0.2 * vary[:, _COLUMN[43]]
    return np.where(on, _between(level, dials.intensity), 0.0)


def _from_rates(dials: FaceDials, u: np.ndarray, habit: np.ndarray) -> np.ndarray:
    """Return intensities ``(N, K)`` of action units drawn by rate, one after the other along the chain."""
    k = len(ACTION_UNITS)
    draw, vary, follow = u[:, :k], u[:, k : 2 * k], u[:, 2 * k : 3 * k]
    on = np.empty(draw.shape, bool)
    if dials.au_source == "chain":
        high, low = dials.chain_rates()
        on[:, 0] = draw[:, 0] < high[0]
        for column in range(1, k):
            on[:, column] = draw[:, column] < np.where(on[:, column - 1], high[column], low[column])
    else:
        on[:] = draw < dials.rates()
    on = np.where(follow < dials.identity_bias, habit, on)
    return np.where(on, _between(vary, dials.intensity), 0.0)


def sample(dials: FaceDials, seed: int, index: np.ndarray, *, camera: bool = True) -> Parameters:
    """Return all parameters of the rows ``index`` ``(N,)``: what is drawn and the noiseless truth.

    Keys include ``subject``, ``expression`` (index into the order ``faces``), ``intensity`` and ``side`` ``(N, 18)``,
    ``pitch``, ``yaw``, ``roll``, ``gaze_pitch``, ``gaze_yaw``, ``coefficient`` ``(N, C)`` and everything that
    ``render.render`` reads; without ``camera`` light, background and camera are left out, which labels do not need.
    """
    index = np.asarray(index, np.int64)
    u = uniform(seed, "row", index, 17)
    a = uniform(seed, "action", index, 3 * len(ACTION_UNITS))
    subject = np.minimum((u[:, 0] * dials.subjects).astype(np.int64), dials.subjects - 1)
    people, place = np.unique(subject, return_inverse=True)
    body = {key: value[place] for key, value in sample_subjects(dials, seed, people).items()}

    if dials.au_source == "expression":
        rates = np.asarray(dials.expression_rates or [1.0] * len(EXPRESSIONS))
        edges = np.cumsum(rates / rates.sum())[:-1]
        expression = np.searchsorted(edges, u[:, 1], side="right")
        expression = np.where(u[:, 2] < dials.identity_bias, body["favourite"], expression)
        intensity = _from_expression(dials, expression, a, u[:, 3])
    else:
        habit = uniform(seed, "habit", people, len(ACTION_UNITS)) < dials.rates()
        intensity = _from_rates(dials, a, habit[place])
        expression = expression_of(intensity)

    biased = _between((expression + 0.5) / len(EXPRESSIONS), dials.yaw)
    # Contempt pulls one corner of the mouth; everything else is nearly symmetric.
    side = np.repeat(0.3 * (u[:, 7:8] - 0.5), len(ACTION_UNITS), 1)
    contempt = expression == EXPRESSIONS.index(labels.CONTEMPT)
    for au in (12, 14):
        side[:, _COLUMN[au]] = np.where(contempt, np.where(u[:, 7] < 0.5, -0.9, 0.9), side[:, _COLUMN[au]])
    covered = u[:, 15] < dials.occluder
    parameters: Parameters = {
        "index": index,
        "subject": subject,
        "expression": expression,
        "intensity": intensity.astype(np.float32),
        "side": side.astype(np.float32),
        "pitch": _between(u[:, 4], dials.pitch),
        "yaw": np.where(u[:, 6] < dials.pose_bias, biased, _between(u[:, 5], dials.yaw)),
        "roll": _between(u[:, 8], dials.roll),
        "zoom": _between(u[:, 9], dials.zoom),
        "shift_x": dials.shift * (2 * u[:, 10] - 1),
        "shift_y": dials.shift * (2 * u[:, 11] - 1),
        "distance": _between(u[:, 12], (50.0, 90.0)),
        "gaze_pitch": dials.gaze * 0.6 * (2 * u[:, 13] - 1),
        "gaze_yaw": dials.gaze * (2 * u[:, 14] - 1),
        "occluder": np.where(covered, 1 + np.minimum((u[:, 16] * 4).astype(int), 3), 0),
        **body,
    }
    parameters["coefficient"] = coefficients(
        body["identity"], parameters["intensity"], parameters["side"], parameters["gaze_pitch"]
    )
    if camera:
        parameters |= _sample_camera(dials, seed, index, expression)
    return parameters


def _sample_camera(dials: FaceDials, seed: int, index: np.ndarray, expression: np.ndarray) -> Parameters:
    """Return light, background, places of occluders and the camera's blur and noise."""
    v = uniform(seed, "camera", index, 31)
    light = dials.light
    own = expression / len(EXPRESSIONS) + 0.04 * (v[:, 1] - 0.5)
    hue = np.where(v[:, 0] < dials.background_shortcut, own, v[:, 1]) % 1.0
    kinds = BACKGROUNDS[1:]
    if dials.background in kinds:
        background = np.full(len(index), kinds.index(dials.background))
    else:
        background = np.minimum((v[:, 2] * len(kinds)).astype(int), len(kinds) - 1)
    return {
        "light_azimuth": 15 + light * 70 * (2 * v[:, 4] - 1),
        "light_elevation": 25 + light * 30 * (2 * v[:, 5] - 1),
        "light_key": 0.75 + light * 0.35 * (2 * v[:, 6] - 1),
        "light_fill": 0.45 + light * 0.22 * (2 * v[:, 7] - 1),
        "light_warm": light * (2 * v[:, 8] - 1),
        "exposure": 1 + light * 0.22 * (2 * v[:, 9] - 1),
        "background": background,
        "background_hue": hue,
        "background_draw": v[:, 10:20],
        "occluder_draw": v[:, 21:28],
        "blur": dials.blur * v[:, 28],
        "noise": dials.noise * v[:, 29],
        "noise_key": v[:, 30],
    }


def pose_of(parameters: Parameters) -> Pose:
    """Return the pose of sampled rows."""
    return Pose(*(parameters[name] for name in Pose._fields))


def points_of(parameters: Parameters, image_size: int, chunk: int = 1024) -> dict[str, np.ndarray]:
    """Return the points and boxes of sampled rows (see ``geometry3d.landmarks``), in pieces that fit the cache."""
    pose = pose_of(parameters)
    count = len(parameters["index"])
    pieces = []
    for start in range(0, max(count, 1), chunk):
        rows = slice(start, start + chunk)
        pieces.append(
            landmarks(
                parameters["coefficient"][rows],
                Pose(*(values[rows] for values in pose)),
                parameters["gaze_pitch"][rows],
                parameters["gaze_yaw"][rows],
                image_size,
            )
        )
    return {key: np.concatenate([piece[key] for piece in pieces]) for key in pieces[0]}


# ---------------------------------------------------------------------------------------------------- labels


def attributes_of(parameters: Parameters) -> Parameters:
    """Return the binary attributes of sampled rows by name, each ``(N,)``."""
    style = parameters["hair_style"]
    return {
        "glasses": parameters["glasses"] > 0,
        "dark_glasses": parameters["glasses"] > 1,
        "beard": parameters["beard"] > 0,
        "freckles": parameters["freckles"] > 0,
        "long_hair": style == HAIR_STYLES.index("long"),
        "bald": style == HAIR_STYLES.index("bald"),
        "older": parameters["age"] > 0.6,
        "occluded": parameters["occluder"] > 0,
    }


def labels_of(dials: FaceDials, seed: int, parameters: Parameters, clean: bool = False) -> Parameters:
    """Return what an annotator writes down: labels with the dials' noise, and which families are missing.

    Args:
        dials: The dials.
        seed: The set's seed.
        parameters: Output of ``sample``.
        clean: Return the truth: no noise, nothing missing.

    Returns:
        ``occurrence`` ``(N, 18)``, ``intensity`` ``(N, 18)``, ``expression`` ``(N,)``, ``valence_arousal`` ``(N, 2)``
        and ``missing_<family>`` ``(N,)`` for each of ``FAMILIES``.
    """
    index = parameters["index"]
    k = len(ACTION_UNITS)
    intensity = parameters["intensity"].astype(np.float64)
    occurrence = intensity >= dials.au_threshold
    expression = parameters["expression"]
    affect = valence_arousal(intensity)
    hidden = {f"missing_{family}": np.zeros(len(index), bool) for family in FAMILIES}
    if not clean:
        noisy = (
            dials.au_flip,
            dials.au_missed,
            dials.intensity_noise,
            dials.expression_flip,
            dials.valence_arousal_noise,
        )
        u = (
            uniform(seed, "noise", index, 3 * k + 4)
            if any(np.any(value) for value in noisy)
            else np.ones((1, 3 * k + 4))
        )
        flip = np.broadcast_to(np.asarray(dials.au_flip), (k,))
        missed = np.broadcast_to(np.asarray(dials.au_missed), (k,))
        lost = occurrence & (u[:, k : 2 * k] < missed)
        occurrence = (occurrence ^ (u[:, :k] < flip)) & ~lost
        if dials.intensity_noise:
            intensity = np.clip(intensity + dials.intensity_noise * ndtri(u[:, 2 * k : 3 * k]), 0, 5)
        wrong = 1 + np.minimum((u[:, -3] * (len(EXPRESSIONS) - 1)).astype(int), len(EXPRESSIONS) - 2)
        replaced = u[:, -4] < dials.expression_flip
        expression = np.where(replaced, (expression + wrong) % len(EXPRESSIONS), expression)
        if dials.valence_arousal_noise:
            affect = np.clip(affect + dials.valence_arousal_noise * ndtri(u[:, -2:]), -1, 1)
        draws = uniform(seed, "missing", index, len(FAMILIES))
        for column, family in enumerate(FAMILIES):
            hidden[f"missing_{family}"] = draws[:, column] < getattr(dials, f"missing_{family}")
    return {
        "occurrence": occurrence,
        "intensity": intensity,
        "expression": expression,
        "valence_arousal": affect,
        **hidden,
    }
