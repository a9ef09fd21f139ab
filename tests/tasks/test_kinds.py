# SPDX-License-Identifier: Apache-2.0
"""Task kinds: what they read, mask, represent and write back."""

from __future__ import annotations

import numpy as np
import pytest
import torch

from affect import tasks
from affect.data.table import FaceTable
from affect.errors import ConfigError, DataError


def table(**columns: object) -> FaceTable:
    count = len(next(iter(columns.values())))  # type: ignore[arg-type]
    return FaceTable.from_columns({"image": [f"{k}.png" for k in range(count)], **columns})


@pytest.fixture
def faces() -> FaceTable:
    return table(
        au01_occurrence=[0.0, 1.0, None],
        au12_occurrence=[1.0, None, 0.25],
        au12_intensity=[5.0, None, 0.0],
        expression=["happiness", None, "fear"],
        valence=[0.5, None, -1.0],
        arousal=[0.25, 0.0, None],
        pose_pitch=[1.0, 2.0, None],
        pose_yaw=[10.0, -20.0, None],
        pose_roll=[3.0, 4.0, None],
        attribute_glasses=[1.0, 0.0, None],
        bs_mouthSmile=[0.5, None, 0.125],
        landmarks_5=[list(range(10)), None, list(range(10, 20))],
    )


KINDS = {
    "au": lambda: tasks.AUOccurrence(aus=[1, 12]),
    "au_intensity": lambda: tasks.AUIntensity(aus=[12]),
    "expression": lambda: tasks.Expression(classes=["fear", "happiness"]),
    "valence_arousal": tasks.ValenceArousal,
    "pose": tasks.HeadPose,
    "attributes": lambda: tasks.Attributes(names=["glasses"]),
    "coefficients": lambda: tasks.Coefficients(names=["bs_mouthSmile"]),
    "landmarks": lambda: tasks.Landmarks("5"),
}
MASKS = {
    "au": [[1, 1], [1, 0], [0, 1]],
    "au_intensity": [[1], [0], [1]],
    "expression": [[1, 1], [0, 0], [1, 1]],
    "valence_arousal": [[1, 1], [0, 1], [1, 0]],
    "pose": [[1] * 3, [1] * 3, [0] * 3],
    "attributes": [[1], [1], [0]],
    "coefficients": [[1], [0], [1]],
    "landmarks": [[1] * 5, [0] * 5, [1] * 5],
}


@pytest.mark.parametrize("name", KINDS)
class TestEveryKind:
    def test_masks_are_false_exactly_where_labels_are_missing(self, name: str, faces: FaceTable) -> None:
        task = KINDS[name]()
        task.bind([faces])
        target, mask = task.encode(faces)
        assert mask.astype(int).tolist() == MASKS[name]
        assert target.dtype == np.float32
        assert np.isfinite(target).all()
        assert (target[~mask] == 0).all()

    def test_rows_select_and_order(self, name: str, faces: FaceTable) -> None:
        task = KINDS[name]()
        whole = task.encode(faces)
        part = task.encode(faces, np.array([2, 0]))
        assert np.array_equal(part.target, whole.target[[2, 0]])
        assert np.array_equal(part.mask, whole.mask[[2, 0]])

    def test_written_values_are_read_again(self, name: str, faces: FaceTable) -> None:
        task = KINDS[name]()
        shape = (3, task.num_outputs) if name != "landmarks" else (3, 5, 2)
        values = torch.rand(shape, generator=torch.Generator().manual_seed(0)).numpy()
        if name == "expression":
            values /= values.sum(1, keepdims=True)
        written = FaceTable.from_columns({"image": ["a", "b", "c"], **task.decode(values)})
        assert np.allclose(task.read_values(written), values)

    def test_a_table_without_its_columns_is_refused(self, name: str) -> None:
        with pytest.raises(DataError, match="no table has"):
            KINDS[name]().bind([table(subject=["a", "b"])])

    def test_a_source_without_its_columns_is_masked(self, name: str) -> None:
        target, mask = KINDS[name]().encode(table(subject=["a", "b"]))
        assert not mask.any()
        assert len(target) == 2

    def test_vocabulary_rebuilds_the_outputs(self, name: str, faces: FaceTable) -> None:
        task = KINDS[name]()
        again = type(task)(**task.vocabulary()) if name != "landmarks" else tasks.Landmarks("5")
        assert again.outputs == task.outputs
        assert len(task.outputs) == task.num_outputs


@pytest.mark.parametrize(
    ("task", "column", "values"),
    [
        (tasks.AUOccurrence(aus=[1]), "au01_occurrence", [0.0, 9.0]),
        (tasks.AUIntensity(aus=[1]), "au01_intensity", [5.0, 5.5]),
        (tasks.ValenceArousal(), "valence", [0.0, -2.0]),
        (tasks.HeadPose(), "pose_yaw", [0.0, 400.0]),
        (tasks.Attributes(names=["x"]), "attribute_x", [0.0, -1.0]),
        (tasks.Coefficients(names=["bs_x"]), "bs_x", [0.0, 1.5]),
        (tasks.ValenceArousal(), "valence", [0.0, float("inf")]),
    ],
)
def test_labels_outside_their_range_are_refused_with_the_row(task: tasks.Task, column: str, values: list) -> None:
    with pytest.raises(DataError, match=rf"column {column}, row 1: value"):
        task.check(table(**{column: values}))


def test_an_unknown_expression_is_refused_with_the_near_name() -> None:
    task = tasks.Expression(classes=["happiness", "fear"])
    source = table(expression=["fear", "hapiness"]).with_metadata(expressions=["happiness", "fear"])
    with pytest.raises(DataError, match="row 1: unknown class 'hapiness'; did you mean happiness"):
        task.check(source)


def test_open_vocabularies_are_taken_from_the_tables(faces: FaceTable) -> None:
    units = tasks.AUOccurrence()
    units.bind([faces])
    assert units.outputs == ("AU1", "AU12")
    expression = tasks.Expression()
    expression.bind([faces])
    assert set(expression.outputs) == {"fear", "happiness"}
    coefficients = tasks.Coefficients()
    coefficients.bind([faces])
    assert coefficients.outputs == ("bs_mouthSmile",)


def test_a_class_that_a_source_never_labels_is_masked_in_its_rows() -> None:
    seven = table(expression=["fear", None]).with_metadata(expressions=["happiness", "fear"])
    task = tasks.Expression(classes=["happiness", "contempt", "fear"])
    target, mask = task.encode(seven)
    assert target.tolist() == [[0, 0, 1], [0, 0, 0]]
    assert mask.tolist() == [[True, False, True], [False, False, False]]


def test_a_distribution_over_classes_sums_to_one() -> None:
    votes = table(expression_fear=[3.0, 0.0, None], expression_happiness=[1.0, 0.0, None])
    task = tasks.Expression(classes=["happiness", "fear"])
    target, mask = task.encode(votes)
    assert target.tolist() == [[0.25, 0.75], [0, 0], [0, 0]]
    assert mask.any(1).tolist() == [True, False, False]


def test_a_row_without_a_named_class_has_its_distribution() -> None:
    faces = table(
        expression=["fear", None, None], expression_fear=[0.0, 1.0, None], expression_happiness=[1.0, 3.0, None]
    )
    task = tasks.Expression(classes=["happiness", "fear"])
    target, mask = task.encode(faces)
    assert target.tolist() == [[0, 1], [0.75, 0.25], [0, 0]]
    assert mask.any(1).tolist() == [True, True, False]
    assert task.encode(faces, np.array([1, 0])).target.tolist() == [[0.75, 0.25], [0, 1]]


def test_rows_of_foreign_and_of_unusual_classes_are_noted() -> None:
    faces = table(expression=["fear", "hapiness", "hapiness", "3", None])
    closed = tasks.Expression(classes=["fear", "3"])
    assert closed.notes(faces) == ["2 rows have an expression that is no class of the task (hapiness 2)"]
    free = tasks.Expression()
    free.bind([faces])
    assert any("'hapiness' is taken for a class of its own; did you mean happiness" in n for n in free.notes(faces))
    assert any("'3' is taken for a class of its own; known: " in note for note in free.notes(faces))


def test_flipping_pose_turns_yaw_and_roll() -> None:
    encoded = tasks.Encoded(np.array([[1.0, 2, 3]], np.float32), np.ones((1, 3), bool))
    assert tasks.HeadPose().flip(encoded).target.tolist() == [[1, -2, -3]]


def test_one_side_without_its_partner_has_no_label_in_the_mirror() -> None:
    task = tasks.Coefficients(names=["bs_jawLeft", "bs_smileLeft", "bs_smileRight", "bs_pucker"])
    encoded = tasks.Encoded(np.array([[0.1, 0.2, 0.3, 0.4]], np.float32), np.ones((1, 4), bool))
    flipped = task.flip(encoded)
    assert flipped.mask.tolist() == [[False, True, True, True]]
    np.testing.assert_allclose(flipped.target, [[0, 0.3, 0.2, 0.4]], atol=1e-7)


def test_representations_become_values() -> None:
    raw = torch.tensor([[-2.0, 0.0]])
    assert torch.allclose(tasks.AUOccurrence(aus=[1, 2]).predict(raw), raw.sigmoid())
    va = tasks.ValenceArousal()
    assert torch.allclose(va.predict(va.link(raw)), raw.tanh())
    assert tasks.Coefficients(names=["bs_a", "bs_b"]).predict(raw).min() == 0
    assert tasks.Landmarks("5").link(torch.zeros(1, 10)).unique().item() == 0.5
    assert torch.allclose(tasks.Expression(classes=["fear", "anger"]).predict(raw).sum(), torch.tensor(1.0))


def test_points_in_pixels_and_fractions_are_inverse_and_centre_the_pixels() -> None:
    first_pixel = torch.tensor([[0.0, 0.0]])
    assert torch.equal(tasks.to_fractions(first_pixel, 10, 20), torch.tensor([[0.025, 0.05]]))
    points = torch.rand(4, 5, 2) * 30
    assert torch.allclose(tasks.to_pixels(tasks.to_fractions(points, 11, 23), 11, 23), points, atol=1e-5)


@pytest.mark.parametrize(
    ("build", "message"),
    [
        (lambda: tasks.AUOccurrence(aus="bp4dd"), "unknown action unit set 'bp4dd': did you mean bp4d"),
        (lambda: tasks.AUOccurrence(aus=[3]), "unknown action unit 3"),
        (lambda: tasks.AUOccurrence(aus=[1, 1]), "once"),
        (lambda: tasks.Expression(classes="rafd"), "did you mean rafdb"),
        (lambda: tasks.Landmarks("69"), "unknown landmark scheme '69'"),
    ],
)
def test_unknown_names_are_refused_with_the_near_ones(build: object, message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        build()  # type: ignore[operator]


def test_uniform_smoothing_moves_labelled_cells_towards_one_half() -> None:
    smooth = tasks.UniformSmoothing(0.2)
    target, mask = torch.tensor([[0.0, 1.0, 1.0]]), torch.tensor([[True, True, False]])
    assert torch.allclose(smooth(target, mask), torch.tensor([[0.1, 0.9, 1.0]]))
    task = tasks.AUOccurrence(aus=[1, 2, 4], target=smooth)
    assert torch.allclose(task.transform_targets(target, mask), smooth(target, mask))
    with pytest.raises(ConfigError, match="amount=1"):
        tasks.UniformSmoothing(1.0)
