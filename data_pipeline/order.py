"""Which image sits at which position of the order of one dataset. Pure integers: no files, no torch, no state.

position  index of the endless order; position p lies in epoch p // N, at q = p % N (N images in the dataset). With
          several datasets (mixture.py) each has positions of its own
line      all images of one epoch behind one another, shard by shard, the shards permuted anew for the epoch
lane      one of L contiguous pieces of the line; the first N % L lanes are one image longer than the others
row       place along a lane; q is row q // L of lane q % L, so consecutive positions go once around the lanes
window    W consecutive rows of a lane, permuted among themselves
stand-in  another image of the same window, shown where an image turns out to be bad

          shard 7          shard 2       shard 9      shard 0
line   |----------------|-------------|------------|------------|     N images
cut    |= lane 0 ============|= lane 1 ===========|= lane 2 === ...   L lanes

         row  0 1 2 3 4 5 6 7 8 ...
lane 0       [a b][c d e f][g h ...     positions 0 L 2L 3L ...       window borders are staggered: each lane starts at
lane 1       [a b c][d e f g][h ...     positions 1 L+1 2L+1 ...      its own offset, so that the lanes do not all turn
lane 2       [a b c d][e f g h] ...     positions 2 L+2 2L+2 ...      to other shards in the same step

A batch therefore takes its images from about min(B, L) places of the line, each of which is far (4 shards on average)
from the next: with shards shuffled when they were built, that is close to a draw from the whole dataset, while every
lane is read nearly front to back. Nothing here depends on ranks, nodes, workers or micro-batches.

Randomness is raw Philox4x64 output (a counter-based generator; Salmon et al. 2011) turned into permutations by a stable
argsort. NumPy guarantees the raw stream of a bit generator for ever, but not what Generator.permutation makes of it.

Memory per process: two arrays of one integer per shard for each epoch in use, and 4 bytes per row for at most 2 L
windows (4 MB at the defaults; "full": 4 bytes per image and epoch in use).
"""

import threading
from collections.abc import Sequence
from dataclasses import dataclass
from enum import IntEnum
from functools import lru_cache, partial
from typing import Any, Literal

import numpy as np

from vitscale.base.errors import UsageError

ORDER_VERSION = 1
"""Raised whenever any position would map to another image; a run keeps the version it started with."""

FULL_IMAGES_MAX = 50_000_000
"""Most images of window="full": sorting that many draws takes seconds and gigabytes in each process that reads."""

EPOCHS_KEPT = 4


class Purpose(IntEnum):
    """What random numbers are for: part of the key, so that no two uses share a stream. The values are for ever."""

    SHARDS = 1
    OFFSETS = 2
    WINDOW = 3
    VIEW = 4
    STAND_IN = 5


def draws(seed: int, purpose: Purpose, where: tuple[int, ...] = (), *, count: int, source: int = 0) -> np.ndarray:
    """`count` raw uint64 draws that belong to (seed, purpose, source, where) alone; `where` holds up to three integers."""
    # Word 0 of the counter runs as numbers are drawn; the other three words are free to hold coordinates.
    counter, key = _generators.counter, _generators.key
    counter[:] = 0
    for word, coordinate in enumerate(where, start=1):
        counter[word] = coordinate
    key[0], key[1] = seed, purpose | source << 32  # one by one: numpy would make floats of a pair with a large one
    _generators.philox.state = _generators.state
    return _generators.philox.random_raw(count)


class _Generators(threading.local):
    """A generator for each thread, set anew for every use: making one takes five times as long."""

    def __init__(self) -> None:
        self.philox = np.random.Philox(0)
        self.counter, self.key = np.zeros(4, np.uint64), np.zeros(2, np.uint64)
        self.state: Any = {**self.philox.state, "state": {"counter": self.counter, "key": self.key}}


_generators = _Generators()


def permutation(raw: np.ndarray) -> np.ndarray:
    """The permutation that sorts the draws; equal draws keep their order."""
    # NumPy's unstable sort is vectorised, four times as fast; with no two draws alike there is one answer.
    indices = np.argsort(raw)
    in_order = raw[indices]
    return np.argsort(raw, kind="stable") if (in_order[1:] == in_order[:-1]).any() else indices


@dataclass(frozen=True, kw_only=True)
class Sample:
    """Where one position of the order points."""

    epoch: int
    lane: int
    row: int
    shard: int
    """Number of the shard in the manifest."""
    index: int
    """Number of the image in its shard."""


@dataclass(frozen=True, kw_only=True)
class Samples:
    """`Sample` for many positions: int64 arrays of equal length, in the order of the positions."""

    epoch: np.ndarray
    lane: np.ndarray
    row: np.ndarray
    shard: np.ndarray
    index: np.ndarray


@dataclass(frozen=True, kw_only=True)
class _Line:
    """The line of one epoch."""

    shard_at: np.ndarray
    """Shard number at each place of the epoch's shard order."""
    ends: np.ndarray
    """Images of the line up to and including that place."""
    offset_of_lane: np.ndarray
    """Rows by which the windows of each lane are shifted."""


class Order:
    """The training order of a dataset with `shard_images[s]` images in shard s.

    `lanes` and `window` are upper bounds; the attributes hold the effective values, which belong to the run's record:
    L is the largest power of two up to min(lanes, shards / 4), and at least 1; W is at most the length of a lane.
    `source` is the number of the dataset in a mixture: datasets with equal shards are not to run in step.
    Raises UsageError for an empty dataset, a seed outside 0 .. 2^64 - 1, or "full" above FULL_IMAGES_MAX images.
    """

    def __init__(
        self, shard_images: Sequence[int], *, seed: int, lanes: int, window: int | Literal["full"], source: int = 0
    ) -> None:
        self._recipe = partial(Order, tuple(shard_images), seed=seed, lanes=lanes, window=window, source=source)
        self._shard_images = np.asarray(shard_images, dtype=np.int64)
        self.images = int(self._shard_images.sum())
        if self.images == 0:
            raise UsageError("expected a dataset with at least one image, got none; build it from a source that has images")
        if not 0 <= seed < 2**64:
            raise UsageError(f"expected a seed from 0 to 2^64 - 1, got {seed}")
        if window == "full" and self.images > FULL_IMAGES_MAX:
            raise UsageError(
                f'data.window="full" sorts the whole epoch and takes at most {FULL_IMAGES_MAX:,} images, '
                f"got {self.images:,}; use data.window=4096"
            )
        self.seed = seed
        self.source = source
        self.lanes = 1 if window == "full" else effective_lanes(lanes, shards=len(shard_images))
        rows = -(-self.images // self.lanes)  # of the longest lane
        self.window = rows if window == "full" else min(window, rows)
        # A lane that fits in a window is one window: shifting it would only split it in two.
        self._staggered = self.window < rows
        self._windows_of_lane = rows // self.window + 2
        # One window per lane is in use at a time, two while a batch crosses a border.
        self._window = lru_cache(maxsize=2 * self.lanes)(self._shuffle_window)
        self._line = lru_cache(maxsize=EPOCHS_KEPT)(self._lay_line)

    def __reduce__(self) -> tuple[Any, tuple[()]]:
        """Pickle as the arguments: another process recomputes what it needs."""
        return self._recipe, ()

    def sample_at(self, position: int) -> Sample:
        """Where `position` points."""
        samples = self.samples_at(np.array([position]))
        return Sample(**{name: int(values[0]) for name, values in vars(samples).items()})

    def samples_at(self, positions: np.ndarray) -> Samples:
        """Where each of `positions` (integers >= 0, in any order) points."""
        positions = np.asarray(positions, dtype=np.int64)
        epoch, place_in_epoch = np.divmod(positions, self.images)
        row, lane = np.divmod(place_in_epoch, self.lanes)
        shard, index = np.empty_like(positions), np.empty_like(positions)
        for number in np.unique(epoch).tolist():
            members = np.flatnonzero(epoch == number)
            line = self._line(number)
            on_line = self._shuffled(line, number, lane[members], row[members])
            shard_place, index[members] = locate(line.ends, on_line)
            shard[members] = line.shard_at[shard_place]
        return Samples(epoch=epoch, lane=lane, row=row, shard=shard, index=index)

    def shards_near(self, positions: np.ndarray) -> np.ndarray:
        """Sorted shards of all windows that `positions` lie in: a superset of the shards they point at, found unshuffled.

        Images of one window stand in for one another, and whoever reads one of them soon reads the others.
        """
        epoch, place_in_epoch = np.divmod(np.asarray(positions, dtype=np.int64), self.images)
        row, lane = np.divmod(place_in_epoch, self.lanes)
        found = []
        for number in np.unique(epoch).tolist():
            line, members = self._line(number), np.flatnonzero(epoch == number)
            offset = line.offset_of_lane[lane[members]]
            window = (row[members] + offset) // self.window
            first_place, end_place = self._borders(lane[members], window, offset)
            first, _ = locate(line.ends, first_place)
            last, _ = locate(line.ends, end_place - 1)
            found += [line.shard_at[a : b + 1] for a, b in set(zip(first.tolist(), last.tolist(), strict=True))]
        return np.unique(np.concatenate(found)) if found else np.empty(0, dtype=np.int64)

    def _borders(self, lane: np.ndarray, window: np.ndarray, offset: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
        """Places on the line of the first row of windows, and behind their last."""
        rows, longer_lanes = divmod(self.images, self.lanes)
        lane_place = lane * rows + np.minimum(lane, longer_lanes)
        first_row = np.maximum(0, window * self.window - offset)
        end_row = np.minimum((window + 1) * self.window - offset, rows + (lane < longer_lanes))
        return lane_place + first_row, lane_place + end_row

    def lanes_at(self, positions: np.ndarray) -> np.ndarray:
        """The lane of each of `positions`. Within a lane, positions rise with (epoch, row)."""
        return positions % self.images % self.lanes

    def stand_ins(self, position: int, tries: int) -> list[tuple[int, int]]:
        """(shard, index) of up to `tries` other images of the window of `position`, the one to be taken first in front.

        Drawn by (position, try) alone, so what stands in for a bad image is the same on any number of ranks. Images
        drawn twice are named once; a window of one image has none.
        """
        epoch, place_in_epoch = divmod(position, self.images)
        row, lane = divmod(place_in_epoch, self.lanes)
        line = self._line(epoch)
        window = (row + int(line.offset_of_lane[lane])) // self.window
        place, first_row, shuffle = self._window(epoch, lane, window)
        raw = draws(self.seed, Purpose.STAND_IN, (position,), count=tries, source=self.source)
        drawn = dict.fromkeys((raw % len(shuffle)).tolist())
        drawn.pop(int(shuffle[row - first_row]), None)
        shard_place, index = locate(line.ends, place + np.array(list(drawn), dtype=np.int64))
        return list(zip(line.shard_at[shard_place].tolist(), index.tolist(), strict=True))

    def _shuffled(self, line: _Line, epoch: int, lane: np.ndarray, row: np.ndarray) -> np.ndarray:
        """Places on the line of (lane, row) in one epoch, one window after another."""
        window = (row + line.offset_of_lane[lane]) // self.window
        group = lane * self._windows_of_lane + window
        by_group = np.argsort(group, kind="stable")
        borders = np.flatnonzero(np.diff(group[by_group])) + 1
        on_line = np.empty_like(row)
        for members in np.split(by_group, borders):
            first = members[0]
            place, first_row, shuffle = self._window(epoch, int(lane[first]), int(window[first]))
            on_line[members] = place + shuffle[row[members] - first_row]
        return on_line

    def _shuffle_window(self, epoch: int, lane: int, window: int) -> tuple[int, int, np.ndarray]:
        """(place on the line of the window's first row, that row, permutation of the window's rows)."""
        rows, longer_lanes = divmod(self.images, self.lanes)
        offset = int(self._line(epoch).offset_of_lane[lane])
        first_row = max(0, window * self.window - offset)
        end_row = min((window + 1) * self.window - offset, rows + (lane < longer_lanes))
        raw = draws(self.seed, Purpose.WINDOW, (window, lane, epoch), count=end_row - first_row, source=self.source)
        lane_place = lane * rows + min(lane, longer_lanes)
        return lane_place + first_row, first_row, permutation(raw).astype(np.int32)

    def _lay_line(self, epoch: int) -> _Line:
        raw = draws(self.seed, Purpose.SHARDS, (epoch,), count=len(self._shard_images), source=self.source)
        shard_at = permutation(raw)
        offset = np.zeros(self.lanes, dtype=np.int64)
        if self._staggered:
            raw = draws(self.seed, Purpose.OFFSETS, (epoch,), count=self.lanes, source=self.source)
            offset = (raw % self.window).astype(np.int64)
        return _Line(shard_at=shard_at, ends=np.cumsum(self._shard_images[shard_at]), offset_of_lane=offset)


def effective_lanes(lanes: int, *, shards: int) -> int:
    """Largest power of two up to min(lanes, shards / 4), at least 1: four shards per lane keep neighbours apart."""
    most = min(lanes, max(1, shards // 4))
    return 1 << (most.bit_length() - 1)


def locate(ends: np.ndarray, places: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """(piece, index in it) of places on a line of pieces with the running total `ends`; empty pieces are skipped."""
    piece = np.searchsorted(ends, places, side="right")
    return piece, places - np.where(piece > 0, ends[piece - 1], 0)
