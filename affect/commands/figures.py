# SPDX-License-Identifier: Apache-2.0
"""The figures of a run: chosen by its tasks, drawn by ``affect.report``."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch

from affect.commands.inference import SUBSET_PREFIX, encode_truth, measured
from affect.data.datamodule import FaceDataModule
from affect.data.table import FaceTable
from affect.files import replacing
from affect.metrics import AlignmentError, confusion_matrix
from affect.metrics.alignment import image_errors
from affect.models.base import AffectModule
from affect.models.decafa import Decafa
from affect.models.pal import PrivilegedAttribution
from affect.models.tokens import TokenModule, token_names
from affect.report import figures as draw
from affect.report import markdown, order_table
from affect.tasks import AUOccurrence, Coefficients, Task, ValenceArousal, to_pixels

SHEET = 24

SIGMA = "weighting/sigma/"
"""Start of the names of learned standard deviations in the history of a run."""


def write_run_figures(
    output: Path,
    results: Mapping[str, Any],
    history: Sequence[Mapping[str, float]],
    datamodule: FaceDataModule,
    module: AffectModule,
    loggers: Sequence[Any] = (),
) -> None:
    """Write the figures of a finished run to ``<output>/figures``; what the model found goes to the loggers too."""
    folder = output / "figures"
    curves: dict[str, list[tuple[float, float]]] = {}
    for epoch in history:
        for name, value in epoch.items():
            if name not in ("epoch", "step"):
                curves.setdefault(name, []).append((epoch["epoch"] + 1, value))
    selection = results["selection"]
    best = selection["epoch"] + 1 if selection["epoch"] is not None else None
    sigmas = {name.removeprefix(SIGMA): curves.pop(name) for name in list(curves) if name.startswith(SIGMA)}
    write_findings(folder, results["findings"], sigmas, best, loggers, len(history))
    monitor = selection["monitor"] if selection["monitor"] in curves else None
    draw.save(draw.training_curves(curves, best=best, monitor=monitor), folder / "training_curves.png")

    batch = first_batch(datamodule, "train")
    if batch is not None:
        captions = [caption(module.tasks, batch.targets, batch.masks, k) for k in range(len(batch))]
        points = next(iter(crop_points(module.tasks, batch.targets, batch).values()), None)
        sheet = draw.sample_sheet(images(batch), captions, points, "Training faces as the model sees them")
        draw.save(sheet, folder / "samples.png")

    part = "test" if "test" in results["metrics"] else "validation"
    if isinstance(module, TokenModule):
        batch = first_batch(datamodule, part if datamodule.rows(part) else "train")
        if batch is not None:
            write_attention(folder, batch, module, loggers, len(history))
    if isinstance(module, Decafa):
        batch = first_batch(datamodule, part if datamodule.rows(part) else "train")
        if batch is not None:
            write_stages(folder, batch, module, results["findings"].get("stages", {}), loggers, len(history))
    path = output / "predictions" / f"{part}.parquet"
    if path.is_file():
        write_prediction_figures(folder, FaceTable.read_parquet(path), results["metrics"][part], module.tasks)
        batch = first_batch(datamodule, part)
        if batch is not None:
            write_sheets(folder, batch, module)
            write_attribution(folder, batch, module)


def write_prediction_figures(
    folder: Path, table: FaceTable, records: Sequence[Mapping[str, Any]], tasks: Mapping[str, Task]
) -> None:
    """Write the figures that follow from a predictions table: bars, confusion matrix, circumplex, scatter."""
    truth = table.truth()
    records = [record for record in records if not record.get("subgroup")]
    for name, task in tasks.items():
        if not task.columns(truth.names):
            continue
        values, encoded = task.read_values(table), encode_truth(table, task)
        own = [record for record in records if record["task"] == name]
        if task.softmax:
            matrix = confusion_matrix(
                torch.from_numpy(values), torch.from_numpy(encoded.target), torch.from_numpy(encoded.mask)
            )
            draw.save(draw.confusion_matrix(matrix.numpy(), task.outputs), folder / f"{name}_confusion.png")
            # Of the class that is named, among those that the row's source can label.
            offered = np.where(encoded.mask, values, -np.inf)
            named, true = offered.argmax(1), np.where(encoded.mask, encoded.target, -np.inf).argmax(1)
            sure = values[np.arange(len(values)), named]
            figure = draw.reliability_diagram(sure, (named == true).astype(float), np.asarray(encoded.mask.any(1)))
            draw.save(figure, folder / f"{name}_reliability.png")
        elif isinstance(task, ValenceArousal):
            figure = draw.circumplex(values, encoded.target, np.asarray(encoded.mask.all(1)), records=own)
            draw.save(figure, folder / f"{name}_circumplex.png")
        elif task.landmark_scheme is not None:
            write_error_curve(folder / f"{name}_errors.png", table, task)
        elif isinstance(task, Coefficients):
            figure = draw.coefficient_scatter(values, encoded.target, task.outputs, encoded.mask, records=own)
            draw.save(figure, folder / f"{name}_scatter.png")
        if isinstance(task, AUOccurrence):
            figure = draw.reliability_diagram(values, encoded.target, encoded.mask)
            draw.save(figure, folder / f"{name}_reliability.png")
            draw.save(draw.au_bars(records, "f1", task=name), folder / f"{name}_f1.png")
        elif any(record["name"].startswith("ccc/") for record in own):
            draw.save(draw.au_bars(records, "ccc", task=name), folder / f"{name}_ccc.png")


def write_error_curve(path: Path, table: FaceTable, task: Task) -> None:
    """Write the share of images below each landmark error, of all rows and of the protocol's subsets.

    Args:
        path: The picture.
        table: Predictions with true labels.
        task: A landmark task with an alignment metric; without one, nothing is drawn.
    """
    metric = next((each for each in task.metrics if isinstance(each, AlignmentError)), None)
    if metric is None:
        return
    values, encoded = measured(table, task)
    labelled = encoded.mask.any(1)
    given, true, mask = (torch.from_numpy(array[labelled]) for array in (values, encoded.target, encoded.mask))
    errors = image_errors(given, true, mask, metric.scheme, metric.normaliser).numpy()
    curves = {"all": errors}
    for column in table.arrow.column_names:
        if column.startswith(SUBSET_PREFIX):
            chosen = errors[table.numbers(column)[0][labelled] > 0]
            curves |= {column.removeprefix(SUBSET_PREFIX): chosen} if len(chosen) else {}
    threshold = max(metric.thresholds)
    title = f"Cumulative landmark error, % of {metric.normaliser}, failure above {threshold:g} %"
    draw.save(draw.cumulative_error_curve(curves, threshold=threshold, title=title), path)


def write_attribution(folder: Path, batch: Any, module: AffectModule) -> None:  # noqa: ANN401
    """Write held-out faces with what a layer under privileged attribution contributes, e.g. ``pal_attribution.png``."""
    batch = batch.to(next(module.parameters()).device)
    for name, objective in module.objectives.items():
        if not isinstance(objective, PrivilegedAttribution):
            continue
        maps, found = objective.look(module, batch)
        known = batch.point_masks[objective.scheme].cpu().numpy()[..., None]
        points = np.where(known, batch.points[objective.scheme].cpu().numpy(), np.nan)
        scored = {objective.task: module.tasks[objective.task]}
        captions = [caption(scored, batch.targets, batch.masks, k) for k in range(len(batch))]
        captions = [
            text if np.isnan(r) else f"{text}, correlation {r:.2f}"
            for text, r in zip(captions, found.tolist(), strict=True)
        ]
        title = f"What {objective.layer} contributes to {objective.task}, and its correlation with the landmarks"
        figure = draw.attribution_sheet(images(batch), maps.cpu().numpy(), captions, points, title=title)
        draw.save(figure, folder / f"{name}_attribution.png")


def write_sheets(folder: Path, batch: Any, module: AffectModule) -> None:  # noqa: ANN401
    """Write held-out faces with predicted and true labels, and with predicted and true points."""
    device = next(module.parameters()).device
    with torch.inference_mode():
        values = {name: value.cpu() for name, value in module.eval().predict_step(batch.to(device)).items()}
    plain = {name: task for name, task in module.tasks.items() if task.landmark_scheme is None}
    if plain:
        predicted = [answers(plain, values, None, k) for k in range(len(batch))]
        target = [answers(plain, batch.targets, batch.masks, k) for k in range(len(batch))]
        draw.save(draw.prediction_sheet(images(batch), predicted, target, tolerance=0.25), folder / "predictions.png")
    for name, points in crop_points(module.tasks, values, batch).items():
        true = crop_points(module.tasks, batch.targets, batch)[name]
        figure = draw.landmark_sheet(images(batch), points, true, title=f"Landmarks ({name}): predicted and true")
        draw.save(figure, folder / f"{name}.png")


def write_findings(
    folder: Path,
    findings: Mapping[str, Any],
    sigmas: Mapping[str, Sequence[tuple[float, float]]],
    best: float | None,
    loggers: Sequence[Any] = (),
    step: int = 0,
) -> None:
    """Write what a model found: ``order.png`` with ``order.md``, ``gate_usage.png``, ``uncertainties.png``.

    Args:
        folder: Folder of the run's figures.
        findings: What the model tells of itself, by topic.
        sigmas: Pairs of epoch and learned standard deviation by ``<task>/<output>``; none draws nothing.
        best: Epoch whose weights were kept.
        loggers: Loggers of the run; those that take figures get them.
        step: Where figures stand on a logger's axis: the number of epochs.
    """
    if "order" in findings:
        found = findings["order"]
        figure = draw.soft_order_matrix(found["soft_order"], found["outputs"])
        draw.save(figure, folder / "order.png")
        text = markdown(order_table(found))
        with replacing(folder / "order.md") as part:
            part.write_text(text, encoding="utf-8")
        show(loggers, "order", figure, step, text)
    if "usage" in findings.get("gate", {}):
        found = findings["gate"]
        figure = draw.gate_usage(
            found["usage"], found["classes"], found["rows"], by=found["by"], information=found["information"]
        )
        draw.save(figure, folder / "gate_usage.png")
        show(loggers, "gate_usage", figure, step)
    if sigmas:
        figure = draw.weight_curves(sigmas, best=best)
        draw.save(figure, folder / "uncertainties.png")
        show(loggers, "uncertainties", figure, step)


def write_attention(
    folder: Path,
    batch: Any,  # noqa: ANN401
    module: TokenModule,
    loggers: Sequence[Any] = (),
    step: int = 0,
) -> None:
    """Write where each token of each task looks: ``<task>_attention.png``."""
    device = next(module.parameters()).device
    maps = module.eval().attention(batch.to(device))
    for name, names in token_names(module.tasks, module.transformer.spans).items():
        title = f"Where the tokens of {name} look"
        figure = draw.attention_sheet(images(batch), maps[name].float().cpu().numpy(), names, title=title)
        draw.save(figure, folder / f"{name}_attention.png")
        show(loggers, f"attention/{name}", figure, step)


def write_stages(
    folder: Path,
    batch: Any,  # noqa: ANN401
    module: Decafa,
    found: Mapping[str, Any],
    loggers: Sequence[Any] = (),
    step: int = 0,
) -> None:
    """Write where each stage looks for the points of each task, and how they move: ``<task>_stages.png``.

    Args:
        folder: Folder of the run's figures.
        batch: Faces; the first few are shown.
        module: The trained model.
        found: What it found of its stages, by task (``findings.stages``).
        loggers: Loggers of the run; those that take figures get them.
        step: Where figures stand on a logger's axis: the number of epochs.
    """
    with torch.inference_mode():
        outputs = list(module.eval().run(batch.to(next(module.parameters()).device)))
    true = crop_points(module.tasks, batch.targets, batch)
    for scheme, name in module.names.items():
        maps = torch.stack([output.maps[scheme].sum(1) for output in outputs]).float().cpu().numpy()
        first, last = (outputs[k].points[scheme].float().cpu().numpy() for k in (0, -1))
        errors = found.get(name, {}).get("nme")
        title = f"Where each stage looks for the points of {name}"
        figure = draw.stage_sheet(images(batch), maps, first, last, true[name], errors=errors, title=title)
        draw.save(figure, folder / f"{name}_stages.png")
        show(loggers, f"stages/{name}", figure, step)


def show(loggers: Sequence[Any], name: str, figure: Any, step: int, text: str | None = None) -> None:  # noqa: ANN401
    """Hand a figure, and a text in Markdown, to the loggers that take figures (TensorBoard)."""
    for logger in loggers:
        writer: Any = getattr(logger, "experiment", None)
        if hasattr(writer, "add_figure"):
            writer.add_figure(name, figure, step, close=False)
            if text is not None:
                writer.add_text(name, text, step)
            writer.flush()


def write_comparison_figure(output: Path, arms: Mapping[str, Sequence[Mapping[str, Any]]]) -> None:
    """Write the bars of the arms of ``compare``."""
    draw.save(draw.ladder_bars(arms, title="Arms on the test part"), output / "figures" / "compare.png")


# ------------------------------------------------------------------------------------------------- pieces


def first_batch(datamodule: FaceDataModule, part: str) -> Any:  # noqa: ANN401
    """Return the first faces of a part as the model sees them (training: augmented), or None if it has none."""
    rows = datamodule.rows(part)
    if not rows:
        return None
    return datamodule.sample(part, min(SHEET, rows))


def images(batch: Any) -> np.ndarray:  # noqa: ANN401
    """Return the crops of a batch as ``(B, H, W, 3)``."""
    return batch.image.permute(0, 2, 3, 1).cpu().numpy()


def crop_points(tasks: Mapping[str, Task], values: Mapping[str, Any], batch: Any) -> dict[str, np.ndarray]:  # noqa: ANN401
    """Return points in pixels of the crop by landmark task; NaN where the batch has no label."""
    height, width = batch.image.shape[-2:]
    points = {}
    for name, task in tasks.items():
        if task.landmark_scheme is not None:
            pixels = to_pixels(values[name].float(), height, width).cpu().numpy()
            points[name] = np.where(batch.masks[name].cpu().numpy()[..., None], pixels, np.nan)
    return points


def answers(tasks: Mapping[str, Task], values: Mapping[str, Any], masks: Mapping[str, Any] | None, k: int) -> dict:
    """Return what stands below face ``k``: class name, flags of action units, numbers; unlabelled ones are left out."""
    found: dict[str, Any] = {}
    for name, task in tasks.items():
        row = values[name][k]
        mask = masks[name][k] if masks is not None else torch.ones(len(task.outputs), dtype=torch.bool)
        if task.softmax:
            if mask.any():
                found[name] = task.outputs[int(row.argmax())]
            continue
        for output, value, known in zip(task.outputs, row.tolist(), mask.tolist(), strict=True):
            if known:
                found[output] = value >= 0.5 if task.flags else round(value, 2)
    return found


def caption(tasks: Mapping[str, Task], targets: Mapping[str, Any], masks: Mapping[str, Any], k: int) -> str:
    """Return the labels of face ``k`` as one text."""
    plain = {name: task for name, task in tasks.items() if task.landmark_scheme is None}
    known = answers(plain, targets, masks, k)
    parts = [str(value) for value in known.values() if isinstance(value, str)]
    parts += [name for name, value in known.items() if value is True]
    numbers = [(name, value) for name, value in known.items() if isinstance(value, float)]
    parts += [f"{name} {value:.2f}" for name, value in numbers[:4]]
    return ", ".join(parts) or "no label"
