# SPDX-License-Identifier: Apache-2.0
"""Measures of controlled experiments that read a run's predictions: functions of its results and its folder."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np
import torch
from omegaconf import OmegaConf
from safetensors.torch import load_file

from affect.callbacks import BEST
from affect.commands import assembly, inference
from affect.commands.assembly import read_table
from affect.commands.inference import encode_truth
from affect.data.controlled.noisy_labels import TRUE_PREFIX
from affect.data.protocol import TEST
from affect.data.table import FaceTable
from affect.errors import ConfigError, near
from affect.metrics import best_thresholds
from affect.metrics.counts import binary_counts
from affect.metrics.f1 import f1_scores
from affect.release import build_model, build_tasks, read_release


def _answers(results: Mapping[str, Any], task: str, part: str) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    folder = Path(results["folder"])
    table = FaceTable.read_parquet(folder / "predictions" / f"{part}.parquet")
    built = build_tasks(read_release(folder))[task]
    encoded = encode_truth(table, built)
    values = np.asarray(built.read_values(table))
    return torch.from_numpy(values), torch.from_numpy(encoded.target), torch.from_numpy(encoded.mask)


def f1_at_best_threshold(results: Mapping[str, Any], task: str, part: str = "test") -> float:
    """Return the mean F1 at the threshold of each output that is best on these very rows: what ranking alone allows."""
    values, target, mask = _answers(results, task, part)
    best = tuple(best_thresholds(values, target, mask).tolist())
    return float(f1_scores(binary_counts(values, target, mask, best).sum(0))["f1/mean"])


def mean_on_positives(results: Mapping[str, Any], task: str, part: str = "test") -> float:
    """Return the mean probability that true positives are given, over all labelled cells."""
    values, target, mask = _answers(results, task, part)
    chosen = mask & (target >= 0.5)
    return float(values[chosen].double().mean())


def memorised(results: Mapping[str, Any], task: str, answer: str = "recorded") -> float | None:
    """Return of the wrong labels of the training part the share that a model gives as recorded.

    The run needs ``predict_train=true``, and its dataset columns ``true_<label>`` with what should have been recorded.

    Args:
        results: Of the run.
        task: Task of yes-or-no outputs, or of classes.
        answer: ``recorded``, or ``true`` for the share of wrong labels for which the model gives the true one.

    Returns:
        The share; None where every label is right.

    Raises:
        ConfigError: If ``answer`` is neither, or the run has no predictions of its training part.
    """
    if answer not in ("recorded", "true"):
        raise ConfigError(f"controlled.measures: answer={answer}; {near(answer, ('recorded', 'true'))}")
    folder = Path(results["folder"])
    path = folder / "predictions" / "train.parquet"
    if not path.is_file():
        raise ConfigError(f"controlled.measures: {path} is missing; train with predict_train=true")
    predictions = FaceTable.read_parquet(path)
    built = build_tasks(read_release(folder))[task]
    values, recorded = np.asarray(built.read_values(predictions)), encode_truth(predictions, built)
    table = read_table(OmegaConf.create(results["config"]["dataset"]))
    names = {name: name.removeprefix(TRUE_PREFIX) for name in table.names if name.startswith(TRUE_PREFIX)}
    truth = table.take(predictions.numbers("row")[0].astype(np.int64))
    true = built.encode(truth.with_columns({label: truth.column(name) for name, label in names.items()}))
    known = recorded.mask & true.mask
    if built.softmax:
        known = known.all(1)
        given, right, found = (array.argmax(1) for array in (recorded.target, true.target, values))
    else:
        given, right, found = (array >= 0.5 for array in (recorded.target, true.target, values))
    wrong = known & (given != right)
    return float((found == (given if answer == "recorded" else right))[wrong].mean()) if wrong.any() else None


def at_best_epoch(results: Mapping[str, Any], task: str, name: str, part: str = TEST) -> float | None:
    """Return a metric by the weights of the run's best validation, whatever weights the run ended with.

    It tells what stopping there would have given; where validation labels are wrong, the best epoch is that by wrong
    labels. Predictions are kept in ``predictions/<part>_at_best_epoch.parquet`` of the run.

    Args:
        results: Of the run.
        task: Task of the metric.
        name: Name of the metric.
        part: Part that is predicted.

    Raises:
        ConfigError: If the run has kept no best weights, or there is no such metric.
    """
    folder = Path(results["folder"])
    release = read_release(folder)
    tasks = build_tasks(release)
    path = folder / "predictions" / f"{part}_at_best_epoch.parquet"
    if path.is_file():
        table = FaceTable.read_parquet(path)
    else:
        if not (folder / BEST).is_file():
            raise ConfigError(
                f"controlled.measures: {folder / BEST} is missing; train with callbacks.best and a validation part"
            )
        module = build_model(release, tasks)
        module.load_release_state(load_file(folder / BEST))
        config = OmegaConf.create(results["config"])
        recipe = assembly.make(config.get("prepare"), "prepare")
        sources = assembly.build_sources(config, recipe, hold_out=part != TEST)
        datamodule = assembly.build_datamodule(config, sources, tasks, int(release.preprocess["image_size"]))
        datamodule.setup("test")
        loader = datamodule.part_dataloader(part)
        device = torch.device("cpu")
        values, index, rows = inference.predict_values(module, loader, device, f"predicting {part}")
        table = inference.predictions_table(datamodule.sources, tasks, values, index, rows)
        table.to_parquet(path)
    for metric in tasks[task].metrics:
        metric.bind(tasks[task].outputs)
    records = inference.table_metrics(table, {task: tasks[task]}, resamples=0)
    found = {record["name"]: record["value"] for record in records}
    if name not in found:
        raise ConfigError(f"controlled.measures: no metric {task} {name}; {near(name, found)}")
    return None if found[name] is None else float(found[name])


def relative_error(results: Mapping[str, Any], task: str, output: str | None = None, part: str = "test") -> float:
    """Return the root mean squared error in units of the true labels' standard deviation.

    Args:
        results: Of the run.
        task: Task of numbers.
        output: Its output; None takes the mean over outputs, which scales of labels have no part in.
        part: Part whose predictions are read.

    Raises:
        ConfigError: If the task has no such output.
    """
    values, target, mask = _answers(results, task, part)
    names = list(results["labels"][task])
    if output is not None and output not in names:
        raise ConfigError(f"controlled.measures: task {task} has no output {output!r}; {near(output, names)}")
    errors = {}
    for k, name in enumerate(names):
        known = mask[:, k]
        wanted, found = target[known, k].double(), values[known, k].double()
        errors[name] = float((found - wanted).square().mean().sqrt() / wanted.std(correction=0))
    return errors[output] if output is not None else sum(errors.values()) / len(errors)


def learnt_sigma(results: Mapping[str, Any], task: str, output: str) -> float | None:
    """Return the standard deviation that uncertainty weighting learnt for an output; None of a run with other weights.

    Raises:
        ConfigError: If the run has learnt some, but not this one.
    """
    sigma = results.get("findings", {}).get("weighting", {}).get("sigma")
    if sigma is None:
        return None
    if task not in sigma or output not in sigma[task]:
        known = [f"{name} {key}" for name, outputs in sigma.items() for key in outputs]
        raise ConfigError(f"controlled.measures: no sigma of {task} {output}; {near(f'{task} {output}', known)}")
    return float(sigma[task][output])
