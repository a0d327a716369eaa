"""Which dataset serves which position of a training, and which images make up a step. Pure integers: no files, no torch.

position  index of the endless order of the run
source    one of the datasets, numbered as they were named; each has an endless order of its own (order.py), so each
          comes to the end of its epochs in its own time
weight    share of a source in 4096ths, exact
table     4096 slots that say which source serves them; position p is served as slot p mod 4096 says

own position of source k at p  =  (p div 4096) * weight_k + slots of source k in the table before p mod 4096

so any position is found at once, nothing is counted along, and every 4096 positions hold each source exactly as often as
its weight says. In between, the slots stand as evenly as whole numbers allow: after any number n of positions, the images
of a source differ from n * weight / 4096 by at most 1 - 1 / (2 K - 2) for K sources (R. Tijdeman, The chairman assignment
problem, Discrete Mathematics 32, 1980: no arrangement does better for all weights). For two sources that is half an image.

slots     the positions of one step, sorted by (source, lane, epoch, row): the order in which ranks share them
"""

from collections.abc import Sequence
from decimal import Decimal
from fractions import Fraction
from functools import lru_cache

import numpy as np

from data_pipeline.order import Order, Samples
from vitscale.base.errors import UsageError

SLOTS = 4096
"""Slots of the table. Weights are rounded to 1 / SLOTS; the value belongs to the order version."""


def quotas(given: Sequence[Decimal]) -> tuple[int, ...]:
    """Weights as whole 4096ths by largest remainder: the sum is 4096, equal remainders go to the sources named first.

    Raises UsageError for a source that would never be read.
    """
    weights = [Fraction(weight) for weight in given]
    total = sum(weights)
    exact = [weight * SLOTS / total for weight in weights]
    whole = [int(share) for share in exact]
    by_remainder = sorted(range(len(exact)), key=lambda k: (whole[k] - exact[k], k))
    for k in by_remainder[: SLOTS - sum(whole)]:
        whole[k] += 1
    for weight, quota in zip(weights, whole, strict=True):
        if quota == 0:
            raise UsageError(
                f"a weight of {float(weight):g} in {float(total):g} rounds to 0/{SLOTS}: that dataset would never be read; "
                f"expected at least {float(total / SLOTS):.3g}, or leave the dataset out"
            )
    return tuple(whole)


@lru_cache(maxsize=8)
def arrangement(weights: tuple[int, ...]) -> np.ndarray:
    """The table: the source of each of the 4096 slots, by Tijdeman's rule.

    Slot n goes to a source that is owed enough (it is owed weight * n / 4096 less what it has), and among those to the
    one that would be owed too much soonest; the earlier named of two alike.
    """
    assert sum(weights) == SLOTS and min(weights) > 0
    sources = len(weights)
    if sources == 1:
        return np.zeros(SLOTS, dtype=np.int64)
    # All in units of 1 / (4096 * scale) of an image.
    scale = 2 * sources - 2
    unit = SLOTS * scale
    given = [0] * sources
    table = np.empty(SLOTS, dtype=np.int64)
    for slot in range(SLOTS):
        owed = [weight * (slot + 1) * scale - unit * had for weight, had in zip(weights, given, strict=True)]
        due = [k for k in range(sources) if owed[k] >= SLOTS]
        # Slots until a source would be owed 1 - 1 / scale of an image, as a ceiling.
        chosen = min(due, key=lambda k: (-((owed[k] - unit + SLOTS) // (weights[k] * scale)), k))
        table[slot] = chosen
        given[chosen] += 1
    assert tuple(given) == weights
    return table


class Mixture:
    """The order of a run over one or several sources: `orders[k]` and `weights[k]` (4096ths) belong to source k."""

    def __init__(self, orders: Sequence[Order], weights: Sequence[int]) -> None:
        assert len(orders) == len(weights) and sum(weights) == SLOTS
        self.orders = tuple(orders)
        self.weights = tuple(weights)
        self._table = arrangement(self.weights)
        # Slots of the same source before each slot.
        self._rank = np.empty(SLOTS, dtype=np.int64)
        for source in range(len(self.orders)):
            members = np.flatnonzero(self._table == source)
            self._rank[members] = np.arange(len(members))

    def sources_at(self, positions: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
        """(source, own position in the order of that source) of each of `positions` (integers >= 0, in any order)."""
        turn, slot = np.divmod(np.asarray(positions, dtype=np.int64), SLOTS)
        source = self._table[slot]
        return source, turn * np.array(self.weights)[source] + self._rank[slot]

    def samples_at(self, positions: np.ndarray) -> tuple[np.ndarray, Samples]:
        """(source, where it points in that source) of each of `positions`."""
        source, own = self.sources_at(positions)
        samples = Samples(**{name: np.empty_like(own) for name in Samples.__dataclass_fields__})
        for number in np.unique(source).tolist():
            members = np.flatnonzero(source == number)
            for name, values in vars(self.orders[number].samples_at(own[members])).items():
                getattr(samples, name)[members] = values
        return source, samples

    def stand_ins(self, position: int, tries: int) -> list[tuple[int, int]]:
        """(shard, index) of what may stand in for `position`, in the same source; see `Order.stand_ins`."""
        source, own = self.sources_at(np.array([position]))
        return self.orders[int(source[0])].stand_ins(int(own[0]), tries)

    def shards_near(self, positions: np.ndarray) -> list[tuple[int, int]]:
        """(source, shard) of all windows that `positions` lie in; see `Order.shards_near`."""
        source, own = self.sources_at(positions)
        return [
            (number, shard)
            for number, order in enumerate(self.orders)
            for shard in order.shards_near(own[source == number]).tolist()
        ]

    def slots_of_step(self, position: int, global_batch: int) -> np.ndarray:
        """The positions of the step that starts at `position`, sorted by (source, lane, epoch, row)."""
        positions = np.arange(position, position + global_batch, dtype=np.int64)
        source, own = self.sources_at(positions)
        lane = np.empty_like(own)
        for number, order in enumerate(self.orders):
            members = np.flatnonzero(source == number)
            lane[members] = order.lanes_at(own[members])
        # lexsort is stable, and within a lane of a source the positions rise with (epoch, row).
        return positions[np.lexsort((lane, source))]


def rank_slots(slots: np.ndarray, *, rank: int, world: int) -> np.ndarray:
    """The share of one rank: slots [rank * B / world, (rank + 1) * B / world).

    With one source, when `world` divides L these are whole lanes, so a shard is read by one rank; otherwise a few lanes
    are read by two.
    """
    return slots[rank * len(slots) // world : (rank + 1) * len(slots) // world]
