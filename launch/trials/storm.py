"""One start of a command with one strike, until all of it is gone.

the command -> attempt 1, struck -> attempt 2, struck -> ... -> an attempt nobody disturbs: the run is finished
"""

import json
import os
import signal
import time
from collections.abc import Callable, Iterator
from contextlib import suppress
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

from launch.trials.attempts import Attempt, Start, has_ended, kill_all, workers_of
from launch.trials.leftovers import end_sessions, stays_taken
from launch.trials.strikes import Strike
from vitscale.base.faults import VARIABLE
from vitscale.training.checkpoint import candidates
from vitscale.training.rundir import FINISHED

STALL_S = 180.0
"""Longest time without a new step, or after the last one, before an attempt counts as hanging."""
LOOK_EVERY_S = 0.01
METRICS = "metrics.jsonl"
TAIL_BYTES = 8192


Look = Callable[[Attempt, Path], None]
"""What is done again and again while an attempt runs in its run directory."""


def unwatched(_attempt: Attempt, _run: Path) -> None:
    pass


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
    result.left = [f"process {process.pid}: {' '.join(process.argv)}" for process in outlived]
    result.left += [f"listener on port {attempt.port}"] if stays_taken(attempt.port) else []
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
