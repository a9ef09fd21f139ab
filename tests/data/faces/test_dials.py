# SPDX-License-Identifier: Apache-2.0
"""The dials: plain values, and one clear line for each that cannot work."""

from __future__ import annotations

import json
from dataclasses import asdict

import numpy as np
import pytest

from affect.data.faces.dials import ACTION_UNITS, FaceDials
from affect.errors import ConfigError


def test_dials_survive_json() -> None:
    dials = FaceDials(yaw=(-5, 5), au_source="independent", au_rates=(0.1,) * len(ACTION_UNITS))
    assert FaceDials(**json.loads(json.dumps(asdict(dials)))) == dials


@pytest.mark.parametrize(
    ("change", "text"),
    [
        ({"image_size": 8}, "faces.image_size=8"),
        ({"image_size": 64.5}, "whole number"),
        ({"subjects": 0}, "faces.subjects=0"),
        ({"yaw": (10, -10)}, "faces.yaw"),
        ({"yaw": 10.0}, r"\[low, high\]"),
        ({"occluder": 1.5}, "faces.occluder=1.5"),
        ({"noise": float("nan")}, "faces.noise"),
        ({"blur": "much"}, "faces.blur='much'"),
        ({"light": (0.1, 0.2)}, "must be one number"),
        ({"background": "blured"}, "did you mean blurred"),
        ({"au_source": "expresion"}, "did you mean expression"),
        ({"au_source": "independent"}, "every action unit always"),
        ({"au_rates": (0.5, 0.5)}, "2 entries"),
        ({"au_rates": (0.5,) * 18}, "au_source=expression"),
        ({"au_source": "independent", "au_rates": 1.5}, "rates of action units"),
        ({"au_flip": (0.1,) * 3}, "faces.au_flip has 3 entries"),
        ({"au_flip": 1.2}, r"lie in \[0, 1\]"),
        ({"expression_rates": (1, 1)}, "give 8 rates"),
        ({"intensity": (0.5, 5), "au_threshold": 1.0}, "au_threshold=1.0"),
        (
            {"au_source": "chain", "au_rates": (0.9, 0.1) * 9, "au_dependency": 0.9},
            "AU2 .* cannot depend so much on AU1",
        ),
    ],
)
def test_dials_that_cannot_work_are_refused_in_one_line(change: dict, text: str) -> None:
    with pytest.raises(ConfigError, match=text) as caught:
        FaceDials(**change)
    assert "\n" not in str(caught.value)


def test_chain_rates_keep_the_marginal_rates() -> None:
    rates = np.linspace(0.2, 0.4, 18)
    dials = FaceDials(au_source="chain", au_rates=tuple(rates), au_dependency=0.5)
    on, off = dials.chain_rates()
    np.testing.assert_allclose(rates[:-1] * on[1:] + (1 - rates[:-1]) * off[1:], rates[1:])
    np.testing.assert_allclose(on[1:], rates[1:] + 0.5 * (1 - rates[1:]))
