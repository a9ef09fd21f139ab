# SPDX-License-Identifier: Apache-2.0
"""The multi-label transformer for action unit detection (arXiv 2203.12531)."""

from affect.models.au_transformer.module import AUTransformer

__all__ = ["AUTransformer"]
