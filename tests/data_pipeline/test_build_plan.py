"""Laws of the plan: pure arithmetic that fixes every byte of a dataset."""

import numpy as np
import pytest

from data_pipeline.plan import BAD, GOOD, UNREAD, candidates, duplicates, permutation, plan_hash, shard_bounds, split_of


def test_the_permutation_never_changes() -> None:
    # Golden: datasets already built depend on these numbers.
    assert permutation(12, seed=0).tolist() == [8, 10, 3, 11, 7, 6, 5, 1, 4, 0, 9, 2]
    assert permutation(12, seed=1).tolist() == [8, 0, 7, 3, 10, 4, 6, 2, 1, 9, 11, 5]
    assert sorted(permutation(1000, seed=3).tolist()) == list(range(1000))


def test_bounds_by_bytes_cut_before_the_limit_is_passed() -> None:
    sizes = np.array([4, 4, 4, 20, 1, 9, 1])
    assert shard_bounds(sizes, shard_bytes=10, shard_images=None) == [0, 2, 3, 4, 6, 7]


def test_bounds_by_count() -> None:
    sizes = np.ones(50_000, np.int64)
    bounds = shard_bounds(sizes, shard_bytes=None, shard_images=2400)
    assert np.diff(bounds).tolist() == [2400] * 20 + [2000]
    assert shard_bounds(sizes[:4800], shard_bytes=None, shard_images=2400) == [0, 2400, 4800]


@pytest.mark.parametrize("per_class", [1, 2, 3, 100])
def test_rounds_of_candidates_read_up_to_the_last_image_kept(per_class: int) -> None:
    draw = np.random.default_rng(per_class)
    labels, is_good = draw.integers(-1, 4, 200).astype(np.int32), draw.random(200) < 0.6
    status = np.full(200, UNREAD, np.int8)
    while len(rows := candidates(labels, status, per_class)):
        status[rows] = np.where(is_good[rows], GOOD, BAD)
    assert (status[labels < 0] == UNREAD).all(), "what has no label is of no class"
    for label in range(4):
        of_class = np.flatnonzero(labels == label)
        kept = of_class[is_good[of_class]][:per_class]
        last = kept[-1] if len(kept) == per_class else 200
        assert np.flatnonzero((labels == label) & (status == GOOD)).tolist() == kept.tolist()
        assert np.flatnonzero((labels == label) & (status != UNREAD)).tolist() == of_class[of_class <= last].tolist()


def test_without_per_class_one_round_reads_all() -> None:
    status = np.array([UNREAD, GOOD, UNREAD], np.int8)
    assert candidates(np.zeros(3, np.int32), status, None).tolist() == [0, 2]


def test_the_plan_hash_covers_options_inputs_hashes_and_labels() -> None:
    base = ({"seed": 0}, np.array([3, 5]), np.array([7, 8], np.uint64), np.array([0, 1], np.int32))
    changed = [
        ({"seed": 1}, *base[1:]),
        (base[0], np.array([3, 6]), *base[2:]),
        (*base[:2], np.array([7, 9], np.uint64), base[3]),
        (*base[:3], np.array([1, 1], np.int32)),
    ]
    assert len({plan_hash(*arguments) for arguments in [base, *changed]}) == 5
    assert plan_hash(*base) == plan_hash(*base)


def test_duplicates_name_the_first_of_equal_images() -> None:
    hashes = np.array([9, 3, 9, 5, 3, 9, 3], np.uint64)
    sizes = np.array([1, 2, 1, 1, 2, 1, 2], np.int32)
    again, kept = duplicates(hashes, sizes)
    assert (again.tolist(), kept.tolist()) == ([2, 4, 5, 6], [0, 1, 0, 1])


def test_equal_hashes_of_unequal_sizes_are_no_duplicates() -> None:
    again, kept = duplicates(np.array([7, 7, 7, 7], np.uint64), np.array([4, 5, 4, 5], np.int32))
    assert (again.tolist(), kept.tolist()) == ([2, 3], [0, 1])
    assert duplicates(np.zeros(0, np.uint64), np.zeros(0, np.int32))[0].tolist() == []


def test_the_split_never_changes() -> None:
    # Golden: an image must not move from training to evaluation with another version.
    hashes = np.arange(20, dtype=np.uint64)
    assert split_of(hashes, ["0.5", "0.5"]).tolist() == [0, 1, 1, 0, 0, 1, 1, 1, 0, 0, 1, 1, 0, 1, 1, 0, 1, 0, 1, 1]


def test_shares_are_met_and_a_growing_first_share_takes_from_the_second_alone() -> None:
    hashes = np.random.default_rng(0).integers(0, 2**64, 100_000, np.uint64)
    few, more = split_of(hashes, ["0.8", "0.1", "0.1"]), split_of(hashes, ["0.9", "0.1"])
    assert np.bincount(few) / 1e5 == pytest.approx([0.8, 0.1, 0.1], abs=0.005)  # 4 standard deviations
    assert (more[few == 0] == 0).all()
    assert (more[few == 2] == 1).all()
    # Neighbouring hashes, such as a server that files by the first digits would deal out, are divided as well.
    assert 0.8 < (split_of(np.arange(10_000, dtype=np.uint64), ["0.85", "0.15"]) == 0).mean() < 0.9
