# SPDX-License-Identifier: Apache-2.0
"""PAL: privileged attribution loss (arXiv 2203.12905), an auxiliary objective of any model."""

from affect.models.pal.objective import PrivilegedAttribution

__all__ = ["PrivilegedAttribution"]
