# SPDX-License-Identifier: Apache-2.0
"""The subcommands of ``affect``: thin entry points, each a function ``run(config)``."""
