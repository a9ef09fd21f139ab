# SPDX-License-Identifier: Apache-2.0
"""What of a model is quantized, and how: applied to a new model before anything is loaded, and undone for export."""

from __future__ import annotations

import copy
import fnmatch
from collections.abc import Iterator, Mapping, Sequence
from typing import Any, NamedTuple

from torch import Tensor, nn
from torch.nn.utils import parametrize

from affect.errors import ConfigError, near
from affect.models.base import AffectModule
from affect.quantization.captured import Captured, Recipe, capture
from affect.quantization.weights import FLOAT_BITS, Bits, Scale, WeightQuantizer, check_bits, stored_bits

ALL = "all"
SKIP = ("*pos_embed*", "*position*", "*token", "*queries*", "*bias*")
"""Parameters that are added to what a layer sees, whatever their shape."""

_TRAINING_ONLY = ("losses.", "targets.", "validation_metrics.", "objectives.", "weighting.")
_NORMS = (
    *(nn.modules.batchnorm._BatchNorm, nn.LayerNorm, nn.GroupNorm, nn.LocalResponseNorm),
    *(nn.modules.instancenorm._InstanceNorm, nn.RMSNorm),
)
_TRANSPOSED = (nn.ConvTranspose1d, nn.ConvTranspose2d, nn.ConvTranspose3d)


class Weight(NamedTuple):
    """A weight that is quantized.

    Attributes:
        name: Dotted name in the model.
        owner: Module that holds it.
        key: Its name there.
        outer: Whether it belongs to the first or last layer.
    """

    name: str
    owner: nn.Module
    key: str
    outer: bool


class Quantization:
    """Weights of few levels on any sub-module, or weights and activations on an encoder that can be captured.

    Norms, biases and every other vector (MONET's order logits) stay float.

    Args:
        weights: ``binary`` (sign times mean), ``ternary`` (threshold 0.7 times mean) or a number of bits (symmetric,
            per output channel; 32 and more leave weights as they are).
        activations: Bits of what layers are fed: unsigned behind a ReLU, signed elsewhere. None quantizes weights only.
        modules: Sub-modules by their dotted names. ``[all]`` is the whole model (weights only).
        also: With ``activations``: further sub-modules of which only weights are quantized.
        outer: The first layer of an encoder, and the heads where ``modules`` or ``also`` hold them: a number of bits,
            ``same`` as the rest, or ``float``. What a head is fed stays float.
        scale: Of a number of bits, weights only: the grid's step from the largest weight (``max``) or ``mean``.
        skip: Patterns of parameters that stay float.
        learned: With ``activations``: learn the steps of the grids (LSQ) rather than follow the ranges. None learns
            them below 8 bits.

    Attributes:
        weights: As given; so are the others.

    Raises:
        ConfigError: If a value is unknown, or two contradict each other.
    """

    def __init__(
        self,
        weights: Bits = 8,
        activations: int | None = None,
        modules: Sequence[str] = ("encoder",),
        also: Sequence[str] = (),
        outer: Bits = 8,
        scale: Scale = "max",
        skip: Sequence[str] = SKIP,
        learned: bool | None = None,
    ) -> None:
        self.weights = check_bits(weights, "qat.weights")
        self.outer = check_bits(outer, "qat.outer", ("same", "float"))
        self.modules = (modules,) if isinstance(modules, str) else tuple(str(name) for name in modules)
        self.also = (also,) if isinstance(also, str) else tuple(str(name) for name in also)
        if scale not in ("max", "mean"):
            raise ConfigError(f"qat.scale={scale!r}: {near(str(scale), ('max', 'mean'))}")
        self.scale, self.skip, self.learned = scale, tuple(str(pattern) for pattern in skip), learned
        self.activations = activations
        if not self.modules:
            raise ConfigError("qat.modules is empty: name sub-modules, e.g. [encoder], or [all]")
        if activations is None:
            if self.also or learned is not None:
                key = "also" if self.also else "learned"
                raise ConfigError(f"qat.{key} acts on activations only: set qat.activations, or leave it out")
            return
        if not isinstance(activations, int) or isinstance(activations, bool) or not 2 <= activations <= 8:
            raise ConfigError(f"qat.activations={activations}: a number of bits from 2 to 8, or null for weights only")
        for key, bits in (("weights", self.weights), ("outer", self.outer)):
            if bits == "same" and key == "outer":
                continue
            if not isinstance(bits, int) or not 2 <= bits <= 8:
                raise ConfigError(f"qat.{key}={bits}: with activations, a number of bits from 2 to 8 is needed")
        if ALL in self.modules:
            raise ConfigError(
                "qat.modules=[all] is for weights only; name the encoders whose activations are quantized"
            )

    def describe(self) -> dict[str, Any]:
        """Return the node that builds this again, as a release stores it."""
        lists = {key: list(getattr(self, key)) for key in ("modules", "also", "skip")}
        plain = {key: getattr(self, key) for key in ("weights", "activations", "outer", "scale", "learned")}
        return {"_target_": f"{Quantization.__module__.rpartition('.')[0]}.{Quantization.__name__}", **plain, **lists}

    # -------------------------------------------------------------------------------------------------- apply

    def apply(self, module: AffectModule) -> None:
        """Quantize a model in place; a second call does nothing. Names of tensors in its state change.

        Raises:
            ConfigError: If a name is unknown, nothing is there to quantize, an objective taps a layer that would be
                captured, or a sub-module cannot be captured.
        """
        if getattr(module, "quantization", None) is not None:
            return
        if self.activations is None:
            self._quantize_weights(module, self.modules)
        else:
            self._capture(module)
            if self.also:
                self._quantize_weights(module, self.also)
        module.quantization = self  # type: ignore[assignment]

    def chosen(self, module: AffectModule, names: Sequence[str]) -> list[Weight]:
        """Return the weights below sub-modules, in the order of registration.

        Args:
            module: The model.
            names: Dotted names, or ``all``.
        """
        found: dict[tuple[int, str], Weight] = {}
        heads = {id(layer) for layer in module.heads().values()}
        firsts = (next(_weights(encoder, path, self.skip), None) for path, encoder in module.encoder_modules())
        first = {id(weight.owner) for weight in firsts if weight is not None}
        for name in names:
            root = module if name == ALL else _sub_module(module, name)
            for weight in _weights(root, "" if name == ALL else name, self.skip):
                outer = id(weight.owner) in heads | first or weight.key == "head_weight"
                # A shared sub-module is met once for each of its names.
                found.setdefault((id(weight.owner), weight.key), weight._replace(outer=outer))
        return list(found.values())

    def _quantize_weights(self, module: AffectModule, names: Sequence[str]) -> None:
        weights = self.chosen(module, names)
        if not weights:
            raise ConfigError(f"qat.modules=[{','.join(names)}]: holds no weight that could be quantized")
        for weight in weights:
            bits = self._bits(weight.outer)
            if bits == "float" or (isinstance(bits, int) and bits >= FLOAT_BITS):
                continue
            axis = 1 if isinstance(weight.owner, _TRANSPOSED) else 0
            quantizer = WeightQuantizer(bits, axis, self.scale)  # type: ignore[arg-type]
            parametrize.register_parametrization(weight.owner, weight.key, quantizer)

    def _bits(self, outer: bool) -> Bits | str:
        return self.weights if not outer or self.outer == "same" else self.outer

    def _capture(self, module: AffectModule) -> None:
        assert self.activations is not None
        bits = (int(self.weights), int(self.activations))
        outer = bits if self.outer == "same" else (int(self.outer), max(int(self.outer), self.activations))
        learned = min(bits) < 8 if self.learned is None else bool(self.learned)
        recipe = Recipe(bits, outer, learned)
        for name in self.modules:
            sub = _sub_module(module, name)
            for objective, of in module.objectives.items():
                for layer in getattr(of, "layers", ()):
                    if str(layer).startswith(f"{name}."):
                        raise ConfigError(
                            f"objective {objective} taps {layer}, which lies inside of {name}: qat.activations "
                            "captures that as one graph, without its layers; set qat.activations=null (weights only) "
                            f"or tap {name} itself"
                        )
            parent, _, key = name.rpartition(".")
            setattr(module.get_submodule(parent), key, capture(sub, name, recipe))

    # ------------------------------------------------------------------------------------------------- report

    def report(self, module: AffectModule) -> dict[str, Any]:
        """Return what was quantized: the settings, how many weights, and bytes of weights packed and as floats."""
        packed = floats = quantized = 0
        for name, parameter in module.named_parameters():
            if name.startswith(_TRAINING_ONLY):
                continue
            floats += parameter.numel() * FLOAT_BITS
            packed += parameter.numel() * FLOAT_BITS
        for bits, count in _quantized(module):
            quantized += count
            packed += count * (bits - FLOAT_BITS)
        sizes = {"quantized_weights": quantized, "bytes": -(-packed // 8), "float_bytes": floats // 8}
        return {key: value for key, value in self.describe().items() if key != "_target_"} | sizes


def _quantized(module: nn.Module) -> Iterator[tuple[int, int]]:
    """Yield bits and size of each quantized weight."""
    for sub in module.modules():
        if isinstance(sub, Captured):
            yield from sub.quantized_weights()
        elif isinstance(sub, parametrize.ParametrizationList) and isinstance(sub[0], WeightQuantizer):
            yield stored_bits(sub[0].bits), sub.original.numel()


def _sub_module(module: nn.Module, name: str) -> nn.Module:
    modules = dict(module.named_modules())
    if not name or name not in modules:
        known = [key for key in modules if key and key.count(".") < 2 and not f"{key}.".startswith(_TRAINING_ONLY)]
        raise ConfigError(f"qat.modules: no sub-module {name!r}; {near(name, known)}")
    return modules[name]


def _weights(root: nn.Module, prefix: str, skip: Sequence[str]) -> Iterator[Weight]:
    for path, owner in root.named_modules(prefix=prefix):
        if isinstance(owner, (*_NORMS, parametrize.ParametrizationList)):
            continue
        for key, parameter in owner._parameters.items():
            name = f"{path}.{key}" if path else key
            if parameter is None or not parameter.is_floating_point() or parameter.ndim < 2:
                continue
            if name.startswith(_TRAINING_ONLY) or any(fnmatch.fnmatch(name, pattern) for pattern in skip):
                continue
            if isinstance(owner, nn.RNNBase):
                raise ConfigError(
                    f"qat.modules: {path} is a {type(owner).__name__}, which reads its weights behind our back; "
                    f"leave it out (qat.skip=['{path}.*'])"
                )
            yield Weight(name, owner, key, False)


# ------------------------------------------------------------------------------------------- export, latent weights


def finished(module: AffectModule) -> AffectModule:
    """Return a copy of a trained model in evaluation mode with its quantization baked in, for export.

    Weights of few levels become plain parameters that hold the levels. A captured sub-module becomes the graph of
    ``convert_pt2e``: int8 weights as constants and a pair of quantize and dequantize operations at each input of a
    layer, batch norm folded into the weights. A model that is not quantized is only copied.

    Args:
        module: The model; it stays as it is.
    """
    baked = copy.deepcopy(module).eval()
    for parent in list(baked.modules()):
        for key, child in list(parent.named_children()):
            if isinstance(child, Captured):
                setattr(parent, key, child.converted())
    for sub in list(baked.modules()):
        if parametrize.is_parametrized(sub) and not isinstance(sub, parametrize.ParametrizationList):
            _bake(sub)
    return baked.eval()


def _bake(module: nn.Module) -> None:
    """Make the levels of a module's weights its parameters.

    Not ``remove_parametrizations``: it takes the weights' properties off a class that copies share.
    """
    keys = list(module.parametrizations)  # type: ignore[arg-type, call-overload]
    levels = {key: getattr(module, key).detach().clone() for key in keys}
    trained = {key: module.parametrizations[key].original.requires_grad for key in keys}  # type: ignore[index, union-attr]
    del module.parametrizations
    module.__class__ = type(module).__bases__[0]
    for key, value in levels.items():
        module.register_parameter(key, nn.Parameter(value, requires_grad=trained[key]))


def latent_state(state: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """Return a model's state under the names that its tensors had before it was quantized; quantizers are left out.

    Args:
        state: State of a model, quantized or not.
    """
    found = {}
    for name, tensor in state.items():
        if Captured.QUANTIZER in name:
            continue
        plain = name.replace(f".{Captured.GRAPH}.", ".")
        if ".parametrizations." in f".{plain}":
            plain = plain.replace("parametrizations.", "").removesuffix(".original")
        found[plain] = tensor
    return found
