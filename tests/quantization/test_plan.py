# SPDX-License-Identifier: Apache-2.0
"""What of a model is quantized: which weights, at which width, what stays float, and what export gets."""

from __future__ import annotations

import pytest
import torch
from hydra.utils import instantiate
from torch import nn
from torch.nn.utils import parametrize

from affect.encoders import PixelVector
from affect.errors import ConfigError
from affect.models.baseline import Baseline
from affect.quantization import Quantization, WeightQuantizer, finished, latent_state
from tests.quantization import models


def widths(module: nn.Module) -> dict[str, object]:
    """Width of each quantized weight by the name that it has in a float model."""
    return {
        name.replace("parametrizations.", ""): sub[0].bits
        for name, sub in module.named_modules()
        if isinstance(sub, parametrize.ParametrizationList) and isinstance(sub[0], WeightQuantizer)
    }


def test_weights_of_the_encoder_with_its_first_layer_at_8_bits() -> None:
    module = models.baseline()
    Quantization(weights=2).apply(module)
    assert widths(module) == {"encoder.model.0.0.weight": 8, "encoder.model.1.0.weight": 2}


@pytest.mark.parametrize(("outer", "first"), [("same", "binary"), (4, 4), ("float", None)])
def test_first_and_last_layer(outer: object, first: object) -> None:
    module = models.baseline()
    Quantization(weights="binary", modules=["all"], outer=outer).apply(module)  # type: ignore[arg-type]
    found = widths(module)
    assert found.pop("encoder.model.1.0.weight") == "binary"
    outside = ("encoder.model.0.0.weight", "head.linear.au.weight")
    assert found == ({} if first is None else dict.fromkeys(outside, first))


def test_order_logits_norms_and_biases_of_monet_stay_float() -> None:
    module = models.monet()
    Quantization(weights=3, modules=["all"], outer="same").apply(module)
    cells = ("input_kernel", "state_kernel", "head_weight", "label_weight")
    found = widths(module)
    assert {name.rpartition(".")[2] for name in found} == {*cells, "weight"}
    assert set(found.values()) == {3}
    floats = {name for name, _ in module.named_parameters() if ".parametrizations." not in name}
    assert {name.rpartition(".")[2] for name in floats} >= {"order_logits", "bias", "head_bias", "label_bias"}
    matrices = {name for name in floats if dict(module.named_parameters())[name].ndim > 1}
    assert {name.rpartition(".")[2] for name in matrices} == {"bias"}  # one vector per task


def test_patterns_keep_parameters_float() -> None:
    module = models.monet()
    Quantization(weights=3, modules=["all"], skip=["encoder.*", "*label_weight", "*bias"]).apply(module)
    assert {name.rpartition(".")[2] for name in widths(module)} == {
        *("input_kernel", "state_kernel", "head_weight"),
        *([] if module.orders.compressor is None else ["weight"]),
    }


def test_32_bits_is_the_float_network() -> None:
    module, other = models.baseline(), models.baseline()
    Quantization(weights=32, modules=["all"], outer="same").apply(module)
    assert models.same(module.state_dict(), other.state_dict())
    for one in (module, other):
        one.train()
    assert torch.equal(module(models.batch())["au"], other(models.batch())["au"])


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"modules": ["encodr"]}, "no sub-module 'encodr'; did you mean encoder"),
        ({"modules": []}, "qat.modules is empty"),
        ({"modules": ["losses.au"]}, "holds no weight"),
        ({"weights": "trinary"}, "qat.weights=trinary"),
        ({"scale": "median"}, "did you mean mean"),
        ({"also": ["head"]}, "qat.also acts on activations only"),
        ({"learned": True}, "qat.learned acts on activations only"),
        ({"activations": 1}, "from 2 to 8"),
        ({"activations": 8, "modules": ["all"]}, r"\[all\] is for weights only"),
        ({"activations": 8, "weights": "binary"}, "qat.weights=binary: with activations, a number of bits"),
        ({"activations": 8, "outer": "float"}, "qat.outer=float: with activations"),
    ],
)
def test_what_cannot_be_is_refused(arguments: dict, message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        Quantization(**arguments).apply(models.baseline())


def test_layers_that_hide_their_weights_are_refused() -> None:
    module = models.baseline()
    module.encoder.model.append(nn.GRU(3, 3))
    with pytest.raises(ConfigError, match=r"encoder\.model\.2 is a GRU.*qat\.skip"):
        Quantization(weights=4).apply(module)


def test_a_description_builds_the_same() -> None:
    first = Quantization("ternary", modules=["encoder", "head"], outer="same", skip=["*x*"])
    again = instantiate(first.describe(), _convert_="object")
    assert again.describe() == first.describe()
    one, other = models.baseline(), models.baseline()
    first.apply(one)
    again.apply(other)
    first.apply(one)  # a second time does nothing
    assert models.same(one.state_dict(), other.state_dict())


@pytest.mark.parametrize("make", [models.baseline, models.monet])
def test_what_export_gets_holds_the_levels_and_predicts_the_same(make) -> None:
    module, batch = make(), models.batch()
    Quantization("binary", modules=["all"], outer="same").apply(module)
    module.eval()
    before = module.state_dict()
    plain = finished(module)
    assert not any(parametrize.is_parametrized(sub) for sub in plain.modules())
    with torch.no_grad():
        assert torch.equal(plain(batch)["au"], module(batch)["au"])
    assert len(plain.encoder.model[1][0].weight[0].unique()) == 2
    assert models.same(module.state_dict(), before), "the model itself changed"
    assert set(latent_state(module.release_state())) == set(make().release_state())


def test_finishing_a_float_model_copies_it() -> None:
    module = models.baseline()
    assert models.same(finished(module).state_dict(), module.state_dict())


def test_latent_weights_start_a_float_model() -> None:
    module = models.baseline()
    state = module.release_state()
    Quantization("binary", modules=["all"]).apply(module)
    assert models.same(latent_state(module.release_state()), {name: state[name] for name in state})


def test_the_report_counts_packed_bytes() -> None:
    module = Baseline(models.au_task(), PixelVector(6, 2, layers=[16], norm=False))
    Quantization("binary", modules=["all"], outer="same").apply(module)
    report = module.quantization.report(module)
    quantized, floats = 6 * 16 + 16 * 4, 16 + 4
    assert report["quantized_weights"] == quantized
    assert report["float_bytes"] == 4 * (quantized + floats)
    assert report["bytes"] == quantized // 8 + 4 * floats
