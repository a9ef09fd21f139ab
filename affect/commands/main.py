# SPDX-License-Identifier: Apache-2.0
"""The command ``affect``: reads a command line, composes its configuration and calls the command's ``run`` function.

A command ``c`` is a configuration ``conf/c.yaml`` and a function ``affect.commands.c.run(config) -> float | None``,
imported when it runs and not before: help, completion and mistakes in a command line never wait for torch.
``sys.argv`` stays as it is, because a launcher of distributed processes runs it again.
"""

from __future__ import annotations

import importlib
import json
import os
import re
import sys
import traceback
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING

from affect import __version__
from affect.commands import configuration, sweeps
from affect.commands.sweeps import Failure, JobError
from affect.errors import AffectError, ConfigError, near

if TYPE_CHECKING:
    from hydra._internal.hydra import Hydra
    from omegaconf import DictConfig

USER_ERROR, PROGRAM_ERROR, INTERRUPTED = 2, 1, 130
"""Exit codes: something the user can put right; something else, with a traceback; Ctrl-C."""

SHELLS = ("bash", "zsh", "fish")

_SWEEP_JOB = "AFFECT_SWEEP_JOB"
"""Hands the job of a sweep on to the processes that a distributed launcher starts with the sweep's command line."""

_RANK_OVERRIDE = re.compile(r"hydra\.job\.name=train_ddp_process_\d+$")
"""What Lightning's launcher adds to the command line of each further process."""


@dataclass(frozen=True)
class Command:
    """A subcommand and what its help says.

    Attributes:
        name: Name of the configuration and of the module.
        summary: One line.
        keys: Important keys and what they do.
        examples: Command lines without the program's name.
        word: Key that the first word behind the command sets, if it takes one.
        words: Values of that word.
        finished: File in the folder of a sweep's job that tells that the job is done; None runs it again.
        names: Keys of the configuration by what the command line calls them, where that is the name of a group too.
    """

    name: str
    summary: str
    keys: tuple[tuple[str, str], ...]
    examples: tuple[str, ...]
    word: str | None = None
    words: tuple[str, ...] = field(default=())
    finished: str | None = None
    names: Mapping[str, str] = field(default_factory=dict)


COMMANDS = (
    Command(
        "train",
        "Train a model, select a checkpoint, predict and write results.json.",
        (
            ("experiment", "a named set of choices; everything else can still be changed"),
            ("dataset.root", "folder of the dataset"),
            ("dataset.table", "with dataset=table: your CSV, Parquet or Arrow file"),
            ("protocol.test", "what final numbers are computed on: a part by name, the index of a fold, or all"),
            (
                "selection",
                "best_val (best checkpoint on held-out training groups), refit (as many epochs on all of them), last, "
                "or best_on_test (legacy, said beside every number)",
            ),
            ("protocol.missing_faces", "rows without a found face: fallback (cropped all the same), drop or negative"),
            ("accept", "keys of findings of affect check that are meant so, e.g. accept=[rows]"),
            (
                "dataset.leave_out",
                "file of images to leave out, one a line, as affect check lists those it cannot read",
            ),
            ("trainer.max_epochs", "length of the run"),
            ("trainer.devices", "number of accelerators"),
            ("seed", "of every draw; seed=1,2,3 with -m runs each"),
            ("sweep", "folds, seeds, methods or a search, written down as conf/sweep/<name>.yaml"),
            ("hydra/launcher", "with -m, where jobs run: here, one by one (basic), joblib, local or slurm"),
            ("init", "run or release to start from"),
            ("group_by", "columns to report metrics by"),
            ("compare", "arms of one table: name: [overrides]"),
            ("paths.output", "folder of the run; by default runs/<name>/…"),
            ("force", "true trains again although the run is finished"),
            ("debug", "debug=fast runs two batches of everything"),
        ),
        (
            "train experiment=first_run",
            "train dataset=table dataset.table=labels.csv prepare=none task=[expression] encoder=resnet18",
            "train -m seed=1,2,3",
            "train -m sweep=bp4d_folds experiment=monet_bp4d hydra/launcher=slurm",
            "train debug=fast",
        ),
        finished="results.json",
    ),
    Command(
        "evaluate",
        "Compute predictions and metrics of a run, a release, an exported file or others' models on a dataset.",
        (
            ("checkpoint", "folder of a run or a release, .onnx file, packaged:<name>, or <owner>/<name> on the hub"),
            ("adapter", "what an ONNX file of others takes and gives: a name in conf/foreign, or a YAML file"),
            ("dataset", "null takes the dataset of the run"),
            ("part", "train, validation, test or all"),
            ("group_by", "columns to report metrics by"),
            ("out", "folder to write"),
        ),
        (
            "evaluate checkpoint=runs/first_run/orl-test/1a2b3c4d/seed1",
            "evaluate checkpoint=my_release dataset=table dataset.table=labels.csv",
            "evaluate checkpoint=my_release part=validation group_by=[subject]",
            "evaluate checkpoint=theirs.onnx adapter=emotiefflib_8 dataset=rafdb dataset.root=/data/RAF-DB",
            "evaluate checkpoint=packaged:face_expression dataset=faces protocol=default part=all",
        ),
    ),
    Command(
        "release",
        "Write what of a run may be published: weights, outputs, training, thresholds, hashed people, model card.",
        (
            ("run", "folder of a finished run"),
            ("out", "folder to write"),
            ("force", "true replaces a release that is there"),
        ),
        ("release run=runs/first_run/orl-test/1a2b3c4d/seed1 out=my_release",),
    ),
    Command(
        "export",
        "Write a model as one file, compared with the model first: ONNX in float or int8, or a torch.export program.",
        (
            ("checkpoint", "folder of a run or of a release"),
            ("format", "onnx, onnx_int8 or torch_export"),
            ("out", "file to write"),
            ("calibration.images", "training images that int8 takes its ranges from"),
        ),
        (
            "export checkpoint=runs/first_run/orl-test/1a2b3c4d/seed1 format=onnx out=model.onnx",
            "export checkpoint=runs/first_run/orl-test/1a2b3c4d/seed1 format=onnx_int8",
        ),
    ),
    Command(
        "compress",
        "Compress a trained model: methods in order, a report per layer, and a release that evaluate and export take.",
        (
            ("checkpoint", "folder of a run or of a release"),
            ("compression", "methods in order, e.g. compression=[uniform]"),
            ("tolerance", "change of a task's values above which the layers that cause it are named"),
            ("data.images", "training images that methods look at"),
            ("out", "folder to write"),
        ),
        (
            "compress checkpoint=runs/first_run/orl-test/1a2b3c4d/seed1 compression=[uniform]",
            "compress checkpoint=my_run compression=[uniform] compression.uniform.bits=4 out=my_small_model",
        ),
    ),
    Command(
        "reproduce",
        "Run a controlled experiment: every arm with every seed, and one table with intervals.",
        (
            ("experiment", "controlled/<name>"),
            ("scale", "quick (does it run), paper (at most 45 minutes on two cores) or full"),
            ("seeds", "number of seeds; null takes the scale's"),
            ("arms", "arms to run; null takes the scale's, or all"),
            ("out", "folder to write; by default runs/reproduce/<name>/<scale>"),
        ),
        (
            "reproduce experiment=controlled/monet_parity_chain",
            "reproduce experiment=controlled/monet_parity_chain scale=quick",
        ),
    ),
    Command(
        "collect",
        "Tables of a sweep: folds to a mean per seed, seeds to mean and spread, settings compared on the same people.",
        (
            ("sweep", "folder of a sweep, as affect train -m says it, or any folder with runs in it"),
            ("by", "keys that tell settings apart; null: what the sweep varies besides seed and test part"),
            ("baseline", "setting that others are compared with; null: the first; all: every pair"),
            ("out", "folder to write; by default collect/ in the sweep's folder"),
        ),
        (
            "collect sweep=runs/sweeps/bp4d_methods-1a2b3c4d",
            "collect sweep=runs/sweeps/bp4d_methods-1a2b3c4d baseline=all",
            "collect sweep=runs/monet_bp4d by=[model.orders]",
        ),
        names={"sweep": "folder"},
    ),
    Command(
        "rerun",
        "Start the run of a results.json again, in a new folder, and say what differs from then.",
        (
            ("results", "results.json of a run, or the folder that it lies in"),
            ("change", "settings of the run to change: ['dataset.root=/data/BP4D']"),
            ("out", "folder of the new run; by default rerun/ beside the results file, numbered"),
        ),
        (
            "rerun results=runs/first_run/orl-test/1a2b3c4d/seed1/results.json",
            "rerun results=results.json \"change=['dataset.root=/data/BP4D']\"",
        ),
    ),
    Command(
        "predict",
        "Read the faces of photographs, videos or a camera; write a table, annotated copies and timelines.",
        (
            ("checkpoint", "run, release, exported file, packaged:<name>, or name on the hub"),
            ("input", "image, video, folder of them, pattern such as 'videos/*.mp4', or number of a camera"),
            ("out", "folder to write"),
            ("finder", "face detector and points"),
            ("detect_every", "frames of a video from one detection to the next; in between boxes follow the points"),
            ("formats", "tables to write: csv, parquet"),
            ("limit", "most frames of each input"),
        ),
        (
            "predict checkpoint=runs/first_run/orl-test/1a2b3c4d/seed1 input=photo.jpg",
            "predict checkpoint=my_release input=photos out=predictions",
            "predict checkpoint=my_release input=interview.mp4 detect_every=5",
            "predict checkpoint=my_release input=0 limit=300",
        ),
    ),
    Command(
        "show",
        "Write a finished run as one HTML page: numbers, figures and model card.",
        (
            ("run", "folder of a run of affect train or affect evaluate, or a release"),
            ("out", "HTML file to write; by default report.html in the run's folder"),
            ("open", "true opens it in a browser"),
            ("demo", "true serves it with a place to drop photographs that the model reads (port=8000)"),
        ),
        (
            "show run=runs/first_run/orl-test/1a2b3c4d/seed1 open=true",
            "show run=runs/first_run/orl-test/1a2b3c4d/seed1 demo=true",
        ),
    ),
    Command(
        "check",
        "Hold a dataset against its published counts, rates and image sizes and against itself, before training.",
        (
            ("dataset.root", "folder of the dataset, as delivered"),
            ("report", "JSON file to write; by default runs/check/<dataset>/check.json"),
            ("accept", "keys of findings that are meant so; affect train takes the same"),
            ("sheet", "picture of sample faces with labels and points: true (beside the report), a file, or false"),
            ("decode", "images that are decoded whole, a sample: a number, or all"),
            ("near_duplicates", "true looks for copies of one picture in two parts"),
        ),
        (
            "check dataset=bp4d dataset.root=/data/BP4D",
            "check dataset=rafdb dataset.root=/data/RAF-DB report=check.json decode=all",
            "check dataset=bp4d dataset.root=/data/BP4D 'accept=[rows,rate/au12_occurrence]'",
            "check dataset=table dataset.table=labels.csv near_duplicates=true",
        ),
    ),
    Command(
        "prepare",
        "Find the faces of a dataset, align them and store their crops for training.",
        (
            ("dataset", "what to prepare; it also chooses the recipe"),
            ("dataset.root", "folder as delivered"),
            ("prepare", "recipe of the crops; training takes the same one and finds them"),
            ("landmarks", "who finds points: faceapi, mediapipe, face_alignment, or decafa, a model that you trained"),
            ("checkpoint", "for landmarks=decafa: folder of a run or of a release"),
            ("workers", "processes; null is one per core"),
            ("store", "files, or shards: few large Arrow files instead of millions of small ones"),
            ("shard", "i/n: do only this part, for job arrays; merge=true afterwards"),
            ("merge", "true makes sure that all parts are done and writes the table"),
            ("paths.prepared", "folder of all prepared datasets"),
        ),
        (
            "prepare dataset=bp4d dataset.root=/data/BP4D",
            "prepare dataset=disfa dataset.root=/data/DISFA prepare=similarity49_200 store=shards workers=16",
            "prepare dataset=bp4d dataset.root=/data/BP4D landmarks=decafa checkpoint=runs/decafa_faces/faces",
            "prepare dataset=bp4d dataset.root=/data/BP4D shard=0/16",
            "prepare dataset=bp4d dataset.root=/data/BP4D merge=true",
        ),
    ),
    Command(
        "synthesize",
        "Write the built-in faces as image files, with a table or in the layout of a real dataset.",
        (
            ("out", "folder to write"),
            ("layout", "dataset whose tree is written, e.g. bp4d; without it: faces.parquet and a contact sheet"),
            ("options", "with layout: settings of that dataset, e.g. options={box: detector}"),
            ("dataset.count", "number of faces"),
            ("dataset.seed", "which faces"),
            ("dataset.dials.image_size", "side of an image in pixels"),
        ),
        (
            "synthesize out=faces dataset.count=100",
            "synthesize out=large dataset.count=25 dataset.dials.image_size=256",
            "synthesize layout=bp4d out=drawn_bp4d dataset.count=600 dataset.dials.subjects=12",
        ),
    ),
    Command(
        "submit",
        "Write the file of predictions that a track of the ABAW challenges takes.",
        (
            ("track", "va, expr, au or mtl; the first word"),
            ("sample", "sample file of the challenge, whose frames are answered"),
            ("predictions", "predictions table of affect train or evaluate, or face_table.parquet of affect predict"),
            ("checkpoint", "in place of predictions: run or release that predicts the listed frames"),
            ("root", "with checkpoint: folder of Aff-Wild2, which holds the crops"),
            ("thresholds", "probability from which an action unit is present: a number, or one for each"),
            ("out", "file to write; by default submission_<track>.txt"),
        ),
        (
            "submit va checkpoint=my_release root=/data/Aff-Wild2 sample=VA_test_set_sample.txt",
            "submit mtl predictions=my_run/predictions/test.parquet out=validation_mtl.txt",
        ),
        word="track",
        words=("va", "expr", "au", "mtl"),
    ),
    Command(
        "teach",
        "Label photographs with a packaged teacher network: blendshape coefficients, points, pose.",
        (("root", "folder of images"), ("out", "Parquet file to write")),
        ("teach out=data/orl_teacher.parquet", "teach root=photos out=photos.parquet"),
    ),
    Command(
        "benchmark",
        "Measure training steps, beside timm's too, loader, built-in faces, large tables, exported files; stores JSON.",
        (
            ("quick", "true for a smoke run of seconds"),
            ("threads", "torch threads"),
            ("checkpoint", "a run or a release with points: its speed (landmarks), its points (photographs)"),
            ("out", "JSON file to write"),
        ),
        (
            "benchmark step",
            "benchmark training",
            "benchmark loader",
            "benchmark faces quick=true",
            "benchmark table",
            "benchmark pal",
            "benchmark photographs checkpoint=runs/decafa_faces/faces",
        ),
        word="what",
        words=(
            "step",
            "training",
            "loader",
            "faces",
            "table",
            "pal",
            "monet",
            "predict",
            "export",
            "pruning",
            "ranges",
            "landmarks",
            "photographs",
        ),
    ),
)
"""Every command, in the order of the help."""

OPTIONS = (
    ("-m, --multirun", "run once for each combination of comma-separated values"),
    ("--config-dir X", "also take configurations from folder X, and import the package or the modules beside it"),
    ("--cfg", "print the composed configuration and stop"),
    ("--traceback", "show where an error was raised"),
    ("-h, --help", "show this and stop"),
)
"""Options of every command."""


@dataclass
class Line:
    """A command line behind the command's name.

    Attributes:
        overrides: ``key=value`` settings, paths quoted.
        multirun: Whether to run a sweep.
        config_dir: The user's folder of configurations.
        show: Whether only to print the configuration.
        help: Whether only to print help.
        traceback: Whether errors are shown with their traceback.
    """

    overrides: list[str] = field(default_factory=list)
    multirun: bool = False
    config_dir: Path | None = None
    show: bool = False
    help: bool = False
    traceback: bool = False


def main(argv: Sequence[str] | None = None) -> int:
    """Run a command line and return the exit code.

    Args:
        argv: Words behind the program's name; None takes those of the process.
    """
    words = list(sys.argv[1:] if argv is None else argv)
    name = "affect"
    show_traceback = "--traceback" in words
    try:
        if not words or words[0] in ("-h", "--help"):
            print(_program_help())
            return 0
        if words[0] in ("-V", "--version"):
            print(f"affect {__version__}")
            return 0
        if words[0] in ("--completion", "--complete"):
            return _completion(words)
        command = _find_command(words[0])
        name = f"affect {command.name}"
        return _run_command(command, read_line(command, words[1:]))
    except AffectError as error:
        if show_traceback:
            traceback.print_exc()
        _say(name, configuration.one_line(error))
        return USER_ERROR
    except KeyboardInterrupt:
        _say(name, "interrupted", kind="")
        return INTERRUPTED
    except SystemExit as error:
        # Lightning turns Ctrl-C into exit(1) once it has shut its own processes down.
        if isinstance(error.__context__, KeyboardInterrupt):
            _say(name, "interrupted", kind="")
            return INTERRUPTED
        raise
    except BrokenPipeError:
        # The reader of our output is gone, as in `affect --help | head`. Python would complain once more at exit.
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        return PROGRAM_ERROR


def read_line(command: Command, words: Sequence[str]) -> Line:
    """Return what the words behind a command say.

    Raises:
        ConfigError: Unknown option, or an option without its value.
    """
    line = Line()
    settings: list[str] = []
    rest = list(words)
    if command.word and rest and "=" not in rest[0] and not rest[0].startswith(("-", "+", "~")):
        if rest[0] not in command.words:
            raise ConfigError(f"affect {command.name} has no {rest[0]!r}; {near(rest[0], command.words)}")
        settings.append(f"{command.word}={rest.pop(0)}")
    while rest:
        word = rest.pop(0)
        if word in ("-m", "--multirun"):
            line.multirun = True
        elif word in ("-h", "--help"):
            line.help = True
        elif word == "--traceback":
            line.traceback = True
        elif word == "--cfg" or word.startswith("--cfg="):
            line.show = True
        elif word in ("--config-dir", "-cd"):
            if not rest:
                raise ConfigError("--config-dir needs a folder: --config-dir X")
            line.config_dir = configuration.extension_directory(rest.pop(0))
        elif word.startswith("--config-dir="):
            line.config_dir = configuration.extension_directory(word.partition("=")[2])
        elif word.startswith("-"):
            raise ConfigError(_unknown_option(word))
        else:
            key, equals, value = word.partition("=")
            settings.append(f"{command.names.get(key, key)}{equals}{value}")
    line.overrides = configuration.quote_paths(settings)
    return line


def _unknown_option(word: str) -> str:
    known = [part for names, _ in OPTIONS for part in names.replace(" X", "").split(", ")]
    if "=" in word:
        return f"unknown option {word}; settings are written without dashes: {word.lstrip('-')}"
    return f"unknown option {word}; {near(word, known)}"


def _find_command(name: str) -> Command:
    for command in COMMANDS:
        if command.name == name:
            return command
    if name.startswith("-"):
        raise ConfigError(f"unknown option {name}; options come behind the command (affect --help)")
    raise ConfigError(f"there is no command {name!r}; {near(name, [command.name for command in COMMANDS])}")


def _say(name: str, line: str, kind: str = "error: ") -> None:
    sys.stdout.flush()
    print(f"{name}: {kind}{line}", file=sys.stderr, flush=True)


# -------------------------------------------------------------------------------------------------- running


def _run_command(command: Command, line: Line) -> int:
    modules = (str(import_folder(line.config_dir)),) if line.config_dir is not None else ()
    with configuration.open_hydra(command.name, line.config_dir) as hydra, import_path(modules):
        line.overrides = configuration.expand_sources(hydra, command.name, line.overrides)
        if line.help:
            print(command_help(command, hydra, line.overrides))
            return 0
        job = _job_of_parent(line)
        if job is not None:
            line.overrides, line.multirun = job, False
        config = _compose(hydra, command, line)
        if line.show:
            print(_yaml(config), end="")
            return 0
        if _is_sweep(config, line):
            return _sweep(hydra, command, line, config, modules)
        run = Job(command.name, modules, line.traceback)
        result = hydra.run(command.name, run, [*line.overrides, "hydra.mode=RUN"]).return_value
        return result.code if isinstance(result, Failure) else 0


def _compose(hydra: Hydra, command: Command, line: Line) -> DictConfig:
    from hydra.types import RunMode

    mode = RunMode.MULTIRUN if line.multirun else RunMode.RUN
    try:
        # A sweep may also be asked for by a configuration (hydra.mode), so its overrides are checked afterwards.
        config = hydra.compose_config(command.name, line.overrides, mode, validate_sweep_overrides=False)
        if not _is_sweep(config, line):
            configuration.require_no_sweep(line.overrides)
        return config
    except Exception as error:
        raise ConfigError(configuration.explain_composition(error, hydra, command.name, line.overrides)) from error


def _is_sweep(config: DictConfig, line: Line) -> bool:
    from hydra.types import RunMode

    return line.multirun or config.hydra.mode == RunMode.MULTIRUN


def _yaml(config: DictConfig) -> str:
    from omegaconf import OmegaConf

    plain = OmegaConf.to_container(config, resolve=False)
    assert isinstance(plain, dict)
    plain.pop("hydra")
    return OmegaConf.to_yaml(OmegaConf.create(plain))


def _sweep(hydra: Hydra, command: Command, line: Line, config: DictConfig, modules: tuple[str, ...]) -> int:
    overrides = [*line.overrides, "hydra.mode=MULTIRUN"]
    if not config.hydra.sweep.dir:
        overrides.append(f"hydra.sweep.dir={configuration.sweep_folder(command.name, line.overrides, line.config_dir)}")
    # Hydra's own sweeper takes every result as it comes, so failures are returned and the other jobs go on; other
    # sweepers have a rule of their own for failures, and get an exception.
    collects = str(config.hydra.sweeper.get("_target_", "")).endswith(".BasicSweeper")
    job = Job(command.name, modules, line.traceback, raises=not collects)
    config_dir = None if line.config_dir is None else str(line.config_dir)
    about = {"command": command.name, "line": line.overrides, "config_dir": config_dir}
    records: list[sweeps.Record] = []
    try:
        sweeps.run_sweep(hydra, command.name, job, overrides, about, command.finished, print, records.append)
    except Exception as error:
        lines = sweeps.summary(records[0]) if records else []
        if lines and not isinstance(error, ConfigError):
            _say_lines(command.name, lines)  # a search whose trials all failed has no best one, and says so by an error
            return max(USER_ERROR, PROGRAM_ERROR)
        said = configuration.explain_run(error)
        if said is None and not _is_composition_error(error):
            raise
        raise ConfigError(
            said or configuration.explain_composition(error, hydra, command.name, line.overrides)
        ) from error
    (record,) = records
    lines = sweeps.summary(record)
    if lines:
        _say_lines(command.name, lines)
    elif command.finished:
        print(f"{sweeps.counted(len(record.entries))} finished: {record.folder}")
        print(f"next: {sweeps.next_line(record)}", flush=True)
    return record.code


def _say_lines(name: str, lines: Sequence[str]) -> None:
    for line in lines:
        _say(f"affect {name}", line)


def _is_composition_error(error: Exception) -> bool:
    from hydra.errors import HydraException

    return isinstance(error, HydraException)


@dataclass(frozen=True)
class Job:
    """The function that Hydra calls with a configuration, here or in a launched process.

    Attributes:
        command: Name of the command.
        modules: Folders to import the user's modules from.
        traceback: Whether errors are shown with their traceback.
        raises: Whether a failure is raised; otherwise it is returned.
    """

    command: str
    modules: tuple[str, ...]
    traceback: bool = False
    raises: bool = False

    def __call__(self, config: DictConfig) -> float | Failure | None:
        """Return what the command returns, or why it failed; the reason is also printed here."""
        try:
            with import_path(self.modules), _announced_job():
                configuration.require_complete(config)
                run = importlib.import_module(f"affect.commands.{self.command}").run
                return run(config)
        except Exception as error:
            failure = self._failure(error)
        if self.raises:
            raise JobError(failure.line)
        return failure

    def _failure(self, error: Exception) -> Failure:
        said = configuration.explain_run(error)
        if said is None or self.traceback:
            traceback.print_exception(error)
        line = said or f"{type(error).__name__}: {configuration.one_line(error)}"
        where = _job_description()
        line = f"{where}: {line}" if where else line
        _say(f"affect {self.command}", line)
        return Failure(line, USER_ERROR if said is not None else PROGRAM_ERROR)


def _job_description() -> str:
    """Return number and settings of the sweep's job that runs here; empty outside of a sweep."""
    from hydra.core.hydra_config import HydraConfig

    job = configuration.sweep_job()
    if job is None:
        return ""
    settings = [str(override) for override in HydraConfig.get().overrides.task]
    return f"job {job[1]} ({' '.join(settings)})"


def import_folder(config_dir: Path) -> Path:
    """Return the folder that the user's modules are imported from: the one that ``config_dir`` lies in.

    Where that is a package itself, the folder that the package lies in: from a package's inside its modules would have
    a second name, and could hide others.
    """
    folder = config_dir.parent
    while (folder / "__init__.py").is_file():
        folder = folder.parent
    return folder


@contextmanager
def import_path(folders: Sequence[str]) -> Iterator[None]:
    """Let modules be imported from ``folders``, here and in the processes started meanwhile."""
    new = [folder for folder in folders if folder not in sys.path]
    before = os.environ.get("PYTHONPATH")
    sys.path[:0] = new
    if folders:
        kept = [folder for folder in (before or "").split(os.pathsep) if folder and folder not in folders]
        os.environ["PYTHONPATH"] = os.pathsep.join([*folders, *kept])
    try:
        yield
    finally:
        for folder in new:
            if folder in sys.path:
                sys.path.remove(folder)
        _restore("PYTHONPATH", before)


@contextmanager
def _announced_job() -> Iterator[None]:
    """Tell the processes started meanwhile which job of a sweep runs here.

    A distributed launcher starts them with this process's command line, which asks for the whole sweep.
    """
    from hydra.core.hydra_config import HydraConfig

    job = configuration.sweep_job()
    before = os.environ.get(_SWEEP_JOB)
    if job is not None:
        hydra = HydraConfig.get()
        overrides = [*hydra.overrides.task, *_launched(hydra.overrides.hydra)]
        overrides += [f"hydra.job.num={job[1]}", f"hydra.sweep.dir={configuration.quoted(str(hydra.sweep.dir))}"]
        overrides += [f"hydra.sweep.subdir={configuration.quoted(str(hydra.sweep.subdir))}"]
        os.environ[_SWEEP_JOB] = json.dumps(overrides)
    try:
        yield
    finally:
        _restore(_SWEEP_JOB, before)


def _launched(overrides: Sequence[str]) -> list[str]:
    """Return the settings of Hydra that hold for one job as well; those of sweeper and launcher do not."""
    dropped = re.compile(r"\+*hydra(/(launcher|sweeper)|\.(launcher|sweeper|sweep|mode|job))\b")
    return [str(override) for override in overrides if not dropped.match(str(override))]


def _job_of_parent(line: Line) -> list[str] | None:
    """Return the overrides of the sweep's job that started this process as a further rank; None if none did."""
    added = [override for override in line.overrides if _RANK_OVERRIDE.match(override)]
    if not line.multirun or not added or _SWEEP_JOB not in os.environ:
        return None
    return [*json.loads(os.environ[_SWEEP_JOB]), *added]


def _restore(name: str, value: str | None) -> None:
    if value is None:
        os.environ.pop(name, None)
    else:
        os.environ[name] = value


# ----------------------------------------------------------------------------------------------------- help


def _program_help() -> str:
    width = max(len(command.name) for command in COMMANDS)
    lines = [
        "affect: train, evaluate and ship facial affective-computing models",
        "",
        "usage: affect <command> [key=value …] [-m] [--config-dir X]",
        "",
        "commands:",
        *(f"  {command.name:<{width}}  {command.summary}" for command in COMMANDS),
        "",
        "start with:",
        "  affect train experiment=first_run    learn from 400 photographs that ship inside a package",
        "  affect <command> --help              groups, keys and examples of a command",
        '  eval "$(affect --completion bash)"   complete commands, groups and keys (also zsh, fish)',
        "",
        "options:",
        "  --version      show the version and stop",
        "  -h, --help     show this and stop",
    ]
    return "\n".join(lines)


def command_help(command: Command, hydra: Hydra, overrides: Sequence[str] = ()) -> str:
    """Return the help of a command: its groups with their options, its important keys, and examples."""
    word = f" <{command.word}>" if command.words else ""
    lines = [command.summary, "", f"usage: affect {command.name}{word} [key=value …] [-m] [--config-dir X]", ""]
    if command.words:
        lines += [*_table([(f"<{command.word}>", ", ".join(command.words))]), ""]
    try:
        groups = configuration.command_groups(hydra, command.name, overrides)
    except Exception as error:
        said = configuration.explain_composition(error, hydra, command.name, overrides)
        raise ConfigError(said) from error
    rows = [(key, _options(key, chosen, hydra)) for key, chosen in groups.items()]
    rows = [(key, options) for key, options in rows if options]
    if rows:
        lines += ["groups (group=option, * is chosen):", *_table(rows), ""]
    lines += ["keys:", *_table(command.keys), "", "options:", *_table(OPTIONS), "", "examples:"]
    lines += [f"  affect {example}" for example in command.examples]
    return "\n".join(lines)


def _options(key: str, chosen: Sequence[str], hydra: Hydra) -> str:
    options = configuration.group_options(hydra, key.partition("@")[0])
    return "  ".join(f"*{option}" if option in chosen else option for option in options)


def _table(rows: Sequence[tuple[str, str]], width: int = 100) -> list[str]:
    import textwrap

    left = max(len(key) for key, _ in rows)
    lines = []
    for key, text in rows:
        wrapped = textwrap.wrap(text, max(40, width - left), break_on_hyphens=False) or [""]
        lines.append(f"  {key:<{left}}  {wrapped[0]}")
        lines += [" " * (left + 4) + part for part in wrapped[1:]]
    return lines


# ----------------------------------------------------------------------------------------------- completion


def _completion(words: Sequence[str]) -> int:
    from affect.commands import completion

    if words[0] == "--complete":
        print("\n".join(completion.complete(" ".join(words[1:]))))
        return 0
    shell = words[1] if len(words) > 1 else ""
    if shell not in SHELLS:
        raise ConfigError(
            f"no completion for {shell!r}; known: {', '.join(SHELLS)}" if shell else "which shell? bash, zsh or fish"
        )
    print(completion.script(shell))
    return 0


if __name__ == "__main__":
    # By its own name, so that what other processes return is of the classes that this one knows.
    from affect.commands.main import main as named

    raise SystemExit(named())
