# SPDX-License-Identifier: Apache-2.0
"""Figures of data, training and results: pure functions of arrays and records that return matplotlib figures."""

from affect.report.figures.annotate import FaceNote, annotate_face, annotate_faces, annotate_frame, enlargement
from affect.report.figures.attribution import attribution_sheet
from affect.report.figures.curves import cumulative_error_curve, reliability_diagram, training_curves
from affect.report.figures.findings import attention_sheet, soft_order_matrix, weight_curves
from affect.report.figures.gates import gate_usage
from affect.report.figures.scatter import circumplex, coefficient_scatter
from affect.report.figures.scores import au_bars, confusion_matrix, ladder_bars
from affect.report.figures.sheets import landmark_sheet, prediction_sheet, sample_sheet
from affect.report.figures.stages import stage_sheet
from affect.report.figures.style import save, save_image
from affect.report.figures.timeline import Panel, Timeline, timeline

__all__ = [
    "FaceNote",
    "Panel",
    "Timeline",
    "annotate_face",
    "annotate_faces",
    "annotate_frame",
    "attention_sheet",
    "attribution_sheet",
    "au_bars",
    "circumplex",
    "coefficient_scatter",
    "confusion_matrix",
    "cumulative_error_curve",
    "enlargement",
    "gate_usage",
    "ladder_bars",
    "landmark_sheet",
    "prediction_sheet",
    "reliability_diagram",
    "sample_sheet",
    "save",
    "save_image",
    "soft_order_matrix",
    "stage_sheet",
    "timeline",
    "training_curves",
    "weight_curves",
]
