# SPDX-License-Identifier: Apache-2.0
"""Vectors survive the way through pixels, and labels are what they claim to be."""

from __future__ import annotations

import numpy as np
import pytest
import torch

from affect.data.controlled.binary_tasks import dyadic, images, parity_chain
from affect.data.controlled.vectors import image_side, vectors_to_images
from affect.data.dataset import FaceDataset
from affect.data.images import Source
from affect.data.transforms import FaceTransform
from affect.encoders import PixelVector
from affect.errors import ConfigError, DataError


@pytest.mark.parametrize("features", [1, 2, 6, 7, 40])
def test_numbers_come_back_through_pixels(features):
    vectors = np.random.default_rng(0).uniform(-2, 2, (50, features))
    vectors[0], vectors[1] = -2, 2
    stored = vectors_to_images(vectors, -2, 2)
    encoder = PixelVector(features, image_side(features))
    found = encoder(torch.from_numpy(stored).permute(0, 3, 1, 2)).numpy()
    np.testing.assert_allclose(found, vectors, atol=4 / 65_535)


def test_the_pipeline_leaves_them_alone():
    table = parity_chain(train=8, validation=4, test=4)
    source = Source("parity", table, images(table), "image")
    batch = FaceDataset([source], [np.arange(16)], {}, FaceTransform(image_side(6))).batch(0, np.arange(16))
    found = PixelVector(6, image_side(6))(batch.image).numpy()
    wanted = np.stack([table.numbers(f"x{k}")[0] for k in range(6)], 1)
    np.testing.assert_allclose(found, wanted, atol=4 / 65_535)


def test_parities_follow_from_the_one_before():
    table = parity_chain(tasks=5, train=300, validation=0, test=0, seed=3)
    before = np.zeros(300)
    for k in range(5):
        positive = table.numbers(f"x{k}")[0] > 0
        label = table.numbers(f"attribute_parity_{k + 1}")[0]
        np.testing.assert_array_equal(label, (before + positive) % 2)
        before = label
    magnitude = np.abs(table.numbers("x0")[0])
    assert 0.3 <= magnitude.min() < 0.35
    assert 1.65 < magnitude.max() <= 1.7


def test_dyadic_labels_alternate_over_intervals():
    table = dyadic(tasks=3, train=4000, validation=0, test=0)
    order = np.argsort(table.numbers("x0")[0])
    for k in range(3):
        label = table.numbers(f"attribute_dyadic_{k + 1}")[0][order]
        assert (np.diff(label) != 0).sum() == 2 ** (k + 1) - 1
        assert label[0] == 1


def test_a_seed_decides_and_parts_are_counted():
    one, same, other = (parity_chain(train=5, validation=3, test=2, seed=s) for s in (1, 1, 2))
    assert one.fingerprint == same.fingerprint != other.fingerprint
    assert one.strings("part")[0].tolist() == ["train"] * 5 + ["validation"] * 3 + ["test"] * 2


def test_layers_and_refusals():
    encoder = PixelVector(2, 2, layers=[8, 4])
    assert encoder.num_features == 4
    assert sum(isinstance(m, torch.nn.BatchNorm1d) for m in encoder.modules()) == 2
    assert not any(isinstance(m, torch.nn.ReLU) for m in PixelVector(2, 2, layers=[4], plain=True).modules())
    with pytest.raises(ConfigError, match="do not fit"):
        PixelVector(7, 2)
    with pytest.raises(DataError, match="must lie in"):
        vectors_to_images(np.array([[3.0]]), -2, 2)
