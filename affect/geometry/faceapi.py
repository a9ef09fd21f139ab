# SPDX-License-Identifier: Apache-2.0
"""Three small face networks that ship with the package: a detector, 68 landmarks and seven expressions.

Plain PyTorch ports of the networks of face-api (Vincent Mühler; maintained by Vladimir Mandic as
``@vladmandic/face-api``, version 1.7.15, MIT). The weights lie unchanged in ``weights/``, 8-bit quantised, 0.9 MB, with
their licence and origin; ``network`` reads them and checks their sha256. They are honest small baselines: good on
happy, neutral and surprised, poor on negative expressions; what they were trained on is not documented.

Images are RGB uint8 ``(H, W, 3)``. Points and boxes are in pixels with the first pixel centre at 0, so the edges of an
image are at -0.5 and ``W - 0.5``.
"""

from __future__ import annotations

import functools
import hashlib
import json
from collections.abc import Sequence
from importlib import resources

import cv2
import numpy as np
import torch
import torch.nn.functional as F
from numpy.typing import NDArray
from torch import Tensor, nn

from affect import labels
from affect.errors import DataError
from affect.geometry.alignment import warp

ORIGIN = "npm @vladmandic/face-api@1.7.15"
"""Package that the weights come from, for metadata."""

EXPRESSIONS = (
    labels.NEUTRAL,
    labels.HAPPINESS,
    labels.SADNESS,
    labels.ANGER,
    labels.FEAR,
    labels.DISGUST,
    labels.SURPRISE,
)
"""Order of the expression network's outputs."""

CPU_CHUNK = 4
"""Images that a processor works on at once: a large batch leaves its cache and takes twice as long per image."""

_SHA256 = {
    "tiny_face_detector": "b7503ce7df31039b1c43316a9b865cab6a70dd748cc602d3fa28b551503c3871",
    "face_landmark_68": "4611ef65c87d836d03d684b30eec4d195d8b219fa1dd58fc58945831c6b9299b",
    "face_expression": "9a9840f2cf1f4c7eab95f197512569345c00d2426754d4608b92af30e0300f3d",
}
_CROP_SIZE = 112
_CROP_MEAN = (122.782, 117.001, 104.298)
_DETECTOR_MEAN = (117.001, 114.697, 97.404)
# Widths and heights of the five anchors in grid cells.
_ANCHORS = (
    (1.603231, 2.094468),
    (6.041143, 7.080126),
    (2.882459, 3.518061),
    (4.266906, 5.178857),
    (9.041765, 10.66308),
)


# --------------------------------------------------------------------------------------------------- networks


class _Separable(nn.Module):
    """Depthwise 3x3 and pointwise convolution, one bias. Stride 2 pads below and on the right, as TensorFlow does."""

    def __init__(self, channels_in: int, channels_out: int, stride: int = 1) -> None:
        super().__init__()
        self.stride = stride
        self.depthwise = nn.Conv2d(
            channels_in, channels_in, 3, stride, padding=int(stride == 1), groups=channels_in, bias=False
        )
        self.pointwise = nn.Conv2d(channels_in, channels_out, 1)

    def forward(self, x: Tensor) -> Tensor:
        if self.stride == 2:
            x = F.pad(x, (0, 1, 0, 1))
        return self.pointwise(self.depthwise(x))


class _DenseBlock(nn.Module):
    """Four convolutions whose outputs are added up; the first halves the map."""

    def __init__(self, channels_in: int, channels_out: int, first: bool) -> None:
        super().__init__()
        self.first = first
        self.conv0 = (
            nn.Conv2d(channels_in, channels_out, 3, 2) if first else _Separable(channels_in, channels_out, stride=2)
        )
        self.conv1 = _Separable(channels_out, channels_out)
        self.conv2 = _Separable(channels_out, channels_out)
        self.conv3 = _Separable(channels_out, channels_out)

    def forward(self, x: Tensor) -> Tensor:
        out1 = F.relu(self.conv0(F.pad(x, (0, 1, 0, 1)) if self.first else x))
        out2 = self.conv1(out1)
        out3 = self.conv2(F.relu(out1 + out2))
        out4 = self.conv3(F.relu(out1 + out2 + out3))
        return F.relu(out1 + out2 + out3 + out4)


class FaceCropNet(nn.Module):
    """Network on a face crop: four dense blocks, an average and one linear layer.

    Args:
        outputs: 136 for the landmark network, 7 for the expression network.
    """

    def __init__(self, outputs: int) -> None:
        super().__init__()
        self.dense0 = _DenseBlock(3, 32, first=True)
        self.dense1 = _DenseBlock(32, 64, first=False)
        self.dense2 = _DenseBlock(64, 128, first=False)
        self.dense3 = _DenseBlock(128, 256, first=False)
        self.fc = nn.Linear(256, outputs)
        self.register_buffer("mean", torch.tensor(_CROP_MEAN).view(1, 3, 1, 1), persistent=False)

    def forward(self, image: Tensor) -> Tensor:
        """Return raw outputs ``(B, outputs)`` of RGB crops ``(B, 3, 112, 112)`` in [0, 255]."""
        x = (image.to(self.fc.weight.dtype) - self.mean) / 255
        x = self.dense3(self.dense2(self.dense1(self.dense0(x))))
        return self.fc(x.mean((2, 3)))


class TinyFaceDetectorNet(nn.Module):
    """Detector in the manner of YOLOv2 with separable convolutions and five anchors per cell."""

    def __init__(self) -> None:
        super().__init__()
        self.conv0 = nn.Conv2d(3, 16, 3)
        widths = (16, 32, 64, 128, 256, 512)
        for k in range(1, 6):
            self.add_module(f"conv{k}", _Separable(widths[k - 1], widths[k]))
        self.conv8 = nn.Conv2d(512, 25, 1)
        self.register_buffer("mean", torch.tensor(_DETECTOR_MEAN).view(1, 3, 1, 1), persistent=False)
        self.register_buffer("anchors", torch.tensor(_ANCHORS), persistent=False)

    def forward(self, image: Tensor) -> Tensor:
        """Return boxes and scores ``(B, cells * cells * 5, 5)`` of RGB images ``(B, 3, S, S)`` in [0, 255].

        The last axis holds x1, y1, x2, y2 as fractions of S, and the score in [0, 1].
        """
        x = (image.to(self.conv0.weight.dtype) - self.mean) / 255
        x = F.leaky_relu(self.conv0(x), 0.1)
        for k in range(1, 6):
            x = F.max_pool2d(x, 2, 2, ceil_mode=True)
            x = F.leaky_relu(getattr(self, f"conv{k}")(x), 0.1)
        x = self.conv8(F.max_pool2d(F.pad(x, (0, 1, 0, 1), value=-torch.inf), 2, 1))
        batch, _, rows, columns = x.shape
        x = x.view(batch, 5, 5, rows, columns).permute(0, 3, 4, 1, 2)
        grid = torch.stack(
            torch.meshgrid(
                torch.arange(columns, dtype=x.dtype, device=x.device),
                torch.arange(rows, dtype=x.dtype, device=x.device),
                indexing="xy",
            ),
            -1,
        )
        cells = x.new_tensor([columns, rows])
        centre = (grid[:, :, None] + x[..., 0:2].sigmoid()) / cells
        half = x[..., 2:4].exp() * self.anchors / cells / 2
        return torch.cat([centre - half, centre + half, x[..., 4:5].sigmoid()], -1).flatten(1, 3)


def weights_hash(name: str) -> str:
    """Return the sha256 of a network's weight file."""
    return _SHA256[name]


def _read_weights(name: str) -> dict[str, np.ndarray]:
    """Return the arrays of a weight file by their names there, de-quantised to float32."""
    folder = resources.files("affect.geometry") / "weights"
    raw = (folder / f"{name}_model.bin").read_bytes()
    if hashlib.sha256(raw).hexdigest() != _SHA256[name]:
        raise DataError(f"affect/geometry/weights/{name}_model.bin is damaged (sha256 differs); reinstall the package")
    arrays, offset = {}, 0
    for group in json.loads((folder / f"{name}_model-weights_manifest.json").read_text()):
        for entry in group["weights"]:
            count = int(np.prod(entry["shape"]))
            quantised = entry.get("quantization")
            kind = np.dtype(np.uint8) if quantised else np.dtype("<f4")
            array = np.frombuffer(raw, kind, count, offset).astype(np.float32)
            offset += count * kind.itemsize
            if quantised:
                array = array * np.float32(quantised["scale"]) + np.float32(quantised["min"])
            arrays[entry["name"]] = array.reshape(entry["shape"])
    return arrays


def _state_dict(arrays: dict[str, np.ndarray]) -> dict[str, Tensor]:
    """Return a state dict of TensorFlow arrays: other axis order, other names."""
    renamed = {
        "filters": ("weight", (3, 2, 0, 1)),
        "depthwise_filter": ("depthwise.weight", (2, 3, 0, 1)),
        "pointwise_filter": ("pointwise.weight", (3, 2, 0, 1)),
        "weights": ("weight", (1, 0)),
    }
    state = {}
    for key, array in arrays.items():
        parent, leaf = key.rsplit("/", 1)
        if leaf == "bias":
            name, value = ("pointwise.bias" if f"{parent}/pointwise_filter" in arrays else "bias"), array
        else:
            name, axes = renamed[leaf]
            value = array.transpose(axes)
        state[f"{parent.replace('/', '.')}.{name}"] = torch.from_numpy(np.ascontiguousarray(value))
    return state


@functools.cache
def network(name: str, device: str = "cpu") -> nn.Module:
    """Return the network ``tiny_face_detector``, ``face_landmark_68`` or ``face_expression``, in evaluation mode.

    Networks are read once per process and device, and shared.

    Raises:
        DataError: If the weight file of the installation is damaged.
    """
    made: nn.Module
    if name == "tiny_face_detector":
        made = TinyFaceDetectorNet()
    else:
        made = FaceCropNet({"face_landmark_68": 136, "face_expression": len(EXPRESSIONS)}[name])
    made.load_state_dict(_state_dict(_read_weights(name)))
    return made.eval().requires_grad_(False).to(device)


@torch.inference_mode()
def _run(name: str, images: NDArray[np.uint8], device: str) -> Tensor:
    """Return a network's outputs, float64 on the CPU, for images ``(N, H, W, 3)``."""
    # The images' memory order, channels last, is the faster one for these networks, so it is kept.
    chunk = CPU_CHUNK if device == "cpu" else 64
    net = network(name, device)
    parts = [
        net(torch.from_numpy(images[start : start + chunk]).to(device).permute(0, 3, 1, 2)).double().cpu()
        for start in range(0, len(images), chunk)
    ]
    return torch.cat(parts)


# -------------------------------------------------------------------------------------------------- detection


def candidates(
    images: Sequence[NDArray[np.uint8]],
    size: int,
    padding: float = 0.0,
    threshold: float = 0.1,
    device: str = "cpu",
) -> list[NDArray[np.float64]]:
    """Return all boxes above a score that the detector sees at one input size; they overlap.

    Args:
        images: RGB uint8 ``(H, W, 3)``, of any sizes.
        size: Side of the network's input in pixels, a multiple of 32. Images are scaled to fit its upper left corner.
        padding: Black border added on each side before, as a fraction of the longer side.
        threshold: Lowest score.
        device: Where the network runs.

    Returns:
        For each image ``(n, 5)``: x1, y1, x2, y2 in pixels of the image, and the score in [0, 1]; best first.
    """
    batch = np.zeros((len(images), size, size, 3), np.uint8)
    scales, offsets = np.empty((len(images), 2)), np.empty(len(images))
    for k, image in enumerate(images):
        height, width = image.shape[:2]
        border = round(max(height, width) * padding)
        factor = size / (max(height, width) + 2 * border)
        inner = max(1, round(width * factor)), max(1, round(height * factor))
        start = round(border * factor)
        inner = min(inner[0], size - start), min(inner[1], size - start)
        method = cv2.INTER_AREA if factor < 1 else cv2.INTER_LINEAR
        batch[k, start : start + inner[1], start : start + inner[0]] = cv2.resize(image, inner, interpolation=method)
        scales[k], offsets[k] = (width / inner[0], height / inner[1]), start
    found = _run("tiny_face_detector", batch, device).numpy()
    results = []
    for boxes, scale, offset in zip(found, scales, offsets, strict=True):
        kept = boxes[boxes[:, 4] >= threshold]
        kept = kept[np.argsort(-kept[:, 4], kind="stable")]
        corners = (kept[:, :4].reshape(-1, 2, 2) * size - offset) * scale - 0.5
        results.append(np.concatenate([corners.reshape(-1, 4), kept[:, 4:]], 1))
    return results


def vote(scales: Sequence[NDArray[np.float64]], agreement: int = 2, overlap: float = 0.4) -> NDArray[np.float64]:
    """Return one box per face from the candidates of several input sizes.

    Candidates that overlap the best one are one face. Its box is their mean, weighted by squared scores; its score is
    the mean over the ``agreement`` input sizes that are surest of it. A texture that looks like a face at one size only
    so gets at most half.

    Args:
        scales: For each input size its candidates ``(n, 5)``.
        agreement: Number of input sizes that must agree, at most as many as there are.
        overlap: Intersection over union from which two boxes are one face.

    Returns:
        ``(faces, 5)``: x1, y1, x2, y2 and the score; best first.
    """
    boxes = np.concatenate([np.zeros((0, 5)), *scales])
    level = np.repeat(np.arange(len(scales)), [len(scale) for scale in scales])
    agreement = max(1, min(agreement, len(scales)))
    faces = []
    while len(boxes):
        same = overlaps(boxes[boxes[:, 4].argmax(), :4], boxes[:, :4])[0] >= overlap
        group = boxes[same]
        best = np.zeros(len(scales))
        np.maximum.at(best, level[same], group[:, 4])
        corners = np.average(group[:, :4], axis=0, weights=group[:, 4] ** 2)
        faces.append([*corners, np.sort(best)[::-1][:agreement].mean()])
        boxes, level = boxes[~same], level[~same]
    result = np.array(faces).reshape(-1, 5)
    return result[np.argsort(-result[:, 4], kind="stable")]


def overlaps(a: NDArray[np.float64], b: NDArray[np.float64]) -> NDArray[np.float64]:
    """Return the intersection over union of each box of ``a`` ``(N, 4)`` with each of ``b`` ``(M, 4)``, ``(N, M)``."""
    a, b = np.asarray(a, np.float64).reshape(-1, 1, 4), np.asarray(b, np.float64).reshape(1, -1, 4)
    extent = np.minimum(a[..., 2:], b[..., 2:]) - np.maximum(a[..., :2], b[..., :2])
    common = np.clip(extent, 0, None).prod(-1)
    sizes = [np.clip(box[..., 2:] - box[..., :2], 0, None).prod(-1) for box in (a, b)]
    total = sizes[0] + sizes[1] - common
    return np.divide(common, total, out=np.zeros_like(total), where=total > 0)


# ----------------------------------------------------------------------------------------------------- crops


def cut(images: Sequence[NDArray[np.uint8]], matrices: NDArray[np.float64]) -> NDArray[np.uint8]:
    """Return the inputs of the crop networks, ``(N, 112, 112, 3)``, one per image and matrix ``(N, 2, 3)``."""
    crops = np.empty((len(matrices), _CROP_SIZE, _CROP_SIZE, 3), np.uint8)
    for k, (image, matrix) in enumerate(zip(images, matrices, strict=True)):
        # Repeated edge pixels serve the networks a little better than the black they know: 1 % lower error on ORL.
        crops[k] = warp(image, matrix, _CROP_SIZE, border="replicate")
    return crops


def landmarks_in_crops(crops: NDArray[np.uint8], device: str = "cpu") -> NDArray[np.float64]:
    """Return 68 points per crop, ``(N, 68, 2)`` in pixels of the crop, of crops ``(N, 112, 112, 3)``."""
    return _run("face_landmark_68", crops, device).view(-1, 68, 2).numpy() * _CROP_SIZE - 0.5


def expressions_in_crops(crops: NDArray[np.uint8], device: str = "cpu") -> NDArray[np.float64]:
    """Return the probability of each of ``EXPRESSIONS``, ``(N, 7)``, of crops ``(N, 112, 112, 3)``."""
    return _run("face_expression", crops, device).softmax(-1).numpy()
