# SPDX-License-Identifier: Apache-2.0
"""Every test of a figure also checks that nothing of pyplot's global state was touched."""

from __future__ import annotations

import sys
import warnings

import matplotlib as mpl
import pytest


@pytest.fixture(autouse=True)
def no_global_state():
    before = dict(mpl.rcParams)
    with warnings.catch_warnings():
        # Matplotlib warns where a layout collapses, a glyph is missing, or limits are singular.
        warnings.simplefilter("error")
        yield
    assert dict(mpl.rcParams) == before
    pyplot = sys.modules.get("matplotlib.pyplot")
    assert pyplot is None or not pyplot.get_fignums()
