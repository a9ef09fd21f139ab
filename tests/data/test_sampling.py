# SPDX-License-Identifier: Apache-2.0
"""Orders and batches: exact counts, a function of seed and epoch, any starting point, any number of processes."""

from __future__ import annotations

from itertools import chain

import numpy as np
import pytest

from affect.data.sampling import (
    EpochSampler,
    OrderedSampler,
    Pool,
    Sampling,
    alternating_length,
    alternating_order,
    apportion,
    class_pools,
    epoch_order,
    weighted_pool,
)
from affect.errors import ConfigError, DataError


def flat(sampler):
    return [key.positions.tolist() for key in sampler]


def test_uniform_visits_every_position_once():
    order = epoch_order([Pool(np.arange(100), 1.0)], 100, seed=1, epoch=0)
    assert sorted(order.tolist()) == list(range(100))
    assert order.tolist() != list(range(100))


def test_order_is_a_function_of_seed_and_epoch():
    pools = [Pool(np.arange(50), 1.0)]
    orders = {(s, e): epoch_order(pools, 50, s, e).tolist() for s in (0, 1) for e in (0, 1)}
    assert len({tuple(order) for order in orders.values()}) == 4
    assert epoch_order(pools, 50, 1, 1).tolist() == orders[1, 1]


def test_a_longer_epoch_repeats_every_position_equally():
    order = epoch_order([Pool(np.arange(10), 1.0)], 25, 0, 0)
    counts = np.bincount(order, minlength=10)
    assert sorted(np.unique(counts)) == [2, 3]


def test_balanced_classes_are_drawn_equally():
    classes = np.array([0] * 70 + [1] * 20 + [2] * 10)
    pools = class_pools(np.arange(100), classes, 1.0)
    for epoch in range(3):
        order = epoch_order(pools, 100, 0, epoch)
        drawn = np.bincount(classes[order])
        assert drawn.max() - drawn.min() <= 1
        for value in range(3):
            within = np.bincount(order[classes[order] == value], minlength=100)[classes == value]
            assert within.max() - within.min() <= 1, "rows of a class are drawn equally often"


def test_unlabelled_rows_keep_their_share():
    classes = np.array([-1] * 40 + [0] * 50 + [1] * 10)
    order = epoch_order(class_pools(np.arange(100), classes, 1.0), 100, 0, 0)
    assert np.bincount(classes[order] + 1).tolist() == [40, 30, 30]
    assert class_pools(np.arange(3), np.array([-1, -1, -1]), 1.0)[0].share == 1.0


def test_weights_give_expected_counts():
    weights = np.array([0.0, 1.0, 1.0, 2.0, 4.5])
    pool = weighted_pool(np.arange(5), weights, 1.0, "w")
    counts = np.bincount(epoch_order([pool], 85, 0, 0), minlength=5)
    assert counts[0] == 0
    np.testing.assert_array_less(np.abs(counts - weights * 10), 1)
    assert counts.sum() == 85
    means = np.mean([np.bincount(epoch_order([pool], 17, 0, e), minlength=5) for e in range(200)], 0)
    np.testing.assert_allclose(means, weights * 2, atol=0.15)


@pytest.mark.parametrize(
    ("weights", "message"), [([1, -1], "not negative"), ([np.nan, 1], "finite"), ([0, 0], "no training row")]
)
def test_bad_weights(weights, message):
    with pytest.raises(DataError, match=f"column w: .*{message}"):
        weighted_pool(np.arange(2), np.array(weights, float), 1.0, "column w")


def test_ratios_are_exact():
    pools = [Pool(np.arange(1000), 3.0), Pool(np.arange(1000, 1010), 1.0)]
    order = epoch_order(pools, 400, 0, 0)
    assert (order >= 1000).sum() == 100
    assert apportion([0.2, 0.3, 0.5], 7).sum() == 7
    assert apportion([1, 0, 1], 3).tolist() == [2, 0, 1]


# ---------------------------------------------------------------------------------------------- samplers


def sampler(length=50, batch=8, **options):
    return EpochSampler([Pool(np.arange(length), 1.0)], length, batch, seed=7, **options)


def test_batches_partition_the_epoch():
    loaded = flat(sampler())
    assert [len(batch) for batch in loaded] == [8] * 6 == [8] * len(sampler())
    assert len(set(chain(*loaded))) == 48
    kept = flat(sampler(drop_last=False))
    assert sorted(chain(*kept)) == list(range(50))
    assert len(kept) == len(sampler(drop_last=False)) == 7


def test_a_tiny_epoch_is_one_batch():
    assert [len(batch) for batch in flat(sampler(5))] == [5]
    assert len(sampler(5)) == 1


def test_any_batch_of_any_epoch_can_come_first():
    whole = sampler()
    whole.set_epoch(3)
    expected = flat(whole)
    for first in (0, 2, 5):
        resumed = sampler()
        resumed.load_state_dict({"epoch": 3, "batch": first})
        keys = list(resumed)
        assert [key.positions.tolist() for key in keys] == expected[first:]
        assert {key.epoch for key in keys} == {3}
        assert len(resumed) == 6, "the length stays that of a whole epoch"
        assert resumed.state_dict() == {"epoch": 3, "batch": first}
        resumed.set_epoch(4)
        whole.set_epoch(4)
        assert flat(resumed) == flat(whole), "the next epoch starts at its beginning"
        whole.set_epoch(3)


def test_epochs_differ():
    a = sampler()
    first = flat(a)
    a.set_epoch(1)
    assert flat(a) != first


@pytest.mark.parametrize("world", [2, 3])
def test_processes_share_out_each_global_batch(world):
    parts = [flat(sampler(50, 4, rank=rank, world_size=world)) for rank in range(world)]
    assert len({len(part) for part in parts}) == 1
    alone = flat(EpochSampler([Pool(np.arange(50), 1.0)], 50, 4 * world, seed=7))
    for k, together in enumerate(alone):
        assert sorted(chain(*(part[k] for part in parts))) == sorted(together)


@pytest.mark.parametrize("drop_last", [True, False])
@pytest.mark.parametrize("length", [3, 5, 8, 17])
def test_processes_have_equally_many_equal_batches(length, drop_last):
    parts = [flat(sampler(length, 2, rank=rank, world_size=4, drop_last=drop_last)) for rank in range(4)]
    shapes = {tuple(len(batch) for batch in part) for part in parts}
    assert len(shapes) == 1
    assert len(parts[0]) == len(sampler(length, 2, world_size=4, drop_last=drop_last)) > 0
    assert all(shapes.pop())


# ------------------------------------------------------------------------------------ one source per batch


def three(shares=(1.0, 1.0, 1.0)) -> list[Pool]:
    """Return sources of 100, 20 and 3 rows at positions from 0, 1000 and 2000 on."""
    sizes = zip((100, 20, 3), shares, strict=True)
    return [Pool(1000 * k + np.arange(size), share, source=k) for k, (size, share) in enumerate(sizes)]


def alternating(shares=(1.0, 1.0, 1.0), length=96, batch=8, seed=7, **options) -> EpochSampler:
    return EpochSampler(three(shares), length, batch, seed, alternate=True, **options)


def owners(sampler) -> list[int]:
    """Return the source of each batch, and make sure that it is one."""
    found = [{position // 1000 for position in batch} for batch in flat(sampler)]
    assert {len(sources) for sources in found} == {1}
    return [next(iter(sources)) for sources in found]


def test_batches_of_equal_shares_take_turns():
    assert owners(alternating()) == [0, 1, 2] * 4
    assert [len(batch) for batch in flat(alternating())] == [8] * 12 == [8] * len(alternating())


def test_batches_of_unequal_shares_are_spread_evenly():
    found = owners(alternating((4.0, 2.0, 1.0), length=28 * 8))
    assert [found.count(k) for k in range(3)] == [16, 8, 4]
    for source, every in ((0, 28 / 16), (1, 28 / 8), (2, 28 / 4)):
        at = np.flatnonzero(np.array(found) == source)
        assert np.abs(np.diff(at) - every).max() < 2, source
    assert 2 not in owners(alternating((1.0, 1.0, 0.0)))


def test_rows_of_a_source_are_drawn_equally_often_in_alternating_batches():
    visited = np.concatenate(flat(alternating(length=480)))
    for k, size in enumerate((100, 20, 3)):
        counts = np.bincount(visited[visited // 1000 == k] - 1000 * k, minlength=size)
        assert counts.sum() == 160
        assert counts.max() - counts.min() <= 1


def test_every_source_has_a_batch_even_in_a_short_epoch():
    sampler = alternating((100.0, 1.0, 1.0), length=20)
    assert sorted(owners(sampler)) == [0, 0, 1, 2]
    assert sampler.length == alternating_length(three((100.0, 1.0, 1.0)), 20, 8) == 32
    assert owners(alternating(length=3)) == [0, 1, 2]


def test_alternating_batches_are_a_function_of_seed_and_epoch_and_can_start_anywhere():
    whole = alternating()
    whole.set_epoch(2)
    expected = flat(whole)
    for first in (0, 1, 5, 11):
        resumed = alternating()
        resumed.load_state_dict({"epoch": 2, "batch": first})
        assert flat(resumed) == expected[first:]
    for other in (alternating(), alternating(seed=8)):
        other.set_epoch(3)
        assert flat(other) != expected


def test_shares_of_other_sources_do_not_change_which_rows_a_source_gives():
    """Sources are drawn each from a generator of its own: adding one leaves the others' first batches as they were."""
    alone = alternating_order(three()[:2], 96, 8, seed=7, epoch=0).reshape(-1, 8)
    both = alternating_order(three(), 144, 8, seed=7, epoch=0).reshape(-1, 8)
    assert [b.tolist() for b in both if b[0] < 1000] == [b.tolist() for b in alone if b[0] < 1000]


@pytest.mark.parametrize("world", [2, 3])
def test_processes_share_out_alternating_batches(world):
    parts = [alternating(batch=4, length=96, rank=rank, world_size=world) for rank in range(world)]
    alone = flat(alternating(batch=4 * world, length=96))
    assert len({len(part) for part in parts}) == 1
    for part in parts:
        owners(part)
    for k, together in enumerate(alone):
        assert sorted(chain(*(flat(part)[k] for part in parts))) == sorted(together)


def test_several_pools_of_a_source_share_its_batches():
    classes = np.array([0] * 90 + [1] * 10)
    pools = [*class_pools(np.arange(100), classes, 1.0), Pool(1000 + np.arange(5), 1.0, source=1)]
    order = alternating_order(pools, 320, 8, seed=0, epoch=0)
    own = order[order < 1000]
    assert len(own) == 160
    assert np.bincount(classes[own]).tolist() == [80, 80]


@pytest.mark.parametrize("world", [1, 2, 3, 8])
@pytest.mark.parametrize("length", [0, 5, 16, 17])
def test_evaluation_has_no_duplicates(length, world):
    parts = [OrderedSampler(length, 4, rank, world) for rank in range(world)]
    visited = [position for part in parts for batch in flat(part) for position in batch]
    assert visited == list(range(length))
    assert [len(flat(part)) for part in parts] == [len(part) for part in parts]


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"kind": "random"}, "write uniform, balanced, weighted"),
        ({"kind": "balanced"}, "takes a data.sampling.key"),
        ({"key": "expression"}, "takes no data.sampling.key"),
        ({"length": 0}, "at least 1"),
        ({"ratios": {"a": -1.0, "b": 2.0}}, "shares must be positive"),
        ({"ratios": {"a": 0.0}}, "shares must be positive"),
        ({"batches": "alternating"}, "write mixed or alternate"),
    ],
)
def test_bad_sampling(arguments, message):
    with pytest.raises(ConfigError, match=message):
        Sampling(**arguments)
