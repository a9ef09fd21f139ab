# SPDX-License-Identifier: Apache-2.0
"""A user's own package beside affect: a dataset layout, a task, a loss, a model and the experiment that joins them."""
