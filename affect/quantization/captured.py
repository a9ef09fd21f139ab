# SPDX-License-Identifier: Apache-2.0
"""An encoder as one graph whose layers take quantized weights and activations: torchao's PT2E.

``torch.export`` captures the encoder as it trains, and ``prepare_qat_pt2e`` puts a fake quantizer of torchao at each
input of a convolution or linear layer. Three things differ from torchao's own recipe, and why:

- Batch norm and dropout become small modules of the graph. PT2E captures their training branch, and its switch to
  evaluation and its fusion of batch norm put the constants 1e-5 and 0.1 in place of each layer's own.
- Batch norm is folded when the graph is converted, not while it trains. With a symmetric grid per output channel that
  is exact: a factor per channel goes into the grid's step, and the integers stay.
- Ranges are observed in training alone. PT2E observes validation batches as well.
"""

from __future__ import annotations

import copy
import math
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor, fx, nn

from affect.errors import ConfigError

_PLAIN = (str, int, float, bool, tuple, list, type(None))


class Recipe(NamedTuple):
    """How a graph is quantized.

    Attributes:
        bits: Bits of weights and of activations.
        outer: The same of the first layer.
        learned: Whether the steps of the grids are learned (LSQ).
    """

    bits: tuple[int, int]
    outer: tuple[int, int]
    learned: bool


class SwitchedBatchNorm(nn.Module):
    """Batch norm in a graph, in training or evaluation mode, with the numbers that it was captured with.

    Args:
        momentum: Share of the batch in the running statistics.
        eps: Added to the variance.
        frozen: Whether running statistics are always used.
    """

    def __init__(self, momentum: float, eps: float, frozen: bool) -> None:
        super().__init__()
        self.momentum, self.eps, self.frozen = momentum, eps, frozen

    def forward(
        self, values: Tensor, weight: Tensor | None, bias: Tensor | None, mean: Tensor | None, variance: Tensor | None
    ) -> Tensor:
        """Return normalised values ``(B, C, …)``."""
        training = mean is None or (self.training and not self.frozen)
        return F.batch_norm(values, mean, variance, weight, bias, training, self.momentum, self.eps)


class Captured(nn.Module):
    """A captured sub-module in the place of the original, whose plain attributes (sizes, mean, names) it keeps.

    Args:
        graph: Prepared graph; its parameters have the names that they had in the original.
        original: The sub-module.
        name: Its dotted name, for messages.
        quantizers: Number of bits of each fake quantizer of a weight, by its name in the graph.
    """

    GRAPH, QUANTIZER = "graph", "activation_post_process"

    def __init__(self, graph: fx.GraphModule, original: nn.Module, name: str, quantizers: Mapping[str, int]) -> None:
        super().__init__()
        for key, value in vars(original).items():
            if not key.startswith("_") and key != "training" and isinstance(value, _PLAIN):
                setattr(self, key, value)
        self.graph, self.name_in_model, self.weight_bits = graph, name, dict(quantizers)
        self.observers_frozen = self.converted_graph = self.calibrating = False
        self._observing: tuple[bool, bool] | None = None
        self._layers = dict(original.layer_index()) if hasattr(original, "layer_index") else {}  # type: ignore[operator]
        self._undecayed: set[str] = set()
        inner = getattr(original, "model", None)
        if inner is not None and hasattr(inner, "no_weight_decay"):
            self._undecayed = set(inner.no_weight_decay())

    @property
    def model(self) -> nn.Module:
        """Return the holder of the parameters that the original held under ``model``, by the same names."""
        holder = self.graph.get_submodule("model")
        holder.no_weight_decay = _Constant(self._undecayed)  # type: ignore[assignment]
        return holder

    def layer_index(self) -> dict[str, int]:
        """Return what the original's method gave."""
        return self._layers

    def forward(self, image: Tensor) -> Tensor:
        """Return what the original returns, computed by quantized layers."""
        if not self.converted_graph and not self.calibrating:
            self._observe()
            if not self.training:
                self.refresh()
        return self.graph(image)

    # --------------------------------------------------------------------------------------------- quantizers

    def quantizers(self) -> Iterator[tuple[str, nn.Module]]:
        """Yield the name and the module of each fake quantizer."""
        for name, child in self.graph.named_children():
            if name.startswith(self.QUANTIZER) and hasattr(child, "fake_quant_enabled"):
                yield name, child

    def quantized_weights(self) -> Iterator[tuple[int, int]]:
        """Yield bits and size of each quantized weight."""
        for node in self.graph.graph.nodes:
            if node.op == "call_module" and str(node.target) in self.weight_bits and node.args[0].op == "get_attr":
                yield self.weight_bits[str(node.target)], _attribute(self.graph, str(node.args[0].target)).numel()

    def learned_steps(self) -> Iterator[nn.Parameter]:
        """Yield the learned steps."""
        for _, quantizer in self.quantizers():
            if isinstance(quantizer.scale, nn.Parameter):
                yield quantizer.scale

    def _observe(self) -> None:
        """Observe ranges of activations in training only.

        Those of weights are no statistics but what the weights are, so they follow until they are frozen. The mode is
        asked for here: Lightning sets the attribute ``training`` behind a validation, and calls no ``train()``.
        """
        if self._observing == (self.training, self.observers_frozen):
            return
        self._observing = (self.training, self.observers_frozen)
        for name, quantizer in self.quantizers():
            follows = name in self.weight_bits or self.training
            learned = isinstance(quantizer.scale, nn.Parameter)
            quantizer.observer_enabled[0] = int(follows and not learned and not self.observers_frozen)  # type: ignore[index, operator]

    def freeze_observers(self) -> None:
        """Let ranges be what they are from now on."""
        self.observers_frozen = True

    def refresh(self) -> None:
        """Set steps and zero points to what the observed ranges say: an average of weights averages ranges only."""
        with torch.no_grad():
            for name, quantizer in self.quantizers():
                if not isinstance(quantizer.scale, nn.Parameter) and name not in self.weight_bits:
                    scale, zero = quantizer.calculate_qparams()  # type: ignore[operator]
                    quantizer.scale.copy_(scale)
                    quantizer.zero_point.copy_(zero)  # type: ignore[operator]

    @contextmanager
    def start_from(self) -> Iterator[None]:
        """Let the ranges, or the learned steps, be those of the batch that is passed through inside this context."""
        norms = [sub for sub in self.graph.modules() if isinstance(sub, SwitchedBatchNorm)]
        held = {name: buffer.clone() for name, buffer in self.graph.named_buffers() if self.QUANTIZER not in name}
        before, self._observing = self.training, None
        for _, quantizer in self.quantizers():
            _forget(quantizer)
            quantizer.observer_enabled[0] = 1  # type: ignore[index, operator]
        self.calibrating = True
        for norm in norms:
            norm.train()
        try:
            with torch.no_grad():
                yield
        finally:
            with torch.no_grad():
                for name, buffer in self.graph.named_buffers():
                    if name in held:
                        buffer.copy_(held[name])
            self.calibrating = False
            self.train(before)

    def positive_steps(self) -> None:
        """Keep learned steps above 0, where an optimiser's update may have taken them below."""
        with torch.no_grad():
            for step in self.learned_steps():
                step.clamp_(min=torch.finfo(step.dtype).eps)

    # ------------------------------------------------------------------------------------------------ convert

    def converted(self) -> Captured:
        """Return a copy whose graph is that of ``convert_pt2e``: integers as weights, pairs of quantize and dequantize.

        Batch norm behind a convolution is folded into its integers' steps and its bias; dropout is gone.
        """
        convert_pt2e = _pt2e().convert_pt2e
        shell = copy.deepcopy(self).eval()
        if shell.converted_graph:
            return shell
        shell._observe()
        shell.refresh()
        graph = shell.graph
        with torch.no_grad():
            for name, quantizer in shell.quantizers():
                if name in shell.weight_bits:
                    _quantized_weight(graph, name, quantizer)
            _fold_batch_norms(graph, shell.weight_bits)
            for _, quantizer in shell.quantizers():
                scale, zero = quantizer.scale.detach().clone(), quantizer.zero_point.detach().round().to(torch.int64)  # type: ignore[operator]
                quantizer.calculate_qparams = _Constant((scale, zero))  # type: ignore[assignment]
            _plain_operations(graph)
            graph.eval()
            shell.graph = _without_locks(convert_pt2e(graph))
        shell.graph.graph.eliminate_dead_code()
        shell.graph.recompile()
        shell.converted_graph = True
        return shell


class _Constant:
    """A function without arguments that returns one value; unlike a lambda it survives a deep copy with its value."""

    def __init__(self, value: Any) -> None:  # noqa: ANN401
        self.value = value

    def __call__(self) -> Any:  # noqa: ANN401
        return self.value


# -------------------------------------------------------------------------------------------------------- capture


def capture(module: nn.Module, name: str, recipe: Recipe) -> Captured:
    """Return an encoder captured as a graph with fake quantizers.

    Args:
        module: An encoder of images: it takes RGB uint8 ``(B, 3, S, S)`` and has ``image_size``.
        name: Its dotted name, for messages.
        recipe: Bits, and whether steps are learned.

    Raises:
        ConfigError: If torchao is not installed, or the module cannot be captured; it names the operation.
    """
    size = getattr(module, "image_size", None)
    if not isinstance(size, int):
        raise ConfigError(
            f"qat.modules: {name} ({type(module).__name__}) is no encoder of images (it has no image_size); "
            "activations are quantized in encoders only: qat.modules=[encoder], or qat.activations=null"
        )
    prepare_qat_pt2e = _pt2e().prepare_qat_pt2e
    trainable = {key: parameter.requires_grad for key, parameter in module.named_parameters()}
    # Drawn apart from the run's own numbers, so that a quantized run starts from the weights of the float one.
    random = torch.Generator().manual_seed(0)
    image = torch.randint(0, 256, (4, 3, size, size), generator=random, dtype=torch.uint8)
    graph = _exported(module, name, image)
    _switchable(graph, name)
    annotator = _annotator(recipe)
    graph = _without_locks(prepare_qat_pt2e(graph, annotator))
    for key, parameter in graph.named_parameters():
        parameter.requires_grad_(trainable.get(key, True))
    if not annotator.layers:
        raise ConfigError(f"qat.modules: {name} has no convolution or linear layer that could be quantized")
    weights = _weight_quantizers(graph)
    captured = Captured(graph, module, name, weights)
    captured.train(True)
    for _, quantizer in captured.quantizers():
        _plain_flags(quantizer)
    with captured.start_from():  # gives every buffer its size, before an optimiser or a state needs it
        captured(image)
    for _, quantizer in captured.quantizers():
        _learn(quantizer)
    return captured.train(module.training)


def _pt2e() -> Any:  # noqa: ANN401
    """Return torchao's module of PT2E, without what its import tells torch's own developers.

    Raises:
        ConfigError: If it is not installed.
    """
    import importlib
    import logging

    before = logging.root.manager.disable
    logging.disable(logging.WARNING)
    try:
        return importlib.import_module("torchao.quantization.pt2e.quantize_pt2e")
    except ImportError as error:
        raise ConfigError(
            f"qat.activations needs torchao ({error}): pip install 'affect[export]', or set qat.activations=null"
        ) from error
    finally:
        logging.disable(before)


def _exported(module: nn.Module, name: str, image: Tensor) -> fx.GraphModule:
    from torch.export import Dim, export

    training = module.training
    try:
        program = export(module.train(), (image,), dynamic_shapes=({0: Dim("batch")},))
    except Exception as error:
        raise ConfigError(
            f"qat.modules: {name} cannot be captured: {_operation(error)}; set qat.activations=null (weights only), or "
            "take another encoder"
        ) from error
    finally:
        module.train(training)
    graph = program.module()
    assert isinstance(graph, fx.GraphModule)
    for node in list(graph.graph.nodes):
        # They hold for the device and the batch of the capture.
        check = node.op == "call_function" and "_assert" in str(node.target)
        if (check or (node.op == "call_module" and "guards" in str(node.target))) and not node.users:
            graph.graph.erase_node(node)
    graph.recompile()
    return _without_locks(graph)


def _operation(error: BaseException) -> str:
    """Return the lines of an error of ``torch.export`` that name what it stumbled over."""
    lines = [line.strip() for line in str(error).splitlines() if line.strip()]
    named = [line for line in lines if line.startswith(("Explanation:", "Developer debug context:", "from user code"))]
    code = [line for line in lines if line.startswith("File ") and "/torch/" not in line]
    found = [*(lines[:1] or [type(error).__name__]), *named[:2], *code[-1:]]
    return " ".join(dict.fromkeys(found))[:400]


def _switchable(graph: fx.GraphModule, name: str) -> None:
    """Make batch norm and dropout modules of the graph, and refuse other operations that draw at random."""
    aten = torch.ops.aten
    norms = dropouts = 0
    for node in list(graph.graph.nodes):
        if node.op != "call_function":
            continue
        if node.target is aten.batch_norm.default:
            values, weight, bias, mean, variance, training, momentum, eps = node.args[:8]
            key = f"batch_norm_{norms}"
            norms += 1
            graph.add_submodule(key, SwitchedBatchNorm(float(momentum), float(eps), not training))
            with graph.graph.inserting_before(node):
                new = graph.graph.call_module(key, (values, weight, bias, mean, variance))
            _replace(graph, node, new)
        elif node.target in (aten.dropout.default, aten.dropout_.default):
            rate = float(node.args[1])
            if rate == 0 or not node.args[2]:
                _replace(graph, node, node.args[0])
                continue
            key = f"dropout_{dropouts}"
            dropouts += 1
            graph.add_submodule(key, nn.Dropout(rate))
            with graph.graph.inserting_before(node):
                new = graph.graph.call_module(key, (node.args[0],))
            _replace(graph, node, new)
        elif _draws(node):
            raise ConfigError(
                f"qat.modules: {name} cannot be captured: {node.target} draws at random and could not be switched off "
                "in evaluation (stochastic depth, attention's dropout): set encoder.drop_path=0 or qat.activations=null"
            )
    for node in list(graph.graph.nodes):  # counts of batches, which nobody reads
        counts = node.op == "call_function" and node.target is aten.add_.Tensor and not node.users
        if counts and "num_batches_tracked" in str(getattr(node.args[0], "target", "")):
            graph.graph.erase_node(node)
    graph.graph.eliminate_dead_code()
    graph.graph.lint()
    graph.recompile()


def _draws(node: fx.Node) -> bool:
    if "scaled_dot_product" in str(node.target):
        rate = node.kwargs.get("dropout_p", node.args[4] if len(node.args) > 4 else 0.0)
        return bool(rate)
    return torch.Tag.nondeterministic_seeded in getattr(node.target, "tags", ())


def _replace(graph: fx.GraphModule, node: fx.Node, new: Any) -> None:  # noqa: ANN401
    if new is not node.args[0]:
        new.meta = dict(node.meta)
    node.replace_all_uses_with(new)
    graph.graph.erase_node(node)


def _without_locks(graph: fx.GraphModule) -> fx.GraphModule:
    """Take away the methods that forbid ``train`` and ``eval``: what differs between them are modules of the graph."""
    for key in ("train", "eval"):
        graph.__dict__.pop(key, None)
    return graph


# --------------------------------------------------------------------------------------------------- quantization

_CONVOLUTIONS = ("conv1d", "conv2d", "conv3d")
_PASS_SIGN = (
    *("max_pool2d", "avg_pool2d", "adaptive_avg_pool2d", "mean", "flatten", "view", "reshape", "permute", "transpose"),
    *("slice", "select", "contiguous", "clone", "squeeze", "unsqueeze", "cat", "add", "add_", "upsample_nearest2d"),
)
_POSITIVE = ("relu", "relu_", "relu6", "sigmoid", "hardsigmoid", "softmax", "hardsigmoid_", "sigmoid_")


def _kind(node: fx.Node) -> str:
    """Return the name of an ATen operation without overload, empty for other nodes."""
    target = getattr(node.target, "_opname", None) if node.op == "call_function" else None
    return str(target or getattr(getattr(node.target, "_schema", None), "name", "")).rpartition("::")[2]


def _is_positive(node: Any, depth: int = 0) -> bool:  # noqa: ANN401
    """Return whether an operation can give nothing below 0."""
    if not isinstance(node, fx.Node) or depth > 20:
        return False
    kind = _kind(node)
    if kind in ("hardtanh", "hardtanh_", "clamp", "clamp_"):
        low = node.args[1] if len(node.args) > 1 else node.kwargs.get("min")
        return isinstance(low, int | float) and low >= 0
    if kind in _PASS_SIGN:
        first = node.args[0]
        read = list(first) if isinstance(first, list | tuple) else [first]
        if kind in ("add", "add_"):
            read.append(node.args[1])
        return all(_is_positive(other, depth + 1) for other in read)
    return kind in _POSITIVE


def _annotator(recipe: Recipe) -> Any:  # noqa: ANN401
    """Return a quantizer of PT2E: weights and inputs of convolutions and linear layers.

    At 8 bits, also what leaves a layer and what enters a sum, so that a runtime can stay with integers.
    """
    from torchao.quantization.pt2e import FakeQuantize, LearnableFakeQuantize, MovingAverageMinMaxObserver
    from torchao.quantization.pt2e.observer import PerChannelMinMaxObserver, UniformQuantizationObserverBase
    from torchao.quantization.pt2e.quantizer import QuantizationAnnotation, QuantizationSpec, Quantizer

    class CurrentRange(PerChannelMinMaxObserver):
        """The range of each channel of the weights as they are now."""

        def forward(self, values: Tensor) -> Tensor:
            rows = values.detach().movedim(self.ch_axis, 0).flatten(1)
            low, high = rows.amin(1), rows.amax(1)
            if self.min_val.shape != low.shape:
                self.min_val.resize_(low.shape)
                self.max_val.resize_(high.shape)
            self.min_val.copy_(low)
            self.max_val.copy_(high)
            return values

    class MeanSize(UniformQuantizationObserverBase):
        """The start of learned steps: 2 mean|v| / sqrt(n) (LSQ, arXiv 1902.08153)."""

        def __init__(self, ch_axis: int | None = None, **keywords: Any) -> None:  # noqa: ANN401
            super().__init__(**keywords)
            if ch_axis is not None:
                self.ch_axis = ch_axis
            self.mean = torch.ones(1)

        def forward(self, values: Tensor) -> Tensor:
            size = values.detach().abs()
            self.mean = (
                size.mean()[None] if not hasattr(self, "ch_axis") else size.movedim(self.ch_axis, 0).flatten(1).mean(1)
            )
            return values

        def calculate_qparams(self) -> tuple[Tensor, Tensor]:
            step = (2 * self.mean / math.sqrt(self.quant_max)).clamp(min=float(self.eps))
            return step, torch.zeros_like(step, dtype=torch.int64)

    def weight(bits: int, axis: int) -> QuantizationSpec:
        top = 2 ** (bits - 1) - 1
        scheme = torch.per_channel_symmetric
        common = {"dtype": torch.int8, "quant_min": -top, "quant_max": top, "qscheme": scheme, "ch_axis": axis}
        # PT2E hands the axis on to classes with "PerChannel" in their names only.
        if recipe.learned and bits < 8:
            made = LearnableFakeQuantize.with_args(observer=MeanSize, use_grad_scaling=True, ch_axis=axis)
        else:
            made = FakeQuantize.with_args(observer=CurrentRange, ch_axis=axis)
        return QuantizationSpec(observer_or_fake_quant_ctr=made, **common)

    specs: dict[tuple[int, bool], QuantizationSpec] = {}

    def activation(bits: int, node: fx.Node) -> QuantizationSpec:
        positive, learned = _is_positive(node), recipe.learned and bits < 8
        if (bits, positive) not in specs:
            top = 2**bits - 1 if positive or bits == 8 else 2 ** (bits - 1) - 1
            signed = not positive and bits < 8
            # At 8 bits negative values get a zero point: runtimes are faster on unsigned activations.
            scheme = torch.per_tensor_affine if bits == 8 or (positive and not learned) else torch.per_tensor_symmetric
            if learned:
                made = LearnableFakeQuantize.with_args(observer=MeanSize, use_grad_scaling=True)
            else:
                made = FakeQuantize.with_args(observer=MovingAverageMinMaxObserver)
            specs[bits, positive] = QuantizationSpec(
                dtype=torch.int8 if signed else torch.uint8,
                quant_min=-top if signed else 0,
                quant_max=top,
                qscheme=scheme,
                observer_or_fake_quant_ctr=made,
            )
        return specs[bits, positive]

    class Annotator(Quantizer):
        """Says at which edges fake quantizers go."""

        layers = 0

        def annotate(self, model: fx.GraphModule) -> fx.GraphModule:
            nodes = [n for n in model.graph.nodes if _kind(n) in (*_CONVOLUTIONS, "conv_transpose2d", "linear")]
            for index, node in enumerate(nodes):
                weights, activations = recipe.outer if index == 0 else recipe.bits
                axis = 1 if _kind(node) == "conv_transpose2d" else 0
                values, kernel = node.args[0], node.args[1]
                inputs = {values: activation(activations, values), kernel: weight(weights, axis)}
                node.meta["quantization_annotation"] = QuantizationAnnotation(input_qspec_map=inputs, _annotated=True)
                self.layers += 1
                if recipe.bits == (8, 8):
                    end = _end_of_layer(model, node)
                    found = end.meta.setdefault("quantization_annotation", QuantizationAnnotation(_annotated=True))
                    found.output_qspec = activation(8, end)
            if recipe.bits == (8, 8):
                for node in model.graph.nodes:
                    if _kind(node) in ("add", "add_") and len(node.all_input_nodes) == 2 and _is_map(node):
                        inputs = {other: activation(8, other) for other in node.all_input_nodes}
                        found = QuantizationAnnotation(input_qspec_map=inputs, _annotated=True)
                        node.meta["quantization_annotation"] = found
            return model

        def validate(self, model: fx.GraphModule) -> None:
            pass

    return Annotator()


def _end_of_layer(graph: fx.GraphModule, node: fx.Node) -> fx.Node:
    """Return the last operation of a layer: its batch norm and ReLU, where it alone feeds them."""
    while len(node.users) == 1:
        (user,) = node.users
        norm = user.op == "call_module" and isinstance(graph.get_submodule(str(user.target)), SwitchedBatchNorm)
        if not (norm or _kind(user) in ("relu", "relu_", "hardtanh", "hardtanh_")):
            break
        node = user
    return node


def _is_map(node: fx.Node) -> bool:
    values = [other.meta.get("val") for other in (node, *node.all_input_nodes)]
    return all(isinstance(value, Tensor) and value.ndim == 4 and value.is_floating_point() for value in values)


def _weight_quantizers(graph: fx.GraphModule) -> dict[str, int]:
    """Return the bits of each fake quantizer of a layer's weight, by name."""
    found = {}
    for node in graph.graph.nodes:
        if _kind(node) in (*_CONVOLUTIONS, "conv_transpose2d", "linear") and node.args[1].op == "call_module":
            name = str(node.args[1].target)
            found[name] = math.ceil(math.log2(2 * int(graph.get_submodule(name).quant_max) + 1))  # type: ignore[arg-type]
    return found


def _plain_flags(quantizer: nn.Module) -> None:
    """Take switches out of the state: they follow the mode, and an average of weights would average them too."""
    for key in ("fake_quant_enabled", "observer_enabled", "learning_enabled", "eps"):
        if key in quantizer._buffers:
            value = quantizer._buffers.pop(key)
            object.__setattr__(quantizer, key, value)


def _learn(quantizer: nn.Module) -> None:
    """Have the step of a learnable fake quantizer learned; its zero point is 0 and stays."""
    if isinstance(quantizer.scale, nn.Parameter):
        quantizer.learning_enabled[0] = 1  # type: ignore[index, operator]
        quantizer.scale.requires_grad_(True)
        quantizer.zero_point.requires_grad_(False)  # type: ignore[union-attr, operator]


def _forget(quantizer: nn.Module) -> None:
    """Forget the range of an observer that follows ranges; others keep nothing."""
    observer = quantizer.activation_post_process
    if hasattr(observer, "averaging_constant"):
        observer.min_val.fill_(math.inf)  # type: ignore[union-attr, operator]
        observer.max_val.fill_(-math.inf)  # type: ignore[union-attr, operator]


# ------------------------------------------------------------------------------------------------------- converting


def _attribute(graph: fx.GraphModule, target: str) -> Tensor:
    parent, _, key = target.rpartition(".")
    value = getattr(graph.get_submodule(parent), key)
    assert isinstance(value, Tensor)
    return value


def _quantized_weight(graph: fx.GraphModule, name: str, quantizer: nn.Module) -> None:
    """Set a weight to its levels, which a second quantization leaves as they are."""
    for node in graph.graph.nodes:
        if node.op == "call_module" and node.target == name and node.args[0].op == "get_attr":
            weight = _attribute(graph, str(node.args[0].target))
            weight.copy_(quantizer(weight))
    quantizer.observer_enabled[0] = 0  # type: ignore[index, operator]


def _fold_batch_norms(graph: fx.GraphModule, weights: Mapping[str, int]) -> None:
    for node in list(graph.graph.nodes):
        if node.op != "call_module" or not isinstance(graph.get_submodule(str(node.target)), SwitchedBatchNorm):
            continue
        norm, layer, mean = graph.get_submodule(str(node.target)), node.args[0], node.args[3]
        foldable = isinstance(layer, fx.Node) and _kind(layer) in (*_CONVOLUTIONS, "linear") and len(layer.users) == 1
        if not foldable or mean is None:
            continue
        quantized = layer.args[1]
        kernel = quantized.args[0] if quantized.op == "call_module" and quantized.target in weights else None
        if kernel is None or kernel.op != "get_attr" or len(quantized.users) > 1 or len(kernel.users) > 1:
            continue
        assert isinstance(norm, SwitchedBatchNorm)
        read: Callable[[Any], Tensor | None] = lambda n: None if n is None else _attribute(graph, str(n.target))  # noqa: E731
        gamma, beta, mean, variance = (read(argument) for argument in node.args[1:5])
        assert mean is not None
        assert variance is not None
        factor = (variance + norm.eps).rsqrt() * (1 if gamma is None else gamma)
        weight = _attribute(graph, str(kernel.target))
        weight.mul_(factor.view(-1, *[1] * (weight.ndim - 1)))
        quantizer = graph.get_submodule(str(quantized.target))
        quantizer.scale.mul_(factor.abs()).clamp_(min=torch.finfo(torch.float32).tiny)  # type: ignore[union-attr, operator]
        bias = read(layer.args[2]) if len(layer.args) > 2 else None
        folded = ((0 if bias is None else bias) - mean) * factor + (0 if beta is None else beta)
        key = f"{node.target}_folded_bias"
        graph.register_parameter(key, nn.Parameter(folded, requires_grad=False))
        with graph.graph.inserting_before(layer):
            constant = graph.graph.get_attr(key)
        arguments = list(layer.args) + [None] * (3 - len(layer.args))
        arguments[2] = constant
        layer.args = tuple(arguments)
        node.replace_all_uses_with(layer)
        graph.graph.erase_node(node)
    graph.graph.eliminate_dead_code()
    graph.recompile()


def _plain_operations(graph: fx.GraphModule) -> None:
    """Put operations back in the place of the modules of batch norm and dropout, in evaluation mode."""
    for node in list(graph.graph.nodes):
        if node.op != "call_module":
            continue
        module = graph.get_submodule(str(node.target))
        if isinstance(module, nn.Dropout):
            node.replace_all_uses_with(node.args[0])
            graph.graph.erase_node(node)
        elif isinstance(module, SwitchedBatchNorm):
            numbers = (node.args[3] is None, module.momentum, module.eps, False)
            with graph.graph.inserting_before(node):
                new = graph.graph.call_function(torch.ops.aten.batch_norm.default, (*node.args, *numbers))
            new.meta = dict(node.meta)
            node.replace_all_uses_with(new)
            graph.graph.erase_node(node)
    graph.graph.eliminate_dead_code()
    graph.recompile()
