# SPDX-License-Identifier: Apache-2.0
"""``affect compress`` from a run to a release that other commands take."""

from __future__ import annotations

import copy
import itertools
import json
import math
from collections.abc import Callable, Iterator
from dataclasses import replace
from pathlib import Path

import pytest
import torch
import yaml
from hydra.utils import get_class
from omegaconf import DictConfig, OmegaConf
from torch import nn

from affect import export as formats
from affect.commands import compress, evaluate, export
from affect.commands.configuration import compose as compose_config
from affect.commands.configuration import config_directory
from affect.commands.export import parity_faces, predicted
from affect.commands.main import main
from affect.compression.base import STAGES, Data, quantizable, run_chain
from affect.compression.codebooks import codebook_bits
from affect.compression.folding import BatchNormFolding
from affect.compression.report import Report
from affect.compression.spiq import SPIQ
from affect.compression.uniform import UniformQuantization, current_weight, put_weight, round_to_grid
from affect.data.batch import FaceBatch
from affect.errors import CheckpointError, ConfigError
from affect.foreign import build_predictor
from affect.release import build_model, build_tasks, read_release
from tests.compression.networks import FaceNet, shake_norms

Compose = Callable[..., DictConfig]


@pytest.fixture(scope="module")
def run(trained_faces: Callable[..., Path]) -> Path:
    """Return a finished run with batch norms."""
    return trained_faces("encoder=timm", "encoder.name=test_resnet")


@pytest.fixture(scope="module")
def rounded(run: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Return a release of it whose weights are codes and whose inputs are rounded, far from the run's folder."""
    out = tmp_path_factory.mktemp("rounded") / "release"
    settings = ("compression=[bn_folding,uniform]", "compression.uniform.bits=4", "compression.uniform.input_bits=8")
    compress.run(compose_config("compress", [f"checkpoint={run}", f"out={out}", *settings, "data.images=16"]))
    return out


def compressed(compose: Compose, run: Path, out: Path, methods: str, *overrides: str) -> dict:
    config = compose("compress", f"checkpoint={run}", f"out={out}", f"compression=[{methods}]", *overrides)
    compress.run(config)
    return json.loads((out / "compression.json").read_text(encoding="utf-8"))


def predictions(folder: Path) -> dict[str, torch.Tensor]:
    release = read_release(folder)
    return predicted(build_model(release, build_tasks(release)), parity_faces(release.preprocess)[0])


def test_folding_changes_nothing_and_heads_stay_as_they_are(compose: Compose, run: Path, tmp_path: Path) -> None:
    written = compressed(compose, run, tmp_path / "out", "bn_folding")
    report = written["encoders"]["encoder"][0]
    assert report["totals"]["left"] == 0 < report["totals"]["folded"]
    assert report["error"] < 1e-5
    expected = predictions(run)
    for name, value in predictions(tmp_path / "out").items():
        torch.testing.assert_close(value, expected[name], rtol=1e-3, atol=1e-4)
    before, after = read_release(run).state, read_release(tmp_path / "out").state
    heads = [name for name in before if not name.startswith("encoder.")]
    assert heads
    assert all(torch.equal(before[name], after[name]) for name in heads)
    assert written["after"]["bytes"] < written["before"]["bytes"]
    for file in (tmp_path / "out").iterdir():
        if file.suffix != ".safetensors":
            assert str(run.parent) not in file.read_text(encoding="utf-8"), file.name


def test_what_predicts_decodes_weights_once_and_not_at_every_batch(rounded: Path) -> None:
    release = read_release(rounded)
    image, _ = parity_faces(release.preprocess)
    kept, made = build_model(release, build_tasks(release)), build_predictor(release, build_tasks(release))
    stored = [[m for m in one.modules() if getattr(m, "stored", None) is not None] for one in (kept, made)]
    assert stored[0]
    assert not stored[1]
    found = predicted(made, image)
    for name, value in predicted(kept, image).items():
        assert torch.equal(found[name], value), name


def test_floats_may_be_many_times_larger_than_the_codes_of_a_file(
    rounded: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The float network is built before layers become codes; large ones must not be taken for an attack."""
    release = read_release(rounded)
    stored = sum(tensor.numel() * tensor.element_size() for tensor in release.state.values())
    monkeypatch.setattr("affect.release.SPARE_BYTES", 0)
    module = build_model(release, build_tasks(release))
    floats = sum(layer.current_weight().numel() * 4 for layer in module.modules() if hasattr(layer, "current_weight"))
    assert floats > 2 * stored
    plain = {key: node for key, node in release.config.items() if key != "compression"}
    with pytest.raises(CheckpointError, match="far more than its weights"):
        build_model(replace(release, config=plain), build_tasks(release))


@pytest.mark.parametrize("inputs", ["rounded", "floats"])
def test_files_of_rounded_inputs_are_judged_by_means(
    inputs: str, compose: Compose, run: Path, rounded: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """An input at the edge of two levels goes to either, so single values may differ by a whole step."""
    asked = []
    monkeypatch.setattr(formats, "onnx_bytes", lambda *arguments: b"graph")
    monkeypatch.setattr(formats, "with_metadata", lambda content, *arguments: content)
    monkeypatch.setattr(formats, "program_values", lambda content, tasks, image: {})
    monkeypatch.setattr(formats, "differences", lambda *arguments: {})
    monkeypatch.setattr(formats, "refusal", lambda parity, int8, tolerance: asked.append(int8))
    checkpoint = rounded if inputs == "rounded" else run
    export.run(compose("export", f"checkpoint={checkpoint}", f"out={tmp_path / 'model.onnx'}", "codes=false"))
    assert asked == [inputs == "rounded"]


def test_a_file_of_a_compressed_release_holds_codes_unless_floats_are_asked_for(
    compose: Compose, rounded: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    pytest.importorskip("onnxruntime")
    pytest.importorskip("onnxscript")
    release = read_release(rounded)
    image, tasks, found, sizes = parity_faces(release.preprocess)[0], build_tasks(release), {}, {}
    for codes in (True, False):
        path = tmp_path / f"{codes}.onnx"
        export.run(compose("export", f"checkpoint={rounded}", f"out={path}", f"codes={codes}"))
        told = " ".join(capsys.readouterr().out.split())
        assert ("codes of " in told) == codes
        found[codes], sizes[codes] = formats.program_values(path.read_bytes(), tasks, image), path.stat().st_size
    for name, value in found[True].items():
        torch.testing.assert_close(value, found[False][name], rtol=1e-5, atol=1e-6, msg=name)
    stored = {name: layer for name, layer in build_model(release, tasks).named_modules() if hasattr(layer, "stored")}
    floats = sum(4 * layer.current_weight().numel() for layer in stored.values())
    codes = sum(layer.stored.stored_bytes for layer in stored.values() if layer.stored is not None)
    assert sizes[True] < sizes[False] - 0.8 * (floats - codes)


def test_methods_that_train_go_on_in_the_data_where_the_last_burst_ended(compose: Compose, run: Path) -> None:
    config = compose("compress", f"checkpoint={run}", "data.batch_size=8")
    release = read_release(run)
    tasks = compress.with_losses(release, [])
    module, source = build_model(release, tasks), compress.training_data(config, release, [], tasks)
    ahead = list(itertools.islice(compress.training_batches(source), 12))
    assert len(ahead) > len(source.train_dataloader())  # into the second epoch, whose draws are others
    seen = []

    def watched() -> Iterator[FaceBatch]:
        for batch in compress.training_batches(source):
            seen.append(batch.image)
            yield batch

    batches, before = watched(), copy.deepcopy(module.release_state())
    for steps in (5, 7):
        compress.fine_tune(module, batches, config, steps)
    assert len(seen) == 12
    assert all(torch.equal(one, other.image) for one, other in zip(seen, ahead, strict=True))
    assert not torch.equal(seen[0], seen[5])
    assert any(not torch.equal(value, before[name]) for name, value in module.release_state().items())


def test_methods_that_need_losses_say_where_these_are(compose: Compose, rounded: Path, tmp_path: Path) -> None:
    """A release does not keep them; its dataset alone does not help."""
    with pytest.raises(ConfigError, match=r"compression=singe needs the losses.*give checkpoint=<folder of the run>"):
        compressed(compose, rounded, tmp_path / "out", "singe", "dataset=faces")


@pytest.mark.slow
def test_a_release_is_compressed_further(compose: Compose, run: Path, tmp_path: Path) -> None:
    few = ("compression.singe.rounds=1", "compression.singe.tune_steps=1", "compression.singe.final_steps=1")
    once, twice = tmp_path / "once", tmp_path / "twice"
    compressed(compose, run, tmp_path / "first", "singe,bn_folding", *few)
    compressed(compose, tmp_path / "first", twice, "uniform", "compression.uniform.bits=4")
    compressed(compose, run, once, "singe,bn_folding,uniform", *few, "compression.uniform.bits=4")
    expected = predictions(once)
    for name, value in predictions(twice).items():
        torch.testing.assert_close(value, expected[name], msg=name)
    state = read_release(twice).state
    assert {name: tensor.shape for name, tensor in read_release(once).state.items()} == {
        name: tensor.shape for name, tensor in state.items()
    }


@pytest.mark.slow
def test_a_chain_is_evaluated_exported_and_compressed_no_further(
    compose: Compose, run: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    out = tmp_path / "out"
    written = compressed(compose, run, out, "bn_folding,spiq,uniform", "compression.uniform.bits=6")
    assert written["methods"] == ["bn_folding", "spiq", "uniform"]
    assert written["after"]["bytes"] < 0.5 * written["before"]["bytes"]
    table = (out / "compression.md").read_text(encoding="utf-8")
    assert all(f"| {name} |" in table for name in written["methods"])
    node = yaml.safe_load((out / "config.yaml").read_text(encoding="utf-8"))["compression"]
    assert {one["layer"] for one in node["replaced"].values()} >= {"convolution", "without_norm"}
    evaluate.run(
        compose("evaluate", f"checkpoint={out}", f"out={tmp_path / 'table'}", "bootstrap.resamples=0",
                "data.num_workers=0", f"paths.cache={run.parent / 'cache'}")
    )  # fmt: skip
    assert (tmp_path / "table" / "results.json").is_file()
    export.run(compose("export", f"checkpoint={out}", f"out={tmp_path / 'model.onnx'}"))
    assert (tmp_path / "model.onnx").is_file()
    with pytest.raises(ConfigError, match="bn_folding"):
        compressed(compose, run, tmp_path / "wrong", "uniform,bn_folding")
    assert "evaluate it: affect evaluate" in capsys.readouterr().out


def test_what_loses_too_much_is_named(
    compose: Compose, run: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    few = ("compression.uniform.bits=2", "compression.uniform.edge_bits=null", "tolerance=0")
    compressed(compose, run, tmp_path / "out", "uniform", *few)
    told = " ".join(capsys.readouterr().out.split())
    assert "more than tolerance=0" in told
    assert "each alone, the layers that change the output most: model." in told
    worst = told.split("protect=[")[1].split("]")[0]
    written = json.loads((tmp_path / "out" / "compression.json").read_text(encoding="utf-8"))
    assert any("more than tolerance=0" in line for line in written["warnings"])
    assert any(f"protect=[{worst}]" in line for line in written["warnings"])
    assert f"protect=[{worst}]" in (tmp_path / "out" / "compression.md").read_text(encoding="utf-8")
    again = compressed(compose, run, tmp_path / "again", "uniform", *few, f"compression.uniform.protect=[{worst}]")
    assert worst not in {one["name"] for one in again["encoders"]["encoder"][0]["layers"]}


@pytest.mark.slow
def test_what_loses_too_much_is_named_behind_folding(
    compose: Compose, run: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    compressed(compose, run, tmp_path / "plain", "bn_folding,uniform", "tolerance=0")
    told = " ".join(capsys.readouterr().out.split())
    assert "after bn_folding" in told
    assert "after uniform" in told
    assert "each alone, the layers that change the output most: model." in told
    assert "tolerance=0 allows 0" in told
    shrink = ("compression.singe.criterion=l2", "compression.singe.rounds=1", "compression.singe.tune_steps=0",
              "compression.singe.final_steps=0")  # fmt: skip
    compressed(compose, run, tmp_path / "pruned", "singe,bn_folding", *shrink, "tolerance=0")
    told = " ".join(capsys.readouterr().out.split())
    assert "singe changes layers together; it took most of model." in told


def test_the_layer_that_is_blamed_is_the_one_that_was_rounded() -> None:
    torch.manual_seed(0)
    network = FaceNet().eval()
    shake_norms(network)
    x = torch.randn(4, 3, 32, 32)

    class Coarse:
        name, stage, needs = "coarse", "weights", ()

        def prepare(self, network: nn.Module, data: Data) -> None:
            pass

        def __call__(self, network: nn.Module, data: Data) -> Report:
            report = Report(self.name)
            for name in quantizable(network):
                bits = 2 if name == "stages.3.conv1" else 8
                weight = current_weight(network.get_submodule(name))
                report.layers.append(put_weight(network, name, round_to_grid(weight, bits), self.name, bits))
            return report

    transforms = [BatchNormFolding(), SPIQ(8), Coarse()]
    chain = run_chain(network, transforms, Data(), x)
    assert chain.floats is not None
    before = chain.floats(x)
    found = compress.blame(chain.floats, network, x)
    assert found[0][0] == "stages.3.conv1"
    assert found[0][1] > 2 * found[1][1]
    assert {name for name, _ in found} == set(quantizable(network))
    torch.testing.assert_close(chain.floats(x), before)  # every layer is back in its place
    told = compress.blame_text(transforms, chain, network, x)
    assert "after bn_folding" in told
    assert "protect=[stages.3.conv1]" in told


def test_layers_of_several_encoders_are_told_apart() -> None:
    torch.manual_seed(0)
    x = torch.randn(2, 3, 32, 32)
    chains = [
        (name, run_chain(FaceNet().eval(), [UniformQuantization(8)], Data(), x))
        for name in ("encoder", "exogenous.encoder")
    ]
    (plain,) = compress.named("encoder", chains[0][1], chains[:1])
    assert plain.layers[0].name == "conv1"
    for name, chain in chains:
        (report,) = compress.named(name, chain, chains)
        assert [layer.name for layer in report.layers] == [f"{name}: {layer.name}" for layer in plain.layers]
        assert chain.reports[0].layers[0].name == "conv1"


METHODS = {path.stem: OmegaConf.load(path)[path.stem] for path in (config_directory() / "compression").glob("*.yaml")}
FEW = {
    "steps": 4,
    "rounds": 1,
    "tune_steps": 1,
    "final_steps": 1,
    "batches": 1,
    "runs": 2,
    "beam": 1,
    "children": 1,
    "timer": "macs",
}
"""What makes methods short, where they have it."""


@pytest.mark.slow
@pytest.mark.parametrize("method", sorted(METHODS))
def test_every_method_gives_a_release_that_is_evaluated(
    method: str, compose: Compose, run: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    out, node = tmp_path / "out", METHODS[method]
    if get_class(node["_target_"]).stage == "prune":
        pytest.importorskip("torch_pruning")
    stages = {name: STAGES.index(get_class(METHODS[name]["_target_"]).stage) for name in {"bn_folding", method}}
    short = [f"compression.{method}.{key}={value}" for key, value in FEW.items() if key in node]
    written = compressed(compose, run, out, ",".join(sorted(stages, key=stages.get)), *short, "data.images=16")  # type: ignore[arg-type]
    assert written["methods"] == sorted(stages, key=stages.get)  # type: ignore[arg-type]
    assert written["after"]["bytes"] <= 1.05 * written["before"]["bytes"]
    assert "tolerance=0.05 allows" in " ".join(capsys.readouterr().out.split())
    evaluate.run(
        compose("evaluate", f"checkpoint={out}", f"out={tmp_path / 'table'}", "bootstrap.resamples=0",
                "data.num_workers=0", f"paths.cache={run.parent / 'cache'}")
    )  # fmt: skip
    records = json.loads((tmp_path / "table" / "results.json").read_text(encoding="utf-8"))["metrics"]["test"]
    assert {one["task"] for one in records} >= {"au", "expression", "valence_arousal"}
    assert any(one["value"] is not None and math.isfinite(one["value"]) for one in records)
    exported_alike(compose, out, tmp_path / "model.onnx")


def exported_alike(compose: Compose, release: Path, path: Path) -> None:
    """Export a compressed release, run the file with ONNX Runtime, and hold its values against the model's own."""
    pytest.importorskip("onnxruntime")
    pytest.importorskip("onnxscript")
    export.run(compose("export", f"checkpoint={release}", f"out={path}"))
    read = read_release(release)
    found = formats.program_values(path.read_bytes(), build_tasks(read), parity_faces(read.preprocess)[0])
    for name, value in predictions(release).items():
        torch.testing.assert_close(found[name], value, rtol=1e-4, atol=1e-4, msg=name)


@pytest.mark.slow
def test_merged_channels_and_codebooks_are_written_packed_and_evaluated(
    compose: Compose, run: Path, tmp_path: Path
) -> None:
    out = tmp_path / "out"
    few = (
        "compression.red.store=floats", "compression.red.share=0.2", "compression.jlcm.steps=10",
        "compression.jlcm.groups=4", "data.images=16",
    )  # fmt: skip
    written = compressed(compose, run, out, "bn_folding,red,jlcm", *few)
    assert written["encoders"]["encoder"][0]["totals"]["left"] == 0
    assert written["encoders"]["encoder"][1]["totals"]["merged"] > 0
    assert written["after"]["macs"] < written["before"]["macs"]
    release = read_release(out)
    assert release.config["compression"]["resized"]
    replaced = {name: one.get("stored") or {} for name, one in release.config["compression"]["replaced"].items()}
    coded = {name: stored for name, stored in replaced.items() if stored.get("kind") == "codebook"}
    assert len(coded) > 2
    for name, stored in coded.items():
        rows = stored["shape"][0] if stored["permuted"] else 0
        bits = codebook_bits(math.prod(stored["shape"]), stored["bits"], stored["groups"], 0, rows)
        held = sum(one.numel() * one.element_size() for key, one in release.state.items() if f"{name}.stored." in key)
        assert 0 <= 8 * held - bits < 16  # codes and rows are each filled up to a byte
    file = (out / "model.safetensors").read_bytes()
    tensors = sum(one.numel() * one.element_size() for one in release.state.values())
    assert len(file) == 8 + int.from_bytes(file[:8], "little") + tensors
    evaluate.run(
        compose("evaluate", f"checkpoint={out}", f"out={tmp_path / 'table'}", "bootstrap.resamples=0",
                "data.num_workers=0", f"paths.cache={run.parent / 'cache'}")
    )  # fmt: skip
    assert (tmp_path / "table" / "results.json").is_file()
    exported_alike(compose, out, tmp_path / "model.onnx")


def test_a_layer_to_protect_that_is_not_there_is_refused(compose: Compose, run: Path, tmp_path: Path) -> None:
    for given, told in (
        ("[model.conv2]", r"uniform\.protect: no layer model\.conv2; did you mean model\.conv1"),
        ("model.conv1", r"uniform\.protect=model\.conv1: give a list, \[model\.conv1\]"),
    ):
        with pytest.raises(ConfigError, match=told):
            compressed(compose, run, tmp_path / "out", "uniform", f"compression.uniform.protect={given}")
    assert not (tmp_path / "out").exists()


def test_mistakes_are_told_before_anything_is_written(
    compose: Compose, run: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    with pytest.raises(ConfigError, match=r"name what to do.*bn_folding.*uniform"):
        compress.run(compose("compress", f"checkpoint={run}", f"out={tmp_path / 'out'}"))
    assert main(["compress", f"checkpoint={run}", f"out={tmp_path / 'out'}"]) == 2
    assert "name what to do: compression=[<method>" in capsys.readouterr().err
    assert main(["compress", f"checkpoint={run}", f"out={tmp_path / 'out'}", "compression=[bn_foldng]"]) == 2
    assert "bn_folding" in capsys.readouterr().err
    assert not (tmp_path / "out").exists()
    assert list(compose("compress", f"checkpoint={run}", "compression=bn_folding").compression) == ["bn_folding"]
    compressed(compose, run, tmp_path / "out", "bn_folding")
    with pytest.raises(ConfigError, match="force=true replaces it"):
        compressed(compose, run, tmp_path / "out", "bn_folding")
    compressed(compose, run, tmp_path / "out", "bn_folding", "force=true")
