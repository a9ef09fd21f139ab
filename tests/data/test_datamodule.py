# SPDX-License-Identifier: Apache-2.0
"""The data module: checks before training, parts, counts, workers, and exact resumption within an epoch."""

from __future__ import annotations

import contextlib
import dataclasses
import pickle

import numpy as np
import pytest
import pytorch_lightning as pl
import torch

from affect.data.datamodule import FaceDataModule, count_labels, require_variety, sampling_pools
from affect.data.images import FileImages, Source
from affect.data.protocol import Protocol
from affect.data.sampling import Sampling, epoch_order
from affect.data.table import FaceTable
from affect.data.transforms import FaceTransform
from affect.errors import ConfigError, DataError
from affect.geometry.alignment import CropRecipe
from affect.losses.base import Loss
from affect.tasks.kinds import AUOccurrence, Expression, Landmarks, ValenceArousal
from tests.data import samples

SIZE = 16
AUGMENT = {
    "flip": 0.5,
    "rotation": 10,
    "augment": [
        {"_target_": "albumentations.RandomBrightnessContrast", "p": 0.5},
        {"_target_": "albumentations.GaussNoise", "p": 0.5},
    ],
}


def source(count=60, name="sample", table=None, **options):
    table = samples.table(count, subjects=12) if table is None else table
    return Source(name, table, options.pop("images", samples.DrawnImages(SIZE)), **options)


def module(sources=None, tasks=None, protocol=None, transform=None, **options):
    made = {"au": AUOccurrence([1, 12]), "expression": Expression(), "points": Landmarks("68")}
    return FaceDataModule(
        sources or [source()],
        made if tasks is None else tasks,
        protocol or Protocol(test=0, folds=3, validation_fraction=0.25),
        FaceTransform(SIZE, **(AUGMENT if transform is None else transform)),
        FaceTransform(SIZE),
        **{"batch_size": 8, "seed": 3, **options},
    )


def assert_same(a, b):
    for item in dataclasses.fields(a):
        x, y = getattr(a, item.name), getattr(b, item.name)
        pairs = [(x[key], y[key]) for key in x] if isinstance(x, dict) else [(x, y)]
        assert all(torch.equal(u, v) for u, v in pairs), item.name


# ------------------------------------------------------------------------------------------------- loading


@pytest.fixture(scope="module")
def reference():
    """Two epochs of training batches, loaded in the main process."""
    data = module()
    loader = data.train_dataloader()
    epochs = []
    for epoch in (0, 1):
        loader.sampler.set_epoch(epoch)
        epochs.append(list(loader))
    return epochs


def test_epochs_differ_and_cover_the_training_part(reference):
    first, second = ([batch.row for batch in epoch] for epoch in reference)
    assert len(first) == 30 // 8
    assert torch.cat(first).unique().numel() == 24
    assert not torch.equal(torch.cat(first), torch.cat(second))
    assert torch.cat([batch.flipped for batch in reference[0]]).any()


def test_workers_make_no_difference(reference):
    loader = module(num_workers=2).train_dataloader()
    for epoch, expected in enumerate(reference):
        loader.sampler.set_epoch(epoch)
        for batch, wanted in zip(loader, expected, strict=True):
            assert_same(batch, wanted)


def test_resumption_at_any_batch_is_exact(reference):
    for epoch in (0, 1):
        for first in range(4):
            data = module()
            data.set_position(epoch, first)
            loader = data.train_dataloader()
            loader.sampler.set_epoch(epoch)
            rest = list(loader)
            assert len(rest) == 3 - first
            for batch, wanted in zip(rest, reference[epoch][first:], strict=True):
                assert_same(batch, wanted)


def test_evaluation_is_in_row_order_without_augmentation():
    data = module()
    for part in ("train", "validation", "test", "all"):
        rows = torch.cat([batch.row for batch in data.part_dataloader(part)])
        assert rows.tolist() == np.concatenate(data.part_rows(part)).tolist()
        assert len(rows) == data.rows(part)
        assert not any(batch.flipped.any() for batch in data.part_dataloader(part))
    assert (
        torch.cat([batch.row for batch in data.val_dataloader()]).tolist() == data.part_rows("validation")[0].tolist()
    )


def test_a_sample_sheet_is_spread_over_the_part():
    data = module()
    assert data.sample("train", 100).row.tolist() == data.part_rows("train")[0].tolist()
    assert len(data.sample("test", 5)) == 5
    assert data.sample("test", 2).row.tolist() == data.part_rows("test")[0][[0, -1]].tolist()


def test_a_sample_can_hold_as_many_faces_of_each_source():
    data = module([source(200, "large"), source(24, "small")])
    together, each = (data.sample("train", 5, augment=False, each=each) for each in (False, True))
    assert np.bincount(together.source).tolist() == [4, 1]
    assert np.bincount(each.source).tolist() == [5, 5]
    ends = [[rows[0], rows[-1]] for rows in data.part_rows("train")]
    assert [each.row[[k, k + 4]].tolist() for k in (0, 5)] == ends


def test_limit_keeps_few_rows_of_each_part():
    data = module(limit=6)
    assert [data.rows(part) for part in ("train", "validation", "test", "all")] == [6] * 4
    assert len(list(data.train_dataloader())) == 1


def test_it_can_be_sent_to_a_process(tmp_path):
    table = samples.table(200, tmp_path).save(tmp_path / "t.arrow")
    data = module([source(table=table, images=FileImages(table))])
    sent = pickle.dumps(data.dataset("train", augment=True))
    assert len(sent) < 20_000
    assert len(pickle.loads(sent)) == data.rows("train")


def test_what_a_process_is_sent_does_not_grow_with_the_table(tmp_path):
    sizes = []
    for count in (1_000, 100_000):
        columns = {
            "image": [f"{k}.png" for k in range(count)],
            "sequence": [f"v{20 * k // count:02d}" for k in range(count)],
            "valence": np.zeros(count, np.float32),
            "arousal": np.linspace(-1, 1, count, dtype=np.float32),
        }
        table = FaceTable.from_columns(columns).save(tmp_path / f"{count}.arrow").with_metadata(note="mapped")
        data = module([source(table=table, images=FileImages(table), group="sequence")], {"va": ValenceArousal()})
        dataset = data.dataset("train")
        sizes.append(len(pickle.dumps(dataset)))
        received = pickle.loads(pickle.dumps(dataset))
        assert len(received) == data.rows("train") >= count // 2
        some = np.arange(0, len(received), 37)
        np.testing.assert_array_equal(received.locate(some)[1], data.part_rows("train")[0][some])
    assert sizes[1] < sizes[0] + 200


def test_a_source_may_have_a_protocol_of_its_own():
    columns = {**samples.columns(60, 12), "part": ["train", "dev"] * 30}
    columns["subject"] = [f"s{k % 12:02d}" for k in range(60)]
    official = FaceTable.from_columns(columns, ".", samples.table(2).metadata)
    sources = [source(name="folds"), source(name="parts", table=official)]
    own = Protocol(test="dev", train=["train"], validation_fraction=0.25)
    data = module(sources, protocols={"parts": own})
    alone = module([sources[0]])
    for part in ("train", "validation", "test"):
        np.testing.assert_array_equal(data.part_rows(part)[0], alone.part_rows(part)[0])
    np.testing.assert_array_equal(data.part_rows("test")[1], np.arange(1, 60, 2))
    with pytest.raises(ConfigError, match="a protocol of prats: did you mean parts"):
        module(sources, protocols={"prats": own})


def test_a_source_that_only_trains_leaves_testing_to_the_others():
    sources = [source(name="tested"), source(name="helper")]
    data = module(sources, protocols={"helper": Protocol(train_only=True, validation_fraction=0)})
    assert [len(rows) for rows in data.part_rows("test")] == [len(module([sources[0]]).part_rows("test")[0]), 0]
    assert len(data.part_rows("train")[1]) == 60
    data.setup("fit")


# --------------------------------------------------------------------------------------------- resumption


class Recorder(pl.LightningModule):
    """Remembers which rows each step saw and may stop as if killed."""

    def __init__(self, folder, stop=None):
        super().__init__()
        self.weight = torch.nn.Parameter(torch.zeros(1))
        self.folder, self.stop, self.seen = folder, stop, []

    def training_step(self, batch, index):
        self.seen.append((self.current_epoch, index, batch.row.tolist(), int(batch.image.sum())))
        return (self.weight - batch.image.float().mean()) ** 2

    def on_train_batch_end(self, outputs, batch, index):
        if self.stop is not None and self.global_step == self.stop:
            self.trainer.save_checkpoint(self.folder / "last.ckpt")
            raise KeyboardInterrupt

    def configure_optimizers(self):
        return torch.optim.SGD(self.parameters(), lr=0.1)


def run(folder, stop=None, checkpoint=None, workers=0):
    options = {"enable_progress_bar": False, "enable_model_summary": False, "enable_checkpointing": False}
    trainer = pl.Trainer(
        max_epochs=3, logger=False, accelerator="cpu", default_root_dir=folder, limit_val_batches=0, **options
    )
    model = Recorder(folder, stop)
    with contextlib.suppress(KeyboardInterrupt, SystemExit):
        trainer.fit(model, datamodule=module(num_workers=workers), ckpt_path=checkpoint)
    return model


@pytest.mark.filterwarnings("ignore")
def test_a_killed_run_sees_exactly_the_rest(tmp_path):
    """Lightning hands the loader its place; prefetched batches that no step has seen are loaded again."""
    whole = run(tmp_path)
    assert [epoch for epoch, *_ in whole.seen] == [0, 0, 0, 1, 1, 1, 2, 2, 2]
    for stop, workers in ((1, 0), (3, 0), (4, 2), (6, 0), (8, 0)):
        run(tmp_path, stop, workers=workers)
        rest = run(tmp_path, checkpoint=tmp_path / "last.ckpt", workers=workers)
        assert rest.seen == whole.seen[stop:], stop
        assert torch.equal(rest.weight, whole.weight)


def test_a_foreign_distributed_sampler_is_refused():
    from types import SimpleNamespace

    data = module()
    connector = SimpleNamespace(use_distributed_sampler=True)
    data.trainer = SimpleNamespace(world_size=2, global_rank=1, _accelerator_connector=connector)
    for loader in (data.train_dataloader, data.val_dataloader):
        with pytest.raises(ConfigError, match=r"trainer\.use_distributed_sampler=false"):
            loader()
    connector.use_distributed_sampler = False
    data.trainer.fit_loop = SimpleNamespace(_combined_loader=None)
    assert data.val_dataloader().sampler.start == data.rows("validation") // 2


# ------------------------------------------------------------------------------------------------ summary


def test_summary_counts_rows_groups_and_labels():
    table = samples.table(60, subjects=12)
    points, valid = table.numbers("landmarks_68")
    valid[:5] = False
    table = table.with_columns({"landmarks_68": (points, valid)})
    data = module([source(table=table, recipe=CropRecipe(size=SIZE), skipped={"no label": 7}, notes=("a note",))])
    data.setup("fit")
    summary = data.summary()
    assert {part: counted["rows"] for part, counted in summary["parts"].items()} == {
        part: data.rows(part) for part in ("train", "validation", "test")
    }
    assert sum(counted["rows"] for counted in summary["parts"].values()) == 55
    assert sum(counted["groups"] for counted in summary["parts"].values()) == 12
    assert summary["skipped"] == {"no landmarks to crop by": 5, "no label": 7}
    assert summary["notes"][0] == "a note"
    assert any("no training label of other" in note for note in summary["notes"])
    assert summary["sources"][0]["fingerprint"] == table.fingerprint
    labelled = summary["parts"]["train"]["labels"]["au"]
    target, mask = data.tasks["au"].encode(table, data.part_rows("train")[0])
    assert labelled["labelled"] == dict(zip(("AU1", "AU12"), mask.sum(0).tolist(), strict=True))
    assert labelled["mean"]["AU1"] == pytest.approx(target[mask[:, 0], 0].mean())
    import json

    json.dumps(summary)


def test_evaluation_alone_needs_no_split():
    """A table of one person can be evaluated whole, though it cannot be split."""
    data = module([source(table=samples.table(9, subjects=1))])
    data.setup("test")
    assert len(list(data.part_dataloader("all"))) == 2
    assert set(data.summary()["parts"]) == {"all"}
    with pytest.raises(DataError, match="1 groups cannot fill 3 folds"):
        data.part_dataloader("test")
    whole = module([source(table=samples.table(9, subjects=1))], protocol=Protocol(test="all"))
    assert whole.rows("test") == 9
    with pytest.raises(DataError, match="the train part is empty"):
        whole.part_dataloader("train")


# ------------------------------------------------------------------------------------------------- checks


def test_tasks_are_fitted_on_training_rows_alone():
    class Counting(Loss):
        def fit(self, encoded):
            self.rows = sum(len(part.target) for part in encoded)

    task = AUOccurrence([1, 12], loss=Counting())
    data = module(tasks={"au": task})
    data.setup("fit")
    data.setup("fit")
    assert task.loss.rows == data.rows("train")


def faces(**columns):
    return samples.table(60, subjects=12, landmarks=False).with_columns(columns)


@pytest.mark.parametrize(
    ("columns", "message"),
    [
        ({"au12_occurrence": np.full(60, 3.0)}, r"sample, task au: column au12_occurrence, row 0: value \[3\.0\]"),
        ({"expression": ["happy face"] * 60}, "sample, task expression: column expression, row 0: unknown class"),
        ({"expression": ["happiness"] * 60}, "task expression: all training labels are happiness"),
        ({"expression": [None] * 60}, "task expression: no training row has a label"),
        (
            {"au01_occurrence": np.zeros(60), "au12_occurrence": np.ones(60)},
            r"task au: each output has one value only in training \(AU1=0, AU12=1\)",
        ),
        ({"part": ["train"] * 30 + ["test"] * 30}, "12 groups lie in two parts"),
    ],
)
def test_bad_labels_stop_before_training(columns, message):
    tasks = {"au": AUOccurrence([1, 12]), "expression": Expression(samples.CLASSES)}
    protocol = Protocol(test="test" if "part" in columns else 0, folds=3)
    with pytest.raises((DataError, ConfigError), match=message) as caught:
        module([source(table=faces(**columns))], tasks, protocol).setup("fit")
    assert "\n" not in str(caught.value)


def test_tables_without_the_columns_of_a_task_stop():
    bare = FaceTable.from_columns({"image": [f"{k}" for k in range(9)], "subject": [f"{k}" for k in range(9)]})
    with pytest.raises(DataError, match="AUOccurrence: no table has its columns"):
        module([source(table=bare)], {"au": AUOccurrence([1])}).setup("fit")


def test_a_crop_that_no_row_allows_stops():
    points = (np.zeros((60, 136), np.float32), np.zeros(60, bool))
    table = faces(landmarks_68=points)
    with pytest.raises(DataError, match="no row has the landmarks that the crop needs"):
        module([source(table=table, recipe=CropRecipe(size=SIZE))], {"va": ValenceArousal()}).setup("fit")


def test_partly_constant_labels_are_noted():
    table = faces(au01_occurrence=np.zeros(60))
    task = AUOccurrence([1, 12, 4])
    task.bind([table])
    counts = count_labels(task, [source(table=table)], [np.arange(60)])
    assert require_variety("au", task, counts) == [
        "task au: one value only in training for AU1",
        "task au: no training label of AU4",
    ]


def test_tasks_know_the_rates_of_their_coded_training_cells():
    coded = [None if k % 3 == 0 else float(k % 4 == 0) for k in range(60)]
    table = samples.table(60, subjects=12).with_columns({"au01_occurrence": coded, "au12_occurrence": [1.0] * 60})
    data = module([source(table=table)], {"au": AUOccurrence([1, 4, 12]), "points": Landmarks("68")})
    data.setup("fit")
    rows = data.part_rows("train")[0]
    values, valid = table.numbers("au01_occurrence", rows)
    assert 0 < valid.sum() < len(rows)
    np.testing.assert_allclose(data.tasks["au"].rates, [values[valid].mean(), np.nan, 1.0])
    assert data.tasks["points"].rates is None


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"batch_size": 0}, "batch_size=0"),
        ({"limit": 0}, "limit=0"),
        ({"sources": [source(), source()]}, "sample occurs twice"),
    ],
)
def test_bad_arguments(options, message):
    with pytest.raises(ConfigError, match=message):
        module(**options)
    with pytest.raises(ConfigError, match="part=tset: did you mean test"):
        module().rows("tset")


# ------------------------------------------------------------------------------------------------ sampling


def drawn(sampling, sources, tasks, length):
    rows = [np.arange(len(item.table)) for item in sources]
    return epoch_order(sampling_pools(sampling, sources, rows, tasks), length, 0, 0)


def test_balanced_by_a_task_and_by_columns():
    table = faces(au12_occurrence=np.r_[np.ones(6), np.zeros(54)], side=["left"] * 50 + ["right"] * 10)
    task = Expression(samples.CLASSES)
    task.bind([table])
    sources = [source(table=table)]
    order = drawn(Sampling("balanced", "expression"), sources, {"expression": task}, 60)
    target, mask = task.encode(table, order)
    counts = np.bincount(target[mask.any(1)].argmax(1))
    assert counts.max() - counts.min() <= 1
    assert mask.any(1).sum() == 60 - round(60 * (~task.encode(table).mask.any(1)).mean())
    order = drawn(Sampling("balanced", "au12_occurrence"), sources, {}, 60)
    assert table.numbers("au12_occurrence", order)[0].sum() == 30
    order = drawn(Sampling("balanced", "side"), sources, {}, 60)
    assert (table.strings("side", order)[0] == "left").sum() == 30


def test_weighted_by_a_column():
    table = faces(weight=(np.r_[np.full(30, 2.0), np.ones(30)], np.arange(60) != 0))
    order = drawn(Sampling("weighted", "weight"), [source(table=table)], {}, 88)
    counts = np.bincount(order, minlength=60)
    assert counts[0] == 0, "a row without a weight is not drawn"
    assert counts[1:30].tolist() == [2] * 29
    assert counts[30:].tolist() == [1] * 30


def test_ratios_of_sources():
    sources = [source(60, "large"), source(12, "small")]
    order = drawn(Sampling(ratios={"large": 1, "small": 3}), sources, {}, 72)
    assert (order >= 60).sum() == 54
    data = module(sources, sampling=Sampling(ratios={"small": 3}, length=40), batch_size=20)
    batches = list(data.train_dataloader())
    assert [len(batch) for batch in batches] == [20, 20]
    assert sum(int(batch.source.sum()) for batch in batches) == 30


@pytest.mark.parametrize(("ratios", "expected"), [(None, [5, 1]), ({"large": 1, "small": 1}, [3, 3])])
def test_batches_of_one_source(ratios, expected):
    sources = [source(60, "large"), source(12, "small")]
    sampling = Sampling(ratios=ratios, length=72, batches="alternate")
    data = module(sources, sampling=sampling, batch_size=12)
    loader = data.train_dataloader()
    batches = list(loader)
    assert len(batches) == len(loader) == 6
    found = [set(batch.source.tolist()) for batch in batches]
    assert all(len(each) == 1 for each in found)
    assert [found.count({k}) for k in range(2)] == expected, "by rows, or by the shares asked for"


def test_weighted_and_balanced_rows_alternate_too():
    table = faces(side=["left"] * 50 + ["right"] * 10)
    sources = [source(60, "first", table=table), source(60, "second", table=table)]
    balanced = Sampling("balanced", "side", batches="alternate")
    pools = sampling_pools(balanced, sources, [np.arange(60)] * 2, {})
    assert sorted(pool.source for pool in pools) == [0, 0, 1, 1]
    assert all((pool.positions // 60 == pool.source).all() for pool in pools)


@pytest.mark.parametrize(
    ("sampling", "message"),
    [
        (Sampling("balanced", "au"), "the task has no classes"),
        (Sampling("balanced", "expresion"), "neither a task nor a column; did you mean expression"),
        (Sampling("balanced", "image"), "60 different values|different values are too many"),
        (Sampling("weighted", "wait"), "no such column"),
        (Sampling(ratios={"other": 1}), "no source other"),
    ],
)
def test_bad_sampling_keys(sampling, message):
    table = samples.table(100, landmarks=False)
    task = AUOccurrence([1, 12])
    task.bind([table])
    with pytest.raises(ConfigError, match=message):
        drawn(sampling, [source(table=table)], {"au": task}, 10)


def test_rows_of_a_part_that_nobody_uses_are_counted():
    names = ["train", "test", "val", "extra"]
    table = samples.table(48, subjects=12).with_columns({"part": [names[k % 4] for k in range(48)]})
    summary = module([source(table=table)], protocol=Protocol()).summary()
    assert {part: summary["parts"][part]["rows"] for part in ("train", "validation", "test")} == {
        "train": 12,
        "validation": 12,
        "test": 12,
    }
    assert summary["skipped"] == {"part neither trains, selects nor tests": 12}


def test_rows_without_a_subject_and_of_foreign_classes_are_noted():
    subjects = [f"s{k}" if k < 40 else None for k in range(48)]
    table = samples.table(48).with_columns({"subject": subjects})
    tasks = {"expression": Expression(["neutral", "happiness"])}
    notes = module([source(table=table)], tasks=tasks).summary()["notes"]
    assert "8 rows without subject are groups of their own" in notes
    assert any(note.startswith("task expression: ") and "(sadness " in note for note in notes)


class UnreadableImages(samples.DrawnImages):
    """Images of which none can be read."""

    def read(self, rows):
        raise DataError("faces/0001.png: not a readable image (3 bytes)")


@pytest.mark.parametrize("workers", [0, 1])
def test_an_unreadable_image_is_one_line_from_any_process(workers):
    data = module([source(images=UnreadableImages())], num_workers=workers)
    with pytest.raises(DataError) as caught:
        next(iter(data.part_dataloader("test")))
    assert str(caught.value) == "faces/0001.png: not a readable image (3 bytes)"
