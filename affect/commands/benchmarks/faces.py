# SPDX-License-Identifier: Apache-2.0
"""How fast the built-in faces are drawn, and how models that learnt from photographs judge them."""

from __future__ import annotations

import time
from typing import Any

import numpy as np

from affect.data.faces import FaceDials, FaceImages


def speed(side: int, count: int, rounds: int) -> float:
    """Return faces per second at ``side`` pixels on this thread, the best of ``rounds``."""
    images = FaceImages(FaceDials(image_size=side), seed=1)
    images.read(np.arange(8))
    best = 0.0
    for k in range(rounds):
        start = time.perf_counter()
        images.read(np.arange(k * count, (k + 1) * count))
        best = max(best, count / (time.perf_counter() - start))
    return best


def measure(quick: bool) -> list[dict[str, Any]]:
    """Return rows of name and figure: speed, then the judges' figures where their packages are installed."""
    count, rounds = (20, 1) if quick else (200, 5)
    rows = [
        {"figure": f"faces/s at {side} px, one thread", "value": speed(side, count, rounds), "judge": "clock"}
        for side in (96, 128, 224)
    ]
    from affect.data.faces import judge

    return rows + judge.rows(quick)
