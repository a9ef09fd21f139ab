# SPDX-License-Identifier: Apache-2.0
"""Weights of outputs and classes, given as a list or counted on the coded training cells."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence

import numpy as np
import torch
from torch import Tensor, nn

from affect.errors import ConfigError, near
from affect.losses.base import Encoded

Rule = Callable[[Sequence[Encoded]], np.ndarray]


def count_positives(encoded: Sequence[Encoded]) -> tuple[np.ndarray, np.ndarray]:
    """Return per output the sum of targets over coded cells and the number of coded cells, float64 ``(K,)`` each."""
    positives = sum(np.where(part.mask, part.target, 0).sum(0, dtype=np.float64) for part in encoded)
    coded = sum(part.mask.sum(0, dtype=np.float64) for part in encoded)
    return np.asarray(positives), np.asarray(coded)


def inverse_rates(encoded: Sequence[Encoded]) -> np.ndarray:
    """Return ``w_k = K (1 / rate_k) / sum_j (1 / rate_j)``, the usual weights of action units, float64 ``(K,)``.

    The rate is the mean target of the coded cells; an output without any positive counts as if it had one. An output
    without coded cells has weight 1 and the others are scaled among themselves, so the weights always sum to K.
    Source: JAA-Net (arXiv 2003.08834), ME-GraphAU (arXiv 2205.01782).
    """
    positives, coded = count_positives(encoded)
    weights = np.ones_like(coded)
    known = coded > 0
    inverse = coded[known] / np.maximum(positives[known], 1)
    weights[known] = inverse * (known.sum() / inverse.sum()) if known.any() else 1
    return weights


def negatives_per_positive(encoded: Sequence[Encoded], limit: float) -> np.ndarray:
    """Return negatives divided by positives per output, clipped to ``[1 / limit, limit]``, float64 ``(K,)``.

    An output without coded cells has weight 1.
    """
    positives, coded = count_positives(encoded)
    ratio = np.divide(coded - positives, positives, out=np.full_like(coded, limit), where=positives > 0)
    return np.where(coded > 0, np.clip(ratio, 1 / limit, limit), 1.0)


def inverse_frequencies(encoded: Sequence[Encoded]) -> np.ndarray:
    """Return ``w_c = N / (C n_c)`` per class, float64 ``(C,)``; their mean over the training rows is 1.

    ``n_c`` is the sum of the targets of class c over the N labelled rows and C the number of classes that occur (what
    scikit-learn calls balanced). A class that never occurs has weight 1.
    """
    counts, _ = count_positives(encoded)
    seen = counts > 0
    weights = np.ones_like(counts)
    weights[seen] = counts.sum() / (max(int(seen.sum()), 1) * counts[seen])
    return weights


class Weights(nn.Module):
    """Weights of K outputs: none, a fixed list, or a rule that is applied to the training labels.

    Counted weights are no part of the state dictionary: they follow from the training labels, which a resumed run
    counts again.

    Args:
        setting: None, a list of K numbers, or the name of a rule.
        rules: Rules by name.
        key: Name of the setting, for messages.
    """

    values: Tensor | None

    def __init__(self, setting: str | Sequence[float] | None, rules: Mapping[str, Rule], key: str = "weights") -> None:
        super().__init__()
        self.key, self.rule, self.rule_name = key, None, None
        fixed = None
        if isinstance(setting, str):
            if setting not in rules:
                raise ConfigError(f"{key}={setting!r}: give null, a list, or a rule; {near(setting, rules)}")
            self.rule, self.rule_name = rules[setting], setting
        elif setting is not None:
            fixed = torch.tensor([float(value) for value in setting])
            if not fixed.isfinite().all() or (fixed < 0).any():
                raise ConfigError(f"{key}={fixed.tolist()}: weights must be finite and not negative")
        self.register_buffer("values", fixed, persistent=False)

    def fit(self, encoded: Sequence[Encoded]) -> None:
        """Apply the rule, if there is one, to the coded training cells."""
        if self.rule is not None and encoded:
            counted = torch.as_tensor(self.rule(encoded), dtype=torch.float32)
            self.values = counted if self.values is None else counted.to(self.values.device)

    def forward(self, like: Tensor) -> Tensor | None:
        """Return the weights ``(K,)`` in type and device of ``like`` ``(…, K)``; None where there are none.

        Raises:
            ConfigError: If the list has another length than the task has outputs, or a rule was not fitted.
        """
        if self.values is None:
            if self.rule is not None:
                raise ConfigError(f"{self.key}={self.rule_name!r} is counted on training labels: call fit() first")
            return None
        if len(self.values) != like.shape[-1]:
            raise ConfigError(
                f"{self.key} has {len(self.values)} numbers but the task has {like.shape[-1]} outputs; give one each"
            )
        return self.values.to(like)
