# SPDX-License-Identifier: Apache-2.0
"""The vocabulary: orders as each dataset delivers them, flips that undo themselves, conversions by name."""

from __future__ import annotations

import pytest

from affect import labels

# 1-based source indices of a mirrored 49-point face, as the public lists of BP4D's literature give them.
REFLECT_49 = (
    "10 9 8 7 6 5 4 3 2 1 11 12 13 14 19 18 17 16 15 29 28 27 26 31 30 23 22 21 20 25 24 38 37 36 35 34 33 32 43 42 41 "
    "40 39 46 45 44 49 48 47"
)


@pytest.mark.parametrize("name", labels.SCHEMES)
def test_flipping_points_twice_changes_nothing(name: str) -> None:
    scheme = labels.SCHEMES[name]
    assert sorted(scheme.swap) == list(range(scheme.points))
    assert all(scheme.swap[scheme.swap[k]] == k for k in range(scheme.points))
    left, right = scheme.eye_corners
    assert scheme.swap[left] == right
    assert tuple(sorted(scheme.swap[k] for k in scheme.left_eye)) == tuple(sorted(scheme.right_eye))


def test_points_that_stay_under_a_flip_are_those_of_the_midline() -> None:
    def fixed(name: str) -> list[int]:
        return [k for k, partner in enumerate(labels.SCHEMES[name].swap) if k == partner]

    assert fixed("68") == [8, 27, 28, 29, 30, 33, 51, 57, 62, 66]
    assert fixed("98") == [16, 51, 52, 53, 54, 57, 79, 85, 90, 94]
    assert fixed("29") == [20, 21, *range(24, 29)]
    assert fixed("106") == [16, *range(51, 55), 60, 87, 93, 98, 102]


def test_the_49_points_swap_as_in_the_literature() -> None:
    assert labels.SCHEMES["49"].swap == tuple(int(k) - 1 for k in REFLECT_49.split())


def test_49_points_are_the_inner_points_of_68_without_the_inner_mouth_corners() -> None:
    inner = [k for k in range(17, 68) if k not in (60, 64)]
    swap_68, swap_49 = labels.SCHEMES["68"].swap, labels.SCHEMES["49"].swap
    assert [inner.index(swap_68[k]) for k in inner] == list(swap_49)


def test_29_and_106_points_swap_as_published() -> None:
    """HRNet's one-based pairs of COFW; of LaPa brows, eyelids and lips, whose pairs do not run along the contour."""
    cofw = ((1, 2), (5, 7), (3, 4), (6, 8), (9, 10), (11, 12), (13, 15), (17, 18), (14, 16), (19, 20), (23, 24))
    swap = labels.SCHEMES["29"].swap
    assert {(a - 1, b - 1) for a, b in cofw} == {(k, p) for k, p in enumerate(swap) if k < p}
    lapa = labels.SCHEMES["106"].swap
    assert [lapa[k] for k in (33, 38, 41, 66, 70, 71, 73, 74, 104)] == [46, 50, 47, 79, 75, 82, 80, 83, 105]
    assert [lapa[k] for k in (84, 91, 92, 96, 97, 101, 55, 59)] == [90, 95, 94, 100, 99, 103, 65, 61]
    assert sum(k != p for k, p in enumerate(lapa)) == 106 - 10


@pytest.mark.parametrize(
    ("order", "index", "name"),
    [
        ("rafdb", 0, "surprise"),
        ("rafdb", 6, "neutral"),
        ("affectnet8", 7, "contempt"),
        ("affectnet7", 4, "fear"),
        ("abaw", 7, "other"),
        ("abaw", 1, "anger"),
        ("fer2013", 3, "happiness"),
        ("ferplus", 2, "surprise"),
        ("imagefolder8", 1, "contempt"),
    ],
)
def test_class_orders_are_those_of_the_datasets(order: str, index: int, name: str) -> None:
    assert labels.EXPRESSION_ORDERS[order][index] == name


def test_permutation_converts_by_name() -> None:
    source, target = labels.EXPRESSION_ORDERS["rafdb"], labels.EXPRESSION_ORDERS["affectnet8"]
    index = labels.permutation(source, target)
    assert [source[k] if k >= 0 else None for k in index] == [*target[:7], None]


def test_columns_and_spellings() -> None:
    assert labels.occurrence_column(1) == "au01_occurrence"
    assert labels.intensity_column(12) == "au12_intensity"
    assert labels.canonical_expression(" Happy ") == "happiness"
    assert labels.canonical_expression("Happily_Surprised") == "happily surprised"
    assert labels.expression_column("happily surprised") == "expression_happily_surprised"


def test_action_unit_sets_name_known_units_once() -> None:
    for units in labels.AU_SETS.values():
        assert len(set(units)) == len(units)
        assert set(units) <= set(labels.AU_NAMES)


def test_mesh_vertices_of_the_68_points_mirror_each_other() -> None:
    assert len(set(labels.MESH_478_TO_68)) == 68
