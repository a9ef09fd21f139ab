# SPDX-License-Identifier: Apache-2.0
"""A timeline shows means over equal steps of time, and where there is no face it shows none."""

from __future__ import annotations

import io

import numpy as np
import pytest
from PIL import Image

from affect.errors import DataError
from affect.report.figures import Panel, Timeline, timeline

RANDOM = np.random.default_rng(0)


def test_steps_hold_the_mean_of_their_rows_however_they_come() -> None:
    times = RANDOM.uniform(0, 10, 500)
    values = RANDOM.normal(size=(500, 2))
    values[RANDOM.random((500, 2)) < 0.3] = np.nan
    whole = Timeline(["a", "b"], 0, 10, steps=20)
    whole.add(times, values)
    parts = Timeline(["a", "b"], 0, 10, steps=20)
    for rows in np.array_split(RANDOM.permutation(500), 7):
        parts.add(times[rows], values[rows])
    expected = [np.nanmean(values[(times >= t) & (times < t + 0.5)], axis=0) for t in np.arange(0, 10, 0.5)]
    np.testing.assert_allclose(whole.means(), expected)
    np.testing.assert_allclose(parts.means(), whole.means())


def test_the_last_row_belongs_to_the_last_step_and_empty_steps_have_no_mean() -> None:
    signals = Timeline(["a"], 2, 4, steps=4)
    signals.add([2, 4], [[1], [3]])
    assert signals.means()[:, 0].tolist() == pytest.approx([1, np.nan, np.nan, 3], nan_ok=True)
    one = Timeline(["a"], 5, 5, steps=1)
    one.add([5], [[7]])
    assert one.means().tolist() == [[7]]
    for start, end, steps in ((1, 0, 3), (0, np.nan, 3), (0, 1, 0)):
        with pytest.raises(DataError, match="timeline"):
            Timeline(["a"], start, end, steps)


def drawn(figure) -> np.ndarray:
    stream = io.BytesIO()
    figure.savefig(stream, dpi=80)
    return np.asarray(Image.open(stream).convert("RGB")).astype(int)


def signals(gap: bool) -> Timeline:
    found = Timeline(["AU01", "AU12", "valence"], 0, 10, steps=100)
    times = np.linspace(0, 10, 400)
    values = np.stack([np.zeros(400), np.ones(400), np.sin(times)], 1)
    keep = (times < 4) | (times > 6) if gap else np.ones(400, bool)
    found.add(times[keep], values[keep])
    return found


def test_time_without_the_face_is_grey_and_unlike_a_low_value() -> None:
    panels = [Panel("action units", ("AU01", "AU12")), Panel("affect", ("valence",), -1, 1, lines=True)]
    grey = [int((np.abs(drawn(timeline(signals(gap), panels)) - 0xCF).max(-1) < 3).sum()) for gap in (False, True)]
    assert grey[1] > grey[0] + 500


def test_what_cannot_be_shown_is_said() -> None:
    with pytest.raises(DataError, match="no signal AU99"):
        timeline(signals(False), [Panel("x", ("AU99",))])
    empty = Timeline(["a"], 0, 1)
    for figure in (timeline(empty, [Panel("x", ("a",))]), timeline(signals(False), [Panel("x", ())])):
        assert "no face was followed" in [text.get_text() for axes in figure.axes for text in axes.texts]
