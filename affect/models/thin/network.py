# SPDX-License-Identifier: Apache-2.0
"""Parts of THIN: the exogenous classifier and its frozen stream, and an ensemble of small experts."""

from __future__ import annotations

import hashlib
import itertools
import json
from collections.abc import Sequence
from pathlib import Path
from typing import Literal

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from affect.encoders import TimmEncoder, read_state_dict
from affect.errors import CheckpointError, ConfigError, near
from affect.models.tokens import grid_of
from affect.models.vggface import IDENTITIES, VGGFaceEncoder, read_vggface

Pooling = Literal["flatten", "average"]
Reads = Literal["maps", "penultimate", "probabilities"]

_PROBABILITY_SCALE = 4.0
"""Factor of probabilities that a gate reads: they are small beside features, and the gate would open slowly."""


class ExogenousHead(nn.Module):
    """The classifier phi of the exogenous variable on a feature map.

    Args:
        features: Channels D of the map.
        grid: Its height and width.
        classes: Number of classes.
        pooling: ``flatten`` all positions (as the VGG networks do), or ``average`` over them.
        hidden: Units of hidden layers, each with ReLU.
    """

    def __init__(
        self,
        features: int,
        grid: tuple[int, int],
        classes: int,
        pooling: Pooling = "flatten",
        hidden: Sequence[int] = (64,),
    ) -> None:
        super().__init__()
        if pooling not in ("flatten", "average"):
            raise ConfigError(f"pooling={pooling!r}: {near(str(pooling), ['flatten', 'average'])}")
        self.pooling, self.grid = pooling, tuple(grid)
        size = features * (grid[0] * grid[1] if pooling == "flatten" else 1)
        layers: list[nn.Module] = []
        for width in hidden:
            layers += [nn.Linear(size, int(width)), nn.ReLU()]
            size = int(width)
        self.layers = nn.Sequential(*layers)
        self.width, self.classes = size, int(classes)
        self.output = nn.Linear(size, self.classes)

    def penultimate(self, grid: Tensor) -> Tensor:
        """Return what the last layer reads ``(B, width)`` of a map ``(B, D, h, w)``."""
        if self.pooling == "flatten" and tuple(grid.shape[2:]) != self.grid:
            raise ConfigError(
                f"the exogenous head was built for a map of {self.grid} positions and got {tuple(grid.shape[2:])}; "
                "use one image size, or model.exogenous.pooling=average"
            )
        return self.layers(grid.flatten(1) if self.pooling == "flatten" else grid.mean((2, 3)))

    def forward(self, grid: Tensor) -> Tensor:
        """Return logits of the exogenous classes ``(B, classes)``."""
        return self.output(self.penultimate(grid))


class ExogenousStream(nn.Module):
    """The encoder G and the head phi of a finished exogenous run: frozen, and in evaluation mode for ever.

    Args:
        encoder: Backbone with ``output=map``, as in the exogenous run.
        classes: Number of classes of the exogenous variable.
        weights: Folder of an exogenous run or of its release, or a file with its tensors; with the encoder of VGGFace
            also the file of its release, whose fc6 to fc8 are phi. None for a model loaded from its own release.
        pooling: As in the exogenous run.
        hidden: As in the exogenous run.
        random: Control: keep the weights that encoder and head are built with, random ones unless the encoder is
            pretrained; those of ``weights`` then only start the other stream.

    Attributes:
        loaded: Tensors of the encoder in ``weights``; empty without.
        labels: Names of the classes, where ``weights`` names them.

    Raises:
        ConfigError: If the number of classes is not that of ``weights``, or the encoder gives no map.
        CheckpointError: If ``weights`` is no exogenous run, or its tensors do not fit.
    """

    def __init__(
        self,
        encoder: TimmEncoder,
        classes: int | None = None,
        weights: str | None = None,
        pooling: Pooling = "flatten",
        hidden: Sequence[int] = (64,),
        random: bool = False,
    ) -> None:
        super().__init__()
        require_map(encoder)
        if classes is None or int(classes) < 2:
            raise ConfigError(f"model.exogenous.classes={classes}: write the number of classes of the exogenous run")
        self.encoder, self.random = encoder, bool(random)
        self.head = ExogenousHead(encoder.num_features, grid_of(encoder), int(classes), pooling, hidden)
        self.labels: list[str] | None = None
        self.origin = getattr(encoder, "origin", "random")
        self.loaded: dict[str, Tensor] = {}
        if weights:
            self._load(Path(weights).expanduser())
        self.requires_grad_(False)
        self.eval()
        self.digest = self._digest()

    def _load(self, given: Path) -> None:
        what = f"model.exogenous.weights={given}"
        path = find_tensors(given, what)
        released = path.suffix in (".mat", ".caffemodel")
        state = {} if released else read_state_dict(path)
        if isinstance(self.encoder, VGGFaceEncoder) and not any(key.startswith("phi.") for key in state):
            self._load_vggface(path, what)
            return
        found = {part: _below(state, part) for part in ("encoder", "phi")}
        if not all(found.values()):
            raise CheckpointError(
                f"{what}: no exogenous model (it has no tensors encoder.… and phi.…); train one first"
            )
        self._check_labels(path, what)
        rows = found["phi"].get("output.bias")
        if rows is not None and len(rows) != self.head.classes:
            raise ConfigError(
                f"model.exogenous.classes={self.head.classes}: {given} tells {len(rows)} apart; write that number"
            )
        for part, module in (("encoder", self.encoder), ("phi", self.head)):
            own = module.state_dict()
            unfit = [k for k in own if k not in found[part] or found[part][k].shape != own[k].shape]
            unfit += [k for k in found[part] if k not in own]
            if unfit:
                raise CheckpointError(
                    f"{what}: its {part} is another one ({len(unfit)} tensors, e.g. {unfit[0]}); give encoder, "
                    "model.exogenous.pooling and model.exogenous.hidden as in that run"
                )
        self.loaded = found["encoder"]
        self._check_statistics(path, what)
        self.origin = f"exogenous run {given.name}, sha256 {hashlib.sha256(path.read_bytes()).hexdigest()[:16]}"
        if not self.random:
            self.encoder.load_state_dict(found["encoder"])
            self.head.load_state_dict(found["phi"])
            self.encoder.origin = self.origin

    def _load_vggface(self, path: Path, what: str) -> None:
        """Take the identity classifier of VGGFace, fc6 to fc8, as phi: no exogenous run is needed."""
        delivered, _ = read_vggface(path)
        last = self.encoder.model.features[28].weight  # type: ignore[index, union-attr]
        if not torch.equal(last, delivered["conv5_3.weight"]):
            raise ConfigError(f"{what}: encoder.weights has to be the same file, whose convolutions phi reads")
        if self.head.classes != len(delivered["fc8.bias"]):
            raise ConfigError(f"model.exogenous.classes={self.head.classes}: VGGFace tells {IDENTITIES} people apart")
        layers = {"layers.0": "fc6", "layers.2": "fc7", "output": "fc8"}
        state = {f"{ours}.weight": delivered[f"{theirs}.weight"].flatten(1) for ours, theirs in layers.items()}
        state |= {f"{ours}.bias": delivered[f"{theirs}.bias"] for ours, theirs in layers.items()}
        own = self.head.state_dict()
        if set(own) != set(state) or any(own[key].shape != state[key].shape for key in own):
            raise ConfigError(
                f"{what}: phi of VGGFace needs encoder.image_size=224, model.exogenous.pooling=flatten and "
                "model.exogenous.hidden=[4096,4096]"
            )
        self.loaded, self.origin = dict(self.encoder.state_dict()), self.encoder.origin
        if self.random:
            raise ConfigError(
                "model.exogenous.random=true: VGGFace's convolutions are not random; take another encoder"
            )
        self.head.load_state_dict(state)

    def _check_labels(self, path: Path, what: str) -> None:
        labels = path.with_name("labels.json")
        if labels.is_file():
            named = json.loads(labels.read_text(encoding="utf-8"))
            if len(named) != 1:
                raise CheckpointError(f"{what}: an exogenous run has one task, and this one has {', '.join(named)}")
            self.labels = next(iter(named.values()))

    def _check_statistics(self, path: Path, what: str) -> None:
        """Refuse weights that were trained on images normalised otherwise."""
        stored = path.with_name("preprocess.json")
        told = json.loads(stored.read_text(encoding="utf-8")) if stored.is_file() else {}
        for key in ("image_size", "mean", "std"):
            then, now = told.get(key), getattr(self.encoder, key, None)
            if not then or now is None:
                continue
            pairs = zip(then, now, strict=True) if isinstance(then, list) else [(then, now)]
            if any(abs(a - b) > 1e-4 for a, b in pairs):
                raise ConfigError(f"{what}: it was trained with {key} {then}, here {now}; set encoder.{key} as there")

    def start(self, encoder: TimmEncoder) -> None:
        """Give an encoder of the same architecture the weights of the exogenous run.

        Raises:
            ConfigError: If it has another architecture.
        """
        own, source = encoder.state_dict(), self.loaded
        if set(own) != set(source) or any(own[key].shape != source[key].shape for key in own):
            raise ConfigError(
                "model.initialise=true: the encoder is not that of the exogenous stream; give both the same, or "
                "model.initialise=false"
            )
        encoder.load_state_dict(source)
        encoder.origin = self.origin

    def _digest(self) -> str:
        digest = hashlib.sha256()
        for name, value in sorted(self.state_dict().items()):
            digest.update(name.encode())
            digest.update(value.detach().cpu().contiguous().flatten().view(torch.uint8).numpy().tobytes())
        return digest.hexdigest()

    def changed(self) -> bool:
        """Return whether any parameter or buffer differs from what the stream was built with.

        In half precision nobody knows.
        """
        whole = all(value.dtype != torch.float32 for value in self.parameters())
        return not whole and self._digest() != self.digest

    def train(self, mode: bool = True) -> ExogenousStream:
        """Stay in evaluation mode, so that batch statistics do not move."""
        return super().train(False)

    @torch.no_grad()
    def forward(self, image: Tensor) -> Tensor:
        """Return the exogenous feature map ``(B, D, h, w)`` of RGB uint8 images."""
        return self.encoder(image)

    def read(self, grid: Tensor, reads: Reads) -> Tensor:
        """Return what a gate reads of a map ``(B, D, h, w)``: see ``reading_size``."""
        if reads == "maps":
            return grid.mean((2, 3))
        if reads == "penultimate":
            return self.head.penultimate(grid)
        return _PROBABILITY_SCALE * self.head(grid).softmax(-1)

    def reading_size(self, reads: Reads) -> int:
        """Return how many numbers ``read`` gives: channels, units before the last layer, or classes."""
        return {
            "maps": self.encoder.num_features,
            "penultimate": self.head.width,
            "probabilities": self.head.classes,
        }[reads]


def require_map(encoder: nn.Module) -> None:
    """Raise ``ConfigError`` if an encoder gives no feature map."""
    if getattr(encoder, "output", None) != "map":
        raise ConfigError(f"encoder.output={getattr(encoder, 'output', None)}: use encoder.output=map")


def find_tensors(given: Path, what: str) -> Path:
    """Return the file of tensors of a run, of a release, or the file itself.

    Raises:
        CheckpointError: If there is none.
    """
    for path in (given / "release" / "model.safetensors", given / "model.safetensors", given):
        if path.is_file():
            return path
    if not given.exists():
        raise CheckpointError(f"{what}: no such folder or file; give the folder of a finished exogenous run")
    hint = " (the run is not finished)" if (given / "last.ckpt").exists() else ""
    raise CheckpointError(f"{what}: no release in it{hint}; give the folder of a finished exogenous run")


def _below(state: dict[str, Tensor], part: str) -> dict[str, Tensor]:
    return {key.removeprefix(f"{part}."): value for key, value in state.items() if key.startswith(f"{part}.")}


class Experts(nn.Module):
    """L small perceptrons on one input, computed together.

    Args:
        features: Numbers of the input.
        outputs: Outputs C of each expert.
        experts: Number L of experts.
        hidden: Units of hidden layers, each with ReLU.
        norm: Batch norm between map and ReLU; the last layer has none.
    """

    def __init__(
        self, features: int, outputs: int, experts: int, hidden: Sequence[int] = (128,), norm: bool = False
    ) -> None:
        super().__init__()
        sizes = [int(features), *(int(width) for width in hidden), int(outputs)]
        pairs = list(itertools.pairwise(sizes))
        self.kernels = nn.ParameterList(nn.Parameter(torch.empty(experts, a, b)) for a, b in pairs)
        self.biases = nn.ParameterList(nn.Parameter(torch.empty(experts, 1, b)) for _, b in pairs)
        self.norms = nn.ModuleList(nn.BatchNorm1d(experts * b) if norm else nn.Identity() for _, b in pairs[:-1])
        for kernel, bias in zip(self.kernels, self.biases, strict=True):
            limit = kernel.shape[1] ** -0.5  # as torch starts a linear layer
            nn.init.uniform_(kernel, -limit, limit)
            nn.init.uniform_(bias, -limit, limit)

    def forward(self, x: Tensor) -> Tensor:
        """Return the outputs of every expert ``(B, L, C)`` for ``(B, features)``."""
        experts = len(self.kernels[0])
        values = x.expand(experts, *x.shape)
        for k, (kernel, bias) in enumerate(zip(self.kernels, self.biases, strict=True)):
            values = torch.baddbmm(bias, values, kernel)
            if k < len(self.norms):
                flat = self.norms[k](values.transpose(0, 1).flatten(1))
                values = F.relu(flat).unflatten(1, (experts, -1)).transpose(0, 1)
        return values.transpose(0, 1)


def mix(outputs: Tensor, weights: Tensor) -> Tensor:
    """Return the outputs of experts ``(B, L, C)`` mixed by weights ``(B, L)``: logits are mixed, not probabilities."""
    return (weights.unsqueeze(1) @ outputs).squeeze(1)
