# SPDX-License-Identifier: Apache-2.0
"""MONET: multi-order networks for action unit detection (arXiv 2202.00446), and what it is compared with."""

from affect.models.monet.baselines import SoftLayerOrdering, VMNCommon, VMNSeparate
from affect.models.monet.module import Monet
from affect.models.monet.network import MultiOrder, TaskCells

__all__ = ["Monet", "MultiOrder", "SoftLayerOrdering", "TaskCells", "VMNCommon", "VMNSeparate"]
