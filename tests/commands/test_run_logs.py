# SPDX-License-Identifier: Apache-2.0
"""Loggers: the same scalars under the same names everywhere, figures, settings, and nothing over a network."""

from __future__ import annotations

import importlib.util
import json
import re
import sys
from pathlib import Path

import numpy as np
import pytest
from omegaconf import OmegaConf
from PIL import Image

from affect.commands import assembly, configuration, run_logs, train
from tests.conftest import SMALL

QUICK = (*SMALL, "task=[au]", "data.limit=12", "bootstrap.resamples=0", "figures=false")
MLFLOW_NAMES = re.compile(r"[\w./ :-]+")
"""What MLflow takes as the name of a metric."""


QUANTITIES = ("accuracy", "auc", "balanced_accuracy", "f1", "precision", "recall")
NAMES = {
    *("epoch", "loss", "train/au/loss", "val/au/loss", "val/score"),
    *(f"{part}/au/{name}/{each}" for part in ("val", "test") for name in QUANTITIES for each in ("AU<n>", "mean")),
    *("val/au/f1/micro", "test/au/f1/micro"),
}
"""Names of all scalars of a run for action units, those of single units as one."""


class Recorder:
    """A logger that keeps what it is told."""

    def __init__(self):
        self.settings, self.scalars, self.steps, self.pictures = {}, {}, [], {}
        self.ended = None
        self.experiment = self
        self.run_id = self.id = "7"

    def log_hyperparams(self, settings):
        self.settings |= settings

    def log_metrics(self, scalars, step):
        self.scalars |= scalars
        self.steps.append(step)

    def save(self):
        pass

    def finalize(self, status):
        self.ended = status


class WandbLogger(Recorder):
    finished = False

    def log_image(self, key, images, step):
        self.pictures[key] = images

    def finish(self):
        self.finished = True


class MLFlowLogger(Recorder):
    def log_artifact(self, run_id, path, folder):
        self.pictures[f"{folder}/{Path(path).stem}"] = [path, run_id]


class TensorBoardLogger(Recorder):
    def add_image(self, key, pixels, step, dataformats):
        assert dataformats == "HWC"
        self.pictures[key] = pixels


class CSVLogger(Recorder):
    pass


RESULTS = {
    "metrics": {
        "validation": [{"task": "au", "name": "f1/mean", "value": 0.1}],
        "test": [
            {"task": "au", "name": "f1/mean", "value": 0.5},
            {"task": "au", "name": "f1/AU1", "value": None},
            {"task": "au", "name": "f1/mean", "value": 0.7, "subgroup": "sex=f"},
        ],
    },
    "headline": [{"name": "F1", "value": 0.5}],
}


def test_every_logger_gets_the_same_scalars_and_its_pictures(tmp_path):
    (tmp_path / "figures").mkdir()
    Image.fromarray(np.full((4, 6, 3), 7, np.uint8)).save(tmp_path / "figures" / "samples.png")
    loggers = [WandbLogger(), MLFlowLogger(), TensorBoardLogger(), CSVLogger()]
    run_logs.log_results(loggers, tmp_path, RESULTS, 40)
    assert [logger.scalars for logger in loggers] == [{"test/au/f1/mean": 0.5, "test/F1": 0.5}] * 4
    assert all(logger.steps == [40] and logger.ended == "success" for logger in loggers)
    path = str(tmp_path / "figures" / "samples.png")
    assert loggers[0].pictures == {"figures/samples": [path]}
    assert loggers[1].pictures == {"figures/samples": [path, "7"]}
    pixels = loggers[2].pictures["figures/samples"]
    assert tuple(pixels.shape) == (4, 6, 3)
    assert int(pixels.max()) == 7
    assert loggers[3].pictures == {}
    assert loggers[0].finished


def test_settings_are_flat_and_without_what_changes_nothing():
    config = configuration.compose("train", [*QUICK, "paths.output=/nowhere"])
    logger = Recorder()
    run_logs.log_settings([logger], config)
    assert logger.settings["optimizer.lr"] == config.optimizer.lr
    assert logger.settings["seed"] == 1
    assert not any(key.startswith(("paths.", "logger.")) for key in logger.settings)
    assert all(isinstance(value, str | int | float | bool | None) for value in logger.settings.values())
    json.dumps(logger.settings)


@pytest.mark.parametrize("name", ["csv", "mlflow", "tensorboard", "wandb"])
def test_logger_configs_stay_in_the_runs_folder(name, tmp_path):
    config = configuration.compose("train", [f"logger={name}", f"paths.output={tmp_path / 'a b'}"])
    node = OmegaConf.to_container(config.logger[name], resolve=True)
    places = [value for key, value in node.items() if key in ("save_dir", "tracking_uri", "artifact_location")]
    assert places
    assert all(str(tmp_path / "a b") in place for place in places)
    assert node.get("offline", True) is True


@pytest.mark.parametrize("name", ["mlflow", "wandb"])
def test_a_missing_package_is_named_with_its_extra(name, tmp_path, monkeypatch):
    if importlib.util.find_spec(name) is not None:
        pytest.skip(f"{name} is installed")
    monkeypatch.setitem(sys.modules, name, None)
    config = configuration.compose("train", [f"logger={name}", f"paths.output={tmp_path}"])
    with pytest.raises(Exception, match=name) as raised:
        assembly.make(config.logger[name], f"logger.{name}")
    assert "affect[loggers]" in str(configuration.explain_run(raised.value))


def test_scalars_of_a_run_are_the_same_for_every_logger_and_fit_mlflow(tmp_path):
    """CSV and TensorBoard are read back; names are such that MLflow changes none."""
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    config = configuration.compose(
        "train",
        [*QUICK, "logger=[csv,tensorboard]", f"paths.output={tmp_path / 'run'}", f"paths.cache={tmp_path / 'c'}"],
    )
    train.run(config)
    (path,) = (tmp_path / "run").rglob("metrics.csv")
    header = set(path.read_text().splitlines()[0].split(",")) - {"step"}
    events = EventAccumulator(str(tmp_path / "run" / "tensorboard"))
    events.Reload()
    assert set(events.Tags()["scalars"]) == header
    assert {re.sub(r"AU\d+", "AU<n>", name) for name in header} == NAMES
    assert all(MLFLOW_NAMES.fullmatch(name) for name in header)
    results = json.loads((tmp_path / "run" / "results.json").read_text())
    logged = events.Scalars("test/au/f1/mean")[-1].value
    (record,) = [r for r in results["metrics"]["test"] if r["name"] == "f1/mean"]
    assert logged == pytest.approx(record["value"])
    assert results["starts"] == 1
    assert results["made_of"]["table"]


def test_a_run_that_goes_on_is_one_run_for_its_loggers(tmp_path):
    """An interrupted run has noted under which name MLflow and W&B keep it."""
    nodes = configuration.compose("train", ["logger=[csv,mlflow,wandb]", f"paths.output={tmp_path}"]).logger
    assert run_logs.continued(nodes, tmp_path) == dict(nodes)
    run_logs.note_logged(list(nodes), [CSVLogger(), MLFlowLogger(), WandbLogger()], tmp_path)
    found = run_logs.continued(nodes, tmp_path)
    assert list(found) == list(nodes)
    assert found["csv"] == nodes.csv
    assert (found["mlflow"].run_id, found["wandb"].id) == ("7", "7")
    assert found["mlflow"].tracking_uri == nodes.mlflow.tracking_uri
    nodes.wandb.id = "mine"
    assert run_logs.continued(nodes, tmp_path)["wandb"].id == "mine"
    assert "mlflow" not in run_logs.continued({"csv": nodes.csv}, tmp_path)


@pytest.mark.parametrize("name", ["mlflow", "wandb"])
def test_the_package_keeps_one_run_of_two_starts(name, tmp_path, monkeypatch):
    pytest.importorskip(name)
    monkeypatch.setenv("WANDB_SILENT", "true")
    logged = set()
    if name == "wandb":  # whose files without a network only its own programs read
        from wandb.sdk.wandb_run import Run

        log = Run.log
        monkeypatch.setattr(
            Run, "log", lambda run, data, *rest, **named: logged.update(data) or log(run, data, *rest, **named)
        )
    places = [f"paths.output={tmp_path / 'run'}", f"paths.cache={tmp_path / 'c'}"]
    arguments = [*QUICK, f"logger=[csv,{name}]", *places, "figures=true"]
    config = configuration.compose("train", [*arguments, "trainer.max_epochs=2"])
    with monkeypatch.context() as patched:
        patched.setattr(train, "select_weights", lambda *arguments: 1 / 0)  # behind the last epoch
        with pytest.raises(ZeroDivisionError):
            train.run(config)
    (first,) = json.loads((tmp_path / "run" / "loggers.json").read_text()).values()
    if name == "wandb":
        import wandb

        wandb.finish()
    train.run(configuration.compose("train", [*arguments, "trainer.max_epochs=2"]))
    (second,) = json.loads((tmp_path / "run" / "loggers.json").read_text()).values()
    assert first == second
    assert json.loads((tmp_path / "run" / "results.json").read_text())["starts"] == 2
    if name == "mlflow":
        from mlflow.tracking import MlflowClient

        client = MlflowClient(config.logger.mlflow.tracking_uri)
        (experiment,) = client.search_experiments(filter_string=f"name = '{config.name}'")
        (run,) = client.search_runs([experiment.experiment_id])
        logged = set(run.data.metrics)
        pictures = {Path(file.path).stem for file in client.list_artifacts(run.info.run_id, "figures")}
    else:
        folders = {path.name.rpartition("-")[2] for path in (tmp_path / "run" / "wandb").glob("offline-run-*")}
        assert folders == {second["value"]}
        pictures = {key.partition("/")[2] for key in logged if key.startswith("figures/")}
        stored = (tmp_path / "run" / "wandb").glob("offline-run-*/files/media/images/figures/*")
        assert len(list(stored)) == len(pictures)
        logged = {key for key in logged if not key.startswith(("_", "figures/"))} - {"trainer/global_step"}
    assert pictures == {path.stem for path in (tmp_path / "run" / "figures").glob("*.png")} != set()
    # CSV keeps what one start logged; the second one had nothing to train.
    versions = [path.read_text().partition("\n")[0] for path in (tmp_path / "run" / "csv").glob("*/metrics.csv")]
    assert logged == {column for header in versions for column in header.split(",")} - {"step"}
