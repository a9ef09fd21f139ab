# SPDX-License-Identifier: Apache-2.0
"""The multi-task transformer: tokens for action units, expression, valence and arousal in one decoder."""

from __future__ import annotations

from affect.models.tokens import TokenModule


class TaskTokenTransformer(TokenModule):
    """Task tokens for any set of tasks (Tallec, Yvinec, Dapogny and Bailly, arXiv 2208.03506).

    By default there is one token per action unit, one for the expression and one for valence and arousal: 14 for
    Aff-Wild2. ``tokens=task`` has one per task (3), ``tokens=output`` one per output (22). The article's own number of
    tokens is not known to us. Arguments are those of ``affect.models.tokens.TokenModule``.
    """
