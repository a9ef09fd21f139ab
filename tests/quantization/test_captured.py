# SPDX-License-Identifier: Apache-2.0
"""Captured encoders: the float network where quantizers are off, and its integers after converting."""

from __future__ import annotations

import copy
from collections.abc import Mapping
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, fx, nn

from affect.errors import ConfigError
from affect.models.baseline import Baseline
from affect.quantization import Captured, Quantization, finished, latent_state
from affect.quantization.captured import Recipe, SwitchedBatchNorm, capture
from tests.quantization import models

pytest.importorskip("torchao")

INT8, LOW = Recipe((8, 8), (8, 8), False), Recipe((2, 2), (2, 2), True)


@pytest.fixture(scope="module")
def int8() -> Baseline:
    module = models.baseline()
    Quantization(8, 8).apply(module)
    return module


@pytest.fixture(scope="module")
def low() -> Baseline:
    module = models.baseline()
    Quantization(2, 2, outer="same").apply(module)
    return module


def started(module: Baseline) -> Baseline:
    module = copy.deepcopy(module)
    with module.encoder.start_from():
        module.encoder(models.batch(32).image)
    return module


def without_quantizers(module: Baseline) -> Baseline:
    module = copy.deepcopy(module)
    for _, quantizer in module.encoder.quantizers():
        quantizer.fake_quant_enabled[0] = 0
    return module


@pytest.mark.parametrize("kind", ["int8", "low"])
def test_without_quantizers_it_is_the_float_encoder(kind: str, request: pytest.FixtureRequest) -> None:
    """Batch norm keeps its own eps and momentum, in training and evaluation and back."""
    module, plain = without_quantizers(request.getfixturevalue(kind)), models.baseline()
    for mode in (True, False, True, False):
        module.train(mode)
        plain.train(mode)
        for size in (5, 2):
            image = models.batch(size, seed=size).image
            torch.testing.assert_close(module.encoder(image), plain.encoder(image))
    ours, theirs = latent_state(module.release_state()), plain.release_state()
    moved = [name for name in theirs if "running_" in name]
    assert moved
    for name in moved:
        torch.testing.assert_close(ours[name], theirs[name])


def test_names_and_facts_of_the_encoder_stay(int8: Baseline) -> None:
    plain = models.baseline()
    counts = {name for name in plain.release_state() if name.endswith("num_batches_tracked")}  # nobody reads them
    assert set(latent_state(int8.release_state())) == set(plain.release_state()) - counts
    for key in ("image_size", "num_features", "mean", "std", "output"):
        assert getattr(int8.encoder, key) == getattr(plain.encoder, key)
    assert int8.encoder.layer_index() == plain.encoder.layer_index()
    names = {name for name, _ in int8.encoder.model.named_parameters()}
    assert names == {name for name, _ in plain.encoder.model.named_parameters()}


def test_parameters_learn_at_the_rates_of_the_float_model() -> None:
    module, plain = (models.baseline(encoder_lr_scale=0.1, layer_decay=0.5) for _ in range(2))
    Quantization(4, 4).apply(module)

    def rates(model: Baseline) -> dict[str, tuple[float, bool]]:
        names = {id(p): name for name, p in model.named_parameters()}
        return {
            names[id(p)].replace(f".{Captured.GRAPH}.", "."): (group["lr_scale"], "weight_decay" in group)
            for group in model.parameter_groups()
            for p in group["params"]
            if Captured.QUANTIZER not in names[id(p)]
        }

    assert rates(module) == rates(plain)


def test_frozen_parameters_stay_frozen() -> None:
    module = models.baseline()
    module.encoder.model[0].requires_grad_(False)
    wanted = {name: p.requires_grad for name, p in module.encoder.named_parameters()}
    captured = capture(module.encoder, "encoder", INT8)
    assert {name: p.requires_grad for name, p in captured.graph.named_parameters()} == wanted


@pytest.mark.parametrize("kind", ["int8", "low"])
def test_validation_observes_nothing(kind: str, request: pytest.FixtureRequest) -> None:
    module = started(request.getfixturevalue(kind)).eval()
    with torch.no_grad():
        module(models.batch())
        before = {name: value.clone() for name, value in module.state_dict().items()}
        module.encoder(torch.full((4, 3, models.SIDE, models.SIDE), 255, dtype=torch.uint8))
        module.encoder(torch.zeros((4, 3, models.SIDE, models.SIDE), dtype=torch.uint8))
    assert models.same(module.state_dict(), before)


@pytest.mark.parametrize("kind", ["int8", "low"])
def test_a_face_gets_the_same_in_any_batch(kind: str, request: pytest.FixtureRequest) -> None:
    module, image = started(request.getfixturevalue(kind)).eval(), models.batch(7).image
    with torch.no_grad():
        whole = module.encoder(image)
        for k in range(7):
            torch.testing.assert_close(module.encoder(image[k : k + 1]), whole[k : k + 1])


def test_training_observes_until_it_is_told_not_to(int8: Baseline) -> None:
    module = started(int8).train()
    first = [name for name in module.state_dict() if name.endswith("max_val")]
    before = {name: module.state_dict()[name].clone() for name in first}
    bright = torch.full((4, 3, models.SIDE, models.SIDE), 255, dtype=torch.uint8)
    module.encoder(bright)
    assert any(not torch.equal(module.state_dict()[name], before[name]) for name in first)
    module.encoder.freeze_observers()
    module.train()
    before = {name: module.state_dict()[name].clone() for name in first}
    with torch.no_grad():
        for parameter in module.encoder.parameters():
            parameter.mul_(2)
    module.encoder(bright)
    assert all(torch.equal(module.state_dict()[name], before[name]) for name in first)


@pytest.mark.parametrize(("kind", "bits"), [("int8", 8), ("low", 2)])
def test_converting_keeps_the_function_and_stores_integers(
    kind: str, bits: int, request: pytest.FixtureRequest
) -> None:
    module = started(request.getfixturevalue(kind)).eval()
    plain, batch = finished(module), models.batch(32, seed=3)
    with torch.no_grad():
        torch.testing.assert_close(plain(batch)["au"], module(batch)["au"])
    graph = plain.encoder.graph
    codes = [b for b in graph.buffers() if b.dtype == torch.int8] + [
        p for p in graph.parameters() if p.dtype == torch.int8
    ]
    assert len(codes) == 2
    assert all(int(code.abs().max()) <= 2 ** (bits - 1) - 1 for code in codes)
    kinds = [str(node.target) for node in graph.graph.nodes if node.op == "call_function"]
    assert not [name for name in kinds if "batch_norm" in name or "dropout" in name]
    assert sum("dequantize_per_channel" in name for name in kinds) == 2


def test_two_bits_have_three_levels_per_channel(low: Baseline) -> None:
    module = started(low).eval()
    for name, quantizer in module.encoder.quantizers():
        if name in module.encoder.weight_bits:
            node = next(n for n in module.encoder.graph.graph.nodes if n.target == name)
            weight = module.encoder.graph.get_parameter(node.args[0].target)
            for channel in quantizer(weight):
                assert len(channel.unique()) <= 3


def test_learned_steps_have_the_gradient_of_the_paper(low: Baseline) -> None:
    """LSQ (arXiv 1902.08153), equations 3 and 5, behind a ReLU; torch calls inside what rounds to the largest level."""
    module = started(low).train()
    unsigned = [q for n, q in module.encoder.quantizers() if n not in module.encoder.weight_bits and q.quant_min == 0]
    quantizer = unsigned[0]
    module.encoder(models.batch().image)  # from here on steps are learned
    values = torch.rand(50, generator=torch.Generator().manual_seed(0)) * 4
    step = quantizer.scale.detach().clone()
    quantizer.scale.grad = None
    sent = torch.randn(50, generator=torch.Generator().manual_seed(1))
    (quantizer(values) * sent).sum().backward()
    ratio = values / step
    slope = torch.where(ratio.round() <= 3, ratio.round() - ratio, torch.full_like(ratio, 3.0))
    expected = (slope * sent).sum() / (len(values) * 3) ** 0.5
    torch.testing.assert_close(quantizer.scale.grad[0], expected)


def test_steps_start_from_the_size_of_what_passes(low: Baseline) -> None:
    module = started(low)
    image = models.batch(32).image
    pixels = image.float() * module.encoder.graph._scale - module.encoder.graph._shift
    first = next(q for n, q in module.encoder.quantizers() if n not in module.encoder.weight_bits)
    torch.testing.assert_close(first.scale.detach()[0], 2 * pixels.abs().mean())


def test_starting_leaves_running_statistics_alone(int8: Baseline) -> None:
    module = copy.deepcopy(int8)
    before = {name: value.clone() for name, value in latent_state(module.release_state()).items()}
    assert models.same(latent_state(started(module).release_state()), before)


def test_training_changes_every_weight_and_every_step(low: Baseline) -> None:
    module = started(low).train()
    optimizer = torch.optim.SGD([p for p in module.encoder.parameters() if p.requires_grad], 0.1)
    before = {name: p.detach().clone() for name, p in module.encoder.named_parameters()}
    module.encoder(models.batch(16).image).square().sum().backward()
    optimizer.step()
    still = {name for name, p in module.encoder.named_parameters() if torch.equal(p, before[name])}
    assert {name.rpartition(".")[2] for name in still} <= {"zero_point", "bias"}
    with torch.no_grad():
        for step in module.encoder.learned_steps():
            step.fill_(-1)
    module.encoder.positive_steps()
    assert all(bool((step > 0).all()) for step in module.encoder.learned_steps())


class Noisy(nn.Module):
    """An encoder that draws at random whatever its mode."""

    image_size, num_features = models.SIDE, 3

    def __init__(self) -> None:
        super().__init__()
        self.layer = nn.Conv2d(3, 3, 1)

    def forward(self, image: Tensor) -> Tensor:
        values = self.layer(image.float())
        return values * torch.rand_like(values[:, :1]) if self.training else values


class Branching(Noisy):
    """An encoder whose way depends on what it sees."""

    def forward(self, image: Tensor) -> Tensor:
        values = self.layer(image.float())
        return values if values.sum() > 0 else -values


@pytest.mark.parametrize(
    ("module", "message"),
    [
        (Noisy(), r"encoder cannot be captured: aten\.rand_like\.default draws at random"),
        (Branching(), "encoder cannot be captured: .*data-dependent"),
        (nn.Linear(3, 3), r"encoder \(Linear\) is no encoder of images"),
    ],
)
def test_what_cannot_be_captured_is_refused_by_name(module: nn.Module, message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        capture(module, "encoder", INT8)


def test_dropout_is_off_in_evaluation_and_gone_after_converting() -> None:
    encoder = models.encoder()
    encoder.model.append(nn.Dropout(0.5))
    captured, image = capture(encoder, "encoder", INT8), models.batch().image
    captured.train()
    assert not torch.equal(captured(image), captured(image))
    captured.eval()
    with torch.no_grad():
        torch.testing.assert_close(captured.converted()(image), captured(image))


def test_a_frozen_batch_norm_stays_frozen() -> None:
    encoder = models.encoder()

    class Frozen(type(encoder)):  # type: ignore[misc]
        def train(self, mode: bool = True) -> nn.Module:
            super().train(mode)
            self.model[0][1].eval()
            return self

    encoder.__class__ = Frozen
    captured = capture(encoder, "encoder", INT8)
    norms = [sub for sub in captured.graph.modules() if isinstance(sub, SwitchedBatchNorm)]
    assert [norm.frozen for norm in norms] == [True, False]


class Watched(fx.Interpreter):
    """Runs a graph and keeps what each node gave; what reads a node may be handed another value in its place.

    Args:
        graph: The graph.
        handed: Values by the name of a node.
    """

    def __init__(self, graph: fx.GraphModule, handed: Mapping[str, Tensor] | None = None) -> None:
        super().__init__(graph)
        self.handed = dict(handed or {})
        self.found: dict[str, Tensor] = {}

    def run_node(self, node: fx.Node) -> Any:
        value = super().run_node(node)
        if not isinstance(value, Tensor) or node.op not in ("call_function", "call_module"):
            return value
        self.found[node.name] = value.clone()  # operations in place may follow
        return self.handed[node.name].clone() if node.name in self.handed else value


def assert_converted_node_by_node(captured: Captured, image: Tensor) -> None:
    """Compare each node of a converted graph with the node that it comes from, both fed what the latter was fed.

    A layer has to agree to what float32 rounds. A quantizer has to give the same level, but where a number lies at
    the edge of two.
    """
    graph, integers = captured.graph, captured.converted().graph
    trained = Watched(graph)
    captured(image)  # sets what an evaluation sets
    trained.run(image)
    kinds = [str(node.target) for node in integers.graph.nodes if node.op == "call_function"]
    assert not [name for name in kinds if "batch_norm" in name], "each is folded into the layer before it"

    def folded(node: fx.Node) -> str:
        norm = node.op == "call_module" and isinstance(graph.get_submodule(str(node.target)), SwitchedBatchNorm)
        return node.args[0].name if norm else node.name  # type: ignore[union-attr]

    handed, quantized = {}, {}
    for node in graph.graph.nodes:
        if node.name in trained.found and Captured.QUANTIZER not in str(node.target):
            handed[folded(node)] = trained.found[node.name]
        elif node.name in trained.found and node.args[0].op != "get_attr":
            quantized[folded(node.args[0])] = node
    pairs = {
        node.name: quantized[node.args[0].args[0].name]
        for node in integers.graph.nodes
        if "dequantize_per_tensor" in str(node.target)
    }
    assert set(pairs.values()) == set(quantized.values()), "each quantizer is there"
    handed |= {name: trained.found[node.name] for name, node in pairs.items()}
    found = Watched(integers, handed)
    found.run(image)
    compared = set(handed) & set(found.found)
    kept = [node for node in integers.graph.nodes if node.op == "call_function"]
    unseen = {node.name for node in kept if "quantize" not in str(node.target)} & set(found.found) - compared
    assert not unseen, "every operation comes from one of the trained graph"
    for name in compared:
        value, wanted = found.found[name], handed[name]
        if name not in pairs:
            assert (value - wanted).abs().max() <= 1e-5 * wanted.abs().max(), name
            continue
        step = float(graph.get_submodule(str(pairs[name].target)).scale)  # type: ignore[arg-type]
        apart = ((value - wanted) / step).abs()
        other = apart > 0.5
        read = trained.found[pairs[name].args[0].name][other] / step  # type: ignore[union-attr]
        assert bool((apart[other] < 1.5).all()), name
        assert bool(((read % 1 - 0.5).abs() < 1e-3).all()), name
        assert apart[~other].max() < 1e-3, name


class Gated(nn.Module):
    """An encoder with squeeze and excitation, a residual sum and activations in place."""

    image_size, num_features = models.SIDE, 8

    def __init__(self) -> None:
        super().__init__()
        self.stem, self.project = nn.Conv2d(3, 8, 3, 2, bias=False), nn.Conv2d(8, 8, 1, bias=False)
        self.norms = nn.ModuleList([nn.BatchNorm2d(8, eps=1e-2, momentum=1.0) for _ in range(2)])
        self.squeeze, self.expand = nn.Conv2d(8, 4, 1), nn.Conv2d(4, 8, 1)
        for norm in self.norms:
            nn.init.uniform_(norm.weight, -1.5, 1.5)
            nn.init.normal_(norm.bias)

    def forward(self, image: Tensor) -> Tensor:
        values = F.hardswish(self.norms[0](self.stem(image.float() / 128 - 1)), inplace=True)
        gate = self.expand(F.relu(self.squeeze(values.mean((2, 3), keepdim=True)), inplace=True))
        return (self.norms[1](self.project(values * F.hardsigmoid(gate))) + values).mean((2, 3))


@pytest.mark.parametrize("recipe", [INT8, LOW], ids=["int8", "w2a2"])
def test_squeeze_and_excitation_converts_node_by_node(recipe: Recipe) -> None:
    torch.manual_seed(0)
    captured = capture(Gated(), "encoder", recipe)
    image = models.batch(32).image
    with captured.start_from():
        captured(image)
    captured.train()(image)
    captured.eval()
    with torch.no_grad():
        assert_converted_node_by_node(captured, image)


@pytest.mark.slow
@pytest.mark.parametrize("name", ["mobilenetv3_small_050", "test_efficientnet", "test_vit", "test_convnext"])
@pytest.mark.parametrize("recipe", [INT8, LOW], ids=["int8", "w2a2"])
def test_timm_encoders(name: str, recipe: Recipe) -> None:
    """Each node is what it was; whole networks differ by less than their own rounding errors.

    Folding rounds sums otherwise, by 1e-7. That moves a number at the edge of two levels to the other one, a whole
    step, and untrained layers, of statistics of four images, pass that on enlarged: changing batch norm's statistics
    by 1e-6 does the same to the outputs.
    """
    from affect.encoders import TimmEncoder

    torch.manual_seed(0)
    encoder = TimmEncoder(name, image_size=None if name == "test_vit" else 64)
    for sub in encoder.modules():
        if isinstance(sub, nn.modules.batchnorm._BatchNorm):
            sub.momentum = 1.0  # so that evaluation has the ranges of training
    side = encoder.image_size
    image = torch.randint(0, 256, (4, 3, side, side), dtype=torch.uint8)
    captured = capture(encoder, "encoder", recipe)
    with captured.start_from():
        captured(image)
    captured.train()(image).square().sum().backward()
    captured.eval()
    with torch.no_grad():
        assert_converted_node_by_node(captured, image)
        values, converted = captured(image), captured.converted()(image)
        assert values.shape == encoder(image).shape
        for _, quantizer in captured.quantizers():
            quantizer.fake_quant_enabled[0] = 0
        # Two errors of rounding with nothing in common are √2 times their size apart.
        assert (converted - values).norm() <= 2 * (values - captured(image)).norm()
