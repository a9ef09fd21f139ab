# SPDX-License-Identifier: Apache-2.0
"""Tables, layouts, splits, crops and batches: everything between a dataset as delivered and what a model is fed."""
