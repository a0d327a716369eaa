"""Which inputs are read, and which image lies where. Pure integer arithmetic: no files, no images.

row          place of an input in the (selected) list of its source
candidates   rows to read next
plan         for every survivor its shard and slot; hashed, so that a build continues only with the same plan
"""

import hashlib
from typing import Any

import numpy as np

from vitscale.base.files import canonical_json

UNREAD, GOOD, BAD = 0, 1, 2
# Separates the draws of the build from all other uses of a seed.
_PURPOSE = 0x6275696C64  # "build"


def candidates(labels: np.ndarray, status: np.ndarray, per_class: int | None) -> np.ndarray:
    """Rows to read next, ascending; empty when the selection is complete.

    With `per_class` these are, for each class, as many of its lowest unread rows as it lacks good ones. Repeated until
    empty, this reads exactly the rows up to the last one kept, whatever is bad among them, and no row more.
    """
    unread = np.flatnonzero(status == UNREAD)
    if per_class is None:
        return unread
    lacking = per_class - np.bincount(labels[status == GOOD] + 1, minlength=int(labels.max(initial=-1)) + 2)
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


def plan_hash(options: dict[str, Any], numbers: np.ndarray, hashes: np.ndarray, labels: np.ndarray) -> str:
    """Hex sha256 over the options and every survivor's (input number, source hash, label): all that fixes the bytes."""
    digest = hashlib.sha256(canonical_json(options))
    for column, dtype in ((numbers, "<i8"), (hashes, "<u8"), (labels, "<i4")):
        digest.update(np.ascontiguousarray(column.astype(dtype)).data)
    return digest.hexdigest()
