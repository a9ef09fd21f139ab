# SPDX-License-Identifier: Apache-2.0
"""Inputs of controlled experiments: synthetic data with known truth."""
