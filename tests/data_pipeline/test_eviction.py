"""Laws of choosing what goes: the furthest next use, nothing that is due, and waiting rather than a worse choice."""

import math

import pytest

from data_pipeline.eviction import Held, Need, victims

NOBODY = (math.inf, math.inf)


def choose(held: dict[str, Held], uses: dict[str, int], *, distance: int, size: int, due=(), others=None):
    """Each entry has at most one use, at a distance."""
    return victims(
        held,
        mine={key: Need(distance=0, size=10) for key in due} | {key: Need(distance=d, size=10) for key, d in uses.items()},
        others={key: Need(distance=d, size=10) for key, d in (others or {}).items()},
        distance=distance,
        uses_of=lambda key, at: (uses[key], uses[key] if uses[key] >= at else math.inf) if key in uses else NOBODY,
        size=size,
    )


def entries(*keys: str) -> dict[str, Held]:
    return {key: Held(size=10, used_at_ns=number) for number, key in enumerate(keys)}


def test_the_furthest_next_use_goes_first_and_no_more_than_needed():
    held = entries("a/1", "a/2", "a/3")
    assert choose(held, {"a/1": 5, "a/2": 9, "a/3": 7}, distance=2, size=10) == ["a/2"]
    assert choose(held, {"a/1": 5, "a/2": 9, "a/3": 7}, distance=2, size=11) == ["a/2", "a/3"]
    assert choose(held, {"a/1": 5, "a/2": 9, "a/3": 7}, distance=2, size=31) is None
    assert choose(held, {}, distance=0, size=0) == []


def test_what_nobody_announced_goes_first_other_datasets_by_age_then_the_latest_used():
    held = entries("old/1", "a/1", "old/2", "a/2", "a/3")
    assert choose(held, {"a/3": 50}, distance=2, size=50) == ["old/1", "old/2", "a/2", "a/1", "a/3"]


@pytest.mark.parametrize("others", [{"a/2": 0}, {"a/2": 3}])
def test_what_another_rank_needs_sooner_stays(others):
    held = entries("a/1", "a/2")
    assert choose(held, {"a/1": 8}, distance=4, size=10, others=others) == ["a/1"]
    assert choose(held, {"a/1": 8}, distance=4, size=20, others=others) is None


def test_what_is_fetched_ahead_waits_for_the_best_choice_and_what_is_due_does_not():
    held = entries("a/1", "a/2")
    held["a/2"].is_coming = True
    assert choose(held, {"a/1": 8}, distance=4, size=10) is None
    assert choose(held, {"a/1": 8}, distance=0, size=10) == ["a/1"]
    assert choose(entries("a/1", "a/2"), {"a/1": 8}, distance=4, size=10, due=["a/2"]) is None
