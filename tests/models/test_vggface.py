# SPDX-License-Identifier: Apache-2.0
"""The conversion of VGGFace: names, shapes, channels and activations, on files of drawn weights."""

from __future__ import annotations

import math
import struct
from types import SimpleNamespace

import numpy as np
import pytest
import torch
import torch.nn.functional as F

from affect.errors import CheckpointError, ConfigError
from affect.models import vggface
from affect.models.vggface import IDENTITIES, LAYERS, VGGFaceEncoder, read_vggface

SLIM = {"mlp_ratio": 0.01}
"""Arguments of a network whose dense layers, nearly all of its weights, are narrow."""

FEATURES = (0, 2, 5, 7, 10, 12, 14, 17, 19, 21, 24, 26, 28)


@pytest.fixture(scope="module")
def weights():
    """Weights of every layer, as a Caffe network has them: BGR, dense layers flat. Half precision saves disk."""
    generator = torch.Generator().manual_seed(0)
    # Drawn once and repeated: its length is a prime, so that no two rows of a layer are the same.
    drawn = torch.empty(1_000_003).uniform_(-1, 1, generator=generator)
    state = {}
    for name, shape in LAYERS.items():
        spread, count = (2 / float(np.prod(shape[1:]))) ** 0.5, math.prod(shape)
        values = (1.7 * spread * drawn).half().repeat(-(-count // len(drawn)))[:count].view(shape)
        state[f"{name}.weight"] = values.flatten(1) if name.startswith("fc") else values
        state[f"{name}.bias"] = torch.empty(shape[0]).uniform_(-0.05, 0.05, generator=generator).half()
    return state


@pytest.fixture(scope="module")
def file(weights, tmp_path_factory):
    path = tmp_path_factory.mktemp("vggface") / "vggface.pth"
    torch.save(weights, path)
    return path


@pytest.fixture(scope="module")
def encoder(file):
    return VGGFaceEncoder(str(file), channels="BGR").eval()


@torch.no_grad()
def original(state, image, layers=13):
    """VGGFace as published, on a BGR image of 0 to 255 minus the mean of its channels: conv5_3 and fc7."""
    x = image.flip(1).float() - torch.tensor([93.5940, 104.7624, 129.1863]).view(3, 1, 1)
    for name in list(LAYERS)[:layers]:
        if name.endswith("_1") and name != "conv1_1":
            x = F.max_pool2d(x, 2)
        x = F.relu(F.conv2d(x, state[f"{name}.weight"].float(), state[f"{name}.bias"].float(), padding=1))
    vector = F.max_pool2d(x, 2).flatten(1)
    for name in ("fc6", "fc7"):
        vector = F.relu(F.linear(vector, state[f"{name}.weight"].float(), state[f"{name}.bias"].float()))
    return x, vector


@pytest.mark.slow
def test_activations_are_those_of_the_published_network(encoder, weights):
    image = torch.randint(0, 256, (2, 3, 224, 224), dtype=torch.uint8, generator=torch.Generator().manual_seed(1))
    seen = {}
    handle = encoder.model.features[29].register_forward_hook(lambda module, inputs, output: seen.update(map=output))
    with torch.no_grad():
        vector = encoder(image)
    handle.remove()
    wanted_map, wanted = original(weights, image)
    assert vector.shape == (2, encoder.num_features) == (2, 4096)
    torch.testing.assert_close(seen["map"], wanted_map, atol=1e-3 * float(wanted_map.max()), rtol=1e-3)
    torch.testing.assert_close(vector, wanted, atol=1e-3 * float(wanted.max()), rtol=1e-3)
    swapped = original(weights, image.flip(1))[1]
    assert float((vector - swapped).abs().max()) > 0.05 * float(wanted.max()), "the order of channels matters"


def test_the_input_is_that_of_the_published_network():
    with torch.device("meta"):
        encoder = VGGFaceEncoder(pretrained=False)
    assert (encoder.image_size, encoder.channel_order, encoder.std) == (224, "RGB", (1 / 255,) * 3)
    assert [round(255 * x, 4) for x in encoder.mean] == [129.1863, 104.7624, 93.5940]
    assert encoder.notes == ()
    assert encoder.layer_index()["features.0.weight"] == 0


@pytest.mark.slow
def test_the_file_of_the_weights_is_named_by_its_content(encoder, file):
    assert encoder.origin.startswith(f"VGGFace from {file.name} (BGR), sha256 ")
    assert "non-commercial research only" in encoder.notes[0]


def test_every_naming_of_state_dicts_is_read(weights):
    renamed = [
        {name.replace("conv", "conv_", 1) if "conv" in name else name: value for name, value in weights.items()},
        {f"module.{name}": value for name, value in weights.items()},
    ]
    torchvision = {}
    plain = {}
    places = [*(f"features.{k}" for k in FEATURES), *(f"classifier.{k}" for k in (0, 3, 6))]
    numbers = [*FEATURES, 32, 35, 38]  # of the Lua network: a flattening and two dropouts lie between
    for layer, place, number in zip(LAYERS, places, numbers, strict=True):
        for kind in ("weight", "bias"):
            torchvision[f"{place}.{kind}"] = weights[f"{layer}.{kind}"]
            plain[f"{number}.{kind}"] = weights[f"{layer}.{kind}"]
    shuffled = dict(sorted(plain.items()))  # 10 comes before 2 as text
    for state in [*renamed, torchvision, shuffled]:
        found = vggface._renamed(state)
        assert {name: value.data_ptr() for name, value in found.items()} == {
            name: value.data_ptr() for name, value in weights.items()
        }


def test_matlab_filters_are_turned(monkeypatch, tmp_path):
    small = {"conv1_1": (4, 3, 3, 3), "fc6": (5, 4, 2, 2), "fc7": (6, 5, 1, 1)}
    monkeypatch.setattr(vggface, "LAYERS", small)
    wanted = {name: torch.rand(shape) for name, shape in small.items()}
    layers = np.array(
        [SimpleNamespace(type="relu", name="relu1")]
        + [
            SimpleNamespace(name=name, weights=[w.permute(2, 3, 1, 0).numpy().squeeze(), np.arange(len(w))])
            for name, w in wanted.items()
        ],
        dtype=object,
    )
    monkeypatch.setattr("scipy.io.loadmat", lambda path, **_: {"net": SimpleNamespace(layers=layers)})
    found, order = read_vggface(tmp_path / "vgg_face.mat")
    assert order == "RGB"
    for name, weight in wanted.items():
        assert torch.equal(found[f"{name}.weight"], weight)
        assert found[f"{name}.bias"].tolist() == list(range(len(weight)))


def varint(value: int) -> bytes:
    out = b""
    while value > 127:
        out, value = out + bytes([value & 127 | 128]), value >> 7
    return out + bytes([value])


def field(number: int, content: bytes) -> bytes:
    return varint(number << 3 | 2) + varint(len(content)) + content


@pytest.mark.parametrize(("layer", "name", "blobs"), [(2, 4, 6), (100, 1, 7)])
def test_caffe_models_of_both_kinds_are_read(monkeypatch, tmp_path, layer, name, blobs):
    small = {"conv1_1": (4, 3, 3, 3), "fc6": (5, 4, 2, 2)}
    monkeypatch.setattr(vggface, "LAYERS", small)
    wanted = {key: torch.rand(shape) for key, shape in small.items()}
    data = field(1, b"VGG_FACE_16_layers") + field(layer, field(name, b"relu1_1"))
    for key, weight in wanted.items():
        written = [field(5, array.astype("<f4").tobytes()) for array in (weight.numpy(), np.arange(len(weight)))]
        size = struct.pack("B", 1 << 3) + varint(300)  # a number: the length of the first axis
        data += field(layer, field(name, key.encode()) + b"".join(field(blobs, size + blob) for blob in written))
    path = tmp_path / "VGG_FACE.caffemodel"
    path.write_bytes(data)
    found, order = read_vggface(path)
    assert order == "BGR"
    for key, weight in wanted.items():
        assert torch.equal(found[f"{key}.weight"], weight)
        assert found[f"{key}.bias"].tolist() == list(range(len(weight)))
    path.write_bytes(data[:-7])
    with pytest.raises(CheckpointError, match="no Caffe model, or cut short"):
        read_vggface(path)


def test_other_networks_are_refused(weights, tmp_path, monkeypatch):
    def read(state):
        monkeypatch.setattr(vggface, "read_state_dict", lambda path: state)
        return read_vggface(tmp_path / "x.pth")

    imagenet = {**weights, "fc8.weight": torch.zeros(1000, 4096), "fc8.bias": torch.zeros(1000)}
    with pytest.raises(CheckpointError, match=r"fc8\.weight has shape \(1000, 4096\).*VGG-16 of ImageNet"):
        read(imagenet)
    with pytest.raises(CheckpointError, match="no weight of layer fc8; VGGFace has 13 convolutions"):
        read({name: value for name, value in weights.items() if not name.startswith("fc8")})
    with pytest.raises(CheckpointError, match=r"conv1_1\.bias holds values that are not finite"):
        read({**weights, "conv1_1.bias": torch.full((64,), float("nan"))})
    with pytest.raises(CheckpointError, match=r"\.t7 is not read"):
        read_vggface(tmp_path / "VGG_FACE.t7")
    assert LAYERS["fc8"][0] == IDENTITIES == 2622


@pytest.mark.slow
def test_a_conversion_that_changes_activations_is_refused(encoder, weights, file):
    full = {name: value.float() for name, value in weights.items()}
    full = {name: value.reshape(LAYERS[name.split(".")[0]]) if "weight" in name else value
            for name, value in full.items()}  # fmt: skip
    encoder._compare(full, "BGR", file)
    with pytest.raises(CheckpointError, match="changed what layer conv5_3 gives"):
        encoder._compare(full, "RGB", file)
    turned = {**full, "fc6.weight": full["fc6.weight"].transpose(2, 3)}
    with pytest.raises(CheckpointError, match="changed what layer fc7 gives"):
        encoder._compare(turned, "BGR", file)
    dead = {**full, "conv5_3.weight": full["conv5_3.weight"] * 0, "conv5_3.bias": full["conv5_3.bias"] * 0}
    with pytest.raises(CheckpointError, match="conv5_3 gives nothing but 0"):
        encoder._compare(dead, "BGR", file)


def test_without_the_file_training_stops_and_a_release_builds():
    with pytest.raises(CheckpointError, match=r"needs the file of the VGGFace release.*allow_imagenet=true"):
        VGGFaceEncoder()
    built = VGGFaceEncoder(pretrained=False, arguments=SLIM, image_size=32)
    assert built.origin == "random"
    assert built(torch.zeros(1, 3, 32, 32, dtype=torch.uint8)).shape == (1, 4096)
    with pytest.raises(CheckpointError, match=r"encoder\.weights=none\.pth: no such file"):
        VGGFaceEncoder("none.pth", arguments=SLIM)
    with pytest.raises(ConfigError, match="weights=<file> or allow_imagenet=true, not both"):
        VGGFaceEncoder("x.pth", allow_imagenet=True)
    with pytest.raises(ConfigError, match="channels='GBR'"):
        VGGFaceEncoder(channels="GBR")


def test_a_state_dict_needs_its_order_of_channels(tmp_path):
    (tmp_path / "vggface.pth").touch()
    with pytest.raises(ConfigError, match=r"add encoder\.channels=RGB .* or encoder\.channels=BGR"):
        VGGFaceEncoder(str(tmp_path / "vggface.pth"), arguments=SLIM)


def test_imagenet_in_its_place_marks_itself(monkeypatch):
    import timm

    create = timm.create_model
    monkeypatch.setattr(timm, "create_model", lambda name, pretrained=False, **more: create(name.split(".")[0], **more))
    found = VGGFaceEncoder(allow_imagenet=True, arguments=SLIM)
    assert "ImageNet" in found.origin
    assert "not from VGGFace" in found.notes[0]
    assert found.mean == pytest.approx((0.485, 0.456, 0.406))

    def offline(name, **more):
        raise OSError("no network")

    monkeypatch.setattr(timm, "create_model", offline)
    with pytest.raises(CheckpointError, match=r"ImageNet weights vgg16\.tv_in1k are not in the hub's cache"):
        VGGFaceEncoder(allow_imagenet=True)
