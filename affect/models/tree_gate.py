# SPDX-License-Identifier: Apache-2.0
"""A soft decision tree as a gate: which of L leaves an example reaches, with probabilities that sum to 1.

Used by THIN (arXiv 2010.07614) and by the tree-gated methods that follow it; numbering as in the authors' published
inference code.
"""

from __future__ import annotations

import torch
from torch import Tensor, nn

from affect.errors import ConfigError


def tree_gate(decisions: Tensor) -> Tensor:
    r"""Return the weight of each leaf of a soft binary tree, ``(B, L)``; rows sum to 1.

    Nodes are in heap order: entry 0 is not used, 1 is the root, node ``n`` has the children ``2n`` and ``2n + 1``. The
    first is taken with probability :math:`d_n`, the second with :math:`1 - d_n`, and a leaf's weight is the product
    along its path. Leaves are in order from left to right.

    Args:
        decisions: Probabilities d ``(B, L)`` with L a power of two, entry 0 ignored.

    Raises:
        ConfigError: If L is no power of two.

    Example:
        >>> tree_gate(torch.tensor([[0.0, 0.9, 0.5, 1.0]]))
        tensor([[0.4500, 0.4500, 0.1000, 0.0000]])
    """
    leaves = decisions.shape[1]
    require_leaves(leaves)
    weights, first = decisions.new_ones(decisions.shape[0], 1), 1
    while weights.shape[1] < leaves:
        width = weights.shape[1]
        left = decisions[:, first : first + width]  # the nodes of this level
        weights = torch.stack([weights * left, weights * (1 - left)], 2).flatten(1)
        first += width
    return weights


def require_leaves(leaves: int) -> None:
    """Raise ``ConfigError`` if a tree cannot have so many leaves."""
    if leaves < 1 or leaves & (leaves - 1):
        raise ConfigError(f"a tree has 1, 2, 4, 8, … leaves, and {leaves} were asked for")


class TreeGate(nn.Module):
    """A linear map to decisions, and the leaves that they reach.

    Args:
        features: Numbers that the gate reads.
        leaves: Number of leaves L, a power of two.
        norm: Batch norm between map and sigmoid.
    """

    def __init__(self, features: int, leaves: int, norm: bool = False) -> None:
        super().__init__()
        require_leaves(leaves)
        self.linear = nn.Linear(features, leaves)
        self.norm = nn.BatchNorm1d(leaves) if norm else nn.Identity()

    def forward(self, features: Tensor) -> Tensor:
        """Return leaf weights ``(B, L)`` of ``(B, features)``."""
        return tree_gate(self.norm(self.linear(features)).sigmoid())
