# SPDX-License-Identifier: Apache-2.0
"""Tests, in the same folders as the package."""
