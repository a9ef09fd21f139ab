# SPDX-License-Identifier: Apache-2.0
"""What every transform of a trained network is, and how several are run one after the other.

A transform takes a network in evaluation mode that maps normalised images to features, and changes it in place: only by
putting layers of ``affect.compression.layers`` in the place of its own, or by resizing them, so that the result can be
stored without code.
"""

from __future__ import annotations

import copy
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass, field, replace
from typing import Protocol

import torch
from timm.layers import Conv2dSame
from torch import Tensor, nn

from affect.compression.layers import CodesReadError, CompressedConv2d, CompressedLinear
from affect.compression.report import Report, measure
from affect.errors import ConfigError

__all__ = [
    "STAGES",
    "Backbone",
    "Chain",
    "Data",
    "Transform",
    "backbone",
    "check_order",
    "quantizable",
    "relative_error",
    "run_chain",
]

STAGES = ("prune", "fold", "merge", "inputs", "weights", "rounding", "residuals")
"""Order in which transforms are run: pruning needs batch norms, merging changes ranges, residuals sit on a quantizer.

What must be read of a network before others change it (statistics of batch norms) a transform reads in ``prepare``."""

KEEPING = ("prune", "fold")
"""Stages after which layers still multiply by floats: what a network was before its layers became codes."""

CODING = ("inputs", "weights", "rounding", "residuals")
"""Stages that act on layers which codes can take the place of, and on nothing else."""


@dataclass
class Data:
    """What a transform may use besides the network.

    Attributes:
        images: Batches of normalised images of the training part, floats ``(B, 3, H, W)``.
        losses: Gives the training loss of the network as it is, a scalar with a graph per batch.
        train: Trains the network in place for a number of steps.
        score: Validation score of the network as it is; higher is better.
        remember: Keeps what training changes outside of the network (heads) and returns what puts it back.
        seed: Of every draw.
        example: Normalised images ``(B, 3, H, W)`` of the size that the network is used with, whatever they show;
            ``run_chain`` fills it in.
        limits: Smallest and largest normalised pixel of each channel ``(3,)``; None where they are not known.
    """

    images: Sequence[Tensor] = ()
    losses: Callable[[], Iterable[Tensor]] | None = None
    train: Callable[[int], None] | None = None
    score: Callable[[], float] | None = None
    remember: Callable[[], Callable[[], None]] | None = None
    seed: int = 0
    example: Tensor | None = None
    limits: tuple[Tensor, Tensor] | None = None


class Transform(Protocol):
    """A compression method.

    One that can round inputs to grids of their own has an attribute ``input_bits``, None where it leaves them.

    Attributes:
        name: As in ``compression=<name>``.
        stage: One of ``STAGES``.
        needs: Fields of ``Data`` that it cannot do without.
    """

    name: str
    stage: str
    needs: tuple[str, ...]

    def prepare(self, network: nn.Module, data: Data) -> None:
        """Look at the network with its batch norms: as it is given, and where channels are removed, after that."""
        ...

    def __call__(self, network: nn.Module, data: Data) -> Report:
        """Change ``network`` in place and tell what was done."""
        ...


class Backbone(nn.Module):
    """An encoder from normalised images on, so that it can be traced; its layers are the encoder's own.

    Args:
        encoder: An encoder of ``affect.encoders``.
    """

    def __init__(self, encoder: nn.Module) -> None:
        super().__init__()
        self.model = encoder.model
        self.output = str(getattr(encoder, "output", "vector"))
        self.timm = hasattr(self.model, "forward_features")

    def forward(self, x: Tensor) -> Tensor:
        """Return the network's features of ``(B, 3, H, W)``: pooled as before a classifier, or a map or tokens."""
        if not self.timm:
            return self.model(x)
        features = self.model.forward_features(x)
        return self.model.forward_head(features, pre_logits=True) if self.output == "vector" else features


def backbone(encoder: nn.Module) -> Backbone:
    """Return what transforms act on of an encoder.

    Raises:
        ConfigError: If it has no layers.
    """
    if not isinstance(getattr(encoder, "model", None), nn.Module):
        raise ConfigError(f"a {type(encoder).__name__} has no network that could be compressed")
    return Backbone(encoder)


def quantizable(network: nn.Module, protect: Sequence[str] = ()) -> dict[str, nn.Module]:
    """Return plain convolutions and linear layers by name, in order of the network, without protected ones.

    Layers with a forward pass of their own (weight standardisation, the projections inside PyTorch's attention) are no
    plain ones: codes in their place would not be what is multiplied by. Nor are those of PyTorch's transformer, which
    reads their weights itself, and convolutions that pad with anything but zeros.

    Args:
        network: The network.
        protect: Names, or starts of names up to a dot, of layers that stay as they are.
    """
    kinds = (nn.Conv2d, Conv2dSame, nn.Linear, CompressedConv2d, CompressedLinear)
    reading = (nn.TransformerEncoderLayer, nn.TransformerDecoderLayer, nn.MultiheadAttention)
    inside = {id(sub) for module in network.modules() if isinstance(module, reading) for sub in module.modules()}
    found = {
        name: layer
        for name, layer in network.named_modules()
        if type(layer) in kinds and id(layer) not in inside and getattr(layer, "padding_mode", "zeros") == "zeros"
    }
    return {n: layer for n, layer in found.items() if not any(n == p or n.startswith(f"{p}.") for p in protect)}


def other_layers(network: nn.Module) -> dict[str, str]:
    """Return the type of each layer with a weight of several dimensions that ``quantizable`` leaves out, by name."""
    known = quantizable(network)
    found = {}
    for name, layer in network.named_modules():
        weights = [p for key, p in layer.named_parameters(recurse=False) if key.endswith("weight") and p.ndim > 1]
        if name not in known and weights:
            padding = getattr(layer, "padding_mode", "zeros")
            found[name] = type(layer).__name__ + ("" if padding == "zeros" else f", padding_mode={padding}")
    return found


def check_order(transforms: Sequence[Transform], data: Data) -> None:
    """Refuse transforms in an order in which one undoes what another needs or did, or that lack what they need.

    Raises:
        ConfigError: With the order that works, what would be undone, or what is missing.
    """
    stages = [STAGES.index(transform.stage) for transform in transforms]
    if stages != sorted(stages):
        names = [t.name for t in sorted(transforms, key=lambda t: STAGES.index(t.stage))]
        raise ConfigError(f"compression: methods work in the order {', '.join(STAGES)}; write [{','.join(names)}]")
    gridded = next((transform.name for transform in transforms if transform.stage == "inputs"), None)
    for transform in transforms:
        bits = getattr(transform, "input_bits", None)
        if gridded is not None and transform.stage != "inputs" and bits is not None:
            raise ConfigError(
                f"compression.{transform.name}.input_bits={bits}: {gridded} gives inputs their grids, whose scales the "
                f"weights take; write input_bits=null here and compression.{gridded}.input_bits={bits}"
            )
        for need in transform.needs:
            if not getattr(data, need):
                what = {"images": "images of its training part", "losses": "labels of its training part"}
                told = what.get(need, f"a way to {need} the model")
                raise ConfigError(f"compression={transform.name} needs {told}: give dataset=… and its root")


@torch.no_grad()
def relative_error(before: Tensor, after: Tensor) -> float:
    """Return ``|after - before| / |before|`` over all elements."""
    return float((after.double() - before.double()).norm() / before.double().norm().clamp_min(1e-300))


@dataclass
class Chain:
    """Reports of transforms that were run one after the other.

    Attributes:
        reports: One for each.
        errors: Relative error of the network's output against the original after each.
        floats: Copy of the network as it was before the first method that turns layers into codes or merges them,
            with batch norms folded and channels removed; None where no method does.
    """

    reports: list[Report] = field(default_factory=list)
    errors: list[float] = field(default_factory=list)
    floats: nn.Module | None = None


def run_chain(network: nn.Module, transforms: Sequence[Transform], data: Data, images: Tensor) -> Chain:
    """Run transforms in order on a network, in place.

    Args:
        network: In evaluation mode.
        transforms: In an order that ``check_order`` accepts.
        data: What they may use.
        images: Normalised images on which the output is compared with the original's.

    Raises:
        ConfigError: If the order is wrong, data is missing, or a transform cannot treat the network.
    """
    check_order(transforms, data)
    if data.example is None:
        data = replace(data, example=images[:2])
    network.eval()
    with torch.no_grad():
        original = network(images)
    chain = Chain()
    prepared = False
    for transform in transforms:
        if transform.stage == "prune":
            transform.prepare(network, data)
        elif not prepared:  # statistics of channels that are left, after the training that pruning brings with it
            for later in transforms[len(chain.reports) :]:
                later.prepare(network, data)
            prepared = True
        if chain.floats is None and transform.stage not in KEEPING:
            chain.floats = copy.deepcopy(network)
        others = other_layers(network)
        told = ", ".join(f"{name} ({kind})" for name, kind in list(others.items())[:3])
        told += f" and {len(others) - 3} more" if len(others) > 3 else ""
        if transform.stage in CODING and not quantizable(network, getattr(transform, "protect", ())):
            raise ConfigError(
                f"compression={transform.name}: no layer that it could act on: codes take the place of plain "
                f"convolutions and linear layers that are not protected{f'; there are {told}' if told else ''}"
            )
        try:
            report = transform(network, data)
            network.eval()
            with torch.no_grad():
                report.error = relative_error(original, network(images))
        except CodesReadError as error:
            place = next((name for name, layer in network.named_modules() if layer is error.layer), "a layer")
            raise ConfigError(
                f"{place}: the module around it reads its weight, which {transform.name} made codes; leave it out: "
                f"compression.{transform.name}.protect=[{place}]"
            ) from error
        if transform.stage == "weights" and others:
            report.notes.append(f"{len(others)} layers of other kinds keep their floats: {told}")
        measure(report, network, images[:1])
        chain.reports.append(report)
        chain.errors.append(report.error)
    return chain
