# SPDX-License-Identifier: Apache-2.0
"""Faces whose test part is drawn otherwise: other people, other dials, true labels; images belong to their labels."""

from __future__ import annotations

from dataclasses import replace

import numpy as np
import pytest

from affect.data.controlled.shifted_faces import TEST_SEED, images, shifted_faces
from affect.data.faces import FaceDials, FaceImages, labels_table
from affect.errors import ConfigError

DIALS = FaceDials(image_size=32, subjects=6, background="plain", background_shortcut=1.0, expression_flip=0.5)
CHANGED = {"background_shortcut": 0.0}


def test_the_test_part_has_other_people_and_true_labels():
    table = shifted_faces(DIALS, CHANGED, seed=3, count=80, test_count=50)
    part = table.strings("part")[0]
    assert (part[:80] == "train").all()
    assert (part[80:] == "test").all()
    who = table.strings("subject")[0]
    assert not set(who[:80]) & set(who[80:])
    noisy = labels_table(DIALS, 3, 80)["expression"].to_pylist()
    true = labels_table(DIALS, 3 + TEST_SEED, 50, first=80, clean=True)["expression"].to_pylist()
    assert table.strings("expression")[0].tolist() == noisy + true
    assert len(set(table.strings("image")[0])) == 130


def test_the_same_people_have_other_images():
    table = shifted_faces(DIALS, None, seed=3, count=80, test_count=50, same_people=True)
    who = table.strings("subject")[0]
    assert set(who[80:]) <= set(who[:80])
    truth = labels_table(DIALS, 3, 130, clean=True)["expression"].to_pylist()
    assert table.strings("expression")[0].tolist()[80:] == truth[80:]


def test_images_are_those_of_their_part(tmp_path):
    rows = np.array([4, 1, 5, 0])
    for cache in (None, tmp_path):
        found = images(DIALS, CHANGED, seed=3, count=4, test_count=3, cache=cache).read(rows)
        train = FaceImages(DIALS, 3).read(np.array([1, 0]))
        test = FaceImages(replace(DIALS, background_shortcut=0.0), 3 + TEST_SEED).read(np.array([4, 5]))
        for ours, theirs in zip(found, [test[0], train[0], test[1], train[1]], strict=True):
            assert np.array_equal(ours, theirs)


def test_an_unknown_dial_is_refused():
    with pytest.raises(
        ConfigError, match=r"test_dials\.background_shortcuts: no such dial; did you mean background_sh"
    ):
        shifted_faces(DIALS, {"background_shortcuts": 0.0})
