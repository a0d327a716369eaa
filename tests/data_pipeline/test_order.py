"""Laws of the order: every image once per epoch, equal for all worlds, and never another one than yesterday's."""

import json
import pickle
import time
from pathlib import Path

import numpy as np
import pytest

from data_pipeline.mixture import SLOTS, Mixture, rank_slots
from data_pipeline.order import FULL_IMAGES_MAX, Order, Purpose, draws, effective_lanes, locate, permutation
from vitscale.base.errors import UsageError

GOLDEN = json.loads((Path(__file__).parents[1] / "golden" / "order.json").read_text())
UNEVEN = [37, 1, 64, 12, 50, 50, 3, 29, 41, 8, 77, 19, 33]

DATASETS = {
    "one shard": ([23], 8, 5),
    "one image": ([1], 8, 5),
    "shards of one image": ([1] * 40, 16, 3),
    "uneven": (UNEVEN, 128, 16),
    "window of one row": (UNEVEN, 2, 1),
    "fewer images than lanes": ([0] * 9 + [2, 0, 1] + [0] * 8, 4, 2),
    "one large shard": ([2, 2, 500, 1, 1, 1, 2, 3, 1], 8, 32),
    "window larger than the lane": (UNEVEN, 2, 10_000),
    "full": (UNEVEN, 128, "full"),
}


def images_of(order: Order, positions: np.ndarray) -> list[tuple[int, int]]:
    samples = order.samples_at(positions)
    return list(zip(samples.shard.tolist(), samples.index.tolist(), strict=True))


def slots_of(order: Order, position: int, global_batch: int) -> np.ndarray:
    """The slots of a step of a run that reads this dataset alone."""
    return Mixture([order], [SLOTS]).slots_of_step(position, global_batch)


@pytest.mark.parametrize("name", DATASETS)
@pytest.mark.parametrize("seed", [0, 2**64 - 1])
def test_every_epoch_uses_every_image_exactly_once(name, seed):
    sizes, lanes, window = DATASETS[name]
    order = Order(sizes, seed=seed, lanes=lanes, window=window)
    everything = [(shard, index) for shard, size in enumerate(sizes) for index in range(size)]
    for epoch in (0, 1, 2, 1000):
        samples = order.samples_at(np.arange(epoch * order.images, (epoch + 1) * order.images))
        # Sorting is right here: the law is about cover.
        assert sorted(zip(samples.shard.tolist(), samples.index.tolist(), strict=True)) == everything
        assert set(samples.epoch.tolist()) == {epoch}


@pytest.mark.parametrize("name", DATASETS)
def test_a_jump_lands_where_a_walk_passes(name):
    sizes, lanes, window = DATASETS[name]
    walked = images_of(Order(sizes, seed=4, lanes=lanes, window=window), np.arange(2 * sum(sizes)))
    for position in reversed(range(0, 2 * sum(sizes), 7)):
        sample = Order(sizes, seed=4, lanes=lanes, window=window).sample_at(position)
        assert (sample.shard, sample.index) == walked[position]


def test_positions_may_come_in_any_order_and_twice():
    order = Order(UNEVEN, seed=1, lanes=2, window=16)
    walked = images_of(order, np.arange(900))
    positions = np.random.default_rng(0).integers(0, 900, 300)
    assert images_of(order, positions) == [walked[p] for p in positions.tolist()]


@pytest.mark.parametrize("world", [1, 2, 3, 4, 6, 8])
@pytest.mark.parametrize("name", ["one shard", "uneven", "full"])
def test_the_world_does_not_change_the_slots_of_a_step(world, name):
    sizes, lanes, window = DATASETS[name]
    order = Order(sizes, seed=2, lanes=lanes, window=window)
    for position in range(0, 3 * order.images, 48):  # 48 divides no epoch: steps run over its end
        slots = slots_of(order, position, 48)
        shares = [rank_slots(slots, rank=rank, world=world) for rank in range(world)]
        assert [len(share) for share in shares] == [48 // world] * world
        assert np.concatenate(shares).tolist() == slots.tolist()


@pytest.mark.parametrize("name", DATASETS)
def test_slots_are_the_step_sorted_by_lane_epoch_and_row(name):
    sizes, lanes, window = DATASETS[name]
    order = Order(sizes, seed=2, lanes=lanes, window=window)
    start = max(0, order.images - 5)
    slots = slots_of(order, start, 48)
    samples = order.samples_at(slots)
    rows = list(zip(samples.lane.tolist(), samples.epoch.tolist(), samples.row.tolist(), strict=True))
    assert rows == sorted(rows) and len(set(rows)) == 48
    assert sorted(slots.tolist()) == list(range(start, start + 48))


def test_a_world_that_divides_the_lanes_gets_whole_lanes():
    order = Order([50] * 64, seed=0, lanes=16, window=8)
    samples = [order.samples_at(rank_slots(slots_of(order, 64, 64), rank=rank, world=4)) for rank in range(4)]
    assert [sorted(set(s.lane.tolist())) for s in samples] == [[0, 1, 2, 3], [4, 5, 6, 7], [8, 9, 10, 11], [12, 13, 14, 15]]


@pytest.mark.parametrize("seed", ["0", "20261122"])
def test_the_order_of_version_1_never_changes(seed):
    order = Order(GOLDEN["shard_images"], seed=int(seed), lanes=GOLDEN["lanes"], window=GOLDEN["window"])
    assert [list(image) for image in images_of(order, np.arange(64))] == GOLDEN["first_64"][seed]
    start = GOLDEN["late_start"]
    assert [list(image) for image in images_of(order, np.arange(start, start + 16))] == GOLDEN["late_16"][seed]


def test_raw_draws_are_philox_4x64_10():
    # The first known-answer vector of Random123 (kat_vectors, philox4x64 10): counter 0, key 0. NumPy steps first, so
    # its first block is that of counter 1; counter 2^256 - 1 steps to 0.
    known = [0x16554D9ECA36314C, 0xDB20FE9D672D0FDC, 0xD7E772CEE186176B, 0x7E68B68AEC7BA23B]
    assert np.random.Philox(key=0, counter=2**256 - 1).random_raw(4).tolist() == known
    same = np.random.Philox(key=9 | Purpose.VIEW << 64, counter=(3 << 64) | (4 << 128) | (5 << 192)).random_raw(6)
    assert draws(9, Purpose.VIEW, (3, 4, 5), count=6).tolist() == same.tolist()


@pytest.mark.parametrize("highest", [2, 50, 2**64])
def test_a_permutation_sorts_and_equal_draws_keep_their_order(highest):
    raw = np.random.default_rng(1).integers(0, highest, 1000, dtype=np.uint64, endpoint=False)
    assert permutation(raw).tolist() == sorted(range(1000), key=raw.tolist().__getitem__)


def test_seeds_and_epochs_have_orders_of_their_own():
    order, other = (Order(UNEVEN, seed=seed, lanes=2, window=16) for seed in (1, 2))
    epochs = [images_of(order, np.arange(e * order.images, (e + 1) * order.images)) for e in range(3)]
    epochs.append(images_of(other, np.arange(other.images)))
    for i, first in enumerate(epochs):
        for second in epochs[i + 1 :]:
            assert sum(a == b for a, b in zip(first, second, strict=True)) < 0.05 * order.images


def test_a_batch_draws_from_as_many_shards_as_there_are_lanes():
    order = Order([100] * 64, seed=3, lanes=16, window=64)
    assert order.lanes == 16
    for position in range(0, 2 * order.images, 16):
        assert len(set(order.samples_at(np.arange(position, position + 16)).shard.tolist())) >= 15


def test_windows_shuffle_within_their_rows_only_and_lanes_turn_at_different_rows():
    order = Order([1000] * 16, seed=0, lanes=4, window=100)
    first_turns = []
    for lane in range(4):  # four whole shards each
        samples = order.samples_at(np.arange(lane, order.images, 4))
        shards_met = list(dict.fromkeys(samples.shard.tolist()))
        place = samples.index + 1000 * np.array([shards_met.index(shard) for shard in samples.shard.tolist()])
        assert np.abs(place - np.arange(4000)).max() < 100  # an image stays within its window
        is_window_end = np.maximum.accumulate(place) == np.arange(4000)  # all rows up to here hold all places up to here
        first_turns.append(int(np.flatnonzero(is_window_end)[0]))
    assert len(set(first_turns)) == 4


@pytest.mark.parametrize(("lanes", "window"), [(2, 8), (4, 16), (1, 5), (2, "full")])
def test_the_shards_near_a_position_are_those_of_its_window(lanes, window):
    order = Order([9, 4, 1, 17, 6, 12, 3, 8, 10, 5, 11, 2, 7, 13, 6, 4], seed=3, lanes=lanes, window=window)
    samples = order.samples_at(np.arange(order.images * 2))
    offsets = np.stack([order._line(epoch).offset_of_lane for epoch in (0, 1)])
    windows = (samples.row + offsets[samples.epoch, samples.lane]) // order.window
    near: dict[tuple[int, int, int], set[int]] = {}
    groups = list(zip(samples.epoch.tolist(), samples.lane.tolist(), windows.tolist(), strict=True))
    for group, shard in zip(groups, samples.shard.tolist(), strict=True):
        near.setdefault(group, set()).add(shard)
    for position in range(0, len(groups), 3):
        assert order.shards_near(np.array([position])).tolist() == sorted(near[groups[position]])
    many = [1, 40, order.images - 1, order.images, order.images + 3]
    assert order.shards_near(np.array(many)).tolist() == sorted(set().union(*(near[groups[p]] for p in many)))


def test_a_dataset_smaller_than_a_window_is_shuffled_as_a_whole():
    order = Order([300], seed=0, lanes=128, window=4096)
    index = order.samples_at(np.arange(300)).index
    assert index[:150].max() > 250 and index[150:].min() < 50


def test_lanes_are_a_power_of_two_with_four_shards_each():
    found = [effective_lanes(128, shards=shards) for shards in (1, 7, 8, 13, 16, 511, 512, 9000)]
    assert found == [1, 1, 2, 2, 4, 64, 128, 128]
    assert [effective_lanes(lanes, shards=9000) for lanes in (1, 3, 100)] == [1, 2, 64]


def test_locate_skips_empty_pieces():
    piece, index = locate(np.cumsum([0, 2, 0, 3]), np.arange(5))
    assert piece.tolist() == [1, 1, 3, 3, 3]
    assert index.tolist() == [0, 1, 0, 1, 2]


def test_a_cold_jump_into_300_million_images_takes_less_than_5_ms():
    """From a fresh Order to the image at a far position: one epoch's line and one window; the process is warm."""
    sizes = np.random.default_rng(0).integers(5_000, 15_000, 30_000).tolist()
    times_s = []
    for seed in range(20):
        started_at_s = time.process_time()  # of this process: other work on the machine is not the law
        order = Order(sizes, seed=seed, lanes=128, window=4096)
        order.sample_at(3 * order.images + 123_456_789)
        times_s.append(time.process_time() - started_at_s)
    assert min(times_s) < 0.005  # the others share their caches with what runs beside


def test_stand_ins_are_other_images_of_the_same_window_and_never_change():
    order = Order(UNEVEN, seed=1, lanes=2, window=16)
    for position in range(0, 2 * order.images, 7):
        sample = order.sample_at(position)
        epoch = np.arange(sample.epoch * order.images, (sample.epoch + 1) * order.images)
        others = order.samples_at(epoch)
        near = (others.lane == sample.lane) & (np.abs(others.row - sample.row) < 16)
        images = set(zip(others.shard[near].tolist(), others.index[near].tolist(), strict=True))
        found = order.stand_ins(position, 64)
        assert found and set(found) <= images - {(sample.shard, sample.index)}
        assert len(set(found)) == len(found)
        assert found == Order(UNEVEN, seed=1, lanes=2, window=16).stand_ins(position, 64)
        assert order.stand_ins(position, 3) == found[: len(order.stand_ins(position, 3))]  # later tries change no earlier one
    firsts = [order.stand_ins(position, 8)[0] for position in range(order.images)]
    assert len(set(firsts)) > 100  # not always the same image of a window
    assert Order([1], seed=1, lanes=1, window=1).stand_ins(5, 64) == []


def test_each_source_of_a_mixture_has_an_order_of_its_own():
    first, second = (Order(UNEVEN, seed=1, lanes=2, window=16, source=source) for source in (0, 1))
    images = [images_of(order, np.arange(order.images)) for order in (first, second)]
    assert sum(a == b for a, b in zip(*images, strict=True)) < 0.05 * first.images
    assert images_of(pickle.loads(pickle.dumps(second)), np.arange(50)) == images[1][:50]  # noqa: S301 our own bytes


def test_an_order_travels_to_another_process_as_its_arguments():
    order = Order(UNEVEN, seed=5, lanes=2, window=16)
    before = images_of(order, np.arange(1000))
    packed = pickle.dumps(order)
    assert len(packed) < 1000
    assert images_of(pickle.loads(packed), np.arange(1000)) == before  # noqa: S301 our own bytes


def test_what_cannot_be_ordered_is_refused_in_one_sentence():
    with pytest.raises(UsageError, match="at least one image"):
        Order([0, 0], seed=0, lanes=1, window=1)
    with pytest.raises(UsageError, match=r"from 0 to 2\^64 - 1, got -1"):
        Order([1], seed=-1, lanes=1, window=1)
    with pytest.raises(UsageError, match=r"at most 50,000,000 images, got 50,000,001; use data\.window=4096"):
        Order([FULL_IMAGES_MAX, 1], seed=0, lanes=1, window="full")


def test_the_written_definition_gives_the_same_order():
    """docs/formats.md, section Order, step by step in plain integers."""

    def raw(purpose: int, a: int, b: int, c: int, count: int) -> list[int]:
        key, counter = seed | purpose << 64, (a << 64) | (b << 128) | (c << 192)
        return [int(x) for x in np.random.Philox(key=key, counter=counter).random_raw(count)]

    def perm(values: list[int]) -> list[int]:
        return sorted(range(len(values)), key=values.__getitem__)

    seed, lanes, window, images = 6, 2, 16, sum(UNEVEN)
    found = images_of(Order(UNEVEN, seed=seed, lanes=128, window=window), np.arange(2 * images))
    for position in range(0, 2 * images, 5):
        epoch, q = divmod(position, images)
        row, lane = divmod(q, lanes)
        line = [(s, i) for s in perm(raw(1, epoch, 0, 0, len(UNEVEN))) for i in range(UNEVEN[s])]
        start = lane * (images // lanes) + min(lane, images % lanes)
        rows_of_lane = images // lanes + (lane < images % lanes)
        offset = raw(2, epoch, 0, 0, lanes)[lane] % window
        w = (row + offset) // window
        first, end = max(0, w * window - offset), min(rows_of_lane, (w + 1) * window - offset)
        shown = first + perm(raw(3, w, lane, epoch, end - first))[row - first]
        assert found[position] == line[start + shown]
