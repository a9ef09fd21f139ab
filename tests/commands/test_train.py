# SPDX-License-Identifier: Apache-2.0
"""A run from config to results: finished runs are skipped, others continued; every number follows from the tables."""

from __future__ import annotations

import json
import math
import shutil
from collections.abc import Callable
from pathlib import Path

import cv2
import numpy as np
import pytest
from omegaconf import DictConfig, OmegaConf

from affect.commands import evaluate, train
from affect.commands.inference import table_metrics
from affect.commands.run_folder import clear, differing, locked, resolve_output, result_hash, same_run, store
from affect.data.table import FaceTable
from affect.errors import CheckpointError, ConfigError, DataError
from affect.release import build_model, build_tasks, read_release


@pytest.fixture(scope="module")
def finished(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Return the folder of a finished tiny run."""
    from affect.commands.configuration import compose
    from tests.conftest import SMALL

    folder = tmp_path_factory.mktemp("finished")
    config = compose("train", [*SMALL, f"paths.output={folder / 'run'}", f"paths.cache={folder / 'cache'}"])
    train.run(config)
    return folder / "run"


def results(folder: Path) -> dict:
    return json.loads((folder / "results.json").read_text())


def test_results_say_what_was_done(finished: Path) -> None:
    found = results(finished)
    assert found["seed"] == 1
    assert found["selection"]["rule"] == "best_val"
    assert found["data"]["parts"]["train"]["rows"] == 8
    assert found["labels"]["valence_arousal"] == ["valence", "arousal"]
    assert found["preprocess"]["channel_order"] == "RGB"
    assert found["preprocess"]["recipe"]["kind"] == "similarity"
    assert found["initial_weights"] == {"encoder": {"encoder": "random"}, "init": None}
    assert found["environment"]["packages"]["torch"]
    assert found["timing"]["training_seconds"] > 0
    for record in found["metrics"]["test"]:
        assert {"task", "name", "value", "low", "high", "constant", "n"} <= record.keys()
    for name in ("training_curves", "samples", "predictions", "au_f1", "expression_confusion", "landmarks"):
        assert (finished / "figures" / f"{name}.png").is_file()


def test_every_number_is_a_function_of_the_predictions_table(finished: Path) -> None:
    tasks = build_tasks(read_release(finished))
    for task in tasks.values():
        for metric in task.metrics:
            metric.bind(task.outputs)
    table = FaceTable.read_parquet(finished / "predictions" / "test.parquet")
    assert table_metrics(table, tasks, resamples=20) == results(finished)["metrics"]["test"]


def test_logged_metrics_agree_with_those_of_the_table(finished: Path) -> None:
    found = results(finished)
    logged = found["history"][found["selection"]["epoch"]]
    checked = 0
    for record in found["metrics"]["validation"]:
        value = logged[f"val/{record['task']}/{record['name']}"]
        if record["value"] is None:
            assert value is None or math.isnan(value)
        else:
            assert value == pytest.approx(record["value"], abs=2e-4), record["name"]
            checked += 1
    assert checked > 40


def test_parts_share_no_subject(finished: Path) -> None:
    from affect.commands.assembly import build_datamodule, build_sources, make
    from affect.commands.assembly import build_tasks as make_tasks

    config = OmegaConf.load(finished / "config.yaml")
    config.data.limit = None
    datamodule = build_datamodule(
        config, build_sources(config, make(config.prepare, "prepare")), make_tasks(config), 32
    )
    datamodule.setup("fit")
    subjects = datamodule.sources[0].table.strings("subject")[0]
    parts = {part: set(subjects[datamodule.part_rows(part)[0]]) for part in ("train", "validation", "test")}
    assert all(parts.values())
    assert not parts["train"] & parts["validation"]
    assert not (parts["train"] | parts["validation"]) & parts["test"]


def test_a_finished_run_is_skipped_and_says_so(finished: Path, capsys: pytest.CaptureFixture[str]) -> None:
    config = OmegaConf.load(finished / "config.yaml")
    before = (finished / "results.json").stat().st_mtime_ns
    score = train.train(config, finished)
    assert "finished before" in capsys.readouterr().out
    assert (finished / "results.json").stat().st_mtime_ns == before
    assert score == results(finished)["selection"]["score"]


def test_a_folder_with_another_run_is_refused_by_the_keys_that_differ(finished: Path) -> None:
    config = OmegaConf.load(finished / "config.yaml")
    config.optimizer.lr = 0.5
    with pytest.raises(ConfigError, match=r"holds another run \(differs in optimizer.lr\)"):
        train.train(config, finished)


def test_a_run_on_labels_that_changed_is_refused(finished: Path, tmp_path: Path) -> None:
    shutil.copytree(finished, tmp_path / "run")
    (tmp_path / "run" / "data.json").write_text('{"table": {"faces": "0123"}, "init": {}}')
    config = OmegaConf.load(finished / "config.yaml")
    with pytest.raises(ConfigError, match=r"on other data \(table faces: 0123 then, [0-9a-f]{16} now\)"):
        train.train(config, tmp_path / "run")
    (tmp_path / "run" / "results.json").unlink()
    with pytest.raises(ConfigError, match="on other data"):
        train.train(config, tmp_path / "run")


def test_a_start_that_came_to_nothing_does_not_hold_its_folder(
    tiny_run: Callable[..., DictConfig], tmp_path: Path
) -> None:
    store(tmp_path, tiny_run("optimizer.lr=0.5"), {})
    same_run(tmp_path, tiny_run(), {})
    store(tmp_path, tiny_run(), {})
    assert OmegaConf.load(tmp_path / "config.yaml").optimizer.lr == tiny_run().optimizer.lr


def test_the_hash_of_a_run_is_that_of_its_folder_and_of_its_stored_config(
    finished: Path, tiny_run: Callable[..., DictConfig]
) -> None:
    assert results(finished)["hash"] == result_hash(tiny_run())
    assert result_hash(OmegaConf.load(finished / "config.yaml")) == result_hash(tiny_run())


def test_a_running_run_is_refused(finished: Path) -> None:
    config = OmegaConf.load(finished / "config.yaml")
    with locked(finished), pytest.raises(ConfigError, match="another process is running it"):
        train.train(config, finished)


@pytest.mark.slow
def test_force_trains_again_with_the_same_result(finished: Path, tiny_run: Callable[..., DictConfig]) -> None:
    config = tiny_run()
    train.run(config)
    before = results(Path(config.paths.output))
    config.force = True
    train.run(config)
    after = results(Path(config.paths.output))
    assert after["metrics"] == before["metrics"] == results(finished)["metrics"]
    assert after["timing"]["finished"] > before["timing"]["finished"]


def test_force_removes_what_a_run_writes_and_nothing_else(tmp_path: Path) -> None:
    kept = ("notes.txt", "run.lock")
    (tmp_path / "figures").mkdir()
    for name in (*kept, "last.ckpt", "figures/f1.png", ".last.0123456789ab.part.ckpt"):
        (tmp_path / name).touch()
    with pytest.raises(ConfigError, match="holds files but no run of affect"):
        clear(tmp_path)
    assert (tmp_path / "last.ckpt").exists()
    (tmp_path / "config.yaml").write_text("task: {}\nmodel: {}\ntrainer: {}\nseed: 1\n")
    clear(tmp_path)
    assert {path.name for path in tmp_path.iterdir()} == set(kept)


def test_force_removes_nothing_when_the_config_cannot_run(
    finished: Path, tmp_path: Path, tiny_run: Callable[..., DictConfig]
) -> None:
    shutil.copytree(finished, tmp_path / "run")
    with pytest.raises(ConfigError, match="encoder"):
        train.run(tiny_run("force=true", "encoder.name=resnet5"))
    assert (tmp_path / "run" / "results.json").is_file()


def test_evaluate_gives_the_same_numbers_again(finished: Path, compose: Callable[..., DictConfig]) -> None:
    config = compose("evaluate", f"checkpoint={finished}", "data.num_workers=0", "bootstrap.resamples=20")
    evaluate.run(config)
    again = results(finished / "evaluate" / "faces-test")
    assert again["metrics"]["test"] == results(finished)["metrics"]["test"]


def test_a_task_without_a_score_trains_alone_and_is_selected_by_its_loss(tiny_run: Callable[..., DictConfig]) -> None:
    config = tiny_run("task=[pose]")
    score = train.run(config)
    found = results(Path(config.paths.output))
    assert score == found["selection"]["score"] == -found["history"][0]["val/pose/loss"]


def test_a_finished_run_is_evaluated_as_asked(finished: Path, tmp_path: Path) -> None:
    shutil.copytree(finished, tmp_path / "run")
    config = OmegaConf.load(finished / "config.yaml")
    config.bootstrap.resamples, config.group_by = 0, "subject"
    train.train(config, tmp_path / "run")
    records = results(tmp_path / "run")["metrics"]["test"]
    assert all(record["low"] is None for record in records)
    assert any(str(record["subgroup"]).startswith("subject=") for record in records)
    config.group_by = ["skin_group"]
    with pytest.raises(ConfigError, match=r"without the column 'skin_group'; affect evaluate checkpoint="):
        train.train(config, tmp_path / "run")


def test_evaluate_by_subgroup(finished: Path, compose: Callable[..., DictConfig], tmp_path: Path) -> None:
    overrides = (f"checkpoint={finished}", "data.num_workers=0", "bootstrap.resamples=0", f"out={tmp_path}")
    evaluate.run(compose("evaluate", *overrides, "group_by=[skin_group]"))
    subgroups = {r["subgroup"] for r in results(tmp_path)["metrics"]["test"]}
    assert None in subgroups
    assert any(str(name).startswith("skin_group=") for name in subgroups)
    with pytest.raises(ConfigError, match=r"group_by: no column 'skin_grup'.*did you mean skin_group"):
        evaluate.run(compose("evaluate", *overrides, "group_by=[skin_grup]"))


def test_a_checkpoint_of_another_task_set_is_refused(
    finished: Path, compose: Callable[..., DictConfig], tmp_path: Path
) -> None:
    table = FaceTable.from_columns({"image": ["a.png"], "bs_mouthSmile": [0.5]}, tmp_path)
    table.to_csv(tmp_path / "labels.csv")
    import cv2

    cv2.imwrite(str(tmp_path / "a.png"), np.zeros((40, 40, 3), np.uint8))
    config = compose("evaluate", f"checkpoint={finished}", "dataset=table", f"dataset.table={tmp_path / 'labels.csv'}")
    with pytest.raises(CheckpointError, match="predicts other things than the table has labels for"):
        evaluate.run(config)


def test_predictions_are_a_table_that_can_be_trained_on(finished: Path) -> None:
    from affect.data.layouts.table import read

    table = read(finished / "predictions" / "test.parquet", root=finished, check_images=False)
    assert {"au01_occurrence", "expression", "landmarks_68", "target_expression"} <= table.names


def test_a_release_builds_without_its_run(finished: Path, tmp_path: Path) -> None:
    shutil.copytree(finished / "release", tmp_path / "release")
    release = read_release(tmp_path / "release")
    module = build_model(release, build_tasks(release))
    assert set(module.tasks) == {"au", "expression", "valence_arousal", "landmarks"}


def test_the_folder_depends_on_what_can_change_the_result(tiny_run: Callable[..., DictConfig]) -> None:
    base = result_hash(tiny_run())
    assert result_hash(tiny_run("data.num_workers=3")) == base
    assert result_hash(tiny_run("seed=7")) == base
    assert result_hash(tiny_run(output="elsewhere")) == base
    assert result_hash(tiny_run("paths.cache=/elsewhere", "dataset.cache=null")) == base
    assert result_hash(tiny_run("logger=csv", "trainer.log_every_n_steps=7")) == base
    assert result_hash(tiny_run("trainer.enable_model_summary=true")) == base
    assert result_hash(tiny_run("callbacks.best.folder=/elsewhere")) == base
    assert result_hash(tiny_run("optimizer.lr=0.5")) != base
    assert result_hash(tiny_run("dataset.seed=3")) != base


def test_the_default_folder_names_experiment_dataset_part_and_seed(compose: Callable[..., DictConfig]) -> None:
    config = compose("train", "seed=7", "protocol.test=2")
    output = resolve_output(config)
    assert output.parts[-5:-2] == ("runs", "train", "faces-2")
    assert output.name == "seed7"
    assert config.paths.output == str(output)


_NEVER = ("dataset.dials.au_source=independent", "dataset.dials.au_rates=0.0")
_NEUTRAL = ("dataset.dials.expression_rates=[1,0,0,0,0,0,0,0]",)


@pytest.mark.parametrize(
    ("overrides", "error", "message"),
    [
        (["selection=best"], ConfigError, "selection=best"),
        (["task.au.aus=[1,3]"], ConfigError, "unknown action unit 3"),
        (["dataset.root=/nowhere"], ConfigError, "dataset.root=/nowhere: no such folder"),
        (["encoder.name=resnet5"], ConfigError, "did you mean resnet50"),
        (["protocol.test=9"], ConfigError, "protocol.test=9"),
        (["dataset.expressions=rafd"], ConfigError, "did you mean rafdb"),
        (["dataset.dials.subjects=2"], DataError, "group"),
        (["dataset.dials.missing_landmarks=1.0"], DataError, "landmarks"),
        (["init=/nowhere"], CheckpointError, "no such folder"),
        (["transform.train.flip=2"], ConfigError, "transform.flip=2"),
        (["monitor=val/scor"], ConfigError, "monitor=val/scor: .*did you mean val/score"),
        (["task.au.score=f1/meen"], ConfigError, "task.au.score=f1/meen: no such metric; did you mean .*f1/mean"),
        (["callbacks.best=null"], ConfigError, "selection=best_val needs callbacks.best"),
        (["group_by=skin_grup"], ConfigError, "group_by: no column 'skin_grup'.*did you mean skin_group"),
        (["bootstrap.level=1.5"], ConfigError, "bootstrap.level=1.5"),
        (["bootstrap.resamples=-1"], ConfigError, "bootstrap.resamples=-1"),
        (["seed=abc"], ConfigError, "seed=abc"),
        (["trainer.max_epochs=ten"], ConfigError, "trainer.max_epochs=ten"),
        (["trainer.precision=7"], ConfigError, "trainer: "),
        (["+trainer.val_check_interval=2"], ConfigError, "val_check_interval=2: .*would miss validations"),
        (["+trainer.val_check_interval=1"], ConfigError, "val_check_interval=1: .*would miss validations"),
        (["optimizer.lr=fast"], ConfigError, "optimizer.lr=fast: a number is needed"),
        (["optimizer.lr=-1.0"], ConfigError, "optimizer: .*-1.0"),
        (["task=[expression]", "loss=asymmetric"], ConfigError, "loss=…: no selected task uses it"),
        (["task=[expression]", "target=uniform"], ConfigError, "target=…: no selected task uses it"),
        (["task=[au]", "dataset.aus=[1,12,27]"], ConfigError, "task au: faces has no label of AU27; .* AU1, AU12"),
        (
            ["task=[au]", "dataset.aus=[1,2,4]", "model=monet"],
            ConfigError,
            "3 tasks have only 6 orders; set model.orders=6",
        ),
        (["task=[au]", "dataset.aus=[1,2]", *_NEVER], DataError, "one value only in training .AU1=0, AU2=0"),
        (["task=[expression]", *_NEUTRAL], DataError, "all training labels are neutral; at least two classes"),
    ],
)
def test_bad_input_is_one_line_before_training(
    tiny_run: Callable[..., DictConfig], overrides: list[str], error: type[Exception], message: str
) -> None:
    config = tiny_run(*overrides)
    with pytest.raises(error, match=message) as caught:
        train.run(config)
    assert "\n" not in str(caught.value)
    assert not (Path(config.paths.output) / "last.ckpt").exists()


@pytest.mark.parametrize(
    ("overrides", "bars"),
    [((), 1), (("callbacks.progress=null",), 0), (("trainer.enable_progress_bar=false",), 0)],
)
def test_there_is_a_progress_bar_where_one_is_configured(
    overrides: tuple[str, ...], bars: int, tmp_path: Path, compose: Callable[..., DictConfig]
) -> None:
    from pytorch_lightning.callbacks import ProgressBar

    trainer = train.build_trainer(compose("train", *overrides, f"paths.output={tmp_path}"), [])
    assert sum(isinstance(callback, ProgressBar) for callback in trainer.callbacks) == bars


def test_a_dataset_without_action_units_is_one_line(tmp_path: Path, compose: Callable[..., DictConfig]) -> None:
    from tests.conftest import SMALL

    for name in "ab":
        cv2.imwrite(str(tmp_path / f"{name}.png"), np.zeros((32, 32, 3), np.uint8))
    (tmp_path / "labels.csv").write_text("image,subject,expression\na.png,a,happiness\nb.png,b,sadness\n")
    given = [setting for setting in SMALL if not setting.startswith("dataset.")]
    table = ("dataset=table", f"dataset.table={tmp_path / 'labels.csv'}", "prepare=none", "task=[au]", "model=monet")
    config = compose("train", *given, *table, f"paths.output={tmp_path / 'run'}", f"paths.cache={tmp_path / 'cache'}")
    with pytest.raises(DataError, match="no table has an action unit column") as caught:
        train.run(config)
    assert "\n" not in str(caught.value)


def test_a_release_says_what_its_initial_weights_ask_for(finished: Path) -> None:
    from types import SimpleNamespace

    from affect.models.vggface import LICENCE

    found = results(finished)
    assert found["encoder_notes"] == []
    assert "Initial weights" not in train.model_card(found)
    streams = [SimpleNamespace(notes=(LICENCE,)), SimpleNamespace(), SimpleNamespace(notes=(LICENCE,))]
    notes = train.encoder_notes(SimpleNamespace(encoder_modules=lambda: [("", one) for one in streams]))  # type: ignore[arg-type]
    assert notes == [LICENCE]
    card = train.model_card({**found, "encoder_notes": notes})
    assert f"## Initial weights\n\n- {LICENCE}\n" in card


def test_an_epoch_that_is_never_reached_is_noted(compose: Callable[..., DictConfig]) -> None:
    line = ("callbacks=[default,qat]", "callbacks.qat.freeze_norms=5")
    assert train.freeze_notes(compose("train", *line, "trainer.max_epochs=6")) == []
    (said,) = train.freeze_notes(compose("train", *line, "trainer.max_epochs=5"))
    assert said.startswith("callbacks.qat.freeze_norms=5 is never reached: the last epoch is 4 (trainer.max_epochs=5)")


def test_another_order_of_tasks_is_another_run(compose: Callable[..., DictConfig]) -> None:
    """Heads are drawn one after the other."""
    one, other = (compose("train", f"task=[{names}]") for names in ("au,expression", "expression,au"))
    assert list(one.task) != list(other.task)
    assert differing(one, other) == ["task (order)"]
    assert differing(one, one.copy()) == []
