# SPDX-License-Identifier: Apache-2.0
"""The network of DeCaFA: sizes counted by hand, positions, the chain of transfer layers, the equation of the fusion."""

from __future__ import annotations

import itertools

import pytest
import torch
import torch.nn.functional as F

from affect.errors import ConfigError
from affect.models.decafa import Cascade, EncoderDecoder, Stage
from affect.models.decafa.network import Mixture

SCHEMES = {"98": 7, "68": 5, "5": 3}
"""Fewer points than the schemes have, so that tests are quick."""


def cascade(seed=0, **arguments) -> Cascade:
    torch.manual_seed(seed)
    given = {"channels": 1, "schemes": SCHEMES, "stages": 2, "widths": (4, 6), "count": 1, **arguments}
    return Cascade(**given).double()


def image(size=8, batch=2, channels=1) -> torch.Tensor:
    return torch.rand(batch, channels, size, size, dtype=torch.float64, generator=torch.Generator().manual_seed(3))


# ---------------------------------------------------------------------------------------------- sizes


def by_hand(channels, schemes, stages, widths, count, skips, chain, fused) -> int:
    """Count weights: 9 per pair of channels of a 3x3 convolution, 2 per channel of a norm, 1 per pair of a transfer."""
    points = list(schemes.values())
    transfer = widths[0] * points[0]
    for before, after in itertools.pairwise(points):
        transfer += (widths[0] if chain == "separate" else before) * after
    total = 0
    for stage in range(stages):
        inputs = channels if stage == 0 else fused
        pairs = []
        for width in widths:
            pairs += [(inputs, width)] + [(width, width)] * (count - 1)
            inputs = width
        for width in reversed(widths):
            pairs += [(inputs + (width if skips else 0), width)] + [(width, width)] * (count - 1)
            inputs = width
        total += sum(9 * a * b + 2 * b for a, b in pairs) + transfer
    return total


@pytest.mark.parametrize("chain", ["scores", "separate", "mixture"])
@pytest.mark.parametrize(("skips", "count"), [(False, 2), (True, 1)])
def test_parameters_are_those_counted_by_hand(chain, skips, count):
    model = cascade(stages=3, widths=(4, 6, 10), count=count, skips=skips, chain=chain)
    expected = by_hand(1, SCHEMES, 3, (4, 6, 10), count, skips, chain, fused=2 * 1 + 2 * 4)
    assert sum(p.numel() for p in model.parameters()) == expected


def test_the_network_of_the_paper_has_twelve_convolutions_a_stage_and_about_ten_million_parameters():
    with torch.device("meta"):
        model = Cascade(1, {"98": 98, "68": 68, "5": 5})
    assert sum(isinstance(m, torch.nn.Conv2d) and m.kernel_size == (3, 3) for m in model.modules()) == 4 * 12
    widths = [(m.in_channels, m.out_channels) for m in model.stages[0].body.modules() if isinstance(m, torch.nn.Conv2d)]
    down = [(1, 64), (64, 64), (64, 128), (128, 128), (128, 256), (256, 256)]
    assert sorted(widths) == sorted([*down, (256, 256), (256, 256), (256, 128), (128, 128), (128, 64), (64, 64)])
    count = sum(p.numel() for p in model.parameters())
    assert count == by_hand(1, {"98": 98, "68": 68, "5": 5}, 4, (64, 128, 256), 2, False, "scores", 2 + 2 * 64)
    assert 9e6 < count < 13e6


@pytest.mark.parametrize("skips", [False, True])
def test_features_keep_the_resolution(skips):
    body = EncoderDecoder(3, (4, 6), 1, skips)
    assert body(torch.rand(2, 3, 12, 8)).shape == (2, 4, 12, 8)
    with pytest.raises(ValueError, match="no multiples of 4"):
        body(torch.rand(1, 3, 10, 8))


def test_skips_connect_levels():
    """Without them a stage sees fine detail through its coarsest level alone."""
    torch.manual_seed(0)
    for skips in (False, True):
        body = EncoderDecoder(1, (4, 6), 1, skips).eval()
        with torch.no_grad():
            body.down[1][0].weight.zero_()  # nothing of the image passes the coarse level
        x = torch.rand(1, 1, 8, 8)
        assert torch.equal(body(x), body(torch.zeros_like(x))) == (not skips)


# ---------------------------------------------------------------------------------------------- positions


def test_maps_sum_to_one_and_points_are_their_mean_positions():
    for output in cascade().run(image()):
        for name, maps in output.maps.items():
            assert maps.shape == (2, SCHEMES[name], 8, 8)
            torch.testing.assert_close(maps.sum((-1, -2)), torch.ones_like(maps[..., 0, 0]))
            x, y = torch.meshgrid(torch.arange(8.0), torch.arange(8.0), indexing="xy")
            expected = torch.stack([(maps * x).sum((-1, -2)), (maps * y).sum((-1, -2))], -1)
            torch.testing.assert_close(output.points[name], expected)


@pytest.mark.parametrize("chain", ["scores", "separate", "mixture"])
def test_a_cascade_without_evidence_says_the_centre(chain):
    model = cascade(chain=chain)
    with torch.no_grad():
        for stage in model.stages:
            stage.transfer["98"].weight.zero_()
            if chain == "separate":
                for layer in stage.transfer.values():
                    layer.weight.zero_()
    for output in model.run(image()):
        for points in output.points.values():
            torch.testing.assert_close(points, torch.full_like(points, 3.5))


def test_a_face_that_is_moved_by_whole_strides_moves_its_points():
    """Fully convolutional: away from the borders, a shift by the stride shifts maps and points exactly."""
    model = cascade(stages=1, temperature=0.01).eval()
    scene = torch.zeros(1, 1, 64, 64, dtype=torch.float64)
    scene[..., 28:36, 28:36] = image(8, 1)
    moved = torch.roll(scene, (-4, 8), (-2, -1))
    (before,), (after,) = model.run(scene), model.run(moved)
    inside = (slice(None), slice(None), slice(16, 48), slice(16, 48))
    for name in SCHEMES:
        here, there = before.maps[name], torch.roll(after.maps[name], (4, -8), (-2, -1))
        torch.testing.assert_close(there[inside], here[inside], rtol=1e-9, atol=1e-12)


def test_half_precision_keeps_positions_in_float32():
    model = cascade().float().bfloat16()
    points = model(image(16).bfloat16())
    assert {value.dtype for value in points.values()} == {torch.float32}


# ---------------------------------------------------------------------------------------------- the chain


def coarse_gradients(chain: str, scheme: str = "5") -> dict[str, float]:
    """Return the size of the gradient that an error of one scheme sends to each transfer layer of the first stage."""
    model = cascade(stages=1, chain=chain)
    with torch.no_grad():
        for layer in model.stages[0].transfer.values():
            layer.weight.normal_()
    model(image())[scheme].square().sum().backward()
    layers = model.stages[0].transfer.items()
    return {name: 0.0 if layer.weight.grad is None else float(layer.weight.grad.abs().max()) for name, layer in layers}


def test_an_error_of_coarse_points_trains_the_finer_schemes_through_the_chain():
    for chain in ("scores", "mixture"):
        assert min(coarse_gradients(chain).values()) > 0, chain


def test_separate_schemes_do_not_train_each_other():
    found = coarse_gradients("separate")
    assert found["5"] > 0
    assert found["98"] == found["68"] == 0


def test_an_error_of_fine_points_does_not_reach_coarser_schemes():
    found = coarse_gradients("scores", "98")
    assert found["98"] > 0
    assert found["68"] == found["5"] == 0


def test_the_chain_is_a_product_of_matrices():
    """Scores of the last scheme are T_3 T_2 T_1 H, the softmax of which is its map."""
    stage = cascade(stages=1, temperature=0.5).stages[0]
    features, maps = stage(image())
    weights = [layer.weight[:, :, 0, 0] for layer in stage.transfer.values()]
    product = weights[2] @ weights[1] @ weights[0]
    scores = torch.einsum("kc,bchw->bkhw", product, features) / 0.5
    torch.testing.assert_close(maps["5"], scores.flatten(2).softmax(-1).view_as(scores))


def test_points_of_mixed_maps_are_the_same_mixtures_of_points():
    model = cascade(stages=1, chain="mixture")
    layer = model.stages[0].transfer["68"]
    assert isinstance(layer, Mixture)
    with torch.no_grad():
        layer.weight.normal_()
    (output,) = model.run(image())
    shares = layer.weight.softmax(1)
    assert float(shares.min()) > 0
    torch.testing.assert_close(output.points["68"], torch.einsum("kl,bld->bkd", shares, output.points["98"]))


def test_a_bias_of_a_transfer_layer_would_change_nothing():
    stage = cascade(stages=1).stages[0]
    features, maps = stage(image())
    scores = F.conv2d(features, stage.transfer["98"].weight, torch.randn(7, dtype=torch.float64))
    torch.testing.assert_close(scores.flatten(2).softmax(-1), maps["98"].flatten(2))
    coarse = F.conv2d(scores, stage.transfer["68"].weight)
    torch.testing.assert_close(coarse.flatten(2).softmax(-1), maps["68"].flatten(2))


def test_stages_share_nothing():
    model = cascade(stages=3)
    names = [name.split(".", 2)[2] for name, _ in model.stages.named_parameters(prefix="stages")]
    assert len(names) == 3 * len(set(names))
    seen = [id(p) for p in model.parameters()]
    assert len(set(seen)) == len(seen)


# ---------------------------------------------------------------------------------------------- fusion


def test_attention_is_the_sum_of_all_maps_with_a_peak_of_one():
    model = cascade()
    _, maps = model.stages[0](image())
    total = sum(each.sum(1) for each in maps.values())
    expected = torch.stack([face / face.max() for face in total])[:, None]
    torch.testing.assert_close(model.attend(maps), expected)
    fine = cascade(attention="fine").attend(maps)
    torch.testing.assert_close(fine[1, 0], maps["98"][1].sum(0) / maps["98"][1].sum(0).max())


def test_the_next_stage_sees_what_the_equation_says():
    """F = concat(I, I A, H, H A): the second stage, run by hand on that, gives what the cascade gives."""
    model, x = cascade().eval(), image()
    features, maps = model.stages[0](x)
    attention = sum(each.sum(1, keepdim=True) for each in maps.values())
    attention = attention / attention.amax((2, 3), keepdim=True)
    seen = torch.cat([x, x * attention, features, features * attention], 1)
    _, expected = model.stages[1](seen)
    *_, last = model.run(x)
    for name in SCHEMES:
        torch.testing.assert_close(last.maps[name], expected[name])


@pytest.mark.parametrize(
    ("fusion", "channels"),
    [
        (["image", "maps"], 1 + 15),
        (["image", "features", "attended_features"], 1 + 8),
        (["features", "attention"], 4 + 1),
    ],
)
def test_other_fusions_have_the_parts_that_they_name(fusion, channels):
    model = cascade(fusion=fusion)
    assert model.stages[1].body.down[0][0].in_channels == channels
    *_, last = model.run(image())
    assert last.points["5"].shape == (2, 3, 2)


@pytest.mark.parametrize("detached", [False, True])
def test_later_errors_reach_earlier_transfer_layers_through_the_attention_alone(detached):
    model = cascade(detached=detached)
    *_, last = model.run(image())
    last.points["98"].square().sum().backward()
    grad = model.stages[0].transfer["98"].weight.grad
    assert (grad is None or not grad.any()) == detached
    body = model.stages[0].body.down[0][0].weight.grad
    assert body.abs().max() > 0, "features pass gradients on either way"


def test_a_cascade_of_one_stage_is_its_stage():
    model = cascade(stages=1)
    stage = model.stages[0]
    assert isinstance(stage, Stage)
    _, maps = stage(image())
    (output,) = model.run(image())
    torch.testing.assert_close(output.maps, maps)
    torch.testing.assert_close(model(image()), output.points)


# ---------------------------------------------------------------------------------------------- bad settings


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"chain": "score"}, "model.chain='score': did you mean scores"),
        ({"attention": "some"}, "model.attention='some'"),
        ({"fusion": ["image", "feature"]}, "model.fusion='feature'"),
        ({"fusion": []}, "name what the next stage sees"),
        ({"fusion": ["image", "image"]}, "each once"),
        ({"stages": 0}, "model.stages=0"),
        ({"temperature": 0}, "model.temperature=0"),
        ({"widths": ()}, "give at least one level"),
        ({"count": 0}, "model.convolutions=0"),
        ({"schemes": {}}, "at least one landmark scheme"),
    ],
)
def test_settings_that_cannot_be(arguments, message):
    with pytest.raises(ConfigError, match=message):
        cascade(**arguments)
