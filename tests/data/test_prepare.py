# SPDX-License-Identifier: Apache-2.0
from __future__ import annotations

import dataclasses
import functools
import json
import multiprocessing
import os
import shutil
import signal
import time
import weakref
from pathlib import Path

import cv2
import numpy as np
import pytest

from affect import files
from affect.data import faces, placing, prepare
from affect.data.archives import ShardImages, VideoImages
from affect.data.check import SYNTHETIC, require_expected
from affect.data.dataset import FaceDataset
from affect.data.expected import Expected
from affect.data.faces import FaceDials, FaceImages
from affect.data.images import FileImages, Source, read_image
from affect.data.layouts.common import state, write_image
from affect.data.placing import CENTRE, FOUND, NEIGHBOUR, REACH, Placer, choose
from affect.data.prepare import (
    Work,
    crop_names,
    find_prepared,
    folder_of,
    merge,
    plan,
    prepared_images,
    what_changed,
)
from affect.data.table import FaceTable
from affect.data.transforms import FaceTransform
from affect.errors import ConfigError, DataError
from affect.geometry import CropRecipe, transform_points
from affect.geometry.providers import FaceObservation
from affect.geometry.templates import FACE_68
from tests.data.finders import Killed, Posed, RedSquares, photograph

RECIPE = CropRecipe(name="small", size=32, margin=0.2, stored=48, window=40)
READ = {"root": "anywhere", "_target_": "layout.read", "threshold": 2}
SEQUENCES = {"F001_T1": 7, "F001_T2": 5, "M001_T1": 6}
NOT_SEEN = {("F001_T1", 3), ("F001_T1", 4), ("M001_T1", 1), ("F001_T2", 5)}


@pytest.fixture(scope="module")
def photographs(tmp_path_factory):
    """Three sequences of photographs with faces that move, some frames without; returns their table."""
    root = tmp_path_factory.mktemp("photographs")
    names, sequences, frames = [], [], []
    for sequence, count in SEQUENCES.items():
        for k in range(1, count + 1):
            face = None if (sequence, k) in NOT_SEEN else (20 + 3 * k, 12 + 2 * k, 36)
            names.append(f"{sequence}/{k}.png")
            write_image(root / names[-1], photograph(k, face))
            sequences.append(sequence)
            frames.append(k)
    subjects = [name.partition("_")[0] for name in sequences]
    columns = {"image": names, "sequence": sequences, "subject": subjects, "frame": np.array(frames, np.int32)}
    columns["au12_occurrence"] = np.arange(len(names), dtype=np.float32) % 2
    return FaceTable.from_columns(columns, root, {"dataset": "drawn", "touched": {"a": [1, 2]}})


def work_of(table, folder, recipe=RECIPE, finder=RedSquares, images=None, **options):
    images = images if images is not None else FileImages(table)
    work = Work(folder_of(folder, "drawn", recipe), table, images, recipe.storage(), finder, **options)
    prepare.claim(work, {"detector": "red squares"})
    return work


def prepared(table, folder, recipe=RECIPE, workers=0, block=4, read=READ, **options):
    work = work_of(table, folder, recipe, **options)
    units = plan(table, block)
    prepare.run(work, units, workers)
    return merge(work, units, read)


def contents(folder):
    """The bytes of every file below a folder by name."""
    return {str(path.relative_to(folder)): path.read_bytes() for path in sorted(folder.rglob("*")) if path.is_file()}


# ----------------------------------------------------------------------------------------------------- plan


def test_every_row_is_in_one_unit_and_no_sequence_is_divided(photographs):
    shuffled = photographs.take(np.random.default_rng(0).permutation(len(photographs)))
    units = plan(shuffled, block=6)
    assert sorted(np.concatenate([unit.rows for unit in units]).tolist()) == list(range(len(shuffled)))
    names = shuffled.strings("sequence")[0]
    owner = {}
    for unit in units:
        for begin, end, ordered in unit.parts():
            rows = unit.rows[begin:end]
            assert ordered
            assert len(set(names[rows])) == 1
            assert (np.diff(shuffled.numbers("frame", rows)[0]) == 1).all()
            assert owner.setdefault(names[rows[0]], unit.name) == unit.name
    assert set(owner) == set(SEQUENCES)


def test_single_images_come_in_blocks_in_the_order_of_the_table():
    table = FaceTable.from_columns({"image": [f"{k}.jpg" for k in range(10)]})
    units = plan(table, block=4)
    assert [unit.rows.tolist() for unit in units] == [[0, 1, 2, 3], [4, 5, 6, 7], [8, 9]]
    assert not any(ordered for unit in units for _, _, ordered in unit.parts())


def test_frames_of_a_video_are_a_sequence_without_a_column_that_says_so():
    names = [f"v{v}.avi!{n}" for n in (10, 9, 2) for v in (1, 2)]
    (unit,) = plan(FaceTable.from_columns({"image": names}))
    assert [names[row] for row in unit.rows] == [f"v{v}.avi!{n}" for v in (1, 2) for n in (2, 9, 10)]
    assert unit.starts == (0, 3)


def test_units_are_named_by_images_and_faces_and_not_by_labels(photographs):
    def names(table):
        return [unit.name for unit in plan(table, 4)]

    labelled = photographs.with_columns({"au12_occurrence": np.zeros(len(photographs)), "part": ["P1"] * 18})
    assert names(labelled) == names(photographs)
    boxes = np.tile(np.array([1, 2, 30, 40], np.float32), (18, 1))
    assert not set(names(photographs.with_columns({"box": boxes}))) & set(names(photographs))


def test_units_are_named_by_the_files_of_their_images(photographs, tmp_path):
    def names(root):
        return [unit.name for unit in plan(FaceTable(photographs.arrow, root, {}), 4)]

    kept = shutil.copytree(photographs.root, tmp_path / "kept")  # with the times of the files
    assert names(kept) == names(photographs.root)
    assert names(shutil.copytree(kept, tmp_path / "anew", copy_function=shutil.copyfile)) != names(kept)
    before = names(kept)
    write_image(kept / "F001_T2/2.png", photograph(99))
    assert [a == b for a, b in zip(before, names(kept), strict=True)] == [True, False, True]
    archives = FaceTable.from_columns({"image": ["a.zip!1.png", "a.zip!2.png"]}, tmp_path)
    names = {plan(archives)[0].name}
    for content in (b"1", b"22"):
        (tmp_path / "a.zip").write_bytes(content)
        names.add(plan(archives)[0].name)
    assert len(names) == 3


def test_names_of_crops_are_all_different():
    names = ["a/1.jpg", "a/1.png", "a/1.png", "a/1.png.jpg", "z.zip!x/1.jpg", "v.avi!3", "../up/1.jpg"]
    found = crop_names(names, "jpg")
    assert found[0] == "a/1.jpg"
    assert found[4:] == ["z.zip/x/1.jpg", "v.avi/3.jpg", "up/1.jpg"]
    assert len(set(found)) == len(names)


# ------------------------------------------------------------------------------------------ crops and their table


def test_crops_are_those_of_the_recipe_and_the_table_tells_where_they_come_from(photographs, tmp_path):
    table = prepared(photographs, tmp_path, format="png")
    assert len(table) == len(photographs) == 18
    assert list(table.strings("source_image")[0]) == list(photographs.strings("image")[0])
    np.testing.assert_array_equal(table.numbers("au12_occurrence")[0], photographs.numbers("au12_occurrence")[0])
    status = table.strings("face")[0]
    unseen = [
        (s, int(f)) in NOT_SEEN
        for s, f in zip(*(table.column(c).to_pylist() for c in ("sequence", "frame")), strict=True)
    ]
    np.testing.assert_array_equal(status == NEIGHBOUR, unseen)
    assert table.metadata["faces"] == {FOUND: 14, NEIGHBOUR: 4, CENTRE: 0}
    assert "touched" not in table.metadata
    for row in range(18):
        matrix = table.numbers("crop_matrix", np.array([row]))[0].reshape(2, 3)
        original = read_image(photographs.root / photographs.strings("image")[0][row])
        wanted = RECIPE.storage().crop(original, table.column("crop_matrix")[row].values.to_numpy().reshape(2, 3))
        np.testing.assert_array_equal(FileImages(table).read(np.array([row]))[0], wanted)
        if status[row] == FOUND:
            (seen,) = RedSquares().find(original)
            np.testing.assert_allclose(matrix, RECIPE.storage().matrix(seen.points), atol=0.02)
            moved = table.numbers("landmarks_68", np.array([row]))[0].reshape(68, 2)
            np.testing.assert_allclose(moved, transform_points(matrix, seen.points), atol=0.05)
    assert not table.numbers("landmarks_68")[1][status == NEIGHBOUR].any()  # nobody saw these points
    assert set(table.metadata["from_finder"]) == {"box", "landmarks_68"}
    said = [reason for reason in table.column("face_reason").to_pylist() if reason is not None]
    assert said == ["no face found"] * 4


def test_faces_between_two_frames_are_interpolated_and_those_at_an_end_stay(photographs, tmp_path):
    table = prepared(photographs, tmp_path)
    names, given = table.strings("source_image")[0], table.numbers("crop_matrix")[0].reshape(-1, 2, 3)
    matrices = dict(zip(names, given, strict=True))

    def corner(name):  # where the crop's centre lies in the photograph
        return (np.linalg.inv(matrices[name][:, :2]) @ (np.array([23.5, 23.5]) - matrices[name][:, 2])).tolist()

    first, last = np.array(corner("F001_T1/2.png")), np.array(corner("F001_T1/5.png"))
    np.testing.assert_allclose(corner("F001_T1/3.png"), first + (last - first) / 3, atol=0.05)
    np.testing.assert_allclose(corner("F001_T1/4.png"), first + (last - first) * 2 / 3, atol=0.05)
    assert corner("M001_T1/1.png") == corner("M001_T1/2.png")
    assert corner("F001_T2/5.png") == corner("F001_T2/4.png")


@pytest.mark.parametrize("frames", [True, False])
def test_a_face_is_no_neighbour_beyond_a_gap(tmp_path, frames):
    numbers = [1, 1 + REACH, 2 + REACH, 5000, 6000, 6001]
    seen = {1, 6001}
    for k in numbers:
        write_image(tmp_path / f"{k}.png", photograph(k % 50, (30, 24, 40) if k in seen else None))
    columns = {"image": [f"{k}.png" for k in numbers], "sequence": ["s"] * 6}
    if frames:
        columns["frame"] = np.array(numbers)
    table = prepared(FaceTable.from_columns(columns, tmp_path), tmp_path / "out")
    between = [NEIGHBOUR, CENTRE, CENTRE, NEIGHBOUR] if frames else [NEIGHBOUR] * 4
    assert list(table.strings("face")[0]) == [FOUND, *between, FOUND]


def test_frames_without_numbers_are_counted_within_their_sequence(tmp_path):
    several = [f"s{k % 100}" for k in range(300)]  # one after the other, as a shuffled table has them
    table = FaceTable.from_columns({"image": [f"{k}.png" for k in range(300)], "sequence": several}, tmp_path)
    for unit in plan(table):
        assert [unit.times[a:b].tolist() for a, b, _ in unit.parts()] == [[0, 1, 2]] * len(unit.starts)


def test_single_images_without_a_face_show_their_middle_or_the_tables_box(tmp_path):
    write_image(tmp_path / "1.png", photograph(1, None))
    write_image(tmp_path / "2.png", photograph(2))
    names = {"image": ["1.png", "2.png"]}
    table = prepared(FaceTable.from_columns(names, tmp_path), tmp_path / "a", format="png")
    assert list(table.strings("face")[0]) == [CENTRE, FOUND]
    middle = read_image(tmp_path / "1.png")[:, 16:112]
    wanted = cv2.resize(middle, (48, 48), interpolation=cv2.INTER_AREA).astype(int)
    assert np.abs(FileImages(table).read(np.array([0]))[0] - wanted)[:, 4:-4].mean() < 3
    boxes = np.array([[90, 50, 120, 80], [28, 20, 75, 70]], np.float32)
    known = prepared(FaceTable.from_columns({**names, "box": boxes}, tmp_path), tmp_path / "b")
    assert list(known.strings("face")[0]) == [CENTRE, FOUND]
    moved = known.numbers("box")[0][0]  # the table's own box, in the crop: its square fills what the margin leaves
    np.testing.assert_allclose((moved + 0.5) / 48, [1 / 7, 1 / 7, 6 / 7, 6 / 7], atol=0.02)


def test_another_persons_face_is_not_taken_for_the_one_in_the_box(tmp_path):
    write_image(tmp_path / "1.png", photograph(1, (80, 20, 30)))
    boxes = np.array([[2, 40, 30, 70]], np.float32)
    table = prepared(FaceTable.from_columns({"image": ["1.png"], "box": boxes}, tmp_path), tmp_path / "a")
    assert list(table.strings("face")[0]) == [CENTRE]
    assert table.column("face_reason").to_pylist() == ["no face found overlaps the table's box"]


def face(x, side):
    return FaceObservation(np.array([x, 10, x + side, 10 + side], float), 1.0, FACE_68 * side + [x, 10])


def test_the_face_is_chosen_by_the_tables_box_then_by_the_frame_before_then_by_size():
    large, small = face(10, 40), face(80, 20)
    assert choose([large, small]) is large
    assert choose([large, small], previous=small.box + 3) is small
    assert choose([large, small], hint=small.box + 5, previous=large.box) is small
    assert choose([large], hint=np.array([80, 10, 100, 30.0])) is None


def test_a_face_is_followed_through_a_sequence_and_several_are_counted(tmp_path):
    for k in range(1, 5):  # the other one grows larger than the one that was alone at first
        write_image(tmp_path / f"{k}.png", photograph(k, [(8, 20, 30)] + ([(70, 20, 26 + 4 * k)] if k > 1 else [])))
    columns = {"image": [f"{k}.png" for k in range(1, 5)], "sequence": ["s"] * 4, "frame": np.arange(1, 5)}
    table = prepared(FaceTable.from_columns(columns, tmp_path), tmp_path / "a")
    assert list(table.numbers("faces_found")[0]) == [1, 2, 2, 2]
    assert table.metadata["several_faces"] == 3
    matrices = table.numbers("crop_matrix")[0]
    np.testing.assert_allclose(matrices, np.tile(matrices[:1], (4, 1)), atol=1e-4)


def test_unreadable_images_are_counted_and_named(photographs, tmp_path):
    shutil.copytree(photographs.root, tmp_path / "copy")
    (tmp_path / "copy" / "F001_T1/2.png").write_bytes(b"")
    (tmp_path / "copy" / "M001_T1/4.png").unlink()
    table = prepared(FaceTable(photographs.arrow, tmp_path / "copy", photographs.metadata), tmp_path / "out")
    assert len(table) == 16
    assert table.metadata["skipped"] == {"unreadable image": 2}
    assert table.metadata["skipped_examples"] == {"unreadable image": ["F001_T1/2.png", "M001_T1/4.png"]}
    assert "F001_T1/2.png" not in set(table.strings("source_image")[0])
    with pytest.raises(DataError, match="none of 18 images can be read"):
        prepared(FaceTable(photographs.arrow, tmp_path / "no", photographs.metadata), tmp_path / "out2")


def test_crops_of_drawn_faces_are_not_held_to_numbers_and_later_ones_of_photographs_are(photographs, tmp_path):
    tree = shutil.copytree(photographs.root, tmp_path / "tree")
    (tree / SYNTHETIC).write_text("drawn")
    wanted = [Expected("rows", 99, "the paper")]
    table = prepared(FaceTable(photographs.arrow, tree, {}), tmp_path / "out")
    assert [finding.level for finding in require_expected(table, wanted)] == ["note"]
    (tree / SYNTHETIC).unlink()
    prepared(FaceTable(photographs.arrow, tree, {}), tmp_path / "out")
    (folder_of(tmp_path / "out", "drawn", RECIPE) / SYNTHETIC).touch()  # of an earlier set
    with pytest.raises(DataError, match="found 18, expected 99"):
        require_expected(find_prepared(tmp_path / "out", "drawn", RECIPE, READ), wanted)


def test_several_rows_of_one_image_have_crops_of_their_own(tmp_path):
    write_image(tmp_path / "1.png", photograph(1, [(6, 20, 30), (70, 30, 40)]))
    boxes = np.array([[5, 18, 38, 52], [68, 28, 112, 72]], np.float32)
    table = prepared(FaceTable.from_columns({"image": ["1.png", "1.png"], "box": boxes}, tmp_path), tmp_path / "a")
    assert list(table.strings("face")[0]) == [FOUND, FOUND]
    assert list(table.strings("source_image")[0]) == ["1.png", "1.png"]
    assert len(set(table.strings("image")[0])) == 2
    scale = table.numbers("crop_matrix")[0][:, 0]
    np.testing.assert_allclose(scale[0] / scale[1], 4 / 3, atol=0.01)


def test_the_roll_of_the_head_turns_with_the_crop(tmp_path):
    write_image(tmp_path / "1.png", photograph(1))
    given = FACE_68 @ np.array([[0.8, 0.6], [-0.6, 0.8]]) * 40 + [60, 20]  # tilted clockwise by 36.87 degrees
    columns = {"image": ["1.png"], "landmarks_68": given.reshape(1, -1).astype(np.float32), "pose_roll": [36.87]}
    table = prepared(FaceTable.from_columns(columns, tmp_path), tmp_path / "a", finder=None)
    np.testing.assert_allclose(table.numbers("pose_roll")[0], 0, atol=0.05)
    found = prepared(FaceTable.from_columns({"image": ["1.png"]}, tmp_path), tmp_path / "b", finder=Posed)
    assert {"pose_pitch", "pose_yaw", "pose_roll"} <= set(found.metadata["from_finder"])
    assert [float(found.numbers(f"pose_{name}")[0][0]) for name in ("pitch", "yaw")] == [1.0, -2.0]
    np.testing.assert_allclose(found.numbers("pose_roll")[0], 10, atol=0.1)


# ------------------------------------------------------------------------------------------- geometry in training

DIALS = FaceDials(image_size=96, subjects=4, roll=(-25, 25), missing_landmarks=0.0)


@pytest.fixture(scope="module")
def drawn(tmp_path_factory):
    """Built-in faces as files with exact points."""
    root = tmp_path_factory.mktemp("drawn")
    table = FaceTable.from_arrow(faces.labels_table(DIALS, 3, 8), root, {"dataset": "faces"})
    names = [f"{k}.png" for k in range(8)]
    for name, image in zip(names, FaceImages(DIALS, 3).read(np.arange(8)), strict=True):
        write_image(root / name, image)
    return table.with_columns({"image": names})


@pytest.mark.parametrize("kind", ["similarity", "box"])
def test_training_on_stored_crops_sees_what_cropping_while_loading_sees(drawn, tmp_path, kind):
    recipe = CropRecipe(kind=kind, size=64, margin=0.3, stored=128, window=112, provider="annotations")
    table = prepared(drawn, tmp_path, recipe, finder=None, format="png")
    kept = Source("kept", table, prepared_images(table), "image", recipe.loading())
    live = Source("live", drawn, FileImages(drawn), "image", recipe.composed())
    rows = [np.arange(8)]
    stored, cut = (FaceDataset([s], rows, {}, FaceTransform(64), ["68"]).batch(0, rows[0]) for s in (kept, live))
    np.testing.assert_allclose(stored.points["68"], cut.points["68"], atol=0.05)
    assert (stored.image.float() - cut.image.float()).abs().mean() < 3.0
    assert (stored.image.float() - cut.image.float().roll(2, 3)).abs().mean() > 4.0  # the measure tells a shift of 2 px


def test_files_and_shards_give_training_the_same_batch(drawn, tmp_path):
    recipe = CropRecipe(size=40, stored=56, provider="annotations")
    batches = []
    for store in ("files", "shards"):
        table = prepared(drawn, tmp_path / store, recipe, finder=None, store=store)
        images = prepared_images(table)
        assert isinstance(images, FileImages if store == "files" else ShardImages)
        source = Source(store, table, images, "image", recipe.loading())
        batches.append(FaceDataset([source], [np.arange(8)], {}, FaceTransform(40), ["68"]).batch(0, np.arange(8)))
    assert (batches[0].image == batches[1].image).all()
    assert (batches[0].points["68"] == batches[1].points["68"]).all()


def test_a_prepared_folder_can_be_moved_and_needs_nothing_else(photographs, tmp_path):
    shutil.copytree(photographs.root, tmp_path / "delivered")
    table = prepared(FaceTable(photographs.arrow, tmp_path / "delivered", {}), tmp_path / "prepared")
    before = FileImages(table).read(np.arange(3))
    shutil.rmtree(tmp_path / "delivered")
    (tmp_path / "prepared").rename(tmp_path / "elsewhere")
    again = find_prepared(tmp_path / "elsewhere", "drawn", RECIPE, READ)
    for image, wanted in zip(FileImages(again).read(np.arange(3)), before, strict=True):
        np.testing.assert_array_equal(image, wanted)


# ------------------------------------------------------------------------------------------ another delivery


@pytest.fixture
def delivery(photographs, tmp_path):
    """The photographs as a folder of its own beside a file of labels, and their table."""
    root = shutil.copytree(photographs.root, tmp_path / "delivery")
    (root / "labels.txt").write_text("1")
    touched = {name: state(root / name) for name in ("labels.txt", "F001_T1", "other.txt")}
    return FaceTable(photographs.arrow, root, {"touched": touched})


def test_images_that_were_replaced_are_cut_again_and_the_crops_of_before_stay(delivery, tmp_path):
    first = prepared(delivery, tmp_path, format="png")
    before = contents(first.root / "crops")
    replaced = delivery.root / "F001_T2/3.png"
    write_image(replaced, 255 - read_image(replaced))
    second = prepared(delivery, tmp_path, format="png", finder=functools.partial(Killed, 6, str(tmp_path / "never")))
    same = first.strings("image")[0] == second.strings("image")[0]
    assert set(delivery.strings("image", np.flatnonzero(~same))[0]) == {f"F001_T2/{k}.png" for k in range(1, 6)}
    assert contents(first.root / "crops").items() > before.items()
    row = list(delivery.strings("image")[0]).index("F001_T2/3.png")
    matrix = second.numbers("crop_matrix", np.array([row]))[0].reshape(2, 3)
    wanted = RECIPE.storage().crop(read_image(replaced), matrix)
    assert np.abs(FileImages(second).read(np.array([row]))[0].astype(int) - wanted).max() <= 1


def test_a_training_is_told_that_the_delivery_is_another_one(delivery, tmp_path):
    work, units = work_of(delivery, tmp_path), plan(delivery, 4)
    prepare.run(work, units, 0)
    merge(work, units, READ, code="version 1")
    table = find_prepared(tmp_path, "drawn", RECIPE, READ)
    assert what_changed(table, None, "version 1") is None
    assert what_changed(table, delivery.root, "version 1") is None
    assert what_changed(table, tmp_path / "gone", "version 1") is None
    assert "another version of the code" in what_changed(table, delivery.root, "version 2")

    def said(change):
        other = tmp_path / "other"
        shutil.rmtree(other, ignore_errors=True)
        shutil.copytree(delivery.root, other)
        change(other)
        return what_changed(table, other, "version 1")

    assert said(lambda root: None) is None  # a copy with the times of its files is the same delivery
    assert "other/labels.txt is not what was prepared from" in said(lambda root: (root / "labels.txt").write_text("2"))
    assert "other/F001_T1 is not" in said(lambda root: (root / "F001_T1/9.png").touch())
    assert "other/other.txt is not" in said(lambda root: (root / "other.txt").touch())
    assert "other/M001_T1/4.png is not" in said(lambda root: write_image(root / "M001_T1/4.png", photograph(3)))
    shutil.rmtree(delivery.root)
    assert what_changed(table, None, "version 2") is None


def test_of_many_images_a_thousand_are_looked_at(tmp_path):
    columns = {"image": [f"{k}.png" for k in range(5000)], "sequence": ["s"] * 5000}
    table = FaceTable.from_columns(columns, tmp_path)
    files = prepare._files(Work(tmp_path, table, FileImages(table), RECIPE, None), {})
    assert len(files) == prepare.LOOKED_AT == 1000
    assert {"0.png", "4999.png"} <= set(files)


# ---------------------------------------------------------------------------------------------- bounded memory


class Counting:
    """A reader of endless frames that knows how many of them are alive."""

    def __init__(self, count, seen):
        self.count, self.seen, self.alive, self.most, self.order = count, seen, 0, 0, []

    def read(self, rows):
        (row,) = rows.tolist()
        image = photograph(row, (30, 24, 40) if self.seen(row) else None)
        self.order.append(row)
        self.alive += 1
        self.most = max(self.most, self.alive)
        weakref.finalize(image, self.gone)
        return [image]

    def gone(self):
        self.alive -= 1


@pytest.mark.parametrize("seen", [lambda row: row == 5, lambda row: False, lambda row: row % 50 == 0])
def test_a_long_sequence_is_read_once_in_order_and_held_in_bounded_memory(tmp_path, seen):
    count = 4 * REACH
    columns = {"image": [f"v.avi!{k + 1}" for k in range(count)], "sequence": ["v"] * count, "frame": np.arange(count)}
    table = FaceTable.from_columns(columns, tmp_path)
    reader = Counting(count, seen)
    found = prepared(table, tmp_path, images=reader)
    assert reader.order == list(range(count))
    assert reader.most <= REACH + 3 * placing._BATCH
    near = np.array([min((abs(k - n) for n in range(count) if seen(n)), default=count) for k in range(count)])
    wanted = np.where(near == 0, FOUND, np.where(near <= REACH, NEIGHBOUR, CENTRE))
    assert found.strings("face")[0].tolist() == wanted.tolist()


def test_frames_of_a_video_become_crops(tmp_path):
    writer = cv2.VideoWriter(str(tmp_path / "v.avi"), cv2.VideoWriter_fourcc(*"MJPG"), 20, (128, 96))
    for k in range(1, 7):
        writer.write(cv2.cvtColor(photograph(k, (20 + 6 * k, 20, 40)), cv2.COLOR_RGB2BGR))
    writer.release()
    table = FaceTable.from_columns({"image": [f"v.avi!{n}" for n in (6, 2, 4, 9)]}, tmp_path)
    found = prepared(table, tmp_path / "out", images=VideoImages(table))
    assert list(found.strings("source_image")[0]) == ["v.avi!6", "v.avi!2", "v.avi!4"]  # there is no frame 9
    left = found.numbers("crop_matrix")[0]
    np.testing.assert_allclose(-left[:, 2] / left[:, 0], [20 + 6 * n - 0.2 * 40 for n in (6, 2, 4)], atol=1.5)


# ------------------------------------------------------------------------------------- killed, divided, many hands


def forked(function, *arguments):
    """Return the exit code of a process that calls ``function``."""
    child = multiprocessing.get_context("fork").Process(target=function, args=arguments)
    child.start()
    child.join(60)
    return child.exitcode


def kill_when_called(*_, **__):
    os.kill(os.getpid(), signal.SIGKILL)


def killed_in(place, table, folder, store):
    """Prepare and be killed: at an image, in the middle of a unit's table, or before the final table is there."""
    finder = RedSquares
    if place == "unit":
        write = prepare._write_ipc

        def half(path, unit):
            write(path, unit)
            path.write_bytes(path.read_bytes()[:100])
            kill_when_called()

        prepare._write_ipc = half
    elif place == "table":
        FaceTable._with_schema_metadata = kill_when_called
    elif place == "written table":
        described = FaceTable._with_schema_metadata

        def last(table, path):
            files.os.fsync = kill_when_called
            return described(table, path)

        FaceTable._with_schema_metadata = last
    else:
        finder = functools.partial(Killed, place, str(folder.parent / f"killed{place}"))
    prepared(table, folder, finder=finder, store=store)


@pytest.mark.parametrize("store", ["files", "shards"])
def test_killed_at_any_point_and_run_again_the_bytes_are_the_same(photographs, tmp_path, store):
    prepared(photographs, tmp_path / "whole", store=store)
    for place in (1, 6, 13, "unit", "table", "written table"):
        code = forked(killed_in, place, photographs, tmp_path / "cut", store)
        assert code == -signal.SIGKILL, place
        assert not list((tmp_path / "cut").rglob("table-*.arrow"))
    assert list((tmp_path / "cut").rglob(".table-*.part.arrow"))
    prepared(photographs, tmp_path / "cut", store=store)
    assert contents(tmp_path / "cut") == contents(tmp_path / "whole")


def test_what_is_done_is_not_done_again(photographs, tmp_path):
    prepared(photographs, tmp_path)
    again = functools.partial(Killed, 1, str(tmp_path / "never"))  # would kill this process
    other = photographs.with_columns({"au12_occurrence": np.zeros(18, np.float32)})
    table = prepared(other, tmp_path, finder=again, read={**READ, "threshold": 3})
    assert not table.numbers("au12_occurrence")[0].any()
    assert len(list(tmp_path.rglob("table-*"))) == 2


@pytest.mark.parametrize("store", ["files", "shards"])
def test_shards_of_a_job_array_and_a_merge_give_the_same_bytes(photographs, tmp_path, store):
    prepared(photographs, tmp_path / "whole", store=store)
    work, units = work_of(photographs, tmp_path / "parts", store=store), plan(photographs, 4)
    assert len(units) == 3
    prepare.run(work, units[1::2], 0)
    with pytest.raises(DataError, match=r"2 of 3 units are not done \(number 0, 2\); run .* with shard=0/2, or"):
        merge(work, units, READ)
    prepare.run(work, units[0::2], 0)
    merge(work, units, READ)
    assert contents(tmp_path / "parts") == contents(tmp_path / "whole")


def test_processes_that_are_killed_are_reported_and_any_number_gives_the_same_bytes(photographs, tmp_path):
    prepared(photographs, tmp_path / "one")
    finder = functools.partial(Killed, 4, str(tmp_path / "killed"))
    with pytest.raises(DataError, match=r"a process was killed from outside.*of 3 units are done"):
        prepared(photographs, tmp_path / "two", workers=2, finder=finder)
    counts = []
    work, units = work_of(photographs, tmp_path / "two", finder=finder), plan(photographs, 4)
    prepare.run(work, units, 2, lambda done, missed: counts.append((done, missed)))
    merge(work, units, READ)
    assert contents(tmp_path / "one") == contents(tmp_path / "two")
    assert counts


class Slow(RedSquares):
    """Notes its process in a folder, then takes its time."""

    def __init__(self, folder, seconds):
        self.folder, self.seconds = folder, seconds

    def find(self, image):
        (self.folder / f"{os.getpid()}-{time.monotonic_ns()}").touch()
        time.sleep(self.seconds)
        return super().find(image)


@pytest.mark.parametrize("store", ["files", "shards"])
def test_two_runs_at_once_do_each_unit_once(photographs, tmp_path, store):
    cv2.resize(np.zeros((4000, 4000), np.uint8), (2000, 2000), interpolation=cv2.INTER_CUBIC)  # starts OpenCV's threads
    (tmp_path / "seen").mkdir()
    finder = functools.partial(Slow, tmp_path / "seen", 0.05)
    work, units = work_of(photographs, tmp_path / "out", finder=finder, store=store), plan(photographs, 4)
    hands = [multiprocessing.get_context("fork").Process(target=prepare.run, args=(work, units, 0)) for _ in range(2)]
    for hand in hands:
        hand.start()
    for hand in hands:
        hand.join(60)
        assert hand.exitcode == 0
    assert len(list((tmp_path / "seen").iterdir())) == 18
    merge(work, units, READ)
    prepared(photographs, tmp_path / "whole", store=store)
    assert contents(tmp_path / "out") == contents(tmp_path / "whole")


def test_a_unit_that_another_run_has_done_is_left_as_it_is(photographs, tmp_path):
    table = prepared(photographs, tmp_path)
    crops = {path: (path.stat().st_ino, path.stat().st_mtime_ns) for path in (table.root / "crops").rglob("*.jpg")}
    work = work_of(photographs, tmp_path, finder=functools.partial(Killed, 1, str(tmp_path / "never")))
    counts = []
    for unit in plan(photographs, 4):  # as a process does that took the list of units before they were done
        work.do(unit, lambda done, missed: counts.append(done))
    assert sum(counts) == 18
    work.unit_path(unit).unlink()  # killed between the crops and the table
    work_of(photographs, tmp_path).do(unit)
    assert {path: (path.stat().st_ino, path.stat().st_mtime_ns) for path in crops} == crops


def test_crops_appear_whole_on_the_disk_and_before_their_table(photographs, tmp_path, monkeypatch):
    work, (unit, *_) = work_of(photographs, tmp_path), plan(photographs, 4)
    synced, sync = set(), os.fsync
    monkeypatch.setattr(os, "fsync", lambda handle: (synced.add(os.fstat(handle).st_ino), sync(handle)))

    def looked(done, missed):
        assert not list((work.folder / "crops").glob("[!.]*"))

    write = prepare._write_ipc

    def writing(path, table):
        crops = list((work.folder / "crops" / unit.name).rglob("*.jpg"))
        assert len(crops) == len(unit.rows)
        assert {crop.stat().st_ino for crop in crops} <= synced
        write(path, table)

    monkeypatch.setattr(prepare, "_write_ipc", writing)
    work.do(unit, looked)
    assert work.unit_path(unit).is_file()


def test_merging_leaves_alone_what_others_are_working_on(photographs, tmp_path):
    work, units = work_of(photographs, tmp_path), plan(photographs, 4)
    prepare.run(work, units, 0)
    parts = [work.folder / place / name for place in ("units", "crops") for name in (".{}.1a.part", ".{}.1a.part.x")]
    kinds = {name: [part.with_name(part.name.format(name)) for part in parts] for name in ("other", units[0].name)}
    for part in [part for some in kinds.values() for part in some]:
        part.mkdir() if part.parent.name == "crops" else part.touch()
    merge(work, units, READ)
    assert all(part.exists() for part in kinds["other"])
    assert not any(part.exists() for part in kinds[units[0].name])


def test_processes_end_with_the_one_that_started_them(photographs, tmp_path):
    (tmp_path / "seen").mkdir()
    work = work_of(photographs, tmp_path / "out", finder=functools.partial(Slow, tmp_path / "seen", 60))
    main = multiprocessing.get_context("fork").Process(target=prepare.run, args=(work, plan(photographs, 4), 2))
    main.start()
    try:
        pids = until(lambda: {int(p.name.partition("-")[0]) for p in (tmp_path / "seen").iterdir()}, 2, 60)
    finally:
        main.kill()
        main.join()
    assert until(lambda: {pid for pid in pids if is_running(pid)}, 0, 10) == set()


def until(look, count, seconds):
    """Return what ``look`` sees when it is ``count`` things, or at the end."""
    end = time.monotonic() + seconds
    while len(seen := look()) != count and time.monotonic() < end:
        time.sleep(0.05)
    return seen


def is_running(pid):
    try:
        return Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0] != "Z"
    except FileNotFoundError:
        return False


# -------------------------------------------------------------------------------------------------- mismatches


def test_training_is_told_what_is_there_and_in_what_it_differs(photographs, tmp_path):
    def said(recipe=RECIPE, read=READ, name="drawn"):
        with pytest.raises(DataError) as caught:
            find_prepared(tmp_path, name, recipe, read)
        return str(caught.value)

    assert "drawn is not prepared with recipe small (nothing in " in said()
    work, units = work_of(photographs, tmp_path), plan(photographs, 4)
    prepare.run(work, units[:1], 0)
    assert "has no table yet" in said()
    prepare.run(work, units, 0)
    merge(work, units, READ)
    assert len(find_prepared(tmp_path, "drawn", dataclasses.replace(RECIPE, window=44, size=20), READ)) == 18
    made = find_prepared(tmp_path, "drawn", RECIPE, READ).metadata
    assert made["colours"] == json.loads(next(tmp_path.rglob("recipe.json")).read_text())["colours"] == "RGB"
    assert "prepared with prepare.stored=48, wanted 64" in said(dataclasses.replace(RECIPE, stored=64))
    wrong = dataclasses.replace(RECIPE, margin=0.1, provider="mediapipe")
    assert "prepare.margin=0.2, wanted 0.1; prepare.provider=faceapi, wanted mediapipe" in said(wrong)
    assert "prepared with dataset.threshold=2, wanted 1" in said(read={**READ, "threshold": 1})
    assert "prepared with dataset.threshold=2, wanted null" in said(read={**READ, "threshold": None})
    upright = said(dataclasses.replace(RECIPE, kind="box"))
    assert "prepared with prepare.kind=similarity, wanted box" in upright
    assert "template" not in upright, "nobody can set the mean face"
    recipe = next(tmp_path.rglob("recipe.json"))
    recipe.write_text(recipe.read_text().replace("mean68-v1", "mean68-v0"))
    recipe.parent.rename(recipe.parent.with_name("other"))
    assert said().endswith("prepared with the mean face of another version, which has other crops")


@pytest.mark.parametrize(
    ("absent", "count", "shards"),
    [
        ([0, 1, 2], 3, "shard=0/1"),
        ([0, 2], 3, "shard=0/2"),
        ([3, 19, 35], 40, "shard=3/16"),
        ([1, 4, 17, 20, 33, 36], 40, "shard=1/16, shard=4/16"),
        ([7], 5000, "shard=7/5000"),
        ([2, 3], 5, "shard=2/4, shard=3/4"),
    ],
)
def test_missing_units_are_named_by_the_shards_that_do_them(absent, count, shards):
    from affect.data.prepare import _shards

    assert _shards(absent, count) == shards
    done = set()
    for word in shards.split(", "):
        i, n = map(int, word.removeprefix("shard=").split("/"))
        done |= set(range(i, count, n))
    assert done == set(absent)


def test_a_folder_that_was_prepared_in_another_way_is_kept(photographs, tmp_path):
    prepared(photographs, tmp_path)
    with pytest.raises(ConfigError, match=r'prepared with store="files", now "shards": keep to that, or remove'):
        work_of(photographs, tmp_path, store="shards")
    with pytest.raises(ConfigError, match=r"quality=95, now 80"):
        work_of(photographs, tmp_path, quality=80)
    with pytest.raises(ConfigError, match="format='gif'; write jpg or png"):
        work_of(photographs, tmp_path, format="gif")
    described = json.loads((folder_of(tmp_path, "drawn", RECIPE) / "recipe.json").read_text())
    assert described["recipe"]["size"] == 48
    assert described["recipe"]["template"]
    assert (described["colours"], described["models"]) == ("RGB", {"detector": "red squares"})


# ------------------------------------------------------------------------------------------------ a real finder


def test_the_packaged_finder_finds_a_face_that_fills_a_delivered_crop(tmp_path):
    from affect.geometry import build_finder

    dials = FaceDials(image_size=112, subjects=2, yaw=(-3, 3), pitch=(-3, 3), roll=(-3, 3), zoom=(0.9, 0.94))
    table = FaceTable.from_arrow(faces.labels_table(dials, 5, 2), tmp_path, {})
    for k, image in enumerate(FaceImages(dials, 5).read(np.arange(2))):
        write_image(tmp_path / f"{k}.png", image)
    plain = FaceTable.from_columns({"image": ["0.png", "1.png"]}, tmp_path)
    placer = Placer(RECIPE.storage(), plain, build_finder("faceapi", "faceapi"))
    images = FileImages(plain).read(np.arange(2))
    drawn = table.numbers("landmarks_68")[0].reshape(-1, 68, 2)
    for place, _, how in placer.placed(iter(images), np.arange(2), np.arange(2), ordered=False):
        assert how.face == FOUND
        error = np.linalg.norm(how.observation.points[17:] - drawn[place, 17:], axis=1).mean()
        assert error < 0.12 * np.ptp(drawn[place][:, 0])
