# SPDX-License-Identifier: Apache-2.0
"""Few fine and many coarse annotations: as many as asked for, on other people than those of the test, and exact."""

from __future__ import annotations

import numpy as np
import pytest

from affect.data.controlled.few_fine import few_fine_faces
from affect.data.faces import FaceDials
from affect.data.layouts import faces
from affect.errors import ConfigError

DIALS = FaceDials(image_size=48, subjects=40)


def annotated(table) -> dict[str, set[int]]:
    """Return the training rows that have points of each scheme."""
    part = table.strings("part")[0]
    return {
        name: set(np.flatnonzero(table.numbers(f"landmarks_{name}")[1] & (part == "train")))
        for name in ("98", "68", "5")
    }


def test_training_faces_are_fine_or_coarse_and_all_others_have_everything():
    table = few_fine_faces(DIALS, 3, 400, fine=20, coarse=90)
    plain = faces.read(DIALS, 3, 400)
    part = table.strings("part")[0]
    known = annotated(table)
    assert (len(known["98"]), len(known["68"])) == (20, 90)
    assert known["68"] == known["5"]
    assert not known["98"] & known["68"]
    assert (part == "train").sum() == 110
    assert (part == "unused").sum() > 50
    for name in known:
        values, valid = table.numbers(f"landmarks_{name}")
        assert valid[part == "test"].all()
        assert valid[part == "validation"].all()
        np.testing.assert_array_equal(values[valid], plain.numbers(f"landmarks_{name}")[0][valid])
    share, weighed = table.numbers("share")
    assert (weighed == (part == "train")).all()
    for name in ("98", "68"):
        assert share[sorted(known[name])].sum() == pytest.approx(1, abs=1e-5)
    subject = table.strings("subject")[0]
    people = {name: set(subject[np.isin(part, parts)]) for name, parts in
              {"train": ["train", "unused"], "validation": ["validation"], "test": ["test"]}.items()}  # fmt: skip
    assert not people["train"] & people["test"]
    assert not people["train"] & people["validation"]
    assert not people["validation"] & people["test"]
    assert min(map(len, people.values())) >= 3
    np.testing.assert_array_equal(table.strings("image")[0], plain.strings("image")[0])


def test_fewer_annotations_are_a_part_of_more():
    many = annotated(few_fine_faces(DIALS, 3, 400, fine=20, coarse=90))
    none = annotated(few_fine_faces(DIALS, 3, 400, fine=20, coarse=0))
    fewer = annotated(few_fine_faces(DIALS, 3, 400, fine=8, coarse=None))
    assert none["98"] == many["98"]
    assert not none["68"]
    assert fewer["98"] < many["98"]
    assert many["68"] < fewer["68"]
    assert annotated(few_fine_faces(DIALS, 4, 400, fine=20, coarse=90))["98"] != many["98"]


def test_schemes_that_are_not_asked_for_are_left_out():
    table = few_fine_faces(DIALS, 3, 200, fine=5, coarse=20, fine_scheme="68", coarse_schemes=["5"])
    assert not table.numbers("landmarks_98")[1].any()
    known = annotated(table)
    assert (len(known["68"]), len(known["5"])) == (5, 20)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"fine": 100, "coarse": 100}, r"fine=100 and coarse=100 faces of \d+ that the training people have"),
        ({"fine": -1}, "fine=-1"),
        ({"train": 1.2}, "dataset.train=1.2"),
        ({"train": 0.7, "validation": 0.5}, "train \\+ validation"),
        ({"fine_scheme": "49"}, "no scheme '49'"),
        ({"coarse_schemes": ["98"]}, "98 is the fine scheme"),
    ],
)
def test_what_cannot_be_is_named(arguments, message):
    with pytest.raises(ConfigError, match=message):
        few_fine_faces(DIALS, 3, 200, **arguments)
