# SPDX-License-Identifier: Apache-2.0
"""The multi-label transformer for action unit detection: one learned token per action unit."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from affect.encoders import TimmEncoder
from affect.errors import ConfigError
from affect.models.tokens import TokenModule
from affect.tasks import Task


class AUTransformer(TokenModule):
    """One token per action unit (Tallec, Yvinec, Dapogny and Bailly, arXiv 2203.12531); all share one output layer.

    Args:
        tasks: Tasks of yes-or-no outputs (action units, attributes), by name.
        encoder: Backbone with ``output=map``.
        **common: Arguments of ``affect.models.tokens.TokenModule`` and ``AffectModule``.

    Raises:
        ConfigError: If a task has other outputs.
    """

    def __init__(self, tasks: Mapping[str, Task], encoder: TimmEncoder, **common: Any) -> None:  # noqa: ANN401
        other = [name for name, task in tasks.items() if not task.flags]
        if other:
            raise ConfigError(
                f"model=au_transformer has one token per action unit and none for {', '.join(other)}; "
                "leave the task out, or take model=task_token_transformer"
            )
        super().__init__(tasks, encoder, tokens="output", **common)
