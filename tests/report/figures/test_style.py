# SPDX-License-Identifier: Apache-2.0
"""Saving is atomic and repeatable, text is measured, and the palette stays apart for colour-blind readers."""

from __future__ import annotations

import subprocess
import sys
from itertools import combinations

import numpy as np
import pytest
from matplotlib.colors import to_rgb
from PIL import Image

from affect.errors import ConfigError, DataError
from affect.report.figures import save, save_image, style, training_curves


def figure():
    return training_curves({"train/loss": [(1, 1.0), (2, 0.5)]})


@pytest.mark.parametrize("suffix", [".png", ".pdf", ".svg"])
def test_save_returns_the_path_and_leaves_nothing_else(tmp_path, suffix):
    path = save(figure(), tmp_path / "deep" / f"curves{suffix}")
    assert path == tmp_path / "deep" / f"curves{suffix}"
    assert [item.name for item in path.parent.iterdir()] == [path.name]
    assert path.stat().st_size > 1000


def test_equal_figures_give_equal_bytes(tmp_path):
    assert save(figure(), tmp_path / "a.png").read_bytes() == save(figure(), tmp_path / "b.png").read_bytes()


def test_width_suits_a_readme(tmp_path):
    with Image.open(save(figure(), tmp_path / "a.png")) as image:
        assert image.width <= style.WIDTH * style.DPI


def test_unknown_endings_are_refused(tmp_path):
    with pytest.raises(ConfigError, match=r"cannot save a figure as \.bmp"):
        save(figure(), tmp_path / "a.bmp")
    with pytest.raises(ConfigError, match=r"a file without ending"):
        save_image(np.zeros((4, 4, 3), np.uint8), tmp_path / "a")
    assert list(tmp_path.iterdir()) == []


def test_images_keep_their_pixels(tmp_path):
    image = np.random.default_rng(0).integers(0, 256, (9, 7, 3), dtype=np.uint8)
    assert (np.asarray(Image.open(save_image(image, tmp_path / "a.png"))) == image).all()
    smooth = np.full((16, 16, 3), (200, 100, 50), np.uint8)
    saved = np.asarray(Image.open(save_image(smooth, tmp_path / "a.jpg"))).astype(int)
    assert np.abs(saved - smooth).max() <= 4


@pytest.mark.parametrize("bad", [np.zeros((3, 4, 4), np.uint8), np.zeros((4, 4, 3)), np.zeros((0, 4, 3), np.uint8)])
def test_what_is_no_image_is_refused(bad):
    with pytest.raises(DataError, match=r"expected uint8 \(height, width, 3\)"):
        style.as_rgb(bad)


def test_text_that_fits_is_kept_and_other_text_is_cut():
    assert style.fit("happiness", 2.0, 9) == "happiness"
    cut = style.fit("disgustedly surprised", 0.8, 9)
    assert cut.endswith("…")
    assert style.text_width(cut, 9) <= 0.8
    assert style.text_width(cut[:-1] + "xx…", 9) > 0.8
    assert style.fit_pixels("abc", 0.0, style.font(20)) == ""


def test_wrapping_keeps_every_word_and_the_width():
    text = "a caption that is longer than a face is wide\nand a second line"
    lines = style.wrap(text, 1.2, 8)
    assert " ".join(lines).split() == text.split()
    assert all(style.text_width(line, 8) <= 1.2 for line in lines)
    assert "and" in [line.split()[0] for line in lines]
    short = style.wrap(text, 1.2, 8, lines=2)
    assert len(short) == 2
    assert short[-1].endswith("…")
    assert style.text_width(short[-1], 8) <= 1.2


def test_measured_width_is_the_drawn_width():
    drawn = style.new_figure(6, 1, layout=None)
    text = drawn.text(0, 0.5, "lip corner depressor AU15", fontsize=9)
    drawn.canvas.draw()
    assert text.get_window_extent().width / drawn.dpi == pytest.approx(style.text_width(text.get_text(), 9), rel=0.03)


def test_palette_differs_in_lightness_too():
    luminance = [np.dot(to_rgb(colour), (0.299, 0.587, 0.114)) for colour in (style.PREDICTED, style.TRUE)]
    assert abs(luminance[0] - luminance[1]) > 0.2
    assert len({*style.PALETTE}) == len(style.PALETTE)
    distances = [np.linalg.norm(np.subtract(to_rgb(a), to_rgb(b))) for a, b in combinations(style.PALETTE, 2)]
    assert min(distances) > 0.25


def test_pyplot_is_never_loaded():
    program = "import sys, affect.report.figures; print('matplotlib.pyplot' in sys.modules, 'torch' in sys.modules)"
    done = subprocess.run([sys.executable, "-c", program], check=True, capture_output=True, text=True)
    assert done.stdout.split() == ["False", "False"]
