"""The learning rate is a pure function of the step, and what comes before a cooldown does not know how long the run is."""

import math
from itertools import pairwise
from types import SimpleNamespace

import pytest

from launch.job import make_plan
from vitscale.base.errors import UsageError
from vitscale.config import OptimConfig, apply_overrides
from vitscale.recipes.catalog import recipe_named
from vitscale.training.schedule import Schedule

PEAK, END, WARMUP, TOTAL, COOLDOWN, TIMESCALE = 0.4, 0.1, 10, 110, 20, 30
BODY_AT_COOLDOWN = {"rsqrt": PEAK / math.sqrt(1 + (TOTAL - COOLDOWN - WARMUP) / TIMESCALE), "wsd": PEAK}
KINDS = ("cosine", "linear", "rsqrt", "wsd", "constant")


def schedule(kind="cosine", *, warmup=WARMUP, total=TOTAL, cooldown=None, **optim) -> Schedule:
    if cooldown is None:
        cooldown = COOLDOWN if kind in ("rsqrt", "wsd") else 0
    return Schedule(
        optim=OptimConfig(**{"global_batch": 96, "peak_lr": PEAK, "end_lr": END, "schedule": kind, **optim}),
        warmup_steps=warmup,
        cooldown_steps=cooldown,
        timescale_steps=TIMESCALE,
        total_steps=total,
    )


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize(("step", "rate"), [(0, PEAK / WARMUP), (1, 2 * PEAK / WARMUP), (WARMUP - 1, PEAK), (WARMUP, PEAK)])
def test_every_schedule_warms_up_alike(kind, step, rate):
    assert schedule(kind).lr_at(step) == pytest.approx(rate, rel=1e-12)


@pytest.mark.parametrize(
    ("kind", "step", "rate"),
    [
        ("cosine", WARMUP + 25, END + (PEAK - END) * (1 + math.sqrt(0.5)) / 2),  # a quarter of the cosine
        ("cosine", WARMUP + 50, (PEAK + END) / 2),
        ("cosine", TOTAL, END),
        ("cosine", TOTAL + 150, END),
        ("linear", WARMUP + 25, PEAK - (PEAK - END) / 4),
        ("linear", TOTAL, END),
        ("linear", TOTAL + 150, END),
        ("rsqrt", WARMUP + TIMESCALE, PEAK / math.sqrt(2)),
        ("rsqrt", WARMUP + 3 * TIMESCALE - 31, PEAK / math.sqrt(4 - 31 / 30)),
        ("rsqrt", TOTAL - COOLDOWN, BODY_AT_COOLDOWN["rsqrt"]),
        ("rsqrt", TOTAL - COOLDOWN // 2, (BODY_AT_COOLDOWN["rsqrt"] + END) / 2),
        ("rsqrt", TOTAL, END),
        ("wsd", TOTAL - COOLDOWN, PEAK),
        ("wsd", TOTAL - COOLDOWN // 4, END + (PEAK - END) / 4),
        ("wsd", TOTAL + 150, END),
        ("constant", TOTAL + 150, PEAK),
    ],
)
def test_each_schedule_at_its_key_steps(kind, step, rate):
    assert schedule(kind).lr_at(step) == pytest.approx(rate, rel=1e-12)


@pytest.mark.parametrize("kind", KINDS)
def test_it_rises_to_the_peak_and_then_never_again(kind):
    rates = [schedule(kind).lr_at(step) for step in range(TOTAL + 1)]
    assert all(a < b for a, b in pairwise(rates[:WARMUP]))
    assert all(a >= b for a, b in pairwise(rates[WARMUP:]))
    assert max(rates) == PEAK
    # The last update that is made lies one step before the end of the schedule.
    if kind != "constant":
        assert END < rates[TOTAL - 1] < END + 0.06 * PEAK


@pytest.mark.parametrize("kind", ["rsqrt", "wsd"])
@pytest.mark.parametrize("other_total", [60, 111, 10_000])
def test_before_the_cooldown_the_rate_does_not_depend_on_the_length(kind, other_total):
    ours, other = schedule(kind), schedule(kind, total=other_total)
    shared = min(TOTAL, other_total) - COOLDOWN
    assert [ours.lr_at(step) for step in range(shared)] == [other.lr_at(step) for step in range(shared)]
    assert ours.lr_at(TOTAL - 1) != schedule(kind, total=10_000).lr_at(TOTAL - 1)


@pytest.mark.parametrize("kind", ["rsqrt", "wsd"])
def test_a_branch_with_a_cooldown_shares_the_steps_before_it(kind):
    parent, branch = schedule(kind, cooldown=0, total=10_000), schedule(kind)
    # Where the cooldown starts it has the parent's value still: the first lower rate comes one step later.
    same = [parent.lr_at(step) == branch.lr_at(step) for step in range(TOTAL)]
    assert same == [True] * (TOTAL - COOLDOWN + 1) + [False] * (COOLDOWN - 1)


@pytest.mark.parametrize(("warmup", "total"), [(0, 1), (1, 1), (5, 5), (0, 3)])
def test_the_shortest_runs_have_a_rate_above_zero_at_every_step(warmup, total):
    for kind in KINDS:
        rates = [schedule(kind, warmup=warmup, total=total, cooldown=0).lr_at(step) for step in range(total)]
        assert all(0 < rate <= PEAK for rate in rates)
        assert rates[warmup - 1 if warmup else 0] == PEAK


def plan_of(*overrides: str):
    config = apply_overrides(recipe_named("digits"), ["model.depth=2", "train.length=200", *overrides])
    return make_plan(config, SimpleNamespace(micro_batch=48, accumulation=2, recompute=0), 960)  # type: ignore[arg-type]


def test_lengths_come_in_steps_epochs_images_and_percent():
    _, made, _ = plan_of("optim.schedule=rsqrt", "optim.warmup=2ep", "optim.cooldown=10%", "optim.timescale=4800img")
    assert (made.warmup_steps, made.cooldown_steps, made.timescale_steps, made.total_steps) == (20, 20, 50, 200)


@pytest.mark.parametrize(
    ("overrides", "words"),
    [
        (["optim.warmup=201"], ("optim.warmup=201 is 201 steps", "run of 200 steps")),
        (
            ["optim.schedule=wsd", "optim.warmup=30%", "optim.cooldown=141"],
            ("optim.warmup='30%' and optim.cooldown=141 are 60 + 141 steps", "run of 200 steps", "train.length"),
        ),
        (["optim.schedule=rsqrt", "optim.timescale=0"], ("optim.timescale=0 is no step at all",)),
    ],
)
def test_lengths_that_do_not_fit_the_run_are_refused(overrides, words):
    with pytest.raises(UsageError) as error:
        plan_of(*overrides)
    assert all(word in str(error.value) for word in words)


def test_warm_up_and_cooldown_may_fill_the_run():
    _, made, _ = plan_of("optim.schedule=wsd", "optim.warmup=60", "optim.cooldown=140")
    assert made.lr_at(59) == made.lr_at(60) == 4e-3
