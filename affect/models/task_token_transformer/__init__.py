# SPDX-License-Identifier: Apache-2.0
"""The multi-task transformer with task tokens (arXiv 2208.03506)."""

from affect.models.task_token_transformer.module import TaskTokenTransformer

__all__ = ["TaskTokenTransformer"]
