# SPDX-License-Identifier: Apache-2.0
"""Where crops lie when a network only adds landmarks to images that are crops already."""

from __future__ import annotations

import numpy as np

from affect.data.placing import CENTRE, FOUND, Placer
from affect.data.table import FaceTable
from affect.geometry import CropRecipe
from affect.geometry.providers import FaceObservation


class EverySecond:
    """Finds a face in every second image."""

    calls = 0

    def find(self, image):
        self.calls += 1
        points = np.stack([np.linspace(5, 30, 68), np.linspace(8, 33, 68)], 1)
        return [FaceObservation(np.array([4.0, 4, 34, 34]), 0.9, points)] if self.calls % 2 else []


def test_whole_images_stay_whole_with_or_without_a_face():
    recipe = CropRecipe(kind="none", size=80, margin=0.0)
    table = FaceTable.from_columns({"image": [f"{k}.png" for k in range(4)]}, ".", {})
    placer = Placer(recipe, table, EverySecond())
    images = iter([np.zeros((40, 40, 3), np.uint8)] * 4)
    found = {place: how for place, _, how in placer.placed(images, np.arange(4), np.arange(4), ordered=True)}
    assert [found[k].face for k in range(4)] == [FOUND, CENTRE, FOUND, CENTRE]
    assert [found[k].observation is None for k in range(4)] == [False, True, False, True]
    for how in found.values():
        np.testing.assert_allclose(how.matrix, recipe.matrix(image_size=(40, 40)))
