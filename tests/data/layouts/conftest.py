# SPDX-License-Identifier: Apache-2.0
"""The built-in faces that every layout's tree is made of."""

from __future__ import annotations

from tests.data.layouts.contract import drawn

__all__ = ["drawn"]
