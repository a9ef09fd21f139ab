# SPDX-License-Identifier: Apache-2.0
"""A predictions table says of every row what the run knew of it: possible classes, groups, subgroups and origin."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from omegaconf import OmegaConf

from affect.commands.configuration import config_directory
from affect.commands.inference import encode_truth, error_lengths, predict_values, predictions_table, table_metrics
from affect.data.batch import FaceBatch
from affect.data.dataset import FaceDataset
from affect.data.images import Source
from affect.data.table import FaceTable
from affect.data.transforms import FaceTransform
from affect.errors import ConfigError
from affect.geometry import CropRecipe
from affect.geometry.alignment import compose, transform_points
from affect.metrics import AlignmentError, Classification
from affect.tasks import AUOccurrence, Coefficients, Expression, HeadPose, Landmarks
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


# ----------------------------------------------------------------------------------- landmarks in photographs


def landmark_task(**metric: object) -> Landmarks:
    task = Landmarks("68", metrics=[AlignmentError("68", **metric)])
    task.metrics[0].bind(task.outputs)
    return task


def tilted_faces(rows: int) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Return true and predicted points of photographs ``(N, 68, 2)``, and the matrices of upright crops of them."""
    random = np.random.default_rng(3)
    truth = samples.points_68(0, rows, size=300).astype(np.float64)
    matrices = CropRecipe(size=96).matrices(truth)
    matrices = compose([[0.8, -0.6, 30], [0.6, 0.8, -20]], matrices)  # by far not upright in the crop
    return truth, truth + random.normal(0, 4, truth.shape), matrices


@pytest.mark.parametrize("normaliser", ["inter_ocular", "inter_pupil", "box"])
def test_landmark_errors_of_prepared_crops_are_those_in_the_photographs(normaliser: str, tmp_path) -> None:
    truth, guess, matrices = tilted_faces(6)
    task = landmark_task(normaliser=normaliser, threshold=[5, 8])
    inside = transform_points(matrices, truth).reshape(6, -1)
    columns = {"image": [f"{k}.png" for k in range(6)], "landmarks_68": inside.tolist()}
    plain = Source("plain", FaceTable.from_columns(columns, "/data"), samples.DrawnImages())
    stored = FaceTable.from_columns(columns | {"crop_matrix": matrices.reshape(6, 6).tolist()}, "/data")
    prepared = Source("prepared", stored, samples.DrawnImages())
    values = {"landmarks": transform_points(matrices, guess).astype(np.float32)}
    found = {}
    for source_ in (plain, prepared):
        table = predictions_table([source_], {"landmarks": task}, values, np.zeros(6, int), np.arange(6))
        table.to_parquet(tmp_path / f"{source_.name}.parquet")
        again = FaceTable.read_parquet(tmp_path / f"{source_.name}.parquet")
        records = table_metrics(again, {"landmarks": task}, resamples=0)
        found[source_.name] = {record["name"]: record["value"] for record in records}
    if normaliser == "box":
        length = np.sqrt(np.ptp(truth, axis=1).prod(1))
    elif normaliser == "inter_ocular":
        length = np.linalg.norm(truth[:, 36] - truth[:, 45], axis=1)
    else:
        length = np.linalg.norm(truth[:, 36:42].mean(1) - truth[:, 42:48].mean(1), axis=1)
    errors = 100 * np.linalg.norm(guess - truth, axis=2).mean(1) / length
    assert found["prepared"]["nme"] == pytest.approx(errors.mean(), rel=1e-5)
    for t in (5, 8):
        assert found["prepared"][f"fr/{t}"] == pytest.approx((errors > t).mean())
        assert found["prepared"][f"auc/{t}"] == pytest.approx(np.clip(1 - errors / t, 0, None).mean(), rel=1e-4)
    # A turned crop has another box around its points; distances between eyes only change with its scale.
    same = found["plain"]["nme"] == pytest.approx(found["prepared"]["nme"], rel=1e-4)
    assert same == (normaliser != "box")
    assert error_lengths({"landmarks": task}) == {"landmarks": normaliser}


def test_crops_of_prepared_and_of_whole_images_are_scored_together() -> None:
    truth, guess, matrices = tilted_faces(4)
    task = landmark_task(normaliser="box")
    image = {"image": ["a.png", "b.png"]}
    inside = transform_points(matrices, truth).reshape(4, -1)
    matrix = matrices.reshape(4, 6).tolist()
    crops = FaceTable.from_columns(
        image | {"landmarks_68": inside[:2].tolist(), "crop_matrix": matrix[:2]}, "/a", {"dataset": "crops"}
    )
    whole = FaceTable.from_columns(image | {"landmarks_68": truth[2:].reshape(2, -1).tolist()}, "/b")
    sources = [Source("crops", crops, samples.DrawnImages()), Source("whole", whole, samples.DrawnImages())]
    values = np.concatenate([transform_points(matrices[:2], guess[:2]), guess[2:]]).astype(np.float32)
    table = predictions_table(
        sources, {"landmarks": task}, {"landmarks": values}, np.array([0, 0, 1, 1]), np.array([0, 1, 0, 1])
    )
    found = {r["name"]: r["value"] for r in table_metrics(table, {"landmarks": task}, resamples=0)}
    errors = 100 * np.linalg.norm(guess - truth, axis=2).mean(1) / np.sqrt(np.ptp(truth, axis=1).prod(1))
    assert found["nme"] == pytest.approx(errors.mean(), rel=1e-5)


def test_full_300w_is_the_weighted_union_of_its_subsets() -> None:
    """554 common and 135 challenging faces: full is their weighted mean, not the mean of the two numbers."""
    common, challenge = 554, 135
    rows = common + challenge
    random = np.random.default_rng(0)
    truth = samples.points_68(0, 1, size=300).astype(np.float64).repeat(rows, 0)
    parts = np.array(["common"] * common + ["challenge"] * challenge)
    spread = np.where(parts == "common", 3.0, 9.0)[:, None, None]
    guess = truth + spread * random.normal(size=truth.shape) * random.uniform(0.3, 1.7, (rows, 1, 1))
    shuffled = random.permutation(rows)
    parts, truth, guess = parts[shuffled], truth[shuffled], guess[shuffled]
    columns = {"image": [f"{k}.png" for k in range(rows)], "part": parts.tolist()}
    faces = FaceTable.from_columns(columns | {"landmarks_68": truth.reshape(rows, -1).tolist()}, "/data")
    task = landmark_task(threshold=[8, 10])
    subsets = OmegaConf.load(config_directory() / "protocol" / "300w.yaml").subsets
    table = predictions_table(
        [Source("300w", faces, samples.DrawnImages())],
        {"landmarks": task},
        {"landmarks": guess.astype(np.float32)},
        np.zeros(rows, int),
        np.arange(rows),
        subsets=subsets,
    )
    found = {(r["subgroup"], r["name"]): r for r in table_metrics(table, {"landmarks": task}, resamples=0)}
    errors = 100 * np.linalg.norm(guess - truth, axis=2).mean(1) / np.linalg.norm(truth[:, 36] - truth[:, 45], axis=1)
    for name, chosen in (("common", parts == "common"), ("challenge", parts == "challenge"), (None, parts != "")):
        assert found[name, "nme"]["n"] == chosen.sum()
        assert found[name, "nme"]["value"] == pytest.approx(errors[chosen].mean(), rel=1e-5)
        assert found[name, "fr/8"]["value"] == pytest.approx((errors[chosen] > 8).mean())
    for number in ("nme", "fr/8", "fr/10", "auc/8", "auc/10"):
        full = (common * found["common", number]["value"] + challenge * found["challenge", number]["value"]) / rows
        assert found[None, number]["value"] == pytest.approx(full)


def test_subsets_of_wflw_overlap_and_are_scored_each() -> None:
    rows = 80
    random = np.random.default_rng(1)
    truth = np.stack([samples.points_68(0, 1, size=300)[0].astype(np.float64)] * rows)
    guess = truth + random.normal(size=truth.shape) * random.uniform(2, 14, (rows, 1, 1))
    subsets = OmegaConf.load(config_directory() / "protocol" / "wflw.yaml").subsets
    flags = {column: (random.random(rows) < 0.3).astype(np.float32) for column in subsets.values()}
    columns = {"image": [f"{k}.png" for k in range(rows)], "landmarks_68": truth.reshape(rows, -1).tolist()}
    faces = FaceTable.from_columns(columns | flags, "/data")
    task = landmark_task()
    table = predictions_table(
        [Source("wflw", faces, samples.DrawnImages())],
        {"landmarks": task},
        {"landmarks": guess.astype(np.float32)},
        np.zeros(rows, int),
        np.arange(rows),
        subsets=subsets,
    )
    found = {(r["subgroup"], r["name"]): r["value"] for r in table_metrics(table, {"landmarks": task}, resamples=0)}
    errors = 100 * np.linalg.norm(guess - truth, axis=2).mean(1) / np.linalg.norm(truth[:, 36] - truth[:, 45], axis=1)
    assert 0.1 < (errors > 10).mean() < 0.9
    for name, column in subsets.items():
        own = errors[flags[column] > 0]
        assert found[name, "nme"] == pytest.approx(own.mean(), rel=1e-5)
        assert found[name, "fr/10"] == pytest.approx((own > 10).mean())
        assert found[name, "auc/10"] == pytest.approx(np.clip(1 - own / 10, 0, None).mean(), rel=1e-4)
    assert sum(flags[column].sum() for column in subsets.values()) > np.any(list(flags.values()), axis=0).sum()
