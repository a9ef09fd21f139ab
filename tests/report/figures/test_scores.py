# SPDX-License-Identifier: Apache-2.0
"""Bars, intervals, constants and cells are those of the records, and no label covers another."""

from __future__ import annotations

import math

import numpy as np
import pytest
from matplotlib.colors import to_rgba

from affect import labels
from affect.errors import DataError
from affect.report.figures import au_bars, confusion_matrix, ladder_bars, style
from tests.report.figures.artists import all_text, by_gid, outside, overlaps, texts
from tests.report.sample_records import ALIGNMENT, AU, record


def widths(figure) -> list[float]:
    return [bar.get_width() for container in figure.axes[0].containers for bar in container]


def test_bars_have_the_values_intervals_and_constants_of_the_records():
    figure = au_bars(AU)
    assert widths(figure) == [0.30, 0.80, 0.55]
    (interval,) = by_gid(figure, "interval f1/AU12")
    assert list(interval.get_xdata()) == [0.75, 0.85]
    (constant,) = by_gid(figure, "constant f1/AU1")
    assert list(constant.get_xdata()) == [0.45, 0.45]
    assert not by_gid(figure, "interval f1/AU45")
    assert not by_gid(figure, "constant f1/AU45")
    shown = {score: by_gid(figure, f"value f1/{score}")[0].get_text() for score in ("AU1", "AU12", "AU45", "mean")}
    assert shown == {"AU1": "0.30", "AU12": "0.80", "AU45": "–", "mean": "0.55"}


def test_bar_and_label_belong_together():
    figure = au_bars(AU)
    axes = figure.axes[0]
    names = dict(zip(axes.get_yticks(), [label.get_text() for label in axes.get_yticklabels()], strict=True))
    drawn = {names[round(bar.get_y() + bar.get_height() / 2, 6)]: bar for c in axes.containers for bar in c}
    assert drawn["lip corner puller  AU12"].get_width() == 0.80
    assert drawn["inner brow raiser  AU1"].get_facecolor() == to_rgba(style.POOR_SCORE)
    assert drawn["mean"].get_facecolor() == to_rgba(style.SCORE)


@pytest.mark.parametrize("count", [1, 12, 30])
def test_any_number_of_action_units_is_readable(count):
    rng = np.random.default_rng(count)
    records = [
        record(f"f1/AU{au}", v := float(rng.random()), v - 0.05, v + 0.05, constant=0.3)
        for au in list(labels.AU_NAMES)[:count]
    ]
    figure = au_bars(records, title="F1 per action unit on the held-out part of a data set with a long name")
    assert len(widths(figure)) == count
    assert not overlaps(figure)
    assert not outside(figure)


def test_other_metrics_tasks_and_subgroups_are_left_out():
    records = [*AU, record("auc/AU1", 0.9), record("f1/AU1", 0.9, subgroup="s=1"), record("f1/smiling", 0.7, task="b")]
    assert widths(au_bars(records, task="au")) == [0.30, 0.80, 0.55]
    assert "b · smiling" in texts(au_bars(records))


def test_negative_values_and_lower_is_better():
    figure = au_bars([record("ccc/valence", -0.2, -0.4, 0.1, constant=0.0), record("ccc/arousal", 0.3)], "ccc")
    assert figure.axes[0].get_xlim()[0] < -0.4
    figure = au_bars([record("rmse/pitch", 12.0, 11.0, 13.5, constant=20.0, higher_is_better=False)], "rmse")
    assert figure.axes[0].get_xlim()[1] > 20.0
    assert by_gid(figure, "value rmse/pitch")[0].get_text() == "12.0"
    (bar,) = (bar for container in figure.axes[0].containers for bar in container)
    assert bar.get_facecolor() == to_rgba(style.SCORE)


def test_nothing_but_missing_values_can_be_drawn():
    figure = au_bars([record("f1/AU1", None), record("f1/AU2", math.nan)])
    assert all_text(figure).count("–") == 2
    assert "no record of F1" in all_text(au_bars([]))
    assert "no record of AUC" in all_text(au_bars(AU, "auc"))


def test_ladder_has_a_row_per_arm_and_a_panel_per_metric():
    arms = {
        "from scratch": [*AU, *ALIGNMENT],
        "frozen encoder with a very long name that has to be cut": [record("f1/mean", 0.6, 0.5, 0.7, constant=0.525)],
        "fine-tuned": [],
    }
    figure = ladder_bars(arms)
    visible = [axes for axes in figure.axes if axes.get_visible()]
    assert [axes.get_title("left").split()[0] for axes in visible] == ["au", "landmarks", "landmarks"]
    assert widths(figure) == [0.55, 0.6]
    assert [axes.get_title("left")[-1] for axes in visible] == ["↑", "↓", "↓"]
    assert [label.get_text() for label in visible[0].get_yticklabels()][::2] == ["from scratch", "fine-tuned"]
    assert len(by_gid(figure, "constant f1/mean")) == 2
    assert not outside(figure)


def test_ladder_of_chosen_names_and_of_nothing():
    figure = ladder_bars({"a": AU}, ["f1/AU12"])
    assert widths(figure) == [0.80]
    assert not overlaps(figure)
    assert "nothing to compare" in all_text(ladder_bars({}))
    assert "nothing to compare" in all_text(ladder_bars({"a": []}))
    ladder_bars({"a": [record("f1/mean", None)]})
    with pytest.raises(DataError, match="no arm holds"):
        ladder_bars({"a": AU}, ["f1/AU13"])


def test_confusion_rows_add_up_and_cells_are_written():
    counts = np.array([[8, 2, 0], [1, 1, 2], [0, 0, 0]])
    figure = confusion_matrix(counts, ["happily surprised", "neutral", "fear"])
    (image,) = by_gid(figure, "confusion")
    share = np.asarray(image.get_array().filled(np.nan))
    assert np.allclose(share[:2], [[0.8, 0.2, 0.0], [0.25, 0.25, 0.5]])
    assert np.isnan(share[2]).all()
    assert by_gid(figure, "0,0")[0].get_text() == "80 %"
    assert by_gid(figure, "1,2")[0].get_text() == "50 %"
    assert not by_gid(figure, "0,2")
    text = texts(figure)
    assert "happily surprised  (10)" in text
    assert "fear  (0)" in text
    assert "no samples" in text
    # Accuracy over 14 samples, mean over the two classes that occur: (0.8 + 0.25) / 2.
    assert "Accuracy 64.3 % of 14; mean class accuracy 52.5 %." in all_text(figure)


@pytest.mark.parametrize("classes", [labels.EXPRESSION_ORDERS["affectnet8"], labels.RAFDB_COMPOUND, ("a", "b")])
def test_class_names_of_any_length_fit(classes):
    matrix = np.random.default_rng(0).integers(1, 1000, (len(classes), len(classes)))
    figure = confusion_matrix(matrix, classes)
    assert not outside(figure)
    assert set(classes) <= set(texts(figure))


def test_confusion_of_little_or_nothing():
    assert "no classes" in all_text(confusion_matrix(np.zeros((0, 0)), []))
    assert "no samples" in all_text(confusion_matrix(np.zeros((2, 2)), ["a", "b"]))
    confusion_matrix(np.array([[np.nan]]), ["a"])
    with pytest.raises(DataError, match=r"shape \(2, 3\) for 2 classes"):
        confusion_matrix(np.zeros((2, 3)), ["a", "b"])
    with pytest.raises(DataError, match="negative"):
        confusion_matrix(-np.ones((2, 2)), ["a", "b"])


def test_dollar_signs_are_text():
    confusion_matrix(np.ones((1, 1)), ["$\\bad$"]).canvas.draw()
    au_bars([record("f1/$\\bad$", 0.5)], title="$\\bad$").canvas.draw()
    ladder_bars({"$\\bad$": AU}).canvas.draw()
