# SPDX-License-Identifier: Apache-2.0
"""What ``affect benchmark`` measures: one file per benchmark, each a function that returns the rows of a table."""
