"""Steps that must not count: told, non-finite, spikes, bad gradients; all leave the same bits behind at every ZeRO stage."""

import math
import os
from dataclasses import asdict
from typing import Any

import pytest
import torch
import torch.nn.functional as F

from tests.helpers.ranks import run_ranks
from tests.helpers.small_engine import BATCH, batch_of, make, settings, whole_tensors
from vitscale.base.cluster import Cluster
from vitscale.config import TrainConfig
from vitscale.planning.resolution import Phase
from vitscale.training.checkpoint import TrainState
from vitscale.training.guard import KNOWN_MIN, SPIKE_MIN_NATS, WINDOW, Guard, RollBack, limit_of
from vitscale.training.objective import Loss

PHASES = (
    Phase(first_step=0, image_size=8, flops_per_image=1.0, recomputed_flops_per_image=0.0),
    Phase(first_step=6, image_size=16, flops_per_image=4.0, recomputed_flops_per_image=0.0),
)
KNOWN = [2.3 + 0.01 * (n % 7) for n in range(KNOWN_MIN)]


# ---- what is a spike ------------------------------------------------------------------------------------------------


def test_the_limit_is_so_many_deviations_above_the_mean_and_never_below_half_a_nat():
    losses = [1.0, 3.0] * 50
    deviation = math.sqrt(100 / 99)
    assert limit_of(losses, 6.0) == pytest.approx(2 + 6 * deviation, rel=1e-12)
    assert limit_of(losses, 2.0) == pytest.approx(2 + 2 * deviation, rel=1e-12)
    assert limit_of([2.0] * WINDOW, 6.0) == 2.0 + SPIKE_MIN_NATS
    assert limit_of(losses[: KNOWN_MIN - 1], 6.0) == math.inf, "too little is known"
    assert limit_of(losses, 0.0) == math.inf, "0 is off"


# ---- what becomes of a step -----------------------------------------------------------------------------------------


class OneRank:
    """An engine of two micro-batches that skips what is not finite."""

    accumulation_steps = 2
    last_step_skipped = False

    def mean_over_ranks(self, value: torch.Tensor) -> torch.Tensor:
        return value

    def grad_norm(self) -> float:
        return math.inf


class Written:
    events_path = "events.jsonl"

    def __init__(self) -> None:
        self.events: list[dict[str, Any]] = []

    def log_events(self, events: list[dict[str, Any]]) -> None:
        self.events += events

    def say(self, sentence: str) -> None:
        pass


def drive(
    losses: dict[int, float], steps: int, *, state: TrainState, is_gradient_bad: set[int] = frozenset(), **train: Any
) -> tuple[list[int], Written]:
    """Steps with the loss 2 but where told otherwise; (skipped steps, what was written)."""
    engine, written = OneRank(), Written()
    guard = Guard(
        engine,  # type: ignore[arg-type]
        train=TrainConfig(length=1, **train),
        phases=PHASES,
        global_batch=10,
        state=state,
        names_of=lambda first, end: f"{first} to {end}",
    )
    skipped = []
    for _ in range(steps):
        step = state.step + 1
        for _ in range(2):
            loss = torch.tensor(losses.get(step, 2.0), requires_grad=True)
            trained = guard.screened(Loss(loss * 1.0, loss.detach()), step)
        trained.backward()
        assert math.isfinite(trained.item()) == torch.isfinite(loss.grad).item()
        engine.last_step_skipped = not math.isfinite(trained.item()) or step in is_gradient_bad
        state.step, state.position, state.skipped = step, state.position + 10, state.skipped + engine.last_step_skipped
        skipped += [step] * engine.last_step_skipped
        guard.settle(state, written)  # type: ignore[arg-type]
    return skipped, written


def test_each_reason_skips_is_named_and_leaves_the_window_alone():
    state = TrainState(accepted_losses=list(KNOWN))
    skipped, written = drive(
        {1: math.nan, 2: -math.inf, 4: 2.6 + 0.5}, 5, state=state, is_gradient_bad={3}, skip_steps=(5,), rollback_skips=0
    )
    assert skipped == [1, 2, 3, 4, 5]
    assert [event["why"] for event in written.events] == ["loss", "loss", "gradient", "spike", "told"]
    assert [event["step"] for event in written.events] == skipped
    assert written.events[3]["first_position"] == 30 and written.events[3]["end_position"] == 40
    assert written.events[3]["images"] == "30 to 40" and written.events[3]["loss"] == pytest.approx(3.1)
    assert written.events[3]["spike_above"] == pytest.approx(sum(KNOWN) / len(KNOWN) + SPIKE_MIN_NATS)
    assert state.accepted_losses == KNOWN, "a loss that did not count is no measure of the next"
    assert state.bad_steps == [1, 2, 3, 4], "a step that was left out as told has not gone bad"


def test_the_window_holds_the_last_accepted_losses_and_starts_anew_at_another_image_size():
    state = TrainState(accepted_losses=[float(n) for n in range(WINDOW)], step=1)
    drive({}, 2, state=state)
    assert state.accepted_losses == [*[float(n) for n in range(2, WINDOW)], 2.0, 2.0]
    state = TrainState(accepted_losses=list(KNOWN), step=4)
    drive({7: 1.5}, 3, state=state)
    assert state.accepted_losses == [1.5], "step 7 is the first at 16 pixels"


def test_three_bad_steps_within_the_window_send_the_run_back():
    state = TrainState()
    with pytest.raises(RollBack) as caught:
        drive(dict.fromkeys((2, 10, 14, 15, 16), math.nan), 20, state=state, rollback_skips=3, rollback_window=5)
    assert caught.value.state is state and state.step == 16 and state.bad_steps == [14, 15, 16]
    assert state.skipped == 5, "2 and 10 were too far apart from the others"
    state = TrainState()
    drive(dict.fromkeys((2, 6, 11, 16), math.nan), 20, state=state, rollback_skips=2, rollback_window=4)
    assert state.bad_steps == [] and state.skipped == 4


def test_overflows_by_which_fp16_finds_its_scale_send_nobody_back():
    state = TrainState()
    _, written = drive({}, 6, state=state, is_gradient_bad={1, 2, 3, 4}, precision="fp16")
    assert state.skipped == 4 and state.bad_steps == [] and [event["images"] for event in written.events] == [None] * 4
    with pytest.raises(RollBack):
        drive({}, 6, state=TrainState(), is_gradient_bad={1, 2, 3, 4}, precision="bf16")


def test_a_run_resumed_in_the_middle_of_the_window_decides_the_same():
    """A spike that is one only against the whole window, and bad steps on both sides of the resume."""
    losses = {n: 2.0 + 0.1 * (n % 5) for n in range(1, 200)} | {50: math.nan, 95: 4.0}
    whole = TrainState()
    skipped, _ = drive(losses, 99, state=whole, spike_sigmas=4.0, rollback_skips=9, rollback_window=60)
    first = TrainState()
    before, _ = drive(losses, 70, state=first, spike_sigmas=4.0, rollback_skips=9, rollback_window=60)
    after, _ = drive(losses, 29, state=TrainState(**asdict(first)), spike_sigmas=4.0, rollback_skips=9, rollback_window=60)
    assert skipped == [50, 95] == before + after
    forgetful = TrainState(step=70, position=700)
    assert drive(losses, 29, state=forgetful, spike_sigmas=4.0)[0] == [], "without its window the spike is not seen"


# ---- on engines -----------------------------------------------------------------------------------------------------

LONG = pytest.mark.skipif("VITSCALE_LONG_TESTS" not in os.environ, reason="set VITSCALE_LONG_TESTS=1 for the long form")
STEPS = 7
BAD = {2: "nan", 4: "tenfold", 6: "gradient"}


def trained(engine: Any, config: Any, bad: dict[int, str], state: TrainState) -> tuple[list[float], list[str]]:
    """Losses of all steps and why some were skipped; in a bad step numbers go bad on the last rank only."""
    written = Written()
    guard = Guard(engine, train=config.train, phases=PHASES[:1], global_batch=BATCH, state=state, names_of=lambda a, b: [a, b])
    share, losses = BATCH // engine.world, []
    micro = share // engine.accumulation_steps
    engine.train()
    while state.step < STEPS:
        pixels, labels = (whole[engine.rank * share :][:share] for whole in batch_of(state.step, config))
        engine.set_lr(1e-2)
        for k in range(engine.accumulation_steps):
            part = slice(k * micro, (k + 1) * micro)
            loss = F.cross_entropy(engine(pixels[part].to(engine.input_dtype)).float(), labels[part])
            reported = loss.detach()
            what = bad.get(state.step + 1)
            # The first micro-batch of the last rank alone, but for the factor, which all images of a bad batch would show.
            if what == "tenfold":
                loss, reported = loss * 10, reported * 10
            elif k == 0 and engine.rank == engine.world - 1 and what is not None:
                loss = loss * (math.nan if what == "nan" else math.inf)
                reported = reported * (math.nan if what == "nan" else 1)
            engine.backward_and_maybe_step(guard.screened(Loss(loss, reported), state.step + 1))
        state.step, state.position = state.step + 1, state.position + BATCH
        state.skipped += engine.last_step_skipped
        guard.settle(state, written)  # type: ignore[arg-type]
        losses.append(state.accepted_losses[-1])
    return losses, [event["why"] for event in written.events]


def on_stages(cluster: Cluster, stages: tuple[int, ...], precision: str) -> dict[int, Any]:
    found = {}
    for stage in stages:
        outcomes = []
        for bad, told in ((BAD, ()), ({}, tuple(BAD)), ({}, ())):
            names = ("train.rollback_skips=0", "train.ema=[0.9]", f"train.skip_steps={list(told)}")
            config, ds = settings(stage, cluster.world, *names, "optim.micro_batch_max=3", f"train.precision={precision}")
            engine = make(config, ds)
            state = TrainState(accepted_losses=list(KNOWN))
            losses, why = trained(engine, config, bad, state)
            weights = {name: value.tolist() for name, value in whole_tensors(engine).items()}
            averages = {name: value.tolist() for name, value in engine.averages.tensors().items()}
            outcomes.append((losses, why, state, weights, averages))
            engine.close()
        found[stage] = outcomes
    return found


@pytest.mark.slow
@pytest.mark.parametrize(("precision", "stages"), [("fp32", (0, 2, 3)), pytest.param("bf16", (0, 1, 2, 3), marks=LONG)])
def test_what_went_bad_leaves_the_bits_of_a_run_told_to_skip_at_every_stage(precision, stages):
    """NaN on one of two ranks, a tenfold loss, an infinite gradient, against train.skip_steps: losses, weights, averages."""
    by_rank = run_ranks(2, on_stages, stages, precision)
    for by_stage in by_rank:
        for stage, ((losses, why, state, weights, averages), told, unharmed) in by_stage.items():
            assert why == ["loss", "spike", "gradient"], stage
            assert told[1] == ["told"] * 3 and unharmed[1] == [], stage
            assert state.skipped == told[2].skipped == 3 and state.accepted_losses == told[2].accepted_losses, stage
            assert state.bad_steps == [2, 4, 6] and told[2].bad_steps == [], stage
            assert losses == told[0] and weights == told[3] and averages == told[4], stage
            assert weights != unharmed[3] and losses[0] == unharmed[0][0] and losses[2] != unharmed[0][2], stage
    assert by_rank[0][2][0][0] == by_rank[1][2][0][0], "all ranks know the same losses"
