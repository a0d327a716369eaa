"""Faults to bring upon a training, drawn by a seed. Pure but for its generator: no process is touched here.

A *strike* is either a fault point (VITSCALE_FAULT, so it hits at one exact place of the code), or a signal at a moment:
during the start, or some time after a step. The seed fixes what is drawn; where the processes stand when a signal
arrives is the machine's business, and each time another.
"""

import random
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

from vitscale.base.faults import POINTS

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
PASSED = ("checkpoint.", "data.", "evaluate.", "step.", "worker.")
"""The fault points that every training passes."""
SAVES_AHEAD = 3
"""How far ahead of the newest checkpoint a strike is aimed, in saves: most attempts get on, and all steps are struck."""
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
        first: int = 0,
    ) -> None:
        """`every_s`: strike about so long after each start, and after a strike that was survived; None: soon, so that a
        short run is struck often. `first`: how many of the kinds are passed over at the beginning."""
        self._random = random.Random(seed)
        self._pace, self._world, self._workers, self._every_s = pace, world, workers, every_s
        self._kinds = [kind for kind in kinds if workers or kind != "kill of a data worker"]
        self._drawn = first
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
        after_step = done_steps + self._random.randint(1, min(left - 1, SAVES_AHEAD * pace.save_every))
        delay_s = self._random.uniform(0, 3 * pace.step_s)
        return Strike(kind=kind, rank=rank, worker=worker, after_step=after_step, delay_s=delay_s)

    def _place(self, rank: int, done: int, *, prefix: str) -> str:
        """A fault point with conditions that will hold once in the rest of the run."""
        points = [point for point in POINTS if point.startswith(PASSED) and (self._workers or point != "worker.batch")]
        chosen = next((point for point in self._bag if point.startswith(prefix)), None)
        if chosen is None:
            self._bag += self._random.sample(points, len(points))
            chosen = next(point for point in self._bag if point.startswith(prefix))
        self._bag.remove(chosen)
        return f"{chosen}:{self._conditions(chosen, rank, done)}"

    def _conditions(self, point: str, rank: int, done: int) -> str:
        pace = self._pace
        if self._every_s is None:
            step = done + self._random.randint(1, max(1, min(pace.total_steps - done, SAVES_AHEAD * pace.save_every)))
        else:
            step = done + max(1, int((self._every_s - pace.start_s) / pace.step_s))
        if point == "worker.batch":
            batches = max(1, (step - done) * pace.micro_batches // self._workers)
            return f"rank={rank}:worker={self._random.randrange(self._workers)}:batch={batches}"
        every = {"checkpoint": pace.save_every, "evaluate": pace.eval_every}.get(point.partition(".")[0], 1)
        step = min(pace.total_steps, -(-step // every) * every)
        return f"rank={0 if point in _RANK_ZERO else rank}:step={step}"
