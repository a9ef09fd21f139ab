# SPDX-License-Identifier: Apache-2.0
"""Crops, augmentation, maps, points and errors agree on where a pixel is, from the stored image and back to it."""

from __future__ import annotations

import numpy as np
import pytest
import torch

from affect import labels
from affect.commands.inference import predict_values, predictions_table, table_metrics
from affect.data.dataset import FaceDataset
from affect.data.images import Source
from affect.data.table import FaceTable
from affect.data.transforms import FaceTransform
from affect.encoders import Pixels
from affect.geometry.alignment import CropRecipe, scale_of
from affect.geometry.heatmaps import expected_points
from affect.models.decafa import Decafa
from affect.models.decafa.network import StageOutput
from tests.models.decafa.parts import make_tasks

SIZE, FACES = 64, 12
COLOURS = torch.tensor([(1, 0, 0), (0, 1, 0), (0, 0, 1), (1, 1, 0), (0, 1, 1)]).bool()
"""Of the dot at each of five points."""

CELLS = np.array([(30, 30), (90, 30), (60, 60), (35, 95), (85, 95)], float)
"""About where the points are, far enough from each other that dots do not touch."""


def stored_points() -> np.ndarray:
    """Return points ``(N, 5, 2)`` between pixels of images of 140 x 170 px."""
    return CELLS + np.random.default_rng(0).uniform(-7, 7, (FACES, 5, 2)) + [20, 5]


class Dots:
    """Images with a soft coloured dot at each point."""

    def __init__(self, points: np.ndarray) -> None:
        self.points = points

    def read(self, rows: np.ndarray) -> list[np.ndarray]:
        y, x = np.mgrid[:140, :170]
        found = []
        for row in rows:
            image = np.zeros((140, 170, 3))
            for (px, py), colour in zip(self.points[row], COLOURS.numpy(), strict=True):
                image += 255 * np.exp(-((x - px) ** 2 + (y - py) ** 2) / (2 * 3.0**2))[..., None] * colour
            found.append(image.clip(0, 255).astype(np.uint8))
        return found


class Seeing(Decafa):
    """A cascade whose maps are the dots of the crop itself, moved by ``off`` pixels to the right at the last stage."""

    off = 0

    def run(self, batch):
        pixels = batch.image.double() / 255
        maps = torch.stack(
            [(pixels[:, c].amin(1) - pixels[:, ~c].amax(1) - 0.1).clamp(min=0) for c in COLOURS], 1
        )  # what has a dot's colour and no other
        maps = maps / maps.sum((-2, -1), keepdim=True)
        for moved in (maps, torch.roll(maps, self.off, -1)):
            yield StageOutput({"5": moved}, {"5": expected_points(moved)}, moved.sum(1, keepdim=True))


def faces(**augment) -> FaceDataset:
    points = stored_points()
    boxes = np.concatenate([points.min(1) - 9, points.max(1) + 9], 1)
    table = FaceTable.from_columns(
        {"image": [f"{k}.png" for k in range(FACES)], "landmarks_5": points.reshape(FACES, 10), "box": boxes}
    )
    recipe = CropRecipe(kind="box", size=SIZE, margin=0.15)
    source = Source("dots", table, Dots(points), group="image", recipe=recipe)
    return FaceDataset([source], [np.arange(FACES)], make_tasks("5"), FaceTransform(SIZE, **augment), seed=1)


def seeing() -> Seeing:
    return Seeing(make_tasks("5"), Pixels(SIZE, grey=True), stages=2, widths=[4], convolutions=1).eval()


@pytest.mark.parametrize(
    "augment", [{}, {"flip": 0.5, "rotation": 30.0, "scale": 0.15, "shift": 0.05}], ids=["plain", "augmented"]
)
def test_dots_lie_where_the_loss_wants_their_points(augment):
    """The mean of a dot's pixels is the target of its point, under its partner's index where the crop is mirrored."""
    data, model = faces(**augment), seeing()
    swap = list(labels.SCHEMES["5"].swap)
    flips = 0
    for epoch in range(4):
        batch = data.batch(epoch, np.arange(FACES))
        found = model(batch)["landmarks_5"]
        found = torch.where(batch.flipped[:, None, None], found[:, swap], found)  # a mirrored left eye is a right one
        flips += int(batch.flipped.sum())
        wanted = batch.targets["landmarks_5"].double()
        inside = ((wanted > 4 / SIZE) & (wanted < 1 - 4 / SIZE)).all(-1)  # where the whole dot is seen
        assert inside.float().mean() > 0.9
        torch.testing.assert_close(found[inside], wanted[inside], rtol=0, atol=0.25 / SIZE)
    assert (0 < flips < 4 * FACES) == bool(augment)


def test_errors_are_those_in_pixels_of_the_stored_images():
    """Maps that are one pixel of the crop off make errors of as many pixels as the image has for one of the crop."""
    data, model = faces(), seeing()
    model.off = 2
    batch = data.batch(0, np.arange(FACES))
    values, source, rows = predict_values(model, [batch], torch.device("cpu"), "test")
    stored = stored_points()
    moved = 2 / scale_of(batch.matrix.numpy())
    assert np.ptp(moved) > 0.2, "faces have different sizes"
    np.testing.assert_allclose(values["landmarks_5"], stored + moved[:, None, None] * [1, 0], atol=0.5)
    eyes = np.linalg.norm(stored[:, 0] - stored[:, 1], axis=1)
    expected = (100 * moved / eyes).mean()
    table = predictions_table(data.sources, model.tasks, values, source, rows)
    records = {record["name"]: record["value"] for record in table_metrics(table, model.tasks, resamples=0)}
    assert records["nme"] == pytest.approx(expected, rel=0.05)
    stages = model.examine(lambda part: [batch])["stages"]["landmarks_5"]["nme"]
    assert stages[1] == pytest.approx(records["nme"], rel=1e-3)
    assert stages[0] < 0.2
