# SPDX-License-Identifier: Apache-2.0
from __future__ import annotations

import doctest
import importlib
import pkgutil

import pytest

import affect.losses

MODULES = [f"affect.losses.{module.name}" for module in pkgutil.iter_modules(affect.losses.__path__)]


@pytest.mark.parametrize("name", MODULES)
def test_examples_of_docstrings_are_true(name):
    assert doctest.testmod(importlib.import_module(name)).failed == 0


def test_every_public_name_exists():
    assert all(hasattr(affect.losses, name) for name in affect.losses.__all__)
