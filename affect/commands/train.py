# SPDX-License-Identifier: Apache-2.0
"""``affect train``: one run from its config to ``results.json``, continued where it stopped."""

from __future__ import annotations

import copy
import logging
import time
import warnings
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pytorch_lightning as pl
import torch
from omegaconf import DictConfig, OmegaConf
from pytorch_lightning.utilities.exceptions import MisconfigurationException
from rich.console import Console
from rich.table import Table
from safetensors.torch import load_file

from affect import labels
from affect.callbacks import (
    BEST,
    EMA,
    LAST,
    AtomicCheckpointIO,
    BestWeights,
    History,
    QuantizationAwareTraining,
    SeedEachStep,
    preemptible,
)
from affect.commands import assembly, decisions, figures, inference
from affect.commands.acceleration import (
    check_precision,
    check_sharing,
    compile_encoders,
    resolve_batching,
    scale_learning_rate,
)
from affect.commands.check import verified
from affect.commands.configuration import leaves
from affect.commands.distributed import (
    check_tasks,
    cluster_environment,
    join_tasks,
    processes_of_a_run,
    use_own_launcher,
    wait_for_all,
)
from affect.commands.landmarks import TYPICAL_FACES, typical_points
from affect.commands.run_folder import (
    RESULTS,
    SELECTION,
    clear,
    contents,
    is_first_process,
    locked,
    note_start,
    resolve_output,
    result_hash,
    same_run,
    store,
)
from affect.commands.run_logs import continued, log_results, log_settings, note_logged
from affect.commands.starting_point import apply_starting_point, people_before
from affect.data.datamodule import FaceDataModule
from affect.data.dataset import read_points
from affect.data.images import Source
from affect.data.protocol import SELECTIONS, TEST, TRAIN, VALIDATION, known_people
from affect.data.table import FaceTable
from affect.errors import ConfigError, DataError, near
from affect.models.base import AffectModule, Batch
from affect.release import POINTS, build_tasks, read_release, with_statistics, write_release
from affect.report import (
    comparison_table,
    environment,
    order_table,
    provenance,
    read_json,
    reference_table,
    results_table,
    subgroup_table,
    write_json,
)
from affect.report.provenance import ON_TEST, selection_text
from affect.tasks import Expression

EXAMINED = 10_000
"""Most rows of a part that a trained model is examined with."""


def run(config: DictConfig) -> float | None:
    """Train (or continue, or skip) the run of ``config`` and return the validation score of the selected weights.

    Arms of ``compare`` are runs of their own below the run's folder; their table stands beside the run's.
    """
    join_tasks()
    with preemptible(), processes_of_a_run():
        output = resolve_output(config)
        score = train(config, output)
        if config.get("compare"):
            compare(config, output)
    return score


def train(config: DictConfig, output: Path) -> float | None:
    """Train one run in ``output``; a finished one is skipped, an unfinished one continues, a running one is refused."""
    torch.set_float32_matmul_precision("high")
    console = Console(quiet=not is_first_process())
    check_keys(config)
    with locked(output):
        sources = assembly.build_sources(config, assembly.make(config.prepare, "prepare"))
        sources = verified(config, sources, console)
        made_of = contents(sources, config)
        if not config.force:
            same_run(output, config, made_of)
        if (output / RESULTS).is_file() and not config.force:
            results = evaluate_as_asked(config, output, read_json(output / RESULTS))
            console.print(f"finished before: {output} (force=true trains again)")
            print_results(console, results)
            return results["selection"]["score"]
        return _train(config, output, sources, made_of, console)


def evaluate_as_asked(config: DictConfig, output: Path, results: dict[str, Any]) -> dict[str, Any]:
    """Return the results of a finished run with the ``group_by`` and ``bootstrap`` asked for now.

    If they differ from the stored ones, the numbers are computed again from the predictions and stored.
    """
    bootstrap, group_by = OmegaConf.to_container(config.bootstrap, resolve=True), group_columns(config)
    stored = OmegaConf.create(results["config"])
    if stored.bootstrap == config.bootstrap and group_columns(stored) == group_by:
        return results
    tasks = build_tasks(read_release(output, list(config.trust)))
    for task in tasks.values():
        for metric in task.metrics:
            metric.bind(task.outputs)
    decisions.apply(tasks, (results.get("thresholds") or {}).get("values") or {})
    headline = inference.resolve_headline(results["protocol"].get("headline"), tasks)[0]
    for part in results["metrics"]:
        table = FaceTable.read_parquet(output / "predictions" / f"{part}.parquet")
        kept = {inference.BY_PREFIX + c: table.column(c) for c in inference.CARRIED if c in table.names}
        table = table.with_columns({name: column for name, column in kept.items() if name not in table.names})
        missing = [column for column in group_by if inference.BY_PREFIX + column not in table.names]
        if missing:
            raise ConfigError(
                f"group_by: the run's predictions were made without the column {missing[0]!r}; "
                f"affect evaluate checkpoint={output} group_by=[{','.join(group_by)}] makes them with it"
            )
        results["metrics"][part] = inference.table_metrics(
            table, tasks, config.bootstrap.resamples, config.bootstrap.level, 0, group_by
        )
        if part == TEST:
            results["headline"] = inference.headline_records(
                table, tasks, headline, config.bootstrap.resamples, config.bootstrap.level
            )
    results["config"] |= {"bootstrap": bootstrap, "group_by": group_by}
    if is_first_process():
        write_json(output / RESULTS, results)
    return results


def check_keys(config: DictConfig) -> None:
    """Refuse values that would only fail after the training."""
    if config.selection not in SELECTIONS:
        raise ConfigError(f"selection={config.selection}: write one of {', '.join(SELECTIONS)}")
    require_integer("seed", config.seed, 0)
    require_integer("trainer.max_epochs", config.trainer.max_epochs, -1)
    require_integer("bootstrap.resamples", config.bootstrap.resamples, 0)
    decisions.check_rule(config.thresholds, config.selection)
    decisions.check_window(config.smoothing)
    check_precision(config)
    level = config.bootstrap.level
    if not isinstance(level, int | float) or not 0 < level < 1:
        raise ConfigError(f"bootstrap.level={level} must lie between 0 and 1, e.g. 0.95")


def require_integer(key: str, value: Any, low: int) -> None:  # noqa: ANN401
    """Refuse a value that is no integer from ``low`` on."""
    if not isinstance(value, int) or isinstance(value, bool) or value < low:
        raise ConfigError(f"{key}={value}: an integer of at least {low} is needed")


def group_columns(config: DictConfig) -> list[str]:
    """Return the columns of ``group_by``, which may be one name or a list."""
    given = config.group_by
    return [given] if isinstance(given, str) else [str(column) for column in given or ()]


def check_columns(config: DictConfig, sources: list[Source]) -> None:
    """Refuse columns of ``group_by`` that a table lacks."""
    for column in group_columns(config):
        for source in sources:
            if column not in source.table.names:
                raise ConfigError(f"group_by: no column {column!r} in the table; {near(column, source.table.names)}")


def check_coded(datamodule: FaceDataModule) -> None:
    """Refuse yes-or-no outputs that no table codes: an action unit by number, an attribute by name.

    Raises:
        ConfigError: With the first of them and what there is.
    """
    names = frozenset().union(*(source.table.names for source in datamodule.sources))
    for name, task in datamodule.tasks.items():
        wanted = task.wanted()
        if not task.flags or len(wanted) != task.num_outputs:  # a column may stand for several outputs
            continue
        there = task.columns(names)
        pairs = list(zip(task.outputs, wanted, strict=True))
        missing = [output for output, column in pairs if column not in there]
        if missing:
            known = ", ".join(output for output, column in pairs if column in there)
            sets = " and ".join(source.name for source in datamodule.sources)
            raise ConfigError(
                f"task {name}: {sets} has no label of {', '.join(missing)}; of those asked for it has {known}"
            )


def weight_leaks(
    config: DictConfig, datamodule: FaceDataModule, before: Mapping[str, Mapping[str, Sequence[str]]]
) -> list[str]:
    """Return sentences on people of the test part whom earlier weights have seen, if ``protocol.allow_leak`` lets them.

    Args:
        config: Config of the run.
        datamodule: Its data.
        before: What ``people_before`` returned.

    Raises:
        DataError: If there are some and it does not.
    """
    # All rows, also of a smoke run on a few of them: it is there to tell whether the whole run would do.
    rows = [division.rows[TEST] for division in datamodule.divisions]
    leaks = [
        f"{key}={OmegaConf.select(config, key)}: {leak}"
        for key, people in before.items()
        for leak in known_people(datamodule.sources, rows, people)
    ]
    if leaks and not datamodule.protocol.allow_leak:
        raise DataError(
            f"{'; '.join(leaks)}; start from other weights, test on other people, leave these out (protocol.keep), or "
            "let protocol.allow_leak=true mark every number"
        )
    return leaks


def join_people(*known: Mapping[str, Sequence[str]]) -> dict[str, list[str]]:
    """Return the names of several lists of people, sorted, by name space of identities."""
    spaces = sorted({space for people in known for space in people})
    return {space: sorted({name for people in known for name in people.get(space, ())}) for space in spaces}


def check_tuning(config: DictConfig, datamodule: FaceDataModule) -> None:
    """Refuse ``thresholds=tuned`` where nothing could be tuned, or no row is there to tune on."""
    if config.thresholds != decisions.TUNED:
        return
    if not any(True for _ in decisions.decided(datamodule.tasks)):
        raise ConfigError("thresholds=tuned: no task has a metric with a threshold (f1, rates)")
    if config.selection != "refit" and not datamodule.rows(VALIDATION):
        raise ConfigError(
            "thresholds=tuned needs a validation part: set protocol.validation_fraction or protocol.validation"
        )


def check_objectives(module: AffectModule, datamodule: FaceDataModule) -> list[str]:
    """Refuse objectives on layers or tasks that do not exist or cannot serve, or on landmarks that no training row has.

    Returns:
        A sentence for each objective that does not act on all training rows.

    Raises:
        ConfigError: With the first of them and what to do.
    """
    rows, notes = datamodule.part_rows(TRAIN), []
    total = sum(map(len, rows))
    for name, objective in module.objectives.items():
        objective.check(name, module)  # type: ignore[operator]
        for scheme in getattr(objective, "schemes", ()):
            found = landmark_rows(datamodule.sources, rows, scheme)
            if not found:
                others = [key for key in labels.SCHEMES if landmark_rows(datamodule.sources, rows, key)]
                other = f", or set objectives.{name}.scheme={others[0]}, which the rows have" if others else ""
                raise ConfigError(
                    f"objective {name}: none of {total} training rows has landmarks of scheme {scheme} (column "
                    f"{labels.SCHEMES[scheme].column}); find them by affect prepare with a recipe that stores them "
                    f"(prepare=landmarks_only for images that are crops already) and train with that{other}"
                )
            if found < total:
                notes.append(f"objective {name} acts on {found} of {total} training rows: the others have no landmarks")
    if module.objectives:
        module.attempt_objectives(datamodule.sample(TRAIN, 2, augment=False))
    return notes


def landmark_rows(sources: Sequence[Source], rows: Sequence[np.ndarray], scheme: str, block: int = 1 << 14) -> int:
    """Return in how many ``rows`` of the sources a point of a scheme is known."""
    found = 0
    for source, chosen in zip(sources, rows, strict=True):
        if labels.SCHEMES[scheme].column in source.table.names:
            for start in range(0, len(chosen), block):
                found += int(read_points(source.table, scheme, chosen[start : start + block])[1].any(1).sum())
    return found


def encoder_notes(module: AffectModule) -> list[str]:
    """Return what readers of results have to know of the initial weights of encoders."""
    notes = (note for _, encoder in module.encoder_modules() for note in getattr(encoder, "notes", ()))
    return list(dict.fromkeys(notes))  # two streams may start from one file


def check_monitor(config: DictConfig, module: AffectModule) -> None:
    """Refuse scores that no metric gives, and a monitored value that validation will not log."""
    offered = {"val/score"} if any(t.score or t.loss for t in module.tasks.values()) else set()
    for name, task in module.tasks.items():
        known = {number for metric in task.metrics for number in metric.names}
        if task.score is not None and task.score not in known:
            raise ConfigError(f"task.{name}.score={task.score}: no such metric; {near(task.score, known)}")
        offered |= {f"val/{name}/{number}" for number in known}
        offered |= {f"val/{name}/loss"} if task.loss is not None else set()
    own = type(module).on_validation_epoch_end is not AffectModule.on_validation_epoch_end  # may log more
    if config.monitor not in offered and not own:
        raise ConfigError(f"monitor={config.monitor}: not among the logged values; {near(config.monitor, offered)}")


def _train(
    config: DictConfig, output: Path, sources: list[Source], made_of: dict[str, dict[str, str]], console: Console
) -> float | None:
    quiet()
    started = time.time()
    # Before anything of this run is built: its own draws start behind it, whether it ran just now or earlier.
    chosen = choose_epochs(config, output, console) if config.selection == "refit" else None
    pl.seed_everything(int(config.seed), verbose=False)
    tasks = assembly.build_tasks(config)
    objectives = assembly.make(config.objectives, "objectives") or {}
    schemes = tuple(sorted({s for o in objectives.values() for s in getattr(o, "schemes", ())}))
    datamodule = assembly.build_datamodule(config, sources, tasks, int(config.encoder.image_size), schemes)
    leave_out_classes(datamodule)
    datamodule.setup("fit")
    check_columns(config, sources)
    check_coded(datamodule)
    check_tuning(config, datamodule)
    headline, left_out = inference.resolve_headline(datamodule.protocol.headline, tasks)
    inference.require_subset_columns(sources, datamodule.protocol.subsets or {})
    inference.require_absent_values(datamodule.sources, tasks, datamodule.protocols, datamodule.part_rows(TEST))
    summary = datamodule.summary()
    summary["notes"] += [*left_out, *protocol_notes(config, summary), *freeze_notes(config)]
    before = people_before(config)
    summary["leaks"] = [*summary["leaks"], *weight_leaks(config, datamodule, before)]
    bound = assembly.bound_config(config, tasks)
    module = assembly.build_model(bound, tasks)
    check_monitor(config, module)
    summary["notes"] += [*check_objectives(module, datamodule), *encoder_notes(module)]
    taken = None
    if config.init:
        taken = apply_starting_point(module, config.init, list(config.trust), console, sources[0].described)
    history, seeding = History(), SeedEachStep(int(config.seed))
    trainer = build_trainer(config, [seeding, history], None if chosen is None else chosen["epochs"])
    quantize(config, module, trainer)
    batching = resolve_batching(config, trainer)
    datamodule.batch_size = batching.per_process
    scale_learning_rate(module, batching.learning_rate_factor)
    compile_encoders(config, module)
    check_sharing(config, module, trainer)
    by_score = config.selection in ("best_val", "best_on_test")
    if by_score and not any(isinstance(c, BestWeights) for c in trainer.callbacks):  # type: ignore[attr-defined]
        raise ConfigError(f"selection={config.selection} needs callbacks.best; or selection=last")
    if is_first_process():
        if config.force:
            clear(output, keep=(SELECTION,) if chosen else ())
        store(output, config, made_of)
        starts = note_start(output)
    print_summary(console, summary, output)
    last = output / LAST
    resumed = str(last) if last.is_file() and not config.force else None
    if resumed:
        console.print(f"continuing from {last}")
    else:
        log_settings(trainer.loggers, config)
    note_logged([name for name, node in (config.get("logger") or {}).items() if node], trainer.loggers, output)
    trainer.fit(module, datamodule=datamodule, ckpt_path=resumed)
    if module.shards is not None:
        module.shards.gather(module)
    if not trainer.is_global_zero:
        return None

    selection = select_weights(config, trainer, module, history, output)
    if chosen is not None:
        selection |= chosen
    people = join_people(*before.values(), datamodule.people())
    results = finish(config, bound, datamodule, module, history, selection, summary, output, headline, people)
    results["environment"] = starts[-1]["environment"]  # of the code that ran, not of what lies there by now
    results["starts"] = len(starts)
    results["made_of"] = made_of
    # JSON is written with sorted keys, but weights are drawn in the order of tasks and objectives.
    results["config_keys"] = [key for key, _ in leaves(results["config"])]
    results["initial_weights"] = {"encoder": encoder_origins(module), "init": taken}
    results["quantization"] = None if module.quantization is None else module.quantization.report(module)
    results["batch"] = batching.describe()
    results["timing"] = {"training_seconds": history.seconds, "started": started, "finished": time.time()}
    if config.get("figures", True):
        figures.write_run_figures(output, results, history.epochs, datamodule, module, trainer.loggers)
    log_results(trainer.loggers, output, results, trainer.global_step)
    write_json(output / RESULTS, results)
    print_results(console, results)
    drawn = ", figures/" if config.get("figures", True) else ""
    console.print(f"[bold]{output}[/bold]: results.json, predictions/{drawn}, release/")
    console.print(f"next: affect predict checkpoint={output} input=photo.jpg", soft_wrap=True)
    return selection["score"]


# ------------------------------------------------------------------------------------------------- training


def choose_epochs(config: DictConfig, output: Path, console: Console) -> dict[str, Any]:
    """Train the run of ``selection=best_val`` in ``<output>/selection`` and return what it chose for a refit.

    Like every run it is continued where it stopped, and skipped when it is finished.
    """
    inner = copy.deepcopy(config)
    inner.selection, inner.compare, inner.paths.output = "best_val", {}, str(output / SELECTION)
    console.rule("selection=refit: how many epochs")
    train(inner, output / SELECTION)
    wait_for_all()
    found = read_json(output / SELECTION / RESULTS)
    epochs = int(found["selection"]["epoch"]) + 1
    console.rule(f"selection=refit: {epochs} epochs on all training groups")
    kept = {part: numbers["rows"] for part, numbers in found["data"]["parts"].items()}
    chosen = {"epochs": epochs, "score": found["selection"]["score"]}
    return chosen | {"chosen_by": found["selection"] | {"rows": kept, "thresholds": found.get("thresholds")}}


def leave_out_classes(datamodule: FaceDataModule) -> None:
    """Take classes out of tasks whose rows ``protocol.keep`` leaves out of every source, so that no output is idle."""
    delivered = {name for source in datamodule.delivered for name in source.table.expressions}
    gone = delivered - {name for source in datamodule.sources for name in source.table.expressions}
    for task in datamodule.tasks.values():
        if isinstance(task, Expression) and task.classes is not None and gone:
            task.classes = tuple(name for name in task.classes if name not in gone)


def freeze_notes(config: DictConfig) -> list[str]:
    """Return which epochs of callbacks a training never reaches: what they freeze then trains to the end."""
    epochs, notes = config.trainer.max_epochs, []
    for name, node in (config.get("callbacks") or {}).items():
        for key in ("freeze_norms", "freeze_observers"):
            epoch = node.get(key) if isinstance(node, DictConfig) else None
            if isinstance(epoch, int) and 0 <= epochs <= epoch:
                notes.append(
                    f"callbacks.{name}.{key}={epoch} is never reached: the last epoch is {epochs - 1} "
                    f"(trainer.max_epochs={epochs})"
                )
    return notes


def protocol_notes(config: DictConfig, summary: dict[str, Any]) -> list[str]:
    """Return what readers of results have to know of the protocol: who selected, and where no face was found."""
    notes = []
    if config.selection == "best_on_test":
        notes.append("selection=best_on_test: the test part selected the weights, so its numbers are optimistic")
    rule = config.protocol.get("missing_faces", "fallback")
    notes += [
        f"no face found in {numbers['without_face']} rows of the {part} part (protocol.missing_faces={rule})"
        for part, numbers in summary["parts"].items()
        if numbers["without_face"]
    ]
    return notes


def build_trainer(config: DictConfig, first: list[pl.Callback], epochs: int | None = None) -> pl.Trainer:
    """Return the trainer with callbacks in the order they need: seeds, history, best weights, others, last.ckpt.

    Args:
        config: Config of the run.
        first: Callbacks that come before those of the config.
        epochs: Stops after so many epochs, of a schedule that spans those of the config as it did in the run that chose
            them, and without callbacks that need a validation part; None trains as the config says.
    """
    every = config.trainer.get("val_check_interval")
    if every is not None and (isinstance(every, int) or every != 1):  # a whole 1 is each batch, 1.0 each epoch
        raise ConfigError(
            f"trainer.val_check_interval={config.trainer.val_check_interval}: weights are validated and stored at the "
            "end of epochs, and a continued run would miss validations within one; use trainer.check_val_every_n_epoch "
            "or shorter epochs (trainer.limit_train_batches)"
        )
    nodes = config.get("callbacks") or {}
    for name, node in nodes.items():
        if node and "_target_" not in node:
            raise ConfigError(
                f"callbacks.{name}: {', '.join(map(str, node))} of a callback that is not chosen; choose it "
                f"(callbacks=[default,…]) or leave its settings out with '~callbacks.{name}'"
            )
    callbacks = [assembly.make(node, f"callbacks.{name}") for name, node in nodes.items() if node]
    bars = [callback for callback in callbacks if isinstance(callback, pl.callbacks.ProgressBar)]
    if not config.trainer.get("enable_progress_bar", True):
        callbacks, bars = [callback for callback in callbacks if callback not in bars], []
    if epochs is not None:
        callbacks = [c for c in callbacks if not isinstance(c, BestWeights | pl.callbacks.EarlyStopping)]
        first = [*first, _Cut(epochs)]
    best = [callback for callback in callbacks if isinstance(callback, BestWeights)]
    others = [callback for callback in callbacks if not isinstance(callback, BestWeights)]
    # Averages copy the model when training starts: by then it has to be the quantized one.
    others.sort(key=lambda callback: not isinstance(callback, QuantizationAwareTraining))
    nodes = config.get("logger") or {}
    output = Path(config.paths.output)
    if (output / LAST).is_file() and not config.force:
        nodes = continued(nodes, output)
    loggers = [assembly.make(node, f"logger.{name}") for name, node in nodes.items() if node]
    partial = assembly.make(config.trainer, "trainer", _partial_=True)
    environment = cluster_environment()
    try:
        trainer: pl.Trainer = partial(
            callbacks=[*first, *best, *others],
            logger=loggers or False,
            plugins=[AtomicCheckpointIO(), *([environment] if environment is not None else [])],
            default_root_dir=config.paths.output,
            enable_progress_bar=bool(bars),  # without callbacks.progress Lightning would show one of its own
        )
    except (MisconfigurationException, RuntimeError, TypeError, ValueError) as error:
        raise assembly.translated(error, "trainer") from error
    check_tasks(trainer)
    use_own_launcher(trainer)
    return trainer


def quantize(config: DictConfig, module: AffectModule, trainer: pl.Trainer) -> None:
    """Quantize the model if a callback says so: behind ``init``, and before an optimiser or a state is there.

    Raises:
        ConfigError: If the model cannot be quantized so.
    """
    for callback in trainer.callbacks:  # type: ignore[attr-defined]
        if isinstance(callback, QuantizationAwareTraining):
            if callback.quantization.activations is not None and (config.get("compile") or {}).get("encoder"):
                raise ConfigError(
                    "compile.encoder=true: an encoder with quantized activations is a captured graph already; set "
                    "compile.encoder=false, or callbacks.qat.activations=null"
                )
            callback.wrap(module, trainer)


class _Cut(pl.Callback):
    """Shortens a run once its schedule is built, so that each epoch has the rates that it has in the whole run."""

    def __init__(self, epochs: int) -> None:
        self.epochs = epochs

    def on_train_start(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        """Set the number of epochs."""
        trainer.fit_loop.max_epochs = self.epochs


def select_weights(
    config: DictConfig, trainer: pl.Trainer, module: AffectModule, history: History, output: Path
) -> dict[str, Any]:
    """Load the selected weights into ``module`` and return what selected them."""
    best = next((c for c in trainer.callbacks if isinstance(c, BestWeights)), None)  # type: ignore[attr-defined]
    if config.selection in ("best_val", "best_on_test"):
        if best is None or not (output / BEST).is_file():
            raise ConfigError(
                f"selection={config.selection} needs callbacks.best and a part that selects; or selection=last"
            )
        module.load_release_state(load_file(output / BEST))
        if best.weighting:  # results tell what belongs to these weights, not to those of the last epoch
            module.weighting.load_state_dict(best.weighting)
        return {"rule": config.selection, "monitor": config.monitor, "score": best.score, "epoch": best.epoch}
    for callback in trainer.callbacks:  # type: ignore[attr-defined]
        if isinstance(callback, EMA):
            callback.load_averaged(module)
    score = module.last_validation.get(config.monitor)
    epoch = history.epochs[-1]["epoch"] if history.epochs else None
    return {"rule": config.selection, "monitor": config.monitor, "score": score, "epoch": epoch}


def encoder_origins(module: AffectModule) -> dict[str, str]:
    """Return where the initial weights of each encoder came from."""
    return {name: getattr(encoder, "origin", "unknown") for name, encoder in module.encoder_modules()}


# -------------------------------------------------------------------------------------------------- results


def finish(
    config: DictConfig,
    bound: DictConfig,
    datamodule: FaceDataModule,
    module: AffectModule,
    history: History,
    selection: dict[str, Any],
    summary: dict[str, Any],
    output: Path,
    headline: Mapping[str, Sequence[tuple[str, str]]],
    people: Mapping[str, Sequence[str]],
) -> dict[str, Any]:
    """Predict validation and test part, evaluate the tables, write predictions and the release, return results.

    The training part is predicted too where ``predict_train`` asks for it.
    """
    device = torch.device("cuda" if torch.cuda.is_available() and config.trainer.accelerator != "cpu" else "cpu")
    metrics: dict[str, list[dict[str, Any]]] = {}
    sums: list[dict[str, Any]] = []
    protocols = datamodule.protocols
    window = decisions.check_window(config.smoothing)
    thresholds = decisions.describe(module.tasks, decisions.FIXED)
    if config.thresholds == decisions.TUNED and config.selection == "refit":
        # All training groups train the refit, so the run that chose the epochs tuned them.
        thresholds = {**selection["chosen_by"]["thresholds"], "note": "by the run that chose the epochs"}
        decisions.apply(module.tasks, thresholds["values"])
    for part in (VALIDATION, TEST, *([TRAIN] if config.get("predict_train") else [])):
        if not datamodule.rows(part) or (part == VALIDATION and config.selection == "best_on_test"):
            continue
        loader = datamodule.part_dataloader(part)
        values, source_index, rows = inference.predict_values(module, loader, device, f"predicting {part}")
        group_by = group_columns(config)
        notes = decisions.smooth_values(values, datamodule.sources, module.tasks, source_index, rows, window)
        summary["notes"] += [note for note in notes if note not in summary["notes"]]
        inference.count_as_absent(values, datamodule.sources, module.tasks, protocols, source_index, rows)
        table = inference.predictions_table(
            datamodule.sources,
            module.tasks,
            values,
            source_index,
            rows,
            [protocol.group for protocol in protocols],
            group_by,
            datamodule.protocol.subsets if part == TEST else None,
        )
        table.to_parquet(output / "predictions" / f"{part}.parquet")
        if part == VALIDATION and config.thresholds == decisions.TUNED:
            decisions.apply(module.tasks, decisions.tune(table, module.tasks))
            thresholds = decisions.describe(module.tasks, decisions.TUNED, len(table))
        metrics[part] = inference.table_metrics(
            table, module.tasks, config.bootstrap.resamples, config.bootstrap.level, 0, group_by
        )
        if part == TEST:
            bootstrap = config.bootstrap
            sums = inference.headline_records(table, module.tasks, headline, bootstrap.resamples, bootstrap.level)
    recipe = datamodule.sources[0].described
    encoder = next((encoder for _, encoder in module.encoder_modules()), None)
    preprocess = {
        "recipe": recipe.describe() if recipe is not None else None,
        "image_size": int(config.encoder.image_size),
        "channel_order": "RGB",
        "mean": list(getattr(encoder, "mean", ())),
        "std": list(getattr(encoder, "std", ())),
        "thresholds": thresholds,
        "smoothing": window,
    }
    if any(task.landmark_scheme is not None for task in module.tasks.values()):
        # Upright crops of new photographs are cut so that points lie where they did in training.
        faces = datamodule.sample(TRAIN, TYPICAL_FACES, augment=False, each=True)
        preprocess[POINTS] = typical_points(module.tasks, faces)
    labels = {name: list(task.outputs) for name, task in module.tasks.items()}
    plain = OmegaConf.to_container(bound, resolve=True)
    results: dict[str, Any] = {
        "name": config.name,
        "dataset": config.dataset.name,
        "label_source": [source.table.metadata.get("label_source", "") for source in datamodule.sources],
        "seed": int(config.seed),
        "hash": result_hash(config),
        "protocol": OmegaConf.to_container(config.protocol, resolve=True),
        "selection": selection,
        "thresholds": thresholds,
        "smoothing": window,
        "error_lengths": inference.error_lengths(module.tasks),
        "headline": sums,
        "metrics": metrics,
        "missing_faces": missing_faces(config, summary),
        "people": people,
        "reference": OmegaConf.to_container(config.reference, resolve=True) if config.reference else None,
        "data": summary,
        "labels": labels,
        "preprocess": preprocess,
        "history": history.epochs,
        "findings": module.findings() | module.examine(lambda part: examined(datamodule, part)),
        "config": plain,
        "environment": environment(),
    }
    results["encoder_notes"] = encoder_notes(module)
    card = model_card(results)
    described = with_statistics(plain, module)
    write_release(output / "release", module.release_state(), described, labels, preprocess, metrics, card, people)
    return results


def examined(datamodule: FaceDataModule, part: str) -> Iterable[Batch] | None:
    """Return the batches of a part that a trained model is examined with, None for a part without rows."""
    return datamodule.part_dataloader(part, EXAMINED) if datamodule.rows(part) else None


def missing_faces(config: DictConfig, summary: dict[str, Any]) -> dict[str, Any]:
    """Return the rule for rows without a found face and their number in each part."""
    counts = {part: numbers["without_face"] for part, numbers in summary["parts"].items()}
    return {"rule": config.protocol.get("missing_faces", "fallback"), **counts}


def model_card(results: dict[str, Any]) -> str:
    """Return the text of a release's README."""
    from affect.report import markdown_table

    outputs = "\n".join(f"- `{name}`: {', '.join(names)}" for name, names in results["labels"].items())
    sources = ", ".join(source for source in results["label_source"] if source) or "the dataset's own"
    tables = "\n\n".join(
        f"Part `{part}`:\n\n"
        + markdown_table([r for r in records if not r.get("subgroup")], note=provenance(results, part))
        for part, records in results["metrics"].items()
    )
    if results.get("headline"):
        tables = f"{markdown_table(results['headline'], note=provenance(results))}\n\n{tables}"
    chosen = f"Weights selected by `{results['selection']['rule']}`"
    if results["selection"]["rule"] == "best_on_test":
        chosen += f": **{ON_TEST}**"
    notes = "\n".join(f"- {note}" for note in results.get("encoder_notes") or ())
    initial = f"## Initial weights\n\n{notes}\n\n" if notes else ""
    return (
        f"# {results['name']} on {results['dataset']}, seed {results['seed']}\n\nOutputs:\n\n{outputs}\n\n"
        f"Labels: {sources}. {chosen}.\n\n{tables}\n\n{initial}"
        "## Limits of use\n\nTrained and evaluated on the named dataset only. Facial movement is not a reading of what "
        "a person feels; do not use these outputs to judge people.\n"
    )


def print_summary(console: Console, summary: dict[str, Any], output: Path) -> None:
    """Print rows, groups and skips of each part."""
    for part, numbers in summary["parts"].items():
        console.print(f"{part}: {numbers['rows']} rows, {numbers['groups']} groups")
    for leak in summary.get("leaks", ()):
        console.print(f"LEAK (protocol.allow_leak=true): {leak}", highlight=False)
    for reason, count in summary.get("skipped", {}).items():
        console.print(f"skipped {count} rows: {reason}")
    for note in summary.get("notes", ()):
        console.print(f"note: {note}")
    console.print(f"run folder: {output}")


def shown_records(records: list[dict[str, Any]], results: dict[str, Any]) -> list[dict[str, Any]]:
    """Return the records that a terminal shows: summaries, and each output of the metric that stands for its task."""
    shown = []
    for record in records:
        task, (family, _, rest) = record["task"], record["name"].partition("/")
        score = str(results["config"]["task"][task].get("score")).partition("/")[0]
        if not record.get("subgroup") and (family == score or rest not in results["labels"][task]):
            shown.append(record)
    return shown


def print_results(console: Console, results: dict[str, Any]) -> None:
    """Print the headline and the table of the test part."""
    records = results["metrics"].get(TEST) or []
    note = provenance(results)
    title = f"{results['name']}: {results['dataset']} test part, weights of {selection_text(results['selection'])}"
    if results["selection"]["rule"] == "best_on_test":
        title += f", {ON_TEST}"
    if results.get("headline"):
        console.print(headline_table(results["headline"], title, note))
    shown = shown_records(records, results)
    if shown:
        console.print(results_table(shown, title, note=note))
    if any(record.get("subgroup") for record in records):
        names = headline_names(results.get("headline") or [])
        title = f"{results['name']}: test part by subgroup"
        console.print(subgroup_table(records, title, names=names or None, note=note))
    if "order" in (results.get("findings") or {}):
        console.print(order_table(results["findings"]["order"]))
    if results.get("reference"):
        console.print(reference_table(results["reference"], records))


def headline_table(records: Sequence[Mapping[str, Any]], title: str, note: str) -> Table:
    """Return the table of a headline; a name stands with the number that it is, or with the sum."""
    named = [{**record, "name": f"{record['name']} = {' + '.join(record['terms'])}"} for record in records]
    return results_table(named, title, note=note)


def headline_names(records: Sequence[Mapping[str, Any]]) -> list[str]:
    """Return the names of the numbers that a headline is made of, for the columns of a table of subgroups."""
    terms = [str(term).partition("/")[2] for record in records for term in record["terms"]]
    return list(dict.fromkeys(terms))


# --------------------------------------------------------------------------------------------------- compare


def compare(config: DictConfig, output: Path) -> None:
    """Train the arms of ``compare`` with the same module and trainer and print one table.

    An arm without overrides is the run itself.
    """
    from hydra import compose
    from hydra.core.hydra_config import HydraConfig

    console = Console(quiet=not is_first_process())
    given = [o for o in HydraConfig.get().overrides.task if not o.startswith(("compare", "paths.output"))]
    arms = {}
    notes: dict[str, None] = {}
    for name, overrides in config.compare.items():
        folder = output  # an arm without overrides is this run itself, under the name that it has among the arms
        if overrides:
            console.rule(f"arm {name}: {' '.join(overrides)}")
            arm = compose(config_name="train", overrides=[*given, *overrides])
            OmegaConf.set_struct(arm, False)
            arm.compare, arm.force = {}, config.force
            folder = output / "compare" / str(name)
            arm.paths.output = str(folder)
            train(arm, folder)
        wait_for_all()
        if is_first_process():
            results = read_json(folder / RESULTS)
            arms[str(name)] = results["metrics"]["test"]
            notes[provenance(results)] = None
    if not is_first_process():
        return
    table = comparison_table(arms, title=f"{config.name}: arms on the test part", note="\n".join(notes))
    console.print(table)
    write_json(output / "compare.json", arms)
    figures.write_comparison_figure(output, arms)


# ----------------------------------------------------------------------------------------------------- noise


def quiet() -> None:
    """Keep messages of libraries that do not concern the user out of the terminal."""
    for name in ("pytorch_lightning", "lightning", "lightning.pytorch", "lightning_fabric"):
        logging.getLogger(f"{name}.utilities.rank_zero").setLevel(logging.WARNING)
        logging.getLogger(name).setLevel(logging.WARNING)
    warnings.filterwarnings("ignore", message=".*does not have many workers.*")
    warnings.filterwarnings("ignore", message=".*number of training batches.*logging interval.*")
    warnings.filterwarnings("ignore", message=".*Checkpoint directory .* exists.*")
    warnings.filterwarnings("ignore", message=".*treespec.*")
    warnings.filterwarnings("ignore", message=".*`srun` command is available.*")
