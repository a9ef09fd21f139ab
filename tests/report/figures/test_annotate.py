# SPDX-License-Identifier: Apache-2.0
"""Annotated pictures are crisp and complete at any size, and no text ever leaves them."""

from __future__ import annotations

import math

import numpy as np
import pytest
from skimage.data import astronaut

from affect.errors import DataError
from affect.report.figures import FaceNote, annotate, annotate_face, annotate_faces, annotate_frame, enlargement, style

BARS = {"AU1": 0.1, "AU12": 0.93, "AU6": 0.8, "bs_mouthLowerDownRightWithAnEndlessName": 0.95, "AU4": math.nan}
FULL = {
    "expression": ("disgustedly surprised and more", 0.973),
    "bars": BARS,
    "affect": (0.8, -0.3),
    "lines": ["a line of text that is far too long for the panel, whatever its width", "second\nthird", ""],
}


@pytest.fixture
def written(monkeypatch):
    """The rectangles (x0, y0, x1, y1) and texts that were written, and the canvas they were written on."""
    found = {}
    original = annotate._write

    def spy(canvas, texts):
        found["size"] = canvas.shape[1], canvas.shape[0]
        found["texts"] = []
        for placed in texts:
            letters = style.font(placed.size, bold=placed.bold)
            text = style.fit_pixels(placed.text, placed.width, letters)
            box = letters.getbbox(text, anchor=placed.anchor)
            at = np.array([round(placed.x), round(placed.y)] * 2)
            found["texts"].append((text, *(at + box)))
        return original(canvas, texts)

    monkeypatch.setattr(annotate, "_write", spy)
    return found


def assert_inside(found) -> None:
    width, height = found["size"]
    for text, x0, y0, x1, y1 in found["texts"]:
        assert x0 >= 0, text
        assert y0 >= 0, text
        assert x1 <= width, text
        assert y1 <= height, text


@pytest.mark.parametrize("shape", [(1, 1), (48, 48), (512, 512), (1500, 2000), (30, 900), (900, 30), (288, 289)])
def test_text_never_leaves_the_picture(written, shape):
    image = np.full((*shape, 3), 90, np.uint8)
    box = [shape[1] * 0.2, shape[0] * 0.1, shape[1] * 1.4, shape[0] * 0.9]
    result = annotate_face(image, box, np.random.default_rng(0).uniform(-5, max(shape) + 5, (68, 2)), **FULL)
    assert result.dtype == np.uint8
    assert result.shape[1::-1] == written["size"]
    assert_inside(written)
    texts = [text for text, *_ in written["texts"]]
    assert "97 %" in texts
    assert "0.93" in texts
    assert "second" in texts
    assert "third" in texts
    assert "−0.30" in texts
    # Nothing is written on the picture itself.
    factor = enlargement(*shape)
    assert all(x0 >= shape[1] * factor for _, x0, *_ in written["texts"])


def test_the_picture_below_is_unchanged_where_nothing_is_drawn():
    image = astronaut()
    before = image.copy()
    result = annotate_face(image, [178, 70, 272, 178], **FULL)
    assert (image == before).all()
    assert result.shape[0] == 512
    drawn = (result[:, :512] != image).any(2)
    rows, columns = np.flatnonzero(drawn.any(1)), np.flatnonzero(drawn.any(0))
    assert abs(rows[0] - 70) <= 4
    assert abs(rows[-1] - 178) <= 4
    assert abs(columns[0] - 178) <= 4
    assert abs(columns[-1] - 272) <= 4
    # The inside of the box stays free.
    assert not drawn[80:168, 188:262].any()


@pytest.mark.parametrize("side", [48, 400])
def test_a_point_is_drawn_at_its_place(side):
    image = np.zeros((side, side, 3), np.uint8)
    x, y = side * 0.3, side * 0.6
    points = np.array([[x, y], [np.nan, 1.0], [side * 50.0, 5.0]])
    result = annotate_face(image, None, points)
    factor = enlargement(side, side)
    light = result[:, : side * factor].astype(float).sum(2)
    light[light < 150] = 0
    where = np.argwhere(light > 0)
    centre = np.average(where, axis=0, weights=light[light > 0])
    assert np.allclose(centre[::-1], (np.array([x, y]) + 0.5) * factor - 0.5, atol=0.15)


def test_sets_of_points_have_colours_of_their_own_which_are_named(written):
    image = np.full((400, 400, 3), 90, np.uint8)
    sets = {
        "68 points": np.array([(100.0, 200)]),
        "5 points": np.array([(300.0, 200), (math.nan, 3)]),
        "none": np.empty((0, 2)),
    }
    points = np.array([(200.0, 100)])
    result = annotate_faces(image, [FaceNote([50, 50, 350, 350], points, further=sets, points_name="98 points")])
    colours = [tuple(result[y, x]) for x, y in ((200, 100), (100, 200), (300, 200))]
    assert colours == [annotate._POINT, annotate._FURTHER[0][1], annotate._FURTHER[1][1]]
    said = [text for text, *_ in written["texts"]]
    assert [said[said.index(name) + 1] for name in ("98 points", *sets)] == ["blue", "orange", "green", "pink"]
    assert annotate._POINT[2] > max(annotate._POINT[:2]), "blue"
    with pytest.raises(DataError, match=r"points of shape \(3,\)"):
        annotate_faces(image, [FaceNote(further={"odd": np.zeros(3)})])


def test_small_pictures_are_enlarged_by_a_whole_factor():
    assert enlargement(48, 48) == 8
    assert enlargement(512, 512) == 1
    assert enlargement(300, 4000) == 1
    assert enlargement(1, 60_000) == 1, "memory does not grow with its length squared"
    assert enlargement(100, 1200) == 3
    gradient = np.tile(np.arange(0, 240, 5, dtype=np.uint8)[:, None, None], (1, 48, 3))
    result = annotate_face(gradient)
    assert result.shape[0] == 384
    assert np.abs(result[4::8, :384].astype(int).mean((1, 2)) - gradient[:, 0, 0]).max() < 4


def test_bars_are_the_largest_and_as_long_as_their_value(written):
    result = annotate_face(np.zeros((512, 512, 3), np.uint8), bars={f"c{k}": k / 10 for k in range(11)}, top=3)
    texts = [text for text, *_ in written["texts"]]
    assert texts == ["c10", "1.00", "c9", "0.90", "c8", "0.80"]
    panel = result[:, 512:]
    blue = (panel == annotate._BAR).all(2)
    track = (panel == annotate._TRACK).all(2)
    lengths = [(blue[row].sum(), (blue[row] | track[row]).sum()) for row in np.flatnonzero(blue.any(1))]
    shares = sorted({round(a / b, 2) for a, b in lengths})
    assert shares == [0.8, 0.9, 1.0]


def test_bar_limit_scales_intensities():
    result = annotate_face(np.zeros((512, 512, 3), np.uint8), bars={"AU12": 2.5, "AU1": -1.0}, bar_limit=5.0)
    blue = (result[:, 512:] == annotate._BAR).all(2)
    track = (result[:, 512:] == annotate._TRACK).all(2)
    row = np.flatnonzero(blue.any(1))[0]
    assert blue[row].sum() / (blue[row] | track[row]).sum() == pytest.approx(0.5, abs=0.01)
    with pytest.raises(DataError, match="bar_limit 0"):
        annotate_face(np.zeros((8, 8, 3), np.uint8), bars={"a": 1.0}, bar_limit=0)


@pytest.mark.parametrize(("valence", "arousal"), [(0.8, 0.5), (-1.0, -1.0), (3.0, 0.0)])
def test_affect_dot_lies_in_its_quadrant(valence, arousal):
    def dot(x: float, y: float) -> np.ndarray:
        panel = annotate_face(np.zeros((512, 512, 3), np.uint8), affect=(x, y))[:, 512:]
        return np.argwhere((panel == annotate._DOT).all(2)).mean(0)

    up, across = dot(0.0, 0.0) - dot(valence, arousal), dot(1.0, 1.0) - dot(0.0, 0.0)
    assert -up[1] / across[1] == pytest.approx(np.clip(valence, -1, 1), abs=0.02)
    assert -up[0] / across[0] == pytest.approx(np.clip(arousal, -1, 1), abs=0.02)


@pytest.mark.parametrize("count", [2, 4, 25])
def test_many_faces_are_numbered_and_all_listed(written, count):
    rng = np.random.default_rng(0)
    boxes = rng.uniform(-30, 500, (count, 2))
    notes = [FaceNote([x, y, x + 60, y + 80], expression=("happiness", 0.5), bars=BARS) for x, y in boxes]
    result = annotate_faces(astronaut(), notes)
    assert_inside(written)
    texts = [text for text, *_ in written["texts"]]
    assert [text for text in texts if text.startswith("face ")] == [f"face {k + 1}" for k in range(count)]
    assert {str(k + 1) for k in range(count)} <= set(texts)
    assert result.shape[1::-1] == written["size"]
    tags = [entry for entry in written["texts"] if entry[0].isdecimal()]
    assert all(x1 <= 512 and y1 <= 512 for _, _, _, x1, y1 in tags)
    cards = [entry for entry in written["texts"] if not entry[0].isdecimal()]
    for i, (_, x0, y0, x1, y1) in enumerate(cards):
        for _, a0, b0, a1, b1 in cards[:i]:
            assert min(x1, a1) - max(x0, a0) <= 0 or min(y1, b1) - max(y0, b0) <= 0


def test_tag_of_a_face_without_a_box_stands_at_its_points(written):
    notes = [
        FaceNote(points=np.array([[100.0, 200.0], [150.0, 260.0]])),
        FaceNote(),
        FaceNote(points=np.full((3, 2), np.nan)),
    ]
    annotate_faces(astronaut(), notes)
    tags = [entry for entry in written["texts"] if entry[0].isdecimal()]
    assert len(tags) == 1
    assert 95 <= tags[0][1] <= 120
    assert 170 <= tags[0][2] <= 200


def test_nothing_found_and_nothing_known(written):
    annotate_faces(astronaut(), [])
    assert [text for text, *_ in written["texts"]] == ["no face found"]
    nothing = FaceNote(box=[np.nan] * 4, points=np.full((4, 2), np.nan), affect=(math.nan, 0.0), bars={"AU1": math.nan})
    result = annotate_faces(astronaut(), [nothing])
    assert [text for text, *_ in written["texts"]] == ["nothing to show"]
    assert (result[:, :512] == astronaut()).all()
    annotate_faces(astronaut(), [FaceNote(expression=("fear", math.nan))])
    assert [text for text, *_ in written["texts"]] == ["fear"]


def test_grey_pictures_become_rgb_and_bad_input_is_refused():
    assert annotate_face(np.zeros((400, 400), np.uint8)).shape[2] == 3
    with pytest.raises(DataError, match=r"box of shape \(3,\)"):
        annotate_face(astronaut(), [1, 2, 3])
    with pytest.raises(DataError, match=r"points of shape \(3,\)"):
        annotate_face(astronaut(), None, np.zeros(3))
    with pytest.raises(DataError, match="expected uint8"):
        annotate_face(np.zeros((4, 4, 3)))


def test_the_same_input_gives_the_same_picture():
    first = annotate_face(astronaut(), [178, 70, 272, 178], **FULL)
    assert (first == annotate_face(astronaut(), [178, 70, 272, 178], **FULL)).all()


@pytest.mark.parametrize("shape", [(360, 640), (120, 160), (720, 400)])
def test_frames_of_a_video_give_pictures_of_one_size_with_all_text_inside(written, shape):
    image = np.zeros((*shape, 3), np.uint8)
    sizes = set()
    for count in (0, 1, 2, 9):
        step = shape[1] / 10
        faces = [FaceNote([k * step, 5, k * step + 30, 40], number=k + 3, **FULL) for k in range(count)]
        sizes.add(annotate_frame(image, faces).shape)
        width, height = written["size"]
        for text, x0, y0, x1, y1 in written["texts"]:
            assert x0 >= 0, text
            assert y0 >= 0, text
            assert x1 <= width, text
            assert y1 <= height, text
        texts = [text for text, *_ in written["texts"]]
        assert ("no face found" in texts) == (count == 0)
        cards = sum(text.startswith("face ") for text in texts)
        [further] = [text for text in texts if "more face" in text] or ["0"]
        assert cards + int(further.split()[0]) == count, "each face has a card or is counted"
        assert {str(k + 3) for k in range(count)} <= set(texts), "each face is numbered in the picture"
    assert len(sizes) == 1


def test_single_bars_may_have_their_own_full_value(written):
    face = FaceNote(
        [0, 0, 9, 9], bars={"AU12": 0.9, "AU12 (au_intensity)": 2.0}, bar_limits={"AU12 (au_intensity)": 5.0}
    )
    annotate_frame(np.zeros((360, 640, 3), np.uint8), [face])
    names = [text for text, *_ in written["texts"] if text.startswith("AU12")]
    assert [name.split()[1] for name in names] == ["lip", "(au_intensity)"], "ordered by how full the bars are"
    with pytest.raises(DataError, match="bar_limit 0"):
        annotate_frame(np.zeros((90, 90, 3), np.uint8), [FaceNote(bars={"a": 1.0}, bar_limits={"a": 0.0})])
