"""Why a run should stop or save now, and how all ranks come to know it at the same step.

reason                                                      who looks
SIGTERM, SIGINT, SIGUSR1                                    every rank; the handler only sets a flag
RUN/stop, RUN/save                                          rank 0, at most once a second
run.stop_after, and SLURM_JOB_END_TIME where Slurm sets it  every rank
a launcher above the rank is gone                           every rank, at most once a second
the run directory has another owner (lease.py)              rank 0, told by the heartbeat of its lease

At the end of every step the ranks agree by one MAX over two whole numbers in host memory. On a stop the run saves, unless
this step is saved already, and ends with 76; without a lease it leaves unsaved with 75. A file that was obeyed is removed.
`save` that contains the word keep makes a checkpoint that is never deleted: step-NNNNNNNN.keep beside it says so.

A signal before the first step or after the last ends the program at once, as ever. What cannot be agreed because a rank
is gone is not for this file: the collective fails, or the watch ends the process.
"""

import os
import signal
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from enum import IntEnum
from pathlib import Path
from types import TracebackType
from typing import Any

from vitscale.base.cluster import Cluster
from vitscale.base.errors import LeaseLost, StopRequested
from vitscale.base.host import Process, is_alive, process_of, seconds_since_start
from vitscale.base.launchers import launchers_above
from vitscale.base.lease import Lease
from vitscale.base.progress import seconds_of
from vitscale.training.checkpoint import directory_name
from vitscale.training.collectives import max_over_ranks
from vitscale.training.metrics import Metrics

LOOK_EVERY_S = 1.0
RESERVE_S = 60.0
"""Time before a limit that is left for what nobody has measured; of a short run.stop_after a twentieth."""
_SIGNALS = (signal.SIGTERM, signal.SIGINT, signal.SIGUSR1)


class Why(IntEnum):
    """Reasons to stop; of several the highest is told."""

    NOTHING = 0
    STOP_FILE = 1
    TIME_LIMIT = 2
    SIGUSR1 = 3
    SIGINT = 4
    SIGTERM = 5
    LAUNCHER_GONE = 6
    LEASE_LOST = 7


@dataclass(frozen=True, kw_only=True)
class Order:
    """What all ranks do now."""

    save: bool = False
    keep: bool = False
    """The checkpoint of this step is never deleted."""
    stop: str | None = None
    """The reason in words. What stands in the stop file only rank 0 knows."""


class Steering:
    """Ears and eyes of one rank during the training: a context that hears signals."""

    def __init__(
        self,
        run: Path,
        *,
        rank: int,
        total_steps: int,
        seconds_left: float | None = None,
        launchers: Sequence[Process] = (),
        lease: Lease | None = None,
        agree: Callable[[Sequence[int]], list[int]] = max_over_ranks,
        clock: Callable[[], float] = time.monotonic,
    ) -> None:
        self._run = run
        self._rank = rank
        self._total_steps = total_steps
        self._launchers = launchers
        self._lease = lease
        self._max_over_ranks = agree
        self._clock = clock
        self._limit_s = None if seconds_left is None else clock() + seconds_left
        self._heard = Why.NOTHING
        self._before: dict[int, Any] = {}
        self._looked_at_s = -LOOK_EVERY_S
        self._agreed_at_s = clock()
        self._steps = 0
        self._longest_step_s = 0.0
        self._longest_save_s = 0.0
        self._stop_says = ""
        self._save_seen: tuple[int, int] | None = None

    def __enter__(self) -> "Steering":
        for number in _SIGNALS:
            self._before[number] = signal.signal(number, self._hear)
            signal.siginterrupt(number, False)  # whatever library waits in a system call goes on waiting
        self._agreed_at_s = self._clock()
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None) -> None:
        # The process is about to end with its own exit code; a launcher that sends one more signal must not replace it.
        is_leaving = kind is not None and issubclass(kind, StopRequested | LeaseLost)
        for number, handler in self._before.items():
            signal.signal(number, signal.SIG_IGN if is_leaving else handler)

    def note_save(self, seconds: float) -> None:
        """A save took so long; the time limit leaves room for two of the longest, as one may be on its way by then."""
        self._longest_save_s = max(self._longest_save_s, seconds)

    def may_commit(self) -> bool:
        """Whether this rank may rename a checkpoint into place: rank 0 asks its lease."""
        return self._lease is None or self._lease.is_mine()

    def agree(self, step: int) -> Order:
        """The order after `step` steps, the same on every rank. Collective; raises LeaseLost."""
        now_s = self._clock()
        self._note_step(now_s - self._agreed_at_s)
        self._agreed_at_s = now_s
        why, save = self._wish(now_s)
        votes = self._max_over_ranks([(why << 32) | self._rank if why else 0, save])
        why, rank = Why(votes[0] >> 32), votes[0] & 0xFFFF_FFFF
        if why is Why.LEASE_LOST:
            raise LeaseLost(
                f"{self._run} has another owner now, whom {self._run / 'lease.json'} names; this training ends after step "
                f"{step} without saving, and the other one goes on"
            )
        # After the last step the run is finished: there is nothing left to stop.
        reason = self._in_words(why, rank) if why and step < self._total_steps else None
        return Order(save=votes[1] > 0, keep=votes[1] > 1, stop=reason)

    def obey(self, order: Order, step: int, metrics: Metrics | None) -> None:
        """The step is saved as ordered: put away the files that asked for it. Collective; raises StopRequested."""
        if self._rank == 0:
            if order.keep:
                kept = self._run / "checkpoints" / f"{directory_name(step)}.keep"
                kept.parent.mkdir(exist_ok=True)  # the save is on its way, and may not have come so far
                kept.touch()
            if order.save and self._save_seen == _identity(self._run / "save"):  # not one that came since
                (self._run / "save").unlink(missing_ok=True)
            if order.stop or step == self._total_steps:
                (self._run / "stop").unlink(missing_ok=True)
        if order.stop:
            if metrics is not None:
                metrics.stopped(step, order.stop)
            self._max_over_ranks([0, 0])  # the word is out before a launcher sees the first rank end
            raise StopRequested(order.stop)

    def _hear(self, number: int, frame: object) -> None:
        is_first, self._heard = not self._heard, max(self._heard, Why[signal.Signals(number).name])
        if is_first and self._rank == 0:
            os.write(2, f"{signal.Signals(number).name}: saving and stopping after this step\n".encode())

    def _note_step(self, seconds: float) -> None:
        # The first step compiles and warms up; it counts only as long as no other is known.
        self._longest_step_s = seconds if self._steps < 2 else max(self._longest_step_s, seconds)
        self._steps += 1

    def _wish(self, now_s: float) -> tuple[Why, int]:
        """What this rank wants: (why it should stop, 0 or 1 or 2: to save or to save and keep)."""
        why, save = self._heard, 0
        if now_s - self._looked_at_s >= LOOK_EVERY_S:
            self._looked_at_s = now_s
            if not all(is_alive(launcher) for launcher in self._launchers):
                why = Why.LAUNCHER_GONE
            if self._rank == 0:
                stop, save = self._look_at_files()
                why = max(why, stop)
        if self._limit_s is not None and now_s + self._longest_step_s + 2 * self._longest_save_s >= self._limit_s:
            why = max(why, Why.TIME_LIMIT)
        if self._lease is not None and self._lease.is_lost:
            why = Why.LEASE_LOST
        return why, save

    def _look_at_files(self) -> tuple[Why, int]:
        stop, save = (_words_in(self._run / name) for name in ("stop", "save"))
        self._stop_says = stop or ""
        self._save_seen = _identity(self._run / "save")
        return (
            Why.NOTHING if stop is None else Why.STOP_FILE,
            0 if save is None else 2 if "keep" in save.split() else 1,
        )

    def _in_words(self, why: Why, rank: int) -> str:
        if why is Why.STOP_FILE:
            return f"the file {self._run / 'stop'} asked for it{f' ({self._stop_says})' if self._stop_says else ''}"
        if why is Why.TIME_LIMIT:
            return (
                f"its time limit is near (longest step {self._longest_step_s:.1f} s, longest save {self._longest_save_s:.1f} s)"
            )
        if why is Why.LAUNCHER_GONE:
            return f"the launcher above rank {rank} is gone"
        return f"{why.name} came to rank {rank}"


def seconds_left(*, stop_after_s: float, age_s: float, environ: Mapping[str, str], now_unix_s: float) -> float | None:
    """How long a start of the program may still run, a reserve taken off; None: without limit. Pure."""
    limits = []
    if stop_after_s:
        limits.append(stop_after_s - age_s - min(RESERVE_S, stop_after_s / 20))
    job_end = environ.get("SLURM_JOB_END_TIME", "")
    if job_end.isdecimal():
        limits.append(int(job_end) - now_unix_s - RESERVE_S)
    return min(limits, default=None)


def steering_of(run: Path, cluster: Cluster, *, total_steps: int, stop_after: int | str, lease: Lease | None) -> Steering:
    """The steering of this process, whose time counts from its start."""
    process = process_of(os.getpid())
    limit_s = seconds_left(
        stop_after_s=seconds_of(stop_after),
        age_s=seconds_since_start(process) if process else 0.0,
        environ=os.environ,
        now_unix_s=time.time(),
    )
    launchers = launchers_above()
    return Steering(run, rank=cluster.rank, total_steps=total_steps, seconds_left=limit_s, launchers=launchers, lease=lease)


def _words_in(path: Path) -> str | None:
    """The first words of a file, empty where it cannot be read; None where there is none."""
    try:
        with open(path, "rb") as file:
            return " ".join(file.read(200).decode(errors="replace").split())
    except OSError:
        return "" if path.is_file() else None


def _identity(path: Path) -> tuple[int, int] | None:
    try:
        stat = path.stat()
    except OSError:
        return None
    return stat.st_ino, stat.st_mtime_ns
