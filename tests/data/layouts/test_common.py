# SPDX-License-Identifier: Apache-2.0
"""What all layouts share when they write."""

from __future__ import annotations

import pytest

from affect.data.layouts.common import require_box
from affect.errors import ConfigError
from tests.data.layouts.trees import COUNT, Case, Drawn, cases

IN_FILES = list(
    {case.module.__name__: case for case in cases() if not case.module.__name__.endswith("fer2013")}.values()
)
"""A dataset of each layout whose pictures are files or archives; those of FER2013 are lines of text."""


@pytest.mark.parametrize("case", IN_FILES, ids=[case.name for case in IN_FILES])
def test_pictures_are_read_a_few_at_a_time(case: Case, tmp_path, monkeypatch):
    asked = []
    read = Drawn.read
    monkeypatch.setattr(Drawn, "read", lambda self, rows: asked.append(len(rows)) or read(self, rows))
    case.write(tmp_path)
    assert sum(asked) > COUNT // 2
    assert len(asked) < sum(asked) / 2


def test_a_box_that_nobody_draws():
    require_box("detector")
    with pytest.raises(ConfigError, match=r"dataset\.box=point: unknown; did you mean points"):
        require_box("point")
