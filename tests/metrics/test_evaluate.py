# SPDX-License-Identifier: Apache-2.0
from __future__ import annotations

import json

import numpy as np
import pytest
import torch

from affect.errors import ConfigError, DataError
from affect.metrics import AUC, CCC, F1, bootstrap, evaluate
from tests.metrics.every import every_metric

NAMES = list(every_metric())
KEYS = ["name", "value", "low", "high", "constant", "n", "groups", "higher_is_better", "subgroup", "reason"]
GROUPS = np.arange(90) % 9


@pytest.mark.parametrize("name", NAMES)
def test_records_hold_what_the_metric_says(name):
    metric, data = every_metric()[name]
    records = evaluate([metric], *(tensor.numpy() for tensor in data), groups=GROUPS, resamples=30, seed=4)
    assert [record["name"] for record in records] == list(metric.names)
    score, constants = metric.score(*data), metric.constants(data[1], data[2])
    intervals, sizes = bootstrap(metric, *data, GROUPS, resamples=30, seed=4), metric.sizes(data[1], data[2])
    for record in records:
        key = record["name"]
        assert list(record) == KEYS
        assert record["value"] == pytest.approx(float(score[key]))
        assert record["n"] == sizes[key] > 0
        assert record["groups"] == 9
        assert record["higher_is_better"] is metric.higher(key)
        assert record["subgroup"] is None
        if key in metric.counts:
            assert record["low"] is record["high"] is record["constant"] is None
            assert record["reason"] == "a count"
        else:
            assert record["constant"] == pytest.approx(float(constants[key]))
            assert (record["low"], record["high"]) == pytest.approx(intervals[key])
            assert record["low"] <= record["high"]
            assert record["reason"] is None
    json.dumps(records, allow_nan=False)


def test_subgroups_are_tables_of_their_rows():
    metrics = {name: metric for name, (metric, _) in every_metric().items()}
    data = every_metric()["f1"][1]
    chosen = [metrics["f1"], metrics["auc"]]
    light = np.array(["dark", "bright", ""], dtype=object)[np.arange(90) % 3]
    age = np.where(np.arange(90) < 30, np.nan, np.where(np.arange(90) < 60, 20.0, 40.5))
    records = evaluate(chosen, *data, GROUPS, {"light": light, "age": age}, resamples=25)
    names = list(dict.fromkeys(record["subgroup"] for record in records))
    assert names == [None, "light=bright", "light=dark", "age=20", "age=40.5"]
    for subgroup, rows in (("light=dark", light == "dark"), ("age=40.5", age == 40.5)):
        expected = evaluate(chosen, *(tensor[rows] for tensor in data), GROUPS[rows], resamples=25)
        found = [record for record in records if record["subgroup"] == subgroup]
        assert [{**record, "subgroup": None} for record in found] == expected


def test_a_subgroup_may_lie_in_one_group_or_have_no_labels():
    metric, (values, target, mask) = every_metric()["ccc"]
    part = np.array(["one", "none", "rest"])[np.minimum(np.arange(90) % 9, 2)]
    mask = mask & torch.from_numpy(part != "none").unsqueeze(1)
    records = evaluate([metric], values, target, mask, GROUPS, {"part": part}, resamples=10)
    by_name = {(record["subgroup"], record["name"]): record for record in records}
    one = by_name["part=one", "ccc/mean"]
    assert one["value"] is not None
    assert one["low"] is one["high"] is None
    assert one["reason"] == "only one group"
    none = by_name["part=none", "ccc/mean"]
    assert none["value"] is none["constant"] is none["low"] is None
    assert none["n"] == 0
    assert by_name["part=rest", "ccc/mean"]["reason"] is None


@pytest.mark.parametrize("groups", [2, 4, 5])
def test_fewer_than_five_groups_give_no_interval(groups):
    metric, data = every_metric()["ccc"]
    for record in evaluate([metric], *data, np.arange(90) % groups, resamples=10):
        assert record["groups"] == groups
        assert record["reason"] == (f"only {groups} groups" if groups < 5 else None)
        assert (record["low"] is None) is (record["high"] is None) is (groups < 5)


def test_an_output_without_labels_is_null():
    metric, (values, target, mask) = every_metric()["f1"]
    mask = mask.clone()
    mask[:, 1] = False
    records = {record["name"]: record for record in evaluate([metric], values, target, mask, GROUPS, resamples=10)}
    assert records["f1/output1"]["value"] is records["f1/output1"]["constant"] is records["f1/output1"]["low"] is None
    assert records["f1/mean"]["value"] == records["f1/output0"]["value"]


def test_metrics_may_share_names():
    """Two landmark errors with different normalisers both report ``nme``."""
    data = every_metric()["alignment"][1]
    both = [type(every_metric()["alignment"][0])("5", normaliser) for normaliser in ("inter_ocular", "box")]
    for metric in both:
        metric.bind(["points"])
    records = [r for r in evaluate(both, *data, GROUPS, resamples=20) if r["name"] == "nme"]
    assert records[0]["low"] < records[0]["value"] < records[0]["high"]
    assert records[1]["low"] < records[1]["value"] < records[1]["high"]
    assert records[0]["value"] != records[1]["value"]


def test_values_that_are_not_finite_are_named():
    metric, (values, target, mask) = every_metric()["f1"]
    row = int(mask[:, 0].nonzero()[4])
    broken = values.clone()
    broken[row, 0] = torch.nan
    with pytest.raises(DataError, match=f"row {row}: the prediction of a labelled cell"):
        evaluate([metric], broken, target, mask)
    with pytest.raises(DataError, match="the label of a labelled cell"):
        evaluate([metric], values, broken, mask)
    broken = torch.where(mask, values, torch.nan)  # what is masked may be anything
    assert evaluate([metric], broken, target, mask) == evaluate([metric], values, target, mask)


def test_bad_arguments_are_named():
    metric, data = every_metric()["f1"]
    with pytest.raises(DataError, match="groups has 3 entries for 90"):
        evaluate([metric], *data, groups=[1, 2, 3])
    with pytest.raises(DataError, match="age has 2 entries"):
        evaluate([metric], *data, subgroups={"age": [1, 2]})
    with pytest.raises(ConfigError, match="group_by=frame"):
        evaluate([metric], *(torch.cat([t, t]) for t in data), subgroups={"frame": np.arange(180)}, resamples=0)
    with pytest.raises(ConfigError, match="bind"):
        evaluate([F1()], *data)


def test_without_groups_or_resamples_there_are_values_only():
    data = every_metric()["ccc"][1]
    metric = CCC()
    metric.bind(["a", "b"])
    for arguments, reason in (({}, "no groups"), ({"groups": GROUPS, "resamples": 0}, "no resamples")):
        records = evaluate([metric], *data, **arguments)
        assert {record["reason"] for record in records} == {reason}
        assert {record["groups"] for record in records} == {9 if "groups" in arguments else None}
        assert all(record["low"] is None and record["value"] is not None for record in records)


def test_one_class_only_has_no_auc_and_says_so():
    metric = AUC()
    metric.bind(["a"])
    records = evaluate([metric], torch.rand(9, 1), torch.ones(9, 1), torch.ones(9, 1) > 0, np.arange(9), resamples=5)
    assert all(record["value"] is None and record["reason"] == "no such number" for record in records)
