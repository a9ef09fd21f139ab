# SPDX-License-Identifier: Apache-2.0
"""Wrong labels lie in the training and validation part, at their rate, and what is right stands beside them."""

from __future__ import annotations

import numpy as np
import pytest

from affect.data.controlled.noisy_labels import digit_images, noisy_digits, noisy_faces
from affect.data.faces import FaceDials
from affect.errors import ConfigError, DataError

pytest.importorskip("sklearn")
DIALS = FaceDials(au_source="independent", au_rates=0.35, subjects=300)


def wrong_digits(noise: float, seed: int = 0) -> tuple[np.ndarray, np.ndarray]:
    table = noisy_digits(noise, seed=seed)
    return table.strings("part")[0], table.strings("digit")[0] != table.strings("true_digit")[0]


@pytest.mark.parametrize("noise", [0.0, 0.2, 0.6, 1.0])
def test_a_share_of_digits_is_redrawn_uniformly(noise: float) -> None:
    found = np.concatenate([wrong[parts != "test"] for parts, wrong in (wrong_digits(noise, s) for s in range(20))])
    assert abs(found.mean() - 0.9 * noise) < 0.01  # one in ten comes out right
    parts, wrong = wrong_digits(noise)
    assert not wrong[parts == "test"].any()
    assert [int((parts == name).sum()) for name in ("train", "validation", "test")] == [800, 200, 797]


def test_more_noise_only_adds_wrong_labels() -> None:
    assert (wrong_digits(0.6)[1] >= wrong_digits(0.2)[1]).all()


def test_digits_are_drawings_that_can_be_read_back() -> None:
    table = noisy_digits(0.4, train=5, validation=3, test=2, seed=1)
    again = noisy_digits(0.0, train=5, validation=3, test=2, seed=1)
    assert (table.strings("true_digit")[0] == again.strings("digit")[0]).all()
    image = digit_images(table).read(np.array([7]))[0]
    steps = image.reshape(-1)[:128].reshape(-1, 2).astype(int) @ [256, 1]
    vector = [table.numbers(f"x{k}")[0][7] for k in range(64)]
    np.testing.assert_allclose(steps / 65535 * 16, vector, atol=1e-3)
    assert len(set(table.numbers("drawing")[0])) == 10


@pytest.mark.parametrize("noise", [0.0, 0.25])
def test_a_share_of_action_units_is_flipped_in_whole_people(noise: float) -> None:
    table = noisy_faces(DIALS, seed=3, count=6000, noise=noise)
    parts, people = table.strings("part")[0], table.strings("subject")[0]
    for name in set(people):
        assert len(set(parts[people == name])) == 1
    sizes = [np.mean(parts == name) for name in ("train", "validation", "test")]
    np.testing.assert_allclose(sizes, [0.45, 0.15, 0.4], atol=0.05)
    names = [name for name in table.names if name.startswith("au") and name.endswith("_occurrence")]
    wrong = np.stack([table.numbers(name)[0] != table.numbers(f"true_{name}")[0] for name in names], 1)
    assert not wrong[parts == "test"].any()
    assert abs(wrong[parts != "test"].mean() - noise) < 0.01
    if noise:
        assert abs(np.corrcoef(wrong[parts != "test"].T)[np.triu_indices(len(names), 1)]).max() < 0.1


def test_what_cannot_be_is_refused() -> None:
    with pytest.raises(ConfigError, match=r"dataset\.noise=1\.5"):
        noisy_digits(1.5)
    with pytest.raises(DataError, match="there are 1797"):
        noisy_digits(train=1797)
    with pytest.raises(ConfigError, match=r"dataset\.train \+ validation=1\.1"):
        noisy_faces(DIALS, train=0.9, validation=0.2)
    with pytest.raises(ConfigError, match="disturb the test part too"):
        noisy_faces(FaceDials(au_flip=0.1))
