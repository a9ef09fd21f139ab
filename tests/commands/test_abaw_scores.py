# SPDX-License-Identifier: Apache-2.0
"""The scores of the ABAW tracks against what a reader of their definition computes by hand, frame by frame."""

from __future__ import annotations

import numpy as np
import pytest

from affect import labels
from affect.commands import assembly, inference
from affect.data.table import FaceTable

CLASSES, AUS = labels.EXPRESSION_ORDERS["abaw"], labels.AU_SETS["affwild2"]
TRACKS = {"P_VA": "valence_arousal", "P_EXPR": "expression", "P_AU": "au"}


def predictions(rows: int = 90, absent: tuple[int, ...] = ()) -> dict[str, np.ndarray]:
    """Two videos of unlike length and offset; each task is labelled in other frames."""
    generator = np.random.default_rng(0)
    video = np.where(np.arange(rows) < rows // 3, 0, 1)
    va = np.clip(generator.normal(0, 0.2, (rows, 2)) + np.where(video, 0.4, -0.4)[:, None], -1, 1)
    classes = generator.choice([k for k in range(8) if k not in absent], rows)
    au = (generator.random((rows, 12)) < 0.4).astype(float)
    au[:, 7] = 0  # AU15 never occurs, and is never predicted
    guessed = np.clip(au * 0.4 + generator.random((rows, 12)) * 0.7, 0, 1)
    guessed[:, 7] = 0.1
    frame = np.arange(rows)
    return {
        "video": video,
        "va": va,
        "va_hat": np.clip(va + generator.normal(0.05, 0.2, va.shape), -1, 1),
        "va_mask": np.repeat((frame % 3 != 0)[:, None], 2, 1),
        "expr": classes,
        "expr_hat": np.where(generator.random(rows) < 0.6, classes, generator.integers(0, 8, rows)),
        "expr_mask": frame % 4 != 1,
        "au": au,
        "au_hat": guessed,
        "au_mask": generator.random((rows, 12)) < 0.8,
    }


def as_table(data: dict[str, np.ndarray]) -> FaceTable:
    soft = np.where(np.arange(8) == data["expr_hat"][:, None], 0.65, 0.05)
    named = [CLASSES[k] if known else None for k, known in zip(data["expr"], data["expr_mask"], strict=True)]
    columns = {
        "image": [f"{video}/{k:05d}.jpg" for k, video in enumerate(data["video"])],
        "group": [f"v{video}" for video in data["video"]],
        "expression": [CLASSES[k] for k in data["expr_hat"]],
        "target_expression": named,
    }
    columns |= {labels.expression_column(name): soft[:, k] for k, name in enumerate(CLASSES)}
    for k, axis in enumerate(labels.AFFECT_AXES):
        columns[axis] = data["va_hat"][:, k]
        columns[f"target_{axis}"] = (data["va"][:, k].astype(np.float32), data["va_mask"][:, k])
    for k, number in enumerate(AUS):
        column = labels.occurrence_column(number)
        columns[column] = data["au_hat"][:, k]
        columns[f"target_{column}"] = (data["au"][:, k].astype(np.float32), data["au_mask"][:, k])
    return FaceTable.from_columns(columns, ".", {"expressions": list(CLASSES)})


def ccc(x: np.ndarray, y: np.ndarray) -> float:
    covariance = sum((a - x.mean()) * (b - y.mean()) for a, b in zip(x, y, strict=True)) / len(x)
    return 2 * covariance / (x.var() + y.var() + (x.mean() - y.mean()) ** 2)


def f1(found: np.ndarray, true: np.ndarray) -> float:
    """2 tp / (2 tp + fp + fn), and 0 where there is nothing to find and nothing was found."""
    tp = sum(1 for a, b in zip(found, true, strict=True) if a and b)
    wrong = sum(1 for a, b in zip(found, true, strict=True) if bool(a) != bool(b))
    return 2 * tp / (2 * tp + wrong) if tp + wrong else 0.0


def by_hand(data: dict[str, np.ndarray]) -> dict[str, float]:
    hat, true, mask = (data[key].astype(np.float32).astype(float) for key in ("va_hat", "va", "va_mask"))
    labelled = mask[:, 0] > 0
    p_va = np.mean([ccc(hat[labelled, k], true[labelled, k]) for k in range(2)])
    some = data["expr_mask"]
    p_expr = sum(f1(data["expr_hat"][some] == c, data["expr"][some] == c) for c in range(8)) / 8
    p_au = 0.0
    for k in range(12):
        own = data["au_mask"][:, k]
        p_au += f1(data["au_hat"][own, k] >= 0.5, data["au"][own, k] > 0) / 12
    return {"P_VA": float(p_va), "P_EXPR": p_expr, "P_AU": p_au, "P_MTL": float(p_va) + p_expr + p_au}


@pytest.fixture
def scores(compose):
    """Return a function that gives the headline of a protocol for some predictions."""

    def evaluate(data, protocol: str, names: list[str]) -> dict[str, float]:
        config = compose("train", "dataset=affwild2_mtl", "dataset.root=.", f"protocol={protocol}", f"task={names}")
        tasks, table = assembly.build_tasks(config), as_table(data)
        for task in tasks.values():
            task.bind([table.truth()])
            for metric in task.metrics:
                metric.bind(task.outputs)
        headline = inference.resolve_headline(config.protocol.headline, tasks)[0]
        return {r["name"]: r["value"] for r in inference.headline_records(table, tasks, headline, 0, 0.95)}

    return evaluate


@pytest.mark.parametrize("absent", [(), (2, 7)])
def test_the_sum_of_the_multi_task_track_and_its_terms(scores, absent):
    data = predictions(absent=absent)
    wanted = by_hand(data)
    found = scores(data, "abaw_mtl", list(TRACKS.values()))
    assert found == pytest.approx(wanted, abs=1e-6)
    if absent:  # a mean over the classes that occur, as some libraries take it, is another number
        some = data["expr_mask"]
        occurring = [f1(data["expr_hat"][some] == c, data["expr"][some] == c) for c in range(8) if c not in absent]
        assert np.mean(occurring) > found["P_EXPR"] + 0.1


@pytest.mark.parametrize(("name", "task"), TRACKS.items())
def test_each_track_has_the_same_score_by_its_own_protocol(scores, name, task):
    data = predictions()
    protocol = {"P_VA": "abaw_va", "P_EXPR": "abaw_expr", "P_AU": "abaw_au"}[name]
    assert scores(data, protocol, [task]) == pytest.approx({name: by_hand(data)[name]}, abs=1e-6)


def test_frames_are_pooled_and_videos_are_not_averaged(scores):
    data = predictions()
    pooled = scores(data, "abaw_va", ["valence_arousal"])["P_VA"]
    single = []
    for video in (0, 1):
        rows = data["video"] == video
        single.append(by_hand({key: value[rows] for key, value in data.items()})["P_VA"])
    assert pooled == pytest.approx(by_hand(data)["P_VA"], abs=1e-6)
    assert abs(pooled - np.mean(single)) > 0.1


def test_labels_of_other_tasks_change_nothing(scores):
    data = predictions()
    before = scores(data, "abaw_mtl", list(TRACKS.values()))
    changed = {**data, "expr": (data["expr"] + 1) % 8}
    after = scores(changed, "abaw_mtl", list(TRACKS.values()))
    assert (after["P_VA"], after["P_AU"]) == (before["P_VA"], before["P_AU"])
    assert after["P_EXPR"] != before["P_EXPR"]
