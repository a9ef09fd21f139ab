# SPDX-License-Identifier: Apache-2.0
"""A predictions table says of every row what the run knew of it: possible classes, groups, subgroups and origin."""

from __future__ import annotations

import numpy as np
import pytest
import torch

from affect.commands.inference import encode_truth, predict_values, predictions_table, table_metrics
from affect.data.batch import FaceBatch
from affect.data.dataset import FaceDataset
from affect.data.images import Source
from affect.data.table import FaceTable
from affect.data.transforms import FaceTransform
from affect.errors import ConfigError
from affect.metrics import Classification
from affect.tasks import AUOccurrence, Coefficients, Expression, HeadPose
from tests.data import samples
from tests.data.test_dataset import rolled

CLASSES = ("neutral", "happiness", "contempt")


def source(name: str, expressions: list[str | None], known: list[str], **columns: list) -> Source:
    images = [f"{k}.png" for k in range(len(expressions))]
    table = FaceTable.from_columns(
        {"image": images, "expression": expressions, **columns}, f"/data/{name}", {"expressions": known}
    )
    return Source(name, table, samples.DrawnImages())


def expression() -> Expression:
    task = Expression(CLASSES, metrics=[Classification()])
    for metric in task.metrics:
        metric.bind(task.outputs)
    return task


# The largest value is contempt's in every row; among the classes of the first source each row is right.
VALUES = np.array([[0.4, 0.1, 0.5], [0.1, 0.4, 0.5], [0.4, 0.1, 0.5]], np.float32)


def test_a_class_that_the_source_cannot_label_is_no_error() -> None:
    faces = source("plain", ["neutral", "happiness", "neutral"], ["neutral", "happiness"])
    tasks = {"expression": expression()}
    table = predictions_table([faces], tasks, {"expression": VALUES}, np.zeros(3, int), np.arange(3))
    assert encode_truth(table, tasks["expression"]).mask.tolist() == [[True, True, False]] * 3
    assert {r["name"]: r["value"] for r in table_metrics(table, tasks, resamples=0)}["accuracy"] == 1.0


def test_each_row_has_the_classes_of_its_own_source(tmp_path) -> None:
    plain = source("plain", ["neutral", "happiness"], ["neutral", "happiness"])
    full = source("full", ["contempt", None], list(CLASSES))
    tasks = {"expression": expression()}
    table = predictions_table([plain, full], tasks, {"expression": VALUES}, np.array([0, 1, 0]), np.array([0, 0, 1]))
    table.to_parquet(tmp_path / "test.parquet")
    again = FaceTable.read_parquet(tmp_path / "test.parquet")
    encoded = encode_truth(again, tasks["expression"])
    assert encoded.mask.tolist() == [[True, True, False], [True] * 3, [True, True, False]]
    assert encoded.target.argmax(1).tolist() == [0, 2, 1]
    assert again.metadata["roots"] == {"plain": "/data/plain", "full": "/data/full"}


def test_subgroups_leave_predictions_alone() -> None:
    faces = source("plain", ["neutral", "happiness", "neutral"], ["neutral", "happiness"])
    tasks = {"expression": expression()}
    arguments = ([faces], tasks, {"expression": VALUES}, np.zeros(3, int), np.arange(3))
    table = predictions_table(*arguments, group_by=["expression"])
    assert table.strings("expression")[0].tolist() == ["contempt"] * 3
    assert table.strings("by_expression")[0].tolist() == ["neutral", "happiness", "neutral"]
    records = table_metrics(table, tasks, resamples=0, group_by=["expression"])
    assert {r["subgroup"] for r in records} == {None, "expression=neutral", "expression=happiness"}


def test_two_predictions_of_one_column_are_refused() -> None:
    faces = source("plain", ["neutral"], ["neutral", "happiness"], au01_occurrence=[1.0])
    tasks = {"a": AUOccurrence([1]), "b": AUOccurrence([1])}
    values = {name: np.ones((1, 1), np.float32) for name in tasks}
    with pytest.raises(ConfigError, match="tasks a and b both predict column au01_occurrence"):
        predictions_table([faces], tasks, values, np.zeros(1, int), np.zeros(1, int))
    taken = {"a": Coefficients(["group"])}
    with pytest.raises(ConfigError, match="a task predicts column group"):
        predictions_table([faces], taken, values, np.zeros(1, int), np.zeros(1, int))


def test_groups_are_those_of_the_split() -> None:
    one = source("one", ["neutral"] * 3, ["neutral"], subject=["x", None, None])
    two = source("two", ["neutral"] * 3, ["neutral"], subject=["x", "y", None])
    tasks = {"expression": expression()}
    alone = predictions_table([one], tasks, {"expression": VALUES}, np.zeros(3, int), np.arange(3))
    assert alone.strings("group")[0].tolist() == ["x", "1.png", "2.png"]
    both = predictions_table([one, two], tasks, {"expression": VALUES}, np.array([0, 1, 1]), np.array([0, 0, 2]))
    assert both.strings("group")[0].tolist() == ["one/x", "two/x", "two/2.png"]


class _TrueModule(torch.nn.Module):
    """A stand-in for a model that is always right about what it sees."""

    def __init__(self, tasks: dict) -> None:
        super().__init__()
        self.tasks = tasks

    def predict_step(self, batch: FaceBatch) -> dict[str, torch.Tensor]:
        return batch.targets


def test_predicted_roll_is_that_of_the_stored_image() -> None:
    faces = rolled(35.0)
    task = HeadPose()
    task.bind([faces.table])
    data = FaceDataset([faces], [np.arange(4)], {"pose": task}, FaceTransform(32))
    found, _, _ = predict_values(_TrueModule(data.tasks), [data.batch(0, np.arange(4))], torch.device("cpu"), "test")
    np.testing.assert_allclose(found["pose"][:, 2], 35.0, atol=1e-3)
    assert np.abs(data.batch(0, np.arange(4)).targets["pose"][:, 2].numpy()).max() < 3
