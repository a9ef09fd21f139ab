# SPDX-License-Identifier: Apache-2.0
"""The config tree: every leaf instantiates and lists every argument; every experiment runs; tasks learn."""

from __future__ import annotations

import inspect
import json
from collections.abc import Callable, Sequence
from pathlib import Path

import pytest
import torch
from hydra.utils import get_class, get_method, instantiate
from omegaconf import DictConfig, OmegaConf

from affect import labels
from affect.commands import assembly, figures, train
from affect.commands.configuration import compose as compose_config
from affect.commands.configuration import config_directory
from affect.data.batch import FaceBatch
from affect.data.table import FaceTable
from affect.tasks import Task
from tests.conftest import SMALL

CONF = config_directory()
GROUPS = sorted(path.name for path in CONF.iterdir() if path.is_dir() and path.name not in ("base", "hydra"))
LEAVES = sorted(f"{group}={path.stem}" for group in GROUPS for path in (CONF / group).glob("*.yaml"))
NEEDS = {
    "dataset=table": ("dataset.table={tmp}/labels.csv",),
    "dataset=orl": (),
    "finder=mediapipe": (),
    "finder=face_alignment": (),
}
ELSEWHERE = ("trainer", "read", "images", "encoder")
ELSEWHERE_BUILT = ("encoder=pixel_grid", "encoder=resnet50", "encoder=vgg16_vggface")
"""Encoders that are large or need arguments; VGGFace also needs a file (tests/models/test_vggface.py)."""

FRAMEWORK_ARGUMENTS = {
    "tasks", "optimizer", "scheduler", "weighting", "objectives", "self", "args", "kwargs", "params", "total_steps",
    "loss", "metrics", "target", "weight", "score", "common", "clean", "check_images", "last_epoch", "table",
    "steps_per_epoch",
}  # fmt: skip
"""Arguments that the framework fills in, and those that a task's own keys hold."""


def leaf(group: str, option: str) -> DictConfig:
    return OmegaConf.load(CONF / group / f"{option}.yaml")


def targets(node: object) -> list[DictConfig]:
    """Return every node of a leaf that names a class."""
    found: list[DictConfig] = []
    if isinstance(node, DictConfig):
        found += [node] if "_target_" in node else []
        for key in node:
            if not OmegaConf.is_interpolation(node, key) and not OmegaConf.is_missing(node, key):
                found += targets(node[key])
    return found


def callee(name: str) -> Callable:
    try:
        return get_class(name)
    except (ImportError, ValueError):
        return get_method(name)


@pytest.mark.parametrize("name", LEAVES)
def test_every_leaf_names_things_that_exist_and_says_what_it_is(name: str) -> None:
    group, option = name.split("=")
    for node in targets(leaf(group, option)):
        signature = inspect.signature(callee(node["_target_"]))
        accepts_any = any(p.kind is p.VAR_KEYWORD for p in signature.parameters.values())
        for key in node:
            known = str(key) in signature.parameters or str(key).startswith("_")
            assert known or accepts_any, f"{name}: {node['_target_']} takes no argument {key}"
    if group not in ("optimizer", "trainer"):
        assert (CONF / group / f"{option}.yaml").read_text().startswith("#"), (
            f"{name}: say what it is in the first line"
        )


@pytest.mark.parametrize(
    "name", [n for n in LEAVES if n.split("=")[0] not in ("trainer", "optimizer", "logger", "debug", "finder")]
)
def test_leaves_of_our_classes_list_every_argument_with_its_default(name: str) -> None:
    group, option = name.split("=")
    for node in targets(leaf(group, option)):
        target = str(node["_target_"])
        if not target.startswith("affect.") or "layouts" in target:
            continue
        for parameter in inspect.signature(callee(target)).parameters.values():
            if parameter.kind in (parameter.VAR_KEYWORD, parameter.VAR_POSITIONAL):
                continue
            assert parameter.name in set(node) | FRAMEWORK_ARGUMENTS, f"{name}: {target} {parameter.name}"


def test_the_dials_of_the_built_in_faces_are_listed_with_their_defaults() -> None:
    from dataclasses import asdict

    from affect.data.faces import FaceDials

    listed = OmegaConf.to_container(leaf("dataset", "faces").dials)
    assert isinstance(listed, dict)
    listed.pop("_target_")
    expected = {key: list(value) if isinstance(value, tuple) else value for key, value in asdict(FaceDials()).items()}
    assert listed == expected


@pytest.mark.parametrize("name", [n for n in LEAVES if n.split("=")[0] in ("loss", "target", "prepare")])
def test_small_leaves_instantiate(name: str) -> None:
    config = compose_config("train", [name, "task=[au]"])
    group = name.split("=")[0]
    made = assembly.make(config[group], group)
    assert (made is None) == (len(config[group]) == 0)


def multi_task_batch(tasks: dict[str, Task]) -> FaceBatch:
    """Return four random images with labels of bound tasks."""
    generator = torch.Generator().manual_seed(0)
    shapes = {n: (4, t.num_outputs // 2, 2) if t.landmark_scheme else (4, t.num_outputs) for n, t in tasks.items()}
    targets = {name: torch.rand(shape, generator=generator) for name, shape in shapes.items()}
    for name, task in tasks.items():
        if task.softmax:
            targets[name] = torch.eye(task.num_outputs)[torch.arange(4) % task.num_outputs]
        elif task.flags:
            targets[name] = targets[name].round()
    masks = {name: torch.ones(shape[:2], dtype=torch.bool) for name, shape in shapes.items()}
    image = torch.randint(0, 256, (4, 3, 32, 32), dtype=torch.uint8, generator=generator)
    return FaceBatch(image=image, targets=targets, masks=masks)


MULTI_TASK = {
    "baseline": (),
    "monet": ("model.mixing=bound", "model.orders=4", "model.kept=2"),
    "monet model.mixing=mixture": ("model.orders=4", "model.kept=2"),
    "monet_single_order": (),
    "monet_uniform": ("model.orders=4", "model.kept=2"),
    "mrnn": (),
    "soft_layer_order": (),
    "task_token_transformer": ("encoder.output=map", "model.dim=16", "model.heads=2"),
    "thin": ("encoder.output=map", "model.pool=1", "model.exogenous.random=true", "model.exogenous.classes=3"),
    "thin_endogenous": ("encoder.output=map", "model.pool=1"),
    "thin_exogenous": (
        "encoder.output=map",
        "model.pool=1",
        "model.exogenous.random=true",
        "model.exogenous.classes=3",
    ),
    "thin_mean": ("encoder.output=map", "model.pool=1"),
    "thin_single": ("encoder.output=map", "model.pool=1"),
    "vmn_common": (),
    "vmn_separate": (),
}
"""Models that take units, expressions, valence and arousal together, with settings that make them small."""


@pytest.mark.parametrize("name", MULTI_TASK)
def test_every_multi_task_model_trains_with_uncertainties(name: str) -> None:
    line = ["task=[au,expression,valence_arousal]", "dataset.aus=[1,4,12]", *SMALL, "weighting=uncertainty"]
    config = compose_config("train", [*line, *f"model={name}".split(), *MULTI_TASK[name]])
    tasks = assembly.build_tasks(config)
    source = FaceTable.from_columns(
        {"image": ["a"], "expression": ["anger"], "valence": [0.5], "arousal": [0.5]}
        | {f"au{unit:02d}_occurrence": [1.0] for unit in (1, 4, 12)}
    )
    for task in tasks.values():
        task.bind([source])
    module = assembly.build_model(config, tasks).train()
    module.log = lambda *_, **__: None  # type: ignore[method-assign, assignment]
    module.setup("test")
    module.training_step(multi_task_batch(tasks), 0).backward()
    learnt = dict(module.weighting.named_parameters())
    assert len(learnt) == 3
    assert all(s.grad is not None and (s.grad != 0).all() for s in learnt.values())


def test_models_with_one_kind_of_task_are_known() -> None:
    models = {path.stem for path in (CONF / "model").glob("*.yaml")}
    alone = {"au_transformer", "decafa", "exogenous"}  # units; points; the exogenous class
    assert models - {name.split()[0] for name in MULTI_TASK} == alone


@pytest.mark.parametrize("name", [n for n in LEAVES if n.split("=")[0] == "task"])
def test_every_task_builds(name: str) -> None:
    option = name.split("=")[1]
    tasks = assembly.build_tasks(compose_config("train", [f"task=[{option}]"]))
    assert set(tasks) == {option}
    assert tasks[option].loss is not None
    assert tasks[option].metrics


@pytest.mark.parametrize("name", [n for n in LEAVES if n.split("=")[0] == "encoder" and n not in ELSEWHERE_BUILT])
def test_every_encoder_builds_and_trains_with_every_optimizer_and_schedule(name: str) -> None:
    config = compose_config(
        "train", [name, "encoder.weights=null"] if "timm" not in name else [name, "encoder.name=test_resnet"]
    )
    encoder = instantiate(config.encoder, _convert_="object")
    assert encoder.num_features > 0


@pytest.mark.parametrize("option", ["adam", "adamw", "sgd"])
@pytest.mark.parametrize("schedule", ["none", "polynomial", "step", "warmup_cosine"])
def test_every_optimizer_and_schedule_builds(option: str, schedule: str) -> None:
    import torch

    config = compose_config("train", [f"optimizer={option}", f"scheduler={schedule}"])
    optimizer = assembly.make(config.optimizer, "optimizer")([{"params": [torch.nn.Parameter(torch.zeros(2))]}])
    scheduler = assembly.make(config.scheduler, "scheduler")
    if scheduler is None:
        assert schedule == "none"
    elif schedule == "step":
        scheduler(optimizer)
    else:
        scheduler(optimizer, total_steps=10)


@pytest.mark.parametrize("callbacks", ["ema", "early_stopping", "learning_rate"])
def test_every_callback_runs(
    tiny_run: Callable[..., DictConfig], callbacks: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(figures, "write_run_figures", lambda *arguments: None)
    logger = "logger=csv" if callbacks == "learning_rate" else "logger=none"
    config = tiny_run(f"callbacks=[default,{callbacks}]", "callbacks.progress=null", logger, "task=[au]")
    train.run(config)
    assert (Path(config.paths.output) / "results.json").is_file()


EXPERIMENTS = sorted(
    str(p.relative_to(CONF / "experiment").with_suffix("")) for p in (CONF / "experiment").rglob("*.yaml")
)


@pytest.fixture(scope="module")
def drawn_trees(tmp_path_factory: pytest.TempPathFactory) -> Callable[[str], Path]:
    """Return a function that gives the root of a dataset as it is delivered, with drawn faces in it."""
    from affect.commands.synthesize import Tree
    from affect.data.faces import FaceDials

    folder = tmp_path_factory.mktemp("trees")
    dials = FaceDials(image_size=48, subjects=12, glasses=0.5, beard=0.5)

    def root(name: str) -> Path:
        if not (folder / name).is_dir():
            Tree.of(name, folder / name, {}).write(dials, 0, 48)
        return folder / name

    return root


ELSEWHERE_RUN = (
    "pal_",
    "thin_",
    "decafa_",
    "controlled/monet",
    "controlled/rhls",
    "controlled/au_",
    "controlled/thin_digits",
)
"""Experiments that other tests run: tests/test_expression_experiments.py, tests/commands/test_reproduce*.py,
tests/models/decafa/test_experiments.py."""


QUICK = ("monet_bp4d", "au_transformer_disfa", "rhls_affwild2", "task_token_affwild2", "first_run")
"""Experiments of which the default tests run two batches, one of each kind; the others are slow tests."""


def quick_or_slow(names: Sequence[str], quick: Sequence[str]) -> list:
    """Return parameters of a test, of which those that are not quick are marked slow."""
    return [name if name in quick else pytest.param(name, marks=pytest.mark.slow) for name in names]


@pytest.mark.parametrize(
    "name", quick_or_slow([name for name in EXPERIMENTS if not name.startswith(ELSEWHERE_RUN)], QUICK)
)
def test_every_experiment_runs_two_batches(
    name: str,
    tmp_path: Path,
    drawn_trees: Callable[[str], Path],
    capsys: pytest.CaptureFixture[str],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    if name != "first_run":  # figures are slow, and tested elsewhere
        monkeypatch.setattr(figures, "write_run_figures", lambda *arguments: None)
    overrides = [
        f"experiment={name}", "debug=fast", "callbacks.progress=null", "trainer.enable_progress_bar=false",
        f"paths.output={tmp_path / 'run'}", f"paths.cache={tmp_path / 'cache'}", "compare=null",
    ]  # fmt: skip
    config = compose_config("train", overrides)
    if OmegaConf.is_missing(config.dataset, "root"):
        # Drawn faces in the dataset's own tree, whole: crops would have to be prepared first (tests/test_datasets.py).
        overrides += [f"dataset.root={drawn_trees(config.dataset.name)}", "prepare=none", "dataset.cropped=true"]
        overrides += ["logger=none", "bootstrap.resamples=0", "data.limit=16"]
        if "inception" in config.encoder.get("name", "") and name not in FULL_SIZE:
            overrides += ["encoder.name=test_resnet", "encoder.arguments={}"]
    train.run(compose_config("train", overrides))
    results = json.loads((tmp_path / "run" / "results.json").read_text())
    if results["reference"]:
        assert f"Reference: {results['reference']['paper']}" in capsys.readouterr().out


FULL_SIZE = ("monet_disfa",)
"""Experiments whose own backbone runs too; the others of its kind take a small one in its place."""

REFERENCE_KEYS = {"paper", "table", "metric", "values", "confidence"}
CONFIDENCES = ("found", "recalled-high", "recalled-medium", "recalled-low", "none")


@pytest.mark.parametrize("name", EXPERIMENTS)
def test_references_say_how_sure_they_are(name: str) -> None:
    config = compose_config("train", [f"experiment={name}"])
    reference = OmegaConf.to_container(config.reference) if config.reference else None
    if reference is None:
        return
    assert isinstance(reference, dict)
    assert REFERENCE_KEYS <= set(reference) <= REFERENCE_KEYS | {"status", "note"}
    assert reference["confidence"] in CONFIDENCES
    assert reference.get("status") in (None, "transfer")
    assert (reference["values"] is None) == (reference["confidence"] == "none")
    if reference["values"]:
        if "/" not in reference["metric"]:  # a task, whose whole numbers are listed
            assert reference["metric"] in config.task
            points = reference["metric"].startswith("landmarks")
            whole = {"nme", "fr/10", "auc/10"} if points else {"accuracy", "mean_class_accuracy", "macro_f1"}
            assert set(reference["values"]) <= whole
            return
        values = [value for key, value in reference["values"].items() if key != "mean"]
        assert abs(sum(values) / len(values) - reference["values"]["mean"]) < 1e-3
        outputs = [f"AU{au}" for au in labels.AU_SETS[config.dataset.aus]]
        assert list(reference["values"]) == [*outputs, "mean"]


def test_tasks_without_a_class_are_settings_of_an_experiment_that_are_not_used() -> None:
    config = compose_config("train", ["experiment=first_run", "task=[expression]", "dataset=faces"])
    assert set(assembly.build_tasks(config)) == {"expression"}
