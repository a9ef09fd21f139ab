# SPDX-License-Identifier: Apache-2.0
"""Networks for the tests of compression."""

from __future__ import annotations

import torch
from torch import Tensor, nn


def shake_norms(network: nn.Module, seed: int = 0) -> nn.Module:
    """Give batch norms statistics and weights as after a training, some of them negative."""
    draws = torch.Generator().manual_seed(seed)
    for norm in network.modules():
        if isinstance(norm, nn.BatchNorm2d | nn.BatchNorm1d):
            size = norm.num_features
            norm.running_mean.copy_(torch.randn(size, generator=draws) / 2)
            norm.running_var.copy_(torch.rand(size, generator=draws) + 0.5)
            if norm.affine:
                signs = torch.where(torch.rand(size, generator=draws) < 0.2, -1.0, 1.0)
                norm.weight.data.copy_((torch.rand(size, generator=draws) + 0.5) * signs)
                norm.bias.data.copy_(torch.randn(size, generator=draws) / 2)
    return network.eval()


class FaceBlock(nn.Module):
    """A block of ArcFace's residual networks: a batch norm first, and none of its outputs is activated."""

    def __init__(self, inside: int, outside: int, stride: int) -> None:
        super().__init__()
        self.bn1 = nn.BatchNorm2d(inside)
        self.conv1 = nn.Conv2d(inside, outside, 3, padding=1, bias=False)
        self.bn2 = nn.BatchNorm2d(outside)
        self.prelu = nn.PReLU(outside)
        self.conv2 = nn.Conv2d(outside, outside, 3, stride, padding=1, bias=False)
        self.bn3 = nn.BatchNorm2d(outside)
        self.downsample: nn.Module | None = None
        if stride != 1:
            self.downsample = nn.Sequential(nn.Conv2d(inside, outside, 1, stride, bias=False), nn.BatchNorm2d(outside))

    def forward(self, x: Tensor) -> Tensor:
        y = self.bn3(self.conv2(self.prelu(self.bn2(self.conv1(self.bn1(x))))))
        y += x if self.downsample is None else self.downsample(x)
        return y


class FaceNet(nn.Module):
    """Residual network as of ArcFace (IResNet), narrow and with a pooled head; (2, 2, 2, 2) has 18 layers.

    Args:
        blocks: Blocks of each stage.
        width: Channels of the first stage.
        features: Size of the features.
    """

    def __init__(self, blocks: tuple[int, ...] = (2, 2, 2, 2), width: int = 4, features: int = 8) -> None:
        super().__init__()
        self.conv1 = nn.Conv2d(3, width, 3, padding=1, bias=False)
        self.bn1 = nn.BatchNorm2d(width)
        self.prelu = nn.PReLU(width)
        sizes = [width, *(width * 2**stage for stage in range(len(blocks)))]
        self.stages = nn.Sequential(
            *(
                FaceBlock(sizes[stage] if index == 0 else sizes[stage + 1], sizes[stage + 1], 2 if index == 0 else 1)
                for stage, count in enumerate(blocks)
                for index in range(count)
            )
        )
        self.bn2 = nn.BatchNorm2d(sizes[-1])
        self.pool = nn.AdaptiveAvgPool2d(1)
        self.fc = nn.Linear(sizes[-1], features)
        self.features = nn.BatchNorm1d(features)

    def forward(self, x: Tensor) -> Tensor:
        x = self.prelu(self.bn1(self.conv1(x)))
        x = self.pool(self.bn2(self.stages(x))).flatten(1)
        return self.features(self.fc(x))


class RandomNet(nn.Module):
    """A random acyclic network of convolutions, batch norms, sums, concatenations, pooling and activations.

    Args:
        seed: Of all draws.
        steps: Number of operations.
    """

    KINDS = ("conv", "conv", "conv", "norm", "norm", "norm", "add", "add", "concat", "relu", "mean", "max")

    def __init__(self, seed: int, steps: int = 14) -> None:
        super().__init__()
        draws = torch.Generator().manual_seed(seed)

        def draw(below: int) -> int:
            return int(torch.randint(below, (), generator=draws))

        self.plan: list[tuple[str, tuple[int, ...]]] = []
        self.layers = nn.ModuleDict()
        sizes = [3]
        for index in range(1, steps + 1):
            kind = self.KINDS[draw(len(self.KINDS))]
            near = max(0, len(sizes) - 4)  # long chains, in which most values are read more than once
            first = near + draw(len(sizes) - near)
            read: tuple[int, ...] = (first,)
            size = sizes[first]
            if kind in ("add", "concat"):
                fitting = [i for i, other in enumerate(sizes) if (other == size or kind == "concat") and other < 25]
                read = (first, fitting[draw(len(fitting))] if fitting else first)
                size = sizes[read[0]] + sizes[read[1]] if kind == "concat" else size
            layer: nn.Module = nn.Identity()
            if kind == "conv":
                size = (4, 6)[draw(2)]
                kernel, stride = (1, 3, 3)[draw(3)], 1
                groups = 2 if sizes[first] % 2 == 0 and draw(3) == 0 else 1
                layer = nn.Conv2d(sizes[first], size, kernel, stride, kernel // 2, groups=groups, bias=bool(draw(2)))
            elif kind == "norm":
                layer = nn.BatchNorm2d(size, affine=draw(5) > 0)
            elif kind == "relu":
                layer = nn.ReLU()
            elif kind == "mean":
                layer = nn.AvgPool2d(3, 1, 1, count_include_pad=bool(draw(2)))
            elif kind == "max":
                layer = nn.MaxPool2d(3, 1, 1)
            self.layers[str(index)] = layer
            self.plan.append((kind, read))
            sizes.append(size)
        unread = set(range(1, steps + 1)) - {value for _, read in self.plan for value in read}
        self.outputs = sorted(unread)
        self.heads = nn.ModuleDict({str(i): nn.Conv2d(sizes[i], 2, 3, padding=1) for i in self.outputs if draw(4)})

    def forward(self, x: Tensor) -> list[Tensor]:
        values = [x]
        for index, (kind, read) in enumerate(self.plan, 1):
            parts = [values[i] for i in read]
            if kind == "add":
                values.append(parts[0] + parts[1])
            elif kind == "concat":
                values.append(torch.cat(parts, 1))
            else:
                values.append(self.layers[str(index)](parts[0]))
        return [self.heads[str(i)](values[i]) if str(i) in self.heads else values[i] for i in self.outputs]
