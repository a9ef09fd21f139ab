# SPDX-License-Identifier: Apache-2.0
"""Train, evaluate and ship facial affective-computing models."""

__version__ = "0.1.0"
