"""Which inputs are read, and which image lies where. Pure integer arithmetic: no files, no images.

row          place of an input in the list of its source
candidates   rows to read next
share        part of the images that a split gets, by the hash of their bytes
plan         for every survivor its split, shard and slot; hashed, so that a build continues only with the same plan
"""

import hashlib
from collections.abc import Iterable, Iterator
from fractions import Fraction
from typing import Any

import numpy as np

from vitscale.base.files import canonical_json

UNREAD, GOOD, BAD, EXCLUDED, DUPLICATE = range(5)
# Separates the draws of the build from all other uses of a seed.
_PURPOSE = 0x6275696C64  # "build"
_ROWS_AT_ONCE = 1 << 20
_SPLIT_PURPOSE = 0x73706C6974  # "split"


def in_parts(rows: int) -> Iterator[slice]:
    """Slices that cover range(rows), each short enough for columns beside it in memory."""
    return (slice(start, min(start + _ROWS_AT_ONCE, rows)) for start in range(0, rows, _ROWS_AT_ONCE))


def candidates(labels: np.ndarray, status: np.ndarray, per_class: int | None) -> np.ndarray:
    """Rows to read next, ascending; empty when the selection is complete.

    With `per_class` these are, for each class, as many of its lowest unread rows as it lacks good ones; rows without a
    label are of no class. Repeated until empty, this reads exactly the rows up to the last one kept, whatever is bad among
    them, and no row more.
    """
    unread = np.flatnonzero(status == UNREAD)
    if per_class is None:
        return unread
    lacking = per_class - np.bincount(labels[status == GOOD] + 1, minlength=int(labels.max(initial=-1)) + 2)
    lacking[0] = 0
    by_class = unread[np.argsort(labels[unread], kind="stable")]
    sorted_labels = labels[by_class]
    rank_in_class = np.arange(len(by_class)) - np.searchsorted(sorted_labels, sorted_labels, side="left")
    return np.sort(by_class[rank_in_class < lacking[sorted_labels + 1]])


def permutation(count: int, seed: int) -> np.ndarray:
    """A seeded permutation of range(count), the same under every version of NumPy.

    Raw Philox draws and a stable argsort: the stream of a bit generator is fixed, `Generator.permutation` is not.
    """
    draws = np.random.Philox(key=np.array([seed, _PURPOSE], np.uint64)).random_raw(count)
    return np.argsort(draws, kind="stable")


def shard_bounds(sizes: np.ndarray, *, shard_bytes: int | None, shard_images: int | None) -> list[int]:
    """Cut images, in their order, into shards: shard k holds [bounds[k], bounds[k + 1]).

    By bytes a shard closes before the image that would pass the limit; an image above the limit has a shard to itself.
    """
    if shard_images is not None:
        return [*range(0, len(sizes), shard_images), len(sizes)]
    assert shard_bytes is not None, "BuildConfig holds exactly one of the two limits"
    ends = np.cumsum(sizes)
    bounds = [0]
    while bounds[-1] < len(sizes):
        start = bounds[-1]
        before = int(ends[start - 1]) if start else 0
        stop = int(np.searchsorted(ends, before + shard_bytes, side="right"))
        bounds.append(max(stop, start + 1))
    return bounds


def split_of(hashes: np.ndarray, shares: Iterable[str]) -> np.ndarray:
    """Number of the split (int8) of each source hash; `shares` are decimal numbers that add up to 1.

    The bytes of an image alone decide, neither seed nor neighbours: equal images fall together, and an image stays where
    it is when others come. The hash is stirred once more (SplitMix64 finalizer, Steele et al. 2014), so that nothing
    else that looks at it, such as a server that stores files by hash, goes with the split.
    """
    mixed = hashes ^ np.uint64(_SPLIT_PURPOSE)
    for shift, factor in ((30, 0xBF58476D1CE4E5B9), (27, 0x94D049BB133111EB)):
        mixed = (mixed ^ (mixed >> np.uint64(shift))) * np.uint64(factor)
    mixed ^= mixed >> np.uint64(31)
    exact = [Fraction(share) for share in shares]
    assert sum(exact) == 1 and min(exact) > 0
    limits = [int(sum(exact[: number + 1]) * 2**64) for number in range(len(exact) - 1)]
    return np.searchsorted(np.array(limits, np.uint64), mixed, side="right").astype(np.int8)


def duplicates(hashes: np.ndarray, sizes: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Places whose (hash, size) occurs before, ascending, and for each the first place that has it.

    Two different images pass for equal with odds of about n^2 / 2^65, before sizes are looked at: 3e-6 among 10 M images,
    0.2 % among 300 M; equal sizes make that some thousand times less.
    """
    order = np.argsort(hashes, kind="stable")
    is_again = _equals_the_one_before(hashes, order)
    if (is_again & ~_equals_the_one_before(sizes, order)).any():  # different images of one hash: two keys must sort
        order = np.lexsort((sizes, hashes))
        is_again = _equals_the_one_before(hashes, order) & _equals_the_one_before(sizes, order)
    places, starts = np.flatnonzero(is_again), np.flatnonzero(~is_again)
    again, kept = order[places], order[starts[np.searchsorted(starts, places) - 1]]
    by_place = np.argsort(again)
    return again[by_place], kept[by_place]


def _equals_the_one_before(column: np.ndarray, order: np.ndarray) -> np.ndarray:
    ordered = column[order]
    return np.concatenate([np.zeros(min(1, len(order)), bool), ordered[1:] == ordered[:-1]])


def plan_hash(
    options: dict[str, Any],
    numbers: np.ndarray,
    hashes: np.ndarray,
    labels: np.ndarray,
    all_labels: Iterable[list[int]] = (),
) -> str:
    """Hex sha256 over the options and every survivor's (input number, source hash, label): all that fixes the bytes.

    `all_labels`: the labels of every survivor, where images may have several.
    """
    digest = hashlib.sha256(canonical_json(options))
    for column, dtype in ((numbers, "<i8"), (hashes, "<u8"), (labels, "<i4")):
        digest.update(np.ascontiguousarray(column.astype(dtype, copy=False)).data)
    for several in all_labels:
        digest.update(repr(several).encode())
    return digest.hexdigest()
