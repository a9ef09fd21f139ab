# SPDX-License-Identifier: Apache-2.0
"""VGG-16 with the weights of VGGFace, converted from the release that its authors give out.

Parkhi, Vedaldi and Zisserman, "Deep Face Recognition", BMVC 2015: VGG-16 (configuration D) trained on 2,622 people.
The release exists for MatConvNet (``vgg_face.mat``), Caffe (``VGG_FACE.caffemodel``) and Lua Torch, and many state
dicts were converted from it. **Licence**: as we recall it, the models may be used for non-commercial research only;
read the terms at the place that you take them from. They are not part of this package and it never downloads them.

The original network takes pixels from 0 to 255 minus the mean (red 129.1863, green 104.7624, blue 93.5940), which
MatConvNet's weights expect as RGB and those of Caffe and Lua Torch as BGR. Ours takes RGB: the first convolution's
input channels are swapped once, at conversion. A state dict does not tell where it came from, so ``channels`` says it.

Each conversion is checked: names and shapes of all 16 layers, the 2,622 outputs of ``fc8`` (a VGG-16 of ImageNet has
1,000), and the activations: the delivered weights, run as plain functions in their own layout, order of channels and
normalisation, must agree on a probe image with what this encoder gives at conv5_3 and fc7. That catches a mistake of
the conversion. It cannot tell whether the file holds the trained weights: no published activations are known to us.
"""

from __future__ import annotations

import hashlib
import re
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Literal

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor

from affect.encoders import Output, TimmEncoder, read_state_dict
from affect.errors import CheckpointError, ConfigError, near

__all__ = ["IDENTITIES", "LAYERS", "LICENCE", "MEAN", "VGGFaceEncoder", "read_vggface"]

IDENTITIES = 2622

_WIDTHS = ((64, 64), (128, 128), (256, 256, 256), (512, 512, 512), (512, 512, 512))
_CONVOLUTIONS = tuple((b + 1, k + 1, width) for b, block in enumerate(_WIDTHS) for k, width in enumerate(block))


def _shapes() -> dict[str, tuple[int, ...]]:
    found: dict[str, tuple[int, ...]] = {}
    before = 3
    for block, place, width in _CONVOLUTIONS:
        found[f"conv{block}_{place}"] = (width, before, 3, 3)
        before = width
    return found | {"fc6": (4096, 512, 7, 7), "fc7": (4096, 4096, 1, 1), "fc8": (IDENTITIES, 4096, 1, 1)}


LAYERS = _shapes()
"""Shape of the weights of each layer, in the order of the network."""

MEAN = (129.1863 / 255, 104.7624 / 255, 93.5940 / 255)
"""Mean of red, green and blue that the network was trained with, in [0, 1]. It does not divide by a deviation."""

LICENCE = (
    "VGGFace: as we recall it, its weights and what is made from them may be used for non-commercial research only; "
    "read the terms where the file was taken from (www.robots.ox.ac.uk/~vgg/software/vgg_face)"
)
"""What readers of results and users of releases have to know of these weights."""

_OURS = dict(zip(LAYERS, (0, 2, 5, 7, 10, 12, 14, 17, 19, 21, 24, 26, 28), strict=False))
_NAMED = re.compile(r"(?:^|\.)(?:conv_?([1-5])_([1-3])|(fc_?[678]))\.(weight|bias)$")
_NUMBERED = re.compile(r"^(?:(features|classifier)\.)?(\d+)\.(weight|bias)$")
_TOLERANCE = 1e-3


class VGGFaceEncoder(TimmEncoder):
    """VGG-16 that starts from VGGFace: ``vector`` is fc7 ``(B, 4096)``, ``map`` the last pooling ``(B, 512, h, w)``.

    Layers are those of timm's ``vgg16``: conv5_3 after its ReLU is ``model.features.29``, fc6 and fc7 are
    ``model.pre_logits.fc1`` and ``.fc2``. The 2,622 identities of fc8 are checked and not kept.

    Args:
        weights: File of the release: ``.caffemodel``, ``.mat``, or a state dict (``.pth``, ``.pt``, ``.safetensors``).
        allow_imagenet: Without ``weights``, start from timm's ImageNet weights if they can be had, and say so in every
            result. Excludes ``weights``.
        channels: Order of the file's input channels, ``RGB`` or ``BGR``; None knows it of ``.mat`` and ``.caffemodel``.
        pretrained: False starts from random weights, as a release that brings its own does.
        image_size: Side of the square input in pixels.
        output: ``vector``, ``map`` or ``tokens``.
        trainable: As in ``TimmEncoder``.
        arguments: Further arguments of timm's ``vgg16``, e.g. ``drop_rate``.

    Attributes:
        notes: What a reader of results has to know of the initial weights.

    Raises:
        CheckpointError: If there is no file, or it is not that network.
        ConfigError: If arguments contradict each other.
    """

    def __init__(
        self,
        weights: str | None = None,
        allow_imagenet: bool = False,
        channels: Literal["RGB", "BGR"] | None = None,
        pretrained: bool = True,
        image_size: int = 224,
        output: Output = "vector",
        trainable: Literal["all", "none"] | int = "all",
        arguments: dict | None = None,
    ) -> None:
        if weights and (allow_imagenet or not pretrained):
            other = "allow_imagenet=true" if allow_imagenet else "pretrained=false"
            raise ConfigError(f"encoder: give weights=<file> or {other}, not both")
        if channels not in (None, "RGB", "BGR"):
            raise ConfigError(f"encoder.channels={channels!r}: {near(str(channels), ['RGB', 'BGR'])}")
        if pretrained and not weights and not allow_imagenet:
            raise CheckpointError(
                "encoder=vgg16_vggface needs the file of the VGGFace release: encoder.weights=<VGG_FACE.caffemodel, "
                "vgg_face.mat or a state dict of it> (www.robots.ox.ac.uk/~vgg/software/vgg_face, for research); "
                "encoder.allow_imagenet=true trains from ImageNet weights and marks the result"
            )
        hub = pretrained and not weights
        normalised = {} if allow_imagenet else {"mean": MEAN, "std": (1 / 255,) * 3}
        name = "vgg16.tv_in1k" if allow_imagenet else "vgg16"
        try:
            super().__init__(
                name,
                pretrained=hub,
                image_size=image_size,
                output=output,
                trainable=trainable,
                arguments=arguments,
                **normalised,  # type: ignore[arg-type]
            )
        except CheckpointError as error:
            raise CheckpointError(
                f"encoder.allow_imagenet=true: the ImageNet weights {name} are not in the hub's cache folder "
                "(~/.cache/huggingface/hub) and cannot be fetched; copy them there, or give the file of VGGFace as "
                "encoder.weights=…"
            ) from error
        self.notes: tuple[str, ...] = ()
        if hub:
            self.origin = f"timm hub {name} (ImageNet) in place of VGGFace"
            self.notes = ("encoder: started from ImageNet weights, not from VGGFace (encoder.allow_imagenet=true)",)
        elif weights:
            self._convert(Path(weights).expanduser(), channels)

    def _convert(self, path: Path, channels: str | None) -> None:
        if not path.is_file():
            raise CheckpointError(f"encoder.weights={path}: no such file; place the VGGFace release there")
        if channels is None and path.suffix not in (".mat", ".caffemodel"):
            raise ConfigError(
                f"encoder.weights={path.name}: a state dict does not tell its order of channels; add "
                "encoder.channels=RGB (converted from MatConvNet, e.g. vgg_face_dag.pth) or encoder.channels=BGR "
                "(from Caffe or Lua Torch)"
            )
        delivered, known = read_vggface(path)
        order = channels or str(known)
        first = delivered["conv1_1.weight"]
        ours = {**delivered, "conv1_1.weight": first.flip(1) if order == "BGR" else first}
        state = {f"features.{index}.{kind}": ours[f"{layer}.{kind}"]
                 for layer, index in _OURS.items() for kind in ("weight", "bias")}  # fmt: skip
        state |= {f"pre_logits.fc{k}.{kind}": ours[f"fc{k + 5}.{kind}"] for k in (1, 2) for kind in ("weight", "bias")}
        wrong = [key for key, value in self.model.state_dict().items() if state[key].shape != value.shape]
        if wrong:
            raise ConfigError(f"encoder.arguments change {wrong[0]}, and VGGFace has weights of another shape for it")
        self.model.load_state_dict(state)
        self._compare(delivered, order, path)
        with path.open("rb") as file:
            digest = hashlib.file_digest(file, "sha256").hexdigest()
        self.origin = f"VGGFace from {path.name} ({order}), sha256 {digest[:16]}"
        self.notes = (f"encoder: started from {LICENCE}",)

    @torch.no_grad()
    def _compare(self, delivered: Mapping[str, Tensor], order: str, path: Path) -> None:
        """Raise ``CheckpointError`` if this encoder and the delivered weights disagree on a probe image."""
        probe = torch.randint(0, 256, (1, 3, 224, 224), dtype=torch.uint8, generator=torch.Generator().manual_seed(0))
        mode = self.model.training
        self.model.eval()
        inner = self.model.features[:30](self.normalise(probe))  # type: ignore[index, operator]
        vector = self.model.forward_head(self.features(probe), pre_logits=True)  # type: ignore[operator]
        self.model.train(mode)
        for name, ours, theirs in zip(("conv5_3", "fc7"), (inner, vector), _run(delivered, probe, order), strict=True):
            size = float(theirs.abs().max())
            if not np.isfinite(size) or size == 0:
                raise CheckpointError(
                    f"encoder.weights={path}: layer {name} gives nothing but {size:g} on a probe image"
                )
            if float((ours - theirs).abs().max()) > _TOLERANCE * size:
                raise CheckpointError(f"encoder.weights={path}: the conversion changed what layer {name} gives")


def _run(delivered: Mapping[str, Tensor], image: Tensor, order: str) -> tuple[Tensor, Tensor]:
    """Return conv5_3 ``(B, 512, 14, 14)`` and fc7 ``(B, 4096)`` of the network as it was delivered."""
    x = image.float() - 255 * torch.tensor(MEAN).view(3, 1, 1)
    x = x.flip(1) if order == "BGR" else x
    last = None
    for block, place, _ in _CONVOLUTIONS:
        if place == 1 and block > 1:
            x = F.max_pool2d(x, 2)
        layer = f"conv{block}_{place}"
        last = x = F.relu(F.conv2d(x, delivered[f"{layer}.weight"], delivered[f"{layer}.bias"], padding=1))
    assert last is not None
    x = F.max_pool2d(x, 2).flatten(1)
    for layer in ("fc6", "fc7"):
        x = F.relu(F.linear(x, delivered[f"{layer}.weight"].flatten(1), delivered[f"{layer}.bias"]))
    return last, x


# ------------------------------------------------------------------------------------------------------ reading


def read_vggface(path: Path) -> tuple[dict[str, Tensor], str | None]:
    """Return weights and biases by our names (``conv1_1.weight`` … ``fc8.bias``), and the order of input channels.

    Weights have the shapes of ``LAYERS``. The order is that of the file's format; None where the format has none.

    Raises:
        CheckpointError: If the file is another network or is damaged.
    """
    if path.suffix == ".caffemodel":
        found, order = dict(_caffe(path)), "BGR"
    elif path.suffix == ".mat":
        found, order = dict(_matconvnet(path)), "RGB"
    elif path.suffix in (".t7", ".h5"):
        raise CheckpointError(f"encoder.weights={path}: {path.suffix} is not read; convert it to a state dict (.pth)")
    else:
        found, order = _renamed(read_state_dict(path)), None
    converted = {}
    for layer, shape in LAYERS.items():
        for kind, wanted in (("weight", shape), ("bias", shape[:1])):
            key = f"{layer}.{kind}"
            if key not in found:
                raise CheckpointError(
                    f"encoder.weights={path}: no {kind} of layer {layer}; VGGFace has 13 convolutions and fc6, fc7, fc8"
                )
            value = found[key].float()
            size = int(np.prod(wanted))
            if value.numel() != size or value.shape[0] != wanted[0]:
                hint = "; that is a VGG-16 of ImageNet" if layer == "fc8" and value.shape[0] == 1000 else ""
                raise CheckpointError(
                    f"encoder.weights={path}: {key} has shape {tuple(value.shape)}, expected {wanted}{hint}"
                )
            if not bool(value.isfinite().all()):
                raise CheckpointError(f"encoder.weights={path}: {key} holds values that are not finite")
            converted[key] = value.reshape(wanted)
    return converted, order


def _renamed(state: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """Return tensors under our names: of Caffe's (``conv1_1``, ``conv_1_1``) or of numbered sequences of layers."""
    found = {}
    numbered: dict[tuple[bool, int], dict[str, Tensor]] = {}
    for name, value in state.items():
        if match := _NAMED.search(name):
            block, place, dense, kind = match.groups()
            layer = dense.replace("_", "") if dense else f"conv{block}_{place}"
            found[f"{layer}.{kind}"] = value
        elif match := _NUMBERED.match(name.removeprefix("module.").removeprefix("model.")):
            part, index, kind = match.groups()
            numbered.setdefault((part == "classifier", int(index)), {})[kind] = value
    if not found and len(numbered) == len(LAYERS):
        for layer, place in zip(LAYERS, sorted(numbered), strict=True):
            found |= {f"{layer}.{kind}": value for kind, value in numbered[place].items()}
    return found


def _matconvnet(path: Path) -> Iterator[tuple[str, Tensor]]:
    """Yield tensors of ``vgg_face.mat``, whose filters are ``(h, w, in, out)``."""
    from scipy.io import loadmat

    try:
        loaded = loadmat(path, squeeze_me=True, struct_as_record=False)
    except (OSError, ValueError, NotImplementedError) as error:
        raise CheckpointError(f"encoder.weights={path}: no MATLAB file ({str(error)[:100]})") from error
    network = loaded.get("net", loaded.get("layers"))
    layers = np.atleast_1d(getattr(network, "layers", network))
    for layer in layers:
        name = str(getattr(layer, "name", ""))
        if name not in LAYERS:
            continue
        pair = getattr(layer, "weights", None)
        filters, bias = pair if pair is not None else (layer.filters, layer.biases)
        weight = torch.from_numpy(np.array(filters, np.float32))
        while weight.ndim < 4:  # a side of one pixel is left out by the reader
            weight = weight[None]
        yield f"{name}.weight", weight.permute(3, 2, 0, 1).contiguous()
        yield f"{name}.bias", torch.from_numpy(np.array(bias, np.float32).reshape(-1))


def _caffe(path: Path) -> Iterator[tuple[str, Tensor]]:
    """Yield tensors of a ``.caffemodel``: a protobuf message NetParameter, of which names and numbers are read."""
    data = memoryview(path.read_bytes())
    try:
        for number, layer in _fields(data):
            if number not in (2, 100) or not isinstance(layer, memoryview):  # layers of the old and the new kind
                continue
            inner = list(_fields(layer))
            names = [bytes(v) for k, v in inner if k == (4 if number == 2 else 1) and isinstance(v, memoryview)]
            blobs = [v for k, v in inner if k == (6 if number == 2 else 7) and isinstance(v, memoryview)]
            if names and len(blobs) == 2:
                name = names[0].decode("utf-8", "replace")
                for kind, blob in zip(("weight", "bias"), blobs, strict=True):
                    values = torch.from_numpy(_blob(blob))
                    width = LAYERS[name][0] if name in LAYERS else 1
                    yield f"{name}.{kind}", values.reshape(width, -1) if len(values) % width == 0 else values
    except (IndexError, ValueError) as error:
        raise CheckpointError(f"encoder.weights={path}: no Caffe model, or cut short ({error})") from error


def _blob(blob: memoryview) -> np.ndarray:
    parts = [
        np.frombuffer(value, "<f4") for number, value in _fields(blob) if number == 5 and not isinstance(value, int)
    ]
    return np.concatenate(parts).copy() if parts else np.zeros(0, np.float32)


def _fields(data: memoryview) -> Iterator[tuple[int, int | memoryview]]:
    """Yield number and content of each field of a protobuf message."""
    place = 0

    def varint() -> int:
        nonlocal place
        value, shift = 0, 0
        while True:
            byte = data[place]
            place += 1
            value |= (byte & 127) << shift
            shift += 7
            if byte < 128:
                return value

    while place < len(data):
        key = varint()
        number, kind = key >> 3, key & 7
        if kind == 0:
            yield number, varint()
            continue
        length = {1: 8, 2: -1, 5: 4}.get(kind)
        if length is None:
            raise ValueError(f"field {number} of kind {kind}")
        length = varint() if length < 0 else length
        if place + length > len(data):
            raise ValueError("it ends inside a field")
        yield number, data[place : place + length]
        place += length
