# SPDX-License-Identifier: Apache-2.0
"""DeCaFA: a fully convolutional cascade for facial points, trained on several schemes at once (arXiv 1904.02549)."""

from affect.models.decafa.module import Decafa
from affect.models.decafa.network import Cascade, EncoderDecoder, Stage

__all__ = ["Cascade", "Decafa", "EncoderDecoder", "Stage"]
