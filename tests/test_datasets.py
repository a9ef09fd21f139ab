# SPDX-License-Identifier: Apache-2.0
"""Every dataset from its tree to its numbers: check, prepare, two batches of training, evaluation by its protocol.

Trees are those of ``affect synthesize layout=…``, commands run as a user types them. What is asserted can be told from
the tree that was written: rows and parts in the report of the check, labels beside the predictions, and the protocol's
headline, computed here once more from the predictions by other means.
"""

from __future__ import annotations

import json
import re
import shlex
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from sklearn.metrics import accuracy_score, f1_score

from affect.commands import configuration, figures
from affect.commands.main import main
from affect.commands.synthesize import Tree
from affect.data.check import part_counts
from affect.data.faces import FaceDials
from affect.data.table import FaceTable

COUNT = 36
DIALS = FaceDials(
    image_size=56, subjects=12, missing_au=0.1, missing_expression=0.1, missing_valence_arousal=0.2, au_rates=0.4
)
"""Drawn faces of twelve people, some cells without a label."""

TINY = (
    "debug=fast",
    "encoder=timm",
    "encoder.name=test_resnet",
    "encoder.image_size=32",
    "callbacks.progress=null",
    "trainer.enable_progress_bar=false",
    "logger=none",
)
"""Two batches of four through the smallest network."""

OWN_POINTS = "prepare.provider=annotations"


@dataclass(frozen=True)
class Case:
    """A dataset as it is delivered, and what its protocol gives.

    Attributes:
        name: Its configuration.
        tasks: Tasks to train.
        test: Official parts that test by its protocol; none where folds do.
        headline: Numbers that are printed first, with their terms.
        options: Settings of the dataset that change its tree.
        settings: What else stands on the command lines of ``prepare``, ``train`` and ``evaluate``.
        training: What stands on that of ``train`` alone.
        protocol: Name in the results; empty for that of the dataset.
        skipped: Why the reader leaves out something of the tree.
        subsets: Rows of the test part with numbers of their own.
    """

    name: str
    tasks: tuple[str, ...]
    test: tuple[str, ...]
    headline: Mapping[str, tuple[str, ...]]
    options: Mapping[str, Any] = field(default_factory=dict)
    settings: tuple[str, ...] = ()
    training: tuple[str, ...] = ()
    protocol: str = ""
    skipped: tuple[str, ...] = ()
    subsets: tuple[str, ...] = ()

    def __str__(self) -> str:
        chosen = [*self.options.values(), self.protocol]
        return "-".join([self.name, *(str(value) for value in chosen if isinstance(value, str) and value)])


AU = {"F1": ("au/f1/mean",)}
RAF = {"accuracy": ("expression/accuracy",), "mean class accuracy": ("expression/mean_class_accuracy",)}
ACCURACY = {"accuracy": ("expression/accuracy",)}
POINTS = {"NME": ("landmarks/nme",), "FR": ("landmarks/fr/10",), "AUC": ("landmarks/auc/10",)}
VA, EXPR, ABAW_AU = "valence_arousal/ccc/mean", "expression/macro_f1", "au/f1/mean"
ABAW = {"P_MTL": (VA, EXPR, ABAW_AU), "P_VA": (VA,), "P_EXPR": (EXPR,), "P_AU": (ABAW_AU,)}
MTL = ("au", "expression", "valence_arousal")
NO_CROP = ("label line without an image (no face was detected)",)
SIX = ("large_pose", "expression", "illumination", "make_up", "occlusion", "blur")

CASES = [
    Case("bp4d", ("au",), ("P3",), AU, settings=(OWN_POINTS,)),
    Case("bp4dplus", ("au",), ("fold1",), AU, settings=("prepare=box5",)),
    Case("disfa", ("au",), ("P3",), AU),
    Case(
        "disfa",
        ("au",),
        ("P1",),
        AU,
        options={"frames": "Images", "offset": 1},
        settings=("prepare=similarity49_200", OWN_POINTS),
        training=("protocol.test=P1",),
    ),
    Case("disfaplus", ("au",), (), AU),
    Case("rafdb", ("expression",), ("test",), RAF),
    Case("rafdb", ("expression",), ("test",), RAF, options={"pictures": "original"}, settings=("prepare=box",)),
    Case("rafdb_compound", ("expression",), ("test",), RAF),
    Case("affectnet", ("expression", "valence_arousal"), ("validation",), ACCURACY),
    Case(
        "affectnet", ("expression",), ("validation",), ACCURACY,
        settings=("protocol=affectnet7",), protocol="affectnet7",
    ),
    Case("affectnet_old", ("expression", "valence_arousal"), ("validation",), ACCURACY),
    Case("affwild2", MTL, ("validation",), ABAW, skipped=NO_CROP),
    Case("affwild2_va", ("valence_arousal",), ("validation",), {"P_VA": (VA,)}, skipped=NO_CROP),
    Case("affwild2_expr", ("expression",), ("validation",), {"P_EXPR": (EXPR,)}, skipped=NO_CROP),
    Case("affwild2_au", ("au",), ("validation",), {"P_AU": (ABAW_AU,)}, skipped=NO_CROP),
    Case("affwild2_mtl", MTL, ("validation",), ABAW),
    Case("fer2013", ("expression",), ("test",), ACCURACY),
    Case("ferplus", ("expression",), ("test",), ACCURACY, skipped=("not a face (no image name)",)),
    Case("300w", ("landmarks",), ("common", "challenge"), POINTS, subsets=("common", "challenge")),
    Case("wflw", ("landmarks",), ("test",), POINTS, settings=("task.landmarks.scheme=98",), subsets=SIX),
    Case("celeba", ("attributes",), ("test",), {"mean accuracy": ("attributes/accuracy/mean",)}),
    Case(
        "celeba",
        ("landmarks",),
        ("test",),
        {"NME": ("landmarks/nme",)},
        options={"pictures": "wild"},
        settings=("prepare=box", "task.landmarks.scheme=5"),
    ),
]  # fmt: skip

PROTOCOLS = {"affwild2": "abaw_mtl", "affwild2_va": "abaw_va", "affwild2_expr": "abaw_expr"}
PROTOCOLS |= {"affwild2_au": "abaw_au", "affwild2_mtl": "abaw_mtl"}
PROTOCOLS |= {"affectnet": "affectnet8", "affectnet_old": "affectnet8"}


def test_every_dataset_that_can_be_written_is_here() -> None:
    from tests.commands.test_synthesize import layouts

    assert set(layouts()) == {case.name for case in CASES}


@pytest.fixture(autouse=True)
def away(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Work in an empty folder, and draw no pictures but where a test asks: they take longer than all the rest."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(figures, "write_run_figures", lambda *parts: None)


def affect(*words: str) -> None:
    assert main(list(words)) == 0, shlex.join(words)


def write_tree(name: str, options: Mapping[str, Any] = {}) -> FaceTable:
    """Write a dataset's tree into the folder of its name and return what was written."""
    return Tree.of(name, Path(name), options).write(DIALS, 0, COUNT)


def read_json(path: str | Path) -> dict[str, Any]:
    return json.loads(Path(path).read_text())


# ------------------------------------------------------------------------------------------- the numbers once more


def values(table: FaceTable, column: str) -> tuple[np.ndarray, np.ndarray]:
    """Return predicted and true numbers of a column where both are there."""
    found, valid = table.numbers(column)
    wanted, labelled = table.numbers(f"target_{column}")
    return found[valid & labelled].astype(np.float64), wanted[valid & labelled].astype(np.float64)


def predicted(table: FaceTable, start: str) -> list[str]:
    return sorted(name for name in table.names if name.startswith(start) and f"target_{name}" in table.names)


def concordance(found: np.ndarray, wanted: np.ndarray) -> float:
    covariance = np.cov(found, wanted, bias=True)
    return 2 * covariance[0, 1] / (covariance.trace() + (found.mean() - wanted.mean()) ** 2)


def binary(table: FaceTable, start: str, end: str, score: Any) -> float:
    columns = [column for column in predicted(table, start) if column.endswith(end)]
    pairs = [values(table, column) for column in columns]
    return float(np.mean([score(wanted, found >= 0.5) for found, wanted in pairs if len(wanted)]))


def errors_of_points(table: FaceTable) -> np.ndarray:
    """Return the normalised mean error of each face in per cent."""
    [column] = predicted(table, "landmarks_")
    scheme = column.removeprefix("landmarks_")
    found, wanted = (table.numbers(name)[0].reshape(len(table), -1, 2) for name in (column, f"target_{column}"))
    left, right = {"68": (36, 45), "98": (60, 72), "5": (0, 1)}[scheme]
    distance = np.linalg.norm(wanted[:, left] - wanted[:, right], axis=1)
    return 100 * np.linalg.norm(found - wanted, axis=2).mean(1) / distance


def number(table: FaceTable, term: str) -> float:
    """Return a number of the literature from a table of predictions."""
    if term.startswith("expression/"):
        found, wanted = (table.strings(name)[0] for name in ("expression", "target_expression"))
        labelled = table.strings("target_expression")[1]
        found, wanted = found[labelled].astype(str), wanted[labelled].astype(str)
        if term == "expression/accuracy":
            return float(accuracy_score(wanted, found))
        if term == "expression/mean_class_accuracy":
            return float(np.mean([(found[wanted == one] == one).mean() for one in np.unique(wanted)]))
        classes = [name.removeprefix("expression_") for name in table.names if name.startswith("expression_")]
        return float(f1_score(wanted, found, labels=classes, average="macro", zero_division=0))
    if term == "au/f1/mean":
        return binary(table, "au", "_occurrence", lambda wanted, found: f1_score(wanted, found, zero_division=0))
    if term == "attributes/accuracy/mean":
        return binary(table, "attribute_", "", accuracy_score)
    if term == "valence_arousal/ccc/mean":
        return float(np.mean([concordance(*values(table, column)) for column in ("valence", "arousal")]))
    errors = errors_of_points(table)
    if term == "landmarks/nme":
        return float(errors.mean())
    threshold = float(term.rpartition("/")[2])
    if term.startswith("landmarks/fr/"):
        return float((errors > threshold).mean())
    return float(np.maximum(0, 1 - errors / threshold).mean())


def require_headline(results: Mapping[str, Any], predictions: FaceTable, headline: Mapping[str, tuple]) -> None:
    records = {record["name"]: record for record in results["headline"]}
    assert list(records) == list(headline)
    for name, terms in headline.items():
        assert records[name]["terms"] == list(terms)
        expected = sum(number(predictions, term) for term in terms)
        assert records[name]["value"] == pytest.approx(expected, abs=1e-4), name


def require_labels(predictions: FaceTable, written: FaceTable, moved: bool) -> None:
    """Assert that labels beside predictions are those of the tree, cell by cell, gaps included.

    Args:
        predictions: Table of predictions.
        written: What was written.
        moved: Whether points are those in stored crops, so that they are others.
    """
    rows = predictions.numbers("row")[0].astype(int)
    targets = [name.removeprefix("target_") for name in predictions.names if name.startswith("target_")]
    assert targets
    for name in targets:
        if name == "expression":
            there = written.column(name).to_pylist()
            assert predictions.column("target_expression").to_pylist() == [there[row] for row in rows]
        elif name in written.names and not (moved and name.startswith("landmarks_")):
            found, valid = predictions.numbers(f"target_{name}")
            wanted, labelled = written.numbers(name, rows)
            np.testing.assert_array_equal(valid, labelled, name)
            np.testing.assert_allclose(found[valid], wanted[labelled], atol=0.01, err_msg=name)


# ------------------------------------------------------------------------------------------------------------ tests


QUICK = ("bp4d", "disfa", "rafdb", "affectnet", "affwild2", "ferplus", "300w", "celeba")
"""Cases that the default tests run, one for each kind of labels and of delivery; the others are slow tests."""


@pytest.mark.parametrize(
    "case", [case if str(case) in QUICK else pytest.param(case, marks=pytest.mark.slow) for case in CASES], ids=str
)
def test_from_the_tree_to_the_protocols_numbers(case: Case, capsys: pytest.CaptureFixture[str]) -> None:
    written = write_tree(case.name, case.options)
    dataset = [f"dataset={case.name}", f"dataset.root={case.name}"]
    dataset += [f"dataset.{key}={value}" for key, value in case.options.items()]
    config = configuration.compose("train", [*dataset, *case.settings])

    capsys.readouterr()
    affect("check", *dataset, "report=check.json", "sheet=false")
    report, following = read_json("check.json"), following_command(capsys)
    assert report["ok"]
    assert report["synthetic"]
    assert report["rows"] == len(written)
    assert report["parts"] == part_counts(written, config.dataset.group)
    assert tuple(report["skipped"]) == case.skipped
    assert not report["images"]["problems"]

    training = ["train", *dataset, *case.settings, *case.training, f"task=[{','.join(case.tasks)}]", *TINY]
    training += ["paths.output=run"]
    stored = bool(config.prepare.get("stored"))
    if stored:
        capsys.readouterr()
        assert main(training) == 2, "crops that are not there"
        [command] = re.findall(r"run: affect (prepare .*)", capsys.readouterr().err)
        assert following == ["prepare", *dataset]
        affect(*shlex.split(command), "workers=0")
        following = following_command(capsys)
        [prepared] = [FaceTable.open(path) for path in Path("prepared").rglob("table-*.arrow")]
        assert prepared.column("source_image").to_pylist() == written.column("image").to_pylist()
        assert prepared.metadata["faces"]["found"] >= 0.8 * len(written)

    assert following[:3] == training[:3], "what the command before says is next"
    if not case.settings and not case.training:
        training[1 : -len(TINY) - 1] = following[1:]
    affect(*training)
    results, predictions = read_json("run/results.json"), FaceTable.read_parquet(Path("run/predictions/test.parquet"))
    assert results["protocol"]["name"] == (case.protocol or PROTOCOLS.get(case.name, case.name))
    assert results["selection"]["rule"] == "best_val"
    assert results["data"]["parts"]["train"]["rows"] == 8, "two batches of four"
    tested, selected = (
        {str(part) for part in written.column("part").take(rows(name)).to_pylist()} if case.test else set()
        for name in ("test", "validation")
    )
    assert tested <= set(case.test)
    assert not selected & set(case.test), "what is tested on selects"
    require_labels(predictions, written, stored)
    require_headline(results, predictions, case.headline)
    subsets = {record["subgroup"] for record in results["metrics"]["test"]} - {None}
    assert subsets == {name for name in case.subsets if predictions.numbers(f"subset_{name}")[0].any()}
    assert bool(subsets) == bool(case.subsets)

    affect("evaluate", "checkpoint=run", "out=again")
    again = read_json("again/results.json")
    values = [[record["value"] for record in one["headline"]] for one in (again, results)]
    assert values[0] == pytest.approx(values[1], abs=1e-5)
    assert again["protocol"]["name"] == results["protocol"]["name"]


def following_command(capsys: pytest.CaptureFixture[str]) -> list[str]:
    """Return the words of the command that the one before names."""
    [line] = re.findall(r"^next: affect (.*)$", capsys.readouterr().out, re.MULTILINE)
    return shlex.split(line)


def rows(part: str) -> np.ndarray:
    return FaceTable.read_parquet(Path(f"run/predictions/{part}.parquet")).numbers("row")[0].astype(int)


def test_two_datasets_train_one_model_with_masks() -> None:
    """Action units come from one set, valence and arousal from the other; each is tested by its own protocol."""
    trees = {name: write_tree(name) for name in ("bp4d", "affwild2")}
    affect("prepare", "dataset=bp4d", "dataset.root=bp4d", OWN_POINTS, "workers=0")
    shared = ["dataset=[bp4d,affwild2]", "dataset.sources.bp4d.prepare.provider=annotations"]
    shared += [f"dataset.sources.{name}.root={name}" for name in trees]
    affect("train", *shared, "task=[au,valence_arousal]", *TINY, "paths.output=run", "data.limit=null")
    results, predictions = read_json("run/results.json"), FaceTable.read_parquet(Path("run/predictions/test.parquet"))
    sources = predictions.strings("source")[0]
    assert set(sources) == set(trees)
    assert {source["name"] for source in results["data"]["sources"]} == set(trees)
    for name, part in (("bp4d", "P3"), ("affwild2", "validation")):
        own = predictions.take(np.flatnonzero(sources == name))
        there = trees[name].column("part").to_pylist()
        assert sorted(own.numbers("row")[0].astype(int)) == [k for k, one in enumerate(there) if one == part]
        labelled = {column.removeprefix("target_") for column in own.names if column.startswith("target_")}
        missing = labelled - trees[name].names
        assert missing, "each set lacks something that the other has"
        assert not any(own.numbers(f"target_{column}")[1].any() for column in missing)
        require_labels(own, trees[name], moved=True)
    for source, foreign in (("bp4d", "valence"), ("affwild2", "au14_occurrence")):
        rows_of = predictions.take(np.flatnonzero(sources == source))
        assert rows_of.numbers(foreign)[1].all(), "the one model still predicts what this set does not label"
    # Either half again by itself.
    affect("evaluate", "checkpoint=run", "dataset=affwild2", "dataset.root=affwild2", "out=again")
    again = FaceTable.read_parquet(Path("again/predictions/test.parquet"))
    half = predictions.take(np.flatnonzero(sources == "affwild2"))
    assert again.column("image").to_pylist() == half.column("image").to_pylist()
    np.testing.assert_allclose(again.numbers("valence")[0], half.numbers("valence")[0], atol=1e-5)


def test_settings_of_a_dataset_last_to_the_training(capsys: pytest.CaptureFixture[str]) -> None:
    """CelebA without its file of identities, which is given on request: images are the groups."""
    write_tree("celeba")
    Path("celeba/Anno/identity_CelebA.txt").unlink()
    settings = ["dataset=celeba", "dataset.root=celeba", "dataset.group=image", "dataset.identities=false"]
    affect("check", *settings, "sheet=false")
    following = following_command(capsys)
    assert following == ["train", *settings, "task=[attributes]"]
    affect(*following, *TINY, "paths.output=run")
    assert read_json("run/results.json")["data"]["sources"][0]["group"] == "image"
