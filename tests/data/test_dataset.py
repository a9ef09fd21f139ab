# SPDX-License-Identifier: Apache-2.0
"""Batches: labels, points and pixels agree, in any order, from any mixture of tables, at a flat cost."""

from __future__ import annotations

import dataclasses
import pickle

import numpy as np
import pytest
import torch
from PIL import Image

from affect import labels
from affect.data import images as images_module
from affect.data.dataset import (
    FaceDataset,
    RowSet,
    alignment_scheme,
    collate,
    croppable,
    read_points,
    turned,
    whole_image,
)
from affect.data.images import FileImages, Source, read_image
from affect.data.sampling import BatchKey
from affect.data.table import FaceTable
from affect.data.transforms import FaceTransform
from affect.errors import ConfigError, DataError
from affect.geometry.alignment import CropRecipe
from affect.tasks.kinds import AUOccurrence, Expression, HeadPose, Landmarks, ValenceArousal
from tests.data import samples

SIZE = 32
RECIPE = CropRecipe(kind="similarity", size=SIZE)
AUGMENT = {
    "flip": 0.5,
    "rotation": 20,
    "scale": 0.1,
    "shift": 0.1,
    "augment": [{"_target_": "albumentations.RandomBrightnessContrast", "p": 0.5}],
}


def tasks(*tables):
    made = {
        "au": AUOccurrence([1, 12]),
        "expression": Expression(samples.CLASSES),
        "va": ValenceArousal(),
        "pose": HeadPose(),
        "points": Landmarks("68"),
    }
    for task in made.values():
        task.bind(tables)
    return made


def dataset(count=12, augment=None, schemes=("68",), recipe=RECIPE, rows=None, **options):
    source = Source("sample", samples.table(count), samples.DrawnImages(), recipe=recipe)
    chosen = [np.arange(count) if rows is None else np.asarray(rows)]
    return FaceDataset(
        [source], chosen, tasks(source.table), FaceTransform(SIZE, **(augment or {})), schemes, **options
    )


def same(a, b):
    for item in dataclasses.fields(a):
        x, y = getattr(a, item.name), getattr(b, item.name)
        pairs = [(x[key], y[key]) for key in x] if isinstance(x, dict) else [(x, y)]
        for u, v in pairs:
            assert torch.equal(u, v), item.name


def test_a_batch_has_declared_shapes_and_types():
    batch = dataset()[BatchKey(0, np.array([3, 0, 7]))]
    assert (tuple(batch.image.shape), batch.image.dtype) == ((3, 3, SIZE, SIZE), torch.uint8)
    assert batch.image.is_contiguous()
    shapes = {name: tuple(target.shape) for name, target in batch.targets.items()}
    assert shapes == {"au": (3, 2), "expression": (3, 3), "va": (3, 2), "pose": (3, 3), "points": (3, 68, 2)}
    assert all(target.dtype == torch.float32 for target in batch.targets.values())
    assert all(mask.dtype == torch.bool for mask in batch.masks.values())
    assert tuple(batch.masks["points"].shape) == tuple(batch.point_masks["68"].shape) == (3, 68)
    assert batch.row.tolist() == [3, 0, 7]
    assert batch.source.tolist() == [0, 0, 0]
    assert tuple(batch.matrix.shape) == (3, 2, 3)


def test_labels_are_those_of_the_rows():
    data = dataset(rows=[5, 2, 9])
    table = data.sources[0].table
    batch = data[BatchKey(0, np.array([2, 0]))]
    assert batch.row.tolist() == [9, 5]
    for name in ("au", "expression", "va"):
        expected = data.tasks[name].encode(table, np.array([9, 5]))
        np.testing.assert_array_equal(batch.targets[name], expected.target)
        np.testing.assert_array_equal(batch.masks[name], expected.mask)


def test_landmark_targets_are_fractions_of_the_crop():
    batch = dataset(augment=AUGMENT).batch(1, np.arange(12))
    assert batch.flipped.any()
    assert not batch.flipped.all()
    expected = (batch.points["68"] + 0.5) / SIZE
    torch.testing.assert_close(batch.targets["points"], expected)
    stored = samples.table(12).numbers("landmarks_68")[0].reshape(12, 68, 2)
    moved = torch.from_numpy(stored) @ batch.matrix[:, :, :2].transpose(1, 2) + batch.matrix[:, None, :, 2]
    swap = list(labels.SCHEMES["68"].swap)
    moved = torch.where(batch.flipped[:, None, None], moved[:, swap], moved)
    torch.testing.assert_close(batch.points["68"], moved, atol=1e-3, rtol=1e-4)


def test_the_recipe_puts_landmarks_where_they_belong():
    batch = dataset().batch(0, np.arange(12))
    inner = batch.points["68"][:, labels.INNER_51, :].mean(0).numpy()
    assert np.abs(inner - RECIPE.target()).max() < 1.0


def test_pose_is_mirrored_with_the_image():
    batch = dataset(augment={"flip": 1.0}).batch(0, np.arange(12))
    plain = dataset().batch(0, np.arange(12))
    torch.testing.assert_close(batch.targets["pose"], plain.targets["pose"] * torch.tensor([1.0, -1, -1]))
    torch.testing.assert_close(batch.targets["au"], plain.targets["au"])
    assert (batch.image.flip(-1).int() - plain.image.int()).abs().max() <= 1


def rolled(degrees, count=4):
    """Return a source of faces whose points and stored roll are turned clockwise by ``degrees``."""
    angle = np.deg2rad(degrees)
    turn = np.array([[np.cos(angle), -np.sin(angle)], [np.sin(angle), np.cos(angle)]])
    points = (samples.points_68(0, count) - 24) @ turn.T + 24
    pose = {f"pose_{axis}": np.full(count, value, np.float32) for axis, value in (("pitch", 3), ("roll", degrees))}
    columns = {"landmarks_68": points.reshape(count, 136).astype(np.float32), **pose}
    return Source("rolled", samples.table(count).with_columns(columns), samples.DrawnImages(), recipe=RECIPE)


@pytest.mark.parametrize("flip", [0.0, 1.0])
@pytest.mark.parametrize("degrees", [25.0, -170.0])
def test_an_aligned_face_has_no_roll_and_gets_the_stored_one_back(degrees, flip):
    source = rolled(degrees)
    task = HeadPose()
    task.bind([source.table])
    batch = FaceDataset([source], [np.arange(4)], {"pose": task}, FaceTransform(SIZE, flip=flip)).batch(0, np.arange(4))
    perfect = batch.targets["pose"].numpy()
    assert np.abs(perfect[:, 2]).max() < 3, "the crop is upright up to the noise of the points"
    back = task.unturn(perfect, turned(batch.matrix.numpy()), batch.flipped.numpy())
    np.testing.assert_allclose(back, task.encode(source.table).target, atol=1e-3)


class TurningPose(HeadPose):
    """A head pose whose roll follows the image."""

    def turn(self, encoded, degrees):
        target = encoded.target.copy()
        target[:, 2] += degrees
        return encoded._replace(target=target)


@pytest.mark.parametrize("library", [False, True])
def test_roll_follows_rotation_and_mirroring(library):
    """A line through the face at the angle of its roll is at the angle of the label in every augmented crop."""
    source = Source("sample", samples.table(12), samples.DrawnImages(), recipe=CropRecipe(kind="none", size=SIZE))
    augment = {"flip": 0.5, "rotation": 40}
    if library:
        listed = [
            {"_target_": "albumentations.Affine", "rotate": [-30, 30], "p": 1.0},
            {"_target_": "albumentations.HorizontalFlip", "p": 0.5},
        ]
        augment = {"flip": 0.5, "rotation": 20, "augment": listed}
    task = TurningPose()
    task.bind([source.table])
    batch = FaceDataset([source], [np.arange(12)], {"pose": task}, FaceTransform(SIZE, **augment)).batch(
        0, np.arange(12)
    )
    assert 0 < batch.flipped.sum() < 12
    roll = np.deg2rad(source.table.numbers("pose_roll")[0])
    across = np.stack([np.cos(roll), np.sin(roll)], -1)[..., None]  # from the face's right to its left, y down
    across = (batch.matrix.numpy()[:, :, :2] @ across)[..., 0]
    across = np.where(batch.flipped.numpy()[:, None], -across, across)
    expected = np.rad2deg(np.arctan2(across[:, 1], across[:, 0]))
    np.testing.assert_allclose(batch.targets["pose"][:, 2], expected, atol=1e-2)
    plain = FaceDataset([source], [np.arange(12)], {"pose": task}, FaceTransform(SIZE)).batch(0, np.arange(12))
    np.testing.assert_allclose(plain.targets["pose"][:, 2], np.rad2deg(roll), atol=1e-4)


def test_masked_points_are_zero_and_swap_with_their_partner():
    points = samples.points_68(0, 2)
    points[0, 36] = np.nan
    table = FaceTable.from_columns(
        {"image": ["a", "b"], "subject": ["x", "y"], "landmarks_68": (points.reshape(2, -1), np.array([True, False]))}
    )
    source = Source("s", table, samples.DrawnImages())
    task = Landmarks("68")
    for flip, expected in ((0.0, 36), (1.0, 45)):
        data = FaceDataset([source], [np.arange(2)], {"p": task}, FaceTransform(SIZE, flip=flip), ["68", "5"])
        batch = data.batch(0, np.arange(2))
        assert np.flatnonzero(~batch.masks["p"][0].numpy()).tolist() == [expected]
        assert not batch.masks["p"][1].any()
        assert (batch.targets["p"][~batch.masks["p"]] == 0).all()
        assert (batch.points["68"][~batch.point_masks["68"]] == 0).all()
        assert not batch.point_masks["5"].any(), "a scheme that the table lacks is masked"


@pytest.mark.parametrize("augment", [None, AUGMENT], ids=["plain", "augmented"])
def test_a_sample_does_not_depend_on_its_batch(augment):
    data = dataset(augment=augment, seed=5)
    whole = data.batch(2, np.arange(12))
    for positions in ([4], [7, 4, 11], [11, 10, 9, 8, 7]):
        some = data.batch(2, np.array(positions))
        index = torch.tensor(positions)
        picked = dataclasses.replace(
            whole._map(lambda tensor, index=index: tensor[index]),
        )
        same(some, picked)


def test_epochs_and_seeds_differ_and_integers_follow_set_epoch():
    data = dataset(augment=AUGMENT, seed=1)
    first, second = data.batch(0, np.arange(12)), data.batch(1, np.arange(12))
    assert (first.matrix != second.matrix).any()
    assert (dataset(augment=AUGMENT, seed=2).batch(0, np.arange(12)).matrix != first.matrix).any()
    data.set_epoch(1)
    same(data[3], data.batch(1, np.array([3])))
    same(data[-1], data.batch(1, np.array([11])))
    same(data.__getitems__([3, 5]), data.batch(1, np.array([3, 5])))
    with pytest.raises(IndexError):
        data[12]


def test_several_tables_keep_their_order_and_masks():
    a = samples.table(5)
    only_valence = FaceTable.from_columns(
        {"image": ["x", "y", "z"], "subject": ["p", "q", "r"], "valence": [0.1, 0.2, 0.3]}
    )
    sources = [
        Source("a", a, samples.DrawnImages(), recipe=RECIPE),
        Source("b", only_valence, samples.DrawnImages(size=20)),
    ]
    data = FaceDataset(
        sources, [np.array([1, 4]), np.array([2, 0, 1])], tasks(a, only_valence), FaceTransform(SIZE), ["68"]
    )
    assert len(data) == 5
    batch = data.batch(0, np.array([4, 0, 2, 1]))
    assert batch.source.tolist() == [1, 0, 1, 0]
    assert batch.row.tolist() == [1, 1, 2, 4]
    np.testing.assert_allclose(
        batch.targets["va"][:, 0], [0.2, a.numbers("valence")[0][1], 0.3, a.numbers("valence")[0][4]]
    )
    assert batch.masks["va"][:, 1].tolist() == [False, True, False, True]
    assert not batch.masks["expression"][[0, 2]].any()
    assert batch.point_masks["68"].all(1).tolist() == [False, True, False, True]
    alone = FaceDataset([sources[1]], [np.array([1])], data.tasks, FaceTransform(SIZE)).batch(0, np.array([0]))
    torch.testing.assert_close(batch.image[:1], alone.image)


def test_cost_is_flat_in_the_size_of_the_table():
    """A batch reads its own images and cells, once each, however large the table."""
    calls = {}
    for count in (20, 2000):
        data = dataset(count)
        table = data.sources[0].table
        asked = []
        original = type(table).numbers

        class Counting(FaceTable):
            def numbers(self, name, rows=None, asked=asked, original=original):
                asked.append((name, None if rows is None else len(rows)))
                return original(self, name, rows)

        table.__class__ = Counting
        data.batch(0, np.array([3, 17, 5]))
        calls[count] = asked
        assert data.sources[0].images.reads == 3
        assert {rows for _, rows in asked} == {3}
    assert calls[20] == calls[2000]


def test_without_a_recipe_the_whole_image_is_kept_in_proportion():
    table = FaceTable.from_columns(
        {"image": ["a"], "subject": ["x"], "landmarks_5": np.array([[0, 0, 59, 39] * 2 + [0, 0]])}
    )

    class Wide:
        def read(self, rows):
            return [samples.smooth_image(0, 40, 60) for _ in rows]

    data = FaceDataset([Source("s", table, Wide())], [np.arange(1)], {}, FaceTransform(SIZE), ["5"])
    batch = data.batch(0, np.array([0]))
    scale = SIZE / 60
    np.testing.assert_allclose(
        batch.points["5"][0, 0], [scale / 2 - 0.5, (SIZE - 40 * scale) / 2 + scale / 2 - 0.5], atol=1e-4
    )
    assert whole_image(SIZE).margin == 0
    assert (batch.image[0, :, 0] == 0).all(), "bars above and below"
    assert (batch.image[0, :, SIZE // 2] > 0).all()


@pytest.mark.parametrize("kind", ["none", "box", "similarity"])
def test_reduced_decoding_gives_the_crop_of_the_recipe(tmp_path, monkeypatch, kind):
    """A large photograph is decoded at a fraction of its size, and the crop stays that of ``CropRecipe.crop``."""
    monkeypatch.setattr(images_module, "_LARGE_FILE", 1)
    photo = samples.smooth_image(4, 480, 480)
    Image.fromarray(photo).save(tmp_path / "a.jpg", quality=95)
    table = FaceTable.from_columns(
        {
            "image": ["a.jpg"],
            "subject": ["x"],
            "box": np.array([[60.0, 40, 420, 400]]),
            "landmarks_68": samples.points_68(0, 1, 480).reshape(1, -1),
        },
        tmp_path,
    )
    recipe = CropRecipe(kind=kind, size=SIZE, margin={"none": 0.05, "box": 0.05, "similarity": 0.3}[kind])
    reduced = []
    original = images_module.decode

    def decode(data, path, reduce=1):
        reduced.append(reduce)
        return original(data, path, reduce)

    monkeypatch.setattr(images_module, "decode", decode)
    data = FaceDataset([Source("s", table, FileImages(table), recipe=recipe)], [np.arange(1)], {}, FaceTransform(SIZE))
    batch = data.batch(0, np.array([0]))
    assert reduced[0] > 1
    matrix = {
        "none": lambda: recipe.matrix(image_size=(480, 480)),
        "box": lambda: recipe.matrix(box=table.numbers("box")[0][0]),
        "similarity": lambda: recipe.matrix(landmarks=table.numbers("landmarks_68")[0][0].reshape(68, 2)),
    }[kind]()
    np.testing.assert_allclose(batch.matrix[0], matrix, rtol=1e-5, atol=1e-4)
    expected = recipe.crop(read_image(tmp_path / "a.jpg"), matrix).astype(int)
    difference = np.abs(batch.image[0].permute(1, 2, 0).numpy().astype(int) - expected)
    assert difference.mean() < 1.0
    assert difference.max() <= 6


@pytest.mark.parametrize("side", [40, 200])
@pytest.mark.parametrize("border", ["constant", "replicate", "reflect"])
def test_an_unreduced_crop_is_that_of_the_recipe_to_the_bit(side, border):
    recipe = CropRecipe(kind="none", size=SIZE, border=border, margin=0.3, antialias=False)
    source = Source("s", samples.table(2, landmarks=False), samples.DrawnImages(side), recipe=recipe)
    batch = FaceDataset([source], [np.arange(2)], {}, FaceTransform(SIZE)).batch(0, np.arange(2))
    for row in range(2):
        expected = recipe.crop(samples.smooth_image(row, side, side), recipe.matrix(image_size=(side, side)))
        np.testing.assert_array_equal(batch.image[row].permute(1, 2, 0), expected)


def test_rows_that_cannot_be_cropped_are_known():
    points = samples.points_68(0, 4)
    points[1] = np.nan
    table = FaceTable.from_columns(
        {
            "image": list("abcd"),
            "subject": list("abcd"),
            "landmarks_68": (points.reshape(4, -1), np.array([True, True, False, True])),
            "box": (np.array([[0, 0, 9, 9.0]] * 4), np.array([True, False, True, True])),
        }
    )
    rows = np.array([3, 2, 1, 0])
    assert croppable(table, RECIPE, rows, block=3).tolist() == [True, False, False, True]
    assert croppable(table, CropRecipe(kind="box"), rows).tolist() == [True, True, False, True]
    assert croppable(table, None, rows).all()
    bare = FaceTable.from_columns({"image": ["a"], "subject": ["x"]})
    with pytest.raises(DataError, match="needs a column of landmarks"):
        croppable(bare, RECIPE, np.arange(1))
    with pytest.raises(DataError, match="needs a column box"):
        croppable(bare, CropRecipe(kind="box"), np.arange(1))


def test_points_of_a_table():
    assert alignment_scheme(samples.table(3).names) == "68"
    assert alignment_scheme(frozenset({"landmarks_5", "landmarks_98"})) == "98"
    assert alignment_scheme(frozenset({"image"})) is None
    points, mask = read_points(samples.table(3), "68", np.array([2]))
    assert points.shape == (1, 68, 2)
    assert mask.all()
    assert not read_points(samples.table(3), "98", np.array([2]))[1].any()


def test_a_recipe_of_another_size_is_refused():
    with pytest.raises(ConfigError, match="sample: the recipe aligned crops to 224 px, the model takes 32 px"):
        dataset(recipe=CropRecipe())


def test_an_unreadable_image_is_named(tmp_path):
    table = samples.table(2, tmp_path)
    (tmp_path / "s00").mkdir()
    (tmp_path / "s00" / "0000.png").write_bytes(b"nothing")
    data = FaceDataset([Source("s", table, FileImages(table))], [np.arange(2)], {}, FaceTransform(SIZE))
    with pytest.raises(DataError, match=r"s00/0000\.png: not a readable image"):
        data.batch(0, np.array([0]))


def test_collate_joins_batches():
    data = dataset()
    whole = data.batch(0, np.arange(4))
    same(collate([data.batch(0, np.array([k])) for k in range(4)]), whole)
    assert collate(whole) is whole


@pytest.mark.parametrize(
    ("rows", "most"),
    [
        ([], 700),
        (range(5, 5000), 900),
        ([*range(10, 900), *range(1000, 4000), *range(4001, 9000)], 900),
        (range(0, 3000, 3), 4 * 1000 + 700),
        ([7, 3, 3, 9, 10, 11, 2], 700),
        ([2**40, 2**40 + 2, 1], 700),
    ],
)
def test_chosen_rows_are_small_and_come_back_in_their_order(rows, most):
    wanted = np.array(list(rows), np.int64)
    chosen = RowSet(wanted)
    assert len(chosen) == len(wanted)
    np.testing.assert_array_equal(np.asarray(chosen), wanted)
    received = pickle.loads(pickle.dumps(chosen))
    positions = np.random.default_rng(0).integers(0, max(len(wanted), 1), 200 if len(wanted) else 0)
    np.testing.assert_array_equal(received[positions], wanted[positions])
    assert received[positions].dtype == np.int64
    assert len(pickle.dumps(chosen)) < most
