# SPDX-License-Identifier: Apache-2.0
"""The cascade of DeCaFA (Dapogny, Bailly and Cord, ICCV 2019, arXiv 1904.02549): stages, transfer layers, fusion.

Everything stays at the resolution of the image. A stage turns its input into features H; 1x1 convolutions turn these
into one score map per point of each annotation scheme, from the finest scheme to the coarsest; a softmax over the
pixels makes each map an attention map M, whose mean position is the point. The next stage sees the image and the
features, each also weighed by the attention of all points together.

Positions follow ``affect.geometry.heatmaps``: pixels of the map with the first pixel centre at 0. Pooling by 2 and
bilinear resizing with ``align_corners=False`` keep edges on edges, so features have the same convention at every depth.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from typing import Literal, NamedTuple, get_args

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from affect.errors import ConfigError, near
from affect.geometry.heatmaps import expected_points, spatial_softmax

Chain = Literal["scores", "separate", "mixture"]
"""What a coarser scheme's maps are made of: the finer scheme's scores, the features, or the finer scheme's maps."""

Fusion = Literal["image", "attended_image", "features", "attended_features", "attention", "maps"]
"""What the next stage can be shown."""

Attention = Literal["all", "fine"]
"""Whether the maps of all schemes or those of the finest one make the attention."""

FUSION: tuple[Fusion, ...] = ("image", "attended_image", "features", "attended_features")


def convolutions(inputs: int, width: int, count: int) -> nn.Sequential:
    """Return ``count`` 3x3 convolutions from ``inputs`` to ``width`` channels, each with batch norm and ReLU.

    They have no biases: batch norm would take them out again.
    """
    layers: list[nn.Module] = []
    for k in range(count):
        before = width if k else inputs
        layers += [nn.Conv2d(before, width, 3, padding=1, bias=False), nn.BatchNorm2d(width), nn.ReLU(inplace=True)]
    return nn.Sequential(*layers)


class EncoderDecoder(nn.Module):
    """Convolutions with 2x2 max-pooling behind each level, and the mirrored way back by bilinear resizing.

    Args:
        inputs: Channels of the input.
        widths: Channels of each level, from the full resolution down.
        count: Convolutions of a level on each way.
        skips: Whether a level of the way back also sees the output of the same level of the way down.
    """

    def __init__(self, inputs: int, widths: Sequence[int], count: int = 2, skips: bool = False) -> None:
        super().__init__()
        if not widths or min(widths) < 1 or count < 1:
            raise ConfigError(
                f"model.widths={list(widths)}, model.convolutions={count}: give at least one level, and 1 in each"
            )
        self.skips = bool(skips)
        down, up = [], []
        for k, width in enumerate(widths):
            down.append(convolutions(widths[k - 1] if k else inputs, width, count))
            below = widths[min(k + 1, len(widths) - 1)]
            up.append(convolutions(below + (width if skips else 0), width, count))
        self.down, self.up = nn.ModuleList(down), nn.ModuleList(up)
        self.stride, self.width = 2 ** len(widths), int(widths[0])

    def forward(self, x: Tensor) -> Tensor:
        """Return features ``(B, widths[0], H, W)`` of an input ``(B, C, H, W)``; sides are multiples of ``stride``."""
        if x.shape[-2] % self.stride or x.shape[-1] % self.stride:
            raise ValueError(f"sides {tuple(x.shape[-2:])} are no multiples of {self.stride} pixels")
        kept = []
        for level in self.down:
            x = level(x)
            kept.append(x)
            x = F.max_pool2d(x, 2)
        for level, same in zip(reversed(self.up), reversed(kept), strict=True):
            x = F.interpolate(x, scale_factor=2.0, mode="bilinear", align_corners=False)
            x = level(torch.cat([x, same], 1) if self.skips else x)
        return x


class Mixture(nn.Module):
    """Maps as convex combinations of other maps, so that points are the same combinations of the other points.

    Args:
        inputs: Number of maps that are mixed.
        outputs: Number of maps.
    """

    def __init__(self, inputs: int, outputs: int) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.zeros(outputs, inputs))

    def forward(self, maps: Tensor) -> Tensor:
        """Return ``(B, outputs, H, W)`` of maps ``(B, inputs, H, W)``."""
        return torch.einsum("kl,blhw->bkhw", self.weight.softmax(1), maps)


class Stage(nn.Module):
    """An encoder-decoder and the transfer layers of one stage; no stage shares weights with another.

    Transfer layers have no biases: a constant added to a map, also through further 1x1 convolutions, does not change
    its softmax.

    Args:
        inputs: Channels of the input.
        schemes: Number of points by scheme, from fine to coarse.
        widths: Channels of each level.
        count: Convolutions of a level on each way.
        skips: Whether levels are connected.
        chain: ``scores`` (Z_k = T_k Z_(k-1), Z_1 = T_1 H), ``separate`` (Z_k = T_k H) or ``mixture`` (M_k is a convex
            combination of M_(k-1); Z_1 = T_1 H).
        temperature: Divides scores before the softmax.
    """

    def __init__(
        self,
        inputs: int,
        schemes: Mapping[str, int],
        widths: Sequence[int],
        count: int = 2,
        skips: bool = False,
        chain: Chain = "scores",
        temperature: float = 1.0,
    ) -> None:
        super().__init__()
        self.body = EncoderDecoder(inputs, widths, count, skips)
        self.chain, self.temperature = chain, float(temperature)
        self.transfer = nn.ModuleDict()
        before = self.body.width
        for k, (name, points) in enumerate(schemes.items()):
            mixed = chain == "mixture" and k > 0
            layer = Mixture(before, points) if mixed else nn.Conv2d(before, points, 1, bias=False)
            self.transfer[name] = layer
            before = self.body.width if chain == "separate" else points

    def forward(self, x: Tensor) -> tuple[Tensor, dict[str, Tensor]]:
        """Return features ``(B, C, H, W)`` and the attention maps ``(B, P, H, W)`` of each scheme."""
        features = self.body(x)
        maps: dict[str, Tensor] = {}
        given = features
        for name, layer in self.transfer.items():
            if isinstance(layer, Mixture):
                given = maps[name] = layer(given)
                continue
            scores = layer(features if self.chain == "separate" else given)
            # Half precision would lose whole pixels in sums over thousands of them.
            wide = scores.float() if scores.dtype in (torch.float16, torch.bfloat16) else scores
            maps[name] = spatial_softmax(wide, self.temperature)
            given = maps[name] if self.chain == "mixture" else scores
        return features, maps


class StageOutput(NamedTuple):
    """What a stage says.

    Attributes:
        maps: Attention maps ``(B, P, H, W)`` by scheme; each sums to 1.
        points: Mean positions ``(B, P, 2)`` by scheme, x and y in pixels, first pixel centre at 0.
        attention: Sum of the maps that make the attention ``(B, 1, H, W)``, its largest value 1 in each image.
    """

    maps: dict[str, Tensor]
    points: dict[str, Tensor]
    attention: Tensor


class Cascade(nn.Module):
    """The stages of DeCaFA.

    Args:
        channels: Channels of the image.
        schemes: Number of points by scheme, in the order of the chain, fine to coarse.
        stages: Number of stages.
        widths: Channels of each level of a stage, from the full resolution down.
        count: Convolutions of a level on each way.
        skips: Whether levels of a stage are connected.
        chain: As for ``Stage``.
        temperature: As for ``Stage``.
        fusion: What a stage after the first one sees, stacked: the ``image`` I, ``attended_image`` I A, ``features`` H,
            ``attended_features`` H A, ``attention`` A itself, or all ``maps`` M.
        attention: Whether the maps of ``all`` schemes or of the ``fine`` one are summed to A.
        detached: Stop gradients at the attention (ablation): stages then learn of each other through H alone.

    Raises:
        ConfigError: If a setting is unknown or a number out of range.
    """

    def __init__(
        self,
        channels: int,
        schemes: Mapping[str, int],
        stages: int = 4,
        widths: Sequence[int] = (64, 128, 256),
        count: int = 2,
        skips: bool = False,
        chain: Chain = "scores",
        temperature: float = 1.0,
        fusion: Sequence[Fusion] = FUSION,
        attention: Attention = "all",
        detached: bool = False,
    ) -> None:
        super().__init__()
        for key, given, options in (
            ("chain", [chain], get_args(Chain)),
            ("attention", [attention], get_args(Attention)),
            ("fusion", fusion, get_args(Fusion)),
        ):
            for value in given:
                if value not in options:
                    raise ConfigError(f"model.{key}={value!r}: {near(str(value), options)}")
        if stages < 1:
            raise ConfigError(f"model.stages={stages}: at least one stage is needed")
        if not temperature > 0:
            raise ConfigError(f"model.temperature={temperature}: must be more than 0")
        if not schemes:
            raise ConfigError("a cascade needs at least one landmark scheme")
        if stages > 1 and (not fusion or len(set(fusion)) != len(fusion)):
            raise ConfigError(f"model.fusion={list(fusion)}: name what the next stage sees, each once")
        self.schemes, self.fusion = dict(schemes), tuple(fusion)
        self.attention, self.detached = attention, bool(detached)
        sizes = {
            "image": channels,
            "attended_image": channels,
            "features": widths[0] if widths else 0,
            "attended_features": widths[0] if widths else 0,
            "attention": 1,
            "maps": sum(schemes.values()),
        }
        later = sum(sizes[part] for part in fusion)
        self.stages = nn.ModuleList(
            Stage(later if k else channels, schemes, widths, count, skips, chain, temperature) for k in range(stages)
        )

    def forward(self, image: Tensor) -> dict[str, Tensor]:
        """Return the last stage's points ``(B, P, 2)`` in pixels by scheme for normalised images ``(B, C, H, W)``."""
        points: dict[str, Tensor] = {}
        for output in self.run(image):
            points = output.points
        return points

    def run(self, image: Tensor) -> Iterator[StageOutput]:
        """Yield what each stage says, in order; what nobody keeps is freed before the next stage runs.

        Args:
            image: Normalised images ``(B, C, H, W)``.
        """
        shown = image
        for k, stage in enumerate(self.stages):
            features, maps = stage(shown)
            attention = self.attend(maps)
            points = {name: expected_points(each) for name, each in maps.items()}
            if k + 1 < len(self.stages):
                shown = self.fuse(image, features, maps, attention)
            yield StageOutput(maps, points, attention)

    def attend(self, maps: Mapping[str, Tensor]) -> Tensor:
        """Return the attention A ``(B, 1, H, W)``: the sum of maps ``(B, P, H, W)``, its largest value 1 in each image.

        The scale matters: a map sums to 1 over all pixels, so that its values are too small beside those of an image.
        """
        chosen = list(maps.values()) if self.attention == "all" else [maps[next(iter(self.schemes))]]
        total = torch.stack([each.sum(1, keepdim=True) for each in chosen]).sum(0)
        scaled = total / total.amax((-2, -1), keepdim=True)
        return scaled.detach() if self.detached else scaled

    def fuse(self, image: Tensor, features: Tensor, maps: Mapping[str, Tensor], attention: Tensor) -> Tensor:
        """Return the input of the next stage, parts in the order of ``fusion``."""
        attention = attention.to(features.dtype)
        parts = []
        for part in self.fusion:
            if part == "image":
                parts.append(image)
            elif part == "attended_image":
                parts.append(image * attention)
            elif part == "features":
                parts.append(features)
            elif part == "attended_features":
                parts.append(features * attention)
            elif part == "attention":
                parts.append(attention)
            else:
                given = torch.cat(list(maps.values()), 1).to(features.dtype)
                parts.append(given.detach() if self.detached else given)
        return torch.cat(parts, 1)
