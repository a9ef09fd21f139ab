# SPDX-License-Identifier: Apache-2.0
"""MTCNN, the detector that many published crops come from, with the weights that the package facenet-pytorch ships.

K. Zhang, Z. Zhang, Z. Li and Y. Qiao, "Joint Face Detection and Alignment Using Multitask Cascaded Convolutional
Networks", IEEE Signal Processing Letters 23(10), 2016: a fully convolutional network proposes boxes on an image
pyramid, two further networks reject and move them. The package's requirements are older than ours, so it is installed
without them and only its three weight files are read. Boxes follow its conventions (thresholds, rounding, ratio of the
pyramid).
"""

from __future__ import annotations

import functools
import importlib.util
import math
from pathlib import Path

import numpy as np
import torch
import torch.nn.functional as F
from numpy.typing import NDArray
from torch import Tensor, nn
from torchvision.ops import nms

from affect.errors import ConfigError
from affect.geometry.providers import Detection, require_rgb

INSTALL = "pip install --no-deps facenet-pytorch==2.6.0"


class _Cascade(nn.Module):
    """One of the three networks; names and order of the layers are those of the weight files.

    Args:
        widths: Channels behind each convolution.
        kernels: Sizes of the convolutions.
        pools: Size of the pooling behind each convolution, 0 for none.
        flat: Numbers that enter the dense layer and leave it; None for the proposals, which stay convolutional.
    """

    def __init__(
        self, widths: tuple[int, ...], kernels: tuple[int, ...], pools: tuple[int, ...], flat: tuple[int, int] | None
    ) -> None:
        super().__init__()
        self.pools, self.flat, count = pools, flat, len(widths)
        for k, (before, width, kernel) in enumerate(zip((3, *widths), widths, kernels, strict=False), 1):
            self.add_module(f"conv{k}", nn.Conv2d(before, width, kernel))
            self.add_module(f"prelu{k}", nn.PReLU(width))
        if flat is None:
            self.score, self.move = f"conv{count + 1}_1", f"conv{count + 1}_2"
            self.add_module(self.score, nn.Conv2d(widths[-1], 2, 1))
            self.add_module(self.move, nn.Conv2d(widths[-1], 4, 1))
            return
        self.dense, self.score, self.move = f"{count + 1}", f"dense{count + 2}_1", f"dense{count + 2}_2"
        self.add_module(f"dense{self.dense}", nn.Linear(*flat))
        self.add_module(f"prelu{self.dense}", nn.PReLU(flat[1]))
        self.add_module(self.score, nn.Linear(flat[1], 2))
        self.add_module(self.move, nn.Linear(flat[1], 4))

    def forward(self, image: Tensor) -> tuple[Tensor, Tensor]:
        """Return face probability ``(B, …)`` and corrections of the box ``(B, 4, …)`` of images in [0, 255]."""
        x = (image - 127.5) * 0.0078125
        for k, pool in enumerate(self.pools, 1):
            x = getattr(self, f"prelu{k}")(getattr(self, f"conv{k}")(x))
            if pool:
                x = F.max_pool2d(x, pool, 2, ceil_mode=True)
        if self.flat is not None:
            x = x.permute(0, 3, 2, 1).flatten(1)
            x = getattr(self, f"prelu{self.dense}")(getattr(self, f"dense{self.dense}")(x))
        return getattr(self, self.score)(x).softmax(1)[:, 1], getattr(self, self.move)(x)


_SHAPES: dict[str, tuple] = {
    "pnet": ((10, 16, 32), (3, 3, 3), (2, 0, 0), None),
    "rnet": ((28, 48, 64), (3, 3, 2), (3, 3, 0), (576, 128)),
    "onet": ((32, 64, 64, 128), (3, 3, 3, 2), (3, 3, 2, 0), (1152, 256)),
}


@functools.cache
def _network(name: str, device: str) -> nn.Module:
    spec = importlib.util.find_spec("facenet_pytorch")
    folder = Path(spec.origin).parent / "data" if spec is not None and spec.origin else None
    if folder is None or not (folder / f"{name}.pt").is_file():
        raise ConfigError(
            f"detector mtcnn: its weights come with the package facenet-pytorch: {INSTALL}; "
            "or take the packaged detector's box with prepare.detector=faceapi"
        )
    made = _Cascade(*_SHAPES[name])
    # The points of the last network are left out: the landmark provider finds more.
    missing = made.load_state_dict(torch.load(folder / f"{name}.pt", "cpu", weights_only=True), strict=False)
    assert not missing.missing_keys, missing
    return made.eval().requires_grad_(False).to(device)


class MtcnnDetector:
    """Boxes of MTCNN.

    Args:
        smallest: Side of the smallest face in pixels.
        thresholds: Lowest face probability of the three networks.
        ratio: Of one image of the pyramid to the next.
        device: Where the networks run.

    Raises:
        ConfigError: If the weights are not installed.
    """

    def __init__(
        self,
        smallest: int = 20,
        thresholds: tuple[float, float, float] = (0.6, 0.7, 0.7),
        ratio: float = 0.709,
        device: str = "cpu",
    ) -> None:
        self.smallest, self.thresholds, self.ratio, self.device = smallest, thresholds, ratio, device
        for name in _SHAPES:
            _network(name, device)

    @torch.inference_mode()
    def detect(self, image: NDArray[np.uint8]) -> list[Detection]:
        pixels = torch.from_numpy(require_rgb(image)).to(self.device).permute(2, 0, 1)[None].float()
        boxes, scores = self._proposals(pixels)
        for name, side, threshold in (("rnet", 24, self.thresholds[1]), ("onet", 48, self.thresholds[2])):
            boxes = _squared(boxes)
            cut, inside = _cut(pixels, boxes, side)
            if not len(cut):
                return []
            scores, moves = _network(name, self.device)(cut)
            chosen = scores > threshold
            boxes, scores, moves = boxes[inside][chosen], scores[chosen], moves[chosen]
            if name == "rnet":
                kept = nms(boxes, scores, 0.7)
                boxes, scores, moves = boxes[kept], scores[kept], moves[kept]
            extent = (boxes[:, 2:] - boxes[:, :2] + 1).repeat(1, 2)
            boxes = boxes + moves * extent
        kept = _apart(boxes, scores)
        # The package counts pixels from 1.
        found = torch.cat([boxes, scores[:, None]], 1)[kept].double().cpu().numpy()
        return [Detection(face[:4] - 1, float(face[4])) for face in found]

    def _proposals(self, pixels: Tensor) -> tuple[Tensor, Tensor]:
        height, width = pixels.shape[2:]
        scale, boxes, scores = 12 / self.smallest, [], []
        while min(height, width) * scale >= 12:
            small = F.interpolate(pixels, (int(height * scale + 1), int(width * scale + 1)), mode="area")
            score, move = _network("pnet", self.device)(small)
            seen = score[0] >= self.thresholds[0]
            corner = seen.nonzero().flip(1).float() * 2
            cells = torch.cat([((corner + 1) / scale).floor(), ((corner + 12) / scale).floor()], 1)
            kept = nms(cells, score[0][seen], 0.5)
            boxes.append(torch.cat([cells, move[0][:, seen].T], 1)[kept])
            scores.append(score[0][seen][kept])
            scale *= self.ratio
        if not boxes:
            return pixels.new_zeros(0, 4), pixels.new_zeros(0)
        every, probability = torch.cat(boxes), torch.cat(scores)
        kept = nms(every[:, :4], probability, 0.7)
        cells, move = every[kept, :4], every[kept, 4:]
        return cells + move * (cells[:, 2:] - cells[:, :2]).repeat(1, 2), probability[kept]


def _squared(boxes: Tensor) -> Tensor:
    extent = boxes[:, 2:] - boxes[:, :2]
    side = extent.amax(1, keepdim=True) if len(boxes) else extent[:, :1]
    low = boxes[:, :2] + extent / 2 - side / 2
    return torch.cat([low, low + side], 1)


def _cut(pixels: Tensor, boxes: Tensor, side: int) -> tuple[Tensor, Tensor]:
    """Return the parts of an image in ``boxes`` as ``(N, 3, side, side)``, and which boxes reach into the image."""
    height, width = pixels.shape[2:]
    low = boxes[:, :2].trunc().int().clamp(min=1) - 1
    high = boxes[:, 2:].trunc().int().minimum(torch.tensor([width, height], device=boxes.device).int())
    inside = (high > low).all(1)
    corners = torch.cat([low, high], 1)[inside].tolist()
    parts = [F.interpolate(pixels[:, :, y0:y1, x0:x1], (side, side), mode="area") for x0, y0, x1, y1 in corners]
    return torch.cat(parts) if parts else pixels.new_zeros(0, 3, side, side), inside


def _apart(boxes: Tensor, scores: Tensor) -> list[int]:
    """Return the surest boxes, of which none covers 0.7 of the smaller of two."""
    corners = boxes.double().tolist()
    kept: list[int] = []
    for k in scores.argsort(descending=True, stable=True).tolist():
        if all(_covered(corners[k], corners[other]) <= 0.7 for other in kept):
            kept.append(k)
    return kept


def _covered(a: list[float], b: list[float]) -> float:
    common = math.prod(max(0.0, min(a[i + 2], b[i + 2]) - max(a[i], b[i]) + 1) for i in (0, 1))
    return common / min(math.prod(c[i + 2] - c[i] + 1 for i in (0, 1)) for c in (a, b))
