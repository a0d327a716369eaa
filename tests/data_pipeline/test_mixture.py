"""Laws of the mixture: exact shares, no prefix far from them, every source in its own order, and equal on all worlds."""

import random
from decimal import Decimal
from fractions import Fraction
from itertools import count

import numpy as np
import pytest

from data_pipeline.config import DataConfig, sources_of, spelled
from data_pipeline.mixture import SLOTS, Mixture, arrangement, quotas, rank_slots
from data_pipeline.order import Order
from vitscale.base.errors import UsageError

SIZES = [[9, 4, 1, 17, 6], [12, 3, 8, 10], [5, 11, 2]]


def quotas_of(*weights: str | float) -> tuple[int, ...]:
    return quotas([Decimal(str(weight)) for weight in weights])


def mixture_of(*weights: str | float) -> Mixture:
    orders = [Order(SIZES[k], seed=7, lanes=2, window=8, source=k) for k in range(len(weights))]
    return Mixture(orders, quotas_of(*weights))


# ---- weights --------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("weights", "expected"),
    [
        ((1,), (4096,)),
        ((3, 1), (3072, 1024)),
        (("0.75", "0.25"), (3072, 1024)),
        ((1, 1, 1), (1366, 1365, 1365)),  # equal remainders: the one named first
        ((1, 2, 4), (585, 1170, 2341)),  # remainders 0.14, 0.29, 0.57
        ((1, 4095), (1, 4095)),
        ((0.6, 4095), (1, 4095)),  # 0.6/4096 rounds to one slot by its larger remainder
        (("1e-3", "1e-3"), (2048, 2048)),
    ],
)
def test_weights_are_rounded_to_4096ths_by_largest_remainder(weights, expected):
    assert quotas_of(*weights) == expected


def test_the_rounding_is_exact_for_decimal_texts():
    assert quotas_of("0.1", "0.2", "0.7") == quotas_of(1, 2, 7)


def test_a_dataset_that_would_never_be_read_is_refused():
    with pytest.raises(UsageError, match=r"a weight of 0\.4 in 4096 rounds to 0/4096: .* expected at least 1, or leave"):
        quotas_of(0.4, 4095.6)


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("a", [("a", "1")]),
        ("a,b", [("a", "1"), ("b", "1")]),
        ("a=3,/b/c=0.5", [("a", "3"), ("/b/c", "0.5")]),
        ("split=train,x=1/y", [("split=train", "1"), ("x=1/y", "1")]),
        ("v=2=1", [("v=2", "1")]),
        ("s3://bucket/a=.5,digits:train=2", [("s3://bucket/a", "0.5"), ("digits:train", "2")]),
    ],
)
def test_sources_are_read_from_text_and_written_back(text, expected):
    sources = sources_of(text)
    assert [(source.path, source.weight) for source in sources] == [(path, Decimal(weight)) for path, weight in expected]
    assert sources_of(spelled(sources)) == sources


def test_a_single_plain_path_stays_as_it_is():
    assert spelled(sources_of("/data/a")) == "/data/a" and spelled(sources_of("/data/a=5")) == "/data/a"


@pytest.mark.parametrize(
    ("text", "why"),
    [
        ("a=0,b", "weight of a must be above 0, got 0"),
        ("a,b=-1", "weight of b must be above 0, got -1"),
        ("a,,b", "expected DIR or DIR=WEIGHT between the commas, got ''"),
        ("=3", "expected DIR or DIR=WEIGHT"),
    ],
)
def test_wrong_weights_are_refused_where_the_configuration_is_born(text, why):
    with pytest.raises(ValueError, match=why):
        DataConfig(path=text)


# ---- the table ------------------------------------------------------------------------------------------------------


def assert_within_the_bound(weights: tuple[int, ...]) -> None:
    table = arrangement(weights)
    sources = len(weights)
    n = np.arange(1, SLOTS + 1)
    for source, weight in enumerate(weights):
        served = np.cumsum(table == source)
        assert served[-1] == weight
        # In whole numbers: |served - n * weight / 4096| <= 1 - 1 / (2 K - 2).
        assert (np.abs(served * SLOTS - n * weight) * (2 * sources - 2)).max() <= SLOTS * (2 * sources - 3)


def test_every_prefix_of_every_source_stays_within_the_stated_bound():
    chance = random.Random(5)
    for _ in range(40):
        sources = chance.choice([2, 2, 3, 4, 5, 9])
        assert_within_the_bound(quotas_of(*(round(chance.random() ** 3 + 0.001, 6) for _ in range(sources))))
    for weights in [(1, 4095), (4095, 1), (2048, 2048), (1, 1, 4094), (1365, 1365, 1366)]:
        assert_within_the_bound(weights)


def test_two_sources_of_three_to_one_over_8192_positions():
    source, _ = mixture_of(3, 1).sources_at(np.arange(8192))
    assert np.bincount(source).tolist() == [6144, 2048]
    counts = np.cumsum(source == 1)
    assert np.abs(counts - np.arange(1, 8193) / 4).max() <= 0.5
    assert source[:8].tolist() == [0, 0, 1, 0, 0, 0, 1, 0]


def test_the_table_never_changes():
    """Part of order version 1: another table would show other images."""
    table = arrangement((2458, 1229, 409))
    assert table[:24].tolist() == [0, 1, 0, 0, 1, 0, 2, 0, 0, 1, 0, 1, 0, 0, 1, 0, 2, 0, 0, 1, 0, 1, 0, 0]
    assert int((table * np.arange(SLOTS) % 8191).sum()) == 4_192_974


# ---- the order ------------------------------------------------------------------------------------------------------


def test_a_mixture_of_one_is_the_order_itself():
    order = Order(SIZES[0], seed=7, lanes=2, window=8)
    source, samples = Mixture([order], [SLOTS]).samples_at(np.arange(10_000))
    expected = order.samples_at(np.arange(10_000))
    assert not source.any()
    assert [np.array_equal(getattr(samples, name), values) for name, values in vars(expected).items()] == [True] * 5


@pytest.mark.parametrize("weights", [(3, 1), (1, 1, 1), (1, 5, 90)])
def test_each_source_runs_through_its_own_order_without_a_gap(weights):
    mixture = mixture_of(*weights)
    start = 3 * SLOTS - 100  # over the end of a table
    source, own = mixture.sources_at(np.arange(start, start + 2 * SLOTS))
    for number, weight in enumerate(mixture.weights):
        mine = own[source == number]
        assert mine.tolist() == list(range(mine[0], mine[0] + 2 * weight))
    source, own = mixture.sources_at(np.arange(50))
    assert [own[source == number][0] for number in range(len(weights)) if (source == number).any()] == [0] * len(set(source))


def test_samples_are_those_of_the_source_and_any_position_is_found_at_once():
    mixture = mixture_of(2, 3, 1)
    positions = np.random.default_rng(0).integers(0, 10**12, 500)
    source, own = mixture.sources_at(positions)
    found, samples = mixture.samples_at(positions)
    assert found.tolist() == source.tolist()
    for p in range(0, 500, 9):
        expected = mixture.orders[source[p]].sample_at(int(own[p]))
        assert (samples.shard[p], samples.index[p], samples.epoch[p]) == (expected.shard, expected.index, expected.epoch)
        assert mixture.stand_ins(int(positions[p]), 5) == mixture.orders[source[p]].stand_ins(int(own[p]), 5)


@pytest.mark.parametrize("world", [1, 2, 3, 4, 8])
def test_slots_are_sorted_by_source_lane_epoch_row_and_shared_in_that_order(world):
    mixture = mixture_of(2, 3, 1)
    for start in range(0, 2000, 480):
        slots = mixture.slots_of_step(start, 48)
        source, samples = mixture.samples_at(slots)
        columns = (source, samples.lane, samples.epoch, samples.row)
        keys = list(zip(*(column.tolist() for column in columns), strict=True))
        assert keys == sorted(keys) and len(set(keys)) == 48
        assert sorted(slots.tolist()) == list(range(start, start + 48))
        shares = [rank_slots(slots, rank=rank, world=world) for rank in range(world)]
        assert [len(share) for share in shares] == [48 // world] * world
        assert np.concatenate(shares).tolist() == slots.tolist()


def test_the_shards_near_positions_hold_all_their_stand_ins():
    mixture = mixture_of(2, 3, 1)
    for start in range(0, 600, 24):
        positions = np.arange(start, start + 24)
        source, samples = mixture.samples_at(positions)
        needed = set(zip(source.tolist(), samples.shard.tolist(), strict=True))
        for position, number in zip(positions.tolist(), source.tolist(), strict=True):
            needed |= {(number, shard) for shard, _ in mixture.stand_ins(position, 64)}
        near = mixture.shards_near(positions)
        assert needed <= set(near) and len(near) == len(set(near))
    assert mixture.shards_near(np.array([], dtype=np.int64)) == []
    one = mixture.shards_near(np.array([0]))
    assert len(one) < len(SIZES[one[0][0]])  # near, not all


def test_the_written_definition_gives_the_same_table_and_stand_ins():
    """docs/formats.md, section Order, step by step in fractions and plain integers."""
    weights, given, written = (2458, 1229, 409), [0, 0, 0], []
    shares, margin = [Fraction(weight, 4096) for weight in weights], Fraction(1, 2 * 3 - 2)
    for n in range(1, 1001):
        due = [k for k in range(3) if shares[k] * n - given[k] >= margin]
        soonest = {k: next(m for m in count(n) if shares[k] * m - given[k] >= 1 - margin) for k in due}
        written.append(min(due, key=lambda k: (soonest[k], k)))
        given[written[-1]] += 1
    assert arrangement(weights)[:1000].tolist() == written

    sizes, seed = [7, 5], 4
    order = Order(sizes, seed=seed, lanes=1, window=100, source=2)  # one window: the whole line
    raw = np.random.Philox(key=seed | (1 | 2 << 32) << 64, counter=0).random_raw(2).tolist()
    line = [(shard, row) for shard in sorted(range(2), key=raw.__getitem__) for row in range(sizes[shard])]
    for position in range(12):
        numbers = np.random.Philox(key=seed | (5 | 2 << 32) << 64, counter=position << 64).random_raw(64).tolist()
        own = order.sample_at(position)
        wanted = dict.fromkeys(line[number % 12] for number in numbers if line[number % 12] != (own.shard, own.index))
        assert order.stand_ins(position, 64) == list(wanted)
