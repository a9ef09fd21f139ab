# SPDX-License-Identifier: Apache-2.0
"""Categories: values of a column as classes, bins of numbers, mirrored images, and what is masked or refused."""

from __future__ import annotations

import numpy as np
import pytest
import torch

from affect import losses, metrics
from affect.commands.inference import predictions_table, table_metrics
from affect.data.datamodule import count_labels, require_variety
from affect.data.images import Source
from affect.data.table import FaceTable
from affect.errors import ConfigError, DataError
from affect.tasks import Category


def table(**columns: object) -> FaceTable:
    count = len(next(iter(columns.values())))  # type: ignore[arg-type]
    return FaceTable.from_columns({"image": [f"{k}.png" for k in range(count)], **columns})


def bound(source: FaceTable, column: str, **arguments) -> Category:
    task = Category(column, **arguments)
    task.bind([source])
    return task


def test_classes_are_the_values_of_the_tables_sorted_and_missing_ones_are_masked():
    first, second = table(subject=["s2", None, "s1"]), table(subject=["s3", "s1"])
    task = Category("subject")
    task.bind([first, second])
    assert task.outputs == ("s1", "s2", "s3")
    target, mask = task.encode(first)
    assert target.tolist() == [[0, 1, 0], [0, 0, 0], [1, 0, 0]]
    assert mask.tolist() == [[True] * 3, [False] * 3, [True] * 3]
    assert target.dtype == np.float32
    part = task.encode(first, np.array([2, 0]))
    assert np.array_equal(part.target, target[[2, 0]])


@pytest.mark.parametrize(
    ("values", "names"),
    [
        ([10, 9, 2], ("2", "9", "10")),
        ([1.0, 0.0, None], ("0", "1")),
        ([True, False, True], ("false", "true")),
        (["b", "10", "9"], ("9", "10", "b")),
    ],
)
def test_any_type_of_column_has_classes_and_numbers_are_sorted_by_size(values, names):
    source = table(camera=values)
    task = bound(source, "camera")
    assert task.outputs == names
    assert task.encode(source).mask.all(1).tolist() == [value is not None for value in values]


@pytest.mark.parametrize("values", [[-3.5, 12.25, None], np.array([1, 2, 2.5], np.float32)])
def test_measurements_are_no_classes_unless_bins_or_names_say_how(values):
    source = table(yaw=values)
    with pytest.raises(ConfigError, match=r"column yaw .*fractions.*task\.<name>\.bins"):
        bound(source, "yaw")
    with pytest.raises(ConfigError, match=r"column yaw .*task\.<name>\.bins"):
        Category("yaw").bind([table(yaw=[0.0, 1.0]), source])
    assert bound(source, "yaw", bins=[-90, 2, 90]).num_outputs == 2
    assert bound(source, "yaw", classes=["2.5", "12.25"]).encode(source).mask.any()
    assert bound(table(yaw=["1.5", "2"]), "yaw").outputs == ("1.5", "2")  # text names groups


def test_not_a_number_is_missing():
    source = table(age=np.array([1.0, np.nan, 2.0], np.float32))
    assert bound(source, "age").outputs == ("1", "2")
    assert bound(source, "age").encode(source).mask[:, 0].tolist() == [True, False, True]
    assert bound(source, "age", bins=[0, 1.5, 3]).encode(source).mask[:, 0].tolist() == [True, False, True]


def test_bins_are_closed_on_the_left_and_the_last_one_on_both_sides():
    source = table(pose_yaw=[-90.0, -30.0, 29.99, 30.0, 90.0, 90.01, -91.0, None])
    task = bound(source, "pose_yaw", bins=[-90, -30, 30, 90])
    assert task.outputs == ("-90 to -30", "-30 to 30", "30 to 90")
    target, mask = task.encode(source)
    assert target[:5].argmax(1).tolist() == [0, 1, 1, 2, 2]
    assert mask[:, 0].tolist() == [True] * 5 + [False] * 3
    assert task.notes(source) == ["2 rows have a pose_yaw outside [-90, 90] and no label"]


def test_a_mirror_changes_the_sign_of_the_yaw():
    source = table(pose_yaw=[-60.0, -10.0, 60.0, None])
    task = bound(source, "pose_yaw", bins=[-90, -30, 0, 30, 90])
    encoded = task.encode(source)
    mirrored = task.flip(encoded)
    assert mirrored.target.argmax(1)[:3].tolist() == [3, 2, 0]
    assert np.array_equal(mirrored.mask, encoded.mask)
    back = task.flip(mirrored)
    assert np.array_equal(back.target, encoded.target)


def test_a_bin_without_a_mirror_image_has_no_label_in_a_mirrored_image():
    source = table(pose_yaw=[-60.0, -10.0, 10.0])
    mirrored = (task := bound(source, "pose_yaw", bins=[-90, -30, 0, 30])).flip(task.encode(source))
    assert mirrored.mask[:, 0].tolist() == [False, True, True]
    assert mirrored.target.tolist() == [[0, 0, 0], [0, 0, 1], [0, 1, 0]]


def test_a_mirror_by_name_exchanges_classes_and_others_stay():
    source = table(side=["left", "right", "front"])
    task = bound(source, "side", mirror={"left": "right"})
    target = task.flip(task.encode(source)).target
    assert [task.outputs[k] for k in target.argmax(1)] == ["right", "left", "front"]
    plain = bound(source, "side")
    assert np.array_equal(plain.flip(plain.encode(source)).target, plain.encode(source).target)
    with pytest.raises(ConfigError, match="no class 'up'"):
        Category("side", classes=["left", "right"], mirror={"left": "up"})


def test_predictions_are_written_and_read_beside_the_column_itself():
    source = table(subject=["s1", "s 2", "s1"])
    task = bound(source, "subject")
    values = torch.randn(3, 2).softmax(1).numpy()
    columns = task.decode(values)
    assert columns["category_subject"].tolist() == [task.outputs[k] for k in values.argmax(1)]
    assert "subject" not in columns
    found = task.read_values(FaceTable.from_columns({"image": ["a", "b", "c"], **columns}))
    assert np.array_equal(found, values)
    torch.testing.assert_close(task.predict(torch.zeros(1, 2)), torch.full((1, 2), 0.5))


def test_metrics_follow_from_a_predictions_table():
    source = table(subject=["s1", "s2", "s1", None])
    task = Category("subject", metrics=[metrics.Classification()])
    task.bind([source])
    values = np.array([[0.9, 0.1], [0.8, 0.2], [0.7, 0.3], [0.5, 0.5]], np.float32)
    where = np.arange(4)
    stored = predictions_table(
        [Source("made", source, None, "image")], {"who": task}, {"who": values}, np.zeros(4, int), where
    )
    assert list(stored.metadata["expressions"]) == []
    records = table_metrics(stored, {"who": task}, resamples=0)
    assert next(r["value"] for r in records if r["name"] == "accuracy") == pytest.approx(2 / 3)


def test_a_release_names_the_classes():
    source = table(subject=["s2", "s1"], pose_yaw=[0.0, 1.0])
    task = bound(source, "subject")
    assert Category("subject", **task.vocabulary()).outputs == task.outputs
    binned = bound(source, "pose_yaw", bins=[-1, 0.5, 2])
    assert Category("pose_yaw", bins=[-1, 0.5, 2], **binned.vocabulary()).outputs == binned.outputs


def test_values_that_are_no_class_are_masked_and_counted():
    source = table(subject=["s1", "s2", "s9", "s10"])
    task = bound(source, "subject", classes=["s1", "s2"])
    assert task.encode(source).mask[:, 0].tolist() == [True, True, False, False]
    assert task.notes(source) == ["2 rows have a subject that is no class of the task (s10, s9) and no label"]


def test_a_table_without_the_column_is_masked():
    source, other = table(subject=["s1", "s2"]), table(expression=["fear"])
    task = Category("subject")
    task.bind([source, other])
    assert not task.encode(other).mask.any()
    assert task.encode(other).target.shape == (1, 2)
    assert task.notes(other) == []


def test_one_value_only_is_an_error_that_names_it():
    source = table(subject=["s1", "s1", None])
    task = bound(source, "subject", loss=losses.CrossEntropy())
    rows = [np.arange(3)]
    counts = count_labels(task, [Source("made", source, None, "image")], rows)
    with pytest.raises(DataError, match="task who: all training labels are s1; at least two classes are needed"):
        require_variety("who", task, counts)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"bins": [0, 1]}, "at least three edges"),
        ({"bins": [0, 2, 1]}, "that rise"),
        ({"bins": [0, 1, 2], "classes": ["low", "high"]}, "give one or the other"),
        ({"classes": ["a", "a"]}, "name each class once"),
    ],
)
def test_arguments_that_do_not_fit(arguments, message):
    with pytest.raises(ConfigError, match=message):
        Category("age", **arguments)


def test_columns_that_cannot_be_classes():
    with pytest.raises(ConfigError, match="pose_roll"):
        Category("pose_roll", bins=[-90, 0, 90])
    with pytest.raises(DataError, match="the column subjet is in no table"):
        bound(table(subject=["s1"]), "subjet")
    with pytest.raises(DataError, match="holds no value"):
        bound(table(subject=pa_nulls()), "subject")
    with pytest.raises(DataError, match="more than a softmax can have"):
        bound(table(score=np.arange(20_001, dtype=np.int64)), "score")
    task = bound(table(subject=["s1"]), "subject", bins=[0, 1, 2])
    with pytest.raises(DataError, match="subject"):
        task.check(table(subject=["s1"]))
    with pytest.raises(ConfigError, match=r"needs task.<name>.column=…; the tables have image, subject"):
        bound(table(subject=["s1"]), None)


def pa_nulls():
    import pyarrow as pa

    return pa.array([None, None], pa.string())
