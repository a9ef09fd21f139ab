# SPDX-License-Identifier: Apache-2.0
"""Built-in faces: a parametric three-dimensional face that moves by action units, drawn with exact labels."""

from __future__ import annotations

from affect.data.faces.dials import FaceDials
from affect.data.faces.sheet import sheet
from affect.data.faces.source import FaceImages, labels_table, write_files

__all__ = ["FaceDials", "FaceImages", "labels_table", "sheet", "write_files"]
