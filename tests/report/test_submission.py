# SPDX-License-Identifier: Apache-2.0
"""Submission files: the exact text, every listed frame answered, and one line that says what is wrong with a sample."""

from __future__ import annotations

import numpy as np
import pyarrow as pa
import pytest

from affect import labels
from affect.errors import ConfigError, DataError
from affect.report.submission import (
    TRACKS,
    Frames,
    columns_of,
    decide,
    every_frame,
    fill,
    frames_of,
    read_sample,
    write_submission,
)

VA = "image_location,valence,arousal"


def frames(*names: str) -> Frames:
    return frames_of(pa.array(names), "predictions, row")


def sample(tmp_path, text: str):
    path = tmp_path / "sample.txt"
    path.write_text(text)
    return path


def columns(track: str, rows: int) -> dict[str, np.ndarray]:
    return {name: np.zeros(rows) for name in columns_of(track)}


def test_headers_are_those_of_the_sample_files():
    assert {name: track.header for name, track in TRACKS.items()} == {
        "va": VA,
        "expr": "image_location,Neutral,Anger,Disgust,Fear,Happiness,Sadness,Surprise,Other",
        "au": "image_location,AU1,AU2,AU4,AU6,AU7,AU10,AU12,AU15,AU23,AU24,AU25,AU26",
        "mtl": "image,valence,arousal,expression,aus",
    }


@pytest.mark.parametrize(
    ("track", "line"),
    [
        ("va", "v/00001.jpg,-0.25,0.5"),
        ("expr", "v/00001.jpg,4"),
        ("au", "v/00001.jpg,0,0,0,0,0,0,1,0,0,0,1,0"),
        ("mtl", "v/00001.jpg,-0.25,0.5,4,0,0,0,0,0,0,1,0,0,0,1,0"),
    ],
)
def test_the_file_of_each_track_is_exactly_this(tmp_path, track, line):
    known = {
        "valence": -0.25,
        "arousal": 0.5,
        "expression_happiness": 0.6,
        "expression_other": 0.4,
        "au12_occurrence": 0.9,
        "au25_occurrence": 0.5,
        "au26_occurrence": 0.49,
    }
    cells = columns(track, 1)
    cells |= {name: np.array([value]) for name, value in known.items() if name in cells}
    images = pa.array(["v/00001.jpg"])
    filling = fill(frames("v/00001.jpg"), frames("cropped_aligned/v/00001.jpg"))
    write_submission(tmp_path / "out.txt", track, images, filling, decide(track, cells))
    assert (tmp_path / "out.txt").read_bytes() == f"{TRACKS[track].header}\n{line}\n".encode()


def test_a_listed_frame_takes_the_nearest_prediction_of_its_video_and_the_earlier_of_two():
    listed = frames(*(f"a/{number:05d}.jpg" for number in range(1, 9)), "b/00004.jpg")
    predicted = frames("x/a/00006.jpg", "x/a/00002.jpg", "x/b/00001.jpg", "x/c/00001.jpg")
    found = fill(listed, predicted)
    assert found.row.tolist() == [1, 1, 1, 1, 0, 0, 0, 0, 2]  # frame 4 lies between 2 and 6
    assert found.distance.tolist() == [1, 0, 1, 2, 1, 0, 1, 2, 3]
    assert found.unlisted == 2


def test_filling_agrees_with_a_search_frame_by_frame():
    generator = np.random.default_rng(0)
    listed = [(video, number) for video in "abcd" for number in range(1, 60)]
    known = [(v, n) for v, n in listed if v != "d" and generator.random() < 0.2]
    known = [known[k] for k in generator.permutation(len(known))]
    found = fill(*(frames(*(f"{v}/{n:05d}.jpg" for v, n in some)) for some in (listed, known)))
    for (video, number), row, distance in zip(listed, found.row, found.distance, strict=True):
        own = [n for v, n in known if v == video]
        if not own:
            assert (row, distance) == (-1, 0)
            continue
        best = min(own, key=lambda n: (abs(n - number), n))
        assert known[row] == (video, best)
        assert distance == abs(best - number)


def test_a_video_without_any_prediction_has_the_fallback(tmp_path):
    filling = fill(frames("a/00001.jpg", "b/00001.jpg"), frames("a/00003.jpg"))
    cells = {name: np.ones(1) for name in columns_of("mtl")}
    answers = decide("mtl", cells)
    write_submission(tmp_path / "o.txt", "mtl", pa.array(["a/00001.jpg", "b/00001.jpg"]), filling, answers)
    assert (tmp_path / "o.txt").read_text().split("\n")[1:3] == [
        "a/00001.jpg,1,1,0" + ",1" * 12,
        "b/00001.jpg,0,0,0" + ",0" * 12,
    ]


def test_lines_follow_the_sample_file_and_are_read_as_they_are_written(tmp_path):
    path = sample(tmp_path, f"{VA}\nb-1-30x40/00010.jpg,\na_left/00001.jpg,\r\nb-1-30x40/00002.jpg\n\n")
    images, listed = read_sample(path, "va")
    assert images.to_pylist() == ["b-1-30x40/00010.jpg", "a_left/00001.jpg", "b-1-30x40/00002.jpg"]
    assert [(listed.videos[c], n) for c, n in zip(listed.codes, listed.numbers, strict=True)] == [
        ("b-1-30x40", 10),
        ("a_left", 1),
        ("b-1-30x40", 2),
    ]


def test_without_a_sample_file_videos_go_from_frame_1_to_the_last_predicted_one():
    images, listed = every_frame(frames("b/00002.jpg", "a/00003.jpg", "b/00001.jpg"))
    assert images.to_pylist() == ["a/00001.jpg", "a/00002.jpg", "a/00003.jpg", "b/00001.jpg", "b/00002.jpg"]
    assert listed.numbers.tolist() == [1, 2, 3, 1, 2]
    assert listed.videos[listed.codes].tolist() == ["a", "a", "a", "b", "b"]


def test_classes_are_numbered_in_the_order_of_the_challenge_whatever_the_model_knows():
    for place, name in enumerate(labels.EXPRESSION_ORDERS["abaw"]):
        assert decide("expr", {f"expression_{name}": np.ones(1), "expression_contempt": np.ones(1)})["expr"] == place


def test_each_action_unit_may_have_a_threshold_of_its_own():
    cells = {name: np.full(2, 0.4) for name in columns_of("au")}
    by_name = dict.fromkeys(TRACKS["au"].header.split(",")[1:], 0.5) | {"AU12": 0.4}
    assert decide("au", cells, by_name)["au"].tolist() == [[0] * 6 + [1] + [0] * 5] * 2
    with pytest.raises(ConfigError, match="no action unit AU3"):
        decide("au", cells, by_name | {"AU3": 0.5})
    with pytest.raises(ConfigError, match="AU2=None"):
        decide("au", cells, {"AU1": 0.5})
    with pytest.raises(ConfigError, match=r"AU1=1\.5"):
        decide("au", cells, 1.5)


@pytest.mark.parametrize(
    ("text", "said"),
    [
        ("image_location,Valence,arousal,x\n", "line 1: expected image_location,valence,arousal"),
        (f"{TRACKS['mtl'].header}\nv/00001.jpg,\n", "that is the header of track=mtl"),
        (f"{VA}\nv/00001.jpg,\n\nv/00002.jpg,\n", "line 3: expected <video>/00001.jpg"),
        (f"{VA}\nv/00001.jpg,\n00002.jpg,\n", "line 3: '00002.jpg' names no frame"),
        (f"{VA}\nv/00001.jpg,\nw/00001.jpg,\nv/00001.jpg,\n", "line 4: frame v/00001 is there a second time"),
        (f"{VA}\n", "lists no frame"),
    ],
)
def test_a_damaged_sample_file_is_named_with_its_line(tmp_path, text, said):
    with pytest.raises(DataError, match=said):
        read_sample(sample(tmp_path, text), "va")


def test_damaged_predictions_are_refused():
    with pytest.raises(DataError, match="row 1: frame v/00001 is there a second time"):
        fill(frames("v/00001.jpg"), frames("a/v/00001.jpg", "b/v/00001.jpg"))
    with pytest.raises(DataError, match="row 1: arousal=nan must lie between -1 and 1"):
        decide("va", {"valence": np.zeros(2), "arousal": np.array([0, np.nan])})
    with pytest.raises(DataError, match="no column arousal, which track=va needs"):
        decide("va", {"valence": np.zeros(2)})
    with pytest.raises(DataError, match="no column expression_neutral"):
        decide("expr", {"valence": np.zeros(2)})
    with pytest.raises(ConfigError, match="track=vaa: did you mean va"):
        decide("vaa", {})


def test_a_million_frames_take_seconds(tmp_path):
    import time

    started = time.perf_counter()
    numbers = np.arange(1, 5001)
    listed = Frames(
        np.array([f"v{k}" for k in range(200)], object), np.repeat(np.arange(200), 5000), np.tile(numbers, 200)
    )
    predicted = Frames(listed.videos, listed.codes[::3], listed.numbers[::3])
    cells = {name: np.zeros(len(predicted.codes)) for name in columns_of("mtl")}
    filling = fill(listed, predicted)
    images = pa.array(np.char.add("v/", np.arange(len(listed.codes)).astype(str)))
    write_submission(tmp_path / "o.txt", "mtl", images, filling, decide("mtl", cells))
    assert time.perf_counter() - started < 20  # 2 s on two idle cores; a loop over rows takes minutes
