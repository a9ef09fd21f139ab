# SPDX-License-Identifier: Apache-2.0
"""Cross-entropy over classes with soft targets, where some sources cannot label some classes."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from affect.errors import ConfigError
from affect.losses.base import Encoded, Loss, Terms, prepare
from affect.losses.weights import Weights, inverse_frequencies


def cross_entropy(
    output: Tensor, target: Tensor, mask: Tensor, smoothing: float = 0.0, weights: Tensor | None = None
) -> Tensor:
    r"""Return the cross-entropy of each row, ``(B,)``; 0 for a row without label.

    .. math:: -\sum_c w_c \left((1 - s)\, y_c + \frac{s}{|M|}\right) \log \frac{e^{z_c}}{\sum_{j \in M} e^{z_j}}

    where M are the classes with a True mask in the row: a class that the row's source can never label takes no part in
    the softmax (its logit counts as minus infinity), in the smoothing or in the gradient. A row without any True is
    unlabelled.

    Args:
        output: Logits z ``(B, C)``.
        target: Distribution y over classes ``(B, C)``; one-hot for hard labels. It is not normalised here.
        mask: True for the classes that the row's source can label, bool ``(B, C)``.
        smoothing: Share s of the target spread evenly over the possible classes, in [0, 1).
        weights: Weight w of each class ``(C,)``; None is 1.

    Example:
        >>> label = torch.tensor([[0.0, 1.0, 0.0]])
        >>> cross_entropy(torch.zeros(1, 3), label, torch.tensor([[True, True, False]]))  # log 2
        tensor([0.6931])
    """
    logit, label = prepare(output, target, mask)
    labelled = mask.any(1, keepdim=True)
    # An unlabelled row keeps all classes: a softmax over none of them would put NaN into the graph.
    possible = mask | ~labelled
    log_probability = torch.where(possible, logit, -torch.inf).log_softmax(1)
    if smoothing > 0:
        label = (1 - smoothing) * label + smoothing / possible.sum(1, keepdim=True)
    if weights is not None:
        label = label * weights
    # Both factors are blanked: 0 times minus infinity would be NaN.
    return -(torch.where(mask, label, 0) * torch.where(mask, log_probability, 0)).sum(1)


class CrossEntropy(Loss):
    """Cross-entropy over classes; ``Terms`` of shape ``(1,)``, the count is the number of labelled rows.

    With class weights the count stays the number of rows (as torch has it for soft targets), so a batch of rare classes
    weighs more and the gradient's expectation does not depend on the batch size.

    Args:
        smoothing: Share of the target spread evenly over the possible classes, in [0, 1).
        weights: Weight of each class: None, ``"inverse_frequency"`` (1 / count in the training rows, scaled so that the
            mean over training rows is 1), or a list in class order.
    """

    def __init__(self, smoothing: float = 0.0, weights: str | Sequence[float] | None = None) -> None:
        super().__init__()
        if not 0 <= smoothing < 1:
            raise ConfigError(f"smoothing={smoothing}: must lie in [0, 1)")
        self.smoothing = float(smoothing)
        self.weights = Weights(weights, {"inverse_frequency": inverse_frequencies})

    def fit(self, encoded: Sequence[Encoded]) -> None:
        self.weights.fit(encoded)

    def forward(self, output: Tensor, target: Tensor, mask: Tensor) -> Terms:
        values = cross_entropy(output, target, mask, self.smoothing, self.weights(output))
        labelled = mask.any(1)
        return Terms(values.sum(0, keepdim=True), labelled.sum(0, keepdim=True).to(values.dtype))
