"""Faults drawn by a seed, and one of them brought upon a running attempt.

    the command -> attempt 1, struck -> attempt 2, struck -> ... -> an attempt nobody disturbs: the run is finished

A strike is either a fault point (VITSCALE_FAULT, so it hits at one exact place of the code), or a signal at a moment:
during the start, or some time after a step. The seed fixes what is drawn; where the processes stand when a signal
arrives is the machine's business, and each time another.
"""

import json
import os
import random
import signal
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import suppress
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any, Literal

from launch.attempts import Attempt, Start, has_ended, kill_all, workers_of
from launch.leftovers import end_sessions, has_listener
from vitscale.base.faults import POINTS, VARIABLE
from vitscale.training.checkpoint import candidates
from vitscale.training.rundir import FINISHED

Kind = Literal[
    "kill at a fault point",
    "kill of one rank",
    "kill of all ranks",
    "kill of a data worker",
    "exception at a fault point",
    "disk fault while saving",
    "stop of one rank",
]
KILLS: tuple[Kind, ...] = (
    "kill at a fault point",
    "kill of one rank",
    "kill at a fault point",
    "kill of a data worker",
    "kill at a fault point",
    "kill of all ranks",
)
"""One after the other, so that few strikes are of every kind too."""
FAULTS: tuple[Kind, ...] = (*dict.fromkeys(KILLS), "exception at a fault point", "disk fault while saving", "stop of one rank")
AT_POINTS: dict[Kind, tuple[str, ...]] = {
    "kill at a fault point": ("kill",),
    "exception at a fault point": ("raise",),
    "disk fault while saving": ("enospc", "eio"),
}
"""What each kind does that hits at a fault point."""
STEP_TIMEOUT = "run.step_timeout"
"""The setting without which nobody notices a stopped rank."""
STALL_S = 180.0
"""Longest time without a new step, or after the last one, before an attempt counts as hanging."""
LOOK_EVERY_S = 0.01
METRICS = "metrics.jsonl"
TAIL_BYTES = 8192
_RANK_ZERO = ("checkpoint.commit", "checkpoint.rename", "checkpoint.latest")


@dataclass(frozen=True, kw_only=True)
class Strike:
    """What is done to one attempt."""

    kind: Kind
    rank: int
    fault: str = ""
    """For VITSCALE_FAULT; empty: a signal, at the moment below."""
    after_step: int | None = None
    """None: from the start of the processes on."""
    delay_s: float = 0.0
    worker: int = 0
    then_all_after_s: float | None = None
    """If the attempt survives, all its processes are killed so long after the hit; None: it goes on undisturbed."""

    def in_words(self) -> str:
        if self.fault:
            return self.fault.partition(":once=")[0]
        moment = "the start" if self.after_step is None else f"step {self.after_step}"
        whom = "" if self.kind == "kill of all ranks" else f", rank {self.rank}"
        return f"{self.kind}{whom}, {self.delay_s:.2f} s after {moment}"


@dataclass(frozen=True, kw_only=True)
class Pace:
    """What the undisturbed run took, and how it goes: strikes are aimed by it."""

    total_steps: int
    save_every: int
    eval_every: int
    micro_batches: int
    """Of one rank, in a step."""
    start_s: float
    """From the start of the processes to the first step."""
    step_s: float


Look = Callable[[Attempt, Path], None]
"""What is done again and again while an attempt runs in its run directory."""


def unwatched(_attempt: Attempt, _run: Path) -> None:
    pass


class Draws:
    """An endless, seeded series of strikes; every fault point comes before any comes again."""

    def __init__(
        self,
        seed: str,
        *,
        pace: Pace,
        world: int,
        workers: int,
        kinds: Sequence[Kind] = KILLS,
        every_s: float | None = None,
    ) -> None:
        """`every_s`: strike about so long after each start, and after a strike that was survived; None: soon, so that a
        short run is struck often."""
        self._random = random.Random(seed)
        self._pace, self._world, self._workers, self._every_s = pace, world, workers, every_s
        self._kinds = [kind for kind in kinds if workers or kind != "kill of a data worker"]
        self._drawn = 0
        self._bag: list[str] = []

    def next(self, done_steps: int, marker: Path) -> Strike:
        """A strike for an attempt that starts after `done_steps`; `marker` is the file it makes when it hits at a point."""
        kind = self._kinds[self._drawn % len(self._kinds)]
        self._drawn += 1
        rank, pace = self._random.randrange(self._world), self._pace
        if kind in AT_POINTS:
            action = self._random.choice(AT_POINTS[kind])
            place = self._place(rank, done_steps, prefix="checkpoint." if kind == "disk fault while saving" else "")
            fault = f"{action}@{place}:once={marker}"
            return Strike(kind=kind, rank=rank, fault=fault, then_all_after_s=self._every_s)
        worker = self._random.randrange(max(1, self._workers))
        left = pace.total_steps - done_steps
        if self._every_s is not None:
            return Strike(kind=kind, rank=rank, worker=worker, delay_s=self._every_s, then_all_after_s=self._every_s)
        if left < 2 or self._random.random() < 0.25:
            return Strike(kind=kind, rank=rank, worker=worker, delay_s=self._random.uniform(0.0, pace.start_s))
        after_step = done_steps + self._random.randint(1, min(left - 1, 2 * pace.save_every))
        delay_s = self._random.uniform(0, 3 * pace.step_s)
        return Strike(kind=kind, rank=rank, worker=worker, after_step=after_step, delay_s=delay_s)

    def _place(self, rank: int, done: int, *, prefix: str) -> str:
        """A fault point with conditions that will hold once in the rest of the run."""
        points = [point for point in POINTS if not point.startswith("build.") and (self._workers or point != "worker.batch")]
        chosen = next((point for point in self._bag if point.startswith(prefix)), None)
        if chosen is None:
            self._bag += self._random.sample(points, len(points))
            chosen = next(point for point in self._bag if point.startswith(prefix))
        self._bag.remove(chosen)
        return f"{chosen}:{self._conditions(chosen, rank, done)}"

    def _conditions(self, point: str, rank: int, done: int) -> str:
        pace = self._pace
        if self._every_s is None:
            step = done + self._random.randint(1, max(1, min(pace.total_steps - done, pace.save_every + 2)))
        else:
            step = done + max(1, int((self._every_s - pace.start_s) / pace.step_s))
        if point == "worker.batch":
            batches = max(1, (step - done) * pace.micro_batches // self._workers)
            return f"rank={rank}:worker={self._random.randrange(self._workers)}:batch={batches}"
        every = {"checkpoint": pace.save_every, "evaluate": pace.eval_every}.get(point.partition(".")[0], 1)
        step = min(pace.total_steps, -(-step // every) * every)
        return f"rank={0 if point in _RANK_ZERO else rank}:step={step}"


@dataclass(kw_only=True)
class Attempted:
    """What became of one attempt."""

    strike: Strike | None
    at_s: float = 0.0
    """Since the beginning of the storm."""
    from_step: int
    """Newest checkpoint it started from; 0: none."""
    has_hit: bool = False
    has_hung: bool = False
    codes: list[int] = field(default_factory=list)
    last_step: int = 0
    took_s: float = 0.0
    hit_after_s: float | None = None
    left: list[str] = field(default_factory=list)
    """Processes and ports that outlived it."""

    def as_record(self) -> dict[str, Any]:
        return {**asdict(self), "strike": self.strike.in_words() if self.strike else None}


def attempt_once(
    start: Start,
    run: Path,
    strike: Strike | None,
    *,
    said: Path,
    marker: Path,
    env: dict[str, str],
    look: Look,
) -> Attempted:
    """Start the command, strike, and wait until all of it is gone. Nothing of the attempt is left when this returns."""
    marker.unlink(missing_ok=True)
    started_s = time.monotonic()
    result = Attempted(strike=strike, from_step=newest_checkpoint(run))
    fault = {VARIABLE: strike.fault} if strike is not None and strike.fault else {}
    attempt = start(run, said, {**env, VARIABLE: "", **fault})
    try:
        moment = _Moment(strike, run) if strike is not None and not strike.fault else None
        for _ in until_ended(attempt, run):
            look(attempt, run)
            if result.hit_after_s is None and marker.exists():
                result.hit_after_s = time.monotonic() - started_s
            if moment is not None and strike is not None and moment.is_here() and _strike(strike, attempt):
                moment, result.hit_after_s = None, time.monotonic() - started_s
            if _is_survived(strike, result.hit_after_s, started_s):
                kill_all(attempt)
        result.has_hung = not has_ended(attempt)
    finally:
        if not has_ended(attempt):
            kill_all(attempt)
        outlived = end_sessions(attempt.sessions)
    while (codes := attempt.codes()) is None:
        time.sleep(0.01)
    result.codes = codes
    result.left = [f"process {process.pid}: {process.command}" for process in outlived]
    result.left += [f"listener on port {attempt.port}"] if has_listener(attempt.port) else []
    if result.hit_after_s is None and marker.exists():
        result.hit_after_s = time.monotonic() - started_s
    result.has_hit = result.hit_after_s is not None
    result.last_step, result.took_s = last_step_line(run).get("step", 0), time.monotonic() - started_s
    return result


def until_ended(attempt: Attempt, run: Path) -> Iterator[None]:
    """Look again and again, until the attempt has ended or nothing has moved for STALL_S."""
    step, moved_at_s = last_step_line(run).get("step", 0), time.monotonic()
    while not has_ended(attempt):
        yield
        time.sleep(LOOK_EVERY_S)
        if (now := last_step_line(run).get("step", 0)) != step:
            step, moved_at_s = now, time.monotonic()
        elif time.monotonic() > moved_at_s + STALL_S:
            return


def newest_checkpoint(run: Path) -> int:
    """The highest committed step; 0: none."""
    committed = candidates(run / "checkpoints")
    return int(committed[0].name.removeprefix("step-")) if committed else 0


def is_finished(run: Path) -> bool:
    return (run / FINISHED).is_file()


def _is_survived(strike: Strike | None, hit_after_s: float | None, started_s: float) -> bool:
    if strike is None or strike.then_all_after_s is None or hit_after_s is None:
        return False
    return time.monotonic() > started_s + hit_after_s + strike.then_all_after_s


class _Moment:
    """When a signal is due."""

    def __init__(self, strike: Strike, run: Path) -> None:
        self._strike, self._run = strike, run
        self._from_s: float | None = time.monotonic() if strike.after_step is None else None
        self._began_at_unix_s = time.time()

    def is_here(self) -> bool:
        step = self._strike.after_step
        if self._from_s is None and step is not None:
            line = last_step_line(self._run)
            # A line of the attempt before may be there still, of a later step.
            if line.get("step", 0) >= step and line.get("at_unix_s", 0.0) >= self._began_at_unix_s:
                self._from_s = time.monotonic()
        return self._from_s is not None and time.monotonic() >= self._from_s + self._strike.delay_s


def last_step_line(run: Path) -> dict[str, Any]:
    """The last whole line of a step in metrics.jsonl, without reading the whole file; empty where there is none."""
    try:
        with open(run / METRICS, "rb") as file:
            file.seek(max(0, file.seek(0, os.SEEK_END) - TAIL_BYTES))
            texts = file.read().splitlines()
    except FileNotFoundError:
        return {}
    for text in reversed(texts):
        with suppress(ValueError):
            line = json.loads(text)
            if "loss" in line:
                return line
    return {}


def _strike(strike: Strike, attempt: Attempt) -> bool:
    """Send the signal. False where nobody is there yet to hear it."""
    ranks = attempt.ranks()
    if strike.kind == "kill of all ranks":
        targets = list(ranks.values())
    elif strike.kind == "kill of a data worker":
        workers = workers_of(ranks[strike.rank]) if strike.rank in ranks else []
        targets = workers[strike.worker :][:1] or workers[:1]
    else:
        targets = [ranks[strike.rank]] if strike.rank in ranks else []
    for pid in targets:
        with suppress(ProcessLookupError):
            os.kill(pid, signal.SIGSTOP if strike.kind == "stop of one rank" else signal.SIGKILL)
    return bool(targets)
