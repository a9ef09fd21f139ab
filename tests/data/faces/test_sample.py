# SPDX-License-Identifier: Apache-2.0
"""Sampling: functions of (seed, index) alone, with the frequencies that the dials promise."""

from __future__ import annotations

from dataclasses import replace

import numpy as np
import pytest

from affect import labels
from affect.data.faces.dials import ACTION_UNITS, EXPRESSIONS, FaceDials
from affect.data.faces.sample import (
    PROTOTYPES,
    expression_of,
    labels_of,
    points_of,
    sample,
    sample_subjects,
    uniform,
    valence_arousal,
)

COLUMN = {au: k for k, au in enumerate(ACTION_UNITS)}
MANY = np.arange(20_000)


def test_uniform_is_uniform_and_independent_of_its_company() -> None:
    u = uniform(3, "row", MANY, 8)
    assert u.min() > 0
    assert u.max() < 1
    np.testing.assert_allclose(u.mean(0), 0.5, atol=0.01)
    np.testing.assert_allclose(np.cov(u.T), np.eye(8) / 12, atol=0.003)
    np.testing.assert_array_equal(uniform(3, "row", np.array([77, 5]), 3), u[[77, 5], :3])
    assert not np.array_equal(uniform(4, "row", MANY, 8), u)
    assert not np.array_equal(uniform(3, "noise", MANY, 8), u)
    # Neighbouring indices are unrelated.
    assert abs(np.corrcoef(u[:-1, 0], u[1:, 0])[0, 1]) < 0.02


def test_a_row_does_not_depend_on_the_rows_beside_it() -> None:
    dials = FaceDials(occluder=0.5)
    together = sample(dials, 1, np.arange(50))
    alone = sample(dials, 1, np.array([41, 7]))
    assert together.keys() == alone.keys()
    for key, values in together.items():
        np.testing.assert_array_equal(values[[41, 7]], alone[key], err_msg=key)


def test_labels_do_not_need_the_camera() -> None:
    full, short = (sample(FaceDials(), 1, np.arange(9), camera=camera) for camera in (True, False))
    assert set(short) < set(full)
    for key, values in short.items():
        np.testing.assert_array_equal(values, full[key], err_msg=key)


def test_a_subject_looks_the_same_in_all_rows() -> None:
    rows = sample(FaceDials(subjects=3), 5, np.arange(60))
    body = sample_subjects(FaceDials(subjects=3), 5, rows["subject"])
    assert set(rows["subject"]) == {0, 1, 2}
    for key, values in body.items():
        np.testing.assert_array_equal(rows[key], values, err_msg=key)
    assert len(np.unique(body["identity"], axis=0)) == 3


def test_expressions_follow_their_rates_and_prototypes() -> None:
    rates = (4, 2, 1, 1, 0, 1, 1, 0)
    rows = sample(FaceDials(expression_rates=rates), 1, MANY, camera=False)
    share = np.bincount(rows["expression"], minlength=8) / len(MANY)
    np.testing.assert_allclose(share, np.array(rates) / 10, atol=0.012)
    shown = rows["intensity"] >= 1
    happy = shown[rows["expression"] == EXPRESSIONS.index(labels.HAPPINESS)]
    assert happy[:, COLUMN[12]].all()
    assert happy[:, COLUMN[6]].mean() == pytest.approx(PROTOTYPES[labels.HAPPINESS][6], abs=0.03)
    assert not happy[:, COLUMN[15]].any()
    assert not (shown[:, COLUMN[43]] & shown[:, COLUMN[5]]).any()
    assert (shown[:, COLUMN[25]] >= shown[:, COLUMN[26]]).all()


def test_pure_prototypes_have_nothing_else() -> None:
    rows = sample(FaceDials(au_rates=0.0), 1, MANY[:4000], camera=False)
    neutral = rows["expression"] == EXPRESSIONS.index(labels.NEUTRAL)
    assert (rows["intensity"][neutral] == 0).all()


def test_expression_of_recovers_drawn_expressions() -> None:
    rows = sample(FaceDials(au_rates=0.0), 2, MANY[:4000], camera=False)
    assert (expression_of(rows["intensity"]) == rows["expression"]).mean() > 0.9
    assert expression_of(np.zeros((1, 18)))[0] == EXPRESSIONS.index(labels.NEUTRAL)


def test_chain_plants_its_dependency() -> None:
    rates = tuple(np.linspace(0.3, 0.5, 18))
    dials = FaceDials(au_source="chain", au_rates=rates, au_dependency=0.6)
    on = sample(dials, 1, MANY, camera=False)["intensity"] >= dials.au_threshold
    np.testing.assert_allclose(on.mean(0), rates, atol=0.015)
    high, low = dials.chain_rates()
    for k in range(1, 18):
        assert on[on[:, k - 1], k].mean() == pytest.approx(high[k], abs=0.025)
        assert on[~on[:, k - 1], k].mean() == pytest.approx(low[k], abs=0.025)


def test_independent_action_units_are_imbalanced_as_asked() -> None:
    rates = tuple(np.geomspace(0.5, 0.01, 18))
    on = sample(FaceDials(au_source="independent", au_rates=rates), 1, MANY, camera=False)["intensity"] > 0
    np.testing.assert_allclose(on.mean(0), rates, atol=0.012)
    correlation = np.corrcoef(on[:, :8].T)
    assert np.abs(correlation - np.eye(8)).max() < 0.03


def test_label_noise_has_its_rates_and_leaves_the_truth() -> None:
    dials = FaceDials(au_flip=0.1, au_missed=(0.3,) * 18, expression_flip=0.2, intensity_noise=0.5)
    rows = sample(dials, 1, MANY, camera=False)
    truth, noisy = (labels_of(dials, 1, rows, clean) for clean in (True, False))
    on = truth["occurrence"]
    np.testing.assert_array_equal(on, rows["intensity"] >= 1)
    assert noisy["occurrence"][~on].mean() == pytest.approx(0.1, abs=0.005)
    assert noisy["occurrence"][on].mean() == pytest.approx(0.9 * 0.7, abs=0.01)
    assert (noisy["expression"] != truth["expression"]).mean() == pytest.approx(0.2, abs=0.01)
    inside = (truth["intensity"] > 2) & (truth["intensity"] < 3)
    assert (noisy["intensity"] - truth["intensity"])[inside].std() == pytest.approx(0.5, abs=0.02)
    # Noise in labels changes nothing in what is drawn.
    quiet = sample(FaceDials(), 1, MANY, camera=False)
    np.testing.assert_array_equal(quiet["coefficient"], rows["coefficient"])


def test_label_families_go_missing_independently() -> None:
    dials = FaceDials(missing_au=0.5, missing_landmarks=0.2)
    written = labels_of(dials, 1, sample(dials, 1, MANY, camera=False))
    assert written["missing_au"].mean() == pytest.approx(0.5, abs=0.015)
    assert written["missing_landmarks"].mean() == pytest.approx(0.2, abs=0.015)
    assert not written["missing_expression"].any()
    assert abs(np.corrcoef(written["missing_au"], written["missing_landmarks"])[0, 1]) < 0.02


def test_biases_tie_nuisances_to_the_expression() -> None:
    free = sample(FaceDials(subjects=20), 1, MANY)
    tied = sample(FaceDials(subjects=20, background_shortcut=1.0, pose_bias=1.0, identity_bias=1.0), 1, MANY)
    hue = np.round(tied["background_hue"] * 8).astype(int) % 8
    np.testing.assert_array_equal(hue, tied["expression"])
    assert len(np.unique(tied["yaw"])) == len(np.unique(tied["expression"]))
    for person in range(20):
        assert len(set(tied["expression"][tied["subject"] == person])) == 1
        assert len(set(free["expression"][free["subject"] == person])) == 8
    assert abs(np.corrcoef(free["yaw"], free["expression"])[0, 1]) < 0.02


def test_valence_and_arousal_lie_where_the_circumplex_has_them() -> None:
    def of(**units: float) -> np.ndarray:
        intensity = np.zeros((1, 18))
        for name, value in units.items():
            intensity[0, COLUMN[int(name[2:])]] = value
        return valence_arousal(intensity)[0]

    np.testing.assert_array_equal(of(), 0)
    assert of(au12=5, au6=5)[0] > 0.9
    assert of(au12=2.5)[0] < of(au12=5)[0]
    sad, afraid = of(au1=4, au4=4, au15=4), of(au1=5, au2=5, au4=5, au5=5, au20=5, au25=5)
    assert sad[0] < -0.6
    assert sad[1] < 0
    assert afraid[0] < -0.6
    assert afraid[1] > 0.6
    assert of(au43=5)[1] < -0.5


def test_points_scale_with_the_image() -> None:
    dials = FaceDials(image_size=100)
    rows = sample(dials, 1, np.arange(3000), camera=False)
    small, large = points_of(rows, 100), points_of(rows, 200)
    np.testing.assert_allclose((small["98"] + 0.5) * 2, large["98"] + 0.5, atol=2e-3)
    one = points_of(sample(dials, 1, np.array([2999]), camera=False), 100)
    np.testing.assert_allclose(one["68"][0], small["68"][2999], atol=1e-3)
    inside = (small["68"] > 0) & (small["68"] < 99)
    assert inside.mean() > 0.99
    assert replace(dials, zoom=(0.5, 0.5)) != dials


def test_only_contempt_is_one_sided_and_only_at_the_mouth() -> None:
    rows = sample(FaceDials(), 1, MANY[:4000], camera=False)
    contempt = rows["expression"] == EXPRESSIONS.index(labels.CONTEMPT)
    corner = [COLUMN[12], COLUMN[14]]
    assert (np.abs(rows["side"][contempt][:, corner]) > 0.8).all()
    assert (np.abs(rows["side"][~contempt]) < 0.2).all()
    assert (np.abs(np.delete(rows["side"], corner, 1)) < 0.2).all()
    assert abs(np.sign(rows["side"][contempt][:, corner[0]]).mean()) < 0.15
