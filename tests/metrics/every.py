# SPDX-License-Identifier: Apache-2.0
"""All metrics with data for them, for tests that treat all alike."""

from __future__ import annotations

import torch
from torch import Tensor

from affect.metrics import AUC, CCC, F1, ICC, MAE, PCC, RMSE, SAGR, AlignmentError, BinaryRates, Classification, Metric
from affect.metrics import PoseMAE as Pose


def every_metric() -> dict[str, tuple[Metric, tuple[Tensor, Tensor, Tensor]]]:
    """Return each metric, bound, with values, targets and masks of 90 samples; the same ones at every call."""
    generator = torch.Generator().manual_seed(21)
    size = 90
    mask = torch.rand(size, 2, generator=generator) < 0.8
    present = (torch.rand(size, 2, generator=generator) < 0.4).float()
    binary = ((present + torch.randn(size, 2, generator=generator)).sigmoid(), present, mask)
    label = torch.randn(size, 2, generator=generator).tanh()
    continuous = (0.7 * label + 0.3 * torch.randn(size, 2, generator=generator), label, mask)
    angles = (100 * torch.randn(size, 2, generator=generator), 100 * torch.randn(size, 2, generator=generator), mask)
    one_hot = torch.nn.functional.one_hot(torch.randint(3, (size,), generator=generator), 3).float()
    softmax = (one_hot + torch.randn(size, 3, generator=generator)).softmax(1)
    classes = (softmax, one_hot, (torch.rand(size, 1, generator=generator) < 0.8).expand(-1, 3).clone())
    points = 100 * torch.rand(size, 5, 2, generator=generator)
    moved = points + 5 * torch.randn(size, 5, 2, generator=generator)
    landmarks = (moved, points, torch.rand(size, 5, generator=generator) < 0.9)
    metrics = {
        "f1": (F1(), binary),
        "rates": (BinaryRates(), binary),
        "auc": (AUC(), binary),
        "classification": (Classification(), classes),
        "ccc": (CCC(), continuous),
        "pcc": (PCC(), continuous),
        "icc": (ICC(), continuous),
        "sagr": (SAGR(), continuous),
        "rmse": (RMSE(), continuous),
        "mae": (MAE(), continuous),
        "pose": (Pose(), angles),
        "alignment": (AlignmentError("5"), landmarks),
    }
    for metric, data in metrics.values():
        metric.bind([f"output{k}" for k in range(data[2].shape[1])])
    return metrics
