# SPDX-License-Identifier: Apache-2.0
"""``affect submit`` from a checkpoint and from its predictions table, on a drawn tree of Aff-Wild2."""

from __future__ import annotations

import json
import shutil

import pytest

from affect.commands import submit, train
from affect.commands.main import main
from affect.data.table import FaceTable
from affect.errors import ConfigError, DataError
from affect.labels import AU_SETS
from affect.report.submission import TRACKS


@pytest.fixture(scope="module")
def run(tmp_path_factory):
    """A run of two batches on a tree of the multi-task challenge, and the tree."""
    from affect.commands.configuration import compose

    folder = tmp_path_factory.mktemp("affwild2")
    tree = folder / "tree"
    words = ["dataset.count=40", "dataset.dials.subjects=12", "dataset.dials.image_size=48"]
    assert main(["synthesize", "layout=affwild2_mtl", f"out={tree}", *words]) == 0
    config = compose(
        "train",
        [
            "dataset=affwild2_mtl",
            f"dataset.root={tree}",
            "task=[au,expression,valence_arousal]",
            "debug=fast",
            "data.limit=null",
            "encoder=timm",
            "encoder.name=test_resnet",
            "encoder.image_size=32",
            "data.num_workers=0",
            "callbacks.progress=null",
            "trainer.enable_progress_bar=false",
            "logger=none",
            "bootstrap.resamples=0",
            f"paths.output={folder / 'run'}",
            f"paths.cache={folder / 'cache'}",
        ],
    )
    train.run(config)
    return folder / "run", tree


def listed(tree, per_video: int = 3):
    """Names of the first frames of each video of the tree, and a video that has no crops."""
    videos = sorted(path.name for path in (tree / "cropped_aligned").iterdir() if path.is_dir())
    return [f"{video}/{number:05d}.jpg" for video in [*videos, "absent"] for number in range(1, per_video + 1)]


def test_a_checkpoint_answers_every_listed_frame(run, tmp_path, compose, capsys):
    folder, tree = run
    names = listed(tree, 200)
    sample = tmp_path / "sample.txt"
    sample.write_text("\n".join([TRACKS["mtl"].header, *(f"{name}," for name in names)]) + "\n")
    out = tmp_path / "out.txt"
    words = (f"checkpoint={folder}", f"root={tree}", f"sample={sample}", f"out={out}", "data.num_workers=0")
    submit.run(compose("submit", "track=mtl", *words))
    lines = out.read_text().splitlines()
    assert lines[0] == TRACKS["mtl"].header
    assert [line.split(",")[0] for line in lines[1:]] == names
    assert {len(line.split(",")) for line in lines[1:]} == {16}
    said = capsys.readouterr().out
    assert "1 videos without any prediction (200 frames: absent) have valence and arousal 0" in said
    assert "frames without a prediction take that of the nearest frame of their video" in said
    answers = dict(line.split(",", 1) for line in lines[1:])
    assert answers["absent/00007.jpg"] == "0,0,0" + ",0" * 12

    # The table of the same checkpoint gives the same answers where it has the frame.
    table = FaceTable.read_parquet(folder / "predictions" / "test.parquet")
    table_out = tmp_path / "table.txt"
    submit.run(compose("submit", "track=va", f"predictions={folder}/predictions/test.parquet", f"out={table_out}"))
    by_frame = dict(line.split(",", 1) for line in table_out.read_text().splitlines()[1:])
    checked = 0
    for video, frame in zip(table.strings("sequence")[0], table.column("frame").to_pylist(), strict=True):
        name = f"{video}/{frame:05d}.jpg"
        valence, arousal = (float(x) for x in by_frame[name].split(","))
        if name in answers:
            ours = [float(x) for x in answers[name].split(",")[:2]]
            assert ours == pytest.approx([valence, arousal], abs=2e-5)
            checked += 1
    assert checked


def test_predictions_may_be_a_folder_with_one_table(run, tmp_path, compose):
    folder, _ = run
    with pytest.raises(ConfigError, match=r"name one predictions table \(there: predictions/test"):
        submit.run(compose("submit", "track=au", f"predictions={folder}"))
    FaceTable.read_parquet(folder / "predictions" / "test.parquet").to_parquet(tmp_path / "predictions" / "x.parquet")
    submit.run(compose("submit", "track=au", f"predictions={tmp_path}", f"out={tmp_path}/a.txt"))
    assert (tmp_path / "a.txt").read_text().startswith(TRACKS["au"].header)


def test_thresholds_come_from_the_run_and_are_told(run, tmp_path, compose, capsys):
    folder, tree = run
    names = [f"AU{k}" for k in AU_SETS["affwild2"]]
    copy = tmp_path / "run"
    shutil.copytree(folder, copy)
    tuned = {name: 0.02 * k for k, name in enumerate(names)}
    for path in (copy / "results.json", copy / "release" / "preprocess.json"):
        held = json.loads(path.read_text())
        assert set(held["thresholds"]["values"]["au"]) == set(names), "a run stores the fixed ones, too"
        held["thresholds"] = {"rule": "tuned", "values": {"au": tuned}, "part": "validation", "rows": 9}
        path.write_text(json.dumps(held))

    def answers(*words):
        submit.run(compose("submit", "track=au", f"out={tmp_path}/out.txt", "data.num_workers=0", *words))
        lines = (tmp_path / "out.txt").read_text().splitlines()[1:]
        return [line.split(",", 1)[1] for line in lines], " ".join(capsys.readouterr().out.split())

    table = f"predictions={copy}/predictions/test.parquet"
    explicit = "thresholds={" + ",".join(f"{name}:{value}" for name, value in tuned.items()) + "}"
    wanted, said = answers(table, explicit)
    assert "AU26 0.22 on: thresholds=…" in said
    found, said = answers(table)
    assert found == wanted
    assert "AU1 0, AU2 0.02, AU4 0.04, AU6 0.06, AU7 0.08, AU10 0.1, AU12 0.12, AU15 0.14, AU23 0.16, " in said
    assert f"AU26 0.22 on: the tuned ones of {copy}" in said
    assert answers(table, "thresholds=0.5")[0] != wanted

    sample = tmp_path / "sample.txt"
    sample.write_text("\n".join([TRACKS["au"].header, *(f"{name}," for name in listed(tree))]) + "\n")
    by_checkpoint, said = answers(f"checkpoint={copy}", f"root={tree}", f"sample={sample}")
    assert f"the tuned ones of {copy}/release" in said
    assert len(by_checkpoint) == len(listed(tree))

    shutil.copy(copy / "predictions" / "test.parquet", tmp_path / "alone.parquet")
    assert "present from 0.5 on" in answers(f"predictions={tmp_path}/alone.parquet")[1]
    assert "present from 0.5 on: the fixed ones" in answers(f"predictions={folder}/predictions/test.parquet")[1]


def test_the_first_word_is_the_track(capsys):
    assert main(["submit", "vaa"]) == 2
    assert "affect submit has no 'vaa'; did you mean va?" in capsys.readouterr().err


def test_what_is_missing_is_said(tmp_path, compose):
    with pytest.raises(ConfigError, match="one of predictions=<table of affect evaluate> and checkpoint=<run>"):
        submit.run(compose("submit", "track=va"))
    with pytest.raises(ConfigError, match="predicts the frames of sample="):
        submit.run(compose("submit", "track=va", f"checkpoint={tmp_path}"))
    with pytest.raises(DataError, match=r"predictions=.*none\.parquet: no such file"):
        submit.run(compose("submit", "track=va", f"predictions={tmp_path}/none.parquet"))


def test_a_tree_without_the_listed_videos_is_refused(run, tmp_path, compose):
    folder, _ = run
    sample = tmp_path / "sample.txt"
    sample.write_text(f"{TRACKS['va'].header}\nnowhere/00001.jpg,\n")
    words = (f"checkpoint={folder}", f"root={tmp_path}", f"sample={sample}")
    with pytest.raises(DataError, match="no crop of the 1 listed videos in its folders cropped_aligned"):
        submit.run(compose("submit", "track=va", *words))
