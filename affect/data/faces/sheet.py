# SPDX-License-Identifier: Apache-2.0
"""Contact sheets of built-in faces, to look at what is drawn and labelled."""

from __future__ import annotations

from pathlib import Path

import cv2
import numpy as np

from affect.data.faces.dials import ACTION_UNITS, EXPRESSIONS, FaceDials
from affect.data.faces.render import render
from affect.data.faces.sample import labels_of, points_of, sample, valence_arousal


def sheet(
    dials: FaceDials,
    seed: int,
    indices: np.ndarray | list[int],
    path: str | Path | None = None,
    *,
    columns: int = 8,
    scheme: str | None = None,
    captions: bool = True,
) -> np.ndarray:
    """Return a contact sheet, RGB uint8 ``(H, W, 3)``, and write it as PNG if ``path`` is given.

    Args:
        dials: The dials of the set.
        seed: The seed of the set.
        indices: Rows to show.
        path: File to write; None writes nothing.
        columns: Faces per line.
        scheme: Landmark scheme to draw: ``68``, ``98`` or ``5``; None draws none.
        captions: Write expression, valence and arousal, and the action units with intensities below each face.
    """
    indices = np.asarray(indices, np.int64)
    parameters = sample(dials, seed, indices)
    names = labels_of(dials, seed, parameters, clean=True)
    points = points_of(parameters, dials.image_size)
    affect = valence_arousal(parameters["intensity"])
    size = dials.image_size
    strip = 34 if captions else 0
    lines = -(-len(indices) // columns)
    canvas = np.full((lines * (size + strip), columns * size, 3), 255, np.uint8)
    for k in range(len(indices)):
        image = render({key: values[k] for key, values in parameters.items()}, dials)
        if scheme is not None:
            for x, y in points[scheme][k]:
                cv2.circle(image, (round(float(x) * 16), round(float(y) * 16)), 14, (40, 255, 60), -1, cv2.LINE_AA, 4)
        top, left = (k // columns) * (size + strip), (k % columns) * size
        canvas[top : top + size, left : left + size] = image
        if captions:
            shown = [
                f"{au}:{value:.0f}"
                for au, value in zip(ACTION_UNITS, parameters["intensity"][k], strict=True)
                if value > 0
            ]
            text = f"{EXPRESSIONS[names['expression'][k]]} {affect[k, 0]:+.1f} {affect[k, 1]:+.1f}"
            for row, content in enumerate((text, " ".join(shown[:7]), " ".join(shown[7:]))):
                cv2.putText(
                    canvas,
                    content,
                    (left + 2, top + size + 10 + 11 * row),
                    cv2.FONT_HERSHEY_SIMPLEX,
                    0.3,
                    (0, 0, 0),
                    1,
                    cv2.LINE_AA,
                )
    if path is not None:
        done, data = cv2.imencode(".png", canvas[:, :, ::-1])
        if done:
            Path(path).write_bytes(data.tobytes())
    return canvas
