# SPDX-License-Identifier: Apache-2.0
from __future__ import annotations

import doctest
import importlib
import pkgutil

import pytest

import affect.metrics

MODULES = [f"affect.metrics.{module.name}" for module in pkgutil.iter_modules(affect.metrics.__path__)]


@pytest.mark.parametrize("name", MODULES)
def test_examples_of_docstrings_are_true(name):
    assert doctest.testmod(importlib.import_module(name)).failed == 0


def test_every_public_name_exists():
    assert all(hasattr(affect.metrics, name) for name in affect.metrics.__all__)
