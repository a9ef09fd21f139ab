# SPDX-License-Identifier: Apache-2.0
"""Error of facial landmarks: normalised mean error, failure rate, and area under the cumulative error curve."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import ClassVar

import torch
from torch import Tensor

from affect.errors import ConfigError, DataError, near
from affect.labels import NORMALISERS, SCHEMES, LandmarkScheme
from affect.metrics.base import CHUNK, AdditiveMetric, prepare, ratio


def normaliser_length(target: Tensor, mask: Tensor, scheme: LandmarkScheme, normaliser: str) -> Tensor:
    """Return the length by which each image's error is divided, in pixels, ``(N,)``; 0 where it is unknown.

    Args:
        target: True points in pixels ``(N, P, 2)``.
        mask: True where labelled, bool ``(N, P)``.
        scheme: Which points are the eyes'.
        normaliser: ``inter_ocular`` (distance of the outer eye corners), ``inter_pupil`` (distance of the eyes'
            centres, each the mean of its points) or ``box`` (square root of width times height of the box around the
            labelled points). The points that it needs must be labelled; ``box`` needs two.
    """
    if normaliser == "box":
        cells = mask.unsqueeze(-1)
        low = torch.where(cells, target, torch.inf).amin(1)
        high = torch.where(cells, target, -torch.inf).amax(1)
        return torch.where(mask.sum(1) >= 2, (high - low).prod(1).clamp(min=0).sqrt(), 0)
    corners = [[corner] for corner in scheme.eye_corners]
    left, right = corners if normaliser == "inter_ocular" else [list(scheme.left_eye), list(scheme.right_eye)]
    known = mask[:, left + right].all(1)
    length = (target[:, left].mean(1) - target[:, right].mean(1)).norm(dim=1)
    return torch.where(known, length, 0)


def image_errors(
    values: Tensor, target: Tensor, mask: Tensor, scheme: LandmarkScheme, normaliser: str = "inter_ocular"
) -> Tensor:
    r"""Return the normalised mean error of each image in per cent, float64 ``(N,)``; NaN where there is none.

    .. math:: NME = \frac{100}{d\,|V|} \sum_{p \in V} \lVert \hat{x}_p - x_p \rVert_2

    with V the labelled points and d the normaliser. An image without labelled points, or without d > 0, has none.

    Args:
        values: Predicted points in pixels ``(N, P, 2)``.
        target: True points in pixels ``(N, P, 2)``.
        mask: True where labelled, bool ``(N, P)``.
        scheme: The landmark scheme.
        normaliser: As for ``normaliser_length``.

    Raises:
        DataError: If the points are not those of the scheme.
    """
    values, target = prepare(values, target, mask)
    if values.ndim != 3 or values.shape[1:] != (scheme.points, 2):
        raise DataError(
            f"alignment error: points have shape {tuple(values.shape)}, scheme {scheme.name} needs "
            f"(N, {scheme.points}, 2)"
        )
    length = normaliser_length(target, mask, scheme, normaliser)
    distance = torch.where(mask, (values - target).norm(dim=2), 0).sum(1)
    return 100 * ratio(distance, mask.sum(1) * length, torch.nan)


def alignment_statistics(
    values: Tensor,
    target: Tensor,
    mask: Tensor,
    scheme: LandmarkScheme,
    normalisers: Sequence[str] = ("inter_ocular",),
    thresholds: Sequence[float] = (10.0,),
) -> Tensor:
    """Return what each image adds, float64 ``(N, 2 + 2 T + 1 + 2 (D - 1))``.

    These are for the first normaliser 1, the NME, NME > t for each of T thresholds, max(0, 1 - NME / t) for each, and
    skipped; for each of the other D - 1 normalisers 1 and its NME. An image with labelled points but no length d > 0
    is skipped: it adds 1 to that number only.

    Args:
        values: Predicted points in pixels ``(N, P, 2)``.
        target: True points in pixels ``(N, P, 2)``.
        mask: True where labelled, bool ``(N, P)``.
        scheme: The landmark scheme.
        normalisers: As for ``normaliser_length``, the main one first.
        thresholds: Each t in per cent.
    """
    error = image_errors(values, target, mask, scheme, normalisers[0])
    counted = ~error.isnan()
    error = error.nan_to_num(0.0)
    failed = [(error > threshold).double() for threshold in thresholds]
    areas = [torch.where(counted, (1 - error / threshold).clamp(min=0), 0) for threshold in thresholds]
    columns = [counted.double(), error, *failed, *areas, (mask.any(1) & ~counted).double()]
    for normaliser in normalisers[1:]:
        other = image_errors(values, target, mask, scheme, normaliser)
        columns += [(~other.isnan()).double(), other.nan_to_num(0.0)]
    return torch.stack(columns, 1)


def mean_shape(target: Tensor, mask: Tensor) -> Tensor:
    """Return the mean of the labelled positions of each point, float64 ``(P, 2)``; 0 for a point never labelled."""
    _, target = prepare(target, target, mask)
    return ratio(target.sum(0), mask.sum(0).unsqueeze(-1), 0.0)


class AlignmentError(AdditiveMetric):
    """Landmark error over images: ``nme`` in per cent, ``fr/<t>``, ``auc/<t>``, and ``skipped``.

    Values and targets are points in pixels. ``fr`` is the share of images with NME > t. ``auc`` is the area under the
    cumulative error curve on [0, t] divided by t, exactly: the mean of max(0, 1 - NME / t). ``skipped`` counts images
    with labelled points whose normaliser is 0 or unlabelled; they are in none of the other numbers. Further normalisers
    give one number each, ``nme/<normaliser>``, over the images that have that length.

    The constant beside each number is that of the mean shape of the same images, for NME nearly but not exactly the
    best one.

    Args:
        scheme: Key of ``affect.labels.SCHEMES``.
        normaliser: ``inter_ocular``, ``inter_pupil`` or ``box``; see ``normaliser_length``. Of a list the first is the
            one of ``nme``, ``fr`` and ``auc``.
        threshold: t in per cent; papers use 5, 8 or 10. A list gives FR and AUC at each.
    """

    higher_is_better: ClassVar[Mapping[str, bool]] = {  # type: ignore[assignment, misc]
        "nme": False,
        "fr": False,
        "auc": True,
        "skipped": False,
    }
    counts: ClassVar[frozenset[str]] = frozenset({"skipped"})

    def __init__(
        self,
        scheme: str = "68",
        normaliser: str | Sequence[str] = "inter_ocular",
        threshold: float | Sequence[float] = 10.0,
    ) -> None:
        super().__init__()
        scheme = str(scheme)
        if scheme not in SCHEMES:
            raise ConfigError(f"unknown landmark scheme {scheme!r}: {near(scheme, SCHEMES)}")
        normalisers = [normaliser] if isinstance(normaliser, str) else list(normaliser)
        for name in normalisers:
            if name not in NORMALISERS:
                raise ConfigError(f"unknown normaliser {name!r}: {near(str(name), NORMALISERS)}")
        thresholds = [threshold] if isinstance(threshold, int | float) else list(threshold)
        for given in thresholds:
            if not given > 0:
                raise ConfigError(f"threshold={given}: must be more than 0 (per cent)")
        for key, listed in (("normaliser", normalisers), ("threshold", thresholds)):
            if not listed or len(set(listed)) < len(listed):
                raise ConfigError(f"{key}={listed}: name at least one, and each once")
        self.scheme, self.normalisers = SCHEMES[scheme], tuple(normalisers)
        self.thresholds = tuple(float(given) for given in thresholds)

    @property
    def normaliser(self) -> str:
        """Length that ``nme``, ``fr`` and ``auc`` are measured in."""
        return self.normalisers[0]

    @property
    def summaries(self) -> tuple[str, ...]:
        rates = [f"{name}/{threshold:g}" for name in ("fr", "auc") for threshold in self.thresholds]
        return ("nme", *rates, "skipped", *(f"nme/{name}" for name in self.normalisers[1:]))

    def shape(self, outputs: int) -> tuple[int, ...]:
        return (3 + 2 * len(self.thresholds) + 2 * (len(self.normalisers) - 1),)

    def statistics(self, values: Tensor, target: Tensor, mask: Tensor) -> Tensor:
        return alignment_statistics(values, target, mask, self.scheme, self.normalisers, self.thresholds)

    def scores(self, total: Tensor) -> dict[str, Tensor]:
        own = 2 + 2 * len(self.thresholds)
        images, *sums = total[..., :own].unbind(-1)
        further = total[..., own + 1 :].unflatten(-1, (-1, 2)) if len(self.normalisers) > 1 else None
        numbers = [*(ratio(each, images, torch.nan) for each in sums), total[..., own]]
        if further is not None:
            numbers += ratio(further[..., 1], further[..., 0], torch.nan).unbind(-1)
        return dict(zip(self.summaries, numbers, strict=True))

    def best_constant(self, total: Tensor) -> dict[str, Tensor]:
        """Return NaN: the mean shape does not follow from sums; ``constants`` has its error."""
        return {name: numbers * torch.nan for name, numbers in self.scores(total).items()}

    def constants(self, target: Tensor, mask: Tensor) -> dict[str, Tensor]:
        self.require_bound()
        constant = mean_shape(target, mask).expand(target.shape)
        return self.score(constant, target, mask)

    def sizes(self, target: Tensor, mask: Tensor) -> dict[str, int]:
        def counted(normaliser: str) -> int:
            parts = zip(target.split(CHUNK), mask.split(CHUNK), strict=True)
            lengths = [normaliser_length(points, cells, self.scheme, normaliser) for points, cells in parts]
            return int((mask.any(1) & (torch.cat(lengths) > 0)).sum())

        sizes = dict.fromkeys(self.summaries, counted(self.normaliser)) | {"skipped": int(mask.any(1).sum())}
        return sizes | {f"nme/{name}": counted(name) for name in self.normalisers[1:]}
