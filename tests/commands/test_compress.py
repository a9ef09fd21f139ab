# SPDX-License-Identifier: Apache-2.0
"""``affect compress`` from a run to a release that other commands take."""

from __future__ import annotations

import json
import math
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
import yaml
from hydra.utils import get_class
from omegaconf import DictConfig, OmegaConf
from torch import nn

from affect.commands import compress, evaluate, export, figures, train
from affect.commands.configuration import config_directory
from affect.commands.export import parity_faces, predicted
from affect.commands.main import main
from affect.compression.base import STAGES, Data, quantizable, run_chain
from affect.compression.codebooks import codebook_bits
from affect.compression.folding import BatchNormFolding
from affect.compression.report import Report
from affect.compression.spiq import SPIQ
from affect.compression.uniform import current_weight, put_weight, round_to_grid
from affect.errors import ConfigError
from affect.release import build_model, build_tasks, read_release
from tests.compression.networks import FaceNet, shake_norms

Compose = Callable[..., DictConfig]


@pytest.fixture(scope="module")
def run(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Return a finished run with batch norms on built-in faces, with a class, a regression and units."""
    from affect.commands.configuration import compose

    folder = tmp_path_factory.mktemp("compressed") / "run"
    monkeypatch = pytest.MonkeyPatch()
    monkeypatch.setattr(figures, "write_run_figures", lambda *arguments: None)
    overrides = [
        "encoder=timm", "encoder.name=test_resnet", "encoder.image_size=32", "dataset.count=60",
        "dataset.dials.subjects=12", "dataset.dials.image_size=48", "task=[au,expression,valence_arousal]",
        "trainer.max_epochs=1", "trainer.accelerator=cpu", "data.num_workers=0", "logger=none", "protocol.test=2",
        "callbacks.progress=null", "trainer.enable_progress_bar=false", "bootstrap.resamples=0",
        f"paths.output={folder}", f"paths.cache={folder.parent / 'cache'}",
    ]  # fmt: skip
    train.run(compose("train", overrides))
    monkeypatch.undo()
    return folder


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


def test_mistakes_are_told_before_anything_is_written(
    compose: Compose, run: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    with pytest.raises(ConfigError, match=r"name what to do.*bn_folding.*uniform"):
        compress.run(compose("compress", f"checkpoint={run}", f"out={tmp_path / 'out'}"))
    assert main(["compress", f"checkpoint={run}", f"out={tmp_path / 'out'}"]) == 2
    assert "name what to do: compression=[<method>" in capsys.readouterr().err
    assert not (tmp_path / "out").exists()
    compressed(compose, run, tmp_path / "out", "bn_folding")
    with pytest.raises(ConfigError, match="force=true replaces it"):
        compressed(compose, run, tmp_path / "out", "bn_folding")
    compressed(compose, run, tmp_path / "out", "bn_folding", "force=true")
