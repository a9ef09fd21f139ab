# SPDX-License-Identifier: Apache-2.0
"""The dials of the built-in faces: every property and nuisance of a drawn set in one frozen dataclass."""

from __future__ import annotations

from dataclasses import dataclass, fields
from typing import get_type_hints

import numpy as np

from affect import labels
from affect.errors import ConfigError, near

ACTION_UNITS = labels.AU_SETS["faces"]
EXPRESSIONS = labels.EXPRESSION_ORDERS["faces"]
AU_SOURCES = ("expression", "independent", "chain")
BACKGROUNDS = ("mixed", "plain", "gradient", "blurred", "pattern")


@dataclass(frozen=True)
class FaceDials:
    """What is drawn and how the labels are disturbed. Angles in degrees, probabilities and strengths in [0, 1].

    All values are scalars or tuples, so that a dials object can be written as YAML or JSON and compared. Ranges are
    (low, high) and drawn uniformly.

    Attributes:
        image_size: Side of the square image in pixels.
        subjects: Number of different people; each row shows one of them.
        pitch: Range of head pitch; > 0 looks down.
        yaw: Range of head yaw; > 0 turns to the image's right.
        roll: Range of head roll; > 0 tilts clockwise.
        zoom: Range of the face's size; at 1 the image's side shows 22 cm at the face's depth.
        shift: Largest shift of the face's centre, as a fraction of the image's side.
        gaze: Largest rotation of the eyes in the head, each axis.
        light: Strength of the light's variation: 0 is a fixed frontal light, 1 any direction in front, any colour.
        occluder: Probability of an object in front of a part of the face.
        glasses: Probability that a subject wears glasses (a quarter of them dark).
        beard: Probability that a subject has a beard or a moustache.
        blur: Largest blur of the camera, standard deviation as a fraction of the image's side.
        noise: Largest camera noise, standard deviation in grey levels.
        background: One of ``mixed``, ``plain``, ``gradient``, ``blurred``, ``pattern``.
        au_source: ``expression`` draws an expression and then its action units (with the variation of real displays);
            ``independent`` draws each action unit by its rate; ``chain`` draws AU_k given AU_(k-1). In the last two
            the expression is the best match of the drawn action units.
        expression_rates: Relative rate of each class of ``labels.EXPRESSION_ORDERS["faces"]``; empty is uniform.
        au_rates: For ``independent`` and ``chain``: probability of each action unit of ``labels.AU_SETS["faces"]``, or
            one number for all. For ``expression``: probability that an action unit outside the prototype joins, as a
            multiple of the built-in rates, so that 1 is usual and 0 gives pure prototypes (one number only).
        au_dependency: For ``chain``: how much AU_k depends on AU_(k-1). The conditional rate is
            P(1|1) = r + d (1 - r); P(1|0) is what keeps the marginal rate at r.
        au_threshold: An action unit occurs where its intensity reaches this (0 to 5).
        intensity: Range of the intensity of an action unit that occurs.
        au_flip: Probability that an occurrence label is flipped, one number or one per action unit.
        au_missed: Probability that a positive occurrence label is missed (becomes 0), one number or one per AU.
        intensity_noise: Standard deviation of the noise on intensity labels, in FACS units.
        expression_flip: Probability that the expression label is replaced by another class.
        valence_arousal_noise: Standard deviation of the noise on valence and arousal labels.
        background_shortcut: Probability that the background's hue is the one that belongs to the expression.
        identity_bias: Probability that a row shows its subject's own favourite expression (``expression``), or
            that an action unit follows the subject's habit (``independent`` and ``chain``).
        pose_bias: Probability that the yaw is the one that belongs to the expression.
        missing_au: Probability that all action unit labels of a row are null.
        missing_expression: Probability that the expression of a row is null.
        missing_valence_arousal: Probability that valence and arousal of a row are null.
        missing_landmarks: Probability that the points and the box of a row are null.
    """

    image_size: int = 128
    subjects: int = 200
    pitch: tuple[float, float] = (-12.0, 12.0)
    yaw: tuple[float, float] = (-25.0, 25.0)
    roll: tuple[float, float] = (-10.0, 10.0)
    zoom: tuple[float, float] = (0.78, 0.94)
    shift: float = 0.03
    gaze: float = 10.0
    light: float = 0.6
    occluder: float = 0.1
    glasses: float = 0.15
    beard: float = 0.2
    blur: float = 0.004
    noise: float = 4.0
    background: str = "mixed"
    au_source: str = "expression"
    expression_rates: tuple[float, ...] = ()
    au_rates: float | tuple[float, ...] = 1.0
    au_dependency: float = 0.0
    au_threshold: float = 1.0
    intensity: tuple[float, float] = (1.5, 5.0)
    au_flip: float | tuple[float, ...] = 0.0
    au_missed: float | tuple[float, ...] = 0.0
    intensity_noise: float = 0.0
    expression_flip: float = 0.0
    valence_arousal_noise: float = 0.0
    background_shortcut: float = 0.0
    identity_bias: float = 0.0
    pose_bias: float = 0.0
    missing_au: float = 0.0
    missing_expression: float = 0.0
    missing_valence_arousal: float = 0.0
    missing_landmarks: float = 0.0

    def __post_init__(self) -> None:
        for item in fields(self):
            value = getattr(self, item.name)
            if isinstance(value, (list, tuple)) or type(value).__name__ == "ListConfig":
                object.__setattr__(self, item.name, tuple(float(entry) for entry in value))
        self._check()

    def _check(self) -> None:
        hints = get_type_hints(type(self))
        for item in fields(self):
            value = getattr(self, item.name)
            if hints[item.name] is not str and (
                isinstance(value, (str, bool)) or value is None or not np.all(np.isfinite(value))
            ):
                raise ConfigError(f"faces.{item.name}={value!r}: must be a finite number or a list of such")
            if hints[item.name] in (int, float) and isinstance(value, tuple):
                raise ConfigError(f"faces.{item.name}={list(value)}: must be one number")
        for name, least in (("image_size", 24), ("subjects", 1)):
            value = getattr(self, name)
            if int(value) != value or value < least:
                raise ConfigError(f"faces.{name}={value}: must be a whole number of at least {least}")
            object.__setattr__(self, name, int(value))
        limits = {"pitch": (-60, 60), "yaw": (-90, 90), "roll": (-180, 180), "zoom": (0.2, 3), "intensity": (0, 5)}
        for name, (low, high) in limits.items():
            value = getattr(self, name)
            if not isinstance(value, tuple) or len(value) != 2 or not low <= value[0] <= value[1] <= high:
                raise ConfigError(f"faces.{name}={value}: must be [low, high] with {low} <= low <= high <= {high}")
        for name in (
            *("light", "occluder", "glasses", "beard", "au_dependency", "au_flip", "au_missed", "expression_flip"),
            *("background_shortcut", "identity_bias", "pose_bias", "missing_au", "missing_expression"),
            *("missing_valence_arousal", "missing_landmarks"),
        ):
            value = np.asarray(getattr(self, name))
            if (value < 0).any() or (value > 1).any():
                raise ConfigError(f"faces.{name}={getattr(self, name)}: must lie in [0, 1]")
        for name, most in (
            *(("shift", 0.5), ("gaze", 40), ("blur", 0.1), ("noise", 128), ("au_threshold", 5)),
            *(("intensity_noise", 5), ("valence_arousal_noise", 2)),
        ):
            if not 0 <= getattr(self, name) <= most:
                raise ConfigError(f"faces.{name}={getattr(self, name)}: must lie in [0, {most}]")
        for name, options in (("background", BACKGROUNDS), ("au_source", AU_SOURCES)):
            if getattr(self, name) not in options:
                value = getattr(self, name)
                raise ConfigError(f"faces.{name}={value!r}: unknown; {near(str(value), options)}")
        if self.au_threshold > self.intensity[0]:
            raise ConfigError(
                f"faces.intensity={list(self.intensity)} starts below au_threshold={self.au_threshold}: an action unit "
                "that is drawn must occur; raise the first number"
            )
        for name in ("au_rates", "au_flip", "au_missed"):
            value = getattr(self, name)
            if isinstance(value, tuple) and len(value) != len(ACTION_UNITS):
                raise ConfigError(
                    f"faces.{name} has {len(value)} entries: give one number or {len(ACTION_UNITS)}, one for each of "
                    f"{', '.join(map(labels.au_output, ACTION_UNITS))}"
                )
        if self.expression_rates and (
            len(self.expression_rates) != len(EXPRESSIONS)
            or min(self.expression_rates) < 0
            or sum(self.expression_rates) <= 0
        ):
            raise ConfigError(
                f"faces.expression_rates={list(self.expression_rates)}: give {len(EXPRESSIONS)} rates >= 0, one for "
                f"each of {', '.join(EXPRESSIONS)}"
            )
        rates = np.asarray(self.au_rates)
        if (rates < 0).any() or (self.au_source != "expression" and (rates > 1).any()):
            raise ConfigError(f"faces.au_rates={self.au_rates}: rates of action units must lie in [0, 1]")
        if self.au_source == "expression" and isinstance(self.au_rates, tuple):
            raise ConfigError(
                "faces.au_rates is a list but au_source=expression: set au_source=independent or chain, or one number"
            )
        if self.au_source != "expression" and np.ndim(self.au_rates) == 0 and self.au_rates == 1:
            raise ConfigError(
                f"faces.au_rates=1 with au_source={self.au_source} shows every action unit always; lower it"
            )
        if self.au_source == "chain":
            self._check_chain()

    def _check_chain(self) -> None:
        rates, (_, off) = self.rates(), self.chain_rates()
        bad = np.flatnonzero((off < -1e-9) | (off > 1 + 1e-9))
        if len(bad):
            k = int(bad[0])
            raise ConfigError(
                f"faces.au_dependency={self.au_dependency}: {labels.au_output(ACTION_UNITS[k])} (rate {rates[k]:g}) "
                f"cannot depend so much on {labels.au_output(ACTION_UNITS[k - 1])} (rate {rates[k - 1]:g}); lower it "
                "or bring the rates nearer to each other"
            )

    def rates(self) -> np.ndarray:
        """Return ``au_rates`` as one number per action unit, ``(18,)``."""
        return np.broadcast_to(np.asarray(self.au_rates, np.float64), (len(ACTION_UNITS),))

    def chain_rates(self) -> tuple[np.ndarray, np.ndarray]:
        """Return P(AU_k = 1 | AU_(k-1) = 1) and P(AU_k = 1 | AU_(k-1) = 0), each ``(18,)``; the first is marginal."""
        rates = self.rates()
        before = np.concatenate([[0.0], rates[:-1]])
        on = rates + self.au_dependency * (1 - rates)
        off = np.where(before < 1, (rates - before * on) / np.maximum(1 - before, 1e-12), rates)
        on[0] = off[0] = rates[0]
        return on, off
