# SPDX-License-Identifier: Apache-2.0
"""Parts of THIN against plain computations: experts, mixtures, the dispelling loss, the frozen stream, probes."""

from __future__ import annotations

import json

import pytest
import torch
import torch.nn.functional as F

from affect.errors import CheckpointError, ConfigError
from affect.models.thin import network
from affect.models.thin.loss import absolute_cosine
from affect.models.thin.network import ExogenousHead, Experts, mix
from affect.models.thin.probes import linear_probe, mlp_probe, mutual_information
from affect.models.vggface import VGGFaceEncoder
from tests.models.thin.parts import encoder, exogenous_run, make_batch, stream


@pytest.mark.parametrize("hidden", [[], [5], [5, 4]])
def test_experts_are_separate_perceptrons(hidden):
    torch.manual_seed(0)
    experts, x = Experts(7, 3, 4, hidden), torch.randn(6, 7)
    wanted = []
    for k in range(4):
        value = x
        for j, (kernel, bias) in enumerate(zip(experts.kernels, experts.biases, strict=True)):
            value = value @ kernel[k] + bias[k]
            value = value.relu() if j < len(hidden) else value
        wanted.append(value)
    torch.testing.assert_close(experts(x), torch.stack(wanted, 1))


def test_experts_start_differently_and_normalise_each_unit():
    torch.manual_seed(0)
    experts, x = Experts(7, 3, 4, [5], norm=True), torch.randn(64, 7)
    out = experts(x)
    assert (out[:, 0] - out[:, 1]).abs().max() > 0.1
    seen = []
    experts.norms[0].register_forward_hook(lambda module, inputs, output: seen.append(output))
    experts(x)
    torch.testing.assert_close(seen[0].mean(0), torch.zeros(20), atol=1e-5, rtol=0)
    torch.testing.assert_close(seen[0].std(0, unbiased=False), torch.ones(20), atol=1e-2, rtol=0)


def test_logits_are_mixed_and_not_probabilities():
    torch.manual_seed(0)
    logits, weights = torch.randn(5, 4, 3), torch.rand(5, 4).softmax(1)
    wanted = torch.stack([sum(weights[n, k] * logits[n, k] for k in range(4)) for n in range(5)])
    torch.testing.assert_close(mix(logits, weights), wanted)
    mixed = (weights[..., None] * logits.softmax(-1)).sum(1)
    assert (mix(logits, weights).softmax(-1) - mixed).abs().max() > 1e-3


def test_absolute_cosine_in_closed_form():
    a = torch.tensor([[1.0, 0], [1, 0], [3, 4], [0, 0]])
    b = torch.tensor([[-2.0, 0], [0, 5], [4, 3], [1, 1]])
    torch.testing.assert_close(absolute_cosine(a, b), torch.tensor([1, 0, 24 / 25, 0]))
    torch.testing.assert_close(absolute_cosine(a, b, 1e-8)[1], torch.tensor(1e-4))
    torch.testing.assert_close(absolute_cosine(a * 1e4, b * 1e-3), absolute_cosine(a, b))


def test_absolute_cosine_has_a_finite_gradient_everywhere():
    a = torch.tensor([[1.0, 0], [0, 0], [1, 1]], dtype=torch.float64, requires_grad=True)
    b = torch.tensor([[0.0, 1], [1, 1], [2, 2]], dtype=torch.float64)
    absolute_cosine(a, b, 1e-8).sum().backward()
    assert a.grad.isfinite().all()
    x = torch.randn(3, 4, dtype=torch.float64, requires_grad=True)
    assert torch.autograd.gradcheck(lambda v: absolute_cosine(v, torch.ones_like(v), 1e-8), x)


def test_half_precision_is_widened():
    a = torch.randn(4, 300).half()
    assert absolute_cosine(a, a).dtype == torch.float32
    torch.testing.assert_close(absolute_cosine(a, a), torch.ones(4))


@pytest.mark.parametrize(("pooling", "size"), [("flatten", 6 * 9), ("average", 6)])
def test_the_head_reads_the_map(pooling, size):
    head = ExogenousHead(6, (3, 3), 4, pooling, [5])
    assert head.layers[0].in_features == size
    grid = torch.randn(2, 6, 3, 3)
    torch.testing.assert_close(head(grid), head.output(head.penultimate(grid)))
    if pooling == "flatten":
        with pytest.raises(ConfigError, match="built for a map of"):
            head(torch.randn(2, 6, 2, 2))


class TestStream:
    def test_it_is_the_run_that_it_was_loaded_from(self, tmp_path):
        run = exogenous_run(tmp_path / "run")
        for given in (run, run / "release", run / "release" / "model.safetensors"):
            found = stream(given)
            assert found.encoder.origin.startswith("exogenous run")
            assert found.labels is not None
            image = make_batch().image
            torch.testing.assert_close(found(image), stream(run)(image))
        assert not torch.equal(stream(run)(image), stream(None)(image))

    def test_nothing_moves_it(self, tmp_path):
        found = stream(exogenous_run(tmp_path / "run"))
        before = {name: value.clone() for name, value in found.state_dict().items()}
        found.train()
        assert not any(module.training for module in found.modules())
        found(make_batch().image)
        assert not any(parameter.requires_grad for parameter in found.parameters())
        assert all(torch.equal(before[name], value) for name, value in found.state_dict().items())
        assert not found.changed()
        found.encoder.model[0][1].running_mean += 1e-6
        assert found.changed()

    def test_another_encoder_starts_with_its_weights(self, tmp_path):
        found, other = stream(exogenous_run(tmp_path / "run")), encoder()
        found.start(other)
        image = make_batch().image
        torch.testing.assert_close(other.eval()(image), found(image))
        assert other.origin == found.origin
        assert all(parameter.requires_grad for parameter in other.parameters())
        with pytest.raises(ConfigError, match="not that of the exogenous stream"):
            found.start(encoder((4, 8)))

    def test_the_random_control_keeps_its_weights_and_starts_others_with_the_run(self, tmp_path):
        run = exogenous_run(tmp_path / "run")
        torch.manual_seed(3)
        found = stream(run, random=True)
        trained, other = stream(run), encoder()
        image = make_batch().image
        assert not torch.equal(found(image), trained(image))
        found.start(other)
        torch.testing.assert_close(other.eval()(image), trained(image))
        assert found.encoder.origin == "random"

    @pytest.mark.parametrize(
        ("arguments", "message"),
        [
            ({"classes": 3}, "tells 4 apart"),
            ({"classes": None}, "write the number of classes"),
            ({"hidden": [6]}, "its phi is another one"),
            ({"pooling": "average"}, "its phi is another one"),
            ({"pooling": "max"}, "pooling='max'"),
        ],
    )
    def test_settings_that_are_not_those_of_the_run(self, tmp_path, arguments, message):
        run = exogenous_run(tmp_path / "run")
        with pytest.raises((ConfigError, CheckpointError), match=message):
            stream(run, **arguments)

    def test_files_that_are_no_finished_exogenous_run(self, tmp_path):
        with pytest.raises(CheckpointError, match="no such folder"):
            stream(tmp_path / "nowhere")
        unfinished = tmp_path / "unfinished"
        unfinished.mkdir()
        (unfinished / "last.ckpt").touch()
        with pytest.raises(CheckpointError, match="the run is not finished"):
            stream(unfinished)
        run = exogenous_run(tmp_path / "run")
        labels = run / "release" / "labels.json"
        labels.write_text(json.dumps({"one": ["x", "y"], "two": ["z", "v"]}))
        with pytest.raises(CheckpointError, match="one task, and this one has one, two"):
            stream(run)
        labels.unlink()
        (run / "release" / "preprocess.json").write_text(json.dumps({"mean": [0.1] * 3}))
        with pytest.raises(ConfigError, match="trained with mean"):
            stream(run)


@pytest.fixture(scope="module")
def parts():
    """The encoder at an image size whose map is one position, and small layers in place of fc6 to fc8."""
    backbone = VGGFaceEncoder(pretrained=False, image_size=32, output="map")
    sizes = {"fc6": (16, 512, 1, 1), "fc7": (12, 16, 1, 1), "fc8": (20, 12, 1, 1)}
    torch.manual_seed(0)
    state = {f"{name}.weight": torch.randn(shape) * 0.1 for name, shape in sizes.items()}
    state |= {f"{name}.bias": torch.randn(shape[0]) for name, shape in sizes.items()}
    state["conv5_3.weight"] = backbone.model.features[28].weight.detach().clone()
    return backbone, state


class TestVGGFace:
    def make(self, parts, tmp_path, monkeypatch, **arguments):
        backbone, state = parts
        monkeypatch.setattr(network, "read_vggface", lambda path: (state, "BGR"))
        (tmp_path / "vgg_face.mat").touch()
        given = {"classes": 20, "hidden": [16, 12], **arguments}
        return network.ExogenousStream(backbone, weights=str(tmp_path / "vgg_face.mat"), **given)

    def test_its_identity_layers_are_phi(self, parts, tmp_path, monkeypatch):
        found, state = self.make(parts, tmp_path, monkeypatch), parts[1]
        grid = torch.randn(3, 512, 1, 1)
        x = grid.flatten(1)
        for name in ("fc6", "fc7"):
            x = F.linear(x, state[f"{name}.weight"].flatten(1), state[f"{name}.bias"]).relu()
        torch.testing.assert_close(found.head.penultimate(grid), x)
        wanted = F.linear(x, state["fc8.weight"].flatten(1), state["fc8.bias"])
        torch.testing.assert_close(found.head(grid), wanted)
        assert found.loaded
        assert not any(parameter.requires_grad for parameter in found.parameters())

    @pytest.mark.parametrize(
        ("arguments", "message"),
        [
            ({"classes": 7}, "tells 2622 people apart"),
            ({"hidden": [16]}, r"hidden=\[4096,4096\]"),
            ({"random": True}, "are not random"),
        ],
    )
    def test_settings_that_do_not_fit(self, parts, tmp_path, monkeypatch, arguments, message):
        with pytest.raises(ConfigError, match=message):
            self.make(parts, tmp_path, monkeypatch, **arguments)

    def test_another_file_than_the_encoders(self, parts, tmp_path, monkeypatch):
        backbone, state = parts
        with pytest.raises(ConfigError, match="has to be the same file"):
            self.make((backbone, state | {"conv5_3.weight": torch.zeros(1)}), tmp_path, monkeypatch)


class TestProbes:
    def data(self, function, count=600):
        torch.manual_seed(0)
        x = torch.randn(count, 5)
        return (x[:400], function(x)[:400]), (x[400:], function(x)[400:])

    def test_a_linear_probe_finds_what_is_linear(self):
        train, test = self.data(lambda x: (x @ torch.tensor([[1.0, 0, 0, 2, 0], [0, 1, 0, 0, 1]]).T).argmax(1))
        assert linear_probe(train, test, 2) > 0.95

    def test_a_perceptron_finds_what_is_not(self):
        train, test = self.data(lambda x: ((x[:, 0] > 0) ^ (x[:, 1] > 0)).long())
        assert mlp_probe(train, test, 2, epochs=80) > 0.85
        assert linear_probe(train, test, 2) < 0.65

    def test_nothing_is_found_where_nothing_is(self):
        train, test = self.data(lambda x: torch.randint(0, 2, (len(x),), generator=torch.Generator().manual_seed(2)))
        assert abs(linear_probe(train, test, 2) - 0.5) < 0.1
        assert abs(mlp_probe(train, test, 2) - 0.5) < 0.1

    def test_they_are_the_same_each_time_and_leave_the_generators_alone(self):
        train, test = self.data(lambda x: (x[:, 0] > 0).long())
        state = torch.random.get_rng_state()
        assert mlp_probe(train, test, 2, epochs=3) == mlp_probe(train, test, 2, epochs=3)
        assert torch.equal(torch.random.get_rng_state(), state)

    def test_scale_and_constant_features_do_not_matter(self):
        train, test = self.data(lambda x: (x[:, 0] > 0).long())
        constant = [(torch.cat([x * 1e-3, torch.full((len(x), 1), 7.0)], 1), y) for x, y in (train, test)]
        assert abs(linear_probe(*constant, 2) - linear_probe(train, test, 2)) < 0.02

    def test_the_linear_probe_reaches_its_optimum(self):
        train, test = self.data(lambda x: (x[:, 0] + 0.5 * torch.randn(len(x)) > 0).long())
        sklearn = pytest.importorskip("sklearn.linear_model")
        x = (train[0] - train[0].mean(0)) / train[0].std(0, unbiased=False)
        others = (test[0] - train[0].mean(0)) / train[0].std(0, unbiased=False)
        # Two classes in a softmax: half the squared norm of two opposite rows is half of that of their difference.
        model = sklearn.LogisticRegression(C=2 / (1e-3 * len(x)), tol=1e-8, max_iter=1000).fit(x.numpy(), train[1])
        assert abs(model.score(others.numpy(), test[1]) - linear_probe(train, test, 2)) <= 1 / len(others)


def test_mutual_information_in_closed_form():
    labels = torch.tensor([0, 0, 1, 1])
    assert mutual_information(labels * 3, labels) == pytest.approx(torch.log(torch.tensor(2.0)).item())
    assert mutual_information(torch.tensor([0, 1, 0, 1]), labels) == pytest.approx(0, abs=1e-12)
    assert mutual_information(torch.zeros(4, dtype=torch.long), labels) == 0


def test_flattened_positions_are_channels_first():
    """As the fully connected layers of the published VGG networks expect them."""
    head = ExogenousHead(2, (1, 3), 2, "flatten", [])
    grid = torch.arange(6.0).view(1, 2, 1, 3)
    torch.testing.assert_close(head.penultimate(grid), F.pad(torch.arange(6.0)[None], (0, 0)))
