"""Which entries of the cache make room for another: those needed last. Pure: no files, no clock.

distance  lists of images until a rank needs an entry; 0: due, the ranks must have it now
next use  the soonest use at or behind the distance of the entry that is to come: what is needed in between stays anyway
"""

import math
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from pathlib import Path

UsesOf = Callable[[str, int], tuple[float, float]]
"""(key, distance) to (distance of the rank's next use, of its next use at or behind `distance`); math.inf: none is known."""


@dataclass(frozen=True, kw_only=True)
class Need:
    """What a rank publishes about one entry."""

    distance: int
    size: int
    """Bytes of tar and index."""


@dataclass(kw_only=True)
class Held:
    """An entry as it lies in the directory."""

    files: list[Path] = field(default_factory=list)
    size: int = 0
    used_at_ns: int = 0
    is_coming: bool = False
    """Not whole as yet: counts as in use."""


def victims(
    held: Mapping[str, Held],
    *,
    mine: Mapping[str, Need],
    others: Mapping[str, Need],
    distance: int,
    uses_of: UsesOf,
    size: int,
) -> list[str] | None:
    """Entries to evict for `size` bytes of an entry at `distance`, furthest next use first; None: not enough as yet.

    `mine` and `others`: what this rank and all others have published. Taking the furthest is the optimum (Belady 1966).
    Entries nobody has announced a use of come first: of datasets that no rank reads, the longest unused, then of the
    others the latest used, because an epoch comes back to what it has just used after everything else.
    """
    datasets = {key.partition("/")[0] for key in (*mine, *others)}

    def next_use(key: str) -> float:
        return min(uses_of(key, distance)[1], others[key].distance if key in others else math.inf)

    def may_go(key: str) -> bool:
        is_due = key in mine and not mine[key].distance
        is_sooner = key in others and others[key].distance <= distance
        return not (is_due or is_sooner or held[key].is_coming) and uses_of(key, distance)[0] > distance

    def order(key: str) -> tuple[bool, float, bool, int]:
        is_read = key.partition("/")[0] in datasets
        used_at_ns = held[key].used_at_ns
        return is_read, -next_use(key), not may_go(key), -used_at_ns if is_read else used_at_ns

    chosen: list[str] = []
    for key in sorted(held, key=order) if size > 0 else ():
        if size <= 0:
            break
        if may_go(key):
            chosen.append(key)
            size -= held[key].size
        elif distance:
            # The best choice is still in use: what is only fetched ahead waits for it, rather than evict a worse one.
            return None
    return chosen if size <= 0 else None
