# SPDX-License-Identifier: Apache-2.0
"""Post-training compression: transforms of trained networks, their layers, and how a result is stored."""
