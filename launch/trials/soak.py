"""One longer training with a fault now and then: is its end that of an undisturbed one, and does its memory stay level?

    a short run measures the pace -> an undisturbed run of as many steps as fit into the time -> the same steps, struck

Memory is looked at once a second: of rank 0, and of its data workers together, without the pages of files. The slope is that
of the best straight line over the steps, with a height of its own for each attempt; the first seconds of an attempt, in
which everything is touched for the first time, are left out.
"""

import time
from collections.abc import Callable
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

import numpy as np

from launch.trials.attempts import Attempt, workers_of
from launch.trials.proof import Proof, Setup, Storm, kind_table, undisturbed
from launch.trials.storm import last_step_line
from launch.trials.strikes import Draws
from vitscale.base.host import bytes_of_its_own
from vitscale.base.progress import Bar, in_words

PACE_STEPS = 120
SAVE_EVERY_S = 5.0
EVAL_EVERY_SAVES = 6
SHARE_OF_TIME = 0.9
"""Of the minutes asked for, what goes into steps: the rest is starting again, and steps that were lost."""
TIME_FACTOR_MAX = 4.0
"""How many times the minutes asked for, or those of the undisturbed run, the struck one may take before it is given up."""
WARM_UP_S = 30.0
LOOK_EVERY_S = 1.0
SAMPLES_MIN = 10


@dataclass(frozen=True, kw_only=True)
class Slope:
    """Growth of resident memory in bytes per 1,000 steps; None where too few samples were taken."""

    rank_0: float | None
    workers_of_rank_0: float | None
    samples: int


class Memory:
    """Samples of resident memory, to be taken often while attempts run."""

    def __init__(self) -> None:
        self._samples: list[tuple[int, ...]] = []  # attempt, steps, bytes of rank 0, bytes of its workers, how many these are
        self._sessions: list[int] = []
        self._attempt = 0
        self._next_look_s = 0.0

    def look(self, attempt: Attempt, run: Path) -> None:
        if attempt.sessions != self._sessions:
            self._sessions, self._attempt = attempt.sessions, self._attempt + 1
            self._next_look_s = time.monotonic() + WARM_UP_S
        if time.monotonic() < self._next_look_s or (pid := attempt.ranks().get(0)) is None:
            return
        self._next_look_s = time.monotonic() + LOOK_EVERY_S
        step, workers = last_step_line(run).get("step", 0), workers_of(pid)
        if memory := bytes_of_its_own(pid):
            self._samples.append((self._attempt, step, memory, sum(map(bytes_of_its_own, workers)), len(workers)))

    def slope(self) -> Slope:
        table = np.array(self._samples, np.float64).reshape(-1, 5)
        counts, often = np.unique(table[:, 4], return_counts=True)
        # While an evaluation runs there are more workers.
        usual = table[table[:, 4] == counts[often.argmax()]] if len(table) else table
        return Slope(
            rank_0=_slope(table[:, 0], table[:, 1], table[:, 2]),
            workers_of_rank_0=_slope(usual[:, 0], usual[:, 1], usual[:, 3]),
            samples=len(table),
        )


def _slope(attempts: np.ndarray, steps: np.ndarray, sizes: np.ndarray) -> float | None:
    """Least squares with one slope for all attempts and a height for each."""
    if len(steps) < SAMPLES_MIN:
        return None
    x, y = steps.copy(), sizes.copy()
    for attempt in np.unique(attempts):
        own = attempts == attempt
        x[own] -= x[own].mean()
        y[own] -= y[own].mean()
    return float(1000 * (x @ y) / (x @ x)) if x.any() else None


@dataclass(kw_only=True)
class Soak:
    """What the soak has shown."""

    proof: Proof
    steps: int
    undisturbed_s: float
    struck_s: float
    memory_undisturbed: Slope = field(default_factory=lambda: Slope(rank_0=None, workers_of_rank_0=None, samples=0))
    memory_struck: Slope = field(default_factory=lambda: Slope(rank_0=None, workers_of_rank_0=None, samples=0))

    def as_record(self) -> dict[str, Any]:
        return {**{name: value for name, value in asdict(self).items() if name != "proof"}, "stage": self.proof.as_record()}

    def table(self) -> str:
        return "\n".join(
            [
                kind_table([self.proof]),
                f"{self.steps} steps: undisturbed in {in_words(self.undisturbed_s)}, struck {len(self.proof.strikes())} times "
                f"in {in_words(self.struck_s)}",
                f"memory per 1,000 steps, undisturbed: {_said(self.memory_undisturbed)}",
                f"memory per 1,000 steps, struck: {_said(self.memory_struck)}",
            ]
        )


def _said(slope: Slope) -> str:
    words = [
        f"{name} {'not known' if value is None else f'{value / 1e6:+.3f} MB'}"
        for name, value in (("rank 0", slope.rank_0), ("its data workers", slope.workers_of_rank_0))
    ]
    return f"{', '.join(words)} ({slope.samples} samples)"


def soak(
    setup_of: Callable[[str, tuple[str, ...]], Setup], *, draws_of: Callable[..., Draws], minutes: float, fault_every_s: float
) -> Soak:
    """`setup_of(name, overrides)` says how to start; `draws_of(pace, every_s)` what strikes."""
    trial = setup_of("pace", (f"train.length={PACE_STEPS}", "run.save_every=0", "run.eval_every=0"))
    with Bar(total=PACE_STEPS, what="pace", unit="step") as bar:
        _, pace = undisturbed(trial, lambda attempt, run: bar.reach(last_step_line(run).get("step", 0)))
    steps = max(PACE_STEPS, int(SHARE_OF_TIME * 60 * minutes / pace.step_s))
    save_every = max(1, int(SAVE_EVERY_S / pace.step_s))
    setup = setup_of(
        "soak", (f"train.length={steps}", f"run.save_every={save_every}", f"run.eval_every={EVAL_EVERY_SAVES * save_every}")
    )

    quiet, struck = Memory(), Memory()
    began_s = time.monotonic()
    with Bar(total=steps, what="undisturbed", unit="step") as bar:
        reference, pace = undisturbed(setup, _both(quiet, bar))
    undisturbed_s = time.monotonic() - began_s

    began_s = time.monotonic()
    storm = Storm(setup, reference, draws_of(pace, fault_every_s), strikes_per_run=steps)
    with Bar(total=steps, what="struck", unit="step") as bar:
        while not storm.proof.verdicts:
            storm.strike(_both(struck, bar))
            if time.monotonic() - began_s > TIME_FACTOR_MAX * max(60 * minutes, undisturbed_s):
                storm.give_up(f"not finished after {in_words(time.monotonic() - began_s)}")
    return Soak(
        proof=storm.proof,
        steps=steps,
        undisturbed_s=undisturbed_s,
        struck_s=time.monotonic() - began_s,
        memory_undisturbed=quiet.slope(),
        memory_struck=struck.slope(),
    )


def _both(memory: Memory, bar: Bar) -> Callable[[Attempt, Path], None]:
    def look(attempt: Attempt, run: Path) -> None:
        memory.look(attempt, run)
        bar.reach(last_step_line(run).get("step", 0))

    return look
