# SPDX-License-Identifier: Apache-2.0
"""Methods: one folder per paper, all on ``affect.models.base.AffectModule``."""
