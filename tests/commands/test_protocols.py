# SPDX-License-Identifier: Apache-2.0
"""The protocols of ``conf/protocol``: complete, buildable, and with headlines that the tasks of ``conf/task`` give."""

from __future__ import annotations

import fnmatch
from pathlib import Path

import numpy as np
import pytest
from omegaconf import OmegaConf

from affect import labels
from affect.commands import assembly, inference, train
from affect.commands.configuration import compose, config_directory
from affect.data.datamodule import FaceDataModule
from affect.data.images import Source
from affect.data.protocol import Protocol, assign
from affect.data.table import FaceTable
from affect.data.transforms import FaceTransform
from affect.errors import ConfigError
from affect.tasks import Expression
from tests.data import samples

FOLDER = config_directory() / "protocol"
NAMES = sorted(path.stem for path in FOLDER.glob("*.yaml"))
PUBLISHED = {
    "bp4d": "P3", "bp4dplus": "fold1", "disfa": "P3", "disfa_classic": "P3", "disfa_intensity": "P3",
    "affectnet7": "validation", "affectnet8": "validation", "abaw_va": "validation", "abaw_expr": "validation",
    "abaw_au": "validation", "abaw_mtl": "validation", "300w": ["common", "challenge"], "wflw": "test",
    "celeba": "test", "fer2013": "test", "ferplus": "test", "rafdb": None, "rafdb_compound": None, "disfaplus": None,
    "default": None,
}  # fmt: skip
"""Test part of each protocol; None leaves it to the column ``part``."""


def leaf(name: str) -> dict:
    return OmegaConf.to_container(OmegaConf.load(FOLDER / f"{name}.yaml"))


def test_there_is_one_for_each_published_set() -> None:
    assert set(PUBLISHED) <= set(NAMES)


@pytest.mark.parametrize("name", NAMES)
def test_every_protocol_lists_every_key_and_builds(name: str) -> None:
    node = leaf(name)
    assert list(node) == list(leaf("default")), "the same keys in the same order"
    assert node["name"] == name
    assert Protocol(**node).selection == "best_val"
    assert node["test"] == PUBLISHED.get(name, node["test"])
    assert (FOLDER / f"{name}.yaml").read_text().startswith("# ")


@pytest.mark.parametrize("name", [name for name in NAMES if leaf(name)["headline"]])
def test_headlines_are_numbers_that_tasks_give(name: str) -> None:
    headline = leaf(name)["headline"]
    chosen = sorted({term.partition("/")[0].rstrip("*") for terms in headline.values() for term in terms})
    tasks = assembly.build_tasks(compose("train", [f"task=[{','.join(chosen)}]", f"protocol={name}"]))
    for task in tasks.values():
        for metric in task.metrics:
            metric.bind(task.outputs or ("first", "second"))
    resolved, left_out = inference.resolve_headline(headline, tasks)
    assert set(resolved) == set(headline)
    assert not left_out
    for terms, found in zip(headline.values(), resolved.values(), strict=True):
        for term, (task, number) in zip(terms, found, strict=True):
            assert fnmatch.fnmatch(f"{task}/{number}", term)


def test_the_challenges_sums_are_those_of_the_papers() -> None:
    assert leaf("abaw_mtl")["headline"]["P_MTL"] == ["valence_arousal/ccc/mean", "expression/macro_f1", "au/f1/mean"]
    assert leaf("abaw_va")["headline"] == {"P_VA": ["valence_arousal/ccc/mean"]}
    assert leaf("rafdb")["headline"]["accuracy"] == ["expression/accuracy"]


def test_the_threshold_of_a_failure_rate_is_that_of_the_task() -> None:
    config = compose("train", ["task=[landmarks]", "protocol=300w", "task.landmarks.metrics.alignment.threshold=8.0"])
    tasks = assembly.build_tasks(config)
    tasks["landmarks"].metrics[0].bind(tasks["landmarks"].outputs)
    resolved, _ = inference.resolve_headline(leaf("300w")["headline"], tasks)
    assert resolved["FR"] == [("landmarks", "fr/8")]
    with pytest.raises(ConfigError, match=r"protocol.headline.FR: landmarks/fr/10: no such number; did you mean fr/8"):
        inference.resolve_headline({"FR": ["landmarks/fr/10"]}, tasks)


@pytest.mark.parametrize(
    ("protocol", "names", "expected"),
    [
        (
            "wflw",
            ["landmarks_98"],
            {"NME": "landmarks_98/nme", "FR": "landmarks_98/fr/10", "AUC": "landmarks_98/auc/10"},
        ),
        (
            "300w",
            ["landmarks_68"],
            {"NME": "landmarks_68/nme", "FR": "landmarks_68/fr/10", "AUC": "landmarks_68/auc/10"},
        ),
        ("celeba", ["landmarks_5"], {"NME": "landmarks_5/nme"}),
        (
            "celeba",
            ["landmarks_68", "landmarks_5"],
            {"NME of landmarks_68": "landmarks_68/nme", "NME of landmarks_5": "landmarks_5/nme"},
        ),
    ],
)
def test_points_have_their_headline_whatever_their_task_is_called(
    protocol: str, names: list[str], expected: dict[str, str]
) -> None:
    tasks = assembly.build_tasks(compose("train", [f"task=[{','.join(names)}]", f"protocol={protocol}"]))
    for task in tasks.values():
        task.metrics[0].bind(task.outputs)
    resolved, left_out = inference.resolve_headline(leaf(protocol)["headline"], tasks)
    assert {name: "/".join(*terms) for name, terms in resolved.items()} == expected
    assert left_out == ["headline mean accuracy is left out: task attributes is not selected"] * (protocol == "celeba")


def test_patterns_of_tasks_that_do_not_help_are_said() -> None:
    tasks = assembly.build_tasks(compose("train", ["task=[expression]"]))
    resolved, left_out = inference.resolve_headline(leaf("wflw")["headline"], tasks)
    assert not resolved
    assert left_out[0] == "headline NME is left out: task landmarks* is not selected"
    with pytest.raises(ConfigError, match=r"a\* and b\*: one pattern of tasks at most"):
        inference.resolve_headline({"both": ["a*/x", "b*/x"]}, tasks)


def test_the_six_subsets_of_wflw_are_columns_of_attributes() -> None:
    names = ("large_pose", "expression", "illumination", "make_up", "occlusion", "blur")
    assert leaf("wflw")["subsets"] == {name: f"attribute_{name}" for name in names}


def test_a_subset_may_be_a_value_of_a_column() -> None:
    table = FaceTable.from_columns(
        {"image": list("abc"), "part": ["common", None, "challenge"], "flag": [1.0, None, 0.0]}
    )
    rows = np.array([2, 0, 1])
    assert inference.subset_rows(table, "part=challenge", rows).tolist() == [True, False, False]
    assert inference.subset_rows(table, "flag", rows).tolist() == [False, True, False]
    assert not inference.subset_rows(table, "absent", rows).any()


def affectnet(count: int = 160) -> Source:
    classes = labels.EXPRESSION_ORDERS["affectnet8"]
    columns = {
        "image": [f"{k}.jpg" for k in range(count)],
        "expression": [classes[k % 8] for k in range(count)],
        "part": ["train" if k < 3 * count // 4 else "validation" for k in range(count)],
    }
    table = FaceTable.from_columns(columns, metadata={"dataset": "affectnet", "expressions": list(classes)})
    return Source("affectnet", table, samples.DrawnImages(), group="image", stratify="expression")


def module(protocol: Protocol, task: Expression) -> FaceDataModule:
    plain = FaceTransform(size=32)
    return FaceDataModule([affectnet()], {"expression": task}, protocol, plain, plain)


@pytest.mark.parametrize("classes", ["affectnet8", "affectnet7", None])
def test_seven_classes_of_affectnet_are_rows_and_outputs_without_contempt(classes: str | None) -> None:
    task = Expression(classes=classes)
    data = module(Protocol(**leaf("affectnet7")), task)
    train.leave_out_classes(data)
    data.setup("fit")
    assert task.outputs == labels.EXPRESSION_ORDERS["affectnet7"]
    rows = np.concatenate([data.part_rows(part)[0] for part in ("train", "validation", "test")])
    assert len(rows) == 140
    assert "contempt" not in set(data.sources[0].table.strings("expression", rows)[0])
    skipped = data.summary()["skipped"]
    assert [count for reason, count in skipped.items() if reason.startswith("expression is none of neutral")] == [20]


def test_a_model_that_knows_contempt_is_not_asked_for_it() -> None:
    task = Expression(classes="affectnet8")
    data = module(Protocol(**leaf("affectnet7")), task)
    data.setup("test")
    mask = task.encode(data.sources[0].table, data.part_rows("test")[0]).mask
    assert mask.all(0).tolist() == [True] * 7 + [False]


def test_the_official_validation_set_tests_and_images_are_held_out_of_training() -> None:
    source = affectnet()
    rows = assign(source, Protocol(**leaf("affectnet8")))
    parts = {part: set(source.table.strings("part", chosen)[0]) for part, chosen in rows.items()}
    assert parts == {"train": {"train"}, "validation": {"train"}, "test": {"validation"}}


def test_the_folder_of_a_run_names_all_its_test_parts() -> None:
    from affect.commands.run_folder import resolve_output

    assert resolve_output(compose("train", ["protocol=300w"])).parts[-3] == "faces-common+challenge"
    assert Path(resolve_output(compose("train", ["protocol=bp4d"]))).parts[-3] == "faces-P3"
