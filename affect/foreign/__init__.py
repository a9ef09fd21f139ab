# SPDX-License-Identifier: Apache-2.0
"""Checkpoints that are no folder of ours: exported files, other people's ONNX files, packaged models, the hub."""

from affect.foreign.adapter import Adapter, Input, Output, adapter_names, read_adapter
from affect.foreign.opening import Predictor, build_predictor, open_checkpoint
from affect.foreign.packaged import PACKAGED
from affect.foreign.program import Program, ProgramModule, read_program

__all__ = [
    "PACKAGED",
    "Adapter",
    "Input",
    "Output",
    "Predictor",
    "Program",
    "ProgramModule",
    "adapter_names",
    "build_predictor",
    "open_checkpoint",
    "read_adapter",
    "read_program",
]
