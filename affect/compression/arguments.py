# SPDX-License-Identifier: Apache-2.0
"""Checks of the arguments of methods: each refuses a value that makes no sense, and names its key."""

from __future__ import annotations

from collections.abc import Collection
from typing import Any

from affect.errors import ConfigError, near

__all__ = ["check_bits", "check_choices", "check_counts", "check_parts", "check_range"]


def _refuse(method: str, key: str, value: object, told: str) -> None:
    raise ConfigError(f"compression.{method}.{key}={value}: {told}")


def check_range(method: str, least: float, most: float, given: dict[str, Any]) -> None:
    """Refuse numbers below ``least`` or above ``most``; None passes.

    Args:
        method: Name of the method.
        least: Smallest number.
        most: Largest number.
        given: Values by key.

    Raises:
        ConfigError: With the first key whose value is refused.
    """
    for key, value in given.items():
        if value is not None and not least <= float(value) <= most:
            _refuse(method, key, value, f"from {least} to {most}")


def check_bits(method: str, **given: float | None) -> None:
    """Refuse bits of a code that are not whole numbers from 2 to 8; None passes.

    Raises:
        ConfigError: With the first key whose value is refused.
    """
    for key, value in given.items():
        if value is not None and not (float(value).is_integer() and 2 <= value <= 8):
            _refuse(method, key, value, "from 2 to 8")


def check_choices(method: str, **given: tuple[object, Collection[str]]) -> None:
    """Refuse words that are not among those that are known.

    Args:
        method: Name of the method.
        **given: Word and known words by key.

    Raises:
        ConfigError: With the first key whose value is refused, and the nearest word.
    """
    for key, (value, known) in given.items():
        if value not in known:
            _refuse(method, key, value, near(str(value), known))


def check_parts(method: str, **given: float) -> None:
    """Refuse numbers that are not above 0 and below 1.

    Raises:
        ConfigError: With the first key whose value is refused.
    """
    for key, value in given.items():
        if not 0 < float(value) < 1:
            _refuse(method, key, value, "a part, above 0 and below 1")


def check_counts(method: str, **given: int) -> None:
    """Refuse numbers below 1.

    Raises:
        ConfigError: With the first key whose value is refused.
    """
    for key, value in given.items():
        if int(value) < 1:
            _refuse(method, key, value, "at least 1")
