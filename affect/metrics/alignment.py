# SPDX-License-Identifier: Apache-2.0
"""Error of facial landmarks: normalised mean error, failure rate, and area under the cumulative error curve."""

from __future__ import annotations

from collections.abc import Mapping
from typing import ClassVar

import torch
from torch import Tensor

from affect.errors import ConfigError, DataError, near
from affect.labels import SCHEMES, LandmarkScheme
from affect.metrics.base import CHUNK, AdditiveMetric, prepare, ratio

NORMALISERS = ("inter_ocular", "inter_pupil", "box")


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


def alignment_statistics(
    values: Tensor,
    target: Tensor,
    mask: Tensor,
    scheme: LandmarkScheme,
    normaliser: str = "inter_ocular",
    threshold: float = 10.0,
) -> Tensor:
    r"""Return what each image adds, float64 ``(N, 5)``: 1, NME, NME > t, max(0, 1 - NME / t), skipped.

    .. math:: NME = \frac{100}{d\,|V|} \sum_{p \in V} \lVert \hat{x}_p - x_p \rVert_2

    with V the labelled points and d the normaliser. An image with labelled points but no d > 0 is skipped: it adds 1 to
    the last number only.

    Args:
        values: Predicted points in pixels ``(N, P, 2)``.
        target: True points in pixels ``(N, P, 2)``.
        mask: True where labelled, bool ``(N, P)``.
        scheme: The landmark scheme.
        normaliser: As for ``normaliser_length``.
        threshold: t in per cent.
    """
    values, target = prepare(values, target, mask)
    if values.ndim != 3 or values.shape[1:] != (scheme.points, 2):
        raise DataError(
            f"alignment error: points have shape {tuple(values.shape)}, scheme {scheme.name} needs "
            f"(N, {scheme.points}, 2)"
        )
    length = normaliser_length(target, mask, scheme, normaliser)
    distance = torch.where(mask, (values - target).norm(dim=2), 0).sum(1)
    labelled = mask.any(1)
    counted = labelled & (length > 0)
    error = torch.where(counted, 100 * ratio(distance, mask.sum(1) * length, 0.0), 0)
    area = torch.where(counted, (1 - error / threshold).clamp(min=0), 0)
    return torch.stack([counted.double(), error, (error > threshold).double(), area, (labelled & ~counted).double()], 1)


def mean_shape(target: Tensor, mask: Tensor) -> Tensor:
    """Return the mean of the labelled positions of each point, float64 ``(P, 2)``; 0 for a point never labelled."""
    _, target = prepare(target, target, mask)
    return ratio(target.sum(0), mask.sum(0).unsqueeze(-1), 0.0)


class AlignmentError(AdditiveMetric):
    """Landmark error over images: ``nme`` in per cent, ``fr/<t>``, ``auc/<t>``, and ``skipped``.

    Values and targets are points in pixels. ``fr`` is the share of images with NME > t. ``auc`` is the area under the
    cumulative error curve on [0, t] divided by t, exactly: the mean of max(0, 1 - NME / t). ``skipped`` counts images
    with labelled points whose normaliser is 0 or unlabelled; they are in none of the other numbers.

    The constant beside each number is that of the mean shape of the same images, for NME nearly but not exactly the
    best one.

    Args:
        scheme: Key of ``affect.labels.SCHEMES``.
        normaliser: ``inter_ocular``, ``inter_pupil`` or ``box``; see ``normaliser_length``.
        threshold: t in per cent; papers use 5, 8 or 10.
    """

    higher_is_better: ClassVar[Mapping[str, bool]] = {  # type: ignore[assignment, misc]
        "nme": False,
        "fr": False,
        "auc": True,
        "skipped": False,
    }
    counts: ClassVar[frozenset[str]] = frozenset({"skipped"})

    def __init__(self, scheme: str = "68", normaliser: str = "inter_ocular", threshold: float = 10.0) -> None:
        super().__init__()
        scheme = str(scheme)
        if scheme not in SCHEMES:
            raise ConfigError(f"unknown landmark scheme {scheme!r}: {near(scheme, SCHEMES)}")
        if normaliser not in NORMALISERS:
            raise ConfigError(f"unknown normaliser {normaliser!r}: {near(str(normaliser), NORMALISERS)}")
        if not threshold > 0:
            raise ConfigError(f"threshold={threshold}: must be more than 0 (per cent)")
        self.scheme, self.normaliser, self.threshold = SCHEMES[scheme], normaliser, float(threshold)

    @property
    def summaries(self) -> tuple[str, ...]:
        return ("nme", f"fr/{self.threshold:g}", f"auc/{self.threshold:g}", "skipped")

    def shape(self, outputs: int) -> tuple[int, ...]:
        return (5,)

    def statistics(self, values: Tensor, target: Tensor, mask: Tensor) -> Tensor:
        return alignment_statistics(values, target, mask, self.scheme, self.normaliser, self.threshold)

    def scores(self, total: Tensor) -> dict[str, Tensor]:
        images, *sums, skipped = total.unbind(-1)
        return dict(zip(self.summaries, [*(ratio(each, images, torch.nan) for each in sums), skipped], strict=True))

    def best_constant(self, total: Tensor) -> dict[str, Tensor]:
        """Return NaN: the mean shape does not follow from sums; ``constants`` has its error."""
        return {name: numbers * torch.nan for name, numbers in self.scores(total).items()}

    def constants(self, target: Tensor, mask: Tensor) -> dict[str, Tensor]:
        self.require_bound()
        constant = mean_shape(target, mask).expand(target.shape)
        return self.score(constant, target, mask)

    def sizes(self, target: Tensor, mask: Tensor) -> dict[str, int]:
        lengths = [
            normaliser_length(points, cells, self.scheme, self.normaliser)
            for points, cells in zip(target.split(CHUNK), mask.split(CHUNK), strict=True)
        ]
        counted = int((mask.any(1) & (torch.cat(lengths) > 0)).sum())
        return {name: int(mask.any(1).sum()) if name == "skipped" else counted for name in self.summaries}
