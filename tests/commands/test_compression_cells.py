# SPDX-License-Identifier: Apache-2.0
"""The controlled experiment on compression: one model, many ways to make it smaller, one table and one figure."""

from __future__ import annotations

import json
import math
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from omegaconf import DictConfig, OmegaConf
from torch import Tensor, nn

from affect.commands import compression_cells, figures, reproduce, train
from affect.commands.compression_cells import LIBRARIES, key_of, run
from affect.commands.configuration import compose, config_directory
from affect.commands.main import main
from affect.commands.run_folder import RESULTS
from affect.errors import ConfigError
from affect.report import write_json
from affect.report.figures.experiments import tradeoff_figure

NAME = "controlled/compression_faces"


def test_every_arm_is_a_chain_in_order_of_methods_that_there_are() -> None:
    from affect.commands.compress import build_transforms
    from affect.compression.base import STAGES

    plan = OmegaConf.to_container(compose("train", [f"experiment={NAME}"]).controlled)
    assert isinstance(plan, dict)
    for arm, overrides in plan["arms"].items():
        library = [o.partition("=")[2] for o in overrides if key_of(o) == "library"]
        if library:
            assert library[0] in LIBRARIES, arm
            continue
        transforms = build_transforms(compose("compress", ["checkpoint=run", *overrides]))
        stages = [STAGES.index(transform.stage) for transform in transforms]
        assert stages == sorted(stages), arm
        assert len(transforms) > 1, arm
    quantizers = ("uniform", "powerquant", "nupes", "adaround", "spiq", "rex", "safer", "jlcm")
    wanted = {f"{method}_{width}" for method in quantizers for width in ("w8a8", "w4a8", "w4a4", "ternary")}
    # With 2 bits for each weight SAfER has nothing to share out, and four learnt levels take the bytes of ternary ones.
    wanted -= {"safer_ternary", "jlcm_ternary"}
    wanted |= {"jlcm_2", "tquant_ternary", "mquant_ternary", "red_hashed", "onnxruntime_w8a8", "torchao_w8a8", "float"}
    criteria = ("magnitude", "magnitude_mean", "taylor", "singe", "singe_by8", "archtree")
    assert set(plan["arms"]) == wanted | {f"{one}_{part}" for one in criteria for part in (30, 50, 70)} | {"jlcm_4"}
    methods = {path.stem for path in (config_directory() / "compression").glob("*.yaml")}
    for scale in plan["scales"].values():
        own = [key_of(o).split(".")[1] for o in scale.get("cells", []) if o.startswith("compression.")]
        assert set(own) <= methods
        assert set(scale.get("arms", [])) <= set(plan["arms"])


def test_plans_whose_arms_are_no_trainings_need_a_model() -> None:
    plan = {
        "claim": "a", "source": "b", "expected": "c", "measures": {"m": {"finding": "x"}}, "scales": {"quick": {}},
        "arms": {"one": [], "two": []}, "cell": {"_target_": "affect.commands.compression_cells.run"},
    }  # fmt: skip
    config = OmegaConf.create({"scale": "quick", "arms": []})
    with pytest.raises(ConfigError, match="need a model that is trained before"):
        reproduce.check_plan(config, plan, NAME)
    plan["before"] = {"model": {"key": "checkpoint"}}
    reproduce.check_plan(config, plan, NAME)
    with pytest.raises(ConfigError, match=r"controlled\.tradeoff: no measure 'n'; known: m"):
        reproduce.check_plan(config, {**plan, "tradeoff": {"against": "m", "of": ["n"]}}, NAME)
    with pytest.raises(ConfigError, match="library=onnxruntim: did you mean onnxruntime"):
        run(Path("cell"), ["checkpoint=model", "library=onnxruntim"])


def test_a_method_is_a_line_over_the_bytes_of_its_arms() -> None:
    measures = {
        "kB": {"float": {1: 400.0, 2: 400.0}, "uniform_w8a8": {1: 100.0, 2: 104.0}, "uniform_w4a8": {1: 50.0, 2: 52.0}},
        "F1": {"float": {1: 0.7, 2: 0.72}, "uniform_w8a8": {1: 0.69, 2: 0.7}, "uniform_w4a8": {1: 0.5, 2: 0.6}},
        "CCC": {"float": {1: 0.6, 2: None}, "uniform_w8a8": {1: 0.6, 2: 0.5}, "uniform_w4a8": {1: None, 2: None}},
    }
    figure = tradeoff_figure(measures, "kB", ["F1", "CCC"])
    first, second = figure.axes
    assert first.get_xscale() == "log"
    line = next(one for one in first.lines if one.get_label() == "uniform")
    assert list(line.get_xdata()) == [51, 102]
    assert list(line.get_ydata()) == pytest.approx([0.55, 0.695])
    short = next(one for one in second.lines if one.get_label() == "uniform")
    assert list(short.get_xdata()) == [102]  # without a score, no point


def test_one_training_serves_all_arms_of_a_seed(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """With a training and cells that only write numbers: what is trained, what each arm is given, table and figure."""
    trained, given = [], []

    def train_nothing(config: DictConfig, folder: Path) -> None:
        trained.append((folder, config.seed, config.dataset.count))
        write_json(folder / RESULTS, {})

    def write_numbers(folder: Path, overrides: list[str], batch_size: int, seconds: float) -> None:
        given.append((folder, overrides, seconds))
        scores = [("au", "f1/mean"), ("expression", "accuracy"), ("valence_arousal", "ccc/mean")]
        records = [{"task": task, "name": name, "value": 0.5} for task, name in scores]
        findings = {"kilobytes": 100.0 + len(given), "file_kilobytes": 300.0, "million_macs": 2.0, "time": 0.8}
        write_json(folder / RESULTS, {"metrics": {"test": records}, "findings": findings})

    monkeypatch.setattr(train, "train", train_nothing)
    monkeypatch.setattr(compression_cells, "run", write_numbers)
    words = ["reproduce", f"experiment={NAME}", "scale=quick", "seeds=2", f"paths.runs={tmp_path}", "dataset.count=99"]
    assert main(words) in (0, None)
    out = tmp_path / "reproduce" / "compression_faces" / "quick"
    models = [out / "before" / "model" / f"seed{seed}" for seed in (1, 2)]
    assert trained == [(models[0], 1, 99), (models[1], 2, 99)]
    assert [folder.relative_to(out).as_posix() for folder, _, _ in given[:2]] == [
        "float/seed1",
        "onnxruntime_w8a8/seed1",
    ]
    spiq = next(overrides for folder, overrides, _ in given if folder == out / "spiq_w8a8" / "seed2")
    assert f"checkpoint='{models[1].absolute()}'" in spiq
    assert "compression=[bn_folding,spiq,uniform]" in spiq
    assert spiq.index("data.images=128") < spiq.index("data.images=16")  # the scale's comes later, and counts
    assert {seconds for _, _, seconds in given} == {0.0}
    assert "| spiq_w8a8 |" in (out / "table.md").read_text(encoding="utf-8")
    assert (out / "figure.png").stat().st_size > 10_000
    assert main(words) in (0, None)
    assert len(given) == 12  # nothing is done twice


def test_cells_of_one_model_share_its_float_file(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    made = []

    def export_it(*arguments: object) -> bytes:
        made.append(arguments)
        return bytes([len(made)])

    release = SimpleNamespace(preprocess={"image_size": 32})
    for name, found in (("read_release", release), ("build_tasks", {"au": None}), ("build_model", None)):
        monkeypatch.setattr(compression_cells, name, lambda *arguments, found=found: found)
    monkeypatch.setattr(compression_cells.export, "onnx_bytes", export_it)
    files = [compression_cells.float_file(tmp_path, weights, ()) for weights in ("one", "one", "two", "two")]
    assert files == [b"\x01", b"\x01", b"\x02", b"\x02"]
    assert made == [(None, 32, ["au"])] * 2


@pytest.mark.slow
def test_torchao_gives_an_encoder_of_bytes() -> None:
    pytest.importorskip("torchao")
    from affect.commands.compression_cells import quantized_by_torchao, size_of
    from affect.data.batch import FaceBatch
    from affect.encoders import TimmEncoder
    from affect.models.baseline import Baseline
    from affect.tasks import AUOccurrence

    torch.manual_seed(0)
    module = Baseline({"au": AUOccurrence([1, 2, 4])}, TimmEncoder("test_resnet", image_size=32)).eval()
    images = torch.randint(0, 256, (8, 3, 32, 32), generator=torch.Generator().manual_seed(0), dtype=torch.uint8)
    made = quantized_by_torchao(module, [images])

    def values(model: nn.Module) -> Tensor:
        with torch.no_grad():
            return model.predict_step(FaceBatch(image=images, targets={}, masks={}))["au"]

    assert 0 < float((values(made) - values(module)).abs().mean()) < 0.05
    assert size_of(made) < 0.35 * size_of(module)


@pytest.mark.slow
def test_the_experiment_runs_on_the_quick_scale(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    for package in ("onnxruntime", "onnxscript", "torchao", "torch_pruning"):
        pytest.importorskip(package)
    monkeypatch.setattr(figures, "write_run_figures", lambda *arguments: None)
    words = [
        "reproduce",
        f"experiment={NAME}",
        "scale=quick",
        f"paths.runs={tmp_path}",
        f"paths.cache={tmp_path / 'c'}",
    ]
    assert main(words) in (0, None)
    out = tmp_path / "reproduce" / "compression_faces" / "quick"
    stored = json.loads((out / "reproduce.json").read_text(encoding="utf-8"))["measures"]
    for label, cells in stored.items():
        assert all(math.isfinite(cell["values"]["1"]) for cell in cells.values()), label
    size = {arm: cell["values"]["1"] for arm, cell in stored["kB"].items()}
    assert max(size["uniform_w4a8"], size["spiq_w8a8"], size["torchao_w8a8"]) < 0.4 * size["float"]
    macs = {arm: cell["values"]["1"] for arm, cell in stored["million MACs"].items()}
    assert macs["magnitude_50"] < 0.6 * macs["float"]
    assert macs["uniform_w4a8"] == macs["onnxruntime_w8a8"] == macs["float"]
    assert (out / "figure.png").stat().st_size > 10_000
    assert "| spiq_w8a8 |" in (out / "table.md").read_text(encoding="utf-8")
    before = (out / "spiq_w8a8" / "seed1" / "results.json").stat().st_mtime_ns
    assert main(words) in (0, None)  # nothing is done twice
    assert (out / "spiq_w8a8" / "seed1" / "results.json").stat().st_mtime_ns == before
