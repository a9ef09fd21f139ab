# SPDX-License-Identifier: Apache-2.0
"""Noisy tasks: the deviations of truth and noise are those that were asked for, and the test part has none."""

from __future__ import annotations

import numpy as np
import pytest

from affect.data.controlled.noisy_tasks import images, noisy_tasks
from affect.errors import ConfigError

NUMBERS = {"precise": {"scale": 1.0, "noise": 0.1}, "large": {"scale": 10.0, "noise": 3.0}}


def draw(numbers=NUMBERS, seed=0, **arguments):
    return noisy_tasks(numbers, train=6000, validation=500, test=6000, seed=seed, **arguments)


def test_deviations_are_those_of_the_settings_and_the_test_is_clean():
    noisy = draw()
    clean = draw({name: told | {"noise": 0.0} for name, told in NUMBERS.items()})
    test = noisy.strings("part")[0] == "test"
    for name, told in NUMBERS.items():
        truth, label = clean.numbers(f"y_{name}")[0], noisy.numbers(f"y_{name}")[0]
        assert truth.std() == pytest.approx(told["scale"], rel=1e-3)
        np.testing.assert_array_equal(truth[test], label[test])
        added = (label - truth)[~test]
        assert added.std() == pytest.approx(told["noise"], rel=0.03)
        assert abs(added.mean()) < 0.05 * told["noise"]
        assert abs(np.corrcoef(added, truth[~test])[0, 1]) < 0.05


def test_signs_are_turned_in_training_alone():
    turned, whole = draw(turned=0.1), draw(turned=0.0)
    test = turned.strings("part")[0] == "test"
    differs = turned.numbers("attribute_sign")[0] != whole.numbers("attribute_sign")[0]
    assert differs[~test].mean() == pytest.approx(0.1, abs=0.015)
    assert not differs[test].any()


def test_truth_is_a_function_of_the_vector():
    table = draw()
    x = np.stack([table.numbers(f"x{k}")[0] for k in range(8)], 1)
    assert x.std() == pytest.approx(1, abs=0.01)
    assert len(images(table).read(np.arange(3))) == 3
    other = draw(seed=1)
    assert table.fingerprint == draw().fingerprint != other.fingerprint


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"numbers": {}}, "is empty"),
        ({"numbers": {"a": {"scale": 0.0, "noise": 1.0}}}, r"numbers\.a: needs scale > 0"),
        ({"numbers": {"a": {"scale": 1.0}}}, r"numbers\.a: needs"),
        ({"turned": 0.6}, r"turned=0\.6"),
    ],
)
def test_settings_that_do_not_fit_are_refused(arguments, message):
    with pytest.raises(ConfigError, match=message):
        noisy_tasks(**({"numbers": NUMBERS} | arguments))
