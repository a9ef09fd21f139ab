# SPDX-License-Identifier: Apache-2.0
"""One module per dataset: a pure function `read` from the files as delivered to a face table, and its inverse."""
