# SPDX-License-Identifier: Apache-2.0
"""Static ranges of inputs without data (SPIQ) beside ranges measured on images: how far features move.

Two networks: EfficientNet-Lite0 with ImageNet weights on photographs of scikit-image, whose inputs are sparse with long
tails, and MobileNetV3 with random weights on noise, whose inputs are Gaussian. Relative changes of features, not times:
they are the same wherever this runs, up to rounding.
"""

from __future__ import annotations

import copy
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
import timm
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from affect.compression.base import Data, backbone, quantizable, relative_error, run_chain
from affect.compression.spiq import SPIQ
from affect.compression.uniform import input_ranges, put_inputs
from affect.encoders import TimmEncoder
from affect.errors import ConfigError

PHOTOGRAPHS = ("astronaut", "chelsea", "coffee", "rocket")
SIDE = 128
"""Pixels of a photograph's side."""

BITS = (8, 4)
REACHES = (3.0, 4.0, 5.0, 6.0, 8.0, 10.0, 14.0)
"""Standard deviations that ranges cover."""


def photographs(encoder: nn.Module) -> tuple[Tensor, tuple[Tensor, Tensor]]:
    """Return normalised photographs ``(4, 3, S, S)``, and the smallest and largest pixel of each channel.

    Raises:
        ConfigError: If scikit-image is not installed.
    """
    try:
        from skimage import data
    except ImportError as error:
        raise ConfigError("benchmark ranges needs photographs of scikit-image: pip install 'affect[demo]'") from error
    squares = []
    for name in PHOTOGRAPHS:
        image = torch.from_numpy(np.ascontiguousarray(getattr(data, name)())).permute(2, 0, 1)[None].float()
        side = min(image.shape[2:])
        square = F.interpolate(image[..., :side, :side], (SIDE, SIDE), mode="bilinear", antialias=True)
        squares.append(square.round().to(torch.uint8))
    levels = torch.tensor([0, 255], dtype=torch.uint8).view(2, 1, 1, 1).expand(2, 3, 1, 1)
    with torch.no_grad():
        low, high = encoder.normalise(levels).flatten(1)  # type: ignore[operator]
        return encoder.normalise(torch.cat(squares)), (low, high)  # type: ignore[operator]


def trained_network() -> tuple[nn.Module, Tensor, Data]:
    """Return EfficientNet-Lite0 with ImageNet weights up to its features, photographs, and what SPIQ may know."""
    encoder = TimmEncoder("tf_efficientnet_lite0", weights="packaged", image_size=SIDE).eval()
    x, limits = photographs(encoder)
    return backbone(encoder).eval(), x, Data(limits=limits)


def random_network() -> tuple[nn.Module, Tensor, Data]:
    """Return MobileNetV3 with random weights and the statistics of noise, the noise, and what SPIQ may know."""
    torch.manual_seed(0)
    network = timm.create_model("mobilenetv3_small_050", pretrained=False)
    x = torch.randn(8, 3, 64, 64, generator=torch.Generator().manual_seed(0))
    take_statistics(network, x)
    return network, x, Data()


def take_statistics(network: nn.Module, x: Tensor) -> None:
    """Give batch norms the statistics of their inputs, and leave the network in evaluation mode."""
    for module in network.modules():
        if isinstance(module, nn.BatchNorm1d | nn.BatchNorm2d):
            module.momentum = 1.0
    network.train()
    with torch.no_grad():
        network(x)
    network.eval()


@torch.no_grad()
def change_with(network: nn.Module, x: Tensor, ranges: Mapping[str, tuple[Tensor, Tensor]], bits: int) -> float:
    """Return the relative change of a network's output where inputs have static grids of given ranges."""
    changed = copy.deepcopy(network)
    for name, (low, high) in ranges.items():
        put_inputs(changed, name, low.float(), high.float(), bits)
    return relative_error(network(x), changed(x))


def rows_of(
    name: str, network: nn.Module, x: Tensor, data: Data, bits: int, reaches: Sequence[float]
) -> list[dict[str, Any]]:
    """Return a row for each kind of ranges: how much the output moves by, for each reach."""
    per_channel: dict[str, Any] = {}
    per_layer: dict[str, Any] = {}
    for reach in reaches:
        spiq = SPIQ(bits, reach=reach, edge_bits=None)
        per_channel[f"reach {reach:g}"] = run_chain(copy.deepcopy(network), [spiq], data, x).errors[0]
        widest = {n: (low.amin()[None], high.amax()[None]) for n, (low, high, _) in spiq.ranges.items()}
        per_layer[f"reach {reach:g}"] = change_with(network, x, widest, bits)
    first: dict[str, Any] = {"network": name, "bits": bits}
    rows = [
        {**first, "ranges": "SPIQ, of each channel", **per_channel, "measured": ""},
        {**first, "ranges": "SPIQ, widest of the layer", **per_layer, "measured": ""},
    ]
    for kind, whole in (("channel", True), ("layer", False)):
        ranges = input_ranges(network, list(quantizable(network)), [x], per_channel=whole)
        measured = change_with(network, x, ranges, bits)
        rows.append({**first, "ranges": f"of these images, of each {kind}", **dict.fromkeys(per_channel, ""),
                     "measured": measured})  # fmt: skip
    return rows


def measure(quick: bool) -> list[dict[str, Any]]:
    """Return how much features move by: a row for each network, number of bits and kind of ranges.

    Raises:
        ConfigError: If the packaged weights or photographs are not installed.
    """
    if quick:
        return rows_of("MobileNetV3-small-050, random weights", *random_network(), 8, (5.0,))
    rows = []
    for bits in BITS:
        rows += rows_of("EfficientNet-Lite0, ImageNet weights", *trained_network(), bits, REACHES)
    return rows + rows_of("MobileNetV3-small-050, random weights", *random_network(), 8, REACHES)
